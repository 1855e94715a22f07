"""Sessions in the database, and what ends them: a new password, a disabled or deleted user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import storage
from storage import DB, LiveSession, Session, User, newest_session_time
from tests import stored_users
from tests.stored_users import (
    EVES_SESSIONS,
    HASH,
    NEW_HASH,
    NOW,
    SESSIONS,
    add_session,
    all_rows,
    enable_totp,
    find_session,
    live_sessions,
    prune,
    rows,
    run_together,
    set_reset_token,
    spend_token,
)

bob = stored_users.bob
eve = stored_users.eve
populated = stored_users.populated

REFUSED_CHANGES: dict[str, tuple[Any, ...]] = {
    "the password has changed meanwhile": (1, NEW_HASH, b"third", "bob1", "renewed"),
    "the hash is of another type": (1, HASH.decode(), NEW_HASH, "bob1", "renewed"),
    "the session has ended": (1, HASH, NEW_HASH, "bob0", "renewed"),
    "the session is another user's": (1, HASH, NEW_HASH, "eve1", "renewed"),
    "there is no such user": (9, HASH, NEW_HASH, "bob1", "renewed"),
}


@pytest.mark.both_engines
def test_a_changed_password_leaves_one_session_under_a_new_hash(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    assert db.change_password(1, HASH, NEW_HASH, "bob1", "renewed")
    after, bob = all_rows(other), db.find_user_by(id=1)
    assert (bob.hashed_password, bob.session_id, bob.reset_token) == (NEW_HASH, "renewed", None)
    assert live_sessions(db, "renewed", *SESSIONS) == ["renewed", *EVES_SESSIONS]
    assert rows(other, "SELECT reset_expires_at, reset_created_at FROM users WHERE id = 1") == [(None, None)]
    (kept,) = [row for row in before["sessions"] if "bob1" in row]
    assert tuple("renewed" if value == "bob1" else value for value in kept) in after["sessions"]
    assert (bob.totp_secret, bob.totp_since) == ("SEED", NOW)
    assert after["users"][1] == before["users"][1]
    for table in "recovery_codes", "known_addresses", "throttle":
        assert after[table] == before[table]


@pytest.mark.both_engines
@pytest.mark.parametrize("reason", REFUSED_CHANGES)
def test_a_refused_password_change_changes_nothing(populated: None, db: DB, other: Any, reason: str) -> None:
    before = all_rows(other)
    assert not db.change_password(*REFUSED_CHANGES[reason])
    assert all_rows(other) == before


@pytest.mark.both_engines
def test_one_of_eight_threads_changes_a_password(populated: None, db: DB) -> None:
    hashes = [b"hash%d" % index for index in range(8)]
    changed = run_together(8, lambda index: db.change_password(1, HASH, hashes[index], "bob1", f"renewed{index}"))
    assert sum(changed) == 1
    bob, winner = db.find_user_by(id=1), changed.index(True)
    assert (bob.hashed_password, bob.session_id) == (hashes[winner], f"renewed{winner}")


@pytest.mark.both_engines
def test_a_disabled_user_has_no_session_and_no_token(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    db.disable_user(1, NOW)
    bob = db.find_user_by(id=1)
    assert (bob.disabled_at, bob.session_id, bob.reset_token) == (NOW, None, None)
    assert live_sessions(db, *SESSIONS) == EVES_SESSIONS
    assert not spend_token(db, "bob token")
    after = all_rows(other)
    assert after["users"][1] == before["users"][1]
    assert after["recovery_codes"] == before["recovery_codes"]


@pytest.mark.both_engines
def test_a_disabled_user_cannot_sign_in_or_reset_the_password(db: DB, eve: User, bob: User) -> None:
    db.disable_user(1, NOW)
    set_reset_token(db, 1)  # a request at the same time may still store one
    for user in bob, db.find_user_by(id=1):
        assert not add_session(db, user, "s")
    assert not db.find_reset("token", now=NOW, latest=NOW + 300)
    assert not spend_token(db)
    assert db.find_user_by(id=1).hashed_password == HASH
    assert add_session(db, eve, "eve")


def test_an_enabled_user_can_sign_in_and_reset_the_password_again(populated: None, db: DB) -> None:
    db.disable_user(1, NOW)
    db.enable_user(2)
    assert db.find_user_by(id=1).disabled_at == NOW
    db.enable_user(1)
    assert db.find_user_by(id=1).disabled_at is None
    assert live_sessions(db, *SESSIONS) == EVES_SESSIONS
    assert add_session(db, db.find_user_by(id=1), "s")
    set_reset_token(db, 1)
    assert spend_token(db)


def test_disabling_a_user_again_keeps_the_first_time(db: DB, eve: User) -> None:
    for now in NOW, NOW + 60:
        db.disable_user(1, now)
    assert [db.find_user_by(id=number).disabled_at for number in (1, 2)] == [NOW, None]


def test_disabling_an_unknown_user_changes_nothing(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    db.disable_user(9, NOW)
    db.enable_user(9)
    assert all_rows(other) == before


@pytest.mark.both_engines
def test_all_rows_of_a_deleted_user_are_deleted(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    tables = {"sessions": 2, "recovery_codes": 0, "known_addresses": 0}  # table: position of user_id
    db.delete_user(1)
    after = all_rows(other)
    assert after["users"] == before["users"][1:]
    for table, column in tables.items():
        assert {row[column] for row in before[table]} == {1, 2}
        assert after[table] == [row for row in before[table] if row[column] == 2]
    for table in "throttle", "throttle_secret":
        assert after[table] == before[table]


@pytest.mark.both_engines
@pytest.mark.parametrize("kind", [str, bytes])
def test_a_user_with_the_current_password_is_deleted_once(db: DB, eve: User, kind: type) -> None:
    hashed = NEW_HASH if kind is bytes else NEW_HASH.decode()
    db.update_user(2, hashed_password=hashed)
    add_session(db, db.find_user_by(id=2), "s")
    user = db.find_user_by(id=2)
    assert [db.delete_verified_user(user, "s"), db.delete_verified_user(user, "s")] == [True, False]
    assert db.add_user("eve@x.io", HASH).id == 3


@pytest.mark.both_engines
def test_the_user_of_a_session_is_found(db: DB, eve: User) -> None:
    assert add_session(db, eve, "s")
    user = db.find_user_by(id=2)
    assert user.session_id == "s"
    session = db.find_session("s", now=NOW, idle_since=NOW - 1, latest=NOW)
    assert session == (user, LiveSession(1, NOW, NOW + 1000, remember=0, factor_at=None))


RENEWALS: dict[str, Callable[[DB], object]] = {
    "set_totp": lambda db: db.set_totp(db.find_user_by(id=1), "SEED", "bob1", "renewed"),
    "change_password": lambda db: db.change_password(1, HASH, NEW_HASH, "bob1", "renewed"),
    "confirm_totp": lambda db: enable_totp(db, db.find_user_by(id=1), "bob1", "renewed"),
    "remove_totp": lambda db: enable_totp(db, db.find_user_by(id=1), "bob1", "0") and db.remove_totp(1, "0", "renewed"),
}


@pytest.mark.both_engines
@pytest.mark.parametrize("change", RENEWALS)
def test_a_session_under_a_new_hash_keeps_the_id_of_its_row(db: DB, eve: User, bob: User, change: str) -> None:
    for user, name in (eve, "eve"), (bob, "bob1"), (bob, "bob2"):
        add_session(db, user, name)
    assert RENEWALS[change](db)
    names = "eve", "bob1", "bob2", "renewed"
    found = [db.find_session(name, now=NOW, idle_since=NOW - 1, latest=NOW) for name in names]
    others = (3,) if change == "set_totp" else ()  # a seed alone ends no session
    assert [(one[0].id, one[1].row_id) for one in found if one] == [(2, 1), *((1, row_id) for row_id in others), (1, 2)]
    assert (found[1], db.find_user_by(id=1).session_id) == (None, "bob2" if others else "renewed")


@pytest.mark.both_engines
def test_no_session_starts_after_the_password_has_changed(db: DB, bob: User) -> None:
    assert add_session(db, bob, "first")
    db.update_user(1, hashed_password=NEW_HASH)
    assert not add_session(db, bob, "second", replaced="first")
    assert live_sessions(db, "first", "second") == ["first"]
    assert db.find_user_by(id=1).session_id == "first"


@pytest.mark.both_engines
def test_no_session_starts_after_the_second_factor_has_changed(db: DB, bob: User) -> None:
    add_session(db, bob, "0")
    assert enable_totp(db, bob, "0", "1")
    with_totp = db.find_user_by(id=1)
    assert not add_session(db, bob, "2", replaced="1")
    assert add_session(db, with_totp, "2")
    assert db.remove_totp(1)
    assert not add_session(db, with_totp, "3")
    assert add_session(db, bob, "3")
    assert enable_totp(db, bob, "3", "4", now=NOW + 1)
    assert not add_session(db, with_totp, "5")  # this second factor is another one
    assert live_sessions(db, *"012345") == ["4"]


def test_an_unknown_user_gets_no_session(db: DB, bob: User) -> None:
    assert not add_session(db, User(2, "eve@x.io", HASH), "s")


@pytest.mark.both_engines
def test_a_new_session_ends_the_one_it_replaces(db: DB, eve: User, bob: User) -> None:
    for user, session_hash in (bob, "one"), (bob, "two"), (eve, "eve"):
        add_session(db, user, session_hash)
    add_session(db, bob, "three", replaced="one")
    assert live_sessions(db, "one", "two", "three", "eve") == ["two", "three", "eve"]


@pytest.mark.both_engines
def test_a_replaced_session_of_another_user_updates_their_newest(db: DB, eve: User, bob: User) -> None:
    for session_hash in "first", "second":
        add_session(db, bob, session_hash)
    add_session(db, eve, "eve", replaced="second")  # two users of one browser
    assert live_sessions(db, "first", "second", "eve") == ["first", "eve"]
    assert [db.find_user_by(id=number).session_id for number in (1, 2)] == ["first", "eve"]


@pytest.mark.both_engines
def test_a_new_session_deletes_the_expired_ones_of_its_user(db: DB, eve: User, bob: User, other: Any) -> None:
    add_session(db, bob, "expired", expires_at=NOW + 50)
    add_session(db, bob, "idle", now=NOW - 50)
    add_session(db, eve, "eve", expires_at=NOW + 50)
    add_session(db, bob, "used")
    add_session(db, bob, "new", now=NOW + 50, idle_since=NOW - 50)
    assert rows(other, "SELECT session_hash FROM sessions ORDER BY id") == [("eve",), ("used",), ("new",)]


@pytest.mark.both_engines
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_new_session_ends_the_oldest_ones_beyond_the_limit(db: DB, eve: User, bob: User, limit: int) -> None:
    add_session(db, eve, "eve")
    names = ["1", "2", "3", "4"]
    for name in names:
        add_session(db, bob, name, limit=limit)
    assert live_sessions(db, *names, "eve") == [*names[-limit:], "eve"]
    assert db.find_user_by(id=1).session_id == "4"


def test_expired_sessions_do_not_count_towards_the_limit(db: DB, bob: User) -> None:
    add_session(db, bob, "old")
    add_session(db, bob, "expired", expires_at=NOW)
    add_session(db, bob, "new", limit=2)
    assert live_sessions(db, "old", "expired", "new") == ["old", "new"]


@pytest.mark.both_engines
def test_the_row_of_the_user_names_the_newest_session(db: DB, bob: User) -> None:
    for name in "1", "2", "3":
        add_session(db, bob, name)
    named = []
    for name in "2", "3", "1":
        assert db.end_session(name)
        named.append(db.find_user_by(id=1).session_id)
    assert named == ["3", "1", None]


def test_an_ended_session_cannot_end_again(db: DB, eve: User, bob: User) -> None:
    add_session(db, bob, "bob")
    add_session(db, eve, "eve")
    assert [db.end_session("bob"), db.end_session("bob"), db.end_session("never")] == [True, False, False]
    assert find_session(db, "eve") == db.find_user_by(id=2)


def test_all_sessions_of_one_user_end(db: DB, eve: User, bob: User) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "eve"):
        add_session(db, user, name)
    for user_id in (1, 1, 99):
        db.end_sessions(user_id)
    assert live_sessions(db, "1", "2", "eve") == ["eve"]
    assert [db.find_user_by(id=number).session_id for number in (1, 2)] == [None, "eve"]


@pytest.mark.both_engines
@pytest.mark.parametrize(("kept", "left"), [("1", ["1"]), ("2", ["2"]), ("eve", []), ("ended", []), (None, [])])
def test_all_sessions_but_one_end(db: DB, eve: User, bob: User, kept: str | None, left: list[str]) -> None:
    for user, name in (bob, "1"), (bob, "2"), (bob, "3"), (eve, "eve"):
        add_session(db, user, name)
    assert db.end_sessions(1, kept=kept) == 3 - len(left)
    assert live_sessions(db, "1", "2", "3", "eve") == [*left, "eve"]
    assert [db.find_user_by(id=number).session_id for number in (1, 2)] == [left[0] if left else None, "eve"]


@pytest.mark.both_engines
def test_the_sessions_and_tokens_of_all_users_end(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    assert [db.end_all_sessions()["sessions"] for _ in range(2)] == [4, 0]
    assert live_sessions(db, *SESSIONS) == []
    assert [spend_token(db, f"{name} token") for name in ("bob", "eve")] == [False, False]
    for column in "session_id", "reset_token", "reset_expires_at", "reset_created_at":
        assert rows(other, f"SELECT {column} FROM users") == [(None,)] * 2
    after = all_rows(other)
    assert {name for name in after if after[name] != before[name]} == {"users", "sessions"}
    kept = "SELECT id, email, hashed_password, totp_secret, totp_since, totp_step, last_login_at FROM users ORDER BY id"
    assert rows(other, kept) == [
        (number, f"{name}@x.io", HASH, "SEED", NOW, 1000, NOW) for number, name in ((1, "bob"), (2, "eve"))
    ]


@pytest.mark.both_engines
def test_the_live_sessions_of_a_user_are_listed_newest_first(db: DB, eve: User, bob: User) -> None:
    add_session(db, bob, "idle", now=NOW - 50, limit=9)
    add_session(db, bob, "used", limit=9)
    add_session(db, bob, "new", now=NOW + 50, limit=9)
    add_session(db, bob, "future", now=NOW + 351, limit=9)
    add_session(db, bob, "used in the future", limit=9)
    add_session(db, bob, "expires", expires_at=NOW + 50, limit=9)
    add_session(db, eve, "eve")
    db.touch_session("used", NOW + 40)
    db.touch_session("used in the future", NOW + 351)

    def listed(user_id: int, now: int) -> list[str]:
        window = {"now": now, "idle_since": now - 100, "latest": now + 300}
        return [session.session_hash for session in db.list_sessions(user_id, **window)]

    assert listed(1, NOW) == ["expires", "new", "used", "idle"]
    assert listed(1, NOW + 50) == ["new", "used"]
    assert listed(1, NOW + 51) == ["used in the future", "future", "new", "used"]
    assert listed(2, NOW) == ["eve"]
    assert listed(9, NOW) == []


def test_a_listed_session_shows_all_but_its_secret(db: DB, bob: User) -> None:
    digest = "0123456789abcdef" * 4
    session = Session(digest, NOW, NOW, NOW + 1000, "192.0.2.1", "curl/8", 1, NOW)
    db.add_session(bob, session, replaced=None, idle_since=NOW - 100, limit=5)
    (listed,) = db.list_sessions(1, now=NOW, idle_since=NOW - 100, latest=NOW)
    assert listed == session
    assert listed.id == "0123456789abcdef"
    assert "0123456789abcdef" not in repr(listed)


@pytest.mark.both_engines
def test_a_session_lives_within_its_times(db: DB, bob: User) -> None:
    add_session(db, bob, "s")

    def live(now: int, idle_since: int, latest: int) -> bool:
        return bool(db.find_session("s", now=now, idle_since=idle_since, latest=latest))

    assert live(NOW, NOW - 1, NOW)
    assert live(NOW + 999, NOW - 1, NOW)
    assert not live(NOW + 1000, NOW - 1, NOW)
    assert not live(NOW, NOW, NOW)
    assert not live(NOW, NOW - 1, NOW - 1)


@pytest.mark.both_engines
def test_the_last_use_of_a_session_never_moves_back(db: DB, bob: User) -> None:
    for name in "used", "unused":
        add_session(db, bob, name)
    db.touch_session("used", NOW + 60)
    db.touch_session("used", NOW + 30)
    found = [db.find_session(name, now=NOW, idle_since=0, latest=NOW + 60) for name in ("used", "unused")]
    assert [one and one[1].last_seen_at for one in found] == [NOW + 60, NOW]


def test_a_session_with_a_use_in_the_future_is_not_live(db: DB, bob: User) -> None:
    add_session(db, bob, "s")
    db.touch_session("s", NOW + 301)
    assert not find_session(db, "s")


@pytest.mark.both_engines
def test_the_sessions_of_a_deleted_user_are_deleted(db: DB, other: Any, eve: User, bob: User) -> None:
    for user, name in (bob, "bob"), (eve, "eve"):
        add_session(db, user, name)
    if db._engine.name == "SQLite":
        other.execute("PRAGMA foreign_keys = ON")  # off by default
    other.execute("DELETE FROM users WHERE id = 1")
    assert rows(other, "SELECT session_hash FROM sessions") == [("eve",)]


@pytest.mark.both_engines
def test_pruning_updates_the_newest_session_of_each_user(db: DB, eve: User, bob: User) -> None:
    carol = db.add_user("carol@x.io", HASH)
    for name, expires_at in ("old", NOW + 1), ("newer", NOW + 1), ("newest", NOW + 2):
        add_session(db, bob, name, expires_at=expires_at)
    add_session(db, eve, "eve", expires_at=NOW + 2)
    add_session(db, carol, "long", expires_at=NOW + 99)
    add_session(db, carol, "short", expires_at=NOW + 1)
    named = []
    for now in NOW, NOW + 1, NOW + 2:
        prune(db, now)
        named.append([user.session_id for user in db.each_user()])
    assert named == [["newest", "eve", "short"], ["newest", "eve", "long"], [None, None, "long"]]


@pytest.mark.both_engines
def test_pruning_deletes_sessions_that_expired_or_were_not_used(db: DB, eve: User, bob: User) -> None:
    for name, seen, expires_at in [
        ("unused", NOW - 100, NOW + 1),
        ("expired", NOW - 99, NOW),
        ("live", NOW - 99, NOW + 1),
        ("unused, and the newest", NOW - 100, NOW + 1),
    ]:
        add_session(db, bob, name, now=seen, expires_at=expires_at, idle_since=0)
    assert list(db.prune(now=NOW, idle_since=NOW - 100, limit=200)) == [("sessions", 3)]
    assert db._engine.read_all("SELECT session_hash FROM sessions", {}) == [("live",)]
    assert db.find_user_by(id=bob.id).session_id == "live"


@pytest.mark.both_engines
def test_pruning_searches_all_ids(db: DB, bob: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SEARCH_STEP", 3)
    for number in range(10):
        add_session(db, bob, f"s{number}", now=NOW - 1, limit=10, expires_at=NOW + number % 2)
    assert [number for _, number in db.prune(now=NOW, idle_since=0, limit=1)] == [1] * 5
    assert live_sessions(db, *(f"s{number}" for number in range(10))) == [f"s{number}" for number in (1, 3, 5, 7, 9)]


@pytest.mark.both_engines
def test_pruning_keeps_what_came_to_life_after_it_was_found(db: DB, bob: User) -> None:
    for name in "first", "used meanwhile":
        add_session(db, bob, name, now=NOW - 100, idle_since=0)
    eve = db.add_user("eve@x.io", HASH)
    for user in bob, eve:
        set_reset_token(db, user.id, f"token of {user.id}")
    pruning = db.prune(now=NOW + 600, idle_since=NOW - 100, limit=1)
    assert next(pruning) == ("sessions", 1)
    db.touch_session("used meanwhile", NOW - 99)
    assert next(pruning) == ("sessions", 0)
    assert next(pruning) == ("reset_tokens", 1)
    db.set_reset_token(eve.id, "new", now=NOW + 600, expires_at=NOW + 601, keep_since=0)
    assert list(pruning) == [("reset_tokens", 0)]
    assert find_session(db, "used meanwhile")
    assert [user.reset_token for user in db.each_user()] == [None, "new"]


@pytest.mark.both_engines
def test_the_newest_session_time_is_that_of_any_session(db: DB, database: str, eve: User, bob: User) -> None:
    newest = [newest_session_time(database)]
    for user, name, now in (bob, "s", NOW + 5), (eve, "eve", NOW + 9), (bob, "t", NOW):
        add_session(db, user, name, now=now)
        newest.append(newest_session_time(database))
    db.touch_session("t", NOW + 10_000)
    assert [*newest, newest_session_time(database)] == [0, NOW + 5, NOW + 9, NOW + 9, NOW + 10_000]
