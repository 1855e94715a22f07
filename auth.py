"""The rules: who may create an account, who may sign in, what a session is, and when each credential dies.

Plain strings come in from the routes, hashes and unix seconds go out to storage. Reads no request and builds no
response; each refusal names its status. Knows no SQL.

- A session id or a reset token is random, shown once, and stored only as its SHA-256.
- A session ends ``session_idle`` seconds after its last use, ``session_lifetime`` seconds after its start, at logout,
  when newer sessions replace it, when its user ends it, and when the password or the second factor changes. The
  session in which that change is made continues under a new id.
- A reset token expires after ``reset_lifetime`` seconds, an invitation after 7 days. Both die when they are used, when
  a newer one is made, and when the password or the second factor changes. Neither switches a second factor off.
- A registration that waits for its email to be confirmed expires after 24 hours, and dies when somebody else gets the
  email. The account exists once the link of the mail was used, with the password that was chosen then.
- A new email that waits to be confirmed expires after an hour. It dies with the session that asked for it, and when the
  password, the second factor or the email changes. Only that session can confirm it. In production the former email,
  and that of a deleted user, is reserved for 90 days.
- A recovery code dies when it is used and when the second factor is switched off. A seed that no code has confirmed
  dies when it is replaced and when the password changes.
- A device cookie expires after 90 days, and dies when the password changes or is reset, when a second factor is
  switched on, and when the user is disabled.
- Disabling or deleting a user, a restored backup and the operator's ``sessions end --all`` end sessions, and with them
  reset tokens, invitations and unconfirmed seeds. ``sessions end EMAIL`` and ``totp-off`` end the sessions of one user.
  ``sessions end`` also voids device cookies.
- An access token opens ``/verify`` alone. It ends at its own time, when its user deletes it, when the password is
  reset, when the user is disabled, and by ``sessions end``. A change with the current password leaves it valid.
- A passkey is two factors. Its challenge works once, for one browser and purpose, within 5 minutes. It ends when its
  user deletes it, and by ``passkeys-off``. A reset deletes those of the last 30 days, which may be an intruder's.
- A one-time code works once, and only after the password. Nobody can sign in to a disabled account.
- A session remembers when a second factor was last shown in it. Switching the factor off resets that.
- In production secrets have 256 random bits, a password must be long and uncommon, and a reset token is only mailed.
- A time that is more than 300 s ahead of the clock is invalid: a clock that was set back extends nothing.
"""

import contextlib
import functools
import hashlib
import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from email.message import EmailMessage
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

from addresses import network_path
from credentials import device as devices
from credentials import passkeys, passwords, tokens, totp
from credentials.passkeys import Credential, Options, Purpose
from engines.errors import AlreadyExists, StorageUnavailable
from log import timestamp
from mail import Mailer, harmless
from rate_limit import CODE_MISSING, NEW_BROWSER, SUMMARY, Buckets, RateLimiter
from settings import MAILBOX, Settings
from storage import DB, LiveSession, NoResultFound, Session, User, public_id
from tables.emails import EmailReserved, Link
from tables.passkeys import MAX_PASSKEYS, Passkey, Used
from tables.rate_limits import CLOCK_TOLERANCE
from tables.tokens import MAX_TOKENS, Token

MAX_EMAIL_BYTES = 254  # RFC 5321 4.5.3.1.3, without the angle brackets
MAX_USER_AGENT = 200  # characters that are stored
RESET_INTERVAL = 300  # seconds between two reset mails to one user
CONFIRMATION_LIFETIME = 86_400  # seconds, 1 day, of the link that creates an account
CHANGE_LIFETIME = 3600  # seconds of the link that confirms a new email
INVITATION_LIFETIME = 604_800  # seconds, 7 days: longer than a reset link, as the recipient does not expect it
SEEN_INTERVAL = 60  # seconds between two records of a session's use, so that reading does not always write
PRUNE_STEP = 200  # expired rows that are deleted in one transaction: 10 ms in which nobody else can write
FACTOR_VALIDITY = 600  # seconds for which a second factor that a session has shown allows changes of the account
ROW_ID = re.compile("[1-9][0-9]{0,17}", re.ASCII)
GROUP = re.compile("[a-z0-9][a-z0-9_-]{0,63}")
MAX_GROUPS = 32  # of one user: the header that names them stays below 2.1 KB
MAX_NAME = 64  # characters of an access token or a passkey
NAME_RULE = f"name must be 1 to {MAX_NAME} printable characters"
MAX_TOKEN_DAYS = 3650
LOGIN_TRIES = 3  # times that a login starts again because the password or second factor changed meanwhile

Log = Callable[..., None]  # takes the name of an event and its details

NO_PASSWORD = "!"  # stored instead of a hash until an invitation is accepted; matches no password  # noqa: S105


class Caller(NamedTuple):
    """Who sends a request."""

    address: str | None  # an IP address; None: attempts are not counted
    device: str | None = None  # the value of the device cookie
    agent: str = ""  # the User-Agent header
    direct: bool = False  # whether it is a program on this machine that asks for itself
    log: Log = lambda *_, **__: None  # logs an event of the request, also after its answer
    language: str = "en"  # of the mails that the request causes


UNCOUNTED = Caller(None)
Compose = Callable[[Mailer, str, Caller], EmailMessage | None]  # takes the email that was asked for, and by whom


class AuthError(ValueError):
    """A refusal by the rules. ``message`` is fit to be shown to the client; ``str()`` may say more.

    Each class states the HTTP status, the log event and the message of its refusals. ``event`` is None if the caller
    logs the refusal, or nothing does.
    """

    status: ClassVar[int]
    event: ClassVar[str | None]
    message: str

    def __init_subclass__(cls, *, status: int, event: str | None, message: str = "refused") -> None:
        cls.status, cls.event, cls.message = status, event, message

    def __init__(self, message: str | None = None, *, text: str | None = None, user_id: int | None = None) -> None:
        self.message = message or self.message
        self.user_id = user_id  # the user it concerns, for the log
        super().__init__(text or self.message)


class EmailTaken(AuthError, status=400, event=None, message="email already registered"):
    """An account has this email, perhaps in another letter case."""


class EmailRejected(AuthError, status=400, event="input_validation_fail"):
    """This cannot be an email; the message says why."""


class PasswordRejected(AuthError, status=400, event="input_validation_fail"):
    """This cannot become a password; the message says why."""


class UnknownEmail(AuthError, status=403, event="authz_fail", message="unknown email"):
    """No account has this email."""


class LoginFailed(AuthError, status=401, event=None, message="wrong email or password"):
    """Wrong password or unknown email. Only the log says which: ``user_id`` is None for an unknown email."""


class TokenRejected(AuthError, status=403, event="authn_token_fail"):
    """A token that is unknown, used, replaced, expired or another user's."""


class TooManyAttempts(AuthError, status=429, event="excess_rate_limit_exceeded", message="too many requests"):
    """A rate limit is exceeded. ``wait`` is the number of seconds until another attempt is allowed."""

    def __init__(self, wait: int = 0) -> None:
        super().__init__()
        self.wait = wait


class SessionRequired(AuthError, status=403, event="authz_fail", message="not logged in"):
    """There is no live session."""


class NotFound(AuthError, status=404, event="authz_fail"):
    """The user has no live session with this public id, or no access token with this id; the message says which."""


class RegistrationClosed(AuthError, status=403, event="authz_fail"):
    """Registration is closed or by invitation only; the message says which."""


class ReauthenticationFailed(AuthError, status=403, event="authn_login_fail"):
    """A signed-in user gave a wrong password or code; the message says which."""


class MailUnavailable(AuthError, status=403, event="authz_fail", message="no mail can be sent"):
    """There is no mail server to confirm an email with."""


class CodeRequired(AuthError, status=401, event="authn_code_required", message="one-time code required"):
    """The password is right, but a one-time code must come with it."""


class SessionCodeRequired(CodeRequired, status=403, event="authn_code_required", message="one-time code required"):
    """The password is right, but the session has shown no second factor of late: a one-time code must come with it."""


class SecondFactorRequired(AuthError, status=403, event="authz_fail", message="set up a second factor first"):
    """A second factor is required, and the user has none."""


class SecondFactorNotShown(SessionRequired, status=403, event="authz_fail", message="sign in with your second factor"):
    """A second factor is required. The user has one, but signed in to this session without it."""


class NotAMember(AuthError, status=403, event="authz_verify_fail", message="not allowed here"):
    """The user is in none of the groups that may use an application."""


class GroupRejected(AuthError, status=400, event="input_validation_fail"):
    """The user cannot be in these groups; the message says why."""


class InvalidToken(SessionRequired, status=401, event="authz_fail", message="invalid access token"):
    """An access token that is unknown, deleted, expired, another user's, or not accepted from a browser."""


class TokenNotCreated(AuthError, status=400, event="input_validation_fail"):
    """The user cannot have this access token; the message says why."""


class PasskeyRejected(AuthError, status=401, event=None, message="passkey not accepted"):
    """A passkey cannot be used to sign in. Only the log says why, and caller.log() has been called."""


class PasskeyNotCreated(AuthError, status=400, event="input_validation_fail"):
    """The user cannot have this passkey; the message says why."""


class PasskeyNotValid(AuthError, status=400, event=None, message="passkey not accepted"):
    """A new passkey is not valid. Only the log says why, and caller.log() has been called."""


class SecondFactorRejected(AuthError, status=400, event="input_validation_fail"):
    """The second factor is on already, or off; the message says which."""


def _hash_password(password: str, cost: int | None = None) -> bytes:
    """Return a salted hash of the password, with the cost of the settings unless another one is given."""
    return passwords.hash_password(password, _default_cost() if cost is None else cost)


@functools.cache
def _default_cost() -> int:
    return Settings.from_environ().bcrypt_cost


def _generate_uuid() -> str:
    """Return a new random UUID as text: 36 characters with 122 random bits."""
    return str(uuid.uuid4())


class Auth:
    """The rules over one database. Safe to use from many threads.

    ``clock`` returns unix seconds. ``run_in_background`` runs a write that no answer waits for, by default at once.

    A method that takes a ``caller`` counts the attempt, and raises TooManyAttempts if a rate limit is exceeded. Only
    the methods of the Python contract pass UNCOUNTED. An attempt from a browser that the account knows, by its device
    cookie, is counted apart.
    """

    device_lifetime, challenge_lifetime = devices.LIFETIME, passkeys.CHALLENGE_LIFETIME  # seconds

    def __init__(
        self,
        db: DB | None = None,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
        run_in_background: Callable[[Callable[[], object]], object] = lambda write: write(),
        mailer: Mailer | None = None,
    ) -> None:
        self._settings = settings or Settings.from_environ()
        self._db = db or DB(self._settings.database, private=self._settings.production)
        self.engine_version = self._db.engine_version  # the database engine with its version
        self.empty_log, self.figures = self._db.empty_log, self._db.figures
        self.tokens_of = self._db.tokens.of_user
        self.passkeys_of = self._db.passkeys.of_user
        self._clock = clock
        self._background = run_in_background
        self._mailer = mailer if mailer and mailer.enabled else None
        self._limiter = RateLimiter(self._db.rate_limits, self._settings, clock)
        self.tag = self._limiter.tag
        self._relying_party = passkeys.RelyingParty(self._settings.origin, self._limiter.keyed)
        # An IP address cannot have passkeys. Its last part is a number, which no name ends with.
        named = not self._relying_party.id.rpartition(".")[2].isdigit()
        self.passkey_host = self._relying_party.id if named and passkeys.is_installed() else ""  # "": none are offered

    def close(self) -> None:
        """Close the database. No other thread may use it, so a mail that is being written is waited for."""
        if not self._mailer or self._mailer.stop(timeout=1.0):
            self._db.close()

    # Accounts

    def create_account(self, email: str, password: str, *, caller: Caller) -> User:
        """Create an account.

        Raises:
            RegistrationClosed: the operator does not allow it.
            EmailRejected: blank, too long, or with control characters; in production also if it is no mailbox.
            PasswordRejected: empty or too long; in production also if it is too short or too common.
            EmailTaken: an account has this email, in any letter case.
        """
        self.check_registration()
        self.check_email(email)
        self._check_password(password, email)
        self._count(caller, self._limiter.registration)
        return self._add_user(email, _hash_password(password, self._settings.bcrypt_cost))

    def mail_confirmation(self, email: str, *, caller: Caller) -> None:
        """Queue a mail with a link to create an account, or to its owner if the email has an account.

        Neither the result nor the timing reveals which. Mails to one email are counted as in mail_reset_token().

        Raises:
            EmailRejected: as in create_account().
        """
        self.check_email(email)
        self._count(caller, self._limiter.registration)
        self._enqueue("confirm", email, self._confirmation_mail, caller)

    def confirm_account(self, email: str, token: str, password: str, *, caller: Caller) -> User:
        """Create the account of a waiting registration, with this password.

        Raises:
            PasswordRejected: as in create_account(). The token stays valid.
            TokenRejected: the token is not live or of another email, or the email has an account by now.
        """
        if stored := self._find_registration(email, token):  # first: a guess costs no bcrypt
            self._check_password(password, stored)
            hashed = _hash_password(password, self._settings.bcrypt_cost)
            with contextlib.suppress(AlreadyExists):
                if user := self._db.confirm_registration(self._link(email, token, CONFIRMATION_LIFETIME), hashed):
                    return user
        raise self._rejected("invalid confirmation token", caller)

    def check_registration(self) -> None:
        """Raise RegistrationClosed if only the operator can add accounts."""
        if (mode := self._settings.registration) != "open":
            raise RegistrationClosed(f"registration is {'closed' if mode == 'closed' else 'by invitation only'}")

    def check_email(self, email: str) -> None:
        """Raise EmailRejected if no account can have this email."""
        _check_email(email, production=self._settings.production)

    # Sessions

    def log_in(
        self, email: str, password: str, otp: str = "", *, caller: Caller, ended: str | None = None, remember: int = 0
    ) -> tuple[User, str, str]:
        """Check the password, and the one-time or recovery code if the account has a second factor.

        Return the user, the id of a new session, and which factors were shown: "password", "password+totp" or
        "password+recovery_code". ``ended`` is the session that this client held; it ends. ``remember`` is 1 if
        the browser keeps the new one when it is closed. A sign-in from a new browser is told by mail.

        Raises:
            LoginFailed: wrong password, unknown email, disabled account or wrong code.
            CodeRequired: the password is right, but the code is missing.
        """
        email = email[: MAX_EMAIL_BYTES + 1]  # a longer one is as unknown as this, and takes long to compute with
        found = self._find_user(email)
        known = self._known_device(found, caller.device)
        nonce = known.nonce if known else None
        buckets = self._count(caller, lambda address: self._limiter.login(email, address, nonce))
        checked_since = None  # of the second factor whose code was checked
        factors, factor_at = "password", None
        details = _session_details(caller, remember)
        for _ in range(LOGIN_TRIES):
            user = self._verified(found, password)
            if not user:
                break
            if user.totp_since != checked_since:
                factors = self._check_code(user, otp, caller, known, buckets)
                checked_since, factor_at = user.totp_since, self._now() if user.totp_since else None
            user = self._with_current_hash(user, password)
            if session_id := self._start_session(user, ended, factor_at=factor_at, **details):
                self._run_in_background(self._limiter.refund, buckets)
                if user.last_login_at is not None:
                    self._tell_of_sign_in(user, known, NEW_BROWSER, caller)
                return user, session_id, factors
            found = self._find_user(email)  # the password or the second factor has changed: compare again
        raise LoginFailed(user_id=found.id if found else None)

    def log_in_with_passkey(
        self, credential: Credential, browser: str, *, caller: Caller, ended: str | None = None, remember: int = 0
    ) -> tuple[User, str]:
        """Sign in with an AuthenticationResponseJSON; return the user and the id of a new session. See log_in().

        It is two factors: the device with the key, and the fingerprint or PIN that the device asks for.

        Raises:
            PasskeyRejected: the passkey is unknown or not valid, its user is disabled, or the challenge is not good.
        """
        user = None
        try:
            found = self._db.find_passkey(self._relying_party.credential_id(credential))
            if not found:
                raise passkeys.Refused("unknown credential id")
            user, handle, passkey = found
            if not passkey.public_key:
                raise passkeys.Refused("revoked by a reset of the password")
            stored, now = (passkey.public_key, passkey.sign_count, handle), self._now()
            count, synced, challenge = self._relying_party.verify(credential, *stored, ("sign in", browser), now)
            used = passkey._replace(sign_count=count, synced=synced, last_used_at=now), challenge
            session_id = self._start_session(user, ended, used, factor_at=now, **_session_details(caller, remember))
            if not session_id:
                raise passkeys.Refused("challenge used, or account changed meanwhile")
        except passkeys.Refused as refused:
            self._refuse_passkey("authn_login_fail", refused, user, caller)
            raise PasskeyRejected from None
        if user.last_login_at is not None:
            self._tell_of_sign_in(user, self._known_device(user, caller.device), NEW_BROWSER, caller)
        return user, session_id

    def identify(self, session_id: str | None, *, enrolling: bool = False) -> User:
        """Return the user of a live session. ``enrolling`` allows a user who has yet to set up a second factor.

        Raises:
            SessionRequired: the session is not live.
            SecondFactorNotShown: a second factor is required, and this session has not shown that of the user.
            SecondFactorRequired: a second factor is required, and the user has none.
        """
        return self._identify(session_id, enrolling=enrolling)[0]

    def _identify(self, session_id: str | None, *, enrolling: bool = False) -> tuple[User, LiveSession]:
        """Return a live session with its user, if it has shown the second factor that is required."""
        user, session = self._find_session(session_id)
        if self._settings.require_second_factor and not (user.totp_since and session.factor_at):
            factor = user.totp_since or self.passkeys_of(user.id)
            if factor and not session.factor_at:
                raise SecondFactorNotShown
            if not factor and not enrolling:
                raise SecondFactorRequired
        return user, session

    def _find_session(self, session_id: str | None) -> tuple[User, LiveSession]:
        session_hash, window = _digest(session_id), self._session_window()
        found = self._db.find_session(session_hash, **window) if session_id else None
        if not found:
            raise SessionRequired
        if found[1].last_seen_at <= window["now"] - min(SEEN_INTERVAL, self._settings.session_idle // 2):
            self._run_in_background(self._db.touch_session, session_hash, window["now"])
        return found

    def cookie_age(self, session_id: str) -> int | None:
        """Return for how many seconds a browser keeps the cookie of a session; None: until it is closed."""
        with contextlib.suppress(SessionRequired, StorageUnavailable):  # whatever was done is done
            _, session = self._find_session(session_id)
            return session.expires_at - self._now() if session.remember else None
        return None

    def newest_session(self, session_ids: list[str]) -> str | None:
        """Return the newest live session of these; None if none is live, or if they are those of two users.

        A browser sends several after the domain of the cookie was changed, or where another host of it has set one.
        """
        live = []
        for session_id in session_ids:
            if found := self._db.find_session(_digest(session_id), **self._session_window()):
                live.append((found[1].row_id, found[0].id, session_id))
        return max(live)[2] if len({user_id for _, user_id, _ in live}) == 1 else None

    def list_sessions(self, session_id: str | None) -> tuple[User, list[Session], str]:
        """Return the user of a session, all live sessions of that user, and the public id of this one."""
        user = self.identify(session_id)
        return user, self.sessions_of(user.id), public_id(_digest(session_id))

    def sessions_of(self, user_id: int) -> list[Session]:
        """Return the live sessions of a user, newest first."""
        return self._db.list_sessions(user_id, **self._session_window())

    def expires_at(self, session: Session) -> int:
        """Return the time at which an unused session ends, in unix seconds."""
        return min(session.expires_at, session.last_seen_at + self._settings.session_idle)

    def describe_session(self, session: Session) -> dict[str, str]:
        """Return a session as its user and the operator see it."""
        return {
            "id": session.id,
            "created": timestamp(session.created_at),
            "last_seen": timestamp(session.last_seen_at),
            "expires": timestamp(self.expires_at(session)),
            "address": session.address,
            "user_agent": session.user_agent,
        }

    def check_storage(self) -> None:
        """Raise StorageUnavailable if the database does not answer."""
        self._db.check()
        self._find_user("")

    def log_out(self, session_id: str | None) -> User:
        """End this session and no other; return its user.

        Raises:
            SessionRequired: the session is not live.
        """
        user, _ = self._find_session(session_id)
        if not self._db.end_session(_digest(session_id)):
            raise SessionRequired
        return user

    def end_session(self, session_id: str | None, ended_id: str) -> tuple[User, bool]:
        """End a session of this user by its public id; return the user, and whether it is this session.

        Raises:
            NotFound: the user has no such session.
        """
        user = self.identify(session_id)
        for session in self.sessions_of(user.id):
            if session.id == ended_id and self._db.end_session(session.session_hash):
                return user, ended_id == public_id(_digest(session_id))
        raise NotFound("no such session")

    def end_sessions(self, session_id: str | None, *, except_this: bool) -> User:
        """End all sessions of this session's user, or all others; return the user."""
        user = self.identify(session_id)
        if not except_this or len(self.sessions_of(user.id)) > 1:  # where nothing ends, nothing is written
            self._db.end_sessions(user.id, kept=_digest(session_id) if except_this else None)
        return user

    # Access tokens

    def create_token(
        self, session_id: str | None, password: str, name: str, days: str = "", otp: str = "", *, caller: Caller
    ) -> tuple[User, Token, str]:
        """Create an access token that expires after a number of ``days``, or never; return its user, itself, its text.

        Raises:
            TokenNotCreated: the name or the number of days is not acceptable, or the user has MAX_TOKENS already.
            ReauthenticationFailed: the password or the code is wrong.
            SessionCodeRequired: the code is missing.
        """
        user, session = self._identify(session_id)
        if not _is_name(name):
            raise TokenNotCreated(NAME_RULE)
        if days and not (re.fullmatch("[1-9][0-9]{0,3}", days) and int(days) <= MAX_TOKEN_DAYS):
            raise TokenNotCreated(f"days must be a whole number from 1 to {MAX_TOKEN_DAYS}")
        self._reauthenticate(user, session, password, otp, caller)
        now, text = self._now(), tokens.new_token()
        token = Token(0, name, now, None, now + int(days) * 86_400 if days else None)
        token_id = self._db.tokens.add(user.id, user.hashed_password, _digest(session_id), _digest(text), token)
        if token_id is None:
            if len(self.tokens_of(user.id)) >= MAX_TOKENS:
                raise TokenNotCreated(f"at most {MAX_TOKENS} access tokens: delete one first")
            raise SessionRequired  # the session ended while we hashed
        self._notify(user, caller, "token", name=harmless(name))
        return user, token._replace(id=token_id), text

    def delete_token(self, user: User, token_id: str) -> None:
        """Delete an access token of a user. Raise NotFound if there is none with this id."""
        if not (ROW_ID.fullmatch(token_id) and self._db.tokens.delete(user.id, int(token_id))):
            raise NotFound("no such token")

    def identify_program(self, authorization: str, *, browser: bool) -> User | None:
        """Return the user of the access token in an ``Authorization`` header; None if it holds no token.

        A ``browser`` may not use Basic: it keeps the password, and sends it with requests of other sites, too.

        Raises:
            InvalidToken: the token is not live, or not of the user whom Basic names.
        """
        if not (parsed := tokens.parse(authorization)):
            return None
        text, email = parsed
        found = None if browser and email is not None else self._db.find_token(_digest(text), **self._window())
        if not found or (email is not None and email.casefold() != found[0].email.casefold()):
            raise InvalidToken
        user, token_id, last_used_at = found
        if (last_used_at or 0) <= self._now() - SEEN_INTERVAL:
            self._run_in_background(self._db.tokens.touch, token_id, self._now())
        return user

    # Passkeys. ``browser`` is the value of the cookie that ties a challenge to a browser.

    def passkey_request(self, browser: str) -> Options:
        """Return the options for signing in with a passkey."""
        return self._relying_party.request_options(("sign in", browser), self._now())

    def begin_passkey(self, session_id: str | None, password: str, otp: str, caller: Caller, browser: str) -> Options:
        """Return the options for a new passkey of this session's user.

        Raises:
            PasskeyNotCreated: the user has MAX_PASSKEYS already.
            ReauthenticationFailed: the password or the code is wrong.
            SessionCodeRequired: the code is missing.
        """
        user, session = self._identify(session_id, enrolling=True)
        self._reauthenticate(user, session, password, otp, caller)
        held = [passkey.credential_id for passkey in self._require_room(user)]
        handle = self._db.passkeys.handle(user.id, secrets.token_urlsafe(32))
        if handle is None:
            raise SessionRequired  # the user was deleted while we hashed
        purpose = self._creation(user, session_id, browser)
        return self._relying_party.creation_options(purpose, self._now(), handle, user.email, held)

    def add_passkey(
        self, session_id: str | None, name: str, credential: Credential, browser: str, *, caller: Caller
    ) -> tuple[User, int, str]:
        """Add a passkey, a RegistrationResponseJSON, under a name; return the user, its id, and the session's new id.

        All other sessions end. The session has shown a second factor by that.

        Raises:
            PasskeyNotCreated: the name is not acceptable, or the user has MAX_PASSKEYS already.
            PasskeyNotValid: the passkey is not, or it is known already, or the challenge is not good.
        """
        user, now, new_id = self.identify(session_id, enrolling=True), self._now(), self._new_secret()
        if not _is_name(name):
            raise PasskeyNotCreated(NAME_RULE)
        try:
            purpose = self._creation(user, session_id, browser)
            credential_id, key, count, synced, challenge = self._relying_party.verify_new(credential, purpose, now)
            passkey = Passkey(0, name, now, None, synced, credential_id, key, count)
            kept, renewed = _digest(session_id), _digest(new_id)
            passkey_id = self._db.add_passkey(user, passkey, challenge, kept=kept, renewed=renewed)
            if passkey_id is None:
                self._require_room(user)
                raise passkeys.Refused("known credential id, challenge used, or session ended meanwhile")
        except passkeys.Refused as refused:
            self._refuse_passkey("input_validation_fail", refused, user, caller)
            raise PasskeyNotValid from None
        self._notify(user, caller, what="passkey_added", name=harmless(name))
        return user, passkey_id, new_id

    def delete_passkey(
        self, session_id: str | None, passkey_id: str, password: str, otp: str = "", *, caller: Caller
    ) -> tuple[User, str]:
        """Delete a passkey of this session's user; return the user and the new id of the session. All others end.

        Raises:
            NotFound: the user has no passkey with this id.
            ReauthenticationFailed: the password or the code is wrong.
            SessionCodeRequired: the code is missing.
        """
        user, session = self._identify(session_id)
        self._reauthenticate(user, session, password, otp, caller)
        new_id, number = self._new_secret(), int(passkey_id) if ROW_ID.fullmatch(passkey_id) else 0
        if not self._db.delete_passkeys(user.id, number, kept=_digest(session_id), renewed=_digest(new_id)):
            raise NotFound("no such passkey")
        self._notify(user, caller, what="passkey_deleted")
        return user, new_id

    def _creation(self, user: User, session_id: str | None, browser: str) -> Purpose:
        # With the session: the password was checked in this one.
        return "new passkey", str(user.id), _digest(session_id), browser

    def _refuse_passkey(self, event: str, refused: passkeys.Refused, user: User | None, caller: Caller) -> None:
        caller.log(event, reason=f"passkey: {refused}", **({"user_id": user.id} if user else {}))
        self._count(caller, self._limiter.unknown_passkey)

    def _require_room(self, user: User) -> list[Passkey]:
        held = self.passkeys_of(user.id)
        if len(held) >= MAX_PASSKEYS:
            raise PasskeyNotCreated(f"at most {MAX_PASSKEYS} passkeys: delete one first")
        return held

    # Groups

    def require_member(self, user: User, groups: AbstractSet[str]) -> None:
        """Raise NotAMember if a user is in none of these groups."""
        if groups.isdisjoint(user.group_names):
            raise NotAMember(user_id=user.id)

    def change_groups(self, user: User, group: str, *, member: bool) -> bool:
        """Add a user to a group, or remove the user from it; return False if nothing had to be changed.

        Raises:
            GroupRejected: the name of the group is not acceptable, or the user would be in more than MAX_GROUPS.
            UnknownEmail: the user was deleted meanwhile.
        """
        check_groups([group])
        while member != (group in user.group_names):
            if self._db.set_groups(user, check_groups({group} ^ set(user.group_names))):
                return True
            user = self.find_user(user.email)  # somebody else changed them meanwhile
        return False

    # Known browsers

    def device_cookie(self, user: User, held: str | None, kind: str = "full") -> str | None:
        """Return a new value for the device cookie of a browser that has just signed in or, "reset", set the password.

        ``held`` is its present value: tokens of other accounts stay in it. None in development, where no browser is
        told from another.
        """
        if not self._settings.production:
            return None
        new = devices.issue(self._limiter.keyed, user.id, user.device_key, kind, self._now())
        return devices.with_new(devices.parse(held), new)

    # Which request goes first when many wait. Each method also returns a short name of the account, for taking turns.

    def rank_login(self, email: str, device: str | None) -> tuple[bool, str]:
        """Return whether a request with this device cookie goes before those of strangers, but not past a limit."""
        if found := self._known_browser(email, device):
            user, known = found
            buckets = self._limiter.login_of_device(user.email, known.nonce)
            return self._limiter.has_attempts(buckets), str(user.id)
        return False, _account_name(email)

    def rank_session(self, session_id: str | None) -> tuple[bool, str]:
        """Return whether a change in this session goes before others, but not past a limit."""
        try:
            user, session = self._identify(session_id, enrolling=True)
        except SessionRequired:
            return False, ""
        return self._limiter.has_attempts(*self._limiter.session_password(session.row_id, user.email)), str(user.id)

    def rank_token(self, email: str, reset_token: str, token: str) -> tuple[bool, str]:
        """Return whether one of these is a live token of this email; then the request goes before others."""
        user = self._db.find_reset(_digest(reset_token), **self._window()) if reset_token else None
        if user and user.email.casefold() == email.casefold():
            return True, str(user.id)
        return bool(token and self._find_registration(email, token)), _account_name(email)

    # Changes by a signed-in user. The current password is checked, and counted for the session. A code is checked as
    # well if the user has a second factor that the session has not shown of late.

    def change_password(
        self, session_id: str | None, password: str, new: str, otp: str = "", *, caller: Caller
    ) -> tuple[User, str]:
        """Set a new password; return the user and the new id of this session. All other sessions end.

        Raises:
            PasswordRejected: the new password is not acceptable, as in create_account().
            ReauthenticationFailed: the current password or the code is wrong.
            SessionCodeRequired: the code is missing.
        """
        user, session = self._identify(session_id)
        self._check_password(new, user.email)
        self._reauthenticate(user, session, password, otp, caller)
        new_hash, new_id = _hash_password(new, self._settings.bcrypt_cost), self._new_secret()
        old, session_hash = user.hashed_password, _digest(session_id)
        if not self._db.change_password(user.id, old, new_hash, session_hash, _digest(new_id)):
            raise SessionRequired  # the session ended while we hashed
        self._notify(user, caller, what="password_changed")
        return self._reloaded(user), new_id

    def delete_account(self, session_id: str | None, password: str, otp: str = "", *, caller: Caller) -> User:
        """Delete the account with everything that belongs to it; return the former user.

        Raises:
            ReauthenticationFailed: the password or the code is wrong.
            SessionCodeRequired: the code is missing.
        """
        user, session = self._identify(session_id)
        self._reauthenticate(user, session, password, otp, caller)
        if not self._db.delete_verified_user(user, _digest(session_id), self.reserved_at()):
            raise SessionRequired
        self._notify(user, caller, what="account_deleted")
        return user

    def begin_email_change(
        self, session_id: str | None, password: str, email: str, otp: str = "", *, caller: Caller
    ) -> str | None:
        """Queue a mail with a link to a new email, if nobody has it, and a notice to the present one.

        Where there is no mail server, a development service returns the token to a direct caller.

        Raises:
            EmailRejected: as in create_account().
            MailUnavailable: there is no mail server, and the token is not returned either.
            ReauthenticationFailed: the password or the code is wrong.
            SessionCodeRequired: the code is missing.
        """
        user, session = self._identify(session_id)
        self.check_email(email)
        if not self._mailer and (self._settings.production or not caller.direct):
            raise MailUnavailable
        self._reauthenticate(user, session, password, otp, caller)
        self._count(caller, lambda _: self._limiter.changes("email", user.id))
        if not self._mailer:
            return self._new_change(_digest(session_id), email)
        self._enqueue("change", email, functools.partial(self._change_mail, user, _digest(session_id)), caller)
        self._notify(user, caller, "change_requested", new=email)
        return None

    def change_email(self, session_id: str | None, email: str, token: str, *, caller: Caller) -> tuple[User, str]:
        """Give the user the new email that this session asked for; return the user and the new id of this session.

        All other sessions end.

        Raises:
            TokenRejected: the token is not live or of another session or email, or somebody has the email by now.
        """
        user, new_id = self.identify(session_id), self._new_secret()
        pending = self._link(email, token, CHANGE_LIFETIME)
        pending |= {"session_hash": _digest(session_id), "new_session_hash": _digest(new_id)}
        with contextlib.suppress(AlreadyExists):
            if self._db.change_email(user.id, email, self._now(), self.reserved_at(), pending):
                self._notify(user, caller, "changed", new=email)
                return self._reloaded(user), new_id
        raise self._rejected("invalid confirmation token", caller)

    def begin_totp(self, session_id: str | None, password: str, *, caller: Caller) -> tuple[str, str, str | None, str]:
        """Make a TOTP seed, which a code must confirm; return it in base32, as a link for an app, and as a QR code.

        The QR code is an image URL, or None where the extra ``qr`` is not installed. The last of the four is the new id
        of this session.

        Raises:
            ReauthenticationFailed: the password is wrong.
            SecondFactorRejected: a second factor is on.
        """
        user, session = self._identify(session_id, enrolling=True)
        if user.totp_since:
            raise SecondFactorRejected("a second factor is on already")
        self._reauthenticate(user, session, password, "", caller)
        seed, new_id = totp.new_seed(), self._new_secret()
        if not self._db.set_totp(user, seed, _digest(session_id), _digest(new_id)):
            raise SessionRequired  # the session ended, or a second factor was switched on, while we hashed
        uri = totp.uri(seed, user.email, urlsplit(self._settings.public_url).hostname or "authsvc")
        return seed, uri, totp.qr_code(uri), new_id

    def confirm_totp(self, session_id: str | None, otp: str, *, caller: Caller) -> tuple[User, str, list[str]]:
        """Switch the second factor on; return the user, the new id of this session, and the recovery codes.

        Raises:
            ReauthenticationFailed: the code is wrong.
            SecondFactorRejected: no second factor is being set up.
        """
        user = self.identify(session_id, enrolling=True)
        if not user.totp_secret or user.totp_since:
            raise SecondFactorRejected("no second factor is being set up")
        buckets = self._count_code(user, caller, self._known_device(user, caller.device))
        step = totp.matching_step(user.totp_secret, otp, self._now())
        if step is None:
            raise ReauthenticationFailed("wrong one-time code", user_id=user.id)
        codes, new_id = totp.new_recovery_codes(), self._new_secret()
        hashes, old, new = [totp.recovery_hash(code) for code in codes], _digest(session_id), _digest(new_id)
        if not self._db.confirm_totp(user, step, hashes, now=self._now(), kept=old, renewed=new):
            raise SessionRequired
        self._run_in_background(self._limiter.refund, buckets)
        self._notify(user, caller, what="factor_on")
        return self._reloaded(user), new_id, codes

    def remove_totp(self, session_id: str | None, password: str, otp: str, *, caller: Caller) -> tuple[User, str]:
        """Switch the second factor off; return the user and the new id of this session. All other sessions end.

        Raises:
            ReauthenticationFailed: the password or the code is wrong.
            SecondFactorRejected: no second factor is on.
        """
        user, session = self._identify(session_id)
        if not user.totp_since:
            raise SecondFactorRejected("no second factor is on")
        # The code is asked for in any case, as if none had been shown.
        self._reauthenticate(user, session._replace(factor_at=None), password, otp, caller)
        new_id = self._new_secret()
        if not self._db.remove_totp(user.id, _digest(session_id), _digest(new_id)):
            raise SessionRequired
        self._notify(user, caller, what="factor_off")
        return user, new_id

    # Password reset

    def issue_reset_token(self, email: str, *, caller: Caller) -> str:
        """Return a new reset token, which replaces the previous one.

        Raises:
            UnknownEmail: no account has this email, or its user may not reset the password.
        """
        self._count(caller, self._limiter.reset_address)
        self._count(caller, lambda _: self._limiter.mails("reset", email))
        user = self._find_user(email)
        if not user or not _may_reset(user):
            raise UnknownEmail
        return self._replace_reset_token(user, self._settings.reset_lifetime)

    def mail_reset_token(self, email: str, *, caller: Caller) -> None:
        """Queue a reset mail if the account exists. Neither the result nor the timing reveals whether it does.

        The mails to one account are counted later, on the mail thread, without an answer. A browser that the account
        knows is not counted by its address, so that no neighbour can keep the mail from it.
        """
        known = self._known_browser(email, caller.device) is not None
        if not known:
            self._count(caller, self._limiter.reset_address)
        self._enqueue("reset of devices" if known else "reset", email, self._reset_mail, caller, known)

    def reset_password(self, reset_token: str, password: str, *, email: str | None, caller: Caller) -> User:
        """Set a new password, spend the token and end all sessions, in one transaction; return the user.

        Raises:
            PasswordRejected: the password is not acceptable, as in create_account(). The token stays valid.
            TokenRejected: the token is not live, or not that of ``email`` where one is given. Only this is counted.
        """
        token_hash = _digest(reset_token)
        user = self._db.find_reset(token_hash, **self._window())  # first: a guess costs no bcrypt
        if not user or (email is not None and user.email.casefold() != email.casefold()):
            raise self._rejected("invalid reset token", caller)
        self._check_password(password, user.email)
        had_passkeys = self.passkeys_of(user.id)
        new_hash = _hash_password(password, self._settings.bcrypt_cost)
        required = self._settings.require_second_factor
        if not self._db.spend_reset(token_hash, new_hash, keeps_factor=required, **self._window()):
            raise TokenRejected("invalid reset token")  # another request spent it while we hashed
        held = ", ".join([f'"{harmless(passkey.name)}"' for passkey in self.passkeys_of(user.id) if passkey.public_key])
        if had_passkeys:
            self._notify(user, caller, "passkeys_kept", passkeys=held)
        else:
            self._notify(user, caller, what="password_changed")
        return self._reloaded(user)

    # For the operator's commands

    def find_user(self, email: str) -> User:
        """Return the user with this email.

        Raises:
            UnknownEmail: no account has it.
        """
        if user := self._find_user(email):
            return user
        raise UnknownEmail

    def add_account(self, email: str) -> User:
        """Create an account that has no password yet.

        Raises:
            EmailRejected, EmailTaken: as in create_account().
        """
        self.check_email(email)
        return self._add_user(email, NO_PASSWORD)

    def link_token(self, user: User) -> tuple[str, int]:
        """Return a token with which the user sets the first or a new password, and the time at which it expires.

        Raises:
            UnknownEmail: the user was deleted meanwhile.
        """
        lifetime = INVITATION_LIFETIME if user.hashed_password == NO_PASSWORD else self._settings.reset_lifetime
        return self._replace_reset_token(user, lifetime), self._now() + lifetime

    def prune(self) -> Iterator[tuple[str, int]]:
        """Delete expired sessions and reset tokens, and full buckets. Yield after each step the kind and the number.

        empty_log() then removes them from SQLite's write-ahead log.
        """
        now = self._now()
        return self._db.prune(now=now, idle_since=now - self._settings.session_idle, limit=PRUNE_STEP)

    def mail_summaries(self) -> None:
        """Mail users how many sign-ins from new browsers no mail has told them of, at most once a day."""
        mailer = self._mailer
        for user_id, email, count in self._db.untold_logins() if mailer else ():
            refused, _ = self._limiter.consume(self._limiter.sign_in_mail(SUMMARY, user_id))
            if mailer and not refused and self._db.count_untold_logins(user_id, -count):
                mailer.enqueue(functools.partial(mailer.compose, SUMMARY, email, count=count))

    def reserved_at(self) -> int | None:
        """Return from when on an email that is given up now is reserved; None in development, where it is not."""
        return self._now() if self._settings.production else None

    def rename(self, user: User, email: str) -> None:
        """Give a user another email and end all sessions.

        Raises:
            EmailRejected, EmailTaken: as in create_account().
        """
        self.check_email(email)
        with _taken(email):
            self._db.change_email(user.id, email, self._now(), self.reserved_at())

    # The Python contract: methods with these names and signatures that nothing in the service calls

    def register_user(self, email: str, password: str) -> User:
        """Create an account without counting the attempt; see create_account()."""
        return self.create_account(email, password, caller=UNCOUNTED)

    def valid_login(self, email: str, password: str) -> bool:
        """Return whether this is the password of this email, in the same time whether or not the email is known."""
        user = self._verified(self._find_user(email), password)
        return user is not None and bool(self._with_current_hash(user, password))

    def create_session(self, email: str) -> str | None:
        """Start a session without a password and return its id; None if the email is unknown or the user disabled."""
        for _ in range(LOGIN_TRIES):
            user = self._find_user(email)
            if not user or user.disabled_at:
                break
            if session_id := self._start_session(user):
                return session_id
        return None

    def get_user_from_session_id(self, session_id: str | None) -> User | None:
        """Return the user of a live session, or None; also None while a required second factor is missing."""
        with contextlib.suppress(AuthError):
            return self.identify(session_id)
        return None

    def destroy_session(self, user_id: int) -> None:
        """End all sessions of a user; an unknown user is no error."""
        self._db.end_sessions(user_id)

    def get_reset_password_token(self, email: str) -> str:
        """Return a new reset token without counting the attempt; see issue_reset_token()."""
        return self.issue_reset_token(email, caller=UNCOUNTED)

    def update_password(self, reset_token: str, password: str) -> None:
        """Set a new password with a reset token, without counting the attempt; see reset_password()."""
        self.reset_password(reset_token, password, email=None, caller=UNCOUNTED)

    # Private helpers

    def _run_in_background(self, write: Callable[..., object], *arguments: object) -> None:
        def attempt() -> None:
            with contextlib.suppress(StorageUnavailable):  # the request itself is done, and must not fail for this
                write(*arguments)

        self._background(attempt)

    def _now(self) -> int:
        return int(self._clock())

    def _notify(self, user: User, caller: Caller, kind: str = "notice", **details: Any) -> None:
        if self._mailer:
            self._mailer.enqueue(functools.partial(self._mailer.compose, kind, user.email, caller.language, **details))

    def _tell_of_sign_in(self, user: User, known: object, what: str, caller: Caller) -> None:
        if self._mailer and self._settings.production and not known:
            self._run_in_background(self._enqueue_sign_in_mail, user, what, self._now(), caller)

    def _enqueue_sign_in_mail(self, user: User, what: str, now: int, caller: Caller) -> None:
        if not self._limiter.consume(self._limiter.sign_in_mail(what, user.id))[0]:
            seen = {"address": harmless(caller.address or ""), "browser": harmless(_stored_agent(caller))}
            self._notify(user, caller, "sign_in", what=what, at=now, **seen)
        elif what == NEW_BROWSER:
            self._db.count_untold_logins(user.id, 1)

    def _add_user(self, email: str, hashed: str | bytes) -> User:
        with _taken(email):
            return self._db.add_user(email, hashed, self._now())

    def _find_user(self, email: str) -> User | None:
        with contextlib.suppress(NoResultFound):
            return self._db.find_user_by(email=email)
        return None

    def _verified(self, user: User | None, password: str) -> User | None:
        hashed, cut_salt = (user.hashed_password, user.cut_salt) if user else (None, None)
        right = passwords.verify(password, hashed, self._settings.bcrypt_cost, cut_salt)
        return user if right and user and not user.disabled_at else None

    def _reauthenticate(self, user: User, session: LiveSession, password: str, otp: str, caller: Caller) -> None:
        """Check the password again, and the code if the session has shown no second factor for FACTOR_VALIDITY seconds.

        Where mail is sent, changes are counted: a stranger who registered somebody's email could mail it without end.
        A change beyond the limit is refused. Without its notice, a thief could use up the notices and then go unseen.

        Raises:
            ReauthenticationFailed: the password or the code is wrong.
            SessionCodeRequired: the code is missing.
        """
        buckets = self._count(caller, lambda _: self._limiter.session_password(session.row_id, user.email))
        if not passwords.verify(password, user.hashed_password, self._settings.bcrypt_cost, user.cut_salt):
            raise ReauthenticationFailed("wrong password", user_id=user.id)
        self._run_in_background(self._limiter.refund, buckets)
        now = self._now()
        if user.totp_since and not now - FACTOR_VALIDITY < (session.factor_at or 0) <= now + CLOCK_TOLERANCE:
            if not otp:
                raise SessionCodeRequired(user_id=user.id)
            if not self._spend_code(user, otp, caller, self._known_device(user, caller.device)):
                raise ReauthenticationFailed("wrong one-time code", user_id=user.id)
            self._run_in_background(self._db.record_factor, session.row_id, now)
        self._count(caller if self._mailer else UNCOUNTED, lambda _: self._limiter.changes("account", user.id))

    def _check_code(self, user: User, otp: str, caller: Caller, known: devices.Device | None, buckets: Buckets) -> str:
        """Check the code if the account has a second factor; return the factors that were shown."""
        if not user.totp_since:
            return "password"
        if not otp:
            self._run_in_background(self._limiter.refund, buckets)  # the password was right, so this was no guess
            self._tell_of_sign_in(user, known, CODE_MISSING, caller)
            raise CodeRequired(user_id=user.id)
        if not self._spend_code(user, otp, caller, known):
            self._tell_of_sign_in(user, known, CODE_MISSING, caller)
            raise LoginFailed("wrong one-time code", user_id=user.id)
        return "password+totp" if totp.is_code(otp) else "password+recovery_code"

    def _spend_code(self, user: User, otp: str, caller: Caller, known: devices.Device | None) -> bool:
        if not totp.is_code(otp):  # a recovery code is too long to be guessed
            return self._db.spend_recovery_code(user.id, totp.recovery_hash(otp))
        buckets = self._count_code(user, caller, known)
        step = totp.matching_step(user.totp_secret or "", otp, self._now())
        if step is None or not self._db.spend_totp(user.id, step, step + CLOCK_TOLERANCE // totp.STEP):
            return False
        self._run_in_background(self._limiter.refund, buckets)
        return True

    def _with_current_hash(self, user: User, password: str) -> User:
        # A login is the only time at which the password can be hashed again, after the operator changed the cost or
        # imported an older form. It is complete by now: of a cut password, nobody else may choose what follows.
        if passwords.is_current(user.hashed_password, self._settings.bcrypt_cost) and user.cut_salt is None:
            return user
        hashed = _hash_password(password, self._settings.bcrypt_cost)
        self._db.replace_hash(user.id, user.hashed_password, hashed)
        return user._replace(hashed_password=hashed)  # if it was not stored, no session can start from it

    def _check_password(self, password: str, email: str) -> None:
        reason = passwords.length_error(password)
        if self._settings.production and not reason:
            context = f"{email} {self._settings.public_url}"
            reason = passwords.strength_error(password, context, self._settings.password_min)
        if reason:
            raise PasswordRejected(reason)

    def _start_session(self, user: User, ended: str | None = None, used: Used = None, **details: Any) -> str | None:
        now, session_id = self._now(), self._new_secret()
        session = Session(_digest(session_id), now, now, now + self._settings.session_lifetime, **details)
        replaced = _digest(ended) if ended else None
        idle_since, limit = now - self._settings.session_idle, self._settings.sessions_per_user
        started = self._db.add_session(user, session, used, replaced=replaced, idle_since=idle_since, limit=limit)
        return session_id if started else None

    def _session_window(self) -> dict[str, int]:
        now = self._now()
        return {"now": now, "idle_since": now - self._settings.session_idle, "latest": now + CLOCK_TOLERANCE}

    def _window(self) -> dict[str, int]:
        now = self._now()
        return {"now": now, "latest": now + CLOCK_TOLERANCE}

    def _count(self, caller: Caller, limit: Callable[[str], Iterable[Buckets]]) -> Buckets:
        """Count an attempt of the client with this address, and return the buckets for a refund.

        Raises:
            TooManyAttempts: the limit is exceeded.
        """
        wait, buckets = (0, ()) if caller.address is None else self._limiter.consume(limit(caller.address))
        if wait:
            raise TooManyAttempts(wait)
        return buckets

    def _count_code(self, user: User, caller: Caller, known: devices.Device | None) -> Buckets:
        return self._count(caller, lambda _: self._limiter.code(user.email, known.kind if known else None))

    def _reloaded(self, user: User) -> User:
        # A new password or second factor has replaced the device key, which device_cookie() needs. The change is done,
        # whatever happens here.
        with contextlib.suppress(NoResultFound, StorageUnavailable):
            return self._db.find_user_by(id=user.id)
        return user

    def _known_browser(self, email: str, cookie: str | None) -> tuple[User, devices.Device] | None:
        user = self._find_user(email) if devices.parse(cookie) else None  # without a cookie, nothing is looked up
        known = self._known_device(user, cookie)
        return (user, known) if user and known else None

    def _known_device(self, user: User | None, cookie: str | None) -> devices.Device | None:
        if not user or not self._settings.production:
            return None
        found, window = devices.parse(cookie), self._window()
        return devices.verified(found, self._limiter.keyed, user.id, user.device_key, **window)

    def _new_secret(self) -> str:
        # OWASP ASVS 7.2.3 asks for 128 random bits; a version-4 UUID has 122.
        return secrets.token_urlsafe(32) if self._settings.production else _generate_uuid()

    def _replace_reset_token(self, user: User, lifetime: int) -> str:
        token = self._new_reset_token(user, lifetime, keep_for=0)
        if token is None:  # the user was deleted meanwhile
            raise UnknownEmail
        return token

    def _new_reset_token(self, user: User, lifetime: int, *, keep_for: int) -> str | None:
        """Store and return a new reset token; None if a live one is younger than ``keep_for`` or the user is gone."""
        token, now = self._new_secret(), self._now()
        times = {"now": now, "expires_at": now + lifetime, "keep_since": now - keep_for}
        return token if self._db.set_reset_token(user.id, _digest(token), **times) else None

    def _link(self, email: str, token: str, lifetime: int) -> Link:
        """Return what is stored of a mailed link, and what is compared with it."""
        now, link = self._now(), {"email": email, "email_key": email.casefold(), "token_hash": _digest(token)}
        return link | {"now": now, "expires_at": now + lifetime, "latest": now + lifetime + CLOCK_TOLERANCE}

    def _find_registration(self, email: str, token: str) -> str | None:
        link = self._link(email, token, CONFIRMATION_LIFETIME)
        return self._db.emails.find_registration(link) if self._settings.confirms_email else None

    def _new_change(self, session_hash: str, email: str) -> str | None:
        token = self._new_secret()
        return token if self._db.emails.set_change(session_hash, self._link(email, token, CHANGE_LIFETIME)) else None

    def _rejected(self, message: str, caller: Caller) -> TokenRejected:
        self._count(caller, self._limiter.unknown_token)
        return TokenRejected(message)

    # Mails with links. The answer to a request for one reveals nothing, so the rest is done on the mail thread.

    def _enqueue(self, kind: str, email: str, compose: Compose, caller: Caller, known: bool = False) -> None:
        if not (mailer := self._mailer):
            return

        def task() -> EmailMessage | None:
            if self._limiter.consume(self._limiter.mails(kind, email))[0]:
                caller.log("excess_rate_limit_exceeded")
                return None
            return compose(mailer, email, caller)

        path = (*network_path(caller.address or "unknown"), _account_name(email))
        mailer.enqueue_reset(task, path, known=known, limited=self._settings.tells_clients_apart(caller.address))

    def _confirmation_mail(self, mailer: Mailer, email: str, caller: Caller) -> EmailMessage | None:
        # A row for an email that has an account, too, so that both take the same time. Then nobody gets the token.
        token = self._new_secret()
        self._db.emails.add_registration(self._link(email, token, CONFIRMATION_LIFETIME))
        caller.log("user_registration_requested", unknown=self.tag(email))
        if user := self._find_user(email):
            return mailer.compose("taken" if _may_reset(user) else "inactive", user.email, caller.language)
        reserved = self._db.emails.is_reserved(email, 0, self._now())
        return None if reserved else mailer.compose("confirm", email, caller.language, token=token)

    def _change_mail(
        self, user: User, session_hash: str, mailer: Mailer, email: str, caller: Caller
    ) -> EmailMessage | None:
        token, owner = self._new_change(session_hash, email), self._find_user(email) or user
        caller.log("user_update_requested", user_id=user.id, changed="email")
        if not token or owner.id != user.id or self._db.emails.is_reserved(email, user.id, self._now()):
            return None
        return mailer.compose("change", email, caller.language, token=token, former=user.email)

    def _reset_mail(self, mailer: Mailer, email: str, caller: Caller) -> EmailMessage | None:
        user = self._find_user(email)
        if not user or not _may_reset(user):
            return None
        # A token younger than five minutes is not replaced: requests of strangers must not invalidate the owner's link.
        token = self._new_reset_token(user, self._settings.reset_lifetime, keep_for=RESET_INTERVAL)
        if not token:
            return None
        caller.log("authn_reset_token_created", user_id=user.id)
        return mailer.compose("reset", user.email, caller.language, token=token)


@contextlib.contextmanager
def _taken(email: str) -> Iterator[None]:
    """Turn the errors of storage about an email into EmailTaken."""
    try:
        yield
    except AlreadyExists as error:
        text = f"{email}: {error}" if isinstance(error, EmailReserved) else f"User {email} already exists"
        raise EmailTaken(text=text) from None


def _session_details(caller: Caller, remember: int) -> dict[str, Any]:
    return {"address": caller.address or "", "user_agent": _stored_agent(caller), "remember": int(remember)}


def _stored_agent(caller: Caller) -> str:
    return caller.agent.replace("\0", "")[:MAX_USER_AGENT]  # PostgreSQL stores no NUL


def _is_name(name: str) -> bool:
    return bool(name.strip()) and name.isprintable() and len(name) <= MAX_NAME


def _may_reset(user: User) -> bool:
    # An invited user may not: anybody's request would invalidate the invitation.
    return user.disabled_at is None and user.hashed_password != NO_PASSWORD


def _check_email(email: str, *, production: bool) -> None:
    # In development spaces, quotes and letters of any script are accepted.
    try:
        size = len(email.encode())
    except UnicodeEncodeError:
        raise EmailRejected("email is not valid text") from None
    if not email.strip():
        raise EmailRejected("email must not be blank")
    if size > MAX_EMAIL_BYTES:
        raise EmailRejected(f"email must be at most {MAX_EMAIL_BYTES} bytes")
    if re.search(r"[\x00-\x1f\x7f-\x9f]", email):  # Unicode's category Cc
        raise EmailRejected("email must not contain control characters")
    if production and not MAILBOX.fullmatch(email):
        raise EmailRejected("email must be name@host as mail servers accept it, in ASCII, without spaces and quotes")


def check_groups(names: Iterable[str]) -> str:
    """Return the groups of a user as they are stored: sorted, with commas between them.

    Raises:
        GroupRejected: one has another form, or there are too many.
    """
    groups = sorted(set(names))
    if not all(map(GROUP.fullmatch, groups)):
        raise GroupRejected("a group is up to 64 of a-z, 0-9, _ and -, and begins with a letter or a digit")
    if len(groups) > MAX_GROUPS:
        raise GroupRejected(f"a user can be in at most {MAX_GROUPS} groups")
    return ",".join(groups)


def describe_token(token: Token) -> dict[str, str | None]:
    """Return an access token as its user and the operator see it."""
    return _described(token) | {"expires": token.expires_at and timestamp(token.expires_at)}


def describe_passkey(passkey: Passkey) -> dict[str, object]:
    """Return a passkey as its user sees it."""
    return _described(passkey) | {"synced": passkey.synced == 1}


def _described(row: Token | Passkey) -> dict[str, Any]:
    times = {"created": row.created_at, "last_used": row.last_used_at}
    return {"id": str(row.id), "name": row.name} | {name: time and timestamp(time) for name, time in times.items()}


def _account_name(email: str) -> str:
    # Short, as emails may have any length here. The same for all spellings, which must not count as several accounts.
    return _digest(email.casefold())[:16]


def _digest(secret: str | None) -> str:
    # Plain SHA-256 is enough: a secret with 122 random bits cannot be guessed.
    return hashlib.sha256((secret or "").encode("utf-8", "surrogatepass")).hexdigest()
