"""The PostgreSQL engine: one database that several copies of the service share.

Imported only where a URL names the database. Needs psycopg, the extra ``postgres``.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import Any, NoReturn

from engines.errors import AlreadyExists, DatabaseRefused, StorageUnavailable
from engines.rows import Row, Rows
from engines.schema import POSTGRES_MIGRATIONS, POSTGRES_SCHEMA, POSTGRES_VERSION, TABLES
from settings import redacted

try:
    import psycopg
    import psycopg_pool
    from psycopg.abc import RV, PQGen
    from psycopg.adapt import AdaptersMap, Buffer, Dumper
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
    from psycopg.types.numeric import Int8Dumper
except ImportError as error:
    remedy = "pip install 'psycopg[binary,pool]', or make pyz POSTGRES=1"
    raise DatabaseRefused(f"PostgreSQL needs psycopg: {remedy} ({error})") from error

MIGRATION_LOCK = 0x61757468, 1  # "auth": the numbers of the advisory lock that one of several starting copies gets

# A fault must be noticed within seconds: the thread that serves everybody may be the one that waits for the server.
CONNECTION_LIMITS: dict[str, int | str] = {"connect_timeout": 2, "tcp_user_timeout": 3000}  # seconds, milliseconds
CONNECTION_LIMITS |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 2}  # seconds, seconds, tries
FIXED_PARAMETERS = {"application_name": "authsvc", "client_encoding": "UTF8"}  # _refuse_if_served() looks for the name
SERVER_TIMEOUTS = {"statement_timeout": 5000, "lock_timeout": 5000, "idle_in_transaction_session_timeout": 10_000}  # ms
OPERATOR_TIMEOUTS = {"lock_timeout": 5000}  # ms; the statements themselves may take long
READ_TIMEOUT = 2.0  # seconds without a byte from the server
WRITE_TIMEOUT = 6.0  # longer than the server's own timeouts, of which none ends a commit that waits for a lost standby
CANCEL_TIMEOUT = 1.0  # seconds
WAIT_STEP = 100  # milliseconds between two looks at these timeouts
EXTRA_CONNECTIONS = 6  # besides one for each hashing thread: to read, to write (3 threads), for mail and for pruning
POOL_TIMEOUT = 1.0  # seconds for a connection that must be made first
POOL_TIMEOUT_DOWN = 0.002  # seconds, after a failed attempt to connect: long enough for the pool to try again
SERVED_TRIES, SERVED_INTERVAL = 20, 0.1  # times, seconds: a closed connection stays visible for a moment

logging.getLogger("psycopg").addHandler(logging.NullHandler())  # errors are raised, and logged as JSON by the caller


class PostgresEngine:
    """One PostgreSQL database. Safe to use from many threads; see engines.Engine.

    Raises:
        DatabaseRefused: it cannot be reached, belongs to another program or to a newer release.
    """

    name = "PostgreSQL"

    def __init__(self, database: str) -> None:
        self._database = database
        self._down = False  # the last attempt to connect failed
        self._slow = False  # the last write got no answer
        with _refused(database), closing(_connect(database, OPERATOR_TIMEOUTS)) as connection:
            _migrate(connection)
            number = connection.info.server_version
        self.version = f"PostgreSQL {number // 10_000}.{number % 10_000}"
        self._pool = psycopg_pool.ConnectionPool(
            _conninfo(database),
            connection_class=_Connection,
            kwargs={"autocommit": True, "context": _ADAPTERS},
            configure=_configure,
            min_size=1,
            max_size=(os.cpu_count() or 1) + EXTRA_CONNECTIONS,
            reconnect_timeout=0.1,  # seconds; the next request tries again
            reconnect_failed=self._set_down,
            num_workers=2,
            open=True,
        )

    def read(self, statement: str, values: dict[str, Any]) -> Any:
        with self._pooled(reading=True) as connection:  # outside a transaction: one round trip
            return connection.execute(_converted(statement), values).fetchone()

    def read_all(self, statement: str, values: dict[str, Any]) -> list[Any]:
        with self._pooled(reading=True) as connection:
            return connection.execute(_converted(statement), values).fetchall()

    def read_each(self, statement: str) -> Iterator[Any]:
        with self.own_connection() as statements, statements.connection.transaction():
            yield from statements.stream(statement)  # a cursor keeps the snapshot with which it was opened

    def write(self, statement: str, values: dict[str, Any]) -> int:
        with self._pooled() as connection:
            return connection.execute(_converted(statement), values).rowcount

    @contextmanager
    def transaction(
        self, *, lock: str = "", values: dict[str, Any] | None = None, connection: _Statements | None = None
    ) -> Iterator[_Statements]:
        with self._pooled() if connection is None else nullcontext(connection.connection) as used, used.transaction():
            statements = _Statements(used)
            if lock:
                statements.execute(lock, values)
            yield statements

    @contextmanager
    def own_connection(self) -> Iterator[_Statements]:
        with _translated_errors(), closing(_connect(self._database, OPERATOR_TIMEOUTS)) as connection:
            yield _Statements(connection)

    def check(self) -> None:
        """Do nothing: the server checks its own files."""

    def empty_log(self) -> bool:
        """Do nothing: the log is the server's."""
        return True

    def close(self) -> None:
        self._pool.close()

    @contextmanager
    def _pooled(self, *, reading: bool = False) -> Iterator[psycopg.Connection]:
        with _translated_errors():
            try:
                connection = self._pool.getconn(POOL_TIMEOUT_DOWN if self._down else POOL_TIMEOUT)
            except psycopg_pool.PoolTimeout:
                self._down = True
                raise
            self._down = False
            connection.reading = reading
            connection.timeout = READ_TIMEOUT if reading or self._slow else WRITE_TIMEOUT
            try:
                yield connection
                self._slow = self._slow and reading
            except _NoAnswer:
                self._slow, self._down = not reading, connection.closed  # later requests need not wait as long
                raise
            finally:
                closed = connection.closed
                self._pool.putconn(connection)
                if closed:  # the others are probably dead too, and no request should have to fail first
                    self._pool.drain()

    def _set_down(self, _pool: object) -> None:
        self._down = True


def exists(database: str) -> bool:
    """Return whether there are tables under our names, perhaps those of another program."""
    with _refused(database), closing(_connect(database)) as connection:
        return _schema_version(connection) > 0


def check(database: str) -> dict[str, list[str]]:
    """Return what is wrong with the database."""
    try:
        return {"database": [] if exists(database) else [f"there are no tables in {redacted(database)}"]}
    except DatabaseRefused as error:
        return {"database": [str(error)]}


def backup(database: str, _target: str) -> NoReturn:
    """Refuse: PostgreSQL has its own tools."""
    raise DatabaseRefused(f"back up {redacted(database)} with PostgreSQL's own pg_dump; nothing was written")


def restore(_source: str, database: str, _kept: str, _prepare: Callable[[str], object]) -> NoReturn:
    """Refuse: PostgreSQL has its own tools."""
    remedy = "with PostgreSQL's own pg_restore, and then run: sessions end --all"
    raise DatabaseRefused(f"restore {redacted(database)} {remedy}; nothing was changed")


@contextmanager
def open_readonly(database: str) -> Iterator[_Statements]:
    """Open a database to read from it, without a migration."""
    with _refused(database), closing(_connect(database)) as connection:
        yield _Statements(connection)


@contextmanager
def open_source(database: str) -> Iterator[Rows]:
    """Migrate a database, keep everybody else from changing it, and read all of its rows.

    Raises:
        DatabaseRefused: it cannot be opened, or a service uses it.
    """
    with _refused(database):
        connection = _connect(database, OPERATOR_TIMEOUTS)
    with closing(connection), _translated_errors():
        _migrate(connection)
        _refuse_if_served(connection, database)
        with connection.transaction():
            connection.execute(_lock_tables("SHARE"))  # others can still read, and nobody can write
            yield _rows(connection)


@contextmanager
def open_target(database: str) -> Iterator[Rows]:
    """Make the tables where there are none, and fill them in one transaction: with all rows, or with none.

    Raises:
        DatabaseRefused: the database cannot be opened.
    """
    with _refused(database):
        connection = _connect(database, OPERATOR_TIMEOUTS)
    with closing(connection), _translated_errors(), connection.transaction():
        _migrate(connection)  # if the transaction is rolled back, the tables are gone, too
        connection.execute(_lock_tables("EXCLUSIVE"))
        yield _rows(connection)


class _NoAnswer(psycopg.OperationalError):
    """The server did not answer in time."""


class _Connection(psycopg.Connection):
    """A connection that gives up where the server does not answer.

    The server's own timeouts do not help against a frozen server or a commit that waits for a lost standby, and a
    socket timeout does not exist in libpq. So this counts the time in psycopg's wait loop.
    """

    reading = True
    timeout = READ_TIMEOUT  # seconds

    def wait(self, gen: PQGen[RV], *_: Any, **__: Any) -> RV:
        return super().wait(self._with_timeout(gen), WAIT_STEP / 1000)

    def _with_timeout(self, answering: PQGen[RV]) -> PQGen[RV]:
        left, cancelled = self.timeout, False
        try:
            wanted = next(answering)
            while True:
                ready = yield wanted
                left -= 0 if ready else WAIT_STEP / 1000
                if left <= 0:
                    if cancelled or self.reading:  # a read leaves nothing behind: the server's own timeout ends it
                        self.close()
                        raise _NoAnswer("the server does not answer")
                    # A cancelled commit that waited for a standby has committed, and its locks are released.
                    left, cancelled = CANCEL_TIMEOUT, True
                    with suppress(psycopg.Error):
                        self.cancel_safe(timeout=CANCEL_TIMEOUT)
                wanted = answering.send(ready)
        except StopIteration as done:
            if cancelled:
                raise _NoAnswer("the server answered too late: the write may be lost with the server") from None
            return done.value  # type: ignore[no-any-return]


class _Statements:
    """A connection that takes statements with ``:name`` parameters. Implements engines.Transaction."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self.connection = connection

    def execute(self, statement: str, values: dict[str, Any] | None = None) -> psycopg.Cursor:
        return self.connection.execute(_converted(statement), values or {})

    def executemany(self, statement: str, rows: Iterable[dict[str, Any]]) -> psycopg.Cursor:
        cursor = self.connection.cursor()
        cursor.executemany(_converted(statement), rows)
        return cursor

    def stream(self, statement: str) -> Iterator[Row]:
        """Yield the rows one by one: all of them may not fit into memory. Only inside a transaction."""
        with _translated_errors(), self.connection.cursor(name="stream") as cursor:
            yield from cursor.execute(_converted(statement), {})


class _HashDumper(Dumper):
    """Sends bytes in the hexadecimal form of bytea, which a password hash keeps in its column of text."""

    def dump(self, obj: bytes) -> Buffer:
        return b"\\x" + obj.hex().encode()


_ADAPTERS = AdaptersMap(psycopg.adapters)
_ADAPTERS.register_dumper(bytes, _HashDumper)
_ADAPTERS.register_dumper(int, Int8Dumper)  # else by size, and a sum of two small ones overflows in 2038


@functools.cache  # statements are literals, or built from a fixed set of names
def _converted(statement: str) -> bytes:
    """Return a statement with the parameters as psycopg writes them: ``:name`` becomes ``%(name)s``."""
    escaped = statement.replace("%", "%%")
    return re.sub(r"('[^']*'|::)|:([a-z_]+[0-9]*)", lambda found: found[1] or f"%({found[2]})s", escaped).encode()


def _conninfo(database: str, timeouts: dict[str, int] = SERVER_TIMEOUTS) -> str:
    given = conninfo_to_dict(database)
    if "service" not in given:  # the settings checked the URL: PGHOST and PGHOSTADDR must not change the server
        given = {"host": "", "hostaddr": "", **given}
    options = " ".join([*(f"-c {name}={value}" for name, value in timeouts.items()), str(given.get("options", ""))])
    return make_conninfo(database, **{**CONNECTION_LIMITS, **given, **FIXED_PARAMETERS, "options": options.strip()})


def _connect(database: str, timeouts: dict[str, int] = SERVER_TIMEOUTS) -> psycopg.Connection:
    return psycopg.connect(_conninfo(database, timeouts), autocommit=True, context=_ADAPTERS)


def _configure(connection: psycopg.Connection) -> None:
    # Runs on a thread of the pool: where the tables cannot be read, no request has to wait to find out.
    connection.execute("SELECT FROM users, sessions LIMIT 0")


def _migrate(connection: psycopg.Connection) -> None:
    if _schema_version(connection) == POSTGRES_VERSION:
        return
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s::integer, %s::integer)", MIGRATION_LOCK)
        version = _schema_version(connection)  # again: another copy may have migrated it meanwhile
        for step in POSTGRES_MIGRATIONS[version - 1 :] if version else (POSTGRES_SCHEMA.read_text(encoding="utf-8"),):
            connection.execute(step.encode())
        statement = "INSERT INTO authsvc_version (version) VALUES (%s) ON CONFLICT (id) DO UPDATE SET version = %s"
        connection.execute(statement, [POSTGRES_VERSION, POSTGRES_VERSION])


def _schema_version(connection: psycopg.Connection) -> int:
    """Return the version of the schema, 0 where there are no tables."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise DatabaseRefused(f"its encoding is {encoding}: make one with createdb -T template0 -E UTF8")
    (schema,) = connection.execute("SELECT current_schema()").fetchone() or (None,)
    if schema is None:
        raise DatabaseRefused("no schema of the search_path exists")
    statement = """
        SELECT relname, attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
         WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
           AND relname = ANY (%s)"""  # not from information_schema, which takes 15 ms
    found = connection.execute(statement, [["authsvc_version", *TABLES]]).fetchall()
    if not found:
        return 0
    if not {("authsvc_version", "version"), ("users", "email_key")} <= set(found):
        raise DatabaseRefused(f"the tables in its schema {schema} belong to another program")
    (version,) = connection.execute("SELECT version FROM authsvc_version").fetchone() or (0,)
    if version > POSTGRES_VERSION:
        raise DatabaseRefused(f"it is of a newer release (schema {version}, this one supports {POSTGRES_VERSION})")
    return int(version)


def _rows(connection: psycopg.Connection) -> Rows:
    statements = _Statements(connection)
    return Rows(PostgresEngine.name, statements, statements.stream)


def _lock_tables(mode: str) -> bytes:
    return f"LOCK TABLE {', '.join(TABLES)} IN {mode} MODE".encode()


def _refuse_if_served(connection: psycopg.Connection, database: str) -> None:
    for _ in range(SERVED_TRIES):
        statement = """
            SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'authsvc' AND pid <> pg_backend_pid()"""
        (served,) = connection.execute(statement).fetchone() or (0,)
        if not served:
            return
        threading.Event().wait(SERVED_INTERVAL)
    connections = "1 connection" if served == 1 else f"{served} connections"
    raise DatabaseRefused(f"{redacted(database)} is in use, by {connections}: stop all copies of the service first")


@contextmanager
def _refused(database: str) -> Iterator[None]:
    try:
        with _translated_errors():
            yield
    except (StorageUnavailable, DatabaseRefused, psycopg.Error) as error:
        raise DatabaseRefused(f"cannot open the database {redacted(database)}: {_message(error)}") from error


@contextmanager
def _translated_errors() -> Iterator[None]:
    """Turn PostgreSQL's errors into those of engines.errors, and a constraint or a bad value into ValueError."""
    try:
        yield
    except (psycopg.IntegrityError, psycopg.DataError) as error:
        unique = isinstance(error, psycopg.errors.UniqueViolation)
        if unique and not (error.diag.constraint_name or "").endswith("_pkey"):
            raise AlreadyExists(_message(error)) from error
        raise ValueError(_message(error)) from error
    except (
        psycopg.OperationalError,  # gone, shut down, too many connections, too slow, a deadlock; also the pool's errors
        psycopg.InterfaceError,  # the connection is closed
        psycopg.errors.ReadOnlySqlTransaction,  # a replica that is not yet promoted
        psycopg.errors.IdleInTransactionSessionTimeout,
        psycopg.errors.UndefinedTable,
    ) as error:
        raise StorageUnavailable(_message(error)) from error


def _message(error: Exception) -> str:
    # Not the server's detail: it holds values.
    primary = (error.diag.message_primary if isinstance(error, psycopg.Error) else None) or str(error)
    return "; ".join(line.strip() for line in primary.splitlines() if line.strip()) or type(error).__name__
