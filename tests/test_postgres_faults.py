"""What goes wrong around a service whose rows are in PostgreSQL: restarted, cut off, locked, hung, failed over.

Each test ends in the same claims as those of test_faults.py. An answer comes within seconds all the while, on the one
thread that serves everybody within two. FAULT_ROUNDS makes them long, FAULT_SEED repeats a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import TypeVar

import psycopg
import pytest
import requests

import storage_postgres
from database import StorageUnavailable
from storage import NoResultFound, Store, open_store
from tests import postgres
from tests.conftest import Service
from tests.crowd import ROOMY, SEED, Crowd, ask, awaited, events, fields
from tests.postgres import Replica, Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,  # on servers of its own
    pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING),
]

QUICK = 4.0  # seconds in which the thread that serves everybody has answered: 2, on a machine that others use, too
SOON = 14.0  # seconds in which a write has: the 8 that it may take, or the 5 of two, one behind the other
BACK = 5.0  # seconds in which all goes on once the database is back

Kind = TypeVar("Kind", bound=Server)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A PostgreSQL that may be ended; it is there again after each test."""
    one = Server()
    yield one
    one.remove()


class Watch:
    """Asks for the welcome and for a profile all the time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        form = fields("watch")
        assert ask(service, "POST", "/users", form) == 200
        self._session = requests.post(f"{service.url}/sessions", data=form, timeout=5).cookies["session_id"]
        self._stopping = threading.Event()
        self._asked: list[tuple[str, float, float, int]] = []  # the path, when it was asked and answered, the status

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    def _watch(self) -> None:
        while not self._stopping.wait(0.02):
            for path in ("/", "/profile"):
                began = time.monotonic()
                status = ask(self._service, "GET", path, session=self._session, timeout=60)
                self._asked.append((path, began, time.monotonic(), status))

    def check(self) -> None:
        """Nobody had to wait, and the welcome was given all the while."""
        assert {status for path, _, _, status in self._asked if path == "/"} == {200}
        assert {status for path, _, _, status in self._asked if path == "/profile"} <= {200, 503}
        assert self.longest < QUICK, self.longest

    @property
    def longest(self) -> float:
        return max(answered - began for _, began, answered, _ in self._asked)

    @property
    def refused(self) -> list[float]:
        """When it was answered 503."""
        return [answered for _, _, answered, status in self._asked if status == 503]


class Fault:
    """A service in use, whose database is about to be lost."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.crowd = Crowd(doubtful=True)
        self.watch = Watch(service)
        self._back = 0.0

    def back(self) -> None:
        """The database is there again: so is the service, and stays."""
        self._back = time.monotonic()
        assert awaited(lambda: ask(self.service, "POST", "/sessions", fields("watch"), timeout=30) == 200, BACK)
        self.recovered = time.monotonic() - self._back
        refused, wanted = self.crowd.refused, self.crowd.answered + 40
        assert awaited(lambda: self.crowd.answered >= wanted, 20)
        print(f"back after {self.recovered:.2f} s; {self.crowd.refused - refused} refused afterwards")

    @contextmanager
    def under_load(self) -> Iterator[None]:
        with self.crowd.using(self.service.url), self.watch.watching():
            assert awaited(lambda: self.crowd.answered >= 40, 20)
            yield
        late = [when - self._back for when in self.watch.refused if when > self._back]
        print(f"longest answer {self.crowd.longest:.2f} s, on the quick lane {self.watch.longest:.2f} s")
        print(f"last 503 {max(late, default=0):.2f} s after the database was back")
        self.watch.check()
        assert max(late, default=0) < BACK
        assert self.crowd.longest < SOON, self.crowd.longest
        self.crowd.check(self.service.url)
        noted = events(self.service)
        assert not [event for event in noted if event["event"] == "sys_crash"], SEED
        assert all(event["reason"] for event in noted if event["event"] == "sys_storage_unavailable")


@pytest.fixture
def fault(server: Server, start: Callable[..., Service], request: pytest.FixtureRequest) -> Fault:
    return Fault(start(**ROOMY, AUTHSVC_DATABASE=server.new_place() + getattr(request, "param", "")))


def test_a_database_that_is_restarted_is_missed_and_found_again(server: Server, fault: Fault) -> None:
    with fault.under_load():
        server.stop()
        assert awaited(lambda: fault.crowd.refused >= 20, 20)
        assert awaited(lambda: fault.watch.refused)
        assert ask(fault.service, "POST", "/sessions", fields("watch")) == 503
        assert ask(fault.service, "GET", "/health") == 503
        assert ask(fault.service, "GET", "/") == 200
        server.start()
        fault.back()


def test_connections_that_are_cut_are_made_anew(server: Server, fault: Fault) -> None:
    with fault.under_load():
        for _ in range(5):
            wanted = fault.crowd.answered + 20
            server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'authsvc'")
            assert awaited(lambda: fault.crowd.answered >= wanted)  # noqa: B023
        fault.back()


@contextmanager
def holding(server: Server, place: str, *statements: str) -> Iterator[None]:
    """Another program, in the middle of a transaction."""
    with closing(psycopg.connect(place)) as connection:
        for statement in statements:
            connection.execute(statement.encode())
        yield


def test_who_is_locked_by_another_program_is_refused_and_nobody_else(server: Server, fault: Fault) -> None:
    place = fault.service.environ["AUTHSVC_DATABASE"]
    with fault.under_load():
        with holding(server, place, "SELECT FROM users WHERE email = 'watch@x.io' FOR UPDATE"):
            began = time.monotonic()
            assert ask(fault.service, "POST", "/sessions", fields("watch"), timeout=30) == 503
            print(f"locked: {time.monotonic() - began:.2f}")
            assert not fault.watch.refused
        assert not fault.crowd.refused
        fault.back()


@pytest.mark.parametrize("fault", ["%20-c%20lock_timeout%3D1000"], indirect=True)
def test_while_another_program_locks_the_tables_reads_go_on(server: Server, fault: Fault) -> None:
    place = fault.service.environ["AUTHSVC_DATABASE"]
    with fault.under_load():
        with holding(server, place, "LOCK TABLE users, sessions IN EXCLUSIVE MODE"):
            assert ask(fault.service, "POST", "/sessions", fields("watch"), timeout=30) == 503
            assert not fault.watch.refused
        fault.back()


def test_while_another_program_keeps_even_readers_out_the_rest_is_served(server: Server, fault: Fault) -> None:
    place = fault.service.environ["AUTHSVC_DATABASE"]
    with fault.under_load():
        with holding(server, place, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE"):
            assert awaited(lambda: len(fault.watch.refused) >= 20, 10)  # only the first one waited
            assert ask(fault.service, "POST", "/sessions", fields("watch"), timeout=30) == 503
        fault.back()


def test_a_database_that_hangs_takes_nobody_with_it(server: Server, fault: Fault) -> None:
    with fault.under_load():
        with server.frozen():
            assert awaited(lambda: len(fault.watch.refused) >= 20, 10)  # only the first one waited
            assert ask(fault.service, "POST", "/sessions", fields("watch"), timeout=30) == 503
            assert awaited(lambda: fault.crowd.refused >= 8, 20)
        fault.back()


# The vault alone, in less time


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("READ_SILENCE", "WRITE_SILENCE", "CANCEL_SILENCE"):
        monkeypatch.setattr(storage_postgres, name, 0.3)


@pytest.fixture
def db(server: Server, patience: None) -> Iterator[Store]:
    with closing(open_store(f"{server.new_place()}%20-c%20synchronous_commit%3Don")) as store:
        assert isinstance(found(store), NoResultFound)  # there is a connection
        yield store


@pytest.fixture
def missed_replica(server: Server) -> Iterator[None]:
    """A replica that every commit waits for, and that is not there; for 30 s, as a test may wait with it."""
    server.wait_for("nobody")
    relief = threading.Timer(30, server.wait_for, [""])
    relief.start()
    yield
    relief.cancel()
    server.wait_for("")


def test_a_silent_server_costs_one_read_the_time_and_the_next_ones_none(server: Server, db: Store) -> None:
    with server.frozen():
        with pytest.raises(StorageUnavailable, match="does not answer"):
            db.find_user_by(id=1)
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(StorageUnavailable):
                db.find_user_by(id=1)
        assert time.monotonic() - began < storage_postgres.POOL_WAIT  # 20 × 2 ms, on a machine that others use, too
    assert awaited(lambda: isinstance(found(db), NoResultFound))


def found(db: Store) -> object:
    try:
        return db.find_user_by(id=1)
    except (NoResultFound, StorageUnavailable) as error:
        return error


def test_a_write_to_a_silent_server_is_given_up(server: Server, db: Store) -> None:
    with server.frozen(), pytest.raises(StorageUnavailable, match="does not answer"):
        db.add_user("bob@x.io", b"hash")
    assert awaited(lambda: isinstance(found(db), NoResultFound))


WRITES: dict[str, Callable[[Store], object]] = {
    "a transaction": lambda db: db.add_user(f"{time.monotonic()}@x.io", b"hash"),
    "a statement": lambda db: db.take([("key", 10, 60)], 1_800_000_000),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_write_that_waits_for_a_replica_is_not_promised_and_waits_no_longer(
    server: Server, db: Store, missed_replica: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(storage_postgres, "WRITE_SILENCE", 3.0)
    for most in (60, 3):  # seconds: the second one knows
        began = time.monotonic()
        with pytest.raises(StorageUnavailable, match="too late"):
            WRITES[kind](db)
        assert time.monotonic() - began < most
    assert server.execute("SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == []
    assert not isinstance(found(db), StorageUnavailable)  # on the same connection
    server.wait_for("")
    assert db.add_user("eve@x.io", b"hash")


# A primary and its replica


@pytest.fixture
def pair() -> Iterator[tuple[Server, Replica]]:
    with ExitStack() as stack:
        primary = stack.enter_context(removing(Server(synchronous_commit="on")))
        yield primary, stack.enter_context(removing(Replica(primary, synchronous_commit="on")))


@contextmanager
def removing(server: Kind) -> Iterator[Kind]:
    try:
        yield server
    finally:
        server.remove()


def both(primary: Server, replica: Replica) -> str:
    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{replica.port}"
    return f"postgresql://{postgres.USER}@{hosts}/postgres?target_session_attrs=read-write"


def test_a_replica_takes_over_and_nothing_that_was_answered_is_lost(
    pair: tuple[Server, Replica], start: Callable[..., Service]
) -> None:
    primary, replica = pair
    primary.wait_for("*")
    fault = Fault(start(**ROOMY, AUTHSVC_DATABASE=both(*pair)))
    with fault.under_load():
        primary.kill()
        assert awaited(lambda: fault.crowd.refused >= 20, 20)
        assert awaited(lambda: fault.watch.refused)
        replica.promote()
        fault.back()


def test_without_its_replica_a_write_is_not_promised_and_reads_go_on(
    pair: tuple[Server, Replica], start: Callable[..., Service]
) -> None:
    primary, replica = pair
    primary.wait_for("*")
    fault = Fault(start(**ROOMY, AUTHSVC_DATABASE=both(*pair)))
    with fault.under_load():
        replica.stop()
        assert ask(fault.service, "POST", "/users", fields("eve"), timeout=60) == 503
        assert not fault.watch.refused
        # Nor does it wait on, for ever, where nobody asks any more; a server has a hundred places for those who do.
        old = "SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query_start < now() - interval '9 s'"
        assert not awaited(lambda: primary.execute(old), 4)
        replica.start()
        fault.back()


def test_what_a_replica_did_not_get_is_lost_where_nobody_waits_for_it(
    pair: tuple[Server, Replica], start: Callable[..., Service]
) -> None:
    primary, replica = pair
    service = start(**ROOMY, AUTHSVC_DATABASE=both(*pair))
    assert ask(service, "POST", "/users", fields("early")) == 200
    session = requests.post(f"{service.url}/sessions", data=fields("early"), timeout=5).cookies["session_id"]
    caught_up = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()"
    assert awaited(lambda: primary.execute(caught_up) == [(1,)])
    replica.stop()
    assert ask(service, "POST", "/users", fields("late")) == 200
    assert ask(service, "DELETE", "/sessions", session=session) == 302
    primary.kill()
    replica.start()
    replica.promote()
    assert awaited(lambda: ask(service, "GET", "/profile", session=session) == 200, BACK)
    assert service.command("sessions", "end", "--all") == "1 sessions ended\n"
    assert ask(service, "GET", "/profile", session=session) == 403
    assert ask(service, "POST", "/sessions", fields("early")) == 200
    assert ask(service, "POST", "/sessions", fields("late")) == 401
