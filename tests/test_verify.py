"""The route /verify: it tells a reverse proxy which user sent a request, or where to sign in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest

import authsvc
import log
from auth import GROUP, Auth
from engines.sqlite import SQLiteEngine
from settings import Settings
from storage import DB
from tests.cases import each
from tests.conftest import Answer, Client, Clock
from tests.routes import (
    SharedApp,
    TotpUser,
    assert_200,
    cookie_of,
    events,
    log_in,
    open_shared_app,
    register,
    reset_token,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedApp]:
    with open_shared_app(tmp_path_factory.mktemp("shared")) as app:
        yield app


REMOTE = {"Remote-User", "Remote-Email", "Remote-Groups", "Remote-Id"}


def verified_name(answer: Answer) -> str:
    """Return the user that an answer of /verify names, the same in both headers, beside groups and an id."""
    assert answer.status == 200
    assert {name for name in answer.headers if name.startswith("Remote-")} == REMOTE
    assert re.fullmatch("[1-9][0-9]*", answer.headers["Remote-Id"])
    assert answer.headers["Remote-User"] == answer.headers["Remote-Email"]
    return answer.headers["Remote-User"]


def assert_no_user(answer: Answer, status: int = 401) -> Answer:
    """Assert that an answer of /verify names no user, and return it."""
    assert answer.status == status
    assert list(answer.json) == ["message"]
    assert not (REMOTE | {"Set-Cookie"}) & answer.headers.keys()
    assert (status == 302) == ("Location" in answer.headers)
    return answer


def header_names(call: Client, path: str, **rest: Any) -> tuple[Answer, list[str]]:
    """Return the answer, and the names of its headers as often as each was given."""
    names: list[str] = []

    def recording(environ: Any, start_response: Any) -> Any:
        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
            names.extend(name for name, _ in headers)
            start_response(status, headers, exc_info)

        return call.application(environ, start)

    return Client(recording)("GET", path, **rest), names


# The user


def test_a_valid_session_is_answered_with_its_user(shared: SharedApp) -> None:
    answer = shared.call("GET", "/verify", cookie=shared.cookie)
    assert_200(answer, {"email": "bob@x.io"})
    assert verified_name(answer) == "bob@x.io"
    assert (answer.headers["Cache-Control"], answer.headers["Vary"]) == ("no-store", "Cookie, Authorization")
    assert "Set-Cookie" not in answer.headers


@each(
    "cookie",
    [
        None,
        "",
        "session_id=",
        "session_id=00000000-0000-4000-8000-000000000000",
        "session_id={0}; session_id=1; session_id=2; session_id=3; session_id=4",
        'session_id="{0}"',
        "xsession_id={0}",
        "__Host-session_id={0}",
    ],
)
def test_without_a_valid_cookie_no_user_is_named(shared: SharedApp, cookie: str | None) -> None:
    cookie = cookie and cookie.format(shared.session_id)
    assert shared.refuses(401, "GET", "/verify", cookie=cookie) == "not logged in"
    answer = assert_no_user(shared.call("GET", "/verify", cookie=cookie))
    assert (answer.headers["Cache-Control"], answer.headers["Vary"]) == ("no-store", "Cookie, Authorization")
    assert assert_no_user(shared.call("GET", "/verify?login=1", cookie=cookie), 302).headers["Location"] == "/login"


@pytest.mark.parametrize("path", ["/verify", "/verify?login=1"])
def test_some_refused_verifications_are_logged_and_the_others_counted(
    call: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock: Clock, path: str
) -> None:
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=clock))
    answers = [call("GET", path, REMOTE_ADDR=f"127.0.0.{number}") for number in range(100)]
    clock.advance(log.FLOOD_WINDOW)
    answers.append(call("GET", path, REMOTE_ADDR="127.0.0.100"))
    lines = events(capsys)
    assert {line["event"] for line in lines} == {"authz_verify_fail"}
    assert [line["address"] for line in lines] == [f"127.0.0.{number}" for number in (0, 1, 2, 3, 4, 100)]
    assert [line["request_id"] for line in lines] == [
        answers[at].headers["X-Request-Id"] for at in (0, 1, 2, 3, 4, 100)
    ]
    assert [line.get("missing") for line in lines] == [None] * log.SAMPLE_LIMIT + [100 - log.SAMPLE_LIMIT]


@pytest.mark.both_engines
def test_an_ended_or_expired_session_names_no_user(db: DB, settings: Settings, clock: Clock) -> None:
    settings = replace(settings, sessions_per_user=3)
    call = Client(authsvc.create_app(settings, Auth(db, settings, clock)))
    register(call)
    ended, idle, old = (cookie_of(log_in(call)) for _ in range(3))
    for cookie in (ended, idle, old):
        assert verified_name(call("GET", "/verify", cookie=cookie)) == "bob@x.io"
    assert call("DELETE", "/sessions", cookie=ended).status == 302
    assert_no_user(call("GET", "/verify", cookie=ended))
    for _ in range(4):
        clock.advance(6 * 86_400)
        assert verified_name(call("GET", "/verify", cookie=old)) == "bob@x.io"
    assert_no_user(call("GET", "/verify", cookie=idle))
    clock.advance(6 * 86_400)  # past its lifetime, although it was used all the time
    assert_no_user(call("GET", "/verify", cookie=old))


@pytest.mark.parametrize("way", ["disabled", "deleted", "reset", "changed"])
def test_a_revoked_session_names_no_user_at_once(db: DB, settings: Settings, clock: Clock, way: str) -> None:
    settings = replace(settings, sessions_per_user=2)
    call = Client(authsvc.create_app(settings, Auth(db, settings, clock)))
    register(call)
    register(call, "eve@x.io")
    mine, other = (cookie_of(log_in(call)) for _ in range(2))
    eves = cookie_of(log_in(call, "eve@x.io"))
    assert verified_name(call("GET", "/verify", cookie=mine)) == "bob@x.io"
    if way == "disabled":
        db.disable_user(db.find_user_by(email="bob@x.io").id, int(clock()))
    elif way == "deleted":
        assert call("DELETE", "/profile", {"password": "b4l0u"}, cookie=other).status == 200
    elif way == "reset":
        form = {"email": "bob@x.io", "reset_token": reset_token(call), "new_password": "t4rt1fl3tt3"}
        assert call("PUT", "/reset_password", form).status == 200
    else:
        form = {"password": "b4l0u", "new_password": "t4rt1fl3tt3"}
        assert call("PUT", "/password", form, cookie=other).status == 200
    assert_no_user(call("GET", "/verify", cookie=mine))
    assert verified_name(call("GET", "/verify", cookie=eves)) == "eve@x.io"


@pytest.mark.parametrize(
    "email",
    [
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
    ],
    ids=lambda email: ascii(email)[:30],
)
def test_no_email_breaks_or_forges_a_header(call: Client, email: str) -> None:
    register(call, email)
    answer, names = header_names(call, "/verify", cookie=cookie_of(log_in(call, email)))
    assert_200(answer, {"email": email})
    assert re.fullmatch("[ -~]+", verified_name(answer))
    assert len(names) == len(set(names))
    if not email.isascii():
        assert re.fullmatch(r"[A-Za-z0-9@._~%-]+", verified_name(answer))
        assert unquote(verified_name(answer), errors="strict") == email


@pytest.mark.parametrize(
    ("one", "other"),
    [("é@x.io", "%C3%A9@x.io"), ("用户@x.io", "%E7%94%A8%E6%88%B7@x.io"), ("bob@x.io", " bob@x.io"), ("a", "a ")],
)
def test_two_users_never_have_the_same_name(call: Client, one: str, other: str) -> None:
    names = set()
    for email in (one, other):
        register(call, email)
        answer = call("GET", "/verify", cookie=cookie_of(log_in(call, email)))
        names.add(verified_name(answer).strip(" "))  # a proxy strips the spaces
    assert len(names) == 2


@each(
    "claim",
    [
        {"HTTP_REMOTE_USER": "eve@x.io", "HTTP_REMOTE_EMAIL": "eve@x.io", "REMOTE_USER": "eve@x.io"},
        {"HTTP_X_FORWARDED_USER": "eve@x.io", "HTTP_AUTHORIZATION": "Basic ZXZlQHguaW86YjRsMHU="},
        {"HTTP_X_FORWARDED_FOR": "127.0.0.1", "HTTP_X_FORWARDED_HOST": "x", "HTTP_X_FORWARDED_PROTO": "https"},
        {
            "HTTP_X_FORWARDED_METHOD": "DELETE",
            "HTTP_X_FORWARDED_URI": "/?session_id=x&group=eve",
            "HTTP_X_ORIGINAL_URL": "/health",
        },
        {"HTTP_ORIGIN": "https://evil.example", "HTTP_SEC_FETCH_SITE": "cross-site", "HTTP_HOST": "evil.example"},
        {"HTTP_REMOTE_GROUPS": "eve", "HTTP_REMOTE_ID": "2", "HTTP_X_ORIGINAL_URI": "/verify?group=eve"},
        {"form": {"email": "eve@x.io", "session_id": "x", "group": "eve"}},
        {"body": b"\xff" * 20_000, "content_type": "text/plain"},
    ],
)
def test_only_the_cookie_says_which_user_it_is(shared: SharedApp, claim: dict[str, Any]) -> None:
    answer = shared.call("GET", "/verify", cookie=shared.cookie, **claim)
    assert_200(answer, {"email": "bob@x.io"})
    assert verified_name(answer) == "bob@x.io"
    assert (answer.headers["Remote-Groups"], answer.headers["Remote-Id"]) == ("", "1")
    assert "eve" not in str(answer.headers)
    assert "eve" not in str(assert_no_user(shared.call("GET", "/verify", **claim)).headers)
    for query in ("email=eve@x.io", shared.cookie, "Remote-User=eve@x.io"):
        for cookie in (shared.cookie, None):
            assert_no_user(shared.call("GET", f"/verify?{query}", cookie=cookie, **claim), 400)


# The redirect to the sign-in page

FORWARDED: dict[str, Any] = {
    "HTTP_X_FORWARDED_PROTO": "https",
    "HTTP_X_FORWARDED_HOST": "app.x.io",
    "HTTP_X_FORWARDED_URI": "/a?b=c&d",
}


@each(
    ("query", "status"),
    [("", 401), ("group=a", 401), *((query, 302) for query in ("login=1", "login=1&group=a", "group=a&login=1"))],
)
def test_only_login_1_is_answered_with_a_redirect(shared: SharedApp, query: str, status: int) -> None:
    assert_no_user(shared.call("GET", f"/verify?{query}", **FORWARDED), status)


@each(
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
)
def test_the_redirect_carries_the_return_address(shared: SharedApp, uri: str) -> None:
    answer = assert_no_user(shared.call("GET", "/verify?login=1", **{**FORWARDED, "HTTP_X_FORWARDED_URI": uri}), 302)
    page, _, return_to = answer.headers["Location"].partition("?return=")
    assert page == "/login"
    assert re.fullmatch("[A-Za-z0-9._~%-]+", return_to)  # one value that cannot end a header, a URL or an attribute
    assert unquote(return_to, errors="strict") == f"https://app.x.io{uri}"
    assert answer.json == {"message": "not logged in"}


@each("absent", [*((name,) for name in FORWARDED), tuple(FORWARDED)])
@each("emptied", [True, False])
def test_an_incomplete_address_gives_no_return_address(
    shared: SharedApp, absent: tuple[str, ...], emptied: bool
) -> None:
    sent = {name: value for name, value in FORWARDED.items() if name not in absent}
    sent |= dict.fromkeys(absent, "") if emptied else {}
    answer = assert_no_user(shared.call("GET", "/verify?login=1", HTTP_HOST="evil.example", **sent), 302)
    assert answer.headers["Location"] == "/login"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"HTTP_SEC_FETCH_MODE": "navigate"}, 302),
        ({"HTTP_SEC_FETCH_MODE": "navigate", "HTTP_X_REQUESTED_WITH": "org.example.app"}, 302),
        ({"HTTP_SEC_FETCH_MODE": "cors"}, 401),
        ({"HTTP_SEC_FETCH_MODE": "same-origin"}, 401),
        ({"HTTP_SEC_FETCH_MODE": "websocket"}, 401),
        ({"HTTP_SEC_FETCH_MODE": ""}, 401),
        ({"HTTP_X_REQUESTED_WITH": "XMLHttpRequest"}, 401),
        ({"HTTP_SEC_FETCH_MODE": "navigate", "HTTP_X_REQUESTED_WITH": "XMLHttpRequest"}, 401),
    ],
)
def test_a_script_is_not_led_to_the_sign_in_page(shared: SharedApp, headers: dict[str, Any], status: int) -> None:
    answer = assert_no_user(shared.call("GET", "/verify?login=1", **FORWARDED, **headers), status)
    assert ("Location" in answer.headers) is (status == 302)
    assert shared.call("GET", "/verify?login=1", cookie=shared.cookie, **FORWARDED, **headers).status == 200


def test_a_missing_required_second_factor_names_no_user(db: DB, settings: Settings, clock: Clock) -> None:
    settings = replace(settings, require_second_factor=True)
    bob = TotpUser(Client(authsvc.create_app(settings, Auth(db, settings, clock))), clock)
    register(bob.call)
    bob.begin()
    answer = assert_no_user(bob.call("GET", "/verify", cookie=bob.cookie))
    assert answer.json == {"message": "set up a second factor first"}
    answer = assert_no_user(bob.call("GET", "/verify?login=1", cookie=bob.cookie, **FORWARDED), 302)
    assert answer.headers["Location"] == "/account?return=https%3A%2F%2Fapp.x.io%2Fa%3Fb%3Dc%26d"
    answer = assert_no_user(bob.call("GET", "/verify?login=1", cookie=bob.cookie), 302)
    assert answer.headers["Location"] == "/account"
    answer = assert_no_user(bob.call("GET", "/verify?login=1", cookie="session_id=x", **FORWARDED), 302)
    assert answer.headers["Location"].startswith("/login?return=")
    bob.confirm()
    assert verified_name(bob.call("GET", "/verify", cookie=bob.cookie)) == "bob@x.io"
    db._engine.write("UPDATE sessions SET factor_at = NULL", {})  # as after an upgrade
    assert assert_no_user(bob.call("GET", "/verify", cookie=bob.cookie)).json == {
        "message": "sign in with your second factor"
    }
    answer = assert_no_user(bob.call("GET", "/verify?login=1", cookie=bob.cookie, **FORWARDED), 302)
    assert answer.headers["Location"].startswith("/login?return=")
    answer = bob.call("GET", "/account", cookie=bob.cookie)
    assert (answer.status, answer.headers["Location"]) == (302, "/login")


# The groups


@each(
    "query",
    [
        *("login", "login=", "login=0", "login=2", "login=1&", "login=1&x=1", "x=1&login=1", "LOGIN=1", "login=%31"),
        *("&", "?", "=", "&group=a", "group=a&", "group=a&&group=b", "group", "group=", "groups=a", "Group=a", "a"),
        *("group=A", "group=-a", "group=_a", "group=a,b", "group=a+b", "group=a%20b", "group=%61", "gr%6Fup=a"),
        *("group=a;group=b", "group=a;", "group=a%00", "group=a%0A", "group=a%26login=1", "group[]=a", "group=a=b"),
        *("group=é", "group=a.b", "group=a/b", " group=a", "group=a ", "group= a", f"group={'a' * 65}", "group=a#b"),
        *("group=a?group=b", "group=a&login=2", "group=a&x", "group=a|b", "group=*", "group=a\n", "email=bob@x.io"),
    ],
)
def test_any_other_query_is_refused_with_or_without_a_session(shared: SharedApp, query: str) -> None:
    for cookie in (shared.cookie, None):
        answer = assert_no_user(shared.call("GET", "/verify", QUERY_STRING=query, cookie=cookie, **FORWARDED), 400)
        assert answer.json == {"message": "the query may only contain login=1 and group=NAME"}


def test_the_query_names_groups_as_the_rules_do() -> None:
    assert authsvc.VERIFY_QUERY.pattern == f"login=1|group={GROUP.pattern}"


@pytest.mark.both_engines
@pytest.mark.parametrize(
    ("groups", "query", "status"),
    [
        ("", "", 200),
        ("", "group=a", 403),
        ("", "login=1&group=a", 403),
        ("a", "", 200),
        ("a", "login=1", 200),
        ("a", "group=a", 200),
        ("a", "group=a&group=a", 200),
        ("a", "group=b&group=a&group=c", 200),
        ("a", "group=a&login=1", 200),
        ("a", "login=1&group=a&login=1", 200),
        ("a", "group=b", 403),
        ("a", "group=aa", 403),
        ("a,b-1,c", "group=b-1", 200),
        ("a,b-1,c", "group=b", 403),
        ("a,b-1,c", "group=d&group=login", 403),
    ],
)
def test_only_members_of_a_group_of_the_query_are_let_in(
    call: Client, db: DB, groups: str, query: str, status: int
) -> None:
    register(call)
    register(call, "eve@x.io")
    assert db.set_groups(db.find_user_by(id=2), groups)
    answer = call("GET", f"/verify?{query}", cookie=cookie_of(log_in(call, "eve@x.io")), **FORWARDED)
    if status == 403:
        assert assert_no_user(answer, 403).json == {"message": "not allowed here"}
        return
    assert verified_name(answer) == "eve@x.io"
    assert (answer.headers["Remote-Groups"], answer.headers["Remote-Id"]) == (groups, "2")


@each("claim", ["group=a", "/verify?group=a", "/?group=a", "https://auth.x.io/verify?group=a", "a"])
def test_groups_are_read_from_no_header_and_no_body(shared: SharedApp, claim: str) -> None:
    names = ("X_FORWARDED_URI", "X_ORIGINAL_URI", "X_ORIGINAL_URL", "X_REWRITE_URL", "REMOTE_GROUPS", "REFERER")
    sent: dict[str, Any] = {f"HTTP_{name}": claim for name in (*names, "X_AUTH_REQUEST_GROUPS", "GROUP")}
    for form in (None, {"group": "a", "groups": "a"}):
        cookie = f"{shared.cookie}; group=a"
        assert_no_user(shared.call("GET", "/verify?group=a", form, cookie=cookie, **sent), 403)
        answer = shared.call("GET", "/verify", form, cookie=cookie, **sent)  # nor do they ask for a group
        assert (answer.status, answer.headers["Remote-Groups"]) == (200, "")


def test_a_change_of_the_groups_counts_at_once(call: Client, db: DB) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    for groups, status in [("", 403), ("a", 200), ("a,b", 200), ("b", 403), ("", 403)]:
        assert db.set_groups(db.find_user_by(id=1), groups)
        assert call("GET", "/verify?group=a", cookie=cookie).status == status


def test_a_disabled_member_is_not_signed_in(call: Client, db: DB, clock: Clock) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    assert db.set_groups(db.find_user_by(id=1), "a")
    db.disable_user(1, int(clock()))
    assert_no_user(call("GET", "/verify?group=a", cookie=cookie))
    assert_no_user(call("GET", "/verify?group=a&login=1", cookie=cookie), 302)


def test_a_user_who_is_no_member_is_named_in_the_log(call: Client, capsys: pytest.CaptureFixture[str]) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    capsys.readouterr()
    answer = call("GET", "/verify?group=secret-name", cookie=cookie)
    (line,) = events(capsys)
    assert (line["event"], line["user_id"]) == ("authz_verify_fail", 1)
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert "secret-name" not in str(line)


# Writes


def write_count(db: DB) -> int:
    """Return how many rows the writer of a SQLite database has changed."""
    engine = db._engine
    assert isinstance(engine, SQLiteEngine)
    return engine._writer.total_changes


@pytest.mark.slow
def test_a_thousand_answers_within_a_minute_write_nothing(
    call: Client, db: DB, settings: Settings, clock: Clock
) -> None:
    def stored() -> tuple[int, bytes, bytes]:
        path = Path(settings.database)
        return write_count(db), path.read_bytes(), path.with_name("authsvc.db-wal").read_bytes()

    register(call)
    cookie = cookie_of(log_in(call))
    before = stored()
    for _ in range(500):
        clock.advance(0.118)
        assert call("GET", "/verify", cookie=cookie, REMOTE_ADDR="127.0.0.1").status == 200
        assert call("GET", "/verify?login=1", cookie="session_id=x", REMOTE_ADDR="127.0.0.1").status == 302
    assert stored() == before


def test_the_use_of_a_session_is_recorded_in_the_background(db: DB, settings: Settings, clock: Clock) -> None:
    queued: list[Callable[[], object]] = []
    auth = Auth(db, settings, clock, run_in_background=queued.append)
    call = Client(authsvc.create_app(settings, auth))
    register(call)
    cookie = cookie_of(log_in(call))
    for write in queued:
        write()
    queued.clear()
    clock.advance(60)
    changes = write_count(db)
    assert call("GET", "/verify", cookie=cookie).status == 200
    assert (write_count(db), len(queued)) == (changes, 1)
    queued.pop()()
    assert auth.list_sessions(cookie.partition("=")[2])[1][0].last_seen_at == clock()
    assert call("GET", "/verify", cookie=cookie).status == 200
    assert queued == []
