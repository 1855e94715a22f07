"""A strict HTTP request parser on top of waitress's.

Built on parts of waitress that it keeps private: hence ``waitress<4`` in pyproject.toml.
"""

from __future__ import annotations

import re
import time
from typing import Any

from waitress.parser import HTTPRequestParser, ParsingError

# Headers that must not be repeated: which one counts differs between us and a proxy.
SINGLE_HEADERS = b"host content-length transfer-encoding content-type cookie origin x-forwarded-proto".split()
BODY_HEADERS = frozenset({"CONTENT_LENGTH", "TRANSFER_ENCODING"})  # only a request with a body has one of these

# A request head that can be read in one way only, like nearly all: ASCII, nothing encoded, folded or empty. The
# quantifiers are possessive, so a head that does not match fails in linear time.
PLAIN_HEAD = re.compile(
    r"(?P<command>[A-Z]++) (?P<uri>(?P<path>/[\w/.~-]*+)(?:\?(?P<query>[!\"$-~]*+))?+) HTTP/1\.1\r\n"
    r"(?P<fields>(?:[A-Za-z0-9-]++: [!-~]++(?: ++[!-~]++)*+\r\n)++)\r\n",
    re.ASCII,
)


class StrictParser(HTTPRequestParser):  # type: ignore[misc]
    """Refuses requests that a proxy in front may read differently: they could be used to smuggle a request past it.

    waitress 3.0.2 accepts all of these (RFC 9112: 2.3, 3.2, 5.2, 6.1, 6.3; RFC 9110: 5.3). Its next release is to
    refuse a length beside an encoding, a repeated encoding and a repeated Host; ``_check_framing`` can then shrink.

    A plain head is parsed here, in a third of the time or less. waitress parses the rest.
    """

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.monotonic()

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.error or self.body_rcv is None:  # else waitress says 100 Continue and waits for a body that we refuse
            self.expect_continue = False
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        if not self._parse_plain(header_plus.decode("latin-1")):
            self._parse_strictly(header_plus)

    def _parse_plain(self, head: str) -> bool:
        plain = PLAIN_HEAD.fullmatch(head)
        if not plain:
            return False
        *request_line, fields = plain.groups("")
        lines = [line.partition(": ") for line in fields.split("\r\n")[:-1]]
        headers = {name.upper().replace("-", "_"): value for name, _, value in lines}
        if len(headers) < len(lines) or "HOST" not in headers or not BODY_HEADERS.isdisjoint(headers):
            return False
        self.command, self.request_uri, self.path, self.query = request_line
        self.version, self.url_scheme, self.headers = "1.1", self.adj.url_scheme, headers
        return True

    def _parse_strictly(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # from urlsplit("http://["): else the connection closes without an answer
            raise ParsingError("malformed request") from error
        if not header_plus.partition(b"\r\n")[0].endswith((b" HTTP/1.0", b" HTTP/1.1")):
            raise ParsingError("unknown version")
        if b"\r\n " in header_plus or b"\r\n\t" in header_plus:
            raise ParsingError("folded header")
        if self.version == "1.1" and "HOST" not in self.headers:
            raise ParsingError("no Host")
        self._check_framing([line.lower() for line in header_plus.split(b"\r\n")[1:]])

    def _check_framing(self, lines: list[bytes]) -> None:
        names = [line.partition(b":")[0] for line in lines]
        if any(names.count(name) > 1 for name in SINGLE_HEADERS):
            raise ParsingError("repeated header")
        if b"transfer-encoding" in names:
            encoding = lines[names.index(b"transfer-encoding")].partition(b":")[2].strip(b" \t")
            if self.version == "1.0" or b"content-length" in names or encoding != b"chunked":
                raise ParsingError("ambiguous length")
