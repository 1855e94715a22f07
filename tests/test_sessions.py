"""Sessions: how they start, how long they live, how they are listed and ended, and what is pruned."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from auth import Auth, Caller, LoginFailed, NotFound, SessionRequired, TokenRejected
from settings import Settings
from storage import DB, User
from tests import accounts
from tests.accounts import (
    ACCOUNT_CHANGES,
    DAY,
    EMAIL,
    ENROLMENT,
    FOREIGN_ADDRESS,
    MINUTE,
    MONTH,
    NEW_PASSWORD,
    OTHER,
    OWN_ADDRESS,
    SESSION_ACTIONS,
    WEEK,
    Action,
    Query,
    Row,
    at_once,
    digest,
    live,
    sign_in,
)
from tests.conftest import Clock

user, other_user, row, query = accounts.user, accounts.other_user, accounts.row, accounts.query
three_sessions, hash_calls = accounts.three_sessions, accounts.hash_calls


# Starting a session


@pytest.mark.both_engines
def test_a_session_leads_to_its_user(auth: Auth, user: User, other_user: User) -> None:
    found = auth.get_user_from_session_id(auth.create_session(EMAIL))
    assert found
    assert (found.id, found.email) == (user.id, EMAIL)


@pytest.mark.parametrize("start", [lambda auth: auth.create_session(EMAIL), sign_in], ids=["session", "login"])
def test_a_session_id_is_a_new_uuid_stored_as_its_digest(auth: Auth, row: Row, start: Callable[[Auth], str]) -> None:
    first, second = start(auth), start(auth)
    assert first != second
    assert uuid.UUID(second).version == 4
    assert row().session_id == digest(second)


@pytest.mark.parametrize("email", [OTHER, "", "a\0", "\ud800", None], ids=ascii)
def test_an_unknown_email_gets_no_session(auth: Auth, user: User, email: Any) -> None:
    assert auth.create_session(email) is None


@pytest.mark.both_engines
def test_an_email_in_other_letter_case_gets_a_session_of_the_same_user(auth: Auth, user: User) -> None:
    found = auth.get_user_from_session_id(auth.create_session(EMAIL.upper()))
    assert found
    assert found.id == user.id


@pytest.mark.both_engines
@pytest.mark.parametrize("session_id", [None, "", "None", "nope", "\0", "\ud800", "a" * 2000, "' OR 1=1--"], ids=ascii)
def test_a_wrong_session_id_leads_to_no_user(auth: Auth, user: User, session_id: str | None) -> None:
    assert auth.get_user_from_session_id(session_id) is None  # the user has no session either
    auth.create_session(EMAIL)
    assert auth.get_user_from_session_id(session_id) is None


def test_a_session_id_counts_as_exact_text(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    assert session_id
    altered = [form.format(session_id) for form in ("{}{{}}", "{} ", "{{{}}}", "urn:uuid:{}")]
    assert live(auth, *altered, session_id.replace("-", "")) == [False] * 5
    assert live(auth, session_id) == [True]


def test_the_digests_in_a_row_are_no_credentials(auth: Auth, user: User, row: Row) -> None:
    auth.create_session(EMAIL)
    auth.get_reset_password_token(EMAIL)
    assert live(auth, row().session_id) == [False]
    with pytest.raises(TokenRejected):
        auth.update_password(row().reset_token or "", NEW_PASSWORD)


@pytest.mark.both_engines
def test_a_login_replaces_the_previous_session(auth: Auth, user: User) -> None:
    first = sign_in(auth)
    second = sign_in(auth)
    assert live(auth, first, second) == [False, True]


def test_a_refused_login_ends_no_session(auth: Auth, user: User) -> None:
    session_id = sign_in(auth)
    with pytest.raises(LoginFailed):
        sign_in(auth, "wrong", ended=session_id)
    assert live(auth, session_id) == [True]


@pytest.mark.both_engines
def test_a_login_beyond_the_number_of_sessions_ends_the_oldest(three_sessions: Auth, row: Row) -> None:
    ids = [sign_in(three_sessions) for _ in range(4)]
    assert live(three_sessions, *ids) == [False, True, True, True]
    assert row().session_id == digest(ids[3])


def test_each_user_has_their_own_number_of_sessions(three_sessions: Auth, other_user: User) -> None:
    mine = three_sessions.create_session(EMAIL)
    for _ in range(4):
        three_sessions.create_session(OTHER)
    assert live(three_sessions, mine) == [True]


@pytest.mark.both_engines
def test_an_expired_session_does_not_count_towards_the_number(three_sessions: Auth, clock: Clock) -> None:
    kept, *_unused = (three_sessions.create_session(EMAIL) for _ in range(3))
    clock.advance(WEEK - 1)
    assert live(three_sessions, kept) == [True]
    clock.advance(1)
    newest = [three_sessions.create_session(EMAIL) for _ in range(2)]
    assert live(three_sessions, kept, *newest) == [True, True, True]


@pytest.mark.both_engines
def test_concurrent_logins_leave_as_many_sessions_as_allowed(three_sessions: Auth) -> None:
    ids = at_once(8, lambda: three_sessions.create_session(EMAIL))
    assert sum(live(three_sessions, *map(str, ids))) == 3


@pytest.mark.both_engines
def test_a_login_ends_the_session_that_its_client_held(three_sessions: Auth) -> None:
    mine, elsewhere = sign_in(three_sessions), sign_in(three_sessions)
    new = sign_in(three_sessions, ended=mine)
    assert live(three_sessions, mine, elsewhere, new) == [False, True, True]


@pytest.mark.both_engines
def test_a_login_ends_the_session_that_its_client_held_as_another_user(auth: Auth, db: DB, other_user: User) -> None:
    theirs = sign_in(auth, email=OTHER)
    mine = sign_in(auth, ended=theirs)
    assert live(auth, theirs, mine) == [False, True]
    assert db.find_user_by(id=other_user.id).session_id is None


@pytest.mark.parametrize("replaced", [None, "", "nope", "\ud800"], ids=ascii)
def test_a_client_with_an_unknown_session_id_signs_in(auth: Auth, user: User, replaced: str | None) -> None:
    assert live(auth, sign_in(auth, ended=replaced)) == [True]


@pytest.mark.both_engines
def test_a_session_records_the_address_and_user_agent_of_its_login(auth: Auth, user: User, query: Query) -> None:
    sign_in(auth, caller=Caller("127.0.0.1", agent="é" * 300))
    assert query("SELECT address, user_agent FROM sessions") == [("127.0.0.1", "é" * 200)]


# Signing out


@pytest.mark.both_engines
def test_signing_out_ends_this_session_only(three_sessions: Auth, other_user: User, row: Row) -> None:
    theirs = three_sessions.create_session(OTHER)
    first, second, third = (str(three_sessions.create_session(EMAIL)) for _ in range(3))
    three_sessions.log_out(third)
    assert live(three_sessions, first, second, third, theirs) == [True, True, False, True]
    assert row().session_id == digest(second)
    three_sessions.log_out(first)
    assert live(three_sessions, first, second) == [False, True]
    assert row().session_id == digest(second)
    three_sessions.log_out(second)
    assert row().session_id is None


@pytest.mark.parametrize("session_id", [None, "", "nope", "\ud800"], ids=ascii)
def test_signing_out_needs_a_session(auth: Auth, user: User, session_id: str | None) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(SessionRequired):
        auth.log_out(session_id)
    assert live(auth, mine) == [True]


def test_an_ended_session_cannot_sign_out(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    auth.log_out(session_id)
    with pytest.raises(SessionRequired):
        auth.log_out(session_id)


def test_an_expired_session_cannot_sign_out(auth: Auth, user: User, clock: Clock) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(WEEK)
    with pytest.raises(SessionRequired):
        auth.log_out(session_id)


@pytest.mark.both_engines
def test_of_8_concurrent_sign_outs_one_succeeds(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    results = at_once(8, lambda: auth.log_out(session_id))
    assert sorted(type(result).__name__ for result in results) == ["SessionRequired"] * 7 + ["User"]


@pytest.mark.both_engines
def test_destroy_session_ends_all_sessions_of_one_user(
    three_sessions: Auth, db: DB, user: User, other_user: User, row: Row
) -> None:
    theirs = three_sessions.create_session(OTHER)
    mine = [three_sessions.create_session(EMAIL) for _ in range(3)]
    three_sessions.destroy_session(user.id)
    assert live(three_sessions, *mine, theirs) == [False, False, False, True]
    assert row().session_id is None
    assert db.find_user_by(id=other_user.id).session_id == digest(theirs)


def test_destroy_session_can_be_repeated(auth: Auth, user: User, row: Row) -> None:
    auth.create_session(EMAIL)
    auth.destroy_session(user.id)
    after = row()
    assert after == user._replace(last_login_at=after.last_login_at)
    auth.destroy_session(user.id)
    assert row() == after


@pytest.mark.both_engines
@pytest.mark.parametrize("user_id", [0, -1, 2, 10**9])
def test_destroy_session_of_an_unknown_user_does_nothing(auth: Auth, user: User, user_id: int) -> None:
    session_id = auth.create_session(EMAIL)
    auth.destroy_session(user_id)
    assert live(auth, session_id) == [True]


# Expiry


def test_a_session_ends_after_7_days_without_use(auth: Auth, user: User, clock: Clock) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(WEEK)
    assert live(auth, session_id) == [False]


@pytest.mark.both_engines
def test_a_session_that_is_used_within_7_days_lives_for_another_7(auth: Auth, user: User, clock: Clock) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(WEEK - 1)
    assert live(auth, session_id) == [True]
    clock.advance(WEEK - 1)
    assert live(auth, session_id) == [True]
    clock.advance(WEEK)
    assert live(auth, session_id) == [False]


def test_a_session_in_use_ends_after_30_days(auth: Auth, user: User, clock: Clock) -> None:
    session_id = auth.create_session(EMAIL)
    for _ in range(5):
        clock.advance(6 * DAY - 1)
        assert live(auth, session_id) == [True]
    clock.advance(4)
    assert live(auth, session_id) == [True]
    clock.advance(1)
    assert live(auth, session_id) == [False]


@pytest.mark.parametrize(
    ("changed", "more"), [({"session_idle": 100}, 100), ({"session_lifetime": 100}, 1)], ids=["idle", "lifetime"]
)
def test_both_lifetimes_of_a_session_can_be_set(
    db: DB, settings: Settings, clock: Clock, user: User, changed: dict[str, Any], more: int
) -> None:
    auth = Auth(db, replace(settings, **changed), clock)
    session_id = auth.create_session(EMAIL)
    clock.advance(99)
    assert live(auth, session_id) == [True]
    clock.advance(more)
    assert live(auth, session_id) == [False]


def test_a_short_idle_time_does_not_end_a_session_in_use(db: DB, settings: Settings, clock: Clock, user: User) -> None:
    auth = Auth(db, replace(settings, session_idle=30), clock)
    session_id = auth.create_session(EMAIL)
    for _ in range(10):
        clock.advance(20)
        assert live(auth, session_id) == [True]


def test_the_use_of_a_session_is_recorded_at_most_once_a_minute(
    db: DB, settings: Settings, clock: Clock, user: User, query: Query
) -> None:
    deferred: list[Callable[[], object]] = []
    auth = Auth(db, settings, clock, deferred.append)
    session_id = auth.create_session(EMAIL)
    start = int(clock())
    clock.advance(MINUTE - 1)
    assert live(auth, session_id) == [True]
    assert deferred == []
    clock.advance(1)
    assert live(auth, session_id) == [True]
    assert query("SELECT last_seen_at FROM sessions") == [(start,)]  # the read itself does not write
    clock.advance(MINUTE - 1)
    deferred.pop()()
    assert query("SELECT last_seen_at FROM sessions") == [(start + MINUTE,)]
    assert live(auth, session_id) == [True]
    assert deferred == []


@pytest.mark.both_engines
def test_a_late_record_of_use_does_not_revive_an_ended_session(
    db: DB, settings: Settings, clock: Clock, user: User
) -> None:
    deferred: list[Callable[[], object]] = []
    auth = Auth(db, settings, clock, deferred.append)
    session_id = auth.create_session(EMAIL)
    clock.advance(MINUTE)
    assert live(auth, session_id) == [True]
    auth.destroy_session(user.id)
    deferred.pop()()
    assert live(auth, session_id) == [False]


@pytest.mark.both_engines
def test_a_late_record_of_use_does_not_overwrite_a_later_one(
    db: DB, settings: Settings, clock: Clock, user: User, query: Query
) -> None:
    deferred: list[Callable[[], object]] = []
    auth = Auth(db, settings, clock, deferred.append)
    session_id = auth.create_session(EMAIL)
    for _ in range(2):
        clock.advance(MINUTE)
        assert live(auth, session_id) == [True]
    assert len(deferred) == 2
    for write in reversed(deferred):
        write()
    assert query("SELECT last_seen_at FROM sessions") == [(int(clock()),)]


# A clock that jumps


@pytest.mark.parametrize(("seconds", "lives"), [(1, True), (300, True), (301, False), (DAY, False)])
def test_a_session_from_the_future_is_invalid(auth: Auth, user: User, clock: Clock, seconds: int, lives: bool) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(-seconds)
    assert live(auth, session_id) == [lives]
    clock.advance(seconds)
    assert live(auth, session_id) == [True]


@pytest.mark.parametrize(("seconds", "lives"), [(300, True), (301, False), (DAY, False)])
def test_a_session_used_in_the_future_is_invalid(
    auth: Auth, user: User, clock: Clock, seconds: int, lives: bool
) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(seconds)
    assert live(auth, session_id) == [True]
    clock.advance(-seconds)
    assert live(auth, session_id) == [lives]


@pytest.mark.both_engines
@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_a_new_login_works_after_a_jump_of_the_clock(auth: Auth, clock: Clock, row: Row, seconds: int) -> None:
    sign_in(auth)
    clock.advance(seconds)
    session_id = sign_in(auth)
    assert live(auth, session_id) == [True]
    assert row().session_id == digest(session_id)


# Listing and ending sessions


@pytest.mark.both_engines
def test_sessions_are_listed_newest_first_with_the_id_of_this_one(
    three_sessions: Auth, other_user: User, clock: Clock
) -> None:
    three_sessions.create_session(OTHER)
    first = sign_in(three_sessions, caller=Caller("192.0.2.1", agent="one"))
    clock.advance(5)
    second = sign_in(three_sessions, caller=Caller("192.0.2.2", agent="two"))
    _, listed, own = three_sessions.list_sessions(first)
    now = int(clock())
    assert [(session.address, session.user_agent, session.created_at, session.last_seen_at) for session in listed] == [
        ("192.0.2.2", "two", now, now),
        ("192.0.2.1", "one", now - 5, now - 5),
    ]
    assert [session.id for session in listed] == [digest(second)[:16], digest(first)[:16]]
    assert own == digest(first)[:16]
    assert three_sessions.sessions_of(1) == listed


def test_the_public_id_of_a_session_is_no_credential(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    _, (session,), own = auth.list_sessions(session_id)
    assert session.id == own
    assert live(auth, own, session.session_hash) == [False, False]
    assert session.session_hash not in repr(session)


@pytest.mark.parametrize(("used", "ends"), [(0, WEEK), (DAY, DAY + WEEK), (26 * DAY, MONTH)])
def test_a_listed_session_states_when_it_ends_if_it_is_not_used(
    auth: Auth, user: User, clock: Clock, used: int, ends: int
) -> None:
    session_id, start = auth.create_session(EMAIL), int(clock())
    for _ in range(26):
        clock.advance(used / 26)
        assert live(auth, session_id) == [True]
    (session,) = auth.sessions_of(user.id)
    assert auth.expires_at(session) == start + ends
    clock.now = start + ends - 1
    assert auth.sessions_of(user.id) != []
    clock.advance(1)
    assert auth.sessions_of(user.id) == []
    assert live(auth, session_id) == [False]


@pytest.mark.parametrize(("seconds", "listed"), [(-DAY, 0), (-301, 0), (-300, 1), (DAY, 1)])
def test_a_session_is_listed_while_it_is_live_after_a_jump_of_the_clock(
    auth: Auth, user: User, clock: Clock, seconds: int, listed: int
) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(seconds)
    assert len(auth.sessions_of(user.id)) == listed
    clock.advance(-seconds)
    assert len(auth.sessions_of(user.id)) == 1
    assert live(auth, session_id) == [True]


@pytest.mark.both_engines
def test_one_chosen_session_ends_and_no_other(three_sessions: Auth, user: User, row: Row) -> None:
    first, second, third = (str(three_sessions.create_session(EMAIL)) for _ in range(3))
    ended, own = three_sessions.end_session(first, digest(third)[:16])
    assert (ended.id, own) == (user.id, False)
    assert live(three_sessions, first, second, third) == [True, True, False]
    assert row().session_id == digest(second)
    assert three_sessions.end_session(first, digest(first)[:16])[1] is True
    assert live(three_sessions, first, second) == [False, True]


def test_a_session_of_another_user_cannot_be_ended(auth: Auth, other_user: User) -> None:
    mine, theirs = str(auth.create_session(EMAIL)), str(auth.create_session(OTHER))
    of_this_user = digest(mine), digest(mine)[:15], mine  # none of them is the public id
    for ended_id in (digest(theirs)[:16], digest(theirs), theirs, *of_this_user, "", "%", "all"):
        with pytest.raises(NotFound):
            auth.end_session(mine, ended_id)
    assert live(auth, mine, theirs) == [True, True]


def test_an_ended_or_expired_session_cannot_be_ended(three_sessions: Auth, user: User, clock: Clock) -> None:
    ended, expired, mine = (str(three_sessions.create_session(EMAIL)) for _ in range(3))
    three_sessions.log_out(ended)
    for _ in range(2):
        clock.advance(WEEK // 2 + 1)
        live(three_sessions, mine)
    for gone in (ended, expired):
        with pytest.raises(NotFound):
            three_sessions.end_session(mine, digest(gone)[:16])


@pytest.mark.both_engines
@pytest.mark.parametrize(
    ("except_this", "left"), [(True, [False, True, False]), (False, [False, False, False])], ids=["others", "all"]
)
def test_all_sessions_end_or_all_others(
    three_sessions: Auth, user: User, other_user: User, row: Row, except_this: bool, left: list[bool]
) -> None:
    theirs = three_sessions.create_session(OTHER)
    first, mine, third = (three_sessions.create_session(EMAIL) for _ in range(3))
    assert three_sessions.end_sessions(mine, except_this=except_this).id == user.id
    assert live(three_sessions, first, mine, third, theirs) == [*left, True]
    assert row().session_id == (digest(mine) if except_this else None)


ACTIONS = SESSION_ACTIONS | ACCOUNT_CHANGES | ENROLMENT


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS)
def test_without_a_session_nothing_can_be_seen_ended_or_changed(
    three_sessions: Auth, clock: Clock, user: User, hash_calls: list[bytes], row: Row, act: Action
) -> None:
    expired = three_sessions.create_session(EMAIL)
    clock.advance(WEEK)
    kept, ended = three_sessions.create_session(EMAIL), three_sessions.create_session(EMAIL)
    three_sessions.log_out(ended)
    before = row()
    for session_id in (None, "", "nope", ended, expired):
        with pytest.raises(SessionRequired):
            act(three_sessions, session_id)
    assert row() == before
    assert live(three_sessions, kept) == [True]
    assert hash_calls == []


# Pruning


@pytest.mark.both_engines
def test_pruning_deletes_expired_rows_and_nothing_else(
    three_sessions: Auth, user: User, other_user: User, clock: Clock, row: Row, query: Query
) -> None:
    with pytest.raises(LoginFailed):
        sign_in(three_sessions, "wrong", email="nobody@example.com", caller=Caller(FOREIGN_ADDRESS))
    sign_in(three_sessions, email=OTHER, caller=Caller(OWN_ADDRESS))
    sign_in(three_sessions, caller=Caller(OWN_ADDRESS))
    clock.advance(604_800 - 1)  # the time without use after which a session ends
    assert [kind for kind, _ in three_sessions.prune()] == ["buckets"]
    assert query("SELECT count(*) FROM sessions") == [(2,)]
    mine = three_sessions.create_session(EMAIL)
    clock.advance(1)
    assert list(three_sessions.prune()) == [("sessions", 2)]
    assert query("SELECT session_hash FROM sessions") == [(digest(mine),)]
    assert row().session_id == digest(mine)
    assert query("SELECT session_id FROM users WHERE id = 2") == [(None,)]
    assert query("SELECT * FROM throttle") == []
    assert live(three_sessions, mine) == [True]


@pytest.mark.both_engines
def test_pruning_deletes_200_rows_at_once(auth: Auth, db: DB, user: User, clock: Clock, query: Query) -> None:
    with db._engine.transaction() as writer:
        writer.executemany(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            VALUES (:hash, 1, 0, 0, :now, '', '')
            """,
            [{"hash": str(number), "now": int(clock())} for number in range(450)],
        )
    counts = [(number, query("SELECT count(*) FROM sessions")[0][0]) for _, number in auth.prune()]
    assert counts == [(200, 250), (200, 50), (50, 0)]
