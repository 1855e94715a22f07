"""Compares what our parser accepts with how the parser of waitress understands it."""

from __future__ import annotations

import re
from typing import Any

from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser

from web.forms import MAX_BODY_BYTES
from web.parser import StrictParser
from web.server import MAX_HEADER_BYTES

LIMITS = Adjustments(max_request_body_size=MAX_BODY_BYTES + 1, max_request_header_size=MAX_HEADER_BYTES)
KNOWN = "command", "request_uri", "path", "query", "version", "url_scheme", "chunked", "content_length", "completed"


def feed(parser: Any, stream: bytes, size: int = 0) -> int:
    """Give a stream to a parser in pieces of ``size``, or at once; return how many bytes it takes as one request."""
    at = 0
    while at < len(stream) and not parser.completed:
        at += parser.received(stream[at : at + size] if size else stream[at:])
    return at


def describe(parser: Any) -> dict[str, Any]:
    """Return everything that is known about a request, or the status with which it is refused."""
    if parser.error:
        return {"status": parser.error.code, "command": getattr(parser, "command", "")}
    if not parser.headers_finished:
        return {"headers_finished": False}
    headers = {name: value for name, value in parser.headers.items() if name != "CONNECTION"}  # ours has one option
    expects = parser.body_rcv is not None and parser.expect_continue  # waitress also expects a body of no bytes
    body = parser.get_body_stream().read() if parser.completed else None
    return {name: getattr(parser, name) for name in KNOWN} | {"headers": headers, "expects": expects, "body": body}


def is_accepted(stream: bytes) -> bool:
    """Return whether a stream begins with an acceptable head. If so, check that waitress understands the same."""
    ours, theirs = StrictParser(LIMITS), HTTPRequestParser(LIMITS)
    consumed = feed(ours, stream)
    if ours.error or not ours.headers_finished:
        return False
    found, expected = (consumed, describe(ours)), (feed(theirs, stream), describe(theirs))
    if not expected[1]["request_uri"].startswith("/"):  # waitress keeps the absolute form, and an empty path
        expected[1]["path"] = expected[1]["path"] or "/"
        target = re.sub("^[^:]*://[^/?]*", "", expected[1]["request_uri"])
        expected[1]["request_uri"] = target if target.startswith("/") else f"/{target}"
    assert found == expected, f"{stream!r}: {found} is not {expected}"
    return True
