"""The HTTP parser: what it refuses, and that it understands what it accepts as waitress does."""

from __future__ import annotations

import time

import pytest
from waitress.buffers import OverflowableBuffer

from tests.cases import each
from tests.parsers import LIMITS, describe, feed, is_accepted
from web.parser import SINGLE_HEADERS, StrictChunkedReceiver, StrictParser

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def parsed(stream: bytes, size: int = 0) -> StrictParser:
    parser = StrictParser(LIMITS)
    feed(parser, stream, size)
    return parser


def status(stream: bytes, size: int = 0) -> int | None:
    """Return the status with which a request is refused, or None if its head is accepted."""
    parser = parsed(stream, size)
    assert parser.headers_finished
    return parser.error.code if parser.error else None


# The request line


@each(
    "line",
    [
        b"GET / HTTP/0.9",
        b"GET / HTTP/1.2",
        b"GET / HTTP/2.0",
        b"GET / HTTP/1.10",
        b"GET / HTTP/11",
        b"GET / http/1.1",
        b"GET /",
        b"GET  / HTTP/1.1",
        b"GET /  HTTP/1.1",
        b"GET\t/ HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b"GET / HTTP/1.1\r",
        b"get / HTTP/1.1",
        b"G(T / HTTP/1.1",
        b"G\xc9T / HTTP/1.1",
        b" / HTTP/1.1",
        b"GET HTTP/1.1",
        b"GET a HTTP/1.1",
        b"GET a/b HTTP/1.1",
        b"GET ?a HTTP/1.1",
        b"GET /#a HTTP/1.1",
        b"GET /?a#b HTTP/1.1",
        b"GET http://[ HTTP/1.1",
        b"GET http:/// HTTP/1.1",
        b"GET http://user@a/ HTTP/1.1",
        b"GET http://a\\@b/ HTTP/1.1",
        b"GET ftp://a/ HTTP/1.1",
        b"CONNECT a:443 HTTP/1.1",
        b"CONNECT / HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
    ],
)
def test_a_malformed_request_line_is_refused(line: bytes) -> None:
    assert status(line + b"\r\nHost: a\r\n\r\n") == 400


UNPRINTABLE = [bytes([byte]) for byte in (*range(33), *range(127, 256))]


@each("target", [b"/a%bc", b"/?a%bc", b"http://a/b%bc", b"http://a/%b?c"])
def test_a_target_has_printable_characters_of_ascii_only(target: bytes) -> None:
    for byte in UNPRINTABLE:
        assert status(b"GET " + target.replace(b"%b", byte) + b" HTTP/1.1\r\nHost: a\r\n\r\n") == 400, byte
    assert status(b"GET " + target.replace(b"%b", b"b") + b" HTTP/1.1\r\nHost: a\r\n\r\n") is None


@each(
    ("target", "path", "query"),
    [
        (b"/a?b=c?d", "/a", "b=c?d"),
        (b"//a", "//a", ""),
        (b"/a?", "/a", ""),
        (b"/%2e%ff", "/.\xff", ""),
        (b'/a:b;c@d!"<>[]{}|^`\\?"<>[]{}|^`\\', '/a:b;c@d!"<>[]{}|^`\\', '"<>[]{}|^`\\'),
    ],
)
def test_a_target_is_split_into_path_and_query(target: bytes, path: str, query: str) -> None:
    parser = parsed(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (parser.error, parser.path, parser.query, parser.request_uri) == (None, path, query, target.decode())


@each("version", [b"1.0", b"1.1"])
@each(
    ("target", "host", "uri"),
    [
        (b"http://b/health", b"b", "/health"),
        (b"http://b//a?c=http://d", b"b", "//a?c=http://d"),
        (b"HTTP://Auth.Example.COM/a?c", b"auth.example.com:80", "/a?c"),
        (b"http://b:80/", b"B", "/"),
        (b"https://b:443/a", b"b", "/a"),
        (b"https://b/a", b"b:443", "/a"),
        (b"http://b:443/a", b"b:443", "/a"),
        (b"HTTPS://b:1", b"b:1", "/"),
        (b"http://[::1]?c", b"[::1]", "/?c"),
    ],
)
def test_a_target_in_absolute_form_has_the_authority_of_host(
    target: bytes, host: bytes, uri: str, version: bytes
) -> None:
    parser = parsed(b"GET " + target + b" HTTP/" + version + b"\r\nHost: " + host + b"\r\n\r\n")
    assert (parser.error, parser.request_uri) == (None, uri)
    assert f"{parser.path}?{parser.query}".removesuffix("?") == uri


@each("version", [b"1.0", b"1.1"])
@each(
    ("target", "host"),
    [
        (b"http://b/", b"a"),
        (b"http://b", b"a"),
        (b"http://b:81/", b"b"),
        (b"http://b/", b"b:443"),
        (b"https://b/", b"b:80"),
        (b"http://b:443/", b"b"),
        (b"http://b:080/", b"b"),
        (b"http://b:80:80/", b"b:80"),
        (b"http://b./", b"b"),
        (b"http://www.b/", b"b"),
        (b"http://[::1]/", b"[0::1]"),
        (b"http://user@b/", b"b"),
        (b"http:///", b"b"),
        (b"http://b/", None),
        (b"http://unnamed/", None),
        (b"http://:80/", None),
    ],
)
def test_a_target_of_another_authority_than_host_is_refused(target: bytes, host: bytes | None, version: bytes) -> None:
    fields = b"" if host is None else b"Host: " + host + b"\r\n"
    assert status(b"GET " + target + b" HTTP/" + version + b"\r\n" + fields + b"\r\n") == 400


@each("blank", [b" ", b"\t", b"\v", b"\f", b"\n", b"\r", b"\0", b"\x1c", b"\x85", b"\xa0", b"\r\n "])
def test_a_blank_before_the_request_line_is_refused(blank: bytes) -> None:
    assert status(blank + HEAD + b"\r\n") == 400


def test_one_empty_line_before_the_request_line_is_accepted() -> None:
    assert status(b"\r\n" + HEAD + b"\r\n") is None


@pytest.mark.parametrize("size", [0, 1])
def test_a_second_empty_line_is_refused_at_once(size: int) -> None:
    assert status(b"\r\n\r\n", size) == 400


# The headers


def once(name: str) -> bytes:
    value = b"chunked" if name == "TRANSFER_ENCODING" else b"5"
    host = b"" if name == "HOST" else b"Host: a\r\n"
    return b"POST / HTTP/1.1\r\n" + host + name.replace("_", "-").encode() + b": " + value + b"\r\n"


@each("name", sorted(SINGLE_HEADERS))
def test_a_repeated_header_is_refused_where_it_matters_which_one_counts(name: str) -> None:
    again = once(name).rpartition(b"\r\n")[0].rpartition(b"\r\n")[2].lower()
    assert status(once(name) + b"\r\n") is None
    assert status(once(name) + again + b"\r\n\r\n") == 400


def test_any_other_header_may_be_repeated() -> None:
    assert parsed(HEAD + b"X-A: b\r\nx-a:c\r\nX-A:\r\n\r\n").headers["X_A"] == "b, c, "


@each("line", [b"X\r\n", b": a\r\n", b"X : a\r\n", b" X: a\r\n", b"X: a\r\n b\r\n", b"X: a\r\n\tb\r\n"])
def test_a_malformed_or_folded_header_is_refused(line: bytes) -> None:
    assert status(HEAD + line + b"\r\n") == 400


@pytest.mark.parametrize(
    ("template", "allowed"),
    [
        (b"X%bY: a", set(b"!#$%&'*+-.^_`|~:") | {byte for byte in range(128) if chr(byte).isalnum()}),
        (b"X: a%bb", {9, *range(32, 127), *range(128, 256)}),
    ],
    ids=["name", "value"],
)
def test_only_the_bytes_of_the_grammar_stand_in_a_header(template: bytes, allowed: set[int]) -> None:
    for byte in range(256):
        stream = HEAD + template.replace(b"%b", bytes([byte])) + b"\r\n\r\n"
        assert status(stream) == (None if byte in allowed else 400), byte


@each(("line", "value"), [(b"X:a", "a"), (b"X: \t a b\t ", "a b"), (b"X:", ""), (b"x: \xa0\xff", "\xa0\xff")])
def test_spaces_and_tabs_around_a_value_do_not_belong_to_it(line: bytes, value: str) -> None:
    assert parsed(HEAD + line + b"\r\n\r\n").headers["X"] == value


def test_a_name_with_an_underscore_is_dropped_as_it_could_stand_for_another() -> None:
    parser = parsed(HEAD + b"X_Forwarded_For: b\r\nContent_Length: 5\r\nHos_t: c\r\n\r\n")
    assert (parser.completed, parser.headers) == (True, {"HOST": "a"})


@each("value", [b" " * 15_000 + b"b", b" " * 15_000 + b"\0", b"b " * 7000 + b"\0", b"\t" * 15_000])
def test_a_head_of_spaces_is_parsed_in_linear_time(value: bytes) -> None:
    began = time.process_time()
    parsed(HEAD + b"X:" + value + b"\r\n\r\n")
    assert time.process_time() - began < 0.2  # 0.0002 s; waitress takes 2 s and more


@pytest.mark.parametrize(("count", "expected"), [(100, None), (101, 431), (3000, 431)])
def test_a_request_has_at_most_100_headers(count: int, expected: int | None) -> None:
    assert status(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * (count - 1) + b"\r\n") == expected


@each("size", [0, 1000])
@each(("length", "expected"), [(16_383, None), (16_384, 431), (20_000, 431)])
def test_a_head_of_16_kib_is_refused(length: int, expected: int | None, size: int) -> None:
    head = (HEAD + b"X: ").ljust(length - 4, b"a") + b"\r\n\r\n"
    assert status(head, size) == expected


@pytest.mark.parametrize("size", [0, 1000])
def test_a_head_without_end_is_refused(size: int) -> None:
    assert status(HEAD + b"X: " + b"a" * 17_000, size) == 431


HOSTS = (
    b"localhost localhost:5000 127.0.0.1 0.0.0.0:5000 [::1] [::]:5000 [::1]:65535 [::ffff:1.2.3.4] [fe80::1%eth0] "
    b"[fe80::1%25eth0]:80 a a. auth.example.com my_service:1 xn--bcher-kva.example 1.2.3"
).split()
ODD_HOSTS = [
    *b", : :80 . a..b .a a:b a: a:+1 a:1:2 a:65536 a:123456 a,b a/b a@b a?b a#b a\\b".split(),
    *b"[] [::1 ::1 [::1]a [g::1] [:::] [1.2.3.4] [v1.a] [::1%] [::1]: b\xc3\xbcg %61 a%00 a;b (a)".split(),
    b"",
    b"a b",
    b"a, b",
    b"a\tb",
]


@each("host", HOSTS)
def test_a_name_or_an_address_is_a_host(host: bytes) -> None:
    assert status(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n") is None


@each("version", [b"1.0", b"1.1"])
@each("host", ODD_HOSTS)
def test_an_odd_host_is_refused(host: bytes, version: bytes) -> None:
    assert status(b"GET / HTTP/" + version + b"\r\nHost: " + host + b"\r\n\r\n") == 400


def test_only_http_1_0_may_lack_a_host() -> None:
    assert status(b"GET / HTTP/1.0\r\n\r\n") is None
    assert status(b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n") == 400


@each("version", [b"1.0", b"1.1"])
@each(
    ("lines", "option"),
    [
        (b"Connection: close", "close"),
        (b"Connection: CLOSE , x", "close"),
        (b"Connection: x,\tClose", "close"),
        (b"Connection: x\r\nConnection: close\r\nConnection: y", "close"),
        (b"Connection: keep-alive, close", "close"),
        (b"Connection: close, keep-alive", "close"),
        (b"Connection: Keep-Alive, x", "keep-alive"),
        (b"Connection: x-close, closed", ""),
        (b"Connection:", ""),
    ],
)
def test_the_option_of_a_connection_is_found_in_a_list(lines: bytes, option: str, version: bytes) -> None:
    parser = parsed(b"GET / HTTP/" + version + b"\r\nHost: a\r\n" + lines + b"\r\n\r\n")
    assert parser.headers["CONNECTION"] == option


# The length of a body


@each("length", [b"", b"+1", b"-1", b"1_0", b"0x1", b"1, 1", b"1.0", b"1e1", b"a", b"\xb2", b"9" * 19, b"9" * 5000])
def test_a_malformed_length_is_refused(length: bytes) -> None:
    assert status(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: " + length + b"\r\n\r\n") == 400


@each(
    ("head", "expected"),
    [
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\nTransfer-Encoding: chunked", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding:", 400),
        *[
            (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: " + value, 501)
            for value in (
                b"",
                b",",
                b",chunked",
                b"chunked,",
                b"chunked, chunked",
                b"gzip, chunked",
                b"xchunked",
                b"\xa0chunked",
            )
        ],
    ],
)
def test_an_ambiguous_length_is_refused(head: bytes, expected: int) -> None:
    assert status(head + b"\r\n\r\n0\r\n\r\n") == expected


def test_an_encoding_is_read_in_any_letter_case() -> None:
    stream = b"POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding:CHUNKED\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    assert describe(parsed(stream))["body"] == b"hi"


@each(
    ("length", "refusal", "expects"),
    [(b"5", None, True), (b"16384", None, True), (b"16385", 413, False), (b"0", None, False)],
)
def test_100_continue_is_only_sent_for_a_body_that_is_accepted(
    length: bytes, refusal: int | None, expects: bool
) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: " + length + b"\r\n\r\n"
    parser = parsed(head)
    assert (parser.error and parser.error.code) == refusal
    assert parser.expect_continue == expects
    assert not parsed(head.replace(b"1.1", b"1.0")).expect_continue
    assert not parsed(head.replace(b"Continue", b"continue, x")).expect_continue


# Chunked bodies


@each("size", [0, 1, 2, 3, 7])
@each(
    ("stream", "body"),
    [
        (b"0\r\n\r\n", b""),
        (b"2\r\nhi\r\n0\r\n\r\n", b"hi"),
        (b"00000002\r\n\r\n\r\na\r\n" + b"b" * 10 + b"\r\n0\r\n\r\n", b"\r\n" + b"b" * 10),
        (b"0A\r\n0\r\n\r\n1\r\n\r\n\r\n1\r\nx\r\n0\r\n\r\n", b"0\r\n\r\n1\r\n\r\nx"),
    ],
)
def test_a_chunked_body_is_read(stream: bytes, body: bytes, size: int) -> None:
    parser = StrictParser(LIMITS)
    consumed = feed(parser, CHUNKED + stream + b"GET", size)
    expected = len(CHUNKED + stream)
    assert expected <= consumed < expected + max(size, 1)  # whole pieces; a piece may end behind the request
    assert describe(parser)["body"] == body
    assert parser.headers["CONTENT_LENGTH"] == str(len(body))


@each(
    "stream",
    [
        b"\n",
        b" ",
        b"\r",
        b";",
        b"g",
        b"+",
        b"-",
        b"0x",
        b"2\n",
        b"2 ",
        b"2;",
        b"2\t",
        b"2\r\r",
        b"2\r2",
        b"_",
        b"123456789",
        b"00000000",
        b"00\r",
        b"0\n",
        b"0;",
        b"0\r\nX",
        b"0\r\n\n",
        b"0\r\n\r\r",
        b"2\r\nhi\n",
        b"2\r\nhi0",
        b"2\r\nhi\r0",
        b"2\r\nhi\r\r",
        b"2\r\nhi\r\n\r",
        b"2\r\nhi\r\n\n",
        b"2\r\nhi\r\n ",
        b"2\r\nhi\r\n0\r\n\x00",
    ],
)
def test_a_chunked_body_is_refused_at_its_first_wrong_byte(stream: bytes) -> None:
    for size in 0, 1, 2, 3, 7:
        assert status(CHUNKED + stream, size) == 400
        assert not parsed(CHUNKED + stream[:-1], size).completed
    parser = StrictParser(LIMITS)
    tail = CHUNKED + stream + b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n"
    assert feed(parser, tail) == len(tail)  # nothing that was read with it is taken as a request


def test_every_beginning_of_a_chunked_body_may_be_continued() -> None:
    stream = b"1\r\na\r\n12345678\r\n"
    for end in range(len(stream) + 1):
        receiver = StrictChunkedReceiver(OverflowableBuffer(2**20))
        assert receiver.received(stream[:end]) == end
        assert not receiver.error
        assert not receiver.completed


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.slow
def test_many_small_chunks_are_read_in_linear_time(size: int) -> None:
    def seconds(chunks: int) -> float:
        receiver, stream = StrictChunkedReceiver(OverflowableBuffer(2**20)), b"1\r\na\r\n" * chunks + b"0\r\n\r\n"
        began = time.process_time()
        for at in range(0, len(stream), size):
            receiver.received(stream[at : at + size])
        assert (receiver.completed, len(receiver)) == (True, chunks)
        return time.process_time() - began

    assert min(seconds(5000) for _ in range(3)) < 40 * min(seconds(500) for _ in range(3))


# A request that is refused


@each(
    ("stream", "command"),
    [
        (b"HEAD / HTTP/9\r\n\r\n", "HEAD"),
        (b"\r\nHEAD / HTTP/9\r\n\r\n", "HEAD"),
        (b"HEAD / HTTP/1.1\r\nX: " + b"a" * 17_000, "HEAD"),
        (b"HEADER / HTTP/9\r\n\r\n", ""),
        (b"GET / HTTP/9\r\n\r\n", ""),
        (b"DELETE / HTTP/1.1\r\n\r\n", "DELETE"),
    ],
)
def test_a_refused_request_has_all_attributes(stream: bytes, command: str) -> None:
    parser = parsed(stream)
    assert parser.error
    assert parser.command == command
    assert isinstance(parser.path + parser.query + parser.request_uri, str)


def test_what_follows_a_refused_head_is_not_read() -> None:
    stream = b"GET / HTTP/9\r\n\r\n" + HEAD + b"\r\n"
    assert parsed(stream).error
    assert feed(StrictParser(LIMITS), stream) == len(stream)


# Compared with waitress

ACCEPTED = (
    b"GET /ab?c=%d&e HTTP/1.1\r\nHost: f:1\r\nCookie: g=h; i=j\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nX-A: k l\r\nhost: m\r\nConnection: close\r\n\r\nGET",
    b"DELETE /ab HTTP/1.1\r\nHost: a\r\nB: " + b"x y" * 25 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nhi",
    b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\nx-a: c\r\n\r\n",
    b"GET / HTTP/1.0\r\nX_A: b\r\nX:\r\n\r\n",
    b"GET http://a:1/b%41?c HTTP/1.1\r\nHost: a:1\r\n\r\n",
)
# All bytes of ASCII that are not alphanumeric, two that are, and some others.
BYTES = b"aA0\x80\x85\xa0\xff" + bytes(byte for byte in range(128) if not chr(byte).isalnum())
# Of those that all parsers treat alike, one.
FEW_BYTES = b"aA0\0\t\n\v\r\x1c :-_/\x7f\x85\xa0"


@each("request_bytes", ACCEPTED)
@pytest.mark.slow
def test_an_accepted_request_is_understood_as_waitress_does(request_bytes: bytes) -> None:
    assert is_accepted(request_bytes)
    replacements = BYTES if request_bytes == ACCEPTED[0] else FEW_BYTES
    for at in range(len(request_bytes)):  # without this byte, with another one instead, and with another one before it
        before, after = request_bytes[:at], request_bytes[at + 1 :]
        is_accepted(before + after)
        for byte in replacements:
            is_accepted(before + bytes([byte]) + after)
            is_accepted(before + bytes([byte]) + request_bytes[at:])


@each("request_bytes", ACCEPTED)
def test_a_request_is_understood_alike_in_pieces_of_any_size(request_bytes: bytes) -> None:
    for stream in (
        request_bytes,
        request_bytes[: len(request_bytes) // 2] + b"\0" + request_bytes,
        b"\r\n" + request_bytes,
    ):
        whole = describe(parsed(stream))
        assert all(describe(parsed(stream, size)) == whole for size in (1, 2, 3, 5, 8, 13))
