"""Make bench.db in the current folder, with so many users: ``fill.py USERS``."""

import sqlite3
import sys
from contextlib import closing
from uuid import uuid4

from app import app, db
from flask_security import hash_password

PASSWORD = "correct horse battery staple"

with app.app_context():
    db.create_all()
    hashed = hash_password(PASSWORD)
users = ((f"user{number}@example.com", hashed, uuid4().hex) for number in range(int(sys.argv[1])))
with closing(sqlite3.connect("bench.db")) as connection, connection:
    connection.executemany("INSERT INTO user (email, password, active, fs_uniquifier) VALUES (?, ?, 1, ?)", users)
