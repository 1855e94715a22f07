"""Streams of requests that a proxy could read in another way: nginx and our server see the same requests in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.http_streams import ONLY_LINUX, compare_streams

pytestmark = [pytest.mark.proxies, pytest.mark.slow, pytest.mark.process, ONLY_LINUX]


def test_nginx_and_our_server_see_the_same_requests(tmp_path: Path) -> None:
    outcomes = compare_streams(tmp_path, seed=0, count=400)
    print(sorted(outcomes.items()))
    assert outcomes["accepted by us, accepted by nginx"] >= 100  # else the grammar is too odd
    assert outcomes["refused by us, refused by nginx"] >= 60
