"""The bars, the table and the picture that are made of the measured values."""

from __future__ import annotations

import json
import os
import platform
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

from bench.subjects import HERE, Subject

CONNECTIONS = 1, 16, 64
SIZES = 1_000, 100_000, 1_000_000

Measured = dict[str, dict[str, float]]
Samples = dict[str, dict[str, list[float]]]

# (figure, comparison, bar, aim). A bar must be reached, an aim is a wish. bars() computes the figures.
BARS = [
    *((f"profile ÷ bare waitress, {n} connections", ">=", bar, aim) for n, bar, aim in
      ((1, 0.75, 1.0), (16, 1.1, 1.5), (64, 1.3, 1.8))),
    *((f"profile ÷ best peer, {n} connections", ">=", 4, 6) for n in CONNECTIONS),
    ("profile ÷ the original, 1,000,000 users", ">=", 50, None),
    ("p99 of profile, 16 logging in ÷ idle", "<=", 2, 1),
    ("p99 of profile, 64 logging in ÷ idle", "<=", 3, 1),
    ("logins ÷ raw bcrypt on all cores", ">=", 0.95, 0.99),
    ("profile at 1,000,000 users ÷ at 1,000", ">=", 0.9, 1),
    ("resident memory idle, MB", "<=", 36, 28),
    ("resident memory after the storm with 100,000 sessions, MB", "<=", 45, 32),
    ("cold start to the first 200, s", "<=", 0.3, 0.15),
    ("cost of verify ÷ profile", "<=", 1.1, 1),
    ("p99 of verify, 16 logging in ÷ idle", "<=", 2, 1),
]  # fmt: skip


def bars(results: Measured) -> dict[str, float]:
    """Return the figures of BARS that this run has measured."""
    ours = results["authsvc"]
    bare = [found for name, found in results.items() if name.startswith("waitress")]
    others = {
        name: found for name, found in results.items() if name not in ("authsvc", "original") and "rate 1" in found
    }
    rivals = [found for name, found in others.items() if not name.startswith("waitress")]
    figures: dict[str, Callable[[], float]] = {
        **{
            f"profile ÷ bare waitress, {n} connections": lambda n=n: (  # type: ignore[misc]
                ours[f"rate {n}"] / max(found[f"rate {n}"] for found in bare)
            )
            for n in CONNECTIONS
        },
        **{
            f"profile ÷ best peer, {n} connections": lambda n=n: (  # type: ignore[misc]
                ours[f"rate {n}"] / max(found[f"rate {n}"] for found in rivals)
            )
            for n in CONNECTIONS
        },
        "profile ÷ the original, 1,000,000 users": lambda: (
            ours["rate at 1000000"] / results["original"]["rate at 1000000"]
        ),
        "p99 of profile, 16 logging in ÷ idle": lambda: ours["p99 16"] / ours["p99 idle"],
        "p99 of profile, 64 logging in ÷ idle": lambda: ours["p99 64"] / ours["p99 idle"],
        "logins ÷ raw bcrypt on all cores": lambda: ours["logins ÷ raw bcrypt"],
        "profile at 1,000,000 users ÷ at 1,000": lambda: ours["rate at 1000000"] / ours["rate at 1000"],
        "resident memory idle, MB": lambda: ours["resident idle"],
        "resident memory after the storm with 100,000 sessions, MB": lambda: ours["resident after"],
        "cold start to the first 200, s": lambda: ours["cold start"],
        "cost of verify ÷ profile": lambda: ours["cost of verify"],
        "p99 of verify, 16 logging in ÷ idle": lambda: ours["p99 of verify 16"] / ours["p99 of verify idle"],
    }
    found = {}
    for what, figure in figures.items():
        try:
            found[what] = figure()
        except (KeyError, ValueError):  # not measured in this run
            continue
    return found


def table(subjects: list[Subject], results: Measured) -> str:
    def cell(found: dict[str, float], *names: str, form: str = ",.0f") -> str:
        return " / ".join(format(found[name], form) if name in found else "–" for name in names)

    lines = [
        "| | requests a second, 1 / 16 / 64 connections | p99 of one, idle / 16 / 64 logging in, ms "
        "| logins a second, 16 clients | MB idle / after | cold start, s | packages, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        found = results[subject.name]
        lines.append(
            f"| **{subject.name}**: {subject.what}{', ' + subject.hash if subject.hash else ''} "
            f"| {cell(found, *(f'rate {n}' for n in CONNECTIONS))} "
            f"| {cell(found, 'p99 idle', 'p99 16', 'p99 64', form=',.1f') if subject.login else ''} "
            f"| {cell(found, 'logins 16', form='.1f') if subject.login else ''} "
            f"| {cell(found, 'memory idle', 'memory after') if subject.login else ''} "
            f"| {cell(found, 'cold start', form='.2f')} "
            f"| {f'{subject.packages}, {subject.installed:.0f}' if subject.packages else ''} |"
        )
    sizes = [name for name in ("authsvc", "original") if "rate at 1000" in results.get(name, {})]
    if sizes:
        lines += [
            "",
            "| requests a second at 16 connections | " + " | ".join(f"{size:,} users" for size in SIZES) + " |",
        ]
        lines += ["|---|" + "---|" * len(SIZES)]
        for name in sizes:
            lines.append(
                f"| {name} | " + " | ".join(f"{results[name][f'rate at {size}']:,.0f}" for size in SIZES) + " |"
            )
    figures = bars(results)
    lines += ["", "| must hold | measured | bar | aim |", "|---|---|---|---|"]
    for what, sign, bar, aim in BARS:
        if what in figures:
            missed = "" if holds(figures[what], sign, bar) else " **missed**"
            lines.append(f"| {what} | {figures[what]:.3g}{missed} | {sign} {bar} | {'' if aim is None else aim} |")
    return "\n".join(lines)


def holds(figure: float, sign: str, bar: float) -> bool:
    return figure >= bar if sign == ">=" else figure <= bar


def picture(subjects: list[Subject], results: Measured) -> str:
    """Return a bar chart of the throughput at 16 connections, as SVG."""
    shown = [subject for subject in subjects if "rate 16" in results[subject.name]]
    most = max(results[subject.name]["rate 16"] for subject in shown)
    rows = []
    for number, subject in enumerate(sorted(shown, key=lambda one: -results[one.name]["rate 16"])):
        rate, y = results[subject.name]["rate 16"], 40 + 26 * number
        colour = "#0a58ca" if subject.name == "authsvc" else "#8c959f"
        rows.append(
            f'<text x="190" y="{y + 14}" text-anchor="end">{subject.name}</text>'
            f'<rect x="200" y="{y}" width="{max(1, 420 * rate / most):.0f}" height="18" fill="{colour}"/>'
            f'<text x="{208 + 420 * rate / most:.0f}" y="{y + 14}">{rate:,.0f}</text>'
        )
    height = 50 + 26 * len(shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="720" height="{height}" font-size="13" '
        'font-family="sans-serif">'
        f'<rect width="720" height="{height}" fill="#fff"/><text x="10" y="22" font-size="15">Who is signed in? '
        f"Requests a second, 16 connections</text>{''.join(rows)}</svg>\n"
    )


def machine() -> str:
    model = re.search("model name\t: (.*)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, {model[1] if model else platform.machine()}, Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def write(when: str, text: str, subjects: list[Subject], results: Measured, samples: Samples) -> None:
    readme = HERE / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- results -->\n")
    after = rest.partition("<!-- end -->")[2]
    readme.write_text(f"{before}{mark}{when}\n\n{text}\n<!-- end -->{after}")
    found = {"when": when, "results": results, "samples": samples}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "results.svg").write_text(picture(subjects, results))
