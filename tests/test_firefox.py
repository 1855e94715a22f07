"""The flows of the pages in Debian's Firefox, behind a real nginx with TLS.

What the pages say, and where on them something is, is the matter of test_pages.py. Here forms are found by their
``data-action`` and fields by their name, and answers are those of the service.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, NamedTuple

import pytest
from axe_playwright_python.sync_playwright import Axe

from credentials import totp
from tests.browser import NEW_PASSWORD, code_of, next_mail_to
from tests.firefox import STEP, TIMEOUT, Firefox
from tests.mail_server import MailServer
from tests.proxies import PASSWORD, Site

pytest_plugins = "tests.browser"
pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.browser]

PAGES = "login", "register", "forgot", "reset", "logout", "confirm", "change"  # and the account, with its sections
SECTIONS = "return [...document.querySelectorAll('nav a[href^=\"#\"]')].map(link => link.hash)"
STATUS = "form[data-action={}] [role=status]"  # where a form says what became of it
RECOVERY_CODE = r"\b[a-z2-7]{4}(?:-[a-z2-7]{2,4}){6}\b"
AXE_SCRIPT = Axe().axe_script
RUN_AXE = """
const [options, done] = arguments;
axe.run(options).then(found => done(found.violations.map(rule =>
  [rule.impact, rule.id, ...rule.nodes.map(node => node.html)])), error => done([["", String(error)]]));
"""


class Look(NamedTuple):
    """How a guest sees the pages."""

    width: int
    scheme: str
    language: str

    def __str__(self) -> str:
        return "-".join(map(str, self))


LOOKS = Look(320, "light", "en"), Look(320, "dark", "de"), Look(1280, "light", "fr"), Look(1280, "dark", "es")


class Guest:
    """A person who has come to the site in Firefox."""

    def __init__(self, firefox: Firefox, site: Site, look: Look) -> None:
        self.firefox, self.site, self.look = firefox, site, look
        firefox.look(*look)

    def open(self, page: str) -> None:
        """Open a page of the service that stays where it is."""
        self.firefox.open(self.site.auth + page)
        self.check_look()

    def open_section(self, name: str) -> None:
        """Open a section of the account page, as a link to it from elsewhere does."""
        self.firefox.open("about:blank")
        self.open(f"/account#{name}")

    def send(self, action: str, answer: str, /, **fields: str) -> None:
        """Fill in a form and send it; expect this answer of the service, such as "POST /users 200"."""
        form, last = f"form[data-action={action}]", ""
        self.firefox.answers()
        for name, value in fields.items():
            last = f"{form} [name={name}]"
            self.firefox.fill(last, value)
        if last:
            self.firefox.press_enter(last)
        else:
            self.firefox.click(f"{form} button")
        request, deadline, seen = answer[:-3], time.monotonic() + TIMEOUT, list[str]()
        while not seen:
            assert time.monotonic() < deadline, answer
            time.sleep(STEP)
            seen = [one for one in self.firefox.answers() if one.startswith(request)]
        assert seen == [answer]

    def expect_refusal(self, action: str) -> None:
        """Expect that the form says what was wrong."""
        self.firefox.until("!document.querySelector(arguments[0])", f"form[data-action={action}] button:disabled")
        self.firefox.until("document.querySelector(arguments[0]).innerText.trim()", STATUS.format(action))
        self.check_look()

    def expect_page(self, page: str) -> None:
        self.firefox.until("document.URL === arguments[0] && document.readyState === 'complete'", self.site.auth + page)
        self.check_look()

    def expect_account(self, email: str) -> None:
        self.expect_page("/account")
        self.firefox.until("document.body.innerText.includes(arguments[0])", email)
        self.check_look()

    def sign_out(self) -> None:
        self.open("/account")
        self.send("logout", "DELETE /sessions 302")
        self.expect_page("/login")

    def check_look(self) -> None:
        width, scheme, _ = self.look
        script = "const {scrollWidth} = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)');"
        inner, scrolled, dark = self.firefox.run(f"{script} return [innerWidth, scrollWidth, dark.matches]")
        assert (inner, dark) == (width, scheme == "dark")
        assert scrolled <= width

    def expect_no_axe_violation(self, options: dict[str, Any]) -> None:
        if not self.firefox.run("return 'axe' in window"):
            self.firefox.run(AXE_SCRIPT)
        found = self.firefox.call("WebDriver:ExecuteAsyncScript", script=RUN_AXE, args=[options], newSandbox=True)
        assert [rule for rule in found if rule[0] != "minor"] == []


@pytest.fixture(scope="module")
def firefox(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    """One browser for all tests, as it takes some seconds to start."""
    with closing(Firefox(tmp_path_factory.mktemp("firefox"), site.auth)) as shared:
        yield shared


@pytest.fixture(params=LOOKS, ids=str)
def guest(request: pytest.FixtureRequest, firefox: Firefox, site: Site) -> Iterator[Guest]:
    """A guest in each look. At the end no page may have caused an error or violated its policy."""
    firefox.errors()
    yield Guest(firefox, site, request.param)
    firefox.forget()
    assert firefox.errors() == []


def test_an_account_is_created_and_its_user_signs_out_and_in(guest: Guest) -> None:
    email = f"new-{guest.look.language}@example.com"
    guest.open("/register")
    guest.send("register", "POST /users 200", email=email, password=PASSWORD)
    guest.expect_account(email)
    guest.sign_out()
    guest.send("login", "POST /sessions 401", email=email, password="wrong")
    guest.expect_refusal("login")
    guest.send("login", "POST /sessions 200", email=email, password=PASSWORD)
    guest.expect_account(email)


def test_a_forgotten_password_is_reset_by_mail(guest: Guest, site: Site, mail: MailServer) -> None:
    email = f"forgot-{guest.look.language}@example.com"
    site.create_account(email)
    guest.open("/forgot")
    guest.send("forgot", "POST /reset_password 200", email=email)
    message = next_mail_to(mail, email)
    assert message["Content-Language"] == guest.look.language
    (link,) = re.findall(r"https://\S+/reset#\S+", message.get_content())
    guest.firefox.open(link)
    guest.expect_page("/reset")  # the token has been removed from the address bar
    guest.send("reset", "PUT /reset_password 200", new_password=NEW_PASSWORD)
    assert next_mail_to(mail, email)["Content-Language"] == guest.look.language
    guest.open("/login")
    guest.send("login", "POST /sessions 200", email=email, password=NEW_PASSWORD)
    guest.expect_account(email)
    guest.firefox.open(link)
    guest.send("reset", "PUT /reset_password 403", new_password=NEW_PASSWORD)
    guest.expect_refusal("reset")


def test_two_factor_authentication_is_set_up_and_used(guest: Guest, site: Site) -> None:
    email = f"factor-{guest.look.language}@example.com"
    site.create_account(email)
    guest.open("/login")
    guest.send("login", "POST /sessions 200", email=email, password=PASSWORD)
    guest.expect_account(email)
    guest.open_section("two-factor")
    guest.send("begin", "POST /totp 200", password=PASSWORD)
    guest.firefox.until("document.querySelector('form[data-action=confirm] img')?.naturalWidth")
    guest.check_look()
    with closing(sqlite3.connect(site.folder / "authsvc.db")) as database:
        (seed,) = database.execute("SELECT totp_secret FROM users WHERE email = ?", (email,)).fetchone()
    guest.send("confirm", "PUT /totp 200", otp=code_of(seed))
    shown = guest.firefox.until("document.body.innerText.match(new RegExp(arguments[0], 'g'))", RECOVERY_CODE)
    assert len(set(shown)) == totp.RECOVERY_CODES
    guest.check_look()
    guest.sign_out()
    guest.send("login", "POST /sessions 401", email=email, password=PASSWORD)
    guest.firefox.until("document.activeElement.name === 'otp'")
    guest.check_look()
    guest.send("login", "POST /sessions 401", otp="000000")
    guest.expect_refusal("login")
    guest.send("login", "POST /sessions 200", otp=code_of(seed, steps_ahead=1))  # the current one was used to confirm
    guest.expect_account(email)


# The layout depends on the width only, and the colours on the scheme only.
@pytest.mark.parametrize("guest", [LOOKS[0], LOOKS[-1]], indirect=True, ids=str)
def test_axe_finds_no_problem_on_any_page(guest: Guest, site: Site) -> None:
    email = f"axe-{guest.look.language}@example.com"
    site.create_account(email)
    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if guest.look != LOOKS[0]:  # all other rules give the same in each look
        options["runOnly"] = ["color-contrast", "target-size", "scrollable-region-focusable"]
    for page in PAGES:
        guest.open(f"/{page}")
        guest.expect_no_axe_violation(options)
    guest.open("/login")
    guest.send("login", "POST /sessions 200", email=email, password=PASSWORD)
    guest.expect_account(email)
    for section in guest.firefox.run(SECTIONS) or [""]:
        guest.firefox.run("location.hash = arguments[0]", section)
        guest.check_look()
        guest.expect_no_axe_violation(options)


def test_an_error_and_a_violation_of_the_policy_are_noticed(firefox: Firefox, site: Site) -> None:
    firefox.errors()
    firefox.open(f"{site.auth}/login")
    assert firefox.errors() == []
    firefox.run("document.body.setAttribute('onclick', 'nothing()')")
    firefox.run("setTimeout(() => { throw new Error('thrown') })")
    deadline, found = time.monotonic() + TIMEOUT, list[str]()
    while len(found) < 2:
        assert time.monotonic() < deadline, found
        found += firefox.errors()
        time.sleep(STEP)
    assert sorted(error.partition(":")[0] for error in found) == ["Content-Security-Policy", "Error"]
