"""The second factor in the database: seeds, time steps and recovery codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from storage import DB, User
from tests import stored_users
from tests.stored_users import (
    EVES_SESSIONS,
    HASH,
    NEW_HASH,
    NOW,
    SEEDED,
    SESSIONS,
    add_session,
    all_rows,
    begin_totp,
    enable_totp,
    live_sessions,
    rows,
    run_together,
    set_reset_token,
    spend_token,
)

bob = stored_users.bob
eve = stored_users.eve
populated = stored_users.populated

UNCONFIRMED: dict[str, tuple[User, str]] = {
    "the seed was replaced": (SEEDED._replace(totp_secret="OLD"), "1"),
    "there was no seed": (SEEDED._replace(totp_secret=None), "1"),
    "the session has ended": (SEEDED, "ended"),
    "the session is another user's": (SEEDED, "eve"),
    "it is another user": (SEEDED._replace(id=2), "eve"),
    "there is no such user": (SEEDED._replace(id=9), "1"),
}


@pytest.mark.both_engines
def test_an_unconfirmed_seed_is_stored_and_not_used(db: DB, eve: User, bob: User) -> None:
    add_session(db, bob, "s")
    assert [begin_totp(db, 1, "FIRST"), begin_totp(db, 1, "SECOND")] == [True, True]
    assert db.find_user_by(id=1) == bob._replace(session_id="s", totp_secret="SECOND", last_login_at=NOW)
    assert db.find_user_by(id=2) == eve
    assert not db.spend_totp(1, 1, 1)
    assert add_session(db, bob, "t")  # signing in needs no code yet


@pytest.mark.both_engines
@pytest.mark.parametrize("reason", ["an old password", "an ended session", "a session of eve", "an unknown user"])
def test_a_seed_needs_the_current_password_and_a_session(db: DB, eve: User, bob: User, other: Any, reason: str) -> None:
    for user, name in (bob, "bob"), (bob, "ended"), (eve, "eve"):
        add_session(db, user, name)
    db.end_session("ended")
    before = all_rows(other)
    user = {"an old password": bob._replace(hashed_password=NEW_HASH), "an unknown user": bob._replace(id=9)}.get(
        reason, bob
    )
    session = {"an ended session": "ended", "a session of eve": "eve"}.get(reason, "bob")
    assert not db.set_totp(user, "SEED", session, "new")
    assert not db.delete_verified_user(user, session)
    assert all_rows(other) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda db: db.change_password(1, HASH, NEW_HASH, "s", "t"),
        lambda db: db.disable_user(1, NOW),
        lambda db: db.end_all_sessions(),
        lambda db: (set_reset_token(db, 1), spend_token(db)),
    ],
    ids=["change_password", "disable_user", "end_all_sessions", "spend_reset"],
)
def test_an_unconfirmed_seed_is_revoked_with_the_old_credentials(
    db: DB, bob: User, change: Callable[[DB], object]
) -> None:
    add_session(db, bob, "s")
    assert begin_totp(db, 1)
    change(db)
    assert db.find_user_by(id=1).totp_secret is None


def test_a_confirmed_seed_is_not_replaced(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    assert not begin_totp(db, 1, "OTHER")
    assert all_rows(other) == before


@pytest.mark.both_engines
def test_a_confirmed_second_factor_leaves_one_session_under_a_new_hash(
    db: DB, eve: User, bob: User, other: Any
) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "eve"):
        add_session(db, user, name)
    set_reset_token(db, 1)
    assert enable_totp(db, bob, "1", "renewed", "a", "b")
    confirmed = db.find_user_by(id=1)
    assert confirmed.device_key
    assert confirmed._replace(device_key=None) == bob._replace(
        session_id="renewed", totp_secret="SEED", totp_since=NOW, last_login_at=NOW
    )
    assert live_sessions(db, "1", "2", "renewed", "eve") == ["renewed", "eve"]
    assert not spend_token(db)
    assert rows(other, "SELECT * FROM recovery_codes") == [(1, "a"), (1, "b")]
    assert not db.spend_totp(1, 1000, 1010)  # it was used to confirm
    assert db.find_user_by(id=2) == eve._replace(session_id="eve", last_login_at=NOW)


@pytest.mark.both_engines
@pytest.mark.parametrize("reason", UNCONFIRMED)
def test_a_refused_confirmation_changes_nothing(db: DB, eve: User, bob: User, other: Any, reason: str) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "eve"):
        add_session(db, user, name)
    set_reset_token(db, 1)
    begin_totp(db, 1)
    before = all_rows(other)
    user, session_hash = UNCONFIRMED[reason]
    assert not db.confirm_totp(user, 1000, ["a"], now=NOW, kept=session_hash, renewed="renewed")
    assert all_rows(other) == before


def test_a_second_factor_is_confirmed_once(populated: None, db: DB, other: Any) -> None:
    before = all_rows(other)
    bob = db.find_user_by(id=1)
    assert not db.confirm_totp(bob, 1001, ["a"], now=NOW, kept="bob1", renewed="renewed")
    assert all_rows(other) == before


@pytest.mark.both_engines
def test_one_of_eight_threads_confirms_a_second_factor(db: DB, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    begin_totp(db, 1)

    def confirm(index: int) -> bool:
        codes = [f"{index} code", f"{index} spare"]
        return db.confirm_totp(SEEDED, 1000 + index, codes, now=NOW, kept="s", renewed=f"renewed{index}")

    confirmed = run_together(8, confirm)
    assert sum(confirmed) == 1
    winner = confirmed.index(True)
    assert rows(other, "SELECT totp_step, session_id FROM users") == [(1000 + winner, f"renewed{winner}")]
    assert rows(other, "SELECT code_hash FROM recovery_codes") == [(f"{winner} code",), (f"{winner} spare",)]


@pytest.mark.both_engines
def test_each_time_step_works_once_and_no_earlier_one_after_it(populated: None, db: DB) -> None:
    steps = [1000, 999, 1001, 1001, 1000, 1003, 1002, 1003, 1004]
    spent = [db.spend_totp(1, step, step + 10) for step in steps]
    assert spent == [False, False, True, False, False, True, False, False, True]
    assert db.spend_totp(2, 1001, 1011)  # each user has their own steps


@pytest.mark.parametrize(("ahead", "works"), [(1, False), (10, False), (11, True), (1000, True)])
def test_a_used_step_far_in_the_future_blocks_no_codes(populated: None, db: DB, ahead: int, works: bool) -> None:
    assert db.spend_totp(1, 2000 + ahead, 2010 + ahead)
    assert [db.spend_totp(1, 2000, 2010), db.spend_totp(1, 2000, 2010)] == [works, False]
    assert db.spend_totp(1, 2001 + ahead, 2011 + ahead)


def test_no_code_works_without_a_second_factor(db: DB, bob: User) -> None:
    assert [db.spend_totp(number, 1, 1) for number in (1, 9)] == [False, False]
    assert not db.spend_recovery_code(1, "")


@pytest.mark.both_engines
def test_a_recovery_code_works_once_and_for_its_user_only(populated: None, db: DB) -> None:
    codes = ["eve code", "bob code", "bob code", "BOB SPARE", "", "bob spare", "bob spare"]
    assert [db.spend_recovery_code(1, code) for code in codes] == [False, True, False, False, False, True, False]
    assert db.spend_recovery_code(2, "eve code")


@pytest.mark.both_engines
@pytest.mark.parametrize("code", ["step", "recovery code"])
def test_one_of_eight_threads_spends_a_code(populated: None, db: DB, code: str) -> None:
    def use(index: int) -> bool:
        return db.spend_totp(1, 1001, 1011) if code == "step" else db.spend_recovery_code(1, "bob code")

    assert sum(run_together(8, use)) == 1


@pytest.mark.both_engines
@pytest.mark.parametrize("session_hash", [None, "bob1", "bob2"])
def test_removing_the_second_factor_deletes_codes_and_other_sessions(
    populated: None, db: DB, other: Any, session_hash: str | None
) -> None:
    bob, eve = db.find_user_by(id=1), db.find_user_by(id=2)
    assert db.remove_totp(1, session_hash, "renewed") if session_hash else db.remove_totp(1)
    assert live_sessions(db, "renewed", *SESSIONS) == (["renewed", *EVES_SESSIONS] if session_hash else EVES_SESSIONS)
    session_id = "renewed" if session_hash else None
    device_key = bob.device_key
    assert db.find_user_by(id=1) == User(1, "bob@x.io", HASH, session_id, device_key=device_key, last_login_at=NOW)
    assert rows(other, "SELECT * FROM recovery_codes ORDER BY code_hash") == [(2, "eve code"), (2, "eve spare")]
    assert rows(other, "SELECT totp_step FROM users ORDER BY id") == [(0,), (1000,)]
    assert not db.spend_totp(1, 1001, 1011)
    assert not spend_token(db, "bob token")
    assert db.find_user_by(id=2) == eve
    assert db.spend_totp(2, 1001, 1011)


def test_the_next_second_factor_counts_its_own_steps(populated: None, db: DB, bob: User) -> None:
    assert db.remove_totp(1, "bob1", "bob3")
    assert begin_totp(db, 1)
    assert db.confirm_totp(SEEDED, 900, ["new code"], now=NOW, kept="bob3", renewed="bob4")
    assert [db.spend_recovery_code(1, code) for code in ("bob code", "new code")] == [False, True]
    assert db.spend_totp(1, 901, 911)


@pytest.mark.both_engines
@pytest.mark.parametrize(("user_id", "session_hash"), [(1, "bob0"), (1, "eve1"), (1, ""), (9, "bob1"), (9, None)])
def test_a_refused_removal_changes_nothing(
    populated: None, db: DB, other: Any, user_id: int, session_hash: str | None
) -> None:
    before = all_rows(other)
    assert not db.remove_totp(user_id, session_hash, "renewed")
    assert all_rows(other) == before


def test_an_unconfirmed_second_factor_cannot_be_removed(db: DB, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    set_reset_token(db, 1)
    begin_totp(db, 1)
    before = all_rows(other)
    assert [db.remove_totp(1, "s", "renewed"), db.remove_totp(1)] == [False, False]
    assert all_rows(other) == before
