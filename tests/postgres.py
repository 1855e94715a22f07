"""A PostgreSQL server for the tests, with a schema for each test."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import psycopg

from engines.schema import NUMBERED_TABLES
from tests.ports import fixed_port

MISSING = "PostgreSQL is missing: apt-get install postgresql"
USER = "postgres"


@functools.cache
def programs() -> Path | None:
    """Return the folder of initdb and postgres, the newest one if there are several; None if there is none."""
    on_path = shutil.which("initdb")
    found = [os.path.dirname(os.path.realpath(on_path))] if on_path else sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    return next((Path(folder) for folder in reversed(found) if (Path(folder) / "initdb").exists()), None)


class Server:
    """A new server on this machine, which does not wait for the disk. Its process belongs to the test.

    ``settings`` take precedence over those with which it is started otherwise.
    """

    haste: ClassVar[dict[str, str]] = {
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "autovacuum": "off",
    }

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        binaries = programs()
        assert binaries, MISSING
        self._binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # short: a socket's name has 107 bytes
        self._options: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self.folder, USER, USER)
            self._options = {"user": USER, "group": USER, "extra_groups": []}
        self.port = fixed_port()
        self._create()
        self.start()
        self._count = 0
        self._emptying: psycopg.Connection | None = None  # kept, as each new connection costs the server 6 ms
        self.emptied: list[str] = []

    def _create(self) -> None:
        self._run("initdb", "--no-sync", "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C")

    def _run(self, program: str, *options: object) -> None:
        command = [str(self._binaries / program), "-D", str(self.folder / "data"), *map(str, options)]
        subprocess.run(command, cwd="/", check=True, capture_output=True, **self._options)

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": str(self.folder),
            "max_connections": "300",
            "shared_buffers": "32MB",
            **self.haste,
            **self._settings,
        }
        command = [str(self._binaries / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port)]
        command += [f"--{name}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **self._options)
        deadline = time.monotonic() + 20
        while self.running and time.monotonic() < deadline:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url).close()
                return
            time.sleep(0.02)
        raise AssertionError((self.folder / "log").read_text())

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, number: int = signal.SIGINT) -> None:
        """Stop it and end all connections. SIGINT is PostgreSQL's "fast" shutdown."""
        if self._emptying:
            self._emptying.close()
        self._process.send_signal(number)
        self._process.wait(timeout=20)

    def kill(self) -> None:
        """Kill all its processes at the same moment, as a power failure does."""
        segment = (self.folder / "data/postmaster.pid").read_text().split()[-2]
        for number in signal.SIGSTOP, signal.SIGKILL:  # all are stopped first, so that none notices the end of another
            self._signal(number)
        self._process.wait(timeout=20)
        subprocess.run(["ipcrm", "-m", segment], capture_output=True)  # nothing else removes it

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Freeze it for 30 s at most: connections are accepted, but nothing is done, as when its disk hangs."""
        thaw = threading.Timer(30, self._signal, [signal.SIGCONT])
        thaw.start()
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            thaw.cancel()
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        server = self._process.pid
        if number != signal.SIGCONT:
            os.kill(server, signal.SIGSTOP)  # so that it starts no further process
        for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
            os.kill(int(child), number)
        os.kill(server, number)

    def execute(self, statement: str) -> list[Any]:
        """Run a statement as the operator; return its rows."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def set_synchronous_standby(self, names: str) -> None:
        """From now on wait with each commit until one of these standbys has it: "*" is any one, "" is none."""
        self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        self.execute("SELECT pg_reload_conf()")
        self._await("SHOW synchronous_standby_names", [(names,)])
        if names == "*":
            self._await("SELECT sync_state FROM pg_stat_replication", [("sync",)])

    def _await(self, statement: str, rows: list[Any]) -> None:
        deadline = time.monotonic() + 20
        while (found := self.execute(statement)) != rows:
            assert time.monotonic() < deadline, (statement, found)
            time.sleep(0.02)

    def remove(self) -> None:
        """Stop it and delete its files."""
        if self.running:
            self.stop()
        shutil.rmtree(self.folder)

    @property
    def url(self) -> str:
        """The URL with the port."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    @property
    def socket_url(self) -> str:
        """The URL with the Unix socket in its folder."""
        return f"postgresql://{USER}@{str(self.folder).replace('/', '%2F')}:{self.port}/postgres"

    def new_database(self) -> str:
        """Create an empty schema; return its URL."""
        self._count += 1
        schema = f"test{self._count}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        return f"{self.socket_url}?options=-csearch_path%3D{schema}"

    def empty(self, database: str) -> None:
        """Empty the tables and add the database to ``emptied``, unless a test has changed its tables."""
        if not self._emptying or self._emptying.closed:
            self._emptying = psycopg.connect(self.url, autocommit=True)
        with contextlib.suppress(psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn):
            self._emptying.execute(
                f"""
                SET search_path = {database.rpartition("%3D")[2]};
                SET lock_timeout = 1000;
                SELECT email_key FROM users;
                DROP FUNCTION IF EXISTS stop CASCADE;
                DELETE FROM users;
                DELETE FROM registrations;
                DELETE FROM former_emails;
                DELETE FROM spent_challenges;
                DELETE FROM throttle;
                DELETE FROM throttle_secret;
                SELECT setval(name || '_id_seq', 1, false) FROM unnest(ARRAY{list(NUMBERED_TABLES)}) name
                """.encode()
            )
            self.emptied.append(database)


class Replica(Server):
    """A standby: it follows a primary, and can take its place."""

    def __init__(self, primary: Server, **settings: str) -> None:
        self._primary = primary
        super().__init__(**settings)

    def _create(self) -> None:
        options = "--no-sync", "--write-recovery-conf", "--checkpoint=fast", "-h", "127.0.0.1", "-U", USER
        self._run("pg_basebackup", *options, "-p", self._primary.port)

    def promote(self) -> None:
        """Make it the primary."""
        self._run("pg_ctl", "promote", "--wait")


class RawConnection:
    """A connection beside those of the service, with the methods of a connection of sqlite3."""

    def __init__(self, database: str) -> None:
        self.connection = psycopg.connect(database, autocommit=True)

    def execute(self, statement: str, values: Iterable[object] = ()) -> Any:
        """Run a statement with ``?`` as parameters. A hash that is stored as hexadecimal text is returned as bytes."""
        converted = statement.replace("%", "%%").replace("?", "%s")
        cursor = self.connection.cursor(row_factory=_row)
        return cursor.execute(converted.encode(), [*values])

    def executemany(self, statement: str, rows: Iterable[Iterable[object]]) -> None:
        """Run a statement once for each row of values."""
        for values in rows:
            self.execute(statement, values)

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: each statement is committed at once, as with sqlite3 in autocommit mode."""

    def close(self) -> None:
        self.connection.close()


def _row(cursor: psycopg.Cursor[Any]) -> Any:
    def hashes(value: object) -> object:
        return bytes.fromhex(value[2:]) if isinstance(value, str) and value.startswith("\\x") else value

    return lambda values: tuple(map(hashes, values))
