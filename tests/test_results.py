"""The record of which tests ran, and the check of the evidence over all parts of a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import evidence, results
from tests.conftest import HERE, clean_environ, left_out

NAMED = "tests/test_x.py::test_named"


def part(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def _one_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "load", lambda: [{"test": NAMED}])


@pytest.mark.parametrize(
    ("first", "second", "strict", "code"),
    [
        ([f"passed {NAMED}"], [], True, 0),
        ([f"passed {NAMED}[a]", f"passed {NAMED}[b]"], [], True, 0),
        ([f"deselected {NAMED}"], [f"passed {NAMED}"], True, 0),
        ([f"passed {NAMED}", "deselected y"], ["passed y"], True, 0),
        ([], ["passed y"], False, 1),
        ([f"failed {NAMED}"], [], False, 1),
        ([f"passed {NAMED}[a]", f"failed {NAMED}[b]"], [], False, 1),
        ([f"passed {NAMED}", "failed y"], [], False, 1),
        ([f"deselected {NAMED}"], [f"deselected {NAMED}"], False, 0),
        ([f"deselected {NAMED}"], [f"deselected {NAMED}"], True, 1),
        ([f"passed {NAMED}", "deselected y"], [], False, 0),
        ([f"passed {NAMED}", "deselected y"], [], True, 1),
        ([f"passed {NAMED}", "skipped y"], [], True, 1),
        ([f"passed {NAMED}[a]", f"skipped {NAMED}[b]"], [], True, 1),
    ],
)
def test_the_parts_are_checked_together(
    tmp_path: Path, first: list[str], second: list[str], strict: bool, code: int
) -> None:
    parts = [str(part(tmp_path / "first", *first)), str(part(tmp_path / "second", *second))]
    assert results.main([*parts, *["--strict"] * strict]) == code


def test_a_run_that_leaves_tests_out_says_that_the_check_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert results.main([str(part(tmp_path / "only", f"passed {NAMED}", "deselected y"))]) == 0
    assert "was not checked, because not all tests ran" in capsys.readouterr().out


def test_a_named_test_that_did_not_pass_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(part(tmp_path / "only", "passed y"))]) == 1
    assert f"docs/asvs.toml names {NAMED}, which did not run and pass" in capsys.readouterr().out


SUITE = """
import pytest

@pytest.mark.parametrize("number", [1, 2, 3])
def test_passes(number): pass

def test_fails(): assert False

@pytest.mark.skip
def test_is_skipped(): pass

@pytest.fixture
def broken(): assert False

def test_has_a_broken_fixture(broken): pass

@pytest.mark.xdist_group("x")
def test_is_left_out(): pass
"""


@pytest.mark.process
@pytest.mark.parametrize("workers", ["0", "2"])
def test_each_outcome_is_recorded_once_over_all_workers(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_x.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text(
        "from tests.results import Recorder\n"
        "def pytest_configure(config):\n"
        "    config.pluginmanager.register(Recorder(config, 'record'))\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", workers, "-k", "not left_out"]
    # The other plugins take a second to import, in each worker.
    environ = clean_environ() | {"PYTHONPATH": str(HERE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, timeout=60)
    assert (tmp_path / "record").read_text().splitlines() == [
        "passed test_x.py::test_passes[1]",
        "passed test_x.py::test_passes[2]",
        "passed test_x.py::test_passes[3]",
        "skipped test_x.py::test_is_skipped",
        "failed test_x.py::test_fails",
        "failed test_x.py::test_has_a_broken_fixture",
        "deselected test_x.py::test_is_left_out",
    ]


def test_only_a_file_that_was_asked_for_is_said_to_be_left_out() -> None:
    names = ["test_pages.py", "long/test_half_sent.py"]
    assert left_out(["tests"], names) == left_out(["."], names) == names
    assert left_out(["tests/test_totp.py", "tests/test_pages.py::test_a"], names) == ["test_pages.py"]
    assert left_out(["test_totp.py", "long"], names, HERE / "tests") == ["long/test_half_sent.py"]
    assert left_out(["tests/test_totp.py"], names) == []
