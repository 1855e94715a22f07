"""The bars, and the tables that are made of the measured values."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.passkeys import FASTEST
from bench.picture import picture
from bench.subjects import HERE, Subject

CONNECTIONS = 1, 16, 64
SIZES = 1_000, 100_000, 1_000_000

Measured = dict[str, dict[str, float]]
Samples = dict[str, dict[str, list[float]]]

LIMITS = "waitress", "nginx"  # how the names of subjects begin that only show what is possible
PASSKEYS = "passkeys: "  # how the names of the figures of bench/passkeys.py begin
GUARDS = "no auth", "constant", "basic", "authsvc", "pocketbase", "flask-security", "fastapi-users"
CHAINS = ("nginx", "Flask"), ("nginx", "constant"), ("caddy", "Flask")


class Bar(NamedTuple):
    """What must hold: a figure, its comparison with a bar, and an aim, which is a wish."""

    what: str
    sign: str
    bar: float
    aim: float | None
    figure: Callable[[Measured], float]


def ours(name: str) -> Callable[[Measured], float]:
    return lambda found: found["authsvc"][name]


def to_waitress(connections: int) -> Callable[[Measured], float]:
    return to_best(f"rate {connections}", lambda name: name.startswith("waitress"))


def to_peers(connections: int) -> Callable[[Measured], float]:
    others = (*LIMITS, "authsvc", "original", "pocketbase")
    return to_best(f"rate {connections}", lambda name: not name.startswith(others))


def to_best(rate: str, chosen: Callable[[str], bool]) -> Callable[[Measured], float]:
    """Return what divides our rate by the best rate of the chosen subjects."""
    return lambda found: (
        found["authsvc"][rate] / max(one[rate] for name, one in found.items() if chosen(name) and rate in one)
    )


BARS = [
    *(Bar(f"profile ÷ bare waitress, {n} connections", ">=", bar, aim, to_waitress(n)) for n, bar, aim in
      ((1, 0.75, 1.0), (16, 1.1, 1.5), (64, 1.3, 1.8))),
    *(Bar(f"profile ÷ PocketBase, {n} connections", ">=", bar, aim, ours(f"rate ÷ PocketBase {n}")) for n, bar, aim in
      ((1, 1.7, 3), (16, 3, 6), (64, 3, 6))),
    *(Bar(f"profile ÷ best peer in Python or JavaScript, {n} connections", ">=", 4, 6, to_peers(n))
      for n in CONNECTIONS),
    *(Bar(f"nginx and Flask, asking authsvc ÷ asking a constant, {n} connections", ">=", 0.55, 0.75,
          ours(f"nginx Flask ÷ constant {n}")) for n in CONNECTIONS),
    Bar("profile ÷ the original, 1,000,000 users", ">=", 50, None,
        to_best("rate at 1000000", lambda name: name == "original")),
    Bar("profile at 1,000,000 users ÷ at 1,000", ">=", 0.9, 1, ours("rate, most ÷ fewest")),
    Bar("p99 of profile, 16 logging in ÷ idle", "<=", 2, 1, ours("p99 16 ÷ idle")),
    Bar("p99 of profile, 64 logging in ÷ idle", "<=", 3, 1, ours("p99 64 ÷ idle")),
    Bar("p99 of verify, 16 logging in ÷ idle", "<=", 2, 1, ours("p99 of verify 16 ÷ idle")),
    Bar("p99 of verify, 64 logging in ÷ idle", "<=", 2, 1, ours("p99 of verify 64 ÷ idle")),
    Bar("cost of verify ÷ profile", "<=", 1.1, 1, ours("cost of verify")),
    Bar("logins ÷ raw bcrypt on all cores", ">=", 0.97, 0.99, ours("logins ÷ raw bcrypt")),
    Bar("resident memory idle, MB", "<=", 32, 28, ours("resident idle")),
    Bar("resident memory after the storm with 100,000 sessions, MB", "<=", 45, 32, ours("resident after")),
    Bar("cold start to the first 200, s", "<=", 0.3, 0.15, ours("cold start")),
    Bar("cold start ÷ bare waitress", "<=", 3, None,
        lambda found: found["authsvc"]["cold start"] / found["waitress, 4 threads"]["cold start"]),
]  # fmt: skip


def bars(results: Measured) -> dict[Bar, float]:
    """Return the figures of BARS that this run has measured."""
    found = {}
    for bar in BARS:
        with contextlib.suppress(KeyError, ValueError):  # not measured in this run
            found[bar] = bar.figure(results)
    return found


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(found: dict[str, float], *names: str, form: str = ",.0f") -> str:
    return " / ".join(format(found[name], form) if name in found else "–" for name in names)


def table(subjects: list[Subject], results: Measured) -> str:
    parts = [services(subjects, results)]
    parts += [part(results) for part in (limits, chains, storms, sizes, must_hold)]
    return "\n\n".join(part for part in parts if part)


def services(subjects: list[Subject], results: Measured) -> str:
    lines = [
        "| | requests a second, 1 / 16 / 64 connections | p99 of one, idle / 16 / 64 logging in, ms "
        "| logins a second, 16 clients | MB idle / after | cold start, s | packages, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for subject in subjects:
        found = results[subject.name]
        if not found.keys() & {"rate 1", "p99 idle", "memory idle", "cold start"}:
            continue  # not measured in this run
        lines.append(
            f"| **{subject.name}**: {subject.what}{', ' + subject.hash if subject.hash else ''} "
            f"| {cell(found, *(f'rate {n}' for n in CONNECTIONS))} "
            f"| {cell(found, 'p99 idle', 'p99 16', 'p99 64', form=',.1f') if subject.login else ''} "
            f"| {cell(found, 'logins 16', form='.1f') if subject.login else ''} "
            f"| {cell(found, 'memory idle', 'memory after') if subject.login else ''} "
            f"| {cell(found, 'cold start', form='.2f')} "
            f"| {f'{subject.packages}, {subject.installed:.0f}' if subject.packages else ''} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def limits(results: Measured) -> str:
    """Return the table of what the parts of a request do alone, beside what the service does with them."""
    found = results["authsvc"]
    rows = (
        ("SQLite finds a session and its user, one thread", "raw look-up", "`GET /profile`, 64 connections", "rate 64"),
        ("bcrypt, 2^12, all cores", "raw bcrypt", "sign-ins with passwords, 8 clients", "logins"),
        (
            "`fido2` verifies a passkey, one thread",
            "raw fido2",
            "sign-ins with passkeys, 16 clients",
            PASSKEYS + FASTEST,
        ),
    )
    lines = [
        f"| {limit} | {short(found[raw])} | {what} | {short(found[name]) if name in found else '–'} |"
        for limit, raw, what, name in rows
        if raw in found
    ]
    return "\n".join(["| limit | a second | the service | a second |", "|---|---|---|---|", *lines]) if lines else ""


def chains(results: Measured) -> str:
    """Return the table of the guarded chains."""
    lines = [
        "| whom the proxy asks | nginx, Flask: requests a second, 1 / 16 / 64 connections "
        "| p99 idle / 16 logging in, ms | nginx, constant: requests a second "
        "| Caddy, Flask: requests a second | p99 idle / 16 logging in, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in GUARDS:
        found = results.get(name, {})
        if any(what.startswith("nginx Flask") for what in found):
            rates = {chain: cell(found, *(f"{' '.join(chain)} {n}" for n in CONNECTIONS)) for chain in CHAINS}
            tails = [
                cell(found, *(f"p99 {proxy} Flask {when}" for when in ("idle", 16)), form=",.1f")
                for proxy in ("nginx", "caddy")
            ]
            first, second, third = rates.values()
            lines.append(f"| {name} | {first} | {tails[0]} | {second} | {third} | {tails[1]} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def storms(results: Measured) -> str:
    """Return the table of sign-ins with passkeys beside sign-ins with passwords."""
    found = {what.removeprefix(PASSKEYS): value for what, value in results["authsvc"].items() if PASSKEYS in what}
    lines = [f"| {what} | {short(value)} |" for what, value in found.items()]
    return "\n".join(["| passkeys beside passwords, 16 clients | |", "|---|---|", *lines]) if lines else ""


def sizes(results: Measured) -> str:
    compared = [name for name in ("authsvc", "original") if "rate at 1000" in results.get(name, {})]
    if not compared:
        return ""
    lines = ["| requests a second at 16 connections | " + " | ".join(f"{size:,} users" for size in SIZES) + " |"]
    lines += ["|---|" + "---|" * len(SIZES)]
    for name in compared:
        rates = " | ".join(f"{results[name][f'rate at {size}']:,.0f}" for size in SIZES)
        lines.append(f"| {name} | {rates} |")
    return "\n".join(lines)


def must_hold(results: Measured) -> str:
    lines = ["| must hold | measured | bar | aim |", "|---|---|---|---|"]
    for bar, figure in bars(results).items():
        missed = "" if holds(bar, figure) else " **missed**"
        aim = "" if bar.aim is None else bar.aim
        lines.append(f"| {bar.what} | {figure:.3g}{missed} | {bar.sign} {bar.bar} | {aim} |")
    return "\n".join(lines)


def holds(bar: Bar, figure: float) -> bool:
    return figure >= bar.bar if bar.sign == ">=" else figure <= bar.bar


def machine() -> str:
    model = re.search("model name\t: (.*)", Path("/proc/cpuinfo").read_text())
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores, {model[1] if model else platform.machine()}, Linux {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def write(when: str, text: str, results: Measured, samples: Samples) -> None:
    readme = HERE / "README.md"
    before, mark, rest = readme.read_text().partition("<!-- results -->\n")
    after = rest.partition("<!-- end -->")[2]
    readme.write_text(f"{before}{mark}{when}\n\n{text}\n<!-- end -->{after}")
    found = {"when": when, "results": results, "samples": samples}
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "results.svg").write_text(picture(results))
