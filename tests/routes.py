"""Shared by the tests of the routes: lists of routes, one-line requests, and an application that must not change."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from auth import Auth
from authsvc import create_app
from credentials import totp
from settings import Settings
from storage import DB
from tests.conftest import COST, Answer, Client, Clock, raw_connection

BOB = {"email": "bob@x.io", "password": "b4l0u"}
UUID4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
COOKIE_ATTRIBUTES = "HttpOnly; Path=/; SameSite=Lax"

# The routes that read a body, each with its required fields.
FORMS = [
    ("POST", "/users", ("email", "password")),
    ("PUT", "/users", ("email", "token", "password")),
    ("POST", "/sessions", ("email", "password")),
    ("POST", "/reset_password", ("email",)),
    ("PUT", "/reset_password", ("email", "reset_token", "new_password")),
    ("DELETE", "/profile", ("password",)),
    ("PUT", "/password", ("password", "new_password")),
    ("POST", "/email", ("password", "new_email")),
    ("PUT", "/email", ("email", "token")),
    ("POST", "/tokens", ("password", "name")),
    ("POST", "/passkeys/options", ("password",)),
    ("DELETE", "/passkeys/1", ("password",)),
    ("POST", "/totp", ("password",)),
    ("PUT", "/totp", ("otp",)),
    ("DELETE", "/totp", ("password", "otp")),
]
FIELDS = [(method, path, field) for method, path, fields in FORMS for field in fields]

# The pages and their files, each with its content type.
HTML = "text/html; charset=utf-8"
PAGES = {
    **dict.fromkeys(("/login", "/register", "/forgot", "/reset", "/logout", "/confirm", "/change", "/account"), HTML),
    "/pages/style.css": "text/css; charset=utf-8",
    "/pages/script.js": "text/javascript; charset=utf-8",
}

# /verify is open: it answers a request without a session with 401.
OPEN_ROUTES = [
    *(
        ("GET", path)
        for path in ("/", "/health", "/metrics", "/verify", "/.well-known/change-password", *PAGES)
        if path != "/account"
    ),
    *((method, path) for method, path, _ in FORMS[:5]),
    ("POST", "/sessions/passkey/options"),
]
# The routes that read a passkey, which only JSON can carry: see test_passkeys.py.
JSON_ROUTES = [("POST", "/passkeys"), ("POST", "/sessions/passkey")]
SESSION_ROUTES = [
    ("GET", "/profile"),
    ("DELETE", "/profile"),
    ("GET", "/sessions"),
    ("DELETE", "/sessions"),
    ("DELETE", "/sessions/others"),
    ("DELETE", "/sessions/all"),
    ("DELETE", "/sessions/0123456789abcdef"),
    ("PUT", "/password"),
    ("POST", "/email"),
    ("PUT", "/email"),
    ("POST", "/tokens"),
    ("GET", "/tokens"),
    ("DELETE", "/tokens/1"),
    ("POST", "/passkeys/options"),
    ("GET", "/passkeys"),
    ("DELETE", "/passkeys/1"),
    ("POST", "/totp"),
    ("PUT", "/totp"),
    ("DELETE", "/totp"),
]


@dataclass
class SharedApp:
    """An application in which Bob is signed in and has a reset token, shared by tests that change nothing."""

    call: Client
    session_id: str
    reset_token: str
    connection: sqlite3.Connection

    @property
    def cookie(self) -> str:
        return f"session_id={self.session_id}"

    @property
    def form(self) -> dict[str, str]:
        """Valid fields for every route except POST /users. Each route ignores the ones it does not read."""
        given = {"reset_token": self.reset_token, "new_password": "t4rt1fl3tt3", "otp": "000000"}
        return {**BOB, **given, "token": "nope", "new_email": "new@x.io", "name": "git"}

    def refuses(self, status: int, method: str, path: str, form: Any = None, **rest: Any) -> str:
        """Assert that a request with Bob's cookie is refused and changes nothing; return the message."""
        rest.setdefault("cookie", self.cookie)
        before = self._rows()
        answer = self.call(method, path, form, **rest)
        assert answer.status == status, (method, path, form, answer.body)
        assert "Set-Cookie" not in answer.headers
        assert answer.headers["Content-Type"] == "application/json"
        assert list(answer.json) == ["message"]
        assert self._rows() == before
        return str(answer.json["message"])

    def _rows(self) -> list[Any]:
        return [row for table in ("users", "sessions") for row in self.connection.execute(f"SELECT * FROM {table}")]


@contextmanager
def open_shared_app(folder: Path) -> Iterator[SharedApp]:
    """Yield the shared application. It has no rate limits, because hundreds of tests make wrong requests as Bob."""
    settings = Settings(database=str(folder / "authsvc.db"), bcrypt_cost=COST, throttle=False)
    with closing(DB(settings.database)) as db, raw_connection(settings.database) as connection:
        call = Client(create_app(settings, Auth(db, settings, Clock())))
        register(call)
        yield SharedApp(call, log_in(call).session_id, reset_token(call), connection)


@dataclass
class TotpUser:
    """Bob, who sets up and uses two-factor authentication."""

    call: Client
    clock: Clock
    cookie: str = ""
    former: str = ""  # the cookie before begin()
    seed: str = ""
    recovery_codes: tuple[str, ...] = ()

    def code(self) -> str:
        """Return a one-time code that was not used before."""
        self.clock.advance(totp.STEP)
        return totp.code(self.seed, int(self.clock()) // totp.STEP)

    def log_in(self, otp: str | None = None, **rest: Any) -> Answer:
        return self.call("POST", "/sessions", {**BOB, **({} if otp is None else {"otp": otp})}, **rest)

    def begin(self) -> Answer:
        """Sign in and request a new seed."""
        self.former = cookie_of(self.log_in(REMOTE_ADDR="127.0.0.1"))
        answer = self.call("POST", "/totp", {"password": "b4l0u"}, cookie=self.former)
        self.cookie, self.seed = cookie_of(answer), answer.json["secret"]
        return answer

    def confirm(self) -> Answer:
        """Confirm the seed with its first code."""
        answer = self.call("PUT", "/totp", {"otp": self.code()}, cookie=self.cookie)
        self.cookie, self.recovery_codes = cookie_of(answer), tuple(answer.json["recovery_codes"])
        return answer


def register(call: Client, email: str = "bob@x.io", password: str = "b4l0u") -> None:
    assert call("POST", "/users", {"email": email, "password": password}).status == 200


def log_in(call: Client, email: str = "bob@x.io", password: str = "b4l0u", **rest: Any) -> Answer:
    return call("POST", "/sessions", {"email": email, "password": password}, **rest)


def reset_token(call: Client, email: str = "bob@x.io") -> str:
    return str(call("POST", "/reset_password", {"email": email}).json["reset_token"])


def profile_status(call: Client, cookie: str) -> int:
    """Return the status of GET /profile: 200 for a valid session, else 403."""
    return call("GET", "/profile", cookie=cookie).status


def cookie_of(answer: Answer) -> str:
    """Return the session cookie that an answer sets, as a client sends it back."""
    assert answer.status == 200
    return f"session_id={answer.session_id}"


def public_id_of(cookie: str) -> str:
    """Return the public id of the session of a cookie."""
    return hashlib.sha256(cookie.partition("=")[2].encode()).hexdigest()[:16]


def as_json(content: Any) -> dict[str, Any]:
    """Return the arguments of Client for a JSON body: an object to encode, or the text itself."""
    text = content if isinstance(content, str) else json.dumps(content)
    return {"body": text.encode(), "content_type": "application/json"}


def assert_200(answer: Answer, content: dict[str, Any]) -> None:
    """Assert that the answer is 200 and this JSON object."""
    assert (answer.status, answer.json) == (200, content)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Length"] == str(len(answer.body))


def assert_new_id(call: Client, answer: Answer, old: str) -> str:
    """Assert that the session continues under a new id, and that the old one is invalid; return the new cookie."""
    assert re.fullmatch(f"session_id={UUID4}; {COOKIE_ATTRIBUTES}", answer.headers["Set-Cookie"])
    new = cookie_of(answer)
    assert (profile_status(call, old), profile_status(call, new)) == (403, 200)
    return new


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the log lines since the last call."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]
