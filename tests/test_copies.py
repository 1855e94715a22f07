"""Several copies of the service behind nginx, over one PostgreSQL: to whoever asks they are one."""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests

from tests import postgres
from tests.conftest import HERE, Service
from tests.crowd import ROOMY, UNMEASURED, Crowd, ask, awaited, clean, events, fields
from tests.postgres import Server
from tests.proxies import free_port, program

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)]

COUNTING = f"""
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


PROXIED = "    location / {\n        proxy_pass http://authsvc;"


def block(beginning: str) -> str:
    """Return what the operator's file says from here to the end of the block, less what is set out."""
    text = (HERE / "deploy/nginx.conf").read_text()
    begun = text[text.index(beginning) :]
    indent = re.match(" *", beginning)
    end = f"\n{indent[0] if indent else ''}}}\n"
    return re.sub(r"\n +# (?!server).*", "", begun[: begun.index(end)] + end)


class Counted(Service):
    """A service that notes each password that reaches bcrypt."""

    program = sys.executable, "-c", COUNTING


class Copies:
    """Some processes of the service; ``url`` is nginx's, before all of them."""

    def __init__(self, folder: Path, count: int, **environ: str) -> None:
        self.folders = [folder / str(number) for number in range(count)]
        for each in self.folders:
            each.mkdir()
        with ThreadPoolExecutor(count) as pool:  # all at once
            self.services = list(pool.map(lambda each: Counted(each, **environ), self.folders))
        self.folder = folder

    @property
    def compared(self) -> int:
        """How many passwords reached bcrypt, on all of them."""
        return sum(len(file.read_text()) for file in self.folder.glob("*/compared"))

    @contextmanager
    def behind_nginx(self) -> Iterator[None]:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        servers = "\n".join("    server {}:{};".format(*service.address) for service in self.services)
        upstream = re.sub(r"( *(# )?server [0-9.:]+;\n)+", f"{servers}\n", block("upstream authsvc {"), count=1)
        paths = "".join(f"{kind}_temp_path temp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"{user} daemon off; pid nginx.pid; worker_processes 1; events {{}}\n"
            f"http {{ access_log off; {paths}\n{upstream}\nserver {{ listen 127.0.0.1:{port};\n{block(PROXIED)} }} }}\n"
        )
        command = [program("nginx", "nginx-light"), "-p", str(self.folder), "-c", "nginx.conf", "-e", "stderr"]
        with (self.folder / "nginx.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=self.folder, stderr=log, stdout=log)
        try:
            assert awaited(self._answers, 20), (self.folder / "nginx.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(timeout=20)

    def _answers(self) -> bool:
        try:
            return requests.get(self.url, timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def end(self) -> None:
        for service in self.services:
            service.end()


@pytest.fixture
def copies(postgresql: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Copies]]:
    program("nginx", "nginx-light")
    with ExitStack() as stack:

        def start(count: int, **environ: str) -> Copies:
            place = postgresql.new_place()
            some = Copies(tmp_path, count, AUTHSVC_DATABASE=place, AUTHSVC_TRUSTED_PROXY="127.0.0.1", **environ)
            stack.callback(some.end)
            stack.enter_context(some.behind_nginx())
            return some

        yield start


def at_once(count: int, task: Callable[[int], requests.Response]) -> Counter[int]:
    with ThreadPoolExecutor(count) as pool:
        return Counter(clean(answer).status_code for answer in pool.map(task, range(count)))


@pytest.mark.parametrize("count", [2, 4])
def test_a_session_of_one_is_known_to_all_at_once_and_so_is_its_end(copies: Callable[..., Copies], count: int) -> None:
    some = copies(count, **ROOMY)
    assert len({service.log.count("sys_startup") for service in some.services}) == 1
    assert requests.post(f"{some.url}/users", data=fields("bob"), timeout=20).status_code == 200
    for one in some.services:
        session = requests.post(f"{one.url}/sessions", data=fields("bob"), timeout=20).cookies["session_id"]
        assert [ask(each, "GET", "/profile", session=session) for each in some.services] == [200] * count
        assert ask(one, "DELETE", "/sessions", session=session) == 302
        assert [ask(each, "GET", "/profile", session=session) for each in some.services] == [403] * count


@pytest.mark.parametrize("count", [2, 4])
def test_what_one_answered_all_know(copies: Callable[..., Copies], count: int) -> None:
    some, crowd = copies(count, **ROOMY), Crowd()
    urls = [one.url for one in some.services]
    with crowd.using(*urls):
        assert awaited(lambda: crowd.answered >= 100, 30)
    assert not crowd.refused
    crowd.check(*urls)


def test_of_200_wrong_logins_over_four_copies_10_reach_bcrypt(copies: Callable[..., Copies]) -> None:
    some = copies(4, **UNMEASURED)
    assert requests.post(f"{some.url}/users", data=fields("bob"), timeout=20).status_code == 200
    wrong = {**fields("bob"), "password": "wrong"}

    def guess(_: int) -> requests.Response:
        return requests.post(f"{some.url}/sessions", data=wrong, timeout=30)

    with ThreadPoolExecutor(16) as pool:
        statuses = Counter(clean(answer).status_code for answer in pool.map(guess, range(200)))
    assert statuses == {401: some.compared, 429: 200 - some.compared}
    assert 0 < some.compared <= 10
    refused = [sum(event["event"] == "excess_rate_limit_exceeded" for event in events(each)) for each in some.services]
    assert min(refused) > 0, refused  # nginx asks them all


def test_of_32_registrations_of_one_email_over_four_copies_one_wins(copies: Callable[..., Copies]) -> None:
    url = copies(4, **ROOMY).url
    answers = at_once(32, lambda _: requests.post(f"{url}/users", data=fields("bob"), timeout=30))
    assert answers == {200: 1, 400: 31}


def test_of_32_uses_of_a_token_over_four_copies_one_wins(copies: Callable[..., Copies]) -> None:
    some = copies(4, **ROOMY)
    assert requests.post(f"{some.url}/users", data=fields("bob"), timeout=20).status_code == 200
    email = {"email": fields("bob")["email"]}
    form = {**email, **requests.post(f"{some.services[0].url}/reset_password", data=email, timeout=20).json()}

    def reset(number: int) -> requests.Response:
        new = {"new_password": f"new{number}"}
        return requests.put(f"{some.url}/reset_password", data=form | new, timeout=30)

    assert at_once(32, reset) == {200: 1, 403: 31}


def test_a_copy_that_is_lost_takes_nobody_with_it(copies: Callable[..., Copies]) -> None:
    some = copies(2, **ROOMY)
    assert requests.post(f"{some.url}/users", data=fields("bob"), timeout=20).status_code == 200
    session = requests.post(f"{some.url}/sessions", data=fields("bob"), timeout=20).cookies["session_id"]
    some.services[0].end(9)
    cookie = {"Cookie": f"session_id={session}"}
    answers = [clean(requests.get(f"{some.url}/profile", headers=cookie, timeout=5)) for _ in range(20)]
    assert {answer.status_code for answer in answers} == {200}
