"""The attacks of tests/test_hostile_peers.py for a minute each. What is closed comes back, 100 times a second."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import hostile
from tests.conftest import Service
from tests.production import PUBLIC_URL

pytestmark = pytest.mark.long


@pytest.mark.parametrize("attack", hostile.ATTACKS)
def test_hostile_connections_that_come_back_keep_nobody_out(start: Callable[..., Service], attack: str) -> None:
    service = start(AUTHSVC_PUBLIC_URL=PUBLIC_URL, AUTHSVC_TRUSTED_PROXY="127.0.0.1", AUTHSVC_BCRYPT_COST="10")
    hostile.withstands(service, attack, seconds=60)
