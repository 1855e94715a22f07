"""Reset tokens in the database."""

from __future__ import annotations

from typing import Any

import pytest

from storage import DB, User
from tests import stored_users
from tests.stored_users import (
    HASH,
    NEW_HASH,
    NOW,
    add_session,
    all_rows,
    find_session,
    live_sessions,
    rows,
    run_together,
    set_reset_token,
    spend_token,
)

bob = stored_users.bob
eve = stored_users.eve

# When the token was made, when it expires, when another one is requested, and whether that one replaces it.
TOKENS: dict[str, tuple[int, int, int, bool]] = {
    "made just now": (NOW, NOW + 600, NOW, False),
    "made after keep_since": (NOW, NOW + 600, NOW + 299, False),
    "made at keep_since": (NOW, NOW + 600, NOW + 300, True),
    "made before keep_since": (NOW, NOW + 600, NOW + 301, True),
    "about to expire": (NOW, NOW + 100, NOW + 99, False),
    "expired": (NOW, NOW + 100, NOW + 100, True),
    "made before the clock was set back": (NOW, NOW + 600, NOW - 1, True),
}


@pytest.mark.both_engines
def test_a_reset_token_is_found_until_it_expires(db: DB, bob: User) -> None:
    set_reset_token(db, 1)
    found = [db.find_reset("token", now=NOW + passed, latest=NOW + 300) for passed in (0, 599, 600)]
    assert [user.id if user else None for user in found] == [1, 1, None]


def test_a_token_from_too_far_in_the_future_is_refused(db: DB, bob: User) -> None:
    set_reset_token(db, 1)
    assert not db.find_reset("token", now=NOW - 301, latest=NOW - 1)
    assert not spend_token(db, now=NOW - 301)


def test_a_token_belongs_to_one_user(db: DB, eve: User) -> None:
    set_reset_token(db, 1)
    assert [db.find_user_by(id=number).reset_token for number in (1, 2)] == ["token", None]


def test_an_unknown_user_gets_no_token(db: DB, bob: User) -> None:
    assert not set_reset_token(db, 2, "token")
    assert db.find_user_by(id=1) == bob


def test_a_new_token_replaces_the_old_one(db: DB, bob: User) -> None:
    set_reset_token(db, 1)
    set_reset_token(db, 1, "newer")
    assert not spend_token(db, "token")
    assert spend_token(db, "newer")


@pytest.mark.both_engines
@pytest.mark.parametrize("case", TOKENS)
def test_a_recent_token_is_not_replaced(db: DB, eve: User, case: str) -> None:
    made, ends, now, replaced = TOKENS[case]
    assert db.set_reset_token(1, "token", now=made, expires_at=ends, keep_since=made)
    given = db.set_reset_token(1, "newer", now=now, expires_at=now + 600, keep_since=now - 300)
    assert given is replaced
    assert [db.find_user_by(id=number).reset_token for number in (1, 2)] == ["newer" if replaced else "token", None]
    found = db.find_reset("newer" if replaced else "token", now=now, latest=now)
    assert found == db.find_user_by(id=1)
    assert db.set_reset_token(2, "eve", now=now, expires_at=now + 600, keep_since=now - 300)


@pytest.mark.both_engines
def test_one_of_eight_threads_gets_a_token(db: DB, bob: User) -> None:
    given = run_together(8, lambda index: set_reset_token(db, 1, f"token{index}", NOW - 300))
    assert sum(given) == 1
    assert db.find_user_by(id=1).reset_token == f"token{given.index(True)}"


@pytest.mark.both_engines
def test_a_spent_token_sets_the_hash_and_ends_the_sessions_of_that_user(db: DB, eve: User, bob: User) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "eve"):
        add_session(db, user, name)
    set_reset_token(db, 1)
    assert spend_token(db)
    assert live_sessions(db, "1", "2", "eve") == ["eve"]
    after = db.find_user_by(id=1)
    assert after == User(1, "bob@x.io", NEW_HASH, device_key=after.device_key, last_login_at=NOW)
    assert db.find_user_by(id=2).hashed_password == HASH
    assert not spend_token(db, new=b"third")


@pytest.mark.both_engines
def test_a_token_that_is_not_live_changes_nothing(db: DB, bob: User) -> None:
    set_reset_token(db, 1)
    add_session(db, bob, "s")
    before = db.find_user_by(id=1)
    for token_hash, now in ("wrong", NOW), ("", NOW), ("TOKEN", NOW), ("token", NOW + 600):
        assert not spend_token(db, token_hash, now)
    assert find_session(db, "s") == before


@pytest.mark.both_engines
def test_one_of_eight_threads_spends_a_token(db: DB, bob: User) -> None:
    set_reset_token(db, 1)
    hashes = [b"hash%d" % index for index in range(8)]
    spent = run_together(8, lambda index: spend_token(db, new=hashes[index]))
    assert sum(spent) == 1
    assert db.find_user_by(id=1).hashed_password == hashes[spent.index(True)]


@pytest.mark.both_engines
def test_pruning_erases_expired_tokens_and_no_live_ones(db: DB, bob: User, other: Any) -> None:
    for number, expires_at in enumerate((NOW - 1, NOW, NOW + 1)):
        user = db.add_user(f"{number}@x.io", HASH)
        db.set_reset_token(user.id, f"t{number}", now=NOW - 600, expires_at=expires_at, keep_since=NOW)
    before = all_rows(other)
    assert list(db.prune(now=NOW, idle_since=0, limit=200)) == [("reset_tokens", 2)]
    columns = "reset_token, reset_expires_at, reset_created_at"
    erased = [(None, None, None)] * 3  # bob never had one
    assert rows(other, f"SELECT {columns} FROM users ORDER BY id") == [*erased, ("t2", NOW + 1, NOW - 600)]
    assert {table: found for table, found in all_rows(other).items() if found != before[table]}.keys() == {"users"}
    assert list(db.prune(now=NOW, idle_since=0, limit=200)) == []
