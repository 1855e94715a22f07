"""openapi.yaml, held to the routes, and to what a live service answers to what schemathesis makes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
import requests
import yaml

import authsvc
from tests.conftest import HERE, Service

OPENAPI = HERE / "openapi.yaml"
LOGIN = {"email": "owner@example.com", "password": "correct horse battery"}

# Every check is on, and as strict as by default, but for one: that well-formed input is accepted. Here it may also be
# - 400: an email that has an account already, or one that is no mailbox; a password that is too common for production.
# - 401: nobody has this email, or another password.
# - 403: nobody has this email (development says so when a reset is asked for); nobody was given this reset token.
# - 429: production counts logins of one account from all addresses, and the same few emails come again and again.
CHECKS = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "302", "400", "401", "403", "429"]
"""


@pytest.fixture(scope="module")
def document() -> Any:
    return yaml.safe_load(OPENAPI.read_text())


def test_the_document_has_every_route_and_no_other(document: Any) -> None:
    documented = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert documented == {(method, path) for method, path, *_ in authsvc.ROUTES}


def test_the_document_is_of_this_version(document: Any) -> None:
    assert document["info"]["version"] == tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["version"]


def test_the_document_has_the_status_of_every_refusal(document: Any) -> None:
    documented = {
        int(status) for item in document["paths"].values() for route in item.values() for status in route["responses"]
    }
    assert documented >= {*authsvc.STATUS.values(), *authsvc.MESSAGES, 413, 415, 503} - {404}


def test_every_object_in_an_answer_is_exact(document: Any) -> None:
    def objects(node: Any) -> list[Any]:
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        return [found for child in inner for found in objects(child)] + [node] * (
            isinstance(node, dict) and node.get("type") == "object"
        )

    answers = [route["responses"] for item in document["paths"].values() for route in item.values()]
    named = [document["components"]["schemas"][name] for name in ("Welcome", "Refusal")]
    assert all(found["additionalProperties"] is False for found in objects([answers, named]))


def test_the_document_is_valid(document: Any) -> None:
    openapi_spec_validator.validate(document)


def cases(service: Service, folder: Path, cookie: str, examples: int) -> int:
    """Test the service with schemathesis; return how many cases it made of the document, all of which passed."""
    assert requests.post(f"{service.url}/users", LOGIN, timeout=30).status_code == 200
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
            "SCHEMATHESIS_HOOKS": str(HERE / "tests" / "openapi_hooks.py"),
            "OPENAPI_LOGIN": json.dumps(LOGIN),
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
def test_development_answers_as_documented(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start(AUTHSVC_THROTTLE="off", AUTHSVC_SESSIONS_PER_USER="1000")
    assert cases(service, tmp_path, "session_id", 180) >= 1200


@pytest.mark.slow
def test_production_answers_as_documented(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start(
        AUTHSVC_PUBLIC_URL="https://auth.example.com",
        AUTHSVC_TRUSTED_PROXY="127.0.0.1",
        AUTHSVC_BCRYPT_COST="10",
        AUTHSVC_SESSIONS_PER_USER="1000",
    )
    assert cases(service, tmp_path, "__Host-session_id", 60) >= 800
