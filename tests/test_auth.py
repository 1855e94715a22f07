"""Passwords and logins: hashes, errors, logins that race with a change, and which attempts are counted."""

from __future__ import annotations

import types
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import bcrypt
import pytest

import auth as rules
from auth import LOGIN_TRIES, UNCOUNTED, Auth, AuthError, Caller, LoginFailed, _generate_uuid, _hash_password
from credentials import passwords, totp
from engines.sqlite import SQLiteEngine
from settings import Settings
from storage import DB, User
from tests import accounts
from tests.accounts import (
    EMAIL,
    FOREIGN_ADDRESS,
    NEW_PASSWORD,
    OTHER,
    PASSWORD,
    Query,
    Row,
    after_password_check,
    at_once,
    begin,
    digest,
    live,
    sign_in,
)
from tests.conftest import COST, Clock

user, other_user, row, query = accounts.user, accounts.other_user, accounts.row, accounts.query
three_sessions = accounts.three_sessions


# Hashes and ids


@pytest.mark.slow
def test_a_password_is_hashed_with_bcrypt_of_cost_12() -> None:
    hashed = _hash_password(PASSWORD)
    assert type(hashed) is bytes
    assert len(hashed) == 60
    assert hashed.startswith(b"$2b$12$")


def test_a_password_is_hashed_with_the_cost_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "5")
    assert _hash_password(PASSWORD).startswith(b"$2b$05$")


def test_the_environment_is_read_for_the_first_hash_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "4")
    _hash_password(PASSWORD)
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "5")
    assert _hash_password(PASSWORD).startswith(b"$2b$04$")


def test_a_hash_of_a_given_cost_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "not a number")
    assert _hash_password(PASSWORD, 4).startswith(b"$2b$04$")


@pytest.mark.parametrize("length", [1, 72])
def test_a_short_password_is_stored_as_plain_bcrypt(length: int) -> None:
    assert bcrypt.checkpw(b"a" * length, _hash_password("a" * length, COST))


def test_a_long_password_is_never_cut() -> None:
    hashed = _hash_password("a" * 73, COST)
    assert passwords.verify("a" * 73, hashed, COST)
    assert not passwords.verify("a" * 72, hashed, COST)


def test_a_new_uuid_is_random_text() -> None:
    text = _generate_uuid()
    assert type(text) is str
    assert len(text) == 36
    assert str(uuid.UUID(text)) == text
    assert uuid.UUID(text).version == 4
    assert _generate_uuid() != text


# Errors


# The classes are not taken from AuthError.__subclasses__(): another test makes incomplete ones.
ERRORS = [
    kind
    for kind in vars(rules).values()
    if isinstance(kind, type) and issubclass(kind, AuthError) and kind is not AuthError
]


def test_every_error_is_a_value_error_with_a_message() -> None:
    assert len(ERRORS) >= 7
    assert all(issubclass(kind, ValueError) and kind().message for kind in ERRORS)


def test_every_error_states_a_client_error_and_an_event() -> None:
    assert [kind for kind in ERRORS if not 400 <= kind.status < 500] == []
    assert [kind for kind in ERRORS if not {"status", "event"} <= vars(kind).keys()] == []
    assert [kind for kind in ERRORS if kind.event is not None and not kind.event.isidentifier()] == []


@pytest.mark.parametrize(
    ("stated", "missing"), [({}, "'status' and 'event'"), ({"status": 403}, "'event'"), ({"event": None}, "'status'")]
)
def test_an_error_class_without_status_or_event_is_a_type_error(stated: dict[str, Any], missing: str) -> None:
    with pytest.raises(TypeError, match=f"missing .* keyword-only arguments?: {missing}"):
        types.new_class("Incomplete", (AuthError,), stated)


@pytest.mark.both_engines
def test_a_wrong_password_and_an_unknown_email_are_refused_alike(auth: Auth, user: User) -> None:
    with pytest.raises(LoginFailed) as wrong:
        sign_in(auth, "wrong")
    with pytest.raises(LoginFailed) as unknown:
        sign_in(auth, email=OTHER)
    assert str(wrong.value) == str(unknown.value)
    assert wrong.value.message == unknown.value.message
    assert (wrong.value.user_id, unknown.value.user_id) == (user.id, None)  # for the log


# The rules as a whole


def test_the_rules_need_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "named.db"
    monkeypatch.setenv("AUTHSVC_DATABASE", str(path))
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", str(COST))
    auth = Auth()
    auth.register_user(EMAIL, PASSWORD)
    session_id = auth.create_session(EMAIL)
    assert isinstance(auth._db, DB)
    assert auth._db.find_user_by(email=EMAIL).session_id == digest(session_id)
    assert live(auth, session_id) == [True]
    assert path.exists()
    auth._db.close()


def test_the_rules_use_the_given_database(auth: Auth, db: DB) -> None:
    assert auth._db is db


def test_nothing_is_hashed_inside_a_transaction(auth: Auth, db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = db._engine
    assert isinstance(engine, SQLiteEngine)
    locked: list[bool] = []

    def watched(original: Callable[[bytes, bytes], object]) -> Callable[[bytes, bytes], object]:
        def watch(secret: bytes, salt: bytes) -> object:
            locked.append(engine._write_lock.locked())
            return original(secret, salt)

        return watch

    monkeypatch.setattr(bcrypt, "hashpw", watched(bcrypt.hashpw))
    monkeypatch.setattr(bcrypt, "checkpw", watched(bcrypt.checkpw))
    user = auth.register_user(EMAIL, PASSWORD)
    db.update_user(user.id, hashed_password=_hash_password(PASSWORD, 5))
    sign_in(auth)
    auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert locked == [False] * 5


def test_the_files_hold_no_password_no_session_id_and_no_token(auth: Auth, tmp_path: Path) -> None:
    secrets = [PASSWORD, NEW_PASSWORD]
    auth.register_user(EMAIL, PASSWORD)
    secrets += [sign_in(auth), auth.get_reset_password_token(EMAIL)]
    auth.update_password(secrets[-1], NEW_PASSWORD)
    secrets += [sign_in(auth, NEW_PASSWORD), auth.get_reset_password_token(EMAIL)]
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert EMAIL.encode() in stored
    assert [secret for secret in secrets if secret.encode() in stored] == []
    assert all(digest(secret).encode() in stored for secret in secrets[2:])
    assert not any(uuid.UUID(secret).bytes in stored for secret in secrets[2:])


# The password


@pytest.mark.both_engines
def test_a_login_needs_the_right_email_and_password(auth: Auth, user: User) -> None:
    assert auth.valid_login(EMAIL, PASSWORD) is True
    assert auth.valid_login(EMAIL, "wrong") is False
    assert auth.valid_login(OTHER, PASSWORD) is False


@pytest.mark.parametrize("password", [" b4l0u", "b4l0u ", "b4l0u\0", "b4l0u\0b4l0u", "B4L0U"])
def test_a_password_counts_exactly_as_it_was_received(auth: Auth, user: User, password: str) -> None:
    assert auth.valid_login(EMAIL, password) is False


@pytest.mark.parametrize("password", [None, "", "a" * 2000, "b4l0u\0", "\ud800"], ids=ascii)
def test_an_odd_password_is_a_wrong_one(auth: Auth, user: User, password: Any) -> None:
    assert auth.valid_login(EMAIL, password) is False


@pytest.mark.both_engines
@pytest.mark.parametrize("email", [None, "", "a" * 2000, "a\0b", "\ud800", "' OR 1=1--"], ids=ascii)
def test_an_odd_email_is_an_unknown_one(auth: Auth, user: User, email: Any) -> None:
    assert auth.valid_login(email, PASSWORD) is False
    assert auth.valid_login(email, email) is False


@pytest.mark.parametrize("stored", ["", "nothash", b"\xff\0", "$2b$04$", "$2b$99$" + "." * 53, "$2b$04$" + "/" * 53])
def test_no_password_matches_an_unreadable_stored_hash(auth: Auth, db: DB, user: User, stored: str | bytes) -> None:
    db.update_user(user.id, hashed_password=stored)
    assert auth.valid_login(EMAIL, PASSWORD) is False
    with pytest.raises(LoginFailed):
        sign_in(auth)


@pytest.mark.both_engines
def test_a_hash_made_elsewhere_is_accepted(auth: Auth, db: DB) -> None:
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(COST, prefix=b"2a")).decode()
    db.add_user(EMAIL, hashed)
    assert live(auth, sign_in(auth)) == [True]
    assert db.find_user_by(email=EMAIL).hashed_password == hashed


def test_a_login_waits_while_all_hash_slots_are_taken(auth: Auth, user: User) -> None:
    with ThreadPoolExecutor(1) as pool, ExitStack() as taken:
        for _ in range(passwords.CORES):
            taken.enter_context(passwords._hash_slots)
        login = pool.submit(auth.valid_login, EMAIL, PASSWORD)
        with pytest.raises(TimeoutError):
            login.result(0.05)
        taken.close()
        assert login.result(10) is True


# The password is hashed again when the cost has changed


@pytest.fixture
def costlier(db: DB, user: User) -> User:
    """The user with a hash of a higher cost than that of the settings."""
    db.update_user(user.id, hashed_password=_hash_password(PASSWORD, COST + 1))
    return db.find_user_by(id=user.id)


@pytest.mark.both_engines
@pytest.mark.parametrize("password", [PASSWORD, "a" * 73], ids=["plain", "long"])
def test_a_login_hashes_the_password_again_at_the_cost_of_the_settings(auth: Auth, db: DB, password: str) -> None:
    user = db.add_user(EMAIL, _hash_password(password, COST + 1))
    assert auth.valid_login(EMAIL, password)
    hashed = db.find_user_by(id=user.id).hashed_password
    assert passwords.cost_of(hashed) == COST
    assert passwords.verify(password, hashed, COST)


def test_a_login_does_not_replace_a_hash_of_the_right_cost(auth: Auth, user: User, row: Row) -> None:
    assert auth.valid_login(EMAIL, PASSWORD)
    assert row() == user


def test_a_wrong_password_does_not_replace_the_hash(auth: Auth, costlier: User, row: Row) -> None:
    assert not auth.valid_login(EMAIL, "wrong")
    assert row() == costlier


@pytest.mark.both_engines
def test_a_new_hash_of_the_same_password_ends_no_session(three_sessions: Auth, costlier: User) -> None:
    earlier = three_sessions.create_session(EMAIL)
    assert live(three_sessions, sign_in(three_sessions), earlier) == [True, True]


@pytest.mark.both_engines
def test_concurrent_logins_that_hash_again_all_succeed(auth: Auth, costlier: User) -> None:
    assert at_once(8, lambda: auth.valid_login(EMAIL, PASSWORD)) == [True] * 8


@pytest.fixture
def changed_while_hashing(auth: Auth, costlier: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password is reset after a login compared the old one and before it stores the new hash."""
    original, token = passwords.hash_password, auth.get_reset_password_token(EMAIL)

    def changed(password: str, cost: int) -> bytes:
        monkeypatch.setattr(passwords, "hash_password", original)
        auth.update_password(token, NEW_PASSWORD)
        return original(password, cost)

    monkeypatch.setattr(passwords, "hash_password", changed)


@pytest.mark.both_engines
def test_a_new_hash_of_the_old_password_does_not_undo_a_reset(auth: Auth, changed_while_hashing: None) -> None:
    auth.valid_login(EMAIL, PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is True
    assert auth.valid_login(EMAIL, PASSWORD) is False


@pytest.mark.both_engines
def test_a_password_reset_while_it_is_hashed_again_starts_no_session(
    auth: Auth, changed_while_hashing: None, query: Query
) -> None:
    with pytest.raises(LoginFailed):
        sign_in(auth)
    assert query("SELECT * FROM sessions") == []


# Hashes that other systems made of the first 72 bytes of a password

FIRST_72 = "correct horse battery staple ".ljust(72, "x")
WHOLE, ANOTHER = FIRST_72 + "the end", FIRST_72 + "another end"


@pytest.fixture
def marked(db: DB) -> User:
    """The user with a marked hash, as an import with --cut-at-72 stores it."""
    hashed = bcrypt.hashpw(FIRST_72.encode(), bcrypt.gensalt(COST)).decode()
    db.import_users([User(0, EMAIL, hashed, cut_salt=hashed[7:29])])
    return db.find_user_by(email=EMAIL)


@pytest.mark.both_engines
@pytest.mark.parametrize("log_in", [sign_in, lambda auth, password: auth.valid_login(EMAIL, password)])
def test_a_marked_hash_is_replaced_by_one_of_the_first_whole_password(
    auth: Auth, db: DB, marked: User, log_in: Callable[[Auth, str], object]
) -> None:
    assert not auth.valid_login(EMAIL, "y" + WHOLE[1:])
    assert db.find_user_by(id=marked.id) == marked
    assert log_in(auth, WHOLE)
    user = db.find_user_by(id=marked.id)
    assert (user.cut_salt, passwords.verify(WHOLE, user.hashed_password, COST)) == (None, True)
    for password in ANOTHER, FIRST_72, WHOLE + "x":
        with pytest.raises(LoginFailed):
            sign_in(auth, password)
    assert sign_in(auth, WHOLE)


def test_a_short_login_with_a_marked_hash_ends_the_mark(auth: Auth, db: DB, marked: User) -> None:
    assert sign_in(auth, FIRST_72)
    assert db.find_user_by(id=marked.id).cut_salt is None
    assert not auth.valid_login(EMAIL, WHOLE)


@pytest.mark.both_engines
def test_of_two_logins_at_once_with_different_ends_one_starts_a_session(auth: Auth, marked: User, query: Query) -> None:
    ends = iter([WHOLE, ANOTHER])
    done = at_once(2, lambda: sign_in(auth, next(ends)))
    assert sorted(isinstance(result, LoginFailed) for result in done) == [False, True]
    assert len(query("SELECT * FROM sessions")) == 1
    assert auth.valid_login(EMAIL, WHOLE) is not auth.valid_login(EMAIL, ANOTHER)


def test_a_login_without_its_second_factor_keeps_the_mark(auth: Auth, db: DB, marked: User, clock: Clock) -> None:
    seed = totp.new_seed()
    db._engine.write("UPDATE users SET totp_secret = :seed, totp_since = 1", {"seed": seed})
    with pytest.raises(rules.CodeRequired):
        sign_in(auth, ANOTHER)
    with pytest.raises(LoginFailed, match="wrong one-time code"):
        sign_in(auth, ANOTHER, "000000")
    assert db.find_user_by(id=marked.id).cut_salt == marked.cut_salt
    assert sign_in(auth, WHOLE, totp.code(seed, int(clock()) // totp.STEP))
    assert db.find_user_by(id=marked.id).cut_salt is None
    assert not auth.valid_login(EMAIL, ANOTHER)


def test_a_disabled_user_keeps_the_mark(auth: Auth, db: DB, marked: User) -> None:
    db.disable_user(marked.id, 1)
    assert not auth.valid_login(EMAIL, WHOLE)
    db.enable_user(marked.id)
    assert auth.valid_login(EMAIL, WHOLE)


NEW_72 = NEW_PASSWORD.ljust(72, "y")
CREDENTIAL_CHANGES: dict[str, Callable[[Auth, DB, User], object]] = {
    "reset": lambda auth, _, user: auth.update_password(auth.get_reset_password_token(EMAIL), NEW_72),
    "change": lambda auth, _, user: auth.change_password(auth.create_session(EMAIL), WHOLE, NEW_72, caller=UNCOUNTED),
    # Nothing but the hash is changed: so do copies of the last release, which know no mark.
    "new hash": lambda _, db, user: db.update_user(user.id, hashed_password=_hash_password(NEW_72, COST)),
}


@pytest.mark.both_engines
@pytest.mark.parametrize("change", CREDENTIAL_CHANGES.values(), ids=CREDENTIAL_CHANGES)
def test_the_mark_ends_with_any_change_of_the_password(
    auth: Auth, db: DB, marked: User, change: Callable[[Auth, DB, User], object]
) -> None:
    change(auth, db, marked)
    for password in WHOLE, NEW_72 + "y", NEW_72 + "\0":
        assert not auth.valid_login(EMAIL, password)
    assert auth.valid_login(EMAIL, NEW_72)
    assert db.find_user_by(id=marked.id).cut_salt is None
    assert not auth.valid_login(EMAIL, NEW_72 + "y")


@pytest.mark.both_engines
@pytest.mark.parametrize("change", ["reset", "change"])
def test_a_new_password_clears_the_mark(auth: Auth, db: DB, marked: User, change: str) -> None:
    CREDENTIAL_CHANGES[change](auth, db, marked)
    assert db.find_user_by(id=marked.id).cut_salt is None


def test_a_longer_password_does_not_match_our_own_hash_of_its_first_72_bytes(auth: Auth) -> None:
    auth.register_user(EMAIL, FIRST_72)
    for password in WHOLE, FIRST_72 + "x", FIRST_72 + "\0":
        with pytest.raises(LoginFailed):
            sign_in(auth, password)
    assert sign_in(auth, FIRST_72)


def test_a_login_replaces_a_hash_of_passlibs_first_version(auth: Auth, db: DB) -> None:
    stored = "$bcrypt-sha256$2a,8$UE3dIZ.0I6XZtA/LdMrrle$Ag04/5zYu./12.OSqInXZnJ.WZoh1ua"
    user = db.add_user(EMAIL, stored)
    same_cost = Auth(db, Settings(bcrypt_cost=8))
    assert not same_cost.valid_login(EMAIL, "wrong")
    assert db.find_user_by(id=user.id).hashed_password == stored
    assert sign_in(same_cost, "password")
    assert bytes(db.find_user_by(id=user.id).hashed_password).startswith(b"$2b$08$")  # type: ignore[arg-type]


# Changes during a login


@pytest.mark.both_engines
def test_a_password_reset_while_it_is_compared_starts_no_session(
    auth: Auth, user: User, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = auth.get_reset_password_token(EMAIL)
    after_password_check(monkeypatch, lambda: auth.update_password(token, NEW_PASSWORD))
    with pytest.raises(LoginFailed):
        sign_in(auth)
    assert query("SELECT * FROM sessions") == []


@pytest.mark.both_engines
def test_a_new_hash_of_the_same_password_during_a_login_starts_a_session(
    auth: Auth, user: User, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = _hash_password(PASSWORD, COST)
    after_password_check(monkeypatch, lambda: db.update_user(user.id, hashed_password=hashed))
    assert live(auth, sign_in(auth)) == [True]


@pytest.mark.both_engines
@pytest.mark.parametrize(
    "change",
    [lambda db, user: db.disable_user(user.id, 1), lambda db, user: db.delete_user(user.id)],
    ids=["disabled", "deleted"],
)
def test_a_user_disabled_or_deleted_during_a_login_gets_no_session(
    auth: Auth, db: DB, user: User, query: Query, monkeypatch: pytest.MonkeyPatch, change: Callable[[DB, User], object]
) -> None:
    after_password_check(monkeypatch, lambda: change(db, user))
    with pytest.raises(LoginFailed):
        sign_in(auth)
    assert query("SELECT * FROM sessions") == []


def test_a_login_gives_up_when_the_password_changes_on_each_try(
    auth: Auth, db: DB, user: User, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = passwords.verify
    comparisons: list[bool] = []

    def verify(*arguments: Any) -> bool:
        assert len(comparisons) < 10, "the login goes on for too long"
        comparisons.append(original(*arguments))
        db.update_user(user.id, hashed_password=_hash_password(PASSWORD, COST))
        return comparisons[-1]

    monkeypatch.setattr(passwords, "verify", verify)
    with pytest.raises(LoginFailed, match=r"^wrong email or password$") as refusal:
        sign_in(auth)
    assert refusal.value.user_id == user.id
    assert comparisons == [True] * LOGIN_TRIES
    assert query("SELECT * FROM sessions") == []


class ClockWithChanges:
    """A clock that stores another hash of the user's password, a number of times, before it tells the time.

    create_session() reads the clock after it read the user and before it stores the session.
    """

    def __init__(self, clock: Clock, db: DB, user: User, changes: int) -> None:
        self._clock, self._db, self._user = clock, db, user
        self.changes = changes

    def __call__(self) -> float:
        if self.changes:
            self.changes -= 1
            self._db.update_user(self._user.id, hashed_password=_hash_password(NEW_PASSWORD, COST))
        return self._clock()


@pytest.mark.parametrize("changes", [1, LOGIN_TRIES - 1])
def test_a_session_without_a_password_starts_despite_a_few_changes(
    db: DB, settings: Settings, user: User, clock: Clock, changes: int
) -> None:
    auth = Auth(db, settings, ClockWithChanges(clock, db, user, changes))
    assert live(auth, auth.create_session(EMAIL)) == [True]


def test_a_session_without_a_password_gives_up_when_each_try_meets_a_change(
    db: DB, settings: Settings, user: User, clock: Clock, query: Query
) -> None:
    changing = ClockWithChanges(clock, db, user, 10)
    assert Auth(db, settings, changing).create_session(EMAIL) is None
    assert changing.changes == 10 - LOGIN_TRIES
    assert query("SELECT * FROM sessions") == []


# Which attempts are counted


Attempt = Callable[[Auth, str | None, str | None], object]  # takes a session id and the address of a client

ATTEMPTS: dict[str, Attempt] = {
    "create account": lambda auth, held, address: auth.create_account("new@x", PASSWORD, caller=Caller(address)),
    "sign in": lambda auth, held, address: auth.log_in(EMAIL, "wrong", caller=Caller(address)),
    "request reset": lambda auth, held, address: auth.issue_reset_token(EMAIL, caller=Caller(address)),
    "reset password": lambda auth, held, address: auth.reset_password("no", "a", email=None, caller=Caller(address)),
    "change password": lambda auth, held, address: auth.change_password(held, "wrong", "a", caller=Caller(address)),
    "delete account": lambda auth, held, address: auth.delete_account(held, "wrong", caller=Caller(address)),
    "begin second factor": lambda auth, held, address: auth.begin_totp(held, "wrong", caller=Caller(address)),
    "confirm second factor": lambda auth, held, address: auth.confirm_totp(held, "000000", caller=Caller(address)),
}


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
@pytest.mark.parametrize("address", [FOREIGN_ADDRESS, "unknown", "", None], ids=repr)
def test_an_attempt_is_counted_for_every_address_but_none(
    auth: Auth, user: User, query: Query, attempt: Attempt, address: str | None
) -> None:
    _, session_id = begin(auth, auth.create_session(EMAIL))
    with suppress(AuthError):
        attempt(auth, session_id, address)
    assert (query("SELECT * FROM throttle") != []) is (address is not None)


def test_the_methods_of_the_python_contract_count_nothing(auth: Auth, query: Query) -> None:
    auth.register_user(EMAIL, PASSWORD)
    auth.valid_login(EMAIL, "wrong")
    auth.create_session(EMAIL)
    token = auth.get_reset_password_token(EMAIL)
    with pytest.raises(rules.TokenRejected):
        auth.update_password("wrong", NEW_PASSWORD)
    auth.update_password(token, NEW_PASSWORD)
    assert query("SELECT * FROM throttle") == []
