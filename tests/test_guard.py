"""The gate: who is let in, which paths are plain, what every answer carries, and the log."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import guard
from auth import Auth
from authsvc import create_app
from settings import Settings
from storage import open_store
from tests.conftest import COST, Answer, Client, ledger_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

CARRIED = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Cookie",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
BOB = {"email": "bob@x.io", "password": "b4l0u"}
SECRET = "hunter2 of\r\n\x1b\u2028 bob"


def hello(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b"hello"]


def broken(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    raise LookupError(SECRET)


@pytest.fixture(scope="module")
def bobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The application with one user, shared by the tests that change nothing."""
    settings = Settings(database=str(tmp_path_factory.mktemp("guard") / "authsvc.db"), bcrypt_cost=COST)
    db = open_store(settings.database)
    client = Client(create_app(settings, Auth(db, settings)))
    client("POST", "/users", BOB)
    yield client
    db.close()


@pytest.fixture(scope="module")
def cookie(bobs: Client) -> str:
    return f"session_id={bobs('POST', '/sessions', BOB).session_id}"


def assert_complete(answer: Answer) -> None:
    assert CARRIED.items() <= answer.headers.items()
    assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-Id"])
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Content-Length"] == str(len(answer.body))
    assert "Strict-Transport-Security" not in answer.headers  # over plain http it would mean nothing


# What every answer carries


@pytest.mark.parametrize(
    ("status", "method", "path", "rest"),
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
    bobs: Client, status: int, method: str, path: str, rest: dict[str, Any]
) -> None:
    answer = bobs(method, path, **rest)
    assert answer.status == status
    assert_complete(answer)


def test_a_redirect_carries_the_headers(call: Client) -> None:
    call("POST", "/users", BOB)
    answer = call("DELETE", "/sessions", cookie=f"session_id={call('POST', '/sessions', BOB).session_id}")
    assert answer.status == 302
    assert_complete(answer)


def test_a_crash_carries_the_headers(settings: Settings) -> None:
    assert_complete(Client(guard.Guard(broken, settings))("GET", "/"))


def test_no_two_answers_have_one_request_id(settings: Settings) -> None:
    client = Client(guard.Guard(hello, settings))
    assert len({client("GET", "/").headers["X-Request-Id"] for _ in range(50)}) == 50


# Crashes


def test_a_crash_is_a_plain_500(settings: Settings) -> None:
    answer = Client(guard.Guard(broken, settings))("GET", "/", HTTP_HOST="evil.example")
    assert (answer.status, answer.json) == (500, {"message": "internal error"})


def test_a_crash_is_one_line_of_ascii_json(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    answer = Client(guard.Guard(broken, settings))("GET", "/?q=1", HTTP_HOST="evil.example", HTTP_COOKIE="session_id=x")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.isascii()
    assert printed.err.splitlines() == [printed.err.removesuffix("\n")]
    line = json.loads(printed.err)
    assert (line["event"], line["error"]) == ("sys_crash", "LookupError")
    assert line["request_id"] == answer.headers["X-Request-Id"]
    assert line["frames"][-1].endswith(" broken")
    assert not re.search("hunter2|Traceback|evil|session_id|q=1", printed.err)


def test_a_crash_in_a_route_tells_the_client_nothing(
    call: Client, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with ledger_of(settings.database) as other:
        other.execute("ALTER TABLE users RENAME COLUMN email_key TO gone")
    answer = call("POST", "/users", BOB, HTTP_HOST="evil.example")
    assert (answer.status, answer.json) == (500, {"message": "internal error"})
    assert_complete(answer)
    log = capsys.readouterr().err
    assert json.loads(log)["event"] == "sys_crash"
    assert not re.search("no such column|Traceback|evil|bob|b4l0u", log)


def test_a_refusal_of_a_head_request_has_no_body(settings: Settings) -> None:
    answer = Client(guard.Guard(hello, settings))("HEAD", "/", REMOTE_ADDR="10.0.0.1")
    assert (answer.status, answer.body) == (403, b"")


# Paths: the server has reduced all of these to what is in PATH_INFO


@pytest.mark.parametrize(
    ("asked", "path"),
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
def test_only_the_plain_path_is_the_route(bobs: Client, cookie: str, asked: str, path: str) -> None:
    answer = bobs("GET", path, cookie=cookie, REQUEST_URI=asked)
    assert (answer.status, answer.json) == (404, {"message": "not found"})


def test_undecodable_bytes_in_a_path_are_not_dropped(bobs: Client, cookie: str) -> None:
    assert bobs("GET", "/pro\xfffile", cookie=cookie).status == 404


@pytest.mark.parametrize("asked", ["/profile", "/profile?x=1", "/profile?", "/profile?next=//evil/#x?y"])
def test_a_query_is_no_part_of_the_path(bobs: Client, cookie: str, asked: str) -> None:
    answer = bobs("GET", "/profile", cookie=cookie, REQUEST_URI=asked)
    assert (answer.status, answer.json) == (200, {"email": "bob@x.io"})


def test_the_path_below_a_mount_point_is_plain(settings: Settings) -> None:
    client = Client(guard.Guard(hello, settings))
    assert client("GET", "/profile", SCRIPT_NAME="/auth", REQUEST_URI="/auth/profile").status == 200
    assert client("GET", "/profile", SCRIPT_NAME="/auth", REQUEST_URI="/profile").status == 404


# Peers

HERE = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost"]
ELSEWHERE = ["10.0.0.1", "0.0.0.0", "::", "::ffff:10.0.0.1", "2001:db8::1", "128.0.0.1", "evil", "127.0.0.1.evil"]


@pytest.mark.parametrize("address", HERE)
def test_this_machine_is_let_in(settings: Settings, address: str) -> None:
    assert Client(guard.Guard(hello, settings))("GET", "/", REMOTE_ADDR=address).status == 200


def test_a_peer_without_an_address_is_let_in(settings: Settings) -> None:
    assert Client(guard.Guard(hello, settings))("GET", "/").status == 200


@pytest.mark.parametrize("address", ELSEWHERE)
def test_another_machine_is_refused(settings: Settings, address: str) -> None:
    answer = Client(guard.Guard(hello, settings))("GET", "/", REMOTE_ADDR=address)
    assert (answer.status, list(answer.json)) == (403, ["message"])


def test_a_forwarded_address_lets_nobody_in(settings: Settings) -> None:
    client = Client(guard.Guard(hello, settings))
    assert client("GET", "/", REMOTE_ADDR="10.0.0.1", HTTP_X_FORWARDED_FOR="127.0.0.1").status == 403


@pytest.mark.parametrize("address", ELSEWHERE)
def test_the_override_lets_everybody_in(settings: Settings, address: str) -> None:
    client = Client(guard.Guard(hello, replace(settings, unsafe_listen=True)))
    assert client("GET", "/", REMOTE_ADDR=address).status == 200


@pytest.mark.parametrize(
    ("direct", "environ"),
    [
        *((True, {"REMOTE_ADDR": address}) for address in HERE),
        *((False, {"REMOTE_ADDR": address}) for address in ELSEWHERE),
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
def test_direct_is_this_machine_and_no_proxy(direct: bool, environ: dict[str, Any]) -> None:
    assert guard.is_direct(environ) is direct


# The log


def test_a_log_line_is_ascii_json_with_a_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    guard.log("user_created", user_id=7)
    line = json.loads(capsys.readouterr().err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {"event": "user_created", "user_id": 7}


def test_a_log_line_is_out_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        guard.log("event")
        assert (tmp_path / "log").read_text().endswith("}\n")


@pytest.mark.parametrize("text", ["\r\n", "\x1b[2J", "\u2028", "\x85", "\0", "é", '"}\n{"event": "forged"}', "\ud800"])
def test_a_log_line_cannot_be_broken_or_forged(capsys: pytest.CaptureFixture[str], text: str) -> None:
    guard.log("event", text=text)
    printed = capsys.readouterr().err
    assert re.fullmatch(r"[ -~]+\n", printed)
    assert json.loads(printed)["text"] == text


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.fixture
def full() -> Iterator[Any]:
    stream = open("/dev/full", "w")  # noqa: SIM115
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


def test_a_log_on_a_full_disk_stops_nobody(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    monkeypatch.setattr(sys, "stderr", full)
    guard.log("event")


@pytest.mark.parametrize("stream", [closed(), None], ids=["closed", "absent"])  # absent: started with 2>&-
def test_a_log_that_is_closed_stops_nobody(monkeypatch: pytest.MonkeyPatch, settings: Settings, stream: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert Client(guard.Guard(broken, settings))("GET", "/").status == 500


NAMES = ["localhost", "LocalHost", "127.0.0.1", "127.0.0.2", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]"]


@pytest.mark.parametrize(
    ("host", "direct"),
    [
        *((host + port, True) for host in NAMES for port in ("", ":5000")),
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
def test_only_a_name_of_this_machine_is_direct(host: str, direct: bool) -> None:
    assert guard.is_direct({"REMOTE_ADDR": "127.0.0.1", "HTTP_HOST": host}) is direct


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
def test_a_page_of_another_origin_gets_no_reset_token(call: Client, headers: dict[str, str]) -> None:
    call("POST", "/users", BOB)
    answer = call("POST", "/reset_password", {"email": BOB["email"]}, REMOTE_ADDR="127.0.0.1", **headers)
    assert answer.status == 403
    assert list(answer.json) == ["message"]
