"""The pages in a real Chromium, behind a real nginx with TLS; ``python -m tests.test_pages`` takes the screenshots."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import pytest
import requests
from playwright.sync_api import Browser, Dialog, Page, Request, expect

from tests import page_states
from tests.browser import (
    EVERYTHING,
    LOOKS,
    NEW_PASSWORD,
    CheapSite,
    Visit,
    Visitor,
    add_account,
    check_accessibility,
    check_width,
    chromium,
    code_of,
    link_in_mail_to,
    next_mail_to,
    running_club,
    running_mail_server,
)
from tests.conftest import HERE, Service
from tests.crowd import awaited
from tests.mail_server import MailServer
from tests.page_states import FIREFOX
from tests.proxies import AUTH, PASSWORD, accepts, program, reserve_port

pytest_plugins = "tests.browser"
pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.browser]

INCOMPLETE = "This link is incomplete. Open it again from the mail, or request a new one."
MAILED = "If an account exists for forgot@example.com, a reset link is on its way. Look in your spam folder, too."
USED = "This link has been used or has expired."
ELSEWHERE = (
    "Open the link in the browser where you asked for it. If you signed out there, sign in and ask for a new one."
)
PAGES = "login", "register", "forgot", "reset", "logout", "account"
SCREENSHOTS = HERE / "docs" / "screenshots"


class SilentFiles(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, without a log."""

    def log_message(self, *args: Any) -> None:
        pass


def test_a_new_account_is_signed_in(visit: Visit) -> None:
    bob = visit()
    bob.create_account("first@example.com")
    assert bob.page.title() == "Your account – auth.example.com"
    expect(bob.page.locator("#session-list li")).to_have_count(1)
    cookie = next(cookie for cookie in bob.context.cookies() if cookie["name"] == "__Secure-session_id")
    assert (cookie["httpOnly"], cookie["secure"], cookie["sameSite"]) == (True, True, "Lax")


def test_sign_in_returns_to_the_application(visit: Visit, site: CheapSite) -> None:
    add_account(site, "back@example.com")
    bob = visit()
    target = f"{site.app}/some/where?a=b&c=%2F"
    bob.open(target)
    assert bob.page.url.startswith(f"{site.auth}/login?return=")
    bob.sign_in("back@example.com", target=target)
    assert json.loads(bob.page.inner_text("body"))["headers"]["remote-user"] == ["back@example.com"]
    bob.open_redirecting(f"/login?return={target}", target)  # a signed-in user is sent on at once


def test_a_return_address_is_found_in_every_spelling(visit: Visit, site: CheapSite) -> None:
    bob = visit()
    bob.get_account("spelled@example.com")
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


def test_a_visitor_stays_signed_in_only_if_they_ask_for_it(visit: Visit, site: CheapSite) -> None:
    add_account(site, "stay@example.com")
    bob = visit()

    def expires() -> bool:
        (cookie,) = [one for one in bob.context.cookies() if one["name"] == "__Secure-session_id"]
        return cookie["expires"] > time.time() + 2_500_000

    bob.open("/login")
    bob.sign_in("stay@example.com")
    assert not expires()
    bob.sign_out()
    bob.expect_url("/login")
    bob.page.get_by_label("Keep me signed in").check()
    bob.sign_in("stay@example.com")
    assert expires()


def test_the_sign_out_page_forgets_the_browser(visit: Visit, site: CheapSite) -> None:
    add_account(site, "leave@example.com")
    bob = visit()
    bob.open("/login")
    bob.sign_in("leave@example.com")

    def cookies() -> set[str]:
        return {cookie["name"] for cookie in bob.context.cookies()} - {"__Host-challenge"}  # for five minutes

    assert len(cookies()) == 2
    for choice, left in (False, {"__Host-device"}), (True, set()):
        bob.open("/logout")
        bob.page.get_by_label("Forget this browser").set_checked(choice)
        bob.sign_out()
        bob.expect_url("/login")
        assert cookies() == left
    bob.open("/logout")
    bob.sign_out()
    bob.expect_status("leave", "You are not signed in.")
    bob.open("/login")
    bob.sign_in("leave@example.com")
    bob.page.get_by_role("link", name="Sign out and forget this browser").click()
    expect(bob.page.get_by_label("Forget this browser")).to_be_checked()


def test_the_usual_address_to_change_a_password_leads_to_the_account(visit: Visit) -> None:
    bob = visit()
    bob.open("/.well-known/change-password")
    bob.expect_url("/login")  # where the account page leads a visitor without a session
    assert f"{bob.site.auth}/account" in bob.requests


def test_a_change_asks_for_the_code_where_the_service_does(visit: Visit, site: CheapSite) -> None:
    add_account(site, "ask@example.com")
    bob = visit()
    _, codes = bob.get_factor("ask@example.com")
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


def test_registration_returns_to_the_application(visit: Visit, site: CheapSite) -> None:
    bob = visit()
    bob.open(f"{site.app}/new")
    bob.page.get_by_role("link", name="Create account").click()
    bob.fill("register", email="new@example.com", password=PASSWORD)
    bob.expect_url(f"{site.app}/new")


def test_refusals_are_shown(visit: Visit, site: CheapSite) -> None:
    add_account(site, "refused@example.com")
    bob = visit()
    bob.open("/login")
    bob.fill("login", email="refused@example.com", password="wrong")
    bob.expect_status("login", "Wrong email or password.")
    expect(bob.page.locator("[aria-invalid=true]:visible")).to_have_count(2)
    bob.open("/register")
    bob.fill("register", email="refused@example.com", password=PASSWORD)
    bob.expect_status("register", "An account with this email already exists.")
    expect(bob.page.locator("[aria-invalid=true]")).to_have_attribute("id", "register-email")
    for field in ("#register-email", "#register-password"):
        bob.page.locator(field).fill("")
    bob.expect_rule("register", re.compile("At least 15 characters"))
    before = len(bob.requests)
    bob.fill("register", email="other@example.com", password="short")
    assert bob.page.locator("#register-password").evaluate("field => field.validity.tooShort")
    assert len(bob.requests) == before  # the browser says so itself, and nothing is sent
    bob.page.keyboard.type("short" * 3)
    bob.page.keyboard.press("Enter")
    refusal = "This password is too easy to guess: it is a common one, perhaps repeated or followed by digits."
    bob.expect_status("register", refusal)
    bob.expect_rule("register", re.compile(f"{re.escape(refusal)} At least 15 characters"))
    expect(bob.page.locator("#register .rule")).to_be_visible()
    expect(bob.page.locator("#register-password")).to_be_focused()


def test_two_factor_authentication_is_set_up_used_and_turned_off(visit: Visit) -> None:
    bob = visit()
    bob.get_account("factor@example.com")
    seed, codes = bob.set_up_two_factor()
    bob.sign_out()
    bob.expect_url("/login")
    bob.fill("login", email="factor@example.com", password=PASSWORD)
    bob.expect_status("login", "Enter the code from your authenticator app.")
    expect(bob.page.locator("#login-otp")).to_be_focused()
    bob.expect_heading("Enter your code")
    expect(bob.page.locator("#login :is(a, input, .plain):visible")).to_have_count(2)  # the code, and the way back
    expect(bob.page.get_by_role("link", name="Back to sign in")).to_be_visible()
    bob.page.keyboard.type("000000")
    bob.page.keyboard.press("Enter")
    bob.expect_status("login", "This code is wrong or has been used already. Enter the next one.")
    expect(bob.page.locator("[aria-invalid=true]")).to_have_attribute("id", "login-otp")
    bob.page.locator("#login-otp").fill(code_of(seed, steps_ahead=1))  # the current one was used to confirm
    bob.page.keyboard.press("Enter")
    bob.expect_url("/account")
    bob.fill("off", password=PASSWORD, otp=codes[0])
    expect(bob.page.locator("#two-factor > .done")).to_have_text("Turned off. All other sessions have been signed out.")


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


def test_a_forgotten_password_is_reset_by_mail(visit: Visit, site: CheapSite, mail: MailServer) -> None:
    add_account(site, "forgot@example.com")
    bob = visit(new_profile=True)
    bob.open("/login")
    bob.page.get_by_role("link", name="Forgot your password?").click()
    bob.expect_heading("Reset your password")
    bob.fill("forgot", email="forgot@example.com")
    bob.expect_status("forgot", MAILED)
    bob.expect_heading("Check your email")
    expect(bob.page.get_by_role("button")).to_have_text(["Send again"])
    (link,) = re.findall(r"https://\S+/reset#\S+", next_mail_to(mail, "forgot@example.com").get_content())
    bob.page.goto(link)
    bob.expect_url("/reset")  # the token has been removed from the address bar
    bob.expect_heading("Set password")
    assert bob.page.evaluate("history.length") <= 4
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.expect_status("reset", "The password is set. You can sign in now.")
    assert "changed" in next_mail_to(mail, "forgot@example.com").get_content()
    bob.page.get_by_role("link", name="Sign in").click()
    expect(bob.page.locator("#login-email")).to_have_value("forgot@example.com")
    expect(bob.page.locator("#login-password")).to_be_focused()
    bob.expect_url("/login")
    bob.fill("login", password=NEW_PASSWORD)
    bob.expect_url("/account")
    bob.page.goto(link)
    bob.fill("reset", new_password=NEW_PASSWORD)
    bob.expect_status("reset", USED)
    expect(bob.page.locator("#reset .contact")).to_be_visible()
    expect(bob.page.get_by_role("textbox")).to_have_count(0)
    expect(bob.page.get_by_role("button")).to_have_count(0)
    expect(bob.page.get_by_role("link")).to_have_text(["Request a new link", "Back to sign in"])
    expect(bob.page.get_by_text("If you were invited, you need a new invitation.")).to_be_visible()
    assert not [url for url in bob.requests if "token" in url.partition("#")[0]]


def test_an_account_is_created_with_a_mailed_link(
    browser: Browser, confirming_site: CheapSite, mail: MailServer
) -> None:
    with Visitor(browser, confirming_site) as bob:
        bob.open("/register")
        expect(bob.page.locator("#register-password")).to_have_count(0)
        bob.fill("register", email="bob@example.com")
        bob.expect_status("register", "A mail is on its way. Open its link to set a password.")
        link = link_in_mail_to(mail, "bob@example.com", "confirm")
        bob.page.goto(link)
        bob.expect_url("/confirm")  # the token has been removed from the address bar
        bob.expect_heading("Set password")
        expect(bob.page.locator("#confirm-email")).to_have_value("bob@example.com")
        assert "bob@example.com" not in confirming_site.command("user", "list")  # opening the link changes nothing
        bob.page.reload()  # the link is still there, but not in the address bar
        bob.expect_url("/confirm")
        bob.fill("create", password="qwertyuiopasdfghj")
        bob.expect_status("create", "This password is too easy to guess: it follows the keyboard or the alphabet.")
        bob.page.locator("#confirm-password").fill("")
        bob.fill("create", password=PASSWORD)
        bob.expect_status("create", "Your account is ready. You can sign in now.")
        bob.page.get_by_role("link", name="Sign in").click()
        bob.fill("login", password=PASSWORD)
        bob.expect_url("/account")
        bob.page.goto(link)
        bob.fill("create", password=NEW_PASSWORD)
        refusal = "This link has been used, has expired or belongs to another browser. Request a new one."
        bob.expect_status("create", refusal)
        expect(bob.page.locator("#confirm-password")).to_be_hidden()
        expect(bob.page.get_by_role("link", name="Start again")).to_be_visible()
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
    elsewhere.expect_status("change", ELSEWHERE)
    expect(elsewhere.page.get_by_role("textbox")).to_have_count(0)
    expect(elsewhere.page.get_by_role("button")).to_have_count(0)
    expect(elsewhere.page.get_by_role("link", name="Sign in")).to_have_attribute("href", "/login")
    bob.page.goto(link)
    bob.expect_url("/change")
    expect(bob.page.locator("#change-former")).to_have_value("former@example.com")
    expect(bob.page.locator("#change-email")).to_have_value("newer@example.com")
    bob.page.get_by_role("button", name="Change email").click()
    bob.expect_status("change", "Your email has been changed. All other sessions have been signed out.")
    bob.page.get_by_role("link", name="Your account").click()
    expect(bob.page.locator("#who")).to_have_text("newer@example.com")


def test_an_incomplete_link_is_reported(visit: Visit) -> None:
    bob = visit()
    for link in ("/reset", "/reset#token=abc", "/reset#email=bob@example.com"):
        bob.page.goto("about:blank")  # a change of only the fragment would not load the page
        bob.open(link)
        bob.expect_status("reset", INCOMPLETE)
        expect(bob.page.get_by_role("button", name="Set password")).to_be_hidden()
    for page, action in (("confirm", "create"), ("change", "change")):
        bob.open(f"/{page}#token=abc")
        bob.expect_status(action, INCOMPLETE)


def test_other_sessions_can_be_ended(visit: Visit, site: CheapSite) -> None:
    here, there = visit(), visit(user_agent="<b>Another</b> browser")
    add_account(site, "two@example.com")
    there.open("/login")
    there.sign_in("two@example.com")
    here.get_session("two@example.com")
    sessions = here.page.locator("#session-list li")
    expect(sessions).to_have_count(2)
    sessions.filter(has_text="<b>Another</b> browser").get_by_role("button").click()
    expect(sessions).to_have_count(1)
    expect(sessions).to_contain_text("this session")
    there.page.reload()
    there.expect_url("/login")
    there.get_session("two@example.com")
    here.page.get_by_role("button", name="Sign out everywhere else").click()
    here.expect_status("others", "All other sessions have been signed out.")
    there.page.reload()
    there.expect_url("/login")


def test_a_new_password_ends_all_other_sessions(visit: Visit) -> None:
    here, there = visit(), visit()
    here.get_account("change@example.com")
    there.get_session("change@example.com")
    here.fill("password", password=PASSWORD, new_password=NEW_PASSWORD)
    here.expect_status("password", "Password changed. All other sessions have been signed out.")
    there.page.reload()
    there.expect_url("/login")
    here.page.reload()
    expect(here.page.locator("#who")).to_have_text("change@example.com")


def test_an_access_token_is_created_shown_once_and_deleted(visit: Visit, site: CheapSite) -> None:
    bob = visit()
    bob.get_account("tokens@example.com")
    bob.fill("token", name="<b>git</b>", password="wrong")
    bob.expect_status("token", "Wrong password.")
    bob.page.locator("#token-password").fill("")
    bob.fill("token", password=PASSWORD)
    text = "Access token “<b>git</b>” created. Copy it now: it is not shown again."
    expect(bob.page.locator("#new-token [role=status]")).to_have_text(text)
    listed, secret = bob.page.locator("#token-list li"), bob.page.locator("#token-secret")
    expect(listed).to_have_count(1)
    expect(listed).to_contain_text("<b>git</b>")
    expect(listed).to_contain_text("never used · expires in 90 days")
    token = secret.inner_text()
    assert site.service
    ask = functools.partial(requests.get, f"{site.service.url}/verify", headers={"Authorization": f"Bearer {token}"})
    assert ask(timeout=10).status_code == 200
    bob.page.reload()  # the address names the open panel
    expect(listed).to_contain_text(re.compile("last used (now|[0-9]+ seconds? ago)"))
    expect(secret).to_be_hidden()
    assert token not in bob.page.content()
    bob.fill("token", name="other", password=PASSWORD)
    expect(secret).to_be_visible()
    bob.page.get_by_role("button", name="Done").click()
    expect(secret).to_be_hidden()
    expect(secret).to_have_text("")
    bob.page.get_by_role("button", name="Delete other").dblclick()
    expect(listed).to_have_count(1)
    bob.page.get_by_role("button", name="Delete <b>git</b>").click()
    expect(bob.page.get_by_role("button", name="Delete for good <b>git</b>")).to_be_focused()
    assert ask(timeout=10).status_code == 200  # it asks once before
    bob.context.set_offline(True)
    bob.page.keyboard.press("Enter")
    expect(bob.page.locator("#tokens > [role=status]")).to_have_text("The service cannot be reached. Try again.")
    expect(listed).to_have_count(1)
    bob.context.set_offline(False)
    bob.errors.clear()  # the browser reports the failed request
    bob.page.keyboard.press("Enter")
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
    expect(bob.page.get_by_role("button", name="Sign out", exact=True)).to_be_in_viewport()
    bob.set_up_two_factor(saved=False)  # the page shows recovery codes
    bob.page.evaluate("sessionStorage.setItem('onward', 'x')")
    bob.context.set_offline(True)
    bob.sign_out()
    bob.expect_status("logout", "The service cannot be reached. Try again.")
    bob.expect_nothing_left("clear@example.com")
    bob.context.set_offline(False)
    bob.errors.clear()  # the browser reports the failed request
    bob.sign_out()
    bob.expect_url("/login")
    bob.page.go_back(wait_until="commit")
    bob.expect_url("/login")
    bob.expect_heading("Sign in")
    assert "clear@example.com" not in bob.page.content()


def test_no_return_address_stays_in_the_browser(visit: Visit, site: CheapSite) -> None:
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
        expect(page.locator("#session-list li")).to_have_count(1)  # the account page: another host


def test_an_application_on_this_machine_asks_the_service_itself(
    browser: Browser, start: Callable[..., Service], tmp_path: Path
) -> None:
    service, port = start(), reserve_port()
    text = (HERE / "examples/localhost.mjs").read_text()
    text = re.sub("[:=] ?3000", lambda found: found[0].replace("3000", str(port)), text)
    (tmp_path / "app.mjs").write_text(re.sub("(?<=:)5000", service.url.rpartition(":")[2], text))
    requests.post(f"{service.url}/users", data={"email": "bob@x.io", "password": "b4l0u"}, timeout=5)
    process = subprocess.Popen([program("node", "nodejs"), "app.mjs"], cwd=tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait, 10)
        stack.callback(process.terminate)
        page = stack.enter_context(closing(browser.new_context())).new_page()
        assert awaited(lambda: accepts(port))
        page.goto(f"http://localhost:{port}/notes?a=b")
        page.locator("#login-email").fill("bob@x.io")
        page.locator("#login-password").fill("b4l0u")
        page.locator("#login-password").press("Enter")
        expect(page.get_by_text("Hello bob@x.io")).to_be_visible()
        assert page.url == f"http://localhost:{port}/notes?a=b"


def test_a_single_page_application_leads_to_the_sign_in_page_and_back(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('["buy cabbage"]')
    handler = functools.partial(SilentFiles, directory=str(tmp_path))
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=files.serve_forever, daemon=True).start()
        stack.callback(files.shutdown)
        site = stack.enter_context(closing(CheapSite(tmp_path, application_port=files.server_port)))
        text = (HERE / "examples/single_page.html").read_text().replace("https://auth.example.com", site.auth)
        (tmp_path / "notes.html").write_text(text)
        add_account(site, "bob@example.com")
        bob = stack.enter_context(Visitor(browser, site))
        target = f"{site.app}/notes.html?a=b#list"
        bob.page.goto(target.partition("#")[0])
        bob.sign_in("bob@example.com", target=target.partition("#")[0])
        bob.page.evaluate("location.hash = 'list'")
        site.command("sessions", "end", "bob@example.com")
        notes = bob.page.locator("#notes")
        bob.page.get_by_role("button", name="Load").click()
        bob.page.get_by_role("link", name="Sign in again").click()
        bob.sign_in("bob@example.com", target=target)
        bob.page.get_by_role("button", name="Load").click()
        expect(notes).to_have_text('["buy cabbage"]')
        expect(bob.page.get_by_role("alert")).to_be_hidden()


def test_no_return_address_leads_to_another_site(visit: Visit, site: CheapSite) -> None:
    add_account(site, "led@example.com")
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


def test_a_redirect_loop_ends_at_the_account_page(visit: Visit, site: CheapSite) -> None:
    bob = visit()
    bob.get_account("loop@example.com")
    # Another host of the domain has set the session cookie of another user, which is sent to the application only. The
    # sessions of two users count as none.
    add_account(site, "planter@example.com")
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


def test_a_page_takes_few_requests_and_at_most_60_kb(visit: Visit) -> None:
    bob = visit(locale="fr-FR")  # has the longest texts
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
        assert sum(int(str(size)) for request in requests for size in request.sizes().values()) <= 60_000, name


@pytest.mark.parametrize(("locale", "width", "scheme"), [("en-GB", 320, "light"), ("de-DE", 1280, "dark")])
def test_every_state_of_the_pages_is_accessible(
    visit: Visit, site: CheapSite, locale: str, width: int, scheme: Literal["light", "dark"]
) -> None:
    """Each language is seen in both widths. tests/long/test_all_pages.py has all combinations, and Firefox."""
    address = f"{locale[:2]}-{width}@example.com"
    add_account(site, address)
    bob = visit(locale=locale, viewport={"width": width, "height": 800}, color_scheme=scheme)
    for state in page_states.walk(bob, address):
        check_accessibility(bob.page, state, LOOKS if scheme == "dark" else EVERYTHING)
        bob.page.set_viewport_size({"width": 1600 - width, "height": 800})
        check_width(bob.page, state)
        bob.page.set_viewport_size({"width": width, "height": 800})
        assert bob.page.locator("html").get_attribute("lang") == locale[:2]


def test_the_pages_fit_when_they_are_enlarged_or_mirrored(visit: Visit, site: CheapSite) -> None:
    bob = visit(viewport={"width": 640, "height": 360})  # 1280 pixels at 200 %
    bob.get_account("zoom@example.com")
    for width in (640, 320):
        bob.page.set_viewport_size({"width": width, "height": 360})
        for direction in ("ltr", "rtl"):
            bob.page.evaluate("direction => { document.documentElement.dir = direction }", direction)
            for panel in ("sessions", "password", "two-factor", "passkeys", "tokens", "email", "delete"):
                bob.open_panel(panel)
                assert bob.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (width, panel)
    mark, name = bob.page.locator("#site > span").all()
    before, after = mark.bounding_box(), name.bounding_box()
    assert before
    assert after
    assert before["x"] > after["x"]  # the line begins at the right


def test_a_password_manager_knows_each_field(visit: Visit, site: CheapSite) -> None:
    """As 1Password and Bitwarden ask: each field has an id, a name and a label; a password has a username beside it."""
    bob, rules = visit(), list[str]()
    bob.get_account("fields@example.com")
    for name in ("account", "register", "forgot", "reset", "logout", "confirm", "change"):  # each has "login", too
        bob.open(f"/{name}")
        fields = bob.page.evaluate("""() => [...document.querySelectorAll('form input:not(.aside)')].map(field => ({
            id: field.id, name: field.name, label: field.labels[0]?.textContent ?? '', kind: field.autocomplete,
            names: [...field.form.querySelectorAll('[autocomplete^=username]')].length,
        }))""")
        assert len(fields) > (20 if name == "account" else 4)
        ids = [field["id"] for field in fields if field["id"]]
        assert len(ids) == len(set(ids))
        for field in fields:
            assert field["label"]
            if field["kind"] in ("current-password", "new-password"):
                assert field["id"]
                assert field["name"]
                assert field["names"] == 1, field
        rules += bob.page.locator("[autocomplete=new-password]").evaluate_all(
            "all => all.map(one => one.attributes.passwordrules.value)"
        )
    assert rules == ["minlength: 15;"] * 4


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


def test_an_invited_user_sets_up_a_required_second_factor(browser: Browser, club: CheapSite) -> None:
    site = club
    with Visitor(browser, site) as bob:
        bob.open("/login")
        assert bob.page.title() == "Sign in – Rowing <Club>"
        expect(bob.page.locator("#site")).to_have_text("Rowing <Club>")
        assert bob.page.locator("#site img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
        expect(bob.page.get_by_role("link", name="Create account")).to_be_hidden()
        expect(bob.page.locator("#login .invitation-only")).to_have_text(
            "No account yet? You need an invitation. Ask Eve, eve@example.com."
        )
        link = bob.page.get_by_role("link", name="eve@example.com")
        expect(link).to_have_attribute("href", "mailto:eve@example.com")
        check_accessibility(bob.page)
        for path, text in (
            ("/register", "You need an invitation to create an account here."),
            ("/forgot", "This service cannot send mail, so somebody has to give you a reset link."),
        ):
            bob.open(path)
            expect(bob.page.get_by_text(f"{text} Ask Eve, eve@example.com.")).to_be_visible()
            expect(bob.page.get_by_role("textbox")).to_have_count(0)
            check_accessibility(bob.page)
        bob.page.goto(site.command("invite", "bob@example.com").split()[-1])
        expect(bob.page.locator("#reset > p").first).to_have_text(
            "Set a password for your account at Rowing <Club>. Then you sign in with it."
        )
        expect(bob.page.locator("#reset-email")).to_have_value("bob@example.com")
        bob.fill("reset", new_password=PASSWORD)
        bob.expect_status("reset", "The password is set. You can sign in now.")
        bob.open(f"{site.app}/page")
        bob.fill("login", email="bob@example.com", password=PASSWORD)
        bob.page.wait_for_url(re.compile(r"/account\?return="))
        expect(bob.page.locator("#who")).to_have_text(
            "This service requires two-factor authentication. Set it up below."
        )
        expect(bob.page.locator("#two-factor")).to_be_visible()
        bob.set_up_two_factor()
        bob.page.get_by_role("link", name="Continue to the application").click()
        bob.expect_url(f"{site.app}/page")


def test_the_language_is_that_of_the_browser_until_another_is_chosen(visit: Visit) -> None:
    bob = visit(locale="fr-CH")
    bob.open("/login")
    bob.expect_heading("Connexion")
    bob.page.get_by_label("Langue").select_option("de")
    bob.expect_heading("Anmelden")
    (chosen,) = [cookie for cookie in bob.context.cookies() if cookie["name"] == "__Host-language"]
    assert (chosen["value"], chosen["secure"], chosen["sameSite"]) == ("de", True, "Lax")
    bob.page.goto(bob.url("/reset#token=abc&email=bob@example.com"))
    bob.expect_heading("Passwort festlegen")
    bob.page.get_by_label("Sprache").select_option("es")
    bob.expect_heading("Establecer la contraseña")
    bob.expect_url("/reset")
    expect(bob.page.locator("#reset-email")).to_have_value("bob@example.com")  # the link is not lost
    assert bob.page.evaluate("relative(40)") == "dentro de 40 segundos"


def test_a_password_can_be_seen_but_is_sent_as_a_password(visit: Visit) -> None:
    bob = visit()
    bob.open("/login")
    field = bob.page.locator("#login-password")
    bob.page.get_by_role("button", name="Show: Password").click()
    expect(field).to_have_attribute("type", "text")
    bob.page.get_by_role("button", name="Hide: Password").click()
    expect(field).to_have_attribute("type", "password")
    bob.page.get_by_role("button", name="Show: Password").click()
    bob.fill("login", email="nobody@example.com", password="wrong")
    expect(field).to_have_attribute("type", "password")
    bob.expect_status("login", "Wrong email or password.")


def test_the_waiting_time_is_said(browser: Browser, confirming_site: CheapSite) -> None:
    with Visitor(browser, confirming_site) as bob:
        for _ in range(10):
            form = {"email": "many@example.com", "password": "wrong"}
            confirming_site.request("POST", f"{confirming_site.auth}/sessions", form)
        bob.open("/login")
        bob.fill("login", email="many@example.com", password="wrong")
        text = re.compile(r"Too many attempts\. Try again in (1 minute|[0-9]+ seconds)\.")
        expect(bob.page.locator("#login .error")).to_have_text(text)


def test_a_session_has_the_name_of_its_browser(visit: Visit, site: CheapSite) -> None:
    add_account(site, "named@example.com")
    here, there = visit(), visit(user_agent=FIREFOX)
    there.open("/login")
    there.sign_in("named@example.com")
    here.get_session("named@example.com")
    first, second = (here.page.locator("#session-list li").nth(number) for number in (0, 1))
    expect(first).to_contain_text("this session")
    expect(second.locator("strong")).to_have_text("Firefox on Windows")
    expect(second).to_contain_text("last used")
    expect(second.get_by_text(FIREFOX)).to_be_hidden()
    second.get_by_text("Details").click()
    expect(second.get_by_text(FIREFOX)).to_be_visible()
    names = {
        "Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537.36 Chrome/139.0.0.0 Safari/537.36 Edg/139.0": "Edge on Windows",
        "Mozilla/5.0 (X11; CrOS x86_64) AppleWebKit/537.36 Chrome/139.0.0.0 Safari/537.36": "Chrome on ChromeOS",
        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/139.0 Safari/537.36 OPR/120.0": "Opera on Linux",
        "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) Version/18.0 Mobile/15E1 Safari/604": "Safari on iOS",
        "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15) AppleWebKit/605.1 Version/18.0 Safari/605.1": "Safari on macOS",
        "Mozilla/5.0 (Linux; Android 15) AppleWebKit/537.36 Chrome/139.0.0.0 Mobile Safari/537.36": "Chrome on Android",
        "curl/8.14": "curl/8.14",
    }
    assert here.page.evaluate("headers => headers.map(browserName)", list(names)) == list(names.values())


def test_recovery_codes_can_be_kept_and_vanish_when_they_are(visit: Visit, site: CheapSite) -> None:
    bob = visit(permissions=["clipboard-read", "clipboard-write"])
    bob.get_account("keep@example.com")
    _, codes = bob.set_up_two_factor(saved=False)
    bob.page.locator("#recovery").get_by_role("button", name="Copy").click()
    expect(bob.page.get_by_role("button", name="Copied")).to_be_visible()
    assert bob.page.evaluate("navigator.clipboard.readText()").split() == codes
    with bob.page.expect_download() as download:
        bob.page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "recovery-codes.txt"
    first, *rest = Path(download.value.path()).read_text().splitlines()
    assert (first, rest) == ("auth.example.com, keep@example.com", codes)
    bob.page.emulate_media(media="print")
    expect(bob.page.locator("#codes")).to_be_visible()
    expect(bob.page.locator("#recovery .print-only")).to_have_text("auth.example.com, keep@example.com")
    expect(bob.page.locator("#recovery .print-only")).to_be_visible()
    expect(bob.page.get_by_role("button")).to_have_count(0)
    bob.page.emulate_media(media="screen")
    asked: list[str] = []

    def answer(dialog: Dialog) -> None:
        asked.append(dialog.type)
        dialog.accept()

    bob.page.once("dialog", answer)
    bob.page.reload()
    assert asked == ["beforeunload"]


CHROME = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/139.0.0.0 Safari/537.36"
SHOTS: dict[str, Any] = {
    "wide": {"color_scheme": "light", "viewport": {"width": 1024, "height": 640}, "user_agent": CHROME},
    "narrow": {"color_scheme": "dark", "viewport": {"width": 320, "height": 560}, "user_agent": CHROME},
}


def take_screenshots() -> None:
    """Write two screenshots of each state: wide and light, narrow and dark."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(3)]
        _, settings = stack.enter_context(running_mail_server(folders[0]))
        settings |= {"AUTHSVC_CONFIRM_EMAIL": "off", "AUTHSVC_SITE_NAME": "Example"}
        site = stack.enter_context(closing(CheapSite(folders[1], settings)))
        members = stack.enter_context(running_club(folders[2]))
        browser = stack.enter_context(chromium())
        for look, options in SHOTS.items():

            def shoot(bob: Visitor, state: str, look: str = look) -> None:
                bob.page.mouse.move(0, 0)  # what it points at looks different
                bob.page.screenshot(path=SCREENSHOTS / f"{state}-{look}.png", full_page=True)

            add_account(site, f"{look}@example.com")
            with Visitor(browser, site, **options) as bob:
                for state in page_states.walk(bob, f"{look}@example.com"):
                    shoot(bob, state)
            with Visitor(browser, members, **options) as bob:
                for name, state in (
                    ("register", "invitation-only"),
                    ("forgot", "without-mail"),
                    ("login", "with-logo"),
                ):
                    bob.open(f"/{name}")
                    shoot(bob, state)
            with Visitor(browser, site, locale="de", **options) as bob:
                bob.open("/login")
                shoot(bob, "german")


if __name__ == "__main__":
    take_screenshots()
