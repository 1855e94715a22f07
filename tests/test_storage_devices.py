"""Two columns of a user: the key of the device cookies, and the time of the last login. What changes them."""

from __future__ import annotations

import re
from collections.abc import Callable
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
    begin_totp,
    find_session,
    prune,
    rows,
    set_reset_token,
    spend_token,
)

bob = stored_users.bob
eve = stored_users.eve
populated = stored_users.populated

Change = Callable[[DB], object]

KEY = re.compile(r"[0-9a-f]{32}")

# All changes of bob that void his device cookies.
REVOCATIONS: dict[str, Change] = {
    "change_password": lambda db: db.change_password(1, HASH, NEW_HASH, "bob1", "renewed"),
    "spend_reset": lambda db: spend_token(db, "bob token"),
    "disable_user": lambda db: db.disable_user(1, NOW),
    "end_sessions": lambda db: db.end_sessions(1, devices=True),
    "end_sessions but one": lambda db: db.end_sessions(1, kept="bob1", devices=True),
}
# Changes that leave them valid, but for confirm_totp, which voids those of Carol. She has the sessions "carol1" and
# "carol2", and an unconfirmed seed.
OTHER_CHANGES: dict[str, Change] = {
    "replace_hash": lambda db: db.replace_hash(1, HASH, NEW_HASH),
    "update_user": lambda db: db.update_user(1, email="robert@x.io", session_id="bob1"),
    "touch_session": lambda db: db.touch_session("bob1", NOW + 60),
    "end_session": lambda db: db.end_session("bob2"),
    "end_sessions": lambda db: db.end_sessions(1),
    "end_sessions but one": lambda db: db.end_sessions(1, kept="bob1"),
    "set_reset_token": lambda db: set_reset_token(db, 1, "newer"),
    "set_totp": lambda db: begin_totp(db, 3, "OTHER"),
    "confirm_totp": lambda db: db.confirm_totp(
        db.find_user_by(id=3), 1000, ["code"], now=NOW, kept="carol1", renewed="renewed"
    ),
    "spend_totp": lambda db: db.spend_totp(1, 1001, 1011),
    "spend_recovery_code": lambda db: db.spend_recovery_code(1, "bob code"),
    "remove_totp": lambda db: db.remove_totp(1),
    "remove_totp from a session": lambda db: db.remove_totp(1, "bob1", "renewed"),
    "prune": lambda db: prune(db, NOW + 1000),
}
LOGINS: dict[str, Change] = {
    "add_session": lambda db: add_session(db, db.find_user_by(id=1), "new", now=NOW + 60),
    "add_session of carol": lambda db: add_session(db, db.find_user_by(id=3), "new", now=NOW + 60, replaced="bob2"),
}


@pytest.fixture
def three_users(populated: None, db: DB, other: Any) -> None:
    """The users of a populated database, and carol. All have a device key."""
    carol = db.add_user("carol@x.io", HASH)
    for name in "carol2", "carol1":
        add_session(db, carol, name)
    assert begin_totp(db, 3)
    other.execute("UPDATE users SET device_key = 'key ' || id")


def device_keys(db: DB) -> list[str | None]:
    return [user.device_key for user in db.each_user()]


def login_times(db: DB) -> list[int | None]:
    return [user.last_login_at for user in db.each_user()]


# The device key


@pytest.mark.both_engines
@pytest.mark.parametrize("change", REVOCATIONS)
def test_a_revocation_replaces_the_device_key_of_its_user(three_users: None, db: DB, other: Any, change: str) -> None:
    assert REVOCATIONS[change](db) is not False
    new, *others = device_keys(db)
    assert KEY.fullmatch(new or "")
    assert others == ["key 2", "key 3"]
    assert rows(other, "SELECT device_key FROM users ORDER BY id") == [(new,), ("key 2",), ("key 3",)]


@pytest.mark.both_engines
def test_a_confirmed_second_factor_replaces_the_device_key(three_users: None, db: DB) -> None:
    assert OTHER_CHANGES["confirm_totp"](db)
    *others, new = device_keys(db)
    assert others == ["key 1", "key 2"]
    assert KEY.fullmatch(new or "")


@pytest.mark.both_engines
@pytest.mark.parametrize("change", sorted({*OTHER_CHANGES, *LOGINS} - {"confirm_totp"}))
def test_other_changes_keep_the_device_keys(three_users: None, db: DB, other: Any, change: str) -> None:
    before = all_rows(other)
    (OTHER_CHANGES | LOGINS)[change](db)
    assert all_rows(other) != before
    assert device_keys(db) == ["key 1", "key 2", "key 3"]


@pytest.mark.both_engines
def test_an_enabled_user_keeps_the_device_key_of_the_revocation(three_users: None, db: DB) -> None:
    db.disable_user(1, NOW)
    before = device_keys(db)
    db.enable_user(1)
    assert device_keys(db) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda db: db.change_password(1, NEW_HASH, HASH, "bob1", "renewed"),
        lambda db: db.change_password(1, HASH, NEW_HASH, "bob0", "renewed"),
        lambda db: spend_token(db, "eve's"),
        lambda db: spend_token(db, "bob token", NOW + 600),
    ],
    ids=["another password", "an ended session", "an unknown token", "an expired token"],
)
def test_a_refused_revocation_keeps_the_device_keys(three_users: None, db: DB, change: Change) -> None:
    assert change(db) is False
    assert device_keys(db) == ["key 1", "key 2", "key 3"]


def test_each_revocation_makes_another_device_key(db: DB, eve: User, bob: User) -> None:
    assert device_keys(db) == [None, None]  # NULL until the first revocation
    found = []
    for _ in range(3):
        for user_id in (1, 2):
            db.end_sessions(user_id, devices=True)
            found.append(device_keys(db)[user_id - 1])
            db.disable_user(user_id, NOW)
            found.append(device_keys(db)[user_id - 1])
    assert len({*found}) == 12


@pytest.mark.both_engines
def test_ending_all_sessions_replaces_the_device_key_of_every_user(db: DB, eve: User, bob: User, other: Any) -> None:
    """A user without a session or a token may have a device cookie, too."""
    add_session(db, bob, "s")
    carol = db.add_user("carol@x.io", HASH)
    db.disable_user(carol.id, NOW)
    other.execute("UPDATE users SET device_key = 'key 1' WHERE id = 1")
    kept: set[str | None] = {*device_keys(db)}  # those of all users so far; eve has none
    assert None in kept
    for ended in (1, 0):
        assert db.end_all_sessions()["sessions"] == ended
        new = {*device_keys(db)}
        assert all(KEY.fullmatch(key or "") for key in new)
        assert not new & kept
        kept |= new


# The time of the last login


@pytest.mark.both_engines
def test_a_login_sets_the_time_of_the_last_login_of_its_user(db: DB, eve: User, bob: User) -> None:
    assert login_times(db) == [None, None]
    add_session(db, bob, "1", now=NOW + 5)
    assert login_times(db) == [NOW + 5, None]
    add_session(db, eve, "2", now=NOW + 9, replaced="1")  # two users of one browser
    assert login_times(db) == [NOW + 5, NOW + 9]
    add_session(db, bob, "3", now=NOW + 7, replaced="2")
    assert login_times(db) == [NOW + 7, NOW + 9]
    found = find_session(db, "3", NOW + 7)
    assert found
    assert (found.id, found.last_login_at) == (1, NOW + 7)


@pytest.mark.both_engines
def test_a_refused_login_keeps_the_time_of_the_last_login(three_users: None, db: DB) -> None:
    db.update_user(1, hashed_password=NEW_HASH)
    db.disable_user(2, NOW)
    without_totp = User(3, "carol@x.io", HASH, totp_since=NOW)
    for user in User(1, "bob@x.io", HASH, totp_since=NOW), db.find_user_by(id=2), without_totp:
        assert not add_session(db, user, "late", now=NOW + 60)
    assert login_times(db) == [NOW] * 3


@pytest.mark.both_engines
@pytest.mark.parametrize("change", [*OTHER_CHANGES, *(f"{name} and devices" for name in REVOCATIONS), "all sessions"])
def test_other_changes_keep_the_time_of_the_last_login(three_users: None, db: DB, other: Any, change: str) -> None:
    revocations: dict[str, Change] = {f"{name} and devices": call for name, call in REVOCATIONS.items()}
    everybody: dict[str, Change] = {"all sessions": lambda db: db.end_all_sessions()}
    before = all_rows(other)
    (OTHER_CHANGES | revocations | everybody)[change](db)
    assert all_rows(other) != before
    assert login_times(db) == [NOW] * 3
