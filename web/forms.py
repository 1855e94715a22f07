"""Request bodies: forms (urlencoded and multipart) and JSON objects, read strictly.

Only the body counts, never the query string, and each field may be given once. Bottle's own reader takes any content
type, decodes as Latin-1 and repairs what is malformed.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from urllib.parse import parse_qsl
from wsgiref.types import WSGIEnvironment

from web.responses import MESSAGES, Refusal

MAX_BODY_BYTES = 16_384
MAX_FIELDS = 8

PART_NAME = re.compile(rb"""\r\nContent-Disposition: *form-data; *name=("?)([^"\r\n;]*)\1(;|\r\n|$)""", re.IGNORECASE)


def read_form(environ: WSGIEnvironment, *names: str, optional: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the values of the named fields, then of the optional ones; an optional field that is absent is "".

    Raises:
        Refusal: 413 the body is too large, 415 it is of another type, 400 it is malformed or a field is missing, empty,
            repeated or no text.
    """
    try:
        pairs = _parse(_read_body(environ), environ.get("CONTENT_TYPE", ""))
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Refusal(400, "malformed body") from None
    if len(pairs) > MAX_FIELDS:
        raise Refusal(400, f"at most {MAX_FIELDS} fields")
    absent = {name for name in optional if [value for key, value in pairs if key == name] in ([], [""])}
    return tuple("" if name in absent else _field(pairs, name) for name in names + optional)


def _read_body(environ: WSGIEnvironment) -> bytes:
    length = int(environ.get("CONTENT_LENGTH") or -1)
    if length < 0:  # no length was given: only a server that ends the stream itself can be read to its end
        length = sys.maxsize if environ.get("wsgi.input_terminated") else 0
    body: bytes = environ["wsgi.input"].read(min(length, MAX_BODY_BYTES + 1))
    if len(body) > MAX_BODY_BYTES:
        raise Refusal(413, MESSAGES[413])
    return body


def _parse(body: bytes, content_type: str) -> list[tuple[str, Any]]:
    kind, _, parameters = content_type.partition(";")
    kind = kind.strip().lower()
    if kind == "application/x-www-form-urlencoded" or not (body or kind):
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=2 * MAX_FIELDS)
    if kind == "application/json":
        pairs = json.loads(body.decode(), object_pairs_hook=tuple)  # a dict would hide a repeated name
        if not isinstance(pairs, tuple):
            raise ValueError
        return list(pairs)
    if kind == "multipart/form-data":
        return _parse_multipart(body, parameters)
    raise Refusal(415, "send a form (application/x-www-form-urlencoded, multipart/form-data) or a JSON object")


def _parse_multipart(body: bytes, parameters: str) -> list[tuple[str, str | None]]:
    # RFC 7578, as far as a form of plain fields needs it: no transfer encodings, no nesting; a file (None) is no text.
    boundary = re.search(r"""boundary=(?:"([^"]{1,70})"|([^\s";]{1,70}))""", parameters, re.ASCII | re.IGNORECASE)
    if not boundary:
        raise ValueError
    preamble, *parts, end = (b"\r\n" + body).split(b"\r\n--" + (boundary[1] or boundary[2]).encode())
    if preamble or end.rstrip(b"\r\n") != b"--":
        raise ValueError
    pairs = []
    for part in parts:
        head, blank, value = part.partition(b"\r\n\r\n")
        name = PART_NAME.search(head)
        if not (blank and name):
            raise ValueError
        pairs.append((name[2].decode(), None if name[3] == b";" else value.decode()))
    return pairs


def _field(pairs: list[tuple[str, Any]], name: str) -> str:
    values = [value for key, value in pairs if key == name]
    if not values:
        raise Refusal(400, f"{name} is missing")
    if len(values) > 1:
        raise Refusal(400, f"{name} is given more than once")
    value = values[0]
    if not isinstance(value, str):
        raise Refusal(400, f"{name} must be text")
    if not value:
        raise Refusal(400, f"{name} is empty")
    # JSON can carry a lone surrogate, which is no text. NUL is allowed in a password, where every byte counts.
    if any("\ud800" <= character <= "\udfff" for character in value) or ("\0" in value and "password" not in name):
        raise Refusal(400, f"{name} is not valid text")
    return value
