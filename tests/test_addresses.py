"""Addresses: which ones are loopback, who the client of a request is, and what counts as one client."""

from __future__ import annotations

import pytest

from addresses import client_address, client_network, is_loopback, parse_address

PROXY, STRANGER = "127.0.0.1", "203.0.113.7"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
    ],
)
def test_an_address_has_one_spelling(text: str, address: str) -> None:
    assert str(parse_address(text)) == address


@pytest.mark.parametrize("text", ["", "evil", "192.0.2.1:80", "[::1]", "1.2.3", "1.2.3.4.5", "01.2.3.4", " 1.2.3.4"])
def test_other_text_is_not_an_address(text: str) -> None:
    assert parse_address(text) is None


@pytest.mark.parametrize("peer", [None, "localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_a_peer_on_this_machine_is_loopback(peer: str | None) -> None:
    assert is_loopback(peer)


@pytest.mark.parametrize("peer", ["", "0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "evil", "127.0.0.1.evil"])
def test_any_other_peer_is_not_loopback(peer: str) -> None:
    assert not is_loopback(peer)


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "trusted_proxy", "client"),
    [
        (STRANGER, None, "", STRANGER),
        (STRANGER, "192.0.2.1", "", STRANGER),
        (STRANGER, "192.0.2.1", PROXY, STRANGER),
        (PROXY, None, PROXY, PROXY),
        (PROXY, "192.0.2.1", "", PROXY),
        (PROXY, "192.0.2.1", PROXY, "192.0.2.1"),
        (PROXY, "192.0.2.1, 198.51.100.2", PROXY, "198.51.100.2"),
        (PROXY, "198.51.100.2,  ::ffff:192.0.2.1 ", PROXY, "192.0.2.1"),
        (PROXY, "evil", PROXY, "unknown"),
        (PROXY, "192.0.2.1,", PROXY, "unknown"),
        (PROXY, "", PROXY, "unknown"),
        ("localhost", None, "", "localhost"),
        ("localhost", "192.0.2.1", PROXY, "localhost"),
        # A Unix socket has no peer address, and some servers say so with an empty one.
        ("", None, "", "unknown"),
        ("", "192.0.2.1", "", "unknown"),
        ("", "192.0.2.1", PROXY, "unknown"),
    ],
)
def test_the_client_is_the_peer_or_the_last_hop_of_the_trusted_proxy(
    peer: str, forwarded_for: str | None, trusted_proxy: str, client: str
) -> None:
    assert client_address(peer, forwarded_for, trusted_proxy) == client


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("2001:db8:0:1:ffff:ffff:ffff:ffff", "2001:db8:0:1::/64"),
        ("2001:db8:0:2::1", "2001:db8:0:2::/64"),
        ("localhost", "localhost"),
        ("unknown", "unknown"),
    ],
)
def test_one_client_is_an_ipv4_address_or_an_ipv6_network_of_64_bits(address: str, network: str) -> None:
    assert client_network(address) == network
