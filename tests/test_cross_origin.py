"""Requests from other origins: no page of another site can change anything with a user's cookie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import authsvc
from auth import UNCOUNTED, Auth
from settings import Settings
from tests.cases import each
from tests.conftest import COST, Client
from tests.production import (
    BOB,
    CLIENT,
    FORM,
    OTHER_ORIGIN,
    PASSWORD,
    PUBLIC_URL,
    ask,
    log_lines,
    production_settings,
    shared_site,
)

# Values of Sec-Fetch-Site. "none" means that the user typed the address.
CROSS_SITE, SAME_SITE, SAME_ORIGIN, BY_USER = "cross-site", "same-site", "same-origin", "none"


@pytest.fixture
def settings(database: str) -> Settings:
    return production_settings(database)


@pytest.fixture
def bob(auth: Auth) -> None:
    auth.register_user(BOB, PASSWORD)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with shared_site(tmp_path_factory.mktemp("site")) as call:
        yield call


@each("method", ["POST", "PUT", "DELETE", "PATCH"])
@each(
    ("fetch_site", "origin", "allowed"),
    [
        (None, None, True),  # curl and scripts
        (None, PUBLIC_URL, True),
        (None, OTHER_ORIGIN, False),
        (None, "null", False),
        (None, "", False),
        (None, f"{PUBLIC_URL}.evil.example", False),
        (None, f"{PUBLIC_URL}:444", False),
        (None, PUBLIC_URL.replace("https", "http"), False),
        (None, "http://localhost", False),  # in production the Host header does not count
        (SAME_ORIGIN, None, True),
        (SAME_ORIGIN, PUBLIC_URL, True),
        (BY_USER, None, True),
        (CROSS_SITE, None, False),
        (CROSS_SITE, OTHER_ORIGIN, False),
        (CROSS_SITE, "null", False),
        (CROSS_SITE, PUBLIC_URL, True),
        (SAME_SITE, None, False),
        (SAME_SITE, "https://www.example.com", False),
        (SAME_SITE, "null", False),
        ("", None, False),
        ("whatever", None, False),
    ],
)
def test_a_cross_origin_request_is_refused(
    site: Client, method: str, fetch_site: str | None, origin: str | None, allowed: bool
) -> None:
    path = {"POST": "/sessions", "DELETE": "/sessions"}.get(method, "/reset_password")
    headers: dict[str, Any] = {"HTTP_SEC_FETCH_SITE": fetch_site, "HTTP_ORIGIN": origin, "HTTP_HOST": "localhost"}
    answer = ask(site, method, path, FORM, **{name: value for name, value in headers.items() if value is not None})
    refusal = {"message": "cross-origin request refused"}
    assert (answer.json != refusal) == allowed
    if not allowed:
        assert answer.status == 403
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(("fetch_site", "origin"), [(CROSS_SITE, None), (SAME_SITE, OTHER_ORIGIN), (None, "null")])
@pytest.mark.usefixtures("bob")
def test_no_route_that_writes_accepts_a_cross_origin_request(
    call: Client, auth: Auth, fetch_site: str | None, origin: str | None
) -> None:
    session_id, token = auth.create_session(BOB), auth.get_reset_password_token(BOB)
    form = {**FORM, "new_password": "choucroute du lundi", "reset_token": token, "otp": "000000", "name": "git"}
    headers = {"HTTP_SEC_FETCH_SITE": fetch_site, "HTTP_ORIGIN": origin}
    _, (session,), _ = auth.list_sessions(session_id)
    user, created, _ = auth.create_token(session_id, PASSWORD, "git", caller=UNCOUNTED)
    for method, path, *_ in authsvc.ROUTES:
        if method == "GET":
            continue
        answer = ask(
            call,
            method,
            path.replace("<public_id>", session.id).replace("<token_id>", str(created.id)),
            form,
            cookie=f"__Host-session_id={session_id}",
            **{name: value for name, value in headers.items() if value is not None},
        )
        assert (answer.status, answer.json) == (403, {"message": "cross-origin request refused"})
        assert "Set-Cookie" not in answer.headers
    assert auth.list_sessions(session_id)[1] == [session]
    assert auth.tokens_of(user.id) == [created]
    assert auth.find_user(BOB).totp_secret is None
    assert auth.valid_login(BOB, PASSWORD)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:80", "http://localhost", 200),  # a proxy may add the default port
        ("LOCALHOST:5000", "http://localhost:5000", 200),
        ("localhost:5000", "http://localhost", 403),
        ("localhost", "http://localhost:5000", 403),
        ("localhost:80", "https://localhost", 403),
    ],
)
def test_a_development_service_compares_the_origin_with_its_host(
    tmp_path: Path, host: str, origin: str, status: int
) -> None:
    call = Client(authsvc.create_app(Settings(database=str(tmp_path / "authsvc.db"), bcrypt_cost=COST)))
    answer = call("POST", "/users", FORM, REMOTE_ADDR="127.0.0.1", HTTP_HOST=host, HTTP_ORIGIN=origin)
    assert answer.status == status


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_cross_origin_read_is_answered_without_cors_headers(site: Client, method: str) -> None:
    headers = {"HTTP_SEC_FETCH_SITE": CROSS_SITE, "HTTP_ORIGIN": OTHER_ORIGIN}
    answer = ask(site, method, "/", **headers)
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("Access-Control")]


def test_a_refused_cross_origin_request_is_logged(site: Client, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(site, "POST", "/sessions", FORM, HTTP_ORIGIN=OTHER_ORIGIN, REMOTE_ADDR=CLIENT)
    (line,) = log_lines(capsys.readouterr().err)
    assert (line["event"], line["address"]) == ("malicious_csrf", CLIENT)
    assert line["request_id"] == answer.headers["X-Request-Id"]
