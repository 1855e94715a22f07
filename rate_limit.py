"""Rate limits: which attempts are counted, and how fast each limit refills.

An attempt consumes from each of its buckets before anything is hashed. If one is empty, the attempt is refused. The
buckets are stored in the database: they survive a restart, and copies of the service share them. Their keys are HMACs
under a secret of the database, so the table names no address and no email; a stolen database lets a thief test guesses.
An unknown email counts like a known one, so a limit does not reveal which emails have an account.

An account is never locked. Attempts with a device cookie (credentials/device.py), in a live session or with a mailed
token are counted apart from those of strangers, who therefore cannot use them up. An owner who has none of these shares
the limits of the strangers.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence

from addresses import client_networks
from settings import Settings
from tables.rate_limits import Bucket, RateLimits

# (attempts at once, seconds until one more is allowed)
LOGIN_DEVICE = 10, 60
LOGIN_DEVICES = 100, 900  # of one account together
LOGIN_ACCOUNT_AND_ADDRESS = 10, 60
LOGIN_ACCOUNT_AND_SITE = 40, 60  # an IPv6 /48, as large as a provider gives to one customer
LOGIN_STRANGERS = 20, 900  # one account, from all browsers without a device cookie
LOGIN_ADDRESS = 30, 30
LOGIN_PRIORITY = 30, 60  # hashes of one account that other requests wait for; refuses none, and is never refunded
# At any moment three of a million one-time codes are good. An attacker who has the password and guesses codes for a
# year has a chance of 3 %, or of 10 % with a copied device cookie.
CODE_DEVICES = 5, 900
CODE_STRANGERS = 5, 3600
CODE_RESETS = 5, 3600  # from browsers that reset the password; a bucket that only the mailbox leads to
REGISTER_ADDRESS = 20, 180
MAILS = 3, 1200  # to one email, of each kind
EMAIL_CHANGES = 5, 17_280  # that one user asks for: 5 a day
ACCOUNT_CHANGES = 10, 3600  # of one user, with the current password: most are told by mail
RESET_ADDRESS = 10, 360
RESET_TOKEN_ADDRESS = 10, 60
PASSKEY_ADDRESS = 30, 30  # passkeys that are not accepted
SESSION_PASSWORD = 10, 900  # the current password, asked again in one session
NEW_BROWSER_MAILS = 5, 17_280  # to one user: 5 a day
OTHER_SIGN_IN_MAILS = 1, 86_400  # to one user, of each kind

# How much larger the limit of a network is than that of one client in it: an IPv6 /56 and /48.
NETWORK_FACTORS = 1, 4, 16

# In development all clients share one address, and test suites create accounts by the hundred.
DEVELOPMENT_FACTOR = 100

# What mails about sign-ins tell, by its name in mails/. The summary counts those that NEW_BROWSER_MAILS left out.
NEW_BROWSER, CODE_MISSING, SUMMARY = "new_browser", "code_missing", "summary"

Buckets = Sequence[Bucket]


class RateLimiter:
    """Counts attempts in ``limits``; ``clock`` returns unix seconds.

    A method that names an attempt gives one or more lists of buckets. The attempt is counted in the first list that
    has an attempt left in each bucket.
    """

    def __init__(self, limits: RateLimits, settings: Settings, clock: Callable[[], float]) -> None:
        self._limits, self._clock = limits, clock
        self._enabled = settings.throttle
        self._factor = 1 if settings.production else DEVELOPMENT_FACTOR
        # With the secret of this database. It signs device cookies, too. A copy is made for each text: that takes half
        # the time of hmac.digest(), which looks the algorithm up.
        self.keyed = hmac.new(limits.secret(secrets.token_bytes(32)), digestmod=hashlib.sha256)

    def login(self, email: str, address: str, device: str | None = None) -> Iterator[Buckets]:
        """Yield the buckets of a login. ``device`` is the nonce of a valid device cookie of the account."""
        account, networks = email.casefold(), client_networks(address)
        if device is not None:
            yield self.login_of_device(email, device)
        pairs = [self._bucket(LOGIN_ACCOUNT_AND_ADDRESS, "login", account, networks[0])]
        if len(networks) > 1:
            pairs.append(self._bucket(LOGIN_ACCOUNT_AND_SITE, "login", account, networks[-1]))
        yield [
            *(pair._replace(emptied=True) for pair in pairs),
            self._bucket(LOGIN_STRANGERS, "strangers", account),
            *self._by_network(LOGIN_ADDRESS, "login", networks),
            *([] if device is None else [self._priority(account)]),  # it may have gone first nevertheless
        ]

    def login_of_device(self, email: str, device: str) -> Buckets:
        """Return the buckets of a login with a valid device cookie, given by its nonce."""
        account = email.casefold()
        own = self._bucket(LOGIN_DEVICE, "login of device", account, device)
        return [own, self._bucket(LOGIN_DEVICES, "login of devices", account), self._priority(account)]

    def code(self, email: str, device: str | None) -> list[Buckets]:
        """Return the buckets of a one-time code. ``device`` is the kind of a valid device cookie of the account."""
        # After a reset, a thief with the old password has no more codes to try than before.
        limits = {"full": (CODE_DEVICES, "code of devices"), "reset": (CODE_RESETS, "code after resets")}
        limit, kind = limits.get(device or "", (CODE_STRANGERS, "code"))
        return [[self._bucket(limit, kind, email.casefold())]]

    def session_password(self, session: int, email: str) -> list[Buckets]:
        """Return the buckets of the current password in a session, given by the id of its row and its user's email."""
        return [[self._bucket(SESSION_PASSWORD, "session", str(session)), self._priority(email.casefold())]]

    def registration(self, address: str) -> list[Buckets]:
        """Return the buckets of a registration."""
        return [self._by_network(REGISTER_ADDRESS, "register", client_networks(address))]

    def mails(self, kind: str, email: str) -> list[Buckets]:
        """Return the buckets of a mail that somebody asked for. Each kind has its own, so that none blocks another."""
        return [[self._bucket(MAILS, f"{kind} mail", email.casefold(), factor=self._factor)]]

    def changes(self, what: str, user_id: int) -> list[Buckets]:
        """Return the buckets of the changes of "email" that a user asks for, or of all changes of the "account"."""
        limit = EMAIL_CHANGES if what == "email" else ACCOUNT_CHANGES
        return [[self._bucket(limit, f"change of {what}", str(user_id))]]

    def reset_address(self, address: str) -> list[Buckets]:
        """Return the buckets of a request for a reset token."""
        return [self._by_network(RESET_ADDRESS, "reset", client_networks(address))]

    def unknown_token(self, address: str) -> list[Buckets]:
        """Return the buckets of a token that is not live, of whatever kind."""
        return [self._by_network(RESET_TOKEN_ADDRESS, "confirm", client_networks(address))]

    def unknown_passkey(self, address: str) -> list[Buckets]:
        """Return the buckets of a passkey that is not accepted."""
        return [self._by_network(PASSKEY_ADDRESS, "passkey", client_networks(address))]

    def sign_in_mail(self, kind: str, user_id: int) -> list[Buckets]:
        """Return the buckets of a mail to a user about sign-ins."""
        return [[self._bucket(NEW_BROWSER_MAILS if kind == NEW_BROWSER else OTHER_SIGN_IN_MAILS, kind, str(user_id))]]

    def consume(self, choices: Iterable[Buckets]) -> tuple[int, Buckets]:
        """Count an attempt; return 0 and the buckets it consumed from, or the seconds to wait and no buckets."""
        waits = []
        for buckets in choices if self._enabled else ():
            wait = self._limits.consume(buckets, int(self._clock()))
            if not wait:
                return 0, buckets
            waits.append(wait)
        return min(waits, default=0), []

    def has_attempts(self, buckets: Buckets) -> bool:
        """Return whether each of these buckets has an attempt left. Nothing is counted."""
        return not any(self._limits.is_empty(bucket, int(self._clock())) for bucket in buckets)

    def refund(self, buckets: Buckets) -> None:
        """Give back an attempt that succeeded."""
        if buckets:
            self._limits.refund([bucket for bucket in buckets if bucket.refuses])

    def tag(self, email: str) -> str:
        """Return a keyed hash that stands for an unknown email in the log."""
        return self._key("tag", email.casefold())[:16]

    def _by_network(self, limit: tuple[int, int], kind: str, networks: Sequence[str]) -> list[Bucket]:
        pairs = zip(networks, NETWORK_FACTORS, strict=False)  # an IPv4 address is the only network of its client
        return [self._bucket(limit, kind, network, factor=factor * self._factor) for network, factor in pairs]

    def _priority(self, account: str) -> Bucket:
        return Bucket(self._key("priority", account), *LOGIN_PRIORITY, refuses=False)

    def _bucket(self, limit: tuple[int, int], *parts: str, factor: int = 1) -> Bucket:
        size, interval = limit
        return Bucket(self._key(*parts), size * factor, interval)

    def _key(self, *parts: str) -> str:
        # ascii(), as no two tuples of strings have the same text.
        mac = self.keyed.copy()
        mac.update(ascii(parts).encode())
        return mac.hexdigest()
