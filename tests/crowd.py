"""Clients who use a running service at random, and know in which states all that is theirs may be.

What was answered 200 must be there; what was refused must be as before; what broke off may be either, but wholly.
FAULT_SEED repeats a run.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

import requests

from settings import is_url
from tests.conftest import Service

SEED = int(os.environ.get("FAULT_SEED", "0")) or random.randrange(1, 2**32)
CLIENTS = 4  # that ask at the same time
PLENTY = 4  # accounts that each of them has
REST = 0.05  # seconds that a client waits after a 503
UNMEASURED = {"COVERAGE_PROCESS_CONFIG": ""}  # coverage writes files, opens descriptors and takes memory of its own
ROOMY = {**UNMEASURED, "AUTHSVC_SESSIONS_PER_USER": "100", "AUTHSVC_THROTTLE": "off"}

# The password, None where there is no account; of the known sessions the live.
State = tuple[str | None, frozenset[str]]


def clean(answer: requests.Response) -> requests.Response:
    """Return an answer that is JSON and no failure of ours; a 503 says when to come again."""
    assert answer.status_code < 500 or answer.status_code == 503, (SEED, answer.status_code, answer.text)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()
    assert answer.status_code != 503 or answer.headers["Retry-After"].isdigit()
    return answer


def ask(
    service: Service, method: str, path: str, form: dict[str, str] | None = None, session: str = "", timeout: float = 12
) -> int:
    """Ask on a new connection; return the status."""
    headers = {"Cookie": f"session_id={session}"} if session else {}
    url = service.url + path
    answer = requests.request(method, url, data=form, headers=headers, timeout=timeout, allow_redirects=False)
    return clean(answer).status_code


def fields(name: object) -> dict[str, str]:
    return {"email": f"{name}@x.io", "password": "b4l0u"}


def awaited(condition: Callable[[], object], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def events(service: Service) -> list[dict[str, Any]]:
    return [json.loads(line) for line in service.log.splitlines() if line.startswith("{")]


def assert_whole(service: Service) -> None:
    """No page of the file is out of order, no row without its user; PostgreSQL sees to that itself."""
    place = service.environ["AUTHSVC_DATABASE"]
    if not is_url(place):
        with closing(sqlite3.connect(f"file:{place}?mode=ro", uri=True)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], SEED
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == [], SEED


class Account:
    """What one client knows of one account: the states in which it may be, all passwords, all sessions."""

    def __init__(self, email: str) -> None:
        self.email = email
        self.states: list[State] = [(None, frozenset())]  # two while a request is on its way, or was when it broke off
        self.passwords: list[str] = []
        self.sessions: set[str] = set()


class Person:
    """A client with accounts that nobody else touches."""

    def __init__(self, name: str, doubtful: bool) -> None:
        self._name = name
        self._doubtful = doubtful
        self._random = random.Random(f"{SEED}/{name}")
        self._client = requests.Session()
        self._changed: set[Account] = set()
        self.accounts: list[Account] = []
        self.answered = 0
        self.refused = 0
        self.longest = 0.0  # seconds to an answer
        self.urls: tuple[str, ...] = ()  # of the copies of one service, any of which may be asked

    def live(self, stopping: threading.Event) -> None:
        """Use the service at random until told to stop.

        Raises:
            ConnectionError, ChunkedEncodingError: it is gone, or somebody got no answer.
        """
        try:
            while not stopping.is_set():
                refused = self.refused
                self._act()
                if self.refused > refused:
                    stopping.wait(REST)
        finally:
            self._client.close()

    def _act(self) -> None:
        usable = [account for account in self.accounts[-20:] if len(account.states) == 1 and account.states[0][0]]
        if not usable or (len(usable) <= PLENTY and self._random.random() < 0.25):
            account = Account(f"{len(self.accounts)}@{self._name}")
            self.accounts.append(account)
            first = self._new_password(account)
            self._step(account, (first, frozenset()), "POST", "/users", password=first)
            return
        account = self._random.choice(usable)
        password, live = account.states[0]
        session = self._random.choice(sorted(live)) if live else ""
        kind = self._random.choice(["log in", "log in", "log out", "change", "reset", "delete"])
        if kind == "delete" and session and len(usable) > PLENTY:  # so that the file stays as large as it is
            self._step(account, (None, frozenset()), "DELETE", "/profile", session, password=password or "")
        elif kind == "log out" and session:
            self._step(account, (password, live - {session}), "DELETE", "/sessions", session)
        elif kind == "change" and session:
            new = self._new_password(account)
            self._step(
                account, (new, frozenset()), "PUT", "/password", session, password=password or "", new_password=new
            )
        elif kind == "reset":
            token = self._step(account, (password, live), "POST", "/reset_password").json().get("reset_token")
            if token:
                new = self._new_password(account)
                self._step(account, (new, frozenset()), "PUT", "/reset_password", reset_token=token, new_password=new)
        else:
            self._step(account, (password, live), "POST", "/sessions", password=password or "")

    def _new_password(self, account: Account) -> str:
        account.passwords.append(f"{account.email} {len(account.passwords)}")
        return account.passwords[-1]

    def _step(
        self, account: Account, after: State, method: str, path: str, session: str = "", **form: str
    ) -> requests.Response:
        before = account.states[0]
        account.states = [before, after]
        self._changed.add(account)
        answer = self._ask(method, path, session, email=account.email, **form)
        assert answer.status_code in (200, 302, 503), (SEED, method, path, answer.text)
        refused = answer.status_code == 503
        if not (refused and self._doubtful and before != after):
            account.states = [before if refused else after]
        self._note(account, answer)
        self.answered += not refused
        self.refused += refused
        return answer

    def _note(self, account: Account, answer: requests.Response) -> None:
        if session := answer.cookies.get("session_id"):
            account.sessions.add(session)
            (password, live), *_ = account.states
            account.states = [(password, live | {session})]

    def _ask(self, method: str, path: str, session: str = "", **form: str) -> requests.Response:
        headers = {"Cookie": f"session_id={session}"} if session else {}
        url = self._random.choice(self.urls) + path
        answer = self._client.request(method, url, data=form, headers=headers, timeout=20, allow_redirects=False)
        self._client.cookies.clear()
        self.longest = max(self.longest, answer.elapsed.total_seconds())
        return clean(answer)

    def check(self, most: int = 0) -> None:
        """Each account that may have changed is in a state in which it may be, wholly; or so many of all."""
        sample = self._random.sample(self.accounts, min(most, len(self.accounts)))
        for account in sample or sorted(self._changed, key=lambda account: account.email):
            who = {"email": account.email}
            answers = {session: self._ask("GET", "/profile", session) for session in account.sessions}
            assert all(answer.status_code in (200, 403) for answer in answers.values()), (SEED, who)
            assert all(answer.json() == who for answer in answers.values() if answer.status_code == 200), (SEED, who)
            live = frozenset(session for session, answer in answers.items() if answer.status_code == 200)
            logins = {word: self._ask("POST", "/sessions", **who, password=word) for word in account.passwords}
            assert {answer.status_code for answer in logins.values()} <= {200, 401}, (SEED, who)
            good = [password for password, answer in logins.items() if answer.status_code == 200]
            assert len(good) <= 1, (SEED, account.email, good)
            found = good[0] if good else None, live
            assert found in account.states, f"seed {SEED}: {account.email} is {found}, not one of {account.states}"
            account.states = [found]
            for password in good:
                self._note(account, logins[password])
        self._changed.clear()
        self._client.close()


class Crowd:
    """Some persons who use one service at the same time.

    ``doubtful``: a 503 may have been done, as where the connection to a database breaks while it commits.
    """

    def __init__(self, name: str = "x", size: int = CLIENTS, *, doubtful: bool = False) -> None:
        self.people = [Person(f"{name}{index}.io", doubtful) for index in range(size)]

    @property
    def answered(self) -> int:
        return sum(person.answered for person in self.people)

    @property
    def refused(self) -> int:
        return sum(person.refused for person in self.people)

    @property
    def longest(self) -> float:
        return max(person.longest for person in self.people)

    @contextmanager
    def using(self, *urls: str, ending: bool = False) -> Iterator[None]:
        """Use it, or its copies, until the block ends. Everybody gets an answer, unless the service is ``ending``."""
        stopping = threading.Event()
        with ThreadPoolExecutor(len(self.people)) as pool:
            for person in self.people:
                person.urls = urls
            running = [pool.submit(person.live, stopping) for person in self.people]
            try:
                yield
            finally:
                stopping.set()
        for one in running:
            with suppress(*((requests.ConnectionError, requests.exceptions.ChunkedEncodingError) if ending else ())):
                one.result()

    def check(self, *urls: str, most: int = 0) -> None:
        with ThreadPoolExecutor(len(self.people)) as pool:
            for person in self.people:
                person.urls = urls
            for one in [pool.submit(person.check, most) for person in self.people]:
                one.result()
