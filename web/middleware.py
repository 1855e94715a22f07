"""WSGI middleware: the checks that every request passes, and the headers that every answer carries.

A wrapper around the application, because Bottle's hooks miss its own errors.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from addresses import client_address, is_loopback, is_trusted, parse_address
from log import log_crash, log_event
from settings import Settings
from web import responses
from web.responses import Header, Refusal, json_body, json_headers, new_request_id, status_line

# Each of these, and each X-Forwarded-… header, says that a proxy stands between us and the caller.
FORWARDING_HEADERS = ("HTTP_FORWARDED", "HTTP_VIA", "HTTP_X_REAL_IP")

Observe = Callable[[str, str, str, float], None]

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class SecurityMiddleware:
    """Refuses requests that must not reach a route, and adds the common headers to every answer.

    ``observe`` is called for each answer with the method, the path, the status line and the seconds that it took.
    """

    def __init__(self, application: WSGIApplication, settings: Settings, observe: Observe | None = None) -> None:
        self._application, self._settings, self._observe = application, settings, observe
        self._headers = responses.common_headers(settings.production)
        self._names = {name for name, _ in self._headers}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request. An unexpected error becomes a JSON answer with status 500 and one line in the log."""
        began = time.perf_counter()
        environ["authsvc.request_id"] = request_id = new_request_id()
        peer, forwarded_for = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_X_FORWARDED_FOR")
        if forwarded_for is not None and not is_trusted(peer, self._settings.trusted_proxy):
            _warn_of_ignored_forwarding()
        environ["authsvc.client"] = client_address(peer, forwarded_for, self._settings.trusted_proxy)

        def start(status: str, headers: list[Header], exc_info: Any = None) -> Any:
            common, own = self._headers, dict(headers)
            if not self._names.isdisjoint(own):  # a page has a policy of its own, for example
                common = [header for header in common if header[0] not in own]
            if self._observe:
                self._observe(environ["REQUEST_METHOD"], environ["PATH_INFO"], status, time.perf_counter() - began)
            return start_response(status, [*headers, *common, ("X-Request-ID", request_id)], exc_info)

        try:
            self._check(environ)
            return self._application(environ, start)
        except Refusal as refusal:
            status, message = refusal.status, refusal.message
        except Exception as error:
            log_crash(error, request_id)
            status, message = 500, "internal error"
        body = json_body({"message": message})
        start(status_line(status), json_headers(body))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def _check(self, environ: WSGIEnvironment) -> None:
        settings, peer = self._settings, environ.get("REMOTE_ADDR")
        if not (settings.production or settings.unsafe_listen or is_loopback(peer)):
            raise Refusal(403, "this is a development service, for its own machine only")
        if settings.production and is_trusted(peer, settings.trusted_proxy) and not _came_over_tls(environ):
            raise Refusal(403, "use https")
        if not _is_literal_path(environ):
            raise Refusal(404, "not found")
        if not self._is_same_origin(environ):
            log_event("malicious_csrf", request_id=environ["authsvc.request_id"], address=environ["authsvc.client"])
            raise Refusal(403, "cross-origin request refused")

    def _is_same_origin(self, environ: WSGIEnvironment) -> bool:
        # Instead of CSRF tokens: a browser says where a request comes from, curl and scripts send neither header
        # (Fetch Metadata Request Headers, 2.4; RFC 6454, 7).
        if environ["REQUEST_METHOD"] in SAFE_METHODS:
            return True
        site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
        own_origin = self._settings.public_url or f"http://{environ.get('HTTP_HOST', '').lower().removesuffix(':80')}"
        return origin == own_origin or (origin is None if site is None else site in ("same-origin", "none"))


def is_direct(environ: WSGIEnvironment) -> bool:
    """Return whether the caller is a program on this machine that asks for itself, not through a proxy.

    A browser may load a page from a name that was made to resolve to this machine (DNS rebinding). The ``Host`` header
    then carries that name, so only the names that clients use for this machine are accepted.
    """
    forwarded = any(name in FORWARDING_HEADERS or name.startswith("HTTP_X_FORWARDED") for name in environ)
    return is_loopback(environ.get("REMOTE_ADDR")) and _names_this_machine(environ) and not forwarded


def _came_over_tls(environ: WSGIEnvironment) -> bool:
    # The nearest proxy writes the last value of a list. A client may have sent the others.
    # wss: a WebSocket over TLS.
    return environ.get("HTTP_X_FORWARDED_PROTO", "https").rpartition(",")[2].strip(" \t").lower() in ("https", "wss")


def _names_this_machine(environ: WSGIEnvironment) -> bool:
    found = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]+)(?::[0-9]+)?", environ.get("HTTP_HOST", "localhost"), re.ASCII)
    name = found[1].strip("[]").lower() if found else ""
    # A client that is told to connect to 0.0.0.0 or [::] reaches loopback, and sends that address as its Host.
    address = parse_address(name)
    return is_loopback(name) or (address is not None and address.is_unspecified)


def _is_literal_path(environ: WSGIEnvironment) -> bool:
    # Servers and frameworks normalize paths, each in its own way (//profile, /pro%fffile, /%70rofile). A proxy's rule
    # for /profile could be bypassed by such a spelling, so a request must spell the path of its route exactly.
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    requested = environ.get("REQUEST_URI")  # absent under some servers and in unit tests
    return path.isascii() and (requested is None or requested.partition("?")[0] == path)


@functools.cache
def _warn_of_ignored_forwarding() -> None:
    log_event("sys_forwarding_ignored", reason="X-Forwarded-For from a peer that AUTHSVC_TRUSTED_PROXY does not name")
