"""Outgoing mail: links to reset a password or to confirm an email, and notices of sign-ins and of account changes.

Requests never wait for the mail server. A request puts a task on a bounded queue, and a worker thread composes and
sends the mail. Requests for unknown users do the same, so response times do not reveal whether an account exists. A
task that sends no mail takes as long as one that does, so the time at which the next mail arrives does not either.

Anybody can ask for mails with links. They wait in a queue that is fair between networks, clients and accounts
(fair_queue.py), and notices in one of their own, with threads of their own. So a flood neither delays a notice nor
displaces it, and the mails that a client asks for do not displace those of others.

Mail that cannot be sent is retried by another thread, a reset for as long as its token is valid. The queues are in
memory. Mail that still waits when the process ends is lost, and the user has to ask for it again.
"""

import heapq
import queue
import re
import smtplib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

from fair_queue import FairQueue
from settings import MAILBOX, Settings, SettingsError, read_password

WAITING = 1000  # of each kind, most tasks in the queue, and most mails waiting for a retry; further ones are dropped
RESETS_PER_CLIENT = 10  # waiting: as many as the rate limit lets a stranger ask for at once, so it never drops these
RESETS_PER_NETWORK = 100  # of a /24 or /48: ten full clients, a fifth of the places of strangers
TIMEOUT = 20  # seconds to connect to the mail server, and for each of its replies
ANSWER_FIRST = 0.03  # seconds that a task waits, so that the time of the answer does not tell what the task does
FIRST_DELIVERY = 1.0  # seconds that a reset task without a mail takes before any mail was sent
RETRIES = 5, 30, 120, 300  # seconds to wait before each retry
NO_XOAUTH2 = "the server offers XOAUTH2, which is not supported: use an app password, or a relay"

_PART = re.compile(r"^=== (\w+): (.*)\n((?:(?!=== ).*\n)*)", re.MULTILINE)
# By language and kind, the subject and the text. A kind without a text is a phrase that mails contain.
MAILS = {
    path.stem: {
        kind: (subject, text.strip()) for kind, subject, text in _PART.findall(path.read_text(encoding="utf-8"))
    }
    for path in Path(__file__).with_name("mails").glob("*.txt")
}

Task = Callable[[], EmailMessage | None]
Send = Callable[[EmailMessage], None]
Waiting = tuple[float, Task, bool]  # a task, when it may run, and whether it takes as long without a mail as with one


class Mailer:
    """Sends mail through the server in the settings. ``log`` is called with an event name and its details.

    Raises:
        SettingsError: the password file cannot be read, or the mail server cannot be sent what it names.
    """

    def __init__(self, settings: Settings, log: Callable[..., None]) -> None:
        self.enabled = settings.smtp_server is not None  # whether a mail server is configured
        self._settings, self._log = settings, log
        path = settings.smtp_password_file
        self._password = read_password("AUTHSVC_SMTP_PASSWORD_FILE", path) if path else ""
        self._user = unquote(settings.smtp_server.username or "") if settings.smtp_server else ""
        sent = ("AUTHSVC_SMTP_PASSWORD_FILE", "password", self._password), ("AUTHSVC_SMTP_URL", "user", self._user)
        for name, kind, text in sent:
            if not text.isascii():  # smtplib would fail at each mail
                raise SettingsError(f"{name} names a {kind} that is not ASCII: set another {kind} at the mail server")
        self._notices: queue.Queue[Waiting] = queue.Queue(WAITING)
        self._resets = FairQueue[Waiting](WAITING // 2, RESETS_PER_CLIENT, RESETS_PER_NETWORK)
        self._notice_sender = _Sender(self._notices.get, self._send, log, float("inf"))
        self._reset_sender = _Sender(self._resets.get, self._send, log, settings.reset_lifetime)
        self.stop = self._reset_sender.stop  # the tasks with links read the database, the others do not

    def enqueue(self, task: Task) -> None:
        """Have a worker thread run ``task`` and send the notice that it returns, if any."""
        self._notice_sender.start()
        try:
            self._notices.put_nowait((time.monotonic() + ANSWER_FIRST, task, False))
        except queue.Full:
            self._log("mail_dropped", reason="queue full")

    def enqueue_reset(self, task: Task, path: tuple[str, ...], *, known: bool, limited: bool) -> None:
        """Have a worker thread run ``task`` and send the mail with a link that it returns, if any.

        ``path`` and ``limited`` are those of FairQueue.put. ``known`` is whether a browser has asked that the account
        knows. Its task goes before those of strangers, and ends at once without a mail: there is nothing to conceal.
        """
        self._reset_sender.start()
        waiting = time.monotonic() + ANSWER_FIRST, task, not known
        for _ in self._resets.put(waiting, path, preferred=known, limited=limited):
            self._log("mail_dropped", reason="queue full")

    def waiting(self) -> int:
        """Return how many mails wait to be written or sent, or for another try."""
        retried = len(self._notice_sender.retries) + len(self._reset_sender.retries)
        return self._notices.qsize() + sum(self._resets.lengths()) + retried

    def check(self) -> None:
        """Sign in to the mail server and ask whether it accepts the sender, without sending anything.

        Raises:
            OSError: that failed, or no server is configured. SMTPException is a subclass.
        """
        with self._connected() as smtp:
            smtp.ehlo_or_helo_if_needed()
            code, reason = smtp.mail(self._settings.mail_from)
            if code != 250:
                raise smtplib.SMTPSenderRefused(code, reason, self._settings.mail_from)

    def compose(
        self, kind: str, email: str, language: str = "en", *, token: str = "", what: str = "", at: int = 0, **given: Any
    ) -> EmailMessage:
        """Return a mail of a kind in mails/, which names the details. ``token`` is that of its link.

        ``what`` is the name of a phrase, and ``at`` a time in unix seconds. An empty detail becomes the phrase no_NAME.
        """
        if not MAILBOX.fullmatch(email):
            raise ValueError("not a mailbox")  # development lets such addresses register
        texts, base, minutes = MAILS[language], self._settings.base_url, max(1, self._settings.reset_lifetime // 60)
        details = {name: detail or texts[f"no_{name}"][0] for name, detail in given.items()}
        details |= {"email": email, "base": base, "host": base.partition("://")[2]}
        details |= {"link": token_link(base, kind, email, token), "time": datetime.fromtimestamp(at, timezone.utc)}
        details |= {"lifetime": texts["minute" if minutes == 1 else "minutes"][0].format(minutes=minutes)}
        details |= {"what": what and texts[what][0].format_map(details)}
        subject, text = texts[kind]
        mail = EmailMessage()
        mail["From"] = self._settings.mail_from
        mail["To"] = email
        mail["Subject"] = subject.format_map(details)
        mail["Date"] = format_datetime(datetime.now(timezone.utc))
        mail["Message-ID"] = make_msgid(domain=self._settings.mail_from.rpartition("@")[2])
        mail["Auto-Submitted"] = "auto-generated"  # RFC 3834: asks for no automatic replies
        mail.set_content(text.format_map(details) + "\n")
        mail["Content-Language"] = language  # after the content, which removes such headers
        return mail

    def _send(self, mail: EmailMessage) -> None:
        with self._connected() as smtp:
            smtp.send_message(mail, self._settings.mail_from, [mail["To"]])

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
            smtp = smtplib.SMTP(host, server.port or (25 if server.scheme == "smtp" else 587), timeout=TIMEOUT)
        try:
            if server.scheme == "smtp+starttls":
                smtp.starttls(context=context)  # raises SMTPNotSupportedError if the server has no TLS
            if self._user:
                self._sign_in(smtp)
            yield smtp
            # The mail is accepted by now. An odd answer to QUIT must not send it again, as the exit of SMTP would.
            with suppress(OSError):
                smtp.quit()
        finally:
            smtp.close()

    def _sign_in(self, smtp: smtplib.SMTP) -> None:
        try:
            smtp.login(self._user, self._password)
        except smtplib.SMTPException as error:
            if "XOAUTH2" in smtp.esmtp_features.get("auth", "").upper().split():
                error.args = (*error.args[:-1], f"{error.args[-1]} ({NO_XOAUTH2})")
            raise


def harmless(text: str) -> str:
    """Return a text of a client without links: it could lead a reader to another site. Mail programs link www.x.io."""
    return re.sub(r"[^ -~]|://|[@\\]|\.(?=[A-Za-z])", "?", text)


def token_link(base: str, page: str, email: str, token: str) -> str:
    """Return the link to a page. The token is in the fragment, which browsers never send to a server."""
    return f"{base}/{page}#{urlencode({'token': token, 'email': email})}"


class _Sender:
    """Two threads that send mails of one kind: one those of new tasks, the other those that failed before.

    ``get`` waits for a task. ``lifetime`` is the number of seconds after which a mail is not tried again.
    """

    def __init__(self, get: Callable[[], Waiting], send: Send, log: Callable[..., None], lifetime: float) -> None:
        self._get, self._send, self._log, self._lifetime = get, send, log, lifetime
        # A heap of mails to retry: due time in monotonic seconds, id of the mail, tries so far, expiry, mail.
        self.retries: list[tuple[float, int, int, float, EmailMessage]] = []
        self._added = threading.Condition()  # guards the heap
        self._starting = threading.Lock()
        self._running = threading.Lock()  # held while a task runs, and for good once no further one may begin
        self._took = FIRST_DELIVERY  # seconds of the latest task whose mail was sent
        steps = self._work, self._retry
        self._threads = [threading.Thread(target=self._repeat, args=(step,), daemon=True) for step in steps]

    def start(self) -> None:
        """Start the threads unless they run: with the first task, so creating a Mailer starts none."""
        with self._starting:
            while self._threads:
                try:
                    self._threads[-1].start()
                except RuntimeError as error:  # too many threads: the next task tries again
                    self._log("mail_delayed", reason=type(error).__name__)
                    return
                self._threads.pop()

    def stop(self, timeout: float) -> bool:
        """Begin no further task; return whether none runs any more after ``timeout`` seconds."""
        return self._running.acquire(timeout=timeout)

    def _repeat(self, step: Callable[[], None]) -> None:
        while True:
            try:
                step()
            except BaseException as error:  # a thread that ended would never send a mail again, and nobody would know
                with suppress(Exception):
                    self._log("mail_dropped", reason=type(error).__name__)
                time.sleep(ANSWER_FIRST)

    def _work(self) -> None:
        due, task, concealed = self._get()
        time.sleep(max(0.0, due - time.monotonic()))
        began, mail = time.monotonic(), None
        with self._running:
            try:
                mail = task()
            except Exception as error:
                self._log("mail_dropped", reason=type(error).__name__)
        if mail:
            sent = self._deliver(mail, 0, began + self._lifetime)
            elapsed = time.monotonic() - began
            # A quick refusal must not make the next tasks shorter, and a stalled delivery must not stall all.
            self._took = min(TIMEOUT, elapsed if sent else max(self._took, elapsed))
        if concealed:
            time.sleep(max(0.0, began + self._took - time.monotonic()))

    def _retry(self) -> None:
        with self._added:
            while not self.retries or self.retries[0][0] > time.monotonic():
                self._added.wait(self.retries[0][0] - time.monotonic() if self.retries else None)
            _, _, tries, expires, mail = heapq.heappop(self.retries)
        if time.monotonic() < expires:
            self._deliver(mail, tries, expires)
        else:
            self._log("mail_dropped", reason="expired", tries=tries)

    def _deliver(self, mail: EmailMessage, tries: int, expires: float) -> bool:
        """Send a mail, or have it tried again; return whether it was sent."""
        try:
            self._send(mail)
        except Exception as error:  # OSError includes SMTPException
            recipients: dict[str, tuple[int, bytes]] = getattr(error, "recipients", {})
            code = next(iter(recipients.values()))[0] if recipients else getattr(error, "smtp_code", 0)
            details = {"reason": type(error).__name__, "smtp_code": code, "tries": tries + 1}
            permanent = not isinstance(error, OSError) or 500 <= code < 600
            with self._added:
                if permanent or tries == len(RETRIES) or len(self.retries) >= WAITING:
                    self._log("mail_dropped", **details)
                else:
                    self._log("mail_delayed", **details)
                    due = time.monotonic() + RETRIES[tries]
                    heapq.heappush(self.retries, (due, id(mail), tries + 1, expires, mail))
                    self._added.notify()
            return False
        self._log("mail_sent", tries=tries + 1)
        return True
