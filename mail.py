"""Outgoing mail: password resets and notices of account changes.

Requests never wait for the mail server. A request puts a task on a bounded queue, and one worker thread composes and
sends the mail. Requests for unknown users do the same, so response times do not reveal whether an account exists.

Mail that cannot be sent is retried for as long as a reset token can be valid. The queue is in memory. Mail that still
waits when the process ends is lost, and the user has to ask for it again.
"""

from __future__ import annotations

import heapq
import queue
import smtplib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from urllib.parse import unquote, urlencode

from settings import MAILBOX, Settings, SettingsError

WAITING = 1000  # most tasks in the queue, and most mails waiting for a retry; further ones are dropped
TIMEOUT = 20  # seconds to connect to the mail server, and for each of its replies
ANSWER_FIRST = 0.03  # seconds that a task waits, so that the time of the answer does not tell what the task does
RETRIES = 5, 30, 120, 300  # seconds to wait before each retry

RESET = """\
Someone, hopefully you, asked to reset the password of {email} at {host}.

Open this link to choose a new password. It works once and expires in {lifetime}:

{link}

If it was not you, ignore this mail. Your password has not been changed.
"""

NOTICE = """\
{what}: {email} at {host}, just now. All other sessions have been signed out.

If it was not you, someone knows your password, can read your mail or had a reset link. Change the password of your
mailbox first. Then reset your password here, unless your account was deleted. Tell the operator of {host}.
"""

Task = Callable[[], EmailMessage | None]


class Mailer:
    """Sends mail through the server in the settings. ``log`` is called with an event name and its details.

    Raises:
        SettingsError: the password file cannot be read.
    """

    def __init__(self, settings: Settings, log: Callable[..., None]) -> None:
        self.enabled = settings.smtp_server is not None  # whether a mail server is configured
        self._settings = settings
        self._log = log
        self._password = _read_password(settings.smtp_password_file)
        self._tasks: queue.Queue[tuple[float, Task]] = queue.Queue(WAITING)  # with the time when it may run
        # A heap of mails to retry: due time in monotonic seconds, id of the mail, tries so far, mail.
        self._retries: list[tuple[float, int, int, EmailMessage]] = []
        self._starting = threading.Lock()
        self._worker = threading.Thread(target=self._work, daemon=True)

    def enqueue(self, task: Task) -> None:
        """Have the worker thread run ``task`` and send the mail that it returns, if any."""
        with self._starting:  # the thread starts with the first task, so creating a Mailer starts none
            if self._worker.ident is None:
                self._worker.start()
        try:
            self._tasks.put_nowait((time.monotonic() + ANSWER_FIRST, task))
        except queue.Full:
            self._log("mail_dropped", reason="queue full")

    def reset(self, email: str, token: str) -> EmailMessage:
        """Return the mail with the link to reset a password."""
        link = reset_link(self._settings.public_url, email, token)
        minutes = max(1, self._settings.reset_lifetime // 60)
        lifetime = "1 minute" if minutes == 1 else f"{minutes} minutes"
        return self._compose(email, "Reset your password", RESET, link=link, lifetime=lifetime)

    def notice(self, email: str, what: str) -> EmailMessage:
        """Return the mail that notifies a user of a change to their account. ``what`` becomes its subject."""
        return self._compose(email, what, NOTICE, what=what)

    def check(self) -> None:
        """Sign in to the mail server without sending anything.

        Raises:
            OSError: that failed, or no server is configured. SMTPException is a subclass.
        """
        with self._connected():
            pass

    def _compose(self, email: str, subject: str, text: str, **details: object) -> EmailMessage:
        if not MAILBOX.fullmatch(email):
            raise ValueError("not a mailbox")  # development lets such addresses register
        host = self._settings.public_url.removeprefix("https://")
        mail = EmailMessage()
        mail["From"] = self._settings.mail_from
        mail["To"] = email
        mail["Subject"] = f"{subject} at {host}"
        mail["Date"] = format_datetime(datetime.now(timezone.utc))
        mail["Message-ID"] = make_msgid(domain=self._settings.mail_from.rpartition("@")[2])
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: asks for no automatic replies
        mail.set_content(text.format(email=email, host=host, **details))
        return mail

    def _work(self) -> None:
        while True:
            wait = self._retries[0][0] - time.monotonic() if self._retries else None
            if wait is not None and wait <= 0:
                _, _, tries, mail = heapq.heappop(self._retries)
                self._deliver(mail, tries)
                continue
            try:
                due, task = self._tasks.get(timeout=wait)
                time.sleep(max(0.0, due - time.monotonic()))
                if composed := task():
                    self._deliver(composed, 0)
            except queue.Empty:
                pass
            except Exception as error:
                self._log("mail_dropped", reason=type(error).__name__)

    def _deliver(self, mail: EmailMessage, tries: int) -> None:
        try:
            with self._connected() as smtp:
                smtp.send_message(mail, self._settings.mail_from, [mail["To"]])
        except OSError as error:  # includes SMTPException
            recipients: dict[str, tuple[int, bytes]] = getattr(error, "recipients", {})
            code = next(iter(recipients.values()))[0] if recipients else getattr(error, "smtp_code", 0)
            details = {"reason": type(error).__name__, "smtp_code": code, "tries": tries + 1}
            if 500 <= code < 600 or tries == len(RETRIES) or len(self._retries) >= WAITING:
                self._log("mail_dropped", **details)
            else:
                self._log("mail_delayed", **details)
                heapq.heappush(self._retries, (time.monotonic() + RETRIES[tries], id(mail), tries + 1, mail))
        else:
            self._log("mail_sent", tries=tries + 1)

    @contextmanager
    def _connected(self) -> Iterator[smtplib.SMTP]:
        server = self._settings.smtp_server
        if server is None:
            raise OSError("no mail server is configured: set AUTHSVC_SMTP_URL")
        context = ssl.create_default_context()  # verifies the certificate and the host name
        host = server.hostname or ""
        if server.scheme == "smtps":
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(host, server.port or 465, timeout=TIMEOUT, context=context)
        else:
            smtp = smtplib.SMTP(host, server.port or 587, timeout=TIMEOUT)
        with smtp:
            if server.scheme != "smtps":
                smtp.starttls(context=context)  # raises SMTPNotSupportedError if the server has no TLS
            if server.username:
                smtp.login(unquote(server.username), self._password)
            yield smtp


def reset_link(base: str, email: str, token: str) -> str:
    """Return the link to reset a password. The token is in the fragment, which browsers never send to a server."""
    return f"{base}/reset#{urlencode({'token': token, 'email': email})}"


def _read_password(path: str) -> str:
    try:
        return Path(path).read_text().rstrip("\r\n") if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"AUTHSVC_SMTP_PASSWORD_FILE cannot be read: {error}") from None
