"""Which attempts are counted, how fast the counts forget, and what an attacker gets past them."""

from __future__ import annotations

import re
import signal
import sqlite3
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests

import totp
from auth import Auth, TooManyAttempts
from authsvc import create_app
from settings import Settings
from storage import DB, Store, open_store
from tests.conftest import COST, Answer, Client, Clock, Service, ledger_of
from throttle import Bucket, Throttle

HOME = "192.0.2.1"  # the owner's
AWAY = "198.51.100.7"
BOB, PASSWORD = "bob@x.io", "tarte flambée du dimanche"
DAY = 86_400

Rows = Callable[[], list[tuple[str, int]]]
Attempt = Callable[[Throttle, int], list[Bucket]]

# What one attempt counts in, the n-th of a series; how many pass at once; seconds until the next one passes.
LIMITS: dict[str, tuple[Attempt, int, int]] = {
    "login: account and address": (lambda throttle, n: throttle.login(BOB, HOME)[:1], 10, 60),
    "login: account": (lambda throttle, n: throttle.login(BOB, f"192.0.2.{n}"), 20, 900),
    "login: address": (lambda throttle, n: throttle.login(f"{n}@x.io", HOME), 30, 30),
    "register: address": (lambda throttle, n: throttle.registration(HOME), 20, 180),
    "reset: account": (lambda throttle, n: throttle.reset_request(BOB, f"192.0.2.{n}"), 3, 1200),
    "reset: address": (lambda throttle, n: throttle.reset_request(f"{n}@x.io", HOME), 10, 360),
    "confirm: address": (lambda throttle, n: throttle.reset_confirmation(HOME), 10, 60),
    "code: account": (lambda throttle, n: throttle.code(BOB, f"192.0.2.{n}"), 5, 3600),
}
ALL_LIMITS = pytest.mark.parametrize(("attempt", "size", "interval"), LIMITS.values(), ids=LIMITS)


def production(database: str) -> Settings:
    """What faces the internet, but for the cost of a hash: settings refuse less than 10 there."""
    settings = Settings(database=database, public_url="https://auth.example.com", bcrypt_cost=10)
    object.__setattr__(settings, "bcrypt_cost", COST)
    return settings


@pytest.fixture
def settings(place: str) -> Settings:
    return production(place)


@pytest.fixture
def development(settings: Settings) -> Settings:
    return Settings(database=settings.database, bcrypt_cost=COST)


@pytest.fixture
def throttle(db: DB, settings: Settings, clock: Clock) -> Throttle:
    return Throttle(db, settings, clock)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The passwords that reached bcrypt."""
    reached: list[bytes] = []
    checkpw = bcrypt.checkpw

    def count(password: bytes, hashed: bytes) -> bool:
        reached.append(password)
        return checkpw(password, hashed)

    monkeypatch.setattr(bcrypt, "checkpw", count)
    return reached


@pytest.fixture
def bob(auth: Auth) -> None:
    auth.register_user(BOB, PASSWORD)


def log_in(call: Client, email: str = BOB, password: str = "wrong", address: str = HOME) -> Answer:
    return call("POST", "/sessions", {"email": email, "password": password}, REMOTE_ADDR=address)


@pytest.fixture
def rows(db: Store, settings: Settings) -> Iterator[Callable[[], list[tuple[str, int]]]]:
    """The table as it is now."""
    with ledger_of(settings.database) as ledger:
        yield lambda: ledger.execute("SELECT key, full_at FROM throttle ORDER BY key").fetchall()


def passed(take: Callable[[int], int], most: int = 10_000) -> int:
    """How many attempts pass until the first one that must wait."""
    return next(number for number in range(most) if take(number))


# The buckets


@ALL_LIMITS
def test_as_many_pass_at_once(throttle: Throttle, attempt: Attempt, size: int, interval: int) -> None:
    assert passed(lambda n: throttle.take(attempt(throttle, n))) == size


@ALL_LIMITS
def test_then_one_passes_an_interval(
    throttle: Throttle, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        throttle.take(attempt(throttle, n))
    for n in range(size, size + 3):
        assert throttle.take(attempt(throttle, n)) == interval
        clock.advance(interval - 1)
        assert throttle.take(attempt(throttle, n)) == 1
        clock.advance(1)
        assert throttle.take(attempt(throttle, n)) == 0


@ALL_LIMITS
def test_a_bucket_refills_to_its_size_and_no_further(
    throttle: Throttle, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        throttle.take(attempt(throttle, n))
    clock.advance(size * interval - 1)
    assert passed(lambda n: throttle.take(attempt(throttle, n))) == size - 1
    clock.advance(7 * DAY)
    assert passed(lambda n: throttle.take(attempt(throttle, n))) == size


def test_development_leaves_more_room_but_for_one_account(db: DB, development: Settings, clock: Clock) -> None:
    throttle = Throttle(db, development, clock)
    sizes = {name: [size for _, size, _ in attempt(throttle, 0)] for name, (attempt, _, _) in LIMITS.items()}
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


def test_switched_off_nothing_is_counted(rows: Rows, db: DB, development: Settings, clock: Clock) -> None:
    off = Settings(database=development.database, bcrypt_cost=COST, throttle=False)
    call = Client(create_app(off, Auth(db, off, clock)))
    assert {log_in(call, address="127.0.0.1").status for _ in range(50)} == {401}
    assert rows() == []


# One attempt


@pytest.mark.sqlite
def test_a_denied_attempt_writes_nothing(rows: Rows, db: DB, throttle: Throttle) -> None:
    for n in range(20):
        throttle.take(throttle.login(BOB, f"192.0.2.{n}"))
    onlooker = sqlite3.connect(db._path)
    before = rows(), onlooker.execute("PRAGMA data_version").fetchone()
    for n in range(20, 60):
        # The account's bucket is empty and comes last: what was taken from the others before must not stay.
        assert throttle.take(throttle.login(BOB, f"192.0.2.{n}"))
    assert (rows(), onlooker.execute("PRAGMA data_version").fetchone()) == before
    onlooker.close()


def test_denied_attempts_do_not_make_the_wait_longer(throttle: Throttle, clock: Clock) -> None:
    confirmation = throttle.reset_confirmation(HOME)
    assert passed(lambda n: throttle.take(confirmation)) == 10
    for _ in range(59):
        clock.advance(1)
        assert throttle.take(confirmation)
    clock.advance(1)
    assert throttle.take(confirmation) == 0


def test_of_50_at_the_same_instant_10_reach_bcrypt(
    db: DB, development: Settings, clock: Clock, compared: list[bytes]
) -> None:
    auth, start, outcomes = Auth(db, development, clock), threading.Barrier(50), Counter[str]()

    def attempt(_: int) -> str:
        start.wait(10)
        try:
            auth.log_in(BOB, "wrong", address=HOME)
        except ValueError as refusal:
            return type(refusal).__name__
        return "logged in"

    with ThreadPoolExecutor(50) as pool:
        outcomes.update(pool.map(attempt, range(50)))
    assert outcomes == {"LoginFailed": 10, "TooManyAttempts": 40}
    assert len(compared) == 10


def test_an_attempt_that_waited_while_a_second_passed_counts_as_the_others(db: DB) -> None:
    # Each reads the clock before it waits for the write lock.
    bucket = [("key", 10, 60)]
    assert [db.take(bucket, 1_800_000_001) for _ in range(10)] == [0] * 10
    assert db.take(bucket, 1_800_000_000) > 0


# What is given back


def test_a_login_that_succeeds_does_not_count(call: Client, bob: None) -> None:
    for _ in range(9):
        assert log_in(call).status == 401
    assert {log_in(call, password=PASSWORD).status for _ in range(40)} == {200}
    assert log_in(call).status == 401
    assert log_in(call).status == 429


def test_a_login_that_succeeds_gives_back_to_all_that_it_took_from(rows: Rows, call: Client, bob: None, db: DB) -> None:
    log_in(call, password=PASSWORD, address=HOME)
    log_in(call, address=AWAY)
    before = rows()
    log_in(call, password=PASSWORD, address=AWAY)
    assert rows() == before


def test_a_reset_that_succeeds_does_not_count(auth: Auth, bob: None) -> None:
    for number in range(30):
        token = auth.get_reset_password_token(BOB)
        auth.update_password(token, f"{PASSWORD} {number}", address=HOME)


@pytest.mark.usefixtures("bob")
def test_a_registration_counts_also_when_it_succeeds(call: Client) -> None:
    def register(number: int) -> int:
        form = {"email": f"{number}@x.io", "password": PASSWORD}
        return call("POST", "/users", form, REMOTE_ADDR=HOME).status

    assert [register(number) for number in range(21)] == [200] * 20 + [429]


# One-time codes


class Phone:
    """Bob's: the codes of his second factor, each step's once."""

    def __init__(self, auth: Auth, clock: Clock) -> None:
        self.session_id = auth.log_in(BOB, PASSWORD, address=HOME)[1]
        self._clock = clock
        self._seed, _ = auth.begin_totp(self.session_id, PASSWORD)
        _, self.session_id, self.recovery = auth.confirm_totp(self.session_id, self.code())

    def code(self) -> str:
        self._clock.advance(30)
        return totp.code(self._seed, int(self._clock()) // 30)

    def wrong(self) -> str:
        right = {totp.code(self._seed, int(self._clock()) // 30 + near) for near in (-1, 0, 1)}
        return next(code for code in ("000000", "111111", "222222", "333333") if code not in right)


@pytest.fixture
def phone(auth: Auth, clock: Clock, bob: None) -> Phone:
    """Bob has a second factor, and his home is known."""
    return Phone(auth, clock)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The one-time codes that were compared with those of a seed."""
    reached: list[str] = []
    matching_step = totp.matching_step

    def count(seed: str, given: str, now: int) -> int | None:
        reached.append(given)
        return matching_step(seed, given, now)

    monkeypatch.setattr(totp, "matching_step", count)
    return reached


def outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except ValueError as refusal:
        return type(refusal).__name__
    return "done"


def test_500_addresses_get_5_guesses_at_a_code_and_the_owner_gets_in_all_the_while(
    auth: Auth, phone: Phone, checked: list[str], clock: Clock
) -> None:
    guesses, owners, guess = Counter[str](), [], phone.wrong()
    began = clock()
    for n in range(500):
        away = f"10.0.{n // 250}.{n % 250}"
        guesses[outcome(lambda address=away: auth.log_in(BOB, PASSWORD, guess, address=address)[1])] += 1  # type: ignore[misc]
        if n % 100 == 0:
            owners.append(outcome(lambda: auth.log_in(BOB, PASSWORD, phone.code(), address=HOME)[1]))
    assert clock() - began < 900
    assert guesses == {"LoginFailed": 5, "TooManyAttempts": 495}
    assert owners == ["done"] * 5
    assert checked.count(guess) == 5


def test_guesses_at_a_code_from_the_owners_address_are_5(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    said = [outcome(lambda: auth.log_in(BOB, PASSWORD, guess, address=HOME)[1]) for _ in range(8)]
    assert said == ["LoginFailed"] * 5 + ["TooManyAttempts"] * 3
    assert len(checked) == 5
    assert outcome(lambda: auth.log_in(BOB, PASSWORD, phone.code(), address=AWAY)[1]) == "done"


def test_guesses_at_codes_wherever_they_are_asked_for_share_one_count(
    auth: Auth, phone: Phone, checked: list[str]
) -> None:
    guess = phone.wrong()
    said = [outcome(lambda: auth.log_in(BOB, PASSWORD, guess, address=AWAY)[1]) for _ in range(3)]
    said += [outcome(lambda: auth.remove_totp(phone.session_id, PASSWORD, guess, address=AWAY)) for _ in range(3)]
    said += [outcome(lambda: auth.log_in(BOB, PASSWORD, guess, address=AWAY)[1])]
    assert said == ["LoginFailed"] * 3 + ["ReauthenticationFailed"] * 2 + ["TooManyAttempts"] * 2
    assert len(checked) == 5


def test_a_recovery_code_gets_in_when_no_more_guesses_are_left(auth: Auth, phone: Phone, checked: list[str]) -> None:
    guess = phone.wrong()
    for _ in range(6):
        outcome(lambda: auth.log_in(BOB, PASSWORD, guess, address=AWAY)[1])
    assert outcome(lambda: auth.log_in(BOB, PASSWORD, "not-a-code", address=AWAY)[1]) == "LoginFailed"
    assert auth.log_in(BOB, PASSWORD, phone.recovery[0], address=AWAY)[1]
    assert len(checked) == 5


def test_guesses_at_the_code_that_confirms_are_5(auth: Auth, bob: None, checked: list[str]) -> None:
    session_id = auth.create_session(BOB)
    auth.begin_totp(session_id, PASSWORD)
    said = [outcome(lambda: auth.confirm_totp(session_id, "12345", address=AWAY)) for _ in range(8)]
    assert said == ["ReauthenticationFailed"] * 5 + ["TooManyAttempts"] * 3
    assert len(checked) == 5


@pytest.mark.parametrize("address", [HOME, AWAY])
def test_a_right_code_does_not_count(auth: Auth, phone: Phone, address: str) -> None:
    guess = phone.wrong()

    def answer(otp: str) -> str:
        return outcome(lambda: auth.log_in(BOB, PASSWORD, otp, address=address)[1])

    answer(phone.code())  # from now on the address is known
    assert [answer(guess) for _ in range(4)] == ["LoginFailed"] * 4
    assert {answer(phone.recovery.pop()) for _ in range(7)} == {"done"}
    assert answer(phone.code()) == "done"
    assert [answer(guess) for _ in range(2)] == ["LoginFailed", "TooManyAttempts"]


def test_a_password_without_its_code_does_not_count(auth: Auth, phone: Phone) -> None:
    for address in (HOME, AWAY):
        said = [outcome(lambda here=address: auth.log_in(BOB, PASSWORD, address=here)[1]) for _ in range(40)]  # type: ignore[misc]
        assert said == ["CodeRequired"] * 40


def test_a_wrong_code_counts_as_a_login_too(auth: Auth, phone: Phone) -> None:
    guess = phone.wrong()
    for _ in range(5):
        assert outcome(lambda: auth.log_in(BOB, PASSWORD, guess, address=HOME)[1]) == "LoginFailed"
    for _ in range(5):
        assert outcome(lambda: auth.log_in(BOB, "wrong", address=HOME)[1]) == "LoginFailed"
    assert outcome(lambda: auth.log_in(BOB, "wrong", address=HOME)[1]) == "TooManyAttempts"


def test_who_waits_for_a_code_bucket_is_told_how_long(auth: Auth, phone: Phone, clock: Clock) -> None:
    guess = phone.wrong()
    for _ in range(5):
        outcome(lambda: auth.log_in(BOB, PASSWORD, guess, address=HOME)[1])
    with pytest.raises(TooManyAttempts) as refusal:
        auth.log_in(BOB, PASSWORD, guess, address=HOME)
    assert refusal.value.wait == 900
    clock.advance(900)
    assert outcome(lambda: auth.log_in(BOB, PASSWORD, phone.code(), address=HOME)[1]) == "done"


# Over the wire


def test_a_refusal_says_so_and_nothing_more(call: Client) -> None:
    for _ in range(10):
        log_in(call)
    answer = log_in(call)
    assert (answer.status, answer.json) == (429, {"message": "too many requests"})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Retry-After"] == "60"
    assert "Set-Cookie" not in answer.headers


Ask = Callable[[Client], Answer]
PUT = {"email": BOB, "reset_token": "0", "new_password": PASSWORD}


@pytest.mark.parametrize(
    "ask",
    [
        log_in,
        lambda call: log_in(call, f"{time.monotonic_ns()}@x.io"),
        lambda call: log_in(call, address=f"2001:db8:{time.monotonic_ns() % 65536:x}::1"),
        lambda call: call("POST", "/users", {"email": BOB, "password": PASSWORD}, REMOTE_ADDR=HOME),
        lambda call: call("PUT", "/reset_password", PUT, REMOTE_ADDR=HOME),
    ],
    ids=["login: pair", "login: address", "login: account", "register", "confirm"],
)
def test_who_waits_as_told_is_let_in_and_not_before(call: Client, clock: Clock, ask: Ask) -> None:
    refused = next(answer for answer in (ask(call) for _ in range(100)) if answer.status == 429)
    clock.advance(int(refused.headers["Retry-After"]) - 1)
    assert ask(call).status == 429
    clock.advance(1)
    assert ask(call).status != 429


def test_the_longest_wait_is_told_where_several_buckets_are_empty(call: Client, clock: Clock) -> None:
    for address in (HOME, AWAY):
        for _ in range(10):
            log_in(call, address=address)
    clock.advance(int(log_in(call).headers["Retry-After"]))
    assert log_in(call).status == 401


@pytest.mark.parametrize("addresses", [1, 50], ids=["from one address", "from many addresses"])
@pytest.mark.usefixtures("bob")
def test_the_throttle_does_not_tell_whether_an_email_is_known(call: Client, addresses: int) -> None:
    log_in(call, password=PASSWORD, address=HOME)

    def answers(email: str, network: str) -> list[tuple[int, dict[str, str], bytes]]:
        said = [log_in(call, email, address=f"{network}.{n % addresses}") for n in range(40)]
        return [(a.status, {**a.headers, "X-Request-Id": ""}, a.body) for a in said]

    known = answers(BOB, "198.51.100")
    assert known == answers("nobody@x.io", "203.0.113")
    assert [status for status, _, _ in known] == [401] * (10 if addresses == 1 else 20) + [429] * (
        30 if addresses == 1 else 20
    )


@pytest.mark.usefixtures("bob")
def test_the_letters_of_an_email_make_no_second_account(call: Client) -> None:
    assert [log_in(call, email).status for email in (BOB, "BOB@x.io", "bob@X.IO") * 4] == [401] * 10 + [429] * 2


@pytest.mark.usefixtures("bob")
def test_500_addresses_get_20_guesses_and_the_owner_gets_in_all_the_while(call: Client, compared: list[bytes]) -> None:
    assert log_in(call, password=PASSWORD).status == 200
    guesses, owners = Counter[int](), []
    for n in range(500):
        guesses[log_in(call, address=f"10.0.{n // 250}.{n % 250}").status] += 1
        if n % 25 == 0:
            owners.append(log_in(call, password=PASSWORD).status)
    assert guesses == {401: 20, 429: 480}
    assert owners == [200] * 20
    assert compared.count(b"wrong") == 20


def test_1000_emails_from_one_address_are_30_guesses(call: Client, compared: list[bytes]) -> None:
    assert Counter(log_in(call, f"{n}@x.io").status for n in range(1000)) == {401: 30, 429: 970}
    assert len(compared) == 30


def test_guessing_a_reset_token_costs_no_hash_and_ends_soon(
    call: Client, compared: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(bcrypt, "hashpw")
    guesses = ({**PUT, "reset_token": f"{n}"} for n in range(200))
    statuses = Counter(call("PUT", "/reset_password", guess, REMOTE_ADDR=HOME).status for guess in guesses)
    assert statuses == {403: 10, 429: 190}
    assert not compared


@pytest.mark.usefixtures("bob")
def test_the_profile_and_logging_out_are_never_throttled(call: Client) -> None:
    name_value = log_in(call, password=PASSWORD).headers["Set-Cookie"].partition(";")[0]
    for n in range(60):
        log_in(call, f"{n % 3}@x.io")
        log_in(call)
    asked = [call("GET", "/profile", cookie=name_value, REMOTE_ADDR=HOME).status for _ in range(200)]
    assert asked == [200] * 200
    denied = [call("DELETE", "/sessions", cookie="session_id=x", REMOTE_ADDR=HOME).status for _ in range(50)]
    assert denied == [403] * 50
    assert call("DELETE", "/sessions", cookie=name_value, REMOTE_ADDR=HOME).status == 302


# Who counts as one


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
def test_addresses_that_are_one_client(call: Client, one: str, other: str, same: bool) -> None:
    # As the peer itself says it: a socket on [::] sees clients of IPv4 as ::ffff:192.0.2.1.
    def confirm(address: str) -> int:
        return call("PUT", "/reset_password", PUT, REMOTE_ADDR=address).status

    assert [confirm(one) for _ in range(11)] == [403] * 10 + [429]
    assert confirm(other) == (429 if same else 403)


def knows(throttle: Throttle, email: str, address: str) -> bool:
    """Whether a login is counted apart from the strangers'."""
    return len(throttle.login(email, address)) == 2


@pytest.fixture
def remembered(db: DB, throttle: Throttle) -> int:
    user = db.add_user(BOB, b"hash")
    throttle.remember(user.id, BOB, HOME)
    return user.id


def test_codes_from_a_known_address_count_apart_from_the_strangers(
    throttle: Throttle, clock: Clock, remembered: int
) -> None:
    (stranger,) = throttle.code(BOB, AWAY)
    (known,) = throttle.code("BOB@x.io", HOME)
    assert (stranger[1:], known[1:]) == ((5, 3600), (5, 900))
    assert throttle.code(BOB, "203.0.113.9") == [stranger]  # one for all of them
    assert stranger[0] != known[0]
    assert passed(lambda n: throttle.take([stranger])) == 5
    assert passed(lambda n: throttle.take([known])) == 5
    assert throttle.take(throttle.code(BOB, HOME)) == 900
    clock.advance(900)
    assert throttle.take(throttle.code(BOB, HOME)) == 0
    assert throttle.take(throttle.code(BOB, AWAY)) == 2700


def test_an_address_that_is_no_longer_known_counts_its_codes_with_the_strangers(
    throttle: Throttle, clock: Clock, remembered: int
) -> None:
    clock.advance(90 * DAY)
    assert throttle.code(BOB, HOME) == throttle.code(BOB, AWAY)


def test_an_address_is_known_for_its_account_alone(throttle: Throttle, remembered: int) -> None:
    assert knows(throttle, BOB, HOME)
    assert knows(throttle, "BOB@x.io", HOME)
    assert not knows(throttle, BOB, AWAY)
    assert not knows(throttle, "eve@x.io", HOME)


def test_an_address_is_known_for_90_days(throttle: Throttle, clock: Clock, remembered: int) -> None:
    clock.advance(90 * DAY - 1)
    assert knows(throttle, BOB, HOME)
    clock.advance(1)
    assert not knows(throttle, BOB, HOME)


def test_another_login_makes_an_address_known_for_longer(throttle: Throttle, clock: Clock, remembered: int) -> None:
    clock.advance(80 * DAY)
    throttle.remember(remembered, BOB, HOME)
    clock.advance(80 * DAY)
    assert knows(throttle, BOB, HOME)


def test_an_account_has_10_known_addresses_the_newest(throttle: Throttle, clock: Clock, remembered: int) -> None:
    for n in range(10):
        clock.advance(1)
        throttle.remember(remembered, BOB, f"203.0.113.{n}")
    assert not knows(throttle, BOB, HOME)
    assert all(knows(throttle, BOB, f"203.0.113.{n}") for n in range(10))


def test_a_failed_login_makes_no_address_known(call: Client, auth: Auth, bob: None) -> None:
    log_in(call)
    assert not knows(auth._throttle, BOB, HOME)
    log_in(call, password=PASSWORD)
    assert knows(auth._throttle, BOB, HOME)


# The clock


@ALL_LIMITS
def test_a_clock_that_jumps_back_shuts_nobody_out(
    throttle: Throttle, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        throttle.take(attempt(throttle, n))
    clock.advance(-DAY)
    # At once or after one interval, and then not faster than ever.
    if throttle.take(attempt(throttle, size)):
        clock.advance(interval)
        assert throttle.take(attempt(throttle, size)) == 0
    assert passed(lambda n: throttle.take(attempt(throttle, size + n))) <= size
    clock.advance(interval)
    assert throttle.take(attempt(throttle, size)) == 0
    assert throttle.take(attempt(throttle, size)) > 0


@ALL_LIMITS
def test_a_clock_that_jumps_forward_refills_and_no_more(
    throttle: Throttle, clock: Clock, attempt: Attempt, size: int, interval: int
) -> None:
    for n in range(size):
        throttle.take(attempt(throttle, n))
    clock.advance(DAY)
    assert passed(lambda n: throttle.take(attempt(throttle, n))) == size
    clock.advance(-DAY)
    clock.advance(interval)
    assert throttle.take(attempt(throttle, size)) == 0


# The table


@pytest.mark.sqlite
def test_the_table_holds_no_address_and_no_email(rows: Rows, db: DB, call: Client) -> None:
    log_in(call, "somebody@secret.example", address="203.0.113.77")
    call("PUT", "/reset_password", {**PUT, "email": "somebody@secret.example"}, REMOTE_ADDR="203.0.113.77")
    assert len(rows()) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key, _ in rows())
    files = b"".join(path.read_bytes() for path in Path(db._path).parent.glob("authsvc.db*"))
    assert rows()[0][0].encode() in files
    assert b"secret.example" not in files
    assert b"203.0.113.77" not in files


def test_the_keys_of_two_databases_differ(tmp_path: Path, throttle: Throttle, clock: Clock) -> None:
    # A hash without a key of its own would tell who has an email to whoever hashes it.
    path = str(tmp_path / "other.db")
    other = DB(path)
    keys = {key for key, _, _ in throttle.login(BOB, HOME)}
    assert keys.isdisjoint(key for key, _, _ in Throttle(other, production(path), clock).login(BOB, HOME))
    assert throttle.tag(BOB) != Throttle(other, production(path), clock).tag(BOB)
    other.close()


def test_no_two_things_that_are_counted_share_a_key(throttle: Throttle) -> None:
    # An email may be what an address is: the parts of a key must not run into each other.
    buckets = [
        *throttle.login(HOME, HOME),
        *throttle.registration(HOME),
        *throttle.reset_request(HOME, HOME),
        *throttle.reset_confirmation(HOME),
        *throttle.code(HOME, HOME),
        *throttle.login(HOME + HOME, ""),
        *throttle.login("", HOME + HOME),
    ]
    assert len({key for key, _, _ in buckets}) == len(buckets)


def test_counts_outlive_the_process(settings: Settings, clock: Clock) -> None:
    for expected in ([0] * 10, [60] * 10):
        db = open_store(settings.database)
        throttle = Throttle(db, settings, clock)
        assert [throttle.take(throttle.reset_confirmation(HOME)) for _ in range(10)] == expected
        db.close()


def test_two_processes_share_the_counts(db: DB, settings: Settings, clock: Clock) -> None:
    other = open_store(settings.database)
    one, two = Throttle(db, settings, clock), Throttle(other, settings, clock)
    assert passed(lambda n: (one, two)[n % 2].take((one, two)[n % 2].reset_confirmation(HOME))) == 10
    other.close()


def test_rows_that_have_refilled_are_swept(rows: Rows, db: DB, throttle: Throttle, clock: Clock) -> None:
    for n in range(30):
        throttle.take(throttle.reset_request(f"{n}@x.io", f"10.0.0.{n}"))
    assert len(rows()) == 60
    clock.advance(DAY)
    for _ in range(10):
        throttle.take(throttle.reset_confirmation(HOME))
    assert len(rows()) == 1


@pytest.mark.sqlite
@pytest.mark.slow  # 30,000 transactions
def test_30000_emails_from_1000_addresses_leave_a_small_table(
    rows: Rows, db: DB, throttle: Throttle, clock: Clock
) -> None:
    db._writer.execute("PRAGMA synchronous = OFF")  # what a disk needs to be sure is not the matter here
    took, most = [], 0
    for n in range(30_000):
        buckets = throttle.login(f"{n}@x.io", f"10.{n % 4}.{n // 4 % 250}.1")
        began = time.perf_counter()
        throttle.take(buckets)
        took.append(time.perf_counter() - began)
        clock.advance(0.06)
        if n % 3_000 == 0:
            most = max(most, len(rows()))
    print(f"a take: {1000 * statistics.median(took):.3f} ms in the median")
    live = 15_000 + 1000 + 1000  # in 900 s, in 60 s, in all: of the accounts, of the pairs, of the addresses
    assert max(most, len(rows())) <= 1.1 * live
    assert sum(path.stat().st_size for path in Path(db._path).parent.glob("authsvc.db*")) < 15_000_000


# A real process


@pytest.fixture
def guess() -> Iterator[Callable[[Service, int], list[requests.Response]]]:
    with requests.Session() as client:

        def ask(service: Service, times: int) -> list[requests.Response]:
            form: Any = {"email": BOB, "password": "wrong"}
            return [client.post(f"{service.url}/sessions", data=form, timeout=10) for _ in range(times)]

        yield ask


@pytest.mark.slow  # two processes, one of them killed
def test_200_guesses_are_10_also_after_a_kill(
    start: Callable[..., Service], guess: Callable[[Service, int], list[requests.Response]]
) -> None:
    service = start()
    assert requests.post(f"{service.url}/users", data={"email": BOB, "password": PASSWORD}, timeout=10).ok
    answers = guess(service, 200)
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses == {401: 10, 429: 190}
    assert all(0 < int(a.headers["Retry-After"]) <= 60 for a in answers if a.status_code == 429)
    service.end(signal.SIGKILL)
    service.start()
    assert [answer.status_code for answer in guess(service, 3)] == [429] * 3


def test_too_many_attempts_is_a_refusal_by_the_rules(auth: Auth) -> None:
    for _ in range(10):
        with pytest.raises(ValueError, match="wrong email"):
            auth.log_in(BOB, "wrong", address=HOME)
    with pytest.raises(TooManyAttempts) as refusal:
        auth.log_in(BOB, "wrong", address=HOME)
    assert refusal.value.wait == 60
