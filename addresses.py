"""IP addresses: parsing, the trusted proxies, who the client is, and what counts as one client."""

import functools
import ipaddress
import re

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_HOP_LENGTH = 100  # characters of a hop in X-Forwarded-For that are looked at
MAX_HOPS = 20  # hops of X-Forwarded-For that are looked at, from the right

UNIQUE_LOCAL = ipaddress.IPv6Network("fc00::/7")  # RFC 4193

# Loopback, RFC 1918, RFC 4193, and link-local.
PRIVATE_NETWORKS = "127.0.0.0/8,::1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,fc00::/7,169.254.0.0/16,fe80::/10"

# A hop with a port, or an IPv6 address in brackets: 203.0.113.7:443, [2001:db8::7]:443, [2001:db8::7].
_HOP = re.compile(r"(?P<v4>[0-9.]+):[0-9]{1,5}|\[(?P<v6>[0-9A-Fa-f.]*:[^\[\]]*)\](?::[0-9]{1,5})?")


def parse_address(text: str) -> Address | None:
    """Return the IP address in ``text``, or None.

    An IPv4 address in IPv6 notation (``::ffff:…``) becomes IPv4. An IPv6 zone (``%eth0``) is dropped.
    """
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(parsed, ipaddress.IPv4Address):
        return parsed
    return parsed.ipv4_mapped or (ipaddress.IPv6Address(int(parsed)) if parsed.scope_id else parsed)


@functools.lru_cache(maxsize=16)
def parse_networks(text: str) -> tuple[Network, ...]:
    """Return the networks in a comma-separated list of addresses and networks. An address is a network of its own.

    Raises:
        ValueError: an item is neither, or is a network that contains every address. The message says what the list must
            be, and names the item.
    """
    return tuple(_parse_network(item.strip(" \t")) for item in text.split(",")) if text else ()


def is_wide(network: Network) -> bool:
    """Return whether a network is so large that it probably contains clients, and not only proxies."""
    if network.is_loopback:  # all of it is this machine
        return False
    if isinstance(network, ipaddress.IPv4Network):
        return network.prefixlen < 16
    return network.prefixlen < (48 if network.subnet_of(UNIQUE_LOCAL) else 32)


@functools.lru_cache(maxsize=1024)
def is_loopback(address: str | None) -> bool:
    """Return whether a peer is on this machine. ``None`` means that there is no network peer."""
    parsed = parse_address(address or "")
    # waitress uses the name for the peer of a Unix socket.
    return address in (None, "localhost") or (parsed is not None and parsed.is_loopback)


@functools.lru_cache(maxsize=1024)
def is_private_peer(peer: str | None) -> bool:
    """Return whether a peer may be a proxy: it is on this machine or a private network, or has no known address.

    A Unix socket has no address, and servers give different names to its peer.
    """
    parsed = parse_address(peer or "")
    return parsed is None or _is_listed(parsed, PRIVATE_NETWORKS)


def client_address(peer: str, forwarded_for: str | None, trusted_proxy: str) -> str:
    """Return the address of the client that sent a request.

    It is the peer, unless the peer is a trusted proxy. Then ``forwarded_for``, the value of ``X-Forwarded-For``, is
    read from the right. Each proxy appends the address of its own peer, so a client can forge only what stands to the
    left of its address. Trusted hops are skipped: the client is the first hop that is not trusted, or the leftmost hop
    if all are trusted.

    A hop that is no address ends the reading, and the client is "unknown". It is also "unknown" if the list goes on
    after ``MAX_HOPS`` trusted hops, and if the peer is empty, as some servers say of a Unix socket. All clients without
    an address count as one.
    """
    if forwarded_for is None or not is_trusted(peer, trusted_proxy):
        return _peer_name(peer)
    hops = forwarded_for.rsplit(",", MAX_HOPS)
    for hop in hops[: -MAX_HOPS - 1 : -1]:
        client, trusted = _read_hop(hop.strip(" \t")[:MAX_HOP_LENGTH], trusted_proxy)
        if not trusted:
            return client
    return client if len(hops) <= MAX_HOPS else "unknown"


@functools.lru_cache(maxsize=1024)
def is_trusted(peer: str | None, trusted_proxy: str) -> bool:
    """Return whether the forwarding headers of a peer are believed.

    ``trusted_proxy`` is the text of the setting. Parsed addresses are compared, so the spelling does not matter.
    """
    return _is_listed(parse_address(peer or ""), trusted_proxy)


@functools.lru_cache(maxsize=1024)
def client_networks(address: str) -> tuple[str, ...]:
    """Return what counts as one client, then the wider networks that it is in.

    One client is an IPv4 address, or the /64 network of an IPv6 address: a subscriber has at least a /64, and so 2**64
    addresses to choose from. Many have a /56 or a /48, which follow. Text that is no address stands for itself.
    """
    _, site, home, client = network_path(address)
    return (client,) if client == home else (client, home, site)


@functools.lru_cache(maxsize=1024)
def network_path(address: str) -> tuple[str, str, str, str]:
    """Return the networks that an address is in, from the widest to one client, for taking turns between networks.

    They are those of a provider, a site, a home (an IPv6 /56; an IPv4 address is its only one) and a client.
    """
    parsed = parse_address(address)
    if parsed is None:
        return address, address, address, address
    if isinstance(parsed, ipaddress.IPv4Address):
        return _network_of(parsed, 16), _network_of(parsed, 24), str(parsed), str(parsed)
    return _network_of(parsed, 32), _network_of(parsed, 48), _network_of(parsed, 56), _network_of(parsed, 64)


def _parse_network(item: str) -> Network:
    if not item:
        raise ValueError("has an empty item: remove the extra comma")
    if "%" in item:
        raise ValueError(f"must list addresses without a zone, and {item!r} has one")
    host, slash, length = item.partition("/")
    try:
        if slash and not length.isdigit():  # Python accepts a mask, too, and its inverse
            raise ValueError
        network: Network = ipaddress.ip_network(item, strict=False)
    except ValueError:
        raise ValueError(f"must list IP addresses and networks, and {item!r} is neither") from None
    mapped = network.network_address.ipv4_mapped if isinstance(network, ipaddress.IPv6Network) else None
    if mapped:
        network = ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    if network.prefixlen == 0:
        raise ValueError(f"must not contain {item!r}: every client could then forge its address")
    if parse_address(host) != network.network_address:
        raise ValueError(f"must name a network by its first address: write {network} instead of {item!r}")
    return network


def _is_listed(address: Address | None, networks: str) -> bool:
    return address is not None and any(address in network for network in parse_networks(networks))


@functools.lru_cache(maxsize=1024)
def _peer_name(peer: str) -> str:
    return str(parse_address(peer) or peer or "unknown")


@functools.lru_cache(maxsize=1024)
def _read_hop(hop: str, trusted_proxy: str) -> tuple[str, bool]:
    """Return the address of a hop, or "unknown", and whether it is trusted."""
    hop = hop[1:-1] if hop[:1] == hop[-1:] == '"' else hop  # as some proxies copy it from Forwarded (RFC 7239, 6)
    found = _HOP.fullmatch(hop)
    address = parse_address(found["v4"] or found["v6"] if found else hop)
    return str(address or "unknown"), _is_listed(address, trusted_proxy)


def _network_of(address: Address, length: int) -> str:
    bits = address.max_prefixlen - length
    return f"{type(address)(int(address) >> bits << bits)}/{length}"
