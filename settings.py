"""Settings: the AUTHSVC_… environment variables, read and checked once at the start.

No other module of the service reads the environment.
"""

import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self
from urllib.parse import SplitResult, quote, urlsplit

from addresses import Address, is_loopback, is_private_peer, is_wide, parse_address, parse_networks

PREFIX = "AUTHSVC_"

# Variables with our prefix that other programs read.
FOREIGN = frozenset({"AUTHSVC_URL"})  # main.py

# Kubernetes sets these variables for a Service named authsvc or authsvc-…, and Docker for a link of that name. Only
# values of their form are ignored: any other value was meant as a setting.
_LINK = re.compile(
    r"AUTHSVC_NAME=/[\w.-]+/authsvc|AUTHSVC_(?:[A-Z0-9_]+_)?(?:"
    r"PORT(?:_[0-9]+_(?:TCP|UDP|SCTP)(?:_START|_END)?)?=(?:tcp|udp|sctp)://[^\s@]+"
    r"|(?:SERVICE_HOST|PORT_[0-9]+_(?:TCP|UDP|SCTP)_ADDR)=[0-9A-Fa-f.:]+"
    r"|(?:SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT_[0-9]+_(?:TCP|UDP|SCTP)_PORT(?:_START|_END)?)=[0-9]+"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)_PROTO=(?:tcp|udp|sctp))"
)

RANGES = {
    "bcrypt_cost": (4, 15),  # 4 takes 1 ms, for tests; 15 takes 2 s of a core for each login
    "sessions_per_user": (1, 100),  # a user's sessions are listed on the I/O thread, which must not be delayed
    "session_idle": (1, 31_536_000),
    "session_lifetime": (1, 31_536_000),
    "reset_lifetime": (1, 3600),  # OWASP ASVS 6.5.5 asks for 10 minutes; we allow up to an hour
    "password_min": (8, 64),  # NIST SP 800-63B-4 3.1.1.2: 15 if the password is the only factor, never below 8
}

# An email address that is safe in a header, and that mail servers accept as a recipient (RFC 5321 4.1.2 and 4.5.3.1).
# It cannot be read as two addresses, as a group (RFC 5322 3.4) or as an encoded word (RFC 2047 2).
_LOCAL = r"""(?!\.)(?!.*(?:=\?|\.\.))[^\x00-\x20\x7f-\U0010ffff@,;:<>()\[\]\\"]{1,64}(?<!\.)"""
_LABEL = "(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
MAILBOX = re.compile(_LOCAL + "@" + _LABEL + r"(?:\." + _LABEL + ")*")

# psycopg parses PostgreSQL URLs. These patterns refuse the URLs that it would misread: after an unencoded "/", "@", "?"
# or "#" in a password, it takes the rest of the password for the host or the database name, which are shown.
_URL = re.compile(r"postgres(?:ql)?://(?:[^\s/@?#]*@)?[^\s/@?#]*(?:/[^\s/@?#]*)?(?:\?[^\s@?#]*)?")
_HOST = re.compile(r"[\w.-]*|[0-9A-Fa-f:.]+|/[\w./ -]+")  # a name, an IP address, or the folder of a Unix socket
# What is not the path of a file, and may contain a password: URLs of another form, and libpq's connection strings.
_NO_PATH = re.compile(r"://|^[A-Z][A-Z0-9+.-]*:|(?:^|//)[^/]*:[^/]*@|^[A-Z_]+ *=|\bpassword *=", re.IGNORECASE)
ENCRYPTED_MODES = "require", "verify-ca", "verify-full"  # values of sslmode that never fall back to plain text

# What an environment file leaves in a value by mistake: control and invisible characters, blanks or quotes at its ends,
# and comments.
_STRAY = re.compile(
    r"[\0-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
    r"|\A[\s'\"]|\s\Z|\A[^'\"]*['\"]\Z|\s#"
)

# Common suffixes under which strangers have hosts. Browsers refuse a cookie for each suffix in publicsuffix.org's list.
_SECOND_LEVEL = re.compile(r"(?:ac|co|com|edu|go|gob|gov|gv|ltd|mil|ne|net|nom|or|org|plc|sch)\.[a-z]{2}")
_HOSTING = "me.uk github.io gitlab.io pages.dev workers.dev web.app vercel.app netlify.app fly.dev onrender.com "
_HOSTING += "ngrok.io herokuapp.com duckdns.org dedyn.io ddns.net no-ip.org hopto.org dyndns.org synology.me "
_HOSTING += "myfritz.net nip.io"

REGISTRATION = "open", "invitation", "closed"

LOGOS = {"png": b"\x89PNG", "jpeg": b"\xff\xd8", "webp": b"RIFF", "svg+xml": b"<"}  # how a file of each type begins
MAX_LOGO_BYTES = 32_768  # the logo is a part of each page

NO_METRICS = "prometheus_client is not installed: pip install prometheus-client"

SWITCH = {"on": True, "1": True, "off": False, "0": False}


class SettingsError(Exception):
    """A setting that cannot be used. The message names it and says how to correct it."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One checked set of settings.

    Raises:
        SettingsError: a value is out of range, or would expose a development service to a network.
    """

    listen: str = "127.0.0.1:5000"  # address:port; port 0 picks a free one
    database: str = field(default="authsvc.db", repr=False)  # path of a SQLite file, or postgresql://user@host/name
    database_password_file: str = ""  # path of a file with the password of the user in a PostgreSQL URL
    public_url: str = ""  # https://…, the address that people use; setting it makes this a production service
    bcrypt_cost: int = 12  # log2 of the rounds: 0.24 s of a core, doubled by each step; at least 10 in production
    throttle: bool = True  # the rate limits; always on in production
    sessions_per_user: int = 1  # simultaneous sessions, 10 in production; one more login ends the oldest
    session_idle: int = 604_800  # seconds, 7 days; a session that is unused for this long expires
    session_lifetime: int = 2_592_000  # seconds, 30 days (NIST SP 800-63B-4 AAL1); expires even when in use
    reset_lifetime: int = 600  # seconds until a reset token expires
    password_min: int = 15  # minimum characters of a new password; production only
    registration: str = "open"  # who can create an account: anyone (open), invited people (invitation), no one (closed)
    confirm_email: bool | None = None  # a new account needs a mailed link; None: in production with a mail server
    require_second_factor: bool = False  # if on, a session that has not shown a second factor can only set one up
    trusted_proxy: str = ""  # IP addresses and networks that may send X-Forwarded-For and X-Forwarded-Proto
    cookie_domain: str = ""  # shares the session cookie with all hosts under this domain, which can read it; production
    smtp_url: str = ""  # smtp+starttls://user@host:587, smtps://user@host:465 or smtp://127.0.0.1:25; "": no mail
    smtp_password_file: str = ""  # path of a file with the password of the user in smtp_url
    mail_from: str = ""  # the sender's address
    site_name: str = ""  # the name of the site on the pages; "": the host
    site_logo: str = ""  # path of a PNG, JPEG, WebP or SVG file that the pages show beside the name
    metrics_listen: str = ""  # address:port where anybody may read /metrics, beside the service's own
    contact: str = ""  # whom users ask where they cannot help themselves, for the pages; a sentence
    unsafe_listen: bool = False  # lets a development service listen beyond loopback, although it is not safe there

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read the AUTHSVC_… variables.

        Raises:
            SettingsError: a variable is unknown, or its value is invalid; or the system is not supported.
        """
        try:
            import fcntl, pwd, syslog  # engines and cli use them; Windows has none  # noqa: E401, F401, I001
        except ImportError:
            raise SettingsError("this service runs on Linux and macOS; on Windows use WSL") from None
        readers = {PREFIX + one.name.upper(): one for one in fields(cls)}
        readers["AUTHSVC_REQUIRE_TOTP"] = readers["AUTHSVC_REQUIRE_SECOND_FACTOR"]  # its former name
        values: dict[str, Any] = {}
        linked = _LINK.fullmatch(f"AUTHSVC_NAME={environ.get('AUTHSVC_NAME')}")
        for name in sorted({name for name in environ if name.startswith(PREFIX)} - FOREIGN):
            if name not in readers:
                # AUTHSVC_ENV_…: the environment of the other container of a link.
                if (linked and name.startswith("AUTHSVC_ENV_")) or _LINK.fullmatch(f"{name}={environ[name]}"):
                    continue
                listen = "set AUTHSVC_LISTEN=ADDRESS:PORT, for example 127.0.0.1:5000"
                remedy = listen if name in ("AUTHSVC_PORT", "AUTHSVC_HOST") else "docs/settings.md lists all settings"
                raise SettingsError(f"{name} is not a setting; {remedy}")
            known = readers[name]
            value = _read(name, environ[name], type(known.default))
            if values.setdefault(known.name, value) != value:
                raise SettingsError(f"{name} contradicts its new name {PREFIX}{known.name.upper()}: unset it")
        if "public_url" in values:
            values.setdefault("sessions_per_user", 10)  # people have several devices
        return cls(**values)

    def __post_init__(self) -> None:
        # As browsers write them in an Origin header: in lower case, and without the default port.
        object.__setattr__(self, "public_url", re.sub(r"\A(https://[^/:]+):0*443\Z", r"\1", self.public_url.lower()))
        object.__setattr__(self, "cookie_domain", self.cookie_domain.lower())
        for one in fields(self):
            # Most values are in UTF-8, which Python has misread in another locale.
            stray = _STRAY.search(os.fsencode(str(getattr(self, one.name))).decode(errors="replace"))
            form = "must have no control characters, and no blanks, quotes or comment around it"
            self._require(not stray, one.name, form)
        for name, (least, most) in RANGES.items():
            self._require(least <= getattr(self, name) <= most, name, f"must be from {least} to {most}")
        self._check_database()
        self._require(self.registration in REGISTRATION, "registration", f"must be one of {', '.join(REGISTRATION)}")
        try:
            parse_networks(self.trusted_proxy)
        except ValueError as error:
            self._require(False, "trusted_proxy", _without_password(str(error)))
        paired = bool(self.smtp_url) == bool(self.mail_from)
        self._require(paired, "mail_from", "and AUTHSVC_SMTP_URL must both be set, or neither")
        self._require(not self.mail_from or MAILBOX.fullmatch(self.mail_from), "mail_from", "must be name@host")
        form = "must be smtp+starttls://user@host:port or smtps://…, or smtp:// to this machine, without a password"
        self._require(not self.smtp_url or self.smtp_server, "smtp_url", form)
        self._require(self.smtp_url or not self.confirm_email, "confirm_email", "needs AUTHSVC_SMTP_URL")
        for name, most in ("site_name", 64), ("contact", 500):  # everybody can read them
            text = getattr(self, name)
            public = len(text) <= most and not re.search(r":\S*@|password *=", text, re.IGNORECASE)
            self._require(public, name, f"must be at most {most} characters, without a URL that has a password")
        form = f"must be a PNG, JPEG, WebP or SVG file of at most {MAX_LOGO_BYTES} bytes that can be read"
        self._require(not self.site_logo or self.logo, "site_logo", form)
        if self.metrics_listen:
            parse_listen("AUTHSVC_METRICS_LISTEN", self.metrics_listen)
        listens_locally = self.address[0].is_loopback
        if self.production:
            self._check_production()
        else:
            self._require(not self.cookie_domain, "cookie_domain", "needs AUTHSVC_PUBLIC_URL")
            risk = "is reachable from other machines, and a development service answers with reset tokens"
            remedy = "set AUTHSVC_PUBLIC_URL for production, or AUTHSVC_UNSAFE_LISTEN=1 to accept the risk"
            self._require(listens_locally or self.unsafe_listen, "listen", f"{risk}: {remedy}")

    def _check_database(self) -> None:
        self._require(self.database, "database", "must name a file")
        form = "must be a file or postgresql://user:password@host:port/name, percent-encoded where needed"
        self._require(is_url(self.database) or not _NO_PATH.search(self.database), "database", form)
        if is_url(self.database):
            with suppress(ImportError):  # without psycopg it cannot be checked; engines/postgres.py refuses to open it
                options = _connection_options(self.database)
                self._require(options is not None, "database", form)
                options = options or {}
                encrypted = options.get("sslmode") in ENCRYPTED_MODES or _is_local(options)
                form = "would connect without TLS: add ?sslmode=verify-full"
                self._require(encrypted or not self.production, "database", form)
                if self.database_password_file and not options.get("password"):
                    password = read_password("AUTHSVC_DATABASE_PASSWORD_FILE", self.database_password_file)
                    url, _, query = self.database.partition("?")
                    query = f"{query}&password={quote(password, safe='')}".lstrip("&").replace("&&", "&")
                    object.__setattr__(self, "database", f"{url}?{query}")

    def _check_production(self) -> None:
        host = re.fullmatch(r"https://([a-z0-9-]+(?:\.[a-z0-9-]+)*)(?::([1-9][0-9]{0,4}))?", self.public_url, re.ASCII)
        possible = host and int(host[2] or 443) <= 65535
        self._require(possible, "public_url", "must be https://host or https://host:port, without a path")
        self._require(self.bcrypt_cost >= 10, "bcrypt_cost", "must be at least 10 in production")
        self._require(self.throttle, "throttle", "cannot be off in production")
        self._require(not self.unsafe_listen, "unsafe_listen", "is for development only: unset it")
        domain = self.cookie_domain
        shareable = not domain or (host and f".{host[1]}".endswith(f".{domain}") and "." in domain)
        if host and host[1] != domain:  # an IP address has no parent domain
            shareable = shareable and not domain.rpartition(".")[2].isdigit()
        self._require(shareable, "cookie_domain", "must be the host of AUTHSVC_PUBLIC_URL or a parent domain")
        shared = _SECOND_LEVEL.fullmatch(domain) or domain in _HOSTING.split()
        self._require(not shared, "cookie_domain", "is a suffix under which others have hosts: name a domain of yours")

    def _require(self, fulfilled: object, name: str, requirement: str) -> None:
        if not fulfilled:
            value = _without_password(str(getattr(self, name)))
            secret = name.startswith(("smtp", "database", "mail"))  # the value may contain a password, or be one
            text = "" if secret else f"={value if value.isprintable() and value == value.strip() else repr(value)}"
            # A traceback must not show a first error, whose text may repeat the value.
            raise SettingsError(f"{PREFIX}{name.upper()}{text} {requirement}") from None

    @property
    def production(self) -> bool:
        """Whether this is a production service: one that faces the internet."""
        return self.public_url != ""

    @property
    def base_url(self) -> str:
        """The beginning of links to this service."""
        return self.public_url or f"http://{self.listen}"

    @property
    def origin(self) -> str:
        """The origin of the pages (RFC 6454). In development they are opened on this machine, as localhost."""
        return self.public_url or f"http://localhost:{self.address[1]}".removesuffix(":80")

    @property
    def confirms_email(self) -> bool:
        """Whether anybody can create an account, but only with an email that was confirmed."""
        chosen = self.production and bool(self.smtp_url) if self.confirm_email is None else self.confirm_email
        return chosen and self.registration == "open"

    def tells_clients_apart(self, address: str | None) -> bool:
        """Return whether two clients have two addresses, so that limits per client do no harm.

        ``address`` is that of a client or of its peer, None if it is unknown. In development all clients are on this
        machine. Behind a proxy that is not trusted, all have the address of the proxy.
        """
        return self.production and (bool(self.trusted_proxy) or not is_private_peer(address))

    def warnings(self) -> Iterator[str]:
        """Yield warnings about settings that are allowed but probably not intended."""
        if self.production and not self.trusted_proxy:
            place = "behind a proxy on this machine or on a private network"
            shared = "all clients share one address in the rate limits"
            unlimited = "the limits per client of the queues for password hashing and mails with links are off"
            yield f"AUTHSVC_TRUSTED_PROXY is not set: {place}, {shared}, and {unlimited}"
        for network in filter(is_wide, parse_networks(self.trusted_proxy)):
            risk = "every client inside it can forge its address and so avoid the rate limits"
            yield f"AUTHSVC_TRUSTED_PROXY contains the wide network {network}: {risk}; list only your proxies"
        with suppress(ImportError):
            options = (_connection_options(self.database) if is_url(self.database) else None) or {}
            if options.get("sslmode") == "require" and not _is_local(options):
                remedy = "set sslmode=verify-full, and sslrootcert=system or the file of your certificate authority"
                refused = "the next release will refuse it"
                yield f"AUTHSVC_DATABASE: sslmode=require does not verify the server: {remedy}; {refused}"
        if self.production and not self.smtp_url:
            yield "AUTHSVC_SMTP_URL is not set: no reset link is mailed, and no email is confirmed"

    @property
    def smtp_server(self) -> SplitResult | None:
        """The mail server: scheme, username, hostname and port. None if no mail is sent."""
        # Anyone who reads a reset link in transit can take over the account. Only this machine is asked without TLS.
        with suppress(ValueError):  # the port is not a number, or out of range
            url = urlsplit(self.smtp_url)
            encrypted = url.scheme in ("smtp+starttls", "smtps") or (url.scheme == "smtp" and is_loopback(url.hostname))
            usable = encrypted and url.hostname and url.port != 0 and not url.password
            if usable and not (url.path.strip("/") or url.query or url.fragment):  # perhaps the rest of a password
                return url
        return None

    @property
    def logo(self) -> str:
        """The logo as a ``data:`` URL, so that a page needs no further request. "" if there is none."""
        with suppress(OSError), Path(self.site_logo).open("rb") as file:
            content = file.read(MAX_LOGO_BYTES + 1)
            kind = next((kind for kind, start in LOGOS.items() if content.startswith(start)), "")
            if kind and len(content) <= MAX_LOGO_BYTES:
                return f"data:image/{kind};base64,{b64encode(content).decode()}"
        return ""

    @property
    def address(self) -> tuple[Address, int]:
        """The IP address and port to listen on."""
        return parse_listen("AUTHSVC_LISTEN", self.listen)


def parse_listen(name: str, text: str) -> tuple[Address, int]:
    """Return the IP address and port in the value of a setting.

    Raises:
        SettingsError: it has another form. The message names the setting.
    """
    # Host names are refused: one that later resolves to another address could expose the service to a network.
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):([0-9]{1,5})", text, re.ASCII)
    host = (found[1] or found[2]) if found else ""
    address = parse_address("127.0.0.1" if host == "localhost" else host)
    if not found or not address or int(found[3]) > 65535:
        form = "ADDRESS:PORT, for example 127.0.0.1:5000 or [::1]:5000"
        raise SettingsError(f"{name}={_without_password(text)!r} must be {form}")
    return address, int(found[3])


def read_password(name: str, path: str) -> str:
    """Return the password in the file that a setting names, without the line break at its end.

    Raises:
        SettingsError: the file cannot be read, or holds no password.
    """
    try:
        password = Path(path).read_text(encoding="utf-8-sig").rstrip("\r\n")
    except (OSError, ValueError) as error:
        # The path is not shown: it may be the password itself, in the wrong setting.
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingsError(f"{name} cannot be read: {reason}") from None
    if not password:
        raise SettingsError(f"{name} names a file without a password")
    if re.search("[\0\r\n]", password):  # UTF-16 without a byte order mark has NUL
        raise SettingsError(f"{name} names a file that is not one line of UTF-8")
    return password


def is_url(database: str) -> bool:
    """Return whether a database is given as a PostgreSQL URL. Otherwise it is the path of a SQLite file."""
    return database.startswith(("postgres:", "postgresql:"))


def redacted(database: str) -> str:
    """Return the name of a database for messages: a path, or "name on host" for a URL, which may contain a password."""
    if not is_url(database):
        return database
    with suppress(ImportError):
        if (options := _connection_options(database)) is not None:
            named = [(f"[{host}]" if ":" in host else host, port) for host, port in _servers(options) if host]
            servers = ",".join(f"{host}:{port}" if port else host for host, port in named)
            return f"{options.get('dbname') or 'PostgreSQL'} on {servers or 'this machine'}"
    return "PostgreSQL"


def _connection_options(url: str) -> dict[str, str] | None:
    """Return the connection options in a PostgreSQL URL, or None if it is malformed or ambiguous.

    Raises:
        ImportError: psycopg is not installed.
    """
    from psycopg import Error
    from psycopg.conninfo import conninfo_to_dict

    try:
        options = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except (Error, ValueError):  # ValueError: not valid UTF-8. Both messages may repeat the password and are dropped.
        return None
    plausible = all(_HOST.fullmatch(host) and re.fullmatch("[0-9]{0,5}", port) for host, port in _servers(options))
    plausible = plausible and not re.search("[=@]", options.get("dbname", ""))  # a connection string with a password
    return options if plausible and _URL.fullmatch(url) else None


def _servers(options: dict[str, str]) -> list[tuple[str, str]]:
    """Return hosts and ports. As in libpq, hostaddr takes precedence, and "" is the Unix socket of this machine."""
    hosts = options.get("hostaddr") or options.get("host") or ""
    return list(zip_longest(hosts.split(","), options.get("port", "").split(","), fillvalue=""))


def _is_local(options: dict[str, str]) -> bool:
    # A service file can name any host, and libpq uses the host instead of an empty entry in hostaddr.
    elsewhere = {"service", "hostaddr"} & options.keys()
    return not elsewhere and all(not host or host.startswith("/") or is_loopback(host) for host, _ in _servers(options))


def _without_password(text: str) -> str:
    """Return a value for messages. The URL of another setting may be in it by mistake, with a password."""
    return re.sub(r"(//|:).*(?=@)|(password *=).*", r"\1\2…", text, flags=re.DOTALL | re.IGNORECASE)


def _read(name: str, text: str, kind: type) -> str | int | bool:
    if not text:  # a broken environment file must not silently turn production into development
        raise SettingsError(f"{name} is set but empty: give it a value or unset it")
    if kind in (bool, type(None)):
        if text not in SWITCH:
            raise SettingsError(f"{name}={_without_password(text)!r} must be on or off (or 1 or 0)")
        return SWITCH[text]
    if kind is int:
        if not re.fullmatch("[0-9]{1,9}", text, re.ASCII):
            raise SettingsError(f"{name}={_without_password(text)!r} must be a whole number")
        return int(text)
    return text
