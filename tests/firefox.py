"""Guests in Debian's Firefox, driven over Marionette, as geckodriver does. Debian has no geckodriver.

Scripts in the chrome context belong to the browser itself. They set what WebDriver cannot: a viewport that is narrower
than a window, and the colour scheme. They also note what the console and the network of all pages tell.
https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html
"""

from __future__ import annotations

import base64
import json
import os
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.browser import AXE_SCRIPT
from tests.proxies import APP, AUTH, WIKI, Site, authority, program

TIMEOUT = 30.0  # seconds; only a machine with too much to do needs more than one
STEP = 0.02  # seconds between two looks at a page that is about to change
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver, 12.1: the name of an element's id
ENTER = "\ue007"  # WebDriver, 15.4.2
PREFERENCES = {
    "marionette.port": 0,  # any; it is written to a file of the profile
    "network.dns.localDomains": f"{AUTH},{APP},{WIKI}",
    "security.webauth.webauthn_enable_softtoken": True,  # for passkeys
    "security.webauth.webauthn_enable_usbtoken": False,
}
PASSKEY_DEVICE = {
    "protocol": "ctap2_1",
    "transport": "internal",
    "hasResidentKey": True,
    "hasUserVerification": True,
    "isUserConsenting": True,
    "isUserVerified": True,
}
STATUS = "form[data-action={}] [role=status]"  # where a form says what became of it
RUN_AXE = """
const [options, done] = arguments;
axe.run(options).then(found => done(found.violations.map(rule =>
  [rule.impact, rule.id, ...rule.nodes.map(node => node.html)])), error => done([["", String(error)]]));
"""
# Without a trusted certificate there are no passkeys.
TRUST = 'Cc["@mozilla.org/security/x509certdb;1"].getService(Ci.nsIX509CertDB).addCertFromBase64(arguments[0], "C,,")'
LISTEN = """
const from = arguments[0], {errors, answers} = window.noted = {errors: [], answers: []};
Services.console.registerListener({observe(message) {
  if (message instanceof Ci.nsIScriptError && message.sourceName.startsWith(from)) errors.push(message.errorMessage);
}});
Services.obs.addObserver(channel => {
  const {requestMethod, responseStatus, URI} = channel.QueryInterface(Ci.nsIHttpChannel);
  answers.push(`${requestMethod} ${URI.filePath} ${responseStatus}`);
}, "http-on-examine-response");
"""
LOOK = """
const [width, scheme, language] = arguments, browser = gBrowser.selectedBrowser;
for (const name of ["min-width", "max-width"]) browser.style.setProperty(name, width + "px", "important");
Services.prefs.setIntPref("layout.css.prefers-color-scheme.content-override", scheme === "dark" ? 0 : 1);
Services.prefs.setStringPref("intl.accept_languages", language);
"""
VISIBLE = "[...document.querySelectorAll(arguments[0])].find(element => element.checkVisibility())"
TAKE = "const noted = window.noted[arguments[0]]; return noted.splice(0, noted.length);"


class Firefox:
    """A running Firefox with a new profile, in this folder. Close it at the end.

    Args:
        folder: an empty folder for the profile.
        url: what the pages begin with whose errors are noted.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in PREFERENCES.items()]
        (folder / "user.js").write_text("".join(lines))
        path = program("firefox-esr", "firefox-esr")
        command = [path, "--headless", "--marionette", "--remote-allow-system-access", "--no-remote"]
        with (folder / "log").open("wb") as log:
            environ = {**os.environ, "HOME": str(folder)}  # Firefox refuses a home of somebody else
            self._process = subprocess.Popen(
                [*command, "--profile", str(folder), "about:blank"], stdout=log, stderr=log, env=environ
            )
        try:
            self._connect(folder / "MarionetteActivePort")
            self.call("WebDriver:NewSession")
            self.chrome(
                TRUST, base64.b64encode(ssl.PEM_cert_to_DER_cert(authority().cert_pem.bytes().decode())).decode()
            )
            self.chrome(LISTEN, url)
        except BaseException:
            self.close()
            raise

    def _connect(self, port: Path) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not (port.exists() and port.read_text()):
            assert self._process.poll() is None, "Firefox ended"
            assert time.monotonic() < deadline, "Firefox does not start"
            time.sleep(STEP)
        self._socket = socket.create_connection(("127.0.0.1", int(port.read_text())), timeout=TIMEOUT)
        self._stream = self._socket.makefile("rb")
        self._read()  # what it speaks

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        if hasattr(self, "_socket"):
            self._stream.close()
            self._socket.close()

    def _read(self) -> Any:
        size = b"".join(iter(lambda: self._stream.read(1), b":"))
        return json.loads(self._stream.read(int(size)))

    def call(self, command: str, **parameters: Any) -> Any:
        """Have a command carried out, and return its value."""
        message = json.dumps([0, 1, command, parameters]).encode()
        self._socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self._read()
        assert not error, (command, error["error"], error["message"])
        return result.get("value") if isinstance(result, dict) else result

    def chrome(self, script: str, *arguments: Any) -> Any:
        """Run a script of the browser itself, and return its value."""
        self.call("Marionette:SetContext", value="chrome")
        try:
            return self.run(script, *arguments)
        finally:
            self.call("Marionette:SetContext", value="content")

    def run(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page, which the policy of the page does not concern, and return its value."""
        return self.call("WebDriver:ExecuteScript", script=script, args=arguments, newSandbox=True)

    def until(self, script: str, *arguments: Any) -> Any:
        """Run a script in the page until its value is true, and return that."""
        deadline = time.monotonic() + TIMEOUT
        while not (value := self.run(f"return {script}", *arguments)):
            assert time.monotonic() < deadline, (self.run("return document.URL"), script, arguments)
            time.sleep(STEP)
        return value

    def open(self, url: str) -> None:
        self.call("WebDriver:Navigate", url=url)

    def look(self, width: int, scheme: str, language: str) -> None:
        """Show all further pages in this width and colour scheme, and ask for them in this language."""
        self.chrome(LOOK, width, scheme, language)

    def fill(self, selector: str, text: str) -> None:
        """Empty a field and type into it."""
        element = self._find(selector)
        self.call("WebDriver:ElementClear", id=element)
        self.call("WebDriver:ElementSendKeys", id=element, text=text)

    def press_enter(self, selector: str) -> None:
        self.call("WebDriver:ElementSendKeys", id=self._find(selector), text=ENTER)

    def click(self, selector: str) -> None:
        self.call("WebDriver:ElementClick", id=self._find(selector))

    def _find(self, selector: str) -> str:
        """Return the id of the first visible element, and wait for it if the page has not shown it yet."""
        found: dict[str, str] = self.until(VISIBLE, selector)
        return found[ELEMENT]

    def errors(self) -> list[str]:
        """Return the errors and warnings of the pages, also of their policy, since the last call."""
        found: list[str] = self.chrome(TAKE, "errors")
        return found

    def answers(self) -> list[str]:
        """Return the answers to all requests since the last call, such as "GET /login 200"."""
        found: list[str] = self.chrome(TAKE, "answers")
        return found

    def forget(self) -> None:
        """Delete all cookies, and what this site has stored."""
        origin = self.run("sessionStorage.clear(); localStorage.clear(); return location.origin")
        # Another process shows about:blank. Firefox reports an error of a script that still runs at this change.
        self.open(f"{origin}/pages/style.css")
        self.open("about:blank")
        self.chrome("Services.cookies.removeAll()")


class Look(NamedTuple):
    """How a guest sees the pages."""

    width: int
    scheme: str
    language: str

    def __str__(self) -> str:
        return "-".join(map(str, self))


class Guest:
    """A person who has come to the site in Firefox."""

    def __init__(self, firefox: Firefox, site: Site, look: Look) -> None:
        self.firefox, self.site = firefox, site
        self.set_look(look)

    def set_look(self, look: Look) -> None:
        """Change the look, also of the page that is open."""
        self.look = look
        self.firefox.look(*look)
        has_look = "innerWidth === arguments[0] && matchMedia(`(prefers-color-scheme: ${arguments[1]})`).matches"
        self.firefox.until(has_look, look.width, look.scheme)

    def open(self, address: str) -> None:
        """Open a page that stays where it is."""
        self.firefox.open(address if address.startswith("https:") else self.site.auth + address)
        self.check_look()

    def fill(self, name: str, /, **fields: str) -> None:
        """Fill in a form and send it. On the account page, open its panel before."""
        form, last = f"form[data-action={name}]", ""
        if panel := self.run(f"document.querySelector('{form}').closest('.panel[hidden]')?.id"):
            self.open_panel(panel)
        for field, value in fields.items():
            last = f"{form} [name={field}]"
            self.firefox.fill(last, value)
        self.firefox.press_enter(last)

    def open_panel(self, name: str) -> None:
        """Open a part of the account page."""
        self.click(f"nav a[href='#{name}']")
        self.see(f"#{name}")

    def click(self, selector: str) -> None:
        self.firefox.click(selector)

    def see(self, selector: str) -> None:
        """Wait until an element is visible."""
        self.firefox.until(VISIBLE, selector)

    def run(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        return self.firefox.run(f"return {expression}")

    def add_passkey_device(self) -> None:
        """Plug in a device that verifies its user at once."""
        self.device = self.firefox.call("WebAuthn:AddVirtualAuthenticator", **PASSKEY_DEVICE)

    def remove_passkey_device(self) -> None:
        self.firefox.call("WebAuthn:RemoveVirtualAuthenticator", authenticatorId=self.device)

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

    def expect_url(self, page: str) -> None:
        self.firefox.until("document.URL === arguments[0] && document.readyState === 'complete'", self.site.auth + page)
        self.check_look()

    def expect_account(self, email: str) -> None:
        self.expect_url("/account")
        self.firefox.until("document.body.innerText.includes(arguments[0])", email)
        self.check_look()

    def sign_out(self) -> None:
        self.open("/account")
        self.send("logout", "DELETE /sessions 302")
        self.expect_url("/login")

    def check_look(self) -> None:
        width, scheme, _ = self.look
        script = "const {scrollWidth} = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)');"
        inner, scrolled, dark = self.firefox.run(f"{script} return [innerWidth, scrollWidth, dark.matches]")
        assert (inner, dark) == (width, scheme == "dark")
        assert scrolled <= width

    def expect_no_axe_violation(self, options: dict[str, Any], state: str = "") -> None:
        if not self.firefox.run("return 'axe' in window"):
            self.firefox.run(AXE_SCRIPT)
        found = self.firefox.call("WebDriver:ExecuteAsyncScript", script=RUN_AXE, args=[options], newSandbox=True)
        assert [rule for rule in found if rule[0] != "minor"] == [], state


@pytest.fixture(scope="session")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firefox]:
    """One browser for all tests, as it takes some seconds to start."""
    with closing(Firefox(tmp_path_factory.mktemp("firefox"), f"https://{AUTH}:")) as shared:
        yield shared
