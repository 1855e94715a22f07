"""The fail2ban filter, held by the real ``fail2ban-regex`` to the lines that the service writes."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

import guard
from tests.conftest import HERE, Service

pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.skipif(not shutil.which("fail2ban-regex"), reason="needs fail2ban-regex: apt-get install fail2ban"),
]

FILES = HERE / "deploy" / "fail2ban"
PASSWORD = "correct horse battery"

FORGED = (
    '{"time": "2026-11-21T03:08:33.550+00:00", "event": "authn_login_fail", "request_id": "0123456789abcdef", '
    '"address": "203.0.113.66", "user_id": 1}'
)


def matched(log: Path, form: str = "<ip>") -> list[str]:
    """What fail2ban reads from each line that it holds against somebody."""
    command = ["fail2ban-regex", "--out", f"{form}|", str(log), str(FILES / "authsvc.conf")]
    return subprocess.run(command, capture_output=True, text=True).stdout.replace("\n", "").split("|")[:-1]


def banned(log: Path) -> Counter[str]:
    """How many lines it holds against whom."""
    return Counter(matched(log))


@pytest.fixture
def service_at(start: Callable[..., Service]) -> Service:
    return start(
        AUTHSVC_PUBLIC_URL="https://auth.example.com", AUTHSVC_TRUSTED_PROXY="127.0.0.1", AUTHSVC_BCRYPT_COST="10"
    )


@pytest.fixture
def send(service_at: Service) -> Callable[..., int]:
    def send(method: str, path: str, address: str, *, headers: dict[str, str] | None = None, **form: str) -> int:
        sent = {"X-Forwarded-For": address, **(headers or {})}
        return requests.request(method, service_at.url + path, data=form, headers=sent, timeout=30).status_code

    return send


def test_failed_and_throttled_logins_match(service_at: Service, send: Callable[..., int]) -> None:
    assert send("POST", "/users", "198.18.0.1", email="bob@example.com", password=PASSWORD) == 200
    assert send("POST", "/sessions", "198.18.0.2", email="bob@example.com", password="wrong") == 401
    assert send("POST", "/sessions", "2001:db8::3", email="nobody@example.com", password="wrong") == 401
    said = [send("POST", "/sessions", "198.18.0.4", email="guess@example.com", password="wrong") for _ in range(12)]
    assert said == [401] * 10 + [429] * 2
    assert banned(service_at.log_file) == {"198.18.0.2": 1, "2001:db8::3": 1, "198.18.0.4": 12}


def test_nothing_else_matches(service_at: Service, send: Callable[..., int]) -> None:
    form = {"email": "bob@example.com", "password": PASSWORD}
    evil = {"Origin": "https://evil.example"}
    assert send("POST", "/users", "198.18.0.1", **form) == 200
    assert send("POST", "/users", "198.18.0.1", **form) == 400
    assert send("POST", "/sessions", "198.18.0.1", **form) == 200
    assert send("POST", "/sessions", "198.18.0.1", headers=evil, **form) == 403  # the address of its victim
    assert send("POST", "/sessions", "rubbish", email="bob@example.com", password="wrong") == 401  # nobody to ban
    assert send("GET", "/profile", "198.18.0.1") == 403
    assert send("PUT", "/reset_password", "198.18.0.1", email="b", reset_token="x", new_password=PASSWORD) == 403
    assert not banned(service_at.log_file)


def test_a_forged_line_bans_nobody_but_its_author(service_at: Service, send: Callable[..., int]) -> None:
    agent = {"User-Agent": FORGED}
    for text in (FORGED, f"a\n{FORGED}\n", f'", "address": "203.0.113.66"}}{FORGED}'):
        assert send("POST", "/sessions", "198.18.0.5", headers=agent, email=text, password=text) == 401
        assert send("POST", "/users", "198.18.0.5", headers=agent, email=text, password=text) == 400
    assert send("POST", "/sessions", "203.0.113.66, 198.18.0.6", email="bob@example.com", password="wrong") == 401
    assert send("POST", "/sessions", '203.0.113.66", "x": "', email="bob@example.com", password="wrong") == 401
    assert send("GET", f"/{FORGED}", "198.18.0.5") == 404
    assert banned(service_at.log_file) == {"198.18.0.5": 3, "198.18.0.6": 1}


def test_a_line_that_quotes_a_forged_one_does_not_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (FORGED, f"\n{FORGED}\n", f"\\{FORGED}", f'"{FORGED}'):
        guard.log("sys_server", message=text)
        guard.log("authn_login_fail", request_id="0123456789abcdef", address=text)
        guard.log(text, address="203.0.113.66")
    log = tmp_path / "log"
    log.write_text(capsys.readouterr().err)
    assert len(log.read_text().splitlines()) == 12
    assert not banned(log)


def test_a_forged_line_within_that_of_another_program_does_not_match(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f'198.18.0.8 - - "GET / HTTP/1.1" 200 "{FORGED}"\n')
    assert not banned(log)


def test_the_lines_of_the_journal_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard.log("authn_login_fail", request_id=guard.new_request_id(), address="198.18.0.7", user_id=1)
    log = tmp_path / "log"
    log.write_text(f"host python[12]: {capsys.readouterr().err}")
    assert banned(log) == {"198.18.0.7": 1}


def test_the_time_of_a_line_is_understood(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(FORGED + "\n")
    [time] = matched(log, "<time>")
    assert int(float(time)) == 1_795_230_513


def test_fail2ban_accepts_the_jail(tmp_path: Path) -> None:
    folder = tmp_path / "fail2ban"
    shutil.copytree("/etc/fail2ban", folder, ignore=shutil.ignore_patterns("jail.d"))
    (folder / "jail.d").mkdir()
    shutil.copy(FILES / "authsvc.conf", folder / "filter.d")
    shutil.copy(FILES / "jail.local", folder / "jail.d" / "authsvc.local")
    done = subprocess.run(["fail2ban-client", "-c", str(folder), "--dump"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "['start', 'authsvc']" in done.stdout
