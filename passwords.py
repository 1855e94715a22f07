"""Passwords: what is stored of one, how it is checked, and how many are hashed at once.

Two stored forms. Up to 72 UTF-8 bytes without NUL it is plain bcrypt, ``$2b$…``, and hashes made elsewhere verify.
bcrypt reads no further than 72 bytes and repeats its key at a NUL ("a" and "a\\0a" would be one password), so
all others are stored in passlib's published form ``$bcrypt-sha256$v=2,…``: bcrypt over an HMAC-SHA-256 keyed
with the salt, in which every byte counts.

A password is taken as received: not trimmed, not normalised (OWASP ASVS 6.2.8). Knows no user and no HTTP.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import hmac
import os
import re
import threading
from pathlib import Path

import bcrypt

LONGEST = 1024  # bytes of a password
LONGEST_PLAIN = 72  # bytes that bcrypt reads

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# bcrypt's own base64: the salt's last character has two bits to say, and bcrypt refuses any other.
_COST, _SALT, _DIGEST = rb"(0[4-9]|[12]\d|3[01])", rb"[./A-Za-z0-9]{21}[.Oeu]", rb"[./A-Za-z0-9]{31}"
PLAIN = re.compile(rb"\$2[aby]\$" + _COST + rb"\$" + _SALT + _DIGEST)
SHA256 = re.compile(rb"\$bcrypt-sha256\$v=2,t=2b,r=([4-9]|[12]\d|3[01])\$(" + _SALT + rb")\$(" + _DIGEST + rb")")

_ROWS = "1234567890", "qwertyuiopasdfghjklzxcvbnm", "abcdefghijklmnopqrstuvwxyz", "1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik9ol0p"
RUNS = _ROWS + tuple(row[::-1] for row in _ROWS)

# bcrypt lets go of the interpreter while it works: as many hashes as cores is the most that helps, more
# only take time from each other. Under our own server the hashing lane already keeps to it.
_gate = threading.BoundedSemaphore(CORES)


def objection(password: str) -> str | None:
    """Say why this cannot become a password, or return None."""
    try:
        size = len(password.encode())
    except UnicodeEncodeError:  # a lone surrogate, which only JSON can carry
        return "password is not valid text"
    if not size:
        return "password must not be empty"
    if size > LONGEST:
        return f"password must be at most {LONGEST} bytes"
    return None


def weakness(password: str, context: str, shortest: int) -> str | None:
    """Say why this is too easy to guess to be the only factor, or return None.

    No rules of composition (NIST SP 800-63B-4 3.1.1.2). Lists hold few passwords of 15 characters and more, so what
    people make of the listed ones when they must be long is recognised by its shape; so is what is mostly made of the
    words of ``context``, the email and the service.
    """
    folded = password.casefold()
    if len(password) < shortest:
        return f"password must be at least {shortest} characters"
    if len(set(folded)) <= 4:
        return "password must have more than four different characters"
    if any(folded in run * (len(folded) // len(run) + 2) for run in RUNS):
        return "password must not be one run of the keyboard or the alphabet"
    unit = folded[: (folded + folded).index(folded, 1)]  # what it repeats; itself when it repeats nothing
    if (unit != folded and len(unit) < 8) or {folded, unit, folded.rstrip("0123456789")} & _common():
        return "password must not be a common one, nor one repeated or followed by digits"
    rest = folded
    for part in sorted(re.findall("[a-z0-9]{3,}", context.casefold()), key=len, reverse=True):
        rest = rest.replace(part, "")
    if 2 * len(rest) < len(folded):
        return "password must not be made of the email or the name of the service"
    return None


def hash_password(password: str, cost: int) -> bytes:
    """Return a new salted hash; ``cost`` is the log2 of the rounds, 4 to 31."""
    raw = password.encode()
    salt = bcrypt.gensalt(cost)
    if _fits_plain(raw):
        return _bcrypt(raw, salt)
    digest = _bcrypt(_keyed(raw, salt[7:]), salt)[29:]
    return b"$bcrypt-sha256$v=2,t=2b,r=%d$%b$%b" % (cost, salt[7:], digest)


def verify(password: str, hashed: str | bytes | None, cost: int) -> bool:
    """Say whether this password was hashed, in a time that tells nothing of the reason.

    None for ``hashed`` (nobody has this email), whatever cannot match, and a wrong password for a hash of less than
    ``cost`` take as long as one of ``cost``. One of more takes longer, until its user logs in.
    """
    secret, target = _comparable(password, hashed) or (b"", _nothing(cost))
    with _gate:
        if bcrypt.checkpw(secret, target):
            return True
        for missing in range(cost_of(target) or cost, cost):  # 2**n + 2**n + 2**(n + 1) + … = 2**cost
            bcrypt.checkpw(b"", _nothing(missing))
    return False


def cost_of(hashed: str | bytes) -> int | None:
    """Return the cost of a stored hash, or None when it is in no form that is known here."""
    stored = _bytes(hashed)
    found = PLAIN.fullmatch(stored) or SHA256.fullmatch(stored)
    return int(found[1]) if found else None


@functools.cache
def _common() -> frozenset[str]:
    # With the first registration: 11,611 words, 1 MB.
    text = gzip.decompress(Path(__file__).with_name("common.txt.gz").read_bytes()).decode()
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))


def _comparable(password: str, hashed: str | bytes | None) -> tuple[bytes, bytes] | None:
    if hashed is None or not isinstance(password, str) or objection(password):
        return None
    raw, stored = password.encode(), _bytes(hashed)
    if PLAIN.fullmatch(stored):
        return (raw, stored) if _fits_plain(raw) else None
    if found := SHA256.fullmatch(stored):
        cost, salt, digest = found.groups()
        return _keyed(raw, salt), b"$2b$%02d$%b%b" % (int(cost), salt, digest)
    return None


def _nothing(cost: int) -> bytes:
    return b"$2b$%02d$%b" % (cost, b"." * 53)  # a valid hash that nothing has


def _fits_plain(raw: bytes) -> bool:
    return len(raw) <= LONGEST_PLAIN and b"\0" not in raw


def _keyed(raw: bytes, salt: bytes) -> bytes:
    return base64.b64encode(hmac.digest(salt, raw, hashlib.sha256))  # 44 bytes, none of them NUL


def _bcrypt(secret: bytes, salt: bytes) -> bytes:
    with _gate:
        return bcrypt.hashpw(secret, salt)


def _bytes(hashed: str | bytes) -> bytes:
    return hashed.encode("utf-8", "replace") if isinstance(hashed, str) else hashed
