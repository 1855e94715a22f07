"""Debian's Firefox, driven over Marionette, the protocol that geckodriver speaks with it. Debian has no geckodriver.

Scripts in the chrome context belong to the browser itself. They set what WebDriver cannot: a viewport that is narrower
than a window, and the colour scheme. They also note what the console and the network of all pages tell.
https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.proxies import APP, AUTH, WIKI, program

TIMEOUT = 30.0  # seconds; only a machine with too much to do needs more than one
STEP = 0.02  # seconds between two looks at a page that is about to change
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver, 12.1: the name of an element's id
ENTER = "\ue007"  # WebDriver, 15.4.2
PREFERENCES = {
    "marionette.port": 0,  # any; it is written to a file of the profile
    "network.dns.localDomains": f"{AUTH},{APP},{WIKI}",
}
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
            self.call("WebDriver:NewSession", acceptInsecureCerts=True)
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
        visible = "[...document.querySelectorAll(arguments[0])].find(element => element.checkVisibility())"
        found: dict[str, str] = self.until(visible, selector)
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
        self.run("sessionStorage.clear(); localStorage.clear()")
        self.open("about:blank")
        self.chrome("Services.cookies.removeAll()")
