"""Clients that send half a request and then nothing, and honest visitors beside them, through a proxy."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from ssl import SSLSocket
from urllib.parse import urlencode

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event, PingAckReceived, RemoteSettingsChanged, ResponseReceived

from tests.proxies import AUTH, Site

COUNT = 600  # half-sent requests at once, more than the 512 connections of the service
# Of their clients, in five networks, as nginx.conf allows each 150 at once. Visitors come from 127.0.0.1.
ADDRESSES = [f"127.0.{number}.1" for number in range(2, 7)]
VISITS = 25  # a second
VISITOR_THREADS = 200  # more than the visits that can wait for an answer at once

BODY = urlencode({"email": "nobody@example.com", "password": "a wrong password"}).encode()
HEADERS = {"content-type": "application/x-www-form-urlencoded", "content-length": str(len(BODY))}
HEAD = "".join(f"{line}\r\n" for line in ("POST /sessions HTTP/1.1", f"Host: {AUTH}", *map(": ".join, HEADERS.items())))


class HTTP1:
    """Half-sent requests over HTTP/1.1, each on a connection of its own: the head and one byte of the body."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._addresses = itertools.cycle(ADDRESSES)
        self._held: deque[SSLSocket] = deque()

    def open(self) -> None:
        self._held.append(self._site.connect(AUTH, next(self._addresses)))
        self._held[-1].sendall(f"{HEAD}\r\n".encode() + BODY[:1])

    def drop(self) -> None:
        """Give up the oldest request."""
        self._held.popleft().close()

    def finish(self) -> int:
        """Send the rest of the newest request; return the status of its answer."""
        self._held[-1].sendall(BODY[1:])
        answer = HTTPResponse(self._held[-1])
        with closing(answer):
            answer.begin()
        return answer.status

    def settle(self) -> None:
        """Wait until the proxy has read all requests. Here that needs no wait, as each one has its own connection."""

    def close(self) -> None:
        while self._held:
            self.drop()


class HTTP2:
    """Half-sent requests over HTTP/2, on three TCP connections, or on five, as nginx allows only 128 on each."""

    def __init__(self, site: Site) -> None:
        addresses = ADDRESSES if site.kind == "nginx" else ADDRESSES[:3]
        self._connections = [_Connection(site, address) for address in addresses]
        self._turns = itertools.cycle(self._connections)
        self._held: deque[tuple[_Connection, int]] = deque()

    def open(self) -> None:
        connection = next(self._turns)
        self._held.append((connection, connection.open()))

    def drop(self) -> None:
        """Give up the oldest request."""
        connection, stream = self._held.popleft()
        connection.drop(stream)

    def finish(self) -> int:
        """Send the rest of the newest request; return the status of its answer."""
        connection, stream = self._held[-1]
        return connection.finish(stream)

    def settle(self) -> None:
        """Wait until the proxy has read all requests."""
        for connection in self._connections:
            connection.settle()

    def close(self) -> None:
        for connection in self._connections:
            connection.socket.close()


class _Connection:
    """A TCP connection that carries many half-sent requests."""

    def __init__(self, site: Site, address: str) -> None:
        self.socket = site.connect(AUTH, address, protocol="h2")
        self._state = H2Connection(H2Configuration(client_side=True))
        self._state.initiate_connection()
        self._read_until(RemoteSettingsChanged)

    def open(self) -> int:
        stream = self._state.get_next_available_stream_id()
        pseudo = {":method": "POST", ":scheme": "https", ":authority": AUTH, ":path": "/sessions"}
        self._state.send_headers(stream, list({**pseudo, **HEADERS}.items()))
        self._state.send_data(stream, BODY[:1])
        self._send()
        return stream

    def drop(self, stream: int) -> None:
        self._state.reset_stream(stream)
        self._send()

    def finish(self, stream: int) -> int:
        self._state.send_data(stream, BODY[1:], end_stream=True)
        answer = self._read_until(ResponseReceived)
        assert isinstance(answer, ResponseReceived)
        assert answer.stream_id == stream
        return int(dict(answer.headers)[b":status"])

    def settle(self) -> None:
        self._state.ping(b"anything")  # answered in turn, so after all requests have been read
        self._read_until(PingAckReceived)

    def _send(self) -> None:
        self.socket.sendall(self._state.data_to_send())

    def _read_until(self, kind: type[Event]) -> Event:
        self._send()
        while True:
            received = self.socket.recv(65_536)
            assert received, "the proxy has closed the connection"
            events = self._state.receive_data(received)
            self._send()
            if found := [event for event in events if isinstance(event, kind)]:
                return found[0]


def service_connections(site: Site) -> int:
    """Return the number of open connections of the service. /proc/net/tcp may repeat or omit some of them."""
    assert site.service
    sockets = 0
    for descriptor in Path(f"/proc/{site.service.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            sockets += str(descriptor.readlink()).startswith("socket:")
    return sockets - 1  # without the one that listens


@dataclass(frozen=True)
class Figures:
    """What the visitors noticed.

    ``seconds``: of each visit until its answer; infinite where there was none, or a wrong one. ``connections``: the
    most that the service had at once.
    """

    seconds: list[float]
    connections: int

    def share(self, within: float) -> float:
        """Return the share of the visits that were answered within so many seconds."""
        return sum(one <= within for one in self.seconds) / len(self.seconds)

    def __str__(self) -> str:
        p99 = sorted(self.seconds)[math.ceil(0.99 * len(self.seconds)) - 1]
        return (
            f"{len(self.seconds)} visits, {self.share(1):.1%} within 1 s, p99 {p99:.3f} s, "
            f"worst {max(self.seconds):.3f} s; at most {self.connections} connections to the service"
        )


def visit(site: Site, cookie: str, seconds: float) -> Figures:
    """Ask for ``/health`` and for a page of the application in turn, at a steady rate, each on a new connection."""
    pages: Iterable[str] = itertools.cycle([f"{site.auth}/health", f"{site.app}/page"])

    def get(url: str, began: float) -> float:
        try:
            answered = site.request("GET", url, cookie=cookie).status == 200
        except (OSError, HTTPException):
            answered = False
        return time.monotonic() - began if answered else math.inf

    began, most, sent = time.monotonic(), 0, []
    with ThreadPoolExecutor(VISITOR_THREADS) as pool:
        for number, url in zip(range(int(VISITS * seconds)), pages):
            time.sleep(max(0.0, began + number / VISITS - time.monotonic()))
            sent.append(pool.submit(get, url, time.monotonic()))
            most = max(most, service_connections(site))
        return Figures([one.result() for one in sent], most)
