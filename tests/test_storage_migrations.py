"""Migrations of a SQLite file to a newer version of the schema."""

from __future__ import annotations

import fcntl
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engines import schema, sqlite
from engines.errors import DatabaseRefused
from storage import DB, User
from tests import stored_users
from tests.stored_users import HASH, find_session, rows

path = stored_users.path
short_timeout = stored_users.short_timeout
older = stored_users.older


def set_migrations(monkeypatch: pytest.MonkeyPatch, *migrations: str) -> None:
    monkeypatch.setattr(sqlite, "SQLITE_MIGRATIONS", migrations)
    monkeypatch.setattr(sqlite, "SQLITE_VERSION", len(migrations) + 1)


RELEASED = schema.SQLITE_MIGRATIONS
COLOUR = "ALTER TABLE users ADD COLUMN colour TEXT;"
PAINT = "UPDATE users SET colour = 'blue';"


def state_of(path: Path) -> tuple[int, list[str], list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        columns = [name for _, name, *_ in rows(connection, "PRAGMA table_info(users)")]
        return rows(connection, "PRAGMA user_version")[0][0], columns, rows(connection)


def test_a_file_migrated_by_a_newer_release_during_the_wait_is_refused(older: Path, db: DB, other: Any) -> None:
    with open(f"{older}.lock", "rb") as lock_file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        opening = pool.submit(DB, older)
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.05)
        other.execute("PRAGMA user_version = 99")
        fcntl.flock(lock_file, fcntl.LOCK_UN)
        with pytest.raises(DatabaseRefused, match="newer release"):
            opening.result(timeout=5)


def test_a_new_file_has_the_newest_version(older: Path) -> None:
    assert state_of(older)[0] == schema.SQLITE_VERSION


@pytest.mark.parametrize("releases", [[(COLOUR, PAINT)], [(COLOUR,), (COLOUR, PAINT)], [(COLOUR, PAINT)] * 2])
def test_an_older_file_is_migrated_with_its_rows(
    older: Path, monkeypatch: pytest.MonkeyPatch, releases: list[tuple[str, ...]]
) -> None:
    for migrations in releases:
        set_migrations(monkeypatch, *RELEASED, *migrations)
        with closing(DB(older)) as db:
            assert find_session(db, "s") == User(1, "bob@x.io", HASH, "s")
    version, columns, (row,) = state_of(older)
    assert (version, columns[-1], row[-1]) == (len(RELEASED) + 3, "colour", "blue")


@pytest.mark.parametrize(
    "broken", ["INSERT INTO nowhere VALUES (1);", "INSERT INTO users DEFAULT VALUES;", "NONSENSE;"]
)
def test_a_failed_migration_leaves_the_older_file_unchanged(
    older: Path, monkeypatch: pytest.MonkeyPatch, short_timeout: None, broken: str
) -> None:
    before = state_of(older)
    set_migrations(monkeypatch, *RELEASED, COLOUR, PAINT + broken)
    with pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db: [^\n]+\Z") as refusal:
        DB(older)
    assert state_of(older) == before
    set_migrations(monkeypatch, *RELEASED)  # the error still exists, and must hold no lock
    with closing(DB(older)) as db:
        db.update_user(1, session_id=None)
    assert refusal.type is DatabaseRefused
