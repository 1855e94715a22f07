"""Storage: users and sessions, and all SQL about them. Each method is one transaction, but for prune(), which is many.

Hashes and unix seconds come in, frozen rows go out. auth.py decides what they mean; schema.sql explains each column.
The statements are the same on both engines. Knows no clock, no password and no HTTP.
"""

import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import suppress
from typing import Any, NamedTuple

from engines import Result, Transaction, open_engine, operations
from engines.errors import RolledBack
from engines.rows import hash_as_given, is_storable
from engines.schema import FIGURES, LOCK_ALL_USERS, LOCK_HOLDERS, LOCK_USER
from settings import Settings
from tables import passkeys
from tables.emails import DELETE_WAITING, IS_GOOD, RESERVED_FOR, Emails, Link, claim, give_up
from tables.passkeys import Challenge, Passkey, Passkeys, Used
from tables.rate_limits import CLOCK_TOLERANCE, RateLimits
from tables.tokens import DELETE_TOKENS, Tokens

LOOKUP_BATCH = 500  # emails that one statement looks up
SEARCH_STEP = 20_000  # ids among which one statement searches for expired rows: some 10 ms
IDS = range(-(2**63), 2**63)  # what a column of integers can hold

# The names that callers may use. No other strings enter a statement.
UPDATABLE_COLUMNS = frozenset({"email", "hashed_password", "session_id", "reset_token"})
LOOKUP_COLUMNS = {name: name for name in UPDATABLE_COLUMNS} | {"id": "id", "email": "email_key"}

# Conditions that several statements share.
IS_LIVE_SESSION = """sessions.expires_at > :now AND sessions.last_seen_at > :idle_since
               AND sessions.created_at <= :latest AND sessions.last_seen_at <= :latest"""
IS_EXPIRED_SESSION = "(expires_at <= :now OR last_seen_at <= :idle_since)"
EXPIRED = {  # of the other tables: the key of a row, and when it can be deleted
    "registrations": ("id", "expires_at <= :now"),
    "email_changes": ("session_id", "expires_at <= :now"),
    "former_emails": ("email_key", "released_at <= :released"),
    "spent_challenges": ("digest", "expires_at <= :past"),
}
HAS_EXPIRED_RESET = "reset_token IS NOT NULL AND reset_expires_at <= :now"
HAS_LIVE_RESET = """reset_token = :token_hash AND reset_expires_at > :now AND reset_created_at <= :latest
               AND disabled_at IS NULL"""
IS_VERIFIED = """id = :user_id AND hashed_password = :verified
               AND EXISTS (SELECT 1 FROM sessions WHERE session_hash = :session_hash AND user_id = users.id)"""

OWN_SESSIONS = "SELECT id FROM sessions WHERE user_id = :user_id"
REPLACE_HASH = "UPDATE users SET hashed_password = :new, cut_salt = NULL WHERE id = :user_id AND hashed_password = :old"

CLEAR_RESET = "UPDATE users SET reset_token = NULL, reset_expires_at = NULL, reset_created_at = NULL"
REVOKE_PENDING = f"""
    {CLEAR_RESET},
           totp_secret = CASE WHEN totp_since IS NULL THEN NULL ELSE totp_secret END"""  # an unconfirmed seed

INSERT_USER = """
    INSERT INTO users (email, email_key, hashed_password, created_at, disabled_at, totp_secret, totp_since, cut_salt,
                       groups)
    VALUES (:email, :email_key, :hashed_password, :created_at, :disabled_at, :totp_secret, :totp_since, :cut_salt,
            :groups)
"""


class NoResultFound(Exception):
    """No row matches."""


class InvalidRequestError(Exception):
    """A lookup without a name, or by a name that is no attribute of a user."""


class User(NamedTuple):
    """A snapshot of one row of ``users``. A dataclass takes four times as long to construct, for each request."""

    id: int
    email: str
    hashed_password: str | bytes
    session_id: str | None = None  # SHA-256 hex
    reset_token: str | None = None  # SHA-256 hex
    created_at: int | None = None  # unix seconds, like all times
    disabled_at: int | None = None
    totp_secret: str | None = None
    totp_since: int | None = None
    device_key: str | None = None
    last_login_at: int | None = None
    cut_salt: str | None = None
    groups: str = ""  # sorted, with commas between them

    def __repr__(self) -> str:
        return f"User(id={self.id}, email={self.email!r})"  # without secrets, as it may get into a log

    @property
    def group_names(self) -> list[str]:
        """The groups of the user."""
        return self.groups.split(",") if self.groups else []


class Session(NamedTuple):
    """A snapshot of one row of ``sessions``."""

    session_hash: str  # SHA-256 hex
    created_at: int
    last_seen_at: int
    expires_at: int
    address: str = ""
    user_agent: str = ""
    remember: int = 0  # 1: the browser keeps the cookie when it is closed
    factor_at: int | None = None  # when a second factor was last shown in it

    def __repr__(self) -> str:
        return f"Session(created_at={self.created_at}, address={self.address!r})"

    @property
    def id(self) -> str:
        """The public id."""
        return public_id(self.session_hash)


USER_COLUMNS = ", ".join(f"users.{name}" for name in User._fields)
SESSION_COLUMNS = ", ".join(Session._fields)
SESSION_VALUES = ", ".join(f":{name}" for name in Session._fields)

# A constant, as it is run for most requests, and a text that is put together takes time.
FIND_SESSION = f"""
    SELECT sessions.id, last_seen_at, sessions.expires_at, remember, factor_at, {USER_COLUMNS}
      FROM sessions JOIN users ON users.id = sessions.user_id
     WHERE sessions.session_hash = :session_hash AND {IS_LIVE_SESSION}"""

FIND_TOKEN = f"""
    SELECT access_tokens.id, last_used_at, {USER_COLUMNS}
      FROM access_tokens JOIN users ON users.id = access_tokens.user_id
     WHERE token_hash = :token_hash AND disabled_at IS NULL AND access_tokens.created_at <= :latest
       AND (access_tokens.expires_at IS NULL OR access_tokens.expires_at > :now)"""

FIND_PASSKEY = f"""
    SELECT passkey_handle, {passkeys.COLUMNS}, {USER_COLUMNS}
      FROM passkeys JOIN users ON users.id = passkeys.user_id
     WHERE credential_id = :credential_id AND disabled_at IS NULL"""


class LiveSession(NamedTuple):
    """What the rules ask of a session at each request."""

    row_id: int  # stays when the session is renewed
    last_seen_at: int
    expires_at: int
    remember: int
    factor_at: int | None


def public_id(session_hash: str) -> str:
    """Return the public id of a session: enough of the hash to be unique for a user, useless for signing in."""
    return session_hash[:16]


class DB:
    """The users and their sessions in one database. Safe to use from many threads.

    ``database`` is a path or a PostgreSQL URL, by default that of the settings. It is created if it does not exist. A
    ``private`` file that other users of the machine can read is refused.

    Raises:
        DatabaseRefused: the database cannot be opened, belongs to another program or to a newer release.
    """

    def __init__(self, database: str | os.PathLike[str] | None = None, *, private: bool = False) -> None:
        chosen = Settings.from_environ().database if database is None else os.fspath(database)
        self._engine = open_engine(chosen, private=private)
        self.engine_version = self._engine.version
        self.rate_limits = RateLimits(self._engine)
        self.emails = Emails(self._engine)
        self.tokens = Tokens(self._engine)
        self.passkeys = Passkeys(self._engine)
        self.check = self._engine.check
        self.empty_log = self._engine.empty_log
        self.close = self._engine.close

    def _user_transaction(self, user_id: int | None = None, session_hash: str | None = None) -> Context[Transaction]:
        """Begin a transaction about one user, or about a session's user. No other about that user overlaps with it."""
        return self._engine.transaction(lock=LOCK_USER, values={"user_id": user_id, "session_hash": session_hash})

    # Users

    def add_user(self, email: str, hashed_password: str | bytes, created_at: int | None = None) -> User:
        """Add a user without a session. Registrations that wait for the email are deleted.

        Raises:
            AlreadyExists: an account has this email, in any letter case, or it is reserved for its former owner.
            ValueError: the email or the hash cannot be stored.
        """
        with self._engine.transaction() as db:
            return _insert_user(db, User(0, email, hashed_password, created_at=created_at))

    def confirm_registration(self, link: Link, hashed_password: bytes) -> User | None:
        """Add the user of a waiting registration, and delete all that wait for the email; None if there is none.

        Raises:
            AlreadyExists: as in add_user(). Of two transactions with links of one email, one fails with it.
        """
        with self._engine.transaction() as db:
            row = db.execute(f"SELECT email FROM registrations WHERE {IS_GOOD}", link).fetchone()
            return row and _insert_user(db, User(0, row[0], hashed_password, created_at=link["now"]))

    def taken_emails(self, emails: Sequence[str]) -> set[str]:
        """Return those of the emails, in folded letter case, that an account has or that are reserved."""
        taken = set()
        with self._engine.own_connection() as db:
            for start in range(0, len(emails), LOOKUP_BATCH):
                keys = {f"key{i}": key for i, key in enumerate(emails[start : start + LOOKUP_BATCH])}
                parameters = ", ".join(f":{name}" for name in keys)
                for table in ("users", "former_emails"):
                    statement = f"SELECT email_key FROM {table} WHERE email_key IN ({parameters})"
                    taken |= {key for (key,) in db.execute(statement, keys).fetchall()}
        return taken

    def import_users(self, users: Iterable[User]) -> None:
        """Add users, all or none. Registrations that wait for their emails are deleted.

        Raises:
            AlreadyExists: an account has one of the emails, or two users have the same.
            ValueError: a user cannot be stored.
        """
        with self._engine.own_connection() as own, self._engine.transaction(connection=own) as db:
            db.executemany(INSERT_USER, map(_user_values, users))
            db.execute(f"{DELETE_WAITING} IN (SELECT email_key FROM users)")

    def find_user_by(self, /, **sought: Any) -> User:
        """Return the user with these attributes, the one with the lowest id if there are several.

        An email matches in any letter case. None matches nobody.

        Raises:
            InvalidRequestError: a name is no attribute of a user, or there is none.
            NoResultFound: nobody matches.
        """
        if not sought or not sought.keys() <= LOOKUP_COLUMNS.keys():
            raise InvalidRequestError(f"a user can be found by {', '.join(sorted(LOOKUP_COLUMNS))}")
        if not all(_can_match(name, value) for name, value in sought.items()):
            raise NoResultFound
        if "email" in sought:
            sought["email"] = sought["email"].casefold()
        where = " AND ".join(f"{LOOKUP_COLUMNS[name]} = :{name}" for name in sought)
        row = self._engine.read(f"SELECT {USER_COLUMNS} FROM users WHERE {where} ORDER BY id LIMIT 1", sought)
        if row is None:
            raise NoResultFound
        return _user(row)

    def each_user(self) -> Iterator[User]:
        """Yield all users of one snapshot, in the order of their ids."""
        return map(_user, self._engine.read_each(f"SELECT {USER_COLUMNS} FROM users ORDER BY id"))

    def update_user(self, /, user_id: int, **changed: Any) -> None:
        """Store new values in the row of one user; None stores NULL.

        Raises:
            ValueError: a name is no attribute of a user, or a value cannot be stored.
            NoResultFound: there is no such user.
            AlreadyExists: another account has the new email.
        """
        if not changed.keys() <= UPDATABLE_COLUMNS:
            raise ValueError(f"these can be updated: {', '.join(sorted(UPDATABLE_COLUMNS))}")
        if not _can_match("id", user_id):
            raise NoResultFound
        _check_storable(**changed)
        columns = changed | {"id": user_id}
        if "email" in changed:
            columns["email_key"] = changed["email"].casefold()
        assignments = ", ".join(f"{column} = :{column}" for column in columns)
        if not self._engine.write(f"UPDATE users SET {assignments} WHERE id = :id", columns):
            raise NoResultFound

    def replace_hash(self, user_id: int, old: str | bytes, new: bytes) -> None:
        """Store a new hash of the same password, unless the password was changed meanwhile."""
        self._engine.write(REPLACE_HASH, {"user_id": user_id, "old": old, "new": new})

    def change_password(self, user_id: int, old: str | bytes, new: bytes, kept: str, renewed: str) -> bool:
        """Set a new password and revoke all other credentials; the session ``kept`` continues as ``renewed``.

        The user's device cookies become void.

        Return False and change nothing if the password was changed meanwhile or the session has ended.
        """
        with suppress(RolledBack), self._user_transaction(user_id) as db:
            _require_row(db.execute(REPLACE_HASH, {"user_id": user_id, "old": old, "new": new}))
            _revoke_credentials(db, user_id, kept, renewed, devices=True)
            return True
        return False

    def set_groups(self, user: User, groups: str) -> bool:
        """Replace the groups of a user; return False and change nothing if they are no longer those of ``user``."""
        statement = "UPDATE users SET groups = :new WHERE id = :id AND groups = :old"
        return self._engine.write(statement, {"id": user.id, "old": user.groups, "new": groups}) == 1

    def disable_user(self, user_id: int, now: int) -> None:
        """Disable a user: end all sessions, void the device cookies and access tokens, and refuse login and reset."""
        with self._user_transaction(user_id) as db:
            statement = "UPDATE users SET disabled_at = coalesce(disabled_at, :now) WHERE id = :user_id"
            db.execute(statement, {"user_id": user_id, "now": now})
            _revoke_credentials(db, user_id, devices=True)
            db.execute(DELETE_TOKENS, {"user_id": user_id})

    def enable_user(self, user_id: int) -> None:
        """Enable a disabled user."""
        self._engine.write("UPDATE users SET disabled_at = NULL WHERE id = :user_id", {"user_id": user_id})

    def change_email(
        self, user_id: int, email: str, now: int, reserved_at: int | None, pending: Link | None = None
    ) -> bool:
        """Give a user another email and revoke all other credentials. ``reserved_at`` is that of delete_user().

        ``pending`` is the tables.emails.Link of a session, with its session_hash and the new_session_hash under which
        it continues. Return False and change nothing if the session has no such pending change.

        Raises:
            AlreadyExists: another account has the email, or it is reserved for its former owner.
        """
        values = {"user_id": user_id, "email_key": email.casefold(), **(pending or {})}
        with suppress(RolledBack), self._engine.transaction(lock=LOCK_HOLDERS, values=values) as db:
            if pending:
                statement = f"""
                    DELETE FROM email_changes
                     WHERE {IS_GOOD} AND session_id IN ({OWN_SESSIONS} AND session_hash = :session_hash)
                    RETURNING email"""
                row = db.execute(statement, values).fetchone()
                if not row:
                    return False
                email = row[0]  # as it was asked for, and checked
            former = db.execute("SELECT email_key FROM users WHERE id = :user_id", values)
            give_up(db, user_id, former.fetchone(), reserved_at)
            statement = "UPDATE users SET email = :email, email_key = :email_key WHERE id = :user_id"
            db.execute(statement, values | {"email": email})
            claim(db, values["email_key"], user_id, now)
            _revoke_credentials(db, user_id, values.get("session_hash"), values.get("new_session_hash"))
            return True
        return False

    def delete_user(self, user_id: int, reserved_at: int | None = None) -> None:
        """Delete a user with all rows that refer to it. With a time, the email is reserved from then on."""
        with self._user_transaction(user_id) as db:
            statement = "DELETE FROM users WHERE id = :user_id RETURNING email_key"
            give_up(db, user_id, db.execute(statement, {"user_id": user_id}).fetchone(), reserved_at)

    def delete_verified_user(self, user: User, session_hash: str, reserved_at: int | None = None) -> bool:
        """Delete a user if the password is still that of ``user`` and the session exists; return whether it did."""
        with self._user_transaction(user.id) as db:
            values = {"user_id": user.id, "verified": user.hashed_password, "session_hash": session_hash}
            row = db.execute(f"DELETE FROM users WHERE {IS_VERIFIED} RETURNING email_key", values).fetchone()
            give_up(db, user.id, row, reserved_at)
            return row is not None

    # Sessions

    def add_session(
        self, user: User, session: Session, used: Used = None, *, replaced: str | None, idle_since: int, limit: int
    ) -> bool:
        """Start a session if password and second factor are still those of ``user``, and the user is not disabled.

        ``used`` is the new state of a passkey, with the challenge that it has signed: the session starts only if the
        passkey exists, and neither it nor the challenge was used meanwhile.

        Return whether it was started. The ``replaced`` session ends, as do the user's expired sessions and the oldest
        ones beyond ``limit``.
        """
        values = session._asdict() | {"user_id": user.id, "verified": user.hashed_password}
        values |= {"totp_since": user.totp_since or 0, "idle_since": idle_since, "limit": limit}
        with suppress(RolledBack), self._user_transaction(user.id, replaced) as db:
            statement = f"""
                INSERT INTO sessions (user_id, {SESSION_COLUMNS}) SELECT id, {SESSION_VALUES} FROM users
                 WHERE id = :user_id AND hashed_password = :verified AND coalesce(totp_since, 0) = :totp_since
                   AND disabled_at IS NULL"""
            _require_row(db.execute(statement, values))
            if used:
                _require_row(passkeys.use(db, used[0]))
                _require_row(passkeys.spend(db, used[1]))
            if replaced is not None:
                _end_session(db, replaced)
            statement = """
                DELETE FROM sessions
                 WHERE user_id = :user_id
                   AND id NOT IN (SELECT id FROM sessions
                                   WHERE user_id = :user_id AND expires_at > :created_at AND last_seen_at > :idle_since
                                   ORDER BY id DESC LIMIT :limit)"""
            db.execute(statement, values)
            _update_newest_session(db, user.id, login_at=session.created_at)
            return True
        return False

    def find_session(self, session_hash: str, **window: int) -> tuple[User, LiveSession] | None:
        """Return a live session with its user.

        ``window`` has three times: ``now``, ``idle_since`` and ``latest``. A session is live if it has not expired, was
        used after ``idle_since``, and has no time later than ``latest``.
        """
        row = self._engine.read(FIND_SESSION, window | {"session_hash": session_hash})
        return row and (_user(row[5:]), LiveSession._make(row[:5]))

    def find_token(self, token_hash: str, *, now: int, latest: int) -> tuple[User, int, int | None] | None:
        """Return the user of a live access token that was made no later than ``latest``, its id and its last use."""
        row = self._engine.read(FIND_TOKEN, {"token_hash": token_hash, "now": now, "latest": latest})
        return row and (_user(row[2:]), row[0], row[1])

    def find_passkey(self, credential_id: str) -> tuple[User, str, Passkey] | None:
        """Return the user of a passkey who is not disabled, with their handle, and the passkey."""
        row, end = self._engine.read(FIND_PASSKEY, {"credential_id": credential_id}), 1 + len(Passkey._fields)
        return row and (_user(row[end:]), row[0], Passkey(*row[1:end]))

    def list_sessions(self, user_id: int, **window: int) -> list[Session]:
        """Return the live sessions of a user, newest first; ``window`` as in find_session()."""
        statement = f"""
            SELECT {SESSION_COLUMNS} FROM sessions WHERE user_id = :user_id AND {IS_LIVE_SESSION} ORDER BY id DESC"""
        return [Session(*row) for row in self._engine.read_all(statement, window | {"user_id": user_id})]

    def touch_session(self, session_hash: str, now: int) -> None:
        """Record the use of a session."""
        statement = "UPDATE sessions SET last_seen_at = :now WHERE session_hash = :session_hash AND last_seen_at < :now"
        self._engine.write(statement, {"session_hash": session_hash, "now": now})

    def record_factor(self, row_id: int, now: int) -> None:
        """Record that a second factor was shown in a session."""
        self._engine.write("UPDATE sessions SET factor_at = :now WHERE id = :id", {"id": row_id, "now": now})

    def end_session(self, session_hash: str) -> bool:
        """End one session; return whether there was one."""
        with self._user_transaction(session_hash=session_hash) as db:
            return _end_session(db, session_hash)

    def end_sessions(self, user_id: int, *, kept: str | None = None, devices: bool = False) -> int:
        """End all sessions of a user, except ``kept``, and with ``devices`` void device cookies and access tokens.

        Return how many sessions ended.
        """
        with self._user_transaction(user_id) as db:
            if devices:
                statement = "UPDATE users SET device_key = :device_key WHERE id = :user_id"
                db.execute(statement, {"user_id": user_id, "device_key": _new_device_key()})
                db.execute(DELETE_TOKENS, {"user_id": user_id})
            return _end_sessions(db, user_id, kept)

    def end_all_sessions(self) -> dict[str, int]:
        """End all sessions of all users, revoke all links and access tokens, and void all device cookies.

        Return how many rows were deleted from each table.
        """
        with self._engine.own_connection() as own, self._engine.transaction(lock=LOCK_ALL_USERS, connection=own) as db:
            # One key for all: a device cookie also names its user.
            db.execute(f"{REVOKE_PENDING}, session_id = NULL, device_key = :key", {"key": _new_device_key()})
            # Sessions last, as changes are deleted with them.
            tables = "registrations", "email_changes", "access_tokens", "sessions"
            return {table: db.execute(f"DELETE FROM {table}").rowcount for table in tables}

    # Reset tokens

    def set_reset_token(self, user_id: int, token_hash: str, *, now: int, expires_at: int, keep_since: int) -> bool:
        """Store a reset token, unless there is a live one made after ``keep_since``; return whether it was stored."""
        statement = """
            UPDATE users SET reset_token = :token_hash, reset_created_at = :now, reset_expires_at = :expires_at
             WHERE id = :user_id
               AND NOT coalesce(reset_expires_at > :now AND reset_created_at > :keep_since
                                AND reset_created_at <= :now, FALSE)"""
        values = {"user_id": user_id, "token_hash": token_hash, "expires_at": expires_at}
        return self._engine.write(statement, values | {"now": now, "keep_since": keep_since}) == 1

    def find_reset(self, token_hash: str, *, now: int, latest: int) -> User | None:
        """Return the user of a live reset token that was made no later than ``latest``, or None."""
        statement = f"SELECT {USER_COLUMNS} FROM users WHERE {HAS_LIVE_RESET}"
        row = self._engine.read(statement, {"token_hash": token_hash, "now": now, "latest": latest})
        return row and _user(row)

    def spend_reset(
        self, token_hash: str, hashed_password: bytes, *, keeps_factor: bool = False, now: int, latest: int
    ) -> bool:
        """Set the password of the token's user, and revoke all credentials, device cookies and access tokens.

        Passkeys that are younger than passkeys.NEW_FOR are deleted: they may be an intruder's. With ``keeps_factor``,
        where the user has no other factor, they are only made useless. So a session with the new password shows that a
        factor is missing, and cannot set up another one.

        Return whether the token was live.
        """
        values = {"token_hash": token_hash, "hashed_password": hashed_password, "now": now, "latest": latest}
        with self._engine.transaction() as db:  # the first statement finds the user, and locks the row
            statement = f"""
                UPDATE users SET hashed_password = :hashed_password, cut_salt = NULL
                 WHERE {HAS_LIVE_RESET} RETURNING id"""
            row = db.execute(statement, values).fetchone()
            if row:
                _revoke_credentials(db, row[0], devices=True)
                db.execute(DELETE_TOKENS, {"user_id": row[0]})
                passkeys.revoke_new(db, row[0], now, keeps_factor=keeps_factor)
            return row is not None

    # Second factor

    def set_totp(self, user: User, secret: str, kept: str, renewed: str) -> bool:
        """Store an unconfirmed TOTP seed; the session ``kept`` continues under the hash ``renewed``.

        Return False and change nothing if TOTP is on, if the password is no longer that of ``user``, or if the session
        has ended.
        """
        values = {"user_id": user.id, "verified": user.hashed_password, "session_hash": kept}
        with suppress(RolledBack), self._user_transaction(user.id) as db:
            statement = f"""
                UPDATE users SET totp_secret = :secret, totp_step = 0 WHERE {IS_VERIFIED} AND totp_since IS NULL"""
            _require_row(db.execute(statement, values | {"secret": secret}))
            _renew_session(db, user.id, kept, renewed)
            _update_newest_session(db, user.id)
            return True
        return False

    def confirm_totp(self, user: User, step: int, hashes: Iterable[str], *, now: int, kept: str, renewed: str) -> bool:
        """Switch on TOTP with the seed in ``user`` and recovery codes; ``kept`` continues as ``renewed``.

        The user's device cookies become void: they are from before this factor.

        Return False and change nothing if the seed was replaced or confirmed meanwhile, or the session has ended.
        """
        with suppress(RolledBack), self._user_transaction(user.id) as db:
            statement = """
                UPDATE users SET totp_since = :now, totp_step = :step
                 WHERE id = :user_id AND totp_secret = :secret AND totp_since IS NULL"""
            values = {"user_id": user.id, "secret": user.totp_secret, "now": now, "step": step}
            _require_row(db.execute(statement, values))
            statement = "INSERT INTO recovery_codes (user_id, code_hash) VALUES (:user_id, :code_hash)"
            db.executemany(statement, [{"user_id": user.id, "code_hash": code_hash} for code_hash in hashes])
            _revoke_credentials(db, user.id, kept, renewed, devices=True)
            db.execute("UPDATE sessions SET factor_at = :now WHERE user_id = :user_id", values)
            return True
        return False

    def spend_totp(self, user_id: int, step: int, latest: int) -> bool:
        """Mark a time step as used; return False if it or a later one up to ``latest`` was used before."""
        statement = """
            UPDATE users SET totp_step = :step
             WHERE id = :user_id AND totp_since IS NOT NULL AND totp_step NOT BETWEEN :step AND :latest"""
        return self._engine.write(statement, {"user_id": user_id, "step": step, "latest": latest}) == 1

    def spend_recovery_code(self, user_id: int, code_hash: str) -> bool:
        """Delete a recovery code; return whether there was one."""
        statement = "DELETE FROM recovery_codes WHERE user_id = :user_id AND code_hash = :code_hash"
        return self._engine.write(statement, {"user_id": user_id, "code_hash": code_hash}) == 1

    def remove_totp(self, user_id: int, kept: str | None = None, renewed: str | None = None) -> bool:
        """Switch TOTP off and end all sessions, or all but ``kept``, which continues under the hash ``renewed``.

        Return False and change nothing if TOTP was off or that session has ended.
        """
        with suppress(RolledBack), self._user_transaction(user_id) as db:
            statement = """
                UPDATE users SET totp_secret = NULL, totp_since = NULL, totp_step = 0
                 WHERE id = :user_id AND totp_since IS NOT NULL"""
            _require_row(db.execute(statement, {"user_id": user_id}))
            db.execute("DELETE FROM recovery_codes WHERE user_id = :user_id", {"user_id": user_id})
            _revoke_credentials(db, user_id, kept, renewed)
            db.execute("UPDATE sessions SET factor_at = NULL WHERE user_id = :user_id", {"user_id": user_id})
            return True
        return False

    def add_passkey(self, user: User, passkey: Passkey, challenge: Challenge, *, kept: str, renewed: str) -> int | None:
        """Add a passkey, whose id is ignored, and return its id. The session ``kept`` continues as ``renewed``.

        Return None and change nothing if the user has MAX_PASSKEYS, the passkey exists, the challenge was used, or the
        session has ended.
        """
        values = passkey._asdict() | {"user_id": user.id}
        with suppress(RolledBack), self._user_transaction(user.id) as db:
            _require_row(passkeys.spend(db, challenge))
            passkey_id = passkeys.add(db, values)
            if passkey_id is None:
                raise RolledBack
            _revoke_credentials(db, user.id, kept, renewed)
            db.execute("UPDATE sessions SET factor_at = :created_at WHERE user_id = :user_id", values)
            return passkey_id
        return None

    def delete_passkeys(
        self, user_id: int, passkey_id: int | None = None, *, kept: str | None = None, renewed: str | None = None
    ) -> int:
        """Delete one passkey of a user, or all. All sessions end but ``kept``, which continues as ``renewed``.

        Return how many were deleted. If there was none, or that session has ended, nothing is changed.
        """
        values = {"user_id": user_id, "id": passkey_id}
        with suppress(RolledBack), self._user_transaction(user_id) as db:
            one = "" if passkey_id is None else " AND id = :id"
            deleted = db.execute(f"{passkeys.DELETE_PASSKEYS}{one}", values)
            _require_row(deleted)
            _revoke_credentials(db, user_id, kept, renewed)
            return deleted.rowcount
        return 0

    # Sign-ins that no mail has told of

    def count_untold_logins(self, user_id: int, change: int) -> bool:
        """Add to the number of a user's untold sign-ins; return False and change nothing if it were negative."""
        statement = "UPDATE users SET untold_logins = untold_logins + :n WHERE id = :id AND untold_logins + :n >= 0"
        return self._engine.write(statement, {"id": user_id, "n": change}) == 1

    def untold_logins(self) -> list[tuple[int, str, int]]:
        """Return id, email and number of untold sign-ins of each user who has any."""
        return self._engine.read_all("SELECT id, email, untold_logins FROM users WHERE untold_logins > 0", {})

    # Metrics

    def figures(self) -> tuple[int, int]:
        """Return how many sessions are stored, expired ones included, and the size of the database in bytes."""
        sessions, size = self._engine.read(FIGURES[self._engine.name], {})
        return sessions, size

    # Retention

    def prune(self, *, now: int, idle_since: int, limit: int) -> Iterator[tuple[str, int]]:
        """Delete sessions that have expired or were not used since ``idle_since``, dead tokens, and full buckets.

        Each transaction deletes up to ``limit`` rows. Yield after each the kind and the number of rows.
        """
        times = {"now": now, "idle_since": idle_since}
        statement = f"SELECT id, user_id FROM sessions WHERE {IS_EXPIRED_SESSION}"
        for rows in self._each_expired(statement, "sessions", times, limit):
            with self._engine.transaction(lock=LOCK_ALL_USERS) as db:
                # The condition again: since the search, the session may have been used, or the token replaced.
                ended = db.executemany(f"DELETE FROM sessions WHERE id = :id AND {IS_EXPIRED_SESSION}", rows).rowcount
                for user_id in {row["user_id"] for row in rows}:
                    _update_newest_session(db, user_id)
            yield "sessions", ended
        statement = f"SELECT id, id FROM users WHERE {HAS_EXPIRED_RESET}"
        for rows in self._each_expired(statement, "users", times, limit):
            with self._engine.transaction() as db:
                cleared = db.executemany(f"{CLEAR_RESET} WHERE id = :id AND {HAS_EXPIRED_RESET}", rows).rowcount
            yield "reset_tokens", cleared
        times |= {"past": now - CLOCK_TOLERANCE, "released": now - RESERVED_FOR, "limit": limit}
        for table, (key, condition) in EXPIRED.items():
            statement = f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} WHERE {condition} LIMIT :limit)"
            while deleted := self._engine.write(statement, times):
                yield table, deleted
        while deleted := self.rate_limits.prune(now=now, limit=limit):
            yield "buckets", deleted

    def _each_expired(self, statement: str, table: str, times: dict[str, int], limit: int) -> Iterator[list[Any]]:
        """Yield the ids of expired rows and of their users, in lists of up to ``limit``.

        The search reads all rows, so it is outside the transactions. An index on last_seen_at would make it faster, and
        each recorded use of a session slower.
        """
        (last,) = self._engine.read(f"SELECT max(id) FROM {table}", {})
        with self._engine.own_connection() as reader:  # what it has read is not kept in memory
            for first in range(0, (last or 0) + 1, SEARCH_STEP):
                values = times | {"first": first, "last": first + SEARCH_STEP - 1}
                found = reader.execute(f"{statement} AND id BETWEEN :first AND :last ORDER BY id", values).fetchall()
                for start in range(0, len(found), limit):
                    yield [times | {"id": row[0], "user_id": row[1]} for row in found[start : start + limit]]


def newest_session_time(database: str) -> int:
    """Return the latest time that a database knows of a session, in unix seconds; 0 without a session."""
    with operations(database).open_readonly(database) as db:
        times = db.execute("SELECT max(created_at), max(last_seen_at) FROM sessions", {}).fetchone()
    return max(time or 0 for time in times)


def _user(row: Sequence[Any]) -> User:
    return User(row[0], row[1], hash_as_given(row[2]), *row[3:])


def _user_values(user: User) -> dict[str, Any]:
    _check_storable(email=user.email, hashed_password=user.hashed_password)
    return user._asdict() | {"email_key": user.email.casefold()}


def _insert_user(db: Transaction, user: User) -> User:
    values = _user_values(user)
    (user_id,) = db.execute(f"{INSERT_USER} RETURNING id", values).fetchone()
    claim(db, values["email_key"], user_id, user.created_at)
    return user._replace(id=user_id)


def _can_match(name: str, value: object) -> bool:
    # SQLite finds the row 1 by '1', 1.0 and True, and fails on a lone surrogate or 2**63.
    if name == "id":
        return type(value) is int and value in IDS
    if isinstance(value, str):
        return is_storable(name, value)
    return name == "hashed_password" and isinstance(value, bytes)


def _check_storable(**values: object) -> None:
    for name, value in values.items():
        if not (_can_match(name, value) or (value is None and name in ("session_id", "reset_token"))):
            raise ValueError(f"{name} cannot be {type(value).__name__}")


def _require_row(changed: Result) -> None:
    """Undo the transaction if a statement has changed no row: what its caller has seen is no longer so."""
    if not changed.rowcount:
        raise RolledBack


def _end_session(db: Transaction, session_hash: str) -> bool:
    statement = "DELETE FROM sessions WHERE session_hash = :session_hash RETURNING user_id"
    row = db.execute(statement, {"session_hash": session_hash}).fetchone()
    if row:
        _update_newest_session(db, row[0])
    return row is not None


def _end_sessions(db: Transaction, user_id: int, kept: str | None = None) -> int:
    statement = "DELETE FROM sessions WHERE user_id = :user_id AND session_hash <> :kept"
    ended = db.execute(statement, {"user_id": user_id, "kept": kept or ""}).rowcount
    _update_newest_session(db, user_id)
    return ended


def _revoke_credentials(
    db: Transaction, user_id: int, kept: str | None = None, renewed: str | None = None, *, devices: bool = False
) -> None:
    """Invalidate pending resets, changes of email, invitations and unconfirmed TOTP seeds, and end all sessions.

    With ``devices`` the user's device cookies become void as well.
    The session of the hash ``kept`` continues under the hash ``renewed``. If it has ended, raise RolledBack.
    """
    values = {"user_id": user_id, "device_key": _new_device_key() if devices else None}
    db.execute(f"{REVOKE_PENDING}, device_key = coalesce(:device_key, device_key) WHERE id = :user_id", values)
    db.execute(f"DELETE FROM email_changes WHERE session_id IN ({OWN_SESSIONS})", values)
    if kept is not None:
        _renew_session(db, user_id, kept, renewed)
    _end_sessions(db, user_id, renewed)


def _renew_session(db: Transaction, user_id: int, kept: str, renewed: str | None) -> None:
    statement = "UPDATE sessions SET session_hash = :new WHERE session_hash = :old AND user_id = :user_id"
    _require_row(db.execute(statement, {"user_id": user_id, "old": kept, "new": renewed}))


def _update_newest_session(db: Transaction, user_id: int, login_at: int | None = None) -> None:
    statement = """
        UPDATE users
           SET session_id = (SELECT session_hash FROM sessions WHERE user_id = :user_id ORDER BY id DESC LIMIT 1),
               last_login_at = coalesce(:login_at, last_login_at)
         WHERE id = :user_id"""
    db.execute(statement, {"user_id": user_id, "login_at": login_at})


def _new_device_key() -> str:
    return secrets.token_hex(16)
