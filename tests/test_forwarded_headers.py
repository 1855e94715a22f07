"""Forwarded headers: only a trusted proxy may say who the client is and that it came over plain HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from auth import Auth
from authsvc import create_app
from storage import DB
from tests.cases import each
from tests.conftest import Client, Clock, Service
from tests.crowd import written_log
from tests.production import (
    FORM,
    PROXY,
    log_lines,
    post_request,
    production_settings,
    proxied_service,
    send,
    shared_site,
)
from web import middleware


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with shared_site(tmp_path_factory.mktemp("site")) as call:
        yield call


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with proxied_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def call(database: str, db: DB, clock: Clock) -> Client:
    settings = production_settings(database, trusted_proxy=PROXY)
    return Client(create_app(settings, Auth(db, settings, clock)))


@each(
    ("peer", "proto", "status"),
    [
        (PROXY, "http", 403),
        (PROXY, "HTTP", 403),
        (PROXY, "ws", 403),
        (PROXY, "https,http", 403),
        (PROXY, "https, HTTP ", 403),
        (PROXY, "wss, ws", 403),
        (PROXY, "https,", 403),
        (PROXY, "https, ", 403),
        (PROXY, ",", 403),
        (PROXY, "", 403),
        (PROXY, " ", 403),
        (PROXY, "https http", 403),
        (PROXY, "https;", 403),
        (PROXY, "https\xa0", 403),
        (PROXY, "httpſ", 403),
        ("::ffff:127.0.0.1", "http", 403),
        (PROXY, "https", 200),
        (PROXY, "HTTPS", 200),
        (PROXY, " https\t", 200),
        (PROXY, "wss", 200),
        (PROXY, "http, wss", 200),
        (PROXY, "Wss", 200),
        (PROXY, "http, https", 200),
        (PROXY, "http,https,", 403),
        (PROXY, "ws,\twss ", 200),
        (PROXY, ",https", 200),
        (PROXY, None, 200),
        ("::ffff:127.0.0.1", "https", 200),
        ("192.0.2.9", "http", 200),
        ("192.0.2.9", "", 200),
        ("", "http", 200),
    ],
)
def test_a_request_that_reached_the_proxy_over_http_is_refused(
    site: Client, peer: str, proto: str | None, status: int
) -> None:
    headers: dict[str, Any] = {} if proto is None else {"HTTP_X_FORWARDED_PROTO": proto}
    answer = site("GET", "/", REMOTE_ADDR=peer, **headers)
    assert answer.status == status
    assert (answer.json == {"message": "use https"}) == (status == 403)


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        (PROXY, None, PROXY),
        (PROXY, "203.0.113.5", "203.0.113.5"),
        (PROXY, "6.6.6.6, 203.0.113.5", "203.0.113.5"),
        (PROXY, "evil,203.0.113.5", "203.0.113.5"),
        (PROXY, "203.0.113.5, 6.6.6.6", "6.6.6.6"),
        (PROXY, "::ffff:203.0.113.5", "203.0.113.5"),
        (PROXY, "2001:DB8:0::1", "2001:db8::1"),
        (PROXY, "evil", "unknown"),
        (PROXY, "", "unknown"),
        (PROXY, "203.0.113.5,", "unknown"),
        (PROXY, "203.0.113.5:443", "203.0.113.5"),
        (PROXY, "[2001:db8::1]:443", "2001:db8::1"),
        (PROXY, "[::ffff:203.0.113.5]:443", "203.0.113.5"),
        (PROXY, '"203.0.113.5:4711"', "203.0.113.5"),
        (PROXY, '6.6.6.6,\t"[2001:db8::1]:4711" ', "2001:db8::1"),
        (PROXY, ' 203.0.113.5:4711 , "127.0.0.1:5000"', "203.0.113.5"),
        (PROXY, '"203.0.113.5', "unknown"),
        (PROXY, '"', "unknown"),
        (PROXY, '"6.6.6.6, 203.0.113.5"', "unknown"),
        (PROXY, "203.0.113.5:port", "unknown"),
        (PROXY, "6.6.6.6, 203.0.113.5, 127.0.0.1", "203.0.113.5"),
        (PROXY, "6.6.6.6, evil, 127.0.0.1", "unknown"),
        (PROXY, "x" * 300, "unknown"),
        (PROXY, "203.0.113.5\r\nx", "unknown"),
        ("192.0.2.9", "203.0.113.5", "192.0.2.9"),
        ("127.0.0.2", "203.0.113.5", "127.0.0.2"),
        ("::ffff:127.0.0.1", "203.0.113.5", "203.0.113.5"),
        ("::ffff:192.0.2.9", "203.0.113.5", "192.0.2.9"),
        ("", "203.0.113.5", "unknown"),
    ],
)
def test_only_the_trusted_proxy_can_name_the_client_address(
    site: Client, capsys: pytest.CaptureFixture[str], peer: str, forwarded_for: str | None, client: str
) -> None:
    headers: dict[str, Any] = {} if forwarded_for is None else {"HTTP_X_FORWARDED_FOR": forwarded_for}
    site("POST", "/sessions", FORM, REMOTE_ADDR=peer, **headers)
    assert [line["address"] for line in log_lines(capsys.readouterr().err) if "address" in line] == [client]


def test_an_untrusted_forwarded_address_gives_no_more_guesses(call: Client) -> None:
    peer = "192.0.2.9"
    statuses = [
        call("POST", "/sessions", FORM, REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=f"10.0.0.{n}").status for n in range(30)
    ]
    assert statuses == [401] * 10 + [429] * 20


def test_all_invalid_forwarded_addresses_count_as_one_client(call: Client) -> None:
    statuses = [
        call("POST", "/sessions", FORM, REMOTE_ADDR=PROXY, HTTP_X_FORWARDED_FOR=f"junk{n}").status for n in range(30)
    ]
    assert statuses == [401] * 10 + [429] * 20


@pytest.mark.parametrize("proxies", ["127.0.0.1, 10.20.0.0/16, 2001:db8::/48", "::ffff:10.20.0.0/112,2001:db8:0::1"])
def test_forged_hops_before_those_of_several_proxies_give_no_more_guesses(
    database: str, db: DB, clock: Clock, proxies: str
) -> None:
    settings = production_settings(database, trusted_proxy=proxies)
    call = Client(create_app(settings, Auth(db, settings, clock)))
    hops = ["203.0.113.5", "10.20.0.1", "[2001:db8::1]:443"]
    statuses = [
        call("POST", "/sessions", FORM, REMOTE_ADDR="10.20.9.9", HTTP_X_FORWARDED_FOR=", ".join([forged, *hops])).status
        for forged in [*(f"6.6.6.{n}" for n in range(10)), *(f"10.20.0.{n}, junk{n}" for n in range(10)), *[""] * 10]
    ]
    assert statuses == [401] * 10 + [429] * 20


def test_an_ignored_forwarded_address_is_logged_once(call: Client, capsys: pytest.CaptureFixture[str]) -> None:
    middleware._warn_of_ignored_forwarding.cache_clear()
    for n in range(5):
        call("GET", "/", REMOTE_ADDR="192.0.2.9", HTTP_X_FORWARDED_FOR=f"10.0.0.{n}")
    assert [line["event"] for line in log_lines(capsys.readouterr().err)] == ["sys_forwarding_ignored"]


@pytest.mark.process
def test_two_forwarded_for_headers_are_read_as_one_list(proxied: Service) -> None:
    answer = send(
        proxied.address,
        post_request(
            "/sessions", FORM, "X-Forwarded-For: 6.6.6.6", "x-forwarded-for:", 'X-FORWARDED-FOR: "203.0.113.200:80"'
        ),
    )
    assert answer.startswith(b"HTTP/1.1 401 ")
    addresses = [line["address"] for line in log_lines(written_log(proxied)) if line["event"] == "authn_login_fail"]
    assert addresses[-1] == "203.0.113.200"
