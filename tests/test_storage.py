"""The vault: what a row is, who finds it, what a transaction holds, and which files are refused."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any, TypeVar

import bcrypt
import pytest

import database
from database import AlreadyExists, DatabaseRefused, StorageUnavailable
from storage import DB, InvalidRequestError, NoResultFound, Session, Store, User, open_store
from tests.conftest import COST, HERE, clean_environ

T = TypeVar("T")

NOW = 1_800_000_000
HASH = b"$2b$04$" + b"." * 53
NEW_HASH = b"$2b$04$" + b"/" * 53
NOBODY = 65534

# No attribute of a user. SQLite would know the columns and take '"nosuch"' for a string.
NO_ATTRIBUTES = [
    *("rowid", "_rowid_", "oid", "EMAIL", "Email", "email_key", "reset_expires_at", "users.email", "__class__"),
    *("", "nosuch", "self", '"nosuch"', "1=1 OR email", "email = :email --", "email=email,id"),
]


@pytest.fixture
def path(settings: Any) -> Path:
    return Path(settings.database)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement of the connections opened from here on; asked for before ``db``."""
    ran: list[str] = []
    _trace(monkeypatch, ran.append)
    return ran


KEPT = User(1, "bob@x.io", HASH, "123")


@pytest.fixture
def kept(db: Store) -> Store:
    """A store with one user."""
    db.add_user(KEPT.email, HASH)
    db.update_user(1, session_id="123")
    assert db.find_user_by(id=1) == KEPT
    return db


@pytest.fixture
def kept_ran(kept: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that it runs from here on."""
    ran: list[str] = []
    for door in "_read", "_read_all", "_write", "_transaction":
        monkeypatch.setattr(kept, door, lambda *_, **__: ran.append("statement"))
    return ran


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for another process ends soon; asked for before ``db``."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.02)


@pytest.fixture
def bob(db: Store) -> User:
    return db.add_user("bob@x.io", HASH)


@pytest.fixture
def eve(bob: User, db: Store) -> User:
    return db.add_user("eve@x.io", HASH)


def _trace(monkeypatch: pytest.MonkeyPatch, callback: Callable[[str], object]) -> None:
    connect = sqlite3.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, **options)
        connection.set_trace_callback(callback)
        return connection

    monkeypatch.setattr(sqlite3, "connect", traced)


def at_once(number: int, task: Callable[[int], T]) -> list[T]:
    """Run the task with 0, 1, … on as many threads, which start together."""
    barrier = threading.Barrier(number)

    def run(index: int) -> T:
        barrier.wait()
        return task(index)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(run, range(number)))


def rows(connection: Any, statement: str = "SELECT * FROM users") -> list[Any]:
    found: list[Any] = connection.execute(statement).fetchall()
    return found


def in_order(connection: Any, table: str) -> list[Any]:
    return sorted(rows(connection, f"SELECT * FROM {table}"), key=lambda row: row[:2])


def add_session(
    db: Store,
    user: User,
    session_hash: str,
    *,
    now: int = NOW,
    expires_at: int = NOW + 1000,
    replaced: str | None = None,
    idle_since: int = NOW - 100,
    most: int = 5,
) -> bool:
    session = Session(session_hash, now, now, expires_at, "127.0.0.1", "curl")
    return db.add_session(user, session, replaced=replaced, idle_since=idle_since, most=most)


def find_session(db: Store, session_hash: str, now: int = NOW) -> User | None:
    found = db.find_session(session_hash, now=now, idle_since=now - 100, latest=now + 300)
    return found[0] if found else None


def live_sessions(db: Store, *session_hashes: str) -> list[str]:
    return [session_hash for session_hash in session_hashes if find_session(db, session_hash)]


def give_token(db: Store, email: str = "bob@x.io") -> None:
    assert set_reset(db, db.find_user_by(email=email).id, "token")


def set_reset(db: Store, user_id: int, token_hash: str, unless_since: int = NOW) -> bool:
    return db.set_reset_token(user_id, token_hash, now=NOW, expires_at=NOW + 600, unless_since=unless_since)


def spend(db: Store, token_hash: str = "token", now: int = NOW, new: bytes = NEW_HASH) -> bool:
    return db.spend_reset(token_hash, new, now=now, latest=now + 300)


TABLES = "users", "sessions", "recovery_codes", "known_addresses", "throttle", "throttle_secret"


def everything(connection: Any) -> dict[str, list[Any]]:
    return {table: in_order(connection, table) for table in TABLES}


def plant(db: Store, user_id: int, secret: str = "SEED") -> bool:
    """Set a seed from the user's newest session."""
    user = db.find_user_by(id=user_id)
    return db.set_totp(user, secret, user.session_id or "")


def second_factor(db: Store, user: User, session_hash: str, renewed: str, *codes: str, now: int = NOW) -> bool:
    assert plant(db, user.id)
    seeded = db.find_user_by(id=user.id)
    return db.confirm_totp(seeded, 1000, codes, now=now, session_hash=session_hash, renewed=renewed)


@pytest.fixture
def furnished(db: Store, eve: User, bob: User) -> None:
    """Both have all that a user can have; what is bob's is named after him."""
    for user, name in (bob, "bob"), (eve, "eve"):
        add_session(db, user, f"{name}0")
        assert second_factor(db, user, f"{name}0", f"{name}1", f"{name} code", f"{name} spare")
        assert add_session(db, db.find_user_by(id=user.id), f"{name}2")
        assert set_reset(db, user.id, f"{name} token")
        db.remember_address(user.id, f"{name} address", NOW, 10)
    db.take([("bucket", 1, 60)], NOW)
    db.throttle_secret(b"secret")


SESSIONS = [f"{name}{number}" for name in ("bob", "eve") for number in (1, 2)]
HERS = SESSIONS[2:]


# What a user is


@pytest.mark.sqlite
def test_the_table_of_users_has_its_columns(other: Any) -> None:
    columns = {
        name: (kind, bool(required), bool(key))
        for _, name, kind, required, _, key in rows(other, "PRAGMA table_info(users)")
    }
    assert columns["id"] == ("INTEGER", False, True)
    assert [columns[name][1] for name in ("email", "hashed_password")] == [True, True]
    assert [columns[name][1] for name in ("session_id", "reset_token")] == [False, False]


def test_a_new_user_has_neither_session_nor_token(db: Store) -> None:
    user = db.add_user("bob@x.io", HASH)
    assert user == User(id=1, email="bob@x.io", hashed_password=HASH, session_id=None, reset_token=None)
    assert db.find_user_by(id=1) == user


def test_a_user_is_a_snapshot(bob: User) -> None:
    with pytest.raises(FrozenInstanceError):
        bob.email = "eve@x.io"  # type: ignore[misc]


def test_a_user_shows_no_secrets() -> None:
    assert repr(User(1, "bob@x.io", HASH, "session", "token")) == (
        "User(id=1, email='bob@x.io', created_at=None, disabled_at=None, totp_since=None)"
    )


def test_the_errors_of_a_search_are_unrelated() -> None:
    assert not issubclass(NoResultFound, InvalidRequestError)
    assert not issubclass(InvalidRequestError, NoResultFound)
    assert {NoResultFound.__module__, InvalidRequestError.__module__} == {"storage"}


# Where the file is


def test_without_a_path_the_settings_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "named.db"))
    with closing(DB()) as db:
        db.add_user("bob@x.io", HASH)
    assert (tmp_path / "named.db").is_file()


def test_without_any_setting_it_is_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    DB().close()
    assert (tmp_path / "authsvc.db").is_file()


def test_an_explicit_path_goes_before_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "unused.db"))
    DB(tmp_path / "explicit.db").close()
    assert {file.name for file in tmp_path.iterdir()} >= {"explicit.db"}
    assert not (tmp_path / "unused.db").exists()


def test_a_relative_path_outlives_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(DB("relative.db")) as db:
        db.add_user("bob@x.io", HASH)
        monkeypatch.chdir("/")
        assert db.find_user_by(id=1).email == "bob@x.io"  # the first read: its connection is opened only now


@pytest.mark.sqlite
def test_reopening_a_file_keeps_its_rows(path: Path) -> None:
    with closing(DB(path)) as db:
        bob = db.add_user("bob@x.io", HASH)
    with closing(DB(path)) as db:
        assert db.find_user_by(email="bob@x.io") == bob
        assert db.add_user("eve@x.io", HASH).id == 2


# Adding


def test_an_added_user_is_committed(db: Store, other: Any) -> None:
    db.add_user("bob@x.io", HASH)
    assert rows(other, "SELECT id, email FROM users") == [(1, "bob@x.io")]


@pytest.mark.parametrize("kind", [str, bytes])
def test_a_hash_is_read_back_as_it_was_given(db: Store, kind: type) -> None:
    hashed = bcrypt.hashpw(b"b4l0u", bcrypt.gensalt(COST))
    db.add_user("bob@x.io", hashed if kind is bytes else hashed.decode())
    found = db.find_user_by(email="bob@x.io").hashed_password
    assert type(found) is kind
    assert bcrypt.checkpw(b"b4l0u", found if isinstance(found, bytes) else found.encode())


@pytest.mark.parametrize(
    ("first", "second"),
    [("bob@x.io", "BOB@X.IO"), ("é@x.io", "É@x.io"), ("ЖУК@x.io", "жук@X.io"), ("straße@x", "STRASSE@X")],
)
def test_an_email_has_one_account_in_any_letter_case(db: Store, first: str, second: str) -> None:
    user = db.add_user(first, HASH)
    with pytest.raises(AlreadyExists):
        db.add_user(second, NEW_HASH)
    assert user == db.find_user_by(email=first) == db.find_user_by(email=second) == User(1, first, HASH)


# What the columns of a user cannot hold.
UNUSABLE: dict[str, tuple[Any, ...]] = {
    "email": (None, 5, b"bytes", "\ud800", ["list"]),
    "hashed_password": (None, 5, 1.5, "\ud800", [HASH]),
    "session_id": (b"bytes", "\ud800", ["list"]),
    "reset_token": (2**63, {}),
}


@pytest.mark.parametrize("name", ["email", "hashed_password"])
def test_a_user_of_unusable_values_is_not_added(kept: Store, name: str) -> None:
    for value in UNUSABLE[name]:
        with pytest.raises(ValueError, match=r".+"):
            kept.add_user(**{"email": "eve@x.io", "hashed_password": HASH, name: value})
    with pytest.raises(NoResultFound):
        kept.find_user_by(id=2)


def test_the_id_of_a_deleted_user_is_never_given_again(db: Store, eve: User, other: Any) -> None:
    other.execute("DELETE FROM users WHERE id = 2")
    assert db.add_user("carol@x.io", HASH).id == 3


def test_of_many_threads_with_one_email_one_adds_it(db: Store, other: Any) -> None:
    def add(index: int) -> bool:
        try:
            return bool(db.add_user("Bob@x.io" if index % 2 else "bob@X.io", HASH))
        except AlreadyExists:
            return False

    assert sum(at_once(8, add)) == 1
    assert len(rows(other)) == 1


def test_many_threads_read_and_write(db: Store) -> None:
    def add_and_find(index: int) -> bool:
        user = db.add_user(f"user{index}@x.io", HASH)
        db.update_user(user.id, session_id=f"session{index}")
        return db.find_user_by(email=user.email) == db.find_user_by(session_id=f"session{index}")

    assert all(at_once(12, add_and_find))
    assert [db.find_user_by(id=number).id for number in range(1, 13)] == list(range(1, 13))


def test_a_new_user_has_the_moment_of_registering(db: Store) -> None:
    assert db.add_user("bob@x.io", HASH, NOW).created_at == NOW
    assert db.find_user_by(id=1) == User(1, "bob@x.io", HASH, created_at=NOW)


def stage(db: Store, *users: User) -> list[int]:
    return db.stage_users(enumerate(users))


def test_users_are_added_together_with_all_but_their_sessions_and_tokens(db: Store) -> None:
    brought = User(7, "Bob@x.io", HASH, "s", "t", NOW, NOW + 1, "SEED", NOW + 2)
    assert stage(db, brought, User(7, "eve@x.io", HASH.decode())) == []
    assert list(db.each_user()) == []
    assert db.add_staged_users() == 2
    assert db.find_user_by(email="bob@x.io") == replace(brought, id=1, session_id=None, reset_token=None)
    assert db.find_user_by(email="eve@x.io") == User(2, "eve@x.io", HASH.decode())


def test_every_email_that_is_taken_is_named(db: Store, bob: User) -> None:
    emails = ["é@x.io", "BOB@x.io", "É@X.IO", "eve@x.io", "é@X.io", "bob@x.io"]
    assert stage(db, *(User(0, email, NEW_HASH) for email in emails)) == [1, 2, 4, 5]
    assert list(db.each_user()) == [bob]


def test_an_email_that_was_taken_since_stops_all(db: Store) -> None:
    assert stage(db, User(0, "bob@x.io", HASH), User(0, "eve@x.io", HASH)) == []
    db.add_user("EVE@x.io", HASH)
    with pytest.raises(AlreadyExists):
        db.add_staged_users()
    assert [user.email for user in db.each_user()] == ["EVE@x.io"]


def test_nobody_waits_for_users_that_come_slowly(impatient: None, db: Store, place: str) -> None:
    def coming() -> Iterator[tuple[int, User]]:
        yield 1, User(0, "bob@x.io", HASH)
        with closing(open_store(place)) as beside:
            beside.add_user("eve@x.io", HASH)
        yield 2, User(0, "carol@x.io", HASH)

    assert db.stage_users(coming()) == []
    assert db.add_staged_users() == 2
    assert [user.email for user in db.each_user()] == ["eve@x.io", "bob@x.io", "carol@x.io"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_where_the_coming_fails_nobody_is_added(db: Store, error: type[BaseException]) -> None:
    def coming() -> Iterator[tuple[int, User]]:
        yield 1, User(0, "bob@x.io", HASH)
        raise error

    with pytest.raises(error):
        db.stage_users(coming())
    assert db.add_user("bob@x.io", HASH).id == 1
    assert stage(db, User(0, "eve@x.io", HASH)) == []
    assert db.add_staged_users() == 1


@pytest.mark.parametrize("unfit", [User(0, "eve\ud800", HASH), User(0, "eve@x.io", 5)])  # type: ignore[arg-type]
def test_one_unfit_user_stops_all_that_are_added_together(db: Store, unfit: User) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        stage(db, User(0, "bob@x.io", HASH), unfit)
    assert list(db.each_user()) == []


# Finding


def test_all_users_are_listed_in_the_order_of_their_ids(db: Store, eve: User, bob: User) -> None:
    carol = db.add_user("a@x.io", HASH)
    assert list(db.each_user()) == [bob, eve, carol]
    db.delete_user(2)
    assert list(db.each_user()) == [bob, carol]


def test_the_list_of_users_is_of_one_moment(db: Store, eve: User, bob: User) -> None:
    listed = db.each_user()
    first = next(listed)
    db.add_user("carol@x.io", HASH)
    db.update_user(2, email="changed@x.io")
    assert [first, *listed] == [bob, eve]
    assert [user.email for user in db.each_user()] == ["bob@x.io", "changed@x.io", "carol@x.io"]


def test_all_that_is_named_must_match(db: Store, eve: User) -> None:
    assert db.find_user_by(id=2, email="eve@x.io", hashed_password=HASH) == eve
    with pytest.raises(NoResultFound):
        db.find_user_by(id=1, email="eve@x.io")


@pytest.mark.parametrize("name", ["session_id", "reset_token", "hashed_password"])
def test_the_lowest_id_is_found_first(db: Store, eve: User, name: str) -> None:
    db.update_user(2, **{name: "same"})
    db.update_user(1, **{name: "same"})
    assert db.find_user_by(**{name: "same"}).id == 1


def test_a_search_by_nothing_is_invalid(db: Store, bob: User) -> None:
    with pytest.raises(InvalidRequestError):
        db.find_user_by()


@pytest.mark.parametrize("name", NO_ATTRIBUTES)
def test_a_search_by_an_unknown_name_is_invalid_and_runs_no_sql(kept: Store, kept_ran: list[str], name: str) -> None:
    kept_ran.clear()
    for sought in {name: "x"}, {"email": "bob@x.io", name: "x"}, {name: None}:
        with pytest.raises(InvalidRequestError):
            kept.find_user_by(**sought)
    assert kept_ran == []


def test_a_search_by_an_unknown_name_is_invalid_on_an_empty_table(db: Store) -> None:
    for name in NO_ATTRIBUTES:
        with pytest.raises(InvalidRequestError):
            db.find_user_by(**{name: "x"})


@pytest.mark.parametrize("name", ["id", "email", "hashed_password", "session_id", "reset_token"])
def test_none_matches_nobody(kept: Store, name: str) -> None:
    for sought in {name: None}, {"id": 1, name: None}:
        with pytest.raises(NoResultFound):
            kept.find_user_by(**sought)


ODD: dict[str, tuple[Any, ...]] = {
    "id": (0, 2, "1", 1.0, True, 2**63, -(2**63) - 1, [1]),
    "email": ("", "%", "' OR 1=1 --", "bob@x.io\0", "\ud800", b"bob@x.io", ["bob@x.io"], {"bob@x.io": 1}, object()),
    "hashed_password": (5, "\ud800", [HASH]),
    "session_id": (123, b"123", 123.0),
    "reset_token": (2**63, "\udfff"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in ODD.items() for value in values])
def test_an_odd_value_matches_nobody(kept: Store, name: str, value: Any) -> None:
    with pytest.raises(NoResultFound):
        kept.find_user_by(**{name: value})


# Changing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("email", "Robert@x.io"),
        ("email", "BOB@X.io"),
        ("hashed_password", NEW_HASH),
        ("hashed_password", NEW_HASH.decode()),
        ("session_id", "new"),
        ("reset_token", "new"),
    ],
)
def test_a_change_is_committed_and_of_that_row_only(db: Store, eve: User, other: Any, name: str, value: Any) -> None:
    db.update_user(1, **{name: value})
    assert rows(other, f"SELECT {name} FROM users ORDER BY id") == [(value,), (getattr(eve, name),)]
    assert db.find_user_by(**{name: value}).id == 1


def test_several_attributes_change_together(db: Store, bob: User) -> None:
    db.update_user(1, session_id="s", reset_token="t", hashed_password=NEW_HASH)
    assert db.find_user_by(id=1) == User(1, "bob@x.io", NEW_HASH, "s", "t")


@pytest.mark.parametrize("name", ["session_id", "reset_token"])
def test_none_stores_null(db: Store, bob: User, other: Any, name: str) -> None:
    db.update_user(1, **{name: "value"})
    db.update_user(1, **{name: None})
    assert rows(other, f"SELECT {name} FROM users") == [(None,)]
    assert db.find_user_by(id=1) == bob


def test_a_changed_email_is_found_and_frees_the_former(db: Store, bob: User) -> None:
    db.update_user(1, email="Éve@x.io")
    assert db.find_user_by(email="éVE@x.io").email == "Éve@x.io"
    assert db.add_user("bob@x.io", HASH).id == 2


def test_an_email_does_not_become_another_accounts(db: Store, eve: User) -> None:
    with pytest.raises(AlreadyExists):
        db.update_user(2, email="BOB@x.io", session_id="new")
    assert db.find_user_by(id=2) == eve


@pytest.mark.parametrize("name", [*NO_ATTRIBUTES, "id"])
def test_a_change_of_an_unknown_attribute_is_refused_and_runs_no_sql(
    kept: Store, kept_ran: list[str], name: str
) -> None:
    kept_ran.clear()
    for changed in {name: "x"}, {"session_id": "x", name: "x"}:
        for user_id in (1, 2):
            with pytest.raises(ValueError, match="a user has"):
                kept.update_user(user_id, **changed)
    assert kept_ran == []


@pytest.mark.parametrize("user_id", [0, 2, -1, "1", 1.0, True, None, [1], "1 OR 1=1", 2**63])
def test_a_change_of_an_unknown_user_is_refused(kept: Store, user_id: Any) -> None:
    for changed in {"session_id": "x"}, {}:
        with pytest.raises(NoResultFound):
            kept.update_user(user_id, **changed)
    assert kept.find_user_by(id=1) == KEPT


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in UNUSABLE.items() for value in values])
def test_a_value_that_the_column_cannot_hold_is_refused(kept: Store, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        kept.update_user(1, **{"session_id": "x", name: value})
    assert kept.find_user_by(email="bob@x.io") == KEPT


def test_a_hash_is_replaced_only_while_it_is_the_current_one(db: Store, eve: User) -> None:
    db.replace_hash(1, NEW_HASH, b"lost")
    assert db.find_user_by(id=1).hashed_password == HASH
    db.replace_hash(1, HASH, NEW_HASH)
    assert [db.find_user_by(id=number).hashed_password for number in (1, 2)] == [NEW_HASH, HASH]


def test_a_changed_password_leaves_one_session_under_a_new_hash(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    assert db.change_password(1, HASH, NEW_HASH, "bob1", "renewed")
    after, bob = everything(other), db.find_user_by(id=1)
    assert (bob.hashed_password, bob.session_id, bob.reset_token) == (NEW_HASH, "renewed", None)
    assert live_sessions(db, "renewed", *SESSIONS) == ["renewed", *HERS]
    assert rows(other, "SELECT reset_expires_at, reset_created_at FROM users WHERE id = 1") == [(None, None)]
    (his,) = [row for row in before["sessions"] if "bob1" in row]
    assert tuple("renewed" if value == "bob1" else value for value in his) in after["sessions"]
    assert (bob.totp_secret, bob.totp_since) == ("SEED", NOW)
    assert after["users"][1] == before["users"][1]
    for table in "recovery_codes", "known_addresses", "throttle":
        assert after[table] == before[table]


PASSWORD_KEPT: dict[str, tuple[Any, ...]] = {
    "it has changed meanwhile": (1, NEW_HASH, b"third", "bob1", "renewed"),
    "the hash is of another type": (1, HASH.decode(), NEW_HASH, "bob1", "renewed"),
    "the session has ended": (1, HASH, NEW_HASH, "bob0", "renewed"),
    "the session is another user's": (1, HASH, NEW_HASH, "eve1", "renewed"),
    "there is no such user": (9, HASH, NEW_HASH, "bob1", "renewed"),
}


@pytest.mark.parametrize("reason", PASSWORD_KEPT)
def test_a_password_that_does_not_change_changes_nothing(furnished: None, db: Store, other: Any, reason: str) -> None:
    before = everything(other)
    assert not db.change_password(*PASSWORD_KEPT[reason])
    assert everything(other) == before


def test_of_eight_threads_that_change_one_password_one_does(furnished: None, db: Store) -> None:
    hashes = [b"hash%d" % index for index in range(8)]
    changed = at_once(8, lambda index: db.change_password(1, HASH, hashes[index], "bob1", f"renewed{index}"))
    assert sum(changed) == 1
    bob, winner = db.find_user_by(id=1), changed.index(True)
    assert (bob.hashed_password, bob.session_id) == (hashes[winner], f"renewed{winner}")


def test_a_disabled_user_has_no_session_and_no_token(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    db.disable_user(1, NOW)
    bob = db.find_user_by(id=1)
    assert (bob.disabled_at, bob.session_id, bob.reset_token) == (NOW, None, None)
    assert live_sessions(db, *SESSIONS) == HERS
    assert not spend(db, "bob token")
    after = everything(other)
    assert after["users"][1] == before["users"][1]
    assert after["recovery_codes"] == before["recovery_codes"]


def test_a_disabled_user_is_not_let_in(db: Store, eve: User, bob: User) -> None:
    db.disable_user(1, NOW)
    give_token(db)  # as one may be asked for at the same moment
    for user in bob, db.find_user_by(id=1):
        assert not add_session(db, user, "s")
    assert not db.find_reset("token", now=NOW, latest=NOW + 300)
    assert not spend(db)
    assert db.find_user_by(id=1).hashed_password == HASH
    assert add_session(db, eve, "hers")


def test_an_enabled_user_is_let_in_again(furnished: None, db: Store) -> None:
    db.disable_user(1, NOW)
    db.enable_user(2)
    assert db.find_user_by(id=1).disabled_at == NOW
    db.enable_user(1)
    assert db.find_user_by(id=1).disabled_at is None
    assert live_sessions(db, *SESSIONS) == HERS
    assert add_session(db, db.find_user_by(id=1), "s")
    give_token(db)
    assert spend(db)


def test_a_user_is_disabled_since_the_first_time(db: Store, eve: User) -> None:
    for now in NOW, NOW + 60:
        db.disable_user(1, now)
    assert [db.find_user_by(id=number).disabled_at for number in (1, 2)] == [NOW, None]


def test_nobody_is_not_disabled(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    db.disable_user(9, NOW)
    db.enable_user(9)
    assert everything(other) == before


def test_with_a_user_all_goes_that_is_theirs(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    theirs = {"sessions": 2, "recovery_codes": 0, "known_addresses": 0}  # and where their user_id stands
    db.delete_user(1)
    after = everything(other)
    assert after["users"] == before["users"][1:]
    for table, column in theirs.items():
        assert {row[column] for row in before[table]} == {1, 2}
        assert after[table] == [row for row in before[table] if row[column] == 2]
    for table in "throttle", "throttle_secret":
        assert after[table] == before[table]


@pytest.mark.sqlite
def test_of_a_deleted_user_nothing_is_left_in_the_file(furnished: None, db: DB, path: Path) -> None:
    rows(db._writer, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert b"bob" in path.read_bytes()
    db.delete_user(1)
    rows(db._writer, "PRAGMA wal_checkpoint(TRUNCATE)")
    assert b"bob" not in path.read_bytes()
    assert b"eve" in path.read_bytes()


@pytest.mark.parametrize("kind", [str, bytes])
def test_a_user_is_deleted_with_the_present_password_and_once(db: Store, eve: User, kind: type) -> None:
    hashed = NEW_HASH if kind is bytes else NEW_HASH.decode()
    db.update_user(2, hashed_password=hashed)
    add_session(db, db.find_user_by(id=2), "s")
    her = db.find_user_by(id=2)
    assert [db.delete_verified_user(her, "s"), db.delete_verified_user(her, "s")] == [True, False]
    assert db.add_user("eve@x.io", HASH).id == 3


# Sessions


def test_the_user_of_a_session_is_found(db: Store, eve: User) -> None:
    assert add_session(db, eve, "s")
    user = db.find_user_by(id=2)
    assert user.session_id == "s"
    assert db.find_session("s", now=NOW, idle_since=NOW - 1, latest=NOW) == (user, NOW)


def test_a_session_does_not_start_when_the_password_has_changed(db: Store, bob: User) -> None:
    assert add_session(db, bob, "first")
    db.update_user(1, hashed_password=NEW_HASH)
    assert not add_session(db, bob, "second", replaced="first")
    assert live_sessions(db, "first", "second") == ["first"]
    assert db.find_user_by(id=1).session_id == "first"


def test_a_session_does_not_start_when_the_second_factor_has_changed(db: Store, bob: User) -> None:
    add_session(db, bob, "0")
    assert second_factor(db, bob, "0", "1")
    guarded = db.find_user_by(id=1)
    assert not add_session(db, bob, "2", replaced="1")
    assert add_session(db, guarded, "2")
    assert db.remove_totp(1)
    assert not add_session(db, guarded, "3")
    assert add_session(db, bob, "3")
    assert second_factor(db, bob, "3", "4", now=NOW + 1)
    assert not add_session(db, guarded, "5")  # neither does one after another second factor
    assert live_sessions(db, *"012345") == ["4"]


def test_nobody_has_no_session(db: Store, bob: User) -> None:
    assert not add_session(db, User(2, "eve@x.io", HASH), "s")


def test_a_new_session_ends_the_one_it_replaces(db: Store, eve: User, bob: User) -> None:
    for user, session_hash in (bob, "one"), (bob, "two"), (eve, "hers"):
        add_session(db, user, session_hash)
    add_session(db, bob, "three", replaced="one")
    assert live_sessions(db, "one", "two", "three", "hers") == ["two", "three", "hers"]


def test_a_replaced_session_of_another_user_leaves_them_their_newest(db: Store, eve: User, bob: User) -> None:
    for session_hash in "first", "second":
        add_session(db, bob, session_hash)
    add_session(db, eve, "hers", replaced="second")  # two people at one browser
    assert live_sessions(db, "first", "second", "hers") == ["first", "hers"]
    assert [db.find_user_by(id=number).session_id for number in (1, 2)] == ["first", "hers"]


def test_a_new_session_clears_away_the_users_dead_ones(db: Store, eve: User, bob: User, other: Any) -> None:
    add_session(db, bob, "expired", expires_at=NOW + 50)
    add_session(db, bob, "idle", now=NOW - 50)
    add_session(db, eve, "hers", expires_at=NOW + 50)
    add_session(db, bob, "used")
    add_session(db, bob, "new", now=NOW + 50, idle_since=NOW - 50)
    assert rows(other, "SELECT session_hash FROM sessions ORDER BY id") == [("hers",), ("used",), ("new",)]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_new_session_ends_the_oldest_beyond_the_most(db: Store, eve: User, bob: User, most: int) -> None:
    add_session(db, eve, "hers")
    names = ["1", "2", "3", "4"]
    for name in names:
        add_session(db, bob, name, most=most)
    assert live_sessions(db, *names, "hers") == [*names[-most:], "hers"]
    assert db.find_user_by(id=1).session_id == "4"


def test_the_dead_do_not_count_as_sessions(db: Store, bob: User) -> None:
    add_session(db, bob, "old")
    add_session(db, bob, "dead", expires_at=NOW)
    add_session(db, bob, "new", most=2)
    assert live_sessions(db, "old", "dead", "new") == ["old", "new"]


def test_the_row_of_the_user_names_the_newest_session_left(db: Store, bob: User) -> None:
    for name in "1", "2", "3":
        add_session(db, bob, name)
    named = []
    for name in "2", "3", "1":
        assert db.end_session(name)
        named.append(db.find_user_by(id=1).session_id)
    assert named == ["3", "1", None]


def test_an_ended_session_cannot_end_again(db: Store, eve: User, bob: User) -> None:
    add_session(db, bob, "his")
    add_session(db, eve, "hers")
    assert [db.end_session("his"), db.end_session("his"), db.end_session("never")] == [True, False, False]
    assert find_session(db, "hers") == db.find_user_by(id=2)


def test_all_sessions_of_one_user_end(db: Store, eve: User, bob: User) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "hers"):
        add_session(db, user, name)
    for user_id in (1, 1, 99):
        db.end_sessions(user_id)
    assert live_sessions(db, "1", "2", "hers") == ["hers"]
    assert [db.find_user_by(id=number).session_id for number in (1, 2)] == [None, "hers"]


@pytest.mark.parametrize(("kept", "left"), [("1", ["1"]), ("2", ["2"]), ("hers", []), ("ended", []), (None, [])])
def test_all_sessions_but_one_end(db: Store, eve: User, bob: User, kept: str | None, left: list[str]) -> None:
    for user, name in (bob, "1"), (bob, "2"), (bob, "3"), (eve, "hers"):
        add_session(db, user, name)
    assert db.end_sessions(1, kept=kept) == 3 - len(left)
    assert live_sessions(db, "1", "2", "3", "hers") == [*left, "hers"]
    assert [db.find_user_by(id=number).session_id for number in (1, 2)] == [left[0] if left else None, "hers"]


def test_everybodys_sessions_and_tokens_end(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    assert [db.end_all_sessions(), db.end_all_sessions()] == [4, 0]
    assert live_sessions(db, *SESSIONS) == []
    assert [spend(db, f"{name} token") for name in ("bob", "eve")] == [False, False]
    for column in "session_id", "reset_token", "reset_expires_at", "reset_created_at":
        assert rows(other, f"SELECT {column} FROM users") == [(None,)] * 2
    after = everything(other)
    assert {name for name in after if after[name] != before[name]} == {"users", "sessions"}
    kept = "SELECT id, email, hashed_password, totp_secret, totp_since, totp_step FROM users"
    assert rows(other, kept) == [
        (number, f"{name}@x.io", HASH, "SEED", NOW, 1000) for number, name in ((1, "bob"), (2, "eve"))
    ]


def test_the_live_sessions_of_a_user_are_listed_newest_first(db: Store, eve: User, bob: User) -> None:
    add_session(db, bob, "idle", now=NOW - 50, most=9)
    add_session(db, bob, "used", most=9)
    add_session(db, bob, "new", now=NOW + 50, most=9)
    add_session(db, bob, "future", now=NOW + 351, most=9)
    add_session(db, bob, "used in the future", most=9)
    add_session(db, bob, "expires", expires_at=NOW + 50, most=9)
    add_session(db, eve, "hers")
    db.touch_session("used", NOW + 40)
    db.touch_session("used in the future", NOW + 351)

    def listed(user_id: int, now: int) -> list[str]:
        window = {"now": now, "idle_since": now - 100, "latest": now + 300}
        return [session.session_hash for session in db.list_sessions(user_id, **window)]

    assert listed(1, NOW) == ["expires", "new", "used", "idle"]
    assert listed(1, NOW + 50) == ["new", "used"]
    assert listed(1, NOW + 51) == ["used in the future", "future", "new", "used"]
    assert listed(2, NOW) == ["hers"]
    assert listed(9, NOW) == []


def test_a_listed_session_says_all_but_its_secret(db: Store, bob: User) -> None:
    digest = "0123456789abcdef" * 4
    session = Session(digest, NOW, NOW, NOW + 1000, "192.0.2.1", "curl/8")
    db.add_session(bob, session, replaced=None, idle_since=NOW - 100, most=5)
    (listed,) = db.list_sessions(1, now=NOW, idle_since=NOW - 100, latest=NOW)
    assert listed == session
    assert listed.id == "0123456789abcdef"
    assert "0123456789abcdef" not in repr(listed)


def test_a_session_lives_within_its_times(db: Store, bob: User) -> None:
    add_session(db, bob, "s")

    def live(now: int, idle_since: int, latest: int) -> bool:
        return bool(db.find_session("s", now=now, idle_since=idle_since, latest=latest))

    assert live(NOW, NOW - 1, NOW)
    assert live(NOW + 999, NOW - 1, NOW)
    assert not live(NOW + 1000, NOW - 1, NOW)
    assert not live(NOW, NOW, NOW)
    assert not live(NOW, NOW - 1, NOW - 1)


def test_the_use_of_a_session_is_recorded_and_never_taken_back(db: Store, bob: User) -> None:
    for name in "used", "unused":
        add_session(db, bob, name)
    db.touch_session("used", NOW + 60)
    db.touch_session("used", NOW + 30)
    found = [db.find_session(name, now=NOW, idle_since=0, latest=NOW + 60) for name in ("used", "unused")]
    assert [one and one[1] for one in found] == [NOW + 60, NOW]


def test_a_session_used_in_the_future_is_dead(db: Store, bob: User) -> None:
    add_session(db, bob, "s")
    db.touch_session("s", NOW + 301)
    assert not find_session(db, "s")


def test_the_sessions_of_a_deleted_user_go_with_them(db: Store, other: Any, eve: User, bob: User) -> None:
    for user, name in (bob, "his"), (eve, "hers"):
        add_session(db, user, name)
    other.execute("PRAGMA foreign_keys = ON") if isinstance(db, DB) else None
    other.execute("DELETE FROM users WHERE id = 1")
    assert rows(other, "SELECT session_hash FROM sessions") == [("hers",)]


# Reset tokens


def test_a_reset_token_is_found_until_it_expires(db: Store, bob: User) -> None:
    give_token(db)
    found = [db.find_reset("token", now=NOW + passed, latest=NOW + 300) for passed in (0, 599, 600)]
    assert [user.id if user else None for user in found] == [1, 1, None]


def test_a_token_from_too_far_in_the_future_is_none(db: Store, bob: User) -> None:
    give_token(db)
    assert not db.find_reset("token", now=NOW - 301, latest=NOW - 1)
    assert not spend(db, now=NOW - 301)


def test_a_token_is_one_users(db: Store, eve: User) -> None:
    give_token(db)
    assert [db.find_user_by(id=number).reset_token for number in (1, 2)] == ["token", None]


def test_an_unknown_user_gets_no_token(db: Store, bob: User) -> None:
    assert not set_reset(db, 2, "token")
    assert db.find_user_by(id=1) == bob


def test_a_new_token_replaces_the_former(db: Store, bob: User) -> None:
    give_token(db)
    set_reset(db, 1, "newer")
    assert not spend(db, "token")
    assert spend(db, "newer")


# A token that was made when, ends when, and when the next is asked for; whether there is a next one.
TOKENS: dict[str, tuple[int, int, int, bool]] = {
    "made just now": (NOW, NOW + 600, NOW, False),
    "made after": (NOW, NOW + 600, NOW + 299, False),
    "made at that moment": (NOW, NOW + 600, NOW + 300, True),
    "made before": (NOW, NOW + 600, NOW + 301, True),
    "nearly over": (NOW, NOW + 100, NOW + 99, False),
    "over": (NOW, NOW + 100, NOW + 100, True),
    "made before the clock jumped back": (NOW, NOW + 600, NOW - 1, True),
}


@pytest.mark.parametrize("case", TOKENS)
def test_a_token_that_is_young_is_not_replaced(db: Store, eve: User, case: str) -> None:
    made, ends, now, replaced = TOKENS[case]
    assert db.set_reset_token(1, "token", now=made, expires_at=ends, unless_since=made)
    given = db.set_reset_token(1, "newer", now=now, expires_at=now + 600, unless_since=now - 300)
    assert given is replaced
    assert [db.find_user_by(id=number).reset_token for number in (1, 2)] == ["newer" if replaced else "token", None]
    found = db.find_reset("newer" if replaced else "token", now=now, latest=now)
    assert found == db.find_user_by(id=1)
    assert db.set_reset_token(2, "hers", now=now, expires_at=now + 600, unless_since=now - 300)


def test_of_eight_threads_that_ask_for_a_token_one_gets_it(db: Store, bob: User) -> None:
    given = at_once(8, lambda index: set_reset(db, 1, f"token{index}", NOW - 300))
    assert sum(given) == 1
    assert db.find_user_by(id=1).reset_token == f"token{given.index(True)}"


def test_a_spent_token_sets_the_hash_and_ends_the_sessions_of_that_user(db: Store, eve: User, bob: User) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "hers"):
        add_session(db, user, name)
    give_token(db)
    assert spend(db)
    assert live_sessions(db, "1", "2", "hers") == ["hers"]
    assert db.find_user_by(id=1) == User(1, "bob@x.io", NEW_HASH)
    assert db.find_user_by(id=2).hashed_password == HASH
    assert not spend(db, new=b"third")


def test_a_token_that_is_not_live_changes_nothing(db: Store, bob: User) -> None:
    give_token(db)
    add_session(db, bob, "s")
    before = db.find_user_by(id=1)
    for token_hash, now in ("wrong", NOW), ("", NOW), ("TOKEN", NOW), ("token", NOW + 600):
        assert not spend(db, token_hash, now)
    assert find_session(db, "s") == before


def test_of_eight_threads_with_one_token_one_spends_it(db: Store, bob: User) -> None:
    give_token(db)
    hashes = [b"hash%d" % index for index in range(8)]
    spent = at_once(8, lambda index: spend(db, new=hashes[index]))
    assert sum(spent) == 1
    assert db.find_user_by(id=1).hashed_password == hashes[spent.index(True)]


# Second factor


def test_a_seed_is_kept_and_not_in_force(db: Store, eve: User, bob: User) -> None:
    add_session(db, bob, "s")
    assert [plant(db, 1, "FIRST"), plant(db, 1, "SECOND")] == [True, True]
    assert db.find_user_by(id=1) == replace(bob, session_id="s", totp_secret="SECOND")
    assert db.find_user_by(id=2) == eve
    assert not db.spend_totp(1, 1, 1)
    assert add_session(db, bob, "t")  # nothing has changed for who logs in


@pytest.mark.parametrize("reason", ["an old password", "an ended session", "another's session", "nobody"])
def test_a_seed_is_kept_only_for_who_is_still_there(db: Store, eve: User, bob: User, other: Any, reason: str) -> None:
    for user, name in (bob, "his"), (bob, "ended"), (eve, "hers"):
        add_session(db, user, name)
    db.end_session("ended")
    before = everything(other)
    user = {"an old password": replace(bob, hashed_password=NEW_HASH), "nobody": replace(bob, id=9)}.get(reason, bob)
    session = {"an ended session": "ended", "another's session": "hers"}.get(reason, "his")
    assert not db.set_totp(user, "SEED", session)
    assert not db.delete_verified_user(user, session)
    assert everything(other) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda db: db.change_password(1, HASH, NEW_HASH, "s", "t"),
        lambda db: db.disable_user(1, NOW),
        lambda db: db.end_all_sessions(),
        lambda db: (give_token(db), spend(db)),  # type: ignore[func-returns-value]
    ],
)
def test_a_seed_that_is_not_in_force_goes_with_what_it_was_begun_under(
    db: Store, bob: User, change: Callable[[Store], object]
) -> None:
    add_session(db, bob, "s")
    assert plant(db, 1)
    change(db)
    assert db.find_user_by(id=1).totp_secret is None


def test_a_seed_in_force_is_not_replaced(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    assert not plant(db, 1, "OTHER")
    assert everything(other) == before


def test_a_confirmed_second_factor_leaves_one_session_under_a_new_hash(
    db: Store, eve: User, bob: User, other: Any
) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "hers"):
        add_session(db, user, name)
    give_token(db)
    assert second_factor(db, bob, "1", "renewed", "a", "b")
    assert db.find_user_by(id=1) == User(1, "bob@x.io", HASH, "renewed", totp_secret="SEED", totp_since=NOW)
    assert live_sessions(db, "1", "2", "renewed", "hers") == ["renewed", "hers"]
    assert not spend(db)
    assert rows(other, "SELECT * FROM recovery_codes") == [(1, "a"), (1, "b")]
    assert not db.spend_totp(1, 1000, 1010)  # it was used to confirm
    assert db.find_user_by(id=2) == replace(eve, session_id="hers")


SEEDED = User(1, "bob@x.io", HASH, totp_secret="SEED")
UNCONFIRMED: dict[str, tuple[User, str]] = {
    "the seed is another by now": (replace(SEEDED, totp_secret="FORMER"), "1"),
    "there was no seed": (replace(SEEDED, totp_secret=None), "1"),
    "the session has ended": (SEEDED, "ended"),
    "the session is another user's": (SEEDED, "hers"),
    "the user is another": (replace(SEEDED, id=2), "hers"),
    "there is no such user": (replace(SEEDED, id=9), "1"),
}


@pytest.mark.parametrize("reason", UNCONFIRMED)
def test_a_second_factor_that_is_not_confirmed_changes_nothing(
    db: Store, eve: User, bob: User, other: Any, reason: str
) -> None:
    for user, name in (bob, "1"), (bob, "2"), (eve, "hers"):
        add_session(db, user, name)
    give_token(db)
    plant(db, 1)
    before = everything(other)
    user, session_hash = UNCONFIRMED[reason]
    assert not db.confirm_totp(user, 1000, ["a"], now=NOW, session_hash=session_hash, renewed="renewed")
    assert everything(other) == before


def test_a_second_factor_is_confirmed_once(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    bob = db.find_user_by(id=1)
    assert not db.confirm_totp(bob, 1001, ["a"], now=NOW, session_hash="bob1", renewed="renewed")
    assert everything(other) == before


def test_of_eight_threads_that_confirm_one_does(db: Store, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    plant(db, 1)

    def confirm(index: int) -> bool:
        codes = [f"{index} code", f"{index} spare"]
        return db.confirm_totp(SEEDED, 1000 + index, codes, now=NOW, session_hash="s", renewed=f"renewed{index}")

    confirmed = at_once(8, confirm)
    assert sum(confirmed) == 1
    winner = confirmed.index(True)
    assert rows(other, "SELECT totp_step, session_id FROM users") == [(1000 + winner, f"renewed{winner}")]
    assert rows(other, "SELECT code_hash FROM recovery_codes") == [(f"{winner} code",), (f"{winner} spare",)]


def test_the_code_of_a_step_works_once_and_that_of_an_earlier_one_never(furnished: None, db: Store) -> None:
    steps = [1000, 999, 1001, 1001, 1000, 1003, 1002, 1003, 1004]
    spent = [db.spend_totp(1, step, step + 10) for step in steps]
    assert spent == [False, False, True, False, False, True, False, False, True]
    assert db.spend_totp(2, 1001, 1011)  # her own steps


@pytest.mark.parametrize(("ahead", "works"), [(1, False), (10, False), (11, True), (1000, True)])
def test_a_step_far_in_the_future_was_used_before_the_clock_jumped_back(
    furnished: None, db: Store, ahead: int, works: bool
) -> None:
    assert db.spend_totp(1, 2000 + ahead, 2010 + ahead)
    assert [db.spend_totp(1, 2000, 2010), db.spend_totp(1, 2000, 2010)] == [works, False]
    assert db.spend_totp(1, 2001 + ahead, 2011 + ahead)


def test_no_code_works_without_a_second_factor(db: Store, bob: User) -> None:
    assert [db.spend_totp(number, 1, 1) for number in (1, 9)] == [False, False]
    assert not db.spend_recovery_code(1, "")


def test_a_recovery_code_works_once_and_for_its_user(furnished: None, db: Store) -> None:
    codes = ["eve code", "bob code", "bob code", "BOB SPARE", "", "bob spare", "bob spare"]
    assert [db.spend_recovery_code(1, code) for code in codes] == [False, True, False, False, False, True, False]
    assert db.spend_recovery_code(2, "eve code")


@pytest.mark.parametrize("code", ["step", "recovery code"])
def test_of_eight_threads_with_one_code_one_spends_it(furnished: None, db: Store, code: str) -> None:
    def use(index: int) -> bool:
        return db.spend_totp(1, 1001, 1011) if code == "step" else db.spend_recovery_code(1, "bob code")

    assert sum(at_once(8, use)) == 1


@pytest.mark.parametrize("session_hash", [None, "bob1", "bob2"])
def test_a_second_factor_goes_with_its_codes_and_the_other_sessions(
    furnished: None, db: Store, other: Any, session_hash: str | None
) -> None:
    her = db.find_user_by(id=2)
    assert db.remove_totp(1, session_hash, "renewed") if session_hash else db.remove_totp(1)
    assert live_sessions(db, "renewed", *SESSIONS) == (["renewed", *HERS] if session_hash else HERS)
    assert db.find_user_by(id=1) == User(1, "bob@x.io", HASH, "renewed" if session_hash else None)
    assert rows(other, "SELECT * FROM recovery_codes ORDER BY code_hash") == [(2, "eve code"), (2, "eve spare")]
    assert rows(other, "SELECT totp_step FROM users ORDER BY id") == [(0,), (1000,)]
    assert not db.spend_totp(1, 1001, 1011)
    assert not spend(db, "bob token")
    assert db.find_user_by(id=2) == her
    assert db.spend_totp(2, 1001, 1011)


def test_the_next_second_factor_counts_its_own_steps(furnished: None, db: Store, bob: User) -> None:
    assert db.remove_totp(1, "bob1", "bob3")
    assert plant(db, 1)
    assert db.confirm_totp(SEEDED, 900, ["new code"], now=NOW, session_hash="bob3", renewed="bob4")
    assert [db.spend_recovery_code(1, code) for code in ("bob code", "new code")] == [False, True]
    assert db.spend_totp(1, 901, 911)


@pytest.mark.parametrize(("user_id", "session_hash"), [(1, "bob0"), (1, "eve1"), (1, ""), (9, "bob1"), (9, None)])
def test_a_second_factor_that_stays_changes_nothing(
    furnished: None, db: Store, other: Any, user_id: int, session_hash: str | None
) -> None:
    before = everything(other)
    assert not db.remove_totp(user_id, session_hash, "renewed")
    assert everything(other) == before


def test_without_a_second_factor_none_is_switched_off(db: Store, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    give_token(db)
    plant(db, 1)  # nor is one that is being set up
    before = everything(other)
    assert [db.remove_totp(1, "s", "renewed"), db.remove_totp(1)] == [False, False]
    assert everything(other) == before


# What is over


def leave_over(other: Any, number: int = 1) -> None:
    """Bob's sessions and addresses, and buckets: as many of each over at NOW, and one that is over a second later."""
    for index in range(number + 1):
        moment = NOW + (index == number)
        other.execute("INSERT INTO throttle VALUES (?, ?)", (f"b{index}", moment))
        other.execute("INSERT INTO known_addresses VALUES (1, ?, ?)", (f"a{index}", moment - 100))
        other.execute(
            "INSERT INTO sessions VALUES (?, ?, 1, ?, ?, ?, '', '')", (100 + index, f"s{index}", NOW, NOW, moment)
        )


def left(other: Any) -> list[list[str]]:
    columns = (("sessions", "session_hash"), ("throttle", "key"), ("known_addresses", "address_hash"))
    return [[name for (name,) in rows(other, f"SELECT {column} FROM {table}")] for table, column in columns]


def prune(db: Store, most: int = 200) -> int:
    return db.prune(now=NOW, known_since=NOW - 100, most=most)


def test_what_is_over_is_deleted_and_nothing_live(db: Store, bob: User, other: Any) -> None:
    leave_over(other)
    assert [prune(db), prune(db)] == [3, 0]
    assert left(other) == [["s1"], ["b1"], ["a1"]]


@pytest.mark.parametrize("kind", ["sessions", "throttle", "known_addresses"])
def test_one_kind_alone_is_deleted(db: Store, bob: User, other: Any, kind: str) -> None:
    leave_over(other)
    for table in {"sessions", "throttle", "known_addresses"} - {kind}:
        other.execute(f"DELETE FROM {table}")
    assert [prune(db), prune(db)] == [1, 0]
    assert sum(map(len, left(other))) == 1


def test_pruning_leaves_alone_what_is_in_use(furnished: None, db: Store, other: Any) -> None:
    before = everything(other)
    assert prune(db) == 0
    assert everything(other) == before


def test_at_most_so_many_of_each_kind_are_deleted_at_once(db: Store, bob: User, other: Any) -> None:
    leave_over(other, 5)
    deleted, counts = [], []
    for _ in range(4):
        deleted.append(prune(db, most=2))
        counts.append([len(names) for names in left(other)])
    assert deleted == [6, 6, 3, 0]
    assert counts == [[4] * 3, [2] * 3, [1] * 3, [1] * 3]
    assert left(other) == [["s5"], ["b5"], ["a5"]]


def test_after_pruning_the_row_of_a_user_names_the_newest_session_left(db: Store, eve: User, bob: User) -> None:
    carol = db.add_user("carol@x.io", HASH)
    for name, expires_at in ("old", NOW + 1), ("newer", NOW + 1), ("newest", NOW + 2):
        add_session(db, bob, name, expires_at=expires_at)
    add_session(db, eve, "hers", expires_at=NOW + 2)
    add_session(db, carol, "long", expires_at=NOW + 99)
    add_session(db, carol, "short", expires_at=NOW + 1)
    named = []
    for now in NOW, NOW + 1, NOW + 2:
        db.prune(now=now, known_since=0, most=200)
        named.append([user.session_id for user in db.each_user()])
    assert named == [["newest", "hers", "short"], ["newest", "hers", "long"], [None, None, "long"]]


def test_the_newest_time_is_that_of_any_session(db: Store, place: str, eve: User, bob: User) -> None:
    newest = [db.newest_time(place)]
    for user, name, now in (bob, "s", NOW + 5), (eve, "hers", NOW + 9), (bob, "t", NOW):
        add_session(db, user, name, now=now)
        newest.append(db.newest_time(place))
    db.touch_session("t", NOW + 10_000)
    assert [*newest, db.newest_time(place)] == [0, NOW + 5, NOW + 9, NOW + 9, NOW + 10_000]


# Statements

LOOK_UPS: dict[str, Callable[[Store], object]] = {
    "user by id": lambda db: db.find_user_by(id=1),
    "user by email": lambda db: db.find_user_by(email="bob@x.io"),
    "user by session": lambda db: db.find_user_by(session_id="s"),
    "user by token": lambda db: db.find_user_by(reset_token="token"),
    "session": lambda db: find_session(db, "s"),
    "token": lambda db: db.find_reset("token", now=NOW, latest=NOW + 300),
    "update_user": lambda db: db.update_user(1, session_id="s"),
    "replace_hash": lambda db: db.replace_hash(1, HASH, HASH),
    "add_session": lambda db: add_session(db, db.find_user_by(id=1), "t", replaced="s"),
    "touch_session": lambda db: db.touch_session("s", NOW + 60),
    "end_session": lambda db: db.end_session("t"),
    "end_sessions": lambda db: db.end_sessions(1),
    "set_reset_token": lambda db: set_reset(db, 1, "token"),
    "spend_reset": lambda db: spend(db),
    "list_sessions": lambda db: db.list_sessions(1, now=NOW, idle_since=NOW - 100, latest=NOW),
    "end_sessions but one": lambda db: db.end_sessions(1, kept="s"),
    "session to go on": lambda db: add_session(db, db.find_user_by(id=1), "u"),
    "change_password": lambda db: db.change_password(1, NEW_HASH, HASH, "u", "v"),
    "set_totp": lambda db: plant(db, 1),
    "confirm_totp": lambda db: db.confirm_totp(SEEDED, 1, ["a"], now=NOW, session_hash="v", renewed="w"),
    "spend_totp": lambda db: db.spend_totp(1, 2, 2),
    "spend_recovery_code": lambda db: db.spend_recovery_code(1, "a"),
    "remove_totp": lambda db: db.remove_totp(1, "w", "x"),
    "prune": lambda db: db.prune(now=NOW + 1000, known_since=NOW, most=200),
    "disable_user": lambda db: db.disable_user(1, NOW),
    "enable_user": lambda db: db.enable_user(1),
    "delete_user": lambda db: db.delete_verified_user(db.find_user_by(id=1), "s"),
}


@pytest.mark.sqlite
def test_every_look_up_searches_an_index(statements: list[str], db: Store, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    give_token(db)
    for name, look_up in LOOK_UPS.items():
        statements.clear()
        look_up(db)
        looked_up = [one for one in statements if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE)", one)]
        looked_up = [one for one in looked_up if "VALUES" not in one]  # which are put, not looked up
        assert looked_up, name
        for statement in looked_up:
            plan = [detail for *_, detail in rows(other, f"EXPLAIN QUERY PLAN {statement}")]
            assert any(detail.startswith("SEARCH") for detail in plan), (name, plan)
            assert not [detail for detail in plan if detail.startswith("SCAN")], (name, plan)


@pytest.mark.sqlite
def test_what_goes_with_a_deleted_user_is_found_by_an_index(other: Any) -> None:
    references = rows(other, 'SELECT m.name, f."from" FROM sqlite_schema m, pragma_foreign_key_list(m.name) f')
    assert len(references) == 3
    for table, column in references:
        plan = [detail for *_, detail in rows(other, f"EXPLAIN QUERY PLAN DELETE FROM {table} WHERE {column} = 1")]
        assert all(detail.startswith("SEARCH") for detail in plan), (table, plan)


@pytest.mark.sqlite
def test_the_writer_is_set_up(statements: list[str], db: DB) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "secure_delete": 1, "trusted_schema": 0}
    assert {pragma: rows(db._writer, f"PRAGMA {pragma}")[0][0] for pragma in wanted} == wanted
    for pragma in wanted:  # set, too: some builds of SQLite have the wanted value as their default
        assert any(re.match(rf"PRAGMA {pragma} = ", statement) for statement in statements), pragma


@pytest.mark.sqlite
def test_what_reads_cannot_write(db: DB, bob: User) -> None:
    at_once(2, lambda index: db.find_user_by(id=1))
    assert db._readers
    for reader in db._readers.values():
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("DELETE FROM users")


# Transactions


def stop_at(db: Store, other: Any, event: str) -> None:
    """Let no statement do this any more."""
    if isinstance(db, DB):
        other.execute(f"CREATE TRIGGER stop BEFORE {event} BEGIN SELECT RAISE(ABORT, 'stop'); END")
        return
    other.execute(
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'stop' USING ERRCODE = 'check_violation'; END $$"
    )
    other.execute(f"CREATE TRIGGER stop BEFORE {event} FOR EACH ROW EXECUTE FUNCTION stop()")


def go_on(db: Store, other: Any, event: str) -> None:
    other.execute("DROP TRIGGER stop" if isinstance(db, DB) else f"DROP TRIGGER stop ON {event.split()[-1]}")


@pytest.mark.sqlite
def test_a_transaction_that_reads_first_is_not_overtaken(db: Store, bob: User, other: Any) -> None:
    with db._transaction() as writer:
        rows(writer)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("UPDATE users SET session_id = 'theirs'")
        writer.execute("UPDATE users SET session_id = 'ours'")
    assert db.find_user_by(id=1).session_id == "ours"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_failed_transaction_is_rolled_back(db: Store, bob: User, other: Any, error: type[BaseException]) -> None:
    def fail() -> None:
        with db._transaction() as writer:
            writer.execute("UPDATE users SET session_id = 'half'")
            raise error

    with pytest.raises(error):
        fail()
    assert rows(other, "SELECT session_id FROM users") == [(None,)]
    db.update_user(1, session_id="next")
    assert rows(other, "SELECT session_id FROM users") == [("next",)]


def test_a_method_that_fails_half_way_changes_nothing(db: Store, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    give_token(db)
    before = db.find_user_by(id=1)
    stop_at(db, other, "DELETE ON sessions")
    with pytest.raises(ValueError, match="stop"):
        spend(db)
    assert find_session(db, "s") == before
    go_on(db, other, "DELETE ON sessions")
    assert spend(db)


# Where it is stopped, and what is then whole.
HALF_WAY: dict[str, tuple[str, Callable[[Store], object]]] = {
    "add_session": ("DELETE ON sessions", lambda db: add_session(db, db.find_user_by(id=1), "s", replaced="bob1")),
    "change_password": ("DELETE ON sessions", lambda db: db.change_password(1, HASH, NEW_HASH, "bob1", "renewed")),
    "change_password, at its end": (
        "UPDATE OF session_id ON users",
        lambda db: db.change_password(1, HASH, NEW_HASH, "bob1", "renewed"),
    ),
    "disable_user": ("DELETE ON sessions", lambda db: db.disable_user(1, NOW)),
    "delete_user": ("DELETE ON known_addresses", lambda db: db.delete_user(1)),
    "delete_user and codes": (
        "DELETE ON recovery_codes",
        lambda db: db.delete_verified_user(db.find_user_by(id=1), "bob1"),
    ),
    "end_session": ("UPDATE OF session_id ON users", lambda db: db.end_session("bob2")),
    "end_sessions": ("UPDATE OF session_id ON users", lambda db: db.end_sessions(1, kept="bob1")),
    "end_all_sessions": ("DELETE ON sessions", lambda db: db.end_all_sessions()),
    "spend_reset": ("DELETE ON sessions", lambda db: spend(db, "bob token")),
    "confirm_totp": (
        "DELETE ON sessions",
        lambda db: db.confirm_totp(
            db.find_user_by(id=3), 1000, ["a"], now=NOW, session_hash="carol1", renewed="renewed"
        ),
    ),
    "remove_totp": ("DELETE ON sessions", lambda db: db.remove_totp(1)),
    "remove_totp but one session": ("DELETE ON sessions", lambda db: db.remove_totp(1, "bob1", "renewed")),
    "prune": ("DELETE ON known_addresses", lambda db: prune(db)),
}


@pytest.mark.parametrize("method", HALF_WAY)
def test_a_method_that_is_stopped_half_way_changes_nothing(furnished: None, db: Store, other: Any, method: str) -> None:
    carol = db.add_user("carol@x.io", HASH)
    for name in "carol2", "carol1":
        add_session(db, carol, name)
    assert plant(db, 3)
    leave_over(other)
    event, call = HALF_WAY[method]
    stop_at(db, other, event)
    before = everything(other)
    with pytest.raises(ValueError, match="stop"):
        call(db)
    assert everything(other) == before
    go_on(db, other, event)
    call(db)
    assert everything(other) != before


@pytest.mark.sqlite
def test_a_write_holds_the_lock_of_the_file(db: Store, path: Path) -> None:
    with open(f"{path}.lock", "rb") as lock_file:
        with db._transaction(), pytest.raises(BlockingIOError):
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.sqlite
def test_a_held_lock_makes_a_write_unavailable_and_no_read(impatient: None, db: Store, bob: User, path: Path) -> None:
    with open(f"{path}.lock", "rb") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        with pytest.raises(StorageUnavailable):
            db.add_user("eve@x.io", HASH)
        assert db.find_user_by(id=1) == bob
    assert db.add_user("eve@x.io", HASH).id == 2


@pytest.mark.sqlite
def test_a_write_does_not_wait_for_ever_for_another_thread(impatient: None, db: Store) -> None:
    with ThreadPoolExecutor(1) as pool, db._transaction(), pytest.raises(StorageUnavailable):
        pool.submit(db.add_user, "bob@x.io", HASH).result(timeout=5)
    assert db.add_user("bob@x.io", HASH).id == 1


@pytest.mark.sqlite
def test_a_write_waits_for_the_lock(db: Store, path: Path) -> None:
    with open(f"{path}.lock", "rb") as lock_file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        adding = pool.submit(db.add_user, "bob@x.io", HASH)
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.05)
        fcntl.flock(lock_file, fcntl.LOCK_UN)
        assert adding.result(timeout=5).id == 1


@pytest.mark.sqlite
@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_a_transaction_of_another_program_makes_a_write_unavailable(
    impatient: None, db: Store, bob: User, other: Any, begin: str
) -> None:
    other.execute(begin)
    with pytest.raises(StorageUnavailable):
        db.update_user(1, session_id="x")
    assert db.find_user_by(id=1) == bob
    other.execute("ROLLBACK")
    db.update_user(1, session_id="x")


@pytest.mark.sqlite
def test_a_close_waits_for_the_lock(path: Path) -> None:
    db = DB(path)
    with open(f"{path}.lock", "rb") as lock_file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        done = pool.submit(db.close)
        with pytest.raises(TimeoutError):
            done.result(timeout=0.05)
        fcntl.flock(lock_file, fcntl.LOCK_UN)
        done.result(timeout=5)


@pytest.mark.sqlite
def test_a_full_disk_makes_a_write_unavailable_and_changes_nothing(db: DB, bob: User, other: Any) -> None:
    rows(db._writer, "PRAGMA max_page_count = 1")  # no page more than there are
    with pytest.raises(StorageUnavailable):
        db.update_user(1, session_id="x" * 20_000)
    assert db.find_user_by(id=1) == bob
    rows(db._writer, "PRAGMA max_page_count = 1000")
    db.update_user(1, session_id="x" * 20_000)
    assert len(rows(other, "SELECT session_id FROM users")[0][0]) == 20_000


@pytest.mark.sqlite
def test_a_write_waits_for_the_transaction_of_another_program(db: Store, other: Any) -> None:
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        adding = pool.submit(db.add_user, "bob@x.io", HASH)
        with pytest.raises(TimeoutError):
            adding.result(timeout=0.05)
        other.execute("ROLLBACK")
        assert adding.result(timeout=5).id == 1


@pytest.mark.sqlite
def test_a_damaged_file_is_unavailable(db: DB, bob: User, path: Path) -> None:
    rows(db._writer, "PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(path, 4096)
    with pytest.raises(StorageUnavailable):
        db.find_user_by(id=1)


WRITER = """
import sys
from storage import open_store
db = open_store(sys.argv[1])
print("open", flush=True)
sys.stdin.readline()
for number in range(10):
    db.add_user(f"{sys.argv[2]}{number}@x.io", "hash")
    db.find_user_by(email=f"{sys.argv[2]}0@x.io")
db.close()
"""


def test_two_processes_write_one_database(db: Store, place: str, other: Any) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, place, name],
            cwd=HERE,
            env=clean_environ(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "open\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=20)
    assert [process.returncode for process in processes] == [0, 0]
    assert rows(other, "SELECT id FROM users ORDER BY id") == [(number,) for number in range(1, 21)]


@pytest.mark.sqlite
def test_of_two_that_find_no_tables_one_makes_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_have_looked = threading.Barrier(2)

    def wait(statement: str) -> None:
        if statement.startswith("BEGIN"):
            with suppress(threading.BrokenBarrierError):
                both_have_looked.wait(0.1)

    _trace(monkeypatch, wait)
    for db in at_once(2, lambda index: DB(path)):
        db.close()
    assert both_have_looked.broken  # the second looked when the first was done


# The file


@pytest.fixture
def lax_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.sqlite
def test_the_files_are_for_their_owner_only(lax_umask: None, db: Store, bob: User, path: Path) -> None:
    assert db.find_user_by(id=1) == bob
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {f"authsvc.db{suffix}": 0o600 for suffix in ("", "-wal", "-shm", ".lock")}


@pytest.mark.sqlite
def test_a_closed_database_is_one_file_and_its_lock(path: Path) -> None:
    with closing(DB(path)) as db:
        db.add_user("bob@x.io", HASH)
        db.find_user_by(id=1)
        at_once(3, lambda index: db.find_user_by(id=1))
    assert {file.name for file in path.parent.iterdir()} == {"authsvc.db", "authsvc.db.lock"}


@pytest.mark.sqlite
def test_a_deleted_secret_leaves_the_file(path: Path) -> None:
    with closing(DB(path)) as db:
        add_session(db, db.add_user("bob@x.io", HASH), "canary")
        db.end_sessions(1)
    assert b"canary" not in path.read_bytes()


def _sqlite_file(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


OTHER_TABLE = "CREATE TABLE notes (text TEXT)"
OTHER_SESSIONS = "CREATE TABLE sessions (id TEXT, data TEXT)"
OTHER_USERS = "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT, hashed_password TEXT)"

REFUSED: dict[str, Callable[[Path], object]] = {
    "a text": lambda path: path.write_text("dear diary\n"),
    "a short text": lambda path: path.write_text("x"),
    "a header with rubbish": lambda path: path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4080),
    "a header alone": lambda path: path.write_bytes(b"SQLite format 3\0"),
    "a newer release's": lambda path: _sqlite_file(path, "PRAGMA user_version = 99"),
    "a newer release's, in WAL mode": lambda path: _sqlite_file(
        path, "PRAGMA journal_mode = WAL", "PRAGMA user_version=99"
    ),
    "another program's": lambda path: _sqlite_file(path, OTHER_TABLE),
    "another program's with users": lambda path: _sqlite_file(path, OTHER_USERS),
    "another program's, version 1": lambda path: _sqlite_file(path, OTHER_TABLE, "PRAGMA user_version = 1"),
    "another program's with sessions": lambda path: _sqlite_file(path, OTHER_SESSIONS),
    "another program's with both, version 1": lambda path: _sqlite_file(
        path, OTHER_USERS, OTHER_SESSIONS, "PRAGMA user_version = 1"
    ),
    "another program's, in WAL mode": lambda path: _sqlite_file(path, "PRAGMA journal_mode = WAL", OTHER_TABLE),
    "a folder": lambda path: path.mkdir(),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "in a missing folder": lambda path: None,
    "below a file": lambda path: path.parent.with_name("missing").write_text("no folder"),
}


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(impatient: None, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "authsvc.db"
    REFUSED[kind](path)
    if kind in ("in a missing folder", "below a file"):
        path = tmp_path / "missing" / "authsvc.db"
    before = _tree(tmp_path)
    with pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db[^\n]*\Z"):
        DB(path)
    assert _tree(tmp_path) == before


@pytest.mark.sqlite
def test_the_file_of_a_newer_release_that_runs_is_refused_and_left_alone(db: Store, path: Path, other: Any) -> None:
    other.execute("PRAGMA user_version = 99")  # it stands in the write-ahead log only
    before = _tree(path.parent).keys(), path.read_bytes(), rows(other)
    with pytest.raises(DatabaseRefused, match="newer release"):
        DB(path)
    assert (_tree(path.parent).keys(), path.read_bytes(), rows(other)) == before


@pytest.mark.sqlite
def test_a_file_that_becomes_newer_while_one_waits_is_refused(older: Path, db: Store, other: Any) -> None:
    with open(f"{older}.lock", "rb") as lock_file, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        opening = pool.submit(DB, older)
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.05)
        other.execute("PRAGMA user_version = 99")
        fcntl.flock(lock_file, fcntl.LOCK_UN)
        with pytest.raises(DatabaseRefused, match="newer release"):
            opening.result(timeout=5)


@pytest.mark.sqlite
def test_while_one_thread_makes_the_file_no_other_opens_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, others = os.open, []

    def make_slowly(file: Any, flags: int, *args: Any, **options: Any) -> int:
        made = make(file, flags, *args, **options)
        if flags & os.O_EXCL:
            others.append(pool.submit(DB, path))
            with pytest.raises(TimeoutError):
                others[0].result(timeout=0.05)
        return made

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(os, "open", make_slowly)
        DB(path).close()
        (other,) = others
        other.result(timeout=5).close()


def test_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatabaseRefused, match=r"\A[^\n]*:memory:[^\n]*\Z"):
        DB(":memory:")
    assert _tree(tmp_path) == {}


@pytest.mark.sqlite
def test_what_a_killed_process_left_is_taken_with_its_rows(db: Store, bob: User, path: Path, tmp_path: Path) -> None:
    (left := tmp_path / "left").mkdir()
    for suffix in "", "-wal":  # all that was committed stands in the log
        shutil.copy(f"{path}{suffix}", left)
    with closing(DB(left / path.name)) as revived:
        assert revived.find_user_by(id=1) == bob


@pytest.mark.sqlite
def test_an_empty_file_is_taken(path: Path) -> None:
    path.touch()
    with closing(DB(path)) as db:
        assert db.add_user("bob@x.io", HASH).id == 1


@contextmanager
def nobodys_folder() -> Iterator[Path]:
    # For root no folder is closed, and pytest's folders are for their owner only.
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def as_nobody() -> Iterator[None]:
    user_id = os.geteuid()
    if user_id == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user_id)


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_cannot_be_written_is_refused(exists: bool) -> None:
    with nobodys_folder() as folder:
        path = folder / "authsvc.db"
        if exists:
            path.touch()
            path.chmod(0o666)
        folder.chmod(0o555)
        with as_nobody(), pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db: Permission denied\Z"):
            DB(path)
        assert _tree(folder) == ({"authsvc.db": b""} if exists else {})
        folder.chmod(0o755)


def test_a_file_that_cannot_be_written_is_refused() -> None:
    with nobodys_folder() as folder:
        path = folder / "authsvc.db"
        DB(path).close()
        os.unlink(f"{path}.lock")
        path.chmod(0o444)
        folder.chmod(0o777)
        before = _tree(folder)
        with as_nobody(), pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db: Permission denied\Z"):
            DB(path)
        assert _tree(folder) == before


@pytest.mark.sqlite
def test_a_locked_file_is_refused_and_let_go(impatient: None, path: Path) -> None:
    with open(f"{path}.lock", "wb") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        with pytest.raises(DatabaseRefused, match=r"\A[^\n]*another process[^\n]*\Z") as refusal:
            DB(path)
        assert _opened(path) == 1, refusal  # ours; a service that tries again must not run out of files
    DB(path).close()


@pytest.mark.sqlite
def test_a_file_that_another_program_keeps_is_refused(impatient: None, older: Path) -> None:
    with closing(sqlite3.connect(older, isolation_level=None)) as keeper:
        rows(keeper, "PRAGMA locking_mode = EXCLUSIVE")
        rows(keeper, "BEGIN EXCLUSIVE")
        with pytest.raises(DatabaseRefused, match=r"\A[^\n]*database is locked\Z"):
            DB(older)
    DB(older).close()


def _opened(path: Path) -> int:
    """How many of this process's open files are the database or stand beside it."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("the system does not list open files in /proc")
    links = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(link.startswith(str(path)) for link in links)


# Older files


@pytest.fixture
def older(path: Path) -> Path:
    with closing(DB(path)) as db:
        add_session(db, db.add_user("bob@x.io", HASH), "s")
    return path


def _release(monkeypatch: pytest.MonkeyPatch, *migrations: str) -> None:
    monkeypatch.setattr(database, "MIGRATIONS", migrations)
    monkeypatch.setattr(database, "VERSION", len(migrations) + 1)


RELEASED = database.MIGRATIONS
COLOUR = "ALTER TABLE users ADD COLUMN colour TEXT;"
PAINT = "UPDATE users SET colour = 'blue';"


def _state(path: Path) -> tuple[int, list[str], list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        columns = [name for _, name, *_ in rows(connection, "PRAGMA table_info(users)")]
        return rows(connection, "PRAGMA user_version")[0][0], columns, rows(connection)


@pytest.mark.sqlite
def test_a_new_file_has_the_newest_version(older: Path) -> None:
    assert _state(older)[0] == database.VERSION


@pytest.mark.sqlite
@pytest.mark.parametrize("releases", [[(COLOUR, PAINT)], [(COLOUR,), (COLOUR, PAINT)], [(COLOUR, PAINT)] * 2])
def test_an_older_file_is_lifted_with_its_rows(
    older: Path, monkeypatch: pytest.MonkeyPatch, releases: list[tuple[str, ...]]
) -> None:
    for migrations in releases:
        _release(monkeypatch, *RELEASED, *migrations)
        with closing(DB(older)) as db:
            assert find_session(db, "s") == User(1, "bob@x.io", HASH, "s")
    version, columns, (row,) = _state(older)
    assert (version, columns[-1], row[-1]) == (len(RELEASED) + 3, "colour", "blue")


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "broken", ["INSERT INTO nowhere VALUES (1);", "INSERT INTO users DEFAULT VALUES;", "NONSENSE;"]
)
def test_a_failed_migration_leaves_the_older_file_whole(
    older: Path, monkeypatch: pytest.MonkeyPatch, impatient: None, broken: str
) -> None:
    before = _state(older)
    _release(monkeypatch, *RELEASED, COLOUR, PAINT + broken)
    with pytest.raises(DatabaseRefused, match=r"\A[^\n]*authsvc\.db: [^\n]+\Z") as refusal:
        DB(older)
    assert _state(older) == before
    _release(monkeypatch, *RELEASED)  # back to the release that it was made by, while the refused one is still in hand
    with closing(DB(older)) as db:
        db.update_user(1, session_id=None)
    assert refusal.type is DatabaseRefused
