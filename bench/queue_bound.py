"""Effect of the length of the hashing queue on logins, and on requests of users who are signed in.

``python bench/queue_bound.py`` lets 160 clients sign in repeatedly, each from a network of its own, as one network gets
only some of the places. After a 503 a client retries at once, like a careless script, or after the five seconds of the
Retry-After header. It takes five minutes.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.client import Client, login, p99
from bench.subjects import HERE, Running, authsvc, fill_authsvc

CLIENTS = 160  # more than the longest queue holds
APART = 251  # between the numbers of two clients: with it they have different users and networks
BOUNDS = 8, 32, 128
FILLING = 16.0  # seconds until the longest queue is full
SECONDS = 24.0
START = "import authsvc, web.server; web.server.QUEUE = {bound}; authsvc.main([])"

Answer = tuple[float, int, float]  # time of the answer, its status, seconds since the first try of this login


def log_in_over_and_over(port: int, described: dict[str, Any], pause: float, stop: Any, answered: Any) -> None:
    """Run all clients, in a process of its own; put the answers into the queue ``answered``."""
    answers: list[Answer] = []

    def one(number: int) -> None:
        client = Client(port)
        began = time.perf_counter()
        while not stop.is_set():
            try:
                status = client.ask("POST", *login(described, number * APART))[0]
            except OSError:  # the service was stopped
                return
            now = time.perf_counter()
            answers.append((now, status, now - began))
            if status == 503:
                stop.wait(pause)
            else:
                began = now

    threads = [threading.Thread(target=one, args=(number,)) for number in range(1, CLIENTS + 1)]
    for thread in threads:
        thread.start()
    time.sleep(FILLING)
    since = time.perf_counter()
    answered.put(None)
    stop.wait()
    until = time.perf_counter()
    for thread in threads:
        thread.join()
    answered.put([answer for answer in answers if since < answer[0] <= until])


def measure(folder: Path, bound: int, pause: float) -> str:
    """Measure with one length of the queue and one pause before a retry; return a line of the table."""
    ours = authsvc()
    subject = replace(
        ours,
        start=[sys.executable, "-c", START.format(bound=bound)],
        environ=ours.environ | {"PYTHONPATH": str(HERE.parent)},
    )
    fill_authsvc(folder, 1000)
    running = Running(subject, folder)
    context = multiprocessing.get_context("spawn")
    stop, answered = context.Event(), context.Queue()
    clients = context.Process(
        target=log_in_over_and_over, args=(running.port, subject.login, pause, stop, answered), daemon=True
    )
    try:
        clients.start()
        answered.get(timeout=60)
        tail = p99(running.latency(SECONDS))
        stop.set()
    finally:
        running.stop()
    answers: list[Answer] = answered.get(timeout=60)
    clients.join()
    waits = [wait for _, status, wait in answers if status == 200]
    refusals = sum(status == 503 for _, status, _ in answers)
    return (
        f"| {bound} | {'at once' if not pause else f'after {pause:g} s'} | {len(waits) / SECONDS:.1f} "
        f"| {statistics.median(waits):.1f} | {max(waits):.1f} | {refusals:,} | {tail:.1f} |"
    )


def main() -> None:
    print("| queue | retry after a refusal | logins/s | median wait, s | longest, s | refusals | p99 of profile, ms |")
    print("|---|---|---|---|---|---|---|")
    for bound in BOUNDS:
        for pause in (0.0, 5.0):
            with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as folder:
                print(measure(Path(folder), bound, pause), flush=True)


if __name__ == "__main__":
    main()
