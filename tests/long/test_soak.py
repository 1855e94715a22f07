"""Twenty minutes of honest and hostile traffic at once: the memory and the descriptors of the service stay the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests import hostile
from tests.conftest import Service
from tests.production import PUBLIC_URL

pytestmark = pytest.mark.long

MINUTES = 20
MAX_GROWTH = 4 * 2**20  # bytes, from the fifth minute on


def resident(service: Service) -> int:
    return int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]) * 4096


def descriptors(service: Service) -> int:
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


def use(service: Service, number: int, until: float, failures: list[str]) -> None:
    """Sign in, read the profile a hundred times, and sign out, again and again. Requests come from changing clients."""
    form = {"email": f"user{number}@x.io", "password": "tarte flambee du dimanche"}
    client = 0
    with requests.Session() as http:
        while time.monotonic() < until:
            client += 1
            http.headers.update({"X-Forwarded-For": f"10.{number}.{client // 250}.{client % 250}"})
            http.headers["X-Forwarded-Proto"] = "https"
            http.cookies.clear()
            answers = [http.post(f"{service.url}/users", data=form, timeout=20)] if client == 1 else []
            answers.append(http.post(f"{service.url}/sessions", data=form, timeout=20))
            cookie = {"Cookie": "; ".join(f"{name}={value}" for name, value in answers[-1].cookies.items())}
            answers += [http.get(f"{service.url}/profile", headers=cookie, timeout=20) for _ in range(100)]
            answers.append(http.delete(f"{service.url}/sessions", headers=cookie, timeout=20, allow_redirects=False))
            failures += [f"{one.request.url} {one.status_code}" for one in answers if one.status_code not in (200, 302)]
            time.sleep(0.1)


def test_twenty_minutes_of_traffic_take_no_memory(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY="127.0.0.1", AUTHSVC_BCRYPT_COST="10")
    until, failures = time.monotonic() + MINUTES * 60, list[str]()
    users = [threading.Thread(target=use, args=(service, number, until, failures), daemon=True) for number in range(4)]
    for user in users:
        user.start()
    seen = []
    for minute, attack in zip(range(MINUTES), list(hostile.ATTACKS) * MINUTES):
        peers = hostile.Peers(service.address, *hostile.ATTACKS[attack])
        peers.hold(40, a_second=20)
        peers.close()
        while time.monotonic() < until - (MINUTES - minute - 1) * 60:
            time.sleep(0.5)
        seen.append((resident(service), descriptors(service)))
        print(f"minute {minute + 1}: {seen[-1][0] / 2**20:.1f} MB, {seen[-1][1]} descriptors", flush=True)
    for user in users:
        user.join(60)
    assert failures == []
    assert max(memory for memory, _ in seen[5:]) <= seen[4][0] + MAX_GROWTH
    assert max(count for _, count in seen[5:]) <= seen[4][1] + 16
