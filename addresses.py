"""IP addresses: parsing, loopback, who the client is, and what counts as one client."""

from __future__ import annotations

import functools
import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_HOP_LENGTH = 100  # characters of a hop in X-Forwarded-For that are looked at


def parse_address(text: str) -> Address | None:
    """Return the IP address in ``text``, or None. An IPv4 address in IPv6 notation (``::ffff:…``) becomes IPv4."""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


@functools.lru_cache(maxsize=1024)
def is_loopback(address: str | None) -> bool:
    """Return whether a peer is on this machine. ``None`` means that there is no network peer."""
    if address is None or address == "localhost":  # waitress uses this name for the peer of a Unix socket
        return True
    parsed = parse_address(address)
    return parsed is not None and parsed.is_loopback


def client_address(peer: str, forwarded_for: str | None, trusted_proxy: str) -> str:
    """Return the address of the client that sent a request.

    It is the peer, unless the peer is the trusted proxy. Then it is the last hop of ``forwarded_for``, the value of
    ``X-Forwarded-For``: the proxy wrote that one. A hop that is no address becomes "unknown". So does an empty peer,
    which some servers give for a Unix socket. All clients without an address count as one.
    """
    if not is_trusted(peer, trusted_proxy) or forwarded_for is None:
        return peer or "unknown"
    return _normalized(forwarded_for.rpartition(",")[2].strip()[:MAX_HOP_LENGTH])


def is_trusted(peer: str | None, trusted_proxy: str) -> bool:
    """Return whether the peer is the proxy whose forwarding headers are believed."""
    return bool(trusted_proxy) and peer == trusted_proxy


def client_network(address: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 network of an IPv6 address.

    One IPv6 subscriber has at least a /64, and so 2**64 addresses to choose from.
    """
    parsed = parse_address(address)
    if parsed and parsed.version == 6:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed or address)


@functools.lru_cache(maxsize=1024)
def _normalized(hop: str) -> str:
    return str(parse_address(hop) or "unknown")
