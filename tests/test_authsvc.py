"""The program: the WSGI callable for other servers, importing without side effects, deleting expired rows."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

import authsvc
from auth import Auth, Caller
from engines import sqlite
from settings import Settings
from storage import DB
from tests.conftest import COST, HERE, Client, Clock, clean_environ, raw_connection
from tests.routes import events, log_in, register

# The WSGI callable for another server


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[DB]]:
    """The databases that ``authsvc.app`` opens in this test. Its first request is still to come."""
    dbs: list[DB] = []
    pruning: list[tuple[threading.Thread, threading.Event]] = []
    both = threading.Barrier(2)
    start_pruning = authsvc._start_pruning

    def start(auth: Auth, stopping: threading.Event) -> threading.Thread:
        pruning.append((start_pruning(auth, stopping), stopping))
        return pruning[-1][0]

    def open_one(database: str, private: bool) -> DB:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.05)  # long enough for a second request to get here, if nothing stops it
        dbs.append(DB(database))
        return dbs[-1]

    monkeypatch.setattr("auth.DB", open_one)
    monkeypatch.setattr(authsvc, "_start_pruning", start)
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "authsvc.db"))
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", str(COST))
    authsvc._shared_app.cache_clear()
    yield dbs
    authsvc._shared_app.cache_clear()
    for thread, stopping in pruning:  # before their databases are closed
        stopping.set()
        thread.join()
    for db in dbs:
        db.close()


def test_the_callable_serves_from_one_database(opened: list[DB]) -> None:
    call = Client(authsvc.app)
    assert opened == []
    register(call)
    assert log_in(call).status == 200
    assert len(opened) == 1


def test_two_first_requests_at_once_open_one_database(opened: list[DB]) -> None:
    threads = [threading.Thread(target=Client(authsvc.app), args=("GET", "/")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


def test_the_callable_deletes_expired_rows(opened: list[DB], clock: Clock, tmp_path: Path) -> None:
    clock.now = 1.0
    with closing(DB(tmp_path / "authsvc.db")) as db:
        auth = Auth(db, Settings(bcrypt_cost=COST), clock)
        auth.register_user("bob@x.io", "b4l0u")
        auth.create_session("bob@x.io")
    assert Client(authsvc.app)("GET", "/").status == 200
    deadline = time.monotonic() + 30
    with closing(sqlite3.connect(tmp_path / "authsvc.db")) as connection:
        while connection.execute("SELECT count(*) FROM sessions").fetchone() != (0,):
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUTHSVC_BCRYPT_COST", "99"),
        ("AUTHSVC_NO_SUCH", "1"),
        ("AUTHSVC_LISTEN", "0.0.0.0:5000"),
        ("AUTHSVC_DATABASE", "/nowhere/at/all.db"),
    ],
)
def test_the_callable_answers_503_to_a_wrong_setting(
    opened: list[DB], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    answer = Client(authsvc.app)("GET", "/")
    assert (answer.status, answer.json) == (503, {"message": "service not configured"})
    assert (answer.headers["Content-Type"], answer.headers["Cache-Control"]) == ("application/json", "no-store")
    (line,) = events(capsys)
    assert line["event"] == "sys_startup_failed"
    assert (value if name == "AUTHSVC_DATABASE" else name) in line["reason"]


@pytest.mark.process
def test_importing_opens_and_starts_nothing(tmp_path: Path) -> None:
    program = "import os, threading, authsvc; print(os.listdir(), threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**clean_environ(), "PYTHONPATH": str(HERE), "AUTHSVC_LISTEN": "rubbish"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


# Expired rows are deleted in small steps


class Stopping(threading.Event):
    """Replaces the event that ends pruning. A wait takes no time and runs the next call; the last call ends pruning."""

    def __init__(self, *calls: Callable[[], object]) -> None:
        super().__init__()
        self.pauses: list[float | None] = []
        self.calls = list(calls)

    def wait(self, timeout: float | None = None) -> bool:
        self.pauses.append(timeout)
        self.calls.pop(0)()
        return not self.calls


def add_expired_sessions(settings: Settings, count: int) -> None:
    with raw_connection(settings.database) as connection:
        connection.execute("BEGIN")
        connection.execute("INSERT INTO users (id, email, email_key, hashed_password) VALUES (9, 'a', 'a', '!')")
        connection.executemany(
            "INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)"
            " VALUES (?, 9, 0, 0, 1, '', '')",
            [(str(number),) for number in range(count)],
        )
        connection.execute("COMMIT")


@pytest.fixture
def one_second_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading of the monotonic clock is one second after the last, so that every step takes one second."""
    monkeypatch.setattr(authsvc, "time", SimpleNamespace(monotonic=itertools.count().__next__))


@pytest.mark.usefixtures("one_second_steps")
@pytest.mark.parametrize(("expired", "steps"), [(0, 0), (200, 1), (450, 3)])
def test_pruning_pauses_between_steps_and_an_hour_between_rounds(
    auth: Auth, settings: Settings, expired: int, steps: int
) -> None:
    add_expired_sessions(settings, expired)
    stopping = Stopping(*[lambda: None] * (steps + 3))
    authsvc._start_pruning(auth, stopping).join(30)
    assert stopping.pauses == [0.0, *[10] * steps, 3600.0, 3600.0]
    with raw_connection(settings.database) as connection:
        assert connection.execute("SELECT count(*) FROM sessions").fetchone() == (0,)


@pytest.mark.usefixtures("one_second_steps")
def test_a_locked_database_delays_pruning_by_a_minute(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.02)
    with closing(DB(settings.database)) as db:
        add_expired_sessions(settings, 1)
        with raw_connection(settings.database) as other:
            stopping = Stopping(lambda: other.execute("BEGIN EXCLUSIVE"), other.rollback, lambda: None)
            authsvc._start_pruning(Auth(db, settings), stopping).join(30)
            assert stopping.pauses == [0.0, 60.0, 10.0]
            assert other.execute("SELECT count(*) FROM sessions").fetchone() == (0,)
    assert capsys.readouterr() == ("", "")


def files_with(text: bytes, settings: Settings) -> list[str]:
    """Return which of the database and its write-ahead log have the text in them."""
    return [suffix for suffix in ("", "-wal") if text in Path(settings.database + suffix).read_bytes()]


@pytest.mark.parametrize("text", [b"canary@x.io", b"Canary/1.0"], ids=["email", "user agent"])
def test_pruning_leaves_no_trace_of_what_was_deleted_in_the_files(auth: Auth, settings: Settings, text: bytes) -> None:
    auth.register_user("bob@x.io", "b4l0u")
    user = auth.register_user("canary@x.io", "b4l0u")
    session_id = auth.log_in("canary@x.io", "b4l0u", caller=Caller(None, agent="Canary/1.0"))[1]
    auth.empty_log()
    assert files_with(text, settings) == [""]
    auth.log_out(session_id)
    auth._db.delete_user(user.id)
    authsvc._start_pruning(auth, Stopping(*[lambda: None] * 2)).join(30)
    assert files_with(text, settings) == []
    assert files_with(b"bob@x.io", settings) == [""]


@pytest.mark.usefixtures("one_second_steps")
@pytest.mark.slow
def test_a_round_that_a_long_reader_hinders_is_repeated_after_a_minute(auth: Auth, settings: Settings) -> None:
    log = Path(f"{settings.database}-wal")
    auth.register_user("bob@x.io", "b4l0u")
    sizes = []
    with raw_connection(settings.database) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM users").fetchone()
        auth.register_user("eve@x.io", "b4l0u")
        calls = [lambda: sizes.append(log.stat().st_size)] * 2
        stopping = Stopping(calls[0], lambda: (calls[0](), reader.rollback()), calls[0])
        authsvc._start_pruning(auth, stopping).join(30)
    assert stopping.pauses == [0.0, 60.0, 3600.0]
    assert [size > 0 for size in sizes] == [True, True, False]


def test_an_unexpected_error_is_logged_and_does_not_end_pruning(
    auth: Auth, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = []

    def prune() -> list[tuple[str, int]]:
        rounds.append(1)
        raise LookupError("canary")

    monkeypatch.setattr(auth, "prune", prune)
    authsvc._start_pruning(auth, Stopping(*[lambda: None] * 3)).join(30)
    assert len(rounds) == 2
    assert [line["event"] for line in events(capsys)] == ["sys_crash"] * 2
