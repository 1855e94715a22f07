"""The source files of the product, for the tests that read them."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
PACKAGES = "cli", "credentials", "engines", "tables", "web"


def _named(path: Path) -> str:
    return ".".join(path.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__")


# Dotted name of each module: its file. main.py is a client of the service, and no part of it.
MODULES = {
    _named(path): path
    for folder in (".", *PACKAGES)
    for path in sorted((HERE / folder).glob("*.py"))
    if path != HERE / "main.py"
}
TREES = {module: ast.parse(path.read_text(), str(path)) for module, path in MODULES.items()}
