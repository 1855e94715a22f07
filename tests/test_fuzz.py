"""Generated requests: every one gets an answer of the documented form, and none makes the service fail.

The same requests are generated in each run. FUZZ_SEED chooses others, and FUZZ_REQUESTS how many (30 ms each at most):

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

import authsvc
import log
import web.server
from auth import UNCOUNTED, Auth, UnknownEmail
from credentials import passwords, totp
from settings import Settings, is_url
from storage import DB
from tests.conftest import COST, Clock
from tests.parsers import is_accepted
from tests.production import production_settings
from web import middleware, responses

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "600"))  # for each test of the application
STREAMS = REQUESTS // 3  # for the test of the server
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 60 + REQUESTS * 0.03  # for each test; one that takes longer hangs
BATCH = 500  # examples of one seed; hypothesis slows down as it remembers them all

REPEATABLE = hypothesis_settings(
    derandomize=True, database=None, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck)
)

EMAIL, PASSWORD = "bob@example.com", "correct horse battery"
SESSION, PUBLIC_ID, TOKEN, CODE = "{session}", "{public_id}", "{token}", "{code}"  # replaced by valid ones in a request

T = TypeVar("T")


def for_examples(strategy: st.SearchStrategy[T], use: Callable[[T], object], count: int) -> None:
    """Call ``use`` with ``count`` different examples, which are always the same for one FUZZ_SEED."""
    end = time.monotonic() + SECONDS
    for first in range(0, count, BATCH):

        @seed(SEED * 1_000_000 + first)
        @hypothesis_settings(REPEATABLE, max_examples=min(BATCH, count - first))
        @given(strategy)
        def run(example: T) -> None:
            use(example)

        run()
        assert time.monotonic() < end


# The parts of requests. Most of them are close to what the service accepts.

methods = st.sampled_from(["GET", "POST", "POST", "PUT", "DELETE"]) | st.sampled_from(
    ["HEAD", "OPTIONS", "PATCH", "TRACE", "ANY", "PROXY", "get", "", "POST ", "M-SEARCH"]
)
routes = st.sampled_from(
    [path.replace("<public_id>", PUBLIC_ID).replace("<token_id>", "1") for _, path, *_ in authsvc.ROUTES]
)
latin = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=30)
paths = routes | st.builds(
    "".join, st.lists(routes | latin | st.sampled_from(["/", "//", "..", "%2f", "?", "#", "é"]), max_size=4)
)
names = st.sampled_from(["email", "password", "reset_token", "new_password", "otp", "name", "days"])
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
            **dict.fromkeys(("reset_token", "new_password", "name", "days", "extra", "id"), values),
            "password": st.just(PASSWORD) | values,
            "otp": st.just(CODE) | values,
        },
    ),
)
pairs = fields.map(lambda fields: list(fields.items())) | st.lists(
    st.tuples(names | st.text(max_size=9), values), max_size=10
)
pieces = st.binary(max_size=20) | st.sampled_from(
    [b"email=a", b"&", b"=", b"%", b"%ff", b"%00", b"--", b"\r\n", b"\r\n\r\n", b'"', b"[", b"{", b"\\ud800", b"\xff"]
)
random_bytes = st.lists(pieces, max_size=12).map(b"".join)


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
typed_bodies = (
    pairs.map(lambda found: ("application/x-www-form-urlencoded", urlencoded(found)))
    | documents.map(lambda text: ("application/json", text.encode(errors="surrogatepass")))
    | st.sampled_from(ODD_DOCUMENTS).map(lambda text: ("application/json", text.encode()))
    | multipart()
    | st.tuples(kinds | latin, random_bytes)
    | st.tuples(kinds, st.just(b"email=" + b"x" * 20_000))
)


@st.composite
def damaged_bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    kind, body = draw(typed_bodies)
    at = draw(st.integers(0, len(body)))
    return kind, body[:at] + draw(pieces) + body[at + draw(st.integers(0, 3)) :]


RIGHT = {"email": EMAIL, "password": PASSWORD, "otp": CODE, "reset_token": TOKEN, "new_password": PASSWORD[::-1]}
RIGHT |= {"name": "git", "days": "30"}
right = [
    ("application/x-www-form-urlencoded", urlencode(RIGHT, safe="{}").encode()),
    ("application/json", json.dumps(RIGHT).encode()),
]
bodies = typed_bodies | typed_bodies | damaged_bodies() | st.sampled_from(right)
ODD_VALUES = ("", "\ud800", "a\0b", "é" * 600, 5, None, ["a"], {"a": "b"})
# Sent in every run. The right ones come three times, once for each state of the second factor.
FIXED_BODIES = [
    *[("application/json", json.dumps({**RIGHT, name: value}).encode()) for name in RIGHT for value in ODD_VALUES],
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
valid_cookies = st.sampled_from(
    [
        f"session_id={SESSION}; __Host-session_id={SESSION}",
        f"__Host-session_id={SESSION}",
        f"é; a{{b}}=1;session_id={SESSION} ;__Host-session_id={SESSION} ;",
    ]
)
cookies = valid_cookies | valid_cookies | st.lists(cookie_pairs | latin, max_size=4).map("; ".join)
addresses = (
    st.ip_addresses().map(str)
    | st.sampled_from(["evil", "", "::ffff:1.2.3.4", "[::1]:80", "1.2.3.4, 198.18.0.1"])
    | latin
)
credentials = st.sampled_from(["authsvc_", "authsvc_" + "é" * 43, "YjphdXRoc3ZjXw==", "="]) | latin
lengths = st.sampled_from(["", "-1", "abc", "0", "5", "99999999999"])
headers = st.fixed_dictionaries(
    {},
    optional={
        "HTTP_COOKIE": cookies,
        "HTTP_AUTHORIZATION": st.builds("{} {}".format, st.sampled_from(["Bearer", "basic"]) | latin, credentials),
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
# Routes that need a session, and all but the first the current password.
confirmed_routes = [
    ("PUT", "/totp"),
    ("POST", "/totp"),
    ("DELETE", "/totp"),
    ("PUT", "/password"),
    ("POST", "/tokens"),
    ("DELETE", "/profile"),
]
form_routes = [
    (method, path)
    for method, path, *_ in authsvc.ROUTES
    if method in ("POST", "PUT") and (method, path) not in confirmed_routes
]
listed = st.sampled_from(["/profile", "/sessions", "/tokens", "/verify"])
deleted = st.sampled_from(["/sessions/others", "/tokens/1", f"/sessions/{PUBLIC_ID}", "/sessions/all"])
RequestParts = tuple[str, str, tuple[str, bytes], dict[str, str], str | None, bool]
SIGNED_IN = {"HTTP_COOKIE": f"session_id={SESSION}; __Host-session_id={SESSION}"}
REQUESTS_PER_EXAMPLE = len(form_routes) + 5


@st.composite
def request_lists(draw: st.DrawFn) -> list[RequestParts]:
    """One body for the routes that take one, one set of headers for those with a cookie, and both for any path."""
    body, headers_sent = draw(bodies), draw(headers)
    length = {"CONTENT_LENGTH": draw(lengths)} if draw(st.integers(0, 9)) == 5 else {}
    return [
        ("GET", draw(listed), ("", b""), headers_sent, "127.0.0.1", True),
        (*draw(st.sampled_from(confirmed_routes)), body, SIGNED_IN | length, "127.0.0.1", True),
        *((method, path, body, length, "127.0.0.1", True) for method, path in form_routes),
        ("DELETE", draw(deleted), ("", b""), headers_sent, "127.0.0.1", True),
        ("DELETE", "/sessions", ("", b""), headers_sent, "127.0.0.1", True),
        (draw(methods), draw(paths), body, headers_sent, draw(peers), draw(st.booleans())),
    ]


class Target:
    """The application on a database of its own, with one user. Its log is written to ``log``."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = io.StringIO()
        self.seen: Counter[int] = Counter()  # answers by status
        middleware._warn_of_ignored_forwarding()  # a line that is logged once in a process, with any request
        monkeypatch.setattr(sys, "stderr", self.log)
        monkeypatch.setattr(log, "FLOOD_LIMIT", sys.maxsize)
        self.settings = settings
        self.production = settings.production
        self.clock = Clock()
        self.db = DB(settings.database)
        self.auth = Auth(self.db, settings, self.clock)
        self.app = authsvc.create_app(settings, self.auth)
        self.hashed = passwords.hash_password(PASSWORD, COST)
        self.rounds = 0
        self.renew()

    def renew(self) -> None:
        """Restore the user: in turn without a second factor, with an unconfirmed one, and with a confirmed one."""
        try:
            user = self.auth.find_user(EMAIL)
        except UnknownEmail:
            self.db.emails.release(EMAIL)  # in production the email of a deleted user is reserved
            user = self.db.add_user(EMAIL, self.hashed)
        self.db.update_user(user.id, hashed_password=self.hashed)
        self.db.remove_totp(user.id)
        self.db.end_sessions(user.id)
        session_id, seed = str(self.auth.create_session(EMAIL)), totp.new_seed()
        if self.rounds % 3:
            user = self.auth.find_user(EMAIL)
            self.db.set_totp(user, seed, str(user.session_id), str(user.session_id))
        if self.rounds % 3 == 2:
            _, session_id, _ = self.auth.confirm_totp(
                session_id, totp.code(seed, int(self.clock()) // totp.STEP), caller=UNCOUNTED
            )
            self.clock.advance(totp.STEP)
        self.rounds += 1
        self.valid = {
            SESSION: session_id,
            PUBLIC_ID: self.auth.list_sessions(session_id)[2],
            TOKEN: self.auth.get_reset_password_token(EMAIL),
            CODE: totp.code(seed, int(self.clock()) // totp.STEP),
        }

    def filled(self, text: str) -> str:
        for name, value in self.valid.items():
            text = text.replace(name, value)
        return text

    def call_all(self, requests: list[RequestParts]) -> None:
        self.clock.advance(3600)
        self.renew()
        for request in requests:
            self.call(*request)

    def call(
        self,
        method: str,
        path: str,
        content: tuple[str, bytes],
        headers_sent: dict[str, str],
        peer: str | None,
        with_uri: bool,
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
            **{name: self.filled(value) for name, value in headers_sent.items()},
            **({} if peer is None else {"REMOTE_ADDR": peer}),
            **({"REQUEST_URI": path} if with_uri else {}),
        }
        started: list[Any] = []
        self.log.seek(0)
        self.log.truncate()
        app: Any = self.app
        answer = b"".join(app(environ, lambda status, headers, exc_info=None: started.append((status, headers))))
        [(status, headers)] = started
        lines = self.log.getvalue().splitlines()
        assert len(lines) <= 1, lines
        check_log(lines)
        check_answer(int(status[:3]), dict(headers), answer, self.production, head=method.upper() == "HEAD")
        names = [name for name, value in headers if not value.startswith("__Host-device=")]
        assert len(set(names)) == len(names)
        self.seen[int(status[:3])] += 1


def check_answer(status: int, headers: dict[str, str], body: bytes, production: bool, head: bool = False) -> None:
    assert status < 500 or status == 501, (status, body)
    page = headers["Content-Type"].startswith("text/")
    common = dict([*responses.SECURITY_HEADERS, responses.HSTS] if production else responses.SECURITY_HEADERS)
    common |= {"Content-Security-Policy": responses.PAGE_POLICY[1]} if page else {"Content-Type": "application/json"}
    varies = re.fullmatch(r"(?:Accept(?:-Language)?, )?(.*)", headers["Vary"])
    for name, value in common.items():
        assert headers[name] == value or (name == "Vary" and varies and varies[1] == value), (status, name)
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
    kinds: dict[str, Any] = {
        "sessions": list,
        "tokens": list,
        "recovery_codes": list,
        "second_factor": bool,
        "expires": str | None,
    }
    kinds |= dict.fromkeys(("passkeys", "pubKeyCredParams", "excludeCredentials", "allowCredentials"), list)
    kinds |= dict.fromkeys(("rp", "user", "authenticatorSelection"), dict) | {"timeout": int}
    assert all(isinstance(value, kinds.get(name, str)) for name, value in content.items())
    assert status < 400 or (content.keys() == {"message"} and content["message"])


def check_log(lines: list[str]) -> None:
    for line in lines:
        assert line.isascii()
        assert json.loads(line)["event"] not in ("sys_crash", "sys_server"), line


def settings_for(database: str, production: bool) -> Settings:
    if not production:
        return Settings(database=database, bcrypt_cost=COST, throttle=False, sessions_per_user=100)
    return production_settings(database, trusted_proxy="127.0.0.1", sessions_per_user=100)


@pytest.mark.both_engines
def test_every_request_gets_an_answer_of_the_documented_form(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each engine once and each mode once: what depends on one of them does not depend on the other.
    target = Target(settings_for(database, production=not is_url(database)), monkeypatch)
    for content in FIXED_BODIES:
        routes = [*confirmed_routes, *form_routes, ("GET", "/account"), ("GET", "/.well-known/change-password")]
        target.call_all([(*route, content, SIGNED_IN, "127.0.0.1", True) for route in routes])
    for_examples(request_lists(), target.call_all, REQUESTS // REQUESTS_PER_EXAMPLE + 1)
    target.db.close()
    monkeypatch.undo()
    print(f"{target.seen.total()} requests, by status: {sorted(target.seen.items())}")
    # Without one of these statuses, the generator no longer reaches the routes.
    assert target.seen.keys() >= {200, 302, 400, 401, 403, 404, 405, 415}


# Bytes on a socket, which need not be HTTP

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
    b"GET http://evil/profile HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a//profile HTTP/1.1\r\nHost: a\r\n\r\n",
    b"POST /users HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET",
    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 20,
)
streams = messages() | st.lists(messages(), min_size=2, max_size=3).map(b"".join) | random_bytes


# Heads, many of them well formed.
plain_starts = st.sampled_from([b"GET / HTTP/1.1", b"HEAD /profile HTTP/1.1", b"GET /verify?login=1 HTTP/1.1"])
printable = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20).map(str.encode)
plain_lines = st.builds(
    b"%b: %b".__mod__, st.tuples(st.sampled_from([b"X-A", b"x-a", b"X-B", b"Accept", b"Connection"]), printable)
)
nearly_plain_heads = st.builds(
    lambda start, host, others: b"\r\n".join([start, host, *others]) + b"\r\n\r\n",
    plain_starts | plain_starts | starts,
    st.sampled_from([b"Host: a", b"Host: a", b"host: a", b"X-C: a"]),
    st.lists(plain_lines | plain_lines | lines, max_size=3),
)


def test_generated_requests_that_are_accepted_are_understood_as_waitress_does() -> None:
    accepted = 0

    def compare(stream: bytes) -> None:
        nonlocal accepted
        accepted += is_accepted(stream)

    for_examples(nearly_plain_heads, compare, REQUESTS // 2)
    print(f"{accepted} of {REQUESTS // 2} requests are accepted")
    assert accepted > REQUESTS // 20


class RunningServer:
    """The server in this process, on a thread of its own."""

    def __init__(self, target: Target, settings: Settings) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        ready = threading.Event()

        rank = authsvc.Handlers(target.auth, settings).rank

        def serve() -> None:
            dispatcher = web.server.Dispatcher(authsvc.HASHING_ROUTES, 2, settings, rank)
            self._server = web.server.Server(target.app, listener, dispatcher)
            ready.set()
            self._server.run()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        self._server.stop(signal.SIGUSR1, None)
        self._thread.join(20)

    def is_idle(self) -> bool:
        """Return whether every request that was read is answered."""
        return not self._server._in_hand() and not self._server.answers

    def exchange(self, streams: list[bytes]) -> list[bytes]:
        """Send each stream over a connection of its own, all at once; return what the server answers to each."""
        selector = selectors.DefaultSelector()
        answers = [b""] * len(streams)
        for number, stream in enumerate(streams):
            connection = socket.create_connection(self.address)
            connection.sendall(stream)
            selector.register(connection, selectors.EVENT_READ, number)
        # The server reads up to RECEIVED_AT_ONCE of each connection before it answers the next ping. After so many
        # pings without an answer on any other connection it has read all of them.
        pings = 2 + max(map(len, streams)) // RECEIVED_AT_ONCE
        quiet, end = 0, time.monotonic() + SECONDS
        with socket.create_connection(self.address) as last:
            while quiet < pings:
                assert time.monotonic() < end
                last.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert last.recv(65_536)
                idle = self.is_idle()  # asked before the answers are read, so that none can come in between
                quiet = 0 if _receive(selector, answers) or not idle else quiet + 1
        for key in list(selector.get_map().values()):
            _socket(key).close()
        selector.close()
        return answers


RECEIVED_AT_ONCE = 8192  # bytes; the setting recv_bytes of waitress


def _receive(selector: selectors.BaseSelector, answers: list[bytes]) -> bool:
    ready = selector.select(timeout=0)
    for key, _ in ready:
        try:
            chunk = _socket(key).recv(65_536)
        except ConnectionResetError:  # the server closed the connection with unread bytes
            chunk = b""
        answers[key.data] += chunk
        if not chunk:
            selector.unregister(key.fileobj)
            _socket(key).close()
    return bool(ready)


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    one = Target(settings_for(str(tmp_path / "authsvc.db"), production=False), monkeypatch)
    yield one
    one.db.close()


@pytest.fixture
def server(target: Target) -> Iterator[RunningServer]:
    one = RunningServer(target, target.settings)
    yield one
    one.stop()


def check_stream(answers: bytes) -> list[int]:
    """Check the answers on one connection, one after the other; return their statuses."""
    statuses = []
    while answers:
        head, blank, rest = answers.partition(b"\r\n\r\n")
        status_line, *fields = head.decode("latin-1").split("\r\n")
        assert blank
        found = re.fullmatch(r"HTTP/1\.[01] (\d{3}) .+", status_line)
        assert found, status_line
        status = int(found[1])
        if status == 100:
            answers = rest
            continue
        headers = {name.title(): value for name, _, value in (field.partition(": ") for field in fields)}
        head_only = not rest or rest.startswith(b"HTTP/1.")
        length = 0 if head_only else int(headers["Content-Length"])
        documented = {HEADER_NAMES.get(name, name): value for name, value in headers.items()}
        check_answer(status, documented, rest[:length], False, head_only)
        statuses.append(status)
        answers = rest[length:]
    return statuses


# waitress changes the case of some names.
HEADER_NAMES = {name.title(): name for name, _ in responses.SECURITY_HEADERS} | {"X-Request-Id": "X-Request-ID"}


def test_every_stream_of_bytes_gets_answers_of_the_documented_form(
    target: Target, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", target.log)  # once more, because pytest sets its own after the fixtures
    waiting: list[bytes] = []

    def flush() -> None:
        target.renew()
        sent = [target.filled(stream.decode("latin-1")).encode("latin-1") for stream in waiting]
        waiting.clear()
        for stream, answers in zip(sent, server.exchange(sent), strict=True):
            try:
                target.seen.update(check_stream(answers))
            except AssertionError as error:
                raise AssertionError(f"{stream!r} was answered with {answers!r}") from error

    def send(stream: bytes) -> None:
        waiting.append(stream)
        if len(waiting) == 100:
            flush()

    for stream in ODD_STREAMS:
        send(stream)
    for_examples(streams, send, STREAMS)
    if waiting:
        flush()
    assert b"Bienvenue" in server.exchange([b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])[0]
    check_log(target.log.getvalue().splitlines())
    print(f"{STREAMS} streams, answers by status: {sorted(target.seen.items())}")
    assert target.seen.keys() >= {200, 400, 404, 405, 431}
