"""Faults of PostgreSQL while the service runs: restarts, cut connections, locks, a frozen server, fail-over.

Every test ends in the same claims as those of test_faults.py. Besides, each answer comes within seconds, and GET / is
always answered. FAULT_ROUNDS lets the service wait as long as in production. FAULT_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest

from engines.errors import StorageUnavailable
from storage import DB, NoResultFound
from tables.rate_limits import Bucket
from tests import postgres
from tests.conftest import Service
from tests.crowd import SEED, UNLIMITED, Crowd, account_form, ask, awaited, events, program_with, signed_in
from tests.postgres import Replica, Server

pytestmark = [
    pytest.mark.faults,
    pytest.mark.postgres,  # on servers of its own, without the fixture that sets this mark
    pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING),
]

READ_LIMIT = 4.0  # seconds until the I/O thread has answered: READ_TIMEOUT, 2 s, on a busy machine
WRITE_LIMIT = 14.0  # seconds until a write is answered: two that wait one after the other, for WRITE_TIMEOUT each
RECOVERY_LIMIT = 5.0  # seconds until the service works again once the database is back

AS_IN_PRODUCTION = "FAULT_ROUNDS" in os.environ
WRITE_TIMEOUT = 6.0 if AS_IN_PRODUCTION else 2.0  # seconds that the service waits for a write
LOCK_TIMEOUT = "" if AS_IN_PRODUCTION else "%20-c%20lock_timeout%3D1000"  # appended to a URL, in milliseconds

AnyServer = TypeVar("AnyServer", bound=Server)


class ImpatientService(Service):
    """A service that waits for a write for WRITE_TIMEOUT."""

    program = program_with("engines.postgres", WRITE_TIMEOUT=WRITE_TIMEOUT)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service with these settings; it is ended after the test."""
    with ExitStack() as stack:

        def start_one(**environ: str) -> Service:
            service = ImpatientService(tmp_path, **environ)
            stack.callback(service.end)
            return service

        yield start_one


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    with removed_at_end(Server()) as one:
        yield one


@contextmanager
def removed_at_end(server: AnyServer) -> Iterator[AnyServer]:
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """A PostgreSQL server that a test may stop."""
    yield shared_server
    if not shared_server.running:
        shared_server.start()


class Watcher:
    """Requests ``/`` and ``/profile`` all the time."""

    def __init__(self, service: Service) -> None:
        self._service = service
        assert ask(service, "POST", "/users", account_form("watcher")) in (200, 400)  # a shared service has it already
        self._session = signed_in(service, account_form("watcher"))
        self._stopping = threading.Event()
        self._answers: list[tuple[str, float, float, int]] = []  # path, time of the request and of the answer, status

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
                self._answers.append((path, began, time.monotonic(), status))

    def check(self) -> None:
        """Check that ``/`` was always answered with 200, and that no answer took long."""
        assert {status for path, _, _, status in self._answers if path == "/"} == {200}
        assert {status for path, _, _, status in self._answers if path == "/profile"} <= {200, 503}
        longest = max(answered - began for _, began, answered, _ in self._answers)
        assert longest < READ_LIMIT, longest

    @property
    def refused(self) -> list[float]:
        """The times at which ``/profile`` was answered with 503."""
        return [answered for _, _, answered, status in self._answers if status == 503]


class Fault:
    """A service under load that is about to lose its database for a while."""

    def __init__(self, service: Service, name: str = "x") -> None:
        self.service = service
        self.crowd = Crowd(name, doubtful=True)
        self.watcher = Watcher(service)
        self._back_at = 0.0

    def repaired(self) -> None:
        """Check that the service recovers, now that the database is back."""
        self._back_at = time.monotonic()
        assert awaited(self._signs_in, RECOVERY_LIMIT)
        assert self.crowd.goes_on()

    def _signs_in(self) -> bool:
        return ask(self.service, "POST", "/sessions", account_form("watcher"), timeout=30) == 200

    @contextmanager
    def under_load(self) -> Iterator[None]:
        with self.crowd.using(self.service.url), self.watcher.watching():
            assert self.crowd.goes_on()
            yield
        self.watcher.check()
        late = [when - self._back_at for when in self.watcher.refused if when > self._back_at]
        assert max(late, default=0) < RECOVERY_LIMIT
        assert self.crowd.longest < WRITE_LIMIT, self.crowd.longest
        self.crowd.check(self.service.url)
        logged = events(self.service)
        assert not [event for event in logged if event["event"] == "sys_crash"], SEED
        assert all(event["reason"] for event in logged if event["event"] == "sys_storage_unavailable")


@pytest.fixture(scope="module")
def shared_service(shared_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all faults of the shared server."""
    folder = tmp_path_factory.mktemp("service")
    service = ImpatientService(folder, **UNLIMITED, AUTHSVC_DATABASE=shared_server.new_database())
    yield service
    service.end()


@pytest.fixture
def fault(server: Server, shared_service: Service, request: pytest.FixtureRequest) -> Fault:
    return Fault(shared_service, request.node.name.replace("_", "."))


def test_the_service_survives_a_restart_of_the_database(server: Server, fault: Fault) -> None:
    with fault.under_load():
        server.stop()
        assert awaited(lambda: fault.crowd.refused >= 20, 20)
        assert awaited(lambda: fault.watcher.refused)
        assert ask(fault.service, "POST", "/sessions", account_form("watcher")) == 503
        assert ask(fault.service, "GET", "/health") == 503
        assert ask(fault.service, "GET", "/") == 200
        server.start()
        fault.repaired()


def test_cut_connections_are_made_again(server: Server, fault: Fault) -> None:
    with fault.under_load():
        for _ in range(3):
            server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'authsvc'")
            assert fault.crowd.goes_on()
        fault.repaired()


@contextmanager
def open_transaction(database: str, statement: str) -> Iterator[None]:
    """Let another program run a statement and keep its transaction open."""
    with closing(psycopg.connect(database)) as connection:
        connection.execute(statement.encode())
        yield


def test_locks_of_another_program_refuse_only_the_writes_that_they_cover(
    server: Server, start: Callable[..., Service]
) -> None:
    database = server.new_database() + LOCK_TIMEOUT
    fault = Fault(start(**UNLIMITED, AUTHSVC_DATABASE=database))
    with fault.under_load():
        with open_transaction(database, "SELECT FROM users WHERE email = 'watcher@x.io' FOR UPDATE"):
            assert ask(fault.service, "POST", "/sessions", account_form("watcher"), timeout=30) == 503
            assert not fault.watcher.refused
        assert not fault.crowd.refused
        with open_transaction(database, "LOCK TABLE users, sessions IN EXCLUSIVE MODE"):
            assert ask(fault.service, "POST", "/sessions", account_form("watcher"), timeout=30) == 503
            assert not fault.watcher.refused  # it only reads
        fault.repaired()


def test_a_lock_against_readers_stops_only_what_reads(fault: Fault) -> None:
    database = fault.service.environ["AUTHSVC_DATABASE"]
    with fault.under_load():
        with open_transaction(database, "LOCK TABLE users IN ACCESS EXCLUSIVE MODE"):
            assert awaited(lambda: len(fault.watcher.refused) >= 20, 10)  # only the first one waited
            assert ask(fault.service, "POST", "/sessions", account_form("watcher"), timeout=30) == 503
        fault.repaired()


def test_a_frozen_database_does_not_freeze_the_service(server: Server, fault: Fault) -> None:
    with fault.under_load():
        with server.frozen():
            assert awaited(lambda: len(fault.watcher.refused) >= 20, 10)  # only the first one waited
            assert ask(fault.service, "POST", "/sessions", account_form("watcher"), timeout=30) == 503
            assert awaited(lambda: fault.crowd.refused >= 8, 20)
        fault.repaired()


# The engine in this process, with shorter timeouts


@pytest.fixture
def _shortest_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("READ_TIMEOUT", "WRITE_TIMEOUT", "CANCEL_TIMEOUT"):
        monkeypatch.setattr(f"engines.postgres.{name}", 0.3)


@pytest.fixture
def db(server: Server, _shortest_timeouts: None) -> Iterator[DB]:
    with closing(DB(f"{server.new_database()}%20-c%20synchronous_commit%3Don")) as db:
        assert awaited(lambda: answers(db))  # so that there is a connection
        yield db


def answers(db: DB) -> bool:
    """Return whether the database answers a query."""
    try:
        with suppress(NoResultFound):
            db.find_user_by(id=1)
    except StorageUnavailable:
        return False
    return True


@pytest.fixture
def lost_standby(server: Server) -> Iterator[None]:
    """Make every commit wait for a standby that does not exist, for 30 s at most."""
    server.set_synchronous_standby("nobody")
    end = threading.Timer(30, server.set_synchronous_standby, [""])
    end.start()
    yield
    end.cancel()
    end.join()
    server.set_synchronous_standby("")


def test_only_the_first_read_waits_for_a_frozen_server(server: Server, db: DB) -> None:
    with server.frozen():
        with pytest.raises(StorageUnavailable, match="does not answer"):
            db.find_user_by(id=1)
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(StorageUnavailable):
                db.find_user_by(id=1)
        assert time.monotonic() - began < 20 * 0.1  # a third of the timeout each; in fact some milliseconds
    assert awaited(lambda: answers(db))


def test_a_write_to_a_frozen_server_is_given_up(server: Server, db: DB) -> None:
    with server.frozen(), pytest.raises(StorageUnavailable, match="does not answer"):
        db.add_user("bob@x.io", b"hash")
    assert awaited(lambda: answers(db))


WRITES: dict[str, Callable[[DB], object]] = {
    "a transaction": lambda db: db.add_user(f"{time.monotonic()}@x.io", b"hash"),
    "a statement": lambda db: db.rate_limits.consume([Bucket("key", 10, 60)], 1_800_000_000),
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_commit_that_waits_for_a_lost_standby_is_cancelled_and_refused(
    server: Server, db: DB, lost_standby: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("engines.postgres.WRITE_TIMEOUT", 2.0)
    monkeypatch.setattr("engines.postgres.CANCEL_TIMEOUT", 10.0)  # a busy server may take a while to cancel
    for limit in (60, 2.0):  # seconds: the second write does not wait for WRITE_TIMEOUT
        began = time.monotonic()
        with pytest.raises(StorageUnavailable, match="too late"):
            WRITES[kind](db)
        assert time.monotonic() - began < limit
    assert server.execute("SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep'") == []
    assert answers(db)  # on the same connection
    server.set_synchronous_standby("")
    assert db.add_user("eve@x.io", b"hash")


# A primary and its standby


@pytest.fixture
def pair() -> Iterator[tuple[Server, Replica]]:
    with ExitStack() as stack:
        primary = stack.enter_context(removed_at_end(Server(synchronous_commit="on")))
        yield primary, stack.enter_context(removed_at_end(Replica(primary, synchronous_commit="on")))


def url_of(primary: Server, replica: Replica) -> str:
    """Return a URL that leads to whichever of the two is the primary."""
    hosts = f"127.0.0.1:{primary.port},127.0.0.1:{replica.port}"
    return f"postgresql://{postgres.USER}@{hosts}/postgres?target_session_attrs=read-write"


def test_a_lost_standby_refuses_writes_and_a_fail_over_loses_no_answered_change(
    pair: tuple[Server, Replica], start: Callable[..., Service]
) -> None:
    primary, replica = pair
    primary.set_synchronous_standby("*")
    fault = Fault(start(**UNLIMITED, AUTHSVC_DATABASE=url_of(*pair)))
    oldest = WRITE_TIMEOUT + 3  # seconds that a commit may wait: the timeout, and a second to cancel it
    waiting = "FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query_start < now() - interval"
    with fault.under_load():
        replica.stop()
        stopped = time.monotonic()
        assert ask(fault.service, "POST", "/users", account_form("eve"), timeout=60) == 503
        assert not fault.watcher.refused  # it only reads
        # A commit that nobody waits for any more must not keep its connection: the server has a hundred.
        while time.monotonic() < stopped + oldest + 1:
            assert primary.execute(f"SELECT {waiting} '{oldest} s'") == []
            time.sleep(0.05)
        replica.start()
        fault.repaired()
        refused = fault.crowd.refused
        primary.kill()
        assert awaited(lambda: fault.crowd.refused >= refused + 20, 20)
        assert awaited(lambda: fault.watcher.refused)
        replica.promote()
        fault.repaired()


def test_fail_over_to_an_asynchronous_standby_loses_the_last_changes(
    pair: tuple[Server, Replica], start: Callable[..., Service]
) -> None:
    primary, replica = pair
    service = start(**UNLIMITED, AUTHSVC_DATABASE=url_of(*pair))
    assert ask(service, "POST", "/users", account_form("early")) == 200
    session = signed_in(service, account_form("early"))
    caught_up = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn = pg_current_wal_lsn()"
    assert awaited(lambda: primary.execute(caught_up) == [(1,)])
    replica.stop()
    assert ask(service, "POST", "/users", account_form("late")) == 200
    assert ask(service, "DELETE", "/sessions", session=session) == 302
    primary.kill()
    replica.start()
    replica.promote()
    assert awaited(lambda: ask(service, "GET", "/profile", session=session) == 200, RECOVERY_LIMIT)
    ended = service.command("sessions", "end", "--all", "--json")
    assert json.loads(ended)["ended"] == 1
    assert ask(service, "GET", "/profile", session=session) == 403
    assert ask(service, "POST", "/sessions", account_form("early")) == 200
    assert ask(service, "POST", "/sessions", account_form("late")) == 401
