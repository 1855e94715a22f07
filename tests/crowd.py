"""Simulated users of a running service. They act at random and know every state that their accounts may be in.

A change that was answered with 200 must be there. A refused change must not be. A change that got no answer may be
there or not, but never in part. FAULT_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

import requests

from settings import is_url
from tests.conftest import HERE, Service

SEED = int(os.environ.get("FAULT_SEED", "0")) or random.randrange(1, 2**32)
USERS = 4  # simulated users, each of which has one request under way at a time
MAX_ACCOUNTS = 4  # usable accounts of each of them
RETRY_PAUSE = 0.05  # seconds that a user waits after a 503
UNLIMITED = {"AUTHSVC_SESSIONS_PER_USER": "100", "AUTHSVC_THROTTLE": "off"}

# The password, None where there is no account; and those of the known sessions that are live.
State = tuple[str | None, frozenset[str]]


def checked(answer: requests.Response) -> requests.Response:
    """Return an answer if it is JSON and no internal error. A 503 must say when to try again."""
    assert answer.status_code < 500 or answer.status_code == 503, (SEED, answer.status_code, answer.text)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()
    assert answer.status_code != 503 or answer.headers["Retry-After"].isdigit()
    return answer


def ask(
    service: Service, method: str, path: str, form: dict[str, str] | None = None, session: str = "", timeout: float = 12
) -> int:
    """Send a request on a new connection; return the status."""
    headers = {"Cookie": f"session_id={session}"} if session else {}
    url = service.url + path
    answer = requests.request(method, url, data=form, headers=headers, timeout=timeout, allow_redirects=False)
    return checked(answer).status_code


def signed_in(service: Service, form: dict[str, str]) -> str:
    """Sign in; return the session id."""
    answer = requests.post(f"{service.url}/sessions", data=form, timeout=12)
    return str(checked(answer).cookies["session_id"])


def account_form(name: object) -> dict[str, str]:
    """Return the form that creates an account or signs in to it."""
    return {"email": f"{name}@x.io", "password": "b4l0u"}


def awaited(condition: Callable[[], object], seconds: float = 5) -> bool:
    """Wait until the condition holds; return False if it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def program_with(module: str, **constants: float) -> tuple[str, ...]:
    """Return the command of a service in which some constants of one module have other values."""
    lines = [f"import sys; sys.path.insert(0, {str(HERE)!r})", f"import {module} as changed, authsvc"]
    lines += [f"assert changed.{name}; changed.{name} = {value}" for name, value in constants.items()]
    return sys.executable, "-c", "\n".join([*lines, "sys.exit(authsvc.main())"])


def written_log(service: Service) -> str:
    """Return the log once the lines of all answers so far are in it: a thread writes them."""

    def is_written() -> bool:
        refused = requests.get(f"{service.url}/profile", timeout=12)
        return awaited(lambda: refused.headers["X-Request-ID"] in service.log, 1)

    assert awaited(is_written, 20), SEED  # the line is left out after a flood of such refusals
    return service.log


def events(service: Service) -> list[dict[str, Any]]:
    """Return the lines of the log."""
    return [json.loads(line) for line in written_log(service).splitlines() if line.startswith("{")]


def assert_intact(service: Service) -> None:
    """Check the database file for damage and for broken references. PostgreSQL does that itself."""
    database = service.environ["AUTHSVC_DATABASE"]
    if not is_url(database):
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], SEED
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == [], SEED


class Account:
    """The states that an account may be in, all passwords it had, and all its sessions, as its user knows them."""

    def __init__(self, email: str) -> None:
        self.email = email
        self.states: list[State] = [(None, frozenset())]  # two during a request, and after one without an answer
        self.passwords: list[str] = []
        self.sessions: set[str] = set()


class User:
    """A simulated user. Nobody else changes this user's accounts.

    ``doubtful``: a change that was answered with 503 may have happened, as where the connection to the database breaks
    during a commit.
    """

    def __init__(self, name: str, *, doubtful: bool) -> None:
        self._name = name
        self._doubtful = doubtful
        self._random = random.Random(f"{SEED}/{name}")
        self._client = requests.Session()
        self._changed: set[Account] = set()
        self.accounts: list[Account] = []
        self.answered = 0
        self.refused = 0
        self.longest = 0.0  # seconds until an answer
        self.urls: tuple[str, ...] = ()  # one service, or copies of it that share a database

    def act_until(self, stopping: threading.Event) -> None:
        """Use the service at random until the event is set.

        Raises:
            ConnectionError, ChunkedEncodingError: a request got no answer.
        """
        try:
            while not stopping.is_set():
                refused = self.refused
                self._act()
                if self.refused > refused:
                    stopping.wait(RETRY_PAUSE)
        finally:
            self._client.close()

    def _act(self) -> None:
        usable = [account for account in self.accounts[-20:] if len(account.states) == 1 and account.states[0][0]]
        if not usable or (len(usable) <= MAX_ACCOUNTS and self._random.random() < 0.25):
            account = Account(f"{len(self.accounts)}@{self._name}")
            self.accounts.append(account)
            first = self._new_password(account)
            self._change(account, (first, frozenset()), "POST", "/users", password=first)
            return
        account = self._random.choice(usable)
        password, live = account.states[0]
        session = self._random.choice(sorted(live)) if live else ""
        kind = self._random.choice(["sign in", "sign in", "sign out", "change", "reset", "delete"])
        if kind == "delete" and session and len(usable) > MAX_ACCOUNTS:  # so that the database does not grow
            self._change(account, (None, frozenset()), "DELETE", "/profile", session, password=password or "")
        elif kind == "sign out" and session:
            self._change(account, (password, live - {session}), "DELETE", "/sessions", session)
        elif kind == "change" and session:
            new = self._new_password(account)
            form = {"password": password or "", "new_password": new}
            self._change(account, (new, frozenset()), "PUT", "/password", session, **form)
        elif kind == "reset":
            token = self._change(account, (password, live), "POST", "/reset_password").json().get("reset_token")
            if token:
                new = self._new_password(account)
                form = {"reset_token": token, "new_password": new}
                self._change(account, (new, frozenset()), "PUT", "/reset_password", **form)
        else:
            self._change(account, (password, live), "POST", "/sessions", password=password or "")

    def _new_password(self, account: Account) -> str:
        account.passwords.append(f"{account.email} {len(account.passwords)}")
        return account.passwords[-1]

    def _change(
        self, account: Account, after: State, method: str, path: str, session: str = "", **form: str
    ) -> requests.Response:
        before = account.states[0]
        account.states = [before, after]
        self._changed.add(account)
        answer = self._send(method, path, session, email=account.email, **form)
        assert answer.status_code in (200, 302, 503), (SEED, method, path, answer.text)
        refused = answer.status_code == 503
        if not (refused and self._doubtful and before != after):
            account.states = [before if refused else after]
        self._record_session(account, answer)
        self.answered += not refused
        self.refused += refused
        return answer

    def _record_session(self, account: Account, answer: requests.Response) -> None:
        if session := answer.cookies.get("session_id"):
            account.sessions.add(session)
            (password, live), *_ = account.states
            account.states = [(password, live | {session})]

    def _send(self, method: str, path: str, session: str = "", **form: str) -> requests.Response:
        headers = {"Cookie": f"session_id={session}"} if session else {}
        url = self._random.choice(self.urls) + path
        answer = self._client.request(method, url, data=form, headers=headers, timeout=20, allow_redirects=False)
        self._client.cookies.clear()
        self.longest = max(self.longest, answer.elapsed.total_seconds())
        return checked(answer)

    def check(self, sample: int = 0) -> None:
        """Check that each account that may have changed is in one of its states; or a sample of so many of all."""
        accounts = self._random.sample(self.accounts, min(sample, len(self.accounts)))
        for account in accounts or sorted(self._changed, key=lambda account: account.email):
            owner = {"email": account.email}
            answers = {session: self._send("GET", "/profile", session) for session in account.sessions}
            assert all(answer.status_code in (200, 403) for answer in answers.values()), (SEED, owner)
            assert all(answer.json() == owner for answer in answers.values() if answer.status_code == 200), SEED
            live = frozenset(session for session, answer in answers.items() if answer.status_code == 200)
            logins = {word: self._send("POST", "/sessions", **owner, password=word) for word in account.passwords}
            assert {answer.status_code for answer in logins.values()} <= {200, 401}, (SEED, owner)
            accepted = [password for password, answer in logins.items() if answer.status_code == 200]
            assert len(accepted) <= 1, (SEED, account.email, accepted)
            found = accepted[0] if accepted else None, live
            assert found in account.states, f"seed {SEED}: {account.email} is {found}, not one of {account.states}"
            account.states = [found]
            for password in accepted:
                self._record_session(account, logins[password])
        self._changed.clear()
        self._client.close()


class Crowd:
    """Some users of one service who act at the same time."""

    def __init__(self, name: str = "x", size: int = USERS, *, doubtful: bool = False) -> None:
        self.users = [User(f"{name}{index}.io", doubtful=doubtful) for index in range(size)]

    @property
    def answered(self) -> int:
        return sum(user.answered for user in self.users)

    @property
    def refused(self) -> int:
        return sum(user.refused for user in self.users)

    @property
    def longest(self) -> float:
        return max(user.longest for user in self.users)

    def goes_on(self, count: int = 20) -> bool:
        """Return whether so many more requests are answered within 20 s."""
        wanted = self.answered + count
        return awaited(lambda: self.answered >= wanted, 20)

    @contextmanager
    def using(self, *urls: str, ending: bool = False) -> Iterator[None]:
        """Use a service, or its copies, until the block ends. Every request is answered, unless it is ``ending``."""
        stopping = threading.Event()
        with ThreadPoolExecutor(len(self.users)) as pool:
            for user in self.users:
                user.urls = urls
            running = [pool.submit(user.act_until, stopping) for user in self.users]
            try:
                yield
            finally:
                stopping.set()
        for one in running:
            with suppress(*((requests.ConnectionError, requests.exceptions.ChunkedEncodingError) if ending else ())):
                one.result()

    def check(self, *urls: str, sample: int = 0) -> None:
        """Check the accounts of all users; see User.check()."""
        with ThreadPoolExecutor(len(self.users)) as pool:
            for user in self.users:
                user.urls = urls
            for one in [pool.submit(user.check, sample) for user in self.users]:
                one.result()
