"""The vault: all SQL of authsvc on one SQLite file. One method is one transaction.

Knows no clock, no password and no HTTP: hashes and unix seconds come in, rows go out. What a row means is
said in auth.py, what a column means in schema.sql.

One connection writes, each thread reads through one of its own. Any number of processes may share the file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from settings import Settings

ENGINE = f"SQLite {sqlite3.sqlite_version}"
SCHEMA = Path(__file__).with_name("schema.sql")

# MIGRATIONS[n - 1] lifts a file from version n to n + 1; schema.sql always makes the newest.
MIGRATIONS: tuple[str, ...] = ()
VERSION = len(MIGRATIONS) + 1

CLOCK_TOLERANCE = 300  # seconds that two readings of the clock may differ before it must have been set
BUSY_TIMEOUT = 5.0  # seconds that a write waits for another process
LOCK_INTERVAL = 0.005  # seconds between two tries for the file lock

# What callers may name. The only strings that ever enter a statement.
SOUGHT = {name: name for name in ("id", "hashed_password", "session_id", "reset_token")} | {"email": "email_key"}
CHANGED = frozenset({"email", "hashed_password", "session_id", "reset_token"})  # an id is for ever


class NoResultFound(Exception):
    """No row matches."""


class InvalidRequestError(Exception):
    """A search by a name that is no attribute of a user, or by none."""


class AlreadyExists(Exception):
    """The email has an account, perhaps in other letters."""


class StorageUnavailable(Exception):
    """The file cannot be read or written now: locked, full, damaged or gone."""


class _BucketEmpty(Exception):
    pass


class DatabaseRefused(Exception):
    """The file cannot be opened as a database of this release. Nothing in it was changed."""


@dataclass(frozen=True, slots=True)
class User:
    """One row of ``users`` as it was when it was read."""

    id: int
    email: str
    hashed_password: str | bytes = field(repr=False)
    session_id: str | None = field(default=None, repr=False)  # SHA-256 hex
    reset_token: str | None = field(default=None, repr=False)  # SHA-256 hex


class DB:
    """The users and their sessions in one SQLite file, made when it is not there. Safe to use from many threads.

    Raises:
        DatabaseRefused: the file cannot be opened, is no database, another program's, or a newer release's.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, private: bool = False) -> None:
        chosen = os.fspath(Settings.from_environ().database if path is None else path)
        self._path = os.path.abspath(chosen)
        self._write_lock = threading.Lock()
        self._readers: dict[int, sqlite3.Connection] = {}  # by thread id; a new thread with an old id takes it over
        try:
            with _opening, ExitStack() as opened:
                if chosen == ":memory:":
                    raise DatabaseRefused("threads cannot share it; give the path of a file")
                _make_private(self._path)
                if private and os.stat(self._path).st_mode & 0o077:
                    raise DatabaseRefused("other users of this machine can read it: chmod 600")
                self._writer = opened.enter_context(closing(self._connect()))
                self._check_version()  # before anything is written
                self._lock_file = os.open(self._path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                opened.callback(os.close, self._lock_file)
                with self._exclusive():
                    self._migrate()
                opened.pop_all()
        except (OSError, sqlite3.Error, StorageUnavailable, DatabaseRefused) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DatabaseRefused(f"cannot open the database {chosen}: {reason}") from error

    def close(self) -> None:
        """Write everything into the one file and let go of it. No thread may be using it then or later."""
        with self._exclusive():
            for reader in self._readers.values():
                reader.close()
            self._writer.close()  # the last one to close moves the write-ahead log into the file
        os.close(self._lock_file)

    # Users

    def add_user(self, email: str, hashed_password: str | bytes) -> User:
        """Add a user without a session.

        Raises:
            AlreadyExists: the email has an account, in whatever letter case.
            ValueError: one of them is no text.
        """
        _refuse_unfit(email=email, hashed_password=hashed_password)
        with self._transaction() as db:
            (user_id,) = db.execute(
                """
                INSERT INTO users (email, email_key, hashed_password)
                VALUES (:email, :email_key, :hashed_password)
                RETURNING id
                """,
                {"email": email, "email_key": email.casefold(), "hashed_password": hashed_password},
            ).fetchone()
        return User(user_id, email, hashed_password)

    def find_user_by(self, /, **sought: Any) -> User:
        """Return the first user in whom all the named attributes have these values; an email in any letter case.

        Raises:
            InvalidRequestError: a name that is no attribute, or none at all.
            NoResultFound: nobody matches; a value of None matches nobody.
        """
        if not sought or not sought.keys() <= SOUGHT.keys():
            raise InvalidRequestError(f"a user is found by {', '.join(sorted(SOUGHT))}")
        if not all(_can_match(name, value) for name, value in sought.items()):
            raise NoResultFound
        if "email" in sought:
            sought["email"] = sought["email"].casefold()
        where = " AND ".join(f"{SOUGHT[name]} = :{name}" for name in sought)
        row = self._read(
            f"""
            SELECT id, email, hashed_password, session_id, reset_token
              FROM users WHERE {where} ORDER BY id LIMIT 1
            """,
            sought,
        )
        if row is None:
            raise NoResultFound
        return User(*row)

    def update_user(self, /, user_id: int, **changed: Any) -> None:
        """Store new values in one user's row; None stores NULL.

        Raises:
            ValueError: a name that is no attribute, or a value that the column cannot hold.
            NoResultFound: there is no such user.
            AlreadyExists: the new email is another account's.
        """
        if not changed.keys() <= CHANGED:
            raise ValueError(f"a user has {', '.join(sorted(CHANGED))} to change")
        if not _can_match("id", user_id):
            raise NoResultFound
        _refuse_unfit(**changed)
        columns = dict(changed)
        if "email" in changed:
            columns["email_key"] = changed["email"].casefold()
        columns["id"] = user_id
        with self._transaction() as db:
            assignments = ", ".join(f"{column} = :{column}" for column in columns)
            if not db.execute(f"UPDATE users SET {assignments} WHERE id = :id", columns).rowcount:
                raise NoResultFound

    def replace_hash(self, user_id: int, old: str | bytes, new: bytes) -> None:
        """Store a new hash of the same password, unless the password has changed meanwhile."""
        with self._transaction() as db:
            db.execute(
                """
                UPDATE users SET hashed_password = :new WHERE id = :user_id AND hashed_password = :old
                """,
                {"user_id": user_id, "old": old, "new": new},
            )

    # Sessions

    def add_session(
        self,
        user_id: int,
        session_hash: str,
        *,
        verified: str | bytes,
        replaced: str | None,
        now: int,
        idle_since: int,
        expires_at: int,
        address: str,
        user_agent: str,
        most: int,
    ) -> bool:
        """Start a session if ``verified`` is still the user's password hash; say whether it is.

        Ends the ``replaced`` one, the user's dead ones, and the oldest beyond ``most``.
        """
        with self._transaction() as db:
            started = db.execute(
                """
                INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
                SELECT :session_hash, id, :now, :now, :expires_at, :address, :user_agent
                  FROM users WHERE id = :user_id AND hashed_password = :verified
                """,
                {
                    "session_hash": session_hash,
                    "user_id": user_id,
                    "verified": verified,
                    "now": now,
                    "expires_at": expires_at,
                    "address": address,
                    "user_agent": user_agent,
                },
            ).rowcount
            if not started:
                return False
            if replaced is not None:
                _end_session(db, replaced)
            db.execute(
                """
                DELETE FROM sessions
                 WHERE user_id = :user_id
                   AND id NOT IN (SELECT id FROM sessions
                                   WHERE user_id = :user_id AND expires_at > :now AND last_seen_at > :idle_since
                                   ORDER BY id DESC LIMIT :most)
                """,
                {"user_id": user_id, "now": now, "idle_since": idle_since, "most": most},
            )
            _point_at_newest_session(db, user_id)
        return True

    def find_session(self, session_hash: str, *, now: int, idle_since: int, latest: int) -> tuple[User, int] | None:
        """Return the user of a live session and when it was last seen.

        Live: not expired, seen after ``idle_since``, and with no time after ``latest``.
        """
        row = self._read(
            """
            SELECT users.id, users.email, users.hashed_password, users.session_id, users.reset_token,
                   sessions.last_seen_at
              FROM sessions JOIN users ON users.id = sessions.user_id
             WHERE sessions.session_hash = :session_hash
               AND sessions.expires_at > :now
               AND sessions.last_seen_at > :idle_since
               AND max(sessions.created_at, sessions.last_seen_at) <= :latest
            """,
            {"session_hash": session_hash, "now": now, "idle_since": idle_since, "latest": latest},
        )
        return row and (User(*row[:5]), row[5])

    def touch_session(self, session_hash: str, now: int) -> None:
        """Record that a session was used."""
        with self._transaction() as db:
            db.execute(
                """
                UPDATE sessions SET last_seen_at = :now WHERE session_hash = :session_hash AND last_seen_at < :now
                """,
                {"session_hash": session_hash, "now": now},
            )

    def end_session(self, session_hash: str) -> bool:
        """End one session; say whether there was one."""
        with self._transaction() as db:
            return _end_session(db, session_hash)

    def end_sessions(self, user_id: int) -> None:
        """End all sessions of a user."""
        with self._transaction() as db:
            _end_sessions(db, user_id)

    # Reset tokens

    def set_reset_token(self, email: str, token_hash: str, expires_at: int, kept: tuple[int, int] = (0, 0)) -> bool:
        """Give the user a reset token, unless the present one expires after ``kept[0]`` and not after ``kept[1]``."""
        with self._transaction() as db:
            changed = db.execute(
                """
                UPDATE users SET reset_token = :token_hash, reset_expires_at = :expires_at
                 WHERE email_key = :email_key
                   AND NOT coalesce(reset_expires_at > :after AND reset_expires_at <= :until, FALSE)
                """,
                {
                    "email_key": email.casefold(),
                    "token_hash": token_hash,
                    "expires_at": expires_at,
                    "after": kept[0],
                    "until": kept[1],
                },
            ).rowcount
        return changed == 1

    def find_reset(self, token_hash: str, *, now: int, latest: int) -> User | None:
        """Return the user whose reset token this is, if it expires after ``now`` and not after ``latest``."""
        row = self._read(
            """
            SELECT id, email, hashed_password, session_id, reset_token
              FROM users
             WHERE reset_token = :token_hash AND reset_expires_at > :now AND reset_expires_at <= :latest
            """,
            {"token_hash": token_hash, "now": now, "latest": latest},
        )
        return row and User(*row)

    def spend_reset(self, token_hash: str, hashed_password: bytes, *, now: int, latest: int) -> bool:
        """Set the password of the token's user, clear the token and end all sessions; say whether it was live."""
        with self._transaction() as db:
            row = db.execute(
                """
                UPDATE users
                   SET hashed_password = :hashed_password, reset_token = NULL, reset_expires_at = NULL
                 WHERE reset_token = :token_hash AND reset_expires_at > :now AND reset_expires_at <= :latest
                RETURNING id
                """,
                {"token_hash": token_hash, "hashed_password": hashed_password, "now": now, "latest": latest},
            ).fetchone()
            if row is None:
                return False
            _end_sessions(db, row[0])
        return True

    # Throttle

    def throttle_secret(self, proposed: bytes) -> bytes:
        """Return the secret of this database; the proposed one from now on where there is none yet."""
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO throttle_secret (id, secret) VALUES (1, :secret)", {"secret": proposed})
            return bytes(db.execute("SELECT secret FROM throttle_secret").fetchone()[0])

    def take(self, buckets: Sequence[tuple[str, int, int]], now: int) -> int:
        """Take one from each bucket (key, size, seconds until one is refilled) and return 0.

        When one is empty: take from none, write nothing, and return the seconds until it is worth another try.
        """
        try:
            with self._transaction() as db:
                waits = [_take(db, key, size, interval, now) for key, size, interval in buckets]
                if any(waits):
                    raise _BucketEmpty
                # Rows that have refilled say nothing; each take sweeps more than it adds.
                db.execute(
                    """
                    DELETE FROM throttle WHERE key IN (SELECT key FROM throttle WHERE full_at <= :now LIMIT 10)
                    """,
                    {"now": now},
                )
        except _BucketEmpty:  # so that the transaction is rolled back
            return max(waits)
        return 0

    def give_back(self, buckets: Sequence[tuple[str, int, int]]) -> None:
        """Put one back into each bucket."""
        with self._transaction() as db:
            db.executemany(
                """
                UPDATE throttle SET full_at = full_at - ? WHERE key = ?
                """,
                [(interval, key) for key, _, interval in buckets],
            )

    def knows_address(self, address_hash: str, since: int) -> bool:
        """Say whether somebody logged in as this account from this address after ``since``."""
        statement = "SELECT 1 FROM known_addresses WHERE address_hash = :address_hash AND seen_at > :since"
        return self._read(statement, {"address_hash": address_hash, "since": since}) is not None

    def remember_address(self, user_id: int, address_hash: str, now: int, most: int) -> None:
        """Record a login from an address; the oldest beyond ``most`` are forgotten."""
        values = {"user_id": user_id, "address_hash": address_hash, "now": now, "most": most}
        with self._transaction() as db:
            db.execute(
                """
                INSERT INTO known_addresses (user_id, address_hash, seen_at)
                SELECT id, :address_hash, :now FROM users WHERE id = :user_id
                ON CONFLICT (user_id, address_hash) DO UPDATE SET seen_at = :now
                """,
                values,
            )
            db.execute(
                """
                DELETE FROM known_addresses
                 WHERE user_id = :user_id
                   AND address_hash NOT IN (SELECT address_hash FROM known_addresses
                                             WHERE user_id = :user_id ORDER BY seen_at DESC LIMIT :most)
                """,
                values,
            )

    # The file

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path,
            timeout=BUSY_TIMEOUT,
            isolation_level=None,  # transactions are begun here, never by the driver
            check_same_thread=False,  # the writer is passed on under a lock, a reader when its thread is gone
        )
        connection.execute("PRAGMA synchronous = FULL")  # what was answered with 200 is on the disk
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA secure_delete = ON")  # a deleted row is overwritten, not only forgotten
        connection.execute("PRAGMA trusted_schema = OFF")  # a planted view or trigger calls no function
        return connection

    def _read(self, statement: str, values: dict[str, Any]) -> Any:
        thread = threading.get_ident()
        try:
            reader = self._readers.get(thread)
            if reader is None:
                reader = self._readers[thread] = self._connect()
                reader.execute("PRAGMA query_only = ON")
            return reader.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            raise _translated(error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._exclusive():
            try:
                # IMMEDIATE: a transaction that reads first and writes later fails at once when another wrote between.
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                if self._writer.in_transaction:  # some errors (disk full) have rolled back already
                    self._writer.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise _translated(error) from error
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

    def _check_version(self) -> int:
        (version,) = self._writer.execute("PRAGMA user_version").fetchone()
        (tables,) = self._writer.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if version > VERSION:
            raise DatabaseRefused(f"it is of a newer release (schema {version}, this one knows {VERSION})")
        (ours,) = self._writer.execute(
            "SELECT count(*) FROM pragma_table_info('users') WHERE name = 'email_key'"
        ).fetchone()
        if tables and not (version and ours):
            raise DatabaseRefused("it is the database of another program")
        return int(version)

    def _migrate(self) -> None:
        version = self._check_version()  # again: another process may have been faster
        self._writer.execute("PRAGMA journal_mode = WAL")
        if version < VERSION:
            steps = MIGRATIONS[version - 1 :] if version else (SCHEMA.read_text(),)
            self._writer.executescript(f"BEGIN IMMEDIATE; {''.join(steps)} PRAGMA user_version = {VERSION}; COMMIT;")


# To close any descriptor of a file gives up all locks that this process holds on it (fcntl(2)), SQLite's too: while
# one thread makes the file, no other may have it open.
_opening = threading.Lock()


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


def _can_match(name: str, value: object) -> bool:
    # SQLite would find the row 1 by '1', 1.0 and True, and fail on a lone surrogate or 2**63.
    if name == "id":
        return type(value) is int and -(2**63) <= value < 2**63
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return name == "hashed_password" and isinstance(value, bytes)


def _take(db: sqlite3.Connection, key: str, size: int, interval: int, now: int) -> int:
    # The generic cell rate algorithm (ITU-T I.371): one number a bucket, the moment when it is full again. A moment
    # far later than an empty bucket can have was written before the clock jumped back: it counts as empty but for one.
    full = now + size * interval
    values = {"key": key, "now": now, "interval": interval, "full": full, "tolerance": CLOCK_TOLERANCE}
    taken = db.execute(
        """
        INSERT INTO throttle (key, full_at) VALUES (:key, :now + :interval)
        ON CONFLICT (key) DO UPDATE SET full_at = min(max(full_at, :now) + :interval, :full)
         WHERE full_at + :interval <= :full OR full_at > :full + :tolerance
        RETURNING key
        """,
        values,
    ).fetchone()
    if taken:
        return 0
    (full_at,) = db.execute("SELECT full_at FROM throttle WHERE key = :key", values).fetchone()
    return int(full_at) + interval - full


def _refuse_unfit(**values: object) -> None:
    for name, value in values.items():
        if not (_can_match(name, value) or (value is None and name in ("session_id", "reset_token"))):
            raise ValueError(f"{name} cannot be {type(value).__name__}")


def _end_session(db: sqlite3.Connection, session_hash: str) -> bool:
    row = db.execute(
        """
        DELETE FROM sessions WHERE session_hash = :session_hash RETURNING user_id
        """,
        {"session_hash": session_hash},
    ).fetchone()
    if row is None:
        return False
    _point_at_newest_session(db, row[0])
    return True


def _end_sessions(db: sqlite3.Connection, user_id: int) -> None:
    db.execute("DELETE FROM sessions WHERE user_id = :user_id", {"user_id": user_id})
    _point_at_newest_session(db, user_id)


def _point_at_newest_session(db: sqlite3.Connection, user_id: int) -> None:
    db.execute(
        """
        UPDATE users
           SET session_id = (SELECT session_hash FROM sessions WHERE user_id = :user_id ORDER BY id DESC LIMIT 1)
         WHERE id = :user_id
        """,
        {"user_id": user_id},
    )


def _translated(error: sqlite3.Error) -> Exception:
    name = getattr(error, "sqlite_errorname", "")  # absent where Python's own driver raises
    if name == "SQLITE_CONSTRAINT_UNIQUE":
        return AlreadyExists(str(error))
    if isinstance(error, sqlite3.IntegrityError):
        return ValueError(str(error))
    if name in ("", "SQLITE_ERROR", "SQLITE_MISMATCH"):  # a mistake of ours or a value of no use: not the file's fault
        return error
    return StorageUnavailable(str(error))
