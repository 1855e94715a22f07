"""Addresses: which proxies are trusted, who the client of a request is, and what counts as one client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from addresses import (
    MAX_HOP_LENGTH,
    MAX_HOPS,
    client_address,
    client_networks,
    is_loopback,
    is_private_peer,
    is_trusted,
    is_wide,
    network_path,
    parse_address,
    parse_networks,
)
from tests.cases import each

PROXY, STRANGER = "127.0.0.1", "203.0.113.7"
PROXIES = "127.0.0.1, 10.20.0.0/16, 2001:db8::/48"


@each(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:192.0.2.1%eth0", "192.0.2.1"),
    ],
)
def test_an_address_has_one_spelling(text: str, address: str) -> None:
    assert str(parse_address(text)) == address


@each("text", ["", "evil", "192.0.2.1:80", "[::1]", "1.2.3", "1.2.3.4.5", "01.2.3.4", " 1.2.3.4", "::1%"])
def test_other_text_is_not_an_address(text: str) -> None:
    assert parse_address(text) is None


@each("peer", [None, "localhost", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_a_peer_on_this_machine_is_loopback(peer: str | None) -> None:
    assert is_loopback(peer)


@each("peer", ["", "0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "evil", "127.0.0.1.evil"])
def test_any_other_peer_is_not_loopback(peer: str) -> None:
    assert not is_loopback(peer)


@each(
    "peer",
    [
        *(None, "", "localhost", "unknown", "evil", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"),
        *("10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "::ffff:192.168.0.1"),
        *("169.254.169.254", "fe80::1", "fe80::1%eth0", "febf::1", "fc00::1", "fd12:3456::1"),
    ],
)
def test_a_peer_on_this_machine_or_a_private_network_is_private(peer: str | None) -> None:
    assert is_private_peer(peer)


@each(
    "peer",
    [
        *("9.255.255.255", "11.0.0.1", "172.15.255.255", "172.32.0.1", "192.167.0.1", "192.169.0.1", "169.253.0.1"),
        *("192.0.2.1", "100.64.0.1", "0.0.0.0", "128.0.0.1", "::", "::2", "fec0::1", "fe00::1", "2001:db8::1"),
        *("::ffff:192.0.2.1", "::10.0.0.1"),
    ],
)
def test_any_other_address_is_not_private(peer: str) -> None:
    assert not is_private_peer(peer)


# The trusted proxies


@each(
    ("text", "networks"),
    [
        ("", []),
        ("127.0.0.1", ["127.0.0.1/32"]),
        ("127.0.0.1, 10.20.0.0/16, 2001:db8::/48", ["127.0.0.1/32", "10.20.0.0/16", "2001:db8::/48"]),
        (" 127.0.0.1\t,::1 ", ["127.0.0.1/32", "::1/128"]),
        ("0:0::1", ["::1/128"]),
        ("::ffff:127.0.0.1", ["127.0.0.1/32"]),
        ("::ffff:127.0.0.1/128", ["127.0.0.1/32"]),
        ("::ffff:10.20.0.0/112", ["10.20.0.0/16"]),
        ("10.20.0.1/32", ["10.20.0.1/32"]),
        ("0.0.0.0/1", ["0.0.0.0/1"]),
    ],
)
def test_a_list_holds_addresses_and_networks(text: str, networks: list[str]) -> None:
    assert [str(network) for network in parse_networks(text)] == networks


EVERYTHING = ["0.0.0.0/0", "10.0.0.1/0", "::/0", "2001:db8::/0", "::ffff:0.0.0.0/96", "::ffff:10.0.0.1/96"]

NEITHER = [
    *("proxy", "proxy.example.com", "localhost", "unknown", "*", "127.0.0.1:80", "[::1]", "[::1]:80", "127.1", "127"),
    *("127.0.0.01", "2130706433", "::1::", "10.0.0.0/33", "::1/129", "10.0.0.0/-1", "10.0.0.0/+8", "10.0.0.0/ 8"),
    *("10.0.0.0/", "/8", "10.0.0.0/8/8", "10.0.0.0/٨", "10.0.0.0/255.0.0.0", "10.0.0.0/0.255.255.255"),
    *("127.0.0.1 ::1", "127.0.0.1;::1", "127.0.0.1\n", "127.0.0.1\0", "10.0.0.0/" + "9" * 5000),
]

WITH_HOST_BITS = {
    "10.0.0.1/8": "10.0.0.0/8",
    "10.20.1.0/16": "10.20.0.0/16",
    "192.0.2.255/31": "192.0.2.254/31",
    "2001:db8::1/48": "2001:db8::/48",
    "::ffff:10.0.0.1/104": "10.0.0.0/8",
}


@each(
    ("item", "reason"),
    [
        *((item, "neither") for item in NEITHER),
        *((item, "every client could") for item in EVERYTHING),
        *((item, f"write {network} instead of") for item, network in WITH_HOST_BITS.items()),
        *((item, "without a zone") for item in ("fe80::1%eth0", "fe80::%eth0/64", "fe80::/64%eth0", "::1%", "%")),
    ],
)
def test_an_item_that_cannot_be_used_is_named(item: str, reason: str) -> None:
    for text in item, f"127.0.0.1, {item}", f"{item},127.0.0.1":
        with pytest.raises(ValueError, match=reason) as caught:
            parse_networks(text)
        assert repr(item) in str(caught.value)


@each("text", [" ", ",", "127.0.0.1,", ",127.0.0.1", "127.0.0.1, ,::1", "127.0.0.1,,::1"])
def test_an_empty_item_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="empty item"):
        parse_networks(text)


@each(
    ("network", "wide"),
    [
        ("10.0.0.0/8", True),
        ("10.20.0.0/15", True),
        ("10.20.0.0/16", False),
        ("172.16.0.0/12", True),
        ("192.168.0.0/16", False),
        ("127.0.0.0/8", False),
        ("127.0.0.1", False),
        ("126.0.0.0/7", True),
        ("8.0.0.0/15", True),
        ("8.8.0.0/16", False),
        ("::ffff:10.0.0.0/104", True),
        ("fd00::/8", True),
        ("fd12:3456:7888::/47", True),
        ("fd12:3456:789a::/48", False),
        ("fc00::/6", True),
        ("fe80::/10", True),
        ("2001:db8::/31", True),
        ("2001:db8::/32", False),
        ("::1", False),
    ],
)
def test_a_network_that_probably_contains_clients_is_wide(network: str, wide: bool) -> None:
    (parsed,) = parse_networks(network)
    assert is_wide(parsed) is wide


@each(
    ("peer", "trusted_proxy", "trusted"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.2", "127.0.0.1", False),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::ffff:7f00:1", "127.0.0.1", True),
        ("127.0.0.1", "::ffff:127.0.0.1", True),
        ("10.20.0.1", "::ffff:10.20.0.0/112", True),
        ("10.21.0.1", "::ffff:10.20.0.0/112", False),
        ("::1", "0:0::1", True),
        ("0:0::1", "::1", True),
        ("::1", "127.0.0.1", False),
        ("127.0.0.1", "::1", False),
        ("2001:DB8:0::1", "2001:db8::1", True),
        ("fe80::1%eth0", "fe80::1", True),
        ("127.0.0.1", PROXIES, True),
        ("10.20.255.255", PROXIES, True),
        ("::ffff:10.20.0.1", PROXIES, True),
        ("10.21.0.0", PROXIES, False),
        ("2001:db8:0:ffff::1", PROXIES, True),
        ("2001:db8:1::1", PROXIES, False),
        # An IPv4 address is not part of an IPv6 network, although each has a notation in IPv6.
        ("192.0.2.1", "::/1", False),
        ("::ffff:192.0.2.1", "::/1", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1:80", "127.0.0.1", False),
        # No setting can name a peer without an address, such as that of a Unix socket.
        ("localhost", "127.0.0.1", False),
        ("unknown", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("", "", False),
        (None, "127.0.0.1", False),
        (None, "", False),
    ],
)
def test_a_peer_is_trusted_by_its_address(peer: str | None, trusted_proxy: str, trusted: bool) -> None:
    assert is_trusted(peer, trusted_proxy) is trusted


# The client of a request


@each(
    ("peer", "forwarded_for", "trusted_proxy", "client"),
    [
        (STRANGER, None, "", STRANGER),
        (STRANGER, "192.0.2.1", "", STRANGER),
        (STRANGER, "192.0.2.1", PROXY, STRANGER),
        (STRANGER, "192.0.2.1", PROXIES, STRANGER),
        (PROXY, None, PROXY, PROXY),
        (PROXY, "192.0.2.1", "", PROXY),
        (PROXY, "192.0.2.1", PROXY, "192.0.2.1"),
        (PROXY, "192.0.2.1, 198.51.100.2", PROXY, "198.51.100.2"),
        (PROXY, "198.51.100.2,  ::ffff:192.0.2.1 ", PROXY, "192.0.2.1"),
        (PROXY, "198.51.100.2,\t192.0.2.1\t", PROXY, "192.0.2.1"),
        # Trusted hops are skipped, from the right.
        (PROXY, "192.0.2.1, 127.0.0.1", PROXY, "192.0.2.1"),
        (PROXY, "6.6.6.6, 192.0.2.1, 10.20.0.1", PROXIES, "192.0.2.1"),
        (PROXY, "6.6.6.6,192.0.2.1,2001:db8::1,::ffff:10.20.0.1,10.20.0.2", PROXIES, "192.0.2.1"),
        (PROXY, "6.6.6.6, 2001:db8:1::1, 2001:db8::1", PROXIES, "2001:db8:1::1"),
        (PROXY, "192.0.2.1, 10.20.0.1:8080, [2001:db8::2]:8080", PROXIES, "192.0.2.1"),
        ("10.20.0.9", "192.0.2.1, 127.0.0.1", PROXIES, "192.0.2.1"),
        # If all hops are trusted, the leftmost is the client.
        (PROXY, "10.20.0.3", PROXIES, "10.20.0.3"),
        (PROXY, "10.20.0.3, 10.20.0.2, 10.20.0.1", PROXIES, "10.20.0.3"),
        (PROXY, "127.0.0.1", PROXY, "127.0.0.1"),
        # The peer has one spelling, too.
        ("::ffff:192.0.2.1", None, "", "192.0.2.1"),
        ("::ffff:192.0.2.1", "6.6.6.6", PROXY, "192.0.2.1"),
        ("::ffff:127.0.0.1", "192.0.2.1", PROXY, "192.0.2.1"),
        ("::ffff:127.0.0.1", None, PROXY, "127.0.0.1"),
        ("0:0::1", "192.0.2.1", "::1", "192.0.2.1"),
        ("2001:DB8:0::1", None, "", "2001:db8::1"),
        ("fe80::1%eth0", None, "", "fe80::1"),
        # A hop that is no address, even a trusted one, ends the reading.
        (PROXY, "evil", PROXY, "unknown"),
        (PROXY, "192.0.2.1,", PROXY, "unknown"),
        (PROXY, "192.0.2.1, ", PROXY, "unknown"),
        (PROXY, "", PROXY, "unknown"),
        (PROXY, "192.0.2.1, evil, 10.20.0.1", PROXIES, "unknown"),
        (PROXY, "192.0.2.1,, 10.20.0.1", PROXIES, "unknown"),
        (PROXY, "192.0.2.1, localhost", PROXIES, "unknown"),
        (PROXY, "192.0.2.1, unknown", PROXIES, "unknown"),
        (PROXY, ",10.20.0.1", PROXIES, "unknown"),
        ("localhost", None, "", "localhost"),
        ("localhost", "192.0.2.1", PROXY, "localhost"),
        # A Unix socket has no peer address, and some servers say so with an empty one.
        ("", None, "", "unknown"),
        ("", "192.0.2.1", "", "unknown"),
        ("", "192.0.2.1", PROXY, "unknown"),
        ("", "192.0.2.1", PROXIES, "unknown"),
    ],
)
def test_the_client_is_the_peer_or_the_last_hop_that_is_not_trusted(
    peer: str, forwarded_for: str | None, trusted_proxy: str, client: str
) -> None:
    assert client_address(peer, forwarded_for, trusted_proxy) == client


@each(
    ("hop", "client"),
    [
        ("203.0.113.7:443", "203.0.113.7"),
        ("203.0.113.7:0", "203.0.113.7"),
        ("[2001:db9::7]:443", "2001:db9::7"),
        ("[2001:db9::7]", "2001:db9::7"),
        ("[2001:DB9:0::7]", "2001:db9::7"),
        ("2001:db9::7:443", "2001:db9::7:443"),  # without brackets, there is no port
        ("[::ffff:203.0.113.7]:443", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%eth0]:443", "fe80::1"),
        ("fe80::1%" + "x" * MAX_HOP_LENGTH, "fe80::1"),
        ("[fe80::1%" + "x" * MAX_HOP_LENGTH + "]", "unknown"),  # cut, so the bracket is not closed
        ("203.0.113.7:", "unknown"),
        ("203.0.113.7:x", "unknown"),
        ("203.0.113.7:_x", "unknown"),
        ("203.0.113.7:٤", "unknown"),
        ("203.0.113.7:123456", "unknown"),
        ("203.0.113.7:4:4", "unknown"),
        ("203.0.113.7%eth0", "unknown"),
        ("203.0.113.7/32", "unknown"),
        ("203.0.113:443", "unknown"),
        ("[203.0.113.7]:443", "unknown"),
        ("[203.0.113.7:443]", "unknown"),
        ("[2001:db9::7]:", "unknown"),
        ("[2001:db9::7]443", "unknown"),
        ("[2001:db9::7", "unknown"),
        ("2001:db9::7]:443", "unknown"),
        ("[[2001:db9::7]]", "unknown"),
        ("[]:443", "unknown"),
        ("[ 2001:db9::7]", "unknown"),
        (":443", "unknown"),
        ("for=203.0.113.7", "unknown"),
        ('"203.0.113.7"', "203.0.113.7"),
        ('"[2001:db9::7]:443"', "2001:db9::7"),
        ('"203.0.113.7', "unknown"),
        ('203.0.113.7"', "unknown"),
        ('""203.0.113.7""', "unknown"),
        ("'203.0.113.7'", "unknown"),
        ('"', "unknown"),
        ("203.0.113.7\r\n", "unknown"),
        ("203.0.113.7\xa0", "unknown"),
        ("203.0.113.7" + " " * MAX_HOP_LENGTH + "x", "unknown"),
        ("x" * 8000, "unknown"),
        (":" * 8000, "unknown"),
        ("[" * 8000, "unknown"),
    ],
)
def test_a_hop_may_carry_a_port_or_a_zone(hop: str, client: str) -> None:
    assert client_address(PROXY, f"198.51.100.2, {hop}", PROXIES) == client
    assert client_address(PROXY, f"198.51.100.2,{hop} ,10.20.0.1", PROXIES) == client


@pytest.mark.slow
@given(
    st.text(st.characters(max_codepoint=255)),
    st.ip_addresses(network="203.0.113.0/24") | st.ip_addresses(network="2001:db9::/32"),
    st.lists(st.sampled_from(["127.0.0.1", "10.20.3.4:80", "2001:db8::9", "[2001:db8::9]:80", "::ffff:10.20.0.1"])),
)
@hypothesis_settings(derandomize=True, database=None)
def test_forged_hops_on_the_left_are_ignored(forged: str, stranger: object, proxies: list[str]) -> None:
    hops = ", ".join([forged, str(stranger), *proxies[: MAX_HOPS - 1]])
    assert client_address(PROXY, hops, PROXIES) == str(stranger)


@each("forged", ["6.6.6.6", "10.20.0.1", "unknown", "6.6.6.6, 10.20.0.1"])
def test_a_client_in_a_trusted_network_can_forge_its_address(forged: str) -> None:
    # 10.20.0.66 is a client that sends the forged header to the proxy 10.20.0.1. The proxy appends the address of that
    # client, but it is trusted like the proxy. So the documents say that a trusted network must not contain clients,
    # and a start with a wide network logs a warning.
    assert client_address("10.20.0.1", f"{forged}, 10.20.0.66", "10.20.0.0/16") == forged.split(",")[0]
    assert client_address("10.20.0.1", f"{forged}, 10.20.0.66", "10.20.0.1") == "10.20.0.66"


def test_a_long_list_of_trusted_hops_is_not_read_to_its_end() -> None:
    trusted = ["10.20.0.1"] * (MAX_HOPS - 1)
    assert client_address(PROXY, ",".join([STRANGER, *trusted]), PROXIES) == STRANGER
    assert client_address(PROXY, ",".join(["10.20.0.2", *trusted]), PROXIES) == "10.20.0.2"
    for left in STRANGER, "10.20.0.2", "", "evil", f"{STRANGER},10.20.0.2":
        assert client_address(PROXY, ",".join([left, "10.20.0.1", *trusted]), PROXIES) == "unknown"


# What counts as one client


@each(
    ("address", "networks"),
    [
        ("192.0.2.1", ("192.0.2.1",)),
        ("::ffff:192.0.2.1", ("192.0.2.1",)),
        ("2001:db8:a:b1c2::1", ("2001:db8:a:b1c2::/64", "2001:db8:a:b100::/56", "2001:db8:a::/48")),
        ("2001:db8:a:b1c2:ffff:ffff:ffff:ffff", ("2001:db8:a:b1c2::/64", "2001:db8:a:b100::/56", "2001:db8:a::/48")),
        ("2001:DB8::1", ("2001:db8::/64", "2001:db8::/56", "2001:db8::/48")),
        ("fe80::1%eth0", ("fe80::/64", "fe80::/56", "fe80::/48")),
        ("::1", ("::/64", "::/56", "::/48")),
        ("localhost", ("localhost",)),
        ("unknown", ("unknown",)),
        ("", ("",)),
    ],
)
def test_one_client_is_followed_by_the_wider_networks(address: str, networks: tuple[str, ...]) -> None:
    assert client_networks(address) == networks


@each(
    ("address", "path"),
    [
        ("192.0.2.1", ("192.0.0.0/16", "192.0.2.0/24", "192.0.2.1", "192.0.2.1")),
        ("255.255.255.255", ("255.255.0.0/16", "255.255.255.0/24", "255.255.255.255", "255.255.255.255")),
        ("::ffff:192.0.2.1", ("192.0.0.0/16", "192.0.2.0/24", "192.0.2.1", "192.0.2.1")),
        ("2001:db8:a:b1c2::1", ("2001:db8::/32", "2001:db8:a::/48", "2001:db8:a:b100::/56", "2001:db8:a:b1c2::/64")),
        ("::1", ("::/32", "::/48", "::/56", "::/64")),
        ("localhost", ("localhost",) * 4),
        ("unknown", ("unknown",) * 4),
    ],
)
def test_the_path_of_an_address_leads_from_the_widest_network_to_one_client(
    address: str, path: tuple[str, ...]
) -> None:
    assert network_path(address) == path
    assert network_path(address)[3] == client_networks(address)[0]


@pytest.mark.slow
@given(st.ip_addresses())
@hypothesis_settings(derandomize=True, database=None)
def test_the_networks_of_an_address_contain_it(address: object) -> None:
    parsed = parse_address(str(address))
    for network in *client_networks(str(address)), *network_path(str(address)):
        (parsed_network,) = parse_networks(network)
        assert parsed in parsed_network
