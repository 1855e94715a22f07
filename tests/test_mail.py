"""Outgoing mail, sent to a real mail server with TLS in this process."""

from __future__ import annotations

import functools
import json
import queue
import random
import re
import smtplib
import socket
import ssl
import statistics
import string
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from email import message_from_bytes
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import requests
import trustme

import authsvc
import mail
from auth import UNCOUNTED, Auth, AuthError, Caller
from authsvc import create_app
from cli import commands
from credentials import totp
from mail import ANSWER_FIRST, Mailer
from settings import Settings, SettingsError
from storage import DB, User
from tables.passkeys import NEW_FOR
from tests.authenticator import Authenticator
from tests.conftest import HERE, Answer, Client, Clock, Service
from tests.crowd import awaited
from tests.mail_server import SMTP_PASSWORD, USER, MailServer, smtp_url
from tests.production import PUBLIC_URL, production_settings
from web.languages import LANGUAGES

pytestmark = pytest.mark.slow  # they talk to a real mail server

CLIENT = "192.0.2.1"
BOB, PASSWORD, NEW_PASSWORD = "Bob@x.io", "tarte flambée du dimanche", "choucroute garnie du lundi"
SUBJECT = "Reset your password at auth.example.com"


class Log:
    """The log of a mailer; ``next`` waits for a line."""

    def __init__(self) -> None:
        self.lines: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self.text = ""

    def __call__(self, event: str, **details: Any) -> None:
        self.text += json.dumps([event, details]) + "\n"
        self.lines.put((event, details))

    def next(self) -> tuple[str, dict[str, Any]]:
        return self.lines.get(timeout=5)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def authority_file(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return str(path)


@pytest.fixture(scope="session")
def certificate(authority: trustme.CA) -> trustme.LeafCert:
    return authority.issue_cert("localhost")


@pytest.fixture(autouse=True)
def _trusted(authority_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", authority_file)


@pytest.fixture(autouse=True)
def _no_first_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a task without a mail take no time until a mail was sent, so that most tests need not wait."""
    monkeypatch.setattr(mail, "FIRST_DELIVERY", 0.0)


@pytest.fixture
def start_server(certificate: trustme.LeafCert) -> Iterator[Callable[..., MailServer]]:
    """Start mail servers; they are stopped after the test."""
    started: list[MailServer] = []

    def start_one(
        scheme: str = "smtp+starttls", certificate: trustme.LeafCert = certificate, **options: Any
    ) -> MailServer:
        started.append(MailServer(certificate, scheme, **options))
        return started[-1]

    yield start_one
    for one in started:
        one.close()


@pytest.fixture
def server(start_server: Callable[..., MailServer]) -> MailServer:
    return start_server()


@pytest.fixture
def closed() -> Iterator[socket.socket]:
    """A socket with a port of its own, which refuses connections until a server listens on it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def port_of(bound: socket.socket) -> int:
    return int(bound.getsockname()[1])


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., Settings]:
    """Make settings of a production service that sends mail through a server."""
    (tmp_path / "password").write_text(SMTP_PASSWORD + "\n")

    def make(url: str, database: str = "unused") -> Settings:
        return production_settings(
            database, smtp_url=url, smtp_password_file=str(tmp_path / "password"), mail_from="auth@example.com"
        )

    return make


@pytest.fixture
def settings(settings_for: Callable[..., Settings], server: MailServer, database: str) -> Settings:
    return settings_for(server.url, database)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def mailer(settings_for: Callable[..., Settings], server: MailServer, log: Log) -> Mailer:
    return Mailer(settings_for(server.url), log)


@pytest.fixture
def auth(db: DB, settings: Settings, clock: Clock, mailer: Mailer) -> Auth:
    auth = Auth(db, settings, clock, mailer=mailer)
    auth.register_user(BOB, PASSWORD)
    return auth


def ask(call: Client, email: str = BOB, client: str = CLIENT, **environ: Any) -> Answer:
    """Request a reset mail."""
    return call("POST", "/reset_password", {"email": email}, REMOTE_ADDR=client, **environ)


def enqueue_reset(mailer: Mailer, task: mail.Task, known: bool = True) -> None:
    """Queue a task like a request for a reset mail."""
    mailer.enqueue_reset(task, ("test",) * 5, known=known, limited=False)


def settle(mailer: Mailer) -> None:
    """Wait until the worker threads have run all tasks that were queued before."""
    done = threading.Event()
    mailer.enqueue(done.set)
    mailer._reset_sender.start()
    assert awaited(mailer._resets.serves_at_once, 30)
    assert done.wait(30)


@contextmanager
def resets_held(mailer: Mailer) -> Iterator[None]:
    """Let no task of a reset run meanwhile."""
    release, running = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert release.wait(30)

    enqueue_reset(mailer, hold)
    assert running.wait(5)
    try:
        yield
    finally:
        release.set()


def count_mails(mailer: Mailer, server: MailServer) -> int:
    """Return how many mails arrived, once all tasks have run."""
    settle(mailer)
    return server.received.qsize()


def link_of(message: EmailMessage) -> dict[str, str]:
    """Return the fields in the fragment of the only link in a mail."""
    (fragment,) = re.findall(rf"^{PUBLIC_URL}/reset#(\S+)$", message.get_content(), re.MULTILINE)
    return {name: value for name, (value,) in parse_qs(fragment, strict_parsing=True).items()}


def confirm(call: Client, token: str, password: str = NEW_PASSWORD) -> int:
    form = {"email": BOB, "reset_token": token, "new_password": password}
    return call("PUT", "/reset_password", form, REMOTE_ADDR=CLIENT).status


def test_the_database_is_closed_when_the_mail_that_is_being_written_is_complete(
    settings: Settings, mailer: Mailer
) -> None:
    auth = Auth(DB(settings.database), settings, mailer=mailer)
    begun, going_on, found = threading.Event(), threading.Event(), queue.SimpleQueue[list[object]]()

    def task() -> None:
        begun.set()
        going_on.wait(10)
        found.put([*auth.prune()])  # reads the database

    enqueue_reset(mailer, task)
    assert begun.wait(10)
    closing = threading.Thread(target=auth.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    going_on.set()
    assert found.get(timeout=10) == []
    closing.join(10)
    assert not closing.is_alive()
    enqueue_reset(mailer, task)  # it waits until the process ends, as the database is closed
    with pytest.raises(queue.Empty):
        found.get(timeout=0.1)


@pytest.mark.parametrize(
    ("user", "password", "problem"),
    [
        (USER, "pässwörd", "AUTHSVC_SMTP_PASSWORD_FILE names a password that is not ASCII: set another password"),
        ("pöst@example.com", "p", "AUTHSVC_SMTP_URL names a user that is not ASCII: set another user"),
    ],
)
def test_a_login_that_smtp_cannot_send_is_refused_at_the_start(
    settings_for: Callable[..., Settings], tmp_path: Path, log: Log, user: str, password: str, problem: str
) -> None:
    settings = settings_for(f"smtps://{quote(user, safe='')}@localhost:1")
    (tmp_path / "password").write_text(password, encoding="utf-8")
    with pytest.raises(SettingsError) as refusal:
        Mailer(settings, log)
    assert str(refusal.value) == f"{problem} at the mail server"
    assert commands._mail_problems(settings) == [f"{problem} at the mail server"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf%b\r\n", b"%b\n", b"%b"])
def test_a_password_file_of_any_editor_signs_in(
    server: MailServer, settings_for: Callable[..., Settings], tmp_path: Path, log: Log, content: bytes
) -> None:
    settings = settings_for(server.url)
    (tmp_path / "password").write_bytes(content % SMTP_PASSWORD.encode())
    Mailer(settings, log).check()
    assert server.logins == [(USER.encode(), SMTP_PASSWORD.encode())]


# Contents and recipients


@pytest.mark.both_engines
def test_a_reset_is_mailed_to_the_stored_address(call: Client, server: MailServer) -> None:
    assert ask(call, "BOB@X.IO").status == 200
    by, recipients, message = server.next_received()
    assert (by, recipients) == ("auth@example.com", [BOB])
    assert (message["From"], message["To"], message["Subject"]) == ("auth@example.com", BOB, SUBJECT)
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Message-ID"].endswith("@example.com>")


def test_the_mailed_link_resets_the_password(call: Client, server: MailServer) -> None:
    ask(call)
    link = link_of(server.next())
    assert link.keys() == {"token", "email"}
    assert link["email"] == BOB
    assert confirm(call, link["token"]) == 200
    form = {"email": BOB, "password": NEW_PASSWORD}
    assert call("POST", "/sessions", form, REMOTE_ADDR=CLIENT).status == 200


def test_no_request_header_appears_in_a_mail(call: Client, server: MailServer) -> None:
    evil = "evil.example"
    forged = {
        "HTTP_HOST": evil,
        "HTTP_X_FORWARDED_HOST": evil,
        "HTTP_X_FORWARDED_SERVER": evil,
        "HTTP_FORWARDED": f"host={evil}",
        "HTTP_REFERER": f"https://{evil}",
        "HTTP_USER_AGENT": evil,
        "HTTP_ACCEPT_LANGUAGE": evil,
        "SERVER_NAME": evil,
    }
    assert ask(call, **forged).status == 200
    assert evil not in server.next().as_string()


@pytest.mark.parametrize("address", ["o'brien@x.io", "bob+tag@x.io", "a&b$c`d`!e@x.io", "--bob@x.io", "b%40b@x.io"])
def test_the_link_in_a_mail_preserves_an_unusual_email(mailer: Mailer, address: str) -> None:
    assert link_of(mailer.compose("reset", address, token="to-ken_0")) == {"token": "to-ken_0", "email": address}


@pytest.mark.parametrize(("seconds", "text"), [(30, "1 minute"), (119, "1 minute"), (600, "10 minutes")])
def test_a_reset_mail_states_the_lifetime_of_its_link(log: Log, seconds: int, text: str) -> None:
    settings = production_settings(smtp_url="smtps://localhost", mail_from="auth@example.com", reset_lifetime=seconds)
    message = Mailer(settings, log).compose("reset", BOB, token="to-ken_0")
    assert f" works once and expires in {text}. A newer mail replaces it:" in message.get_content()


def test_a_password_reset_is_notified_by_mail(call: Client, server: MailServer) -> None:
    ask(call)
    token = link_of(server.next())["token"]
    confirm(call, token)
    _, recipients, message = server.next_received()
    assert (recipients, message["Subject"]) == ([BOB], "Your password was changed at auth.example.com")
    assert token not in message.as_string()
    assert NEW_PASSWORD not in message.get_content()


def test_a_refused_reset_sends_no_mail(call: Client, server: MailServer, mailer: Mailer) -> None:
    assert confirm(call, "wrong") == 403
    assert count_mails(mailer, server) == 0


def sign_in(auth: Auth, otp: str = "", **details: Any) -> tuple[User, str]:
    """Sign Bob in, in a new browser unless ``details`` has a device cookie; return him and the session."""
    user, session_id, _ = auth.log_in(BOB, PASSWORD, otp, **{"caller": Caller(CLIENT), **details})
    return user, session_id


def with_factor(auth: Auth, clock: Clock) -> list[str]:
    """Switch a second factor on and drop the mail about it; return the recovery codes."""
    seed, _, _, session_id = auth.begin_totp(auth.create_session(BOB), PASSWORD, caller=UNCOUNTED)
    return auth.confirm_totp(session_id, totp.code(seed, int(clock()) // totp.STEP), caller=UNCOUNTED)[2]


@pytest.mark.both_engines
def test_a_sign_in_from_a_new_browser_is_told_by_mail(
    auth: Auth, clock: Clock, mailer: Mailer, server: MailServer
) -> None:
    user, _ = sign_in(auth)  # the first one of the account
    device = auth.device_cookie(user, None)
    sign_in(auth, caller=Caller(CLIENT, device))
    assert count_mails(mailer, server) == 0
    sign_in(auth, caller=Caller("2001:db8::1", "1.1.full.0.0", agent="Brows\0er/1 <b>é http://evil.example a@b"))
    subject, text = next_notice(server)
    assert subject == "Sign-in from a new browser"
    assert text.startswith(f"Sign-in from a new browser: {BOB} at auth.example.com.\n")
    assert (
        "\nTime: 2027-01-15 08:00 UTC\nIP address: 2001:db8::1\nBrowser: Browser/1 <b>? http?evil?example a?b\n" in text
    )
    assert f"\n{PUBLIC_URL}/account\n" in text
    assert PASSWORD not in text
    with pytest.raises(AuthError):
        auth.log_in(BOB, "wrong", caller=Caller(CLIENT))
    assert count_mails(mailer, server) == 0


FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:109.0) Gecko/20100101 Firefox/115.0"


@pytest.mark.parametrize(
    ("agent", "told"),
    [
        (FIREFOX, FIREFOX),
        ("www.evil.example", "www?evil?example"),
        ("see EVIL.EXAMPLE/login", "see EVIL?EXAMPLE/login"),
        ("//evil.1x.example", "//evil.1x?example"),
        ("https://1.2.3.4/", "https?1.2.3.4/"),
        ("mailto:a@evil", "mailto:a?evil"),
        (r"\\evil\share", "??evil?share"),
        ("evil\u3002example", "evil?example"),
    ],
)
def test_the_name_of_a_browser_is_no_link_in_a_mail(auth: Auth, server: MailServer, agent: str, told: str) -> None:
    sign_in(auth)
    sign_in(auth, caller=Caller(CLIENT, agent=agent))
    assert f"\nBrowser: {told}\n" in next_notice(server)[1]


@pytest.mark.parametrize("state", ["no mail server", "development"])
def test_a_new_browser_is_not_told_where_it_cannot_be(
    db: DB, settings: Settings, clock: Clock, mailer: Mailer, server: MailServer, state: str
) -> None:
    if state == "development":
        settings = Settings(database=settings.database, bcrypt_cost=4)
    auth = Auth(db, settings, clock, mailer=mailer if state == "development" else None)
    auth.register_user(BOB, PASSWORD)
    for _ in range(7):
        sign_in(auth)
    auth.mail_summaries()
    assert count_mails(mailer, server) == 0
    assert db.untold_logins() == []


@pytest.mark.both_engines
def test_beyond_five_new_browsers_a_day_a_summary_counts_the_rest(
    auth: Auth, db: DB, settings: Settings, clock: Clock, mailer: Mailer, server: MailServer
) -> None:
    def told() -> list[str]:
        return [
            server.next()["Subject"].replace("auth.example.com", "HOST") for _ in range(count_mails(mailer, server))
        ]

    for _ in range(8):
        sign_in(auth)
    assert told() == ["Sign-in from a new browser at HOST"] * 5
    restarted = Auth(db, settings, clock, mailer=mailer)
    restarted.mail_summaries()
    assert told() == ["More sign-ins from new browsers at HOST: 2"]
    sign_in(auth)
    for _ in range(23):
        clock.advance(3600)
        restarted.mail_summaries()
    assert told() == []  # one a day
    clock.advance(3600)
    restarted.mail_summaries()
    text = server.next().get_content()
    assert text.startswith(f"Further sign-ins to {BOB} at auth.example.com from new browsers: 1.\n\nIf it was you, ")
    restarted.mail_summaries()
    assert told() == []


def test_the_hourly_round_mails_the_summary(
    auth: Auth, mailer: Mailer, server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(7):
        sign_in(auth)
    assert count_mails(mailer, server) == 5
    stopping = threading.Event()
    pruning = authsvc._start_pruning(auth, stopping)
    subjects = [server.next()["Subject"] for _ in range(6)]
    stopping.set()
    pruning.join(5)
    assert subjects[-1] == "More sign-ins from new browsers at auth.example.com: 1"


def test_two_rounds_at_once_count_each_sign_in_once(auth: Auth, db: DB) -> None:
    user, _ = sign_in(auth)
    for change, done in [(3, True), (-3, True), (-3, False), (1, True), (-3, False), (-1, True)]:
        assert db.count_untold_logins(user.id, change) is done
    assert db.untold_logins() == []


@pytest.mark.both_engines
@pytest.mark.parametrize("attempts", [("", "", "wrong"), ("000000", "wrong")])
def test_a_right_password_without_its_code_is_told_once_a_day(
    auth: Auth, clock: Clock, mailer: Mailer, server: MailServer, attempts: tuple[str, ...]
) -> None:
    codes = with_factor(auth, clock)
    assert next_notice(server)[0] == "Two-factor authentication was turned on"
    for otp in attempts:
        with pytest.raises(AuthError):
            sign_in(auth, otp, caller=Caller(CLIENT, agent="curl/8"))
    assert count_mails(mailer, server) == 1
    subject, text = next_notice(server)
    assert subject == "Sign-in attempt without the one-time code"
    assert "\nTime: 2027-01-15 08:00 UTC\nIP address: 192.0.2.1\nBrowser: curl/8\n" in text
    clock.advance(86_400)
    device = auth.device_cookie(sign_in(auth, codes[0])[0], None)
    assert next_notice(server)[0] == "Sign-in from a new browser"
    for known in (device, None):
        with pytest.raises(AuthError):
            sign_in(auth, caller=Caller(CLIENT, known))
    assert count_mails(mailer, server) == 1  # a browser that the account knows asks for the code each time


def test_the_operations_page_lists_every_mail() -> None:
    section = (HERE / "docs/operations.md").read_text().partition("\n### Mails\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [
        kind for kind, (_, text) in mail.MAILS["en"].items() if text
    ]


# Languages

PHRASES = [kind for kind, (_, text) in mail.MAILS["en"].items() if not text]
TOLD = [name for name in PHRASES if not name.startswith(("no_", "minute"))]  # what a notice or a sign-in tells
DETAILS = {
    "name": "git",
    "passkeys": '"laptop", "phone"',
    "address": "2001:db8::1",
    "browser": "Browser/1",
    "former": "former@x.io",
    "new": "n" * 60 + "@" + ("x" * 60 + ".") * 3 + "io",
    "count": 12,
}
SEEN = {"en": "2027-01-15 08:00 UTC", "de": "15.01.2027, 08:00 Uhr (UTC)", "fr": "15/01/2027 à 08:00 (UTC)"}
SEEN["es"] = "15/01/2027, 08:00 (UTC)"


def parts_of(text: str) -> tuple[list[str], set[str]]:
    """Return the literal parts and the names in braces of a text."""
    parsed = list(string.Formatter().parse(text))
    return [literal for literal, *_ in parsed], {name for _, name, *_ in parsed if name}


def kind_of(message: EmailMessage) -> str:
    """Return the kind of a mail: that with the text of its language."""
    texts = {kind: text for kind, (_, text) in mail.MAILS[message["Content-Language"]].items() if text}
    patterns = {kind: ".+?".join(map(re.escape, parts_of(text + "{end}")[0])) for kind, text in texts.items()}
    found = message.get_content().rstrip("\n")
    (only,) = [str(kind) for kind, pattern in patterns.items() if re.fullmatch(pattern, found, re.DOTALL)]
    return only


def test_every_language_has_the_same_mails_with_the_same_parts() -> None:
    assert mail.MAILS.keys() == set(LANGUAGES)
    english = {kind: texts for kind, texts in mail.MAILS["en"].items() if kind != "summary"}  # no request causes it
    for language in LANGUAGES[1:]:
        assert list(mail.MAILS[language]) == list(english)
        for kind, texts in mail.MAILS[language].items():
            for text, original in zip(texts, english[kind], strict=True):
                assert parts_of(text)[1] == parts_of(original)[1], (language, kind)
                assert text != original or not text or kind.startswith("minute"), (language, kind)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_mail_of_every_language_arrives_as_it_was_written(mailer: Mailer, language: str) -> None:
    texts = mail.MAILS[language]
    kinds = {kind: TOLD if kind in ("notice", "sign_in") else [""] for kind, (_, text) in texts.items() if text}
    for kind, what in ((kind, what) for kind, whats in kinds.items() for what in whats):
        sent = mailer.compose(kind, BOB, language, token="to-ken_0", what=what, at=1_800_000_000, **DETAILS)
        wire = sent.as_bytes()
        assert wire.partition(b"\n\n")[0].isascii()
        assert max(map(len, wire.split(b"\n"))) <= 998  # without the end of the line
        got = message_from_bytes(wire, policy=sent.policy)
        assert isinstance(got, EmailMessage)
        assert (got.get_content_charset(), got["Content-Language"], kind_of(got)) == ("utf-8", language, kind)
        assert got["Content-Transfer-Encoding"] != "8bit"  # some servers take none
        subject, text = got["Subject"], got.get_content()
        assert not re.search("[{}\n\r]", subject)
        assert not re.search("[{}]", text)
        assert all(literal in subject for literal in parts_of(texts[kind][0])[0])
        told = texts[what][0].replace("{name}", "git") if what else ""
        assert told in subject
        assert told in text
        names = parts_of("".join(texts[kind]))[1]
        assert all(str(DETAILS[name]) in subject + text for name in names & DETAILS.keys())
        assert ("\n" + mail.token_link(PUBLIC_URL, kind, BOB, "to-ken_0") + "\n" in text) == ("link" in names)
        assert (SEEN[language] in text) == ("time" in names)


@pytest.mark.parametrize(
    ("language", "minute", "minutes"),
    [("de", "in 1 Minute ", "in 10 Minuten "), ("fr", "1 minute.", "10 minutes."), ("es", "1 minuto.", "10 minutos.")],
)
def test_a_lifetime_is_in_the_language_of_the_mail(log: Log, language: str, minute: str, minutes: str) -> None:
    for seconds, text in ((60, minute), (600, minutes)):
        settings = production_settings(smtp_url="smtps://localhost", mail_from="a@x.io", reset_lifetime=seconds)
        assert text in Mailer(settings, log).compose("reset", BOB, language, token="to-ken_0").get_content()


def test_what_is_missing_is_said(mailer: Mailer) -> None:
    text = mailer.compose("sign_in", BOB, "fr", what="new_browser", address="", browser="").get_content()
    assert "\nAdresse IP\xa0: inconnue\nNavigateur\xa0: inconnu\n" in text
    assert "\n\naucune\n\n" in mailer.compose("passkeys_kept", BOB, "fr", passkeys="").get_content()


@pytest.mark.parametrize(
    ("header", "language", "subject"),
    [
        ("de-AT,de;q=0.9,en;q=0.8", "de", "Ihr Passwort bei auth.example.com zurücksetzen"),
        ("fr;q=0.9, es", "es", "Restablezca su contraseña en auth.example.com"),
        ("nl", "en", SUBJECT),
        (None, "en", SUBJECT),
    ],
)
def test_a_mail_is_in_the_language_of_the_request(
    call: Client, server: MailServer, header: str | None, language: str, subject: str
) -> None:
    assert ask(call, **({"HTTP_ACCEPT_LANGUAGE": header} if header else {})).status == 200
    message = server.next()
    assert (message["Content-Language"], message["Subject"]) == (language, subject)


def test_a_mail_is_in_the_language_that_was_chosen_on_the_pages(call: Client, server: MailServer) -> None:
    assert ask(call, cookie="__Host-language=es", HTTP_ACCEPT_LANGUAGE="de").status == 200
    assert server.next()["Content-Language"] == "es"


def test_every_mail_that_a_request_causes_is_in_its_language(
    auth: Auth, clock: Clock, server: MailServer, mailer: Mailer
) -> None:
    caller, kinds = Caller(CLIENT, language="fr"), list[str]()

    def arrived(*expected: str) -> None:
        messages = [server.next() for _ in range(count_mails(mailer, server))]
        assert {message["Content-Language"] for message in messages} == {"fr"}
        assert sorted(map(kind_of, messages)) == sorted(expected)
        kinds.extend(expected)

    eve = auth.add_account("eve@x.io")
    for address in ("new@x.io", BOB, eve.email):
        auth.mail_confirmation(address, caller=caller)
    auth.mail_reset_token(BOB, caller=caller)
    arrived("confirm", "taken", "inactive", "reset")
    sign_in(auth)
    sign_in(auth, caller=caller)
    arrived("sign_in")
    session_id = add_passkey(auth, "laptop", caller)
    arrived("notice")
    auth.create_token(session_id, PASSWORD, "git", caller=caller)
    _, session_id = auth.change_password(session_id, PASSWORD, NEW_PASSWORD, caller=caller)
    arrived("token", "notice")
    clock.advance(NEW_FOR)
    token, _ = auth.link_token(auth.find_user(BOB))
    auth.reset_password(token, PASSWORD, email=None, caller=caller)
    arrived("passkeys_kept")
    passkey_id, held = str(auth.passkeys_of(1)[0].id), auth.create_session(BOB)
    _, session_id = auth.delete_passkey(held, passkey_id, PASSWORD, caller=caller)
    arrived("notice")
    seed, _, _, session_id = auth.begin_totp(session_id, PASSWORD, caller=caller)
    code = totp.code(seed, int(clock()) // totp.STEP)
    _, session_id, recovery = auth.confirm_totp(session_id, code, caller=caller)
    with pytest.raises(AuthError):
        sign_in(auth, caller=caller)
    _, session_id = auth.remove_totp(session_id, PASSWORD, recovery[0], caller=caller)
    arrived("notice", "sign_in", "notice")
    auth.begin_email_change(session_id, PASSWORD, "other@x.io", caller=caller)
    both = {kind_of(message): message for message in (server.next(), server.next())}  # from two threads
    token = parse_qs(re.findall(r"change#(\S+)", both["change"].get_content())[0])["token"][0]
    auth.change_email(session_id, "other@x.io", token, caller=caller)
    kinds += both
    arrived("changed")
    assert set(kinds) == {kind for kind, (_, text) in mail.MAILS["fr"].items() if text}


def next_notice(server: MailServer) -> tuple[str, str]:
    """Return the subject, without the host, and the text of the next mail to Bob."""
    _, recipients, message = server.next_received()
    assert recipients == [BOB]
    subject: str = message["Subject"]
    assert subject.endswith(" at auth.example.com")
    return subject.removesuffix(" at auth.example.com"), message.get_content()


def test_every_change_by_a_signed_in_user_is_notified_by_mail(auth: Auth, clock: Clock, server: MailServer) -> None:
    session_id = auth.create_session(BOB)
    _, session_id = auth.change_password(session_id, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED)
    seed, _, _, session_id = auth.begin_totp(session_id, NEW_PASSWORD, caller=UNCOUNTED)
    code = totp.code(seed, int(clock()) // totp.STEP)
    _, session_id, recovery = auth.confirm_totp(session_id, code, caller=UNCOUNTED)
    _, session_id = auth.remove_totp(session_id, NEW_PASSWORD, recovery[0], caller=UNCOUNTED)
    auth.delete_account(session_id, NEW_PASSWORD, caller=UNCOUNTED)
    notices = [next_notice(server) for _ in range(4)]
    assert [subject for subject, _ in notices] == [
        "Your password was changed",
        "Two-factor authentication was turned on",
        "Two-factor authentication was turned off",
        "Your account was deleted",
    ]
    for subject, text in notices:
        assert text.startswith(f"{subject}: {BOB} at auth.example.com, just now.")
        assert not [secret for secret in (PASSWORD, NEW_PASSWORD, seed, session_id, *recovery) if secret in text]


def test_a_new_access_token_is_told_by_mail_without_a_link_in_its_name(auth: Auth, server: MailServer) -> None:
    name = "http://evil.example www.evil.example a@b {link} é"
    _, _, token = auth.create_token(auth.create_session(BOB), PASSWORD, name, caller=UNCOUNTED)
    subject, text = next_notice(server)
    assert subject == "An access token was created"
    assert f"An access token named http?evil?example www?evil?example a?b {{link}} ? was created for {BOB}" in text
    assert "https://auth.example.com/account" in text
    assert token not in text


def test_a_passkey_that_is_added_or_deleted_is_told_by_mail(auth: Auth, server: MailServer) -> None:
    session_id = add_passkey(auth, "www.evil.example é")
    passkey_id = str(auth.passkeys_of(1)[0].id)
    auth.delete_passkey(session_id, passkey_id, PASSWORD, caller=UNCOUNTED)
    for what in ("A passkey named www?evil?example ? was added", "A passkey was deleted"):
        subject, text = next_notice(server)
        assert subject == what
        assert text.startswith(f"{what}: {BOB} at auth.example.com, just now.")


def add_passkey(auth: Auth, name: str, caller: Caller = UNCOUNTED) -> str:
    """Add a passkey for Bob, and return the id of the session."""
    session_id, device = auth.create_session(BOB), Authenticator("https://auth.example.com", "auth.example.com")
    options = auth.begin_passkey(session_id, PASSWORD, "", UNCOUNTED, "browser")
    return auth.add_passkey(session_id, name, device.create(options), "browser", caller=caller)[2]


def test_the_mail_about_a_reset_lists_the_passkeys_that_stay(auth: Auth, clock: Clock, server: MailServer) -> None:
    for name, age in [("laptop", NEW_FOR - 10), ("www.phone", 10), ("intruder", 0)]:
        add_passkey(auth, name)
        assert next_notice(server)[0].startswith("A passkey named")
        clock.advance(age)
    auth.reset_password(auth.link_token(auth.find_user(BOB))[0], NEW_PASSWORD, email=None, caller=UNCOUNTED)
    subject, text = next_notice(server)
    assert subject == "Your password was changed"
    assert '"laptop"' in text
    assert "phone" not in text
    assert "intruder" not in text
    assert "https://auth.example.com/account" in text


@pytest.mark.parametrize(
    "act",
    [
        lambda auth, session_id: auth.change_password(session_id, "wrong", NEW_PASSWORD, caller=UNCOUNTED),
        lambda auth, session_id: auth.change_password(session_id, PASSWORD, "short", caller=UNCOUNTED),
        lambda auth, session_id: auth.change_password(None, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED),
        lambda auth, session_id: auth.delete_account(session_id, "wrong", caller=UNCOUNTED),
        lambda auth, session_id: auth.begin_totp(session_id, "wrong", caller=UNCOUNTED),
        lambda auth, session_id: auth.confirm_totp(session_id, "000000", caller=UNCOUNTED),
        lambda auth, session_id: auth.remove_totp(session_id, PASSWORD, "000000", caller=UNCOUNTED),
        lambda auth, session_id: auth.create_token(session_id, "wrong", "git", caller=UNCOUNTED),
        lambda auth, session_id: auth.create_token(session_id, PASSWORD, "", caller=UNCOUNTED),
    ],
    ids=[
        *("password: wrong", "password: weak", "password: no session", "delete", "begin", "confirm", "remove"),
        *("token", "token: no name"),
    ],
)
def test_a_refused_change_sends_no_mail(
    auth: Auth, server: MailServer, mailer: Mailer, act: Callable[[Auth, str | None], object]
) -> None:
    session_id = auth.create_session(BOB)
    with pytest.raises(AuthError):
        act(auth, session_id)
    assert count_mails(mailer, server) == 0


@pytest.mark.both_engines
def test_changes_that_mail_the_user_are_limited_for_an_account(
    call: Client, auth: Auth, clock: Clock, mailer: Mailer, server: MailServer
) -> None:
    session_id = auth.create_session(BOB)

    def change(method: str, path: str, **form: str) -> Answer:
        cookie = f"__Host-session_id={session_id}"
        return call(method, path, {"password": PASSWORD, **form}, cookie=cookie, REMOTE_ADDR=CLIENT)

    for _ in range(10):
        _, session_id = auth.change_password(session_id, PASSWORD, PASSWORD, caller=Caller(CLIENT))
    assert count_mails(mailer, server) == 10
    refused = change("PUT", "/password", new_password=NEW_PASSWORD)
    assert (refused.status, refused.json, refused.headers["Retry-After"]) == (
        429,
        {"message": "too many requests"},
        "3600",
    )
    others = ("POST", "/totp"), ("POST", "/email"), ("DELETE", "/profile")
    assert [change(method, path, new_email="new@x.io").status for method, path in others] == [429] * 3
    assert count_mails(mailer, server) == 10
    assert change("PUT", "/password", password="wrong", new_password=NEW_PASSWORD).status == 403
    clock.advance(3600)
    assert change("PUT", "/password", new_password=PASSWORD).status == 200
    for _ in range(count_mails(mailer, server)):
        server.next()
    ask(call)
    assert confirm(call, link_of(server.next())["token"]) == 200  # an owner can always reset


def test_without_a_mail_server_changes_are_not_limited(db: DB, settings: Settings, clock: Clock) -> None:
    auth = Auth(db, settings, clock)
    auth.register_user(BOB, PASSWORD)
    session_id = auth.create_session(BOB)
    for _ in range(11):
        _, session_id = auth.change_password(session_id, PASSWORD, PASSWORD, caller=Caller(CLIENT))


def test_beginning_a_two_factor_setup_sends_no_mail(auth: Auth, server: MailServer, mailer: Mailer) -> None:
    auth.begin_totp(auth.create_session(BOB), PASSWORD, caller=UNCOUNTED)
    assert count_mails(mailer, server) == 0


@pytest.mark.parametrize("state", ["invited", "disabled"])
def test_an_invited_or_disabled_user_gets_no_reset_mail(
    call: Client, auth: Auth, db: DB, server: MailServer, mailer: Mailer, clock: Clock, state: str
) -> None:
    eve = auth.add_account("eve@x.io")
    token, _ = auth.link_token(eve)
    if state == "disabled":
        auth.update_password(token, PASSWORD)
        assert server.next()["To"] == "eve@x.io"
        db.disable_user(eve.id, int(clock()))
    clock.advance(86_400)  # a link that is younger than five minutes would not be replaced for anybody
    answers = [comparable(ask(call, address)) for address in ("eve@x.io", "nobody@x.io")]
    assert answers[0] == answers[1]
    assert count_mails(mailer, server) == 0
    if state == "invited":  # the invitation is still valid
        auth.update_password(token, PASSWORD)


@pytest.mark.parametrize(
    "address", ["bob@x.io", "o'brien+tag@x.io", "a&token=evil#c@x.io", "a b@x", "почта@x", "%", ""]
)
def test_a_reset_link_holds_email_and_token_only_in_its_fragment(address: str) -> None:
    link = mail.token_link(PUBLIC_URL, "reset", address, "to-ken_0")
    assert re.fullmatch("[!-~]+", link)
    parts = urlsplit(link)
    assert (f"{parts.scheme}://{parts.netloc}", parts.path, parts.query) == (PUBLIC_URL, "/reset", "")
    found = parse_qs(parts.fragment, strict_parsing=True, keep_blank_values=True)
    assert found == {"token": ["to-ken_0"], "email": [address]}


def test_an_unknown_email_gets_no_reset_mail(call: Client, server: MailServer, mailer: Mailer) -> None:
    assert ask(call, "nobody@x.io").status == 200
    assert count_mails(mailer, server) == 0


ODD = [
    "a@x, evil@y",
    "a@x,evil@y",
    "undisclosed:a@x,evil@y;",
    "a@x\r\nBcc: evil@y",
    "a@x\nBcc: evil@y",
    '"a b"@x.io',
    "<evil@y>a@x",
    "é@x.io",
    "nope",
    "a@x@y",
    "=?utf-8?q?evil=40y=2C?=@x.io",
    "=?utf-8?q?a=0d=0aBcc=3a_evil=40y?=@x.io",
    "a@x.",
    "a@x..y",
]


@pytest.mark.parametrize("address", ODD)
def test_an_account_without_a_plain_mailbox_gets_no_mail(
    call: Client, db: DB, server: MailServer, mailer: Mailer, log: Log, address: str
) -> None:
    db.add_user(address, b"hash")
    assert ask(call, address).status == 200
    assert count_mails(mailer, server) == 0
    assert log.next() == ("mail_dropped", {"reason": "ValueError"})
    ask(call)
    assert server.next()["To"] == BOB


# TLS and signing in


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_mail_is_sent_over_tls_after_signing_in(
    start_server: Callable[..., MailServer], settings_for: Callable[..., Settings], log: Log, scheme: str
) -> None:
    server = start_server(scheme)
    mailer = Mailer(settings_for(server.url), log)
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    assert server.next()["To"] == BOB
    assert server.logins == [(USER.encode(), SMTP_PASSWORD.encode())]
    assert log.next() == ("mail_sent", {"tries": 1})


def untrusted_certificate() -> trustme.LeafCert:
    return trustme.CA().issue_cert("localhost")


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
@pytest.mark.parametrize("why", ["another authority", "another host"])
def test_a_server_with_an_invalid_certificate_gets_no_mail(
    start_server: Callable[..., MailServer],
    settings_for: Callable[..., Settings],
    authority: trustme.CA,
    log: Log,
    scheme: str,
    why: str,
) -> None:
    server = start_server(
        scheme, untrusted_certificate() if why == "another authority" else authority.issue_cert("elsewhere.example")
    )
    mailer = Mailer(settings_for(server.url), log)
    mailer.enqueue(lambda: mailer.compose("reset", BOB, token="canary-token"))
    assert log.next() == ("mail_delayed", {"reason": "SSLCertVerificationError", "smtp_code": 0, "tries": 1})
    assert (server.received.qsize(), server.logins) == (0, [])


def test_a_server_without_tls_gets_no_mail(
    start_server: Callable[..., MailServer], settings_for: Callable[..., Settings], log: Log
) -> None:
    server = start_server(starttls=False)
    mailer = Mailer(settings_for(server.url), log)
    mailer.enqueue(lambda: mailer.compose("reset", BOB, token="canary-token"))
    event, details = log.next()
    assert (event, details["reason"]) == ("mail_delayed", "SMTPNotSupportedError")
    assert (server.received.qsize(), server.logins) == (0, [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_relay_on_this_machine_needs_no_tls_and_no_login(
    start_server: Callable[..., MailServer], log: Log, host: str
) -> None:
    server = start_server("smtp")
    settings = production_settings(smtp_url=f"smtp://{host}:{server.port}", mail_from="auth@example.com")
    mailer = Mailer(settings, log)
    mailer.check()
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    assert server.next()["To"] == BOB
    assert server.logins == []


def test_a_wrong_smtp_password_sends_nothing_and_is_not_logged(
    server: MailServer, settings_for: Callable[..., Settings], log: Log, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("canary-wrong")
    mailer = Mailer(settings_for(server.url), log)
    mailer.enqueue(lambda: mailer.compose("reset", BOB, token="canary-token"))
    assert log.next() == ("mail_dropped", {"reason": "SMTPAuthenticationError", "smtp_code": 535, "tries": 1})
    assert server.received.qsize() == 0
    assert "canary" not in log.text
    assert BOB not in log.text


def test_the_log_holds_no_token_and_no_address(
    call: Client, server: MailServer, log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(call)
    token = link_of(server.next())["token"]
    assert log.next()[0] == "mail_sent"
    logged = log.text + capsys.readouterr().err
    assert "authn_reset_token_created" in logged
    assert token not in logged
    assert BOB not in logged


# Checking the mail server


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_a_check_signs_in_and_sends_nothing(
    start_server: Callable[..., MailServer], settings_for: Callable[..., Settings], log: Log, scheme: str
) -> None:
    server = start_server(scheme)
    threads = threading.enumerate()
    Mailer(settings_for(server.url), log).check()
    assert server.logins == [(USER.encode(), SMTP_PASSWORD.encode())]
    assert (server.received.qsize(), log.text) == (0, "")
    assert set(threading.enumerate()) <= set(threads)


def test_a_check_reports_a_wrong_password(
    server: MailServer, settings_for: Callable[..., Settings], log: Log, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("canary-wrong")
    with pytest.raises(smtplib.SMTPAuthenticationError) as refusal:
        Mailer(settings_for(server.url), log).check()
    assert "canary" not in str(refusal.value)


def test_a_check_reports_a_refused_sender(server: MailServer, settings_for: Callable[..., Settings]) -> None:
    server.sender_replies = ["553 5.7.1 not yours"]
    (problem,) = commands._mail_problems(settings_for(server.url))
    assert problem == "localhost: (553, b'5.7.1 not yours', 'auth@example.com')"
    assert server.received.qsize() == 0


def test_a_server_that_offers_xoauth2_only_is_named(
    start_server: Callable[..., MailServer], settings_for: Callable[..., Settings], log: Log
) -> None:
    settings = settings_for(start_server(passwords=False).url)
    (problem,) = commands._mail_problems(settings)
    assert problem == f"localhost: No suitable authentication method found. ({mail.NO_XOAUTH2})"
    mailer = Mailer(settings, log)
    mailer.enqueue(lambda: mailer.compose("reset", BOB, token="canary-token"))
    event, details = log.next()
    assert (event, details["reason"]) == ("mail_delayed", "SMTPException")


def test_only_a_server_that_offers_xoauth2_has_it_named(
    server: MailServer, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(server.url)
    (tmp_path / "password").write_text("canary-wrong")
    (problem,) = commands._mail_problems(settings)
    assert "535" in problem
    assert "XOAUTH2" not in problem


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_a_check_reports_an_invalid_certificate(
    start_server: Callable[..., MailServer], settings_for: Callable[..., Settings], log: Log, scheme: str
) -> None:
    server = start_server(scheme, untrusted_certificate())
    with pytest.raises(ssl.SSLCertVerificationError):
        Mailer(settings_for(server.url), log).check()
    assert server.logins == []


def test_a_check_reports_a_server_without_tls(
    start_server: Callable[..., MailServer], settings_for: Callable[..., Settings], log: Log
) -> None:
    server = start_server(starttls=False)
    with pytest.raises(smtplib.SMTPNotSupportedError):
        Mailer(settings_for(server.url), log).check()
    assert server.logins == []


def test_a_check_reports_a_missing_server(
    settings_for: Callable[..., Settings], log: Log, closed: socket.socket
) -> None:
    with pytest.raises(ConnectionRefusedError):
        Mailer(settings_for(f"smtps://localhost:{port_of(closed)}"), log).check()
    with pytest.raises(OSError, match="no mail server"):
        Mailer(Settings(database="unused"), log).check()


# Delays, retries and drops


def test_a_mail_is_delayed_until_the_server_is_up(
    start_server: Callable[..., MailServer],
    settings_for: Callable[..., Settings],
    log: Log,
    closed: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0.05,) * 100)
    mailer = Mailer(settings_for(smtp_url("smtps", port_of(closed))), log)
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    assert log.next() == ("mail_delayed", {"reason": "ConnectionRefusedError", "smtp_code": 0, "tries": 1})
    assert start_server("smtps", listener=closed).next()["To"] == BOB
    while (event := log.next()[0]) == "mail_delayed":
        pass
    assert event == "mail_sent"


TEMPORARY = ["450 4.7.1 greylisted, try again later", "452 4.2.2 mailbox full"]
PERMANENT = ["550 5.1.1 no such user", "553 5.1.3 bad address"]


@pytest.mark.parametrize("reply", TEMPORARY)
def test_a_temporary_refusal_of_a_recipient_is_retried(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch, reply: str
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0, 0, 0, 0))
    server.recipient_replies = [reply] * 2
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    assert [log.next()[0] for _ in range(3)] == ["mail_delayed", "mail_delayed", "mail_sent"]
    assert server.next()["To"] == BOB


@pytest.mark.parametrize("reply", PERMANENT)
def test_a_permanent_refusal_of_a_recipient_is_not_retried(
    server: MailServer, mailer: Mailer, log: Log, reply: str
) -> None:
    server.recipient_replies = [reply]
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    event, details = log.next()
    assert (event, details["tries"]) == ("mail_dropped", 1)


@pytest.mark.parametrize(("reply", "event"), [("451 later", "mail_delayed"), ("554 spam", "mail_dropped")])
def test_a_refused_message_is_delayed_or_dropped_by_its_status(
    server: MailServer, mailer: Mailer, log: Log, reply: str, event: str
) -> None:
    server.data_replies = [reply]
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    assert log.next() == (event, {"reason": "SMTPDataError", "smtp_code": int(reply[:3]), "tries": 1})


@pytest.mark.parametrize("reply", ["421 closing", "451 later", "500 what", "nonsense"])
def test_an_accepted_mail_is_not_sent_again_whatever_follows(
    server: MailServer, mailer: Mailer, log: Log, reply: str
) -> None:
    server.quit_reply = reply
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    assert log.next()[0] == "mail_sent"
    assert server.next()["To"] == BOB


def test_a_mail_is_dropped_after_the_last_retry(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0, 0))
    server.data_replies = ["451 later"] * 3
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    lines = [log.next() for _ in range(3)]
    assert [(event, details["tries"]) for event, details in lines] == [
        ("mail_delayed", 1),
        ("mail_delayed", 2),
        ("mail_dropped", 3),
    ]


def test_a_mail_that_waits_for_a_retry_does_not_delay_others(server: MailServer, mailer: Mailer) -> None:
    server.data_replies = ["451 later"]
    mailer.enqueue(lambda: mailer.compose("notice", "first@x.io", what="password_changed"))
    mailer.enqueue(lambda: mailer.compose("notice", "second@x.io", what="password_changed"))
    assert server.next()["To"] == "second@x.io"


def test_a_retry_is_sent_while_new_tasks_keep_arriving(
    server: MailServer, mailer: Mailer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0, 0, 0, 0))
    server.data_replies = ["451 later"]
    mailer.enqueue(lambda: mailer.compose("notice", "first@x.io", what="password_changed"))
    finished = threading.Event()

    def repeat() -> None:
        if not finished.is_set():
            mailer.enqueue(repeat)

    repeat()
    try:
        assert server.next()["To"] == "first@x.io"
    finally:
        finished.set()


def fail_once(server: MailServer, mailer: Mailer, log: Log, recipient: str, *, reset: bool) -> None:
    """Have a mail fail, so that it waits to be sent again."""
    server.delayed_once.add(recipient)
    if reset:
        enqueue_reset(mailer, lambda: mailer.compose("reset", recipient, token="to-ken_0"))
    else:
        mailer.enqueue(lambda: mailer.compose("notice", recipient, what="password_changed"))
    assert log.next()[0] == "mail_delayed"


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "notice"])
def test_a_retry_that_takes_long_does_not_delay_a_fresh_mail(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch, reset: bool
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0, 0, 0, 0))
    server.delays = {"first@x.io": 1.0}
    fail_once(server, mailer, log, "first@x.io", reset=reset)
    mailer.enqueue(lambda: mailer.compose("notice", "second@x.io", what="password_changed"))
    enqueue_reset(mailer, lambda: mailer.compose("reset", "third@x.io", token="to-ken_0"))
    assert {server.next()["To"] for _ in range(2)} == {"second@x.io", "third@x.io"}
    assert server.next()["To"] == "first@x.io"


def test_the_retry_of_a_reset_does_not_delay_the_retry_of_a_notice(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0, 0, 0, 0))
    server.delays = {"first@x.io": 1.0}
    fail_once(server, mailer, log, "first@x.io", reset=True)
    fail_once(server, mailer, log, "second@x.io", reset=False)
    assert [server.next()["To"] for _ in range(2)] == ["second@x.io", "first@x.io"]


def test_a_reset_mail_is_not_sent_again_once_its_token_has_expired(
    server: MailServer, mailer: Mailer, log: Log, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    past = [0.0]  # seconds
    monkeypatch.setattr(mail, "RETRIES", (1.0, 1.0))
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + past[0], sleep=time.sleep)
    monkeypatch.setattr(mail, "time", clock)
    fail_once(server, mailer, log, "first@x.io", reset=True)
    fail_once(server, mailer, log, "second@x.io", reset=False)
    past[0] = settings.reset_lifetime
    lines = [log.next() for _ in range(2)]
    assert sorted(lines) == [("mail_dropped", {"reason": "expired", "tries": 1}), ("mail_sent", {"tries": 2})]
    assert server.next()["To"] == "second@x.io"


def test_the_mail_queue_is_bounded(
    settings_for: Callable[..., Settings], log: Log, closed: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "WAITING", 3)
    mailer = Mailer(settings_for(f"smtps://localhost:{port_of(closed)}"), log)
    release, running = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert release.wait(5)

    mailer.enqueue(hold)
    assert running.wait(5)
    for _ in range(5):
        mailer.enqueue(lambda: None)
    assert [log.next() for _ in range(2)] == [("mail_dropped", {"reason": "queue full"})] * 2
    release.set()


@pytest.mark.parametrize("known", [True, False])
def test_the_queue_of_resets_is_bounded(mailer: Mailer, log: Log, known: bool) -> None:
    ran: list[int] = []
    with resets_held(mailer):
        for number in range(502):
            enqueue_reset(mailer, functools.partial(ran.append, number), known)
        assert [log.next() for _ in range(2)] == [("mail_dropped", {"reason": "queue full"})] * 2
    settle(mailer)
    assert len(ran) == 500


def test_the_number_of_mails_waiting_for_a_retry_is_bounded(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "WAITING", 2)
    server.data_replies = ["451 later"] * 3
    for _ in range(3):
        mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
        settle(mailer)
    assert [log.next()[0] for _ in range(3)] == ["mail_delayed", "mail_delayed", "mail_dropped"]


def test_failed_resets_do_not_take_the_places_of_failed_notices(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "WAITING", 2)
    for number in range(2):
        fail_once(server, mailer, log, f"{number}@x.io", reset=True)
    fail_once(server, mailer, log, BOB, reset=False)


def fail() -> None:
    raise RuntimeError("canary")


def test_a_failing_task_does_not_end_the_worker(server: MailServer, mailer: Mailer, log: Log) -> None:
    mailer.enqueue(fail)
    mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
    assert server.next()["To"] == BOB
    assert log.next() == ("mail_dropped", {"reason": "RuntimeError"})


def test_a_failing_retry_does_not_end_the_worker(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0.5, 0))
    fail_once(server, mailer, log, "first@x.io", reset=False)
    assert awaited(lambda: mailer._notice_sender.retries)
    (waiting,) = mailer._notice_sender.retries
    del waiting[-1]["To"]  # it cannot be sent
    assert log.next()[0] == "mail_dropped"
    fail_once(server, mailer, log, "second@x.io", reset=False)
    assert server.next()["To"] == "second@x.io"


class Odd(OSError):
    """An error whose code is no number."""

    smtp_code = "5xx"


ERRORS = [SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, RecursionError, UnicodeError, Odd]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["task", "delivery", "retry", "log"])
def test_no_error_ends_a_thread_or_is_silent(
    log: Log, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    monkeypatch.setattr(mail, "RETRIES", (0, 0))
    tasks: queue.Queue[mail.Waiting] = queue.Queue()
    sent: queue.Queue[str] = queue.Queue()
    failures = {"delivery": [error()], "retry": [ConnectionError(), error()]}.get(place, [])

    def send(message: EmailMessage) -> None:
        if failures:
            raise failures.pop(0)
        sent.put(message["To"])

    def note(event: str, **details: Any) -> None:
        log(event, **details)
        if place == "log" and details.get("tries"):
            raise error

    def compose() -> EmailMessage:
        message = EmailMessage()
        message["To"] = BOB
        return message

    def fail() -> EmailMessage:
        raise error

    sender = mail._Sender(tasks.get, send, note, float("inf"))
    sender.start()
    tasks.put((0.0, fail if place == "task" else compose, False))
    if place != "log":
        while (line := log.next())[0] == "mail_delayed":
            pass
        assert line[0] == "mail_dropped"
        assert line[1]["reason"] in (error.__name__, "TypeError")
    for _ in range(2):
        tasks.put((0.0, compose, False))
        assert sent.get(timeout=5) == BOB


def test_a_thread_that_cannot_be_started_is_started_with_the_next_mail(
    server: MailServer, mailer: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(mail, "RETRIES", (0, 0))
    server.delayed_once.add("first@x.io")  # so that both threads are needed
    with monkeypatch.context() as patched:
        patched.setattr(threading, "_start_new_thread", refuse)
        patched.setattr(threading, "_start_joinable_thread", refuse, raising=False)
        mailer.enqueue(lambda: mailer.compose("notice", "first@x.io", what="password_changed"))
    assert log.next() == ("mail_delayed", {"reason": "RuntimeError"})
    mailer.enqueue(lambda: mailer.compose("notice", "second@x.io", what="password_changed"))
    assert {server.next()["To"] for _ in range(2)} == {"first@x.io", "second@x.io"}


def test_the_service_is_healthy_while_no_mail_can_be_sent(
    db: DB, database: str, clock: Clock, settings_for: Callable[..., Settings], log: Log, closed: socket.socket
) -> None:
    settings = settings_for(f"smtps://localhost:{port_of(closed)}", database)
    auth = Auth(db, settings, clock, mailer=Mailer(settings, log))
    call = Client(create_app(settings, auth))
    auth.register_user(BOB, PASSWORD)
    assert ask(call).status == 200
    assert log.next()[0] == "mail_delayed"
    assert call("GET", "/health", REMOTE_ADDR=CLIENT).status == 200
    assert call("POST", "/sessions", {"email": BOB, "password": PASSWORD}, REMOTE_ADDR=CLIENT).status == 200
    (problem,) = commands._mail_problems(settings)
    assert "refused" in problem


def test_without_a_mail_server_no_reset_token_is_made(db: DB, database: str, clock: Clock) -> None:
    settings = production_settings(database)
    auth = Auth(db, settings, clock, mailer=Mailer(settings, print))
    db.add_user(BOB, b"hash")
    assert ask(Client(create_app(settings, auth))).status == 200
    assert db.find_user_by(email=BOB).reset_token is None


def test_a_mailer_starts_no_thread_before_the_first_mail(
    settings_for: Callable[..., Settings], log: Log, closed: socket.socket
) -> None:
    threads = threading.enumerate()
    mailer = Mailer(settings_for(f"smtps://localhost:{port_of(closed)}"), log)
    assert set(threading.enumerate()) <= set(threads)
    settle(mailer)
    assert {thread.daemon for thread in set(threading.enumerate()) - set(threads)} == {True}


@pytest.mark.parametrize("reset", [True, False], ids=["reset", "notice"])
def test_a_task_does_not_run_before_the_answer_is_sent(mailer: Mailer, reset: bool) -> None:
    ran: queue.Queue[float] = queue.Queue()
    asked = time.monotonic()
    put = functools.partial(enqueue_reset, mailer) if reset else mailer.enqueue
    put(lambda: ran.put(time.monotonic()))
    assert ran.get(timeout=5) - asked >= ANSWER_FIRST


# Floods


def ignore(*_: object, **__: object) -> None:
    """A log that is not looked at."""


EVE = "eve@x.io"  # an attacker with an account


@pytest.fixture
def eves_device(auth: Auth, db: DB) -> str | None:
    """The device cookie of a browser in which Eve has signed in. Its requests have no limit by address."""
    auth.register_user(EVE, PASSWORD)
    return auth.device_cookie(db.find_user_by(email=EVE), None)


def test_a_notice_does_not_wait_for_resets(server: MailServer, mailer: Mailer) -> None:
    with resets_held(mailer):
        for _ in range(1100):
            enqueue_reset(mailer, lambda: None)
        mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
        assert server.next()["To"] == BOB


def test_a_flood_of_one_client_drops_no_mail_of_others(
    auth: Auth, db: DB, server: MailServer, mailer: Mailer, log: Log, eves_device: str | None
) -> None:
    server.delay = 0.1
    owners = [f"owner{number}@x.io" for number in range(20)]
    for owner in owners:
        db.add_user(owner, b"hash")
    stopped = threading.Event()

    def flood() -> None:
        while not stopped.is_set():
            auth.mail_reset_token(EVE, caller=Caller("198.51.100.66", eves_device))

    attacker = threading.Thread(target=flood)
    attacker.start()
    try:
        assert awaited(lambda: "queue full" in log.text)
        for number, owner in enumerate(owners):
            auth.mail_reset_token(owner, caller=Caller(f"203.0.{number}.1"))
            if number % 4 == 0:
                mailer.enqueue(lambda: mailer.compose("notice", BOB, what="password_changed"))
        mails = [server.next() for _ in range(26)]
    finally:
        stopped.set()
        attacker.join()
    recipients = [message["To"] for message in mails]
    assert sorted(recipients) == sorted([*owners, *[BOB] * 5, EVE])
    assert BOB not in recipients[15:]  # the notices and the resets had turns side by side
    assert log.text.count("queue full") > 100


@pytest.mark.parametrize("sites", [250, 1], ids=["many sites of one provider", "one site"])
def test_many_clients_of_one_network_drop_no_mail_of_an_owner_elsewhere(
    auth: Auth, server: MailServer, mailer: Mailer, log: Log, eves_device: str | None, sites: int
) -> None:
    with resets_held(mailer):
        for number in range(600):
            site, host = number % sites, number // sites % 250
            auth.mail_reset_token(f"{number}@x.io", caller=Caller(f"198.51.{site}.{host}"))
        auth.mail_reset_token(BOB, caller=Caller("192.0.2.1"))
        auth.mail_reset_token(EVE, caller=Caller("203.0.113.1", eves_device))
        server.delay = 0.1  # so each turn of the others takes as long, and all together 10 s or 50 s
    assert [server.next()["To"] for _ in range(2)] == [EVE, BOB]
    assert log.text.count("queue full") == (101 if sites > 1 else 500)
    mailer._resets.remove(lambda _: True)


# How often a reset is mailed


@pytest.mark.both_engines
def test_a_link_younger_than_five_minutes_is_not_replaced(
    call: Client, clock: Clock, server: MailServer, mailer: Mailer
) -> None:
    ask(call)
    token = link_of(server.next())["token"]
    clock.advance(299)
    ask(call)
    assert count_mails(mailer, server) == 0
    assert confirm(call, token) == 200


@pytest.mark.both_engines
def test_a_link_that_is_five_minutes_old_is_replaced(call: Client, clock: Clock, server: MailServer) -> None:
    ask(call)
    old = link_of(server.next())["token"]
    clock.advance(300)
    ask(call)
    new = link_of(server.next())["token"]
    assert confirm(call, old) == 403
    assert confirm(call, new) == 200


def test_a_used_link_can_be_followed_by_a_new_one_at_once(call: Client, server: MailServer) -> None:
    ask(call)
    assert confirm(call, link_of(server.next())["token"]) == 200
    assert server.next()["Subject"] != SUBJECT
    ask(call)
    assert server.next()["Subject"] == SUBJECT


@pytest.mark.both_engines
def test_a_clock_that_was_set_back_does_not_block_the_next_link(call: Client, clock: Clock, server: MailServer) -> None:
    ask(call)
    server.next()
    clock.advance(-86_400)
    ask(call)
    assert server.next()["Subject"] == SUBJECT


def test_30_requests_an_hour_send_at_most_5_mails_then_3_an_hour(
    call: Client,
    clock: Clock,
    server: MailServer,
    mailer: Mailer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mail, "ANSWER_FIRST", 0.0)  # for 90 requests
    form = {"email": BOB, "password": PASSWORD}
    cookie = call("POST", "/sessions", form, REMOTE_ADDR=CLIENT).headers["Set-Cookie"].partition(";")[0]
    answers: list[Answer] = []
    mails: list[int] = []
    for hour in range(3):
        for n in range(30):
            answers.append(ask(call, client=f"10.0.{hour}.{n}"))
            settle(mailer)
            clock.advance(120)
        mails.append(server.received.qsize() - sum(mails))
    assert 3 <= mails[0] <= 5
    assert mails[1:] == [3, 3]
    assert {(answer.status, answer.body) for answer in answers} == {(answers[0].status, answers[0].body)}
    assert "excess_rate_limit_exceeded" in capsys.readouterr().err
    assert call("GET", "/profile", cookie=cookie, REMOTE_ADDR=CLIENT).status == 200
    assert call("POST", "/sessions", form, REMOTE_ADDR=CLIENT).status == 200


def test_one_client_address_can_request_10_mails_at_once(
    call: Client, db: DB, server: MailServer, mailer: Mailer
) -> None:
    for n in range(15):
        db.add_user(f"{n}@x.io", b"hash")
    statuses = [ask(call, f"{n}@x.io").status for n in range(15)]
    assert statuses == [200] * 10 + [429] * 5
    assert count_mails(mailer, server) == 10


def test_a_known_browser_can_request_a_mail_when_its_address_is_limited(
    call: Client, auth: Auth, db: DB, server: MailServer, mailer: Mailer
) -> None:
    device = auth.device_cookie(db.find_user_by(email=BOB), None)
    assert [ask(call, "nobody@x.io").status for _ in range(12)] == [200] * 10 + [429] * 2
    assert ask(call, "nobody@x.io", cookie=f"__Host-device={device}").status == 429
    assert ask(call, cookie=f"__Host-device={device}").status == 200
    assert count_mails(mailer, server) == 1


def test_strangers_who_request_mails_do_not_keep_a_mail_from_a_known_browser(
    call: Client, auth: Auth, db: DB, server: MailServer, mailer: Mailer, clock: Clock
) -> None:
    device = auth.device_cookie(db.find_user_by(email=BOB), None)
    for n in range(2 * 6):  # 2 hours, each time from another address
        clock.advance(600)
        ask(call, client=f"198.51.100.{n}")
    ask(call, client="198.51.100.200")
    strangers = count_mails(mailer, server)
    clock.advance(300)  # a younger link is not replaced
    ask(call, client="198.51.100.201")
    assert count_mails(mailer, server) == strangers <= 3 + 6  # their limit is exceeded
    assert ask(call, cookie=f"__Host-device={device}").status == 200
    assert count_mails(mailer, server) == strangers + 1


# What an answer reveals


def comparable(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    """Return everything that a client sees of an answer, except its random request id."""
    return answer.status, {**answer.headers, "X-Request-Id": ""}, answer.body


def test_a_request_neither_waits_for_mail_nor_reveals_an_account(call: Client, mailer: Mailer) -> None:
    with resets_held(mailer):
        answers = [comparable(ask(call, email)) for email in (BOB, "nobody@x.io", "no mailbox", "é@x.io", "a" * 300)]
    assert answers == [answers[0]] * 5
    assert answers[0][0] == 200
    settle(mailer)


@pytest.mark.parametrize("kind", ["no mail", "failure", "refused mail"])
def test_a_task_without_a_delivery_takes_as_long_as_one_with_it(server: MailServer, mailer: Mailer, kind: str) -> None:
    server.delay = 0.3
    enqueue_reset(mailer, lambda: mailer.compose("reset", BOB, token="to-ken_0"), known=False)
    server.next()
    server.delay, arrived = 0.0, time.monotonic()
    server.recipient_replies = ["550 no such user"] if kind == "refused mail" else []
    tasks = {
        "no mail": lambda: None,
        "failure": fail,
        "refused mail": lambda: mailer.compose("reset", "refused@x.io", token="to-ken_0"),
    }
    for task in (tasks[kind], lambda: None, lambda: mailer.compose("reset", BOB, token="to-ken_0")):
        enqueue_reset(mailer, task, known=False)
    server.next()
    assert time.monotonic() - arrived >= 0.6


def test_before_any_delivery_a_task_without_a_mail_takes_the_first_value(
    server: MailServer, settings: Settings, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "FIRST_DELIVERY", 0.3)
    mailer, asked = Mailer(settings, log), time.monotonic()
    for task in (lambda: None, lambda: mailer.compose("reset", BOB, token="to-ken_0")):
        enqueue_reset(mailer, task, known=False)
    server.next()
    assert time.monotonic() - asked >= 0.3


def test_a_task_of_a_known_browser_delays_nobody(
    server: MailServer, settings: Settings, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "FIRST_DELIVERY", 60.0)
    mailer = Mailer(settings, log)
    for task in (lambda: None, lambda: mailer.compose("reset", BOB, token="to-ken_0")):
        enqueue_reset(mailer, task, known=True)
    assert server.next()["To"] == BOB


@pytest.mark.timing
def test_the_time_of_a_mail_does_not_reveal_whether_another_email_is_known(
    auth: Auth, db: DB, server: MailServer, mailer: Mailer
) -> None:
    server.delay = 0.2
    order = random.Random(1)
    for number in range(19):
        for name in ("known", "own"):
            db.add_user(f"{name}{number}@x.io", b"hash")
    numbers = iter(range(19))

    def seconds(kind: str) -> float:
        """Ask for a mail to an email of this kind, and then for one to an own account; return when the latter came."""
        number = next(numbers)
        own, address = f"own{number}@x.io", f"203.0.{number}.1"
        began = time.perf_counter()
        for email in (f"{kind}{number}@x.io", own):
            auth.mail_reset_token(email, caller=Caller(address))
        while server.next()["To"] != own:
            pass
        took = time.perf_counter() - began
        settle(mailer)
        return took

    def difference() -> float:
        took: dict[str, list[float]] = {"known": [], "other": []}
        for _ in range(3):
            for kind in order.sample(("known", "other"), 2):
                took[kind].append(seconds(kind))
        return statistics.median(took["known"]) - statistics.median(took["other"])

    seconds("known")  # the first delivery
    # A difference in the program shows in every round, one of the machine does not.
    differences: list[float] = []
    while len(differences) < 3 and not any(abs(one) < 0.05 for one in differences):
        differences.append(difference())
    assert abs(differences[-1]) < 0.05, differences


@pytest.mark.timing
@pytest.mark.slow  # starts a process and sends 50 to 300 requests
@pytest.mark.parametrize("up", [True, False], ids=["server up", "server down"])
def test_the_response_time_does_not_reveal_whether_an_email_is_known(
    start: Callable[..., Service],
    server: MailServer,
    closed: socket.socket,
    tmp_path: Path,
    authority_file: str,
    up: bool,
) -> None:
    order = random.Random(1)
    rounds, pairs = 6, 25  # the best of six, as a busy machine delays some requests
    (tmp_path / "password").write_text(SMTP_PASSWORD)
    with closing(DB(tmp_path / "authsvc.db")) as db:
        for n in range(rounds * pairs):
            db.add_user(f"known{n:03}@x.io", b"hash")
    service = start(
        AUTHSVC_BCRYPT_COST="10",
        AUTHSVC_PUBLIC_URL=PUBLIC_URL,
        AUTHSVC_TRUSTED_PROXY="127.0.0.1",
        AUTHSVC_SMTP_URL=smtp_url("smtp+starttls", server.port if up else port_of(closed)),
        AUTHSVC_SMTP_PASSWORD_FILE=str(tmp_path / "password"),
        AUTHSVC_MAIL_FROM="auth@example.com",
        SSL_CERT_FILE=authority_file,
    )
    answers = set()
    with requests.Session() as client:

        def seconds(email: str, n: int) -> float:
            headers = {"X-Forwarded-For": f"10.{n}.0.1", "X-Forwarded-Proto": "https"}
            began = time.perf_counter()
            answer = client.post(f"{service.url}/reset_password", {"email": email}, headers=headers, timeout=10)
            took = time.perf_counter() - began
            unique = "date", "x-request-id"
            seen = [(name, value) for name, value in answer.headers.items() if name.lower() not in unique]
            answers.add((answer.status_code, answer.content, tuple(seen)))
            return took

        def ratio(first: int) -> float:
            """Time requests of both kinds; return the median for known emails divided by that for unknown ones."""
            took: dict[str, list[float]] = {"known": [], "other": []}
            both = [(kind, n) for kind in took for n in range(first, first + pairs)]
            # In random order, so that the mail of the request before slows both kinds down equally often.
            for kind, n in order.sample(both, len(both)):
                took[kind].append(seconds(f"{kind}{n:03}@x.io", n))
                time.sleep(ANSWER_FIRST + 0.02)  # the worker needs about this long to send a mail
            return statistics.median(took["known"]) / statistics.median(took["other"])

        # A difference in the program shows in every round, one of the machine does not.
        ratios: list[float] = []
        while len(ratios) < rounds and not any(abs(one - 1) < 0.1 for one in ratios):
            ratios.append(ratio(len(ratios) * pairs))
    assert [status for status, _, _ in answers] == [200]
    assert abs(ratios[-1] - 1) < 0.1, ratios
    if up:
        asked = len(ratios) * pairs
        assert {server.next()["To"] for _ in range(asked)} == {f"known{n:03}@x.io" for n in range(asked)}
    else:
        assert awaited(lambda: "mail_delayed" in service.log)
