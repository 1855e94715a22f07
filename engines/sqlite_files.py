"""The operator's functions for a SQLite file: check, backup, restore, copying. See engines.Operations."""

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

from engines import sqlite
from engines.errors import DatabaseRefused
from engines.rows import Rows
from engines.sqlite import SQLiteEngine, connect

IN_USE = "the database is in use: stop the service first"


def exists(database: str) -> bool:
    """Return whether there is a file.

    Raises:
        OSError: its folder cannot be read.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        return bool(os.stat(database))
    return False


def check(database: str) -> dict[str, list[str]]:
    """Return what is wrong with the file, and which of its files other users can read."""
    file = os.path.realpath(database)  # beside which SQLite makes the others, whatever symbolic link names it
    names = [file + suffix for suffix in ("", "-wal", "-shm", ".lock")]
    readable = [name for name in names if os.path.exists(name) and os.stat(name).st_mode & 0o077]
    return {"database": problems(database), "files": [f"other users can read {name}: chmod 600" for name in readable]}


def backup(database: str, target: str) -> None:
    """Write a copy of one snapshot to a new file with mode 0600, while others read and write.

    Raises:
        DatabaseRefused: the target exists, it cannot be written, or the database is damaged.
    """
    with sqlite.refused(f"cannot write the backup {target}"), _temporary_file(target) as temporary:
        _copy(database, temporary)
        _publish(temporary, target)


def restore(source: str, database: str, kept: str, prepare: Callable[[str], object]) -> bool:
    """Replace the database with a backup; return whether there was one, which is then kept under the name ``kept``.

    Users that are added later get ids that neither of the two has given. ``prepare`` is called with the path of the
    copy before it replaces the database. If the process is killed, either
    the old or the new database is there, complete; ``kept`` may then be a second name or a copy of the old one.

    ``kept`` must be on the same file system as the file itself, to which ``database`` may be a symbolic link.

    Raises:
        DatabaseRefused: the backup is damaged, or of a newer release; or the database is in use.
    """
    with sqlite.refused(f"cannot restore {source}"), ExitStack() as opened:
        database = os.path.realpath(database)
        if found := problems(source):
            raise DatabaseRefused(found[0])
        temporary = opened.enter_context(_temporary_file(database))
        _copy(source, temporary)
        prepare(temporary)
        with _open_exclusively(temporary):
            pass  # moves a write-ahead log into the file: closing a database ignores a full disk, and leaves one
        _hold_lock(database, opened)
        replaced = os.path.exists(database) and os.path.getsize(database) > 0
        if replaced:
            _number_users_after(_merge_log(database), temporary)
            _copy_owner(database, temporary)
            _keep(database, kept)
        # A log that is left belongs to a damaged database. SQLite would apply it to the new one.
        for suffix in ("-wal", "-shm", "-journal"):
            with suppress(FileNotFoundError):
                os.rename(database + suffix, kept + suffix)
        os.replace(temporary, database)
        _sync(database)
        return replaced


def open_readonly(database: str) -> closing[sqlite3.Connection]:
    """Open a database to read from it, without a migration."""
    return closing(connect(database, "ro"))


@contextmanager
def open_source(database: str) -> Iterator[Rows]:
    """Migrate a database, keep everybody else from opening it, and read all of its rows.

    Text that is not UTF-8 is read as lone surrogates.

    Raises:
        DatabaseRefused: it is in use or damaged.
    """
    SQLiteEngine(database).close()
    with ExitStack() as opened:
        with sqlite.refused(f"cannot copy the database {database}"):
            _hold_lock(database, opened)
            connection = opened.enter_context(_open_exclusively(database))  # moves the write-ahead log into the file
            if found := _problems(connection):
                raise DatabaseRefused("; ".join(found))
        connection.text_factory = lambda text: text.decode(errors="surrogateescape")
        with sqlite.translated_errors():
            yield Rows(SQLiteEngine.name, connection, connection.execute)


@contextmanager
def open_target(database: str) -> Iterator[Rows]:
    """Make a new file and fill it in one transaction. It gets its name at the end, and never on an error.

    Raises:
        DatabaseRefused: there is a file of this name already, or it cannot be made.
    """
    action = f"cannot make the database {database}"
    with ExitStack() as opened:
        with sqlite.refused(action):
            if os.path.lexists(database):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            temporary = opened.enter_context(_temporary_file(database))
        with closing(SQLiteEngine(temporary)) as engine, engine.transaction() as connection:
            yield Rows(SQLiteEngine.name, connection, connection.execute)
        with sqlite.refused(action):
            _publish(temporary, database)


def problems(path: str) -> list[str]:
    """Return what is wrong with a file as a database of this service. It is not changed."""
    try:
        if os.path.getsize(path) < sqlite.MIN_FILE_BYTES or os.path.isdir(path):
            return ["it is not a database"]
        with closing(connect(path, "ro")) as db:
            return _problems(db)
    except (OSError, sqlite3.Error, DatabaseRefused) as error:
        return [sqlite.reason(error)]


def _problems(db: sqlite3.Connection) -> list[str]:
    if not sqlite.schema_version(db):
        return ["it is not a database of this service"]
    found = [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
    return found + [f"foreign key violation in {row[0]}" for row in db.execute("PRAGMA foreign_key_check")]


def _hold_lock(database: str, opened: ExitStack) -> None:
    """Take the write lock of a database until ``opened`` is closed."""
    lock_file = sqlite.open_lock_file(database)
    opened.callback(os.close, lock_file)
    sqlite.lock(lock_file)


@contextmanager
def _open_exclusively(database: str) -> Iterator[sqlite3.Connection]:
    """Open a database that nobody else has open, and keep everybody else from opening it."""
    with closing(sqlite.connect_first(database)) as connection:
        try:
            # Every process that has a database in WAL mode open holds a shared lock on it, so this fails while a
            # service runs.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = DELETE")
            connection.execute("BEGIN EXCLUSIVE")
            connection.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY"):  # a full disk, for example
                raise
            raise DatabaseRefused(IN_USE) from error
        yield connection


def _merge_log(database: str) -> int:
    """Move the write-ahead log into the file, and return the last id of a user; unless the database is damaged."""
    if os.path.getsize(database) < sqlite.MIN_FILE_BYTES:  # SQLite might take it for empty, and delete the log
        return 0
    try:
        with _open_exclusively(database) as connection:
            return Rows(SQLiteEngine.name, connection, connection.execute).last_id("users")
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorname", "") not in ("SQLITE_NOTADB", "SQLITE_CORRUPT", "SQLITE_ERROR"):
            raise  # SQLITE_ERROR: it has no table of users
    return 0


def _number_users_after(last_id: int, path: str) -> None:
    """Give the next user of a database a higher id: applications may keep data under those that were given."""
    with closing(sqlite3.connect(path)) as connection:
        rows = Rows(SQLiteEngine.name, connection, connection.execute)
        if last_id > rows.last_id("users"):
            rows.set_last_id("users", last_id)
            connection.commit()
    _sync(path)


@contextmanager
def _temporary_file(path: str) -> Iterator[str]:
    """Yield the path of an empty file with mode 0600 beside ``path``, and delete it at the end."""
    folder, name = os.path.split(os.path.abspath(path))
    file, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    os.close(file)
    try:
        yield temporary
    except DatabaseRefused as error:  # the operator knows only the other name
        raise DatabaseRefused(str(error).replace(temporary, path)) from error.__cause__
    finally:
        for suffix in ("", "-wal", "-shm", ".lock"):
            with suppress(FileNotFoundError):
                os.unlink(temporary + suffix)


def _publish(temporary: str, path: str) -> None:
    if not _link(temporary, path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # fails where the name is taken
        os.replace(temporary, path)
    _sync(path)


def _keep(database: str, kept: str) -> None:
    """Give a closed database a second name, or copy it where the file system has no hard links."""
    if not _link(database, kept):
        with _temporary_file(kept) as temporary:
            shutil.copyfile(database, temporary)
            _copy_owner(database, temporary)
            _sync(temporary)
            _publish(temporary, kept)


def _link(path: str, name: str) -> bool:
    """Give a file a second name; return False where it is taken or the file system has no hard links, such as exFAT."""
    with suppress(OSError):
        os.link(path, name)  # unlike rename() it never replaces a file
        return True
    return False


def _copy_owner(database: str, path: str) -> None:
    if os.geteuid() == 0:  # the file must stay readable for the service's user
        owner = os.stat(database)
        # The user may own the folder, too, and must not have root change the owner of another file.
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _copy(source: str, path: str) -> None:
    """Fill an empty file with a complete copy of a database, check it, and flush it to disk."""
    with closing(connect(source, "ro")) as original, closing(sqlite3.connect(path)) as target:
        original.backup(target)
        target.execute("PRAGMA journal_mode = DELETE")  # so that it is one file
    if found := problems(path):  # else backups of a damaged database would replace the good ones, unnoticed
        raise DatabaseRefused(found[0])
    _sync(path)


def _sync(path: str) -> None:
    """Flush a file and its name to disk. It must not be open as a database: closing it here gives up SQLite's locks."""
    for name in (path, os.path.dirname(os.path.abspath(path))):
        file = os.open(name, os.O_RDONLY)
        os.fsync(file)
        os.close(file)
