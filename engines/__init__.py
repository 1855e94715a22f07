"""Engines: how a statement reaches SQLite or PostgreSQL.

An engine knows connections, locks, timeouts and schema versions, and nothing of what the rows mean. Statements have
named parameters (``:name``) and are written once for both engines, wherever SQL allows it. The engines differ in:

- types and collations: ``schema.sql`` and ``schema_postgres.sql``; password hashes as bytes: ``rows.hash_as_given``
- locks of users, which only PostgreSQL needs: ``LOCK_USER`` and the others in ``schema.py``
- generated ids: ``LAST_ID`` and ``SET_LAST_ID`` in ``rows.py``
- how attempts are counted: ``_consume_in_turn()`` and ``_consume_together()`` in ``tables/rate_limits.py``
- connections, timeouts, errors: ``sqlite.py`` and ``postgres.py``; backup and restore: ``sqlite_files.py`` only
- text: PostgreSQL stores no NUL, see ``rows.is_storable``
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

from engines.rows import Rows
from settings import is_url

Values = dict[str, Any]


class Result(Protocol):
    """The result of a statement."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Transaction(Protocol):
    """Runs statements one after the other on one connection."""

    def execute(self, statement: str, values: Values = ..., /) -> Result: ...

    def executemany(self, statement: str, rows: Iterable[Values], /) -> Result: ...


class Engine(Protocol):
    """One open database. Safe to use from many threads.

    All methods raise StorageUnavailable if the database does not answer, AlreadyExists if a uniqueness rule is broken,
    and ValueError if another constraint is broken or a value does not fit.
    """

    name: str  # "SQLite" or "PostgreSQL"
    version: str  # the name with the version, for the log

    def read(self, statement: str, values: Values) -> Any:
        """Return the first row, or None."""

    def read_all(self, statement: str, values: Values) -> list[Any]:
        """Return all rows."""

    def read_each(self, statement: str) -> Iterator[Any]:
        """Yield the rows of one snapshot, however long the caller takes. They need not fit into memory."""

    def write(self, statement: str, values: Values) -> int:
        """Run one statement in a transaction of its own; return how many rows it changed."""

    def transaction(
        self, *, lock: str = "", values: Values | None = None, connection: Any = None
    ) -> AbstractContextManager[Transaction]:
        """Begin a transaction, commit at the end, and roll back on an exception.

        PostgreSQL first runs ``lock``, a statement with ``values``. SQLite ignores it: it has one writer at a time.
        ``connection`` is one of ``own_connection()``, to be used instead of a shared one.
        """

    def own_connection(self) -> AbstractContextManager[Any]:
        """Yield a new connection without a statement timeout, for the operator's long work."""

    def check(self) -> None:
        """Raise StorageUnavailable if the database is no longer the one that was opened."""

    def empty_log(self) -> bool:
        """Move SQLite's write-ahead log into the file and truncate it, so that it keeps no deleted row.

        Return False if somebody reads an older state of the database for longer than a moment: then try again later.
        """

    def close(self) -> None:
        """Close all connections. No other thread may use the engine then or later."""


class Operations(Protocol):
    """What the operator's commands ask of a database that is not open: the functions of a module."""

    def exists(self, database: str) -> bool:
        """Return whether there is a database, perhaps a damaged one. Raise an error where that cannot be seen."""

    def check(self, database: str) -> dict[str, list[str]]:
        """Return the problems found, by what was checked. The list under "database" is empty if it can be read."""

    def backup(self, database: str, target: str) -> None:
        """Write a copy of one snapshot to a new file."""

    def restore(self, source: str, database: str, kept: str, prepare: Callable[[str], object]) -> bool:
        """Replace the database with a prepared copy of a backup; return whether there was one, now ``kept``."""

    def open_readonly(self, database: str) -> AbstractContextManager[Transaction]:
        """Open a database to read from it, without a migration."""

    def open_source(self, database: str) -> AbstractContextManager[Rows]:
        """Migrate a database, keep everybody else from changing it, and read all of its rows."""

    def open_target(self, database: str) -> AbstractContextManager[Rows]:
        """Make a database and fill it in one transaction: at the end it holds all rows, on an error none."""


def open_engine(database: str, *, private: bool = False) -> Engine:
    """Open a database by its path or PostgreSQL URL, create it if it does not exist, and migrate it to this release.

    Raises:
        DatabaseRefused: it cannot be opened, belongs to another program or to a newer release; or ``private`` is set
            and other users of the machine can read the file.
    """
    if is_url(database):
        from engines.postgres import PostgresEngine  # only here: a file needs no psycopg

        return PostgresEngine(database)
    from engines.sqlite import SQLiteEngine

    return SQLiteEngine(database, private=private)


def operations(database: str) -> Operations:
    """Return the operator's functions for this kind of database."""
    if is_url(database):
        from engines import postgres

        return cast(Operations, postgres)
    from engines import sqlite_files

    return cast(Operations, sqlite_files)
