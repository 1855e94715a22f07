"""The rules: who may register, what logs in, what a session is, and when a token dies."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import bcrypt
import pytest

import passwords
import totp
from auth import (
    Auth,
    AuthError,
    CodeRequired,
    EmailRejected,
    EmailTaken,
    LoginFailed,
    PasswordRejected,
    ReauthenticationFailed,
    RegistrationClosed,
    SecondFactorRejected,
    SecondFactorRequired,
    SessionRequired,
    SessionUnknown,
    TokenRejected,
    TooManyAttempts,
    UnknownEmail,
    _generate_uuid,
    _hash_password,
)
from settings import Settings
from storage import DB, NoResultFound, User
from tests.conftest import COST, Clock, ledger_of

EMAIL = "bob@example.com"
OTHER = "eve@example.com"
PASSWORD = "b4l0u"
NEW_PASSWORD = "t4rt1fl3tt3"
HOME, AWAY = "192.0.2.1", "198.51.100.7"

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


def in_production(settings: Settings) -> Settings:
    """What faces the internet, but for the cost of a hash: settings refuse less than 10 there."""
    changed = replace(settings, public_url="https://auth.example.com", bcrypt_cost=10)
    object.__setattr__(changed, "bcrypt_cost", COST)
    return changed


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
    with ledger_of(settings.database) as reader:
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


@pytest.mark.sqlite
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


@pytest.mark.sqlite
def test_the_files_hold_no_password_no_session_id_and_no_token(auth: Auth, tmp_path: Path) -> None:
    secrets = [PASSWORD, NEW_PASSWORD]
    auth.register_user(EMAIL, PASSWORD)
    secrets += [auth.log_in(EMAIL, PASSWORD)[1], auth.get_reset_password_token(EMAIL)]
    auth.update_password(secrets[-1], NEW_PASSWORD)
    secrets += [auth.log_in(EMAIL, NEW_PASSWORD)[1], auth.get_reset_password_token(EMAIL)]
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
    assert live(auth, auth.log_in(EMAIL, PASSWORD)[1]) == [True]
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
    assert live(three, three.log_in(EMAIL, PASSWORD)[1], former) == [True, True]


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
    assert live(auth, auth.log_in(EMAIL, PASSWORD)[1]) == [True]


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


@pytest.mark.parametrize(
    "made", [lambda auth: auth.create_session(EMAIL), lambda auth: auth.log_in(EMAIL, PASSWORD)[1]]
)
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
    first = auth.log_in(EMAIL, PASSWORD)[1]
    second = auth.log_in(EMAIL, PASSWORD)[1]
    assert live(auth, first, second) == [False, True]


def test_a_refused_login_ends_no_session(auth: Auth, user: User) -> None:
    session_id = auth.log_in(EMAIL, PASSWORD)[1]
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, "wrong", replaced=session_id)
    assert live(auth, session_id) == [True]


def test_a_login_beyond_the_number_of_sessions_ends_the_oldest(three: Auth, row: Callable[[], User]) -> None:
    ids = [three.log_in(EMAIL, PASSWORD)[1] for _ in range(4)]
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
    mine, elsewhere = three.log_in(EMAIL, PASSWORD)[1], three.log_in(EMAIL, PASSWORD)[1]
    new = three.log_in(EMAIL, PASSWORD, replaced=mine)[1]
    assert live(three, mine, elsewhere, new) == [False, True, True]


def test_a_login_ends_the_session_that_its_client_had_as_somebody_else(auth: Auth, db: DB, other: User) -> None:
    theirs = auth.log_in(OTHER, PASSWORD)[1]
    mine = auth.log_in(EMAIL, PASSWORD, replaced=theirs)[1]
    assert live(auth, theirs, mine) == [False, True]
    assert db.find_user_by(id=other.id).session_id is None


@pytest.mark.parametrize("replaced", [None, "", "nope", "\ud800"])
def test_a_client_with_no_session_of_ours_logs_in(auth: Auth, user: User, replaced: str | None) -> None:
    assert live(auth, auth.log_in(EMAIL, PASSWORD, replaced=replaced)[1]) == [True]


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
    session_id = auth.log_in(EMAIL, PASSWORD)[1]
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


# Who may register


@pytest.mark.parametrize(("mode", "message"), [("invitation", "is by invitation only"), ("closed", "is closed")])
def test_registration_can_be_shut(
    db: DB, settings: Settings, clock: Clock, hashes: list[bytes], mode: str, message: str
) -> None:
    auth = Auth(db, replace(settings, registration=mode), clock)
    for email in ("new@example.com", EMAIL, ""):  # nor does it tell who has an account
        with pytest.raises(RegistrationClosed, match=f"^registration {message}$"):
            auth.register_user(email, PASSWORD, address=HOME)
    assert [user.email for user in db.each_user()] == [EMAIL, OTHER]
    assert hashes == []


@pytest.mark.parametrize("mode", ["open", "invitation", "closed"])
def test_the_operator_may_always_add_an_account(db: DB, settings: Settings, clock: Clock, mode: str) -> None:
    auth = Auth(db, replace(settings, registration=mode), clock)
    auth.update_password(auth.link_token(auth.add_account(EMAIL))[0], PASSWORD, EMAIL)
    assert auth.valid_login(EMAIL, PASSWORD)


def test_an_account_keeps_when_it_was_made(auth: Auth, clock: Clock) -> None:
    assert auth.register_user(EMAIL, PASSWORD).created_at == int(clock())
    assert auth.add_account(OTHER).created_at == int(clock())
    assert auth.find_user(OTHER).created_at == int(clock())


# Invitations and links of the operator


@pytest.fixture
def invited(auth: Auth) -> User:
    return auth.add_account(EMAIL)


def test_who_is_invited_has_no_password(auth: Auth, invited: User) -> None:
    for password in ("", "!", "None"):
        assert auth.valid_login(EMAIL, password) is False
        with pytest.raises(LoginFailed, match=r"^wrong email or password$"):
            auth.log_in(EMAIL, password)


@pytest.mark.parametrize("email", ["", "a\0", "a" * 255])
def test_the_operator_adds_no_odd_email(auth: Auth, email: str) -> None:
    with pytest.raises(EmailRejected):
        auth.add_account(email)


def test_the_operator_adds_an_email_once(auth: Auth, user: User, row: Callable[[], User]) -> None:
    with pytest.raises(EmailTaken):
        auth.add_account(EMAIL.upper())
    assert row() == user


def test_an_invitation_sets_the_first_password(auth: Auth, invited: User, db: DB) -> None:
    token, _ = auth.link_token(invited)
    assert db.find_user_by(id=invited.id).reset_token == digest(token)
    auth.update_password(token, PASSWORD, EMAIL)
    assert auth.valid_login(EMAIL, PASSWORD)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD, EMAIL)


@pytest.mark.parametrize(("seconds", "good"), [(WEEK - 1, True), (WEEK, False)])
def test_an_invitation_lives_for_7_days(auth: Auth, clock: Clock, invited: User, seconds: int, good: bool) -> None:
    token, until = auth.link_token(invited)
    assert until == int(clock()) + WEEK
    clock.advance(seconds)
    with nullcontext() if good else pytest.raises(TokenRejected):
        auth.update_password(token, PASSWORD)
    assert auth.valid_login(EMAIL, PASSWORD) is good


@pytest.mark.parametrize(("seconds", "good"), [(599, True), (600, False)])
def test_a_link_for_who_has_a_password_lives_as_long_as_any_reset(
    auth: Auth, clock: Clock, user: User, seconds: int, good: bool
) -> None:
    token, until = auth.link_token(user)
    assert until == int(clock()) + 600
    clock.advance(seconds)
    with nullcontext() if good else pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD) is good


def test_a_new_link_replaces_the_former(auth: Auth, invited: User) -> None:
    former, newest = auth.link_token(invited)[0], auth.link_token(invited)[0]
    with pytest.raises(TokenRejected):
        auth.update_password(former, PASSWORD)
    auth.update_password(newest, PASSWORD)


def test_a_strangers_request_does_not_void_an_invitation(auth: Auth, clock: Clock, invited: User) -> None:
    token, _ = auth.link_token(invited)
    clock.advance(DAY)
    with pytest.raises(UnknownEmail):
        auth.get_reset_password_token(EMAIL, address=AWAY)
    auth.update_password(token, PASSWORD)


def test_a_refused_first_password_does_not_spend_the_invitation(auth: Auth, invited: User) -> None:
    token, _ = auth.link_token(invited)
    with pytest.raises(PasswordRejected):
        auth.update_password(token, "")
    auth.update_password(token, PASSWORD)


def test_a_user_is_found_in_any_letter_case(auth: Auth, user: User) -> None:
    assert auth.find_user(EMAIL.upper()) == user


@pytest.mark.parametrize("email", [OTHER, "", "\ud800", EMAIL + " "])
def test_nobody_is_found_by_an_email_that_is_nobodys(auth: Auth, user: User, email: str) -> None:
    with pytest.raises(UnknownEmail):
        auth.find_user(email)


# Disabled


@pytest.fixture
def disabled(auth: Auth, db: DB, user: User, clock: Clock) -> User:
    db.disable_user(user.id, int(clock()))
    return db.find_user_by(id=user.id)


def test_no_session_is_made_for_who_is_disabled(auth: Auth, disabled: User) -> None:
    assert auth.create_session(disabled.email) is None


def test_who_is_disabled_cannot_log_in_and_is_told_nothing_else(auth: Auth, disabled: User) -> None:
    for password in (PASSWORD, "wrong"):
        assert auth.valid_login(EMAIL, password) is False
        with pytest.raises(LoginFailed, match=r"^wrong email or password$") as refusal:
            auth.log_in(EMAIL, password)
        assert refusal.value.user_id == disabled.id


@pytest.mark.parametrize("cost", [COST, COST + 1])
def test_a_login_of_who_is_disabled_costs_one_bcrypt(
    auth: Auth, db: DB, hashes: list[bytes], disabled: User, cost: int
) -> None:
    db.update_user(disabled.id, hashed_password=_hash_password(PASSWORD, cost))
    hashes.clear()
    assert auth.valid_login(EMAIL, PASSWORD) is False
    assert len(hashes) == 1


def test_who_is_disabled_is_logged_out_and_cannot_reset(
    auth: Auth, db: DB, user: User, other: User, clock: Clock
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
    assert live(auth, auth.log_in(EMAIL, PASSWORD)[1]) == [True]


def test_a_link_is_of_no_use_while_its_user_is_disabled(
    auth: Auth, db: DB, hashes: list[bytes], disabled: User
) -> None:
    token, _ = auth.link_token(disabled)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert hashes == []
    db.enable_user(disabled.id)
    auth.update_password(token, NEW_PASSWORD)


@pytest.mark.parametrize(
    "change",
    [lambda db, user: db.disable_user(user.id, 1), lambda db, user: db.delete_user(user.id)],
    ids=["disabled", "deleted"],
)
def test_who_goes_while_the_password_is_compared_is_not_logged_in(
    auth: Auth,
    db: DB,
    user: User,
    sql: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[DB, User], object],
) -> None:
    after_the_comparison(monkeypatch, lambda: change(db, user))
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, PASSWORD)
    assert sql("SELECT * FROM sessions") == []


# Seeing and ending sessions


def test_sessions_are_listed_the_newest_first_and_ones_own_is_named(three: Auth, other: User, clock: Clock) -> None:
    three.create_session(OTHER)
    first = three.log_in(EMAIL, PASSWORD, address="192.0.2.1", user_agent="one")[1]
    clock.advance(5)
    second = three.log_in(EMAIL, PASSWORD, address="192.0.2.2", user_agent="two")[1]
    _, listed, own = three.list_sessions(first)
    now = int(clock())
    assert [(session.address, session.user_agent, session.created_at, session.last_seen_at) for session in listed] == [
        ("192.0.2.2", "two", now, now),
        ("192.0.2.1", "one", now - 5, now - 5),
    ]
    assert [session.id for session in listed] == [digest(second)[:16], digest(first)[:16]]
    assert own == digest(first)[:16]
    assert three.sessions_of(1) == listed


def test_what_a_session_is_called_leads_to_nobody(auth: Auth, user: User) -> None:
    session_id = auth.create_session(EMAIL)
    _, (session,), own = auth.list_sessions(session_id)
    assert session.id == own
    assert live(auth, own, session.session_hash) == [False, False]
    assert session.session_hash not in repr(session)


@pytest.mark.parametrize(("used", "ends"), [(0, WEEK), (DAY, DAY + WEEK), (26 * DAY, MONTH)])
def test_a_session_says_when_it_ends_if_it_is_not_used_again(
    auth: Auth, user: User, clock: Clock, used: int, ends: int
) -> None:
    session_id, began = auth.create_session(EMAIL), int(clock())
    for _ in range(26):
        clock.advance(used / 26)
        assert live(auth, session_id) == [True]
    (session,) = auth.sessions_of(user.id)
    assert auth.expires_at(session) == began + ends
    clock.now = began + ends - 1
    assert auth.sessions_of(user.id) != []
    clock.advance(1)
    assert auth.sessions_of(user.id) == []
    assert live(auth, session_id) == [False]


@pytest.mark.parametrize(("seconds", "listed"), [(-DAY, 0), (-301, 0), (-300, 1), (DAY, 1)])
def test_a_session_is_listed_while_it_is_live_wherever_the_clock_jumps(
    auth: Auth, user: User, clock: Clock, seconds: int, listed: int
) -> None:
    session_id = auth.create_session(EMAIL)
    clock.advance(seconds)
    assert len(auth.sessions_of(user.id)) == listed
    clock.advance(-seconds)
    assert len(auth.sessions_of(user.id)) == 1
    assert live(auth, session_id) == [True]


def test_a_named_session_ends_and_no_other(three: Auth, user: User, row: Callable[[], User]) -> None:
    first, second, third = (str(three.create_session(EMAIL)) for _ in range(3))
    ended, own = three.end_session(first, digest(third)[:16])
    assert (ended.id, own) == (user.id, False)
    assert live(three, first, second, third) == [True, True, False]
    assert row().session_id == digest(second)
    assert three.end_session(first, digest(first)[:16])[1] is True
    assert live(three, first, second) == [False, True]


def test_nobody_elses_session_can_be_named(auth: Auth, other: User) -> None:
    mine, theirs = str(auth.create_session(EMAIL)), str(auth.create_session(OTHER))
    for name in (digest(theirs)[:16], digest(theirs), digest(mine), digest(mine)[:15], mine, theirs, "", "%", "all"):
        with pytest.raises(SessionUnknown):
            auth.end_session(mine, name)
    assert live(auth, mine, theirs) == [True, True]


def test_an_ended_or_expired_session_has_no_name(three: Auth, user: User, clock: Clock) -> None:
    ended, expired, mine = (str(three.create_session(EMAIL)) for _ in range(3))
    three.log_out(ended)
    for _ in range(2):
        clock.advance(WEEK // 2 + 1)
        live(three, mine)
    for gone in (ended, expired):
        with pytest.raises(SessionUnknown):
            three.end_session(mine, digest(gone)[:16])


@pytest.mark.parametrize(("but_this", "left"), [(True, [False, True, False]), (False, [False, False, False])])
def test_all_sessions_end_or_all_others(
    three: Auth, user: User, other: User, row: Callable[[], User], but_this: bool, left: list[bool]
) -> None:
    theirs = three.create_session(OTHER)
    first, mine, third = (three.create_session(EMAIL) for _ in range(3))
    assert three.end_sessions(mine, but_this=but_this).id == user.id
    assert live(three, first, mine, third, theirs) == [*left, True]
    assert row().session_id == (digest(mine) if but_this else None)


SEE_OR_END = [
    lambda auth, held: auth.list_sessions(held),
    lambda auth, held: auth.end_session(held, digest(held)[:16] if held else ""),
    lambda auth, held: auth.end_sessions(held, but_this=True),
    lambda auth, held: auth.end_sessions(held, but_this=False),
]
CHANGES = [
    lambda auth, held: auth.change_password(held, PASSWORD, NEW_PASSWORD),
    lambda auth, held: auth.delete_account(held, PASSWORD),
    lambda auth, held: auth.begin_totp(held, PASSWORD),
    lambda auth, held: auth.confirm_totp(held, "000000"),
    lambda auth, held: auth.remove_totp(held, PASSWORD, "000000"),
]


@pytest.mark.parametrize("act", SEE_OR_END + CHANGES)
@pytest.mark.parametrize("held", [None, "", "nope", "ended", "expired"])
def test_without_a_session_nothing_is_seen_ended_or_changed(
    auth: Auth,
    clock: Clock,
    user: User,
    hashes: list[bytes],
    row: Callable[[], User],
    held: str | None,
    act: Callable[[Auth, str | None], object],
) -> None:
    if held in ("ended", "expired"):
        held, why = auth.create_session(EMAIL), held
        if why == "ended":
            auth.log_out(held)
        else:
            clock.advance(WEEK)
    before = row()
    with pytest.raises(SessionRequired):
        act(auth, held)
    assert row() == before
    assert hashes == []


# Changing the password


def test_a_change_of_the_password_keeps_this_session_alone_under_a_new_id(
    three: Auth, user: User, other: User, clock: Clock, row: Callable[[], User]
) -> None:
    theirs = three.create_session(OTHER)
    former, mine, later = (three.log_in(EMAIL, PASSWORD, user_agent=name)[1] for name in ("a", "b", "c"))
    before = next(session for session in three.sessions_of(user.id) if session.id == digest(mine)[:16])
    clock.advance(DAY)
    changed, renewed = three.change_password(mine, PASSWORD, NEW_PASSWORD)
    assert changed.id == user.id
    assert live(three, former, mine, later, renewed, theirs) == [False, False, False, True, True]
    assert three.valid_login(EMAIL, NEW_PASSWORD)
    assert not three.valid_login(EMAIL, PASSWORD)
    assert three.valid_login(OTHER, PASSWORD)
    assert row().session_id == digest(renewed)
    (session,) = three.sessions_of(user.id)
    assert (session.created_at, session.expires_at, session.user_agent) == (before.created_at, before.expires_at, "b")


def test_a_change_of_the_password_voids_a_reset_token(auth: Auth, user: User) -> None:
    token, mine = auth.get_reset_password_token(EMAIL), auth.create_session(EMAIL)
    auth.change_password(mine, PASSWORD, NEW_PASSWORD)
    with pytest.raises(TokenRejected):
        auth.update_password(token, "another")
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


@pytest.mark.parametrize("password", ["wrong", "", NEW_PASSWORD, "\ud800"])
def test_a_change_asks_for_the_present_password(auth: Auth, user: User, row: Callable[[], User], password: str) -> None:
    mine = auth.create_session(EMAIL)
    before = row()
    with pytest.raises(ReauthenticationFailed, match=r"^wrong password$"):
        auth.change_password(mine, password, NEW_PASSWORD)
    assert row() == before
    assert live(auth, mine) == [True]


@pytest.mark.parametrize("new", ["", "a" * 1025, "\ud800"])
def test_a_refused_new_password_costs_no_bcrypt_and_no_attempt(
    auth: Auth, hashes: list[bytes], sql: Callable[[str], list[Any]], new: str
) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(PasswordRejected):
        auth.change_password(mine, "wrong", new, address=HOME)
    assert hashes == []
    assert sql("SELECT * FROM throttle") == []


def test_in_production_a_weak_new_password_is_refused(db: DB, settings: Settings, clock: Clock, user: User) -> None:
    auth = Auth(db, in_production(settings), clock)
    mine = auth.create_session(EMAIL)
    with pytest.raises(PasswordRejected, match="15 characters"):
        auth.change_password(mine, PASSWORD, NEW_PASSWORD)
    renewed = auth.change_password(mine, PASSWORD, "tarte flambée du dimanche")[1]
    assert len(renewed) == 43  # 256 bits
    assert live(auth, renewed) == [True]


@pytest.mark.parametrize(
    "act",
    [
        lambda auth, mine: auth.change_password(mine, "wrong", NEW_PASSWORD, address=HOME),
        lambda auth, mine: auth.delete_account(mine, "wrong", address=HOME),
        lambda auth, mine: auth.begin_totp(mine, "wrong", address=HOME),
    ],
)
def test_guesses_at_the_present_password_count_as_logins(
    auth: Auth, hashes: list[bytes], act: Callable[[Auth, str | None], object]
) -> None:
    mine = auth.create_session(EMAIL)
    for _ in range(5):
        with pytest.raises(LoginFailed):
            auth.log_in(EMAIL, "wrong", address=HOME)
    for _ in range(5):
        with pytest.raises(ReauthenticationFailed):
            act(auth, mine)
    for _ in range(5):
        with pytest.raises(TooManyAttempts):
            act(auth, mine)
    assert len(hashes) == 10
    assert live(auth, mine) == [True]


def test_the_right_present_password_does_not_count(auth: Auth, user: User) -> None:
    mine = auth.create_session(EMAIL)
    for _ in range(15):
        mine = auth.change_password(mine, PASSWORD, PASSWORD, address=HOME)[1]


@pytest.mark.parametrize(
    "meanwhile",
    [
        lambda auth, mine, token: auth.update_password(token, "another"),
        lambda auth, mine, token: auth.log_out(mine),
    ],
    ids=["reset", "logged out"],
)
def test_a_change_that_was_overtaken_changes_nothing(
    auth: Auth,
    user: User,
    row: Callable[[], User],
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: Callable[[Auth, str | None, str], object],
) -> None:
    mine, token = auth.create_session(EMAIL), auth.get_reset_password_token(EMAIL)
    after_the_comparison(monkeypatch, lambda: meanwhile(auth, mine, token))
    with pytest.raises(SessionRequired):
        auth.change_password(mine, PASSWORD, NEW_PASSWORD)
    assert not auth.valid_login(EMAIL, NEW_PASSWORD)
    assert row().session_id is None


def test_of_8_changes_at_once_from_one_session_one_succeeds(auth: Auth, user: User) -> None:
    mine = auth.create_session(EMAIL)
    names = iter(f"password {number}" for number in range(8))

    def change() -> tuple[str, str]:
        password = next(names)
        return password, auth.change_password(mine, PASSWORD, password)[1]

    results = at_once(8, change)
    ((password, renewed),) = (result for result in results if isinstance(result, tuple))
    assert {type(result) for result in results} <= {tuple, SessionRequired, ReauthenticationFailed}
    assert auth.valid_login(EMAIL, password)
    assert live(auth, renewed) == [True]


# Deleting the account


OWNED = ("sessions", "recovery_codes", "known_addresses")


def test_with_an_account_goes_all_that_is_its_own(
    auth: Auth, clock: Clock, other: User, db: DB, sql: Callable[[str], list[Any]]
) -> None:
    theirs = switch_on(auth, clock, OTHER)
    auth.log_in(OTHER, PASSWORD, theirs.recovery.pop(), address=AWAY)
    mine = switch_on(auth, clock)
    session_id = auth.log_in(EMAIL, PASSWORD, mine.recovery[0], address=HOME)[1]
    token = auth.get_reset_password_token(EMAIL)
    before = db.find_user_by(id=other.id)
    rows = {table: sql(f"SELECT * FROM {table} WHERE user_id = {other.id}") for table in OWNED}
    assert all(sql(f"SELECT * FROM {table} WHERE user_id = 1") for table in OWNED)
    assert auth.delete_account(session_id, PASSWORD).email == EMAIL
    assert {table: sql(f"SELECT * FROM {table}") for table in OWNED} == rows
    assert list(db.each_user()) == [before]
    assert live(auth, session_id) == [False]
    assert not auth.valid_login(EMAIL, PASSWORD)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    assert live(auth, auth.log_in(OTHER, PASSWORD, theirs.recovery.pop())[1]) == [True]


def test_the_email_of_a_deleted_account_is_free_and_its_number_is_not(auth: Auth, user: User) -> None:
    auth.delete_account(auth.create_session(EMAIL), PASSWORD)
    again = auth.register_user(EMAIL, NEW_PASSWORD)
    assert again.id != user.id
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


@pytest.mark.parametrize("password", ["wrong", "", "\ud800"])
def test_an_account_is_deleted_only_with_its_password(
    auth: Auth, user: User, row: Callable[[], User], password: str
) -> None:
    mine = auth.create_session(EMAIL)
    before = row()
    with pytest.raises(ReauthenticationFailed, match=r"^wrong password$"):
        auth.delete_account(mine, password)
    assert row() == before
    assert live(auth, mine) == [True]


def test_a_password_that_was_changed_meanwhile_deletes_nothing(
    auth: Auth, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, token = auth.create_session(EMAIL), auth.get_reset_password_token(EMAIL)
    after_the_comparison(monkeypatch, lambda: auth.update_password(token, NEW_PASSWORD))
    with pytest.raises(SessionRequired):
        auth.delete_account(mine, PASSWORD)
    assert auth.valid_login(EMAIL, NEW_PASSWORD)


# A second factor


@dataclass
class Factor:
    """A second factor in force, and the session from which it was switched on."""

    seed: str
    session_id: str
    recovery: list[str]


def code_now(seed: str, clock: Clock, later: int = 0) -> str:
    return totp.code(seed, int(clock()) // 30 + later)


def switch_on(auth: Auth, clock: Clock, email: str = EMAIL) -> Factor:
    """Switch it on, and wait until the code that confirmed it is over."""
    session_id = auth.create_session(email)
    seed, _ = auth.begin_totp(session_id, PASSWORD)
    _, renewed, recovery = auth.confirm_totp(session_id, code_now(seed, clock))
    clock.advance(30)
    return Factor(seed, renewed, recovery)


@pytest.fixture
def factor(auth: Auth, clock: Clock, user: User) -> Factor:
    return switch_on(auth, clock)


def test_a_second_factor_from_its_seed_to_its_end(
    auth: Auth, clock: Clock, user: User, row: Callable[[], User]
) -> None:
    mine = auth.log_in(EMAIL, PASSWORD)[1]
    seed, uri = auth.begin_totp(mine, PASSWORD)
    assert uri == totp.uri(seed, EMAIL, "authsvc")
    assert (row().totp_secret, row().totp_since) == (seed, None)
    confirmed, mine, recovery = auth.confirm_totp(mine, code_now(seed, clock))
    assert confirmed.id == user.id
    assert len(set(recovery)) == 10
    assert (row().totp_secret, row().totp_since) == (seed, int(clock()))
    clock.advance(30)
    with pytest.raises(CodeRequired):
        auth.log_in(EMAIL, PASSWORD)
    mine = auth.log_in(EMAIL, PASSWORD, code_now(seed, clock))[1]
    clock.advance(30)
    removed, mine = auth.remove_totp(mine, PASSWORD, code_now(seed, clock))
    assert removed.id == user.id
    assert live(auth, mine) == [True]
    assert (row().totp_secret, row().totp_since) == (None, None)
    assert live(auth, auth.log_in(EMAIL, PASSWORD)[1]) == [True]


def test_in_production_an_app_calls_it_by_the_host(db: DB, settings: Settings, clock: Clock, user: User) -> None:
    auth = Auth(db, in_production(settings), clock)
    seed, uri = auth.begin_totp(auth.create_session(EMAIL), PASSWORD)
    assert uri == totp.uri(seed, EMAIL, "auth.example.com")


def test_an_unconfirmed_seed_asks_for_no_code(auth: Auth, clock: Clock, user: User) -> None:
    auth.begin_totp(auth.create_session(EMAIL), PASSWORD)
    assert live(auth, auth.log_in(EMAIL, PASSWORD)[1]) == [True]
    assert live(auth, auth.log_in(EMAIL, PASSWORD, "000000")[1]) == [True]


def test_a_new_seed_replaces_one_that_was_not_confirmed(auth: Auth, clock: Clock, user: User) -> None:
    mine = auth.create_session(EMAIL)
    replaced, seed = auth.begin_totp(mine, PASSWORD)[0], auth.begin_totp(mine, PASSWORD)[0]
    with pytest.raises(ReauthenticationFailed):
        auth.confirm_totp(mine, code_now(replaced, clock))
    auth.confirm_totp(mine, code_now(seed, clock))


def test_a_seed_is_given_only_for_the_password(auth: Auth, user: User, row: Callable[[], User]) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(ReauthenticationFailed, match=r"^wrong password$"):
        auth.begin_totp(mine, "wrong")
    assert row().totp_secret is None


@pytest.mark.parametrize("later", [-2, 2, None])
def test_a_factor_comes_into_force_only_with_a_code(
    auth: Auth, clock: Clock, user: User, row: Callable[[], User], sql: Callable[[str], list[Any]], later: int | None
) -> None:
    mine = auth.create_session(EMAIL)
    seed, _ = auth.begin_totp(mine, PASSWORD)
    with pytest.raises(ReauthenticationFailed, match=r"^wrong one-time code$"):
        auth.confirm_totp(mine, "" if later is None else code_now(seed, clock, later))
    assert row().totp_since is None
    assert sql("SELECT * FROM recovery_codes") == []
    assert live(auth, mine) == [True]


def test_what_was_not_begun_cannot_be_confirmed(auth: Auth, user: User) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is being set up$"):
        auth.confirm_totp(mine, "000000")


def test_a_factor_is_not_switched_on_twice(auth: Auth, clock: Clock, factor: Factor, row: Callable[[], User]) -> None:
    before = row()
    with pytest.raises(SecondFactorRejected, match=r"^a second factor is on already$"):
        auth.begin_totp(factor.session_id, PASSWORD)
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is being set up$"):
        auth.confirm_totp(factor.session_id, code_now(factor.seed, clock))
    assert row() == before
    assert live(auth, auth.log_in(EMAIL, PASSWORD, factor.recovery[0])[1]) == [True]


def test_what_is_not_on_cannot_be_switched_off(auth: Auth, clock: Clock, hashes: list[bytes]) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is on$"):
        auth.remove_totp(mine, PASSWORD, "000000")
    seed, _ = auth.begin_totp(mine, PASSWORD)
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is on$"):
        auth.remove_totp(mine, PASSWORD, code_now(seed, clock))


def test_on_and_off_end_all_other_sessions_and_renew_this_one(
    three: Auth, clock: Clock, user: User, other: User, row: Callable[[], User]
) -> None:
    theirs = three.create_session(OTHER)
    elsewhere, mine = three.create_session(EMAIL), three.create_session(EMAIL)
    seed, _ = three.begin_totp(mine, PASSWORD)
    assert live(three, elsewhere, mine) == [True, True]
    _, renewed, _ = three.confirm_totp(mine, code_now(seed, clock))
    assert live(three, elsewhere, mine, renewed, theirs) == [False, False, True, True]
    assert row().session_id == digest(renewed)
    clock.advance(30)
    elsewhere = three.log_in(EMAIL, PASSWORD, code_now(seed, clock))[1]
    clock.advance(30)
    _, last = three.remove_totp(renewed, PASSWORD, code_now(seed, clock))
    assert live(three, elsewhere, renewed, last, theirs) == [False, False, True, True]
    assert row().session_id == digest(last)


def test_on_and_off_void_a_reset_token(auth: Auth, clock: Clock, user: User) -> None:
    mine = auth.create_session(EMAIL)
    seed, _ = auth.begin_totp(mine, PASSWORD)
    token = auth.get_reset_password_token(EMAIL)
    _, mine, _ = auth.confirm_totp(mine, code_now(seed, clock))
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    token = auth.get_reset_password_token(EMAIL)
    auth.remove_totp(mine, PASSWORD, code_now(seed, clock, 1))
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)


@pytest.mark.parametrize(("password", "code"), [("wrong", True), (PASSWORD, False), ("wrong", False)])
def test_a_factor_is_switched_off_only_with_password_and_code(
    auth: Auth, clock: Clock, factor: Factor, row: Callable[[], User], password: str, code: bool
) -> None:
    before = row()
    with pytest.raises(ReauthenticationFailed) as refusal:
        auth.remove_totp(factor.session_id, password, code_now(factor.seed, clock) if code else "000000")
    assert refusal.value.message == ("wrong password" if password == "wrong" else "wrong one-time code")
    assert row() == before
    assert live(auth, factor.session_id) == [True]
    # Nor was the code used up by a wrong password.
    auth.remove_totp(factor.session_id, PASSWORD, code_now(factor.seed, clock))


def test_a_confirmation_that_was_overtaken_changes_nothing(
    auth: Auth, clock: Clock, user: User, row: Callable[[], User], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = auth.create_session(EMAIL)
    seed, _ = auth.begin_totp(mine, PASSWORD)
    while_a_code_is_checked(monkeypatch, lambda: auth.log_out(mine))
    with pytest.raises(SessionRequired):
        auth.confirm_totp(mine, code_now(seed, clock))
    assert row().totp_since is None
    assert live(auth, auth.log_in(EMAIL, PASSWORD)[1]) == [True]


def test_a_seed_that_was_replaced_while_its_code_was_checked_does_not_come_into_force(
    auth: Auth, clock: Clock, user: User, db: DB, row: Callable[[], User], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = auth.create_session(EMAIL)
    seed, _ = auth.begin_totp(mine, PASSWORD)
    while_a_code_is_checked(monkeypatch, lambda: auth.begin_totp(mine, PASSWORD))
    with pytest.raises(SessionRequired):
        auth.confirm_totp(mine, code_now(seed, clock))
    assert row().totp_since is None


def test_a_removal_that_was_overtaken_changes_nothing(
    auth: Auth, clock: Clock, factor: Factor, row: Callable[[], User], monkeypatch: pytest.MonkeyPatch
) -> None:
    while_a_code_is_checked(monkeypatch, lambda: auth.log_out(factor.session_id))
    with pytest.raises(SessionRequired):
        auth.remove_totp(factor.session_id, PASSWORD, code_now(factor.seed, clock))
    assert row().totp_secret == factor.seed
    with pytest.raises(CodeRequired):
        auth.log_in(EMAIL, PASSWORD)


# A code at login


def while_a_code_is_checked(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Let something happen once, after a code was compared and before anything is made of it."""
    originals: dict[str, Callable[..., Any]] = {
        "matching_step": totp.matching_step,
        "recovery_hash": totp.recovery_hash,
    }

    def compared(name: str, *given: Any) -> Any:
        for each, original in originals.items():
            monkeypatch.setattr(totp, each, original)
        found = originals[name](*given)
        change()
        return found

    for name in originals:
        monkeypatch.setattr(totp, name, partial(compared, name))


@pytest.mark.parametrize("later", [-1, 0, 1])
def test_a_code_of_this_step_or_the_next_to_it_logs_in(auth: Auth, clock: Clock, factor: Factor, later: int) -> None:
    clock.advance(30)
    assert live(auth, auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock, later))[1]) == [True]


@pytest.mark.parametrize("later", [-2, 2])
def test_a_code_further_off_does_not(auth: Auth, clock: Clock, factor: Factor, later: int) -> None:
    clock.advance(60)
    with pytest.raises(LoginFailed, match=r"^wrong one-time code$") as refusal:
        auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock, later))
    assert refusal.value.user_id == 1
    assert live(auth, factor.session_id) == [True]


@pytest.mark.parametrize(
    "otp", ["0", "00000", "0000000", "１２３４５６", "\ud800", "\0", "a" * 2000, " ", "'"], ids=ascii
)
def test_an_odd_code_is_a_wrong_one(auth: Auth, factor: Factor, otp: str) -> None:
    with pytest.raises(LoginFailed, match=r"^wrong one-time code$"):
        auth.log_in(EMAIL, PASSWORD, otp)


def test_a_code_works_once(auth: Auth, clock: Clock, factor: Factor) -> None:
    code = code_now(factor.seed, clock)
    mine = auth.log_in(EMAIL, PASSWORD, code)[1]
    for _ in range(2):
        with pytest.raises(LoginFailed, match=r"^wrong one-time code$"):
            auth.log_in(EMAIL, PASSWORD, code)
        with pytest.raises(ReauthenticationFailed, match=r"^wrong one-time code$"):
            auth.remove_totp(mine, PASSWORD, code)
        clock.advance(30)
    assert live(auth, mine) == [True]


def test_the_code_that_confirmed_does_not_log_in(auth: Auth, clock: Clock, user: User) -> None:
    mine = auth.create_session(EMAIL)
    seed, _ = auth.begin_totp(mine, PASSWORD)
    code = code_now(seed, clock)
    auth.confirm_totp(mine, code)
    with pytest.raises(LoginFailed, match=r"^wrong one-time code$"):
        auth.log_in(EMAIL, PASSWORD, code)
    assert live(auth, auth.log_in(EMAIL, PASSWORD, code_now(seed, clock, 1))[1]) == [True]


def test_after_a_code_no_earlier_one_works(auth: Auth, clock: Clock, factor: Factor) -> None:
    clock.advance(60)
    auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock, 1))
    for later in (-1, 0, 1):
        with pytest.raises(LoginFailed):
            auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock, later))
    clock.advance(30)
    auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock, 1))


@pytest.mark.parametrize("seconds", [DAY, -DAY, 301, -331])
def test_after_a_jump_of_the_clock_a_code_works_again_and_once(
    auth: Auth, clock: Clock, factor: Factor, seconds: int
) -> None:
    auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock))
    clock.advance(seconds)
    code = code_now(factor.seed, clock)
    auth.log_in(EMAIL, PASSWORD, code)
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, PASSWORD, code)


def test_a_clock_that_was_a_day_ahead_shuts_nobody_out(auth: Auth, clock: Clock, factor: Factor) -> None:
    clock.advance(DAY)
    auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock))
    clock.advance(-DAY)
    code = code_now(factor.seed, clock)
    auth.log_in(EMAIL, PASSWORD, code)
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, PASSWORD, code)


@pytest.mark.parametrize("seconds", [30, 60, 300])
def test_a_clock_that_was_set_back_a_little_lets_no_code_in_twice(
    auth: Auth, clock: Clock, factor: Factor, seconds: int
) -> None:
    clock.advance(600)
    used = code_now(factor.seed, clock, -1)
    auth.log_in(EMAIL, PASSWORD, used)
    auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock))
    clock.advance(-seconds)
    for code in (used, code_now(factor.seed, clock)):
        with pytest.raises(LoginFailed):
            auth.log_in(EMAIL, PASSWORD, code)


def test_a_wrong_password_with_the_right_code_is_a_wrong_password(
    auth: Auth, clock: Clock, factor: Factor, row: Callable[[], User]
) -> None:
    code, said = code_now(factor.seed, clock), set()
    for email, otp in ((EMAIL, code), (EMAIL, ""), (EMAIL, "000000"), (EMAIL, factor.recovery[0]), (OTHER, code)):
        with pytest.raises(LoginFailed) as refusal:
            auth.log_in(email, "wrong", otp)
        said.add((type(refusal.value), str(refusal.value), refusal.value.message))
    assert said == {(LoginFailed, "wrong email or password", "wrong email or password")}
    # Nor was a code used up.
    auth.log_in(EMAIL, PASSWORD, code)
    auth.log_in(EMAIL, PASSWORD, factor.recovery[0])


def test_a_code_is_good_for_its_own_user(auth: Auth, clock: Clock, other: User) -> None:
    mine, theirs = switch_on(auth, clock), switch_on(auth, clock, OTHER)
    for code in (code_now(theirs.seed, clock), theirs.recovery[0]):
        with pytest.raises(LoginFailed):
            auth.log_in(EMAIL, PASSWORD, code)
    auth.log_in(OTHER, PASSWORD, theirs.recovery[0])
    auth.log_in(OTHER, PASSWORD, code_now(theirs.seed, clock))
    auth.log_in(EMAIL, PASSWORD, code_now(mine.seed, clock))


@pytest.mark.parametrize("kind", ["code", "recovery code"])
def test_of_8_threads_with_one_code_one_gets_in(three: Auth, clock: Clock, user: User, kind: str) -> None:
    factor = switch_on(three, clock)
    otp = code_now(factor.seed, clock) if kind == "code" else factor.recovery[0]
    results = at_once(8, lambda: three.log_in(EMAIL, PASSWORD, otp)[1])
    assert sorted(type(result).__name__ for result in results) == ["LoginFailed"] * 7 + ["str"]


def test_of_8_confirmations_at_once_one_succeeds(
    auth: Auth, clock: Clock, user: User, sql: Callable[[str], list[Any]]
) -> None:
    mine = auth.create_session(EMAIL)
    code = code_now(auth.begin_totp(mine, PASSWORD)[0], clock)
    results = at_once(8, lambda: auth.confirm_totp(mine, code))
    assert sum(isinstance(result, tuple) for result in results) == 1
    assert {type(result) for result in results} <= {tuple, SessionRequired, SecondFactorRejected}
    assert sql("SELECT count(*) FROM recovery_codes") == [(10,)]


def test_a_factor_switched_on_while_the_password_was_compared_is_asked_for(
    auth: Auth, clock: Clock, user: User, sql: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = auth.create_session(EMAIL)
    seed, _ = auth.begin_totp(mine, PASSWORD)
    after_the_comparison(monkeypatch, lambda: auth.confirm_totp(mine, code_now(seed, clock)))
    with pytest.raises(CodeRequired):
        auth.log_in(EMAIL, PASSWORD)
    assert sql("SELECT count(*) FROM sessions") == [(1,)]


def test_a_factor_replaced_while_a_code_was_checked_asks_for_one_of_its_own(
    auth: Auth, clock: Clock, factor: Factor, db: DB, sql: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced() -> None:
        db.remove_totp(1)
        switch_on(auth, clock)
        db.end_sessions(1)

    while_a_code_is_checked(monkeypatch, replaced)
    with pytest.raises(LoginFailed, match=r"^wrong one-time code$"):
        auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock, 1))  # of a step that the new one has not used
    assert sql("SELECT * FROM sessions") == []


@pytest.mark.parametrize("kind", ["code", "recovery code"])
def test_a_password_changed_while_a_code_was_checked_starts_no_session(
    auth: Auth,
    clock: Clock,
    factor: Factor,
    sql: Callable[[str], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    token = auth.get_reset_password_token(EMAIL)
    while_a_code_is_checked(monkeypatch, lambda: auth.update_password(token, NEW_PASSWORD))
    with pytest.raises(LoginFailed, match=r"^wrong email or password$"):
        auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock) if kind == "code" else factor.recovery[0])
    assert sql("SELECT * FROM sessions") == []


def test_a_password_hashed_anew_while_a_code_was_checked_asks_for_no_other(
    auth: Auth, clock: Clock, factor: Factor, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = _hash_password(PASSWORD, COST)
    while_a_code_is_checked(monkeypatch, lambda: db.update_user(1, hashed_password=hashed))
    assert live(auth, auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock))[1]) == [True]


# A second factor and a reset


def test_a_second_factor_survives_a_reset_of_the_password(
    auth: Auth, clock: Clock, factor: Factor, row: Callable[[], User]
) -> None:
    auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert row().totp_secret == factor.seed
    assert live(auth, factor.session_id) == [False]
    with pytest.raises(CodeRequired):
        auth.log_in(EMAIL, NEW_PASSWORD)
    with pytest.raises(LoginFailed):
        auth.log_in(EMAIL, NEW_PASSWORD, "000000")
    auth.log_in(EMAIL, NEW_PASSWORD, code_now(factor.seed, clock))
    auth.log_in(EMAIL, NEW_PASSWORD, factor.recovery[0])


def test_a_second_factor_survives_a_change_of_the_password(auth: Auth, clock: Clock, factor: Factor) -> None:
    auth.change_password(factor.session_id, PASSWORD, NEW_PASSWORD)
    with pytest.raises(CodeRequired):
        auth.log_in(EMAIL, NEW_PASSWORD)
    auth.log_in(EMAIL, NEW_PASSWORD, factor.recovery[0])


# Recovery codes


def test_each_recovery_code_logs_in_once_and_there_are_ten(
    auth: Auth, clock: Clock, factor: Factor, sql: Callable[[str], list[Any]]
) -> None:
    for spent in range(10):
        typed = factor.recovery[spent].upper().replace("-", " ")
        assert live(auth, auth.log_in(EMAIL, PASSWORD, typed)[1]) == [True]
        assert sql("SELECT count(*) FROM recovery_codes") == [(9 - spent,)]
    for code in factor.recovery:
        with pytest.raises(LoginFailed, match=r"^wrong one-time code$"):
            auth.log_in(EMAIL, PASSWORD, code)
    auth.log_in(EMAIL, PASSWORD, code_now(factor.seed, clock))


def test_a_recovery_code_switches_the_factor_off(auth: Auth, clock: Clock, factor: Factor) -> None:
    auth.remove_totp(factor.session_id, PASSWORD, factor.recovery[0])
    assert live(auth, auth.log_in(EMAIL, PASSWORD)[1]) == [True]


def test_a_recovery_code_does_not_confirm_a_factor(auth: Auth, clock: Clock, factor: Factor) -> None:
    _, mine = auth.remove_totp(factor.session_id, PASSWORD, factor.recovery[0])
    auth.begin_totp(mine, PASSWORD)
    with pytest.raises(ReauthenticationFailed):
        auth.confirm_totp(mine, factor.recovery[1])


def test_recovery_codes_end_with_their_factor(
    auth: Auth, clock: Clock, factor: Factor, sql: Callable[[str], list[Any]]
) -> None:
    auth.remove_totp(factor.session_id, PASSWORD, code_now(factor.seed, clock))
    assert sql("SELECT * FROM recovery_codes") == []
    again = switch_on(auth, clock)
    assert sql("SELECT count(*) FROM recovery_codes") == [(10,)]
    for code in (factor.recovery[0], code_now(factor.seed, clock)):
        with pytest.raises(LoginFailed):
            auth.log_in(EMAIL, PASSWORD, code)
    auth.log_in(EMAIL, PASSWORD, again.recovery[0])


@pytest.mark.sqlite
def test_the_files_hold_no_recovery_code(auth: Auth, factor: Factor, tmp_path: Path) -> None:
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for code in factor.recovery:
        assert totp.recovery_hash(code).encode() in stored
        assert code.encode() not in stored
        assert code.replace("-", "").encode() not in stored


def test_no_secret_is_in_what_a_user_prints_as(auth: Auth, factor: Factor, row: Callable[[], User]) -> None:
    assert factor.seed not in repr(row())


# A second factor that is required


@pytest.fixture
def strict(db: DB, settings: Settings, clock: Clock, user: User) -> Auth:
    """The rules where everybody must have a second factor."""
    return Auth(db, replace(settings, require_totp=True), clock)


@pytest.mark.parametrize(
    "act",
    [
        *SEE_OR_END,
        *(CHANGES[number] for number in (0, 1, 4)),
        lambda auth, held: auth.identify(held),
    ],
)
def test_without_a_required_factor_a_session_is_good_for_nothing_else(
    strict: Auth, row: Callable[[], User], act: Callable[[Auth, str | None], object]
) -> None:
    mine = strict.log_in(EMAIL, PASSWORD)[1]
    before = row()
    with pytest.raises(SecondFactorRequired, match=r"^set up a second factor first$"):
        act(strict, mine)
    assert row() == before
    assert strict.get_user_from_session_id(mine) is None
    assert strict.identify(mine, enrolling=True).email == EMAIL


def test_without_a_required_factor_a_session_can_be_ended(strict: Auth, sql: Callable[[str], list[Any]]) -> None:
    strict.log_out(strict.log_in(EMAIL, PASSWORD)[1])
    assert sql("SELECT * FROM sessions") == []


def test_a_required_factor_opens_the_session_that_set_it_up(strict: Auth, clock: Clock) -> None:
    mine = strict.log_in(EMAIL, PASSWORD)[1]
    seed, _ = strict.begin_totp(mine, PASSWORD)
    assert live(strict, mine) == [False]  # begun is not enough
    _, mine, _ = strict.confirm_totp(mine, code_now(seed, clock))
    assert live(strict, mine) == [True]
    clock.advance(30)
    assert live(strict, strict.log_in(EMAIL, PASSWORD, code_now(seed, clock))[1]) == [True]


def test_a_required_factor_that_was_switched_off_shuts_the_session_again(strict: Auth, clock: Clock) -> None:
    factor = switch_on(strict, clock)
    _, mine = strict.remove_totp(factor.session_id, PASSWORD, code_now(factor.seed, clock))
    assert live(strict, mine) == [False]
    strict.begin_totp(mine, PASSWORD)


# What is over


def test_pruning_deletes_what_is_over_and_nothing_else(
    three: Auth, user: User, other: User, clock: Clock, row: Callable[[], User], sql: Callable[[str], list[Any]]
) -> None:
    with pytest.raises(LoginFailed):
        three.log_in("nobody@example.com", "wrong", address=AWAY)
    three.log_in(OTHER, PASSWORD, address=HOME)
    three.log_in(EMAIL, PASSWORD, address=HOME)
    clock.advance(MONTH - 1)
    assert three.prune() is False
    assert sql("SELECT count(*) FROM sessions") == [(2,)]
    mine = three.create_session(EMAIL)
    clock.advance(1)
    assert three.prune() is False
    assert sql("SELECT session_hash FROM sessions") == [(digest(mine),)]
    assert row().session_id == digest(mine)
    assert sql("SELECT session_id FROM users WHERE id = 2") == [(None,)]
    assert sql("SELECT * FROM throttle") == []
    assert sql("SELECT count(*) FROM known_addresses") == [(2,)]
    clock.advance(2 * MONTH - 1)
    three.prune()
    assert sql("SELECT count(*) FROM known_addresses") == [(2,)]
    clock.advance(1)
    three.prune()
    assert sql("SELECT * FROM known_addresses") == []
    assert live(three, mine) == [False]


def test_pruning_takes_200_of_a_kind_and_says_whether_there_may_be_more(
    auth: Auth, db: DB, user: User, clock: Clock, sql: Callable[[str], list[Any]]
) -> None:
    with db._transaction() as writer:
        writer.executemany(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            VALUES (:hash, 1, 0, 0, :now, '', '')
            """,
            [{"hash": str(number), "now": int(clock())} for number in range(450)],
        )
    counts = [(auth.prune(), sql("SELECT count(*) FROM sessions")[0][0]) for _ in range(4)]
    assert counts == [(True, 250), (True, 50), (False, 0), (False, 0)]
