"""Accounts: how they are created, disabled and deleted, and how a signed-in user changes the password."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import bcrypt
import pytest

from auth import (
    UNCOUNTED,
    Auth,
    AuthError,
    Caller,
    EmailRejected,
    EmailTaken,
    LoginFailed,
    PasswordRejected,
    ReauthenticationFailed,
    RegistrationClosed,
    SessionRequired,
    TokenRejected,
    TooManyAttempts,
    UnknownEmail,
    _hash_password,
)
from credentials import totp
from settings import Settings
from storage import DB, NoResultFound, User
from tests import accounts
from tests.accounts import (
    DAY,
    EMAIL,
    FOREIGN_ADDRESS,
    NEW_PASSWORD,
    OTHER,
    OWN_ADDRESS,
    PASSWORD,
    Action,
    Query,
    Row,
    after_password_check,
    at_once,
    digest,
    in_production,
    live,
    sign_in,
    switch_on,
)
from tests.conftest import COST, Clock

user, other_user, row, query = accounts.user, accounts.other_user, accounts.row, accounts.query
three_sessions, hash_calls = accounts.three_sessions, accounts.hash_calls


# Creating an account


@pytest.mark.both_engines
def test_a_new_user_is_stored_with_a_hash(auth: Auth, db: DB) -> None:
    user = auth.register_user(EMAIL, PASSWORD)
    assert (user.id, user.email, user.session_id, user.reset_token) == (1, EMAIL, None, None)
    assert db.find_user_by(email=EMAIL) == user
    assert isinstance(user.hashed_password, bytes)
    assert bcrypt.checkpw(PASSWORD.encode(), user.hashed_password)


@pytest.mark.both_engines
def test_an_email_can_have_one_account_only(auth: Auth, user: User, row: Row) -> None:
    with pytest.raises(ValueError, match=r"^User bob@example\.com already exists$") as refusal:
        auth.register_user(EMAIL, NEW_PASSWORD)
    assert isinstance(refusal.value, EmailTaken)
    assert refusal.value.message == "email already registered"
    assert row() == user


@pytest.mark.both_engines
@pytest.mark.parametrize(("email", "same"), [(EMAIL, "Bob@EXAMPLE.com"), ("é@x", "É@X"), ("ŠÁRKA", "šárka")])
def test_an_email_in_other_letter_case_is_the_same_email(auth: Auth, email: str, same: str) -> None:
    auth.register_user(email, PASSWORD)
    with pytest.raises(EmailTaken, match=f"^User {same} already exists$"):
        auth.register_user(same, PASSWORD)
    assert auth.valid_login(same, PASSWORD)


@pytest.mark.both_engines
@pytest.mark.parametrize(
    "email",
    ["nope", "unknown@email", "a b@x", " a@x ", '"a"@x', "a'--", "%", "a@b@c", "é@x", "почта@x", "a" * 254, "é" * 127],
)
def test_an_unusual_email_is_stored_unchanged(auth: Auth, email: str) -> None:
    assert auth.register_user(email, PASSWORD).email == email
    assert auth.valid_login(email, PASSWORD)


@pytest.mark.parametrize(
    ("email", "why"),
    [
        ("", "blank"),
        (" ", "blank"),
        ("\t", "blank"),
        ("\u3000", "blank"),
        ("a" * 255, "254 bytes"),
        ("é" * 128, "254 bytes"),
        ("a\0@x", "control"),
        ("a@x\n", "control"),
        ("a\r\nb@x", "control"),
        ("a\x1b@x", "control"),
        ("a\x7f@x", "control"),
        ("a\x85@x", "control"),
        ("a\ud800@x", "text"),
    ],
    ids=ascii,
)
def test_an_invalid_email_is_refused_with_the_reason(auth: Auth, db: DB, email: str, why: str) -> None:
    with pytest.raises(EmailRejected, match=why):
        auth.register_user(email, PASSWORD)
    with pytest.raises(NoResultFound):
        db.find_user_by(id=1)


@pytest.mark.parametrize("password", ["", "a" * 1025, "é" * 513, "\ud800"], ids=["empty", "long", "bytes", "invalid"])
def test_an_invalid_password_is_refused(auth: Auth, db: DB, password: str) -> None:
    with pytest.raises(PasswordRejected):
        auth.register_user(EMAIL, password)
    with pytest.raises(NoResultFound):
        db.find_user_by(email=EMAIL)


@pytest.mark.parametrize("password", ["1", " ", "a\0b", "a" * 73, "a" * 1024, "пароль" * 43], ids=ascii)
def test_any_other_password_is_accepted_and_signs_in(auth: Auth, password: str) -> None:
    auth.register_user(EMAIL, password)
    assert auth.valid_login(EMAIL, password) is True
    assert auth.valid_login(EMAIL, password[:-1]) is False


@pytest.mark.parametrize(
    ("email", "password"), [("", PASSWORD), ("a\0", PASSWORD), ("new@x", ""), ("new@x", "\ud800")], ids=ascii
)
def test_an_invalid_registration_runs_no_bcrypt(auth: Auth, hash_calls: list[bytes], email: str, password: str) -> None:
    with pytest.raises(AuthError):
        auth.register_user(email, password)
    assert hash_calls == []


@pytest.mark.both_engines
@pytest.mark.slow
def test_of_32_concurrent_registrations_one_succeeds(auth: Auth, query: Query) -> None:
    results = at_once(32, lambda: auth.register_user(EMAIL, PASSWORD))
    assert sum(isinstance(result, User) for result in results) == 1
    losers = [result for result in results if not isinstance(result, User)]
    assert {(type(loser), str(loser)) for loser in losers} == {(EmailTaken, f"User {EMAIL} already exists")}
    assert query("SELECT count(*) FROM users") == [(1,)]


@pytest.mark.parametrize(("mode", "message"), [("invitation", "is by invitation only"), ("closed", "is closed")])
def test_registration_can_be_closed(
    db: DB, settings: Settings, clock: Clock, hash_calls: list[bytes], mode: str, message: str
) -> None:
    auth = Auth(db, replace(settings, registration=mode), clock)
    for email in ("new@example.com", EMAIL, ""):  # the refusal does not reveal which emails have an account
        with pytest.raises(RegistrationClosed, match=f"^registration {message}$"):
            auth.create_account(email, PASSWORD, caller=Caller(OWN_ADDRESS))
    assert [user.email for user in db.each_user()] == [EMAIL, OTHER]
    assert hash_calls == []


# Accounts that the operator adds


@pytest.mark.parametrize("mode", ["open", "invitation", "closed"])
def test_the_operator_can_always_add_an_account(db: DB, settings: Settings, clock: Clock, mode: str) -> None:
    auth = Auth(db, replace(settings, registration=mode), clock)
    token, _ = auth.link_token(auth.add_account(EMAIL))
    auth.reset_password(token, PASSWORD, email=EMAIL, caller=UNCOUNTED)
    assert auth.valid_login(EMAIL, PASSWORD)


@pytest.mark.both_engines
def test_an_account_records_when_it_was_created(auth: Auth, clock: Clock) -> None:
    assert auth.register_user(EMAIL, PASSWORD).created_at == int(clock())
    assert auth.add_account(OTHER).created_at == int(clock())
    assert auth.find_user(OTHER).created_at == int(clock())


@pytest.mark.both_engines
def test_an_account_that_the_operator_added_has_no_password(auth: Auth) -> None:
    auth.add_account(EMAIL)
    for password in ("", "!", "None"):
        assert auth.valid_login(EMAIL, password) is False
        with pytest.raises(LoginFailed, match=r"^wrong email or password$"):
            sign_in(auth, password)


@pytest.mark.parametrize("email", ["", "a\0", "a" * 255], ids=["empty", "NUL", "long"])
def test_the_operator_cannot_add_an_invalid_email(auth: Auth, email: str) -> None:
    with pytest.raises(EmailRejected):
        auth.add_account(email)


@pytest.mark.both_engines
def test_the_operator_cannot_add_an_email_twice(auth: Auth, user: User, row: Row) -> None:
    with pytest.raises(EmailTaken):
        auth.add_account(EMAIL.upper())
    assert row() == user


@pytest.mark.both_engines
def test_a_user_is_found_in_any_letter_case(auth: Auth, user: User) -> None:
    assert auth.find_user(EMAIL.upper()) == user


@pytest.mark.parametrize("email", [OTHER, "", "\ud800", EMAIL + " "], ids=ascii)
def test_an_unknown_email_finds_no_user(auth: Auth, user: User, email: str) -> None:
    with pytest.raises(UnknownEmail):
        auth.find_user(email)


# Disabled accounts


@pytest.fixture
def disabled(auth: Auth, db: DB, user: User, clock: Clock) -> User:
    db.disable_user(user.id, int(clock()))
    return db.find_user_by(id=user.id)


def test_a_disabled_user_gets_no_session(auth: Auth, disabled: User) -> None:
    assert auth.create_session(disabled.email) is None


@pytest.mark.both_engines
def test_a_login_of_a_disabled_user_is_refused_like_a_wrong_password(auth: Auth, disabled: User) -> None:
    for password in (PASSWORD, "wrong"):
        assert auth.valid_login(EMAIL, password) is False
        with pytest.raises(LoginFailed, match=r"^wrong email or password$") as refusal:
            sign_in(auth, password)
        assert refusal.value.user_id == disabled.id


@pytest.mark.parametrize("cost", [COST, COST + 1])
def test_a_login_of_a_disabled_user_runs_bcrypt_once(
    auth: Auth, db: DB, hash_calls: list[bytes], disabled: User, cost: int
) -> None:
    db.update_user(disabled.id, hashed_password=_hash_password(PASSWORD, cost))
    hash_calls.clear()
    assert auth.valid_login(EMAIL, PASSWORD) is False
    assert len(hash_calls) == 1


@pytest.mark.both_engines
def test_disabling_a_user_ends_the_sessions_and_blocks_a_reset(
    auth: Auth, db: DB, user: User, other_user: User, clock: Clock
) -> None:
    mine, theirs, token = auth.create_session(EMAIL), auth.create_session(OTHER), auth.get_reset_password_token(EMAIL)
    db.disable_user(user.id, int(clock()))
    assert live(auth, mine, theirs) == [False, True]
    with pytest.raises(UnknownEmail):
        auth.get_reset_password_token(EMAIL)
    for _ in ("disabled", "enabled"):
        with pytest.raises(TokenRejected):
            auth.update_password(token, NEW_PASSWORD)
        db.enable_user(user.id)
    assert live(auth, mine) == [False]
    assert live(auth, sign_in(auth)) == [True]


@pytest.mark.both_engines
def test_a_link_does_not_work_while_its_user_is_disabled(
    auth: Auth, db: DB, hash_calls: list[bytes], disabled: User
) -> None:
    token, _ = auth.link_token(disabled)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert hash_calls == []
    db.enable_user(disabled.id)
    auth.update_password(token, NEW_PASSWORD)


# Changing the password


@pytest.mark.both_engines
def test_a_password_change_leaves_this_session_alone_under_a_new_id(
    three_sessions: Auth, user: User, other_user: User, clock: Clock, row: Row
) -> None:
    auth = three_sessions
    theirs = auth.create_session(OTHER)
    first, mine, third = (sign_in(auth, caller=Caller(None, agent=name)) for name in ("a", "b", "c"))
    before = next(session for session in auth.sessions_of(user.id) if session.id == digest(mine)[:16])
    clock.advance(DAY)
    changed, new_id = auth.change_password(mine, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED)
    assert changed.id == user.id
    assert live(auth, first, mine, third, new_id, theirs) == [False, False, False, True, True]
    assert auth.valid_login(EMAIL, NEW_PASSWORD)
    assert not auth.valid_login(EMAIL, PASSWORD)
    assert auth.valid_login(OTHER, PASSWORD)
    assert row().session_id == digest(new_id)
    (session,) = auth.sessions_of(user.id)
    assert (session.created_at, session.expires_at, session.user_agent) == (before.created_at, before.expires_at, "b")


@pytest.mark.both_engines
def test_a_password_change_revokes_a_reset_token(auth: Auth, user: User) -> None:
    token, mine = auth.get_reset_password_token(EMAIL), auth.create_session(EMAIL)
    auth.change_password(mine, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED)
    with pytest.raises(TokenRejected):
        auth.update_password(token, "another")
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


@pytest.mark.parametrize("password", ["wrong", "", NEW_PASSWORD, "\ud800"], ids=ascii)
def test_a_password_change_needs_the_current_password(auth: Auth, user: User, row: Row, password: str) -> None:
    mine = auth.create_session(EMAIL)
    before = row()
    with pytest.raises(ReauthenticationFailed, match=r"^wrong password$"):
        auth.change_password(mine, password, NEW_PASSWORD, caller=UNCOUNTED)
    assert row() == before
    assert live(auth, mine) == [True]


@pytest.mark.parametrize("new", ["", "a" * 1025, "\ud800"], ids=["empty", "long", "invalid"])
def test_an_invalid_new_password_runs_no_bcrypt_and_counts_no_attempt(
    auth: Auth, hash_calls: list[bytes], query: Query, new: str
) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(PasswordRejected):
        auth.change_password(mine, "wrong", new, caller=Caller(OWN_ADDRESS))
    assert hash_calls == []
    assert query("SELECT * FROM throttle") == []


@pytest.mark.slow
def test_a_weak_new_password_is_refused_in_production(db: DB, settings: Settings, clock: Clock, user: User) -> None:
    auth = Auth(db, in_production(settings), clock)
    mine = auth.create_session(EMAIL)
    with pytest.raises(PasswordRejected, match="15 characters"):
        auth.change_password(mine, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED)
    new_id = auth.change_password(mine, PASSWORD, "tarte flambée du dimanche", caller=UNCOUNTED)[1]
    assert len(new_id) == 43  # 256 bits
    assert live(auth, new_id) == [True]


@pytest.mark.parametrize(
    "act",
    [
        lambda auth, mine: auth.change_password(mine, "wrong", NEW_PASSWORD, caller=Caller(OWN_ADDRESS)),
        lambda auth, mine: auth.delete_account(mine, "wrong", caller=Caller(OWN_ADDRESS)),
        lambda auth, mine: auth.begin_totp(mine, "wrong", caller=Caller(OWN_ADDRESS)),
    ],
    ids=["change password", "delete account", "begin second factor"],
)
def test_guesses_at_the_current_password_in_a_session_are_limited(
    auth: Auth, hash_calls: list[bytes], act: Action
) -> None:
    mine = auth.create_session(EMAIL)
    for _ in range(10):
        with pytest.raises(ReauthenticationFailed):
            act(auth, mine)
    for _ in range(5):
        with pytest.raises(TooManyAttempts):
            act(auth, mine)
    assert len(hash_calls) == 10
    assert live(auth, mine) == [True]


def is_compared(auth: Auth, session_id: str | None) -> bool:
    """Guess the current password in this session; return whether the guess was compared."""
    with pytest.raises((ReauthenticationFailed, TooManyAttempts)) as refusal:
        auth.delete_account(session_id, "wrong", caller=Caller(OWN_ADDRESS))
    return refusal.type is ReauthenticationFailed


def test_guesses_at_the_current_password_are_counted_across_renewals_of_a_session(
    auth: Auth, user: User, clock: Clock
) -> None:
    mine, guesses = auth.create_session(EMAIL), 0
    for _ in range(3):
        for _ in range(4):
            guesses += is_compared(auth, mine)
        seed, _, _, mine = auth.begin_totp(mine, PASSWORD, caller=UNCOUNTED)
        code = totp.code(seed, int(clock()) // totp.STEP)
        _, mine, codes = auth.confirm_totp(mine, code, caller=UNCOUNTED)
        _, mine = auth.remove_totp(mine, PASSWORD, codes[0], caller=UNCOUNTED)
    assert guesses == 10


def test_guesses_in_one_session_do_not_limit_another_and_logins_limit_none(auth: Auth, user: User) -> None:
    thief = auth.create_session(EMAIL)
    for _ in range(30):
        with suppress(LoginFailed, TooManyAttempts):
            sign_in(auth, "wrong", caller=Caller(OWN_ADDRESS))
    assert sum(is_compared(auth, thief) for _ in range(12)) == 10
    mine = auth.create_session(EMAIL)
    mine = auth.change_password(mine, PASSWORD, NEW_PASSWORD, caller=Caller(OWN_ADDRESS))[1]
    assert auth.delete_account(mine, NEW_PASSWORD, caller=Caller(OWN_ADDRESS)).id == user.id


@pytest.mark.both_engines
def test_the_right_current_password_does_not_count(auth: Auth, user: User) -> None:
    mine = auth.create_session(EMAIL)
    for _ in range(15):
        mine = auth.change_password(mine, PASSWORD, PASSWORD, caller=Caller(OWN_ADDRESS))[1]


@pytest.mark.both_engines
@pytest.mark.parametrize(
    "meanwhile",
    [lambda auth, mine, token: auth.update_password(token, "another"), lambda auth, mine, token: auth.log_out(mine)],
    ids=["reset", "signed out"],
)
def test_a_reset_or_sign_out_during_a_password_change_makes_it_fail(
    auth: Auth,
    user: User,
    row: Row,
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[Auth, str | None, str], object],
) -> None:
    mine, token = auth.create_session(EMAIL), auth.get_reset_password_token(EMAIL)
    after_password_check(monkeypatch, lambda: meanwhile(auth, mine, token))
    with pytest.raises(SessionRequired):
        auth.change_password(mine, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED)
    assert not auth.valid_login(EMAIL, NEW_PASSWORD)
    assert row().session_id is None


@pytest.mark.both_engines
def test_of_8_concurrent_password_changes_in_one_session_one_succeeds(auth: Auth, user: User) -> None:
    mine = auth.create_session(EMAIL)
    new_passwords = iter(f"password {number}" for number in range(8))

    def change() -> tuple[str, str]:
        password = next(new_passwords)
        return password, auth.change_password(mine, PASSWORD, password, caller=UNCOUNTED)[1]

    results = at_once(8, change)
    ((password, new_id),) = (result for result in results if isinstance(result, tuple))
    assert {type(result) for result in results} <= {tuple, SessionRequired, ReauthenticationFailed}
    assert auth.valid_login(EMAIL, password)
    assert live(auth, new_id) == [True]


# Deleting an account


OWNED_TABLES = ("sessions", "recovery_codes", "access_tokens")


@pytest.mark.both_engines
def test_deleting_an_account_deletes_everything_that_belongs_to_it(
    auth: Auth, clock: Clock, other_user: User, db: DB, query: Query
) -> None:
    theirs = switch_on(auth, clock, OTHER)
    held = sign_in(auth, otp=theirs.recovery_codes.pop(), email=OTHER, caller=Caller(FOREIGN_ADDRESS))
    auth.create_token(held, PASSWORD, "git", caller=UNCOUNTED)
    mine = switch_on(auth, clock)
    session_id = sign_in(auth, otp=mine.recovery_codes[0], caller=Caller(OWN_ADDRESS))
    auth.create_token(session_id, PASSWORD, "git", caller=UNCOUNTED)
    token = auth.get_reset_password_token(EMAIL)
    before = db.find_user_by(id=other_user.id)
    rows = {table: query(f"SELECT * FROM {table} WHERE user_id = {other_user.id}") for table in OWNED_TABLES}
    assert all(query(f"SELECT * FROM {table} WHERE user_id = 1") for table in OWNED_TABLES)
    assert auth.delete_account(session_id, PASSWORD, caller=UNCOUNTED).email == EMAIL
    assert {table: query(f"SELECT * FROM {table}") for table in OWNED_TABLES} == rows
    assert list(db.each_user()) == [before]
    assert live(auth, session_id) == [False]
    assert not auth.valid_login(EMAIL, PASSWORD)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert live(auth, sign_in(auth, otp=theirs.recovery_codes.pop(), email=OTHER)) == [True]


@pytest.mark.both_engines
def test_the_email_of_a_deleted_account_is_free_but_its_id_is_not_reused(auth: Auth, user: User) -> None:
    auth.delete_account(auth.create_session(EMAIL), PASSWORD, caller=UNCOUNTED)
    again = auth.register_user(EMAIL, NEW_PASSWORD)
    assert again.id != user.id
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


@pytest.mark.parametrize("password", ["wrong", "", "\ud800"], ids=ascii)
def test_deleting_an_account_needs_its_password(auth: Auth, user: User, row: Row, password: str) -> None:
    mine = auth.create_session(EMAIL)
    before = row()
    with pytest.raises(ReauthenticationFailed, match=r"^wrong password$"):
        auth.delete_account(mine, password, caller=UNCOUNTED)
    assert row() == before
    assert live(auth, mine) == [True]


@pytest.mark.both_engines
def test_a_password_reset_during_a_deletion_keeps_the_account(
    auth: Auth, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, token = auth.create_session(EMAIL), auth.get_reset_password_token(EMAIL)
    after_password_check(monkeypatch, lambda: auth.update_password(token, NEW_PASSWORD))
    with pytest.raises(SessionRequired):
        auth.delete_account(mine, PASSWORD, caller=UNCOUNTED)
    assert auth.valid_login(EMAIL, NEW_PASSWORD)
