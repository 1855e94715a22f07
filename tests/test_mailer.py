"""What is mailed, to whom, over what: against a real mail server with TLS in this process."""

from __future__ import annotations

import json
import queue
import re
import smtplib
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import requests
import trustme

import guard
import mailer
import totp
from auth import Auth, AuthError
from authsvc import create_app
from mailer import Mailer
from settings import Settings
from storage import DB
from tests.conftest import COST, Answer, Client, Clock, Service
from tests.post import SMTP_PASSWORD, USER, Post

PUBLIC_URL = "https://auth.example.com"
BOB, PASSWORD, NEW_PASSWORD = "Bob@x.io", "tarte flambée du dimanche", "choucroute garnie du lundi"
SUBJECT = "Reset your password at auth.example.com"


class Log:
    """What a mailer logs, to be waited for."""

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
def _unflooded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_log_floods", {})


@pytest.fixture
def open_post(certificate: trustme.LeafCert) -> Iterator[Callable[..., Post]]:
    """Open mail servers; they are closed after the test."""
    opened: list[Post] = []

    def open_one(scheme: str = "smtp+starttls", certificate: trustme.LeafCert = certificate, **rest: Any) -> Post:
        opened.append(Post(certificate, scheme, **rest))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


@pytest.fixture
def post(open_post: Callable[..., Post]) -> Post:
    return open_post()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., Settings]:
    """What faces the internet, but for the cost of a hash: settings refuse less than 10 there."""
    (tmp_path / "password").write_text(SMTP_PASSWORD + "\n")

    def make(smtp_url: str, place: str = "unused") -> Settings:
        settings = Settings(
            database=place,
            public_url=PUBLIC_URL,
            bcrypt_cost=10,
            smtp_url=smtp_url,
            smtp_password_file=str(tmp_path / "password"),
            mail_from="auth@example.com",
        )
        object.__setattr__(settings, "bcrypt_cost", COST)
        return settings

    return make


@pytest.fixture
def settings(settings_for: Callable[..., Settings], post: Post, place: str) -> Settings:
    return settings_for(post.url, place)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def sender(settings_for: Callable[..., Settings], post: Post, log: Log) -> Mailer:
    return Mailer(settings_for(post.url), log)


@pytest.fixture
def auth(db: DB, settings: Settings, clock: Clock, sender: Mailer) -> Auth:
    auth = Auth(db, settings, clock, mailer=sender)
    auth.register_user(BOB, PASSWORD)
    return auth


def ask(call: Client, address: str = BOB, client: str = "192.0.2.1", **environ: Any) -> Answer:
    return call("POST", "/reset_password", {"email": address}, REMOTE_ADDR=client, **environ)


def settle(sender: Mailer) -> None:
    """Wait until the worker has done what was asked of it before."""
    done = threading.Event()
    sender.put(done.set)
    assert done.wait(5)


def count_mails(sender: Mailer, post: Post) -> int:
    settle(sender)
    return post.arrived.qsize()


def link_of(mail: EmailMessage) -> dict[str, str]:
    """The fragment of the one link in a mail."""
    (fragment,) = re.findall(rf"^{PUBLIC_URL}/reset#(\S+)$", mail.get_content(), re.MULTILINE)
    return {name: value for name, (value,) in parse_qs(fragment, strict_parsing=True).items()}


def confirm(call: Client, token: str, password: str = NEW_PASSWORD) -> int:
    form = {"email": BOB, "reset_token": token, "new_password": password}
    return call("PUT", "/reset_password", form, REMOTE_ADDR="192.0.2.1").status


# What is mailed


def test_a_reset_is_mailed_to_the_stored_address(call: Client, post: Post) -> None:
    assert ask(call, "BOB@X.IO").status == 200
    sent_by, recipients, mail = post.arrived.get(timeout=5)
    assert (sent_by, recipients) == ("auth@example.com", [BOB])
    assert (mail["From"], mail["To"], mail["Subject"]) == ("auth@example.com", BOB, SUBJECT)
    assert mail["Auto-Submitted"] == "auto-generated"
    assert mail["Message-ID"].endswith("@example.com>")


def test_the_link_carries_what_resets_the_password(call: Client, post: Post) -> None:
    ask(call)
    link = link_of(post.next())
    assert link.keys() == {"token", "email"}
    assert link["email"] == BOB
    assert confirm(call, link["token"]) == 200
    form = {"email": BOB, "password": NEW_PASSWORD}
    assert call("POST", "/sessions", form, REMOTE_ADDR="192.0.2.1").status == 200


def test_no_header_of_a_request_gets_into_a_mail(call: Client, post: Post) -> None:
    evil = "evil.example"
    forged = {
        "HTTP_HOST": evil,
        "HTTP_X_FORWARDED_HOST": evil,
        "HTTP_X_FORWARDED_SERVER": evil,
        "HTTP_FORWARDED": f"host={evil}",
        "HTTP_REFERER": f"https://{evil}",
        "HTTP_USER_AGENT": evil,
        "SERVER_NAME": evil,
    }
    assert ask(call, **forged).status == 200
    assert evil not in post.next().as_string()


@pytest.mark.parametrize("address", ["o'brien@x.io", "bob+tag@x.io", "a&b$c`d`!e@x.io", "--bob@x.io", "b%40b@x.io"])
def test_the_link_in_a_mail_keeps_an_odd_email(sender: Mailer, address: str) -> None:
    text = sender.reset(address, "to-ken_0").get_content()
    assert parse_qs(link_fragment(text)) == {"token": ["to-ken_0"], "email": [address]}


def link_fragment(text: str) -> str:
    return text.partition("/reset#")[2].split()[0]


def test_a_change_of_the_password_is_told(call: Client, post: Post) -> None:
    ask(call)
    token = link_of(post.next())["token"]
    confirm(call, token)
    _, recipients, mail = post.arrived.get(timeout=5)
    assert (recipients, mail["Subject"]) == ([BOB], "Your password was changed at auth.example.com")
    assert token not in mail.as_string()
    assert NEW_PASSWORD not in mail.get_content()


def test_a_refused_change_is_not_told(call: Client, post: Post, sender: Mailer) -> None:
    assert confirm(call, "wrong") == 403
    assert count_mails(sender, post) == 0


def told(post: Post) -> tuple[str, str]:
    """The next mail to Bob: what it is about, and its text."""
    _, recipients, mail = post.arrived.get(timeout=5)
    assert recipients == [BOB]
    assert mail["Subject"].endswith(" at auth.example.com")
    return mail["Subject"].removesuffix(" at auth.example.com"), mail.get_content()


def test_every_change_by_who_is_logged_in_is_told(auth: Auth, clock: Clock, post: Post) -> None:
    session_id = auth.create_session(BOB)
    _, session_id = auth.change_password(session_id, PASSWORD, NEW_PASSWORD)
    seed, _ = auth.begin_totp(session_id, NEW_PASSWORD)
    _, session_id, recovery = auth.confirm_totp(session_id, totp.code(seed, int(clock()) // 30))
    _, session_id = auth.remove_totp(session_id, NEW_PASSWORD, recovery[0])
    auth.delete_account(session_id, NEW_PASSWORD)
    mails = [told(post) for _ in range(4)]
    assert [what for what, _ in mails] == [
        "Your password was changed",
        "A second factor was switched on",
        "The second factor was switched off",
        "Your account was deleted",
    ]
    for what, text in mails:
        assert text.startswith(f"{what}: {BOB} at auth.example.com, just now.")
        assert not [secret for secret in (PASSWORD, NEW_PASSWORD, seed, session_id, *recovery) if secret in text]


@pytest.mark.parametrize(
    "act",
    [
        lambda auth, mine: auth.change_password(mine, "wrong", NEW_PASSWORD),
        lambda auth, mine: auth.change_password(mine, PASSWORD, "short"),
        lambda auth, mine: auth.change_password(None, PASSWORD, NEW_PASSWORD),
        lambda auth, mine: auth.delete_account(mine, "wrong"),
        lambda auth, mine: auth.begin_totp(mine, "wrong"),
        lambda auth, mine: auth.confirm_totp(mine, "000000"),
        lambda auth, mine: auth.remove_totp(mine, PASSWORD, "000000"),
    ],
)
def test_what_was_refused_is_not_told(
    auth: Auth, post: Post, sender: Mailer, act: Callable[[Auth, str | None], object]
) -> None:
    mine = auth.create_session(BOB)
    with pytest.raises(AuthError):
        act(auth, mine)
    assert count_mails(sender, post) == 0


def test_a_seed_that_is_not_in_force_is_not_told(auth: Auth, post: Post, sender: Mailer) -> None:
    auth.begin_totp(auth.create_session(BOB), PASSWORD)
    assert count_mails(sender, post) == 0


@pytest.mark.parametrize("state", ["invited", "disabled"])
def test_who_was_only_invited_or_is_disabled_gets_no_mail(
    call: Client, auth: Auth, db: DB, post: Post, sender: Mailer, clock: Clock, state: str
) -> None:
    eve = auth.add_account("eve@x.io")
    token, _ = auth.link_token(eve)
    if state == "disabled":
        auth.update_password(token, PASSWORD)
        assert post.next()["To"] == "eve@x.io"
        db.disable_user(eve.id, int(clock()))
    clock.advance(86_400)  # so that it is not the link's youth that keeps it
    said = [comparable(ask(call, address)) for address in ("eve@x.io", "nobody@x.io")]
    assert said[0] == said[1]
    assert count_mails(sender, post) == 0
    if state == "invited":  # and the invitation is as good as before
        auth.update_password(token, PASSWORD)


@pytest.mark.parametrize(
    "address", ["bob@x.io", "o'brien+tag@x.io", "a&token=evil#c@x.io", "a b@x", "почта@x", "%", ""]
)
def test_a_link_carries_email_and_token_in_its_fragment_alone(address: str) -> None:
    link = mailer.reset_link(PUBLIC_URL, address, "to-ken_0")
    assert re.fullmatch("[!-~]+", link)
    parts = urlsplit(link)
    assert (f"{parts.scheme}://{parts.netloc}", parts.path, parts.query) == (PUBLIC_URL, "/reset", "")
    found = parse_qs(parts.fragment, strict_parsing=True, keep_blank_values=True)
    assert found == {"token": ["to-ken_0"], "email": [address]}


def test_an_unknown_email_gets_no_mail(call: Client, post: Post, sender: Mailer) -> None:
    assert ask(call, "nobody@x.io").status == 200
    assert count_mails(sender, post) == 0


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
def test_an_odd_address_of_development_gets_no_mail(
    call: Client, db: DB, post: Post, sender: Mailer, log: Log, address: str
) -> None:
    db.add_user(address, b"hash")
    assert ask(call, address).status == 200
    assert count_mails(sender, post) == 0
    assert log.next() == ("mail_dropped", {"reason": "ValueError"})
    ask(call)
    assert post.next()["To"] == BOB


# How


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_it_is_sent_over_tls_after_a_login(
    open_post: Callable[..., Post], settings_for: Callable[..., Settings], log: Log, scheme: str
) -> None:
    post = open_post(scheme)
    sender = Mailer(settings_for(post.url), log)
    sender.put(lambda: sender.notice(BOB, "Your password was changed"))
    assert post.next()["To"] == BOB
    assert post.logins == [(USER.encode(), SMTP_PASSWORD.encode())]
    assert log.next() == ("mail_sent", {"tries": 1})


def foreign() -> trustme.LeafCert:
    return trustme.CA().issue_cert("localhost")


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
@pytest.mark.parametrize("why", ["another authority", "another host"])
def test_a_server_that_cannot_prove_who_it_is_gets_nothing(
    open_post: Callable[..., Post],
    settings_for: Callable[..., Settings],
    authority: trustme.CA,
    log: Log,
    scheme: str,
    why: str,
) -> None:
    post = open_post(scheme, foreign() if why == "another authority" else authority.issue_cert("elsewhere.example"))
    sender = Mailer(settings_for(post.url), log)
    sender.put(lambda: sender.reset(BOB, "canary-token"))
    assert log.next() == ("mail_delayed", {"reason": "SSLCertVerificationError", "smtp_code": 0, "tries": 1})
    assert (post.arrived.qsize(), post.logins) == (0, [])


def test_a_server_without_tls_gets_nothing(
    open_post: Callable[..., Post], settings_for: Callable[..., Settings], log: Log
) -> None:
    post = open_post(starttls=False)
    sender = Mailer(settings_for(post.url), log)
    sender.put(lambda: sender.reset(BOB, "canary-token"))
    event, details = log.next()
    assert (event, details["reason"]) == ("mail_delayed", "SMTPNotSupportedError")
    assert (post.arrived.qsize(), post.logins) == (0, [])


def test_a_wrong_password_sends_nothing_and_is_not_logged(
    post: Post, settings_for: Callable[..., Settings], log: Log, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("canary-wrong")
    sender = Mailer(settings_for(post.url), log)
    sender.put(lambda: sender.reset(BOB, "canary-token"))
    assert log.next() == ("mail_dropped", {"reason": "SMTPAuthenticationError", "smtp_code": 535, "tries": 1})
    assert post.arrived.qsize() == 0
    assert "canary" not in log.text
    assert BOB not in log.text


def test_the_log_holds_no_token_and_no_address(
    call: Client, post: Post, log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(call)
    token = link_of(post.next())["token"]
    assert log.next()[0] == "mail_sent"
    logged = log.text + capsys.readouterr().err
    assert "authn_reset_token_created" in logged
    assert token not in logged
    assert BOB not in logged


# Whether it could be sent


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_a_check_logs_in_and_sends_nothing(
    open_post: Callable[..., Post], settings_for: Callable[..., Settings], log: Log, scheme: str
) -> None:
    post = open_post(scheme)
    threads = threading.active_count()
    Mailer(settings_for(post.url), log).check()
    assert post.logins == [(USER.encode(), SMTP_PASSWORD.encode())]
    assert (post.arrived.qsize(), log.text, threading.active_count()) == (0, "", threads)


def test_a_check_tells_a_wrong_password(
    post: Post, settings_for: Callable[..., Settings], log: Log, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("canary-wrong")
    with pytest.raises(smtplib.SMTPAuthenticationError) as refusal:
        Mailer(settings_for(post.url), log).check()
    assert "canary" not in str(refusal.value)


@pytest.mark.parametrize("scheme", ["smtp+starttls", "smtps"])
def test_a_check_tells_a_server_that_cannot_prove_who_it_is(
    open_post: Callable[..., Post], settings_for: Callable[..., Settings], log: Log, scheme: str
) -> None:
    post = open_post(scheme, foreign())
    with pytest.raises(ssl.SSLCertVerificationError):
        Mailer(settings_for(post.url), log).check()
    assert post.logins == []


def test_a_check_tells_a_server_without_tls(
    open_post: Callable[..., Post], settings_for: Callable[..., Settings], log: Log
) -> None:
    post = open_post(starttls=False)
    with pytest.raises(smtplib.SMTPNotSupportedError):
        Mailer(settings_for(post.url), log).check()
    assert post.logins == []


def test_a_check_tells_that_there_is_no_server(settings_for: Callable[..., Settings], log: Log) -> None:
    with pytest.raises(ConnectionRefusedError):
        Mailer(settings_for(f"smtps://localhost:{free_port()}"), log).check()
    with pytest.raises(OSError, match="no mail server"):
        Mailer(Settings(database="unused"), log).check()


# When it cannot be sent


def test_a_server_that_is_down_delays_a_mail(
    open_post: Callable[..., Post],
    settings_for: Callable[..., Settings],
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mailer, "RETRIES", (0.05,) * 100)
    port = free_port()
    sender = Mailer(settings_for(f"smtps://{quote(USER, safe='')}@localhost:{port}"), log)
    sender.put(lambda: sender.notice(BOB, "Your password was changed"))
    assert log.next() == ("mail_delayed", {"reason": "ConnectionRefusedError", "smtp_code": 0, "tries": 1})
    assert open_post("smtps", port=port).next()["To"] == BOB
    while (said := log.next())[0] == "mail_delayed":
        pass
    assert said[0] == "mail_sent"


TEMPORARY = ["450 4.7.1 greylisted, come again", "452 4.2.2 mailbox full"]
FINAL = ["550 5.1.1 no such user", "553 5.1.3 bad address"]


@pytest.mark.parametrize("answer", TEMPORARY)
def test_a_recipient_who_is_refused_for_now_is_tried_again(
    post: Post, sender: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    monkeypatch.setattr(mailer, "RETRIES", (0, 0, 0, 0))
    post.recipient_says = [answer] * 2
    sender.put(lambda: sender.notice(BOB, "Your password was changed"))
    assert [log.next()[0] for _ in range(3)] == ["mail_delayed", "mail_delayed", "mail_sent"]
    assert post.next()["To"] == BOB


@pytest.mark.parametrize("answer", FINAL)
def test_a_recipient_who_is_refused_for_good_is_not_tried_again(
    post: Post, sender: Mailer, log: Log, answer: str
) -> None:
    post.recipient_says = [answer]
    sender.put(lambda: sender.notice(BOB, "Your password was changed"))
    event, details = log.next()
    assert (event, details["tries"]) == ("mail_dropped", 1)


@pytest.mark.parametrize(("answer", "event"), [("451 later", "mail_delayed"), ("554 spam", "mail_dropped")])
def test_a_mail_that_is_refused(post: Post, sender: Mailer, log: Log, answer: str, event: str) -> None:
    post.data_says = [answer]
    sender.put(lambda: sender.notice(BOB, "Your password was changed"))
    assert log.next() == (event, {"reason": "SMTPDataError", "smtp_code": int(answer[:3]), "tries": 1})


def test_a_mail_is_given_up_after_the_last_try(
    post: Post, sender: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailer, "RETRIES", (0, 0))
    post.data_says = ["451 later"] * 3
    sender.put(lambda: sender.notice(BOB, "Your password was changed"))
    said = [log.next() for _ in range(3)]
    assert [(event, details["tries"]) for event, details in said] == [
        ("mail_delayed", 1),
        ("mail_delayed", 2),
        ("mail_dropped", 3),
    ]


def test_mails_that_wait_do_not_hold_up_the_next(
    post: Post, sender: Mailer, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    post.data_says = ["451 later"]
    sender.put(lambda: sender.notice("first@x.io", "Your password was changed"))
    sender.put(lambda: sender.notice("second@x.io", "Your password was changed"))
    assert post.next()["To"] == "second@x.io"


def test_a_retry_comes_while_new_mail_keeps_coming(
    post: Post, sender: Mailer, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(mailer, "RETRIES", (0, 0, 0, 0))
    post.data_says = ["451 later"]
    sender.put(lambda: sender.notice("first@x.io", "Your password was changed"))
    over = threading.Event()

    def again() -> None:
        if not over.is_set():
            sender.put(again)

    again()
    try:
        assert post.next()["To"] == "first@x.io"
    finally:
        over.set()


def test_the_queue_is_bounded(settings_for: Callable[..., Settings], log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailer, "WAITING", 3)
    sender = Mailer(settings_for(f"smtps://localhost:{free_port()}"), log)
    gate, running = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert gate.wait(5)

    sender.put(hold)
    assert running.wait(5)
    for _ in range(5):
        sender.put(lambda: None)
    assert [log.next() for _ in range(2)] == [("mail_dropped", {"reason": "queue full"})] * 2
    gate.set()


def test_the_mails_that_wait_for_another_try_are_bounded(
    post: Post, sender: Mailer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailer, "WAITING", 2)
    post.data_says = ["451 later"] * 3
    for _ in range(3):
        sender.put(lambda: sender.notice(BOB, "Your password was changed"))
        settle(sender)
    assert [log.next()[0] for _ in range(3)] == ["mail_delayed", "mail_delayed", "mail_dropped"]


def test_a_task_that_fails_ends_no_worker(post: Post, sender: Mailer, log: Log) -> None:
    def fail() -> None:
        raise RuntimeError("canary")

    sender.put(fail)
    sender.put(lambda: sender.notice(BOB, "Your password was changed"))
    assert post.next()["To"] == BOB
    assert log.next() == ("mail_dropped", {"reason": "RuntimeError"})


def test_without_a_mail_server_nothing_waits(db: DB, place: str, clock: Clock) -> None:
    settings = Settings(database=place, public_url=PUBLIC_URL, bcrypt_cost=10)
    auth = Auth(db, settings, clock, mailer=Mailer(settings, print))
    auth._db.add_user(BOB, b"hash")
    assert ask(Client(create_app(settings, auth))).status == 200
    assert db.find_user_by(email=BOB).reset_token is None


def test_a_mailer_starts_no_thread_before_the_first_mail(settings_for: Callable[..., Settings], log: Log) -> None:
    before = threading.active_count()
    Mailer(settings_for(f"smtps://localhost:{free_port()}"), log)
    assert threading.active_count() == before


# How often


def test_a_link_younger_than_five_minutes_stays_good(call: Client, clock: Clock, post: Post, sender: Mailer) -> None:
    ask(call)
    token = link_of(post.next())["token"]
    clock.advance(299)
    ask(call)
    assert count_mails(sender, post) == 0
    assert confirm(call, token) == 200


def test_a_link_of_five_minutes_is_replaced(call: Client, clock: Clock, post: Post) -> None:
    ask(call)
    old = link_of(post.next())["token"]
    clock.advance(300)
    ask(call)
    new = link_of(post.next())["token"]
    assert confirm(call, old) == 403
    assert confirm(call, new) == 200


def test_a_spent_link_can_be_followed_by_another_at_once(call: Client, post: Post) -> None:
    ask(call)
    assert confirm(call, link_of(post.next())["token"]) == 200
    assert post.next()["Subject"] != SUBJECT
    ask(call)
    assert post.next()["Subject"] == SUBJECT


def test_a_link_from_before_the_clock_jumped_back_does_not_stop_the_next(
    call: Client, clock: Clock, post: Post
) -> None:
    ask(call)
    post.next()
    clock.advance(-86_400)
    ask(call)
    assert post.next()["Subject"] == SUBJECT


def test_100_requests_in_an_hour_are_at_most_5_mails_then_3_an_hour(
    call: Client, clock: Clock, post: Post, sender: Mailer, capsys: pytest.CaptureFixture[str]
) -> None:
    form = {"email": BOB, "password": PASSWORD}
    cookie = call("POST", "/sessions", form, REMOTE_ADDR="192.0.2.1").headers["Set-Cookie"].partition(";")[0]
    answers: list[Answer] = []
    mails: list[int] = []
    for hour in range(3):
        for n in range(100):
            answers.append(ask(call, client=f"10.0.{hour}.{n}"))
            settle(sender)
            clock.advance(36)
        mails.append(post.arrived.qsize() - sum(mails))
    assert 3 <= mails[0] <= 5
    assert mails[1:] == [3, 3]
    assert {(answer.status, answer.body) for answer in answers} == {(answers[0].status, answers[0].body)}
    assert "excess_rate_limit_exceeded" in capsys.readouterr().err
    assert call("GET", "/profile", cookie=cookie, REMOTE_ADDR="192.0.2.1").status == 200
    assert call("POST", "/sessions", form, REMOTE_ADDR="192.0.2.1").status == 200


def test_one_address_can_have_10_mailed_at_once(call: Client, db: DB, post: Post, sender: Mailer) -> None:
    for n in range(15):
        db.add_user(f"{n}@x.io", b"hash")
        assert ask(call, f"{n}@x.io").status == 200
    assert count_mails(sender, post) == 10


# What a request tells


def comparable(answer: Answer) -> tuple[int, dict[str, str], bytes]:
    return answer.status, {**answer.headers, "X-Request-Id": ""}, answer.body


def test_no_request_waits_for_a_mail_nor_tells_whether_there_is_one(call: Client, sender: Mailer) -> None:
    gate, running = threading.Event(), threading.Event()

    def hold() -> None:
        running.set()
        assert gate.wait(5)

    sender.put(hold)
    assert running.wait(5)
    said = [comparable(ask(call, address)) for address in (BOB, "nobody@x.io", "no mailbox", "é@x.io", "a" * 300)]
    gate.set()
    assert said == [said[0]] * 5
    assert said[0][0] == 200
    settle(sender)


@pytest.mark.once
@pytest.mark.slow  # a real process, 240 requests
@pytest.mark.parametrize("up", [True, False], ids=["server up", "server down"])
def test_the_time_does_not_tell_whether_an_email_is_known(
    start: Callable[..., Service], post: Post, tmp_path: Path, authority_file: str, up: bool
) -> None:
    port = post.port if up else free_port()
    (tmp_path / "password").write_text(SMTP_PASSWORD)
    db = DB(tmp_path / "authsvc.db")
    for n in range(120):
        db.add_user(f"known{n:03}@x.io", b"hash")
    db.close()
    service = start(
        AUTHSVC_BCRYPT_COST="10",
        AUTHSVC_PUBLIC_URL=PUBLIC_URL,
        AUTHSVC_TRUSTED_PROXY="127.0.0.1",
        AUTHSVC_SMTP_URL=f"smtp+starttls://{quote(USER, safe='')}@localhost:{port}",
        AUTHSVC_SMTP_PASSWORD_FILE=str(tmp_path / "password"),
        AUTHSVC_MAIL_FROM="auth@example.com",
        SSL_CERT_FILE=authority_file,
    )
    ratios, said = [], set()
    with requests.Session() as client:

        def timed(address: str, n: int) -> float:
            headers = {"X-Forwarded-For": f"10.0.0.{n}", "X-Forwarded-Proto": "https"}
            began = time.perf_counter()
            answer = client.post(f"{service.url}/reset_password", {"email": address}, headers=headers, timeout=10)
            took = time.perf_counter() - began
            kept = {
                name: value for name, value in answer.headers.items() if name.lower() not in ("date", "x-request-id")
            }
            said.add((answer.status_code, answer.content, tuple(kept.items())))
            return took

        for beginning in (0, 40, 80):
            took: dict[str, list[float]] = {"known": [], "other": []}
            for n in range(beginning, beginning + 40):
                # In turns the first: what the worker does meanwhile slows the one as often as the other.
                for kind in ("known", "other") if n % 2 else ("other", "known"):
                    took[kind].append(timed(f"{kind}{n:03}@x.io", n))
                    time.sleep(0.02)
            ratios.append(statistics.median(took["known"]) / statistics.median(took["other"]))
    assert len(said) == 1
    assert next(iter(said))[0] == 200
    assert min(abs(ratio - 1) for ratio in ratios) < 0.1, ratios
    if up:
        assert {post.next()["To"] for _ in range(120)} == {f"known{n:03}@x.io" for n in range(120)}
    else:
        assert "mail_delayed" in service.log
