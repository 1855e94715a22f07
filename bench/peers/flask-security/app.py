"""The quick start of Flask-Security with Flask-SQLAlchemy."""

from pathlib import Path

from flask import Flask
from flask_security import Security, SQLAlchemyUserDatastore, auth_required, current_user
from flask_security.models import fsqla_v3 as fsqla
from flask_sqlalchemy import SQLAlchemy

app = Flask(__name__)
app.config.update(
    SECRET_KEY="the benchmark's, and no secret",
    SECURITY_PASSWORD_SALT="146585145368132386173505678016728509634",
    REMEMBER_COOKIE_SAMESITE="strict",
    SESSION_COOKIE_SAMESITE="strict",
    # A relative path would be one in Flask's instance folder.
    SQLALCHEMY_DATABASE_URI=f"sqlite:///{Path('bench.db').resolve()}",
    SQLALCHEMY_ENGINE_OPTIONS={"pool_pre_ping": True},
    SQLALCHEMY_TRACK_MODIFICATIONS=False,
    # Not in the quick start: what its documentation has for a login by JSON without a token fetched before.
    SECURITY_CSRF_IGNORE_UNAUTH_ENDPOINTS=True,
)

db = SQLAlchemy(app)
fsqla.FsModels.set_db_info(db)


class Role(db.Model, fsqla.FsRoleMixin):
    """A role; nobody has one."""


class User(db.Model, fsqla.FsUserMixin):
    """A user."""


security = Security(app, SQLAlchemyUserDatastore(db, User, Role))


@app.route("/")
@auth_required()
def home():
    """Say who is signed in; without a session it answers 302, to the login."""
    return {"email": current_user.email}


@app.route("/whoami")
@auth_required()
def whoami():
    """Tell a proxy who is signed in."""
    return "", 204, {"Remote-User": current_user.email}
