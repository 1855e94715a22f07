"""The rules: who may register, what logs in, what a session is, and when a token dies.

Read this one file to audit them. In come plain strings from the desk, out go hashes and unix seconds to the
vault. Knows no HTTP and no SQL.

- A session id or a reset token is random, handed out once, and kept only as its SHA-256.
- A session ends ``session_idle`` seconds after its last use, ``session_lifetime`` after its start, at logout,
  when newer ones take its place or its user ends it, and with any change of the password or the second factor; the
  one from which that change was made goes on under a new id.
- A reset token ends after ``reset_lifetime`` seconds, an invitation after 7 days, both when used, when a newer one is
  made, and with the same changes. Neither switches a second factor off.
- A one-time code works once, and only after the password. A disabled account is one that nobody can log in to.
- In production secrets have 256 random bits, a password must be long and uncommon, and a reset token is only mailed.
- A time more than 300 s ahead of the clock is invalid: a clock that jumped back extends nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from email.message import EmailMessage
from urllib.parse import urlsplit

import passwords
import totp
from database import AlreadyExists, StorageUnavailable
from mailer import Mailer
from settings import MAILBOX, Settings
from storage import CLOCK_TOLERANCE, NoResultFound, Session, Store, User, open_store, public_id
from throttle import KNOWN_FOR, Bucket, Throttle

LONGEST_EMAIL = 254  # bytes (RFC 5321 4.5.3.1.3, less the angle brackets)
LONGEST_USER_AGENT = 200  # characters that are kept of it
RESET_INTERVAL = 300  # seconds between two reset mails to one user
INVITATION_LIFETIME = 604_800  # seconds, 7 days: it waits for somebody who did not ask for it
SEEN_INTERVAL = 60  # seconds between two records of a session's use: reading must not write each time
PRUNE_STEP = 200  # rows of a kind that are deleted at once: 10 ms in which nobody else can write

NO_PASSWORD = "!"  # stands for the hash until an invitation is taken up; matches nothing  # noqa: S105


class AuthError(ValueError):
    """A refusal by the rules. ``message`` is fit to be shown to whoever asked; ``str()`` may say more."""

    message = "refused"
    user_id: int | None = None  # whom it concerns, for the log

    def __init__(self, message: str | None = None, *, text: str | None = None, user_id: int | None = None) -> None:
        self.message = message or self.message
        self.user_id = user_id
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


class SessionUnknown(AuthError):
    """The user has no live session of this name."""

    message = "no such session"


class RegistrationClosed(AuthError):
    """The operator lets nobody register, or only by invitation; the message says which."""


class ReauthenticationFailed(AuthError):
    """Who is logged in has not shown again that it is them; the message says what was wrong."""


class CodeRequired(AuthError):
    """The password was right, and is not enough: a one-time code must come with it."""

    message = "one-time code required"


class SecondFactorRequired(AuthError):
    """The operator demands a second factor, and the user has none yet."""

    message = "set up a second factor first"


class SecondFactorRejected(AuthError):
    """There is one already, or none; the message says which."""


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
        db: Store | None = None,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
        defer: Callable[[Callable[[], object]], object] = lambda write: write(),
        mailer: Mailer | None = None,
    ) -> None:
        self._settings = settings or Settings.from_environ()
        self._db = db or open_store(self._settings.database, private=self._settings.production)
        self._clock = clock
        self._defer = defer
        self._mailer = mailer if mailer and mailer.enabled else None
        self._throttle = Throttle(self._db, self._settings, clock)

    def close(self) -> None:
        """Let go of the store. No thread may be using it then or later."""
        self._db.close()

    @property
    def engine(self) -> str:
        """What keeps the rows, and in which version."""
        return self._db.engine

    # Accounts

    def register_user(self, email: str, password: str, *, address: str = "") -> User:
        """Make an account.

        Raises:
            RegistrationClosed: the operator wants it so.
            EmailRejected: blank, too long, or with control characters; in production no mailbox either.
            PasswordRejected: empty or too long; in production too short or too common.
            EmailTaken: there is one already, in whatever letter case.
        """
        if self._settings.registration != "open":
            closed = self._settings.registration == "closed"
            raise RegistrationClosed("registration is closed" if closed else "registration is by invitation only")
        self.check_email(email)
        self._check_password(password, email)
        self._count(self._throttle.registration, address)
        return self._add_user(email, _hash_password(password, self._settings.bcrypt_cost))

    def check_email(self, email: str) -> None:
        """Raise EmailRejected where this cannot become an account's."""
        _check_email(email, production=self._settings.production)

    def valid_login(self, email: str, password: str) -> bool:
        """Say whether this is the password of this email, in the same time whether or not the email is known."""
        return self._verified_user(email, password) is not None

    # Sessions

    def log_in(
        self,
        email: str,
        password: str,
        otp: str = "",
        *,
        replaced: str | None = None,
        address: str = "",
        user_agent: str = "",
    ) -> tuple[User, str]:
        """Check the password, and the one-time or recovery code of who has a second factor.

        Return the user and a new session's id. The ``replaced`` session, which this client held, ends.

        Raises:
            LoginFailed: wrong password, unknown email, disabled account or wrong code.
            CodeRequired: the password is right, and the code missing.
        """
        buckets = self._count(self._throttle.login, email, address)
        shown = None  # which second factor was
        while user := self._verified_user(email, password):
            if user.totp_since != shown:
                self._check_code(user, otp, address, buckets)
                shown = user.totp_since
            if session_id := self._start_session(user, replaced, address, user_agent):
                self._later(self._recognise, user, address, buckets)
                return user, session_id
            # The password or the second factor changed while we compared with the old one: compare again.
        raise LoginFailed(user_id=user.id if (user := self._find_user(email)) else None)

    def create_session(self, email: str) -> str | None:
        """Start a session without a password and return its id, or None when nobody who may log in has this email."""
        while (user := self._find_user(email)) and not user.disabled_at:
            if session_id := self._start_session(user):
                return session_id
        return None

    def get_user_from_session_id(self, session_id: str | None) -> User | None:
        """Return the user of a live session, or None; also None while a second factor that is required is missing."""
        try:
            return self.identify(session_id)
        except AuthError:
            return None

    def identify(self, session_id: str | None, *, enrolling: bool = False) -> User:
        """Return the user of a live session; ``enrolling`` is the way to a second factor that is required.

        Raises:
            SessionRequired: it is not live.
            SecondFactorRequired: the operator demands one, and the user has none.
        """
        session_hash, window = _digest(session_id), self._session_window()
        found = self._db.find_session(session_hash, **window) if session_id else None
        if not found:
            raise SessionRequired
        user, last_seen_at = found
        if last_seen_at <= window["now"] - min(SEEN_INTERVAL, self._settings.session_idle // 2):
            self._later(self._db.touch_session, session_hash, window["now"])
        if self._settings.require_totp and not user.totp_since and not enrolling:
            raise SecondFactorRequired
        return user

    def list_sessions(self, session_id: str | None) -> tuple[User, list[Session], str]:
        """Return whose session this is, all live ones of that user, and what this one is called among them."""
        user = self.identify(session_id)
        return user, self.sessions_of(user.id), public_id(_digest(session_id))

    def sessions_of(self, user_id: int) -> list[Session]:
        """Return a user's live sessions, the newest first."""
        return self._db.list_sessions(user_id, **self._session_window())

    def expires_at(self, session: Session) -> int:
        """Return when a session ends if it is not used again, in unix seconds."""
        return min(session.expires_at, session.last_seen_at + self._settings.session_idle)

    def check_store(self) -> None:
        """Ask the store for something; raise StorageUnavailable where it does not answer."""
        self._db.check_place()
        self._find_user("")

    def log_out(self, session_id: str | None) -> User:
        """End this session and no other; return its user.

        Raises:
            SessionRequired: it is not live.
        """
        user = self.identify(session_id, enrolling=True)
        if not self._db.end_session(_digest(session_id)):
            raise SessionRequired
        return user

    def end_session(self, session_id: str | None, named: str) -> tuple[User, bool]:
        """End the named session of whoever holds this one; return the user and whether it was this one.

        Raises:
            SessionUnknown: the user has no such session, whoever else may.
        """
        user = self.identify(session_id)
        for session in self.sessions_of(user.id):
            if session.id == named and self._db.end_session(session.session_hash):
                return user, named == public_id(_digest(session_id))
        raise SessionUnknown

    def end_sessions(self, session_id: str | None, *, but_this: bool) -> User:
        """End all sessions of whoever holds this one, or all others; return the user."""
        user = self.identify(session_id)
        self._db.end_sessions(user.id, kept=_digest(session_id) if but_this else None)
        return user

    def destroy_session(self, user_id: int) -> None:
        """End all sessions of a user; nothing happens where there is none."""
        self._db.end_sessions(user_id)

    # Changes, by who is logged in. The password is asked again, and counted as at login.

    def change_password(
        self, session_id: str | None, password: str, new_password: str, *, address: str = ""
    ) -> tuple[User, str]:
        """Set a new password; return the user and the new id under which this session goes on. All others end.

        Raises:
            PasswordRejected: the new one, as when registering.
            ReauthenticationFailed: the present one is wrong.
        """
        user = self.identify(session_id)
        self._check_password(new_password, user.email)
        self._reauthenticate(user, password, address)
        hashed, renewed = _hash_password(new_password, self._settings.bcrypt_cost), self._new_secret()
        old, session_hash = user.hashed_password, _digest(session_id)
        if not self._db.change_password(user.id, old, hashed, session_hash, _digest(renewed)):
            raise SessionRequired  # it ended while we hashed
        self._notify(user, "Your password was changed")
        return user, renewed

    def delete_account(self, session_id: str | None, password: str, *, address: str = "") -> User:
        """Delete the account and all that is its own; return what it was.

        Raises:
            ReauthenticationFailed: the password is wrong.
        """
        user = self.identify(session_id)
        self._reauthenticate(user, password, address)
        if not self._db.delete_verified_user(user, _digest(session_id)):
            raise SessionRequired
        self._notify(user, "Your account was deleted")
        return user

    def begin_totp(self, session_id: str | None, password: str, *, address: str = "") -> tuple[str, str]:
        """Make the seed of a second factor, which a code must confirm; return it, and as a link for an app.

        Raises:
            ReauthenticationFailed: the password is wrong.
            SecondFactorRejected: there is one in force.
        """
        user = self.identify(session_id, enrolling=True)
        if user.totp_since:
            raise SecondFactorRejected("a second factor is on already")
        self._reauthenticate(user, password, address)
        seed = totp.new_seed()
        if not self._db.set_totp(user, seed, _digest(session_id)):
            raise SessionRequired  # it ended while we hashed, or another began
        return seed, totp.uri(seed, user.email, urlsplit(self._settings.public_url).hostname or "authsvc")

    def confirm_totp(self, session_id: str | None, otp: str, *, address: str = "") -> tuple[User, str, list[str]]:
        """Put the second factor into force; return the user, this session's new id, and the recovery codes.

        Raises:
            ReauthenticationFailed: the code is wrong.
            SecondFactorRejected: none is being set up.
        """
        user = self.identify(session_id, enrolling=True)
        if not user.totp_secret or user.totp_since:
            raise SecondFactorRejected("no second factor is being set up")
        buckets = self._count(self._throttle.code, user.email, address)
        step = totp.matching_step(user.totp_secret, otp, self._now())
        if step is None:
            raise ReauthenticationFailed("wrong one-time code", user_id=user.id)
        codes, renewed = totp.new_recovery_codes(), self._new_secret()
        if not self._db.confirm_totp(
            user,
            step,
            [totp.recovery_hash(code) for code in codes],
            now=self._now(),
            session_hash=_digest(session_id),
            renewed=_digest(renewed),
        ):
            raise SessionRequired
        self._later(self._throttle.give_back, buckets)
        self._notify(user, "A second factor was switched on")
        return user, renewed, codes

    def remove_totp(self, session_id: str | None, password: str, otp: str, *, address: str = "") -> tuple[User, str]:
        """Switch the second factor off; return the user and the new id of this session. All others end.

        Raises:
            ReauthenticationFailed: the password or the code is wrong.
            SecondFactorRejected: there is none.
        """
        user = self.identify(session_id)
        if not user.totp_since:
            raise SecondFactorRejected("no second factor is on")
        self._reauthenticate(user, password, address)
        if not self._spend_code(user, otp, address):
            raise ReauthenticationFailed("wrong one-time code", user_id=user.id)
        renewed = self._new_secret()
        if not self._db.remove_totp(user.id, _digest(session_id), _digest(renewed)):
            raise SessionRequired
        self._notify(user, "The second factor was switched off")
        return user, renewed

    # Reset

    def get_reset_password_token(self, email: str, *, address: str = "") -> str:
        """Return a new reset token, which replaces the former one.

        Raises:
            UnknownEmail: nobody has this email.
        """
        self._count(self._throttle.reset_request, email, address)
        user = self._find_user(email)
        if not user or not _may_reset(user):
            raise UnknownEmail
        return self._new_reset_token(user, self._settings.reset_lifetime) or ""

    def mail_reset_token(self, email: str, address: str, log: Callable[..., None]) -> None:
        """Mail a reset token to whom it may concern; nothing here tells whether it does, not even the time."""
        if self._mailer:
            self._mailer.put(functools.partial(self._reset_mail, email, address, log))

    def update_password(self, reset_token: str, password: str, email: str | None = None, *, address: str = "") -> int:
        """Set a new password, spend the token and end all sessions, in one step; return the user's id.

        Raises:
            PasswordRejected: as when registering; the token stays good.
            TokenRejected: not a live token, or not that of ``email`` where one is given.
        """
        buckets = self._count(self._throttle.reset_confirmation, address)
        token_hash = _digest(reset_token)
        user = self._db.find_reset(token_hash, **self._reset_window())  # first: a guess costs no bcrypt
        if not user or (email is not None and user.email.casefold() != email.casefold()):
            raise TokenRejected
        self._check_password(password, user.email)
        hashed = _hash_password(password, self._settings.bcrypt_cost)
        if not self._db.spend_reset(token_hash, hashed, **self._reset_window()):
            raise TokenRejected  # somebody spent it while we hashed
        self._later(self._throttle.give_back, buckets)
        self._notify(user, "Your password was changed")
        return user.id

    # The operator's

    def find_user(self, email: str) -> User:
        """Return the user of this email.

        Raises:
            UnknownEmail: there is none.
        """
        user = self._find_user(email)
        if not user:
            raise UnknownEmail
        return user

    def add_account(self, email: str) -> User:
        """Make an account that has no password yet.

        Raises:
            EmailRejected, EmailTaken: as when registering.
        """
        self.check_email(email)
        return self._add_user(email, NO_PASSWORD)

    def link_token(self, user: User) -> tuple[str, int]:
        """Return a token with which the user sets a password, the first or a new one, and when it ends."""
        first = user.hashed_password == NO_PASSWORD
        lifetime = INVITATION_LIFETIME if first else self._settings.reset_lifetime
        return self._new_reset_token(user, lifetime) or "", self._now() + lifetime

    def prune(self) -> bool:
        """Delete some sessions, counts and known addresses that are over; say whether there may be more."""
        now = self._now()
        return self._db.prune(now=now, known_since=now - KNOWN_FOR, most=PRUNE_STEP) >= PRUNE_STEP

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

    def _notify(self, user: User, what: str) -> None:
        if self._mailer:
            self._mailer.put(functools.partial(self._mailer.notice, user.email, what))

    def _add_user(self, email: str, hashed: str | bytes) -> User:
        try:
            return self._db.add_user(email, hashed, self._now())
        except AlreadyExists:
            raise EmailTaken(text=f"User {email} already exists") from None

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
        return None if user.disabled_at else self._with_current_cost(user, password)

    def _reauthenticate(self, user: User, password: str, address: str) -> None:
        buckets = self._count(self._throttle.login, user.email, address)
        if not passwords.verify(password, user.hashed_password, self._settings.bcrypt_cost):
            raise ReauthenticationFailed("wrong password", user_id=user.id)
        self._later(self._throttle.give_back, buckets)

    def _check_code(self, user: User, otp: str, address: str, buckets: Sequence[Bucket]) -> None:
        if not user.totp_since:
            return
        if not otp:
            self._later(self._throttle.give_back, buckets)  # the password was no guess
            raise CodeRequired
        if not self._spend_code(user, otp, address):
            raise LoginFailed("wrong one-time code", user_id=user.id)

    def _spend_code(self, user: User, otp: str, address: str) -> bool:
        if not totp.is_code(otp):  # a recovery code is too long to be guessed
            return self._db.spend_recovery_code(user.id, totp.recovery_hash(otp))
        buckets = self._count(self._throttle.code, user.email, address)
        step = totp.matching_step(user.totp_secret or "", otp, self._now())
        if step is None or not self._db.spend_totp(user.id, step, step + CLOCK_TOLERANCE // totp.STEP):
            return False
        self._later(self._throttle.give_back, buckets)
        return True

    def _with_current_cost(self, user: User, password: str) -> User:
        # Only now is the password at hand to be hashed anew after the operator has changed the cost.
        if passwords.cost_of(user.hashed_password) == self._settings.bcrypt_cost:
            return user
        hashed = _hash_password(password, self._settings.bcrypt_cost)
        self._db.replace_hash(user.id, user.hashed_password, hashed)
        return dataclasses.replace(user, hashed_password=hashed)  # where it was not stored, no session starts from it

    def _check_password(self, password: str, email: str) -> None:
        reason = passwords.objection(password)
        if self._settings.production and not reason:
            reason = passwords.weakness(password, f"{email} {self._settings.public_url}", self._settings.password_min)
        if reason:
            raise PasswordRejected(reason)

    def _start_session(
        self, user: User, replaced: str | None = None, address: str = "", user_agent: str = ""
    ) -> str | None:
        now, session_id = self._now(), self._new_secret()
        session = Session(
            _digest(session_id),
            created_at=now,
            last_seen_at=now,
            expires_at=now + self._settings.session_lifetime,
            address=address,
            user_agent=user_agent.replace("\0", "")[:LONGEST_USER_AGENT],  # no text to PostgreSQL
        )
        started = self._db.add_session(
            user,
            session,
            replaced=_digest(replaced) if replaced else None,
            idle_since=now - self._settings.session_idle,
            most=self._settings.sessions_per_user,
        )
        return session_id if started else None

    def _session_window(self) -> dict[str, int]:
        now = self._now()
        return {"now": now, "idle_since": now - self._settings.session_idle, "latest": now + CLOCK_TOLERANCE}

    def _reset_window(self) -> dict[str, int]:
        now = self._now()
        return {"now": now, "latest": now + CLOCK_TOLERANCE}

    def _count(self, limits: Callable[..., list[Bucket]], *who: str) -> list[Bucket]:
        buckets = limits(*who) if who[-1] else []  # without an address it is no client who asks
        if wait := self._throttle.take(buckets):
            raise TooManyAttempts(wait)
        return buckets

    def _recognise(self, user: User, address: str, buckets: Sequence[Bucket]) -> None:
        if address:
            self._throttle.give_back(buckets)
            self._throttle.remember(user.id, user.email, address)

    def _new_secret(self) -> str:
        # OWASP ASVS 7.2.3 asks for 128 random bits; a version-4 UUID has 122.
        return secrets.token_urlsafe(32) if self._settings.production else _generate_uuid()

    def _new_reset_token(self, user: User, lifetime: int, *, keep_for: int = 0) -> str | None:
        token, now = self._new_secret(), self._now()
        stored = self._db.set_reset_token(
            user.id, _digest(token), now=now, expires_at=now + lifetime, unless_since=now - keep_for
        )
        return token if stored else None

    def _reset_mail(self, email: str, address: str, log: Callable[..., None]) -> EmailMessage | None:
        if self._throttle.take(self._throttle.reset_request(email, address)):
            log("excess_rate_limit_exceeded")
            return None
        user = self._find_user(email)
        if not user or not _may_reset(user) or not self._mailer:
            return None
        # One that is younger than five minutes is not replaced: a stranger's clicks must not void the owner's link.
        token = self._new_reset_token(user, self._settings.reset_lifetime, keep_for=RESET_INTERVAL)
        if not token:
            return None
        log("authn_reset_token_created", user_id=user.id)
        return self._mailer.reset(user.email, token)


def _may_reset(user: User) -> bool:
    # Not who was only invited: anybody's request would void the invitation.
    return user.disabled_at is None and user.hashed_password != NO_PASSWORD


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
    if re.search(r"[\x00-\x1f\x7f-\x9f]", email):  # Unicode's category Cc
        raise EmailRejected("email must not contain control characters")
    if production and not MAILBOX.fullmatch(email):
        raise EmailRejected("email must be name@host, in ASCII, without spaces and quotes")


def _digest(secret: str | None) -> str:
    # Plain SHA-256 is enough for what has 122 random bits: there is nothing to guess.
    return hashlib.sha256((secret or "").encode("utf-8", "surrogatepass")).hexdigest()
