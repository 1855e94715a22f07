"""The HTTP layer: routes, cookies, and the program that serves them.

``python authsvc.py`` serves with waitress; ``authsvc:app`` is the WSGI callable for another server. Importing this
module opens nothing and starts nothing.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from bottle import Bottle, HTTPError, HTTPResponse, request, response

import auth as rules
from engines.errors import DatabaseRefused, StorageUnavailable
from log import log_crash, log_event
from mail import Mailer
from settings import NO_METRICS, Settings, SettingsError
from storage import User
from web import responses
from web.forms import read_form
from web.languages import LANGUAGE, choose_language
from web.metrics import Metrics
from web.middleware import Observe, SecurityMiddleware, is_direct
from web.page_builder import load_pages
from web.responses import RETRY_AFTER, Refusal, Response, json_response

DESCRIPTION = "A user authentication service. Without a command it serves until SIGTERM or Ctrl-C."
EPILOG = """
Settings are environment variables, AUTHSVC_…; docs/settings.md lists them. The most important ones are
AUTHSVC_LISTEN and AUTHSVC_DATABASE.

Exit codes: 0 success; 1 the command failed and says why; 2 wrong usage, settings or database."""

PRUNE_INTERVAL = 3600.0  # seconds between two rounds of deleting expired rows
PRUNE_RETRY = 60.0  # the same after a round that failed, or could not empty the write-ahead log
PRUNE_REST = 10  # the pause after a step lasts this many times as long as the step, so that no request notices

PROJECT = Path(__file__).resolve().parent  # the program may be started through a symbolic link

SESSION_ID = re.compile("[A-Za-z0-9_-]{1,128}", re.ASCII)
DEVICE_TOKENS = re.compile("[A-Za-z0-9_.~-]{1,1024}", re.ASCII)
MAX_COOKIES = 4  # different values of one cookie in a request, each of which is looked up
DEVICE_COOKIE = "__Host-device"  # never shared with sibling hosts, even where the session is
DEVICE_ATTRIBUTES = "HttpOnly; Path=/; SameSite=Lax; Secure"
VERIFY_QUERY = re.compile("login=1|group=[a-z0-9][a-z0-9_-]{0,63}")  # a part of the query of /verify; rules.GROUP
CHALLENGE = "WWW-Authenticate", 'Basic realm="authsvc", charset="UTF-8"'
HEADER_TEXT = re.compile("[!-$&-~]+")  # an email that a header can hold unencoded; "%" begins an encoded character

Handler = Callable[..., Response]
ROUTES: list[tuple[str, str, Handler, bool]] = []  # all routes: method, path, handler, whether it may hash a password


def _route(method: str, *paths: str, hashes: bool = False, **form: tuple[str, ...]) -> Callable[[Handler], Handler]:
    """Add the handler to ROUTES. It is called with the values of the fields of ``form``, which read_form() names.

    A handler that ``hashes`` runs on a thread pool of its own: see web/server.py.
    """

    def add(handler: Handler) -> Handler:
        def with_form(handlers: Handlers, **parts: str) -> Response:
            return handler(handlers, *read_form(request.environ, **form), **parts)

        ROUTES.extend((method, path, with_form if form else handler, hashes) for path in paths)
        return handler

    return add


class Handlers:
    """The handlers of the routes. Each gets a form or reads a cookie, calls the rules, and returns a response."""

    def __init__(self, auth: rules.Auth, settings: Settings, metrics: Metrics | None = None) -> None:
        self._auth = auth
        self._settings = settings
        self._metrics = metrics
        self.offers_passkeys = bool(auth.passkey_host)
        # Not Secure in development: clients send no Secure cookie back over plain http. The prefixes (RFC 6265bis
        # 4.1.3) keep a sibling host from setting the cookie; __Host- forbids a Domain.
        domain = settings.cookie_domain
        prefix = ("__Secure-" if domain else "__Host-") if settings.production else ""
        self._cookie_name = prefix + "session_id"
        self._browser_name = "__Host-challenge" if settings.production else "challenge"
        secure = "; Secure" if settings.production else ""
        self._cookie_attributes = "HttpOnly; Path=/; SameSite=Lax" + secure + (f"; Domain={domain}" if domain else "")
        self._language_name = "__Host-language" if settings.production else "language"
        self._page = load_pages(settings, auth.passkey_host)

    @_route("GET", "/")
    def welcome(self) -> Response:
        if not self._settings.production:
            return json_response(200, message="Bienvenue")
        leads = re.match(" *text/html *([,;]|$)", request.environ.get("HTTP_ACCEPT", ""), re.IGNORECASE)  # a browser
        location = [("Location", "/account")] if leads else []
        return json_response(
            302 if leads else 200, ("Vary", f"Accept, {responses.VARY}"), *location, message="Bienvenue"
        )

    @_route("POST", "/users", hashes=True)
    def register(self) -> Response:
        if self._settings.confirms_email:
            (email,) = read_form(request.environ, fields=("email",))
            self._auth.mail_confirmation(email, caller=self._caller())
            return json_response(200, email=email, message="confirmation mailed")
        self._auth.check_registration()  # before the form, which needs no password where emails are confirmed
        email, password = read_form(request.environ, fields=("email", "password"))
        user = self._auth.create_account(email, password, caller=self._caller())
        return _logged("user_created", user, email=email, message="user created")

    @_route("PUT", "/users", fields=("email", "token", "password"), hashes=True)
    def confirm_account(self, email: str, token: str, password: str) -> Response:
        user = self._auth.confirm_account(email, token, password, caller=self._caller())
        return _logged("user_created", user, email=email, message="email confirmed")

    @_route("POST", "/sessions", fields=("email", "password"), optional=("otp",), flags=("remember",), hashes=True)
    def log_in(self, email: str, password: str, otp: str, remember: str) -> Response:
        session: dict[str, Any] = {"caller": self._caller(), "ended": self._cookie(), "remember": bool(remember)}
        try:
            user, session_id, factors = self._auth.log_in(email, password, otp, **session)
        except rules.LoginFailed as failure:
            account = {"user_id": failure.user_id} if failure.user_id else {"unknown": self._auth.tag(email)}
            _log("authn_login_fail", **account)
            raise
        return self._signed_in(user, email, session_id, remember, factors)

    def _signed_in(self, user: User, email: str, session_id: str, remember: str, factors: str) -> Response:
        age = self._settings.session_lifetime if remember else None
        answer = self._with_cookie(json_response(200, email=email, message="logged in"), session_id, age)
        answer = self._with_device(answer, user)
        _log("authn_login_success", user_id=user.id, factors=factors)  # last: it wakes a thread, which delays the rest
        return answer

    @_route("POST", "/sessions/passkey/options")
    def passkey_request(self) -> Response:
        return self._challenge(self._auth.passkey_request)

    @_route("POST", "/sessions/passkey", flags=("remember",), objects=("credential",))
    def log_in_with_passkey(self, remember: str, credential: dict[str, Any]) -> Response:
        session: dict[str, Any] = {"caller": self._caller(), "ended": self._cookie(), "remember": bool(remember)}
        user, session_id = self._auth.log_in_with_passkey(credential, self._browser(), **session)
        return self._signed_in(user, user.email, session_id, remember, "passkey")

    @_route("POST", "/passkeys/options", fields=("password",), optional=("otp",), hashes=True)
    def begin_passkey(self, password: str, otp: str) -> Response:
        given = self._cookie(), password, otp, self._caller()
        return self._challenge(lambda browser: self._auth.begin_passkey(*given, browser))

    @_route("POST", "/passkeys", fields=("name",), objects=("credential",))
    def add_passkey(self, name: str, credential: dict[str, Any]) -> Response:
        user, passkey_id, session_id = self._auth.add_passkey(
            self._cookie(), name, credential, self._browser(), caller=self._caller()
        )
        _log("authn_factor_added", user_id=user.id, passkey=passkey_id)
        return self._with_renewed(json_response(200, id=str(passkey_id), name=name), session_id)

    @_route("GET", "/passkeys")
    def passkeys(self) -> Response:
        user = self._auth.identify(self._cookie())
        return json_response(200, passkeys=list(map(rules.describe_passkey, self._auth.passkeys_of(user.id))))

    @_route("DELETE", "/passkeys/<passkey_id>", fields=("password",), optional=("otp",), hashes=True)
    def delete_passkey(self, password: str, otp: str, passkey_id: str) -> Response:
        user, session_id = self._auth.delete_passkey(self._cookie(), passkey_id, password, otp, caller=self._caller())
        _log("authn_factor_removed", user_id=user.id, passkey=int(passkey_id))
        return self._with_renewed(json_response(200, message="passkey deleted"), session_id)

    @_route("DELETE", "/sessions")
    def log_out(self) -> Response:
        user, forget = None, self._settings.production and request.query_string == "forget=1"
        with contextlib.suppress(rules.SessionRequired):
            while True:  # older sessions of the user may be in further cookies
                user = self._auth.log_out(self._cookie())
        if user:
            _log("session_ended", user_id=user.id)
        elif not forget:
            raise rules.SessionRequired
        # Not Bottle's redirect(): it answers 303 and copies the Host header into Location.
        answer = self._without_cookie(json_response(302, ("Location", "/"), message="logged out"))
        if forget:
            answer.headers.append(("Set-Cookie", f"{DEVICE_COOKIE}=; {DEVICE_ATTRIBUTES}; Max-Age=0"))
        return answer

    @_route("GET", "/sessions")
    def sessions(self) -> Response:
        user, found, own = self._auth.list_sessions(self._cookie())
        listed = [self._auth.describe_session(session) | {"current": session.id == own} for session in found]
        return json_response(200, email=user.email, second_factor=user.totp_since is not None, sessions=listed)

    @_route("DELETE", "/sessions/others", "/sessions/all")
    def end_sessions(self) -> Response:
        which = request.path.removeprefix("/sessions/")
        user = self._auth.end_sessions(self._cookie(), except_this=which == "others")
        _log("session_ended", user_id=user.id, which=which)
        if which == "others":
            return json_response(200, message="all other sessions ended")
        return self._without_cookie(json_response(200, message="all sessions ended"))

    @_route("DELETE", "/sessions/<public_id>")
    def end_session(self, public_id: str) -> Response:
        user, own = self._auth.end_session(self._cookie(), public_id)
        answer = _logged("session_ended", user, message="session ended")
        return self._without_cookie(answer) if own else answer

    @_route("GET", "/profile")
    def profile(self) -> Response:
        return json_response(200, email=self._auth.identify(self._cookie()).email)

    @_route("GET", "/verify")
    def verify(self) -> Response:
        """Tell a proxy which user sent a request to an application, if the user may use it."""
        leads, groups = _parse_verify_query(request.query_string)
        try:
            user = self._program() or self._auth.identify(self._cookie())
        except (rules.SessionRequired, rules.SecondFactorRequired) as refusal:
            _log("authz_verify_fail", reason=refusal.message)
            if leads and not (isinstance(refusal, rules.InvalidToken) or _is_asked_by_script()):
                return json_response(302, ("Location", self._sign_in_url(refusal)), message=refusal.message)
            # Programs such as git send no token unasked. A browser would ask for a password, and keep it.
            return json_response(401, *([] if leads or _is_browser() else [CHALLENGE]), message=refusal.message)
        if groups:
            self._auth.require_member(user, groups)
        # Percent-encoded where a header cannot hold it. "%" is encoded, too, so that no two users get the same name.
        name = user.email if HEADER_TEXT.fullmatch(user.email) else quote(user.email, safe="@")
        # Always all four: where one is missing, Caddy before 2.11.2 passes on the header that the client sent.
        names = ("Remote-User", name), ("Remote-Email", name)
        return json_response(200, *names, ("Remote-Groups", user.groups), ("Remote-Id", str(user.id)), email=user.email)

    def _program(self) -> User | None:
        authorization = request.environ.get("HTTP_AUTHORIZATION")
        return self._auth.identify_program(authorization, browser=_is_browser()) if authorization else None

    def _sign_in_url(self, refusal: rules.AuthError) -> str:
        # The page checks the return address when it uses it.
        forwarded = {part: request.environ.get(f"HTTP_X_FORWARDED_{part}", "") for part in ("PROTO", "HOST", "URI")}
        return_to = quote(f"{forwarded['PROTO']}://{forwarded['HOST']}{forwarded['URI']}", safe="")
        page = "account" if isinstance(refusal, rules.SecondFactorRequired) else "login"  # sets one up, or signs in
        return f"{self._settings.public_url}/{page}" + (f"?return={return_to}" if all(forwarded.values()) else "")

    @_route("GET", "/health")
    def health(self) -> Response:
        self._auth.check_storage()
        return json_response(200, message="ok")

    @_route("GET", "/metrics")
    def metrics(self) -> Response:
        if not (self._metrics and is_direct(request.environ)):
            return json_response(404, message=responses.MESSAGES[404])
        try:
            kind, text = self._metrics.text()
        except ImportError:
            return json_response(404, message=NO_METRICS)
        return Response(200, text, [("Content-Type", kind), ("Content-Length", str(len(text)))])

    @_route("DELETE", "/profile", fields=("password",), optional=("otp",), hashes=True)
    def delete_account(self, password: str, otp: str) -> Response:
        user = self._auth.delete_account(self._cookie(), password, otp, caller=self._caller())
        return self._without_cookie(_logged("user_deleted", user, email=user.email, message="account deleted"))

    @_route("PUT", "/password", fields=("password", "new_password"), optional=("otp",), hashes=True)
    def change_password(self, password: str, new_password: str, otp: str) -> Response:
        given = self._cookie(), password, new_password, otp
        user, session_id = self._auth.change_password(*given, caller=self._caller())
        answer = _logged("authn_password_change", user, email=user.email, message="password changed")
        return self._with_device(self._with_renewed(answer, session_id), user)

    @_route("POST", "/email", fields=("password", "new_email"), optional=("otp",), hashes=True)
    def begin_email_change(self, password: str, new_email: str, otp: str) -> Response:
        token = self._auth.begin_email_change(self._cookie(), password, new_email, otp, caller=self._caller(local=True))
        content = {"email": new_email, "token": token} if token else {"message": "confirmation mailed"}
        return json_response(200, **content)

    @_route("PUT", "/email", fields=("email", "token"))
    def change_email(self, email: str, token: str) -> Response:
        user, session_id = self._auth.change_email(self._cookie(), email, token, caller=self._caller())
        _log("user_updated", user_id=user.id, changed="email")
        return self._with_renewed(json_response(200, email=email, message="email changed"), session_id)

    @_route("POST", "/tokens", fields=("password", "name"), optional=("days", "otp"), hashes=True)
    def create_token(self, password: str, name: str, days: str, otp: str) -> Response:
        user, token, text = self._auth.create_token(self._cookie(), password, name, days, otp, caller=self._caller())
        _log("authn_token_created", user_id=user.id, token=token.id)
        shown = rules.describe_token(token)
        return json_response(200, id=shown["id"], name=name, token=text, expires=shown["expires"])

    @_route("GET", "/tokens")
    def tokens(self) -> Response:
        user = self._auth.identify(self._cookie())
        return json_response(200, tokens=[rules.describe_token(token) for token in self._auth.tokens_of(user.id)])

    @_route("DELETE", "/tokens/<token_id>")
    def delete_token(self, token_id: str) -> Response:
        user = self._auth.identify(self._cookie())
        self._auth.delete_token(user, token_id)
        _log("authn_token_revoked", user_id=user.id, token=int(token_id))
        return json_response(200, message="token deleted")

    @_route("POST", "/totp", fields=("password",), hashes=True)
    def begin_totp(self, password: str) -> Response:
        secret, uri, qr_code, session_id = self._auth.begin_totp(self._cookie(), password, caller=self._caller())
        answer = json_response(200, secret=secret, uri=uri, **({"qr": qr_code} if qr_code else {}))
        return self._with_renewed(answer, session_id)

    @_route("PUT", "/totp", fields=("otp",))
    def confirm_totp(self, otp: str) -> Response:
        user, session_id, codes = self._auth.confirm_totp(self._cookie(), otp, caller=self._caller())
        answer = _logged("authn_factor_added", user, message="second factor on", recovery_codes=codes)
        return self._with_device(self._with_renewed(answer, session_id), user)

    @_route("DELETE", "/totp", fields=("password", "otp"), hashes=True)
    def remove_totp(self, password: str, otp: str) -> Response:
        user, session_id = self._auth.remove_totp(self._cookie(), password, otp, caller=self._caller())
        return self._with_renewed(_logged("authn_factor_removed", user, message="second factor off"), session_id)

    @_route("POST", "/reset_password", fields=("email",))
    def request_reset(self, email: str) -> Response:
        if self._settings.production:
            self._auth.mail_reset_token(email, caller=self._caller())
            return json_response(200, message="if the email has an account, a mail is on its way")
        # Anyone with the token can take over the account.
        if not is_direct(request.environ):
            raise Refusal(403, "reset tokens are given only to this machine, and through no proxy")
        return json_response(200, email=email, reset_token=self._auth.issue_reset_token(email, caller=self._caller()))

    @_route("PUT", "/reset_password", fields=("email", "reset_token", "new_password"), hashes=True)
    def reset(self, email: str, reset_token: str, new_password: str) -> Response:
        user = self._auth.reset_password(reset_token, new_password, email=email, caller=self._caller())
        answer = _logged("authn_password_change", user, email=email, message="Password updated")
        return self._with_device(answer, user, "reset")

    @_route("GET", "/.well-known/change-password")  # https://w3c.github.io/webappsec-change-password-url/
    def change_password_url(self) -> Response:
        return json_response(302, ("Location", "/account"), message="change the password here")

    @_route("GET", "/pages/style.css", "/pages/script.js")
    @_route("GET", "/login", "/register", "/forgot", "/reset", "/logout", "/confirm", "/change")
    def page(self) -> Response:
        return self._page(request.path, self._language())

    @_route("GET", "/account")
    def account(self) -> Response:
        try:
            self._auth.identify(self._cookie(), enrolling=True)
        except rules.SessionRequired as refusal:
            # The login page leads back here.
            return json_response(302, ("Location", f"{self._settings.public_url}/login"), message=refusal.message)
        return self.page()

    def rank(self, environ: WSGIEnvironment) -> tuple[bool, str]:
        """Return whether a request goes before those of strangers while many wait, and a name of its account.

        For web/server.py, which calls it on the I/O thread: it only reads.
        """
        request.bind(environ)
        route = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        try:
            if route not in RANKED_BY_EMAIL:
                return self._auth.rank_session(self._cookie())
            email, reset_token, token = read_form(environ, optional=("email", "reset_token", "token"))
            if route[0] == "PUT":
                return self._auth.rank_token(email, reset_token, token)
            creates = route == ("POST", "/users")
            return self._auth.rank_login(email, None if creates else _device())
        except (Refusal, StorageUnavailable):  # the route answers that
            return False, ""

    def _cookie(self) -> str | None:
        found = _read_cookies(self._cookie_name, SESSION_ID)
        return self._auth.newest_session(found) if len(found) > 1 else found[0] if found else None

    def _without_cookie(self, answer: Response) -> Response:
        return self._with_cookie(answer, "", 0)

    def _with_renewed(self, answer: Response, session_id: str) -> Response:
        return self._with_cookie(answer, session_id, self._auth.cookie_age(session_id))

    def _with_cookie(self, answer: Response, value: str, age: int | None) -> Response:
        expiry = "" if age is None else f"; Max-Age={age}"
        # Not Bottle's writer: it writes SameSite in lower case.
        answer.headers.append(("Set-Cookie", f"{self._cookie_name}={value}; {self._cookie_attributes}{expiry}"))
        domain = self._settings.cookie_domain
        # A cookie of this host alone would be sent beside it. Where the domain is this host, some clients do not tell
        # the two apart (RFC 6265, 5.3), and would delete the new one.
        if domain and not (value and domain == urlsplit(self._settings.public_url).hostname):
            own_host = self._cookie_attributes.removesuffix(f"; Domain={domain}")
            answer.headers.append(("Set-Cookie", f"{self._cookie_name}=; {own_host}; Max-Age=0"))
        return answer

    def _caller(self, *, local: bool = False) -> rules.Caller:
        """Return who sends this request. With ``local``, find out whether it is a program on this machine."""
        address, agent = request.environ["authsvc.client"], request.environ.get("HTTP_USER_AGENT", "")
        direct = local and is_direct(request.environ)
        return rules.Caller(address, _device(), agent, direct, _later_log(), self._language())

    def _language(self) -> str:
        """Return the language for the visitor, of pages and mails."""
        chosen = _read_cookies(self._language_name, LANGUAGE)  # counts before what the browser prefers
        return choose_language(",".join([*chosen, request.environ.get("HTTP_ACCEPT_LANGUAGE", "")]))

    def _browser(self) -> str:
        """Return what ties the challenge of a passkey to this browser: the value of a cookie, or a new one."""
        found = _read_cookies(self._browser_name, SESSION_ID)
        return found[0] if len(found) == 1 else secrets.token_urlsafe(16)

    def _challenge(self, ask: Callable[[str], dict[str, object]]) -> Response:
        """Return the options for a passkey, with the cookie that ties their challenge to this browser."""
        browser, secure = self._browser(), "; Secure" if self._settings.production else ""
        attributes = f"HttpOnly; Path=/; SameSite=Lax{secure}; Max-Age={self._auth.challenge_lifetime}"
        return json_response(200, ("Set-Cookie", f"{self._browser_name}={browser}; {attributes}"), **ask(browser))

    def _with_device(self, answer: Response, user: User, kind: str = "full") -> Response:
        if value := self._auth.device_cookie(user, _device(), kind):
            expiry = f"; Max-Age={self._auth.device_lifetime}"
            answer.headers.append(("Set-Cookie", f"{DEVICE_COOKIE}={value}; {DEVICE_ATTRIBUTES}{expiry}"))
        return answer


# Routes of which the form names the account. Those of all others need a session.
RANKED_BY_EMAIL = {(method, path) for path in ("/sessions", "/users", "/reset_password") for method in ("POST", "PUT")}

# The server looks them up by path, so none may be a GET: those run on the I/O thread. "*" is a variable.
HASHING_ROUTES = frozenset((method, re.sub("<.*>", "*", path)) for method, path, _, hashes in ROUTES if hashes)
ALL_ROUTES = frozenset((method, re.sub("<.*>", "*", path)) for method, path, *_ in ROUTES)


def create_app(settings: Settings, auth: rules.Auth | None = None) -> WSGIApplication:
    """Return the service as a WSGI callable.

    Raises:
        DatabaseRefused: the database of the settings cannot be opened.
    """
    return _application(Handlers(auth or _open_auth(settings), settings), settings)


def _application(handlers: Handlers, settings: Settings, observe: Observe | None = None) -> WSGIApplication:
    bottle = Bottle()
    bottle.config["catchall"] = False  # the middleware answers unexpected errors
    bottle.uninstall(True)  # Bottle's own plugins: our handlers return neither dicts nor templates
    bottle.default_error_handler = _bottle_error
    direct: dict[tuple[str, str], Handler] = {}  # paths without a variable, found faster than by Bottle's router
    for method, path, function, _ in ROUTES:
        offered = handlers.offers_passkeys or "passkey" not in path
        handler = functools.partial(function, handlers) if offered else _not_found
        bottle.route(path, method, functools.partial(_answer_bottle, handler))
        if "<" not in path:
            direct[method, path] = functools.partial(_answer, handler)

    def application(environ: WSGIEnvironment, start_response: StartResponse) -> Any:
        handler = direct.get((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if handler is None:  # a path with a variable, HEAD, 404 or 405
            return bottle(environ, start_response)
        request.bind(environ)
        answer = handler()
        start_response(responses.status_line(answer.status), answer.headers)
        return [answer.body]

    return SecurityMiddleware(application, settings, observe)


def _open_auth(settings: Settings) -> rules.Auth:
    mailer = Mailer(settings, log_event)  # before the database: a start that fails must not leave a file behind
    return rules.Auth(settings=settings, mailer=mailer)


def _start_pruning(auth: rules.Auth, stopping: threading.Event) -> threading.Thread:
    def prune() -> None:
        pause = 0.0
        while not stopping.wait(pause):
            began, pause = time.monotonic(), PRUNE_RETRY
            try:
                auth.mail_summaries()
                for _ in auth.prune():
                    if stopping.wait((time.monotonic() - began) * PRUNE_REST):
                        return
                    began = time.monotonic()
                if auth.empty_log():
                    pause = PRUNE_INTERVAL
            except StorageUnavailable:
                pass  # another process is writing; the next round deletes the rows
            except Exception as error:
                log_crash(error)

    thread = threading.Thread(target=prune, daemon=True)
    thread.start()
    return thread


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Answer one request: the WSGI callable for other servers. The first request reads the environment."""
    try:
        with _opening:
            application = _shared_app()
    except (SettingsError, DatabaseRefused) as error:
        request_id = responses.new_request_id()
        log_event("sys_startup_failed", request_id=request_id, reason=str(error))
        headers, body = responses.complete_error("service not configured", request_id, production=False)
        start_response(responses.status_line(503), headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
    return application(environ, start_response)


_opening = threading.Lock()  # two first requests at once must open one database


@functools.cache
def _shared_app() -> WSGIApplication:
    settings = Settings.from_environ()
    auth = _open_auth(settings)
    _start_pruning(auth, threading.Event())
    return create_app(settings, auth)


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C, or run one of the operator's commands; return the exit code."""
    # Without these descriptors, files of the database would get their numbers, and be written to as streams.
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY), encoding="utf-8")
    if sys.stdout is None:
        print("authsvc: standard output is closed: redirect it to /dev/null", file=sys.stderr)
        return 1
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not be able to show every email
    try:
        code, message = _run(arguments), ""
    except (SettingsError, DatabaseRefused) as error:
        code, message = 2, str(error)
    except OSError as error:  # of a full disk under standard output or the log
        code, message = 1, f"{error.filename or 'output'}: {error.strerror}"
    except SystemExit as ended:  # argparse has printed a help text or an error
        raise SystemExit(_flush(int(ended.code or 0))) from None
    if message:
        with contextlib.suppress(OSError):
            print(f"authsvc: {message}", file=sys.stderr)
    return _flush(code)


def _flush(code: int) -> int:
    """Flush standard output and error. Return the exit code, which becomes 1 if standard output is lost."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python would flush it once more
            if isinstance(error, BrokenPipeError):  # the reader has all that it wants, as "head" does
                continue
            with contextlib.suppress(OSError):
                print("" if code else f"authsvc: standard output: {error.strerror}\n", end="", file=sys.stderr)
            code = code or int(stream is sys.stdout)  # a log that is lost fails no command
    return code


def _run(arguments: list[str] | None) -> int:
    if not (sys.argv[1:] if arguments is None else arguments):
        return serve(Settings.from_environ())  # without the modules of the commands, which take 1 MB

    from cli import commands

    name = Path(sys.argv[0]).name.removesuffix(".pyz")  # the command "authsvc" of deploy/ starts authsvc.pyz
    parser = commands.new_parser(name, DESCRIPTION, EPILOG)
    parsed, extra = parser.parse_known_args(arguments)
    if extra:  # words are not shown: one may be a password
        options = [one if re.fullmatch("--?[a-z-]+", one) else "…" for one in extra]
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if parsed.version:
        print(f"authsvc {_version()}")
        return 0
    settings = Settings.from_environ()
    return commands.run(parsed, settings) if parsed.command else serve(settings)


def _version() -> str:
    import tomllib  # no request needs it

    project = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(project)["project"]["version"])


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        SettingsError, DatabaseRefused: it cannot start.
    """
    from credentials.passwords import CORES
    from web.server import Dispatcher, Server
    from web.systemd import passed_socket

    # The database last: a start that fails must not leave a file behind.
    listener = passed_socket() or _bind(settings)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    settings = replace(settings, listen=address)  # not that of the settings if a socket was passed or the port was 0
    metrics, mailer = Metrics(ALL_ROUTES), Mailer(settings, log_event)
    if settings.metrics_listen:
        metrics.listen(settings.metrics_listen)
    auth = rules.Auth(
        settings=settings, run_in_background=lambda write: dispatcher.run_in_background(write), mailer=mailer
    )
    handlers = Handlers(auth, settings, metrics)
    dispatcher = Dispatcher(HASHING_ROUTES, CORES, settings, handlers.rank, metrics.observe)
    server = Server(_application(handlers, settings, metrics.observe), listener, dispatcher)
    version = {"version": _version(), "database": auth.engine_version}
    metrics.watch(version, server, auth.figures, mailer.waiting)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    print(f"http://{address}", flush=True)
    log_event("sys_startup", **version, production=settings.production)
    for warning in settings.warnings():
        log_event("sys_warning", reason=warning)
    stopping = threading.Event()
    pruning = _start_pruning(auth, stopping)
    finished = server.run()
    stopping.set()
    pruning.join(timeout=1.0)
    if finished and not pruning.is_alive():
        with contextlib.suppress(StorageUnavailable):  # the next start merges the write-ahead log
            auth.close()
    log_event("sys_shutdown")
    return 0


def _bind(settings: Settings) -> socket.socket:
    host, port = settings.address
    family = socket.AF_INET if host.version == 4 else socket.AF_INET6
    both = host.version == 6 and socket.has_dualstack_ipv6()  # [::] takes IPv4 as well
    try:
        # It listens from now on, so that a second service on this port fails before it opens the database.
        return socket.create_server((str(host), port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise SettingsError(f"AUTHSVC_LISTEN={settings.listen}: {os.strerror(error.errno or 0).lower()}") from None


@functools.lru_cache(maxsize=64)  # a proxy always sends the same few
def _parse_verify_query(query: str) -> tuple[bool, frozenset[str]]:
    """Return whether /verify leads to the sign-in page, and the groups that may use the application; none: all users.

    The query is that of the proxy's own request, and compared as it is: a misspelt group lets nobody in.
    """
    parts = query.split("&") if query else []
    if not all(map(VERIFY_QUERY.fullmatch, parts)):
        raise Refusal(400, "the query may only contain login=1 and group=NAME")
    return "login=1" in parts, frozenset(part.removeprefix("group=") for part in parts) - {"login=1"}


def _is_asked_by_script() -> bool:
    # A script cannot follow a redirect to the sign-in page on another host: it only learns that something has failed.
    mode = request.environ.get("HTTP_SEC_FETCH_MODE", "navigate")
    return bool(mode != "navigate" or request.environ.get("HTTP_X_REQUESTED_WITH") == "XMLHttpRequest")


def _is_browser() -> bool:
    return any(name.startswith("HTTP_SEC_FETCH_") for name in request.environ)


def _not_found(**_: str) -> Response:
    raise Refusal(404, responses.MESSAGES[404])


def _answer(handler: Handler, **parts: str) -> Response:
    """Return the response of a handler. Every refusal of it and of the layers below becomes a response, too."""
    try:
        return handler(**parts)
    except Refusal as refusal:
        event = "authz_fail" if refusal.status == 403 else "input_validation_fail"
        _log(event, reason=refusal.message)
        return json_response(refusal.status, message=refusal.message)
    except rules.AuthError as error:
        if error.event:
            _log(error.event, **({"user_id": error.user_id} if error.user_id else {}))
        retry = [("Retry-After", str(error.wait))] if isinstance(error, rules.TooManyAttempts) else []
        return json_response(error.status, *retry, message=error.message)
    except StorageUnavailable as error:
        _log("sys_storage_unavailable", reason=str(error))
        return json_response(503, ("Retry-After", str(RETRY_AFTER)), message="storage unavailable, try again later")


def _answer_bottle(handler: Handler, **parts: str) -> HTTPResponse:
    answer = _answer(handler, **parts)
    return HTTPResponse(answer.body, answer.status, answer.headers)


def _bottle_error(error: HTTPError) -> bytes:
    """Return Bottle's own answers, 404 and 405, as JSON. They keep their Allow header."""
    response.content_type = "application/json"
    return responses.json_body({"message": responses.MESSAGES.get(error.status_code, "refused")})


def _read_cookies(name: str, form: re.Pattern[str]) -> list[str]:
    """Return the different values of a cookie that have the right form; none where there are more than MAX_COOKIES."""
    # Not Bottle's reader: it fails on a malformed cookie next to ours.
    header = request.environ.get("HTTP_COOKIE", "")
    pairs = [pair.strip(" ").partition("=") for pair in header.split(";") if name in pair]
    found = {value: None for key, _, value in pairs if key == name}
    return [value for value in found if form.fullmatch(value)] if len(found) <= MAX_COOKIES else []


def _device() -> str | None:
    found = _read_cookies(DEVICE_COOKIE, DEVICE_TOKENS)
    return found[0] if len(found) == 1 else None  # two are ambiguous


def _later_log() -> Callable[..., None]:
    """Return a function that logs an event of this request, also after its answer and on another thread."""
    environ = request.environ
    return functools.partial(log_event, request_id=environ["authsvc.request_id"], address=environ["authsvc.client"])


def _log(event: str, **details: object) -> None:
    _later_log()(event, **details)


def _logged(event: str, user: User, **content: object) -> Response:
    """Log what a user has done, and return the response that confirms it."""
    _log(event, user_id=user.id)
    return json_response(200, **content)


if __name__ == "__main__":
    sys.exit(main())
