"""The tables of the rate limits: buckets and their secret."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from storage import DB, User
from tables.rate_limits import Bucket
from tests import stored_users
from tests.stored_users import NOW, add_expiring_rows, all_rows, prune, rows, run_together

bob = stored_users.bob
eve = stored_users.eve
populated = stored_users.populated

PAIR = Bucket("pair", 1, 60)
TRIPLE = Bucket("triple", 3, 60)
EMPTIED = Bucket("emptied", 5, 100, emptied=True)
EMPTY = NOW + 500  # the full_at of EMPTIED when it has no attempt left at NOW


def rows_left(other: Any) -> list[list[str]]:
    columns = (("sessions", "session_hash"), ("throttle", "key"))
    return [[name for (name,) in rows(other, f"SELECT {column} FROM {table}")] for table, column in columns]


def full_at(other: Any) -> dict[str, int]:
    """Return for each bucket with a row when it is full again."""
    return dict(rows(other, "SELECT key, full_at FROM throttle"))


def versions(db: DB, other: Any) -> list[Any]:
    """Return something that every write into a bucket changes."""
    on_sqlite = db._engine.name == "SQLite"
    return rows(other, "PRAGMA data_version" if on_sqlite else "SELECT key, ctid::text FROM throttle ORDER BY key")


# Pruning


@pytest.mark.both_engines
def test_pruning_deletes_expired_rows_and_no_live_ones(db: DB, bob: User, other: Any) -> None:
    add_expiring_rows(other)
    assert [prune(db), prune(db)] == [2, 0]
    assert rows_left(other) == [["s1"], ["b1"]]


@pytest.mark.parametrize("kind", ["sessions", "throttle"])
def test_pruning_deletes_each_kind_of_rows_independently(db: DB, bob: User, other: Any, kind: str) -> None:
    add_expiring_rows(other)
    for table in {"sessions", "throttle"} - {kind}:
        other.execute(f"DELETE FROM {table}")
    assert [prune(db), prune(db)] == [1, 0]
    assert sum(map(len, rows_left(other))) == 1


def test_pruning_leaves_rows_in_use_unchanged(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    assert prune(db) == 0
    assert all_rows(other) == before


@pytest.mark.both_engines
def test_a_step_of_pruning_deletes_at_most_the_limit(db: DB, bob: User, other: Any) -> None:
    add_expiring_rows(other, 5)
    counts = []
    for kind, number in db.prune(now=NOW, idle_since=0, limit=2):
        counts.append((kind, number, *map(len, rows_left(other))))
    sessions = [("sessions", 2, 4, 6), ("sessions", 2, 2, 6), ("sessions", 1, 1, 6)]
    assert counts == [*sessions, ("buckets", 2, 1, 4), ("buckets", 2, 1, 2), ("buckets", 1, 1, 1)]
    assert rows_left(other) == [["s5"], ["b5"]]


@pytest.mark.both_engines
def test_an_attempt_that_adds_a_row_deletes_up_to_ten_full_buckets(db: DB, other: Any) -> None:
    for number in range(12):
        other.execute("INSERT INTO throttle VALUES (?, ?)", (f"full{number}", NOW))
    counts = []
    for key in "one", "another":
        assert db.rate_limits.consume([EMPTIED._replace(key=key)], NOW) == 0
        counts.append(len(full_at(other)))
    assert counts == [3, 2]


# Attempts


@pytest.mark.both_engines
def test_an_attempt_consumes_from_all_buckets_or_from_none(db: DB, other: Any) -> None:
    buckets = [Bucket("wide", 5, 60), PAIR]
    assert db.rate_limits.consume(buckets, NOW) == 0
    before = full_at(other)
    assert before == dict.fromkeys(["wide", "pair"], NOW + 60)
    for passed, wait in (0, 60), (59, 1):
        assert db.rate_limits.consume(buckets, NOW + passed) == wait
        assert full_at(other) == before
    assert db.rate_limits.consume(buckets, NOW + 60) == 0
    assert full_at(other) == dict.fromkeys(["wide", "pair"], NOW + 120)


@pytest.mark.both_engines
def test_the_wait_is_that_of_the_emptiest_bucket(db: DB) -> None:
    buckets = [Bucket("short", 1, 10), Bucket("long", 1, 100)]
    assert db.rate_limits.consume(buckets, NOW) == 0
    assert [db.rate_limits.consume(buckets, NOW), db.rate_limits.consume(buckets[:1], NOW)] == [100, 10]


@pytest.mark.both_engines
def test_many_threads_consume_exactly_the_size_of_the_smallest_bucket(db: DB, other: Any) -> None:
    buckets = [Bucket("wide", 100, 60), Bucket("pair", 10, 60), Bucket("other", 12, 60)]

    def consume(_: int) -> list[int]:
        return [db.rate_limits.consume(buckets, NOW) for _ in range(6)]

    waits = [wait for waited in run_together(8, consume) for wait in waited]
    assert waits.count(0) == 10
    assert {wait for wait in waits if wait} <= {60, 1}  # 1: refused by a bucket that a simultaneous attempt emptied
    counted = {"wide": 10, "pair": 10, "other": 10}
    assert full_at(other) == {key: NOW + 60 * attempts for key, attempts in counted.items()}


@pytest.mark.both_engines
def test_many_threads_never_consume_more_than_the_size_of_a_bucket_that_is_emptied(db: DB, other: Any) -> None:
    buckets = [EMPTIED, Bucket("site", 7, 60, emptied=True), Bucket("pair", 4, 60)]

    def consume(_: int) -> list[int]:
        return [db.rate_limits.consume(buckets, NOW) for _ in range(6)]

    waits = [wait for waited in run_together(8, consume) for wait in waited]
    assert 0 < waits.count(0) <= 4  # a refused attempt may empty a bucket while another one consumes
    assert full_at(other)["emptied"] == EMPTY
    assert full_at(other)["site"] == NOW + 7 * 60


@pytest.mark.both_engines
def test_an_attempt_counts_the_simultaneous_ones_that_were_faster(db: DB, other: Any) -> None:
    with ThreadPoolExecutor(1) as pool:
        with db._engine.transaction() as faster:
            faster.execute("INSERT INTO throttle VALUES ('pair', :full_at)", {"full_at": NOW + 60})
            consuming = pool.submit(db.rate_limits.consume, [Bucket("wide", 5, 60), PAIR], NOW)
            with pytest.raises(TimeoutError):
                consuming.result(timeout=0.1)
        assert consuming.result(timeout=5) == 60
    assert full_at(other) == {"pair": NOW + 60}


@pytest.mark.both_engines
def test_a_bucket_that_does_not_refuse_is_consumed_until_it_is_empty(db: DB, other: Any) -> None:
    counting = Bucket("counting", 2, 500, refuses=False)
    assert [db.rate_limits.consume([TRIPLE, counting], NOW) for _ in range(4)] == [0, 0, 0, 60]
    assert full_at(other) == {"triple": NOW + 180, "counting": NOW + 1000}
    assert db.rate_limits.is_empty(counting, NOW)
    for passed, full in (499, 1000), (500, 1500):
        assert db.rate_limits.consume([counting], NOW + passed) == 0
        assert full_at(other)["counting"] == NOW + full


# Refunds


@pytest.mark.both_engines
def test_a_refund_puts_one_attempt_back_into_each_bucket(db: DB, other: Any) -> None:
    buckets = [Bucket("a", 2, 60), Bucket("b", 3, 30)]
    for _ in range(2):
        assert db.rate_limits.consume(buckets, NOW) == 0
    db.rate_limits.refund([*buckets, Bucket("unknown", 1, 60)])
    assert full_at(other) == {"a": NOW + 60, "b": NOW + 30}


# Buckets that a refused attempt empties


@pytest.mark.both_engines
def test_a_refused_attempt_empties_a_used_bucket_and_charges_no_other(db: DB, other: Any) -> None:
    buckets = [EMPTIED, Bucket("wide", 5, 60), PAIR]
    assert db.rate_limits.consume(buckets, NOW) == 0
    charged = full_at(other)
    assert db.rate_limits.consume(buckets, NOW) == 100  # the interval of the emptied bucket is longer than that of PAIR
    assert full_at(other) == charged | {"emptied": EMPTY}
    assert db.rate_limits.consume([EMPTIED], NOW + 100) == 0  # one attempt is refilled in the usual time


@pytest.mark.both_engines
@pytest.mark.parametrize(("interval", "wait"), [(60, 100), (500, 500)])
def test_the_wait_after_emptying_is_the_longest_one(db: DB, interval: int, wait: int) -> None:
    buckets = [Bucket("refusing", 1, interval), EMPTIED, Bucket("shorter", 9, 10, emptied=True)]
    assert [db.rate_limits.consume(buckets, NOW) for _ in range(2)] == [0, wait]


@pytest.mark.both_engines
def test_polling_for_each_refill_never_succeeds(db: DB, other: Any) -> None:
    """An attempt that is repeated before the time to wait has passed is refused again, and waits as long again."""
    for _ in range(5):
        assert db.rate_limits.consume([EMPTIED], NOW) == 0
    for passed in range(0, 1000, 50):
        assert db.rate_limits.consume([EMPTIED], NOW + passed) == 100
        assert full_at(other)["emptied"] == EMPTY + passed


@pytest.mark.both_engines
def test_a_bucket_without_a_row_is_not_emptied(db: DB, other: Any) -> None:
    assert db.rate_limits.consume([PAIR], NOW) == 0
    before = versions(db, other)
    assert db.rate_limits.consume([EMPTIED, PAIR], NOW) == 60
    assert full_at(other) == {"pair": NOW + 60}
    assert versions(db, other) == before


@pytest.mark.both_engines
@pytest.mark.parametrize("later", [0, 1, 300])
def test_a_bucket_that_is_empty_already_is_not_written(db: DB, other: Any, later: int) -> None:
    """It may be emptier than an empty one, where the clocks of two copies differ."""
    assert db.rate_limits.consume([PAIR], NOW) == 0
    other.execute("INSERT INTO throttle VALUES ('emptied', ?)", [EMPTY + later])
    before = versions(db, other)
    assert db.rate_limits.consume([EMPTIED, PAIR], NOW) == 100 + later
    assert full_at(other)["emptied"] == EMPTY + later
    assert versions(db, other) == before


@pytest.mark.both_engines
def test_the_first_wait_of_an_emptied_bucket_is_its_interval(db: DB, other: Any) -> None:
    other.execute("INSERT INTO throttle VALUES ('emptied', ?)", [EMPTY - 1])  # almost empty: refused for 99 seconds
    assert db.rate_limits.consume([EMPTIED], NOW) == 100
    assert full_at(other) == {"emptied": EMPTY}


# A clock that was set back


@pytest.mark.both_engines
@pytest.mark.parametrize(("ahead", "waits"), [(300, [300, 300]), (301, [0, 60])])
def test_after_the_clock_was_set_back_a_bucket_has_one_attempt(
    db: DB, other: Any, ahead: int, waits: list[int]
) -> None:
    """Up to CLOCK_TOLERANCE the two times may be from the clocks of two copies, and the bucket counts as empty."""
    other.execute("INSERT INTO throttle VALUES ('pair', ?)", [NOW + 60 + ahead])  # an empty one is full at NOW + 60
    found = [db.rate_limits.consume([PAIR], NOW) for _ in range(2)]
    assert [min(wait, 300) for wait in found] == waits


@pytest.mark.both_engines
def test_a_bucket_is_empty_while_it_has_no_attempt(db: DB, other: Any) -> None:
    found = [db.rate_limits.is_empty(TRIPLE, NOW)]
    for _ in range(3):
        assert db.rate_limits.consume([TRIPLE], NOW) == 0
        found.append(db.rate_limits.is_empty(TRIPLE, NOW))
    assert found == [False, False, False, True]
    assert [db.rate_limits.is_empty(TRIPLE, NOW + passed) for passed in (59, 60, 10_000)] == [True, False, False]
    # After the clock was set back the bucket has one attempt; within the tolerance it counts as empty.
    assert [db.rate_limits.is_empty(TRIPLE, NOW - passed) for passed in (1, 300, 301)] == [True, True, False]
    assert full_at(other) == {"triple": NOW + 180}


# The secret


@pytest.mark.both_engines
def test_the_secret_is_the_one_that_was_proposed_first(db: DB, database: str) -> None:
    assert [db.rate_limits.secret(bytes([number] * 32)) for number in (1, 2)] == [bytes([1] * 32)] * 2
    with closing(DB(database)) as second:
        assert second.rate_limits.secret(bytes([3] * 32)) == bytes([1] * 32)
