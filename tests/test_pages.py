"""The pages in a real Chromium, through a real nginx over TLS; ``python -m tests.test_pages`` takes their pictures."""

from __future__ import annotations

import contextlib
import email.message
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trustme
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, expect, sync_playwright

import totp
from tests.conftest import HERE, Service
from tests.post import SMTP_PASSWORD, USER, Post
from tests.proxies import AUTH, PASSWORD, Site, program, site

pytestmark = pytest.mark.slow

NEW_PASSWORD = "choucroute garnie du lundi"
PAGES = "login", "register", "forgot", "reset", "account"
PICTURES = HERE / "deploy" / "pages"

# What a browser reports itself when a request is refused, as it must be for a wrong password.
REFUSED = re.compile("Failed to load resource: the server responded with a status of 4[0-9][0-9]")


@contextlib.contextmanager
def town(folder: Path, **environ: str) -> Iterator[tuple[Site, Post]]:
    """A site on nginx with a mail server."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "password").write_text(SMTP_PASSWORD)
    started: list[Service] = []

    def start(**environ: str) -> Service:
        started.append(Service(folder, **environ))
        return started[-1]

    post = Post(authority.issue_cert("localhost"), "smtps")
    mail = {
        "AUTHSVC_SMTP_URL": f"smtps://{quote(USER, safe='')}@localhost:{post.port}",
        "AUTHSVC_SMTP_PASSWORD_FILE": str(folder / "password"),
        "AUTHSVC_MAIL_FROM": "auth@example.com",
        "AUTHSVC_SESSIONS_PER_USER": "9",
        "SSL_CERT_FILE": str(folder / "ca.pem"),
    }
    try:
        with site("nginx", folder, start, **{**mail, **environ}) as one:
            yield one, post
    finally:
        for service in started:
            service.end()
        post.close()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = program("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--host-resolver-rules=MAP *.example.com 127.0.0.1", "--disable-dev-shm-usage"],
            chromium_sandbox=os.geteuid() != 0,  # it refuses to have one as root
        )
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """Somebody at a browser of their own, in which nothing may go wrong unseen."""

    def __init__(self, browser: Browser, site: Site, **options: Any) -> None:
        self.site = site
        self.context = browser.new_context(ignore_https_errors=True, locale="en-GB", **options)
        self.context.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective))"
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.troubles: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not REFUSED.match(message.text):
            self.troubles.append(message.text)

    def open(self, where: str) -> Page:
        self.page.goto(where if where.startswith("https:") else self.site.auth + where)
        return self.page

    def fill(self, name: str, /, **fields: str) -> None:
        """Fill in a form and send it, with the keyboard alone."""
        form = self.page.locator(f"form[data-action={name}]")
        for field, value in fields.items():
            form.locator(f"[name={field}]").focus()
            self.page.keyboard.type(value)
        self.page.keyboard.press("Enter")

    def hears(self, name: str, text: str) -> None:
        expect(self.page.locator(f"form[data-action={name}] [role=status]")).to_have_text(text)

    def arrives(self, where: str) -> None:
        self.page.wait_for_url(where if where.startswith("https:") else self.site.auth + where)

    def registers(self, address: str, password: str = PASSWORD) -> None:
        self.open("/register")
        self.fill("register", email=address, password=password)
        self.arrives("/account")
        expect(self.page.locator("#who")).to_have_text(address)

    def signs_in(self, address: str, password: str = PASSWORD, where: str = "/account") -> None:
        self.fill("login", email=address, password=password)
        self.arrives(where)

    def sets_up_a_factor(self, password: str = PASSWORD) -> tuple[str, list[str]]:
        """Return the seed and the recovery codes."""
        self.fill("begin", password=password)
        key = self.page.locator("#factor-key")
        expect(key).to_be_visible()
        seed = key.inner_text().replace(" ", "")
        self.fill("confirm", otp=code_of(seed))
        codes = self.page.locator("#codes code")
        expect(codes).to_have_count(10)
        return seed, codes.all_inner_texts()

    def __enter__(self) -> Visitor:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.context.close()
        assert kind is not None or self.troubles == []


def code_of(seed: str, later: int = 0) -> str:
    return totp.code(seed, int(time.time()) // totp.STEP + later)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Post]]:
    with town(tmp_path_factory.mktemp("town")) as one:
        yield one


Visit = Callable[..., Visitor]


@pytest.fixture
def visit(browser: Browser, place: tuple[Site, Post]) -> Iterator[Visit]:
    """Let somebody come to the site; nothing may have gone wrong in any browser in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(Visitor(browser, place[0], **options))


def next_to(post: Post, address: str) -> email.message.EmailMessage:
    while (mail := post.next())["To"] != address:
        pass
    return mail


def test_who_registers_is_signed_in(visit: Visit) -> None:
    bob = visit()
    bob.registers("first@example.com")
    assert bob.page.title() == "Your account"
    expect(bob.page.locator("#sessions li")).to_have_count(1)
    cookie = next(cookie for cookie in bob.context.cookies() if cookie["name"] == "__Secure-session_id")
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Lax")


def test_from_an_application_to_the_page_and_back(visit: Visit, place: tuple[Site, Post]) -> None:
    place[0].register("back@example.com")
    bob = visit()
    wanted = f"{place[0].app}/some/where?a=b&c=%2F"
    bob.open(wanted)
    assert bob.page.url.startswith(f"{place[0].auth}/login?return=")
    bob.signs_in("back@example.com", where=wanted)
    assert json.loads(bob.page.inner_text("body"))["headers"]["remote-user"] == ["back@example.com"]
    bob.page.goto(f"{place[0].auth}/login?return={wanted}")  # who is signed in already goes on at once
    bob.arrives(wanted)


def test_from_an_application_by_way_of_registering(visit: Visit, place: tuple[Site, Post]) -> None:
    bob = visit()
    bob.open(f"{place[0].app}/new")
    bob.page.get_by_role("link", name="Make an account").click()
    bob.fill("register", email="new@example.com", password=PASSWORD)
    bob.arrives(f"{place[0].app}/new")


def test_what_is_refused_is_said(visit: Visit, place: tuple[Site, Post]) -> None:
    place[0].register("refused@example.com")
    bob = visit()
    bob.open("/login")
    bob.fill("login", email="refused@example.com", password="wrong")
    bob.hears("login", "Wrong email or password.")
    bob.open("/register")
    bob.fill("register", email="refused@example.com", password=PASSWORD)
    bob.hears("register", "This email has an account already.")
    bob.page.locator("#register-email").fill("")
    bob.page.locator("#register-password").fill("")
    bob.fill("register", email="other@example.com", password="short")
    expect(bob.page.locator("#register [role=status]")).to_contain_text("15 characters")


def test_a_second_factor_from_setting_up_to_switching_off(visit: Visit) -> None:
    bob = visit()
    bob.registers("factor@example.com")
    seed, codes = bob.sets_up_a_factor()
    bob.page.get_by_role("button", name="Sign out").click()
    bob.arrives("/login")
    bob.fill("login", email="factor@example.com", password=PASSWORD)
    bob.hears("login", "Now enter the code that your app shows.")
    expect(bob.page.locator("#login-otp")).to_be_focused()
    bob.page.keyboard.type("000000")
    bob.page.keyboard.press("Enter")
    bob.hears("login", "Wrong or used code.")
    bob.page.locator("#login-otp").fill(code_of(seed, later=1))  # the one before confirmed it, and works once
    bob.page.keyboard.press("Enter")
    bob.arrives("/account")
    bob.fill("off", password=PASSWORD, otp=codes[0])
    bob.hears("begin", "The second factor is off; all other sessions have ended.")


def test_the_qr_code_is_drawn(visit: Visit) -> None:
    bob = visit()
    bob.registers("picture@example.com")
    bob.fill("begin", password=PASSWORD)
    picture = bob.page.locator("#factor-picture")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.complete && image.naturalWidth > 20")
    link = bob.page.locator("#factor-link").get_attribute("href")
    assert link
    assert link.startswith(f"otpauth://totp/{AUTH}")


def test_a_forgotten_password_is_reset_by_mail(visit: Visit, place: tuple[Site, Post]) -> None:
    place[0].register("forgot@example.com")
    bob = visit()
    bob.open("/login")
    bob.page.get_by_role("link", name="Forgot the password?").click()
    bob.fill("forgot", email="forgot@example.com")
    bob.hears("forgot", "If this email has an account, a mail with a link is on its way.")
    (link,) = re.findall(r"https://\S+/reset#\S+", next_to(place[1], "forgot@example.com").get_content())
    bob.page.goto(link)
    bob.arrives("/reset")  # the token is gone from the address bar
    assert bob.page.evaluate("history.length") <= 4
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.hears("reset", "The password is set. You can sign in now.")
    assert "changed" in next_to(place[1], "forgot@example.com").get_content()
    bob.page.get_by_role("link", name="Sign in").click()
    bob.signs_in("forgot@example.com", NEW_PASSWORD)
    bob.page.goto(link)
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.hears("reset", "This link has been used or has expired. Ask for another.")
    assert not [url for url in bob.requests if "token" in url.partition("#")[0]]


@pytest.mark.parametrize("link", ["/reset", "/reset#token=abc", "/reset#email=bob@example.com"])
def test_a_link_that_is_cut_short_says_so(visit: Visit, link: str) -> None:
    bob = visit()
    bob.open(link)
    bob.hears("reset", "This link is incomplete: open it again from the mail, or ask for another.")
    expect(bob.page.get_by_role("button", name="Set the password")).to_be_disabled()


def test_another_session_is_ended(visit: Visit) -> None:
    here, there = visit(), visit(user_agent="<b>Another</b> browser")
    here.registers("two@example.com")
    there.open("/login")
    there.signs_in("two@example.com")
    here.page.reload()
    expect(here.page.locator("#sessions li")).to_have_count(2)
    other = here.page.locator("#sessions li", has_text="<b>Another</b> browser")
    other.get_by_role("button").click()
    expect(here.page.locator("#sessions li")).to_have_count(1)
    there.page.reload()
    there.arrives("/login")


def test_all_other_sessions_are_ended_by_a_new_password(visit: Visit) -> None:
    here, there = visit(), visit()
    here.registers("change@example.com")
    there.open("/login")
    there.signs_in("change@example.com")
    here.fill("password", password=PASSWORD, new_password=NEW_PASSWORD)
    here.hears("password", "The password is changed; all other sessions have ended.")
    there.page.reload()
    there.arrives("/login")
    here.page.reload()
    expect(here.page.locator("#who")).to_have_text("change@example.com")


def test_an_account_is_deleted(visit: Visit) -> None:
    bob = visit()
    bob.registers("gone@example.com")
    bob.fill("delete", password="wrong")
    bob.hears("delete", "Wrong password.")
    bob.page.locator("#delete-password").fill("")
    bob.fill("delete", password=PASSWORD)
    bob.hears("login", "The account is deleted.")
    bob.open("/login")
    bob.fill("login", email="gone@example.com", password=PASSWORD)
    bob.hears("login", "Wrong email or password.")


ELSEWHERE = [
    "https://evil.example/",
    "//evil.example/",
    "/\\evil.example/",
    "https:evil.example",
    "https://app.example.com.evil.example/",
    "https://evilexample.com/",
    "https://auth.example.com@evil.example/",
    "https://user:pass@app.example.com/",
    "http://app.example.com/",
    "blob:{auth}/b",
    "javascript:document.title='evil'",
    "data:text/html,evil",
    "\tjavascript:alert(1)",
    "https://",
    "%",
    "",
]


def test_nobody_is_led_elsewhere(visit: Visit, place: tuple[Site, Post]) -> None:
    place[0].register("led@example.com")
    bob = visit()
    bob.open(f"/login?return={ELSEWHERE[0]}")
    bob.fill("login", email="led@example.com", password="wrong")
    bob.hears("login", "Wrong email or password.")  # and the address is still there, as it was
    bob.page.locator("#login-email").fill("")
    bob.page.locator("#login-password").fill("")
    bob.signs_in("led@example.com")
    for wanted in ELSEWHERE:  # from here on as who is signed in already
        there = wanted.replace("{auth}", place[0].auth)
        for given in (there, quote(there, safe="")):
            bob.open("/forgot")
            bob.page.goto(f"{place[0].auth}/login?return={given}", wait_until="commit")
            bob.page.wait_for_url(re.compile(rf"{place[0].auth}/account(\?.*)?$"))
    assert not [url for url in bob.requests if not url.startswith((f"{place[0].auth}/", "data:,"))]


def test_who_is_sent_to_and_fro_ends_at_the_account(visit: Visit, place: tuple[Site, Post]) -> None:
    place[0].register("loop@example.com")
    bob = visit()
    bob.open("/login")
    bob.signs_in("loop@example.com")
    # Planted by a sibling host, and sent to the application alone: two sessions are none.
    name, path = "__Secure-session_id", "/private"
    planted: Any = {"name": name, "value": "x" * 43, "domain": ".example.com", "path": path, "secure": True}
    bob.context.add_cookies([planted])
    with contextlib.suppress(Error):  # a redirect in the midst of the loading
        bob.open(f"{place[0].app}/private")
    bob.page.wait_for_url(re.compile(r"/account\?return="))


def test_a_link_that_is_opened_in_the_same_tab_leaves_the_address_bar_too(visit: Visit) -> None:
    bob = visit()
    bob.open("/reset")
    bob.page.evaluate("location.hash = 'token=abc&email=bob@example.com'")
    expect(bob.page.locator("#reset-email")).to_have_value("bob@example.com")
    bob.arrives("/reset")


def test_a_page_is_at_most_4_requests_and_40_kb(visit: Visit) -> None:
    bob = visit()
    finished: list[Request] = []
    bob.page.on("requestfinished", lambda request: finished.append(request))
    for name in PAGES:
        if name == "account":
            bob.registers("weight@example.com")
        bob.open("/forgot")
        bob.page.wait_for_load_state("networkidle")
        finished.clear()
        bob.open(f"/{name}")
        bob.page.wait_for_load_state("networkidle")
        asked = [request for request in finished if not request.url.startswith("data:")]
        assert 3 <= len(asked) <= 4, (name, asked)
        assert (
            sum(int(str(size)) for request in asked for size in request.sizes().values()) <= 40_000
        )  # with the headers


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_axe_finds_nothing_on_any_page(visit: Visit, scheme: str, width: int) -> None:
    bob = visit(color_scheme=scheme, viewport={"width": width, "height": 800})
    for name in PAGES[:-1]:
        bob.open(f"/{name}")
        bob.page.wait_for_load_state("networkidle")
        _is_fine(bob.page, width)
    bob.registers(f"axe-{scheme}-{width}@example.com")
    _is_fine(bob.page, width)
    bob.fill("begin", password=PASSWORD)
    expect(bob.page.locator("#factor-key")).to_be_visible()
    _is_fine(bob.page, width)


def _is_fine(page: Page, width: int) -> None:
    # Its script is put in by the test and not by the page, which would not let it.
    found = [
        f"{rule['impact']}: {rule['id']}: {[node['html'] for node in rule['nodes']]}"
        for rule in Axe().run(page).response["violations"]
        if rule["impact"] in ("serious", "critical", "moderate")
    ]
    assert found == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_answer_moves_nothing(visit: Visit) -> None:
    bob = visit(viewport={"width": 320, "height": 800})
    bob.open("/login")
    after_it = bob.page.get_by_role("link", name="Make an account")
    before = after_it.bounding_box()
    bob.fill("login", email="nobody@example.com", password="wrong")
    bob.hears("login", "Wrong email or password.")
    assert after_it.bounding_box() == before


def test_without_script_the_page_says_what_it_needs(visit: Visit) -> None:
    bob = visit(java_script_enabled=False)
    for name in PAGES[:-1]:
        bob.open(f"/{name}")
        expect(bob.page.locator("noscript p")).to_contain_text("need JavaScript")
        expect(bob.page.locator("noscript p")).to_be_visible()


def test_a_demanded_factor_is_set_up_on_the_way(browser: Browser, tmp_path: Path) -> None:
    with town(tmp_path, AUTHSVC_REQUIRE_TOTP="on") as (one, _), Visitor(browser, one) as bob:
        one.register()
        bob.open(f"{one.app}/page")
        bob.fill("login", email="bob@example.com", password=PASSWORD)
        bob.page.wait_for_url(re.compile(r"/account\?return="))
        expect(bob.page.locator("#who")).to_have_text("This service asks for a second factor: set one up below.")
        bob.sets_up_a_factor()
        bob.page.get_by_role("link", name="Go on to where you were going").click()
        bob.arrives(f"{one.app}/page")


def test_an_invitation_is_accepted(browser: Browser, tmp_path: Path) -> None:
    with town(tmp_path, AUTHSVC_REGISTRATION="invitation") as (one, _), Visitor(browser, one) as bob:
        bob.open("/register")
        bob.fill("register", email="bob@example.com", password=PASSWORD)
        bob.hears("register", "Accounts are by invitation only.")
        link = one.service.command("invite", "bob@example.com").split()[-1]
        bob.page.goto(link)
        expect(bob.page.locator("#reset-email")).to_have_value("bob@example.com")
        bob.fill("reset", new_password=PASSWORD)
        bob.hears("reset", "The password is set. You can sign in now.")
        bob.page.get_by_role("link", name="Sign in").click()
        bob.signs_in("bob@example.com")


def take_pictures() -> None:
    """Write a picture of each page, light and dark, narrow and wide."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, town(Path(folder)) as (one, _), chromium() as browser:
        one.register()
        for scheme in ("light", "dark"):
            for width, look in ((320, "narrow"), (900, "wide")):
                options = {"color_scheme": scheme, "viewport": {"width": width, "height": 560}}
                with Visitor(browser, one, **options) as bob:
                    for name in PAGES:
                        if name == "account":
                            bob.open("/login")
                            bob.signs_in("bob@example.com")
                        bob.open("/reset#token=x&email=bob@example.com" if name == "reset" else f"/{name}")
                        bob.page.wait_for_load_state("networkidle")
                        full = name == "account"
                        bob.page.screenshot(path=PICTURES / f"{name}-{look}-{scheme}.png", full_page=full)


if __name__ == "__main__":
    take_pictures()
