"""Transactions are complete or leave no trace, and every lookup uses an index."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from storage import DB, User
from tests import stored_users
from tests.stored_users import (
    HASH,
    LOOKUPS,
    NEW_HASH,
    NOW,
    add_expiring_rows,
    add_session,
    all_rows,
    begin_totp,
    find_session,
    prune,
    rows,
    set_reset_token,
    spend_token,
)

statements = stored_users.statements
bob = stored_users.bob
eve = stored_users.eve
populated = stored_users.populated


def fail_at(db: DB, other: Any, event: str) -> None:
    """Make every statement fail that does this."""
    if db._engine.name == "SQLite":
        other.execute(f"CREATE TRIGGER stop BEFORE {event} BEGIN SELECT RAISE(ABORT, 'stop'); END")
        return
    other.execute(
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'stop' USING ERRCODE = 'check_violation'; END $$"
    )
    other.execute(f"CREATE TRIGGER stop BEFORE {event} FOR EACH ROW EXECUTE FUNCTION stop()")


def work_again(db: DB, other: Any, event: str) -> None:
    other.execute("DROP TRIGGER stop" if db._engine.name == "SQLite" else f"DROP TRIGGER stop ON {event.split()[-1]}")


# For each method: the event at which it fails, and a call.
HALFWAY: dict[str, tuple[str, Callable[[DB], object]]] = {
    "add_session": ("DELETE ON sessions", lambda db: add_session(db, db.find_user_by(id=1), "s", replaced="bob1")),
    "change_password": ("DELETE ON sessions", lambda db: db.change_password(1, HASH, NEW_HASH, "bob1", "renewed")),
    "change_password at its end": (
        "UPDATE OF session_id ON users",
        lambda db: db.change_password(1, HASH, NEW_HASH, "bob1", "renewed"),
    ),
    "disable_user": ("DELETE ON sessions", lambda db: db.disable_user(1, NOW)),
    "delete_user": ("DELETE ON known_addresses", lambda db: db.delete_user(1)),
    "delete_verified_user": (
        "DELETE ON recovery_codes",
        lambda db: db.delete_verified_user(db.find_user_by(id=1), "bob1"),
    ),
    "end_session": ("UPDATE OF session_id ON users", lambda db: db.end_session("bob2")),
    "end_sessions": ("UPDATE OF session_id ON users", lambda db: db.end_sessions(1, kept="bob1")),
    "end_sessions and devices": ("DELETE ON sessions", lambda db: db.end_sessions(1, devices=True)),
    "end_all_sessions": ("DELETE ON sessions", lambda db: db.end_all_sessions()),
    "spend_reset": ("DELETE ON sessions", lambda db: spend_token(db, "bob token")),
    "confirm_totp": (
        "DELETE ON sessions",
        lambda db: db.confirm_totp(db.find_user_by(id=3), 1000, ["a"], now=NOW, kept="carol1", renewed="renewed"),
    ),
    "remove_totp": ("DELETE ON sessions", lambda db: db.remove_totp(1)),
    "remove_totp from one session": ("DELETE ON sessions", lambda db: db.remove_totp(1, "bob1", "renewed")),
    "prune": ("UPDATE OF session_id ON users", lambda db: prune(db)),
}


def test_every_lookup_searches_an_index(statements: list[str], db: DB, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    set_reset_token(db, 1)
    for name, lookup in LOOKUPS.items():
        statements.clear()
        lookup(db)
        lookups = [one for one in statements if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE)", one)]
        lookups = [one for one in lookups if "VALUES" not in one]  # nothing is looked up to insert a row
        assert lookups, name
        for statement in lookups:
            plan = [detail for *_, detail in rows(other, f"EXPLAIN QUERY PLAN {statement}")]
            plan = [detail for detail in plan if not detail.startswith("SCAN json_each")]  # the given keys, no table
            assert any(detail.startswith("SEARCH") for detail in plan), (name, plan)
            assert not [detail for detail in plan if detail.startswith("SCAN")], (name, plan)


def test_rows_that_refer_to_a_deleted_user_are_found_by_an_index(other: Any) -> None:
    references = rows(other, 'SELECT m.name, f."from" FROM sqlite_schema m, pragma_foreign_key_list(m.name) f')
    assert len(references) == 6
    for table, column in references:
        plan = [detail for *_, detail in rows(other, f"EXPLAIN QUERY PLAN DELETE FROM {table} WHERE {column} = 1")]
        assert all(detail.startswith("SEARCH") for detail in plan), (table, plan)


@pytest.mark.both_engines
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_failed_transaction_is_rolled_back(db: DB, bob: User, other: Any, error: type[BaseException]) -> None:
    def fail() -> None:
        with db._engine.transaction() as writer:
            writer.execute("UPDATE users SET session_id = 'half'")
            raise error

    with pytest.raises(error):
        fail()
    assert rows(other, "SELECT session_id FROM users") == [(None,)]
    db.update_user(1, session_id="next")
    assert rows(other, "SELECT session_id FROM users") == [("next",)]


@pytest.mark.both_engines
def test_a_spent_token_is_live_again_after_a_failed_transaction(db: DB, bob: User, other: Any) -> None:
    add_session(db, bob, "s")
    set_reset_token(db, 1)
    before = db.find_user_by(id=1)
    fail_at(db, other, "DELETE ON sessions")
    with pytest.raises(ValueError, match="stop"):
        spend_token(db)
    assert find_session(db, "s") == before
    work_again(db, other, "DELETE ON sessions")
    assert spend_token(db)


@pytest.mark.both_engines
@pytest.mark.parametrize("method", HALFWAY)
def test_a_method_that_fails_halfway_changes_nothing(populated: None, db: DB, other: Any, method: str) -> None:
    carol = db.add_user("carol@x.io", HASH)
    for name in "carol2", "carol1":
        add_session(db, carol, name)
    assert begin_totp(db, 3)
    add_expiring_rows(other)
    link = {"email": "new@x.io", "email_key": "new@x.io", "token_hash": "token", "expires_at": NOW + 1000}
    db.emails.add_registration(link)
    assert db.emails.set_change("bob1", link)
    event, call = HALFWAY[method]
    fail_at(db, other, event)
    before = all_rows(other)
    with pytest.raises(ValueError, match="stop"):
        call(db)
    assert all_rows(other) == before
    work_again(db, other, event)
    call(db)
    assert all_rows(other) != before
