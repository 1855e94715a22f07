"""Connections that are held open by the hundred: half requests, unread answers, silence. They keep nobody out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import hostile
from tests.conftest import Service
from tests.production import PUBLIC_URL


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize("attack", hostile.ATTACKS)
def test_600_hostile_connections_keep_nobody_out(start: Callable[..., Service], attack: str) -> None:
    settings = {"AUTHSVC_PUBLIC_URL": PUBLIC_URL, "AUTHSVC_TRUSTED_PROXY": "127.0.0.1", "AUTHSVC_BCRYPT_COST": "10"}
    service = start(**settings)
    hostile.withstands(service, attack, seconds=2.3)  # the limit of connections is reached after 1.7
