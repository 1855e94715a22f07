"""What changes when strangers are expected, and what they find when they push."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
import requests

import authsvc
import guard
import lanes
import passwords
import totp
from auth import Auth
from authsvc import create_app
from settings import Settings
from storage import DB, open_store
from tests.conftest import COST, HERE, Answer, Client, Clock, Service, clean_environ, rows_in

PUBLIC_URL = "https://auth.example.com"
PROXY = "127.0.0.1"
CLIENT = "192.0.2.1"
BOB, PASSWORD = "bob@x.io", "tarte flambée du dimanche"
FORM = {"email": BOB, "password": PASSWORD}


def production(place: str = "unused", **changes: Any) -> Settings:
    """Settings that face the internet, but for the cost of a hash: they refuse less than 10."""
    settings = Settings(database=place, public_url=PUBLIC_URL, bcrypt_cost=10, **changes)
    object.__setattr__(settings, "bcrypt_cost", COST)
    return settings


@pytest.fixture
def settings(place: str) -> Settings:
    return production(place)


@pytest.fixture
def bob(auth: Auth) -> None:
    auth.register_user(BOB, PASSWORD)


@pytest.fixture(autouse=True)
def _unflooded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_log_floods", {})


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real process that takes this machine for its proxy; use a client address of your own."""
    one = Service(
        tmp_path_factory.mktemp("behind"),
        AUTHSVC_PUBLIC_URL=PUBLIC_URL,
        AUTHSVC_TRUSTED_PROXY=PROXY,
        AUTHSVC_BCRYPT_COST="10",
    )
    yield one
    one.end()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One application behind a proxy, with Bob in it, for what changes nothing there."""
    settings = production(str(tmp_path_factory.mktemp("house") / "authsvc.db"), trusted_proxy=PROXY)
    db = open_store(settings.database)
    call = Client(create_app(settings, Auth(db, settings)))
    assert ask(call, "POST", "/users", FORM).status == 200
    yield call
    db.close()


_hosts = itertools.count(1)


def ask(call: Client, method: str, path: str, form: Any = None, **rest: Any) -> Answer:
    """Ask as somebody who never asked before, unless told who."""
    number = next(_hosts)
    return call(method, path, form, **{"REMOTE_ADDR": f"10.0.{number // 250}.{number % 250}", **rest})


def logged(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# Cookie and headers


@pytest.mark.parametrize(
    ("changes", "name", "domain"),
    [
        ({}, "__Host-session_id", ""),
        ({"cookie_domain": "example.com"}, "__Secure-session_id", "; Domain=example.com"),
        ({"cookie_domain": "auth.example.com"}, "__Secure-session_id", "; Domain=auth.example.com"),
    ],
)
def test_the_cookie(place: str, clock: Clock, changes: dict[str, str], name: str, domain: str) -> None:
    settings = production(place, **changes)
    db = open_store(settings.database)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    ask(call, "POST", "/users", FORM)
    cookie = ask(call, "POST", "/sessions", FORM).headers["Set-Cookie"]
    attributes = f"; HttpOnly; Path=/; SameSite=Lax; Secure{domain}"
    assert re.fullmatch(f"{name}=[A-Za-z0-9_-]{{43}}{attributes}", cookie)
    session_id = cookie.partition(";")[0].partition("=")[2]
    assert ask(call, "GET", "/profile", cookie=f"session_id={session_id}").status == 403
    assert ask(call, "GET", "/profile", cookie=f"{name}={session_id}").status == 200
    ended = ask(call, "DELETE", "/sessions", cookie=f"{name}={session_id}")
    assert (ended.status, ended.headers["Set-Cookie"]) == (302, f"{name}={attributes}; Max-Age=0")
    db.close()


@pytest.mark.parametrize(
    ("changes", "name", "domain"),
    [
        ({}, "__Host-session_id", ""),
        ({"cookie_domain": "example.com"}, "__Secure-session_id", "; Domain=example.com"),
    ],
)
def test_the_cookie_is_renewed_and_deleted_with_the_same_attributes(
    place: str, clock: Clock, changes: dict[str, str], name: str, domain: str
) -> None:
    settings = production(place, **changes)
    db = open_store(settings.database)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    attributes = f"; HttpOnly; Path=/; SameSite=Lax; Secure{domain}"
    ask(call, "POST", "/users", FORM)
    session_id, new = ask(call, "POST", "/sessions", FORM).session_id, "choucroute du lundi"
    seed = ask(call, "POST", "/totp", FORM, cookie=f"{name}={session_id}").json["secret"]

    def code() -> str:
        clock.advance(totp.STEP)
        return totp.code(seed, int(clock()) // totp.STEP)

    for method, path, form in [
        ("PUT", "/totp", {"otp": code()}),
        ("DELETE", "/totp", {"password": PASSWORD, "otp": code()}),
        ("PUT", "/password", {"password": PASSWORD, "new_password": new}),
    ]:
        renewed = ask(call, method, path, form, cookie=f"{name}={session_id}")
        assert renewed.status == 200
        assert re.fullmatch(f"{name}=[A-Za-z0-9_-]{{43}}{attributes}", renewed.headers["Set-Cookie"])
        assert ask(call, "GET", "/profile", cookie=f"{name}={session_id}").status == 403
        session_id = renewed.session_id
        assert ask(call, "GET", "/profile", cookie=f"{name}={session_id}").status == 200
    for path, form in [
        (f"/sessions/{hashlib.sha256(session_id.encode()).hexdigest()[:16]}", {}),
        ("/sessions/all", {}),
        ("/profile", {"password": new}),
    ]:
        ended = ask(call, "DELETE", path, form, cookie=f"{name}={session_id}")
        assert (ended.status, ended.headers["Set-Cookie"]) == (200, f"{name}={attributes}; Max-Age=0")
        again = ask(call, "POST", "/sessions", {**FORM, "password": new})
        session_id = again.session_id if again.status == 200 else ""
    assert session_id == ""
    db.close()


@pytest.mark.usefixtures("bob")
def test_a_session_id_that_somebody_chose_is_not_taken_over(call: Client) -> None:
    chosen = "__Host-session_id=" + "A" * 43
    assert ask(call, "POST", "/sessions", FORM, cookie=chosen).session_id not in chosen
    assert ask(call, "GET", "/profile", cookie=chosen).status == 403


@pytest.mark.parametrize("path", ["/", "/profile", "/nowhere", "/users", "//"])
def test_every_answer_asks_for_https_from_now_on(house: Client, path: str) -> None:
    assert ask(house, "GET", path).headers["Strict-Transport-Security"] == "max-age=31536000"


def test_development_does_not_ask_for_https(tmp_path: Path) -> None:
    call = Client(create_app(Settings(database=str(tmp_path / "dev.db"), bcrypt_cost=COST)))
    assert "Strict-Transport-Security" not in call("GET", "/").headers


def test_secrets_have_256_random_bits(auth: Auth, bob: None) -> None:
    secrets = [auth.create_session(BOB) or "" for _ in range(20)]
    secrets += [auth.get_reset_password_token(BOB) for _ in range(20)]
    assert all(re.fullmatch("[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    assert len(set(secrets)) == 40


# Reset


@pytest.mark.parametrize("email", [BOB, "BOB@x.io", "nobody@x.io", "nope", "é@x.io", "a@x, evil@y", " ", "a" * 300])
def test_a_reset_is_answered_alike_for_every_email(house: Client, email: str) -> None:
    answer = ask(house, "POST", "/reset_password", {"email": email}, REMOTE_ADDR="127.0.0.1")
    assert (answer.status, answer.json) == (200, {"message": "if the email has an account, a mail is on its way"})
    assert answer.headers.keys() == ask(house, "GET", "/").headers.keys()


# Email and password


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
]


@pytest.mark.parametrize("email", REFUSED_EMAILS)
def test_what_could_be_no_recipient_is_refused(house: Client, email: str) -> None:
    answer = ask(house, "POST", "/users", {"email": email, "password": PASSWORD})
    assert answer.status == 400
    assert answer.json["message"].startswith("email must ")
    assert ask(house, "POST", "/sessions", {"email": email, "password": PASSWORD}).status == 401


@pytest.mark.parametrize("email", ["a@b", "o'brien+tag@x.io", "a&b$c`d!e#f%g*h/i=j?k^l_m{n|o}p~q@x-y.z", "1@2"])
def test_a_mailbox_registers(house: Client, email: str) -> None:
    answer = ask(house, "POST", "/users", {"email": email, "password": PASSWORD})
    assert (answer.status, answer.json) == (200, {"email": email, "message": "user created"})


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
    ("bobsmith@mail.example", EMAIL),
    ("bobsmithbobsmith42", EMAIL),
    ("BobSmith-mail-Example!", EMAIL),
    ("bobsmithersbobsmithers", EMAIL),
    ("x" + "aé" * 1024, LONG),
]


@pytest.mark.parametrize(("password", "reason"), REFUSED_PASSWORDS)
def test_a_password_that_is_easy_to_guess_is_refused(house: Client, password: str, reason: str) -> None:
    email = "bob@bobsmithers.example" if "smithers" in password else "bobsmith@mail.example"
    answer = ask(house, "POST", "/users", {"email": email, "password": password})
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


@pytest.mark.parametrize("password", ACCEPTED_PASSWORDS)
def test_a_long_password_of_any_kind_is_taken(house: Client, password: str) -> None:
    form = {"email": f"{next(_hosts)}+bobsmith@mail.example", "password": password}
    assert ask(house, "POST", "/users", form).status == 200
    assert ask(house, "POST", "/sessions", form).status == 200


@pytest.mark.parametrize("shortest", [8, 20])
def test_the_length_of_a_password_can_be_set(tmp_path: Path, clock: Clock, shortest: int) -> None:
    settings = production(str(tmp_path / "authsvc.db"), password_min=shortest)
    db = open_store(settings.database)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    password = "vdqxjbnrlhwygmkzpsctf"
    short = ask(call, "POST", "/users", {"email": BOB, "password": password[: shortest - 1]})
    assert (short.status, short.json) == (400, {"message": f"password must be at least {shortest} characters"})
    assert ask(call, "POST", "/users", {"email": BOB, "password": password[:shortest]}).status == 200
    db.close()


def test_a_common_password_is_refused_whatever_its_length() -> None:
    assert passwords.weakness("football", BOB, 8) == COMMON
    assert passwords.weakness("vdqxjbnr", BOB, 8) is None


@pytest.mark.usefixtures("bob")
def test_a_weak_new_password_does_not_spend_the_token(call: Client, auth: Auth) -> None:
    form = {"email": BOB, "reset_token": auth.get_reset_password_token(BOB), "new_password": "passwordpassword"}
    refused = ask(call, "PUT", "/reset_password", form)
    assert (refused.status, refused.json) == (400, {"message": COMMON})
    assert ask(call, "PUT", "/reset_password", {**form, "new_password": "choucroute du lundi"}).status == 200


@pytest.mark.usefixtures("bob")
def test_a_password_of_development_still_logs_in(call: Client, db: DB) -> None:
    db.update_user(1, hashed_password=passwords.hash_password("b4l0u", COST))
    assert ask(call, "POST", "/sessions", {"email": BOB, "password": "b4l0u"}).status == 200


@pytest.mark.usefixtures("bob")
def test_a_weak_password_is_no_new_one(call: Client, auth: Auth) -> None:
    cookie = f"__Host-session_id={auth.log_in(BOB, PASSWORD)[1]}"
    for password, reason in [("b4l0u", SHORT), ("passwordpassword", COMMON), ("aaaaaaaaaaaaaaaa", FEW)]:
        form = {"password": PASSWORD, "new_password": password}
        refused = ask(call, "PUT", "/password", form, cookie=cookie)
        assert (refused.status, refused.json) == (400, {"message": reason})
        assert "Set-Cookie" not in refused.headers
    assert ask(call, "POST", "/sessions", FORM).status == 200


# Who may register


@pytest.mark.parametrize(
    ("registration", "message"),
    [("closed", "registration is closed"), ("invitation", "registration is by invitation only")],
)
def test_registration_may_be_shut(
    place: str, clock: Clock, capsys: pytest.CaptureFixture[str], registration: str, message: str
) -> None:
    settings = production(place, registration=registration)
    db = open_store(settings.database)
    auth = Auth(db, settings, clock)
    call = Client(create_app(settings, auth))
    token, _ = auth.link_token(auth.add_account(BOB))
    for email in (BOB, "new@x.io", "nope"):  # nor does it tell who has an account
        answer = ask(call, "POST", "/users", {"email": email, "password": PASSWORD})
        assert (answer.status, answer.json) == (403, {"message": message})
    assert [line["event"] for line in logged(capsys.readouterr().err)] == ["authz_fail"] * 3
    assert ask(call, "POST", "/sessions", FORM).status == 401
    invited = {"email": BOB, "reset_token": token, "new_password": PASSWORD}
    assert ask(call, "PUT", "/reset_password", invited).status == 200
    assert ask(call, "POST", "/sessions", FORM).status == 200
    db.close()


# The start


GOOD = {"AUTHSVC_PUBLIC_URL": PUBLIC_URL, "AUTHSVC_LISTEN": "127.0.0.1:0"}

REFUSED_STARTS = [
    ({"AUTHSVC_BCRYPT_COST": "9"}, "AUTHSVC_BCRYPT_COST must be at least 10 in production"),
    ({"AUTHSVC_BCRYPT_COST": "4"}, "AUTHSVC_BCRYPT_COST must be at least 10 in production"),
    ({"AUTHSVC_BCRYPT_COST": "16"}, "AUTHSVC_BCRYPT_COST must be from 4 to 15"),
    ({"AUTHSVC_THROTTLE": "off"}, "AUTHSVC_THROTTLE cannot be off in production"),
    ({"AUTHSVC_PASSWORD_MIN": "7"}, "AUTHSVC_PASSWORD_MIN must be from 8 to 64"),
    ({"AUTHSVC_RESET_LIFETIME": "3601"}, "AUTHSVC_RESET_LIFETIME must be from 1 to 3600"),
    ({"AUTHSVC_REGISTRATION": "no"}, "AUTHSVC_REGISTRATION must be one of open, invitation, closed"),
    ({"AUTHSVC_UNSAFE_LISTEN": "1"}, "AUTHSVC_UNSAFE_LISTEN is for development"),
    ({"AUTHSVC_TRUSTED_PROXY": "10.0.0.0/8"}, "AUTHSVC_TRUSTED_PROXY must be one IP address"),
    ({"AUTHSVC_TRUSTED_PROXY": "proxy"}, "AUTHSVC_TRUSTED_PROXY must be one IP address"),
    ({"AUTHSVC_SMTP_URL": "smtps://mail.example.com"}, "AUTHSVC_MAIL_FROM and AUTHSVC_SMTP_URL go together"),
    ({"AUTHSVC_MAIL_FROM": "a@example.com"}, "AUTHSVC_MAIL_FROM and AUTHSVC_SMTP_URL go together"),
    (
        {"AUTHSVC_SMTP_URL": "smtps://mail.example.com", "AUTHSVC_MAIL_FROM": "A <a@x>"},
        "AUTHSVC_MAIL_FROM must be name@host",
    ),
    *[
        ({"AUTHSVC_SMTP_URL": url, "AUTHSVC_MAIL_FROM": "a@x"}, "AUTHSVC_SMTP_URL must be smtp+starttls://")
        for url in ("smtp://h", "h:25", "smtps://", "smtps://u:secret@h", "smtps://h:x", "smtps://h:0", "https://h")
    ],
    *[
        ({"AUTHSVC_PUBLIC_URL": url}, "AUTHSVC_PUBLIC_URL must be https://host")
        for url in (
            "http://auth.example.com",
            "https://auth.example.com/",
            "https://auth.example.com/auth",
            "https://auth.example.com?x",
            "https://auth.example.com#x",
            "https://u@auth.example.com",
            "https://Auth.example.com",
            "HTTPS://auth.example.com",
            "https://auth.example.com:",
            "https://auth.example.com:port",
            "https://auth..example.com",
            "https://é.example.com",
            "https://auth.example.com\n",
            " https://auth.example.com",
            "https://",
            "auth.example.com",
            "javascript:alert(1)",
            "//auth.example.com",
        )
    ],
    *[
        ({"AUTHSVC_COOKIE_DOMAIN": domain}, "AUTHSVC_COOKIE_DOMAIN must be the host of AUTHSVC_PUBLIC_URL or a parent")
        for domain in ("other.com", "com", ".example.com", "ample.com", "my.auth.example.com", "example.com; Path=/x")
    ],
]


@pytest.mark.parametrize(("environ", "reason"), REFUSED_STARTS)
def test_a_weak_setting_is_refused_at_the_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lanes.Server, "run", lambda self: pytest.fail("it serves"))
    for name, value in {**GOOD, **environ}.items():
        if value:
            monkeypatch.setenv(name, value)
    assert authsvc.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    name, demand = reason.split(" ", 1)
    assert re.match(rf"authsvc: {name}(=.*)? {re.escape(demand)}", err)
    assert "secret" not in err
    assert list(tmp_path.iterdir()) == []


def refused_start(folder: Path, **environ: str) -> str:
    """Start a process that must not; return the one line that says why."""
    command = [sys.executable, str(HERE / "authsvc.py")]
    environ = {**clean_environ(), **GOOD, **environ}
    ended = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    return line


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_database_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    DB(tmp_path / "authsvc.db").close()
    (tmp_path / "authsvc.db.lock").unlink()
    (tmp_path / "authsvc.db").chmod(mode)
    before = (tmp_path / "authsvc.db").read_bytes()
    assert "authsvc.db" in (line := refused_start(tmp_path))
    assert line.endswith("chmod 600")
    assert os.listdir(tmp_path) == ["authsvc.db"]
    assert (tmp_path / "authsvc.db").read_bytes() == before


def test_a_mail_password_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    environ = {"AUTHSVC_SMTP_URL": "smtps://u@h", "AUTHSVC_MAIL_FROM": "a@x", "AUTHSVC_SMTP_PASSWORD_FILE": "absent"}
    assert "AUTHSVC_SMTP_PASSWORD_FILE cannot be read" in refused_start(tmp_path, **environ)
    assert os.listdir(tmp_path) == []


@pytest.mark.once
def test_the_start_warns_where_all_clients_would_share_one_address(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_BCRYPT_COST="10")
    requests.get(service.url, timeout=5)
    reasons = [line["reason"] for line in logged(service.log) if line["event"] == "sys_warning"]
    assert any("AUTHSVC_TRUSTED_PROXY" in reason for reason in reasons)


def test_the_start_does_not_warn_behind_a_proxy(behind: Service) -> None:
    requests.get(behind.url, timeout=5)
    assert "no AUTHSVC_TRUSTED_PROXY" not in behind.log


# The proxy


@pytest.fixture
def proxied(place: str, db: DB, clock: Clock) -> Client:
    settings = production(place, trusted_proxy=PROXY)
    return Client(create_app(settings, Auth(db, settings, clock)))


@pytest.mark.parametrize(
    ("peer", "proto", "status"),
    [
        (PROXY, "http", 403),
        (PROXY, "HTTP", 403),
        (PROXY, "ws", 403),
        (PROXY, "https,http", 403),
        (PROXY, "", 403),
        (PROXY, "https", 200),
        (PROXY, "HTTPS", 200),
        (PROXY, None, 200),
        ("192.0.2.9", "http", 200),
    ],
)
def test_what_the_proxy_took_over_plain_http_is_refused(
    house: Client, peer: str, proto: str | None, status: int
) -> None:
    said: dict[str, Any] = {} if proto is None else {"HTTP_X_FORWARDED_PROTO": proto}
    answer = house("GET", "/", REMOTE_ADDR=peer, **said)
    assert answer.status == status
    assert (answer.json == {"message": "use https"}) == (status == 403)


@pytest.mark.parametrize(
    ("peer", "said", "client"),
    [
        (PROXY, None, PROXY),
        (PROXY, "203.0.113.5", "203.0.113.5"),
        (PROXY, "6.6.6.6, 203.0.113.5", "203.0.113.5"),
        (PROXY, "evil,203.0.113.5", "203.0.113.5"),
        (PROXY, "203.0.113.5, 6.6.6.6", "6.6.6.6"),
        (PROXY, "::ffff:203.0.113.5", "203.0.113.5"),
        (PROXY, "2001:DB8:0::1", "2001:db8::1"),
        (PROXY, "evil", "unknown"),
        (PROXY, "", "unknown"),
        (PROXY, "203.0.113.5,", "unknown"),
        (PROXY, "203.0.113.5:443", "unknown"),
        (PROXY, "[2001:db8::1]:443", "unknown"),
        (PROXY, "x" * 300, "unknown"),
        (PROXY, "203.0.113.5\r\nx", "unknown"),
        ("192.0.2.9", "203.0.113.5", "192.0.2.9"),
        ("127.0.0.2", "203.0.113.5", "127.0.0.2"),
    ],
)
def test_the_last_hop_is_believed_of_the_trusted_proxy_alone(
    house: Client, capsys: pytest.CaptureFixture[str], peer: str, said: str | None, client: str
) -> None:
    forwarded: dict[str, Any] = {} if said is None else {"HTTP_X_FORWARDED_FOR": said}
    house("POST", "/sessions", FORM, REMOTE_ADDR=peer, **forwarded)
    assert [line["address"] for line in logged(capsys.readouterr().err) if "address" in line] == [client]


def test_no_forwarded_address_gives_a_stranger_more_guesses(proxied: Client) -> None:
    peer = "192.0.2.9"
    said = [
        proxied("POST", "/sessions", FORM, REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=f"10.0.0.{n}").status
        for n in range(30)
    ]
    assert said == [401] * 10 + [429] * 20


def test_what_is_no_address_is_one_client(proxied: Client) -> None:
    said = [
        proxied("POST", "/sessions", FORM, REMOTE_ADDR=PROXY, HTTP_X_FORWARDED_FOR=f"junk{n}").status for n in range(30)
    ]
    assert said == [401] * 10 + [429] * 20


def test_a_forwarded_address_that_is_not_believed_is_logged_once(
    proxied: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    guard._warn_of_forwarding.cache_clear()
    for n in range(5):
        proxied("GET", "/", REMOTE_ADDR="192.0.2.9", HTTP_X_FORWARDED_FOR=f"10.0.0.{n}")
    assert [line["event"] for line in logged(capsys.readouterr().err)] == ["sys_forwarding_ignored"]


def test_two_forwarding_headers_are_one_list(behind: Service) -> None:
    reply = raw(behind.address, post("/sessions", FORM, "X-Forwarded-For: 6.6.6.6", "X-Forwarded-For: 203.0.113.200"))
    assert reply.startswith(b"HTTP/1.1 401 ")
    assert [line["address"] for line in logged(behind.log) if line["event"] == "authn_login_fail"][
        -1
    ] == "203.0.113.200"


# Where a request comes from


CROSS, SAME_SITE, OWN, USER = "cross-site", "same-site", "same-origin", "none"
EVIL = "https://evil.example"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize(
    ("site", "origin", "passes"),
    [
        (None, None, True),  # curl and scripts
        (None, PUBLIC_URL, True),
        (None, EVIL, False),
        (None, "null", False),
        (None, "", False),
        (None, f"{PUBLIC_URL}.evil.example", False),
        (None, f"{PUBLIC_URL}:444", False),
        (None, PUBLIC_URL.replace("https", "http"), False),
        (None, "http://localhost", False),  # what Host says does not count in production
        (OWN, None, True),
        (OWN, PUBLIC_URL, True),
        (USER, None, True),
        (CROSS, None, False),
        (CROSS, EVIL, False),
        (CROSS, "null", False),
        (CROSS, PUBLIC_URL, True),
        (SAME_SITE, None, False),
        (SAME_SITE, "https://www.example.com", False),
        (SAME_SITE, "null", False),
        ("", None, False),
        ("whatever", None, False),
    ],
)
def test_a_request_from_another_page_is_refused(
    house: Client, method: str, site: str | None, origin: str | None, passes: bool
) -> None:
    path = {"POST": "/sessions", "DELETE": "/sessions"}.get(method, "/reset_password")
    said: dict[str, Any] = {"HTTP_SEC_FETCH_SITE": site, "HTTP_ORIGIN": origin, "HTTP_HOST": "localhost"}
    answer = ask(house, method, path, FORM, **{name: value for name, value in said.items() if value is not None})
    refusal = {"message": "cross-origin request refused"}
    assert (answer.json != refusal) == passes
    if not passes:
        assert answer.status == 403
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(("site", "origin"), [(CROSS, None), (SAME_SITE, EVIL), (None, "null")])
@pytest.mark.usefixtures("bob")
def test_no_route_that_changes_anything_takes_a_request_from_another_page(
    call: Client, auth: Auth, site: str | None, origin: str | None
) -> None:
    session_id, token = auth.log_in(BOB, PASSWORD)[1], auth.get_reset_password_token(BOB)
    form = {**FORM, "new_password": "choucroute du lundi", "reset_token": token, "otp": "000000"}
    said = {"HTTP_SEC_FETCH_SITE": site, "HTTP_ORIGIN": origin}
    _, (session,), _ = auth.list_sessions(session_id)
    for method, path, *_ in authsvc.ROUTES:
        if method == "GET":
            continue
        answer = ask(
            call,
            method,
            path.replace("<public_id>", session.id),
            form,
            cookie=f"__Host-session_id={session_id}",
            **{name: value for name, value in said.items() if value is not None},
        )
        assert (answer.status, answer.json) == (403, {"message": "cross-origin request refused"})
        assert "Set-Cookie" not in answer.headers
    assert auth.list_sessions(session_id)[1] == [session]
    assert auth.find_user(BOB).totp_secret is None
    assert auth.valid_login(BOB, PASSWORD)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_reading_may_come_from_everywhere(house: Client, method: str) -> None:
    said = {"HTTP_SEC_FETCH_SITE": "cross-site", "HTTP_ORIGIN": EVIL}
    answer = ask(house, method, "/", **said)
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("Access-Control")]


def test_a_refused_page_is_logged(house: Client, capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(house, "POST", "/sessions", FORM, HTTP_ORIGIN=EVIL, REMOTE_ADDR=CLIENT)
    (line,) = logged(capsys.readouterr().err)
    assert (line["event"], line["address"]) == ("malicious_csrf", CLIENT)
    assert line["request_id"] == answer.headers["X-Request-Id"]


# On the wire


def post(path: str, form: dict[str, str], *headers: str) -> bytes:
    body = urlencode(form)
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/x-www-form-urlencoded", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", body]).encode()


def raw(address: tuple[str, int], asked: bytes) -> bytes:
    """Send bytes as they are; return all that comes until the connection is closed."""
    with socket.create_connection(address, timeout=10) as wire:
        wire.sendall(asked)
        return b"".join(iter(lambda: wire.recv(65_536), b""))


BODY = "Content-Length: 5\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
HOST = "Host: x\r\n"

MALFORMED = {
    "length and encoding": f"POST / HTTP/1.1\r\n{HOST}{BODY}{CHUNKED}\r\n0\r\n\r\n",
    "encoding and length": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}{BODY}\r\n0\r\n\r\n",
    "encoding repeated in one line": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "encoding repeated": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}{CHUNKED}\r\n0\r\n\r\n",
    "two encodings": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "unknown encoding": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "encoding after a tab": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "encoding before a space": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "encoding of nothing": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding:\r\n\r\n0\r\n\r\n",
    "encoding of a comma": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: ,\r\n\r\n0\r\n\r\n",
    "encoding before a comma": f"POST / HTTP/1.1\r\n{HOST}Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n",
    "encoding with a dropped name beside it": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}X_Y: a\r\n{BODY}\r\n0\r\n\r\n",
    "encoding in HTTP/1.0": f"POST / HTTP/1.0\r\n{HOST}{CHUNKED}\r\n0\r\n\r\n",
    "no host": "GET / HTTP/1.1\r\n\r\n",
    "two hosts": f"GET / HTTP/1.1\r\n{HOST}Host: y\r\n\r\n",
    "the same host twice": f"GET / HTTP/1.1\r\n{HOST}{HOST}\r\n",
    "two lengths": f"POST / HTTP/1.1\r\n{HOST}{BODY}Content-Length: 6\r\n\r\nhello",
    "the same length twice": f"POST / HTTP/1.1\r\n{HOST}{BODY}{BODY}\r\nhello",
    "two lengths in one line": f"POST / HTTP/1.1\r\n{HOST}Content-Length: 5, 5\r\n\r\nhello",
    "length with a sign": f"POST / HTTP/1.1\r\n{HOST}Content-Length: +5\r\n\r\nhello",
    "negative length": f"POST / HTTP/1.1\r\n{HOST}Content-Length: -5\r\n\r\nhello",
    "length with an underscore": f"POST / HTTP/1.1\r\n{HOST}Content-Length: 1_0\r\n\r\nhellohello",
    "length in hexadecimal": f"POST / HTTP/1.1\r\n{HOST}Content-Length: 0x5\r\n\r\nhello",
    "empty length": f"POST / HTTP/1.1\r\n{HOST}Content-Length:\r\n\r\nhello",
    "chunk size with a prefix": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size with a sign": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n+5\r\nhello\r\n0\r\n\r\n",
    "chunk size with an underscore": f"POST / HTTP/1.1\r\n{HOST}{CHUNKED}\r\n0_5\r\nhello\r\n0\r\n\r\n",
    "two cookies": f"GET / HTTP/1.1\r\n{HOST}Cookie: a=1\r\nCookie: b=2\r\n\r\n",
    "two types": f"POST / HTTP/1.1\r\n{HOST}Content-Type: a/b\r\nContent-Type: c/d\r\n{BODY}\r\nhello",
    "two origins": f"POST / HTTP/1.1\r\n{HOST}Origin: {PUBLIC_URL}\r\nOrigin: {EVIL}\r\n{BODY}\r\nhello",
    "two protocols": f"GET / HTTP/1.1\r\n{HOST}X-Forwarded-Proto: http\r\nX-Forwarded-Proto: https\r\n\r\n",
    "names in other letters": f"POST / HTTP/1.1\r\n{HOST}CONTENT-length: 5\r\ncontent-LENGTH: 5\r\n\r\nhello",
    "HTTP/0.9": "GET /\r\n\r\n",
    "HTTP/9.9": f"GET / HTTP/9.9\r\n{HOST}\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no number of a version": f"GET / HTTP/\r\n{HOST}\r\n",
    "version in small letters": f"GET / http/1.1\r\n{HOST}\r\n",
    "space after the version": f"GET / HTTP/1.1 \r\n{HOST}\r\n",
    "folded header": f"GET / HTTP/1.1\r\n{HOST}X: a\r\n b\r\n\r\n",
    "folded with a tab": f"GET / HTTP/1.1\r\n{HOST}X: a\r\n\tContent-Length: 5\r\n\r\n",
    "folded first header": f"GET / HTTP/1.1\r\n X: a\r\n{HOST}\r\n",
    "bare CR": f"GET / HTTP/1.1\r\n{HOST}X: a\rContent-Length: 5\r\n\r\n",
    "bare LF": f"GET / HTTP/1.1\r\n{HOST}X: a\nContent-Length: 5\r\n\r\n",
    "NUL": f"GET / HTTP/1.1\r\n{HOST}X: a\0b\r\n\r\n",
    "no colon": f"GET / HTTP/1.1\r\n{HOST}X\r\n\r\n",
    "no name": f"GET / HTTP/1.1\r\n{HOST}: a\r\n\r\n",
    "cookie of 20 KiB": f"GET / HTTP/1.1\r\n{HOST}Cookie: {'a' * 20_480}\r\n\r\n",
}


@pytest.mark.parametrize("asked", MALFORMED.values(), ids=MALFORMED)
def test_what_two_servers_could_read_in_two_ways_gets_one_refusal(behind: Service, asked: str) -> None:
    reply = raw(behind.address, asked.encode() + f"GET /smuggled HTTP/1.1\r\n{HOST}\r\n".encode())
    assert reply.count(b"HTTP/1.") == 1
    head, _, body = reply.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] (400|431|501) ", head)
    assert list(json.loads(body)) == ["message"]
    assert b"\r\nContent-Type: application/json\r\n" in head
    assert b"\r\nStrict-Transport-Security: max-age=31536000\r\n" in head


@pytest.mark.parametrize(
    "asked",
    [
        f"GET / HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        f"GET / HTTP/1.1\r\n{HOST}X: a\r\nX: b\r\nConnection: close\r\n\r\n",
        f"GET / HTTP/1.1\r\n{HOST}{CHUNKED}Connection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        f"GET /?x=1 HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n",
    ],
)
def test_what_is_well_formed_is_served(behind: Service, asked: str) -> None:
    assert re.match(rb"HTTP/1\.[01] 200 ", raw(behind.address, asked.encode()))


@pytest.mark.parametrize(
    "target",
    ["/pro%fffile", "//profile", "/profile/", "http://evil/profile", "/profile#x", "/%70rofile", "/./profile"],
)
def test_a_path_is_the_route_letter_for_letter(behind: Service, target: str) -> None:
    reply = raw(behind.address, f"GET {target} HTTP/1.1\r\n{HOST}Connection: close\r\n\r\n".encode())
    assert b" 404 " in reply.partition(b"\r\n")[0]
    assert b"evil" not in reply


def resident(service: Service) -> int:
    """Kilobytes of memory that the process has."""
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)[0])


GIGABYTE = "Content-Length: 1000000000\r\n"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory")
@pytest.mark.parametrize(
    "headers", [GIGABYTE, CHUNKED, GIGABYTE + "Expect: 100-continue\r\n"], ids=["length", "chunked", "expect"]
)
def test_a_gigabyte_is_refused_and_not_kept(behind: Service, headers: str) -> None:
    chunk = b"ffff\r\n" + b"x" * 65_535 + b"\r\n" if headers == CHUNKED else b"x" * 65_536

    def stream() -> bytes:
        with socket.create_connection(behind.address, timeout=10) as wire:
            wire.sendall(f"POST /users HTTP/1.1\r\n{HOST}{headers}\r\n".encode())
            try:
                for _ in range(10**9 // len(chunk)):
                    wire.sendall(chunk)
            except OSError:  # it hung up
                wire.close()
                return b""
            return wire.recv(65_536)

    def refusal() -> bytes:
        with socket.create_connection(behind.address, timeout=10) as wire:
            wire.sendall(f"POST /users HTTP/1.1\r\n{HOST}{headers}\r\n".encode() + chunk)
            return wire.recv(65_536)

    assert refusal().startswith(b"HTTP/1.1 413 ")
    before = resident(behind)
    for _ in range(3):
        assert stream() == b""
    assert resident(behind) - before < 5000
    assert requests.get(behind.url, timeout=5).status_code == 200


# Places and deadlines, on a server in this process


class Inside:
    """The lanes in this process with one hashing thread; ``POST /slow`` hashes until the gate opens."""

    def __init__(self, settings: Settings) -> None:
        self.gate, self.hashing = threading.Event(), threading.Semaphore(0)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(listener, settings))
        self.thread.start()
        assert self._ready.wait(5)

    def _serve(self, listener: socket.socket, settings: Settings) -> None:
        self.lanes = lanes.Lanes({("POST", "/slow")}, 1, settings)
        self.server = lanes.Server(guard.Guard(self._application, settings), listener, self.lanes)
        self._ready.set()
        self.server.run()

    def _application(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/slow":
            self.hashing.release()
            assert self.gate.wait(10)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    def hash_for(self, client: str) -> socket.socket:
        """Ask for a hash on behalf of a client, and wait until the server has read that."""
        wire = socket.create_connection(self.address, timeout=3)
        wire.sendall(post("/slow", {}, f"X-Forwarded-For: {client}"))
        assert raw(self.address, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200 ")
        return wire

    def is_free(self) -> bool:
        """Whether all places are given back, which comes a moment after the answer."""
        end = time.monotonic() + 5
        while self.lanes._places and time.monotonic() < end:
            time.sleep(0.001)
        return not self.lanes._places

    def close(self) -> None:
        self.gate.set()
        self.server.stop(signal.SIGUSR1, None)
        self.thread.join(10)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inside]:
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # only the main thread may set one
    server = Inside(production(trusted_proxy=PROXY))
    yield server
    server.close()
    for channel in list(server.server._server.active_channels.values()):
        channel.handle_close()
    server.server._server.trigger.close()


@pytest.fixture
def wires() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for wire in opened:
        wire.close()


def said(wire: socket.socket) -> int:
    return int(wire.recv(65_536).split()[1])


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (["203.0.113.5"] * 5, "203.0.113.6"),
        (["203.0.113.5", "::ffff:203.0.113.5"] * 3, "203.0.113.6"),
        (["junk", "rubbish", "", "x", "y"], "203.0.113.6"),
        ([f"2001:db8::{n}" for n in range(5)], "2001:db8:0:1::1"),
    ],
    ids=["IPv4", "mapped", "no address", "one network of IPv6"],
)
def test_one_client_holds_at_most_4_places_in_the_queue(
    inside: Inside, wires: list[socket.socket], first: list[str], others: str
) -> None:
    wires.extend(inside.hash_for(client) for client in first[:5])
    refused = wires[4].recv(65_536)
    assert b" 503 " in refused.partition(b"\r\n")[0]
    assert b"\r\nRetry-After: 5\r\n" in refused
    wires.append(inside.hash_for(others))
    inside.gate.set()
    assert [said(wire) for wire in (*wires[:4], wires[5])] == [200] * 5


def test_a_place_is_free_again_after_the_answer(inside: Inside, wires: list[socket.socket]) -> None:
    inside.gate.set()
    for _ in range(12):
        wires.append(inside.hash_for("203.0.113.5"))
        assert said(wires[-1]) == 200
        assert inside.is_free()


def test_a_client_that_hangs_up_leaves_its_places(inside: Inside, wires: list[socket.socket]) -> None:
    for _ in range(4):
        inside.hash_for("203.0.113.5").close()
    inside.gate.set()
    assert inside.is_free()
    wires.append(inside.hash_for("203.0.113.5"))
    assert said(wires[0]) == 200


def test_a_connection_that_ends_while_the_slow_are_sought_ends_nothing(inside: Inside) -> None:
    # A worker that cannot write any more removes its connection from this table, at any moment.
    class Leaving:
        @property
        def request(self) -> None:
            del channels["leaving"]

    channels: dict[str, Any] = {"leaving": Leaving(), "staying": SimpleNamespace(request=None)}
    server = SimpleNamespace(_server=SimpleNamespace(active_channels=channels))
    lanes.Server._close_slow(server, 0.0)  # type: ignore[arg-type]
    assert list(channels) == ["staying"]


@pytest.mark.once
@pytest.mark.slow  # a second and a half of hashing
def test_a_fifth_login_of_one_client_at_once_is_told_to_come_again(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY=PROXY, AUTHSVC_BCRYPT_COST="13")

    def log_in(client: str) -> int:
        headers = {"X-Forwarded-For": client, "X-Forwarded-Proto": "https"}
        return requests.post(f"{service.url}/sessions", data=FORM, headers=headers, timeout=20).status_code

    with ThreadPoolExecutor(9) as pool:
        crowd = [pool.submit(log_in, "203.0.113.5") for _ in range(8)]
        other = pool.submit(log_in, "203.0.113.6")
        assert Counter(one.result() for one in crowd) == {401: 4, 503: 4}
        assert other.result() == 401


HEADER_DRIP = f"GET / HTTP/1.1\r\n{HOST}X: ".encode()
BODY_DRIP = f"POST /sessions HTTP/1.1\r\n{HOST}Content-Length: 10000\r\n\r\n".encode()
CHUNK_DRIP = f"POST /sessions HTTP/1.1\r\n{HOST}{CHUNKED}\r\nffff\r\n".encode()


def drip(address: tuple[str, int], url: str, interval: float, most: float) -> tuple[float, float]:
    """Hold 60 connections with a byte each interval; return when the last was closed and the slowest welcome."""
    beginnings = itertools.cycle([HEADER_DRIP, BODY_DRIP, CHUNK_DRIP, b""])
    wires = [socket.create_connection(address, timeout=5) for _ in range(60)]
    began, slowest = time.monotonic(), 0.0
    try:
        for wire, beginning in zip(wires, beginnings):
            wire.sendall(beginning)
        alive = wires
        while alive and time.monotonic() - began < most:
            alive = [wire for wire in alive if dripped(wire)]
            asked = time.monotonic()
            assert requests.get(url, timeout=5).ok
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(interval)
    finally:
        for wire in wires:
            wire.close()
    return time.monotonic() - began, slowest


def dripped(wire: socket.socket) -> bool:
    """Send a byte more; say whether the other end is still there."""
    try:
        wire.send(b"x")
        wire.settimeout(0)
        return bool(wire.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


@pytest.mark.slow  # the deadline
def test_60_dripping_connections_are_closed_by_the_deadline(inside: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "DEADLINE", 3.0)
    last, slowest = drip(inside.address, "http://{}:{}/".format(*inside.address), 0.1, 10)
    assert 3 <= last < 6
    assert slowest < 2  # as on a busy machine; who is shut out waits for as long as the others drip


def held_after_a_refusal(address: tuple[str, int]) -> float:
    """Send a byte a second of what was refused; return for how long that went on."""
    with socket.create_connection(address, timeout=5) as wire:
        wire.sendall(f"POST /users HTTP/1.1\r\n{HOST}{GIGABYTE}\r\n".encode())
        assert said(wire) == 413
        began = time.monotonic()
        while time.monotonic() - began < 45:
            try:
                wire.sendall(b"x")
            except OSError:
                break
            time.sleep(1)
        return time.monotonic() - began


@pytest.mark.once
@pytest.mark.slow  # half a minute
def test_60_connections_dripping_a_byte_a_second_are_closed_after_30_s_and_so_is_one_that_was_refused(
    start: Callable[..., Service],
) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_BCRYPT_COST="10")
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(held_after_a_refusal, service.address)
        last, slowest = drip(service.address, service.url, 1.0, 45)
    assert 29 <= last < 34
    assert slowest < 2
    assert refused.result() < 40


# The log


SECRETS = ("canary-password", "canary-cookie", "canary-token", "canary-query")
ODD = "\r\n{'event': 1}\x1b[2J\u2028\x85\ud83d"


def live(call: Client, auth: Auth, clock: Clock, odd: str, rest: dict[str, Any]) -> list[str]:
    """Ask for all that needs a session, in right and wrong ways; return the secrets that were handed out."""
    account = {"email": "live@x.io", "password": "canary-password of a life"}
    new = "canary-password of another life"
    ask(call, "POST", "/users", account, **rest)
    secrets: list[str] = []

    def answer(method: str, path: str, form: dict[str, Any]) -> Answer:
        said = ask(call, method, path, form, cookie=f"__Host-session_id={secrets[-1] if secrets else ''}", **rest)
        if "=;" not in said.headers.get("Set-Cookie", "=;"):
            secrets.append(said.session_id)
        return said

    def say(method: str, path: str, /, **form: Any) -> Any:
        said = answer(method, path, form)
        assert said.status == 200, (method, path, said.body)
        return said.json

    def fail(method: str, path: str, /, **form: Any) -> None:
        assert 400 <= answer(method, path, form).status < 500

    say("POST", "/sessions", **account)
    wrong = f"canary-password{odd}".encode("utf-8", "replace")
    for method, path in (("PUT", "/password"), ("POST", "/totp"), ("DELETE", "/profile")):
        fail(method, path, password=wrong, new_password=new)
        fail(method, path)
    say("PUT", "/password", password=account["password"], new_password=new)
    seed = say("POST", "/totp", password=new)["secret"]
    fail("PUT", "/totp", otp=f"canary-token{odd}".encode("utf-8", "replace"))
    clock.advance(totp.STEP)
    codes = say("PUT", "/totp", otp=totp.code(seed, int(clock()) // totp.STEP))["recovery_codes"]
    fail("POST", "/sessions", email="live@x.io", password=new)
    fail("POST", "/sessions", email="live@x.io", password=new, otp="canary-token")
    say("POST", "/sessions", email="live@x.io", password=new, otp=codes[0])
    fail("DELETE", "/totp", password=new, otp="canary-token")
    say("DELETE", "/totp", password=new, otp=codes[1])
    fail("DELETE", "/totp", password=new, otp=codes[2])
    fail("DELETE", "/sessions/canary-token")
    fail("DELETE", f"/sessions/{odd.encode('ascii', 'ignore').decode()}")
    say("GET", "/sessions")
    say("DELETE", "/sessions/others")
    say("DELETE", "/sessions/all")
    fail("GET", "/sessions")
    say("POST", "/sessions", email="live@x.io", password=new)
    say("DELETE", "/profile", password=new)
    return [*secrets, *codes, *(code.replace("-", "") for code in codes), seed]


def walk(call: Client, auth: Auth, clock: Clock, odd: str) -> list[str]:
    """Ask for everything there is, in right and wrong ways; return the secrets that were handed out."""
    agent = f"agent{odd}".encode("utf-8", "replace").decode("latin-1")  # as a server reads it
    rest: dict[str, Any] = {"HTTP_USER_AGENT": agent, "HTTP_REFERER": f"https://x/?{SECRETS[3]}"}
    rest |= {"QUERY_STRING": f"token={SECRETS[3]}", "REMOTE_ADDR": CLIENT}
    right = {"email": "walk@x.io", "password": "canary-password of the walk"}
    ask(call, "POST", "/users", right, **rest)
    ask(call, "POST", "/users", right, **rest)
    ask(call, "POST", "/users", {**right, "email": f"a{odd}@x".encode("utf-8", "replace")}, **rest)
    session_id = ask(call, "POST", "/sessions", right, **rest).session_id
    lived = live(call, auth, clock, odd, rest)
    ask(call, "POST", "/sessions", {**right, "password": "canary-password wrong"}, **rest)
    ask(call, "POST", "/sessions", {**right, "email": f"a{odd}@x".encode("utf-8", "replace")}, **rest)
    for method, path in (("GET", "/profile"), ("GET", "/nowhere"), ("PATCH", "/users"), ("DELETE", "/sessions")):
        ask(call, method, path, cookie="__Host-session_id=canary-cookie", **rest)
        ask(call, method, path, cookie=f"__Host-session_id={session_id}", **rest)
    ask(call, "POST", "/reset_password", {"email": "walk@x.io"}, **rest)
    token = auth.get_reset_password_token("walk@x.io")
    change = {"email": "walk@x.io", "reset_token": "canary-token", "new_password": "canary-password the second"}
    ask(call, "PUT", "/reset_password", change, **rest)
    ask(call, "PUT", "/reset_password", {**change, "reset_token": token}, **rest)
    ask(call, "POST", "/sessions", right, HTTP_ORIGIN=f"https://evil/{SECRETS[3]}", **rest)
    ask(call, "POST", "/sessions", body=b"password=canary-password%ff", **rest)
    for _ in range(12):
        ask(call, "POST", "/sessions", right, **rest)
    return [session_id, token, *lived]


EVENTS = {
    "authn_factor_added",
    "authn_factor_removed",
    "authn_login_fail",
    "authn_token_fail",
    "authz_fail",
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


def test_a_whole_walk_is_logged_in_lines_of_ascii_json_without_a_secret(
    call: Client,
    auth: Auth,
    clock: Clock,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    tmp_path: Path,
) -> None:
    handed_out = walk(call, auth, clock, ODD)

    def crash(*values: object) -> bool:
        raise RuntimeError(f"{values}")

    monkeypatch.setattr(passwords, "verify", crash)
    form = {"email": "walk2@x.io", "password": "canary-password of a crash"}
    assert ask(call, "POST", "/sessions", form, REMOTE_ADDR="192.0.2.77").status == 500
    log = capsys.readouterr().err
    assert log.isascii()
    lines = logged(log)
    assert {line["event"] for line in lines} == EVENTS
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"]) for line in lines)
    assert all(line["request_id"] for line in lines)
    stored = rows_in(place) + b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for secret in (*SECRETS, *handed_out):
        assert secret not in log
        # The seed of a second factor is kept in plain, as it must be.
        assert secret.encode() not in stored or re.fullmatch("[A-Z2-7]{32}", secret)


def test_no_value_makes_a_line_of_its_own(
    call: Client, auth: Auth, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    walk(call, auth, clock, ",")  # no mailbox either
    plain = [line["event"] for line in logged(capsys.readouterr().err)]
    auth._db.update_user(1, email="before@x.io")
    clock.advance(86_400)
    walk(call, auth, clock, ODD)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == text.count("\n")  # no other separator of lines
    assert [line["event"] for line in logged(text)] == plain


def test_a_failed_login_names_the_user_or_a_tag_of_the_email(
    call: Client, bob: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for email in (BOB, "nobody@x.io", "NOBODY@x.io", "other@x.io"):
        ask(call, "POST", "/sessions", {"email": email, "password": "wrong"})
    known, *unknown = logged(capsys.readouterr().err)
    assert known["user_id"] == 1
    assert "unknown" not in known
    tags = [line["unknown"] for line in unknown]
    assert tags[0] == tags[1] != tags[2]
    assert all(re.fullmatch("[0-9a-f]{16}", tag) for tag in tags)


def test_a_flood_is_cut_off_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    monkeypatch.setattr(time, "monotonic", clock)
    for n in range(1000):
        guard.log("flood", n=n)
    guard.log("other")
    clock.advance(guard.LOG_WINDOW)
    guard.log("flood", n=1000)
    guard.log("flood", n=1001)
    lines = logged(capsys.readouterr().err)
    assert [line["n"] for line in lines if "n" in line] == [*range(guard.LOG_FLOOD), 1000, 1001]
    assert [line["missing"] for line in lines if "missing" in line] == [1000 - guard.LOG_FLOOD]
    assert sum(line["event"] == "other" for line in lines) == 1


def test_a_flood_of_requests_makes_no_flood_of_lines(
    call: Client, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(time, "monotonic", clock)
    for _ in range(2 * guard.LOG_FLOOD):
        ask(call, "POST", "/users", FORM, HTTP_ORIGIN=EVIL)
    assert len(capsys.readouterr().err.splitlines()) == guard.LOG_FLOOD
