"""The mailer: what is mailed, and the queue that sends it.

No request ever waits for mail, and what a request takes tells nothing of whether one is sent: it leaves a task on a
bounded queue, and one worker composes and sends. What cannot be sent is tried again, for as long as a reset token
could still be of use. The queue is in memory: a mail that waits is lost with the process, and can be asked for anew.
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

WAITING = 1000  # tasks and mails; one more is dropped
TIMEOUT = 20  # seconds for each step of talking to the mail server
RETRIES = 5, 30, 120, 300  # seconds until the next try

RESET = """\
Somebody, we hope you, asked to reset the password of {email} at {host}.

Open this link to choose a new one; it works once, for {minutes} minutes:

{link}

If it was not you, nothing has changed and there is nothing to do.
"""

NOTICE = """\
{what}: {email} at {host}, just now. Wherever else it was signed in, it is signed out.

If it was not you, change the password of your mail first, then ask for a reset here, unless the account is gone, and
tell whoever runs it: whoever did it knows your password, can read your mail, or had a link.
"""

Task = Callable[[], EmailMessage | None]


class Mailer:
    """Sends mail through the server of the settings, if they name one. ``log`` takes an event and its details.

    Raises:
        SettingsError: the password file cannot be read.
    """

    def __init__(self, settings: Settings, log: Callable[..., None]) -> None:
        self._settings = settings
        self._log = log
        self._password = _read_password(settings.smtp_password_file)
        self._tasks: queue.Queue[Task] = queue.Queue(WAITING)
        self._retries: list[tuple[float, int, int, EmailMessage]] = []  # heap: due, id, tries so far
        self._start = threading.Lock()
        self._started = False

    @property
    def enabled(self) -> bool:
        """Whether there is a mail server."""
        return self._settings.smtp_server is not None

    def put(self, task: Task) -> None:
        """Let the worker run ``task``, soon, and send what it returns."""
        with self._start:  # with the first task: importing or opening a service starts no thread
            if not self._started:
                threading.Thread(target=self._work, daemon=True).start()
                self._started = True
        try:
            self._tasks.put_nowait(task)
        except queue.Full:
            self._log("mail_dropped", reason="queue full")

    def reset(self, email: str, token: str) -> EmailMessage:
        """Return the mail that carries a reset token, and its link in a fragment, which no server and no log sees."""
        link = reset_link(self._settings.public_url, email, token)
        minutes = max(1, self._settings.reset_lifetime // 60)
        return self._compose(email, "Reset your password", RESET, link=link, minutes=minutes)

    def notice(self, email: str, what: str) -> EmailMessage:
        """Return the mail that tells of a change in an account."""
        return self._compose(email, what, NOTICE, what=what)

    def check(self) -> None:
        """Log in to the mail server and send nothing; raise OSError, as an SMTPException is one, where that fails."""
        with self._connected():
            pass

    def _compose(self, email: str, subject: str, text: str, **details: object) -> EmailMessage:
        if not MAILBOX.fullmatch(email):
            raise ValueError("not a mailbox")  # registered in development
        host = self._settings.public_url.removeprefix("https://")
        mail = EmailMessage()
        mail["From"] = self._settings.mail_from
        mail["To"] = email
        mail["Subject"] = f"{subject} at {host}"
        mail["Date"] = format_datetime(datetime.now(timezone.utc))
        mail["Message-ID"] = make_msgid(domain=self._settings.mail_from.rpartition("@")[2])
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office answers
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
                if composed := self._tasks.get(timeout=wait)():
                    self._deliver(composed, 0)
            except queue.Empty:
                pass
            except Exception as error:
                self._log("mail_dropped", reason=type(error).__name__)

    def _deliver(self, mail: EmailMessage, tries: int) -> None:
        try:
            with self._connected() as smtp:
                smtp.send_message(mail, self._settings.mail_from, [mail["To"]])
        except OSError as error:  # an SMTPException is one
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
            raise OSError("no mail server")
        context = ssl.create_default_context()  # verifies the certificate and the host name
        host = server.hostname or ""
        if server.scheme == "smtps":
            smtp: smtplib.SMTP = smtplib.SMTP_SSL(host, server.port or 465, timeout=TIMEOUT, context=context)
        else:
            smtp = smtplib.SMTP(host, server.port or 587, timeout=TIMEOUT)
        with smtp:
            if server.scheme != "smtps":
                smtp.starttls(context=context)  # raises where the server does not offer it
            if server.username:
                smtp.login(unquote(server.username), self._password)
            yield smtp


def reset_link(base: str, email: str, token: str) -> str:
    """Return the link under which a password is set; the fragment reaches no server and no log."""
    return f"{base}/reset#{urlencode({'token': token, 'email': email})}"


def _read_password(path: str) -> str:
    try:
        return Path(path).read_text().rstrip("\r\n") if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"AUTHSVC_SMTP_PASSWORD_FILE cannot be read: {error}") from None
