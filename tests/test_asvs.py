"""What no room can promise alone: how all of them are written, and what no request may ever do."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

import authsvc
import guard
import passwords
from auth import Auth
from authsvc import create_app
from database import StorageUnavailable
from mailer import Mailer
from settings import MAILBOX, Settings
from storage import DB, open_store
from tests.conftest import HERE, Client, Clock, Service, ledger_of

BOB = {"email": "bob@x.io", "password": "b4l0u"}
TREES = {path.stem: ast.parse(path.read_text()) for path in HERE.glob("*.py") if path.stem != "main"}
SECRETS = {"hashed", "password", "reset_token", "secret", "session_hash", "session_id", "token", "token_hash"}


@pytest.fixture
def production(settings: Settings) -> Settings:
    return replace(settings, public_url="https://auth.example.com", bcrypt_cost=10)


def called(room: str) -> dict[str, list[ast.Call]]:
    found: dict[str, list[ast.Call]] = {}
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Call):
            found.setdefault(ast.unparse(node.func), []).append(node)
    return found


def imported(room: str) -> set[str]:
    found = set()
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# How it is written


@pytest.mark.parametrize("room", TREES)
def test_a_room_runs_no_program_and_no_made_up_code(room: str) -> None:
    assert not called(room).keys() & {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
    never = {"ctypes", "importlib", "marshal", "pickle", "pty", "runpy", "shelve", "subprocess", "yaml"}
    assert not imported(room) & (never | {"bottle.template", "bottle.SimpleTemplate"})
    assert not any(name.startswith(("os.exec", "os.spawn", "os.posix_spawn", "os.fork")) for name in called(room))
    cookies = [call for name, calls in called(room).items() if name.endswith("_cookie") for call in calls]
    assert not any(word.arg == "secret" for call in cookies for word in call.keywords)  # Bottle pickles then


@pytest.mark.parametrize("room", TREES)
def test_every_pattern_is_a_literal(room: str) -> None:
    assigned = [ast.unparse(node) for node in TREES[room].body if isinstance(node, ast.Assign)]
    patterns = [call.args[0] for name, calls in called(room).items() if name.startswith("re.") for call in calls]
    for part in (part for pattern in patterns for part in ast.walk(pattern) if isinstance(part, ast.expr)):
        constant = isinstance(part, ast.Name) and any(part.id in line.partition(" = ")[0] for line in assigned)
        assert constant or isinstance(part, ast.Constant | ast.BinOp)  # BinOp: constants joined with +


@pytest.mark.parametrize("room", TREES)
def test_no_room_uses_a_weak_generator(room: str) -> None:
    assert not imported(room) & {"random", "numpy"}
    assert not called(room).keys() & {"uuid.uuid1", "uuid.uuid3", "uuid.uuid5", "hashlib.md5", "hashlib.sha1"}


@pytest.mark.parametrize("room", TREES)
def test_no_secret_is_compared_in_python(room: str) -> None:
    compared = {
        ast.unparse(side).rpartition(".")[2]
        for node in ast.walk(TREES[room])
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq)
        if ast.unparse(node.comparators[0]) != "NO_PASSWORD"  # which is none
        for side in (node.left, *node.comparators)
    }
    assert not compared & SECRETS


def test_only_the_mailer_connects_to_anything() -> None:
    outward = {"ftplib", "http.client", "requests", "smtplib", "urllib.request", "urllib3", "xmlrpc.client"}
    assert {room for room in TREES if imported(room) & outward} == {"mailer"}
    connects = {
        (room, name) for room in TREES for name in called(room) if re.search(r"\.(create_connection|connect)$", name)
    }
    assert connects == {("database", "sqlite3.connect"), ("storage_postgres", "psycopg.connect")}


def test_only_the_gate_writes_the_log() -> None:
    writes = {
        (room, name)
        for room in TREES
        for name in called(room)
        if re.search(r"^print$|std(out|err)\.write$|\.write_(text|bytes)$|^logging\.(debug|info|warning|error)$", name)
    }
    assert writes == {
        ("guard", "sys.stderr.write"),
        ("authsvc", "print"),  # the URL, and why it cannot start
        ("admin", "print"),  # what a command is asked for
    }
    assert {room for room in TREES if "syslog.syslog" in called(room)} == {"admin"}


@pytest.mark.sqlite
def test_the_tables_hold_what_is_documented(db: DB, settings: Settings) -> None:
    with ledger_of(settings.database) as ledger:
        tables = [name for (name,) in ledger.execute("SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE TABLE%'")]
        columns = {name: {row[1] for row in ledger.execute(f"PRAGMA table_info({name})")} for name in tables}
    del columns["sqlite_sequence"]
    times = {"created_at", "last_seen_at", "expires_at"}
    assert columns == {  # neither a hint, nor a question, nor the age of a password
        "users": {
            *("id", "email", "email_key", "hashed_password"),
            *("session_id", "reset_token", "reset_expires_at", "reset_created_at"),
            *("created_at", "disabled_at", "totp_secret", "totp_since", "totp_step"),
        },
        "recovery_codes": {"user_id", "code_hash"},
        "sessions": {"id", "session_hash", "user_id", "address", "user_agent"} | times,
        "known_addresses": {"user_id", "address_hash", "seen_at"},
        "throttle": {"key", "full_at"},
        "throttle_secret": {"id", "secret"},
    }


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_package_is_pinned_with_its_hash(name: str) -> None:
    text = re.sub(r" *#.*", "", (HERE / name).read_text()).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", line)
    assert (HERE / "Makefile").read_text().count("pip install") == (HERE / "Makefile").read_text().count(
        "--require-hashes"
    )


# What no request may do


@pytest.mark.parametrize(
    "path",
    [
        *("/.git/config", "/.env", "/static/", "/favicon.ico", "/robots.txt", "/metrics", "/docs", "/openapi.yaml"),
        *("/authsvc.py", "/authsvc.db", "/schema.sql", "/profile/x.css", "/profile;a.css", "/profile/", "/users/1"),
        *("/../etc/passwd", "/{{7*7}}", "/<script>", "/%s%n", "/sessions/", "/admin", "/verify/../profile"),
    ],
)
def test_a_path_leads_to_a_route_or_nowhere(call: Client, path: str) -> None:
    answer = call("GET", path)
    assert (answer.status, answer.json) == (404, {"message": "not found"})
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/users", "/sessions", "/profile?callback=x"])
def test_no_other_origin_is_let_in(call: Client, method: str, path: str) -> None:
    answer = call(method, path, BOB, HTTP_ORIGIN="https://evil.example", HTTP_ACCESS_CONTROL_REQUEST_METHOD="POST")
    assert not [name for name in answer.headers if name.startswith("Access-Control")]
    assert answer.status != 200 or answer.json == {"message": "Bienvenue"}
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("POST", "/sessions"), ("DELETE", "/sessions"), ("GET", "/nowhere")]
)
def test_no_host_header_enters_an_answer(call: Client, method: str, path: str) -> None:
    call("POST", "/users", BOB)
    cookie = f"session_id={call('POST', '/sessions', BOB).session_id}"
    answer = call(method, path, BOB, cookie=cookie, HTTP_HOST="evil.example", HTTP_X_FORWARDED_HOST="evil.example")
    assert "evil" not in str(answer.headers) + str(answer.body)
    assert answer.headers.get("Location", "/") == "/"


@pytest.mark.sqlite
def test_reading_changes_nothing(call: Client, settings: Settings) -> None:
    call("POST", "/users", BOB)
    cookie = f"session_id={call('POST', '/sessions', BOB).session_id}"
    with ledger_of(settings.database) as ledger:
        before = list(ledger.iterdump())
        for method in ("GET", "HEAD", "OPTIONS"):
            for path in {path for _, path, *_ in authsvc.ROUTES}:
                call(method, path + "?_method=DELETE", BOB, cookie=cookie, HTTP_X_HTTP_METHOD_OVERRIDE="DELETE")
        assert list(ledger.iterdump()) == before


def test_a_profile_is_that_of_the_session(call: Client) -> None:
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
def test_a_format_in_a_field_stays_text(
    call: Client, production: Settings, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("POST", "/users", {"email": text, "password": text}).json["email"] == text
    assert call("POST", "/sessions", {"email": text, "password": "other"}).status == 401
    assert all(json.loads(line)["event"] != "sys_crash" for line in capsys.readouterr().err.splitlines())
    local = re.sub(r"[^!-~]|[{}()]", "", text) + "{0.__class__}{token}"
    settings = replace(production, smtp_url="smtps://mail.example.com", mail_from="auth@example.com")
    mail = Mailer(settings, guard.log).notice(f"{local}@x.io", "Your password was changed")
    assert f"{local}@x.io" in mail.get_content()


def test_there_is_no_account_to_begin_with(call: Client, settings: Settings) -> None:
    with ledger_of(settings.database) as ledger:
        assert ledger.execute("SELECT count(*) FROM users").fetchone() == (0,)
    assert call("POST", "/sessions", {"email": "admin", "password": "admin"}).status == 401


@pytest.mark.sqlite
def test_a_login_that_cannot_be_counted_is_refused(call: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: object) -> int:
        raise StorageUnavailable("full")

    call("POST", "/users", BOB)
    monkeypatch.setattr(DB, "take", unavailable)
    answer = call("POST", "/sessions", BOB, REMOTE_ADDR="127.0.0.1")
    assert answer.status == 503
    assert "Set-Cookie" not in answer.headers


# Sizes and times


def test_what_is_built_is_short(production: Settings, clock: Clock) -> None:
    settings = replace(production, smtp_url="smtps://mail.example.com", mail_from="auth@example.com")
    with contextlib.closing(open_store(settings.database)) as db:
        auth = Auth(db, settings, clock)
        email = "a" * 240 + "@x.io"
        form = {"email": email, "password": "violet ostrich tango"}
        client = Client(create_app(settings, auth))
        assert client("POST", "/users", form).status == 200
        answer = client("POST", "/sessions", form)
        assert len(answer.headers["Set-Cookie"]) < 256
        assert sum(len(name) + len(value) for name, value in answer.headers.items()) < 2048
        mail = Mailer(settings, guard.log).reset(email, auth.get_reset_password_token(email))
    link = re.findall("https://.*#.*", mail.get_content())[0]
    assert len(link) < 512


def test_secrets_made_at_once_are_all_different(production: Settings, clock: Clock) -> None:
    settings = replace(production, sessions_per_user=100)
    made: list[str] = []
    with contextlib.closing(open_store(settings.database)) as db:
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
    "a password": lambda: passwords.weakness("ab" * 511 + "c", "a-" * 127 + "@x", 15),
    "a boundary": lambda: authsvc._multipart(b"--a\r\n" * 3000, "boundary=" * 1700 + '"a'),
    "a disposition": lambda: authsvc._multipart(b"--a\r\n" + b"\r\nContent-Disposition:" * 700, "boundary=a"),
    "a cookie": lambda: re.fullmatch("[A-Za-z0-9_-]{1,128}", "a" * 16_000 + "!"),
    "spaces": lambda: authsvc._multipart(
        b"--a\r\nContent-Disposition:" + b" " * 16_000 + b"\r\n\r\n\r\n--a--", "boundary=a"
    ),
}


@pytest.mark.parametrize("parse", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_parsed_in_no_time(parse: Any) -> None:
    began = time.thread_time()
    with contextlib.suppress(ValueError):
        parse()
    assert time.thread_time() - began < 0.1  # exponential would be for ever; this is a thousand times what it takes


# A real process


def test_requests_leave_no_file_open(service: Service) -> None:
    def ask(count: int) -> int:
        for number in range(count):
            requests.get(f"{service.url}/profile", timeout=5)
            requests.post(f"{service.url}/sessions", data={"email": f"nobody{number}", "password": "p"}, timeout=5)
        return len(os.listdir(folder))

    folder = Path(f"/proc/{service.process.pid}/fd")
    if not folder.exists():
        pytest.skip("no /proc: only Linux tells how many files a process has open")
    first = ask(3)
    assert ask(30) <= first + 2  # a connection may not be closed yet


@pytest.mark.once
@pytest.mark.parametrize("path", ["/", "/nowhere", "/profile"])
def test_no_answer_names_the_server(service: Service, path: str) -> None:
    answer = requests.get(f"{service.url}{path}", timeout=5)
    assert "Server" not in answer.headers
    assert not re.search("waitress|bottle|python", f"{answer.headers}{answer.text}", re.IGNORECASE)
