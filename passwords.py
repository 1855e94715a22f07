"""Passwords: what is stored of one, how it is checked, and how many are hashed at once.

Two stored forms. Up to 72 UTF-8 bytes without NUL it is plain bcrypt, ``$2b$…``, and hashes made elsewhere verify.
bcrypt reads no further than 72 bytes and repeats its key at a NUL ("a" and "a\\0a" would be one password), so
all others are stored in passlib's published form ``$bcrypt-sha256$v=2,…``: bcrypt over an HMAC-SHA-256 keyed
with the salt, in which every byte counts.

A password is taken as received: not trimmed, not normalised (OWASP ASVS 6.2.8). Knows no user and no HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import threading

import bcrypt

LONGEST = 1024  # bytes of a password
LONGEST_PLAIN = 72  # bytes that bcrypt reads

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# bcrypt's own base64: the salt's last character has two bits to say, and bcrypt refuses any other.
_COST, _SALT, _DIGEST = rb"(0[4-9]|[12]\d|3[01])", rb"[./A-Za-z0-9]{21}[.Oeu]", rb"[./A-Za-z0-9]{31}"
PLAIN = re.compile(rb"\$2[aby]\$" + _COST + rb"\$" + _SALT + _DIGEST)
SHA256 = re.compile(rb"\$bcrypt-sha256\$v=2,t=2b,r=([4-9]|[12]\d|3[01])\$(" + _SALT + rb")\$(" + _DIGEST + rb")")

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


def hash_password(password: str, cost: int) -> bytes:
    """Return a new salted hash; ``cost`` is the log2 of the rounds, 4 to 31."""
    raw = password.encode()
    salt = bcrypt.gensalt(cost)
    if _fits_plain(raw):
        return _bcrypt(raw, salt)
    digest = _bcrypt(_keyed(raw, salt[7:]), salt)[29:]
    return b"$bcrypt-sha256$v=2,t=2b,r=%d$%b$%b" % (cost, salt[7:], digest)


def verify(password: str, hashed: str | bytes | None, cost: int) -> bool:
    """Say whether this password was hashed; always one bcrypt, so that the time tells nothing of the reason.

    None for ``hashed`` (nobody has this email) and whatever cannot match cost as much as a hash of ``cost``.
    """
    secret, target = _comparable(password, hashed) or (b"", b"$2b$%02d$%b" % (cost, b"." * 53))  # matches nothing
    with _gate:
        return bcrypt.checkpw(secret, target)


def cost_of(hashed: str | bytes) -> int | None:
    """Return the cost of a stored hash, or None when it is in no form that is known here."""
    stored = _bytes(hashed)
    found = PLAIN.fullmatch(stored) or SHA256.fullmatch(stored)
    return int(found[1]) if found else None


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


def _fits_plain(raw: bytes) -> bool:
    return len(raw) <= LONGEST_PLAIN and b"\0" not in raw


def _keyed(raw: bytes, salt: bytes) -> bytes:
    return base64.b64encode(hmac.digest(salt, raw, hashlib.sha256))  # 44 bytes, none of them NUL


def _bcrypt(secret: bytes, salt: bytes) -> bytes:
    with _gate:
        return bcrypt.hashpw(secret, salt)


def _bytes(hashed: str | bytes) -> bytes:
    return hashed.encode("utf-8", "replace") if isinstance(hashed, str) else hashed
