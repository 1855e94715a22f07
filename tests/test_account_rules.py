"""Which emails and passwords a new account may have in production, and who may create one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from auth import Auth, EmailRejected
from authsvc import create_app
from cli import user_files
from credentials import passwords
from settings import Settings
from storage import DB
from tests.cases import each
from tests.conftest import COST, Client, Clock
from tests.production import BOB, FORM, PASSWORD, ask, log_lines, new_client, production_settings, shared_site


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


# Emails


REFUSED_EMAILS = [
    "nope",
    "@",
    "a@",
    "@x.io",
    "a@b@c",
    "a b@x.io",
    "a@x.io ",
    "a@x, evil@y",
    "a@x;b@y",
    "g:a@x",
    "<a@x>",
    "a(b)@x",
    "[a]@x",
    "a@[127.0.0.1]",
    "a\\b@x",
    '"a"@x',
    "é@x.io",
    "bob@x\u212a.io",
    "ｂob@x.io",
    "b\u043eb@x.io",
    "b\u200bob@x.io",
    "b\u202eob@x.io",
    "a@x\r\nBcc: e@y",
    "a\x7f@x",
    "a" * 250 + "@x.io",
    ".a@x.io",  # from here on: mail servers refuse it
    "a.@x.io",
    "a..b@x.io",
    "=?utf-8?q?a?=@x.io",
    "a" * 65 + "@x.io",
    "a@" + "b" * 64 + ".io",
    "a@x..io",
    "a@.x.io",
    "a@x.io.",
    "a@-x.io",
    "a@x-.io",
    "a@x!.io",
    "a@x%y.io",
    "a@x/y",
    "a@x'y.io",
]


@each("email", REFUSED_EMAILS)
def test_an_email_that_is_not_a_plain_mailbox_is_refused(site: Client, email: str) -> None:
    answer = ask(site, "POST", "/users", {"email": email, "password": PASSWORD})
    assert answer.status == 400
    assert answer.json["message"].startswith("email must ")
    assert ask(site, "POST", "/sessions", {"email": email, "password": PASSWORD}).status == 401


@pytest.mark.parametrize("email", ["a.@x.io", "a" * 65 + "@x.io", "a@x-.io"])
def test_the_operator_cannot_add_or_import_what_cannot_register(db: DB, database: str, email: str) -> None:
    auth = Auth(db, production_settings(database))
    with pytest.raises(EmailRejected):
        auth.add_account(email)
    with pytest.raises(ValueError, match="as mail servers accept it"):
        user_files.parse_user({"email": email, "hashed_password": "!"}, auth.check_email, 0)


@each(
    "email",
    [
        "a@b",
        "a" * 64 + "@" + "b" * 63 + ".x_y.io",
        "o'brien+tag@x.io",
        "a&b$c`d!e#f%g*h/i=j?k^l_m{n|o}p~q@x-y.z",
        "1@2",
    ],
)
def test_an_unusual_mailbox_can_create_an_account(site: Client, email: str) -> None:
    answer = ask(site, "POST", "/users", {"email": email, "password": PASSWORD})
    assert (answer.status, answer.json) == (200, {"email": email, "message": "user created"})


# Passwords


SHORT = "password must be at least 15 characters"
FEW = "password must have more than four different characters"
RUN = "password must not be one run of the keyboard or the alphabet"
COMMON = "password must not be a common one, nor one repeated or followed by digits"
EMAIL = "password must not be made of the email or the name of the service"
LONG = "password must be at most 1024 bytes"


REFUSED_PASSWORDS = [
    ("b4l0u", SHORT),
    ("fourteen chars", SHORT),
    ("é" * 14, SHORT),  # characters, not bytes
    ("\U0001f600" * 14, SHORT),
    ("aaaaaaaaaaaaaaaa", FEW),
    ("abababababababab", FEW),
    ("AaBbAaBbCcDdCcDd", FEW),
    ("123412341234123412", FEW),
    ("12345678901234567890", RUN),
    ("qwertyuiopasdfghjkl", RUN),
    ("QWERTYUIOPASDFGHJKL", RUN),
    ("mnbvcxzlkjhgfdsapoiuytrewq", RUN),
    ("1qaz2wsx3edc4rfv", RUN),
    ("abcdefghijklmnopqrst", RUN),
    ("vwxyzabcdefghijklmnop", RUN),
    ("passwordpassword", COMMON),
    ("PasswordPassword", COMMON),
    ("password12345678", COMMON),
    ("football20242025", COMMON),
    ("sunshine1234567890", COMMON),
    ("abc12abc12abc12", COMMON),
    ("iloveyouforever", COMMON),
    ("IloveyouForever2026", COMMON),
    ("thisismypassword", COMMON),
    ("This is my password", COMMON),
    ("footballpassword", COMMON),
    ("bobsmith@mail.example", EMAIL),
    ("bobsmithbobsmith42", EMAIL),
    ("BobSmith-mail-Example!", EMAIL),
    ("bobsmithersbobsmithers", EMAIL),
    ("auth-example-com-2026", EMAIL),  # the host of the public URL
    ("x" + "aé" * 1024, LONG),
]


@each(("password", "reason"), REFUSED_PASSWORDS)
def test_a_password_that_is_easy_to_guess_is_refused(site: Client, password: str, reason: str) -> None:
    email = "bob@bobsmithers.example" if "smithers" in password else "bobsmith@mail.example"
    answer = ask(site, "POST", "/users", {"email": email, "password": password})
    assert (answer.status, answer.json) == (400, {"message": reason})


ACCEPTED_PASSWORDS = [
    PASSWORD,
    "fifteen chars ok",
    "correct horse battery staple",
    "🥨🥖🧀🍷🍇🍐🍎🍒🍓🥐🥯🧈🥞🧇🥓",
    "vdqvqvxjbnrlhwwy",
    "qwertyuiopasdfghjkl;zxc",
    "bobsmith likes long walks",
    "x" * 1000 + "abcdefghijkl",
    "passwords are a thing of the past",
]


@each("password", ACCEPTED_PASSWORDS)
def test_a_long_password_of_any_characters_is_accepted(site: Client, password: str) -> None:
    form = {"email": f"{new_client()}+bobsmith@mail.example", "password": password}
    assert ask(site, "POST", "/users", form).status == 200
    assert ask(site, "POST", "/sessions", form).status == 200


@pytest.mark.parametrize("min_length", [8, 20])
def test_the_minimum_length_of_a_password_is_a_setting(tmp_path: Path, clock: Clock, min_length: int) -> None:
    settings = production_settings(str(tmp_path / "authsvc.db"), password_min=min_length)
    db = DB(settings.database)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    password = "vdqxjbnrlhwygmkzpsctf"
    refused = ask(call, "POST", "/users", {"email": BOB, "password": password[: min_length - 1]})
    assert (refused.status, refused.json) == (400, {"message": f"password must be at least {min_length} characters"})
    assert ask(call, "POST", "/users", {"email": BOB, "password": password[:min_length]}).status == 200
    db.close()


def test_a_common_password_is_refused_at_any_minimum_length() -> None:
    assert passwords.strength_error("football", BOB, 8) == COMMON
    assert passwords.strength_error("vdqxjbnr", BOB, 8) is None


def test_3000_passwords_of_15_characters_are_refused_only_because_they_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = [password for password in passwords._common_passwords() if len(password) >= 15]
    assert all(passwords.strength_error(password, BOB, 15) for password in long)
    monkeypatch.setattr(passwords, "_common_passwords", frozenset)  # an empty list
    assert sum(passwords.strength_error(password, BOB, 15) is None for password in long) >= 3000


@pytest.mark.usefixtures("bob")
def test_a_refused_new_password_does_not_spend_the_reset_token(call: Client, auth: Auth) -> None:
    form = {"email": BOB, "reset_token": auth.get_reset_password_token(BOB), "new_password": "passwordpassword"}
    refused = ask(call, "PUT", "/reset_password", form)
    assert (refused.status, refused.json) == (400, {"message": COMMON})
    assert ask(call, "PUT", "/reset_password", {**form, "new_password": "choucroute du lundi"}).status == 200


@pytest.mark.usefixtures("bob")
def test_a_password_from_development_still_signs_in(call: Client, db: DB) -> None:
    db.update_user(1, hashed_password=passwords.hash_password("b4l0u", COST))
    assert ask(call, "POST", "/sessions", {"email": BOB, "password": "b4l0u"}).status == 200


@pytest.mark.usefixtures("bob")
def test_a_weak_password_cannot_replace_the_current_one(call: Client, auth: Auth) -> None:
    cookie = f"__Host-session_id={auth.create_session(BOB)}"
    for password, reason in [("b4l0u", SHORT), ("passwordpassword", COMMON), ("aaaaaaaaaaaaaaaa", FEW)]:
        form = {"password": PASSWORD, "new_password": password}
        refused = ask(call, "PUT", "/password", form, cookie=cookie)
        assert (refused.status, refused.json) == (400, {"message": reason})
        assert "Set-Cookie" not in refused.headers
    assert ask(call, "POST", "/sessions", FORM).status == 200


# Who may create an account


@pytest.mark.parametrize(
    ("registration", "message"),
    [("closed", "registration is closed"), ("invitation", "registration is by invitation only")],
)
def test_registration_can_be_closed_or_by_invitation_only(
    database: str, clock: Clock, capsys: pytest.CaptureFixture[str], registration: str, message: str
) -> None:
    settings = production_settings(database, registration=registration)
    db = DB(settings.database)
    auth = Auth(db, settings, clock)
    call = Client(create_app(settings, auth))
    token, _ = auth.link_token(auth.add_account(BOB))
    # The answer does not reveal which emails have an account.
    for email in (BOB, "new@x.io", "nope"):
        for form in ({"email": email, "password": PASSWORD}, {"email": email}):  # as where emails are confirmed
            answer = ask(call, "POST", "/users", form)
            assert (answer.status, answer.json) == (403, {"message": message})
    assert [line["event"] for line in log_lines(capsys.readouterr().err)] == ["authz_fail"] * 6
    assert ask(call, "POST", "/sessions", FORM).status == 401
    invited = {"email": BOB, "reset_token": token, "new_password": PASSWORD}
    assert ask(call, "PUT", "/reset_password", invited).status == 200
    assert ask(call, "POST", "/sessions", FORM).status == 200
    db.close()
