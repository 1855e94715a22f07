"""Visitors in Debian's Chromium to a site behind a real nginx with TLS, and fixtures for the tests of the pages.

A test file takes the fixtures with ``pytest_plugins = "tests.browser"``.
"""

from __future__ import annotations

import base64
import contextlib
import email.message
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

import pytest
import trustme
from axe_playwright_python.sync_playwright import Axe
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from credentials import totp
from tests.mail_server import SMTP_PASSWORD, MailServer
from tests.proxies import PASSWORD, Site, program

NEW_PASSWORD = "choucroute garnie du lundi"
TIMEOUT = 30_000  # milliseconds; only a machine with too much to do needs more than one second

# Runs before each page: reports violations of its policy, and layout shifts (https://web.dev/articles/cls) past 0.05. A
# shift that follows an act of the user within half a second does not count. On a busy machine answers take longer.
WATCH = """
    addEventListener('securitypolicyviolation', e => console.error('policy: ' + e.violatedDirective));
    let shifted = 0, acted = -Infinity;
    for (const act of ['keydown', 'pointerdown']) addEventListener(act, e => acted = e.timeStamp, true);
    new PerformanceObserver(list => {
        for (const shift of list.getEntries()) {
            if (!shift.hadRecentInput && shift.startTime - acted > 5000) shifted += shift.value;
            if (shifted > 0.05) console.error(`layout shift: ${shifted} ${shift.sources.map(s => s.node?.outerHTML)}`);
        }
    }).observe({type: 'layout-shift', buffered: true});
"""

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


def trusting(*sites: Site) -> str:
    """The option with which Chromium trusts these sites: on a site with an error of TLS it offers no passkeys."""
    return f"--ignore-certificate-errors-spki-list={','.join(map(_key_hash, sites))}"


def _key_hash(site: Site) -> str:
    key = x509.load_pem_x509_certificate((site.folder / "certificate.pem").read_bytes()).public_key()
    encoded = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return base64.b64encode(hashlib.sha256(key.public_bytes(*encoded)).digest()).decode()


class Visitor:
    """A visitor with a browser profile of their own. An error in the console or a policy violation fails the test."""

    def __init__(self, browser: Browser, site: Site, **options: Any) -> None:
        self.site = site
        self.context = browser.new_context(**{"ignore_https_errors": True, "locale": "en-GB", **options})
        self.context.set_default_timeout(TIMEOUT)
        self.context.add_init_script(WATCH)
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
        """Fill in a form and send it, using the keyboard only. On the account page, open its panel before."""
        form = self.page.locator(f"form[data-action={name}]")
        if panel := form.evaluate("form => form.closest('.panel[hidden]')?.id"):
            self.open_panel(panel)
        for field, value in fields.items():
            form.locator(f"[name={field}]").focus()
            self.page.keyboard.type(value)
        self.page.keyboard.press("Enter")

    def open_panel(self, name: str) -> None:
        """Open a part of the account page."""
        self.page.locator(f"nav a[href='#{name}']").click()
        expect(self.page.locator(f"#{name}")).to_be_visible()

    def sign_out(self) -> None:
        self.page.get_by_role("button", name="Sign out", exact=True).click()

    def expect_rule(self, name: str, text: str | re.Pattern[str]) -> None:
        """Expect this text under the field for a new password."""
        field = self.page.locator(f"form[data-action={name}] [autocomplete=new-password]")
        expect(field).to_have_accessible_description(text)

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

    def set_up_two_factor(self, password: str = PASSWORD, *, saved: bool = True) -> tuple[str, list[str]]:
        """Return the seed and the recovery codes. ``saved``: close the list of the recovery codes."""
        self.fill("begin", password=password)
        key = self.page.locator("#factor-key")
        expect(key).to_be_visible()
        seed = key.inner_text().replace(" ", "")
        self.fill("confirm", otp=code_of(seed))
        codes = self.page.locator("#codes code")
        expect(codes).to_have_count(10)
        found = codes.all_inner_texts()
        if saved:
            self.page.get_by_role("button", name="I have saved the recovery codes").click()
            expect(codes).to_have_count(0)
        return seed, found

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


def check_accessibility(page: Page, state: str = "") -> None:
    """Run axe on the page, and see that it is not wider than the window."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state
    if not page.evaluate("'axe' in window"):
        page.evaluate(Axe().axe_script)  # the page's own policy would not allow it
    violations = [
        f"{rule['impact']}: {rule['id']}: {[node['html'] for node in rule['nodes']]}"
        for rule in page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        if rule["impact"] in ("serious", "critical", "moderate")
    ]
    assert violations == [], (state, page.url)


def invite(site: Site, address: str) -> None:
    """Create an account by an invitation, which no limit of registrations counts."""
    fragment = parse_qs(urlsplit(site.command("invite", address).split()[-1]).fragment)
    form = {"email": address, "reset_token": fragment["token"][0], "new_password": PASSWORD}
    assert site.request("PUT", f"{site.auth}/reset_password", form).status == 200


def next_mail_to(server: MailServer, address: str) -> email.message.EmailMessage:
    while (mail := server.next())["To"] != address:
        pass
    return mail


def link_in_mail_to(server: MailServer, address: str, page: str) -> str:
    (link,) = re.findall(rf"https://\S+/{page}#\S+", next_mail_to(server, address).get_content())
    return str(link)


@pytest.fixture(scope="module")
def browser(site: Site) -> Iterator[Browser]:
    with chromium(trusting(site)) as shared:
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


@pytest.fixture(scope="module")
def confirming_site(
    mail_and_settings: tuple[MailServer, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site where emails are confirmed, as in any production with a mail server."""
    settings = {"AUTHSVC_SESSIONS_PER_USER": "9", **mail_and_settings[1]}
    with closing(Site("nginx", tmp_path_factory.mktemp("confirming"), settings)) as shared:
        yield shared
