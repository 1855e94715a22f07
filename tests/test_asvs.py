"""Rules for the whole product: how every module is written, and what no request can do."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

import authsvc
from auth import Auth
from authsvc import create_app
from credentials import passwords
from engines.errors import StorageUnavailable
from log import log_event
from mail import Mailer
from settings import MAILBOX, Settings
from storage import DB
from tables.rate_limits import RateLimits
from tests.cases import each
from tests.conftest import HERE, Client, Clock, Service, raw_connection
from tests.product import MODULES, TREES, nodes_of
from web import forms

BOB = {"email": "bob@x.io", "password": "b4l0u"}
SECRETS = {"hashed", "password", "reset_token", "secret", "session_hash", "session_id", "token", "token_hash"}


@pytest.fixture
def production(settings: Settings) -> Settings:
    return replace(settings, public_url="https://auth.example.com", bcrypt_cost=10)


@functools.cache
def calls_in(module: str) -> dict[str, list[ast.Call]]:
    """Return the calls in a module, by the name of the function."""
    found: dict[str, list[ast.Call]] = {}
    for node in nodes_of(TREES[module]):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def imported_by(module: str) -> set[str]:
    found = set()
    for node in nodes_of(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# How the modules are written


@each("module", MODULES)
def test_a_module_runs_no_program_and_no_generated_code(module: str) -> None:
    assert not calls_in(module).keys() & {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    never = {"ctypes", "importlib", "marshal", "pickle", "pty", "runpy", "shelve", "subprocess", "yaml"}
    assert not imported_by(module) & (never | {"bottle.template", "bottle.SimpleTemplate"})
    assert not any(name.startswith(("os.exec", "os.spawn", "os.posix_spawn", "os.fork")) for name in calls_in(module))
    cookies = [call for name, calls in calls_in(module).items() if name.endswith("_cookie") for call in calls]
    # With a secret, Bottle reads pickles from cookies.
    assert not any(word.arg == "secret" for call in cookies for word in call.keywords)


@each("module", MODULES)
def test_every_regular_expression_is_a_constant(module: str) -> None:
    assigned = [ast.unparse(node) for node in TREES[module].body if isinstance(node, ast.Assign)]
    patterns = [
        call.args[0] for name, calls in calls_in(module).items() if re.fullmatch(r"re\.\w+", name) for call in calls
    ]
    for part in (part for pattern in patterns for part in ast.walk(pattern) if isinstance(part, ast.expr)):
        constant = isinstance(part, ast.Name) and any(part.id in line.partition(" = ")[0] for line in assigned)
        assert constant or isinstance(part, ast.Constant | ast.BinOp)  # BinOp: constants joined by +


@each("module", MODULES)
def test_a_module_uses_no_weak_random_numbers_or_hashes(module: str) -> None:
    assert not imported_by(module) & {"random", "numpy"}
    assert not calls_in(module).keys() & {"uuid.uuid1", "uuid.uuid3", "uuid.uuid5", "hashlib.md5", "hashlib.sha1"}


def test_sha_256_is_the_only_hash_but_for_one_time_codes() -> None:
    used = {
        (module, node.attr)
        for module, tree in TREES.items()
        for node in nodes_of(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hashlib"
    }
    assert {module for module, name in used if name != "sha256"} == {"credentials.totp"}
    assert {name for _, name in used} == {"sha1", "sha256"}  # RFC 6238 and all apps have SHA-1


def test_all_cryptography_comes_from_known_modules_under_their_own_names() -> None:
    # So test_the_inventory_of_cryptography_is_complete finds every use.
    imported = {name.partition(".")[0] for module in MODULES for name in imported_by(module)}
    foreign = imported - sys.stdlib_module_names - {module.partition(".")[0] for module in MODULES}
    databases = {"psycopg", "psycopg_pool"}
    optional = {"cryptography", "fido2", "prometheus_client", "segno"}
    assert foreign == {"bcrypt", "bottle", "waitress"} | databases | optional
    known = {"bcrypt", "hashlib", "hmac", "secrets", "ssl", "uuid"}
    assert imported & {"crypt", "random"} == set()
    assert {name for name in imported if name.startswith("_")} == {"__future__"}
    imports = [node for tree in TREES.values() for node in nodes_of(tree) if isinstance(node, ast.Import)]
    assert not [alias for node in imports for alias in node.names if alias.name in known and alias.asname]


@each("module", MODULES)
def test_a_module_compares_no_secret_in_python(module: str) -> None:
    compared = {
        ast.unparse(side).rpartition(".")[2]
        for node in nodes_of(TREES[module])
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq)
        if ast.unparse(node.comparators[0]) != "NO_PASSWORD"  # it is not a secret
        for side in (node.left, *node.comparators)
    }
    assert not compared & SECRETS


def test_only_mail_and_the_engines_open_connections() -> None:
    outward = {"ftplib", "http.client", "requests", "smtplib", "urllib.request", "urllib3", "xmlrpc.client"}
    found = {(module, name) for module in TREES for name in imported_by(module) if name in outward}
    assert found == {("mail", "smtplib")}
    connects = {
        (module, name)
        for module in TREES
        for name in calls_in(module)
        if re.search(r"\.(create_connection|connect)$", name)
    }
    assert connects == {
        ("engines.sqlite", "sqlite3.connect"),
        ("engines.sqlite_files", "sqlite3.connect"),
        ("engines.postgres", "psycopg.connect"),
    }


def test_only_the_log_and_the_command_line_write_output() -> None:
    writes = {
        (module, name)
        for module in TREES
        for name in calls_in(module)
        if re.search(
            r"^(print|os\.write)$|std(out|err)\.write$|\.write_(text|bytes)$|^logging\.(debug|info|warning|error)$",
            name,
        )
    }
    assert writes == {
        ("log", "os.write"),
        ("log", "sys.stderr.write"),
        ("authsvc", "print"),  # the URL, or the reason why it cannot start
        ("cli.commands", "print"),  # the reason why a command failed, or what it left out
        ("cli.operator", "print"),  # the result of a command
    }
    assert {module for module in TREES if "syslog.syslog" in calls_in(module)} == {"cli.operator"}


def test_the_tables_have_no_columns_beyond_the_documented_ones(db: DB, settings: Settings) -> None:
    with raw_connection(settings.database) as connection:
        tables = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE TABLE%'")
        ]
        columns = {name: {row[1] for row in connection.execute(f"PRAGMA table_info({name})")} for name in tables}
    del columns["sqlite_sequence"]
    times = {"created_at", "last_seen_at", "expires_at"}
    assert columns == {  # no password hint, no security question, no age of a password
        "users": {
            *("id", "email", "email_key", "hashed_password"),
            *("session_id", "reset_token", "reset_expires_at", "reset_created_at"),
            *("created_at", "disabled_at", "totp_secret", "totp_since", "totp_step"),
            *("device_key", "last_login_at", "cut_salt", "untold_logins", "groups", "passkey_handle"),
        },
        "recovery_codes": {"user_id", "code_hash"},
        "registrations": {"id", "email", "email_key", "token_hash", "expires_at"},
        "email_changes": {"session_id", "email", "email_key", "token_hash", "expires_at"},
        "former_emails": {"email_key", "user_id", "released_at"},
        "sessions": {"id", "session_hash", "user_id", "address", "user_agent", "remember", "factor_at"} | times,
        "access_tokens": {"id", "user_id", "token_hash", "name", "created_at", "last_used_at", "expires_at"},
        "passkeys": {
            *("id", "user_id", "name", "created_at", "last_used_at", "synced"),
            *("credential_id", "public_key", "sign_count"),
        },
        "spent_challenges": {"digest", "expires_at"},
        "known_addresses": {"user_id", "address_hash", "seen_at"},
        "throttle": {"key", "full_at"},
        "throttle_secret": {"id", "secret"},
    }


@each("name", ["run.txt", "dev.txt", "pyz.txt", "release.txt"])
def test_every_package_is_pinned_with_its_hash(name: str) -> None:
    text = re.sub(r" *#.*", "", (HERE / "requirements" / name).read_text()).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line)
    assert (HERE / "Makefile").read_text().count("pip install") == (HERE / "Makefile").read_text().count(
        "--require-hashes"
    )


# What no request can do


@pytest.mark.parametrize(
    "path",
    [
        *("/.git/config", "/.env", "/static/", "/favicon.ico", "/robots.txt", "/metrics", "/docs", "/openapi.yaml"),
        *("/authsvc.py", "/authsvc.db", "/schema.sql", "/profile/x.css", "/profile;a.css", "/profile/", "/users/1"),
        *("/../etc/passwd", "/{{7*7}}", "/<script>", "/%s%n", "/sessions/", "/admin", "/verify/../profile"),
    ],
)
def test_a_path_without_a_route_is_not_found(call: Client, path: str) -> None:
    answer = call("GET", path)
    assert (answer.status, answer.json) == (404, {"message": "not found"})
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/users", "/sessions", "/profile?callback=x"])
def test_no_other_origin_may_read_a_response(call: Client, method: str, path: str) -> None:
    answer = call(method, path, BOB, HTTP_ORIGIN="https://evil.example", HTTP_ACCESS_CONTROL_REQUEST_METHOD="POST")
    assert not [name for name in answer.headers if name.startswith("Access-Control")]
    assert answer.status != 200 or answer.json == {"message": "Bienvenue"}
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("POST", "/sessions"), ("DELETE", "/sessions"), ("GET", "/nowhere")]
)
def test_a_host_header_never_enters_a_response(call: Client, method: str, path: str) -> None:
    call("POST", "/users", BOB)
    cookie = f"session_id={call('POST', '/sessions', BOB).session_id}"
    answer = call(method, path, BOB, cookie=cookie, HTTP_HOST="evil.example", HTTP_X_FORWARDED_HOST="evil.example")
    assert "evil" not in str(answer.headers) + str(answer.body)
    assert answer.headers.get("Location", "/") == "/"


def test_a_reading_request_changes_no_row(call: Client, settings: Settings) -> None:
    call("POST", "/users", BOB)
    cookie = f"session_id={call('POST', '/sessions', BOB).session_id}"
    with raw_connection(settings.database) as connection:
        before = list(connection.iterdump())
        for method in ("GET", "HEAD", "OPTIONS"):
            for path in {path for _, path, *_ in authsvc.ROUTES}:
                call(method, path + "?_method=DELETE", BOB, cookie=cookie, HTTP_X_HTTP_METHOD_OVERRIDE="DELETE")
        assert list(connection.iterdump()) == before


def test_a_profile_is_chosen_by_the_session_only(call: Client) -> None:
    eve = {"email": "eve@x.io", "password": "3v3"}
    for form in (BOB, eve):
        call("POST", "/users", form)
    cookie = f"session_id={call('POST', '/sessions', eve).session_id}"
    for path in ("/profile", "/profile?email=bob@x.io", "/profile?id=1"):
        answer = call("GET", path, {"email": "bob@x.io"}, cookie=cookie, HTTP_REMOTE_USER="bob@x.io")
        assert answer.json == {"email": "eve@x.io"}


def test_a_field_is_decoded_once(call: Client) -> None:
    email = "100%2541@x.io"
    assert call("POST", "/users", {**BOB, "email": email}).json["email"] == email
    assert call("POST", "/sessions", {**BOB, "email": "100%41@x.io"}).status == 401
    assert call("POST", "/sessions", {**BOB, "email": email}).status == 200


@pytest.mark.parametrize("text", ["%s%n%(email)s", "{0.__class__}", "{email}{settings}", "$HOME `id`", "{{7*7}}"])
def test_a_field_is_never_used_as_a_format(
    call: Client, production: Settings, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("POST", "/users", {"email": text, "password": text}).json["email"] == text
    assert call("POST", "/sessions", {"email": text, "password": "other"}).status == 401
    assert all(json.loads(line)["event"] != "sys_crash" for line in capsys.readouterr().err.splitlines())
    local = re.sub(r"[^!-~]|[{}()]", "", text) + "{0.__class__}{token}"
    settings = replace(production, smtp_url="smtps://mail.example.com", mail_from="auth@example.com")
    mail = Mailer(settings, log_event).compose("notice", f"{local}@x.io", what="password_changed")
    assert f"{local}@x.io" in mail.get_content()


@pytest.mark.both_engines
def test_a_new_database_has_no_account(call: Client, settings: Settings) -> None:
    with raw_connection(settings.database) as connection:
        assert connection.execute("SELECT count(*) FROM users").fetchone() == (0,)
    assert call("POST", "/sessions", {"email": "admin", "password": "admin"}).status == 401


def test_a_login_that_cannot_be_counted_is_refused(call: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> int:
        raise StorageUnavailable("full")

    call("POST", "/users", BOB)
    monkeypatch.setattr(RateLimits, "consume", unavailable)
    answer = call("POST", "/sessions", BOB, REMOTE_ADDR="127.0.0.1")
    assert answer.status == 503
    assert "Set-Cookie" not in answer.headers


# Sizes and times


@pytest.mark.slow
def test_headers_cookies_and_links_are_short(production: Settings, clock: Clock) -> None:
    url = "smtps://mail.example.com"
    settings = replace(production, smtp_url=url, mail_from="auth@example.com", confirm_email=False)
    with contextlib.closing(DB(settings.database)) as db:
        auth = Auth(db, settings, clock)
        email = "a" * 64 + "@" + ("b" * 60 + ".") * 3 + "io"
        form = {"email": email, "password": "violet ostrich tango"}
        client = Client(create_app(settings, auth))
        assert client("POST", "/users", form).status == 200
        answer = client("POST", "/sessions", form)
        assert len(answer.headers["Set-Cookie"]) < 256
        assert sum(len(name) + len(value) for name, value in answer.headers.items()) < 2048
        mail = Mailer(settings, log_event).compose("reset", email, token=auth.get_reset_password_token(email))
    link = re.findall("https://.*#.*", mail.get_content())[0]
    assert len(link) < 512


def test_session_ids_made_at_the_same_time_differ(production: Settings, clock: Clock) -> None:
    settings = replace(production, sessions_per_user=100)
    made: list[str] = []
    with contextlib.closing(DB(settings.database)) as db:
        auth = Auth(db, settings, clock)
        db.add_user("bob@x.io", "$2b$04$" + "." * 53)

        def log_in() -> None:
            made.extend(auth.create_session("bob@x.io") or "" for _ in range(10))

        threads = [threading.Thread(target=log_in) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(made)) == 80
    assert all(re.fullmatch("[A-Za-z0-9_-]{43}", secret) for secret in made)  # 256 bits


HOSTILE = {
    "a mailbox": lambda: MAILBOX.fullmatch("@".join(["a" * 8000] * 2) + "@"),
    "a password": lambda: passwords.strength_error("ab" * 511 + "c", "a-" * 127 + "@x", 15),
    "a boundary": lambda: forms._parse_multipart(b"--a\r\n" * 3000, "boundary=" * 1700 + '"a'),
    "a disposition": lambda: forms._parse_multipart(b"--a\r\n" + b"\r\nContent-Disposition:" * 700, "boundary=a"),
    "a cookie": lambda: re.fullmatch("[A-Za-z0-9_-]{1,128}", "a" * 16_000 + "!"),
    "spaces": lambda: forms._parse_multipart(
        b"--a\r\nContent-Disposition:" + b" " * 16_000 + b"\r\n\r\n\r\n--a--", "boundary=a"
    ),
}


@each("parse", HOSTILE.values())
def test_hostile_text_is_parsed_in_linear_time(parse: Any) -> None:
    began = time.thread_time()
    with contextlib.suppress(ValueError):
        parse()
    assert time.thread_time() - began < 0.1  # a thousand times what it takes


# A real process


@pytest.mark.both_engines
def test_requests_leave_no_file_open(service: Service) -> None:
    def ask(count: int) -> int:
        for number in range(count):
            requests.get(f"{service.url}/profile", timeout=5)
            requests.post(f"{service.url}/sessions", data={"email": f"nobody{number}", "password": "p"}, timeout=5)
        return len(os.listdir(folder))

    folder = Path(f"/proc/{service.process.pid}/fd")
    if not folder.exists():
        pytest.skip("only Linux lists the open files of a process")
    first = ask(3)
    assert ask(30) <= first + 2  # a connection may not be closed yet


@pytest.mark.parametrize("path", ["/", "/nowhere", "/profile"])
def test_no_response_names_the_server(service: Service, path: str) -> None:
    answer = requests.get(f"{service.url}{path}", timeout=5)
    assert "Server" not in answer.headers
    assert not re.search("waitress|bottle|python", f"{answer.headers}{answer.text}", re.IGNORECASE)
