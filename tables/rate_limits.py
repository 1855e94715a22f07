"""The tables of the rate limits: buckets (``throttle``), their secret, and known addresses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from engines import Engine, Transaction
from engines.errors import RolledBack
from engines.schema import LOCK_ALL_USERS, LOCK_USER

Bucket = tuple[str, int, int]  # key, size, seconds until one attempt is refilled

CLOCK_TOLERANCE = 300  # seconds by which a time may be ahead of the clock; beyond it the clock was set back

# The generic cell rate algorithm (ITU-T I.371) keeps one number for a bucket: the time at which it is full again. If
# that time is later than an empty bucket can have, the clock was set back; the bucket then has one attempt left.
# Both statements consume one attempt. SQLite's does so from one bucket, PostgreSQL's from all in one round trip. There,
# a bucket that another client empties between the check and the update becomes NULL, which the column refuses.
CONSUME = {
    "SQLite": """
        INSERT INTO throttle (key, full_at) VALUES (:key, :now + :interval)
        ON CONFLICT (key) DO UPDATE
           SET full_at = CASE WHEN throttle.full_at < :now THEN :now + :interval
                              WHEN throttle.full_at + :interval > :full THEN :full
                              ELSE throttle.full_at + :interval END
         WHERE throttle.full_at + :interval <= :full OR throttle.full_at > :full + :tolerance
        RETURNING key
    """,
    "PostgreSQL": """
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
        SELECT key FROM taken
    """,
}
WAIT = {
    "SQLite": "SELECT full_at + :interval - :full FROM throttle WHERE key = :key",
    "PostgreSQL": """
        SELECT max(full_at + pause - most)
          FROM unnest(:keys::text[], :intervals::bigint[], :fulls::bigint[]) AS asked (key, pause, most)
          JOIN throttle USING (key)
         WHERE full_at <= most + :tolerance
    """,
}

# A full bucket needs no row.
DELETE_FULL = "DELETE FROM throttle WHERE key IN (SELECT key FROM throttle WHERE full_at <= :now LIMIT :limit)"


class RateLimits:
    """Buckets and known addresses in a database. Keys and hashes come in keyed; times are unix seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def secret(self, proposed: bytes) -> bytes:
        """Return the secret of this database; the proposed one is stored where there is none yet."""
        with self._engine.transaction() as db:
            statement = "INSERT INTO throttle_secret (id, secret) VALUES (1, :secret) ON CONFLICT DO NOTHING"
            db.execute(statement, {"secret": proposed})
            return bytes(db.execute("SELECT secret FROM throttle_secret").fetchone()[0])

    def consume(self, buckets: Sequence[Bucket], now: int) -> int:
        """Consume one attempt from each bucket and return 0.

        Where one is empty, change nothing and return the seconds to wait.
        """
        if self._engine.name == "PostgreSQL":
            return self._consume_together(buckets, now)
        with suppress(RolledBack), self._engine.transaction() as db:
            waits = [_consume_one(db, key, size, interval, now) for key, size, interval in buckets]
            if any(waits):
                raise RolledBack
            db.execute(DELETE_FULL, {"now": now, "limit": 10})  # each attempt deletes more rows than it adds
        return max(waits)

    def _consume_together(self, buckets: Sequence[Bucket], now: int) -> int:
        # One statement and one round trip. All statements lock the rows in the order in which they are given.
        values = {
            "keys": [key for key, _, _ in buckets],
            "intervals": [interval for _, _, interval in buckets],
            "fulls": [now + size * interval for _, size, interval in buckets],
            "now": now,
            "tolerance": CLOCK_TOLERANCE,
        }
        with suppress(ValueError):  # NULL: somebody else emptied a bucket meanwhile
            if self._engine.write(CONSUME["PostgreSQL"], values):
                return 0
        (wait,) = self._engine.read(WAIT["PostgreSQL"], values)
        return max(1, wait or 0)

    def refund(self, buckets: Sequence[Bucket]) -> None:
        """Put one attempt back into each bucket."""
        statement = "UPDATE throttle SET full_at = full_at - :interval WHERE key = :key"
        with self._engine.transaction() as db:
            db.executemany(statement, [{"key": key, "interval": interval} for key, _, interval in buckets])

    def knows_address(self, address_hash: str, since: int) -> bool:
        """Return whether somebody logged in to this account from this address after ``since``."""
        statement = "SELECT 1 FROM known_addresses WHERE address_hash = :address_hash AND seen_at > :since"
        return self._engine.read(statement, {"address_hash": address_hash, "since": since}) is not None

    def remember_address(self, user_id: int, address_hash: str, now: int, limit: int) -> None:
        """Record a login from an address, and forget the oldest addresses beyond ``limit``."""
        values = {"user_id": user_id, "address_hash": address_hash, "now": now, "limit": limit, "session_hash": None}
        with self._engine.transaction(lock=LOCK_USER, values=values) as db:
            statement = """
                INSERT INTO known_addresses (user_id, address_hash, seen_at)
                SELECT id, :address_hash, :now FROM users WHERE id = :user_id
                ON CONFLICT (user_id, address_hash) DO UPDATE SET seen_at = :now"""
            db.execute(statement, values)
            statement = """
                DELETE FROM known_addresses
                 WHERE user_id = :user_id
                   AND address_hash NOT IN (SELECT address_hash FROM known_addresses
                                             WHERE user_id = :user_id ORDER BY seen_at DESC LIMIT :limit)"""
            db.execute(statement, values)

    def prune(self, *, now: int, known_since: int, limit: int) -> int:
        """Delete up to ``limit`` full buckets and as many forgotten addresses; return how many rows were deleted."""
        values = {"now": now, "known_since": known_since, "limit": limit}
        with self._engine.transaction(lock=LOCK_ALL_USERS) as db:
            full = db.execute(DELETE_FULL, values).rowcount
            statement = """
                DELETE FROM known_addresses
                 WHERE (user_id, address_hash) IN (SELECT user_id, address_hash FROM known_addresses
                                                    WHERE seen_at <= :known_since LIMIT :limit)"""
            forgotten = db.execute(statement, values).rowcount
        return full + forgotten


def _consume_one(db: Transaction, key: str, size: int, interval: int, now: int) -> int:
    """Consume one attempt from a bucket; return 0, or the seconds to wait."""
    values = {"key": key, "now": now, "interval": interval, "full": now + size * interval, "tolerance": CLOCK_TOLERANCE}
    if db.execute(CONSUME["SQLite"], values).fetchone():
        return 0
    return int(db.execute(WAIT["SQLite"], values).fetchone()[0])
