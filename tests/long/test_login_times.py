"""The time of a refused login tells nothing about the account. Takes minutes: run it with ``pytest -m long``."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import bcrypt
import pytest

from auth import Auth
from authsvc import create_app
from settings import Settings
from storage import DB
from tests.conftest import Client
from tests.production import PUBLIC_URL

PAIRS, COST = 200, 10
HASH = bcrypt.hashpw(b"the right password", bcrypt.gensalt(COST))

Form = tuple[str, str | None]  # an email and a device cookie


@pytest.fixture
def settings(database: str) -> Settings:
    return Settings(database=database, public_url=PUBLIC_URL, bcrypt_cost=COST)


@pytest.fixture
def kinds(db: DB, auth: Auth) -> dict[str, Callable[[int], Form]]:
    """What the n-th request of each kind sends. Each account is used once, so that no limit applies."""
    for n in range(PAIRS):
        for name in ("known", "device", "disabled", "factor"):
            db.add_user(f"{name}{n:03}@x.io", HASH)
        db.disable_user(db.find_user_by(email=f"disabled{n:03}@x.io").id, 1)
        factor = db.find_user_by(email=f"factor{n:03}@x.io")
        session = auth.create_session(factor.email)
        assert session
        factor = db.find_user_by(id=factor.id)
        held = factor.session_id or ""
        assert db.set_totp(factor, "A" * 32, held, held)
        factor = db.find_user_by(id=factor.id)
        assert db.confirm_totp(factor, 1, [], now=int(auth._clock()), kept=held, renewed=f"new{n}")

    def device(n: int) -> str:
        return auth.device_cookie(db.find_user_by(email=f"device{n:03}@x.io"), None) or ""

    return {
        "unknown": lambda n: (f"unknown{n:03}@x.io", None),
        "unknown, with a device cookie of another account": lambda n: (f"nobody{n:03}@x.io", device(n)),
        "disabled": lambda n: (f"disabled{n:03}@x.io", None),
        "with a second factor": lambda n: (f"factor{n:03}@x.io", None),
        "known, with a device cookie": lambda n: (f"device{n:03}@x.io", device(n)),
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        "unknown",
        "unknown, with a device cookie of another account",
        "disabled",
        "with a second factor",
        "known, with a device cookie",
    ],
)
def test_the_time_of_a_refused_login_reveals_nothing(
    settings: Settings,
    auth: Auth,
    kinds: dict[str, Callable[[int], Form]],
    kind: str,
    record_property: Callable[..., None],
) -> None:
    call, order = Client(create_app(settings, auth)), random.Random(1)

    def seconds(form: Form, n: int) -> float:
        email, device = form
        cookie = device and f"__Host-device={device}"
        began = time.perf_counter()
        answer = call(
            "POST",
            "/sessions",
            {"email": email, "password": "wrong"},
            cookie=cookie,
            REMOTE_ADDR=f"10.0.{n // 250}.{n % 250}",
        )
        took = time.perf_counter() - began
        assert answer.status == 401
        return took

    took: dict[str, list[float]] = {"known": [], kind: []}
    for n in range(PAIRS):
        forms = {"known": (f"known{n:03}@x.io", None), kind: kinds[kind](n)}
        for name in order.sample(sorted(forms), 2):
            took[name].append(seconds(forms[name], 2 * n + (name == kind)))
    ratio = statistics.median(took[kind]) / statistics.median(took["known"])
    record_property("ratio", f"{ratio:.4f}")
    print(f"{kind}: {ratio:.4f}")
    assert 0.97 <= ratio <= 1.03
