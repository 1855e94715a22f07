"""Make bench.db in the current folder, with so many users: ``fill.py USERS``.

The one who is asked for stands in the middle, as the average user does: without an index the rows before are all read.
"""

import sqlite3
import sys
from contextlib import closing

import app  # importing it makes the table

PASSWORD = "correct horse battery staple"

hashed = app._hash_password(PASSWORD)
count = int(sys.argv[1])
order = (*range(1, count // 2), 0, *range(count // 2, count))
users = ((f"user{number}@example.com", hashed) for number in order)
with closing(sqlite3.connect("bench.db")) as connection, connection:
    connection.executemany("INSERT INTO users (email, hashed_password) VALUES (?, ?)", users)
