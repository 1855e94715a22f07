"""What goes wrong around the service: ended by force, no room, a locked or lost file, no descriptors, absent clients.

What is claimed is the same of all: what was answered 200 is there; what was refused was refused cleanly; and the
service recovers by itself, or says on one line why it cannot. FAULT_ROUNDS (200) and SOAK_MINUTES (20) make them long,
FAULT_SEED repeats a run.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import re
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

import guard
import lanes
from tests.conftest import Answer, Client, Clock, Service, clean_environ
from tests.crowd import CLIENTS, ROOMY, SEED, UNMEASURED, Crowd, ask, assert_whole, awaited, clean, events, fields

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "3"))


def database_of(service: Service) -> Path:
    return Path(service.environ["AUTHSVC_DATABASE"])


def write_back(service: Service) -> None:
    """Move all of SQLite's log into the file, and leave the log without room laid out."""
    path = database_of(service)
    with Path(f"{path}.lock").open("r+b") as lock, closing(sqlite3.connect(path)) as connection:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)


def refused_start(service: Service) -> str:
    """Start it, which must fail; return the one line that it says."""
    environ = {**clean_environ(), **service.environ}
    done = subprocess.run(service.program, cwd=service.folder, env=environ, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr


# The end, wanted or not


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)])
def test_what_was_answered_outlives_the_process_and_what_was_not_is_whole_or_nothing(
    start: Callable[..., Service], number: int, code: int
) -> None:
    service, crowd, moment = start(**ROOMY), Crowd(), random.Random(SEED)
    for _ in range(ROUNDS):
        wanted = crowd.answered + moment.randrange(10, 60)
        with crowd.using(service.url, ending=True):
            assert awaited(lambda: crowd.answered >= wanted, 20)  # noqa: B023
            time.sleep(moment.uniform(0, 0.02))  # as long as a request takes: at any moment of it
            assert service.end(number) == code, SEED
        service.start()
        assert_whole(service)
        crowd.check(service.url)
    crowd.check(service.url, most=1000)
    assert not [event for event in events(service) if event["event"] == "sys_crash"], SEED


# No room


@contextmanager
def limited(service: Service, kind: int, soft: int) -> Iterator[None]:
    """Let a running process have no more of this than so much."""
    _, hard = resource.prlimit(service.process.pid, kind)
    resource.prlimit(service.process.pid, kind, (soft, hard))
    yield
    resource.prlimit(service.process.pid, kind, (hard, hard))


@contextmanager
def no_longer_files(service: Service) -> Iterator[None]:
    write_back(service)
    longest = max(path.stat().st_size for path in service.folder.iterdir())
    with limited(service, resource.RLIMIT_FSIZE, longest):
        yield


@contextmanager
def no_room_on_the_disk(service: Service) -> Iterator[None]:
    write_back(service)
    filler = database_of(service).with_name("filler")
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    yield
    filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MB: SQLite's log takes 4 before it is written back."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def on_a_disk(request: pytest.FixtureRequest) -> str:
    """Where the database goes, and with it what fills the place."""
    return str(request.getfixturevalue("small_disk") / "authsvc.db") if request.param else "authsvc.db"


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("on_a_disk", "full"),
    [(False, no_longer_files), (True, no_room_on_the_disk)],
    indirect=["on_a_disk"],
    ids=["a limit", "a full disk"],
)
def test_without_room_nothing_is_promised_and_with_room_again_all_goes_on(
    on_a_disk: str, start: Callable[..., Service], tmp_path: Path, full: Callable[[Service], Any]
) -> None:
    service, crowd = start(**ROOMY, AUTHSVC_DATABASE=str(tmp_path / on_a_disk)), Crowd()
    form = fields("bob")
    assert ask(service, "POST", "/users", form) == 200
    session = requests.post(f"{service.url}/sessions", data=form, timeout=5).cookies["session_id"]
    change = {"password": "b4l0u", "new_password": "x"}
    for _ in range(ROUNDS):
        wanted = crowd.answered + 20
        with crowd.using(service.url):
            assert awaited(lambda: crowd.answered >= wanted, 20)  # noqa: B023
            with full(service):
                refused: dict[str, Callable[[], int]] = {
                    "log in": lambda: ask(service, "POST", "/sessions", form),
                    "reset": lambda: ask(service, "POST", "/reset_password", form),
                    "log out": lambda: ask(service, "DELETE", "/sessions", session=session),
                    "change": lambda: ask(service, "PUT", "/password", change, session),
                }
                # What was laid out before may hold a few more.
                assert awaited(lambda: ask(service, "POST", "/reset_password", form) == 503)
                assert {name: write() for name, write in refused.items()} == dict.fromkeys(refused, 503), SEED
                for path in ("/profile", "/sessions", "/verify", "/health"):
                    assert ask(service, "GET", path, session=session, timeout=1) == 200
            assert awaited(lambda: ask(service, "POST", "/reset_password", form) == 200)
        assert_whole(service)
        crowd.check(service.url)
    assert ask(service, "POST", "/sessions", form) == 200
    noted = events(service)
    assert {event["event"] for event in noted} >= {"sys_storage_unavailable"}
    assert not [event for event in noted if event["event"] == "sys_crash"], SEED
    assert all(event["reason"] for event in noted if event["event"] == "sys_storage_unavailable")


# A database that another process holds

HOLDERS = {
    "a transaction": """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
connection.execute("DELETE FROM users")
""",
    "the lock": """
import fcntl, sys
file = open(sys.argv[1] + ".lock", "r+b")
fcntl.flock(file, fcntl.LOCK_EX)
""",
}


@contextmanager
def holding(service: Service, program: str) -> Iterator[None]:
    """Another process, which holds on until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", program + "print('held', flush=True)\nsys.stdin.read()", str(database_of(service))],
        env={**clean_environ(), **UNMEASURED},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    with process.stdin, process.stdout:
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()
        process.wait(10)


@pytest.mark.sqlite
@pytest.mark.parametrize("kind", HOLDERS)
def test_while_another_process_holds_the_database_reads_go_on_and_afterwards_writes(
    start: Callable[..., Service], kind: str
) -> None:
    service, form = start(**ROOMY), fields("bob")
    assert ask(service, "POST", "/users", form) == 200
    for number in range(max(1, ROUNDS // 3)):
        session = requests.post(f"{service.url}/sessions", data=form, timeout=5).cookies["session_id"]
        with ThreadPoolExecutor(1) as pool, holding(service, HOLDERS[kind]):
            writing = pool.submit(ask, service, "POST", "/users", fields(number))
            while not writing.done():
                for path in ("/profile", "/sessions", "/verify", "/health"):
                    assert ask(service, "GET", path, session=session, timeout=1) == 200
            assert writing.result() == 503
        assert ask(service, "POST", "/users", fields(number)) == 200  # was not made by halves
        assert ask(service, "DELETE", "/sessions", session=session) == 302
        assert ask(service, "GET", "/profile", session=session) == 403
    assert ask(service, "POST", "/sessions", form) == 200
    assert_whole(service)
    assert "sys_crash" not in service.log


# A database that is lost or damaged while it is served


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def write_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xa5" * path.stat().st_size)


def emptied_database(path: Path) -> bytes:
    """A good database of ours without a user."""
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(path.with_name("other"))) as target:
        source.backup(target)
        with target:
            target.execute("DELETE FROM users")
        target.execute("PRAGMA journal_mode = DELETE")
    return path.with_name("other").read_bytes()


# name: what is done, and what the next start says, "" where it starts
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut to a page": (lambda path: os.truncate(path, 4096), "malformed"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 8192 * 4096), "malformed"),
    "cut to nothing": (lambda path: os.truncate(path, 0), ""),
    "written over": (write_over, "not a database"),
    "replaced by rubbish": (lambda path: replace(path, b"\xa5" * 65_536), "not a database"),
    "replaced by another": (lambda path: replace(path, emptied_database(path)), ""),
    "deleted": (lambda path: path.unlink(), ""),
    "its log deleted": (lambda path: path.with_name(path.name + "-wal").unlink(), ""),
}


def saved(path: Path) -> set[str]:
    """The emails that another machine would find on this disk."""
    folder = path.with_name("saved")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for suffix in ("", "-wal"):
        if Path(f"{path}{suffix}").exists():
            shutil.copy(f"{path}{suffix}", folder)
    try:
        with closing(sqlite3.connect(folder / path.name)) as connection:
            return {email for (email,) in connection.execute("SELECT email FROM users")}
    except sqlite3.DatabaseError:
        return set()


def known_addresses(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("SELECT count(*) FROM known_addresses").fetchone()[0])


@pytest.mark.sqlite
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_database_that_is_lost_while_it_is_served_takes_no_promise(start: Callable[..., Service], kind: str) -> None:
    service, form = start(**ROOMY), fields("bob")
    path = database_of(service)
    assert ask(service, "POST", "/users", form) == 200
    session = requests.post(f"{service.url}/sessions", data=form, timeout=5).cookies["session_id"]
    assert awaited(lambda: known_addresses(path))  # the last thing that a login writes, which nobody waits for
    write_back(service)  # what is lost now is not in the log too
    assert ask(service, "GET", "/health") == 200  # it has seen the file as it is now
    do_it, said = DAMAGES[kind]
    do_it(path)
    assert [ask(service, "POST", "/users", fields(number)) for number in range(5)] == [503] * 5  # the first one notices
    for page in ("/", "/health", "/profile", "/verify"):
        assert ask(service, "GET", page, session=session, timeout=2) in (200, 401, 403, 503)
    assert ask(service, "POST", "/sessions", form) in (401, 503)  # on a thread that has perhaps not read before
    reasons = {event["reason"] for event in events(service) if event["event"] == "sys_storage_unavailable"}
    assert reasons
    assert all(re.search("what no backup has is lost|the latest changes may be lost", reason) for reason in reasons)
    assert "sys_crash" not in service.log
    assert service.end() == 0
    if said:
        assert said in refused_start(service)
    else:
        service.start()
        assert ask(service, "POST", "/users", fields("eve")) == 200


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Permissions do not bind root, but the attribute does."""
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


@pytest.mark.sqlite
def test_a_database_that_is_made_read_only_stays_writable_to_who_has_it_open_and_stops_the_next_start(
    start: Callable[..., Service],
) -> None:
    service = start(**ROOMY)
    path = database_of(service)
    with read_only(path):
        for number in range(5):
            assert ask(service, "POST", "/users", fields(number)) == 200
            assert f"{number}@x.io" in saved(path)
        assert service.end() == 0
        assert "ermi" in refused_start(service)  # permission denied, or not permitted
    service.start()
    for number in range(5):
        assert ask(service, "POST", "/sessions", fields(number)) == 200
    assert_whole(service)


# Connections


def descriptors(service: Service) -> list[str]:
    """What the process has open."""
    found = []
    for link in Path(f"/proc/{service.process.pid}/fd").iterdir():
        try:
            found.append(os.readlink(link))
        except OSError:  # closed meanwhile
            continue
    return found


def sockets(service: Service) -> int:
    return sum(name.startswith("socket:") for name in descriptors(service))


def resident(service: Service) -> int:
    """Bytes of memory."""
    return int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


@contextmanager
def idle(service: Service, count: int) -> Iterator[None]:
    """So many connections on which nothing is said; the system accepts those that the service does not."""
    with ExitStack() as opened:
        for _ in range(count):
            opened.enter_context(socket.create_connection(service.address, timeout=5))
        yield


def warm(service: Service) -> None:
    """Let every thread open what it keeps open."""
    crowd = Crowd("warm")
    with crowd.using(service.url):
        assert awaited(lambda: crowd.answered >= 60, 20)
    crowd.check(service.url)
    assert ask(service, "GET", "/health") == 200
    assert awaited(lambda: sockets(service) == 1)


@pytest.fixture
def warmed(start: Callable[..., Service]) -> Service:
    service = start(**ROOMY)
    warm(service)
    return service


@pytest.mark.once
def test_out_of_descriptors_it_serves_who_is_connected_and_then_everybody(warmed: Service) -> None:
    service, crowd = warmed, Crowd()
    for _ in range(ROUNDS):
        before, lines = len(descriptors(service)), len(service.log.splitlines())
        with requests.Session() as kept:
            clean(kept.get(service.url, timeout=5))
            with limited(service, resource.RLIMIT_NOFILE, before + 10), idle(service, 60):
                assert awaited(lambda: len(descriptors(service)) == before + 10)  # noqa: B023
                for number in range(10):
                    form = {"email": f"{number}@kept{lines}.io", "password": "b4l0u"}
                    assert clean(kept.post(f"{service.url}/users", data=form, timeout=5)).status_code == 200
                    assert clean(kept.get(f"{service.url}/health", timeout=1)).status_code == 200
                assert len(service.log.splitlines()) - lines <= guard.LOG_FLOOD + 20  # and no more within 10 s
        assert ask(service, "GET", "/", timeout=2) == 200
        assert ask(service, "POST", "/sessions", form, timeout=2) == 200
        assert awaited(lambda: sockets(service) == 1)
        with crowd.using(service.url):
            wanted = crowd.answered + 20
            assert awaited(lambda: crowd.answered >= wanted, 20)  # noqa: B023
        crowd.check(service.url)
    assert_whole(service)


@pytest.mark.once
def test_more_connections_than_the_limit_take_no_memory_and_harm_nobody_who_is_connected(
    warmed: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service, before = warmed, resident(warmed)
    caplog.set_level(logging.DEBUG, "urllib3")
    for number in range(ROUNDS):
        with requests.Session() as kept:
            clean(kept.get(service.url, timeout=5))
            with idle(service, lanes.CONNECTIONS + 88):
                assert awaited(lambda: "connection limit" in service.log)
                form = {"email": f"{number}@kept.io", "password": "b4l0u"}
                assert clean(kept.post(f"{service.url}/users", data=form, timeout=1)).status_code == 200
                assert clean(kept.get(f"{service.url}/health", timeout=1)).status_code == 200
                assert "Resetting dropped connection" not in caplog.text
                assert sockets(service) <= lanes.CONNECTIONS
                assert resident(service) < before + 16 * 2**20
        assert ask(service, "POST", "/sessions", form, timeout=5) == 200
        assert awaited(lambda: sockets(service) == 1)
    assert resident(service) < before + 2 * 2**20
    assert_whole(service)


@pytest.mark.once
def test_as_many_idle_connections_as_the_limit_allows_keep_nobody_out(warmed: Service) -> None:
    with idle(warmed, lanes.CONNECTIONS):
        for _ in range(10):
            assert ask(warmed, "GET", "/", timeout=1) == 200


FLOOD = 10_000


@contextmanager
def flood(service: Service, count: int) -> Iterator[None]:
    """So many connections at once, most of which the system leaves waiting."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with ExitStack() as opened:
        for _ in range(min(count, hard - 500)):  # both ends of a connection are on this machine, in two processes
            one = opened.enter_context(socket.socket())
            one.setblocking(False)
            assert one.connect_ex(service.address) in (0, errno.EINPROGRESS)
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.once
def test_ten_thousand_idle_connections_take_no_memory_and_are_over_when_they_are_gone(warmed: Service) -> None:
    service = warmed
    before = resident(service)
    with flood(service, FLOOD):
        assert awaited(lambda: "connection limit" in service.log)
        began, served = time.monotonic(), 0
        while served < 20 and time.monotonic() < began + 30:
            assert sockets(service) <= lanes.CONNECTIONS
            assert resident(service) < before + 16 * 2**20
            with suppress(requests.Timeout, requests.ConnectionError):  # it has its turn among ten thousand
                served += ask(service, "GET", "/health", timeout=5) == 200
        assert served
    assert awaited(lambda: sockets(service) < lanes.CONNECTIONS // 2, 15)  # some ends are lost: those go when idle
    assert ask(service, "GET", "/health", timeout=5) == 200
    assert resident(service) < before + 4 * 2**20
    print(f"{served} of others answered meanwhile, {(resident(service) - before) / 2**20:.1f} MB more")
    assert_whole(service)


def form_of(email: str, *, length: int = 0) -> tuple[bytes, bytes]:
    body = f"email={email}&password=b4l0u".encode()
    head = (
        f"POST /users HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {length or len(body)}\r\n\r\n"
    )
    return head.encode(), body


LEAVING: dict[str, Callable[[str], bytes]] = {
    "in the headers": lambda email: form_of(email)[0][:60],
    "in the body": lambda email: b"".join(form_of(email, length=400)),
    "before the answer": lambda email: b"".join(form_of(email)),
    "having asked much": lambda email: b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
}


@pytest.mark.once
@pytest.mark.parametrize("abrupt", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("moment", LEAVING)
def test_a_client_that_leaves_takes_nothing_with_it(warmed: Service, moment: str, abrupt: bool) -> None:
    service, before = warmed, descriptors(warmed)
    for number in range(max(200, ROUNDS)):
        with socket.create_connection(service.address, timeout=5) as leaving:
            if abrupt:  # SO_LINGER of 0 s: RST in place of FIN
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            leaving.sendall(LEAVING[moment](f"{number}@left.io"))
    assert awaited(lambda: sockets(service) == 1)
    assert ask(service, "GET", "/health", timeout=1) == 200
    assert ask(service, "POST", "/users", fields("stayed")) == 200
    assert awaited(lambda: len(descriptors(service)) <= len(before)), descriptors(service)
    made = {email for email in saved(database_of(service)) if email.endswith("left.io")}
    assert not made or moment == "before the answer"
    assert made or moment != "before the answer" or abrupt  # who resets takes back what was not read yet
    for email in sorted(made)[:3]:
        assert ask(service, "POST", "/sessions", {"email": email, "password": "b4l0u"}) == 200
    assert_whole(service)
    assert "sys_crash" not in service.log


# A clock that is a day off, and is put right

DAY = 86_400
LONGEST_WAIT = 1200  # seconds in which the slowest count of these forgets one


class Desk:
    """The application in this process, and what somebody does at it."""

    def __init__(self, call: Client, clock: Clock) -> None:
        self._call = call
        self._clock = clock

    def ask(self, method: str, path: str, session: str = "", **form: str) -> Answer:
        """Ask, and once more after the time that one is told to wait."""
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

    def lives(self, session: str) -> bool:
        return self.ask("GET", "/profile", session).status == 200


@pytest.fixture
def desk(call: Client, clock: Clock) -> Desk:
    desk = Desk(call, clock)
    assert desk.ask("POST", "/users", email="bob@x.io", password="b4l0u").status == 200
    return desk


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_clock_that_is_a_day_off_and_is_put_right_extends_nothing_and_shuts_nobody_out(
    desk: Desk, clock: Clock, seconds: int
) -> None:
    session, token = desk.log_in().session_id, desk.token()
    clock.advance(seconds)
    assert desk.lives(session) is (seconds > 0)  # a session of seven days; none from the future
    assert desk.reset(token, "n0t") == 403
    meanwhile, other = desk.log_in().session_id, desk.token()
    assert desk.lives(meanwhile)
    clock.advance(-seconds)
    assert not desk.lives(session)  # another took its place
    assert desk.lives(meanwhile) is (seconds < 0)
    assert desk.reset(other, "n0t") == 403
    assert desk.lives(desk.log_in().session_id)
    assert desk.reset(desk.token(), "n3w") == 200
    assert desk.log_in("n3w").status == 200


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_who_was_throttled_by_a_clock_that_was_a_day_off_waits_no_longer_than_others(
    desk: Desk, clock: Clock, seconds: int
) -> None:
    wrong = {"email": "bob@x.io", "password": "wrong"}
    clock.advance(seconds)
    while desk.ask_once("POST", "/sessions", **wrong).status == 401:
        pass
    clock.advance(-seconds)
    assert desk.log_in().status == 200
    guesses = 0
    while desk.ask_once("POST", "/sessions", **wrong).status == 401:
        guesses += 1
    assert guesses <= 20


# For long

SOAK = float(os.environ.get("SOAK_MINUTES", "0.07")) * 60
SPARE = 0.03  # of the memory, which allocators round up


@pytest.mark.once
def test_use_for_long_takes_no_more_memory_and_no_more_descriptors(warmed: Service) -> None:
    service, crowd = warmed, Crowd(size=3)
    began = time.monotonic()
    with crowd.using(service.url):
        time.sleep(SOAK / 10)
        memory, open_ones = resident(service), len(descriptors(service))
        while time.monotonic() < began + SOAK:
            assert ask(service, "GET", "/health", timeout=5) == 200
            assert sockets(service) <= CLIENTS + 2
            time.sleep(0.05)
        wanted = crowd.answered + 20
        assert awaited(lambda: crowd.answered >= wanted, 20)  # they are all still at it
        assert resident(service) <= memory * (1 + SPARE) + 2**20, (SEED, crowd.answered)
        assert len(descriptors(service)) <= open_ones + CLIENTS, (SEED, descriptors(service))
    assert awaited(lambda: sockets(service) == 1)
    crowd.check(service.url, most=20)
    assert_whole(service)
    assert service.end() == 0
    assert "sys_crash" not in service.log
