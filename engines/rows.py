"""All rows of a database, to copy them from one engine to another."""

import re
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING, Any

from engines.schema import TABLES

if TYPE_CHECKING:
    from engines import Transaction

Row = tuple[Any, ...]  # the columns of TABLES

# PostgreSQL's sequence does not count rows that were inserted with their ids, so the highest id counts too.
LAST_ID = {
    "SQLite": "SELECT max(seq) FROM sqlite_sequence WHERE name = :table",
    "PostgreSQL": "SELECT pg_sequence_last_value(pg_get_serial_sequence(:table, 'id')::regclass)",
}
SET_LAST_ID = {
    "SQLite": (
        "DELETE FROM sqlite_sequence WHERE name = :table",
        "INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last_id)",
    ),
    "PostgreSQL": ("SELECT setval(pg_get_serial_sequence(:table, 'id')::regclass, :last_id)",),
}


class Rows:
    """The rows of one database, through one connection, while nobody else changes them.

    ``engine`` is the engine's name; ``stream`` runs a statement and yields its rows one by one.
    """

    def __init__(self, engine: str, transaction: "Transaction", stream: Callable[[str], Iterable[Row]]) -> None:
        self._engine, self._transaction, self._stream = engine, transaction, stream

    def read(self, table: str) -> Generator[Row, None, None]:
        """Yield the rows of a table, ordered by their first two columns."""
        for row in self._stream(f"SELECT {', '.join(TABLES[table])} FROM {table} ORDER BY 1, 2"):
            yield _with_hash_as_given(row) if table == "users" and self._engine == "PostgreSQL" else row

    def insert(self, table: str, rows: Iterable[Row]) -> None:
        """Insert rows with the ids that they have.

        Raises:
            ValueError: a row cannot be stored. The message names row and column, and quotes no value.
            AlreadyExists: two rows have the same email or the same secret.
        """
        columns = TABLES[table]
        parameters = ", ".join(f":{column}" for column in columns)
        checked = (self._checked(table, dict(zip(columns, row, strict=True))) for row in rows)
        self._transaction.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({parameters})", checked)

    def last_id(self, table: str) -> int:
        """Return the highest id that a row of the table ever had; 0 where there was none."""
        (highest,) = self._transaction.execute(f"SELECT max(id) FROM {table}", {}).fetchone()
        (generated,) = self._transaction.execute(LAST_ID[self._engine], {"table": table}).fetchone()
        return max(highest or 0, generated or 0)

    def set_last_id(self, table: str, last_id: int) -> None:
        """Number the next row of the table after this id."""
        if last_id:
            for statement in SET_LAST_ID[self._engine]:
                self._transaction.execute(statement, {"table": table, "last_id": last_id})

    def _checked(self, table: str, row: dict[str, Any]) -> dict[str, Any]:
        for column, value in row.items():
            if self._engine == "PostgreSQL" and isinstance(value, str) and not is_storable(column, value):
                raise ValueError(f"PostgreSQL cannot store the {column} in row {next(iter(row.values()))} of {table}")
        return row


def is_storable(column: str, text: str) -> bool:
    """Return whether both engines can store this text: no NUL, no lone surrogate, and no hash that looks like bytes."""
    like_bytes = column == "hashed_password" and text.startswith("\\x")
    return not like_bytes and not re.search(r"[\0\ud800-\udfff]", text)


def hash_as_given(stored: str | bytes) -> str | bytes:
    """Return a password hash as it was given. PostgreSQL stores bytes as ``\\x`` and hexadecimal digits."""
    return bytes.fromhex(stored[2:]) if isinstance(stored, str) and stored.startswith("\\x") else stored


def _with_hash_as_given(row: Row) -> Row:
    position = TABLES["users"].index("hashed_password")
    return (*row[:position], hash_as_given(row[position]), *row[position + 1 :])
