"""Limits of one client: requests that wait for a hash, and connections that send slowly."""

from __future__ import annotations

import io
import itertools
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
from tests.production import FORM, PROXY, PUBLIC_URL, post_request, production_settings, send
from web.middleware import SecurityMiddleware

HOST = "Host: x\r\n"
GET = b"GET / HTTP/1.0\r\n\r\n"


class LocalServer:
    """A server in this process with one hashing thread; ``POST /slow`` hashes until ``finish_hashes`` is set."""

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
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

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
        self.dispatcher._hashing_queue.put((float("inf"), last), ("",) * 4, preferred=True, limited=False)
        for _ in range(web.server.WRITERS):
            self.dispatcher._writing_queue.put(last.service)
        idle.wait(5)
        for channel in list(self.server._server.active_channels.values()):
            channel.handle_close()
        self.server._server.trigger.close()


@pytest.fixture
def start_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalServer]]:
    """Start servers with these changes to their settings; they are stopped after the test."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # only the main thread may set a handler
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


def test_a_full_queue_refuses_a_request_of_the_largest_network_that_waits_on_another_connection(
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
    assert [request.error is None for request in requests_in_queue] == [True] * accepted + [False] * (66 - accepted)


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
def test_one_client_has_4_logins_in_the_queue_and_one_on_each_core(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY=PROXY, AUTHSVC_BCRYPT_COST="12")
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
    connections: list[socket.socket], start_server: Callable[..., LocalServer], monkeypatch: pytest.MonkeyPatch
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
