"""The states of the pages, for the tests in Chromium and in Firefox and for the screenshots.

Each function leads a person through states and yields the name of each. It works in every language: nothing is found by
its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from tests.browser import NEW_PASSWORD, add_account, code_of, link_in_mail_to
from tests.mail_server import MailServer
from tests.proxies import PASSWORD, Site

FIREFOX = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:140.0) Gecko/20100101 Firefox/140.0"
WEAK = "qwertyuiopasdfghj"
# Uses up the attempts that a session has to enter the password.
TOO_MANY = """(async () => {
    for (const _ of Array(10)) await fetch("/profile", {method: "DELETE", body: new URLSearchParams({password: "x"})});
})()"""


class Person(Protocol):
    """A person with a browser, at a site."""

    site: Site

    def open(self, address: str) -> object:
        """Open a page that stays where it is."""

    def fill(self, name: str, /, **fields: str) -> None:
        """Fill in a form and send it. On the account page, open its panel before."""

    def open_panel(self, name: str) -> None:
        """Open a part of the account page."""

    def click(self, selector: str) -> None: ...

    def see(self, selector: str) -> None:
        """Wait until an element is visible."""

    def expect_url(self, address: str) -> None: ...

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page."""

    def add_passkey_device(self) -> None: ...

    def remove_passkey_device(self) -> None: ...


def walk(bob: Person, address: str) -> Iterator[str]:
    """Lead a person with an account of this email through the pages."""
    bob.open("/login")
    yield "login"
    bob.fill("login", email=address, password="wrong")
    bob.see("#login .error")
    yield "login-refused"
    bob.open("/register")
    yield "register"
    bob.fill("register", email=f"new-{address}", password=WEAK)
    bob.see("#register .error")
    yield "register-refused"
    bob.open("/forgot")
    yield "forgot"
    bob.fill("forgot", email=f"nobody-{address}")
    bob.see("#forgot .done")
    yield "forgot-sent"
    bob.open(f"/reset#token=x&email={address}")
    yield "reset"
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.see("#reset .error")
    yield "reset-refused"
    bob.open(f"/confirm#token=x&email={address}")
    yield "confirm"
    bob.open(f"/change#token=x&email={address}")
    bob.see("#change .error")
    yield "change-refused"
    bob.open("/logout")
    yield "logout"
    form = {"email": address, "password": PASSWORD}
    bob.site.request("POST", f"{bob.site.auth}/sessions", form, headers={"User-Agent": FIREFOX})
    bob.open("/login")
    bob.fill("login", email=address, password=PASSWORD)
    bob.see("#session-list li:nth-child(2)")
    yield "account"
    bob.open_panel("password")
    yield "password"
    bob.open_panel("two-factor")
    yield "two-factor"
    bob.fill("begin", password=PASSWORD)
    bob.see("#factor-key:not(:empty)")
    yield "two-factor-setup"
    seed = bob.run("document.querySelector('#factor-key').textContent").replace(" ", "")
    bob.fill("confirm", otp=code_of(seed))
    bob.see("#codes li:nth-child(10)")
    bob.see("form[data-action=confirm][hidden] ~ #recovery")
    yield "recovery-codes"
    bob.click("#saved")
    bob.see("form[data-action=off]")
    yield "two-factor-on"
    bob.add_passkey_device()
    bob.open_panel("passkeys")
    bob.fill("enroll", name="laptop", password=PASSWORD)
    bob.see("#passkey-list li")
    yield "passkeys"
    bob.remove_passkey_device()
    bob.open_panel("tokens")
    bob.fill("token", name="git", password=PASSWORD)
    bob.see("#token-secret")
    yield "tokens"
    bob.open_panel("email")
    yield "email"
    bob.open_panel("delete")
    bob.run(TOO_MANY)
    bob.fill("delete", password="wrong")
    bob.see("#delete .error")
    yield "too-many"
    bob.click("[data-action=logout] button")
    bob.expect_url("/login")
    bob.fill("login", email=address, password=PASSWORD)
    bob.see("#login .code:not([hidden])")
    bob.see("#login [role=status]:not(.error, :empty)")  # to be asked for the code is no error
    yield "code"


def walk_through_refusals(bob: Person, address: str) -> Iterator[str]:
    """Lead a person without an account through what pages refuse, apart from ``walk``."""
    for page in ("reset", "confirm", "change"):
        bob.open(f"/{page}")
        bob.see(f"#{page} .error")
        yield f"{page}-incomplete"
    bob.open(f"/confirm#token=x&email={address}")
    bob.fill("create", password=NEW_PASSWORD)
    bob.see("#confirm .error")
    yield "confirm-refused"
    bob.open("/logout")
    bob.click("#logout button")
    bob.see("#logout .error")
    yield "logout-refused"


def walk_through_an_account(bob: Person, address: str, mail: MailServer) -> Iterator[str]:
    """Lead a person through an account from its creation to its deletion, and through what its forms say at the end."""
    bob.open("/register")
    bob.fill("register", email=address, password=PASSWORD)
    bob.expect_url("/account")
    bob.see("#session-list li")
    yield "new-account"
    bob.fill("password", password=PASSWORD, new_password=WEAK)
    bob.see("#password .error")
    yield "password-refused"
    bob.open("/logout")
    bob.click("#logout button")
    bob.expect_url("/login")
    bob.fill("login", email=address, password="wrong")
    bob.see("#login .error")
    bob.open("/forgot")
    bob.fill("forgot", email=address)
    bob.see("#forgot .done")
    bob.open(link_in_mail_to(mail, address, "reset"))
    bob.fill("reset", new_password=WEAK)
    bob.see("#reset .error")
    yield "reset-weak"
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.see("#reset .done")
    yield "reset-done"
    bob.click("#reset .button")
    bob.expect_url("/login")  # without the email, once it is in its field
    yield "login-after-reset"
    bob.fill("login", password=NEW_PASSWORD)
    bob.expect_url("/account")
    bob.see("#session-list li")
    bob.fill("password", password=NEW_PASSWORD, new_password=PASSWORD)
    bob.see("#password .done")
    yield "password-changed"
    bob.click("nav a[href='#sessions']")
    bob.click("[data-action=others] button")
    bob.see("#sessions .done")
    yield "others-ended"
    bob.fill("token", name="git", password=PASSWORD)
    bob.see("#token-secret:not(:empty)")
    bob.click("#done")
    bob.see("#tokens:has(#new-token[hidden])")
    yield "tokens-listed"
    bob.click("#token-list button")
    bob.see("#token-list .danger")
    yield "token-question"
    bob.click("#token-list .danger")
    bob.see("#tokens:has(#token-list:empty)")
    yield "token-deleted"
    bob.add_passkey_device()
    bob.fill("enroll", name="laptop", password=PASSWORD)
    bob.see("#passkey-list li")
    bob.click("#passkey-list button")
    bob.see("form[data-action=discard]")
    yield "passkey-question"
    bob.fill("discard", password="wrong")
    bob.see("form[data-action=discard] .error")
    yield "passkey-kept"
    bob.fill("discard", password=PASSWORD)
    bob.see("#passkeys > .done")
    yield "passkey-deleted"
    bob.remove_passkey_device()
    bob.fill("email", new_email=f"new-{address}", password=PASSWORD)
    bob.see("#email .done")
    yield "email-mailed"
    link = link_in_mail_to(mail, f"new-{address}", "change")
    bob.open(link)
    bob.see("#change form button")
    assert bob.run("document.querySelector('#change-email').value") == f"new-{address}"
    yield "change"
    bob.click("#change form button")
    bob.see("#change .done")
    yield "change-done"
    bob.click("#change .button")
    bob.see("#session-list li")
    bob.fill("delete", password="wrong")
    bob.see("#delete .error")
    yield "delete-refused"
    bob.fill("delete", password=PASSWORD)
    bob.see("#login .done")
    yield "account-deleted"


def walk_through_a_confirmation(bob: Person, address: str, mail: MailServer) -> Iterator[str]:
    """Lead a person to an account at a site where emails are confirmed."""
    bob.open("/register")
    yield "register-by-mail"
    bob.fill("register", email=address)
    bob.see("#register .done")
    yield "register-mailed"
    link = link_in_mail_to(mail, address, "confirm")
    bob.open(link)
    bob.fill("create", password=WEAK)
    bob.see("#confirm .error")
    yield "confirm-weak"
    bob.fill("create", password=PASSWORD)
    bob.see("#confirm .done")
    yield "confirm-done"
    bob.click("#confirm .button")
    bob.expect_url("/login")  # without the email, once it is in its field
    bob.fill("login", password=PASSWORD)
    bob.expect_url("/account")
    bob.see("#session-list li")


def walk_through_a_club(bob: Person, address: str) -> Iterator[str]:
    """Lead a person through a site for invited users, who need a second factor, without a mail server."""
    for page, state in (("register", "invitation-only"), ("forgot", "without-mail"), ("login", "with-logo")):
        bob.open(f"/{page}")
        yield state
    add_account(bob.site, address)
    bob.open(f"/login?return={bob.site.app}/page")
    bob.fill("login", email=address, password=PASSWORD)
    bob.see("#account #two-factor")
    bob.see("#who:not(:empty)")
    yield "second-factor-required"
    bob.fill("begin", password=PASSWORD)
    bob.see("#factor-key:not(:empty)")
    seed = bob.run("document.querySelector('#factor-key').textContent").replace(" ", "")
    bob.fill("confirm", otp="000000")
    bob.see("form[data-action=confirm] .error")
    yield "confirm-code-refused"
    bob.fill("confirm", otp=code_of(seed))
    bob.see("form[data-action=confirm][hidden] ~ #recovery")
    bob.see("#onward:not(.waiting)")
    yield "onward"
    bob.click("#saved")
    bob.open_panel("email")
    yield "email-without-mail"
    bob.open_panel("passkeys")
    yield "passkeys-empty"
    bob.click("[data-action=logout] button")
    bob.expect_url("/login")
    bob.fill("login", email=address, password=PASSWORD)
    bob.see("#login .code:not([hidden])")
    bob.fill("login", otp="000000")
    bob.see("#login .error")
    yield "code-refused"


def walk_through_a_closed_site(bob: Person) -> Iterator[str]:
    """Lead a person through a site at which no account can be created."""
    for page in ("register", "login"):
        bob.open(f"/{page}")
        yield f"{page}-closed"
