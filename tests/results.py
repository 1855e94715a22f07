"""Records which tests ran, over all workers and parts of a run, and checks that they show what docs/asvs.toml claims.

``pytest --record FILE`` writes one line for each outcome. ``python -m tests.results FILE...`` then checks all parts of
a run together. Registered as a plugin in conftest.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests import evidence

OUTCOMES = "passed", "skipped", "failed", "deselected"


class Recorder:
    """Collects the outcomes of one pytest run. With pytest-xdist it runs in each worker, and in their controller."""

    def __init__(self, config: pytest.Config, path: str | None) -> None:
        self._worker_output: dict[str, Any] | None = getattr(config, "workeroutput", None)
        self._path = path
        self._tests: dict[str, set[str]] = {outcome: set() for outcome in OUTCOMES}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a skip or an error may come before the call
            self._tests[report.outcome].add(report.nodeid)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._tests["deselected"] |= {item.nodeid for item in items}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # Only workers collect tests, so only they know which ones were deselected.
        self._tests["deselected"] |= set(getattr(node, "workeroutput", {}).get("deselected", ()))

    def pytest_sessionfinish(self) -> None:
        if self._worker_output is not None:
            self._worker_output["deselected"] = sorted(self._tests["deselected"])
        elif self._path:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
            lines = [f"{outcome} {test}" for outcome in OUTCOMES for test in sorted(self._tests[outcome])]
            Path(self._path).write_text("".join(f"{line}\n" for line in lines))


def read(paths: Iterable[Path]) -> dict[str, set[str]]:
    """Return the tests of all parts by their outcome; a test that was deselected in one part may run in another."""
    tests: dict[str, set[str]] = {outcome: set() for outcome in OUTCOMES}
    for path in paths:
        for line in path.read_text().splitlines():
            outcome, _, test = line.partition(" ")
            tests[outcome].add(test)
    return tests


def left_out(tests: dict[str, set[str]]) -> set[str]:
    """Return the tests that ran in no part."""
    return tests["deselected"] - tests["passed"] - tests["failed"] - tests["skipped"]


def unshown(tests: dict[str, set[str]], named: Iterable[str]) -> list[str]:
    """Return the named tests that did not run and pass with all of their parameters."""
    passed = {test.partition("[")[0] for test in tests["passed"]}
    others = {test.partition("[")[0] for test in tests["skipped"] | tests["failed"] | left_out(tests)}
    return sorted(test for test in set(named) if test not in passed or test in others)


def main(arguments: list[str] | None = None) -> int:
    """Check the parts of a run; return 1 if a test that docs/asvs.toml names is not among those that passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.results", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="+", type=Path, help="a file that pytest --record has written")
    parser.add_argument("--strict", action="store_true", help="also fail where a test was left out or skipped")
    parsed = parser.parse_args(arguments)
    tests = read(parsed.part)
    omitted = left_out(tests) | tests["skipped"]
    print(f"{len(tests['passed'])} passed, {len(tests['failed'])} failed, {len(omitted)} left out or skipped")
    if omitted:
        print("The evidence of docs/asvs.toml was not checked, because not all tests ran.")
        return int(parsed.strict)
    missing = unshown(tests, [test for entry in evidence.load() for test in evidence.tests_of(entry)])
    for test in missing:
        print(f"docs/asvs.toml names {test}, which did not run and pass")
    return int(bool(missing or tests["failed"]))


if __name__ == "__main__":
    sys.exit(main())
