"""Moving house: all rows of one database into another that is empty, verified one by one.

Knows no engine, no SQL and no rule of the service: each row arrives as it left, whatever it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import zip_longest

from storage import NUMBERED, TABLES, Row, Rows

Tell = Callable[[str, int], object]  # what is being done, and with how many rows by now


class CopyRefused(Exception):
    """It cannot be copied; the message says which row or table is why. Whoever opened the target must roll back."""


def copy(source: Rows, target: Rows, tell: Tell = lambda _what, _rows: None) -> dict[str, int]:
    """Copy all tables, and return how many rows each has. Neither is ever in memory as a whole.

    Raises:
        CopyRefused: the target is not empty, cannot hold a row, or holds one that is not as it was.
    """
    for table in TABLES:
        with closing(target.each(table)) as rows:
            if next(rows, None):
                raise CopyRefused(f"it is not empty: {table} has rows")
    counts = dict.fromkeys(TABLES, 0)

    def counted(table: str, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            tell(f"copying {table}", counts[table])
            counts[table] += 1
            yield row

    for table in TABLES:
        with closing(source.each(table)) as rows:
            target.add(table, counted(table, rows))
    for table in NUMBERED:
        target.go_on_after(table, source.last_id(table))
    for table in TABLES:
        _verify(table, source, target, tell)
    return counts


def _verify(table: str, source: Rows, target: Rows, tell: Tell) -> None:
    with closing(source.each(table)) as leaving, closing(target.each(table)) as arriving:
        for number, (left, arrived) in enumerate(zip_longest(leaving, arriving)):
            tell(f"verifying {table}", number)
            if left != arrived:
                raise CopyRefused(f"the row {(left or arrived)[0]} of {table} did not arrive as it left")
    if table in NUMBERED and source.last_id(table) != target.last_id(table):
        raise CopyRefused(f"{table} would not go on after the number {source.last_id(table)}")
