"""The routes of two-factor authentication: set it up, sign in with a code, turn it off; limits on guesses."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

import authsvc
from auth import Auth
from credentials import totp
from settings import Settings
from storage import DB
from tests.conftest import Client, Clock
from tests.routes import (
    BOB,
    SESSION_ROUTES,
    TotpUser,
    assert_200,
    assert_new_id,
    cookie_of,
    events,
    log_in,
    profile_status,
    public_id_of,
    register,
    reset_token,
)


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


@pytest.fixture
def bob(call: Client, clock: Clock) -> TotpUser:
    """Bob, who has two-factor authentication on."""
    bob = TotpUser(call, clock)
    bob.begin()
    bob.confirm()
    return bob


@pytest.mark.usefixtures("qr_codes")
@pytest.mark.both_engines
def test_setting_up_a_second_factor_ends_other_sessions(call: Client, clock: Clock) -> None:
    bob = TotpUser(call, clock)
    old, answer = cookie_of(bob.log_in()), bob.begin()
    uri = f"otpauth://totp/authsvc%3Abob@x.io?secret={bob.seed}&issuer=authsvc"
    assert re.fullmatch("[A-Z2-7]{32}", bob.seed)
    assert answer.json["qr"].startswith("data:image/svg+xml")
    assert_200(answer, {"secret": bob.seed, "uri": uri, "qr": totp.qr_code(uri)})
    assert_new_id(call, answer, bob.former)
    assert profile_status(call, old) == 200
    other = cookie_of(bob.log_in())  # no code is needed until the seed is confirmed
    old = bob.cookie
    answer = bob.confirm()
    assert_200(answer, {"message": "second factor on", "recovery_codes": answer.json["recovery_codes"]})
    assert_new_id(call, answer, old)
    assert profile_status(call, other) == 403
    assert len(set(bob.recovery_codes)) == 10
    assert all(re.fullmatch("([a-z2-7]{4}-){6}[a-z2-7]{2}", code) for code in bob.recovery_codes)


def test_without_segno_there_is_no_qr_code(call: Client, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    assert TotpUser(call, clock).begin().json.keys() == {"secret", "uri"}


def test_a_new_seed_replaces_the_unconfirmed_one(call: Client, clock: Clock) -> None:
    bob = TotpUser(call, clock)
    bob.begin()
    old = bob.code()
    bob.begin()
    answer = call("PUT", "/totp", {"otp": old}, cookie=bob.cookie)
    assert (answer.status, answer.json) == (403, {"message": "wrong one-time code"})
    assert bob.confirm().status == 200


@pytest.mark.both_engines
def test_a_login_needs_a_code_after_the_right_password(bob: TotpUser) -> None:
    for otp in (None, ""):
        answer = bob.log_in(otp)
        assert (answer.status, answer.json) == (401, {"message": "one-time code required"})
        assert "Set-Cookie" not in answer.headers
    wrong = bob.log_in(f"{(int(bob.code()) + 1) % 10**6:06}")
    assert (wrong.status, wrong.json) == (401, {"message": "wrong one-time code"})
    assert "Set-Cookie" not in wrong.headers
    answers = [bob.log_in(code) for code in [bob.code()] * 2]
    assert [answer.status for answer in answers] == [200, 401]
    assert_200(answers[0], {"email": "bob@x.io", "message": "logged in"})
    assert profile_status(bob.call, cookie_of(answers[0])) == 200
    assert log_in(bob.call, "eve@x.io").status == 200  # Eve has no second factor


def test_a_login_logs_which_factors_were_shown(bob: TotpUser, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for otp in (None, bob.code(), bob.recovery_codes[0]):
        bob.log_in(otp)
    log_in(bob.call, "eve@x.io")
    assert [(line["event"], line["user_id"], line.get("factors")) for line in events(capsys)] == [
        ("authn_code_required", 1, None),
        ("authn_login_success", 1, "password+totp"),
        ("authn_login_success", 1, "password+recovery_code"),
        ("authn_login_success", 2, "password"),
    ]


@pytest.mark.parametrize("email", ["bob@x.io", "eve@x.io", "nobody@x.io"])
def test_a_wrong_password_does_not_reveal_a_second_factor(bob: TotpUser, email: str) -> None:
    for otp in ({}, {"otp": ""}, {"otp": "000000"}, {"otp": bob.code()}, {"otp": bob.recovery_codes[0]}):
        answer = bob.call("POST", "/sessions", {"email": email, "password": "wrong", **otp})
        assert (answer.status, answer.json) == (401, {"message": "wrong email or password"})
    assert bob.log_in(bob.recovery_codes[0]).status == 200  # the refused logins spent no recovery code


@pytest.mark.both_engines
def test_a_recovery_code_works_once_in_each_spelling(bob: TotpUser) -> None:
    spellings: list[Callable[[str], str]] = [
        str,
        str.upper,
        lambda code: code.replace("-", ""),
        lambda code: f" {code.replace('-', ' ')} ",
    ]
    for code, spell in zip(bob.recovery_codes, spellings, strict=False):
        assert [bob.log_in(spell(code)).status for _ in range(2)] == [200, 401]
        bob.clock.advance(900)


def test_a_repeated_code_field_is_refused_and_spends_nothing(bob: TotpUser) -> None:
    code = bob.code()
    for pair in ((code, code), (code, ""), ("", code), (code, "other")):
        answer = bob.call("POST", "/sessions", [*BOB.items(), *(("otp", otp) for otp in pair)])
        assert (answer.status, answer.json) == (400, {"message": "otp is given more than once"})
    assert bob.log_in(code).status == 200


def test_a_client_cannot_name_the_time_of_a_code(bob: TotpUser) -> None:
    bob.clock.advance(600)
    past = int(bob.clock()) - 300
    form = {**BOB, "otp": totp.code(bob.seed, past // totp.STEP), "time": str(past), "now": str(past)}
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(past))
    assert bob.call("POST", "/sessions", form, HTTP_DATE=date, HTTP_X_TIMESTAMP=str(past)).status == 401
    assert bob.log_in(bob.code()).status == 200


@pytest.mark.both_engines
def test_turning_the_second_factor_off_ends_other_sessions(bob: TotpUser) -> None:
    other = cookie_of(bob.log_in(bob.code()))
    form = {"password": "b4l0u", "otp": bob.code()}
    answer = bob.call("DELETE", "/totp", form, cookie=bob.cookie)
    assert_200(answer, {"message": "second factor off"})
    assert_new_id(bob.call, answer, bob.cookie)
    assert profile_status(bob.call, other) == 403
    assert bob.log_in().status == 200
    old_codes = bob.recovery_codes
    bob.begin()
    bob.confirm()
    assert bob.log_in(old_codes[0]).status == 401


def test_a_recovery_code_turns_the_second_factor_off(bob: TotpUser) -> None:
    form = {"password": "b4l0u", "otp": bob.recovery_codes[9]}
    assert bob.call("DELETE", "/totp", form, cookie=bob.cookie).status == 200
    assert bob.log_in().status == 200


def test_a_refused_change_of_the_second_factor_spends_no_code(bob: TotpUser) -> None:
    eves = cookie_of(log_in(bob.call, "eve@x.io"))
    password, wrong, code = {"password": "b4l0u"}, {"password": "wrong"}, {"otp": bob.code()}
    for status, message, method, form, cookie in [
        (400, "a second factor is on already", "POST", password, bob.cookie),
        (400, "a second factor is on already", "POST", wrong, bob.cookie),
        (403, "wrong password", "POST", wrong, eves),
        (400, "no second factor is being set up", "PUT", code, bob.cookie),
        (400, "no second factor is being set up", "PUT", code, eves),
        (400, "no second factor is on", "DELETE", password | code, eves),
        (403, "wrong password", "DELETE", wrong | code, bob.cookie),
        (403, "wrong one-time code", "DELETE", password | {"otp": "wrong"}, bob.cookie),
    ]:
        answer = bob.call(method, "/totp", form, cookie=cookie)
        assert (answer.status, answer.json) == (status, {"message": message})
        assert "Set-Cookie" not in answer.headers
    assert bob.log_in().status == 401
    assert bob.log_in(code["otp"]).status == 200


@pytest.mark.both_engines
def test_a_password_reset_leaves_the_second_factor_on(bob: TotpUser) -> None:
    form = {"email": "bob@x.io", "reset_token": reset_token(bob.call), "new_password": "b4l0u"}
    assert bob.call("PUT", "/reset_password", form).status == 200
    assert (bob.log_in().status, bob.log_in(bob.code()).status) == (401, 200)


def test_where_a_second_factor_is_required_a_session_can_only_set_it_up(
    db: DB, settings: Settings, clock: Clock
) -> None:
    settings = replace(settings, require_second_factor=True)
    bob = TotpUser(Client(authsvc.create_app(settings, Auth(db, settings, clock))), clock)
    register(bob.call)
    bob.begin()
    other = cookie_of(bob.log_in())
    form = {"password": "b4l0u", "new_password": "t4rt1fl3tt3", "otp": bob.code()}
    form |= {"email": "bob@y.io", "new_email": "bob@y.io", "token": "t", "name": "git"}
    setting_up = {("POST", "/totp"), ("PUT", "/totp"), ("POST", "/passkeys/options")}
    refused = set(SESSION_ROUTES) - {("DELETE", "/sessions")} - setting_up
    for method, path in [*refused, ("DELETE", f"/sessions/{public_id_of(other)}")]:
        answer = bob.call(method, path, form, cookie=bob.cookie)
        assert (answer.status, answer.json) == (403, {"message": "set up a second factor first"})
        assert "Set-Cookie" not in answer.headers
    assert bob.call("DELETE", "/sessions", cookie=other).status == 302
    bob.confirm()
    assert profile_status(bob.call, bob.cookie) == 200
    assert bob.call("PUT", "/password", form, cookie=bob.cookie).status == 200


def test_the_list_of_sessions_says_whether_a_second_factor_is_on(call: Client, clock: Clock) -> None:
    bob = TotpUser(call, clock)

    def is_on(cookie: str) -> bool:
        on: bool = call("GET", "/sessions", cookie=cookie).json["second_factor"]
        return on

    eves = cookie_of(log_in(call, "eve@x.io"))
    bob.begin()
    assert is_on(bob.cookie) is False  # the seed is not confirmed yet
    bob.confirm()
    assert (is_on(bob.cookie), is_on(eves)) == (True, False)
    off = call("DELETE", "/totp", {"password": "b4l0u", "otp": bob.code()}, cookie=bob.cookie)
    assert is_on(cookie_of(off)) is False


# Limits


@pytest.mark.parametrize(
    ("method", "path", "form", "limit"),
    [
        ("DELETE", "/profile", {"password": "wrong"}, 10),
        ("PUT", "/password", {"password": "wrong", "new_password": "t4rt1fl3tt3"}, 10),
        ("DELETE", "/totp", {"password": "wrong", "otp": "wrong"}, 10),
        ("DELETE", "/totp", {"password": "b4l0u", "otp": "000000"}, 5),
        ("POST", "/sessions", {**BOB, "otp": "000000"}, 5),
    ],
)
def test_guesses_are_limited(bob: TotpUser, method: str, path: str, form: dict[str, str], limit: int) -> None:
    answers = [bob.call(method, path, form, cookie=bob.cookie, REMOTE_ADDR="127.0.0.1") for _ in range(limit + 2)]
    refused = 401 if path == "/sessions" else 403
    assert [answer.status for answer in answers] == [refused] * limit + [429] * 2
    for answer in answers[limit:]:
        assert answer.json == {"message": "too many requests"}
        assert 1 <= int(answer.headers["Retry-After"]) <= 3600
        assert "Set-Cookie" not in answer.headers


def test_guesses_at_the_first_code_are_limited(call: Client, clock: Clock) -> None:
    bob = TotpUser(call, clock)
    bob.begin()
    answers = [call("PUT", "/totp", {"otp": "wrong"}, cookie=bob.cookie, REMOTE_ADDR="127.0.0.1") for _ in range(7)]
    assert [answer.status for answer in answers] == [403] * 5 + [429] * 2
