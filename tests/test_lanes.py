"""Who waits for whom, over real sockets: the lanes, the end of the service, and what waitress answers by itself."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import logging
import os
import queue
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
import requests
from waitress import wasyncore

import guard
import lanes
import passwords
from settings import Settings
from tests.conftest import Answer, Clock, Service
from tests.crowd import awaited

SECRET = "s3cret-of-a-client"


class Wire:
    """One connection, on which bytes are sent as they are."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=8)
        self.stream = self.socket.makefile("rb")

    def send(self, *asked: bytes) -> Wire:
        self.socket.sendall(b"".join(asked))
        return self

    def answer(self) -> Answer:
        status = self.stream.readline().decode().partition(" ")[2]
        assert status, "closed without an answer"
        headers = []
        while line := self.stream.readline().decode().strip():
            name, _, value = line.partition(": ")
            headers.append((name, value))
        return Answer(status, headers, self.stream.read(int(dict(headers)["Content-Length"])))

    def status(self) -> int:
        return self.answer().status

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def http(method: str, path: str, **form: str) -> bytes:
    body = urlencode(form)
    kind = f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {len(body)}\r\n" if form else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{kind}\r\n{body}".encode()


LARGE = os.urandom(2**20)  # more than a connection of the server in this process takes at once
GET = http("GET", "/")
SLOW = http("POST", "/slow", a="1")
LOGIN = http("POST", "/sessions", email="nobody@lanes", password="wrong")


@pytest.fixture
def dial() -> Iterator[Callable[..., Wire]]:
    """Open connections; they are closed after the test."""
    opened: list[Wire] = []

    def dial_one(address: tuple[str, int]) -> Wire:
        opened.append(Wire(address))
        return opened[-1]

    yield dial_one
    for wire in opened:
        wire.close()


class Inside:
    """The server in this process, with one thread a lane; ``POST /slow`` hashes until the gate opens."""

    def __init__(self, dial: Callable[..., Wire]) -> None:
        self._dial = dial
        self.gate = threading.Event()
        self.slow_ones: queue.SimpleQueue[None] = queue.SimpleQueue()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        self.address = listener.getsockname()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(listener, ready))
        self.thread.start()
        assert ready.wait(5)

    def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        self.lanes = lanes.Lanes({("POST", "/slow"), ("POST", "/slow-crash")}, cores=1, settings=Settings())
        self.server = lanes.Server(self._application, listener, self.lanes)
        ready.set()
        self.server.run()

    def _application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if "crash" in environ["PATH_INFO"]:
            raise RuntimeError(SECRET)
        if environ["PATH_INFO"] == "/slow":
            self.slow_ones.put(None)
            assert self.gate.wait(20)
        body = {"/large": LARGE}.get(environ["PATH_INFO"], environ["PATH_INFO"].encode())
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def dial(self) -> Wire:
        return self._dial(self.address)

    def hash_one(self) -> Wire:
        """Ask for a hash and wait until it is being made."""
        wire = self.dial().send(SLOW)
        self.slow_ones.get(timeout=5)
        return wire

    def queue_one(self) -> Wire:
        """Ask for a hash and wait until the server has read that: connections are served in their order."""
        wire = self.dial().send(SLOW)
        assert self.dial().send(GET).status() == 200
        return wire

    def stop(self) -> None:
        self.server.stop(signal.SIGUSR1, None)

    def task(self, service: Callable[[], object]) -> Any:
        """A stand-in for the connection of somebody who asks for a hash."""
        request = SimpleNamespace(error=None, command="POST", path="/slow", headers={})
        return SimpleNamespace(requests=[request], service=service, addr=("127.0.0.1", 0))

    def close(self) -> None:
        self.gate.set()
        self.stop()
        self.thread.join(10)
        idle = threading.Barrier(3)  # no worker uses what is closed now
        self.lanes._hashing_queue.put((float("inf"), self.task(idle.wait), ""))
        self.lanes._writing_queue.put(idle.wait)
        idle.wait(10)
        wasyncore.close_all(self.server._server._map)


@pytest.fixture
def inside(dial: Callable[..., Wire], monkeypatch: pytest.MonkeyPatch) -> Iterator[Inside]:
    monkeypatch.setattr(lanes, "WRITERS", 1)
    monkeypatch.setattr(logging.getLogger("waitress"), "handlers", [])
    one = Inside(dial)
    yield one
    one.close()


@pytest.fixture
def monotonic(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time as the lanes see it."""
    monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=clock))
    return clock


# Who waits


def test_a_quick_request_does_not_wait_for_hashes(inside: Inside) -> None:
    slow = [inside.hash_one(), *(inside.dial().send(SLOW) for _ in range(8))]
    assert inside.dial().send(GET).status() == 200
    inside.gate.set()
    assert {wire.status() for wire in slow} == {200}


def test_a_write_does_not_wait_for_hashes(inside: Inside) -> None:
    inside.hash_one()
    assert inside.dial().send(http("DELETE", "/sessions")).status() == 200


def test_only_the_named_method_of_a_path_waits_for_hashes(inside: Inside) -> None:
    inside.hash_one()
    assert inside.dial().send(http("GET", "/slow-crash")).status() == 500


def test_the_queue_for_hashing_is_bounded(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "HASHING_QUEUE", 2)
    accepted = [inside.hash_one(), inside.queue_one(), inside.queue_one()]
    refused = inside.dial().send(SLOW).answer()
    assert (refused.status, refused.json) == (503, {"message": "busy, try again later"})
    assert refused.headers["Retry-After"] == "5"
    assert refused.headers["Content-Type"] == "application/json"
    assert {(name.title(), value) for name, value in guard.SECURITY_HEADERS} <= refused.headers.items()
    inside.gate.set()
    assert [wire.status() for wire in accepted] == [200, 200, 200]


def test_a_full_queue_is_told_in_its_turn_to_who_asks_much_at_once(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = inside.dial().send(SLOW, SLOW)
    inside.slow_ones.get(timeout=5)
    monkeypatch.setattr(lanes, "HASHING_QUEUE", 0)
    inside.gate.set()
    assert [wire.status(), wire.status()] == [200, 503]


@pytest.mark.parametrize(("seconds", "status"), [(15.0, 200), (15.1, 503)])
def test_nobody_waits_for_a_hash_longer_than_15_seconds(
    inside: Inside, monotonic: Clock, seconds: float, status: int
) -> None:
    first, second = inside.hash_one(), inside.queue_one()
    monotonic.advance(seconds)
    inside.gate.set()
    assert first.status() == 200
    answer = second.answer()
    assert answer.status == status
    assert ("Retry-After" in answer.headers) == (status == 503)


def test_writes_that_nobody_waits_for_are_bounded(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "DEFERRED", 5)
    busy, written = threading.Barrier(2), queue.SimpleQueue[int]()

    def hold_up() -> None:
        busy.wait(5)
        inside.gate.wait(20)

    inside.lanes.defer(hold_up)
    busy.wait(5)
    for number in range(9):
        inside.lanes.defer(functools.partial(written.put, number))
    inside.gate.set()
    assert [written.get(timeout=5) for _ in range(5)] == [0, 1, 2, 3, 4]
    inside.lanes.defer(functools.partial(written.put, -1))
    assert written.get(timeout=5) == -1


@pytest.mark.once
@pytest.mark.slow
def test_the_welcome_stays_quick_while_logins_queue(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_BCRYPT_COST="10", AUTHSVC_THROTTLE="off")
    over = threading.Event()

    def timed(act: Callable[[], requests.Response]) -> float:
        began = time.perf_counter()
        assert act().status_code in (200, 401, 503)
        return time.perf_counter() - began

    def log_in_until_over() -> list[float]:
        took = []
        with requests.Session() as client:
            while not over.is_set():
                took.append(timed(lambda: client.post(f"{service.url}/sessions", data={"email": "a", "password": "b"})))
        return took

    with ThreadPoolExecutor(32) as pool, requests.Session() as client:
        logins = [pool.submit(log_in_until_over) for _ in range(32)]
        time.sleep(0.5)
        welcomes = [timed(lambda: client.get(service.url)) for _ in range(200)]
        over.set()
        took = [seconds for login in logins for seconds in login.result()]
    assert statistics.median(took) > 20 * statistics.median(welcomes)
    assert statistics.quantiles(welcomes, n=20)[-1] < statistics.median(took) / 4


ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to a thread only on Linux")


def threads_of(service: Service) -> list[tuple[int, int]]:
    """The niceness of each thread, and the ticks it has run: fields 19 and 14, proc(5)."""
    stats = [path.read_text() for path in Path(f"/proc/{service.process.pid}/task").glob("*/stat")]
    return [(int(values[16]), int(values[11])) for values in (stat.rpartition(")")[2].split() for stat in stats)]


@ONLY_LINUX
@pytest.mark.once
def test_as_many_threads_as_cores_hash_and_they_yield_to_the_others(service: Service) -> None:
    niceness = Counter(nice for nice, _ in threads_of(service))
    assert niceness[lanes.HASHING_NICENESS] == passwords.CORES
    assert niceness[os.getpriority(os.PRIO_PROCESS, 0)] >= 1 + lanes.WRITERS


# One connection


@pytest.mark.once
@pytest.mark.parametrize(
    ("asked", "statuses"),
    [
        ([GET, http("GET", "/profile"), GET], [200, 403, 200]),
        ([GET, LOGIN, http("GET", "/profile")], [200, 401, 403]),
        ([LOGIN, GET, LOGIN, http("DELETE", "/sessions"), http("GET", "/nowhere")], [401, 200, 401, 403, 404]),
        ([GET, http("GET", "/nowhere")] * 200, [200, 404] * 200),
    ],
    ids=["quick", "a login between", "all lanes", "four hundred"],
)
def test_what_is_asked_at_once_on_one_connection_is_answered_in_order(
    service: Service, dial: Callable[..., Wire], asked: list[bytes], statuses: list[int]
) -> None:
    wire = dial(service.address).send(*asked)
    assert [wire.status() for _ in asked] == statuses


def test_who_asks_much_at_once_is_served_beside_the_others(inside: Inside) -> None:
    wire = inside.dial().send(GET, http("GET", "/slow"))
    inside.slow_ones.get(timeout=5)
    assert inside.dial().send(GET).status() == 200
    inside.gate.set()
    assert [wire.status(), wire.status()] == [200, 200]


def test_a_large_answer_arrives_whole_however_slowly_it_is_read(inside: Inside) -> None:
    wire = inside.dial().send(http("GET", "/large"))
    assert inside.dial().send(GET).status() == 200
    assert wire.answer().body == LARGE
    assert wire.send(GET).status() == 200


def test_the_answers_of_one_moment_are_sent_to_each_its_own(inside: Inside) -> None:
    wires = [inside.dial() for _ in range(100)]
    for place in "here", "there":
        for number, wire in enumerate(wires):
            wire.send(http("GET", f"/{place}/{number}"))
        assert [wire.answer().body.decode() for wire in wires] == [f"/{place}/{number}" for number in range(100)]


def test_a_connection_that_fails_while_it_is_answered_is_closed(
    inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*_: object) -> int:
        raise OSError(errno.ENOBUFS, "no buffer space")

    wire = inside.dial()
    with monkeypatch.context() as patched:
        patched.setattr(lanes.Channel, "send", send)
        assert wire.send(GET).stream.read() == b""
    assert inside.dial().send(GET).status() == 200


@pytest.mark.once
def test_a_request_may_arrive_byte_by_byte(service: Service, dial: Callable[..., Wire]) -> None:
    wire = dial(service.address)
    for byte in LOGIN:
        wire.send(bytes([byte]))
    assert wire.status() == 401


def test_a_client_that_leaves_harms_nobody(inside: Inside, capsys: pytest.CaptureFixture[str]) -> None:
    inside.hash_one().close()
    inside.queue_one().close()
    inside.gate.set()
    assert inside.hash_one().status() == 200
    assert "sys_crash" not in capsys.readouterr().err


# A database that somebody else has locked


@contextmanager
def held_by_another_service(database: str) -> Iterator[None]:
    with Path(database + ".lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def held_by_another_program(database: str) -> Iterator[None]:
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


def last_seen(database: str) -> int:
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    (seen,) = connection.execute("SELECT max(last_seen_at) FROM sessions").fetchone()
    connection.close()
    return int(seen)


@pytest.fixture
def stale(start: Callable[..., Service]) -> tuple[Service, dict[str, str]]:
    """A service and the cookie of a session whose next use must be recorded."""
    service, form = start(), {"email": "stale@lanes", "password": "b4l0u"}
    assert requests.post(f"{service.url}/users", data=form, timeout=5).status_code == 200
    cookie = requests.post(f"{service.url}/sessions", data=form, timeout=5).cookies["session_id"]
    connection = sqlite3.connect(service.environ["AUTHSVC_DATABASE"])
    with connection:
        connection.execute("UPDATE sessions SET last_seen_at = last_seen_at - 120")
    connection.close()
    return service, {"session_id": cookie}


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "held", [held_by_another_service, pytest.param(held_by_another_program, marks=pytest.mark.slow)]
)
def test_only_who_writes_waits_for_a_locked_database(
    stale: tuple[Service, dict[str, str]], held: Callable[[str], Any]
) -> None:
    service, cookies = stale
    database = service.environ["AUTHSVC_DATABASE"]
    before = last_seen(database)
    with ThreadPoolExecutor(1) as pool:
        with held(database):
            assert requests.get(f"{service.url}/profile", cookies=cookies, timeout=1).status_code == 200
            form = {"email": "stale@lanes"}
            writing = pool.submit(requests.post, f"{service.url}/reset_password", data=form, timeout=10)
            for _ in range(5):
                assert requests.get(f"{service.url}/profile", cookies=cookies, timeout=1).status_code == 200
            assert last_seen(database) == before
            assert not writing.done()
        assert writing.result().status_code == 200
    deadline = time.monotonic() + 5
    while last_seen(database) == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert last_seen(database) >= before + 120


@pytest.mark.sqlite
@pytest.mark.slow
def test_who_writes_is_told_that_the_database_is_locked_whatever_else_waits_for_it(
    stale: tuple[Service, dict[str, str]],
) -> None:
    service, cookies = stale
    with held_by_another_service(service.environ["AUTHSVC_DATABASE"]):
        for _ in range(8):
            assert requests.get(f"{service.url}/profile", cookies=cookies, timeout=1).status_code == 200
        answer = requests.delete(f"{service.url}/sessions", cookies=cookies, timeout=12)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert requests.get(f"{service.url}/profile", cookies=cookies, timeout=1).status_code == 200


# Errors


@pytest.mark.parametrize("path", ["/crash", "/slow-crash"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_exception_is_answered_and_ends_no_thread(
    inside: Inside, capsys: pytest.CaptureFixture[str], method: str, path: str
) -> None:
    for _ in range(3):
        answer = inside.dial().send(http(method, path)).answer()
        assert (answer.status, answer.json) == (500, {"message": "internal error"})
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["error"]) for line in logged] == [("sys_crash", "RuntimeError")] * 3
    assert SECRET not in str(logged)


def test_an_exception_in_a_task_ends_no_worker(inside: Inside, capsys: pytest.CaptureFixture[str]) -> None:
    def crash() -> None:
        raise RuntimeError(SECRET)

    inside.lanes.defer(crash)
    inside.lanes.add_task(inside.task(crash))
    inside.gate.set()
    assert inside.dial().send(SLOW).status() == 200
    assert inside.dial().send(http("POST", "/")).status() == 200
    assert [json.loads(line)["error"] for line in capsys.readouterr().err.splitlines()] == ["RuntimeError"] * 2


@pytest.mark.once
@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (f"{SECRET}\r\n\r\n", 400),
        (f"get /{SECRET} HTTP/1.1\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: x\r\nbad header: {SECRET}\r\n\r\n", 400),
        (f"GET / HTTP/1.1\r\nHost: x\r\nX: a\rb{SECRET}\r\n\r\n", 400),
        (f"GET http://[{SECRET} HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {SECRET}\r\n\r\n", 400),
        (f"POST / HTTP/1.1\r\nHost: x\r\nX: {SECRET}\r\nContent-Length: {'9' * 5000}\r\n\r\n", 400),
        (f"POST /users HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{SECRET}\r\n", 400),
        (f"POST /{SECRET} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", 413),
        (f"POST /{SECRET} HTTP/1.1\r\nHost: x\r\nContent-Length: 16385\r\n\r\n", 413),
        (f"POST /{SECRET} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 16385\r\n\r\n", 413),
        (f"GET /{SECRET} HTTP/1.1\r\nHost: x\r\nX: {'a' * 17 * 1024}\r\n\r\n", 431),
        (f"GET / HTTP/1.1\r\nHost: x\r\nX: {SECRET * 1024}", 431),
        (f"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {SECRET}\r\n\r\n", 501),
    ],
    ids=[
        "no request line",
        "method in small letters",
        "space in a header name",
        "bare CR",
        "no address",
        "length of letters",
        "length of 5000 digits",
        "chunk size of letters",
        "a gigabyte",
        "one byte too many",
        "too many announced",
        "17 KiB header",
        "endless header",
        "unknown transfer encoding",
    ],
)
def test_what_is_no_request_is_refused_as_everything_else(
    service: Service, dial: Callable[..., Wire], asked: str, status: int
) -> None:
    answer = dial(service.address).send(asked.encode()).answer()
    assert answer.status == status
    assert list(answer.json) == ["message"]
    assert answer.headers["Content-Type"] == "application/json"
    assert {(name.title(), value) for name, value in guard.SECURITY_HEADERS} <= answer.headers.items()
    assert answer.headers["Connection"] == "close"
    assert "X-Request-Id" in answer.headers
    assert SECRET not in f"{answer.headers} {answer.body!r} {service.log}"


@pytest.mark.once
def test_a_body_of_the_largest_size_is_read(service: Service) -> None:
    form = "email=a&password=".ljust(lanes.LARGEST_BODY, "x")
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert requests.post(f"{service.url}/sessions", data=form, headers=headers, timeout=5).status_code == 401
    assert requests.post(f"{service.url}/sessions", data=form + "x", headers=headers, timeout=5).status_code == 413


TOO_LARGE = b"x" * 5_000_000


@pytest.mark.once
@pytest.mark.parametrize("chunked", [False, True])
def test_requests_sees_that_a_body_is_too_large(service: Service, chunked: bool) -> None:
    for _ in range(5):
        body: Any = iter([TOO_LARGE[:65_536]] * 76) if chunked else TOO_LARGE
        answer = requests.post(f"{service.url}/users", data=body, timeout=5)
        assert (answer.status_code, answer.json()) == (413, {"message": "request body too large"})


@pytest.mark.once
@pytest.mark.parametrize("arguments", [[], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect:"]])
def test_curl_sees_that_a_body_is_too_large(service: Service, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "body").write_bytes(TOO_LARGE)
    for _ in range(5):
        command = ["curl", "-sS", *arguments, "--data-binary", f"@{tmp_path}/body", f"{service.url}/users"]
        assert json.loads(subprocess.check_output(command)) == {"message": "request body too large"}


@pytest.mark.once
def test_who_is_refused_may_finish_sending(service: Service, dial: Callable[..., Wire]) -> None:
    wire = dial(service.address)
    assert (
        wire.send(b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x" * 20_000).status() == 413
    )
    wire.send(b"x" * 980_000)
    wire.socket.shutdown(socket.SHUT_WR)
    assert wire.stream.read() == b""  # else a reset, which can overtake the answer


def test_who_is_refused_may_not_send_for_ever(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LARGEST_REST", 100_000)
    wire = inside.dial().send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
    assert wire.status() == 413
    with pytest.raises(ConnectionError):
        wire.send(TOO_LARGE * 10)


@pytest.mark.once
def test_who_asks_before_it_sends_a_body_is_told_to_go_on(service: Service, dial: Callable[..., Wire]) -> None:
    head, _, body = LOGIN.partition(b"\r\n\r\n")
    wire = dial(service.address).send(head, b"\r\nExpect: 100-continue\r\n\r\n")
    assert wire.stream.readline() + wire.stream.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert wire.send(body).status() == 401


@pytest.mark.once
def test_who_asks_before_it_sends_a_body_is_told_in_its_turn(service: Service, dial: Callable[..., Wire]) -> None:
    head, _, body = LOGIN.partition(b"\r\n\r\n")
    wire = dial(service.address).send(GET, head, b"\r\nExpect: 100-continue\r\n\r\n")
    assert wire.status() == 200
    assert wire.stream.readline() + wire.stream.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert wire.send(body).status() == 401


# The end


def test_the_end_refuses_who_waits_and_answers_who_is_served(inside: Inside) -> None:
    served, waiting, idle = inside.hash_one(), inside.queue_one(), inside.dial()
    assert idle.send(GET).status() == 200
    inside.stop()
    refused = waiting.answer()
    assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
    with pytest.raises(ConnectionRefusedError):
        inside.dial()
    assert idle.send(GET, SLOW).status() == 200
    assert idle.status() == 503
    inside.gate.set()
    assert served.status() == 200
    inside.thread.join(5)
    assert not inside.thread.is_alive()


def test_the_end_comes_after_8_seconds_whatever_is_being_served(inside: Inside, monotonic: Clock) -> None:
    inside.hash_one()
    waiting, idle = inside.queue_one(), inside.dial()
    assert idle.send(GET).status() == 200
    inside.stop()
    assert waiting.status() == 503
    monotonic.advance(7.9)
    assert idle.send(GET).status() == 200
    monotonic.advance(8)
    inside.thread.join(5)
    assert not inside.thread.is_alive()


def test_the_end_waits_for_the_writes_that_nobody_waits_for(inside: Inside) -> None:
    begun, written = threading.Event(), threading.Event()
    inside.lanes.defer(begun.set)
    inside.lanes.defer(inside.gate.wait)
    inside.lanes.defer(written.set)
    assert begun.wait(5)
    inside.stop()
    inside.thread.join(0.3)
    assert inside.thread.is_alive()
    inside.gate.set()
    inside.thread.join(5)
    assert not inside.thread.is_alive()
    assert written.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_an_idle_service_ends_at_once(start: Callable[..., Service], dial: Callable[..., Wire], number: int) -> None:
    service = start()
    assert dial(service.address).send(GET).status() == 200  # and stays connected
    began = time.monotonic()
    assert service.end(number) == 0
    assert time.monotonic() - began < 2


def accepts(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


@ONLY_LINUX
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_busy_service_without_losing_an_answer(
    start: Callable[..., Service], dial: Callable[..., Wire], number: int
) -> None:
    service = start(AUTHSVC_BCRYPT_COST="14")  # a second each, to be refused a connection meanwhile
    wires = [
        dial(service.address).send(http("POST", "/users", email=f"{index}@lanes", password="b4l0u"))
        for index in range(20)
    ]
    assert dial(service.address).send(GET).status() == 200
    assert awaited(lambda: any(nice == lanes.HASHING_NICENESS and ticks > 2 for nice, ticks in threads_of(service)))
    service.process.send_signal(number)
    began = time.monotonic()
    while accepts(service.address) and time.monotonic() < began + 5:
        pass
    assert not accepts(service.address)
    assert service.process.poll() is None
    statuses = Counter(wire.status() for wire in wires)
    assert statuses.keys() == {200, 503}
    assert statuses[200] <= passwords.CORES
    assert service.process.wait(10) == 0
    assert time.monotonic() - began < 10


@pytest.mark.sqlite
@pytest.mark.slow
def test_a_locked_database_does_not_hold_up_the_end(stale: tuple[Service, dict[str, str]]) -> None:
    service, cookies = stale
    with held_by_another_service(service.environ["AUTHSVC_DATABASE"]):
        for _ in range(5):
            assert requests.get(f"{service.url}/profile", cookies=cookies, timeout=1).status_code == 200
        began = time.monotonic()
        assert service.end() == 0
        assert time.monotonic() - began < 10
    assert all(line.startswith("{") for line in service.log.splitlines())
