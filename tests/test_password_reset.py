"""Reset tokens, invitations, and the links that the operator creates."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import bcrypt
import pytest

from auth import UNCOUNTED, Auth, Caller, PasswordRejected, TokenRejected, UnknownEmail
from settings import Settings
from storage import DB, User
from tests import accounts
from tests.accounts import (
    DAY,
    EMAIL,
    FOREIGN_ADDRESS,
    NEW_PASSWORD,
    OTHER,
    PASSWORD,
    WEEK,
    Query,
    Row,
    at_once,
    digest,
    live,
)
from tests.conftest import Clock

user, other_user, row, query = accounts.user, accounts.other_user, accounts.row, accounts.query
three_sessions, hash_calls = accounts.three_sessions, accounts.hash_calls


# Requesting a token


def test_a_reset_token_is_a_new_uuid_stored_as_its_digest(auth: Auth, row: Row) -> None:
    first, second = auth.get_reset_password_token(EMAIL), auth.get_reset_password_token(EMAIL)
    assert first != second
    assert uuid.UUID(second).version == 4
    assert row().reset_token == digest(second)


@pytest.mark.parametrize("email", [OTHER, "", "a\0", "\ud800", None], ids=ascii)
def test_an_unknown_email_gets_no_reset_token(auth: Auth, user: User, email: Any) -> None:
    with pytest.raises(UnknownEmail):
        auth.get_reset_password_token(email)


def test_a_request_for_a_token_ends_no_session_and_keeps_the_password(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    auth.get_reset_password_token(EMAIL)
    assert live(auth, session_id) == [True]
    assert auth.valid_login(EMAIL, PASSWORD)


@pytest.mark.both_engines
def test_a_user_deleted_during_a_request_for_a_token_is_unknown(
    db: DB, settings: Settings, clock: Clock, user: User
) -> None:
    def clock_in_between() -> float:  # is read after the user was read and before the token is stored
        db.delete_user(user.id)
        return clock()

    with pytest.raises(UnknownEmail):
        Auth(db, settings, clock_in_between).issue_reset_token(EMAIL, caller=UNCOUNTED)


# Using a token


@pytest.mark.both_engines
@pytest.mark.parametrize("email", [None, EMAIL, EMAIL.upper()])
def test_a_token_changes_the_password(auth: Auth, user: User, email: str | None) -> None:
    token = auth.get_reset_password_token(EMAIL)
    assert auth.reset_password(token, NEW_PASSWORD, email=email, caller=UNCOUNTED).id == user.id
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is True
    assert auth.valid_login(EMAIL, PASSWORD) is False


def test_update_password_returns_none(auth: Auth, user: User) -> None:
    update_password: Callable[[str, str], object] = auth.update_password
    assert update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD) is None
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


@pytest.mark.both_engines
def test_a_reset_clears_the_token_and_ends_all_sessions_of_the_user(
    three_sessions: Auth, other_user: User, query: Query
) -> None:
    theirs = three_sessions.create_session(OTHER)
    mine = [three_sessions.create_session(EMAIL) for _ in range(3)]
    three_sessions.update_password(three_sessions.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert live(three_sessions, *mine, theirs) == [False, False, False, True]
    assert query("SELECT session_id, reset_token, reset_expires_at FROM users WHERE id = 1") == [(None, None, None)]
    assert three_sessions.valid_login(OTHER, PASSWORD)


@pytest.mark.both_engines
@pytest.mark.parametrize("token", ["", None, "None", "nope", "\0", "\ud800", "a" * 2000, "' OR 1=1--"], ids=ascii)
def test_an_unknown_token_changes_nothing(auth: Auth, row: Row, token: Any) -> None:
    with pytest.raises(TokenRejected):  # the user has no token either
        auth.update_password(token, NEW_PASSWORD)
    auth.get_reset_password_token(EMAIL)
    before = row()
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert row() == before


@pytest.mark.both_engines
def test_a_spent_token_is_refused(auth: Auth, user: User) -> None:
    token = auth.get_reset_password_token(EMAIL)
    auth.update_password(token, NEW_PASSWORD)
    with pytest.raises(TokenRejected):
        auth.update_password(token, "another")
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


@pytest.mark.both_engines
def test_a_replaced_token_is_refused(auth: Auth, user: User) -> None:
    replaced, token = auth.get_reset_password_token(EMAIL), auth.get_reset_password_token(EMAIL)
    with pytest.raises(TokenRejected):
        auth.update_password(replaced, "another")
    auth.update_password(token, NEW_PASSWORD)


@pytest.mark.both_engines
def test_a_token_is_refused_after_600_seconds(auth: Auth, user: User, clock: Clock) -> None:
    token = auth.get_reset_password_token(EMAIL)
    clock.advance(600)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, PASSWORD)


@pytest.mark.both_engines
def test_a_token_is_valid_for_599_seconds(auth: Auth, user: User, clock: Clock) -> None:
    token = auth.get_reset_password_token(EMAIL)
    clock.advance(599)
    auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


@pytest.mark.both_engines
def test_a_token_that_expires_while_the_password_is_hashed_is_refused(
    auth: Auth, user: User, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = auth.get_reset_password_token(EMAIL)
    original = bcrypt.hashpw

    def slow(secret: bytes, salt: bytes) -> bytes:
        clock.advance(600)
        return original(secret, salt)

    monkeypatch.setattr(bcrypt, "hashpw", slow)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, PASSWORD)


def test_the_lifetime_of_a_token_can_be_set(db: DB, settings: Settings, clock: Clock, user: User) -> None:
    auth = Auth(db, replace(settings, reset_lifetime=3600), clock)
    first = auth.get_reset_password_token(EMAIL)
    clock.advance(3599)
    auth.update_password(first, NEW_PASSWORD)
    second = auth.get_reset_password_token(EMAIL)
    clock.advance(3600)
    with pytest.raises(TokenRejected):
        auth.update_password(second, PASSWORD)


@pytest.mark.parametrize("email", [OTHER, "nobody@example.com", "", "\ud800"], ids=ascii)
def test_a_token_is_refused_with_another_email(auth: Auth, other_user: User, row: Row, email: str) -> None:
    token = auth.get_reset_password_token(EMAIL)
    before = row()
    with pytest.raises(TokenRejected):
        auth.reset_password(token, NEW_PASSWORD, email=email, caller=UNCOUNTED)
    assert row() == before
    assert auth.valid_login(OTHER, PASSWORD)


@pytest.mark.parametrize("password", ["", "a" * 1025, "\ud800"], ids=["empty", "long", "invalid"])
def test_a_refused_password_does_not_spend_the_token(auth: Auth, user: User, password: str) -> None:
    token = auth.get_reset_password_token(EMAIL)
    session_id = auth.create_session(EMAIL)
    with pytest.raises(PasswordRejected):
        auth.update_password(token, password)
    assert live(auth, session_id) == [True]
    auth.update_password(token, NEW_PASSWORD)


@pytest.mark.both_engines
def test_of_8_threads_with_one_token_one_succeeds(auth: Auth, user: User) -> None:
    token = auth.get_reset_password_token(EMAIL)
    new_passwords = iter(f"password {number}" for number in range(8))

    def reset() -> str:
        password = next(new_passwords)
        auth.update_password(token, password)
        return password

    results = at_once(8, reset)
    accepted = [result for result in results if isinstance(result, str)]
    assert sorted(type(result) is TokenRejected for result in results) == [False] + [True] * 7
    assert auth.valid_login(EMAIL, accepted[0])


def use_an_expired_token(auth: Auth, clock: Clock) -> None:
    token = auth.get_reset_password_token(EMAIL)
    clock.advance(600)
    auth.update_password(token, NEW_PASSWORD)


@pytest.mark.parametrize(
    "guess",
    [
        lambda auth, _: auth.reset_password("nope", NEW_PASSWORD, email=EMAIL, caller=UNCOUNTED),
        lambda auth, _: auth.update_password("", NEW_PASSWORD),
        lambda auth, _: auth.update_password(None, NEW_PASSWORD),
        lambda auth, _: auth.reset_password(
            auth.get_reset_password_token(EMAIL), NEW_PASSWORD, email=OTHER, caller=UNCOUNTED
        ),
        use_an_expired_token,
    ],
    ids=["unknown", "empty", "none", "another user's", "expired"],
)
def test_a_refused_token_runs_no_bcrypt(
    auth: Auth, clock: Clock, hash_calls: list[bytes], guess: Callable[[Auth, Clock], None]
) -> None:
    with pytest.raises(TokenRejected):
        guess(auth, clock)
    assert hash_calls == []


# A clock that jumps


@pytest.mark.both_engines
@pytest.mark.parametrize(("seconds", "valid"), [(1, True), (300, True), (301, False), (DAY, False)])
def test_a_reset_token_from_the_future_is_invalid(
    auth: Auth, user: User, clock: Clock, seconds: int, valid: bool
) -> None:
    token = auth.get_reset_password_token(EMAIL)
    clock.advance(-seconds)
    with nullcontext() if valid else pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is valid


@pytest.mark.both_engines
def test_a_new_reset_token_works_after_a_jump_of_the_clock(auth: Auth, user: User, clock: Clock) -> None:
    auth.get_reset_password_token(EMAIL)
    clock.advance(-DAY)
    auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


# Invitations and links of the operator


@pytest.fixture
def invited(auth: Auth) -> User:
    return auth.add_account(EMAIL)


@pytest.mark.both_engines
def test_an_invitation_sets_the_first_password(auth: Auth, invited: User, db: DB) -> None:
    token, _ = auth.link_token(invited)
    assert db.find_user_by(id=invited.id).reset_token == digest(token)
    auth.reset_password(token, PASSWORD, email=EMAIL, caller=UNCOUNTED)
    assert auth.valid_login(EMAIL, PASSWORD)
    with pytest.raises(TokenRejected):
        auth.reset_password(token, NEW_PASSWORD, email=EMAIL, caller=UNCOUNTED)


@pytest.mark.parametrize(("seconds", "valid"), [(WEEK - 1, True), (WEEK, False)])
def test_an_invitation_expires_after_7_days(auth: Auth, clock: Clock, invited: User, seconds: int, valid: bool) -> None:
    token, expires_at = auth.link_token(invited)
    assert expires_at == int(clock()) + WEEK
    clock.advance(seconds)
    with nullcontext() if valid else pytest.raises(TokenRejected):
        auth.update_password(token, PASSWORD)
    assert auth.valid_login(EMAIL, PASSWORD) is valid


@pytest.mark.parametrize(("seconds", "valid"), [(599, True), (600, False)])
def test_a_link_for_a_user_with_a_password_expires_like_any_reset_token(
    auth: Auth, clock: Clock, user: User, seconds: int, valid: bool
) -> None:
    token, expires_at = auth.link_token(user)
    assert expires_at == int(clock()) + 600
    clock.advance(seconds)
    with nullcontext() if valid else pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is valid


@pytest.fixture
def invited_other(auth: Auth, user: User) -> User:
    return auth.add_account(OTHER)


@pytest.mark.both_engines
def test_no_link_is_made_for_a_user_deleted_meanwhile(auth: Auth, db: DB, user: User, invited_other: User) -> None:
    for deleted in (user, invited_other):
        db.delete_user(deleted.id)
        with pytest.raises(UnknownEmail):
            auth.link_token(deleted)


def test_a_new_link_replaces_the_previous_one(auth: Auth, invited: User) -> None:
    previous, newest = auth.link_token(invited)[0], auth.link_token(invited)[0]
    with pytest.raises(TokenRejected):
        auth.update_password(previous, PASSWORD)
    auth.update_password(newest, PASSWORD)


@pytest.mark.both_engines
def test_a_request_for_a_reset_does_not_revoke_an_invitation(auth: Auth, clock: Clock, invited: User) -> None:
    token, _ = auth.link_token(invited)
    clock.advance(DAY)
    with pytest.raises(UnknownEmail):
        auth.issue_reset_token(EMAIL, caller=Caller(FOREIGN_ADDRESS))
    auth.update_password(token, PASSWORD)


def test_a_refused_first_password_does_not_spend_the_invitation(auth: Auth, invited: User) -> None:
    token, _ = auth.link_token(invited)
    with pytest.raises(PasswordRejected):
        auth.update_password(token, "")
    auth.update_password(token, PASSWORD)
