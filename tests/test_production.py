"""Production settings: session cookies, HSTS, secrets, and what stops or warns at the start."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

import authsvc
import web.server
from auth import Auth
from authsvc import create_app
from credentials import totp
from settings import Settings
from storage import DB
from tests.cases import each
from tests.conftest import COST, HERE, Client, Clock, Service, clean_environ
from tests.crowd import written_log
from tests.production import (
    BOB,
    FORM,
    PASSWORD,
    PUBLIC_URL,
    ask,
    log_lines,
    production_settings,
    proxied_service,
    shared_site,
)


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


# Cookies and headers


COOKIES = {
    "one host": ({}, "__Host-session_id", ""),
    "parent domain": ({"cookie_domain": "example.com"}, "__Secure-session_id", "; Domain=example.com"),
    "own domain": ({"cookie_domain": "auth.example.com"}, "__Secure-session_id", "; Domain=auth.example.com"),
}


@pytest.mark.parametrize(("changes", "name", "domain"), COOKIES.values(), ids=COOKIES)
def test_the_session_cookie_has_a_prefix_and_all_protections(
    database: str, clock: Clock, changes: dict[str, str], name: str, domain: str
) -> None:
    settings = production_settings(database, **changes)
    db = DB(settings.database)
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


@pytest.mark.parametrize("domain", ["", "example.com", "auth.example.com"])
def test_a_shared_cookie_is_set_and_deleted_together_with_that_of_the_host_alone(
    database: str, clock: Clock, domain: str
) -> None:
    settings = production_settings(database, cookie_domain=domain)
    with closing(DB(settings.database)) as db:
        call = Client(create_app(settings, Auth(db, settings, clock)))
        ask(call, "POST", "/users", FORM)
        signed_in = ask(call, "POST", "/sessions", FORM)
        ended = ask(call, "DELETE", "/sessions", cookie=signed_in.set_cookies[0].partition(";")[0])
    cleared = ["__Secure-session_id=; HttpOnly; Path=/; SameSite=Lax; Secure; Max-Age=0"] if domain else []
    assert ended.set_cookies[1:] == cleared
    # Some clients would delete the new cookie, too, where the domain is the host itself.
    apart = domain != "auth.example.com"
    assert [cookie for cookie in signed_in.set_cookies[1:] if "session_id" in cookie] == (cleared if apart else [])


@pytest.mark.parametrize(("changes", "name", "domain"), COOKIES.values(), ids=COOKIES)
def test_the_cookie_is_renewed_and_deleted_with_the_same_attributes(
    database: str, clock: Clock, changes: dict[str, str], name: str, domain: str
) -> None:
    settings = production_settings(database, **changes)
    db = DB(settings.database)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    attributes = f"; HttpOnly; Path=/; SameSite=Lax; Secure{domain}"
    ask(call, "POST", "/users", FORM)
    session_id, new = ask(call, "POST", "/sessions", {**FORM, "remember": "1"}).session_id, "choucroute du lundi"
    begun = ask(call, "POST", "/totp", FORM, cookie=f"{name}={session_id}")
    assert re.fullmatch(f"{name}=[A-Za-z0-9_-]{{43}}{attributes}; Max-Age=2592000", begun.headers["Set-Cookie"])
    session_id, seed = begun.session_id, begun.json["secret"]

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
        cookie, _, age = renewed.headers["Set-Cookie"].partition("; Max-Age=")
        assert re.fullmatch(f"{name}=[A-Za-z0-9_-]{{43}}{attributes}", cookie)
        assert int(age) == 2_592_000 - 60  # what remains of the session: the clock has moved for two codes
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
def test_a_session_id_that_a_client_chose_is_never_used(call: Client) -> None:
    chosen = "__Host-session_id=" + "A" * 43
    assert ask(call, "POST", "/sessions", FORM, cookie=chosen).session_id not in chosen
    assert ask(call, "GET", "/profile", cookie=chosen).status == 403


@each("path", ["/", "/profile", "/nowhere", "/users", "//"])
def test_every_answer_carries_hsts(site: Client, path: str) -> None:
    assert ask(site, "GET", path).headers["Strict-Transport-Security"] == "max-age=31536000"


def test_an_answer_in_development_carries_no_hsts(tmp_path: Path) -> None:
    call = Client(create_app(Settings(database=str(tmp_path / "dev.db"), bcrypt_cost=COST)))
    assert "Strict-Transport-Security" not in call("GET", "/").headers


def test_secrets_have_256_random_bits(auth: Auth, bob: None) -> None:
    secrets = [auth.create_session(BOB) or "" for _ in range(20)]
    secrets += [auth.get_reset_password_token(BOB) for _ in range(20)]
    assert all(re.fullmatch("[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    assert len(set(secrets)) == 40


@each("email", [BOB, "BOB@x.io", "nobody@x.io", "nope", "é@x.io", "a@x, evil@y", " ", "a" * 300])
def test_a_reset_request_gets_the_same_answer_for_every_email(site: Client, email: str) -> None:
    answer = ask(site, "POST", "/reset_password", {"email": email}, REMOTE_ADDR="127.0.0.1")
    assert (answer.status, answer.json) == (200, {"message": "if the email has an account, a mail is on its way"})
    assert answer.headers.keys() == ask(site, "GET", "/").headers.keys()


# The start


ALLOWED = {"AUTHSVC_PUBLIC_URL": PUBLIC_URL, "AUTHSVC_LISTEN": "127.0.0.1:0"}


REFUSED_STARTS = [
    ({"AUTHSVC_BCRYPT_COST": "9"}, "AUTHSVC_BCRYPT_COST must be at least 10 in production"),
    ({"AUTHSVC_BCRYPT_COST": "4"}, "AUTHSVC_BCRYPT_COST must be at least 10 in production"),
    ({"AUTHSVC_BCRYPT_COST": "16"}, "AUTHSVC_BCRYPT_COST must be from 4 to 15"),
    ({"AUTHSVC_THROTTLE": "off"}, "AUTHSVC_THROTTLE cannot be off in production"),
    ({"AUTHSVC_PASSWORD_MIN": "7"}, "AUTHSVC_PASSWORD_MIN must be from 8 to 64"),
    ({"AUTHSVC_RESET_LIFETIME": "3601"}, "AUTHSVC_RESET_LIFETIME must be from 1 to 3600"),
    ({"AUTHSVC_REGISTRATION": "no"}, "AUTHSVC_REGISTRATION must be one of open, invitation, closed"),
    ({"AUTHSVC_UNSAFE_LISTEN": "1"}, "AUTHSVC_UNSAFE_LISTEN is for development only"),
    *[
        ({"AUTHSVC_TRUSTED_PROXY": proxies}, f"AUTHSVC_TRUSTED_PROXY must not contain {proxies.split()[-1]!r}: every")
        for proxies in ("0.0.0.0/0", "::/0", "127.0.0.1, ::ffff:0.0.0.0/96")
    ],
    (
        {"AUTHSVC_TRUSTED_PROXY": "10.0.0.1/8"},
        "AUTHSVC_TRUSTED_PROXY must name a network by its first address: write 10",
    ),
    ({"AUTHSVC_TRUSTED_PROXY": "proxy"}, "AUTHSVC_TRUSTED_PROXY must list IP addresses and networks, and 'proxy'"),
    ({"AUTHSVC_TRUSTED_PROXY": "127.0.0.1,"}, "AUTHSVC_TRUSTED_PROXY has an empty item"),
    ({"AUTHSVC_TRUSTED_PROXY": "fe80::1%eth0"}, "AUTHSVC_TRUSTED_PROXY must list addresses without a zone"),
    (
        {"AUTHSVC_SMTP_URL": "smtps://mail.example.com"},
        "AUTHSVC_MAIL_FROM and AUTHSVC_SMTP_URL must both be set, or neither",
    ),
    ({"AUTHSVC_MAIL_FROM": "a@example.com"}, "AUTHSVC_MAIL_FROM and AUTHSVC_SMTP_URL must both be set, or neither"),
    (
        {"AUTHSVC_SMTP_URL": "smtps://mail.example.com", "AUTHSVC_MAIL_FROM": "A <a@x>"},
        "AUTHSVC_MAIL_FROM must be name@host",
    ),
    *[
        ({"AUTHSVC_SMTP_URL": url, "AUTHSVC_MAIL_FROM": "a@x"}, "AUTHSVC_SMTP_URL must be smtp+starttls://")
        for url in (
            *(
                "smtp://h",
                "smtp://",
                "smtp://10.0.0.1",
                "smtp://u@mail.example.com:25",
                "smtp://127.0.0.1@h",
                "smtp://[::2]",
            ),
            *(
                "smtp://127.0.0.1.example.com",
                "smtp://localhost.example.com",
                "smtp://0.0.0.0",
                "smtp://u:secret@[::1]",
            ),
            *("h:25", "smtps://", "smtps://u:secret@h", "smtps://h:x", "smtps://h:0", "https://h"),
            *("smtps://u:25/secret@h", "smtps://u:25?secret@h", "smtps://u:25#secret@h", "smtps://u:secret/x@h"),
        )
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
            "https://u:secret@auth.example.com",
            "https://u:1/secret@auth.example.com",
            "https://auth.example.com:",
            "https://auth.example.com:0",
            "https://auth.example.com:08443",
            "https://auth.example.com:65536",
            "https://auth.example.com:443/",
            "https://auth.example.com:443:443",
            "https://auth.example.com:port",
            "https://auth..example.com",
            "https://é.example.com",
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
    *[
        (
            {"AUTHSVC_PUBLIC_URL": f"https://auth.{domain.lower()}", "AUTHSVC_COOKIE_DOMAIN": domain},
            "AUTHSVC_COOKIE_DOMAIN is a suffix under which others have hosts",
        )
        for domain in ("co.uk", "CO.UK", "com.au", "or.jp", "gv.at", "duckdns.org", "github.io", "Synology.me")
    ],
    ({"AUTHSVC_PUBLIC_URL": "https://co.uk", "AUTHSVC_COOKIE_DOMAIN": "co.uk"}, "AUTHSVC_COOKIE_DOMAIN is a suffix"),
    *[
        (
            {"AUTHSVC_PUBLIC_URL": "https://192.0.2.10", "AUTHSVC_COOKIE_DOMAIN": domain},
            "AUTHSVC_COOKIE_DOMAIN must be the host of AUTHSVC_PUBLIC_URL or a parent",
        )
        for domain in ("2.10", "0.2.10")
    ],
]


@pytest.mark.parametrize(("environ", "reason"), REFUSED_STARTS)
def test_the_service_does_not_start_with_unsafe_settings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(web.server.Server, "run", lambda self: pytest.fail("the service started"))
    for name, value in {**ALLOWED, **environ}.items():
        monkeypatch.setenv(name, value)
    assert authsvc.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    name, requirement = reason.split(" ", 1)
    assert re.match(rf"authsvc: {name}(=.*)? {re.escape(requirement)}", err)
    assert "secret" not in err
    assert list(tmp_path.iterdir()) == []


def refused_start(folder: Path, **environ: str) -> str:
    """Start a process that refuses to serve; return its one line of error."""
    command = [sys.executable, str(HERE / "authsvc.py")]
    environ = {**clean_environ(), **ALLOWED, **environ}
    process = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=20)
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    return line


@pytest.mark.process
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_database_file_that_other_users_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    DB(tmp_path / "authsvc.db").close()
    (tmp_path / "authsvc.db.lock").unlink()
    (tmp_path / "authsvc.db").chmod(mode)
    before = (tmp_path / "authsvc.db").read_bytes()
    line = refused_start(tmp_path)
    assert "authsvc.db" in line
    assert line.endswith("chmod 600")
    assert os.listdir(tmp_path) == ["authsvc.db"]
    assert (tmp_path / "authsvc.db").read_bytes() == before


@pytest.mark.process
def test_an_unreadable_mail_password_file_is_refused(tmp_path: Path) -> None:
    environ = {"AUTHSVC_SMTP_URL": "smtps://u@h", "AUTHSVC_MAIL_FROM": "a@x", "AUTHSVC_SMTP_PASSWORD_FILE": "absent"}
    line = refused_start(tmp_path, **environ)
    assert line == "authsvc: AUTHSVC_SMTP_PASSWORD_FILE cannot be read: No such file or directory"
    assert os.listdir(tmp_path) == []


@pytest.mark.process
def test_a_mail_password_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canäry", encoding="utf-8")
    environ = {"AUTHSVC_SMTP_URL": "smtps://u@h", "AUTHSVC_MAIL_FROM": "a@x", "AUTHSVC_SMTP_PASSWORD_FILE": "secret"}
    line = refused_start(tmp_path, **environ)
    assert line.startswith("authsvc: AUTHSVC_SMTP_PASSWORD_FILE names a password that is not ASCII: ")
    assert "can" not in line.replace("cannot", "")
    assert os.listdir(tmp_path) == ["secret"]


def test_a_start_without_a_trusted_proxy_logs_a_warning(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_BCRYPT_COST="10")
    reasons = [line["reason"] for line in log_lines(written_log(service)) if line["event"] == "sys_warning"]
    (reason,) = [reason for reason in reasons if "AUTHSVC_TRUSTED_PROXY" in reason]
    assert "all clients share one address" in reason


def test_a_start_with_a_wide_network_of_proxies_logs_a_warning(start: Callable[..., Service]) -> None:
    proxies = "127.0.0.1, 10.0.0.0/8"
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY=proxies, AUTHSVC_BCRYPT_COST="10")
    reasons = [line["reason"] for line in log_lines(written_log(service)) if line["event"] == "sys_warning"]
    (reason,) = [reason for reason in reasons if "AUTHSVC_TRUSTED_PROXY" in reason]
    assert "10.0.0.0/8: every client inside it can forge its address" in reason


@pytest.mark.process
def test_a_start_with_a_trusted_proxy_logs_no_warning_about_it(tmp_path: Path) -> None:
    with proxied_service(tmp_path) as service:
        requests.get(service.url, timeout=5)
    assert "sys_warning" in service.log
    assert "AUTHSVC_TRUSTED_PROXY" not in service.log
