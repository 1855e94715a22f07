"""Rate limits: which attempts are counted, how fast a limit refills, and how many guesses an attacker gets."""

from __future__ import annotations

import itertools
import re
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests

from auth import Auth, TooManyAttempts
from authsvc import create_app
from credentials import totp
from engines.sqlite import SQLiteEngine
from rate_limit import RateLimiter
from settings import Settings
from storage import DB
from tables.rate_limits import Bucket
from tests.conftest import COST, Answer, Client, Clock, Service, raw_connection
from tests.production import BOB, PASSWORD, production_settings

HOME = "192.0.2.1"  # an address of Bob's
AWAY = "198.51.100.7"  # an address that he never signed in from
DAY = 86_400

Rows = Callable[[], list[tuple[str, int]]]
Attempt = Callable[[RateLimiter, int], list[Bucket]]

# The buckets of the n-th attempt of a series; attempts that are allowed at once; seconds until one more is allowed.
LIMITS: dict[str, tuple[Attempt, int, int]] = {
    "login: account and address": (lambda limiter, n: limiter.login(BOB, HOME)[:1], 10, 60),
    "login: account": (lambda limiter, n: limiter.login(BOB, f"192.0.2.{n}"), 20, 900),
    "login: address": (lambda limiter, n: limiter.login(f"{n}@x.io", HOME), 30, 30),
    "register: address": (lambda limiter, n: limiter.registration(HOME), 20, 180),
    "reset: account": (lambda limiter, n: limiter.reset_request(BOB, f"192.0.2.{n}"), 3, 1200),
    "reset: address": (lambda limiter, n: limiter.reset_request(f"{n}@x.io", HOME), 10, 360),
    "confirm: address": (lambda limiter, n: limiter.reset_confirmation(HOME), 10, 60),
    "code: account": (lambda limiter, n: limiter.code(BOB, f"192.0.2.{n}"), 5, 3600),
}
ALL_LIMITS = pytest.mark.parametrize(("attempt", "size", "interval"), LIMITS.values(), ids=LIMITS)
# The arithmetic depends only on the number of buckets: here one, two and three.
SAMPLES = {name: LIMITS[name] for name in ("confirm: address", "reset: account", "login: account")}
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


def log_in(call: Client, email: str = BOB, password: str = "wrong", address: str = HOME) -> Answer:
    return call("POST", "/sessions", {"email": email, "password": password}, REMOTE_ADDR=address)


@pytest.fixture
def rows(db: DB, settings: Settings) -> Iterator[Rows]:
    """Read the rows of the table."""
    with raw_connection(settings.database) as connection:
        yield lambda: connection.execute("SELECT key, full_at FROM throttle ORDER BY key").fetchall()


def allowed(consume: Callable[[int], int], limit: int = 10_000) -> int:
    """Return how many attempts are allowed before the first one that must wait."""
    return next(number for number in range(limit) if consume(number))


# The buckets


@pytest.mark.both_engines
@ALL_LIMITS
def test_a_bucket_allows_its_size_of_attempts_at_once(
    limiter: RateLimiter, attempt: Attempt, size: int, interval: int
) -> None:
    assert allowed(lambda n: limiter.consume(attempt(limiter, n))) == size


@pytest.mark.both_engines
@ALL_LIMITS
def test_an_empty_bucket_allows_one_attempt_per_interval(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        limiter.consume(attempt(limiter, n))
    for n in range(size, size + 3):
        assert limiter.consume(attempt(limiter, n)) == interval
        clock.advance(interval - 1)
        assert limiter.consume(attempt(limiter, n)) == 1
        clock.advance(1)
        assert limiter.consume(attempt(limiter, n)) == 0


@pytest.mark.both_engines
@SOME_LIMITS
def test_a_bucket_refills_to_its_size_and_no_further(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        limiter.consume(attempt(limiter, n))
    clock.advance(size * interval - 1)
    assert allowed(lambda n: limiter.consume(attempt(limiter, n))) == size - 1
    clock.advance(7 * DAY)
    assert allowed(lambda n: limiter.consume(attempt(limiter, n))) == size


def test_development_limits_are_higher_except_for_guesses_at_one_account(
    db: DB, development: Settings, clock: Clock
) -> None:
    limiter = RateLimiter(db.rate_limits, development, clock)
    sizes = {name: [size for _, size, _ in attempt(limiter, 0)] for name, (attempt, _, _) in LIMITS.items()}
    assert sizes == {
        "login: account and address": [10],
        "login: account": [10, 3000, 20],
        "login: address": [10, 3000, 20],
        "register: address": [2000],
        "reset: account": [300, 1000],
        "reset: address": [300, 1000],
        "confirm: address": [1000],
        "code: account": [5],
    }


def test_nothing_is_counted_when_rate_limits_are_off(rows: Rows, db: DB, development: Settings, clock: Clock) -> None:
    settings = Settings(database=development.database, bcrypt_cost=COST, throttle=False)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    assert {log_in(call, address="127.0.0.1").status for _ in range(50)} == {401}
    assert rows() == []


# One attempt


def test_a_refused_attempt_writes_nothing(rows: Rows, limiter: RateLimiter, settings: Settings) -> None:
    for n in range(20):
        limiter.consume(limiter.login(BOB, f"192.0.2.{n}"))
    with closing(sqlite3.connect(settings.database)) as other:
        before = rows(), other.execute("PRAGMA data_version").fetchone()
        for n in range(20, 60):
            # The empty bucket of the account comes last. The attempts consumed from the others must be rolled back.
            assert limiter.consume(limiter.login(BOB, f"192.0.2.{n}"))
        assert (rows(), other.execute("PRAGMA data_version").fetchone()) == before


@pytest.mark.both_engines
def test_refused_attempts_do_not_prolong_the_wait(limiter: RateLimiter, clock: Clock) -> None:
    confirmation = limiter.reset_confirmation(HOME)
    assert allowed(lambda n: limiter.consume(confirmation)) == 10
    for _ in range(59):
        clock.advance(1)
        assert limiter.consume(confirmation)
    clock.advance(1)
    assert limiter.consume(confirmation) == 0


@pytest.mark.both_engines
def test_of_50_simultaneous_logins_only_10_reach_bcrypt(
    db: DB, development: Settings, clock: Clock, compared: list[bytes]
) -> None:
    auth, start = Auth(db, development, clock), threading.Barrier(50)

    def attempt(_: int) -> str:
        start.wait(10)
        return outcome(lambda: auth.log_in(BOB, "wrong", address=HOME))

    with ThreadPoolExecutor(50) as pool:
        outcomes = Counter(pool.map(attempt, range(50)))
    assert outcomes == {"LoginFailed": 10, "TooManyAttempts": 40}
    assert len(compared) == 10


@pytest.mark.both_engines
def test_an_attempt_with_a_slightly_older_time_is_counted_too(db: DB) -> None:
    # An attempt reads the clock before it waits for the write lock, so another one may be a second ahead.
    bucket = [("key", 10, 60)]
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


def test_a_successful_reset_is_not_counted(auth: Auth, bob: None) -> None:
    for number in range(12):
        token = auth.get_reset_password_token(BOB)
        auth.reset_password(token, f"{PASSWORD} {number}", email=BOB, address=HOME)


@pytest.mark.usefixtures("bob")
def test_a_successful_registration_is_counted(call: Client) -> None:
    def register(number: int) -> int:
        form = {"email": f"{number}@x.io", "password": PASSWORD}
        return call("POST", "/users", form, REMOTE_ADDR=HOME).status

    assert [register(number) for number in range(21)] == [200] * 20 + [429]


# One-time codes


class Phone:
    """Bob's authenticator app. Each code is for a new time step."""

    def __init__(self, auth: Auth, clock: Clock) -> None:
        self.session_id = auth.log_in(BOB, PASSWORD, address=HOME)[1]
        self._clock = clock
        self._seed, *_ = auth.begin_totp(self.session_id, PASSWORD, address=None)
        _, self.session_id, self.recovery = auth.confirm_totp(self.session_id, self.code(), address=None)

    def code(self) -> str:
        self._clock.advance(totp.STEP)
        return totp.code(self._seed, int(self._clock()) // totp.STEP)

    def wrong(self) -> str:
        right = {totp.code(self._seed, int(self._clock()) // totp.STEP + step) for step in (-1, 0, 1)}
        return next(code for code in ("000000", "111111", "222222", "333333") if code not in right)


@pytest.fixture
def phone(auth: Auth, clock: Clock, bob: None) -> Phone:
    """Bob uses two-factor authentication, and HOME is known for his account."""
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


def log_in_with(auth: Auth, otp: str, address: str, password: str = PASSWORD) -> str:
    """Sign in as Bob; return the outcome."""
    return outcome(lambda: auth.log_in(BOB, password, otp, address=address))


def test_100_addresses_share_5_code_guesses_and_the_owner_can_sign_in(
    auth: Auth, phone: Phone, checked: list[str], clock: Clock
) -> None:
    guesses, owners, guess = Counter[str](), [], phone.wrong()
    began = clock()
    for n in range(100):
        guesses[log_in_with(auth, guess, f"10.0.0.{n}")] += 1
        if n % 20 == 0:
            owners.append(log_in_with(auth, phone.code(), HOME))
    assert clock() - began < 900
    assert guesses == {"LoginFailed": 5, "TooManyAttempts": 95}
    assert owners == ["done"] * 5
    assert checked.count(guess) == 5


def test_code_guesses_from_the_owners_address_are_limited_to_5(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    outcomes = [log_in_with(auth, guess, HOME) for _ in range(8)]
    assert outcomes == ["LoginFailed"] * 5 + ["TooManyAttempts"] * 3
    assert len(checked) == 5
    assert log_in_with(auth, phone.code(), AWAY) == "done"


def test_code_guesses_on_all_routes_share_one_bucket(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    outcomes = [log_in_with(auth, guess, AWAY) for _ in range(3)]
    outcomes += [outcome(lambda: auth.remove_totp(phone.session_id, PASSWORD, guess, address=AWAY)) for _ in range(3)]
    outcomes += [log_in_with(auth, guess, AWAY)]
    assert outcomes == ["LoginFailed"] * 3 + ["ReauthenticationFailed"] * 2 + ["TooManyAttempts"] * 2
    assert len(checked) == 5


def test_a_recovery_code_works_when_the_code_bucket_is_empty(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    for _ in range(6):
        log_in_with(auth, guess, AWAY)
    assert log_in_with(auth, "not-a-code", AWAY) == "LoginFailed"
    assert auth.log_in(BOB, PASSWORD, phone.recovery[0], address=AWAY)[1]
    assert len(checked) == 5


def test_guesses_at_the_confirming_code_are_limited_to_5(auth: Auth, bob: None, checked: list[str]) -> None:
    session_id = auth.create_session(BOB)
    auth.begin_totp(session_id, PASSWORD, address=None)
    outcomes = [outcome(lambda: auth.confirm_totp(session_id, "12345", address=AWAY)) for _ in range(8)]
    assert outcomes == ["ReauthenticationFailed"] * 5 + ["TooManyAttempts"] * 3
    assert len(checked) == 5


@pytest.mark.parametrize("address", [HOME, AWAY])
def test_a_correct_code_is_not_counted(auth: Auth, phone: Phone, address: str) -> None:
    guess = phone.wrong()

    def answer(otp: str) -> str:
        return log_in_with(auth, otp, address)

    answer(phone.code())  # from now on the address is known
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
        auth.log_in(BOB, PASSWORD, guess, address=HOME)
    assert refusal.value.wait == 900
    clock.advance(900)
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
def test_an_attempt_is_allowed_exactly_after_retry_after(call: Client, clock: Clock, ask: Ask) -> None:
    refused = next(answer for answer in (ask(call) for _ in range(100)) if answer.status == 429)
    clock.advance(int(refused.headers["Retry-After"]) - 1)
    assert ask(call).status == 429
    clock.advance(1)
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
def test_100_addresses_share_20_guesses_and_the_owner_can_sign_in(call: Client, compared: list[bytes]) -> None:
    assert log_in(call, password=PASSWORD).status == 200
    guesses, owners = Counter[int](), []
    for n in range(100):
        guesses[log_in(call, address=f"10.0.0.{n}").status] += 1
        if n % 5 == 0:
            owners.append(log_in(call, password=PASSWORD).status)
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


# Clients and known addresses


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


def knows(limiter: RateLimiter, email: str, address: str) -> bool:
    """Return whether a login is counted apart from logins from unknown addresses."""
    return len(limiter.login(email, address)) == 2


@pytest.fixture
def remembered(db: DB, limiter: RateLimiter) -> int:
    user = db.add_user(BOB, b"hash")
    limiter.remember(user.id, BOB, HOME)
    return user.id


def test_codes_from_a_known_address_have_a_bucket_of_their_own(
    limiter: RateLimiter, clock: Clock, remembered: int
) -> None:
    (shared,) = limiter.code(BOB, AWAY)
    (known,) = limiter.code("BOB@x.io", HOME)
    assert (shared[1:], known[1:]) == ((5, 3600), (5, 900))
    assert limiter.code(BOB, "203.0.113.9") == [shared]
    assert shared[0] != known[0]
    assert allowed(lambda n: limiter.consume([shared])) == 5
    assert allowed(lambda n: limiter.consume([known])) == 5
    assert limiter.consume(limiter.code(BOB, HOME)) == 900
    clock.advance(900)
    assert limiter.consume(limiter.code(BOB, HOME)) == 0
    assert limiter.consume(limiter.code(BOB, AWAY)) == 2700


def test_codes_from_a_forgotten_address_use_the_shared_bucket(
    limiter: RateLimiter, clock: Clock, remembered: int
) -> None:
    clock.advance(90 * DAY)
    assert limiter.code(BOB, HOME) == limiter.code(BOB, AWAY)


def test_an_address_is_known_only_for_its_account(limiter: RateLimiter, remembered: int) -> None:
    assert knows(limiter, BOB, HOME)
    assert knows(limiter, "BOB@x.io", HOME)
    assert not knows(limiter, BOB, AWAY)
    assert not knows(limiter, "eve@x.io", HOME)


@pytest.mark.both_engines
def test_an_address_is_known_for_90_days(limiter: RateLimiter, clock: Clock, remembered: int) -> None:
    clock.advance(90 * DAY - 1)
    assert knows(limiter, BOB, HOME)
    clock.advance(1)
    assert not knows(limiter, BOB, HOME)


@pytest.mark.both_engines
def test_another_login_keeps_an_address_known_for_longer(limiter: RateLimiter, clock: Clock, remembered: int) -> None:
    clock.advance(80 * DAY)
    limiter.remember(remembered, BOB, HOME)
    clock.advance(80 * DAY)
    assert knows(limiter, BOB, HOME)


@pytest.mark.both_engines
def test_an_account_keeps_its_10_newest_known_addresses(limiter: RateLimiter, clock: Clock, remembered: int) -> None:
    for n in range(10):
        clock.advance(1)
        limiter.remember(remembered, BOB, f"203.0.113.{n}")
    assert not knows(limiter, BOB, HOME)
    assert all(knows(limiter, BOB, f"203.0.113.{n}") for n in range(10))


def test_a_failed_login_makes_no_address_known(call: Client, auth: Auth, bob: None) -> None:
    log_in(call)
    assert not knows(auth._limiter, BOB, HOME)
    log_in(call, password=PASSWORD)
    assert knows(auth._limiter, BOB, HOME)


# The clock


@pytest.mark.both_engines
@SOME_LIMITS
def test_a_clock_that_is_set_back_locks_nobody_out(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        limiter.consume(attempt(limiter, n))
    clock.advance(-DAY)
    # One attempt is allowed at once or after one interval, and later ones no faster than usual.
    if limiter.consume(attempt(limiter, size)):
        clock.advance(interval)
        assert limiter.consume(attempt(limiter, size)) == 0
    assert allowed(lambda n: limiter.consume(attempt(limiter, size + n))) <= size
    clock.advance(interval)
    assert limiter.consume(attempt(limiter, size)) == 0
    assert limiter.consume(attempt(limiter, size)) > 0


@pytest.mark.both_engines
@SOME_LIMITS
def test_a_clock_that_is_set_forward_only_refills_the_bucket(
    limiter: RateLimiter, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        limiter.consume(attempt(limiter, n))
    clock.advance(DAY)
    assert allowed(lambda n: limiter.consume(attempt(limiter, n))) == size
    clock.advance(-DAY)
    clock.advance(interval)
    assert limiter.consume(attempt(limiter, size)) == 0


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
        keys = {key for key, _, _ in limiter.login(BOB, HOME)}
        assert keys.isdisjoint(key for key, _, _ in other.login(BOB, HOME))
        assert limiter.tag(BOB) != other.tag(BOB)


def test_different_limits_never_share_a_key(limiter: RateLimiter) -> None:
    # An email may look like an address. The parts of a key must not run into each other.
    buckets = [
        *limiter.login(HOME, HOME),
        *limiter.registration(HOME),
        *limiter.reset_request(HOME, HOME),
        *limiter.reset_confirmation(HOME),
        *limiter.code(HOME, HOME),
        *limiter.login(HOME + HOME, ""),
        *limiter.login("", HOME + HOME),
    ]
    assert len({key for key, _, _ in buckets}) == len(buckets)


@pytest.mark.both_engines
def test_buckets_survive_a_restart(settings: Settings, clock: Clock) -> None:
    for expected in ([0] * 10, [60] * 10):
        with closing(DB(settings.database)) as db:
            limiter = RateLimiter(db.rate_limits, settings, clock)
            assert [limiter.consume(limiter.reset_confirmation(HOME)) for _ in range(10)] == expected


@pytest.mark.both_engines
def test_two_copies_of_the_service_share_their_buckets(db: DB, settings: Settings, clock: Clock) -> None:
    with closing(DB(settings.database)) as other:
        limiters = [RateLimiter(one.rate_limits, settings, clock) for one in (db, other)]
        assert allowed(lambda n: limiters[n % 2].consume(limiters[n % 2].reset_confirmation(HOME))) == 10


@pytest.mark.both_engines
def test_full_buckets_are_deleted(rows: Rows, db: DB, limiter: RateLimiter, clock: Clock) -> None:
    for n in range(30):
        limiter.consume(limiter.reset_request(f"{n}@x.io", f"10.0.0.{n}"))
    assert len(rows()) == 60
    clock.advance(DAY)
    for _ in range(10):
        limiter.consume(limiter.reset_confirmation(HOME))
    assert len(rows()) == 1


@pytest.mark.slow
def test_3000_emails_from_100_addresses_leave_a_small_table(
    rows: Rows, db: DB, limiter: RateLimiter, clock: Clock, settings: Settings
) -> None:
    assert isinstance(db._engine, SQLiteEngine)
    db._engine._writer.execute("PRAGMA synchronous = OFF")  # saves time; nothing is read after a crash here
    largest = 0
    for n in range(3_000):
        limiter.consume(limiter.login(f"{n}@x.io", f"10.{n % 4}.{n // 4 % 25}.1"))
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
            auth.log_in(BOB, "wrong", address=HOME)
    with pytest.raises(TooManyAttempts) as refusal:
        auth.log_in(BOB, "wrong", address=HOME)
    assert refusal.value.wait == 60
