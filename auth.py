"""The rules: who may register, what logs in, what a session is, and when a token dies.

Read this one file to audit them. In come plain strings from the desk, out go hashes and unix seconds to the
vault. Knows no HTTP and no SQL.

- A session id or a reset token is random, handed out once, and kept only as its SHA-256.
- A session ends ``session_idle`` seconds after its last use, ``session_lifetime`` after its start, at logout,
  when newer ones take its place, and with any change of the password.
- A reset token ends after ``reset_lifetime`` seconds, when used, and when a newer one is made.
- In production secrets have 256 random bits, a password must be long and uncommon, and a reset token is only mailed.
- A time more than 300 s ahead of the clock is invalid: a clock that jumped back extends nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import secrets
import time
import unicodedata
import uuid
from collections.abc import Callable, Sequence
from email.message import EmailMessage

import passwords
from mailer import Mailer
from settings import MAILBOX, Settings
from storage import DB, AlreadyExists, NoResultFound, StorageUnavailable, User
from throttle import Bucket, Throttle

LONGEST_EMAIL = 254  # bytes (RFC 5321 4.5.3.1.3, less the angle brackets)
LONGEST_USER_AGENT = 200  # characters that are kept of it
CLOCK_TOLERANCE = 300  # seconds
RESET_INTERVAL = 300  # seconds between two reset mails to one user
SEEN_INTERVAL = 60  # seconds between two records of a session's use: reading must not write each time


class AuthError(ValueError):
    """A refusal by the rules. ``message`` is fit to be shown to whoever asked; ``str()`` may say more."""

    message = "refused"

    def __init__(self, message: str | None = None, *, text: str | None = None) -> None:
        self.message = message or self.message
        super().__init__(text or self.message)


class EmailTaken(AuthError):
    """The email has an account, perhaps in other letters."""

    message = "email already registered"


class EmailRejected(AuthError):
    """This cannot be an email; the message says why."""


class PasswordRejected(AuthError):
    """This cannot become a password; the message says why."""


class UnknownEmail(AuthError):
    """Nobody has this email."""

    message = "unknown email"


class LoginFailed(AuthError):
    """Wrong password or unknown email; which one is not said, only logged: ``user_id`` is None for the latter."""

    message = "wrong email or password"
    user_id: int | None = None


class TokenRejected(AuthError):
    """A reset token that is unknown, spent, replaced, expired or another user's."""

    message = "invalid reset token"


class TooManyAttempts(AuthError):
    """One attempt too many; another is worth it after ``wait`` seconds."""

    message = "too many requests"

    def __init__(self, wait: int = 0) -> None:
        super().__init__()
        self.wait = wait


class SessionRequired(AuthError):
    """There is no live session."""

    message = "not logged in"


def _hash_password(password: str, cost: int | None = None) -> bytes:
    """Return a salted hash of the password, with the cost of the settings unless another is given."""
    return passwords.hash_password(password, Settings.from_environ().bcrypt_cost if cost is None else cost)


def _generate_uuid() -> str:
    """Return a new random UUID as text, 36 characters with 122 random bits."""
    return str(uuid.uuid4())


class Auth:
    """The rules over one store. Safe to use from many threads.

    ``clock`` tells unix seconds; ``defer`` runs a write that nobody waits for, at once unless told otherwise.
    Where a method takes the ``address`` of a client it counts the attempt, and raises TooManyAttempts.
    """

    def __init__(
        self,
        db: DB | None = None,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
        defer: Callable[[Callable[[], object]], object] = lambda write: write(),
        mailer: Mailer | None = None,
    ) -> None:
        self._settings = settings or Settings.from_environ()
        self._db = db or DB(self._settings.database, private=self._settings.production)
        self._clock = clock
        self._defer = defer
        self._mailer = mailer
        self._throttle = Throttle(self._db, self._settings, clock)

    def close(self) -> None:
        """Let go of the store. No thread may be using it then or later."""
        self._db.close()

    # Accounts

    def register_user(self, email: str, password: str, *, address: str = "") -> User:
        """Make an account.

        Raises:
            EmailRejected: blank, too long, or with control characters; in production no mailbox either.
            PasswordRejected: empty or too long; in production too short or too common.
            EmailTaken: there is one already, in whatever letter case.
        """
        _check_email(email, production=self._settings.production)
        self._count(self._throttle.registration(address) if address else [])
        hashed = self._new_hash(password, email)
        try:
            return self._db.add_user(email, hashed)
        except AlreadyExists:
            raise EmailTaken(text=f"User {email} already exists") from None

    def valid_login(self, email: str, password: str) -> bool:
        """Say whether this is the password of this email, in the same time whether or not the email is known."""
        return self._verified_user(email, password) is not None

    # Sessions

    def log_in(
        self, email: str, password: str, *, replaced: str | None = None, address: str = "", user_agent: str = ""
    ) -> str:
        """Check the password and start a session; return its id.

        The ``replaced`` session, which this client held, ends.

        Raises:
            LoginFailed: wrong password or unknown email.
        """
        buckets = self._throttle.login(email, address) if address else []
        self._count(buckets)
        while user := self._verified_user(email, password):
            if session_id := self._start_session(user, replaced, address, user_agent):
                self._later(self._recognise, user, address, buckets)
                return session_id
            # The password changed while we compared with the old one: compare again.
        refusal = LoginFailed()
        refusal.user_id = user.id if (user := self._find_user(email)) else None
        raise refusal

    def create_session(self, email: str) -> str | None:
        """Start a session without a password and return its id, or None when nobody has this email."""
        while user := self._find_user(email):
            if session_id := self._start_session(user):
                return session_id
        return None

    def get_user_from_session_id(self, session_id: str | None) -> User | None:
        """Return the user of a live session, or None."""
        if not session_id:
            return None
        now, session_hash = self._now(), _digest(session_id)
        found = self._db.find_session(
            session_hash,
            now=now,
            idle_since=now - self._settings.session_idle,
            latest=now + CLOCK_TOLERANCE,
        )
        if not found:
            return None
        user, last_seen_at = found
        if last_seen_at <= now - min(SEEN_INTERVAL, self._settings.session_idle // 2):
            self._later(self._db.touch_session, session_hash, now)
        return user

    def log_out(self, session_id: str | None) -> User:
        """End this session and no other; return its user.

        Raises:
            SessionRequired: it is not live.
        """
        user = self.get_user_from_session_id(session_id)
        if not (user and session_id and self._db.end_session(_digest(session_id))):
            raise SessionRequired
        return user

    def destroy_session(self, user_id: int) -> None:
        """End all sessions of a user; nothing happens where there is none."""
        self._db.end_sessions(user_id)

    # Reset

    def get_reset_password_token(self, email: str, *, address: str = "") -> str:
        """Return a new reset token, which replaces the former one.

        Raises:
            UnknownEmail: nobody has this email.
        """
        self._count(self._throttle.reset_request(email, address) if address else [])
        user = self._find_user(email)
        token = user and self._new_reset_token(user)
        if not token:
            raise UnknownEmail
        return token

    def mail_reset_token(self, email: str, address: str, log: Callable[..., None]) -> None:
        """Mail a reset token to whom it may concern; nothing here tells whether it does, not even the time."""
        if self._mailer and self._mailer.enabled:
            self._mailer.put(functools.partial(self._reset_mail, email, address, log))

    def update_password(self, reset_token: str, password: str, email: str | None = None, *, address: str = "") -> int:
        """Set a new password, spend the token and end all sessions, in one step; return the user's id.

        Raises:
            PasswordRejected: as when registering; the token stays good.
            TokenRejected: not a live token, or not that of ``email`` where one is given.
        """
        buckets = self._throttle.reset_confirmation(address) if address else []
        self._count(buckets)
        token_hash = _digest(reset_token or "")
        user = self._db.find_reset(token_hash, **self._reset_window())  # first: a guess costs no bcrypt
        if not user or (email is not None and user.email.casefold() != email.casefold()):
            raise TokenRejected
        hashed = self._new_hash(password, user.email)
        if not self._db.spend_reset(token_hash, hashed, **self._reset_window()):
            raise TokenRejected  # somebody spent it while we hashed
        self._later(self._throttle.give_back, buckets)
        if self._mailer and self._mailer.enabled:
            self._mailer.put(functools.partial(self._mailer.changed, user.email))
        return user.id

    def tag(self, email: str) -> str:
        """Return what stands for an unknown email in the log."""
        return self._throttle.tag(email)

    # Details

    def _later(self, write: Callable[..., object], *arguments: object) -> None:
        def attempt() -> None:
            with contextlib.suppress(StorageUnavailable):  # what was asked for is done; it must not fail by this
                write(*arguments)

        self._defer(attempt)

    def _now(self) -> int:
        return int(self._clock())

    def _find_user(self, email: str) -> User | None:
        try:
            return self._db.find_user_by(email=email)
        except NoResultFound:
            return None

    def _verified_user(self, email: str, password: str) -> User | None:
        user = self._find_user(email)
        cost = self._settings.bcrypt_cost
        if not passwords.verify(password, user.hashed_password if user else None, cost) or not user:
            return None
        return self._with_current_cost(user, password)

    def _with_current_cost(self, user: User, password: str) -> User:
        # Only now is the password at hand to be hashed anew after the operator has changed the cost.
        if passwords.cost_of(user.hashed_password) == self._settings.bcrypt_cost:
            return user
        hashed = _hash_password(password, self._settings.bcrypt_cost)
        self._db.replace_hash(user.id, user.hashed_password, hashed)
        return dataclasses.replace(user, hashed_password=hashed)  # where it was not stored, no session starts from it

    def _new_hash(self, password: str, email: str) -> bytes:
        reason = passwords.objection(password)
        if self._settings.production and not reason:
            reason = passwords.weakness(password, f"{email} {self._settings.public_url}", self._settings.password_min)
        if reason:
            raise PasswordRejected(reason)
        return _hash_password(password, self._settings.bcrypt_cost)

    def _start_session(
        self, user: User, replaced: str | None = None, address: str = "", user_agent: str = ""
    ) -> str | None:
        now, session_id = self._now(), self._new_secret()
        started = self._db.add_session(
            user.id,
            _digest(session_id),
            verified=user.hashed_password,
            replaced=_digest(replaced) if replaced else None,
            now=now,
            idle_since=now - self._settings.session_idle,
            expires_at=now + self._settings.session_lifetime,
            address=address,
            user_agent=user_agent[:LONGEST_USER_AGENT],
            most=self._settings.sessions_per_user,
        )
        return session_id if started else None

    def _reset_window(self) -> dict[str, int]:
        now = self._now()
        return {"now": now, "latest": now + self._settings.reset_lifetime + CLOCK_TOLERANCE}

    def _count(self, buckets: Sequence[Bucket]) -> None:
        if wait := self._throttle.take(buckets):
            raise TooManyAttempts(wait)

    def _recognise(self, user: User, address: str, buckets: Sequence[Bucket]) -> None:
        if address:
            self._throttle.give_back(buckets)
            self._throttle.remember(user.id, user.email, address)

    def _new_secret(self) -> str:
        # OWASP ASVS 7.2.3 asks for 128 random bits; a version-4 UUID has 122.
        return secrets.token_urlsafe(32) if self._settings.production else _generate_uuid()

    def _new_reset_token(self, user: User, *, keep_for: int = 0) -> str | None:
        token, expires_at = self._new_secret(), self._now() + self._settings.reset_lifetime
        kept = (max(self._now(), expires_at - keep_for), expires_at + CLOCK_TOLERANCE) if keep_for else (0, 0)
        stored = self._db.set_reset_token(user.email, _digest(token), expires_at, kept)
        return token if stored else None

    def _reset_mail(self, email: str, address: str, log: Callable[..., None]) -> EmailMessage | None:
        if self._throttle.take(self._throttle.reset_request(email, address)):
            log("excess_rate_limit_exceeded")
            return None
        user = self._find_user(email)
        if not user or not self._mailer:
            return None
        # One that is younger than five minutes is not replaced: a stranger's clicks must not void the owner's link.
        token = self._new_reset_token(user, keep_for=RESET_INTERVAL)
        if not token:
            return None
        log("authn_reset_token_created", user_id=user.id)
        return self._mailer.reset(user.email, token)


def _check_email(email: str, *, production: bool) -> None:
    # In development nothing more is asked: spaces, quotes and letters of any script register.
    try:
        size = len(email.encode())
    except UnicodeEncodeError:
        raise EmailRejected("email is not valid text") from None
    if not email.strip():
        raise EmailRejected("email must not be blank")
    if size > LONGEST_EMAIL:
        raise EmailRejected(f"email must be at most {LONGEST_EMAIL} bytes")
    if any(unicodedata.category(character) == "Cc" for character in email):
        raise EmailRejected("email must not contain control characters")
    if production and not MAILBOX.fullmatch(email):
        raise EmailRejected("email must be name@host, in ASCII, without spaces and quotes")


def _digest(secret: str) -> str:
    # Plain SHA-256 is enough for what has 122 random bits: there is nothing to guess.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
