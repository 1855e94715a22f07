"""This service with ten million users beside one thousand, on SQLite and on PostgreSQL.

``python bench/ten_million.py`` measures both sizes in turns. Of the commands it tells how long they take and how much
memory. It needs PostgreSQL, wrk, 10 GB in the folder for temporary files, and about 20 minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psycopg

from auth import Auth
from bench.client import PASSWORD, in_turn, progress
from bench.postgres import Server
from bench.report import machine, short
from bench.subjects import AGENT, COST, HERE, SESSIONS, Running, Subject, authsvc, fill_authsvc
from engines.schema import POSTGRES_VERSION, SQLITE_VERSION
from settings import Settings
from tests import postgres

FEW, MANY = 1_000, 10_000_000
EXPIRED = 1_000_000  # sessions that "prune" deletes; with fewer users, one for each
CLIENTS = 8  # clients that sign in at the same time
BAR = 0.9  # of /verify and of logins, with many users ÷ with few

# What makes the schema one version older, so that the next start migrates it.
REVERT = """
    DROP TABLE passkeys;
    DROP TABLE spent_challenges;
    ALTER TABLE users RENAME COLUMN passkey_handle TO no_longer_used;
"""
EXPIRE = """
    INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
    SELECT 'expired ' || id, id, 1, 1, 2, '192.0.2.1', 'Mozilla/5.0' FROM users WHERE id <= {limit}"""


FILL = """
    INSERT INTO users (email, email_key, hashed_password)
    SELECT 'user' || n || '@example.com', 'user' || n || '@example.com', (SELECT hashed_password FROM users)
      FROM generate_series(1, {users} - 1) AS n;
    INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
    SELECT lpad(to_hex(n), 64, '0'), n + 1, {now}, {now}, {now} + 2592000, '192.0.2.1', '{agent}'
      FROM generate_series(0, {sessions} - 1) AS n"""


def fill_postgres(url: str, users: int) -> None:
    """Do what fill_authsvc() does, in the server itself."""
    auth = Auth(settings=Settings(database=url, bcrypt_cost=COST))
    auth.register_user("user0@example.com", PASSWORD)
    auth.close()
    with psycopg.connect(url, autocommit=True) as server:
        filling = FILL.format(users=users, now=int(time.time()), sessions=min(users, SESSIONS), agent=AGENT)
        server.execute(filling.encode())
        server.execute("VACUUM ANALYZE")  # else the server starts it within a minute, during a measurement


class Engine:
    """One engine with a database of each size."""

    def __init__(self, name: str, folder: Path, databases: dict[int, str]) -> None:
        self.name, self.folder, self.databases = name, folder, databases
        self.figures: list[tuple[str, str]] = []
        self.ratios: dict[str, float] = {}

    def note(self, what: str, value: str) -> None:
        progress(f"{self.name}: {what}: {value}")
        self.figures.append((what, value))

    def subject(self, users: int) -> Subject:
        ours = authsvc()
        return replace(ours, environ=ours.environ | {"AUTHSVC_DATABASE": self.databases[users]})

    def start(self, stack: ExitStack, users: int) -> Running:
        (self.folder / f"{self.name} {users}").mkdir(exist_ok=True)
        running = Running(self.subject(users), self.folder / f"{self.name} {users}")
        stack.callback(running.stop)
        return running

    def execute(self, users: int, statements: str) -> None:
        if self.name == "SQLite":
            with closing(sqlite3.connect(self.databases[users])) as db, db:
                db.executescript(statements)
        else:
            with psycopg.connect(self.databases[users], autocommit=True) as server:
                server.execute(statements.encode())

    def migrate(self, users: int) -> None:
        """Time the first start after an upgrade from the schema before, and another start."""
        older = (
            f"PRAGMA user_version = {SQLITE_VERSION - 1}"
            if self.name == "SQLite"
            else f"UPDATE authsvc_version SET version = {POSTGRES_VERSION - 1}"
        )
        self.execute(users, f"{REVERT}; {older};")
        for what in "first start, with the migration of the last schema", "further start":
            with ExitStack() as stack:
                running = self.start(stack, users)
                self.note(what, f"{running.cold:.2f} s, {running.memory()[0]:.0f} MB")

    def compare(self, users: int, rounds: int, seconds: float) -> None:
        """Compare both sizes in turns."""
        with ExitStack() as stack:
            both = [self.start(stack, FEW), self.start(stack, users)]
            self.ratio("/verify a second, 1 connection", both, rounds * 3, lambda one: verify(one, 1, seconds))
            self.ratio("/verify a second, 16 connections", both, rounds * 3, lambda one: verify(one, 16, seconds))
            self.ratio("logins a second", both, rounds, lambda one: logins(one, seconds * 5))

    def ratio(self, what: str, both: list[Running], turns: int, measure: Callable[[Running], float]) -> None:
        pairs = []
        for number in range(turns):
            found = {one.port: measure(one) for one in in_turn(both, number)}
            pairs.append([found[one.port] for one in both])
        few, many = (statistics.median(values) for values in zip(*pairs, strict=True))
        self.ratios[f"{self.name}, {what}"] = ratio = statistics.median(many / few for few, many in pairs)
        self.note(what, f"{short(many)}, with {FEW:,} users {short(few)}; ratio {ratio:.3f}, at least {BAR}")

    def command(self, users: int, *arguments: str) -> None:
        """Run a command of the operator; note its time and memory."""
        self.timed(users, " ".join(arguments[:2]), [sys.executable, str(HERE.parent / "authsvc.py"), *arguments])

    def timed(self, users: int, shown: str, command: list[str]) -> None:
        environ = os.environ | {"AUTHSVC_DATABASE": self.databases[users]}
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environ, cwd=self.folder, stdout=subprocess.DEVNULL)
        most = 0
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            most = int(found[1]) if found else most  # an ended process has none
            time.sleep(0.02)
        took = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"{command}: {process.returncode}")
        self.note(f"`{shown}`", f"{took:.1f} s, {most / 1024:.0f} MB")

    def commands(self, users: int) -> None:
        self.command(users, "user", "list")
        if self.name == "SQLite":
            self.command(users, "backup", "backup.db")
        else:
            dump = (postgres.programs() or Path()) / "pg_dump"
            self.timed(users, "pg_dump -Fc", [str(dump), "-Fc", "-f", "dump", self.databases[users]])
        self.execute(users, EXPIRE.format(limit=min(users, EXPIRED)))
        self.command(users, "prune")


def verify(one: Running, connections: int, seconds: float) -> float:
    return one.throughput(connections, seconds, "/verify")


def logins(one: Running, seconds: float) -> float:
    with one.storm(CLIENTS) as counted:
        time.sleep(seconds)
    good, _, took = counted[0]
    return good / took


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/ten_million.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--users", type=int, default=MANY, help=f"users of the large databases ({MANY:,})")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, of which the medians are taken (2)")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of one measurement (3); of logins 15")
    given = parser.parse_args()
    users = given.users
    with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as name, ExitStack() as stack:
        folder, files = Path(name), {}
        for size in FEW, users:
            progress(f"{size:,} users")
            (folder / str(size)).mkdir()
            fill_authsvc(folder / str(size), size)
            files[size] = str(folder / str(size) / "authsvc.db")
        sqlite = Engine("SQLite", folder, files)
        sqlite.note("size", f"{Path(files[users]).stat().st_size / 1e9:.2f} GB")
        urls = {}
        for size in FEW, users:
            progress(f"{size:,} users")
            server = Server(shared_buffers="128MB")  # as Debian sets it
            stack.callback(server.remove)
            urls[size] = server.url
            fill_postgres(server.url, size)
        engines = sqlite, Engine("PostgreSQL", folder, urls)
        for engine in engines:
            engine.migrate(users)
            engine.compare(users, given.rounds, given.seconds)
            engine.commands(users)
    print(f"{machine()}; {users:,} users.\n")
    for engine in engines:
        print(f"| {engine.name} | |\n|---|---|")
        print("\n".join(f"| {what} | {value} |" for what, value in engine.figures), end="\n\n")
    return int(any(ratio < BAR for engine in engines for ratio in engine.ratios.values()))


if __name__ == "__main__":
    sys.exit(main())
