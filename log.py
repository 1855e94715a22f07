"""The log: one line of ASCII JSON for each event, on standard error.

Event names are those of OWASP's logging vocabulary. A line never holds a password, a token, a cookie or a query string.

A thread writes the lines, so that a reader that stalls delays no answer. A line that finds the queue full is lost, and
the next line tells how many were. A log that cannot be written never fails a request.
"""

import atexit
import functools
import json
import os
import queue
import select
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

FLOOD_LIMIT = 200  # lines of one event within FLOOD_WINDOW; further ones are only counted
FLOOD_WINDOW = 10.0  # seconds
SAMPLE_LIMIT = 5  # the same for an event in SAMPLED
SAMPLED = frozenset({"authz_verify_fail"})  # visitors who are not signed in cause several for each page
MAX_WAITING = 1000  # lines in the queue: five events at their limit, 0.2 MB
EXIT_TIMEOUT = 1.0  # seconds at the end of the process in which waiting lines are still written

# No standard error at all, a closed file, a broken pipe or a full disk.
UNWRITABLE = AttributeError, ValueError, OSError

direct = False  # write in the calling thread: a command does, so that its lines are in order with what it prints


def log_event(event: str, **details: Any) -> None:
    """Write one line for an event, without waiting until it is written.

    After ``FLOOD_LIMIT`` lines of one event within ``FLOOD_WINDOW``, further lines are dropped. The first line of the
    next window tells how many are ``missing``. After lines of any event were lost, the next line tells how many.
    """
    global _lost
    limit, missing = SAMPLE_LIMIT if event in SAMPLED else FLOOD_LIMIT, 0
    with _lock:
        counts[event] += 1
        start, lines = _floods.get(event, (0.0, 0))
        now = time.monotonic()
        if now - start < FLOOD_WINDOW:
            _floods[event] = start, lines + 1
            if lines >= limit:
                return
        else:
            _floods[event] = now, 1
            missing = max(0, lines - limit)
        waiting = None if direct else _queue()
        if waiting and waiting.qsize() >= MAX_WAITING:
            _lost += 1 + missing
            return
        lost, _lost = _lost, 0
    left_out = {name: count for name, count in (("missing", missing), ("lost", lost)) if count}
    written_at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    line = json.dumps({"time": written_at, "event": event, **details, **left_out}) + "\n"
    if waiting:
        waiting.put(functools.partial(_write, line.encode(), 1 + missing + lost))
        return
    with suppress(*UNWRITABLE):
        sys.stderr.write(line)
        sys.stderr.flush()


def log_crash(error: BaseException, request_id: str | None = None) -> None:
    """Log where an unexpected error was raised. Its message is left out: it may quote what a client sent."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log_event("sys_crash", request_id=request_id, error=type(error).__name__, frames=frames[-5:])


def timestamp(seconds: int) -> str:
    """Return unix seconds as an RFC 3339 time in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


counts: Counter[str] = Counter()  # of events since the start, with those that were not written

_Tasks = queue.SimpleQueue[Callable[[], object]]

_lock = threading.Lock()
_floods: dict[str, tuple[float, int]] = {}  # event: start of its window (monotonic seconds), lines in it
_waiting: _Tasks | None = None  # until the first line
_lost = 0  # lines since the last one that was put into the queue


def _queue() -> _Tasks | None:
    """Return the queue of the thread that writes, which starts now if need be; None if it cannot be started."""
    global _waiting
    if not _waiting:
        tasks: _Tasks = queue.SimpleQueue()
        with suppress(RuntimeError):  # too many threads, or the process ends
            threading.Thread(target=_work, args=(tasks,), daemon=True).start()
            _waiting = tasks
    return _waiting


def _work(tasks: _Tasks) -> None:
    while True:
        tasks.get()()


def _write(line: bytes, lines: int) -> None:
    # Not through sys.stderr: its lock, held by a thread that waits for the reader, would keep the process from ending.
    # One call for each line: lines of several processes stay whole on one pipe (POSIX write(), up to PIPE_BUF bytes).
    global _lost
    try:
        descriptor = sys.stderr.fileno()  # fails if there was none at the start: 2 may be a client's connection then
        while line:
            try:
                line = line[os.write(descriptor, line) :]
            except BlockingIOError:
                select.select((), (descriptor,), ())
    except UNWRITABLE:
        with _lock:
            _lost += lines


@atexit.register
def _drain() -> None:
    if _waiting:
        written = threading.Event()
        _waiting.put(written.set)
        written.wait(EXIT_TIMEOUT)


def _forget_writer() -> None:
    # A forked process has neither the thread nor the holder of the lock. The parent writes the lines that wait.
    global _lock, _waiting, _lost
    _lock, _waiting, _lost = threading.Lock(), None, 0


os.register_at_fork(after_in_child=_forget_writer)
