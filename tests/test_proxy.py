"""The files of deploy/ in a real nginx and a real Caddy, before the service and an application that they guard."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.conftest import HERE, Service
from tests.proxies import APP, AUTH, PROXIES, Site, site

pytestmark = pytest.mark.slow

BOB = "bob@example.com"


@pytest.fixture(scope="module", params=PROXIES)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site for all tests that leave it as it is; Bob has an account in it."""
    folder = tmp_path_factory.mktemp(request.param)
    started: list[Service] = []

    def start(**environ: str) -> Service:
        started.append(Service(folder, **environ))
        return started[-1]

    with site(request.param, folder, start, AUTHSVC_SESSIONS_PER_USER="100") as one:
        one.register(BOB)
        yield one
    for service in started:
        service.end()


@pytest.fixture(scope="module")
def cookie(shared: Site) -> str:
    return shared.log_in(BOB)


def test_the_service_itself_is_reached(shared: Site, cookie: str) -> None:
    assert shared.ask("GET", f"{shared.auth}/").json == {"message": "Bienvenue"}
    assert shared.ask("GET", f"{shared.auth}/health").json == {"message": "ok"}
    assert shared.ask("GET", f"{shared.auth}/profile", cookie=cookie).json == {"email": BOB}
    assert cookie.startswith("__Secure-session_id=")


def test_who_is_signed_in_reaches_the_application_under_the_own_name(shared: Site, cookie: str) -> None:
    reply = shared.ask("GET", f"{shared.app}/some/where?a=b&c=%2F", cookie=f"theme=dark; {cookie}; lang=fr")
    assert reply.status == 200
    assert reply.json["path"] == "/some/where?a=b&c=%2F"
    assert reply.json["headers"]["remote-user"] == reply.json["headers"]["remote-email"] == [BOB]


@pytest.mark.parametrize("before", ["", "theme=dark; ", "theme=dark;", "a=b; x__Secure-session_id=1; "])
@pytest.mark.parametrize("after", ["", "; lang=fr", ";lang=fr", "; lang=fr; c=d"])
def test_the_application_does_not_see_the_session(shared: Site, cookie: str, before: str, after: str) -> None:
    reply = shared.ask("GET", f"{shared.app}/", cookie=before + cookie + after)
    assert reply.status == 200
    assert cookie.partition("=")[2] not in str(reply.json)
    seen = "".join(reply.json["headers"].get("cookie", []))
    kept = [part.strip() for part in f"{before};{after}".split(";") if part.strip()]
    assert all(part.partition("=")[2] in seen for part in kept)


@pytest.mark.parametrize("cookie", ["", "theme=dark", "__Secure-session_id=wrong", "session_id=wrong"])
def test_who_is_not_is_led_to_the_page_and_back(shared: Site, cookie: str) -> None:
    asked = shared.application.asked
    reply = shared.ask("GET", f"{shared.app}/some/where?a=b&c=%2F", cookie=cookie)
    assert reply.status == 302
    page, _, wanted = reply.headers["Location"].partition("?return=")
    assert page == f"{shared.auth}/login"
    # nginx cannot encode what it hands on; the page reads both.
    assert (wanted if shared.kind == "nginx" else unquote(wanted)) == f"{shared.app}/some/where?a=b&c=%2F"
    assert shared.application.asked == asked


def test_two_sessions_in_one_request_are_none(shared: Site, cookie: str) -> None:
    assert shared.ask("GET", f"{shared.app}/", cookie=f"{cookie}; {cookie}").status == 302


CLAIMS = {
    "Remote-User": "eve@example.com",
    "Remote-Email": "eve@example.com",
    "REMOTE-USER": "eve@example.com",
    "Remote-Groups": "eves",
    "Remote-Name": "Eve",
    "Remote_User": "eve@example.com",
    "REMOTE_EMAIL": "eve@example.com",
    "Forwarded": "for=198.51.100.66",
    "X-Forwarded-User": "eve@example.com",
    "X-Forwarded-Prefix": "/eve",
    "X-Forwarded-For": "198.51.100.66",
    "X_Forwarded_For": "198.51.100.66",
    "X-Forwarded-Uri": "/eve",
    "X-Forwarded-Host": "eve.example",
    "X-Forwarded-Proto": "http",
    "X-Original-URL": "/health",
    "X-Rewrite-URL": "/health",
}


@pytest.mark.parametrize(("name", "value"), CLAIMS.items())
def test_what_a_client_says_of_itself_changes_nothing(shared: Site, cookie: str, name: str, value: str) -> None:
    asked = shared.application.asked
    nobody = shared.ask_exactly("GET", f"{shared.app}/page", **{name: value})
    assert nobody.status == 302
    assert "eve" not in nobody.headers["Location"]
    assert shared.application.asked == asked
    bob = shared.ask_exactly("GET", f"{shared.app}/page", cookie=cookie, **{name: value})
    assert bob.json["headers"]["remote-user"] == bob.json["headers"]["remote-email"] == [BOB]
    assert bob.json["path"] == "/page"
    if not name.startswith(("X-Original", "X-Rewrite")):  # of another proxy: no concern of this one's
        assert value not in [item for items in bob.json["headers"].values() for item in items]


def test_a_sign_in_is_counted_for_the_address_that_the_proxy_sees(shared: Site) -> None:
    wrong = {"email": "nobody@example.com", "password": "wrong wrong wrong"}
    statuses = [
        shared.ask("POST", f"{shared.auth}/sessions", wrong, X_Forwarded_For=f"198.51.100.{n}").status
        for n in range(12)
    ]
    assert statuses[-1] == 429
    listed = shared.ask("GET", f"{shared.auth}/sessions", cookie=shared.log_in(BOB), X_Forwarded_For="198.51.100.66")
    assert {session["address"] for session in listed.json["sessions"]} == {"127.0.0.1"}


def test_a_session_that_ended_elsewhere_is_out_at_the_next_request(shared: Site) -> None:
    mine, other = shared.log_in(BOB), shared.log_in(BOB)
    assert shared.ask("GET", f"{shared.app}/", cookie=mine).status == 200
    listed = shared.ask("GET", f"{shared.auth}/sessions", cookie=mine).json["sessions"]
    (name,) = (session["id"] for session in listed if session["current"])
    assert shared.ask("DELETE", f"{shared.auth}/sessions/{name}", cookie=other).status == 200
    asked = shared.application.asked
    assert shared.ask("GET", f"{shared.app}/", cookie=mine).status == 302
    assert shared.application.asked == asked
    assert shared.ask("GET", f"{shared.app}/", cookie=other).status == 200


@pytest.mark.parametrize("size", [0, 10, 500_000])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_body_passes_and_only_to_the_application(shared: Site, cookie: str, method: str, size: int) -> None:
    reply = shared.ask(method, f"{shared.app}/", b"x" * size, cookie=cookie, Content_Type="text/plain")
    assert (reply.status, reply.json["method"], reply.json["body"]) == (200, method, "x" * size)
    assert shared.ask(method, f"{shared.app}/", b"x" * size, Content_Type="text/plain").status == 302


def test_a_websocket_passes(shared: Site, cookie: str) -> None:
    request = (
        f"GET /socket HTTP/1.1\r\nHost: {APP}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    with shared.connect(APP) as socket:
        socket.sendall(f"{request}Cookie: {cookie}\r\n\r\n".encode())
        assert socket.recv(4096).startswith(b"HTTP/1.1 101 ")
        for message in (b"hello", b"again"):
            socket.sendall(message)
            assert socket.recv(4096) == message
    with shared.connect(APP) as socket:
        socket.sendall(f"{request}\r\n".encode())
        assert b" 302 " in socket.recv(4096)


@pytest.mark.parametrize("upgrade", ["h2c", "h2c, websocket", "websocket, h2c", "foo"])
def test_no_other_protocol_is_tunnelled(shared: Site, cookie: str, upgrade: str) -> None:
    # The application would answer 101 to "websocket" alone; what is asked here is that nothing else reaches it.
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": upgrade, "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    with shared.connect(APP) as socket:
        lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": APP, "Cookie": cookie, **headers}.items())
        socket.sendall(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
        said = socket.recv(65536)
    if b" 101 " in said.partition(b"\r\n")[0]:
        assert b"websocket" in said.lower()  # Caddy asks for one, whatever was asked of it
    assert b"h2c" not in said
    assert b"foo" not in said


def test_a_client_cannot_have_its_name_left_out(shared: Site, cookie: str) -> None:
    for named in ("Remote-User", "close, Remote-User, Remote-Email"):
        reply = shared.ask_exactly("GET", f"{shared.app}/", cookie=cookie, Connection=named)
        assert reply.json["headers"]["remote-user"] == reply.json["headers"]["remote-email"] == [BOB]


@pytest.mark.parametrize("path", ["/.authsvc", "/.authsvc?login=1"])
def test_the_proxys_own_question_is_no_address_of_the_application(shared: Site, cookie: str, path: str) -> None:
    reply = shared.ask("GET", f"{shared.app}{path}", cookie=cookie)
    assert reply.status == (404 if shared.kind == "nginx" else 200)
    assert "Remote-User" not in reply.headers


def test_another_name_reaches_neither(shared: Site, cookie: str) -> None:
    asked = shared.application.asked
    with contextlib.suppress(http.client.RemoteDisconnected):
        assert shared.ask_exactly("GET", f"{shared.app}/", cookie=cookie, Host="other.example.com").body == b""
    assert shared.application.asked == asked


@pytest.mark.once
@pytest.mark.parametrize("kind", PROXIES)
def test_without_the_service_the_application_is_closed(
    kind: str, tmp_path: Path, start: Callable[..., Service]
) -> None:
    with site(kind, tmp_path, start) as one:
        one.register()
        cookie = one.log_in()
        assert one.ask("GET", f"{one.app}/", cookie=cookie).status == 200
        one.service.end()
        for held in ("", cookie):
            assert one.ask("GET", f"{one.app}/", cookie=held).status >= 500
        assert one.application.asked == 1


def test_the_files_name_the_same_hosts_and_ports() -> None:
    for name in ("nginx.conf", "Caddyfile", "traefik.yml"):
        text = (HERE / "deploy" / name).read_text()
        for word in (AUTH, APP, "127.0.0.1:5000", "127.0.0.1:8000", "Remote-User", "Remote-Email", "verify"):
            assert word.lower().replace("remote-user", "remote") in text.lower().replace("remote_user", "remote"), name
