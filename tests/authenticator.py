"""An authenticator in software: it makes passkeys and signs with them, as a browser hands the result to a page.

It shares no code with what verifies them: the CBOR is written here, and the signatures are made by ``cryptography``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

ES256, RS256 = -7, -257
PRESENT, VERIFIED, ELIGIBLE, BACKED_UP, ATTESTED, EXTENDED = 0x01, 0x04, 0x08, 0x10, 0x40, 0x80  # flags


def to_text(data: bytes) -> str:
    """Return bytes in base64url, as WebAuthn's JSON has them."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def to_bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def cbor(value: Any) -> bytes:
    """Return a value in CBOR (RFC 8949, 3)."""
    if isinstance(value, bool):
        return bytes([0xF4 + value])
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        return _head(3, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return _head(4, len(value)) + b"".join(map(cbor, value))
    return _head(5, len(value)) + b"".join(cbor(key) + cbor(part) for key, part in value.items())


def _head(kind: int, number: int) -> bytes:
    if number < 24:
        return bytes([kind << 5 | number])
    for step, size in enumerate((1, 2, 4, 8)):
        if number < 256**size:
            return bytes([kind << 5 | 24 + step]) + number.to_bytes(size, "big")
    raise ValueError(number)


@dataclass
class Authenticator:
    """One passkey. Each attribute can be changed before it is used, to make what must be refused."""

    origin: str = "http://localhost:5000"
    rp_id: str = "localhost"
    algorithm: int = ES256
    bits: int = 2048  # of an RSA key
    flags: int = PRESENT | VERIFIED
    counter: int = 0
    step: int = 0  # by which the counter grows with each signature
    credential_id: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    handle: str = ""
    private_key: Any = None
    public_key: dict[int, Any] = field(default_factory=dict)  # a COSE key

    def __post_init__(self) -> None:
        if self.private_key:
            return  # a copy
        if self.algorithm == ES256:
            self.private_key = ec.generate_private_key(ec.SECP256R1())
            point = self.private_key.public_key().public_numbers()
            x, y = point.x.to_bytes(32, "big"), point.y.to_bytes(32, "big")
            self.public_key = {1: 2, 3: ES256, -1: 1, -2: x, -3: y}
        else:
            self.private_key = rsa.generate_private_key(65_537, self.bits)
            numbers = self.private_key.public_key().public_numbers()
            modulus, exponent = numbers.n.to_bytes(self.bits // 8, "big"), numbers.e.to_bytes(3, "big")
            self.public_key = {1: 3, 3: RS256, -1: modulus, -2: exponent}

    def create(self, options: dict[str, Any], **client_data: Any) -> dict[str, Any]:
        """Make the passkey; return a RegistrationResponseJSON. ``client_data`` replaces members of the client data."""
        self.handle = options["user"]["id"]
        size = len(self.credential_id).to_bytes(2, "big")
        attested = bytes(16) + size + self.credential_id + cbor(self.public_key)
        data = self.data(self.flags | ATTESTED) + attested
        statement = {"fmt": "none", "attStmt": {}, "authData": data}
        signed = self.client_data("webauthn.create", options["challenge"], client_data)
        return self.response(clientDataJSON=signed, attestationObject=cbor(statement))

    def get(self, options: dict[str, Any], **client_data: Any) -> dict[str, Any]:
        """Sign a challenge; return an AuthenticationResponseJSON. ``client_data`` is as in create()."""
        signed = self.client_data("webauthn.get", options["challenge"], client_data)
        return self.assertion(self.data(self.flags), signed)

    def assertion(self, data: bytes, signed: bytes) -> dict[str, Any]:
        """Return an AuthenticationResponseJSON with this authenticator data and client data."""
        message = data + hashlib.sha256(signed).digest()
        parts = {"clientDataJSON": signed, "authenticatorData": data, "signature": self.sign(message)}
        return self.response(**parts, **({"userHandle": to_bytes(self.handle)} if self.handle else {}))

    def data(self, flags: int) -> bytes:
        """Return authenticator data without a key, with the next counter."""
        self.counter += self.step
        return hashlib.sha256(self.rp_id.encode()).digest() + bytes([flags]) + self.counter.to_bytes(4, "big")

    def sign(self, message: bytes) -> bytes:
        if isinstance(self.private_key, ec.EllipticCurvePrivateKey):
            return self.private_key.sign(message, ec.ECDSA(hashes.SHA256()))
        signature: bytes = self.private_key.sign(message, padding.PKCS1v15(), hashes.SHA256())
        return signature

    def client_data(self, kind: str, challenge: str, changes: dict[str, Any]) -> bytes:
        members = {"type": kind, "challenge": challenge, "origin": self.origin, "crossOrigin": False} | changes
        return json.dumps({name: value for name, value in members.items() if value is not None}).encode()

    def response(self, **parts: bytes) -> dict[str, Any]:
        name = to_text(self.credential_id)
        response = {part: to_text(data) for part, data in parts.items()}
        return {"id": name, "rawId": name, "type": "public-key", "response": response, "clientExtensionResults": {}}
