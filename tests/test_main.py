"""A real process of the service, with main.py, requests and curl as its clients."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import runpy
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests

import authsvc
import main
from auth import Auth
from credentials import totp
from settings import Settings
from storage import DB
from tests.conftest import COST, HERE, MEASURED, Service, clean_environ, raw_connection, rows_in
from tests.crowd import assert_intact, awaited
from tests.ports import fixed_port

T = TypeVar("T")

PYTHON = sys.executable
SIGNATURES = {
    "register_user": "(email: 'str', password: 'str') -> 'None'",
    "log_in_wrong_password": "(email: 'str', password: 'str') -> 'None'",
    "log_in": "(email: 'str', password: 'str') -> 'str'",
    "profile_unlogged": "() -> 'None'",
    "profile_logged": "(session_id: 'str') -> 'None'",
    "log_out": "(session_id: 'str') -> 'None'",
    "reset_password_token": "(email: 'str') -> 'str'",
    "update_password": "(email: 'str', reset_token: 'str', new_password: 'str') -> 'None'",
}


def run_main(url: str) -> subprocess.CompletedProcess[str]:
    environ = {**clean_environ(), **MEASURED, "AUTHSVC_URL": url}
    return subprocess.run([PYTHON, HERE / "main.py"], env=environ, capture_output=True, text=True, timeout=60)


def at_once(count: int, act: Callable[[int], T]) -> list[T]:
    """Call a function from so many threads at the same moment."""
    barrier = threading.Barrier(count)

    def wait_and_act(number: int) -> T:
        barrier.wait(20)
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_act, range(count)))


# main.py


def test_main_has_the_eight_functions_and_no_other() -> None:
    found = {name: str(inspect.signature(function)) for name, function in inspect.getmembers(main, inspect.isfunction)}
    assert found == SIGNATURES


def test_main_has_the_three_constants() -> None:
    assert (main.EMAIL, main.PASSWD, main.NEW_PASSWD) == ("guillaume@holberton.io", "b4l0u", "t4rt1fl3tt3")


def test_importing_main_sends_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: tried.append(address))
    runpy.run_path(str(HERE / "main.py"), run_name="imported")
    assert not tried
    assert capsys.readouterr() == ("", "")


@pytest.mark.both_engines
def test_main_is_silent_on_a_new_database_and_fails_on_a_used_one(start: Callable[..., Service]) -> None:
    url = start().url
    ended = run_main(url + "/")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    again = run_main(url)
    assert again.returncode == 1
    assert "AssertionError" in again.stderr.splitlines()[-1]


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost"])
def test_main_reaches_a_service_under_each_name_of_this_machine(start: Callable[..., Service], host: str) -> None:
    ended = run_main(start().url.replace("127.0.0.1", host))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.process
def test_main_reports_in_one_line_that_nothing_listens() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and no listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ended = run_main(url)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert url in ended.stderr


# Clients

SECURITY = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Type": "application/json"}


@pytest.mark.both_engines
def test_requests_gets_the_documented_answer_of_each_route(service: Service) -> None:
    url, account = service.url, {"email": "requests@clients", "password": "b4l0u"}
    email = {"email": account["email"]}
    with requests.Session() as client:
        walk = [
            (client.get(url), 200, {"message": "Bienvenue"}),
            (client.post(f"{url}/users", data=account), 200, {**email, "message": "user created"}),
            (client.post(f"{url}/users", data=account), 400, {"message": "email already registered"}),
            (client.get(f"{url}/profile"), 403, {"message": "not logged in"}),
            (client.post(f"{url}/sessions", data=account), 200, {**email, "message": "logged in"}),
            (client.get(f"{url}/profile"), 200, email),
            (client.delete(f"{url}/sessions"), 200, {"message": "Bienvenue"}),
            (client.get(f"{url}/profile"), 403, {"message": "not logged in"}),
            (client.delete(f"{url}/sessions"), 403, {"message": "not logged in"}),
        ]
        token = client.post(f"{url}/reset_password", data=email).json()["reset_token"]
        reset = {**email, "reset_token": token, "new_password": "t4rt1fl3tt3"}
        walk += [
            (client.put(f"{url}/reset_password", data=reset), 200, {**email, "message": "Password updated"}),
            (client.put(f"{url}/reset_password", data=reset), 403, {"message": "invalid reset token"}),
            (client.post(f"{url}/sessions", data=account), 401, {"message": "wrong email or password"}),
            (requests.post(f"{url}/sessions", json={**account, "password": "t4rt1fl3tt3"}), 200, walk[4][2]),
            (client.get(f"{url}/nowhere"), 404, {"message": "not found"}),
            (client.put(f"{url}/sessions"), 405, {"message": "method not allowed"}),
        ]
    assert [(answer.status_code, answer.json()) for answer, _, _ in walk] == [expected[1:] for expected in walk]
    assert all(SECURITY.items() <= answer.headers.items() for answer, _, _ in walk)
    assert [step.status_code for step in walk[6][0].history] == [302]
    assert not client.cookies


@pytest.mark.both_engines
def test_requests_gets_the_documented_answer_of_each_route_for_signed_in_users(start: Callable[..., Service]) -> None:
    url = start(AUTHSVC_SESSIONS_PER_USER="3").url
    account, email = {"email": "all@clients", "password": "b4l0u"}, {"email": "all@clients"}
    password, new = {"password": "b4l0u"}, {"password": "t4rt1fl3tt3"}
    requests.post(f"{url}/users", data=account, timeout=5)
    with requests.Session() as phone, requests.Session() as laptop:
        for client, agent in ((phone, "phone"), (laptop, 'lap"top\xe9')):
            client.headers["User-Agent"] = agent
            assert client.post(f"{url}/sessions", data=account).status_code == 200
        listed = laptop.get(f"{url}/sessions").json()["sessions"]
        shown = [(one["user_agent"], one["address"], one["current"]) for one in listed]
        assert shown == [('lap"top\xe9', "127.0.0.1", True), ("phone", "127.0.0.1", False)]
        walk = [
            (laptop.delete(f"{url}/sessions/{listed[1]['id']}"), 200, {"message": "session ended"}),
            (laptop.delete(f"{url}/sessions/{listed[1]['id']}"), 404, {"message": "no such session"}),
            (phone.get(f"{url}/profile"), 403, {"message": "not logged in"}),
            (phone.post(f"{url}/sessions", data=account), 200, {**email, "message": "logged in"}),
            (laptop.delete(f"{url}/sessions/others"), 200, {"message": "all other sessions ended"}),
            (phone.get(f"{url}/profile"), 403, {"message": "not logged in"}),
            (laptop.delete(f"{url}/sessions/{listed[0]['id']}"), 200, {"message": "session ended"}),
        ]
        assert not laptop.cookies
        walk += [
            (laptop.post(f"{url}/sessions", data=account), 200, {**email, "message": "logged in"}),
            (laptop.put(f"{url}/password", data=new | {"new_password": "x"}), 403, {"message": "wrong password"}),
            (
                laptop.put(f"{url}/password", data=password | {"new_password": "t4rt1fl3tt3"}),
                *(200, {**email, "message": "password changed"}),
            ),
            (laptop.get(f"{url}/profile"), 200, email),
            (laptop.delete(f"{url}/sessions/all"), 200, {"message": "all sessions ended"}),
            (laptop.get(f"{url}/sessions"), 403, {"message": "not logged in"}),
            (laptop.post(f"{url}/sessions", json=account | new), 200, {**email, "message": "logged in"}),
            (laptop.delete(f"{url}/profile", data=password), 403, {"message": "wrong password"}),
            (laptop.delete(f"{url}/profile", json=new), 200, {**email, "message": "account deleted"}),
            (laptop.post(f"{url}/sessions", data=account | new), 401, {"message": "wrong email or password"}),
        ]
        assert not laptop.cookies
    assert [(answer.status_code, answer.json()) for answer, *_ in walk] == [tuple(rest) for _, *rest in walk]
    assert all(SECURITY.items() <= answer.headers.items() for answer, *_ in walk)


def code_of(seed: str, step: int = 0) -> str:
    """Return the current code, or that of a step of 30 s before or after."""
    return totp.code(seed, int(time.time()) // totp.STEP + step)


def test_two_factor_authentication_and_used_codes_survive_a_restart(start: Callable[..., Service]) -> None:
    service = start()
    account = {"email": "second@factor", "password": "b4l0u"}
    password = {"password": account["password"]}

    def log_in(otp: str | None = None) -> tuple[int, str]:
        form = account if otp is None else {**account, "otp": otp}
        answer = requests.post(f"{service.url}/sessions", data=form, timeout=5)
        return answer.status_code, answer.json()["message"]

    with requests.Session() as client:
        client.post(f"{service.url}/users", data=account)
        client.post(f"{service.url}/sessions", data=account)
        begun = client.post(f"{service.url}/totp", data=password).json()
        assert begun["uri"].startswith(f"otpauth://totp/authsvc%3Asecond@factor?secret={begun['secret']}&")
        service.end()
        service.start()
        used = code_of(begun["secret"])
        confirmed = client.put(f"{service.url}/totp", data={"otp": used}).json()
        assert confirmed["message"] == "second factor on"
        codes = confirmed["recovery_codes"]
        assert client.get(f"{service.url}/profile").json() == {"email": account["email"]}
        assert log_in(codes[0]) == (200, "logged in")
        service.end()
        service.start()
        assert log_in() == (401, "one-time code required")
        assert log_in(used) == (401, "wrong one-time code")
        assert log_in(codes[0]) == (401, "wrong one-time code")
        form = {**account, "otp": code_of(begun["secret"], 1)}
        assert client.post(f"{service.url}/sessions", data=form).status_code == 200
        answer = client.delete(f"{service.url}/totp", data=password | {"otp": codes[1]})
        assert (answer.status_code, answer.json()) == (200, {"message": "second factor off"})
        assert client.get(f"{service.url}/profile").json() == {"email": account["email"]}
        assert log_in() == (200, "logged in")


def curl(*arguments: str) -> tuple[int, str]:
    """Return the status and the body of the last answer."""
    output = subprocess.check_output(["curl", "-sS", "-w", "\n%{http_code}", *arguments], text=True)
    body, _, status = output.rpartition("\n")
    return int(status), body


def test_curl_gets_the_documented_answers(service: Service, tmp_path: Path) -> None:
    url, jar, email = service.url, str(tmp_path / "jar"), "curl@clients"
    account = ("-d", f"email={email}", "-d", "password=b4l0u")
    assert curl(url) == (200, '{"message": "Bienvenue"}')
    assert curl(*account, f"{url}/users") == (200, f'{{"email": "{email}", "message": "user created"}}')
    assert curl(*account, "-c", jar, f"{url}/sessions") == (200, f'{{"email": "{email}", "message": "logged in"}}')
    assert curl("-b", jar, f"{url}/profile") == (200, f'{{"email": "{email}"}}')
    assert curl("-b", jar, "-c", jar, "-X", "DELETE", f"{url}/sessions")[0] == 302
    assert curl("-b", jar, f"{url}/profile") == (403, '{"message": "not logged in"}')
    token = json.loads(curl("-d", f"email={email}", f"{url}/reset_password")[1])["reset_token"]
    reset = ("-X", "PUT", "-d", f"email={email}", "-d", f"reset_token={token}", "-d", "new_password=t4rt1fl3tt3")
    updated = (200, f'{{"email": "{email}", "message": "Password updated"}}')
    assert curl(*reset, f"{url}/reset_password") == updated
    assert curl(*account, f"{url}/sessions") == (401, '{"message": "wrong email or password"}')


def test_curl_sends_multipart_forms(service: Service) -> None:
    account = ("-F", "email=é and spaces@multipart", "-F", 'password=a"b;c\\d')
    status, body = curl(*account, f"{service.url}/users")
    assert (status, json.loads(body)["email"]) == (200, "é and spaces@multipart")
    assert curl(*account, f"{service.url}/sessions")[0] == 200
    assert curl("-F", "email=é and spaces@multipart", "-F", "password=a", f"{service.url}/sessions")[0] == 401


def test_curl_repeats_a_delete_when_it_follows_the_redirect(service: Service) -> None:
    account = {"email": "follows@clients", "password": "b4l0u"}
    requests.post(f"{service.url}/users", data=account, timeout=5)
    cookie = requests.post(f"{service.url}/sessions", data=account, timeout=5).cookies["session_id"]
    assert curl("-L", "-X", "DELETE", "-b", f"session_id={cookie}", f"{service.url}/sessions")[0] == 405
    assert requests.get(f"{service.url}/profile", cookies={"session_id": cookie}, timeout=5).status_code == 403


# The process


@pytest.mark.both_engines
def test_the_service_prints_only_its_url(start: Callable[..., Service], engine: str) -> None:
    service = start()
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*", service.url)
    assert requests.get(service.url, timeout=5).status_code == 200
    assert service.process.stdout
    service.process.terminate()
    assert service.process.stdout.read() == ""
    logged = [json.loads(line) for line in service.log.splitlines()]
    assert [line["event"] for line in logged] == ["sys_startup", "sys_shutdown"]
    assert f"authsvc {logged[0]['version']}\n" == service.command("--version")
    assert logged[0]["database"].startswith({"sqlite": "SQLite 3.", "postgres": "PostgreSQL 1"}[engine])
    assert logged[0]["production"] is False


def test_a_restart_uses_the_same_port_and_keeps_the_data(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_LISTEN=f"127.0.0.1:{fixed_port()}")
    url, form = service.url, {"email": "kept@restart", "password": "b4l0u"}
    with requests.Session() as client:
        client.post(f"{url}/users", data=form, timeout=5)
        client.post(f"{url}/sessions", data=form, timeout=5)
        service.end()
        service.start()
        assert service.url == url
        assert client.get(f"{url}/profile", timeout=5).json() == {"email": "kept@restart"}


def test_a_setting_lets_the_service_listen_on_all_addresses(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_LISTEN="0.0.0.0:0", AUTHSVC_UNSAFE_LISTEN="1")
    assert service.address[0] == "0.0.0.0"
    assert requests.get(f"http://127.0.0.1:{service.address[1]}", timeout=5).status_code == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_service_on_all_ipv6_addresses_takes_ipv4_too(start: Callable[..., Service]) -> None:
    url = start(AUTHSVC_LISTEN="[::]:0", AUTHSVC_UNSAFE_LISTEN="1").url
    account = {"email": "both@stacks", "password": "b4l0u"}
    for host in "127.0.0.1", "[::1]":
        with requests.Session() as client:
            client.post(f"{url}/users", data=account, timeout=5)
            at_host = url.replace("[::]", host)
            assert client.post(f"{at_host}/sessions", data=account, timeout=5).status_code == 200
            (session,) = client.get(f"{at_host}/sessions", timeout=5).json()["sessions"]
            assert session["address"] == host.strip("[]")
            assert "reset_token" in client.post(f"{at_host}/reset_password", data=account, timeout=5).json()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_service_on_one_ipv6_address_does_not_take_ipv4(start: Callable[..., Service]) -> None:
    with socket.socket() as held:  # it refuses connections, and no other process of the machine can get its port
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        url = start(AUTHSVC_LISTEN=f"[::1]:{port}").url
        assert requests.get(url, timeout=5).status_code == 200
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{port}", timeout=5)


@pytest.mark.process
def test_another_wsgi_server_can_serve_the_application(tmp_path: Path) -> None:
    environ = {**clean_environ(), "AUTHSVC_DATABASE": str(tmp_path / "authsvc.db"), "AUTHSVC_BCRYPT_COST": "4"}
    command = [str(Path(PYTHON).with_name("waitress-serve")), "--listen=127.0.0.1:0", "authsvc:app"]
    with subprocess.Popen(command, cwd=HERE, env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        line = process.stderr.readline()
        try:
            assert not (tmp_path / "authsvc.db").exists()  # nothing is opened before the first request
            ended = run_main(line.split()[-1])
        finally:
            process.terminate()
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--port", 2), ("5000", 2)])
def test_help_is_the_only_argument_beside_the_commands(
    capsys: pytest.CaptureFixture[str], argument: str, code: int
) -> None:
    with pytest.raises(SystemExit) as ended:
        authsvc.main([argument])
    assert ended.value.code == code
    assert "AUTHSVC_" in "".join(capsys.readouterr()) or code


# Starts that fail


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with three files that this release cannot use as its database."""
    (tmp_path / "notes.txt").write_text("no database " * 100)
    for name, script in (
        ("newer.db", "CREATE TABLE users (id); PRAGMA user_version = 99;"),
        ("foreign.db", "CREATE TABLE t (id)"),
    ):
        connection = sqlite3.connect(tmp_path / name)
        connection.executescript(script)
        connection.close()
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("AUTHSVC_BCRYPT_COST", "3", "AUTHSVC_BCRYPT_COST=3 must be from 4 to 15"),
        ("AUTHSVC_THROTTLE", "no", "must be on or off"),
        ("AUTHSVC_SESSION_LIFE", "60", "AUTHSVC_SESSION_LIFE is not a setting"),
        ("AUTHSVC_PUBLIC_URL", "https://auth.example/", "AUTHSVC_PUBLIC_URL=https://auth.example/ must be"),
        ("AUTHSVC_LISTEN", "0.0.0.0:0", "AUTHSVC_UNSAFE_LISTEN=1 to accept the risk"),
        ("AUTHSVC_LISTEN", "somewhere", "must be ADDRESS:PORT"),
    ],
)
def test_a_wrong_setting_prevents_the_start(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    reason: str,
) -> None:
    before = contents(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv(name, value)
    assert authsvc.main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("authsvc: ")
    assert reason in err
    assert contents(folder) == before


def refused_start(folder: Path, before: str = "", **environ: str) -> str:
    """Run some Python and then a service that must not start; return the one line that it prints."""
    code = f"import sys, authsvc, os; {before}; sys.exit(authsvc.main([]))"
    command = [PYTHON, "-c", code] if before else [PYTHON, str(HERE / "authsvc.py")]
    environ = {"PYTHONPATH": str(HERE), "AUTHSVC_LISTEN": "127.0.0.1:0", **environ}
    environ |= {name: value for name, value in clean_environ().items() if not (before and name.startswith("COVERAGE"))}
    found = contents(folder)
    ended = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert contents(folder) == found
    return ended.stderr


@pytest.mark.process
@pytest.mark.parametrize(
    ("database", "reason"),
    [
        ("newer.db", "newer release"),
        ("foreign.db", "database of another program"),
        ("notes.txt", "not a database"),
        ("missing/authsvc.db", "No such file or directory"),
        (".", "cannot open the database"),
    ],
)
def test_a_file_that_is_no_database_of_this_service_prevents_the_start(
    folder: Path, database: str, reason: str
) -> None:
    assert reason in refused_start(folder, AUTHSVC_DATABASE=database)


def test_a_port_in_use_prevents_the_start_before_a_file_is_made(service: Service, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{service.address[1]}"
    assert f"AUTHSVC_LISTEN={listen}: address already in use" in refused_start(tmp_path, AUTHSVC_LISTEN=listen)
    assert not contents(tmp_path)


@pytest.mark.process
@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("fcntl", []),
        ("pwd", ["user", "list"]),
        ("syslog", ["backup", "copy.db"]),
        ("fcntl pwd syslog grp resource termios", []),
        ("fcntl pwd syslog grp resource termios", ["user", "list"]),
    ],
)
def test_a_system_without_posix_modules_prevents_the_start(tmp_path: Path, missing: str, arguments: list[str]) -> None:
    without = f"import sys; sys.modules.update(dict.fromkeys({missing.split()}))"
    command = [PYTHON, "-c", f"{without}; import authsvc; sys.exit(authsvc.main({arguments}))"]
    environ = clean_environ() | {"PYTHONPATH": str(HERE)}
    ended = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=20)
    line = "authsvc: this service runs on Linux and macOS; on Windows use WSL\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)
    assert not contents(tmp_path)


@pytest.mark.process
@pytest.mark.parametrize("version", ["3.34.0", "3.36.1"])
def test_an_old_sqlite_prevents_the_start_before_a_file_is_made(tmp_path: Path, version: str) -> None:
    numbers = tuple(map(int, version.split(".")))
    before = f"import sqlite3; sqlite3.sqlite_version, sqlite3.sqlite_version_info = {version!r}, {numbers}"
    line = refused_start(tmp_path, before)
    assert line == f"authsvc: cannot open the database authsvc.db: it needs SQLite 3.37 or newer, this is {version}\n"
    assert not contents(tmp_path)


@pytest.mark.process
def test_a_read_only_folder_prevents_the_start() -> None:
    # Root may write anywhere, so the process becomes nobody, after all imports: nobody may be unable to read the files
    # of the interpreter.
    imports = "import cli.commands, engines.sqlite, web.server"
    nobody = "os.setgroups([]), os.setgid(65534), os.setuid(65534)" if os.getuid() == 0 else "0"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        assert "Permission denied" in refused_start(Path(name), f"{imports}; {nobody}")


@pytest.mark.process
@pytest.mark.parametrize(
    ("redirection", "unbuffered", "lines"),
    [
        (">/dev/full", "", ["authsvc: output: No space left on device"]),
        ("<&- >/dev/full", "1", ["authsvc: output: No space left on device"]),
        (">&-", "", ["authsvc: standard output is closed: redirect it to /dev/null"]),
        (">/dev/full 2>&1", "", []),
        (">&- 2>&-", "", []),
    ],
)
def test_a_start_whose_output_cannot_be_written_ends_in_one_line(
    tmp_path: Path, redirection: str, unbuffered: str, lines: list[str]
) -> None:
    environ = clean_environ() | {"AUTHSVC_LISTEN": "127.0.0.1:0", "PYTHONUNBUFFERED": unbuffered}
    command = f'exec "{PYTHON}" "{HERE / "authsvc.py"}" {redirection}'
    ended = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=20
    )
    logged = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert (ended.returncode, ended.stdout, logged) == (1, "", lines)


@pytest.mark.process
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2>&- <&-"])
def test_a_service_whose_log_cannot_be_written_serves(tmp_path: Path, redirection: str) -> None:
    environ = clean_environ() | {"AUTHSVC_LISTEN": "127.0.0.1:0", "AUTHSVC_BCRYPT_COST": str(COST)}
    command = ["bash", "-c", f'exec "{PYTHON}" "{HERE / "authsvc.py"}" </dev/null {redirection}']
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        form = {"email": "log@full", "password": "b4l0u"}
        statuses = [requests.post(f"{url}/{path}", data=form, timeout=5).status_code for path in ("users", "sessions")]
        streams = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in (0, 2)]
        process.terminate()
        assert (statuses, process.stdout.read()) == ([200, 200], "")
    assert process.returncode in (0, 1)  # 1: Python could not write what was left of the log
    # No file of the database got the number of a closed stream.
    assert streams == ["/dev/null", "/dev/full" if "full" in redirection else "/dev/null"]


# Another locale

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}  # of text files, too


def test_the_pages_do_not_depend_on_the_locale(start: Callable[..., Service], service: Service) -> None:
    page = requests.get(f"{start(**ASCII).url}/login", timeout=5)
    assert "One moment…" in page.content.decode()
    assert page.content == requests.get(f"{service.url}/login", timeout=5).content


def test_commands_take_and_store_utf_8_and_show_what_they_can(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start(**ASCII, AUTHSVC_DATABASE=str(tmp_path / "données.db"))
    service.command("user", "add", "žofie@x.io")
    assert service.command("user", "list").endswith("?ofie@x.io\n")
    assert json.loads(service.command("user", "show", "žofie@x.io", "--json"))["email"] == "žofie@x.io"
    assert "email         ?ofie@x.io" in service.command("user", "show", "ŽOFIE@x.io")
    assert "\nžofie@x.io,!," in service.command("export")
    assert service.command("--help").startswith("usage: ")
    service.command("backup", "copié.db")
    assert (tmp_path / "copié.db").read_bytes()[:6] == b"SQLite"


# Expired sessions are deleted


def with_expired_sessions(database: str, expired: int) -> str:
    """Make a database with so many expired sessions of one user and a live one of another; return the live one."""
    settings = Settings(database=database, bcrypt_cost=COST)
    auth = Auth(DB(database), settings)
    user = auth.register_user("old@sessions", "b4l0u")
    live = str(auth.create_session(auth.register_user("live@sessions", "b4l0u").email))
    auth.close()
    ago = int(time.time()) - 3_000_000
    with raw_connection(database) as connection:
        connection.execute(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            WITH RECURSIVE numbers (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < ?)
            SELECT ? || CAST(number AS TEXT), ?, ?, ?, ?, '', '' FROM numbers
            """,
            (expired, "0" * 58, user.id, ago, ago, ago + 2_592_000),
        )
    return live


def sessions_in(database: str) -> int:
    with raw_connection(database) as connection:
        (count,) = connection.execute("SELECT count(*) FROM sessions").fetchone()
    return int(count)


def await_fewer_sessions(limit: int, database: str) -> int:
    """Wait until there are fewer sessions than the limit; return how many there are."""
    end = time.monotonic() + 20
    while (count := sessions_in(database)) >= limit:
        assert time.monotonic() < end, count
        time.sleep(0.01)
    return count


@pytest.mark.both_engines
def test_expired_sessions_are_deleted_soon_after_the_start(start: Callable[..., Service], database: str) -> None:
    live = with_expired_sessions(database, 1000)
    service = start()
    assert await_fewer_sessions(2, database) == 1
    answer = requests.get(f"{service.url}/profile", cookies={"session_id": live}, timeout=5)
    assert answer.json() == {"email": "live@sessions"}
    assert service.end() == 0
    assert [json.loads(line)["event"] for line in service.log.splitlines()] == ["sys_startup", "sys_shutdown"]


@pytest.mark.both_engines
def test_requests_and_shutdown_do_not_wait_for_the_deletion(start: Callable[..., Service], database: str) -> None:
    live = with_expired_sessions(database, 60_000)
    service = start(AUTHSVC_THROTTLE="off")  # a slow machine may give back counted attempts too late
    await_fewer_sessions(60_000, database)
    began = time.monotonic()
    for _ in range(10):
        form = {"email": "live@sessions", "password": "b4l0u"}
        assert requests.post(f"{service.url}/sessions", data=form, timeout=5).status_code == 200
        assert requests.get(f"{service.url}/profile", cookies={"session_id": live}, timeout=5).status_code == 403
    assert time.monotonic() - began < 10
    began = time.monotonic()
    assert service.end() == 0
    assert time.monotonic() - began < 5
    assert not list(service.folder.glob("authsvc.db-*"))  # the database was closed
    assert sessions_in(database) > 1  # the deletion was not finished
    assert "sys_crash" not in service.log
    assert_intact(service)


# Simultaneous requests


def register_at_once(count: int, url: str) -> Counter[int]:
    form = {"email": "race@clients", "password": "b4l0u"}

    def register(_: int) -> int:
        status = 503  # on a machine with too much to do, a hash may wait for longer than MAX_WAIT
        while status == 503:
            status = requests.post(f"{url}/users", data=form, timeout=30).status_code
        return status

    return Counter(at_once(count, register))


@pytest.mark.both_engines
def test_one_of_many_simultaneous_registrations_succeeds(service: Service) -> None:
    assert register_at_once(32, service.url) == {200: 1, 400: 31}


def test_one_of_many_simultaneous_registrations_succeeds_at_full_cost(start: Callable[..., Service]) -> None:
    assert register_at_once(4, start(AUTHSVC_BCRYPT_COST="12").url) == {200: 1, 400: 3}


@pytest.mark.both_engines
def test_one_of_many_simultaneous_uses_of_a_token_succeeds(service: Service) -> None:
    url, email = service.url, {"email": "token@clients"}
    requests.post(f"{url}/users", data={**email, "password": "b4l0u"}, timeout=5)
    form = {**email, **requests.post(f"{url}/reset_password", data=email, timeout=5).json()}

    def reset(number: int) -> int:
        return requests.put(
            f"{url}/reset_password", data={**form, "new_password": f"new{number}"}, timeout=5
        ).status_code

    statuses = at_once(8, reset)
    assert Counter(statuses) == {200: 1, 403: 7}
    login = {**email, "password": f"new{statuses.index(200)}"}
    assert requests.post(f"{url}/sessions", data=login, timeout=5).status_code == 200


@pytest.mark.timing
def test_a_failed_login_tells_neither_by_answer_nor_by_time_if_the_email_is_known(
    start: Callable[..., Service],
) -> None:
    url = start(AUTHSVC_BCRYPT_COST="8", AUTHSVC_THROTTLE="off").url
    requests.post(f"{url}/users", data={"email": "known@clients", "password": "b4l0u"}, timeout=5)

    def ratio_of_fastest() -> float:  # the fastest quarter, as other processes on the machine delay the rest
        took: dict[str, list[float]] = {"known@clients": [], "other@clients": []}
        answers = []
        with requests.Session() as client:
            for email in [*took] * 30:
                began = time.perf_counter()
                answer = client.post(f"{url}/sessions", data={"email": email, "password": "wrong"})
                took[email].append(time.perf_counter() - began)
                headers = {**answer.headers, "Date": "", "X-Request-ID": ""}
                answers.append((answer.status_code, answer.content, headers))
        assert answers[0][0] == 401
        assert all(one == answers[0] for one in answers)
        known, unknown = (statistics.quantiles(times, n=4)[0] for times in took.values())
        return known / unknown

    assert any(0.9 < ratio_of_fastest() < 1.1 for _ in range(5))


# Secrets in files


@pytest.mark.both_engines
def test_no_secret_is_in_a_file_or_in_the_log(
    start: Callable[..., Service], database: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start()
    url, secrets = service.url, {main.PASSWD, main.NEW_PASSWD, "c4n4ry"}
    monkeypatch.setattr(main, "URL", url)
    form = {"email": main.EMAIL, "password": "c4n4ry"}

    def send_and_collect(session: requests.Session, *arguments: Any, **options: Any) -> requests.Response:
        answer = send(session, *arguments, **options)
        secrets.update(re.findall("[0-9a-f]{8}-[0-9a-f-]{27}", f"{answer.headers} {answer.text}"))
        return answer

    send = requests.Session.request
    monkeypatch.setattr(requests.Session, "request", send_and_collect)
    main.register_user(main.EMAIL, main.PASSWD)
    main.log_in_wrong_password(main.EMAIL, main.NEW_PASSWD)
    main.log_out(main.log_in(main.EMAIL, main.PASSWD))
    main.update_password(main.EMAIL, main.reset_password_token(main.EMAIL), main.NEW_PASSWD)
    session_id, token = main.log_in(main.EMAIL, main.NEW_PASSWD), main.reset_password_token(main.EMAIL)
    assert {session_id, token} < secrets
    assert len(secrets) == 3 + 4
    for path, options in {
        "/users": {"data": form},
        "/sessions": {"data": form, "headers": {"Content-Type": "text/c4n4ry"}},
        f"/{token}?password=c4n4ry": {"data": form},
        "/reset_password": {"data": b"\xffc4n4ry", "headers": {"Content-Type": "application/json"}},
        "/": {"data": form, "cookies": {"session_id": "c4n4ry"}},
    }.items():
        assert requests.post(url + path, **options, timeout=5).status_code >= HTTPStatus.BAD_REQUEST  # type: ignore[arg-type]
    with socket.create_connection(service.address) as wire:
        wire.sendall(b"GET /c4n4ry\xff HTTP/1.1\r\nc4n4ry c4n4ry\r\n\r\n")
        assert b" 400 " in wire.recv(100)
    with raw_connection(database, timeout=5) as connection:
        connection.execute("ALTER TABLE users RENAME COLUMN email_key TO gone")
        assert requests.post(f"{url}/sessions", data=form, timeout=5).status_code == HTTPStatus.INTERNAL_SERVER_ERROR
        connection.execute("ALTER TABLE users RENAME COLUMN gone TO email_key")

    assert awaited(lambda: '"sys_crash"' in service.log)  # a thread writes the log
    left = contents(service.folder) | {"the rows": rows_in(database)}
    service.end()
    hashed = hashlib.sha256(session_id.encode()).hexdigest().encode()
    if engine == "sqlite":
        left["the database, closed"] = (service.folder / "authsvc.db").read_bytes()
        assert {"authsvc.db", "authsvc.db-wal", "authsvc.db-shm", "log"} < left.keys()
        assert hashed in left["authsvc.db-wal"]
    assert hashed in left["the rows"]
    assert b'"sys_crash"' in left["log"]
    assert not [(name, secret) for name in left for secret in secrets if secret.encode() in left[name]]
