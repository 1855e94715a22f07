"""The log: the form of a line, and what happens when it cannot be written."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from log import log_crash, log_event, timestamp


def test_a_log_line_is_ascii_json_with_a_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    log_event("user_created", user_id=7)
    line = json.loads(capsys.readouterr().err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {"event": "user_created", "user_id": 7}


def test_a_log_line_is_flushed_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log_event("event")
        assert (tmp_path / "log").read_text().endswith("}\n")


@pytest.mark.parametrize("text", ["\r\n", "\x1b[2J", "\u2028", "\x85", "\0", "é", '"}\n{"event": "forged"}', "\ud800"])
def test_a_log_line_cannot_be_broken_or_forged(capsys: pytest.CaptureFixture[str], text: str) -> None:
    log_event("event", text=text)
    printed = capsys.readouterr().err
    assert re.fullmatch(r"[ -~]+\n", printed)
    assert json.loads(printed)["text"] == text


def test_a_crash_is_logged_without_the_message_of_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        int("hunter2")
    except ValueError as error:
        log_crash(error, "0123456789abcdef")
    printed = capsys.readouterr().err
    line = json.loads(printed)
    assert (line["event"], line["error"], line["request_id"]) == ("sys_crash", "ValueError", "0123456789abcdef")
    assert line["frames"][-1].endswith(" test_a_crash_is_logged_without_the_message_of_the_error")
    assert "hunter2" not in printed


@pytest.fixture
def full_disk() -> Iterator[Any]:
    stream = open("/dev/full", "w")  # noqa: SIM115
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


def test_a_full_disk_does_not_fail_the_caller(monkeypatch: pytest.MonkeyPatch, full_disk: Any) -> None:
    monkeypatch.setattr(sys, "stderr", full_disk)
    log_event("event")


def test_a_timestamp_is_rfc_3339_in_utc() -> None:
    assert timestamp(1_800_000_000) == "2027-01-15T08:00:00Z"
