"""The operator's commands, on a real file; in this process where that says the same as one of their own."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
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

import pytest
import requests

import admin
import authsvc
import totp
from auth import Auth
from settings import Settings
from storage import DB, User, open_store
from tests.conftest import COST, HERE, Service, clean_environ
from tests.crowd import UNMEASURED

HASH = "$2b$12$" + "a" * 21 + "e" + "b" * 31
NOBODY = 65534

Run = Callable[..., "Said"]


class Said:
    """What a command left: exit code, standard output, and of standard error the log and the rest."""

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
    """What went to the system's log."""
    lines: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lines.append)
    return lines


@pytest.fixture
def run(
    place: str,
    tmp_path: Path,
    logged: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTHSVC_DATABASE", place)
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", str(COST))

    def run_one(*arguments: str) -> Said:
        capsys.readouterr()
        try:
            code = authsvc.main(list(arguments))
        except SystemExit as ended:  # argparse's
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run_one


@pytest.fixture
def people(settings: Settings) -> Iterator[Auth]:
    """Bob, with a password, a session and a second factor; eve, with a password."""
    auth = Auth(open_store(settings.database), settings)
    auth.register_user("bob@x.io", "b4l0u")
    auth.register_user("eve@x.io", "3v3")
    session_id = auth.log_in("bob@x.io", "b4l0u", address="192.0.2.1", user_agent="curl\x1b[2J\x07")[1]
    seed, _ = auth.begin_totp(session_id, "b4l0u")
    auth.confirm_totp(session_id, totp.code(seed, int(time.time()) // totp.STEP))
    yield auth
    auth.close()


def process(*arguments: str, database: Path, **options: Any) -> subprocess.CompletedProcess[str]:
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


# Who may run what


COMMANDS: list[list[str]] = [
    ["user", "add", "carol@x.io"],
    ["user", "list"],
    ["user", "show", "bob@x.io"],
    ["user", "disable", "bob@x.io"],
    ["user", "enable", "bob@x.io"],
    ["user", "delete", "bob@x.io", "--yes"],
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
    "invite": "user_invited",
    "reset-link": "authn_reset_token_created",
    "sessions end": "session_ended",
    "totp-off": "authn_factor_removed",
    "import": "users_imported",
    "export": "users_exported",
    "backup": "sys_backup",
    "prune": "sys_prune",
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_makes_no_database(run: Run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "users.csv").write_text(f"email,hash\na@x.io,{HASH}\n")
    said = run(*command)
    assert said.code == 1
    assert (
        command == ["check"]
        or re.fullmatch(r"authsvc: .*no such file.*|authsvc: there is no database .*", said.err[-1], re.I)
        or re.search("unable to open|pg_dump; nothing was written", said.err[-1])
    )
    assert {file.name for file in tmp_path.iterdir()} == {"users.csv"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_does_it_says_so_and_logs_it(
    run: Run, people: Auth, engine: str, tmp_path: Path, logged: list[str], command: list[str]
) -> None:
    (tmp_path / "users.csv").write_text(f"email,hash\ncarol@x.io,{HASH}\n")
    said = run(*command, "--json")
    if engine == "postgres" and command[0] == "backup":
        assert (said.code, logged, said.out) == (1, [], "")
        return
    assert (said.code, said.err) == (0, [])
    assert all(isinstance(record, dict) for record in said.records)
    name = " ".join(command[:2]) if command[0] in ("user", "sessions") else command[0]
    events = [line["event"] for line in said.log]
    assert events == [json.loads(line)["event"] for line in logged]
    assert ([EVENTS[name]] if name in EVENTS else []) == events[-1:]
    assert all(line["operator"] for line in said.log)
    secrets = re.findall(r"\$2b|b4l0u|3v3|[A-Z2-7]{32}", said.out + str(said.log) + str(logged))
    assert not secrets


@pytest.mark.parametrize(
    "command",
    [
        *(["user", verb, "nobody@x.io"] for verb in ("show", "disable", "enable")),
        ["user", "delete", "nobody@x.io", "--yes"],
        *([verb, "nobody@x.io"] for verb in ("reset-link", "totp-off")),
        *(["sessions", verb, "nobody@x.io"] for verb in ("list", "end")),
    ],
    ids=" ".join,
)
def test_who_is_not_there_is_said(run: Run, people: Auth, command: list[str]) -> None:
    said = run(*command)
    assert (said.code, said.out, said.err, said.log) == (1, "", ["authsvc: unknown email"], [])


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
        ),
        ["export", "--format", "xml"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(run: Run, people: Auth, command: list[str]) -> None:
    said = run(*command)
    assert (said.code, said.out) == (2, "")
    assert said.err[0].startswith("usage: ")


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_is_given(run: Run, command: list[str]) -> None:
    said = run(*command[: 2 if command[:1] in (["user"], ["sessions"]) else 1], "--help")
    assert said.code == 0
    assert said.out.startswith("usage: authsvc.py")


def test_a_wrong_setting_is_2(run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_REGISTRATION", "ask")
    said = run("user", "list")
    assert (said.code, len(said.err)) == (2, 1)
    assert said.err[0].startswith("authsvc: AUTHSVC_REGISTRATION=ask must be one of open, invitation, closed")


def test_the_log_names_who_it_was_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ceo")
    monkeypatch.setattr(os, "getlogin", lambda: "ops")
    assert admin._login_name() == "ops"

    def nobody() -> str:
        raise OSError

    monkeypatch.setattr(os, "getlogin", nobody)
    assert admin._login_name() != "ceo"
    monkeypatch.setattr(os, "getuid", lambda: 54_321)
    assert admin._login_name() == "54321"


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
    assert shown == {"id": "1", "email": "bob@x.io", "state": "active", "second_factor": "yes", "sessions": "1"}


def test_who_is_disabled_is_out_until_enabled(run: Run, people: Auth) -> None:
    session_id = people.log_in("eve@x.io", "3v3")[1]
    run("user", "disable", "eve@x.io")
    assert people.get_user_from_session_id(session_id) is None
    assert not people.valid_login("eve@x.io", "3v3")
    assert run("reset-link", "eve@x.io").err == ["authsvc: eve@x.io is disabled: enable first"]
    run("user", "enable", "eve@x.io")
    assert people.valid_login("eve@x.io", "3v3")


def test_a_deletion_wants_a_yes(run: Run, people: Auth) -> None:
    assert run("user", "delete", "bob@x.io").err == ["authsvc: give --yes to delete without being asked"]
    assert people.find_user("bob@x.io")
    assert run("user", "delete", "bob@x.io", "--yes").code == 0
    assert run("user", "show", "bob@x.io").code == 1


@pytest.mark.sqlite
@pytest.mark.slow  # processes with a terminal
@pytest.mark.parametrize(("typed", "gone"), [("y\n", True), ("yes\n", True), ("n\n", False), ("\n", False)])
def test_a_deletion_asks_at_a_terminal(people: Auth, path: Path, typed: str, gone: bool) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    done = process("user", "delete", "bob@x.io", database=path, stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert "Delete bob@x.io and all that is theirs?" in done.stdout
    assert done.returncode == (0 if gone else 1)
    assert ("bob@x.io" in process("user", "list", database=path).stdout) is not gone


def test_an_invitation_sets_the_first_password_once(run: Run, people: Auth) -> None:
    link = run("invite", "carol@x.io").out.strip()
    found = re.fullmatch(r"http://127\.0\.0\.1:5000/reset#token=([0-9a-f-]{36})&email=carol%40x\.io", link)
    assert found
    assert run("user", "show", "carol@x.io", "--json").records[0]["state"] == "invited"
    people.update_password(found[1], "c4r0l", "carol@x.io")
    assert people.valid_login("carol@x.io", "c4r0l")
    assert run("invite", "carol@x.io").err == ["authsvc: carol@x.io has a password: use reset-link"]
    with pytest.raises(ValueError, match="invalid reset token"):
        people.update_password(found[1], "again")


def test_nobody_is_invited_where_registration_is_closed(
    run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTHSVC_REGISTRATION", "closed")
    assert run("invite", "carol@x.io").err == ["authsvc: AUTHSVC_REGISTRATION=closed: nobody is invited"]
    assert run("user", "show", "carol@x.io").code == 1


def test_a_reset_link_is_that_of_the_public_url(
    run: Run, people: Auth, engine: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTHSVC_PUBLIC_URL", "https://auth.example.com")
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "10")
    (record,) = run("reset-link", "bob@x.io", "--json").records
    assert record["link"] == f"https://auth.example.com/reset#token={record['reset_token']}&email=bob%40x.io"
    assert re.fullmatch("[A-Za-z0-9_-]{43}", record["reset_token"])
    people.update_password(record["reset_token"], "n3w p4ssw0rd of bob")
    if engine == "sqlite":
        Path(place).chmod(0o644)
        assert "chmod 600" in run("user", "list").err[0]


def test_a_second_factor_is_switched_off(run: Run, people: Auth) -> None:
    assert run("totp-off", "bob@x.io").code == 0
    assert people.log_in("bob@x.io", "b4l0u")[1]
    assert run("totp-off", "bob@x.io").err == ["authsvc: bob@x.io has no second factor"]


# Sessions


def test_sessions_are_listed_and_no_stranger_writes_to_the_terminal(run: Run, people: Auth) -> None:
    (line,) = run("sessions", "list", "bob@x.io").out.splitlines()
    assert re.fullmatch(r"[0-9a-f]{16}(  [0-9TZ:-]{20}){3}  192\.0\.2\.1  curl\?\[2J\?", line)
    (record,) = run("sessions", "list", "bob@x.io", "--json").records
    assert record["user_agent"] == "curl\x1b[2J\x07"


@pytest.mark.parametrize("whose", ["bob@x.io", "--all"])
def test_sessions_are_ended(run: Run, people: Auth, whose: str) -> None:
    eves = people.log_in("eve@x.io", "3v3")[1]
    assert run("sessions", "end", whose, "--json").records == [{"ended": 2 if whose == "--all" else 1}]
    assert run("sessions", "list", "bob@x.io").out == ""
    assert (people.get_user_from_session_id(eves) is None) is (whose == "--all")


# Moving


def test_an_import_is_all_or_nothing_and_names_every_fault(run: Run, people: Auth, tmp_path: Path) -> None:
    lines = ["email,hash,name", f"carol@x.io,{HASH},Carol", f"BOB@x.io,{HASH},Bob", "dan@x.io,b4l0u,Dan"]
    lines += [f"carol@X.io,{HASH},Carol", f"ed@x.io,{HASH}", f"fay@x.io,{HASH},Fay"]
    (tmp_path / "users.csv").write_text("\n".join(lines))
    said = run("import", "users.csv")
    assert (said.code, said.out, said.log) == (1, "", [])
    assert said.err == [
        "users.csv:3: email already registered, or twice in this file",
        "users.csv:4: hashed_password is no bcrypt hash: $2b$…, $2a$…, $2y$… or $bcrypt-sha256$…",
        "users.csv:5: email already registered, or twice in this file",
        "users.csv:6: 2 columns where the heading has 3",
        "authsvc: 4 faults, nothing was imported",
    ]
    assert len(run("user", "list").out.splitlines()) == 2


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_an_export_is_imported_elsewhere(
    run: Run, people: Auth, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("user", "add", "carol@x.io")
    run("user", "disable", "eve@x.io")
    assert run("export", f"out.{form}", "--json").records == [{"exported": 3, "left_out": 0}]
    assert stat.S_IMODE((tmp_path / f"out.{form}").stat().st_mode) == 0o600
    assert run("export", "--format", form).out == (tmp_path / f"out.{form}").read_text()
    DB(tmp_path / "other.db").close()
    monkeypatch.setenv("AUTHSVC_DATABASE", str(tmp_path / "other.db"))
    assert run("import", f"out.{form}").out == "3 users imported\n"
    with closing(DB(tmp_path / "other.db")) as other:
        moved = {user.email: user for user in other.each_user()}
        for user in people._db.each_user():
            here = moved[user.email]
            assert passwords_of(here) == passwords_of(user)
            assert (here.created_at, here.totp_secret) == (user.created_at, user.totp_secret)
            assert [bool(here.disabled_at), bool(here.totp_since)] == [bool(user.disabled_at), bool(user.totp_since)]
        auth = Auth(other, Settings(bcrypt_cost=COST))
        with pytest.raises(ValueError, match="one-time code required"):
            auth.log_in("bob@x.io", "b4l0u")


def passwords_of(user: User) -> str:
    return user.hashed_password if isinstance(user.hashed_password, str) else user.hashed_password.decode()


def test_an_export_replaces_nothing(run: Run, people: Auth, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("precious")
    assert run("export", "out.csv").err == ["authsvc: out.csv: File exists"]
    assert (tmp_path / "out.csv").read_text() == "precious"
    assert run("export", "missing/out.csv").err == ["authsvc: missing/out.csv: No such file or directory"]


@pytest.mark.parametrize("file", ["missing.csv", ".", "users.txt"])
def test_a_file_that_cannot_be_read_is_said(run: Run, people: Auth, file: str, tmp_path: Path) -> None:
    (tmp_path / "users.txt").touch()
    said = run("import", file, *(["--format", "csv"] if file == "." else []))
    assert (said.code, len(said.err)) == (1, 1)
    assert said.err[0].startswith("authsvc: ")


# A process takes over what its parent used at most: between this one and the command stands a small one.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.sqlite
@pytest.mark.slow  # 100,000 lines, three times
def test_100_000_users_move_in_with_little_memory_and_a_last_fault_stops_them(
    people: Auth, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    lines = ["email,hash", *(f"user{number}@example.com,{HASH}" for number in range(100_000))]
    for name, chosen in ("few.csv", lines[:2]), ("faulty.csv", [*lines[2:], "last"]), ("many.csv", lines[2:]):
        (path.parent / name).write_text("\n".join([*([] if name == "few.csv" else lines[:1]), *chosen]))
    most, before = {}, 2
    for name, added in ("few.csv", 1), ("faulty.csv", 0), ("many.csv", 99_999):
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
    assert most["many.csv"] - most["few.csv"] < 50 * 1024


@pytest.mark.parametrize("shown", [True, False])
def test_a_long_import_shows_its_progress_at_a_terminal(
    run: Run, people: Auth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: shown, raising=False)
    (tmp_path / "users.csv").write_text(f"email,hash\ncarol@x.io,{HASH}\n")
    assert any("0 users" in line for line in run("import", "users.csv").err) is shown


# The file, beside a service


@pytest.mark.sqlite
def test_a_backup_is_restored(run: Run, people: Auth, path: Path, tmp_path: Path) -> None:
    token = people.get_reset_password_token("eve@x.io")
    assert run("backup", "copy.db").out == "backed up to copy.db\n"
    assert run("backup", "copy.db").code == 1
    people.register_user("carol@x.io", "c4r0l")
    people.close()
    said = run("restore", "copy.db", "--json")
    (record,) = said.records
    assert (record["database"], record["sessions_ended"]) == (str(path), 1)
    assert [line["event"] for line in said.log] == ["sys_restore"]
    assert [user["email"] for user in run("user", "list", "--json").records] == ["bob@x.io", "eve@x.io"]
    with closing(DB(record["kept"])) as former:
        assert len(list(former.each_user())) == 3
    people._db = DB(path)
    assert people.valid_login("eve@x.io", "3v3")
    with pytest.raises(ValueError, match="invalid reset token"):
        people.update_password(token, "t4rt1fl3tt3")


@pytest.mark.sqlite
def test_a_restore_beside_a_service_is_refused(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start()
    database = tmp_path / "authsvc.db"
    form = {"email": "bob@x.io", "password": "b4l0u"}
    requests.post(f"{service.url}/users", data=form, timeout=5)
    assert process("backup", "copy.db", database=database).returncode == 0
    done = process("restore", "copy.db", database=database)
    assert done.returncode == 1
    assert done.stderr == "authsvc: cannot restore copy.db: the database is in use: stop the service first\n"
    assert requests.post(f"{service.url}/sessions", data=form, timeout=5).status_code == 200
    service.end()
    assert process("restore", "copy.db", database=database).returncode == 0


def test_a_command_works_on_a_service_that_runs(start: Callable[..., Service]) -> None:
    service, form = start(), {"email": "bob@x.io", "password": "b4l0u"}
    requests.post(f"{service.url}/users", data=form, timeout=5)
    bob = requests.Session()
    bob.post(f"{service.url}/sessions", data=form, timeout=5)
    service.command("user", "disable", "bob@x.io")
    assert bob.get(f"{service.url}/profile", timeout=5).status_code == 403
    assert requests.post(f"{service.url}/sessions", data=form, timeout=5).status_code == 401
    service.command("user", "enable", "bob@x.io")
    token = json.loads(service.command("reset-link", "bob@x.io", "--json"))["reset_token"]
    new = {"email": "bob@x.io", "reset_token": token, "new_password": "t4rt1fl3tt3"}
    said = [requests.put(f"{service.url}/reset_password", data=new, timeout=5).status_code for _ in range(2)]
    assert said == [200, 403]


@pytest.mark.sqlite
@pytest.mark.slow  # a load of registrations and logins for some seconds
def test_of_a_backup_under_load_everybody_who_was_answered_can_log_in(
    start: Callable[..., Service], tmp_path: Path
) -> None:
    service = start(AUTHSVC_THROTTLE="off")
    database = tmp_path / "authsvc.db"
    answered: list[str] = []
    stopping = threading.Event()

    def load(worker: int) -> None:
        number = 0
        while not stopping.is_set():
            form = {"email": f"user{worker}-{number}@x.io", "password": "b4l0u"}
            if requests.post(f"{service.url}/users", data=form, timeout=20).status_code == 200:
                answered.append(form["email"])
            assert requests.post(f"{service.url}/sessions", data=form, timeout=20).status_code == 200
            number += 1

    workers = [threading.Thread(target=load, args=(worker,)) for worker in range(6)]
    for worker in workers:
        worker.start()
    copies = []
    for number in range(3):
        while len(answered) < 40 * (number + 1):
            time.sleep(0.01)
        before = len(answered)
        assert process("backup", f"copy{number}.db", database=database).returncode == 0
        copies.append((f"copy{number}.db", answered[:before]))
    stopping.set()
    for worker in workers:
        worker.join()
    assert "sys_crash" not in service.log
    service.end()
    for name, emails in copies:
        assert process("restore", name, database=database).returncode == 0
        with closing(sqlite3.connect(database)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        service.start()
        for email in emails:
            form = {"email": email, "password": "b4l0u"}
            assert requests.post(f"{service.url}/sessions", data=form, timeout=20).status_code == 200
        service.end()
        time.sleep(1)  # what is kept is named by the second


@pytest.mark.slow  # processes by the dozen
def test_commands_and_a_service_wait_for_each_other(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_THROTTLE="off")

    def add(worker: int) -> None:
        for number in range(3):
            service.command("user", "add", f"{worker}-{number}@x.io")
            form = {"email": f"wire{worker}-{number}@x.io", "password": "b4l0u"}
            assert requests.post(f"{service.url}/users", data=form, timeout=20).status_code == 200

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert len(service.command("user", "list").splitlines()) == 24


@pytest.mark.sqlite
def test_a_reader_that_has_seen_enough_is_no_error(people: Auth, path: Path) -> None:
    with people._db._transaction() as db:
        db.executemany(
            "INSERT INTO users (email, email_key, hashed_password) VALUES (:email, :email, '!')",
            [{"email": f"{number}@x.io"} for number in range(5000)],
        )
    command = f'"{sys.executable}" "{HERE / "authsvc.py"}" user list | head -1; exit ${{PIPESTATUS[0]}}'
    environ = clean_environ() | {"AUTHSVC_DATABASE": str(path)}
    done = subprocess.run(["bash", "-c", command], env=environ, text=True, capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[-1] == "bob@x.io"


@pytest.mark.sqlite
def test_a_full_disk_is_one_line(people: Auth, path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    # Coverage would find the disk full, too.
    done = process("backup", "copy.db", database=path, preexec_fn=limit, env=UNMEASURED)
    assert done.returncode == 1
    assert re.fullmatch(r"authsvc: cannot write the backup copy\.db: .+\n", done.stderr)
    assert not (path.parent / "copy.db").exists()
    assert not list(path.parent.glob(".copy*"))


# Checking


def checked(said: Said) -> dict[str, Any]:
    return {record["check"]: record["problems"] for record in said.records}


def test_nothing_is_found_where_all_is_well(run: Run, people: Auth, engine: str) -> None:
    looked_at = ["database", *(["files"] if engine == "sqlite" else []), "settings", "clock", "mail"]
    said = run("check", "--json")
    assert said.code == 0
    assert checked(said) == {name: [] for name in looked_at}
    assert run("check").out.split() == [word for name in looked_at for word in (name, "ok")]


def test_a_missing_database_is_found(run: Run) -> None:
    said = run("check", "--json")
    (problem,) = checked(said)["database"]
    assert said.code == 1
    assert re.match("No such file or directory|there are no tables in postgres on ", problem)


@pytest.mark.sqlite
def test_a_damaged_database_is_found(run: Run, people: Auth, path: Path) -> None:
    people.close()
    path.write_bytes(path.read_bytes()[:4096] + b"\xa5" * 8192)
    said = run("check", "--json")
    assert said.code == 1
    assert checked(said)["database"]
    people._db = DB(path.with_name("another.db"))


@pytest.mark.sqlite
def test_a_file_that_others_can_read_is_found(run: Run, people: Auth, path: Path) -> None:
    path.chmod(0o640)
    said = run("check", "--json")
    assert (said.code, checked(said)["files"]) == (1, [f"others can read {path}: chmod 600"])


def test_a_clock_that_was_set_back_is_found(run: Run, people: Auth) -> None:
    with people._db._transaction() as db:
        db.execute("UPDATE sessions SET last_seen_at = last_seen_at + 86400")
    said = run("check", "--json")
    assert said.code == 1
    assert re.fullmatch(r"the last session is 86\d\d\d s in the future: .*", checked(said)["clock"][0])


def test_a_mail_server_that_is_not_there_and_a_missing_proxy_are_found(
    run: Run, people: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PUBLIC_URL": "https://auth.example.com",
        "BCRYPT_COST": "10",
        "SMTP_URL": "smtps://127.0.0.1:9",
        "MAIL_FROM": "auth@example.com",
    }.items():
        monkeypatch.setenv(f"AUTHSVC_{name}", value)
    said = run("check", "--json")
    assert said.code == 1
    assert checked(said)["mail"] == ["127.0.0.1: [Errno 111] Connection refused"]
    assert "AUTHSVC_TRUSTED_PROXY" in checked(said)["settings"][0]


def test_pruning_deletes_what_is_over(run: Run, people: Auth) -> None:
    with people._db._transaction() as db:
        db.execute("UPDATE sessions SET expires_at = 1")
    assert run("prune").out == "pruned\n"
    assert people._db._read("SELECT count(*) FROM sessions", {}) == (0,)
