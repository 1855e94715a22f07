"""Moving in and out: users as CSV with a heading, JSON lines, or htpasswd.

Lines in, checked users out, and back. Knows no database and opens no file.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import guard
import passwords
from auth import NO_PASSWORD
from settings import RANGES
from storage import CLOCK_TOLERANCE, User

FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".htpasswd": "htpasswd"}  # by the end of a file's name
FIELDS = "email", "hashed_password", "created", "disabled", "totp_secret"
SYNONYMS = {"password_hash": "hashed_password", "hash": "hashed_password"}
DISABLED = {"": False, "false": False, "0": False, "no": False, "true": True, "1": True, "yes": True}
LONGEST_SEED = 64  # bytes of a second factor that moves in: a block of SHA-1, beyond which a key gains nothing
SHORTEST_SEED = 10  # bytes of a second factor that moves in: the least that apps were ever given

Record = dict[str, Any] | ValueError


class FormatUnknown(Exception):
    """What is in a file cannot be told; the message says how to."""


def format_of(path: str, chosen: str | None) -> str:
    """Return the format of a file, as chosen or by its name.

    Raises:
        FormatUnknown: nothing was chosen, and the name does not tell.
    """
    form = chosen or FORMATS.get(Path(path).suffix or Path(path).name)
    if not form:
        raise FormatUnknown(f"cannot tell the format of {path}: give --format csv, jsonl or htpasswd")
    return form


def records(file: Iterable[bytes], form: str) -> Iterator[tuple[int, Record]]:
    """Return the number and the fields of each line, or what is wrong with it.

    Raises:
        FormatUnknown: the heading of a CSV file lacks what is needed.
    """
    lines = _decoded(file)
    if form == "csv":
        yield from _rows(lines)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip() and not (form == "htpasswd" and line.startswith("#")):
            yield number, _htpasswd(line) if form == "htpasswd" else _json(line)


def account(record: Record, check_email: Callable[[str], None], now: int) -> User:
    """Return the user that a record describes, still without an id.

    Raises:
        ValueError: it describes none; the message says why.
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
    if text["disabled"] not in DISABLED:
        raise ValueError("disabled must be true or false")
    return User(
        id=0,
        email=text["email"],
        hashed_password=hashed,
        created_at=_seconds(text["created"], now) if "created" in text else now,
        disabled_at=now if DISABLED[text["disabled"]] else None,
        totp_secret=_seed(text["totp_secret"]) if "totp_secret" in text else None,
        totp_since=now if "totp_secret" in text else None,
    )


def write(users: Iterable[User], file: IO[str], form: str) -> tuple[int, int]:
    """Write the users; return how many were, and how many cannot stand in a file of this format."""
    table = csv.writer(file, lineterminator="\n")
    written = left_out = 0
    if form == "csv":
        table.writerow(FIELDS)
    for user in users:
        record = _record(user)
        if form == "csv":
            table.writerow(record.values())
        elif form == "jsonl":
            file.write(json.dumps(record) + "\n")
        elif _exceeds_htpasswd(record):
            left_out += 1
        else:
            file.write(f"{user.email}:{record['hashed_password']}\n")
        written += 1
    return written - left_out, left_out


def _decoded(file: Iterable[bytes]) -> Iterator[str]:
    encoding = "utf-8-sig"  # what spreadsheets begin a file with
    for line in file:
        yield line.decode(encoding, "surrogateescape")  # refused as an email, on its own line
        encoding = "utf-8"


def _rows(lines: Iterator[str]) -> Iterator[tuple[int, Record]]:
    reader = csv.reader(lines, strict=True)
    try:
        heading = [SYNONYMS.get(name.strip(), name.strip()) for name in next(reader, [])]
    except csv.Error:
        heading = []
    if not {"email", "hashed_password"} <= set(heading):
        raise FormatUnknown("the first line of a CSV file must name its columns: email and hashed_password at least")
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, ValueError(str(error))
            continue
        if len(row) == len(heading):
            yield reader.line_num, dict(zip(heading, row, strict=True))
        elif row:
            yield reader.line_num, ValueError(f"{len(row)} columns where the heading has {len(heading)}")


def _htpasswd(line: str) -> Record:
    email, _, hashed = line.rstrip("\r\n").partition(":")
    return {"email": email, "hashed_password": hashed}


def _json(line: str) -> Record:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return ValueError("no JSON object")
    return {SYNONYMS.get(str(name), str(name)): value for name, value in record.items()}


def _check_hash(hashed: str) -> None:
    cost, most = passwords.cost_of(hashed), RANGES["bcrypt_cost"][1]
    if cost is None and hashed != NO_PASSWORD:
        raise ValueError("hashed_password is no bcrypt hash: $2b$…, $2a$…, $2y$… or $bcrypt-sha256$…")
    if cost and cost > most:
        raise ValueError(f"a hash of cost {cost} would take too long at each login; {most} is the most")


def _exceeds_htpasswd(record: dict[str, str]) -> bool:
    email, hashed = record["email"], record["hashed_password"]
    alone = not (record["disabled"] or record["totp_secret"])  # else who is shut out, or has a second factor, had none
    return not alone or not hashed.startswith("$2") or ":" in email or email.startswith("#")


def _seconds(text: str, now: int) -> int:
    moment = datetime.fromisoformat(text)
    seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())
    if not 0 <= seconds <= now + CLOCK_TOLERANCE:
        raise ValueError("created must be a moment since 1970, and not in the future")
    return seconds


def _seed(text: str) -> str:
    seed = text.replace(" ", "").rstrip("=").upper()
    seed += "=" * (-len(seed) % 8)
    try:
        fits = SHORTEST_SEED <= len(base64.b32decode(seed)) <= LONGEST_SEED
    except binascii.Error:
        fits = False
    if not fits:
        raise ValueError(f"totp_secret must be {SHORTEST_SEED} to {LONGEST_SEED} bytes in base32")
    return seed


def _record(user: User) -> dict[str, str]:
    hashed = user.hashed_password
    values = (
        user.email,
        hashed if isinstance(hashed, str) else hashed.decode(),
        guard.timestamp(user.created_at) if user.created_at is not None else "",
        "true" if user.disabled_at is not None else "",
        user.totp_secret or "" if user.totp_since is not None else "",
    )
    return dict(zip(FIELDS, values, strict=True))
