"""The routes of an account: create and delete it, sign in and out, reset and change the password; cookies, the log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import authsvc
from auth import Auth
from settings import Settings
from storage import DB
from tests.cases import each
from tests.conftest import Answer, Client, Clock, raw_connection
from tests.routes import (
    BOB,
    COOKIE_ATTRIBUTES,
    UUID4,
    SharedApp,
    TotpUser,
    assert_200,
    assert_new_id,
    cookie_of,
    events,
    log_in,
    open_shared_app,
    profile_status,
    public_id_of,
    register,
    reset_token,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedApp]:
    with open_shared_app(tmp_path_factory.mktemp("shared")) as app:
        yield app


@pytest.mark.both_engines
def test_registering_answers_200_and_sets_no_cookie(call: Client) -> None:
    answer = call("POST", "/users", BOB)
    assert_200(answer, {"email": "bob@x.io", "message": "user created"})
    assert "Set-Cookie" not in answer.headers


@pytest.mark.both_engines
def test_logging_in_sets_the_session_cookie(call: Client) -> None:
    register(call)
    answer = log_in(call)
    assert_200(answer, {"email": "bob@x.io", "message": "logged in"})
    assert re.fullmatch(f"session_id={UUID4}; {COOKIE_ATTRIBUTES}", answer.headers["Set-Cookie"])


def test_the_profile_is_the_email_and_nothing_else(shared: SharedApp) -> None:
    assert_200(shared.call("GET", "/profile", cookie=shared.cookie), {"email": "bob@x.io"})


@pytest.mark.both_engines
def test_logging_out_ends_the_session_and_redirects_to_the_root(call: Client) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    answer = call("DELETE", "/sessions", cookie=cookie, HTTP_HOST="evil.example", HTTP_X_FORWARDED_HOST="evil.example")
    assert (answer.status, answer.headers["Location"]) == (302, "/")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Set-Cookie"] == f"session_id=; {COOKIE_ATTRIBUTES}; Max-Age=0"
    assert b"evil" not in answer.body
    assert profile_status(call, cookie) == 403
    assert call("DELETE", "/sessions", cookie=cookie).status == 403


@pytest.mark.both_engines
def test_a_reset_token_sets_a_new_password_and_ends_the_sessions(call: Client) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    answer = call("POST", "/reset_password", {"email": "bob@x.io"})
    token = answer.json["reset_token"]
    assert re.fullmatch(UUID4, token)
    assert_200(answer, {"email": "bob@x.io", "reset_token": token})
    form = {"email": "bob@x.io", "reset_token": token, "new_password": "t4rt1fl3tt3"}
    assert_200(call("PUT", "/reset_password", form), {"email": "bob@x.io", "message": "Password updated"})
    assert profile_status(call, cookie) == 403
    assert (log_in(call).status, log_in(call, password="t4rt1fl3tt3").status) == (401, 200)


@pytest.mark.both_engines
def test_a_spent_token_is_refused(call: Client) -> None:
    register(call)
    form = {"email": "bob@x.io", "reset_token": reset_token(call), "new_password": "t4rt1fl3tt3"}
    answers = [call("PUT", "/reset_password", form) for _ in range(2)]
    assert [answer.status for answer in answers] == [200, 403]
    assert answers[1].json == {"message": "invalid reset token"}


@pytest.mark.both_engines
def test_the_token_of_another_email_is_refused_and_not_spent(call: Client) -> None:
    register(call)
    register(call, "eve@x.io")
    form = {"email": "bob@x.io", "reset_token": reset_token(call, "eve@x.io"), "new_password": "t4rt1fl3tt3"}
    assert call("PUT", "/reset_password", form).status == 403
    assert log_in(call).status == 200
    assert call("PUT", "/reset_password", {**form, "email": "eve@x.io"}).status == 200


def test_a_refused_reset_does_not_spend_the_token(call: Client) -> None:
    register(call)
    form = {"email": "bob@x.io", "reset_token": reset_token(call), "new_password": "t4rt1fl3tt3"}
    for status, refused in [
        (400, {**form, "new_password": ""}),
        (400, {**form, "new_password": "a" * 1025}),
        (400, [*form.items(), ("new_password", "other")]),
        (403, {**form, "email": "eve@x.io"}),
    ]:
        assert call("PUT", "/reset_password", refused).status == status
    assert call("PUT", "/reset_password", form).status == 200


@pytest.mark.both_engines
@pytest.mark.parametrize("email", ["BOB@x.io", "bob@X.IO"])
def test_an_answer_repeats_the_email_of_the_request(call: Client, email: str) -> None:
    register(call, "Bob@X.io")
    answer = log_in(call, email)
    assert answer.json["email"] == email
    assert call("GET", "/profile", cookie=cookie_of(answer)).json == {"email": "Bob@X.io"}
    form = {"email": email, "reset_token": reset_token(call, email), "new_password": "t4rt1fl3tt3"}
    assert call("PUT", "/reset_password", form).json["email"] == email


@pytest.mark.both_engines
def test_an_unusual_email_can_be_registered(call: Client) -> None:
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
        assert call("GET", "/profile", cookie=cookie_of(answer)).json == {"email": email}
        assert call("POST", "/reset_password", form).json["email"] == email


@pytest.mark.parametrize("email", ["bob@x.io", "BOB@X.IO"])
def test_a_registered_email_is_refused(shared: SharedApp, email: str) -> None:
    form = {"email": email, "password": "other"}
    assert shared.refuses(400, "POST", "/users", form) == "email already registered"


@each("email", [" ", " \t ", "a\nb@x.io", "a\r@x.io", "a\x1b@x.io", "a\x7f@x.io", "a\x85@x.io", "a" * 255, "é" * 128])
def test_an_impossible_email_is_refused_with_the_reason(shared: SharedApp, email: str) -> None:
    message = shared.refuses(400, "POST", "/users", {"email": email, "password": "p"})
    assert message.startswith("email must ")


def test_a_password_has_at_most_1024_bytes(shared: SharedApp) -> None:
    form = {"email": "long@x.io", "password": "é" * 512 + "a"}
    assert shared.refuses(400, "POST", "/users", form) == "password must be at most 1024 bytes"


@pytest.mark.parametrize(
    ("email", "password"), [("bob@x.io", "wrong"), ("bob@x.io", "B4L0U"), ("bob@x.io", "a" * 2000)]
)
def test_a_wrong_password_and_an_unknown_email_are_answered_alike(shared: SharedApp, email: str, password: str) -> None:
    answers = [log_in(shared.call, email, password), log_in(shared.call, "nobody@x.io", password)]
    assert answers[0].status == answers[1].status == 401
    assert answers[0].body == answers[1].body
    for answer in answers:
        del answer.headers["X-Request-Id"]
    assert answers[0].headers == answers[1].headers


@each("email", ["nope", "unknown@email", " ", "a\nb", "a" * 255, "@", "%", "*"])
def test_an_impossible_email_is_an_unknown_one(shared: SharedApp, email: str) -> None:
    form = {**shared.form, "email": email}
    assert shared.refuses(401, "POST", "/sessions", form) == "wrong email or password"
    assert shared.refuses(403, "POST", "/reset_password", form) == "unknown email"
    assert shared.refuses(403, "PUT", "/reset_password", form) == "invalid reset token"


@pytest.mark.parametrize(("password", "other"), [("a", "a\0a"), ("a\0a", "a"), ("a\0b", "a\0c"), ("\0", "\0\0")])
def test_nul_counts_in_a_password(call: Client, password: str, other: str) -> None:
    register(call, password=password)
    assert (log_in(call, password=password).status, log_in(call, password=other).status) == (200, 401)
    form = {"email": "bob@x.io", "reset_token": reset_token(call), "new_password": other}
    assert call("PUT", "/reset_password", form).status == 200
    assert (log_in(call, password=password).status, log_in(call, password=other).status) == (401, 200)


def test_a_password_is_used_without_any_change(call: Client) -> None:
    register(call, password=" é+%20&=\r\n ")
    assert log_in(call, password=" é+%20&=\r\n ").status == 200
    assert log_in(call, password="é+%20&=").status == 401


def test_extra_fields_set_nothing(call: Client, settings: Settings) -> None:
    planted = {"id": "99", "hashed_password": "x", "session_id": "planted", "reset_token": "planted"}
    assert_200(call("POST", "/users", {**planted, **BOB}), {"email": "bob@x.io", "message": "user created"})
    with raw_connection(settings.database) as connection:
        columns = "id, session_id, reset_token, reset_expires_at"
        assert connection.execute(f"SELECT {columns} FROM users").fetchall() == [(1, None, None, None)]
    assert profile_status(call, "session_id=planted") == 403
    answer = log_in(call)
    assert call("POST", "/sessions", {**planted, **BOB}).session_id not in ("planted", answer.session_id)


# Changing the password and deleting the account


@pytest.fixture
def bob_and_eve(db: DB, settings: Settings, clock: Clock) -> Client:
    """The application with the accounts of Bob and Eve. A user may have three sessions."""
    settings = replace(settings, sessions_per_user=3)
    call = Client(authsvc.create_app(settings, Auth(db, settings, clock)))
    register(call)
    register(call, "eve@x.io")
    return call


@pytest.mark.both_engines
def test_deleting_the_account_deletes_its_sessions_and_tokens(bob_and_eve: Client, settings: Settings) -> None:
    call = bob_and_eve
    mine, other = (cookie_of(log_in(call)) for _ in range(2))
    eves = cookie_of(log_in(call, "eve@x.io"))
    form = {"email": "bob@x.io", "reset_token": reset_token(call), "new_password": "t4rt1fl3tt3"}
    answer = call("DELETE", "/profile", {"password": "b4l0u"}, cookie=mine)
    assert_200(answer, {"email": "bob@x.io", "message": "account deleted"})
    assert answer.headers["Set-Cookie"] == f"session_id=; {COOKIE_ATTRIBUTES}; Max-Age=0"
    assert [profile_status(call, cookie) for cookie in (mine, other, eves)] == [403, 403, 200]
    assert (log_in(call).status, call("PUT", "/reset_password", form).status) == (401, 403)
    register(call)
    assert [profile_status(call, cookie) for cookie in (mine, other, cookie_of(log_in(call)))] == [403, 403, 200]
    with raw_connection(settings.database) as connection:
        users = connection.execute("SELECT id, email FROM users ORDER BY id").fetchall()
    assert users == [(2, "eve@x.io"), (3, "bob@x.io")]


@pytest.mark.both_engines
def test_changing_the_password_ends_all_other_sessions_and_the_token(bob_and_eve: Client) -> None:
    call = bob_and_eve
    mine, other = (cookie_of(log_in(call)) for _ in range(2))
    eves = cookie_of(log_in(call, "eve@x.io"))
    reset = {"email": "bob@x.io", "reset_token": reset_token(call), "new_password": "third"}
    form = {"password": "b4l0u", "new_password": "t4rt1fl3tt3"}
    answer = call("PUT", "/password", form, cookie=mine)
    assert_200(answer, {"email": "bob@x.io", "message": "password changed"})
    assert_new_id(call, answer, mine)
    assert [profile_status(call, cookie) for cookie in (other, eves)] == [403, 200]
    assert call("PUT", "/reset_password", reset).status == 403
    assert (log_in(call).status, log_in(call, password="t4rt1fl3tt3").status) == (401, 200)


@each(("method", "path"), [("DELETE", "/profile"), ("PUT", "/password"), ("POST", "/totp")])
@each("password", ["wrong", "B4L0U", "b4l0u ", "b4l0u\0", "a" * 2000, "t4rt1fl3tt3"])
def test_a_change_needs_the_current_password(shared: SharedApp, method: str, path: str, password: str) -> None:
    assert shared.refuses(403, method, path, {**shared.form, "password": password}) == "wrong password"


@pytest.mark.parametrize("password", ["b4l0u", "wrong"])
def test_a_new_password_has_at_most_1024_bytes(shared: SharedApp, password: str) -> None:
    form = {"password": password, "new_password": "é" * 512 + "a"}
    assert shared.refuses(400, "PUT", "/password", form) == "password must be at most 1024 bytes"


# SQL injection


@each(
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
def test_sql_in_a_field_or_cookie_is_a_plain_wrong_value(shared: SharedApp, text: str) -> None:
    for status, method, path, fields in [
        (401, "POST", "/sessions", ("email", "password")),
        (403, "POST", "/reset_password", ("email",)),
        (403, "PUT", "/reset_password", ("email", "reset_token")),
    ]:
        for field in fields:
            plain = shared.refuses(status, method, path, {**shared.form, field: "wrong"})
            assert shared.refuses(status, method, path, {**shared.form, field: text}) == plain
    for field, path in (("password", "/profile"), ("otp", "/totp")):
        shared.refuses(400 if field == "otp" else 403, "DELETE", path, {**shared.form, field: text})
    assert shared.refuses(404, "DELETE", f"/sessions/{text.replace('/', ' ')}") == "no such session"
    for cookie in (f"session_id={text}", f"{shared.cookie}{text}"):
        assert shared.refuses(403, "GET", "/profile", cookie=cookie) == "not logged in"
        assert shared.refuses(403, "DELETE", "/sessions", cookie=cookie) == "not logged in"


@pytest.mark.both_engines
def test_sql_is_stored_as_plain_text(call: Client) -> None:
    text = "'; DROP TABLE users;--"
    register(call)
    register(call, text, text)
    assert log_in(call, text, text).json["email"] == text
    form = {"email": text, "reset_token": reset_token(call, text), "new_password": text + text}
    assert call("PUT", "/reset_password", form).status == 200
    assert (log_in(call, text, text + text).status, log_in(call).status) == (200, 200)


# Cookies


@each(
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
        "session_id=evil; {}",
        "session_id=; {}; session_id",
        "{0}; session_id=1; {0}; session_id=2; session_id=3; {0}",
        "Session_Id=evil; {}; session_id2=evil; session_id[0]=evil; __Host-session_id=evil",
    ],
)
def test_the_cookie_is_read_among_malformed_ones(shared: SharedApp, around: str) -> None:
    assert profile_status(shared.call, around.format(shared.cookie)) == 200


@each(
    "cookie",
    [
        "session_id={0}; session_id=1; session_id=2; session_id=3; session_id=4",
        "session_id={0}; session_id; session_id=%; session_id=?; session_id=!",
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
)
def test_an_ambiguous_or_malformed_cookie_is_no_session(shared: SharedApp, cookie: str) -> None:
    cookie = cookie.format(shared.session_id)
    assert shared.refuses(403, "GET", "/profile", cookie=cookie) == "not logged in"
    assert shared.refuses(403, "DELETE", "/sessions", cookie=cookie) == "not logged in"


@pytest.mark.parametrize("alter", [str.upper, lambda text: text.replace("-", "")], ids=["upper case", "no hyphens"])
def test_another_spelling_of_the_session_id_is_no_session(shared: SharedApp, alter: Any) -> None:
    assert profile_status(shared.call, f"session_id={alter(shared.session_id)}") == 403


def test_a_stored_hash_is_no_session_id_and_no_token(shared: SharedApp) -> None:
    session_hash, token_hash = shared.connection.execute("SELECT session_id, reset_token FROM users").fetchone()
    assert profile_status(shared.call, f"session_id={session_hash}") == 403
    shared.refuses(403, "PUT", "/reset_password", {**shared.form, "reset_token": token_hash})


def test_logging_in_never_adopts_the_session_id_of_the_request(call: Client) -> None:
    register(call)
    chosen = "11111111-1111-4111-8111-111111111111"
    answer = log_in(call, cookie=f"session_id={chosen}")
    assert answer.session_id != chosen
    assert profile_status(call, f"session_id={chosen}") == 403
    assert profile_status(call, cookie_of(answer)) == 200


@pytest.mark.both_engines
def test_logging_in_ends_the_session_in_the_cookie(call: Client) -> None:
    register(call)
    register(call, "eve@x.io")
    bobs = cookie_of(log_in(call))
    assert log_in(call, "eve@x.io", "wrong", cookie=bobs).status == 401
    assert profile_status(call, bobs) == 200
    assert log_in(call, "eve@x.io", cookie=bobs).status == 200
    assert profile_status(call, bobs) == 403


@pytest.mark.both_engines
def test_logging_out_ends_the_session_of_the_caller_only(call: Client) -> None:
    register(call)
    register(call, "eve@x.io")
    bobs, eves = (cookie_of(log_in(call, email)) for email in ("bob@x.io", "eve@x.io"))
    assert call("DELETE", "/sessions", cookie=bobs).status == 302
    assert (profile_status(call, bobs), profile_status(call, eves)) == (403, 200)


# In development, reset tokens go only to programs on the same machine


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
    message = {"message": "reset tokens are given only to this machine, and through no proxy"}
    assert [(answer.status, answer.json) for answer in answers] == [(403, message)] * 2
    with raw_connection(settings.database) as connection:
        assert connection.execute("SELECT reset_token FROM users").fetchall() == [(None,)]
    assert log_in(call, **environ).status == 200


# The log


@pytest.mark.parametrize(
    ("method", "path", "form", "event"),
    [
        ("GET", "/profile", {}, "authz_fail"),
        ("DELETE", "/sessions", {}, "authz_fail"),
        ("POST", "/reset_password", {"email": "canary@x.io"}, "authz_fail"),
        (
            "PUT",
            "/reset_password",
            {"email": "canary@x.io", "reset_token": "canary", "new_password": "p"},
            "authn_token_fail",
        ),
    ],
)
def test_a_forbidden_request_is_logged_without_its_values(
    call: Client, capsys: pytest.CaptureFixture[str], method: str, path: str, form: dict[str, str], event: str
) -> None:
    assert call(method, path, form).status == 403
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


def test_changes_of_an_account_are_logged_and_no_secret_is_shown_twice(
    bob_and_eve: Client, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bob = TotpUser(bob_and_eve, clock)
    answers: list[Answer] = []
    logged: list[dict[str, Any]] = []
    sent = {"b4l0u", "t4rt1fl3tt3", "wrong-canary"}
    issued: set[str] = set()

    def ask(method: str, path: str, event: str | None, **form: str) -> Answer:
        capsys.readouterr()
        answer = bob_and_eve(method, path, form, cookie=bob.cookie)
        answers.append(answer)
        lines = events(capsys)
        assert [line["event"] for line in lines] == ([event] if event else [])
        for line in lines:
            del line["time"]
            assert line.pop("request_id") == answer.headers["X-Request-Id"]
            logged.append(line)
        if answer.headers.get("Set-Cookie", "").startswith("session_id=") and answer.session_id:
            bob.cookie = cookie_of(answer)
            issued.add(answer.session_id)
        return answer

    ask("POST", "/sessions", "authn_login_success", **BOB)
    ask("GET", "/sessions", None)
    ask("PUT", "/password", "authn_login_fail", password="wrong-canary", new_password="t4rt1fl3tt3")
    ask("PUT", "/password", "input_validation_fail", password="b4l0u", new_password="t4rt1fl3tt3" * 100)
    ask("PUT", "/password", "authn_password_change", password="b4l0u", new_password="t4rt1fl3tt3")
    bob.seed = ask("POST", "/totp", None, password="t4rt1fl3tt3").json["secret"]
    ask("PUT", "/totp", "authn_login_fail", otp="wrong-canary")
    code = bob.code()
    codes = ask("PUT", "/totp", "authn_factor_added", otp=code).json["recovery_codes"]
    sent.add(code)
    issued.update((bob.seed, *codes))
    ask("POST", "/totp", "input_validation_fail", password="t4rt1fl3tt3")
    ask("POST", "/sessions", "authn_code_required", email="bob@x.io", password="t4rt1fl3tt3")
    ask("POST", "/sessions", "authn_login_fail", email="bob@x.io", password="t4rt1fl3tt3", otp="wrong-canary")
    ask("POST", "/sessions", "authn_login_success", email="bob@x.io", password="t4rt1fl3tt3", otp=codes[0])
    ask("DELETE", "/totp", "authn_login_fail", password="t4rt1fl3tt3", otp=codes[0])
    ask("DELETE", "/totp", "authn_factor_removed", password="t4rt1fl3tt3", otp=codes[1])
    ask("DELETE", "/sessions/0123456789abcdef", "authz_fail")
    ask("DELETE", "/sessions/others", "session_ended")
    ask("DELETE", f"/sessions/{public_id_of(bob.cookie)}", "session_ended")
    ask("POST", "/sessions", "authn_login_success", email="bob@x.io", password="t4rt1fl3tt3")
    ask("DELETE", "/sessions/all", "session_ended")
    ask("POST", "/sessions", "authn_login_success", email="bob@x.io", password="t4rt1fl3tt3")
    ask("DELETE", "/profile", "user_deleted", password="t4rt1fl3tt3")
    assert [line.get("which") for line in logged if line["event"] == "session_ended"] == ["others", None, "all"]
    changes = {"authn_password_change", "authn_factor_added", "authn_factor_removed", "session_ended", "user_deleted"}
    changes |= {"authn_code_required", "authn_login_success"}
    assert {line["user_id"] for line in logged if line["event"] in changes} == {1}
    assert not [(line, secret) for line in logged for secret in sent | issued if secret in str(line)]
    texts = [f"{answer.headers} {answer.body.decode()}" for answer in answers]
    assert all(sum(secret in text for text in texts) == 1 for secret in issued)
    # The one-time code can by chance be a part of a number in an answer, so it is not searched there.
    assert not [text for text in texts for secret in ("b4l0u", "t4rt1fl3tt3", "canary") if secret in text]
