"""100,000 changed assertions of passkeys, on which two verifiers must agree. ``pytest -m long`` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_passkey_mutations import compare


@pytest.mark.long
def test_two_verifiers_agree_on_100_000_changed_assertions(tmp_path: Path) -> None:
    counts = compare(tmp_path, 100_000, seed=2)
    print(f"accepted {counts[200]}, refused {counts[401]}")
    assert counts[200] + counts[401] == 100_000
