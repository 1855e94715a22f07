"""The pages in a real Chromium, behind a real nginx with TLS; ``python -m tests.test_pages`` takes the screenshots."""

from __future__ import annotations

import contextlib
import email.message
import functools
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, quote, urlsplit

import pytest
import requests
import trustme
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from credentials import totp
from tests.conftest import HERE, Service
from tests.crowd import awaited
from tests.mail_server import SMTP_PASSWORD, MailServer
from tests.proxies import AUTH, PASSWORD, Site, accepts, program, reserve_port

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.browser]

NEW_PASSWORD = "choucroute garnie du lundi"
PAGES = "login", "register", "forgot", "reset", "logout", "account"
SCREENSHOTS = HERE / "docs" / "screenshots"
TIMEOUT = 30_000  # milliseconds; only a machine with too much to do needs more than one second

# What a browser reports by itself for a refused request, such as one with a wrong password.
REFUSED = re.compile("Failed to load resource: the server responded with a status of 4[0-9][0-9]")


@contextlib.contextmanager
def running_mail_server(folder: Path) -> Iterator[tuple[MailServer, dict[str, str]]]:
    """A mail server, and the settings with which the service uses it."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    (folder / "password").write_text(SMTP_PASSWORD)
    with closing(MailServer(authority.issue_cert("localhost"), "smtps")) as server:
        yield (
            server,
            {
                "AUTHSVC_SMTP_URL": server.url,
                "AUTHSVC_SMTP_PASSWORD_FILE": str(folder / "password"),
                "AUTHSVC_MAIL_FROM": "auth@example.com",
                "SSL_CERT_FILE": str(folder / "ca.pem"),
            },
        )


@contextlib.contextmanager
def chromium(*options: str) -> Iterator[Browser]:
    path = program("chromium", "chromium")
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--host-resolver-rules=MAP *.example.com 127.0.0.1", "--disable-dev-shm-usage", *options],
            chromium_sandbox=os.geteuid() != 0,  # Chromium refuses to run as root with its sandbox
        )
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """A visitor with a browser profile of their own. An error in the console or a policy violation fails the test."""

    def __init__(self, browser: Browser, site: Site, **options: Any) -> None:
        self.site = site
        self.context = browser.new_context(ignore_https_errors=True, locale="en-GB", **options)
        self.context.set_default_timeout(TIMEOUT)
        self.context.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective))"
        )
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.context.on("console", self._read_console)
        self.context.on("weberror", lambda error: self.errors.append(str(error.error)))
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()

    def _read_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not REFUSED.match(message.text):
            self.errors.append(message.text)

    def url(self, address: str) -> str:
        return address if address.startswith("https:") else self.site.auth + address

    def open(self, address: str) -> Page:
        """Open a page that stays where it is."""
        self.page.goto(self.url(address))
        return self.page

    def open_redirecting(self, address: str, target: str | re.Pattern[str]) -> None:
        """Open a page that redirects by script, and wait for the target."""
        # A redirect would interrupt a wait for the end of the loading.
        self.page.goto(self.url(address), wait_until="commit")
        self.page.wait_for_url(self.url(target) if isinstance(target, str) else target)

    def fill(self, name: str, /, **fields: str) -> None:
        """Fill in a form and send it, using the keyboard only."""
        form = self.page.locator(f"form[data-action={name}]")
        for field, value in fields.items():
            form.locator(f"[name={field}]").focus()
            self.page.keyboard.type(value)
        self.page.keyboard.press("Enter")

    def expect_status(self, name: str, text: str) -> None:
        expect(self.page.locator(f"form[data-action={name}] [role=status]")).to_have_text(text)

    def expect_url(self, address: str) -> None:
        self.page.wait_for_url(self.url(address))

    def expect_heading(self, text: str) -> None:
        # A list is compared again until it is right: while the page loads, no style hides the other headings yet.
        expect(self.page.get_by_role("heading", level=1)).to_have_text([text])

    def expect_nothing_left(self, address: str) -> None:
        """Expect that neither the account page nor the storage of the browser has anything about a user."""
        expect(self.page.locator("#account :is(input, li, code, img, a)")).to_have_count(0)
        assert address not in self.page.content()
        assert self.page.evaluate("sessionStorage.length + localStorage.length") == 0

    def create_account(self, address: str) -> None:
        """Create an account with the form, and wait for the account page."""
        self.open("/register")
        self.fill("register", email=address, password=PASSWORD)
        self.expect_url("/account")
        expect(self.page.locator("#who")).to_have_text(address)

    def get_account(self, address: str) -> None:
        """Create an account without the form, which takes half the time, and open the account page."""
        self.site.create_account(address)
        name, _, value = self.site.sign_in(address).partition("=")
        cookie: Any = {"name": name, "value": value, "domain": ".example.com", "path": "/", "secure": True}
        self.context.add_cookies([cookie])
        self.open("/account")
        expect(self.page.locator("#who")).to_have_text(address)

    def sign_in(self, address: str, password: str = PASSWORD, target: str = "/account") -> None:
        """Sign in on the page that is open."""
        self.fill("login", email=address, password=password)
        self.expect_url(target)

    def set_up_two_factor(self, password: str = PASSWORD) -> tuple[str, list[str]]:
        """Return the seed and the recovery codes."""
        self.fill("begin", password=password)
        key = self.page.locator("#factor-key")
        expect(key).to_be_visible()
        seed = key.inner_text().replace(" ", "")
        self.fill("confirm", otp=code_of(seed))
        codes = self.page.locator("#codes code")
        expect(codes).to_have_count(10)
        return seed, codes.all_inner_texts()

    def forget(self) -> None:
        """Forget what an earlier test left in the profile."""
        if self.page.url.startswith(self.site.auth):
            self.page.evaluate("sessionStorage.clear()")
        else:
            self.page.goto("about:blank")  # another site may still load something
        self.context.clear_cookies()
        self.errors.clear()
        self.requests.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.context.close()
        assert kind is not None or self.errors == []


def code_of(seed: str, steps_ahead: int = 0) -> str:
    return totp.code(seed, int(time.time()) // totp.STEP + steps_ahead)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as shared:
        yield shared


@pytest.fixture(scope="module")
def mail_and_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MailServer, dict[str, str]]]:
    with running_mail_server(tmp_path_factory.mktemp("mail")) as running:
        yield running


@pytest.fixture(scope="module")
def mail(mail_and_settings: tuple[MailServer, dict[str, str]]) -> MailServer:
    return mail_and_settings[0]


@pytest.fixture(scope="module")
def site(
    mail_and_settings: tuple[MailServer, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """One site for all tests; use an email of your own."""
    settings = {"AUTHSVC_SESSIONS_PER_USER": "9", "AUTHSVC_CONFIRM_EMAIL": "off", **mail_and_settings[1]}
    with closing(Site("nginx", tmp_path_factory.mktemp("site"), settings)) as shared:
        yield shared


Visit = Callable[..., Visitor]


@pytest.fixture(scope="module")
def shared_visitor(browser: Browser, site: Site) -> Iterator[Visitor]:
    """One browser profile for all tests, as a new one takes a second."""
    with Visitor(browser, site) as shared:
        yield shared


@pytest.fixture
def visit(browser: Browser, site: Site, shared_visitor: Visitor) -> Iterator[Visit]:
    """Start a visit to the site. At the end of the test no visitor may have seen an error.

    The first visitor has the shared profile. Further ones, and those with options, have a new one.
    """
    shared_visitor.forget()
    unused = [shared_visitor]
    with contextlib.ExitStack() as stack:

        def begin(*, new_profile: bool = False, **options: Any) -> Visitor:
            if unused and not new_profile and not options:
                return unused.pop()
            return stack.enter_context(Visitor(browser, site, **options))

        yield begin
    assert shared_visitor.errors == []


def next_mail_to(server: MailServer, address: str) -> email.message.EmailMessage:
    while (mail := server.next())["To"] != address:
        pass
    return mail


def test_a_new_account_is_signed_in(visit: Visit) -> None:
    bob = visit()
    bob.create_account("first@example.com")
    assert bob.page.title() == "Your account"
    expect(bob.page.locator("#sessions li")).to_have_count(1)
    cookie = next(cookie for cookie in bob.context.cookies() if cookie["name"] == "__Secure-session_id")
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Lax")


def test_sign_in_returns_to_the_application(visit: Visit, site: Site) -> None:
    site.create_account("back@example.com")
    bob = visit()
    target = f"{site.app}/some/where?a=b&c=%2F"
    bob.open(target)
    assert bob.page.url.startswith(f"{site.auth}/login?return=")
    bob.sign_in("back@example.com", target=target)
    assert json.loads(bob.page.inner_text("body"))["headers"]["remote-user"] == ["back@example.com"]
    bob.open_redirecting(f"/login?return={target}", target)  # a signed-in user is sent on at once


def test_a_return_address_is_found_in_every_spelling(visit: Visit, site: Site) -> None:
    bob = visit()
    bob.create_account("spelled@example.com")
    path = "/some/where?return=/own&a=b&c=%2F%3F"
    everything = quote(path, safe="")
    spellings = {
        f"{site.app}{path}": site.app + path,  # as nginx writes it
        f"{site.app}{everything}": site.app + path,  # as ingress-nginx writes it
        f"{site.app}{everything}&other=1": site.app + path,
        quote(site.app + path, safe=""): site.app + path,
        quote(site.app + path, safe="/") + "&return=/other": site.app + path,
        "/account?return=/x&y=%2F": f"{site.auth}/account?return=/x&y=%2F",
        quote("/account?x=1&y=https://a", safe=""): f"{site.auth}/account?x=1&y=https://a",
    }
    for given, target in spellings.items():
        bob.open_redirecting(f"/login?return={given}", target)


def invite(site: Site, address: str) -> None:
    """Create an account by an invitation, which no limit of registrations counts."""
    fragment = parse_qs(urlsplit(site.command("invite", address).split()[-1]).fragment)
    form = {"email": address, "reset_token": fragment["token"][0], "new_password": PASSWORD}
    assert site.request("PUT", f"{site.auth}/reset_password", form).status == 200


def test_a_visitor_stays_signed_in_only_if_they_ask_for_it(visit: Visit, site: Site) -> None:
    invite(site, "stay@example.com")
    bob = visit()

    def expires() -> bool:
        (cookie,) = [one for one in bob.context.cookies() if one["name"] == "__Secure-session_id"]
        return cookie["expires"] > time.time() + 2_500_000

    bob.open("/login")
    bob.sign_in("stay@example.com")
    assert not expires()
    bob.page.get_by_role("button", name="Sign out").click()
    bob.expect_url("/login")
    bob.page.get_by_label("Keep me signed in").check()
    bob.sign_in("stay@example.com")
    assert expires()


def test_the_sign_out_page_forgets_the_browser(visit: Visit, site: Site) -> None:
    invite(site, "leave@example.com")
    bob = visit()
    bob.open("/login")
    bob.sign_in("leave@example.com")

    def cookies() -> set[str]:
        return {cookie["name"] for cookie in bob.context.cookies()} - {"__Host-challenge"}  # for five minutes

    assert len(cookies()) == 2
    for choice, left in (False, {"__Host-device"}), (True, set()):
        bob.open("/logout")
        bob.page.get_by_label("Forget this browser").set_checked(choice)
        bob.page.get_by_role("button", name="Sign out").click()
        bob.expect_url("/login")
        assert cookies() == left
    bob.open("/logout")
    bob.page.get_by_role("button", name="Sign out").click()
    bob.expect_status("leave", "You are not signed in.")


def test_the_usual_address_to_change_a_password_leads_to_the_account(visit: Visit) -> None:
    bob = visit()
    bob.open("/.well-known/change-password")
    bob.expect_url("/login")  # where the account page leads a visitor without a session
    assert f"{bob.site.auth}/account" in bob.requests


def test_a_change_asks_for_the_code_where_the_service_does(visit: Visit, site: Site) -> None:
    bob = visit()
    invite(site, "ask@example.com")
    bob.open("/login")
    bob.sign_in("ask@example.com")
    _, codes = bob.set_up_two_factor()
    bob.fill("password", password=PASSWORD, new_password=NEW_PASSWORD)  # the code was shown a moment ago
    bob.expect_status("password", "Password changed. All other sessions have been signed out.")
    expect(bob.page.locator("#password-otp")).to_be_hidden()
    with closing(sqlite3.connect(site.folder / "authsvc.db")) as database, database:
        database.execute("UPDATE sessions SET factor_at = factor_at - 600")
    bob.fill("password", password=NEW_PASSWORD, new_password=PASSWORD)
    bob.expect_status("password", "Enter the code from your authenticator app.")
    expect(bob.page.locator("#password-otp")).to_be_focused()
    bob.page.keyboard.type(codes[0])
    bob.page.keyboard.press("Enter")
    bob.expect_status("password", "Password changed. All other sessions have been signed out.")
    expect(bob.page.locator("#password-otp")).to_be_hidden()


def test_registration_returns_to_the_application(visit: Visit, site: Site) -> None:
    bob = visit()
    bob.open(f"{site.app}/new")
    bob.page.get_by_role("link", name="Create account").click()
    bob.fill("register", email="new@example.com", password=PASSWORD)
    bob.expect_url(f"{site.app}/new")


def test_refusals_are_shown(visit: Visit, site: Site) -> None:
    site.create_account("refused@example.com")
    bob = visit()
    bob.open("/login")
    bob.fill("login", email="refused@example.com", password="wrong")
    bob.expect_status("login", "Wrong email or password.")
    bob.open("/register")
    bob.fill("register", email="refused@example.com", password=PASSWORD)
    bob.expect_status("register", "An account with this email already exists.")
    bob.page.locator("#register-email").fill("")
    bob.page.locator("#register-password").fill("")
    bob.fill("register", email="other@example.com", password="short")
    expect(bob.page.locator("#register [role=status]")).to_contain_text("15 characters")


def test_two_factor_authentication_is_set_up_used_and_turned_off(visit: Visit) -> None:
    bob = visit()
    bob.get_account("factor@example.com")
    seed, codes = bob.set_up_two_factor()
    bob.page.get_by_role("button", name="Sign out").click()
    bob.expect_url("/login")
    bob.fill("login", email="factor@example.com", password=PASSWORD)
    bob.expect_status("login", "Enter the code from your authenticator app.")
    expect(bob.page.locator("#login-otp")).to_be_focused()
    bob.page.keyboard.type("000000")
    bob.page.keyboard.press("Enter")
    bob.expect_status("login", "Wrong or already used code.")
    bob.page.locator("#login-otp").fill(code_of(seed, steps_ahead=1))  # the current one was used to confirm
    bob.page.keyboard.press("Enter")
    bob.expect_url("/account")
    bob.fill("off", password=PASSWORD, otp=codes[0])
    bob.expect_status("begin", "Turned off. All other sessions have been signed out.")


def test_the_qr_code_is_drawn(visit: Visit) -> None:
    bob = visit()
    bob.get_account("picture@example.com")
    bob.fill("begin", password=PASSWORD)
    picture = bob.page.get_by_role("img", name="QR code for the authenticator app")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 20
    link = bob.page.locator("#factor-link").get_attribute("href")
    assert link
    assert link.startswith(f"otpauth://totp/{AUTH}")


def test_a_forgotten_password_is_reset_by_mail(visit: Visit, site: Site, mail: MailServer) -> None:
    site.create_account("forgot@example.com")
    bob = visit(new_profile=True)
    bob.open("/login")
    bob.page.get_by_role("link", name="Forgot your password?").click()
    bob.expect_heading("Reset your password")
    bob.fill("forgot", email="forgot@example.com")
    bob.expect_status("forgot", "If an account exists for this email, a reset link is on its way.")
    (link,) = re.findall(r"https://\S+/reset#\S+", next_mail_to(mail, "forgot@example.com").get_content())
    bob.page.goto(link)
    bob.expect_url("/reset")  # the token has been removed from the address bar
    bob.expect_heading("Set your password")
    assert bob.page.evaluate("history.length") <= 4
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.expect_status("reset", "The password is set. You can sign in now.")
    assert "changed" in next_mail_to(mail, "forgot@example.com").get_content()
    bob.page.get_by_role("link", name="Sign in").click()
    bob.sign_in("forgot@example.com", NEW_PASSWORD)
    bob.page.goto(link)
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.expect_status("reset", "This link has been used or has expired. Request a new one.")
    assert not [url for url in bob.requests if "token" in url.partition("#")[0]]


def link_in_mail_to(server: MailServer, address: str, page: str) -> str:
    (link,) = re.findall(rf"https://\S+/{page}#\S+", next_mail_to(server, address).get_content())
    return str(link)


@pytest.fixture(scope="module")
def confirming_site(
    mail_and_settings: tuple[MailServer, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site where emails are confirmed, as in any production with a mail server."""
    settings = {"AUTHSVC_SESSIONS_PER_USER": "9", **mail_and_settings[1]}
    with closing(Site("nginx", tmp_path_factory.mktemp("confirming"), settings)) as shared:
        yield shared


def test_an_account_is_created_with_a_mailed_link(browser: Browser, confirming_site: Site, mail: MailServer) -> None:
    with Visitor(browser, confirming_site) as bob:
        bob.open("/register")
        expect(bob.page.locator("#register-password")).to_have_count(0)
        bob.fill("register", email="bob@example.com")
        bob.expect_status("register", "A mail is on its way. Open its link to choose a password.")
        link = link_in_mail_to(mail, "bob@example.com", "confirm")
        bob.page.goto(link)
        bob.expect_url("/confirm")  # the token has been removed from the address bar
        bob.expect_heading("Confirm your email")
        expect(bob.page.locator("#confirm-email")).to_have_value("bob@example.com")
        assert "bob@example.com" not in confirming_site.command("user", "list")  # opening the link changes nothing
        bob.fill("create", password="short")
        expect(bob.page.locator("#confirm [role=status]")).to_contain_text("15 characters")
        bob.page.locator("#confirm-password").fill("")
        bob.fill("create", password=PASSWORD)
        bob.expect_status("create", "Your account is ready. You can sign in now.")
        bob.page.get_by_role("link", name="Sign in").click()
        bob.sign_in("bob@example.com")
        bob.page.goto(link)
        bob.fill("create", password=NEW_PASSWORD)
        refusal = "This link has been used or has expired, or is of another browser. Request a new one."
        bob.expect_status("create", refusal)
        assert not [url for url in bob.requests if "token" in url.partition("#")[0]]


def test_an_email_is_changed_in_the_browser_that_asked(visit: Visit, mail: MailServer) -> None:
    bob, elsewhere = visit(), visit(new_profile=True)
    bob.get_account("former@example.com")
    bob.fill("email", new_email="newer@example.com", password="wrong")
    bob.expect_status("email", "Wrong password.")
    bob.page.locator("#email-new").fill("")
    bob.page.locator("#email-password").fill("")
    bob.fill("email", new_email="newer@example.com", password=PASSWORD)
    bob.expect_status(
        "email", "If nobody has this email yet, a link is on its way. Open it in this browser within an hour."
    )
    link = link_in_mail_to(mail, "newer@example.com", "change")
    elsewhere.page.goto(link)
    elsewhere.expect_status(
        "change", "Sign in first, in the browser in which you asked for the new email. Then open the link again."
    )
    expect(elsewhere.page.get_by_role("button", name="Change email")).to_be_disabled()
    bob.page.goto(link)
    bob.expect_url("/change")
    expect(bob.page.locator("#change-former")).to_have_value("former@example.com")
    expect(bob.page.locator("#change-email")).to_have_value("newer@example.com")
    bob.page.get_by_role("button", name="Change email").click()
    bob.expect_status("change", "Your email is changed. All other sessions have been signed out.")
    bob.page.get_by_role("link", name="Your account").click()
    expect(bob.page.locator("#who")).to_have_text("newer@example.com")


def test_an_incomplete_link_is_reported(visit: Visit) -> None:
    bob = visit()
    for link in ("/reset", "/reset#token=abc", "/reset#email=bob@example.com"):
        bob.page.goto("about:blank")  # a change of only the fragment would not load the page
        bob.open(link)
        bob.expect_status("reset", "This link is incomplete. Open it again from the mail, or request a new one.")
        expect(bob.page.get_by_role("button", name="Set password")).to_be_disabled()
    for page, action in (("confirm", "create"), ("change", "change")):
        bob.open(f"/{page}#token=abc")
        bob.expect_status(action, "This link is incomplete. Open it again from the mail, or request a new one.")


def test_other_sessions_can_be_ended(visit: Visit) -> None:
    here, there = visit(), visit(user_agent="<b>Another</b> browser")
    here.get_account("two@example.com")
    there.open("/login")
    there.sign_in("two@example.com")
    here.page.reload()
    sessions = here.page.locator("#sessions li")
    expect(sessions).to_have_count(2)
    sessions.filter(has_text="<b>Another</b> browser").get_by_role("button").click()
    expect(sessions).to_have_count(1)
    expect(sessions).to_contain_text("this session")
    there.page.reload()
    there.expect_url("/login")
    there.sign_in("two@example.com")
    here.page.get_by_role("button", name="End all other sessions").click()
    here.expect_status("others", "All other sessions have been signed out.")
    there.page.reload()
    there.expect_url("/login")


def test_a_new_password_ends_all_other_sessions(visit: Visit) -> None:
    here, there = visit(), visit()
    here.get_account("change@example.com")
    there.open("/login")
    there.sign_in("change@example.com")
    here.fill("password", password=PASSWORD, new_password=NEW_PASSWORD)
    here.expect_status("password", "Password changed. All other sessions have been signed out.")
    there.page.reload()
    there.expect_url("/login")
    here.page.reload()
    expect(here.page.locator("#who")).to_have_text("change@example.com")


def test_an_access_token_is_created_shown_once_and_deleted(visit: Visit, site: Site) -> None:
    invite(site, "tokens@example.com")
    bob = visit()
    bob.open("/login")
    bob.sign_in("tokens@example.com")
    bob.page.get_by_role("heading", name="Access tokens").click()
    bob.fill("token", name="<b>git</b>", password="wrong")
    bob.expect_status("token", "Wrong password.")
    bob.page.locator("#token-password").fill("")
    bob.fill("token", password=PASSWORD)
    bob.expect_status("token", "Access token created. Copy it now: it is not shown again.")
    listed, secret = bob.page.locator("#tokens li"), bob.page.locator("#token-secret")
    expect(listed).to_have_count(1)
    expect(listed).to_contain_text("<b>git</b>")
    expect(listed).to_contain_text("never used · expires")
    token = secret.inner_text()
    assert site.service
    ask = functools.partial(requests.get, f"{site.service.url}/verify", headers={"Authorization": f"Bearer {token}"})
    assert ask(timeout=10).status_code == 200
    bob.page.reload()
    bob.page.get_by_role("heading", name="Access tokens").click()
    expect(listed).to_contain_text("last used")
    expect(secret).to_be_hidden()
    assert token not in bob.page.content()
    bob.page.get_by_role("button", name="Delete <b>git</b>").click()
    expect(listed).to_have_count(0)
    assert ask(timeout=10).status_code == 401


def test_an_account_is_deleted(visit: Visit) -> None:
    bob = visit()
    bob.get_account("gone@example.com")
    bob.fill("delete", password="wrong")
    bob.expect_status("delete", "Wrong password.")
    bob.page.locator("#delete-password").fill("")
    bob.fill("delete", password=PASSWORD)
    bob.expect_status("login", "Your account has been deleted.")
    bob.expect_nothing_left("gone@example.com")
    bob.open("/login")
    bob.fill("login", email="gone@example.com", password=PASSWORD)
    bob.expect_status("login", "Wrong email or password.")


def test_signing_out_clears_the_page_even_without_the_service(visit: Visit) -> None:
    bob = visit()
    bob.get_account("clear@example.com")
    expect(bob.page.get_by_role("button", name="Sign out")).to_be_in_viewport()
    bob.set_up_two_factor()  # the page shows recovery codes
    bob.page.evaluate("sessionStorage.setItem('onward', 'x')")
    bob.context.set_offline(True)
    bob.page.get_by_role("button", name="Sign out").click()
    bob.expect_status("logout", "The service cannot be reached. Try again.")
    bob.expect_nothing_left("clear@example.com")
    bob.context.set_offline(False)
    bob.errors.clear()  # the browser reports the failed request
    bob.page.get_by_role("button", name="Sign out").click()
    bob.expect_url("/login")
    bob.page.go_back(wait_until="commit")
    bob.expect_url("/login")
    bob.expect_heading("Sign in")
    assert "clear@example.com" not in bob.page.content()


def test_no_return_address_stays_in_the_browser(visit: Visit, site: Site) -> None:
    bob = visit()
    bob.get_account("address@example.com")
    bob.open_redirecting(f"/login?return={site.auth}/account?secret=canary", f"{site.auth}/account?secret=canary")
    stored = bob.page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])")
    assert "onward" in stored
    assert not re.search("canary|return|account", stored)


# Addresses in "return=" that lead to another site or are no address. {auth} is the service's own.
FOREIGN = [
    "https://evil.example/",
    "//evil.example/",
    "/\\evil.example/",
    "https:evil.example",
    "///evil.example/",
    "/\t/evil.example/",
    "https:///evil.example/",
    "https://evil.example%2F..%2F@auth.example.com",
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


def test_an_application_on_this_machine_is_protected_over_plain_http(
    browser: Browser, start: Callable[..., Service], tmp_path: Path
) -> None:
    service, proxy, application = start(), reserve_port(), reserve_port()
    ports = {"5000": service.url.rpartition(":")[2], "8000": str(proxy), "8001": str(application)}
    text = re.sub("(?<=127.0.0.1:)[0-9]+", lambda port: ports[port[0]], (HERE / "examples/localhost.conf").read_text())
    (tmp_path / "localhost.conf").write_text(text)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples/index.html").write_text("<h1>the application</h1>")
    recipe = re.findall(r"^# +python3 (.*) 8001 +#", text, re.MULTILINE)
    requests.post(f"{service.url}/users", data={"email": "bob@x.io", "password": "b4l0u"}, timeout=5)
    commands = (
        [program("nginx", "nginx-light"), "-p", str(tmp_path), "-c", str(tmp_path / "localhost.conf")],
        [sys.executable, *recipe[0].split(), str(application)],
    )
    with contextlib.ExitStack() as stack:
        for command in commands:
            process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
        page = browser.new_page()
        stack.callback(page.context.close)
        assert awaited(lambda: accepts(proxy) and accepts(application))
        page.goto(f"http://127.0.0.1:{proxy}/")
        page.locator("#login-email").fill("bob@x.io")
        page.locator("#login-password").fill("b4l0u")
        page.locator("#login-password").press("Enter")
        expect(page.get_by_role("heading", name="the application")).to_be_visible()
        assert page.url == f"http://127.0.0.1:{proxy}/"
        page.goto(f"{service.url}/login?return=http://localhost:{proxy}/")
        expect(page.locator("#sessions li")).to_have_count(1)  # the account page: another host


def test_no_return_address_leads_to_another_site(visit: Visit, site: Site) -> None:
    site.create_account("led@example.com")
    bob = visit()
    bob.open(f"/login?return={FOREIGN[0]}")
    bob.fill("login", email="led@example.com", password="wrong")
    bob.expect_status("login", "Wrong email or password.")  # the address in "return" is unchanged
    bob.page.locator("#login-email").fill("")
    bob.page.locator("#login-password").fill("")
    bob.sign_in("led@example.com")
    # From here on the page redirects at once, because a session exists.
    bob.open_redirecting("/login?return=javascript:alert(1)", "/account")
    bob.open("/reset")  # a page that stays where it is
    addresses = [address.replace("{auth}", site.auth) for address in FOREIGN]
    for given in dict.fromkeys(form for address in addresses for form in (address, quote(address, safe=""))):
        bob.page.evaluate("given => history.replaceState(null, '', `/login?return=${given}`)", given)
        assert bob.page.evaluate("destination()") == "/account", given
    bob.page.evaluate("given => history.replaceState(null, '', `/login?return=${given}`)", f"{site.app}/page")
    assert bob.page.evaluate("destination()") == f"{site.app}/page"
    assert not [url for url in bob.requests if not url.startswith((f"{site.auth}/", "data:,"))]


def test_a_redirect_loop_ends_at_the_account_page(visit: Visit, site: Site) -> None:
    site.create_account("loop@example.com")
    bob = visit()
    bob.open("/login")
    bob.sign_in("loop@example.com")
    # Another host of the domain has set the session cookie of another user, which is sent to the application only. The
    # sessions of two users count as none.
    site.create_account("planter@example.com")
    name, _, value = site.sign_in("planter@example.com").partition("=")
    second: Any = {"name": name, "value": value, "domain": ".example.com", "path": "/private", "secure": True}
    bob.context.add_cookies([second])
    bob.open_redirecting(f"{site.app}/private", re.compile(r"/account\?return="))


def test_a_link_opened_in_the_same_tab_leaves_the_address_bar_too(visit: Visit) -> None:
    bob = visit()
    bob.open("/reset")
    # The page reloads itself. A timer lets this call end before that.
    bob.page.evaluate("setTimeout(() => { location.hash = 'token=abc&email=bob@example.com' })")
    expect(bob.page.locator("#reset-email")).to_have_value("bob@example.com")
    bob.expect_url("/reset")


def test_a_page_takes_few_requests_and_at_most_45_kb(visit: Visit) -> None:
    bob = visit(new_profile=True)
    finished: dict[Page, list[Request]] = {}

    def add(request: Request) -> None:
        if not request.url.startswith("data:"):
            finished.setdefault(request.frame.page, []).append(request)

    bob.context.on("requestfinished", add)
    tabs = {name: bob.context.new_page() for name in PAGES[:-1]}
    for name, tab in tabs.items():
        tab.goto(bob.url(f"/{name}"), wait_until="commit")
    for tab in tabs.values():  # half a second without a request, for all tabs at the same time
        tab.wait_for_load_state("networkidle")
    bob.get_account("weight@example.com")
    tabs["account"] = bob.context.new_page()
    tabs["account"].goto(bob.url("/account"), wait_until="networkidle")
    for name, tab in tabs.items():
        requests = finished[tab]
        assert 3 <= len(requests) <= (5 if name == "login" else 4), (name, requests)  # it asks for a challenge, too
        # With the headers.
        assert sum(int(str(size)) for request in requests for size in request.sizes().values()) <= 45_000, name


LOOKS: list[tuple[int, Literal["light", "dark"]]] = [(320, "light"), (1280, "dark")]


def test_axe_finds_no_problem_on_any_page(visit: Visit) -> None:
    bob = visit(new_profile=True)
    for name in (*PAGES[:-1], "confirm", "change"):
        bob.open(f"/{name}")
        check_accessibility(bob.page)
    bob.get_account("axe@example.com")
    bob.page.get_by_role("heading", name="Access tokens").click()
    check_accessibility(bob.page)
    bob.fill("begin", password=PASSWORD)
    expect(bob.page.locator("#factor-key")).to_be_visible()
    check_accessibility(bob.page)


def check_accessibility(page: Page) -> None:
    """Run axe on the page in two looks. The layout depends on the width only, and the colours on the scheme only.

    All rules run once. Those about colours and sizes run in the second look too.
    """
    options: Any = {"resultTypes": ["violations"]}
    page.evaluate(Axe().axe_script)  # the page's own policy would not allow it
    for width, scheme in LOOKS:
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        violations = [
            f"{rule['impact']}: {rule['id']}: {[node['html'] for node in rule['nodes']]}"
            for rule in page.evaluate("options => axe.run(options)", options)["violations"]
            if rule["impact"] in ("serious", "critical", "moderate")
        ]
        assert violations == [], (page.url, width, scheme)
        options = {**options, "runOnly": ["color-contrast", "target-size", "scrollable-region-focusable"]}


def test_a_status_message_moves_nothing(visit: Visit) -> None:
    bob = visit(viewport={"width": 320, "height": 800})
    bob.open("/login")
    below = bob.page.get_by_role("link", name="Create account")
    before = below.bounding_box()
    bob.fill("login", email="nobody@example.com", password="wrong")
    bob.expect_status("login", "Wrong email or password.")
    assert below.bounding_box() == before


def test_without_javascript_a_page_says_that_it_needs_it(visit: Visit) -> None:
    bob = visit(java_script_enabled=False)
    for name in (*PAGES[:-1], "confirm", "change"):
        bob.open(f"/{name}")
        expect(bob.page.locator("noscript p")).to_contain_text("need JavaScript")
        expect(bob.page.locator("noscript p")).to_be_visible()


def test_an_invited_user_sets_up_a_required_second_factor(browser: Browser, tmp_path: Path) -> None:
    settings = {"AUTHSVC_REGISTRATION": "invitation", "AUTHSVC_REQUIRE_SECOND_FACTOR": "on"}
    with closing(Site("nginx", tmp_path, settings)) as site, Visitor(browser, site) as bob:
        bob.open("/register")
        bob.fill("register", email="bob@example.com", password=PASSWORD)
        bob.expect_status("register", "Registration is by invitation only.")
        link = site.command("invite", "bob@example.com").split()[-1]
        bob.page.goto(link)
        expect(bob.page.locator("#reset-email")).to_have_value("bob@example.com")
        bob.fill("reset", new_password=PASSWORD)
        bob.expect_status("reset", "The password is set. You can sign in now.")
        bob.open(f"{site.app}/page")
        bob.fill("login", email="bob@example.com", password=PASSWORD)
        bob.page.wait_for_url(re.compile(r"/account\?return="))
        expect(bob.page.locator("#who")).to_have_text(
            "This service requires two-factor authentication. Set it up below."
        )
        bob.set_up_two_factor()
        bob.page.get_by_role("link", name="Continue to the application").click()
        bob.expect_url(f"{site.app}/page")


def take_screenshots() -> None:
    """Write a screenshot of each page, light and dark, narrow and wide."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Site("nginx", Path(folder), {"AUTHSVC_SESSIONS_PER_USER": "2"})) as site,
        chromium() as browser,
    ):
        with Visitor(browser, site) as bob:  # each account page shows a second session
            bob.create_account("bob@example.com")
        for scheme in ("light", "dark"):
            for width, look in ((320, "narrow"), (900, "wide")):
                options = {"color_scheme": scheme, "viewport": {"width": width, "height": 560}}
                with Visitor(browser, site, **options) as bob:
                    for name in PAGES:
                        if name == "account":
                            bob.open("/login")
                            bob.sign_in("bob@example.com")
                        bob.open("/reset#token=x&email=bob@example.com" if name == "reset" else f"/{name}")
                        bob.page.wait_for_load_state("networkidle")
                        full = name == "account"
                        bob.page.screenshot(path=SCREENSHOTS / f"{name}-{look}-{scheme}.png", full_page=full)


if __name__ == "__main__":
    take_screenshots()
