"""Emails that wait for a confirmation (``registrations``, ``email_changes``), and those given up (``former_emails``).

storage.py writes the emails of users, and calls ``claim`` and ``give_up`` in the same transaction. Times are unix
seconds.
"""

from typing import Any

from engines import Engine, Transaction
from engines.errors import AlreadyExists
from engines.schema import LOCK_USER

GOOD_LINKS = 5  # of one email: a request of a stranger must not invalidate the link that the owner waits for
RESERVED_FOR = 7_776_000  # seconds, 90 days, in which nobody else gets an email that was given up

Link = dict[str, Any]  # a mailed link: email, email_key, token_hash (SHA-256 in hex), now, expires_at and latest

LINK_COLUMNS = "email, email_key, token_hash, expires_at"
LINK_VALUES = ":email, :email_key, :token_hash, :expires_at"
IS_GOOD = "token_hash = :token_hash AND email_key = :email_key AND expires_at > :now AND expires_at <= :latest"
DELETE_WAITING = "DELETE FROM registrations WHERE email_key"
NEWEST = f"SELECT id FROM registrations WHERE email_key = :email_key ORDER BY id DESC LIMIT {GOOD_LINKS}"
RESERVED = """
    SELECT 1 FROM former_emails
     WHERE email_key = :email_key AND user_id <> :user_id AND released_at > :before"""


class EmailReserved(AlreadyExists):
    """Another user gave up this email less than RESERVED_FOR seconds ago."""


class Emails:
    """The emails that no user has, or not yet."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add_registration(self, link: Link) -> None:
        """Add a waiting registration. The newest GOOD_LINKS of an email stay."""
        with self._engine.transaction() as db:
            db.execute(f"INSERT INTO registrations ({LINK_COLUMNS}) VALUES ({LINK_VALUES})", link)
            db.execute(f"{DELETE_WAITING} = :email_key AND id NOT IN ({NEWEST})", link)

    def find_registration(self, link: Link) -> str | None:
        """Return the email of a waiting registration as it was sent, or None."""
        row = self._engine.read(f"SELECT email FROM registrations WHERE {IS_GOOD}", link)
        return row and str(row[0])

    def set_change(self, session_hash: str, link: Link) -> bool:
        """Store the pending change of a session, in the place of a former one; return whether the session exists."""
        values = link | {"user_id": None, "session_hash": session_hash}
        with self._engine.transaction(lock=LOCK_USER, values=values) as db:
            statement = f"""
                INSERT INTO email_changes (session_id, {LINK_COLUMNS})
                SELECT id, {LINK_VALUES} FROM sessions WHERE session_hash = :session_hash
                ON CONFLICT (session_id) DO UPDATE SET ({LINK_COLUMNS}) = ({LINK_VALUES})"""
            return db.execute(statement, values).rowcount == 1

    def is_reserved(self, email: str, user_id: int, now: int) -> bool:
        """Return whether an email was given up, and this user may not have it yet."""
        values = {"email_key": email.casefold(), "user_id": user_id, "before": now - RESERVED_FOR}
        return self._engine.read(RESERVED, values) is not None

    def release(self, email: str) -> bool:
        """Free an email that was given up; return whether it was reserved."""
        return self._engine.write("DELETE FROM former_emails WHERE email_key = :key", {"key": email.casefold()}) == 1


def claim(db: Transaction, email_key: str, user_id: int, now: int | None) -> None:
    """Delete the registrations that wait for the email of a user, who has it since this transaction.

    Raises:
        EmailReserved: somebody else gave it up. The caller must roll back.
    """
    values = {"email_key": email_key, "user_id": user_id, "before": (now or 0) - RESERVED_FOR}
    db.execute(f"{DELETE_WAITING} = :email_key", values)
    # Not before the email was written: on PostgreSQL another transaction may have given it up just then.
    if db.execute(RESERVED, values).fetchone():
        raise EmailReserved("another user gave up this email: free it with user release")


def give_up(db: Transaction, user_id: int, row: tuple[str] | None, now: int | None) -> None:
    """Reserve the email_key in ``row`` for its former user, unless there is no row or ``now`` is None."""
    if row and now is not None:
        statement = """
            INSERT INTO former_emails (email_key, user_id, released_at) VALUES (:email_key, :user_id, :now)
            ON CONFLICT (email_key) DO UPDATE SET user_id = :user_id, released_at = :now"""
        db.execute(statement, {"email_key": row[0], "user_id": user_id, "now": now})
