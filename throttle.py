"""The throttle: which attempts are counted, and how fast each count forgets.

An attempt takes one from every bucket it falls into, before anything is hashed, or is refused. The counts live in
the database: they outlive a restart and are shared. Their keys are HMACs under a secret of that database, so the
table holds no address and no email. An unknown email counts as a known one does, which tells nothing.

Nobody is ever locked out: an owner who logged in from an address before is not counted with the strangers.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import secrets
from collections.abc import Callable, Sequence

from settings import Settings, parsed_address
from storage import Store

Bucket = tuple[str, int, int]  # key, size, seconds until one is refilled

LOGIN_PAIR = 10, 60  # one account from one address
LOGIN_STRANGERS = 20, 900  # one account from all addresses that it never logged in from
LOGIN_ADDRESS = 30, 30
# One-time codes: three of a million are good at any moment. Who has the password and keeps guessing for a year gets in
# with 3 %, from an address of the owner's with 10 %.
CODE_PAIR = 5, 900
CODE_STRANGERS = 5, 3600
REGISTER_ADDRESS = 20, 180
RESET_ACCOUNT = 3, 1200
RESET_ADDRESS = 10, 360
CONFIRM_ADDRESS = 10, 60

# In development everybody shares one address, and test suites register by the hundred.
DEVELOPMENT_FACTOR = 100

KNOWN_FOR = 90 * 86_400  # seconds that an address is known after a login from it
KNOWN_MOST = 10  # addresses of an account


class Throttle:
    """Counts attempts in ``db``; ``clock`` tells unix seconds."""

    def __init__(self, db: Store, settings: Settings, clock: Callable[[], float]) -> None:
        self._db = db
        self._clock = clock
        self._on = settings.throttle
        self._factor = 1 if settings.production else DEVELOPMENT_FACTOR
        self._secret = db.throttle_secret(secrets.token_bytes(32))

    def login(self, email: str, address: str) -> list[Bucket]:
        """Return what a login counts in."""
        account, client = email.casefold(), network(address)
        pair = self._key("login", account, client)
        buckets = [(pair, *LOGIN_PAIR), self._wide("login", client, LOGIN_ADDRESS)]
        if not self._knows(pair):
            buckets.append((self._key("strangers", account), *LOGIN_STRANGERS))
        return buckets

    def code(self, email: str, address: str) -> list[Bucket]:
        """Return what a one-time code counts in."""
        account, client = email.casefold(), network(address)
        if self._knows(self._key("login", account, client)):
            return [(self._key("code", account, client), *CODE_PAIR)]
        return [(self._key("code", account), *CODE_STRANGERS)]

    def registration(self, address: str) -> list[Bucket]:
        """Return what a registration counts in."""
        return [self._wide("register", network(address), REGISTER_ADDRESS)]

    def reset_request(self, email: str, address: str) -> list[Bucket]:
        """Return what asking for a reset token counts in."""
        return [
            self._wide("reset account", email.casefold(), RESET_ACCOUNT),
            self._wide("reset", network(address), RESET_ADDRESS),
        ]

    def reset_confirmation(self, address: str) -> list[Bucket]:
        """Return what trying a reset token counts in."""
        return [self._wide("confirm", network(address), CONFIRM_ADDRESS)]

    def take(self, buckets: Sequence[Bucket]) -> int:
        """Count an attempt and return 0; or the seconds to wait, when it is one too many and was not counted."""
        return self._db.take(buckets, int(self._clock())) if self._on and buckets else 0

    def give_back(self, buckets: Sequence[Bucket]) -> None:
        """Forget an attempt that succeeded."""
        if self._on and buckets:
            self._db.give_back(buckets)

    def remember(self, user_id: int, email: str, address: str) -> None:
        """Count later logins of this account from this address apart from the strangers'."""
        key = self._key("login", email.casefold(), network(address))
        self._db.remember_address(user_id, key, int(self._clock()), KNOWN_MOST)

    def tag(self, email: str) -> str:
        """Return what stands for an unknown email in the log: the same for the same, and no way back."""
        return self._key("tag", email.casefold())[:16]

    def _knows(self, pair: str) -> bool:
        return self._db.knows_address(pair, int(self._clock()) - KNOWN_FOR)

    def _wide(self, kind: str, counted: str, limit: tuple[int, int]) -> Bucket:
        size, interval = limit
        return self._key(kind, counted), size * self._factor, interval

    def _key(self, *parts: str) -> str:
        return hmac.digest(self._secret, json.dumps(parts).encode(), hashlib.sha256).hex()


def network(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 of an IPv6 one, whose holder has all of it."""
    parsed = parsed_address(address)
    if parsed and parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed or address)
