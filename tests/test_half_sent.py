"""Half-sent requests through each proxy in deploy/: the proxy holds them back, and honest visitors do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from tests.crowd import awaited
from tests.half_sent import ADDRESSES, HTTP1, HTTP2, service_connections, visit
from tests.proxies import APP, AUTH, PROXIES, Site
from web.forms import MAX_BODY_BYTES

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.proxies]

WINDOW = 1.0  # seconds
COUNT = 150  # half-sent requests; tests/long/test_half_sent.py holds more than the service has connections
VISITORS = 40  # connections to the service for complete requests; a Caddy keeps up to 32 idle ones
LARGE = b"x" * 32_768  # more than the proxies buffer


@pytest.fixture(scope="module", params=PROXIES)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with closing(Site(request.param, tmp_path_factory.mktemp("site"))) as shared:
        shared.create_account()
        yield shared


@pytest.fixture(scope="module")
def cookie(site: Site) -> str:
    return site.sign_in()


@pytest.mark.parametrize("protocol", [HTTP1, HTTP2])
def test_half_sent_requests_stay_in_the_proxy(site: Site, cookie: str, protocol: type[HTTP1 | HTTP2]) -> None:
    before = service_connections(site)
    with closing(protocol(site)) as clients:
        for _ in range(COUNT):
            clients.open()
        clients.settle()
        assert service_connections(site) <= before
        figures = visit(site, cookie, WINDOW)
        assert figures.share(within=1) >= 0.99, figures
        assert figures.connections <= VISITORS, figures
        clients.open()
        assert clients.finish() == 401  # the service gets a request that is complete


@pytest.mark.parametrize(
    ("host", "framing", "body"),
    [
        (AUTH, "Content-Length: 1000000", LARGE),
        (AUTH, "Transfer-Encoding: chunked", b"f4240\r\n" + LARGE),
        (AUTH, "Transfer-Encoding: chunked", b"1\r\ne"),
        (AUTH, f"Content-Length: {MAX_BODY_BYTES}", LARGE[: MAX_BODY_BYTES - 1]),
        (APP, "Content-Length: 1000000", LARGE),
    ],
    ids=["too large", "too large, chunked", "chunked", "all but the last byte", "to the application"],
)
def test_no_other_half_sent_body_holds_a_connection_of_the_service(
    site: Site, cookie: str, host: str, framing: str, body: bytes
) -> None:
    head = f"POST /sessions HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n{framing}\r\n\r\n"
    with ExitStack() as opened:
        for address in ADDRESSES * 20:  # the service itself holds 16 of each client
            connection = opened.enter_context(site.connect(host, address))
            connection.sendall(head.encode() + body)
        assert site.request("GET", f"{site.auth}/health").status == 200
        assert awaited(lambda: service_connections(site) <= VISITORS)


@pytest.mark.parametrize(("size", "status"), [(MAX_BODY_BYTES, 400), (MAX_BODY_BYTES + 1, 413), (1_000_000, 413)])
def test_a_complete_body_is_accepted_up_to_the_limit_of_the_service(site: Site, size: int, status: int) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert site.request("POST", f"{site.auth}/sessions", b"x" * size, headers=headers).status == status
