"""A person with a passkey, for the tests: the requests of a browser, with an authenticator in software."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.authenticator import Authenticator
from tests.conftest import Answer, Client
from tests.routes import BOB, as_json, cookie_of, log_in, register


@dataclass
class Person:
    """Somebody with an account, a session and a browser. Each request carries both cookies."""

    call: Client
    email: str = BOB["email"]
    password: str = BOB["password"]
    session: str = ""  # the cookie, as the browser sends it
    browser: str = ""  # the cookie that ties challenges to the browser
    device: Authenticator = field(default_factory=Authenticator)

    def ask(self, method: str, path: str, form: Any = None, **rest: Any) -> Answer:
        cookie = "; ".join(filter(None, (self.session, self.browser)))
        answer = self.call(method, path, form, cookie=cookie or None, **rest)
        for name, value in answer.cookies.items():
            if name.endswith("challenge"):
                self.browser = f"{name}={value}"
            elif name.endswith("session_id"):
                self.session = f"{name}={value}" if value else ""
        return answer

    def begin(self, **fields: str) -> Answer:
        """Ask for the options of a new passkey."""
        return self.ask("POST", "/passkeys/options", {"password": self.password, **fields})

    def add(self, name: str = "laptop", **client_data: Any) -> Answer:
        """Make a passkey with the device, and add it to the account."""
        return self.send_new(self.device.create(self.begin().json, **client_data), name)

    def send_new(self, credential: Any, name: str = "laptop") -> Answer:
        return self.ask("POST", "/passkeys", **as_json({"name": name, "credential": credential}))

    def options(self) -> Any:
        """Return the options for signing in."""
        return self.ask("POST", "/sessions/passkey/options").json

    def sign_in(self, **client_data: Any) -> Answer:
        """Sign in with the passkey, without a session."""
        self.session = ""
        return self.send(self.device.get(self.options(), **client_data))

    def send(self, credential: Any, **fields: str) -> Answer:
        return self.ask("POST", "/sessions/passkey", **as_json({"credential": credential, **fields}))

    def listed(self) -> list[Any]:
        return list(self.ask("GET", "/passkeys").json["passkeys"])


def new_person(call: Client, email: str = BOB["email"], password: str = BOB["password"]) -> Person:
    """Create an account, and sign in with the password."""
    register(call, email, password)
    return Person(call, email, password, session=cookie_of(log_in(call, email, password)))
