"""Routing: the table of routes, paths and methods that no route has, HEAD, refusals, /health, pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from bottle import Bottle

import authsvc
from auth import Auth, AuthError
from engines import sqlite
from settings import Settings
from storage import DB
from tests.cases import each
from tests.conftest import Answer, Client, raw_connection
from tests.routes import (
    BOB,
    HTML,
    JSON_ROUTES,
    OPEN_ROUTES,
    PAGES,
    SESSION_ROUTES,
    UUID4,
    SharedApp,
    as_json,
    assert_200,
    cookie_of,
    events,
    log_in,
    open_shared_app,
    register,
)
from web.middleware import SecurityMiddleware
from web.responses import PAGE_POLICY, SECURITY_HEADERS


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedApp]:
    with open_shared_app(tmp_path_factory.mktemp("shared")) as app:
        yield app


# One table feeds the direct look-up and Bottle's router


class Routers:
    """One application, called as it is and through Bottle's router alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, settings: Settings, auth: Auth) -> None:
        self.routed: list[str] = []  # the paths that Bottle's router was asked for
        bottles: list[Any] = []
        route = Bottle.wsgi

        def make_bottle() -> Any:
            bottles.append(Bottle())
            return bottles[0]

        def record(bottle: Any, environ: Any, start_response: Any) -> Any:
            self.routed.append(environ["PATH_INFO"])
            return route(bottle, environ, start_response)

        monkeypatch.setattr(Bottle, "wsgi", record)
        monkeypatch.setattr(authsvc, "Bottle", make_bottle)
        self.call = Client(authsvc.create_app(settings, auth))
        self.bottle = bottles[0]
        self.call_bottle = Client(SecurityMiddleware(self.bottle, settings))


@pytest.fixture
def routers(monkeypatch: pytest.MonkeyPatch, settings: Settings, auth: Auth) -> Routers:
    return Routers(monkeypatch, settings, auth)


def comparable(answer: Answer) -> tuple[int, dict[str, str], str]:
    """Return an answer without its random ids."""
    made = f"{UUID4}|[A-Za-z0-9_-]{{96}}|(?<=challenge=)[A-Za-z0-9_-]{{22}}"
    headers = {name: re.sub(made, "id", value) for name, value in answer.headers.items() if name != "X-Request-Id"}
    return answer.status, headers, re.sub(f"{made}|[0-9a-f]{{16}}", "id", answer.body.decode())


def test_bottle_knows_exactly_the_routes_of_the_table(routers: Routers) -> None:
    known = [(route.method, route.rule) for route in routers.bottle.routes]
    assert sorted(known) == sorted((method, path) for method, path, *_ in authsvc.ROUTES)
    assert len(set(known)) == len(known)


@pytest.mark.parametrize(("method", "path"), [route[:2] for route in authsvc.ROUTES if "<" not in route[1]])
def test_a_fixed_path_is_answered_directly_and_as_bottle_does(routers: Routers, method: str, path: str) -> None:
    register(routers.call)
    for signed_in in (False, True):
        answers = []
        for call in (routers.call, routers.call_bottle):
            cookie = cookie_of(log_in(routers.call)) if signed_in else None
            routers.routed.clear()
            answers.append(call(method, path, cookie=cookie))
            assert routers.routed == ([] if call is routers.call else [path])
        assert comparable(answers[0]) == comparable(answers[1])


def test_a_form_gets_the_same_answers_directly_and_through_bottle(routers: Routers) -> None:
    told = []
    for call in (routers.call, routers.call_bottle):  # the second one can register again: the account is deleted
        answers = [call("POST", "/users", BOB), call("POST", "/users", BOB), call("POST", "/sessions", BOB)]
        answers.append(call("DELETE", "/profile", BOB, cookie=cookie_of(answers[-1])))
        told.append([comparable(answer) for answer in answers])
    assert told[0] == told[1]
    assert [status for status, *_ in told[0]] == [200, 400, 200, 200]
    assert routers.routed == ["/users", "/users", "/sessions", "/profile"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("DELETE", "/sessions/0123456789abcdef", 403),
        ("HEAD", "/", 200),
        ("GET", "/nowhere", 404),
        ("PATCH", "/users", 405),
    ],
)
def test_every_other_request_goes_through_bottle(routers: Routers, method: str, path: str, status: int) -> None:
    assert routers.call(method, path).status == status
    assert routers.routed == [path]


def test_every_route_is_open_or_needs_a_session() -> None:
    parts = {"<public_id>": "0123456789abcdef", "<token_id>": "1", "<passkey_id>": "1"}
    routes = [(method, re.sub("<.*>", lambda found: parts[found[0]], path)) for method, path, *_ in authsvc.ROUTES]
    account_page = ("GET", "/account")  # without a session it redirects to the sign-in page
    assert sorted([*OPEN_ROUTES, *SESSION_ROUTES, *JSON_ROUTES, account_page]) == sorted(routes)


@each(("method", "path"), SESSION_ROUTES)
@each("cookie", [None, "", "session_id=", "session_id=00000000-0000-4000-8000-000000000000"])
def test_without_a_session_it_is_refused(shared: SharedApp, method: str, path: str, cookie: str | None) -> None:
    assert shared.refuses(403, method, path, shared.form, cookie=cookie) == "not logged in"


@pytest.mark.parametrize(("method", "path"), [*OPEN_ROUTES, *SESSION_ROUTES, ("GET", "/account"), ("GET", "/nowhere")])
@pytest.mark.parametrize("signed_in", [False, True])
def test_every_answer_states_its_type_and_text_its_charset(
    call: Client, method: str, path: str, signed_in: bool
) -> None:
    register(call)
    answer = call(method, path, cookie=cookie_of(log_in(call)) if signed_in else None)
    if path in PAGES and answer.status == 200:
        assert answer.headers["Content-Type"].endswith("; charset=utf-8")
        assert answer.body.decode()
    else:
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.body.isascii()
        assert answer.json


# Paths and methods that no route has


@each(
    "path",
    [
        *("/nowhere", "/users/", "/users/1", "/Users", "/profile/..", "/authsvc.db"),
        *("/sessions/", "/sessions//", "/sessions/others/", "/sessions/a/b", "/password/", "/totp/1", "/tokens/"),
        *("/verify/", "/verify/login", "/Verify", "/health/", "/login/", "/Login", "/login.html", "/index.html"),
        *("/pages", "/pages/", "/pages/nothing", "/pages/index.html", "/pages/login", "/pages/Style.css"),
        *("/pages/style.css/", "/pages/../authsvc.py", "/pages//style.css", "/pages/.", "/pages/..", "/style.css"),
    ],
)
def test_another_path_is_not_found(shared: SharedApp, path: str) -> None:
    assert shared.refuses(404, "GET", path) == "not found"


@each(
    ("path", "allowed"),
    [
        ("/", {"GET"}),
        ("/users", {"POST", "PUT"}),
        ("/sessions", {"GET", "POST", "DELETE"}),
        ("/sessions/others", {"DELETE"}),
        ("/sessions/all", {"DELETE"}),
        ("/sessions/0123456789abcdef", {"DELETE"}),
        ("/profile", {"GET", "DELETE"}),
        ("/password", {"PUT"}),
        ("/tokens", {"GET", "POST"}),
        ("/tokens/1", {"DELETE"}),
        ("/totp", {"POST", "PUT", "DELETE"}),
        ("/reset_password", {"POST", "PUT"}),
        *((path, {"GET"}) for path in ("/verify", "/health", *PAGES)),
    ],
)
def test_another_method_is_not_allowed(shared: SharedApp, path: str, allowed: set[str]) -> None:
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"} - allowed:
        assert shared.refuses(405, method, path) == "method not allowed"
        assert set(shared.call(method, path).headers["Allow"].split(",")) - {"HEAD"} == allowed


@each(
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
@each("signed_in", [True, False])
def test_head_answers_as_get_without_a_body(
    shared: SharedApp, path: str, statuses: tuple[int, int], signed_in: bool
) -> None:
    cookie = shared.cookie if signed_in else None
    got, headed = (shared.call(method, path, cookie=cookie) for method in ("GET", "HEAD"))
    assert (headed.status, headed.body) == (statuses[not signed_in], b"")
    assert int(headed.headers["Content-Length"]) == len(got.body) > 0
    for answer in (got, headed):
        del answer.headers["X-Request-Id"]
    assert headed.headers == got.headers


@pytest.mark.parametrize(
    "rest", [{"body": b"\xff", "content_type": "text/plain"}, as_json("["), {"body": b"a" * 20_000}]
)
def test_path_and_method_are_refused_before_the_body(shared: SharedApp, rest: dict[str, Any]) -> None:
    shared.refuses(404, "POST", "/nowhere", **rest)
    shared.refuses(405, "PATCH", "/users", **rest)


# Refusals of the rules and of the storage


def subclasses(kind: type[AuthError]) -> set[type[AuthError]]:
    return {found for child in kind.__subclasses__() for found in (child, *subclasses(child))}


@pytest.mark.parametrize("kind", sorted(subclasses(AuthError), key=str))
def test_every_refusal_of_the_rules_is_answered_with_its_status_and_logged(
    call: Client, auth: Auth, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[AuthError]
) -> None:
    def refuse() -> None:
        raise kind

    monkeypatch.setattr(auth, "check_storage", refuse)
    answer = call("GET", "/health")
    assert (answer.status, answer.json) == (kind.status, {"message": kind.message})
    assert 400 <= answer.status < 500
    assert [line["event"] for line in events(capsys)] == ([kind.event] if kind.event else [])
    assert ("Retry-After" in answer.headers) == (answer.status == 429)


def test_a_locked_database_is_503_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.02)
    with closing(DB(settings.database)) as db:
        call = Client(authsvc.create_app(settings, Auth(db, settings)))
        with raw_connection(settings.database) as other:
            other.execute("BEGIN EXCLUSIVE")
            answer = call("POST", "/users", BOB)
        assert (answer.status, answer.json) == (503, {"message": "storage unavailable, try again later"})
        assert (answer.headers["Content-Type"], answer.headers["Retry-After"]) == ("application/json", "5")
        (line,) = events(capsys)
        assert (line["event"], line["request_id"]) == ("sys_storage_unavailable", answer.headers["X-Request-Id"])
        assert call("POST", "/users", BOB).status == 200


# Health


@pytest.mark.both_engines
def test_health_is_ok_while_the_database_answers(call: Client, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("/health", "/health?verbose=1"):
        answer = call("GET", path, cookie="session_id=x")
        assert_200(answer, {"message": "ok"})
        assert "Set-Cookie" not in answer.headers
    assert capsys.readouterr().err == ""


def replace_database(settings: Settings, by: str) -> Callable[[], object]:
    """Move the database file away so that no new connection can be opened; return a function that puts it back."""
    path = Path(settings.database)
    kept = path.with_name("kept")
    path.rename(kept)
    if by == "a folder":
        path.mkdir()

    def put_back() -> None:
        if by == "a folder":
            path.rmdir()
        kept.replace(path)

    return put_back


@pytest.mark.parametrize("by", ["nothing", "a folder"])
def test_a_database_that_does_not_answer_is_503(
    call: Client, settings: Settings, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    def answer_to(path: str) -> Answer:  # on a new thread, which opens its own connection
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call, "GET", path, cookie="session_id=0").result()

    put_back = replace_database(settings, by)
    for path in ("/health", "/verify", "/verify?login=1"):
        answer = answer_to(path)
        assert (answer.status, answer.json) == (503, {"message": "storage unavailable, try again later"})
        assert (answer.headers["Content-Type"], answer.headers["Retry-After"]) == ("application/json", "5")
        assert not {"Remote-User", "Location"} & answer.headers.keys()
        assert "authsvc.db" not in f"{answer.headers}{answer.body!r}"
        line = json.loads(capsys.readouterr().err)
        assert (line["event"], line["request_id"]) == ("sys_storage_unavailable", answer.headers["X-Request-Id"])
    put_back()
    assert_200(answer_to("/health"), {"message": "ok"})
    assert answer_to("/verify").status == 401


def test_a_database_that_another_program_writes_to_is_healthy(call: Client, settings: Settings) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    with raw_connection(settings.database) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert call("GET", "/health").status == 200
        assert_200(call("GET", "/verify", cookie=cookie), {"email": "bob@x.io"})


# Pages


def test_the_account_page_needs_a_session(shared: SharedApp) -> None:
    assert shared.call("GET", "/account", cookie=shared.cookie).status == 200
    for path in ("/account", "/account?return=https://evil.example/"):
        for cookie in (None, "session_id=x", f"x{shared.cookie}"):
            answer = shared.call("GET", path, cookie=cookie, HTTP_HOST="evil.example")
            assert (answer.status, answer.headers["Location"]) == (302, "/login")


@each(("path", "kind"), PAGES.items())
@each("rest", [{}, {"HTTP_ACCEPT": "application/json"}, {"form": BOB}, {"HTTP_HOST": "evil.example"}])
def test_a_page_is_the_same_for_every_client(shared: SharedApp, path: str, kind: str, rest: dict[str, Any]) -> None:
    first, *others = (
        shared.call("GET", f"{path}{query}", cookie=cookie, **rest)
        for query in ("", "?return=https://evil.example/&domain=evil.example", "?v=1")
        for cookie in (None, shared.cookie)
        if cookie or path != "/account"
    )
    assert first.headers["Content-Type"] == kind
    assert first.headers["Content-Length"] == str(len(first.body))
    for answer in (first, *others):
        assert (answer.status, answer.body) == (200, first.body)
        assert "Set-Cookie" not in answer.headers
        assert b"evil" not in answer.body
        assert "evil" not in str(answer.headers)


@each("path", [path for path, kind in PAGES.items() if kind == HTML])
def test_each_page_names_itself_and_has_its_section(shared: SharedApp, path: str) -> None:
    text = shared.call("GET", path, cookie=shared.cookie).body.decode()
    settings = 'data-domain="" data-confirm="off" data-passkeys="localhost" data-registration="open" data-mail="on"'
    assert f'<body data-page="{path[1:]}" {settings} data-minimum="1">' in text
    assert f'<section id="{path[1:]}">' in text


def test_a_page_loads_only_the_files_that_are_served(shared: SharedApp) -> None:
    text = shared.call("GET", "/login").body.decode()
    loaded = set(re.findall(r'(?:src|<link[^>]* href)="([^"]*)"', text))
    assert loaded == {path for path in PAGES if path.startswith("/pages/")} | {"data:,"}
    assert not re.search(r"<style|<script(?! src=)| style=| on[a-z]+=", text)  # its policy would block these


@each("path", PAGES)
def test_a_page_carries_the_headers_with_a_policy_of_its_own(shared: SharedApp, path: str) -> None:
    headers = shared.call("GET", path, cookie=shared.cookie).headers
    own = {"Content-Security-Policy": PAGE_POLICY[1], "Vary": "Accept-Language, Cookie, Authorization"}
    assert headers == headers | dict(SECURITY_HEADERS) | own


def test_a_password_field_is_masked_and_open_to_password_managers(shared: SharedApp) -> None:
    paths = [path for path, kind in PAGES.items() if kind == HTML]
    text = "".join(shared.call("GET", path, cookie=shared.cookie).body.decode() for path in paths)
    fields = {field for field in re.findall("<input[^>]*>", text) if "password" in field and "otp" not in field}
    assert len(fields) == 6  # that of the forms that ask for the password again is in a template
    for field in fields:
        assert ' type="password"' in field
        assert re.search(' autocomplete="(current|new)-password"', field)
    assert 'autocomplete="off"' not in text
    script = shared.call("GET", "/pages/script.js").body.decode()  # it does not stop pasting
    events = {"beforeunload", "blur", "change", "click", "hashchange", "pagehide", "pageshow", "submit"}
    assert set(re.findall(r'addEventListener\("(\w+)"', script)) == events
    assert not re.search(r"\.on[a-z]+ *=", script)


def test_the_script_makes_no_markup_and_no_code_and_changes_no_prototype(shared: SharedApp) -> None:
    script = shared.call("GET", "/pages/script.js").body.decode()
    assert script.startswith('"use strict";\n')
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|createContextualFragment|DOMParser", script)
    assert not re.search(
        r"\beval\b|\bFunction\b|\bimport\b|setTimeout\((?!offerInField,)|setInterval|javascript:", script
    )
    # Only the script names the properties that it sets. Those of a spread object change no prototype.
    assert not re.search(r"[\w)\]]\[[^\]]*\] *=[^=>]|__proto__|prototype|Object\.(assign|set)", script)
    assert not re.search(r"window\.|globalThis|^(var|let) ", script, re.MULTILINE)
    assert not re.search("<(object|embed|applet|iframe|base|frame)", shared.call("GET", "/login").body.decode())


def test_the_policy_of_a_page_allows_only_what_the_page_needs() -> None:
    policy = dict(part.split(" ", 1) for part in PAGE_POLICY[1].split("; "))
    own = {"script-src": "'self'", "style-src": "'self'", "connect-src": "'self'", "img-src": "data:"}
    none = dict.fromkeys(("default-src", "frame-ancestors", "base-uri", "form-action"), "'none'")
    assert policy == own | none


HTML_FIRST = ["text/html", "text/html,application/xhtml+xml,*/*;q=0.8", " TEXT/HTML ;q=0.9, */*"]
NOT_HTML_FIRST = ["", "*/*", "application/json", "application/json, text/html", "text/html5", "text/*"]


@pytest.mark.parametrize("accept", HTML_FIRST + NOT_HTML_FIRST)
def test_the_welcome_is_json_for_every_client_in_development(call: Client, accept: str) -> None:
    assert_200(call("GET", "/", HTTP_ACCEPT=accept), {"message": "Bienvenue"})


@pytest.mark.parametrize("accept", HTML_FIRST + NOT_HTML_FIRST)
def test_in_production_the_welcome_leads_a_browser_to_the_account_page(tmp_path: Path, accept: str) -> None:
    settings = Settings(database=str(tmp_path / "db"), public_url="https://auth.example.com", bcrypt_cost=10)
    answer = Client(authsvc.create_app(settings))("GET", "/", HTTP_ACCEPT=accept)
    assert answer.headers["Vary"] == "Accept, Cookie, Authorization"
    assert answer.json == {"message": "Bienvenue"}
    assert (answer.status, answer.headers.get("Location")) == (
        (302, "/account") if accept in HTML_FIRST else (200, None)
    )


def test_hashing_routes_have_a_fixed_path_and_are_no_get() -> None:
    # The server looks them up by path; GET and HEAD run on the I/O thread.
    assert [(method, path) for method, path in authsvc.HASHING_ROUTES if "<" in path or method in ("GET", "HEAD")] == []
