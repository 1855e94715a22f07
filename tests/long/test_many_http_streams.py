"""The streams of test_http_streams.py, 5,000 of them. ``pytest -m long`` runs this; HTTP_SEED chooses others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.http_streams import ONLY_LINUX, compare_streams

pytestmark = [pytest.mark.long, ONLY_LINUX]

SEED = int(os.environ.get("HTTP_SEED", "1"))


def test_nginx_and_our_server_see_the_same_requests_in_5000_streams(tmp_path: Path) -> None:
    print(sorted(compare_streams(tmp_path, SEED, 5000).items()))
