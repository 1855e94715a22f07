"""What schemathesis loads to test a live service: it logs in where a session is needed, and is many clients.

``OPENAPI_LOGIN`` is a form to log in with, as JSON; ``OPENAPI_COOKIE`` is the name of the cookie.
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import requests
import schemathesis

COUNTER = itertools.count()


def forwarding() -> dict[str, str]:
    """What a proxy says of the next of 65,536 clients; ignored where no proxy is trusted."""
    number = next(COUNTER)
    return {"X-Forwarded-For": f"198.18.{number // 256 % 256}.{number % 256}", "X-Forwarded-Proto": "https"}


# Anew for each case: the logout before it may have ended the session.
@schemathesis.auth(refresh_interval=None).apply_to(path="/profile").apply_to(method="DELETE")
class Login:
    def get(self, case: Any, context: Any) -> str:
        form = json.loads(os.environ["OPENAPI_LOGIN"])
        url = f"{context.operation.schema.get_base_url()}/sessions"
        answer = requests.post(url, form, headers=forwarding(), timeout=30)
        return answer.cookies[os.environ["OPENAPI_COOKIE"]]

    def set(self, case: Any, data: str, context: Any) -> None:
        case.cookies = {**(case.cookies or {}), os.environ["OPENAPI_COOKIE"]: data}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    case.headers = {**(case.headers or {}), **forwarding()}
