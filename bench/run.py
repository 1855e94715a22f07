"""Speed of this service compared with other services: ``make bench``, or ``python bench/run.py --help``.

Every subject is started on this machine with a database of the same size. All are measured in one run, in turns, and
the medians of several rounds count, so that a noisy machine affects all of them alike. Needs wrk; the other services
also need PyPI, npm and Node.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import guarded, passkeys
from bench.client import in_turn, p99, progress
from bench.limits import raw_bcrypt, raw_fido2, raw_look_up
from bench.report import CONNECTIONS, PASSKEYS, SIZES, Measured, Samples, bars, holds, machine, table, write
from bench.subjects import Running, Subject, authsvc, constant, hello, installed, peers

STORMS = 16, 64
CLOSE = "authsvc", "pocketbase", "nginx", "waitress"  # how the names of those begin that are measured most often
USERS = 100_000
TURNS = 3  # short turns in a round of throughput: the speed of a shared machine changes every few seconds
# The parts, and about how many minutes each takes on two cores with everything that it measures.
PARTS = {
    "throughput": 6, "latency": 7, "logins": 2, "limits": 1, "guarded": 6, "passkeys": 3, "sizes": 2, "memory": 1,
    "cold": 1,
}  # fmt: skip
INSTALLING = 2  # minutes


class Run:
    """One run: the values of each subject, under names such as ``rate 16``."""

    def __init__(self, subjects: list[Subject], folder: Path, rounds: int, seconds: float) -> None:
        self.subjects, self.folder, self.rounds, self.seconds = subjects, folder, rounds, seconds
        self.samples: Samples = {subject.name: {} for subject in subjects}
        self.served = [subject for subject in subjects if subject.login]
        self.ours = subjects[0]

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
                # Those that are compared most closely have all turns, the others half of them.
                these = [one for one in running if one.subject.name.startswith(CLOSE) or number % 4 in (0, 3)]
                for connections in CONNECTIONS:
                    progress(
                        f"requests a second, turn {number + 1} of {self.rounds * TURNS}: {connections} connections"
                    )
                    found = {}
                    for one in in_turn(these, number):
                        paths = [("rate", ""), *([("verify", "/verify")] if one.subject.name == "authsvc" else [])]
                        rates = {}
                        for what, path in in_turn(paths, number):
                            rates[what] = one.throughput(connections, self.seconds / 2, path)
                            self.note(one.subject, f"{what} {connections}", rates[what])
                        found[one.subject.name] = rates["rate"]
                        if "verify" in rates:  # from two measurements in a row, because the difference is small
                            self.note(one.subject, "cost of verify", rates["rate"] / rates["verify"])
                    if "pocketbase" in found:  # the two are neighbours, too
                        self.note(self.ours, f"rate ÷ PocketBase {connections}", found["authsvc"] / found["pocketbase"])

    def latency(self) -> None:
        """Measure p99. One round of the other services takes minutes, and shows enough."""
        for number in range(self.rounds + 1):
            for subject in self.served if not number else [self.ours]:
                with self.started([subject], USERS) as (one,):
                    for path, what in ("", "p99"), ("/verify", "p99 of verify"):
                        if not path or subject is self.ours:
                            progress(f"latency, round {number + 1} of {self.rounds + 1}: {subject.name} {path}")
                            self._latency(one, path, what)

    def _latency(self, one: Running, path: str, what: str) -> None:
        subject = one.subject
        idle = p99(one.latency(self.seconds * 2, path))
        self.note(subject, f"{what} idle", idle)
        for clients in STORMS:
            with one.storm(clients) as counted:
                busy = p99(one.latency(self.seconds * 2, path))
            (good, other, seconds) = counted[0]
            self.note(subject, f"{what} {clients}", busy)
            self.note(subject, f"{what} {clients} ÷ idle", busy / idle)
            self.note(subject, f"logins {clients}", good / seconds)
            self.note(subject, f"refused {clients}", other / seconds)

    def logins(self) -> None:
        before = raw_bcrypt(self.seconds * 2)
        for number in range(self.rounds * 2):
            progress(f"logins against raw bcrypt, turn {number + 1}")
            with self.started([self.ours], USERS) as (one,), one.storm(8) as counted:
                time.sleep(self.seconds * 4)  # about a hundred logins, so that those at either end matter little
            good, _, seconds = counted[0]
            after = raw_bcrypt(self.seconds * 2)
            raw, before = statistics.mean([before, after]), after
            self.note(self.ours, "raw bcrypt", raw)
            self.note(self.ours, "logins", good / seconds)
            self.note(self.ours, "logins ÷ raw bcrypt", good / seconds / raw)

    def limits(self) -> None:
        """Measure what is not a server of its own; nginx and bare waitress are among the subjects."""
        with self.started([self.ours], USERS) as (one,):
            for number in range(self.rounds * 2):
                progress(f"limits, turn {number + 1} of {self.rounds * 2}")
                self.note(self.ours, "raw look-up", raw_look_up(one.folder / "authsvc.db", self.seconds / 2))
                self.note(self.ours, "raw fido2", raw_fido2(self.seconds / 2))

    def passkeys(self) -> None:
        for what, values in passkeys.measure_all(self.rounds).items():
            for value in values:
                self.note(self.ours, f"{PASSKEYS}{what}", value)

    def sizes(self) -> None:
        compared = [subject for subject in self.subjects if subject.name in ("authsvc", "original")]
        with ExitStack() as stack:
            running = [(users, one) for users in SIZES for one in stack.enter_context(self.started(compared, users))]
            running.sort(key=lambda pair: pair[1].subject.name)
            for number in range(self.rounds * TURNS):
                progress(f"up to {SIZES[-1]:,} users, turn {number + 1} of {self.rounds * TURNS}")
                rates = {}
                for users, one in in_turn(running, number):
                    rates[users, one.subject.name] = one.throughput(16, self.seconds / 2)
                    self.note(one.subject, f"rate at {users}", rates[users, one.subject.name])
                ratio = rates[SIZES[-1], "authsvc"] / rates[SIZES[0], "authsvc"]
                self.note(self.ours, "rate, most ÷ fewest", ratio)

    def guarded(self) -> None:
        def note(name: str, what: str, value: float) -> None:
            self.samples.setdefault(name, {}).setdefault(what, []).append(value)

        with self.started(guarded.guarding(self.subjects), USERS) as running:
            guarded.measure(running, self.folder / "guarded", self.rounds * 3, self.seconds / 4, note)

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


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench/run.py", description=(__doc__ or "").partition("\n\n")[0],
        epilog="Exit code: 0 every bar is reached; 1 a bar is missed; 2 wrong usage, or a program is missing.",
    )  # fmt: skip
    parser.add_argument(
        "--only", default="", help="other services to measure, separated by commas; - for none (default: all)"
    )
    parser.add_argument("--parts", default="", help=f"{','.join(PARTS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, of which the medians are taken (2)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="duration of one measurement (4); of throughput half as long"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the table into bench/README.md, and results.json and results.svg"
    )
    given = parser.parse_args()
    parts = given.parts.split(",") if given.parts else list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}")
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if missing := [name for name in ("wrk", "nginx") if not shutil.which(name)]:
        parser.error(f"missing: apt-get install {' '.join(missing)}")
    if "guarded" in parts and "caddy" not in guarded.programs():
        parser.error("Caddy is missing: make .venv/proxies")
    began = time.time()
    expected = INSTALLING + sum(PARTS[part] for part in parts)
    with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as folder:
        only = [] if given.only in ("", "-") else given.only.split(",")
        found = [] if given.only == "-" else list(peers(only, Path(folder)))
        ours = authsvc()
        ours.packages, ours.installed = installed("bottle", "bcrypt", "waitress")
        subjects = [ours, *found, constant(), *(hello(threads) for threads in (1, 4, 16))]
        subjects.sort(key=lambda one: not one.name.startswith(CLOSE))  # neighbours are measured after each other
        one = Run(subjects, Path(folder), given.rounds, given.seconds)
        for number, part in enumerate(parts):
            passed = (time.time() - began) / 60
            of = f"part {number + 1} of {len(parts)}, minute {passed:.0f} of about {expected}"
            progress(f"{part}: about {PARTS[part]} minutes, {of}")
            getattr(one, part)()
    results = one.results()
    text = table(subjects, results)
    print(text)
    if given.write:
        minutes, command = (time.time() - began) / 60, " ".join(["bench/run.py", *sys.argv[1:]])
        when = f"{datetime.date.today()}, {machine()}; {minutes:.0f} minutes, `{command}`."
        write(when, text, results, one.samples)
    return int(not all(holds(bar, figure) for bar, figure in bars(results).items()))


if __name__ == "__main__":
    sys.exit(main())
