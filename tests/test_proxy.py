"""The configurations in deploy/, in nginx and two versions of Caddy, before the service and two applications."""

from __future__ import annotations

import contextlib
import http.client
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlencode

import pytest

from tests.cases import each
from tests.conftest import HERE
from tests.proxies import APP, AUTH, PASSWORD, PROXIES, WIKI, Reply, Site
from web.forms import MAX_BODY_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.proxies]

BOB = "bob@example.com"
CAROL = "carol@example.com"  # in the groups staff and wiki


@pytest.fixture(scope="module", params=PROXIES)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site of each kind for all tests that do not stop a part of it. Bob and Carol have an account."""
    folder = tmp_path_factory.mktemp(request.param)
    with closing(Site(request.param, folder, {"AUTHSVC_SESSIONS_PER_USER": "100"})) as shared:
        shared.create_account(BOB)
        shared.create_account(CAROL)
        set_groups(shared, CAROL, "staff,wiki")
        yield shared


def set_groups(site: Site, email: str, groups: str) -> None:
    with closing(sqlite3.connect(site.folder / "authsvc.db")) as database, database:
        database.execute("UPDATE users SET groups = ? WHERE email = ?", (groups, email))


@pytest.fixture(scope="module")
def cookie(site: Site) -> str:
    """The cookie of a session of Bob."""
    return site.sign_in(BOB)


@pytest.fixture(scope="module")
def member(site: Site) -> str:
    """The cookie of a session of Carol."""
    return site.sign_in(CAROL)


def identity(reply: Reply) -> dict[str, list[str]]:
    """Return the headers about the user that the application got, without empty ones, which nginx leaves out."""
    assert reply.status == 200, reply.body
    headers = reply.json["headers"].items()
    return {name: values for name, values in headers if re.match("remote[-_]", name) and values != [""]}


def test_the_service_answers_through_the_proxy(site: Site, cookie: str) -> None:
    assert site.request("GET", f"{site.auth}/").json == {"message": "Bienvenue"}
    assert site.request("GET", f"{site.auth}/health").json == {"message": "ok"}
    assert site.request("GET", f"{site.auth}/profile", cookie=cookie).json == {"email": BOB}
    assert cookie.startswith("__Secure-session_id=")


def test_a_signed_in_user_reaches_the_application_under_their_name(site: Site, cookie: str) -> None:
    reply = site.request("GET", f"{site.app}/some/where?a=b&c=%2F", cookie=f"theme=dark; {cookie}; lang=fr")
    assert reply.status == 200
    assert reply.json["path"] == "/some/where?a=b&c=%2F"
    assert reply.json["headers"]["remote-user"] == reply.json["headers"]["remote-email"] == [BOB]


@pytest.mark.parametrize("before", ["", "theme=dark; ", "theme=dark;", "a=b; x__Secure-session_id=1; "])
@pytest.mark.parametrize("after", ["", "; lang=fr", ";lang=fr", "; lang=fr; c=d"])
def test_the_application_does_not_see_the_session(site: Site, cookie: str, before: str, after: str) -> None:
    reply = site.request("GET", f"{site.app}/", cookie=before + cookie + after)
    assert reply.status == 200
    assert cookie.partition("=")[2] not in str(reply.json)
    seen = "".join(reply.json["headers"].get("cookie", []))
    kept = [part.strip() for part in f"{before};{after}".split(";") if part.strip()]
    assert all(part.partition("=")[2] in seen for part in kept)


@pytest.mark.parametrize("cookie", ["", "theme=dark", "__Secure-session_id=wrong", "session_id=wrong"])
def test_without_a_session_the_proxy_redirects_to_the_sign_in_page(site: Site, cookie: str) -> None:
    before = site.application.request_count
    reply = site.request("GET", f"{site.app}/some/where?a=b&c=%2F", cookie=cookie)
    assert reply.status == 302
    page, _, target = reply.headers["Location"].partition("?return=")
    assert page == f"{site.auth}/login"
    # nginx cannot encode the address. The page reads both forms.
    assert (target if site.kind == "nginx" else unquote(target)) == f"{site.app}/some/where?a=b&c=%2F"
    assert site.application.request_count == before


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Mode": "same-origin"},
        {"X-Requested-With": "XMLHttpRequest"},
        {"Sec-Fetch-Mode": "navigate", "X-Requested-With": "XMLHttpRequest"},
        {"Sec-Fetch-Mode": "navigate"},
        {"X-Requested-With": "org.example.app"},
    ],
)
def test_a_script_of_the_application_is_not_redirected(site: Site, cookie: str, headers: dict[str, str]) -> None:
    leads = headers in ({"Sec-Fetch-Mode": "navigate"}, {"X-Requested-With": "org.example.app"})
    before = site.application.request_count
    reply = site.request("GET", f"{site.app}/some/where", headers=headers)
    assert (reply.status, "Location" in reply.headers) == ((302, True) if leads else (401, False))
    assert site.application.request_count == before
    assert site.request("GET", f"{site.app}/some/where", cookie=cookie, headers=headers).status == 200


@pytest.mark.parametrize("form", ["{0}; {1}", "{1};{0}; {1}", "a=b; {0}; {1}; c=d", "{0}; a=b; {1}; {0}; {1}; {0}"])
def test_the_application_sees_none_of_several_sessions(site: Site, cookie: str, form: str) -> None:
    other = site.sign_in(BOB)
    reply = site.request("GET", f"{site.app}/", cookie=form.format(cookie, other))
    assert (reply.status, reply.json["headers"]["remote-user"]) == (200, [BOB])
    assert not [part for part in (cookie, other) if part.partition("=")[2] in str(reply.json)]
    if form.startswith("a=b"):
        assert "a=b; c=d" in "".join(reply.json["headers"]["cookie"])


def test_the_sessions_of_two_users_in_one_request_are_refused(site: Site, cookie: str) -> None:
    site.create_account("planter@example.com")
    planted = site.sign_in("planter@example.com")
    assert site.request("GET", f"{site.app}/", cookie=f"{planted}; {cookie}").status == 302


# Headers by which a client could claim to be somebody else, or to have asked for something else.
CLAIMS = {
    "Remote-User": "eve@example.com",
    "Remote-Email": "eve@example.com",
    "REMOTE-USER": "eve@example.com",
    "Remote-Groups": "eves",
    "REMOTE-GROUPS": "eves",
    "Remote_Groups": "eves",
    "Remote-Id": "99",
    "Remote_Id": "99",
    "Remote-Name": "Eve",
    "Remote_User": "eve@example.com",
    "REMOTE_EMAIL": "eve@example.com",
    "Forwarded": "for=198.51.100.66",
    "X-Forwarded-User": "eve@example.com",
    "X-Forwarded-Email": "eve@example.com",
    "X-Forwarded-Groups": "eves",
    "X-Forwarded-Preferred-Username": "eve",
    "X-Forwarded-Prefix": "/eve",
    "X-Real-IP": "198.51.100.66",
    "X-Forwarded-For": "198.51.100.66",
    "X_Forwarded_For": "198.51.100.66",
    "X-Forwarded-Uri": "/eve",
    "X-Forwarded-Host": "eve.example",
    "X-Forwarded-Proto": "http",
    "X-Original-URL": "/health",
    "X-Rewrite-URL": "/health",
}


@pytest.mark.parametrize(("name", "value"), CLAIMS.items())
def test_a_client_cannot_claim_an_identity_by_a_header(site: Site, cookie: str, name: str, value: str) -> None:
    before = site.application.request_count
    stranger = site.request("GET", f"{site.app}/page", headers={name: value})
    assert stranger.status == 302
    assert "eve" not in stranger.headers["Location"]
    assert site.application.request_count == before
    bob = site.request("GET", f"{site.app}/page", cookie=cookie, headers={name: value})
    assert identity(bob) == {"remote-user": [BOB], "remote-email": [BOB], "remote-id": ["1"]}
    assert bob.json["path"] == "/page"
    if not name.startswith(
        ("X-Original", "X-Rewrite")
    ):  # other proxies set these two, and no application takes them for an identity
        assert value not in [item for items in bob.json["headers"].values() for item in items]


def test_a_sign_in_is_counted_for_the_address_that_the_proxy_sees(site: Site) -> None:
    wrong = {"email": "nobody@example.com", "password": "wrong wrong wrong"}
    statuses = [
        site.request("POST", f"{site.auth}/sessions", wrong, headers={"X-Forwarded-For": f"198.51.100.{number}"}).status
        for number in range(11)
    ]
    assert statuses == [401] * 10 + [429]
    listed = site.request(
        "GET", f"{site.auth}/sessions", cookie=site.sign_in(BOB), headers={"X-Forwarded-For": "198.51.100.66"}
    )
    assert {session["address"] for session in listed.json["sessions"]} == {"127.0.0.1"}


SECOND_PROXY = "127.0.0.2"
OUTER = re.compile(r"^(\s*)# (set_real_ip_from|real_ip_|trusted_proxies|client_ip_headers|header_up X-F)", re.MULTILINE)


@pytest.mark.parametrize("header", ["CF-Connecting-IP", "X-Forwarded-For"])
@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_only_a_listed_proxy_in_front_of_ours_names_the_client(tmp_path: Path, kind: str, header: str) -> None:
    text = OUTER.sub(r"\1\2", (HERE / "deploy" / PROXIES[kind]).read_text())
    text = text.replace("192.0.2.10", SECOND_PROXY).replace(
        "real_ip_header X-Forwarded-For", f"real_ip_header {header}"
    )
    text = text.replace("client_ip_headers X-Forwarded-For", f"client_ip_headers {header}")
    (tmp_path / PROXIES[kind]).write_text(text)
    with closing(Site(kind, tmp_path, {"AUTHSVC_SESSIONS_PER_USER": "100"}, configuration=tmp_path)) as site:
        site.create_account(BOB)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        for source, named in [(SECOND_PROXY, "203.0.113.9"), ("127.0.0.1", "203.0.113.10")]:
            with closing(http.client.HTTPConnection(AUTH, site.port)) as connection:
                connection.sock = site.connect(AUTH, source)
                body = urlencode({"email": BOB, "password": PASSWORD})
                value = f"6.6.6.6, {named}" if header == "X-Forwarded-For" else named  # Cloudflare writes one address
                connection.request("POST", "/sessions", body, {**form, header: value})
                assert connection.getresponse().status == 200
        listed = site.request("GET", f"{site.auth}/sessions", cookie=site.sign_in(BOB)).json["sessions"]
        assert [session["address"] for session in listed] == ["127.0.0.1", "127.0.0.1", "203.0.113.9"]


def test_a_session_ended_elsewhere_is_refused_at_the_next_request(site: Site) -> None:
    ended, other = site.sign_in(BOB), site.sign_in(BOB)
    assert site.request("GET", f"{site.app}/", cookie=ended).status == 200
    listed = site.request("GET", f"{site.auth}/sessions", cookie=ended).json["sessions"]
    (public_id,) = (session["id"] for session in listed if session["current"])
    assert site.request("DELETE", f"{site.auth}/sessions/{public_id}", cookie=other).status == 200
    before = site.application.request_count
    assert site.request("GET", f"{site.app}/", cookie=ended).status == 302
    assert site.application.request_count == before
    assert site.request("GET", f"{site.app}/", cookie=other).status == 200


@pytest.mark.parametrize("size", [0, 10, 500_000, 3_000_000])
@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_the_application_gets_the_body_of_a_signed_in_user(site: Site, cookie: str, method: str, size: int) -> None:
    headers = {"Content-Type": "text/plain"}

    def ask() -> Reply:
        return site.request(method, f"{site.app}/", b"x" * size, cookie=cookie, headers=headers)

    try:
        reply = ask()
    except http.client.IncompleteRead:  # Debian's Caddy has cut the application's answer short, once in some thousand
        reply = ask()
    assert (reply.status, reply.json["method"], reply.json["body"]) == (200, method, "x" * size)
    before = site.application.request_count
    assert site.request(method, f"{site.app}/", b"x" * size, headers=headers).status == 302
    assert site.application.request_count == before


def test_a_websocket_needs_a_session(site: Site, cookie: str) -> None:
    request = (
        f"GET /socket HTTP/1.1\r\nHost: {APP}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    with site.connect(APP) as connection, connection.makefile("rb") as received:
        connection.sendall(f"{request}Cookie: {cookie}\r\n\r\n".encode())
        assert received.readline().startswith(b"HTTP/1.1 101 ")
        assert b"\r\n" in iter(received.readline, b"")  # the end of the headers
        for message in (b"hello", b"again"):
            connection.sendall(message)
            assert received.read(len(message)) == message
    with site.connect(APP) as connection, connection.makefile("rb") as received:
        connection.sendall(f"{request}\r\n".encode())
        assert b" 401 " in received.readline()  # it is not a page


@pytest.mark.parametrize("upgrade", ["h2c", "h2c, websocket", "websocket, h2c", "foo"])
def test_no_protocol_other_than_websocket_is_tunnelled(site: Site, cookie: str, upgrade: str) -> None:
    # The application switches protocols only for exactly "websocket", and otherwise answers with the headers it got.
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": upgrade, "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": APP, "Cookie": cookie, **headers}.items())
    with site.connect(APP) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
        response = http.client.HTTPResponse(connection)
        with closing(response):
            response.begin()
            body = "" if response.status == 101 else response.read().decode()
            seen = f"{response.headers}{body}"
    if response.status == 101:
        assert response.headers["Upgrade"] == "websocket"  # Caddy asks the application for a WebSocket in any case
    assert "h2c" not in seen
    assert "foo" not in seen


def test_a_client_cannot_have_the_identity_headers_removed(site: Site, cookie: str, member: str) -> None:
    for connection in ("Remote-User", "close, Remote-User, Remote-Email", "Remote-Groups", "Remote-Groups, Remote-Id"):
        reply = site.request("GET", f"{site.app}/", cookie=cookie, headers={"Connection": connection})
        assert reply.json["headers"]["remote-user"] == reply.json["headers"]["remote-email"] == [BOB]
        reply = site.request("GET", f"{site.wiki}/", cookie=member, headers={"Connection": connection})
        assert identity(reply) == IDENTITY_OF_CAROL


def test_nginx_replaces_the_address_of_an_application_in_its_redirects(site: Site, member: str) -> None:
    for url, application in ((site.app, site.application), (site.wiki, site.wiki_application)):
        inner = f"http://127.0.0.1:{application.server_port}"
        reply = site.request("GET", f"{url}/", cookie=member, headers={"Location": f"{inner}/there"})
        assert reply.headers["Location"] == f"{url if site.kind == 'nginx' else inner}/there"


# The second application, which is only for the group "wiki"

IDENTITY_OF_CAROL = {
    "remote-user": [CAROL],
    "remote-email": [CAROL],
    "remote-groups": ["staff,wiki"],
    "remote-id": ["2"],
}


def test_a_member_reaches_the_application_of_the_group(site: Site, member: str) -> None:
    before = site.application.request_count, site.wiki_application.request_count
    reply = site.request("GET", f"{site.wiki}/page?group=staff&a=%2F", cookie=member)
    assert identity(reply) == IDENTITY_OF_CAROL
    assert reply.json["path"] == "/page?group=staff&a=%2F"
    assert member.partition("=")[2] not in str(reply.json)
    assert (site.application.request_count, site.wiki_application.request_count) == (before[0], before[1] + 1)
    assert identity(site.request("GET", f"{site.app}/", cookie=member)) == IDENTITY_OF_CAROL


@pytest.mark.parametrize("path", ["/", "/?group=staff", "/?group=&login=1", "/verify?group=staff", "//", "/x/..%2f?"])
def test_a_user_outside_the_group_is_refused(site: Site, cookie: str, path: str) -> None:
    before = site.wiki_application.request_count
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND", "get", "GROUP"):
        reply = site.request(method, f"{site.wiki}{path}", cookie=cookie)
        # nginx knows upper-case methods only.
        assert reply.status == (400 if (site.kind, method) == ("nginx", "get") else 403)
        assert "Location" not in reply.headers
    assert site.wiki_application.request_count == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, "wiki")
            for name in ("Remote-Groups", "REMOTE-GROUPS", "Remote_Groups", "Groups", "X-Forwarded-Groups")
        ],
        *[(name, "2") for name in ("Remote-Id", "Remote_Id")],
        *[(name, CAROL) for name in ("Remote-User", "Remote_User")],
        *[(name, "/?group=staff") for name in ("X-Forwarded-Uri", "X-Original-URL", "X-Original-URI", "X-Rewrite-URL")],
        *[(name, APP) for name in ("X-Forwarded-Host", "X-Forwarded-Server", "X-Original-Host")],
        ("X-Forwarded-Method", "OPTIONS"),
        ("X-HTTP-Method-Override", "OPTIONS"),
        ("Forwarded", f"host={APP}"),
        ("Connection", "Remote-Groups, X-Forwarded-Uri"),
        ("Upgrade", "websocket"),
    ],
)
def test_a_client_cannot_claim_a_group_by_a_header(site: Site, cookie: str, member: str, name: str, value: str) -> None:
    before = site.wiki_application.request_count
    assert site.request("GET", f"{site.wiki}/", cookie=cookie, headers={name: value}).status == 403
    assert site.request("GET", f"{site.wiki}/", headers={name: value}).status == 302
    assert site.wiki_application.request_count == before
    if name != "Upgrade":
        assert identity(site.request("GET", f"{site.wiki}/", cookie=member, headers={name: value})) == IDENTITY_OF_CAROL


@pytest.mark.parametrize("name", [APP, WIKI])  # in the TLS handshake
@pytest.mark.parametrize(
    ("target", "host"),
    [
        ("/", f"Host: {WIKI}"),
        ("/", f"Host: {WIKI.upper()}"),
        ("/", f"Host: {WIKI}."),
        ("/", f"Host: {WIKI}:80"),
        ("/", f"Host: {APP}\r\nHost: {WIKI}"),
        ("/", f"Host: {WIKI}\r\nHost: {APP}"),
        ("/", f"Host: {APP}\r\nX-Forwarded-Host: {WIKI}"),
        (f"https://{WIKI}/", f"Host: {APP}"),
        (f"https://{APP}/", f"Host: {WIKI}"),
        (f"https://{APP}@{WIKI}/", f"Host: {APP}"),
        ("/", "X-No-Host: 1"),
    ],
)
def test_a_user_outside_the_group_gets_in_by_no_spelling_of_the_host(
    site: Site, cookie: str, name: str, target: str, host: str
) -> None:
    before = site.wiki_application.request_count
    with site.connect(name) as connection, connection.makefile("rb") as received:
        version = "1.0" if "X-No-Host" in host else "1.1"
        connection.sendall(f"GET {target} HTTP/{version}\r\n{host}\r\nCookie: {cookie}\r\n\r\n".encode())
        received.readline()
    assert site.wiki_application.request_count == before


def test_without_a_session_the_application_of_a_group_leads_to_the_sign_in_page(site: Site) -> None:
    before = site.wiki_application.request_count
    reply = site.request("GET", f"{site.wiki}/page?group=wiki")
    assert reply.status == 302
    assert unquote(reply.headers["Location"]) == f"{site.auth}/login?return={site.wiki}/page?group=wiki"
    assert site.request("GET", f"{site.wiki}/page", headers={"Sec-Fetch-Mode": "cors"}).status == 401
    assert site.wiki_application.request_count == before


def test_a_change_of_groups_counts_at_the_next_request(site: Site) -> None:
    cookie = site.sign_in(BOB)
    statuses = []
    for groups in ("", "wiki", "wiki-2,wikis", "a,wiki,z", ""):
        set_groups(site, BOB, groups)
        statuses.append(site.request("GET", f"{site.wiki}/", cookie=cookie).status)
    assert statuses == [403, 200, 403, 200, 403]


@pytest.mark.parametrize("groups", ["group=staff&group=admins", "group=Staff"])
@pytest.mark.parametrize("kind", PROXIES)
def test_the_file_names_several_groups_and_a_misspelt_one_admits_nobody(tmp_path: Path, kind: str, groups: str) -> None:
    text = (HERE / "deploy" / PROXIES[kind]).read_text()
    (tmp_path / PROXIES[kind]).write_text(
        re.sub("^( *# .*)group=wiki(?=;| 127)", rf"\1{groups}", text, flags=re.MULTILINE)
    )
    with closing(Site(kind, tmp_path, configuration=tmp_path)) as site:
        statuses = []
        for email, held in ((CAROL, "staff"), (BOB, "wiki")):
            site.create_account(email)
            set_groups(site, email, held)
            statuses.append(site.request("GET", f"{site.wiki}/", cookie=site.sign_in(email)).status)
        assert statuses == ([500 if kind == "nginx" else 400] * 2 if "Staff" in groups else [200, 403])
        assert site.wiki_application.request_count == statuses.count(200)


@pytest.mark.parametrize("missing", ["127.0.0.1:8001", "group=wiki"])
def test_nginx_refuses_an_application_that_one_of_the_maps_does_not_have(tmp_path: Path, missing: str) -> None:
    text = (HERE / "deploy" / PROXIES["nginx"]).read_text()
    (tmp_path / PROXIES["nginx"]).write_text(text.replace(f"    # wiki.example.com {missing};\n", ""))
    with closing(Site("nginx", tmp_path, configuration=tmp_path)) as site:
        site.create_account(CAROL)
        set_groups(site, CAROL, "wiki")
        assert site.request("GET", f"{site.wiki}/", cookie=site.sign_in(CAROL)).status == 500
        assert site.application.request_count == site.wiki_application.request_count == 0


@pytest.mark.parametrize("path", ["/.authsvc", "/.authsvc?login=1"])
def test_a_client_cannot_request_the_internal_address_of_nginx(site: Site, cookie: str, path: str) -> None:
    reply = site.request("GET", f"{site.app}{path}", cookie=cookie)
    assert reply.status == (404 if site.kind == "nginx" else 200)  # for Caddy it is an address like any other
    assert "Remote-User" not in reply.headers


def test_an_unknown_host_reaches_neither_service_nor_application(site: Site, cookie: str) -> None:
    before = site.application.request_count
    with contextlib.suppress(http.client.RemoteDisconnected):
        reply = site.request("GET", f"{site.app}/", cookie=cookie, headers={"Host": "other.example.com"})
        assert reply.body == b""
    assert site.application.request_count == before


@pytest.mark.parametrize("kind", PROXIES)
def test_without_the_service_no_request_reaches_the_application(kind: str, tmp_path: Path) -> None:
    with closing(Site(kind, tmp_path)) as site:
        site.create_account(BOB)
        cookie = site.sign_in(BOB)
        assert site.request("GET", f"{site.app}/", cookie=cookie).status == 200
        site.end_service()
        for sent in ("", cookie):
            assert site.request("GET", f"{site.app}/", cookie=sent).status >= 500
        assert site.application.request_count == 1


def test_all_configurations_name_the_same_hosts_and_ports() -> None:
    for name in (*PROXIES.values(), "traefik.yml"):
        text = (HERE / "deploy" / name).read_text().replace("{$DOMAIN:example.com}", "example.com")
        for word in (AUTH, APP, WIKI, "127.0.0.1:5000", "127.0.0.1:8000", "127.0.0.1:8001", "/verify?", "group=wiki"):
            assert word in text, name
        for word in ("Remote-User", "Remote-Email", "Remote-Groups", "Remote-Id"):
            assert word in text, name


def test_traefik_replaces_every_header_about_the_user() -> None:
    text = (HERE / "deploy" / "traefik.yml").read_text()
    assert text.count("forwardAuth:") == 4
    assert text.count("authResponseHeaders: [Remote-User, Remote-Email, Remote-Groups, Remote-Id]") == 4
    assert '{Remote_User: "", Remote_Email: "", Remote_Groups: "", Remote_Id: "", Remote-Name: "", Upgrade: ""}' in text
    # Each router of an application has three middlewares. The second asks the service, the last removes tokens.
    asking = re.findall(r"middlewares: \[unclaimed, ([a-z-]+), without-token]\n *(?:# +)?service: (?:app|wiki)\n", text)
    assert asking == ["signed-in", "program", "members-of-wiki", "program-of-wiki"]
    assert all(re.search(rf"^    (?:# )?{name}:\n    (?:# )?  forwardAuth:\n", text, re.MULTILINE) for name in asking)
    assert text.count("service: app\n") == text.count("service: wiki\n") == 2
    assert 'without-token:\n      headers: {customRequestHeaders: {Authorization: ""}}\n' in text


def test_the_two_files_for_caddy_differ_only_in_how_they_spell_buffers_and_arguments() -> None:
    newest, debian = ((HERE / "deploy" / PROXIES[kind]).read_text() for kind in ("caddy", "caddy 2.6"))
    for side in ("request", "response"):
        newest = re.sub(rf"(\t+){side}_buffers (.+)", rf"\1buffer_{side}s\n\1max_buffer_size \2", newest)
    newest = re.sub(r"\{args\[([01])]}", r"{args.\1}", newest)
    for text, name in ((newest, "Caddyfile.debian12"), (debian, "Caddyfile")):
        assert len(re.findall(rf"\n# This file is for Caddy .*\b{re.escape(name)} is for .*", text)) == 1
    version = re.compile("# This file is for Caddy .*")
    assert version.sub("", newest) == version.sub("", debian)


@each(
    ("name", "line"),
    [
        ("nginx.conf", "    client_max_body_size 20k;"),
        ("Caddyfile", "\t\trequest_buffers 20KiB\n"),
        ("Caddyfile.debian12", "\t\tbuffer_requests\n\t\tmax_buffer_size 20KiB\n"),
        ("traefik.yml", "buffering: {maxRequestBodyBytes: 20480, memRequestBodyBytes: 20480}"),
    ],
)
def test_each_proxy_holds_back_the_largest_body_of_the_service(name: str, line: str) -> None:
    assert (HERE / "deploy" / name).read_text().count(line) == 1
    assert MAX_BODY_BYTES < 20 * 1024
