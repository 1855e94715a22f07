"""openapi.yaml, held to the routes, and to what a live service answers to what schemathesis makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
import yaml
from openapi_schema_validator import OAS31Validator, oas31_format_checker

import authsvc
import totp
from tests.conftest import HERE, Client, Clock, Service
from tests.crowd import UNMEASURED

OPENAPI = HERE / "openapi.yaml"
PASSWORD = "correct horse battery"  # that of the examples

# Every check is on, and as strict as by default, but for one: that well-formed input is accepted. Here it may also be
# - 400: an email that has an account already, or one that is no mailbox; a password that is too common for production.
# - 401: nobody has this email, or another password.
# - 403: nobody has this email (development says so when a reset is asked for); nobody was given this reset token; the
#   password that confirms a change is another.
# - 404: no session has this name.
# - 429: production counts logins of one account from all addresses, and the same few emails come again and again.
CHECKS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "302", "400", "401", "403", "404", "429"]
"""


@pytest.fixture(scope="module")
def document() -> Any:
    return yaml.safe_load(OPENAPI.read_text())


def test_the_document_has_every_route_and_no_other(document: Any) -> None:
    documented = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    for_people = authsvc.Desk.page, authsvc.Desk.account, authsvc.Desk.file
    routes = {(method, path) for method, path, handler, _ in authsvc.ROUTES if handler not in for_people}
    assert documented == {(method, path.replace("<public_id>", "{id}")) for method, path in routes}


def test_the_document_is_of_this_version(document: Any) -> None:
    assert document["info"]["version"] == tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]


def test_the_document_has_the_status_of_every_refusal(document: Any) -> None:
    documented = {
        int(status) for item in document["paths"].values() for route in item.values() for status in route["responses"]
    }
    assert documented >= {*authsvc.STATUS.values(), *authsvc.MESSAGES, 413, 415, 503}


def test_every_object_in_an_answer_is_exact(document: Any) -> None:
    def objects(node: Any) -> list[Any]:
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return [found for child in inner for found in objects(child)] + [node] * (
            isinstance(node, dict) and node.get("type") == "object"
        )

    answers = [route["responses"] for item in document["paths"].values() for route in item.values()]
    named = [document["components"]["schemas"][name] for name in ("Welcome", "Refusal", "Session")]
    assert all(found["additionalProperties"] is False for found in objects([answers, named]))


def test_the_document_is_valid(document: Any) -> None:
    openapi_spec_validator.validate(document)


class Walker:
    """Asks, with the cookie it was last given, and holds each answer to the document."""

    def __init__(self, document: Any, call: Client) -> None:
        self.document, self.call = document, call
        self.cookie: str | None = None
        self.seen: Counter[tuple[str, str, int]] = Counter()

    def __call__(self, method: str, path: str, status: int = 200, /, **form: str) -> Any:
        answer = self.call(method, path, form, cookie=self.cookie)
        assert answer.status == status, (method, path, answer.body)
        route = re.sub("/sessions/[0-9a-f]{16}", "/sessions/{id}", path.partition("?")[0])
        documented = self.found(self.document["paths"][route][method.lower()]["responses"][str(status)])
        schema = {**self.document, **documented["content"]["application/json"]["schema"]}
        OAS31Validator(schema, format_checker=oas31_format_checker).validate(answer.json)
        header = self.found(documented["headers"].get("Set-Cookie", {}))
        if said := answer.headers.get("Set-Cookie"):
            assert re.search(header["schema"]["pattern"], said)
            self.cookie = f"session_id={answer.session_id}"
        assert said or not header.get("required")
        self.seen[method, route, status] += 1
        return answer.json

    def found(self, node: Any) -> Any:
        if "$ref" not in node:
            return node
        kind, name = node["$ref"].split("/")[2:]
        return self.document["components"][kind][name]


def test_every_success_is_as_documented(document: Any, call: Client, clock: Clock) -> None:
    ask = Walker(document, call)
    login = {"email": "bob@x.io", "password": "b4l0u"}

    def code() -> str:
        clock.advance(totp.STEP)  # none works twice
        return totp.code(seed, int(clock()) // totp.STEP)

    ask("GET", "/")
    ask("POST", "/users", **login)
    ask("POST", "/sessions", **login)
    ask("GET", "/health")
    ask("GET", "/profile")
    ask("GET", "/verify")
    ask("PUT", "/password", **{**login, "new_password": "t4rt1fl3tt3"})
    login["password"] = "t4rt1fl3tt3"
    seed = ask("POST", "/totp", **login)["secret"]
    recovery_codes = ask("PUT", "/totp", otp=code())["recovery_codes"]
    ask("POST", "/totp", 400, **login)
    ask("POST", "/sessions", 401, **login)
    ask("POST", "/sessions", 401, **login, otp="wrong")
    ask("POST", "/sessions", **login, otp=code())
    ask("DELETE", "/totp", 403, **login, otp="wrong")
    ask("DELETE", "/totp", **login, otp=recovery_codes[0])
    ask("DELETE", "/sessions/others")
    ask("DELETE", "/sessions/0123456789abcdef", 404)
    ask("DELETE", f"/sessions/{ask('GET', '/sessions')['sessions'][0]['id']}")
    for path, status in (("/sessions", 302), ("/sessions/all", 200)):
        ask("POST", "/sessions", **login)
        ask("DELETE", path, status)
    ask("GET", "/verify", 401)
    ask("GET", "/verify?login=1", 302)
    token = ask("POST", "/reset_password", email="bob@x.io")["reset_token"]
    ask("PUT", "/reset_password", email="bob@x.io", reset_token=token, new_password="b4l0u")
    login["password"] = "b4l0u"
    ask("POST", "/sessions", **login)
    ask("DELETE", "/profile", **login)
    successes = {
        (method.upper(), path, int(status))
        for path, item in document["paths"].items()
        for method, route in item.items()
        for status in route["responses"]
        if int(status) < 400
    }
    assert ask.seen.keys() >= successes


def cases(service: Service, folder: Path, cookie: str, examples: int) -> int:
    """Test the service with schemathesis; return how many cases it made of the document, all of which passed."""
    (folder / "schemathesis.toml").write_text(CHECKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", "schemathesis.toml"),
            *("run", str(OPENAPI), "--url", service.url, "--checks", "all", "--warnings", "off"),
            *("--generation-deterministic", "--max-examples", str(examples), "--continue-on-failure"),
        ],
        cwd=folder,
        env={
            **os.environ,
            **UNMEASURED,
            "SCHEMATHESIS_HOOKS": str(HERE / "tests" / "openapi_hooks.py"),
            "OPENAPI_PASSWORD": PASSWORD,
            "OPENAPI_COOKIE": cookie,
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


@pytest.mark.slow
def test_development_answers_as_documented(start: Callable[..., Service], tmp_path: Path, engine: str) -> None:
    service = start(AUTHSVC_THROTTLE="off", AUTHSVC_SESSIONS_PER_USER="100")
    examples, least = {"sqlite": (12, 250), "postgres": (5, 150)}[engine]  # of the same: 5 are among the 12
    assert cases(service, tmp_path, "session_id", examples) >= least


@pytest.mark.once
@pytest.mark.slow
def test_production_answers_as_documented(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start(
        AUTHSVC_PUBLIC_URL="https://auth.example.com",
        AUTHSVC_TRUSTED_PROXY="127.0.0.1",
        AUTHSVC_BCRYPT_COST="10",
        AUTHSVC_SESSIONS_PER_USER="100",
    )
    assert cases(service, tmp_path, "__Host-session_id", 12) >= 250
