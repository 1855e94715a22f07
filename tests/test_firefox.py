"""The flows of the pages in Debian's Firefox, behind a real nginx with TLS.

What the pages say, and where on them something is, is the matter of test_pages.py. Here forms are found by their
``data-action`` and fields by their name, and answers are those of the service.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from credentials import totp
from tests import page_states
from tests.browser import LOOKS, NEW_PASSWORD, CheapSite, add_account, code_of, next_mail_to
from tests.firefox import STEP, TIMEOUT, Firefox, Guest, Look
from tests.mail_server import MailServer
from tests.proxies import PASSWORD

pytest_plugins = ["tests.browser", "tests.firefox"]
pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.browser]

PAGES = "login", "register", "forgot", "reset", "logout", "confirm", "change"  # and the account, with its sections
SECTIONS = "return [...document.querySelectorAll('nav a[href^=\"#\"]')].map(link => link.hash)"
RECOVERY_CODE = r"\b[a-z2-7]{4}(?:-[a-z2-7]{2,4}){6}\b"
# Each flow has one of them, and each pair of a width and a scheme occurs. tests/long/test_all_pages.py has all.
ENGLISH, GERMAN = Look(320, "light", "en"), Look(320, "dark", "de")
FRENCH, SPANISH = Look(1280, "light", "fr"), Look(1280, "dark", "es")

Come = Callable[..., Guest]


@pytest.fixture
def come(firefox: Firefox, site: CheapSite) -> Iterator[Come]:
    """Have a guest come with a look. At the end no page may have caused an error or violated its policy."""
    firefox.errors()
    yield lambda look, to=site: Guest(firefox, to, look)
    firefox.forget()
    assert firefox.errors() == []


def test_an_account_is_created_used_in_every_way_and_deleted(come: Come, mail: MailServer) -> None:
    guest = come(SPANISH)
    for _ in page_states.walk_through_an_account(guest, "firefox@example.com", mail):
        guest.check_look()


def test_an_account_is_created_with_a_mailed_link(come: Come, confirming_site: CheapSite, mail: MailServer) -> None:
    guest = come(ENGLISH, confirming_site)
    for _ in page_states.walk_through_a_confirmation(guest, "confirmed@example.com", mail):
        guest.check_look()


def test_a_forgotten_password_is_reset_by_mail(come: Come, site: CheapSite, mail: MailServer) -> None:
    guest, email = come(FRENCH), "fox-forgot@example.com"
    add_account(site, email)
    guest.open("/forgot")
    guest.send("forgot", "POST /reset_password 200", email=email)
    message = next_mail_to(mail, email)
    assert message["Content-Language"] == guest.look.language
    (link,) = re.findall(r"https://\S+/reset#\S+", message.get_content())
    guest.firefox.open(link)
    guest.expect_url("/reset")  # the token has been removed from the address bar
    guest.send("reset", "PUT /reset_password 200", new_password=NEW_PASSWORD)
    assert next_mail_to(mail, email)["Content-Language"] == guest.look.language
    guest.open("/login")
    guest.send("login", "POST /sessions 200", email=email, password=NEW_PASSWORD)
    guest.expect_account(email)
    guest.firefox.open(link)
    guest.send("reset", "PUT /reset_password 403", new_password=NEW_PASSWORD)
    guest.expect_refusal("reset")


def test_two_factor_authentication_is_set_up_and_used(come: Come, site: CheapSite) -> None:
    guest, email = come(GERMAN), "fox-factor@example.com"
    add_account(site, email)
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


# All other rules give the same as in Chromium. tests/long/test_all_pages.py has them, the other looks and all states.
def test_axe_finds_no_problem_on_any_page(come: Come, site: CheapSite) -> None:
    add_account(site, "axe@example.com")
    guest = come(ENGLISH)
    for page in PAGES:
        guest.open(f"/{page}")
        guest.expect_no_axe_violation(LOOKS)
    guest.open("/login")
    guest.send("login", "POST /sessions 200", email="axe@example.com", password=PASSWORD)
    guest.expect_account("axe@example.com")
    for section in guest.firefox.run(SECTIONS):
        guest.firefox.run("location.hash = arguments[0]", section)
        guest.check_look()
        guest.expect_no_axe_violation(LOOKS)


def test_an_error_and_a_violation_of_the_policy_are_noticed(firefox: Firefox, site: CheapSite) -> None:
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
