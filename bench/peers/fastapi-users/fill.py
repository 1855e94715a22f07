"""Make bench.db in the current folder, with so many users: ``fill.py USERS``."""

import asyncio
import sqlite3
import sys
from contextlib import closing
from uuid import uuid4

from app import create_db_and_tables
from fastapi_users.password import PasswordHelper

PASSWORD = "correct horse battery staple"
INSERT = "INSERT INTO user (id, email, hashed_password, is_active, is_superuser, is_verified) VALUES (?, ?, ?, 1, 0, 0)"

asyncio.run(create_db_and_tables())
hashed = PasswordHelper().hash(PASSWORD)
users = ((str(uuid4()), f"user{number}@example.com", hashed) for number in range(int(sys.argv[1])))
with closing(sqlite3.connect("bench.db")) as connection, connection:
    connection.executemany(INSERT, users)
