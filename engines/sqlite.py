"""The SQLite engine: one file, one connection that writes, and a connection for each thread that reads.

A lock file keeps processes from writing at the same time. SQLite 3.7.0 to 3.51.2 can damage a file when two
connections write and checkpoint at the same moment (fixed in 3.51.3).
"""

import errno
import fcntl
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from urllib.parse import quote

from engines.errors import AlreadyExists, DatabaseRefused, StorageUnavailable
from engines.schema import SQLITE_MIGRATIONS, SQLITE_SCHEMA, SQLITE_VERSION

BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process
CHECKPOINT_TIMEOUT = 100  # milliseconds that emptying the write-ahead log waits for readers, and writers for it
LOCK_INTERVAL = 0.005  # seconds between two tries for the file lock
MIN_FILE_BYTES = 512  # the smallest page of SQLite
DATA_LOSS = "changes since the last backup are lost"

# Closing any file descriptor of a file gives up all locks that this process holds on it (fcntl(2)), SQLite's own too.
# So no two threads open a database at the same time.
_opening = threading.Lock()


class SQLiteEngine:
    """One SQLite file, made when it does not exist. Safe to use from many threads; see engines.Engine.

    Raises:
        DatabaseRefused: the file cannot be opened, is no database, belongs to another program or to a newer release;
            or ``private`` is set and other users of this machine can read it.
    """

    name = "SQLite"
    version = f"SQLite {sqlite3.sqlite_version}"

    def __init__(self, database: str, *, private: bool = False) -> None:
        self._path = os.path.abspath(database)
        # SQLite follows symbolic links, and names the write-ahead log after the file itself.
        self._paths = {"": self._path, "-wal": os.path.realpath(self._path) + "-wal"}
        self._write_lock = threading.Lock()
        self._thread = threading.local()
        self._readers: weakref.WeakSet[sqlite3.Connection] = weakref.WeakSet()
        with refused(f"cannot open the database {database}"), _opening, ExitStack() as opened:
            _check_library()
            if database == ":memory:":
                raise DatabaseRefused("threads cannot share it: give the path of a file")
            _create_private(self._path)
            if private and os.stat(self._path).st_mode & 0o077:
                raise DatabaseRefused("other users of this machine can read it: chmod 600")
            # Before it is opened: a restore may replace it in between. Not the log: another process that closes the
            # database deletes it.
            self._files = self._stat_files() | {"-wal": (None, 0)}
            self._writer = opened.enter_context(closing(connect_first(self._path)))
            schema_version(self._writer)  # before anything is written
            self._lock_file = open_lock_file(self._path)
            opened.callback(os.close, self._lock_file)
            with self._exclusive():
                self.check()
                self._migrate()
            with self.transaction():
                self._files = self._stat_files()  # by now there is a write-ahead log, too
            opened.pop_all()

    def read(self, statement: str, values: dict[str, Any]) -> Any:
        try:  # entering translated_errors() for each statement would take a tenth of a session check
            return self._reader().execute(statement, values).fetchone()
        except sqlite3.Error:
            with translated_errors():
                raise

    def read_all(self, statement: str, values: dict[str, Any]) -> list[Any]:
        with translated_errors():
            return self._reader().execute(statement, values).fetchall()

    def read_each(self, statement: str) -> Iterator[Any]:
        with self.own_connection() as reader:
            yield from reader.execute(statement)

    def write(self, statement: str, values: dict[str, Any]) -> int:
        with self.transaction() as db:
            return db.execute(statement, values).rowcount

    @contextmanager
    def transaction(
        self, *, lock: str = "", values: dict[str, Any] | None = None, connection: sqlite3.Connection | None = None
    ) -> Iterator[sqlite3.Connection]:
        del lock, values  # there is one writer at a time
        writer = connection or self._writer
        with self._exclusive():
            try:
                self.check()
                # IMMEDIATE: a transaction that reads before it writes fails at once if another wrote in between.
                writer.execute("BEGIN IMMEDIATE")
                yield writer
                writer.execute("COMMIT")
                self.check()  # again: no write into a file that was deleted meanwhile may count as done
            except BaseException:
                with translated_errors():
                    if writer.in_transaction:  # some errors, such as a full disk, have rolled back already
                        writer.execute("ROLLBACK")
                    raise

    @contextmanager
    def own_connection(self) -> Iterator[sqlite3.Connection]:
        with translated_errors(), closing(connect(self._path)) as connection:
            yield connection

    def check(self) -> None:
        """Raise StorageUnavailable where the file or its write-ahead log was deleted, replaced or cut short.

        Writes to a deleted file succeed and are lost.
        """
        known = self._files  # first: another thread may record a larger file after this one has looked
        found = self._stat_files()
        if found == known:
            return
        for suffix, (file, size) in found.items():
            opened, min_size = known[suffix]
            if opened not in (None, file):
                state = "replaced" if file else "deleted"
            elif size < min_size and not suffix:  # the service never shrinks it
                state = "cut short"
            else:
                continue
            loss = "the latest changes may be lost" if suffix else DATA_LOSS
            remedy = "restart, or restore a backup"
            raise StorageUnavailable(f"{self._paths[suffix]} was {state} while it was in use: {loss}; {remedy}")
        self._files = found

    def empty_log(self) -> bool:
        with self._exclusive(), translated_errors():
            self.check()
            self._writer.execute(f"PRAGMA busy_timeout = {CHECKPOINT_TIMEOUT}")
            try:
                (busy, _, _) = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._writer.execute(f"PRAGMA busy_timeout = {round(BUSY_TIMEOUT * 1000)}")
            return not busy

    def close(self) -> None:
        with self._exclusive():
            for reader in list(self._readers):
                reader.close()
            self._writer.close()  # the last connection to close moves the write-ahead log into the file
        os.close(self._lock_file)

    def _stat_files(self) -> dict[str, tuple[tuple[int, int] | None, int]]:
        """Return the identity (device and inode) and the size of the file and of its write-ahead log."""
        return {suffix: _stat(path) for suffix, path in self._paths.items()}

    def _reader(self) -> sqlite3.Connection:
        try:
            reader: sqlite3.Connection = self._thread.reader
        except AttributeError:
            # A new connection would read a replaced file. Of a deleted one SQLite says only that it cannot open it.
            self.check()
            reader = connect(self._path, factory=_Reader)
            reader.execute("PRAGMA query_only = ON")
            self._thread.reader = reader
            self._readers.add(reader)
        return reader

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._write_lock.acquire(timeout=BUSY_TIMEOUT):
            raise StorageUnavailable("another thread holds the write lock")
        try:
            lock(self._lock_file)
            yield
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)
            self._write_lock.release()

    def _migrate(self) -> None:
        version = schema_version(self._writer)  # again: another process may have migrated it meanwhile
        self._writer.execute("PRAGMA journal_mode = WAL")
        if version < SQLITE_VERSION:
            steps = SQLITE_MIGRATIONS[version - 1 :] if version else (SQLITE_SCHEMA.read_text(encoding="utf-8"),)
            statement = f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version = {SQLITE_VERSION}; COMMIT;"
            self._writer.executescript(statement)


class _Reader(sqlite3.Connection):
    """A thread's connection for reading. It is closed when the thread ends."""

    def __del__(self) -> None:
        self.close()  # from Python 3.13 on, sqlite3 warns of a connection that is deleted while it is open


def _stat(path: str) -> tuple[tuple[int, int] | None, int]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None, 0
    return (found.st_dev, found.st_ino), found.st_size


def connect_first(path: str) -> sqlite3.Connection:
    """Open a file that no other connection of this process has open."""
    connect(path, "ro").close()  # of a damaged file, a connection that may write deletes the log when it is closed
    return connect(path)


def connect(path: str, mode: str = "rw", factory: type[sqlite3.Connection] = sqlite3.Connection) -> sqlite3.Connection:
    """Open a file that exists, for "rw" or "ro"."""
    _check_library()
    uri = f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode={mode}"  # the bytes that open() takes in this locale
    # Transactions are begun by statements, never by the driver. The writer is shared under a lock.
    options: dict[str, Any] = {"timeout": BUSY_TIMEOUT, "isolation_level": None, "check_same_thread": False}
    connection = sqlite3.connect(uri, uri=True, factory=factory, **options)
    try:
        connection.execute("PRAGMA synchronous = FULL")  # a write that was answered with 200 is on disk
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # deleted rows are overwritten
        connection.execute("PRAGMA trusted_schema = OFF")  # a view or trigger that was planted cannot call functions
    except BaseException:
        connection.close()
        raise
    return connection


def _check_library() -> None:
    if sqlite3.sqlite_version_info < (3, 37):  # the first with STRICT tables
        raise DatabaseRefused(f"it needs SQLite 3.37 or newer, this is {sqlite3.sqlite_version}")


def schema_version(db: sqlite3.Connection) -> int:
    """Return the version of the schema, 0 for an empty file.

    Raises:
        DatabaseRefused: it belongs to another program or to a newer release.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if version > SQLITE_VERSION:
        raise DatabaseRefused(f"it is of a newer release (schema {version}, this one supports {SQLITE_VERSION})")
    (ours,) = db.execute("SELECT count(*) FROM pragma_table_info('users') WHERE name = 'email_key'").fetchone()
    if tables and not (version and ours):
        raise DatabaseRefused("it is the database of another program")
    return int(version)


def open_lock_file(path: str) -> int:
    """Open the lock file of a database, which stays when the database is deleted. All links to it share one."""
    name = os.path.realpath(path) + ".lock"
    try:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DatabaseRefused(f"the lock file {name}: {reason(error)}") from error


def lock(lock_file: int) -> None:
    """Take the write lock that processes share.

    Raises:
        StorageUnavailable: another process held it for BUSY_TIMEOUT.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_INTERVAL)
    raise StorageUnavailable("another process holds the write lock")


@contextmanager
def refused(action: str) -> Iterator[None]:
    """Turn an error into DatabaseRefused, with what could not be done."""
    try:
        yield
    except (OSError, sqlite3.Error, StorageUnavailable, DatabaseRefused) as error:
        raise DatabaseRefused(f"{action}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the text of an error without the path, which the message names already."""
    return (error.strerror or "" if isinstance(error, OSError) else str(error)) or type(error).__name__


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn SQLite's errors into those of engines.errors, and a broken constraint or a bad value into ValueError."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", "")  # absent where Python's own driver raises
        if code == "SQLITE_CONSTRAINT_UNIQUE":
            raise AlreadyExists(str(error)) from error
        if isinstance(error, sqlite3.IntegrityError):
            raise ValueError(str(error)) from error
        if "no such table" in str(error) or code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):  # emptied, damaged
            raise StorageUnavailable(f"{error}: {DATA_LOSS}; restore a backup") from error
        if code in ("", "SQLITE_ERROR", "SQLITE_MISMATCH"):  # a mistake of ours, or a value of a wrong type
            raise
        raise StorageUnavailable(str(error)) from error


def _create_private(path: str) -> None:
    # SQLite would create it with mode 0644. The write-ahead log takes the mode of the file.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        try:
            os.stat(path)
        except FileNotFoundError:  # not created: the file that it named is lost, or on a disk that is not mounted
            raise DatabaseRefused(f"it is a symbolic link to {os.path.realpath(path)}, which does not exist") from None
        if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):  # not open(): see _opening
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        if 0 < os.path.getsize(path) < MIN_FILE_BYTES:  # SQLite would take it for empty and overwrite it
            raise DatabaseRefused("it is not a database") from None
