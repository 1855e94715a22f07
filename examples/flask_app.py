"""A Flask application behind authsvc and nginx, which lets nobody through who is not signed in, and says who it is.

pip install flask && python flask_app.py        # on http://127.0.0.1:8000, where deploy/nginx.conf looks for it
"""

import os

from flask import Flask, abort, g, request
from markupsafe import escape

app = Flask(__name__)


@app.before_request
def identify() -> None:
    # nginx replaces what a client sends under this name; without it, the request did not come through nginx.
    g.user = request.headers.get("Remote-User") or abort(403)


@app.get("/")
def home() -> str:
    return f'<p>Hello {escape(g.user)}.</p> <p><a href="https://auth.example.com/account">Account and sign-out</a></p>'


if __name__ == "__main__":
    # This machine only: who reaches the application past nginx can claim to be anybody.
    app.run("127.0.0.1", int(os.environ.get("PORT", "8000")))
