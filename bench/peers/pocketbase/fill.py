"""Make pb_data in the current folder, with so many users: ``fill.py POCKETBASE USERS``.

PocketBase makes the database and hashes the password once, as that of its administrator. The rows of the users then
go into its own table, which takes a second instead of hours.
"""

import secrets
import sqlite3
import subprocess
import sys
from contextlib import closing

PASSWORD = "correct horse battery staple"
INSERT = "INSERT INTO users (email, password, tokenKey, verified, created, updated) VALUES (?, ?, ?, 1, ?, ?)"

administrator = [sys.argv[1], "superuser", "create", "admin@example.com", PASSWORD, "--dir", "pb_data"]
subprocess.run(administrator, check=True, capture_output=True)
with closing(sqlite3.connect("pb_data/data.db")) as connection, connection:
    hashed, created = connection.execute("SELECT password, created FROM _superusers").fetchone()
    emails = (f"user{number}@example.com" for number in range(int(sys.argv[2])))
    users = ((email, hashed, secrets.token_hex(25), created, created) for email in emails)  # a key of 50 characters
    connection.executemany(INSERT, users)
