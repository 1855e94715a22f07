"""The HTTP parser: what it refuses, and that its shortcut for plain heads understands them as waitress does."""

from __future__ import annotations

import pytest

from tests.parsers import LIMITS, takes_shortcut
from web.parser import SINGLE_HEADERS, StrictParser


def parsed(stream: bytes) -> StrictParser:
    parser = StrictParser(LIMITS)
    parser.received(stream)
    return parser


@pytest.mark.parametrize("name", SINGLE_HEADERS)
def test_a_repeated_header_is_refused_where_it_matters_which_one_counts(name: bytes) -> None:
    value = b"chunked" if name == b"transfer-encoding" else b"5"
    host = b"" if name == b"host" else b"Host: a\r\n"
    once = b"POST / HTTP/1.1\r\n" + host + name + b": " + value + b"\r\n"
    assert not parsed(once + b"\r\n").error
    assert parsed(once + name.upper() + b": " + value + b"\r\n\r\n").error.code == 400


def test_any_other_header_may_be_repeated() -> None:
    assert parsed(b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\nx-a: c\r\n\r\n").headers["X_A"] == "b, c"


@pytest.mark.parametrize(
    "head",
    [
        b"GET http://[ HTTP/1.1\r\nHost: a",
        b"GET / HTTP/0.9\r\nHost: a",
        b"GET / http/1.1\r\nHost: a",
        b"GET /\r\nHost: a",
        b"GET / HTTP/1.1\r\nHost: a\r\nB: c\r\n d",
        b"GET / HTTP/1.1\r\nHost: a\r\nB: c\r\n\td",
        b"GET / HTTP/1.1\r\nX-A: b",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ,chunked",
    ],
)
def test_an_ambiguous_head_is_refused(head: bytes) -> None:
    assert parsed(head + b"\r\n\r\n").error.code == 400


@pytest.mark.parametrize(
    ("length", "status", "expects"), [(b"5", None, True), (b"16384", None, True), (b"16385", 413, False)]
)
def test_100_continue_is_only_sent_for_a_body_that_is_accepted(
    length: bytes, status: int | None, expects: bool
) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: " + length + b"\r\n\r\n"
    parser = parsed(head)
    assert (parser.error and parser.error.code) == status
    assert bool(parser.expect_continue) == expects


# The shortcut

PLAIN = (
    b"GET /ab?c=%d&e HTTP/1.1\r\nHost: f:1\r\nCookie: g=h; i=j\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nX-A: k l\r\nhost: m\r\nConnection: close\r\n\r\nGET",
    b"DELETE /ab HTTP/1.1\r\nHost: a\r\nB: " + b"x y" * 25 + b"\r\n\r\n",
)
NOT_PLAIN = (
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nhi",
    b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\nx-a: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: b\r\nCookie: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nB: c\r\n d\r\n\r\n",
    b"GET / http/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n",
)
# All bytes of ASCII that are not alphanumeric, two that are, and some others.
BYTES = b"aA0\x80\x85\xa0\xff" + bytes(byte for byte in range(128) if not chr(byte).isalnum())
# Of those that all parsers treat alike, one.
FEW_BYTES = b"aA0\0\t\n\v\r\x1c :-_/\x7f\x85\xa0"


def test_only_a_plain_head_takes_the_shortcut() -> None:
    assert [takes_shortcut(request) for request in PLAIN] == [True] * len(PLAIN)
    assert [takes_shortcut(request) for request in NOT_PLAIN] == [False] * len(NOT_PLAIN)


@pytest.mark.parametrize("request_bytes", PLAIN + NOT_PLAIN, ids=range(len(PLAIN + NOT_PLAIN)))
def test_the_shortcut_understands_a_request_as_waitress_does(request_bytes: bytes) -> None:
    replacements = BYTES if request_bytes == PLAIN[0] else FEW_BYTES
    for at in range(len(request_bytes)):  # without this byte, with another one instead, and with another one before it
        before, after = request_bytes[:at], request_bytes[at + 1 :]
        takes_shortcut(before + after)
        for byte in replacements:
            takes_shortcut(before + bytes([byte]) + after)
            takes_shortcut(before + bytes([byte]) + request_bytes[at:])
