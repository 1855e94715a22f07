"""The fenced blocks of the documents, for the tests that type the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FOLDERS = ".", "docs", "docs/security", "deploy", "examples", "bench", ".github", ".github/ISSUE_TEMPLATE"
PAGES = {str(path.relative_to(HERE)): path for folder in FOLDERS for path in sorted((HERE / folder).glob("*.md"))}

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^<>]+) -->\n\n?)?^``` *(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, and the reason in the comment that says it is not run."""

    kind: str
    text: str
    reason: str | None

    @property
    def has_commands(self) -> bool:
        return self.kind in ("console", "sh", "bash") or bool(re.search("^[$#] ", self.text, re.MULTILINE))


def blocks(page: str) -> list[Block]:
    """Return all fenced blocks of a page."""
    text = PAGES[page].read_text()
    found = [Block(match["kind"], match["text"], match["reason"]) for match in _BLOCK.finditer(text)]
    assert text.count("```") == 2 * len(found), f"{page} has a block that is not read"
    return found


def commands_in(page: str, start: str) -> str:
    """Return the text of the block with commands that starts so. tests/test_documents.py looks for these calls."""
    [found] = [one.text for one in blocks(page) if one.has_commands and one.text.startswith(start)]
    return found
