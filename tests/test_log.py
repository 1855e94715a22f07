"""The log: the form of a line, and what happens when it cannot be written."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from log import log_crash, log_event, timestamp
from tests.conftest import HERE, Service
from tests.crowd import awaited, program_with


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


# The thread that writes, in processes of their own: in this one, lines are written without it.

PIPE_BYTES = 4096  # the smallest buffer of a pipe: some 40 lines
MAX_LINES = 100  # in the queue of a service whose log nobody reads


class UnreadService(Service):
    """A service that logs every request, to a pipe that nobody reads until the test does."""

    program = program_with("log", FLOOD_LIMIT=10**6, MAX_WAITING=MAX_LINES)

    def __init__(self, folder: Path) -> None:
        os.mkfifo(folder / "log")
        self.reader = os.open(folder / "log", os.O_RDONLY | os.O_NONBLOCK)  # else it waits for the writer
        fcntl.fcntl(self.reader, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self.reader, True)
        super().__init__(folder)


@pytest.fixture
def unread(tmp_path: Path) -> Iterator[UnreadService]:
    service = UnreadService(tmp_path)
    yield service
    service.end()
    os.close(service.reader)


@pytest.mark.slow
@pytest.mark.process
def test_a_reader_that_stalls_costs_lines_and_no_answer(unread: UnreadService) -> None:
    answers: list[int] = []
    lines: list[dict[str, Any]] = []

    def read() -> None:
        with open(unread.reader, closefd=False) as stream:
            lines.extend(map(json.loads, stream))

    with requests.Session() as client:

        def ask() -> bool:
            answers.append(client.get(f"{unread.url}/profile", timeout=5).status_code)
            return any("lost" in line for line in lines)

        for _ in range(400):
            ask()
        reading = threading.Thread(target=read)
        reading.start()
        assert awaited(ask, 20)
    assert unread.end() == 0
    reading.join()
    assert set(answers) == {403}
    assert [line["event"] for line in lines if line["event"] != "authz_fail"] == ["sys_startup", "sys_shutdown"]
    lost = [line.get("lost", 0) for line in lines]  # the last line tells of what was lost after the others
    assert len(lost) - 2 + sum(lost) == len(answers)
    assert not any(lost[:MAX_LINES])


def started(stderr: int, *lines: str) -> subprocess.Popen[str]:
    """Start a program that logs."""
    code = "\n".join([f"import os, signal, sys; sys.path.insert(0, {str(HERE)!r})", "import log", *lines])
    command = [sys.executable, "-W", "ignore", "-c", code]  # Python warns of a fork beside a thread
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.fixture
def pipe() -> Iterator[tuple[Any, int]]:
    """Return a stream that reads from a pipe with the smallest buffer, and the end to write to."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with open(reader) as stream:
        yield stream, writer
    with contextlib.suppress(OSError):
        os.close(writer)


LONG_LINE = 'log.log_event("event", n=-1, text="x" * 100_000)'
MANY_LINES = "for n in range(150): log.log_event('event', n=n)"


@pytest.mark.process
@pytest.mark.parametrize("blocking", [True, False])
def test_lines_that_wait_are_written_whole_and_in_order_before_the_end(pipe: tuple[Any, int], blocking: bool) -> None:
    stream, writer = pipe
    os.set_blocking(writer, blocking)
    process = started(writer, LONG_LINE, MANY_LINES, "print('last', flush=True)")
    os.close(writer)
    with process:
        assert process.stdout
        assert process.stdout.read(4) == "last"  # nothing was read until the end has begun
        assert [json.loads(line)["n"] for line in stream] == list(range(-1, 150))
    assert process.returncode == 0


@pytest.mark.slow
@pytest.mark.process
def test_a_process_that_nobody_reads_ends_within_seconds(pipe: tuple[Any, int]) -> None:
    with started(pipe[1], MANY_LINES) as process:
        try:
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()


@pytest.mark.process
def test_a_forked_process_logs_its_own_lines_only(pipe: tuple[Any, int]) -> None:
    stream, writer = pipe
    # As if another thread held the lock at that time.
    fork = "log._lock.acquire()", "child = os.fork()", "log._lock.release() if child else signal.alarm(10)"
    process = started(writer, MANY_LINES, *fork, "log.log_event('event', n=150 if child else 'child')")
    os.close(writer)
    with process:
        numbers = [json.loads(line)["n"] for line in stream]
    assert numbers.count("child") == 1
    assert [number for number in numbers if number != "child"] == list(range(151))


@pytest.mark.process
@pytest.mark.parametrize(
    "broken",
    [
        "os.close(2)",
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 2)",
    ],
    ids=["closed", "full disk", "no reader"],
)
def test_lines_that_cannot_be_written_are_counted(tmp_path: Path, broken: str) -> None:
    kept = "os.dup2(os.open('log', os.O_WRONLY | os.O_CREAT), 2)"
    lines = [broken, "for n in range(10): log.log_event('lost')", "log._drain()", kept, "log.log_event('written')"]
    with started(subprocess.DEVNULL, f"os.chdir({str(tmp_path)!r})", *lines) as process:
        assert process.wait(timeout=10) == 0
    line = json.loads((tmp_path / "log").read_text())
    assert (line["event"], line["lost"]) == ("written", 10)


@pytest.mark.process
def test_without_a_standard_error_no_line_reaches_another_file(tmp_path: Path) -> None:
    lines = "file = os.open('data', os.O_WRONLY | os.O_CREAT)", "print(file)", "log.log_event('event')"
    code = "; ".join([f"import os, sys; sys.path.insert(0, {str(HERE)!r})", "import log", *lines])
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"2\n"
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.process
def test_where_no_thread_can_be_started_lines_are_written_without_it(pipe: tuple[Any, int]) -> None:
    stream, writer = pipe
    process = started(writer, "import threading; threading.stack_size(1 << 46)", "log.log_event('event')")
    os.close(writer)
    with process:
        assert [json.loads(line)["event"] for line in stream] == ["event"]
    assert process.returncode == 0
