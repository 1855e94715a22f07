"""The log: one line of ASCII JSON for each event, on standard error.

Event names are those of OWASP's logging vocabulary. A line never holds a password, a token, a cookie or a query string.
A log that cannot be written never fails a request.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

FLOOD_LIMIT = 200  # lines of one event within FLOOD_WINDOW; further ones are only counted
FLOOD_WINDOW = 10.0  # seconds


def log_event(event: str, **details: Any) -> None:
    """Write one line for an event.

    After ``FLOOD_LIMIT`` lines of one event within ``FLOOD_WINDOW``, further lines are dropped. The first line of the
    next window tells how many are ``missing``.
    """
    with _lock:
        start, lines = _floods.get(event, (0.0, 0))
        now = time.monotonic()
        if now - start < FLOOD_WINDOW:
            _floods[event] = start, lines + 1
            if lines >= FLOOD_LIMIT:
                return
        else:
            _floods[event] = now, 1
            if lines > FLOOD_LIMIT:
                details["missing"] = lines - FLOOD_LIMIT
    written_at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    with suppress(OSError, ValueError, AttributeError):  # a broken pipe, a closed file, no standard error at all
        sys.stderr.write(json.dumps({"time": written_at, "event": event, **details}) + "\n")
        sys.stderr.flush()


def log_crash(error: BaseException, request_id: str | None = None) -> None:
    """Log where an unexpected error was raised. Its message is left out: it may quote what a client sent."""
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log_event("sys_crash", request_id=request_id, error=type(error).__name__, frames=frames[-5:])


def timestamp(seconds: int) -> str:
    """Return unix seconds as an RFC 3339 time in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


_lock = threading.Lock()
_floods: dict[str, tuple[float, int]] = {}  # event: start of its window (monotonic seconds), lines in it
