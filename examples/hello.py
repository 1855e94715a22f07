"""An application behind authsvc and a proxy, without any package. It serves only users who are signed in.

python hello.py         # on http://127.0.0.1:8000; deploy/compose.yaml runs it in a container
"""

import os
from collections.abc import Iterator
from html import escape
from wsgiref.simple_server import make_server
from wsgiref.types import StartResponse, WSGIEnvironment

ACCOUNT = os.environ.get("ACCOUNT", "https://auth.example.com/account")


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
    # The proxy always replaces these headers. A request without Remote-User did not come through the proxy.
    user, groups = environ.get("HTTP_REMOTE_USER"), environ.get("HTTP_REMOTE_GROUPS")
    start_response("200 OK" if user else "403 Forbidden", [("Content-Type", "text/html; charset=utf-8")])
    if user:
        yield f"<p>Hello {escape(user)}. Your groups: {escape(groups or 'none')}.</p> ".encode()
        yield f'<p><a href="{escape(ACCOUNT)}">Account and sign-out</a></p>'.encode()


if __name__ == "__main__":
    # Listen on this machine only, or in a container that publishes no port: a client that bypasses the proxy could send
    # any user's name.
    make_server(os.environ.get("HOST", "127.0.0.1"), int(os.environ.get("PORT", "8000")), application).serve_forever()
