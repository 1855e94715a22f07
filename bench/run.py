"""Speed of this service compared with other services: ``make bench``, or ``python bench/run.py --help``.

Every subject is started on this machine with a database of the same size. All are measured in one run, in turns, and
the medians of several rounds count, so that a noisy machine affects all of them alike. Needs wrk; the other services
also need PyPI, npm and Node.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import bcrypt

from auth import Auth
from settings import Settings

PASSWORD = "correct horse battery staple"
CONNECTIONS = 1, 16, 64
STORMS = 16, 64
SIZES = 1_000, 100_000, 1_000_000
USERS = 100_000
SESSIONS = 100_000  # at most; a smaller database has one for each user
COST = 12
TURNS = (
    4  # short turns of each subject in a round of throughput: the speed of a shared machine changes every few seconds
)

# (figure, comparison, bar, aim). A bar must be reached, an aim is a wish. bars() computes the figures.
BARS = [
    *((f"profile ÷ bare waitress, {n} connections", ">=", bar, aim) for n, bar, aim in
      ((1, 0.75, 1.0), (16, 1.1, 1.5), (64, 1.3, 1.8))),
    *((f"profile ÷ best peer, {n} connections", ">=", 4, 6) for n in CONNECTIONS),
    ("profile ÷ the original, 1,000,000 users", ">=", 50, None),
    ("p99 of profile, 16 logging in ÷ idle", "<=", 2, 1),
    ("p99 of profile, 64 logging in ÷ idle", "<=", 3, 1),
    ("logins ÷ raw bcrypt on all cores", ">=", 0.95, 0.99),
    ("profile at 1,000,000 users ÷ at 1,000", ">=", 0.9, 1),
    ("resident memory idle, MB", "<=", 36, 28),
    ("resident memory after the storm with 100,000 sessions, MB", "<=", 45, 32),
    ("cold start to the first 200, s", "<=", 0.3, 0.15),
    ("cost of verify ÷ profile", "<=", 1.1, 1),
    ("p99 of verify, 16 logging in ÷ idle", "<=", 2, 1),
]  # fmt: skip


@dataclass
class Subject:
    """A service to measure: how it is filled and started, and the requests that it gets."""

    name: str
    what: str
    start: list[str]
    check: str = "/"
    fill: Callable[[Path, int], object] | None = None
    login: dict[str, Any] = field(default_factory=dict)
    credential: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    folder: Path = HERE
    hash: str = ""
    packages: int = 0
    installed: float = 0.0  # MB


class Running:
    """A running subject, in a folder of its own."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.port = free_port()
        self.command = [part.replace("{port}", str(self.port)) for part in subject.start]
        self.environ = {name: value.replace("{port}", str(self.port)) for name, value in subject.environ.items()}
        self.folder = folder
        self.cold = self._start()
        self.headers = self._log_in() if subject.login else {}

    def _start(self) -> float:
        environ = {**os.environ, **self.environ}
        environ.pop(
            "PYTHONDONTWRITEBYTECODE", None
        )  # with it each start would compile our modules, but not those that pip has compiled
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
        status, _, body = Client(self.port).ask("GET", self.subject.check, credential)
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
        headers = [part for name, value in self.headers.items() for part in ("-H", f"{name}: {value}")]
        url = f"http://127.0.0.1:{self.port}{path or self.subject.check}"
        said = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", *headers, url],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        refused = re.search(r"Non-2xx or 3xx responses: (\d+)", said)
        rate = float(re.findall(r"Requests/sec: +([\d.]+)", said)[0])
        asked = int(re.findall(r"(\d+) requests in", said)[0])
        if refused and self.subject.name == "authsvc":
            raise SystemExit(f"{self.subject.name}: {said}")
        return rate * (1 - int(refused[1]) / asked) if refused else rate  # an error does not count as an answer

    def latency(self, seconds: float, path: str = "") -> list[float]:
        """Send requests one after the other with a pause of 2 ms; return their durations in seconds."""
        client, took, end = Client(self.port), [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            status, _, _ = client.ask("GET", path or self.subject.check, self.headers)
            took.append(time.perf_counter() - began)
            if status != 200 and self.subject.name == "authsvc":
                raise SystemExit(f"{self.subject.name}: {status} under load")
            time.sleep(0.002)
        return took

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


class Client:
    """An HTTP client with one connection, which it keeps as long as the server does."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.socket: socket.socket | None = None
        self.left = b""

    def ask(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: str = ""
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        request = "\r\n".join([*lines, "", body]).encode()
        if self.socket is None:
            self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=120)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.left = b""
        self.socket.sendall(request)
        head = self._until(b"\r\n\r\n")
        first, *rest = head.decode("latin-1").split("\r\n")
        pairs = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in rest if line)]
        found = dict(pairs)
        if found.get("transfer-encoding") == "chunked":
            content = b""
            while size := int(self._until(b"\r\n"), 16):
                content += self._exactly(size + 2)[:-2]
            self._until(b"\r\n")
        else:
            content = self._exactly(int(found.get("content-length", 0)))
        if found.get("connection", "").lower() == "close":
            self.socket.close()
            self.socket = None
        return int(first.split()[1]), pairs, content

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.left:
            self._receive()
        found, _, self.left = self.left.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self.left) < size:
            self._receive()
        found, self.left = self.left[:size], self.left[size:]
        return found

    def _receive(self) -> None:
        assert self.socket
        chunk = self.socket.recv(65536)
        if not chunk:
            self.socket = None
            raise ConnectionResetError
        self.left += chunk


def login(described: dict[str, Any], number: int) -> tuple[str, dict[str, str], str]:
    """Return path, headers and body of the login of one user, from an address of its own."""
    email, password = f"user{number % 1000}@example.com", PASSWORD
    if "json" not in described["headers"].get("Content-Type", ""):
        email, password = quote(email), quote(password)
    body = described["body"].replace("{email}", email).replace("{password}", password)
    address = f"198.18.{number // 250 % 250}.{number % 250 + 1}"
    return described["path"], {"X-Forwarded-For": address, **described["headers"]}, body


def storm(port: int, described: dict[str, Any], clients: int, stop: Any, counts: Any) -> None:
    """Sign in repeatedly from a number of threads, in a process of its own, and count the answers."""
    import itertools
    import threading

    numbers = itertools.count(1)
    answered: list[int] = []

    def one() -> None:
        client = Client(port)
        while not stop.is_set():
            try:
                status = client.ask("POST", *login(described, next(numbers)))[0]
            except OSError:
                status, client = 0, Client(port)
            answered.append(status)
            if status in (429, 503):
                time.sleep(0.5)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    began, before = time.perf_counter(), len(answered)
    counts.put(None)
    stop.wait()
    took, during = time.perf_counter() - began, answered[before:]
    good = sum(status in described["ok"] for status in during)
    for thread in threads:
        thread.join()
    counts.put((good, len(during) - good, took))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# The subjects


def fill_authsvc(folder: Path, users: int) -> None:
    path = folder / "authsvc.db"
    auth = Auth(settings=Settings(database=str(path), bcrypt_cost=COST))
    auth.register_user("user0@example.com", PASSWORD)
    hashed = auth.find_user("user0@example.com").hashed_password
    auth.close()
    now = int(time.time())
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        db.executemany(
            "INSERT INTO users (email, email_key, hashed_password) VALUES (?1, ?1, ?2)",
            ((f"user{number}@example.com", hashed) for number in range(1, users)),
        )
        db.executemany(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            VALUES (?, ?, ?, ?, ?, '192.0.2.1', 'Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Firefox/140.0')
            """,
            ((f"{number:064x}", 1 + number, now, now, now + 2_592_000) for number in range(min(users, SESSIONS))),
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
            run(["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"], own)
            modules = own / "node_modules"
            packages = len(list(modules.glob("*/package.json"))) + len(list(modules.glob("@*/*/package.json")))
        else:
            run([sys.executable, "-m", "venv", "venv"], own)
            pip = [str(own / "venv/bin/pip"), "install", "-q", "--disable-pip-version-check", "-r", "requirements.txt"]
            run(pip, own)
            words["{python}"] = str(own / "venv/bin/python")
            modules = next(own.glob("venv/lib/python*/site-packages"))
            run([*pip[:1], "uninstall", "-q", "-y", "setuptools", "pip"], own)  # installed by venv, not needed to serve
            packages = len(list(modules.glob("*.dist-info")))

        def command(parts: list[str], words: dict[str, str] = words) -> list[str]:
            for word, value in words.items():
                parts = [part.replace(word, value) for part in parts]
            return parts

        filling = command(peer["fill"])

        def fill(target: Path, users: int, parts: list[str] = filling) -> None:
            run([part.replace("{users}", str(users)) for part in parts], target)

        yield Subject(
            name=peer["name"],
            what=peer["what"],
            hash=peer["hash"],
            start=command(peer["start"]),
            environ={name: command([value])[0] for name, value in peer.get("environ", {}).items()},
            fill=fill,
            login=peer["login"],
            check=peer["check"]["path"],
            credential=peer["credential"],
            packages=packages,
            installed=megabytes(modules),
        )


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


# Measurements


def hash_for(seconds: float) -> float:
    salt, done, began = bcrypt.gensalt(COST), 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        bcrypt.hashpw(PASSWORD.encode(), salt)
        done += 1
    return done / took


def raw_bcrypt(seconds: float) -> float:
    """Return hashes per second on all cores, while nothing else runs."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.map(hash_for, [seconds] * cores, chunksize=1))


def p99(took: list[float]) -> float:
    if len(took) < 100:
        return max(took) * 1000
    return statistics.quantiles(took, n=100)[98] * 1000


T = TypeVar("T")


def in_turn(things: list[T], number: int) -> list[T]:
    """Return the things in the order of this round; every second round is reversed, as a busy machine slows down."""
    return things[::-1] if number % 2 else things


Measured = dict[str, dict[str, float]]
Samples = dict[str, dict[str, list[float]]]


class Run:
    """One run: the values of each subject, under names such as ``rate 16``."""

    def __init__(self, subjects: list[Subject], folder: Path, rounds: int, seconds: float) -> None:
        self.subjects, self.folder, self.rounds, self.seconds = subjects, folder, rounds, seconds
        self.samples: Samples = {subject.name: {} for subject in subjects}
        self.served = [subject for subject in subjects if subject.login]

    def note(self, subject: Subject, what: str, value: float) -> None:
        self.samples[subject.name].setdefault(what, []).append(value)

    def results(self) -> Measured:
        return {
            name: {what: statistics.median(values) for what, values in found.items()}
            for name, found in self.samples.items()
        }

    @contextmanager
    def started(self, subjects: list[Subject], users: int) -> Iterator[list[Running]]:
        """Start subjects, each on a database of this many users."""
        with ExitStack() as stack:
            running = []
            for subject in subjects:
                folder = self.folder / subject.name / str(users)
                if not folder.exists():
                    folder.mkdir(parents=True)
                    if subject.fill:
                        progress(f"{users:,} users for {subject.name}")
                        subject.fill(folder, users)
                running.append(Running(subject, folder))
                stack.callback(running[-1].stop)
            yield running

    def throughput(self) -> None:
        with self.started(self.subjects, USERS) as running:
            for number in range(self.rounds * TURNS):
                for connections in CONNECTIONS:
                    for one in in_turn(running, number):
                        progress(f"requests a second, turn {number + 1}, {connections}: {one.subject.name}")
                        paths = [("rate", ""), *([("verify", "/verify")] if one.subject.name == "authsvc" else [])]
                        rates = {}
                        for what, path in in_turn(paths, number):
                            rates[what] = one.throughput(connections, self.seconds / 2, path)
                            self.note(one.subject, f"{what} {connections}", rates[what])
                        if "verify" in rates:  # from two measurements in a row, because the difference is small
                            self.note(one.subject, "cost of verify", rates["rate"] / rates["verify"])

    def latency(self) -> None:
        for number in range(self.rounds):
            for subject in self.served:
                ours = subject.name == "authsvc"
                if number and not ours:  # the others take minutes, and one round shows enough
                    continue
                with self.started([subject], USERS) as (one,):
                    for path, what in (("", "p99"), *([("/verify", "p99 of verify")] if ours else [])):
                        progress(f"latency, round {number + 1}: {subject.name} {path}")
                        self.note(subject, f"{what} idle", p99(one.latency(self.seconds * 2, path)))
                        for clients in STORMS:
                            with one.storm(clients) as counted:
                                took = one.latency(self.seconds * 2, path)
                            (good, other, seconds) = counted[0]
                            self.note(subject, f"{what} {clients}", p99(took))
                            self.note(subject, f"logins {clients}", good / seconds)
                            self.note(subject, f"refused {clients}", other / seconds)

    def logins(self) -> None:
        ours = next(subject for subject in self.subjects if subject.name == "authsvc")
        before = raw_bcrypt(self.seconds * 2)
        for number in range(self.rounds * 2):
            progress(f"logins against raw bcrypt, turn {number + 1}")
            with self.started([ours], USERS) as (one,), one.storm(8) as counted:
                time.sleep(self.seconds * 4)  # about a hundred logins, so that those at either end matter little
            good, _, seconds = counted[0]
            after = raw_bcrypt(self.seconds * 2)
            raw, before = statistics.mean([before, after]), after
            self.note(ours, "raw bcrypt", raw)
            self.note(ours, "logins ÷ raw bcrypt", good / seconds / raw)

    def sizes(self) -> None:
        compared = [subject for subject in self.subjects if subject.name in ("authsvc", "original")]
        with ExitStack() as stack:
            running = [(users, one) for users in SIZES for one in stack.enter_context(self.started(compared, users))]
            for number in range(self.rounds * TURNS):
                for users, one in in_turn(running, number):
                    progress(f"{users:,} users, turn {number + 1}: {one.subject.name}")
                    self.note(one.subject, f"rate at {users}", one.throughput(16, self.seconds / 2))

    def memory(self) -> None:
        for subject in self.served:
            with self.started([subject], USERS) as (one,):
                progress(f"memory: {subject.name}")
                time.sleep(1)
                for what, value in zip(("resident", "memory"), one.memory(), strict=True):
                    self.note(subject, f"{what} idle", value)
                with one.storm(16):
                    one.throughput(64, self.seconds)
                for what, value in zip(("resident", "memory"), one.memory(), strict=True):
                    self.note(subject, f"{what} after", value)

    def cold(self) -> None:
        for number in range(max(3, self.rounds)):
            for subject in self.subjects:
                progress(f"cold start, round {number + 1}: {subject.name}")
                with self.started([subject], USERS) as (one,):
                    self.note(subject, "cold start", one.cold)


def bars(results: Measured) -> dict[str, float]:
    """Return the figures of BARS that this run has measured."""
    ours = results["authsvc"]
    bare = [found for name, found in results.items() if name.startswith("waitress")]
    others = {
        name: found for name, found in results.items() if name not in ("authsvc", "original") and "rate 1" in found
    }
    rivals = [found for name, found in others.items() if not name.startswith("waitress")]
    figures: dict[str, Callable[[], float]] = {
        **{
            f"profile ÷ bare waitress, {n} connections": lambda n=n: (  # type: ignore[misc]
                ours[f"rate {n}"] / max(found[f"rate {n}"] for found in bare)
            )
            for n in CONNECTIONS
        },
        **{
            f"profile ÷ best peer, {n} connections": lambda n=n: (  # type: ignore[misc]
                ours[f"rate {n}"] / max(found[f"rate {n}"] for found in rivals)
            )
            for n in CONNECTIONS
        },
        "profile ÷ the original, 1,000,000 users": lambda: (
            ours["rate at 1000000"] / results["original"]["rate at 1000000"]
        ),
        "p99 of profile, 16 logging in ÷ idle": lambda: ours["p99 16"] / ours["p99 idle"],
        "p99 of profile, 64 logging in ÷ idle": lambda: ours["p99 64"] / ours["p99 idle"],
        "logins ÷ raw bcrypt on all cores": lambda: ours["logins ÷ raw bcrypt"],
        "profile at 1,000,000 users ÷ at 1,000": lambda: ours["rate at 1000000"] / ours["rate at 1000"],
        "resident memory idle, MB": lambda: ours["resident idle"],
        "resident memory after the storm with 100,000 sessions, MB": lambda: ours["resident after"],
        "cold start to the first 200, s": lambda: ours["cold start"],
        "cost of verify ÷ profile": lambda: ours["cost of verify"],
        "p99 of verify, 16 logging in ÷ idle": lambda: ours["p99 of verify 16"] / ours["p99 of verify idle"],
    }
    found = {}
    for what, figure in figures.items():
        try:
            found[what] = figure()
        except (KeyError, ValueError):  # not measured in this run
            continue
    return found


# Output


def progress(what: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {what}", file=sys.stderr, flush=True)


def table(subjects: list[Subject], results: Measured) -> str:
    def cell(found: dict[str, float], *names: str, form: str = ",.0f") -> str:
        return " / ".join(format(found[name], form) if name in found else "–" for name in names)

    lines = [
        "| | requests a second, 1 / 16 / 64 connections | p99 of one, idle / 16 / 64 logging in, ms "
        "| logins a second, 16 clients | MB idle / after | cold start, s | packages, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        found = results[subject.name]
        lines.append(
            f"| **{subject.name}**: {subject.what}{', ' + subject.hash if subject.hash else ''} "
            f"| {cell(found, *(f'rate {n}' for n in CONNECTIONS))} "
            f"| {cell(found, 'p99 idle', 'p99 16', 'p99 64', form=',.1f') if subject.login else ''} "
            f"| {cell(found, 'logins 16', form='.1f') if subject.login else ''} "
            f"| {cell(found, 'memory idle', 'memory after') if subject.login else ''} "
            f"| {cell(found, 'cold start', form='.2f')} "
            f"| {f'{subject.packages}, {subject.installed:.0f}' if subject.packages else ''} |"
        )
    sizes = [name for name in ("authsvc", "original") if "rate at 1000" in results.get(name, {})]
    if sizes:
        lines += [
            "",
            "| requests a second at 16 connections | " + " | ".join(f"{size:,} users" for size in SIZES) + " |",
        ]
        lines += ["|---|" + "---|" * len(SIZES)]
        for name in sizes:
            lines.append(
                f"| {name} | " + " | ".join(f"{results[name][f'rate at {size}']:,.0f}" for size in SIZES) + " |"
            )
    figures = bars(results)
    lines += ["", "| must hold | measured | bar | aim |", "|---|---|---|---|"]
    for what, sign, bar, aim in BARS:
        if what in figures:
            missed = "" if holds(figures[what], sign, bar) else " **missed**"
            lines.append(f"| {what} | {figures[what]:.3g}{missed} | {sign} {bar} | {'' if aim is None else aim} |")
    return "\n".join(lines)


def holds(figure: float, sign: str, bar: float) -> bool:
    return figure >= bar if sign == ">=" else figure <= bar


def picture(subjects: list[Subject], results: Measured) -> str:
    """Return a bar chart of the throughput at 16 connections, as SVG."""
    shown = [subject for subject in subjects if "rate 16" in results[subject.name]]
    most = max(results[subject.name]["rate 16"] for subject in shown)
    rows = []
    for number, subject in enumerate(sorted(shown, key=lambda one: -results[one.name]["rate 16"])):
        rate, y = results[subject.name]["rate 16"], 40 + 26 * number
        colour = "#0a58ca" if subject.name == "authsvc" else "#8c959f"
        rows.append(
            f'<text x="190" y="{y + 14}" text-anchor="end">{subject.name}</text>'
            f'<rect x="200" y="{y}" width="{max(1, 420 * rate / most):.0f}" height="18" fill="{colour}"/>'
            f'<text x="{208 + 420 * rate / most:.0f}" y="{y + 14}">{rate:,.0f}</text>'
        )
    height = 50 + 26 * len(shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{height}" font-size="13" '
        'font-family="sans-serif">'
        f'<rect width="720" height="{height}" fill="#fff"/><text x="10" y="22" font-size="15">Who is signed in? '
        f"Requests a second, 16 connections</text>{''.join(rows)}</svg>\n"
    )


def machine() -> str:
    model = re.search("model name\t: (.*)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, {model[1] if model else platform.machine()}, Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench/run.py", description=(__doc__ or "").partition("\n\n")[0],
        epilog="Exit code: 0 every bar is reached; 1 a bar is missed; 2 wrong usage, or a program is missing.",
    )  # fmt: skip
    parser.add_argument(
        "--only", default="", help="other services to measure, separated by commas; - for none (default: all)"
    )
    parser.add_argument("--parts", default="", help="throughput,latency,logins,sizes,memory,cold (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, of which the medians are taken (2)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="duration of one measurement (4); of throughput half as long"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the table into bench/README.md, and results.json and results.svg"
    )
    given = parser.parse_args()
    parts = given.parts.split(",") if given.parts else ["throughput", "latency", "logins", "sizes", "memory", "cold"]
    if unknown := [part for part in parts if not hasattr(Run, part)]:
        parser.error(f"no such part: {', '.join(unknown)}")
    if not shutil.which("wrk"):
        parser.error("wrk is missing: apt-get install wrk")
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as folder:
        only = [] if given.only in ("", "-") else given.only.split(",")
        found = [] if given.only == "-" else list(peers(only, Path(folder)))
        ours = authsvc()
        ours.packages, ours.installed = installed("bottle", "bcrypt", "waitress")
        subjects = [ours, *(hello(threads) for threads in (1, 4, 16)), *found]
        one = Run(subjects, Path(folder), given.rounds, given.seconds)
        for part in parts:
            getattr(one, part)()
    results = one.results()
    text = table(subjects, results)
    print(text)
    if given.write:
        minutes, command = (time.time() - began) / 60, " ".join(["bench/run.py", *sys.argv[1:]])
        when = f"{datetime.date.today()}, {machine()}; {minutes:.0f} minutes, `{command}`."
        write(when, text, subjects, results, one.samples)
    figures = bars(results)
    return int(any(not holds(figures[what], sign, bar) for what, sign, bar, _ in BARS if what in figures))


def installed(*names: str) -> tuple[int, float]:
    import importlib.util

    sizes = []
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec
        assert spec.origin
        path = Path(spec.origin)
        sizes.append(megabytes(path.parent) if path.name == "__init__.py" else path.stat().st_size / 1e6)
    return len(names), sum(sizes)


def write(when: str, text: str, subjects: list[Subject], results: Measured, samples: Samples) -> None:
    readme = HERE / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- results -->\n")
    after = rest.partition("<!-- end -->")[2]
    readme.write_text(f"{before}{mark}{when}\n\n{text}\n<!-- end -->{after}")
    found = {"when": when, "results": results, "samples": samples}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "results.svg").write_text(picture(subjects, results))


if __name__ == "__main__":
    sys.exit(main())
