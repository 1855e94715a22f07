"""The rules: who may register, what logs in, what a session is, and when a token dies."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import bcrypt
import pytest

import passwords
from auth import (
    Auth,
    AuthError,
    EmailRejected,
    EmailTaken,
    LoginFailed,
    PasswordRejected,
    SessionRequired,
    TokenRejected,
    UnknownEmail,
    _generate_uuid,
    _hash_password,
)
from settings import Settings
from storage import DB, NoResultFound, User
from tests.conftest import COST, Clock

EMAIL = "bob@example.com"
OTHER = "eve@example.com"
PASSWORD = "b4l0u"
NEW_PASSWORD = "t4rt1fl3tt3"

HASHED = _hash_password(PASSWORD, COST)

MINUTE = 60
DAY = 86_400
WEEK = 604_800
MONTH = 2_592_000


def digest(secret: str | None) -> str:
    assert secret
    return hashlib.sha256(secret.encode()).hexdigest()


def at_once(count: int, task: Callable[[], object]) -> list[object]:
    """What as many threads, let go together, returned or raised."""
    ready = threading.Barrier(count)

    def run(_: int) -> object:
        ready.wait(10)
        try:
            return task()
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def live(auth: Auth, *session_ids: str | None) -> list[bool]:
    return [auth.get_user_from_session_id(session_id) is not None for session_id in session_ids]


@pytest.fixture
def user(db: DB) -> User:
    return db.add_user(EMAIL, HASHED)


@pytest.fixture
def other(db: DB, user: User) -> User:
    return db.add_user(OTHER, HASHED)


@pytest.fixture
def three(db: DB, settings: Settings, clock: Clock, user: User) -> Auth:
    """The rules where a user may have three sessions at once."""
    return Auth(db, replace(settings, sessions_per_user=3), clock)


@pytest.fixture
def row(db: DB, user: User) -> Callable[[], User]:
    """The user's row as it is now."""
    return lambda: db.find_user_by(id=user.id)


@pytest.fixture
def sql(db: DB, settings: Settings) -> Iterator[Callable[[str], list[Any]]]:
    """What the file answers to a query."""
    with closing(sqlite3.connect(settings.database)) as reader:
        yield lambda query: reader.execute(query).fetchall()


@pytest.fixture
def hashes(user: User, other: User, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """One entry for each bcrypt that runs once the users are there."""
    run: list[bytes] = []

    def counted(original: Callable[[bytes, bytes], object]) -> Callable[[bytes, bytes], object]:
        def count(secret: bytes, salt: bytes) -> object:
            run.append(salt)
            return original(secret, salt)

        return count

    monkeypatch.setattr(bcrypt, "hashpw", counted(bcrypt.hashpw))
    monkeypatch.setattr(bcrypt, "checkpw", counted(bcrypt.checkpw))
    return run


# Hashes and ids


def test_a_password_is_hashed_with_bcrypt_of_cost_12() -> None:
    hashed = _hash_password(PASSWORD)
    assert type(hashed) is bytes
    assert len(hashed) == 60
    assert hashed.startswith(b"$2b$12$")


def test_the_cost_is_that_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "5")
    assert _hash_password(PASSWORD).startswith(b"$2b$05$")


@pytest.mark.parametrize("length", [1, 72])
def test_a_short_password_is_plain_bcrypt(length: int) -> None:
    assert bcrypt.checkpw(b"a" * length, _hash_password("a" * length, COST))


def test_a_long_password_is_never_cut() -> None:
    hashed = _hash_password("a" * 73, COST)
    assert passwords.verify("a" * 73, hashed, COST)
    assert not passwords.verify("a" * 72, hashed, COST)


def test_a_new_uuid_is_the_text_of_a_random_one() -> None:
    text = _generate_uuid()
    assert type(text) is str
    assert len(text) == 36
    assert str(uuid.UUID(text)) == text
    assert uuid.UUID(text).version == 4
    assert _generate_uuid() != text


# Errors


def test_every_refusal_is_a_value_error_with_a_message() -> None:
    kinds = AuthError.__subclasses__()
    assert len(kinds) >= 7
    assert all(issubclass(kind, ValueError) and kind().message for kind in kinds)


def test_a_wrong_password_and_an_unknown_email_are_refused_alike(auth: Auth, user: User) -> None:
    with pytest.raises(LoginFailed) as wrong:
        auth.log_in(EMAIL, "wrong")
    with pytest.raises(LoginFailed) as unknown:
        auth.log_in(OTHER, PASSWORD)
    assert str(wrong.value) == str(unknown.value)
    assert wrong.value.message == unknown.value.message


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


def test_the_rules_keep_the_store_they_are_given(auth: Auth, db: DB) -> None:
    assert auth._db is db


def test_nothing_is_hashed_inside_a_transaction(auth: Auth, db: DB, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[bool] = []

    def watched(original: Callable[[bytes, bytes], object]) -> Callable[[bytes, bytes], object]:
        def watch(secret: bytes, salt: bytes) -> object:
            locked.append(db._write_lock.locked())
            return original(secret, salt)

        return watch

    monkeypatch.setattr(bcrypt, "hashpw", watched(bcrypt.hashpw))
    monkeypatch.setattr(bcrypt, "checkpw", watched(bcrypt.checkpw))
    user = auth.register_user(EMAIL, PASSWORD)
    db.update_user(user.id, hashed_password=_hash_password(PASSWORD, 5))
    auth.log_in(EMAIL, PASSWORD)
    auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert locked == [False] * 5


def test_the_files_hold_no_password_no_session_id_and_no_token(auth: Auth, tmp_path: Path) -> None:
    secrets = [PASSWORD, NEW_PASSWORD]
    auth.register_user(EMAIL, PASSWORD)
    secrets += [auth.log_in(EMAIL, PASSWORD), auth.get_reset_password_token(EMAIL)]
    auth.update_password(secrets[-1], NEW_PASSWORD)
    secrets += [auth.log_in(EMAIL, NEW_PASSWORD), auth.get_reset_password_token(EMAIL)]
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert EMAIL.encode() in stored
    assert [secret for secret in secrets if secret.encode() in stored] == []
    assert all(digest(secret).encode() in stored for secret in secrets[2:])
    assert not any(uuid.UUID(secret).bytes in stored for secret in secrets[2:])


# Registering


def test_a_new_user_is_stored_with_a_hash(auth: Auth, db: DB) -> None:
    user = auth.register_user(EMAIL, PASSWORD)
    assert (user.id, user.email, user.session_id, user.reset_token) == (1, EMAIL, None, None)
    assert db.find_user_by(email=EMAIL) == user
    assert isinstance(user.hashed_password, bytes)
    assert bcrypt.checkpw(PASSWORD.encode(), user.hashed_password)


def test_an_email_registers_once(auth: Auth, user: User, row: Callable[[], User]) -> None:
    with pytest.raises(ValueError, match=r"^User bob@example\.com already exists$") as refusal:
        auth.register_user(EMAIL, NEW_PASSWORD)
    assert isinstance(refusal.value, EmailTaken)
    assert refusal.value.message == "email already registered"
    assert row() == user


@pytest.mark.parametrize(("email", "same"), [(EMAIL, "Bob@EXAMPLE.com"), ("é@x", "É@X"), ("ŠÁRKA", "šárka")])
def test_other_letter_case_is_the_same_email(auth: Auth, email: str, same: str) -> None:
    auth.register_user(email, PASSWORD)
    with pytest.raises(EmailTaken, match=f"^User {same} already exists$"):
        auth.register_user(same, PASSWORD)
    assert auth.valid_login(same, PASSWORD)


@pytest.mark.parametrize(
    "email",
    ["nope", "unknown@email", "a b@x", " a@x ", '"a"@x', "a'--", "%", "a@b@c", "é@x", "почта@x", "a" * 254, "é" * 127],
)
def test_an_odd_email_registers_as_it_is(auth: Auth, email: str) -> None:
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
)
def test_what_cannot_be_an_email_is_refused_with_the_reason(auth: Auth, db: DB, email: str, why: str) -> None:
    with pytest.raises(EmailRejected, match=why):
        auth.register_user(email, PASSWORD)
    with pytest.raises(NoResultFound):
        db.find_user_by(id=1)


@pytest.mark.parametrize("password", ["", "a" * 1025, "é" * 513, "\ud800"])
def test_what_cannot_be_a_password_is_refused(auth: Auth, db: DB, password: str) -> None:
    with pytest.raises(PasswordRejected):
        auth.register_user(EMAIL, password)
    with pytest.raises(NoResultFound):
        db.find_user_by(email=EMAIL)


@pytest.mark.parametrize("password", ["1", " ", "a\0b", "a" * 73, "a" * 1024, "пароль" * 43])
def test_any_other_password_registers_and_logs_in(auth: Auth, password: str) -> None:
    auth.register_user(EMAIL, password)
    assert auth.valid_login(EMAIL, password) is True
    assert auth.valid_login(EMAIL, password[:-1]) is False


@pytest.mark.parametrize(("email", "password"), [("", PASSWORD), ("a\0", PASSWORD), ("new@x", ""), ("new@x", "\ud800")])
def test_a_malformed_registration_costs_no_bcrypt(auth: Auth, hashes: list[bytes], email: str, password: str) -> None:
    with pytest.raises(AuthError):
        auth.register_user(email, password)
    assert hashes == []


def test_of_32_registrations_at_once_one_wins(auth: Auth, sql: Callable[[str], list[Any]]) -> None:
    results = at_once(32, lambda: auth.register_user(EMAIL, PASSWORD))
    assert sum(isinstance(result, User) for result in results) == 1
    losers = [result for result in results if not isinstance(result, User)]
    assert {(type(loser), str(loser)) for loser in losers} == {(EmailTaken, f"User {EMAIL} already exists")}
    assert sql("SELECT count(*) FROM users") == [(1,)]


# The password


def test_a_login_is_valid_or_not(auth: Auth, user: User) -> None:
    assert auth.valid_login(EMAIL, PASSWORD) is True
    assert auth.valid_login(EMAIL, "wrong") is False
    assert auth.valid_login(OTHER, PASSWORD) is False


@pytest.mark.parametrize("password", [" b4l0u", "b4l0u ", "b4l0u\0", "b4l0u\0b4l0u", "B4L0U"])
def test_a_password_counts_as_it_was_received(auth: Auth, user: User, password: str) -> None:
    assert auth.valid_login(EMAIL, password) is False


@pytest.mark.parametrize(
    ("email", "password"),
    [
        *((EMAIL, password) for password in (None, "", "a" * 2000, "b4l0u\0", "\ud800")),
        *((email, PASSWORD) for email in (None, "", "a" * 2000, "a\0b", "\ud800", "' OR 1=1--")),
        (None, None),
        ("", ""),
    ],
)
def test_an_odd_login_is_false(auth: Auth, user: User, email: Any, password: Any) -> None:
    assert auth.valid_login(email, password) is False


@pytest.mark.parametrize("stored", ["", "nothash", b"\xff\0", "$2b$04$", "$2b$99$" + "." * 53, "$2b$04$" + "/" * 53])
def test_an_unreadable_stored_hash_is_a_wrong_password(auth: Auth, db: DB, user: User, stored: str | bytes) -> None:
    db.update_user(user.id, hashed_password=stored)
    assert auth.valid_login(EMAIL, PASSWORD) is False
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, PASSWORD)


def test_a_hash_made_elsewhere_logs_in(auth: Auth, db: DB) -> None:
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(COST, prefix=b"2a")).decode()
    db.add_user(EMAIL, hashed)
    assert live(auth, auth.log_in(EMAIL, PASSWORD)) == [True]
    assert db.find_user_by(email=EMAIL).hashed_password == hashed


def test_when_hashing_is_busy_a_login_waits(auth: Auth, user: User) -> None:
    with ThreadPoolExecutor(1) as pool, ExitStack() as others:
        for _ in range(passwords.CORES):
            others.enter_context(passwords._gate)
        login = pool.submit(auth.valid_login, EMAIL, PASSWORD)
        with pytest.raises(TimeoutError):
            login.result(0.05)
        others.close()
        assert login.result(10) is True


# The password is hashed anew when the cost has changed


@pytest.fixture
def dearer(db: DB, user: User) -> User:
    """The user with a hash of another cost than the settings'."""
    db.update_user(user.id, hashed_password=_hash_password(PASSWORD, COST + 1))
    return db.find_user_by(id=user.id)


@pytest.mark.parametrize("password", [PASSWORD, "a" * 73])
def test_a_login_brings_the_hash_to_the_cost_of_the_settings(auth: Auth, db: DB, password: str) -> None:
    user = db.add_user(EMAIL, _hash_password(password, COST + 1))
    assert auth.valid_login(EMAIL, password)
    hashed = db.find_user_by(id=user.id).hashed_password
    assert passwords.cost_of(hashed) == COST
    assert passwords.verify(password, hashed, COST)


def test_a_login_leaves_a_hash_of_that_cost_as_it_is(auth: Auth, user: User, row: Callable[[], User]) -> None:
    assert auth.valid_login(EMAIL, PASSWORD)
    assert row() == user


def test_a_wrong_password_changes_no_hash(auth: Auth, dearer: User, row: Callable[[], User]) -> None:
    assert not auth.valid_login(EMAIL, "wrong")
    assert row() == dearer


def test_a_new_hash_of_the_same_password_ends_no_session(auth: Auth, three: Auth, dearer: User) -> None:
    former = three.create_session(EMAIL)
    assert live(three, three.log_in(EMAIL, PASSWORD), former) == [True, True]


def test_logins_that_hash_anew_at_once_all_succeed(auth: Auth, dearer: User) -> None:
    assert at_once(8, lambda: auth.valid_login(EMAIL, PASSWORD)) == [True] * 8


@pytest.fixture
def changed_while_hashing(auth: Auth, dearer: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password is reset between the comparison with the old one and its being hashed anew."""
    original, token = passwords.hash_password, auth.get_reset_password_token(EMAIL)

    def changed(password: str, cost: int) -> bytes:
        monkeypatch.setattr(passwords, "hash_password", original)
        auth.update_password(token, NEW_PASSWORD)
        return original(password, cost)

    monkeypatch.setattr(passwords, "hash_password", changed)


def test_hashing_anew_does_not_undo_a_change(auth: Auth, changed_while_hashing: None) -> None:
    auth.valid_login(EMAIL, PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is True
    assert auth.valid_login(EMAIL, PASSWORD) is False


def test_a_password_changed_while_it_was_hashed_anew_starts_no_session(
    auth: Auth, changed_while_hashing: None, sql: Callable[[str], list[Any]]
) -> None:
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, PASSWORD)
    assert sql("SELECT * FROM sessions") == []


def after_the_comparison(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let something happen once, after a password was compared and before anything is made of it."""
    original = passwords.verify

    def verify(password: str, hashed: str | bytes | None, cost: int) -> bool:
        monkeypatch.setattr(passwords, "verify", original)
        matches = original(password, hashed, cost)
        change()
        return matches

    monkeypatch.setattr(passwords, "verify", verify)


def test_a_password_changed_while_it_was_compared_starts_no_session(
    auth: Auth, user: User, sql: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = auth.get_reset_password_token(EMAIL)
    after_the_comparison(monkeypatch, lambda: auth.update_password(token, NEW_PASSWORD))
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, PASSWORD)
    assert sql("SELECT * FROM sessions") == []


def test_a_password_hashed_anew_while_it_was_compared_logs_in(
    auth: Auth, user: User, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = _hash_password(PASSWORD, COST)
    after_the_comparison(monkeypatch, lambda: db.update_user(user.id, hashed_password=hashed))
    assert live(auth, auth.log_in(EMAIL, PASSWORD)) == [True]


def test_a_session_without_a_password_outlasts_a_change_meanwhile(
    db: DB, settings: Settings, user: User, clock: Clock
) -> None:
    hashes = iter([_hash_password(NEW_PASSWORD, COST)])

    def clock_in_between() -> float:  # is read after the user was, before the session is stored
        for hashed in hashes:
            db.update_user(user.id, hashed_password=hashed)
        return clock()

    auth = Auth(db, settings, clock_in_between)
    assert live(auth, auth.create_session(EMAIL)) == [True]


# Sessions


def test_a_session_leads_to_its_user(auth: Auth, user: User, other: User) -> None:
    found = auth.get_user_from_session_id(auth.create_session(EMAIL))
    assert found
    assert (found.id, found.email) == (user.id, EMAIL)


@pytest.mark.parametrize("made", [lambda auth: auth.create_session(EMAIL), lambda auth: auth.log_in(EMAIL, PASSWORD)])
def test_a_session_id_is_a_new_uuid_kept_as_its_digest(
    auth: Auth, row: Callable[[], User], made: Callable[[Auth], str]
) -> None:
    first, second = made(auth), made(auth)
    assert first != second
    assert uuid.UUID(second).version == 4
    assert row().session_id == digest(second)


@pytest.mark.parametrize("email", [OTHER, "", "a\0", "\ud800", None])
def test_an_unknown_email_gets_no_session(auth: Auth, user: User, email: Any) -> None:
    assert auth.create_session(email) is None


def test_a_login_in_other_letter_case_is_the_same_users(auth: Auth, user: User) -> None:
    found = auth.get_user_from_session_id(auth.create_session(EMAIL.upper()))
    assert found
    assert found.id == user.id


@pytest.mark.parametrize("session_id", [None, "", "None", "nope", "\0", "\ud800", "a" * 2000, "' OR 1=1--"])
def test_what_is_no_session_leads_to_nobody(auth: Auth, user: User, session_id: str | None) -> None:
    assert auth.get_user_from_session_id(session_id) is None  # although the user has none
    auth.create_session(EMAIL)
    assert auth.get_user_from_session_id(session_id) is None


@pytest.mark.parametrize("altered", ["{}{{}}", "{} ", "{{{}}}", "urn:uuid:{}"])
def test_a_session_id_counts_as_exact_text(auth: Auth, user: User, altered: str) -> None:
    session_id = auth.create_session(EMAIL)
    assert live(auth, altered.format(session_id), (session_id or "").replace("-", "")) == [False, False]


def test_what_the_row_holds_logs_nobody_in(auth: Auth, user: User, row: Callable[[], User]) -> None:
    auth.create_session(EMAIL)
    auth.get_reset_password_token(EMAIL)
    assert live(auth, row().session_id) == [False]
    with pytest.raises(TokenRejected):
        auth.update_password(row().reset_token or "", NEW_PASSWORD)


def test_a_login_replaces_the_former_session(auth: Auth, user: User) -> None:
    first = auth.log_in(EMAIL, PASSWORD)
    second = auth.log_in(EMAIL, PASSWORD)
    assert live(auth, first, second) == [False, True]


def test_a_refused_login_ends_no_session(auth: Auth, user: User) -> None:
    session_id = auth.log_in(EMAIL, PASSWORD)
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, "wrong", replaced=session_id)
    assert live(auth, session_id) == [True]


def test_a_login_beyond_the_number_of_sessions_ends_the_oldest(three: Auth, row: Callable[[], User]) -> None:
    ids = [three.log_in(EMAIL, PASSWORD) for _ in range(4)]
    assert live(three, *ids) == [False, True, True, True]
    assert row().session_id == digest(ids[3])


def test_the_number_of_sessions_is_each_users_own(three: Auth, other: User) -> None:
    mine = three.create_session(EMAIL)
    for _ in range(4):
        three.create_session(OTHER)
    assert live(three, mine) == [True]


def test_a_dead_session_takes_no_place(three: Auth, clock: Clock) -> None:
    kept, *_unused = (three.create_session(EMAIL) for _ in range(3))
    clock.advance(WEEK - 1)
    assert live(three, kept) == [True]
    clock.advance(1)
    newest = [three.create_session(EMAIL) for _ in range(2)]
    assert live(three, kept, *newest) == [True, True, True]


def test_logins_at_once_leave_as_many_sessions_as_allowed(three: Auth) -> None:
    ids = at_once(8, lambda: three.create_session(EMAIL))
    assert sum(live(three, *map(str, ids))) == 3


def test_a_login_ends_the_session_that_its_client_had(three: Auth) -> None:
    mine, elsewhere = three.log_in(EMAIL, PASSWORD), three.log_in(EMAIL, PASSWORD)
    new = three.log_in(EMAIL, PASSWORD, replaced=mine)
    assert live(three, mine, elsewhere, new) == [False, True, True]


def test_a_login_ends_the_session_that_its_client_had_as_somebody_else(auth: Auth, db: DB, other: User) -> None:
    theirs = auth.log_in(OTHER, PASSWORD)
    mine = auth.log_in(EMAIL, PASSWORD, replaced=theirs)
    assert live(auth, theirs, mine) == [False, True]
    assert db.find_user_by(id=other.id).session_id is None


@pytest.mark.parametrize("replaced", [None, "", "nope", "\ud800"])
def test_a_client_with_no_session_of_ours_logs_in(auth: Auth, user: User, replaced: str | None) -> None:
    assert live(auth, auth.log_in(EMAIL, PASSWORD, replaced=replaced)) == [True]


def test_a_session_keeps_where_it_began(auth: Auth, user: User, sql: Callable[[str], list[Any]]) -> None:
    auth.log_in(EMAIL, PASSWORD, address="127.0.0.1", user_agent="é" * 300)
    assert sql("SELECT address, user_agent FROM sessions") == [("127.0.0.1", "é" * 200)]


# Logging out


def test_logging_out_ends_the_callers_session_only(three: Auth, other: User, row: Callable[[], User]) -> None:
    theirs = three.create_session(OTHER)
    first, second, third = (str(three.create_session(EMAIL)) for _ in range(3))
    three.log_out(third)
    assert live(three, first, second, third, theirs) == [True, True, False, True]
    assert row().session_id == digest(second)
    three.log_out(first)
    assert live(three, first, second) == [False, True]
    assert row().session_id == digest(second)
    three.log_out(second)
    assert row().session_id is None


@pytest.mark.parametrize("session_id", [None, "", "nope", "\ud800"])
def test_only_a_session_can_be_logged_out(auth: Auth, user: User, session_id: str | None) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(SessionRequired):
        auth.log_out(session_id)
    assert live(auth, mine) == [True]


def test_an_ended_session_cannot_be_logged_out(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    auth.log_out(session_id)
    with pytest.raises(SessionRequired):
        auth.log_out(session_id)


def test_an_expired_session_cannot_be_logged_out(auth: Auth, user: User, clock: Clock) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(WEEK)
    with pytest.raises(SessionRequired):
        auth.log_out(session_id)


def test_of_8_logouts_at_once_one_succeeds(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    results = at_once(8, lambda: auth.log_out(session_id))
    assert sorted(type(result).__name__ for result in results) == ["SessionRequired"] * 7 + ["User"]


def test_destroying_ends_all_sessions_of_the_user_and_no_others(
    three: Auth, db: DB, user: User, other: User, row: Callable[[], User]
) -> None:
    theirs = three.create_session(OTHER)
    mine = [three.create_session(EMAIL) for _ in range(3)]
    three.destroy_session(user.id)
    assert live(three, *mine, theirs) == [False, False, False, True]
    assert row().session_id is None
    assert db.find_user_by(id=other.id).session_id == digest(theirs)


def test_destroying_twice_is_harmless(auth: Auth, user: User, row: Callable[[], User]) -> None:
    auth.create_session(EMAIL)
    auth.destroy_session(user.id)
    auth.destroy_session(user.id)
    assert row() == user


@pytest.mark.parametrize("user_id", [0, -1, 2, 10**9])
def test_destroying_the_sessions_of_nobody_is_harmless(auth: Auth, user: User, user_id: int) -> None:
    session_id = auth.create_session(EMAIL)
    auth.destroy_session(user_id)
    assert live(auth, session_id) == [True]


# When a session ends by itself


def test_a_session_ends_after_7_days_without_use(auth: Auth, user: User, clock: Clock) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(WEEK)
    assert live(auth, session_id) == [False]


def test_a_session_lives_to_the_last_second_of_7_days_and_7_more_when_used(
    auth: Auth, user: User, clock: Clock
) -> None:
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


@pytest.mark.parametrize(("changed", "more"), [({"session_idle": 100}, 100), ({"session_lifetime": 100}, 1)])
def test_both_lifetimes_can_be_set(
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
    db: DB, settings: Settings, clock: Clock, user: User, sql: Callable[[str], list[Any]]
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
    assert sql("SELECT last_seen_at FROM sessions") == [(start,)]  # reading has not written
    clock.advance(MINUTE - 1)
    deferred.pop()()
    assert sql("SELECT last_seen_at FROM sessions") == [(start + MINUTE,)]
    assert live(auth, session_id) == [True]
    assert deferred == []


def test_a_record_of_use_that_comes_late_brings_no_session_back(
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


def test_a_record_of_use_that_comes_late_does_not_turn_a_later_one_back(
    db: DB, settings: Settings, clock: Clock, user: User, sql: Callable[[str], list[Any]]
) -> None:
    deferred: list[Callable[[], object]] = []
    auth = Auth(db, settings, clock, deferred.append)
    session_id = auth.create_session(EMAIL)
    for _ in range(2):
        clock.advance(MINUTE)
        assert live(auth, session_id) == [True]
    for write in reversed(deferred):
        write()
    assert sql("SELECT last_seen_at FROM sessions") == [(int(clock()),)]


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


@pytest.mark.parametrize("seconds", [DAY, -DAY])
def test_after_a_jump_of_the_clock_a_new_login_works(
    auth: Auth, clock: Clock, row: Callable[[], User], seconds: int
) -> None:
    auth.log_in(EMAIL, PASSWORD)
    clock.advance(seconds)
    session_id = auth.log_in(EMAIL, PASSWORD)
    assert live(auth, session_id) == [True]
    assert row().session_id == digest(session_id)


@pytest.mark.parametrize(("seconds", "lives"), [(1, True), (300, True), (301, False), (DAY, False)])
def test_a_reset_token_from_the_future_is_invalid(
    auth: Auth, user: User, clock: Clock, seconds: int, lives: bool
) -> None:
    token = auth.get_reset_password_token(EMAIL)
    clock.advance(-seconds)
    if not lives:
        with pytest.raises(TokenRejected):
            auth.update_password(token, NEW_PASSWORD)
    else:
        auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is lives


def test_after_a_jump_of_the_clock_a_new_reset_token_works(auth: Auth, user: User, clock: Clock) -> None:
    auth.get_reset_password_token(EMAIL)
    clock.advance(-DAY)
    auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


# Resetting


def test_a_reset_token_is_a_new_uuid_kept_as_its_digest(auth: Auth, row: Callable[[], User]) -> None:
    first, second = auth.get_reset_password_token(EMAIL), auth.get_reset_password_token(EMAIL)
    assert first != second
    assert uuid.UUID(second).version == 4
    assert row().reset_token == digest(second)


@pytest.mark.parametrize("email", [OTHER, "", "a\0", "\ud800", None])
def test_an_unknown_email_gets_no_reset_token(auth: Auth, user: User, email: Any) -> None:
    with pytest.raises(UnknownEmail):
        auth.get_reset_password_token(email)


def test_asking_for_a_token_ends_nothing(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    auth.get_reset_password_token(EMAIL)
    assert live(auth, session_id) == [True]
    assert auth.valid_login(EMAIL, PASSWORD)


@pytest.mark.parametrize("email", [None, EMAIL, EMAIL.upper()])
def test_a_token_changes_the_password(auth: Auth, user: User, email: str | None) -> None:
    auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD, email)
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is True
    assert auth.valid_login(EMAIL, PASSWORD) is False


def test_a_change_clears_the_token_and_ends_all_sessions_of_the_user(
    three: Auth, other: User, sql: Callable[[str], list[Any]]
) -> None:
    theirs = three.create_session(OTHER)
    mine = [three.create_session(EMAIL) for _ in range(3)]
    three.update_password(three.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert live(three, *mine, theirs) == [False, False, False, True]
    assert sql("SELECT session_id, reset_token, reset_expires_at FROM users WHERE id = 1") == [(None, None, None)]
    assert three.valid_login(OTHER, PASSWORD)


@pytest.mark.parametrize("token", ["", None, "None", "nope", "\0", "\ud800", "a" * 2000, "' OR 1=1--"])
def test_what_is_no_token_changes_nothing(auth: Auth, row: Callable[[], User], token: Any) -> None:
    with pytest.raises(TokenRejected):  # although nobody has one
        auth.update_password(token, NEW_PASSWORD)
    auth.get_reset_password_token(EMAIL)
    before = row()
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert row() == before


def test_a_spent_token_is_refused(auth: Auth, user: User) -> None:
    token = auth.get_reset_password_token(EMAIL)
    auth.update_password(token, NEW_PASSWORD)
    with pytest.raises(TokenRejected):
        auth.update_password(token, "another")
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


def test_a_replaced_token_is_refused(auth: Auth, user: User) -> None:
    replaced, token = auth.get_reset_password_token(EMAIL), auth.get_reset_password_token(EMAIL)
    with pytest.raises(TokenRejected):
        auth.update_password(replaced, "another")
    auth.update_password(token, NEW_PASSWORD)


def test_a_token_is_refused_after_600_seconds(auth: Auth, user: User, clock: Clock) -> None:
    token = auth.get_reset_password_token(EMAIL)
    clock.advance(600)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, PASSWORD)


def test_a_token_is_good_for_599_seconds(auth: Auth, user: User, clock: Clock) -> None:
    token = auth.get_reset_password_token(EMAIL)
    clock.advance(599)
    auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


def test_a_token_that_expires_while_we_hash_is_refused(
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


@pytest.mark.parametrize("email", [OTHER, "nobody@example.com", "", "\ud800"])
def test_a_token_is_good_for_its_own_email_only(auth: Auth, other: User, row: Callable[[], User], email: str) -> None:
    token = auth.get_reset_password_token(EMAIL)
    before = row()
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD, email)
    assert row() == before
    assert auth.valid_login(OTHER, PASSWORD)


@pytest.mark.parametrize("password", ["", "a" * 1025, "\ud800"])
def test_a_refused_password_does_not_spend_the_token(auth: Auth, user: User, password: str) -> None:
    token = auth.get_reset_password_token(EMAIL)
    session_id = auth.create_session(EMAIL)
    with pytest.raises(PasswordRejected):
        auth.update_password(token, password)
    assert live(auth, session_id) == [True]
    auth.update_password(token, NEW_PASSWORD)


def test_of_8_threads_with_one_token_one_succeeds(auth: Auth, user: User) -> None:
    token = auth.get_reset_password_token(EMAIL)
    names = iter(f"password {number}" for number in range(8))

    def change() -> str:
        password = next(names)
        auth.update_password(token, password)
        return password

    results = at_once(8, change)
    won = [result for result in results if isinstance(result, str)]
    assert sorted(type(result) is TokenRejected for result in results) == [False] + [True] * 7
    assert auth.valid_login(EMAIL, won[0])


@pytest.mark.parametrize(
    "guess",
    [
        lambda auth, _: auth.update_password("nope", NEW_PASSWORD, EMAIL),
        lambda auth, _: auth.update_password("", NEW_PASSWORD),
        lambda auth, _: auth.update_password(None, NEW_PASSWORD),
        lambda auth, _: auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD, OTHER),
        lambda auth, clock: auth.update_password(
            (auth.get_reset_password_token(EMAIL), clock.advance(600))[0], NEW_PASSWORD
        ),
    ],
    ids=["unknown", "empty", "none", "another's", "expired"],
)
def test_a_guessed_token_costs_no_bcrypt(
    auth: Auth, clock: Clock, hashes: list[bytes], guess: Callable[[Auth, Clock], None]
) -> None:
    with pytest.raises(TokenRejected):
        guess(auth, clock)
    assert hashes == []
