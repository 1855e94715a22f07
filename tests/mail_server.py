"""A real mail server in this process, for tests that send mail."""

from __future__ import annotations

import asyncio
import email
import email.policy
import queue
import socket
import ssl
import threading
import warnings
from email.message import EmailMessage
from typing import Any, NamedTuple
from urllib.parse import quote

import trustme
from aiosmtpd.smtp import SMTP, AuthResult

USER, SMTP_PASSWORD = "post@example.com", "canary-of-the-mail-server"
TIMEOUT = 5  # seconds to wait for a mail


class Received(NamedTuple):
    """One mail: the sender and the recipients of the envelope, and the message."""

    sender: str
    recipients: list[str]
    message: EmailMessage


class MailServer:
    """A mail server on this machine that accepts a login only over TLS.

    Args:
        certificate: what it presents.
        scheme: "smtps", "smtp+starttls", or "smtp" for a relay without TLS that asks for no login.
        starttls: whether it offers TLS under "smtp+starttls".
        passwords: whether it accepts a login with a password; otherwise it offers XOAUTH2 only.
        listener: a bound socket to listen on; if None, the server binds a free port.
    """

    def __init__(
        self,
        certificate: trustme.LeafCert,
        scheme: str,
        *,
        starttls: bool = True,
        passwords: bool = True,
        listener: socket.socket | None = None,
    ) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(self._context)
        self._scheme, self._starttls, self._passwords = scheme, starttls, passwords
        self.received: queue.Queue[Received] = queue.Queue()
        self.sender_replies: list[str] = []  # to the next senders; when it is empty, "250 OK"
        self.recipient_replies: list[str] = []  # to the next recipients; when it is empty, "250 OK"
        self.delayed_once: set[str] = set()  # recipients who are refused for now, once each
        self.data_replies: list[str] = []  # to the next messages
        self.quit_reply = "221 Bye"
        self.delay = 0.0  # seconds before it accepts a message
        self.delays: dict[str, float] = {}  # the same by recipient
        self.logins: list[tuple[bytes, bytes]] = []
        self._listener = listener.dup() if listener else socket.create_server(("127.0.0.1", 0))
        # asyncio sets this on sockets that it makes itself. Without it each line of a reply waits 40 ms for the last.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self._listener.getsockname()[1]
        self._connections: list[SMTP] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        tls = self._context if scheme == "smtps" else None
        serving = self._loop.create_server(self._protocol, sock=self._listener, ssl=tls)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result(5)

    @property
    def url(self) -> str:
        """Its address, as in AUTHSVC_SMTP_URL."""
        return smtp_url(self._scheme, self.port)

    def next(self) -> EmailMessage:
        """Return the next message, and wait for it if it has not arrived yet."""
        return self.next_received().message

    def next_received(self) -> Received:
        """Return the next message with its envelope, and wait for it if it has not arrived yet."""
        return self.received.get(timeout=TIMEOUT)

    def close(self) -> None:
        """Close all connections and stop."""

        async def end() -> None:
            # The server itself is closed last: asyncio leaves a connection half open that it accepted just before.
            self._loop.remove_reader(self._listener)
            for last in [False] * 19 + [True]:  # until all connections are closed, at most 0.2 s
                for one in self._connections:
                    for transport in (one.transport, one._original_transport):
                        if isinstance(transport, asyncio.WriteTransport):
                            transport.abort()
                rest = asyncio.all_tasks() - {asyncio.current_task()}
                for task in rest if last else ():
                    task.cancel()
                await asyncio.sleep(0.01)
                if not rest:
                    break
            self._server.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _protocol(self) -> SMTP:
        starttls = self._starttls and self._scheme == "smtp+starttls"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # aiosmtpd does not know that smtps uses TLS from the start
            connection = SMTP(
                self,
                hostname="localhost",
                loop=self._loop,
                tls_context=self._context if starttls else None,
                require_starttls=starttls,
                auth_required=self._scheme != "smtp",
                auth_exclude_mechanism=["XOAUTH2"] if self._passwords else ["LOGIN", "PLAIN"],
                auth_require_tls=starttls,  # off without TLS, so that a client which sends its password is seen
                authenticator=self._authenticate,
            )
        self._connections.append(connection)
        return connection

    def _authenticate(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, login: Any) -> AuthResult:
        self.logins.append((login.login, login.password))
        return AuthResult(success=self.logins[-1] == (USER.encode(), SMTP_PASSWORD.encode()), handled=False)

    async def auth_XOAUTH2(self, _server: Any, _arguments: Any) -> AuthResult:  # noqa: N802
        return AuthResult(success=False, handled=False)

    async def handle_MAIL(  # noqa: N802
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if self.sender_replies:
            return self.sender_replies.pop(0)
        envelope.mail_from = address
        return "250 OK"

    async def handle_RCPT(  # noqa: N802
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if address in self.delayed_once:
            self.delayed_once.remove(address)
            return "451 later"
        if self.recipient_replies:
            return self.recipient_replies.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_QUIT(self, _server: Any, _session: Any, _envelope: Any) -> str:  # noqa: N802
        return self.quit_reply

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        if self.data_replies:
            return self.data_replies.pop(0)
        assert self._scheme != "smtp+starttls" or session.ssl
        message = email.message_from_bytes(envelope.content.replace(b"\r\n", b"\n"), policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        await asyncio.sleep(self.delays.get(envelope.rcpt_tos[0], self.delay))
        self.received.put(Received(envelope.mail_from, envelope.rcpt_tos, message))
        return "250 OK"


def smtp_url(scheme: str, port: int) -> str:
    """The address of a mail server on this machine, as in AUTHSVC_SMTP_URL."""
    return f"{scheme}://{quote(USER, safe='')}@localhost:{port}"


def ignore(event: str, **details: object) -> None:
    """The log of a Mailer whose threads go on after their test: they must not write into the log of another one."""
