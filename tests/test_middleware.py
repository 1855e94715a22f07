"""The middleware: which requests reach a route, which headers every answer carries, and how a crash is answered."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from auth import Auth
from authsvc import create_app
from settings import Settings
from storage import DB
from tests.cases import each
from tests.conftest import COST, Answer, Client, raw_connection
from web.middleware import SecurityMiddleware, is_direct

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Cookie, Authorization",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SETTINGS = Settings()
BOB = {"email": "bob@x.io", "password": "b4l0u"}
SECRET = "hunter2 of\r\n\x1b\u2028 bob"  # the message of an error, as it may quote a request


def greet(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [environ["authsvc.client"].encode()]


def crash(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    raise LookupError(SECRET)


@pytest.fixture(scope="module")
def shared_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Return a client of an application with one user, shared by the tests that change nothing."""
    settings = Settings(database=str(tmp_path_factory.mktemp("middleware") / "authsvc.db"), bcrypt_cost=COST)
    db = DB(settings.database)
    client = Client(create_app(settings, Auth(db, settings)))
    client("POST", "/users", BOB)
    yield client
    db.close()


@pytest.fixture(scope="module")
def cookie(shared_client: Client) -> str:
    return f"session_id={shared_client('POST', '/sessions', BOB).session_id}"


def assert_complete(answer: Answer) -> None:
    assert SECURITY_HEADERS.items() <= answer.headers.items()
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-Id"])
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert "Strict-Transport-Security" not in answer.headers  # browsers ignore it over plain HTTP


# Headers of every answer


@each(
    ("status", "method", "path", "options"),
    [
        (200, "GET", "/", {}),
        (400, "POST", "/users", {}),
        (401, "POST", "/sessions", {"form": {"email": "nobody", "password": "p"}}),
        (403, "GET", "/profile", {}),
        (403, "GET", "/", {"REMOTE_ADDR": "10.0.0.1"}),
        (404, "GET", "/nowhere", {}),
        (404, "GET", "/profile", {"REQUEST_URI": "//profile"}),
        (405, "GET", "/users", {}),
        (413, "POST", "/users", {"body": b"a" * 20_000}),
        (415, "POST", "/users", {"body": b"a", "content_type": "text/plain"}),
    ],
)
def test_every_answer_carries_the_headers(
    shared_client: Client, status: int, method: str, path: str, options: dict[str, Any]
) -> None:
    answer = shared_client(method, path, **options)
    assert answer.status == status
    assert_complete(answer)


def test_a_redirect_carries_the_headers(call: Client) -> None:
    call("POST", "/users", BOB)
    answer = call("DELETE", "/sessions", cookie=f"session_id={call('POST', '/sessions', BOB).session_id}")
    assert answer.status == 302
    assert_complete(answer)


def test_a_crash_carries_the_headers() -> None:
    assert_complete(Client(SecurityMiddleware(crash, SETTINGS))("GET", "/"))


def test_each_answer_has_its_own_request_id() -> None:
    client = Client(SecurityMiddleware(greet, SETTINGS))
    assert len({client("GET", "/").headers["X-Request-Id"] for _ in range(50)}) == 50


# Crashes


def test_a_crash_is_answered_with_a_plain_500() -> None:
    answer = Client(SecurityMiddleware(crash, SETTINGS))("GET", "/", HTTP_HOST="evil.example")
    assert (answer.status, answer.json) == (500, {"message": "internal error"})


def test_a_crash_is_logged_as_one_line_of_ascii_json(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Client(SecurityMiddleware(crash, SETTINGS))(
        "GET", "/?q=1", HTTP_HOST="evil.example", HTTP_COOKIE="session_id=x"
    )
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.isascii()
    assert printed.err.splitlines() == [printed.err.removesuffix("\n")]
    line = json.loads(printed.err)
    assert (line["event"], line["error"]) == ("sys_crash", "LookupError")
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert line["frames"][-1].endswith(" crash")
    assert not re.search("hunter2|Traceback|evil|session_id|q=1", printed.err)


@pytest.mark.both_engines
def test_a_crash_in_a_route_tells_the_client_nothing(
    call: Client, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with raw_connection(settings.database) as other:
        other.execute("ALTER TABLE users RENAME COLUMN email_key TO gone")
    answer = call("POST", "/users", BOB, HTTP_HOST="evil.example")
    assert (answer.status, answer.json) == (500, {"message": "internal error"})
    assert_complete(answer)
    log = capsys.readouterr().err
    assert json.loads(log)["event"] == "sys_crash"
    assert not re.search("no such column|does not exist|Traceback|evil|bob|b4l0u", log)


def test_a_refusal_of_a_head_request_has_no_body() -> None:
    answer = Client(SecurityMiddleware(greet, SETTINGS))("HEAD", "/", REMOTE_ADDR="10.0.0.1")
    assert (answer.status, answer.body) == (403, b"")


# Paths. A server has normalized each of the requested ones to the path beside it.


@each(
    ("requested", "path"),
    [
        ("/pro%fffile", "/pro\xfffile"),
        ("//profile", "/profile"),
        ("/./profile", "/profile"),
        ("/profile/", "/profile/"),
        ("/profile/", "/profile"),
        ("/profile/?x=1", "/profile/"),
        ("http://evil/profile", "/profile"),
        ("/profile#x", "/profile"),
        ("/profile;x=1", "/profile;x=1"),
        ("/%70rofile", "/profile"),
        ("/profile%00", "/profile\0"),
        ("/pro\xfffile", "/pro\xfffile"),
        ("/profile\xc3\xa9", "/profile\xc3\xa9"),
        ("", "/profile"),
    ],
)
def test_a_path_that_is_spelled_differently_is_not_found(
    shared_client: Client, cookie: str, requested: str, path: str
) -> None:
    answer = shared_client("GET", path, cookie=cookie, REQUEST_URI=requested)
    assert (answer.status, answer.json) == (404, {"message": "not found"})


def test_undecodable_bytes_in_a_path_are_not_dropped(shared_client: Client, cookie: str) -> None:
    assert shared_client("GET", "/pro\xfffile", cookie=cookie).status == 404


@each("requested", ["/profile", "/profile?x=1", "/profile?", "/profile?next=//evil/#x?y"])
def test_a_query_is_not_part_of_the_path(shared_client: Client, cookie: str, requested: str) -> None:
    answer = shared_client("GET", "/profile", cookie=cookie, REQUEST_URI=requested)
    assert (answer.status, answer.json) == (200, {"email": "bob@x.io"})


def test_a_mount_point_is_part_of_the_requested_path() -> None:
    client = Client(SecurityMiddleware(greet, SETTINGS))
    assert client("GET", "/profile", SCRIPT_NAME="/auth", REQUEST_URI="/auth/profile").status == 200
    assert client("GET", "/profile", SCRIPT_NAME="/auth", REQUEST_URI="/profile").status == 404


# Peers

LOCAL = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost"]
REMOTE = ["", "10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1", "2001:db8::1", "128.0.0.1", "evil", "127.0.0.1.evil"]


@each("address", LOCAL)
def test_requests_from_this_machine_are_accepted(address: str) -> None:
    assert Client(SecurityMiddleware(greet, SETTINGS))("GET", "/", REMOTE_ADDR=address).status == 200


def test_a_peer_without_an_address_is_accepted() -> None:
    assert Client(SecurityMiddleware(greet, SETTINGS))("GET", "/").status == 200


@each("address", REMOTE)
def test_requests_from_another_machine_are_refused(address: str) -> None:
    answer = Client(SecurityMiddleware(greet, SETTINGS))("GET", "/", REMOTE_ADDR=address)
    assert (answer.status, list(answer.json)) == (403, ["message"])


@pytest.mark.parametrize("environ", [{}, {"REMOTE_ADDR": ""}, {"REMOTE_ADDR": "", "HTTP_X_FORWARDED_FOR": "192.0.2.1"}])
def test_a_client_without_an_address_is_named_unknown(environ: dict[str, Any]) -> None:
    production = Settings(public_url="https://auth.example.com", trusted_proxy="127.0.0.1", bcrypt_cost=10)
    assert Client(SecurityMiddleware(greet, production))("GET", "/", **environ).body == b"unknown"


@each(
    ("client", "environ"),
    [
        ("192.0.2.1", {"REMOTE_ADDR": "::ffff:192.0.2.1"}),
        ("192.0.2.1", {"REMOTE_ADDR": "::ffff:10.20.0.1", "HTTP_X_FORWARDED_FOR": "6.6.6.6, 192.0.2.1:80, 127.0.0.1"}),
        ("192.0.2.1", {"REMOTE_ADDR": "192.0.2.1", "HTTP_X_FORWARDED_FOR": "6.6.6.6"}),
        ("2001:db8::1", {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "[2001:DB8::1]:443"}),
        ("fe80::1", {"REMOTE_ADDR": "fe80::1%eth0"}),
        ("localhost", {"REMOTE_ADDR": "localhost", "HTTP_X_FORWARDED_FOR": "6.6.6.6"}),
    ],
)
def test_the_address_of_a_client_has_one_spelling(client: str, environ: dict[str, Any]) -> None:
    production = Settings(public_url="https://auth.example.com", trusted_proxy="127.0.0.1, 10.20.0.0/16")
    assert Client(SecurityMiddleware(greet, production))("GET", "/", **environ).body == client.encode()


def test_a_forwarded_address_does_not_make_a_peer_local() -> None:
    client = Client(SecurityMiddleware(greet, SETTINGS))
    assert client("GET", "/", REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR="127.0.0.1").status == 403


@each("address", REMOTE)
def test_unsafe_listen_accepts_every_peer(address: str) -> None:
    client = Client(SecurityMiddleware(greet, Settings(unsafe_listen=True)))
    assert client("GET", "/", REMOTE_ADDR=address).status == 200


@each(
    ("direct", "environ"),
    [
        *((True, {"REMOTE_ADDR": address}) for address in LOCAL),
        *((False, {"REMOTE_ADDR": address}) for address in REMOTE),
        (True, {}),
        (True, {"HTTP_USER_AGENT": "curl"}),
        (False, {"HTTP_FORWARDED": "for=127.0.0.1"}),
        (False, {"HTTP_VIA": "1.1 proxy"}),
        (False, {"HTTP_X_REAL_IP": "127.0.0.1"}),
        (False, {"HTTP_X_FORWARDED_FOR": "127.0.0.1"}),
        (False, {"HTTP_X_FORWARDED": "127.0.0.1"}),
        (False, {"HTTP_X_FORWARDED_PROTO": ""}),
        (False, {"HTTP_X_FORWARDED_HOST": "localhost"}),
        (False, {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "127.0.0.1"}),
    ],
)
def test_only_a_local_peer_without_a_proxy_is_direct(direct: bool, environ: dict[str, Any]) -> None:
    assert is_direct(environ) is direct


HOST_NAMES = ["localhost", "LocalHost", "127.0.0.1", "127.0.0.2", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"]


@each(
    ("host", "direct"),
    [
        *((host + port, True) for host in HOST_NAMES for port in ("", ":5000")),
        ("rebound.example:5000", False),
        ("rebound.example", False),
        ("0.0.0.0.rebound.example:5000", False),
        ("127.0.0.1.rebound.example", False),
        ("rebound.example:0.0.0.0", False),
        ("0.0.0.1:5000", False),
        ("10.0.0.1:5000", False),
        ("[::2]:5000", False),
        ("[0.0.0.0:5000", False),
        ("[[::]]:5000", False),
        (":5000", False),
        ("", False),
    ],
)
def test_only_a_host_name_of_this_machine_is_direct(host: str, direct: bool) -> None:
    assert is_direct({"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": host}) is direct


@pytest.mark.parametrize(
    "headers",
    [
        {"HTTP_HOST": "0.0.0.0:5000", "HTTP_ORIGIN": "https://evil.example"},
        {"HTTP_HOST": "0.0.0.0:5000", "HTTP_ORIGIN": "null"},
        {"HTTP_HOST": "0.0.0.0:5000", "HTTP_ORIGIN": "http://0.0.0.0:8000"},
        {"HTTP_HOST": "0.0.0.0:5000", "HTTP_SEC_FETCH_SITE": "cross-site"},
        {"HTTP_HOST": "0.0.0.0:5000", "HTTP_SEC_FETCH_SITE": "same-site", "HTTP_ORIGIN": "http://0.0.0.0:8000"},
        {"HTTP_HOST": "[::]:5000", "HTTP_ORIGIN": "http://[::]:8000"},
        {"HTTP_HOST": "rebound.example:5000"},
        {"HTTP_HOST": "rebound.example:5000", "HTTP_ORIGIN": "http://rebound.example:5000"},
    ],
)
def test_a_page_of_another_origin_gets_no_reset_token(call: Client, headers: dict[str, Any]) -> None:
    call("POST", "/users", BOB)
    answer = call("POST", "/reset_password", {"email": BOB["email"]}, REMOTE_ADDR="127.0.0.1", **headers)
    assert answer.status == 403
    assert list(answer.json) == ["message"]


# A log that cannot be written


def closed_stream() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [closed_stream(), None], ids=["closed", "absent"])  # absent: started with 2>&-
def test_a_crash_is_answered_when_the_log_is_closed(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert Client(SecurityMiddleware(crash, SETTINGS))("GET", "/").status == 500
