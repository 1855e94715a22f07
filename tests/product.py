"""The source files of the product, for the tests that read them; ``python -m tests.product`` counts their lines."""

from __future__ import annotations

import ast
import functools
import io
import tokenize
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


@functools.cache
def nodes_of(tree: ast.AST) -> list[ast.AST]:
    """Return all nodes of a tree: many tests look at them."""
    return list(ast.walk(tree))


DECIDING = "auth", "rate_limit", "storage", "tables", "credentials"  # the modules that decide who gets in
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(path: Path) -> int:
    """Return the number of lines without blank lines, comments and docstrings."""
    text = path.read_text()
    docstrings = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False)
        for number in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines = text.splitlines()
    numbers = {
        number
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in NO_CODE
        for number in range(token.start[0], token.end[0] + 1)
    }
    return sum(bool(lines[number - 1].strip()) for number in numbers - docstrings)


def counts() -> dict[str, int]:
    """Return the lines of code of each file, of those that decide who gets in, and of the whole product."""
    each = {str(path.relative_to(HERE)): lines_of_code(path) for path in [*MODULES.values(), HERE / "main.py"]}
    deciding = sum(lines for name, lines in each.items() if name.partition("/")[0].removesuffix(".py") in DECIDING)
    return each | {"deciding who gets in": deciding, "all": sum(each.values())}


if __name__ == "__main__":
    for name, lines in sorted(counts().items(), key=lambda count: count[1]):
        print(f"{lines:>5} {name}")
