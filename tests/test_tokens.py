"""Access tokens: the header, the rules, the routes, the rows on both engines, and the operator's commands."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import pytest

from auth import MAX_NAME, UNCOUNTED, Auth, InvalidToken, SessionRequired
from authsvc import create_app
from credentials import tokens
from settings import Settings
from storage import DB, User
from tables.tokens import MAX_TOKENS, Token
from tests import stored_users, test_commands
from tests.accounts import digest
from tests.cases import each
from tests.conftest import Answer, Client, Clock
from tests.routes import TotpUser, assert_200, cookie_of, events, log_in, register
from tests.stored_users import rows, run_together
from tests.test_commands import Run
from tests.test_verify import assert_no_user, header_names, verified_name

statements = stored_users.statements
logged = test_commands.logged
run = test_commands.run
people = test_commands.people

EVE = {"email": "eve@x.io", "password": "3v3"}
TOKEN = "authsvc_" + "a" * 43
CHALLENGE = 'Basic realm="authsvc", charset="UTF-8"'
BROWSER = {"HTTP_SEC_FETCH_SITE": "cross-site"}


def basic(email: str, token: str) -> str:
    return "Basic " + base64.b64encode(f"{email}:{token}".encode()).decode()


def create(call: Client, cookie: str, name: str = "git", **fields: str) -> Any:
    """Create an access token of Bob's, and return the answer's object."""
    answer = call("POST", "/tokens", {"password": "b4l0u", "name": name, **fields}, cookie=cookie)
    assert answer.status == 200
    return answer.json


def verify(call: Client, authorization: str | None = None, query: str = "", **rest: Any) -> Answer:
    more: dict[str, Any] = {} if authorization is None else {"HTTP_AUTHORIZATION": authorization}
    return call("GET", f"/verify{query}", **more, **rest)


@pytest.fixture
def cookie(call: Client) -> str:
    """The session cookie of Bob, who has an account."""
    register(call)
    return cookie_of(log_in(call))


@pytest.fixture
def token(call: Client, cookie: str) -> str:
    """The text of an access token of Bob's."""
    text: str = create(call, cookie)["token"]
    return text


# The header


def test_a_token_has_a_prefix_and_256_random_bits() -> None:
    made = {tokens.new_token() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch("authsvc_[A-Za-z0-9_-]{43}", token) for token in made)


@each(
    ("header", "email"),
    [
        (f"Bearer {TOKEN}", None),
        (f"bearer  {TOKEN} ", None),
        (f"BEARER {TOKEN}", None),
        (basic("bob@x.io", TOKEN), "bob@x.io"),
        (basic("", TOKEN), ""),
        (basic("é@x.io", TOKEN), "é@x.io"),
        (basic("bob@x.io", TOKEN).replace("Basic", "bAsIc"), "bob@x.io"),
        ("Basic " + base64.b64encode(b"\xff:" + TOKEN.encode()).decode(), "\ufffd"),
    ],
)
def test_a_token_is_read_from_bearer_and_basic(header: str, email: str | None) -> None:
    assert tokens.parse(header) == (TOKEN, email)


@each(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Bearer x{TOKEN}",
        f"Bearer {TOKEN[1:]}",
        f"Bearer {TOKEN.upper()}",
        TOKEN,
        f"Token {TOKEN}",
        f"Digest {TOKEN}",
        f"Bearer\t{TOKEN}",
        f"Basic {TOKEN}",
        f"Basic bob@x.io:{TOKEN}",
        basic(TOKEN, ""),
        basic("bob@x.io", f" {TOKEN}"),
        basic("bob@x.io", "b4l0u"),
        basic("bob:x", TOKEN),
        basic("bob@x.io", TOKEN).rstrip("=") + "!",
        basic("bob@x.io", TOKEN)[:-1],
        "Basic \xe9",
        "Bearer eyJhbGciOiJIUzI1NiJ9.e30.c2ln",
    ],
)
def test_any_other_header_holds_no_token(header: str) -> None:
    assert tokens.parse(header) is None


# The routes


def test_a_token_is_created_listed_and_deleted(call: Client, cookie: str, clock: Clock) -> None:
    now = datetime.fromtimestamp(clock(), timezone.utc)
    made = create(call, cookie, "git on my laptop", days="30")
    assert made == {
        "id": "1",
        "name": "git on my laptop",
        "token": made["token"],
        "expires": f"{datetime.fromtimestamp(clock() + 30 * 86_400, timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
    }
    assert create(call, cookie, "CI")["expires"] is None
    created = f"{now:%Y-%m-%dT%H:%M:%SZ}"
    listed = [
        {"id": "1", "name": "git on my laptop", "created": created, "last_used": None, "expires": made["expires"]},
        {"id": "2", "name": "CI", "created": created, "last_used": None, "expires": None},
    ]
    assert_200(call("GET", "/tokens", cookie=cookie), {"tokens": listed})
    assert_200(call("DELETE", "/tokens/1", cookie=cookie), {"message": "token deleted"})
    assert call("GET", "/tokens", cookie=cookie).json == {"tokens": listed[1:]}
    assert create(call, cookie)["id"] == "3"  # an id is not given twice


@each("name", ["a", "x" * MAX_NAME, "é ☃ 💻", " git "])
def test_a_name_is_kept_as_it_is(call: Client, cookie: str, name: str) -> None:
    assert create(call, cookie, name)["name"] == name
    assert call("GET", "/tokens", cookie=cookie).json["tokens"][-1]["name"] == name


@each(
    ("fields", "message"),
    [
        ({"name": " "}, "name must be 1 to 64 printable characters"),
        ({"name": "x" * 65}, "name must be 1 to 64 printable characters"),
        ({"name": "a\nb"}, "name must be 1 to 64 printable characters"),
        ({"name": "a\x7fb"}, "name must be 1 to 64 printable characters"),
        ({"name": "a\u202eb"}, "name must be 1 to 64 printable characters"),
        *(
            ({"days": days}, "days must be a whole number from 1 to 3650")
            for days in ("0", "3651", "-1", "+1", "1.0", "1e3", "01", "١", " 1", "a", "99999999999")
        ),
        ({"name": ""}, "name is empty"),
        ({"password": ""}, "password is empty"),
    ],
)
def test_an_unacceptable_token_is_not_created(call: Client, cookie: str, fields: dict[str, str], message: str) -> None:
    answer = call("POST", "/tokens", {"password": "b4l0u", "name": "git", **fields}, cookie=cookie)
    assert (answer.status, answer.json) == (400, {"message": message})
    assert call("GET", "/tokens", cookie=cookie).json == {"tokens": []}


@pytest.mark.parametrize("days", ["1", "3650", ""])
def test_the_days_of_a_token_are_1_to_3650_or_left_out(call: Client, cookie: str, days: str) -> None:
    assert (create(call, cookie, days=days)["expires"] is None) is (days == "")


def test_a_token_is_not_created_without_session_and_password(call: Client, cookie: str) -> None:
    form = {"password": "wrong", "name": "git"}
    assert call("POST", "/tokens", form, cookie=cookie).json == {"message": "wrong password"}
    assert call("POST", "/tokens", form | {"password": "b4l0u"}).json == {"message": "not logged in"}
    assert call("GET", "/tokens").status == call("DELETE", "/tokens/1").status == 403
    assert call("GET", "/tokens", cookie=cookie).json == {"tokens": []}


@pytest.mark.both_engines
def test_a_user_has_at_most_32_tokens(call: Client, cookie: str) -> None:
    for number in range(MAX_TOKENS):
        create(call, cookie, f"{number}")
    answer = call("POST", "/tokens", {"password": "b4l0u", "name": "one more"}, cookie=cookie)
    assert (answer.status, answer.json) == (400, {"message": "at most 32 access tokens: delete one first"})
    register(call, **EVE)
    theirs = cookie_of(log_in(call, **EVE))
    assert call("POST", "/tokens", {"password": "3v3", "name": "git"}, cookie=theirs).status == 200
    assert call("DELETE", "/tokens/7", cookie=cookie).status == 200
    assert create(call, cookie, "one more")["id"] == "34"


@pytest.mark.both_engines
def test_simultaneous_requests_create_at_most_32_tokens(auth: Auth, db: DB) -> None:
    user = auth.register_user("bob@x.io", "b4l0u")
    held = digest(auth.create_session("bob@x.io"))

    def add(number: int) -> int | None:
        return db.tokens.add(user.id, user.hashed_password, held, f"hash {number}", Token(0, "x", 1))

    assert None not in [add(number) for number in range(100, 99 + MAX_TOKENS)]
    assert sum(added is not None for added in run_together(8, add)) == 1
    assert len(auth.tokens_of(1)) == MAX_TOKENS


@pytest.mark.parametrize("token_id", ["2", "0", "-1", "01", "1 ", "1.0", "+1", "a", "9" * 30, "٣", "authsvc_"])
def test_a_token_of_somebody_else_or_none_is_not_deleted(call: Client, cookie: str, token: str, token_id: str) -> None:
    register(call, **EVE)
    theirs = cookie_of(log_in(call, **EVE))
    made = call("POST", "/tokens", {"password": "3v3", "name": "git"}, cookie=theirs).json
    answer = call("DELETE", f"/tokens/{token_id}", cookie=cookie)
    assert answer.status == 404
    assert verify(call, f"Bearer {made['token']}").status == verify(call, f"Bearer {token}").status == 200


# At /verify


@pytest.mark.both_engines
def test_a_token_names_its_user(call: Client, db: DB, token: str) -> None:
    assert db.set_groups(db.find_user_by(id=1), "admin,wiki")
    for authorization in (f"Bearer {token}", basic("bob@x.io", token), basic("BOB@X.io", token)):
        answer = verify(call, authorization)
        assert verified_name(answer) == "bob@x.io"
        assert (answer.headers["Remote-Groups"], answer.headers["Remote-Id"]) == ("admin,wiki", "1")
        assert verify(call, authorization, "?group=wiki").status == 200
        answer = assert_no_user(verify(call, authorization, "?group=other&login=1"), 403)
        assert answer.json == {"message": "not allowed here"}


@each("query", ["", "?login=1", "?group=wiki&login=1"])
def test_the_token_alone_is_judged_whatever_the_cookie(call: Client, cookie: str, token: str, query: str) -> None:
    assert verify(call, f"Bearer {token}", cookie="session_id=unknown").status == 200
    for wrong in (TOKEN, f"{token}x", token[:-1], "authsvc_"):
        for authorization in (f"Bearer {wrong}", basic("bob@x.io", wrong)):
            answer = assert_no_user(verify(call, authorization, query, cookie=cookie))
            assert answer.json == {"message": "invalid access token"}
            assert ("Www-Authenticate" in answer.headers) is ("login=1" not in query)


def test_basic_must_name_the_user_of_the_token(call: Client, token: str) -> None:
    register(call, **EVE)
    for email in ("eve@x.io", "", "nobody@x.io", "1", "bob@x.io "):
        assert_no_user(verify(call, basic(email, token)))


@each("header", [basic("bob@x.io", "b4l0u"), basic("a", "b"), "Bearer eyJ9.e30.c2ln", "Digest x", "", "x"])
def test_another_authorization_is_ignored(call: Client, cookie: str, header: str) -> None:
    assert verify(call, header, cookie=cookie).status == 200
    assert_no_user(verify(call, header))


def test_a_browser_may_not_use_basic_and_is_not_challenged(call: Client, cookie: str, token: str) -> None:
    for name in ("SITE", "MODE", "DEST", "USER", "STORAGE_ACCESS"):
        browser = {f"HTTP_SEC_FETCH_{name}": "navigate"}
        answer = assert_no_user(verify(call, basic("bob@x.io", token), cookie=cookie, **browser))
        assert "Www-Authenticate" not in answer.headers
        assert "Www-Authenticate" not in assert_no_user(verify(call, **browser)).headers
        assert verify(call, f"Bearer {token}", **browser).status == 200
        assert verify(call, basic("a", "b"), cookie=cookie, **browser).status == 200


def test_a_program_is_asked_for_its_token_once(call: Client) -> None:
    answer, names = header_names(call, "/verify")
    assert (answer.status, answer.headers["Www-Authenticate"]) == (401, CHALLENGE)
    assert names.count("WWW-Authenticate") == 1
    assert "Www-Authenticate" not in verify(call, query="?login=1").headers
    assert verify(call).headers["Vary"] == "Cookie, Authorization"
    assert call("HEAD", "/verify").headers["Www-Authenticate"] == CHALLENGE


def test_a_token_opens_no_other_route(call: Client, cookie: str, token: str) -> None:
    for way in ({"HTTP_AUTHORIZATION": f"Bearer {token}"}, {"HTTP_AUTHORIZATION": basic("bob@x.io", token)}, None):
        sent: dict[str, Any] = way or {"cookie": f"session_id={token}"}
        for method, path in [("GET", "/profile"), ("GET", "/sessions"), ("GET", "/tokens"), ("DELETE", "/tokens/1")]:
            assert call(method, path, **sent).status == 403
        form = {"password": "b4l0u", "new_password": "x", "name": "x", "new_email": "x@x.io"}
        for method, path in [("POST", "/tokens"), ("PUT", "/password"), ("POST", "/email"), ("DELETE", "/profile")]:
            assert call(method, path, form, **sent).status == 403
    assert_no_user(verify(call, cookie=f"session_id={token}"))
    assert log_in(call, password=token).status == 401


@pytest.mark.both_engines
def test_a_token_expires_at_its_time(call: Client, cookie: str, clock: Clock) -> None:
    token = create(call, cookie, days="2")["token"]
    clock.advance(2 * 86_400 - 1)
    assert verify(call, f"Bearer {token}").status == 200
    clock.advance(1)
    assert_no_user(verify(call, f"Bearer {token}"))
    cookie = cookie_of(log_in(call))
    assert [one["id"] for one in call("GET", "/tokens", cookie=cookie).json["tokens"]] == ["1"]  # it is still shown


@pytest.mark.both_engines
def test_a_token_of_the_future_is_not_accepted(call: Client, cookie: str, token: str, clock: Clock) -> None:
    clock.advance(-300)
    assert verify(call, f"Bearer {token}").status == 200
    clock.advance(-1)
    assert_no_user(verify(call, f"Bearer {token}"))


@pytest.mark.both_engines
def test_the_last_use_is_recorded_once_a_minute(call: Client, cookie: str, token: str, clock: Clock, db: DB) -> None:
    began = int(clock())
    seen = []
    for step in (0, 59, 1, 1):
        clock.advance(step)
        assert verify(call, f"Bearer {token}").status == 200
        seen.append(db.tokens.of_user(1)[0].last_used_at)
    assert seen == [began, began, began + 60, began + 60]
    assert call("GET", "/tokens", cookie=cookie).json["tokens"][0]["last_used"] is not None


def test_a_refused_request_records_no_use(call: Client, token: str, db: DB) -> None:
    assert_no_user(verify(call, basic("eve@x.io", token)))
    assert_no_user(verify(call, basic("bob@x.io", token), **BROWSER))
    assert db.tokens.of_user(1)[0].last_used_at is None


def test_a_required_second_factor_does_not_stop_programs(
    settings: Settings, db: DB, auth: Auth, clock: Clock, cookie: str, token: str
) -> None:
    strict_settings = replace(settings, require_second_factor=True)
    strict = Client(create_app(strict_settings, Auth(db, strict_settings, clock)))
    assert_no_user(verify(strict, cookie=cookie))
    assert verify(strict, f"Bearer {token}").status == 200
    assert strict("POST", "/tokens", {"password": "b4l0u", "name": "x"}, cookie=cookie).status == 403


# What ends tokens

Change = Callable[[Auth, DB, str], object]


def change_password(auth: Auth, db: DB, held: str) -> None:
    auth.change_password(held, "b4l0u", "t4rt1fl3tt3", caller=UNCOUNTED)


def disable_and_enable(auth: Auth, db: DB, held: str) -> None:
    db.disable_user(1, 1)
    db.enable_user(1)


ENDING: dict[str, Change] = {
    "reset": lambda auth, db, held: auth.update_password(auth.get_reset_password_token("bob@x.io"), "new"),
    "disabling": disable_and_enable,
    "deletion": lambda auth, db, held: db.delete_user(1),
    "sessions end": lambda auth, db, held: db.end_sessions(1, devices=True),
    "sessions end --all, and restore": lambda auth, db, held: db.end_all_sessions(),
}
KEEPING: dict[str, Change] = {
    "change of the password": change_password,
    "signing out": lambda auth, db, held: auth.log_out(held),
    "signing out everywhere": lambda auth, db, held: auth.end_sessions(held, except_this=False),
    "rename": lambda auth, db, held: auth.rename(auth.find_user("bob@x.io"), "rob@x.io"),
    "a second factor": lambda auth, db, held: auth.begin_totp(held, "b4l0u", caller=UNCOUNTED),
    "pruning": lambda auth, db, held: list(auth.prune()),
}


@pytest.mark.both_engines
@pytest.mark.parametrize("change", ENDING.values(), ids=ENDING)
def test_what_ends_all_credentials_ends_tokens(
    call: Client, auth: Auth, db: DB, cookie: str, token: str, change: Change
) -> None:
    register(call, **EVE)
    theirs = create_for_eve(call)
    change(auth, db, cookie.partition("=")[2])
    assert_no_user(verify(call, f"Bearer {token}"))
    assert db.tokens.of_user(1) == []
    assert verify(call, f"Bearer {theirs}").status == (
        401 if change is ENDING["sessions end --all, and restore"] else 200
    )


def create_for_eve(call: Client) -> str:
    answer = call("POST", "/tokens", {"password": "3v3", "name": "x"}, cookie=cookie_of(log_in(call, **EVE)))
    return str(answer.json["token"])


@pytest.mark.both_engines
@pytest.mark.parametrize("change", KEEPING.values(), ids=KEEPING)
def test_a_change_by_the_user_keeps_tokens(
    call: Client, auth: Auth, db: DB, cookie: str, token: str, change: Change
) -> None:
    change(auth, db, cookie.partition("=")[2])
    assert verify(call, f"Bearer {token}").headers["Remote-Id"] == "1"


def test_a_disabled_user_has_no_token_even_if_the_row_stays(call: Client, db: DB, token: str, other: Any) -> None:
    with other:
        other.execute("UPDATE users SET disabled_at = 1")
    assert_no_user(verify(call, f"Bearer {token}"))


@pytest.mark.both_engines
def test_a_token_is_created_only_with_the_password_that_was_compared(auth: Auth, db: DB, clock: Clock) -> None:
    user = auth.register_user("bob@x.io", "b4l0u")
    held = auth.create_session("bob@x.io") or ""
    token = Token(0, "x", 1)
    assert db.tokens.add(user.id, "another hash", digest(held), "h1", token) is None
    assert db.tokens.add(user.id, user.hashed_password, digest("ended"), "h2", token) is None
    auth.register_user("eve@x.io", "3v3")
    theirs = auth.create_session("eve@x.io") or ""
    assert db.tokens.add(user.id, user.hashed_password, digest(theirs), "h3", token) is None
    assert db.tokens.add(user.id, user.hashed_password, digest(held), "h4", token) == 1


def test_a_session_that_ends_meanwhile_creates_no_token(auth: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    auth.register_user("bob@x.io", "b4l0u")
    held = auth.create_session("bob@x.io")
    original = auth._reauthenticate

    def reauthenticate(user: User, *rest: Any) -> None:
        original(user, *rest)
        auth.log_out(held)

    monkeypatch.setattr(auth, "_reauthenticate", reauthenticate)
    with pytest.raises(SessionRequired):
        auth.create_token(held, "b4l0u", "git", caller=UNCOUNTED)
    assert auth.tokens_of(1) == []


def test_with_a_second_factor_a_token_needs_a_code(call: Client, clock: Clock) -> None:
    bob = TotpUser(call, clock)
    register(call)
    bob.begin()
    bob.cookie = cookie_of(bob.confirm())
    clock.advance(601)
    form = {"password": "b4l0u", "name": "git"}
    answer = call("POST", "/tokens", form, cookie=bob.cookie)
    assert (answer.status, answer.json) == (403, {"message": "one-time code required"})
    answer = call("POST", "/tokens", form | {"otp": "000000"}, cookie=bob.cookie)
    assert (answer.status, answer.json) == (403, {"message": "wrong one-time code"})
    assert call("POST", "/tokens", form | {"otp": bob.code()}, cookie=bob.cookie).status == 200


# The rows and the statements


@pytest.mark.both_engines
def test_the_database_holds_only_the_hash_of_a_token(call: Client, cookie: str, token: str, other: Any) -> None:
    (row,) = rows(other, "SELECT * FROM access_tokens")
    assert digest(token) in row
    assert not [value for value in row if token in str(value) or token.removeprefix("authsvc_") in str(value)]


def test_a_verification_with_a_token_is_one_indexed_look_up(
    statements: list[str], call: Client, token: str, other: Any
) -> None:
    verify(call, f"Bearer {token}")  # records its use
    statements.clear()
    assert verify(call, f"Bearer {token}").status == 200
    (lookup,) = [one for one in statements if one.strip() not in ("BEGIN", "COMMIT")]
    plan = [detail for *_, detail in rows(other, f"EXPLAIN QUERY PLAN {lookup}")]
    assert plan
    assert all(detail.startswith("SEARCH") for detail in plan), plan


def test_tokens_are_logged_without_their_text(call: Client, cookie: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    made = create(call, cookie, "secret name")
    verify(call, f"Bearer {made['token']}x")
    call("DELETE", "/tokens/1", cookie=cookie)
    call("DELETE", "/tokens/1", cookie=cookie)
    found = events(capsys)
    assert "authsvc_" not in str(found)
    assert "secret name" not in str(found)
    assert [line["event"] for line in found] == [
        "authn_token_created",
        "authz_verify_fail",
        "authn_token_revoked",
        "authz_fail",
    ]
    assert (found[0]["user_id"], found[0]["token"], found[1]["reason"]) == (1, 1, "invalid access token")
    assert (found[2]["user_id"], found[2]["token"]) == (1, 1)


def test_identify_program_raises_for_a_token_that_is_not_live(auth: Auth) -> None:
    assert auth.identify_program("Bearer x", browser=False) is None
    with pytest.raises(InvalidToken) as refused:
        auth.identify_program(f"Bearer {TOKEN}", browser=False)
    assert (refused.value.status, refused.value.message) == (401, "invalid access token")


# The operator's commands


@pytest.mark.both_engines
def test_the_operator_lists_and_deletes_tokens(run: Run, people: Auth) -> None:
    held = people.create_session("eve@x.io")
    people.create_token(held, "3v3", "git", "30", caller=UNCOUNTED)
    _, _, text = people.create_token(held, "3v3", "CI", caller=UNCOUNTED)
    first, second = run("token", "list", "EVE@x.io", "--json").records
    assert (first["id"], first["name"], first["last_used"]) == ("1", "git", None)
    assert (second["id"], second["name"], second["expires"]) == ("2", "CI", None)
    assert list(first) == ["id", "name", "created", "last_used", "expires"]
    assert run("token", "list", "eve@x.io").out.splitlines()[1] == f"2  CI  {second['created']}  -  -"
    assert run("token", "list", "bob@x.io").out == ""
    done = run("token", "delete", "eve@x.io", "2")
    assert (done.code, done.out) == (0, "eve@x.io: deleted access token 2\n")
    with pytest.raises(InvalidToken):
        people.identify_program(f"Bearer {text}", browser=False)
    assert [token.id for token in people.tokens_of(2)] == [1]


@pytest.mark.parametrize("words", ["bob@x.io 1", "eve@x.io 9", "eve@x.io 0", "eve@x.io x", "eve@x.io -"])
def test_a_token_that_the_user_does_not_have_is_not_deleted(run: Run, people: Auth, words: str) -> None:
    people.create_token(people.create_session("eve@x.io"), "3v3", "git", caller=UNCOUNTED)
    done = run("token", "delete", *words.split())
    assert (done.code, done.err[-1:]) == (1, ["authsvc: no such token"])
    assert len(people.tokens_of(2)) == 1
