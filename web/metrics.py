"""Metrics: the service counts in plain numbers, and Prometheus reads them as text.

prometheus_client, of the extra ``metrics``, writes the text. It is imported when that is asked for the first time, as
it takes 60 ms and 14 MB.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import log
from engines.errors import StorageUnavailable
from settings import NO_METRICS, SettingsError, parse_listen

if TYPE_CHECKING:
    from web.server import Server

BOUNDS = 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0, 15.0  # seconds: the buckets of a histogram
SIGN_INS = ("POST", "/sessions"), ("POST", "/sessions/passkey")
OUTCOMES = {"200": "success", "401": "failed", "429": "throttled", "503": "busy"}  # of a sign-in, by its status
# These are also told while there were none: Prometheus cannot see that a count began with 1.
TOLD = "excess_rate_limit_exceeded", "mail_delayed", "mail_dropped", "sys_busy", "sys_crash", "sys_storage_unavailable"

# Kind, name, description, names of the labels, and by their values what add_metric() of prometheus_client takes.
Metric = tuple[str, str, str, tuple[str, ...], Mapping[Any, tuple[Any, ...]]]


class Histogram:
    """Counts durations. Safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        with self._lock:
            self._counts[bisect_left(BOUNDS, seconds)] += 1
            self._sum += seconds

    def read(self) -> tuple[list[tuple[str, int]], float]:
        """Return for each bound how many durations were at most as long, and the sum of all in seconds."""
        with self._lock:
            counts, total = self._counts.copy(), self._sum
        return [(str(bound), sum(counts[: n + 1])) for n, bound in enumerate([*BOUNDS, "+Inf"])], total


class Metrics:
    """Counts requests, and describes them and the rest of the service to Prometheus.

    Args:
        routes: methods and paths. "*" stands for the last part of a path.
    """

    def __init__(self, routes: Iterable[tuple[str, str]]) -> None:
        self._routes = {*routes, ("other", "other")}
        self._requests: dict[tuple[str, str, str], Histogram] = {}  # by method, route and status line
        self._watched: tuple[Mapping[str, str], Server, Callable[[], tuple[int, int]], Callable[[], int]] | None = None

    def watch(
        self,
        version: Mapping[str, str],
        server: Server,
        figures: Callable[[], tuple[int, int]],
        mails: Callable[[], int],
    ) -> None:
        """Describe these, too, from now on.

        Args:
            version: the versions of the parts of the service.
            server: its connections and queues.
            figures: returns the number of sessions and the size of the database in bytes; may raise StorageUnavailable.
            mails: returns how many mails wait.
        """
        self._watched = version, server, figures, mails

    def observe(self, method: str, path: str, status: str, seconds: float) -> None:
        """Count a request. Those for no route share one name, as anybody can make up any number of paths."""
        durations = self._requests.get((method, path, status))
        if not durations:
            known = "GET" if method == "HEAD" else method
            routes = (known, path), (known, f"{path.rpartition('/')[0]}/*"), ("other", "other")
            key = *next(route for route in routes if route in self._routes), status
            durations = self._requests.setdefault(key, Histogram())
        durations.observe(seconds)

    def listen(self, address: str) -> None:
        """Answer everybody who can reach an address, on threads of its own.

        Raises:
            SettingsError: the address cannot be bound, or prometheus_client is not installed.
        """
        host, port = parse_listen("AUTHSVC_METRICS_LISTEN", address)
        try:
            from prometheus_client import start_http_server

            start_http_server(port, str(host), self._registry())
        except ImportError:
            raise SettingsError(f"AUTHSVC_METRICS_LISTEN: {NO_METRICS}") from None
        except OSError as error:
            raise SettingsError(f"AUTHSVC_METRICS_LISTEN={address}: {os.strerror(error.errno or 0).lower()}") from None

    def text(self) -> tuple[str, bytes]:
        """Return the content type and the text of all metrics.

        Raises:
            ImportError: prometheus_client is not installed.
        """
        from prometheus_client import generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

        return CONTENT_TYPE_PLAIN_0_0_4, generate_latest(self._registry())

    def collect(self) -> Iterator[Any]:
        """Yield all metrics as prometheus_client, which calls this, takes them."""
        from prometheus_client import core

        kinds = {
            "counter": core.CounterMetricFamily,
            "gauge": core.GaugeMetricFamily,
            "histogram": core.HistogramMetricFamily,
        }
        for kind, name, text, labels, values in self.read():
            family = kinds[kind](f"authsvc_{name}", text, labels=labels)
            for key, value in values.items():
                family.add_metric(key, *value)
            yield family

    def read(self) -> Iterator[Metric]:
        """Yield all metrics."""
        requests = {(*key, line[:3]): one.read() for (*key, line), one in list(self._requests.items())}
        text = "How long requests took, without their wait for a hash. Those refused before a route took 0."
        yield "histogram", "request_seconds", text, ("method", "route", "status"), requests
        sign_ins = Counter(dict.fromkeys([*OUTCOMES.values(), "refused"], 0))
        for (*route, status), (buckets, _) in requests.items():
            if tuple(route) in SIGN_INS:
                sign_ins[OUTCOMES.get(status, "refused")] += buckets[-1][1]
        yield "counter", "sign_ins", "Sign-ins.", ("outcome",), _labelled(sign_ins)
        text = "Events, also those that the log leaves out in a flood."
        yield "counter", "events", text, ("event",), _labelled(dict.fromkeys(TOLD, 0) | log.counts)
        if not self._watched:
            return
        version, server, figures, mails = self._watched
        yield "gauge", "info", "The version.", tuple(version), {tuple(version.values()): (1,)}
        yield "gauge", "connections", "Open connections.", (), _single(server.connections)
        dispatcher = server.dispatcher
        text = "Requests that wait for a hash, by whether they probably come from the owner of the account."
        yield "gauge", "hash_queue", text, ("class",), _labelled(dispatcher.waiting)
        waits = {(name,): histogram.read() for name, histogram in dispatcher.waits.items()}
        yield "histogram", "hash_wait_seconds", "How long requests waited for a hash.", ("class",), waits
        yield "gauge", "mails_waiting", "Mails that wait to be sent, or for another try.", (), _single(mails())
        found = None
        with suppress(StorageUnavailable):
            found = figures()
        yield "gauge", "database_up", "1 if the database answers, else 0.", (), _single(int(found is not None))
        if found:
            sessions, size = found
            text = "Stored sessions, also those that have expired and are deleted within the hour."
            yield "gauge", "sessions", text, (), _single(sessions)
            yield "gauge", "database_bytes", "Size of the database.", (), _single(size)

    def _registry(self) -> Any:
        from prometheus_client import CollectorRegistry, ProcessCollector

        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)  # memory, processor time, open files
        return registry


def _labelled(values: Mapping[str, float]) -> dict[tuple[str], tuple[float]]:
    return {(label,): (value,) for label, value in values.items()}


def _single(value: float) -> dict[tuple[()], tuple[float]]:
    return {(): (value,)}
