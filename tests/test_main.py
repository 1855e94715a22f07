"""The service as its users meet it: a real process, driven through main.py, requests and curl; also killed."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import random
import re
import runpy
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import pytest
import requests

import authsvc
import main
import totp
from auth import Auth
from settings import Settings
from storage import open_store
from tests.conftest import COST, HERE, Service, clean_environ, ledger_of, rows_in
from tests.crowd import assert_whole

T = TypeVar("T")

ROUNDS = int(os.environ.get("KILL_ROUNDS", "5"))  # of kill -9, on each engine
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
    environ = {**clean_environ(), "AUTHSVC_URL": url}
    return subprocess.run([PYTHON, HERE / "main.py"], env=environ, capture_output=True, text=True, timeout=60)


def at_once(count: int, act: Callable[[int], T]) -> list[T]:
    """Call from as many threads at the same moment."""
    line = threading.Barrier(count)

    def wait_and_act(number: int) -> T:
        line.wait(10)
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait_and_act, range(count)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def test_main_walks_a_fresh_service_in_silence(start: Callable[..., Service]) -> None:
    ended = run_main(start().url + "/")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize("host", ["0.0.0.0", "localhost"])
def test_main_walks_a_service_under_each_name_of_this_machine(start: Callable[..., Service], host: str) -> None:
    ended = run_main(start().url.replace("127.0.0.1", host))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.slow
def test_main_needs_a_fresh_database_each_time(start: Callable[..., Service], new_place: Callable[[], str]) -> None:
    service = start()
    assert run_main(service.url).returncode == 0
    again = run_main(service.url)
    assert again.returncode == 1
    assert "AssertionError" in again.stderr.splitlines()[-1]
    assert run_main(start(AUTHSVC_DATABASE=new_place()).url).returncode == 0


def test_main_says_in_one_line_that_nothing_listens() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ended = run_main(url)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert url in ended.stderr


# Clients

SECURITY = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Type": "application/json"}


def test_requests_walks_every_route(service: Service) -> None:
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
            (client.put(f"{url}/users"), 405, {"message": "method not allowed"}),
        ]
    assert [(answer.status_code, answer.json()) for answer, _, _ in walk] == [expected[1:] for expected in walk]
    assert all(SECURITY.items() <= answer.headers.items() for answer, _, _ in walk)
    assert [step.status_code for step in walk[6][0].history] == [302]
    assert not client.cookies


def test_requests_walks_every_route_behind_a_login(start: Callable[..., Service]) -> None:
    url = start(AUTHSVC_SESSIONS_PER_USER="3").url
    account, email = {"email": "all@clients", "password": "b4l0u"}, {"email": "all@clients"}
    password, new = {"password": "b4l0u"}, {"password": "t4rt1fl3tt3"}
    requests.post(f"{url}/users", data=account, timeout=5)
    with requests.Session() as phone, requests.Session() as laptop:
        for client, agent in ((phone, "phone"), (laptop, 'lap"top\xe9')):
            client.headers["User-Agent"] = agent
            assert client.post(f"{url}/sessions", data=account).status_code == 200
        listed = laptop.get(f"{url}/sessions").json()["sessions"]
        told = [(one["user_agent"], one["address"], one["current"]) for one in listed]
        assert told == [('lap"top\xe9', "127.0.0.1", True), ("phone", "127.0.0.1", False)]
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
    """The code of now, or of a step of 30 s before or after."""
    return totp.code(seed, int(time.time()) // totp.STEP + step)


@pytest.mark.slow
def test_a_second_factor_outlives_a_restart_and_so_does_what_was_spent(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_LISTEN=f"127.0.0.1:{free_port()}")
    url, account = service.url, {"email": "second@factor", "password": "b4l0u"}
    password = {"password": account["password"]}

    def logs_in(otp: str | None = None) -> tuple[int, str]:
        form = account if otp is None else {**account, "otp": otp}
        answer = requests.post(f"{url}/sessions", data=form, timeout=5)
        return answer.status_code, answer.json()["message"]

    with requests.Session() as client:
        client.post(f"{url}/users", data=account)
        client.post(f"{url}/sessions", data=account)
        begun = client.post(f"{url}/totp", data=password).json()
        assert begun["uri"].startswith(f"otpauth://totp/authsvc%3Asecond@factor?secret={begun['secret']}&")
        service.end()
        service.start()
        used = code_of(begun["secret"])
        confirmed = client.put(f"{url}/totp", data={"otp": used}).json()
        assert confirmed["message"] == "second factor on"
        codes = confirmed["recovery_codes"]
        assert client.get(f"{url}/profile").json() == {"email": account["email"]}
        assert logs_in(codes[0]) == (200, "logged in")
        service.end()
        service.start()
        assert logs_in() == (401, "one-time code required")
        assert logs_in(used) == (401, "wrong one-time code")
        assert logs_in(codes[0]) == (401, "wrong one-time code")
        form = {**account, "otp": code_of(begun["secret"], 1)}
        assert client.post(f"{url}/sessions", data=form).status_code == 200
        answer = client.delete(f"{url}/totp", data=password | {"otp": codes[1]})
        assert (answer.status_code, answer.json()) == (200, {"message": "second factor off"})
        assert client.get(f"{url}/profile").json() == {"email": account["email"]}
        assert logs_in() == (200, "logged in")


def curl(*arguments: str) -> tuple[int, str]:
    """Return the status and the body of the last answer."""
    output = subprocess.check_output(["curl", "-sS", "-w", "\n%{http_code}", *arguments], text=True)
    body, _, status = output.rpartition("\n")
    return int(status), body


def test_curl_walks_every_route(service: Service, tmp_path: Path) -> None:
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


def test_curl_that_follows_repeats_the_delete(service: Service) -> None:
    account = {"email": "follows@clients", "password": "b4l0u"}
    requests.post(f"{service.url}/users", data=account, timeout=5)
    cookie = requests.post(f"{service.url}/sessions", data=account, timeout=5).cookies["session_id"]
    assert curl("-L", "-X", "DELETE", "-b", f"session_id={cookie}", f"{service.url}/sessions")[0] == 405
    assert requests.get(f"{service.url}/profile", cookies={"session_id": cookie}, timeout=5).status_code == 403


# The process


def test_the_url_is_all_that_is_printed(start: Callable[..., Service], engine: str) -> None:
    service = start()
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*", service.url)
    assert requests.get(service.url, timeout=5).status_code == 200
    assert service.process.stdout
    service.process.terminate()
    assert service.process.stdout.read() == ""
    logged = [json.loads(line) for line in service.log.splitlines()]
    assert [line["event"] for line in logged] == ["sys_startup", "sys_shutdown"]
    assert logged[0]["database"].startswith({"sqlite": "SQLite 3.", "postgres": "PostgreSQL 1"}[engine])


@pytest.mark.slow
def test_a_restart_takes_the_same_port_and_keeps_what_was_stored(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_LISTEN=f"127.0.0.1:{free_port()}")
    url, form = service.url, {"email": "kept@restart", "password": "b4l0u"}
    with requests.Session() as client:
        client.post(f"{url}/users", data=form, timeout=5)
        client.post(f"{url}/sessions", data=form, timeout=5)
        service.end()
        service.start()
        assert service.url == url
        assert client.get(f"{url}/profile", timeout=5).json() == {"email": "kept@restart"}


@pytest.mark.once
@pytest.mark.slow
def test_an_override_opens_the_service_to_the_network(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_LISTEN="0.0.0.0:0", AUTHSVC_UNSAFE_LISTEN="1")
    assert service.address[0] == "0.0.0.0"
    assert requests.get(f"http://127.0.0.1:{service.address[1]}", timeout=5).status_code == 200


@pytest.mark.slow
def test_another_server_serves_the_same_application(tmp_path: Path) -> None:
    environ = {**clean_environ(), "AUTHSVC_DATABASE": str(tmp_path / "authsvc.db"), "AUTHSVC_BCRYPT_COST": "4"}
    command = [str(Path(PYTHON).with_name("waitress-serve")), "--listen=127.0.0.1:0", "authsvc:app"]
    with subprocess.Popen(command, cwd=HERE, env=environ, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = process.stderr.readline()
        try:
            assert not (tmp_path / "authsvc.db").exists()  # nothing is opened before the first request
            ended = run_main(said.split()[-1])
        finally:
            process.terminate()
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--port", 2), ("5000", 2)])
def test_help_is_the_only_argument(capsys: pytest.CaptureFixture[str], argument: str, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        authsvc.main([argument])
    assert ended.value.code == code
    assert "AUTHSVC_" in "".join(capsys.readouterr()) or code


# Starts that fail


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with three files that are no databases of this release."""
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
        ("AUTHSVC_LISTEN", "0.0.0.0:0", "AUTHSVC_UNSAFE_LISTEN=1 if you know better"),
        ("AUTHSVC_LISTEN", "somewhere", "must be ADDRESS:PORT"),
    ],
)
def test_a_wrong_setting_stops_the_start(
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
    """Start a service that must not start, after some Python; return the line it says."""
    code = f"import sys, authsvc, os; {before}; sys.exit(authsvc.main([]))"
    command = [PYTHON, "-c", code] if before else [PYTHON, str(HERE / "authsvc.py")]
    environ = {"PYTHONPATH": str(HERE), "AUTHSVC_LISTEN": "127.0.0.1:0", **environ}
    environ |= {name: value for name, value in clean_environ().items() if not (before and name.startswith("COVERAGE"))}
    found = contents(folder)
    ended = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert contents(folder) == found
    return ended.stderr


@pytest.mark.slow
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
def test_a_file_that_is_no_database_of_ours_stops_the_start(folder: Path, database: str, reason: str) -> None:
    assert reason in refused_start(folder, AUTHSVC_DATABASE=database)


@pytest.mark.once
def test_a_port_in_use_stops_the_start_before_a_file_is_made(service: Service, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{service.address[1]}"
    assert f"AUTHSVC_LISTEN={listen}: address already in use" in refused_start(tmp_path, AUTHSVC_LISTEN=listen)
    assert not contents(tmp_path)


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_stops_the_start() -> None:
    # Root may write anywhere, so it becomes nobody; only then, for nobody may be kept from the interpreter's files.
    nobody = "os.setgroups([]), os.setgid(65534), os.setuid(65534)" if os.getuid() == 0 else "0"
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        assert "Permission denied" in refused_start(Path(name), nobody)


# What is over is deleted


def left_over(place: str, expired: int) -> str:
    """Make a database with that many expired sessions of one user and a live one of another; return its id."""
    settings = Settings(database=place, bcrypt_cost=COST)
    auth = Auth(open_store(place), settings)
    user = auth.register_user("old@sessions", "b4l0u")
    live = str(auth.create_session(auth.register_user("live@sessions", "b4l0u").email))
    auth.close()
    ago = int(time.time()) - 3_000_000
    with ledger_of(place) as ledger:
        ledger.execute(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            WITH RECURSIVE numbers (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < ?)
            SELECT ? || CAST(number AS TEXT), ?, ?, ?, ?, '', '' FROM numbers
            """,
            (expired, "0" * 58, user.id, ago, ago, ago + 2_592_000),
        )
    return live


def sessions_in(place: str) -> int:
    with ledger_of(place) as ledger:
        (count,) = ledger.execute("SELECT count(*) FROM sessions").fetchone()
    return int(count)


def becomes(fewer_than: int, place: str) -> int:
    """Wait until there are fewer sessions; return how many there are."""
    end = time.monotonic() + 20
    while (count := sessions_in(place)) >= fewer_than:
        assert time.monotonic() < end, count
        time.sleep(0.01)
    return count


@pytest.mark.slow
def test_expired_sessions_are_deleted_soon_after_the_start_and_live_ones_stay(
    start: Callable[..., Service], place: str
) -> None:
    live = left_over(place, 1000)
    service = start()
    assert becomes(2, place) == 1
    answer = requests.get(f"{service.url}/profile", cookies={"session_id": live}, timeout=5)
    assert answer.json() == {"email": "live@sessions"}
    assert service.end() == 0
    assert [json.loads(line)["event"] for line in service.log.splitlines()] == ["sys_startup", "sys_shutdown"]


@pytest.mark.slow
def test_nobody_waits_while_much_is_deleted_and_a_signal_ends_it(start: Callable[..., Service], place: str) -> None:
    live = left_over(place, 60_000)
    service = start()
    becomes(60_000, place)
    began = time.monotonic()
    for _ in range(20):
        form = {"email": "live@sessions", "password": "b4l0u"}
        assert requests.post(f"{service.url}/sessions", data=form, timeout=5).status_code == 200
        assert requests.get(f"{service.url}/profile", cookies={"session_id": live}, timeout=5).status_code == 403
    assert time.monotonic() - began < 10
    began = time.monotonic()
    assert service.end() == 0
    assert time.monotonic() - began < 5
    assert not list(service.folder.glob("authsvc.db-*"))  # it was closed
    assert sessions_in(place) > 1  # in the middle of it
    assert "sys_crash" not in service.log
    assert_whole(service)


# Many at once


def register_at_once(url: str) -> Counter[int]:
    form = {"email": "race@clients", "password": "b4l0u"}
    return Counter(at_once(32, lambda _: requests.post(f"{url}/users", data=form, timeout=30).status_code))


def test_one_of_many_simultaneous_registrations_wins(service: Service) -> None:
    assert register_at_once(service.url) == {200: 1, 400: 31}


@pytest.mark.once  # what differs is the time in bcrypt
@pytest.mark.slow
def test_one_of_many_simultaneous_registrations_wins_at_full_cost(start: Callable[..., Service]) -> None:
    assert register_at_once(start(AUTHSVC_BCRYPT_COST="12").url) == {200: 1, 400: 31}


def test_one_of_many_simultaneous_uses_of_a_token_wins(service: Service) -> None:
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


@pytest.mark.slow
def test_a_wrong_password_says_and_takes_the_same_for_a_known_and_an_unknown_email(
    start: Callable[..., Service],
) -> None:
    url = start(AUTHSVC_BCRYPT_COST="10", AUTHSVC_THROTTLE="off").url
    requests.post(f"{url}/users", data={"email": "known@clients", "password": "b4l0u"}, timeout=5)

    def ratio_of_medians() -> float:
        took: dict[str, list[float]] = {"known@clients": [], "other@clients": []}
        said = []
        with requests.Session() as client:
            for email in [*took] * 30:
                began = time.perf_counter()
                answer = client.post(f"{url}/sessions", data={"email": email, "password": "wrong"})
                took[email].append(time.perf_counter() - began)
                headers = {**answer.headers, "Date": "", "X-Request-ID": ""}
                said.append((answer.status_code, answer.content, headers))
        assert said[0][0] == 401
        assert all(one == said[0] for one in said)
        known, unknown = map(statistics.median, took.values())
        return known / unknown

    assert any(0.9 < ratio_of_medians() < 1.1 for _ in range(3))


# What is left behind


def test_no_secret_is_in_a_file_or_in_the_log(
    start: Callable[..., Service], place: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start()
    url, secrets = service.url, {main.PASSWD, main.NEW_PASSWD, "c4n4ry"}
    monkeypatch.setattr(main, "URL", url)
    form = {"email": main.EMAIL, "password": "c4n4ry"}

    def noted(session: requests.Session, *arguments: Any, **options: Any) -> requests.Response:
        answer = send(session, *arguments, **options)
        secrets.update(re.findall("[0-9a-f]{8}-[0-9a-f-]{27}", f"{answer.headers} {answer.text}"))
        return answer

    send = requests.Session.request
    monkeypatch.setattr(requests.Session, "request", noted)
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
    with ledger_of(place, timeout=5) as ledger:
        ledger.execute("ALTER TABLE users RENAME COLUMN email_key TO gone")
        assert requests.post(f"{url}/sessions", data=form, timeout=5).status_code == HTTPStatus.INTERNAL_SERVER_ERROR
        ledger.execute("ALTER TABLE users RENAME COLUMN gone TO email_key")

    left = contents(service.folder) | {"the rows": rows_in(place)}
    service.end()
    hashed = hashlib.sha256(session_id.encode()).hexdigest().encode()
    if engine == "sqlite":
        left["the database, closed"] = (service.folder / "authsvc.db").read_bytes()
        assert {"authsvc.db", "authsvc.db-wal", "authsvc.db-shm", "log"} < left.keys()
        assert hashed in left["authsvc.db-wal"]
    assert hashed in left["the rows"]
    assert b'"sys_crash"' in left["log"]
    assert not [(name, secret) for name in left for secret in secrets if secret.encode() in left[name]]


class Promises:
    """What was answered with 200: the password of each email, and its live session if there is one."""

    def __init__(self, url: str, name: str) -> None:
        self.kept: dict[str, tuple[str, str | None]] = {}
        self._url, self._name = url, name

    def collect(self) -> None:
        """Register, log in and reset, until the service is gone."""
        with requests.Session() as client:
            post = functools.partial(client.post, timeout=10)
            try:
                for number in range(1_000_000):
                    email = f"{number}@{self._name}"
                    account = {"email": email, "password": f"old{number}"}
                    post(f"{self._url}/users", data=account).raise_for_status()
                    self.kept[email] = account["password"], None
                    session = post(f"{self._url}/sessions", data=account).cookies["session_id"]
                    self.kept[email] = account["password"], session
                    client.cookies.clear()  # the next login would end the session it comes with
                    if number % 2:
                        form = post(f"{self._url}/reset_password", data={"email": email}).json()
                        form["new_password"] = f"new{number}"
                        del self.kept[email]  # nothing is promised until it is answered
                        client.put(f"{self._url}/reset_password", data=form, timeout=10).raise_for_status()
                        self.kept[email] = form["new_password"], None
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                return

    def broken(self, url: str) -> Iterator[str]:
        """Yield the emails that lost something; and log in by which all their sessions end."""
        for email, (password, session) in self.kept.items():
            with requests.Session() as client:
                cookies = {"session_id": session or ""}
                if session and client.get(f"{url}/profile", cookies=cookies, timeout=10).json() != {"email": email}:
                    yield f"session of {email}"
                form = {"email": email, "password": password}
                if client.post(f"{url}/sessions", data=form, timeout=10).status_code != HTTPStatus.OK:
                    yield f"password of {email}"


@pytest.mark.slow
def test_what_was_answered_survives_a_kill(start: Callable[..., Service]) -> None:
    service = start()
    promised = 0
    for number in range(ROUNDS):
        clients = [Promises(service.url, f"{number}.{index}") for index in range(6)]
        with ThreadPoolExecutor(6) as pool:
            running = [pool.submit(client.collect) for client in clients]
            time.sleep(random.uniform(0.2, 0.6))
            assert service.end(signal.SIGKILL) == -signal.SIGKILL
        for one in running:
            one.result()
        service.start()
        assert not [loss for client in clients for loss in client.broken(service.url)]
        promised += sum(len(client.kept) for client in clients)
        assert_whole(service)
    assert promised > ROUNDS  # it lost nothing because there was something to lose
