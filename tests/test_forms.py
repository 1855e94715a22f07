"""Request bodies: urlencoded forms, JSON objects and multipart forms, read strictly or refused."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import multipart_form_data_conformance
import pytest
import requests
from multipart import MultipartError, MultipartParser

from tests.cases import each
from tests.conftest import Client
from tests.routes import (
    BOB,
    FIELDS,
    FORMS,
    SharedApp,
    as_json,
    assert_200,
    cookie_of,
    log_in,
    open_shared_app,
    profile_status,
    register,
)
from web.forms import MAX_BODY_BYTES, _parse_multipart, read_form
from web.responses import Refusal

URLENCODED = "application/x-www-form-urlencoded"
BOUNDARY = "------------------------d8485b124768d608"
NAMES = "email", "password"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedApp]:
    with open_shared_app(tmp_path_factory.mktemp("shared")) as app:
        yield app


def read(
    body: bytes, content_type: str = URLENCODED, *, names: tuple[str, ...] = NAMES, **environ: Any
) -> tuple[str, ...]:
    """Read the fields of a body as a route does."""
    environ = {
        "CONTENT_TYPE": content_type,
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        **environ,
    }
    return read_form(environ, names)


def refusal(body: bytes, content_type: str = URLENCODED, **rest: Any) -> tuple[int, str]:
    """Return the status and the message of the refusal of a body."""
    with pytest.raises(Refusal) as caught:
        read(body, content_type, **rest)
    return caught.value.status, caught.value.message


def multipart(pairs: Any, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> dict[str, Any]:
    """Return a body as ``curl -F`` sends it."""
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in pairs
    ]
    return {"body": "".join([*parts, f"--{BOUNDARY}--\r\n"]).encode(), "content_type": content_type}


# Fields, on the wire: each route reads its own fields, and each of them strictly


@each(("method", "path", "field"), FIELDS)
def test_a_missing_field_is_refused(shared: SharedApp, method: str, path: str, field: str) -> None:
    form = {name: value for name, value in shared.form.items() if name != field}
    assert shared.refuses(400, method, path, form) == f"{field} is missing"


@each(("method", "path", "field"), FIELDS)
def test_an_empty_field_is_refused(shared: SharedApp, method: str, path: str, field: str) -> None:
    assert shared.refuses(400, method, path, {**shared.form, field: ""}) == f"{field} is empty"


@each(("method", "path", "fields"), FORMS)
def test_a_repeated_field_is_refused(shared: SharedApp, method: str, path: str, fields: tuple[str, ...]) -> None:
    form = [(field, shared.form[field]) for field in fields]
    for field in fields:
        for again in ("", "other", shared.form[field]):
            for pairs in ([*form, (field, again)], [(field, again), *form]):
                assert shared.refuses(400, method, path, pairs) == f"{field} is given more than once"


def test_an_undecodable_field_is_refused(shared: SharedApp) -> None:
    for method, path, field in FIELDS:
        others = [f"{name}={value}".encode() for name, value in shared.form.items() if name != field]
        body = b"&".join([*others, field.encode() + b"=%ff"])
        assert shared.refuses(400, method, path, body=body) == "malformed body"
    for junk in (b"\xff", b"\xc3", b"%ff", b"%C3", b"%ED%A0%80", b"a%FFb", b"%c0%80"):
        assert refusal(b"email=bob@x.io&password=" + junk) == (400, "malformed body")


def test_a_json_field_that_is_no_text_is_refused(shared: SharedApp) -> None:
    for method, path, field in FIELDS:
        assert shared.refuses(400, method, path, **as_json({**shared.form, field: 1})) == f"{field} must be text"
    for value in (None, 1, 1.5, True, ["bob@x.io"], {"a": "b"}, [], {}):
        assert refusal(**as_json({**BOB, "email": value})) == (400, "email must be text")


def test_a_lone_surrogate_is_refused(shared: SharedApp) -> None:
    for method, path, field in FIELDS:
        message = shared.refuses(400, method, path, **as_json({**shared.form, field: "a\ud800"}))
        assert message == f"{field} is not valid text"
    for value in ("\ud800", "\udfff", "\udc00\ud800", "a\udbffb"):
        assert refusal(**as_json({**BOB, "password": value})) == (400, "password is not valid text")


def test_nul_is_refused_in_all_fields_but_a_password(shared: SharedApp) -> None:
    for method, path, field in FIELDS:
        if "password" not in field:
            message = shared.refuses(400, method, path, {**shared.form, field: f"{shared.form[field]}\0"})
            assert message == f"{field} is not valid text"
    for value in (b"%00bob@x.io", b"bob%00@x.io", b"bob@x.io%00", b"%00", b"bob@x.io\0"):
        assert refusal(b"password=b4l0u&email=" + value) == (400, "email is not valid text")
    assert read(b"email=bob@x.io&password=a%00b") == ("bob@x.io", "a\0b")


@each(
    ("otp", "reason"),
    [
        (None, "must be text"),
        (492039, "must be text"),
        (["1"], "must be text"),
        ("\ud800", "is not valid text"),
        ("1\0", "is not valid text"),
    ],
)
def test_an_optional_field_is_checked_like_the_others(shared: SharedApp, otp: Any, reason: str) -> None:
    assert shared.refuses(400, "POST", "/sessions", **as_json({**BOB, "otp": otp})) == f"otp {reason}"


def test_more_than_8_fields_are_refused(shared: SharedApp) -> None:
    padding = [(f"extra{number}", "") for number in range(6)]
    eight = [*BOB.items(), *padding]
    nine = [*eight, ("extra", "")]
    assert shared.call("POST", "/sessions", [("email", "nobody"), *eight[1:]]).status == 401
    for rest in ({"form": nine}, {"form": nine * 3}, as_json(dict(nine)), multipart(nine)):
        assert shared.refuses(400, "POST", "/sessions", **rest) in ("at most 8 fields", "malformed body")


@each(("method", "path", "fields"), FORMS)
def test_the_query_string_never_counts(shared: SharedApp, method: str, path: str, fields: tuple[str, ...]) -> None:
    query = "&".join(f"{name}={value}" for name, value in shared.form.items())
    assert shared.refuses(400, method, f"{path}?{query}") == f"{fields[0]} is missing"


def test_the_query_string_adds_nothing_to_the_body(call: Client) -> None:
    register(call)
    answer = call("POST", "/sessions?email=eve@x.io&password=b", BOB)
    assert answer.json["email"] == "bob@x.io"
    assert call("GET", f"/profile?{cookie_of(answer)}").status == 403
    assert profile_status(call, cookie_of(answer)) == 200


# Content types


@pytest.mark.parametrize("content_type", [f"{URLENCODED}; charset=utf-8", URLENCODED.upper(), f"{URLENCODED} ; a=b"])
def test_the_type_of_a_form_may_have_parameters(content_type: str) -> None:
    assert read(b"email=bob@x.io&password=p", content_type) == ("bob@x.io", "p")


@each(
    "content_type",
    ["", "text/plain", "text/plain; charset=utf-8", "text/html", "application/xml", "application/octet-stream", "a"],
)
def test_another_content_type_is_refused(shared: SharedApp, content_type: str) -> None:
    for method, path, _ in FORMS:
        shared.refuses(415, method, path, shared.form, content_type=content_type)


@each(("method", "path", "fields"), FORMS)
def test_no_body_and_no_content_type_is_a_missing_field(
    shared: SharedApp, method: str, path: str, fields: tuple[str, ...]
) -> None:
    assert shared.refuses(400, method, path, body=b"", content_type="") == f"{fields[0]} is missing"


# JSON


@each("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
@each("text", [json.dumps(BOB), '{"email": "\\u0062ob@x.io", "password": "b4l0u", "n": [1, {}]}'])
def test_a_json_object_is_accepted(content_type: str, text: str) -> None:
    assert read(text.encode(), content_type) == ("bob@x.io", "b4l0u")


def test_json_in_raw_utf_8_is_accepted_by_the_routes(call: Client) -> None:
    answer = call("POST", "/users", **as_json('{"email": "é@x.io", "password": "ü"}'))
    assert_200(answer, {"email": "é@x.io", "message": "user created"})
    assert log_in(call, "é@x.io", "ü").status == 200


@each(
    "text",
    [
        "",
        "{",
        "{}{}",
        "[]",
        "[1]",
        '["x"]',
        '["ab"]',
        '[["email", "array@x.io"], ["password", "p"]]',
        '[{"email": "nobody"}]',
        "1",
        "null",
        '"email"',
        "9" * 5000,
        "[" * 16_000,
        '{"a":' * 3000,
        "email=nobody&password=p",
        '\ufeff{"email": "nobody", "password": "p"}',
    ],
)
def test_json_that_is_no_object_is_refused(shared: SharedApp, text: str) -> None:
    assert shared.refuses(400, "POST", "/users", **as_json(text)) == "malformed body"


def test_json_that_is_not_utf_8_is_refused() -> None:
    body = '{"email": "é", "password": "p"}'.encode("latin-1")
    assert refusal(body, "application/json") == (400, "malformed body")


def test_a_repeated_json_key_is_refused(shared: SharedApp) -> None:
    text = '{"email": "nobody", "password": "p", "email": "bob@x.io"}'
    assert shared.refuses(400, "POST", "/users", **as_json(text)) == "email is given more than once"


# The size of a body


def padded(size: int) -> bytes:
    body = b"email=big@x.io&password=b4l0u&padding="
    return body + b"a" * (size - len(body))


def test_a_body_of_16_kib_is_read() -> None:
    assert MAX_BODY_BYTES == 16_384
    assert read(padded(16_384)) == ("big@x.io", "b4l0u")


@pytest.mark.parametrize("size", [16_385, 100_000])
def test_a_larger_body_is_refused(shared: SharedApp, size: int) -> None:
    assert shared.refuses(413, "POST", "/users", body=padded(size)) == "request body too large"


def test_a_larger_body_is_not_read_to_its_end() -> None:
    stream = io.BytesIO(padded(100_000))
    environ: dict[str, Any] = {"CONTENT_LENGTH": "100000", "wsgi.input": stream}
    assert refusal(b"", **environ) == (413, "request body too large")
    assert stream.tell() == 16_385


def test_a_body_is_read_no_further_than_its_length() -> None:
    # Some servers do not end the stream there, so that reading on would wait for the next request.
    stream = io.BytesIO(b"email=nobody&password=p&email=next request")
    environ: dict[str, Any] = {"CONTENT_LENGTH": "23", "wsgi.input": stream}
    assert read(b"", **environ) == ("nobody", "p")
    assert stream.tell() == 23


def test_a_body_without_a_length_is_read_only_where_the_server_ends_it() -> None:
    body = b"email=nobody&password=p"
    assert refusal(body, CONTENT_LENGTH="") == (400, "email is missing")
    ended: dict[str, Any] = {"wsgi.input_terminated": True, "CONTENT_LENGTH": ""}
    assert read(body, **ended) == ("nobody", "p")
    assert refusal(padded(16_385), **ended) == (413, "request body too large")


def test_a_malformed_length_is_refused(shared: SharedApp) -> None:
    for length in ("x", "1x", "0x10", "1.0", "--1"):
        assert shared.refuses(400, "POST", "/users", BOB, CONTENT_LENGTH=length) == "malformed body"


# Multipart


@each(
    "content_type",
    [
        f"multipart/form-data; boundary={BOUNDARY}",
        f'multipart/form-data; boundary="{BOUNDARY}"',
        f"Multipart/Form-Data; charset=utf-8; Boundary={BOUNDARY}",
        f'multipart/form-data;boundary="{BOUNDARY}"; charset=utf-8',
    ],
)
def test_multipart_from_curl_is_accepted(content_type: str) -> None:
    assert read(**multipart(BOB.items(), content_type)) == ("bob@x.io", "b4l0u")


def test_multipart_from_curl_with_a_type_for_a_field_is_accepted() -> None:
    # curl -F 'email=bob@x.io;type=text/plain' -F password=b4l0u
    rest = multipart(BOB.items())
    rest["body"] = rest["body"].replace(b'name="email"\r\n', b'name="email"\r\nContent-Type: text/plain\r\n')
    assert read(**rest) == ("bob@x.io", "b4l0u")


def test_multipart_from_requests_is_accepted_by_the_routes(call: Client) -> None:
    files = {name: (None, value) for name, value in BOB.items()}
    sent = requests.Request("POST", "http://127.0.0.1/users", files=files).prepare()
    assert isinstance(sent.body, bytes)
    answer = call("POST", "/users", body=sent.body, content_type=sent.headers["Content-Type"])
    assert_200(answer, {"email": "bob@x.io", "message": "user created"})
    assert log_in(call).status == 200


def test_a_multipart_value_is_read_unchanged() -> None:
    for password in ("é用🐟", "one\r\ntwo", "\r\n", "a\r\n\r\nb", f"a--{BOUNDARY}", "a\n--b", "a\0b", " "):
        assert read(**multipart({"email": "é", "password": password}.items())) == ("é", password)


@pytest.mark.parametrize("field", ["email", "password"])
def test_multipart_fields_are_checked_like_all_others(shared: SharedApp, field: str) -> None:
    missing, empty = ([(name, value) for name, value in BOB.items() if name != field], {**BOB, field: ""}.items())
    repeated = [*BOB.items(), (field, "other")]
    assert shared.refuses(400, "POST", "/users", **multipart(missing)) == f"{field} is missing"
    assert shared.refuses(400, "POST", "/users", **multipart(empty)) == f"{field} is empty"
    assert shared.refuses(400, "POST", "/users", **multipart(repeated)) == f"{field} is given more than once"


def test_a_file_is_refused_as_a_field(shared: SharedApp) -> None:
    # curl -F email=@a.txt -F password=b4l0u
    rest = multipart(BOB.items())
    file = b'name="email"; filename="a.txt"\r\nContent-Type: text/plain\r\n'
    rest["body"] = rest["body"].replace(b'name="email"\r\n', file)
    assert shared.refuses(400, "POST", "/sessions", **rest) == "email must be text"


def test_a_file_in_another_field_is_ignored() -> None:
    rest = multipart([*BOB.items(), ("extra", "e")])
    rest["body"] = rest["body"].replace(b'name="extra"', b'name="extra"; filename="a.bin"')
    rest["body"] = rest["body"].replace(b"\r\ne\r\n", b"\r\n\xff\r\n")
    assert read(**rest) == ("bob@x.io", "b4l0u")


@each(
    ("old", "new"),
    [
        (b"bob", b"\xff"),
        (b' name="email"', b""),
        (b' name="email"', b' name="email"; name="email"'),
        (b' name="email"', b' name="email"; x'),
        (b' name="email"', b' name="email"; x="'),
        (b' name="email"', b' name="email" x=y'),
        (b' name="email"', b' name= "email'),
        (b' name="email"', b" name=\"password\"; name*=utf-8''email"),
        (b' name="email"', b" name*=latin-1''email"),
        (b' name="email"', b" name*=email"),
        (b' name="email"', b" name*=utf-8''%ff"),
        (b"\r\nContent-Disposition", b"\r\n Content-Disposition"),
        (b"\r\nContent-Disposition", b"\r\nX\r\nContent-Disposition"),
        (b"\r\nContent-Disposition", b"\nContent-Disposition"),
        (b"Content-Disposition", b"Content-Disposition: form-data; name=x\r\nContent-Disposition"),
        (b"Content-Disposition:", b"Content-Disposition :"),
        (b"\r\n\r\n", b"\n\n"),
        (b"\r\n\r\n", b"\r\nX: a\rb\r\n\r\n"),
        (b"d608\r\n", b"d608x\r\n"),
        (b"d608--", b"d608-- x"),
        (b"--\r\n", f"--\r\n--{BOUNDARY}--\r\n".encode()),
        (b"form-data", b"attachment"),
        (b"Content-Disposition", b"Content-Type"),
        (b"\r\n\r\n", b"\r\n"),
        (b"--\r\n", b""),
        (b"--\r\n", b"\r\n"),
        (b"d608--", b"d6"),
        (BOUNDARY.encode(), b"other"),
    ],
)
def test_malformed_multipart_is_refused(shared: SharedApp, old: bytes, new: bytes) -> None:
    rest = multipart([("email", "bob2@x.io"), ("password", "p")])
    assert old in rest["body"]
    assert shared.refuses(400, "POST", "/users", **{**rest, "body": rest["body"].replace(old, new)}) == "malformed body"


def test_a_multipart_name_needs_no_quotes() -> None:
    rest = multipart(BOB.items())
    assert read(rest["body"].replace(b'"', b""), rest["content_type"]) == ("bob@x.io", "b4l0u")


@each(
    ("old", "new"),
    [
        (b"", b""),
        (b"--\r\n", b"--\r\nepilogue\r\n--another\r\n"),
        (b"--\r\n", b"--"),
        (b"--\r\n", b"-- \t\r\n"),
        (b"d608\r\n", b"d608 \t\r\n"),
        (b"form-data; name=", b"Form-Data\t;name\t= "),
        (b"form-data; name=", b'form-data; x="a;name=b\\"c" ; name='),
        (b"form-data; name=", b"form-data;\r\n\tname="),
        (b": form-data;", b":form-data;;"),
        (b"Content-Disposition:", b"X-A:\r\nCONTENT-DISPOSITION:\r\n "),
        (b'name="email"', b"Name=email;"),
        (b'name="email"', b"name*=UTF-8'en'e%6Dail"),
        (b'name="email"', b"name=email; name*=utf-8''email"),
        (b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: 8BIT \r\n\r\n"),
        (b"\r\n\r\n", b"\r\ncontent-transfer-encoding:binary\r\n\r\n"),
    ],
)
def test_multipart_may_be_spelled_in_every_way_of_its_standards(old: bytes, new: bytes) -> None:
    rest = multipart(BOB.items())
    for before in (b"", b"\r\n", b"preamble\r\n", b"--other\r\n\r\n"):
        assert read(before + rest["body"].replace(old, new), rest["content_type"]) == ("bob@x.io", "b4l0u")


@each("encoding", [b"base64", b"quoted-printable", b"7bit, 8bit", b"x-uue", b""])
def test_an_encoded_part_is_refused_by_the_name_of_the_header(encoding: bytes) -> None:
    rest = multipart(BOB.items())
    rest["body"] = rest["body"].replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: " + encoding + b"\r\n\r\n")
    assert refusal(**rest) == (400, "Content-Transfer-Encoding must be 7bit, 8bit or binary")


@pytest.mark.parametrize(("charset", "is_read"), [(b"UTF-8", True), (b'"us-ascii"', True), (b"utf-16", False)])
def test_a_part_in_another_charset_is_refused(charset: bytes, is_read: bool) -> None:
    rest = multipart(BOB.items())
    rest["body"] = rest["body"].replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain; charset=" + charset + b"\r\n\r\n")
    assert (read(**rest) == tuple(BOB.values())) if is_read else (refusal(**rest) == (400, "charset must be utf-8"))


@each(
    "head",
    [
        b";" * 16_000,
        b"a" * 16_000,
        b"a=" * 8000,
        b";a=" + b" " * 16_000 + b"\0",
        b";a=" + b'"' * 15_999,
        b';a="' + b"\\" * 16_000,
        b"\r\n " * 5000,
    ],
)
def test_multipart_is_refused_in_linear_time(head: bytes) -> None:
    body = b"--b\r\nContent-Disposition: form-data" + head + b"\r\n\r\n\r\n--b--"
    began = time.thread_time()
    assert refusal(body[:MAX_BODY_BYTES], "multipart/form-data; boundary=b") == (400, "malformed body")
    assert refusal(b"", f"multipart/form-data; {head.decode()}") == (400, "malformed body")
    assert time.thread_time() - began < 0.1


def fields_of(body: bytes, parameters: str) -> list[tuple[str, str | None]] | None:
    """Return all fields of a multipart form, None for a file; None if the form is refused."""
    with suppress(ValueError):
        return _parse_multipart(body, parameters)
    return None


CASES = sorted(path.parent for path in multipart_form_data_conformance.get_tests_dir().glob("*/*/test.json"))
# Lines that end with LF alone, and a repeated Content-Disposition. The cases are optional; here they are refused.
LENIENT = {"061-lf-only-lenient", "062-mixed-endings", "208-duplicate-headers"}


@each("case", CASES)
def test_multipart_is_read_as_the_conformance_tests_say(case: Path) -> None:
    content_type = json.loads((case / "headers.json").read_text())["content-type"]
    expected = json.loads((case / "test.json").read_text(encoding="utf-8"))["expected"]
    fields = None
    if expected["valid"] and case.name not in LENIENT:
        fields = [(part["name"], None if is_file(part) else text_of(part)) for part in expected["parts"]]
    assert fields_of((case / "input.raw").read_bytes(), content_type.partition(";")[2]) == fields


def is_file(part: dict[str, Any]) -> bool:
    return part["filename"] is not None or "filename_star" in part


def text_of(part: dict[str, Any]) -> str:
    return part["body_text"] if "body_text" in part else base64.b64decode(part["body_base64"]).decode()


def fields_of_another(body: bytes) -> list[tuple[str, str | None]] | None:
    """Return the same as the package multipart reads it, which gives an empty name to a field whose name it misses."""
    with suppress(MultipartError, UnicodeDecodeError):
        parts = list(MultipartParser(io.BytesIO(body), "b", content_length=len(body)))
        if all(part.name for part in parts):
            return [(part.name, None if part.filename is not None else part.value) for part in parts]
    return None


@pytest.mark.slow
def test_accepted_multipart_is_read_as_another_parser_does() -> None:
    body = b'--b\r\nContent-Disposition: form-data; name="e"\r\n\r\nv\r\n--b\r\nX: y\r\nContent-Disposition: '
    body += b"form-data; x=z; name=p\r\n\r\n\r\n--b--\r\n"
    pieces = [b"", b"\r\n", b"\r\n ", b"\r\n--b", *(bytes([byte]) for byte in b'aA0\0\t\n\r :;="-*\x7f\x80')]
    compared = 0
    for at in range(len(body)):
        for piece in pieces:
            for changed in (body[:at] + piece + body[at + 1 :], body[:at] + piece + body[at:]):
                ours, theirs = fields_of(changed, "boundary=b"), fields_of_another(changed)
                assert None in (ours, theirs) or ours == theirs, changed
                compared += ours is not None and theirs is not None
    assert compared > 700


@each("length", [0, 1, 60, 150])
def test_truncated_multipart_is_refused(length: int) -> None:
    rest = multipart(BOB.items())
    assert refusal(rest["body"][:length], rest["content_type"]) == (400, "malformed body")


@each("parameters", ["", ";", "; boundary=", '; boundary=""', "; boundary=other", "; charset=utf-8"])
def test_multipart_without_its_boundary_is_refused(parameters: str) -> None:
    assert refusal(**multipart(BOB.items(), f"multipart/form-data{parameters}")) == (400, "malformed body")


def test_multipart_without_a_part_is_a_missing_field() -> None:
    assert refusal(**multipart([])) == (400, "email is missing")
