"""Passkeys (``passkeys``), and the challenges that were used (``spent_challenges``). Times are unix seconds.

storage.py calls the functions in transactions of its own, in which sessions start and end.
"""

from typing import Any, NamedTuple

from engines import Engine, Transaction

MAX_PASSKEYS = 20  # of one user
NEW_FOR = 2_592_000  # seconds, 30 days, in which a reset of the password takes a passkey for that of an intruder

Challenge = tuple[str, int]  # the SHA-256 in hex of a challenge, and when it expires

DELETE_PASSKEYS = "DELETE FROM passkeys WHERE user_id = :user_id"
HAS_OTHER_FACTOR = """
    EXISTS (SELECT 1 FROM users WHERE id = :user_id AND totp_since IS NOT NULL
            UNION ALL SELECT 1 FROM passkeys WHERE user_id = :user_id AND created_at <= :since)"""


class Passkey(NamedTuple):
    """A snapshot of one row of ``passkeys``. Bytes are in base64url."""

    id: int
    name: str
    created_at: int
    last_used_at: int | None
    synced: int  # 1: its provider keeps a copy
    credential_id: str
    public_key: str  # "" once a reset of the password has revoked it
    sign_count: int


Used = tuple[Passkey, Challenge] | None  # the new state of a passkey, and the challenge that it has signed

COLUMNS = ", ".join(f"passkeys.{name}" for name in Passkey._fields)


class Passkeys:
    """The passkeys of all users."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def of_user(self, user_id: int) -> list[Passkey]:
        """Return the passkeys of a user, oldest first."""
        statement = f"SELECT {COLUMNS} FROM passkeys WHERE user_id = :id ORDER BY id"
        return [Passkey(*row) for row in self._engine.read_all(statement, {"id": user_id})]

    def count(self) -> int:
        """Return the number of all passkeys."""
        return int(self._engine.read("SELECT count(*) FROM passkeys", {})[0])

    def handle(self, user_id: int, new: str) -> str | None:
        """Return the handle of a user for authenticators, ``new`` if there was none; None if the user is gone."""
        with self._engine.transaction() as db:
            statement = """
                UPDATE users SET passkey_handle = coalesce(passkey_handle, :new) WHERE id = :id
                RETURNING passkey_handle"""
            row = db.execute(statement, {"id": user_id, "new": new}).fetchone()
            return row and str(row[0])


def spend(db: Transaction, challenge: Challenge) -> Any:
    """Store that a challenge was used; the result has no row if it was used before."""
    statement = "INSERT INTO spent_challenges (digest, expires_at) VALUES (:digest, :expires_at) ON CONFLICT DO NOTHING"
    return db.execute(statement, dict(zip(("digest", "expires_at"), challenge, strict=True)))


def add(db: Transaction, values: dict[str, Any]) -> int | None:
    """Add a passkey with the user's handle; return its id, or None if the user has MAX_PASSKEYS or it is known."""
    statement = """
        INSERT INTO passkeys (user_id, name, created_at, synced, credential_id, public_key, sign_count)
        SELECT :user_id, :name, :created_at, :synced, :credential_id, :public_key, :sign_count
         WHERE (SELECT count(*) FROM passkeys WHERE user_id = :user_id) < :limit
        ON CONFLICT DO NOTHING
        RETURNING id"""
    row = db.execute(statement, values | {"limit": MAX_PASSKEYS}).fetchone()
    return row and int(row[0])


def use(db: Transaction, passkey: Passkey) -> Any:
    """Store the new state of a passkey; the result has no row if it was deleted, or its counter moved on meanwhile."""
    statement = """
        UPDATE passkeys SET sign_count = :sign_count, synced = :synced, last_used_at = :last_used_at
         WHERE id = :id AND (sign_count < :sign_count OR (sign_count = 0 AND :sign_count = 0))"""
    return db.execute(statement, passkey._asdict())


def revoke_new(db: Transaction, user_id: int, now: int, *, keeps_factor: bool) -> None:
    """Delete the passkeys of a user that are younger than NEW_FOR. See DB.spend_reset() for ``keeps_factor``."""
    values = {"user_id": user_id, "since": now - NEW_FOR, "always": int(not keeps_factor)}
    db.execute(f"{DELETE_PASSKEYS} AND created_at > :since AND (:always = 1 OR {HAS_OTHER_FACTOR})", values)
    db.execute("UPDATE passkeys SET public_key = '' WHERE user_id = :user_id AND created_at > :since", values)
