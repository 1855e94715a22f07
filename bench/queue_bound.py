"""How many logins may wait? What a bound of the hashing queue does to who logs in, and to who is logged in.

``python bench/queue_bound.py`` lets 160 clients log in over and over, each from an address of its own; who is told
"busy" asks again at once, as a script would, or after the five seconds that the answer names, as it should. Takes five
minutes.
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

from bench import run

CLIENTS = 160  # more than may wait with the largest bound
BOUNDS = 8, 32, 128
FILLING = 16.0  # seconds until the longest queue is as long as it gets
SECONDS = 24.0
START = "import lanes, authsvc; lanes.HASHING_QUEUE = {bound}; authsvc.main([])"

Said = tuple[float, int, float]  # when, the status, seconds since this login was first asked for


def log_in_over_and_over(port: int, described: dict[str, Any], pause: float, stop: Any, said: Any) -> None:
    """Be all clients, in a process of its own; tell what was answered when."""
    answers: list[Said] = []

    def one(number: int) -> None:
        client = run.Client(port)
        began = time.perf_counter()
        while not stop.is_set():
            try:
                status = client.ask("POST", *run.login(described, number))[0]
            except OSError:  # it was stopped
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
    said.put(None)
    stop.wait()
    until = time.perf_counter()
    for thread in threads:
        thread.join()
    said.put([answer for answer in answers if since < answer[0] <= until])


def measure(folder: Path, bound: int, pause: float) -> str:
    """Return a line of the table."""
    ours = run.authsvc()
    subject = replace(
        ours,
        start=[sys.executable, "-c", START.format(bound=bound)],
        environ=ours.environ | {"PYTHONPATH": str(run.HERE.parent)},
    )
    run.fill_authsvc(folder, 1000)
    running = run.Running(subject, folder)
    context = multiprocessing.get_context("spawn")
    stop, said = context.Event(), context.Queue()
    clients = context.Process(
        target=log_in_over_and_over, args=(running.port, subject.login, pause, stop, said), daemon=True
    )
    try:
        clients.start()
        said.get(timeout=60)
        tail = run.p99(running.latency(SECONDS))
        stop.set()
    finally:
        running.stop()
    answers: list[Said] = said.get(timeout=60)
    clients.join()
    waits = [wait for _, status, wait in answers if status == 200]
    refusals = sum(status == 503 for _, status, _ in answers)
    return (
        f"| {bound} | {'at once' if not pause else f'after {pause:g} s'} | {len(waits) / SECONDS:.1f} "
        f"| {statistics.median(waits):.1f} | {max(waits):.1f} | {refusals:,} | {tail:.1f} |"
    )


def main() -> None:
    print(
        "| bound | who is refused asks again | logins/s | median wait, s | longest, s | refusals | p99 of profile, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for bound in BOUNDS:
        for pause in (0.0, 5.0):
            with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as folder:
                print(measure(Path(folder), bound, pause), flush=True)


if __name__ == "__main__":
    main()
