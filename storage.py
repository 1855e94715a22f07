"""The vault: all SQL of authsvc. One method is one transaction.

Knows no clock, no password and no HTTP: hashes and unix seconds come in, rows go out. What a row means is
said in auth.py, what a column means in schema.sql. The statements are those that every engine reads in the same way;
how they get there, and what an engine must say otherwise, is database.py's for SQLite, storage_postgres.py's for
PostgreSQL.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from database import Database, RolledBack, backup, connect, new_file, restore, seized, translating
from settings import is_url

if TYPE_CHECKING:
    import sqlite3

CLOCK_TOLERANCE = 300  # seconds that two readings of the clock may differ before it must have been set

IDS = -(2**63), 2**63  # from, and below which, an engine can hold them

# What callers may name. The only strings that ever enter a statement.
SOUGHT = {name: name for name in ("id", "hashed_password", "session_id", "reset_token")} | {"email": "email_key"}
CHANGED = frozenset({"email", "hashed_password", "session_id", "reset_token"})  # an id is for ever
USER = """users.id, users.email, users.hashed_password, users.session_id, users.reset_token,
               users.created_at, users.disabled_at, users.totp_secret, users.totp_since"""

# All that a database holds: each table after those that its rows hang on, each with its columns, of which the first two
# tell its rows apart and order them in the same way on all engines.
TABLES = {
    "users": (
        *("id", "email", "email_key", "hashed_password", "session_id", "reset_token", "reset_expires_at"),
        *("reset_created_at", "created_at", "disabled_at", "totp_secret", "totp_since", "totp_step"),
    ),
    "sessions": (
        *("id", "session_hash", "user_id", "created_at", "last_seen_at", "expires_at", "address", "user_agent"),
    ),
    "recovery_codes": ("user_id", "code_hash"),
    "known_addresses": ("user_id", "address_hash", "seen_at"),
    "throttle": ("key", "full_at"),
    "throttle_secret": ("id", "secret"),
}
NUMBERED = "users", "sessions"  # those that number their rows, and give no number twice

REPLACE_HASH = "UPDATE users SET hashed_password = :new WHERE id = :user_id AND hashed_password = :old"

# Of the users that were laid aside in a table of one connection's own, beside their numbers.
TAKEN = """
    SELECT number FROM staged WHERE email_key IN (SELECT email_key FROM users)
    UNION
    SELECT number FROM (SELECT number, row_number() OVER (PARTITION BY email_key ORDER BY number) AS nth
                          FROM staged) AS beside WHERE nth > 1
    ORDER BY number
"""
ADD_STAGED = """
    INSERT INTO users (email, email_key, hashed_password, created_at, disabled_at, totp_secret, totp_since)
    SELECT email, email_key, hashed_password, created_at, disabled_at, totp_secret, totp_since
      FROM staged ORDER BY number
"""


class NoResultFound(Exception):
    """No row matches."""


class InvalidRequestError(Exception):
    """A search by a name that is no attribute of a user, or by none."""


@dataclass(frozen=True, slots=True)
class User:
    """One row of ``users`` as it was when it was read."""

    id: int
    email: str
    hashed_password: str | bytes = field(repr=False)
    session_id: str | None = field(default=None, repr=False)  # SHA-256 hex
    reset_token: str | None = field(default=None, repr=False)  # SHA-256 hex
    created_at: int | None = None  # unix seconds, as all times
    disabled_at: int | None = None
    totp_secret: str | None = field(default=None, repr=False)
    totp_since: int | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """One row of ``sessions`` as it was when it was read."""

    session_hash: str = field(repr=False)  # SHA-256 hex
    created_at: int
    last_seen_at: int
    expires_at: int
    address: str
    user_agent: str

    @property
    def id(self) -> str:
        """What it is called in public."""
        return public_id(self.session_hash)


def public_id(session_hash: str) -> str:
    """Return enough of a digest to tell a user's sessions apart, and no way to the secret."""
    return session_hash[:16]


class Result(Protocol):
    """What a statement brought."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Statements(Protocol):
    """What a transaction runs its statements on; their parameters are named."""

    def execute(self, statement: str, values: dict[str, Any] = ..., /) -> Result: ...

    def executemany(self, statement: str, rows: Iterable[dict[str, Any]], /) -> object: ...


Row = tuple[Any, ...]  # the columns of TABLES; a hash is text or bytes as it was given


class Rows(Protocol):
    """All rows of a database while nobody else changes them."""

    def each(self, table: str) -> Generator[Row, None, None]:
        """Return the rows of a table, one by one, in the order of their keys."""

    def add(self, table: str, rows: Iterable[Row]) -> None:
        """Add rows with the numbers that they have.

        Raises:
            ValueError: one cannot be kept; the message says which, and nothing of what is in it.
            AlreadyExists: two have the same email or the same secret.
        """

    def last_id(self, table: str) -> int:
        """Return the highest number that a row of the table ever had; 0 when there was none."""

    def go_on_after(self, table: str, last_id: int) -> None:
        """Give the next row of the table a number after this one."""


class Store(ABC):
    """The users and their sessions, on whatever engine. Safe to use from many threads.

    What an engine brings stands first; the rest is the same on all.
    """

    @abstractmethod
    def __init__(self, place: str, *, private: bool = False) -> None:
        """Open the database, and make it where there is none: see open_store()."""

    @property
    @abstractmethod
    def engine(self) -> str:
        """What keeps the rows, and in which version."""

    @abstractmethod
    def check_place(self) -> None:
        """Raise StorageUnavailable where the rows are not any more what was opened."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all connections. No thread may be using it then or later."""

    @abstractmethod
    def _read(self, statement: str, values: dict[str, Any]) -> Any:
        """Return the first row, or None."""

    @abstractmethod
    def _read_all(self, statement: str, values: dict[str, Any]) -> list[Any]:
        """Return all rows."""

    @abstractmethod
    def _read_each(self, statement: str) -> Iterator[Any]:
        """Return the rows of one moment, one by one, however long the caller takes."""

    @abstractmethod
    def _write(self, statement: str, values: dict[str, Any]) -> int:
        """Run one statement as a transaction of its own; return how many rows it changed."""

    @abstractmethod
    def _transaction(
        self,
        *,
        user_id: int | None = None,
        session_hash: str | None = None,
        everybody: bool = False,
        unhurried: bool = False,
    ) -> AbstractContextManager[Statements]:
        """Begin, and commit at the end; roll back where that is not reached.

        No two run at once about one user: the named one, whoever has the session, or everybody. One that is
        ``unhurried`` may take any time: the operator waits for it, and no request.
        """

    # What can be asked of a place without opening it, which would make or lift it

    @classmethod
    @abstractmethod
    def is_there(cls, place: str) -> bool:
        """Say whether there is a database; it may be a damaged one."""

    @classmethod
    @abstractmethod
    def check(cls, place: str) -> dict[str, list[str]]:
        """Return what is wrong with a database, by what was looked at; ``database`` is empty where it can be read."""

    @classmethod
    @abstractmethod
    def backup(cls, place: str, target: str) -> None:
        """Write a copy of one moment to a new file."""

    @classmethod
    @abstractmethod
    def restore(cls, source: str, place: str, former: str, prepare: Callable[[str], object]) -> bool:
        """Put a backup, prepared, in the place of the database; say whether there was one."""

    @classmethod
    @abstractmethod
    def leaving(cls, place: str) -> AbstractContextManager[Rows]:
        """Keep everybody from changing a database, lifted to this release, and read all of it.

        Raises:
            DatabaseRefused: it cannot be opened, or a service runs on it.
        """

    @classmethod
    @abstractmethod
    def arriving(cls, place: str) -> AbstractContextManager[Rows]:
        """Make a database where there is none, and fill it in one transaction: whole, or as it was before.

        Raises:
            DatabaseRefused: it cannot be made.
        """

    @classmethod
    @abstractmethod
    def _visiting(cls, place: str) -> AbstractContextManager[Statements]:
        """Open a place to read from it."""

    @classmethod
    def newest_time(cls, place: str) -> int:
        """Return the latest moment that a database knows of a session, in unix seconds; 0 when of none."""
        with cls._visiting(place) as db:
            times = db.execute("SELECT max(created_at), max(last_seen_at) FROM sessions").fetchone()
        return max(time or 0 for time in times)

    def _user(self, row: Sequence[Any]) -> User:
        return User(*row)

    # Users

    def add_user(self, email: str, hashed_password: str | bytes, created_at: int | None = None) -> User:
        """Add a user without a session.

        Raises:
            AlreadyExists: the email has an account, in whatever letter case.
            ValueError: one of them is no text.
        """
        _refuse_unfit(email=email, hashed_password=hashed_password)
        with self._transaction() as db:
            (user_id,) = db.execute(
                """
                INSERT INTO users (email, email_key, hashed_password, created_at)
                VALUES (:email, :email_key, :hashed_password, :created_at)
                RETURNING id
                """,
                {
                    "email": email,
                    "email_key": email.casefold(),
                    "hashed_password": hashed_password,
                    "created_at": created_at,
                },
            ).fetchone()
        return User(user_id, email, hashed_password, created_at=created_at)

    @abstractmethod
    def stage_users(self, users: Iterable[tuple[int, User]]) -> list[int]:
        """Lay users aside, each with a number; return the numbers of those whose email is taken, here or by another.

        Nobody else waits meanwhile, however long the users take to come.
        """

    @abstractmethod
    def add_staged_users(self) -> int:
        """Add the users laid aside, all or none, and return how many.

        Raises:
            AlreadyExists: an email was taken since.
        """

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
            SELECT {USER} FROM users WHERE {where} ORDER BY id LIMIT 1
            """,
            sought,
        )
        if row is None:
            raise NoResultFound
        return self._user(row)

    def each_user(self) -> Iterator[User]:
        """Return all users of one moment, in the order of their ids."""
        return (self._user(row) for row in self._read_each(f"SELECT {USER} FROM users ORDER BY id"))

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
        assignments = ", ".join(f"{column} = :{column}" for column in columns)
        if not self._write(f"UPDATE users SET {assignments} WHERE id = :id", columns):
            raise NoResultFound

    def replace_hash(self, user_id: int, old: str | bytes, new: bytes) -> None:
        """Store a new hash of the same password, unless the password has changed meanwhile."""
        self._write(REPLACE_HASH, {"user_id": user_id, "old": old, "new": new})

    def change_password(self, user_id: int, old: str | bytes, new: bytes, session_hash: str, renewed: str) -> bool:
        """Set a new password and clear the reset token; of the sessions only this one goes on, under a new hash.

        False, and nothing changes, when the password has changed meanwhile or the session has ended.
        """
        with suppress(RolledBack), self._transaction(user_id=user_id) as db:
            if not db.execute(REPLACE_HASH, {"user_id": user_id, "old": old, "new": new}).rowcount:
                return False
            _start_over(db, user_id, session_hash, renewed)
            return True
        return False

    def disable_user(self, user_id: int, now: int) -> None:
        """Let a user in no more: no login, no reset; all sessions end."""
        with self._transaction(user_id=user_id) as db:
            db.execute(
                """
                UPDATE users SET disabled_at = coalesce(disabled_at, :now) WHERE id = :user_id
                """,
                {"user_id": user_id, "now": now},
            )
            _start_over(db, user_id)

    def enable_user(self, user_id: int) -> None:
        """Let a user in again."""
        self._write("UPDATE users SET disabled_at = NULL WHERE id = :user_id", {"user_id": user_id})

    def delete_user(self, user_id: int) -> None:
        """Delete a user and all that is theirs."""
        self._write("DELETE FROM users WHERE id = :user_id", {"user_id": user_id})

    def delete_verified_user(self, user: User, session_hash: str) -> bool:
        """The same, if the password is still as in ``user`` and this session of theirs lives; say whether."""
        with self._transaction(user_id=user.id) as db:
            deleted = db.execute(
                """
                DELETE FROM users
                 WHERE id = :user_id AND hashed_password = :verified
                   AND EXISTS (SELECT 1 FROM sessions WHERE session_hash = :session_hash AND user_id = users.id)
                """,
                {"user_id": user.id, "verified": user.hashed_password, "session_hash": session_hash},
            ).rowcount
        return deleted == 1

    # Sessions

    def add_session(self, user: User, session: Session, *, replaced: str | None, idle_since: int, most: int) -> bool:
        """Start a session if password, second factor and leave to log in are still as in ``user``; say whether.

        Ends the ``replaced`` one, the user's dead ones, and the oldest beyond ``most``.
        """
        values = {name: getattr(session, name) for name in session.__slots__}  # asdict() takes ten times as long
        values |= {
            "user_id": user.id,
            "verified": user.hashed_password,
            "totp_since": user.totp_since or 0,
            "idle_since": idle_since,
            "most": most,
        }
        with self._transaction(user_id=user.id, session_hash=replaced) as db:
            started = db.execute(
                """
                INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
                SELECT :session_hash, id, :created_at, :last_seen_at, :expires_at, :address, :user_agent
                  FROM users
                 WHERE id = :user_id AND hashed_password = :verified AND coalesce(totp_since, 0) = :totp_since
                   AND disabled_at IS NULL
                """,
                values,
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
                                   WHERE user_id = :user_id AND expires_at > :created_at AND last_seen_at > :idle_since
                                   ORDER BY id DESC LIMIT :most)
                """,
                values,
            )
            _point_at_newest_session(db, user.id)
        return True

    def find_session(self, session_hash: str, *, now: int, idle_since: int, latest: int) -> tuple[User, int] | None:
        """Return the user of a live session and when it was last seen.

        Live: not expired, seen after ``idle_since``, and with no time after ``latest``.
        """
        row = self._read(
            f"""
            SELECT {USER}, sessions.last_seen_at
              FROM sessions JOIN users ON users.id = sessions.user_id
             WHERE sessions.session_hash = :session_hash
               AND sessions.expires_at > :now
               AND sessions.last_seen_at > :idle_since
               AND sessions.created_at <= :latest AND sessions.last_seen_at <= :latest
            """,
            {"session_hash": session_hash, "now": now, "idle_since": idle_since, "latest": latest},
        )
        return row and (self._user(row[:-1]), row[-1])

    def list_sessions(self, user_id: int, *, now: int, idle_since: int, latest: int) -> list[Session]:
        """Return the live sessions of a user, the newest first."""
        rows = self._read_all(
            """
            SELECT session_hash, created_at, last_seen_at, expires_at, address, user_agent
              FROM sessions
             WHERE user_id = :user_id AND expires_at > :now AND last_seen_at > :idle_since
               AND created_at <= :latest AND last_seen_at <= :latest
             ORDER BY id DESC
            """,
            {"user_id": user_id, "now": now, "idle_since": idle_since, "latest": latest},
        )
        return [Session(*row) for row in rows]

    def touch_session(self, session_hash: str, now: int) -> None:
        """Record that a session was used."""
        self._write(
            """
            UPDATE sessions SET last_seen_at = :now WHERE session_hash = :session_hash AND last_seen_at < :now
            """,
            {"session_hash": session_hash, "now": now},
        )

    def end_session(self, session_hash: str) -> bool:
        """End one session; say whether there was one."""
        with self._transaction(session_hash=session_hash) as db:
            return _end_session(db, session_hash)

    def end_sessions(self, user_id: int, *, kept: str | None = None) -> int:
        """End all sessions of a user, or all but one; return how many."""
        with self._transaction(user_id=user_id) as db:
            return _end_sessions(db, user_id, kept)

    def end_all_sessions(self) -> int:
        """End the sessions of all users, and void all reset tokens and invitations; return how many sessions."""
        with self._transaction(everybody=True, unhurried=True) as db:
            db.execute(
                """
                UPDATE users
                   SET session_id = NULL, reset_token = NULL, reset_expires_at = NULL, reset_created_at = NULL,
                       totp_secret = CASE WHEN totp_since IS NULL THEN NULL ELSE totp_secret END
                 WHERE session_id IS NOT NULL OR reset_token IS NOT NULL OR totp_secret IS NOT NULL
                """
            )
            return db.execute("DELETE FROM sessions").rowcount

    # Reset tokens

    def set_reset_token(self, user_id: int, token_hash: str, *, now: int, expires_at: int, unless_since: int) -> bool:
        """Give the user a reset token, unless a live one was made after ``unless_since``; say whether."""
        changed = self._write(
            """
            UPDATE users SET reset_token = :token_hash, reset_created_at = :now, reset_expires_at = :expires_at
             WHERE id = :user_id
               AND NOT coalesce(reset_expires_at > :now AND reset_created_at > :unless_since
                                AND reset_created_at <= :now, FALSE)
            """,
            {
                "user_id": user_id,
                "token_hash": token_hash,
                "now": now,
                "expires_at": expires_at,
                "unless_since": unless_since,
            },
        )
        return changed == 1

    def find_reset(self, token_hash: str, *, now: int, latest: int) -> User | None:
        """Return the user whose reset token this is, if it is live and was made not after ``latest``."""
        row = self._read(
            f"""
            SELECT {USER} FROM users
             WHERE reset_token = :token_hash AND reset_expires_at > :now AND reset_created_at <= :latest
               AND disabled_at IS NULL
            """,
            {"token_hash": token_hash, "now": now, "latest": latest},
        )
        return row and self._user(row)

    def spend_reset(self, token_hash: str, hashed_password: bytes, *, now: int, latest: int) -> bool:
        """Set the password of the token's user, clear the token and end all sessions; say whether it was live."""
        with self._transaction() as db:  # whose it is shows with the first statement, which keeps others from the row
            row = db.execute(
                """
                UPDATE users SET hashed_password = :hashed_password
                 WHERE reset_token = :token_hash AND reset_expires_at > :now AND reset_created_at <= :latest
                   AND disabled_at IS NULL
                RETURNING id
                """,
                {"token_hash": token_hash, "hashed_password": hashed_password, "now": now, "latest": latest},
            ).fetchone()
            if row is None:
                return False
            _start_over(db, row[0])
        return True

    # Second factor

    def set_totp(self, user: User, secret: str, session_hash: str) -> bool:
        """Keep the seed of a second factor that is not in force yet.

        False when one is, when the password is not as in ``user`` any more, or this session of theirs has ended.
        """
        with self._transaction(user_id=user.id) as db:
            changed = db.execute(
                """
                UPDATE users SET totp_secret = :secret, totp_step = 0
                 WHERE id = :user_id AND hashed_password = :verified AND totp_since IS NULL
                   AND EXISTS (SELECT 1 FROM sessions WHERE session_hash = :session_hash AND user_id = users.id)
                """,
                {
                    "user_id": user.id,
                    "verified": user.hashed_password,
                    "secret": secret,
                    "session_hash": session_hash,
                },
            ).rowcount
        return changed == 1

    def confirm_totp(
        self,
        user: User,
        step: int,
        code_hashes: Iterable[str],
        *,
        now: int,
        session_hash: str,
        renewed: str,
    ) -> bool:
        """Put the seed in ``user`` into force, with its recovery codes; only this session goes on, under a new hash.

        False, and nothing changes, when the seed is another by now or in force, or the session has ended.
        """
        with suppress(RolledBack), self._transaction(user_id=user.id) as db:
            confirmed = db.execute(
                """
                UPDATE users SET totp_since = :now, totp_step = :step
                 WHERE id = :user_id AND totp_secret = :secret AND totp_since IS NULL
                """,
                {"user_id": user.id, "secret": user.totp_secret, "now": now, "step": step},
            ).rowcount
            if not confirmed:
                return False
            db.executemany(
                "INSERT INTO recovery_codes (user_id, code_hash) VALUES (:user_id, :code_hash)",
                [{"user_id": user.id, "code_hash": code_hash} for code_hash in code_hashes],
            )
            _start_over(db, user.id, session_hash, renewed)
            return True
        return False

    def spend_totp(self, user_id: int, step: int, latest: int) -> bool:
        """Use up the code of a time step and all before; False when it is used, or a later one not after ``latest``."""
        spent = self._write(
            """
            UPDATE users SET totp_step = :step
             WHERE id = :user_id AND totp_since IS NOT NULL AND totp_step NOT BETWEEN :step AND :latest
            """,
            {"user_id": user_id, "step": step, "latest": latest},
        )
        return spent == 1

    def spend_recovery_code(self, user_id: int, code_hash: str) -> bool:
        """Use up a recovery code; say whether there was one."""
        statement = "DELETE FROM recovery_codes WHERE user_id = :user_id AND code_hash = :code_hash"
        return self._write(statement, {"user_id": user_id, "code_hash": code_hash}) == 1

    def remove_totp(self, user_id: int, session_hash: str | None = None, renewed: str | None = None) -> bool:
        """Switch the second factor off and end all sessions; or all but one, which goes on under a new hash.

        False, and nothing changes, when there was none or that session has ended.
        """
        with suppress(RolledBack), self._transaction(user_id=user_id) as db:
            removed = db.execute(
                """
                UPDATE users SET totp_secret = NULL, totp_since = NULL, totp_step = 0
                 WHERE id = :user_id AND totp_since IS NOT NULL
                """,
                {"user_id": user_id},
            ).rowcount
            if not removed:
                return False
            db.execute("DELETE FROM recovery_codes WHERE user_id = :user_id", {"user_id": user_id})
            _start_over(db, user_id, session_hash, renewed)
            return True
        return False

    # Throttle

    def throttle_secret(self, proposed: bytes) -> bytes:
        """Return the secret of this database; the proposed one from now on where there is none yet."""
        with self._transaction() as db:
            db.execute(
                """
                INSERT INTO throttle_secret (id, secret) VALUES (1, :secret) ON CONFLICT DO NOTHING
                """,
                {"secret": proposed},
            )
            return bytes(db.execute("SELECT secret FROM throttle_secret").fetchone()[0])

    def take(self, buckets: Sequence[tuple[str, int, int]], now: int) -> int:
        """Take one from each bucket (key, size, seconds until one is refilled) and return 0.

        When one is empty: take from none, write nothing, and return the seconds until it is worth another try.
        """
        try:
            with self._transaction() as db:
                waits = [_take(db, key, size, interval, now) for key, size, interval in buckets]
                if any(waits):
                    raise RolledBack
                # Rows that have refilled say nothing; each take sweeps more than it adds.
                db.execute(
                    """
                    DELETE FROM throttle WHERE key IN (SELECT key FROM throttle WHERE full_at <= :now LIMIT 10)
                    """,
                    {"now": now},
                )
        except RolledBack:
            return max(waits)
        return 0

    def give_back(self, buckets: Sequence[tuple[str, int, int]]) -> None:
        """Put one back into each bucket."""
        with self._transaction() as db:
            db.executemany(
                """
                UPDATE throttle SET full_at = full_at - :interval WHERE key = :key
                """,
                [{"key": key, "interval": interval} for key, _, interval in buckets],
            )

    def knows_address(self, address_hash: str, since: int) -> bool:
        """Say whether somebody logged in as this account from this address after ``since``."""
        statement = "SELECT 1 FROM known_addresses WHERE address_hash = :address_hash AND seen_at > :since"
        return self._read(statement, {"address_hash": address_hash, "since": since}) is not None

    def remember_address(self, user_id: int, address_hash: str, now: int, most: int) -> None:
        """Record a login from an address; the oldest beyond ``most`` are forgotten."""
        values = {"user_id": user_id, "address_hash": address_hash, "now": now, "most": most}
        with self._transaction(user_id=user_id) as db:
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

    # What is over

    def prune(self, *, now: int, known_since: int, most: int) -> int:
        """Delete at most so many rows of each kind that say nothing any more; return how many were deleted."""
        values = {"now": now, "known_since": known_since, "most": most}
        with self._transaction(everybody=True) as db:
            ended = db.execute(
                """
                DELETE FROM sessions WHERE id IN (SELECT id FROM sessions WHERE expires_at <= :now LIMIT :most)
                RETURNING user_id
                """,
                values,
            ).fetchall()
            for user_id in {user_id for (user_id,) in ended}:
                _point_at_newest_session(db, user_id)
            refilled = db.execute(
                """
                DELETE FROM throttle WHERE key IN (SELECT key FROM throttle WHERE full_at <= :now LIMIT :most)
                """,
                values,
            ).rowcount
            forgotten = db.execute(
                """
                DELETE FROM known_addresses
                 WHERE (user_id, address_hash) IN (SELECT user_id, address_hash FROM known_addresses
                                                    WHERE seen_at <= :known_since LIMIT :most)
                """,
                values,
            ).rowcount
        return len(ended) + refilled + forgotten


class DB(Database, Store):
    """The same in one SQLite file: see database.py."""

    backup = staticmethod(backup)
    restore = staticmethod(restore)

    def stage_users(self, users: Iterable[tuple[int, User]]) -> list[int]:
        writer = self._writer
        with self._write_lock, translating():  # of this process only: the table is in a file of its own
            writer.execute("DROP TABLE IF EXISTS temp.staged")
            writer.execute(
                """
                CREATE TEMP TABLE staged (number, email, email_key, hashed_password, created_at, disabled_at,
                                          totp_secret, totp_since)
                """
            )
            writer.execute("BEGIN")  # of the temporary file alone, until users is read
            try:
                writer.executemany("INSERT INTO temp.staged VALUES (?, ?, ?, ?, ?, ?, ?, ?)", staged(users))
            finally:
                writer.execute("COMMIT")
            return [number for (number,) in writer.execute(TAKEN)]

    def add_staged_users(self) -> int:
        with self._transaction() as db:
            return db.execute(ADD_STAGED).rowcount

    @classmethod
    @contextmanager
    def leaving(cls, place: str) -> Iterator[Rows]:
        cls(place).close()
        with seized(place) as connection:
            yield _Rows(connection)

    @classmethod
    @contextmanager
    def arriving(cls, place: str) -> Iterator[Rows]:
        with new_file(place) as partial, closing(cls(partial)) as store, store._transaction() as connection:
            yield _Rows(connection)

    @classmethod
    @contextmanager
    def _visiting(cls, place: str) -> Iterator[Statements]:
        with closing(connect(place, "ro")) as connection:
            yield connection


class _Rows:
    """Those of a SQLite file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def each(self, table: str) -> Generator[Row, None, None]:
        with translating():
            yield from self._connection.execute(listing(table))

    def add(self, table: str, rows: Iterable[Row]) -> None:
        columns = TABLES[table]
        marks = ", ".join("?" * len(columns))
        with translating():
            self._connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)

    def last_id(self, table: str) -> int:
        statement = "SELECT max(seq) FROM sqlite_sequence WHERE name = :table"
        return self._connection.execute(statement, {"table": table}).fetchone()[0] or 0

    def go_on_after(self, table: str, last_id: int) -> None:
        values = {"table": table, "last_id": last_id}
        self._connection.execute("DELETE FROM sqlite_sequence WHERE name = :table", values)
        self._connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last_id)", values)


def engine(place: str) -> type[Store]:
    """Return what opens this place, a URL of PostgreSQL or a path."""
    if not is_url(place):
        return DB
    from storage_postgres import PostgresDB  # only here: without it nothing of PostgreSQL need be installed

    return PostgresDB


def open_store(place: str, *, private: bool = False) -> Store:
    """Open a database, and make it where there is none; a ``private`` file that others can read is refused.

    Raises:
        DatabaseRefused: it cannot be opened, is another program's, or a newer release's.
    """
    return engine(place)(place, private=private)


def listing(table: str) -> str:
    """Return the statement that reads all of a table, in an order that is the same on all engines."""
    return f"SELECT {', '.join(TABLES[table])} FROM {table} ORDER BY 1, 2"


def staged(users: Iterable[tuple[int, User]]) -> Iterator[tuple[object, ...]]:
    """Return the rows of ``staged`` that these users are.

    Raises:
        ValueError: one of them cannot be a user.
    """
    for number, user in users:
        _refuse_unfit(email=user.email, hashed_password=user.hashed_password)
        given = user.created_at, user.disabled_at, user.totp_secret, user.totp_since
        yield number, user.email, user.email.casefold(), user.hashed_password, *given


def _can_match(name: str, value: object) -> bool:
    # SQLite would find the row 1 by '1', 1.0 and True, and fail on a lone surrogate or 2**63. PostgreSQL has no NUL in
    # a text, and keeps a hash of bytes as \x and hexadecimal digits.
    if name == "id":
        return type(value) is int and IDS[0] <= value < IDS[1]
    if isinstance(value, str):
        return is_text(value) and not (name == "hashed_password" and value.startswith("\\x"))
    return name == "hashed_password" and isinstance(value, bytes)


def is_text(value: str) -> bool:
    """Say whether every engine can keep it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value


def _take(db: Statements, key: str, size: int, interval: int, now: int) -> int:
    # The generic cell rate algorithm (ITU-T I.371): one number a bucket, the moment when it is full again. A moment
    # far later than an empty bucket can have was written before the clock jumped back: it counts as empty but for one.
    full = now + size * interval
    values = {"key": key, "now": now, "interval": interval, "full": full, "tolerance": CLOCK_TOLERANCE}
    taken = db.execute(
        """
        INSERT INTO throttle (key, full_at) VALUES (:key, :now + :interval)
        ON CONFLICT (key) DO UPDATE
           SET full_at = CASE WHEN throttle.full_at < :now THEN :now + :interval
                              WHEN throttle.full_at + :interval > :full THEN :full
                              ELSE throttle.full_at + :interval END
         WHERE throttle.full_at + :interval <= :full OR throttle.full_at > :full + :tolerance
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


def _end_session(db: Statements, session_hash: str) -> bool:
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


def _end_sessions(db: Statements, user_id: int, kept: str | None = None) -> int:
    statement = "DELETE FROM sessions WHERE user_id = :user_id AND session_hash <> :kept"
    ended = db.execute(statement, {"user_id": user_id, "kept": kept or ""}).rowcount
    _point_at_newest_session(db, user_id)
    return ended


def _start_over(db: Statements, user_id: int, session_hash: str | None = None, renewed: str | None = None) -> None:
    """Void what was begun under another password or second factor: a reset, an invitation, a seed without a code.

    End all sessions, or all but one, which goes on under a new hash; raise RolledBack where it has ended.
    """
    db.execute(
        """
        UPDATE users
           SET reset_token = NULL, reset_expires_at = NULL, reset_created_at = NULL,
               totp_secret = CASE WHEN totp_since IS NULL THEN NULL ELSE totp_secret END
         WHERE id = :user_id
        """,
        {"user_id": user_id},
    )
    if session_hash is not None:
        going_on = db.execute(
            """
            UPDATE sessions SET session_hash = :renewed WHERE session_hash = :session_hash AND user_id = :user_id
            """,
            {"user_id": user_id, "session_hash": session_hash, "renewed": renewed},
        ).rowcount
        if not going_on:
            raise RolledBack
    _end_sessions(db, user_id, renewed)


def _point_at_newest_session(db: Statements, user_id: int) -> None:
    db.execute(
        """
        UPDATE users
           SET session_id = (SELECT session_hash FROM sessions WHERE user_id = :user_id ORDER BY id DESC LIMIT 1)
         WHERE id = :user_id
        """,
        {"user_id": user_id},
    )
