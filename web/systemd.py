"""What systemd offers to a service: a socket that listens across its restarts, and messages about its state.

Without systemd nothing here has an effect. Sources: sd_listen_fds(3), sd_notify(3).
"""

import os
import socket
from contextlib import suppress

from settings import SettingsError

FIRST_DESCRIPTOR = 3  # of the sockets that are passed


def passed_socket() -> socket.socket | None:
    """Return the socket that systemd passed to this process, which listens already; None if it passed none.

    Raises:
        SettingsError: what it passed is not one TCP socket that listens.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):  # else they are for another process
        return None
    if os.environ.get("LISTEN_FDS") == "1":
        listener = socket.socket(fileno=FIRST_DESCRIPTOR)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listens and listener.family in (socket.AF_INET, socket.AF_INET6):
            return listener
        listener.close()
    raise SettingsError("systemd must pass one socket: the socket unit needs one ListenStream= with address and port")


def notify(state: str) -> None:
    """Tell systemd about the state of this service, such as ``READY=1``."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as messages, suppress(OSError):
            messages.sendto(state.encode(), "\0" * path.startswith("@") + path.removeprefix("@"))
