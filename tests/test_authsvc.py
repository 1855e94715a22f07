"""The desk: what every route answers and refuses, forms, cookies, and the WSGI callable for another server."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import requests

import authsvc
import database
import totp
from auth import Auth, AuthError
from settings import Settings
from storage import DB, User, open_store
from tests.conftest import COST, HERE, Answer, Client, Clock, clean_environ, ledger_of

BOB = {"email": "bob@x.io", "password": "b4l0u"}
UUID4 = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
ATTRIBUTES = "HttpOnly; Path=/; SameSite=Lax"

# What each route reads.
FORMS = [
    ("POST", "/users", ("email", "password")),
    ("POST", "/sessions", ("email", "password")),
    ("POST", "/reset_password", ("email",)),
    ("PUT", "/reset_password", ("email", "reset_token", "new_password")),
    ("DELETE", "/profile", ("password",)),
    ("PUT", "/password", ("password", "new_password")),
    ("POST", "/totp", ("password",)),
    ("PUT", "/totp", ("otp",)),
    ("DELETE", "/totp", ("password", "otp")),
]
FIELDS = [(method, path, field) for method, path, fields in FORMS for field in fields]

# Where each page and each of its files is, and of which type it is.
HTML = "text/html; charset=utf-8"
PAGES = {
    **dict.fromkeys(("/login", "/register", "/forgot", "/reset", "/account"), HTML),
    "/pages/style.css": "text/css",
    "/pages/script.js": "text/javascript",
}

# What can be asked for without a session, and what cannot. The answer of /verify is that there is none.
OPEN = [
    *(("GET", path) for path in ("/", "/health", "/verify", *PAGES) if path != "/account"),
    *((method, path) for method, path, _ in FORMS[:4]),
]
CLOSED = [
    ("GET", "/profile"),
    ("DELETE", "/profile"),
    ("GET", "/sessions"),
    ("DELETE", "/sessions"),
    ("DELETE", "/sessions/others"),
    ("DELETE", "/sessions/all"),
    ("DELETE", "/sessions/0123456789abcdef"),
    ("PUT", "/password"),
    ("POST", "/totp"),
    ("PUT", "/totp"),
    ("DELETE", "/totp"),
]


@dataclass
class Home:
    """One application in which Bob is logged in and has a reset token, for all that must change nothing."""

    call: Client
    session_id: str
    reset_token: str
    ledger: sqlite3.Connection

    @property
    def form(self) -> dict[str, str]:
        """Fields that every route but POST /users would accept; extra ones are ignored."""
        return {**BOB, "reset_token": self.reset_token, "new_password": "t4rt1fl3tt3", "otp": "000000"}

    def refuses(self, status: int, method: str, path: str, form: Any = None, **rest: Any) -> str:
        """Assert that a request of Bob's is refused and changes nothing; return the reason that is given."""
        rest.setdefault("cookie", f"session_id={self.session_id}")
        before = self.rows()
        answer = self.call(method, path, form, **rest)
        assert answer.status == status, (method, path, form, answer.body)
        assert "Set-Cookie" not in answer.headers
        assert answer.headers["Content-Type"] == "application/json"
        assert list(answer.json) == ["message"]
        assert self.rows() == before
        return str(answer.json["message"])

    def rows(self) -> list[Any]:
        return [*self.ledger.execute("SELECT * FROM users"), *self.ledger.execute("SELECT * FROM sessions")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    settings = Settings(database=str(tmp_path_factory.mktemp("home") / "authsvc.db"), bcrypt_cost=COST)
    db = open_store(settings.database)
    call = Client(authsvc.create_app(settings, Auth(db, settings, Clock())))
    register(call)
    session_id = call("POST", "/sessions", BOB).session_id
    with ledger_of(settings.database) as ledger:
        yield Home(call, session_id, token_of(call), ledger)
    db.close()


def register(call: Client, email: str = "bob@x.io", password: str = "b4l0u") -> None:
    assert call("POST", "/users", {"email": email, "password": password}).status == 200


def log_in(call: Client, email: str = "bob@x.io", password: str = "b4l0u", **rest: Any) -> Answer:
    return call("POST", "/sessions", {"email": email, "password": password}, **rest)


def token_of(call: Client, email: str = "bob@x.io") -> str:
    return str(call("POST", "/reset_password", {"email": email}).json["reset_token"])


def profile(call: Client, cookie: str) -> int:
    return call("GET", "/profile", cookie=cookie).status


def as_json(content: Any) -> dict[str, Any]:
    text = content if isinstance(content, str) else json.dumps(content)
    return {"body": text.encode(), "content_type": "application/json"}


def assert_200(answer: Answer, content: dict[str, Any]) -> None:
    assert (answer.status, answer.json) == (200, content)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Length"] == str(len(answer.body))


# Routes


def test_welcome(call: Client) -> None:
    assert_200(call("GET", "/"), {"message": "Bienvenue"})


def test_registering(call: Client) -> None:
    answer = call("POST", "/users", BOB)
    assert_200(answer, {"email": "bob@x.io", "message": "user created"})
    assert "Set-Cookie" not in answer.headers


def test_logging_in(call: Client) -> None:
    register(call)
    answer = log_in(call)
    assert_200(answer, {"email": "bob@x.io", "message": "logged in"})
    assert re.fullmatch(f"session_id={UUID4}; {ATTRIBUTES}", answer.headers["Set-Cookie"])


def test_the_profile(home: Home) -> None:
    answer = home.call("GET", "/profile", cookie=f"session_id={home.session_id}")
    assert_200(answer, {"email": "bob@x.io"})


def test_logging_out(call: Client) -> None:
    register(call)
    cookie = f"session_id={log_in(call).session_id}"
    answer = call("DELETE", "/sessions", cookie=cookie, HTTP_HOST="evil.example", HTTP_X_FORWARDED_HOST="evil.example")
    assert (answer.status, answer.headers["Location"]) == (302, "/")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Set-Cookie"] == f"session_id=; {ATTRIBUTES}; Max-Age=0"
    assert b"evil" not in answer.body
    assert profile(call, cookie) == 403
    assert call("DELETE", "/sessions", cookie=cookie).status == 403


def test_resetting_the_password(call: Client) -> None:
    register(call)
    cookie = f"session_id={log_in(call).session_id}"
    answer = call("POST", "/reset_password", {"email": "bob@x.io"})
    token = answer.json["reset_token"]
    assert re.fullmatch(UUID4, token)
    assert_200(answer, {"email": "bob@x.io", "reset_token": token})
    form = {"email": "bob@x.io", "reset_token": token, "new_password": "t4rt1fl3tt3"}
    assert_200(call("PUT", "/reset_password", form), {"email": "bob@x.io", "message": "Password updated"})
    assert profile(call, cookie) == 403
    assert (log_in(call).status, log_in(call, password="t4rt1fl3tt3").status) == (401, 200)


def test_a_spent_token_is_refused(call: Client) -> None:
    register(call)
    form = {"email": "bob@x.io", "reset_token": token_of(call), "new_password": "t4rt1fl3tt3"}
    answers = [call("PUT", "/reset_password", form) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 403]
    assert answers[1].json == {"message": "invalid reset token"}


def test_the_token_of_another_email_is_refused_and_not_spent(call: Client) -> None:
    register(call)
    register(call, "eve@x.io")
    form = {"email": "bob@x.io", "reset_token": token_of(call, "eve@x.io"), "new_password": "t4rt1fl3tt3"}
    assert call("PUT", "/reset_password", form).status == 403
    assert log_in(call).status == 200
    assert call("PUT", "/reset_password", {**form, "email": "eve@x.io"}).status == 200


@pytest.mark.parametrize("email", ["BOB@x.io", "bob@X.IO"])
def test_the_email_in_an_answer_is_the_one_that_was_sent(call: Client, email: str) -> None:
    register(call, "Bob@X.io")
    answer = log_in(call, email)
    assert answer.json["email"] == email
    assert call("GET", "/profile", cookie=f"session_id={answer.session_id}").json == {"email": "Bob@X.io"}
    token = token_of(call, email)
    form = {"email": email, "reset_token": token, "new_password": "t4rt1fl3tt3"}
    assert call("PUT", "/reset_password", form).json["email"] == email


def test_an_odd_email_registers(call: Client) -> None:
    for email in (
        "nope",
        "unknown@email",
        "a b@x.io",
        '"q"@x.io',
        "o'brien@x.io",
        "é@x.io",
        "用户@例子",
        "🐟",
        "É" * 127,
    ):
        form = {"email": email, "password": "b4l0u"}
        assert_200(call("POST", "/users", form), {"email": email, "message": "user created"})
        answer = call("POST", "/sessions", form)
        assert_200(answer, {"email": email, "message": "logged in"})
        assert call("GET", "/profile", cookie=f"session_id={answer.session_id}").json == {"email": email}
        assert call("POST", "/reset_password", form).json["email"] == email


@pytest.mark.parametrize("email", ["bob@x.io", "BOB@X.IO"])
def test_a_taken_email_is_refused(home: Home, email: str) -> None:
    form = {"email": email, "password": "other"}
    assert home.refuses(400, "POST", "/users", form) == "email already registered"


@pytest.mark.parametrize(
    "email", [" ", " \t ", "a\nb@x.io", "a\r@x.io", "a\x1b@x.io", "a\x7f@x.io", "a\x85@x.io", "a" * 255, "é" * 128]
)
def test_what_cannot_be_an_email_is_refused(home: Home, email: str) -> None:
    reason = home.refuses(400, "POST", "/users", {"email": email, "password": "p"})
    assert reason.startswith("email must ")


def test_a_password_has_at_most_1024_bytes(home: Home) -> None:
    form = {"email": "long@x.io", "password": "é" * 512 + "a"}
    assert home.refuses(400, "POST", "/users", form) == "password must be at most 1024 bytes"


@pytest.mark.parametrize(
    ("email", "password"), [("bob@x.io", "wrong"), ("bob@x.io", "B4L0U"), ("bob@x.io", "a" * 2000)]
)
def test_a_wrong_password_and_an_unknown_email_are_answered_alike(home: Home, email: str, password: str) -> None:
    answers = [log_in(home.call, email, password), log_in(home.call, "nobody@x.io", password)]
    assert answers[0].status == answers[1].status == 401
    assert answers[0].body == answers[1].body
    for answer in answers:
        del answer.headers["X-Request-Id"]
    assert answers[0].headers == answers[1].headers


@pytest.mark.parametrize("email", ["nope", "unknown@email", " ", "a\nb", "a" * 255, "@", "%", "*"])
def test_an_odd_email_is_an_unknown_one(home: Home, email: str) -> None:
    form = {**home.form, "email": email}
    assert home.refuses(401, "POST", "/sessions", form) == "wrong email or password"
    assert home.refuses(403, "POST", "/reset_password", form) == "unknown email"
    assert home.refuses(403, "PUT", "/reset_password", form) == "invalid reset token"


def test_every_route_is_open_or_needs_a_session() -> None:
    routes = [
        (method, path.replace("<public_id>", "0123456789abcdef").replace("<name>", "style.css"))
        for method, path, *_ in authsvc.ROUTES
    ]
    between = [("GET", "/account")]  # leads who has no session to the sign-in page
    assert sorted(OPEN + CLOSED + between) == sorted([*routes, ("GET", "/pages/script.js")])


@pytest.mark.parametrize(("method", "path"), CLOSED)
@pytest.mark.parametrize("cookie", [None, "", "session_id=", "session_id=00000000-0000-4000-8000-000000000000"])
def test_without_a_session_it_is_refused(home: Home, method: str, path: str, cookie: str | None) -> None:
    assert home.refuses(403, method, path, home.form, cookie=cookie) == "not logged in"


@pytest.mark.parametrize(
    "path",
    [
        *("/nowhere", "/users/", "/users/1", "/Users", "/profile/..", "/authsvc.db"),
        *("/sessions/", "/sessions//", "/sessions/others/", "/sessions/a/b", "/password/", "/totp/1"),
        *("/verify/", "/verify/login", "/Verify", "/health/", "/login/", "/Login", "/login.html", "/index.html"),
        *("/pages", "/pages/", "/pages/nothing", "/pages/index.html", "/pages/login", "/pages/Style.css"),
        *("/pages/style.css/", "/pages/../authsvc.py", "/pages//style.css", "/pages/.", "/pages/..", "/style.css"),
    ],
)
def test_another_path_is_not_found(home: Home, path: str) -> None:
    assert home.refuses(404, "GET", path) == "not found"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", {"GET"}),
        ("/users", {"POST"}),
        ("/sessions", {"GET", "POST", "DELETE"}),
        ("/sessions/others", {"DELETE"}),
        ("/sessions/all", {"DELETE"}),
        ("/sessions/0123456789abcdef", {"DELETE"}),
        ("/profile", {"GET", "DELETE"}),
        ("/password", {"PUT"}),
        ("/totp", {"POST", "PUT", "DELETE"}),
        ("/reset_password", {"POST", "PUT"}),
        *((path, {"GET"}) for path in ("/verify", "/health", *PAGES)),
    ],
)
def test_another_method_is_not_allowed(home: Home, path: str, allowed: set[str]) -> None:
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"} - allowed:
        assert home.refuses(405, method, path) == "method not allowed"
        assert set(home.call(method, path).headers["Allow"].split(",")) - {"HEAD"} == allowed


@pytest.mark.parametrize(
    ("path", "statuses"),
    [
        ("/", (200, 200)),
        ("/sessions", (200, 403)),
        ("/verify", (200, 401)),
        ("/verify?login=1", (200, 302)),
        ("/health", (200, 200)),
        ("/nowhere", (404, 404)),
        ("/pages/nothing", (404, 404)),
        ("/users", (405, 405)),
        *((path, (200, 302 if path == "/account" else 200)) for path in PAGES),
    ],
)
@pytest.mark.parametrize("logged_in", [True, False])
def test_head_answers_as_get_without_a_body(home: Home, path: str, statuses: tuple[int, int], logged_in: bool) -> None:
    cookie = f"session_id={home.session_id}" if logged_in else None
    got, headed = (home.call(method, path, cookie=cookie) for method in ("GET", "HEAD"))
    assert (headed.status, headed.body) == (statuses[not logged_in], b"")
    assert int(headed.headers["Content-Length"]) == len(got.body) > 0
    for answer in (got, headed):
        del answer.headers["X-Request-Id"]
    assert headed.headers == got.headers


@pytest.mark.parametrize(
    "rest", [{"body": b"\xff", "content_type": "text/plain"}, as_json("["), {"body": b"a" * 20_000}]
)
def test_path_and_method_are_refused_before_the_body(home: Home, rest: dict[str, Any]) -> None:
    home.refuses(404, "POST", "/nowhere", **rest)
    home.refuses(405, "PUT", "/users", **rest)


# One's sessions


@pytest.fixture
def crowd(db: DB, settings: Settings, clock: Clock) -> Client:
    """The application with Bob and Eve in it, who may have three sessions each."""
    settings = replace(settings, sessions_per_user=3)
    call = Client(authsvc.create_app(settings, Auth(db, settings, clock)))
    register(call)
    register(call, "eve@x.io")
    return call


def cookie_of(answer: Answer) -> str:
    assert answer.status == 200
    return f"session_id={answer.session_id}"


def name_of(cookie: str) -> str:
    """What the session of a cookie is called in public."""
    return hashlib.sha256(cookie.partition("=")[2].encode()).hexdigest()[:16]


def assert_renewed(call: Client, answer: Answer, former: str) -> str:
    """Assert that the session goes on under a new id; return its cookie."""
    assert re.fullmatch(f"session_id={UUID4}; {ATTRIBUTES}", answer.headers["Set-Cookie"])
    renewed = cookie_of(answer)
    assert (profile(call, former), profile(call, renewed)) == (403, 200)
    return renewed


def test_sessions_are_listed(crowd: Client, clock: Clock) -> None:
    first = cookie_of(log_in(crowd, REMOTE_ADDR="127.0.0.1", HTTP_USER_AGENT="one"))
    cookie_of(log_in(crowd, "eve@x.io", REMOTE_ADDR="127.0.0.3", HTTP_USER_AGENT="eve"))
    clock.advance(3600)
    second = cookie_of(log_in(crowd, REMOTE_ADDR="::1"))
    assert profile(crowd, first) == 200
    shared = {"last_seen": "2027-01-15T09:00:00Z", "expires": "2027-01-22T09:00:00Z"}
    newest = {"id": name_of(second), "created": "2027-01-15T09:00:00Z", "address": "::1", "user_agent": ""}
    oldest = {"id": name_of(first), "created": "2027-01-15T08:00:00Z", "address": "127.0.0.1", "user_agent": "one"}
    for cookie in (first, second):
        answer = crowd("GET", "/sessions", cookie=cookie)
        sessions = [{**newest, **shared, "current": cookie == second}, {**oldest, **shared, "current": cookie == first}]
        assert_200(answer, {"email": "bob@x.io", "second_factor": False, "sessions": sessions})
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "agent",
    [
        '"',
        "\\",
        "a\0b",
        "a\x1b[2J",
        "</script><script>",
        "é\x85\xff",
        "{0}%s",
        "a" * 300,
        'x", "current": true, "y": "',
    ],
)
def test_a_user_agent_is_listed_as_text_and_for_nobody_else(crowd: Client, agent: str) -> None:
    bobs = cookie_of(log_in(crowd, HTTP_USER_AGENT=agent))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    mine, theirs = (crowd("GET", "/sessions", cookie=cookie) for cookie in (bobs, eves))
    assert [session["user_agent"] for session in mine.json["sessions"]] == [agent.replace("\0", "")[:200]]
    assert [session["user_agent"] for session in theirs.json["sessions"]] == [""]
    assert re.fullmatch(rb"[ -~]+", mine.body)


def test_a_login_is_answered_even_if_nothing_can_be_read_after_it(
    call: Client, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(call)
    start = auth.log_in

    def start_and_lose_the_store(*arguments: Any, **rest: Any) -> tuple[User, str]:
        started = start(*arguments, **rest)
        for read in "_read", "_read_all":
            monkeypatch.setattr(auth._db, read, unavailable)
        return started

    def unavailable(*_: object) -> None:
        raise database.StorageUnavailable("gone")

    monkeypatch.setattr(auth, "log_in", start_and_lose_the_store)
    answer = log_in(call)
    assert (answer.status, bool(answer.session_id)) == (200, True)  # else it exists, and nobody holds it


def test_a_login_is_answered_even_if_the_next_one_has_ended_its_session_by_then(
    call: Client, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(call)
    start = auth.log_in

    def start_and_be_overtaken(*arguments: Any, **rest: Any) -> tuple[User, str]:
        started = start(*arguments, **rest)
        start(*arguments, **rest)
        return started

    monkeypatch.setattr(auth, "log_in", start_and_be_overtaken)
    answer = log_in(call)
    assert_200(answer, {"email": "bob@x.io", "message": "logged in"})
    assert profile(call, cookie_of(answer)) == 403


def test_one_of_ones_sessions_ends(crowd: Client) -> None:
    mine, other, third = (cookie_of(log_in(crowd)) for _ in range(3))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    answer = crowd("DELETE", f"/sessions/{name_of(other)}", cookie=mine)
    assert_200(answer, {"message": "session ended"})
    assert "Set-Cookie" not in answer.headers
    assert [profile(crowd, cookie) for cookie in (mine, other, third, eves)] == [200, 403, 200, 200]


def test_ones_own_session_ends_with_its_cookie(crowd: Client) -> None:
    mine, other = (cookie_of(log_in(crowd)) for _ in range(2))
    answer = crowd("DELETE", f"/sessions/{name_of(mine)}", cookie=mine)
    assert_200(answer, {"message": "session ended"})
    assert answer.headers["Set-Cookie"] == f"session_id=; {ATTRIBUTES}; Max-Age=0"
    assert [profile(crowd, cookie) for cookie in (mine, other)] == [403, 200]


def test_all_other_sessions_end(crowd: Client) -> None:
    first, mine, last = (cookie_of(log_in(crowd)) for _ in range(3))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    for _ in range(2):  # also when there are none
        answer = crowd("DELETE", "/sessions/others", cookie=mine)
        assert_200(answer, {"message": "all other sessions ended"})
        assert "Set-Cookie" not in answer.headers
        assert [profile(crowd, cookie) for cookie in (first, mine, last, eves)] == [403, 200, 403, 200]


def test_all_sessions_end(crowd: Client) -> None:
    mine, other = (cookie_of(log_in(crowd)) for _ in range(2))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    answer = crowd("DELETE", "/sessions/all", cookie=mine)
    assert_200(answer, {"message": "all sessions ended"})
    assert answer.headers["Set-Cookie"] == f"session_id=; {ATTRIBUTES}; Max-Age=0"
    assert [profile(crowd, cookie) for cookie in (mine, other, eves)] == [403, 403, 200]
    assert crowd("DELETE", "/sessions/all", cookie=mine).status == 403


def test_a_session_of_somebody_else_is_answered_as_one_that_is_not(crowd: Client) -> None:
    mine, ended = (cookie_of(log_in(crowd)) for _ in range(2))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    assert crowd("DELETE", "/sessions", cookie=ended).status == 302
    secret = mine.partition("=")[2]
    odd = [name_of(mine) + "0", name_of(mine)[:15], f"{name_of(mine)} ", hashlib.sha256(secret.encode()).hexdigest()]
    answers = [
        crowd("DELETE", f"/sessions/{name}", cookie=mine)
        for name in ("0123456789abcdef", name_of(eves), name_of(ended), secret, "x" * 1000, "%", *odd)
    ]
    for answer in answers:
        assert (answer.status, answer.json) == (404, {"message": "no such session"})
        del answer.headers["X-Request-Id"]
        assert (answer.body, answer.headers) == (answers[0].body, answers[0].headers)
    assert [profile(crowd, cookie) for cookie in (mine, eves)] == [200, 200]


# The account


def test_deleting_the_account(crowd: Client, settings: Settings) -> None:
    mine, other = (cookie_of(log_in(crowd)) for _ in range(2))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    form = {"email": "bob@x.io", "reset_token": token_of(crowd), "new_password": "t4rt1fl3tt3"}
    answer = crowd("DELETE", "/profile", {"password": "b4l0u"}, cookie=mine)
    assert_200(answer, {"email": "bob@x.io", "message": "account deleted"})
    assert answer.headers["Set-Cookie"] == f"session_id=; {ATTRIBUTES}; Max-Age=0"
    assert [profile(crowd, cookie) for cookie in (mine, other, eves)] == [403, 403, 200]
    assert (log_in(crowd).status, crowd("PUT", "/reset_password", form).status) == (401, 403)
    register(crowd)
    assert [profile(crowd, cookie) for cookie in (mine, other, cookie_of(log_in(crowd)))] == [403, 403, 200]
    with ledger_of(settings.database) as ledger:
        assert ledger.execute("SELECT id, email FROM users").fetchall() == [(2, "eve@x.io"), (3, "bob@x.io")]


def test_changing_the_password(crowd: Client) -> None:
    mine, other = (cookie_of(log_in(crowd)) for _ in range(2))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    reset = {"email": "bob@x.io", "reset_token": token_of(crowd), "new_password": "third"}
    form = {"password": "b4l0u", "new_password": "t4rt1fl3tt3"}
    answer = crowd("PUT", "/password", form, cookie=mine)
    assert_200(answer, {"email": "bob@x.io", "message": "password changed"})
    assert_renewed(crowd, answer, mine)
    assert [profile(crowd, cookie) for cookie in (other, eves)] == [403, 200]
    assert crowd("PUT", "/reset_password", reset).status == 403
    assert (log_in(crowd).status, log_in(crowd, password="t4rt1fl3tt3").status) == (401, 200)


@pytest.mark.parametrize(("method", "path"), [("DELETE", "/profile"), ("PUT", "/password"), ("POST", "/totp")])
@pytest.mark.parametrize("password", ["wrong", "B4L0U", "b4l0u ", "b4l0u\0", "a" * 2000, "t4rt1fl3tt3"])
def test_a_change_asks_for_the_password(home: Home, method: str, path: str, password: str) -> None:
    assert home.refuses(403, method, path, {**home.form, "password": password}) == "wrong password"


@pytest.mark.parametrize("password", ["b4l0u", "wrong"])
def test_a_new_password_has_at_most_1024_bytes(home: Home, password: str) -> None:
    form = {"password": password, "new_password": "é" * 512 + "a"}
    assert home.refuses(400, "PUT", "/password", form) == "password must be at most 1024 bytes"


# The second factor


@dataclass
class Factor:
    """Bob with a second factor."""

    call: Client
    clock: Clock
    cookie: str = ""
    seed: str = ""
    recovery_codes: tuple[str, ...] = ()

    def code(self) -> str:
        """A code that was not used yet."""
        self.clock.advance(totp.STEP)
        return totp.code(self.seed, int(self.clock()) // totp.STEP)

    def log_in(self, otp: str | None = None, **rest: Any) -> Answer:
        return self.call("POST", "/sessions", {**BOB, **({} if otp is None else {"otp": otp})}, **rest)

    def begin(self) -> Answer:
        self.cookie = cookie_of(self.log_in(REMOTE_ADDR="127.0.0.1"))
        answer = self.call("POST", "/totp", {"password": "b4l0u"}, cookie=self.cookie)
        self.seed = answer.json["secret"]
        return answer

    def confirm(self) -> Answer:
        answer = self.call("PUT", "/totp", {"otp": self.code()}, cookie=self.cookie)
        self.cookie, self.recovery_codes = cookie_of(answer), tuple(answer.json["recovery_codes"])
        return answer


@pytest.fixture
def factor(crowd: Client, clock: Clock) -> Factor:
    bob = Factor(crowd, clock)
    bob.begin()
    bob.confirm()
    return bob


def test_setting_up_a_second_factor(crowd: Client, clock: Clock) -> None:
    bob = Factor(crowd, clock)
    answer = bob.begin()
    uri = f"otpauth://totp/authsvc%3Abob@x.io?secret={bob.seed}&issuer=authsvc"
    assert re.fullmatch("[A-Z2-7]{32}", bob.seed)
    assert answer.json["qr"].startswith("data:image/svg+xml")
    assert_200(answer, {"secret": bob.seed, "uri": uri, "qr": totp.picture(uri)})
    assert "Set-Cookie" not in answer.headers
    other = cookie_of(bob.log_in())  # it is not in force yet
    former = bob.cookie
    answer = bob.confirm()
    assert_200(answer, {"message": "second factor on", "recovery_codes": answer.json["recovery_codes"]})
    assert_renewed(crowd, answer, former)
    assert profile(crowd, other) == 403
    assert len(set(bob.recovery_codes)) == 10
    assert all(re.fullmatch("[a-z2-7]{4}(-[a-z2-7]{4}){5}", code) for code in bob.recovery_codes)


def test_without_segno_there_is_no_picture(crowd: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    assert Factor(crowd, clock).begin().json.keys() == {"secret", "uri"}


def test_a_new_seed_replaces_the_one_that_was_not_confirmed(crowd: Client, clock: Clock) -> None:
    bob = Factor(crowd, clock)
    bob.begin()
    former = bob.code()
    bob.begin()
    answer = crowd("PUT", "/totp", {"otp": former}, cookie=bob.cookie)
    assert (answer.status, answer.json) == (403, {"message": "wrong one-time code"})
    assert bob.confirm().status == 200


def test_a_login_needs_a_code_after_the_right_password(factor: Factor) -> None:
    for otp in (None, ""):
        answer = factor.log_in(otp)
        assert (answer.status, answer.json) == (401, {"message": "one-time code required"})
        assert "Set-Cookie" not in answer.headers
    wrong = factor.log_in(f"{(int(factor.code()) + 1) % 10**6:06}")
    assert (wrong.status, wrong.json) == (401, {"message": "wrong one-time code"})
    assert "Set-Cookie" not in wrong.headers
    answers = [factor.log_in(code) for code in [factor.code()] * 2]
    assert [answer.status for answer in answers] == [200, 401]
    assert_200(answers[0], {"email": "bob@x.io", "message": "logged in"})
    assert profile(factor.call, cookie_of(answers[0])) == 200
    assert log_in(factor.call, "eve@x.io").status == 200  # who has none is not asked


@pytest.mark.parametrize("email", ["bob@x.io", "eve@x.io", "nobody@x.io"])
def test_after_a_wrong_password_nothing_tells_who_has_a_second_factor(factor: Factor, email: str) -> None:
    for otp in ({}, {"otp": ""}, {"otp": "000000"}, {"otp": factor.code()}, {"otp": factor.recovery_codes[0]}):
        answer = factor.call("POST", "/sessions", {"email": email, "password": "wrong", **otp})
        assert (answer.status, answer.json) == (401, {"message": "wrong email or password"})
    assert factor.log_in(factor.recovery_codes[0]).status == 200  # none was spent


def test_a_recovery_code_works_once_however_it_is_typed(factor: Factor) -> None:
    spellings: list[Callable[[str], str]] = [
        str,
        str.upper,
        lambda code: code.replace("-", ""),
        lambda code: f" {code.replace('-', ' ')} ",
    ]
    for code, spell in zip(factor.recovery_codes, spellings, strict=False):
        assert [factor.log_in(spell(code)).status for _ in range(2)] == [200, 401]
        factor.clock.advance(900)


def test_a_repeated_code_is_refused(factor: Factor) -> None:
    code = factor.code()
    for pair in ((code, code), (code, ""), ("", code), (code, "other")):
        answer = factor.call("POST", "/sessions", [*BOB.items(), *(("otp", otp) for otp in pair)])
        assert (answer.status, answer.json) == (400, {"message": "otp is given more than once"})
    assert factor.log_in(code).status == 200  # it was not spent


@pytest.mark.parametrize(
    ("otp", "reason"),
    [(None, "must be text"), (492039, "must be text"), (["1"], "must be text"), ("\ud800", ""), ("1\0", "")],
)
def test_an_optional_code_is_text(home: Home, otp: Any, reason: str) -> None:
    said = home.refuses(400, "POST", "/sessions", **as_json({**BOB, "otp": otp}))
    assert said == f"otp {reason or 'is not valid text'}"


def test_switching_the_second_factor_off(factor: Factor) -> None:
    other = cookie_of(factor.log_in(factor.code()))
    form = {"password": "b4l0u", "otp": factor.code()}
    answer = factor.call("DELETE", "/totp", form, cookie=factor.cookie)
    assert_200(answer, {"message": "second factor off"})
    assert_renewed(factor.call, answer, factor.cookie)
    assert profile(factor.call, other) == 403
    assert factor.log_in().status == 200
    factor.begin()  # another one, of which the former recovery codes are not
    former = factor.recovery_codes
    factor.confirm()
    assert factor.log_in(former[0]).status == 401


def test_a_recovery_code_switches_the_second_factor_off(factor: Factor) -> None:
    form = {"password": "b4l0u", "otp": factor.recovery_codes[9]}
    assert factor.call("DELETE", "/totp", form, cookie=factor.cookie).status == 200
    assert factor.log_in().status == 200


def test_what_the_second_factor_refuses(factor: Factor) -> None:
    eves = cookie_of(log_in(factor.call, "eve@x.io"))
    password, wrong, code = {"password": "b4l0u"}, {"password": "wrong"}, {"otp": factor.code()}
    for status, message, method, form, cookie in [
        (400, "a second factor is on already", "POST", password, factor.cookie),
        (400, "a second factor is on already", "POST", wrong, factor.cookie),
        (403, "wrong password", "POST", wrong, eves),
        (400, "no second factor is being set up", "PUT", code, factor.cookie),
        (400, "no second factor is being set up", "PUT", code, eves),
        (400, "no second factor is on", "DELETE", password | code, eves),
        (403, "wrong password", "DELETE", wrong | code, factor.cookie),
        (403, "wrong one-time code", "DELETE", password | {"otp": "wrong"}, factor.cookie),
    ]:
        answer = factor.call(method, "/totp", form, cookie=cookie)
        assert (answer.status, answer.json) == (status, {"message": message})
        assert "Set-Cookie" not in answer.headers
    assert factor.log_in().status == 401
    assert factor.log_in(code["otp"]).status == 200  # no refusal spent it


def test_a_reset_leaves_the_second_factor_on(factor: Factor) -> None:
    form = {"email": "bob@x.io", "reset_token": token_of(factor.call), "new_password": "b4l0u"}
    assert factor.call("PUT", "/reset_password", form).status == 200
    assert (factor.log_in().status, factor.log_in(factor.code()).status) == (401, 200)


def test_where_a_second_factor_is_demanded_a_session_is_good_for_nothing_else(
    db: DB, settings: Settings, clock: Clock
) -> None:
    settings = replace(settings, require_totp=True, sessions_per_user=3)
    bob = Factor(Client(authsvc.create_app(settings, Auth(db, settings, clock))), clock)
    register(bob.call)
    bob.begin()
    other = cookie_of(bob.log_in())
    form = {"password": "b4l0u", "new_password": "t4rt1fl3tt3", "otp": bob.code()}
    refused = set(CLOSED) - {("DELETE", "/sessions"), ("POST", "/totp"), ("PUT", "/totp")}
    for method, path in [*refused, ("DELETE", f"/sessions/{name_of(other)}")]:
        answer = bob.call(method, path, form, cookie=bob.cookie)
        assert (answer.status, answer.json) == (403, {"message": "set up a second factor first"})
        assert "Set-Cookie" not in answer.headers
    assert bob.call("DELETE", "/sessions", cookie=other).status == 302
    bob.confirm()
    assert profile(bob.call, bob.cookie) == 200
    assert bob.call("PUT", "/password", form, cookie=bob.cookie).status == 200


def test_whether_a_second_factor_is_on_is_told(crowd: Client, clock: Clock) -> None:
    bob = Factor(crowd, clock)

    def told(cookie: str) -> bool:
        on: bool = crowd("GET", "/sessions", cookie=cookie).json["second_factor"]
        return on

    eves = cookie_of(log_in(crowd, "eve@x.io"))
    bob.begin()
    assert told(bob.cookie) is False  # it is not in force yet
    bob.confirm()
    assert (told(bob.cookie), told(eves)) == (True, False)
    off = crowd("DELETE", "/totp", {"password": "b4l0u", "otp": bob.code()}, cookie=bob.cookie)
    assert told(cookie_of(off)) is False


# Limits


@pytest.mark.parametrize(
    ("method", "path", "form", "most"),
    [
        ("DELETE", "/profile", {"password": "wrong"}, 10),
        ("PUT", "/password", {"password": "wrong", "new_password": "t4rt1fl3tt3"}, 10),
        ("DELETE", "/totp", {"password": "wrong", "otp": "wrong"}, 10),
        ("DELETE", "/totp", {"password": "b4l0u", "otp": "000000"}, 5),
        ("POST", "/sessions", {**BOB, "otp": "000000"}, 5),
    ],
)
def test_guesses_are_limited(factor: Factor, method: str, path: str, form: dict[str, str], most: int) -> None:
    said = [factor.call(method, path, form, cookie=factor.cookie, REMOTE_ADDR="127.0.0.1") for _ in range(most + 2)]
    refused = 401 if path == "/sessions" else 403
    assert [answer.status for answer in said] == [refused] * most + [429] * 2
    for answer in said[most:]:
        assert answer.json == {"message": "too many requests"}
        assert 1 <= int(answer.headers["Retry-After"]) <= 900
        assert "Set-Cookie" not in answer.headers


def test_guesses_at_the_first_code_are_limited(crowd: Client, clock: Clock) -> None:
    bob = Factor(crowd, clock)
    bob.begin()
    said = [
        crowd("PUT", "/totp", {"otp": "wrong"}, cookie=bob.cookie, REMOTE_ADDR="127.0.0.1").status for _ in range(7)
    ]
    assert said == [403] * 5 + [429] * 2


# Fields


@pytest.mark.parametrize(("method", "path", "field"), FIELDS)
def test_a_missing_field_is_refused(home: Home, method: str, path: str, field: str) -> None:
    form = {name: value for name, value in home.form.items() if name != field}
    assert home.refuses(400, method, path, form) == f"{field} is missing"


@pytest.mark.parametrize(("method", "path", "field"), FIELDS)
def test_an_empty_field_is_refused(home: Home, method: str, path: str, field: str) -> None:
    assert home.refuses(400, method, path, {**home.form, field: ""}) == f"{field} is empty"


@pytest.mark.parametrize(("method", "path", "field"), FIELDS)
def test_a_repeated_field_is_refused(home: Home, method: str, path: str, field: str) -> None:
    for again in ("", "other", home.form[field]):
        for pairs in ([*home.form.items(), (field, again)], [(field, again), *home.form.items()]):
            assert home.refuses(400, method, path, pairs) == f"{field} is given more than once"


@pytest.mark.parametrize("junk", [b"\xff", b"\xc3", b"%ff", b"%C3", b"%ED%A0%80", b"a%FFb", b"%c0%80"])
def test_an_undecodable_field_is_refused(home: Home, junk: bytes) -> None:
    for method, path, field in FIELDS:
        others = [f"{name}={value}".encode() for name, value in home.form.items() if name != field]
        body = b"&".join([*others, field.encode() + b"=" + junk])
        assert home.refuses(400, method, path, body=body) == "malformed body"


@pytest.mark.parametrize("value", [None, 1, 1.5, True, ["bob@x.io"], {"a": "b"}, [], {}])
def test_a_json_field_that_is_no_text_is_refused(home: Home, value: Any) -> None:
    for method, path, field in FIELDS:
        assert home.refuses(400, method, path, **as_json({**home.form, field: value})) == f"{field} must be text"


def test_a_lone_surrogate_is_refused(home: Home) -> None:
    for method, path, field in FIELDS:
        reason = home.refuses(400, method, path, **as_json({**home.form, field: "a\ud800"}))
        assert reason == f"{field} is not valid text"


@pytest.mark.parametrize("where", ["\0{}", "{}\0", "\0"])
def test_nul_is_refused_in_all_but_a_password(home: Home, where: str) -> None:
    for method, path, field in FIELDS:
        if "password" not in field:
            reason = home.refuses(400, method, path, {**home.form, field: where.format(home.form[field])})
            assert reason == f"{field} is not valid text"


@pytest.mark.parametrize(("password", "other"), [("a", "a\0a"), ("a\0a", "a"), ("a\0b", "a\0c"), ("\0", "\0\0")])
def test_nul_counts_in_a_password(call: Client, password: str, other: str) -> None:
    register(call, password=password)
    assert (log_in(call, password=password).status, log_in(call, password=other).status) == (200, 401)
    form = {"email": "bob@x.io", "reset_token": token_of(call), "new_password": other}
    assert call("PUT", "/reset_password", form).status == 200
    assert (log_in(call, password=password).status, log_in(call, password=other).status) == (401, 200)


def test_a_password_is_taken_as_it_is(call: Client) -> None:
    register(call, password=" é+%20&=\r\n ")
    assert log_in(call, password=" é+%20&=\r\n ").status == 200
    assert log_in(call, password="é+%20&=").status == 401


def test_a_refused_put_does_not_spend_the_token(call: Client) -> None:
    register(call)
    form = {"email": "bob@x.io", "reset_token": token_of(call), "new_password": "t4rt1fl3tt3"}
    for status, refused in [
        (400, {**form, "new_password": ""}),
        (400, {**form, "new_password": "a" * 1025}),
        (400, [*form.items(), ("new_password", "other")]),
        (403, {**form, "email": "eve@x.io"}),
    ]:
        assert call("PUT", "/reset_password", refused).status == status
    assert call("PUT", "/reset_password", form).status == 200


def test_extra_fields_set_nothing(call: Client, settings: Settings) -> None:
    planted = {"id": "99", "hashed_password": "x", "session_id": "planted", "reset_token": "planted"}
    assert_200(call("POST", "/users", {**planted, **BOB}), {"email": "bob@x.io", "message": "user created"})
    with ledger_of(settings.database) as ledger:
        columns = "id, session_id, reset_token, reset_expires_at"
        assert ledger.execute(f"SELECT {columns} FROM users").fetchall() == [(1, None, None, None)]
    assert profile(call, "session_id=planted") == 403
    answer = log_in(call)
    assert call("POST", "/sessions", {**planted, **BOB}).session_id not in ("planted", answer.session_id)


def test_more_than_8_fields_are_refused(home: Home) -> None:
    padding = [(f"extra{number}", "") for number in range(6)]
    eight = [*BOB.items(), *padding]
    nine = [*eight, ("extra", "")]
    assert home.call("POST", "/sessions", [("email", "nobody"), *eight[1:]]).status == 401
    for rest in ({"form": nine}, {"form": nine * 3}, as_json(dict(nine)), multipart(nine)):
        assert home.refuses(400, "POST", "/sessions", **rest) in ("at most 8 fields", "malformed body")


@pytest.mark.parametrize(("method", "path", "fields"), FORMS)
def test_the_query_string_never_counts(home: Home, method: str, path: str, fields: tuple[str, ...]) -> None:
    query = "&".join(f"{name}={value}" for name, value in home.form.items())
    assert home.refuses(400, method, f"{path}?{query}") == f"{fields[0]} is missing"


def test_the_query_string_adds_nothing_to_the_body(call: Client) -> None:
    register(call)
    assert call("POST", "/sessions?email=eve@x.io&password=b", BOB).json["email"] == "bob@x.io"
    assert call("GET", f"/profile?session_id={log_in(call).session_id}").status == 403


# Bodies


@pytest.mark.parametrize(
    "content_type",
    [
        "application/x-www-form-urlencoded; charset=utf-8",
        "APPLICATION/X-WWW-FORM-URLENCODED",
        "application/x-www-form-urlencoded ; charset=UTF-8",
    ],
)
def test_a_form_may_say_its_charset(home: Home, content_type: str) -> None:
    assert home.call("POST", "/sessions", {"email": "nobody", "password": "p"}, content_type=content_type).status == 401


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
@pytest.mark.parametrize("text", [json.dumps(BOB), '{"email": "\\u0062ob@x.io", "password": "b4l0u", "n": [1, {}]}'])
def test_a_json_object_is_welcome(call: Client, content_type: str, text: str) -> None:
    answer = call("POST", "/users", body=text.encode(), content_type=content_type)
    assert_200(answer, {"email": "bob@x.io", "message": "user created"})
    assert log_in(call).status == 200


def test_json_in_raw_utf_8_is_welcome(call: Client) -> None:
    answer = call("POST", "/users", **as_json('{"email": "é@x.io", "password": "ü"}'))
    assert answer.json["email"] == "é@x.io"
    assert log_in(call, "é@x.io", "ü").status == 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "{}{}",
        "[]",
        "[1]",
        '["x"]',
        '["ab"]',
        '[["email", "array@x.io"], ["password", "p"]]',
        '[{"email": "nobody"}]',
        "1",
        "null",
        '"email"',
        "9" * 5000,
        "[" * 16_000,
        '{"a":' * 3000,
        "email=nobody&password=p",
        '\ufeff{"email": "nobody", "password": "p"}',
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_no_object_is_refused(home: Home, text: str) -> None:
    assert home.refuses(400, "POST", "/users", **as_json(text)) == "malformed body"


def test_json_that_is_not_utf_8_is_refused(home: Home) -> None:
    body = '{"email": "é", "password": "p"}'.encode("latin-1")
    assert home.refuses(400, "POST", "/users", body=body, content_type="application/json") == "malformed body"


def test_a_repeated_json_key_is_refused(home: Home) -> None:
    text = '{"email": "nobody", "password": "p", "email": "bob@x.io"}'
    assert home.refuses(400, "POST", "/users", **as_json(text)) == "email is given more than once"


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "text/plain; charset=utf-8", "text/html", "application/xml", "application/octet-stream", "a"],
)
def test_another_content_type_is_refused(home: Home, content_type: str) -> None:
    for method, path, _ in FORMS:
        home.refuses(415, method, path, home.form, content_type=content_type)


@pytest.mark.parametrize(("method", "path", "fields"), FORMS)
def test_no_body_and_no_content_type_is_a_missing_field(
    home: Home, method: str, path: str, fields: tuple[str, ...]
) -> None:
    assert home.refuses(400, method, path, body=b"", content_type="") == f"{fields[0]} is missing"


def padded(size: int) -> bytes:
    body = b"email=big@x.io&password=b4l0u&padding="
    return body + b"a" * (size - len(body))


def test_a_body_of_16_kib_is_read(call: Client) -> None:
    assert call("POST", "/users", body=padded(16_384)).status == 200


def test_a_larger_body_is_not_read_to_its_end(home: Home) -> None:
    stream = io.BytesIO(padded(100_000))
    environ: dict[str, Any] = {"wsgi.input": stream}
    home.refuses(413, "POST", "/users", CONTENT_LENGTH="100000", **environ)
    assert stream.tell() == 16_385


def test_a_body_is_read_no_further_than_its_length(home: Home) -> None:
    # Not every server ends the stream there: to ask for more may wait for ever.
    stream: dict[str, Any] = {"wsgi.input": io.BytesIO(b"email=nobody&password=p&email=next request")}
    assert home.call("POST", "/sessions", CONTENT_LENGTH="23", **stream).status == 401


def test_a_body_without_a_length_is_read_where_the_server_ends_it(home: Home) -> None:
    body = b"email=nobody&password=p"
    assert home.call("POST", "/sessions", body=body, CONTENT_LENGTH="").json == {"message": "email is missing"}
    ended: dict[str, Any] = {"wsgi.input_terminated": True}
    assert home.call("POST", "/sessions", body=body, CONTENT_LENGTH="", **ended).status == 401
    assert home.refuses(413, "POST", "/users", body=padded(16_385), CONTENT_LENGTH="", **ended)


@pytest.mark.parametrize("size", [16_385, 100_000])
def test_a_larger_body_is_refused(home: Home, size: int) -> None:
    assert home.refuses(413, "POST", "/users", body=padded(size)) == "request body too large"


# Multipart

BOUNDARY = "------------------------d8485b124768d608"


def multipart(pairs: Any, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> dict[str, Any]:
    """What ``curl -F`` sends."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in pairs
    ]
    return {"body": "".join([*parts, f"--{BOUNDARY}--\r\n"]).encode(), "content_type": content_type}


@pytest.mark.parametrize(
    "content_type",
    [
        f"multipart/form-data; boundary={BOUNDARY}",
        f'multipart/form-data; boundary="{BOUNDARY}"',
        f"Multipart/Form-Data; charset=utf-8; Boundary={BOUNDARY}",
        f'multipart/form-data;boundary="{BOUNDARY}"; charset=utf-8',
    ],
)
def test_multipart_from_curl(call: Client, content_type: str) -> None:
    answer = call("POST", "/users", **multipart(BOB.items(), content_type))
    assert_200(answer, {"email": "bob@x.io", "message": "user created"})
    assert log_in(call).status == 200


def test_multipart_from_curl_with_a_type_for_a_field(call: Client) -> None:
    # curl -F 'email=bob@x.io;type=text/plain' -F password=b4l0u
    rest = multipart(BOB.items())
    rest["body"] = rest["body"].replace(b'name="email"\r\n', b'name="email"\r\nContent-Type: text/plain\r\n')
    assert call("POST", "/users", **rest).status == 200


def test_multipart_from_requests(call: Client) -> None:
    files = {name: (None, value) for name, value in BOB.items()}
    sent = requests.Request("POST", "http://127.0.0.1/users", files=files).prepare()
    assert isinstance(sent.body, bytes)
    answer = call("POST", "/users", body=sent.body, content_type=sent.headers["Content-Type"])
    assert_200(answer, {"email": "bob@x.io", "message": "user created"})
    assert log_in(call).status == 200


def test_a_multipart_value_is_taken_as_it_is(call: Client) -> None:
    for password in ("é用🐟", "one\r\ntwo", "\r\n", "a\r\n\r\nb", f"a--{BOUNDARY}", "a\n--b", "a\0b", " "):
        email = f"é{password.encode().hex()}"
        assert call("POST", "/users", **multipart({"email": email, "password": password}.items())).status == 200
        assert log_in(call, email, password).status == 200


@pytest.mark.parametrize("field", ["email", "password"])
def test_multipart_fields_are_checked_as_all_others(home: Home, field: str) -> None:
    missing, empty = ([(name, value) for name, value in BOB.items() if name != field], {**BOB, field: ""}.items())
    repeated = [*BOB.items(), (field, "other")]
    assert home.refuses(400, "POST", "/users", **multipart(missing)) == f"{field} is missing"
    assert home.refuses(400, "POST", "/users", **multipart(empty)) == f"{field} is empty"
    assert home.refuses(400, "POST", "/users", **multipart(repeated)) == f"{field} is given more than once"


def test_a_file_is_no_text(home: Home) -> None:
    # curl -F email=@a.txt -F password=b4l0u
    rest = multipart(BOB.items())
    file = b'name="email"; filename="a.txt"\r\nContent-Type: text/plain\r\n'
    rest["body"] = rest["body"].replace(b'name="email"\r\n', file)
    assert home.refuses(400, "POST", "/sessions", **rest) == "email must be text"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"bob", b"\xff"),
        (b' name="email"', b""),
        (b' name="email"', b' filename="a.txt"; name="email"'),
        (b"form-data", b"attachment"),
        (b"Content-Disposition", b"Content-Type"),
        (b"\r\n\r\n", b"\r\n"),
        (b"--\r\n", b""),
        (b"--\r\n", b"\r\n"),
        (b"d608--", b"d6"),
        (BOUNDARY.encode(), b"other"),
    ],
)
def test_malformed_multipart_is_refused(home: Home, old: bytes, new: bytes) -> None:
    rest = multipart([("email", "bob2@x.io"), ("password", "p")])
    assert old in rest["body"]
    assert home.refuses(400, "POST", "/users", **{**rest, "body": rest["body"].replace(old, new)}) == "malformed body"


def test_a_file_is_no_text_and_where_none_is_asked_for_it_is_ignored(call: Client, home: Home) -> None:
    rest = multipart([("email", "file@x.io"), ("password", "p"), ("extra", "e")])
    for name, quoted in (("email", b'"email"'), ("extra", b'"extra"')):
        body = (
            rest["body"]
            .replace(b"name=" + quoted, b"name=" + quoted + b'; filename="a.bin"')
            .replace(b"\r\ne\r\n", b"\r\n\xff\r\n")
        )
        if name == "email":
            assert (
                home.refuses(400, "POST", "/users", **{**rest, "body": body.replace(b"\xff", b"e")})
                == "email must be text"
            )
        else:
            assert call("POST", "/users", **{**rest, "body": body}).status == 200


def test_a_multipart_name_needs_no_quotes(call: Client) -> None:
    rest = multipart([("email", "bare@x.io"), ("password", "p")])
    assert call("POST", "/users", **{**rest, "body": rest["body"].replace(b'"', b"")}).status == 200


@pytest.mark.parametrize(("before", "after"), [(b"preamble\r\n", b""), (b"", b"epilogue")])
def test_nothing_may_stand_around_the_parts(home: Home, before: bytes, after: bytes) -> None:
    rest = multipart([("email", "bob2@x.io"), ("password", "p")])
    assert home.refuses(400, "POST", "/users", **{**rest, "body": before + rest["body"] + after}) == "malformed body"


@pytest.mark.parametrize("length", [0, 1, 60, 150])
def test_multipart_that_is_cut_short_is_refused(home: Home, length: int) -> None:
    rest = multipart([("email", "bob2@x.io"), ("password", "p")])
    assert home.refuses(400, "POST", "/users", **{**rest, "body": rest["body"][:length]}) == "malformed body"


@pytest.mark.parametrize("parameters", ["", ";", "; boundary=", '; boundary=""', "; boundary=other", "; charset=utf-8"])
def test_multipart_without_its_boundary_is_refused(home: Home, parameters: str) -> None:
    rest = multipart([("email", "bob2@x.io"), ("password", "p")], f"multipart/form-data{parameters}")
    assert home.refuses(400, "POST", "/users", **rest) == "malformed body"


def test_multipart_without_a_part_is_a_missing_field(home: Home) -> None:
    assert home.refuses(400, "POST", "/users", **multipart([])) == "email is missing"


# Injection


@pytest.mark.parametrize(
    "text",
    [
        "' OR 1=1--",
        "' OR '1'='1",
        '" OR ""="',
        "bob@x.io'--",
        "bob@x.io'/*",
        "') OR ('1'='1",
        "' UNION SELECT 1,2,3,4,5--",
        "'; DROP TABLE users;--",
        "1' AND (SELECT count(*) FROM users)>0--",
        "%' OR email LIKE '%",
        "\\'; UPDATE users SET email='x'--",
    ],
)
def test_sql_in_a_field_or_cookie_is_a_plain_wrong_value(home: Home, text: str) -> None:
    for status, method, path, fields in [
        (401, "POST", "/sessions", ("email", "password")),
        (403, "POST", "/reset_password", ("email",)),
        (403, "PUT", "/reset_password", ("email", "reset_token")),
    ]:
        for field in fields:
            plain = home.refuses(status, method, path, {**home.form, field: "wrong"})
            assert home.refuses(status, method, path, {**home.form, field: text}) == plain
    for field, path in (("password", "/profile"), ("otp", "/totp")):
        home.refuses(400 if field == "otp" else 403, "DELETE", path, {**home.form, field: text})
    assert home.refuses(404, "DELETE", f"/sessions/{text.replace('/', ' ')}") == "no such session"
    for cookie in (f"session_id={text}", f"session_id={home.session_id}{text}"):
        assert home.refuses(403, "GET", "/profile", cookie=cookie) == "not logged in"
        assert home.refuses(403, "DELETE", "/sessions", cookie=cookie) == "not logged in"


def test_sql_is_kept_as_plain_text(call: Client) -> None:
    text = "'; DROP TABLE users;--"
    register(call)
    register(call, text, text)
    assert log_in(call, text, text).json["email"] == text
    form = {"email": text, "reset_token": token_of(call, text), "new_password": text + text}
    assert call("PUT", "/reset_password", form).status == 200
    assert (log_in(call, text, text + text).status, log_in(call).status) == (200, 200)


# Cookies


@pytest.mark.parametrize(
    "around",
    [
        "a=1; {}; b=2",
        "a=1;{};b=2",
        "a{{b}}=1; {}",
        "x=\xc3\xa9; {}",
        "\xc3\xa9; {}",
        "foo; {}",
        "{}; foo",
        "bad[key]=1; {}",
        'q="; {}',
        'q="a b"; {}; r="',
        "=; {}",
        "; ; {};",
        "a=b=c; {}",
        "a,b=1; {}",
        "$Version=1; {}; $Path=/",
        "xsession_id=evil; {}",
        "Session_Id=evil; {}; session_id2=evil; session_id[0]=evil; __Host-session_id=evil",
    ],
)
def test_the_cookie_is_read_among_malformed_ones(home: Home, around: str) -> None:
    assert profile(home.call, around.format(f"session_id={home.session_id}")) == 200


@pytest.mark.parametrize(
    "cookie",
    [
        "session_id={0}; session_id=evil",
        "session_id=evil; session_id={0}",
        "session_id={0}; session_id={0}",
        "session_id={0}; session_id",
        "session_id=; session_id={0}",
        'session_id="{0}"',
        "session_id='{0}'",
        "session_id= {0}",
        "session_id ={0}",
        "session_id={0} x",
        "session_id={0}\x00",
        "session_id={0}\n",
        "session_id={0}\xe9",
        "session_id={0}, b=1",
        "session_id=%7B{0}%7D",
        "session_id=urn:uuid:{0}",
        "session_id={{{0}}}",
        "session_id=" + "a" * 10_000,
        "session_id",
        "session_id;",
        "Session_ID={0}",
        "xsession_id={0}",
        "session_id2={0}",
        "__Host-session_id={0}",
        "x=session_id={0}",
        'x="; y=session_id={0}"',
    ],
    ids=lambda cookie: cookie[:30],
)
def test_an_ambiguous_or_odd_cookie_is_no_session(home: Home, cookie: str) -> None:
    cookie = cookie.format(home.session_id)
    assert home.refuses(403, "GET", "/profile", cookie=cookie) == "not logged in"
    assert home.refuses(403, "DELETE", "/sessions", cookie=cookie) == "not logged in"


@pytest.mark.parametrize("alter", [str.upper, lambda text: text.replace("-", "")])
def test_another_spelling_of_the_session_id_is_no_session(home: Home, alter: Any) -> None:
    assert profile(home.call, f"session_id={alter(home.session_id)}") == 403


def test_what_the_database_holds_is_no_session_and_no_token(home: Home) -> None:
    session_hash, token_hash = home.ledger.execute("SELECT session_id, reset_token FROM users").fetchone()
    assert profile(home.call, f"session_id={session_hash}") == 403
    home.refuses(403, "PUT", "/reset_password", {**home.form, "reset_token": token_hash})


def test_a_chosen_session_id_is_not_taken_over(call: Client) -> None:
    register(call)
    chosen = "11111111-1111-4111-8111-111111111111"
    answer = log_in(call, cookie=f"session_id={chosen}")
    assert answer.session_id != chosen
    assert profile(call, f"session_id={chosen}") == 403
    assert profile(call, f"session_id={answer.session_id}") == 200


def test_a_login_ends_the_session_whose_cookie_came_along(call: Client) -> None:
    register(call)
    register(call, "eve@x.io")
    bobs = f"session_id={log_in(call).session_id}"
    assert log_in(call, "eve@x.io", "wrong", cookie=bobs).status == 401
    assert profile(call, bobs) == 200
    assert log_in(call, "eve@x.io", cookie=bobs).status == 200
    assert profile(call, bobs) == 403


def test_logging_out_ends_the_session_of_the_caller_only(call: Client) -> None:
    register(call)
    register(call, "eve@x.io")
    bobs, eves = (f"session_id={log_in(call, email).session_id}" for email in ("bob@x.io", "eve@x.io"))
    assert call("DELETE", "/sessions", cookie=bobs).status == 302
    assert (profile(call, bobs), profile(call, eves)) == (403, 200)


# Reset tokens stay on this machine


@pytest.mark.parametrize(
    "environ",
    [
        {"REMOTE_ADDR": "10.0.0.1"},
        {"REMOTE_ADDR": "::ffff:10.0.0.1"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "127.0.0.1"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_PROTO": "https"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_FORWARDED": "for=127.0.0.1"},
        {"REMOTE_ADDR": "127.0.0.1", "HTTP_VIA": "1.1 proxy"},
    ],
)
def test_a_reset_token_goes_only_to_a_direct_caller_on_this_machine(
    auth: Auth, settings: Settings, environ: dict[str, Any]
) -> None:
    call = Client(authsvc.create_app(replace(settings, unsafe_listen=True), auth))
    register(call)
    answers = [call("POST", "/reset_password", {"email": email}, **environ) for email in ("bob@x.io", "nobody@x.io")]
    reason = {"message": "reset tokens are given only to this machine, and through no proxy"}
    assert [(answer.status, answer.json) for answer in answers] == [(403, reason)] * 2
    with ledger_of(settings.database) as ledger:
        assert ledger.execute("SELECT reset_token FROM users").fetchall() == [(None,)]
    assert log_in(call, **environ).status == 200


# The vault is shut


@pytest.mark.sqlite
def test_a_locked_database_is_503_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.02)
    with contextlib.closing(open_store(settings.database)) as db:
        call = Client(authsvc.create_app(settings, Auth(db, settings)))
        with ledger_of(settings.database) as other:
            other.execute("BEGIN EXCLUSIVE")
            answer = call("POST", "/users", BOB)
        assert (answer.status, answer.json) == (503, {"message": "storage unavailable, try again later"})
        assert (answer.headers["Content-Type"], answer.headers["Retry-After"]) == ("application/json", "5")
        line = json.loads(capsys.readouterr().err)
        assert (line["event"], line["request_id"]) == ("sys_storage_unavailable", answer.headers["X-Request-Id"])
        assert call("POST", "/users", BOB).status == 200


def test_every_refusal_by_the_rules_has_a_status() -> None:
    def below(kind: type[AuthError]) -> set[type[AuthError]]:
        return {kind for child in kind.__subclasses__() for kind in (child, *below(child))}

    assert authsvc.STATUS.keys() == below(AuthError)


# For a proxy that guards an application


def name_in(answer: Answer) -> str:
    """Who /verify says it is, in both headers."""
    assert answer.status == 200
    assert answer.headers["Remote-User"] == answer.headers["Remote-Email"]
    return answer.headers["Remote-User"]


def with_names(call: Client, path: str, **rest: Any) -> tuple[Answer, list[str]]:
    """Ask, and return the names of the headers too, each as often as it was given."""
    names: list[str] = []

    def noting(environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            names.extend(name for name, _ in headers)
            start_response(status, headers, exc_info)

        return call.application(environ, start)

    return Client(noting)("GET", path, **rest), names


def nobody_in(answer: Answer, status: int = 401) -> Answer:
    """Assert that an answer names nobody."""
    assert answer.status == status
    assert list(answer.json) == ["message"]
    assert not {"Remote-User", "Remote-Email", "Set-Cookie"} & answer.headers.keys()
    assert (status == 302) == ("Location" in answer.headers)
    return answer


def test_who_is_logged_in_is_told_to_a_proxy(home: Home) -> None:
    answer = home.call("GET", "/verify", cookie=f"session_id={home.session_id}")
    assert_200(answer, {"email": "bob@x.io"})
    assert name_in(answer) == "bob@x.io"
    assert (answer.headers["Cache-Control"], answer.headers["Vary"]) == ("no-store", "Cookie")
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "cookie",
    [
        None,
        "",
        "session_id=",
        "session_id=00000000-0000-4000-8000-000000000000",
        "session_id={0}; session_id={0}",
        "session_id={0}; session_id=evil",
        'session_id="{0}"',
        "xsession_id={0}",
        "__Host-session_id={0}",
    ],
)
def test_whom_no_cookie_names_is_nobody_to_a_proxy(
    home: Home, cookie: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    cookie = cookie and cookie.format(home.session_id)
    assert home.refuses(401, "GET", "/verify", cookie=cookie) == "not logged in"
    answer = nobody_in(home.call("GET", "/verify", cookie=cookie))
    assert (answer.headers["Cache-Control"], answer.headers["Vary"]) == ("no-store", "Cookie")
    assert "WWW-Authenticate" not in answer.headers  # a browser would ask for a password of its own
    assert nobody_in(home.call("GET", "/verify?login=1", cookie=cookie), 302).headers["Location"] == "/login"
    assert capsys.readouterr().err == ""  # it is asked all the time, and no attack


def test_a_session_that_ended_or_expired_is_nobody_to_a_proxy(crowd: Client, clock: Clock) -> None:
    ended, idle, old = (cookie_of(log_in(crowd)) for _ in range(3))
    for cookie in (ended, idle, old):
        assert name_in(crowd("GET", "/verify", cookie=cookie)) == "bob@x.io"
    assert crowd("DELETE", "/sessions", cookie=ended).status == 302
    nobody_in(crowd("GET", "/verify", cookie=ended))
    for _ in range(4):
        clock.advance(6 * 86_400)
        assert name_in(crowd("GET", "/verify", cookie=old)) == "bob@x.io"
    nobody_in(crowd("GET", "/verify", cookie=idle))
    clock.advance(6 * 86_400)  # and was used all the time
    nobody_in(crowd("GET", "/verify", cookie=old))


@pytest.mark.parametrize("way", ["disabled", "deleted", "reset", "changed"])
def test_who_is_shut_out_is_nobody_to_a_proxy_at_once(crowd: Client, db: DB, clock: Clock, way: str) -> None:
    mine, other = (cookie_of(log_in(crowd)) for _ in range(2))
    eves = cookie_of(log_in(crowd, "eve@x.io"))
    assert name_in(crowd("GET", "/verify", cookie=mine)) == "bob@x.io"
    if way == "disabled":
        db.disable_user(db.find_user_by(email="bob@x.io").id, int(clock()))
    elif way == "deleted":
        assert crowd("DELETE", "/profile", {"password": "b4l0u"}, cookie=other).status == 200
    elif way == "reset":
        form = {"email": "bob@x.io", "reset_token": token_of(crowd), "new_password": "t4rt1fl3tt3"}
        assert crowd("PUT", "/reset_password", form).status == 200
    else:
        form = {"password": "b4l0u", "new_password": "t4rt1fl3tt3"}
        assert crowd("PUT", "/password", form, cookie=other).status == 200
    nobody_in(crowd("GET", "/verify", cookie=mine))
    assert name_in(crowd("GET", "/verify", cookie=eves)) == "eve@x.io"


ODD_EMAILS = [
    "o'brien@x.io",
    'a "b" c@x.io',
    "100%@x.io",
    "a%0d%0aRemote-User: eve@x.io",
    "a, b@x.io",
    "eve@x.io; bob@x.io",
    "a: b\\",
    " bob@x.io ",
    "é@x.io",
    "用户@例子",
    "🐟",
    "a\u2028b",
    "a\xa0b\xad",
    "ÿ",
    "É" * 127,
    "a" * 254,
]


@pytest.mark.parametrize("email", ODD_EMAILS, ids=lambda email: ascii(email)[:30])
def test_no_email_breaks_or_forges_a_header(call: Client, email: str) -> None:
    register(call, email)
    cookie = cookie_of(log_in(call, email))
    answer, names = with_names(call, "/verify", cookie=cookie)
    assert_200(answer, {"email": email})
    assert re.fullmatch("[ -~]+", name_in(answer))
    assert len(names) == len(set(names))
    assert not {name for name in names if name.startswith("Remote-")} - {"Remote-User", "Remote-Email"}
    if not email.isascii():
        assert re.fullmatch(r"[A-Za-z0-9@._~%-]+", name_in(answer))
        assert unquote(name_in(answer), errors="strict") == email


@pytest.mark.parametrize(
    ("one", "other"),
    [("é@x.io", "%C3%A9@x.io"), ("用户@x.io", "%E7%94%A8%E6%88%B7@x.io"), ("bob@x.io", " bob@x.io"), ("a", "a ")],
)
def test_two_users_never_have_one_name(call: Client, one: str, other: str) -> None:
    names = set()
    for email in (one, other):
        register(call, email)
        names.add(name_in(call("GET", "/verify", cookie=cookie_of(log_in(call, email)))).strip(" "))  # as a proxy does
    assert len(names) == 2


CLAIMS: list[dict[str, Any]] = [
    {"HTTP_REMOTE_USER": "eve@x.io", "HTTP_REMOTE_EMAIL": "eve@x.io", "REMOTE_USER": "eve@x.io"},
    {"HTTP_X_FORWARDED_USER": "eve@x.io", "HTTP_AUTHORIZATION": "Basic ZXZlQHguaW86YjRsMHU="},
    {"HTTP_X_FORWARDED_FOR": "127.0.0.1", "HTTP_X_FORWARDED_HOST": "x", "HTTP_X_FORWARDED_PROTO": "https"},
    {"HTTP_X_FORWARDED_METHOD": "DELETE", "HTTP_X_FORWARDED_URI": "/?session_id=x", "HTTP_X_ORIGINAL_URL": "/health"},
    {"HTTP_ORIGIN": "https://evil.example", "HTTP_SEC_FETCH_SITE": "cross-site", "HTTP_HOST": "evil.example"},
    {"form": {"email": "eve@x.io", "session_id": "x"}},
    {"body": b"\xff" * 20_000, "content_type": "text/plain"},
]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: next(iter(claim)))
def test_nothing_but_the_cookie_says_who_somebody_is(home: Home, claim: dict[str, Any]) -> None:
    bobs = f"session_id={home.session_id}"
    for query in ("", "?email=eve@x.io", f"?session_id={home.session_id}", "?Remote-User=eve@x.io"):
        answer = home.call("GET", f"/verify{query}", cookie=bobs, **claim)
        assert_200(answer, {"email": "bob@x.io"})
        assert name_in(answer) == "bob@x.io"
        assert "eve" not in str(answer.headers)
        assert "eve" not in str(nobody_in(home.call("GET", f"/verify{query}", **claim)).headers)


WANTED: dict[str, Any] = {
    "HTTP_X_FORWARDED_PROTO": "https",
    "HTTP_X_FORWARDED_HOST": "app.x.io",
    "HTTP_X_FORWARDED_URI": "/a?b=c&d",
}


@pytest.mark.parametrize(
    "query", ["", "login", "login=", "login=0", "login=2", "login=1&", "login=1&x=1", "x=1&login=1", "LOGIN=1"]
)
def test_any_other_question_is_answered_without_a_redirect(home: Home, query: str) -> None:
    nobody_in(home.call("GET", f"/verify?{query}", **WANTED))
    nobody_in(home.call("GET", f"/verify?{query.replace('1', '%31')}", **WANTED))


@pytest.mark.parametrize(
    "uri",
    [
        "/",
        "/a?b=c&d",
        "/a?return=https://evil.example/",
        "/#fragment",
        "/%2e%2e/%C3%A9?x=%0d%0a",
        "//evil.example",
        "@evil.example/",
        ".evil.example/",
        "/a\r\nSet-Cookie: session_id=evil",
        "/\t\x00\x7f\xe9 \"<script>'",
        "/" + "a" * 8000,
    ],
    ids=lambda uri: ascii(uri)[:20],
)
def test_the_way_in_knows_the_way_back(home: Home, uri: str) -> None:
    answer = nobody_in(home.call("GET", "/verify?login=1", **{**WANTED, "HTTP_X_FORWARDED_URI": uri}), 302)
    page, _, wanted = answer.headers["Location"].partition("?return=")
    assert page == "/login"
    assert re.fullmatch("[A-Za-z0-9._~%-]+", wanted)  # one value, which ends no header, no address and no attribute
    assert unquote(wanted, errors="strict") == f"https://app.x.io{uri}"
    assert answer.json == {"message": "not logged in"}


@pytest.mark.parametrize("absent", [*((name,) for name in WANTED), tuple(WANTED)])
@pytest.mark.parametrize("emptied", [True, False])
def test_without_the_whole_address_there_is_no_way_back(home: Home, absent: tuple[str, ...], emptied: bool) -> None:
    said = {name: value for name, value in WANTED.items() if name not in absent}
    said |= dict.fromkeys(absent, "") if emptied else {}
    answer = nobody_in(home.call("GET", "/verify?login=1", HTTP_HOST="evil.example", **said), 302)
    assert answer.headers["Location"] == "/login"


def test_a_second_factor_that_is_demanded_and_missing_is_nobody(db: DB, settings: Settings, clock: Clock) -> None:
    settings = replace(settings, require_totp=True)
    bob = Factor(Client(authsvc.create_app(settings, Auth(db, settings, clock))), clock)
    register(bob.call)
    bob.begin()
    answer = nobody_in(bob.call("GET", "/verify", cookie=bob.cookie))
    assert answer.json == {"message": "set up a second factor first"}
    answer = nobody_in(bob.call("GET", "/verify?login=1", cookie=bob.cookie, **WANTED), 302)
    assert answer.headers["Location"] == "/account?return=https%3A%2F%2Fapp.x.io%2Fa%3Fb%3Dc%26d"
    assert nobody_in(bob.call("GET", "/verify?login=1", cookie=bob.cookie), 302).headers["Location"] == "/account"
    answer = nobody_in(bob.call("GET", "/verify?login=1", cookie="session_id=x", **WANTED), 302)
    assert answer.headers["Location"].startswith("/login?return=")
    bob.confirm()
    assert name_in(bob.call("GET", "/verify", cookie=bob.cookie)) == "bob@x.io"


@pytest.mark.sqlite
def test_a_thousand_answers_to_a_proxy_within_a_minute_write_nothing(
    call: Client, db: DB, settings: Settings, clock: Clock
) -> None:
    def stored() -> tuple[int, bytes, bytes]:
        path = Path(settings.database)
        return db._writer.total_changes, path.read_bytes(), path.with_name("authsvc.db-wal").read_bytes()

    register(call)
    cookie = cookie_of(log_in(call))
    before = stored()
    for _ in range(1000):
        clock.advance(0.059)
        assert call("GET", "/verify", cookie=cookie, REMOTE_ADDR="127.0.0.1").status == 200
        assert call("GET", "/verify?login=1", cookie="session_id=x", REMOTE_ADDR="127.0.0.1").status == 302
    assert stored() == before


@pytest.mark.sqlite
def test_that_a_session_was_used_is_written_later_and_elsewhere(db: DB, settings: Settings, clock: Clock) -> None:
    later: list[Callable[[], object]] = []
    auth = Auth(db, settings, clock, defer=later.append)
    call = Client(authsvc.create_app(settings, auth))
    register(call)
    cookie = cookie_of(log_in(call))
    for write in later:
        write()
    later.clear()
    clock.advance(60)
    changes = db._writer.total_changes
    assert call("GET", "/verify", cookie=cookie).status == 200
    assert (db._writer.total_changes, len(later)) == (changes, 1)
    later.pop()()
    assert auth.list_sessions(cookie.partition("=")[2])[1][0].last_seen_at == clock()
    assert call("GET", "/verify", cookie=cookie).status == 200
    assert later == []


# Health


def test_health(call: Client, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/health", "/health?verbose=1"):
        answer = call("GET", path, cookie="session_id=x")
        assert_200(answer, {"message": "ok"})
        assert "Set-Cookie" not in answer.headers
    assert capsys.readouterr().err == ""


def shut(settings: Settings, how: str) -> Callable[[], object]:
    """Make the database unreadable to who opens it from now on; return what makes it good again."""
    path = Path(settings.database)
    kept = path.with_name("kept")
    path.rename(kept)
    if how == "a folder":
        path.mkdir()

    def reopen() -> None:
        if how == "a folder":
            path.rmdir()
        kept.replace(path)

    return reopen


@pytest.mark.sqlite
@pytest.mark.parametrize("how", ["gone", "a folder"])
def test_a_database_that_does_not_answer_is_503(
    call: Client, settings: Settings, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    def asked(path: str) -> Answer:  # on a thread that has not read yet
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call, "GET", path, cookie="session_id=0").result()

    reopen = shut(settings, how)
    for path in ("/health", "/verify", "/verify?login=1"):
        answer = asked(path)
        assert (answer.status, answer.json) == (503, {"message": "storage unavailable, try again later"})
        assert (answer.headers["Content-Type"], answer.headers["Retry-After"]) == ("application/json", "5")
        assert not {"Remote-User", "Location"} & answer.headers.keys()
        assert "authsvc.db" not in f"{answer.headers}{answer.body!r}"
        line = json.loads(capsys.readouterr().err)
        assert (line["event"], line["request_id"]) == ("sys_storage_unavailable", answer.headers["X-Request-Id"])
    reopen()
    assert_200(asked("/health"), {"message": "ok"})
    assert asked("/verify").status == 401


@pytest.mark.sqlite
def test_a_database_that_another_program_writes_to_is_healthy(call: Client, settings: Settings) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    with ledger_of(settings.database) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert call("GET", "/health").status == 200
        assert name_in(call("GET", "/verify", cookie=cookie)) == "bob@x.io"


# Pages


def test_the_page_of_an_account_is_for_who_has_one(home: Home) -> None:
    bobs = f"session_id={home.session_id}"
    assert home.call("GET", "/account", cookie=bobs).status == 200
    for path in ("/account", "/account?return=https://evil.example/"):
        for cookie in (None, "session_id=x", f"{bobs}; {bobs}"):
            answer = home.call("GET", path, cookie=cookie, HTTP_HOST="evil.example")
            assert (answer.status, answer.headers["Location"]) == (302, "/login")


@pytest.mark.parametrize(("path", "kind"), PAGES.items())
@pytest.mark.parametrize(
    "rest", [{}, {"HTTP_ACCEPT": "application/json"}, {"form": BOB}, {"HTTP_HOST": "evil.example"}]
)
def test_a_page_is_the_same_for_everybody(home: Home, path: str, kind: str, rest: dict[str, Any]) -> None:
    first, *others = (
        home.call("GET", f"{path}{query}", cookie=cookie, **rest)
        for query in ("", "?return=https://evil.example/&domain=evil.example", "?v=1")
        for cookie in (None, f"session_id={home.session_id}")
        if cookie or path != "/account"
    )
    assert first.headers["Content-Type"] == kind
    assert first.headers["Content-Length"] == str(len(first.body))
    for answer in (first, *others):
        assert (answer.status, answer.body) == (200, first.body)
        assert "Set-Cookie" not in answer.headers
        assert b"evil" not in answer.body
        assert "evil" not in str(answer.headers)


@pytest.mark.parametrize("path", [path for path, kind in PAGES.items() if kind == HTML])
def test_a_page_knows_which_one_it_is(home: Home, path: str) -> None:
    text = home.call("GET", path, cookie=f"session_id={home.session_id}").body.decode()
    assert f'<body data-page="{path[1:]}" data-domain="">' in text
    assert f'<section id="{path[1:]}">' in text
    assert not re.search("[{}]", text)


def test_a_page_loads_nothing_but_the_files_that_are_served(home: Home) -> None:
    text = home.call("GET", "/login").body.decode()
    loaded = set(re.findall(r'(?:src|<link[^>]* href)="([^"]*)"', text))
    assert loaded == {path for path in PAGES if path.startswith("/pages/")} | {"data:,"}
    assert not re.search(r"<style|<script(?! src=)| style=| on[a-z]+=", text)  # which its policy would stop


def test_the_policy_of_a_page_lets_in_what_the_page_needs_and_nothing_else() -> None:
    policy = dict(part.split(" ", 1) for part in authsvc.PAGE_POLICY.split("; "))
    own = {"script-src": "'self'", "style-src": "'self'", "connect-src": "'self'", "img-src": "data:"}
    none = dict.fromkeys(("default-src", "frame-ancestors", "base-uri", "form-action"), "'none'")
    assert policy == own | none


@pytest.mark.parametrize("accept", ["text/html", "text/html,application/xhtml+xml,*/*;q=0.8", "*/*"])
def test_the_welcome_is_no_page(call: Client, accept: str) -> None:
    assert_200(call("GET", "/", HTTP_ACCEPT=accept), {"message": "Bienvenue"})


# The WSGI callable for another server


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[DB]]:
    """The databases that ``authsvc.app`` opens, as from its first request on."""
    dbs: list[DB] = []
    pruning: list[tuple[threading.Thread, threading.Event]] = []
    both = threading.Barrier(2)
    start_pruning = authsvc._start_pruning

    def start(auth: Auth, stopping: threading.Event) -> threading.Thread:
        pruning.append((start_pruning(auth, stopping), stopping))
        return pruning[-1][0]

    def open_one(path: str, private: bool) -> DB:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.05)  # long enough for a second opener, if there is one
        dbs.append(DB(path))
        return dbs[-1]

    monkeypatch.setattr(authsvc, "open_store", open_one)
    monkeypatch.setattr(authsvc, "_start_pruning", start)
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "authsvc.db"))
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", str(COST))
    authsvc._shared_app.cache_clear()
    yield dbs
    authsvc._shared_app.cache_clear()
    for thread, stopping in pruning:  # before what it works on is closed
        stopping.set()
        thread.join()
    for db in dbs:
        db.close()


def test_the_callable_serves_from_one_database(opened: list[DB]) -> None:
    call = Client(authsvc.app)
    assert opened == []
    register(call)
    assert log_in(call).status == 200
    assert len(opened) == 1


def test_two_first_requests_at_once_open_one_database(opened: list[DB]) -> None:
    threads = [threading.Thread(target=Client(authsvc.app), args=("GET", "/")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


def test_the_callable_deletes_what_is_over(opened: list[DB], clock: Clock, tmp_path: Path) -> None:
    clock.now = 1.0
    with contextlib.closing(DB(tmp_path / "authsvc.db")) as db:
        auth = Auth(db, Settings(bcrypt_cost=COST), clock)
        auth.register_user("bob@x.io", "b4l0u")
        auth.create_session("bob@x.io")
    assert Client(authsvc.app)("GET", "/").status == 200
    end = time.monotonic() + 5
    with contextlib.closing(sqlite3.connect(tmp_path / "authsvc.db")) as ledger:
        while ledger.execute("SELECT count(*) FROM sessions").fetchone() != (0,):
            assert time.monotonic() < end


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUTHSVC_BCRYPT_COST", "99"),
        ("AUTHSVC_NO_SUCH", "1"),
        ("AUTHSVC_LISTEN", "0.0.0.0:5000"),
        ("AUTHSVC_DATABASE", "/nowhere/at/all.db"),
    ],
)
def test_the_callable_says_503_with_a_wrong_setting(
    opened: list[DB], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    answer = Client(authsvc.app)("GET", "/")
    assert (answer.status, answer.json) == (503, {"message": "service not configured"})
    assert (answer.headers["Content-Type"], answer.headers["Cache-Control"]) == ("application/json", "no-store")
    line = json.loads(capsys.readouterr().err)
    assert line["event"] == "sys_startup_failed"
    assert (value if name == "AUTHSVC_DATABASE" else name) in line["reason"]


def test_importing_opens_and_starts_nothing(tmp_path: Path) -> None:
    program = "import os, threading, authsvc; print(os.listdir(), threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**clean_environ(), "PYTHONPATH": str(HERE), "AUTHSVC_LISTEN": "rubbish"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[] 1\n", "")


# What is over is deleted, bit by bit


class Stopping(threading.Event):
    """Is set at the last of these calls to wait, each of which takes no time."""

    def __init__(self, *waiting: Callable[[], object]) -> None:
        super().__init__()
        self.rests: list[float | None] = []
        self.waiting = list(waiting)

    def wait(self, timeout: float | None = None) -> bool:
        self.rests.append(timeout)
        self.waiting.pop(0)()
        return not self.waiting


def leave(settings: Settings, expired: int) -> None:
    """Leave so many expired sessions behind."""
    with ledger_of(settings.database) as ledger, ledger:
        ledger.execute("INSERT INTO users (id, email, email_key, hashed_password) VALUES (9, 'a', 'a', '!')")
        ledger.executemany(
            "INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)"
            " VALUES (?, 9, 0, 0, 1, '', '')",
            [(str(number),) for number in range(expired)],
        )


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock comes a second after the one before."""
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize(("expired", "steps"), [(0, 0), (199, 0), (200, 1), (450, 2)])
def test_between_two_steps_of_deleting_there_is_a_rest_and_between_two_rounds_an_hour(
    auth: Auth, settings: Settings, expired: int, steps: int
) -> None:
    leave(settings, expired)
    stopping = Stopping(*[lambda: None] * (steps + 3))
    authsvc._start_pruning(auth, stopping).join(10)
    assert stopping.rests == [0.0, *[10] * steps, 3600.0, 3600.0]
    with ledger_of(settings.database) as ledger:
        assert ledger.execute("SELECT count(*) FROM sessions").fetchone() == (0,)


@pytest.mark.sqlite
@pytest.mark.usefixtures("seconds")
def test_a_locked_database_puts_the_deleting_off(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.02)
    with contextlib.closing(open_store(settings.database)) as db:
        leave(settings, 1)
        with ledger_of(settings.database) as other:
            stopping = Stopping(lambda: other.execute("BEGIN EXCLUSIVE"), other.rollback, lambda: None)
            authsvc._start_pruning(Auth(db, settings), stopping).join(10)
            assert stopping.rests == [0.0, 3600.0, 3600.0]
            assert other.execute("SELECT count(*) FROM sessions").fetchone() == (0,)
    assert capsys.readouterr() == ("", "")


# The log


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("request_line", "form", "event"),
    [
        (("GET", "/profile"), {}, "authz_fail"),
        (("DELETE", "/sessions"), {}, "authz_fail"),
        (("POST", "/reset_password"), {"email": "canary@x.io"}, "authz_fail"),
        (
            ("PUT", "/reset_password"),
            {"email": "canary@x.io", "reset_token": "canary", "new_password": "p"},
            "authn_token_fail",
        ),
    ],
)
def test_a_refusal_for_want_of_rights_is_logged(
    call: Client, capsys: pytest.CaptureFixture[str], request_line: tuple[str, str], form: dict[str, str], event: str
) -> None:
    assert call(*request_line, form).status == 403
    (line,) = events(capsys)
    assert line["event"] == event
    assert "canary" not in str(line)


@pytest.mark.parametrize(
    ("status", "rest"),
    [
        (400, {"form": {"email": "canary@x.io"}}),
        (400, {"form": [("email", "canary@x.io"), ("email", "canary@x.io"), ("password", "canary")]}),
        (400, {"form": {"email": "canary\r\n", "password": "canary"}}),
        (400, {"form": {"email": "canary@x.io", "password": "canary" * 200}}),
        (413, {"body": b"email=canary" * 2000}),
        (415, {"body": b"canary", "content_type": "text/canary"}),
    ],
)
def test_refused_input_is_logged_without_its_value(
    call: Client, capsys: pytest.CaptureFixture[str], status: int, rest: dict[str, Any]
) -> None:
    assert call("POST", "/users", **rest).status == status
    (line,) = events(capsys)
    assert line["event"] == "input_validation_fail"
    assert "canary" not in str(line)


def test_what_changes_an_account_is_logged_and_no_secret_is_told_twice(
    crowd: Client, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bob = Factor(crowd, clock)
    said: list[Answer] = []
    secrets: set[str] = {"b4l0u", "t4rt1fl3tt3", "wrong-canary"}

    def ask(method: str, path: str, event: str | None, **form: str) -> Answer:
        capsys.readouterr()
        answer = crowd(method, path, form, cookie=bob.cookie)
        said.append(answer)
        lines = events(capsys)
        assert [line["event"] for line in lines] == ([event] if event else [])
        for line in lines:
            stamps = [line.pop(name) for name in ("time", "request_id")]
            assert stamps[1] == answer.headers["X-Request-Id"]
            logged.append(line)
        if answer.headers.get("Set-Cookie", "").startswith("session_id=") and answer.session_id:
            bob.cookie = cookie_of(answer)
            secrets.add(answer.session_id)
        return answer

    logged: list[dict[str, Any]] = []
    ask("POST", "/sessions", "authn_login_success", **BOB)
    ask("GET", "/sessions", None)
    ask("PUT", "/password", "authn_login_fail", password="wrong-canary", new_password="t4rt1fl3tt3")
    ask("PUT", "/password", "input_validation_fail", password="b4l0u", new_password="t4rt1fl3tt3" * 100)
    ask("PUT", "/password", "authn_password_change", password="b4l0u", new_password="t4rt1fl3tt3")
    bob.seed = ask("POST", "/totp", None, password="t4rt1fl3tt3").json["secret"]
    ask("PUT", "/totp", "authn_login_fail", otp="wrong-canary")
    code = bob.code()
    secrets.update((bob.seed, code))
    codes = ask("PUT", "/totp", "authn_factor_added", otp=code).json["recovery_codes"]
    secrets.update(codes)
    ask("POST", "/totp", "input_validation_fail", password="t4rt1fl3tt3")
    ask("POST", "/sessions", None, email="bob@x.io", password="t4rt1fl3tt3")
    ask("POST", "/sessions", "authn_login_fail", email="bob@x.io", password="t4rt1fl3tt3", otp="wrong-canary")
    ask("POST", "/sessions", "authn_login_success", email="bob@x.io", password="t4rt1fl3tt3", otp=codes[0])
    ask("DELETE", "/totp", "authn_login_fail", password="t4rt1fl3tt3", otp=codes[0])
    ask("DELETE", "/totp", "authn_factor_removed", password="t4rt1fl3tt3", otp=codes[1])
    ask("DELETE", "/sessions/0123456789abcdef", "authz_fail")
    ask("DELETE", "/sessions/others", "session_ended")
    ask("DELETE", f"/sessions/{name_of(bob.cookie)}", "session_ended")
    ask("POST", "/sessions", "authn_login_success", email="bob@x.io", password="t4rt1fl3tt3")
    ask("DELETE", "/sessions/all", "session_ended")
    ask("POST", "/sessions", "authn_login_success", email="bob@x.io", password="t4rt1fl3tt3")
    ask("DELETE", "/profile", "user_deleted", password="t4rt1fl3tt3")
    assert [line.get("which") for line in logged if line["event"] == "session_ended"] == ["others", None, "all"]
    changes = {"authn_password_change", "authn_factor_added", "authn_factor_removed", "session_ended", "user_deleted"}
    assert {line["user_id"] for line in logged if line["event"] in changes} == {1}
    assert not [(line, secret) for line in logged for secret in secrets if secret in json.dumps(line)]
    told = [f"{answer.headers} {answer.body.decode()}" for answer in said]
    assert all(
        sum(secret in text for text in told) == 1 for secret in secrets - {"b4l0u", "t4rt1fl3tt3", "wrong-canary", code}
    )
    assert not [text for text in told for secret in ("b4l0u", "t4rt1fl3tt3", "canary") if secret in text]
