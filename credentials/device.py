"""Device cookies: they tell a browser that has signed in to an account before from the browser of a stranger.

Attempts from a known browser are counted apart from those of strangers, so that strangers who guess cannot use up the
owner's attempts (OWASP, "Slow down online guessing attacks with device cookies"). A device cookie signs nobody in.

The cookie holds one token for each account, up to ``MAX_ACCOUNTS``, the newest first. A token is
``user id.issued at.kind.nonce.MAC``. The MAC covers the others and the user's ``device_key``, so that a new key voids
all tokens of that user. Nothing is stored for a single token.
"""

import functools
import hmac
import re
import secrets
from collections.abc import Sequence
from typing import NamedTuple

LIFETIME = 7_776_000  # seconds, 90 days
MAX_ACCOUNTS = 4  # in one browser
SEPARATOR = "~"

_TOKEN = re.compile(r"([1-9][0-9]{0,18})\.([1-9][0-9]{0,11})\.(full|reset)\.([0-9a-f]{16})\.([0-9a-f]{64})", re.ASCII)


class Device(NamedTuple):
    """One token: a browser that has signed in to one account."""

    user_id: int
    issued_at: int  # unix seconds
    kind: str  # "full": signed in with all that the account asks for; "reset": only set the password by a mailed link
    nonce: str  # tells this browser from the user's others
    mac: str

    def __str__(self) -> str:
        return ".".join(map(str, self))


def issue(keyed: hmac.HMAC, user_id: int, device_key: str | None, kind: str, now: int) -> Device:
    """Return a new token. ``keyed`` is an HMAC-SHA-256 with the secret of the database."""
    nonce = secrets.token_hex(8)
    return Device(user_id, now, kind, nonce, _mac(keyed, user_id, now, kind, nonce, device_key))


@functools.lru_cache(maxsize=16)  # a sign-in asks twice: for its limits, and for the new cookie
def parse(cookie: str | None) -> tuple[Device, ...]:
    """Return the tokens in a cookie; none if it is malformed. Nothing is verified."""
    found = [_TOKEN.fullmatch(text) for text in (cookie or "").split(SEPARATOR)]
    if len(found) > MAX_ACCOUNTS or not all(found):
        return ()
    return tuple(Device(int(one[1]), int(one[2]), one[3], one[4], one[5]) for one in found if one)


def verified(
    devices: Sequence[Device], keyed: hmac.HMAC, user_id: int, device_key: str | None, *, now: int, latest: int
) -> Device | None:
    """Return the genuine token of this user, or None.

    It must be younger than 90 days at ``now``, and issued no later than ``latest``.
    """
    for device in devices:
        fresh = now - LIFETIME < device.issued_at <= latest
        if device.user_id == user_id and fresh:
            mac = _mac(keyed, user_id, device.issued_at, device.kind, device.nonce, device_key)
            if hmac.compare_digest(mac, device.mac):
                return device
    return None


def with_new(devices: Sequence[Device], new: Device) -> str:
    """Return the value of a cookie with the new token in front; it replaces that of the same user, or the last one."""
    others = [device for device in devices if device.user_id != new.user_id]
    return SEPARATOR.join(map(str, [new, *others][:MAX_ACCOUNTS]))


def _mac(keyed: hmac.HMAC, *parts: str | int | None) -> str:
    # No part holds a dot. "device" tells it from the keys of the rate limits, which are made with the same secret.
    mac = keyed.copy()
    mac.update(".".join(map(str, ("device", *parts))).encode())
    return mac.hexdigest()
