"""The server over real sockets: scheduling, connections, refusals by the server itself, and shutdown."""

from __future__ import annotations

import errno
import fcntl
import functools
import io
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

import web.server
from credentials import passwords
from settings import Settings
from tests.conftest import HERE, Answer, Clock, Service
from tests.crowd import awaited
from web import responses
from web.forms import MAX_BODY_BYTES

SECRET = "s3cret-of-a-client"
TIMEOUT = 20  # seconds until a test gives up waiting; a busy machine needs some of them


class Connection:
    """A connection to the server that sends bytes unchanged."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=TIMEOUT)
        self.stream = self.socket.makefile("rb")

    def send(self, *requests: bytes) -> Connection:
        self.socket.sendall(b"".join(requests))
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


LARGE = os.urandom(2**20)  # more than the send buffer of LocalServer holds
GET = http("GET", "/")
SLOW = http("POST", "/slow", a="1")
LOGIN = http("POST", "/sessions", email="nobody@x.io", password="wrong")


@pytest.fixture
def dial() -> Iterator[Callable[..., Connection]]:
    """Return a function that opens a connection. The connections are closed after the test."""
    opened: list[Connection] = []

    def dial_one(address: tuple[str, int]) -> Connection:
        opened.append(Connection(address))
        return opened[-1]

    yield dial_one
    for connection in opened:
        connection.close()


def accepts(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


class LocalServer:
    """The server in this process, with one thread of each kind. Requests to ``/slow`` run until ``release`` is set."""

    def __init__(self, dial: Callable[..., Connection]) -> None:
        self._dial = dial
        self.release = threading.Event()
        self.running: queue.SimpleQueue[bytes] = queue.SimpleQueue()  # the bodies of requests to /slow, as they run
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        self.address = listener.getsockname()
        ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(listener, ready))
        self.thread.start()
        assert ready.wait(TIMEOUT)

    def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        self.dispatcher = web.server.Dispatcher(
            {("POST", "/slow"), ("POST", "/slow-crash")}, cores=1, settings=Settings(), rank=self._rank
        )
        self._server = web.server.Server(self._application, listener, self.dispatcher)
        ready.set()
        self._server.run()

    def _rank(self, environ: dict[str, Any]) -> tuple[bool, str]:
        environ["test.body"] = environ["wsgi.input"].read()
        if environ["test.body"] == b"rank=crash":
            raise RuntimeError(SECRET)
        return environ["test.body"] == b"rank=first", environ["test.body"].decode()

    def _application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if "crash" in environ["PATH_INFO"]:
            raise RuntimeError(SECRET)
        if environ["PATH_INFO"] == "/slow":
            form = environ["wsgi.input"].read()
            assert form == environ.get("test.body", form)  # what was read to rank the request can be read again
            self.running.put(form)
            assert self.release.wait(TIMEOUT)
        body = {"/large": LARGE}.get(environ["PATH_INFO"], environ["PATH_INFO"].encode())
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def dial(self) -> Connection:
        return self._dial(self.address)

    def hash_one(self) -> Connection:
        """Request a hash, and wait until it runs."""
        connection = self.dial().send(SLOW)
        self.running.get(timeout=TIMEOUT)
        return connection

    def queue_one(self, request: bytes = SLOW) -> Connection:
        """Request a hash behind a running one, and wait until the server has queued it."""
        connection = self.dial().send(request)
        assert self.dial().send(GET).status() == 200  # the server reads its connections in their order
        return connection

    def stop(self) -> None:
        self._server.stop(signal.SIGUSR1, None)

    def task(self, service: Callable[[], object]) -> Any:
        """Return a stand-in for a connection that requested a hash."""
        environ = {"wsgi.input": io.BytesIO()}
        request = SimpleNamespace(error=None, command="POST", path="/slow", version="1.1", environ=environ)
        return SimpleNamespace(requests=[request], service=service, addr=("127.0.0.1", 0))

    def close(self) -> None:
        self.release.set()
        self.stop()
        self.thread.join(TIMEOUT)
        idle = threading.Barrier(3)  # past it, no worker uses the connections that are closed next
        self.dispatcher._hashing_queue.class_limit = 1  # a test may have set it to 0
        item = (float("inf"), self.task(idle.wait), "unknown")
        for waiting in self.dispatcher._hashing_queue, self.dispatcher._writing_queue:
            waiting.put(item, ("",) * 4, preferred=False, limited=False)
        idle.wait(TIMEOUT)
        wasyncore.close_all(self._server._server._map)


@pytest.fixture
def server(dial: Callable[..., Connection], monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    monkeypatch.setattr(web.server, "WRITERS", 1)
    monkeypatch.setattr(web.server, "LAST_REQUESTS", 0.0)  # most tests leave connections open
    monkeypatch.setattr(web.server, "REFUSAL_DELAY", 0.0)
    monkeypatch.setattr(logging.getLogger("waitress"), "handlers", [])
    one = LocalServer(dial)
    yield one
    one.close()


@pytest.fixture
def monotonic(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return the clock that the server reads."""
    monkeypatch.setattr(web.server, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep, time=time.time))
    return clock


# Scheduling


def test_a_request_is_ranked_only_if_all_threads_hash(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[object] = []

    def rank(environ: object) -> tuple[bool, str]:
        ranked.append(environ)
        return False, ""

    monkeypatch.setattr(server.dispatcher, "_rank", rank)
    assert awaited(server.dispatcher._hashing_queue.serves_at_once)
    server.hash_one()
    assert not ranked
    server.queue_one()
    assert len(ranked) == 1
    server.release.set()


def test_a_fast_request_does_not_wait_for_hashes(server: LocalServer) -> None:
    slow = [server.hash_one(), *(server.dial().send(SLOW) for _ in range(8))]
    assert server.dial().send(GET).status() == 200
    server.release.set()
    assert {connection.status() for connection in slow} == {200}


@pytest.fixture
def without_niceness(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)


def test_hashes_are_made_where_the_system_refuses_a_niceness(without_niceness: None, server: LocalServer) -> None:
    connection = server.hash_one()
    server.release.set()
    assert connection.status() == 200


def test_a_read_that_may_take_long_delays_no_other(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.server, "SLOW_READS", {"/slow"})
    slow = server.dial().send(http("GET", "/slow"))
    server.running.get(timeout=TIMEOUT)
    assert server.dial().send(GET).status() == 200
    server.release.set()
    assert slow.status() == 200


def test_requests_that_wait_for_a_hash_are_counted_by_who_asks(server: LocalServer) -> None:
    assert awaited(server.dispatcher._hashing_queue.serves_at_once)
    server.hash_one()
    first = http("POST", "/slow", rank="first")
    waiting = [server.queue_one(request) for request in (first, first, SLOW)]
    assert server.dispatcher.waiting == {"owner": 2, "stranger": 1}
    server.release.set()
    assert {connection.status() for connection in waiting} == {200}
    assert server.dispatcher.waiting == {"owner": 0, "stranger": 0}
    waits = {who: histogram.read()[0][-1][1] for who, histogram in server.dispatcher.waits.items()}
    assert waits == {"owner": 2, "stranger": 1, "unknown": 1}


def test_requests_that_the_server_refuses_are_counted(server: LocalServer) -> None:
    counted: list[tuple[Any, ...]] = []
    server.dispatcher.observe = lambda *request: counted.append(request)
    server.dispatcher._hashing_queue.class_limit = 0
    server.hash_one()
    assert server.dial().send(SLOW).status() == 503
    assert server.dial().send(b"GET / HTTP/1.1\r\nHost: x\r\n\0: x\r\n\r\n").status() == 400
    server.release.set()
    assert counted[0] == ("POST", "/slow", "503 Service Unavailable", 0.0)
    assert counted[1][2:] == ("400 Bad Request", 0.0)


def test_a_write_does_not_wait_for_hashes(server: LocalServer) -> None:
    server.hash_one()
    assert server.dial().send(http("DELETE", "/sessions")).status() == 200


def test_another_method_of_a_hashing_path_does_not_wait_for_hashes(server: LocalServer) -> None:
    server.hash_one()
    assert server.dial().send(http("GET", "/slow-crash")).status() == 500


def test_the_hashing_queue_is_bounded(server: LocalServer) -> None:
    server.dispatcher._hashing_queue.class_limit = 2
    accepted = [server.hash_one(), server.queue_one(), server.queue_one()]
    refused = server.dial().send(SLOW).answer()
    assert (refused.status, refused.json) == (503, {"message": "busy, try again later"})
    assert refused.headers["Retry-After"] == "5"
    assert refused.headers["Content-Type"] == "application/json"
    assert {(name.title(), value) for name, value in responses.SECURITY_HEADERS} <= refused.headers.items()
    server.release.set()
    assert [connection.status() for connection in accepted] == [200, 200, 200]


def test_a_refusal_for_want_of_a_place_is_delayed(
    server: LocalServer, monotonic: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.server, "REFUSAL_DELAY", 1.0)
    monkeypatch.setattr(web.server, "MAX_DELAYED", 1)
    server.hash_one()
    server.dispatcher._hashing_queue.class_limit = 0
    oldest, refused = server.queue_one(), server.queue_one()
    assert oldest.status() == 503  # as one more is delayed
    refused.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        refused.socket.recv(1)
    refused.socket.settimeout(TIMEOUT)
    monotonic.advance(1.0)
    assert server.dial().send(GET).status() == 200
    assert refused.status() == 503


def test_a_delayed_refusal_does_not_delay_the_end(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.server, "REFUSAL_DELAY", 60.0)
    server.hash_one()
    server.dispatcher._hashing_queue.class_limit = 0
    refused = server.queue_one()
    server.release.set()
    server.stop()
    assert refused.status() == 503


@pytest.mark.slow
def test_a_development_service_lets_128_requests_wait_for_a_hash(server: LocalServer) -> None:
    accepted = [server.hash_one(), *(server.dial().send(SLOW) for _ in range(128))]
    assert server.queue_one().status() == 503
    server.release.set()
    assert {connection.status() for connection in accepted} == {200}


def test_a_preferred_request_overtakes_those_that_wait(server: LocalServer) -> None:
    served = [server.hash_one(), server.queue_one(), server.queue_one(http("POST", "/slow", rank="first"))]
    server.release.set()
    assert [connection.status() for connection in served] == [200, 200, 200]
    assert [server.running.get(timeout=TIMEOUT) for _ in range(2)] == [b"rank=first", b"a=1"]


def test_the_accounts_of_a_client_take_turns(server: LocalServer) -> None:
    one, other = http("POST", "/slow", email="one"), http("POST", "/slow", email="other")
    served = [server.hash_one(), *(server.queue_one(request) for request in (one, one, other))]
    server.release.set()
    assert [connection.status() for connection in served] == [200] * 4
    assert [server.running.get(timeout=TIMEOUT) for _ in range(3)] == [b"email=one", b"email=other", b"email=one"]


def test_a_request_that_cannot_be_ranked_is_served_like_those_of_strangers(
    server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    crash = http("POST", "/slow", rank="crash")
    served = [server.hash_one(), server.queue_one(crash), server.queue_one(http("POST", "/slow", rank="first"))]
    server.release.set()
    assert [connection.status() for connection in served] == [200, 200, 200]
    assert [server.running.get(timeout=TIMEOUT) for _ in range(2)] == [b"rank=first", b"rank=crash"]
    logged = capsys.readouterr().err
    assert [(json.loads(line)["event"], json.loads(line)["error"]) for line in logged.splitlines()] == [
        ("sys_crash", "RuntimeError")
    ]
    assert SECRET not in logged


def test_a_full_queue_refuses_a_pipelined_request_in_its_turn(server: LocalServer) -> None:
    server.hash_one()
    server.dispatcher._hashing_queue.class_limit = 0
    connection = server.dial().send(http("PUT", "/"), SLOW)
    assert [connection.status(), connection.status()] == [200, 503]


def test_requests_that_write_wait_in_a_fair_and_bounded_queue(server: LocalServer, monotonic: Clock) -> None:
    write, first = http("PUT", "/slow", a="1"), http("PUT", "/slow", rank="first")
    accepted = [server.dial().send(write)]
    server.running.get(timeout=TIMEOUT)
    accepted += [server.queue_one(write), server.queue_one(first), server.queue_one(write)]
    server.dispatcher._writing_queue.class_limit = 2
    assert server.queue_one(write).status() == 503
    hashed = server.dial().send(http("POST", "/slow", hash="1"))  # it does not wait for them
    assert server.running.get(timeout=TIMEOUT) == b"hash=1"
    server.release.set()
    assert [connection.status() for connection in (*accepted, hashed)] == [200] * 5
    assert [server.running.get(timeout=TIMEOUT) for _ in range(3)] == [b"rank=first", b"a=1", b"a=1"]


@pytest.mark.slow
def test_a_request_waits_for_a_writer_for_15_seconds_at_most(server: LocalServer, monotonic: Clock) -> None:
    write = http("PUT", "/slow", a="1")
    running = server.dial().send(write)
    server.running.get(timeout=TIMEOUT)
    waiting = server.queue_one(write)
    monotonic.advance(web.server.MAX_WAIT + 1)
    assert waiting.status() == 503
    server.release.set()
    assert running.status() == 200


@pytest.mark.parametrize(("seconds", "status"), [(15.0, 200), (15.1, 503)])
def test_a_request_waits_for_a_hash_for_15_seconds_at_most(
    server: LocalServer, monotonic: Clock, seconds: float, status: int
) -> None:
    first, second = server.hash_one(), server.queue_one()
    monotonic.advance(seconds)
    server.release.set()
    assert first.status() == 200
    answer = second.answer()
    assert answer.status == status
    assert ("Retry-After" in answer.headers) == (status == 503)


@pytest.mark.slow
def test_a_request_that_has_waited_too_long_is_answered_while_all_threads_hash(
    server: LocalServer, monotonic: Clock
) -> None:
    first, second = server.hash_one(), server.queue_one()
    monotonic.advance(web.server.MAX_WAIT + 1)
    answer = second.answer()
    assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
    server.release.set()
    assert first.status() == 200


def test_the_number_of_background_writes_is_bounded(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.server, "MAX_BACKGROUND_WRITES", 5)
    busy, written = threading.Barrier(2), queue.SimpleQueue[int]()

    def block() -> None:
        busy.wait(TIMEOUT)
        server.release.wait(TIMEOUT)

    server.dispatcher.run_in_background(block)
    server.dispatcher.start_background()
    busy.wait(TIMEOUT)
    for number in range(9):
        server.dispatcher.run_in_background(functools.partial(written.put, number))
    server.release.set()
    assert [written.get(timeout=TIMEOUT) for _ in range(5)] == [0, 1, 2, 3, 4]
    server.dispatcher.run_in_background(functools.partial(written.put, -1))
    server.dispatcher.start_background()
    assert written.get(timeout=TIMEOUT) == -1


@pytest.mark.slow
@pytest.mark.timing
def test_fast_requests_stay_fast_while_logins_queue(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_BCRYPT_COST="10", AUTHSVC_THROTTLE="off")
    stopping, first_answer = threading.Event(), threading.Event()

    def seconds(send: Callable[[], requests.Response]) -> float:
        began = time.perf_counter()
        assert send().status_code in (200, 401, 503)
        return time.perf_counter() - began

    def log_in_until_stopped() -> list[float]:
        times = []
        with requests.Session() as client:
            form = {"email": "a", "password": "b"}
            while not stopping.is_set():
                times.append(seconds(lambda: client.post(f"{service.url}/sessions", data=form, timeout=TIMEOUT)))
                first_answer.set()  # by now the other clients wait in the queue
        return times

    with ThreadPoolExecutor(16) as pool, requests.Session() as client:
        logins = [pool.submit(log_in_until_stopped) for _ in range(16)]
        assert first_answer.wait(TIMEOUT)
        welcomes = [seconds(lambda: client.get(service.url, timeout=TIMEOUT)) for _ in range(100)]
        stopping.set()
        times = [each for login in logins for each in login.result()]
    assert statistics.median(times) > 20 * statistics.median(welcomes)
    assert statistics.quantiles(welcomes, n=20)[-1] < statistics.median(times) / 4


ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to a thread only on Linux")


def threads_of(service: Service) -> list[tuple[int, int]]:
    """Return the niceness of each thread and the clock ticks that it ran in user mode: fields 19 and 14 of proc(5)."""
    stats = [path.read_text() for path in Path(f"/proc/{service.process.pid}/task").glob("*/stat")]
    return [(int(values[16]), int(values[11])) for values in (stat.rpartition(")")[2].split() for stat in stats)]


@ONLY_LINUX
def test_one_nice_thread_per_core_hashes(service: Service) -> None:
    def hashing_threads() -> int:
        return sum(nice == web.server.HASHING_NICENESS for nice, _ in threads_of(service))

    # A thread lowers its own priority, perhaps a moment after the service has started.
    assert awaited(lambda: hashing_threads() >= passwords.CORES, TIMEOUT)
    assert hashing_threads() == passwords.CORES
    others = Counter(nice for nice, _ in threads_of(service))[os.getpriority(os.PRIO_PROCESS, 0)]
    assert others >= 1 + web.server.WRITERS


# Connections


@pytest.mark.parametrize(
    ("pipelined", "statuses"),
    [
        ([GET, http("GET", "/profile"), GET], [200, 403, 200]),
        ([GET, LOGIN, http("GET", "/profile")], [200, 401, 403]),
        ([LOGIN, GET, LOGIN, http("DELETE", "/sessions"), http("GET", "/nowhere")], [401, 200, 401, 403, 404]),
        ([GET, http("GET", "/nowhere")] * 200, [200, 404] * 200),
    ],
    ids=["fast ones", "a login in between", "every kind of thread", "four hundred"],
)
def test_pipelined_requests_are_answered_in_order(
    service: Service, dial: Callable[..., Connection], pipelined: list[bytes], statuses: list[int]
) -> None:
    connection = dial(service.address).send(*pipelined)
    assert [connection.status() for _ in pipelined] == statuses


def test_a_pipelining_client_does_not_block_the_others(server: LocalServer) -> None:
    connection = server.dial().send(GET * 200, SLOW)
    server.running.get(timeout=TIMEOUT)
    assert server.dial().send(GET).status() == 200
    server.release.set()
    assert [connection.status() for _ in range(201)] == [200] * 201


def test_a_large_answer_arrives_whole_at_a_slow_reader(server: LocalServer) -> None:
    connection = server.dial().send(http("GET", "/large"))
    assert server.dial().send(GET).status() == 200
    assert connection.answer().body == LARGE
    assert connection.send(GET).status() == 200


def test_simultaneous_answers_reach_the_right_clients(server: LocalServer) -> None:
    connections = [server.dial() for _ in range(100)]
    for round_name in "first", "second":
        for number, connection in enumerate(connections):
            connection.send(http("GET", f"/{round_name}/{number}"))
        assert [connection.answer().body.decode() for connection in connections] == [
            f"/{round_name}/{number}" for number in range(100)
        ]


def test_the_io_thread_sleeps_while_another_thread_sends_an_answer(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterations, run, send = [], web.server.Server._run_loop_once, web.server.Channel.send

    def run_counted(one: web.server.Server, timeout: float) -> None:
        iterations.append(timeout)
        run(one, timeout)

    sending = threading.Event()

    def send_slowly(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread() is not server.thread:
            sending.set()
            time.sleep(0.2)
        return send(*arguments, **options)

    connection, other = server.dial(), server.dial()
    monkeypatch.setattr(web.server.Server, "_run_loop_once", run_counted)
    monkeypatch.setattr(web.server.Channel, "send", send_slowly)
    connection.send(http("DELETE", "/sessions"))
    assert sending.wait(TIMEOUT)
    assert other.send(GET).status() == 200  # wakes the I/O thread
    assert connection.status() == 200
    assert len(iterations) < 20


def test_a_connection_that_fails_during_an_answer_is_closed(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(*_: object) -> int:
        raise OSError(errno.ENOBUFS, "no buffer space")

    connection = server.dial()
    with monkeypatch.context() as patched:
        patched.setattr(web.server.Channel, "send", send)
        assert connection.send(GET).stream.read() == b""
    assert server.dial().send(GET).status() == 200


def test_a_request_may_arrive_byte_by_byte(service: Service, dial: Callable[..., Connection]) -> None:
    connection = dial(service.address)
    for byte in LOGIN:
        connection.send(bytes([byte]))
    assert connection.status() == 401


def test_a_client_that_disconnects_affects_no_other(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.hash_one().close()
    server.queue_one().close()
    server.release.set()
    assert server.hash_one().status() == 200
    assert "sys_crash" not in capsys.readouterr().err


# A locked database


@contextmanager
def locked_by_another_service(database: str) -> Iterator[None]:
    with Path(database + ".lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_by_another_program(database: str) -> Iterator[None]:
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


# The program with shorter timeouts. Waiting for the real ones would show nothing more.
IMPATIENT = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import authsvc, engines.sqlite, web.server
engines.sqlite.BUSY_TIMEOUT = 0.5
web.server.SHUTDOWN_TIMEOUT = 0.5
sys.exit(authsvc.main())
"""


class ImpatientService(Service):
    """A service that waits half a second for a lock and for the end of its requests."""

    program = (sys.executable, "-c", IMPATIENT)


@pytest.fixture
def stale(start: Callable[..., Service]) -> tuple[Service, dict[str, str]]:
    """Return a service and the cookie of a session. The next request with it starts a background write."""
    service = start()
    return service, stale_session(service)


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[tuple[Service, dict[str, str]]]:
    """Return the same as ``stale``, with short timeouts."""
    service = ImpatientService(tmp_path)
    yield service, stale_session(service)
    service.end()


def stale_session(service: Service) -> dict[str, str]:
    """Return the cookie of a session that was last used two minutes ago."""
    form = {"email": "stale@x.io", "password": "b4l0u"}
    assert requests.post(f"{service.url}/users", data=form, timeout=TIMEOUT).status_code == 200
    cookie = requests.post(f"{service.url}/sessions", data=form, timeout=TIMEOUT).cookies["session_id"]
    connection = sqlite3.connect(service.environ["AUTHSVC_DATABASE"])
    with connection:
        connection.execute("UPDATE sessions SET last_seen_at = last_seen_at - 120")
    connection.close()
    return {"session_id": cookie}


def profile_status(service: Service, cookies: dict[str, str]) -> int:
    # A write waits for a lock for 5 seconds, so a request that waited as well would not be answered in time.
    return requests.get(f"{service.url}/profile", cookies=cookies, timeout=4).status_code


@pytest.mark.parametrize("locked", [locked_by_another_service, locked_by_another_program])
def test_only_writes_wait_for_a_locked_database(
    stale: tuple[Service, dict[str, str]], locked: Callable[[str], Any]
) -> None:
    service, cookies = stale
    database = service.environ["AUTHSVC_DATABASE"]
    before = last_seen(database)
    with ThreadPoolExecutor(1) as pool:
        with locked(database):
            assert profile_status(service, cookies) == 200
            form = {"email": "stale@x.io"}
            writing = pool.submit(requests.post, f"{service.url}/reset_password", data=form, timeout=TIMEOUT)
            for _ in range(5):
                assert profile_status(service, cookies) == 200
            assert last_seen(database) == before
            assert not writing.done()
        assert writing.result().status_code == 200
    assert awaited(lambda: last_seen(database) >= before + 120, TIMEOUT)


@pytest.mark.slow
def test_background_writes_do_not_delay_the_503_of_a_locked_database(impatient: tuple[Service, dict[str, str]]) -> None:
    service, cookies = impatient
    with locked_by_another_service(service.environ["AUTHSVC_DATABASE"]):
        for _ in range(60):  # each starts a background write, which waits half a second for the lock
            assert profile_status(service, cookies) == 200
        answer = requests.delete(f"{service.url}/sessions", cookies=cookies, timeout=12)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert profile_status(service, cookies) == 200


# Errors and refusals


@pytest.mark.parametrize("path", ["/crash", "/slow-crash"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_exception_is_answered_and_ends_no_thread(
    server: LocalServer, capsys: pytest.CaptureFixture[str], method: str, path: str
) -> None:
    for _ in range(3):
        answer = server.dial().send(http(method, path)).answer()
        assert (answer.status, answer.json) == (500, {"message": "internal error"})
    logged = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["error"]) for line in logged] == [("sys_crash", "RuntimeError")] * 3
    assert SECRET not in str(logged)


def test_an_exception_in_a_task_ends_no_worker(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    def crash() -> None:
        raise RuntimeError(SECRET)

    survived = threading.Event()
    server.dispatcher.run_in_background(crash)
    server.dispatcher.run_in_background(survived.set)
    server.dispatcher.add_task(server.task(crash))
    server.release.set()
    assert server.dial().send(SLOW).status() == 200
    assert server.dial().send(http("POST", "/")).status() == 200
    assert survived.wait(TIMEOUT)
    assert [json.loads(line)["error"] for line in capsys.readouterr().err.splitlines()] == ["RuntimeError"] * 2


@pytest.mark.parametrize(
    ("request_text", "status"),
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
        "method in lower case",
        "space in a header name",
        "bare CR",
        "malformed URL",
        "length is not a number",
        "length of 5000 digits",
        "chunk size is not a number",
        "one gigabyte",
        "one byte too large",
        "too large and asks for 100 Continue",
        "17 KiB of headers",
        "endless header",
        "unknown transfer encoding",
    ],
)
def test_a_malformed_request_is_refused_like_any_other(
    service: Service, dial: Callable[..., Connection], request_text: str, status: int
) -> None:
    answer = dial(service.address).send(request_text.encode()).answer()
    assert answer.status == status
    assert list(answer.json) == ["message"]
    assert answer.headers["Content-Type"] == "application/json"
    assert {(name.title(), value) for name, value in responses.SECURITY_HEADERS} <= answer.headers.items()
    assert answer.headers["Connection"] == "close"
    assert "X-Request-Id" in answer.headers
    assert SECRET not in f"{answer.headers} {answer.body!r} {service.log}"


PLAIN_HEAD = "Host: x\r\nX-Forwarded-For: 192.0.2.7\r\n"


@pytest.mark.parametrize(
    ("request_text", "address", "logged"),
    [
        (f"get /{SECRET} HTTP/1.1\r\n{PLAIN_HEAD}\r\n", "127.0.0.1", (400, "malformed head")),
        (f"GET / HTTP/1.1\r\n{PLAIN_HEAD}bad header: {SECRET}\r\n\r\n", "127.0.0.1", (400, "malformed head")),
        (f"GET / HTTP/1.1\r\n{PLAIN_HEAD}X: a\rb{SECRET}\r\n\r\n", "127.0.0.1", (400, "malformed head")),
        (f"GET / HTTP/1.1\r\n{PLAIN_HEAD}Cookie: {SECRET}\r\nCookie: b\r\n\r\n", "192.0.2.7", (400, "repeated header")),
        (
            f"POST / HTTP/1.1\r\n{PLAIN_HEAD}Transfer-Encoding: chunked\r\n\r\n{SECRET}\r\n",
            "192.0.2.7",
            (400, "malformed chunk"),
        ),
        (f"POST /{SECRET} HTTP/1.1\r\n{PLAIN_HEAD}Content-Length: 16385\r\n\r\n", "192.0.2.7", (413, "body too large")),
        (f"GET / HTTP/1.1\r\n{PLAIN_HEAD}X: {SECRET * 1024}", "127.0.0.1", (431, "head too large")),
        (
            f"POST / HTTP/1.1\r\n{PLAIN_HEAD}Transfer-Encoding: {SECRET}\r\n\r\n",
            "192.0.2.7",
            (501, "unknown transfer encoding"),
        ),
    ],
)
def test_a_request_that_the_server_refuses_is_logged_once(
    server: LocalServer, capsys: pytest.CaptureFixture[str], request_text: str, address: str, logged: tuple[int, str]
) -> None:
    server.dispatcher.settings = Settings(trusted_proxy="127.0.0.1")
    answer = server.dial().send(request_text.encode()).answer()
    text = capsys.readouterr().err
    line = json.loads(text)
    assert (line["event"], line["status"], line["reason"]) == ("input_validation_fail", *logged)
    assert (line["request_id"], line["address"]) == (answer.headers["X-Request-Id"], address)
    assert answer.status == logged[0]
    assert SECRET not in text


def test_a_request_that_is_refused_because_all_are_busy_is_logged_once(
    server: LocalServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.dispatcher.settings = Settings(trusted_proxy="127.0.0.1")
    server.hash_one()
    server.dispatcher._hashing_queue.class_limit = 0
    head = f"POST /slow HTTP/1.1\r\n{PLAIN_HEAD}Content-Length: {len(SECRET)}\r\n\r\n"
    answer = server.dial().send(head.encode(), SECRET.encode()).answer()
    assert answer.status == 503
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time")
    assert line == {"event": "sys_busy", "request_id": answer.headers["X-Request-Id"], "address": "192.0.2.7"}


def test_a_body_of_the_maximum_size_is_read(service: Service) -> None:
    form = "email=a&password=".ljust(MAX_BODY_BYTES, "x")
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert requests.post(f"{service.url}/sessions", data=form, headers=headers, timeout=TIMEOUT).status_code == 401
    form += "x"
    assert requests.post(f"{service.url}/sessions", data=form, headers=headers, timeout=TIMEOUT).status_code == 413


TOO_LARGE = b"x" * 5_000_000


@pytest.mark.parametrize("chunked", [False, True])
def test_requests_reads_the_answer_to_a_too_large_body(service: Service, chunked: bool) -> None:
    for _ in range(5):
        body: Any = iter([TOO_LARGE[:65_536]] * 76) if chunked else TOO_LARGE
        answer = requests.post(f"{service.url}/users", data=body, timeout=TIMEOUT)
        assert (answer.status_code, answer.json()) == (413, {"message": "request body too large"})


@pytest.mark.parametrize("arguments", [[], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect:"]])
def test_curl_reads_the_answer_to_a_too_large_body(service: Service, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "body").write_bytes(TOO_LARGE)
    for _ in range(5):
        command = ["curl", "-sS", *arguments, "--data-binary", f"@{tmp_path}/body", f"{service.url}/users"]
        assert json.loads(subprocess.check_output(command)) == {"message": "request body too large"}


def test_a_refused_client_may_finish_sending_its_body(service: Service, dial: Callable[..., Connection]) -> None:
    connection = dial(service.address)
    head = b"POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    assert connection.send(head, b"x" * 20_000).status() == 413
    connection.send(b"x" * 980_000)
    connection.socket.shutdown(socket.SHUT_WR)
    assert connection.stream.read() == b""  # not a reset, which could overtake the answer


def test_a_refused_client_may_not_send_without_end(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.server, "MAX_DISCARD_BYTES", 100_000)
    connection = server.dial().send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
    assert connection.status() == 413
    with pytest.raises(ConnectionError):
        connection.send(TOO_LARGE * 10)


def test_a_client_that_expects_100_continue_gets_it(service: Service, dial: Callable[..., Connection]) -> None:
    head, _, body = LOGIN.partition(b"\r\n\r\n")
    connection = dial(service.address).send(head, b"\r\nExpect: 100-continue\r\n\r\n")
    assert connection.stream.readline() + connection.stream.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert connection.send(body).status() == 401


def test_100_continue_is_sent_in_its_turn(service: Service, dial: Callable[..., Connection]) -> None:
    head, _, body = LOGIN.partition(b"\r\n\r\n")
    connection = dial(service.address).send(GET, head, b"\r\nExpect: 100-continue\r\n\r\n")
    assert connection.status() == 200
    assert connection.stream.readline() + connection.stream.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert connection.send(body).status() == 401


# Shutdown


def test_shutdown_refuses_queued_requests_and_finishes_running_ones(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.server, "LAST_HASHES", 0.1)
    served, waiting, idle = server.hash_one(), server.queue_one(), server.dial()
    assert idle.send(GET).status() == 200
    server.stop()
    refused = waiting.answer()
    assert (refused.status, refused.headers["Retry-After"]) == (503, "5")
    with pytest.raises(ConnectionRefusedError):
        server.dial()
    assert idle.send(SLOW).status() == 503
    server.release.set()
    assert served.status() == 200
    server.thread.join(TIMEOUT)
    assert not server.thread.is_alive()


def test_shutdown_takes_8_seconds_at_most(server: LocalServer, monotonic: Clock) -> None:
    server.hash_one()
    waiting, idle = server.queue_one(), server.dial()
    assert idle.send(GET).status() == 200
    server.stop()
    assert awaited(lambda: not accepts(server.address), TIMEOUT)
    monotonic.advance(web.server.LAST_HASHES)
    assert waiting.status() == 503
    monotonic.advance(6.9)
    assert idle.send(GET).status() == 200
    monotonic.advance(8)
    server.thread.join(TIMEOUT)
    assert not server.thread.is_alive()


def test_shutdown_waits_for_the_background_writes(server: LocalServer) -> None:
    begun, written = threading.Event(), threading.Event()
    server.dispatcher.run_in_background(begun.set)
    server.dispatcher.run_in_background(server.release.wait)
    server.dispatcher.run_in_background(written.set)
    server.dispatcher.start_background()
    assert begun.wait(TIMEOUT)
    server.stop()
    assert awaited(lambda: not accepts(server.address), TIMEOUT)
    server.thread.join(0.1)
    assert server.thread.is_alive()
    server.release.set()
    server.thread.join(TIMEOUT)
    assert not server.thread.is_alive()
    assert written.is_set()


def test_an_open_connection_may_send_one_more_request(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.server, "LAST_REQUESTS", float(TIMEOUT))
    client, silent = server.dial(), server.dial()
    assert "Connection" not in dict(client.send(GET).answer().headers)
    server.stop()
    assert awaited(lambda: not accepts(server.address), TIMEOUT)
    answer = client.send(GET, GET).answer()
    assert (answer.status, dict(answer.headers)["Connection"]) == (200, "close")
    assert client.stream.read() == b""  # closed, and the second one is not answered
    silent.close()
    server.thread.join(TIMEOUT)
    assert not server.thread.is_alive()  # nobody is left who could send one


def test_requests_that_wait_for_a_hash_get_one_at_the_end(server: LocalServer) -> None:
    waiting = [server.hash_one(), server.queue_one(), server.queue_one()]
    server.stop()
    assert awaited(lambda: not accepts(server.address), TIMEOUT)
    server.release.set()
    assert [connection.status() for connection in waiting] == [200, 200, 200]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_stops_at_once(
    start: Callable[..., Service], dial: Callable[..., Connection], number: int
) -> None:
    service = start()
    assert dial(service.address).send(GET).status() == 200  # this connection stays open
    began = time.monotonic()
    assert service.end(number) == 0
    assert time.monotonic() - began < web.server.SHUTDOWN_TIMEOUT / 2


@pytest.mark.both_engines
@ONLY_LINUX
@pytest.mark.slow
def test_sigterm_stops_a_busy_service_without_losing_an_answer(
    start: Callable[..., Service], dial: Callable[..., Connection]
) -> None:
    # 100 hashes of 0.1 s: most of them are still queued at the signal, and even a busy machine finishes the running
    # ones within the time that a shutdown may take.
    service = start(AUTHSVC_BCRYPT_COST="11", AUTHSVC_THROTTLE="off")
    connections = [
        dial(service.address).send(http("POST", "/users", email=f"{index}@x.io", password="b4l0u"))
        for index in range(100)
    ]
    assert dial(service.address).send(GET).status() == 200
    assert awaited(
        lambda: any(nice == web.server.HASHING_NICENESS and ticks > 2 for nice, ticks in threads_of(service)), TIMEOUT
    )
    service.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    statuses = Counter(connection.status() for connection in connections)
    assert statuses.keys() == {200, 503}
    assert statuses[503] >= 50  # after a second the queue is refused, not served
    assert service.process.wait(TIMEOUT) == 0
    assert time.monotonic() - began < web.server.SHUTDOWN_TIMEOUT + 2
    assert not accepts(service.address)


@pytest.mark.slow
def test_a_locked_database_does_not_delay_shutdown(impatient: tuple[Service, dict[str, str]]) -> None:
    service, cookies = impatient
    with locked_by_another_service(service.environ["AUTHSVC_DATABASE"]):
        for _ in range(60):  # half a minute of background writes
            assert profile_status(service, cookies) == 200
        began = time.monotonic()
        assert service.end() == 0
        assert time.monotonic() - began < 10
    assert all(line.startswith("{") for line in service.log.splitlines())


def test_a_closed_connection_is_logged_with_the_ipv4_address(capsys: pytest.CaptureFixture[str]) -> None:
    """A socket that listens on [::] sees IPv4 clients as ::ffff:192.0.2.1."""
    web.server._log_closing(SimpleNamespace(client=None, addr=("::ffff:192.0.2.1", 1)), "too slow")  # type: ignore[arg-type]
    assert json.loads(capsys.readouterr().err)["address"] == "192.0.2.1"
