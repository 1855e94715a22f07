"""The tables of the rate limits: buckets (``throttle``) and their secret."""

from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from engines import Engine

CLOCK_TOLERANCE = 300  # seconds by which a time may be ahead of the clock; beyond it the clock was set back


class Bucket(NamedTuple):
    """One rate limit of one client or account: a bucket of attempts that refills with time."""

    key: str
    size: int  # attempts at once
    interval: int  # seconds until one attempt is refilled
    emptied: bool = False  # a refused attempt empties it, so that polling for each refill never succeeds
    refuses: bool = True  # else an attempt that finds it empty is allowed, and does not consume from it

    def full_at(self, now: int) -> int:
        """Return the time at which the bucket is full again if it is empty now."""
        return now + self.size * self.interval


# The generic cell rate algorithm (ITU-T I.371) keeps one number for a bucket: the time at which it is full again. If
# that time is later than an empty bucket can have, the clock was set back; the bucket then has one attempt left.
# SQLite has one writer at a time, so Python computes there, in _consumed(). PostgreSQL consumes from all buckets in one
# statement and one round trip. There, a bucket that another client empties between the check and the update becomes
# NULL, which the column refuses. All statements lock the rows in the order in which they are given.
CONSUME = f"""
    WITH asked AS MATERIALIZED (
        SELECT key, pause, most, refuses, place
          FROM unnest(:keys::text[], :intervals::bigint[], :fulls::bigint[], :refuses::boolean[])
               WITH ORDINALITY AS asked (key, pause, most, refuses, place)
    ), taken AS (
        INSERT INTO throttle (key, full_at)
        SELECT key, :now + pause FROM asked
         WHERE NOT EXISTS (SELECT 1 FROM throttle JOIN asked USING (key)
                            WHERE full_at + pause > most AND full_at <= most + {CLOCK_TOLERANCE} AND refuses)
         ORDER BY place
        ON CONFLICT (key) DO UPDATE SET full_at = (
            SELECT CASE WHEN throttle.full_at + pause <= most OR throttle.full_at > most + {CLOCK_TOLERANCE}
                        THEN least(greatest(throttle.full_at, :now) + pause, most)
                        WHEN NOT refuses THEN throttle.full_at END
              FROM asked WHERE asked.key = excluded.key)
        RETURNING key
    ), swept AS (
        DELETE FROM throttle
         WHERE EXISTS (SELECT 1 FROM taken)
           AND key IN (SELECT key FROM throttle WHERE full_at <= :now AND key <> ALL (:keys::text[])
                        LIMIT 10 FOR UPDATE SKIP LOCKED)
    )
    SELECT key FROM taken"""
FIND = "SELECT key, full_at FROM throttle WHERE key = :key"
FIND_ALL = "SELECT key, full_at FROM throttle WHERE key = ANY (:keys)"

# A full bucket needs no row. On PostgreSQL a row that an attempt has locked is left alone, as in CONSUME.
FULL = "SELECT key FROM throttle WHERE full_at <= :now LIMIT :limit"
DELETE_FULL = {
    "SQLite": f"DELETE FROM throttle WHERE key IN ({FULL})",
    "PostgreSQL": f"DELETE FROM throttle WHERE key IN ({FULL} FOR UPDATE SKIP LOCKED)",
}


Found = dict[str, int]  # why an attempt is refused: of each bucket that has a row, the time at which it is full again


class RateLimits:
    """Buckets in a database. Keys come in keyed; times are unix seconds."""

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

        Where one is empty, consume nothing, empty those that a refused attempt empties if they have been used at all,
        and return the seconds to wait.
        """
        consume = self._consume_together if self._engine.name == "PostgreSQL" else self._consume_in_turn
        found = consume(buckets, now)
        if found is None:
            return 0
        waits = [_consumed(bucket, found.get(bucket.key, now), now)[0] for bucket in buckets if bucket.refuses]
        for bucket in buckets:
            full = bucket.full_at(now)
            if bucket.emptied and found.get(bucket.key, full) < full:
                statement = "UPDATE throttle SET full_at = :full WHERE key = :key AND full_at < :full"
                self._engine.write(statement, {"key": bucket.key, "full": full})
                waits.append(bucket.interval)
        return max(1, *waits)

    def is_empty(self, bucket: Bucket, now: int) -> bool:
        """Return whether a bucket has no attempt left."""
        row = self._engine.read(FIND, {"key": bucket.key})
        return row is not None and _consumed(bucket, row[1], now)[0] > 0

    def _consume_in_turn(self, buckets: Sequence[Bucket], now: int) -> Found | None:
        with self._engine.transaction() as db:
            found = dict(filter(None, (db.execute(FIND, {"key": bucket.key}).fetchone() for bucket in buckets)))
            consumed = [(bucket, *_consumed(bucket, found.get(bucket.key, now), now)) for bucket in buckets]
            if any(wait for bucket, wait, _ in consumed if bucket.refuses):
                return found
            statement = """
                INSERT INTO throttle (key, full_at) VALUES (:key, :full_at)
                ON CONFLICT (key) DO UPDATE SET full_at = :full_at"""
            filled = [{"key": bucket.key, "full_at": full_at} for bucket, wait, full_at in consumed if not wait]
            db.executemany(statement, filled)
            if len(found) < len(buckets):  # it deletes more rows than it has added
                db.execute(DELETE_FULL["SQLite"], {"now": now, "limit": 10})
            return None

    def _consume_together(self, buckets: Sequence[Bucket], now: int) -> Found | None:
        values = {
            "keys": [bucket.key for bucket in buckets],
            "intervals": [bucket.interval for bucket in buckets],
            "fulls": [bucket.full_at(now) for bucket in buckets],
            "refuses": [bucket.refuses for bucket in buckets],
            "now": now,
        }
        with suppress(ValueError):  # NULL: somebody else emptied a bucket meanwhile
            if self._engine.write(CONSUME, values):
                return None
        return dict(self._engine.read_all(FIND_ALL, values))

    def refund(self, buckets: Sequence[Bucket]) -> None:
        """Put one attempt back into each bucket."""
        statement = "UPDATE throttle SET full_at = full_at - :interval WHERE key = :key"
        with self._engine.transaction() as db:
            db.executemany(statement, [bucket._asdict() for bucket in buckets])

    def prune(self, *, now: int, limit: int) -> int:
        """Delete up to ``limit`` full buckets; return how many were deleted."""
        return self._engine.write(DELETE_FULL[self._engine.name], {"now": now, "limit": limit})


def _consumed(bucket: Bucket, full_at: int, now: int) -> tuple[int, int]:
    """Return the seconds until one attempt can be consumed, and the time at which the bucket is then full again."""
    full = bucket.full_at(now)
    if full_at > full + CLOCK_TOLERANCE:
        return 0, full
    consumed = max(full_at, now) + bucket.interval
    return max(0, consumed - full), min(consumed, full)
