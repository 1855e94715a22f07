"""An HTTP client, clients that sign in over and over, and what the measurements share."""

from __future__ import annotations

import datetime
import itertools
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
PASSWORD = "correct horse battery staple"
TRIES, PAUSE = 3, 5.0  # of wrk, and seconds between them


class Client:
    """An HTTP client with one connection, which it keeps as long as the server does."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.socket: socket.socket | None = None
        self.left = b""

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: str = ""
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        request = "\r\n".join([*lines, "", body]).encode()
        if self.socket is None:
            self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=120)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.left = b""
        self.socket.sendall(request)
        head = self._until(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in rest if line)]
        found = dict(pairs)
        if found.get("transfer-encoding") == "chunked":
            content = b""
            while size := int(self._until(b"\r\n"), 16):
                content += self._exactly(size + 2)[:-2]
            self._until(b"\r\n")
        else:
            content = self._exactly(int(found.get("content-length", 0)))
        if found.get("connection", "").lower() == "close":
            self.socket.close()
            self.socket = None
        return int(first.split()[1]), pairs, content

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.left:
            self._receive()
        found, _, self.left = self.left.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self.left) < size:
            self._receive()
        found, self.left = self.left[:size], self.left[size:]
        return found

    def _receive(self) -> None:
        assert self.socket
        chunk = self.socket.recv(65536)
        if not chunk:
            self.socket = None
            raise ConnectionResetError
        self.left += chunk


def login(described: dict[str, Any], number: int) -> tuple[str, dict[str, str], str]:
    """Return path, headers and body of the login of one user, from an address of its own."""
    email, password = f"user{number % 1000}@example.com", PASSWORD
    if "json" not in described["headers"].get("Content-Type", ""):
        email, password = quote(email), quote(password)
    body = described["body"].replace("{email}", email).replace("{password}", password)
    address = f"198.18.{number // 250 % 250}.{number % 250 + 1}"
    return described["path"], {"X-Forwarded-For": address, **described["headers"]}, body


def storm(port: int, described: dict[str, Any], clients: int, stop: Any, counts: Any) -> None:
    """Sign in repeatedly from a number of threads, in a process of its own, and count the answers."""
    numbers = itertools.count(1)
    answered: list[int] = []

    def one() -> None:
        client = Client(port)
        while not stop.is_set():
            try:
                status = client.ask("POST", *login(described, next(numbers)))[0]
            except OSError:
                status, client = 0, Client(port)
            answered.append(status)
            if status in (429, 503):
                time.sleep(0.5)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    began, before = time.perf_counter(), len(answered)
    counts.put(None)
    stop.wait()
    took, during = time.perf_counter() - began, answered[before:]
    good = sum(status in described["ok"] for status in during)
    for thread in threads:
        thread.join()
    counts.put((good, len(during) - good, took))


def wrk(
    port: int,
    path: str,
    headers: dict[str, str],
    connections: int,
    seconds: float,
    method: str = "GET",
    *,
    strict: bool,
) -> float:
    """Return the answers per second that wrk counts, without errors; with ``strict`` an error ends the run.

    A machine can stand still for a second, and all local ports can be in use for one. So it is tried again if there was
    no good answer at all.
    """
    options = [part for name, value in headers.items() for part in ("-H", f"{name}: {value}")]
    options += ["-s", str(HERE / "post.lua")] if method == "POST" else []
    for _ in range(TRIES):
        said = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", *options,
             f"http://127.0.0.1:{port}{path}"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        rate, errors = of_wrk(said)
        if rate or (strict and errors):
            break
        time.sleep(PAUSE)
    if strict and (errors or not rate):
        raise SystemExit(f"{path}: {said}")
    return rate  # 0 for a service that is too slow for one answer while many sign in


def of_wrk(said: str) -> tuple[float, int]:
    """Return the good answers per second, and the number of errors, from what wrk printed."""
    found = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
    asked, errors = int(re.findall(r"(\d+) requests in", said)[0]), int(found[1]) if found else 0
    per_second = float(re.findall(r"Requests/sec: +([\d.]+)", said)[0])
    return per_second * (asked - errors) / max(asked, 1), errors


def latencies(
    port: int, path: str, headers: dict[str, str], seconds: float, method: str = "GET", *, strict: bool
) -> list[float]:
    """Send requests one after the other with a pause of 2 ms; return their durations in seconds."""
    client, took, end = Client(port), [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        status, _, _ = client.ask(method, path, headers)
        took.append(time.perf_counter() - began)
        if status != 200 and strict:
            raise SystemExit(f"{path}: {status} under load")
        time.sleep(0.002)
    return took


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def p99(took: list[float]) -> float:
    if len(took) < 100:
        return max(took) * 1000
    return statistics.quantiles(took, n=100)[98] * 1000


T = TypeVar("T")


def in_turn(things: list[T], number: int) -> list[T]:
    """Return the things in the order of this round; every second round is reversed, as a busy machine slows down."""
    return things[::-1] if number % 2 else things


def progress(what: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {what}", file=sys.stderr, flush=True)
