"""Users in the database: adding, finding and changing them."""

from __future__ import annotations

import itertools
from typing import Any

import bcrypt
import pytest

from engines.errors import AlreadyExists
from storage import DB, InvalidRequestError, NoResultFound, User
from tests import stored_users
from tests.conftest import COST
from tests.stored_users import HASH, NEW_HASH, NOW, rows, run_together

bob = stored_users.bob
eve = stored_users.eve

# Names by which no user is found or changed. SQLite knows some of them as columns, and takes '"nosuch"' for a string.
NOT_ATTRIBUTES = [
    *("rowid", "_rowid_", "oid", "EMAIL", "Email", "email_key", "reset_expires_at", "users.email", "__class__"),
    *("device_key", "last_login_at", "cut_salt", "groups"),  # only certain changes set these
    *("", "nosuch", "self", '"nosuch"', "1=1 OR email", "email = :email --", "email=email,id"),
]

# Values that the columns of a user cannot hold.
NOT_STORABLE: dict[str, tuple[Any, ...]] = {
    "email": (None, 5, b"bytes", "\ud800", ["list"]),
    "hashed_password": (None, 5, 1.5, "\ud800", [HASH]),
    "session_id": (b"bytes", "\ud800", ["list"]),
    "reset_token": (2**63, {}),
}
MATCHES_NOBODY: dict[str, tuple[Any, ...]] = {
    "id": (0, 2, "1", 1.0, True, 2**63, -(2**63) - 1, [1]),
    "email": ("", "%", "' OR 1=1 --", "bob@x.io\0", "\ud800", b"bob@x.io", ["bob@x.io"], {"bob@x.io": 1}, object()),
    "hashed_password": (5, "\ud800", [HASH]),
    "session_id": (123, b"123", 123.0),
    "reset_token": (2**63, "\udfff"),
}

BOB = User(1, "bob@x.io", HASH, "123")


@pytest.fixture
def one_user(db: DB) -> DB:
    """A database with one user."""
    db.add_user(BOB.email, HASH)
    db.update_user(1, session_id="123")
    assert db.find_user_by(id=1) == BOB
    return db


@pytest.fixture
def engine_calls(one_user: DB, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of the engine that are called from now on."""
    called: list[str] = []
    for method in "read", "read_all", "write", "transaction":
        monkeypatch.setattr(one_user._engine, method, lambda *_, method=method, **__: called.append(method))
    return called


def test_the_table_of_users_has_its_columns(other: Any) -> None:
    columns = {
        name: (kind, bool(required), bool(key))
        for _, name, kind, required, _, key in rows(other, "PRAGMA table_info(users)")
    }
    assert columns["id"] == ("INTEGER", False, True)
    assert [columns[name][1] for name in ("email", "hashed_password")] == [True, True]
    assert [columns[name][1] for name in ("session_id", "reset_token")] == [False, False]


def test_a_new_user_has_neither_session_nor_token(db: DB) -> None:
    user = db.add_user("bob@x.io", HASH)
    assert user == User(id=1, email="bob@x.io", hashed_password=HASH, session_id=None, reset_token=None)
    assert db.find_user_by(id=1) == user


def test_a_user_is_a_snapshot(bob: User) -> None:
    with pytest.raises(AttributeError):
        bob.email = "eve@x.io"  # type: ignore[misc]


def test_the_repr_of_a_user_contains_no_secrets() -> None:
    user = User(1, "bob@x.io", HASH, "session", "token", totp_secret="seed", device_key="key", last_login_at=NOW)
    assert repr(user) == "User(id=1, email='bob@x.io')"


def test_the_errors_of_a_lookup_are_unrelated() -> None:
    assert not issubclass(NoResultFound, InvalidRequestError)
    assert not issubclass(InvalidRequestError, NoResultFound)
    assert {NoResultFound.__module__, InvalidRequestError.__module__} == {"storage"}


@pytest.mark.both_engines
def test_an_added_user_is_committed(db: DB, other: Any) -> None:
    db.add_user("bob@x.io", HASH)
    assert rows(other, "SELECT id, email FROM users") == [(1, "bob@x.io")]


@pytest.mark.both_engines
@pytest.mark.parametrize("kind", [str, bytes])
def test_a_hash_is_read_back_in_the_type_it_was_given(db: DB, kind: type) -> None:
    hashed = bcrypt.hashpw(b"b4l0u", bcrypt.gensalt(COST))
    db.add_user("bob@x.io", hashed if kind is bytes else hashed.decode())
    found = db.find_user_by(email="bob@x.io").hashed_password
    assert type(found) is kind
    assert bcrypt.checkpw(b"b4l0u", found if isinstance(found, bytes) else found.encode())


@pytest.mark.both_engines
@pytest.mark.parametrize(
    ("first", "second"),
    [("bob@x.io", "BOB@X.IO"), ("é@x.io", "É@x.io"), ("ЖУК@x.io", "жук@X.io"), ("straße@x", "STRASSE@X")],
)
def test_an_email_has_one_account_in_any_letter_case(db: DB, first: str, second: str) -> None:
    user = db.add_user(first, HASH)
    with pytest.raises(AlreadyExists):
        db.add_user(second, NEW_HASH)
    assert user == db.find_user_by(email=first) == db.find_user_by(email=second) == User(1, first, HASH)


@pytest.mark.parametrize("name", ["email", "hashed_password"])
def test_a_user_with_values_that_cannot_be_stored_is_not_added(one_user: DB, name: str) -> None:
    for value in NOT_STORABLE[name]:
        with pytest.raises(ValueError, match=r".+"):
            one_user.add_user(**{"email": "eve@x.io", "hashed_password": HASH, name: value})
    with pytest.raises(NoResultFound):
        one_user.find_user_by(id=2)


@pytest.mark.both_engines
def test_the_id_of_a_deleted_user_is_never_reused(db: DB, eve: User, other: Any) -> None:
    other.execute("DELETE FROM users WHERE id = 2")
    assert db.add_user("carol@x.io", HASH).id == 3


@pytest.mark.both_engines
def test_one_of_many_threads_adds_an_email(db: DB, other: Any) -> None:
    def add(index: int) -> bool:
        try:
            return bool(db.add_user("Bob@x.io" if index % 2 else "bob@X.io", HASH))
        except AlreadyExists:
            return False

    assert sum(run_together(8, add)) == 1
    assert len(rows(other)) == 1


@pytest.mark.both_engines
def test_many_threads_read_and_write_at_the_same_time(db: DB) -> None:
    def add_and_find(index: int) -> bool:
        user = db.add_user(f"user{index}@x.io", HASH)
        db.update_user(user.id, session_id=f"session{index}")
        return db.find_user_by(email=user.email) == db.find_user_by(session_id=f"session{index}")

    assert all(run_together(12, add_and_find))
    assert [db.find_user_by(id=number).id for number in range(1, 13)] == list(range(1, 13))


def test_a_new_user_has_the_time_of_registration(db: DB) -> None:
    assert db.add_user("bob@x.io", HASH, NOW).created_at == NOW
    assert db.find_user_by(id=1) == User(1, "bob@x.io", HASH, created_at=NOW)


@pytest.mark.both_engines
def test_all_users_are_listed_in_the_order_of_their_ids(db: DB, eve: User, bob: User) -> None:
    carol = db.add_user("a@x.io", HASH)
    assert list(db.each_user()) == [bob, eve, carol]
    db.delete_user(2)
    assert list(db.each_user()) == [bob, carol]


@pytest.mark.both_engines
def test_the_list_of_users_is_one_snapshot(db: DB, eve: User, bob: User) -> None:
    listed = db.each_user()
    first = next(listed)
    db.add_user("carol@x.io", HASH)
    db.update_user(2, email="changed@x.io")
    assert [first, *listed] == [bob, eve]
    assert [user.email for user in db.each_user()] == ["bob@x.io", "changed@x.io", "carol@x.io"]


def test_all_named_attributes_must_match(db: DB, eve: User) -> None:
    assert db.find_user_by(id=2, email="eve@x.io", hashed_password=HASH) == eve
    with pytest.raises(NoResultFound):
        db.find_user_by(id=1, email="eve@x.io")


@pytest.mark.both_engines
@pytest.mark.parametrize("name", ["session_id", "reset_token", "hashed_password"])
def test_the_lowest_id_is_found_first(db: DB, eve: User, name: str) -> None:
    db.update_user(2, **{name: "same"})
    db.update_user(1, **{name: "same"})
    assert db.find_user_by(**{name: "same"}).id == 1


def test_a_lookup_without_names_is_invalid(db: DB, bob: User) -> None:
    with pytest.raises(InvalidRequestError):
        db.find_user_by()


@pytest.mark.parametrize("name", NOT_ATTRIBUTES)
def test_a_lookup_by_an_unknown_name_is_invalid_and_runs_no_sql(
    one_user: DB, engine_calls: list[str], name: str
) -> None:
    for names in {name: "x"}, {"email": "bob@x.io", name: "x"}, {name: None}:
        with pytest.raises(InvalidRequestError):
            one_user.find_user_by(**names)
    assert engine_calls == []


def test_a_lookup_by_an_unknown_name_is_invalid_on_an_empty_table(db: DB) -> None:
    for name in NOT_ATTRIBUTES:
        with pytest.raises(InvalidRequestError):
            db.find_user_by(**{name: "x"})


@pytest.mark.both_engines
@pytest.mark.parametrize("name", ["id", "email", "hashed_password", "session_id", "reset_token"])
def test_none_matches_nobody(one_user: DB, name: str) -> None:
    for names in {name: None}, {"id": 1, name: None}:
        with pytest.raises(NoResultFound):
            one_user.find_user_by(**names)


@pytest.mark.both_engines
@pytest.mark.parametrize("name", MATCHES_NOBODY)
def test_a_value_of_a_wrong_type_matches_nobody(one_user: DB, name: str) -> None:
    for value in MATCHES_NOBODY[name]:
        with pytest.raises(NoResultFound):
            one_user.find_user_by(**{name: value})


@pytest.mark.both_engines
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
def test_a_change_is_committed_to_that_row_only(db: DB, eve: User, other: Any, name: str, value: Any) -> None:
    db.update_user(1, **{name: value})
    assert rows(other, f"SELECT {name} FROM users ORDER BY id") == [(value,), (getattr(eve, name),)]
    assert db.find_user_by(**{name: value}).id == 1


def test_several_attributes_can_change_together(db: DB, bob: User) -> None:
    db.update_user(1, session_id="s", reset_token="t", hashed_password=NEW_HASH)
    assert db.find_user_by(id=1) == User(1, "bob@x.io", NEW_HASH, "s", "t")


@pytest.mark.both_engines
@pytest.mark.parametrize("name", ["session_id", "reset_token"])
def test_none_stores_null(db: DB, bob: User, other: Any, name: str) -> None:
    db.update_user(1, **{name: "value"})
    db.update_user(1, **{name: None})
    assert rows(other, f"SELECT {name} FROM users") == [(None,)]
    assert db.find_user_by(id=1) == bob


@pytest.mark.both_engines
def test_a_changed_email_is_found_and_frees_the_old_one(db: DB, bob: User) -> None:
    db.update_user(1, email="Éve@x.io")
    assert db.find_user_by(email="éVE@x.io").email == "Éve@x.io"
    assert db.add_user("bob@x.io", HASH).id == 2


@pytest.mark.both_engines
def test_a_user_cannot_take_the_email_of_another_account(db: DB, eve: User) -> None:
    with pytest.raises(AlreadyExists):
        db.update_user(2, email="BOB@x.io", session_id="new")
    assert db.find_user_by(id=2) == eve


@pytest.mark.parametrize("name", [*NOT_ATTRIBUTES, "id"])
def test_a_change_of_an_unknown_attribute_is_refused_and_runs_no_sql(
    one_user: DB, engine_calls: list[str], name: str
) -> None:
    for changed in {name: "x"}, {"session_id": "x", name: "x"}:
        for user_id in (1, 2):
            with pytest.raises(ValueError, match="can be updated"):
                one_user.update_user(user_id, **changed)
    assert engine_calls == []


@pytest.mark.both_engines
def test_a_change_of_an_unknown_user_is_refused(one_user: DB) -> None:
    user_ids: list[Any] = [0, 2, -1, "1", 1.0, True, None, [1], "1 OR 1=1", 2**63]
    for user_id, changed in itertools.product(user_ids, [{"session_id": "x"}, {}]):
        with pytest.raises(NoResultFound):
            one_user.update_user(user_id, **changed)
    assert one_user.find_user_by(id=1) == BOB


@pytest.mark.both_engines
@pytest.mark.parametrize("name", NOT_STORABLE)
def test_a_value_that_the_column_cannot_hold_is_refused(one_user: DB, name: str) -> None:
    for value in NOT_STORABLE[name]:
        with pytest.raises(ValueError, match=r".+"):
            one_user.update_user(1, **{"session_id": "x", name: value})
        assert one_user.find_user_by(email="bob@x.io") == BOB


@pytest.mark.both_engines
def test_only_the_current_hash_is_replaced(db: DB, eve: User) -> None:
    db.replace_hash(1, NEW_HASH, b"lost")
    assert db.find_user_by(id=1).hashed_password == HASH
    db.replace_hash(1, HASH, NEW_HASH)
    assert [db.find_user_by(id=number).hashed_password for number in (1, 2)] == [NEW_HASH, HASH]
