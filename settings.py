"""Settings: every AUTHSVC_… variable, read and checked once, before anything is opened.

The only reader of the environment in the service. Knows no HTTP, no SQL and no password.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PREFIX = "AUTHSVC_"

# Names that stand in the environment of the service but are read by another program.
FOREIGN = frozenset({"AUTHSVC_URL"})  # main.py

# Names that are promised and whose feature is not here: to ignore one would be to run less safely than asked.
NOT_YET = frozenset(
    PREFIX + name
    for name in (
        "PUBLIC_URL",
        "PASSWORD_MIN",
        "TRUSTED_PROXY",
        "COOKIE_DOMAIN",
        "SMTP_URL",
        "SMTP_PASSWORD_FILE",
        "MAIL_FROM",
    )
)

RANGES = {
    "bcrypt_cost": (4, 15),  # 4: 1 ms, for tests; 15: 2 s of a core for each login
    "sessions_per_user": (1, 1000),
    "session_idle": (1, 31_536_000),
    "session_lifetime": (1, 31_536_000),
    "reset_lifetime": (1, 3600),  # OWASP ASVS 6.5.5 asks for 10 minutes; an hour is the most we offer
}

SWITCH = {"on": True, "1": True, "off": False, "0": False}


class SettingsError(Exception):
    """A setting that cannot be used; the message names it and says what would do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One checked set of settings.

    Raises:
        SettingsError: a value is out of its range, or would expose a development service.
    """

    listen: str = "127.0.0.1:5000"  # host:port; port 0 takes a free one
    database: str = "authsvc.db"  # path of the SQLite file, from the working folder
    bcrypt_cost: int = 12  # log2 of the rounds, 0.24 s of a core; each step more doubles it
    throttle: bool = True  # on or off; accepted, nothing is throttled in this release
    sessions_per_user: int = 1  # sessions at once; a login beyond it ends the oldest
    session_idle: int = 604_800  # seconds, 7 days; a session not used for as long is over
    session_lifetime: int = 2_592_000  # seconds, 30 days (NIST SP 800-63B-4 AAL1); over even when in use
    reset_lifetime: int = 600  # seconds; a reset token older than this is refused
    unsafe_listen: bool = False  # 1: listen beyond loopback although nothing here is fit for a network

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the AUTHSVC_… variables.

        Raises:
            SettingsError: an unknown name, or a value that cannot be read.
        """
        readers = {PREFIX + field.name.upper(): field for field in fields(cls)}
        values: dict[str, Any] = {}
        for name in sorted(environ):
            if not name.startswith(PREFIX) or name in FOREIGN:
                continue
            if name in NOT_YET:
                raise SettingsError(f"{name} is not in this release")
            if name not in readers:
                raise SettingsError(f"{name} is not a setting; the README lists them all")
            field = readers[name]
            values[field.name] = _read(name, environ[name], type(field.default))
        return cls(**values)

    def __post_init__(self) -> None:
        for field, (least, most) in RANGES.items():
            if not least <= getattr(self, field) <= most:
                name = PREFIX + field.upper()
                raise SettingsError(f"{name}={getattr(self, field)} must be from {least} to {most}")
        if re.match("postgres(ql)?://", self.database):
            raise SettingsError("AUTHSVC_DATABASE: PostgreSQL is not in this release; give the path of a file")
        if not self.database:
            raise SettingsError("AUTHSVC_DATABASE must name a file")
        if not (self.address[0].is_loopback or self.unsafe_listen):
            raise SettingsError(
                f"AUTHSVC_LISTEN={self.listen} is reachable from other machines, and a development service gives "
                "reset tokens to whoever asks; AUTHSVC_UNSAFE_LISTEN=1 overrides this"
            )

    @property
    def address(self) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
        """Where to listen: an address and a port."""
        # Addresses and no names: a name that later resolves elsewhere would open the service to a network.
        found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):([0-9]{1,5})", self.listen, re.ASCII)
        try:
            if not found or int(found[3]) > 65535:
                raise ValueError
            host = found[1] or found[2]
            return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host), int(found[3])
        except ValueError:
            raise SettingsError(
                f"AUTHSVC_LISTEN={self.listen!r} must be ADDRESS:PORT, for example 127.0.0.1:5000 or [::1]:5000"
            ) from None


def _read(name: str, text: str, kind: type) -> str | int | bool:
    if kind is bool:
        if text not in SWITCH:
            raise SettingsError(f"{name}={text!r} must be on or off (or 1 or 0)")
        return SWITCH[text]
    if kind is int:
        if not re.fullmatch("[0-9]{1,9}", text, re.ASCII):
            raise SettingsError(f"{name}={text!r} must be a whole number")
        return int(text)
    return text
