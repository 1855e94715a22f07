"""The picture of a run: session checks, their latency during sign-ins, and guarded applications, as SVG.

It has its own background in a light and in a dark form, so it can be read on any page.
"""

from __future__ import annotations

import math
from collections.abc import Callable

WIDTH, NAMES, BARS = 760, 200, 430  # the whole, the column of names, and the longest bar
ROW = 22
LIMITS = "waitress", "no auth", "constant"  # how the names begin that only show what is possible
STYLE = """
text { font: 13px sans-serif; fill: #1f2328; } .title { font-size: 15px; font-weight: 600; }
.note { fill: #59636e; font-size: 12px; } .page { fill: #ffffff; } .bar { fill: #8c959f; } .ours { fill: #0969da; }
.limit { fill: #d1d9e0; }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc; } .note { fill: #9198a1; } .page { fill: #0d1117; } .bar { fill: #656c76; }
.ours { fill: #4493f8; } .limit { fill: #3d444d; } }"""


def picture(results: dict[str, dict[str, float]]) -> str:
    """Return the picture of what this run has measured."""
    panels = (
        ("Session checks a second, 16 connections", "longer is better; faint: limits", "rate 16", ",.0f", True),
        ("99 % of session checks take at most, while 64 clients sign in, ms", "shorter is better; logarithmic",
         "p99 64", ",.1f", False),
        ("Pages a second of a Flask application behind nginx, by whom nginx asks, 16 connections",
         "longer is better; faint: limits", "nginx Flask 16", ",.0f", True),
    )  # fmt: skip
    drawn, y = [], 10
    for title, note, figure, form, most_first in panels:
        # nginx's constant is left out: beside its bar all others would be too short to compare.
        values = {name: found[figure] for name, found in results.items() if figure in found and name[:5] != "nginx"}
        if not values:
            continue
        names = sorted(values, key=lambda name: values[name], reverse=most_first)
        scale = linear(values) if most_first else logarithmic(values)
        drawn.append(
            f'<text class="title" x="12" y="{y + 16}">{title}</text>'
            f'<text class="note" x="12" y="{y + 34}">{note}</text>'
        )
        y += 42
        for name in names:
            length, kind = scale(values[name]), "limit" if name.startswith(LIMITS) else "bar"
            kind = "ours" if name == "authsvc" else kind
            drawn.append(
                f'<text x="{NAMES - 10}" y="{y + 14}" text-anchor="end">{name}</text>'
                f'<rect class="{kind}" x="{NAMES}" y="{y + 2}" width="{length:.0f}" height="{ROW - 6}"/>'
                f'<text x="{NAMES + length + 8:.0f}" y="{y + 14}">{values[name]:{form}}</text>'
            )
            y += ROW
        y += 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}">'
        f'<style>{STYLE}</style><rect class="page" width="{WIDTH}" height="{y}" rx="6"/>{"".join(drawn)}</svg>\n'
    )


def linear(values: dict[str, float]) -> Callable[[float], float]:
    most = max(values.values())
    return lambda value: max(1, BARS * value / most)


def logarithmic(values: dict[str, float]) -> Callable[[float], float]:
    """Return the length of a bar that begins at a tenth of a millisecond."""
    most = math.log10(max(values.values()) / 0.1)
    return lambda value: max(1, BARS * math.log10(value / 0.1) / most)
