"""Request scheduling on waitress: fast requests on the I/O thread, password hashing on a thread pool.

A password hash costs a quarter of a second of a core by design, everything else a fraction of a millisecond. On one
pool of threads the fast requests would wait behind the slow ones. So there are three places where a request may run:

- **The I/O thread** of waitress answers GET and HEAD requests and refusals itself, without a hand-off. Nothing on it
  may write: a locked database must not stop the thread that serves everybody.
- **The hashing threads** run the routes that may hash: as many threads as cores, at niceness 10, so that they yield to
  the others. Requests wait in a queue (fair_queue.py). Those that probably come from the owner of an account go
  before those of strangers. In each class networks take turns. Where the queue is full, the network with the most
  requests loses one, which gets 503 after a second. A request that has waited 15 s gets 503, too.
- **Two writer threads** run all other methods, and one more runs writes in the background.

The number of connections is limited. Clients that are slow, silent or read no answer lose theirs when others need them.
A connection has one request and one answer in memory at a time.

Built on waitress's dispatcher and channel, which it keeps private: hence ``waitress<4`` in pyproject.toml.
"""

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, ClassVar
from wsgiref.types import WSGIApplication, WSGIEnvironment

from waitress import create_server, wasyncore
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import Error, build_http_date

from addresses import client_address, client_networks, is_trusted, network_path
from fair_queue import FairQueue
from log import log_crash, log_event
from settings import Settings
from web.forms import MAX_BODY_BYTES
from web.metrics import Histogram
from web.middleware import Observe
from web.parser import StrictParser
from web.responses import MESSAGES, RETRY_AFTER, complete_error, new_request_id, status_line
from web.systemd import notify

QUEUE = 64  # requests of each of the two classes; 2 * 64 hashes of 0.24 s on two cores take the 15 s below
DEVELOPMENT_QUEUE = 128  # the same in development, where nearly all requests are of one class
PER_CLIENT = 4  # of each class: enough for several people behind one address, one second on one core
PER_NETWORK = 16  # of a /24 or /48, in each class: four full clients, a quarter of the 64 places
MAX_WAIT = 15.0  # seconds in the queue, then 503
HASHING_NICENESS = 10
WRITERS = 2  # threads; SQLite writes one at a time, meanwhile the other parses a form or sends an answer
SLOW_READS = frozenset({"/metrics"})  # they run on these threads, too: it counts the sessions
MAX_BACKGROUND_WRITES = 1000  # waiting; further ones are dropped, and the next request asks for them again
LAST_REQUESTS = 0.2  # seconds from SIGTERM in which an open connection may send one more request
LAST_HASHES = 1.0  # seconds from SIGTERM in which requests that wait for a hash get one
SHUTDOWN_TIMEOUT = 8.0  # seconds from SIGTERM to the end of the last answer

MAX_DISCARD_BYTES = 4 * 2**20  # of a body that are read and thrown away after a refusal
MAX_HEADER_BYTES = 16_384  # with the request line
MAX_CONNECTIONS = 512
REFUSAL_DELAY = 1.0  # seconds: a client that asks again at once would take the cores from the hashes
MAX_DELAYED = 192  # refusals; beyond that the oldest is sent at once. With both queues full, 64 connections are left
MAX_UNFINISHED = 16  # requests of one client that are not fully received; a further one closes the oldest
HEAD_TIMEOUT = 10.0  # seconds from the first byte of a request to the end of its head
BODY_TIMEOUT = 15.0  # seconds from there to the end of its body
BUSY_BODY_TIMEOUT = 5.0  # the same while more than half of the connections are taken
ANSWER_TIMEOUT = 10.0  # seconds in which a client must accept some of an answer, or close after a refusal
# Seconds that a connection may be silent: longer than a proxy keeps its own, which must not send a request just when we
# close. Balancers and nginx close after 60 s, Traefik after 90, Caddy after 120. When room is needed, age alone counts.
IDLE_TIMEOUT = 130
CHECK_INTERVAL = 1.0  # seconds between two looks at what takes too long
MIN_AGE = 1.0  # seconds: what is younger is not closed to make room
UNUSED_AGE = 5.0  # seconds by which a connection that never sent anything counts as older
ROOM = 16  # connections that are kept free, so that a new one need not wait for another to be closed
SEND_BUFFER = 32_768  # bytes of answers that the kernel keeps for a client that does not read; Linux doubles it


Rank = Callable[[WSGIEnvironment], tuple[bool, str]]
Waiting = tuple[float, "Channel", str]  # since when a request waits, its connection, and who asks: see Dispatcher.waits


class Busy(Error):  # type: ignore[misc]
    """The ``error`` of a request that cannot be served now."""

    code = 503
    reason = "Service Unavailable"


class JSONErrorTask(ErrorTask):  # type: ignore[misc]
    """Answers a request that never reached the application: JSON, with the same headers as every other answer."""

    def execute(self) -> None:
        error, request_id = self.request.error, new_request_id()
        settings, peer = self.channel.owner.dispatcher.settings, self.channel.addr[0]
        client = client_address(peer, self.request.headers.get("X_FORWARDED_FOR"), settings.trusted_proxy)
        headers, body = complete_error(MESSAGES.get(error.code, "internal error"), request_id, settings.production)
        if error.code == Busy.code:
            headers.append(("Retry-After", str(RETRY_AFTER)))
            log_event("sys_busy", request_id=request_id, address=client)
        elif error.code in MESSAGES:  # else 500, and the exception has a line
            reason = {"status": error.code, "reason": error.body}
            log_event("input_validation_fail", request_id=request_id, address=client, **reason)
        self.status, self.response_headers = f"{error.code} {error.reason}", headers
        self.channel.owner.dispatcher.observe(self.request.command, self.request.path, status_line(error.code), 0.0)
        self.request.headers["CONNECTION"] = "close"  # whatever the client asked for: waitress says so, and closes
        self.channel.discard = MAX_DISCARD_BYTES
        self.content_length = len(body)
        self.write(b"" if self.request.command == "HEAD" else body)


class PlainTask(WSGITask):  # type: ignore[misc]
    """Writes an answer in one piece, as the application gives it. The application is ours and states the length.

    waitress's own task checks, capitalizes and sorts the headers of each answer, sends head and body apart, and puts
    keys into the environment that we never read. Together that takes as long as looking up a session.
    """

    def get_environment(self) -> Any:
        """Return the WSGI environment of the request. It is built once: a request that hashes needs it twice."""
        request, channel = self.request, self.channel
        if hasattr(request, "environ"):
            return request.environ
        headers = dict(request.headers)
        request.environ = {  # of the variables in PEP 3333, those that our application and Bottle read
            "CONTENT_LENGTH": headers.pop("CONTENT_LENGTH", ""),
            "CONTENT_TYPE": headers.pop("CONTENT_TYPE", ""),
            "PATH_INFO": request.path,
            "QUERY_STRING": request.query,
            "REMOTE_ADDR": channel.addr[0],
            "REQUEST_METHOD": request.command,
            "REQUEST_URI": request.request_uri,
            "wsgi.input": request.get_body_stream(),
            "wsgi.input_terminated": True,
            "wsgi.url_scheme": request.url_scheme,
            **{f"HTTP_{name}": value for name, value in headers.items()},
        }
        return request.environ

    def execute(self) -> None:
        if self.version == "1.0" or self.request.headers.get("CONNECTION", "").lower() == "close":
            super().execute()
            return
        body = b"".join(self.channel.server.application(self.get_environment(), self._begin))
        if self.channel.owner.stopping:  # so that the client sends its next request on another connection
            self.response_headers.append(("Connection", "close"))
            self.close_on_finish = True
        lines = "\r\n".join(map(": ".join, self.response_headers))
        head = f"HTTP/1.1 {self.status}\r\n{lines}\r\nDate: {_date(int(self.start_time))}\r\n\r\n"
        self.wrote_header = True
        self.channel.write_soon(head.encode("latin-1") + body)

    def _begin(self, status: str, headers: list[tuple[str, str]], _exc_info: object = None) -> None:
        self.status, self.response_headers = status, headers


_date = functools.lru_cache(maxsize=2)(build_http_date)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection. Fast requests are served by the thread that read them.

    It parses a request after the answer to the last one has been sent. waitress parses all that a client sends at once,
    so that a client that never reads would make it keep hundreds of requests and answers.
    """

    parser_class = StrictParser
    task_class = PlainTask
    error_task_class = JSONErrorTask
    owner: ClassVar["Server"]
    # These three are as in waitress's class, for mypy. It also has ``requests``, the one that is being served, and
    # ``last_activity``, when something was received or sent, in unix seconds.
    request: StrictParser | None = None  # one that is not fully received
    sent_continue = close_when_flushed = False
    serve_now = False  # set by Dispatcher.add_task
    unparsed = b""  # received after the request that is being served
    head_at: float | None = None  # when the head of the request that is being received was complete, monotonic seconds
    answered_at = 0.0  # since when an answer waits for the client to accept it, monotonic seconds
    client: str | None = None  # who sends the request that is being received, as far as it is known
    discard = 0  # bytes to read and throw away after the last answer
    lingering = False

    def received(self, data: bytes) -> None:
        # waitress calls add_task under requests_lock, which service() takes as well. So add_task sets a flag, and the
        # request is served once the lock is free.
        data, self.unparsed = self.unparsed + data, b""
        with self.requests_lock:
            if self.will_close or self.close_when_flushed:
                return
            while data and not self.requests:
                data = data[self._parse(data) :]
            self.unparsed = data
        if self.serve_now:
            self.service()
            self.serve_now = False

    def _parse(self, data: bytes) -> int:
        new = self.request is None
        request = self.request = self.request or self.parser_class(self.adj)
        parsed: int = request.received(data)
        if request.expect_continue and request.headers_finished and not self.sent_continue:
            self.send_continue()
        if request.completed:
            self.request, self.head_at, self.sent_continue = None, None, False
            self.requests.append(request)
            self.server.add_task(self)
        elif new or (request.headers_finished and self.head_at is None):
            self.head_at = time.monotonic() if request.headers_finished else None
            self.owner.limit_client(self, request)
        return parsed

    def write_soon(self, data: bytes) -> int:
        if self.serve_now:
            self.owner.answers.append((self, data))
            return len(data)
        with self.outbuf_lock:
            if not self.total_outbufs_len:
                self.answered_at = time.monotonic()
            written: int = super().write_soon(data)
            # Not left to the I/O thread, which has to be woken first.
            self._flush_exception(self._flush_some, do_close=False)
        return written

    def send_now(self, data: bytes) -> None:
        """Send an answer; waitress sends later what the client does not accept yet."""
        if self.connected and not self.total_outbufs_len:
            try:
                data = data[self.send(data) :]  # closes the channel if the client is gone
            except OSError:
                self.will_close = True
                return
        if data and self.connected:
            self.write_soon(data)

    # A client whose body we refuse may still be sending it. Closing a socket with unread bytes resets the connection,
    # and the reset can overtake our answer. So shut down our side only, and keep reading for a while (RFC 9112 9.6).

    def writable(self) -> bool:
        # A thread that serves a request sends the answer itself, and holds a lock until it has. The I/O thread would
        # ask for it over and over, and so keep that thread from running.
        wants = self.unparsed or self.total_outbufs_len or self.will_close or self.close_when_flushed
        return bool(wants and not self.requests)

    def handle_write(self) -> None:
        if self.discard and self.close_when_flushed and not self.total_outbufs_len and not self.will_close:
            self.close_when_flushed = False
            self.lingering, self.answered_at, self.unparsed = True, time.monotonic(), b""
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
        else:
            super().handle_write()
        # Also without an event: what the client has sent already causes none.
        if self.unparsed and self.connected and not self.total_outbufs_len:
            self.received(b"")

    def readable(self) -> bool:
        busy = self.requests or self.unparsed or self.total_outbufs_len
        return self.lingering or not (busy or self.will_close or self.close_when_flushed)

    def handle_read(self) -> None:
        if not self.lingering:
            super().handle_read()
        else:
            self.discard -= len(self.recv(65_536))  # closes the channel at the end of the stream
            self.will_close = self.will_close or self.discard <= 0

    def is_slow(self, now: float, body_timeout: float) -> bool:
        """Return whether the client has had enough time for what it is doing. ``now`` is in monotonic seconds."""
        if self.requests:  # a thread serves it
            return False
        if self.head_at is not None:
            return now - self.head_at > body_timeout
        if self.request is not None:
            return now - self.request.began > HEAD_TIMEOUT
        if self.lingering:
            return now - self.answered_at > ANSWER_TIMEOUT
        reads = self.total_outbufs_len or self.unparsed  # which waits until the kernel takes another answer
        return now - max(self.answered_at, self._silent_since) > (ANSWER_TIMEOUT if reads else IDLE_TIMEOUT)

    def makes_room(self, now: float) -> float | None:
        """Return since when this connection holds its place, in monotonic seconds; None if it must not be closed.

        All kinds are compared by their age. Otherwise many of one kind would cost an honest client of another kind its
        place. Only those that never sent anything count as older.
        """
        if self.requests:
            return None
        if self.request is not None:
            since = self.request.began
        else:
            since = self.answered_at if self.total_outbufs_len or self.lingering else self._silent_since
        unused = self.last_activity == self.creation_time  # it has never sent anything
        return None if now - since < MIN_AGE else since - UNUSED_AGE * unused

    @property
    def _silent_since(self) -> float:
        return time.monotonic() - (time.time() - float(self.last_activity))


class Dispatcher:
    """waitress's dispatcher: decides on which thread a request runs.

    Args:
        hashing_routes: the routes that may hash, as (method, path); "*" stands for the last part of a path.
        cores: the number of hashing threads.
        settings: the settings of the service.
        rank: returns whether a request that may hash goes before others, and a text that stands for its account ("" if
            unknown). It is given the WSGI environment and may read the body. It is called on several threads, one of
            which is the I/O thread, so it must not write.
        observe: called for each request that is refused before a route: see SecurityMiddleware.
    """

    def __init__(
        self,
        hashing_routes: Collection[tuple[str, str]],
        cores: int,
        settings: Settings,
        rank: Rank,
        observe: Observe = lambda *_: None,
    ) -> None:
        self.settings, self._hashing_routes, self._rank, self.observe = settings, hashing_routes, rank, observe
        self.waits = {"owner": Histogram(), "stranger": Histogram(), "unknown": Histogram()}  # unknown: served at once
        limit = QUEUE if settings.production else DEVELOPMENT_QUEUE
        self._hashing_queue = FairQueue[Waiting](limit, PER_CLIENT, PER_NETWORK)
        self._writing_queue = FairQueue[Waiting](limit, PER_CLIENT, PER_NETWORK)
        # A queue of their own: they pile up while the database is locked, and a client's write must not wait for them.
        self._background: deque[Callable[[], object]] = deque()
        self._answered = threading.Event()  # set after an answer, when there is one of them
        self._refused: deque[tuple[float, Channel]] = deque()  # from when to answer a request that has no place
        self._stopping = False
        hashing = functools.partial(self._serve, self._hashing_queue, HASHING_NICENESS)
        writing = functools.partial(self._serve, self._writing_queue, 0)
        for target in [hashing] * cores + [writing] * WRITERS + [self._write]:
            threading.Thread(target=target, daemon=True).start()

    def add_task(self, channel: Channel) -> None:
        """Schedule the request of a connection. Called on the I/O thread, which holds requests_lock."""
        request = channel.requests[0]
        if not request.error and (request.command not in ("GET", "HEAD") or request.path in SLOW_READS):
            method, path, routes = request.command, request.path, self._hashing_routes
            hashes = (method, path) in routes or (method, f"{path.rpartition('/')[0]}/*") in routes
            if not (hashes and self._stopping):
                self._wait(channel, hashes)
                return
            request.error = Busy("")
        channel.serve_now = True

    def run_in_background(self, write: Callable[[], object]) -> None:
        """Run a write after this request has been answered, or drop it when too many are waiting."""
        if len(self._background) < MAX_BACKGROUND_WRITES:
            self._background.append(write)

    def start_background(self) -> None:
        """Start the writes that wait. The I/O thread calls it after each answer, which waking a thread would delay."""
        if self._background:
            self._answered.set()

    def finish(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds for the background writes; return whether all are done."""
        done = threading.Event()
        self._background.append(done.set)
        self.start_background()
        return done.wait(timeout)

    @property
    def waiting(self) -> dict[str, int]:
        """How many requests wait for a hash, by who asks."""
        return dict(zip(("owner", "stranger"), self._hashing_queue.lengths(), strict=True))

    def hashes_at_once(self) -> bool:
        """Return whether no request waits for a hash."""
        return self._hashing_queue.serves_at_once()

    def drain(self) -> None:
        """Answer 503 to all requests that wait for a hash, and to all later ones. Call it on the I/O thread."""
        self._stopping = True
        for _, channel, _ in self._hashing_queue.remove(lambda _: True):
            _refuse(channel)

    def refuse_late(self) -> None:
        """Answer 503 to requests that have waited too long for a hash."""
        for waiting in self._hashing_queue, self._writing_queue:
            for _, channel, _ in waiting.remove(lambda item: time.monotonic() - item[0] > MAX_WAIT):
                _refuse(channel)

    def refuse_displaced(self) -> None:
        """Answer 503 to requests that got no place or lost it to others, after a while; at the end at once."""
        now = float("inf") if self._stopping else time.monotonic()
        while self._refused and (self._refused[0][0] <= now or len(self._refused) > MAX_DELAYED):
            _refuse(self._refused.popleft()[1])

    def _wait(self, channel: Channel, hashes: bool) -> None:
        """Let a request wait for its thread. The one that loses its place to it, if any, is refused later."""
        environ = PlainTask(channel, channel.requests[0]).get_environment()
        waiting = self._hashing_queue if hashes else self._writing_queue
        at_once = waiting.serves_at_once()
        preferred, account = (False, "") if at_once else self._rank_safely(environ)
        who = "unknown" if at_once else "owner" if preferred else "stranger"
        peer, proxy = channel.addr[0], self.settings.trusted_proxy
        path = (*network_path(client_address(peer, environ.get("HTTP_X_FORWARDED_FOR"), proxy)), account)
        limited = self.settings.tells_clients_apart(peer)
        for _, lost, _ in waiting.put((time.monotonic(), channel, who), path, preferred=preferred, limited=limited):
            self._refused.append((time.monotonic() + REFUSAL_DELAY, lost))

    def _rank_safely(self, environ: WSGIEnvironment) -> tuple[bool, str]:
        try:
            return self._rank(environ)
        except Exception as error:
            log_crash(error)
            return False, ""
        finally:
            environ["wsgi.input"].seek(0)  # the route reads the body again

    def _serve(self, waiting: FairQueue[Waiting], niceness: int) -> None:
        if niceness and sys.platform == "linux":  # there niceness is per thread
            with contextlib.suppress(OSError):  # a sandbox may refuse it: then fast requests get less of the processor
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        while True:
            since, channel, who = waiting.get()
            waited = time.monotonic() - since
            if waiting is self._hashing_queue:
                self.waits[who].observe(waited)
            _run(functools.partial(_refuse, channel) if waited > MAX_WAIT else channel.service)

    def _write(self) -> None:
        while True:
            self._answered.wait()
            self._answered.clear()
            while self._background:
                _run(self._background.popleft())


class Server:
    """Serves an application on one listening socket, and shuts down without losing an answer.

    Construct it on the thread that will run it.
    """

    def __init__(self, application: WSGIApplication, listener: socket.socket, dispatcher: Dispatcher) -> None:
        logging.getLogger("waitress").addHandler(_LogHandler())
        self.dispatcher = dispatcher
        self.stopping = False
        self._has_new = False  # whether connections wait to be accepted
        self.answers: list[tuple[Channel, bytes]] = []  # of one iteration of the loop, sent at its end
        self._server = create_server(
            application,
            sockets=[listener],
            _dispatcher=dispatcher,
            asyncore_use_poll=True,  # select() cannot see past descriptor 1023
            channel_timeout=10**9,  # _close_slow() does that, also for a client that never reads
            clear_untrusted_proxy_headers=False,  # is_direct() must see them; nothing else believes them
            connection_limit=MAX_CONNECTIONS,
            ident=None,
            max_request_body_size=MAX_BODY_BYTES + 1,  # waitress refuses a body of this size
            max_request_header_size=MAX_HEADER_BYTES,
        )
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections inherit it
        # Only Linux has this. It also ends the waiting for clients of closed connections that acknowledge no answer.
        with contextlib.suppress(AttributeError, OSError):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(ANSWER_TIMEOUT * 1000))
        # waitress accepts one connection in each iteration of the loop, and others would wait for all iterations before
        # theirs. So only note here that there are some; they are accepted together when no event is left to handle.
        self._accept = self._server.handle_accept
        self._server.handle_accept = functools.partial(setattr, self, "_has_new", True)
        # waitress wakes the I/O thread after each answer. On that thread itself there is nothing to wake.
        self._wake = self._server.pull_trigger
        io_thread = threading.get_ident()
        self._server.pull_trigger = lambda: None if threading.get_ident() == io_thread else self._wake()
        self._server.channel_class = type("Channel", (Channel,), {"owner": self})

    def limit_client(self, channel: Channel, request: StrictParser) -> None:
        """Close the oldest unfinished request of a client that has too many, of which this is the newest."""
        channel.client, peer, settings = None, channel.addr[0], self.dispatcher.settings
        proxy = settings.trusted_proxy
        if not settings.tells_clients_apart(peer) or (channel.head_at is None and is_trusted(peer, proxy)):
            return  # behind a trusted proxy only the head tells
        channel.client = client_networks(client_address(peer, request.headers.get("X_FORWARDED_FOR"), proxy))[0]
        unfinished = [(one.request.began, one) for one in self._channels if one.request and not one.will_close]
        same = [pair for pair in unfinished if pair[1].client == channel.client]
        if len(same) > MAX_UNFINISHED:
            _, oldest = min(same, key=lambda pair: pair[0])
            _log_closing(oldest, "too many unfinished requests of one client")
            oldest.will_close = True

    def stop(self, number: int, _frame: object) -> None:
        """Ask the loop to end. A signal handler: a second signal of the same kind kills the process."""
        signal.signal(number, signal.SIG_DFL)
        self.stopping = True
        self._wake()

    def run(self) -> bool:
        """Serve until stopped, then finish open requests within 8 s; return whether all were finished.

        An open connection may have sent a request that was not read yet. Its answer says that no other can follow.
        """
        notify("READY=1")
        checked = time.monotonic()
        while not self.stopping:
            self._run_loop_once(CHECK_INTERVAL)
            self._make_room()
            if time.monotonic() - checked > CHECK_INTERVAL:
                checked = time.monotonic()
                self._close_slow(checked)
                self.dispatcher.refuse_late()
                notify("WATCHDOG=1")
        notify("STOPPING=1")
        stopped = time.monotonic()
        wasyncore.dispatcher.close(self._server)  # no new connections
        self._run_while(lambda: self._channels, stopped + LAST_REQUESTS)
        self._run_while(lambda: not self.dispatcher.hashes_at_once(), stopped + LAST_HASHES)
        self.dispatcher.drain()
        end = stopped + SHUTDOWN_TIMEOUT
        self._run_while(self._in_hand, end)
        if self._in_hand():
            return False
        for channel in self._channels:  # now, so that no request is sent while the database is closed
            channel.handle_close()
        return self.dispatcher.finish(max(0.0, end - time.monotonic()))

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._server.active_channels)

    @property
    def _channels(self) -> list[Channel]:
        return list(self._server.active_channels.values())

    def _close_slow(self, now: float) -> None:
        """Close the connections of clients that take too long, without an answer."""
        body_timeout = BUSY_BODY_TIMEOUT if len(self._channels) > MAX_CONNECTIONS // 2 else BODY_TIMEOUT
        for channel in self._channels:
            if channel.is_slow(now, body_timeout):
                _log_closing(channel, "too slow")
                channel.handle_close()

    def _make_room(self) -> None:
        """Close the oldest connections before the limit is reached, at which waitress accepts no further ones."""
        excess = len(self._server._map) - (MAX_CONNECTIONS - ROOM)  # waitress counts them in the same way
        if excess <= 0:
            return
        now = time.monotonic()
        ranked = [(since, channel) for channel in self._channels if (since := channel.makes_room(now)) is not None]
        for _, channel in sorted(ranked, key=lambda one: one[0])[:excess]:
            _log_closing(channel, "needed for others")
            channel.handle_close()

    def _run_while(self, condition: Callable[[], object], end: float) -> None:
        while condition() and time.monotonic() < end:
            self._run_loop_once(0.05)

    def _run_loop_once(self, timeout: float) -> None:
        wasyncore.loop(timeout, use_poll=True, map=self._server._map, count=1)
        # All together: sent one by one, each would wake a sleeping client, which takes as long as looking up a session.
        for channel, data in self.answers:
            channel.send_now(data)
        self.answers.clear()
        self.dispatcher.start_background()
        self.dispatcher.refuse_displaced()
        if self._has_new:
            self._has_new, before = False, -1
            while before < len(self._server._map) < MAX_CONNECTIONS and not self.stopping:
                before = len(self._server._map)
                self._accept()

    def _in_hand(self) -> bool:
        return any(channel.requests or channel.total_outbufs_len for channel in self._channels)


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            log_crash(record.exc_info[1])
        else:
            log_event("sys_server", level=record.levelname.lower(), message=str(record.msg))


def _log_closing(channel: Channel, why: str) -> None:
    log_event("sys_connection_closed", address=channel.client or client_address(channel.addr[0], None, ""), reason=why)


def _refuse(channel: Any) -> None:
    channel.requests[0].error = Busy("")
    channel.service()


def _run(task: Callable[[], object]) -> None:
    try:
        task()
    except Exception as error:
        log_crash(error)
