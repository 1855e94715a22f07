"""Copying a database: all rows into an empty database, which may use another engine, verified row by row.

It uses no SQL and no rule of the service. Each row is copied as it is, expired or not.
"""

from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import zip_longest
from typing import Any

from engines.rows import Rows
from engines.schema import NUMBERED_TABLES, TABLES

Progress = Callable[[str, Iterable[Any]], Iterable[Any]]  # takes the name of a step and its rows, and yields the rows


class CopyRefused(Exception):
    """The copy failed; the message names the table or row. The caller must roll back the target."""


def copy(source: Rows, target: Rows, progress: Progress = lambda _step, rows: rows) -> dict[str, int]:
    """Copy all tables and return the number of rows of each. Rows are streamed: memory use does not grow.

    Raises:
        CopyRefused: the target is not empty, or a row or the last id of a table differs after the copy.
        ValueError, AlreadyExists: the target cannot hold a row.
    """
    for table in TABLES:
        with closing(target.read(table)) as rows:
            if next(rows, None):
                raise CopyRefused(f"the target is not empty: table {table} has rows")
    for table in TABLES:
        with closing(source.read(table)) as rows:
            target.insert(table, progress(f"copying {table}", rows))
    for table in NUMBERED_TABLES:
        target.set_last_id(table, source.last_id(table))
    return {table: _verify_table(table, source, target, progress) for table in TABLES}


def _verify_table(table: str, source: Rows, target: Rows, progress: Progress) -> int:
    """Compare the rows of a table with their copies; return how many there are."""
    count = 0
    with closing(source.read(table)) as originals, closing(target.read(table)) as copies:
        for original, copied in progress(f"verifying {table}", zip_longest(originals, copies)):
            if original != copied:
                raise CopyRefused(f"row {(original or copied)[0]} of {table} differs after the copy")
            count += 1
    if table in NUMBERED_TABLES and source.last_id(table) != target.last_id(table):
        raise CopyRefused(f"the last id of {table} is not {source.last_id(table)} after the copy")
    return count
