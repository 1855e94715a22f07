"""Helpers for tests on SQLite files: make them, read them past the storage, and damage them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from engines import schema, sqlite_files
from storage import DB, Session
from tests.conftest import HERE

FIRST_RELEASE = HERE / "tests" / "first_release.db"  # tests open copies of it: opening it would leave a log beside it
LAST_CHANGED = 1_800_000_120  # unix seconds of the last change in it

HASH = b"$2b$04$" + b"." * 53
NEWER_RELEASE = f"PRAGMA user_version = {schema.SQLITE_VERSION + 1}"


def run_sql(path: Path, *statements: str) -> list[Any]:
    """Run statements on a connection of their own; return the rows of the last one."""
    found: list[Any] = []
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            found = connection.execute(statement).fetchall()
    return found


def content(path: Path) -> dict[str, list[Any]]:
    """Return the rows of each table."""
    tables = run_sql(path, "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
    return {table: run_sql(path, f"SELECT * FROM {table}") for (table,) in tables}


def emails(path: Path) -> list[str]:
    return [email for (email,) in run_sql(path, "SELECT email FROM users ORDER BY id")]


def version(path: Path) -> int:
    return int(run_sql(path, "PRAGMA user_version")[0][0])


def tables_of(path: Path) -> dict[str, Any]:
    """Return the kind, columns, references and indexes of each table, as SQLite describes them."""
    tables: dict[str, Any] = {}
    kinds = "SELECT name, type, wr, strict FROM pragma_table_list WHERE schema = 'main'"
    for name, *kind in run_sql(path, kinds):
        indexes = {
            index: (traits, run_sql(path, f"PRAGMA index_xinfo({index})"), run_sql(path, f"PRAGMA index_info({index})"))
            for _, index, *traits in run_sql(path, f"PRAGMA index_list({name})")
        }
        tables[name] = (
            kind,
            run_sql(path, f"PRAGMA table_xinfo({name})"),
            run_sql(path, f"PRAGMA foreign_key_list({name})"),
            indexes,
        )
    # The condition of a partial index is only in its text.
    tables["indexes"] = sorted(run_sql(path, "SELECT name, sql FROM sqlite_schema WHERE type = 'index'"))
    return tables


def files_in(folder: Path) -> dict[str, bytes]:
    """Return all files, except SQLite's shared memory, in which readers leave marks."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.endswith("-shm")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def fill(path: Path, *emails: str) -> Path:
    """Make a database with these users, each with a session."""
    with closing(DB(path)) as db:
        for email in emails:
            user = db.add_user(email, HASH, LAST_CHANGED)
            session = Session(f"session of {email}", LAST_CHANGED, LAST_CHANGED, LAST_CHANGED + 1000, "", "")
            db.add_session(user, session, replaced=None, idle_since=0, limit=5)
    return path


def leave_log(path: Path, *emails: str) -> Path:
    """Make a database with these users as a killed process leaves it: the rows are in the write-ahead log only."""
    original = path.with_name("killed.db")
    with closing(DB(original)) as db:
        for email in emails:
            db.add_user(email, HASH)
        for suffix in "", "-wal", "-shm":
            Path(f"{path}{suffix}").write_bytes(Path(f"{original}{suffix}").read_bytes())
    for suffix in "", ".lock":
        Path(f"{original}{suffix}").unlink()
    return path


def back_up(database: Path, target: Path) -> Path:
    sqlite_files.backup(str(database), str(target))
    return target


def restore(backup: Path, database: Path, kept: Path) -> bool:
    return sqlite_files.restore(str(backup), str(database), str(kept), lambda _: None)


def problems(path: Path) -> list[str]:
    return sqlite_files.problems(str(path))


def damage_users(path: Path) -> None:
    """Invert bytes of the page on which the table of users begins."""
    (page,) = run_sql(
        path, "PRAGMA wal_checkpoint(TRUNCATE)", "SELECT rootpage FROM sqlite_schema WHERE name = 'users'"
    )[0]
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        inverted = bytes(byte ^ 0xFF for byte in file.read(200))
        file.seek((page - 1) * 4096)
        file.write(inverted)


def damage_header(path: Path) -> None:
    """Overwrite the first bytes: SQLite does not take the file for a database any more."""
    with path.open("r+b") as file:
        file.write(b"\xa5" * 512)
