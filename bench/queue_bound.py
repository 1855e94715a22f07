"""How many logins may wait? What a bound of the hashing queue does to who logs in, and to who is logged in.

``python bench/queue_bound.py`` lets 64 clients log in over and over, each from an address of its own; who is told
"busy" asks again at once, as a script would, or after the five seconds that the answer names, as it should. Takes two
minutes.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import run

CLIENTS = 64
SECONDS = 12.0
BOUNDS = 8, 32, 128
START = "import lanes, authsvc; lanes.HASHING_QUEUE = {bound}; authsvc.main([])"


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
    stopping, waits, busy = threading.Event(), list[float](), list[float]()

    def log_in(number: int) -> None:
        client = run.Client(running.port)
        while not stopping.is_set():
            began = time.perf_counter()
            while (status := client.ask("POST", *run.login(subject.login, number))[0]) == 503 and not stopping.is_set():
                busy.append(began)
                stopping.wait(pause)
            if status == 200:
                waits.append(time.perf_counter() - began)

    threads = [threading.Thread(target=log_in, args=(number,)) for number in range(1, CLIENTS + 1)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        tail = run.p99(running.latency(SECONDS))
        stopping.set()
        for thread in threads:
            thread.join()
    finally:
        running.stop()
    return (
        f"| {bound} | {'at once' if not pause else f'after {pause:g} s'} | {len(waits) / (SECONDS + 1):.1f} "
        f"| {statistics.median(waits):.1f} | {max(waits):.1f} | {len(busy):,} | {tail:.1f} |"
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
