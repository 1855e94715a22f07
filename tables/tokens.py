"""Access tokens, with which programs pass ``/verify`` (``access_tokens``). Times are unix seconds."""

from typing import NamedTuple

from engines import Engine
from engines.schema import LOCK_USER

MAX_TOKENS = 32  # of one user

DELETE_TOKENS = "DELETE FROM access_tokens WHERE user_id = :user_id"


class Token(NamedTuple):
    """A snapshot of one row of ``access_tokens``, without the hash."""

    id: int
    name: str
    created_at: int
    last_used_at: int | None = None
    expires_at: int | None = None  # None: it never expires


class Tokens:
    """The access tokens of all users."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def add(self, user_id: int, verified: str | bytes, session_hash: str, token_hash: str, token: Token) -> int | None:
        """Add a token, whose id is ignored, and return its id.

        Return None and add nothing if the user has MAX_TOKENS, the password hash is no longer ``verified``, or the
        session has ended.
        """
        values = {"user_id": user_id, "verified": verified, "session_hash": session_hash, "token_hash": token_hash}
        values |= token._asdict() | {"limit": MAX_TOKENS}
        with self._engine.transaction(lock=LOCK_USER, values=values) as db:
            statement = """
                INSERT INTO access_tokens (user_id, token_hash, name, created_at, expires_at)
                SELECT users.id, :token_hash, :name, :created_at, :expires_at
                  FROM users JOIN sessions ON sessions.user_id = users.id
                 WHERE users.id = :user_id AND session_hash = :session_hash AND hashed_password = :verified
                   AND (SELECT count(*) FROM access_tokens WHERE user_id = :user_id) < :limit
                RETURNING id"""
            row = db.execute(statement, values).fetchone()
            return row and int(row[0])

    def of_user(self, user_id: int) -> list[Token]:
        """Return the tokens of a user, oldest first; also those that have expired."""
        statement = f"SELECT {', '.join(Token._fields)} FROM access_tokens WHERE user_id = :id ORDER BY id"
        return [Token(*row) for row in self._engine.read_all(statement, {"id": user_id})]

    def delete(self, user_id: int, token_id: int) -> bool:
        """Delete a token of a user; return whether there was one."""
        return self._engine.write(f"{DELETE_TOKENS} AND id = :id", {"user_id": user_id, "id": token_id}) == 1

    def touch(self, token_id: int, now: int) -> None:
        """Record the use of a token."""
        self._engine.write("UPDATE access_tokens SET last_used_at = :now WHERE id = :id", {"id": token_id, "now": now})
