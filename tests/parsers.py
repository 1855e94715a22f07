"""Compares the shortcut of our parser for plain heads with the parser of waitress."""

from __future__ import annotations

from waitress.adjustments import Adjustments

from web.forms import MAX_BODY_BYTES
from web.parser import StrictParser
from web.server import MAX_HEADER_BYTES

LIMITS = Adjustments(max_request_body_size=MAX_BODY_BYTES + 1, max_request_header_size=MAX_HEADER_BYTES)

# Attributes that nothing reads after the head is parsed.
UNUSED = {"adj", "began", "first_line", "proxy_scheme", "proxy_netloc", "fragment", "connection_close"}
# Attributes for which waitress's class has a default.
DEFAULTED = {"body_rcv", "chunked", "content_length", "expect_continue"}


class NotPlain(Exception):
    """The head is not one that the shortcut parses."""


class ShortcutParser(StrictParser):
    """Parses plain heads only."""

    def _parse_strictly(self, header_plus: bytes) -> None:
        raise NotPlain


class WaitressParser(StrictParser):
    """Leaves every head to waitress."""

    def _parse_plain(self, head: str) -> bool:
        return False


def takes_shortcut(stream: bytes) -> bool:
    """Return whether the head of a request is plain. If it is, check that waitress understands the same."""
    shortcut = ShortcutParser(LIMITS)
    try:
        consumed = shortcut.received(stream)
    except NotPlain:
        return False
    strict = WaitressParser(LIMITS)
    found, expected = (consumed, describe(shortcut)), (strict.received(stream), describe(strict))
    assert found == expected, f"{stream!r}: {found} is not {expected}"
    return True


def describe(parser: StrictParser) -> object:
    """Return everything that is known about a request, or the reason why it is refused."""
    if parser.error:
        return parser.error.code, parser.error.body
    known = {name: getattr(parser, name) for name in (vars(parser).keys() | DEFAULTED) - UNUSED}
    return known | {"body_rcv": type(parser.body_rcv)}
