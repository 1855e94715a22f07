"""Faults around a running service: kills, a full disk, a locked or lost database, no descriptors, lost clients.

Every test claims the same: what was answered with 200 is stored, a refused request changed nothing, and the service
recovers by itself or says on one line why it cannot. FAULT_ROUNDS=200 and SOAK_MINUTES=20 make the long form.
FAULT_SEED repeats a run.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

import engines.sqlite
import log
import web.server
from credentials import passwords
from engines.errors import StorageUnavailable
from engines.sqlite import SQLiteEngine
from tests.conftest import Answer, Client, Clock, Service, clean_environ
from tests.crowd import (
    SEED,
    UNLIMITED,
    USERS,
    Crowd,
    account_form,
    ask,
    assert_intact,
    awaited,
    checked,
    events,
    program_with,
    signed_in,
)

pytestmark = pytest.mark.faults

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "1"))


def database_of(service: Service) -> Path:
    return Path(service.environ["AUTHSVC_DATABASE"])


def write_back(service: Service) -> None:
    """Move SQLite's write-ahead log into the database file, and cut the log to nothing."""
    path = database_of(service)
    with Path(f"{path}.lock").open("r+b") as lock, closing(sqlite3.connect(path)) as connection:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A reader of the service may hold the log for a moment.
        assert awaited(lambda: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0))


def refused_start(service: Service) -> str:
    """Start a service that must not start; return the one line that it prints."""
    environ = {**clean_environ(), **service.environ}
    done = subprocess.run(service.program, cwd=service.folder, env=environ, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr


def crashes(service: Service) -> list[str]:
    """Return the lines of the log about unexpected errors, and those that are no events."""
    return [line for line in service.log.splitlines() if '"sys_crash"' in line or not line.startswith("{")]


# Kill and stop


@pytest.mark.both_engines
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)], ids=["SIGKILL", "SIGTERM"]
)
def test_answered_changes_survive_the_end_of_the_process(start: Callable[..., Service], number: int, code: int) -> None:
    service, crowd, moment = start(**UNLIMITED), Crowd(), random.Random(SEED)
    for _ in range(ROUNDS):
        wanted = crowd.answered + moment.randrange(20, 60)
        with crowd.using(service.url, ending=True):
            assert awaited(lambda: crowd.answered >= wanted, 20)  # noqa: B023
            time.sleep(moment.uniform(0, 0.02))  # the time that a request takes, so that any step of it is met
            assert service.end(number) == code, SEED
        service.start()
        assert_intact(service)
        crowd.check(service.url)
    if ROUNDS > 1:  # the later ends must not lose what an earlier check has found
        crowd.check(service.url, sample=1000)
    assert not crashes(service), SEED


# A full disk


@contextmanager
def resource_limit(service: Service, kind: int, soft: int) -> Iterator[None]:
    """Lower a resource limit of the running process."""
    _, hard = resource.prlimit(service.process.pid, kind)
    resource.prlimit(service.process.pid, kind, (soft, hard))
    yield
    resource.prlimit(service.process.pid, kind, (hard, hard))


@contextmanager
def file_size_limit(service: Service) -> Iterator[None]:
    write_back(service)
    largest = max(path.stat().st_size for path in service.folder.iterdir())
    with resource_limit(service, resource.RLIMIT_FSIZE, largest):
        yield


@contextmanager
def full_disk(service: Service) -> Iterator[None]:
    write_back(service)
    filler = database_of(service).with_name("filler")
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB: SQLite's write-ahead log takes 4 MB before it is written back."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def database_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The path of a database, on the small disk if the test asks for it."""
    folder: Path = request.getfixturevalue("small_disk") if request.param else tmp_path
    return folder / "authsvc.db"


@pytest.mark.parametrize(
    ("database_file", "full"),
    [(False, file_size_limit), (True, full_disk)],
    indirect=["database_file"],
    ids=["file size limit", "full disk"],
)
def test_a_full_disk_refuses_writes_until_there_is_space_again(
    database_file: Path, start: Callable[..., Service], full: Callable[[Service], Any]
) -> None:
    service, crowd = start(**UNLIMITED, AUTHSVC_DATABASE=str(database_file)), Crowd()
    form = account_form("bob")
    assert ask(service, "POST", "/users", form) == 200
    session = signed_in(service, form)
    new_password = {"password": "b4l0u", "new_password": "x"}
    for _ in range(ROUNDS):
        with crowd.using(service.url):
            assert crowd.goes_on()
            with full(service):
                writes: dict[str, Callable[[], int]] = {
                    "sign in": lambda: ask(service, "POST", "/sessions", form),
                    "request a reset": lambda: ask(service, "POST", "/reset_password", form),
                    "sign out": lambda: ask(service, "DELETE", "/sessions", session=session),
                    "change the password": lambda: ask(service, "PUT", "/password", new_password, session),
                }
                # A few more writes may fit into space that was allocated before.
                assert awaited(lambda: ask(service, "POST", "/reset_password", form) == 503)
                assert {name: write() for name, write in writes.items()} == dict.fromkeys(writes, 503), SEED
                for path in ("/profile", "/sessions", "/verify", "/health"):
                    assert ask(service, "GET", path, session=session, timeout=5) == 200
            assert awaited(lambda: ask(service, "POST", "/reset_password", form) == 200)
        assert_intact(service)
        crowd.check(service.url)
    assert ask(service, "POST", "/sessions", form) == 200
    assert not crashes(service), SEED
    refusals = [event for event in events(service) if event["event"] == "sys_storage_unavailable"]
    assert refusals
    assert all(event["reason"] for event in refusals)


# A database that another process has locked

LOCKING_PROGRAMS = {
    "a transaction": """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
connection.execute("DELETE FROM users")
""",
    "the lock file": """
import fcntl, sys
file = open(sys.argv[1] + ".lock", "r+b")
fcntl.flock(file, fcntl.LOCK_EX)
""",
}


@contextmanager
def locked_by(program: str, service: Service) -> Iterator[None]:
    """Run a process that holds a lock until it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", program + "print('locked', flush=True)\nsys.stdin.read()", str(database_of(service))],
        env={**clean_environ()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    with process.stdin, process.stdout:
        try:
            assert process.stdout.readline() == "locked\n"
            yield
        finally:
            process.kill()
            process.wait(10)


class ImpatientService(Service):
    """A service that waits for a lock for a second; in the long form of these tests as long as in production."""

    program = program_with("engines.sqlite", BUSY_TIMEOUT=1.0 if ROUNDS == 1 else engines.sqlite.BUSY_TIMEOUT)


@pytest.fixture
def impatient_service(tmp_path: Path) -> Iterator[Service]:
    service = ImpatientService(tmp_path, **UNLIMITED)
    yield service
    service.end()


@pytest.mark.process
@pytest.mark.parametrize("kind", LOCKING_PROGRAMS)
def test_reads_go_on_while_another_process_locks_the_database(impatient_service: Service, kind: str) -> None:
    service, form = impatient_service, account_form("bob")
    assert ask(service, "POST", "/users", form) == 200
    for number in range(max(1, ROUNDS // 3)):
        session = signed_in(service, form)
        with ThreadPoolExecutor(1) as pool, locked_by(LOCKING_PROGRAMS[kind], service):
            writing = pool.submit(ask, service, "POST", "/users", account_form(number))
            while not writing.done():
                for path in ("/profile", "/sessions", "/verify", "/health"):
                    assert ask(service, "GET", path, session=session, timeout=5) == 200
            assert writing.result() == 503
        assert ask(service, "POST", "/users", account_form(number)) == 200  # the refused request left nothing behind
        assert ask(service, "DELETE", "/sessions", session=session) == 302
        assert ask(service, "GET", "/profile", session=session) == 403
    assert ask(service, "POST", "/sessions", form) == 200
    assert_intact(service)
    assert not crashes(service)


# A database that is lost or damaged while the service runs


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xa5" * path.stat().st_size)


def database_without_users(path: Path) -> bytes:
    """Return the content of a good database of this service that has no user."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(path.with_name("other"))) as target:
        source.backup(target)
        with target:
            target.execute("DELETE FROM users")
        target.execute("PRAGMA journal_mode = DELETE")
    return path.with_name("other").read_bytes()


# name: what is done to the file, and what the next start says, or "" where it starts
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut to a page": (lambda path: os.truncate(path, 4096), "malformed"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 8192 * 4096), "malformed"),
    "cut to nothing": (lambda path: os.truncate(path, 0), ""),
    "overwritten": (overwrite, "not a database"),
    "replaced by garbage": (lambda path: replace(path, b"\xa5" * 65_536), "not a database"),
    "replaced by another database": (lambda path: replace(path, database_without_users(path)), ""),
    "deleted": (lambda path: path.unlink(), ""),
    "log deleted": (lambda path: path.with_name(path.name + "-wal").unlink(), ""),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_lost_database_refuses_all_writes_and_the_log_says_why(start: Callable[..., Service], kind: str) -> None:
    service, form = start(**UNLIMITED), account_form("bob")
    path = database_of(service)
    assert ask(service, "POST", "/users", form) == 200
    session = signed_in(service, form)
    write_back(service)  # so that the log holds no second copy
    assert ask(service, "GET", "/health") == 200  # from now on the service knows the size of the file
    damage, next_start = DAMAGES[kind]
    damage(path)
    assert [ask(service, "POST", "/users", account_form(number)) for number in range(5)] == [503] * 5
    for page in ("/", "/health", "/profile", "/verify"):
        assert ask(service, "GET", page, session=session) in (200, 401, 403, 503)
    # One after the other, so that each hashing thread gets some: a thread that has not read yet must open the file.
    assert [ask(service, "POST", "/sessions", form) for _ in range(5)] == [503] * 5
    reasons = {event["reason"] for event in events(service) if event["event"] == "sys_storage_unavailable"}
    losses = "changes since the last backup are lost", "the latest changes may be lost"
    assert reasons
    assert [reason for reason in reasons if not any(loss in reason for loss in losses)] == []
    assert not crashes(service)
    assert service.end() == 0
    if next_start:
        assert next_start in refused_start(service)
    else:
        service.start()
        assert ask(service, "POST", "/users", account_form("eve")) == 200


@pytest.fixture
def open_file(tmp_path: Path) -> Iterator[SQLiteEngine]:
    """An engine in this process."""
    with closing(SQLiteEngine(str(tmp_path / "authsvc.db"))) as one:
        yield one


def insert_user(open_file: SQLiteEngine, name: str) -> None:
    statement = "INSERT INTO users (email, email_key, hashed_password) VALUES (:name, :name, '!')"
    open_file.write(statement, {"name": name})


class DeletingConnection:
    """A connection that deletes its file before or after one kind of statement."""

    def __init__(self, connection: sqlite3.Connection, path: Path, when: str, statement: str) -> None:
        self._connection = connection
        self._path = path
        self._when, self._statement = when, statement

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        chosen = statement.startswith(self._statement)
        if chosen and self._when == "before":
            self._path.unlink()
        cursor = self._connection.execute(statement, *values)
        if chosen and self._when == "after":
            self._path.unlink()
        return cursor


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT", "COMMIT"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_write_fails_at_whatever_step_the_file_is_deleted(
    open_file: SQLiteEngine, tmp_path: Path, when: str, statement: str
) -> None:
    path, writer = tmp_path / "authsvc.db", open_file._writer
    open_file._writer = DeletingConnection(writer, path, when, statement)  # type: ignore[assignment]
    with pytest.raises(StorageUnavailable, match="was deleted while it was in use: changes since the last backup"):
        insert_user(open_file, "bob")
    open_file._writer = writer
    with pytest.raises(StorageUnavailable, match="was deleted while it was in use: changes since the last backup"):
        insert_user(open_file, "eve")


@pytest.mark.parametrize("kind", ["cut to nothing", "replaced by another database", "deleted", "log deleted"])
def test_a_thread_that_reads_for_the_first_time_says_how_the_database_was_lost(
    open_file: SQLiteEngine, tmp_path: Path, kind: str
) -> None:
    DAMAGES[kind][0](tmp_path / "authsvc.db")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(open_file.read, "SELECT count(*) FROM users", {})
        with pytest.raises(StorageUnavailable, match=r"was (cut short|replaced|deleted) while it was in use"):
            reading.result()


def test_a_database_that_another_process_closes_during_the_start_is_not_lost(
    open_file: SQLiteEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = engines.sqlite.connect
    (tmp_path / "kept").hardlink_to(tmp_path / "authsvc.db-wal")  # so that a new log gets another inode
    insert_user(open_file, "bob")

    def connect_after_the_others_close(*arguments: Any, **options: Any) -> sqlite3.Connection:
        open_file._writer.close()  # the last connection to close deletes the log
        return connect(*arguments, **options)

    monkeypatch.setattr(engines.sqlite, "connect", connect_after_the_others_close)
    with closing(SQLiteEngine(str(tmp_path / "authsvc.db"))) as started:
        assert started.read("SELECT email FROM users", {}) == ("bob",)


def test_a_file_that_grows_during_a_check_was_not_cut_short(
    open_file: SQLiteEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = open_file._stat_files

    def look_before_another_thread_writes() -> Any:
        found = look()
        monkeypatch.setattr(open_file, "_stat_files", look)
        insert_user(open_file, "x" * 100_000)
        open_file._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        open_file.check()
        assert look()[""] > found[""]
        return found

    monkeypatch.setattr(open_file, "_stat_files", look_before_another_thread_writes)
    open_file.check()


# A database without write permission


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Make a file read-only. Permissions do not bind root, but the file attribute does."""
    if os.geteuid():
        path.chmod(0o400)
        yield
        path.chmod(0o600)
    elif not shutil.which("chattr") or subprocess.run(["chattr", "+i", path], capture_output=True).returncode:
        pytest.skip("no chattr on this file system")
    else:
        try:
            yield
        finally:
            subprocess.run(["chattr", "-i", path], check=True)


def stored_emails(path: Path) -> set[str]:
    """Return the emails in a copy of the files, as after a power failure."""
    folder = path.with_name("copy")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", folder)
    with closing(sqlite3.connect(folder / path.name)) as connection:
        return {email for (email,) in connection.execute("SELECT email FROM users")}


def test_a_read_only_file_stays_writable_while_open_but_stops_the_next_start(start: Callable[..., Service]) -> None:
    service = start(**UNLIMITED)
    path = database_of(service)
    with read_only(path):
        for number in range(5):
            assert ask(service, "POST", "/users", account_form(number)) == 200
            assert f"{number}@x.io" in stored_emails(path)
        assert service.end() == 0
        assert "ermi" in refused_start(service)  # "Permission denied" or "Operation not permitted"
    service.start()
    for number in range(5):
        assert ask(service, "POST", "/sessions", account_form(number)) == 200
    assert_intact(service)


# Connections


def descriptors(service: Service) -> list[str]:
    """Return what the file descriptors of the process refer to."""
    found = []
    for link in Path(f"/proc/{service.process.pid}/fd").iterdir():
        with suppress(OSError):  # it was closed meanwhile
            found.append(os.readlink(link))
    return found


def descriptors_but_readers(service: Service) -> list[str]:
    """Return the same without the files of the database, which each thread opens when it first reads."""
    return [name for name in descriptors(service) if not name.startswith(str(database_of(service)))]


def sockets(service: Service) -> int:
    return sum(name.startswith("socket:") for name in descriptors(service))


def resident(service: Service) -> int:
    """Return the bytes of memory that the process uses."""
    return int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def only_listens(service: Service) -> bool:
    """Wait until all connections are closed; return False if some stay open.

    The service never sees the end of a connection that the system dropped. It closes those after IDLE_TIMEOUT.
    """
    return awaited(lambda: sockets(service) == 1, IDLE_TIMEOUT + 10)


def is_closed(connection: socket.socket) -> bool:
    """Return whether the other side has closed a connection on which nothing was sent."""
    try:
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@contextmanager
def idle(service: Service, count: int) -> Iterator[list[socket.socket]]:
    """Open so many connections and send nothing. The system queues those that the service does not accept."""
    with ExitStack() as opened:
        yield [opened.enter_context(socket.create_connection(service.address, timeout=5)) for _ in range(count)]


# Seconds until the service closes a connection on which nothing comes: longer than any wait of a test for something
# else, but a test may have to wait for it. In the long form as long as in production.
IDLE_TIMEOUT = 20 if ROUNDS == 1 else web.server.IDLE_TIMEOUT


class ForgetfulService(Service):
    """A service that soon closes connections on which nothing comes."""

    program = program_with("web.server", IDLE_TIMEOUT=IDLE_TIMEOUT)


@contextmanager
def warm_service(folder: Path) -> Iterator[Service]:
    """Start a service whose threads open their connections to the database, but perhaps for one that writes."""
    service, crowd = ForgetfulService(folder, **UNLIMITED), Crowd("warm")
    connections = 3 + passwords.CORES  # that for writing, and those of the I/O thread, a writer and the hashing threads
    try:
        with crowd.using(service.url):
            assert awaited(lambda: descriptors(service).count(str(database_of(service))) >= connections, 60)
            assert crowd.goes_on(60)
        crowd.check(service.url)
        yield service
    finally:
        service.end()


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with warm_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def warm(shared_service: Service) -> Service:
    """The shared service without a connection. Use an email of your own."""
    assert ask(shared_service, "GET", "/health") == 200
    assert only_listens(shared_service)
    return shared_service


@pytest.mark.process
def test_without_descriptors_open_connections_are_served(warm: Service) -> None:
    service, crowd = warm, Crowd("descriptors")
    for count in range(ROUNDS):
        before, lines = len(descriptors(service)), len(service.log.splitlines())
        with requests.Session() as kept:
            checked(kept.get(service.url, timeout=5))
            with resource_limit(service, resource.RLIMIT_NOFILE, before + 10), idle(service, 60):
                assert awaited(lambda: len(descriptors(service)) == before + 10)  # noqa: B023
                for number in range(10):
                    form = account_form(f"descriptors{count}.{number}")
                    assert checked(kept.post(f"{service.url}/users", data=form, timeout=5)).status_code == 200
                    assert checked(kept.get(f"{service.url}/health", timeout=5)).status_code == 200
                assert len(service.log.splitlines()) - lines <= log.FLOOD_LIMIT + 20  # and no more within 10 s
        assert ask(service, "GET", "/", timeout=5) == 200
        assert ask(service, "POST", "/sessions", form, timeout=5) == 200
        assert only_listens(service)
        with crowd.using(service.url):
            assert crowd.goes_on()
        crowd.check(service.url)
    assert_intact(service)


@pytest.mark.process
def test_too_many_connections_take_no_memory_and_close_no_active_one(
    warm: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, before = warm, resident(warm)
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("urllib3.connectionpool"), "debug", lambda text, *_: said.append(text))
    for number in range(ROUNDS):
        with requests.Session() as kept:
            checked(kept.get(service.url, timeout=5))
            with idle(service, web.server.MAX_CONNECTIONS + 88) as silent:
                assert awaited(lambda: any(map(is_closed, silent)))
                form = account_form(f"connections{number}")
                assert checked(kept.post(f"{service.url}/users", data=form, timeout=5)).status_code == 200
                assert checked(kept.get(f"{service.url}/health", timeout=5)).status_code == 200
                assert not any("Resetting dropped connection" in text for text in said)  # it would connect again
                assert sockets(service) <= web.server.MAX_CONNECTIONS
                assert resident(service) < before + 16 * 2**20
        assert ask(service, "POST", "/sessions", form, timeout=5) == 200
        assert only_listens(service)
    assert resident(service) < before + 2 * 2**20
    assert_intact(service)


@pytest.mark.process
def test_idle_connections_up_to_the_limit_keep_nobody_out(warm: Service) -> None:
    with idle(warm, web.server.MAX_CONNECTIONS):
        for _ in range(10):
            assert ask(warm, "GET", "/", timeout=5) == 200


FLOOD = 10_000


@contextmanager
def flood(service: Service, count: int) -> Iterator[list[socket.socket]]:
    """Begin so many connections at once. The system drops or queues most of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:
        begun = []
        for _ in range(min(count, hard - 500)):
            begun.append(opened.enter_context(socket.socket()))
            begun[-1].setblocking(False)
            assert begun[-1].connect_ex(service.address) in (0, errno.EINPROGRESS)
        yield begun
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def flooded(tmp_path: Path) -> Iterator[Service]:
    """A service for one test: some of its connections end only with IDLE_TIMEOUT, as the system has dropped them."""
    with warm_service(tmp_path) as service:
        yield service


@pytest.mark.process
def test_ten_thousand_idle_connections_take_no_memory(flooded: Service) -> None:
    service = flooded
    before = resident(service)
    with flood(service, FLOOD):
        assert awaited(lambda: sockets(service) > web.server.MAX_CONNECTIONS // 2)
        began, served = time.monotonic(), 0
        while served < 2 and time.monotonic() < began + 30:
            assert sockets(service) <= web.server.MAX_CONNECTIONS
            assert resident(service) < before + 16 * 2**20
            with suppress(requests.Timeout, requests.ConnectionError):  # it queues among ten thousand
                served += ask(service, "GET", "/health", timeout=5) == 200
        assert served
    assert awaited(lambda: sockets(service) < web.server.MAX_CONNECTIONS // 2, 15)
    assert ask(service, "GET", "/health", timeout=5) == 200
    assert resident(service) < before + 4 * 2**20
    assert_intact(service)


def raw_request(email: str, *, length: int = 0) -> tuple[bytes, bytes]:
    """Return head and body of a request that creates an account."""
    body = f"email={email}&password=b4l0u".encode()
    head = (
        f"POST /users HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {length or len(body)}\r\n\r\n"
    )
    return head.encode(), body


# What a client has sent when it disconnects.
SENT: dict[str, Callable[[str], bytes]] = {
    "part of the headers": lambda email: raw_request(email)[0][:60],
    "part of the body": lambda email: b"".join(raw_request(email, length=400)),
    "a whole request": lambda email: b"".join(raw_request(email)),
    "many requests": lambda email: b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
}


@pytest.mark.process
@pytest.mark.parametrize("abrupt", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("sent", SENT)
def test_a_client_that_disconnects_leaves_nothing_behind(warm: Service, sent: str, abrupt: bool) -> None:
    service, before, earlier_crashes = warm, descriptors_but_readers(warm), crashes(warm)
    domain = f"{abrupt}.{sent.replace(' ', '.')}.io".lower()
    for number in range(max(50, ROUNDS)):
        with socket.create_connection(service.address, timeout=5) as leaving:
            if abrupt:  # SO_LINGER of 0 s: RST instead of FIN
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            leaving.sendall(SENT[sent](f"{number}@{domain}"))
    assert only_listens(service)
    assert ask(service, "GET", "/health", timeout=5) == 200
    assert ask(service, "POST", "/users", account_form(f"stayed@{domain}")) == 200
    # The service may accept a connection late, after the system has dropped it; it closes that one after IDLE_TIMEOUT.
    within = IDLE_TIMEOUT + 10
    closed = awaited(lambda: len(descriptors_but_readers(service)) <= len(before), within)
    assert closed, "\n".join(set(descriptors_but_readers(service)) - set(before))
    threads = len(list(Path(f"/proc/{service.process.pid}/task").iterdir()))
    spare = 3 * threads  # a file, its log and its index
    assert awaited(lambda: len(descriptors(service)) - len(before) <= spare, within), "\n".join(descriptors(service))
    created = {email for email in stored_emails(database_of(service)) if email.endswith(f"@{domain}")}
    assert not created or sent == "a whole request"
    assert created or sent != "a whole request" or abrupt  # a reset also drops what the service has not read yet
    for email in sorted(created)[:3]:
        assert ask(service, "POST", "/sessions", {"email": email, "password": "b4l0u"}) == 200
    assert_intact(service)
    assert crashes(service) == earlier_crashes


# Long use

SOAK = float(os.environ.get("SOAK_MINUTES", "0.03")) * 60
SPARE = 0.03  # of the memory, which allocators round up


@pytest.mark.process
def test_long_use_takes_no_more_memory_and_no_more_descriptors(warm: Service) -> None:
    service, crowd, earlier_crashes = warm, Crowd("long", size=3), crashes(warm)
    began = time.monotonic()
    with crowd.using(service.url):
        assert crowd.goes_on()
        memory, opened = resident(service), len(descriptors_but_readers(service))
        while time.monotonic() < began + SOAK:
            assert ask(service, "GET", "/health", timeout=5) == 200
            assert sockets(service) <= USERS + 2
            time.sleep(0.05)
        assert crowd.goes_on()  # all users are still served
        assert resident(service) <= memory * (1 + SPARE) + 2**20, (SEED, crowd.answered)
        assert len(descriptors_but_readers(service)) <= opened + USERS, (SEED, descriptors(service))
    assert only_listens(service)
    crowd.check(service.url, sample=20)
    assert_intact(service)
    assert crashes(service) == earlier_crashes


# A clock that was a day wrong and is set right

DAY = 86_400
LONGEST_WAIT = 1200  # seconds until the slowest bucket of these refills one attempt


class User:
    """One user of the application in this process."""

    def __init__(self, call: Client, clock: Clock) -> None:
        self._call = call
        self._clock = clock

    def ask(self, method: str, path: str, session: str = "", **form: str) -> Answer:
        """Send a request, and again after the wait if it is refused by a rate limit."""
        answer = self.ask_once(method, path, session, **form)
        if answer.status == 429:
            wait = int(answer.headers["Retry-After"])
            assert 0 < wait <= LONGEST_WAIT
            self._clock.advance(wait)
            answer = self.ask_once(method, path, session, **form)
        return answer

    def ask_once(self, method: str, path: str, session: str = "", **form: str) -> Answer:
        answer = self._call(method, path, form, cookie=f"session_id={session}", REMOTE_ADDR="127.0.0.1")
        assert answer.status < 500
        return answer

    def log_in(self, password: str = "b4l0u") -> Answer:
        return self.ask("POST", "/sessions", email="bob@x.io", password=password)

    def token(self) -> str:
        return str(self.ask("POST", "/reset_password", email="bob@x.io").json["reset_token"])

    def reset(self, token: str, password: str) -> int:
        form = {"email": "bob@x.io", "reset_token": token, "new_password": password}
        return self.ask("PUT", "/reset_password", **form).status

    def is_live(self, session: str) -> bool:
        return self.ask("GET", "/profile", session).status == 200


@pytest.fixture
def user(call: Client, clock: Clock) -> User:
    user = User(call, clock)
    assert user.ask("POST", "/users", email="bob@x.io", password="b4l0u").status == 200
    return user


@pytest.mark.both_engines
@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_clock_that_was_a_day_wrong_extends_nothing_and_blocks_nobody(user: User, clock: Clock, seconds: int) -> None:
    session, token = user.log_in().session_id, user.token()
    clock.advance(seconds)
    assert user.is_live(session) is (seconds > 0)  # a session lasts seven days; one from the future is invalid
    assert user.reset(token, "n0t") == 403
    meanwhile, other = user.log_in().session_id, user.token()
    assert user.is_live(meanwhile)
    clock.advance(-seconds)
    assert not user.is_live(session)  # the next login replaced it
    assert user.is_live(meanwhile) is (seconds < 0)
    assert user.reset(other, "n0t") == 403
    assert user.is_live(user.log_in().session_id)
    assert user.reset(user.token(), "n3w") == 200
    assert user.log_in("n3w").status == 200


@pytest.mark.both_engines
@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_clock_that_was_a_day_wrong_lengthens_no_rate_limit(user: User, clock: Clock, seconds: int) -> None:
    def guesses() -> int:
        """Return how many wrong passwords are compared before the rate limit refuses one."""
        for number in range(100):
            if user.ask_once("POST", "/sessions", email="bob@x.io", password="wrong").status != 401:
                return number
        raise AssertionError("no rate limit")

    clock.advance(seconds)
    assert guesses()
    clock.advance(-seconds)
    assert user.log_in().status == 200
    assert guesses() <= 20
