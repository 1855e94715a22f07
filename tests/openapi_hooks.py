"""Hooks that schemathesis loads to test a running service: they sign in and send each request as another client.

``OPENAPI_PASSWORD`` is the password that the accounts are created with, ``OPENAPI_COOKIE`` the name of the cookie.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import requests
import schemathesis

COUNTER = itertools.count()
USES = 15  # of one account: 20 wrong passwords would exhaust its rate limit, and then every answer is 429


def forwarding_headers() -> dict[str, str]:
    """Return what a proxy sends for the next of 65,536 clients. A service without a trusted proxy ignores it."""
    number = next(COUNTER)
    return {"X-Forwarded-For": f"198.18.{number // 256 % 256}.{number % 256}", "X-Forwarded-Proto": "https"}


class Account:
    """The account that the requests are sent for. It is replaced once it is deleted, changed or used up."""

    def __init__(self) -> None:
        self.uses = USES
        self.form: dict[str, str] = {}
        self.session_id = ""

    def live_session(self, url: str) -> str:
        """Return the id of a live session; sign in or create an account where there is none."""
        self.uses += 1
        if self.uses > USES or not (self._is_live(url) or self._log_in(url)):
            self.uses = 0
            self.form = {"email": f"owner{next(COUNTER)}@example.com", "password": os.environ["OPENAPI_PASSWORD"]}
            requests.post(f"{url}/users", self.form, headers=forwarding_headers(), timeout=30).raise_for_status()
            assert self._log_in(url)
        return self.session_id

    def _is_live(self, url: str) -> bool:
        cookies = {os.environ["OPENAPI_COOKIE"]: self.session_id}
        return requests.get(f"{url}/profile", cookies=cookies, headers=forwarding_headers(), timeout=30).ok

    def _log_in(self, url: str) -> bool:
        answer = requests.post(f"{url}/sessions", self.form, headers=forwarding_headers(), timeout=30)
        self.session_id = answer.cookies.get(os.environ["OPENAPI_COOKIE"]) or ""
        return answer.ok


ACCOUNT = Account()


# Asked before each case, because the case before may have ended the session.
@(
    schemathesis.auth(refresh_interval=None)
    .apply_to(path=["/profile", "/verify", "/password", "/email", "/tokens", "/passkeys", "/passkeys/options", "/totp"])
    .apply_to(method="DELETE")
    .apply_to(path="/sessions", method="GET")
)
class SessionCookie:
    def get(self, case: Any, context: Any) -> str:
        return ACCOUNT.live_session(context.operation.schema.get_base_url())

    def set(self, case: Any, data: str, context: Any) -> None:
        case.cookies = {**(case.cookies or {}), os.environ["OPENAPI_COOKIE"]: data}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    case.headers = {**(case.headers or {}), **forwarding_headers()}
