"""The vault on PostgreSQL: how storage.py's statements get there, and the few that must read otherwise.

All that several copies of the service share. Imported only where a URL names the database; needs psycopg, the extra
``postgres``. Knows no clock, no password and no HTTP.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from database import AlreadyExists, DatabaseRefused, StorageUnavailable
from settings import shown
from storage import (
    ADD_STAGED,
    CLOCK_TOLERANCE,
    TABLES,
    TAKEN,
    Row,
    Rows,
    Statements,
    Store,
    User,
    is_text,
    listing,
    staged,
)

try:
    import psycopg
    import psycopg_pool
    from psycopg.abc import RV, PQGen
    from psycopg.adapt import Buffer, Dumper
    from psycopg.conninfo import conninfo_to_dict, make_conninfo
    from psycopg.types.numeric import Int8Dumper
except ImportError as error:
    way = "pip install 'psycopg[binary,pool]', or make pyz POSTGRES=1"
    raise DatabaseRefused(f"PostgreSQL needs psycopg: {way} ({error})") from error

SCHEMA = Path(__file__).with_name("schema_postgres.sql")

# MIGRATIONS[n - 1] lifts a database from version n to n + 1; schema_postgres.sql always makes the newest.
MIGRATIONS: tuple[str, ...] = ()
VERSION = len(MIGRATIONS) + 1
MIGRATING = 0x61757468, 1  # "auth": the two numbers of the lock that one of several starting copies gets

# A fault must show within seconds, and to every copy: the thread that serves all the others may be the one that waits.
LIMITS: dict[str, int | str] = {"connect_timeout": 2, "tcp_user_timeout": 3000, "keepalives_idle": 5}  # s, ms, s
LIMITS |= {"keepalives_interval": 2, "keepalives_count": 2}
OURS = {"application_name": "authsvc", "client_encoding": "UTF8"}  # the former is what _refuse_served() looks for
PATIENCE = {"statement_timeout": 5000, "lock_timeout": 5000, "idle_in_transaction_session_timeout": 10_000}  # ms
SEEN_TRIES, SEEN_INTERVAL = 20, 0.1  # times, seconds: a connection that was closed is seen for a moment still
LOCKING = {"lock_timeout": 5000}  # ms, of what may take its time otherwise
READ_SILENCE = 2.0  # seconds without a word of the server's: the thread that serves everybody may wait for it
WRITE_SILENCE = 6.0  # the server's own limits come first; none of them ends a commit that waits for a lost replica
CANCEL_SILENCE = 1.0
SILENCE_STEP = 100  # milliseconds
POOL_BESIDE = 6  # connections beside one for each core, which hashes: to read, write (3 threads), mail and prune
POOL_WAIT = 1.0  # seconds for a connection that must be made first
DOWN_WAIT = 2  # milliseconds, where the last try to connect failed: long enough to have the pool try again

# One from each bucket, or from none: none where one is seen to be empty. One that others empty between that look and
# the taking becomes NULL, which the column refuses, and with it the whole statement. Rows that have refilled say
# nothing; each take sweeps more than it adds.
TAKE = """
    WITH asked AS MATERIALIZED (
        SELECT key, pause, most, place
          FROM unnest(:keys::text[], :intervals::bigint[], :fulls::bigint[])
               WITH ORDINALITY AS asked (key, pause, most, place)
    ), taken AS (
        INSERT INTO throttle (key, full_at)
        SELECT key, :now + pause FROM asked
         WHERE NOT EXISTS (SELECT 1 FROM throttle JOIN asked USING (key)
                            WHERE full_at + pause > most AND full_at <= most + :tolerance)
         ORDER BY place
        ON CONFLICT (key) DO UPDATE SET full_at = (
            SELECT least(greatest(throttle.full_at, :now) + pause, most) FROM asked
             WHERE asked.key = excluded.key
               AND (throttle.full_at + pause <= most OR throttle.full_at > most + :tolerance))
        RETURNING key
    ), swept AS (
        DELETE FROM throttle
         WHERE EXISTS (SELECT 1 FROM taken)
           AND key IN (SELECT key FROM throttle WHERE full_at <= :now AND key <> ALL (:keys::text[])
                        LIMIT 10 FOR UPDATE SKIP LOCKED)
    )
    SELECT count(*) FROM taken
"""

logging.getLogger("psycopg").addHandler(logging.NullHandler())  # what goes wrong is said by who notices, as JSON


class PostgresDB(Store):
    """The users and their sessions in one PostgreSQL database.

    Raises:
        DatabaseRefused: it cannot be reached, is another program's, or a newer release's.
    """

    def __init__(self, place: str, *, private: bool = False) -> None:  # noqa: ARG002  # the server keeps its files so
        self._place = place
        self._down = False
        self._late = False
        self._staging: psycopg.Connection | None = None
        with _refused(place), closing(_connect(place, LOCKING)) as connection:
            _migrate(connection)
            version = connection.info.server_version
        self._engine = f"PostgreSQL {version // 10_000}.{version % 10_000}"
        self._pool = psycopg_pool.ConnectionPool(
            _conninfo(place),
            connection_class=_Connection,
            kwargs={"autocommit": True},
            configure=_prepare,
            min_size=1,
            max_size=(os.cpu_count() or 1) + POOL_BESIDE,
            timeout=POOL_WAIT,
            reconnect_timeout=0.1,  # seconds: the next request tries again, and none has to wait for a schedule
            reconnect_failed=self._failed_to_connect,
            num_workers=2,
            open=True,
        )

    @property
    def engine(self) -> str:
        """What keeps the rows, and in which version."""
        return self._engine

    def check_place(self) -> None:
        """Nothing to look at: the server knows its files."""

    def close(self) -> None:
        """Let go of all connections. No thread may be using it then or later."""
        self._pool.close()
        if self._staging:
            self._staging.close()

    # The doors

    def _read(self, statement: str, values: dict[str, Any]) -> Any:
        with self._connection(reading=True) as connection:  # in no transaction: one round trip
            return connection.execute(_converted(statement), values).fetchone()

    def _read_all(self, statement: str, values: dict[str, Any]) -> list[Any]:
        with self._connection(reading=True) as connection:
            return connection.execute(_converted(statement), values).fetchall()

    def _read_each(self, statement: str) -> Iterator[Any]:
        with self._unhurried() as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            with connection.transaction(), connection.cursor(name="each") as cursor:  # all may be more than memory
                yield from cursor.execute(_converted(statement), {})

    def _write(self, statement: str, values: dict[str, Any]) -> int:
        with self._connection() as connection:
            return connection.execute(_converted(statement), values).rowcount

    @contextmanager
    def _transaction(
        self,
        *,
        user_id: int | None = None,
        session_hash: str | None = None,
        everybody: bool = False,
        unhurried: bool = False,
    ) -> Iterator[Statements]:
        # Each statement sees what was committed when it began (READ COMMITTED). Two transactions about one user would
        # pass each other: a login that compared with the old password would leave a session that the change of the
        # password does not see, and end. So the user's row is locked first, by a statement of its own: the next one
        # sees what the other transaction did. Rows in the order of their ids: nobody waits for each other in a circle.
        with self._unhurried() if unhurried else self._connection() as connection, connection.transaction():
            db = _Statements(connection)
            if everybody:
                db.execute("LOCK TABLE users IN EXCLUSIVE MODE")  # the others still read
            elif user_id is not None or session_hash is not None:
                db.execute(
                    """
                    SELECT id FROM users
                     WHERE id = :user_id OR id = (SELECT user_id FROM sessions WHERE session_hash = :session_hash)
                     ORDER BY id FOR NO KEY UPDATE
                    """,
                    {"user_id": user_id, "session_hash": session_hash},
                )
            yield db

    @contextmanager
    def _unhurried(self) -> Iterator[psycopg.Connection]:
        """A connection of its own, which may take its time."""
        with _translating(), closing(_connect(self._place, LOCKING)) as connection:
            yield connection

    @contextmanager
    def _connection(self, *, reading: bool = False) -> Iterator[psycopg.Connection]:
        with _translating():
            try:
                connection = self._pool.getconn(DOWN_WAIT / 1000 if self._down else POOL_WAIT)
            except psycopg_pool.PoolTimeout:
                self._down = True
                raise
            self._down = False
            connection.reading = reading
            connection.silence = READ_SILENCE if reading or self._late else WRITE_SILENCE
            try:
                yield connection
                self._late = self._late and reading
            except _Silent:
                self._late, self._down = not reading, connection.closed  # who comes next need not wait as long
                raise
            finally:
                closed = connection.closed
                self._pool.putconn(connection)
                if closed:  # then the others are, too, or as silent: none shall cost a request to find out
                    self._pool.drain()

    def _failed_to_connect(self, _pool: object) -> None:
        self._down = True

    # What must read otherwise

    def _user(self, row: Sequence[Any]) -> User:
        hashed = row[2]
        if hashed.startswith("\\x"):
            row = (*row[:2], bytes.fromhex(hashed[2:]), *row[3:])
        return User(*row)

    def stage_users(self, users: Iterable[tuple[int, User]]) -> list[int]:
        """Lay users aside, each with a number; return the numbers of those whose email is taken, here or by another."""
        self._end_staging()
        with _translating():
            self._staging = connection = _connect(self._place, LOCKING)  # the table is gone with it
            connection.execute(
                """
                CREATE TEMP TABLE staged (number bigint, email text, email_key text, hashed_password text,
                                          created_at bigint, disabled_at bigint, totp_secret text, totp_since bigint)
                """
            )
            with connection.cursor() as cursor, cursor.copy("COPY staged FROM STDIN") as copy:
                for row in staged(users):
                    copy.write_row(row)
            connection.execute("ANALYZE staged")
            return [number for (number,) in connection.execute(TAKEN)]

    def add_staged_users(self) -> int:
        """Add the users laid aside, all or none, and return how many."""
        if not self._staging:
            raise StorageUnavailable("no users are laid aside")
        try:
            with _translating():
                return self._staging.execute(ADD_STAGED).rowcount
        finally:
            self._end_staging()

    def _end_staging(self) -> None:
        if self._staging:
            self._staging.close()
            self._staging = None

    def take(self, buckets: Sequence[tuple[str, int, int]], now: int) -> int:
        """Take one from each bucket (key, size, seconds until one is refilled) and return 0.

        When one is empty: take from none, write nothing, and return the seconds until it is worth another try.
        """
        # One statement, one round trip, no lock but those of the rows, which all take in the order given.
        values = {
            "keys": [key for key, _, _ in buckets],
            "intervals": [interval for _, _, interval in buckets],
            "fulls": [now + size * interval for _, size, interval in buckets],
            "now": now,
            "tolerance": CLOCK_TOLERANCE,
        }
        with suppress(_Empty):
            taken = self._take(values)
            if taken:
                return 0
        (wait,) = self._read(
            """
            SELECT max(full_at + pause - most)
              FROM unnest(:keys::text[], :intervals::bigint[], :fulls::bigint[]) AS asked (key, pause, most)
              JOIN throttle USING (key)
             WHERE full_at <= most + :tolerance
            """,
            values,
        )
        return max(1, wait or 0)

    def _take(self, values: dict[str, Any]) -> int:
        with self._connection() as connection:
            try:
                row = connection.execute(_converted(TAKE), values).fetchone()
            except psycopg.errors.NotNullViolation:
                raise _Empty from None
        return int(row[0]) if row else 0

    # Without opening it

    @classmethod
    def is_there(cls, place: str) -> bool:
        """Say whether there are tables of ours, or of another program's under our names."""
        with _refused(place), closing(_connect(place)) as connection:
            return _version(connection) > 0

    @classmethod
    def check(cls, place: str) -> dict[str, list[str]]:
        """Return what is wrong with the database."""
        try:
            there = cls.is_there(place)
        except DatabaseRefused as error:
            return {"database": [str(error)]}
        return {"database": [] if there else [f"there are no tables in {shown(place)}"]}

    @classmethod
    def backup(cls, place: str, _target: str) -> None:
        """Refuse: PostgreSQL has its own."""
        raise DatabaseRefused(f"{shown(place)} is copied with PostgreSQL's own pg_dump; nothing was written")

    @classmethod
    def restore(cls, _source: str, place: str, _former: str, _prepare: Callable[[str], object]) -> bool:
        """Refuse: PostgreSQL has its own."""
        raise DatabaseRefused(
            f"{shown(place)} is restored with PostgreSQL's own pg_restore, and then: sessions end --all; "
            "nothing was changed"
        )

    @classmethod
    @contextmanager
    def leaving(cls, place: str) -> Iterator[Rows]:
        """Keep everybody from changing a database, lifted to this release, and read all of it."""
        with _refused(place):
            connection = _connect(place, LOCKING)
        with closing(connection), _translating():
            _migrate(connection)
            _refuse_served(connection, place)
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            with connection.transaction():
                connection.execute(_locking("SHARE"))  # one can still read
                yield _Rows(connection)

    @classmethod
    @contextmanager
    def arriving(cls, place: str) -> Iterator[Rows]:
        """Make a database where there is none, and fill it in one transaction: whole, or as it was before."""
        with _refused(place):
            connection = _connect(place, LOCKING)
        with closing(connection), _translating(), connection.transaction():
            _migrate(connection)  # tables that were made are gone with the transaction, too
            connection.execute(_locking("EXCLUSIVE"))
            yield _Rows(connection)

    @classmethod
    @contextmanager
    def _visiting(cls, place: str) -> Iterator[Statements]:
        with _refused(place), closing(_connect(place)) as connection:
            yield _Statements(connection)


class _Empty(Exception):
    """A bucket was emptied while we took from it."""


class _Silent(psycopg.OperationalError):
    """The server did not answer in time."""


class _Connection(psycopg.Connection):
    """A connection on which nobody waits for ever, whatever the server waits for."""

    reading = True
    silence = READ_SILENCE  # seconds

    def wait(self, gen: PQGen[RV], *_: Any, **__: Any) -> RV:
        return super().wait(self._impatient(gen), SILENCE_STEP / 1000)

    def _impatient(self, answering: PQGen[RV]) -> PQGen[RV]:
        left, cancelled = self.silence, False
        try:
            wanted = next(answering)
            while True:
                ready = yield wanted
                left -= 0 if ready else SILENCE_STEP / 1000
                if left <= 0:
                    if cancelled or self.reading:  # the server's own limits end what it does
                        self.close()
                        raise _Silent("the server does not answer")
                    # A commit that waits for a replica stands here, as cancelled as done; and would never let go.
                    left, cancelled = CANCEL_SILENCE, True
                    with suppress(psycopg.Error):
                        self.cancel_safe(timeout=CANCEL_SILENCE)
                wanted = answering.send(ready)
        except StopIteration as done:
            if cancelled:
                raise _Silent("the server answered too late: what was asked for may be lost with it") from None
            return done.value  # type: ignore[no-any-return]


class _Statements:
    """A connection that takes parameters as storage.py writes them."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def execute(self, statement: str, values: dict[str, Any] | None = None) -> psycopg.Cursor:
        return self._connection.execute(_converted(statement), values or {})

    def executemany(self, statement: str, rows: Iterable[dict[str, Any]]) -> None:
        self._connection.cursor().executemany(_converted(statement), rows)


class _Rows:
    """All rows, in one transaction."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection

    def each(self, table: str) -> Generator[Row, None, None]:
        with _translating(), self._connection.cursor(name=table) as cursor:  # all may be more than memory
            for row in cursor.execute(listing(table).encode()):
                yield _as_given(row) if table == "users" else row

    def add(self, table: str, rows: Iterable[Row]) -> None:
        statement = f"COPY {table} ({', '.join(TABLES[table])}) FROM STDIN"
        with _translating(), self._connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for row in rows:
                _refuse_unfit(table, row)
                copy.write_row(row)

    def last_id(self, table: str) -> int:
        # The sequence does not know of rows that brought their numbers.
        statement = f"""
            SELECT greatest((SELECT max(id) FROM {table}),
                            pg_sequence_last_value(pg_get_serial_sequence(:table, 'id')::regclass), 0)
            """
        (last,) = self._connection.execute(_converted(statement), {"table": table}).fetchone() or (0,)
        return int(last)

    def go_on_after(self, table: str, last_id: int) -> None:
        if last_id:
            statement = "SELECT setval(pg_get_serial_sequence(:table, 'id')::regclass, :last_id)"
            self._connection.execute(_converted(statement), {"table": table, "last_id": last_id})


class _HashDumper(Dumper):
    # What a bytea reads, and what our column of text keeps.
    def dump(self, obj: bytes) -> Buffer:
        return b"\\x" + obj.hex().encode()


@functools.cache  # the statements are literals, or built from names of a fixed set
def _converted(statement: str) -> bytes:
    """Return the statement with :name as psycopg has it, %(name)s."""

    def convert(found: re.Match[str]) -> str:
        return f"%({found['name']})s" if found["name"] else found[0].replace("%", "%%")

    converted = re.sub(r"'[^']*'|::|:(?P<name>[a-z_]+)|%", convert, statement)
    return converted.encode()


def _conninfo(place: str, patience: dict[str, int] = PATIENCE) -> str:
    given = conninfo_to_dict(place)
    if "service" not in given:  # the settings looked at the URL, which PGHOST and PGHOSTADDR would lead elsewhere
        given = {"host": "", "hostaddr": "", **given}
    options = " ".join([*(f"-c {name}={value}" for name, value in patience.items()), str(given.get("options", ""))])
    return make_conninfo(place, **{**LIMITS, **given, **OURS, "options": options.strip()})


def _connect(place: str, patience: dict[str, int] = PATIENCE) -> psycopg.Connection:
    connection = psycopg.connect(_conninfo(place, patience), autocommit=True)
    _adapt(connection)
    return connection


def _prepare(connection: psycopg.Connection) -> None:
    # Looked at by the pool's own threads: where the tables cannot be read, nobody else waits to find out.
    _adapt(connection)
    connection.execute("SELECT FROM users, sessions LIMIT 0")


def _adapt(connection: psycopg.Connection) -> None:
    connection.adapters.register_dumper(bytes, _HashDumper)
    connection.adapters.register_dumper(int, Int8Dumper)  # else by size, and a sum of two small ones overflows in 2038


def _migrate(connection: psycopg.Connection) -> None:
    if _version(connection) == VERSION:
        return
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s::integer, %s::integer)", MIGRATING)
        version = _version(connection)  # again: another copy may have been faster
        for step in MIGRATIONS[version - 1 :] if version else (SCHEMA.read_text(),):
            connection.execute(step.encode())
        if version:
            connection.execute("UPDATE authsvc_version SET version = %s", [VERSION])
        else:
            connection.execute("INSERT INTO authsvc_version (version) VALUES (%s)", [VERSION])


def _version(connection: psycopg.Connection) -> int:
    """Return the version of the tables, 0 where there are none."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise DatabaseRefused(f"its encoding is {encoding}: make one with createdb -T template0 -E UTF8")
    (schema,) = connection.execute("SELECT current_schema()").fetchone() or (None,)
    if schema is None:
        raise DatabaseRefused("no schema of the search_path exists")
    found = connection.execute(  # not information_schema, which takes 15 ms
        """
        SELECT relname, attname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
         WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
           AND relname IN ('authsvc_version', 'users', 'sessions', 'recovery_codes', 'known_addresses', 'throttle',
                           'throttle_secret')
        """
    ).fetchall()
    if not found:
        return 0
    if not {("authsvc_version", "version"), ("users", "email_key")} <= set(found):
        raise DatabaseRefused(f"the tables in its schema {schema} are another program's")
    (version,) = connection.execute("SELECT version FROM authsvc_version").fetchone() or (0,)
    if version > VERSION:
        raise DatabaseRefused(f"it is of a newer release (schema {version}, this one knows {VERSION})")
    return int(version)


def _locking(mode: str) -> bytes:
    return f"LOCK TABLE {', '.join(TABLES)} IN {mode} MODE".encode()


def _refuse_served(connection: psycopg.Connection, place: str) -> None:
    for _ in range(SEEN_TRIES):
        (served,) = connection.execute(
            """
            SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND application_name = 'authsvc' AND pid <> pg_backend_pid()
            """
        ).fetchone() or (0,)
        if not served:
            return
        threading.Event().wait(SEEN_INTERVAL)
    raise DatabaseRefused(
        f"{shown(place)} is in use, by {served} connections: stop the service first, all copies of it"
    )


def _refuse_unfit(table: str, row: Row) -> None:
    for column, value in zip(TABLES[table], row, strict=True):
        if isinstance(value, str) and not (is_text(value) and not (column == "hashed_password" and value[:2] == "\\x")):
            raise ValueError(f"PostgreSQL cannot keep the {column} in row {row[0]} of {table}")


def _as_given(row: Row) -> Row:
    place = TABLES["users"].index("hashed_password")
    hashed = row[place]
    if not hashed.startswith("\\x"):
        return row
    return (*row[:place], bytes.fromhex(hashed[2:]), *row[place + 1 :])


@contextmanager
def _refused(place: str) -> Iterator[None]:
    try:
        with _translating():
            yield
    except (StorageUnavailable, DatabaseRefused, psycopg.Error) as error:
        raise DatabaseRefused(f"cannot open the database {shown(place)}: {_line(error)}") from error


@contextmanager
def _translating() -> Iterator[None]:
    """Turn PostgreSQL's errors into those of database.py, and what a value or a constraint did into ValueError."""
    try:
        yield
    except (psycopg.errors.UniqueViolation, psycopg.IntegrityError, psycopg.DataError) as error:
        unique = isinstance(error, psycopg.errors.UniqueViolation)
        if unique and not (error.diag.constraint_name or "").endswith("_pkey"):
            raise AlreadyExists(_line(error)) from error
        raise ValueError(_line(error)) from error
    except (
        psycopg.OperationalError,  # gone, shut down, too many, too slow, a dead-lock; also the pool's
        psycopg.InterfaceError,  # a connection that was closed
        psycopg.errors.ReadOnlySqlTransaction,  # a replica that is not promoted yet
        psycopg.errors.IdleInTransactionSessionTimeout,
        psycopg.errors.UndefinedTable,
    ) as error:
        raise StorageUnavailable(_line(error)) from error


def _line(error: Exception) -> str:
    # Not the detail of the server's: it holds values.
    said = (error.diag.message_primary if isinstance(error, psycopg.Error) else None) or str(error)
    return "; ".join(line.strip() for line in said.splitlines() if line.strip()) or type(error).__name__
