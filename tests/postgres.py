"""A PostgreSQL of the tests' own: a server on a free port of this machine, and a schema for each test."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import psycopg

MISSING = "PostgreSQL is not here: apt-get install postgresql"
USER = "postgres"


@functools.cache
def programs() -> Path | None:
    """The folder of initdb and postgres, the newest where there are several."""
    beside = shutil.which("initdb")
    found = [os.path.dirname(os.path.realpath(beside))] if beside else sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    return next((Path(folder) for folder in reversed(found) if (Path(folder) / "initdb").exists()), None)


class Server:
    """A server without the patience of a disk; made, started and stopped by its process id.

    ``settings`` go before those with which it is started otherwise.
    """

    haste: ClassVar = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        binaries = programs()
        assert binaries, MISSING
        self._binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # short: a socket's name has 107 bytes
        self._options: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses
            shutil.chown(self.folder, USER, USER)
            self._options = {"user": USER, "group": USER, "extra_groups": []}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._make()
        self.start()
        self._count = 0
        self.emptied: list[str] = []

    def _make(self) -> None:
        self._run("initdb", "--no-sync", "-A", "trust", "-U", USER, "-E", "UTF8", "--locale=C")

    def _run(self, program: str, *options: object) -> None:
        command = [str(self._binaries / program), "-D", str(self.folder / "data"), *map(str, options)]
        subprocess.run(command, cwd="/", check=True, capture_output=True, **self._options)

    def start(self) -> None:
        """Start it and wait until it answers."""
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
        for _ in range(200):
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it and all connections; SIGINT is PostgreSQL's "fast"."""
        self._process.send_signal(number)
        self._process.wait(timeout=20)

    def kill(self) -> None:
        """End all its processes in the midst of what they do, as a machine that loses its power would."""
        segment = (self.folder / "data/postmaster.pid").read_text().split()[-2]
        for number in signal.SIGSTOP, signal.SIGKILL:  # first of all, so that it notices nothing
            self._signal(number)
        self._process.wait(timeout=20)
        subprocess.run(["ipcrm", "-m", segment], capture_output=True)  # else it stays until the machine is restarted

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It accepts connections and does nothing, as when its disk hangs; for 30 s, as a test may hang with it."""
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
            os.kill(server, signal.SIGSTOP)  # it starts no more
        for child in Path(f"/proc/{server}/task/{server}/children").read_text().split():
            os.kill(int(child), number)
        os.kill(server, number)

    def execute(self, statement: str) -> list[Any]:
        """Run a statement of the operator's; return what it brings."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def wait_for(self, replicas: str) -> None:
        """From now on answer a commit when one of these has it, too: "*" is whichever there is, "" none."""
        self.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{replicas}'")
        self.execute("SELECT pg_reload_conf()")
        while self.execute("SHOW synchronous_standby_names") != [(replicas,)]:
            time.sleep(0.05)
        while replicas == "*" and self.execute("SELECT sync_state FROM pg_stat_replication") != [("sync",)]:
            time.sleep(0.05)

    def remove(self) -> None:
        """End it for good."""
        self.stop()
        shutil.rmtree(self.folder)

    @property
    def url(self) -> str:
        """By the port of this machine."""
        return f"postgresql://{USER}@127.0.0.1:{self.port}/postgres"

    @property
    def socket_url(self) -> str:
        """By the socket in its folder."""
        return f"postgresql://{USER}@{str(self.folder).replace('/', '%2F')}:{self.port}/postgres"

    def new_place(self) -> str:
        """The URL of a schema in which there is nothing."""
        self._count += 1
        schema = f"test{self._count}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
        return f"{self.socket_url}?options=-csearch_path%3D{schema}"

    def empty(self, place: str) -> None:
        """Make a place as if its tables were new, to be taken from ``emptied``; not one where they were changed."""
        with (
            contextlib.suppress(psycopg.errors.UndefinedTable, psycopg.errors.UndefinedColumn),
            psycopg.connect(f"{place}%20-c%20lock_timeout%3D1000", autocommit=True) as connection,
        ):
            connection.execute(
                """
                SELECT email_key FROM users;
                DROP FUNCTION IF EXISTS stop CASCADE;
                DELETE FROM users;
                DELETE FROM throttle;
                DELETE FROM throttle_secret;
                SELECT setval('users_id_seq', 1, false), setval('sessions_id_seq', 1, false)
                """
            )
            self.emptied.append(place)


class Replica(Server):
    """A server that follows another, which it can replace."""

    def __init__(self, primary: Server, **settings: str) -> None:
        self._primary = primary
        super().__init__(**settings)

    def _make(self) -> None:
        options = "--no-sync", "--write-recovery-conf", "--checkpoint=fast", "-h", "127.0.0.1", "-U", USER
        self._run("pg_basebackup", *options, "-p", self._primary.port)

    def promote(self) -> None:
        """Make it take writes."""
        self._run("pg_ctl", "promote", "--wait")


class Ledger:
    """A connection that is not the service's, read and written like one of sqlite3's."""

    def __init__(self, place: str) -> None:
        self.connection = psycopg.connect(place, autocommit=True)

    def execute(self, statement: str, values: Iterable[object] = ()) -> Any:
        """Run a statement with ? as parameters; bytes of a hash are read as such."""
        converted = statement.replace("%", "%%").replace("?", "%s")
        cursor = self.connection.cursor(row_factory=_row)
        return cursor.execute(converted.encode(), [*values])

    def executemany(self, statement: str, rows: Iterable[Iterable[object]]) -> None:
        """The same for many."""
        for values in rows:
            self.execute(statement, values)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: each statement was committed, as with sqlite3 in this mode."""

    def close(self) -> None:
        self.connection.close()


def _row(cursor: psycopg.Cursor[Any]) -> Any:
    def hashes(value: object) -> object:
        return bytes.fromhex(value[2:]) if isinstance(value, str) and value.startswith("\\x") else value

    return lambda values: tuple(map(hashes, values))
