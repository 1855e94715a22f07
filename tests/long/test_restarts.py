"""100 restarts and more under load: no request fails, and nothing that was answered is lost.

The service listens on a socket that is passed to it, as by systemd. It is upgraded to a next release, which is made
here: the same files with one migration more. The figures are printed: use -s.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import HERE, Service
from tests.postgres import Server
from tests.product import MODULES
from tests.restarts import ActivatedService, Load, percentile
from tests.test_copies import Copies, running_copies

pytestmark = pytest.mark.long

ROUNDS = 20
CHECKS, LOGINS = 1000, 4  # a second
PAUSE = 0.5  # seconds between a start and the next restart
MAX_TIME = 1.5  # seconds, of 99 % of the checks during a restart


def former_release(kind: str, folder: Path) -> tuple[str, ...]:
    """Return the command of the service as it was before the last migration of an engine."""
    command = ["git", "log", "-1", "--format=%H~1", "--", f"engines/migrations_{kind}.sql"]
    commit = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout.strip()
    archive = subprocess.run(["git", "archive", commit], cwd=HERE, check=True, capture_output=True).stdout
    folder.mkdir()
    subprocess.run(["tar", "x"], cwd=folder, input=archive, check=True)
    return sys.executable, str(folder / "authsvc.py")


def next_release(folder: Path) -> tuple[str, ...]:
    """Return the command of this service with one migration more."""
    files = [str(path.relative_to(HERE)) for path in MODULES.values()]
    for name in [*files, "schema.sql", "pyproject.toml"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, folder / name)
    for name in ("credentials", "engines", "mails", "web"):  # with their data files
        shutil.copytree(HERE / name, folder / name, dirs_exist_ok=True)
    with (folder / "engines/migrations_sqlite.sql").open("a") as migrations:
        migrations.write("\n-- to version next\nCREATE TABLE added (id INTEGER PRIMARY KEY) STRICT;\n")
    with (folder / "schema.sql").open("a") as tables:
        tables.write("\nCREATE TABLE added (\n    id INTEGER PRIMARY KEY\n) STRICT;\n")
    return sys.executable, str(folder / "authsvc.py")


class Restarts:
    """Restarts of a service under load."""

    def __init__(self, load: Load) -> None:
        self.load, self.count, self.slowest = load, 0, 0.0
        self.during: list[float] = []  # seconds, of the checks that ended during a restart or shortly after it

    def restart(self, service: Service, program: tuple[str, ...] | None = None) -> None:
        """Restart a service, as another program if one is given."""
        time.sleep(PAUSE)
        first, began = len(self.load.times), time.monotonic()
        assert service.end() == 0
        if program and isinstance(service, ActivatedService):
            service.run(program)
        elif program:
            service.program = program
        service.start()
        self.slowest = max(self.slowest, time.monotonic() - began)
        time.sleep(0.3)
        self.during += self.load.times[first:]
        self.count += 1

    def report(self, name: str) -> float:
        p99 = percentile(self.during, 0.99)
        print(
            f"\n{name}: {self.count} restarts, the slowest {self.slowest:.2f} s; {len(self.load.times)} checks,"
            f" p99 during a restart {p99:.3f} s, longest {max(self.during):.3f} s, {self.load.repeated} repeated;"
            f" {len(self.load.sessions)} sign-ins, longest {max(self.load.login_times):.2f} s,"
            f" {self.load.refused} refused; {len(self.load.failures)} failures"
        )
        return p99


@contextmanager
def nginx_before(folder: Path, service: Service) -> Iterator[tuple[str, int]]:
    """Run nginx in front of a service with the blocks of deploy/nginx.conf; yield its address."""
    copies = Copies(folder, 0)
    copies.services = [service]
    with copies.behind_nginx():
        host, _, port = copies.url.removeprefix("http://").rpartition(":")
        yield host, int(port)


@pytest.mark.parametrize("through", ["directly", "nginx"])
def test_100_restarts_under_load_lose_nothing(through: str, tmp_path: Path) -> None:
    programs = [next_release(tmp_path / "next"), next_release(tmp_path / "same")]
    during: list[float] = []
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
            service = ActivatedService(folder, listener)
            try:
                if through == "nginx":
                    with nginx_before(folder, service) as address:
                        restarts = five_restarts(service, address, *programs)
                else:
                    restarts = five_restarts(service, service.address, *programs)
            finally:
                service.end()
        restarts.report(f"{through}, round {number}")
        during += restarts.during
    print(f"all: p99 during a restart {percentile(during, 0.99):.3f} s, longest {max(during):.3f} s")
    assert percentile(during, 0.99) <= MAX_TIME


def five_restarts(
    service: ActivatedService, address: tuple[str, int], newer: tuple[str, ...], same: tuple[str, ...]
) -> Restarts:
    """Upgrade with a migration, restart, roll back to a release with the same schema, upgrade and restart."""
    load = Load(address, CHECKS, LOGINS)
    load.create_users()
    restarts = Restarts(load)
    with load.running():
        for program in (newer, None, same, newer, None):
            restarts.restart(service, program)
        time.sleep(PAUSE)
    load.check()
    return restarts


def test_copies_are_upgraded_one_after_the_other_under_load(postgresql: Server, tmp_path: Path) -> None:
    older = former_release("postgres", tmp_path / "former")
    environ = {"AUTHSVC_SESSIONS_PER_USER": "100", "AUTHSVC_THROTTLE": "off", "AUTHSVC_BCRYPT_COST": "10"}
    with running_copies(postgresql, tmp_path, 2, *older, **environ) as copies:
        host, _, port = copies.url.removeprefix("http://").rpartition(":")
        load = Load((host, int(port)), CHECKS, LOGINS)
        load.create_users()
        restarts = Restarts(load)
        with load.running():
            for service in copies.services:
                service.environ["AUTHSVC_LISTEN"] = "{}:{}".format(*service.address)
                restarts.restart(service, Service.program)
                time.sleep(11)  # for so long nginx skips a copy that did not answer
            time.sleep(PAUSE)
        load.check()
        assert restarts.report("copies") <= MAX_TIME
