"""A real mail server for the tests."""

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
from typing import Any
from urllib.parse import quote

import trustme
from aiosmtpd.smtp import SMTP, AuthResult

USER, SMTP_PASSWORD = "post@example.com", "canary-of-the-mail-server"


class Post:
    """A mail server on a port of this machine, which takes AUTH only over TLS."""

    def __init__(self, certificate: trustme.LeafCert, scheme: str, *, starttls: bool = True, port: int = 0) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(self._context)
        self._scheme, self._starttls = scheme, starttls
        self.arrived: queue.Queue[tuple[str, list[str], EmailMessage]] = queue.Queue()
        self.recipient_says: list[str] = []  # to the next recipients; after that "250 OK"
        self.data_says: list[str] = []
        self.logins: list[tuple[bytes, bytes]] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        # asyncio does so where it makes the socket; else each line of an answer waits 40 ms for the one before.
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self._listener.getsockname()[1]
        self._served: list[SMTP] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        tls = self._context if scheme == "smtps" else None
        serving = self._loop.create_server(self._protocol, sock=self._listener, ssl=tls)
        self._server = asyncio.run_coroutine_threadsafe(serving, self._loop).result(5)

    @property
    def url(self) -> str:
        return f"{self._scheme}://{quote(USER, safe='')}@localhost:{self.port}"

    def _protocol(self) -> SMTP:
        tls = self._scheme == "smtps"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it does not know that smtps is TLS from the start
            one = SMTP(
                self,
                hostname="localhost",
                loop=self._loop,
                tls_context=self._context if self._starttls and not tls else None,
                require_starttls=self._starttls and not tls,
                auth_required=True,
                auth_require_tls=self._starttls and not tls,  # without it: as one between us and the server would
                authenticator=self._authenticate,
            )
        self._served.append(one)
        return one

    def _authenticate(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, login: Any) -> AuthResult:
        self.logins.append((login.login, login.password))
        return AuthResult(success=self.logins[-1] == (USER.encode(), SMTP_PASSWORD.encode()), handled=False)

    async def handle_RCPT(  # noqa: N802
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if self.recipient_says:
            return self.recipient_says.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        if self.data_says:
            return self.data_says.pop(0)
        assert self._scheme == "smtps" or session.ssl
        message = email.message_from_bytes(envelope.content.replace(b"\r\n", b"\n"), policy=email.policy.default)
        assert isinstance(message, EmailMessage)
        self.arrived.put((envelope.mail_from, envelope.rcpt_tos, message))
        return "250 OK"

    def next(self) -> EmailMessage:
        return self.arrived.get(timeout=5)[2]

    def close(self) -> None:
        async def end() -> None:
            # Takes no more, and closes last: asyncio drops half-made what it had accepted when its server was closed.
            self._loop.remove_reader(self._listener)
            for last in [False] * 19 + [True]:  # until all have let go of their sockets
                for one in self._served:
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
