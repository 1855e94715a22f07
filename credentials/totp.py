"""Two-factor authentication with one-time codes (TOTP), and the recovery codes that replace a lost phone.

The codes follow RFC 6238 with SHA-1, 6 digits and steps of 30 seconds, which every authenticator app supports.

The seed of a user is stored unencrypted because the service needs it to compute codes. An encryption key on the same
machine would be stolen together with the database. Recovery codes are only compared, so their SHA-256 is stored.
"""

import base64
import hashlib
import hmac
import re
import secrets
import textwrap
import unicodedata
from urllib.parse import quote, urlencode

STEP = 30  # seconds that a code is current (RFC 6238 5.2)
DRIFT = 1  # steps that a phone's clock may be ahead or behind
SEED_BYTES = 20  # recommended by RFC 4226 4, R6
RECOVERY_CODES = 10
RECOVERY_BYTES = 16  # 128 random bits (OWASP ASVS 11.5.1); with 112 or more an unsalted hash is enough (6.5.2)
MAX_TYPED = 120  # characters of a code as it is typed; longer text is no code

# Full-width characters, which input methods of East Asia produce, as ASCII; and what may be typed for a hyphen, but is
# no dash to Unicode: the minus sign, and the long vowel mark of Japanese in two widths.
_AS_ASCII = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | dict.fromkeys((0x2212, 0x30FC, 0xFF70), "-")


def new_seed() -> str:
    """Return a new random seed in base32, the form that apps accept when it is typed."""
    return base64.b32encode(secrets.token_bytes(SEED_BYTES)).decode()


def code(seed: str, step: int) -> str:
    """Return the six-digit code for a step: the number of 30-second periods since 1970 (RFC 4226 5.3)."""
    mac = hmac.digest(base64.b32decode(seed), step.to_bytes(8, "big"), hashlib.sha1)
    offset = mac[-1] & 15
    return f"{int.from_bytes(mac[offset : offset + 4], 'big') % 2**31 % 10**6:06}"


def matching_step(seed: str, given: str, now: int) -> int | None:
    """Return the step that a typed code belongs to, or None if it is wrong.

    The current step and ``DRIFT`` steps before and after it are accepted. If two of them have the same code, the later
    one is returned, so that a caller who records it accepts no code twice. ``now`` is in unix seconds.
    """
    presented = _typed(given).encode("utf-8", "replace")
    steps = range(max(0, now // STEP - DRIFT), now // STEP + DRIFT + 1)
    matching = [step for step in steps if hmac.compare_digest(code(seed, step).encode(), presented)]
    return max(matching, default=None)


def is_code(given: str) -> bool:
    """Return whether the text has the form of a one-time code. Other text may be a recovery code."""
    return re.fullmatch("[0-9]{6}", _typed(given), re.ASCII) is not None


def uri(seed: str, email: str, issuer: str) -> str:
    """Return the ``otpauth://`` link that sets up an authenticator app, opened directly or scanned as a QR code."""
    return f"otpauth://totp/{quote(f'{issuer}:{email}', safe='@')}?{urlencode({'secret': seed, 'issuer': issuer})}"


def qr_code(uri: str) -> str | None:
    """Return a QR code of the link as a ``data:`` URL of an SVG image, or None if segno is not installed."""
    try:
        import segno
    except ImportError:
        return None
    return str(segno.make(uri, micro=False).svg_data_uri(scale=4))


def new_recovery_codes() -> list[str]:
    """Return new recovery codes, in groups of four characters that are easy to type. Each is meant to be used once."""
    codes = [base64.b32encode(secrets.token_bytes(RECOVERY_BYTES)).decode() for _ in range(RECOVERY_CODES)]
    return ["-".join(textwrap.wrap(letters.rstrip("=").lower(), 4)) for letters in codes]


def recovery_hash(given: str) -> str:
    """Return the SHA-256 to store or look up for a recovery code. Blanks, hyphens and letter case do not matter."""
    return hashlib.sha256(_typed(given).lower().encode("utf-8", "surrogatepass")).hexdigest()


def _typed(given: str) -> str:
    """Return a typed code without blanks and hyphens, with the digits of any script as ASCII; "" if it is too long."""
    letters = given.translate(_AS_ASCII) if len(given) <= MAX_TYPED else ""
    kept = [letter for letter in letters if not (letter.isspace() or unicodedata.category(letter) in ("Pd", "Cf"))]
    return "".join([str(unicodedata.decimal(letter, letter)) for letter in kept])
