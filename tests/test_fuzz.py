"""Generated requests: whatever comes in, the answer is one of ours and nothing breaks.

A sample of 3,000 runs with the other slow tests. For more, and others (some minutes, at most 30 ms for each):

    FUZZ_REQUESTS=100000 FUZZ_SEED=1 pytest -s tests/test_fuzz.py
"""

from __future__ import annotations

import io
import json
import os
import re
import selectors
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import pytest
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from waitress.adjustments import Adjustments

import authsvc
import guard
import lanes
import passwords
import totp
from auth import Auth, UnknownEmail
from settings import Settings
from storage import open_store
from tests.conftest import COST, Clock

pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "3000"))  # a tenth of them to a socket
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 30 + REQUESTS * 0.03  # of each test; more and something hangs
BATCH = 500  # examples from one seed; hypothesis remembers what it tried

EMAIL, PASSWORD = "bob@example.com", "correct horse battery"
SESSION, NAME, TOKEN, CODE = "{session}", "{name}", "{token}", "{code}"  # stand for live ones

T = TypeVar("T")


def each(strategy: st.SearchStrategy[T], use: Callable[[T], object], count: int) -> None:
    """Call ``use`` with ``count`` different examples, always the same ones for one FUZZ_SEED."""
    end = time.monotonic() + SECONDS
    for first in range(0, count, BATCH):

        @seed(SEED * 1_000_000 + first)
        @hypothesis_settings(
            max_examples=min(BATCH, count - first),
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def run(example: T) -> None:
            use(example)

        run()
        assert time.monotonic() < end


# What is generated, most of it near to what the service reads.

methods = st.sampled_from(["GET", "POST", "POST", "PUT", "DELETE"]) | st.sampled_from(
    ["HEAD", "OPTIONS", "PATCH", "TRACE", "ANY", "PROXY", "get", "", "POST ", "M-SEARCH"]
)
routes = st.sampled_from([path.replace("<public_id>", NAME) for _, path, *_ in authsvc.ROUTES])
latin = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=30)
paths = routes | st.builds(
    "".join, st.lists(routes | latin | st.sampled_from(["/", "//", "..", "%2f", "?", "#", "é"]), max_size=4)
)
names = st.sampled_from(["email", "password", "reset_token", "new_password", "otp"])
values = (
    st.sampled_from(
        [EMAIL, PASSWORD, TOKEN, CODE, "", "nope", "a\0b", "a\r\nb", "x" * 300, "é" * 600, "' OR 1=1--", "=&;+%"]
    )
    | st.emails()
    | st.text(max_size=80)
)
fields = st.builds(
    dict[str, Any],
    st.fixed_dictionaries(
        {"email": st.just(EMAIL) | values},
        optional={
            **dict.fromkeys(("reset_token", "new_password", "extra", "id"), values),
            "password": st.just(PASSWORD) | values,
            "otp": st.just(CODE) | values,
        },
    ),
)
pairs = fields.map(lambda found: list(found.items())) | st.lists(
    st.tuples(names | st.text(max_size=9), values), max_size=10
)
pieces = st.binary(max_size=20) | st.sampled_from(
    [b"email=a", b"&", b"=", b"%", b"%ff", b"%00", b"--", b"\r\n", b"\r\n\r\n", b'"', b"[", b"{", b"\\ud800", b"\xff"]
)
junk = st.lists(pieces, max_size=12).map(b"".join)


def urlencoded(content: list[tuple[str, str]]) -> bytes:
    return urlencode(content, errors="replace").encode()


@st.composite
def multipart(draw: st.DrawFn) -> tuple[str, bytes]:
    boundary = draw(st.sampled_from(["b", "x" * 70, "x" * 71, "", '"', "--", "a b", "é", "(", "\\"]) | latin)
    quote = draw(st.sampled_from(["", '"', "'"]))
    end, newline = (
        draw(st.sampled_from(["--", "--", "", "--\r\n\r\n", "-- "])),
        draw(st.sampled_from(["\r\n", "\r\n", "\n"])),
    )
    disposition = draw(
        st.sampled_from(["Content-Disposition: form-data; ", "content-disposition:form-data;", "X: ", ""])
    )
    body = draw(st.sampled_from(["", "", "preamble", newline]))
    for name, value in draw(pairs):
        extra = draw(st.sampled_from(["", "", '; filename="f"', f"{newline}Content-Type: text/plain", "; name=x"]))
        body += f'--{boundary}{newline}{disposition}name="{name}"{extra}{newline}{newline}{value}{newline}'
    kind = f"multipart/form-data; boundary={quote}{boundary}{quote}"
    return kind.encode(errors="replace").decode("latin-1"), f"{body}--{boundary}{end}".encode(errors="replace")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | values | st.sampled_from(["\ud800", "\udfff\ud800"])
tree = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
documents = (
    st.dictionaries(names, scalars, min_size=1).map(json.dumps)
    | fields.map(json.dumps)
    | tree.map(json.dumps)
    | pairs.map(lambda found: json.dumps([list(pair) for pair in found]))
    | pairs.map(lambda found: "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in found) + "}")
)
ODD_DOCUMENTS = (
    "",
    "NaN",
    "1" * 5000,
    "1e999",
    "[1]",
    "[null, null]",
    '"email"',
    "\ufeff{}",
    "[" * 16_000,
    '{"":' * 4_000,
)
kinds = st.sampled_from(
    [
        "application/x-www-form-urlencoded",
        "APPLICATION/JSON; charset=utf-8",
        "application/json",
        "text/plain",
        "",
        ";",
        "multipart/form-data",
    ]
)
typed = (
    pairs.map(lambda found: ("application/x-www-form-urlencoded", urlencoded(found)))
    | documents.map(lambda text: ("application/json", text.encode(errors="surrogatepass")))
    | st.sampled_from(ODD_DOCUMENTS).map(lambda text: ("application/json", text.encode()))
    | multipart()
    | st.tuples(kinds | latin, junk)
    | st.tuples(kinds, st.just(b"email=" + b"x" * 20_000))
)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    kind, body = draw(typed)
    at = draw(st.integers(0, len(body)))
    return kind, body[:at] + draw(pieces) + body[at + draw(st.integers(0, 3)) :]


RIGHT = {"email": EMAIL, "password": PASSWORD, "otp": CODE, "reset_token": TOKEN, "new_password": PASSWORD[::-1]}
right = [
    ("application/x-www-form-urlencoded", urlencode(RIGHT, safe="{}").encode()),
    ("application/json", json.dumps(RIGHT).encode()),
]
bodies = typed | typed | damaged() | st.sampled_from(right)
# Whatever the seed; the right ones as often as the user has turns.
FIXED = [
    *[("application/json", text.encode()) for text in ODD_DOCUMENTS],
    *right[:1] * 3,
    ("application/x-www-form-urlencoded", urlencode({**RIGHT, "password": "wrong"}, safe="{}").encode()),
    ("text/plain", b"email"),
]
cookie_names = (
    st.sampled_from(["session_id", "__Host-session_id", "__Secure-session_id", "Session_Id", "a{b}", "x"]) | latin
)
cookie_pairs = st.builds(
    "{}={}".format, cookie_names, st.just(SESSION) | latin | st.sampled_from(['"{session}"', "x" * 200])
)
live = st.sampled_from(
    [
        f"session_id={SESSION}; __Host-session_id={SESSION}",
        f"__Host-session_id={SESSION}",
        f"é; a{{b}}=1;session_id={SESSION} ;__Host-session_id={SESSION} ;",
    ]
)
cookies = live | live | st.lists(cookie_pairs | latin, max_size=4).map("; ".join)
addresses = (
    st.ip_addresses().map(str)
    | st.sampled_from(["evil", "", "::ffff:1.2.3.4", "[::1]:80", "1.2.3.4, 198.18.0.1"])
    | latin
)
lengths = st.sampled_from(["", "-1", "abc", "0", "5", "99999999999"])
headers = st.fixed_dictionaries(
    {},
    optional={
        "HTTP_COOKIE": cookies,
        "HTTP_HOST": st.sampled_from(["localhost", "evil.example"]) | latin,
        "HTTP_ORIGIN": st.sampled_from(["null", "http://localhost", "https://auth.example.com"]) | latin,
        "HTTP_SEC_FETCH_SITE": st.sampled_from(["same-origin", "none", "cross-site"]) | latin,
        "HTTP_USER_AGENT": latin | st.just('a"\x1b[2J'),
        "HTTP_X_FORWARDED_FOR": addresses,
        "HTTP_X_FORWARDED_PROTO": st.sampled_from(["https", "HTTPS", "http", ""]),
        "HTTP_FORWARDED": latin,
        "HTTP_X_HTTP_METHOD_OVERRIDE": st.just("DELETE"),
        "QUERY_STRING": latin | pairs.map(lambda found: urlencode(found, errors="replace")),
        "CONTENT_LENGTH": lengths,
        "HTTP_TRANSFER_ENCODING": st.sampled_from(["chunked", "gzip"]),
    },
)
peers = st.sampled_from(["127.0.0.1", "127.0.0.1", "127.0.0.1", None, "", "::1", "localhost", "203.0.113.7", "evil"])
# What needs a body and a session.
confirmed = [("PUT", "/totp"), ("POST", "/totp"), ("DELETE", "/totp"), ("PUT", "/password"), ("DELETE", "/profile")]
forms = [
    (method, path)
    for method, path, *_ in authsvc.ROUTES
    if method in ("POST", "PUT") and (method, path) not in confirmed
]
endings = st.sampled_from(["/sessions/others", "/sessions/others", f"/sessions/{NAME}", "/sessions/all"])
Call = tuple[str, str, tuple[str, bytes], dict[str, str], str | None, bool]
LOGGED_IN = {"HTTP_COOKIE": f"session_id={SESSION}; __Host-session_id={SESSION}"}
CALLS = len(forms) + 5  # of each example


@st.composite
def calls(draw: st.DrawFn) -> list[Call]:
    """One body to routes that take one, one set of headers to those with a cookie, and both to any path."""
    body, more = draw(bodies), draw(headers)
    length = {"CONTENT_LENGTH": draw(lengths)} if draw(st.integers(0, 9)) == 5 else {}
    return [
        ("GET", draw(st.sampled_from(["/profile", "/sessions"])), ("", b""), more, "127.0.0.1", True),
        (*draw(st.sampled_from(confirmed)), body, LOGGED_IN | length, "127.0.0.1", True),
        *((method, path, body, length, "127.0.0.1", True) for method, path in forms),
        ("DELETE", draw(endings), ("", b""), more, "127.0.0.1", True),
        ("DELETE", "/sessions", ("", b""), more, "127.0.0.1", True),
        (draw(methods), draw(paths), body, more, draw(peers), draw(st.booleans())),
    ]


class Target:
    """The application over a store of its own, with one user; its log goes to ``log``."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = io.StringIO()
        self.seen: Counter[int] = Counter()
        guard._warn_of_forwarding()  # once a process, beside the line of its request
        monkeypatch.setattr(sys, "stderr", self.log)
        monkeypatch.setattr(guard, "LOG_FLOOD", sys.maxsize)
        self.production = settings.production
        self.clock = Clock()
        self.db = open_store(settings.database)
        self.auth = Auth(self.db, settings, self.clock)
        self.app = authsvc.create_app(settings, self.auth)
        self.hashed = passwords.hash_password(PASSWORD, COST)
        self.rounds = 0
        self.renew()

    def renew(self) -> None:
        """Make the user as at first, but by turns: without a second factor, while setting one up, with one."""
        try:
            user = self.auth.find_user(EMAIL)
        except UnknownEmail:
            user = self.db.add_user(EMAIL, self.hashed)
        self.db.update_user(user.id, hashed_password=self.hashed)
        self.db.remove_totp(user.id)
        self.db.end_sessions(user.id)
        session_id, seed = str(self.auth.create_session(EMAIL)), totp.new_seed()
        if self.rounds % 3:
            user = self.auth.find_user(EMAIL)
            self.db.set_totp(user, seed, str(user.session_id))
        if self.rounds % 3 == 2:
            _, session_id, _ = self.auth.confirm_totp(session_id, totp.code(seed, int(self.clock()) // totp.STEP))
            self.clock.advance(totp.STEP)
        self.rounds += 1
        self.live = {
            SESSION: session_id,
            NAME: self.auth.list_sessions(session_id)[2],
            TOKEN: self.auth.get_reset_password_token(EMAIL),
            CODE: totp.code(seed, int(self.clock()) // totp.STEP),
        }

    def filled(self, text: str) -> str:
        for name, value in self.live.items():
            text = text.replace(name, value)
        return text

    def call_all(self, requests: list[Call]) -> None:
        self.clock.advance(3600)
        self.renew()
        for request in requests:
            self.call(*request)

    def call(
        self, method: str, path: str, content: tuple[str, bytes], more: dict[str, str], peer: str | None, told: bool
    ) -> None:
        kind, body = content
        path = self.filled(path)
        body = self.filled(body.decode("latin-1")).encode("latin-1")
        environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path.encode(errors="replace").decode("latin-1"),
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_TYPE": kind,
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": self.log,
            "wsgi.url_scheme": "http",
            **{name: self.filled(value) for name, value in more.items()},
            **({} if peer is None else {"REMOTE_ADDR": peer}),
            **({"REQUEST_URI": path} if told else {}),
        }
        said: list[Any] = []
        self.log.seek(0)
        self.log.truncate()
        app: Any = self.app
        answer = b"".join(app(environ, lambda status, headers, exc_info=None: said.append((status, headers))))
        [(status, headers)] = said
        lines = self.log.getvalue().splitlines()
        assert len(lines) <= 1, lines
        check_log(lines)
        check_answer(int(status[:3]), dict(headers), answer, self.production, head=method.upper() == "HEAD")
        assert len(dict(headers)) == len(headers)
        self.seen[int(status[:3])] += 1


def check_answer(status: int, headers: dict[str, str], body: bytes, production: bool, head: bool = False) -> None:
    assert status < 500 or status == 501, (status, body)
    page = headers["Content-Type"].startswith("text/")
    common = dict([*guard.SECURITY_HEADERS, guard.HSTS] if production else guard.SECURITY_HEADERS)
    common |= {"Content-Security-Policy": authsvc.PAGE_POLICY} if page else {"Content-Type": "application/json"}
    for name, value in common.items():
        assert headers[name] == value, (status, name)
    assert re.fullmatch("[0-9a-f]{16}", headers["X-Request-ID"])
    assert not any(re.search(r"[\x00-\x1f\x7f]", value) for value in headers.values())
    if head:
        assert body == b""
        return
    assert headers["Content-Length"] == str(len(body))
    if page:
        assert status == 200
        return
    content = json.loads(body)
    kinds = {"sessions": list, "recovery_codes": list, "second_factor": bool}
    assert all(isinstance(value, kinds.get(name, str)) for name, value in content.items())
    assert status < 400 or (content.keys() == {"message"} and content["message"])


def check_log(lines: list[str]) -> None:
    for line in lines:
        assert line.isascii()
        assert json.loads(line)["event"] not in ("sys_crash", "sys_server"), line


def made(place: str, production: bool) -> Settings:
    if not production:
        return Settings(database=place, bcrypt_cost=COST, throttle=False, sessions_per_user=100)
    settings = Settings(
        database=place,
        public_url="https://auth.example.com",
        trusted_proxy="127.0.0.1",
        sessions_per_user=100,
    )
    object.__setattr__(settings, "bcrypt_cost", COST)  # what production refuses, and 100,000 requests need
    return settings


@pytest.mark.parametrize("production", [False, True])
def test_every_request_has_an_answer_of_ours(place: str, monkeypatch: pytest.MonkeyPatch, production: bool) -> None:
    target = Target(made(place, production), monkeypatch)
    for content in FIXED:
        target.call_all([(*route, content, LOGGED_IN, "127.0.0.1", True) for route in confirmed + forms])
    each(calls(), target.call_all, REQUESTS * 45 // 100 // CALLS + 1)
    target.db.close()
    monkeypatch.undo()
    print(f"{target.seen.total()} requests, by status: {sorted(target.seen.items())}")
    # Else the generator has lost its way, and most of this shows nothing.
    assert target.seen.keys() >= {200, 302, 400, 401, 403, 404, 405, 415}


# The same through a socket, with bytes that need not be HTTP.

lines = st.sampled_from(
    b"""\
Host: evil
Connection: close
Connection: keep-alive
Transfer-Encoding: chunked
Transfer-Encoding: gzip
Content-Length: 0
Content-Length: 5
Content-Length: 99999
Content-Length: -1
Content-Type: application/json
Content-Type: application/x-www-form-urlencoded
Cookie: session_id={session}
Cookie: a{b}=1; session_id=\xff
Expect: 100-continue
Origin: null
Upgrade: h2c
X-Forwarded-For: 1.2.3.4
X_Forwarded_For: 1.2.3.4
X : y
 folded
no colon""".split(b"\n")
) | st.binary(max_size=30)
long_line = b"X: " + b"y" * 17_000
starts = st.builds(
    b"%b %b %b".__mod__,
    st.tuples(
        methods.map(str.encode),
        (
            paths | latin | st.sampled_from(["http://evil/profile", "*", "/%70rofile", "/pro%fffile", "//", "http://["])
        ).map(lambda path: path.encode(errors="replace")),
        st.sampled_from([b"HTTP/1.1"] * 8 + [b"HTTP/1.0", b"HTTP/0.9", b"HTTP/9.9", b"", b"http/1.1"]),
    ),
)
tails = bodies.map(lambda body: body[1]) | st.sampled_from(
    [b"", b"5\r\nemail\r\n0\r\n\r\n", b"zz\r\n", b"0x3\r\nabc\r\n0\r\n\r\n"]
)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    tail = draw(tails)
    host, length = (
        draw(st.sampled_from([b"Host: localhost"] * 4 + [b"X: y", long_line])),
        b"Content-Length: %d" % len(tail),
    )
    head = [draw(starts), host, *draw(st.sampled_from([[length]] * 3 + [[]])), *draw(st.lists(lines, max_size=2))]
    newline = draw(st.sampled_from([b"\r\n"] * 8 + [b"\n", b"\r"]))
    return newline.join(head) + newline * 2 + tail


ODD_STREAMS = (
    b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n",  # no URL
    b"POST /users HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 20,
)
streams = messages() | st.lists(messages(), min_size=2, max_size=3).map(b"".join) | junk


# All of ASCII that is not alphanumeric, and some of the rest.
BYTES = b"aA0\x80\x85\xa0\xff" + bytes(byte for byte in range(128) if not chr(byte).isalnum())


class Unhurried(lanes.StrictParser):
    """Leaves every request to waitress."""

    def _read_plain(self, header: str) -> bool:
        return False


UNREAD = {"adj", "began", "first_line", "proxy_scheme", "proxy_netloc", "fragment", "connection_close"}  # by anybody
READ = {"body_rcv", "chunked", "content_length", "expect_continue"}  # for which waitress's class has a value
PLAIN = (
    b"GET /ab?c=%d&e HTTP/1.1\r\nHost: f:1\r\nCookie: g=h; i=j\r\n\r\n",
    b"HEAD / HTTP/1.1\r\nX-A: k l\r\nhost: m\r\nConnection: close\r\n\r\nGET",
    b"DELETE /ab HTTP/1.1\r\nHost: a\r\nB: " + b"x y" * 25 + b"\r\n\r\n",
)
NOT_PLAIN = (
    b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nhi",
    b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX-A: b\r\nx-a: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nCookie: b\r\nCookie: c\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nB: c\r\n d\r\n\r\n",
    b"GET / http/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n",
)


def understood(parser: lanes.StrictParser, stream: bytes) -> tuple[object, ...]:
    """Return all that is known of a request when its head was read; of a refused one, why it is refused."""
    consumed = parser.received(stream)
    if parser.error:
        return consumed, parser.error.code, parser.error.body
    known = {name: getattr(parser, name) for name in (vars(parser).keys() | READ) - UNREAD}
    return consumed, known | {"body_rcv": type(parser.body_rcv)}


def test_what_is_read_in_the_short_way_means_the_same_to_waitress() -> None:
    limits = Adjustments(max_request_body_size=lanes.LARGEST_BODY + 1, max_request_header_size=lanes.LARGEST_HEADER)

    def in_short(stream: bytes) -> bool:
        ours, careful = lanes.StrictParser(limits), Unhurried(limits)
        assert understood(ours, stream) == understood(careful, stream), stream
        return not hasattr(ours, "first_line")  # which only waitress notes

    assert [in_short(request) for request in PLAIN + NOT_PLAIN] == [True] * len(PLAIN) + [False] * len(NOT_PLAIN)
    for request in PLAIN + NOT_PLAIN:
        for at in range(len(request)):  # without this byte, with any other one instead, and with any one before it
            in_short(request[:at] + request[at + 1 :])
            for byte in BYTES:
                in_short(request[:at] + bytes([byte]) + request[at + 1 :])
                in_short(request[:at] + bytes([byte]) + request[at:])
    each(messages(), in_short, REQUESTS // 10)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Target, socket.socket]]:
    settings = made(str(tmp_path / "authsvc.db"), production=False)
    target = Target(settings, monkeypatch)
    listener = socket.create_server(("127.0.0.1", 0))
    ready = threading.Event()
    made_there: list[lanes.Server] = []

    def serve() -> None:
        serving = lanes.Lanes(authsvc.HASHING, 2, settings)
        made_there.append(lanes.Server(target.app, listener, serving))
        ready.set()
        made_there[0].run()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield target, listener
    made_there[0].stop(signal.SIGUSR1, None)
    thread.join(20)
    target.db.close()


def exchange(listener: socket.socket, sent: list[bytes]) -> list[bytes]:
    """Send each over a connection of its own, all at once; return what came back until nothing more did."""
    selector = selectors.DefaultSelector()
    came = [b""] * len(sent)
    for number, stream in enumerate(sent):
        connection = socket.create_connection(listener.getsockname())
        connection.sendall(stream)
        selector.register(connection, selectors.EVENT_READ, number)
    with socket.create_connection(listener.getsockname()) as last:  # once it is served, all the others have been read
        last.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert last.recv(65_536)
    while ready := selector.select(timeout=0.25):
        for key, _ in ready:
            assert isinstance(key.fileobj, socket.socket)
            try:
                chunk = key.fileobj.recv(65_536)
            except ConnectionResetError:  # it closed on what it did not read
                chunk = b""
            came[key.data] += chunk
            if not chunk:
                selector.unregister(key.fileobj)
                key.fileobj.close()
    for key in list(selector.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    selector.close()
    return came


def check_stream(came: bytes) -> list[int]:
    """Read answer after answer; return their statuses."""
    statuses = []
    while came:
        head, blank, rest = came.partition(b"\r\n\r\n")
        start, *fields = head.decode("latin-1").split("\r\n")
        assert blank
        found = re.fullmatch(r"HTTP/1\.[01] (\d{3}) .+", start)
        assert found, start
        status = int(found[1])
        if status == 100:
            came = rest
            continue
        headers = {name.title(): value for name, _, value in (field.partition(": ") for field in fields)}
        head_only = not rest or rest.startswith(b"HTTP/1.")
        length = 0 if head_only else int(headers["Content-Length"])
        names = {name.title(): name for name, _ in [*guard.SECURITY_HEADERS, guard.HSTS]} | {
            "X-Request-Id": "X-Request-ID"
        }
        check_answer(
            status, {names.get(name, name): value for name, value in headers.items()}, rest[:length], False, head_only
        )
        statuses.append(status)
        came = rest[length:]
    return statuses


def test_every_stream_of_bytes_has_answers_of_ours(
    server: tuple[Target, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, listener = server
    monkeypatch.setattr(sys, "stderr", target.log)  # again: pytest takes it back after the fixtures
    waiting: list[bytes] = []

    def flush() -> None:
        target.renew()
        sent = [target.filled(stream.decode("latin-1")).encode("latin-1") for stream in waiting]
        waiting.clear()
        for stream, came in zip(sent, exchange(listener, sent), strict=True):
            try:
                target.seen.update(check_stream(came))
            except AssertionError as error:
                raise AssertionError(f"{stream!r} was answered with {came!r}") from error

    def send(stream: bytes) -> None:
        waiting.append(stream)
        if len(waiting) == 100:
            flush()

    for stream in ODD_STREAMS:
        send(stream)
    each(streams, send, REQUESTS // 10)
    flush()
    assert b"Bienvenue" in exchange(listener, [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])[0]
    check_log(target.log.getvalue().splitlines())
    print(f"{REQUESTS // 10} streams, answers by status: {sorted(target.seen.items())}")
    assert target.seen.keys() >= {200, 400, 404, 405, 431}
