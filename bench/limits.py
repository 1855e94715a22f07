"""The limits beside the figures: what the parts of a request cost alone."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import bcrypt

from bench.client import PASSWORD
from bench.subjects import COST
from storage import FIND_SESSION
from tests.authenticator import Authenticator, to_text


def rate(call: Callable[[], object], seconds: float) -> float:
    """Return how often a second something can be called on one thread."""
    done, began = 0, time.perf_counter()
    while (took := time.perf_counter() - began) < seconds:
        call()
        done += 1
    return done / took


def hash_for(seconds: float) -> float:
    salt = bcrypt.gensalt(COST)
    return rate(lambda: bcrypt.hashpw(PASSWORD.encode(), salt), seconds)


def raw_bcrypt(seconds: float) -> float:
    """Return hashes per second on all cores, while nothing else runs."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        return sum(pool.map(hash_for, [seconds] * cores, chunksize=1))


def raw_fido2(seconds: float) -> float:
    """Return the signatures of passkeys (ES256) that ``fido2`` verifies in a second, on one thread."""
    from fido2 import cose, server, webauthn

    origin = "https://auth.example.com"
    passkey = Authenticator(origin, "auth.example.com")
    entity = webauthn.PublicKeyCredentialRpEntity(id="auth.example.com", name="authsvc")
    verifier = server.Fido2Server(entity, verify_origin=lambda found: found == origin)
    key = cose.CoseKey.parse(passkey.public_key)
    known = webauthn.AttestedCredentialData.create(bytes(16), passkey.credential_id, key)
    challenge = bytes(32)
    state = {"challenge": to_text(challenge), "user_verification": "required"}
    answer = webauthn.AuthenticationResponse.from_dict(passkey.get({"challenge": to_text(challenge)}))
    return rate(lambda: verifier.authenticate_complete(state, [known], answer), seconds)


def raw_look_up(database: Path, seconds: float) -> float:
    """Return how often a second SQLite finds a session and its user, with the statement of GET /profile."""
    now = int(time.time())
    with closing(sqlite3.connect(database)) as db:
        # The newest: sign-ins that were measured before may have ended an older one.
        (newest,) = db.execute("SELECT session_hash FROM sessions ORDER BY id DESC LIMIT 1").fetchone()
        sought = {"session_hash": newest, "now": now, "idle_since": 0, "latest": now + 60}
        if db.execute(FIND_SESSION, sought).fetchone() is None:
            raise SystemExit("the newest session has expired")
        return rate(lambda: db.execute(FIND_SESSION, sought).fetchone(), seconds)
