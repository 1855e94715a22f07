"""A strict HTTP request parser, in the place of waitress's.

It keeps the interface of waitress's parser, which is private: hence ``waitress<4`` in pyproject.toml.
"""

import functools
import re
import time
from typing import Any
from urllib.parse import unquote

from waitress.buffers import OverflowableBuffer
from waitress.parser import HTTPRequestParser
from waitress.receiver import ChunkedReceiver, FixedStreamReceiver
from waitress.utilities import BadRequest, RequestEntityTooLarge, RequestHeaderFieldsTooLarge, ServerNotImplemented

from addresses import parse_address

MAX_HEADERS = 100  # in a request; thousands of short ones would take milliseconds

# Headers that must not be repeated: which one counts differs between us and a proxy.
SINGLE_HEADERS = {"HOST", "CONTENT_LENGTH", "TRANSFER_ENCODING", "CONTENT_TYPE"}
SINGLE_HEADERS |= {"COOKIE", "AUTHORIZATION", "ORIGIN", "X_FORWARDED_PROTO"}

# A request line and headers (RFC 9112, 2.2 to 5; RFC 9110, 5.5 and 5.6.2). Browsers send most printable characters as
# they are, so a target may have all but "#". Its form is origin or absolute, as CONNECT and OPTIONS * are for proxies.
# The quantifiers are possessive, so a head that does not match fails in linear time.
HEAD = re.compile(
    r"(?:\r\n)?+(?!CONNECT )(?P<command>[A-Z0-9!#$%&'*+.^_`|~-]++) "
    r"(?:(?=/)|(?P<scheme>(?i:https?))://(?P<authority>[^/?# ]*+))"
    r"(?P<uri>(?P<path>[!\"$->@-~]*+)(?:\?(?P<query>[!\"$-~]*+))?+)"
    r" HTTP/(?P<version>1\.[01])\r\n"
    r"(?P<fields>(?:[A-Za-z0-9!#$%&'*+.^_`|~-]++:[\t -~\x80-\xff]*+\r\n)*+)\r\n"
)

# A name or an address, and a port (RFC 3986, 3.2.2 and 3.2.3; RFC 6874 for the zone). Names have the characters of DNS.
HOST = re.compile(
    r"(?:[\w~-]++(?:\.[\w~-]++)*+\.?+|\[(?P<ipv6>[0-9A-Fa-f]*+:[0-9A-Fa-f:.]++(?:%[\w.~-]++)?+)\])"
    r"(?::(?P<port>[0-9]{1,5}))?+",
    re.ASCII,
)

# What stands between the data of two chunks, or after that of the last one; and each beginning of it.
CHUNK_LINE = re.compile(rb"\r\n(?:0\r\n\r\n|(?!0+\r)(?P<size>[0-9A-Fa-f]{1,8})\r\n)")
CHUNK_LINE_START = re.compile(rb"\r(?:\n(?:0(?:\r(?:\n\r?)?)?|(?!0{8})[0-9A-Fa-f]{1,8}|(?!0+\r)[0-9A-Fa-f]{1,8}\r)?)?")


class StrictChunkedReceiver(ChunkedReceiver):  # type: ignore[misc]
    """Reads a chunked body as RFC 9112, 7.1, defines it, without extensions and trailers.

    waitress's receiver accepts more, which proxies read differently. Here the first wrong byte sets ``error``.
    """

    completed, error = False, None  # as in waitress's class, for mypy
    missing = 0  # bytes of the data of this chunk
    line = b"\r\n"  # what was read since the last data; the first size stands as after the end of a chunk

    def received(self, data: bytes) -> int:
        """Read a part of the stream and return how many bytes of it belong to the body: all, if it is malformed."""
        at = 0
        while at < len(data) and not (self.completed or self.error):
            line = self.line + data[at : at + 12]  # bytes of the longest CHUNK_LINE
            if self.missing:
                piece = data[at : at + self.missing]
                self.buf.append(piece)
                at, self.missing = at + len(piece), self.missing - len(piece)
            elif found := CHUNK_LINE.match(line):
                at += found.end() - len(self.line)
                self.line, self.missing = b"", int(found["size"] or b"0", 16)
                self.completed = not self.missing
            elif CHUNK_LINE_START.fullmatch(line):
                at, self.line = len(data), line
            else:
                at, self.error = len(data), BadRequest("malformed chunk")
        return at


class StrictParser(HTTPRequestParser):  # type: ignore[misc]
    """Refuses requests that a proxy in front may read differently: they could be used to smuggle a request past it.

    waitress 3.0.2 accepts many of them (RFC 9112: 2.2, 2.3, 3.2, 5.2, 6.1, 6.3, 7.1; RFC 9110: 5.3, 7.2), and takes
    seconds to read a header with 15,000 spaces. Only its reading of a body is used here.
    """

    command = path = query = request_uri = ""  # of a request whose head is malformed
    headers_finished, header_plus, error = False, b"", None  # as in waitress's class, for mypy

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.monotonic()

    def received(self, data: bytes) -> int:
        """Read a part of the stream and return how many bytes of it belong to this request: all, if it is refused."""
        consumed: int = super().received(data) if self.completed or self.headers_finished else self._receive_head(data)
        return len(data) if self.error else consumed

    def _receive_head(self, data: bytes) -> int:
        stream, limit = self.header_plus + data, self.adj.max_request_header_size
        end = stream.find(b"\r\n\r\n") + 4
        if end < 4 and len(stream) < limit:
            self.header_plus = stream
            return len(data)
        self.headers_finished = True
        fits = 4 <= end < limit
        self.error = self._parse_head(stream[:end]) if fits else RequestHeaderFieldsTooLarge("head too large")
        if self.error and stream.removeprefix(b"\r\n").startswith(b"HEAD "):  # the answer must have no body
            self.command = "HEAD"
        self.completed = bool(self.error) or self.body_rcv is None
        return len(data) - (len(stream) - end)

    def _parse_head(self, head: bytes) -> Any:
        """Read the head; return the ``error`` of a request that is refused, or None."""
        found = HEAD.fullmatch(head.decode("latin-1"))
        if not found:
            return BadRequest("malformed head")
        self.command, scheme, authority, uri, path, self.query, self.version, fields = found.groups("")
        # Only a target in absolute form can lack the path, which is then "/" (RFC 9110, 4.2.3).
        self.request_uri, path = uri if path else f"/{uri}", path or "/"
        self.path = unquote(path, "latin-1") if "%" in path else path
        self.url_scheme, headers, repeated = self.adj.url_scheme, self.headers, False
        lines = fields.split("\r\n")[:-1]
        for line in lines[:MAX_HEADERS]:
            name, _, value = line.partition(":")
            if "_" in name:  # dropped, as nginx does: applications would take X_Forwarded_For for X-Forwarded-For
                continue
            name, value = name.upper().replace("-", "_"), value.strip(" \t")
            if name in headers:
                repeated = repeated or name in SINGLE_HEADERS
                value = f"{headers[name]}, {value}"
            headers[name] = value
        # Not before the headers are read: the log needs the address that the proxy added.
        if len(lines) > MAX_HEADERS:
            return RequestHeaderFieldsTooLarge("too many headers")
        if repeated:
            return BadRequest("repeated header")
        host = headers.get("HOST", "" if self.version == "1.1" else "unnamed")
        if not (_is_host(host) and (not scheme or _is_same_host(authority, headers.get("HOST", ""), scheme))):
            return BadRequest("malformed host")
        if "CONNECTION" in headers:
            headers["CONNECTION"] = _connection_option(headers["CONNECTION"])
        return self._expect_body() if "CONTENT_LENGTH" in headers or "TRANSFER_ENCODING" in headers else None

    def _expect_body(self) -> Any:
        length, encoding = self.headers.get("CONTENT_LENGTH"), self.headers.pop("TRANSFER_ENCODING", None)
        if encoding is None:
            if not re.fullmatch("[0-9]{1,18}", length):
                return BadRequest("malformed length")
            self.content_length = int(length)
            if self.content_length >= self.adj.max_request_body_size:
                return RequestEntityTooLarge("body too large")
            if self.content_length:
                self.body_rcv = FixedStreamReceiver(self.content_length, OverflowableBuffer(self.adj.inbuf_overflow))
        elif self.version == "1.0" or length is not None:
            return BadRequest("ambiguous length")
        elif encoding.lower() != "chunked":
            return ServerNotImplemented("unknown transfer encoding")
        else:
            self.chunked = True
            self.body_rcv = StrictChunkedReceiver(OverflowableBuffer(self.adj.inbuf_overflow))
        if self.body_rcv is not None and self.version == "1.1":
            self.expect_continue = self.headers.get("EXPECT", "").lower() == "100-continue"
        return None


@functools.lru_cache(maxsize=64)
def _is_host(text: str) -> bool:
    found = HOST.fullmatch(text)
    ipv6 = found and found["ipv6"]
    return found is not None and int(found["port"] or 0) < 2**16 and (not ipv6 or parse_address(ipv6) is not None)


def _is_same_host(authority: str, host: str, scheme: str) -> bool:
    """Return whether the authority of a target is that of ``Host``, which it would replace (RFC 9112, 3.2.2).

    A proxy may go by either. The letter case does not matter, and the default port may be left out.
    """
    port = {"http": ":80", "https": ":443"}[scheme.lower()]
    return _is_host(authority) and authority.lower().removesuffix(port) == host.lower().removesuffix(port)


@functools.lru_cache(maxsize=64)
def _connection_option(text: str) -> str:
    """Return the option in a ``Connection`` header that matters here, alone, as waitress expects it."""
    options = [option.strip(" \t") for option in text.lower().split(",")]
    return next((option for option in ("close", "keep-alive") if option in options), "")
