"""Rate limits: which attempts are counted, and how fast each limit refills.

An attempt consumes from each of its buckets before anything is hashed. If one is empty, the attempt is refused. The
buckets are stored in the database: they survive a restart, and copies of the service share them. Their keys are HMACs
under a secret of the database, so the table names no address and no email; a stolen database lets a thief test guesses.
An unknown email counts like a known one, so a limit does not reveal which emails have an account.

An account is never locked. A login from an address that the account has logged in from before is not counted together
with the attempts of strangers.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence

from addresses import client_network
from settings import Settings
from tables.rate_limits import Bucket, RateLimits

# (attempts at once, seconds until one more is allowed)
LOGIN_ACCOUNT_AND_ADDRESS = 10, 60
LOGIN_STRANGERS = 20, 900  # one account, from all addresses that it never logged in from
LOGIN_ADDRESS = 30, 30
# At any moment three of a million one-time codes are good. An attacker who has the password and guesses codes for a
# year has a chance of 3 %, or of 10 % from an address that the owner has used.
CODE_ACCOUNT_AND_ADDRESS = 5, 900
CODE_STRANGERS = 5, 3600
REGISTER_ADDRESS = 20, 180
RESET_ACCOUNT = 3, 1200
RESET_ADDRESS = 10, 360
RESET_TOKEN_ADDRESS = 10, 60

# In development all clients share one address, and test suites create accounts by the hundred.
DEVELOPMENT_FACTOR = 100

KNOWN_FOR = 90 * 86_400  # seconds that an address stays known after a login
MAX_KNOWN_ADDRESSES = 10  # of one account


class RateLimiter:
    """Counts attempts in ``limits``; ``clock`` returns unix seconds."""

    def __init__(self, limits: RateLimits, settings: Settings, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._enabled = settings.throttle
        self._factor = 1 if settings.production else DEVELOPMENT_FACTOR
        self._secret = limits.secret(secrets.token_bytes(32))

    def login(self, email: str, address: str) -> list[Bucket]:
        """Return the buckets of a login."""
        account, client = email.casefold(), client_network(address)
        pair = self._key("login", account, client)
        buckets = [(pair, *LOGIN_ACCOUNT_AND_ADDRESS), self._scaled("login", client, LOGIN_ADDRESS)]
        if not self._knows(pair):
            buckets.append((self._key("strangers", account), *LOGIN_STRANGERS))
        return buckets

    def code(self, email: str, address: str) -> list[Bucket]:
        """Return the buckets of a one-time code."""
        account, client = email.casefold(), client_network(address)
        if self._knows(self._key("login", account, client)):
            return [(self._key("code", account, client), *CODE_ACCOUNT_AND_ADDRESS)]
        return [(self._key("code", account), *CODE_STRANGERS)]

    def registration(self, address: str) -> list[Bucket]:
        """Return the buckets of a registration."""
        return [self._scaled("register", client_network(address), REGISTER_ADDRESS)]

    def reset_request(self, email: str, address: str) -> list[Bucket]:
        """Return the buckets of a request for a reset token."""
        account = self._scaled("reset account", email.casefold(), RESET_ACCOUNT)
        return [account, self._scaled("reset", client_network(address), RESET_ADDRESS)]

    def reset_confirmation(self, address: str) -> list[Bucket]:
        """Return the buckets of the use of a reset token."""
        return [self._scaled("confirm", client_network(address), RESET_TOKEN_ADDRESS)]

    def consume(self, buckets: Sequence[Bucket]) -> int:
        """Count an attempt and return 0, or return the seconds to wait where a bucket is empty."""
        return self._limits.consume(buckets, int(self._clock())) if self._enabled and buckets else 0

    def refund(self, buckets: Sequence[Bucket]) -> None:
        """Give back an attempt that succeeded."""
        if self._enabled and buckets:
            self._limits.refund(buckets)

    def remember(self, user_id: int, email: str, address: str) -> None:
        """Count later logins to this account from this address separately from those of strangers."""
        key = self._key("login", email.casefold(), client_network(address))
        self._limits.remember_address(user_id, key, int(self._clock()), MAX_KNOWN_ADDRESSES)

    def tag(self, email: str) -> str:
        """Return a keyed hash that stands for an unknown email in the log."""
        return self._key("tag", email.casefold())[:16]

    def _knows(self, key: str) -> bool:
        return self._limits.knows_address(key, int(self._clock()) - KNOWN_FOR)

    def _scaled(self, kind: str, counted: str, limit: tuple[int, int]) -> Bucket:
        size, interval = limit
        return self._key(kind, counted), size * self._factor, interval

    def _key(self, *parts: str) -> str:
        return hmac.digest(self._secret, json.dumps(parts).encode(), hashlib.sha256).hex()
