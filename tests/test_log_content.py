"""The log: one line of JSON for an event, without a secret, and never more lines than its limit."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import log
from auth import Auth
from credentials import passwords, totp
from log import log_event
from settings import Settings
from tests.conftest import Answer, Client, Clock, rows_in
from tests.production import BOB, CLIENT, FORM, OTHER_ORIGIN, PASSWORD, ask, log_lines, production_settings


@pytest.fixture
def settings(database: str) -> Settings:
    return production_settings(database)


@pytest.fixture
def bob(auth: Auth) -> None:
    auth.register_user(BOB, PASSWORD)


SECRETS = ("canary-password", "canary-cookie", "canary-token", "canary-query")
ODD = "\r\n{'event': 1}\x1b[2J\u2028\x85\ud83d"
EVENTS = {
    "authn_code_required",
    "authn_factor_added",
    "authn_factor_removed",
    "authn_login_fail",
    "authn_token_created",
    "authn_token_fail",
    "authn_token_revoked",
    "authz_fail",
    "authz_verify_fail",
    "input_validation_fail",
    "authn_login_success",
    "authn_password_change",
    "excess_rate_limit_exceeded",
    "malicious_csrf",
    "session_ended",
    "sys_crash",
    "user_created",
    "user_deleted",
}


def use_a_session(call: Client, auth: Auth, clock: Clock, odd: str, environ: dict[str, Any]) -> list[str]:
    """Send every request that needs a session, valid and invalid ones; return the secrets that the service gave out."""
    account = {"email": "live@x.io", "password": "canary-password of an account"}
    new = "canary-password of the same account"
    ask(call, "POST", "/users", account, **environ)
    secrets: list[str] = []
    devices: dict[str, str] = {}

    def request(method: str, path: str, form: dict[str, Any]) -> Answer:
        cookies = {"__Host-session_id": secrets[-1] if secrets else "", "__Host-device": next(iter(devices), "")}
        cookie = "; ".join(f"{name}={value}" for name, value in cookies.items())
        answer = ask(call, method, path, form, cookie=cookie, **environ)
        if device := answer.cookies.get("__Host-device"):
            devices[device] = path
        if "=;" not in answer.headers.get("Set-Cookie", "=;"):
            secrets.append(answer.session_id)
        return answer

    def succeed(method: str, path: str, /, **form: Any) -> Any:
        answer = request(method, path, form)
        assert answer.status == 200, (method, path, answer.body)
        return answer.json

    def fail(method: str, path: str, /, **form: Any) -> None:
        assert 400 <= request(method, path, form).status < 500

    succeed("POST", "/sessions", **account)
    wrong = f"canary-password{odd}".encode("utf-8", "replace")
    for method, path in (("PUT", "/password"), ("POST", "/totp"), ("DELETE", "/profile")):
        fail(method, path, password=wrong, new_password=new)
        fail(method, path)
    succeed("PUT", "/password", password=account["password"], new_password=new)
    seed = succeed("POST", "/totp", password=new)["secret"]
    fail("PUT", "/totp", otp=f"canary-token{odd}".encode("utf-8", "replace"))
    clock.advance(totp.STEP)
    codes = succeed("PUT", "/totp", otp=totp.code(seed, int(clock()) // totp.STEP))["recovery_codes"]
    fail("POST", "/tokens", password=new, name=f"canary-token{odd}\n".encode("utf-8", "replace"))
    created = succeed("POST", "/tokens", password=new, name="git")
    for secret in (created["token"], "authsvc_canary-token"):
        ask(call, "GET", "/verify", HTTP_AUTHORIZATION=f"Bearer {secret}", **environ | {"QUERY_STRING": ""})
    succeed("DELETE", f"/tokens/{created['id']}")
    fail("POST", "/sessions", email="live@x.io", password=new)
    fail("POST", "/sessions", email="live@x.io", password=new, otp="canary-token")
    succeed("POST", "/sessions", email="live@x.io", password=new, otp=codes[0])
    fail("DELETE", "/totp", password=new, otp="canary-token")
    succeed("DELETE", "/totp", password=new, otp=codes[1])
    fail("DELETE", "/totp", password=new, otp=codes[2])
    fail("DELETE", "/sessions/canary-token")
    fail("DELETE", f"/sessions/{odd.encode('ascii', 'ignore').decode()}")
    succeed("GET", "/sessions")
    succeed("DELETE", "/sessions/others")
    succeed("DELETE", "/sessions/all")
    fail("GET", "/sessions")
    succeed("POST", "/sessions", email="live@x.io", password=new)
    succeed("DELETE", "/profile", password=new)
    assert set(devices.values()) >= {"/sessions", "/password", "/totp"}
    return [*secrets, *devices, *codes, *(code.replace("-", "") for code in codes), seed, created["token"]]


def use_every_route(call: Client, auth: Auth, clock: Clock, odd: str) -> list[str]:
    """Send valid and invalid requests to every route; return the secrets that the service gave out."""
    agent = f"agent{odd}".encode("utf-8", "replace").decode("latin-1")  # as a WSGI server decodes it
    environ: dict[str, Any] = {"HTTP_USER_AGENT": agent, "HTTP_REFERER": f"https://x/?{SECRETS[3]}"}
    environ |= {"QUERY_STRING": f"token={SECRETS[3]}", "REMOTE_ADDR": CLIENT}
    right = {"email": "walk@x.io", "password": "canary-password of the walk"}
    ask(call, "POST", "/users", right, **environ)
    ask(call, "POST", "/users", right, **environ)
    ask(call, "POST", "/users", {**right, "email": f"a{odd}@x".encode("utf-8", "replace")}, **environ)
    session_id = ask(call, "POST", "/sessions", right, **environ).session_id
    given_out = use_a_session(call, auth, clock, odd, environ)
    ask(call, "POST", "/sessions", {**right, "password": "canary-password wrong"}, **environ)
    ask(call, "POST", "/sessions", {**right, "email": f"a{odd}@x".encode("utf-8", "replace")}, **environ)
    paths = ("GET", "/profile"), ("GET", "/nowhere"), ("GET", "/verify"), ("PATCH", "/users"), ("DELETE", "/sessions")
    for method, path in paths:
        ask(call, method, path, cookie="__Host-session_id=canary-cookie", **environ)
        ask(call, method, path, cookie=f"__Host-session_id={session_id}", **environ)
    ask(call, "GET", "/verify", **environ | {"QUERY_STRING": f"group={SECRETS[3]}"})
    ask(call, "POST", "/reset_password", {"email": "walk@x.io"}, **environ)
    token = auth.get_reset_password_token("walk@x.io")
    change = {"email": "walk@x.io", "reset_token": "canary-token", "new_password": "canary-password the second"}
    ask(call, "PUT", "/reset_password", change, **environ)
    ask(call, "PUT", "/reset_password", {**change, "reset_token": token}, **environ)
    ask(call, "POST", "/sessions", right, HTTP_ORIGIN=f"https://evil/{SECRETS[3]}", **environ)
    ask(call, "POST", "/sessions", body=b"password=canary-password%ff", **environ)
    for _ in range(12):
        ask(call, "POST", "/sessions", right, **environ)
    return [session_id, token, *given_out]


@pytest.mark.both_engines
def test_the_log_is_ascii_json_and_holds_no_secret(
    call: Client,
    auth: Auth,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    database: str,
    tmp_path: Path,
) -> None:
    given_out = use_every_route(call, auth, clock, ODD)

    def crash(*values: object) -> bool:
        raise RuntimeError(f"{values}")

    monkeypatch.setattr(passwords, "verify", crash)
    form = {"email": "walk2@x.io", "password": "canary-password of a crash"}
    assert ask(call, "POST", "/sessions", form, REMOTE_ADDR="192.0.2.77").status == 500
    text = capsys.readouterr().err
    assert text.isascii()
    lines = log_lines(text)
    assert {line["event"] for line in lines} == EVENTS
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"]) for line in lines)
    assert all(line["request_id"] for line in lines)
    stored = rows_in(database) + b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in (*SECRETS, *given_out):
        assert secret not in text
        # Only the seed of a second factor is stored in plain text: the service needs it to check a code.
        assert secret.encode() not in stored or re.fullmatch("[A-Z2-7]{32}", secret)


@pytest.mark.both_engines
@pytest.mark.slow
def test_no_value_from_a_client_adds_a_line_to_the_log(
    call: Client, auth: Auth, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    use_every_route(call, auth, clock, ",")  # a comma makes the emails invalid, as ODD does
    plain = [line["event"] for line in log_lines(capsys.readouterr().err)]
    auth._db.update_user(1, email="before@x.io")
    assert auth._db.emails.release("live@x.io")  # its account was deleted
    clock.advance(86_400)
    use_every_route(call, auth, clock, ODD)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == text.count("\n")  # no other line separator
    assert [line["event"] for line in log_lines(text)] == plain


def test_a_failed_login_logs_the_user_id_or_a_tag_of_the_email(
    call: Client, bob: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for email in (BOB, "nobody@x.io", "NOBODY@x.io", "other@x.io"):
        ask(call, "POST", "/sessions", {"email": email, "password": "wrong"})
    known, *unknown = log_lines(capsys.readouterr().err)
    assert known["user_id"] == 1
    assert "unknown" not in known
    tags = [line["unknown"] for line in unknown]
    assert tags[0] == tags[1] != tags[2]
    assert all(re.fullmatch("[0-9a-f]{16}", tag) for tag in tags)


def test_a_flood_of_one_event_is_cut_off_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=clock))
    for n in range(1000):
        log_event("flood", n=n)
    log_event("other")
    clock.advance(log.FLOOD_WINDOW)
    log_event("flood", n=1000)
    log_event("flood", n=1001)
    lines = log_lines(capsys.readouterr().err)
    assert [line["n"] for line in lines if "n" in line] == [*range(log.FLOOD_LIMIT), 1000, 1001]
    assert [line["missing"] for line in lines if "missing" in line] == [1000 - log.FLOOD_LIMIT]
    assert sum(line["event"] == "other" for line in lines) == 1


def test_a_flood_of_requests_writes_a_limited_number_of_lines(
    call: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=clock))
    for _ in range(2 * log.FLOOD_LIMIT):
        ask(call, "POST", "/users", FORM, HTTP_ORIGIN=OTHER_ORIGIN)
    assert len(capsys.readouterr().err.splitlines()) == log.FLOOD_LIMIT
