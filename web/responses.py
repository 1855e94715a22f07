"""Responses and refusals of the routes, and the headers that every answer carries."""

import functools
import json
import os
from http import HTTPStatus
from typing import Any, NamedTuple

Header = tuple[str, str]

# The end of every policy: no frames, no other base for links, no form that is sent without the script.
_POLICY_END = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
VARY = "Cookie, Authorization"  # request headers on which every answer may depend
SECURITY_HEADERS: tuple[Header, ...] = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", f"default-src 'none'; {_POLICY_END}"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("Vary", VARY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)
# A page may load files from its own host and send requests to it. Only its one script runs.
_PAGE_SOURCES = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'"
PAGE_POLICY: Header = "Content-Security-Policy", f"{_PAGE_SOURCES}; {_POLICY_END}"
HSTS: Header = ("Strict-Transport-Security", "max-age=31536000")  # one year, for this host only

RETRY_AFTER = 5  # seconds that a client is asked to wait after a 503

# What a client is told where no route answered. The texts of Bottle and waitress quote the request.
MESSAGES = {
    400: "malformed request",
    404: "not found",
    405: "method not allowed",
    413: "request body too large",
    431: "request headers too large",
    501: "transfer encoding not supported",
    503: "busy, try again later",
}

_encoded = json.JSONEncoder().encode  # dumps() takes three times as long for a short string


class Response(NamedTuple):
    """The answer of a route. Bottle's own class takes as long to construct as a session takes to look up."""

    status: int
    body: bytes
    headers: list[Header]


class Refusal(Exception):
    """Raised to refuse a request with a status and a message that is fit to be shown."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def json_response(status: int, *headers: Header, **content: object) -> Response:
    """Return a JSON response; the keyword arguments are the members of the object."""
    body = json_body(content)
    return Response(status, body, [*json_headers(body), *headers])


def json_body(content: dict[str, Any]) -> bytes:
    """Return ``content`` as JSON in ASCII, which reads the same in every encoding and cannot end a script or a line."""
    # One value at a time: a string is encoded five times as fast as a dict. Our names need no escaping.
    return ("{" + ", ".join([f'"{name}": {_encoded(value)}' for name, value in content.items()]) + "}").encode()


def json_headers(body: bytes) -> list[Header]:
    """Return the headers that describe a JSON body. Clients compare the type, so it has no parameters."""
    return [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]


def common_headers(production: bool) -> list[Header]:
    """Return the headers that are the same in every answer."""
    return [*SECURITY_HEADERS, *([HSTS] if production else [])]


def complete_error(message: str, request_id: str, production: bool) -> tuple[list[Header], bytes]:
    """Return all headers and the body of an error that is answered outside the middleware."""
    body = json_body({"message": message})
    return [*json_headers(body), *common_headers(production), ("X-Request-ID", request_id)], body


def new_request_id() -> str:
    """Return a random id that ties an answer to its lines in the log."""
    return os.urandom(8).hex()


@functools.cache
def status_line(status: int) -> str:
    """Return the status with its reason phrase, as WSGI takes it."""
    return f"{status} {HTTPStatus(status).phrase}"
