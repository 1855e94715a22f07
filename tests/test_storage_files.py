"""Files that the SQLite engine makes, accepts and refuses."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines import schema, sqlite
from engines.errors import DatabaseRefused
from storage import DB, User
from tests import stored_users
from tests.stored_users import HASH, add_session, open_files, rows, run_together, sqlite_engine

path = stored_users.path
short_timeout = stored_users.short_timeout
older = stored_users.older
bob = stored_users.bob
eve = stored_users.eve
populated = stored_users.populated

NOBODY = 65534


@pytest.fixture
def permissive_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def make_file(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


OTHER_TABLE = "CREATE TABLE notes (text TEXT)"
OTHER_SESSIONS = "CREATE TABLE sessions (id TEXT, data TEXT)"
OTHER_USERS = "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT, hashed_password TEXT)"

REFUSED: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("dear diary\n"),
    "short text": lambda path: path.write_text("x"),
    "a header and random bytes": lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4080),
    "only a header": lambda path: path.write_bytes(b"SQLite format 3\0"),
    "of a newer release": lambda path: make_file(path, "PRAGMA user_version = 99"),
    "of a newer release, in WAL mode": lambda path: make_file(
        path, "PRAGMA journal_mode = WAL", "PRAGMA user_version=99"
    ),
    "of another program": lambda path: make_file(path, OTHER_TABLE),
    "of another program with users": lambda path: make_file(path, OTHER_USERS),
    "of another program, version 1": lambda path: make_file(path, OTHER_TABLE, "PRAGMA user_version = 1"),
    "of another program with sessions": lambda path: make_file(path, OTHER_SESSIONS),
    "of another program with both, version 1": lambda path: make_file(
        path, OTHER_USERS, OTHER_SESSIONS, "PRAGMA user_version = 1"
    ),
    "of another program, in WAL mode": lambda path: make_file(path, "PRAGMA journal_mode = WAL", OTHER_TABLE),
    "a directory": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "in a missing directory": lambda path: None,
    "below a file": lambda path: path.parent.with_name("missing").write_text("a file"),
}


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


@contextmanager
def shared_directory() -> Iterator[Path]:
    """A directory that other users can enter, unlike those of pytest. Root could write to any directory."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def as_nobody() -> Iterator[None]:
    user_id = os.geteuid()
    if user_id == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user_id)


def test_the_settings_name_the_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "named.db"))
    with closing(DB()) as db:
        db.add_user("bob@x.io", HASH)
    assert (tmp_path / "named.db").is_file()


def test_the_default_file_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    DB().close()
    assert (tmp_path / "authsvc.db").is_file()


def test_a_given_path_overrides_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "unused.db"))
    DB(tmp_path / "explicit.db").close()
    assert {file.name for file in tmp_path.iterdir()} >= {"explicit.db"}
    assert not (tmp_path / "unused.db").exists()


def test_a_relative_path_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(DB("relative.db")) as db:
        db.add_user("bob@x.io", HASH)
        monkeypatch.chdir("/")
        assert db.find_user_by(id=1).email == "bob@x.io"  # the first read, so the reader is opened only now


def test_a_reopened_file_has_its_rows(path: Path) -> None:
    with closing(DB(path)) as db:
        bob = db.add_user("bob@x.io", HASH)
    with closing(DB(path)) as db:
        assert db.find_user_by(email="bob@x.io") == bob
        assert db.add_user("eve@x.io", HASH).id == 2


def test_a_deleted_user_leaves_no_trace_in_the_file(populated: None, db: DB, path: Path) -> None:
    in_the_schema = schema.SQLITE_SCHEMA.read_bytes().count(b"bob")  # SQLite stores the comments of the schema too
    rows(sqlite_engine(db)._writer, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert path.read_bytes().count(b"bob") > in_the_schema
    db.delete_user(1)
    rows(sqlite_engine(db)._writer, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert path.read_bytes().count(b"bob") == in_the_schema
    assert b"eve" in path.read_bytes()


def test_only_the_owner_can_read_the_files(permissive_umask: None, db: DB, bob: User, path: Path) -> None:
    assert db.find_user_by(id=1) == bob
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {f"authsvc.db{suffix}": 0o600 for suffix in ("", "-wal", "-shm", ".lock")}


def test_a_closed_database_is_one_file_and_its_lock_file(path: Path) -> None:
    with closing(DB(path)) as db:
        db.add_user("bob@x.io", HASH)
        db.find_user_by(id=1)
        run_together(3, lambda index: db.find_user_by(id=1))
    assert {file.name for file in path.parent.iterdir()} == {"authsvc.db", "authsvc.db.lock"}


def test_a_deleted_secret_is_erased_from_the_file(path: Path) -> None:
    with closing(DB(path)) as db:
        add_session(db, db.add_user("bob@x.io", HASH), "canary")
        db.end_sessions(1)
    assert b"canary" not in path.read_bytes()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_foreign_file_is_refused_and_left_unchanged(short_timeout: None, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "authsvc.db"
    REFUSED[kind](path)
    if kind in ("in a missing directory", "below a file"):
        path = tmp_path / "missing" / "authsvc.db"
    before = tree(tmp_path)
    with pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db[^\n]*\Z"):
        DB(path)
    assert tree(tmp_path) == before


def test_an_open_file_of_a_newer_release_is_refused_and_left_unchanged(db: DB, path: Path, other: Any) -> None:
    other.execute("PRAGMA user_version = 99")  # so far only in the write-ahead log
    before = tree(path.parent).keys(), path.read_bytes(), rows(other)
    with pytest.raises(DatabaseRefused, match="newer release"):
        DB(path)
    assert (tree(path.parent).keys(), path.read_bytes(), rows(other)) == before


def test_while_one_thread_makes_the_file_no_other_opens_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, others = os.open, []

    def make_slowly(file: Any, flags: int, *args: Any, **options: Any) -> int:
        made = make(file, flags, *args, **options)
        if flags & os.O_EXCL:
            others.append(pool.submit(DB, path))
            with pytest.raises(TimeoutError):
                others[0].result(timeout=0.05)
        return made

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(os, "open", make_slowly)
        DB(path).close()
        (other,) = others
        other.result(timeout=5).close()


def test_a_database_can_be_opened_while_another_process_closes_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last connection that closes deletes the write-ahead log; the next one makes another."""
    first = DB(path)
    first.add_user("bob@x.io", HASH)
    connect = sqlite.connect

    def connect_after_the_other_closed(*arguments: Any) -> sqlite3.Connection:
        monkeypatch.undo()
        first.close()
        (path.parent / "file").touch()  # or the next log might get the inode of the old one
        return connect(*arguments)

    monkeypatch.setattr(sqlite, "connect", connect_after_the_other_closed)
    with closing(DB(path)) as second:
        assert second.find_user_by(id=1).email == "bob@x.io"
        assert second.add_user("eve@x.io", HASH).id == 2


def test_a_database_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatabaseRefused, match=r"\A[^\n]*:memory:[^\n]*\Z"):
        DB(":memory:")
    assert tree(tmp_path) == {}


def test_the_rows_of_a_killed_process_are_recovered(db: DB, bob: User, path: Path, tmp_path: Path) -> None:
    (copied := tmp_path / "copied").mkdir()
    for suffix in "", "-wal":  # all committed rows are in the log
        shutil.copy(f"{path}{suffix}", copied)
    with closing(DB(copied / path.name)) as recovered:
        assert recovered.find_user_by(id=1) == bob


def test_an_empty_file_is_accepted(path: Path) -> None:
    path.touch()
    with closing(DB(path)) as db:
        assert db.add_user("bob@x.io", HASH).id == 1


@pytest.mark.parametrize("exists", [False, True])
def test_a_directory_without_write_permission_is_refused(exists: bool) -> None:
    with shared_directory() as folder:
        path = folder / "authsvc.db"
        if exists:
            path.touch()
            path.chmod(0o666)
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db(\.lock)?: Permission denied\Z"):
            DB(path)
        assert tree(folder) == ({"authsvc.db": b""} if exists else {})
        folder.chmod(0o755)


def test_a_file_without_write_permission_is_refused() -> None:
    with shared_directory() as folder:
        path = folder / "authsvc.db"
        DB(path).close()
        os.unlink(f"{path}.lock")
        path.chmod(0o444)
        folder.chmod(0o777)
        before = tree(folder)
        with as_nobody(), pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db(\.lock)?: Permission denied\Z"):
            DB(path)
        assert tree(folder) == before


def test_a_locked_file_is_refused_and_closed(short_timeout: None, path: Path) -> None:
    with open(f"{path}.lock", "wb") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        with pytest.raises(DatabaseRefused, match=r"\A[^\n]*another process[^\n]*\Z") as refusal:
            DB(path)
        assert open_files(path) == [f"{path}.lock"], refusal  # that of this test: retries must not use up descriptors
    DB(path).close()


def test_a_file_locked_by_another_program_is_refused(short_timeout: None, older: Path) -> None:
    with closing(sqlite3.connect(older, isolation_level=None)) as program:
        rows(program, "PRAGMA locking_mode = EXCLUSIVE")
        rows(program, "BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseRefused, match=r"\A[^\n]*database is locked\Z"):
            DB(older)
    DB(older).close()
