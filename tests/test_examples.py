"""The examples, each run as its reader would: the script against a service, the others behind a real nginx."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import requests

from tests.conftest import HERE, Service, clean_environ
from tests.proxies import APP, Site, free_port, program

pytestmark = pytest.mark.slow

EXAMPLES = HERE / "examples"
BOB = "bob@example.com"


def walk(url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EXAMPLES / "api.sh", url], text=True, capture_output=True, timeout=60)


def test_the_script_walks_the_whole_api(start: Callable[..., Service]) -> None:
    service = start(AUTHSVC_SESSIONS_PER_USER="2")
    done = walk(service.url)
    assert (done.returncode, done.stderr) == (0, "")
    walked = {re.sub("[0-9a-f]{16}", "<public_id>", line[4:].partition("?")[0]) for line in done.stdout.splitlines()}
    readme = (HERE / "README.md").read_text()
    routes = set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", readme, re.MULTILINE))
    pages = {"GET /login", "GET /register", "GET /forgot", "GET /reset", "GET /account", "GET /pages/<name>"}
    assert walked == {route.replace("<id>", "<public_id>") for route in routes - pages}


@pytest.mark.once
def test_the_script_stops_where_an_answer_is_another(start: Callable[..., Service]) -> None:
    done = walk(start(AUTHSVC_REGISTRATION="closed").url)
    assert done.returncode == 1
    assert re.fullmatch("api.sh: POST /users: expected 200, got 403 .*closed.*\n", done.stderr)
    done = walk(start().url)
    assert done.returncode == 1
    assert "AUTHSVC_SESSIONS_PER_USER=2" in done.stderr
    done = walk(f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stderr[:23]) == (1, "api.sh: nothing answers")


Guard = Callable[..., Site]


@pytest.fixture
def guard(tmp_path: Path, start: Callable[..., Service]) -> Iterator[Guard]:
    """Start an application, if any, and a site that guards it; Bob has an account."""
    with ExitStack() as stack:

        def guard(*command: str, folder: Path = tmp_path, configuration: Path = HERE / "deploy") -> Site:
            class Guarding(Site):
                deploy = configuration
                guarded = free_port()

            if command:
                environ = {**clean_environ(), "PORT": str(Guarding.guarded)}
                with (tmp_path / "application.log").open("wb") as log:
                    application = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
                stack.callback(application.wait, 20)
                stack.callback(application.terminate)
            site = stack.enter_context(closing(Guarding("nginx", tmp_path, start)))
            site.register(BOB)
            return site

        yield guard


def holds(site: Site, cookie: str, path: str = "/") -> str:
    """Assert that nobody gets in but who is signed in; return what that one is shown."""
    for claim in ({}, {"Remote_User": BOB}):
        reply = site.ask("GET", f"{site.app}{path}", **claim)
        assert (reply.status, reply.headers["Location"]) == (302, f"{site.auth}/login?return={site.app}{path}")
    reply = site.ask("GET", f"{site.app}{path}", cookie=cookie, Remote_User="eve@example.com")
    assert reply.status == 200
    return reply.body.decode()


def refuses_who_comes_past_nginx(site: Site) -> bool:
    deadline = time.monotonic() + 20
    while True:
        try:
            return requests.get(f"http://127.0.0.1:{site.guarded}/", timeout=10).status_code == 403
        except requests.ConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def listens_on_no_other_address(site: Site) -> bool:
    with socket.socket() as other:  # 127.0.0.2 stands for all that 0.0.0.0 would open
        return other.connect_ex(("127.0.0.2", site.guarded)) == errno.ECONNREFUSED


@pytest.mark.once
def test_flask(guard: Guard) -> None:
    site = guard(sys.executable, str(EXAMPLES / "flask_app.py"))
    assert refuses_who_comes_past_nginx(site)
    assert listens_on_no_other_address(site)
    shown = holds(site, site.log_in(BOB))
    assert BOB in shown
    assert "eve" not in shown


@pytest.mark.once
def test_express(guard: Guard, tmp_path: Path) -> None:
    npm, node = program("npm", "npm"), program("node", "nodejs")
    folder = tmp_path / "express"
    shutil.copytree(EXAMPLES / "express", folder)
    quiet = ["--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run([npm, "ci", *quiet], cwd=folder, check=True, capture_output=True, timeout=300, env=os.environ)
    site = guard(node, "app.js", folder=folder)
    assert refuses_who_comes_past_nginx(site)
    assert listens_on_no_other_address(site)
    shown = holds(site, site.log_in(BOB))
    assert BOB in shown
    assert "eve" not in shown


@pytest.mark.once
def test_static_files(guard: Guard, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "page.html").write_text("for members")
    beside = (HERE / "deploy" / "nginx.conf").read_text()
    before = beside[: beside.rindex("server {\n")]  # static.conf in place of the application's block
    assert APP not in before.partition("# Another name")[2]
    static = (EXAMPLES / "static.conf").read_text().replace("files.example.com", APP)
    (tmp_path / "configuration").mkdir()
    (tmp_path / "configuration" / "nginx.conf").write_text(before + static.replace("/var/www/files", str(files)))
    site = guard(configuration=tmp_path / "configuration")
    cookie = site.log_in(BOB)
    assert holds(site, cookie, "/page.html") == "for members"
    assert site.ask("GET", f"{site.app}/page.html", cookie=cookie).headers["Cache-Control"] == "no-store"
    assert site.ask("GET", f"{site.app}/nothing.html", cookie=cookie).status == 404
    assert site.ask("GET", f"{site.app}/nothing.html").status == 302
    site.service.end()
    assert site.ask("GET", f"{site.app}/page.html", cookie=cookie).status == 500
