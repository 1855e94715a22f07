"""Logins and session checks of several copies of the service over one PostgreSQL: ``python bench/postgres.py``.

Everything runs on this machine: a PostgreSQL server with Debian's settings, and nginx in front of the copies. SQLite
and bare bcrypt are measured in the same run, in turns, for comparison. Needs PostgreSQL, nginx and wrk.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import psycopg

from bench.client import progress
from bench.limits import raw_bcrypt
from bench.report import CONNECTIONS, machine
from bench.subjects import Running, Subject, authsvc, fill_authsvc
from tests import postgres

USERS = 100_000
CLIENTS = 16  # clients that sign in at the same time

# The least values that count as a success.
BARS = {"logins, 2 copies ÷ raw bcrypt": 0.95} | {f"profile, {n} connections ÷ SQLite": 0.35 for n in CONNECTIONS}

NGINX = """
daemon off; pid nginx.pid; worker_processes 1; events {}
http {
    access_log off;
    client_body_temp_path temp; proxy_temp_path temp; fastcgi_temp_path temp; uwsgi_temp_path temp; scgi_temp_path temp;
    upstream copies { COPIES keepalive 64; }
    server {
        listen 127.0.0.1:PORT;
        location / { proxy_pass http://copies; proxy_http_version 1.1; proxy_set_header Connection ""; }
    }
}
"""


class Server(postgres.Server):
    """A server that writes each commit to the disk, unlike the one of the tests."""

    haste: ClassVar[dict[str, str]] = {}


@contextmanager
def copies(number: int, database: str, folder: Path) -> Iterator[Running]:
    """Start a number of copies over one database, and nginx in front of them."""
    with ExitStack() as stack:
        ports = []
        for name in range(number):
            ports.append(started(stack, over(database), folder / f"copy{name}").port)
        template = folder / "nginx.conf"
        template.write_text(NGINX.replace("COPIES", "".join(f"server 127.0.0.1:{port};" for port in ports)))
        script = f'sed s/PORT/{{port}}/ "{template}" >nginx.conf && exec nginx -p "$PWD" -c nginx.conf -e stderr'
        yield started(stack, replace(authsvc(), start=["sh", "-c", script]), folder / "nginx")


def over(database: str) -> Subject:
    """Return this service with a database, a path or a URL."""
    ours = authsvc()
    return replace(ours, environ=ours.environ | {"AUTHSVC_DATABASE": database})


def started(stack: ExitStack, subject: Subject, folder: Path) -> Running:
    folder.mkdir(exist_ok=True)
    one = Running(subject, folder)
    stack.callback(one.stop)
    return one


def logins(one: Running, seconds: float) -> float:
    with one.storm(CLIENTS) as counted:
        time.sleep(seconds)
    good, _, took = counted[0]
    return good / took


class Measuring:
    """One run: the measured values by name."""

    def __init__(self, folder: Path, file: str, url: str, rounds: int, seconds: float) -> None:
        self.folder, self.file, self.url, self.rounds, self.seconds = folder, file, url, rounds, seconds
        self.samples: dict[str, list[float]] = {}

    def note(self, what: str, value: float) -> None:
        progress(f"{what}: {value:,.2f}")
        self.samples.setdefault(what, []).append(value)

    def logins(self) -> None:
        """Measure logins on a copy with SQLite, and on one and two with PostgreSQL, each between two runs of bcrypt."""
        for _ in range(self.rounds):
            before = raw_bcrypt(self.seconds)
            for what, number, database in (
                ("SQLite", 1, self.file),
                ("1 copy", 1, self.url),
                ("2 copies", 2, self.url),
            ):
                with copies(number, database, self.folder) as proxy:
                    rate = logins(proxy, 2 * self.seconds)
                after = raw_bcrypt(self.seconds)
                self.note(f"logins, {what}", rate)
                self.note(f"logins, {what} ÷ raw bcrypt", rate / statistics.mean([before, after]))
                before = after
                self.note("raw bcrypt", after)

    def profile(self) -> None:
        """Measure session checks on one copy with SQLite and on one with PostgreSQL, in turns."""
        with ExitStack() as stack:
            file = started(stack, over(self.file), self.folder / "file")
            server = started(stack, over(self.url), self.folder / "server")
            for _ in range(self.rounds):
                for connections in CONNECTIONS:
                    theirs = file.throughput(connections, self.seconds)
                    ours = server.throughput(connections, self.seconds)
                    self.note(f"profile, {connections} connections, SQLite", theirs)
                    self.note(f"profile, {connections} connections, PostgreSQL", ours)
                    self.note(f"profile, {connections} connections ÷ SQLite", ours / theirs)

    def figures(self) -> dict[str, float]:
        return {what: statistics.median(values) for what, values in self.samples.items()}


def table(found: dict[str, float]) -> str:
    lines = ["| | a second | ÷ raw bcrypt | at least |", "|---|---|---|---|"]
    if "raw bcrypt" in found:
        lines.append(f"| bcrypt alone, on all cores | {found['raw bcrypt']:.2f} | | |")
    for what in ("SQLite", "1 copy", "2 copies"):
        if f"logins, {what}" in found:
            ratio = f"logins, {what} ÷ raw bcrypt"
            name = f"{what}, one copy" if what == "SQLite" else f"PostgreSQL, {what}"
            rate, bar = found[f"logins, {what}"], BARS.get(ratio, "")
            lines.append(f"| logins: {name} | {rate:.2f} | {found[ratio]:.2f} | {bar} |")
    if f"profile, {CONNECTIONS[0]} connections ÷ SQLite" in found:
        lines += ["", "| `GET /profile`, one copy | SQLite | PostgreSQL | ÷ | at least |", "|---|---|---|---|---|"]
        for n in CONNECTIONS:
            ratio = f"profile, {n} connections ÷ SQLite"
            rates = [f"{found[f'profile, {n} connections, {kind}']:,.0f}" for kind in ("SQLite", "PostgreSQL")]
            lines.append(f"| {n} connections | {rates[0]} | {rates[1]} | {found[ratio]:.2f} | {BARS[ratio]} |")
    return "\n".join(lines)


def write(text: str) -> None:
    readme = HERE / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- postgres -->\n")
    after = rest.partition("<!-- end of postgres -->")[2]
    readme.write_text(f"{before}{mark}{text}\n<!-- end of postgres -->{after}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench/postgres.py", description=(__doc__ or "").partition("\n\n")[2],
        epilog="Exit code: 0 every bar is reached; 1 a bar is missed; 2 wrong usage, or a program is missing.",
    )  # fmt: skip
    parser.add_argument("--parts", default="logins,profile", help="logins,profile (both unless given)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, of which the medians are taken (3)")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of one measurement (5)")
    parser.add_argument("--users", type=int, default=USERS, help=f"users in the database ({USERS:,})")
    parser.add_argument("--write", action="store_true", help="write the tables into bench/README.md")
    given = parser.parse_args()
    if unknown := set(given.parts.split(",")) - {"logins", "profile"}:
        parser.error(f"no such part: {', '.join(unknown)}")
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [name for name in ("nginx", "wrk") if not shutil.which(name)]
    if missing or not postgres.programs():
        parser.error(f"missing: {', '.join([*missing, *([] if postgres.programs() else ['PostgreSQL'])])}")
    with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        server = Server()
        stack.callback(server.remove)
        progress(f"{given.users:,} users, {server.url}")
        fill_authsvc(folder, given.users)
        file = str(folder / "authsvc.db")
        command = [sys.executable, str(HERE.parent / "authsvc.py"), "copy-to", server.url]
        subprocess.run(command, env=os.environ | {"AUTHSVC_DATABASE": file}, check=True, stdout=sys.stderr)
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")  # else the server starts it within a minute, during a measurement
            (version,) = connection.execute("SHOW server_version").fetchone() or ("",)
        measuring = Measuring(folder, file, server.url, given.rounds, given.seconds)
        for part in given.parts.split(","):
            getattr(measuring, part)()
    found = measuring.figures()
    call = " ".join(["bench/postgres.py", *sys.argv[1:]])
    text = f"{datetime.date.today()}, {machine()}, PostgreSQL {version}; `{call}`.\n\n{table(found)}"
    print(text)
    if given.write:
        write(text)
    return int(any(found[what] < bar for what, bar in BARS.items() if what in found))


if __name__ == "__main__":
    sys.exit(main())
