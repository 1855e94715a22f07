"""Settings: every AUTHSVC_… variable, read and checked once, before anything is opened.

The only reader of the environment in the service. Knows no HTTP, no SQL and no password.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

PREFIX = "AUTHSVC_"

# Names that stand in the environment of the service but are read by another program.
FOREIGN = frozenset({"AUTHSVC_URL"})  # main.py

RANGES = {
    "bcrypt_cost": (4, 15),  # 4: 1 ms, for tests; 15: 2 s of a core for each login
    "sessions_per_user": (1, 100),  # listing them is quick work, on the thread that serves everybody
    "session_idle": (1, 31_536_000),
    "session_lifetime": (1, 31_536_000),
    "reset_lifetime": (1, 3600),  # OWASP ASVS 6.5.5 asks for 10 minutes; an hour is the most we offer
    "password_min": (8, 64),  # NIST SP 800-63B-4 3.1.1.2: 15 where a password is all there is, never below 8
}

# What can be a mail recipient and stand in a header without being read as two, as a group (RFC 5322 3.4) or as an
# encoded word (RFC 2047 2).
_ATOM = r"""[^\x00-\x20\x7f-\U0010ffff@,;:<>()\[\]\\"]+"""
MAILBOX = re.compile(r"(?!.*(?:=\?|\.\.))" + _ATOM + r"@(?!\.)" + _ATOM + r"(?<!\.)")

# What libpq takes for one (PostgreSQL 34.1.1.2), and nothing that it would read in another way than a person: an "@" or
# "/" of a password must be percent-encoded, else a part of the password would be taken for the name of a host.
_HOST = r"(?:(?:[A-Za-z0-9._-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?"
_VALUE = r"(?:[^\s@?#&=%]|%(?!00)[0-9A-Fa-f]{2})*"  # what it cannot decode it repeats, a password too
_OPTION = r"[a-z_]+=" + _VALUE
_PARTS = r"(?:/(?P<name>[^\s/@?#]*))?(?:\?(?P<options>" + _OPTION + "(?:&" + _OPTION + ")*))?"
_USER = r"(?:(?:[^\s/@?#%]|%(?!00)[0-9A-Fa-f]{2})*@)?"
DATABASE_URL = re.compile(r"postgres(?:ql)?://" + _USER + "(?P<hosts>" + _HOST + "(?:," + _HOST + ")*)" + _PARTS)
SEALED = "require", "verify-ca", "verify-full"  # of sslmode: those that never go on in plain

REGISTRATION = "open", "invitation", "closed"

SWITCH = {"on": True, "1": True, "off": False, "0": False}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class SettingsError(Exception):
    """A setting that cannot be used; the message names it and says what would do."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One checked set of settings.

    Raises:
        SettingsError: a value is out of its range, or would expose a development service.
    """

    listen: str = "127.0.0.1:5000"  # host:port; port 0 takes a free one
    database: str = field(default="authsvc.db", repr=False)  # path of the SQLite file, or postgresql://user@host/name
    public_url: str = ""  # https://…, the address people use; set, it makes this a production service
    bcrypt_cost: int = 12  # log2 of the rounds, 0.24 s of a core; each step more doubles it; production: 10 or more
    throttle: bool = True  # on or off; production: on
    sessions_per_user: int = 1  # sessions at once; a login beyond it ends the oldest
    session_idle: int = 604_800  # seconds, 7 days; a session not used for as long is over
    session_lifetime: int = 2_592_000  # seconds, 30 days (NIST SP 800-63B-4 AAL1); over even when in use
    reset_lifetime: int = 600  # seconds; a reset token older than this is refused
    password_min: int = 15  # characters of a new password; production only
    registration: str = "open"  # who may make an account: anybody (open), whom the operator invites, or nobody (closed)
    require_totp: bool = False  # on: without a second factor a session is good for setting one up and nothing else
    trusted_proxy: str = ""  # the one address whose X-Forwarded-For and -Proto are believed
    cookie_domain: str = ""  # share the cookie with every host below it, who can then all read it; production only
    smtp_url: str = ""  # smtp+starttls://user@host:587 or smtps://user@host:465; without it nothing is mailed
    smtp_password_file: str = ""  # holds the password of smtp_url's user
    mail_from: str = ""  # the sender's address
    unsafe_listen: bool = False  # 1: development beyond loopback although nothing in it is fit for a network

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the AUTHSVC_… variables.

        Raises:
            SettingsError: an unknown name, or a value that cannot be read.
        """
        readers = {PREFIX + one.name.upper(): one for one in fields(cls)}
        values: dict[str, Any] = {}
        for name in sorted(environ):
            if not name.startswith(PREFIX) or name in FOREIGN:
                continue
            if name not in readers:
                raise SettingsError(f"{name} is not a setting; the README lists them all")
            known = readers[name]
            values[known.name] = _read(name, environ[name], type(known.default))
        return cls(**values)

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            self._demand(least <= getattr(self, name) <= most, name, f"must be from {least} to {most}")
        self._demand(self.database != "", "database", "must name a file")
        self._demand(
            not is_url(self.database) or bool(DATABASE_URL.fullmatch(self.database)),
            "database",
            "must be a file or postgresql://user:password@host:port/name, with what is special percent-encoded",
        )
        self._demand(self.registration in REGISTRATION, "registration", f"must be one of {', '.join(REGISTRATION)}")
        self._demand(
            not self.trusted_proxy or bool(parsed_address(self.trusted_proxy)),
            "trusted_proxy",
            "must be one IP address",
        )
        self._demand(bool(self.smtp_url) == bool(self.mail_from), "mail_from", "and AUTHSVC_SMTP_URL go together")
        self._demand(not self.mail_from or bool(MAILBOX.fullmatch(self.mail_from)), "mail_from", "must be name@host")
        self._demand(not self.smtp_url or bool(self.smtp_server), "smtp_url", "must be smtp+starttls://… or smtps://…")
        listens_locally = self.address[0].is_loopback
        if self.public_url:
            self._check_production()
        else:
            self._demand(not self.cookie_domain, "cookie_domain", "needs AUTHSVC_PUBLIC_URL")
            self._demand(
                listens_locally or self.unsafe_listen,
                "listen",
                "is reachable from other machines, and a development service hands out reset tokens: set "
                "AUTHSVC_PUBLIC_URL, or AUTHSVC_UNSAFE_LISTEN=1 if you know better",
            )

    def _check_production(self) -> None:
        host = re.fullmatch(r"https://([a-z0-9-]+(?:\.[a-z0-9-]+)*)(?::[0-9]{1,5})?", self.public_url, re.ASCII)
        self._demand(host is not None, "public_url", "must be https://host, in lower case, without a path")
        self._demand(self.bcrypt_cost >= 10, "bcrypt_cost", "must be at least 10 in production")
        self._demand(self.throttle, "throttle", "cannot be off in production")
        self._demand(
            not self.unsafe_listen, "unsafe_listen", "is for development; production listens where it is told to"
        )
        self._demand(
            not is_url(self.database) or _is_sealed(self.database),
            "database",
            "would be asked in plain over a network: add ?sslmode=verify-full",
        )
        inside = host is not None and f".{host[1]}".endswith(f".{self.cookie_domain}") and "." in self.cookie_domain
        self._demand(
            not self.cookie_domain or inside, "cookie_domain", "must be the host of AUTHSVC_PUBLIC_URL or a parent"
        )

    def _demand(self, fulfilled: bool, name: str, demand: str) -> None:
        if not fulfilled:
            value = str(getattr(self, name))
            shown = "" if name in ("smtp_url", "database") else f"={value if value.isprintable() else repr(value)}"
            raise SettingsError(f"{PREFIX}{name.upper()}{shown} {demand}")  # a URL may hold a password

    @property
    def production(self) -> bool:
        """Whether strangers are expected."""
        return self.public_url != ""

    def warnings(self) -> list[str]:
        """Return what may not be meant as it is set."""
        found = []
        if self.production and not self.trusted_proxy:
            found.append("no AUTHSVC_TRUSTED_PROXY: behind a proxy all clients share one address")
        if self.production and not self.smtp_url:
            found.append("no AUTHSVC_SMTP_URL: nobody can be mailed a reset link")
        return found

    @property
    def smtp_server(self) -> SplitResult | None:
        """Where to hand in mail: scheme, username, hostname and port; None when nothing is mailed."""
        # No plain smtp://: a reset link read on its way is an account lost.
        try:
            url = urlsplit(self.smtp_url)
            usable = url.scheme in ("smtp+starttls", "smtps") and url.hostname and url.port != 0 and not url.password
        except ValueError:  # a port that is none
            return None
        return url if usable else None

    @property
    def address(self) -> tuple[Address, int]:
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


def is_url(database: str) -> bool:
    """Say whether a database is named by a URL, and is no file."""
    return database.startswith(("postgres:", "postgresql:"))


def shown(database: str) -> str:
    """Return what names a database and is fit to be shown: a URL without user, password and options."""
    found = DATABASE_URL.fullmatch(database)
    if not found:
        return "PostgreSQL" if is_url(database) else database
    hosts = ",".join(_hosts(found)) or "this machine"
    return f"{unquote(found['name'] or '') or 'PostgreSQL'} on {hosts}"


def parsed_address(text: str) -> Address | None:
    """Return the IP address that this is, or None; an IPv4 one that is written as IPv6 (::ffff:…) is IPv4."""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed


def _hosts(url: re.Match[str]) -> list[str]:
    # As libpq does: what the options name goes before what stands in the authority.
    options = parse_qs(url["options"] or "")
    named = (options.get("hostaddr") or options.get("host") or [unquote(url["hosts"])])[-1]
    return [host for host in named.split(",") if host]


def _is_sealed(database: str) -> bool:
    url = DATABASE_URL.fullmatch(database)
    if not url:
        return False
    options = parse_qs(url["options"] or "")
    if options.get("sslmode", [""])[-1] in SEALED:
        return True
    # Where one of several has no hostaddr, its host counts: too fine a difference to be relied upon.
    return not {"service", "hostaddr"} & options.keys() and all(_is_here(host) for host in _hosts(url))


def _is_here(host: str) -> bool:
    bracketed = re.match(r"\[([^\]]*)\]", host)
    name = bracketed[1] if bracketed else host.partition(":")[0] if host.count(":") == 1 else host
    if name.startswith("/") or name in ("", "localhost"):  # a socket in a folder
        return True
    address = parsed_address(name)
    return address is not None and address.is_loopback


def _read(name: str, text: str, kind: type) -> str | int | bool:
    if not text:  # what a broken environment file leaves; a service must not turn into a development one by it
        raise SettingsError(f"{name} is set to nothing; give it a value or unset it")
    if kind is bool:
        if text not in SWITCH:
            raise SettingsError(f"{name}={text!r} must be on or off (or 1 or 0)")
        return SWITCH[text]
    if kind is int:
        if not re.fullmatch("[0-9]{1,9}", text, re.ASCII):
            raise SettingsError(f"{name}={text!r} must be a whole number")
        return int(text)
    return text
