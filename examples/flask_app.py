"""A Flask application behind authsvc and nginx. It serves only users who are signed in, and greets them by email.

pip install flask && python flask_app.py        # on http://127.0.0.1:8000, the address in deploy/nginx.conf
"""

import os

from flask import Flask, abort, g, request
from markupsafe import escape

app = Flask(__name__)


@app.before_request
def identify() -> None:
    # nginx always replaces this header. A request without it did not come through nginx.
    g.user = request.headers.get("Remote-User") or abort(403)


@app.get("/")
def home() -> str:
    return f'<p>Hello {escape(g.user)}.</p> <p><a href="https://auth.example.com/account">Account and sign-out</a></p>'


if __name__ == "__main__":
    # Listen on this machine only: a client that bypasses nginx could send any user's name.
    app.run("127.0.0.1", int(os.environ.get("PORT", "8000")))
