"""Imports: many users are added together, or none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from engines import sqlite
from engines.errors import AlreadyExists, StorageUnavailable
from storage import DB, LOOKUP_BATCH, User
from tests import stored_users
from tests.stored_users import HASH, NEW_HASH, NOW

bob = stored_users.bob


def users_of(*emails: str) -> list[User]:
    return [User(0, email, NEW_HASH) for email in emails]


def emails_in(db: DB) -> list[str]:
    return [user.email for user in db.each_user()]


@pytest.mark.both_engines
def test_imported_users_have_all_but_sessions_and_tokens(db: DB) -> None:
    first = User(7, "Bob@x.io", HASH, "session", "token", NOW, NOW + 1, "SEED", NOW + 2, cut_salt="salt", groups="a,b")
    db.import_users([first, User(7, "eve@x.io", HASH.decode())])
    assert list(db.each_user()) == [
        first._replace(id=1, session_id=None, reset_token=None),
        User(2, "eve@x.io", HASH.decode()),
    ]


@pytest.mark.both_engines
def test_every_taken_email_is_found(db: DB, bob: User) -> None:
    db.import_users(users_of("É@x.io"))
    emails = ["é@x.io", "eve@x.io", *(f"user{number}@x.io" for number in range(LOOKUP_BATCH)), "bob@x.io"]
    assert db.taken_emails(emails) == {"é@x.io", "bob@x.io"}
    assert db.taken_emails([]) == set()


@pytest.mark.both_engines
@pytest.mark.parametrize("emails", [("eve@x.io", "BOB@x.io"), ("eve@x.io", "Eve@x.io")])
def test_a_taken_or_repeated_email_undoes_the_import(db: DB, bob: User, emails: tuple[str, ...]) -> None:
    with pytest.raises(AlreadyExists):
        db.import_users(users_of(*emails))
    assert list(db.each_user()) == [bob]


@pytest.mark.both_engines
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_while_users_are_read_undoes_the_import(db: DB, error: type[BaseException]) -> None:
    def users() -> Iterator[User]:
        yield User(0, "bob@x.io", HASH)
        raise error

    with pytest.raises(error):
        db.import_users(users())
    assert emails_in(db) == []
    db.import_users(users_of("bob@x.io"))
    assert emails_in(db) == ["bob@x.io"]


@pytest.mark.parametrize("unfit", [User(0, "eve\ud800", HASH), User(0, "eve@x.io", 5)])  # type: ignore[arg-type]
def test_one_user_that_cannot_be_stored_undoes_the_import(db: DB, unfit: User) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        db.import_users([User(0, "bob@x.io", HASH), unfit])
    assert emails_in(db) == []


@pytest.mark.both_engines
def test_an_email_registered_at_the_same_time_has_one_account(db: DB, database: str) -> None:
    """An import and a registration of the same email meet: one of them gets it, and the import is complete or void."""
    imported, registered = users_of(*(f"user{number}@x.io" for number in range(20))), threading.Event()

    def register() -> bool:
        with closing(DB(database)) as other:
            registered.wait(10)
            return bool(other.add_user("USER10@x.io", HASH))

    def users() -> Iterator[User]:
        for number, user in enumerate(imported):
            if number == 5:
                registered.set()
            yield user

    with ThreadPoolExecutor(1) as pool:
        registration, complete = pool.submit(register), True
        try:
            db.import_users(users())
        except AlreadyExists:
            complete = False
        error = registration.exception(timeout=20)
    assert complete is (error is not None), error
    assert emails_in(db) == ([user.email for user in imported] if complete else ["USER10@x.io"])


def test_reads_go_on_and_writes_wait_during_an_import(monkeypatch: pytest.MonkeyPatch, db: DB, bob: User) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT", 0.02)

    def users() -> Iterator[User]:
        yield User(0, "eve@x.io", HASH)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(db.find_user_by, id=1).result(5) == bob
            assert emails_in(db) == ["bob@x.io"]
            with pytest.raises(StorageUnavailable, match="write lock"):
                pool.submit(db.update_user, 1, session_id="x").result(5)

    db.import_users(users())
    db.update_user(1, session_id="x")
    assert emails_in(db) == ["bob@x.io", "eve@x.io"]
