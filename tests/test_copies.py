"""Several copies of the service behind nginx, with one PostgreSQL database. To a client they are one service."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests import postgres
from tests.conftest import HERE, Service
from tests.crowd import UNLIMITED, Crowd, account_form, ask, awaited, checked, events, signed_in
from tests.postgres import Server
from tests.proxies import program

pytestmark = [
    pytest.mark.proxies,
    pytest.mark.process,
    pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING),
]

# A service that adds a byte to a file for each password that it compares.
COUNTING_PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import bcrypt
import authsvc
compare = bcrypt.checkpw
def checkpw(*arguments):
    with open("compared", "a") as file:
        file.write(".")
    return compare(*arguments)
bcrypt.checkpw = checkpw
sys.exit(authsvc.main())
"""


class CountingService(Service):
    """A service that counts the passwords that it compares."""

    program = sys.executable, "-c", COUNTING_PROGRAM


def block(beginning: str) -> str:
    """Return a block of deploy/nginx.conf, without the lines that are commented out, except a "server"."""
    text = (HERE / "deploy/nginx.conf").read_text()
    rest = text[text.index(beginning) :]
    indent = re.match(" *", beginning)
    end = f"\n{indent[0] if indent else ''}}}\n"
    return re.sub(r"\n +# (?!server).*", "", rest[: rest.index(end)] + end)


class Copies:
    """Copies of the service, and nginx in front of them at ``url``."""

    def __init__(self, folder: Path, count: int, *command: str, **environ: str) -> None:
        self.folder = folder
        kind: Any = type("OtherService", (Service,), {"program": command}) if command else CountingService
        folders = [folder / str(number) for number in range(count)]
        for each in folders:
            each.mkdir()
        with ThreadPoolExecutor(count or 1) as pool:  # all start at once, on an empty database
            self.services: list[Service] = list(pool.map(lambda each: kind(each, **environ), folders))

    @property
    def compared(self) -> int:
        """The number of passwords that all copies compared."""
        return sum(len(file.read_text()) for file in self.folder.glob("*/compared"))

    @contextmanager
    def behind_nginx(self) -> Iterator[None]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            self._write_configuration(port)
            # nginx takes over a listening socket that this variable names, as it does when it is upgraded.
            with (self.folder / "nginx.log").open("wb") as log:
                process = subprocess.Popen(
                    [program("nginx", "nginx-light"), "-p", str(self.folder), "-c", "nginx.conf", "-e", "stderr"],
                    cwd=self.folder,
                    env={**os.environ, "NGINX": f"{listener.fileno()};"},
                    pass_fds=[listener.fileno()],
                    stdout=log,
                    stderr=log,
                )
        self.url = f"http://127.0.0.1:{port}"
        try:
            assert awaited(self._answers, 20), (self.folder / "nginx.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(timeout=20)

    def _write_configuration(self, port: int) -> None:
        servers = "\n".join("    server {}:{};".format(*service.address) for service in self.services)
        upstream = re.sub(r"( *(# )?server [0-9.:]+;\n)+", f"{servers}\n", block("upstream authsvc {"), count=1)
        location = block("    location / {\n        proxy_request_buffering on;")
        paths = "".join(f"{kind}_temp_path temp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"{user} daemon off; pid nginx.pid; worker_processes 1; events {{}}\n"
            f"http {{ access_log off; {paths}\n{upstream}\nserver {{ listen 127.0.0.1:{port};\n{location} }} }}\n"
        )

    def _answers(self) -> bool:
        try:
            return requests.get(self.url, timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def end(self) -> None:
        for service in self.services:
            service.end()


@contextmanager
def running_copies(server: Server, folder: Path, count: int, *command: str, **environ: str) -> Iterator[Copies]:
    """Start copies, of another program if one is given, on a new database, and nginx in front of them."""
    program("nginx", "nginx-light")  # skips the test if it is missing
    fixed = {"AUTHSVC_DATABASE": server.new_database(), "AUTHSVC_TRUSTED_PROXY": "127.0.0.1"}
    copies = Copies(folder, count, *command, **fixed, **environ)
    try:
        with copies.behind_nginx():
            yield copies
    finally:
        copies.end()


@pytest.fixture(scope="module")
def copies(postgresql: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Copies]:
    """Four copies for all tests that only send requests; use an email of your own."""
    with running_copies(postgresql, tmp_path_factory.mktemp("copies"), 4, **UNLIMITED) as four:
        yield four


def created(copies: Copies, name: str) -> dict[str, str]:
    """Create an account; return the form for signing in to it."""
    form = account_form(name)
    assert requests.post(f"{copies.url}/users", data=form, timeout=20).status_code == 200
    return form


def at_once(count: int, task: Callable[[int], requests.Response]) -> Counter[int]:
    """Send so many requests at once; return how many answers have each status."""
    with ThreadPoolExecutor(count) as pool:
        return Counter(checked(answer).status_code for answer in pool.map(task, range(count)))


def test_each_copy_knows_at_once_that_a_session_began_or_ended_on_another(copies: Copies) -> None:
    form = created(copies, "sessions")
    for one in copies.services:
        session = signed_in(one, form)
        assert [ask(each, "GET", "/profile", session=session) for each in copies.services] == [200] * 4
        assert ask(one, "DELETE", "/sessions", session=session) == 302
        assert [ask(each, "GET", "/profile", session=session) for each in copies.services] == [403] * 4


def test_each_copy_knows_every_change_that_another_answered(copies: Copies) -> None:
    crowd = Crowd("copies")
    urls = [one.url for one in copies.services]
    with crowd.using(*urls):
        assert crowd.goes_on(100)
    assert not crowd.refused
    crowd.check(*urls)


def test_one_of_32_registrations_of_one_email_over_all_copies_succeeds(copies: Copies) -> None:
    form = account_form("race")
    answers = at_once(32, lambda _: requests.post(f"{copies.url}/users", data=form, timeout=30))
    assert answers == {200: 1, 400: 31}


def test_one_of_32_uses_of_a_token_over_all_copies_succeeds(copies: Copies) -> None:
    email = {"email": created(copies, "token")["email"]}
    form = {**email, **requests.post(f"{copies.services[0].url}/reset_password", data=email, timeout=20).json()}

    def reset(number: int) -> requests.Response:
        new = {"new_password": f"new{number}"}
        return requests.put(f"{copies.url}/reset_password", data=form | new, timeout=30)

    assert at_once(32, reset) == {200: 1, 403: 31}


def test_all_copies_together_compare_at_most_10_wrong_passwords(postgresql: Server, tmp_path: Path) -> None:
    with running_copies(postgresql, tmp_path, 4) as copies:
        wrong = {**created(copies, "bob"), "password": "wrong"}

        def guess(_: int) -> requests.Response:
            return requests.post(f"{copies.url}/sessions", data=wrong, timeout=30)

        with ThreadPoolExecutor(16) as pool:
            answers = Counter(checked(answer).status_code for answer in pool.map(guess, range(100)))
        assert answers == {401: copies.compared, 429: 100 - copies.compared}
        assert 0 < copies.compared <= 10
        refusals = [
            sum(event["event"] == "excess_rate_limit_exceeded" for event in events(service))
            for service in copies.services
        ]
        assert min(refusals) > 0, refusals  # nginx distributed the requests over all of them


def test_the_other_copies_take_over_from_one_that_is_killed(postgresql: Server, tmp_path: Path) -> None:
    with running_copies(postgresql, tmp_path, 2, **UNLIMITED) as copies:
        created(copies, "bob")
        answer = requests.post(f"{copies.url}/sessions", data=account_form("bob"), timeout=20)
        copies.services[0].end(9)
        cookie = {"Cookie": f"session_id={answer.cookies['session_id']}"}
        answers = [checked(requests.get(f"{copies.url}/profile", headers=cookie, timeout=5)) for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}
