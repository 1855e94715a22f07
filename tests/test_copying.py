"""copy-to: from a file to PostgreSQL and back, with real ones of both."""

from __future__ import annotations

import json
import os
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

import admin
import authsvc
import database
import totp
from auth import Auth
from database import DatabaseRefused
from settings import Settings, is_url
from storage import TABLES, engine, open_store
from tests import postgres
from tests.conftest import COST, HERE, Service, clean_environ, ledger_of

pytestmark = [
    pytest.mark.slow,  # processes, and databases of PostgreSQL
    pytest.mark.once,  # each has both engines
    pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING),
]

HASH = "$2b$12$" + "a" * 21 + "e" + "b" * 31


class Done(NamedTuple):
    """What a copy left."""

    returncode: int
    stdout: str
    stderr: str


New = Callable[[str], str]
Copy = Callable[..., Done]


@pytest.fixture
def new(postgresql: postgres.Server, tmp_path: Path) -> New:
    """Name a place of this engine at which there is nothing yet."""
    made: list[str] = []

    def name_one(kind: str) -> str:
        made.append(kind)
        if kind == "sqlite":
            return str(tmp_path / f"place{len(made)}.db")
        # A database and no schema: whoever leaves one looks for others who are connected to it.
        name = f"{tmp_path.name}_{len(made)}".replace("-", "_").lower()
        with closing(psycopg.connect(postgresql.url, autocommit=True)) as connection:
            # One that orders texts as people do: what is read from both sides must not depend on it.
            locale = "TEMPLATE template0 LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'en'"  # since PostgreSQL 15
            connection.execute(f'CREATE DATABASE "{name}" {locale}'.encode())
        return f"{postgresql.socket_url.removesuffix('/postgres')}/{name}"

    return name_one


@pytest.fixture(params=[("sqlite", "postgres"), ("postgres", "sqlite")], ids=" to ".join)
def places(request: pytest.FixtureRequest, new: New) -> tuple[str, str]:
    """A source and a target, both ways."""
    return new(request.param[0]), new(request.param[1])


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Copy:
    """Copy from one place to another."""

    def copy_one(source: str, target: str, *options: str) -> Done:
        monkeypatch.setenv("AUTHSVC_DATABASE", source)
        capsys.readouterr()
        code = authsvc.main(["copy-to", target, *options])
        return Done(code, *capsys.readouterr())

    return copy_one


def furnish(place: str) -> None:
    """Put something into each column of each table."""
    settings = Settings(database=place, bcrypt_cost=COST, sessions_per_user=5)
    auth = Auth(open_store(place), settings)
    auth.register_user("Bob@x.io", "b4l0u")
    auth.register_user("ÉVE@x.io", "3v3")
    session_id = auth.log_in("bob@x.io", "b4l0u", address="192.0.2.1", user_agent="tab\t, back\\slash, \\N, é, 🗝")[1]
    seed, _ = auth.begin_totp(session_id, "b4l0u")
    auth.confirm_totp(session_id, totp.code(seed, int(time.time()) // totp.STEP))
    auth.log_in("éve@x.io", "3v3", address="2001:db8::1", user_agent="")
    auth.link_token(auth.find_user("éve@x.io"))
    auth.add_account("invited@x.io")
    auth.add_account("gone@x.io")
    auth.close()
    with closing(open_store(place)) as db:
        db.take([("\x7fkey", 5, 60), ("Key", 5, 60), ("key", 5, 60), ("k-ey", 5, 60)], int(time.time()))
        old = db.add_user("old@x.io", HASH)  # as text, from before the time was kept
        db.disable_user(old.id, 1_700_000_000)
        db.delete_user(db.find_user_by(email="gone@x.io").id)
        db.delete_user(db.add_user("last@x.io", b"$2b$04$bytes").id)  # whose number is nobody's for ever


def rows_of(place: str) -> dict[str, list[Any]]:
    """All rows, with all columns that are in the database."""
    rows = {}
    with ledger_of(place) as ledger:
        for table in TABLES:
            rows[table] = sorted(ledger.execute(f"SELECT * FROM {table}").fetchall(), key=repr)
    return rows


def columns_of(place: str) -> dict[str, tuple[str, ...]]:
    with ledger_of(place) as ledger:
        found = {table: ledger.execute(f"SELECT * FROM {table} LIMIT 0").description for table in TABLES}
    return {table: tuple(column[0] for column in columns) for table, columns in found.items()}


def nothing_is_at(place: str) -> bool:
    kind = engine(place)
    return not kind.is_there(place) or not any(rows_of(place).values())


# There and back


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_every_column_of_every_table_is_copied(new: New, kind: str) -> None:
    place = new(kind)
    open_store(place).close()
    assert columns_of(place) == TABLES
    with ledger_of(place) as ledger:
        statement = {
            "sqlite": "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'",
            "postgres": "SELECT tablename FROM pg_tables WHERE schemaname = 'public'",
        }[kind]
        assert {name for (name,) in ledger.execute(statement).fetchall()} - {"authsvc_version"} == TABLES.keys()


def test_there_and_back_all_rows_are_the_same(new: New, copy: Copy) -> None:
    here, there, back = new("sqlite"), new("postgres"), new("sqlite")
    furnish(here)
    rows = rows_of(here)
    hashes = {type(row[3]) for row in rows["users"]}
    assert hashes == {str, bytes}
    assert all(rows.values())
    for source, target in ((here, there), (there, back)):
        done = copy(source, target)
        assert done.returncode == 0, done.stderr
        assert rows_of(source) == rows_of(target) == rows
    assert stat.S_IMODE(os.stat(back).st_mode) == 0o600
    added = []
    for place in (here, there, back):
        with closing(open_store(place)) as db:
            added.append(db.add_user("next@x.io", HASH).id)
    assert added == [max(row[0] for row in rows["users"]) + 2] * 3  # the one between was deleted


def test_it_says_what_was_copied_and_logs_it_without_a_secret(new: New, copy: Copy) -> None:
    here, there = new("sqlite"), new("postgres")
    furnish(here)
    done = copy(here, there.replace("postgres@", "postgres:s3cret@"), "--json")
    counts = {table: len(rows) for table, rows in rows_of(here).items()}
    shown = json.loads(done.stdout)
    assert shown == {"target": shown["target"], **counts}
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (line["event"], line["users"], line["target"]) == ("sys_copy", 4, shown["target"])
    assert "s3cret" not in done.stdout + done.stderr
    assert not [name for name in os.listdir(os.path.dirname(here)) if name.startswith(".")]


def test_a_session_goes_on_at_the_new_place(places: tuple[str, str], copy: Copy, start: Callable[..., Service]) -> None:
    source, target = places
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


# What is refused


def test_nothing_is_copied_while_a_service_runs(
    places: tuple[str, str], copy: Copy, start: Callable[..., Service]
) -> None:
    source, target = places
    service = start(AUTHSVC_DATABASE=source)
    done = copy(source, target)
    assert done.returncode == 1
    assert "stop the service first" in done.stderr
    assert nothing_is_at(target)
    assert requests.get(f"{service.url}/health", timeout=10).status_code == 200
    service.end()
    assert copy(source, target).returncode == 0


def test_nobody_changes_what_is_being_copied(places: tuple[str, str]) -> None:
    source, _ = places
    furnish(source)
    with engine(source).leaving(source) as rows, ledger_of(source) as other:
        (first, *_) = rows.each("users")
        if is_url(source):
            other.execute("SET lock_timeout = '50ms'")
        with pytest.raises((sqlite3.OperationalError, psycopg.errors.LockNotAvailable)):
            other.execute("UPDATE users SET email = 'x' WHERE id = 1")
    assert first[1] == "Bob@x.io"


def test_nobody_adds_to_what_is_being_filled(new: New) -> None:
    there = new("postgres")
    open_store(there).close()
    with engine(there).arriving(there), ledger_of(there) as other:
        other.execute("SET lock_timeout = '50ms'")
        for table in TABLES:
            with pytest.raises(psycopg.errors.LockNotAvailable):
                other.execute(f"DELETE FROM {table}")


def test_nobody_opens_a_file_that_is_being_copied(new: New, monkeypatch: pytest.MonkeyPatch) -> None:
    here = new("sqlite")
    open_store(here).close()
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.05)
    with engine(here).leaving(here), pytest.raises(DatabaseRefused, match="locked"):
        open_store(here)


def taken_by_a_user(place: str) -> None:
    with closing(open_store(place)) as db:
        db.add_user("first@x.io", HASH)


def taken_by_a_secret(place: str) -> None:
    with closing(open_store(place)) as db:
        db.throttle_secret(b"s" * 32)


@pytest.mark.parametrize("take", [taken_by_a_user, taken_by_a_secret])
def test_a_target_that_is_not_empty_is_left_as_it_is(
    places: tuple[str, str], copy: Copy, take: Callable[[str], None]
) -> None:
    source, target = places
    furnish(source)
    take(target)
    before = rows_of(target)
    done = copy(source, target)
    assert (done.returncode, done.stdout) == (1, "")
    assert "it is not empty" in done.stderr or "File exists" in done.stderr
    assert rows_of(target) == before


def test_an_empty_database_that_was_opened_before_is_filled(new: New, copy: Copy) -> None:
    here, there = new("sqlite"), new("postgres")
    furnish(here)
    open_store(there).close()
    assert copy(here, there).returncode == 0
    assert rows_of(here) == rows_of(there)


@pytest.mark.parametrize("target", ["postgresql://host/a b", "postgresql://elsewhere.example.com/authsvc"])
def test_a_target_that_could_not_be_served_is_refused(
    new: New, copy: Copy, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    here = new("sqlite")
    furnish(here)
    monkeypatch.setenv("AUTHSVC_PUBLIC_URL", "https://auth.example.com")
    done = copy(here, target)
    assert done.returncode == 2
    assert done.stderr.startswith("authsvc: AUTHSVC_DATABASE ")


def test_without_a_source_no_target_is_made(new: New, copy: Copy) -> None:
    here, back = new("sqlite"), new("sqlite")
    done = copy(here, back)
    assert done.returncode == 1
    assert "there is no database" in done.stderr
    assert not os.path.exists(back)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE sessions SET user_agent = 'a' || char(0) WHERE id = 2", "user_agent in row 2 of sessions"),
        ("UPDATE sessions SET user_agent = CAST(x'c328' AS TEXT) WHERE id = 1", "user_agent in row 1 of sessions"),
        ("UPDATE users SET email = CAST(x'eda080' AS TEXT) WHERE id = 2", "email in row 2 of users"),
        (r"UPDATE users SET hashed_password = '\x24' WHERE id = 3", "hashed_password in row 3 of users"),
    ],
)
def test_what_postgresql_cannot_keep_is_named_and_nothing_copied(new: New, copy: Copy, change: str, named: str) -> None:
    here, there = new("sqlite"), new("postgres")
    furnish(here)
    with ledger_of(here) as ledger:
        ledger.execute(change)
    done = copy(here, there)
    assert done.returncode == 1
    assert f"cannot keep the {named}; nothing was copied" in done.stderr
    assert not engine(there).is_there(there)


def test_a_row_that_hangs_on_nothing_is_refused(new: New, copy: Copy) -> None:
    here, there = new("sqlite"), new("postgres")
    furnish(here)
    with ledger_of(here) as ledger:
        ledger.execute("UPDATE sessions SET user_id = 99")
    done = copy(here, there)
    assert done.returncode == 1
    assert "hangs on nothing" in done.stderr
    assert not engine(there).is_there(there)


# What goes wrong

CHANGES = """
    CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.user_agent := NEW.user_agent || '.'; RETURN NEW; END $$;
    CREATE TRIGGER changes BEFORE INSERT ON sessions FOR EACH ROW EXECUTE FUNCTION change();
"""
DROPS = """
    CREATE TRIGGER drops AFTER INSERT ON recovery_codes BEGIN DELETE FROM recovery_codes; END;
"""


def test_a_row_that_arrives_changed_undoes_the_copy(new: New, copy: Copy) -> None:
    here, there = new("sqlite"), new("postgres")
    furnish(here)
    open_store(there).close()
    with ledger_of(there) as ledger:
        ledger.connection.execute(CHANGES)
    done = copy(here, there)
    assert done.returncode == 1
    assert "the row 1 of sessions did not arrive as it left; nothing was copied" in done.stderr
    assert nothing_is_at(there)


def test_a_row_that_does_not_arrive_undoes_the_copy(
    new: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = new("postgres"), new("sqlite")
    furnish(there)
    schema = tmp_path / "schema.sql"
    schema.write_text(database.SCHEMA.read_text() + DROPS)
    monkeypatch.setattr(database, "SCHEMA", schema)
    monkeypatch.setenv("AUTHSVC_DATABASE", there)
    assert authsvc.main(["copy-to", back]) == 1
    assert "of recovery_codes did not arrive as it left; nothing was copied" in capsys.readouterr().err
    assert not os.path.exists(back)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def wait_until(happened: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def copying(source: str, target: str) -> subprocess.Popen[bytes]:
    environ = clean_environ() | {"AUTHSVC_DATABASE": source}
    return subprocess.Popen(
        [sys.executable, HERE / "authsvc.py", "copy-to", target], env=environ, stderr=subprocess.DEVNULL
    )


def test_a_copy_to_postgresql_that_is_killed_leaves_nothing(new: New, copy: Copy) -> None:
    here, there = new("sqlite"), new("postgres")
    furnish(here)
    open_store(there).close()
    with ledger_of(there) as ledger, closing(psycopg.connect(there, autocommit=True)) as gate:
        gate.execute("SELECT pg_advisory_lock(1)")  # at which the copy waits, when all tables but the last are there
        ledger.connection.execute(
            """
            CREATE FUNCTION pause() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NEW; END $$;
            CREATE TRIGGER pauses BEFORE INSERT ON throttle_secret FOR EACH ROW EXECUTE FUNCTION pause();
            """
        )
        process = copying(here, there)
        waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_until(lambda: ledger.execute(waiting).fetchone(), process)
        process.kill()
        assert process.wait(timeout=20) == -signal.SIGKILL
        gate.execute("SELECT pg_advisory_unlock(1)")
        assert not any(rows_of(there).values())
        ledger.connection.execute("DROP TRIGGER pauses ON throttle_secret")
    assert copy(here, there).returncode == 0
    assert rows_of(there) == rows_of(here)


def test_a_copy_to_a_file_that_is_killed_leaves_nothing_of_its_name(new: New, copy: Copy, tmp_path: Path) -> None:
    there, back = new("postgres"), new("sqlite")
    furnish(there)
    with ledger_of(there) as ledger:
        ledger.execute(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            SELECT lpad(to_hex(n), 64, '0'), 1, 1, 1, 1, '192.0.2.1', repeat('a', 200) FROM generate_series(1, 30000) n
            """
        )
    process = copying(there, back)
    logs = Path(back).parent
    wait_until(lambda: any(log.stat().st_size > 500_000 for log in logs.glob(".place*-wal")), process)
    process.kill()
    assert process.wait(timeout=20) == -signal.SIGKILL
    assert not os.path.exists(back)
    assert copy(there, back).returncode == 0
    assert len(rows_of(back)["sessions"]) == 30_002


def test_progress_is_shown_to_a_person_only(
    new: New, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = new("sqlite")
    furnish(here)
    monkeypatch.setattr(admin, "PROGRESS_STEP", 2)
    monkeypatch.setenv("AUTHSVC_DATABASE", here)
    for shown in (True, False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=shown: shown, raising=False)
        assert authsvc.main(["copy-to", new("postgres")]) == 0
        said = capsys.readouterr().err
        assert ("\rcopying users: 2 rows" in said) is ("\rverifying sessions: 0 rows" in said) is shown


def test_a_place_that_is_gone_is_said(new: New, copy: Copy) -> None:
    here = new("sqlite")
    furnish(here)
    done = copy(here, "postgresql://nobody@127.0.0.1:1/nothing")
    assert done.returncode == 1
    assert "authsvc: cannot open the database nothing on 127.0.0.1:1" in done.stderr
    with pytest.raises(DatabaseRefused, match="No such file"), engine("").arriving("/nowhere/authsvc.db"):
        pass
