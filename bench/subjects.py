"""What is measured: this service, other services, and how each is installed, filled and started."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from auth import Auth
from bench.client import PASSWORD, Client, free_port, latencies, login, progress, storm, wrk
from settings import Settings

HERE = Path(__file__).resolve().parent
SESSIONS = 100_000  # at most; a smaller database has one for each user
COST = 12
AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Firefox/140.0"


@dataclass
class Subject:
    """A service to measure: how it is filled and started, and the requests that it gets."""

    name: str
    what: str
    start: list[str]
    check: str = "/"
    method: str = "GET"  # of the check
    fill: Callable[[Path, int], object] | None = None
    login: dict[str, Any] = field(default_factory=dict)
    credential: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)  # what a proxy asks: its path, and options of the start
    hash: str = ""
    packages: int = 0
    installed: float = 0.0  # MB


class Running:
    """A running subject, in a folder of its own."""

    def __init__(self, subject: Subject, folder: Path, port: int = 0) -> None:
        self.subject = subject
        self.port = port or free_port()
        self.command = [part.replace("{port}", str(self.port)) for part in subject.start]
        self.environ = {name: value.replace("{port}", str(self.port)) for name, value in subject.environ.items()}
        self.folder = folder
        self.cold = self._start()
        self.headers = self._log_in() if subject.login else {}

    def _start(self) -> float:
        environ = {**os.environ, **self.environ}
        # With it each start would compile our modules, but not those that pip has compiled.
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
        began = time.perf_counter()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=environ, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        while True:
            try:
                if Client(self.port).ask("GET", "/")[0] < 500:
                    return time.perf_counter() - began
            except OSError:
                if self.process.poll() is not None or time.perf_counter() - began > 60:
                    raise SystemExit((self.folder / "log").read_text()) from None
                time.sleep(0.002)

    def _log_in(self) -> dict[str, str]:
        status, headers, body = Client(self.port).ask("POST", *login(self.subject.login, 0))
        if status not in self.subject.login["ok"]:
            raise SystemExit(f"{self.subject.name}: no login: {status} {body[:200]!r}")
        if self.subject.credential == "cookie":
            pairs = [value.partition(";")[0] for name, value in headers if name == "set-cookie"]
            credential = {"Cookie": "; ".join(pairs)}
        else:
            token = json.loads(body)[self.subject.credential.partition(":")[2]]
            credential = {"Authorization": f"Bearer {token}"}
        status, _, body = Client(self.port).ask(self.subject.method, self.subject.check, credential)
        if status != 200 or b"user0@example.com" not in body:  # some services answer 200 without a session
            raise SystemExit(f"{self.subject.name}: the session does not count: {status} {body[:200]!r}")
        return credential

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def throughput(self, connections: int, seconds: float, path: str = "") -> float:
        """Return the answers per second that wrk counts."""
        check = path or self.subject.check
        return wrk(self.port, check, self.headers, connections, seconds, self.subject.method, strict=self._strict)

    def latency(self, seconds: float, path: str = "") -> list[float]:
        """Send requests one after the other with a pause of 2 ms; return their durations in seconds."""
        check = path or self.subject.check
        return latencies(self.port, check, self.headers, seconds, self.subject.method, strict=self._strict)

    @property
    def _strict(self) -> bool:
        return self.subject.name == "authsvc"  # a refusal ends the run; those of others do not count as answers

    @contextmanager
    def storm(self, clients: int) -> Iterator[list[tuple[int, int, float]]]:
        """Let clients sign in repeatedly. At the end the yielded list holds their counts and the seconds."""
        context = multiprocessing.get_context("spawn")
        stop, counts = context.Event(), context.Queue()
        process = context.Process(target=storm, args=(self.port, self.subject.login, clients, stop, counts))
        process.start()
        counted: list[tuple[int, int, float]] = []
        try:
            counts.get(timeout=60)  # all clients have started
            yield counted
        finally:
            stop.set()
            counted.append(counts.get(timeout=120))
            process.join()

    def memory(self) -> tuple[float, float]:
        """Return the memory of all its processes in MB: RSS, and PSS, which counts shared pages once."""
        group = os.getpgid(self.process.pid)
        resident = shared = 0
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(status.read_text().rpartition(")")[2].split()[2]) == group:
                    rollup = status.with_name("smaps_rollup").read_text()
                    resident += int(re.findall(r"^Rss: +(\d+)", rollup, re.MULTILINE)[0])
                    shared += int(re.findall(r"^Pss: +(\d+)", rollup, re.MULTILINE)[0])
            except OSError:
                continue
        return resident / 1024, shared / 1024


def fill_authsvc(folder: Path, users: int) -> None:
    path = folder / "authsvc.db"
    auth = Auth(settings=Settings(database=str(path), bcrypt_cost=COST))
    auth.register_user("user0@example.com", PASSWORD)
    hashed = auth.find_user("user0@example.com").hashed_password
    auth.close()
    now = int(time.time())
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -500000")  # KB: the emails are all over their index
        db.executemany(
            "INSERT INTO users (email, email_key, hashed_password) VALUES (?1, ?1, ?2)",
            ((f"user{number}@example.com", hashed) for number in range(1, users)),
        )
        db.executemany(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            VALUES (?, ?, ?, ?, ?, '192.0.2.1', ?)
            """,
            (
                (f"{number:064x}", 1 + number, now, now, now + 2_592_000, AGENT)
                for number in range(min(users, SESSIONS))
            ),
        )


def authsvc() -> Subject:
    return Subject(
        name="authsvc",
        what="this service, one process, production settings",
        hash=f"bcrypt, 2^{COST}",
        start=[sys.executable, str(HERE.parent / "authsvc.py")],
        environ={
            "AUTHSVC_PUBLIC_URL": "https://auth.example.com",
            "AUTHSVC_TRUSTED_PROXY": "127.0.0.1",
            "AUTHSVC_LISTEN": "127.0.0.1:{port}",
        },
        fill=fill_authsvc,
        login={
            "path": "/sessions",
            "headers": {"Content-Type": "application/x-www-form-urlencoded", "X-Forwarded-Proto": "https"},
            "body": "email={email}&password={password}",
            "ok": [200],
        },
        check="/profile",
        guard={"path": "/verify", "options": []},
        credential="cookie",
    )


HELLO = """
import sys, waitress
body = b'{"email": "user0@example.com"}'
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]), threads=int(sys.argv[2]), _quiet=True)
"""


def hello(threads: int) -> Subject:
    return Subject(
        name=f"waitress, {threads} threads",
        what="bare waitress, a constant answer",
        start=[sys.executable, "-c", HELLO, "{port}", str(threads)],
    )


NGINX = """
daemon off; pid nginx.pid; worker_processes 1; events {}
http {
    access_log off;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
    server { listen 127.0.0.1:{port}; location / { return 200 "user0@example.com"; } }
}
"""


def constant() -> Subject:
    return Subject(
        name="nginx, 1 worker",
        what="nginx, a constant answer",
        start=["sh", "-c", f"echo '{NGINX}' >nginx.conf; exec nginx -p . -c nginx.conf -e stderr"],
        environ={"PATH": f"{os.environ['PATH']}:/usr/sbin"},
    )


def peers(names: list[str], folder: Path) -> Iterator[Subject]:
    """Install the other services, each from its own files."""
    for described in sorted(HERE.glob("peers/*/peer.json")):
        peer = json.loads(described.read_text())
        if names and peer["name"] not in names:
            continue
        progress(f"installing {peer['name']}")
        own = Path(shutil.copytree(described.parent, folder / described.parent.name / "peer"))
        words = {"{folder}": str(own), "{modules}": str(own), "{node}": shutil.which("node") or "node"}
        if (own / "package.json").exists():
            execute(["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"], own)
            modules = own / "node_modules"
            packages = len(list(modules.glob("*/package.json"))) + len(list(modules.glob("@*/*/package.json")))
        else:
            execute([sys.executable, "-m", "venv", "venv"], own)
            pip = [str(own / "venv/bin/pip"), "install", "-q", "--disable-pip-version-check", "-r", "requirements.txt"]
            execute(pip, own)
            words["{bin}"] = str(own / "venv/bin")
            words["{python}"] = str(own / "venv/bin/python")
            modules = next(own.glob("venv/lib/python*/site-packages"))
            execute(
                [*pip[:1], "uninstall", "-q", "-y", "setuptools", "pip"], own
            )  # installed by venv, not needed to serve
            packages = len(list(modules.glob("*.dist-info")))

        def command(parts: list[str], words: dict[str, str] = words) -> list[str]:
            for word, value in words.items():
                parts = [part.replace(word, value) for part in parts]
            return parts

        guard = peer.get("guard", {})
        if guard:
            guard["options"] = command(guard.get("options", []))
        filling, programs = command(peer["fill"]), command(peer.get("programs", []))

        def fill(target: Path, users: int, parts: list[str] = filling) -> None:
            execute([part.replace("{users}", str(users)) for part in parts], target)

        yield Subject(
            name=peer["name"],
            what=peer["what"],
            hash=peer["hash"],
            start=command(peer["start"]),
            environ={name: command([value])[0] for name, value in peer.get("environ", {}).items()},
            fill=fill,
            login=peer["login"],
            check=peer["check"]["path"],
            method=peer["check"].get("method", "GET"),
            guard=guard,
            credential=peer["credential"],
            packages=packages,
            installed=megabytes(modules) + sum(Path(name).stat().st_size for name in programs) / 1e6,
        )


def execute(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def installed(*names: str) -> tuple[int, float]:
    sizes = []
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec
        assert spec.origin
        path = Path(spec.origin)
        sizes.append(megabytes(path.parent) if path.name == "__init__.py" else path.stat().st_size / 1e6)
    return len(names), sum(sizes)
