"""A site for the tests: nginx or Caddy with the files of deploy/, the service, and two applications, over TLS."""

from __future__ import annotations

import contextlib
import functools
import getpass
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
import trustme

from tests.conftest import HERE, Service
from tests.production import FastService

AUTH, APP, WIKI = "auth.example.com", "app.example.com", "wiki.example.com"
PROXIES = {"nginx": "nginx.conf", "caddy": "Caddyfile", "caddy 2.6": "Caddyfile.debian12"}  # kind: its file in deploy/
PROTOCOLS = "http/1.1", "h2"
# The second application, which is commented out in the files of deploy/.
SECOND = re.compile(r"^( *)# (wiki\.example\.com \S.*|server_name wiki.*|\timport .*|})$", re.MULTILINE)
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
PASSWORD = "correct horse battery"
START_TIMEOUT = 30.0  # seconds; only a machine with too much to do needs more than one

_reserved: list[socket.socket] = []  # kept open until the process ends, because a closed port is given to others


def program(name: str, package: str) -> str:
    """Return the path of a program, or skip the test."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if not path:
        pytest.skip(f"{name} is missing: apt-get install {package}")
    return path


def proxy_program(kind: str) -> str:
    """Return the path of a proxy, or skip the test. "caddy" is the newest one, from PyPI, "caddy 2.6" is Debian's."""
    if kind == "nginx":
        return program("nginx", "nginx-light")
    folder = f"{sys.prefix}/bin" if kind == "caddy" else "/usr/bin"  # PATH may have both
    path = shutil.which("caddy", path=folder)
    if not path:
        pytest.skip(f"{kind} is missing: {'make .venv/proxies' if kind == 'caddy' else 'apt-get install caddy'}")
    return path


def accepts(port: int) -> bool:
    """Return whether a program accepts connections on a port of 127.0.0.1."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def reserve_port() -> int:
    """Reserve a port of 127.0.0.1 for a program that must be told its port, and return it.

    A socket stays bound to the port but does not listen. Linux then gives the port neither to port 0 nor to an outgoing
    connection, and refuses connections to it. A program that asks for exactly this port, with SO_REUSEADDR as servers
    do, may listen on it.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _reserved.append(holder)
    return int(holder.getsockname()[1])


class Application(ThreadingHTTPServer):
    """A protected application. It answers with the request it got, and counts requests; a WebSocket echoes.

    A header ``Location`` of the request also becomes one of the response.
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.request_count = 0
        super().__init__(("127.0.0.1", 0), _Echo)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Application
    # Headers and body leave in one packet. As two, the second one waits 40 ms for the delayed ACK of the first.
    wbufsize = -1

    def do_GET(self) -> None:
        self.server.request_count += 1
        if self.headers.get("Upgrade") == "websocket":
            self.close_connection = True
            self.connection.sendall(SWITCHED)
            while chunk := self.connection.recv(4096):
                self.connection.sendall(chunk)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers: dict[str, list[str]] = {}
        for name, value in self.headers.items():
            headers.setdefault(name.lower(), []).append(value)
        seen = {"path": self.path, "method": self.command, "headers": headers, "body": body.decode("latin-1")}
        content = json.dumps(seen).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if "Location" in self.headers:
            self.send_header("Location", self.headers["Location"])
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET  # noqa: N815

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a proxy that does not wait for the answer
            super().handle()

    def log_message(self, *args: Any) -> None:
        pass


@dataclass
class Reply:
    """The response of a proxy."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@functools.cache
def authority() -> trustme.CA:
    """Who has issued the certificate of all sites of this process."""
    return trustme.CA()


@functools.cache
def certificate() -> trustme.LeafCert:
    """The certificate of all sites of this process."""
    return authority().issue_cert(AUTH, APP, WIKI)


class Site:
    """A proxy, the service behind it, and two applications beside the service. Close it at the end.

    Args:
        kind: one of PROXIES.
        folder: an empty folder for the configuration, the certificates and the database.
        settings: settings of the service, by their names in the environment.
        start: starts the service with its settings; by default from this repository.
        configuration: the folder that has the configuration of the proxy, under its name in deploy/.
        application_port: the port of another application, on 127.0.0.1, instead of an ``Application``.
    """

    process: subprocess.Popen[bytes] | None = None
    service: Service | None = None

    def __init__(
        self,
        kind: str,
        folder: Path,
        settings: Mapping[str, str] = {},
        *,
        start: Callable[..., Service] | None = None,
        configuration: Path = HERE / "deploy",
        application_port: int = 0,
    ) -> None:
        self.kind, self.folder, self.configuration = kind, folder, configuration
        self.program = proxy_program(kind)
        self.port = reserve_port()
        self.application = Application()
        self.wiki_application = Application()
        self.application_port = application_port or self.application.server_port
        try:
            self._issue_certificate()
            self.service = (start or functools.partial(FastService, folder))(
                **{
                    "AUTHSVC_PUBLIC_URL": self.auth,
                    "AUTHSVC_COOKIE_DOMAIN": "example.com",
                    "AUTHSVC_TRUSTED_PROXY": "127.0.0.1",
                    **({"AUTHSVC_BCRYPT_COST": "10"} if start else {}),  # the lowest in production
                    **settings,
                }
            )
            self._start_proxy()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait(timeout=20)
        self.application.close()
        self.wiki_application.close()
        self.end_service()

    def end_service(self) -> None:
        if self.service:
            self.service.end()

    def command(self, *arguments: str) -> str:
        """Run one of the operator's commands and return its output."""
        assert self.service
        return self.service.command(*arguments)

    @property
    def auth(self) -> str:
        """The URL of the service."""
        return f"https://{AUTH}:{self.port}"

    @property
    def app(self) -> str:
        """The URL of the application."""
        return f"https://{APP}:{self.port}"

    @property
    def wiki(self) -> str:
        """The URL of the second application, which is only for the group ``wiki``."""
        return f"https://{WIKI}:{self.port}"

    def connect(self, host: str, source: str = "127.0.0.1", *, protocol: str = "http/1.1") -> ssl.SSLSocket:
        """Connect to the proxy from this address, and name this host and this protocol in the TLS handshake."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20, source_address=(source, 0))
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self.trust[protocol].wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise

    def request(
        self, method: str, url: str, form: Any = None, *, cookie: str = "", headers: Mapping[str, str] = {}
    ) -> Reply:
        """Send a request as a browser opens a page, and do not follow a redirect. A form of bytes is sent unchanged."""
        address = urlsplit(url)
        assert address.scheme == "https", url
        assert address.port == self.port, url
        path = address._replace(scheme="", netloc="").geturl() or "/"
        body = form if isinstance(form, bytes | None) else urlencode(form)
        content_type = {"Content-Type": "application/x-www-form-urlencoded"} if isinstance(form, dict) else {}
        cookies = {"Cookie": cookie} if cookie else {}
        assert address.hostname
        with contextlib.closing(http.client.HTTPConnection(address.hostname, self.port)) as connection:
            connection.sock = self.connect(address.hostname)
            connection.request(method, path, body, {"Accept": "text/html", **content_type, **cookies, **headers})
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())

    def create_account(self, email: str = "bob@example.com") -> None:
        reply = self.request("POST", f"{self.auth}/users", {"email": email, "password": PASSWORD})
        assert reply.status == 200, reply.body

    def sign_in(self, email: str = "bob@example.com") -> str:
        """Sign in and return the cookie as a browser sends it."""
        reply = self.request("POST", f"{self.auth}/sessions", {"email": email, "password": PASSWORD})
        assert reply.status == 200, reply.body
        return str(reply.headers["Set-Cookie"]).partition(";")[0]

    def _issue_certificate(self) -> None:
        authority().cert_pem.write_to_path(str(self.folder / "authority.pem"))
        certificate().private_key_pem.write_to_path(str(self.folder / "key.pem"))
        certificate().cert_chain_pems[0].write_to_path(str(self.folder / "certificate.pem"))
        self.trust = {name: ssl.create_default_context(cafile=self.folder / "authority.pem") for name in PROTOCOLS}
        for name, context in self.trust.items():
            context.set_alpn_protocols([name])

    def _start_proxy(self) -> None:
        assert self.service
        text = (self.configuration / PROXIES[self.kind]).read_text().replace("{$DOMAIN:example.com}", "example.com")
        text = SECOND.sub(r"\1\2", text)
        text = self._nginx(text) if self.kind == "nginx" else self._caddy(text)
        # Whole numbers only: the port of the proxy may begin with the same digits.
        text = re.sub(r"127\.0\.0\.1:5000\b", "{}:{}".format(*self.service.address), text)
        text = re.sub(r"127\.0\.0\.1:8000\b", f"127.0.0.1:{self.application_port}", text)
        text = re.sub(r"127\.0\.0\.1:8001\b", f"127.0.0.1:{self.wiki_application.server_port}", text)
        (self.folder / "proxy.conf").write_text(text)
        command = [self.program, "run", "--adapter", "caddyfile", "--config", "proxy.conf"]
        if self.kind == "nginx":
            command = [self.program, "-p", str(self.folder), "-c", "nginx.conf", "-e", "stderr"]
        homes = {"HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)}
        with (self.folder / "proxy.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stderr=log, stdout=log, env={**os.environ, **homes}
            )
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), self.connect(AUTH):
                return
            time.sleep(0.02)
        raise AssertionError((self.folder / "proxy.log").read_text())

    def _nginx(self, text: str) -> str:
        text = re.sub(r" *listen \[::\].*\n", "", text)
        text = text.replace("listen 80;", f"listen 127.0.0.1:{reserve_port()};")
        text = text.replace("listen 443 ", f"listen 127.0.0.1:{self.port} ")
        text = text.replace("return=https://$host$request_uri", f"return=https://$host:{self.port}$request_uri")
        text = text.replace(f"return 302 https://{AUTH}/", f"return 302 {self.auth}/")
        text = re.sub("/etc/letsencrypt/.*/fullchain.pem", "certificate.pem", text)
        text = re.sub("/etc/letsencrypt/.*/privkey.pem", "key.pem", text)
        paths = "".join(f"{name}_temp_path temp;" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"{user} daemon off; pid nginx.pid; worker_processes 1;\n"
            "events { worker_connections 768; }\n"  # as in Debian
            f"http {{ access_log off; {paths} include proxy.conf; }}\n"
        )
        return text

    def _caddy(self, text: str) -> str:
        for host in (AUTH, APP, WIKI):
            text = text.replace(f"\n{host} {{", f"\nhttps://{host}:{self.port} {{\n\ttls certificate.pem key.pem\n")
        options = "\tadmin off\n\tauto_https disable_redirects\n\tdefault_bind 127.0.0.1\n"
        return text.replace("\n{\n", f"\n{{\n{options}", 1)
