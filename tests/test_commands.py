"""The operator's commands: in this process where possible, otherwise in a process of their own."""

from __future__ import annotations

import json
import os
import pty
import pwd
import re
import resource
import socket
import sqlite3
import stat
import subprocess
import sys
import syslog
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests

import authsvc
import log
from auth import UNCOUNTED, Auth, Caller
from cli import commands
from cli.operator import login_name
from credentials import totp
from engines import sqlite_files
from settings import Settings
from storage import DB, User
from tests.cases import each
from tests.conftest import BOUND, COST, HERE, Service, clean_environ
from tests.crowd import awaited
from tests.ports import fixed_port

HASH = "$2b$12$" + "a" * 21 + "e" + "b" * 31

Run = Callable[..., "Result"]


class Result:
    """The result of a command: exit code, standard output, and standard error without and with the log."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        lines = err.splitlines()
        self.log = [json.loads(line) for line in lines if line.startswith("{")]
        self.err = [line for line in lines if not line.startswith("{")]

    @property
    def records(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def path(settings: Settings) -> Path:
    return Path(settings.database)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines that were sent to syslog."""
    lines: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lines.append)
    return lines


@pytest.fixture
def run(
    database: str,
    tmp_path: Path,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTHSVC_DATABASE", database)
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", str(COST))
    monkeypatch.setattr(sys, "argv", [str(HERE / "authsvc.py")])

    def run_one(*arguments: str) -> Result:
        capsys.readouterr()
        try:
            code = authsvc.main(list(arguments))
        except SystemExit as ended:  # raised by argparse
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return Result(code, printed.out, printed.err)

    return run_one


@pytest.fixture
def people(settings: Settings) -> Iterator[Auth]:
    """Two users: bob with a session, a second factor and a group, and eve. Return the rules on their database."""
    auth = Auth(DB(settings.database), settings)
    auth.register_user("bob@x.io", "b4l0u")
    auth.register_user("eve@x.io", "3v3")
    auth.change_groups(auth.find_user("bob@x.io"), "admin", member=True)
    session_id = auth.log_in("bob@x.io", "b4l0u", caller=Caller("192.0.2.1", agent="curl\x1b[2J\x07"))[1]
    seed, _, _, session_id = auth.begin_totp(session_id, "b4l0u", caller=UNCOUNTED)
    auth.confirm_totp(session_id, totp.code(seed, int(time.time()) // totp.STEP), caller=UNCOUNTED)
    yield auth
    auth.close()


def run_process(*arguments: str, database: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environ = clean_environ() | {"AUTHSVC_DATABASE": str(database), "AUTHSVC_BCRYPT_COST": str(COST)}
    return subprocess.run(
        [sys.executable, HERE / "authsvc.py", *arguments],
        env=environ | options.pop("env", {}),
        text=True,
        capture_output=True,
        timeout=120,
        cwd=database.parent,
        **options,
    )


def run_bound(*arguments: str, database: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as a user whom permissions bind."""
    environ = {"AUTHSVC_DATABASE": str(database), "AUTHSVC_BCRYPT_COST": str(COST)}
    return subprocess.run(
        [*BOUND, sys.executable, HERE / "authsvc.py", *arguments],
        env=clean_environ() | environ,
        text=True,
        capture_output=True,
        timeout=120,
        **{"cwd": database.parent, **options},
    )


# All commands

COMMANDS: list[list[str]] = [
    ["user", "add", "carol@x.io"],
    ["user", "list"],
    ["user", "show", "bob@x.io"],
    ["user", "disable", "bob@x.io"],
    ["user", "enable", "bob@x.io"],
    ["user", "rename", "bob@x.io", "rob@x.io"],
    ["user", "delete", "bob@x.io", "--yes"],
    ["group", "add", "bob@x.io", "wiki"],
    ["group", "remove", "bob@x.io", "admin"],
    ["group", "list"],
    ["group", "list", "bob@x.io"],
    ["invite", "carol@x.io"],
    ["reset-link", "bob@x.io"],
    ["sessions", "list", "bob@x.io"],
    ["sessions", "end", "bob@x.io"],
    ["sessions", "end", "--all"],
    ["totp-off", "bob@x.io"],
    ["import", "users.csv"],
    ["export", "out.csv"],
    ["backup", "copy.db"],
    ["check"],
    ["prune"],
]
EVENTS = {
    "user add": "user_created",
    "user disable": "user_disabled",
    "user enable": "user_enabled",
    "user delete": "user_deleted",
    "user rename": "user_updated",
    "group add": "user_updated",
    "group remove": "user_updated",
    "invite": "user_invited",
    "reset-link": "authn_reset_token_created",
    "sessions end": "session_ended",
    "totp-off": "authn_factor_removed",
    "import": "users_imported",
    "export": "users_exported",
    "backup": "sys_backup",
    "prune": "sys_prune",
}


@pytest.mark.both_engines
@each("command", COMMANDS)
def test_a_command_creates_no_database(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "users.csv").write_text(f"email,hash\na@x.io,{HASH}\n")
    result = run(*command)
    assert result.code == 1
    assert command == ["check"] or re.fullmatch(
        r"authsvc: .*no such file.*|authsvc: there is no database .*", result.err[-1], re.I
    )
    assert {file.name for file in tmp_path.iterdir()} == {"users.csv"}


@pytest.mark.both_engines
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_prints_json_and_logs_its_change(
    run: Run, people: Auth, engine: str, tmp_path: Path, logged: list[str], command: list[str]
) -> None:
    (tmp_path / "users.csv").write_text(f"email,hash\ncarol@x.io,{HASH}\n")
    result = run(*command, "--json")
    if engine == "postgres" and command[0] == "backup":
        assert (result.code, logged, result.out) == (1, [], "")
        return
    assert (result.code, result.err) == (0, [])
    assert all(isinstance(record, dict) for record in result.records)
    name = " ".join(command[:2]) if command[0] in commands.GROUPS else command[0]
    events = [line["event"] for line in result.log]
    assert events == [json.loads(line)["event"] for line in logged]
    assert ([EVENTS[name]] if name in EVENTS else []) == events[-1:]
    assert all(line["operator"] for line in result.log)
    secrets = re.findall(r"\$2b|b4l0u|3v3|[A-Z2-7]{32}", result.out + str(result.log) + str(logged))
    assert not secrets


def test_a_command_writes_its_log_lines_itself(run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "direct", False)  # the thread would not find the standard error that pytest puts there
    assert [line["event"] for line in run("user", "disable", "eve@x.io").log] == ["user_disabled"]


@pytest.mark.parametrize(
    "command",
    [
        *(["user", verb, "nobody@x.io"] for verb in ("show", "disable", "enable")),
        ["user", "delete", "nobody@x.io", "--yes"],
        *([verb, "nobody@x.io"] for verb in ("reset-link", "totp-off")),
        *(["sessions", verb, "nobody@x.io"] for verb in ("list", "end")),
        *(["group", verb, "nobody@x.io", "admin"] for verb in ("add", "remove")),
        ["group", "list", "nobody@x.io"],
    ],
    ids=" ".join,
)
def test_an_unknown_email_is_refused(run: Run, people: Auth, command: list[str]) -> None:
    result = run(*command)
    assert (result.code, result.out, result.err, result.log) == (1, "", ["authsvc: unknown email"], [])


@pytest.mark.parametrize(
    "command",
    [
        *(["nonsense"], ["user"], ["user", "nonsense"], ["user", "show"], ["sessions", "end"]),
        *(
            ["sessions", "end", "bob@x.io", "--all"],
            ["sessions", "end", "--al"],
            ["import"],
            ["backup"],
            ["--nonsense"],
            *([name, "-"] for name in ("backup", "restore", "copy-to")),
        ),
        ["export", "--format", "xml"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(run: Run, command: list[str]) -> None:
    result = run(*command)
    assert (result.code, result.out, result.err[0].partition(" ")[0]) == (2, "", "usage:")
    assert [line for line in result.err[1:] if not line.startswith(" ")] == result.err[-1:]  # a long usage is folded


@pytest.mark.parametrize("secret", ["postgresql://u:canary@db/x", "u:x canary@db", "host=db password=canary"])
@pytest.mark.parametrize(
    "command",
    ["", "user", "user list", "user show a@x", "export x.csv", "export --format", "backup --json", "--version"],
)
def test_wrong_usage_shows_no_password(run: Run, command: str, secret: str) -> None:
    for arguments in [*command.split(), secret], [*command.split(), f"--password={secret}"]:
        result = run(*arguments)
        assert (result.code, result.out) == (2, "")
        assert "canary" not in "".join(result.err)


def test_wrong_usage_names_the_options_but_no_words(run: Run) -> None:
    result = run("user", "add", "--password", "bob@x.io", "canary")
    assert result.err[-1] == "authsvc.py: error: unrecognized arguments: --password …"


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_is_printed(run: Run, command: list[str]) -> None:
    result = run(*command[: 2 if command and command[0] in commands.GROUPS else 1], "--help")
    assert result.code == 0
    assert result.out.startswith("usage: authsvc.py")


@pytest.mark.parametrize("group", commands.GROUPS)
def test_the_help_of_a_group_names_its_commands(run: Run, group: str) -> None:
    verbs = [names.split()[1] for names, *_ in commands.COMMANDS if names.split()[0] == group]
    assert len(verbs) > 1
    assert f" {group} {', '.join(verbs)} " in " ".join(run("--help").out.split())


@pytest.mark.parametrize(
    ("started", "name"),
    [
        ("/root/.local/bin/authsvc", "authsvc"),  # installed by uv, pipx or pip
        ("/opt/authsvc/authsvc.pyz", "authsvc"),  # as the command of deploy/ starts it
        ("./authsvc.py", "authsvc.py"),
    ],
)
def test_the_usage_names_the_command(run: Run, monkeypatch: pytest.MonkeyPatch, started: str, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert run("user", "list", "--help").out.startswith(f"usage: {name} user list ")


def test_the_version_is_the_one_of_the_project(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_REGISTRATION", "ask")  # a wrong setting hides no version
    version = re.search('^version = "(.+)"$', (HERE / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    result = run("--version")
    assert (result.code, result.out, result.err) == (0, f"authsvc {version[1]}\n", [])


def test_a_wrong_setting_exits_with_2(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_REGISTRATION", "ask")
    result = run("user", "list")
    assert (result.code, len(result.err)) == (2, 1)
    assert result.err[0].startswith("authsvc: AUTHSVC_REGISTRATION=ask must be one of open, invitation, closed")


def test_the_log_names_the_operator_by_the_login_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ceo")
    monkeypatch.setattr(os, "getlogin", lambda: "ops")
    assert login_name() == "ops"

    def no_terminal() -> str:
        raise OSError

    monkeypatch.setattr(os, "getlogin", no_terminal)
    assert login_name() != "ceo"
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    assert login_name() == "54321"


# Users


def test_users_are_listed_and_shown(run: Run, people: Auth) -> None:
    run("user", "add", "carol@x.io")
    run("user", "disable", "eve@x.io")
    assert [line.split() for line in run("user", "list").out.splitlines()] == [
        ["1", "active", "2fa", "bob@x.io"],
        ["2", "disabled", "-", "eve@x.io"],
        ["3", "invited", "-", "carol@x.io"],
    ]
    shown = dict(line.split() for line in run("user", "show", "BOB@x.io").out.splitlines())
    assert shown.pop("created").endswith("Z")
    assert shown == {
        "id": "1",
        "email": "bob@x.io",
        "state": "active",
        "second_factor": "yes",
        "groups": "admin",
        "passkeys": "0",
        "sessions": "1",
        "access_tokens": "0",
    }


@pytest.mark.both_engines
def test_a_disabled_user_cannot_sign_in_until_enabled(run: Run, people: Auth) -> None:
    session_id = people.log_in("eve@x.io", "3v3", caller=UNCOUNTED)[1]
    run("user", "disable", "eve@x.io")
    assert people.get_user_from_session_id(session_id) is None
    assert not people.valid_login("eve@x.io", "3v3")
    assert run("reset-link", "eve@x.io").err == ["authsvc: eve@x.io is disabled: enable the user first"]
    run("user", "enable", "eve@x.io")
    assert people.valid_login("eve@x.io", "3v3")


def test_a_deletion_without_a_terminal_needs_yes(run: Run, people: Auth) -> None:
    assert run("user", "delete", "bob@x.io").err == [
        "authsvc: cannot ask for confirmation without a terminal: add --yes"
    ]
    assert people.find_user("bob@x.io")
    assert run("user", "delete", "bob@x.io", "--yes").code == 0
    assert run("user", "show", "bob@x.io").code == 1


@pytest.mark.process
@pytest.mark.parametrize(("typed", "deleted"), [("y\n", True), ("yes\n", True), ("n\n", False), ("\n", False)])
def test_a_deletion_asks_at_a_terminal(people: Auth, path: Path, typed: str, deleted: bool) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    done = run_process("user", "delete", "bob@x.io", database=path, stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert "Delete bob@x.io and all their data?" in done.stdout
    assert done.returncode == (0 if deleted else 1)
    assert ("bob@x.io" in [user.email for user in people._db.each_user()]) is not deleted


@pytest.mark.both_engines
def test_an_invitation_sets_the_first_password_once(run: Run, people: Auth) -> None:
    link = run("invite", "carol@x.io").out.strip()
    found = re.fullmatch(r"http://127\.0\.0\.1:5000/reset#token=([0-9a-f-]{36})&email=carol%40x\.io", link)
    assert found
    assert run("user", "show", "carol@x.io", "--json").records[0]["state"] == "invited"
    people.update_password(found[1], "c4r0l")
    assert people.valid_login("carol@x.io", "c4r0l")
    assert run("invite", "carol@x.io").err == ["authsvc: carol@x.io already has a password: use reset-link"]
    with pytest.raises(ValueError, match="invalid reset token"):
        people.update_password(found[1], "again")


@pytest.mark.parametrize("listen", ["[::]:5000", "[::ffff:0.0.0.0]:5000", "0.0.0.0:80", "[0:0::0]:0", "localhost:0"])
@pytest.mark.parametrize("command", ["invite carol@x.io", "reset-link eve@x.io", "reset-link eve@x.io --json"])
def test_no_link_is_made_that_no_browser_can_open(
    run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch, listen: str, command: str
) -> None:
    monkeypatch.setenv("AUTHSVC_LISTEN", listen)
    monkeypatch.setenv("AUTHSVC_UNSAFE_LISTEN", "1")
    token = people.get_reset_password_token("eve@x.io")
    result = run(*command.split())
    refused = f"authsvc: no browser can open AUTHSVC_LISTEN={listen}: set AUTHSVC_PUBLIC_URL"
    assert (result.code, result.out, result.err, result.log) == (1, "", [refused], [])
    assert [user.email for user in people._db.each_user()] == ["bob@x.io", "eve@x.io"]
    people.update_password(token, "t4rt1fl3tt3")  # no other link has replaced it


@pytest.mark.parametrize(
    ("command", "event"), [("invite eve2@x.io", "user_invited"), ("reset-link bob@x.io", "authn_r")]
)
def test_a_link_that_cannot_be_printed_is_logged(
    run: Run, people: Auth, logged: list[str], monkeypatch: pytest.MonkeyPatch, command: str, event: str
) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(*command.split()).code == 1
    assert json.loads(logged[-1])["event"].startswith(event)


def test_an_address_that_no_browser_can_open_does_not_matter_in_production(
    run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTHSVC_LISTEN", "[::]:0")
    monkeypatch.setenv("AUTHSVC_PUBLIC_URL", "https://auth.example.com:443")
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "10")
    assert run("invite", "carol@x.io").out.startswith("https://auth.example.com/reset#token=")


def test_closed_registration_allows_no_invitation(run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_REGISTRATION", "closed")
    refused = "authsvc: AUTHSVC_REGISTRATION=closed allows no invitations: set it to invitation or open"
    assert run("invite", "carol@x.io").err == [refused]
    assert run("user", "show", "carol@x.io").code == 1


@pytest.mark.both_engines
def test_a_reset_link_begins_with_the_public_url(
    run: Run, people: Auth, engine: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTHSVC_PUBLIC_URL", "https://auth.example.com")
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "10")
    (record,) = run("reset-link", "bob@x.io", "--json").records
    assert record["link"] == f"https://auth.example.com/reset#token={record['reset_token']}&email=bob%40x.io"
    assert re.fullmatch("[A-Za-z0-9_-]{43}", record["reset_token"])
    people.update_password(record["reset_token"], "n3w p4ssw0rd of bob")
    if engine == "sqlite":
        Path(database).chmod(0o644)
        assert "chmod 600" in run("user", "list").err[0]


@pytest.mark.both_engines
def test_two_factor_authentication_is_disabled(run: Run, people: Auth) -> None:
    assert run("totp-off", "bob@x.io").code == 0
    assert people.log_in("bob@x.io", "b4l0u", caller=UNCOUNTED)[1]
    assert run("totp-off", "bob@x.io").err == ["authsvc: bob@x.io does not use two-factor authentication"]


# Sessions


def test_a_list_of_sessions_contains_no_control_characters(run: Run, people: Auth) -> None:
    (line,) = run("sessions", "list", "bob@x.io").out.splitlines()
    assert re.fullmatch(r"[0-9a-f]{16}(  [0-9TZ:-]{20}){3}  192\.0\.2\.1  curl\?\[2J\?", line)
    (record,) = run("sessions", "list", "bob@x.io", "--json").records
    assert record["user_agent"] == "curl\x1b[2J\x07"


@pytest.mark.both_engines
@pytest.mark.parametrize("chosen", ["bob@x.io", "--all"])
def test_sessions_are_ended(run: Run, people: Auth, chosen: str) -> None:
    session_id = people.log_in("eve@x.io", "3v3", caller=UNCOUNTED)[1]
    pending = {"registrations": 0, "email_changes": 0, "access_tokens": 0} if chosen == "--all" else {}
    assert run("sessions", "end", chosen, "--json").records == [pending | {"ended": 2 if chosen == "--all" else 1}]
    assert run("sessions", "list", "bob@x.io").out == ""
    assert (people.get_user_from_session_id(session_id) is None) is (chosen == "--all")


@pytest.mark.both_engines
@pytest.mark.parametrize("chosen", ["bob@x.io", "--all"])
def test_sessions_end_voids_the_device_cookies_of_these_users(run: Run, people: Auth, chosen: str) -> None:
    keys = set()
    for number in range(3):
        before = device_keys(people)
        assert run("sessions", "end", chosen, "--json").records[0]["ended"] == (0 if number else 1)
        bob, eve = device_keys(people)
        assert bob not in (None, before[0])
        assert (eve != before[1]) is (chosen == "--all")
        keys.add(bob)
    assert len(keys) == 3


def device_keys(people: Auth) -> list[str | None]:
    return [user.device_key for user in people._db.each_user()]


# Emails


@pytest.mark.both_engines
def test_a_user_is_renamed(run: Run, people: Auth) -> None:
    session_id, token = people.create_session("eve@x.io"), people.get_reset_password_token("eve@x.io")
    result = run("user", "rename", "eve@x.io", "Eva@x.io")
    assert result.out == "renamed eve@x.io to Eva@x.io; all sessions ended\n"
    assert [(line["event"], line["user_id"], line["changed"]) for line in result.log] == [("user_updated", 2, "email")]
    assert people.get_user_from_session_id(session_id) is None
    assert people.valid_login("eva@x.io", "3v3")
    with pytest.raises(ValueError, match="invalid reset token"):
        people.update_password(token, "t4rt1fl3tt3")
    record = {"email": "eva@x.io", "former_email": "Eva@x.io"}
    assert run("user", "rename", "eva@x.io", "eva@x.io", "--json").records == [record]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("nobody@x.io", "new@x.io", "unknown email"),
        ("eve@x.io", "BOB@x.io", "User BOB@x.io already exists"),
        ("eve@x.io", " ", "email must not be blank"),
    ],
)
@pytest.mark.both_engines
def test_a_refused_rename_changes_nothing(run: Run, people: Auth, old: str, new: str, problem: str) -> None:
    session_id = people.create_session("eve@x.io")
    result = run("user", "rename", old, new)
    assert (result.code, result.err) == (1, [f"authsvc: {problem}"])
    assert people.get_user_from_session_id(session_id)


@pytest.mark.both_engines
def test_an_email_that_was_given_up_is_released(
    run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AUTHSVC_PUBLIC_URL", "https://auth.example.com")
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "10")
    if "postgresql" not in people._settings.database:
        os.chmod(people._settings.database, 0o600)
    assert run("user", "delete", "eve@x.io", "--yes").code == 0
    for command in (["user", "add"], ["invite"]):
        assert run(*command, "EVE@x.io").err == [
            "authsvc: EVE@x.io: another user gave up this email: free it with user release"
        ]
    (tmp_path / "users.csv").write_text("email\neve@x.io\n")
    assert "already registered, reserved, or repeated" in run("import", "users.csv").err[0]
    result = run("user", "release", "EVE@x.io", "--json")
    assert result.records == [{"email": "EVE@x.io", "state": "released"}]
    assert [line["event"] for line in result.log] == ["email_released"]
    assert run("user", "release", "eve@x.io").err == ["authsvc: eve@x.io is not reserved"]
    assert run("user", "add", "eve@x.io").code == 0


# Import and export


@pytest.mark.both_engines
def test_an_import_adds_all_users_or_names_every_problem(run: Run, people: Auth, tmp_path: Path) -> None:
    lines = ["email,hash,name", f"carol@x.io,{HASH},Carol", f"BOB@x.io,{HASH},Bob", "dan@x.io,b4l0u,Dan"]
    lines += [f"carol@X.io,{HASH},Carol", f"ed@x.io,{HASH}", f"fay@x.io,{HASH},Fay"]
    (tmp_path / "users.csv").write_text("\n".join(lines))
    result = run("import", "users.csv")
    assert (result.code, result.out, result.log) == (1, "", [])
    assert result.err == [
        "users.csv:3: email 'BOB@x.io': already registered, reserved, or repeated in this file",
        "users.csv:4: hashed_password is not a bcrypt hash: expected $2b$…, $2a$…, $2y$… or $bcrypt-sha256$…",
        "users.csv:5: email 'carol@X.io': already registered, reserved, or repeated in this file",
        "users.csv:6: expected 3 columns as in the header, found 2",
        "authsvc: 4 problems: nothing was imported",
    ]
    assert len(run("user", "list").out.splitlines()) == 2


def test_imported_users_without_a_password_are_counted_and_can_be_invited(
    run: Run, people: Auth, tmp_path: Path
) -> None:
    (tmp_path / "users.csv").write_text("Email;Name;Disabled\ncarol@x.io;Carol;f\ndan@x.io;Dan;t\n")
    result = run("import", "users.csv")
    assert (result.code, result.out) == (0, "2 users imported\n")
    assert result.err == ["authsvc: 2 users without a password; next: invite each"]
    assert run("user", "add", "ed@x.io").code == 0
    carol, dan, ed = (people.find_user(f"{name}@x.io") for name in ("carol", "dan", "ed"))
    assert carol == ed._replace(id=carol.id, email=carol.email, created_at=carol.created_at)
    assert dan.disabled_at
    (link,) = run("invite", "carol@x.io", "--json").records
    people.update_password(link["reset_token"], "c4r0l")
    assert people.valid_login("carol@x.io", "c4r0l")


LONG_PASSWORD = "a" * 72 + "the end"


@pytest.mark.both_engines
@pytest.mark.parametrize("option", [["--cut-at-72"], []])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_password_cut_by_another_system_signs_in_only_with_the_option(
    run: Run, people: Auth, tmp_path: Path, option: list[str], form: str
) -> None:
    hashed = bcrypt.hashpw(LONG_PASSWORD[:72].encode(), bcrypt.gensalt(COST)).decode()
    (tmp_path / "users.htpasswd").write_text(f"carol@x.io:{hashed}:Carol\n")
    assert run("import", "users.htpasswd", *option).out == "1 user imported\n"
    run("export", f"out.{form}")
    run("user", "delete", "carol@x.io", "--yes")
    lines = (tmp_path / f"out.{form}").read_text().splitlines()
    (tmp_path / f"carol.{form}").write_text("\n".join([*lines[: form == "csv"], lines[-1]]))
    assert run("import", f"carol.{form}").out == "1 user imported\n"  # the mark is in the file
    assert people.valid_login("carol@x.io", LONG_PASSWORD) is bool(option)
    assert not people.valid_login("carol@x.io", LONG_PASSWORD + "x")
    assert people.valid_login("carol@x.io", LONG_PASSWORD[:72]) is not bool(option)


@pytest.mark.both_engines
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_export_is_imported_into_another_database(
    run: Run, people: Auth, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("user", "add", "carol@x.io")
    run("user", "disable", "eve@x.io")
    assert run("export", f"out.{form}", "--json").records == [{"exported": 3, "left_out": 0, "passkeys_left_out": 0}]
    assert stat.S_IMODE((tmp_path / f"out.{form}").stat().st_mode) == 0o600
    assert run("export", "--format", form).out == (tmp_path / f"out.{form}").read_text()
    DB(tmp_path / "other.db").close()
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "other.db"))
    assert run("import", f"out.{form}").out == "3 users imported\n"
    with closing(DB(tmp_path / "other.db")) as other:
        moved = {user.email: user for user in other.each_user()}
        for user in people._db.each_user():
            copied = moved[user.email]
            assert hash_of(copied) == hash_of(user)
            assert (copied.created_at, copied.totp_secret) == (user.created_at, user.totp_secret)
            assert copied.groups == user.groups == ("admin" if user.email == "bob@x.io" else "")
            assert [bool(copied.disabled_at), bool(copied.totp_since)] == [
                bool(user.disabled_at),
                bool(user.totp_since),
            ]
        auth = Auth(other, Settings(bcrypt_cost=COST))
        with pytest.raises(ValueError, match="one-time code required"):
            auth.log_in("bob@x.io", "b4l0u", caller=UNCOUNTED)


def hash_of(user: User) -> str:
    return user.hashed_password if isinstance(user.hashed_password, str) else user.hashed_password.decode()


def test_an_export_never_replaces_a_file(run: Run, people: Auth, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("precious")
    assert run("export", "out.csv").err == ["authsvc: out.csv: File exists"]
    assert (tmp_path / "out.csv").read_text() == "precious"
    assert run("export", "missing/out.csv").err == ["authsvc: missing/out.csv: No such file or directory"]


def make_closed(folder: Path, database: Path) -> None:
    """Make a folder that the user of the command cannot enter, and files that they cannot read."""
    for file, source in ("users.csv", None), ("backup.db", database):
        (folder / file).write_bytes(source.read_bytes() if source else f"email,hash\ncarol@x.io,{HASH}\n".encode())
        (folder / file).chmod(0)
    (folder / "closed").mkdir(mode=0)


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "stream"),
    [
        (["import", "users.csv"], True),
        (["import", "closed/users.csv"], True),
        (["export", "closed/users.csv"], True),
        (["backup", "closed/copy.db"], False),
        (["restore", "backup.db"], False),
        (["restore", "closed/backup.db"], False),
        (["copy-to", "closed/copy.db"], False),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_file_out_of_reach_is_refused_with_the_user_and_a_remedy(
    people: Auth, path: Path, command: list[str], stream: bool
) -> None:
    people.close()  # nothing else keeps a copy or a restore from going on
    make_closed(path.parent, path)
    done = run_bound(*command, database=path)
    people._db = DB(path)  # the fixture closes it
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    user = pwd.getpwuid(os.getuid()).pw_name
    assert (
        f"{command[1]}: Permission denied: this command runs as the user {user}: use a file and a folder" in done.stderr
    )
    assert f"such as {path.parent}" in done.stderr
    assert ('"-" for standard input or output' in done.stderr) is stream


@pytest.mark.process
@pytest.mark.parametrize("command", [["user", "list"], ["backup", "copy.db"], ["export"]], ids=" ".join)
def test_a_database_out_of_reach_is_not_called_missing(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    done = run_bound(*command, database=Path("closed/authsvc.db"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("authsvc: closed/authsvc.db: Permission denied: this command runs as the user ")


@pytest.mark.process
def test_users_are_imported_from_a_pipe_that_only_its_owner_may_open(people: Auth, path: Path) -> None:
    """As <(…) of a shell gives the name of a pipe of root to a command that runs as another user."""
    ours, theirs = os.pipe()
    os.write(theirs, f"email,hash\ncarol@x.io,{HASH}\n".encode())
    os.close(theirs)
    os.fchmod(ours, 0)
    done = run_bound("import", f"/dev/fd/{ours}", "--format", "csv", database=path, pass_fds=[ours])
    os.close(ours)
    assert (done.returncode, done.stdout) == (0, "1 user imported\n"), done.stderr
    assert people.find_user("carol@x.io")


@pytest.mark.process
def test_an_import_of_a_pipe_that_sudo_has_closed_is_refused(people: Auth, path: Path) -> None:
    done = run_process("import", "/dev/fd/63", "--format", "csv", database=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith('authsvc: /dev/fd/63: Bad file descriptor: pipe the users to "import -" ')


@pytest.mark.process
def test_a_pipe_is_imported_at_a_terminal(people: Auth, path: Path) -> None:
    script = f'"{sys.executable}" "{HERE / "authsvc.py"}" import <(echo email,hash; echo "$1") --format csv'
    ours, theirs = pty.openpty()
    done = subprocess.run(
        ["bash", "-c", script, "bash", f"carol@x.io,{HASH}"],
        env=clean_environ() | {"AUTHSVC_DATABASE": str(path)},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"1 user imported\n"), os.read(ours, 10_000)
    os.close(ours)
    os.close(theirs)


@pytest.mark.process
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_standard_output_of_an_export_is_standard_input_of_an_import(
    people: Auth, path: Path, tmp_path: Path, form: str
) -> None:
    exported = run_process("export", "-", "--format", form, database=path)
    assert (exported.returncode, exported.stdout.count("@x.io")) == (0, 2)
    DB(tmp_path / "other.db").close()
    done = run_process("import", "-", "--format", form, database=tmp_path / "other.db", input=exported.stdout)
    assert (done.returncode, done.stdout) == (0, "2 users imported\n")
    faulty = run_process("import", "-", database=path, input="email,hash\nno email,x\n")
    assert faulty.returncode == 1
    assert faulty.stderr.startswith("-:2: ")
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("file", ["missing.csv", ".", "users.txt"])
def test_an_import_of_an_unreadable_file_is_refused(run: Run, people: Auth, file: str, tmp_path: Path) -> None:
    (tmp_path / "users.txt").touch()
    result = run("import", file, *(["--format", "csv"] if file == "." else []))
    assert (result.code, len(result.err)) == (1, 1)
    assert result.err[0].startswith("authsvc: ")


# A child process begins with the peak memory of its parent, so a small process starts the command and measures it.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.slow  # two imports of 25,000 lines
@pytest.mark.process
def test_an_import_of_25_000_users_takes_little_memory_or_changes_nothing(
    people: Auth, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    lines = ["email,hash", *(f"user{number}@example.com,{HASH}" for number in range(25_000))]
    for name, chosen in ("few.csv", lines[:2]), ("faulty.csv", [*lines[2:], "last"]), ("many.csv", lines[2:]):
        (path.parent / name).write_text("\n".join([*([] if name == "few.csv" else lines[:1]), *chosen]))
    most, before = {}, 2
    for name, added in ("few.csv", 1), ("faulty.csv", 0), ("many.csv", 24_999):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, sys.executable, HERE / "authsvc.py", "import", name],
            env=clean_environ() | {"AUTHSVC_DATABASE": str(path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == (0 if added else 1)
        most[name] = int(done.stdout.splitlines()[-1])
        print(f"{name}: {len(lines) / (time.monotonic() - began):.0f} lines a second, {most[name]} KiB")
        before += added
        with closing(sqlite3.connect(path)) as db:
            assert db.execute("SELECT count(*) FROM users").fetchone() == (before,)
    assert most["many.csv"] - most["few.csv"] < 20 * 1024  # KiB; each user takes about 650 bytes until all are added


@pytest.mark.parametrize("shown", [True, False])
def test_an_import_shows_its_progress_at_a_terminal_only(
    run: Run, people: Auth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: shown, raising=False)
    (tmp_path / "users.csv").write_text(f"email,hash\ncarol@x.io,{HASH}\n")
    assert any("reading users.csv: 0 rows" in line for line in run("import", "users.csv").err) is shown


# Beside a service


def test_a_backup_is_restored(run: Run, people: Auth, path: Path, tmp_path: Path) -> None:
    token = people.get_reset_password_token("eve@x.io")
    assert run("backup", "copy.db").out == "backed up to copy.db\n"
    assert run("backup", "copy.db").code == 1
    people.register_user("carol@x.io", "c4r0l")
    people.close()
    result = run("restore", "copy.db", "--json")
    (record,) = result.records
    assert (record["database"], record["sessions_ended"]) == (str(path), 1)
    assert [line["event"] for line in result.log] == ["sys_restore"]
    assert [user["email"] for user in run("user", "list", "--json").records] == ["bob@x.io", "eve@x.io"]
    with closing(DB(record["kept"])) as kept:
        assert len(list(kept.each_user())) == 3
    people._db = DB(path)  # the fixture closes it
    assert people.find_user("bob@x.io").groups == "admin"
    assert people.valid_login("eve@x.io", "3v3")
    with pytest.raises(ValueError, match="invalid reset token"):
        people.update_password(token, "t4rt1fl3tt3")


def test_a_restore_deletes_what_waits_for_a_confirmation_and_gives_no_id_twice(
    run: Run, people: Auth, path: Path
) -> None:
    link = people._link("carol@x.io", "token", 60)
    people._db.emails.add_registration(link)
    (session_hash,) = people._db._engine.read("SELECT session_hash FROM sessions", {})
    assert people._db.emails.set_change(session_hash, link)
    people.create_token(people.create_session("eve@x.io"), "3v3", "git", caller=UNCOUNTED)
    assert run("backup", "copy.db").code == 0
    later = [people.register_user(f"{name}@x.io", "b4l0u").id for name in ("dan", "eve2")]
    people._db.delete_user(later[1])
    people.close()
    (record,) = run("restore", "copy.db", "--json").records
    tables = "registrations", "email_changes", "access_tokens"
    assert (record["sessions_ended"], *(record[table] for table in tables)) == (2, 1, 1, 1)
    people._db = DB(path)  # the fixture closes it
    assert people._db._engine.read("SELECT count(*) FROM registrations", {}) == (0,)
    assert people.register_user("new@x.io", "b4l0u").id == later[1] + 1 == 5


def test_a_backup_is_restored_after_a_newer_release_has_migrated_the_database(
    run: Run, people: Auth, path: Path
) -> None:
    assert run("backup", "copy.db").code == 0
    people.close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    assert "newer release" in run("user", "list").err[0]
    assert run("restore", "copy.db").code == 0
    assert run("user", "list").code == 0
    people._db = DB(path)  # the fixture closes it


def test_a_restored_backup_voids_all_device_cookies(run: Run, people: Auth, path: Path) -> None:
    """The keys in a backup are those of cookies that were voided after it was made, perhaps because of a theft."""
    people._db.end_sessions(1, devices=True)
    voided = {*device_keys(people)}
    assert run("backup", "copy.db").code == 0
    people._db.end_sessions(1, devices=True)
    voided |= {*device_keys(people)}
    people.close()
    assert run("restore", "copy.db").code == 0
    people._db = DB(path)  # the fixture closes it
    restored = {*device_keys(people)}
    assert len(voided) == 3  # two of bob, and None of eve
    assert restored
    assert not restored & voided


def test_a_restore_keeps_the_old_file_beside_the_one_that_a_link_names(
    run: Run, people: Auth, path: Path, tmp_path: Path
) -> None:
    assert run("backup", "copy.db").code == 0
    people.close()
    (elsewhere := tmp_path / "elsewhere").mkdir()  # it may be on another file system
    path.rename(elsewhere / "real.db")
    path.symlink_to(elsewhere / "real.db")
    (record,) = run("restore", "copy.db", "--json").records
    assert record["kept"].startswith(str(elsewhere / "real.db."))
    assert path.is_symlink()
    assert [sqlite_files.problems(file) for file in (record["kept"], str(path))] == [[], []]
    people._db = DB(path)  # the fixture closes it


def test_a_restore_while_the_service_runs_is_refused(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start()
    database = tmp_path / "authsvc.db"
    form = {"email": "bob@x.io", "password": "b4l0u"}
    requests.post(f"{service.url}/users", data=form, timeout=5)
    assert run_process("backup", "copy.db", database=database).returncode == 0
    done = run_process("restore", "copy.db", database=database)
    assert done.returncode == 1
    assert done.stderr == "authsvc: cannot restore copy.db: the database is in use: stop the service first\n"
    assert requests.post(f"{service.url}/sessions", data=form, timeout=5).status_code == 200
    service.end()
    assert run_process("restore", "copy.db", database=database).returncode == 0


@pytest.mark.both_engines
def test_commands_work_while_the_service_runs(start: Callable[..., Service]) -> None:
    service, form = start(AUTHSVC_LISTEN=f"127.0.0.1:{fixed_port()}"), {"email": "bob@x.io", "password": "b4l0u"}
    requests.post(f"{service.url}/users", data=form, timeout=5)
    bob = requests.Session()
    bob.post(f"{service.url}/sessions", data=form, timeout=5)
    service.command("user", "disable", "bob@x.io")
    assert bob.get(f"{service.url}/profile", timeout=5).status_code == 403
    assert requests.post(f"{service.url}/sessions", data=form, timeout=5).status_code == 401
    service.command("user", "enable", "bob@x.io")
    token = json.loads(service.command("reset-link", "bob@x.io", "--json"))["reset_token"]
    new = {"email": "bob@x.io", "reset_token": token, "new_password": "t4rt1fl3tt3"}
    answers = [requests.put(f"{service.url}/reset_password", data=new, timeout=5).status_code for _ in range(2)]
    assert answers == [200, 403]


@pytest.mark.slow
def test_a_backup_under_load_contains_every_confirmed_user(
    start: Callable[..., Service], path: Path, tmp_path: Path
) -> None:
    service = start(AUTHSVC_THROTTLE="off")
    confirmed: list[str] = []
    stopping = threading.Event()

    def load(worker: int) -> None:
        number = 0
        while not stopping.is_set():
            form = {"email": f"user{worker}-{number}@x.io", "password": "b4l0u"}
            if requests.post(f"{service.url}/users", data=form, timeout=20).status_code == 200:
                confirmed.append(form["email"])
            assert requests.post(f"{service.url}/sessions", data=form, timeout=20).status_code == 200
            number += 1

    copies = []
    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(load, worker) for worker in range(6)]
        try:
            for number in range(2):
                assert awaited(lambda number=number: len(confirmed) >= 15 * (number + 1), 30)  # type: ignore[misc]
                before = list(confirmed)
                assert run_process("backup", f"copy{number}.db", database=path).returncode == 0
                copies.append((tmp_path / f"copy{number}.db", before))
        finally:
            stopping.set()
        for worker in workers:
            worker.result()
    assert "sys_crash" not in service.log
    service.end()
    for copy, emails in copies:
        assert run_process("restore", str(copy), database=path).returncode == 0
        assert sqlite_files.problems(str(path)) == []
        with closing(DB(path)) as db:
            auth = Auth(db, Settings(bcrypt_cost=COST))
            assert [email for email in emails if not auth.valid_login(email, "b4l0u")] == []
        for kept in tmp_path.glob("authsvc.db.2*"):  # two restores in the same second would choose the same name
            kept.unlink()


@pytest.mark.slow  # starts 10 processes
def test_commands_and_a_service_wait_for_each_other(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_THROTTLE="off")

    def add(worker: int) -> None:
        for number in range(2):
            service.command("user", "add", f"{worker}-{number}@x.io")
            form = {"email": f"wire{worker}-{number}@x.io", "password": "b4l0u"}
            assert requests.post(f"{service.url}/users", data=form, timeout=20).status_code == 200

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert len(service.command("user", "list").splitlines()) == 16


def first_lines(people: Auth, path: Path, command: str) -> tuple[str, str]:
    """Run a command on 5,000 users, close its output after two lines; return these lines and standard error."""
    with people._db._engine.transaction() as db:
        db.executemany(
            "INSERT INTO users (email, email_key, hashed_password) VALUES (:email, :email, '!')",
            [{"email": f"{number}@x.io"} for number in range(5000)],
        )
    command = f'"{sys.executable}" "{HERE / "authsvc.py"}" {command} | head -2; exit ${{PIPESTATUS[0]}}'
    environ = clean_environ() | {"AUTHSVC_DATABASE": str(path)}
    done = subprocess.run(["bash", "-c", command], env=environ, text=True, capture_output=True, timeout=20)
    assert done.returncode == 0
    return done.stdout, done.stderr


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_causes_no_error(people: Auth, path: Path) -> None:
    lines, errors = first_lines(people, path, "user list")
    assert (lines.split()[-1], errors) == ("eve@x.io", "")


@pytest.mark.slow
def test_an_export_whose_reader_closes_the_pipe_is_logged(people: Auth, path: Path) -> None:
    lines, errors = first_lines(people, path, "export -")
    logged = json.loads(errors)
    assert "\nbob@x.io,$2" in lines
    assert (logged["event"], logged["complete"]) == ("users_exported", False)
    assert 0 < logged["users"] < 5002


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [("user list", ""), ("user list", "1"), ("user show bob@x.io --json", ""), ("export", "")],
)
def test_output_to_a_full_disk_ends_in_one_line(people: Auth, path: Path, command: str, unbuffered: str) -> None:
    line = "authsvc: cannot write the output: No space left on device"
    assert output_lost(path, f"{command} >/dev/full", unbuffered) == [line]


@pytest.mark.process
@pytest.mark.parametrize("command", ["user list", "user add carol@x.io", "--help"])
def test_a_command_without_standard_output_changes_nothing(people: Auth, path: Path, command: str) -> None:
    line = "authsvc: standard output is closed: redirect it to /dev/null"
    assert output_lost(path, f"{command} >&-") == [line]
    assert [user.email for user in people._db.each_user()] == ["bob@x.io", "eve@x.io"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("command", "redirection"),
    [("user show nobody@x.io", "2>/dev/full"), ("invite bob@x.io", "2>&-"), ("import none.csv", ">/dev/full 2>&1")],
)
def test_a_refusal_that_cannot_be_printed_exits_with_1(
    people: Auth, path: Path, command: str, redirection: str
) -> None:
    assert output_lost(path, f"{command} {redirection}") == []


@pytest.mark.process
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">/dev/full 2>&1"])
@pytest.mark.parametrize("command", ["nonsense", "copy-to smtp://x"])
def test_wrong_usage_that_cannot_be_printed_exits_with_2(path: Path, command: str, redirection: str) -> None:
    assert output_lost(path, f"{command} {redirection}", code=2) == []


@pytest.mark.process
def test_a_change_whose_log_cannot_be_written_exits_with_0(people: Auth, path: Path) -> None:
    assert output_lost(path, "user add carol@x.io >/dev/null 2>/dev/full", code=0) == []
    assert people.find_user("carol@x.io")


@pytest.mark.process
def test_help_to_a_full_disk_ends_in_one_line(path: Path) -> None:
    assert output_lost(path, "--help >/dev/full") == ["authsvc: standard output: No space left on device"]


@pytest.mark.process
def test_help_to_a_reader_that_closes_the_pipe_causes_no_error() -> None:
    command = f'"{sys.executable}" "{HERE / "authsvc.py"}" --help | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], env=clean_environ(), text=True, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.process
def test_a_deletion_without_standard_input_needs_yes(people: Auth, path: Path) -> None:
    line = "authsvc: cannot ask for confirmation without a terminal: add --yes"
    assert output_lost(path, "user delete bob@x.io <&-") == [line]


def output_lost(path: Path, command: str, unbuffered: str = "", code: int = 1) -> list[str]:
    """Run a command in a shell that redirects its output; check its exit code, and return its lines of error."""
    environ = clean_environ() | {"AUTHSVC_DATABASE": str(path), "PYTHONUNBUFFERED": unbuffered}
    line = f'exec "{sys.executable}" "{HERE / "authsvc.py"}" {command}'
    done = subprocess.run(
        ["bash", "-c", line], cwd=path.parent, env=environ, text=True, capture_output=True, timeout=20
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    return [line for line in done.stderr.splitlines() if not line.startswith("{")]


@pytest.mark.parametrize("typed", ["d\udcc5@x.io", "\udcff"])
def test_an_email_that_is_not_text_is_wrong_usage(run: Run, people: Auth, typed: str) -> None:
    result = run("user", "show", typed)
    assert (result.code, result.out) == (2, "")
    assert "argument email: invalid" in result.err[-1]


@pytest.mark.slow
def test_a_backup_to_a_full_disk_is_refused_in_one_line(people: Auth, path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    # Without coverage, which could not write its files either.
    done = run_process("backup", "copy.db", database=path, preexec_fn=limit)
    assert done.returncode == 1
    assert re.fullmatch(r"authsvc: cannot write the backup copy\.db: .+\n", done.stderr)
    assert not (path.parent / "copy.db").exists()
    assert not list(path.parent.glob(".copy*"))


# Checking


def checked(result: Result) -> dict[str, Any]:
    return {record["check"]: record["problems"] for record in result.records}


@pytest.mark.both_engines
def test_a_check_finds_no_problem_in_a_good_setup(run: Run, people: Auth, engine: str) -> None:
    checks = ["database", *(["files"] if engine == "sqlite" else []), "settings", "clock", "mail", "metrics"]
    result = run("check", "--json")
    assert result.code == 0
    assert checked(result) == {name: [] for name in checks}
    # These are no problem: nobody has to be mailed, and nobody has to watch.
    states = dict.fromkeys(checks, "ok") | dict.fromkeys(("mail", "metrics"), "not set up")
    assert {record["check"]: (record["ok"], record["state"]) for record in result.records} == {
        name: (True, state) for name, state in states.items()
    }
    assert run("check").out == "".join(f"{name:<10}{state}\n" for name, state in states.items())


def test_a_check_looks_for_what_the_metrics_need(run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_METRICS_LISTEN", "127.0.0.1:9464")
    states = {record["check"]: record["state"] for record in run("check", "--json").records}
    assert states["metrics"] == "ok"
    monkeypatch.setattr(commands, "find_spec", lambda _: None)
    result = run("check", "--json")
    assert result.code == 1
    assert checked(result)["metrics"] == ["prometheus_client is not installed: pip install prometheus-client"]


@pytest.mark.both_engines
def test_a_missing_database_is_found(run: Run) -> None:
    result = run("check", "--json")
    (problem,) = checked(result)["database"]
    assert result.code == 1
    assert re.match("No such file or directory|there are no tables in postgres on ", problem)


def test_a_damaged_database_is_found(run: Run, people: Auth, path: Path) -> None:
    people.close()
    path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * 8192)
    result = run("check", "--json")
    assert result.code == 1
    assert checked(result)["database"]
    people._db = DB(path.with_name("another.db"))  # the fixture closes it


def test_a_file_that_others_can_read_is_found(run: Run, people: Auth, path: Path) -> None:
    path.chmod(0o640)
    result = run("check", "--json")
    assert (result.code, checked(result)["files"]) == (1, [f"other users can read {path}: chmod 600"])


@pytest.mark.both_engines
def test_a_clock_that_was_set_back_is_found(run: Run, people: Auth) -> None:
    with people._db._engine.transaction() as db:
        db.execute("UPDATE sessions SET last_seen_at = last_seen_at + 86400")
    result = run("check", "--json")
    assert result.code == 1
    assert re.fullmatch(r"the last session is 86\d\d\d s in the future: .*", checked(result)["clock"][0])


def test_an_unreachable_mail_server_and_a_missing_proxy_are_found(
    run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens on it
        for name, value in {
            "PUBLIC_URL": "https://auth.example.com",
            "BCRYPT_COST": "10",
            "SMTP_URL": f"smtps://127.0.0.1:{unused.getsockname()[1]}",
            "MAIL_FROM": "auth@example.com",
        }.items():
            monkeypatch.setenv(f"AUTHSVC_{name}", value)
        result = run("check", "--json")
    assert result.code == 1
    assert checked(result)["mail"] == ["127.0.0.1: [Errno 111] Connection refused"]
    assert {record["check"]: record["state"] for record in result.records}["mail"] == "failed"
    assert "AUTHSVC_TRUSTED_PROXY" in checked(result)["settings"][0]


@pytest.mark.both_engines
@pytest.mark.slow
def test_pruning_says_what_it_deletes(run: Run, people: Auth, logged: list[str]) -> None:
    with people._db._engine.transaction() as db:
        db.execute("UPDATE sessions SET last_seen_at = last_seen_at - 604800")
        db.execute("UPDATE users SET reset_token = 'spent', reset_expires_at = 1 WHERE email = 'eve@x.io'")
        db.execute("DELETE FROM throttle")
        db.execute("INSERT INTO throttle VALUES ('a', 1), ('b', 1)")
        for table, columns in (("registrations", "7, 'a', 'a', 't', 1"), ("former_emails", "'a', 7, 1")):
            db.execute(f"INSERT INTO {table} VALUES ({columns})")
        db.execute("INSERT INTO email_changes SELECT id, 'a', 'a', 't', 1 FROM sessions")
        db.execute("INSERT INTO spent_challenges VALUES ('a', 1)")
    emails = "registrations 1, email changes 0, former emails 1"  # the session ended, and so did its change
    assert run("prune").out == f"deleted: sessions 1, reset tokens 1, {emails}, spent challenges 1, buckets 2\n"
    kinds = "sessions", "reset_tokens", "registrations", "email_changes", "former_emails", "spent_challenges", "buckets"
    assert json.loads(run("prune", "--json").out) == {"pruned": True, **dict.fromkeys(kinds, 0)}
    counts = [(line["sessions"], line["reset_tokens"], line["buckets"]) for line in map(json.loads, logged)]
    assert counts == [(1, 1, 2), (0, 0, 0)]
    assert people._db._engine.read("SELECT count(*) FROM sessions", {}) == (0,)
    assert people.find_user("eve@x.io").reset_token is None


@pytest.mark.parametrize("command", ["user delete eve@x.io --yes", "prune"])
def test_a_command_that_deletes_empties_the_log_of_a_service(run: Run, people: Auth, command: str) -> None:
    log = Path(f"{people._settings.database}-wal")
    assert b"eve@x.io" in log.read_bytes()
    assert run(*command.split()).code == 0
    assert log.read_bytes() == b""
    assert people.find_user("bob@x.io")


@pytest.mark.parametrize("command", ["backup", "restore", "import", "export"])
def test_a_url_in_the_place_of_a_file_is_refused_and_not_shown(command: str, run: Run, people: Auth) -> None:
    done = run(command, "postgresql://auth:hunter2@db/auth")
    assert done.code == 2
    assert done.err[-1].endswith("name a file: this is a URL or a connection string")
    assert "hunter2" not in done.out + "".join(done.err)


@pytest.mark.parametrize("command", ["backup", "restore", "import", "export", "copy-to"])
def test_an_empty_name_of_a_file_is_wrong_usage(command: str, run: Run, people: Auth) -> None:
    done = run(command, "")
    assert (done.code, done.err[-1].partition(": name a file")[1:]) == (2, (": name a file", ""))


def test_a_folder_is_no_backup(run: Run, people: Auth, tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}").touch()  # so that the folder has the size of a small database
    assert run("restore", str(tmp_path)).err == [f"authsvc: cannot restore {tmp_path}: it is not a database"]


def test_an_export_to_dev_stdout_is_one_to_standard_output(run: Run, people: Auth) -> None:
    assert run("export", "/dev/stdout").out == run("export", "-").out != ""


def test_a_file_name_that_is_not_text_is_valid_json(run: Run, people: Auth) -> None:
    (record,) = run("backup", "b\udcff.db", "--json").records
    assert record["file"] == "b?.db"


@pytest.mark.slow
def test_a_copy_that_fails_names_the_target_and_no_temporary_file(people: Auth, path: Path) -> None:
    people.close()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    done = run_process("copy-to", "copy.db", database=path, preexec_fn=limit)
    assert done.returncode == 1
    assert re.fullmatch("authsvc: cannot open the database copy.db: .*(disk|full).*\n", done.stderr)
    people._db = DB(path)  # the fixture closes it


@pytest.mark.parametrize("answer", ["", "n", "\x04"], ids=["nothing", "no", "the end of the input"])
def test_without_a_yes_nothing_is_deleted(answer: str, run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read(question: str) -> str:
        asked.append(question)
        if answer == "\x04":
            raise EOFError
        return answer

    email = "\u202ebob@x.io"
    people.add_account(email)
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    done = run("user", "delete", email)
    assert (done.code, done.err) == (1, ["authsvc: not confirmed; nothing was deleted"])
    assert asked == ["Delete ?bob@x.io and all their data? [y/N] "]
    assert people.find_user(email)


@pytest.mark.process
def test_the_program_may_be_started_through_a_symbolic_link(tmp_path: Path) -> None:
    link = tmp_path / "authsvc"
    link.symlink_to(HERE / "authsvc.py")
    done = subprocess.run([sys.executable, link, "--version"], text=True, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
