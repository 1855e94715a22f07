"""Rate limits: which attempts are counted, how fast a limit refills, and how many guesses an attacker gets."""

from __future__ import annotations

import itertools
import re
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests

from auth import UNCOUNTED, Auth, Caller, TooManyAttempts
from authsvc import create_app
from credentials import totp
from engines.sqlite import SQLiteEngine
from rate_limit import Buckets, RateLimiter
from settings import Settings
from storage import DB
from tables.rate_limits import Bucket
from tests.conftest import COST, Answer, Client, Clock, Service, raw_connection
from tests.production import BOB, PASSWORD, production_settings

HOME = "192.0.2.1"  # an address of Bob's
AWAY = "198.51.100.7"  # an address that he never signed in from
DAY = 86_400

Rows = Callable[[], list[tuple[str, int]]]
Attempt = Callable[[RateLimiter, int], Iterable[Buckets]]


def ipv6(network: int, client: int = 0) -> str:
    """Return an address in the /64 ``client`` of the /56 ``network``, in one /48."""
    return f"2001:db8:0:{network:02x}{client:02x}::1"


# The buckets of the n-th attempt of a series; attempts that are allowed at once; seconds until one more is allowed.
LIMITS: dict[str, tuple[Attempt, int, int]] = {
    "login: account and address": (lambda limiter, n: limiter.login(BOB, HOME), 10, 60),
    "login: account and /64": (lambda limiter, n: limiter.login(BOB, f"2001:db8::{n:x}"), 10, 60),
    "login: account": (lambda limiter, n: limiter.login(BOB, f"192.0.2.{n}"), 20, 900),
    "login: address": (lambda limiter, n: limiter.login(f"{n}@x.io", HOME), 30, 30),
    "login: /56": (lambda limiter, n: limiter.login(f"{n}@x.io", ipv6(0, n)), 120, 30),
    "login: /48": (lambda limiter, n: limiter.login(f"{n}@x.io", ipv6(n % 200, n // 200)), 480, 30),
    "login: device": (lambda limiter, n: islice(limiter.login(BOB, f"192.0.2.{n}", "one"), 1), 10, 60),
    "login: devices": (lambda limiter, n: islice(limiter.login(BOB, HOME, f"{n}"), 1), 100, 900),
    "register: address": (lambda limiter, n: limiter.registration(HOME), 20, 180),
    "register: /56": (lambda limiter, n: limiter.registration(ipv6(0, n)), 80, 180),
    "register: /48": (lambda limiter, n: limiter.registration(ipv6(n % 200, n // 200)), 320, 180),
    "reset: account": (lambda limiter, n: limiter.mails("reset", BOB), 3, 1200),
    "reset: account, known": (lambda limiter, n: limiter.mails("reset of devices", BOB), 3, 1200),
    "reset: address": (lambda limiter, n: limiter.reset_address(HOME), 10, 360),
    "reset: /56": (lambda limiter, n: limiter.reset_address(ipv6(0, n)), 40, 360),
    "reset: /48": (lambda limiter, n: limiter.reset_address(ipv6(n)), 160, 360),
    "confirm: address": (lambda limiter, n: limiter.unknown_token(HOME), 10, 60),
    "confirm: /56": (lambda limiter, n: limiter.unknown_token(ipv6(0, n)), 40, 60),
    "confirm: /48": (lambda limiter, n: limiter.unknown_token(ipv6(n)), 160, 60),
    "code: account": (lambda limiter, n: limiter.code(BOB, None), 5, 3600),
    "code: account, after a reset": (lambda limiter, n: limiter.code(BOB, "reset"), 5, 3600),
    "code: account, known": (lambda limiter, n: limiter.code(BOB, "full"), 5, 900),
    "session": (lambda limiter, n: limiter.session_password(1, BOB), 10, 900),
}
ALL_LIMITS = pytest.mark.parametrize(("attempt", "size", "interval"), LIMITS.values(), ids=LIMITS)
# The arithmetic depends only on the number of buckets: here one, two and three.
SAMPLES = {name: LIMITS[name] for name in ("confirm: address", "session", "login: account")}
SOME_LIMITS = pytest.mark.parametrize(("attempt", "size", "interval"), SAMPLES.values(), ids=SAMPLES)


@pytest.fixture
def settings(database: str) -> Settings:
    return production_settings(database)


@pytest.fixture
def development(settings: Settings) -> Settings:
    return Settings(database=settings.database, bcrypt_cost=COST)


@pytest.fixture
def limiter(db: DB, settings: Settings, clock: Clock) -> RateLimiter:
    return RateLimiter(db.rate_limits, settings, clock)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The passwords that were compared by bcrypt."""
    passwords: list[bytes] = []
    checkpw = bcrypt.checkpw

    def count(password: bytes, hashed: bytes) -> bool:
        passwords.append(password)
        return checkpw(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", count)
    return passwords


@pytest.fixture
def bob(auth: Auth) -> None:
    auth.register_user(BOB, PASSWORD)


def log_in(
    call: Client, email: str = BOB, password: str = "wrong", address: str = HOME, device: str | None = None
) -> Answer:
    cookie = device and f"__Host-device={device}"
    return call("POST", "/sessions", {"email": email, "password": password}, cookie=cookie, REMOTE_ADDR=address)


@pytest.fixture
def rows(db: DB, settings: Settings) -> Iterator[Rows]:
    """Read the rows of the table."""
    with raw_connection(settings.database) as connection:
        yield lambda: connection.execute("SELECT key, full_at FROM throttle ORDER BY key").fetchall()


def wait(limiter: RateLimiter, choices: Iterable[Buckets]) -> int:
    """Count an attempt; return the seconds to wait, or 0."""
    return limiter.consume(choices)[0]


def allowed(consume: Callable[[int], int], limit: int = 10_000) -> int:
    """Return how many attempts are allowed before the first one that must wait."""
    return next(number for number in range(limit) if consume(number))


# The buckets


@ALL_LIMITS
@pytest.mark.slow
def test_a_bucket_allows_its_size_of_attempts_at_once(
    limiter: RateLimiter, attempt: Attempt, size: int, interval: int
) -> None:
    assert allowed(lambda n: wait(limiter, attempt(limiter, n))) == size


@ALL_LIMITS
@pytest.mark.slow
def test_an_empty_bucket_allows_one_attempt_per_interval(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        wait(limiter, attempt(limiter, n))
    for n in range(size, size + 3):
        assert wait(limiter, attempt(limiter, n)) == interval
        clock.advance(interval)
        assert wait(limiter, attempt(limiter, n)) == 0


@ALL_LIMITS
@pytest.mark.slow
def test_an_empty_bucket_allows_no_attempt_before_the_interval(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        wait(limiter, attempt(limiter, n))
    clock.advance(interval - 1)
    assert wait(limiter, attempt(limiter, size)) > 0


@pytest.mark.both_engines
@SOME_LIMITS
def test_a_bucket_refills_to_its_size_and_no_further(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        wait(limiter, attempt(limiter, n))
    clock.advance(size * interval - 1)
    assert allowed(lambda n: wait(limiter, attempt(limiter, n))) == size - 1
    clock.advance(7 * DAY)
    assert allowed(lambda n: wait(limiter, attempt(limiter, n))) == size


def test_development_limits_are_higher_except_for_guesses_at_one_account(
    db: DB, development: Settings, clock: Clock
) -> None:
    limiter = RateLimiter(db.rate_limits, development, clock)
    sizes = {
        name: [bucket.size for bucket in next(iter(attempt(limiter, 0)))] for name, (attempt, _, _) in LIMITS.items()
    }
    assert sizes == {
        "login: account and address": [10, 20, 3000],
        "login: account and /64": [10, 40, 20, 3000, 12_000, 48_000],
        "login: account": [10, 20, 3000],
        "login: address": [10, 20, 3000],
        "login: /56": [10, 40, 20, 3000, 12_000, 48_000],
        "login: /48": [10, 40, 20, 3000, 12_000, 48_000],
        "login: device": [10, 100, 30],
        "login: devices": [10, 100, 30],
        "register: address": [2000],
        "register: /56": [2000, 8000, 32_000],
        "register: /48": [2000, 8000, 32_000],
        "reset: account": [300],
        "reset: account, known": [300],
        "reset: address": [1000],
        "reset: /56": [1000, 4000, 16000],
        "reset: /48": [1000, 4000, 16000],
        "confirm: address": [1000],
        "confirm: /56": [1000, 4000, 16000],
        "confirm: /48": [1000, 4000, 16000],
        "code: account": [5],
        "code: account, after a reset": [5],
        "code: account, known": [5],
        "session": [10, 30],
    }


def test_nothing_is_counted_when_rate_limits_are_off(rows: Rows, db: DB, development: Settings, clock: Clock) -> None:
    settings = Settings(database=development.database, bcrypt_cost=COST, throttle=False)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    assert {log_in(call, address="127.0.0.1").status for _ in range(50)} == {401}
    assert rows() == []


# One attempt


def test_an_attempt_from_a_new_address_that_is_refused_writes_nothing(
    rows: Rows, limiter: RateLimiter, settings: Settings
) -> None:
    for n in range(20):
        wait(limiter, limiter.login(BOB, f"192.0.2.{n}"))
    with closing(sqlite3.connect(settings.database)) as other:
        before = rows(), other.execute("PRAGMA data_version").fetchone()
        for n in range(20, 60):
            assert wait(limiter, limiter.login(BOB, f"192.0.2.{n}"))
        assert (rows(), other.execute("PRAGMA data_version").fetchone()) == before


@pytest.mark.both_engines
def test_refused_attempts_do_not_prolong_the_wait(limiter: RateLimiter, clock: Clock) -> None:
    confirmation = limiter.unknown_token(HOME)
    assert allowed(lambda n: wait(limiter, confirmation)) == 10
    for _ in range(59):
        clock.advance(1)
        assert wait(limiter, confirmation)
    clock.advance(1)
    assert wait(limiter, confirmation) == 0


@pytest.mark.both_engines
@pytest.mark.slow
def test_of_50_simultaneous_logins_only_10_reach_bcrypt(
    db: DB, development: Settings, clock: Clock, compared: list[bytes]
) -> None:
    auth, start = Auth(db, development, clock), threading.Barrier(50)

    def attempt(_: int) -> str:
        start.wait(10)
        return outcome(lambda: auth.log_in(BOB, "wrong", caller=Caller(HOME)))

    with ThreadPoolExecutor(50) as pool:
        outcomes = Counter(pool.map(attempt, range(50)))
    assert outcomes == {"LoginFailed": 10, "TooManyAttempts": 40}
    assert len(compared) == 10


@pytest.mark.both_engines
def test_an_attempt_with_a_slightly_older_time_is_counted_too(db: DB) -> None:
    # An attempt reads the clock before it waits for the write lock, so another one may be a second ahead.
    bucket = [Bucket("key", 10, 60)]
    assert [db.rate_limits.consume(bucket, 1_800_000_001) for _ in range(10)] == [0] * 10
    assert db.rate_limits.consume(bucket, 1_800_000_000) > 0


# Attempts that are not counted


def test_a_successful_login_is_not_counted(call: Client, bob: None) -> None:
    for _ in range(9):
        assert log_in(call).status == 401
    assert {log_in(call, password=PASSWORD).status for _ in range(31)} == {200}
    assert log_in(call).status == 401
    assert log_in(call).status == 429


@pytest.mark.both_engines
def test_a_successful_login_refunds_every_bucket(rows: Rows, call: Client, bob: None, db: DB) -> None:
    log_in(call, password=PASSWORD, address=HOME)
    log_in(call, address=AWAY)
    before = rows()
    log_in(call, password=PASSWORD, address=AWAY)
    assert rows() == before


def test_a_valid_reset_token_is_not_counted(auth: Auth, bob: None) -> None:
    for number in range(12):
        token = auth.get_reset_password_token(BOB)
        auth.reset_password(token, f"{PASSWORD} {number}", email=BOB, caller=Caller(HOME))


@pytest.mark.usefixtures("bob")
def test_a_successful_registration_is_counted(call: Client) -> None:
    def register(number: int) -> int:
        form = {"email": f"{number}@x.io", "password": PASSWORD}
        return call("POST", "/users", form, REMOTE_ADDR=HOME).status

    assert [register(number) for number in range(21)] == [200] * 20 + [429]


# One-time codes


class Phone:
    """Bob's authenticator app, and his browser. Each code is for a new time step."""

    def __init__(self, auth: Auth, clock: Clock) -> None:
        self.session_id = auth.log_in(BOB, PASSWORD, caller=Caller(HOME))[1]
        self._clock = clock
        self._seed, _, _, self.session_id = auth.begin_totp(self.session_id, PASSWORD, caller=UNCOUNTED)
        user, self.session_id, self.recovery = auth.confirm_totp(self.session_id, self.code(), caller=UNCOUNTED)
        self.device = auth.device_cookie(user, None)

    def code(self) -> str:
        self._clock.advance(totp.STEP)
        return totp.code(self._seed, int(self._clock()) // totp.STEP)

    def wrong(self) -> str:
        right = {totp.code(self._seed, int(self._clock()) // totp.STEP + step) for step in (-1, 0, 1)}
        return next(code for code in ("000000", "111111", "222222", "333333") if code not in right)


@pytest.fixture
def phone(auth: Auth, clock: Clock, bob: None) -> Phone:
    """Bob uses two-factor authentication."""
    return Phone(auth, clock)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The one-time codes that were compared with the codes of a seed."""
    codes: list[str] = []
    matching_step = totp.matching_step

    def count(seed: str, given: str, now: int) -> int | None:
        codes.append(given)
        return matching_step(seed, given, now)

    monkeypatch.setattr(totp, "matching_step", count)
    return codes


def outcome(act: Callable[[], object]) -> str:
    """Return the name of the error that this raises, or "done"."""
    try:
        act()
    except ValueError as refusal:
        return type(refusal).__name__
    return "done"


def log_in_with(auth: Auth, otp: str, address: str, password: str = PASSWORD, device: str | None = None) -> str:
    """Sign in as Bob; return the outcome."""
    return outcome(lambda: auth.log_in(BOB, password, otp, caller=Caller(address, device)))


def test_100_addresses_share_5_code_guesses_and_the_owner_can_sign_in(
    auth: Auth, phone: Phone, checked: list[str], clock: Clock
) -> None:
    guesses, owners, guess = Counter[str](), [], phone.wrong()
    began = clock()
    for n in range(100):
        guesses[log_in_with(auth, guess, f"10.0.0.{n}")] += 1
        if n % 20 == 0:
            owners.append(log_in_with(auth, phone.code(), HOME, device=phone.device))
    assert clock() - began < 900
    assert guesses == {"LoginFailed": 5, "TooManyAttempts": 95}
    assert owners == ["done"] * 5
    assert checked.count(guess) == 5


def test_code_guesses_from_the_owners_browser_are_limited_to_5(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    outcomes = [log_in_with(auth, guess, HOME, device=phone.device) for _ in range(8)]
    assert outcomes == ["LoginFailed"] * 5 + ["TooManyAttempts"] * 3
    assert len(checked) == 5
    assert log_in_with(auth, phone.code(), AWAY) == "done"


def test_code_guesses_on_all_routes_share_one_bucket(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    outcomes = [log_in_with(auth, guess, AWAY) for _ in range(3)]
    caller = Caller(AWAY)
    outcomes += [outcome(lambda: auth.remove_totp(phone.session_id, PASSWORD, guess, caller=caller)) for _ in range(3)]
    outcomes += [log_in_with(auth, guess, AWAY)]
    assert outcomes == ["LoginFailed"] * 3 + ["ReauthenticationFailed"] * 2 + ["TooManyAttempts"] * 2
    assert len(checked) == 5


def test_a_recovery_code_works_when_the_code_bucket_is_empty(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    for _ in range(6):
        log_in_with(auth, guess, AWAY)
    assert log_in_with(auth, "not-a-code", AWAY) == "LoginFailed"
    assert auth.log_in(BOB, PASSWORD, phone.recovery[0], caller=Caller(AWAY))[1]
    assert len(checked) == 5


def test_guesses_at_the_confirming_code_are_limited_to_5(auth: Auth, bob: None, checked: list[str]) -> None:
    session_id = auth.create_session(BOB)
    *_, session_id = auth.begin_totp(session_id, PASSWORD, caller=UNCOUNTED)
    outcomes = [outcome(lambda: auth.confirm_totp(session_id, "12345", caller=Caller(AWAY))) for _ in range(8)]
    assert outcomes == ["ReauthenticationFailed"] * 5 + ["TooManyAttempts"] * 3
    assert len(checked) == 5


@pytest.mark.parametrize("known", [True, False])
def test_a_correct_code_is_not_counted(auth: Auth, phone: Phone, known: bool) -> None:
    guess = phone.wrong()

    def answer(otp: str) -> str:
        return log_in_with(auth, otp, HOME, device=phone.device if known else None)

    assert [answer(guess) for _ in range(4)] == ["LoginFailed"] * 4
    assert {answer(phone.recovery.pop()) for _ in range(7)} == {"done"}
    assert answer(phone.code()) == "done"
    assert [answer(guess) for _ in range(2)] == ["LoginFailed", "TooManyAttempts"]


def test_a_correct_password_without_a_code_is_not_counted(auth: Auth, phone: Phone) -> None:
    for address in (HOME, AWAY):
        assert {log_in_with(auth, "", address) for _ in range(31)} == {"CodeRequired"}


def test_a_wrong_code_also_counts_as_a_failed_login(auth: Auth, phone: Phone) -> None:
    guess = phone.wrong()
    for _ in range(5):
        assert log_in_with(auth, guess, HOME) == "LoginFailed"
    for _ in range(5):
        assert log_in_with(auth, "", HOME, "wrong") == "LoginFailed"
    assert log_in_with(auth, "", HOME, "wrong") == "TooManyAttempts"


def test_an_empty_code_bucket_states_the_wait(auth: Auth, phone: Phone, clock: Clock) -> None:
    guess = phone.wrong()
    for _ in range(5):
        log_in_with(auth, guess, HOME)
    with pytest.raises(TooManyAttempts) as refusal:
        auth.log_in(BOB, PASSWORD, guess, caller=Caller(HOME))
    assert refusal.value.wait == 3600
    clock.advance(3600)
    assert log_in_with(auth, phone.code(), HOME) == "done"


# Answers over HTTP


def test_the_answer_to_a_refused_attempt_reveals_nothing_more(call: Client) -> None:
    for _ in range(10):
        log_in(call)
    answer = log_in(call)
    assert (answer.status, answer.json) == (429, {"message": "too many requests"})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Retry-After"] == "60"
    assert "Set-Cookie" not in answer.headers


Ask = Callable[[Client], Answer]
numbers = itertools.count()
PUT = {"email": BOB, "reset_token": "0", "new_password": PASSWORD}


@pytest.mark.parametrize(
    "ask",
    [
        log_in,
        lambda call: log_in(call, f"{next(numbers)}@x.io"),
        lambda call: log_in(call, address=f"2001:db8:{next(numbers):x}::1"),
        lambda call: call("POST", "/users", {"email": BOB, "password": PASSWORD}, REMOTE_ADDR=HOME),
        lambda call: call("PUT", "/reset_password", PUT, REMOTE_ADDR=HOME),
    ],
    ids=["login: pair", "login: address", "login: account", "register", "confirm"],
)
def test_an_attempt_is_allowed_after_retry_after(call: Client, clock: Clock, ask: Ask) -> None:
    refused = next(answer for answer in (ask(call) for _ in range(100)) if answer.status == 429)
    clock.advance(int(refused.headers["Retry-After"]))
    assert ask(call).status != 429


@pytest.mark.both_engines
def test_retry_after_is_the_longest_wait_of_all_empty_buckets(call: Client, clock: Clock) -> None:
    for address in (HOME, AWAY):
        for _ in range(10):
            log_in(call, address=address)
    clock.advance(int(log_in(call).headers["Retry-After"]))
    assert log_in(call).status == 401


@pytest.mark.parametrize(("addresses", "limit"), [(1, 10), (50, 20)], ids=["from one address", "from many addresses"])
@pytest.mark.usefixtures("bob")
def test_rate_limits_do_not_reveal_whether_an_email_is_known(call: Client, addresses: int, limit: int) -> None:
    log_in(call, password=PASSWORD, address=HOME)

    def answers(email: str, network: str) -> list[tuple[int, dict[str, str], bytes]]:
        seen = [log_in(call, email, address=f"{network}.{n % addresses}") for n in range(40)]
        return [(a.status, {**a.headers, "X-Request-Id": ""}, a.body) for a in seen]

    known = answers(BOB, "198.51.100")
    assert known == answers("nobody@x.io", "203.0.113")
    assert [status for status, _, _ in known] == [401] * limit + [429] * (40 - limit)


@pytest.mark.usefixtures("bob")
def test_the_letter_case_of_an_email_makes_no_second_bucket(call: Client) -> None:
    assert [log_in(call, email).status for email in (BOB, "BOB@x.io", "bob@X.IO") * 4] == [401] * 10 + [429] * 2


@pytest.mark.usefixtures("bob")
@pytest.mark.slow
def test_100_addresses_share_20_guesses_and_the_owner_can_sign_in(call: Client, compared: list[bytes]) -> None:
    device = log_in(call, password=PASSWORD).cookies["__Host-device"]
    guesses, owners = Counter[int](), []
    for n in range(100):
        guesses[log_in(call, address=f"10.0.0.{n}").status] += 1
        if n % 5 == 0:
            owners.append(log_in(call, password=PASSWORD, address="10.0.0.1", device=device).status)
    assert guesses == {401: 20, 429: 80}
    assert owners == [200] * 20
    assert compared.count(b"wrong") == 20


def test_200_emails_from_one_address_share_30_guesses(call: Client, compared: list[bytes]) -> None:
    assert Counter(log_in(call, f"{n}@x.io").status for n in range(200)) == {401: 30, 429: 170}
    assert len(compared) == 30


def test_guesses_at_a_reset_token_are_limited_and_cost_no_hash(
    call: Client, compared: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(bcrypt, "hashpw")
    guesses = ({**PUT, "reset_token": f"{n}"} for n in range(200))
    statuses = Counter(call("PUT", "/reset_password", guess, REMOTE_ADDR=HOME).status for guess in guesses)
    assert statuses == {403: 10, 429: 190}
    assert not compared


@pytest.mark.usefixtures("bob")
def test_the_profile_and_logout_have_no_rate_limit(call: Client) -> None:
    cookie = log_in(call, password=PASSWORD).headers["Set-Cookie"].partition(";")[0]
    for n in range(60):
        log_in(call, f"{n % 3}@x.io")
        log_in(call)
    read = [call("GET", "/profile", cookie=cookie, REMOTE_ADDR=HOME).status for _ in range(200)]
    assert read == [200] * 200
    refused = [call("DELETE", "/sessions", cookie="session_id=x", REMOTE_ADDR=HOME).status for _ in range(50)]
    assert refused == [403] * 50
    assert call("DELETE", "/sessions", cookie=cookie, REMOTE_ADDR=HOME).status == 302


# Clients


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("2001:db8:0:1::1", "2001:DB8:0:1:0::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("::ffff:192.0.2.1", "::ffff:c000:201", True),
        ("unknown", "192.0.2.1", False),
    ],
)
def test_addresses_of_one_network_are_one_client(call: Client, one: str, other: str, same: bool) -> None:
    # A socket that listens on [::] sees IPv4 clients as ::ffff:192.0.2.1.
    def confirm(address: str) -> int:
        return call("PUT", "/reset_password", PUT, REMOTE_ADDR=address).status

    assert [confirm(one) for _ in range(11)] == [403] * 10 + [429]
    assert confirm(other) == (429 if same else 403)


# The clock


@pytest.mark.both_engines
@SOME_LIMITS
def test_a_clock_that_is_set_back_locks_nobody_out(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        wait(limiter, attempt(limiter, n))
    clock.advance(-DAY)
    # One attempt is allowed at once or after one interval, and later ones no faster than usual.
    if wait(limiter, attempt(limiter, size)):
        clock.advance(interval)
        assert wait(limiter, attempt(limiter, size)) == 0
    assert allowed(lambda n: wait(limiter, attempt(limiter, size + n))) <= size
    clock.advance(interval)
    assert wait(limiter, attempt(limiter, size)) == 0
    assert wait(limiter, attempt(limiter, size)) > 0


@pytest.mark.both_engines
@SOME_LIMITS
def test_a_clock_that_is_set_forward_only_refills_the_bucket(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        wait(limiter, attempt(limiter, n))
    clock.advance(DAY)
    assert allowed(lambda n: wait(limiter, attempt(limiter, n))) == size
    clock.advance(-DAY)
    clock.advance(interval)
    assert wait(limiter, attempt(limiter, size)) == 0


# The table


def test_the_table_holds_no_address_and_no_email(rows: Rows, settings: Settings, call: Client) -> None:
    log_in(call, "somebody@secret.example", address="203.0.113.77")
    call("PUT", "/reset_password", {**PUT, "email": "somebody@secret.example"}, REMOTE_ADDR="203.0.113.77")
    assert len(rows()) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key, _ in rows())
    files = b"".join(path.read_bytes() for path in Path(settings.database).parent.glob("authsvc.db*"))
    assert rows()[0][0].encode() in files
    assert b"secret.example" not in files
    assert b"203.0.113.77" not in files


def test_the_keys_of_two_databases_differ(tmp_path: Path, limiter: RateLimiter, clock: Clock) -> None:
    # Without a secret key, anyone who reads the table could find an email in it by hashing that email.
    path = str(tmp_path / "other.db")
    with closing(DB(path)) as db:
        other = RateLimiter(db.rate_limits, production_settings(path), clock)
        keys = {bucket.key for bucket in next(limiter.login(BOB, HOME))}
        assert keys.isdisjoint(bucket.key for bucket in next(other.login(BOB, HOME)))
        assert limiter.tag(BOB) != other.tag(BOB)


def test_different_limits_never_share_a_key(limiter: RateLimiter) -> None:
    # An email may look like an address. The parts of a key must not run into each other.
    choices = [
        next(limiter.login(HOME, HOME, HOME)),
        *limiter.login(HOME, HOME),
        *limiter.registration(HOME),
        *limiter.mails("reset of devices", HOME),
        *limiter.mails("reset", HOME),
        *limiter.mails("confirm", HOME),
        *limiter.mails("change", HOME),
        *limiter.changes("email", int(HOME.replace(".", ""))),
        *limiter.changes("account", int(HOME.replace(".", ""))),
        *limiter.reset_address(HOME),
        *limiter.unknown_token(HOME),
        *limiter.code(HOME, "full"),
        *limiter.code(HOME, None),
        *limiter.code(HOME, "reset"),
        *limiter.session_password(int(HOME.replace(".", "")), ""),
        *limiter.login(HOME + HOME, ""),
        *limiter.login("", HOME + HOME),
    ]
    keys = [bucket.key for buckets in choices for bucket in buckets]
    assert len(set(keys)) == len(keys)


@pytest.mark.both_engines
def test_buckets_survive_a_restart(settings: Settings, clock: Clock) -> None:
    for expected in ([0] * 10, [60] * 10):
        with closing(DB(settings.database)) as db:
            limiter = RateLimiter(db.rate_limits, settings, clock)
            assert [wait(limiter, limiter.unknown_token(HOME)) for _ in range(10)] == expected


@pytest.mark.both_engines
def test_two_copies_of_the_service_share_their_buckets(db: DB, settings: Settings, clock: Clock) -> None:
    with closing(DB(settings.database)) as other:
        limiters = [RateLimiter(one.rate_limits, settings, clock) for one in (db, other)]
        assert allowed(lambda n: wait(limiters[n % 2], limiters[n % 2].unknown_token(HOME))) == 10


@pytest.mark.both_engines
def test_full_buckets_are_deleted(rows: Rows, db: DB, limiter: RateLimiter, clock: Clock) -> None:
    for n in range(30):
        wait(limiter, limiter.login(f"{n}@x.io", f"10.0.0.{n}"))
    assert len(rows()) == 90
    clock.advance(DAY)
    for n in range(10):
        wait(limiter, limiter.unknown_token(f"10.0.1.{n}"))
    assert len(rows()) == 10


@pytest.mark.slow
def test_3000_emails_from_100_addresses_leave_a_small_table(
    rows: Rows, db: DB, limiter: RateLimiter, clock: Clock, settings: Settings
) -> None:
    assert isinstance(db._engine, SQLiteEngine)
    db._engine._writer.execute("PRAGMA synchronous = OFF")  # saves time; nothing is read after a crash here
    largest = 0
    for n in range(3_000):
        wait(limiter, limiter.login(f"{n}@x.io", f"10.{n % 4}.{n // 4 % 25}.1"))
        clock.advance(0.6)
        if n % 300 == 0:
            largest = max(largest, len(rows()))
    # Not yet full are the buckets of the accounts of 900 s, of the pairs of 60 s, and of the 100 addresses.
    live = 1500 + 100 + 100
    assert max(largest, len(rows())) <= 1.1 * live
    assert Path(settings.database).stat().st_size < 600_000


# In a process of its own


@pytest.fixture
def guess() -> Iterator[Callable[[Service, int], list[requests.Response]]]:
    """Send wrong passwords for Bob's account."""
    with requests.Session() as client:

        def ask(service: Service, times: int) -> list[requests.Response]:
            form: Any = {"email": BOB, "password": "wrong"}
            return [client.post(f"{service.url}/sessions", data=form, timeout=10) for _ in range(times)]

        yield ask


@pytest.mark.slow  # starts two processes
def test_the_limit_holds_after_the_process_is_killed(
    start: Callable[..., Service], guess: Callable[[Service, int], list[requests.Response]]
) -> None:
    service = start()
    assert requests.post(f"{service.url}/users", data={"email": BOB, "password": PASSWORD}, timeout=10).ok
    answers = guess(service, 40)
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses == {401: 10, 429: 30}
    assert all(0 < int(a.headers["Retry-After"]) <= 60 for a in answers if a.status_code == 429)
    service.end(signal.SIGKILL)
    service.start()
    assert [answer.status_code for answer in guess(service, 3)] == [429] * 3


def test_an_exceeded_limit_raises_an_error_with_the_wait(auth: Auth) -> None:
    for _ in range(10):
        with pytest.raises(ValueError, match="wrong email"):
            auth.log_in(BOB, "wrong", caller=Caller(HOME))
    with pytest.raises(TooManyAttempts) as refusal:
        auth.log_in(BOB, "wrong", caller=Caller(HOME))
    assert refusal.value.wait == 60
