"""Renders docs/asvs.toml, the evidence for OWASP ASVS, into docs/security/asvs.md and counts it.

``python -m tests.evidence`` prints the counts, and fails when the page is not up to date. ``--write`` updates the page.
"""

from __future__ import annotations

import sys
import tomllib
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
DATA = HERE / "docs" / "asvs.toml"
PAGE = HERE / "docs" / "security" / "asvs.md"
BEGIN, END = "<!-- evidence: written by python -m tests.evidence --write -->\n", "<!-- evidence ends -->\n"
STATUSES = "met", "operator", "gap", "deviation"

Requirement = dict[str, Any]


def load() -> list[Requirement]:
    """Return the requirements in their order."""
    entries: list[Requirement] = tomllib.loads(DATA.read_text())["requirement"]
    return entries


def tests_of(entry: Requirement) -> list[str]:
    """Return the tests that show a requirement, as pytest names them."""
    named = entry.get("test", [])
    return [named] if isinstance(named, str) else list(named)


def counts(entries: list[Requirement]) -> list[tuple[str, ...]]:
    """Return a table of how many entries have each status: a heading, one line for each level, and the total.

    A requirement that asks for more at a higher level has an entry for each level.
    """
    lines: list[tuple[str, ...]] = [("", *STATUSES, "all")]
    for label, levels in (("level 1", (1,)), ("level 2", (2,)), ("level 3", (3,)), ("all", (1, 2, 3))):
        found = [entry["status"] for entry in entries if entry["level"] in levels]
        lines.append((label, *(str(found.count(status)) for status in STATUSES), str(len(found))))
    return lines


def render(entries: list[Requirement]) -> str:
    """Return the text between the two markers."""
    heading, *lines = counts(entries)
    missing = [entry for entry in entries if entry["status"] in ("gap", "deviation")]
    listed = [
        tuple(str(entry[name]) for name in ("id", "level", "requirement", "status", "reason")) for entry in missing
    ]
    parts = [_table(heading, lines)]
    parts.append("## Not met\n\n" + _table(("id", "level", "requirement", "status", "reason"), listed))
    for chapter, group in groupby(entries, lambda entry: str(entry["id"]).partition(".")[0]):
        rows = [_row(entry) for entry in group]
        parts.append(f"## {chapter}\n\n" + _table(("id", "level", "requirement", "status", "how", "shown by"), rows))
    return "\n" + "\n".join(parts) + "\n"


def rendered(page: str, entries: list[Requirement]) -> str:
    """Return the page with the text between the markers replaced."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + render(entries) + END + rest.partition(END)[2]


def main(arguments: list[str]) -> int:
    """Print the counts; return 1 if the page is not up to date."""
    entries, page = load(), PAGE.read_text()
    for line in counts(entries):
        print("".join(f"{cell:>10}" for cell in line))
    wanted = rendered(page, entries)
    if "--write" in arguments:
        PAGE.write_text(wanted)
    elif page != wanted:
        print(f"{PAGE.name} is not up to date; run: python -m tests.evidence --write", file=sys.stderr)
        return 1
    return 0


def _row(entry: Requirement) -> tuple[str, ...]:
    how = " ".join(part for part in (entry["how"], entry.get("reason", "")) if part)
    shown = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in tests_of(entry))
    return entry["id"], str(entry["level"]), entry["requirement"], entry["status"], how, shown


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
