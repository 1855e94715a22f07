"""Password hashing and the rules for new passwords.

A password is stored in one of two forms. Up to 72 UTF-8 bytes without a NUL are stored as plain bcrypt, ``$2b$…``, so
bcrypt hashes made by other programs verify as well. bcrypt ignores everything after 72 bytes and repeats its key at a
NUL: it cannot tell "a" from "a\\0a". All other passwords are therefore stored in the ``$bcrypt-sha256$v=2,…`` format
that passlib published. It applies bcrypt to an HMAC-SHA-256 keyed with the salt, so every byte counts.

Passwords are used exactly as received, neither trimmed nor normalised (OWASP ASVS 6.2.8).
"""

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

MAX_BYTES = 1024  # length of a password in UTF-8
MAX_PLAIN_BYTES = 72  # bcrypt ignores all further bytes

# The processor cores that this process may use. They limit how many hashes run at once.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# A salt is 16 bytes in bcrypt's own base64. Its last character encodes only two bits, so it can only be one of four.
# Some libraries fill the bits that are left over, here and in the digest, with others than zeros. They mean nothing.
_ALPHABET = b"./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_SALT, _DIGEST = rb"(?P<salt>[./A-Za-z0-9]{21}[.Oeu])", rb"(?P<digest>[./A-Za-z0-9]{31})"
PLAIN = re.compile(rb"\$2[aby]\$(?P<cost>0[4-9]|[12]\d|3[01])\$(?P<salt>[./A-Za-z0-9]{22})" + _DIGEST)
# passlib's version 2, and its version 1 ("$2a,12$"), in which the key of bcrypt is the plain SHA-256 of the password.
_VERSION = rb"(?:v=2,t=2b,r=|(?P<first>2[ab],))"
SHA256 = re.compile(rb"\$bcrypt-sha256\$" + _VERSION + rb"(?P<cost>[4-9]|[12]\d|3[01])\$" + _SALT + rb"\$" + _DIGEST)

# A new password may not be a part of one of these: keyboard rows and columns and the alphabet, in both directions.
_ROWS = "1234567890", "qwertyuiopasdfghjklzxcvbnm", "abcdefghijklmnopqrstuvwxyz", "1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik9ol0p"
RUNS = _ROWS + tuple(row[::-1] for row in _ROWS)

# bcrypt releases the interpreter lock, so one hash can run on each core. More at once would only slow each other down.
# This limit matters under other WSGI servers. Our own server already hashes on a pool of the same size.
_hash_slots = threading.BoundedSemaphore(CORES)


def length_error(password: str) -> str | None:
    """Return why this text cannot be a password at all: it is empty, too long or not valid text. Else return None."""
    try:
        size = len(password.encode())
    except UnicodeEncodeError:  # a lone surrogate, which JSON can contain
        return "password is not valid text"
    if not size:
        return "password must not be empty"
    if size > MAX_BYTES:
        return f"password must be at most {MAX_BYTES} bytes"
    return None


def strength_error(password: str, context: str, min_length: int) -> str | None:
    """Return why a new password is too easy to guess, or None.

    There are no composition rules such as "one digit and one capital letter" (NIST SP 800-63B-4 3.1.1.2). Lists of
    common passwords hold few of 15 characters or more. People lengthen a common password by repeating it or by
    appending digits, so both are refused.

    Args:
        password: the new password.
        context: words that an attacker would try first: the user's email and the public URL of the service.
        min_length: in characters.
    """
    folded = password.casefold()
    if len(password) < min_length:
        return f"password must be at least {min_length} characters"
    if len(set(folded)) <= 4:
        return "password must have more than four different characters"
    if any(folded in run * (len(folded) // len(run) + 2) for run in RUNS):
        return "password must not be one run of the keyboard or the alphabet"
    # The shortest part that the password repeats; all of it if there is none.
    unit = folded[: (folded + folded).index(folded, 1)]
    if (unit != folded and len(unit) < 8) or {folded, unit, folded.rstrip("0123456789")} & _common_passwords():
        return "password must not be a common one, nor one repeated or followed by digits"
    rest = folded
    for part in sorted(re.findall("[a-z0-9]{3,}", context.casefold()), key=len, reverse=True):
        rest = rest.replace(part, "")
    if 2 * len(rest) < len(folded):
        return "password must not be made of the email or the name of the service"
    return None


def hash_password(password: str, cost: int) -> bytes:
    """Return a new salted hash. ``cost`` is the base-2 logarithm of the number of rounds, 4 to 31."""
    raw, salt = password.encode(), bcrypt.gensalt(cost)
    plain = _fits_plain(raw)
    with _hash_slots:
        hashed = bcrypt.hashpw(raw if plain else _prehash(raw, salt[7:]), salt)
    return hashed if plain else b"$bcrypt-sha256$v=2,t=2b,r=%d$%b$%b" % (cost, salt[7:], hashed[29:])


def verify(password: str, hashed: str | bytes | None, cost: int, cut_salt: str | None = None) -> bool:
    """Return whether a password matches a stored hash, without revealing through timing why it does not.

    Every refusal takes as long as one hash of ``cost``. This includes ``hashed=None`` (no such user), an unreadable
    hash, and a wrong password for a hash of a lower cost. A hash of a higher cost takes longer, until its user signs in
    and it is replaced.

    ``cut_salt`` is the salt of a hash made by a system that ignores all bytes after 72. Only for the hash with this
    salt, only the first 72 bytes of a longer password are compared.
    """
    secret, target = _comparable(password, hashed, cut_salt) or (b"", _dummy_hash(cost))
    with _hash_slots:
        if bcrypt.checkpw(secret, target):
            return True
        # A hash of a lower cost n took 2**n rounds. 2**n + 2**n + 2**(n + 1) + … + 2**(cost - 1) = 2**cost.
        for lower_cost in range(cost_of(target) or cost, cost):
            bcrypt.checkpw(b"", _dummy_hash(lower_cost))
    return False


def cost_of(hashed: str | bytes) -> int | None:
    """Return the cost of a stored hash, or None if its format is unknown."""
    stored = _bytes(hashed)
    found = PLAIN.fullmatch(stored) or SHA256.fullmatch(stored)
    return int(found["cost"]) if found else None


def is_current(hashed: str | bytes, cost: int) -> bool:
    """Return whether a stored hash has this cost and a form that is made today."""
    return cost_of(hashed) == cost and not _bytes(hashed).startswith(b"$bcrypt-sha256$2")


def salt_of(hashed: str | bytes) -> str | None:
    """Return the salt of a plain bcrypt hash, or None for any other form."""
    found = PLAIN.fullmatch(_bytes(hashed))
    return found["salt"].decode() if found else None


@functools.cache
def _common_passwords() -> frozenset[str]:
    # 16,955 entries, 1.5 MB in memory. They are read on the first check of a new password.
    text = gzip.decompress(Path(__file__).with_name("common_passwords.txt.gz").read_bytes()).decode()
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))


def _comparable(password: str, hashed: str | bytes | None, cut_salt: str | None) -> tuple[bytes, bytes] | None:
    if hashed is None or not isinstance(password, str) or length_error(password):
        return None
    raw, stored = password.encode(), _bytes(hashed)
    if found := PLAIN.fullmatch(stored):
        raw = raw[:MAX_PLAIN_BYTES] if found["salt"].decode() == cut_salt else raw
        if not _fits_plain(raw):
            return None
    elif found := SHA256.fullmatch(stored):
        raw = base64.b64encode(hashlib.sha256(raw).digest()) if found["first"] else _prehash(raw, found["salt"])
    else:
        return None
    salt, digest = _without_unused_bits(found["salt"], 4), _without_unused_bits(found["digest"], 2)
    return raw, b"$2b$%02d$%b%b" % (int(found["cost"]), salt, digest)


def _without_unused_bits(encoded: bytes, unused: int) -> bytes:
    # The bcrypt package refuses a salt and never matches a digest in which these bits are set.
    last = _ALPHABET.index(encoded[-1]) >> unused << unused
    return encoded[:-1] + _ALPHABET[last : last + 1]


def _dummy_hash(cost: int) -> bytes:
    return b"$2b$%02d$%b" % (cost, b"." * 53)  # well-formed, but no password is known to match


def _fits_plain(raw: bytes) -> bool:
    return len(raw) <= MAX_PLAIN_BYTES and b"\0" not in raw


def _prehash(raw: bytes, salt: bytes) -> bytes:
    return base64.b64encode(hmac.digest(salt, raw, hashlib.sha256))  # 44 bytes without NUL


def _bytes(hashed: str | bytes) -> bytes:
    return hashed.encode("utf-8", "replace") if isinstance(hashed, str) else hashed
