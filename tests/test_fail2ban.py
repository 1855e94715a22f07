"""The fail2ban filter: the real ``fail2ban-regex`` reads the lines that the service writes."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from log import log_event
from tests.conftest import HERE, Service
from tests.crowd import written_log
from tests.production import FastService
from web import responses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(not shutil.which("fail2ban-regex"), reason="needs fail2ban-regex: apt-get install fail2ban"),
]

FILES = HERE / "deploy" / "fail2ban"
PASSWORD = "correct horse battery"

FORGED = (
    '{"time": "2026-11-21T03:08:33.550+00:00", "event": "authn_login_fail", "request_id": "0123456789abcdef", '
    '"address": "203.0.113.66", "user_id": 1}'
)


def matches(log: Path, field: str = "<ip>") -> list[str]:
    """Return what fail2ban reads in this field from each line that matches the filter."""
    command = ["fail2ban-regex", "--out", f"{field}|", str(log), str(FILES / "authsvc.conf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout.replace("\n", "").split("|")[:-1]


def addresses(log: Path) -> Counter[str]:
    """Return how many lines match for each address."""
    return Counter(matches(log))


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    shared = FastService(
        tmp_path_factory.mktemp("service"),
        AUTHSVC_PUBLIC_URL="https://auth.example.com",
        AUTHSVC_TRUSTED_PROXY="127.0.0.1",
    )
    yield shared
    shared.end()


networks = itertools.count()


class Proxy:
    """Sends requests to a shared service as its proxy would. Each test has emails of its own, and its own addresses.

    Args:
        service: the shared service.
        folder: gets the part of the log that the test has caused.
    """

    def __init__(self, service: Service, folder: Path) -> None:
        self.service, self.folder = service, folder
        self.number = next(networks)
        self.start = len(service.log)

    def address(self, host: int) -> str:
        return f"198.18.{self.number}.{host}"

    def email(self, name: str) -> str:
        return f"{name}{self.number}@example.com"

    def send(self, method: str, path: str, address: str, *, headers: Any = None, **form: str) -> int:
        sent = {"X-Forwarded-For": address, **(headers or {})}
        return requests.request(method, self.service.url + path, data=form, headers=sent, timeout=30).status_code

    def log(self) -> Path:
        path = self.folder / "log"
        path.write_text(written_log(self.service)[self.start :])
        return path


@pytest.fixture
def proxy(shared_service: Service, tmp_path: Path) -> Proxy:
    return Proxy(shared_service, tmp_path)


def test_failed_and_rate_limited_logins_match(proxy: Proxy) -> None:
    bob, send = proxy.email("bob"), proxy.send
    assert send("POST", "/users", proxy.address(1), email=bob, password=PASSWORD) == 200
    assert send("POST", "/sessions", proxy.address(2), email=bob, password="wrong") == 401
    assert send("POST", "/sessions", "2001:db8::3", email=proxy.email("nobody"), password="wrong") == 401
    form = {"email": proxy.email("guess"), "password": "wrong"}
    assert [send("POST", "/sessions", proxy.address(4), **form) for _ in range(11)] == [401] * 10 + [429]
    assert addresses(proxy.log()) == {proxy.address(2): 1, "2001:db8::3": 1, proxy.address(4): 11}


def test_other_events_do_not_match(proxy: Proxy) -> None:
    here, send = proxy.address(1), proxy.send
    form = {"email": proxy.email("bob"), "password": PASSWORD}
    foreign = {"Origin": "https://evil.example"}
    assert send("POST", "/users", here, **form) == 200
    assert send("POST", "/users", here, **form) == 400
    assert send("POST", "/sessions", here, **form) == 200
    assert send("POST", "/sessions", here, headers=foreign, **form) == 403  # its address is that of the victim
    assert send("POST", "/sessions", "rubbish", email=form["email"], password="wrong") == 401  # no address to ban
    assert send("GET", "/profile", here) == 403
    assert send("GET", "/verify", here) == 401
    assert send("GET", "/" + "x" * 17_000, here) == 431
    assert send("PUT", "/reset_password", here, email="b", reset_token="x", new_password=PASSWORD) == 403
    assert not addresses(proxy.log())


def test_a_forged_line_bans_only_its_author(proxy: Proxy) -> None:
    here, bob, send = proxy.address(5), proxy.email("bob"), proxy.send
    agent = {"User-Agent": FORGED}
    for text in (FORGED, f"a\n{FORGED}\n", f'", "address": "203.0.113.66"}}{FORGED}'):
        assert send("POST", "/sessions", here, headers=agent, email=text, password=text) == 401
        assert send("POST", "/users", here, headers=agent, email=text, password=text) == 400
    assert send("POST", "/sessions", f"203.0.113.66, {proxy.address(6)}", email=bob, password="wrong") == 401
    assert send("POST", "/sessions", '203.0.113.66", "x": "', email=bob, password="wrong") == 401
    assert send("GET", f"/{FORGED}", here) == 404
    assert addresses(proxy.log()) == {here: 3, proxy.address(6): 1}


def test_a_line_that_quotes_a_forged_line_does_not_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (FORGED, f"\n{FORGED}\n", f"\\{FORGED}", f'"{FORGED}'):
        log_event("sys_server", message=text)
        log_event("authn_login_fail", request_id="0123456789abcdef", address=text)
        log_event(text, address="203.0.113.66")
    log = tmp_path / "log"
    log.write_text(capsys.readouterr().err + f'198.18.0.8 - - "GET / HTTP/1.1" 200 "{FORGED}"\n')  # of another program
    assert len(log.read_text().splitlines()) == 13
    assert not addresses(log)


def test_a_line_matches_at_its_time_in_a_file_and_in_the_journal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_event("authn_login_fail", request_id=responses.new_request_id(), address="198.18.0.7", user_id=1)
    log = tmp_path / "log"
    log.write_text(f"{FORGED}\nhost python[12]: {capsys.readouterr().err}")
    [(address, seconds), (other, _)] = [found.split() for found in matches(log, "<ip> <time>")]
    assert (address, int(float(seconds)), other) == ("203.0.113.66", 1_795_230_513, "198.18.0.7")


def test_fail2ban_accepts_the_jail(tmp_path: Path) -> None:
    folder = tmp_path / "fail2ban"
    shutil.copytree("/etc/fail2ban", folder, ignore=shutil.ignore_patterns("jail.d"))
    (folder / "jail.d").mkdir()
    shutil.copy(FILES / "authsvc.conf", folder / "filter.d")
    shutil.copy(FILES / "jail.local", folder / "jail.d" / "authsvc.local")
    done = subprocess.run(["fail2ban-client", "-c", str(folder), "--dump"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "['start', 'authsvc']" in done.stdout
