"""One-time codes as a second factor: RFC 6238 with SHA-1, 6 digits and steps of 30 s, which every app knows.

The seed is kept in plain: the service must compute with it, and a key beside the database would leave with it. Codes
that replace a lost phone are long enough to be kept as a plain digest. Knows no user, no clock and no HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import textwrap
from urllib.parse import quote, urlencode

STEP = 30  # seconds (RFC 6238 5.2)
DRIFT = 1  # steps that a phone's clock may differ, either way
SEED = 20  # bytes (RFC 4226 4, R6)
RECOVERY_CODES = 10
RECOVERY_BYTES = 15  # 120 bits each, so that a plain digest is enough (OWASP ASVS 6.5.2 asks for 112)


def new_seed() -> str:
    """Return a new seed in base32, as apps want it typed."""
    return base64.b32encode(secrets.token_bytes(SEED)).decode()


def code(seed: str, step: int) -> str:
    """Return the code of a step, the number of times 30 s have passed since 1970 (RFC 4226 5.3)."""
    mac = hmac.digest(base64.b32decode(seed), step.to_bytes(8, "big"), hashlib.sha1)
    offset = mac[-1] & 15
    return f"{int.from_bytes(mac[offset : offset + 4], 'big') % 2**31 % 10**6:06}"


def matching_step(seed: str, given: str, now: int) -> int | None:
    """Return the step that this is the code of, or None: it must be the present one or next to it."""
    presented = given.replace(" ", "").encode("utf-8", "replace")
    steps = range(max(0, now // STEP - DRIFT), now // STEP + DRIFT + 1)
    matching = [step for step in steps if hmac.compare_digest(code(seed, step).encode(), presented)]
    return max(matching, default=None)


def is_code(given: str) -> bool:
    """Say whether this has the form of a one-time code; what has not may be a recovery code."""
    return re.fullmatch("[0-9]{6}", given.replace(" ", ""), re.ASCII) is not None


def uri(seed: str, email: str, issuer: str) -> str:
    """Return the link that an app takes the seed from, as text or as a picture."""
    return f"otpauth://totp/{quote(f'{issuer}:{email}', safe='@')}?{urlencode({'secret': seed, 'issuer': issuer})}"


def picture(uri: str) -> str | None:
    """Return a QR code as the address of an SVG image; None where segno is not installed."""
    try:
        import segno
    except ImportError:
        return None
    return str(segno.make(uri, micro=False).svg_data_uri(scale=4))


def new_recovery_codes() -> list[str]:
    """Return codes that replace one-time codes, each once; in groups, to be typed."""
    codes = [base64.b32encode(secrets.token_bytes(RECOVERY_BYTES)).decode().lower() for _ in range(RECOVERY_CODES)]
    return ["-".join(textwrap.wrap(letters, 4)) for letters in codes]


def recovery_hash(given: str) -> str:
    """Return what is kept of a recovery code, however it was typed."""
    letters = "".join(given.split()).replace("-", "").lower()
    return hashlib.sha256(letters.encode("utf-8", "surrogatepass")).hexdigest()
