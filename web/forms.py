"""Request bodies: forms (urlencoded and multipart) and JSON objects, read strictly.

Only the body counts, never the query string, and each field may be given once. Bottle's own reader takes any content
type, decodes as Latin-1 and repairs what is malformed.
"""

import json
import re
from typing import Any
from urllib.parse import parse_qsl, unquote
from wsgiref.types import WSGIEnvironment

from web.responses import MESSAGES, Refusal

MAX_BODY_BYTES = 16_384
MAX_FIELDS = 8

# Parameters of a header, each after a semicolon (RFC 9110, 5.6.6; RFC 7578, 4.2), and a header of a part.
_TCHAR = r"[\w!#$%&'*+.^`|~-]"
_PARAMETER = "(" + _TCHAR + r"""++)[ \t]*+=[ \t]*+("(?:[^"\\]|\\.)*+"|""" + _TCHAR + "*+)"
PARAMETER = re.compile(_PARAMETER, re.ASCII)
PARAMETERS = re.compile(r"(?:[ \t]*+;[ \t]*+(?:" + _PARAMETER + r")?+)*+[ \t]*+", re.ASCII)
PART_HEADER = re.compile("(" + _TCHAR + r"++):[ \t]*+([^\r\n]*+)", re.ASCII)
END = re.compile(rb"--[ \t]*+(?:\r\n|\Z)")

Names = tuple[str, ...]


def read_form(
    environ: WSGIEnvironment, fields: Names = (), optional: Names = (), flags: Names = (), objects: Names = ()
) -> tuple[Any, ...]:
    """Return the values of the required fields, of the optional ones, and of the flags; one that is absent is "".

    After them come those of the ``objects``, which only JSON can carry.

    Raises:
        Refusal: 413 the body is too large, 415 it is of another type, 400 it is malformed or a field is missing, empty,
            repeated or of another kind, or a flag is not "1".
    """
    try:
        pairs = _parse(_read_body(environ), environ.get("CONTENT_TYPE", ""))
    except (ValueError, RecursionError):  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Refusal(400, "malformed body") from None
    if len(pairs) > MAX_FIELDS:
        raise Refusal(400, f"at most {MAX_FIELDS} fields")
    absent = {name for name in optional if [value for key, value in pairs if key == name] in ([], [""])}
    absent |= set(flags) - {key for key, _ in pairs}
    for name in set(flags) - absent:
        if _field(pairs, name) != "1":
            raise Refusal(400, f"{name} must be 1")
    texts = ["" if name in absent else _field(pairs, name) for name in fields + optional + flags]
    return (*texts, *(_object(pairs, name) for name in objects))


def _read_body(environ: WSGIEnvironment) -> bytes:
    length = int(environ.get("CONTENT_LENGTH") or -1)
    if length < 0:  # no length was given: only a server that ends the stream itself can be read to its end
        length = MAX_BODY_BYTES + 1 if environ.get("wsgi.input_terminated") else 0
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
    # RFC 7578 and RFC 2046, 5.1.1, as far as a form of plain fields needs them. What surrounds the parts is ignored.
    # Many clients do not quote a boundary that has other characters than a token.
    parameters = re.sub(r"""(\bboundary[ \t]*=[ \t]*)([^\s";]+)""", r'\1"\2"', parameters, count=1, flags=re.IGNORECASE)
    boundary = _parse_parameters(f";{parameters}").get("boundary", "")
    _, *parts, end = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    if not (1 <= len(boundary) <= 70 and END.match(end)):
        raise ValueError
    return [_parse_part(part) for part in parts]


def _parse_part(part: bytes) -> tuple[str, str | None]:
    """Return the name of a field and its value; None for a file, which is no text."""
    head, blank, value = part.partition(b"\r\n\r\n")
    padding, *lines = re.sub(r"\r\n[ \t]+", " ", head.decode()).split("\r\n")  # unfolded
    found = [PART_HEADER.fullmatch(line) for line in lines]
    headers = {line[1].lower(): line[2] for line in found if line}
    if not blank or padding.strip(" \t") or len(headers) != len(lines):  # a line is malformed or repeated
        raise ValueError
    if headers.get("content-transfer-encoding", "binary").strip(" \t").lower() not in ("7bit", "8bit", "binary"):
        raise Refusal(400, "Content-Transfer-Encoding must be 7bit, 8bit or binary")
    declared = re.search(r'charset[ \t]*=[ \t]*"?([^\s";]+)', headers.get("content-type", ""), re.IGNORECASE)
    if declared and declared[1].lower() not in ("utf-8", "us-ascii"):
        raise Refusal(400, "charset must be utf-8")
    kind, semicolon, rest = headers.get("content-disposition", "").partition(";")
    parameters = _parse_parameters(semicolon + rest)
    name = parameters.get("name")
    if "name*" in parameters:  # RFC 8187, 3.2: some clients encode a name so
        charset, _, encoded = parameters["name*"].split("'", 2)
        decoded = unquote(encoded, errors="strict") if charset.lower() == "utf-8" else None
        name = decoded if name in (None, decoded) else None
    if name is None or kind.strip(" \t").lower() != "form-data":
        raise ValueError
    return name, None if {"filename", "filename*"} & parameters.keys() else value.decode()


def _parse_parameters(text: str) -> dict[str, str]:
    if not PARAMETERS.fullmatch(text):  # first: findall() alone takes quadratic time
        raise ValueError
    pairs = PARAMETER.findall(text)
    values = {name.lower(): value[1:-1] if value.startswith('"') else value for name, value in pairs}
    if len(values) != len(pairs):  # one is repeated
        raise ValueError
    return values


def _given(pairs: list[tuple[str, Any]], name: str) -> Any:
    values = [value for key, value in pairs if key == name]
    if not values:
        raise Refusal(400, f"{name} is missing")
    if len(values) > 1:
        raise Refusal(400, f"{name} is given more than once")
    return values[0]


def _object(pairs: list[tuple[str, Any]], name: str) -> dict[str, Any]:
    if not isinstance(value := _given(pairs, name), tuple):
        raise Refusal(400, f"{name} must be an object")
    return {key: dict(part) if isinstance(part, tuple) else part for key, part in value}


def _field(pairs: list[tuple[str, Any]], name: str) -> str:
    value = _given(pairs, name)
    if not isinstance(value, str):
        raise Refusal(400, f"{name} must be text")
    if not value:
        raise Refusal(400, f"{name} is empty")
    # JSON can carry a lone surrogate, which is no text. NUL is allowed in a password, where every byte counts.
    if any("\ud800" <= character <= "\udfff" for character in value) or ("\0" in value and "password" not in name):
        raise Refusal(400, f"{name} is not valid text")
    return value
