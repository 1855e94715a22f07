"""The PostgreSQL engine: simultaneous transactions, round trips, faults of the server, and databases it refuses.

The tests of the storage that are marked ``both_engines`` run on PostgreSQL too.
"""

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

from engines import postgres as postgres_engine
from engines.errors import AlreadyExists, DatabaseRefused, StorageUnavailable
from engines.postgres import _converted
from engines.schema import LOCK_USER, POSTGRES_MIGRATIONS, POSTGRES_VERSION, TABLES
from settings import Settings
from storage import DB, User
from tables.rate_limits import CONSUME, Bucket
from tests import postgres
from tests.cases import each
from tests.conftest import HERE, clean_environ
from tests.stored_users import (
    HASH,
    LOOKUPS,
    NEW_HASH,
    NOW,
    add_session,
    enable_totp,
    find_session,
    prune,
    run_together,
    set_reset_token,
    spend_token,
)

BOB = {"user_id": 1, "session_hash": None}  # values of LOCK_USER
PAIR = Bucket("pair", 1, 60)

Beside = Callable[[Callable[[], Any]], "Future[Any]"]

pytestmark = pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)


@pytest.fixture
def database(postgresql: postgres.Server) -> str:
    return postgresql.new_database()


@pytest.fixture
def db(database: str) -> Iterator[DB]:
    with closing(DB(database)) as opened:
        yield opened


@pytest.fixture
def second(database: str, db: DB) -> Iterator[DB]:
    """The database of a second copy of the service."""
    with closing(DB(database)) as opened:
        yield opened


@pytest.fixture
def bob(db: DB) -> User:
    return db.add_user("bob@x.io", HASH)


@pytest.fixture
def beside(database: str) -> Iterator[Beside]:
    """Run a task on another thread, and return when it is done or waits for a lock."""
    with ThreadPoolExecutor() as pool, psycopg.connect(database, autocommit=True) as observer:

        def run(task: Callable[[], Any]) -> Future[Any]:
            begun = pool.submit(task)
            waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while not (begun.done() or observer.execute(waits).fetchone()):
                time.sleep(0.005)
            return begun

        yield run


@pytest.fixture
def cut(postgresql: postgres.Server) -> Callable[[], None]:
    """Cut the connections of the databases that are opened from now on. Name it before ``db``."""
    authsvc = "FROM pg_stat_activity WHERE application_name = 'authsvc'"
    older = [pid for (pid,) in postgresql.execute(f"SELECT pid {authsvc}")]  # those of other tests

    def cut() -> None:
        postgresql.execute(f"SELECT pg_terminate_backend(pid) {authsvc} AND pid <> ALL (ARRAY{older}::integer[])")

    return cut


# Simultaneous transactions


def test_a_login_during_a_password_change_leaves_no_session(db: DB, second: DB, bob: User, beside: Beside) -> None:
    add_session(db, bob, "s")
    with db._engine.transaction(lock=LOCK_USER, values=BOB) as held:  # the steps of change_password
        held.execute(
            "UPDATE users SET hashed_password = :new WHERE id = 1 AND hashed_password = :old",
            {"new": NEW_HASH, "old": HASH},
        )
        started = beside(lambda: add_session(second, bob, "late"))
        assert not started.done()
        held.execute("DELETE FROM sessions WHERE user_id = 1")
    assert started.result(5) is False
    assert find_session(db, "late") is None


START_EARLY = """
    INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
    SELECT 'early', id, 1800000000, 1800000000, 1900000000, '', '' FROM users WHERE hashed_password = :old
"""


def test_a_password_change_ends_a_session_that_is_just_starting(db: DB, second: DB, bob: User, beside: Beside) -> None:
    add_session(db, bob, "s")
    with db._engine.transaction(lock=LOCK_USER, values=BOB) as held:  # the steps of add_session
        held.execute(START_EARLY, {"old": HASH})
        changed = beside(lambda: second.change_password(1, HASH, NEW_HASH, "s", "renewed"))
        assert not changed.done()
    assert changed.result(5) is True
    assert [find_session(db, name) is not None for name in ("early", "s", "renewed")] == [False, False, True]


def test_ending_all_sessions_ends_one_that_is_just_starting(db: DB, second: DB, bob: User, beside: Beside) -> None:
    with db._engine.transaction(lock=LOCK_USER, values=BOB) as held:  # the steps of add_session
        held.execute(START_EARLY, {"old": HASH})
        ended = beside(second.end_all_sessions)
        assert not ended.done()
    assert ended.result(5)["sessions"] == 1
    assert find_session(db, "early") is None


def test_a_login_and_pruning_do_not_deadlock(db: DB, second: DB, bob: User, beside: Beside) -> None:
    add_session(db, bob, "old")
    with db._engine.transaction(lock=LOCK_USER, values=BOB) as held:  # the steps of add_session
        pruned = beside(lambda: prune(second, NOW + 2000))
        assert held.execute("DELETE FROM sessions WHERE session_hash = 'old'").rowcount == 1
    assert pruned.result(5) == 0


def test_a_change_to_the_email_of_a_user_waits_for_changes_of_that_user(
    db: DB, second: DB, bob: User, beside: Beside
) -> None:
    # Else users who swap emails could each hold their own row and wait for that of the other.
    eve = db.add_user("eve@x.io", HASH)
    with db._engine.transaction(lock=LOCK_USER, values={"user_id": eve.id, "session_hash": None}):
        changed = beside(lambda: second.change_email(bob.id, "Eve@x.io", NOW, NOW))
        assert not changed.done()
    with pytest.raises(AlreadyExists):
        changed.result(5)


def test_sessions_that_end_at_the_same_time_update_the_user_correctly(db: DB, second: DB, bob: User) -> None:
    for _ in range(10):
        for number in range(6):
            add_session(db, bob, f"s{number}", limit=6)
        assert all(run_together(6, lambda index: (db if index % 2 else second).end_session(f"s{index}")))
        assert db.find_user_by(id=1).session_id is None


def test_simultaneous_logins_and_logouts_do_not_deadlock(database: str, db: DB, second: DB, bob: User) -> None:
    eve = db.add_user("eve@x.io", HASH)

    def use(index: int) -> None:  # one browser, in which the users take turns to sign in
        storage = (db, second)[index % 2]
        for number in range(16):
            user = (bob, eve)[(index + number) % 2]
            assert add_session(storage, user, f"{index} {number}", replaced=f"{index} {number - 1}", limit=6)
            if number % 5 == 4:
                storage.end_sessions(user.id, kept=f"{index} {number}")
                prune(storage)

    run_together(8, use)
    newest = [user.session_id for user in db.each_user()]
    with closing(postgres.RawConnection(database)) as connection:
        newest_of = "SELECT session_hash FROM sessions WHERE user_id = users.id ORDER BY id DESC LIMIT 1"
        last = f"SELECT ({newest_of}) FROM users ORDER BY id"
        assert [name for (name,) in connection.execute(last).fetchall()] == newest


def test_one_of_32_registrations_of_an_email_succeeds(db: DB, second: DB) -> None:
    def add(index: int) -> bool:
        try:
            return bool((db if index % 2 else second).add_user("Bob@x.io" if index % 3 else "bob@X.io", HASH))
        except AlreadyExists:
            return False

    assert sum(run_together(32, add)) == 1


def test_one_of_16_clients_spends_a_token(db: DB, second: DB, bob: User) -> None:
    set_reset_token(db, 1)
    hashes = [b"hash%d" % index for index in range(16)]
    spent = run_together(16, lambda index: spend_token(db if index % 2 else second, new=hashes[index]))
    assert sum(spent) == 1
    assert db.find_user_by(id=1).hashed_password == hashes[spent.index(True)]


@pytest.mark.parametrize("code", ["step", "recovery code"])
def test_one_of_16_clients_spends_a_code(db: DB, second: DB, bob: User, code: str) -> None:
    add_session(db, bob, "s")
    assert enable_totp(db, bob, "s", "t", "code")

    def use(index: int) -> bool:
        storage = db if index % 2 else second
        return storage.spend_totp(1, 1001, 1011) if code == "step" else storage.spend_recovery_code(1, "code")

    assert sum(run_together(16, use)) == 1


def test_50_simultaneous_attempts_use_up_exactly_the_bucket(database: str, db: DB, second: DB) -> None:
    for number in range(5):
        buckets = [Bucket(f"wide{number}", 100, 60), Bucket(f"pair{number}", 10, 60)]

        def consume(index: int, buckets: list[Bucket] = buckets) -> int:
            return (db if index % 2 else second).rate_limits.consume(buckets, NOW)

        waits = run_together(50, consume)
        assert waits.count(0) == 10
        assert {wait for wait in waits if wait} <= {60, 1}
        with closing(postgres.RawConnection(database)) as connection:
            found = dict(connection.execute("SELECT key, full_at FROM throttle").fetchall())
        assert found[f"wide{number}"] == NOW + 10 * 60  # a refusal by one bucket consumes nothing from the other


def test_a_bucket_emptied_meanwhile_protects_the_other_buckets(
    database: str, db: DB, second: DB, beside: Beside
) -> None:
    with db._engine.transaction() as held:
        held.execute("INSERT INTO throttle VALUES ('pair', :full)", {"full": NOW + 60})  # of size 1: empty
        taking = beside(lambda: second.rate_limits.consume([Bucket("wide", 5, 60), PAIR], NOW))
        assert not taking.done()
    assert taking.result(5) == 60
    with closing(postgres.RawConnection(database)) as connection:
        assert connection.execute("SELECT key, full_at FROM throttle").fetchall() == [("pair", NOW + 60)]


def test_deleting_full_buckets_waits_for_no_lock(database: str, db: DB, second: DB) -> None:
    db.rate_limits.consume([Bucket("old", 5, 60)], NOW)
    db.rate_limits.consume([Bucket("older", 5, 60)], NOW)
    with db._engine.transaction() as held:
        held.execute("UPDATE throttle SET full_at = full_at WHERE key = 'old'")
        assert second.rate_limits.consume([Bucket("new", 5, 60)], NOW + 1000) == 0
    with closing(postgres.RawConnection(database)) as connection:
        assert {key for (key,) in connection.execute("SELECT key FROM throttle").fetchall()} == {"old", "new"}


def test_pruning_full_buckets_waits_for_no_lock(database: str, db: DB, second: DB) -> None:
    for key in "used", "full":
        db.rate_limits.consume([Bucket(key, 5, 60)], NOW)
    with db._engine.transaction() as held:
        held.execute("UPDATE throttle SET full_at = full_at WHERE key = 'used'")
        assert second.rate_limits.prune(now=NOW + 1000, limit=10) == 1
    with closing(postgres.RawConnection(database)) as connection:
        assert connection.execute("SELECT key FROM throttle").fetchall() == [("used",)]


def test_buckets_are_locked_in_the_order_given(db: DB) -> None:
    db.rate_limits.consume([Bucket("a", 5, 60), Bucket("b", 5, 60)], NOW)
    db._engine.write("ANALYZE throttle", {})  # a small table, of which PostgreSQL reads all rows
    values: dict[str, Any] = {
        "keys": ["b", "a"],
        "intervals": [60, 60],
        "fulls": [NOW + 300, NOW + 300],
        "refuses": [True, True],
        "now": NOW,
    }
    plan = [line for (line,) in db._engine.read_all(f"EXPLAIN {CONSUME}", values)]
    # Without this the order is left to chance.
    assert any(re.search(r"Sort Key: asked\w*\.place", line) for line in plan), plan


def test_emptying_buckets_and_consuming_from_them_do_not_deadlock(db: DB, second: DB, beside: Beside) -> None:
    a, b = (Bucket(key, 5, 60, emptied=True) for key in "ab")
    for bucket in a, b, PAIR, *(Bucket(f"{number}", 5, 60) for number in range(20)):
        db.rate_limits.consume([bucket], NOW)
    db._engine.write("ANALYZE throttle", {})  # of a small table PostgreSQL reads all rows in order, "a" before "b"
    with db._engine.transaction() as held:  # the steps of an attempt that consumes from "b" and then from "a"
        held.execute("UPDATE throttle SET full_at = full_at + 60 WHERE key = 'b'")
        emptying = beside(lambda: second.rate_limits.consume([b, a, PAIR], NOW))
        assert not emptying.done()
        held.execute("UPDATE throttle SET full_at = full_at + 60 WHERE key = 'a'")
    assert emptying.result(5) == 60
    assert db._engine.read_all("SELECT full_at FROM throttle WHERE key IN ('a', 'b')", {}) == [(NOW + 300,)] * 2


def test_a_bucket_that_another_copy_empties_later_stays_as_empty(
    db: DB, second: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the other copy is ahead, and it writes between the two statements of this one."""
    buckets = [Bucket("emptied", 5, 60, emptied=True), PAIR]
    assert db.rate_limits.consume(buckets, NOW) == 0
    read_all = db._engine.read_all

    def read_before_the_other_writes(statement: str, values: dict[str, Any]) -> Any:
        found = read_all(statement, values)
        assert second.rate_limits.consume(buckets, NOW + 20) == 60
        return found

    monkeypatch.setattr(db._engine, "read_all", read_before_the_other_writes)
    assert db.rate_limits.consume(buckets, NOW) == 60
    assert second._engine.read("SELECT full_at FROM throttle WHERE key = 'emptied'", {}) == (NOW + 20 + 300,)


# Statements


def test_times_after_2038_do_not_overflow(db: DB) -> None:
    assert db._engine.read("SELECT :now + :interval", {"now": 2**31 - 1, "interval": 1}) == (2**31,)


@pytest.mark.parametrize(
    ("statement", "converted"),
    [
        ("SELECT :a, :b_c", b"SELECT %(a)s, %(b_c)s"),
        ("SELECT :a::text[], 'it is :not'", b"SELECT %(a)s::text[], 'it is :not'"),
        ("SELECT 5 % 2, '%'", b"SELECT 5 %% 2, '%%'"),
    ],
)
def test_named_parameters_are_converted_for_psycopg(statement: str, converted: bytes) -> None:
    assert _converted(statement) == converted


@pytest.fixture
def planned(db: DB, bob: User, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The plan of each lookup, made with sequential scans disabled wherever an index can be used."""
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
    set_reset_token(db, 1)
    for name, lookup in LOOKUPS.items():
        names.append(name)
        lookup(db)
    return plans


def test_every_lookup_uses_an_index(planned: dict[str, str]) -> None:
    assert len(planned) > len(LOOKUPS)
    for statement, plan in planned.items():
        assert "Index" in plan, (statement, plan)
        assert "Seq Scan" not in plan, (statement, plan)


@pytest.fixture
def round_trips(db: DB, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads that waited for the server, one entry for each round trip from now on."""
    find_session(db, "s")  # opens the first connection
    waited: list[int] = []
    wait = postgres_engine._Connection.wait

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        waited.append(threading.get_ident())
        return wait(self, *arguments, **options)

    monkeypatch.setattr(postgres_engine._Connection, "wait", counted)
    return waited


def count_own(round_trips: list[int]) -> int:
    return round_trips.count(threading.get_ident())  # the threads of the pool open connections meanwhile


def test_a_lookup_of_a_session_is_one_round_trip(db: DB, round_trips: list[int]) -> None:
    find_session(db, "s")
    assert count_own(round_trips) == 1


def test_a_lookup_of_an_access_token_is_one_round_trip(db: DB, round_trips: list[int]) -> None:
    assert db.find_token("unknown", now=1, latest=1) is None
    assert count_own(round_trips) == 1


def test_consuming_from_all_buckets_is_one_round_trip(db: DB, round_trips: list[int]) -> None:
    buckets = [Bucket("pair", 2, 60, emptied=True), Bucket("address", 30, 30), Bucket("strangers", 20, 900)]
    for _ in range(2):
        round_trips.clear()
        assert db.rate_limits.consume(buckets, NOW) == 0
        assert count_own(round_trips) == 1


def test_a_refusal_by_a_bucket_is_two_round_trips(db: DB, round_trips: list[int]) -> None:
    assert db.rate_limits.consume([PAIR], NOW) == 0
    round_trips.clear()
    assert db.rate_limits.consume([PAIR, Bucket("address", 30, 30)], NOW) == 60
    assert count_own(round_trips) == 2  # the refused statement, and one that finds the time to wait


def test_only_the_first_refusal_takes_a_third_round_trip_to_empty_a_bucket(db: DB, round_trips: list[int]) -> None:
    buckets = [Bucket("address", 5, 60, emptied=True), PAIR]
    assert db.rate_limits.consume(buckets, NOW) == 0
    counts = []
    for _ in range(3):
        round_trips.clear()
        assert db.rate_limits.consume(buckets, NOW) == 60
        counts.append(count_own(round_trips))
    assert counts == [3, 2, 2]


def test_a_look_at_a_bucket_is_one_round_trip(db: DB, round_trips: list[int]) -> None:
    assert not db.rate_limits.is_empty(PAIR, NOW)
    assert count_own(round_trips) == 1


def test_a_transaction_takes_more_than_one_round_trip(db: DB, bob: User, round_trips: list[int]) -> None:
    assert add_session(db, bob, "s")
    assert count_own(round_trips) > 3  # the counter sees BEGIN and COMMIT, too


# Connections


def test_37_threads_that_wait_for_a_lock_leave_a_connection_to_read(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(postgres_engine, "POOL_TIMEOUT", 4.0)  # enough to open all connections on a busy machine
    with closing(DB(database)) as db, psycopg.connect(database) as other, ThreadPoolExecutor(37) as pool:
        bob = db.add_user("bob@x.io", HASH)
        other.execute("LOCK TABLE users IN EXCLUSIVE MODE")
        waiting = [pool.submit(add_session, db, bob, f"s{number}", limit=37) for number in range(37)]
        with psycopg.connect(database, autocommit=True) as observer:
            blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while observer.execute(blocked).fetchone() != (37,) and not any(one.done() for one in waiting):
                time.sleep(0.01)
        assert db.find_user_by(id=1) == bob
        assert not any(one.done() for one in waiting)
        other.commit()
        assert all(one.result() for one in waiting)


# Faults of the server


def test_cut_connections_cost_at_most_one_failed_read(cut: Callable[[], None], db: DB, bob: User) -> None:
    run_together(6, lambda index: db.find_user_by(id=1))
    cut()
    failed = 0
    for _ in range(10):
        try:
            assert db.find_user_by(id=1) == bob
        except StorageUnavailable:
            failed += 1
    assert failed <= 1


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.postgres
@pytest.mark.timing
def test_a_stopped_server_fails_fast_and_recovers_within_seconds() -> None:
    server = postgres.Server()
    try:
        with closing(DB(server.new_database())) as db:
            bob = db.add_user("bob@x.io", HASH)
            server.stop()
            for _ in range(3):
                with pytest.raises(StorageUnavailable):
                    db.find_user_by(id=1)
            began = time.monotonic()
            for _ in range(20):
                with pytest.raises(StorageUnavailable, match=r"\A[^\n]+\Z"):
                    db.find_user_by(id=1)
            assert time.monotonic() - began < 1  # no request waits for a server that is known to be down
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


def test_an_interrupted_import_adds_nobody_and_can_be_repeated(cut: Callable[[], None], db: DB) -> None:
    users = [User(0, f"user{number}@x.io", HASH) for number in range(3)]

    def users_until_the_cut() -> Iterator[User]:
        yield from users[:2]
        cut()
        yield users[2]

    with pytest.raises(StorageUnavailable):
        db.import_users(users_until_the_cut())
    assert list(db.each_user()) == []
    db.import_users(users)
    assert len(list(db.each_user())) == 3


def test_other_users_can_register_during_an_import(db: DB, second: DB) -> None:
    def users() -> Iterator[User]:
        yield User(0, "bob@x.io", HASH)
        second.add_user("eve@x.io", HASH)
        yield User(0, "carol@x.io", HASH)

    db.import_users(users())
    assert {user.email for user in db.each_user()} == {"bob@x.io", "eve@x.io", "carol@x.io"}


def test_a_slow_statement_is_cancelled_and_unavailable(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(postgres_engine.SERVER_TIMEOUTS, "statement_timeout", 100)
    monkeypatch.setitem(postgres_engine.SERVER_TIMEOUTS, "lock_timeout", 50)
    with closing(DB(database)) as db:
        bob = db.add_user("bob@x.io", HASH)
        with pytest.raises(StorageUnavailable, match="statement timeout"):
            db._engine.read("SELECT pg_sleep(:long)", {"long": 2})
        with (
            db._engine.transaction(lock=LOCK_USER, values=BOB),
            pytest.raises(StorageUnavailable, match="lock timeout"),
        ):
            db.update_user(1, session_id="x")
        assert db.find_user_by(id=1) == bob


SLOW = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
    CREATE TRIGGER slow BEFORE INSERT ON users FOR EACH STATEMENT EXECUTE FUNCTION slow();
    CREATE TRIGGER slow BEFORE DELETE ON sessions FOR EACH STATEMENT EXECUTE FUNCTION slow();
"""


@pytest.mark.slow
def test_long_commands_of_the_operator_have_no_timeout(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(postgres_engine.SERVER_TIMEOUTS, "statement_timeout", 200)
    monkeypatch.setattr(postgres_engine, "WRITE_TIMEOUT", 0.2)
    monkeypatch.setattr(postgres_engine, "CANCEL_TIMEOUT", 0.1)
    with closing(DB(database)) as db, psycopg.connect(database, autocommit=True) as operator:
        bob = db.add_user("bob@x.io", HASH)
        add_session(db, bob, "s")
        operator.execute(SLOW)
        with pytest.raises(StorageUnavailable):
            db.end_sessions(1)
        assert db.end_all_sessions()["sessions"] == 1
        db.import_users([User(0, "eve@x.io", HASH)])
        assert [user.email for user in db.each_user()] == ["bob@x.io", "eve@x.io"]


def test_a_read_only_replica_serves_reads_and_refuses_writes(database: str, db: DB, bob: User) -> None:
    separator = "%20-c%20" if "options=" in database else "?options=-c"
    with closing(DB(f"{database}{separator}default_transaction_read_only%3Don")) as replica:
        with pytest.raises(StorageUnavailable, match="read-only"):
            replica.update_user(1, session_id="x")
        with pytest.raises(StorageUnavailable, match="read-only"):
            add_session(replica, bob, "s")
        assert replica.find_user_by(id=1) == bob


# Databases that are refused


@pytest.mark.parametrize("table", ["users", "sessions", "throttle"])
def test_tables_of_another_program_are_refused_and_left_unchanged(database: str, table: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {table} (id integer)".encode())
        with pytest.raises(DatabaseRefused, match="belong to another program"):
            DB(database)
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        assert found.fetchall() == [(table,)]


def test_tables_of_a_newer_release_are_refused_and_left_unchanged(database: str, db: DB, bob: User) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE authsvc_version SET version = 99")
        with pytest.raises(DatabaseRefused, match="newer release"):
            DB(database)
        assert connection.execute("SELECT version FROM authsvc_version").fetchall() == [(99,)]


def test_one_of_four_starting_copies_makes_the_tables(database: str) -> None:
    for db in run_together(4, lambda index: DB(database)):
        db.close()
    with psycopg.connect(database, autocommit=True) as connection:
        assert connection.execute("SELECT version FROM authsvc_version").fetchall() == [(POSTGRES_VERSION,)]


def add_migration(monkeypatch: pytest.MonkeyPatch, *steps: str) -> None:
    """Let this release migrate to newer versions of the schema."""
    monkeypatch.setattr(postgres_engine, "POSTGRES_MIGRATIONS", (*POSTGRES_MIGRATIONS, *steps))
    monkeypatch.setattr(postgres_engine, "POSTGRES_VERSION", POSTGRES_VERSION + len(steps))


def test_one_of_four_starting_copies_migrates_the_tables(
    database: str, db: DB, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_migration(monkeypatch, "ALTER TABLE users ADD COLUMN colour text DEFAULT '100%'")
    for migrated in run_together(4, lambda index: DB(database)):
        assert migrated.find_user_by(id=1) == bob
        migrated.close()
    with psycopg.connect(database, autocommit=True) as connection:
        found = connection.execute("SELECT version, colour FROM authsvc_version, users").fetchall()
    assert found == [(POSTGRES_VERSION + 1, "100%")]


def test_copies_that_wait_for_a_migration_do_not_repeat_it(
    database: str, db: DB, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_migration(monkeypatch, "ALTER TABLE users ADD COLUMN colour text DEFAULT '100%'")
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = %s AND NOT granted"
    number, _ = postgres_engine.MIGRATION_LOCK
    with ThreadPoolExecutor(2) as pool, psycopg.connect(database, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s::integer, %s::integer)", postgres_engine.MIGRATION_LOCK)
        starting = [pool.submit(DB, database) for _ in range(2)]
        while other.execute(waiting, [number]).fetchone() != (2,) and not any(one.done() for one in starting):
            time.sleep(0.005)  # both have read the old version by then
        other.execute("SELECT pg_advisory_unlock_all()")
        for one in starting:
            with closing(one.result(5)) as migrated:
                assert migrated.find_user_by(id=1) == bob
        assert other.execute("SELECT version FROM authsvc_version").fetchall() == [(POSTGRES_VERSION + 1,)]


def test_a_migration_that_fails_changes_nothing(
    database: str, db: DB, bob: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_migration(monkeypatch, "ALTER TABLE users ADD COLUMN colour text; DELETE FROM users", "NONSENSE")
    with pytest.raises(DatabaseRefused, match="syntax error"):
        DB(database)
    monkeypatch.undo()
    with closing(DB(database)) as reopened:
        assert reopened.find_user_by(id=1) == bob
    with psycopg.connect(database) as connection:
        assert [column.name for column in connection.execute("SELECT * FROM users").description or ()] == [
            *TABLES["users"]
        ]


UNREACHABLE = {
    "nobody listens": ("postgresql://bob:canary@127.0.0.1:1/accounts", "accounts on 127.0.0.1:1"),
    "no such host": ("postgresql://bob:canary@nowhere.invalid/accounts", "accounts on nowhere.invalid"),
    "no such socket": ("postgresql://bob:canary@%2Fnowhere/accounts", "accounts on /nowhere"),
    "an unknown option": ("postgresql://bob:canary@127.0.0.1/accounts?colour=1", "PostgreSQL"),
}


@each("reason", UNREACHABLE)
def test_an_unreachable_database_is_named_without_its_password(reason: str) -> None:
    url, name = UNREACHABLE[reason]
    with pytest.raises(DatabaseRefused, match=rf"\Acannot open the database {re.escape(name)}: [^\n]+\Z") as refusal:
        DB(url)
    assert "canary" not in str(refusal.value)


@pytest.fixture
def locked(postgresql: postgres.Server) -> Iterator[None]:
    """Make a role of this name, which must give its password."""
    rules = postgresql.folder / "data/pg_hba.conf"
    before = rules.read_text()

    def set_rules(text: str) -> None:
        rules.write_text(text)
        read = postgresql.execute("SELECT pg_conf_load_time() FROM pg_reload_conf()")
        while postgresql.execute("SELECT pg_conf_load_time()") == read:
            time.sleep(0.01)

    postgresql.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
    set_rules("host all locked all scram-sha-256\n" + before)
    yield
    set_rules(before)
    postgresql.execute("DROP ROLE locked")


LOGIN_REFUSED = {
    "a wrong password": ("locked", "postgres", 'password authentication failed for user "locked"'),
    "an unknown user": ("nobody", "postgres", 'role "nobody" does not exist'),
    "an unknown database": ("postgres", "nowhere", 'database "nowhere" does not exist'),
}


@pytest.mark.parametrize("reason", LOGIN_REFUSED)
def test_a_refused_login_to_the_server_says_why(postgresql: postgres.Server, locked: None, reason: str) -> None:
    user, name, message = LOGIN_REFUSED[reason]
    with pytest.raises(DatabaseRefused, match=rf"\A[^\n]*{message}[^\n]*\Z") as refusal:
        DB(f"postgresql://{user}:canary@127.0.0.1:{postgresql.port}/{name}")
    assert "canary" not in str(refusal.value)


def test_the_password_of_the_database_may_be_in_a_file(
    postgresql: postgres.Server, locked: None, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("right\n")
    url = f"postgresql://locked@127.0.0.1:{postgresql.port}/postgres"
    postgresql.execute("CREATE SCHEMA AUTHORIZATION locked")
    try:
        with closing(DB(Settings(database=url, database_password_file=str(tmp_path / "password")).database)) as db:
            assert db.add_user("bob@x.io", HASH).id == 1
        with pytest.raises(DatabaseRefused, match="no password supplied"):
            DB(url)
    finally:
        postgresql.execute("DROP SCHEMA locked CASCADE")


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("user", "list"), 1), (("copy-to", "new.db"), 1)])
def test_a_refused_login_to_the_server_is_reported_in_one_line(
    postgresql: postgres.Server, locked: None, arguments: tuple[str, ...], code: int
) -> None:
    url = f"postgresql://locked:canary@127.0.0.1:{postgresql.port}/postgres"
    environ = clean_environ() | {"AUTHSVC_DATABASE": url, "AUTHSVC_LISTEN": "127.0.0.1:0"}
    command = [sys.executable, str(HERE / "authsvc.py"), *arguments]
    done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done.stderr
    assert 'password authentication failed for user "locked"' in done.stderr
    assert "canary" not in done.stderr


ELSEWHERE = {
    "PGHOST": ("postgresql://postgres@/postgres", {"PGHOST": "127.0.0.1"}),
    "PGHOSTADDR": ("postgresql://postgres@%2Fnowhere/postgres", {"PGHOSTADDR": "127.0.0.1"}),
    "PGSERVICE": ("postgresql://postgres@/postgres", {"PGSERVICE": "elsewhere", "PGSERVICEFILE": "services"}),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_environment_variables_do_not_change_the_host(
    postgresql: postgres.Server, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, environ = ELSEWHERE[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "services").write_text("[elsewhere]\nhost=127.0.0.1\n")
    for variable, value in {**environ, "PGPORT": str(postgresql.port)}.items():
        monkeypatch.setenv(variable, value)
    psycopg.connect(url).close()
    with pytest.raises(DatabaseRefused, match="on socket"):
        DB(url)


def test_the_url_cannot_change_the_application_name(database: str) -> None:
    with closing(DB(f"{database}&application_name=other&client_encoding=latin1")) as db:
        assert db._engine.read("SHOW application_name", {}) == ("authsvc",)
        assert db._engine.read("SHOW client_encoding", {}) == ("UTF8",)


def test_a_database_without_utf8_is_refused(postgresql: postgres.Server) -> None:
    postgresql.execute("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII'")
    with pytest.raises(DatabaseRefused, match="encoding is SQL_ASCII"):
        DB(f"{postgresql.url.removesuffix('postgres')}ascii")


def test_a_missing_schema_is_refused(postgresql: postgres.Server) -> None:
    with pytest.raises(DatabaseRefused, match="no schema"):
        DB(f"{postgresql.url}?options=-csearch_path%3Dnowhere")


def test_the_engine_reports_its_version(db: DB) -> None:
    assert db.engine_version.startswith("PostgreSQL 1")


@pytest.mark.slow
@pytest.mark.parametrize(("command", "tool"), [("backup", "pg_dump"), ("restore", "pg_restore")])
def test_backup_and_restore_refer_to_the_tools_of_postgresql(database: str, db: DB, command: str, tool: str) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "authsvc.py", command, "file"],
        env=clean_environ() | {"AUTHSVC_DATABASE": database},
        text=True,
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert tool in done.stderr
