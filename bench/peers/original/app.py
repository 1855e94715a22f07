"""The service as its first authors wrote it, less the routes that the benchmark does not call.

Its faults are kept, for they are what is measured: no index on the columns that it looks users up by, and one
SQLAlchemy session that all threads share.
"""

import sys
from uuid import uuid4

import bcrypt
import waitress
from flask import Flask, abort, jsonify, request
from sqlalchemy import Column, Integer, String, create_engine
from sqlalchemy.orm import declarative_base, sessionmaker
from sqlalchemy.orm.exc import NoResultFound

Base = declarative_base()


class User(Base):
    """A row of the one table."""

    __tablename__ = "users"

    id = Column(Integer, primary_key=True)
    email = Column(String(250), nullable=False)
    hashed_password = Column(String(250), nullable=False)
    session_id = Column(String(250), nullable=True)
    reset_token = Column(String(250), nullable=True)


class DB:
    """The database, through one session."""

    def __init__(self):
        # Theirs dropped all tables here, at each start: left out, for the benchmark fills them before.
        self._engine = create_engine("sqlite:///bench.db", echo=False, connect_args={"check_same_thread": False})
        Base.metadata.create_all(self._engine)
        self.__session = None

    @property
    def _session(self):
        if self.__session is None:
            self.__session = sessionmaker(bind=self._engine)()
        return self.__session

    def find_user_by(self, **kwargs):
        """Return the first user with these values."""
        user = self._session.query(User).filter_by(**kwargs).first()
        if user is None:
            raise NoResultFound
        return user

    def update_user(self, user_id, **kwargs):
        """Set these values of a user."""
        user = self.find_user_by(id=user_id)
        for key, value in kwargs.items():
            if not hasattr(user, key):
                raise ValueError
            setattr(user, key, value)
        self._session.commit()


def _hash_password(password):
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt())


class Auth:
    """The rules."""

    def __init__(self):
        self._db = DB()

    def valid_login(self, email, password):
        """Whether the password is that user's."""
        try:
            user = self._db.find_user_by(email=email)
        except NoResultFound:
            return False
        return bcrypt.checkpw(password.encode(), user.hashed_password)

    def create_session(self, email):
        """Return a new session id, in place of the one before."""
        try:
            user = self._db.find_user_by(email=email)
        except NoResultFound:
            return None
        session_id = str(uuid4())
        self._db.update_user(user.id, session_id=session_id)
        return session_id

    def get_user_from_session_id(self, session_id):
        """Return the session's user, or None."""
        if session_id is None:
            return None
        try:
            return self._db.find_user_by(session_id=session_id)
        except NoResultFound:
            return None


app = Flask(__name__)
AUTH = Auth()


@app.route("/sessions", methods=["POST"], strict_slashes=False)
def login():
    """Log in."""
    email = request.form.get("email")
    password = request.form.get("password")
    if not email or not password or not AUTH.valid_login(email, password):
        abort(401)
    response = jsonify({"email": email, "message": "logged in"})
    response.set_cookie("session_id", AUTH.create_session(email))
    return response


@app.route("/profile", methods=["GET"], strict_slashes=False)
def profile():
    """Say who is signed in."""
    user = AUTH.get_user_from_session_id(request.cookies.get("session_id"))
    if user is None:
        abort(403)
    return jsonify({"email": user.email}), 200


if __name__ == "__main__":
    waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]))  # its default: 4 threads
