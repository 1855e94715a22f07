"""Make bench.db in the current folder, with so many users: ``fill.py USERS``."""

import sqlite3
import sys
from contextlib import closing

import app  # importing it makes the table

PASSWORD = "correct horse battery staple"

hashed = app._hash_password(PASSWORD)
users = ((f"user{number}@example.com", hashed) for number in range(int(sys.argv[1])))
with closing(sqlite3.connect("bench.db")) as connection, connection:
    connection.executemany("INSERT INTO users (email, hashed_password) VALUES (?, ?)", users)
