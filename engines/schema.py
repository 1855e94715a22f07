"""The schema of both engines: tables, schema files, migrations.

Migrations only add, so that a running copy of the last release goes on working on a schema that is one step newer.
"""

from __future__ import annotations

from pathlib import Path

SQLITE_SCHEMA = Path(__file__).parent.with_name("schema.sql")
POSTGRES_SCHEMA = Path(__file__).with_name("schema_postgres.sql")

# All tables, each after those that its rows refer to, with their columns. The first two columns tell the rows of a
# table apart, and order them in the same way on both engines.
TABLES = {
    "users": (
        *("id", "email", "email_key", "hashed_password", "session_id", "reset_token", "reset_expires_at"),
        *("reset_created_at", "created_at", "disabled_at", "totp_secret", "totp_since", "totp_step"),
        *("device_key", "last_login_at", "cut_salt", "untold_logins"),
    ),
    "sessions": (
        *("id", "session_hash", "user_id", "created_at", "last_seen_at", "expires_at", "address", "user_agent"),
        *("remember", "factor_at"),
    ),
    "recovery_codes": ("user_id", "code_hash"),
    "known_addresses": ("user_id", "address_hash", "seen_at"),
    "throttle": ("key", "full_at"),
    "throttle_secret": ("id", "secret"),
}
NUMBERED_TABLES = "users", "sessions"  # their ids are generated and never reused

# MIGRATIONS[n - 1] brings a database from version n to n + 1. The schema files always make the newest version.
SQLITE_MIGRATIONS: tuple[str, ...] = (
    """
    ALTER TABLE users ADD COLUMN reset_created_at INTEGER;
    ALTER TABLE users ADD COLUMN created_at INTEGER;
    ALTER TABLE users ADD COLUMN disabled_at INTEGER;
    ALTER TABLE users ADD COLUMN totp_secret TEXT;
    ALTER TABLE users ADD COLUMN totp_since INTEGER;
    ALTER TABLE users ADD COLUMN totp_step INTEGER NOT NULL DEFAULT 0;
    UPDATE users SET reset_created_at = reset_expires_at - 3600 WHERE reset_expires_at IS NOT NULL;
    CREATE TABLE recovery_codes (
        user_id   INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        code_hash TEXT NOT NULL,
        PRIMARY KEY (user_id, code_hash)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX sessions_expires_at ON sessions (expires_at);
    CREATE INDEX known_addresses_seen_at ON known_addresses (seen_at);
    """,
    """
    ALTER TABLE users ADD COLUMN device_key TEXT;
    ALTER TABLE users ADD COLUMN last_login_at INTEGER;
    DELETE FROM known_addresses;
    """,
    "ALTER TABLE users ADD COLUMN cut_salt TEXT;",
    """
    ALTER TABLE users ADD COLUMN untold_logins INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sessions ADD COLUMN remember INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE sessions ADD COLUMN factor_at INTEGER;
    CREATE INDEX users_untold_logins ON users (untold_logins) WHERE untold_logins > 0;
    """,
)
SQLITE_VERSION = len(SQLITE_MIGRATIONS) + 1
POSTGRES_MIGRATIONS: tuple[str, ...] = (
    """
    ALTER TABLE users ADD COLUMN device_key text COLLATE "C";
    ALTER TABLE users ADD COLUMN last_login_at bigint;
    DELETE FROM known_addresses;
    """,
    'ALTER TABLE users ADD COLUMN cut_salt text COLLATE "C";',
    """
    ALTER TABLE users ADD COLUMN untold_logins bigint NOT NULL DEFAULT 0;
    ALTER TABLE sessions ADD COLUMN remember bigint NOT NULL DEFAULT 0;
    ALTER TABLE sessions ADD COLUMN factor_at bigint;
    CREATE INDEX users_untold_logins ON users (untold_logins) WHERE untold_logins > 0;
    """,
)
POSTGRES_VERSION = len(POSTGRES_MIGRATIONS) + 1

# Locks, for Engine.transaction(). Two transactions about one user would otherwise overlap on PostgreSQL, where
# each statement sees what was committed when it began (READ COMMITTED): a login that compared with the old password
# would start a session that the change of the password does not see, and so does not end. A statement of its own locks
# the row of the user; the next one sees what the other transaction did. Rows are locked in the order of their ids, so
# that no two transactions wait for each other.
LOCK_USER = """
    SELECT id FROM users
     WHERE id = :user_id OR id = (SELECT user_id FROM sessions WHERE session_hash = :session_hash)
     ORDER BY id FOR NO KEY UPDATE
"""
LOCK_ALL_USERS = "LOCK TABLE users IN EXCLUSIVE MODE"  # other transactions can still read
