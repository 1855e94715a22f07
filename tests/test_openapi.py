"""docs/openapi.yaml: compared with the routes, and with the answers of a running service.

schemathesis generates requests from the document and checks each answer against it. OPENAPI_EXAMPLES=20 makes more.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import authsvc
from auth import Auth, AuthError
from authsvc import create_app
from credentials import totp
from settings import Settings
from tests.authenticator import Authenticator
from tests.conftest import HERE, Answer, Client, Clock, Service
from tests.production import proxied_service
from tests.routes import as_json

OPENAPI = HERE / "docs" / "openapi.yaml"
PASSWORD = "correct horse battery"  # the password in the examples of the document
# Requests that schemathesis makes up for each route, on top of its boundary values and the examples of the document.
# tests/test_fuzz.py sends made-up requests by the thousand, for less time each.
EXAMPLES = os.environ.get("OPENAPI_EXAMPLES", "1")

# All checks run with their defaults except one: well-formed input may also be refused.
# - 400: the email has an account already or is no mailbox; the password is too common for production.
# - 401: no account has the email, or the password is wrong.
# - 403: no account has the email (development tells, when a reset is requested); the reset token does not exist; the
#   current password is wrong.
# - 404: no session has this id.
# - 429: production limits the logins to one account from all addresses, and the generator repeats a few emails.
# One method that no route has is tried on each path; the others take the same way through the router.
CONFIGURATION = """
[phases.coverage]
unexpected-methods = ["PATCH"]

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "302", "400", "401", "403", "404", "429"]
"""


@pytest.fixture(scope="module")
def document() -> Any:
    return yaml.safe_load(OPENAPI.read_text())


@pytest.mark.slow
def test_the_document_has_exactly_the_routes_of_the_service(document: Any) -> None:
    documented = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    pages = authsvc.Handlers.page, authsvc.Handlers.account
    routes = {(method, path) for method, path, handler, _ in authsvc.ROUTES if handler not in pages}
    assert documented == {(method, re.sub("<.*>", "{id}", path)) for method, path in routes}


def test_the_document_has_the_version_of_the_package(document: Any) -> None:
    assert document["info"]["version"] == tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]


def test_the_document_has_the_status_of_every_refusal(document: Any) -> None:
    documented = {
        int(status) for item in document["paths"].values() for route in item.values() for status in route["responses"]
    }
    refusals = {error.status for error in AuthError.__subclasses__()}
    assert refusals >= {400, 401, 403, 404, 429}
    assert documented >= {*refusals, 404, 405, 413, 415, 503}


def test_no_answer_has_undocumented_fields(document: Any) -> None:
    def objects(node: Any) -> list[Any]:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        found = [node] if isinstance(node, dict) and node.get("type") == "object" else []
        return found + [schema for child in children for schema in objects(child)]

    answers = [route["responses"] for item in document["paths"].values() for route in item.values()]
    named = [
        document["components"]["schemas"][name] for name in ("Welcome", "Refusal", "Session", "AccessToken", "Passkey")
    ]
    assert all(schema["additionalProperties"] is False for schema in objects([answers, named]))


# Importing the validators takes three seconds, as they compile the grammar of URLs.


@pytest.mark.slow
def test_the_document_is_valid(document: Any) -> None:
    import openapi_spec_validator

    openapi_spec_validator.validate(document)


class CheckedClient:
    """Sends requests with the cookie that it was last given, and checks each answer against the document."""

    def __init__(self, document: Any, call: Callable[..., Answer]) -> None:
        from openapi_schema_validator import OAS31Validator, oas31_format_checker

        self.validator = functools.partial(OAS31Validator, format_checker=oas31_format_checker)
        self.document, self.call = document, call
        self.cookies: dict[str, str] = {}
        self.seen: Counter[tuple[str, str, int]] = Counter()

    def __call__(self, method: str, path: str, status: int = 200, /, **form: Any) -> Any:
        cookie = "; ".join("=".join(pair) for pair in self.cookies.items())
        answer = self.call(method, path, form, cookie=cookie, **(as_json(form) if "credential" in form else {}))
        assert answer.status == status, (method, path, answer.body)
        route = re.sub("/([0-9a-f]{16}|[0-9]+)$", "/{id}", path.partition("?")[0])
        documented = self._resolve(self.document["paths"][route][method.lower()]["responses"][str(status)])
        schema = {**self.document, **documented["content"]["application/json"]["schema"]}
        self.validator(schema).validate(answer.json)
        for name, node in documented["headers"].items():
            header, value = self._resolve(node), answer.headers.get(name.title())
            if value is not None or header.get("required"):
                self.validator(header["schema"]).validate(value)
        if "Set-Cookie" in answer.headers:
            assert "Set-Cookie" in documented["headers"]
            self.cookies |= answer.cookies
        self.seen[method, route, status] += 1
        return answer.json

    def _resolve(self, node: Any) -> Any:
        if "$ref" not in node:
            return node
        kind, name = node["$ref"].split("/")[2:]
        return self.document["components"][kind][name]


@pytest.mark.slow
@pytest.mark.both_engines
def test_every_successful_answer_is_as_documented(
    document: Any, call: Client, auth: Auth, settings: Settings, clock: Clock
) -> None:
    send = CheckedClient(document, call)
    login = {"email": "bob@x.io", "password": "b4l0u"}

    def code() -> str:
        clock.advance(totp.STEP)  # a code works only once
        return totp.code(seed, int(clock()) // totp.STEP)

    send("GET", "/")
    send("GET", "/.well-known/change-password", 302)
    send("POST", "/users", **login)
    send("POST", "/sessions", **login, remember="1")
    send("GET", "/health")
    send("GET", "/profile")
    send("GET", "/verify")
    send("GET", "/verify?group=Wiki", 400)
    send("GET", "/verify?group=wiki", 403)
    assert auth.change_groups(auth.find_user("bob@x.io"), "wiki", member=True)
    send("GET", "/verify?login=1&group=admin&group=wiki")
    send("POST", "/tokens", password="b4l0u", name="backup")
    created = send("POST", "/tokens", password="b4l0u", name="git", days="30")
    assert [token["expires"] for token in send("GET", "/tokens")["tokens"]] == [None, created["expires"]]
    send("DELETE", f"/tokens/{created['id']}")
    send("DELETE", f"/tokens/{created['id']}", 404)
    send("POST", "/tokens", 400, password="b4l0u", name="git", days="3651")
    device = Authenticator()
    options = send("POST", "/passkeys/options", password="b4l0u")
    created = send("POST", "/passkeys", name="laptop", credential=device.create(options))
    send("POST", "/passkeys", 400, name="laptop", credential={})
    send("GET", "/passkeys")
    options = send("POST", "/sessions/passkey/options")
    send("POST", "/sessions/passkey", 401, credential={})
    send("POST", "/sessions/passkey", credential=device.get(options), remember="1")
    send("GET", "/passkeys")
    send("DELETE", f"/passkeys/{created['id']}", password="b4l0u")
    send("DELETE", f"/passkeys/{created['id']}", 404, password="b4l0u")
    token = send("POST", "/email", password="b4l0u", new_email="rob@x.io")["token"]
    send("PUT", "/email", email="rob@x.io", token=token)
    login["email"] = "rob@x.io"
    send("PUT", "/password", **{**login, "new_password": "t4rt1fl3tt3"})
    login["password"] = "t4rt1fl3tt3"
    seed = send("POST", "/totp", **login)["secret"]
    recovery_codes = send("PUT", "/totp", otp=code())["recovery_codes"]
    send("POST", "/totp", 400, **login)
    send("POST", "/sessions", 401, **login)
    send("POST", "/sessions", 401, **login, otp="wrong")
    send("POST", "/sessions", **login, otp=code())
    send("DELETE", "/totp", 403, **login, otp="wrong")
    send("DELETE", "/totp", **login, otp=recovery_codes[0])
    send("DELETE", "/sessions/others")
    send("DELETE", "/sessions/0123456789abcdef", 404)
    send("DELETE", f"/sessions/{send('GET', '/sessions')['sessions'][0]['id']}")
    for path, status in (("/sessions", 302), ("/sessions/all", 200)):
        send("POST", "/sessions", **login)
        send("DELETE", path, status)
    send("GET", "/verify", 401)
    send("GET", "/verify?login=1", 302)
    token = send("POST", "/reset_password", email="rob@x.io")["reset_token"]
    send("PUT", "/reset_password", email="rob@x.io", reset_token=token, new_password="b4l0u")
    login["password"] = "b4l0u"
    send("POST", "/sessions", **login)
    send("DELETE", "/profile", **login)
    confirming = replace(settings, smtp_url="smtp://127.0.0.1:25", mail_from="auth@x.io", confirm_email=True)
    production = replace(settings, public_url="https://auth.example.com", bcrypt_cost=10)
    send.call = functools.partial(Client(create_app(production, auth)), HTTP_ACCEPT="text/html")
    send("GET", "/", 302)
    send.call = Client(create_app(confirming, Auth(auth._db, confirming, clock)))
    assert send("POST", "/users", email="eve@x.io", password="b4l0u")["message"] == "confirmation mailed"
    auth._db.emails.add_registration(auth._link("eve@x.io", "token", 60))
    send("PUT", "/users", email="eve@x.io", token="token", password="b4l0u")
    successes = {
        (method.upper(), path, int(status))
        for path, item in document["paths"].items()
        for method, route in item.items()
        for status in route["responses"]
        if int(status) < 400 and path != "/metrics"  # only a process has these: tests/test_metrics.py
    }
    assert send.seen.keys() >= successes


def run_schemathesis(service: Service, folder: Path, cookie_name: str, phases: str) -> int:
    """Test the service with schemathesis; return the number of generated cases, all of which passed."""
    (folder / "schemathesis.toml").write_text(CONFIGURATION)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", "schemathesis.toml"),
            *("run", str(OPENAPI), "--url", service.url, "--checks", "all", "--warnings", "off"),
            *("--generation-deterministic", "--max-examples", EXAMPLES, "--continue-on-failure"),
            *("--phases", phases),
        ],
        cwd=folder,
        env={
            **os.environ,
            "COVERAGE_PROCESS_CONFIG": "",  # measuring schemathesis itself would take longer than its run
            "SCHEMATHESIS_HOOKS": str(HERE / "tests" / "openapi_hooks.py"),
            "OPENAPI_PASSWORD": PASSWORD,
            "OPENAPI_COOKIE": cookie_name,
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("sys_crash|sys_server", service.log)
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found, done.stdout
    assert found[1] == found[2], done.stdout
    return int(found[1])


@pytest.mark.fuzz
@pytest.mark.slow
def test_development_answers_as_documented(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start(AUTHSVC_THROTTLE="off", AUTHSVC_SESSIONS_PER_USER="100")
    # Fewer cases would mean that the generator no longer reaches the routes.
    assert run_schemathesis(service, tmp_path, "session_id", "examples,coverage,fuzzing,stateful") >= 500


@pytest.mark.fuzz
@pytest.mark.slow
def test_production_answers_as_documented(tmp_path: Path) -> None:
    with proxied_service(tmp_path, AUTHSVC_SESSIONS_PER_USER="100") as service:
        # Without the boundary values, which development tries.
        assert run_schemathesis(service, tmp_path, "__Host-session_id", "examples,fuzzing") >= 80
