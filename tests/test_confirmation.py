"""A confirmed email: registrations that wait for a mailed link, and changes of email. With a real mail server."""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import pytest
import requests
import trustme

import authsvc
import mail
from auth import UNCOUNTED, Auth, Caller, TooManyAttempts
from authsvc import create_app
from mail import Mailer
from settings import Settings
from storage import DB
from tests.accounts import at_once
from tests.conftest import Answer, Client, Clock, Service
from tests.crowd import awaited
from tests.mail_server import MailServer, ignore
from tests.production import PUBLIC_URL, ask, log_lines, production_settings

pytestmark = pytest.mark.slow  # they talk to a real mail server

BOB, EVE, NEW = "Bob@x.io", "eve@x.io", "new@x.io"
PASSWORD, OTHER_PASSWORD = "tarte flambée du dimanche", "choucroute garnie du lundi"
DAY = 86_400
REJECTED = {"message": "invalid confirmation token"}
MAILED = {"message": "confirmation mailed"}


@pytest.fixture(scope="session")
def certificate() -> trustme.LeafCert:
    return trustme.CA().issue_cert("localhost")


@pytest.fixture
def server(certificate: trustme.LeafCert, monkeypatch: pytest.MonkeyPatch) -> Iterator[MailServer]:
    # Each delivery prepares TLS, which this server does not have. Debian's list of authorities takes 25 ms to read.
    monkeypatch.setenv("SSL_CERT_FILE", os.devnull)
    with closing(MailServer(certificate, "smtp")) as server:
        yield server


@pytest.fixture
def settings(database: str, server: MailServer) -> Settings:
    url = f"smtp://127.0.0.1:{server.port}"
    return production_settings(database, smtp_url=url, mail_from="auth@example.com", sessions_per_user=10)


@pytest.fixture
def mailer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Mailer:
    monkeypatch.setattr(mail, "FIRST_DELIVERY", 0.0)
    return Mailer(settings, ignore)


@pytest.fixture
def auth(db: DB, settings: Settings, clock: Clock, mailer: Mailer) -> Auth:
    return Auth(db, settings, clock, mailer=mailer)


@pytest.fixture
def bob(auth: Auth) -> None:
    auth.register_user(BOB, PASSWORD)


def settle(mailer: Mailer) -> None:
    """Wait until the threads have run all tasks that were queued before."""
    done = threading.Event()
    mailer.enqueue(lambda: done.set())
    mailer._reset_sender.start()
    assert awaited(mailer._resets.serves_at_once, 30)
    assert done.wait(30)


def register(call: Client, email: str, **environ: Any) -> Answer:
    return ask(call, "POST", "/users", {"email": email}, **environ)


def confirm(call: Client, email: str, token: str, password: str = PASSWORD) -> Answer:
    return ask(call, "PUT", "/users", {"email": email, "token": token, "password": password})


def sign_in(call: Client, email: str, password: str = PASSWORD) -> int:
    return ask(call, "POST", "/sessions", {"email": email, "password": password}).status


def cookie(auth: Auth, email: str = BOB) -> str:
    return f"__Host-session_id={auth.create_session(email)}"


def request_change(call: Client, held: str, email: str = NEW, password: str = PASSWORD) -> Answer:
    return ask(call, "POST", "/email", {"password": password, "new_email": email}, cookie=held)


def change(call: Client, held: str | None, token: str, email: str = NEW) -> Answer:
    return ask(call, "PUT", "/email", {"email": email, "token": token}, cookie=held)


def link_in(text: str, page: str) -> dict[str, str]:
    """Return the fields in the fragment of the only link to a page."""
    (fragment,) = re.findall(rf"^https?://[^/]*/{page}#(\S+)$", text, re.MULTILINE)
    return {name: value for name, (value,) in parse_qs(fragment, strict_parsing=True).items()}


def next_token(server: MailServer, page: str, email: str) -> str:
    """Return the token in the link of the next mail to an email; mails to others are passed over."""
    while (message := server.next())["To"] != email:
        pass
    link = link_in(message.get_content(), page)
    assert link["email"] == email
    return link["token"]


def registered(call: Client, server: MailServer, email: str) -> str:
    """Ask for an account, and return the token of the link."""
    assert register(call, email).status == 200
    return next_token(server, "confirm", email)


def comparable(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    return answer.status, {**answer.headers, "X-Request-Id": ""}, answer.body


# A registration


@pytest.mark.both_engines
def test_an_account_exists_only_after_its_link_was_used(call: Client, auth: Auth, server: MailServer) -> None:
    answer = ask(call, "POST", "/users", {"email": BOB, "password": OTHER_PASSWORD})
    assert (answer.status, answer.json) == (200, {"email": BOB, **MAILED})
    received = server.next_received()
    assert (received.recipients, received.message["Subject"]) == ([BOB], "Confirm your email at auth.example.com")
    assert sign_in(call, BOB, OTHER_PASSWORD) == 401
    assert list(auth._db.each_user()) == []
    token = link_in(received.message.get_content(), "confirm")["token"]
    assert f"{PUBLIC_URL}/confirm#" in received.message.get_content()
    answer = confirm(call, BOB, token)
    assert (answer.status, answer.json) == (200, {"email": BOB, "message": "email confirmed"})
    assert answer.set_cookies == []
    assert (sign_in(call, BOB), sign_in(call, BOB, OTHER_PASSWORD)) == (200, 401)


@pytest.mark.both_engines
def test_a_free_a_waiting_and_a_taken_email_get_the_same_answer(
    call: Client, bob: None, server: MailServer, mailer: Mailer
) -> None:
    answers = {
        email: comparable(register(call, email)) for email in ("free@x.io", "free@X.io", "gone@x.io", "bob@X.io")
    }
    for email, (status, headers, body) in answers.items():
        assert (status, json.loads(body)) == (200, {"email": email, **MAILED})
        assert headers == {**answers["free@x.io"][1], "Content-Length": str(len(body))}
    settle(mailer)
    assert server.received.qsize() == 4


@pytest.mark.both_engines
def test_the_owner_of_a_taken_email_is_told_without_a_token(
    call: Client, auth: Auth, bob: None, server: MailServer
) -> None:
    register(call, BOB.upper())
    received = server.next_received()
    assert received.recipients == [BOB]  # as it is stored
    text = received.message.get_content()
    assert f"{PUBLIC_URL}/login\n" in text
    assert f"{PUBLIC_URL}/forgot\n" in text
    assert "#" not in text


UNABLE: dict[str, Callable[[Auth], object]] = {
    "invited": lambda auth: auth.add_account(BOB),
    "disabled": lambda auth: auth._db.disable_user(auth.register_user(BOB, PASSWORD).id, 1),
}


@pytest.mark.parametrize("state", UNABLE)
def test_an_owner_who_gets_no_reset_mail_is_not_sent_to_ask_for_one(
    call: Client, auth: Auth, server: MailServer, mailer: Mailer, state: str
) -> None:
    UNABLE[state](auth)
    answers = [comparable(register(call, email)) for email in (BOB, "free@x.io")]
    assert [status for status, *_ in answers] == [200, 200]
    assert answers[0][1].keys() == answers[1][1].keys()
    assert ask(call, "POST", "/reset_password", {"email": BOB}).status == 200
    settle(mailer)
    told, confirmed = drained(server)  # and no reset mail
    assert (told["To"], told["Subject"]) == (BOB, "You have an account at auth.example.com")
    assert "If you have an invitation, open its link" in told.get_content()
    assert "://" not in told.get_content()
    assert confirmed["To"] == "free@x.io"


@pytest.mark.both_engines
def test_a_row_is_stored_for_a_free_and_for_a_taken_email(call: Client, auth: Auth, bob: None, mailer: Mailer) -> None:
    for email in ("free@x.io", BOB):
        register(call, email)
    settle(mailer)
    found = auth._db._engine.read_all("SELECT email_key, length(token_hash) FROM registrations ORDER BY id", {})
    assert found == [("free@x.io", 64), ("bob@x.io", 64)]


@pytest.mark.both_engines
def test_whoever_holds_the_mailbox_chooses_the_password(call: Client, server: MailServer) -> None:
    # A stranger registers the email first, and waits.
    ask(call, "POST", "/users", {"email": BOB, "password": OTHER_PASSWORD})
    strangers = next_token(server, "confirm", BOB)
    own = registered(call, server, BOB)
    assert confirm(call, BOB, own).status == 200
    assert sign_in(call, BOB, OTHER_PASSWORD) == 401
    assert confirm(call, BOB, strangers, OTHER_PASSWORD).status == 403
    assert sign_in(call, BOB) == 200


@pytest.mark.both_engines
@pytest.mark.parametrize("password", ["short", "a" * 1025, "sunshine2026202"])
def test_a_refused_password_leaves_the_token_good(call: Client, server: MailServer, password: str) -> None:
    token = registered(call, server, BOB)
    assert confirm(call, BOB, token, password).status == 400
    assert confirm(call, BOB, token).status == 200


@pytest.mark.both_engines
def test_a_token_is_refused_with_another_email_and_after_its_use(call: Client, server: MailServer) -> None:
    token = registered(call, server, BOB)
    for email, sent in ((EVE, token), (BOB, "nope"), (BOB, token.lower() + "x")):
        answer = confirm(call, email, sent)
        assert (answer.status, answer.json) == (403, REJECTED)
    assert confirm(call, BOB.lower(), token).status == 200
    assert (confirm(call, BOB, token).status, confirm(call, EVE, token).status) == (403, 403)


@pytest.mark.both_engines
@pytest.mark.parametrize(("seconds", "status"), [(DAY - 1, 200), (DAY, 403), (-300, 200), (-301, 403)])
def test_a_registration_is_good_for_a_day(
    call: Client, server: MailServer, clock: Clock, seconds: int, status: int
) -> None:
    token = registered(call, server, BOB)
    clock.advance(seconds)
    assert confirm(call, BOB, token).status == status


@pytest.mark.both_engines
def test_the_newest_five_links_of_an_email_are_good(call: Client, server: MailServer, clock: Clock) -> None:
    tokens = []
    for _ in range(6):
        tokens.append(registered(call, server, BOB))
        clock.advance(1200)
    assert confirm(call, BOB, tokens[0]).status == 403
    assert confirm(call, BOB, tokens[1]).status == 200


@pytest.mark.both_engines
def test_a_stranger_who_registers_an_email_all_day_neither_floods_nor_voids_it(
    call: Client, server: MailServer, mailer: Mailer, clock: Clock, auth: Auth
) -> None:
    for _ in range(2 * 12):  # two hours, every five minutes
        assert register(call, BOB).status == 200
        clock.advance(300)
    settle(mailer)
    assert 3 <= server.received.qsize() <= 3 + 6
    (stored,) = auth._db._engine.read("SELECT count(*) FROM registrations", {})
    assert stored <= 5
    register(call, BOB)
    while server.received.qsize():
        message = server.next()
    clock.advance(600)
    assert confirm(call, BOB, link_in(message.get_content(), "confirm")["token"]).status == 200


@pytest.mark.both_engines
def test_past_the_limit_of_an_email_nothing_is_stored_or_mailed(
    call: Client, auth: Auth, bob: None, server: MailServer, mailer: Mailer
) -> None:
    for email in (EVE, BOB):
        answers = {comparable(register(call, email))[::2] for _ in range(5)}
        assert len(answers) == 1
    settle(mailer)
    assert server.received.qsize() == 6
    assert auth._db._engine.read("SELECT count(*) FROM registrations", {}) == (6,)


def test_a_registration_does_not_use_up_the_reset_mails_of_the_owner(
    call: Client, bob: None, server: MailServer, mailer: Mailer
) -> None:
    for _ in range(5):
        register(call, BOB)
    settle(mailer)
    assert ask(call, "POST", "/reset_password", {"email": BOB}).status == 200
    assert next_token_of_reset(server)


def next_token_of_reset(server: MailServer) -> str:
    while "Reset" not in (message := server.next())["Subject"]:
        pass
    return link_in(message.get_content(), "reset")["token"]


def test_registrations_of_one_address_are_limited(call: Client) -> None:
    answers = [register(call, f"a{n}@x.io", REMOTE_ADDR="192.0.2.7").status for n in range(21)]
    assert answers == [200] * 20 + [429]


@pytest.mark.both_engines
def test_only_an_unknown_token_counts_against_an_address(call: Client, server: MailServer) -> None:
    token = registered(call, server, BOB)
    form = {"email": BOB, "token": "nope", "password": PASSWORD}
    assert [ask(call, "PUT", "/users", form, REMOTE_ADDR="192.0.2.7").status for _ in range(11)] == [403] * 10 + [429]
    assert ask(call, "PUT", "/users", {**form, "token": token}, REMOTE_ADDR="192.0.2.7").status == 200


@pytest.mark.both_engines
def test_of_20_requests_with_one_link_at_once_one_creates_the_account(
    call: Client, auth: Auth, server: MailServer
) -> None:
    token = registered(call, server, BOB)
    passwords = iter(f"{PASSWORD} {number}" for number in range(20))

    def attempt() -> tuple[int, str]:
        password = next(passwords)
        return confirm(call, BOB, token, password).status, password

    results: list[Any] = at_once(20, attempt)
    assert sorted(status for status, _ in results) == [200] + [403] * 19
    (winner,) = [password for status, password in results if status == 200]
    assert sign_in(call, BOB, winner) == 200


@pytest.mark.both_engines
def test_of_several_links_of_one_email_used_at_once_one_creates_the_account(call: Client, server: MailServer) -> None:
    tokens = iter([registered(call, server, BOB) for _ in range(3)] * 3)
    results = at_once(9, lambda: confirm(call, BOB, next(tokens)).status)
    assert sorted(results, key=str) == [200] + [403] * 8


CLAIMS: dict[str, Callable[[Auth], object]] = {
    "invitation": lambda auth: auth.add_account(BOB),
    "import": lambda auth: auth._db.import_users([auth.find_user(EVE)._replace(email=BOB)]),
    "rename": lambda auth: auth.rename(auth.find_user(EVE), BOB),
}


@pytest.mark.both_engines
@pytest.mark.parametrize("claim", CLAIMS)
def test_what_waits_for_an_email_dies_when_somebody_gets_it(
    call: Client, auth: Auth, server: MailServer, claim: str
) -> None:
    auth.register_user(EVE, PASSWORD)
    token, other = registered(call, server, BOB), registered(call, server, "other@x.io")
    CLAIMS[claim](auth)
    assert auth._db._engine.read_all("SELECT email FROM registrations", {}) == [("other@x.io",)]
    assert confirm(call, BOB, token, OTHER_PASSWORD).status == 403
    assert confirm(call, "other@x.io", other).status == 200


@pytest.mark.parametrize("changes", [{"confirm_email": False}, {"registration": "closed"}])
def test_without_confirmation_a_token_is_refused(
    call: Client, auth: Auth, settings: Settings, server: MailServer, changes: dict[str, Any]
) -> None:
    token = registered(call, server, BOB)
    off = replace(settings, **changes)
    answer = confirm(Client(create_app(off, Auth(auth._db, off, auth._clock))), BOB, token)
    assert (answer.status, answer.json) == (403, REJECTED)


def test_without_confirmation_an_account_is_created_at_once(auth: Auth, settings: Settings) -> None:
    off = replace(settings, confirm_email=False)
    call = Client(create_app(off, Auth(auth._db, off, auth._clock)))
    form = {"email": BOB, "password": PASSWORD}
    assert ask(call, "POST", "/users", form).json == {"email": BOB, "message": "user created"}
    assert ask(call, "POST", "/users", form).status == 400


@pytest.mark.parametrize("registration", ["closed", "invitation"])
def test_where_registration_is_not_open_nothing_is_mailed(
    auth: Auth, settings: Settings, mailer: Mailer, server: MailServer, registration: str
) -> None:
    shut = replace(settings, registration=registration)
    call = Client(create_app(shut, Auth(auth._db, shut, auth._clock, mailer=mailer)))
    form = {"email": BOB, "password": PASSWORD}
    assert ask(call, "POST", "/users", form).status == 403
    settle(mailer)
    assert server.received.empty()


@pytest.mark.parametrize("email", ["a b@x.io", "é@x.io", "a@x.io,b@x.io", "a" * 255, " "])
def test_an_email_that_is_no_mailbox_is_refused(call: Client, email: str) -> None:
    assert register(call, email).status == 400


def test_a_development_service_mails_a_link_to_where_it_listens(
    auth: Auth, server: MailServer, settings: Settings
) -> None:
    url = f"smtp://127.0.0.1:{server.port}"
    local = Settings(database=settings.database, smtp_url=url, mail_from="auth@x.io", confirm_email=True)
    call = Client(create_app(local, Auth(auth._db, local, mailer=Mailer(local, ignore))))
    assert call("POST", "/users", {"email": BOB, "password": "b4l0u"}).json == {"email": BOB, **MAILED}
    text = server.next().get_content()
    assert "http://127.0.0.1:5000/confirm#" in text
    form = {"email": BOB, "token": link_in(text, "confirm")["token"], "password": "b4l0u"}
    assert call("PUT", "/users", form).status == 200


# A change of email


@pytest.fixture
def held(auth: Auth, bob: None) -> str:
    """The cookie of a session of Bob's."""
    return cookie(auth)


@pytest.mark.both_engines
def test_a_confirmed_change_gives_the_user_the_new_email(
    call: Client, auth: Auth, held: str, server: MailServer, capsys: pytest.CaptureFixture[str]
) -> None:
    other = cookie(auth)
    answer = request_change(call, held)
    assert (answer.status, answer.json) == (200, MAILED)
    mails = {message["To"]: message for message in (server.next(), server.next())}
    assert mails[BOB]["Subject"] == "A new email address was requested at auth.example.com"
    assert all(BOB in text and NEW in text for text in (message.get_content() for message in mails.values()))
    assert f"{PUBLIC_URL}/change#" in mails[NEW].get_content()
    assert "#" not in mails[BOB].get_content()
    answer = change(call, held, link_in(mails[NEW].get_content(), "change")["token"])
    assert (answer.status, answer.json) == (200, {"email": NEW, "message": "email changed"})
    told = server.next()
    assert (told["To"], told["Subject"]) == (BOB, f"Your email was changed to {NEW} at auth.example.com")
    text = " ".join(told.get_content().split())
    assert "Ask the operator of auth.example.com" in text
    assert "reset your password" not in text  # a link would go to the new email
    renewed = f"__Host-session_id={answer.session_id}"
    profiles = [ask(call, "GET", "/profile", cookie=one) for one in (held, other, renewed)]
    assert [one.status for one in profiles] == [403, 403, 200]
    assert profiles[2].json == {"email": NEW}
    assert (sign_in(call, NEW), sign_in(call, BOB)) == (200, 401)
    events = [line for line in log_lines(capsys.readouterr().err) if line["event"].startswith("user_upd")]
    assert [(line["event"], line["user_id"], line["changed"]) for line in events] == [
        ("user_update_requested", 1, "email"),
        ("user_updated", 1, "email"),
    ]


@pytest.mark.both_engines
def test_a_change_of_email_ends_reset_tokens(call: Client, auth: Auth, held: str, server: MailServer) -> None:
    reset = auth.get_reset_password_token(BOB)
    request_change(call, held)
    assert change(call, held, next_token(server, "change", NEW)).status == 200
    form = {"email": NEW, "reset_token": reset, "new_password": OTHER_PASSWORD}
    assert ask(call, "PUT", "/reset_password", form).status == 403


@pytest.mark.both_engines
def test_a_taken_email_gets_the_same_answer_and_no_mail(
    call: Client, auth: Auth, held: str, server: MailServer, mailer: Mailer
) -> None:
    auth.register_user(EVE, PASSWORD)
    assert comparable(request_change(call, held, EVE)) == comparable(request_change(call, held))
    settle(mailer)
    assert sorted(server.next()["To"] for _ in range(server.received.qsize())) == [BOB, BOB, NEW]


@pytest.mark.both_engines
def test_only_the_session_that_asked_can_confirm(call: Client, auth: Auth, held: str, server: MailServer) -> None:
    # Eve asks for Bob's second address; he opens the link in his own session.
    auth.register_user(EVE, PASSWORD)
    eve, other_of_bob = cookie(auth, EVE), cookie(auth)
    request_change(call, eve)
    token = next_token(server, "change", NEW)
    for one in (held, other_of_bob, cookie(auth, EVE), None):
        assert change(call, one, token).status == 403
    assert [user.email for user in auth._db.each_user()] == [BOB, EVE]
    assert change(call, eve, token).status == 200


ENDINGS: dict[str, Callable[[Auth, str], object]] = {
    "reset": lambda auth, held: auth.update_password(auth.get_reset_password_token(BOB), OTHER_PASSWORD),
    "sign out": lambda auth, held: auth.log_out(held),
    "disable": lambda auth, held: auth._db.disable_user(1, 1),
    "sessions end": lambda auth, held: auth._db.end_sessions(1, devices=True),
    "sessions end --all": lambda auth, held: auth._db.end_all_sessions(),
    "rename": lambda auth, held: auth.rename(auth.find_user(BOB), "renamed@x.io"),
}


@pytest.mark.both_engines
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_pending_change_dies_with_its_session(
    call: Client, auth: Auth, held: str, server: MailServer, ending: str
) -> None:
    request_change(call, held)
    token = next_token(server, "change", NEW)
    ENDINGS[ending](auth, held.partition("=")[2])
    assert change(call, held, token).status == 403
    assert auth._db._engine.read("SELECT count(*) FROM email_changes", {}) == (0,)


@pytest.mark.both_engines
def test_a_pending_change_dies_when_its_session_changes_the_password(
    call: Client, auth: Auth, held: str, server: MailServer
) -> None:
    request_change(call, held)
    token = next_token(server, "change", NEW)
    form = {"password": PASSWORD, "new_password": OTHER_PASSWORD}
    renewed = f"__Host-session_id={ask(call, 'PUT', '/password', form, cookie=held).session_id}"
    assert change(call, renewed, token).status == 403
    assert ask(call, "GET", "/profile", cookie=renewed).json == {"email": BOB}


@pytest.mark.both_engines
def test_a_change_that_waits_for_the_mail_thread_dies_with_the_password(
    call: Client, auth: Auth, held: str, server: MailServer, mailer: Mailer
) -> None:
    release, running = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert release.wait(30)

    mailer.enqueue_reset(hold, ("test",) * 5, known=True, limited=False)
    assert running.wait(5)
    request_change(call, held)
    auth.change_password(held.partition("=")[2], PASSWORD, OTHER_PASSWORD, caller=UNCOUNTED)
    release.set()
    settle(mailer)
    assert auth._db._engine.read("SELECT count(*) FROM email_changes", {}) == (0,)
    assert NEW not in [server.next()["To"] for _ in range(server.received.qsize())]


@pytest.mark.both_engines
@pytest.mark.parametrize(("seconds", "status"), [(3599, 200), (3600, 403), (-301, 403)])
def test_a_change_is_good_for_an_hour(
    call: Client, held: str, server: MailServer, clock: Clock, seconds: int, status: int
) -> None:
    request_change(call, held)
    token = next_token(server, "change", NEW)
    clock.advance(seconds)
    assert change(call, held, token).status == status


@pytest.mark.both_engines
def test_a_newer_change_replaces_the_one_of_its_session(call: Client, held: str, server: MailServer) -> None:
    request_change(call, held)
    first = next_token(server, "change", NEW)
    request_change(call, held, "newer@x.io")
    second = next_token(server, "change", "newer@x.io")
    assert change(call, held, first).status == 403
    assert change(call, held, second).status == 403  # of another email
    assert change(call, held, second, "Newer@x.io").status == 200
    assert ask(call, "POST", "/sessions", {"email": "newer@x.io", "password": PASSWORD}).status == 200


@pytest.mark.both_engines
def test_an_email_that_was_taken_meanwhile_is_refused(call: Client, auth: Auth, held: str, server: MailServer) -> None:
    request_change(call, held)
    token = next_token(server, "change", NEW)
    auth.register_user(NEW.upper(), PASSWORD)
    answer = change(call, held, token)
    assert (answer.status, answer.json) == (403, REJECTED)
    assert ask(call, "GET", "/profile", cookie=held).json == {"email": BOB}


@pytest.mark.both_engines
def test_a_confirmed_change_deletes_registrations_that_wait_for_the_email(
    call: Client, auth: Auth, held: str, server: MailServer
) -> None:
    strangers = registered(call, server, NEW)
    request_change(call, held)
    assert change(call, held, next_token(server, "change", NEW)).status == 200
    assert auth._db._engine.read("SELECT count(*) FROM registrations", {}) == (0,)
    assert confirm(call, NEW, strangers, OTHER_PASSWORD).status == 403


@pytest.mark.parametrize(
    ("form", "status", "message"),
    [
        ({"password": "wrong", "new_email": NEW}, 403, "wrong password"),
        ({"password": PASSWORD, "new_email": "a b@x.io"}, 400, None),
        ({"password": PASSWORD}, 400, "new_email is missing"),
        ({"new_email": NEW}, 400, "password is missing"),
    ],
)
def test_a_refused_request_for_a_change_mails_nothing(
    call: Client, held: str, server: MailServer, mailer: Mailer, form: dict[str, str], status: int, message: str | None
) -> None:
    answer = ask(call, "POST", "/email", form, cookie=held)
    assert answer.status == status
    assert message in (None, answer.json["message"])
    settle(mailer)
    assert server.received.empty()


@pytest.mark.both_engines
def test_a_user_can_ask_for_five_changes_a_day(call: Client, auth: Auth, held: str, clock: Clock) -> None:
    answers = [request_change(call, held, f"new{n}@x.io").status for n in range(6)]
    assert answers == [200] * 5 + [429]
    clock.advance(DAY // 5)
    assert [request_change(call, held, f"new{n}@x.io").status for n in (6, 7)] == [200, 429]
    other = cookie(auth).partition("=")[2]
    with pytest.raises(TooManyAttempts):  # in another session of the user, too
        auth.begin_email_change(other, PASSWORD, NEW, caller=Caller("192.0.2.1"))


@pytest.mark.both_engines
def test_one_email_gets_three_mails_of_changes(
    call: Client, auth: Auth, held: str, server: MailServer, mailer: Mailer
) -> None:
    auth.register_user(EVE, PASSWORD)
    eve = cookie(auth, EVE)
    answers = {request_change(call, one).body for one in (held, eve, held, eve, held)}
    assert len(answers) == 1
    settle(mailer)
    assert [server.next()["To"] for _ in range(server.received.qsize())].count(NEW) == 3


@pytest.mark.parametrize(
    ("production", "environ", "status"),
    [
        (True, {"REMOTE_ADDR": "127.0.0.1"}, 403),
        (False, {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:5000"}, 200),
        (False, {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "evil.example"}, 403),
        (False, {"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": "127.0.0.1:5000", "HTTP_X_FORWARDED_FOR": "192.0.2.1"}, 403),
    ],
    ids=["production", "development", "rebound name", "proxy"],
)
def test_without_a_mail_server_only_a_program_on_this_machine_gets_the_token(
    db: DB, settings: Settings, clock: Clock, production: bool, environ: dict[str, Any], status: int
) -> None:
    without = replace(settings, smtp_url="", mail_from="")
    without = without if production else replace(without, public_url="")
    auth = Auth(db, without, clock)
    auth.register_user(BOB, PASSWORD)
    call, name = Client(create_app(without, auth)), "__Host-session_id" if production else "session_id"
    held = f"{name}={auth.create_session(BOB)}"
    answer = call("POST", "/email", {"password": PASSWORD, "new_email": NEW}, cookie=held, **environ)
    assert answer.status == status
    if status == 403:
        assert answer.json == {"message": "no mail can be sent"}
        return
    assert answer.json.keys() == {"email", "token"}
    answer = call("PUT", "/email", answer.json, cookie=held, **environ)
    assert (answer.status, answer.json) == (200, {"email": NEW, "message": "email changed"})


# Emails that were given up


def changed_to(call: Client, server: MailServer, held: str, email: str) -> str:
    """Change the email of a session; return its new cookie."""
    request_change(call, held, email)
    answer = change(call, held, next_token(server, "change", email), email)
    assert answer.status == 200
    return f"__Host-session_id={answer.session_id}"


GIVEN_UP: dict[str, Callable[[Auth, str], object]] = {
    "rename": lambda auth, held: auth.rename(auth.find_user(BOB), NEW),
    "deletion": lambda auth, held: auth.delete_account(held, PASSWORD, caller=UNCOUNTED),
    "operator's deletion": lambda auth, held: auth._db.delete_user(1, auth.reserved_at()),
}


@pytest.mark.both_engines
@pytest.mark.parametrize("kind", GIVEN_UP)
def test_an_email_that_was_given_up_is_reserved_for_90_days(
    call: Client, auth: Auth, settings: Settings, held: str, server: MailServer, mailer: Mailer, clock: Clock, kind: str
) -> None:
    GIVEN_UP[kind](auth, held.partition("=")[2])
    off = replace(settings, confirm_email=False)
    unconfirmed = Client(create_app(off, Auth(auth._db, off, clock)))
    form = {"email": BOB.upper(), "password": OTHER_PASSWORD}
    clock.advance(90 * DAY - 1)
    assert comparable(register(call, BOB))[::2] == (200, json.dumps({"email": BOB, **MAILED}).encode())
    answer = ask(unconfirmed, "POST", "/users", form)
    assert (answer.status, answer.json) == (400, {"message": "email already registered"})
    settle(mailer)
    assert [one for one in drained(server) if "Confirm" in one["Subject"]] == []
    clock.advance(1)
    assert ask(unconfirmed, "POST", "/users", form).status == 200
    assert max(user.id for user in auth._db.each_user()) > 1


def drained(server: MailServer) -> list[Any]:
    return [server.next() for _ in range(server.received.qsize())]


@pytest.mark.both_engines
def test_nobody_gets_an_email_while_it_is_given_up(auth: Auth, settings: Settings) -> None:
    with closing(DB(settings.database)) as copy:
        for number in range(20):
            email = f"bob{number}@x.io"
            user = auth.register_user(email, PASSWORD)
            tasks = iter([
                lambda user=user: auth._db.delete_user(user.id, auth.reserved_at()),
                lambda email=email: copy.add_user(email, b"hash", auth.reserved_at()),
            ])  # fmt: skip
            results = at_once(2, lambda tasks=tasks: next(tasks)())  # type: ignore[misc]
            assert sorted(type(result).__name__ for result in results if result)[-1:] in (
                ["AlreadyExists"],
                ["EmailReserved"],
            )


@pytest.mark.both_engines
def test_a_registration_begun_before_cannot_take_an_email_that_was_given_up(
    call: Client, auth: Auth, held: str, server: MailServer
) -> None:
    auth._db.emails.add_registration(auth._link(BOB, "token", DAY))  # a stranger's, from before the change
    auth.rename(auth.find_user(BOB), NEW)
    assert confirm(call, BOB, "token").status == 403
    auth._db.emails.release(BOB)
    assert confirm(call, BOB, "token").status == 200


@pytest.mark.both_engines
def test_only_the_former_owner_can_return_to_an_email(
    call: Client, auth: Auth, held: str, server: MailServer, mailer: Mailer
) -> None:
    auth.register_user(EVE, PASSWORD)
    renewed = changed_to(call, server, held, NEW)
    request_change(call, cookie(auth, EVE), BOB)
    settle(mailer)
    assert BOB not in [one["To"] for one in drained(server) if "Confirm" in one["Subject"]]
    changed_to(call, server, renewed, BOB)
    assert [user.email for user in auth._db.each_user()] == [BOB, EVE]


def test_in_development_no_email_is_reserved(db: DB, settings: Settings, clock: Clock) -> None:
    auth = Auth(db, replace(settings, public_url="", smtp_url="", mail_from=""), clock)
    auth.register_user(BOB, "b4l0u")
    auth.delete_account(auth.create_session(BOB), "b4l0u", caller=UNCOUNTED)
    assert auth.register_user(BOB, "b4l0u").id == 2


# Processes


@pytest.mark.both_engines
def test_what_was_confirmed_survives_a_killed_copy_and_is_not_confirmed_twice(
    start: Callable[..., Service], server: MailServer
) -> None:
    mailing = {
        "AUTHSVC_SMTP_URL": f"smtp://127.0.0.1:{server.port}",
        "AUTHSVC_MAIL_FROM": "auth@example.com",
        "AUTHSVC_CONFIRM_EMAIL": "on",
    }
    copies = [start(**mailing) for _ in range(2)]

    def put(copy: Service, email: str, token: str) -> int:
        form = {"email": email, "token": token, "password": PASSWORD}
        return requests.put(f"{copy.url}/users", form, timeout=30).status_code

    tokens = {}
    for email in ("a@x.io", "b@x.io", "c@x.io"):
        assert (
            requests.post(f"{copies[0].url}/users", {"email": email}, timeout=30).json()["message"] == MAILED["message"]
        )
        tokens[email] = next_token(server, "confirm", email)
    assert put(copies[0], "a@x.io", tokens["a@x.io"]) == 200
    copies[0].end(9)
    assert put(copies[1], "a@x.io", tokens["a@x.io"]) == 403
    copies[0].start()
    chosen = iter(copies * 10)
    assert sorted(at_once(20, lambda: put(next(chosen), "b@x.io", tokens["b@x.io"])), key=str) == [200] + [403] * 19
    assert put(copies[0], "c@x.io", tokens["c@x.io"]) == 200
    for email in tokens:
        form = {"email": email, "password": PASSWORD}
        assert requests.post(f"{copies[1].url}/sessions", form, timeout=30).status_code == 200


@pytest.mark.both_engines
def test_an_email_is_changed_once_by_two_copies_and_survives_their_kill(start: Callable[..., Service]) -> None:
    copies = [start() for _ in range(2)]
    form = {"email": BOB, "password": PASSWORD}
    assert requests.post(f"{copies[0].url}/users", form, timeout=30).status_code == 200
    cookies = requests.post(f"{copies[0].url}/sessions", form, timeout=30).cookies
    asked = {"password": PASSWORD, "new_email": NEW}
    link = requests.post(f"{copies[0].url}/email", asked, cookies=cookies, timeout=30).json()
    urls = iter([copy.url for copy in copies] * 8)
    answers = at_once(16, lambda: requests.put(f"{next(urls)}/email", link, cookies=cookies, timeout=30).status_code)
    assert [copy.end(9) for copy in copies] == [-9, -9]
    assert sorted(answers, key=str) == [200] + [403] * 15
    copies[1].start()
    found = [requests.post(f"{copies[1].url}/sessions", form | {"email": email}, timeout=30) for email in (BOB, NEW)]
    assert [answer.status_code for answer in found] == [401, 200]


@pytest.mark.parametrize(
    "environ", [{"AUTHSVC_CONFIRM_EMAIL": "on"}, {"AUTHSVC_CONFIRM_EMAIL": "on", "AUTHSVC_PUBLIC_URL": "https://x.io"}]
)
def test_confirmation_without_a_mail_server_stops_the_start(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert authsvc.main(["check"]) == 2
    assert "AUTHSVC_CONFIRM_EMAIL" in capsys.readouterr().err


# Times


@pytest.mark.timing
@pytest.mark.parametrize("reachable", [True, False], ids=["mail server up", "mail server down"])
def test_the_time_of_an_answer_does_not_reveal_whether_an_email_is_known(
    settings: Settings, clock: Clock, db: DB, reachable: bool
) -> None:
    settings = settings if reachable else replace(settings, smtp_url="smtp://127.0.0.1:9")
    mailer, count = Mailer(settings, ignore), 100
    auth = Auth(db, settings, clock, mailer=mailer)
    call = Client(create_app(settings, auth))
    for number in range(count):
        db.add_user(f"known{number}@x.io", b"hash")
        db.emails.add_registration(auth._link(f"waiting{number}@x.io", f"token{number}", DAY))

    took: dict[str, list[float]] = {"known": [], "waiting": [], "unknown": []}
    rounds: list[dict[str, float]] = []
    while len(rounds) < 5 and not (rounds and max(rounds[-1].values()) <= 1.1 * min(rounds[-1].values())):
        for number in range(count):
            # In a random order: the threads that send the mails of one request may delay the next one.
            for kind in random.sample(sorted(took), 3):
                began = time.perf_counter()
                assert register(call, f"{kind}{number}@x.io").status == 200
                took[kind].append(time.perf_counter() - began)
        mailer._resets.remove(lambda _: True)  # the next round begins like this one
        rounds.append({kind: statistics.median(times) for kind, times in took.items()})  # of all rounds so far
    assert max(rounds[-1].values()) <= 1.1 * min(rounds[-1].values()), rounds
