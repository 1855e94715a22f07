"""The strongroom: one SQLite file, who may write to it when, its versions, and copies of it.

One connection writes, under a lock that processes share; each thread reads through a connection of its own. What is
in the tables is storage.py's concern. Knows no clock, no password and no HTTP.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from settings import Settings

SCHEMA = Path(__file__).with_name("schema.sql")

# MIGRATIONS[n - 1] lifts a file from version n to n + 1; schema.sql always makes the newest.
MIGRATIONS = (
    """
    ALTER TABLE users ADD COLUMN reset_created_at INTEGER;
    ALTER TABLE users ADD COLUMN created_at INTEGER;
    ALTER TABLE users ADD COLUMN disabled_at INTEGER;
    ALTER TABLE users ADD COLUMN totp_secret TEXT;
    ALTER TABLE users ADD COLUMN totp_since INTEGER;
    ALTER TABLE users ADD COLUMN totp_step INTEGER NOT NULL DEFAULT 0;
    UPDATE users SET reset_created_at = reset_expires_at - 3600 WHERE reset_expires_at IS NOT NULL;
    CREATE TABLE recovery_codes (
        user_id   INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        code_hash TEXT NOT NULL,
        PRIMARY KEY (user_id, code_hash)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX sessions_expires_at ON sessions (expires_at);
    CREATE INDEX known_addresses_seen_at ON known_addresses (seen_at);
    """,
)
VERSION = len(MIGRATIONS) + 1

BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process
LOCK_INTERVAL = 0.005  # seconds between two tries for the file lock
LOST = "what no backup has is lost"
SHARED_LOCK = 510, 2**30 + 2  # bytes and where: what SQLite locks while it has a file open (sqlite3's os.h)


class AlreadyExists(Exception):
    """The email has an account, perhaps in other letters."""


class StorageUnavailable(Exception):
    """The database cannot be read or written now: locked, full, damaged or gone."""


class DatabaseRefused(Exception):
    """What was named cannot be opened as a database of this release. Nothing in it was changed."""


class RolledBack(Exception):
    """Raised inside a transaction to undo it."""


class Database:
    """One SQLite file with the tables of schema.sql, made when it is not there. Safe to use from many threads.

    Raises:
        DatabaseRefused: the file cannot be opened, is no database, another program's, or a newer release's.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, private: bool = False) -> None:
        chosen = os.fspath(Settings.from_environ().database if path is None else path)
        self._path = os.path.abspath(chosen)
        self._write_lock = threading.Lock()
        self._readers: dict[int, sqlite3.Connection] = {}  # by thread id; a new thread with an old id takes it over
        with _refused(f"cannot open the database {chosen}"), _opening, ExitStack() as opened:
            if chosen == ":memory:":
                raise DatabaseRefused("threads cannot share it; give the path of a file")
            _make_private(self._path)
            if private and os.stat(self._path).st_mode & 0o077:
                raise DatabaseRefused("other users of this machine can read it: chmod 600")
            self._writer = opened.enter_context(closing(connect(self._path)))
            _version(self._writer)  # before anything is written
            self._lock_file = _open_lock(self._path)
            opened.callback(os.close, self._lock_file)
            with self._exclusive():
                self._migrate()
            self._place = self._look()
            with self._transaction():
                self._place = self._look()  # the write-ahead log is there by now, too
            opened.pop_all()

    def close(self) -> None:
        """Write everything into the one file and let go of it. No thread may be using it then or later."""
        with self._exclusive():
            for reader in self._readers.values():
                reader.close()
            self._writer.close()  # the last one to close moves the write-ahead log into the file
        os.close(self._lock_file)

    @property
    def engine(self) -> str:
        """What keeps the rows, and in which version."""
        return f"SQLite {sqlite3.sqlite_version}"

    @classmethod
    def is_there(cls, place: str) -> bool:
        """Say whether there is a file."""
        return os.path.exists(place)

    @classmethod
    def check(cls, place: str) -> dict[str, list[str]]:
        """Return what is wrong with a file, and with who can read it."""
        names = [place + suffix for suffix in ("", "-wal", "-shm", ".lock")]
        readable = [name for name in names if os.path.exists(name) and os.stat(name).st_mode & 0o077]
        return {"database": problems(place), "files": [f"others can read {name}: chmod 600" for name in readable]}

    def check_place(self) -> None:
        """Look whether the file is still where it was opened; a file without a name takes every write, and keeps none.

        Raises:
            StorageUnavailable: it was deleted, replaced or cut short. What was not in a backup is lost; a start makes
                do with what is there.
        """
        found = self._look()
        for suffix, (file, size) in found.items():
            own, least = self._place[suffix]
            if own not in (None, file):
                state = "replaced" if file else "deleted"
            elif size < least and not suffix:  # nothing here shrinks it
                state = "cut short"
            else:
                continue
            lost = "the latest changes may be lost" if suffix else LOST
            raise StorageUnavailable(
                f"{self._path}{suffix} was {state} while it was served: {lost}; restart, or restore a backup"
            )
        self._place = found

    def _look(self) -> dict[str, tuple[tuple[int, int] | None, int]]:
        """Return which file is there, and its bytes."""
        places: dict[str, tuple[tuple[int, int] | None, int]] = {"": (None, 0), "-wal": (None, 0)}
        for suffix in places:
            with suppress(FileNotFoundError):
                found = os.stat(self._path + suffix)
                places[suffix] = (found.st_dev, found.st_ino), found.st_size
        return places

    def _read(self, statement: str, values: dict[str, Any]) -> Any:
        try:  # to enter translating() each time takes a tenth of a session check
            return self._reader().execute(statement, values).fetchone()
        except sqlite3.Error:
            with translating():
                raise

    def _read_all(self, statement: str, values: dict[str, Any]) -> list[Any]:
        with translating():
            return self._reader().execute(statement, values).fetchall()

    def _read_each(self, statement: str) -> Iterator[Any]:
        # A connection of its own: the rows are those of one moment, however long the caller takes.
        with translating(), closing(connect(self._path)) as reader:
            yield from reader.execute(statement)

    def _reader(self) -> sqlite3.Connection:
        thread = threading.get_ident()
        if thread not in self._readers:
            self._readers[thread] = connect(self._path)
            self._readers[thread].execute("PRAGMA query_only = ON")
        return self._readers[thread]

    def _write(self, statement: str, values: dict[str, Any]) -> int:
        with self._transaction() as db:
            return db.execute(statement, values).rowcount

    @contextmanager
    def _transaction(self, **_whose: object) -> Iterator[sqlite3.Connection]:  # one at a time, whosoever it is about
        with self._exclusive(), translating():
            try:
                # IMMEDIATE: a transaction that reads first and writes later fails at once when another wrote between.
                self._writer.execute("BEGIN IMMEDIATE")
                self.check_place()
                yield self._writer
                self._writer.execute("COMMIT")
                self.check_place()  # again, as nobody may be told of a write that went into a file without a name
            except BaseException:
                if self._writer.in_transaction:  # some errors (disk full) have rolled back already
                    self._writer.execute("ROLLBACK")
                raise

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        # The file lock: SQLite 3.7.0 to 3.51.2 can damage the file when two connections write and checkpoint at
        # the same moment (fixed in 3.51.3), so one process at a time does either.
        if not self._write_lock.acquire(timeout=BUSY_TIMEOUT):
            raise StorageUnavailable("another thread keeps the write lock")
        try:
            _lock(self._lock_file)
            yield
        finally:
            fcntl.flock(self._lock_file, fcntl.LOCK_UN)
            self._write_lock.release()

    def _migrate(self) -> None:
        version = _version(self._writer)  # again: another process may have been faster
        self._writer.execute("PRAGMA journal_mode = WAL")
        if version < VERSION:
            steps = MIGRATIONS[version - 1 :] if version else (SCHEMA.read_text(),)
            self._writer.executescript(f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version = {VERSION}; COMMIT;")


def backup(place: str, target: str) -> None:
    """Write a copy of one moment of a database to a new file for its owner only, while others read and write.

    Raises:
        DatabaseRefused: there is a file of this name already, it cannot be written, or the database is damaged.
    """
    with (
        _refused(f"cannot write the backup {target}"),
        closing(connect(place, "ro")) as source,
        _partial(target) as partial,
    ):
        _copy(source, partial)
        os.link(partial, target)  # unlike rename() it replaces nothing
        _sync(target)


def restore(source: str, place: str, former: str, prepare: Callable[[str], object] | None = None) -> bool:
    """Put a backup in the place of the database; say whether there was one, which is then kept as ``former``.

    ``prepare`` gets the name of the copy before it is put there. Ended by force it leaves the one or the other, whole.

    Raises:
        DatabaseRefused: the backup is no whole database of this release or an older one; the place is in use.
    """
    with _refused(f"cannot restore {source}"), ExitStack() as opened:
        if faults := problems(source):
            raise DatabaseRefused(faults[0])
        partial = opened.enter_context(_partial(place))
        with closing(connect(source, "ro")) as backed_up:
            _copy(backed_up, partial)
        if prepare:
            prepare(partial)
        lock_file = _open_lock(place)
        opened.callback(os.close, lock_file)
        _lock(lock_file)
        replaced = os.path.exists(place) and os.path.getsize(place) > 0
        if replaced and (target := _claimed(place)):
            opened.enter_context(closing(target))
            kept = opened.enter_context(_partial(former))
            _copy(target, kept)
            os.link(kept, former)
            with closing(connect(partial)) as prepared:
                prepared.backup(target)  # one transaction, with a journal
            return True
        # What is damaged is set aside as it is. Its logs must go first: SQLite would apply them to the new file.
        for suffix in ("-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                os.rename(place + suffix, former + suffix)
        if replaced:
            os.link(place, former)
        os.replace(partial, place)
        _sync(place)
        return replaced


@contextmanager
def seized(path: str) -> Iterator[sqlite3.Connection]:
    """Hold a whole database that nobody else can open meanwhile. What is no UTF-8 in it is read as lone surrogates.

    Raises:
        DatabaseRefused: it is in use or damaged.
    """
    with ExitStack() as opened:
        with _refused(f"cannot copy the database {path}"):
            lock_file = _open_lock(path)
            opened.callback(os.close, lock_file)
            _lock(lock_file)  # to claim it moves the write-ahead log into the file
            connection = _claimed(path)
            if connection is None:
                raise DatabaseRefused("; ".join(problems(path)) or "it is not a database")
            opened.enter_context(closing(connection))
        connection.text_factory = lambda text: text.decode(errors="surrogateescape")
        yield connection


@contextmanager
def new_file(path: str) -> Iterator[str]:
    """Lend the name of an empty file, which has its right name when the caller is through with it, and never before.

    Raises:
        DatabaseRefused: there is a file of this name already, or it cannot be made.
    """
    what = f"cannot make the database {path}"
    with ExitStack() as opened:
        with _refused(what):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            partial = opened.enter_context(_partial(path))
        yield partial
        with _refused(what):
            os.link(partial, path)  # unlike rename() it replaces nothing
            _sync(path)


def problems(path: str) -> list[str]:
    """Return what is wrong with a file as a database of ours, and change nothing; nothing when all is well."""
    try:
        if os.path.getsize(path) < 512:
            return ["it is not a database"]
        with closing(connect(path, "ro")) as db:
            return _faults(db)
    except (OSError, sqlite3.Error) as error:
        return [_reason(error)]


# To close any descriptor of a file gives up all locks that this process holds on it (fcntl(2)), SQLite's too: while
# one thread makes the file, no other may have it open.
_opening = threading.Lock()


def connect(path: str, mode: str = "rw") -> sqlite3.Connection:
    """Open a file that is there, "rw" or "ro"."""
    connection = sqlite3.connect(
        f"file:{quote(os.path.abspath(path))}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT,
        isolation_level=None,  # transactions are begun here, never by the driver
        check_same_thread=False,  # the writer is passed on under a lock, a reader when its thread is gone
    )
    connection.execute("PRAGMA synchronous = FULL")  # what was answered with 200 is on the disk
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = ON")  # a deleted row is overwritten, not only forgotten
    connection.execute("PRAGMA trusted_schema = OFF")  # a planted view or trigger calls no function
    return connection


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if version > VERSION:
        raise DatabaseRefused(f"it is of a newer release (schema {version}, this one knows {VERSION})")
    (ours,) = db.execute("SELECT count(*) FROM pragma_table_info('users') WHERE name = 'email_key'").fetchone()
    if tables and not (version and ours):
        raise DatabaseRefused("it is the database of another program")
    return int(version)


def _faults(db: sqlite3.Connection) -> list[str]:
    try:
        if not _version(db):
            return ["it is not a database of this program"]
    except DatabaseRefused as error:
        return [str(error)]
    found = [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
    return found + [f"a row of {row[0]} hangs on nothing" for row in db.execute("PRAGMA foreign_key_check")]


def _claimed(path: str) -> sqlite3.Connection | None:
    """Return a connection that nobody else can be beside, or None when the file is damaged or a newer release's."""
    with open(path, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *SHARED_LOCK)  # also on what SQLite cannot read any more
        except OSError:
            raise DatabaseRefused("the database is in use: stop the service first") from None
    if os.path.getsize(path) < 512:
        return None
    with ExitStack() as opened:
        try:
            target = opened.enter_context(closing(connect(path)))
            # Whoever has a database in WAL mode open keeps a shared lock on it: this fails while a service runs.
            target.execute("PRAGMA locking_mode = EXCLUSIVE")
            target.execute("PRAGMA journal_mode = DELETE")
            target.execute("BEGIN EXCLUSIVE")
            target.execute("ROLLBACK")
            if _faults(target):
                return None
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorname in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
                return None
            raise DatabaseRefused("the database is in use: stop the service first") from error
        opened.pop_all()
        return target


@contextmanager
def _partial(path: str) -> Iterator[str]:
    """Lend the name of an empty file beside ``path``, and delete what has that name in the end."""
    folder, name = os.path.split(os.path.abspath(path))
    file, partial = tempfile.mkstemp(prefix=f".{name}.", dir=folder)  # 0600
    os.close(file)
    try:
        yield partial
    finally:
        for suffix in ("", "-wal", "-shm", ".lock"):
            with suppress(FileNotFoundError):
                os.unlink(partial + suffix)


def _copy(source: sqlite3.Connection, path: str) -> None:
    """Fill an empty file with a whole copy, checked and on the disk."""
    with closing(sqlite3.connect(path)) as target:
        source.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")  # so that it is one file
    if faults := problems(path):  # of the source: else bad copies would replace the good ones, unnoticed
        raise DatabaseRefused(faults[0])
    _sync(path)


def _sync(path: str) -> None:
    """Have a file and its name on the disk. No database that is open: see _opening."""
    for place in (path, os.path.dirname(os.path.abspath(path))):
        file = os.open(place, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def _open_lock(path: str) -> int:
    return os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(file: int) -> None:
    for _ in range(int(BUSY_TIMEOUT / LOCK_INTERVAL)):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            threading.Event().wait(LOCK_INTERVAL)
    raise StorageUnavailable("another process holds the write lock")


def _make_private(path: str) -> None:
    # SQLite would make it 0644; -wal and -shm take the mode of the file.
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):  # not open(): see _opening
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        if 0 < os.path.getsize(path) < 512:  # less than a page, which SQLite would take for nothing and write over
            raise DatabaseRefused("it is not a database") from None


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.Error, StorageUnavailable, DatabaseRefused) as error:
        raise DatabaseRefused(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (error.strerror or "" if isinstance(error, OSError) else str(error)) or type(error).__name__


@contextmanager
def translating() -> Iterator[None]:
    """Turn SQLite's errors into those of this module, and what a value or a constraint did into ValueError."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")  # absent where Python's own driver raises
        if name == "SQLITE_CONSTRAINT_UNIQUE":
            raise AlreadyExists(str(error)) from error
        if isinstance(error, sqlite3.IntegrityError):
            raise ValueError(str(error)) from error
        if "no such table" in str(error) or name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):  # emptied, damaged
            raise StorageUnavailable(f"{error}: {LOST}; restore one") from error
        if name in ("", "SQLITE_ERROR", "SQLITE_MISMATCH"):  # a mistake of ours or a value of no use: not the file's
            raise
        raise StorageUnavailable(str(error)) from error
