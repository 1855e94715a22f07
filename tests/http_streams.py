"""Streams of HTTP requests, many of them malformed, and what nginx and our server each take for requests in them.

Each stream is sent over a connection of its own, from a loopback address of its own. So a request that is seen at the
other end can be told to belong to it: our server tells the address of the peer, and nginx forwards it in a header.
"""

from __future__ import annotations

import getpass
import os
import random
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import web.server
from settings import Settings
from tests.crowd import awaited
from tests.proxies import START_TIMEOUT, accepts, program, reserve_port

Seen = tuple[str, str, bytes]  # method, target without scheme and host, body
Log = defaultdict[str, list[Seen]]  # by the address that the stream came from

REFUSALS = {400, 413, 431, 501}
TIMEOUT = 20  # seconds
ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs all addresses of 127.0.0.0/8")
LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


# The grammar. Each choice has a usual outcome, which is right, and odd ones, most of which are wrong.

EMPTY_LINES = [b"\r\n", b"\r\n\r\n", b"\n", b"\r", b" ", b"\t", b"\0"]
METHODS = ["POST", "PUT", "HEAD", "OPTIONS", "get", "M-SEARCH", "A_B", "CONNECT", "G ET", ""]
TARGETS = [
    *[
        "/?a=%00&b#c",
        "//a",
        "/%41",
        "/%zz",
        "/a b",
        "/a\tb",
        "/a\0b",
        "/a\x7fb",
        "/\xe9",
        "/\x85",
        "/?\xff",
        '/"<>\\^`{|}',
    ],
    *[
        "http://a/b",
        "http://a",
        "http://a?b",
        "HTTP://a:1/",
        "http://a b/",
        "http://",
        "ftp://a/",
        "*",
        "a:1",
        "?a",
        "",
    ],
]
VERSIONS = ["HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/01.1", "http/1.1", "HTTP/1.1 ", "HTTP/1", "", "HTTP/1.1\t"]
LINE_ENDS = ["\n", "\r", "\r\r\n", " \r\n", "\n\r\n"]
HOSTS = [
    *[["Host:a"], ["host: localhost:5000"], ["Host: [::1]:80"], ["HOST:\t127.0.0.1\t"], ["Host: [fe80::1%25eth0]"]],
    *[
        [],
        ["Host:"],
        ["Host: a", "Host: a"],
        ["Host : a"],
        ["Host: a b"],
        ["Host: a, b"],
        ["Host: a/b"],
        ["Host: a..b"],
    ],
    *[
        ["Host: a\0"],
        ["Host: [::1"],
        ["Host: :80"],
        ["Host: a:b"],
        ["Host: a@b"],
        ["Host: \xe9"],
        ["Hos_t: a"],
        [" Host: a"],
    ],
]
CONNECTIONS = [
    *[["Connection: close"], ["connection:CLOSE"], ["Connection: Close , x"], ["Connection: x,\tclose"]],
    *[
        ["Connection: x", "Connection: close"],
        ["Connection: keep-alive"],
        ["Connection: keep-alive, x"],
        ["Connection: x"],
    ],
    *[
        ["Connection:"],
        ["Connection : close"],
        ["Connection: keep-alive, close"],
        ["Connection: upgrade", "Upgrade: h2c"],
    ],
]
OTHER_HEADERS = [
    *[
        "X: a",
        "X:",
        "X_Y: a",
        "Content_Length: 5",
        "Transfer_Encoding: chunked",
        "X",
        ": a",
        "X : a",
        "X: a\r\n b",
        "X: \0",
    ],
    *[
        "X: a\rb",
        "X: a\nY: b",
        "X: \xff",
        "X: \x7f",
        "X: \x01",
        "X(: a",
        "\xe9: a",
        "X: a\r\n\tContent-Length: 5",
        "\tX: a",
    ],
    *[
        "Expect: 100-continue",
        "Expect: x",
        "TE: trailers",
        "Trailer: X",
        "Cookie: a=b",
        "X: " + "a" * 9000,
        "X: " + "a" * 17_000,
    ],
]
ENCODINGS = [
    *["Transfer-Encoding:CHUNKED", "Transfer-Encoding: \tchunked\t", "Transfer-Encoding: chunked, chunked"],
    *[
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked,",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding:",
    ],
    *[
        "Transfer-Encoding: identity",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: \x0bchunked",
        "Transfer-Encoding: xchunked",
    ],
    *["Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 3"],
    *[
        "Content-Length: 3\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding:\r\n chunked",
        'Transfer-Encoding: "chunked"',
    ],
]
LENGTHS = [
    *[
        "%d\r\nContent-Length: %d",
        "%d, %d",
        "00%d",
        "+%d",
        "-%d",
        "%d_0",
        "0x%d",
        "%d ",
        "\t%d",
        "%d.0",
        "",
        "\x0b%d",
        "%da",
    ],
    *[
        "%d\r\nContent-Length: 0",
        "99999999999999999999%d",
        "18446744073709551616",
        "4294967296",
        "99999",
        "9223372036854775807",
    ],
]
SIZES = [
    "0%x",
    "000%x",
    "0000000%x",
    "000000000%x",
    "0x%x",
    "+%x",
    "-%x",
    " %x",
    "%x ",
    "\t%x",
    "%x\t",
    "%xg",
    "",
    "_%x",
]
HUGE_SIZES = ["ffffffff", "7fffffffffffffff", "ffffffffffffffff", "10000000000000000%x", "100000000%x"]
EXTENSIONS = [";a", ";a=b", ' ; a = "b"', ";", ";a\n", ';a="\r\n"', ";\r", ";a=\0"]
CHUNK_ENDS = ["\n", "", "\r", "\r\n\r\n", "\n\r\n", "\r\r\n", "X\r\n", " \r\n"]
LAST_CHUNKS = [
    *[
        "00\r\n\r\n",
        "0\n\n",
        "0\r\n\n",
        "0\n\r\n",
        "0\r\nX: y\r\n\r\n",
        "0\r\nX\r\n\r\n",
        "0;a\r\n\r\n",
        "0\r\n",
        "0\r\n\r",
    ],
    *[
        "0 \r\n\r\n",
        "0\r\n \r\n\r\n",
        "0\r\n\r\r\n",
        "0\r\n\0\r\n\r\n",
        "",
        "0\r\n" + LAST.decode(),
        "0\r\n\r\n\r\n",
        "\r\n0\r\n\r\n",
    ],
]


class Grammar:
    """Makes streams from a seed. ``oddity`` is the probability of an odd outcome of a choice."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._oddity = 0.0

    def stream(self) -> bytes:
        """Return one to three requests and a last one that closes the connection."""
        self._oddity = self._random.choice([0.01, 0.02, 0.05, 0.1])
        return b"".join(self._request(number) for number in range(self._random.randint(1, 3))) + LAST

    def _pick(self, usual: Any, odd: Iterable[Any]) -> Any:
        return self._random.choice([*odd]) if self._random.random() < self._oddity else usual

    def _request(self, number: int) -> bytes:
        end = self._pick("\r\n", LINE_ENDS) if self._random.random() < 0.1 else "\r\n"
        method = self._pick(self._random.choice(["GET", "POST"]), METHODS)
        line = [method, self._pick(f"/{number}", TARGETS), self._pick("HTTP/1.1", VERSIONS)]
        framing, body = self._random.choice([lambda: ("", b""), self._sized, self._chunked, self._chunked])()
        headers = [*self._pick(["Host: a"], HOSTS), *self._pick([], CONNECTIONS), *([framing] if framing else [])]
        headers += self._pick([], [[header] for header in OTHER_HEADERS])
        self._random.shuffle(headers)
        lines = [self._pick(" ", ["  ", "\t", ""]).join(line), *headers, ""]
        head = "".join(text + self._pick(end, LINE_ENDS) for text in lines)
        return bytes(self._pick(b"", EMPTY_LINES)) + head.encode("latin-1") + body

    def _sized(self) -> tuple[str, bytes]:
        body = self._data()
        length = len(body) + self._pick(0, [-1, 1, 5, 60])
        return f"Content-Length: {self._pick('%d', LENGTHS)}".replace("%d", str(length)), body

    def _chunked(self) -> tuple[str, bytes]:
        chunks = "".join(self._chunk() for _ in range(self._random.randint(0, 3)))
        body = chunks + self._pick("0\r\n\r\n", LAST_CHUNKS)
        return self._pick("Transfer-Encoding: chunked", ENCODINGS), body.encode("latin-1")

    def _chunk(self) -> str:
        data = self._data().decode("latin-1")
        size = self._pick("%x", [*SIZES, *HUGE_SIZES, "%X"])
        number = len(data) + self._pick(0, [-1, 1, 2, 10])
        size = size.replace("%x", f"{number:x}").replace("%X", f"{number:X}")
        line = size + self._pick("", EXTENSIONS) + self._pick("\r\n", LINE_ENDS)
        return str(line + data + self._pick("\r\n", CHUNK_ENDS))

    def _data(self) -> bytes:
        return self._random.choice(
            [b"a", b"hello", b"\r\n", b"0\r\n\r\n", SMUGGLED, b"0\r\n\r\n" + SMUGGLED, b"b" * 300]
        )


def origin_form(target: str) -> str:
    """Return a target without scheme and host, as nginx forwards it."""
    target = re.sub("^https?://[^/?]*", "", target, flags=re.IGNORECASE)
    return target if target.startswith("/") else "/" + target


class Upstream(socketserver.ThreadingTCPServer):
    """Answers the requests that nginx forwards, and writes them down."""

    allow_reuse_address = daemon_threads = True

    def __init__(self) -> None:
        self.seen: Log = defaultdict(list)
        super().__init__(("127.0.0.1", 0), _Forwarded)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class _Forwarded(socketserver.StreamRequestHandler):
    server: Upstream

    def handle(self) -> None:
        while line := self.rfile.readline().decode("latin-1"):
            method, target, _ = line.split(" ")
            headers = dict(self._header_lines())
            body = self.rfile.read(int(headers.get("Content-Length", 0)))
            self.server.seen[headers["X-Peer"]].append((method, origin_form(target), body))
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def _header_lines(self) -> Iterator[tuple[str, str]]:
        while line := self.rfile.readline().decode("latin-1").strip():
            name, _, value = line.partition(": ")
            yield name, value


@contextmanager
def nginx(folder: Path, upstream: Upstream) -> Iterator[tuple[str, int]]:
    """Run nginx in front of an upstream; yield its address."""
    path, port = program("nginx", "nginx-light"), reserve_port()
    temporary = "".join(f"{name}_temp_path temp;" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    # Without proxy_ignore_client_abort, nginx drops the requests of a client that has closed its side.
    (folder / "nginx.conf").write_text(
        f"""{user} daemon off; pid nginx.pid; worker_processes 1; events {{ worker_connections 1024; }}
        http {{
            access_log off; lingering_timeout 100ms; {temporary}
            upstream recorder {{ server 127.0.0.1:{upstream.server_address[1]}; keepalive 64; }}
            server {{
                listen 127.0.0.1:{port} backlog=1024;
                location / {{
                    proxy_pass http://recorder; proxy_http_version 1.1; proxy_ignore_client_abort on;
                    proxy_pass_request_headers off; proxy_set_header Connection "";
                    proxy_set_header X-Peer $remote_addr;
                }}
            }}
        }}"""
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([path, "-p", str(folder), "-c", "nginx.conf", "-e", "stderr"], stderr=log)
    try:
        assert awaited(lambda: accepts(port), START_TIMEOUT), (folder / "log").read_text()
        yield "127.0.0.1", port
    finally:
        process.terminate()
        process.wait(timeout=20)


class RecordingServer:
    """Our server in this process, with an application that writes down the requests that it gets."""

    def __init__(self) -> None:
        self.seen: Log = defaultdict(list)
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.address = listener.getsockname()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(listener, ready), daemon=True)
        self._thread.start()
        assert ready.wait(TIMEOUT)

    def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        dispatcher = web.server.Dispatcher((), cores=1, settings=Settings(), rank=lambda _: (False, ""))
        self._server = web.server.Server(self._application, listener, dispatcher)
        ready.set()
        self._server.run()

    def _application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        seen = environ["REQUEST_METHOD"], origin_form(environ["REQUEST_URI"]), environ["wsgi.input"].read()
        self.seen[environ["REMOTE_ADDR"]].append(seen)
        start_response("200 OK", [("Content-Length", "0")])
        return []

    def close(self) -> None:
        self._server.stop(signal.SIGUSR1, None)
        self._thread.join(TIMEOUT)


def exchange(address: tuple[str, int], source: str, stream: bytes) -> list[int]:
    """Send a stream from an address of this machine, close our side, and return the statuses of all final answers."""
    with socket.create_connection(address, TIMEOUT, source_address=(source, 0)) as connection:
        answers = b""
        with suppress(ConnectionError):
            connection.sendall(stream)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65_536):
                answers += chunk
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] ([2-5]\d\d) ", answers)]


def compare(ours: tuple[list[Seen], list[int]], theirs: tuple[list[Seen], list[int]]) -> str:
    """Return who accepts a whole stream. Raise AssertionError where the two see different requests in it."""
    (our_requests, our_statuses), (their_requests, their_statuses) = ours, theirs
    refused = bool(our_statuses) and our_statuses[-1] in REFUSALS
    assert our_statuses[: len(our_requests)] == [200] * len(our_requests)
    assert len(our_statuses) == len(our_requests) + refused  # nothing is answered after a refusal
    accepted = their_statuses == [200] * len(their_requests)
    # Where one of them refuses the rest, the other one may see more requests.
    ends = [len(our_requests)] * refused + [len(their_requests)] * (not accepted)
    end = min(ends, default=None)
    assert our_requests[:end] == their_requests[:end]
    return f"{'refused' if refused else 'accepted'} by us, {'accepted' if accepted else 'refused'} by nginx"


def compare_streams(folder: Path, seed: int, count: int) -> Counter[str]:
    """Send the streams of a seed to nginx and to our server. Return how many of them each accepts."""
    grammar = Grammar(seed)
    streams = {f"127.1.{number // 250}.{number % 250 + 1}": grammar.stream() for number in range(count)}
    upstream, server = Upstream(), RecordingServer()
    try:
        with nginx(folder, upstream) as proxy, ThreadPoolExecutor(16) as pool:
            theirs = list(pool.map(lambda item: exchange(proxy, *item), streams.items()))
            ours = list(pool.map(lambda item: exchange(server.address, *item), streams.items()))
    finally:
        server.close()
        upstream.shutdown()
        upstream.server_close()
    outcomes: Counter[str] = Counter()
    for (source, stream), our_statuses, their_statuses in zip(streams.items(), ours, theirs, strict=True):
        found = (server.seen[source], our_statuses), (upstream.seen[source], their_statuses)
        try:
            outcomes[compare(*found)] += 1
        except AssertionError as error:
            raise AssertionError(f"{stream!r}: we saw {found[0]}, nginx {found[1]}") from error
    return outcomes
