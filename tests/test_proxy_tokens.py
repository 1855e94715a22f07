"""Access tokens through the configurations in deploy/: programs pass with them, and applications never see them."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import secrets
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests

from tests.cases import each
from tests.conftest import HERE, Service, clean_environ
from tests.crowd import awaited
from tests.proxies import APP, PASSWORD, PROXIES, Application, Reply, Site, accepts, program, reserve_port

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.proxies]

BOB = "bob@example.com"
CAROL = "carol@example.com"  # in the groups staff and wiki
DAVE = "dave@example.com"  # three lengths, as base64 encodes a token differently after each
CHALLENGE = 'Basic realm="authsvc", charset="UTF-8"'
PROGRAM = {"Accept": "*/*"}
FRAGMENT = re.compile("authsvc_|YXV0aHN2Y1|F1dGhzdmNf|hdXRoc3ZjX")  # by which the files find a token


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def new_token(site: Site, email: str) -> tuple[str, str]:
    """Return a new token of a user, and its id."""
    form = {"password": PASSWORD, "name": "test"}
    reply = site.request("POST", f"{site.auth}/tokens", form, cookie=site.sign_in(email))
    assert reply.status == 200, reply.body
    return reply.json["token"], reply.json["id"]


def write(site: Site, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(site.folder / "authsvc.db")) as database, database:
        assert database.execute(statement, values).rowcount == 1


def ask(site: Site, authorization: str | None, url: str = "", *, cookie: str = "", **headers: str) -> Reply:
    """Send a request as a program does."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {"Authorization": authorization} if authorization is not None else {}
    return site.request(
        "GET", url or f"{site.app}/page?group=staff&login=1", cookie=cookie, headers={**PROGRAM, **sent, **more}
    )


def requests_passed(site: Site) -> int:
    return site.application.request_count + site.wiki_application.request_count


@pytest.fixture(scope="module", params=PROXIES)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One site of each kind. Bob, Carol and Dave have an account."""
    folder = tmp_path_factory.mktemp(request.param)
    with closing(Site(request.param, folder, {"AUTHSVC_SESSIONS_PER_USER": "100"})) as shared:
        for email in (BOB, CAROL, DAVE):
            shared.create_account(email)
        write(shared, "UPDATE users SET groups = 'staff,wiki' WHERE email = ?", CAROL)
        yield shared


@pytest.fixture(scope="module")
def tokens(site: Site) -> dict[str, str]:
    """A token of each user."""
    return {email: new_token(site, email)[0] for email in (BOB, CAROL, DAVE)}


@pytest.fixture(scope="module")
def token(tokens: dict[str, str]) -> str:
    """The token of Bob."""
    return tokens[BOB]


@pytest.fixture(scope="module")
def cookie(site: Site) -> str:
    """The cookie of a session of Bob."""
    return site.sign_in(BOB)


@each("cookies", ["", "theme=dark", "session of Bob"])
@each("form", ["Bearer {0}", "bearer {0}", "BEARER  {0}", "Basic {1}", "basic {1}", "BASIC  {1}", "Basic {2}"])
@each("email", [BOB, CAROL, DAVE])
def test_a_token_passes_and_does_not_reach_the_application(
    site: Site, tokens: dict[str, str], cookie: str, email: str, form: str, cookies: str
) -> None:
    secrets_sent = [tokens[email], *(basic(name, tokens[email])[6:] for name in (email, email.upper()))]
    reply = ask(site, form.format(*secrets_sent), cookie=cookies.replace("session of Bob", cookie))
    assert reply.status == 200
    headers = reply.json["headers"]
    assert headers["remote-user"] == headers["remote-email"] == [email]
    assert headers["remote-id"] == [{BOB: "1", CAROL: "2", DAVE: "3"}[email]]
    assert headers.get("remote-groups", [""]) == [
        "staff,wiki" if email == CAROL else ""
    ]  # nginx leaves out an empty one
    assert "authorization" not in headers
    assert not [text for text in secrets_sent if text in str(reply.json)]


def test_a_token_as_the_user_does_not_reach_the_application_beside_a_session(
    site: Site, token: str, cookie: str
) -> None:
    for authorization in (basic(token, ""), basic(token, "x"), basic(f"x{token}", ""), basic(f"xy{token}", "")):
        reply = ask(site, authorization, cookie=cookie)
        assert (reply.status, reply.json["headers"].get("authorization")) == (200, None)
        assert ask(site, authorization).status == 401


@each("method", ["POST", "PUT"])
def test_a_program_sends_a_body(site: Site, token: str, method: str) -> None:
    headers = {**PROGRAM, "Authorization": basic(BOB, token), "Content-Type": "text/plain"}
    reply = site.request(method, f"{site.app}/", b"x" * 100_000, headers=headers)
    assert (reply.status, reply.json["method"], reply.json["body"]) == (200, method, "x" * 100_000)


@each(
    "own",
    [
        *(basic(*pair) for pair in (("eve", "secret"), ("", ""), ("authsvc", "x"), ("eve", "authsvc"), ("é", "ü:x"))),
        *("Bearer eyJhbGciOiJIUzI1NiJ9.e30.x-_", "Bearer authsvc", "Basic", "Basic ===", "Basic b2I6"),
        *('Digest username="eve", nonce="x"', "Token abc", "AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders=host", "x"),
    ],
)
def test_an_authorization_of_the_application_reaches_it_unchanged(site: Site, cookie: str, own: str) -> None:
    for accept in ("*/*", "text/html"):
        for more in ({}, {"Sec-Fetch-Mode": "cors"}):
            reply = ask(site, own, cookie=cookie, Accept=accept, **more)
            assert reply.status == 200
            assert reply.json["headers"]["authorization"] == [own]
            assert reply.json["headers"]["remote-user"] == [BOB]


def test_a_token_that_is_not_live_or_of_another_user_is_refused(site: Site, token: str, cookie: str) -> None:
    (revoked, revoked_id), (expired, expired_id) = (new_token(site, BOB) for _ in range(2))
    for text in (revoked, expired):
        assert ask(site, f"Bearer {text}").status == 200
    assert site.request("DELETE", f"{site.auth}/tokens/{revoked_id}", cookie=cookie).status == 200
    write(site, "UPDATE access_tokens SET expires_at = 1 WHERE id = ?", expired_id)
    before = requests_passed(site)
    for text, name in ((revoked, BOB), (expired, BOB), (token, CAROL), (token, ""), (token, "1"), (token[:-1], BOB)):
        forms = [basic(name, text)] + [f"Bearer {text}"] * (text != token)
        for authorization in forms:
            for sent in ("", cookie):  # a session does not help
                reply = ask(site, authorization, cookie=sent)
                assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, CHALLENGE)
                # A program that accepts pages is not redirected to one either.
                reply = ask(site, authorization, cookie=sent, Accept="text/html, */*")
                assert (reply.status, reply.headers["Location"]) == (401, None)
    assert requests_passed(site) == before


@each("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND", "MKCOL", "LOCK"])
def test_a_program_without_a_token_is_asked_for_one(site: Site, method: str) -> None:
    before = requests_passed(site)
    for url in (f"{site.app}/page", f"{site.wiki}/page"):
        for headers in (PROGRAM, {"Accept": ""}, {**PROGRAM, "Authorization": basic("eve", "secret")}):
            reply = site.request(method, url, headers=headers)
            assert (reply.status, reply.headers.get_all("WWW-Authenticate")) == (401, [CHALLENGE])
            assert "Location" not in reply.headers
    assert requests_passed(site) == before


@each("own", [{}, {"Authorization": basic("eve", "secret")}, {"Authorization": "Bearer x"}])
def test_a_browser_is_redirected_and_not_asked_for_a_password(site: Site, own: dict[str, str]) -> None:
    accept = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", **own}
    for more in ({}, {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Site": "none", "Sec-Fetch-Dest": "document"}):
        reply = site.request("GET", f"{site.app}/page", headers={**accept, **more})
        assert (reply.status, reply.headers["WWW-Authenticate"]) == (302, None)
        assert reply.headers["Location"].startswith(f"{site.auth}/login?return=")


@each("headers", [{"Sec-Fetch-Mode": "cors"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Dest": "image"}])
@each("accept", ["*/*", "image/*", "text/html"])
def test_a_browser_may_not_use_basic(site: Site, token: str, cookie: str, headers: dict[str, str], accept: str) -> None:
    before = requests_passed(site)
    for sent in ("", cookie):
        reply = ask(site, basic(BOB, token), cookie=sent, Accept=accept, **headers)
        assert (reply.status, reply.headers["WWW-Authenticate"], reply.headers["Location"]) == (401, None, None)
    if accept != "text/html":
        reply = ask(site, None, Accept=accept, **headers)
        assert (reply.status, reply.headers["WWW-Authenticate"]) == (401, None)
    assert requests_passed(site) == before
    reply = ask(site, f"Bearer {token}", Accept=accept, **headers)  # only a script sends it, and on purpose
    assert (reply.status, "authorization" in reply.json["headers"]) == (200, False)


def test_a_token_opens_the_application_of_a_group_to_members_only(
    site: Site, tokens: dict[str, str], token: str
) -> None:
    member, before = tokens[CAROL], site.wiki_application.request_count
    for authorization in (f"Bearer {token}", basic(BOB, token)):
        for accept in ("*/*", "text/html"):
            assert ask(site, authorization, f"{site.wiki}/page?group=staff", Accept=accept).status == 403
    assert site.wiki_application.request_count == before
    for authorization in (f"Bearer {member}", basic(CAROL, member)):
        headers = ask(site, authorization, f"{site.wiki}/page").json["headers"]
        assert (headers["remote-user"], headers["remote-groups"]) == ([CAROL], ["staff,wiki"])
        assert "authorization" not in headers


@each("connection", ["Authorization", "close, authorization", "Authorization, Accept, Sec-Fetch-Mode", "AUTHORIZATION"])
def test_no_token_reaches_the_application_as_a_header_of_the_connection(
    site: Site, token: str, cookie: str, connection: str
) -> None:
    """Caddy removes the headers that Connection lists, also before it asks the service. nginx does not."""
    for authorization in (f"Bearer {token}", basic(BOB, token), basic(CAROL, token)):
        before = requests_passed(site)
        reply = ask(site, authorization, Connection=connection)
        passes = site.kind == "nginx" and authorization != basic(CAROL, token)
        assert (reply.status, requests_passed(site) - before) == ((200, 1) if passes else (401, 0))
        assert b"authsvc_" not in reply.body
        reply = ask(site, authorization, cookie=cookie, Connection=connection)
        if reply.status == 200:
            assert reply.json["headers"]["remote-user"] == [BOB]
            assert "authorization" not in reply.json["headers"]
        else:
            assert (site.kind, authorization, reply.status) == ("nginx", basic(CAROL, token), 401)


def test_every_basic_value_with_a_token_has_one_of_three_forms() -> None:
    for length in range(60):
        for letter in "aé€😀":
            token = "authsvc_" + secrets.token_urlsafe(32)
            assert FRAGMENT.search(basic(letter * length, token))
            # Other text is none, however long it is.
            assert not FRAGMENT.search(basic(letter * length, token.replace("_", "-", 1)))
            assert FRAGMENT.search(basic(token, letter * length))  # a client that sends it as the user
    for name in ("nginx.conf", "Caddyfile", "Caddyfile.debian12"):
        assert (HERE / "deploy" / name).read_text().count(FRAGMENT.pattern) == 1, name
    assert (HERE / "examples" / "localhost.conf").read_text().count(FRAGMENT.pattern) == 1


# Tricks to reach the application without a session and without a token where one belongs


def values_that_are_no_token(token: str) -> list[str]:
    """Return values of Authorization that hold a live token of Bob in a wrong way, another secret, or nothing."""
    wrong, encoded = "authsvc_" + "A" * 43, basic(BOB, token).removeprefix("Basic ")
    names = (
        "Token Digest Negotiate NTLM OAuth ApiKey JWT DPoP HOBA Bearer: Bearer, Bearer= Basic Basic: xBearer Bearerx"
    )
    bearer = [
        token[:-1],
        f"{token}A",
        f"{token},",
        f"{token} x",
        f"{token}, Bearer {token}",
        f"'{token}'",
        f'"{token}"',
    ]
    bearer += [token.upper(), token.replace("authsvc", "AUTHSVC"), f"token={token}", f"%61{token[1:]}", token[::-1]]
    bearer += [
        wrong,
        "authsvc_",
        "authsvc_*",
        "authsvc_%",
        "authsvc_' OR ''='",
        "",
        encoded,
        f"{BOB}:{token}",
        f"\t{token}",
    ]
    bearer += [wrong * 60, "authsvc_" + "A" * 7000, "A" * 20_000, token.removeprefix("authsvc_"), f"\xa0{token}"]
    users = [
        "",
        "*",
        "1",
        "%",
        "bob",
        CAROL,
        f" {BOB}",
        f"{BOB} ",
        f"{BOB}\0",
        f"{BOB}\n",
        "bob%40example.com",
        BOB * 300,
    ]
    pairs = [*((user, token) for user in users), (token, ""), (token, token), (BOB, wrong), (BOB, PASSWORD), (BOB, "")]
    pairs += [(BOB, f" {token}"), (BOB, f"{token} "), (BOB, f":{token}"), (BOB, f"{token}\0"), (BOB, f"Bearer {token}")]
    base64_values = [
        encoded[:-1],
        f"={encoded}",
        f"{encoded}=",
        f"{encoded}!",
        f"{encoded[:8]} {encoded[8:]}",
        encoded[::-1],
    ]
    base64_values += [
        "====",
        "!!!",
        "A" * 7000,
        base64.b64encode(encoded.encode()).decode(),
        f"{BOB}:{token}",
        f"\t{encoded}",
    ]
    base64_values += [f"{BOB}:{token}".encode().hex(), base64.b64encode(f"{BOB}:{token}".encode("utf-16")).decode()]
    return [
        *(f"{name} {token}" for name in names.split()),
        *(f"Bearer {text}" for text in bearer),
        *(basic(*pair) for pair in pairs),
        *(f"Basic {text}" for text in base64_values),
        *(
            "",
            token,
            f"Bearer{token}",
            f"Bearer\t{token}",
            f"Basic\t{encoded}",
            f"Basic{encoded}",
            f"Bearer {token}, Basic x",
        ),
    ]


def tricks(token: str) -> list[tuple[str, str, str]]:
    """Return targets, header lines and methods."""
    live, right = f"Authorization: Bearer {token}", f"Authorization: {basic(BOB, token)}"
    names = "Proxy-Authorization X-Authorization Authentication WWW-Authenticate X-Auth-Token X-Access-Token X-Api-Key"
    names += (
        " Authorisation Auth Token HTTP_AUTHORIZATION X-Forwarded-Authorization X-Original-Authorization Auth0rization"
    )
    cookies = "__Secure-session_id __Host-session_id session_id token access_token Authorization authsvc"
    targets = [
        f"/?{name}={token}" for name in ("token", "access_token", "Authorization", "authorization=Bearer+", "login")
    ]
    targets += [f"/{token}", f"/;{token}", f"https://bob%40example.com:{token}@{APP}/", f"https://x:{token}@{APP}/"]
    targets += [
        f"https://{token}@{APP}/",
        "/.authsvc",
        "/verify",
        "//",
        "/health",
        "/verify?login=1",
        f"https://{APP}/login",
    ]
    listed = ["Authorization", "Cookie", "Accept", "Remote-User, Authorization", "Sec-Fetch-Mode, Authorization"]
    claims = ["Remote-User", "Remote_User", "REMOTE-EMAIL", "X-Forwarded-User", "X-Authenticated-User", "From", "User"]
    fetches = ["Mode: cors", "Mode: navigate", "Site: cross-site", "Site: none", "Dest: image", "Dest: empty"]
    methods = ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "MKCOL", "LOCK"]
    lines = [f"Authorization: {value}" for value in values_that_are_no_token(token)]
    lines += [f"Authorization: x\r\n{live}", f"{live}\r\n{right}", f"{live}\r\nauthorization: x", f"{live}\r\n{live}"]
    lines += [f"{name}: Bearer {token}" for name in names.split()]
    lines += [f"Authorization : Bearer {token}", f"X: y\r\n {live}", f"\t{live}"]
    lines += [f"Cookie: {name}={token}" for name in cookies.split()]
    lines += [f"Connection: {name}\r\nAuthorization: {basic(CAROL, token)}" for name in listed]
    lines += [f"{name}: {BOB}\r\nAuthorization: Bearer authsvc_" for name in claims]
    lines += [f"{right}\r\nSec-Fetch-{fetch}" for fetch in fetches]
    lines += [
        f"Upgrade: {name}\r\nConnection: Upgrade\r\nAuthorization: Bearer authsvc_" for name in ("websocket", "h2c")
    ]
    return [
        *(("/", line, "GET") for line in lines),
        *((target, "X: y", "GET") for target in targets),
        *(("/", "Authorization: Bearer authsvc_", method) for method in methods),
    ]


def test_no_trick_reaches_the_application(site: Site, token: str) -> None:
    tried, passed = tricks(token), []
    assert len(set(tried)) >= 123
    for target, lines, method in tried:
        for accept in ("*/*", "text/html"):
            before = requests_passed(site)
            with site.connect(APP) as connection, connection.makefile("rb") as received:
                head = f"{method} {target} HTTP/1.1\r\nHost: {APP}\r\nAccept: {accept}\r\n{lines}\r\n\r\n"
                connection.sendall(head.encode("latin-1"))
                with contextlib.suppress(ConnectionError):
                    received.readline()
            if requests_passed(site) != before:
                passed.append((target, lines, method))
    assert passed == []


def test_the_proxy_for_development_keeps_tokens_from_the_application(
    start: Callable[..., Service], tmp_path: Path
) -> None:
    service, port = start(), reserve_port()
    form = {"email": BOB, "password": PASSWORD}
    requests.post(f"{service.url}/users", data=form, timeout=5).raise_for_status()
    with requests.Session() as session:
        session.post(f"{service.url}/sessions", data=form, timeout=5).raise_for_status()
        cookies = session.cookies.get_dict()
        made = session.post(f"{service.url}/tokens", data={"password": PASSWORD, "name": "test"}, timeout=5)
    bearer, encoded = (f"Bearer {made.json()['token']}", basic(BOB, made.json()["token"]))
    with closing(Application()) as application:
        ports = {"5000": service.url.rpartition(":")[2], "8000": str(port), "8001": str(application.server_port)}
        text = (HERE / "examples" / "localhost.conf").read_text()
        (tmp_path / "localhost.conf").write_text(re.sub("(?<=127.0.0.1:)[0-9]+", lambda found: ports[found[0]], text))
        command = [program("nginx", "nginx-light"), "-p", str(tmp_path), "-c", str(tmp_path / "localhost.conf")]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                assert awaited(lambda: accepts(port))
                get = partial(requests.get, f"http://127.0.0.1:{port}/", timeout=5, allow_redirects=False)
                for authorization in (bearer, encoded):
                    headers = get(headers={"Authorization": authorization}).json()["headers"]
                    assert (headers["remote-user"], headers.get("authorization")) == ([BOB], None)
                own = basic("eve", "secret")
                headers = get(headers={"Authorization": own}, cookies=cookies).json()["headers"]
                assert (headers["remote-user"], headers["authorization"]) == ([BOB], [own])
                refused = [get(), get(headers={"Authorization": f"{bearer}x"})]
                assert [(reply.status_code, reply.headers["WWW-Authenticate"]) for reply in refused] == [
                    (401, CHALLENGE)
                ] * 2
                assert get(headers={"Accept": "text/html"}).status_code == 302
            finally:
                process.terminate()


# Real clients. Both are told the address of the host, and trust the authority of the tests.


class _Files(SimpleHTTPRequestHandler):
    authorizations: list[str | None]

    def do_GET(self) -> None:
        self.authorizations.append(self.headers["Authorization"])
        super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bare repository, page.git, as a server of files offers it."""
    folder = tmp_path_factory.mktemp("repository")
    git = partial(subprocess.run, cwd=folder, check=True, capture_output=True, env={**clean_environ(), "HOME": "/"})
    run = [program("git", "git"), "-c", "user.name=bob", "-c", f"user.email={BOB}"]
    git([*run, "init", "-q", "page"])
    (folder / "page" / "page.txt").write_text("for members")
    git([*run, "-C", "page", "add", "page.txt"])
    git([*run, "-C", "page", "commit", "-q", "-m", "page: add it"])
    git([*run, "clone", "-q", "--bare", "page", "page.git"])
    git([*run, "-C", "page.git", "update-server-info"])
    return folder


@pytest.mark.parametrize("kind", PROXIES)
def test_git_and_curl_pass_with_a_token(kind: str, tmp_path: Path, repository: Path) -> None:
    seen: list[str | None] = []
    handler = type("Files", (_Files,), {"authorizations": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=repository)) as files:
        Thread(target=files.serve_forever, args=(0.02,), daemon=True).start()
        with closing(Site(kind, tmp_path, application_port=files.server_port)) as site:
            site.create_account(BOB)
            token = new_token(site, BOB)[0]
            git, curl = (partial(run_client, site, name) for name in ("git", "curl"))
            url = f"{site.app}/page.git"
            named = site.app.replace("//", "//bob%40example.com:{}@") + "/page.git"
            helper = f"credential.helper=!f() {{ echo username={BOB}; echo password={token}; }}; f"
            for number, arguments in enumerate(([named.format(token)], ["-c", helper, url])):
                done = git("clone", "-q", *arguments, f"clone{number}")
                assert (done.returncode, done.stderr) == (0, "")
                assert (tmp_path / f"clone{number}" / "page.txt").read_text() == "for members"
            count = len(seen)
            assert "401" not in curl("-u", f"{BOB}:{token}", f"{url}/HEAD").stderr
            assert curl("-u", f"{BOB}:{token}", f"{url}/HEAD").stdout.startswith("ref: refs/heads/")
            assert curl("--oauth2-bearer", token, f"{url}/HEAD").stdout.startswith("ref: refs/heads/")
            assert len(seen) == count + 3
            assert set(seen) == {None}
            for arguments in ([named.format(f"{token}x")], ["-c", helper.replace("bob", "eve"), url], [url]):
                done = git("clone", "-q", *arguments, "refused")
                assert done.returncode == 128
                assert "Authentication failed" in done.stderr or "could not read Username" in done.stderr
            for arguments in (["-u", f"{BOB}:{token}x"], ["-u", f"eve@example.com:{token}"], []):
                assert "401" in curl(*arguments, f"{url}/HEAD").stderr
            assert len(seen) == count + 3
        files.shutdown()


def run_client(site: Site, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    address, authority = f"{APP}:{site.port}:127.0.0.1", f"{site.folder}/authority.pem"
    options = {
        "git": ["-c", f"http.curloptResolve={address}", "-c", f"http.sslCAInfo={authority}"],
        "curl": ["-q", "--silent", "--show-error", "--fail", "--resolve", address, "--cacert", authority],
    }
    environ = {"PATH": os.environ["PATH"], "HOME": str(site.folder), "GIT_TERMINAL_PROMPT": "0"}
    command = [program(name, name), *options[name], *arguments]
    return subprocess.run(command, cwd=site.folder, env=environ, text=True, capture_output=True, timeout=60)
