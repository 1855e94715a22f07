"""copy-to: from a file to PostgreSQL and back, on real databases of both engines."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import requests

import authsvc
from auth import UNCOUNTED, Auth, Caller
from cli import commands
from credentials import totp
from engines import operations, sqlite
from engines.errors import DatabaseRefused
from engines.schema import SQLITE_SCHEMA, TABLES
from settings import Settings, is_url
from storage import DB
from tables.rate_limits import Bucket
from tests import postgres
from tests.authenticator import Authenticator
from tests.conftest import COST, HERE, Service, clean_environ, raw_connection

pytestmark = pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)

HASH = "$2b$12$" + "a" * 21 + "e" + "b" * 31


class Done(NamedTuple):
    """The result of a command."""

    returncode: int
    stdout: str
    stderr: str


New = Callable[[str], str]
Copy = Callable[..., Done]


@pytest.fixture
def new(postgresql: postgres.Server, tmp_path: Path) -> New:
    """Return the name of a database of this engine that does not exist, or has no tables."""
    count = 0

    def name_one(kind: str) -> str:
        nonlocal count
        count += 1
        if kind == "sqlite":
            return str(tmp_path / f"copy{count}.db")
        # A database, not a schema: a copy is refused while others are connected to the database.
        name = f"{tmp_path.name}_{count}".replace("-", "_").lower()
        with closing(psycopg.connect(postgresql.url, autocommit=True)) as connection:
            # It sorts texts as a dictionary does, and a file by their bytes. The copy must not depend on the order.
            locale = "TEMPLATE template0 LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'en'"  # since PostgreSQL 15
            connection.execute(f'CREATE DATABASE "{name}" {locale}'.encode())
        return f"{postgresql.socket_url.removesuffix('/postgres')}/{name}"

    return name_one


@pytest.fixture(params=[("sqlite", "postgres"), ("postgres", "sqlite")], ids=" to ".join)
def databases(request: pytest.FixtureRequest, new: New) -> tuple[str, str]:
    """A source and a target, in both directions."""
    return new(request.param[0]), new(request.param[1])


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Copy:
    """Run copy-to from one database to another."""

    def copy_one(source: str, target: str, *options: str) -> Done:
        monkeypatch.setenv("AUTHSVC_DATABASE", source)
        capsys.readouterr()
        code = authsvc.main(["copy-to", target, *options])
        return Done(code, *capsys.readouterr())

    return copy_one


def fill(database: str) -> None:
    """Store a value in each column of each table."""
    settings = Settings(database=database, bcrypt_cost=COST, sessions_per_user=5)
    auth = Auth(DB(database), settings)
    auth.register_user("Bob@x.io", "b4l0u")
    auth.register_user("ÉVE@x.io", "3v3")
    session_id = auth.log_in("bob@x.io", "b4l0u", caller=Caller("192.0.2.1", agent="tab\t, back\\slash, \\N, é, 🗝"))[1]
    seed, _, _, session_id = auth.begin_totp(session_id, "b4l0u", caller=UNCOUNTED)
    session_id = auth.confirm_totp(session_id, totp.code(seed, int(time.time()) // totp.STEP), caller=UNCOUNTED)[1]
    for days in ("30", ""):
        *_, token = auth.create_token(session_id, "b4l0u", "é, 🗝", days, caller=UNCOUNTED)
    assert auth.identify_program(f"Bearer {token}", browser=False)  # records the use
    device, browser = Authenticator(), "one"
    options = auth.begin_passkey(session_id, "b4l0u", "", UNCOUNTED, browser)
    auth.add_passkey(session_id, "é, 🗝", device.create(options), browser, caller=UNCOUNTED)
    auth.log_in_with_passkey(device.get(auth.passkey_request(browser)), browser, caller=UNCOUNTED)
    auth.log_in("éve@x.io", "3v3", caller=Caller("2001:db8::1", agent=""), remember=True)
    auth.link_token(auth.find_user("éve@x.io"))
    auth.add_account("invited@x.io")
    auth.add_account("gone@x.io")
    auth.close()
    with closing(DB(database)) as db:
        db.rate_limits.consume([Bucket(key, 5, 60) for key in ("\x7fkey", "Key", "key", "k-ey")], int(time.time()))
        # Only copies of the last release still store addresses.
        db._engine.write("INSERT INTO known_addresses SELECT id, 'address ' || id, 1 FROM users", {})
        for number, email in enumerate(("Wait@x.io", "É@x.io")):
            link = {"email": email, "email_key": email.casefold(), "token_hash": str(number), "expires_at": 2**33}
            db.emails.add_registration(link)
            session = db._engine.read("SELECT session_hash FROM sessions WHERE id = :id", {"id": number + 1})
            assert db.emails.set_change(session[0], link)
            db.change_email(db.add_user(f"{number}{email}", HASH).id, f"new {email}", 1, reserved_at=1)
        old = db.add_user("old@x.io", HASH)  # a hash as text, and no time of creation, as in an old file
        db.disable_user(old.id, 1_700_000_000)
        db.count_untold_logins(old.id, 3)
        assert db.set_groups(old, "admin,wiki")
        db._engine.write("UPDATE users SET cut_salt = 'salt' WHERE id = :id", {"id": old.id})
        db.delete_user(db.find_user_by(email="gone@x.io").id)
        db.delete_user(db.add_user("last@x.io", b"$2b$04$bytes").id)  # its id is never used again


def rows_of(database: str) -> dict[str, list[Any]]:
    """Return all rows of all tables, with all columns."""
    rows = {}
    with raw_connection(database) as connection:
        for table in TABLES:
            rows[table] = sorted(connection.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
    return rows


def columns_of(database: str) -> dict[str, tuple[str, ...]]:
    with raw_connection(database) as connection:
        found = {table: connection.execute(f"SELECT * FROM {table} LIMIT 0").description for table in TABLES}
    return {table: tuple(column[0] for column in columns) for table, columns in found.items()}


def is_empty(database: str) -> bool:
    return not operations(database).exists(database) or not any(rows_of(database).values())


# Both directions


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_every_column_of_every_table_is_copied(new: New, kind: str) -> None:
    database = new(kind)
    DB(database).close()
    assert columns_of(database) == TABLES
    with raw_connection(database) as connection:
        statement = {
            "sqlite": "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'",
            "postgres": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
        }[kind]
        assert {name for (name,) in connection.execute(statement).fetchall()} - {"authsvc_version"} == TABLES.keys()


def test_a_copy_to_postgresql_and_back_has_the_same_rows(new: New, copy: Copy) -> None:
    first, second, third = new("sqlite"), new("postgres"), new("sqlite")
    fill(first)
    rows = rows_of(first)
    hashes = {type(row[3]) for row in rows["users"]}
    assert hashes == {str, bytes}
    for table, columns in columns_of(first).items():
        for column, values in zip(columns, zip(*rows[table])):
            assert any(value is not None for value in values), (table, column)
    for source, target in ((first, second), (second, third)):
        done = copy(source, target)
        assert done.returncode == 0, done.stderr
        assert rows_of(source) == rows_of(target) == rows
    assert stat.S_IMODE(os.stat(third).st_mode) == 0o600
    added = []
    for database in (first, second, third):
        with closing(DB(database)) as db:
            added.append(db.add_user("next@x.io", HASH).id)
    assert added == [max(row[0] for row in rows["users"]) + 2] * 3  # the last id was that of a deleted user


def test_a_copy_is_reported_and_logged_without_a_secret(new: New, copy: Copy) -> None:
    source, target = new("sqlite"), new("postgres")
    fill(source)
    done = copy(source, target.replace("postgres@", "postgres:s3cret@"), "--json")
    counts = {table: len(rows) for table, rows in rows_of(source).items()}
    shown = json.loads(done.stdout)
    assert shown == {"target": shown["target"], **counts}
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (line["event"], line["users"], line["target"]) == ("sys_copy", 6, shown["target"])
    assert "s3cret" not in done.stdout + done.stderr
    assert not [name for name in os.listdir(os.path.dirname(source)) if name.startswith(".")]


def test_a_session_continues_on_the_copy(databases: tuple[str, str], copy: Copy, start: Callable[..., Service]) -> None:
    source, target = databases
    service = start(AUTHSVC_DATABASE=source)
    account = {"email": "bob@example.com", "password": "b4l0u"}
    requests.post(f"{service.url}/users", data=account, timeout=10)
    cookies = requests.post(f"{service.url}/sessions", data=account, timeout=10).cookies
    service.end()
    assert copy(source, target).returncode == 0
    service = start(AUTHSVC_DATABASE=target)
    answer = requests.get(f"{service.url}/profile", cookies=cookies, timeout=10)
    assert (answer.status_code, answer.json()) == (200, {"email": "bob@example.com"})
    assert requests.post(f"{service.url}/sessions", data=account, timeout=10).status_code == 200
    assert requests.get(f"{service.url}/profile", cookies=cookies, timeout=10).status_code == 403


# Copies that are refused


def test_a_database_in_use_is_not_copied(databases: tuple[str, str], copy: Copy, start: Callable[..., Service]) -> None:
    source, target = databases
    service = start(AUTHSVC_DATABASE=source)
    done = copy(source, target)
    assert done.returncode == 1
    assert re.search("in use.*: stop (all copies of )?the service first", done.stderr)
    assert is_empty(target)
    assert requests.get(f"{service.url}/health", timeout=10).status_code == 200
    service.end()
    assert copy(source, target).returncode == 0


def test_a_source_cannot_be_changed_during_a_copy(databases: tuple[str, str]) -> None:
    source, _ = databases
    fill(source)
    with operations(source).open_source(source) as rows, raw_connection(source) as other:
        (first, *_) = rows.read("users")
        if is_url(source):
            other.execute("SET lock_timeout = '50ms'")
        with pytest.raises((sqlite3.OperationalError, psycopg.errors.LockNotAvailable)):
            other.execute("UPDATE users SET email = 'x' WHERE id = 1")
    assert first[1] == "Bob@x.io"


def test_a_target_cannot_be_changed_during_a_copy(new: New) -> None:
    target = new("postgres")
    DB(target).close()
    with operations(target).open_target(target), raw_connection(target) as other:
        other.execute("SET lock_timeout = '50ms'")
        for table in TABLES:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute(f"DELETE FROM {table}")


def test_a_source_file_cannot_be_opened_during_a_copy(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    source = new("sqlite")
    DB(source).close()
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.05)
    with operations(source).open_source(source), pytest.raises(DatabaseRefused, match="locked"):
        DB(source)


def add_a_user(database: str) -> None:
    with closing(DB(database)) as db:
        db.add_user("first@x.io", HASH)


def add_a_secret(database: str) -> None:
    with closing(DB(database)) as db:
        db.rate_limits.secret(b"s" * 32)


@pytest.mark.parametrize("add", [add_a_user, add_a_secret])
def test_a_target_with_rows_is_refused_and_not_changed(
    databases: tuple[str, str], copy: Copy, add: Callable[[str], None]
) -> None:
    source, target = databases
    fill(source)
    add(target)
    before = rows_of(target)
    done = copy(source, target)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the target is not empty" in done.stderr or "File exists" in done.stderr
    assert rows_of(target) == before


def test_a_target_with_empty_tables_is_filled(new: New, copy: Copy) -> None:
    source, target = new("sqlite"), new("postgres")
    fill(source)
    DB(target).close()
    assert copy(source, target).returncode == 0
    assert rows_of(source) == rows_of(target)


@pytest.mark.parametrize(
    "target",
    ["postgresql://host/a b", "postgresql://elsewhere.example.com/authsvc"],
    ids=["a malformed URL", "a connection without TLS"],
)
def test_a_target_that_the_service_could_not_use_is_refused(
    new: New, copy: Copy, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    source = new("sqlite")
    fill(source)
    monkeypatch.setenv("AUTHSVC_PUBLIC_URL", "https://auth.example.com")
    done = copy(source, target)
    assert done.returncode == 2
    assert done.stderr.startswith("authsvc: AUTHSVC_DATABASE ")


def test_no_target_is_made_without_a_source(new: New, copy: Copy) -> None:
    source, target = new("sqlite"), new("sqlite")
    done = copy(source, target)
    assert done.returncode == 1
    assert "there is no database" in done.stderr
    assert not os.path.exists(target)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE sessions SET user_agent = 'a' || char(0) WHERE id = 2", "user_agent in row 2 of sessions"),
        ("UPDATE sessions SET user_agent = CAST(x'c328' AS TEXT) WHERE id = 1", "user_agent in row 1 of sessions"),
        ("UPDATE users SET email = CAST(x'eda080' AS TEXT) WHERE id = 2", "email in row 2 of users"),
        (r"UPDATE users SET hashed_password = '\x24' WHERE id = 3", "hashed_password in row 3 of users"),
    ],
    ids=["a NUL", "a byte that is not UTF-8", "a surrogate", "a hash that looks like bytes"],
)
def test_a_row_that_postgresql_cannot_store_is_named_and_refused(new: New, copy: Copy, change: str, named: str) -> None:
    source, target = new("sqlite"), new("postgres")
    fill(source)
    with raw_connection(source) as connection:
        connection.execute(change)
    done = copy(source, target)
    assert done.returncode == 1
    assert f"cannot store the {named}; nothing was copied" in done.stderr
    assert not operations(target).exists(target)


def test_a_source_with_a_foreign_key_violation_is_refused(new: New, copy: Copy) -> None:
    source, target = new("sqlite"), new("postgres")
    fill(source)
    with raw_connection(source) as connection:
        connection.execute("UPDATE sessions SET user_id = 99")
    done = copy(source, target)
    assert done.returncode == 1
    assert "foreign key violation in sessions" in done.stderr
    assert not operations(target).exists(target)


# Copies that fail

CHANGES = """
    CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.user_agent := NEW.user_agent || '.'; RETURN NEW; END $$;
    CREATE TRIGGER changes BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION change();
"""
DROPS = """
    CREATE TRIGGER drops AFTER INSERT ON recovery_codes BEGIN DELETE FROM recovery_codes; END;
"""


def test_a_copy_with_a_changed_row_is_rolled_back(new: New, copy: Copy) -> None:
    source, target = new("sqlite"), new("postgres")
    fill(source)
    DB(target).close()
    with raw_connection(target) as connection:
        connection.connection.execute(CHANGES)
    done = copy(source, target)
    assert done.returncode == 1
    assert "row 1 of sessions differs after the copy; nothing was copied" in done.stderr
    assert is_empty(target)


def test_a_copy_with_a_missing_row_is_rolled_back(
    new: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = new("postgres"), new("sqlite")
    fill(source)
    changed = tmp_path / "schema.sql"
    changed.write_text(SQLITE_SCHEMA.read_text() + DROPS)
    monkeypatch.setattr(sqlite, "SQLITE_SCHEMA", changed)
    monkeypatch.setenv("AUTHSVC_DATABASE", source)
    assert authsvc.main(["copy-to", target]) == 1
    assert "of recovery_codes differs after the copy; nothing was copied" in capsys.readouterr().err
    assert not os.path.exists(target)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def wait_until(happened: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start_copy(source: str, target: str) -> subprocess.Popen[bytes]:
    environ = clean_environ() | {"AUTHSVC_DATABASE": source}
    return subprocess.Popen(
        [sys.executable, HERE / "authsvc.py", "copy-to", target], env=environ, stderr=subprocess.DEVNULL
    )


@pytest.mark.faults
def test_a_killed_copy_to_postgresql_leaves_no_row(new: New, copy: Copy) -> None:
    source, target = new("sqlite"), new("postgres")
    fill(source)
    DB(target).close()
    with raw_connection(target) as connection, closing(psycopg.connect(target, autocommit=True)) as blocker:
        blocker.execute("SELECT pg_advisory_lock(1)")  # the copy waits for it before the last table
        connection.connection.execute(
            """
            CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$;
            CREATE TRIGGER pauses BEFORE INSERT ON throttle_secret FOR EACH ROW EXECUTE FUNCTION pause();
            """
        )
        process = start_copy(source, target)
        waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_until(lambda: connection.execute(waiting).fetchone(), process)
        process.kill()
        assert process.wait(timeout=20) == -signal.SIGKILL
        blocker.execute("SELECT pg_advisory_unlock(1)")
        assert not any(rows_of(target).values())
        connection.connection.execute("DROP TRIGGER pauses ON throttle_secret")
    assert copy(source, target).returncode == 0
    assert rows_of(target) == rows_of(source)


@pytest.mark.faults
@pytest.mark.slow
def test_a_killed_copy_to_a_file_leaves_no_file_of_its_name(new: New, copy: Copy, tmp_path: Path) -> None:
    source, target = new("postgres"), new("sqlite")
    fill(source)
    with raw_connection(source) as connection:
        connection.execute(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            SELECT lpad(to_hex(n), 64, '0'), 1, 1, 1, 1, '192.0.2.1', repeat('a', 200) FROM generate_series(1, 15000) n
            """
        )
    process = start_copy(source, target)
    logs = Path(target).parent
    wait_until(lambda: any(log.stat().st_size > 500_000 for log in logs.glob(".copy*-wal")), process)
    process.kill()
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert not os.path.exists(target)
    assert copy(source, target).returncode == 0
    assert len(rows_of(target)["sessions"]) == 15_003


def test_progress_is_shown_at_a_terminal_only(
    new: New, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = new("sqlite")
    fill(source)
    monkeypatch.setattr(commands, "PROGRESS_STEP", 2)
    monkeypatch.setenv("AUTHSVC_DATABASE", source)
    for shown in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=shown: shown, raising=False)
        assert authsvc.main(["copy-to", new("postgres")]) == 0
        printed = capsys.readouterr().err
        assert ("\rcopying users: 2 rows" in printed) is ("\rverifying sessions: 0 rows" in printed) is shown


def test_a_target_that_cannot_be_opened_is_refused(new: New, copy: Copy) -> None:
    source = new("sqlite")
    fill(source)
    done = copy(source, "postgresql://nobody@127.0.0.1:1/nothing")
    assert done.returncode == 1
    assert "authsvc: cannot open the database nothing on 127.0.0.1:1" in done.stderr
    with pytest.raises(DatabaseRefused, match="No such file"), operations("").open_target("/nowhere/authsvc.db"):
        pass
