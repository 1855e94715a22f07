"""A service with production settings, and the requests that the tests send to it."""

from __future__ import annotations

import itertools
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from auth import Auth
from authsvc import create_app
from settings import Settings
from storage import DB
from tests.conftest import COST, HERE, Answer, Client, Service

PUBLIC_URL = "https://auth.example.com"
PROXY = "127.0.0.1"
CLIENT = "192.0.2.1"
OTHER_ORIGIN = "https://evil.example"
BOB, PASSWORD = "bob@x.io", "tarte flambée du dimanche"
FORM = {"email": BOB, "password": PASSWORD}

_clients = itertools.count(1)


class FastSettings(Settings):
    """Settings that are checked like any others, except that production may use a low hash cost."""

    def _require(self, fulfilled: object, name: str, requirement: str) -> None:
        if name != "bcrypt_cost":
            super()._require(fulfilled, name, requirement)


class FastService(Service):
    """A real process with such settings."""

    program = (
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(HERE)!r}); import authsvc; from settings import Settings as S; "
        "check = S._require; S._require = lambda self, fulfilled, name, requirement: "
        "name == 'bcrypt_cost' or check(self, fulfilled, name, requirement); sys.exit(authsvc.main())",
    )


def production_settings(database: str = "unused", **changes: Any) -> Settings:
    """Settings of a production service, with a hash that takes 1 ms."""
    return FastSettings(database=database, public_url=PUBLIC_URL, bcrypt_cost=COST, **changes)


@contextmanager
def shared_site(folder: Path) -> Iterator[Client]:
    """An application behind a trusted proxy, with an account of Bob's, for tests that leave that account as it is."""
    settings = production_settings(str(folder / "authsvc.db"), trusted_proxy=PROXY)
    with closing(DB(settings.database)) as db:
        call = Client(create_app(settings, Auth(db, settings)))
        assert ask(call, "POST", "/users", FORM).status == 200
        yield call


@contextmanager
def proxied_service(folder: Path, **environ: str) -> Iterator[Service]:
    """A production process that trusts this machine as its proxy. Each test uses a client address of its own."""
    service = FastService(folder, AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY=PROXY, **environ)
    try:
        yield service
    finally:
        service.end()


def new_client() -> str:
    """An address that no request came from before, so that no rate limit applies."""
    number = next(_clients)
    return f"10.0.{number // 250}.{number % 250}"


def ask(call: Client, method: str, path: str, form: Any = None, **environ: Any) -> Answer:
    """Send a request from a new address, unless ``environ`` names one."""
    return call(method, path, form, **{"REMOTE_ADDR": new_client(), **environ})


def log_lines(text: str) -> list[dict[str, Any]]:
    """The lines of a log."""
    return [json.loads(line) for line in text.splitlines()]


def post_request(path: str, form: dict[str, str], *headers: str) -> bytes:
    """A POST request as it goes over the wire."""
    body = urlencode(form)
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/x-www-form-urlencoded", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "Connection: close", "", body]).encode()


def send(address: tuple[str, int], request: bytes) -> bytes:
    """Send these bytes; return everything that arrives until the connection is closed."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65_536), b""))
