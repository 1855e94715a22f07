"""The real thing around the service: nginx or Caddy with the files of deploy/, an application that they guard, TLS."""

from __future__ import annotations

import contextlib
import getpass
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import trustme

from tests.conftest import HERE, Service

AUTH, APP = "auth.example.com", "app.example.com"
PROXIES = {"nginx": "nginx-light", "caddy": "caddy"}  # program: Debian's package
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
PASSWORD = "correct horse battery"


def program(name: str, package: str) -> str:
    """Return where a program is, or skip the test."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if not path:
        pytest.skip(f"{name} is missing: apt-get install {package}")
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Application(ThreadingHTTPServer):
    """What is guarded: it says what it was asked, and counts; asked for a websocket, it sends back what comes."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked = 0
        super().__init__(("127.0.0.1", 0), _Echo)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Application

    def do_GET(self) -> None:
        self.server.asked += 1
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
        said = {"path": self.path, "method": self.command, "headers": headers, "body": body.decode("latin-1")}
        content = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


@dataclass
class Reply:
    """What a proxy said."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """One proxy, the service behind it and the application beside it, all on this machine and over TLS."""

    deploy = HERE / "deploy"
    guarded = 0  # the port of what is guarded in place of the Application

    def __init__(self, kind: str, folder: Path, start: Callable[..., Service], **environ: str) -> None:
        self.kind, self.folder = kind, folder
        self.program = program(kind, PROXIES[kind])
        self.port = free_port()
        self.application = Application()
        self.service = start(
            **{
                "AUTHSVC_PUBLIC_URL": f"https://{AUTH}:{self.port}",
                "AUTHSVC_COOKIE_DOMAIN": "example.com",
                "AUTHSVC_TRUSTED_PROXY": "127.0.0.1",
                "AUTHSVC_BCRYPT_COST": "10",
                **environ,
            }
        )
        authority = trustme.CA()
        certificate = authority.issue_cert(AUTH, APP)
        authority.cert_pem.write_to_path(str(folder / "authority.pem"))
        certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(folder / "certificate.pem"))
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)
        self._start_proxy()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self.application.close()

    @property
    def auth(self) -> str:
        return f"https://{AUTH}:{self.port}"

    @property
    def app(self) -> str:
        return f"https://{APP}:{self.port}"

    def connect(self, host: str) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        return self.trust.wrap_socket(plain, server_hostname=host)

    def ask(self, method: str, url: str, form: Any = None, *, cookie: str = "", **headers: str) -> Reply:
        """Ask the proxy as a browser would that sends these headers (a "_" of theirs stands for "-")."""
        return self.ask_exactly(
            method, url, form, cookie=cookie, **{k.replace("_", "-"): v for k, v in headers.items()}
        )

    def ask_exactly(self, method: str, url: str, form: Any = None, *, cookie: str = "", **headers: str) -> Reply:
        found = re.fullmatch(r"https://([^:/]+):\d+(/.*)?", url)
        assert found, url
        with contextlib.closing(http.client.HTTPConnection(found[1], self.port)) as connection:
            connection.sock = self.connect(found[1])
            body = form if isinstance(form, bytes | None) else urlencode(form)
            kind = {"Content-Type": "application/x-www-form-urlencoded"} if isinstance(form, dict) else {}
            connection.request(
                method, found[2] or "/", body, {**kind, **({"Cookie": cookie} if cookie else {}), **headers}
            )
            reply = connection.getresponse()
            return Reply(reply.status, reply.headers, reply.read())

    def register(self, email: str = "bob@example.com") -> None:
        reply = self.ask("POST", f"{self.auth}/users", {"email": email, "password": PASSWORD})
        assert reply.status == 200, reply.body

    def log_in(self, email: str = "bob@example.com") -> str:
        """Return the cookie as a browser sends it."""
        reply = self.ask("POST", f"{self.auth}/sessions", {"email": email, "password": PASSWORD})
        assert reply.status == 200, reply.body
        return str(reply.headers["Set-Cookie"]).partition(";")[0]

    def _start_proxy(self) -> None:
        text = getattr(self, f"_{self.kind}")()
        text = text.replace("127.0.0.1:5000", "{}:{}".format(*self.service.address))
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{self.guarded or self.application.server_port}")
        (self.folder / "proxy.conf").write_text(text)
        command = {
            "nginx": [self.program, "-p", str(self.folder), "-c", "nginx.conf", "-e", "stderr"],
            "caddy": [self.program, "run", "--adapter", "caddyfile", "--config", "proxy.conf"],
        }[self.kind]
        homes = {"HOME": str(self.folder), "XDG_DATA_HOME": str(self.folder), "XDG_CONFIG_HOME": str(self.folder)}
        with (self.folder / "proxy.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, stderr=log, stdout=log, env={**os.environ, **homes}
            )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), self.connect(AUTH):
                return
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError((self.folder / "proxy.log").read_text())

    def _nginx(self) -> str:
        text = (self.deploy / "nginx.conf").read_text()
        text = re.sub(r" *listen \[::\].*\n", "", text)
        text = text.replace("listen 80;", f"listen 127.0.0.1:{free_port()};")
        text = text.replace("listen 443 ", f"listen 127.0.0.1:{self.port} ")
        text = text.replace("return=https://$host$request_uri", f"return=https://$host:{self.port}$request_uri")
        text = text.replace(f"return 302 https://{AUTH}/", f"return 302 {self.auth}/")
        text = re.sub("/etc/letsencrypt/.*/fullchain.pem", "certificate.pem", text)
        text = re.sub("/etc/letsencrypt/.*/privkey.pem", "key.pem", text)
        paths = "".join(f"{kind}_temp_path temp;" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"{user} daemon off; pid nginx.pid; worker_processes 1; events {{}}\n"
            f"http {{ access_log off; {paths} include proxy.conf; }}\n"
        )
        return text

    def _caddy(self) -> str:
        text = (self.deploy / "Caddyfile").read_text()
        for host in (AUTH, APP):
            text = text.replace(f"\n{host} {{", f"\nhttps://{host}:{self.port} {{\n\ttls certificate.pem key.pem\n")
        return "{\n\tadmin off\n\tauto_https disable_redirects\n\tdefault_bind 127.0.0.1\n}\n" + text


@contextlib.contextmanager
def site(kind: str, folder: Path, start: Callable[..., Service], **environ: str) -> Iterator[Site]:
    """A running site; it is closed in the end."""
    one = Site(kind, folder, start, **environ)
    try:
        yield one
    finally:
        one.close()
