"""The files for systemd: accepted by systemd itself, and their commands and settings by the program."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
import requests

from settings import PREFIX, Settings
from storage import DB
from tests import postgres
from tests.conftest import HERE, Service, clean_environ
from tests.proxies import PASSWORD, Site

DEPLOY = HERE / "deploy"
SERVICE, DAILY, TIMER = UNITS = tuple(
    DEPLOY / name for name in ("authsvc.service", "authsvc-daily.service", "authsvc-daily.timer")
)
ENV = (DEPLOY / "authsvc.env").read_text()
ENABLED = re.sub("^#(?=[A-Z])", "", ENV, flags=re.MULTILINE)
STATE, UNPACKED, PROGRAM = "/var/lib/authsvc", "/opt/authsvc/unpacked", "/opt/authsvc/authsvc.pyz"
MOST_EXPOSURE = 1.5

# Where the two services differ; all else, the hardening before all, is the same.
OWN = {
    "Type",
    "ExecStart",
    "ExecStartPre",
    "Restart",
    "RestartSec",
    "TimeoutStartSec",
    "TimeoutStopSec",
    "LoadCredential",
    "Nice",
    "IOSchedulingClass",
    "PrivateNetwork",
    "IPAddressDeny",
    "RestrictAddressFamilies",
    "SystemCallFilter",
}


def entries(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in re.findall("^([A-Za-z]+)=(.*)$", unit.read_text(), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def variables(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


@pytest.fixture
def analyze() -> Callable[..., subprocess.CompletedProcess[str]]:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is missing: apt-get install systemd")

    def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, timeout=60)

    return analyze


class Installed:
    """The units' commands and settings, with their folders moved to one of the test's."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.backups = self.state / "backup"
        self.backups.mkdir(parents=True, mode=0o700)
        self.program = folder / "authsvc.pyz"
        with zipfile.ZipFile(self.program, "w") as archive:  # finds the rest from inside, as the real one does
            text = f"import sys; sys.path.insert(0, {str(HERE)!r}); import authsvc; sys.exit(authsvc.main())"
            archive.writestr("__main__.py", text)
        self.environ = clean_environ() | {name: self.moved(value) for name, value in variables(ENV).items()}
        self.environ["TZ"] = f"NOON{time.gmtime().tm_hour - 12:+}"  # no test runs into the next day

    @property
    def database(self) -> Path:
        return Path(self.environ["AUTHSVC_DATABASE"])

    def moved(self, text: str) -> str:
        return text.replace(PROGRAM, str(self.program)).replace(STATE, str(self.state))

    def commands(self, unit: Path, *names: str) -> list[list[str]]:
        found = [shlex.split(value) for name in names for value in entries(unit).get(name, [])]
        for value in [part for command in found for part in command]:
            assert not re.search("[$%]", value.replace("$$", "").replace("%%", "")), "systemd would read it as its own"
        unescaped = [[part.replace("$$", "$").replace("%%", "%") for part in command] for command in found]
        python = {"/usr/bin/python3": sys.executable}
        return [[python.get(part, self.moved(part)) for part in command] for command in unescaped]

    def day(self) -> int:
        """Do what the daily unit does, to the first command that fails; return its code."""
        for command in self.commands(DAILY, "ExecStartPre", "ExecStart"):
            done = subprocess.run(command, env=self.environ, capture_output=True, text=True, umask=0o077, timeout=60)
            if done.returncode:
                return done.returncode
        return 0

    def saved(self) -> dict[str, list[str]]:
        """The emails in each backup."""
        found = {}
        for path in self.backups.iterdir():
            with closing(sqlite3.connect(path)) as db:
                found[path.name] = [email for (email,) in db.execute("SELECT email FROM users")]
        return found


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def add_user(database: Path, email: str) -> None:
    with closing(DB(str(database))) as db:
        db.add_user(email, "!")


# systemd


def test_systemd_accepts_the_units_and_tells_a_wrong_one(
    analyze: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = analyze("verify", *UNITS)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    wrong = tmp_path / SERVICE.name
    wrong.write_text(SERVICE.read_text().replace("ProtectClock=", "ProtectClocks="))
    assert "ProtectClocks" in analyze("verify", wrong).stderr


@pytest.mark.parametrize("unit", [SERVICE, DAILY], ids=lambda unit: unit.name)
def test_a_unit_is_little_exposed(unit: Path, analyze: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = analyze("security", "--offline=yes", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= MOST_EXPOSURE


def test_the_daily_unit_is_held_as_the_service_is() -> None:
    service, daily = ({**entries(unit)} for unit in (SERVICE, DAILY))
    only_service = {"After", "StartLimitIntervalSec", "StartLimitBurst", "WantedBy", "Description"}
    assert {name: value for name, value in service.items() if name not in OWN | only_service} == {
        name: value for name, value in daily.items() if name not in OWN | {"Description"}
    }


def test_of_what_is_refused_a_thread_may_only_lower_its_priority() -> None:
    # Without it the threads that hash end, and no login is answered.
    allowed = entries(DAILY)["SystemCallFilter"]
    assert allowed == ["@system-service", "~@privileged @resources"]
    assert entries(SERVICE)["SystemCallFilter"] == [*allowed, "setpriority"]
    assert "os.setpriority(" in (HERE / "lanes.py").read_text()


def test_the_service_can_reach_a_mail_server() -> None:
    service = entries(SERVICE)
    assert not service.keys() & {"IPAddressDeny", "PrivateNetwork"}
    assert {"AF_INET", "AF_INET6", "AF_UNIX"} <= set(service["RestrictAddressFamilies"][0].split())


@pytest.mark.parametrize("unit", [SERVICE, DAILY], ids=lambda unit: unit.name)
def test_user_folders_and_settings_go_together(unit: Path) -> None:
    found, settings = entries(unit), variables(ENV)
    [user] = found["User"]
    assert found["Group"] == [user]
    assert f"systemd-sysusers --inline 'u {user} - " in (HERE / "Makefile").read_text()
    assert found["StateDirectory"] == [f"{user} {user}/backup"]
    assert found["StateDirectoryMode"] == ["0700"]
    assert found["UMask"] == ["0077"]
    assert f"/var/lib/{user}" == STATE == os.path.dirname(settings["AUTHSVC_DATABASE"])
    assert settings["SHIV_ROOT"] == UNPACKED  # root's, where the user of the units cannot write
    assert found["ProtectSystem"] == ["strict"]
    assert f"SHIV_ROOT=$(DESTDIR){UNPACKED}" in (HERE / "Makefile").read_text()
    assert found["EnvironmentFile"] == ["/etc/authsvc/authsvc.env"]


def test_the_mail_password_is_where_the_settings_say() -> None:
    name, _, source = entries(SERVICE)["LoadCredential"][0].partition(":")
    assert variables(ENABLED)["AUTHSVC_SMTP_PASSWORD_FILE"] == f"/run/credentials/{SERVICE.name}/{name}"
    assert "/" not in source  # by a path, a missing file would fail the start
    assert f"/etc/credstore/{source}" in SERVICE.read_text()
    assert f"/etc/credstore/{source}" in ENV


# Settings


def test_every_name_is_a_setting() -> None:
    names = {name for name in variables(ENABLED) if name.startswith(PREFIX)}
    assert names <= {PREFIX + field.name.upper() for field in fields(Settings)}
    assert names == set(re.findall(PREFIX + "[A-Z_]+", ENV))


@pytest.mark.parametrize(("text", "mails"), [(ENV, False), (ENABLED, True)], ids=["as it is", "with mail"])
def test_the_settings_are_accepted(text: str, mails: bool) -> None:
    settings = Settings.from_environ(variables(text))
    assert settings.production
    assert bool(settings.smtp_server) == mails
    assert settings.warnings() == ([] if mails else ["no AUTHSVC_SMTP_URL: nobody can be mailed a reset link"])


def test_a_shell_reads_what_systemd_reads(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(ENABLED)
    script = f"set -a; . {shlex.quote(str(file))}; env -0"
    done = subprocess.run(["sh", "-c", script], env=clean_environ(), capture_output=True, text=True, check=True)
    read = dict(entry.partition("=")[::2] for entry in done.stdout.split("\0"))
    assert variables(ENABLED).items() <= read.items()


# Commands


def test_the_service_starts_by_its_command_and_ends_by_sigterm(installed: Installed) -> None:
    [command] = installed.commands(SERVICE, "ExecStart")
    environ = installed.environ | {"AUTHSVC_LISTEN": "127.0.0.1:0"}
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout
        try:
            assert process.stdout.readline().startswith("http://127.0.0.1:")
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=int(entries(SERVICE)["TimeoutStopSec"][0])) == 0
    assert installed.database.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow  # two days of three processes each
def test_a_second_run_replaces_the_backup_of_the_day(installed: Installed) -> None:
    add_user(installed.database, "bob@example.com")
    assert installed.day() == 0
    [(name, emails)] = installed.saved().items()
    assert re.fullmatch("authsvc-[1-7][.]db", name)
    assert emails == ["bob@example.com"]
    add_user(installed.database, "eve@example.com")
    (installed.backups / "authsvc-new.db").touch()
    (installed.backups / ".authsvc-new.db.ab12cd34").touch()
    assert installed.day() == 0
    assert installed.saved() == {name: ["bob@example.com", "eve@example.com"]}
    assert (installed.backups / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_backup_that_fails_costs_none(installed: Installed) -> None:
    add_user(installed.database, "bob@example.com")
    assert installed.day() == 0
    before = installed.saved()
    installed.database.unlink()
    assert installed.day() == 1
    assert installed.saved() == before


# The way from a bare machine, and the service in one file


class Packed(Service):
    """The service as it is installed: one file, run by the system's own Python."""

    def __init__(self, root: Path, folder: Path, **environ: str) -> None:
        (unit,) = entries(root / "etc/systemd/system/authsvc.service")["ExecStart"]
        self.program = tuple(unit.replace(PROGRAM, f"{root}{PROGRAM}").split())
        settings = variables((root / "etc/authsvc/authsvc.env").read_text())
        own = {
            "AUTHSVC_LISTEN": "127.0.0.1:0",
            "AUTHSVC_DATABASE": f"{folder}/authsvc.db",
            "SHIV_ROOT": f"{root}{UNPACKED}",
        }
        super().__init__(folder, **{**settings, **environ, **own})


class Machine:
    """A machine's root in a folder, in which the commands of deploy/README.md are typed."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.root, self.folder = folder / "tree", folder / "root", folder / "site"
        shutil.copytree(HERE, self.tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "dist", "build", "*.db*"))
        (self.tree / ".venv").symlink_to(sys.prefix)
        (self.root / "etc/nginx/conf.d").mkdir(parents=True)  # as Debian's package does
        self.folder.mkdir()
        self.services: list[Packed] = []
        self.sites: list[Site] = []

    def type(self, command: str) -> str:
        """Do what a command does, as far as it can be done here; return what it prints."""
        match command.split():
            case ["apt-get" | "certbot", *_]:
                return ""  # would change this machine, or ask for a name on the internet
            case ["systemctl", "enable", "--now", *names]:
                assert all((self.root / "etc/systemd/system" / name).exists() for name in names)
                return ""  # with the proxy, whose port it must know
            case ["systemctl", "reload", "nginx"]:
                self.start_site()
                return ""
            case ["curl", *arguments]:
                there = f"--cacert {self.folder}/authority.pem --connect-to ::127.0.0.1:{self.sites[0].port}"
                return self.run(f"curl -s {there} {' '.join(arguments)}")
            case ["authsvc", *_]:
                self.move_wrapper()
        return self.run(command)

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-ec", command.replace(" /etc/", f" {self.root}/etc/").replace("YOUR.DOMAIN", "example.com")],
            cwd=self.tree,
            env={
                **clean_environ(),
                "DESTDIR": f"{self.root}",
                "PATH": f"{self.root}/usr/local/sbin:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def start_site(self) -> None:
        class Installed(Site):
            deploy = self.folder / "configuration"

        def start(**environ: str) -> Service:
            self.services.append(Packed(self.root, self.folder, **environ))
            return self.services[-1]

        text = (self.root / "etc/nginx/conf.d/authsvc.conf").read_text()
        (self.folder / "configuration").mkdir()
        (self.folder / "configuration/nginx.conf").write_text(text)
        self.sites.append(Installed("nginx", self.folder, start))

    def move_wrapper(self) -> None:
        settings = "".join(f"{name}={value}\n" for name, value in self.services[0].environ.items())
        (self.folder / "authsvc.env").write_text(settings)
        wrapper = self.root / "usr/local/sbin/authsvc"
        text = wrapper.read_text()
        for former, new in {
            "/etc/authsvc/authsvc.env": f"{self.folder}/authsvc.env",
            "runuser -u authsvc -- ": "",  # there is no such user here
            PROGRAM: f"{self.root}{PROGRAM}",
        }.items():
            assert former in text
            text = text.replace(former, new)
        wrapper.write_text(text)

    def close(self) -> None:
        for part in self.services:
            part.end()
        for site in self.sites:
            site.close()


@pytest.mark.slow  # packs the service, starts it and nginx
def test_the_commands_of_the_readme_guard_an_application(tmp_path: Path) -> None:
    text = (DEPLOY / "README.md").read_text().partition("```console\n")[2].partition("```")[0]
    commands = re.findall("^# (.*)$", text, re.MULTILINE)
    assert 5 <= len(commands) <= 10
    with closing(Machine(tmp_path)) as machine:
        said = [machine.type(command) for command in commands]
        assert '{"message": "ok"}' in said
        (site,) = machine.sites
        token = dict(part.split("=", 1) for part in said[-1].strip().partition("#")[2].split("&"))["token"]
        form = {"email": "you@example.com", "reset_token": token, "new_password": PASSWORD}
        assert site.ask("PUT", f"{site.auth}/reset_password", form).status == 200
        assert site.ask("GET", f"{site.app}/").status == 302
        reply = site.ask("GET", f"{site.app}/", cookie=site.log_in("you@example.com"))
        assert reply.json["headers"]["remote-user"] == ["you@example.com"]


class Alone(Service):
    """The one file and nothing else of ours, run by the system's Python."""

    program = "/usr/bin/python3", "-I", "authsvc.pyz"

    def __init__(self, folder: Path, packed: str, *options: str, **environ: str) -> None:
        subprocess.run(["make", "-s", "-C", HERE, "pyz", *options], check=True, capture_output=True, timeout=300)
        (folder / "alone").mkdir()
        shutil.copy(HERE / packed, folder / "alone/authsvc.pyz")
        super().__init__(folder / "alone", SHIV_ROOT=str(folder), **environ)

    def walk(self) -> None:
        """Have main.py ask for everything."""
        command = [sys.executable, str(HERE / "main.py")]
        subprocess.run(command, env={**os.environ, "AUTHSVC_URL": self.url}, check=True, timeout=60)


@pytest.mark.slow  # packs the service
def test_one_file_is_all_that_the_service_needs(tmp_path: Path) -> None:
    service = Alone(tmp_path, "dist/authsvc.pyz")
    try:
        service.walk()
        for page in ("login", "pages/style.css", "pages/script.js"):
            assert requests.get(f"{service.url}/{page}", timeout=10).ok
        assert "usage: authsvc.py" in service.command("--help")
    finally:
        assert service.end() == 0
    names = zipfile.ZipFile(service.folder / "authsvc.pyz").namelist()
    assert not [name for name in names if re.search("requests|psycopg|main.py$|tests|conftest", name)]
    environ = {**clean_environ(), **service.environ, "AUTHSVC_DATABASE": "postgresql://127.0.0.1:1/x"}
    done = subprocess.run(service.program, cwd=service.folder, env=environ, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("authsvc: PostgreSQL needs psycopg: ")


@pytest.mark.slow  # packs the service
@pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)
def test_one_file_with_psycopg_serves_from_postgresql(tmp_path: Path, postgresql: postgres.Server) -> None:
    place = postgresql.new_place()
    service = Alone(tmp_path, "dist/authsvc-postgres.pyz", "POSTGRES=1", AUTHSVC_DATABASE=place)
    try:
        service.walk()
        assert "PostgreSQL" in service.log
    finally:
        assert service.end() == 0
