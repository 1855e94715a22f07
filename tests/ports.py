"""Ports for programs that cannot choose one themselves, and for those that are restarted on the same port."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 10_000
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def fixed_port() -> int:
    """Return a free port outside the range from which the system takes the ports of outgoing connections.

    So no other program takes it by chance while the one that uses it is stopped.
    """
    end = int(PORT_RANGE.read_text().split()[0]) if PORT_RANGE.exists() else 32_768
    while True:
        port = random.SystemRandom().randrange(LOWEST, end)  # not the shared generator: Hypothesis seeds it
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
