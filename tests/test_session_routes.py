"""The routes of the sessions of a user: list them, end one, all others, or all."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from dataclasses import replace
from typing import Any

import pytest

from auth import Auth
from authsvc import create_app
from engines.errors import StorageUnavailable
from settings import Settings
from storage import User
from tests.conftest import Client, Clock
from tests.routes import COOKIE_ATTRIBUTES, assert_200, cookie_of, log_in, profile_status, public_id_of, register


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A user may have three sessions."""
    return replace(settings, sessions_per_user=3)


@pytest.fixture
def call(call: Client) -> Client:
    """The application with the accounts of Bob and Eve."""
    register(call)
    register(call, "eve@x.io")
    return call


@pytest.mark.both_engines
def test_sessions_are_listed(call: Client, clock: Clock) -> None:
    first = cookie_of(log_in(call, REMOTE_ADDR="127.0.0.1", HTTP_USER_AGENT="one"))
    cookie_of(log_in(call, "eve@x.io", REMOTE_ADDR="127.0.0.3", HTTP_USER_AGENT="eve"))
    clock.advance(3600)
    second = cookie_of(log_in(call, REMOTE_ADDR="::1"))
    assert profile_status(call, first) == 200
    shared = {"last_seen": "2027-01-15T09:00:00Z", "expires": "2027-01-22T09:00:00Z"}
    newest = {"id": public_id_of(second), "created": "2027-01-15T09:00:00Z", "address": "::1", "user_agent": ""}
    oldest = {"id": public_id_of(first), "created": "2027-01-15T08:00:00Z", "address": "127.0.0.1", "user_agent": "one"}
    for cookie in (first, second):
        answer = call("GET", "/sessions", cookie=cookie)
        sessions = [{**newest, **shared, "current": cookie == second}, {**oldest, **shared, "current": cookie == first}]
        assert_200(answer, {"email": "bob@x.io", "second_factor": False, "sessions": sessions})
        assert "Set-Cookie" not in answer.headers


@pytest.mark.both_engines
def test_a_user_agent_is_listed_as_text_to_its_own_user_only(call: Client) -> None:
    eves = cookie_of(log_in(call, "eve@x.io"))
    cookie = None
    for agent in (
        '"',
        "\\",
        "a\0b",
        "a\x1b[2J",
        "</script><script>",
        "é\x85\xff",
        "{0}%s",
        "a" * 300,
        'x", "current": true, "y": "',
    ):
        cookie = cookie_of(log_in(call, cookie=cookie, HTTP_USER_AGENT=agent))  # it replaces the former session
        bobs_list, eves_list = (call("GET", "/sessions", cookie=one) for one in (cookie, eves))
        assert [session["user_agent"] for session in bobs_list.json["sessions"]] == [agent.replace("\0", "")[:200]]
        assert [session["user_agent"] for session in eves_list.json["sessions"]] == [""]
        assert re.fullmatch(rb"[ -~]+", bobs_list.body)


def test_logging_in_reads_nothing_after_the_session_is_stored(
    call: Client, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = auth.log_in

    def start_and_lose_the_storage(*arguments: Any, **rest: Any) -> tuple[User, str, str]:
        started = start(*arguments, **rest)
        for name in "read", "read_all":
            monkeypatch.setattr(auth._db._engine, name, unavailable)
        return started

    def unavailable(*_: object) -> None:
        raise StorageUnavailable("gone")

    monkeypatch.setattr(auth, "log_in", start_and_lose_the_storage)
    answer = log_in(call)
    assert (answer.status, bool(answer.session_id)) == (200, True)  # otherwise nobody would hold the new session
    assert call("GET", "/sessions", cookie=cookie_of(answer)).status == 503


def test_a_session_that_ends_before_its_answer_is_still_answered(
    call: Client, auth: Auth, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = auth.log_in

    def start_and_be_replaced(*arguments: Any, **rest: Any) -> tuple[User, str, str]:
        started = start(*arguments, **rest)
        for _ in range(settings.sessions_per_user):
            start(*arguments, **rest)
        return started

    monkeypatch.setattr(auth, "log_in", start_and_be_replaced)
    answer = log_in(call)
    assert_200(answer, {"email": "bob@x.io", "message": "logged in"})
    assert profile_status(call, cookie_of(answer)) == 403


@pytest.mark.both_engines
def test_a_user_ends_one_of_their_sessions(call: Client) -> None:
    mine, other, third = (cookie_of(log_in(call)) for _ in range(3))
    eves = cookie_of(log_in(call, "eve@x.io"))
    answer = call("DELETE", f"/sessions/{public_id_of(other)}", cookie=mine)
    assert_200(answer, {"message": "session ended"})
    assert "Set-Cookie" not in answer.headers
    assert [profile_status(call, cookie) for cookie in (mine, other, third, eves)] == [200, 403, 200, 200]


def test_ending_the_current_session_deletes_its_cookie(call: Client) -> None:
    mine, other = (cookie_of(log_in(call)) for _ in range(2))
    answer = call("DELETE", f"/sessions/{public_id_of(mine)}", cookie=mine)
    assert_200(answer, {"message": "session ended"})
    assert answer.headers["Set-Cookie"] == f"session_id=; {COOKIE_ATTRIBUTES}; Max-Age=0"
    assert [profile_status(call, cookie) for cookie in (mine, other)] == [403, 200]


@pytest.mark.both_engines
def test_all_other_sessions_end(call: Client) -> None:
    first, mine, last = (cookie_of(log_in(call)) for _ in range(3))
    eves = cookie_of(log_in(call, "eve@x.io"))
    for _ in range(2):  # the second time there are no others
        answer = call("DELETE", "/sessions/others", cookie=mine)
        assert_200(answer, {"message": "all other sessions ended"})
        assert "Set-Cookie" not in answer.headers
        assert [profile_status(call, cookie) for cookie in (first, mine, last, eves)] == [403, 200, 403, 200]


def test_where_no_other_session_ends_nothing_is_written(call: Client, other: sqlite3.Connection) -> None:
    mine = cookie_of(log_in(call))
    before = other.execute("PRAGMA data_version").fetchone()
    assert call("DELETE", "/sessions/others", cookie=mine).status == 200
    assert other.execute("PRAGMA data_version").fetchone() == before


@pytest.mark.both_engines
def test_all_sessions_end(call: Client) -> None:
    mine, other = (cookie_of(log_in(call)) for _ in range(2))
    eves = cookie_of(log_in(call, "eve@x.io"))
    answer = call("DELETE", "/sessions/all", cookie=mine)
    assert_200(answer, {"message": "all sessions ended"})
    assert answer.headers["Set-Cookie"] == f"session_id=; {COOKIE_ATTRIBUTES}; Max-Age=0"
    assert [profile_status(call, cookie) for cookie in (mine, other, eves)] == [403, 403, 200]
    assert call("DELETE", "/sessions/all", cookie=mine).status == 403


@pytest.mark.both_engines
def test_the_session_of_another_user_is_answered_as_an_unknown_one(call: Client) -> None:
    mine, ended = (cookie_of(log_in(call)) for _ in range(2))
    eves = cookie_of(log_in(call, "eve@x.io"))
    assert call("DELETE", "/sessions", cookie=ended).status == 302
    secret, public = mine.partition("=")[2], public_id_of(mine)
    similar = [public + "0", public[:15], f"{public} ", hashlib.sha256(secret.encode()).hexdigest()]
    answers = [
        call("DELETE", f"/sessions/{name}", cookie=mine)
        for name in ("0123456789abcdef", public_id_of(eves), public_id_of(ended), secret, "x" * 1000, "%", *similar)
    ]
    for answer in answers:
        assert (answer.status, answer.json) == (404, {"message": "no such session"})
        del answer.headers["X-Request-Id"]
        assert (answer.body, answer.headers) == (answers[0].body, answers[0].headers)
    assert [profile_status(call, cookie) for cookie in (mine, eves)] == [200, 200]


# Staying signed in


@pytest.mark.both_engines
def test_a_remembered_cookie_lasts_as_long_as_its_session(call: Client, clock: Clock) -> None:
    form = {"email": "bob@x.io", "password": "b4l0u"}
    plain, remembered = (call("POST", "/sessions", {**form, **more}) for more in ({}, {"remember": "1"}))
    assert re.fullmatch(f"session_id=[0-9a-f-]{{36}}; {COOKIE_ATTRIBUTES}", plain.headers["Set-Cookie"])
    assert re.fullmatch(
        f"session_id=[0-9a-f-]{{36}}; {COOKIE_ATTRIBUTES}; Max-Age=2592000", remembered.headers["Set-Cookie"]
    )
    clock.advance(600_000)
    change = {"password": "b4l0u", "new_password": "b4l0u"}
    renewed = call("PUT", "/password", change, cookie=cookie_of(remembered))
    assert renewed.headers["Set-Cookie"].endswith(f"; {COOKIE_ATTRIBUTES}; Max-Age=1992000")
    clock.advance(600_000)
    assert profile_status(call, cookie_of(renewed)) == 200
    for _ in range(3):
        clock.advance(464_000)
        status = profile_status(call, cookie_of(renewed))
    assert status == 403  # the cookie ends with the session, which the change has not prolonged


@pytest.mark.parametrize("value", ["", "0", "2", "on", "true", "1 ", "11", "\u0661"])
def test_remember_is_1_or_absent(call: Client, value: str) -> None:
    answer = call("POST", "/sessions", {"email": "bob@x.io", "password": "b4l0u", "remember": value})
    message = "remember must be 1" if value else "remember is empty"
    assert (answer.status, answer.json) == (400, {"message": message})
    assert "Set-Cookie" not in answer.headers


def test_remember_is_given_once(call: Client) -> None:
    pairs = [("email", "bob@x.io"), ("password", "b4l0u"), ("remember", "1"), ("remember", "1")]
    answer = call("POST", "/sessions", pairs)
    assert (answer.status, answer.json) == (400, {"message": "remember is given more than once"})


# Several cookies of one name, as after the domain of the cookie was changed, or where a neighbour host has set one


@pytest.mark.both_engines
def test_the_newest_live_session_of_several_cookies_counts(call: Client) -> None:
    old, new, ended = (cookie_of(log_in(call)) for _ in range(3))
    assert call("DELETE", "/sessions", cookie=ended).status == 302
    for cookies in (f"{old}; {new}", f"{new}; {old}", f"{ended}; {old}; {new}; {new}"):
        listed = call("GET", "/sessions", cookie=cookies).json["sessions"]
        assert [session["id"] for session in listed if session["current"]] == [public_id_of(new)]
        assert call("GET", "/verify", cookie=cookies).status == 200
    assert profile_status(call, f"{ended}; {old}") == 200


@pytest.mark.parametrize("planted", [1, 3])
def test_sessions_of_two_users_in_one_request_do_not_count(call: Client, planted: int) -> None:
    eves = [cookie_of(log_in(call, "eve@x.io")) for _ in range(planted)]
    bobs = cookie_of(log_in(call))
    for cookies in ([bobs, *eves], [*eves, bobs]):
        assert profile_status(call, "; ".join(cookies)) == 403
        assert call("GET", "/verify", cookie="; ".join(cookies)).status == 401
        assert call("DELETE", "/sessions", cookie="; ".join(cookies)).status == 403
        form = {"password": "b4l0u", "new_password": "t4rt1fl3tt3"}
        assert call("PUT", "/password", form, cookie="; ".join(cookies)).status == 403
    assert {profile_status(call, cookie) for cookie in (bobs, *eves)} == {200}


@pytest.mark.parametrize("planted", ["eve@x.io", "bob@x.io"])
def test_five_planted_cookies_are_no_session(database: str, planted: str) -> None:
    settings = Settings(database=database, bcrypt_cost=4, sessions_per_user=6)
    call = Client(create_app(settings))
    for email in ("bob@x.io", "eve@x.io"):
        register(call, email)
    cookies = [cookie_of(log_in(call, planted)) for _ in range(5)]
    assert profile_status(call, "; ".join(cookies[:4])) == 200
    assert profile_status(call, "; ".join(cookies)) == 403
    assert profile_status(call, "; ".join([cookie_of(log_in(call)), *cookies])) == 403


@pytest.mark.both_engines
def test_logging_out_ends_every_session_that_the_request_carries(call: Client) -> None:
    old, new, elsewhere = (cookie_of(log_in(call)) for _ in range(3))
    assert call("DELETE", "/sessions", cookie=f"{old}; {new}").status == 302
    assert [profile_status(call, cookie) for cookie in (old, new, elsewhere)] == [403, 403, 200]
