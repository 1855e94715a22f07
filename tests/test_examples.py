"""The examples, run as a reader would run them: the script against a service, the applications behind a real nginx."""

from __future__ import annotations

import errno
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import requests

from authsvc import ROUTES
from tests.conftest import HERE, Service, clean_environ
from tests.proxies import APP, PASSWORD, START_TIMEOUT, Site, program, reserve_port

pytestmark = [pytest.mark.slow, pytest.mark.process]

EXAMPLES = HERE / "examples"
BOB = "bob@example.com"


def run_script(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EXAMPLES / "api.sh", url], text=True, capture_output=True, timeout=120)


def test_the_script_uses_the_whole_api(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_SESSIONS_PER_USER="2")
    done = run_script(service.url)
    assert (done.returncode, done.stderr) == (0, "")
    used = {re.sub("/([0-9a-f]{16}|[0-9]+)$", "/<>", line[4:].partition("?")[0]) for line in done.stdout.splitlines()}
    pages = {"GET /login", "GET /register", "GET /forgot", "GET /reset", "GET /logout", "GET /account"}
    pages |= {"GET /confirm", "GET /change", "GET /pages/style.css", "GET /pages/script.js"}
    assert used == {re.sub("<.*>", "<>", f"{method} {path}") for method, path, *_ in ROUTES} - pages


def test_the_script_stops_at_an_unexpected_response(start: Callable[..., Service], service: Service) -> None:
    done = run_script(start(AUTHSVC_REGISTRATION="closed").url)
    assert done.returncode == 1
    assert re.fullmatch("api.sh: POST /users: expected 200, got 403 .*closed.*\n", done.stderr)
    done = run_script(service.url)
    assert done.returncode == 1
    assert "AUTHSVC_SESSIONS_PER_USER=2" in done.stderr
    done = run_script(f"http://127.0.0.1:{reserve_port()}")
    assert (done.returncode, done.stderr[:23]) == (1, "api.sh: nothing answers")


class Guarded:
    """A site for an application on a reserved port. Bob has an account."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = reserve_port()
        self.site = Site("nginx", folder, application_port=self.port)
        self.site.create_account(BOB)
        self.cookie = self.site.sign_in(BOB)

    @contextmanager
    def application(self, *command: str, folder: Path) -> Iterator[None]:
        """Run an application; it must refuse requests that do not come through nginx."""
        log_file = self.folder / "application.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command, cwd=folder, env={**clean_environ(), "PORT": str(self.port)}, stdout=log, stderr=log
            )
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while True:
                assert process.poll() is None, f"the application has exited: {log_file.read_text()}"
                try:
                    direct = requests.get(f"http://127.0.0.1:{self.port}/", timeout=START_TIMEOUT)
                    break
                except requests.ConnectionError:
                    assert time.monotonic() < deadline, f"the application does not listen: {log_file.read_text()}"
                    time.sleep(0.02)
            assert direct.status_code == 403, direct.text
            with socket.socket() as other:  # 127.0.0.2 stands for every address that 0.0.0.0 would open
                assert other.connect_ex(("127.0.0.2", self.port)) == errno.ECONNREFUSED
            yield
        finally:
            process.terminate()
            process.wait(20)


def response_to_bob(site: Site, cookie: str, path: str = "/") -> str:
    """Assert that only a signed-in user reaches this path; return what Bob gets."""
    for headers in ({}, {"Remote-User": BOB}):
        reply = site.request("GET", f"{site.app}{path}", headers=headers)
        assert (reply.status, reply.headers["Location"]) == (302, f"{site.auth}/login?return={site.app}{path}")
    reply = site.request("GET", f"{site.app}{path}", cookie=cookie, headers={"Remote-User": "eve@example.com"})
    assert reply.status == 200
    return reply.body.decode()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One site for all applications; they run one after the other."""
    shared = Guarded(tmp_path_factory.mktemp("site"))
    with closing(shared.site):
        yield shared


@pytest.mark.proxies
def test_flask(guarded: Guarded, tmp_path: Path) -> None:
    with guarded.application(sys.executable, str(EXAMPLES / "flask_app.py"), folder=tmp_path):
        shown = response_to_bob(guarded.site, guarded.cookie)
    assert BOB in shown
    assert "eve" not in shown


@pytest.mark.proxies
def test_hello(guarded: Guarded, tmp_path: Path) -> None:
    with guarded.application(sys.executable, str(EXAMPLES / "hello.py"), folder=tmp_path):
        shown = response_to_bob(guarded.site, guarded.cookie)
    assert f"<p>Hello {BOB}. Your groups: none.</p>" in shown
    assert "eve" not in shown


@pytest.mark.proxies
def test_express(guarded: Guarded, tmp_path: Path) -> None:
    npm, node = program("npm", "npm"), program("node", "nodejs")
    folder = tmp_path / "express"
    shutil.copytree(EXAMPLES / "express", folder, ignore=shutil.ignore_patterns("node_modules"))
    # Packages that npm has in its cache need no network. The lock file has their hashes, so a stale one cannot pass.
    command = [npm, "ci", "--prefer-offline", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with guarded.application(node, "app.js", folder=folder):
        shown = response_to_bob(guarded.site, guarded.cookie)
    assert BOB in shown
    assert "eve" not in shown


@pytest.mark.proxies
def test_static_files(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "page.html").write_text("for members")
    nginx_conf = (HERE / "deploy" / "nginx.conf").read_text()
    shared = nginx_conf[: nginx_conf.rindex("server {\n")]  # static.conf replaces the server block of the application
    assert APP not in shared.partition("# Another name")[2]
    static = (EXAMPLES / "static.conf").read_text().replace("files.example.com", APP)
    configuration = tmp_path / "configuration"
    configuration.mkdir()
    (configuration / "nginx.conf").write_text(shared + static.replace("/var/www/files", str(files)))
    with closing(Site("nginx", tmp_path, configuration=configuration)) as site:
        site.create_account(BOB)
        cookie = site.sign_in(BOB)
        assert response_to_bob(site, cookie, "/page.html") == "for members"
        assert site.request("GET", f"{site.app}/page.html", cookie=cookie).headers["Cache-Control"] == "no-store"
        assert site.request("GET", f"{site.app}/nothing.html", cookie=cookie).status == 404
        assert site.request("GET", f"{site.app}/nothing.html").status == 302
        made = site.request("POST", f"{site.auth}/tokens", {"password": PASSWORD, "name": "curl"}, cookie=cookie).json
        program_headers = {"Accept": "*/*", "Authorization": f"Bearer {made['token']}"}
        assert site.request("GET", f"{site.app}/page.html", headers=program_headers).body == b"for members"
        refused = site.request("GET", f"{site.app}/page.html", headers={"Accept": "*/*"})
        assert (refused.status, refused.headers["WWW-Authenticate"][:5]) == (401, "Basic")
        site.end_service()
        assert site.request("GET", f"{site.app}/page.html", cookie=cookie).status == 500
