"""The tables of the rate limits: buckets and known addresses."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

from storage import DB, User
from tests import stored_users
from tests.stored_users import NOW, add_expiring_rows, all_rows, prune, rows

bob = stored_users.bob
eve = stored_users.eve
populated = stored_users.populated


def rows_left(other: Any) -> list[list[str]]:
    columns = (("sessions", "session_hash"), ("throttle", "key"), ("known_addresses", "address_hash"))
    return [[name for (name,) in rows(other, f"SELECT {column} FROM {table}")] for table, column in columns]


@pytest.mark.both_engines
def test_pruning_deletes_expired_rows_and_no_live_ones(db: DB, bob: User, other: Any) -> None:
    add_expiring_rows(other)
    assert [prune(db), prune(db)] == [3, 0]
    assert rows_left(other) == [["s1"], ["b1"], ["a1"]]


@pytest.mark.parametrize("kind", ["sessions", "throttle", "known_addresses"])
def test_pruning_deletes_each_kind_of_rows_independently(db: DB, bob: User, other: Any, kind: str) -> None:
    add_expiring_rows(other)
    for table in {"sessions", "throttle", "known_addresses"} - {kind}:
        other.execute(f"DELETE FROM {table}")
    assert [prune(db), prune(db)] == [1, 0]
    assert sum(map(len, rows_left(other))) == 1


def test_pruning_leaves_rows_in_use_unchanged(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    assert prune(db) == 0
    assert all_rows(other) == before


@pytest.mark.both_engines
def test_pruning_deletes_at_most_the_limit_of_each_kind(db: DB, bob: User, other: Any) -> None:
    add_expiring_rows(other, 5)
    deleted, counts = [], []
    for _ in range(4):
        deleted.append(prune(db, limit=2))
        counts.append([len(names) for names in rows_left(other)])
    assert deleted == [6, 6, 3, 0]
    assert counts == [[4] * 3, [2] * 3, [1] * 3, [1] * 3]
    assert rows_left(other) == [["s5"], ["b5"], ["a5"]]


@pytest.mark.both_engines
def test_an_attempt_consumes_from_all_buckets_or_from_none(db: DB, other: Any) -> None:
    buckets = [("wide", 5, 60), ("narrow", 1, 60)]
    assert db.rate_limits.consume(buckets, NOW) == 0
    before = rows(other, "SELECT key, full_at FROM throttle ORDER BY key")
    assert before == [("narrow", NOW + 60), ("wide", NOW + 60)]
    for passed, wait in (0, 60), (59, 1):
        assert db.rate_limits.consume(buckets, NOW + passed) == wait
        assert rows(other, "SELECT key, full_at FROM throttle ORDER BY key") == before
    assert db.rate_limits.consume(buckets, NOW + 60) == 0
    assert rows(other, "SELECT key, full_at FROM throttle ORDER BY key") == [("narrow", NOW + 120), ("wide", NOW + 120)]


@pytest.mark.both_engines
def test_the_wait_is_that_of_the_emptiest_bucket(db: DB) -> None:
    buckets = [("short", 1, 10), ("long", 1, 100)]
    assert db.rate_limits.consume(buckets, NOW) == 0
    assert [db.rate_limits.consume(buckets, NOW), db.rate_limits.consume(buckets[:1], NOW)] == [100, 10]


@pytest.mark.both_engines
def test_a_refund_puts_one_attempt_back_into_each_bucket(db: DB, other: Any) -> None:
    buckets = [("a", 2, 60), ("b", 3, 30)]
    for _ in range(2):
        assert db.rate_limits.consume(buckets, NOW) == 0
    db.rate_limits.refund([*buckets, ("unknown", 1, 60)])
    assert rows(other, "SELECT key, full_at FROM throttle ORDER BY key") == [("a", NOW + 60), ("b", NOW + 30)]


@pytest.mark.both_engines
@pytest.mark.parametrize(("ahead", "waits"), [(300, [300, 300]), (301, [0, 60])])
def test_after_the_clock_was_set_back_a_bucket_has_one_attempt(
    db: DB, other: Any, ahead: int, waits: list[int]
) -> None:
    """Up to CLOCK_TOLERANCE the two times may be from the clocks of two copies, and the bucket counts as empty."""
    other.execute(
        "INSERT INTO throttle VALUES ('bucket', ?)", [NOW + 60 + ahead]
    )  # of size 1: full at most at NOW + 60
    found = [db.rate_limits.consume([("bucket", 1, 60)], NOW) for _ in range(2)]
    assert [min(wait, 300) for wait in found] == waits


@pytest.mark.both_engines
def test_each_attempt_deletes_up_to_ten_full_buckets(db: DB, other: Any) -> None:
    for number in range(12):
        other.execute("INSERT INTO throttle VALUES (?, ?)", (f"full{number}", NOW))
    counts = []
    for _ in range(2):
        assert db.rate_limits.consume([("bucket", 5, 60)], NOW) == 0
        counts.append(rows(other, "SELECT count(*) FROM throttle")[0][0])
    assert counts == [3, 1]


@pytest.mark.both_engines
def test_the_secret_is_the_one_that_was_proposed_first(db: DB, database: str) -> None:
    assert [db.rate_limits.secret(bytes([number] * 32)) for number in (1, 2)] == [bytes([1] * 32)] * 2
    with closing(DB(database)) as second:
        assert second.rate_limits.secret(bytes([3] * 32)) == bytes([1] * 32)


@pytest.mark.both_engines
def test_the_newest_addresses_of_a_user_are_remembered(db: DB, eve: User, bob: User, other: Any) -> None:
    for number in range(5):
        db.rate_limits.remember_address(1, f"address{number}", NOW + number, 3)
    db.rate_limits.remember_address(2, "eve's", NOW, 3)
    db.rate_limits.remember_address(1, "address2", NOW + 9, 3)  # again
    db.rate_limits.remember_address(9, "nobody's", NOW, 3)
    assert rows(other, "SELECT user_id, address_hash, seen_at FROM known_addresses ORDER BY user_id, seen_at") == [
        (1, "address3", NOW + 3),
        (1, "address4", NOW + 4),
        (1, "address2", NOW + 9),
        (2, "eve's", NOW),
    ]
    assert [db.rate_limits.knows_address("address3", NOW + since) for since in (2, 3)] == [True, False]
    assert not db.rate_limits.knows_address("address0", 0)
