"""The parts of a response: JSON bodies, common headers, request ids and status lines."""

from __future__ import annotations

import json
import re

import pytest

from tests.cases import each
from web.responses import HSTS, SECURITY_HEADERS, common_headers, json_body, json_response, new_request_id, status_line


@each("text", ["", "é", "\u2028", '"\\/', "\r\n\0", "\ud800", "</script>"])
def test_a_json_body_is_ascii_and_reads_back_equal(text: str) -> None:
    content = {"message": text, "nested": [{"text": text, "number": 1, "flag": True, "nothing": None}]}
    body = json_body(content)
    assert body.isascii()
    assert json.loads(body) == content


def test_a_json_response_states_its_type_and_length() -> None:
    response = json_response(200, ("Location", "/"), message="é")
    assert response.status == 200
    assert response.headers == [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(response.body))),
        ("Location", "/"),
    ]


def test_production_adds_strict_transport_security() -> None:
    assert common_headers(production=False) == list(SECURITY_HEADERS)
    assert common_headers(production=True) == [*SECURITY_HEADERS, HSTS]


def test_a_request_id_is_64_random_bits_in_hex() -> None:
    ids = {new_request_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch("[0-9a-f]{16}", request_id) for request_id in ids)


@pytest.mark.parametrize(("status", "line"), [(200, "200 OK"), (302, "302 Found"), (429, "429 Too Many Requests")])
def test_a_status_line_has_the_reason_phrase(status: int, line: str) -> None:
    assert status_line(status) == line
