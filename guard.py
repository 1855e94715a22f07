"""The gate: what every request passes before a route sees it, and what every answer carries.

A WSGI wrapper, because Bottle's hooks miss its own errors. Knows no user, no password and no SQL.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from datetime import datetime, timezone
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from settings import Settings, parsed_address

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

SECURITY_HEADERS = (
    ("Cache-Control", "no-store"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("Vary", "Cookie"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
)

# Any of these says that somebody stands between us and the caller, whatever the peer's address.
FORWARDING = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP")

HSTS = ("Strict-Transport-Security", "max-age=31536000")  # a year, for this host only

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

LOG_FLOOD = 200  # lines of one event within LOG_WINDOW; the rest is counted
LOG_WINDOW = 10.0  # seconds

RETRY_AFTER = 5  # seconds that a client is asked to wait when we cannot serve it


class Guard:
    """Wraps the application: refuses what must not reach a route, and completes every answer."""

    def __init__(self, application: WSGIApplication, settings: Settings) -> None:
        self._application = application
        self._settings = settings
        self._fixed = _fixed_headers(settings.production)
        self._fixed_of_page = [pair for pair in self._fixed if pair[0] != "Content-Security-Policy"]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request; whatever goes wrong is a JSON object and one line in the log."""
        environ["authsvc.request_id"] = request_id = new_request_id()
        environ["authsvc.client"] = client = client_address(
            environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR"), self._settings.trusted_proxy
        )

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            page = "Content-Security-Policy" in [name for name, _ in headers]  # a page has its own
            fixed = self._fixed_of_page if page else self._fixed
            return start_response(status, [*headers, *fixed, ("X-Request-ID", request_id)], exc_info)

        refusal = self._refusal(environ, request_id, client)
        if refusal is None:
            try:
                return self._application(environ, start)
            except Exception as error:
                log_crash(error, request_id)
                refusal = HTTPStatus.INTERNAL_SERVER_ERROR, "internal error"
        status, message = refusal
        body = json_body({"message": message})
        start(f"{status.value} {status.phrase}", json_headers(body))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _refusal(self, environ: WSGIEnvironment, request_id: str, client: str) -> tuple[HTTPStatus, str] | None:
        settings = self._settings
        if not (settings.production or settings.unsafe_listen or is_loopback(environ.get("REMOTE_ADDR"))):
            return HTTPStatus.FORBIDDEN, "this is a development service, for its own machine only"
        proxied = settings.trusted_proxy and environ.get("REMOTE_ADDR") == settings.trusted_proxy
        if settings.production and proxied and environ.get("HTTP_X_FORWARDED_PROTO", "https").lower() != "https":
            return HTTPStatus.FORBIDDEN, "use https"
        if not _is_plain_path(environ):
            return HTTPStatus.NOT_FOUND, "not found"
        if not self._is_own_page(environ):
            log("malicious_csrf", request_id=request_id, address=client)
            return HTTPStatus.FORBIDDEN, "cross-origin request refused"
        return None

    def _is_own_page(self, environ: WSGIEnvironment) -> bool:
        # Instead of tokens: a browser says where a request comes from, curl and scripts say nothing
        # (Fetch Metadata Request Headers, 2.4; RFC 6454, 7).
        if environ["REQUEST_METHOD"] in SAFE:
            return True
        site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
        own = self._settings.public_url or f"http://{environ.get('HTTP_HOST', '')}"
        return origin == own or (origin is None if site is None else site in ("same-origin", "none"))


def client_address(peer: str, forwarded_for: str | None, trusted_proxy: str) -> str:
    """Return who asks: the peer, or what the one trusted proxy says of its own peer, the last hop it names.

    What it says that is no address is all one: "unknown".
    """
    if not trusted_proxy or peer != trusted_proxy or forwarded_for is None:
        if forwarded_for is not None:
            _warn_of_forwarding()
        return peer
    return _spelled(forwarded_for.rpartition(",")[2].strip()[:100])


@functools.lru_cache(maxsize=1024)
def _spelled(hop: str) -> str:
    return str(parsed_address(hop) or "unknown")


@functools.cache
def _warn_of_forwarding() -> None:
    log("sys_forwarding_ignored", reason="X-Forwarded-For from a peer that AUTHSVC_TRUSTED_PROXY does not name")


def is_direct(environ: WSGIEnvironment) -> bool:
    """Say whether a program on this machine asks by itself, not for somebody else as a proxy does.

    A browser may load a page from a name that was made to resolve to this machine (DNS rebinding). The ``Host`` header
    then carries that name, so only the names that clients use for this machine are accepted.
    """
    forwarded = any(name in FORWARDING or name.startswith("HTTP_X_FORWARDED") for name in environ)
    return is_loopback(environ.get("REMOTE_ADDR")) and _names_this_machine(environ) and not forwarded


def _names_this_machine(environ: WSGIEnvironment) -> bool:
    found = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]+)(?::[0-9]+)?", environ.get("HTTP_HOST", "localhost"), re.ASCII)
    name = found[1].strip("[]").lower() if found else ""
    # A client that is told to connect to 0.0.0.0 or [::] reaches loopback, and sends that address as its Host.
    address = parsed_address(name)
    return is_loopback(name) or (address is not None and address.is_unspecified)


@functools.lru_cache(maxsize=1024)
def is_loopback(address: str | None) -> bool:
    """Say whether a peer is on this machine; one without an address is not on a network."""
    if address is None or address == "localhost":  # what waitress says of a unix socket
        return True
    parsed = parsed_address(address)
    return parsed is not None and parsed.is_loopback


def new_request_id() -> str:
    """Return what ties an answer to its lines in the log."""
    return os.urandom(8).hex()


def common_headers(request_id: str, production: bool = False) -> list[tuple[str, str]]:
    """Return the headers that every answer carries."""
    return [*_fixed_headers(production), ("X-Request-ID", request_id)]


def json_body(content: dict[str, Any]) -> bytes:
    """Return JSON in ASCII, which reads the same in any encoding and cannot end a script or a line."""
    # One value at a time: for a text dumps() has a way that is five times as fast. The names are ours, and plain.
    return ("{" + ", ".join([f'"{name}": {json.dumps(value)}' for name, value in content.items()]) + "}").encode()


def json_headers(body: bytes) -> list[tuple[str, str]]:
    """Return the headers that describe a JSON body; clients compare the type, so it has no parameters."""
    return [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]


def timestamp(seconds: int) -> str:
    """Return unix seconds as people and programs read them: RFC 3339, UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def log(event: str, **details: Any) -> None:
    """Write one line of ASCII JSON to standard error; a log that cannot be written stops nobody.

    A flood of one event is cut off; its next line that is written says how many are ``missing``.
    """
    with _log_lock:
        start, lines = _log_floods.get(event, (0.0, 0))
        now = time.monotonic()
        if now - start < LOG_WINDOW:
            _log_floods[event] = start, lines + 1
            if lines >= LOG_FLOOD:
                return
        else:
            _log_floods[event] = now, 1
            if lines > LOG_FLOOD:
                details["missing"] = lines - LOG_FLOOD
    stamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    try:
        sys.stderr.write(json.dumps({"time": stamp, "event": event, **details}) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # a closed pipe, a closed file, none at all
        pass


_log_lock = threading.Lock()
_log_floods: dict[str, tuple[float, int]] = {}  # event: start of its window, lines since


def log_crash(error: BaseException, request_id: str | None = None) -> None:
    """Log where an unforeseen error came from. Its text is left out: it may quote what a client sent."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log("sys_crash", request_id=request_id, error=type(error).__name__, frames=frames[-5:])


def _fixed_headers(production: bool) -> list[tuple[str, str]]:
    return [*SECURITY_HEADERS, *([HSTS] if production else [])]


def _is_plain_path(environ: WSGIEnvironment) -> bool:
    # Servers and frameworks tidy paths up, each in its own way (//profile, /pro%fffile, /%70rofile), so a rule that
    # a proxy has for /profile could be walked around. What was asked for must be the route, letter for letter.
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    asked = environ.get("REQUEST_URI")  # absent under some servers and in unit tests
    return path.isascii() and (asked is None or asked.partition("?")[0] == path)
