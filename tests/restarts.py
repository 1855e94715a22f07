"""A service behind a socket that keeps listening while it restarts, as systemd runs it, and steady load on it."""

from __future__ import annotations

import http.client
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlencode

from tests.conftest import Service

# What systemd does between fork and exec: see sd_listen_fds(3).
PASS = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""
CHECKERS = 16  # connections that ask /verify again and again
USERS = 8  # accounts that sign in


class ActivatedService(Service):
    """A service to which a listening socket is passed."""

    def __init__(self, folder: Path, listener: socket.socket, program: tuple[str, ...] = Service.program) -> None:
        self.passed, self.listener = (listener.fileno(),), listener
        self.run(program)
        super().__init__(folder, AUTHSVC_SESSIONS_PER_USER="100", AUTHSVC_THROTTLE="off", AUTHSVC_BCRYPT_COST="10")

    def run(self, program: tuple[str, ...]) -> None:
        """Run this program from the next start on."""
        self.program = (sys.executable, "-c", PASS, str(self.listener.fileno()), *program)


class Load:
    """Checks sessions and signs in at a steady rate. A check that gets no byte of an answer is repeated once."""

    def __init__(self, address: tuple[str, int], checks: float, logins: float) -> None:
        self.address, self._checks, self._logins = address, checks, logins
        self._stopping = threading.Event()
        self.times: list[float] = []  # seconds, of each check
        self.login_times: list[float] = []
        self.sessions: list[str] = []  # of sign-ins that were answered with 200
        self.refused = self.repeated = 0
        self.failures: list[str] = []

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=20)

    def ask(self, method: str, path: str, session: str = "", **form: str) -> http.client.HTTPResponse:
        """Send a request on a connection of its own, which is closed after it."""
        headers = {"Connection": "close", "Cookie": f"session_id={session}"}
        headers |= {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        with closing(self._connect()) as connection:
            connection.request(method, path, urlencode(form) or None, headers)
            answer = connection.getresponse()
            answer.read()
            return answer

    def create_users(self) -> None:
        """Create the accounts that sign in, and a session for the checks."""
        for number in range(USERS):
            assert self.ask("POST", "/users", email=f"{number}@x.io", password="b4l0u").status == 200
        self.sign_in(0)
        self.session = self.sessions[0]

    def sign_in(self, number: int) -> None:
        """Sign in to one of the accounts."""
        began = time.monotonic()
        answer = self.ask("POST", "/sessions", email=f"{number % USERS}@x.io", password="b4l0u")
        self.login_times.append(time.monotonic() - began)
        if answer.status == 200:
            cookie = answer.headers["Set-Cookie"]
            self.sessions.append(cookie.partition("=")[2].partition(";")[0])
        elif answer.status == 503 and answer.headers["Retry-After"]:
            self.refused += 1
        else:
            self.failures.append(f"sign-in: {answer.status}")

    def _check_steadily(self, offset: float) -> None:
        connection, due = self._connect(), time.monotonic() + offset
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            due += CHECKERS / self._checks
            began = time.monotonic()
            for attempt in range(2):
                try:
                    connection.request("GET", "/verify", headers={"Cookie": f"session_id={self.session}"})
                    answer = connection.getresponse()
                except (http.client.RemoteDisconnected, ConnectionError) as error:
                    connection.close()
                    self.repeated += 1
                    if attempt:
                        self.failures.append(f"check: {error!r}")
                else:
                    answer.read()
                    if answer.status != 200:
                        self.failures.append(f"check: {answer.status}")
                    break
            self.times.append(time.monotonic() - began)
        connection.close()

    def _sign_in_steadily(self) -> None:
        began, number = time.monotonic(), 0
        with ThreadPoolExecutor(16) as pool:
            while not self._stopping.wait(max(0.0, began + number / self._logins - time.monotonic())):
                number += 1
                pool.submit(self._sign_in_safely, number)

    def _sign_in_safely(self, number: int) -> None:
        try:
            self.sign_in(number)
        except OSError as error:
            self.failures.append(f"sign-in: {error!r}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep the load up until the block ends."""
        threads = [
            threading.Thread(target=self._check_steadily, args=(number / self._checks,)) for number in range(CHECKERS)
        ]
        threads.append(threading.Thread(target=self._sign_in_steadily))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join()

    def check(self) -> None:
        """Check that no request failed, and that no session was lost."""
        assert not self.failures, Counter(self.failures)
        lost = [session for session in self.sessions if self.ask("GET", "/verify", session).status != 200]
        assert not lost, f"{len(lost)} sessions are lost"


def percentile(times: list[float], share: float) -> float:
    """Return the time below which this share of the times is."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]
