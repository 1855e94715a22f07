"""Latency of GET /profile while the service deletes expired sessions.

``python bench/pruning.py`` makes two databases of a million sessions: in one nothing has expired, in the other 99 % of
the sessions have. It requests a profile over one connection from a service on each database in turn, and prints the
ratios. It takes about two minutes, and needs 800 MB in the folder for temporary files.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from auth import Auth, _digest
from settings import Settings

SESSIONS = 1_000_000
USERS = 100_000
REQUESTS = 20_000
ROUNDS = 3


def fill(path: Path, expired: float) -> str:
    """Fill a database, of which this part of the sessions has expired; return the id of a live session."""
    auth = Auth(settings=Settings(database=str(path), bcrypt_cost=4))
    auth.register_user("bob@example.com", "b4l0u")
    session_id = auth.create_session("bob@example.com") or ""
    auth.close()
    now = int(time.time())
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -500000")
        db.executemany(
            "INSERT INTO users (email, email_key, hashed_password) VALUES (?1, ?1, '!')",
            ((f"user{number}@example.com",) for number in range(USERS)),
        )
        db.executemany(
            """
            INSERT INTO sessions (session_hash, user_id, created_at, last_seen_at, expires_at, address, user_agent)
            VALUES (?, ?, ?, ?, ?, '192.0.2.1', 'Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Firefox/140.0')
            """,
            (
                (
                    _digest(str(number)),
                    2 + number % USERS,
                    now,
                    now,
                    now + (-1 if number % 100 < 100 * expired else 2_592_000),
                )
                for number in range(SESSIONS)
            ),
        )
    return session_id


@contextmanager
def serving(path: Path) -> Iterator[tuple[str, int]]:
    """Run the service on this database; yield its host and port."""
    environ = os.environ | {"AUTHSVC_DATABASE": str(path), "AUTHSVC_LISTEN": "127.0.0.1:0"}
    with subprocess.Popen(
        [sys.executable, str(HERE / "authsvc.py")],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        host, port = (process.stdout.readline() if process.stdout else "").strip().removeprefix("http://").split(":")
        try:
            yield host, int(port)
        finally:
            process.terminate()


def latencies(address: tuple[str, int], session_id: str) -> list[float]:
    """Return the durations of many requests in seconds, sorted."""
    request = f"GET /profile HTTP/1.1\r\nHost: localhost\r\nCookie: session_id={session_id}\r\n\r\n".encode()
    taken = []
    with socket.create_connection(address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(REQUESTS):
            began = time.perf_counter()
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65_536)
            taken.append(time.perf_counter() - began)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"no profile: {answer[:60]!r}")
    return sorted(taken)


def count_sessions(path: Path) -> int:
    """Return the number of sessions in a database."""
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("SELECT count(*) FROM sessions").fetchone()[0])


def main() -> None:
    """Measure both services in turn; print each result and the ratios of the medians."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {"quiet": Path(folder) / "quiet.db", "pruning": Path(folder) / "pruning.db"}
        print("filling two databases …", flush=True)
        ids = {name: fill(path, 0.99 if name == "pruning" else 0) for name, path in paths.items()}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
        for _ in range(ROUNDS):
            for name, path in paths.items():
                before = count_sessions(path)
                with serving(path) as address:
                    taken = latencies(address, ids[name])
                median, tail = taken[len(taken) // 2], taken[len(taken) * 99 // 100]
                found[name].append((median, tail))
                pruned = f"{before - count_sessions(path):7} pruned"
                print(f"{name:8} p50 {median * 1000:.3f} ms  p99 {tail * 1000:.3f} ms  {pruned}", flush=True)
        for index, label in enumerate(("p50", "p99")):
            quiet, pruning = (sorted(row[index] for row in found[name])[ROUNDS // 2] for name in paths)
            print(f"{label}: pruning is {pruning / quiet:.2f} × quiet")


if __name__ == "__main__":
    main()
