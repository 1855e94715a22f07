"""Limits of one client: requests in the hashing queue, and connections that send slowly."""

from __future__ import annotations

import itertools
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
from settings import Settings
from tests.conftest import Service
from tests.production import FORM, PROXY, PUBLIC_URL, post_request, production_settings, send
from web.middleware import SecurityMiddleware

HOST = "Host: x\r\n"
GET = b"GET / HTTP/1.0\r\n\r\n"


class LocalServer:
    """A server in this process with one hashing thread; ``POST /slow`` hashes until ``finish_hashes`` is set."""

    def __init__(self, settings: Settings) -> None:
        self.finish_hashes = threading.Event()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(listener, settings))
        self.thread.start()
        assert self._ready.wait(5)

    def _serve(self, listener: socket.socket, settings: Settings) -> None:
        self.dispatcher = web.server.Dispatcher({("POST", "/slow")}, 1, settings)
        self.server = web.server.Server(SecurityMiddleware(self._application, settings), listener, self.dispatcher)
        self._ready.set()
        self.server.run()

    def _application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/slow":
            assert self.finish_hashes.wait(10)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    def hash_for(self, client: str) -> socket.socket:
        """Request a hash for a client, and wait until the server has read the request."""
        connection = socket.create_connection(self.address, timeout=3)
        connection.sendall(post_request("/slow", {}, f"X-Forwarded-For: {client}"))
        assert send(self.address, GET).startswith(b"HTTP/1.0 200 ")
        return connection

    def counts_nobody(self) -> bool:
        """Wait until no client counts in the queue, a moment after the last answer; return False after 5 s."""
        end = time.monotonic() + 5
        while self.dispatcher._queued and time.monotonic() < end:
            time.sleep(0.001)
        return not self.dispatcher._queued

    def close(self) -> None:
        self.finish_hashes.set()
        self.server.stop(signal.SIGUSR1, None)
        self.thread.join(10)
        for channel in list(self.server._server.active_channels.values()):
            channel.handle_close()
        self.server._server.trigger.close()


@pytest.fixture
def start_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], LocalServer]]:
    """Start servers; they are stopped after the test."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # only the main thread may set a handler
    started: list[LocalServer] = []

    def start_one() -> LocalServer:
        started.append(LocalServer(production_settings(trusted_proxy=PROXY)))
        return started[-1]

    yield start_one
    for one in started:
        one.close()


@pytest.fixture
def server(start_server: Callable[[], LocalServer]) -> LocalServer:
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
    connections.extend(server.hash_for(client) for client in clients[:5])
    refused = connections[4].recv(65_536)
    assert b" 503 " in refused.partition(b"\r\n")[0]
    assert b"\r\nRetry-After: 5\r\n" in refused
    connections.append(server.hash_for(other))
    server.finish_hashes.set()
    assert [status(answered) for answered in (*connections[:4], connections[5])] == [200] * 5


def test_an_answered_request_no_longer_counts_in_the_queue(
    server: LocalServer, connections: list[socket.socket]
) -> None:
    server.finish_hashes.set()
    for _ in range(12):
        connections.append(server.hash_for("203.0.113.5"))
        assert status(connections[-1]) == 200
        assert server.counts_nobody()


def test_a_disconnected_client_no_longer_counts_in_the_queue(
    server: LocalServer, connections: list[socket.socket]
) -> None:
    for _ in range(4):
        server.hash_for("203.0.113.5").close()
    server.finish_hashes.set()
    assert server.counts_nobody()
    connections.append(server.hash_for("203.0.113.5"))
    assert status(connections[0]) == 200


def test_a_connection_may_close_while_slow_ones_are_searched() -> None:
    # Another thread that fails to write removes its connection from this table at any moment.
    class Closing:
        @property
        def request(self) -> None:
            del channels["closing"]

    channels: dict[str, Any] = {"closing": Closing(), "open": SimpleNamespace(request=None)}
    server = SimpleNamespace(_server=SimpleNamespace(active_channels=channels))
    web.server.Server._close_slow(server, 0.0)  # type: ignore[arg-type]
    assert list(channels) == ["open"]


@pytest.mark.slow  # hashes for a second
def test_a_fifth_simultaneous_login_of_one_client_is_refused(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY=PROXY, AUTHSVC_BCRYPT_COST="12")

    def log_in(client: str) -> int:
        headers = {"X-Forwarded-For": client, "X-Forwarded-Proto": "https"}
        return requests.post(f"{service.url}/sessions", data=FORM, headers=headers, timeout=20).status_code

    with ThreadPoolExecutor(9) as pool:
        eight = [pool.submit(log_in, "203.0.113.5") for _ in range(8)]
        other = pool.submit(log_in, "203.0.113.6")
        assert Counter(one.result() for one in eight) == {401: 4, 503: 4}
        assert other.result() == 401


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


@pytest.mark.timing
@pytest.mark.slow  # waits for the timeout
def test_60_slow_connections_are_closed_at_the_request_timeout(
    server: LocalServer, connections: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert web.server.REQUEST_TIMEOUT == 30
    monkeypatch.setattr(web.server, "REQUEST_TIMEOUT", 3.0)
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
    assert 3 <= time.monotonic() - began < 6
    assert slowest < 2  # seconds; without the limit, the others would wait as long as these connections stay


@pytest.mark.slow  # waits for the timeout
def test_a_refused_client_that_keeps_sending_is_disconnected(
    connections: list[socket.socket], start_server: Callable[[], LocalServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert web.server.IDLE_TIMEOUT == 30
    monkeypatch.setattr(web.server, "IDLE_TIMEOUT", 1)
    server = start_server()
    waitress_server = server.server._server
    waitress_server.adj.cleanup_interval = 0.2  # seconds between two searches for idle connections
    waitress_server.next_channel_cleanup = 0  # the first search was planned with the interval of the service
    connections.append(socket.create_connection(server.address, timeout=5))
    connections[0].sendall(f"POST /users HTTP/1.1\r\n{HOST}Content-Length: 1000000000\r\n\r\n".encode())
    assert status(connections[0]) == 413
    began = time.monotonic()
    while accepts_a_byte(connections[0]) and time.monotonic() - began < 10:
        time.sleep(0.05)  # the interval between two bytes
    assert 0.5 < time.monotonic() - began < 5
