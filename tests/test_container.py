"""The container: deploy/Containerfile is built and started, and deploy/compose.yaml is started as it is written.

tests/engine.py stands for the engine.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import ipaddress
import json
import os
import re
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

import pytest
import yaml

from settings import Settings
from tests.cases import each
from tests.conftest import HERE
from tests.crowd import awaited
from tests.documents import commands_in
from tests.engine import CONTAINERFILE, Container, Image, build_image, connect_networks, inside_network, missing
from tests.production import log_lines
from tests.proxies import PASSWORD, Reply, proxy_program
from tests.test_deploy import product_files

STATE, PROGRAM = "/var/lib/authsvc", "/opt/authsvc/authsvc.pyz"
MAX_IMAGE = 90_000_000  # bytes of the compressed layers above Debian's
STRANGER = "1234567"  # a user without a name
DEVELOPMENT = {"AUTHSVC_UNSAFE_LISTEN": "1", "AUTHSVC_BCRYPT_COST": "4", "AUTHSVC_THROTTLE": "off"}
PRODUCTION = {"AUTHSVC_PUBLIC_URL": "https://auth.example.com", "AUTHSVC_TRUSTED_PROXY": "192.0.2.1"}
FORM = {"email": "bob@example.com", "password": "b4l0u"}

COMPOSE = (HERE / "deploy/compose.yaml").read_text()
# The lines about mail, PostgreSQL and secrets, which are commented out.
ENABLED = re.sub(r"^( *)# (?=AUTHSVC_|secrets:|  - |  [a-z-]+: \{file)", r"\1", COMPOSE, flags=re.MULTILINE)


def read_compose(text: str = COMPOSE, domain: str = "example.com") -> Any:
    return yaml.safe_load(re.sub(r"\$\{DOMAIN[^}]*\}", domain, text))


# The image


@pytest.fixture(scope="module")
def image() -> Image:
    if reason := missing():
        pytest.skip(reason)
    return build_image()


@pytest.fixture
def volume(image: Image, tmp_path: Path) -> Path:
    """A new volume for the database. As with Docker, it has the owner and the mode of the folder in the image."""
    folder, found = tmp_path / "volume", (image.files / STATE.lstrip("/")).stat()
    folder.mkdir()
    os.chown(folder, found.st_uid, found.st_gid)
    folder.chmod(found.st_mode & 0o7777)
    return folder


Start = Callable[..., Container]


@pytest.fixture
def start(image: Image, volume: Path, tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts the image with these settings and arguments; it is ended after the test."""
    started: list[Container] = []

    def start_one(*arguments: str, user: str = "", mounts: Mapping[str, str] = {}, **environ: str) -> Container:
        container = Container(
            image,
            tmp_path / f"container-{len(started)}",
            [*image.config["Entrypoint"], *arguments],
            image.environ | environ,
            user or image.config["User"],
            image.config["WorkingDir"],
            {STATE: str(volume), **mounts},
        )
        started.append(container)
        return container

    yield start_one
    for container in started:
        container.close()


def emails_in(volume: Path) -> set[str]:
    with closing(sqlite3.connect(volume / "authsvc.db")) as db:
        return {email for (email,) in db.execute("SELECT email FROM users")}


def is_healthy(container: Container) -> bool:
    [kind, *command] = container.image.config["Healthcheck"]["Test"]
    assert kind == "CMD"  # and no shell
    done = container.execute(*command)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
def test_the_image_is_small(image: Image) -> None:
    base, *added = image.layers
    assert base > sum(added) > 10_000_000
    assert sum(added) <= MAX_IMAGE


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
def test_the_image_has_the_service_with_all_extras_and_nothing_else_of_the_checkout(image: Image) -> None:
    names = set(zipfile.ZipFile(image.files / PROGRAM.lstrip("/")).namelist())
    packages = {
        f"{name}/__init__.py"
        for name in ("bcrypt", "waitress", "segno", "prometheus_client", "psycopg", "fido2", "cryptography")
    }
    assert {f"site-packages/{name}" for name in product_files() | packages} <= names
    assert sorted(path.name for path in (image.files / "opt").iterdir()) == ["authsvc"]
    assert sorted(path.name for path in (image.files / "opt/authsvc").iterdir()) == [
        *("authsvc.pyz", "health.py", "unpacked")
    ]
    assert not (image.files / "build").exists()
    assert not list((image.files / "usr/bin").glob("make"))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
def test_the_configuration_of_the_image_uses_no_shell_and_no_root(image: Image) -> None:
    config = image.config
    assert config["Entrypoint"] == ["/usr/local/bin/authsvc"]
    assert not config.get("Cmd")
    assert config["Volumes"].keys() == {STATE}
    assert config["ExposedPorts"].keys() == {"5000/tcp"}
    assert int(config["User"]) > 0  # a number, by which Kubernetes tells that it is not root


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
@pytest.mark.parametrize("user", ["", STRANGER], ids=["the user of the image", "a user without a name"])
def test_the_image_serves_with_a_read_only_root_without_a_shell(start: Start, volume: Path, user: str) -> None:
    container = start(user=user, **DEVELOPMENT)
    container.wait_for_health()
    assert container.request("POST", "/users", urlencode(FORM))[0] == 200
    assert container.request("POST", "/sessions", urlencode(FORM))[0] == 200
    # Passkeys are there. A development service offers them to localhost.
    assert container.request("POST", "/sessions/passkey/options", headers={"Host": "localhost:5000"})[0] == 200
    listed = container.execute("authsvc", "user", "list")
    assert (listed.returncode, listed.stdout.split()[-1]) == (0, FORM["email"]), listed.stderr
    assert container.execute("authsvc", "backup", "monday.db").returncode == 0  # relative to the folder of the volume
    for name in ("authsvc.db", "monday.db"):
        found = (volume / name).stat()
        assert (found.st_uid, found.st_mode & 0o777) == (int(user or container.image.config["User"]), 0o600)
    # What the engine is expected to enforce, it does enforce here.
    write = (
        "import errno, sys\ntry: open(sys.argv[1], 'w')\nexcept OSError as error: print(errno.errorcode[error.errno])"
    )
    for path in ("/new", "/opt/authsvc/new", "/opt/authsvc/unpacked/new", "/usr/bin/new"):
        assert container.execute("/usr/bin/python3", "-c", write, path).stdout == "EROFS\n", path
    for shell in ("sh", "bash"):
        assert (
            container.execute("/usr/bin/python3", "-c", f"import os; os.execvp('{shell}', ['{shell}'])").returncode == 1
        )
    status = container.execute("/usr/bin/python3", "-c", "print(open('/proc/1/status').read())").stdout
    assert re.findall(r"^(?:CapEff|CapBnd):\t0+$", status, re.MULTILINE) == [
        "CapEff:\t" + "0" * 16,
        "CapBnd:\t" + "0" * 16,
    ]
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert container.end() == 0
    container = start("restore", "monday.db", user=user, **DEVELOPMENT)
    assert container.wait() == 0
    assert "restored authsvc.db; " in container.log.replace(f"{STATE}/", "")
    assert emails_in(volume) == {FORM["email"]}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
def test_without_settings_the_container_does_not_start(start: Start, volume: Path) -> None:
    container = start()
    assert container.wait() == 2
    assert "AUTHSVC_LISTEN=0.0.0.0:5000 is reachable from other machines" in container.log
    assert "set AUTHSVC_PUBLIC_URL for production" in container.log
    assert list(volume.iterdir()) == []


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
def test_a_container_is_healthy_while_the_database_answers(start: Start, volume: Path) -> None:
    container = start(**PRODUCTION)
    container.wait_for_health()
    assert is_healthy(container)
    database = volume / "authsvc.db"
    database.rename(volume / "moved.db")
    assert awaited(lambda: not is_healthy(container))
    database.touch(0o600)
    assert not is_healthy(container)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
def test_a_container_whose_service_does_not_answer_is_not_healthy(image: Image, tmp_path: Path) -> None:
    container = Container(image, tmp_path / "container", ["/usr/bin/sleep", "60"], image.environ, image.config["User"])
    try:
        assert not is_healthy(container)
    finally:
        container.close()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
@pytest.mark.faults
def test_sigterm_ends_the_container_without_a_lost_write(start: Start, volume: Path) -> None:
    container = start(**DEVELOPMENT)
    container.wait_for_health()
    answered: list[str] = []

    def register(number: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
            for count in range(100_000):
                email = f"user{number}-{count}@example.com"
                status, _ = container.request("POST", "/users", urlencode({**FORM, "email": email}))
                if status != 200:
                    return
                answered.append(email)

    threads = [threading.Thread(target=register, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    assert awaited(lambda: len(answered) > 100)
    began = time.monotonic()
    assert container.end() == 0, container.log
    assert time.monotonic() - began < 10  # after this time Docker kills a container
    for thread in threads:
        thread.join()
    assert set(answered) <= emails_in(volume)
    assert log_lines(container.log.partition("\n")[2])[-1]["event"] == "sys_shutdown"


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
def test_passwords_are_read_from_files(start: Start, tmp_path: Path) -> None:
    enabled = read_compose(ENABLED)
    settings = enabled["services"]["authsvc"]["environment"]
    paths = [settings["AUTHSVC_SMTP_PASSWORD_FILE"], settings["AUTHSVC_DATABASE_PASSWORD_FILE"]]
    secrets = {path: tmp_path / os.path.basename(path) for path in paths}
    for file in secrets.values():
        file.write_text("secret\n")
        file.chmod(0o400)
    mounts = {path: str(file) for path, file in secrets.items()}
    # No server answers in the network of this container. The password is read before the service connects to one.
    settings = {**settings, "AUTHSVC_DATABASE": "postgresql://authsvc@127.0.0.1:1/authsvc?sslmode=verify-full"}
    container = start(mounts=mounts, **settings)
    assert container.wait() == 2
    assert "AUTHSVC_DATABASE_PASSWORD_FILE cannot be read: Permission denied" in container.log
    for file in secrets.values():
        os.chown(file, int(container.image.config["User"]), 0)
    container = start(mounts=mounts, **settings)
    assert container.wait() == 2
    assert "cannot open the database authsvc on 127.0.0.1:1: " in container.log
    mail = {name: value for name, value in settings.items() if not name.startswith("AUTHSVC_DATABASE")}
    container = start(mounts=mounts, **mail)
    container.wait_for_health()
    assert container.end() == 0
    del mounts[settings["AUTHSVC_SMTP_PASSWORD_FILE"]]
    container = start(mounts=mounts, **mail)
    assert container.wait() == 2
    assert "AUTHSVC_SMTP_PASSWORD_FILE cannot be read: No such file or directory" in container.log


# compose.yaml


SERVICES = "authsvc", "caddy", "application"


def test_compose_starts_these_containers() -> None:
    assert tuple(read_compose()["services"]) == SERVICES


@each("name", SERVICES)
def test_each_container_of_compose_has_few_rights(name: str) -> None:
    service = read_compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "caddy" else [])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert bool(service.get("ports")) == (name == "caddy")
    assert not {"privileged", "network_mode", "pid", "userns_mode", "devices"} & service.keys()


def test_the_service_trusts_the_network_in_which_only_caddy_and_it_are() -> None:
    compose = read_compose()
    [network] = compose["services"]["authsvc"]["networks"]
    assert [name for name in SERVICES if network in compose["services"][name]["networks"]] == ["authsvc", "caddy"]
    [pool] = compose["networks"][network]["ipam"]["config"]
    settings = Settings.from_environ(compose["services"]["authsvc"]["environment"])
    assert settings.trusted_proxy == pool["subnet"]
    assert list(settings.warnings()) == [
        "AUTHSVC_SMTP_URL is not set: no reset link is mailed, and no email is confirmed"
    ]
    assert set(compose["networks"]) == {
        name for service in compose["services"].values() for name in service["networks"]
    }


def test_the_lines_about_mail_and_secrets_are_settings() -> None:
    compose = read_compose(ENABLED)
    service = compose["services"]["authsvc"]
    assert sorted(service["secrets"]) == sorted(compose["secrets"])
    named = {value for name, value in service["environment"].items() if name.endswith("_PASSWORD_FILE")}
    assert named == {f"/run/secrets/{name}" for name in compose["secrets"]}
    assert set(re.findall("AUTHSVC_[A-Z_]+", COMPOSE)) == service["environment"].keys()
    files = {
        name: value for name, value in service["environment"].items() if name not in ("AUTHSVC_DATABASE_PASSWORD_FILE",)
    }
    assert Settings.from_environ(files).smtp_server


def test_compose_checks_the_health_as_the_image_does() -> None:
    [line] = re.findall(r"^HEALTHCHECK (.*\\\n.*)$", CONTAINERFILE.read_text(), re.MULTILINE)
    options, command = line.split("CMD ")
    check = read_compose()["services"]["authsvc"]["healthcheck"]
    assert check.pop("test") == ["CMD", *json.loads(command)]
    assert {name.replace("-", "_"): value for name, value in re.findall(r"--([a-z-]+)=(\w+)", options)} == {
        name: str(value) for name, value in check.items()
    }


def test_the_engine_waits_until_the_service_has_ended() -> None:
    service = (HERE / "deploy/authsvc.service").read_text()
    assert f"TimeoutStopSec={read_compose()['services']['authsvc']['stop_grace_period'].removesuffix('s')}\n" in service


class Composed:
    """A machine on which the commands of deploy/README.md with Docker are typed, and a visitor in its network."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.containers: dict[str, Container] = {}
        self.visitor = subprocess.Popen(["unshare", "--net", "sleep", "600"])
        network = f"/proc/{self.visitor.pid}/ns/net"
        assert awaited(lambda: os.readlink(network) != os.readlink("/proc/self/ns/net"))

    def close(self) -> None:
        for container in self.containers.values():
            container.close()
        self.visitor.kill()
        self.visitor.wait()

    def type(self, command: str) -> str:
        """Run a command as far as it can run here; return its output."""
        match command.replace("YOUR.DOMAIN", "example.com").split():
            case ["cd", "deploy"]:
                return ""
            case ["echo", line, ">", file]:
                (self.folder / file).write_text(f"{line}\n")
                return ""
            case ["docker", "compose", "up", "--detach", "--build"]:
                self._up()
                return ""
            case ["docker", "compose", "exec", name, *arguments]:
                done = self.containers[name].execute(*arguments)
                assert done.returncode == 0, done.stderr
                return done.stdout
        raise AssertionError(command)

    def _up(self) -> None:
        self.compose = read_compose(domain=(self.folder / ".env").read_text().strip().removeprefix("DOMAIN="))
        for name, service in self.compose["services"].items():
            self.containers[name] = self._create(name, service)
        self._connect()
        for name, service in self.compose["services"].items():
            for needed, condition in service.get("depends_on", {}).items():
                assert condition == {"condition": "service_healthy"}
                _, *check = self.compose["services"][needed]["healthcheck"]["test"]
                assert awaited(lambda: not self.containers[needed].execute(*check).returncode, 20)  # noqa: B023
            self.containers[name].release()
        assert awaited(lambda: self.accepts(443), 20), self.containers["caddy"].log
        assert awaited(lambda: (self.folder / "caddy/certificates/caddy/certificates").exists(), 20)

    def _create(self, name: str, service: dict[str, Any]) -> Container:
        folder = self.folder / name
        folder.mkdir()
        (folder / "hosts").write_text("127.0.0.1 localhost\n")
        mounts = {"/etc/hosts": str(folder / "hosts")}
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            mounts[target] = str((HERE / "deploy" / source).resolve())
            if source in self.compose["volumes"]:
                (folder / source).mkdir()
                mounts[target] = str(folder / source)
        config, command, user = self.image.config, service.get("command", []), service.get("user", "")
        environ = self.image.environ
        if name == "authsvc":
            command, user = config["Entrypoint"], config["User"]
            os.chown(mounts[STATE], int(user), 0)
        elif name == "caddy":  # as its own image does
            command = ["caddy", "run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]
            environ = {**environ, "XDG_CONFIG_HOME": "/config", "XDG_DATA_HOME": "/data"}
            mounts["/usr/bin/caddy"] = proxy_program("caddy")
            # These names are not on the internet, so Caddy issues the certificates itself.
            text = Path(mounts["/etc/caddy/Caddyfile"]).read_text()
            text = text.replace("\n{\n", "\n{\n\tlocal_certs\n\tskip_install_trust\n", 1)
            mounts["/etc/caddy/Caddyfile"] = str(folder / "Caddyfile")
            (folder / "Caddyfile").write_text(text)
        return Container(
            self.image,
            folder / "container",
            command,
            environ | service["environment"],
            user,
            config["WorkingDir"],
            mounts,
            temporary=service.get("tmpfs", []),
            kept=service.get("cap_add", []),
            waits=True,
        )

    def _connect(self) -> None:
        """Connect the two members of each network, and tell each the name of the other one, as Docker does."""
        for number, (name, network) in enumerate(self.compose["networks"].items()):
            pool = network.get("ipam", {"config": [{"subnet": f"10.99.{number}.0/24"}]})["config"][0]
            subnet = ipaddress.ip_network(pool["subnet"])
            pids = {
                one: container.pid
                for one, container in self.containers.items()
                if name in self.compose["services"][one]["networks"]
            }
            if len(pids) == 1:
                pids["visitor"] = self.visitor.pid
            addresses = dict(zip(pids, map(str, list(subnet.hosts())[1:])))  # the first one is that of the machine
            first, second = ((pids[one], f"{addresses[one]}/{subnet.prefixlen}") for one in pids)
            connect_networks(first, second, name)
            for one in self.containers.keys() & pids:
                with (self.folder / one / "hosts").open("a") as file:
                    file.writelines(f"{address} {other}\n" for other, address in addresses.items())
            if "visitor" in pids:
                self.addresses = addresses

    def accepts(self, port: int) -> bool:
        with inside_network(self.visitor.pid), socket.socket() as probe:
            return probe.connect_ex((self.addresses["caddy"], port)) == 0

    def request(
        self, method: str, url: str, form: dict[str, str] | None = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        """Send a request to Caddy as the browser of the visitor does, and do not follow a redirect."""
        scheme, _, host, path = url.split("/", 3)
        with inside_network(self.visitor.pid):
            plain = socket.create_connection((self.addresses["caddy"], 443 if scheme == "https:" else 80), timeout=20)
        with closing(http.client.HTTPConnection(host, timeout=20)) as connection:
            connection.sock = plain
            if scheme == "https:":
                authority = self.folder / "caddy/certificates/caddy/pki/authorities/local/root.crt"
                trust = ssl.create_default_context(cafile=str(authority))
                connection.sock = trust.wrap_socket(plain, server_hostname=host)
            content_type = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
            body = urlencode(form) if form else None
            connection.request(method, f"/{path}", body, {"Accept": "text/html", **content_type, **headers})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.container
@pytest.mark.proxies
def test_the_commands_of_the_readme_protect_an_application_for_a_group(image: Image, tmp_path: Path) -> None:
    proxy_program("caddy")
    *commands, last = commands_in("deploy/README.md", "$ cd deploy").replace("$ ", "").splitlines()
    auth, app, user = "https://auth.example.com", "https://app.example.com", "you@example.com"
    with closing(Composed(image, tmp_path)) as machine:
        *_, link = [machine.type(command) for command in commands]
        assert link.startswith(f"{auth}/reset#")
        token = parse_qs(link.strip().partition("#")[2])["token"][0]
        reply = machine.request("GET", "http://app.example.com/")
        assert (reply.status, reply.headers["Location"]) == (308, f"{app}/")
        form = {"email": user, "reset_token": token, "new_password": PASSWORD}
        assert machine.request("PUT", f"{auth}/reset_password", form).status == 200

        reply = machine.request("GET", f"{app}/page", headers={"Remote-User": user})
        assert reply.status == 302
        assert unquote(reply.headers["Location"]) == f"{auth}/login?return={app}/page"
        forged = {"X-Forwarded-For": "203.0.113.9"}
        reply = machine.request("POST", f"{auth}/sessions", {"email": user, "password": PASSWORD}, forged)
        assert reply.status == 200, reply.body
        signed_in = {"Cookie": reply.headers["Set-Cookie"].partition(";")[0], "Remote-Groups": "staff"}
        assert machine.request("GET", f"{app}/", headers=signed_in).status == 403

        machine.type(last)
        reply = machine.request("GET", f"{app}/", headers={**signed_in, "Remote-User": "eve@example.com"})
        assert (reply.status, f"<p>Hello {user}. Your groups: staff.</p>" in reply.body.decode()) == (200, True)
        assert f'href="{auth}/account"' in reply.body.decode()

        # The service sees the address of the visitor, because it trusts that of Caddy.
        lines = log_lines(machine.containers["authsvc"].log.partition("\n")[2])
        [login] = [line for line in lines if line["event"] == "authn_login_success"]
        assert login["address"] == machine.addresses["visitor"]
        # The application cannot reach the service, which would trust its headers.
        [address] = re.findall(r"^(\S+) authsvc$", (tmp_path / "caddy/hosts").read_text(), re.MULTILINE)
        reach = f"import socket; print(socket.socket().connect_ex(('{address}', 5000)))"
        assert machine.containers["caddy"].execute("python3", "-c", reach).stdout == "0\n"
        assert machine.containers["application"].execute("python3", "-c", reach).stdout == f"{errno.ENETUNREACH}\n"
        assert machine.containers["authsvc"].end() == 0
