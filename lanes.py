"""The lanes: which request runs where.

A hash costs a quarter of a second of a core by design, everything else a fraction of a millisecond. On one pool
of threads the quick would wait behind the slow, so there are two lanes, and a side road for what writes:

- **quick**: GET and HEAD, and whatever is refused, on waitress's I/O thread itself, with no hand-off. Nothing
  there may write: a locked database must not stop the thread that serves everybody.
- **hashing**: the routes named so, on as many threads as cores, at niceness 10 so that they yield to the others.
  Requests wait in a queue, not on threads: for one too many the answer is 503 at once, else after 15 s.
- **writing**: all other methods, on two ordinary threads; and on one more the writes that nobody waits for.

Built on waitress's dispatcher and channel, which it keeps private: hence ``waitress<4`` in pyproject.toml.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error, build_http_date

import guard
import throttle
from settings import Settings

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication, WSGIEnvironment

HASHING_QUEUE = 128  # requests; 128 × 0.24 s on two cores is the 15 s below
HASHING_WAIT = 15.0  # seconds
HASHING_NICENESS = 10
HASHING_PLACES = 4  # of the queue for one client address, in production
WRITERS = 2  # threads; SQLite writes one at a time, meanwhile the other reads a form or sends an answer
DEFERRED = 1000  # writes that nobody waits for; past that they are dropped and come again with the next request
DRAIN = 8.0  # seconds from SIGTERM to the end of the last answer

LARGEST_BODY = 16_384  # bytes
LARGEST_REST = 4 * 2**20  # bytes that are read and thrown away after a refusal
LARGEST_HEADER = 16_384  # bytes, with the request line
CONNECTIONS = 512
DEADLINE = 30.0  # seconds for a whole request to arrive; one byte a second would otherwise hold a connection for ever
IDLE = 30  # seconds that a connection may say nothing

# Headers that must not be given twice: which one counts, differs between us and a proxy.
SINGLE = (b"host", b"content-length", b"transfer-encoding", b"content-type", b"cookie", b"origin", b"x-forwarded-proto")

# What a client is told of an error that never reached the application. waitress's own texts quote the request.
MESSAGES = {
    400: "malformed request",
    413: "request body too large",
    431: "request headers too large",
    501: "transfer encoding not supported",
    503: "busy, try again later",
}


class Busy(Error):  # type: ignore[misc]
    """What stands in a request's ``error`` when there is no room to serve it."""

    code = 503
    reason = "Service Unavailable"


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers what never reached the application as every other answer: JSON, with the same headers."""

    def execute(self) -> None:
        error = self.request.error
        body = guard.json_body({"message": MESSAGES.get(error.code, "internal error")})
        self.status = f"{error.code} {error.reason}"
        self.response_headers += guard.json_headers(body) + guard.common_headers(
            guard.new_request_id(), self.channel.production
        )
        if error.code == Busy.code:
            self.response_headers.append(("Retry-After", str(guard.RETRY_AFTER)))
        self.set_close_on_finish()
        self.channel.rest = LARGEST_REST
        self.content_length = len(body)
        self.write(body)


class PlainTask(WSGITask):  # type: ignore[misc]
    """Writes an answer as the application gives it, in one piece; the application is ours and says how long it is.

    waitress's own tells the application what ours never asks; it checks, capitalises and sorts the headers of each
    answer, and sends its body apart from them. Together that takes as long as to look up a session.
    """

    # PEP 3333, environ Variables: what is the same for every request.
    SAME: ClassVar[dict[str, Any]] = {
        "SCRIPT_NAME": "",
        "wsgi.version": (1, 0),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": True,
    }

    def get_environment(self) -> WSGIEnvironment:
        """Return what the application is told of the request."""
        request, channel = self.request, self.channel
        headers = dict(request.headers)
        environ = {
            **self.SAME,
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


# A request that nobody could read in another way, as nearly all are: ASCII, nothing encoded, folded or empty. The
# quantifiers are possessive: what does not match at once never will.
PLAIN = re.compile(
    r"(?P<command>[A-Z]++) (?P<uri>(?P<path>/[\w/.~-]*+)(?:\?(?P<query>[!\"$-~]*+))?+) HTTP/1\.1\r\n"
    r"(?P<fields>(?:[A-Za-z0-9-]++: [!-~]++(?: ++[!-~]++)*+\r\n)++)\r\n",
    re.ASCII,
)
BODY = frozenset({"CONTENT_LENGTH", "TRANSFER_ENCODING"})  # fields that only a request with a body has


class StrictParser(HTTPRequestParser):  # type: ignore[misc]
    """Refuses what a proxy in front may read in another way, and so could be used to smuggle a request past it.

    waitress 3.0.2 takes all of these (RFC 9112: 2.3, 3.2, 5.2, 6.1, 6.3; RFC 9110: 5.3). Its next release is to
    refuse a length beside an encoding, a repeated encoding and a repeated Host: then look what is left to do here.

    What is plain is read here, in a third of the time or less; waitress reads the rest, so whatever is in doubt.
    """

    def __init__(self, adj: Any) -> None:
        super().__init__(adj)
        self.began = time.monotonic()

    def received(self, data: bytes) -> int:
        consumed: int = super().received(data)
        if self.error or self.body_rcv is None:  # or it would say 100 Continue and wait for no body
            self.expect_continue = False
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        if not self._read_plain(header_plus.decode("latin-1")):
            self._read_strictly(header_plus)

    def _read_plain(self, header: str) -> bool:
        plain = PLAIN.fullmatch(header)
        if not plain:
            return False
        *start, fields = plain.groups("")
        lines = [line.partition(": ") for line in fields.split("\r\n")[:-1]]
        headers = {name.upper().replace("-", "_"): value for name, _, value in lines}
        if len(headers) < len(lines) or "HOST" not in headers or not BODY.isdisjoint(headers):
            return False
        self.command, self.request_uri, self.path, self.query = start
        self.version, self.url_scheme, self.headers = "1.1", self.adj.url_scheme, headers
        return True

    def _read_strictly(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # from urlsplit("http://["): else the connection closes without an answer
            raise ParsingError("malformed request") from error
        if not header_plus.partition(b"\r\n")[0].endswith((b" HTTP/1.0", b" HTTP/1.1")):
            raise ParsingError("unknown version")
        if b"\r\n " in header_plus or b"\r\n\t" in header_plus:
            raise ParsingError("folded header")
        if self.version == "1.1" and "HOST" not in self.headers:
            raise ParsingError("no Host")
        lines = [line.lower() for line in header_plus.split(b"\r\n")[1:]]
        names = [line.partition(b":")[0] for line in lines]
        if any(names.count(name) > 1 for name in SINGLE):
            raise ParsingError("repeated header")
        if b"transfer-encoding" in names:
            encoding = lines[names.index(b"transfer-encoding")].partition(b":")[2].strip(b" \t")
            if self.version == "1.0" or b"content-length" in names or encoding != b"chunked":
                raise ParsingError("ambiguous length")


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection whose quick requests are served by the thread that read them."""

    parser_class = StrictParser
    task_class = PlainTask
    error_task_class = JSONErrorTask
    production = False
    answers: ClassVar[list[tuple[Channel, bytes]]]  # of one turn of the loop, to be sent at its end
    serve_now = False  # set by Lanes.add_task
    rest = 0  # bytes that may still come when the last answer is sent
    lingering = False
    close_when_flushed: bool = False  # set by waitress

    def received(self, data: bytes) -> bool:
        # waitress calls add_task from in here while it holds requests_lock, which service() takes as well: so
        # add_task leaves word, and the request is served when the lock is free.
        accepted: bool = super().received(data)
        if self.serve_now:
            self.service()
            self.serve_now = False
        return accepted

    def write_soon(self, data: bytes) -> int:
        # Held back only if nothing could overtake it: neither the answer to a next request nor a 100 Continue.
        if self.serve_now and len(self.requests) == 1 and self.request is None:
            self.answers.append((self, data))
            return len(data)
        return int(super().write_soon(data))

    def send_now(self, data: bytes) -> None:
        """Send an answer, and leave to waitress what the client does not take yet."""
        if self.connected and not self.total_outbufs_len:
            try:
                data = data[self.send(data) :]  # closes by itself where the client is gone
            except OSError:
                self.will_close = True
                return
        if data and self.connected:
            super().write_soon(data)

    # Who sends a body that we refuse may still be sending. To close a socket with bytes unread resets the connection,
    # and the reset can overtake our answer: so end our side only, and read on for a while (RFC 9112 9.6).

    def handle_write(self) -> None:
        if self.rest and self.close_when_flushed and not self.total_outbufs_len and not self.will_close:
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
            self.rest -= len(self.recv(65_536))  # closes by itself at the end of the stream
            self.will_close = self.rest <= 0


class Lanes:
    """waitress's dispatcher. To be made on the thread that will serve.

    ``hashing`` names the routes that may hash, as (method, path).
    """

    def __init__(self, hashing: Collection[tuple[str, str]], cores: int, settings: Settings) -> None:
        self._hashing = hashing
        self.settings = settings
        self._places: Counter[str] = Counter()
        self._places_lock = threading.Lock()
        self._io_thread = threading.get_ident()
        self._hashing_queue: queue.SimpleQueue[tuple[float, Channel, str]] = queue.SimpleQueue()
        self._writing_queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        # A queue of their own: while the database is locked they pile up, and a client's write must not wait for them.
        self._deferred_queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopping = False
        queues = [self._writing_queue] * WRITERS + [self._deferred_queue]
        for target, *arguments in [(self._hash,)] * cores + [(_work, tasks) for tasks in queues]:
            threading.Thread(target=target, args=arguments, daemon=True).start()

    def add_task(self, channel: Channel) -> None:
        """Send the first request of a connection to its lane. Called by waitress, which holds requests_lock."""
        request = channel.requests[0]
        if not request.error and (request.command, request.path) in self._hashing:
            client = self._client(channel)
            if not self._stopping and self._hashing_queue.qsize() < HASHING_QUEUE and self._take_place(client):
                self._hashing_queue.put((time.monotonic(), channel, client))
                return
            request.error = Busy("")
        quick = request.error or request.command in ("GET", "HEAD")
        # One of a connection's requests at a time: hundreds may have come pipelined in one read, and meanwhile this
        # thread would not see to anybody else, nor empty the pipe by which waitress wakes it.
        if quick and self.serves_here() and not channel.serve_now:
            channel.serve_now = True
        else:
            self._writing_queue.put(channel.service)

    def serves_here(self) -> bool:
        """Say whether this is the thread that serves."""
        return threading.get_ident() == self._io_thread

    def defer(self, write: Callable[[], object]) -> None:
        """Run a write that nobody waits for, soon, or not at all when too many are waiting."""
        if self._deferred_queue.qsize() < DEFERRED:
            self._deferred_queue.put(write)

    def finish(self, timeout: float) -> bool:
        """Wait so many seconds for the writes that nobody waits for; say whether all are done."""
        done = threading.Event()
        self._deferred_queue.put(done.set)
        return done.wait(timeout)

    def drain(self) -> None:
        """Answer 503 to what waits for a hash, now and from now on. On the thread that serves."""
        self._stopping = True
        while not self._hashing_queue.empty():
            try:
                _, channel, _ = self._hashing_queue.get_nowait()
            except queue.Empty:  # a worker was faster
                break
            _refuse(channel)

    def _hash(self) -> None:
        if sys.platform == "linux":  # where niceness belongs to a thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), HASHING_NICENESS)
        while True:
            since, channel, client = self._hashing_queue.get()
            late = time.monotonic() - since > HASHING_WAIT
            _run(functools.partial(_refuse, channel) if late else channel.service)
            with self._places_lock:
                self._places -= Counter([client])  # drops what is down to nothing

    def _client(self, channel: Channel) -> str:
        forwarded_for = channel.requests[0].headers.get("X_FORWARDED_FOR")
        return throttle.network(guard.client_address(channel.addr[0], forwarded_for, self.settings.trusted_proxy))

    def _take_place(self, client: str) -> bool:
        with self._places_lock:
            if self.settings.production and self._places[client] >= HASHING_PLACES:
                return False
            self._places[client] += 1
        return True


class Server:
    """One listening socket, its lanes, and an end that answers what was asked."""

    def __init__(self, application: WSGIApplication, listener: socket.socket, lanes: Lanes) -> None:
        logging.getLogger("waitress").addHandler(_LogHandler())
        self._lanes = lanes
        self._stopping = False
        self._answers: list[tuple[Channel, bytes]] = []
        self._server = create_server(
            application,
            sockets=[listener],
            _dispatcher=lanes,
            asyncore_use_poll=True,  # select() cannot see past descriptor 1023
            channel_timeout=IDLE,
            cleanup_interval=5,
            clear_untrusted_proxy_headers=False,  # guard.is_direct must see them; nobody believes them
            connection_limit=CONNECTIONS,
            ident=None,
            max_request_body_size=LARGEST_BODY + 1,  # waitress refuses this size itself
            max_request_header_size=LARGEST_HEADER,
        )
        # waitress wakes the thread that serves after each answer: it need not wake itself.
        self._wake = self._server.pull_trigger
        self._server.pull_trigger = lambda: None if lanes.serves_here() else self._wake()
        own = {"production": lanes.settings.production, "answers": self._answers}
        self._server.channel_class = type("Channel", (Channel,), own)

    def stop(self, number: int, _frame: object) -> None:
        """Ask the loop to end. A signal handler; the second signal of its kind ends it the hard way."""
        signal.signal(number, signal.SIG_DFL)
        self._stopping = True
        self._wake()

    def run(self) -> bool:
        """Serve until stopped, then finish what was asked, within 8 s; say whether nothing was left undone."""
        looked = time.monotonic()
        while not self._stopping:
            self._turn(1.0)
            self._make_room()
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                self._close_slow(looked - DEADLINE)
        wasyncore.dispatcher.close(self._server)  # accepts no more
        self._lanes.drain()
        end = time.monotonic() + DRAIN
        while self._in_hand() and time.monotonic() < end:
            self._turn(0.05)
        return not self._in_hand() and self._lanes.finish(max(0.0, end - time.monotonic()))

    def _close_slow(self, cutoff: float) -> None:
        for channel in list(self._server.active_channels.values()):  # a worker may close one meanwhile
            if channel.request is not None and channel.request.began < cutoff:
                channel.will_close = True  # without an answer: whoever takes 30 s for 32 KiB is no client

    def _make_room(self) -> None:
        # At its limit waitress accepts nobody; those who say nothing would keep everybody out for as long as they may.
        if len(self._server._map) >= CONNECTIONS:  # as it counts them
            channels = list(self._server.active_channels.values())
            silent = [one for one in channels if not (one.requests or one.request or one.total_outbufs_len)]
            # Who never asked goes first, then whoever asked longest ago.
            silent.sort(key=lambda one: (one.last_activity > one.creation_time, one.last_activity))
            for channel in silent[: CONNECTIONS // 4]:
                channel.will_close = True

    def _turn(self, timeout: float) -> None:
        wasyncore.loop(timeout, use_poll=True, map=self._server._map, count=1)
        # Together: sent one by one each finds its reader asleep, and to wake one takes as long as to look up a session.
        for channel, data in self._answers:
            channel.send_now(data)
        self._answers.clear()

    def _in_hand(self) -> bool:
        channels = list(self._server.active_channels.values())
        return any(channel.requests or channel.total_outbufs_len for channel in channels)


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            guard.log_crash(record.exc_info[1])
        else:
            guard.log("sys_server", level=record.levelname.lower(), message=str(record.msg))


def _refuse(channel: Any) -> None:
    channel.requests[0].error = Busy("")
    channel.service()


def _work(tasks: queue.SimpleQueue[Callable[[], object]]) -> None:
    while True:
        _run(tasks.get())


def _run(task: Callable[[], object]) -> None:
    try:
        task()
    except Exception as error:
        guard.log_crash(error)
