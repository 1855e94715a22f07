"""Users, short forms of frequent calls, and fixtures for the tests of the rules in auth.py.

A test file takes the fixtures that it needs by assignment, for example ``user = accounts.user``.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import bcrypt
import pytest

from auth import UNCOUNTED, Auth, _hash_password
from credentials import passwords, totp
from settings import Settings
from storage import DB, User
from tests.conftest import COST, Clock, raw_connection

EMAIL = "bob@example.com"
OTHER = "eve@example.com"
PASSWORD = "b4l0u"
NEW_PASSWORD = "t4rt1fl3tt3"
OWN_ADDRESS, FOREIGN_ADDRESS = "192.0.2.1", "198.51.100.7"

HASHED = _hash_password(PASSWORD, COST)

MINUTE = 60
DAY = 86_400
WEEK = 604_800
MONTH = 2_592_000  # 30 days

Row = Callable[[], User]
Query = Callable[[str], list[Any]]
Action = Callable[[Auth, str | None], object]  # takes a session id

# What the user of a session can do, apart from signing out.
SESSION_ACTIONS: dict[str, Action] = {
    "list sessions": lambda auth, held: auth.list_sessions(held),
    "end one session": lambda auth, held: auth.end_session(held, digest(held)[:16] if held else ""),
    "end other sessions": lambda auth, held: auth.end_sessions(held, except_this=True),
    "end all sessions": lambda auth, held: auth.end_sessions(held, except_this=False),
}
ACCOUNT_CHANGES: dict[str, Action] = {
    "change password": lambda auth, held: auth.change_password(held, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED),
    "delete account": lambda auth, held: auth.delete_account(held, PASSWORD, caller=UNCOUNTED),
    "remove second factor": lambda auth, held: auth.remove_totp(held, PASSWORD, "000000", caller=UNCOUNTED),
}
ENROLMENT: dict[str, Action] = {
    "begin second factor": lambda auth, held: auth.begin_totp(held, PASSWORD, caller=UNCOUNTED),
    "confirm second factor": lambda auth, held: auth.confirm_totp(held, "000000", caller=UNCOUNTED),
}


# Short forms


def digest(secret: str | None) -> str:
    """Return the SHA-256 under which a session id or a reset token is stored."""
    assert secret
    return hashlib.sha256(secret.encode()).hexdigest()


def at_once(count: int, task: Callable[[], object]) -> list[object]:
    """Run a task in that many threads at the same time; return the results and the exceptions."""
    ready = threading.Barrier(count)

    def run(_: int) -> object:
        ready.wait(10)
        try:
            return task()
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def live(auth: Auth, *session_ids: str | None) -> list[bool]:
    """Return for each session id whether it leads to a user."""
    return [auth.get_user_from_session_id(session_id) is not None for session_id in session_ids]


def sign_in(auth: Auth, password: str = PASSWORD, otp: str = "", *, email: str = EMAIL, **details: Any) -> str:
    """Sign in, uncounted unless an address is given; return the session id."""
    return auth.log_in(email, password, otp, **{"caller": UNCOUNTED, **details})[1]


def in_production(settings: Settings) -> Settings:
    """Return the settings of a production service, with the lowest hash cost that is allowed there."""
    return replace(settings, public_url="https://auth.example.com", bcrypt_cost=10)


def after_password_check(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Make a change once, between the comparison of a password and the use of its result."""
    original = passwords.verify

    def verify(*arguments: Any) -> bool:
        monkeypatch.setattr(passwords, "verify", original)
        matches = original(*arguments)
        change()
        return matches

    monkeypatch.setattr(passwords, "verify", verify)


def after_code_check(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Make a change once, between the comparison of a one-time or recovery code and the use of its result."""
    originals: dict[str, Callable[..., Any]] = {
        "matching_step": totp.matching_step,
        "recovery_hash": totp.recovery_hash,
    }

    def compare(name: str, *arguments: Any) -> Any:
        for each, original in originals.items():
            monkeypatch.setattr(totp, each, original)
        result = originals[name](*arguments)
        change()
        return result

    for name in originals:
        monkeypatch.setattr(totp, name, partial(compare, name))


# The second factor


@dataclass
class Factor:
    """A second factor that is on, and the session in which it was switched on."""

    seed: str
    session_id: str
    recovery_codes: list[str]


def current_code(seed: str, clock: Clock, later: int = 0) -> str:
    """Return the one-time code of the current step, or of one that is this many steps later."""
    return totp.code(seed, int(clock()) // totp.STEP + later)


def begin(auth: Auth, session_id: str | None) -> tuple[str, str]:
    """Begin to set up a second factor; return the seed and the new id of the session."""
    seed, *_, new_id = auth.begin_totp(session_id, PASSWORD, caller=UNCOUNTED)
    return str(seed), str(new_id)


def switch_on(auth: Auth, clock: Clock, email: str = EMAIL) -> Factor:
    """Switch a second factor on, and wait until the step of the code that confirmed it has passed."""
    seed, session_id = begin(auth, auth.create_session(email))
    _, new_id, recovery_codes = auth.confirm_totp(session_id, current_code(seed, clock), caller=UNCOUNTED)
    clock.advance(totp.STEP)
    return Factor(seed, new_id, recovery_codes)


def switch_off(auth: Auth, session_id: str, otp: str, password: str = PASSWORD) -> str:
    """Switch the second factor off; return the new id of the session."""
    return auth.remove_totp(session_id, password, otp, caller=UNCOUNTED)[1]


# Fixtures


@pytest.fixture
def user(db: DB) -> User:
    return db.add_user(EMAIL, HASHED)


@pytest.fixture
def other_user(db: DB, user: User) -> User:
    return db.add_user(OTHER, HASHED)


@pytest.fixture
def three_sessions(db: DB, settings: Settings, clock: Clock, user: User) -> Auth:
    """The rules of a service where a user may have three sessions at once."""
    return Auth(db, replace(settings, sessions_per_user=3), clock)


@pytest.fixture
def row(db: DB, user: User) -> Row:
    """Read the row of ``user``."""
    return lambda: db.find_user_by(id=user.id)


@pytest.fixture
def query(db: DB, settings: Settings) -> Iterator[Query]:
    """Run a query on a connection of its own."""
    with raw_connection(settings.database) as connection:
        yield lambda statement: connection.execute(statement).fetchall()


@pytest.fixture
def hash_calls(user: User, other_user: User, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """One entry for each run of bcrypt after both users were stored."""
    calls: list[bytes] = []

    def counted(original: Callable[[bytes, bytes], object]) -> Callable[[bytes, bytes], object]:
        def count(secret: bytes, salt: bytes) -> object:
            calls.append(salt)
            return original(secret, salt)

        return count

    monkeypatch.setattr(bcrypt, "hashpw", counted(bcrypt.hashpw))
    monkeypatch.setattr(bcrypt, "checkpw", counted(bcrypt.checkpw))
    return calls


@pytest.fixture
def factor(auth: Auth, clock: Clock, user: User) -> Factor:
    """A second factor of ``user`` that is on."""
    return switch_on(auth, clock)
