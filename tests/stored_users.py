"""Users, sessions and tokens for the tests of the storage, and short ways to store and find them."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

from engines import sqlite
from engines.schema import TABLES
from settings import Settings
from storage import DB, Session, User
from tables.rate_limits import Bucket

T = TypeVar("T")

NOW = 1_800_000_000
HASH = b"$2b$04$" + b"." * 53
NEW_HASH = b"$2b$04$" + b"/" * 53
SEEDED = User(1, "bob@x.io", HASH, totp_secret="SEED")  # the user after begin_totp()


@pytest.fixture
def path(settings: Settings) -> Path:
    return Path(settings.database)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite waits only a moment for a lock. Name it before ``db``."""
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.02)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement of the SQLite connections that are opened from now on. Name it before ``db``."""
    ran: list[str] = []
    trace(monkeypatch, ran.append)
    return ran


def trace(monkeypatch: pytest.MonkeyPatch, callback: Callable[[str], object]) -> None:
    """Call back with each statement of the SQLite connections that are opened from now on."""
    connect = sqlite3.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)
        connection.set_trace_callback(callback)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)


@pytest.fixture
def older(path: Path) -> Path:
    """A closed file in which bob has the session "s"."""
    with closing(DB(path)) as db:
        add_session(db, db.add_user("bob@x.io", HASH), "s")
    return path


@pytest.fixture
def bob(db: DB) -> User:
    return db.add_user("bob@x.io", HASH)


@pytest.fixture
def eve(bob: User, db: DB) -> User:
    return db.add_user("eve@x.io", HASH)


@pytest.fixture
def populated(db: DB, eve: User, bob: User) -> None:
    """Both users have a row in every table. The values that belong to bob contain his name."""
    for user, name in (bob, "bob"), (eve, "eve"):
        add_session(db, user, f"{name}0")
        assert enable_totp(db, user, f"{name}0", f"{name}1", f"{name} code", f"{name} spare")
        assert add_session(db, db.find_user_by(id=user.id), f"{name}2")
        assert set_reset_token(db, user.id, f"{name} token")
        # Only copies of the last release still store addresses.
        values = {"user_id": user.id, "address_hash": f"{name} address", "now": NOW}
        db._engine.write("INSERT INTO known_addresses VALUES (:user_id, :address_hash, :now)", values)
    db.rate_limits.consume([Bucket("bucket", 1, 60)], NOW)
    db.rate_limits.secret(b"secret")


SESSIONS = ["bob1", "bob2", "eve1", "eve2"]  # the live sessions of a populated database
EVES_SESSIONS = SESSIONS[2:]


def run_together(number: int, task: Callable[[int], T]) -> list[T]:
    """Run the task with 0, 1, … on as many threads, which start at the same time."""
    barrier = threading.Barrier(number)

    def run(index: int) -> T:
        barrier.wait()
        return task(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def open_files(path: Path) -> list[str]:
    """Return the names of this process's open files that are the database or belong to it, one for each descriptor."""
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return [link for link in links if link.startswith(str(path))]


def sqlite_engine(db: DB) -> sqlite.SQLiteEngine:
    """Return the engine of a database in a file."""
    assert isinstance(db._engine, sqlite.SQLiteEngine)
    return db._engine


def rows(connection: Any, statement: str = "SELECT * FROM users") -> list[Any]:
    found: list[Any] = connection.execute(statement).fetchall()
    return found


def all_rows(connection: Any) -> dict[str, list[Any]]:
    """All rows of each table, ordered by their first two columns."""
    return {table: sorted(rows(connection, f"SELECT * FROM {table}"), key=lambda row: row[:2]) for table in TABLES}


def add_session(
    db: DB,
    user: User,
    session_hash: str,
    *,
    now: int = NOW,
    expires_at: int = NOW + 1000,
    replaced: str | None = None,
    idle_since: int = NOW - 100,
    limit: int = 5,
) -> bool:
    session = Session(session_hash, now, now, expires_at, "127.0.0.1", "curl")
    return db.add_session(user, session, replaced=replaced, idle_since=idle_since, limit=limit)


def find_session(db: DB, session_hash: str, now: int = NOW) -> User | None:
    found = db.find_session(session_hash, now=now, idle_since=now - 100, latest=now + 300)
    return found[0] if found else None


def live_sessions(db: DB, *session_hashes: str) -> list[str]:
    return [session_hash for session_hash in session_hashes if find_session(db, session_hash)]


def set_reset_token(db: DB, user_id: int, token_hash: str = "token", keep_since: int = NOW) -> bool:
    return db.set_reset_token(user_id, token_hash, now=NOW, expires_at=NOW + 600, keep_since=keep_since)


def spend_token(db: DB, token_hash: str = "token", now: int = NOW, new: bytes = NEW_HASH) -> bool:
    return db.spend_reset(token_hash, new, now=now, latest=now + 300)


def begin_totp(db: DB, user_id: int, secret: str = "SEED") -> bool:
    """Store an unconfirmed seed, from the user's newest session."""
    user = db.find_user_by(id=user_id)
    return db.set_totp(user, secret, user.session_id or "", user.session_id or "")


def enable_totp(db: DB, user: User, session_hash: str, new_session_hash: str, *codes: str, now: int = NOW) -> bool:
    """Store and confirm a seed."""
    assert begin_totp(db, user.id)
    return db.confirm_totp(
        db.find_user_by(id=user.id), 1000, codes, now=now, kept=session_hash, renewed=new_session_hash
    )


def add_expiring_rows(other: Any, number: int = 1) -> None:
    """Add sessions of bob, and buckets: this many of each expire at NOW, and one a second later."""
    for index in range(number + 1):
        moment = NOW + (index == number)
        other.execute("INSERT INTO throttle VALUES (?, ?)", (f"b{index}", moment))
        other.execute(
            "INSERT INTO sessions VALUES (?, ?, 1, ?, ?, ?, '', '', 0, NULL)",
            (100 + index, f"s{index}", NOW, NOW, moment),
        )


def prune(db: DB, now: int = NOW, idle_since: int = 0) -> int:
    """Prune; return how many rows were deleted."""
    return sum(number for _, number in db.prune(now=now, idle_since=idle_since, limit=200))


# Every method that looks up rows, in an order in which each finds what it needs: one user with session "s" and "token".
LOOKUPS: dict[str, Callable[[DB], object]] = {
    "user by id": lambda db: db.find_user_by(id=1),
    "user by email": lambda db: db.find_user_by(email="bob@x.io"),
    "user by session": lambda db: db.find_user_by(session_id="s"),
    "user by token": lambda db: db.find_user_by(reset_token="token"),
    "session": lambda db: find_session(db, "s"),
    "token": lambda db: db.find_reset("token", now=NOW, latest=NOW + 300),
    "update_user": lambda db: db.update_user(1, session_id="s"),
    "replace_hash": lambda db: db.replace_hash(1, HASH, HASH),
    "add_session": lambda db: add_session(db, db.find_user_by(id=1), "t", replaced="s"),
    "touch_session": lambda db: db.touch_session("s", NOW + 60),
    "record_factor": lambda db: db.record_factor(1, NOW),
    "count_untold_logins": lambda db: db.count_untold_logins(1, 1),
    "untold_logins": lambda db: db.untold_logins(),
    "end_session": lambda db: db.end_session("t"),
    "end_sessions": lambda db: db.end_sessions(1),
    "set_reset_token": lambda db: set_reset_token(db, 1),
    "spend_reset": lambda db: spend_token(db),
    "list_sessions": lambda db: db.list_sessions(1, now=NOW, idle_since=NOW - 100, latest=NOW),
    "end_sessions but one": lambda db: db.end_sessions(1, kept="s"),
    "end_sessions and devices": lambda db: db.end_sessions(1, devices=True),
    "another session": lambda db: add_session(db, db.find_user_by(id=1), "u"),
    "change_password": lambda db: db.change_password(1, NEW_HASH, HASH, "u", "v"),
    "set_totp": lambda db: begin_totp(db, 1),
    "confirm_totp": lambda db: db.confirm_totp(SEEDED, 1, ["a"], now=NOW, kept="v", renewed="w"),
    "spend_totp": lambda db: db.spend_totp(1, 2, 2),
    "spend_recovery_code": lambda db: db.spend_recovery_code(1, "a"),
    "remove_totp": lambda db: db.remove_totp(1, "w", "x"),
    "prune": lambda db: prune(db, NOW + 1000),
    "set_groups": lambda db: db.set_groups(db.find_user_by(id=1), "a,b"),
    "disable_user": lambda db: db.disable_user(1, NOW),
    "enable_user": lambda db: db.enable_user(1),
    "delete_user": lambda db: db.delete_verified_user(db.find_user_by(id=1), "s"),
    "consume": lambda db: db.rate_limits.consume([Bucket("a", 1, 60), Bucket("b", 5, 60, emptied=True)], NOW),
    "a refused attempt": lambda db: db.rate_limits.consume([Bucket("a", 1, 60), Bucket("b", 5, 60, emptied=True)], NOW),
    "is_empty": lambda db: db.rate_limits.is_empty(Bucket("a", 1, 60), NOW),
    "refund": lambda db: db.rate_limits.refund([Bucket("a", 1, 60)]),
}
