"""The schema of both engines: tables, schema files, migrations.

Migrations only add, so that a running copy of the last release goes on working on a schema that is one step newer.
"""

import re
from pathlib import Path

SQLITE_SCHEMA = Path(__file__).parent.with_name("schema.sql")
POSTGRES_SCHEMA = Path(__file__).with_name("schema_postgres.sql")


def _steps(file: str) -> tuple[str, ...]:
    text = Path(__file__).with_name(file).read_text(encoding="utf-8")
    return tuple(re.split("^-- to version .*\n", text, flags=re.MULTILINE)[1:])


# All tables, each after those that its rows refer to, with their columns. The first two columns tell the rows of a
# table apart, and order them in the same way on both engines.
_DEFINITIONS = re.findall(r"^CREATE TABLE (\w+) (.*?)^\)", SQLITE_SCHEMA.read_text(encoding="utf-8"), re.M | re.S)
TABLES = {table: tuple(re.findall("^    ([a-z_]+) ", columns, re.MULTILINE)) for table, columns in _DEFINITIONS}
# The ids of these are generated and never reused.
NUMBERED_TABLES = "users", "sessions", "registrations", "access_tokens", "passkeys"

# MIGRATIONS[n - 1] brings a database from version n to n + 1. The schema files always make the newest version.
SQLITE_MIGRATIONS, POSTGRES_MIGRATIONS = _steps("migrations_sqlite.sql"), _steps("migrations_postgres.sql")
SQLITE_VERSION, POSTGRES_VERSION = len(SQLITE_MIGRATIONS) + 1, len(POSTGRES_MIGRATIONS) + 1

# Locks, for Engine.transaction(). Two transactions about one user would otherwise overlap on PostgreSQL, where
# each statement sees what was committed when it began (READ COMMITTED): a login that compared with the old password
# would start a session that the change of the password does not see, and so does not end. A statement of its own locks
# the row of the user; the next one sees what the other transaction did. Rows are locked in the order of their ids, so
# that no two transactions wait for each other.
LOCK_USER = """
    SELECT id FROM users
     WHERE id = :user_id OR id = (SELECT user_id FROM sessions WHERE session_hash = :session_hash)
     ORDER BY id FOR NO KEY UPDATE"""
# A change of email locks the user who has the new one as well: two users who swap theirs would wait for each other.
LOCK_HOLDERS = "SELECT id FROM users WHERE id = :user_id OR email_key = :email_key ORDER BY id FOR NO KEY UPDATE"
LOCK_ALL_USERS = "LOCK TABLE users IN EXCLUSIVE MODE"  # other transactions can still read

# How many sessions are stored, expired ones included, and the size of the database in bytes. Counting the rows of a
# large table takes PostgreSQL seconds, so there its own estimate is asked.
FIGURES = {
    "SQLite": "SELECT (SELECT count(*) FROM sessions), page_count * page_size FROM pragma_page_count, pragma_page_size",
    "PostgreSQL": """
        SELECT n_live_tup, pg_database_size(current_database()) FROM pg_stat_user_tables
         WHERE relid = to_regclass('sessions')""",
}
