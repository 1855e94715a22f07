"""Users in files: CSV with a header, JSON lines, and htpasswd.

Parses lines into checked users and writes users as lines. It opens no file and uses no database.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from auth import NO_PASSWORD
from credentials import passwords
from log import timestamp
from settings import RANGES
from storage import User
from tables.rate_limits import CLOCK_TOLERANCE

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".htpasswd": "htpasswd"}  # file name suffix: format
FIELDS = "email", "hashed_password", "created", "disabled", "totp_secret"
ALIASES = {"password_hash": "hashed_password", "hash": "hashed_password"}  # other names of fields
DISABLED_VALUES = {"": False, "false": False, "0": False, "no": False, "true": True, "1": True, "yes": True}
MAX_SEED_BYTES = 64  # of an imported TOTP seed: the block size of SHA-1; a longer key adds no security (RFC 2104)
MIN_SEED_BYTES = 10  # of an imported TOTP seed: authenticator apps have never used less

Record = dict[str, Any] | ValueError  # the fields of a line, or the reason why it has none


class UnknownFormat(Exception):
    """The format of a file cannot be determined; the message says what to do."""


def detect_format(path: str, chosen: str | None) -> str:
    """Return the chosen format, or the one that the file's name indicates.

    Raises:
        UnknownFormat: no format was chosen, and the name indicates none.
    """
    form = chosen or FORMATS.get(Path(path).suffix or Path(path).name)
    if not form:
        raise UnknownFormat(f"cannot tell the format of {path} from its name: add --format csv, jsonl or htpasswd")
    return form


def read_records(file: Iterable[bytes], form: str) -> Iterator[tuple[int, Record]]:
    """Yield the number of each line with its fields, or with the error that makes it unreadable.

    Raises:
        UnknownFormat: the header of a CSV file lacks a required column.
    """
    lines = _decode_lines(file)
    if form == "csv":
        yield from _read_csv(lines)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip() and not (form == "htpasswd" and line.startswith("#")):
            yield number, _parse_htpasswd(line) if form == "htpasswd" else _parse_json(line)


def parse_user(record: Record, check_email: Callable[[str], None], now: int) -> User:
    """Return the user that a record describes; the id is 0 until the user is stored.

    ``check_email`` raises ValueError for an email that an account cannot have. ``now`` is in unix seconds.

    Raises:
        ValueError: the record describes no user; the message gives the reason.
    """
    if isinstance(record, ValueError):
        raise record
    text = {name: value for name, value in record.items() if name in FIELDS and value not in (None, "")}
    text["disabled"] = str(text.get("disabled", "")).lower()
    for name, value in text.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text")
    hashed = text.get("hashed_password", "")
    check_email(text.get("email", ""))
    _check_hash(hashed)
    if text["disabled"] not in DISABLED_VALUES:
        raise ValueError("disabled must be true or false")
    return User(
        id=0,
        email=text["email"],
        hashed_password=hashed,
        created_at=_parse_created(text["created"], now) if "created" in text else now,
        disabled_at=now if DISABLED_VALUES[text["disabled"]] else None,
        totp_secret=_parse_seed(text["totp_secret"]) if "totp_secret" in text else None,
        totp_since=now if "totp_secret" in text else None,
    )


def write_users(users: Iterable[User], file: IO[str], form: str) -> Iterator[bool]:
    """Write the users to a file. Yield for each whether it was written: the format may be unable to represent it."""
    table = csv.writer(file, lineterminator="\n")
    if form == "csv":
        table.writerow(FIELDS)
    for user in users:
        record = _to_record(user)
        if form == "htpasswd" and not _fits_htpasswd(record):
            yield False
            continue
        if form == "csv":
            table.writerow(record.values())
        elif form == "jsonl":
            file.write(json.dumps(record) + "\n")
        else:
            file.write(f"{user.email}:{record['hashed_password']}\n")
        yield True


def _decode_lines(file: Iterable[bytes]) -> Iterator[str]:
    encoding = "utf-8-sig"  # the first line: spreadsheet programs start a file with a byte order mark
    for line in file:
        yield line.decode(encoding, "surrogateescape")  # invalid UTF-8 is refused later, with its line number
        encoding = "utf-8"


def _read_csv(lines: Iterator[str]) -> Iterator[tuple[int, Record]]:
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    with suppress(csv.Error):
        header = [ALIASES.get(name.strip(), name.strip()) for name in next(reader, [])]
    if not {"email", "hashed_password"} <= set(header):
        raise UnknownFormat("the first line of a CSV file must name its columns: at least email and hashed_password")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, ValueError(str(error))
            continue
        if len(row) == len(header):
            yield reader.line_num, dict(zip(header, row, strict=True))
        elif row:
            yield reader.line_num, ValueError(f"expected {len(header)} columns as in the header, found {len(row)}")


def _parse_htpasswd(line: str) -> Record:
    email, _, hashed = line.rstrip("\r\n").partition(":")
    return {"email": email, "hashed_password": hashed}


def _parse_json(line: str) -> Record:
    record: object = None
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
    if not isinstance(record, dict):
        return ValueError("not a JSON object")
    return {ALIASES.get(str(name), str(name)): value for name, value in record.items()}


def _check_hash(hashed: str) -> None:
    cost, limit = passwords.cost_of(hashed), RANGES["bcrypt_cost"][1]
    if cost is None and hashed != NO_PASSWORD:
        raise ValueError("hashed_password is not a bcrypt hash: expected $2b$…, $2a$…, $2y$… or $bcrypt-sha256$…")
    if cost and cost > limit:
        raise ValueError(f"hashed_password has cost {cost}, which makes each login too slow: the maximum is {limit}")


def _fits_htpasswd(record: dict[str, str]) -> bool:
    # The format has no field for a disabled account or a second factor: the user could sign in without either check.
    if record["disabled"] or record["totp_secret"]:
        return False
    email = record["email"]
    return record["hashed_password"].startswith("$2") and ":" not in email and not email.startswith("#")


def _parse_created(text: str, now: int) -> int:
    moment = datetime.fromisoformat(text)
    seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())
    if not 0 <= seconds <= now + CLOCK_TOLERANCE:
        raise ValueError(f"created is {text!r}: it must be a time since 1970 and not in the future")
    return seconds


def _parse_seed(text: str) -> str:
    seed = text.replace(" ", "").rstrip("=").upper()
    seed += "=" * (-len(seed) % 8)
    with suppress(binascii.Error):
        if MIN_SEED_BYTES <= len(base64.b32decode(seed)) <= MAX_SEED_BYTES:
            return seed
    raise ValueError(f"totp_secret must be {MIN_SEED_BYTES} to {MAX_SEED_BYTES} bytes in base32")


def _to_record(user: User) -> dict[str, str]:
    hashed = user.hashed_password
    return {
        "email": user.email,
        "hashed_password": hashed if isinstance(hashed, str) else hashed.decode(),
        "created": timestamp(user.created_at) if user.created_at is not None else "",
        "disabled": "true" if user.disabled_at is not None else "",
        "totp_secret": user.totp_secret or "" if user.totp_since is not None else "",
    }
