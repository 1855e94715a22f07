"""Access tokens, which programs send in the ``Authorization`` header (RFC 6750, 2.1; RFC 7617)."""

import base64
import secrets

PREFIX = "authsvc_"  # by which proxies and secret scanners find a token


def new_token() -> str:
    """Return a new access token: 51 characters with 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def parse(authorization: str) -> tuple[str, str | None] | None:
    """Return the token in an ``Authorization`` header and the email that Basic names; None if it holds no token."""
    scheme, _, secret = authorization.partition(" ")
    secret, email = secret.strip(" "), None
    if scheme.lower() == "basic":
        try:
            email, _, secret = base64.b64decode(secret, validate=True).decode(errors="replace").partition(":")
        except ValueError:  # no base64, or no ASCII
            return None
    elif scheme.lower() != "bearer":
        return None
    return (secret, email) if secret.startswith(PREFIX) else None
