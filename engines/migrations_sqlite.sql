-- Each step brings a SQLite database to the next version of its schema. schema.sql always makes the newest version.

-- to version 2
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

-- to version 3
ALTER TABLE users ADD COLUMN device_key TEXT;
ALTER TABLE users ADD COLUMN last_login_at INTEGER;
DELETE FROM known_addresses;

-- to version 4
ALTER TABLE users ADD COLUMN cut_salt TEXT;

-- to version 5
ALTER TABLE users ADD COLUMN untold_logins INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN remember INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN factor_at INTEGER;
CREATE INDEX users_untold_logins ON users (untold_logins) WHERE untold_logins > 0;

-- to version 6
-- IF NOT EXISTS: an unreleased service made these tables in the step before.
CREATE TABLE IF NOT EXISTS email_changes (
    session_id INTEGER PRIMARY KEY REFERENCES sessions (id) ON DELETE CASCADE,
    email      TEXT NOT NULL,
    email_key  TEXT NOT NULL,
    token_hash TEXT NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS email_changes_expires_at ON email_changes (expires_at);
CREATE TABLE IF NOT EXISTS registrations (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    email      TEXT NOT NULL,
    email_key  TEXT NOT NULL,
    token_hash TEXT NOT NULL UNIQUE,
    expires_at INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS registrations_email_key ON registrations (email_key);
CREATE INDEX IF NOT EXISTS registrations_expires_at ON registrations (expires_at);
CREATE TABLE IF NOT EXISTS former_emails (
    email_key   TEXT PRIMARY KEY,
    user_id     INTEGER NOT NULL,
    released_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS former_emails_released_at ON former_emails (released_at);

-- to version 7
ALTER TABLE users ADD COLUMN groups TEXT NOT NULL DEFAULT '';

-- to version 8
CREATE TABLE access_tokens (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id      INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    token_hash   TEXT NOT NULL UNIQUE,
    name         TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    last_used_at INTEGER,
    expires_at   INTEGER
) STRICT;
CREATE INDEX access_tokens_user_id ON access_tokens (user_id);

-- to version 9
ALTER TABLE users ADD COLUMN passkey_handle TEXT;
CREATE TABLE passkeys (
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id       INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name          TEXT NOT NULL,
    created_at    INTEGER NOT NULL,
    last_used_at  INTEGER,
    synced        INTEGER NOT NULL,
    credential_id TEXT NOT NULL UNIQUE,
    public_key    TEXT NOT NULL,
    sign_count    INTEGER NOT NULL
) STRICT;
CREATE INDEX passkeys_user_id ON passkeys (user_id);
CREATE TABLE spent_challenges (
    digest     TEXT PRIMARY KEY,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX spent_challenges_expires_at ON spent_challenges (expires_at);
