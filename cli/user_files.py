"""Users in files: CSV with a header, JSON lines, and htpasswd.

Parses lines into checked users and writes users as lines. It opens no file and uses no database. What a line says is
read in the forms that other systems write, but a value that could mean two things is refused.
"""

import base64
import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from auth import NO_PASSWORD, check_groups
from credentials import passwords
from log import timestamp
from settings import RANGES
from storage import User
from tables.rate_limits import CLOCK_TOLERANCE

# File name suffix: format.
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".htpasswd": "htpasswd"}
FIELDS = "email", "hashed_password", "created", "disabled", "totp_secret", "cut_at_72", "groups"
NAMES = {field.replace("_", ""): field for field in FIELDS}  # without case, blanks and punctuation: field
NAMES |= dict.fromkeys(("hash", "password", "passwordhash", "encryptedpassword", "passworddigest"), "hashed_password")
BOOLEANS = dict.fromkeys(("", "false", "f", "no", "n", "off", "0"), False)
BOOLEANS |= dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True)
NULLS = "null", "none", "nil", "\\n"  # what databases write for no value
SCHEME = re.compile(r"\{(blf-|b)?crypt\}(?=\$)", re.IGNORECASE)  # what Dovecot and Spring write before a hash
# What may be a hash, a seed or a part of one in the wrong column. Long words in an email are not.
SECRET = re.compile(r"\$|[\w+/=]{24}|(\w{4}[ -]){4}|\A[^@]*[\w+/=]{16}[^@]*\Z")
# A spreadsheet takes a value that begins so for a formula, or its full-width form.
FORMULA = re.compile(r"'*\s*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
MAX_SEED_BYTES = 64  # of an imported TOTP seed: the block size of SHA-1; a longer key adds no security (RFC 2104)
MIN_SEED_BYTES = 16  # of an imported TOTP seed: 128 bits (RFC 4226 4, R6)

Record = dict[str, Any] | ValueError  # the fields of a line, or the reason why it has none


class UnknownFormat(Exception):
    """The format of a file cannot be determined; the message says what to do."""


def detect_format(path: str, chosen: str | None) -> str:
    """Return the chosen format, or the one that the file's name indicates.

    Raises:
        UnknownFormat: no format was chosen, and the name indicates none.
    """
    form = chosen or FORMATS.get((Path(path).suffix or Path(path).name).lower())
    if not form:
        raise UnknownFormat(f"cannot tell the format of {path} from its name: add --format csv, jsonl or htpasswd")
    return form


def read_records(file: io.BufferedReader | io.BytesIO, form: str) -> Iterator[tuple[int, Record]]:
    """Yield the number of each line with its fields, or with the error that makes it unreadable.

    Raises:
        UnknownFormat: the header of a CSV file lacks a required column, or UTF-16 is not valid.
    """
    lines = _decode_lines(io.BufferedReader(file))
    if form == "csv":
        yield from _read_csv(lines)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip() and not (form == "htpasswd" and line.startswith("#")):
            yield number, _parse_htpasswd(line) if form == "htpasswd" else _parse_json(line)


def parse_user(record: Record, check_email: Callable[[str], None], now: int, *, cut_at_72: bool = False) -> User:
    """Return the user that a record describes; the id is 0 until the user is stored.

    ``check_email`` raises ValueError for an email that an account cannot have. ``now`` is in unix seconds.
    ``cut_at_72`` says that the system which made the hash ignores all bytes of a password after 72.

    Raises:
        ValueError: the record describes no user; the message gives the reason.
    """
    if isinstance(record, ValueError):
        raise record
    text = {name: _text(name, record.get(name)) for name in FIELDS}
    hashes = [name for name, value in record.items() if name not in FIELDS and passwords.cost_of(f"{value}")]
    if hashes and not text["hashed_password"]:
        raise ValueError(_is_hash(hashes[0]))
    for name, check in (("email", check_email), ("groups", _parse_groups)):
        try:
            check(text[name])
        except ValueError as error:
            raise ValueError(f"{named(name, text[name])}: {error}") from None
    hashed = SCHEME.sub("", text["hashed_password"]) or NO_PASSWORD
    _check_hash(hashed)
    return User(
        id=0,
        email=text["email"],
        hashed_password=hashed,
        created_at=_parse_created(text["created"], now) if text["created"] else now,
        disabled_at=now if _parse_boolean("disabled", text["disabled"]) else None,
        totp_secret=_parse_seed(text["totp_secret"]) if text["totp_secret"] else None,
        totp_since=now if text["totp_secret"] else None,
        cut_salt=passwords.salt_of(hashed) if _parse_boolean("cut_at_72", text["cut_at_72"]) or cut_at_72 else None,
        groups=_parse_groups(text["groups"]),
    )


def named(name: str, value: str) -> str:
    """Return the name of a field with its value, without it where that may be a hash or another secret."""
    return name if SECRET.search(value) else f"{name} {value!r:.80}"


def write_users(users: Iterable[User], file: IO[str], form: str) -> Iterator[bool]:
    """Write the users to a file. Yield for each whether it was written: the format may be unable to represent it."""
    if form == "csv":
        file.write(",".join(FIELDS) + "\n")
    for user in users:
        record = _to_record(user)
        fits = form != "htpasswd" or _fits_htpasswd(record)
        if form == "csv":
            # Some spreadsheets split at semicolons or tabs, and the part after one could be a formula.
            split = re.search(r"[;\t\r]", user.email)
            table = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL if split else csv.QUOTE_MINIMAL)
            table.writerow(f"'{value}" if FORMULA.match(value) else value for value in record.values())
        elif form == "jsonl":
            file.write(json.dumps(record) + "\n")
        elif fits:
            file.write(f"{user.email}:{record['hashed_password']}\n")
        yield fits


def _decode_lines(file: io.BufferedReader) -> Iterator[str]:
    # Spreadsheet programs start a file with a byte order mark. Invalid UTF-8 is refused later, with its line number.
    start = file.peek(4)[:4]
    wide = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if b"\0\0" in start or (b"\0" in start and not wide):
        raise UnknownFormat("the file is UTF-16 without a byte order mark, or UTF-32: convert it to UTF-8")
    encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
    try:
        with io.TextIOWrapper(file, encoding, errors, newline="") as text:
            yield from text
    except UnicodeDecodeError as error:
        raise UnknownFormat(f"the file begins as UTF-16 and is not: {error.reason}") from None


def _read_csv(lines: Iterator[str]) -> Iterator[tuple[int, Record]]:
    read, delimiters = [next(lines, "")], ",;\t|"
    if marked := re.match(r'("?)sep=([^\w"\r\n \0])\1', read[0], re.IGNORECASE):  # a line for Excel, before the header
        read, delimiters = [read[0], next(lines, "")], marked[2]
    headers = {delimiter: _parse_header(read[-1], delimiter) for delimiter in delimiters}
    delimiter, header = max(headers.items(), key=lambda found: len({*FIELDS} & {*found[1]}))
    if "email" not in header:
        raise UnknownFormat("the first line of a CSV file must name its columns, such as email and hashed_password")
    if error := _fields_error(header):
        raise UnknownFormat(f"the columns of the CSV file: {error}")
    # Where the names of the columns have blanks around them, so have the values.
    blanks = " " if re.search(r" [,;|]|[,;|] ", read[-1]) else ""
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=bool(blanks))
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield len(read) + reader.line_num, ValueError(str(error))
            continue
        if len(row) == len(header):
            texts = (value.strip(blanks) for value in row)
            values = (text[1:] if text.startswith("'") and FORMULA.match(text) else text for text in texts)
            yield len(read) + reader.line_num, dict(zip(header, values, strict=True))
        elif row:
            reason = f"expected {len(header)} columns as in the header, found {len(row)}"
            yield len(read) + reader.line_num, ValueError(reason)


def _parse_header(line: str, delimiter: str) -> list[str]:
    with suppress(csv.Error):
        return [_field(name) for name in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
    return []


def _parse_htpasswd(line: str) -> Record:
    email, *others = line.rstrip("\r\n").split(":")  # further fields are for people, as in a file of Apache
    return {"email": email, "hashed_password": others[0]} if others else ValueError("expected name:hash")


def _parse_json(line: str) -> Record:
    record: object = None
    with suppress(ValueError, RecursionError):
        record = json.loads(line, object_pairs_hook=tuple)  # a dict would hide a repeated name
    if not isinstance(record, tuple):
        return ValueError("not a JSON object")
    fields = [_field(name) for name, _ in record]
    error = _fields_error(fields)
    return ValueError(error) if error else dict(zip(fields, (value for _, value in record), strict=True))


def _field(name: str) -> str:
    """Return the field that a column holds, or the column's own name."""
    return NAMES.get("".join(letter for letter in name.lower() if letter.isalnum()), name)


def _fields_error(fields: list[str]) -> str | None:
    """Return why it is not clear which column holds what, or None."""
    if repeated := [field for field in FIELDS if fields.count(field) > 1]:
        return f"{repeated[0]} is named twice"
    hashes = [field for field in fields if re.search("pass|pwd|hash|digest", field, re.IGNORECASE)]
    if hashes and "hashed_password" not in fields:  # without it the users would be imported without their passwords
        return _is_hash(hashes[0])
    return None


def _is_hash(name: str) -> str:
    return f"is {name!r:.80} the hash of the password? Name it hashed_password, or remove it"


def _text(name: str, value: object) -> str:
    if name in ("created", "disabled", "cut_at_72") and isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str | None):
        raise ValueError(f"{name} must be text")
    if name in ("email", "groups"):
        return value or ""  # as it is: blanks belong to an email, and "none" is the name of a group
    text = (value or "").strip(" \t")
    return "" if text.lower() in NULLS else text


def _parse_groups(text: str) -> str:
    return check_groups(text.split())


def _parse_boolean(name: str, text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise ValueError(f"{named(name, text)}: it must be true or false")
    return BOOLEANS[text.lower()]


def _check_hash(hashed: str) -> None:
    cost, limit = passwords.cost_of(hashed), RANGES["bcrypt_cost"][1]
    if cost is None and hashed != NO_PASSWORD:
        raise ValueError("hashed_password is not a bcrypt hash: expected $2b$…, $2a$…, $2y$… or $bcrypt-sha256$…")
    if cost and cost > limit:
        raise ValueError(f"hashed_password has cost {cost}, which makes each login too slow: the maximum is {limit}")


def _fits_htpasswd(record: dict[str, str]) -> bool:
    # The format has no field for a disabled account or a second factor: the user could sign in without either check.
    unprotected = record["disabled"] or record["totp_secret"]
    return not unprotected and record["hashed_password"].startswith("$2") and not re.search("^#|:", record["email"])


def _parse_created(text: str, now: int) -> int:
    seconds = -1
    if re.fullmatch(r"[0-9]{9,19}(\.[0-9]*)?", text):  # fewer digits are no time that an account was made at
        seconds = int(text.partition(".")[0])
        while seconds >= 10**11:  # milliseconds, microseconds or nanoseconds: in seconds it would be the year 5138
            seconds //= 1000
    else:
        zoned = re.sub(r" *(UTC|GMT|Z)\Z", "+00:00", re.sub(r"(?<=[+-][0-9]{4}) [A-Z]+\Z", "", text.upper()))
        with suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(re.sub(r" +(?=[+-][0-9:]+\Z)", "", zoned))
            seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())
    if not 0 <= seconds <= now + CLOCK_TOLERANCE:
        expected = "a time since 1970 and not in the future, such as 2024-01-02T03:04:05Z"
        raise ValueError(f"{named('created', text)}: it must be {expected}")
    return seconds


def _parse_seed(text: str) -> str:
    seed = "".join(text.split()).replace("-", "").rstrip("=")  # apps show it in groups
    seed += "=" * (-len(seed) % 8)
    size = 0
    with suppress(ValueError):
        size = len(base64.b32decode(seed, casefold=True))
    if MIN_SEED_BYTES <= size <= MAX_SEED_BYTES:
        return seed.upper()
    reason = f"has {8 * size} bits" if size else "is not base32 (A to Z, 2 to 7)"
    raise ValueError(f"totp_secret {reason}: it must have {8 * MIN_SEED_BYTES} to {8 * MAX_SEED_BYTES} bits")


def _to_record(user: User) -> dict[str, str]:
    hashed = user.hashed_password
    return {
        "email": user.email,
        "hashed_password": hashed if isinstance(hashed, str) else hashed.decode(),
        "created": timestamp(user.created_at) if user.created_at is not None else "",
        "disabled": "true" if user.disabled_at is not None else "",
        "totp_secret": user.totp_secret or "" if user.totp_since is not None else "",
        "cut_at_72": "true" if user.cut_salt and user.cut_salt == passwords.salt_of(hashed) else "",
        "groups": " ".join(user.group_names),
    }
