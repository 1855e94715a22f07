"""Visitors in Debian's Chromium to a site behind a real nginx with TLS, and fixtures for the tests of the pages.

A test file takes the fixtures with ``pytest_plugins = "tests.browser"``.
"""

from __future__ import annotations

import base64
import contextlib
import email.message
import functools
import hashlib
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import pytest
import trustme
from axe_playwright_python.sync_playwright import Axe
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from playwright.sync_api import Browser, CDPSession, ConsoleMessage, Page, expect, sync_playwright

from auth import _hash_password
from credentials import totp
from storage import DB
from tests.conftest import COST, HERE, Service
from tests.mail_server import SMTP_PASSWORD, MailServer
from tests.proxies import PASSWORD, Reply, Site, certificate, program

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


class CheapService(Service):
    """The service with hashes that take 1 ms, which its settings refuse in production."""

    program = (
        sys.executable,
        "-c",
        f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import authsvc, settings
require = settings.Settings._require
settings.Settings._require = lambda self, met, name, rule: require(self, met or name == "bcrypt_cost", name, rule)
sys.exit(authsvc.main())
""",
    )


class CheapSite(Site):
    """A site behind nginx with such a service."""

    def __init__(self, folder: Path, settings: Mapping[str, str] = {}, *, application_port: int = 0) -> None:
        super().__init__(
            "nginx",
            folder,
            {"AUTHSVC_BCRYPT_COST": str(COST), **settings},
            start=functools.partial(CheapService, folder),
            application_port=application_port,
        )

    def forget_attempts(self) -> None:
        """Forget what counts towards the rate limits."""
        with closing(sqlite3.connect(self.folder / "authsvc.db")) as database, database:
            database.execute("DELETE FROM throttle")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that trusts the certificate of all sites: on a site with an error of TLS it offers no passkeys."""
    path = program("chromium", "chromium")
    key = x509.load_pem_x509_certificate(certificate().cert_chain_pems[0].bytes()).public_key()
    encoded = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    trusted = base64.b64encode(hashlib.sha256(encoded).digest()).decode()
    options = "--host-resolver-rules=MAP *.example.com 127.0.0.1", "--disable-dev-shm-usage"
    expect.set_options(timeout=TIMEOUT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[*options, f"--ignore-certificate-errors-spki-list={trusted}"],
            chromium_sandbox=os.geteuid() != 0,  # Chromium refuses to run as root with its sandbox
        )
        try:
            yield browser
        finally:
            browser.close()


PASSKEY_DEVICE = {
    "protocol": "ctap2",
    "transport": "internal",
    "hasResidentKey": True,
    "hasUserVerification": True,
    "isUserVerified": True,
    "automaticPresenceSimulation": True,
}


class Visitor:
    """A visitor with a browser profile of their own. An error in the console or a policy violation fails the test."""

    devtools: CDPSession | None = None
    device: str

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
        """Fill in a form and send it with the keyboard. On the account page, open its panel before."""
        form = self.page.locator(f"form[data-action={name}]")
        if panel := form.evaluate("form => form.closest('.panel[hidden]')?.id"):
            self.open_panel(panel)
        for field, value in fields.items():
            form.locator(f"[name={field}]").fill(value)
        self.page.keyboard.press("Enter")

    def open_panel(self, name: str) -> None:
        """Open a part of the account page."""
        self.page.locator(f"nav a[href='#{name}']").click()
        expect(self.page.locator(f"#{name}")).to_be_visible()

    def click(self, selector: str) -> None:
        self.page.locator(selector).click()

    def see(self, selector: str) -> None:
        """Wait until an element is visible."""
        expect(self.page.locator(selector).first).to_be_visible()

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        return self.page.evaluate(expression)

    def add_passkey_device(self) -> None:
        """Plug in a device that verifies its user at once."""
        if not self.devtools:
            self.devtools = self.context.new_cdp_session(self.page)
            self.devtools.send("WebAuthn.enable")
        self.device = self.tell("addVirtualAuthenticator", options=PASSKEY_DEVICE)["authenticatorId"]

    def remove_passkey_device(self) -> None:
        self.tell("removeVirtualAuthenticator", authenticatorId=self.device)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Tell the device something (https://chromedevtools.github.io/devtools-protocol/tot/WebAuthn/)."""
        assert self.devtools
        answer: dict[str, Any] = self.devtools.send(f"WebAuthn.{method}", parameters)
        return answer

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
        """Create an account and a session without the forms, which takes less time, and open the account page."""
        add_account(self.site, address)
        self.get_session(address)

    def get_session(self, address: str) -> None:
        """Begin a session without the form, and open the account page."""
        self.keep_session(self.site.sign_in(address), address)

    def keep_session(self, cookie: str, address: str) -> None:
        """Take over the cookie of a session, and open the account page."""
        name, _, value = cookie.partition("=")
        kept: Any = {"name": name, "value": value, "domain": ".example.com", "path": "/", "secure": True}
        self.context.add_cookies([kept])
        self.open("/account")
        expect(self.page.locator("#who")).to_have_text(address)

    def get_factor(self, address: str) -> tuple[str, list[str]]:
        """Begin a session and set up a second factor without the forms; return the seed and the recovery codes."""
        cookie, url = self.site.sign_in(address), f"{self.site.auth}/totp"
        begun = self.site.request("POST", url, {"password": PASSWORD}, cookie=cookie)
        seed = begun.json["secret"]
        confirmed = self.site.request("PUT", url, {"otp": code_of(seed)}, cookie=session_in(begun))
        self.keep_session(session_in(confirmed), address)
        return seed, confirmed.json["recovery_codes"]

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


def session_in(reply: Reply) -> str:
    """Return the cookie of the session that an answer sets, as a browser sends it."""
    return str(reply.headers["Set-Cookie"]).partition(";")[0]


def code_of(seed: str, steps_ahead: int = 0) -> str:
    return totp.code(seed, int(time.time()) // totp.STEP + steps_ahead)


EVERYTHING: dict[str, Any] = {"resultTypes": ["violations"]}  # axe's options
# The rules whose result depends on the width or the colours.
LOOKS = EVERYTHING | {"runOnly": ["color-contrast", "target-size", "scrollable-region-focusable"]}


def check_width(page: Page, state: str = "") -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state


def check_accessibility(page: Page, state: str = "", options: dict[str, Any] = EVERYTHING) -> None:
    """Run axe on the page, and see that it is not wider than the window."""
    check_width(page, state)
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)  # the page's own policy would not allow it
    violations = [
        f"{rule['impact']}: {rule['id']}: {[node['html'] for node in rule['nodes']]}"
        for rule in page.evaluate("options => axe.run(options)", options)["violations"]
        if rule["impact"] in ("serious", "critical", "moderate")
    ]
    assert violations == [], (state, page.url)


AXE_SCRIPT = Axe().axe_script
HASHED = _hash_password(PASSWORD, COST)


def add_account(site: Site, address: str) -> None:
    """Create an account without a request, which no limit of registrations counts."""
    with closing(DB(str(site.folder / "authsvc.db"))) as database:
        database.add_user(address, HASHED)


def next_mail_to(server: MailServer, address: str) -> email.message.EmailMessage:
    while (mail := server.next())["To"] != address:
        pass
    return mail


def link_in_mail_to(server: MailServer, address: str, page: str) -> str:
    (link,) = re.findall(rf"https://\S+/{page}#\S+", next_mail_to(server, address).get_content())
    return str(link)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests, which trusts all sites."""
    with chromium() as shared:
        yield shared


@pytest.fixture(scope="session")
def mail_and_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MailServer, dict[str, str]]]:
    with running_mail_server(tmp_path_factory.mktemp("mail")) as running:
        yield running


@pytest.fixture(scope="session")
def mail(mail_and_settings: tuple[MailServer, dict[str, str]]) -> MailServer:
    return mail_and_settings[0]


@pytest.fixture(scope="session")
def site(
    mail_and_settings: tuple[MailServer, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CheapSite]:
    """One site for all tests; use an email of your own."""
    settings = {"AUTHSVC_SESSIONS_PER_USER": "9", "AUTHSVC_CONFIRM_EMAIL": "off", **mail_and_settings[1]}
    with closing(CheapSite(tmp_path_factory.mktemp("site"), settings)) as shared:
        yield shared


Visit = Callable[..., Visitor]


@pytest.fixture(scope="session")
def shared_visitor(browser: Browser, site: CheapSite) -> Iterator[Visitor]:
    """One browser profile for all tests, as a new one takes a second."""
    with Visitor(browser, site) as shared:
        yield shared


@pytest.fixture
def visit(browser: Browser, site: CheapSite, shared_visitor: Visitor) -> Iterator[Visit]:
    """Start a visit to the site. At the end of the test no visitor may have seen an error.

    The first visitor has the shared profile. Further ones, and those with options, have a new one.
    """
    site.forget_attempts()
    shared_visitor.forget()
    unused = [shared_visitor]
    with contextlib.ExitStack() as stack:

        def begin(*, new_profile: bool = False, **options: Any) -> Visitor:
            if unused and not new_profile and not options:
                return unused.pop()
            return stack.enter_context(Visitor(browser, site, **options))

        yield begin
    assert shared_visitor.errors == []


@pytest.fixture(scope="session")
def confirming_site(
    mail_and_settings: tuple[MailServer, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CheapSite]:
    """A site where emails are confirmed, as in any production with a mail server."""
    settings = {"AUTHSVC_SESSIONS_PER_USER": "9", **mail_and_settings[1]}
    with closing(CheapSite(tmp_path_factory.mktemp("confirming"), settings)) as shared:
        yield shared


LOGO = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 40"><circle cx="20" cy="20" r="20" fill="#063"/></svg>'


@contextlib.contextmanager
def running_club(folder: Path) -> Iterator[CheapSite]:
    """A site with a name and a logo, for invited users, who need a second factor, and without a mail server."""
    (folder / "logo.svg").write_text(LOGO)
    settings = {
        "AUTHSVC_REGISTRATION": "invitation",
        "AUTHSVC_REQUIRE_SECOND_FACTOR": "on",
        "AUTHSVC_SITE_NAME": "Rowing <Club>",
        "AUTHSVC_SITE_LOGO": str(folder / "logo.svg"),
        "AUTHSVC_CONTACT": "Ask Eve, eve@example.com.",
    }
    with closing(CheapSite(folder, settings)) as site:
        yield site


@pytest.fixture(scope="session")
def club(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheapSite]:
    with running_club(tmp_path_factory.mktemp("club")) as site:
        yield site
