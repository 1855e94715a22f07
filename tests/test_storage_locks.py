"""Locks of the SQLite engine: between threads, processes and other programs; and its connections."""

from __future__ import annotations

import fcntl
import gc
import os
import re
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from engines.errors import StorageUnavailable
from storage import DB, User
from tests import stored_users
from tests.conftest import HERE, clean_environ
from tests.stored_users import HASH, open_files, rows, run_together, sqlite_engine

path = stored_users.path
short_timeout = stored_users.short_timeout
statements = stored_users.statements
bob = stored_users.bob


WRITER = """
import sys
from storage import DB
db = DB(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
for number in range(10):
    db.add_user(f"{sys.argv[2]}{number}@x.io", "hash")
    db.find_user_by(email=f"{sys.argv[2]}0@x.io")
db.close()
"""


def test_the_writer_has_all_settings(statements: list[str], db: DB) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1, "trusted_schema": 0}
    assert {pragma: rows(sqlite_engine(db)._writer, f"PRAGMA {pragma}")[0][0] for pragma in wanted} == wanted
    for pragma in wanted:  # some builds of SQLite have the wanted value as their default, so look for the statement too
        assert any(re.match(rf"PRAGMA {pragma} = ", statement) for statement in statements), pragma


def test_a_reader_cannot_write(db: DB, bob: User) -> None:
    db.find_user_by(id=1)
    assert sqlite_engine(db)._readers
    for reader in sqlite_engine(db)._readers:
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("DELETE FROM users")


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files in /proc")


@pytest.mark.slow
@needs_proc
def test_the_readers_of_50_ended_threads_are_closed(db: DB, bob: User, path: Path) -> None:
    db.find_user_by(id=1)

    def read_on_5_threads() -> int:
        assert run_together(5, lambda index: db.find_user_by(id=1)) == [bob] * 5
        gc.collect()  # an ended thread may be part of a reference cycle
        assert len(sqlite_engine(db)._readers) == 1  # that of this thread
        return len(open_files(path))

    # SQLite keeps descriptors of closed connections while others hold locks on the file, and reuses them.
    after_5_threads = read_on_5_threads()
    assert [count for count in (read_on_5_threads() for _ in range(9)) if count > after_5_threads] == []
    assert db.find_user_by(id=1) == bob
    db.update_user(1, session_id="x")


@needs_proc
def test_closing_closes_the_readers_of_living_threads(path: Path) -> None:
    db = DB(path)
    bob, done = db.add_user("bob@x.io", HASH), threading.Event()

    def read_and_stay(barrier: threading.Barrier) -> bool:
        found = db.find_user_by(id=1) == bob
        barrier.wait(10)
        return done.wait(10) and found

    with ThreadPoolExecutor(3) as pool:
        all_have_read = threading.Barrier(4)
        reading = [pool.submit(read_and_stay, all_have_read) for _ in range(3)]
        all_have_read.wait(10)
        readers = list(sqlite_engine(db)._readers)
        assert len(readers) == 3
        assert len(open_files(path)) > 3
        db.close()
        assert open_files(path) == []
        for reader in readers:
            with pytest.raises(sqlite3.ProgrammingError, match="closed"):
                reader.execute("SELECT 1")
        done.set()
        assert all(one.result(10) for one in reading)
    assert {file.name for file in path.parent.iterdir()} == {"authsvc.db", "authsvc.db.lock"}


def test_no_other_write_comes_between_a_read_and_a_write(db: DB, bob: User, other: Any) -> None:
    with db._engine.transaction() as writer:
        rows(writer)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("UPDATE users SET session_id = 'theirs'")
        writer.execute("UPDATE users SET session_id = 'ours'")
    assert db.find_user_by(id=1).session_id == "ours"


def test_a_write_holds_the_file_lock(db: DB, path: Path) -> None:
    with open(f"{path}.lock", "rb") as lock_file:
        with db._engine.transaction(), pytest.raises(BlockingIOError):
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_held_file_lock_stops_writes_and_not_reads(short_timeout: None, db: DB, bob: User, path: Path) -> None:
    with open(f"{path}.lock", "rb") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        with pytest.raises(StorageUnavailable):
            db.add_user("eve@x.io", HASH)
        assert db.find_user_by(id=1) == bob
    assert db.add_user("eve@x.io", HASH).id == 2


def test_a_write_waits_a_limited_time_for_another_thread(short_timeout: None, db: DB) -> None:
    with ThreadPoolExecutor(1) as pool, db._engine.transaction(), pytest.raises(StorageUnavailable):
        pool.submit(db.add_user, "bob@x.io", HASH).result(timeout=5)
    assert db.add_user("bob@x.io", HASH).id == 1


def test_a_write_waits_for_the_file_lock(db: DB, path: Path) -> None:
    with open(f"{path}.lock", "rb") as lock_file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        adding = pool.submit(db.add_user, "bob@x.io", HASH)
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.05)
        fcntl.flock(lock_file, fcntl.LOCK_UN)
        assert adding.result(timeout=5).id == 1


@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_transaction_of_another_program_stops_writes_and_not_reads(
    short_timeout: None, db: DB, bob: User, other: Any, begin: str
) -> None:
    other.execute(begin)
    with pytest.raises(StorageUnavailable):
        db.update_user(1, session_id="x")
    assert db.find_user_by(id=1) == bob
    other.execute("ROLLBACK")
    db.update_user(1, session_id="x")


def test_closing_waits_for_the_file_lock(path: Path) -> None:
    db = DB(path)
    with open(f"{path}.lock", "rb") as lock_file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        done = pool.submit(db.close)
        with pytest.raises(TimeoutError):
            done.result(timeout=0.05)
        fcntl.flock(lock_file, fcntl.LOCK_UN)
        done.result(timeout=5)


def test_a_full_disk_stops_writes_and_changes_nothing(db: DB, bob: User, other: Any) -> None:
    rows(sqlite_engine(db)._writer, "PRAGMA max_page_count = 1")  # not one page more than now
    with pytest.raises(StorageUnavailable):
        db.update_user(1, session_id="x" * 20_000)
    assert db.find_user_by(id=1) == bob
    rows(sqlite_engine(db)._writer, "PRAGMA max_page_count = 1000")
    db.update_user(1, session_id="x" * 20_000)
    assert len(rows(other, "SELECT session_id FROM users")[0][0]) == 20_000


def test_a_write_waits_for_the_transaction_of_another_program(db: DB, other: Any) -> None:
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(db.add_user, "bob@x.io", HASH)
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.05)
        other.execute("ROLLBACK")
        assert adding.result(timeout=5).id == 1


def test_a_damaged_file_is_unavailable(db: DB, bob: User, path: Path) -> None:
    rows(sqlite_engine(db)._writer, "PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path, 4096)
    with pytest.raises(StorageUnavailable):
        db.find_user_by(id=1)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.both_engines
def test_two_processes_write_to_one_database(db: DB, database: str, other: Any) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, database, name],
            cwd=HERE,
            env=clean_environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=20)
    assert [process.returncode for process in processes] == [0, 0]
    assert rows(other, "SELECT id FROM users ORDER BY id") == [(number,) for number in range(1, 21)]


@pytest.mark.slow
def test_one_of_two_threads_makes_the_tables(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_found_no_tables = threading.Barrier(2)

    def wait(statement: str) -> None:
        if statement.startswith("BEGIN"):
            with suppress(threading.BrokenBarrierError):
                both_found_no_tables.wait(0.1)

    stored_users.trace(monkeypatch, wait)
    for db in run_together(2, lambda index: DB(path)):
        db.close()
    assert both_found_no_tables.broken  # the second one looked only after the first had made them
