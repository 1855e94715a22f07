"""The desk: routes, forms in, JSON and cookies out; and the program that serves them.

``python authsvc.py`` serves with waitress on two lanes; ``authsvc:app`` is the WSGI callable for another server.
Importing this opens nothing. Knows HTTP and the rules' names, no SQL and no hash.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl, quote

from bottle import Bottle, HTTPError, HTTPResponse, request, response

import admin
import auth as rules
import guard
import lanes
import passwords
import totp
from database import DatabaseRefused, StorageUnavailable
from mailer import Mailer
from settings import Settings, SettingsError
from storage import open_store

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

MOST_FIELDS = 8
PRUNE_INTERVAL = 3600.0  # seconds between two rounds of deleting what is over
PRUNE_REST = 10  # times as long as a step took is rested after it, so that nobody notices

# The one map from what the rules refuse to what the client is told.
STATUS: dict[type[rules.AuthError], int] = {
    rules.EmailRejected: 400,
    rules.EmailTaken: 400,
    rules.PasswordRejected: 400,
    rules.SecondFactorRejected: 400,
    rules.CodeRequired: 401,
    rules.LoginFailed: 401,
    rules.ReauthenticationFailed: 403,
    rules.RegistrationClosed: 403,
    rules.SecondFactorRequired: 403,
    rules.SessionRequired: 403,
    rules.SessionUnknown: 404,
    rules.TokenRejected: 403,
    rules.TooManyAttempts: 429,
    rules.UnknownEmail: 403,
}

# What is logged of a refusal; a failed login says more and is logged where it fails.
EVENTS: dict[type[rules.AuthError], str] = {
    rules.EmailRejected: "input_validation_fail",
    rules.PasswordRejected: "input_validation_fail",
    rules.ReauthenticationFailed: "authn_login_fail",
    rules.RegistrationClosed: "authz_fail",
    rules.SecondFactorRejected: "input_validation_fail",
    rules.SecondFactorRequired: "authz_fail",
    rules.SessionRequired: "authz_fail",
    rules.SessionUnknown: "authz_fail",
    rules.TokenRejected: "authn_token_fail",
    rules.TooManyAttempts: "excess_rate_limit_exceeded",
    rules.UnknownEmail: "authz_fail",
}

# What a browser is shown. It may load and ask its own host, and nothing in it runs but its one script.
PAGES = Path(__file__).with_name("pages")
PAGE_NAMES = "login", "register", "forgot", "reset", "account"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)

MESSAGES = {404: "not found", 405: "method not allowed"}  # Bottle's own quote the path
TOKEN = re.compile("[A-Za-z0-9_-]{1,128}", re.ASCII)  # what may be a session id
PLAIN = re.compile("[!-$&-~]+")  # what a header can hold as it is, but for "%"


class Answer(Exception):
    """What a handler returns, or raises to refuse. Bottle's own takes as long to make as a session to look up."""

    def __init__(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.status = status
        self.body = body
        self.headers = list(headers)


Handler = Callable[..., Answer]
ROUTES: list[tuple[str, str, Handler, bool]] = []  # every one there is: method, path, handler, whether it may hash


def _route(method: str, *paths: str, hashes: bool = False) -> Callable[[Handler], Handler]:
    """List the handler in ROUTES; one that ``hashes`` runs apart from the others: see lanes.py."""

    def listed(handler: Handler) -> Handler:
        ROUTES.extend((method, path, handler, hashes) for path in paths)
        return handler

    return listed


class Desk:
    """The handlers. Each takes a form or a cookie from the request and gives plain strings to the rules."""

    def __init__(self, auth: rules.Auth, settings: Settings) -> None:
        self._auth = auth
        self._settings = settings
        # No Secure in development: over plain http the cookie would not come back. The prefixes (RFC 6265bis 4.1.3)
        # keep a sibling host from planting one; __Host- forbids a Domain.
        domain = settings.cookie_domain
        prefix = ("__Secure-" if domain else "__Host-") if settings.production else ""
        self._cookie_name = prefix + "session_id"
        self._cookie_attributes = (
            "HttpOnly; Path=/; SameSite=Lax"
            + ("; Secure" if settings.production else "")
            + (f"; Domain={domain}" if domain else "")
        )
        template = (PAGES / "index.html").read_text()
        self._pages = {
            f"/{name}": template.replace("{page}", name).replace("{domain}", domain).encode() for name in PAGE_NAMES
        }
        self._files = {
            "style.css": ("text/css", (PAGES / "style.css").read_bytes()),
            "script.js": ("text/javascript", (PAGES / "script.js").read_bytes()),
        }

    @_route("GET", "/")
    def welcome(self) -> Answer:
        return _answer(200, message="Bienvenue")

    @_route("POST", "/users", hashes=True)
    def register(self) -> Answer:
        email, password = _form("email", "password")
        user = self._auth.register_user(email, password, address=_client())
        _log("user_created", user_id=user.id)
        return _answer(200, email=email, message="user created")

    @_route("POST", "/sessions", hashes=True)
    def log_in(self) -> Answer:
        email, password, otp = _form("email", "password", optional=("otp",))
        try:
            user, session_id = self._auth.log_in(
                email,
                password,
                otp,
                replaced=self._cookie(),
                address=_client(),
                user_agent=request.environ.get("HTTP_USER_AGENT", ""),
            )
        except rules.LoginFailed as failure:
            _log(
                "authn_login_fail",
                **({"user_id": failure.user_id} if failure.user_id else {"unknown": self._auth.tag(email)}),
            )
            raise
        _log("authn_login_success", user_id=user.id)
        return self._with_cookie(_answer(200, email=email, message="logged in"), session_id)

    @_route("DELETE", "/sessions")
    def log_out(self) -> Answer:
        user = self._auth.log_out(self._cookie())
        _log("session_ended", user_id=user.id)
        # Not redirect(): it says 303 and repeats the Host header.
        return self._without_cookie(_answer(302, ("Location", "/"), message="logged out"))

    @_route("GET", "/sessions")
    def sessions(self) -> Answer:
        user, found, own = self._auth.list_sessions(self._cookie())
        listed = [admin.session_record(self._auth, session) | {"current": session.id == own} for session in found]
        return _answer(200, email=user.email, second_factor=user.totp_since is not None, sessions=listed)

    @_route("DELETE", "/sessions/others")
    def end_other_sessions(self) -> Answer:
        user = self._auth.end_sessions(self._cookie(), but_this=True)
        _log("session_ended", user_id=user.id, which="others")
        return _answer(200, message="all other sessions ended")

    @_route("DELETE", "/sessions/all")
    def end_all_sessions(self) -> Answer:
        user = self._auth.end_sessions(self._cookie(), but_this=False)
        _log("session_ended", user_id=user.id, which="all")
        return self._without_cookie(_answer(200, message="all sessions ended"))

    @_route("DELETE", "/sessions/<public_id>")
    def end_session(self, public_id: str) -> Answer:
        user, own = self._auth.end_session(self._cookie(), public_id)
        _log("session_ended", user_id=user.id)
        answer = _answer(200, message="session ended")
        return self._without_cookie(answer) if own else answer

    @_route("GET", "/profile")
    def profile(self) -> Answer:
        return _answer(200, email=self._auth.identify(self._cookie()).email)

    @_route("GET", "/verify")
    def verify(self) -> Answer:
        """Tell a proxy, which asks before each request to an application, who it comes from."""
        try:
            user = self._auth.identify(self._cookie())
        except (rules.SessionRequired, rules.SecondFactorRequired) as refusal:
            if request.query_string != "login=1":
                return _answer(401, message=refusal.message)
            return _answer(302, ("Location", self._way_in(refusal)), message=refusal.message)
        # What a header can hold stands as it is; else percent-encoded, "%" too, so that no two users have one name.
        name = user.email if PLAIN.fullmatch(user.email) else quote(user.email, safe="@")
        # Both, always: Caddy before 2.11.2 lets the client's own header through where ours is missing.
        return _answer(200, ("Remote-User", name), ("Remote-Email", name), email=user.email)

    def _way_in(self, refusal: rules.AuthError) -> str:
        # What is said of the address that was wanted is checked by the page, when it is used.
        asked = {part: request.environ.get(f"HTTP_X_FORWARDED_{part}", "") for part in ("PROTO", "HOST", "URI")}
        wanted = quote(f"{asked['PROTO']}://{asked['HOST']}{asked['URI']}", safe="")
        page = "account" if isinstance(refusal, rules.SecondFactorRequired) else "login"
        return f"{self._settings.public_url}/{page}" + (f"?return={wanted}" if all(asked.values()) else "")

    @_route("GET", "/health")
    def health(self) -> Answer:
        self._auth.check_store()
        return _answer(200, message="ok")

    @_route("DELETE", "/profile", hashes=True)
    def delete_account(self) -> Answer:
        (password,) = _form("password")
        user = self._auth.delete_account(self._cookie(), password, address=_client())
        _log("user_deleted", user_id=user.id)
        return self._without_cookie(_answer(200, email=user.email, message="account deleted"))

    @_route("PUT", "/password", hashes=True)
    def change_password(self) -> Answer:
        password, new_password = _form("password", "new_password")
        user, session_id = self._auth.change_password(self._cookie(), password, new_password, address=_client())
        _log("authn_password_change", user_id=user.id)
        return self._with_cookie(_answer(200, email=user.email, message="password changed"), session_id)

    @_route("POST", "/totp", hashes=True)
    def begin_totp(self) -> Answer:
        (password,) = _form("password")
        secret, uri = self._auth.begin_totp(self._cookie(), password, address=_client())
        picture = totp.picture(uri)
        return _answer(200, secret=secret, uri=uri, **({"qr": picture} if picture else {}))

    @_route("PUT", "/totp")
    def confirm_totp(self) -> Answer:
        (otp,) = _form("otp")
        user, session_id, codes = self._auth.confirm_totp(self._cookie(), otp, address=_client())
        _log("authn_factor_added", user_id=user.id)
        return self._with_cookie(_answer(200, message="second factor on", recovery_codes=codes), session_id)

    @_route("DELETE", "/totp", hashes=True)
    def remove_totp(self) -> Answer:
        password, otp = _form("password", "otp")
        user, session_id = self._auth.remove_totp(self._cookie(), password, otp, address=_client())
        _log("authn_factor_removed", user_id=user.id)
        return self._with_cookie(_answer(200, message="second factor off"), session_id)

    @_route("POST", "/reset_password")
    def request_reset(self) -> Answer:
        (email,) = _form("email")
        if self._settings.production:
            self._auth.mail_reset_token(email, _client(), functools.partial(guard.log, **_context()))
            return _answer(200, message="if the email has an account, a mail is on its way")
        # Who holds the token holds the account.
        if not guard.is_direct(request.environ):
            _refuse(403, "reset tokens are given only to this machine, and through no proxy")
        return _answer(200, email=email, reset_token=self._auth.get_reset_password_token(email, address=_client()))

    @_route("PUT", "/reset_password", hashes=True)
    def reset(self) -> Answer:
        email, reset_token, new_password = _form("email", "reset_token", "new_password")
        user_id = self._auth.update_password(reset_token, new_password, email, address=_client())
        _log("authn_password_change", user_id=user_id)
        return _answer(200, email=email, message="Password updated")

    @_route("GET", "/login", "/register", "/forgot", "/reset")
    def page(self) -> Answer:
        return _file("text/html; charset=utf-8", self._pages[request.path])

    @_route("GET", "/account")
    def account(self) -> Answer:
        try:
            self._auth.identify(self._cookie(), enrolling=True)
        except rules.SessionRequired as refusal:
            way_in = f"{self._settings.public_url}/login"  # whence one comes back here
            return _answer(302, ("Location", way_in), message=refusal.message)
        return self.page()

    @_route("GET", "/pages/<name>")
    def file(self, name: str) -> Answer:
        if name not in self._files:
            raise HTTPError(404)
        return _file(*self._files[name])

    def _cookie(self) -> str | None:
        """Return the session id that the client holds; None when there is none, or two of them."""
        # Not Bottle's reader: it fails on a malformed neighbour of ours.
        pairs = [pair.strip(" ").partition("=") for pair in request.environ.get("HTTP_COOKIE", "").split(";")]
        found = [value for name, _, value in pairs if name == self._cookie_name]
        # Two are ambiguous: a neighbour under the same name may have planted one.
        return found[0] if len(found) == 1 and TOKEN.fullmatch(found[0]) else None

    def _without_cookie(self, answer: Answer) -> Answer:
        return self._with_cookie(answer, "", "; Max-Age=0")

    def _with_cookie(self, answer: Answer, value: str, expiry: str = "") -> Answer:
        # Not Bottle's writer: it spells SameSite in its own way.
        answer.headers.append(("Set-Cookie", f"{self._cookie_name}={value}; {self._cookie_attributes}{expiry}"))
        return answer


# Asked before each request to an application, so answered without Bottle's router, which takes as long as the look-up.
SHORTCUTS: dict[str, Handler] = {"/profile": Desk.profile, "/verify": Desk.verify}
HASHING = frozenset((method, path) for method, path, _, hashes in ROUTES if hashes)


def create_app(settings: Settings, auth: rules.Auth | None = None) -> WSGIApplication:
    """Return the service as a WSGI callable.

    Raises:
        DatabaseRefused: the database of the settings cannot be opened.
    """
    desk = Desk(auth or _open(settings), settings)
    bottle = Bottle()
    bottle.config["catchall"] = False  # guard.py answers what nobody foresaw
    bottle.uninstall(True)  # Bottle's own plugins: handlers return neither dicts nor templates
    bottle.install(_for_bottle)
    bottle.default_error_handler = _error
    for method, path, handler, _ in ROUTES:
        bottle.route(path, method, _refusals(functools.partial(handler, desk)))
    shortcuts = {path: _refusals(functools.partial(handler, desk)) for path, handler in SHORTCUTS.items()}

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        handler = shortcuts.get(environ["PATH_INFO"]) if environ["REQUEST_METHOD"] == "GET" else None
        if handler is None:
            return bottle(environ, start_response)
        request.bind(environ)
        answer = handler()
        start_response(_status_line(answer.status), answer.headers)
        return [answer.body]

    return guard.Guard(application, settings)


def _open(settings: Settings, defer: Callable[[Callable[[], object]], object] = lambda write: write()) -> rules.Auth:
    mailer = Mailer(settings, guard.log)  # before the database: a start that fails must leave no file behind
    return rules.Auth(open_store(settings.database, private=settings.production), settings, defer=defer, mailer=mailer)


def _start_pruning(auth: rules.Auth, stopping: threading.Event) -> threading.Thread:
    def prune() -> None:
        rest = 0.0
        while not stopping.wait(rest):
            began, more = time.monotonic(), False
            try:
                more = auth.prune()
            except StorageUnavailable:
                pass  # another process writes; the next round will do
            except Exception as error:
                guard.log_crash(error)
            rest = (time.monotonic() - began) * PRUNE_REST if more else PRUNE_INTERVAL

    thread = threading.Thread(target=prune, daemon=True)
    thread.start()
    return thread


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """The WSGI callable for another server; made from the environment with the first request."""
    try:
        with _opening:
            application = _shared_app()
    except (SettingsError, DatabaseRefused) as error:
        request_id, body = guard.new_request_id(), guard.json_body({"message": "service not configured"})
        guard.log("sys_startup_failed", request_id=request_id, reason=str(error))
        start_response("503 Service Unavailable", guard.json_headers(body) + guard.common_headers(request_id))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
    return application(environ, start_response)


_opening = threading.Lock()  # two first requests must not open two


@functools.cache
def _shared_app() -> WSGIApplication:
    settings = Settings.from_environ()
    auth = _open(settings)
    _start_pruning(auth, threading.Event())
    return create_app(settings, auth)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, or run one command of the operator's; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="authsvc.py",
        description="The user authentication service. Without a command it serves until SIGTERM or Ctrl-C.",
        epilog="It is set up with environment variables, AUTHSVC_…; the README lists them. AUTHSVC_LISTEN and "
        "AUTHSVC_DATABASE say where. Exit code: 0 done; 1 the command could not do it, and says why; 2 wrong usage, "
        "settings or database.",
    )
    admin.add_commands(parser)
    parsed = parser.parse_args(arguments)
    try:
        settings = Settings.from_environ()
        if parsed.command:
            return admin.run(parsed, settings)
        return serve(settings)
    except (SettingsError, DatabaseRefused) as error:
        print(f"authsvc: {error}", file=sys.stderr)
        return 2


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        SettingsError, DatabaseRefused: it cannot start.
    """
    # The port first: a start that fails must leave no file behind.
    listener = _bind(settings)
    serving = lanes.Lanes(HASHING, passwords.CORES, settings)
    auth = _open(settings, serving.defer)
    server = lanes.Server(create_app(settings, auth), listener, serving)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    host, port = listener.getsockname()[:2]
    print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", flush=True)
    guard.log("sys_startup", database=auth.engine, production=settings.production)
    for warning in settings.warnings():
        guard.log("sys_warning", reason=warning)
    stopping = threading.Event()
    pruning = _start_pruning(auth, stopping)
    answered = server.run()
    stopping.set()
    pruning.join(timeout=1.0)
    if answered and not pruning.is_alive():
        with contextlib.suppress(StorageUnavailable):  # then the next start tidies up
            auth.close()
    guard.log("sys_shutdown")
    return 0


def _bind(settings: Settings) -> socket.socket:
    host, port = settings.address
    try:
        # It listens from here on: a second service must fail before it touches the database.
        return socket.create_server((str(host), port), family=socket.AF_INET if host.version == 4 else socket.AF_INET6)
    except OSError as error:
        raise SettingsError(f"AUTHSVC_LISTEN={settings.listen}: {os.strerror(error.errno or 0).lower()}") from None


# Answers


def _answer(status: int, *headers: tuple[str, str], **content: object) -> Answer:
    body = guard.json_body(content)
    return Answer(status, body, *guard.json_headers(body), *headers)


def _file(kind: str, content: bytes) -> Answer:
    return Answer(200, content, ("Content-Type", kind), ("Content-Security-Policy", PAGE_POLICY))


def _refuse(status: int, message: str) -> NoReturn:
    _log("authz_fail" if status == 403 else "input_validation_fail", reason=message)
    raise _answer(status, message=message)


def _refusals(handler: Handler) -> Handler:
    """Return the handler so that what it and the layers below refuse becomes an answer."""

    def answered(**parts: str) -> Answer:
        try:
            return handler(**parts)
        except Answer as refusal:
            return refusal
        except rules.AuthError as error:
            if event := EVENTS.get(type(error)):
                _log(event, **({"user_id": error.user_id} if error.user_id else {}))
            later = [("Retry-After", str(error.wait))] if isinstance(error, rules.TooManyAttempts) else []
            return _answer(STATUS[type(error)], *later, message=error.message)
        except StorageUnavailable as error:
            _log("sys_storage_unavailable", reason=str(error))
            return _answer(503, ("Retry-After", str(guard.RETRY_AFTER)), message="storage unavailable, try again later")

    return answered


def _for_bottle(handler: Handler) -> Callable[..., HTTPResponse]:
    def answered(**parts: str) -> HTTPResponse:
        answer = handler(**parts)
        return HTTPResponse(answer.body, answer.status, answer.headers)

    return answered


@functools.cache
def _status_line(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}"


def _error(error: HTTPError) -> bytes:
    """Return what Bottle says itself, 404 and 405, as JSON; it keeps its Allow header."""
    response.content_type = "application/json"
    return guard.json_body({"message": MESSAGES.get(error.status_code, "refused")})


def _client() -> str:
    return str(request.environ["authsvc.client"])


def _context() -> dict[str, str]:
    return {"request_id": request.environ["authsvc.request_id"], "address": _client()}


def _log(event: str, **details: object) -> None:
    guard.log(event, **_context(), **details)


# Forms: only the body counts, each field once. Bottle's own reader takes any content type and repairs what is broken.


def _form(*names: str, optional: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the named fields of the body, each given once and not empty; or refuse the request.

    An optional one is "" where it is absent or empty.
    """
    try:
        # -1: no length was said, and only a server that ends the stream itself can be asked for all of it.
        length = request.content_length
        if length < 0:
            length = sys.maxsize if request.environ.get("wsgi.input_terminated") else 0
        body = request.environ["wsgi.input"].read(min(length, lanes.LARGEST_BODY + 1))
        if len(body) > lanes.LARGEST_BODY:
            _refuse(413, lanes.MESSAGES[413])
        pairs = _fields(body, request.environ.get("CONTENT_TYPE", ""))
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _refuse(400, "malformed body")
    if len(pairs) > MOST_FIELDS:
        _refuse(400, f"at most {MOST_FIELDS} fields")
    absent = {name for name in optional if [value for key, value in pairs if key == name] in ([], [""])}
    return tuple("" if name in absent else _field(pairs, name) for name in names + optional)


def _fields(body: bytes, content_type: str) -> list[tuple[str, Any]]:
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind == "application/x-www-form-urlencoded" or not (body or kind):
        text = body.decode()
        return parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=2 * MOST_FIELDS)
    if kind == "application/json":
        pairs = json.loads(body.decode(), object_pairs_hook=tuple)  # a dict would hide what is given twice
        if not isinstance(pairs, tuple):
            raise ValueError
        return list(pairs)
    if kind == "multipart/form-data":
        return _multipart(body, parameters)
    _refuse(415, "send a form (application/x-www-form-urlencoded, multipart/form-data) or a JSON object")


def _multipart(body: bytes, parameters: str) -> list[tuple[str, str | None]]:
    # RFC 7578, of which a form of plain fields needs little: no encodings, no nesting; a file is no text.
    boundary = re.search(r"""boundary=(?:"([^"]{1,70})"|([^\s";]{1,70}))""", parameters, re.ASCII | re.IGNORECASE)
    if not boundary:
        raise ValueError
    preamble, *parts, end = (b"\r\n" + body).split(b"\r\n--" + (boundary[1] or boundary[2]).encode())
    if preamble or end.rstrip(b"\r\n") != b"--":
        raise ValueError
    pairs = []
    for part in parts:
        head, blank, value = part.partition(b"\r\n\r\n")
        name = re.search(
            rb"""\r\nContent-Disposition: *form-data; *name=("?)([^"\r\n;]*)\1(;|\r\n|$)""", head, re.IGNORECASE
        )
        if not (blank and name):
            raise ValueError
        pairs.append((name[2].decode(), None if name[3] == b";" else value.decode()))
    return pairs


def _field(pairs: list[tuple[str, Any]], name: str) -> str:
    values = [value for key, value in pairs if key == name]
    if not values:
        _refuse(400, f"{name} is missing")
    if len(values) > 1:
        _refuse(400, f"{name} is given more than once")
    value = values[0]
    if not isinstance(value, str):
        _refuse(400, f"{name} must be text")
    if not value:
        _refuse(400, f"{name} is empty")
    # A lone surrogate, from JSON, is no text. NUL is good in a password, where every byte counts, and nowhere else.
    if any("\ud800" <= character <= "\udfff" for character in value) or ("\0" in value and "password" not in name):
        _refuse(400, f"{name} is not valid text")
    return value


if __name__ == "__main__":
    sys.exit(main())
