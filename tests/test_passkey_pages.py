"""Passkeys in a real Chromium, with its virtual authenticator, behind a real nginx with TLS."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from playwright.sync_api import Browser, expect

from tests.browser import CheapSite, Visitor, add_account, check_accessibility, code_of
from tests.crowd import awaited
from tests.proxies import PASSWORD

pytest_plugins = "tests.browser"
pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.browser]

CREATED = "Passkey created. All other sessions have been signed out."
CANCELLED = "That was cancelled or took too long. Nothing has changed."
NOT_ACCEPTED = "This passkey was not accepted. It may have been deleted here. Try again, or use your password."


class Owner(Visitor):
    """A visitor with a device that makes passkeys."""

    def __init__(self, browser: Browser, site: CheapSite, email: str, *, init_script: str = "") -> None:
        super().__init__(browser, site)
        self.email = email
        if init_script:
            self.context.add_init_script(init_script)
        self.add_passkey_device()
        add_account(site, email)

    def tell_device(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.tell(method, authenticatorId=self.device, **parameters)

    def sign_in_by_password(self) -> None:
        self.get_session(self.email)

    def open_passkeys(self) -> None:
        self.open_panel("passkeys")

    def create(self, name: str, refusal: str = "") -> None:
        """Create a passkey on the account page."""
        for field in ("passkey-name", "passkey-password"):
            self.page.locator(f"#{field}").fill("")
        self.fill("enroll", name=name, password=PASSWORD)
        self.expect_status("enroll", refusal)
        self.expect_done("" if refusal else CREATED)

    def expect_done(self, text: str) -> None:
        expect(self.page.locator("#passkeys > [role=status]")).to_have_text(text)

    def enable_device(self) -> None:
        """Let the device answer again, but not the question that the field has open: that is withdrawn."""
        expect(self.page.get_by_role("button", name="Sign in with a passkey")).to_be_visible()
        self.expect("!!asked.controller")
        self.page.evaluate("asked.controller.abort()")
        self.tell_device("setAutomaticPresenceSimulation", enabled=True)

    def expect(self, condition: str) -> None:
        """Wait for a condition in the page. Playwright's own waiting evaluates text there, which the policy forbids."""
        assert awaited(lambda: self.page.evaluate(condition), 10), condition

    def expect_questions(self, times: int) -> None:
        """Expect that the page has asked the service for so many challenges."""
        # What the page has sent until now is noted before this request is answered.
        self.page.evaluate("fetch('/login', {method: 'HEAD'}).then(() => null)")
        assert self.requests.count(f"{self.site.auth}/sessions/passkey/options") == times

    def press_passkey_button(self) -> None:
        self.enable_device()
        self.page.get_by_role("button", name="Sign in with a passkey").click()

    def expect_listed(self, *names: str) -> None:
        expect(self.page.locator("#passkey-list li strong")).to_have_text(names)


Begin = Callable[..., Owner]


@pytest.fixture
def begin(browser: Browser, site: CheapSite) -> Iterator[Begin]:
    """Start the visit of an owner; at the end nobody may have seen an error."""
    site.forget_attempts()
    started: list[Owner] = []

    def one(email: str, **options: Any) -> Owner:
        started.append(Owner(browser, site, email, **options))
        return started[-1]

    yield one
    for owner in started:
        owner.context.close()
        assert owner.errors == []


def test_a_passkey_is_created_and_signs_in_by_the_field_and_by_the_button(begin: Begin) -> None:
    bob = begin("bob@example.com")
    bob.sign_in_by_password()
    expect(bob.page.locator("#offer")).to_be_visible()
    bob.page.get_by_role("button", name="Create a passkey").click()
    expect(bob.page.locator("#passkey-name")).to_be_focused()
    bob.create("<b>laptop</b>")
    bob.expect_listed("<b>laptop</b>")
    expect(bob.page.locator("#offer")).to_be_hidden()
    check_accessibility(bob.page)
    bob.tell_device("setAutomaticPresenceSimulation", enabled=False)
    bob.sign_out()
    bob.expect_url("/login")
    bob.expect("!!asked.controller")
    check_accessibility(bob.page)
    bob.expect_url("/login")  # nothing happens while nobody touches the device
    bob.enable_device()
    bob.page.reload(wait_until="commit")  # the field asks again, and the device answers
    bob.expect_url("/account")
    bob.tell_device("setAutomaticPresenceSimulation", enabled=False)
    bob.sign_out()
    bob.expect_url("/login")
    bob.press_passkey_button()
    bob.expect_url("/account")


def test_a_second_device_and_the_same_one_twice(begin: Begin) -> None:
    bob = begin("second@example.com")
    bob.sign_in_by_password()
    bob.open_passkeys()
    bob.create("laptop")
    bob.create("again", "This device already has a passkey for your account.")
    bob.remove_passkey_device()
    bob.add_passkey_device()
    bob.create("phone")
    bob.expect_listed("laptop", "phone")


def test_a_deleted_passkey_signs_nobody_in(begin: Begin) -> None:
    bob = begin("deleted@example.com")
    bob.sign_in_by_password()
    bob.open_passkeys()
    bob.create("laptop")
    bob.page.get_by_role("button", name="Delete laptop").click()
    expect(bob.page.locator("#discard-password")).to_be_focused()
    bob.page.keyboard.type("wrong")
    bob.page.keyboard.press("Enter")
    bob.expect_status("discard", "Wrong password.")
    bob.page.locator("#discard-password").fill(PASSWORD)
    bob.page.keyboard.press("Enter")
    bob.expect_done("Passkey deleted. All other sessions have been signed out.")
    bob.expect_listed()
    bob.sign_out()
    bob.expect_url("/login")
    bob.page.get_by_role("button", name="Sign in with a passkey").click()
    bob.expect_status("passkey", NOT_ACCEPTED)


def test_who_cannot_or_does_not_want_to_show_a_fingerprint_gets_a_friendly_word(begin: Begin) -> None:
    bob = begin("cancel@example.com")
    bob.sign_in_by_password()
    bob.open_passkeys()
    bob.tell_device("setUserVerified", isUserVerified=False)
    bob.create("laptop", CANCELLED)
    bob.tell_device("setUserVerified", isUserVerified=True)
    bob.create("laptop")
    bob.tell_device("setUserVerified", isUserVerified=False)
    bob.sign_out()
    bob.expect_url("/login")
    bob.page.get_by_role("button", name="Sign in with a passkey").click()
    bob.expect_status("passkey", CANCELLED)
    bob.tell_device("setUserVerified", isUserVerified=True)
    bob.page.get_by_role("button", name="Sign in with a passkey").click()
    bob.expect_url("/account")


def test_a_device_with_another_key_is_refused(begin: Begin) -> None:
    bob = begin("forged@example.com")
    bob.sign_in_by_password()
    bob.open_passkeys()
    bob.create("laptop")
    (credential,) = bob.tell_device("getCredentials")["credentials"]
    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    bob.tell_device("clearCredentials")
    bob.tell_device("addCredential", credential=credential | {"privateKey": base64.b64encode(key).decode()})
    bob.tell_device("setAutomaticPresenceSimulation", enabled=False)
    bob.sign_out()
    bob.expect_url("/login")
    bob.press_passkey_button()
    bob.expect_status("passkey", NOT_ACCEPTED)
    bob.sign_in(bob.email)  # the password still works


def test_the_code_is_asked_for_where_the_service_does(begin: Begin) -> None:
    bob = begin("code@example.com")
    seed, codes = bob.get_factor(bob.email)
    bob.context.clear_cookies()
    bob.open("/login")
    bob.fill("login", email=bob.email, password=PASSWORD)
    bob.page.locator("#login-otp").fill(code_of(seed, steps_ahead=1))
    bob.page.keyboard.press("Enter")
    bob.expect_url("/account")
    bob.open_passkeys()
    bob.create("laptop")
    bob.sign_out()
    bob.expect_url("/account")  # by the passkey, without a code
    assert codes


# Runs before the page: counts how often the browser is asked, and lets it refuse at once.
REFUSING = """
    window.questions = 0;
    navigator.credentials.get = async () => { window.questions += 1; throw new DOMException("no", "%s"); };
"""


def test_a_browser_that_refuses_at_once_is_not_asked_again(begin: Begin) -> None:
    bob = begin("refusing@example.com", init_script=REFUSING % "NotAllowedError")
    bob.open("/login")
    bob.expect("window.questions === 1")
    bob.expect_questions(1)
    assert bob.page.evaluate("window.questions") == 1
    bob.expect_status("passkey", "")
    bob.page.get_by_role("button", name="Sign in with a passkey").click()
    bob.expect_status("passkey", CANCELLED)


def test_an_unknown_error_of_the_browser_is_named(begin: Begin) -> None:
    bob = begin("unknown@example.com", init_script=REFUSING % "ConstraintError")
    bob.open("/login")
    bob.page.get_by_role("button", name="Sign in with a passkey").click()
    bob.expect_status("passkey", "The browser could not use a passkey (ConstraintError).")


def test_a_browser_without_passkeys_is_offered_none(begin: Begin) -> None:
    bob = begin("none@example.com", init_script="delete window.PublicKeyCredential")
    bob.sign_in_by_password()
    for hidden in ("#offer", "#passkeys"):
        expect(bob.page.locator(hidden)).to_be_hidden()
    bob.sign_out()
    bob.expect_url("/login")
    expect(bob.page.get_by_role("button", name="Sign in with a passkey")).to_be_hidden()
    assert not [url for url in bob.requests if "passkey" in url]


def test_the_offer_is_dismissed_for_good(begin: Begin) -> None:
    bob = begin("dismiss@example.com")
    bob.sign_in_by_password()
    bob.page.get_by_role("button", name="Do not ask again").click()
    expect(bob.page.locator("#offer")).to_be_hidden()
    bob.page.reload()
    expect(bob.page.locator("#who")).to_have_text(bob.email)
    expect(bob.page.locator("#offer")).to_be_hidden()
    bob.open_passkeys()
    expect(bob.page.get_by_role("button", name="Create a passkey")).to_be_visible()


def test_the_challenge_is_renewed_before_it_expires(begin: Begin) -> None:
    bob = begin("renew@example.com")
    bob.page.clock.install()
    bob.tell_device("setAutomaticPresenceSimulation", enabled=False)
    bob.open("/login")
    expect(bob.page.get_by_role("button", name="Sign in with a passkey")).to_be_visible()
    for seconds, times in [(0, 1), (239, 1), (2, 2)]:
        bob.page.clock.run_for(seconds * 1000)
        bob.expect_questions(times)


def test_a_passkey_is_the_second_factor_that_a_service_requires(browser: Browser, club: CheapSite) -> None:
    with Owner(browser, club, "strict@example.com") as bob:
        bob.open("/login")
        bob.fill("login", email=bob.email, password=PASSWORD)
        text = "This service requires two-factor authentication. Set it up below."
        expect(bob.page.locator("#who")).to_have_text(text)
        bob.open_passkeys()
        bob.create("laptop")
        expect(bob.page.locator("#who")).to_have_text(bob.email)
        bob.tell_device("setAutomaticPresenceSimulation", enabled=False)
        bob.sign_out()
        bob.expect_url("/login")
        with bob.page.expect_event("load"):  # of this page again: the password is no longer enough
            bob.fill("login", email=bob.email, password=PASSWORD)
        bob.expect_url("/login")
        bob.press_passkey_button()
        bob.expect_url("/account")
