"""Passkeys: the challenges, the options and the verification of WebAuthn Level 3 (https://www.w3.org/TR/webauthn-3/).

A passkey is a key pair of one account at one host. The browser signs a challenge of ours, and only for that host, so a
page under another name gets nothing that is of use to it. The private key stays in the user's device or account.

Nothing is stored when a challenge is made. It is 32 random bytes, the time at which it expires, and a MAC that binds it
to its purpose, to the user and to the browser. That it was used is stored, until it expires.

Signatures and formats are verified by Yubico's ``fido2``, the extra ``passkeys``. It is imported with the first use.
"""

import functools
import hashlib
import hmac
import importlib.util
import json
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

CHALLENGE_LIFETIME = 300  # seconds
CLOCK_TOLERANCE = 300  # seconds that the clock of the copy that made a challenge may be ahead
CHALLENGE_BYTES = 32
EXPIRY_BYTES = 8
ALGORITHMS = -7, -257  # ES256 and RS256 (RFC 8152, 8.1; RFC 8812, 2): all authenticators have one of these
RSA_BITS = range(2048, 4097)
RSA_EXPONENT = 65_537
MAX_CREDENTIAL_ID_BYTES = 1023  # WebAuthn, 7.1, step 26
MAX_KEY_BYTES = 1024  # of a public key; RSA with 4096 bits takes 530
MAX_DATA_BYTES = 1024  # that an authenticator signs when somebody signs in: 37, and those of extensions
VERIFICATION = "required"  # the device asks for a fingerprint, a face or a PIN
REQUIRED = {"userVerification": VERIFICATION}
PARTS = "clientDataJSON", "attestationObject", "authenticatorData", "signature", "userHandle"
MAX_REASON = 80  # characters that are logged

Purpose = tuple[str, ...]  # what a challenge is for, with the user and the browser
Credential = dict[str, Any]  # what a browser returns, in JSON
Options = dict[str, object]  # what a browser is asked, in JSON
Challenge = tuple[str, int]  # a genuine one, to be stored as used: its SHA-256 in hex, and when it expires


class Refused(ValueError):
    """A credential is not accepted; ``str()`` says why, for the log."""


def is_installed() -> bool:
    """Return whether the extra ``passkeys`` is installed."""
    return importlib.util.find_spec("fido2") is not None


class RelyingParty:
    """This service, as browsers and authenticators know it.

    ``origin`` is the beginning of its address. ``keyed`` is an HMAC-SHA-256 with the secret of the database.
    """

    def __init__(self, origin: str, keyed: hmac.HMAC) -> None:
        self.origin = origin
        self.id = urlsplit(origin).hostname or ""
        self._keyed = keyed

    def creation_options(self, purpose: Purpose, now: int, handle: str, email: str, held: list[str]) -> Options:
        """Return the options for a new passkey, in JSON. ``held`` are the credential ids of the user's others."""
        return {
            "rp": {"id": self.id, "name": self.id},
            "user": {"id": handle, "name": email, "displayName": email},
            "challenge": self._new_challenge(purpose, now),
            "pubKeyCredParams": [{"type": "public-key", "alg": algorithm} for algorithm in ALGORITHMS],
            "timeout": CHALLENGE_LIFETIME * 1000,
            "excludeCredentials": [{"type": "public-key", "id": credential_id} for credential_id in held],
            # The second one is for browsers that know only Level 1.
            "authenticatorSelection": REQUIRED | {"residentKey": "required", "requireResidentKey": True},
            "attestation": "none",
        }

    def request_options(self, purpose: Purpose, now: int) -> Options:
        """Return the options for signing in with any passkey, in JSON's form."""
        challenge = {"challenge": self._new_challenge(purpose, now), "timeout": CHALLENGE_LIFETIME * 1000}
        return {**challenge, "rpId": self.id, "allowCredentials": [], **REQUIRED}

    def verify_new(self, credential: Credential, purpose: Purpose, now: int) -> tuple[str, str, int, int, Challenge]:
        """Verify a RegistrationResponseJSON (WebAuthn, 7.1).

        Return the credential id and the COSE key (RFC 9052, 7) in base64url, the signature counter, 1 for a passkey
        that is synced, which means that its provider keeps a copy, and the challenge.

        Raises:
            Refused: it is not accepted.
        """
        from cryptography.exceptions import InvalidSignature
        from fido2 import cbor, webauthn

        with _refusals():
            parts, state, challenge = self._opened(credential, purpose, now)
            data = cbor.decode(parts["attestationObject"])["authData"]  # type: ignore[index,call-overload]
            if not isinstance(data, bytes):
                raise Refused("no authenticator data")
            attestation = webauthn.AttestationObject.create("none", webauthn.AuthenticatorData(data), {})
            client_data, raw_id = webauthn.CollectedClientData(parts["clientDataJSON"]), _bytes(credential["rawId"])
            given = webauthn.AuthenticatorAttestationResponse(client_data=client_data, attestation_object=attestation)
            new = self._server.register_complete(state, webauthn.RegistrationResponse(raw_id=raw_id, response=given))
            key, credential_id = new.credential_data.public_key, new.credential_data.credential_id
            if credential_id != raw_id or not 0 < len(credential_id) <= MAX_CREDENTIAL_ID_BYTES:
                raise Refused("credential id")
            public_key = cbor.encode(key)
            if key.ALGORITHM not in ALGORITHMS or len(public_key) > MAX_KEY_BYTES or not _is_strong(key):
                raise Refused("kind of key")
            with suppress(InvalidSignature):
                key.verify(b"", b"")  # raises ValueError if the key is no key, such as a point beside the curve
            return _text(credential_id), _text(public_key), new.counter, _synced(new), challenge

    def credential_id(self, credential: Credential) -> str:
        """Return the credential id in an AuthenticationResponseJSON, in the form in which it is stored.

        Raises:
            Refused: there is none.
        """
        with _refusals():
            return _text(_bytes(credential["rawId"]))

    def verify(
        self, credential: Credential, public_key: str, sign_count: int, handle: str, purpose: Purpose, now: int
    ) -> tuple[int, int, Challenge]:
        """Verify an AuthenticationResponseJSON (WebAuthn, 7.2).

        Return the new signature counter, 1 for a passkey that is synced, and the challenge.
        ``public_key`` and ``sign_count`` are stored under the credential id, and ``handle`` is that of the user.

        Raises:
            Refused: it is not accepted.
        """
        from fido2 import cbor, cose, webauthn

        with _refusals():
            parts, state, challenge = self._opened(credential, purpose, now)
            if len(parts["authenticatorData"]) > MAX_DATA_BYTES:
                raise Refused("too much authenticator data")
            data, raw_id = webauthn.AuthenticatorData(parts["authenticatorData"]), _bytes(credential["rawId"])
            given = webauthn.AuthenticatorAssertionResponse(
                client_data=webauthn.CollectedClientData(parts["clientDataJSON"]),
                authenticator_data=data,
                signature=parts["signature"],
            )
            key = cose.CoseKey.parse(cbor.decode(_bytes(public_key)))  # type: ignore[arg-type]  # a map, as it was stored
            known = webauthn.AttestedCredentialData.create(bytes(16), raw_id, key)
            response = webauthn.AuthenticationResponse(raw_id=raw_id, response=given)
            self._server.authenticate_complete(state, [known], response)
            if parts.get("userHandle") != _bytes(handle):
                raise Refused("user handle")
            # Synced passkeys do not count. In others a step back tells of a copy (WebAuthn, 6.1.1).
            if data.counter <= sign_count and (data.counter or sign_count):
                raise Refused("signature counter")
            return data.counter, _synced(data), challenge

    @functools.cached_property  # it takes as long to construct as a signature to verify
    def _server(self) -> Any:
        from fido2 import server, utils, webauthn

        # Its classes look up their types for each response, which takes a third of a sign-in.
        utils.get_type_hints = functools.cache(utils.get_type_hints)  # type: ignore
        # Its own check of the origin takes subdomains, too.
        entity = webauthn.PublicKeyCredentialRpEntity(id=self.id, name=self.id)
        return server.Fido2Server(entity, verify_origin=lambda origin: origin == self.origin)

    def _new_challenge(self, purpose: Purpose, now: int) -> str:
        signed = secrets.token_bytes(CHALLENGE_BYTES) + (now + CHALLENGE_LIFETIME).to_bytes(EXPIRY_BYTES, "big")
        return _text(signed + self._mac(purpose, signed))

    def _opened(
        self, credential: Credential, purpose: Purpose, now: int
    ) -> tuple[dict[str, bytes], dict[str, str], Challenge]:
        """Return the parts of a response, what Fido2Server wants to know of the options, and the challenge.

        Here is checked what ``fido2`` leaves to us. It gets bytes only: of a number, it would make as many zero bytes,
        so that a small request could fill the memory.
        """
        if (credential["id"], credential["type"]) != (_text(_bytes(credential["rawId"])), "public-key"):
            raise Refused("id or type")
        parts = {name: _bytes(text) for name, text in credential["response"].items() if name in PARTS and text}
        client_data = json.loads(parts["clientDataJSON"])
        challenge = self._check_challenge(_bytes(client_data["challenge"]), purpose, now)
        if client_data.get("crossOrigin", False) is not False:
            raise Refused("cross-origin")
        return parts, {"challenge": client_data["challenge"], "user_verification": VERIFICATION}, challenge

    def _check_challenge(self, challenge: bytes, purpose: Purpose, now: int) -> Challenge:
        signed, mac = challenge[:-32], challenge[-32:]
        expires_at = int.from_bytes(signed[CHALLENGE_BYTES:], "big")
        if not hmac.compare_digest(mac, self._mac(purpose, signed)):
            raise Refused("challenge of another browser, user or purpose")
        if not now < expires_at <= now + CHALLENGE_LIFETIME + CLOCK_TOLERANCE:
            raise Refused("challenge expired")
        return hashlib.sha256(challenge).hexdigest(), expires_at

    def _mac(self, purpose: Purpose, signed: bytes) -> bytes:
        # "challenge" tells it from what else is signed with this secret. ascii(), as no two tuples have the same text.
        mac = self._keyed.copy()
        mac.update(ascii(("challenge", purpose, signed)).encode())
        return mac.digest()


def _synced(data: Any) -> int:
    # Whether a passkey can be synced is not compared with the past: in practice that changes.
    if data.is_backed_up() and not data.is_backup_eligible():
        raise Refused("backup flags")
    return int(data.is_backed_up())


def _is_strong(key: Any) -> bool:
    if ALGORITHMS[1] != key.ALGORITHM:
        return True
    modulus, exponent = (int.from_bytes(key[part], "big") for part in (-1, -2))
    return modulus % 2 == 1 and modulus.bit_length() in RSA_BITS and exponent == RSA_EXPONENT


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn whatever a made-up credential makes a parser raise into Refused."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # some of them quote what they cannot read
        raise Refused(str(error)[:MAX_REASON] or type(error).__name__) from error


def _text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))
