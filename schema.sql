-- The ledger. Times are unix seconds. Nothing here logs anybody in: secrets are held as their SHA-256, but for the
-- seeds of one-time codes, which are of no use without the password.

CREATE TABLE users (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: a deleted user's number is nobody's
    email            TEXT NOT NULL,                      -- as it was registered
    email_key        TEXT NOT NULL UNIQUE,               -- email.casefold(): one account in any letter case, É and é too
    hashed_password  ANY NOT NULL                        -- $2b$… or $bcrypt-sha256$…, text or bytes as it was given
                     CHECK (typeof(hashed_password) IN ('text', 'blob')),  -- '!': none yet, matches nothing
    session_id       TEXT,                               -- SHA-256 hex of the newest live session's id
    reset_token      TEXT,                               -- SHA-256 hex
    reset_expires_at INTEGER,                            -- live while now < reset_expires_at
    reset_created_at INTEGER,
    created_at       INTEGER,                            -- NULL: before this was recorded
    disabled_at      INTEGER,                            -- since when the operator lets nobody in; else NULL
    totp_secret      TEXT,                               -- base32, in plain: see SECURITY.md
    totp_since       INTEGER,                            -- when a code confirmed it; NULL: not in force yet
    totp_step        INTEGER NOT NULL DEFAULT 0          -- of the last code used: none works twice
) STRICT;

CREATE INDEX users_session_id ON users (session_id) WHERE session_id IS NOT NULL;
CREATE INDEX users_reset_token ON users (reset_token) WHERE reset_token IS NOT NULL;

CREATE TABLE sessions (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,  -- in the order of the logins
    session_hash TEXT NOT NULL UNIQUE,               -- SHA-256 hex of what the client holds
    user_id      INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at   INTEGER NOT NULL,
    last_seen_at INTEGER NOT NULL,                   -- at most a minute behind
    expires_at   INTEGER NOT NULL,                   -- live while now < expires_at
    address      TEXT NOT NULL,                      -- the client's, at login
    user_agent   TEXT NOT NULL                       -- the client's, at login, 200 characters at most
) STRICT;

CREATE INDEX sessions_user_id ON sessions (user_id);
CREATE INDEX sessions_expires_at ON sessions (expires_at);

CREATE TABLE recovery_codes (                        -- in place of a one-time code, each once
    user_id   INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    code_hash TEXT NOT NULL,                         -- SHA-256 hex
    PRIMARY KEY (user_id, code_hash)
) STRICT, WITHOUT ROWID;

CREATE TABLE known_addresses (  -- where a user has logged in from: the owner gets in while strangers are throttled
    user_id      INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    address_hash TEXT NOT NULL,                      -- keyed, of account and address
    seen_at      INTEGER NOT NULL,                   -- of the last login; known for 90 days
    PRIMARY KEY (user_id, address_hash)
) STRICT, WITHOUT ROWID;

CREATE INDEX known_addresses_address_hash ON known_addresses (address_hash);
CREATE INDEX known_addresses_seen_at ON known_addresses (seen_at);

CREATE TABLE throttle (
    key     TEXT PRIMARY KEY,                        -- keyed hash of what is counted: no address, no email
    full_at INTEGER NOT NULL                         -- when the bucket will have refilled; then the row is of no use
) STRICT, WITHOUT ROWID;

CREATE INDEX throttle_full_at ON throttle (full_at);

CREATE TABLE throttle_secret (                       -- one row: what the hashes above are keyed with
    id     INTEGER PRIMARY KEY CHECK (id = 1),
    secret BLOB NOT NULL                             -- 32 random bytes
) STRICT;
