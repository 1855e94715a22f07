"""Request scheduling on waitress: fast requests on the I/O thread, password hashing on a thread pool.

A password hash costs a quarter of a second of a core by design, everything else a fraction of a millisecond. On one
pool of threads the fast requests would wait behind the slow ones. So there are three places where a request may run:

- **The I/O thread** of waitress answers GET and HEAD requests and refusals itself, without a hand-off. Nothing on it
  may write: a locked database must not stop the thread that serves everybody.
- **The hashing threads** run the routes that may hash: as many threads as cores, at niceness 10, so that they yield to
  the others. Requests wait in a queue (web/hash_queue.py). Those that probably come from the owner of an account go
  before those of strangers. In each class networks take turns. Where the queue is full, the network with the most
  requests loses one, which gets 503. So does a request that has waited 15 s.
- **Two writer threads** run all other methods, and one more runs writes in the background.

Built on waitress's dispatcher and channel, which it keeps private: hence ``waitress<4`` in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, ClassVar
from wsgiref.types import WSGIApplication, WSGIEnvironment

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error, build_http_date

from addresses import client_address, is_private_peer, network_path
from log import log_crash, log_event
from settings import Settings
from web.forms import MAX_BODY_BYTES
from web.hash_queue import HashQueue
from web.parser import StrictParser
from web.responses import MESSAGES, RETRY_AFTER, complete_error, new_request_id

HASHING_QUEUE = 64  # requests of each of the two classes; 2 * 64 hashes of 0.24 s on two cores take the 15 s below
DEVELOPMENT_HASHING_QUEUE = 128  # the same in development, where nearly all requests are of one class
HASHING_WAIT = 15.0  # seconds in the queue, then 503
HASHING_NICENESS = 10
WRITERS = 2  # threads; SQLite writes one at a time, meanwhile the other parses a form or sends an answer
MAX_BACKGROUND_WRITES = 1000  # waiting; further ones are dropped, and the next request asks for them again
BACKGROUND_PAUSE = 0.001  # seconds before each of them, in which the answer that caused it is sent
SHUTDOWN_TIMEOUT = 8.0  # seconds from SIGTERM to the end of the last answer

MAX_DISCARD_BYTES = 4 * 2**20  # of a body that are read and thrown away after a refusal
MAX_HEADER_BYTES = 16_384  # with the request line
MAX_CONNECTIONS = 512
REQUEST_TIMEOUT = 30.0  # seconds for a whole request to arrive: one byte a second must not hold a connection
IDLE_TIMEOUT = 30  # seconds that a connection may be silent


Rank = Callable[[WSGIEnvironment], tuple[bool, str]]


class Busy(Error):  # type: ignore[misc]
    """The ``error`` of a request that cannot be served now."""

    code = 503
    reason = "Service Unavailable"


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers a request that never reached the application: JSON, with the same headers as every other answer."""

    def execute(self) -> None:
        error = self.request.error
        message = MESSAGES.get(error.code, "internal error")
        headers, body = complete_error(message, new_request_id(), self.channel.production)
        self.status = f"{error.code} {error.reason}"
        self.response_headers += headers
        if error.code == Busy.code:
            self.response_headers.append(("Retry-After", str(RETRY_AFTER)))
        self.set_close_on_finish()
        self.channel.discard = MAX_DISCARD_BYTES
        self.content_length = len(body)
        self.write(body)


class PlainTask(WSGITask):  # type: ignore[misc]
    """Writes an answer in one piece, as the application gives it. The application is ours and states the length.

    waitress's own task checks, capitalizes and sorts the headers of each answer, sends head and body apart, and puts
    keys into the environment that we never read. Together that takes as long as looking up a session.
    """

    # PEP 3333, environ Variables: those that are the same for every request.
    CONSTANT_ENVIRON: ClassVar[dict[str, Any]] = {
        "SCRIPT_NAME": "",
        "wsgi.version": (1, 0),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }

    def get_environment(self) -> WSGIEnvironment:
        """Return the WSGI environment of the request. It is built once: a request that hashes needs it twice."""
        if not hasattr(self.request, "environ"):
            self.request.environ = self._build_environment()
        environ: WSGIEnvironment = self.request.environ
        return environ

    def _build_environment(self) -> WSGIEnvironment:
        request, channel = self.request, self.channel
        headers = dict(request.headers)
        environ = {
            **self.CONSTANT_ENVIRON,
            "CONTENT_LENGTH": headers.pop("CONTENT_LENGTH", ""),
            "CONTENT_TYPE": headers.pop("CONTENT_TYPE", ""),
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "REMOTE_ADDR": channel.addr[0],
            "REQUEST_METHOD": request.command,
            "REQUEST_URI": request.request_uri,
            "SERVER_NAME": channel.server.server_name,
            "SERVER_PORT": str(channel.server.effective_port),
            "SERVER_PROTOCOL": f"HTTP/{self.version}",
            "wsgi.errors": sys.stderr,
            "wsgi.input": request.get_body_stream(),
            "wsgi.url_scheme": request.url_scheme,
        }
        for name, value in headers.items():
            environ[f"HTTP_{name}"] = value
        return environ

    def execute(self) -> None:
        if self.version == "1.0" or self.request.headers.get("CONNECTION", "").lower() == "close":
            super().execute()
            return
        body = b"".join(self.channel.server.application(self.get_environment(), self._begin))
        lines = "".join([f"{name}: {value}\r\n" for name, value in self.response_headers])
        head = f"HTTP/1.1 {self.status}\r\n{lines}Date: {_date(int(self.start_time))}\r\n\r\n"
        self.wrote_header = True
        self.channel.write_soon(head.encode("latin-1") + body)

    def _begin(self, status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
        self.status, self.response_headers = status, headers


_date = functools.lru_cache(maxsize=2)(build_http_date)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection. Fast requests are served by the thread that read them."""

    parser_class = StrictParser
    task_class = PlainTask
    error_task_class = JSONErrorTask
    production = False
    answers: ClassVar[list[tuple[Channel, bytes]]]  # of one iteration of the loop, sent at its end
    serve_now = False  # set by Dispatcher.add_task
    discard = 0  # bytes to read and throw away after the last answer
    lingering = False
    close_when_flushed: bool = False  # set by waitress

    def received(self, data: bytes) -> bool:
        # waitress calls add_task in here while it holds requests_lock, which service() takes as well. So add_task sets
        # a flag, and the request is served once the lock is free.
        accepted: bool = super().received(data)
        if self.serve_now:
            self.service()
            self.serve_now = False
        return accepted

    def write_soon(self, data: bytes) -> int:
        # Held back only where nothing can overtake it: neither the answer to a later request nor a 100 Continue.
        if self.serve_now and len(self.requests) == 1 and self.request is None:
            self.answers.append((self, data))
            return len(data)
        return int(super().write_soon(data))

    def send_now(self, data: bytes) -> None:
        """Send an answer; waitress sends later what the client does not accept yet."""
        if self.connected and not self.total_outbufs_len:
            try:
                data = data[self.send(data) :]  # closes the channel if the client is gone
            except OSError:
                self.will_close = True
                return
        if data and self.connected:
            super().write_soon(data)

    # A client whose body we refuse may still be sending it. Closing a socket with unread bytes resets the connection,
    # and the reset can overtake our answer. So shut down our side only, and keep reading for a while (RFC 9112 9.6).

    def handle_write(self) -> None:
        if self.discard and self.close_when_flushed and not self.total_outbufs_len and not self.will_close:
            self.close_when_flushed = False
            self.lingering = True
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        else:
            super().handle_write()

    def readable(self) -> bool:
        return self.lingering or bool(super().readable())

    def handle_read(self) -> None:
        if not self.lingering:
            super().handle_read()
        else:
            self.discard -= len(self.recv(65_536))  # closes the channel at the end of the stream
            self.will_close = self.discard <= 0


class Dispatcher:
    """waitress's dispatcher: decides on which thread a request runs. Construct it on the thread that will serve.

    Args:
        hashing_routes: the routes that may hash, as (method, path).
        cores: the number of hashing threads.
        settings: the settings of the service.
        rank: returns whether a request that may hash goes before others, and a text that stands for its account ("" if
            unknown). It is given the WSGI environment and may read the body. It is called on several threads, one of
            which is the I/O thread, so it must not write.
    """

    def __init__(self, hashing_routes: Collection[tuple[str, str]], cores: int, settings: Settings, rank: Rank) -> None:
        self._hashing_routes = hashing_routes
        self.settings = settings
        self._rank = rank
        self._io_thread = threading.get_ident()
        limit = HASHING_QUEUE if settings.production else DEVELOPMENT_HASHING_QUEUE
        self._hashing_queue: HashQueue[tuple[float, Channel]] = HashQueue(limit)
        self._writing_queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        # A queue of their own: they pile up while the database is locked, and a client's write must not wait for them.
        self._background_queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopping = False
        writers = [(_work, self._writing_queue)] * WRITERS + [(_work, self._background_queue, BACKGROUND_PAUSE)]
        for target, *arguments in [(self._hash,)] * cores + writers:
            threading.Thread(target=target, args=arguments, daemon=True).start()

    def add_task(self, channel: Channel) -> None:
        """Schedule the first request of a connection. Called by waitress, which holds requests_lock."""
        request = channel.requests[0]
        if not request.error and (request.command, request.path) in self._hashing_routes:
            if not self._stopping and self._queue(channel):
                return
            request.error = Busy("")
        fast = request.error or request.command in ("GET", "HEAD")
        # One request of a connection at a time: hundreds may arrive pipelined in one read, and meanwhile this thread
        # would serve nobody else, nor drain the pipe by which waitress wakes it.
        if fast and self.is_io_thread() and not channel.serve_now:
            channel.serve_now = True
        else:
            self._writing_queue.put(channel.service)

    def is_io_thread(self) -> bool:
        """Return whether the caller runs on the I/O thread."""
        return threading.get_ident() == self._io_thread

    def run_in_background(self, write: Callable[[], object]) -> None:
        """Run a write soon, or drop it when too many are waiting."""
        if self._background_queue.qsize() < MAX_BACKGROUND_WRITES:
            self._background_queue.put(write)

    def finish(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the background writes; return whether all are done."""
        done = threading.Event()
        self._background_queue.put(done.set)
        return done.wait(timeout)

    def drain(self) -> None:
        """Answer 503 to all requests that wait for a hash, and to all later ones. Call it on the I/O thread."""
        self._stopping = True
        for _, channel in self._hashing_queue.remove(lambda _: True):
            _refuse(channel)

    def refuse_late(self) -> None:
        """Answer 503 to requests that have waited too long for a hash."""
        latest = time.monotonic() - HASHING_WAIT
        for _, channel in self._hashing_queue.remove(lambda waiting: waiting[0] < latest):
            self._writing_queue.put(functools.partial(_refuse, channel))

    def _queue(self, channel: Channel) -> bool:
        """Let a request wait for a hash; return False if it lost its place at once."""
        environ = PlainTask(channel, channel.requests[0]).get_environment()
        preferred, account = (False, "") if self._hashing_queue.serves_at_once() else self._rank_safely(environ)
        peer, proxy = channel.addr[0], self.settings.trusted_proxy
        client = client_address(peer, environ.get("HTTP_X_FORWARDED_FOR"), proxy)
        # Behind a proxy that is not trusted, all clients have its address. In development all are on this machine.
        limited = self.settings.production and (bool(proxy) or not is_private_peer(peer))
        path = (*network_path(client), account)
        lost = self._hashing_queue.put((time.monotonic(), channel), path, preferred=preferred, limited=limited)
        displaced = [other for _, other in lost if other is not channel]
        for other in displaced:  # not here: waitress holds a lock of this connection, and answering takes another one's
            self._writing_queue.put(functools.partial(_refuse, other))
        return len(displaced) == len(lost)

    def _rank_safely(self, environ: WSGIEnvironment) -> tuple[bool, str]:
        try:
            return self._rank(environ)
        except Exception as error:
            log_crash(error)
            return False, ""
        finally:
            environ["wsgi.input"].seek(0)  # the route reads the body again

    def _hash(self) -> None:
        if sys.platform == "linux":  # there niceness is per thread
            with contextlib.suppress(OSError):  # a sandbox may refuse it: then fast requests get less of the processor
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), HASHING_NICENESS)
        while True:
            since, channel = self._hashing_queue.get()
            too_late = time.monotonic() - since > HASHING_WAIT
            _run(functools.partial(_refuse, channel) if too_late else channel.service)


class Server:
    """Serves an application on one listening socket, and shuts down without losing an answer."""

    def __init__(self, application: WSGIApplication, listener: socket.socket, dispatcher: Dispatcher) -> None:
        logging.getLogger("waitress").addHandler(_LogHandler())
        self._dispatcher = dispatcher
        self._stopping = False
        self._answers: list[tuple[Channel, bytes]] = []
        self._server = create_server(
            application,
            sockets=[listener],
            _dispatcher=dispatcher,
            asyncore_use_poll=True,  # select() cannot see past descriptor 1023
            channel_timeout=IDLE_TIMEOUT,
            cleanup_interval=5,
            clear_untrusted_proxy_headers=False,  # is_direct() must see them; nothing else believes them
            connection_limit=MAX_CONNECTIONS,
            ident=None,
            max_request_body_size=MAX_BODY_BYTES + 1,  # waitress refuses a body of this size
            max_request_header_size=MAX_HEADER_BYTES,
        )
        # waitress wakes the I/O thread after each answer. On that thread itself there is nothing to wake.
        self._wake = self._server.pull_trigger
        self._server.pull_trigger = lambda: None if dispatcher.is_io_thread() else self._wake()
        own = {"production": dispatcher.settings.production, "answers": self._answers}
        self._server.channel_class = type("Channel", (Channel,), own)

    def stop(self, number: int, _frame: object) -> None:
        """Ask the loop to end. A signal handler: a second signal of the same kind kills the process."""
        signal.signal(number, signal.SIG_DFL)
        self._stopping = True
        self._wake()

    def run(self) -> bool:
        """Serve until stopped, then finish open requests within 8 s; return whether all were finished."""
        checked = time.monotonic()
        while not self._stopping:
            self._run_loop_once(1.0)
            self._make_room()
            if time.monotonic() - checked > 1.0:
                checked = time.monotonic()
                self._close_slow(checked - REQUEST_TIMEOUT)
                self._dispatcher.refuse_late()
        wasyncore.dispatcher.close(self._server)  # no new connections
        self._dispatcher.drain()
        end = time.monotonic() + SHUTDOWN_TIMEOUT
        while self._in_hand() and time.monotonic() < end:
            self._run_loop_once(0.05)
        return not self._in_hand() and self._dispatcher.finish(max(0.0, end - time.monotonic()))

    def _close_slow(self, cutoff: float) -> None:
        for channel in list(self._server.active_channels.values()):  # another thread may close one meanwhile
            if channel.request is not None and channel.request.began < cutoff:
                channel.will_close = True  # without an answer: no real client takes 30 s for 32 KiB

    def _make_room(self) -> None:
        # At its limit waitress accepts no connection, so silent ones would keep everybody out until they time out.
        if len(self._server._map) >= MAX_CONNECTIONS:  # waitress counts them in the same way
            channels = list(self._server.active_channels.values())
            silent = [one for one in channels if not (one.requests or one.request or one.total_outbufs_len)]
            # First those that never sent a request, then those whose last one is longest ago.
            silent.sort(key=lambda one: (one.last_activity > one.creation_time, one.last_activity))
            for channel in silent[: MAX_CONNECTIONS // 4]:
                channel.will_close = True

    def _run_loop_once(self, timeout: float) -> None:
        wasyncore.loop(timeout, use_poll=True, map=self._server._map, count=1)
        # All together: sent one by one, each would wake a sleeping client, which takes as long as looking up a session.
        for channel, data in self._answers:
            channel.send_now(data)
        self._answers.clear()

    def _in_hand(self) -> bool:
        channels = list(self._server.active_channels.values())
        return any(channel.requests or channel.total_outbufs_len for channel in channels)


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            log_crash(record.exc_info[1])
        else:
            log_event("sys_server", level=record.levelname.lower(), message=str(record.msg))


def _refuse(channel: Any) -> None:
    channel.requests[0].error = Busy("")
    channel.service()


def _work(tasks: queue.SimpleQueue[Callable[[], object]], pause: float = 0.0) -> None:
    while True:
        task = tasks.get()
        time.sleep(pause)
        _run(task)


def _run(task: Callable[[], object]) -> None:
    try:
        task()
    except Exception as error:
        log_crash(error)
