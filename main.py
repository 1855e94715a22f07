"""Call the main routes of a running service and assert each response. Prints nothing if all of them are right.

``AUTHSVC_URL`` is the address of the service, by default http://127.0.0.1:5000. The script creates an account, so a
second run needs a fresh database. Importing this module sends nothing.
"""

from __future__ import annotations

import os
import sys

import requests

URL = os.environ.get("AUTHSVC_URL", "http://127.0.0.1:5000").rstrip("/")
TIMEOUT = 30  # seconds; a request may wait for other passwords to be hashed

EMAIL = "guillaume@holberton.io"
PASSWD = "b4l0u"
NEW_PASSWD = "t4rt1fl3tt3"


def register_user(email: str, password: str) -> None:
    """Create an account, and check that the email cannot be registered twice."""
    form = {"email": email, "password": password}
    answer = requests.post(f"{URL}/users", data=form, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()) == (200, {"email": email, "message": "user created"}), answer.text
    answer = requests.post(f"{URL}/users", data=form, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()) == (400, {"message": "email already registered"}), answer.text


def log_in_wrong_password(email: str, password: str) -> None:
    """Check that a wrong password is refused."""
    answer = requests.post(f"{URL}/sessions", data={"email": email, "password": password}, timeout=TIMEOUT)
    assert (answer.status_code, list(answer.json())) == (401, ["message"]), answer.text
    assert "session_id" not in answer.cookies


def log_in(email: str, password: str) -> str:
    """Sign in and return the session id."""
    answer = requests.post(f"{URL}/sessions", data={"email": email, "password": password}, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()) == (200, {"email": email, "message": "logged in"}), answer.text
    return answer.cookies["session_id"]


def profile_unlogged() -> None:
    """Check that the profile is refused without a session."""
    answer = requests.get(f"{URL}/profile", timeout=TIMEOUT)
    assert (answer.status_code, list(answer.json())) == (403, ["message"]), answer.text


def profile_logged(session_id: str) -> None:
    """Check that the profile returns the email of the session's user."""
    answer = requests.get(f"{URL}/profile", cookies={"session_id": session_id}, timeout=TIMEOUT)
    assert (answer.status_code, list(answer.json())) == (200, ["email"]), answer.text


def log_out(session_id: str) -> None:
    """Sign out, follow the redirect to the welcome message, and check that the session has ended."""
    cookies = {"session_id": session_id}
    answer = requests.delete(f"{URL}/sessions", cookies=cookies, timeout=TIMEOUT)
    assert [step.status_code for step in answer.history] == [302], answer.text
    assert (answer.status_code, answer.json()) == (200, {"message": "Bienvenue"}), answer.text
    answer = requests.get(f"{URL}/profile", cookies=cookies, timeout=TIMEOUT)
    assert answer.status_code == 403, answer.text


def reset_password_token(email: str) -> str:
    """Request a reset token and return it."""
    answer = requests.post(f"{URL}/reset_password", data={"email": email}, timeout=TIMEOUT)
    token = answer.json().get("reset_token")
    assert (answer.status_code, answer.json()) == (200, {"email": email, "reset_token": token}), answer.text
    assert token, answer.text
    return str(token)


def update_password(email: str, reset_token: str, new_password: str) -> None:
    """Set a new password, and check that the token does not work again."""
    form = {"email": email, "reset_token": reset_token, "new_password": new_password}
    answer = requests.put(f"{URL}/reset_password", data=form, timeout=TIMEOUT)
    assert (answer.status_code, answer.json()) == (200, {"email": email, "message": "Password updated"}), answer.text
    answer = requests.put(f"{URL}/reset_password", data=form, timeout=TIMEOUT)
    assert answer.status_code == 403, answer.text


if __name__ == "__main__":
    try:
        register_user(EMAIL, PASSWD)
        log_in_wrong_password(EMAIL, NEW_PASSWD)
        profile_unlogged()
        session_id = log_in(EMAIL, PASSWD)
        profile_logged(session_id)
        log_out(session_id)
        reset_token = reset_password_token(EMAIL)
        update_password(EMAIL, reset_token, NEW_PASSWD)
        log_in(EMAIL, NEW_PASSWD)
    except requests.ConnectionError:
        sys.exit(f"main.py: no service answers at {URL}: start one, or set AUTHSVC_URL")
