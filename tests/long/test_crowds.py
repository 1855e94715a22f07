"""Attackers against the queue before the hash: what honest people notice of them, on a real service.

Each test takes a minute or more and prints its figures. ``pytest -m long`` runs them. The bounds hold for two cores
that have nothing else to do, which make about 7 hashes a second beside the load.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from urllib.parse import urlencode

import pytest

from credentials import passwords
from storage import DB
from tests.conftest import Service
from tests.production import PASSWORD, PROXY, PUBLIC_URL

pytestmark = pytest.mark.long

COST = 12
PATIENCE = 15  # seconds that an honest person waits
CLIENT_TIMEOUT = 30  # seconds
LOAD_THREADS = 200  # more than the requests that can wait for a hash or be hashed

# The people who sign in with a device cookie, and their address. Each of them comes every third second, as one account
# has priority for 30 logins at once and one more a minute.
OWNERS = "owner0@x.io", "owner1@x.io", "owner2@x.io"
HOME = "203.0.113.7"


@dataclass
class Browser:
    """What sends a request: an address, and the cookies that it keeps."""

    address: str
    cookies: dict[str, str] = field(default_factory=dict)

    @property
    def has_device_cookie(self) -> bool:
        return "__Host-device" in self.cookies


@dataclass(frozen=True)
class Answer:
    status: int
    seconds: float  # from the connection to the end of the answer


def sign_in(service: Service, browser: Browser, email: str, password: str = PASSWORD) -> Answer:
    """Sign in as through the proxy, on a new connection. The cookies are kept although they are ``Secure``."""
    headers = {
        "Content-Type": "application/x-www-form-urlencoded",
        "Cookie": "; ".join(f"{name}={value}" for name, value in browser.cookies.items()),
        "X-Forwarded-For": browser.address,
        "X-Forwarded-Proto": "https",
    }
    began = time.monotonic()
    with closing(HTTPConnection(*service.address, timeout=CLIENT_TIMEOUT)) as connection:
        connection.request("POST", "/sessions", urlencode({"email": email, "password": password}), headers)
        answer = connection.getresponse()
        answer.read()
    for cookie in answer.headers.get_all("Set-Cookie", ()):
        name, _, value = cookie.partition(";")[0].partition("=")
        browser.cookies[name] = value
    return Answer(answer.status, time.monotonic() - began)


class Stream:
    """Sends requests at a steady rate, whether or not the earlier ones are answered."""

    def __init__(self, rate: float, send: Callable[[int], Answer]) -> None:
        self._rate, self._send = rate, send
        self.answers: list[Answer] = []

    def run(self, seconds: float) -> None:
        """Send for so many seconds, then wait for the last answers."""
        began = time.monotonic()
        with ThreadPoolExecutor(LOAD_THREADS) as pool:
            sent = []
            for number in range(int(self._rate * seconds)):
                time.sleep(max(0.0, began + number / self._rate - time.monotonic()))
                sent.append(pool.submit(self._send, number))
            self.answers = [one.result() for one in sent]

    def share(self, status: int, within: float = math.inf) -> float:
        """Return the share of the requests that got this status within so many seconds."""
        good = [answer for answer in self.answers if answer.status == status and answer.seconds <= within]
        return len(good) / len(self.answers)

    @property
    def p99(self) -> float:
        """Seconds within which 99 % of the requests are answered, by the nearest rank."""
        return sorted(answer.seconds for answer in self.answers)[math.ceil(0.99 * len(self.answers)) - 1]

    def __str__(self) -> str:
        statuses = " ".join(f"{status}: {count}" for status, count in sorted(Counter(self.statuses).items()))
        median = sorted(answer.seconds for answer in self.answers)[len(self.answers) // 2]
        longest = max(answer.seconds for answer in self.answers)
        return f"{statuses}; median {median:.2f} s, p99 {self.p99:.2f} s, longest {longest:.2f} s"

    @property
    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers]


@pytest.fixture
def service(start: Callable[..., Service], database: str) -> Service:
    """A service with production settings, and with the accounts of these tests. All have the same password."""
    people = [f"stranger{number}@x.io" for number in range(80)] + [f"attacker{number}@x.io" for number in range(200)]
    password_hash = passwords.hash_password(PASSWORD, COST)
    with closing(DB(database)) as db:
        for email in (*OWNERS, *people, "victim@x.io"):
            db.add_user(email, password_hash)
    return start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY=PROXY, AUTHSVC_BCRYPT_COST=str(COST))


class Scene:
    """Honest people with and without a device cookie, and an attacker, who sign in at the same time."""

    def __init__(self, service: Service, rate: float, attack: Callable[[int], Answer]) -> None:
        owners = [(Browser(HOME), email) for email in OWNERS]
        for browser, email in owners:
            assert sign_in(service, browser, email).status == 200
            assert browser.has_device_cookie

        def return_as_owner(number: int) -> Answer:
            return sign_in(service, *owners[number % len(owners)])

        def come_as_stranger(number: int) -> Answer:
            return sign_in(service, Browser(f"100.{number}.7.1"), f"stranger{number}@x.io")

        self.device, self.without = Stream(1, return_as_owner), Stream(1, come_as_stranger)
        self.attack = Stream(rate, attack)

    def run(self, seconds: float, title: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Send all three streams for so many seconds, and print the figures."""
        streams = self.device, self.without, self.attack
        threads = [threading.Thread(target=stream.run, args=(seconds,)) for stream in streams]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hashes = sum(stream.statuses.count(200) + stream.statuses.count(401) for stream in streams)
        rate = hashes / (time.monotonic() - began)
        with capsys.disabled():
            print(f"\n{title}, {rate:.1f} hashes/s", *map(str, streams), sep=" | ")


def test_50_addresses_with_wrong_passwords(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    attackers = [Browser(f"{20 + number}.{number}.3.4") for number in range(50)]

    def attack(number: int) -> Answer:
        return sign_in(service, attackers[number % 50], f"unknown{number}@x.io", "a wrong password of 32 characters")

    scene = Scene(service, 40, attack)
    scene.run(60, "50 addresses, 40/s, wrong passwords", capsys)
    assert scene.device.share(200) >= 0.99
    assert scene.device.p99 <= 1.5
    assert scene.without.share(200, within=PATIENCE) >= 0.95


@pytest.mark.parametrize("succeeds", [False, True], ids=["wrong passwords", "a valid account"])
def test_250_networks_of_one_home(service: Service, capsys: pytest.CaptureFixture[str], succeeds: bool) -> None:
    attackers = [Browser(f"2001:db8:7:{0x4200 + number:x}::1") for number in range(250)]  # within a /56

    def attack(number: int) -> Answer:
        browser = Browser(attackers[number % 250].address)
        if succeeds:
            return sign_in(service, browser, "attacker0@x.io")
        return sign_in(service, browser, f"unknown{number}@x.io", "a wrong password of 32 characters")

    scene = Scene(service, 12, attack)
    kind = "one valid account" if succeeds else "wrong passwords"
    scene.run(70, f"250 /64s of one /56, 12/s, {kind}", capsys)
    assert scene.device.share(200) >= 0.99
    assert scene.device.p99 <= 1.5
    assert scene.without.share(200) >= 0.95
    assert scene.without.p99 <= 4


def test_300_sites_with_device_cookies(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    sites = [f"2001:db8:{number:x}::1" for number in range(1, 301)]  # /48s of one /32
    attackers = [Browser(site) for site in sites[:200]]
    with ThreadPoolExecutor(16) as pool:  # 200 hashes, so half a minute
        first = pool.map(lambda number: sign_in(service, attackers[number], f"attacker{number}@x.io"), range(200))
    assert {answer.status for answer in first} == {200}
    assert all(attacker.has_device_cookie for attacker in attackers)
    foreign = itertools.cycle([*OWNERS, "victim@x.io", *(f"stranger{number}@x.io" for number in range(80))])

    def attack(number: int) -> Answer:
        attacker = attackers[number // 2 % 200]
        browser = Browser(sites[number % 300], dict(attacker.cookies))
        if number % 2:
            return sign_in(service, browser, next(foreign), "a wrong password of 32 characters")
        return sign_in(service, browser, f"attacker{number // 2 % 200}@x.io")

    scene = Scene(service, 12, attack)
    scene.run(60, "300 /48s of one /32 with 200 device cookies, 12/s", capsys)
    assert scene.device.share(200) >= 0.99
    assert scene.device.p99 <= 1.5
    assert scene.without.share(200, within=PATIENCE) >= 0.95
