"""Half-sent requests that are opened again and again for a minute: what honest visitors notice, with figures.

``pytest -m long`` runs them, 8 minutes in all. Their clients have five addresses (three over HTTP/2 to Caddy).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import HERE
from tests.half_sent import COUNT, HTTP1, HTTP2, visit
from tests.proxies import PROXIES, Site

pytestmark = pytest.mark.long

MINUTE = 60.0
REOPENED = 25  # a second; each request is held for 24 s
STREAMING = "caddy that streams"  # a Caddy of somebody who does not use our file


@pytest.fixture(params=[*PROXIES, STREAMING])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    kind, configuration = request.param, HERE / "deploy"
    if kind == STREAMING:
        kind, configuration = "caddy", tmp_path / "configuration"
        configuration.mkdir()
        lines = (HERE / "deploy" / PROXIES[kind]).read_text().splitlines(keepends=True)
        kept = [line for line in lines if "_buffers " not in line]
        assert len(kept) == len(lines) - 2
        (configuration / PROXIES[kind]).write_text("".join(kept))
    with closing(Site(kind, tmp_path, configuration=configuration)) as one:
        one.create_account()
        yield one


def reopen(clients: HTTP1 | HTTP2, stopping: threading.Event) -> None:
    """Replace the oldest request by a new one, at a steady rate, until the event is set."""
    began = time.monotonic()
    for number in itertools.count(1):
        if stopping.wait(max(0.0, began + number / REOPENED - time.monotonic())):
            return
        clients.drop()
        clients.open()


@pytest.mark.parametrize("protocol", [HTTP1, HTTP2])
def test_visitors_do_not_notice_half_sent_requests(
    site: Site, protocol: type[HTTP1 | HTTP2], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    cookie = site.sign_in()
    stopping = threading.Event()
    with closing(protocol(site)) as clients:
        for _ in range(COUNT):
            clients.open()
        attack = threading.Thread(target=reopen, args=(clients, stopping))
        attack.start()
        figures = visit(site, cookie, MINUTE)
        still_attacked = attack.is_alive()
        stopping.set()
        attack.join()
    with capsys.disabled():
        print(f"\n{request.node.callspec.id}: {figures}")
    assert still_attacked
    assert figures.share(within=1) >= 0.99
