-- The tables in SQLite. Times are unix seconds.
-- Session ids, tokens and recovery codes are stored as SHA-256 only, so they cannot be used by someone who steals the
-- database. The seeds of one-time codes are stored unencrypted, but they are of no use without the password.

CREATE TABLE users (
    id               INTEGER PRIMARY KEY AUTOINCREMENT,  -- the id of a deleted user is never reused
    email            TEXT NOT NULL,                      -- exactly as it was registered
    email_key        TEXT NOT NULL UNIQUE,               -- email.casefold(): Bob@x.io and bob@x.io are one account
    hashed_password  ANY NOT NULL                        -- $2b$… or $bcrypt-sha256$…, as text or bytes
                     CHECK (typeof(hashed_password) IN ('text', 'blob')),  -- '!' if no password is set
    session_id       TEXT,                               -- SHA-256 in hex of the user's newest session id
    reset_token      TEXT,                               -- SHA-256 in hex
    reset_expires_at INTEGER,                            -- valid while now < reset_expires_at
    reset_created_at INTEGER,
    created_at       INTEGER,                            -- NULL for accounts older than this column
    disabled_at      INTEGER,                            -- when the operator disabled the account, else NULL
    totp_secret      TEXT,                               -- base32, unencrypted: see SECURITY.md
    totp_since       INTEGER,                            -- when a first code confirmed it; NULL: not confirmed yet
    totp_step        INTEGER NOT NULL DEFAULT 0,         -- step of the last code used, so that none is accepted twice
    device_key       TEXT,                               -- random; part of the MAC of the user's device cookies, so that
                                                         -- a new key voids them all; NULL until it is first replaced
    last_login_at    INTEGER,                            -- NULL: never, or before this column
    cut_salt         TEXT,                               -- the salt of an imported hash for which only the first 72
                                                         -- bytes of a password count; void once the hash is another
    untold_logins    INTEGER NOT NULL DEFAULT 0,         -- sign-ins from new browsers that no mail has told of yet
    groups           TEXT NOT NULL DEFAULT '',           -- sorted, with commas between them
    passkey_handle   TEXT                                -- random, by which authenticators know the user; NULL: none yet
) STRICT;

CREATE INDEX users_session_id ON users (session_id) WHERE session_id IS NOT NULL;
CREATE INDEX users_reset_token ON users (reset_token) WHERE reset_token IS NOT NULL;
CREATE INDEX users_untold_logins ON users (untold_logins) WHERE untold_logins > 0;

CREATE TABLE sessions (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,  -- ascending in the order of logins
    session_hash TEXT NOT NULL UNIQUE,               -- SHA-256 in hex of the session id in the cookie
    user_id      INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    created_at   INTEGER NOT NULL,
    last_seen_at INTEGER NOT NULL,                   -- may lag by up to a minute
    expires_at   INTEGER NOT NULL,                   -- valid while now < expires_at
    address      TEXT NOT NULL,                      -- IP address of the client at login
    user_agent   TEXT NOT NULL,                      -- User-Agent of the client at login, at most 200 characters
    remember     INTEGER NOT NULL DEFAULT 0,         -- 1: the browser keeps the cookie when it is closed
    factor_at    INTEGER                             -- when a second factor was last shown in it; NULL: never
) STRICT;

CREATE INDEX sessions_user_id ON sessions (user_id);
CREATE INDEX sessions_expires_at ON sessions (expires_at);  -- no longer used, like the table known_addresses

CREATE TABLE email_changes (                         -- a new email that a session asked for, until a link confirms it
    session_id INTEGER PRIMARY KEY REFERENCES sessions (id) ON DELETE CASCADE,  -- the row: its session_hash may change
    email      TEXT NOT NULL,                        -- exactly as it was asked for
    email_key  TEXT NOT NULL,
    token_hash TEXT NOT NULL,                        -- SHA-256 in hex
    expires_at INTEGER NOT NULL                      -- valid while now < expires_at
) STRICT;

CREATE INDEX email_changes_expires_at ON email_changes (expires_at);

CREATE TABLE registrations (                         -- accounts that were asked for, until a link confirms the email
    id         INTEGER PRIMARY KEY AUTOINCREMENT,    -- ascending: the newest five of an email are valid
    email      TEXT NOT NULL,                        -- exactly as it was sent
    email_key  TEXT NOT NULL,                        -- that of an account has a row as well, whose token nobody gets
    token_hash TEXT NOT NULL UNIQUE,                 -- SHA-256 in hex
    expires_at INTEGER NOT NULL                      -- valid while now < expires_at
) STRICT;

CREATE INDEX registrations_email_key ON registrations (email_key);
CREATE INDEX registrations_expires_at ON registrations (expires_at);

CREATE TABLE former_emails (                         -- given up by a change or a deletion, in production
    email_key   TEXT PRIMARY KEY,
    user_id     INTEGER NOT NULL,                    -- whose it was, perhaps no longer a user; only they may return to it
    released_at INTEGER NOT NULL                     -- reserved for 90 days from then on
) STRICT, WITHOUT ROWID;

CREATE INDEX former_emails_released_at ON former_emails (released_at);

CREATE TABLE access_tokens (                         -- with which programs pass /verify
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id      INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    token_hash   TEXT NOT NULL UNIQUE,               -- SHA-256 in hex
    name         TEXT NOT NULL,                      -- as its user named it
    created_at   INTEGER NOT NULL,
    last_used_at INTEGER,                            -- may lag by up to a minute; NULL: never used
    expires_at   INTEGER                             -- valid while now < expires_at; NULL: never expires
) STRICT;

CREATE INDEX access_tokens_user_id ON access_tokens (user_id);

CREATE TABLE passkeys (                              -- with which users sign in; bytes are in base64url
    id            INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id       INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name          TEXT NOT NULL,                     -- as its user named it
    created_at    INTEGER NOT NULL,
    last_used_at  INTEGER,                           -- NULL: never used
    synced        INTEGER NOT NULL,                  -- 1: its provider keeps a copy, so that other devices have it, too
    credential_id TEXT NOT NULL UNIQUE,
    public_key    TEXT NOT NULL,                     -- a COSE key
    sign_count    INTEGER NOT NULL                   -- of the last use; 0 where the passkey does not count
) STRICT;

CREATE INDEX passkeys_user_id ON passkeys (user_id);

CREATE TABLE spent_challenges (                      -- of passkeys: each is accepted once
    digest     TEXT PRIMARY KEY,                     -- SHA-256 in hex
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX spent_challenges_expires_at ON spent_challenges (expires_at);

CREATE TABLE recovery_codes (                        -- each replaces a one-time code once
    user_id   INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    code_hash TEXT NOT NULL,                         -- SHA-256 in hex
    PRIMARY KEY (user_id, code_hash)
) STRICT, WITHOUT ROWID;

CREATE TABLE known_addresses (                       -- no longer used, and dropped by the next release;
    user_id      INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,  -- copies of the last release still use it
    address_hash TEXT NOT NULL,
    seen_at      INTEGER NOT NULL,
    PRIMARY KEY (user_id, address_hash)
) STRICT, WITHOUT ROWID;

CREATE INDEX known_addresses_address_hash ON known_addresses (address_hash);
CREATE INDEX known_addresses_seen_at ON known_addresses (seen_at);

CREATE TABLE throttle (
    key     TEXT PRIMARY KEY,                        -- keyed hash of what is limited: an address, an account, …
    full_at INTEGER NOT NULL                         -- when the bucket is full again and the row can go
) STRICT, WITHOUT ROWID;

CREATE INDEX throttle_full_at ON throttle (full_at);

CREATE TABLE throttle_secret (                       -- one row: the key of these hashes and of the device cookies
    id     INTEGER PRIMARY KEY CHECK (id = 1),
    secret BLOB NOT NULL                             -- 32 random bytes
) STRICT;
