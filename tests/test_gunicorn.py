"""``authsvc:app`` under gunicorn, another WSGI server, on a Unix socket. The clients then have no address."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.conftest import HERE, clean_environ
from tests.crowd import awaited

pytestmark = [pytest.mark.process, pytest.mark.slow]

TIMEOUT = 30  # seconds until a test gives up waiting


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(str(self._path))


class Gunicorn:
    """A production service under gunicorn."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "socket"
        self.log = folder / "log"
        environ = {
            "AUTHSVC_DATABASE": str(folder / "authsvc.db"),
            "AUTHSVC_PUBLIC_URL": "https://auth.example.com",
            "AUTHSVC_TRUSTED_PROXY": "127.0.0.1, 10.20.0.0/16, 2001:db8::/48",
            "AUTHSVC_BCRYPT_COST": "10",
        }
        options = ["--bind", f"unix:{self.socket}", "--threads", "4", "--pythonpath", str(HERE), "--no-control-socket"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *options, "authsvc:app"],
                stderr=log,
                cwd=folder,
                env={**clean_environ(), **environ},
            )

    def wait_until_ready(self) -> None:
        assert awaited(lambda: self.process.poll() is not None or self._is_ready(), TIMEOUT)
        assert self.process.poll() is None, self.log.read_text()

    def _is_ready(self) -> bool:
        try:
            return self.status("GET", "/health") == 200
        except OSError:
            return False

    def status(self, method: str, path: str, form: dict[str, str] | None = None, **headers: str) -> int:
        """Send a request; return the status of the answer."""
        kind = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        connection = UnixConnection(self.socket)
        try:
            connection.request(method, path, urlencode(form or {}), {**kind, **headers})
            return connection.getresponse().status
        finally:
            connection.close()

    def events(self, name: str) -> list[dict[str, str]]:
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT)


@pytest.fixture
def gunicorn(tmp_path: Path) -> Iterator[Gunicorn]:
    one = Gunicorn(tmp_path)
    try:
        one.wait_until_ready()
        yield one
    finally:
        one.stop()


def test_clients_without_an_address_share_one_rate_limit(gunicorn: Gunicorn) -> None:
    form = {"email": "bob@x.io", "password": "wrong"}
    # A forwarded address counts only from a trusted proxy, and the peer of a Unix socket has no address to trust.
    hops = ["192.0.2.{}", "192.0.2.{}, 127.0.0.1", "10.20.0.{}", "[2001:db8::{}]:443"]
    forwarded = [{}, *({"X-Forwarded-For": hops[number % len(hops)].format(number)} for number in range(1, 40))]
    statuses = Counter(gunicorn.status("POST", "/sessions", form, **headers) for headers in forwarded)
    assert statuses == {401: 10, 429: 30}  # a 429 is answered before bcrypt runs
    assert awaited(lambda: len(gunicorn.events("authn_login_fail")) == 10)
    assert {event["address"] for event in gunicorn.events("authn_login_fail")} == {"unknown"}
