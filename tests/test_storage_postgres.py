"""PostgreSQL: what passes each other there and must not, what it is when it is gone, and whose tables are refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

import storage_postgres
from database import AlreadyExists, DatabaseRefused, StorageUnavailable
from storage import User, open_store
from storage_postgres import PostgresDB, _converted
from tests import postgres
from tests.conftest import HERE, clean_environ
from tests.test_storage import (
    HASH,
    LOOK_UPS,
    NEW_HASH,
    NOW,
    add_session,
    at_once,
    find_session,
    give_token,
    second_factor,
    spend,
)

Beside = Callable[[Callable[[], Any]], "Future[Any]"]

pytestmark = pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)


@pytest.fixture
def place(postgresql: postgres.Server) -> str:
    return postgresql.new_place()


@pytest.fixture
def db(place: str) -> Iterator[PostgresDB]:
    with closing(PostgresDB(place)) as store:
        yield store


@pytest.fixture
def copy(place: str, db: PostgresDB) -> Iterator[PostgresDB]:
    """Another copy of the service."""
    with closing(PostgresDB(place)) as store:
        yield store


@pytest.fixture
def bob(db: PostgresDB) -> User:
    return db.add_user("bob@x.io", HASH)


@pytest.fixture
def beside(place: str) -> Iterator[Beside]:
    """Run a task on a thread beside, and go on when it waits for a lock."""
    with ThreadPoolExecutor() as pool, psycopg.connect(place, autocommit=True) as onlooker:

        def run(task: Callable[[], Any]) -> Future[Any]:
            begun = pool.submit(task)
            waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while not (begun.done() or onlooker.execute(waits).fetchone()):
                time.sleep(0.005)
            return begun

        yield run


# Whose turn it is


def test_a_login_that_meets_a_change_of_the_password_leaves_no_session(
    db: PostgresDB, copy: PostgresDB, bob: User, beside: Beside
) -> None:
    add_session(db, bob, "s")
    with db._transaction(user_id=1) as held:  # what change_password does, step by step
        held.execute(
            "UPDATE users SET hashed_password = :new WHERE id = 1 AND hashed_password = :old",
            {"new": NEW_HASH, "old": HASH},
        )
        started = beside(lambda: add_session(copy, bob, "late"))
        assert not started.done()
        held.execute("DELETE FROM sessions WHERE user_id = 1")
    assert started.result(5) is False
    assert find_session(db, "late") is None


START_EARLY = """
    INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
    SELECT 'early', id, 1800000000, 1800000000, 1900000000, '', '' FROM users WHERE hashed_password = :old
"""


def test_a_login_that_is_nearly_done_is_ended_by_a_change_of_the_password(
    db: PostgresDB, copy: PostgresDB, bob: User, beside: Beside
) -> None:
    add_session(db, bob, "s")
    with db._transaction(user_id=1) as held:  # what add_session does, step by step
        held.execute(START_EARLY, {"old": HASH})
        changed = beside(lambda: copy.change_password(1, HASH, NEW_HASH, "s", "renewed"))
        assert not changed.done()
    assert changed.result(5) is True
    assert [find_session(db, name) is not None for name in ("early", "s", "renewed")] == [False, False, True]


def test_a_login_that_is_nearly_done_is_ended_with_everybodys(
    db: PostgresDB, copy: PostgresDB, bob: User, beside: Beside
) -> None:
    with db._transaction(user_id=1) as held:  # what add_session does, step by step
        held.execute(START_EARLY, {"old": HASH})
        ended = beside(copy.end_all_sessions)
        assert not ended.done()
    assert ended.result(5) == 1
    assert find_session(db, "early") is None


def test_a_login_and_what_prunes_wait_for_each_other_in_no_circle(
    db: PostgresDB, copy: PostgresDB, bob: User, beside: Beside
) -> None:
    add_session(db, bob, "old")
    with db._transaction(user_id=1) as held:  # what add_session does, step by step
        pruned = beside(lambda: copy.prune(now=NOW + 2000, known_since=0, most=200))
        assert held.execute("DELETE FROM sessions WHERE session_hash = 'old'").rowcount == 1
    assert pruned.result(5) == 0


def test_sessions_that_end_at_once_leave_the_row_of_the_user_right(db: PostgresDB, copy: PostgresDB, bob: User) -> None:
    for _ in range(10):
        for number in range(6):
            add_session(db, bob, f"s{number}", most=6)
        assert all(at_once(6, lambda index: (db if index % 2 else copy).end_session(f"s{index}")))
        assert db.find_user_by(id=1).session_id is None


def test_logins_and_their_ends_at_once_meet_in_no_circle(db: PostgresDB, copy: PostgresDB, bob: User) -> None:
    eve = db.add_user("eve@x.io", HASH)

    def use(index: int) -> None:  # a browser in which now the one logs in, now the other
        store = (db, copy)[index % 2]
        for number in range(16):
            user = (bob, eve)[(index + number) % 2]
            assert add_session(store, user, f"{index} {number}", replaced=f"{index} {number - 1}", most=6)
            if number % 5 == 4:
                store.end_sessions(user.id, kept=f"{index} {number}")
                store.prune(now=NOW, known_since=0, most=200)

    at_once(8, use)
    newest = [user.session_id for user in db.each_user()]
    with closing(postgres.Ledger(db._place)) as ledger:
        newest_of = "SELECT session_hash FROM sessions WHERE user_id = users.id ORDER BY id DESC LIMIT 1"
        last = f"SELECT ({newest_of}) FROM users ORDER BY id"
        assert [name for (name,) in ledger.execute(last).fetchall()] == newest


def test_of_32_registrations_of_one_email_one_wins(db: PostgresDB, copy: PostgresDB) -> None:
    def add(index: int) -> bool:
        try:
            return bool((db if index % 2 else copy).add_user("Bob@x.io" if index % 3 else "bob@X.io", HASH))
        except AlreadyExists:
            return False

    assert sum(at_once(32, add)) == 1


def test_of_16_that_spend_one_token_one_does(db: PostgresDB, copy: PostgresDB, bob: User) -> None:
    give_token(db)
    hashes = [b"hash%d" % index for index in range(16)]
    spent = at_once(16, lambda index: spend(db if index % 2 else copy, new=hashes[index]))
    assert sum(spent) == 1
    assert db.find_user_by(id=1).hashed_password == hashes[spent.index(True)]


@pytest.mark.parametrize("code", ["step", "recovery code"])
def test_of_16_that_spend_one_code_one_does(db: PostgresDB, copy: PostgresDB, bob: User, code: str) -> None:
    add_session(db, bob, "s")
    assert second_factor(db, bob, "s", "t", "code")

    def use(index: int) -> bool:
        store = db if index % 2 else copy
        return store.spend_totp(1, 1001, 1011) if code == "step" else store.spend_recovery_code(1, "code")

    assert sum(at_once(16, use)) == 1


def test_of_50_that_take_at_once_as_many_as_there_are_get_one(db: PostgresDB, copy: PostgresDB) -> None:
    for number in range(5):
        buckets = [(f"wide{number}", 100, 60), (f"pair{number}", 10, 60)]
        waits = at_once(50, lambda index, buckets=buckets: (db if index % 2 else copy).take(buckets, NOW))  # type: ignore[misc]
        assert waits.count(0) == 10
        assert {wait for wait in waits if wait} <= {60, 1}
        with closing(postgres.Ledger(db._place)) as ledger:
            found = dict(ledger.execute("SELECT key, full_at FROM throttle").fetchall())
        assert found[f"wide{number}"] == NOW + 10 * 60  # who was refused by the one took nothing from the other


def test_a_bucket_that_is_emptied_meanwhile_lets_nothing_be_taken_from_the_others(
    place: str, db: PostgresDB, copy: PostgresDB, beside: Beside
) -> None:
    with db._transaction() as held:
        held.execute("INSERT INTO throttle VALUES ('pair', :full)", {"full": NOW + 60})  # of size 1: empty
        taking = beside(lambda: copy.take([("wide", 5, 60), ("pair", 1, 60)], NOW))
        assert not taking.done()
    assert taking.result(5) == 60
    with closing(postgres.Ledger(place)) as ledger:
        assert ledger.execute("SELECT key, full_at FROM throttle").fetchall() == [("pair", NOW + 60)]


def test_a_sweep_waits_for_nobody(place: str, db: PostgresDB, copy: PostgresDB) -> None:
    db.take([("old", 5, 60)], NOW)
    db.take([("older", 5, 60)], NOW)
    with db._transaction() as held:
        held.execute("UPDATE throttle SET full_at = full_at WHERE key = 'old'")
        assert copy.take([("new", 5, 60)], NOW + 1000) == 0
    with closing(postgres.Ledger(place)) as ledger:
        assert {key for (key,) in ledger.execute("SELECT key FROM throttle").fetchall()} == {"old", "new"}


def test_rows_are_taken_in_the_order_given(db: PostgresDB) -> None:
    values = {"keys": ["b", "a"], "intervals": [60, 60], "fulls": [NOW, NOW], "now": NOW, "tolerance": 300}
    plan = [line for (line,) in db._read_all(f"EXPLAIN {storage_postgres.TAKE}", values)]
    assert any(re.search(r"Sort Key: asked\w*\.place", line) for line in plan), plan  # which else is so only by chance


# Statements


def test_the_year_2038_is_a_year(db: PostgresDB) -> None:
    assert db._read("SELECT :now + :interval", {"now": 2**31 - 1, "interval": 1}) == (2**31,)


@pytest.mark.parametrize(
    ("statement", "converted"),
    [
        ("SELECT :a, :b_c", b"SELECT %(a)s, %(b_c)s"),
        ("SELECT :a::text[], 'it is :not'", b"SELECT %(a)s::text[], 'it is :not'"),
        ("SELECT 5 % 2, '%'", b"SELECT 5 %% 2, '%%'"),
    ],
)
def test_a_named_parameter_is_psycopgs(statement: str, converted: bytes) -> None:
    assert _converted(statement) == converted


@pytest.fixture
def planned(db: PostgresDB, bob: User, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """How each look-up is done where whole tables are never read if there is another way."""
    plans: dict[str, str] = {}
    execute = psycopg.Connection.execute
    names: list[str] = []

    def explained(self: Any, query: Any, params: Any = None, **options: Any) -> Any:
        text = query.decode() if isinstance(query, bytes) else str(query)
        if names and text.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH") and "VALUES" not in text:
            execute(self, "SET enable_seqscan = off")
            lines = execute(self, b"EXPLAIN " + text.encode(), params).fetchall()
            plans[f"{names[-1]}: {text}"] = "\n".join(line for (line,) in lines)
            execute(self, "RESET enable_seqscan")
        return execute(self, query, params, **options)

    monkeypatch.setattr(psycopg.Connection, "execute", explained)
    add_session(db, bob, "s")
    give_token(db)
    for name, look_up in LOOK_UPS.items():
        names.append(name)
        look_up(db)
    return plans


def test_every_look_up_has_an_index(planned: dict[str, str]) -> None:
    assert len(planned) > len(LOOK_UPS)
    for statement, plan in planned.items():
        assert "Index" in plan, (statement, plan)
        assert "Seq Scan" not in plan, (statement, plan)


def test_a_look_up_of_a_session_is_one_round_trip(db: PostgresDB, monkeypatch: pytest.MonkeyPatch) -> None:
    find_session(db, "s")
    trips: list[object] = []
    execute = psycopg.Cursor.execute

    def counted(*arguments: Any, **options: Any) -> Any:
        trips.append(threading.get_ident())  # the pool's threads look at what they make
        return execute(*arguments, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", counted)
    find_session(db, "s")
    with db._connection() as connection:
        assert connection.autocommit
    assert trips.count(threading.get_ident()) == 1


# How many connections


def test_on_a_machine_of_32_cores_threads_that_wait_for_a_lock_keep_nobody_from_reading(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(storage_postgres, "POOL_WAIT", 4.0)  # in which all are made on a machine that others use, too
    with closing(PostgresDB(place)) as db, psycopg.connect(place) as other, ThreadPoolExecutor(37) as pool:
        bob = db.add_user("bob@x.io", HASH)
        other.execute("LOCK TABLE users IN EXCLUSIVE MODE")
        waiting = [pool.submit(add_session, db, bob, f"s{number}", most=37) for number in range(37)]
        with psycopg.connect(place, autocommit=True) as onlooker:
            blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while onlooker.execute(blocked).fetchone() != (37,) and not any(one.done() for one in waiting):
                time.sleep(0.01)
        assert db.find_user_by(id=1) == bob
        assert not any(one.done() for one in waiting)
        other.commit()
        assert all(one.result() for one in waiting)


# Where it is not there


def test_a_connection_that_was_cut_costs_one_answer(place: str, db: PostgresDB, bob: User) -> None:
    at_once(6, lambda index: db.find_user_by(id=1))
    with psycopg.connect(place, autocommit=True) as operator:
        operator.execute(
            """
            SELECT pg_terminate_backend(pid) FROM pg_stat_activity
             WHERE pid <> pg_backend_pid() AND application_name = 'authsvc'
            """
        )
    failed = 0
    for _ in range(10):
        try:
            assert db.find_user_by(id=1) == bob
        except StorageUnavailable:
            failed += 1
    assert failed <= 1


def test_a_server_that_is_gone_is_unavailable_at_once_and_back_within_seconds() -> None:
    server = postgres.Server()
    try:
        with closing(PostgresDB(server.new_place())) as db:
            bob = db.add_user("bob@x.io", HASH)
            server.stop()
            for _ in range(3):
                with pytest.raises(StorageUnavailable):
                    db.find_user_by(id=1)
            began = time.monotonic()
            for _ in range(20):
                with pytest.raises(StorageUnavailable, match=r"\A[^\n]+\Z"):
                    db.find_user_by(id=1)
            assert time.monotonic() - began < 1  # nobody waits for what is known to be gone
            server.start()
            began = time.monotonic()
            while time.monotonic() - began < 5:
                with suppress(StorageUnavailable):
                    assert db.find_user_by(id=1) == bob
                    break
                time.sleep(0.01)
            else:
                pytest.fail("not back within 5 s")
            assert db.add_user("eve@x.io", HASH).id > 1
    finally:
        server.remove()


def test_an_import_that_is_cut_adds_nobody_and_can_be_repeated(db: PostgresDB, place: str) -> None:
    users = [(1, User(0, "eve@x.io", HASH))]
    assert db.stage_users(users) == []
    with psycopg.connect(place, autocommit=True) as operator:
        operator.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'authsvc'")
    for _ in range(2):
        with pytest.raises(StorageUnavailable):
            db.add_staged_users()
    assert list(db.each_user()) == []
    assert db.stage_users(users) == []
    assert db.add_staged_users() == 1


def test_a_statement_that_takes_too_long_is_unavailable(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_postgres, "PATIENCE", {"statement_timeout": 100, "lock_timeout": 50})
    monkeypatch.setattr(storage_postgres._conninfo, "__defaults__", (storage_postgres.PATIENCE,))
    with closing(PostgresDB(place)) as db:
        bob = db.add_user("bob@x.io", HASH)
        with pytest.raises(StorageUnavailable, match="statement timeout"):
            db._read("SELECT pg_sleep(:long)", {"long": 2})
        with db._transaction(user_id=1), pytest.raises(StorageUnavailable, match="lock timeout"):
            db.update_user(1, session_id="x")
        assert db.find_user_by(id=1) == bob


SLOW = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
    CREATE TRIGGER slow BEFORE INSERT ON users FOR EACH STATEMENT EXECUTE FUNCTION slow();
    CREATE TRIGGER slow BEFORE DELETE ON sessions FOR EACH STATEMENT EXECUTE FUNCTION slow();
"""


def test_what_the_operator_does_to_all_takes_its_time(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage_postgres.PATIENCE, "statement_timeout", 200)
    monkeypatch.setattr(storage_postgres, "WRITE_SILENCE", 0.2)
    monkeypatch.setattr(storage_postgres, "CANCEL_SILENCE", 0.1)
    with closing(PostgresDB(place)) as db, psycopg.connect(place, autocommit=True) as operator:
        bob = db.add_user("bob@x.io", HASH)
        add_session(db, bob, "s")
        operator.execute(SLOW)
        with pytest.raises(StorageUnavailable):
            db.end_sessions(1)
        assert db.end_all_sessions() == 1
        assert db.stage_users([(1, User(0, "eve@x.io", HASH))]) == []
        assert db.add_staged_users() == 1
        assert [user.email for user in db.each_user()] == ["bob@x.io", "eve@x.io"]


def test_a_replica_that_takes_no_writes_is_unavailable_for_them(place: str, db: PostgresDB, bob: User) -> None:
    separator = "%20-c%20" if "options=" in place else "?options=-c"
    with closing(PostgresDB(f"{place}{separator}default_transaction_read_only%3Don")) as replica:
        with pytest.raises(StorageUnavailable, match="read-only"):
            replica.update_user(1, session_id="x")
        with pytest.raises(StorageUnavailable, match="read-only"):
            add_session(replica, bob, "s")
        assert replica.find_user_by(id=1) == bob


# Whose tables


@pytest.mark.parametrize("table", ["users", "sessions", "throttle"])
def test_tables_of_another_program_are_refused_and_left_alone(place: str, table: str) -> None:
    with psycopg.connect(place, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {table} (id integer)".encode())
        with pytest.raises(DatabaseRefused, match="another program's"):
            open_store(place)
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        assert found.fetchall() == [(table,)]


def test_tables_of_a_newer_release_are_refused_and_left_alone(place: str, db: PostgresDB, bob: User) -> None:
    with psycopg.connect(place, autocommit=True) as connection:
        connection.execute("UPDATE authsvc_version SET version = 99")
        with pytest.raises(DatabaseRefused, match="newer release"):
            open_store(place)
        assert connection.execute("SELECT version FROM authsvc_version").fetchall() == [(99,)]


def test_of_four_copies_that_find_nothing_one_makes_the_tables(place: str) -> None:
    for db in at_once(4, lambda index: open_store(place)):
        db.close()
    with psycopg.connect(place, autocommit=True) as connection:
        assert connection.execute("SELECT version FROM authsvc_version").fetchall() == [(storage_postgres.VERSION,)]


def test_of_four_copies_that_find_an_older_release_one_lifts_it(
    place: str, db: PostgresDB, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_postgres, "MIGRATIONS", ("ALTER TABLE users ADD COLUMN colour text DEFAULT '100%'",))
    monkeypatch.setattr(storage_postgres, "VERSION", 2)
    for lifted in at_once(4, lambda index: open_store(place)):
        assert lifted.find_user_by(id=1) == bob
        lifted.close()
    with psycopg.connect(place, autocommit=True) as connection:
        assert connection.execute("SELECT version, colour FROM authsvc_version, users").fetchall() == [(2, "100%")]


def test_a_migration_that_fails_changes_nothing(
    place: str, db: PostgresDB, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_postgres, "MIGRATIONS", ("ALTER TABLE users ADD COLUMN colour text; NONSENSE",))
    monkeypatch.setattr(storage_postgres, "VERSION", 2)
    with pytest.raises(DatabaseRefused, match="syntax error"):
        open_store(place)
    monkeypatch.undo()
    with closing(open_store(place)) as store:
        assert store.find_user_by(id=1) == bob


REFUSED = {
    "nobody listens": "postgresql://bob:canary@127.0.0.1:1/ledger",
    "no such host": "postgresql://bob:canary@nowhere.invalid/ledger",
    "no such socket": "postgresql://bob:canary@%2Fnowhere/ledger",
    "an unknown option": "postgresql://bob:canary@127.0.0.1/ledger?canary=1",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_reached_is_named_without_its_password(reason: str) -> None:
    with pytest.raises(DatabaseRefused, match=r"\A[^\n]*ledger on [^\n]*\Z") as refusal:
        open_store(REFUSED[reason])
    assert "canary" not in str(refusal.value).replace('parameter: "canary"', "")


@pytest.fixture
def locked(postgresql: postgres.Server) -> Iterator[None]:
    """A role of this name must give its password."""
    rules = postgresql.folder / "data/pg_hba.conf"
    before = rules.read_text()

    def lay_down(text: str) -> None:
        rules.write_text(text)
        read = postgresql.execute("SELECT pg_conf_load_time() FROM pg_reload_conf()")
        while postgresql.execute("SELECT pg_conf_load_time()") == read:
            time.sleep(0.01)

    postgresql.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
    lay_down("host all locked all scram-sha-256\n" + before)
    yield
    lay_down(before)
    postgresql.execute("DROP ROLE locked")


NOT_LET_IN = {
    "a wrong password": ("locked", "postgres", 'password authentication failed for user "locked"'),
    "an unknown user": ("nobody", "postgres", 'role "nobody" does not exist'),
    "an unknown database": ("postgres", "nowhere", 'database "nowhere" does not exist'),
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", NOT_LET_IN)
def test_who_is_not_let_in_says_so_in_one_line(postgresql: postgres.Server, locked: None, reason: str) -> None:
    user, name, said = NOT_LET_IN[reason]
    url = f"postgresql://{user}:canary@127.0.0.1:{postgresql.port}/{name}"
    environ = clean_environ() | {"AUTHSVC_DATABASE": url, "AUTHSVC_LISTEN": "127.0.0.1:0"}
    for arguments, code in ((), 2), (("user", "list"), 1), (("copy-to", "new.db"), 1):
        command = [sys.executable, HERE / "authsvc.py", *arguments]
        done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=30)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done.stderr
        assert said in done.stderr
        assert "canary" not in done.stderr


ELSEWHERE = {
    "PGHOST": ("postgresql://postgres@/postgres", {"PGHOST": "127.0.0.1"}),
    "PGHOSTADDR": ("postgresql://postgres@%2Fnowhere/postgres", {"PGHOSTADDR": "127.0.0.1"}),
    "PGSERVICE": ("postgresql://postgres@/postgres", {"PGSERVICE": "elsewhere", "PGSERVICEFILE": "services"}),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_environment_names_no_other_host_than_the_url(
    postgresql: postgres.Server, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, environ = ELSEWHERE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "services").write_text("[elsewhere]\nhost=127.0.0.1\n")
    for variable, value in {**environ, "PGPORT": str(postgresql.port)}.items():
        monkeypatch.setenv(variable, value)
    psycopg.connect(url).close()
    with pytest.raises(DatabaseRefused, match="on socket"):
        open_store(url)


def test_a_service_by_another_name_is_seen(place: str) -> None:
    with closing(open_store(f"{place}&application_name=other&client_encoding=latin1")) as db:
        assert db._read("SHOW application_name", {}) == ("authsvc",)
        assert db._read("SHOW client_encoding", {}) == ("UTF8",)


def test_a_database_that_cannot_keep_all_letters_is_refused(postgresql: postgres.Server) -> None:
    postgresql.execute("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII'")
    with pytest.raises(DatabaseRefused, match="encoding is SQL_ASCII"):
        open_store(f"{postgresql.url.removesuffix('postgres')}ascii")


def test_a_schema_that_is_not_there_is_refused(postgresql: postgres.Server) -> None:
    with pytest.raises(DatabaseRefused, match="no schema"):
        open_store(f"{postgresql.url}?options=-csearch_path%3Dnowhere")


def test_the_engine_says_its_version(db: PostgresDB) -> None:
    assert db.engine.startswith("PostgreSQL 1")


# The whole program


def test_backups_are_left_to_postgresql(place: str, db: PostgresDB) -> None:
    for command, tool in ("backup", "pg_dump"), ("restore", "pg_restore"):
        done = subprocess.run(
            [sys.executable, HERE / "authsvc.py", command, "file"],
            env=clean_environ() | {"AUTHSVC_DATABASE": place},
            text=True,
            capture_output=True,
        )
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert tool in done.stderr
