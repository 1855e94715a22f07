"""Limits of one client: requests that wait for a hash, and connections that send slowly."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import queue
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import requests

import web.server
from credentials import passwords
from settings import Settings
from tests.conftest import Service
from tests.crowd import awaited
from tests.production import FORM, PROXY, PUBLIC_URL, post_request, production_settings, send
from web.middleware import SecurityMiddleware

Begin = Callable[..., list[socket.socket]]

HOST = "Host: x\r\n"
GET = b"GET / HTTP/1.0\r\n\r\n"


class LocalServer:
    """A server in this process with one hashing thread; ``POST /slow`` hashes until ``finish_hashes`` is set."""

    BODY = b"ok"

    def __init__(self, settings: Settings) -> None:
        self.finish_hashes = threading.Event()
        self.hashing: queue.SimpleQueue[None] = queue.SimpleQueue()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(listener, settings))
        self.thread.start()
        assert self._ready.wait(5)

    def _serve(self, listener: socket.socket, settings: Settings) -> None:
        self.dispatcher = web.server.Dispatcher({("POST", "/slow")}, 1, settings, lambda environ: (False, ""))
        self.server = web.server.Server(SecurityMiddleware(self._application, settings), listener, self.dispatcher)
        self._ready.set()
        self.server.run()

    def _application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/slow":
            self.hashing.put(None)
            assert self.finish_hashes.wait(10)
        start_response("200 OK", [("Content-Length", str(len(self.BODY)))])
        return [self.BODY]

    def hash_for(self, client: str) -> socket.socket:
        """Request a hash for a client, and wait until the server has read the request."""
        connection = socket.create_connection(self.address, timeout=3)
        connection.sendall(post_request("/slow", {}, f"X-Forwarded-For: {client}"))
        assert send(self.address, GET).startswith(b"HTTP/1.0 200 ")
        return connection

    def hash_first(self, client: str = "198.51.100.1") -> socket.socket:
        """Request a hash, and wait until it runs. From then on all others wait."""
        connection = self.hash_for(client)
        self.hashing.get(timeout=5)
        return connection

    def close(self) -> None:
        self.finish_hashes.set()
        self.server.stop(signal.SIGUSR1, None)
        self.thread.join(10)
        idle = threading.Barrier(2 + web.server.WRITERS)  # past it, no worker uses the connections that are closed next
        last: Any = SimpleNamespace(service=lambda: idle.wait(5))
        queues = [self.dispatcher._hashing_queue, *[self.dispatcher._writing_queue] * web.server.WRITERS]
        for waiting in queues:
            waiting.put((float("inf"), last, "unknown"), ("",) * 4, preferred=True, limited=False)
        idle.wait(5)
        for channel in list(self.server._server.active_channels.values()):
            channel.handle_close()
        self.server._server.trigger.close()


@pytest.fixture
def start_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalServer]]:
    """Start servers with these changes to their settings; they are stopped after the test."""
    monkeypatch.setattr(web.server, "REFUSAL_DELAY", 0.0)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # only the main thread may set a handler
    monkeypatch.setattr(web.server, "CHECK_INTERVAL", 0.05)
    monkeypatch.setattr(web.server, "LAST_REQUESTS", 0.0)  # most tests leave connections open
    started: list[LocalServer] = []

    def start_one(**changes: Any) -> LocalServer:
        started.append(LocalServer(production_settings(**{"trusted_proxy": PROXY, **changes})))
        return started[-1]

    yield start_one
    for one in started:
        one.close()


@pytest.fixture
def server(start_server: Callable[..., LocalServer]) -> LocalServer:
    return start_server()


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    """Connections of the test; they are closed after it."""
    opened: list[socket.socket] = []
    yield opened
    for connection in opened:
        connection.close()


def status(connection: socket.socket) -> int:
    """Read an answer; return its status."""
    return int(connection.recv(65_536).split()[1])


@pytest.mark.parametrize(
    ("clients", "other"),
    [
        (["203.0.113.5"] * 5, "203.0.113.6"),
        (["203.0.113.5", "::ffff:203.0.113.5"] * 3, "203.0.113.6"),
        (["junk", "rubbish", "", "x", "y"], "203.0.113.6"),
        ([f"2001:db8::{n}" for n in range(5)], "2001:db8:0:1::1"),
    ],
    ids=["IPv4", "IPv4 in IPv6", "invalid addresses", "one IPv6 network"],
)
def test_one_client_has_at_most_4_requests_in_the_hashing_queue(
    server: LocalServer, connections: list[socket.socket], clients: list[str], other: str
) -> None:
    connections.append(server.hash_first())
    connections.extend(server.hash_for(client) for client in clients[:5])
    refused = connections[5].recv(65_536)
    assert b" 503 " in refused.partition(b"\r\n")[0]
    assert b"\r\nRetry-After: 5\r\n" in refused
    connections.append(server.hash_for(other))
    server.finish_hashes.set()
    assert [status(answered) for answered in (*connections[:5], connections[6])] == [200] * 6


def test_one_network_has_at_most_16_requests_in_the_hashing_queue(
    server: LocalServer, connections: list[socket.socket]
) -> None:
    connections.append(server.hash_first())
    clients = [f"203.0.113.{number}" for number in (1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5)]
    connections.extend(server.hash_for(client) for client in [*clients, "203.0.113.6"])
    assert status(connections[4]) == 503  # the newest of the largest client
    connections.append(server.hash_for("203.0.112.1"))
    server.finish_hashes.set()
    assert [status(answered) for answered in connections[:4] + connections[5:]] == [200] * 18


@pytest.mark.slow
def test_64_requests_of_strangers_wait_for_a_hash_in_production(
    server: LocalServer, connections: list[socket.socket]
) -> None:
    connections.append(server.hash_first())
    connections.extend(server.hash_for(f"203.{number}.113.1") for number in range(65))
    server.finish_hashes.set()
    assert Counter(map(status, connections)) == {200: 65, 503: 1}


def test_a_full_queue_refuses_the_largest_network_on_another_connection(
    server: LocalServer, connections: list[socket.socket]
) -> None:
    server.dispatcher._hashing_queue.class_limit = 3
    connections.append(server.hash_first())
    connections.extend(server.hash_for(f"203.0.113.{number}") for number in (1, 1, 2))
    connections.append(server.hash_for("192.0.2.1"))
    refused = connections[2].recv(65_536)
    assert b" 503 " in refused.partition(b"\r\n")[0]
    assert b"\r\nRetry-After: 5\r\n" in refused
    server.finish_hashes.set()
    assert [status(answered) for answered in connections[:2] + connections[3:]] == [200] * 4


@pytest.mark.parametrize(
    ("trusted_proxy", "peer", "accepted"),
    [
        ("", "203.0.113.5", 4),
        ("", "127.0.0.1", 64),
        ("", "10.0.0.5", 64),
        (PROXY, "127.0.0.1", 4),
        (PROXY, "10.0.0.5", 4),
    ],
    ids=["from the internet", "from this machine", "from a private network", "from the proxy", "past the proxy"],
)
def test_a_client_is_not_limited_where_all_clients_seem_to_be_one(
    start_server: Callable[..., LocalServer],
    connections: list[socket.socket],
    trusted_proxy: str,
    peer: str,
    accepted: int,
) -> None:
    server = start_server(trusted_proxy=trusted_proxy)
    connections.append(server.hash_first())
    requests_in_queue = []
    for _ in range(66):
        environ = {"wsgi.input": io.BytesIO()}
        request = SimpleNamespace(error=None, command="POST", path="/slow", version="1.1", environ=environ)
        requests_in_queue.append(request)
        server.dispatcher.add_task(SimpleNamespace(requests=[request], addr=(peer, 0), service=lambda: None))  # type: ignore[arg-type]
    expected = [True] * accepted + [False] * (66 - accepted)
    assert awaited(lambda: [request.error is None for request in requests_in_queue] == expected)


def test_a_served_request_no_longer_counts(server: LocalServer, connections: list[socket.socket]) -> None:
    server.finish_hashes.set()
    for _ in range(12):
        connections.append(server.hash_for("203.0.113.5"))
        assert status(connections[-1]) == 200


def test_a_disconnected_client_has_its_turn_and_no_longer_counts(
    server: LocalServer, connections: list[socket.socket]
) -> None:
    connections.append(server.hash_first())
    for _ in range(4):
        server.hash_for("203.0.113.5").close()
    server.finish_hashes.set()
    for _ in range(4):
        server.hashing.get(timeout=5)
    for _ in range(5):
        connections.append(server.hash_for("203.0.113.5"))
        assert status(connections[-1]) == 200


@pytest.mark.slow  # hashes for a second
def test_one_client_has_4_logins_in_the_queue_and_one_on_each_core(start: Callable[..., Service]) -> None:
    settings = {"AUTHSVC_PUBLIC_URL": PUBLIC_URL, "AUTHSVC_TRUSTED_PROXY": PROXY, "AUTHSVC_BCRYPT_COST": "11"}
    service = start(**settings)
    at_once = 4 + passwords.CORES

    def log_in(client: str) -> int:
        headers = {"X-Forwarded-For": client, "X-Forwarded-Proto": "https"}
        return requests.post(f"{service.url}/sessions", data=FORM, headers=headers, timeout=20).status_code

    with ThreadPoolExecutor(at_once + 5) as pool:
        several = [pool.submit(log_in, "203.0.113.5") for _ in range(at_once + 4)]
        other = pool.submit(log_in, "203.0.113.6")
        statuses = Counter(one.result() for one in several)
        assert other.result() == 401
    # On a busy machine all may arrive before the first of them is hashed.
    assert statuses.keys() == {401, 503}
    assert 4 <= statuses[401] <= at_once


HEADER_DRIP = f"GET / HTTP/1.1\r\n{HOST}X: ".encode()
BODY_DRIP = f"POST /sessions HTTP/1.1\r\n{HOST}Content-Length: 10000\r\n\r\n".encode()
CHUNK_DRIP = f"POST /sessions HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked\r\n\r\nffff\r\n".encode()


def accepts_a_byte(connection: socket.socket) -> bool:
    """Send one more byte; return whether the server still receives."""
    try:
        connection.sendall(b"x")
    except OSError:
        return False
    return True


def is_open_after_a_byte(connection: socket.socket) -> bool:
    """Send one more byte; return whether the server still keeps the connection open."""
    try:
        connection.send(b"x")
        connection.settimeout(0)
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


# Requests that are not fully received


def half(client: str, sent: bytes = b"a") -> bytes:
    """Return a request of this client of which the end of the body is missing."""
    return f"POST /users HTTP/1.1\r\n{HOST}X-Forwarded-For: {client}\r\nContent-Length: 100\r\n\r\n".encode() + sent


@pytest.fixture
def begin(
    connections: list[socket.socket], start_server: Callable[..., LocalServer]
) -> Callable[..., list[socket.socket]]:
    """Return a function that sends beginnings of requests, each on a connection of its own, and waits for each."""

    def begin_all(server: LocalServer, beginnings: Iterable[bytes]) -> list[socket.socket]:
        begun = []
        for beginning in beginnings:
            begun.append(socket.create_connection(server.address, timeout=3))
            begun[-1].sendall(beginning)
            assert send(server.address, GET).startswith(b"HTTP/1.0 200 ")  # by now the server has read the other one
        connections.extend(begun)
        return begun

    return begin_all


def closed(connections: Iterable[socket.socket]) -> list[bool]:
    return [not is_open_after_a_byte(connection) for connection in connections]


@pytest.mark.parametrize(
    "clients",
    [["203.0.113.5"] * 18, [f"2001:db8::{n}" for n in range(18)], ["junk"] * 18],
    ids=["IPv4", "one IPv6 network", "invalid addresses"],
)
def test_a_client_has_at_most_16_unfinished_requests(server: LocalServer, begin: Begin, clients: list[str]) -> None:
    (other,) = begin(server, [half("198.51.100.7")])
    begun = begin(server, map(half, clients))
    assert closed(begun) == [True] * 2 + [False] * 16  # the oldest are closed
    assert closed([other]) == [False]


def test_the_log_says_which_connections_were_closed(
    server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(server, [half("203.0.113.5")] * 17)
    server.server._close_slow(time.monotonic() + 16)
    monkeypatch.setattr(web.server, "MIN_AGE", 0.0)
    begin(server, [b"GET"])
    monkeypatch.setattr(web.server, "MAX_CONNECTIONS", 0)
    server.server._make_room()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    closings = {(line["address"], line["reason"]) for line in lines if line["event"] == "sys_connection_closed"}
    assert closings == {
        ("203.0.113.5", "too many unfinished requests of one client"),
        ("203.0.113.5", "too slow"),
        ("127.0.0.1", "needed for others"),
    }


def test_16_unfinished_heads_of_a_peer_are_allowed(start_server: Callable[..., LocalServer], begin: Begin) -> None:
    server = start_server(trusted_proxy="192.0.2.1")
    assert closed(begin(server, [b"GET / HTTP/1.1\r\nHost"] * 18)) == [True] * 2 + [False] * 16


def test_unfinished_heads_of_a_proxy_are_not_counted(server: LocalServer, begin: Begin) -> None:
    assert closed(begin(server, [b"GET / HTTP/1.1\r\nHost"] * 18)) == [False] * 18


def test_a_silent_connection_is_closed(server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.server, "IDLE_TIMEOUT", 0.0)
    for connection in begin(server, [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"]):
        connection.settimeout(5)
        while connection.recv(65_536):
            pass


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["new", "used"])
def test_a_silent_connection_stays_open_longer_than_that_of_any_proxy(
    server: LocalServer, begin: Begin, sent: bytes
) -> None:
    (connection,) = begin(server, [sent])
    assert connection.recv(65_536) if sent else awaited(lambda: server.server._server.active_channels)
    (channel,) = server.server._server.active_channels.values()
    now = time.monotonic()
    ages = (60, 90, 120, 125, 135)  # balancers and nginx, Traefik, Caddy
    assert [channel.is_slow(now + age, web.server.BODY_TIMEOUT) for age in ages] == [False] * 4 + [True]
    assert channel.makes_room(now + 60) is not None  # but its place is for others who need it


@pytest.mark.slow
def test_a_client_that_lets_the_next_request_wait_by_reading_nothing_is_closed(
    server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    monkeypatch.setattr(LocalServer, "BODY", b"x" * 9000)
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(server.address)
    reader.sendall(get * 100)
    channels = server.server._server.active_channels
    assert awaited(lambda: any(channel.unparsed for channel in channels.values()))
    time.sleep(0.5)  # until the kernel takes no further answer
    monkeypatch.setattr(web.server, "ANSWER_TIMEOUT", 0.1)
    assert awaited(lambda: not channels)
    reader.close()


def test_clients_that_look_like_one_are_not_limited(start_server: Callable[..., LocalServer], begin: Begin) -> None:
    server = start_server(trusted_proxy="")
    assert closed(begin(server, [half("203.0.113.5")] * 18)) == [False] * 18


def test_finished_requests_do_not_count(server: LocalServer, begin: Begin) -> None:
    for _ in range(3):
        begun = begin(server, [half("203.0.113.5")] * 16)
        for connection in begun:
            connection.sendall(b"a" * 99)
            assert status(connection) == 200
    assert closed(begin(server, [half("203.0.113.5")] * 16)) == [False] * 16


@pytest.mark.parametrize(
    ("beginning", "timeout"),
    [
        (b"G", "HEAD_TIMEOUT"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", "HEAD_TIMEOUT"),
        (half("203.0.113.5", b""), "BODY_TIMEOUT"),
        (half("203.0.113.5"), "BODY_TIMEOUT"),
    ],
    ids=["first byte", "half a head", "no body", "half a body"],
)
def test_a_request_must_be_whole_in_time(
    server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch, beginning: bytes, timeout: str
) -> None:
    for name in "HEAD_TIMEOUT", "BODY_TIMEOUT", "BUSY_BODY_TIMEOUT":
        monkeypatch.setattr(web.server, name, 0.0 if name == timeout else 1000.0)
    (connection,) = begin(server, [beginning])
    connection.settimeout(5)
    assert connection.recv(1) == b""


def test_a_body_has_less_time_while_half_of_the_connections_are_taken(
    server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.server, "BUSY_BODY_TIMEOUT", 0.0)
    monkeypatch.setattr(web.server, "ROOM", 0)
    monkeypatch.setattr(web.server, "MAX_CONNECTIONS", 20)
    begun = begin(server, [half("203.0.113.5")] * 8)
    server.server._close_slow(time.monotonic() + 14)
    assert closed(begun) == [False] * 8
    monkeypatch.setattr(web.server, "MAX_CONNECTIONS", 14)
    for connection in begun:
        connection.settimeout(5)
        assert connection.recv(1) == b""


def test_an_answer_that_nobody_reads_is_given_up(
    server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalServer, "BODY", b"x" * 2**22)
    reader = socket.create_connection(server.address, timeout=5)
    reader.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    channels = server.server._server.active_channels
    assert awaited(lambda: any(channel.total_outbufs_len for channel in channels.values()))
    monkeypatch.setattr(web.server, "ANSWER_TIMEOUT", 0.0)
    assert awaited(lambda: not channels)
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while chunk := reader.recv(65_536):
            received += len(chunk)
    reader.close()
    assert received < 2**22


# Room for others


@pytest.mark.slow
def test_room_is_made_by_what_is_oldest(server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.server, "MIN_AGE", 0.0)
    (old,) = begin(server, [half("203.0.113.5")])
    (used,) = begin(server, [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
    assert status(used) == 200
    monkeypatch.setattr(LocalServer, "BODY", b"x" * 2**22)
    (unread,) = begin(server, [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
    monkeypatch.setattr(LocalServer, "BODY", b"ok")
    new, silent = begin(server, [half("203.0.113.6"), b""])
    ranked = sorted(
        (since, channel.addr[1])
        for channel in server.server._channels
        if (since := channel.makes_room(time.monotonic())) is not None
    )
    expected = [one.getsockname()[1] for one in (silent, old, used, unread, new)]  # "silent" counts as 5 s older
    assert [port for _, port in ranked if port in expected] == expected


def test_a_request_behind_a_refused_one_is_not_served(server: LocalServer, connections: list[socket.socket]) -> None:
    connections += [server.hash_first(), socket.create_connection(server.address, timeout=5)]
    server.dispatcher._hashing_queue.class_limit = 0
    post = b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    connections[1].sendall(post + post.replace(b"POST", b"GET"))
    answers = b""
    while chunk := connections[1].recv(65_536):
        answers += chunk
    assert answers.count(b"HTTP/1.1 ") == 1
    assert answers.startswith(b"HTTP/1.1 503 ")
    assert server.hashing.empty()  # "GET /slow" was not called
    server.dispatcher._hashing_queue.class_limit = 1  # the end of the server needs a place


def test_an_answer_that_was_waited_for_is_sent_whole(server: LocalServer, connections: list[socket.socket]) -> None:
    connections.append(server.hash_first())
    (channel,) = [one for one in server.server._channels if one.requests]
    channel.last_activity -= 1000  # it has waited for the hash
    with channel.outbuf_lock:
        channel.total_outbufs_len = 1  # as between the head of an answer and its body
        assert not channel.is_slow(time.monotonic(), web.server.BODY_TIMEOUT)
        channel.total_outbufs_len = 0


def test_what_is_younger_than_a_second_makes_no_room(server: LocalServer, begin: Begin) -> None:
    begun = begin(server, [b"", half("203.0.113.5"), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
    mine = {one.getsockname()[1] for one in begun}
    channels = [channel for channel in server.server._channels if channel.addr[1] in mine]
    now = time.monotonic()
    assert [channel.makes_room(now) for channel in channels] == [None] * 3
    assert all(channel.makes_room(now + 1.1) for channel in channels)


def test_a_request_that_is_served_makes_no_room(server: LocalServer, connections: list[socket.socket]) -> None:
    connections.append(server.hash_first())
    (channel,) = [one for one in server.server._channels if one.requests]
    assert channel.makes_room(time.monotonic() + 1000) is None


def test_connections_are_closed_before_the_limit_is_reached(
    server: LocalServer, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.server, "MIN_AGE", 0.0)
    monkeypatch.setattr(web.server, "UNUSED_AGE", 0.0)
    monkeypatch.setattr(web.server, "MAX_CONNECTIONS", 30)
    monkeypatch.setattr(web.server, "ROOM", 10)
    begun = begin(server, [half(f"203.0.113.{n}") for n in range(25)])
    assert closed(begun).count(False) in (17, 18)  # 20, less the listening socket, the trigger, and a request for "/"
    assert closed(begun)[:5] == [True] * 5


def test_connections_that_wait_are_accepted_together(
    server: LocalServer, connections: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = []

    def run_loop_once(timeout: float) -> None:
        before = len(server.server._channels)
        web.server.Server._run_loop_once(server.server, timeout)
        accepted.append(len(server.server._channels) - before)

    monkeypatch.setattr(server.server, "_run_loop_once", run_loop_once)
    connections.append(socket.create_connection(server.address, timeout=3))
    connections[0].sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")  # a GET runs on the I/O thread
    server.hashing.get(timeout=5)
    connections.extend(socket.create_connection(server.address, timeout=3) for _ in range(20))
    server.finish_hashes.set()
    assert status(connections[0]) == 200
    assert awaited(lambda: 20 in accepted)


def test_a_connection_that_is_to_be_closed_stays_so_while_it_lingers() -> None:
    channel: Any = SimpleNamespace(lingering=True, discard=100, recv=lambda size: b"rest", will_close=True)
    web.server.Channel.handle_read(channel)
    assert channel.will_close
    channel.will_close = False
    for _ in range(24):
        web.server.Channel.handle_read(channel)
    assert channel.will_close


# One request at a time


def test_a_client_that_pipelines_and_reads_nothing_is_kept_in_one_answer(server: LocalServer, begin: Begin) -> None:
    get = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 60 + b"\r\n\r\n"
    begin(server, [get])
    server.server._server.adj.recv_bytes = 65_536
    (connection,) = begin(server, [half("203.0.113.5", b"a" * 100) + get * 300])
    served = [channel for channel in server.server._channels if channel.addr[1] == connection.getsockname()[1]]
    assert len(served[0].requests) <= 1
    answers = b""
    while answers.count(b"HTTP/1.1 200 OK") < 301:
        answers += connection.recv(65_536)


@pytest.mark.slow  # waits for the timeout
def test_60_slow_connections_are_closed_at_the_timeouts(
    server: LocalServer, connections: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.server, "HEAD_TIMEOUT", 1.5)
    monkeypatch.setattr(web.server, "BODY_TIMEOUT", 1.5)
    beginnings = itertools.cycle([HEADER_DRIP, BODY_DRIP, CHUNK_DRIP, b""])
    began, slowest = time.monotonic(), 0.0
    for beginning, _ in zip(beginnings, range(60)):
        connections.append(socket.create_connection(server.address, timeout=5))
        connections[-1].sendall(beginning)
    still_open = connections
    while still_open and time.monotonic() - began < 10:
        still_open = [connection for connection in still_open if is_open_after_a_byte(connection)]
        asked = time.monotonic()
        assert send(server.address, GET).startswith(b"HTTP/1.0 200 ")
        slowest = max(slowest, time.monotonic() - asked)
        time.sleep(0.1)  # the interval between two bytes
    assert not still_open
    assert 1.5 <= time.monotonic() - began < 6
    assert slowest < 2  # seconds; without the limit, the others would wait as long as these connections stay


@pytest.mark.slow  # waits for the timeout
def test_a_refused_client_that_keeps_sending_is_disconnected(
    connections: list[socket.socket], start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web.server, "ANSWER_TIMEOUT", 1.0)
    server = start_server()
    connections.append(socket.create_connection(server.address, timeout=5))
    connections[0].sendall(f"POST /users HTTP/1.1\r\n{HOST}Content-Length: 1000000000\r\n\r\n".encode())
    assert status(connections[0]) == 413
    began = time.monotonic()
    while accepts_a_byte(connections[0]) and time.monotonic() - began < 10:
        time.sleep(0.05)  # the interval between two bytes
    assert 0.5 < time.monotonic() - began < 5
