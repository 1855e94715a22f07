"""What schemathesis loads to test a live service: it logs in where a session is needed, and is many clients.

``OPENAPI_PASSWORD`` is what its users register with; ``OPENAPI_COOKIE`` is the name of the cookie.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import requests
import schemathesis

COUNTER = itertools.count()
USES = 15  # of one account: wrong passwords are counted, and past 20 of them it would see nothing but 429


def forwarding() -> dict[str, str]:
    """What a proxy says of the next of 65,536 clients; ignored where no proxy is trusted."""
    number = next(COUNTER)
    return {"X-Forwarded-For": f"198.18.{number // 256 % 256}.{number % 256}", "X-Forwarded-Proto": "https"}


class Owner:
    """One user after the other, as each deletes the account or changes the password; logged in as long as may be."""

    def __init__(self) -> None:
        self.uses = USES
        self.form: dict[str, str] = {}
        self.session_id = ""

    def live_session(self, url: str) -> str:
        self.uses += 1
        if self.uses > USES or not (self._is_live(url) or self._logs_in(url)):
            self.uses = 0
            self.form = {"email": f"owner{next(COUNTER)}@example.com", "password": os.environ["OPENAPI_PASSWORD"]}
            requests.post(f"{url}/users", self.form, headers=forwarding(), timeout=30).raise_for_status()
            assert self._logs_in(url)
        return self.session_id

    def _is_live(self, url: str) -> bool:
        cookies = {os.environ["OPENAPI_COOKIE"]: self.session_id}
        return requests.get(f"{url}/profile", cookies=cookies, headers=forwarding(), timeout=30).ok

    def _logs_in(self, url: str) -> bool:
        answer = requests.post(f"{url}/sessions", self.form, headers=forwarding(), timeout=30)
        self.session_id = answer.cookies.get(os.environ["OPENAPI_COOKIE"]) or ""
        return answer.ok


OWNER = Owner()


# Anew for each case: the one before may have ended the session.
@(
    schemathesis.auth(refresh_interval=None)
    .apply_to(path=["/profile", "/verify", "/password", "/totp"])
    .apply_to(method="DELETE")
    .apply_to(path="/sessions", method="GET")
)
class Login:
    def get(self, case: Any, context: Any) -> str:
        return OWNER.live_session(context.operation.schema.get_base_url())

    def set(self, case: Any, data: str, context: Any) -> None:
        case.cookies = {**(case.cookies or {}), os.environ["OPENAPI_COOKIE"]: data}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    case.headers = {**(case.headers or {}), **forwarding()}
