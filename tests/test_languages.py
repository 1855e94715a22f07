"""The language that a browser asks for."""

from __future__ import annotations

from tests.cases import each
from web.languages import MAX_RANGES, choose_language


@each(
    ("header", "language"),
    [
        ("", "en"),
        ("de", "de"),
        ("DE-ch", "de"),
        ("fr-CH, fr;q=0.9, en;q=0.8, de;q=0.7, *;q=0.5", "fr"),
        ("en-GB,en;q=0.9,de;q=0.8", "en"),
        ("es-419 ; q=0.8 ,\tde;q=0.9", "de"),
        ("de;q=0.3, fr;q=0.30, es;q=0.301", "es"),
        ("fr;q=1.000, de", "fr"),  # the first of two with the same weight
        ("pt-BR, it;q=0.9, es;q=0.1", "es"),
        ("zh-Hant-TW, nds, *", "en"),  # nds is Low German
        ("fr;q=0, de;q=0.0", "en"),
        ("de;q=0,fr;q=0.1", "fr"),
        ("xde,de1,es", "es"),
        ("de" * 5000 + "!", "en"),
        ("de-" * 5000 + "!", "en"),
        ("*, de;q=0.2", "de"),
        ("d, de-, de;, de;q=, de;q=2, de;q=.5, de;q=0.1234, d\u0435, es;q=0.1", "es"),  # a Cyrillic letter
        ("de;level=1, de;q=NaN, de\r\n", "en"),
        ("xx, " * (MAX_RANGES - 1) + "de", "de"),
        ("xx, " * MAX_RANGES + "de", "en"),
    ],
)
def test_the_language_with_the_highest_weight_is_chosen(header: str, language: str) -> None:
    assert choose_language(header) == language
