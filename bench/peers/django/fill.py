"""Make bench.db in the current folder, with so many users: ``fill.py USERS``."""

import sqlite3
import sys
from contextlib import closing

import app  # noqa: F401  (importing it configures Django)
from django.contrib.auth.hashers import make_password
from django.core.management import call_command
from django.utils.timezone import now

PASSWORD = "correct horse battery staple"
INSERT = (
    "INSERT INTO auth_user"
    " (username, email, password, date_joined, is_active, is_staff, is_superuser, first_name, last_name)"
    " VALUES (?, ?, ?, ?, 1, 0, 0, '', '')"
)

call_command("migrate", verbosity=0)
hashed = make_password(PASSWORD)
joined = str(now().replace(tzinfo=None))  # as Django writes it in SQLite
emails = (f"user{number}@example.com" for number in range(int(sys.argv[1])))
with closing(sqlite3.connect("bench.db")) as connection, connection:
    connection.executemany(INSERT, ((email, email, hashed, joined) for email in emails))
