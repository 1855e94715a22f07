"""Assertions that were changed by chance: this service accepts those that another verifier accepts, and no others."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import webauthn

from auth import Auth
from authsvc import create_app
from settings import Settings
from storage import DB
from tests.authenticator import ELIGIBLE, EXTENDED, RS256, Authenticator, cbor, to_bytes, to_text
from tests.conftest import COST, Client
from tests.passkeys import Person, new_person

Credential = dict[str, Any]


@pytest.mark.fuzz
def test_two_verifiers_agree_on_changed_assertions(tmp_path: Path) -> None:
    counts = compare(tmp_path, 1500)
    assert counts[200] > 300
    assert counts[401] > 500


def compare(folder: Path, number: int, seed: int = 1) -> Counter[int]:
    """Send changed assertions to a service, and ask Duo's library about each; return the number of each status."""
    chosen, counts = random.Random(seed), Counter[int]()
    settings = Settings(database=str(folder / "a.db"), bcrypt_cost=COST, throttle=False)
    with closing(DB(settings.database)) as db:
        call = Client(create_app(settings, Auth(db, settings)))
        people = [new_person(call, "es256@x.io"), new_person(call, "rs256@x.io")]
        people[1].device = Authenticator(algorithm=RS256)
        for person in people:
            person.device.step = 1
            assert person.add().status == 200
        for _ in range(number):
            person = chosen.choice(people)
            stored = db.find_passkey(to_text(person.device.credential_id))
            assert stored
            options = person.options()
            credential = changed(person.device, options, chosen)
            expected = 200 if is_accepted(credential, options, person, stored[2].sign_count) else 401
            person.session = ""
            status = person.send(credential).status
            assert status == expected, (seed, json.dumps(credential), person.device)
            counts[status] += 1
            person.device.counter = max(person.device.counter, stored[2].sign_count) % 2**31
    return counts


def is_accepted(credential: Credential, options: Any, person: Person, sign_count: int) -> bool:
    """Return whether Duo's library accepts an assertion. It leaves the user handle and the cross-origin flag to us."""
    try:
        webauthn.verify_authentication_response(
            credential=json.dumps(credential),
            expected_challenge=to_bytes(options["challenge"]),
            expected_rp_id="localhost",
            expected_origin="http://localhost:5000",
            credential_public_key=cbor(person.device.public_key),
            credential_current_sign_count=sign_count,
            require_user_verification=True,
        )
        client_data = json.loads(to_bytes(credential["response"]["clientDataJSON"]))
        handle = to_bytes(credential["response"]["userHandle"])
    except Exception:
        return False
    known = to_bytes(credential["rawId"]) == person.device.credential_id
    return known and handle == to_bytes(person.device.handle) and client_data.get("crossOrigin", False) is False


def changed(device: Authenticator, options: Any, chosen: random.Random) -> Credential:
    return chosen.choice(CHANGES)(device, options, chosen)


def one_byte(data: bytes, chosen: random.Random) -> bytes:
    """Return bytes of which one is changed, left out or added."""
    place, byte = chosen.randrange(len(data) + 1), bytes([chosen.randrange(256)])
    return data[:place] + chosen.choice((byte, b"")) + data[place + chosen.choice((0, 1)) :]


def with_changed_part(device: Authenticator, options: Any, chosen: random.Random) -> Credential:
    credential = device.get(options)
    response = credential["response"]
    part = chosen.choice(list(response))
    response[part] = to_text(one_byte(to_bytes(response[part]), chosen))
    return credential


def with_signed_data(device: Authenticator, options: Any, chosen: random.Random) -> Credential:
    """Change the authenticator data before it is signed: any flags, the counter, the host, extensions."""
    data = bytearray(device.data(device.flags))
    what = chosen.randrange(5)
    if what == 0:
        data[32] = chosen.randrange(256)
    elif what == 1:
        data[33:37] = chosen.choice((0, 1, device.counter, device.counter + chosen.randrange(-5, 5))).to_bytes(
            4, "big", signed=True
        )
    elif what == 2:
        data[chosen.randrange(32)] ^= 1 << chosen.randrange(8)
    elif what == 3:
        data[32] |= EXTENDED
        data += cbor({chosen.choice(("credProps", "prf", "x")): chosen.choice((True, {"a": b"1"}, [1, -2], "text", 3))})
    else:
        data[32] |= ELIGIBLE
        data = bytearray(one_byte(bytes(data), chosen)) if chosen.randrange(2) else data
    return device.assertion(bytes(data), device.client_data("webauthn.get", options["challenge"], {}))


def with_signed_client_data(device: Authenticator, options: Any, chosen: random.Random) -> Credential:
    """Change the client data before it is signed."""
    change: dict[str, Any] = chosen.choice(
        (
            {
                "origin": chosen.choice(
                    ("https://localhost:5000", "http://localhost", "http://localhost:5000/", "null", 1)
                )
            },
            {"type": chosen.choice(("webauthn.create", "Webauthn.get", "", 1))},
            {"challenge": to_text(one_byte(to_bytes(options["challenge"]), chosen))},
            {"crossOrigin": chosen.choice((True, None, "false", 0, 1))},
            {"topOrigin": "https://evil.example"},
            {"added": chosen.choice(("text", 1, [1], {"a": 1}))},
            {chosen.choice(("type", "challenge", "origin", "crossOrigin")): None},
        )
    )
    return device.get(options, **change)


def with_changed_members(device: Authenticator, options: Any, chosen: random.Random) -> Credential:
    """Change the JSON around the bytes."""
    credential = device.get(options)
    where = chosen.choice((credential, credential["response"]))
    name = chosen.choice([name for name in where if name != "clientExtensionResults"])
    if chosen.randrange(2):
        del where[name]
    else:
        where[name] = chosen.choice((1, True, [], {}, "", "AAAA", "!", "public-key", 1.5, "A" * 5000))
    return credential


def unchanged(device: Authenticator, options: Any, _chosen: random.Random) -> Credential:
    return device.get(options)


CHANGES: list[Callable[[Authenticator, Any, random.Random], Credential]] = [
    unchanged,
    with_changed_part,
    with_changed_part,
    with_changed_part,
    with_signed_data,
    with_signed_data,
    with_signed_client_data,
    with_changed_members,
]
