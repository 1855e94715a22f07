"""Peers that hold connections, and an honest client that asks for ``/health`` on new connections meanwhile."""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.conftest import Service

PEERS = 600  # connections that an attacker holds
MAX_RESIDENT = 80 * 2**20  # bytes of memory of the service

HEAD = b"Host: x\r\nX-Forwarded-Proto: https\r\nX-Forwarded-For: %s\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n" + HEAD % b"192.0.2.1" + b"Connection: close\r\n\r\n"


class Honest(threading.Thread):
    """Asks for ``/health`` twenty times a second, each time on a new connection, however long the answers take."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.seconds: list[float] = []  # until the whole answer; infinite where it failed
        self.stopping = threading.Event()
        self.start()

    def run(self) -> None:
        with ThreadPoolExecutor(200) as pool:  # one request that waits must not keep back the next ones
            while not self.stopping.wait(0.05):
                pool.submit(self._ask)

    def _ask(self) -> None:
        began = time.monotonic()
        answer = b""
        with contextlib.suppress(OSError), socket.create_connection(self.address, timeout=5) as connection:
            connection.sendall(HEALTH)
            while chunk := connection.recv(65_536):
                answer += chunk
        self.seconds.append(time.monotonic() - began if answer.startswith(b"HTTP/1.1 200 ") else float("inf"))

    def within_a_second(self) -> float:
        """Stop, and return the share of requests that were answered within a second."""
        self.stopping.set()
        self.join(20)
        return sum(seconds <= 1 for seconds in self.seconds) / len(self.seconds)


class Peers:
    """Connections that send ``beginning``, and then read ``bytes_read`` every ten seconds. Closed ones are replaced."""

    def __init__(self, address: tuple[str, int], beginning: Callable[[int], bytes], bytes_read: int = 0) -> None:
        self.address, self.beginning, self.bytes_read = address, beginning, bytes_read
        self.opened = 0
        self._open: dict[socket.socket, float] = {}  # with the time of the last reading

    def hold(self, seconds: float, a_second: float) -> None:
        """Open PEERS connections within two seconds, and then at most ``a_second`` further ones each second."""
        began = time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            allowed = min(PEERS, (now - began) * PEERS / 2) + max(0, now - began - 2) * a_second
            while len(self._open) < PEERS and self.opened < allowed:
                self._dial()
            for connection, since in list(self._open.items()):
                if self.bytes_read and now - since >= 10:
                    self._open[connection] = now
                    with contextlib.suppress(OSError):
                        connection.recv(self.bytes_read)
                if not is_open(connection):
                    self._drop(connection)
            time.sleep(0.05)

    def close(self) -> None:
        for connection in list(self._open):
            self._drop(connection)

    def _dial(self) -> None:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(self.address)
        connection.setblocking(False)
        self.opened += 1
        with contextlib.suppress(BlockingIOError):
            connection.send(self.beginning(self.opened))
        self._open[connection] = time.monotonic()

    def _drop(self, connection: socket.socket) -> None:
        del self._open[connection]
        connection.close()


def is_open(connection: socket.socket) -> bool:
    """Return whether the server has not closed a connection of which nobody has read all that came."""
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False


def peak_memory(service: Service) -> int:
    """Return the largest resident size so far, in bytes."""
    lines = Path(f"/proc/{service.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def one_client(number: int) -> bytes:
    return b"203.0.113.5"


def many_clients(number: int) -> bytes:
    return b"203.0.%d.%d" % (number // 250, number % 250)


def half_body(client: Callable[[int], bytes]) -> Callable[[int], bytes]:
    head = b"POST /sessions HTTP/1.1\r\n" + HEAD + b"Content-Length: 100\r\n\r\n"
    return lambda number: head % client(number) + b"e"


def pages(client: Callable[[int], bytes]) -> Callable[[int], bytes]:
    return lambda number: (b"GET /pages/script.js HTTP/1.1\r\n" + HEAD % client(number) + b"\r\n") * 300


ATTACKS: dict[str, tuple[Callable[[int], bytes], int]] = {
    "half a head": (lambda number: b"GET / HTTP/1.1\r\nHost: x\r\n", 0),
    "half a body of one client": (half_body(one_client), 0),
    "half a body of many clients": (half_body(many_clients), 0),
    "silence": (lambda number: b"", 0),
    "answers that nobody reads": (pages(many_clients), 0),
    "answers that are read slowly": (pages(many_clients), 3000),
}


def withstands(service: Service, attack: str, seconds: float) -> None:
    """Attack the service for so many seconds, and assert that it answers others in time and needs little memory."""
    peers = Peers(service.address, *ATTACKS[attack])
    honest = Honest(service.address)
    peers.hold(seconds, a_second=100)
    share, memory = honest.within_a_second(), peak_memory(service)
    peers.close()
    slowest = sorted(honest.seconds)
    p99 = slowest[int(len(slowest) * 0.99)]
    print(
        f"{share:.1%} of {len(slowest)} within 1 s, median {statistics.median(slowest):.4f} s, p99 {p99:.2f} s, ",
        end="",
    )
    print(f"worst {slowest[-1]:.2f} s; {peers.opened} connections opened; resident {memory / 2**20:.0f} MB")
    assert share >= 0.97
    assert memory < MAX_RESIDENT
