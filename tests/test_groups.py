"""Groups: the rules, the rows on both engines, and the operator's commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from auth import MAX_GROUPS, Auth, GroupRejected, NotAMember, UnknownEmail, check_groups
from storage import DB, User
from tests import stored_users, test_commands
from tests.cases import each
from tests.conftest import Client
from tests.documents import commands_in
from tests.routes import cookie_of, log_in, register
from tests.stored_users import HASH, rows, run_together
from tests.test_commands import Run

statements = stored_users.statements
bob = stored_users.bob
logged = test_commands.logged
run = test_commands.run
people = test_commands.people

NO_GROUPS = ["", "A", "-a", "_a", "a b", "a,b", "a.b", "a\n", "\na", "é", "a\u0661", "a" * 65, "a" * 10_000, "*", "a\0"]


# The rules


@each("name", ["a", "0", "wiki", "a-b_c", "0-", "a" * 64])
def test_a_name_of_a_group_is_lower_case_letters_digits_and_marks(name: str) -> None:
    assert check_groups([name]) == name


@each("name", NO_GROUPS)
def test_another_name_is_no_group(name: str) -> None:
    with pytest.raises(GroupRejected, match="a group is up to 64 of a-z, 0-9, _ and -") as refused:
        check_groups(["wiki", name])
    assert refused.value.status == 400


def test_groups_are_stored_sorted_and_once() -> None:
    assert check_groups(["wiki", "admin", "wiki", "0"]) == "0,admin,wiki"
    assert check_groups([]) == ""


def test_a_user_is_in_at_most_32_groups() -> None:
    names = [f"g{number}" for number in range(MAX_GROUPS)]
    assert len(check_groups(names).split(",")) == MAX_GROUPS == 32
    with pytest.raises(GroupRejected, match="at most 32 groups"):
        check_groups([*names, "one-more"])


@each(
    ("held", "asked", "member"),
    [
        ("wiki", {"wiki"}, True),
        ("admin,wiki", {"wiki", "other"}, True),
        ("admin,wiki", {"other"}, False),
        ("admin,wiki", {"admin,wiki"}, False),
        ("wikis", {"wiki"}, False),
        ("", {"wiki"}, False),
        ("", {""}, False),
        ("wiki", set(), False),
    ],
)
def test_only_a_member_of_one_of_the_groups_is_let_in(held: str, asked: set[str], member: bool) -> None:
    rules = Auth.__new__(Auth)
    user = User(5, "bob@x.io", HASH, groups=held)
    if member:
        rules.require_member(user, asked)
        return
    with pytest.raises(NotAMember, match="not allowed here") as refused:
        rules.require_member(user, asked)
    assert (refused.value.status, refused.value.event, refused.value.user_id) == (403, "authz_verify_fail", 5)


# The rows


@pytest.mark.both_engines
def test_a_user_is_added_to_groups_and_removed(db: DB, auth: Auth, bob: User) -> None:
    db.add_user("eve@x.io", HASH)
    assert db.find_user_by(id=bob.id).groups == ""
    for group, member, changed, groups in [
        ("wiki", True, True, "wiki"),
        ("admin", True, True, "admin,wiki"),
        ("wiki", True, False, "admin,wiki"),
        ("wiki", False, True, "admin"),
        ("wiki", False, False, "admin"),
        ("admin", False, True, ""),
        ("admin", False, False, ""),
    ]:
        assert auth.change_groups(auth.find_user("bob@x.io"), group, member=member) is changed
        assert [user.groups for user in db.each_user()] == [groups, ""]


@pytest.mark.both_engines
def test_a_refused_change_of_groups_changes_nothing(db: DB, auth: Auth, bob: User) -> None:
    names = check_groups(f"g{number}" for number in range(MAX_GROUPS))
    assert db.set_groups(bob, names)
    for group, member in [("one-more", True), ("A", True), ("A", False), ("g1,g2", False)]:
        with pytest.raises(GroupRejected):
            auth.change_groups(auth.find_user("bob@x.io"), group, member=member)
    assert db.find_user_by(id=bob.id).groups == names


@pytest.mark.both_engines
def test_a_change_of_groups_knows_what_others_changed_meanwhile(db: DB, auth: Auth, bob: User) -> None:
    assert db.set_groups(bob, "admin")
    assert not db.set_groups(bob, "wiki")  # this is no longer what the row holds
    assert auth.change_groups(bob, "wiki", member=True)
    assert db.find_user_by(id=bob.id).groups == "admin,wiki"
    db.delete_user(bob.id)
    with pytest.raises(UnknownEmail):
        auth.change_groups(bob, "other", member=True)


@pytest.mark.both_engines
def test_groups_that_are_added_at_the_same_time_are_all_kept(db: DB, auth: Auth, bob: User) -> None:
    run_together(4, lambda index: auth.change_groups(bob, f"g{index}", member=True))
    assert db.find_user_by(id=bob.id).groups == "g0,g1,g2,g3"


@pytest.mark.both_engines
def test_groups_survive_what_ends_sessions(db: DB, auth: Auth, bob: User) -> None:
    auth.change_groups(bob, "wiki", member=True)
    auth.rename(bob, "rob@x.io")
    db.disable_user(bob.id, 1)
    db.enable_user(bob.id)
    db.end_all_sessions()
    assert auth.find_user("rob@x.io").groups == "wiki"


def test_a_verification_with_groups_is_one_indexed_look_up(
    statements: list[str], call: Client, db: DB, other: Any
) -> None:
    register(call)
    cookie = cookie_of(log_in(call))
    assert db.set_groups(db.find_user_by(id=1), "admin,wiki")
    statements.clear()
    assert call("GET", "/verify?group=other&group=wiki", cookie=cookie).status == 200
    (lookup,) = [one for one in statements if one.strip() not in ("BEGIN", "COMMIT")]
    plan = [detail for *_, detail in rows(other, f"EXPLAIN QUERY PLAN {lookup}")]
    assert plan
    assert all(detail.startswith("SEARCH") for detail in plan), plan


# The commands


@pytest.mark.both_engines
def test_the_operator_changes_and_lists_groups(run: Run, people: Auth) -> None:
    done = [
        run("group", *command.split())
        for command in (
            *("add eve@x.io wiki", "add BOB@x.io wiki", "add bob@x.io wiki", "remove bob@x.io admin"),
            *("remove bob@x.io admin", "add eve@x.io admin", "add bob@x.io 0"),
        )
    ]
    assert [result.code for result in done] == [0] * 7
    assert [result.out for result in done] == [
        "eve@x.io: added to wiki\n",
        "bob@x.io: added to wiki\n",
        "bob@x.io: already in wiki\n",
        "bob@x.io: removed from admin\n",
        "bob@x.io: not in admin\n",
        "eve@x.io: added to admin\n",
        "bob@x.io: added to 0\n",
    ]
    lines = [[(line["event"], line["user_id"], line["changed"]) for line in result.log] for result in done]
    bob, eve = ([("user_updated", number, "groups")] for number in (1, 2))
    assert lines == [eve, bob, [], bob, [], eve, bob]
    pairs = [("0", "bob@x.io"), ("admin", "eve@x.io"), ("wiki", "bob@x.io"), ("wiki", "eve@x.io")]
    assert run("group", "list").out == "".join(f"{group}  {email}\n" for group, email in pairs)
    assert run("group", "list", "--json").records == [{"group": group, "email": email} for group, email in pairs]
    assert run("group", "list", "EVE@x.io").out == "admin  eve@x.io\nwiki  eve@x.io\n"
    assert run("group", "add", "bob@x.io", "wiki", "--json").records == [
        {"group": "wiki", "email": "bob@x.io", "member": True}
    ]
    assert run("user", "show", "eve@x.io", "--json").records[0]["groups"] == "admin wiki"


def test_a_user_without_groups_is_shown_with_a_hyphen(run: Run, people: Auth) -> None:
    assert "groups        -\n" in run("user", "show", "eve@x.io").out
    assert run("group", "list", "eve@x.io").out == ""


@pytest.mark.parametrize("verb", ["add", "remove"])
@pytest.mark.parametrize("group", ["Wiki", "a b", "", "é", "a\x1b[2J"])
def test_the_commands_refuse_what_is_no_group(run: Run, people: Auth, verb: str, group: str) -> None:
    result = run("group", verb, "bob@x.io", group)
    assert (result.code, result.out, result.log) == (1, "", [])
    assert result.err == ["authsvc: a group is up to 64 of a-z, 0-9, _ and -, and begins with a letter or a digit"]
    assert people.find_user("bob@x.io").groups == "admin"


@pytest.mark.parametrize("command", ["add bob@x.io", "remove wiki", "list bob@x.io wiki", ""])
def test_wrong_usage_of_a_command_about_groups_exits_with_2(run: Run, command: str) -> None:
    assert run("group", *command.split()).code == 2


@pytest.mark.both_engines
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_exported_groups_are_imported_again(run: Run, people: Auth, form: str) -> None:
    for group in ("none", "wiki"):
        run("group", "add", "bob@x.io", group)
    before = run("group", "list").out
    assert run("export", f"out.{form}").code == 0
    for name in ("bob", "eve"):
        run("user", "delete", f"{name}@x.io", "--yes")
    assert run("import", f"out.{form}").out == "2 users imported\n"
    assert run("group", "list").out == before == "admin  bob@x.io\nnone  bob@x.io\nwiki  bob@x.io\n"


def test_an_import_with_a_wrong_group_names_the_line(run: Run, people: Auth, tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("email,groups\na@x.io,wiki\nb@x.io,wiki Admin\nc@x.io,\n")
    result = run("import", "users.csv")
    assert (result.code, result.log) == (1, [])
    assert result.err[0].startswith("users.csv:3: groups 'wiki Admin': a group is up to 64 of ")
    assert run("group", "list").out == "admin  bob@x.io\n"


def test_the_page_for_operators_shows_what_the_commands_print(run: Run, db: DB) -> None:
    db.add_user("bob@example.com", HASH)
    lines = commands_in("docs/operations.md", "$ authsvc group add").splitlines()
    printed = [run(*line.split()[2:]).out.strip() for line in lines if line.startswith("$ ")]
    assert printed == [line for line in lines if not line.startswith("$ ")]
