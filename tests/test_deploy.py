"""The installation: systemd accepts the units, and the program accepts their commands and settings.

The last part installs the service as deploy/README.md says, as one file that the system's own Python runs.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import requests

from settings import PREFIX, Settings
from storage import DB
from tests import postgres
from tests.authenticator import Authenticator
from tests.conftest import BOUND, HERE, Service, clean_environ
from tests.crowd import written_log
from tests.documents import commands_in
from tests.product import MODULES, PACKAGES
from tests.proxies import PASSWORD, Site, program

DEPLOY = HERE / "deploy"
SERVICE, DAILY, TIMER = UNITS = tuple(
    DEPLOY / name for name in ("authsvc.service", "authsvc-daily.service", "authsvc-daily.timer")
)
SOCKET = DEPLOY / "authsvc.socket"
WRAPPER = DEPLOY / "authsvc"
ENV = (DEPLOY / "authsvc.env").read_text()
ENABLED = re.sub("^#(?=[A-Z])", "", ENV, flags=re.MULTILINE)
STATE, UNPACKED, PROGRAM = "/var/lib/authsvc", "/opt/authsvc/unpacked", "/opt/authsvc/authsvc.pyz"
MAX_EXPOSURE = 1.5
COMMON_PASSWORD = "sunshine2026202"  # a word of credentials/common_passwords.txt.gz with digits appended

# The entries in which the two services may differ. Everything else, above all the hardening, is the same.
DIFFERENT = {
    "Type",
    "ExecStart",
    "ExecStartPre",
    "Restart",
    "RestartSec",
    "TimeoutStartSec",
    "TimeoutStopSec",
    "WatchdogSec",
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
    """The units' commands and settings, with the folder of the test in place of the system's folders."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self.backups = self.state / "backup"
        self.backups.mkdir(parents=True, mode=0o700)
        self.program = folder / "authsvc.pyz"
        with zipfile.ZipFile(self.program, "w") as archive:  # stands for the one file, and imports the rest from here
            text = f"import sys; sys.path.insert(0, {str(HERE)!r}); import authsvc; sys.exit(authsvc.main())"
            archive.writestr("__main__.py", text)
        self.environ = clean_environ() | {name: self.moved(value) for name, value in variables(ENV).items()}
        self.environ["TZ"] = f"NOON{time.gmtime().tm_hour - 12:+}"  # local time is about noon: no test sees midnight

    @property
    def database(self) -> Path:
        return Path(self.environ["AUTHSVC_DATABASE"])

    def moved(self, text: str) -> str:
        return text.replace(PROGRAM, str(self.program)).replace(STATE, str(self.state))

    def commands(self, unit: Path, *names: str) -> list[list[str]]:
        found = [shlex.split(value) for name in names for value in entries(unit).get(name, [])]
        for value in [part for command in found for part in command]:
            specifiers = re.search("[$%]", value.replace("$$", "").replace("%%", ""))
            assert not specifiers, "systemd would replace it"
        unescaped = [[part.replace("$$", "$").replace("%%", "%") for part in command] for command in found]
        python = {"/usr/bin/python3": sys.executable}
        return [[python.get(part, self.moved(part)) for part in command] for command in unescaped]

    def run_daily(self) -> int:
        """Run the commands of the daily unit until one fails; return its exit code."""
        for command in self.commands(DAILY, "ExecStartPre", "ExecStart"):
            done = subprocess.run(command, env=self.environ, capture_output=True, text=True, umask=0o077, timeout=60)
            if done.returncode:
                return done.returncode
        return 0

    def backed_up(self) -> dict[str, list[str]]:
        """Return the emails in each backup."""
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


@pytest.mark.slow
def test_systemd_accepts_the_units_and_detects_a_wrong_one(
    analyze: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = analyze("verify", *UNITS, SOCKET)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    wrong = tmp_path / SERVICE.name
    wrong.write_text(SERVICE.read_text().replace("ProtectClock=", "ProtectClocks="))
    assert "ProtectClocks" in analyze("verify", wrong).stderr


@pytest.mark.parametrize("unit", [SERVICE, DAILY], ids=lambda unit: unit.name)
def test_systemd_rates_the_exposure_of_each_unit_as_low(
    unit: Path, analyze: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = analyze("security", "--offline=yes", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= MAX_EXPOSURE


def test_the_daily_unit_is_hardened_like_the_service() -> None:
    service, daily = ({**entries(unit)} for unit in (SERVICE, DAILY))
    only_service = {"After", "StartLimitIntervalSec", "StartLimitBurst", "WantedBy", "Description"}
    assert {name: value for name, value in service.items() if name not in DIFFERENT | only_service} == {
        name: value for name, value in daily.items() if name not in DIFFERENT | {"Description"}
    }


def test_the_only_extra_system_call_lowers_the_priority_of_threads() -> None:
    # Without it the hashing threads exit, and no login is answered.
    allowed = entries(DAILY)["SystemCallFilter"]
    assert allowed == ["@system-service", "~@privileged @resources"]
    assert entries(SERVICE)["SystemCallFilter"] == [*allowed, "setpriority"]
    assert "os.setpriority(" in (HERE / "web" / "server.py").read_text()


def test_the_service_can_reach_a_mail_server() -> None:
    service = entries(SERVICE)
    assert not service.keys() & {"IPAddressDeny", "PrivateNetwork"}
    assert {"AF_INET", "AF_INET6", "AF_UNIX"} <= set(service["RestrictAddressFamilies"][0].split())


@pytest.mark.parametrize("unit", [SERVICE, DAILY], ids=lambda unit: unit.name)
def test_user_folders_and_settings_match(unit: Path) -> None:
    found, settings = entries(unit), variables(ENV)
    [user] = found["User"]
    assert found["Group"] == [user]
    assert f"systemd-sysusers --inline 'u {user} - " in (HERE / "Makefile").read_text()
    assert found["StateDirectory"] == [f"{user} {user}/backup"]
    assert found["StateDirectoryMode"] == ["0700"]
    assert found["UMask"] == ["0077"]
    assert f"/var/lib/{user}" == STATE == os.path.dirname(settings["AUTHSVC_DATABASE"])
    assert settings["SHIV_ROOT"] == UNPACKED  # it belongs to root, so the user of the units cannot write there
    assert found["ProtectSystem"] == ["strict"]
    assert f"SHIV_ROOT=$(DESTDIR){UNPACKED}" in (HERE / "Makefile").read_text()
    assert found["EnvironmentFile"] == ["/etc/authsvc/authsvc.env"]


def test_the_mail_password_is_where_the_settings_say() -> None:
    name, _, source = entries(SERVICE)["LoadCredential"][0].partition(":")
    assert variables(ENABLED)["AUTHSVC_SMTP_PASSWORD_FILE"] == f"/run/credentials/{SERVICE.name}/{name}"
    assert "/" not in source  # with a path, a missing file would prevent the start
    assert f"/etc/credstore/{source}" in SERVICE.read_text()
    assert f"/etc/credstore/{source}" in ENV


# Settings


def test_every_name_in_the_file_is_a_setting() -> None:
    names = {name for name in variables(ENABLED) if name.startswith(PREFIX)}
    assert names <= {PREFIX + field.name.upper() for field in fields(Settings)}
    assert names == set(re.findall(PREFIX + "[A-Z_]+", ENV))


@pytest.mark.parametrize(("text", "has_mail"), [(ENV, False), (ENABLED, True)], ids=["unchanged", "with mail"])
def test_the_settings_are_accepted(text: str, has_mail: bool) -> None:
    settings = Settings.from_environ(variables(text))
    assert settings.production
    assert bool(settings.smtp_server) == has_mail
    assert list(settings.warnings()) == (
        [] if has_mail else ["AUTHSVC_SMTP_URL is not set: no reset link is mailed, and no email is confirmed"]
    )


# The text of a file, and the variables that systemd reads in it.
FILES: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ("# text\n; text\n\nA=1\nB=two words  \n  C = 3\t\n", {"A": "1", "B": "two words", "C": "3"}),
    "url": (
        "A=postgresql://u@db/x?sslmode=verify-full&b=c#d;e\n",
        {"A": "postgresql://u@db/x?sslmode=verify-full&b=c#d;e"},
    ),
    "shell": ("A=$HOME `id` $(id) ~ * | > < !\nB=x&y\n", {"A": "$HOME `id` $(id) ~ * | > < !", "B": "x&y"}),
    "single quotes": ("A=' x # \\ \"y\" '\nB='two\nlines'\n", {"A": ' x # \\ "y" ', "B": "two\nlines"}),
    "double quotes": ('A=" x \\" \\$ \\` \\\\ \\n "\n', {"A": ' x " $ ` \\ \\n '}),
    "quotes side by side": ("A='x' \"y\" z\n", {"A": "xyz"}),
    "quotes inside": ('A=it\'s "5"\n', {"A": 'it\'s "5"'}),
    "backslashes": ("A=a\\b\\\\c\\ \nB=\\'x\n", {"A": "ab\\c ", "B": "'x"}),
    "continuation": ('A=x \\\n  y\nB="x\\\ny"\n', {"A": "x   y", "B": "xy"}),
    "windows": ("A=1\r\n# text\r\nB='2'\r\n", {"A": "1", "B": "2"}),
    "no variables": ("export A=1\n1B=2\nC\nD.E=3\n=4\n\ufeffF=5\n", {}),
    "the last counts": ("A=1\nB=\nA=2", {"A": "2", "B": ""}),
    "quote left open": ("A='x\nB=2\n", {"A": "x\nB=2\n"}),
}


@functools.cache
def systemd_library() -> str | None:
    return next((str(path) for path in Path("/usr/lib").glob("**/systemd/libsystemd-shared-*.so")), None)


def read_as_systemd(file: Path) -> dict[str, str]:
    """Read a file by the function that systemd itself calls for EnvironmentFile=."""
    library = systemd_library()
    if library is None:
        pytest.skip("systemd's library is missing: apt-get install systemd")
    found: Any = ctypes.POINTER(ctypes.c_char_p)()
    assert ctypes.CDLL(library).load_env_file(None, bytes(file), ctypes.byref(found)) == 0
    lines = [line.decode() for line in itertools.takewhile(bool, found or ())]
    pairs = [line.partition("=")[::2] for line in lines]
    return {name: value for name, value in pairs if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)}  # as systemd does


def read_as_wrapper(text: str) -> dict[str, str]:
    read: dict[str, str] = runpy.run_path(str(WRAPPER))["read_settings"](text)
    return read


@pytest.mark.parametrize(("text", "expected"), FILES.values(), ids=FILES)
@pytest.mark.slow
def test_the_wrapper_reads_the_settings_as_systemd_does(text: str, expected: dict[str, str], tmp_path: Path) -> None:
    assert read_as_wrapper(text) == expected
    (tmp_path / "env").write_bytes(text.encode())
    assert read_as_systemd(tmp_path / "env") == expected


def test_the_wrapper_reads_the_settings_of_this_release() -> None:
    assert read_as_wrapper(ENV) == variables(ENV)
    assert read_as_wrapper(ENABLED) == variables(ENABLED)


def test_the_wrapper_finds_its_programs_without_a_path() -> None:  # cron leaves /usr/sbin out
    command = runpy.run_path(str(WRAPPER))["COMMAND"].split()
    assert [os.access(command[number], os.X_OK) for number in (0, 4)] == [True, True], command


class Wrapper:
    """The wrapper "authsvc" for an installation in the folder of the test."""

    def __init__(self, installed: Installed) -> None:
        self.settings = installed.state.parent / "authsvc.env"
        self.path = installed.state.parent / "authsvc"
        text = WRAPPER.read_text().replace("/etc/authsvc/authsvc.env", str(self.settings))
        text = text.replace("/sbin/runuser -u authsvc -- /usr/bin/python3", sys.executable)
        self.path.write_text(installed.moved(text))

    def __call__(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/usr/bin/python3", "-sP", self.path, *arguments],
            env=clean_environ() | environ,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.mark.process
def test_a_command_uses_the_database_of_the_settings_and_no_other(installed: Installed) -> None:
    wrapper, old = Wrapper(installed), str(installed.state / "old.db")
    for database in (installed.database, old):
        add_user(Path(database), "bob@example.com")
    wrapper.settings.write_text(f"AUTHSVC_DATABASE='{installed.database}'\n")
    exported = {"AUTHSVC_DATABASE": old, "AUTHSVC_REGISTRATION": "nonsense"}
    done = wrapper("user", "disable", "bob@example.com", **exported)
    assert (done.returncode, done.stdout) == (0, "disabled bob@example.com; all sessions ended\n")
    url = "postgresql://127.0.0.1:1/x?sslmode=verify-full&connect_timeout=1"
    wrapper.settings.write_text(f"AUTHSVC_PUBLIC_URL=https://auth.example.com\nAUTHSVC_DATABASE={url}\n")
    done = wrapper("user", "disable", "bob@example.com", **exported)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("authsvc: cannot open the database x on 127.0.0.1:1: ")
    with closing(DB(old)) as db:
        assert [user.disabled_at for user in db.each_user()] == [None]


@pytest.mark.process
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AUTHSVC_PUBLIC_URL=https://auth.example.com\n", "AUTHSVC_DATABASE must be set"),
        ("AUTHSVC_DATABASE=\n", "AUTHSVC_DATABASE must be set"),
        ("export AUTHSVC_DATABASE=/x\n", "AUTHSVC_DATABASE must be set"),
        ("AUTHSVC_DATABASE=authsvc.db\n", "an absolute path"),
        ("# a comment\\\nAUTHSVC_DATABASE=/x\n", "a comment ends in a backslash"),
        ("AUTHSVC_DATABASE=/\udcff\n", "utf-8"),
        (None, "No such file or directory: run the command as root"),
    ],
    ids=["missing", "empty", "export", "relative", "comment", "utf-8", "no file"],
)
def test_the_wrapper_refuses_settings_that_name_no_database(
    installed: Installed, text: str | None, message: str
) -> None:
    wrapper = Wrapper(installed)
    if text is not None:
        wrapper.settings.write_text(text, errors="surrogateescape")
    done = wrapper("user", "list")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"authsvc: {wrapper.settings}: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Commands


@pytest.mark.process
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
@pytest.mark.process
def test_a_second_run_replaces_the_backup_of_the_day(installed: Installed) -> None:
    add_user(installed.database, "bob@example.com")
    assert installed.run_daily() == 0
    [(name, emails)] = installed.backed_up().items()
    assert re.fullmatch("authsvc-[1-7][.]db", name)
    assert emails == ["bob@example.com"]
    add_user(installed.database, "eve@example.com")
    (installed.backups / "authsvc-new.db").touch()
    (installed.backups / ".authsvc-new.db.ab12cd34").touch()
    assert installed.run_daily() == 0
    assert installed.backed_up() == {name: ["bob@example.com", "eve@example.com"]}
    assert (installed.backups / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.process
def test_a_backup_that_fails_costs_no_former_backup(installed: Installed) -> None:
    add_user(installed.database, "bob@example.com")
    assert installed.run_daily() == 0
    before = installed.backed_up()
    installed.database.unlink()
    assert installed.run_daily() == 1
    assert installed.backed_up() == before


# The installation, and the service as one file


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository. Builds in it disturb neither the repository nor another test process."""
    folder = tmp_path_factory.mktemp("checkout") / "tree"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "dist", "build", "*.db*"))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@contextmanager
def environment_lock() -> Iterator[None]:
    """Keep other tests from using make, which may install packages into the environment of these tests."""
    with (Path(sys.prefix) / "pyvenv.cfg").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(tree: Path, *options: str, target: str = "pyz") -> Path:
    """Return the service as one file, which is built at the first call."""
    version = "py{}.{}".format(*sys.version_info)
    extras = {"POSTGRES=1": "-postgres", "PASSKEYS=1": f"-passkeys-{version}"}
    packed = tree / f"dist/authsvc{''.join(extras.get(option, '') for option in options)}.pyz"
    with environment_lock():
        done = subprocess.run(
            ["make", "-s", target, *options], cwd=tree, capture_output=True, text=True, timeout=300, env=clean_environ()
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return packed


class Packed(Service):
    """The service as it is installed: one file that the system's own Python runs."""

    def __init__(self, root: Path, folder: Path, command: str, settings: str, **environ: str) -> None:
        self.program = tuple(command.replace(PROGRAM, f"{root}{PROGRAM}").split())
        moved = {
            "AUTHSVC_LISTEN": "127.0.0.1:0",
            "AUTHSVC_DATABASE": f"{folder}/authsvc.db",
            "SHIV_ROOT": f"{root}{UNPACKED}",
        }
        super().__init__(folder, **{**variables(settings), **environ, **moved})


def move_wrapper(wrapper: str, root: Path, service: Service) -> str:
    """Return the text of the wrapper "authsvc" for a service below another root, with the settings of that service."""
    settings = service.folder / "authsvc.env"
    settings.write_text("".join(f"{name}={value}\n" for name, value in service.environ.items()))
    wrapper = wrapper.replace("/sbin/runuser", "runuser")  # as the first release called it
    for before, after in {
        "/etc/authsvc/authsvc.env": str(settings),
        "runuser -u authsvc -- ": "",  # this machine does not have that user
        PROGRAM: f"{root}{PROGRAM}",
    }.items():
        assert before in wrapper
        wrapper = wrapper.replace(before, after)
    return wrapper


class Machine:
    """A folder that stands for a machine's root, in which the commands of deploy/README.md are typed."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.tree, self.root, self.folder = tree, folder / "root", folder / "site"
        (self.root / "etc/nginx/conf.d").mkdir(parents=True)  # Debian's package makes this folder
        self.folder.mkdir()
        self.site: Site | None = None

    def type(self, command: str) -> str:
        """Run a command as far as it can run here; return its output."""
        match command.split():
            case ["apt-get" | "certbot", *_]:
                return ""  # would change this machine, or need a name on the internet
            case ["systemctl", "enable", "--now", *names]:
                assert all((self.root / "etc/systemd/system" / name).exists() for name in names)
                return ""  # started together with nginx, because its settings name the port of nginx
            case ["systemctl", "reload", "nginx"]:
                self.start_site()
                return ""
            case ["curl", *arguments]:
                assert self.site
                options = f"--cacert {self.folder}/authority.pem --connect-to ::127.0.0.1:{self.site.port}"
                return self.run(f"curl -s {options} {' '.join(arguments)}")
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
        configuration = self.folder / "configuration"
        configuration.mkdir()
        (configuration / "nginx.conf").write_text((self.root / "etc/nginx/conf.d/authsvc.conf").read_text())
        [command] = entries(self.root / "etc/systemd/system/authsvc.service")["ExecStart"]
        settings = (self.root / "etc/authsvc/authsvc.env").read_text()
        start = functools.partial(Packed, self.root, self.folder, command, settings)
        self.site = Site("nginx", self.folder, start=start, configuration=configuration)
        assert self.site.service
        wrapper = self.root / "usr/local/sbin/authsvc"
        wrapper.write_text(move_wrapper(wrapper.read_text(), self.root, self.site.service))

    def close(self) -> None:
        if self.site:
            self.site.close()


@pytest.mark.slow  # builds the service, starts it and nginx
@pytest.mark.process
@pytest.mark.proxies
def test_the_commands_of_the_readme_protect_an_application(tmp_path: Path, tree: Path) -> None:
    build(tree)
    commands = re.findall("^# (.*)$", commands_in("deploy/README.md", "# apt-get install"), re.MULTILINE)
    assert 5 <= len(commands) <= 10
    with closing(Machine(tmp_path, tree)) as machine:
        outputs = [machine.type(command) for command in commands]
        assert '{"message": "ok"}' in outputs
        site = machine.site
        assert site
        token = dict(part.split("=", 1) for part in outputs[-1].strip().partition("#")[2].split("&"))["token"]
        form = {"email": "you@example.com", "reset_token": token}
        common = site.request("PUT", f"{site.auth}/reset_password", {**form, "new_password": COMMON_PASSWORD})
        assert (common.status, "common" in common.json["message"]) == (400, True)
        assert site.request("PUT", f"{site.auth}/reset_password", {**form, "new_password": PASSWORD}).status == 200
        assert site.request("GET", f"{site.app}/").status == 302
        reply = site.request("GET", f"{site.app}/", cookie=site.sign_in("you@example.com"))
        assert reply.json["headers"]["remote-user"] == ["you@example.com"]


@pytest.mark.slow  # starts nginx
@pytest.mark.process
@pytest.mark.proxies
def test_the_commands_for_cloudflare_write_settings_that_nginx_accepts(tmp_path: Path) -> None:
    nginx, networks = program("nginx", "nginx-light"), {"ips-v4": "192.0.2.0/24", "ips-v6": "2001:db8::/32"}
    conf_d, programs = tmp_path / "etc/nginx/conf.d", tmp_path / "bin"
    conf_d.mkdir(parents=True)
    programs.mkdir()
    (tmp_path / "nginx.conf").write_text(
        f"error_log stderr; pid {tmp_path}/pid; events {{}} http {{ include {conf_d}/*.conf; }}"
    )
    for name, line in {  # curl answers as Cloudflare does, without an end of line
        "curl": "".join(
            f'case "$2" in https://www.cloudflare.com/{name}) printf {networks[name]};; esac; ' for name in networks
        ),
        "nginx": f'exec {nginx} -c {tmp_path}/nginx.conf "$@"',
        "systemctl": f'echo "$*" >{tmp_path}/called',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    lines = re.findall("^# (.*)$", commands_in("deploy/README.md", "# (curl -fsS"), re.MULTILINE)
    done = subprocess.run(
        ["bash", "-ec", "\n".join(lines).replace(" /etc/", f" {tmp_path}/etc/")],
        cwd=tmp_path,
        env={**clean_environ(), "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (conf_d / "cloudflare.conf").read_text().splitlines() == [
        *(f"set_real_ip_from {network};" for network in networks.values()),
        "real_ip_header CF-Connecting-IP;",
    ]
    assert (tmp_path / "called").read_text() == "reload nginx\n"


# An installation of the first release: what its "make install" wrote, with a setting that the operator changed. Its
# wrapper and its daily commands are those of deploy/ at that time.
FORMER_COMMAND = "/usr/bin/python3 -sP /opt/authsvc/authsvc.pyz"
FORMER_DAILY = (
    "/usr/bin/find /var/lib/authsvc/backup -maxdepth 1 -type f -name *authsvc-new.db* -delete",
    "/usr/bin/python3 -sP /opt/authsvc/authsvc.pyz backup /var/lib/authsvc/backup/authsvc-new.db",
    "/bin/mv -f /var/lib/authsvc/backup/authsvc-new.db /var/lib/authsvc/backup/authsvc-1.db",
    "/usr/bin/python3 -sP /opt/authsvc/authsvc.pyz prune",
)
FORMER_SETTINGS = """\
AUTHSVC_PUBLIC_URL=https://auth.example.com
AUTHSVC_COOKIE_DOMAIN=example.com
AUTHSVC_TRUSTED_PROXY=127.0.0.1
AUTHSVC_LISTEN=127.0.0.1:5000
AUTHSVC_DATABASE=/var/lib/authsvc/authsvc.db
AUTHSVC_REGISTRATION=closed
SHIV_ROOT=/opt/authsvc/unpacked
"""
FORMER_WRAPPER = """\
#!/bin/sh
set -ae
. /etc/authsvc/authsvc.env
HOME=/var/lib/authsvc
exec runuser -u authsvc -- /usr/bin/python3 -sP /opt/authsvc/authsvc.pyz "$@"
"""
FORMER_PASSWORDS = {"bob@example.com": "b4l0u", "carol@example.com": "c4r0l"}  # in tests/first_release.db


@pytest.mark.slow  # builds the service
@pytest.mark.process
def test_an_installation_of_the_first_release_works_with_the_new_file(tmp_path: Path, tree: Path) -> None:
    root, state = tmp_path / "root", tmp_path / "state"
    settings = root / "etc/authsvc/authsvc.env"
    settings.parent.mkdir(parents=True)
    settings.write_text(FORMER_SETTINGS)
    (state / "backup").mkdir(parents=True)
    shutil.copyfile(HERE / "tests" / "first_release.db", state / "authsvc.db")
    (state / "authsvc.db").chmod(0o600)
    with closing(sqlite3.connect(state / "authsvc.db", isolation_level=None)) as former:
        [[latest]] = former.execute("SELECT max(last_seen_at) FROM sessions")
        columns = "created_at", "last_seen_at", "expires_at"
        shifted = ", ".join(f"{column} = {column} + {int(time.time()) - latest}" for column in columns)
        former.execute(f"UPDATE sessions SET {shifted}")  # the file was made with a clock of its own
    build(tree)
    subprocess.run(["make", "-s", "install", f"DESTDIR={root}"], cwd=tree, check=True, capture_output=True, timeout=300)
    assert settings.read_text() == FORMER_SETTINGS  # the operator's settings are kept
    assert entries(root / "etc/systemd/system/authsvc.service")["ExecStart"] == [FORMER_COMMAND]

    service = Packed(root, state, FORMER_COMMAND, FORMER_SETTINGS, AUTHSVC_BCRYPT_COST="10")
    try:
        proxied = {"X-Forwarded-For": "198.51.100.7", "X-Forwarded-Proto": "https"}
        for email, password in FORMER_PASSWORDS.items():
            form = {"email": email, "password": password}
            assert requests.post(f"{service.url}/sessions", form, headers=proxied, timeout=30).status_code == 200
        new = {"email": "new@example.com", "password": PASSWORD}
        assert requests.post(f"{service.url}/users", new, headers=proxied, timeout=30).status_code == 403
        assert requests.get(f"{service.url}/login", headers=proxied, timeout=30).status_code == 200

        wrapper = tmp_path / "authsvc"
        wrapper.write_text(move_wrapper(FORMER_WRAPPER, root, service))
        for arguments, code, output in (
            (["user", "list"], 0, "bob@example.com"),
            (["check"], 1, "database  ok"),  # 1 because no mail server is set
            (["--help"], 0, "usage: "),
        ):
            done = subprocess.run(
                ["/bin/sh", wrapper, *arguments], env=clean_environ(), capture_output=True, text=True, timeout=60
            )
            assert (done.returncode, done.stderr) == (code, ""), done.stdout
            assert output in done.stdout

        environ = {**clean_environ(), **service.environ}
        for command in FORMER_DAILY:
            moved = shlex.split(command.replace(PROGRAM, f"{root}{PROGRAM}").replace(STATE, str(state)))
            subprocess.run(moved, env=environ, check=True, capture_output=True, timeout=60)
        with closing(sqlite3.connect(state / "backup/authsvc-1.db")) as backup:
            assert backup.execute("SELECT count(*) FROM users").fetchone() == (3,)
    finally:
        assert service.end() == 0


def install(tree: Path, root: Path, *options: str) -> str:
    """Install below a root; return what make printed."""
    command = ["make", "-s", "install", f"DESTDIR={root}", *options]
    done = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout.splitlines()[-1]


@pytest.mark.slow  # builds the service twice
@pytest.mark.process
def test_an_update_keeps_psycopg_until_it_is_left_out(tmp_path: Path, tree: Path) -> None:
    build(tree)
    build(tree, "POSTGRES=1")
    without = "installed without psycopg (make install POSTGRES=1 adds it)"
    assert install(tree, tmp_path) == without
    assert install(tree, tmp_path) == without
    assert install(tree, tmp_path, "POSTGRES=1") == "installed with psycopg"
    for _ in range(2):
        assert install(tree, tmp_path) == "installed with psycopg"
        assert "site-packages/psycopg/__init__.py" in zipfile.ZipFile(f"{tmp_path}{PROGRAM}").namelist()
    assert install(tree, tmp_path, "POSTGRES=") == without
    assert "site-packages/psycopg/__init__.py" not in zipfile.ZipFile(f"{tmp_path}{PROGRAM}").namelist()
    settings = tmp_path / "etc/authsvc/authsvc.env"
    settings.write_text('AUTHSVC_DATABASE="postgresql://authsvc@db.example.com/authsvc"\n')
    assert install(tree, tmp_path) == "installed with psycopg"


def run_packed(packed: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the one file with the system's Python, as a user whom permissions bind."""
    return subprocess.run(
        [*BOUND, "/usr/bin/python3", "-sP", packed, *arguments],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow  # builds the service
@pytest.mark.process
@pytest.mark.parametrize(
    ("variable", "folder", "reason"),
    [
        ("HOME", "closed", "Permission denied"),
        ("HOME", "/proc/nowhere", "No such file or directory"),
        ("SHIV_ROOT", "closed/unpacked", "Permission denied"),
        ("SHIV_ROOT", "file", "Not a directory"),
    ],
)
def test_one_file_that_cannot_be_unpacked_says_what_to_set(
    tmp_path: Path, tree: Path, variable: str, folder: str, reason: str
) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "file").touch()
    done = run_packed(build(tree), "--version", **{variable: str(tmp_path / folder)})
    assert (done.returncode, done.stdout) == (2, "")
    named = "~/.shiv" if variable == "HOME" else str(tmp_path / folder)
    remedy = "set SHIV_ROOT to a folder that only this user can write to"
    assert done.stderr == f"authsvc: cannot unpack into {named}: {reason}: {remedy}\n"


@pytest.mark.slow  # builds the service
@pytest.mark.process
def test_one_file_whose_libraries_cannot_be_loaded_says_what_to_set(tmp_path: Path, tree: Path) -> None:
    packed = build(tree)
    assert run_packed(packed, "--version", SHIV_ROOT=str(tmp_path)).returncode == 0
    [library] = tmp_path.glob("*/site-packages/bcrypt/*.so")
    library.write_bytes(b"")  # refused like a file on a file system that is mounted with noexec
    done = run_packed(packed, "--version", SHIV_ROOT=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"authsvc: cannot run from {tmp_path}: {library}: ")
    assert done.stderr.endswith(": set SHIV_ROOT to another folder if this one is mounted with noexec\n")


@pytest.mark.slow  # builds the service
@pytest.mark.process
def test_the_two_files_that_were_started_last_stay_unpacked(tmp_path: Path, tree: Path) -> None:
    """The newest one, and the one from which the service runs until it is restarted."""
    built = zipfile.ZipFile(build(tree))
    packed, root = tmp_path / "authsvc.pyz", tmp_path / "unpacked"

    def start(release: str) -> set[str]:
        with zipfile.ZipFile(packed, "w") as archive:
            for entry in built.infolist():
                content = built.read(entry)
                if entry.filename == "environment.json":
                    content = json.dumps({**json.loads(content), "build_id": release}).encode()
                archive.writestr(entry.filename, content)
        assert run_packed(packed, "--version", SHIV_ROOT=str(root)).returncode == 0
        return {path.name.replace("authsvc.pyz", "").strip("._") for path in root.iterdir()}

    def kept(*releases: str) -> set[str]:
        return {name for release in releases for name in (release, f"{release}_lock")}

    (root / "another.pyz_0").mkdir(parents=True)
    another = {"another.pyz_0"}
    assert start("1") == another | kept("1")
    assert start("2") == another | kept("1", "2")
    assert start("1") == another | kept("1", "2")  # back to the former one
    assert start("3") == another | kept("1", "3")
    assert start("4") == another | kept("3", "4")


class Alone(Service):
    """The one file and nothing else of the project, run by the system's Python."""

    program = "/usr/bin/python3", "-I", "authsvc.pyz"

    def __init__(self, folder: Path, packed: Path, **environ: str) -> None:
        (folder / "alone").mkdir()
        shutil.copy(packed, folder / "alone/authsvc.pyz")
        super().__init__(folder / "alone", SHIV_ROOT=str(folder / "unpacked"), **environ)


def use(service: Service) -> None:
    """Let main.py send its requests."""
    command = [sys.executable, str(HERE / "main.py")]
    subprocess.run(command, env={**os.environ, "AUTHSVC_URL": service.url}, check=True, timeout=120)


def product_files() -> set[str]:
    """Return the path of every file of the service, relative to the repository."""
    files = [path for folder in (*PACKAGES, "mails") for path in (HERE / folder).rglob("*") if path.is_file()]
    files += [*MODULES.values(), *HERE.glob("*.sql"), HERE / "pyproject.toml"]
    return {str(path.relative_to(HERE)) for path in files if "__pycache__" not in path.parts}


@pytest.mark.slow  # builds the service
@pytest.mark.process
def test_the_service_needs_one_file_only(tmp_path: Path, tree: Path) -> None:
    service = Alone(tmp_path, build(tree))
    try:
        use(service)
        for page in ("login", "pages/style.css", "pages/script.js"):
            assert requests.get(f"{service.url}/{page}", timeout=30).ok
        assert service.command("--help").startswith("usage: authsvc [")
        assert re.fullmatch("authsvc [0-9]+[.][0-9]+[.][0-9]+\n", service.command("--version"))
    finally:
        assert service.end() == 0
    names = set(zipfile.ZipFile(service.folder / "authsvc.pyz").namelist())
    assert {f"site-packages/{name}" for name in product_files()} <= names
    assert not [
        name for name in names if re.search(r"requests|psycopg|main\.py$|tests|conftest|\.git|\.svn|\.ci", name)
    ]
    environ = {**clean_environ(), **service.environ, "AUTHSVC_DATABASE": "postgresql://127.0.0.1:1/x"}
    done = subprocess.run(service.program, cwd=service.folder, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("authsvc: PostgreSQL needs psycopg: ")


@pytest.mark.slow  # builds the service
@pytest.mark.skipif(not postgres.programs(), reason=postgres.MISSING)
def test_one_file_with_psycopg_serves_from_postgresql(tmp_path: Path, tree: Path, postgresql: postgres.Server) -> None:
    packed = build(tree, "POSTGRES=1")
    service = Alone(tmp_path, packed, AUTHSVC_DATABASE=postgresql.new_database())
    try:
        use(service)
        assert "PostgreSQL" in written_log(service)
    finally:
        assert service.end() == 0


@pytest.mark.slow  # builds the service
@pytest.mark.process
def test_one_file_with_passkeys_is_for_one_version_of_python(tmp_path: Path, tree: Path) -> None:
    packed = build(tree, "PASSKEYS=1")
    service = Alone(tmp_path, packed)
    browser, password = requests.Session(), {"password": "b4l0u"}
    try:
        for path in ("users", "sessions"):
            assert browser.post(f"{service.url}/{path}", {"email": "bob@x.io", **password}, timeout=30).ok
        device = Authenticator(service.url.replace("127.0.0.1", "localhost"))
        options = browser.post(f"{service.url}/passkeys/options", password, timeout=30).json()
        passkey = {"name": "laptop", "credential": device.create(options)}
        assert browser.post(f"{service.url}/passkeys", json=passkey, timeout=30).ok
        options = browser.post(f"{service.url}/sessions/passkey/options", timeout=30).json()
        proof = {"credential": device.get(options)}
        assert browser.post(f"{service.url}/sessions/passkey", json=proof, timeout=30).ok
    finally:
        assert service.end() == 0
    other = tmp_path / "other.pyz"
    shutil.copy(packed, other)
    with zipfile.ZipFile(other, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("site-packages/PYTHON", "3.10\n")
    done = run_packed(other, "--version", SHIV_ROOT=str(tmp_path / "root"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"authsvc: this file is for Python 3\.10, this is 3\.[0-9]+: build it again\n", done.stderr)


@pytest.mark.slow  # builds the service twice
@pytest.mark.process
def test_two_builds_in_different_folders_give_the_same_file(tmp_path: Path, tree: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(tree, other, symlinks=True, ignore=shutil.ignore_patterns("dist"))
    for path in (other, *other.rglob("*")):
        if path.is_file() and ".venv" not in path.parts:
            path.chmod(path.stat().st_mode & 0o700)  # as in a checkout with another umask
    first, second = build(tree), build(other)
    assert first != second
    assert hashlib.sha256(first.read_bytes()).digest() == hashlib.sha256(second.read_bytes()).digest()


@pytest.mark.slow  # builds the service
@pytest.mark.process
def test_one_file_contains_the_licences_of_its_packages(tree: Path) -> None:
    packed = zipfile.ZipFile(build(tree))
    assert packed.read("site-packages/LICENSE") == (HERE / "LICENSE").read_bytes()
    licences = packed.read("site-packages/LICENCES.txt").decode()
    assert re.findall("^([a-z_]+) [0-9.]+, LICENSE", licences, re.MULTILINE) == [
        *("bottle", "bcrypt", "waitress", "segno", "prometheus_client", "shiv")
    ]
    assert "Marcel Hellkamp" in licences  # of Bottle


@pytest.mark.process
def test_a_package_without_a_licence_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "bare-1.0.dist-info").mkdir()
    (tmp_path / "bare-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: bare\nVersion: 1.0\n")
    command = [sys.executable, str(DEPLOY / "licences.py"), "bare"]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "bare 1.0 has no file with its licence\n")


@pytest.mark.slow  # builds the service
@pytest.mark.process
@pytest.mark.skipif(not find_spec("cyclonedx_py"), reason="cyclonedx-bom is missing: make .venv/release")
def test_a_release_names_its_packages_and_its_checksums(tree: Path) -> None:
    build(tree, target="release")
    dist = tree / "dist"
    command = commands_in("SECURITY.md", "$ sha256sum -c").removeprefix("$ ").splitlines()
    done = subprocess.run(["bash", "-c", command[0]], cwd=dist, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()) == (0, command[1:])
    contents = json.loads((dist / "authsvc.cdx.json").read_text())
    assert contents["metadata"]["component"]["name"] == "authsvc"
    assert {component["name"] for component in contents["components"]} == {
        *("bottle", "bcrypt", "waitress", "segno", "prometheus_client", "shiv")
    }
    assert (dist / "SHA256SUMS").read_text() == "".join(
        f"{hashlib.sha256((dist / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("authsvc.pyz", "authsvc.cdx.json")
    )


# The package for pip, pipx and uv


@pytest.fixture(scope="module")
def environment(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment in which the service was installed by pip, with the pinned packages of the tests' environment."""
    folder = tmp_path_factory.mktemp("environment")
    environment = folder / "env"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python"]
    offline = "--no-index", "--no-deps"
    build_options = "--no-build-isolation", "--wheel-dir", str(folder)
    for command in (
        [sys.executable, "-m", "venv", "--without-pip", str(environment)],
        [*pip, sys.executable, "wheel", *offline, *build_options, str(tree)],
        [*pip, str(environment), "install", *offline, "--find-links", str(folder), "authsvc"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=clean_environ())
        assert done.returncode == 0, done.stdout + done.stderr
    pinned = re.findall("^([a-z-]+)==", (HERE / "requirements/run.txt").read_text(), re.MULTILINE)
    for package in map(metadata.distribution, set(pinned) - {"segno", "prometheus-client"}):  # these are optional
        for file in package.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = site_packages(environment) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(package.locate_file(file)), target)
    return environment


def site_packages(environment: Path) -> Path:
    [found] = environment.glob("lib/python*/site-packages")
    return found


@pytest.mark.slow  # builds the package
@pytest.mark.process
def test_pip_installs_one_folder_and_one_command(environment: Path) -> None:
    [described] = site_packages(environment).glob("authsvc-*.dist-info")
    files = {str(file) for file in metadata.PathDistribution(described).files or () if file.suffix != ".pyc"}
    assert {name for name in files if not name.startswith(f"{described.name}/")} == {
        "../../../bin/authsvc",
        "authsvc_app/__init__.py",
        *(f"authsvc_app/{name}" for name in product_files()),
    }


@pytest.mark.slow  # builds the package
@pytest.mark.process
def test_the_installed_command_serves_and_has_the_operator_s_commands(environment: Path, tmp_path: Path) -> None:
    class ByCommand(Service):
        program = (str(environment / "bin/authsvc"),)

    service = ByCommand(tmp_path)
    try:
        use(service)
        assert requests.get(f"{service.url}/pages/style.css", timeout=30).ok
        [version] = re.findall('^version = "(.+)"$', (HERE / "pyproject.toml").read_text(), re.MULTILINE)
        assert service.command("--version") == f"authsvc {version}\n"
        assert service.command("--help").startswith("usage: authsvc [")
        assert "guillaume@holberton.io" in service.command("user", "list")
    finally:
        assert service.end() == 0
    assert json.loads(service.log.splitlines()[0])["version"] == version


@pytest.mark.slow  # builds the package
@pytest.mark.process
def test_another_server_loads_the_installed_package(environment: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.append('.'); import authsvc_app, auth; print(authsvc_app.app.__module__, auth.__file__)"
    )
    (tmp_path / "auth.py").write_text("raise SystemExit('the module of an application')")
    done = subprocess.run(
        [environment / "bin/python", "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["authsvc", str(site_packages(environment) / "authsvc_app/auth.py")], done.stderr


# make


@pytest.mark.slow  # may install packages
@pytest.mark.process
def test_the_first_commands_of_the_readme_list_the_targets_and_serve(tmp_path: Path, tree: Path) -> None:
    commands = [line.removeprefix("$ ").split() for line in commands_in("README.md", "$ make ").splitlines()]
    alone, run = (command[: command.index("#")] for command in commands)

    class Made(Service):
        program = (*run, "-s", "-C", str(tree))

    listed = subprocess.run(alone, cwd=tree, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "make run" in listed
    with environment_lock():
        service = Made(tmp_path)
    try:
        use(service)
    finally:
        service.end()


def make_environment(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Let make create its environment in a folder, as a user whom permissions bind."""
    return subprocess.run(
        [*BOUND, "make", "-s", "-f", HERE / "Makefile", f"PYTHON={sys.executable}", ".venv/bin/python"],
        cwd=folder,
        env=clean_environ() | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.process
def test_make_says_why_it_cannot_create_its_environment(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    done = make_environment(tmp_path / "closed")
    assert done.returncode == 2
    assert f"Permission denied: '{tmp_path}/closed/.venv'\n" in done.stderr
    assert "python3-venv" not in done.stderr


@pytest.mark.process
def test_make_deletes_no_environment_that_it_did_not_create(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").touch()  # a file, where venv needs a folder
    done = make_environment(tmp_path)
    assert done.returncode == 2
    assert f"Unable to create directory '{tmp_path}/.venv/bin'\n" in done.stderr
    assert "the folder .venv cannot be used: delete it if nobody needs it\n" in done.stderr
    assert (tmp_path / ".venv/bin").is_file()


@pytest.mark.slow
@pytest.mark.process
def test_make_installs_into_its_environment_despite_pip_user(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_USER", "1")
    (tree / "requirements/run.txt").touch()
    build(tree, target=".venv/run")
