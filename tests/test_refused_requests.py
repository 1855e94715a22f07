"""Malformed requests over real sockets: they are refused, the connection is closed, and the service goes on."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Service
from tests.crowd import awaited
from tests.production import post_request, send

pytestmark = pytest.mark.process

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LOGIN = post_request("/sessions", {"email": "in-a-hurry@x.io", "password": "wrong"}).replace(
    b"Connection: close\r\n", b""
)
CHUNKED = b"POST /sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
MALFORMED = (
    b"nonsense\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"HEAD /\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    CHUNKED + b"z",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000,
)
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing discards what was not sent and resets the connection


def statuses(answers: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answers)]


def threads(service: Service) -> int:
    return len(list(Path(f"/proc/{service.process.pid}/task").iterdir()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts the threads in /proc")
def test_clients_that_leave_after_a_malformed_request_crash_nothing(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_THROTTLE="off")
    assert send(service.address, LOGIN + LAST)
    before = threads(service)
    for number in range(2500):
        with socket.create_connection(service.address, timeout=10) as connection:
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.sendall((LOGIN, GET)[number // 2 % 2] + MALFORMED[number % len(MALFORMED)] + GET)
    assert awaited(lambda: statuses(send(service.address, LOGIN + LAST)) == [401, 200], 20)
    assert threads(service) == before
    assert not re.findall('.*(?:sys_crash|"level": "error").*', service.log)


@pytest.mark.parametrize(
    ("refused", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\nHost:\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\r\nGET nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n", 413),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 100000\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 17_000, 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
    ],
)
def test_a_refused_head_request_is_answered_as_get_but_without_a_body(
    service: Service, refused: bytes, status: int
) -> None:
    head, blank, body = send(service.address, refused + GET).partition(b"\r\n\r\n")
    answer = send(service.address, refused.replace(b"GET", b"HEAD") + GET)
    assert (statuses(answer), blank) == ([status], b"\r\n\r\n")
    changing = rb"(?m)^(Date|X-Request-Id): .*$"
    assert re.sub(changing, b"", answer) == re.sub(changing, b"", head + blank)
    assert b"\r\nContent-Length: %d\r\n" % len(body) in answer
    assert re.findall(rb"(?m)^Connection: (.*)\r$", answer) == [b"close"]


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        (b"HTTP/1.1\r\nConnection: close, x", 1),
        (b"HTTP/1.1\r\nConnection: x ,\tCLOSE", 1),
        (b"HTTP/1.1\r\nConnection: x\r\nconnection: close\r\nConnection: y", 1),
        (b"HTTP/1.1\r\nConnection: keep-alive, x", 2),
        (b"HTTP/1.0\r\nConnection: keep-alive, x", 2),
        (b"HTTP/1.0\r\nConnection: keep-alive, close", 1),
        (b"HTTP/1.0\r\nConnection: x", 1),
    ],
)
def test_a_connection_option_is_recognized_in_a_list(service: Service, line: bytes, answers: int) -> None:
    assert statuses(send(service.address, b"GET / " + line + b"\r\nHost: x\r\n\r\n" + LAST)) == [200] * answers


@pytest.mark.parametrize("host", [b"0.0.0.0:5000", b"[::1]", b"[::]:5000", b"localhost", b"localhost:5000", b"[::]"])
def test_the_hosts_of_development_clients_are_accepted(service: Service, host: bytes) -> None:
    assert statuses(send(service.address, LAST.replace(b"Host: x", b"Host: " + host))) == [200]


@pytest.mark.parametrize("first", [b"", GET, LOGIN], ids=["first", "after a page", "after a login"])
@pytest.mark.parametrize("wrong", [b"\n", b"5\n", b"5;a=b\r\n", b"5\r\nhello\n", b"0\r\nX: y\r\n", b"0\r\n\n"])
def test_nothing_is_read_after_a_malformed_chunk(service: Service, wrong: bytes, first: bytes) -> None:
    with socket.create_connection(service.address, timeout=10) as connection:
        connection.sendall(first + CHUNKED + wrong + GET)
        received = b""
        while chunk := connection.recv(65_536):  # the service closes its side at once, long before the timeout
            received += chunk
        assert statuses(received) == {b"": [400], GET: [200, 400], LOGIN: [401, 400]}[first]
        connection.sendall(GET)
        assert connection.recv(65_536) == b""


def test_empty_lines_do_not_keep_a_connection_open(service: Service) -> None:
    with socket.create_connection(service.address, timeout=10) as connection:
        connection.sendall(GET + b"\r\n" + GET + b"\r\n" + b"\r\n")
        assert statuses(b"".join(iter(lambda: connection.recv(65_536), b""))) == [200, 200, 400]
