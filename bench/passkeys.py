"""Signing in with passkeys beside signing in with passwords, in one run.

``python bench/passkeys.py`` takes five minutes. Sixteen clients sign in over and over, with passkeys and passwords
in turns. Each has an address of its own. A sign-in with a passkey is two requests: the options, and the answer of the
authenticator, which the clients compute on the same cores. Beside it, nginx answers a constant: its latency shows what
the load on the machine costs any program.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.client import Client, p99, progress
from bench.subjects import Running, authsvc, constant, fill_authsvc
from tests.authenticator import Authenticator, cbor, to_text

CLIENTS = 16
OWNERS = 200
ROUNDS = 3
SECONDS = 10.0
FACTOR = 40  # of the load of passkeys to that of passwords, for the latencies
ORIGIN, RP_ID = "https://auth.example.com", "auth.example.com"

FASTEST = "sign-ins with passkeys a second, as many as it can"

Figures = dict[str, list[float]]


def enroll(database: Path) -> list[Authenticator]:
    """Give some users a passkey each, and return these."""
    owners = []
    with closing(sqlite3.connect(database)) as db, db:
        for number in range(1, OWNERS + 1):
            one = Authenticator(ORIGIN, RP_ID, handle=to_text(number.to_bytes(32, "big")))
            email = f"user{number}@example.com"
            db.execute("UPDATE users SET passkey_handle = ? WHERE email = ?", (one.handle, email))
            statement = """
                INSERT INTO passkeys (user_id, name, created_at, synced, credential_id, public_key, sign_count)
                SELECT id, 'laptop', 1, 0, ?, ?, 0 FROM users WHERE email = ?"""
            db.execute(statement, (to_text(one.credential_id), to_text(cbor(one.public_key)), email))
            owners.append(one)
    return owners


def sign_in(client: Client, owner: Authenticator, address: str) -> float:
    """Sign in; return how long the service took for the two requests, in seconds."""
    headers = {"X-Forwarded-For": address, "X-Forwarded-Proto": "https", "Content-Type": "application/json"}
    began = time.perf_counter()
    status, found, body = client.ask("POST", "/sessions/passkey/options", headers)
    took = time.perf_counter() - began
    assert status == 200, body
    cookie = next(value.partition(";")[0] for name, value in found if name == "set-cookie")
    credential = json.dumps({"credential": owner.get(json.loads(body))})
    began = time.perf_counter()
    status, _, body = client.ask("POST", "/sessions/passkey", {**headers, "Cookie": cookie}, credential)
    assert status == 200, body
    return took + time.perf_counter() - began


def storm(port: int, owners: list[Authenticator], pause: float, stop: Any, counts: Any) -> None:
    """Sign in with passkeys from a number of threads, each once in ``pause`` seconds, in a process of its own."""
    os.nice(10)  # the service has the cores first, as if the clients ran elsewhere: they compute signatures
    took: list[float] = []

    def one(number: int) -> None:
        client, mine = Client(port), owners[number::CLIENTS]
        time.sleep(pause * number / CLIENTS)  # not all at the same moment
        while not stop.is_set():
            for owner in mine:
                due = time.perf_counter() + pause
                took.append(sign_in(client, owner, f"198.18.0.{number + 1}"))
                left = due - time.perf_counter()
                if stop.wait(left) if left > 0 else stop.is_set():
                    return

    threads = [threading.Thread(target=one, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(1.0)
    began, before = time.perf_counter(), len(took)
    counts.put(None)
    stop.wait()
    during = took[before:]
    counts.put((len(during) / (time.perf_counter() - began), p99(during)))
    for thread in threads:
        thread.join()


@contextmanager
def signing_in(one: Running, owners: list[Authenticator], pause: float) -> Iterator[list[float]]:
    """Let clients sign in with passkeys. At the end the list holds their rate a second and the p99 of one, in ms."""
    context = multiprocessing.get_context("fork")
    stop, counts = context.Event(), context.Queue()
    process = context.Process(target=storm, args=(one.port, owners, pause, stop, counts))
    process.start()
    counts.get(timeout=60)
    found: list[float] = []
    yield found
    stop.set()
    found += counts.get(timeout=60)
    process.join()


def measure(one: Running, limit: Running, owners: list[Authenticator], figures: Figures) -> None:
    """Add the figures of one round. ``limit`` answers a constant."""

    def note(what: str, value: float) -> None:
        figures.setdefault(what, []).append(value)

    client = Client(one.port)
    idle = p99(one.latency(SECONDS, "/verify"))
    note("/verify, p99 idle, ms", idle)
    limit_idle = p99(limit.latency(SECONDS))
    note("nginx, a constant answer, p99 idle, ms", limit_idle)
    note("sign-in with a passkey, p99 idle, ms", p99([sign_in(client, owners[0], "198.18.1.1") for _ in range(200)]))
    with one.storm(CLIENTS) as counted:
        note("/verify, p99 while 16 sign in with passwords, ms", p99(one.latency(SECONDS, "/verify")))
    passwords = counted[0][0] / counted[0][2]
    note("sign-ins with passwords a second", passwords)
    with signing_in(one, owners[1:], 0) as found:
        time.sleep(SECONDS)
    note(FASTEST, found[0])
    note("passkeys ÷ passwords", found[0] / passwords)
    with signing_in(one, owners[1:], CLIENTS / (FACTOR * passwords)) as found:
        busy, limit_busy = p99(one.latency(SECONDS, "/verify")), p99(limit.latency(SECONDS))
    note(f"at {FACTOR} times the passwords: sign-ins with passkeys a second", found[0])
    note(f"at {FACTOR} times the passwords: sign-in with a passkey, p99, ms", found[1])
    note(f"at {FACTOR} times the passwords: /verify, p99, ms", busy)
    note(f"at {FACTOR} times the passwords: nginx, a constant answer, p99, ms", limit_busy)
    note(f"at {FACTOR} times the passwords: /verify, p99 ÷ idle", busy / idle)
    note(f"at {FACTOR} times the passwords: nginx, a constant answer, p99 ÷ idle", limit_busy / limit_idle)


def measure_all(rounds: int) -> Figures:
    """Measure so many rounds on a database of its own."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as folder:
        fill_authsvc(Path(folder), 1000)
        owners = enroll(Path(folder) / "authsvc.db")
        (Path(folder) / "limit").mkdir()
        with ExitStack() as stack:
            one = Running(authsvc(), Path(folder))
            stack.callback(one.stop)
            limit = Running(constant(), Path(folder) / "limit")
            stack.callback(limit.stop)
            for number in range(rounds):
                progress(f"passkeys beside passwords, round {number + 1} of {rounds}")
                measure(one, limit, owners, figures)
    return figures


def table(figures: Figures) -> str:
    lines = ["| passkeys beside passwords, 16 clients | median | all |", "|---|---|---|"]
    for what, values in figures.items():
        listed = ", ".join(f"{value:.3g}" for value in values)
        lines.append(f"| {what} | {statistics.median(values):.3g} | {listed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(measure_all(ROUNDS)))
