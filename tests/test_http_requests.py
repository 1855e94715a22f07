"""HTTP as bytes: a request that a proxy could read in another way is refused, and so is a body without end."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.cases import each
from tests.conftest import Service
from tests.production import OTHER_ORIGIN, PUBLIC_URL, proxied_service, send

pytestmark = pytest.mark.process

HOST = "Host: x\r\n"
BODY = "Content-Length: 5\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
GIGABYTE = "Content-Length: 1000000000\r\n"


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with proxied_service(tmp_path_factory.mktemp("service")) as service:
        yield service


AMBIGUOUS = {
    "length and encoding": f"POST / HTTP/1.1\r\n{HOST}{BODY}{CHUNKED}\r\n0\r\n\r\n",
    "encoding and length": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}{BODY}\r\n0\r\n\r\n",
    "encoding repeated in one line": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "encoding repeated": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}{CHUNKED}\r\n0\r\n\r\n",
    "two different encodings": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "unknown encoding": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "encoding after a tab": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "encoding before a space": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "empty encoding": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "encoding is a comma": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: ,\r\n\r\n0\r\n\r\n",
    "encoding before a comma": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
    "encoding beside an underscored name": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}X_Y: a\r\n{BODY}\r\n0\r\n\r\n",
    "encoding in HTTP/1.0": f"POST / HTTP/1.0\r\n{HOST}{CHUNKED}\r\n0\r\n\r\n",
    "no host": "GET / HTTP/1.1\r\n\r\n",
    "two hosts": f"GET / HTTP/1.1\r\n{HOST}Host: y\r\n\r\n",
    "the same host twice": f"GET / HTTP/1.1\r\n{HOST}{HOST}\r\n",
    "two lengths": f"POST / HTTP/1.1\r\n{HOST}{BODY}Content-Length: 6\r\n\r\nhello",
    "the same length twice": f"POST / HTTP/1.1\r\n{HOST}{BODY}{BODY}\r\nhello",
    "two lengths in one line": f"POST / HTTP/1.1\r\n{HOST}Content-Length: 5, 5\r\n\r\nhello",
    "length with a sign": f"POST / HTTP/1.1\r\n{HOST}Content-Length: +5\r\n\r\nhello",
    "negative length": f"POST / HTTP/1.1\r\n{HOST}Content-Length: -5\r\n\r\nhello",
    "length with an underscore": f"POST / HTTP/1.1\r\n{HOST}Content-Length: 1_0\r\n\r\nhellohello",
    "length in hexadecimal": f"POST / HTTP/1.1\r\n{HOST}Content-Length: 0x5\r\n\r\nhello",
    "empty length": f"POST / HTTP/1.1\r\n{HOST}Content-Length:\r\n\r\nhello",
    "chunk size with a prefix": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size with a sign": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n+5\r\nhello\r\n0\r\n\r\n",
    "chunk size with an underscore": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n0_5\r\nhello\r\n0\r\n\r\n",
    "two cookies": f"GET / HTTP/1.1\r\n{HOST}Cookie: a=1\r\nCookie: b=2\r\n\r\n",
    "two content types": f"POST / HTTP/1.1\r\n{HOST}Content-Type: a/b\r\nContent-Type: c/d\r\n{BODY}\r\nhello",
    "two origins": f"POST / HTTP/1.1\r\n{HOST}Origin: {PUBLIC_URL}\r\nOrigin: {OTHER_ORIGIN}\r\n{BODY}\r\nhello",
    "two forwarded protocols": f"GET / HTTP/1.1\r\n{HOST}X-Forwarded-Proto: http\r\nX-Forwarded-Proto: https\r\n\r\n",
    "two authorizations": f"GET / HTTP/1.1\r\n{HOST}Authorization: Bearer a\r\nAuthorization: Bearer a\r\n\r\n",
    "lengths in two letter cases": f"POST / HTTP/1.1\r\n{HOST}CONTENT-length: 5\r\ncontent-LENGTH: 5\r\n\r\nhello",
    "HTTP/0.9": "GET /\r\n\r\n",
    "HTTP/9.9": f"GET / HTTP/9.9\r\n{HOST}\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version number": f"GET / HTTP/\r\n{HOST}\r\n",
    "version in lower case": f"GET / http/1.1\r\n{HOST}\r\n",
    "space after the version": f"GET / HTTP/1.1 \r\n{HOST}\r\n",
    "folded header": f"GET / HTTP/1.1\r\n{HOST}X: a\r\n b\r\n\r\n",
    "header folded with a tab": f"GET / HTTP/1.1\r\n{HOST}X: a\r\n\tContent-Length: 5\r\n\r\n",
    "folded first header": f"GET / HTTP/1.1\r\n X: a\r\n{HOST}\r\n",
    "bare CR": f"GET / HTTP/1.1\r\n{HOST}X: a\rContent-Length: 5\r\n\r\n",
    "bare LF": f"GET / HTTP/1.1\r\n{HOST}X: a\nContent-Length: 5\r\n\r\n",
    "NUL": f"GET / HTTP/1.1\r\n{HOST}X: a\0b\r\n\r\n",
    "no colon": f"GET / HTTP/1.1\r\n{HOST}X\r\n\r\n",
    "no name": f"GET / HTTP/1.1\r\n{HOST}: a\r\n\r\n",
    "blank before the request": f" GET / HTTP/1.1\r\n{HOST}\r\n",
    "two empty lines before the request": f"\r\n\r\nGET / HTTP/1.1\r\n{HOST}\r\n",
    "empty host": "GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "list of hosts": "GET / HTTP/1.1\r\nHost: x, y\r\n\r\n",
    "NUL in the target": f"GET /\0 HTTP/1.1\r\n{HOST}\r\n",
    "space in the target": f"GET / x HTTP/1.1\r\n{HOST}\r\n",
    "fragment": f"GET /profile#x HTTP/1.1\r\n{HOST}\r\n",
    "authority as the target": f"CONNECT x:443 HTTP/1.1\r\n{HOST}\r\n",
    "target of another host": f"GET http://evil/profile HTTP/1.1\r\n{HOST}\r\n",
    "target of another port": f"GET http://x:81/health HTTP/1.1\r\n{HOST}\r\n",
    "asterisk as the target": f"OPTIONS * HTTP/1.1\r\n{HOST}\r\n",
    "empty chunk size": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n\r\n0\r\n\r\n",
    "bare LF after a chunk size": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n5\nhello\r\n0\r\n\r\n",
    "bare LF after a chunk": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n5\r\nhello\n0\r\n\r\n",
    "chunk extension": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n5;a=b\r\nhello\r\n0\r\n\r\n",
    "trailer": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n0\r\nX: a\r\n\r\n",
    "bare LF after the last chunk": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n0\r\n\n",
    "cookie of 20 KiB": f"GET / HTTP/1.1\r\n{HOST}Cookie: {'a' * 20_480}\r\n\r\n",
}


@each("request_text", AMBIGUOUS.values())
def test_an_ambiguous_request_gets_exactly_one_refusal(proxied: Service, request_text: str) -> None:
    answer = send(proxied.address, request_text.encode() + f"GET /smuggled HTTP/1.1\r\n{HOST}\r\n".encode())
    assert answer.count(b"HTTP/1.") == 1
    head, _, body = answer.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] (400|431|501) ", head)
    assert list(json.loads(body)) == ["message"]
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert b"\r\nStrict-Transport-Security: max-age=31536000\r\n" in head


@each(
    "request_text",
    [
        f"GET / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        f"GET / HTTP/1.1\r\n{HOST}X: a\r\nX: b\r\nConnection: close\r\n\r\n",
        f"GET / HTTP/1.1\r\n{HOST}{CHUNKED}Connection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        f"GET /?x=1 HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n",
        f"GET http://x/health HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n",
        f"GET HTTP://X:80?x=1 HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n",
    ],
)
def test_a_well_formed_request_is_served(proxied: Service, request_text: str) -> None:
    assert re.match(rb"HTTP/1\.[01] 200 ", send(proxied.address, request_text.encode()))


@each("target", ["/pro%fffile", "//profile", "/profile/", "http://x//profile", "/%70rofile", "/./profile"])
def test_a_path_must_match_its_route_character_by_character(proxied: Service, target: str) -> None:
    answer = send(proxied.address, f"GET {target} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n".encode())
    assert b" 404 " in answer.partition(b"\r\n")[0]
    assert b"evil" not in answer


def resident_memory(service: Service) -> int:
    """The resident memory of the process in kilobytes."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize(
    "headers", [GIGABYTE, CHUNKED, GIGABYTE + "Expect: 100-continue\r\n"], ids=["length", "chunked", "expect"]
)
def test_a_body_of_one_gigabyte_is_refused_and_not_kept_in_memory(proxied: Service, headers: str) -> None:
    chunk = b"ffff\r\n" + b"x" * 65_535 + b"\r\n" if headers == CHUNKED else b"x" * 65_536

    def stream() -> bytes:
        with socket.create_connection(proxied.address, timeout=10) as connection:
            connection.sendall(f"POST /users HTTP/1.1\r\n{HOST}{headers}\r\n".encode())
            try:
                for _ in range(10**9 // len(chunk)):
                    connection.sendall(chunk)
            except OSError:  # the server closed the connection
                connection.close()
                return b""
            return connection.recv(65_536)

    def refusal() -> bytes:
        with socket.create_connection(proxied.address, timeout=10) as connection:
            connection.sendall(f"POST /users HTTP/1.1\r\n{HOST}{headers}\r\n".encode() + chunk)
            return connection.recv(65_536)

    assert refusal().startswith(b"HTTP/1.1 413 ")
    before = resident_memory(proxied)
    for _ in range(3):
        assert stream() == b""
    assert resident_memory(proxied) - before < 5000
    assert requests.get(proxied.url, timeout=5).status_code == 200
