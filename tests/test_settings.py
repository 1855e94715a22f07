"""Settings: how each variable is read, and which values are refused."""

from __future__ import annotations

import base64
import re
import sys
import traceback
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from mail import Mailer
from settings import RANGES, Settings, SettingsError, read_password, redacted
from tests.cases import each

DEFAULTS = {
    "listen": "127.0.0.1:5000",
    "database": "authsvc.db",
    "database_password_file": "",
    "public_url": "",
    "bcrypt_cost": 12,
    "throttle": True,
    "sessions_per_user": 1,
    "session_idle": 604_800,
    "session_lifetime": 2_592_000,
    "reset_lifetime": 600,
    "password_min": 15,
    "registration": "open",
    "confirm_email": None,
    "require_second_factor": False,
    "trusted_proxy": "",
    "cookie_domain": "",
    "smtp_url": "",
    "smtp_password_file": "",
    "mail_from": "",
    "site_name": "",
    "site_logo": "",
    "metrics_listen": "",
    "contact": "",
    "unsafe_listen": False,
}

NUMBERS = {  # the smallest and the largest value
    "AUTHSVC_BCRYPT_COST": (4, 15),
    "AUTHSVC_SESSIONS_PER_USER": (1, 100),
    "AUTHSVC_SESSION_IDLE": (1, 31_536_000),
    "AUTHSVC_SESSION_LIFETIME": (1, 31_536_000),
    "AUTHSVC_RESET_LIFETIME": (1, 3600),
    "AUTHSVC_PASSWORD_MIN": (8, 64),
}

NO_NUMBERS = [
    "",
    " ",
    " 5",
    "5 ",
    "5\n",
    "+5",
    "-5",
    "1_0",
    "5.0",
    "5e0",
    "0x5",
    "five",
    "٥",
    "５",
    "²",
    "9" * 10,
    "5\0",
]

REACHABLE = ["0.0.0.0:5000", "[::]:5000", "192.168.0.1:80", "10.0.0.1:0", "[fe80::1]:80", "[2001:db8::1]:80"]
REACHABLE += ["[::ffff:0.0.0.0]:80", "[::ffff:10.0.0.1]:80"]

NO_ADDRESSES = [
    ":",
    "5000",
    ":5000",
    "127.0.0.1",
    "127.0.0.1:",
    "127.0.0.1:65536",
    "127.0.0.1:99999999",
    "127.0.0.1:-1",
    "127.0.0.1:+5",
    "127.0.0.1: 5",
    "127.0.0.1:5\n",
    "127.0.0.1:1_0",
    "127.0.0.1:٥",
    "١٢٧.0.0.1:5000",
    " 127.0.0.1:5000",
    "127.1:5000",
    "127.0.0.01:5000",
    "2130706433:5000",
    "::1:5000",
    "::1",
    "[::1]",
    "[::1]5000",
    "[::1%lo]:5000",
    "[]:5000",
    "[localhost]:5000",
    "LOCALHOST.:5000",
    "example.com:5000",
    "*:5000",
    "http://127.0.0.1:5000",
    "/run/authsvc.sock",
    "127.0.0.1:5000,127.0.0.1:5001",
]


def refusal(environ: dict[str, str]) -> str:
    """Return the message of the refusal, after checking that it is one line."""
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ(environ)
    message = str(caught.value)
    assert message
    assert message.splitlines() == [message]
    return message


def test_the_defaults_are_the_documented_ones() -> None:
    assert asdict(Settings()) == asdict(Settings.from_environ({})) == DEFAULTS


def test_the_environment_is_read_when_settings_are_created(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTHSVC_BCRYPT_COST", "5")
    assert Settings.from_environ().bcrypt_cost == 5


@each(
    ("name", "text", "value"),
    [
        ("AUTHSVC_LISTEN", "127.0.0.1:0", "127.0.0.1:0"),
        ("AUTHSVC_DATABASE", "/var/lib/a b.db", "/var/lib/a b.db"),
        ("AUTHSVC_DATABASE_PASSWORD_FILE", "/not/read/for/a/file", "/not/read/for/a/file"),
        ("AUTHSVC_BCRYPT_COST", "4", 4),
        ("AUTHSVC_THROTTLE", "off", False),
        ("AUTHSVC_SESSIONS_PER_USER", "3", 3),
        ("AUTHSVC_SESSION_IDLE", "60", 60),
        ("AUTHSVC_SESSION_LIFETIME", "3600", 3600),
        ("AUTHSVC_RESET_LIFETIME", "60", 60),
        ("AUTHSVC_PASSWORD_MIN", "8", 8),
        ("AUTHSVC_TRUSTED_PROXY", "::1", "::1"),
        ("AUTHSVC_SMTP_PASSWORD_FILE", "/etc/authsvc/smtp", "/etc/authsvc/smtp"),
        ("AUTHSVC_SITE_NAME", "Rowing Club <1894>", "Rowing Club <1894>"),
        ("AUTHSVC_METRICS_LISTEN", "10.0.0.5:9464", "10.0.0.5:9464"),
        ("AUTHSVC_CONTACT", "Ask Eve, eve@example.com.", "Ask Eve, eve@example.com."),
        ("AUTHSVC_UNSAFE_LISTEN", "1", True),
    ],
)
def test_a_variable_sets_its_own_field_only(name: str, text: str, value: object) -> None:
    expected = DEFAULTS | {name.removeprefix("AUTHSVC_").lower(): value}
    assert asdict(Settings.from_environ({name: text})) == expected
    assert expected != DEFAULTS


@pytest.mark.parametrize("name", ["AUTHSVC_REQUIRE_SECOND_FACTOR", "AUTHSVC_REQUIRE_TOTP"])
def test_a_second_factor_is_required_under_the_new_and_the_former_name(name: str) -> None:
    assert asdict(Settings.from_environ({name: "on"})) == DEFAULTS | {"require_second_factor": True}
    both = {"AUTHSVC_REQUIRE_SECOND_FACTOR": "on", "AUTHSVC_REQUIRE_TOTP": "1"}
    assert Settings.from_environ(both).require_second_factor is True
    assert refusal({**both, name: "off"}) == (
        "AUTHSVC_REQUIRE_TOTP contradicts its new name AUTHSVC_REQUIRE_SECOND_FACTOR: unset it"
    )


@pytest.mark.parametrize(("chosen", "number"), [({}, 10), ({"AUTHSVC_SESSIONS_PER_USER": "1"}, 1)])
def test_in_production_a_user_has_ten_sessions_unless_set(chosen: dict[str, str], number: int) -> None:
    environ = {"AUTHSVC_PUBLIC_URL": "https://auth.example.com", **chosen}
    assert Settings.from_environ(environ).sessions_per_user == number


def test_every_number_has_a_range_and_is_tested() -> None:
    numbers = {name for name, value in asdict(Settings()).items() if type(value) is int}
    assert RANGES.keys() == numbers
    assert {f"AUTHSVC_{name.upper()}": limits for name, limits in RANGES.items()} == NUMBERS


@each("name", NUMBERS)
def test_a_number_outside_its_range_is_refused(name: str) -> None:
    least, most = NUMBERS[name]
    field = name.removeprefix("AUTHSVC_").lower()
    for number in least, most:
        assert getattr(Settings.from_environ({name: str(number)}), field) == number
    for number in 0, least - 1, most + 1:
        assert re.search(rf"{name}\b.*\b{least}\b.*\b{most}\b", refusal({name: str(number)}))


@each("text", NO_NUMBERS)
def test_text_that_is_not_a_number_is_refused(text: str) -> None:
    for name in NUMBERS:
        assert name in refusal({name: text})


@each(("text", "value"), [("on", True), ("1", True), ("off", False), ("0", False)])
@each("name", ["AUTHSVC_THROTTLE", "AUTHSVC_UNSAFE_LISTEN"])
def test_a_switch_is_on_or_off(name: str, text: str, value: bool) -> None:
    assert asdict(Settings.from_environ({name: text}))[name.removeprefix("AUTHSVC_").lower()] is value


@each("text", ["", " ", "On", "OFF", "of", "true", "yes", "no", "2", "01", "١", "on ", "1\n"])
def test_a_misspelt_switch_is_refused(text: str) -> None:
    for name in "AUTHSVC_THROTTLE", "AUTHSVC_UNSAFE_LISTEN":
        assert name in refusal({name: text})


@each(
    "name", ["AUTHSVC_", "AUTHSVC_BCRYPTCOST", "AUTHSVC_Listen", "AUTHSVC_LISTEN ", "AUTHSVC_ADDRESS", "AUTHSVC_DEBUG"]
)
def test_an_unknown_variable_is_refused(name: str) -> None:
    assert refusal({name: "1"}).startswith(f"{name} ")


@each(
    "name",
    [
        "AUTHSVC_PUBLIC_URL",
        "AUTHSVC_PASSWORD_MIN",
        "AUTHSVC_TRUSTED_PROXY",
        "AUTHSVC_COOKIE_DOMAIN",
        "AUTHSVC_SMTP_URL",
        "AUTHSVC_SMTP_PASSWORD_FILE",
        "AUTHSVC_MAIL_FROM",
    ],
)
def test_an_empty_variable_is_refused(name: str) -> None:
    assert refusal({name: ""}).startswith(f"{name} is set but empty")


@each("name", ["AUTHSVC_URL", "AUTHSVCX", "authsvc_listen", "LISTEN", "XAUTHSVC_LISTEN"])
def test_variables_of_other_programs_are_ignored(name: str) -> None:
    assert Settings.from_environ({name: "nonsense"}) == Settings()


# What Kubernetes sets in every pod beside a Service named authsvc or authsvc-postgresql, and Docker for a link.
SERVICE_LINKS = {
    "AUTHSVC_SERVICE_HOST": "10.96.0.12",
    "AUTHSVC_SERVICE_PORT": "5000",
    "AUTHSVC_SERVICE_PORT_HTTP_MAIN": "5000",
    "AUTHSVC_PORT": "tcp://10.96.0.12:5000",
    "AUTHSVC_PORT_5000_TCP": "tcp://10.96.0.12:5000",
    "AUTHSVC_PORT_5000_TCP_ADDR": "10.96.0.12",
    "AUTHSVC_PORT_5000_TCP_PORT": "5000",
    "AUTHSVC_PORT_5000_TCP_PROTO": "tcp",
    "AUTHSVC_PORT_6000_TCP_START": "tcp://172.17.0.2:6000",
    "AUTHSVC_PORT_6000_TCP_PORT_START": "6000",
    "AUTHSVC_PORT_6009_TCP_END": "tcp://172.17.0.2:6009",
    "AUTHSVC_PORT_6009_TCP_PORT_END": "6009",
    "AUTHSVC_PORT_53_UDP": "udp://[fd00::c]:53",
    "AUTHSVC_PORT_53_UDP_ADDR": "fd00::c",
    "AUTHSVC_PORT_53_UDP_PROTO": "udp",
    "AUTHSVC_POSTGRESQL_SERVICE_HOST": "fd00::d",
    "AUTHSVC_POSTGRESQL_SERVICE_PORT_TCP_POSTGRESQL": "5432",
    "AUTHSVC_POSTGRESQL_PORT": "tcp://[fd00::d]:5432",
    "AUTHSVC_NAME": "/web/authsvc",
}


@each("name", SERVICE_LINKS)
def test_the_variables_of_a_service_of_our_name_are_ignored(name: str) -> None:
    assert Settings.from_environ({name: SERVICE_LINKS[name]}) == Settings()


@pytest.mark.parametrize("value", ["on", "", "postgresql://u:canary@db/x"])
def test_the_environment_of_a_linked_container_is_ignored_where_there_is_a_link(value: str) -> None:
    environ = {"AUTHSVC_ENV_AUTHSVC_DATABASE": value}
    assert Settings.from_environ(environ | {"AUTHSVC_NAME": "/web/authsvc"}) == Settings()
    for name in {}, {"AUTHSVC_NAME": "on"}, {"AUTHSVC_NAME": "/web/authsvc", "AUTHSVC_ENVIRONMENT": "on"}:
        assert re.match(r"AUTHSVC_(ENV_AUTHSVC_DATABASE|NAME|ENVIRONMENT) is not a setting", refusal(environ | name))


@each("name", SERVICE_LINKS)
def test_a_variable_of_a_service_with_another_value_is_refused(name: str) -> None:
    for value in "on", "", f"{SERVICE_LINKS[name]}\n", "https://x":
        assert re.match(rf"{name}\b", refusal({name: value}))


@each(
    ("name", "value"),
    [
        ("AUTHSVC_PORT", "tcp://user:canary@host"),
        ("AUTHSVC_PORT_5000", "tcp://10.96.0.12:5000"),
        ("AUTHSVC_PORT_5000_TCP_PROTO", "5000"),
        ("AUTHSVC_PORT_START", "tcp://172.17.0.2:6000"),
        ("AUTHSVC_PORT_6000_TCP_START", "6000"),
        ("AUTHSVC_SERVICE_PORT", "10.96.0.12"),
        ("AUTHSVC_SERVICES_HOST", "10.96.0.12"),
        ("AUTHSVC_LISTEN", "tcp://10.96.0.12:5000"),
    ],
)
def test_a_variable_that_only_resembles_those_of_a_service_is_refused(name: str, value: str) -> None:
    message = refusal({name: value})
    assert re.match(rf"{name}\b", message)
    assert "canary" not in message


@pytest.mark.parametrize(("name", "value"), [("AUTHSVC_PORT", "8080"), ("AUTHSVC_HOST", "0.0.0.0")])
def test_a_port_or_a_host_is_refused_with_a_hint_at_the_setting_for_both(name: str, value: str) -> None:
    hint = "set AUTHSVC_LISTEN=ADDRESS:PORT, for example 127.0.0.1:5000"
    assert refusal({name: value}) == f"{name} is not a setting; {hint}"


@each(
    ("listen", "host", "port"),
    [
        ("127.0.0.1:5000", "127.0.0.1", 5000),
        ("127.0.0.2:0", "127.0.0.2", 0),
        ("127.255.255.254:65535", "127.255.255.254", 65535),
        ("localhost:80", "127.0.0.1", 80),
        ("[::1]:5000", "::1", 5000),
        ("[0:0:0:0:0:0:0:1]:1", "::1", 1),
    ],
)
def test_loopback_addresses_are_accepted(listen: str, host: str, port: int) -> None:
    address, chosen_port = Settings.from_environ({"AUTHSVC_LISTEN": listen}).address
    assert (str(address), chosen_port) == (host, port)


@each("listen", REACHABLE)
def test_listening_beyond_loopback_needs_the_override(listen: str) -> None:
    environ = {"AUTHSVC_LISTEN": listen}
    for switched_off in {}, {"AUTHSVC_UNSAFE_LISTEN": "0"}:
        message = refusal(environ | switched_off)
        assert message.startswith(f"AUTHSVC_LISTEN={listen} ")
        assert "AUTHSVC_UNSAFE_LISTEN=1" in message
    assert Settings.from_environ(environ | {"AUTHSVC_UNSAFE_LISTEN": "1"}).listen == listen


@each("listen", NO_ADDRESSES)
def test_an_invalid_address_is_refused_even_with_the_override(listen: str) -> None:
    for override in {}, {"AUTHSVC_UNSAFE_LISTEN": "1"}:
        assert refusal({"AUTHSVC_LISTEN": listen} | override).startswith("AUTHSVC_LISTEN=")


MALFORMED_URLS = [
    *("postgres:canary", "postgresql:/canary", "postgresql://user:canary@host/db#canary"),
    *("postgresql://user:can@ry-canary@host/db", "postgresql://user:1/canary@host/db", "postgres://u:canary/x@host"),
    *("postgres://u:1?canary@host/db", "postgres://u:1#canary@host/db", "postgres://u:canary", "postgres://h/d@canary"),
    *("postgresql://u:canary@host:port/db", "postgresql://u:canary@ho st/db", "postgresql://u:canary@h/d?a=b@canary"),
    *("postgres://u:can%ary@host/db", "postgres://u:canary%00@host/db", "postgres://host/db?password=canary%"),
    *("postgres://u:canary%ff@host/db", "postgres://u:canary\udcff@host/db", "postgres://[::1]canary/db"),
    *("postgres://host/db?password=x&canary", "postgres://host/db?password=x=canary", "postgres://host/db?canary=1"),
    *("postgres://u:canary@host/a/b", "postgres://u:canary@host:123456/a", "postgres://u:canary@host/a\n"),
    *("postgres://u%3Acanary%40host/db", "postgres://h/d?host=u%3Acanary%40host", "postgres://h/d?host=%40canary"),
    *("postgres://h/d?port=canary", "postgres://h/d?hostaddr=127.0.0.1,%2F%40canary"),
]


@each("database", ["", *MALFORMED_URLS])
def test_a_malformed_database_url_is_refused_without_showing_it(database: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(database=database)
    assert "canary" not in "".join(traceback.format_exception(caught.value))
    message = refusal({"AUTHSVC_DATABASE": database})
    assert message.startswith("AUTHSVC_DATABASE")
    assert "canary" not in message  # the canary is a password, and the message goes to a log


# Neither the URL that the service takes nor the path of a file.
FOREIGN_URLS = [
    *("postgresql+psycopg://u:canary@db/x", "POSTGRESQL://u:canary@db/x", "Postgres:canary", "mysql://u:canary@db/x"),
    *("jdbc:postgresql://db/x?password=canary", "sqlite:///canary", "u:canary@db/x", "//u:canary@db/x", "u:can/ary@db"),
    *(
        "host=db user=u password=canary",
        "DATABASE_URL=postgresql://u:canary@db/x",
        "/a b/password = canary",
        "C:\\canary",
    ),
    *(" postgresql://u:canary@db/x", "'postgresql://u:canary@db/x'", '"canary"', "canary\r", "canary\u200b"),
    *("postgresql://db/user=u%20password=canary", "postgresql://db/x?dbname=u:canary%40db"),
]


@each("database", FOREIGN_URLS)
def test_what_is_neither_a_path_nor_our_url_is_refused_without_showing_it(database: str) -> None:
    message = refusal({"AUTHSVC_DATABASE": database})
    assert message.startswith("AUTHSVC_DATABASE must ")
    assert "canary" not in message


@each("path", ["a b@c.db", "/data/a:b.db", "./a:b@c.db", "/x=1/y.db", "données.db", "\udcff.db", "O'x'"])
def test_the_path_of_a_database_may_have_unusual_characters(path: str) -> None:
    assert redacted(Settings.from_environ({"AUTHSVC_DATABASE": path}).database) == path


@each("name", ["SMTP_URL", "MAIL_FROM", "SMTP_PASSWORD_FILE", "DATABASE_PASSWORD_FILE"])
def test_a_password_in_the_wrong_setting_is_not_shown(name: str) -> None:
    for value in "canary", "canary ", "u:canary", "postgresql://u:x@db/x?password=can@canary":
        environ = {"AUTHSVC_SMTP_URL": "smtps://mail.example.com", "AUTHSVC_MAIL_FROM": "a@x"}
        if "FILE" not in name or value == "canary ":
            assert "canary" not in refusal(environ | {f"AUTHSVC_{name}": value})


@each("name", [f"AUTHSVC_{name.upper()}" for name in DEFAULTS if "_file" not in name])
def test_a_url_in_the_wrong_setting_is_refused_without_its_password(name: str) -> None:
    for value in "https://user:can/ary@host", "user:canary@host\n", "postgres:host/db?a=1&password=can/ary#":
        with pytest.raises(SettingsError, match=name) as caught:
            Settings.from_environ({name: value})
        assert not re.search("canary|can/ary", "".join(traceback.format_exception(caught.value)))


# What an environment file leaves in a value: the line breaks of Windows, blanks, and quotes that no shell removes.
STRAY = [
    "{}\r",
    "{}\n",
    " {}",
    "{} ",
    "{}\t",
    "\xa0{}",
    "{}\u3000",
    '"{}"',
    "'{}'",
    "{}\x00",
    "{}\x1b[0m",
    "{}\x9b",
    "\ufeff{}",
    "{}\xad",
    "{}\u2069",
    '"{}',
    "{}'",
    "{} # a comment",
]


@each("name", [f"AUTHSVC_{name.upper()}" for name in DEFAULTS])
def test_a_value_with_stray_characters_is_refused(name: str) -> None:
    default = getattr(Settings(), name.removeprefix("AUTHSVC_").lower())
    values = {"AUTHSVC_SMTP_URL": "smtps://mail.example.com", "AUTHSVC_PUBLIC_URL": "https://auth.example.com"}
    value = values.get(name) or {True: "on", False: "off"}.get(default, str(default) or "name@example.com")
    for form in STRAY:
        assert refusal({name: form.format(value)}).startswith(name), form


@pytest.mark.parametrize("database", ["authsvc.db\r", " authsvc.db", "'authsvc.db'"])
def test_a_stray_character_is_refused_in_settings_from_the_constructor(database: str) -> None:
    with pytest.raises(
        SettingsError, match="AUTHSVC_DATABASE must have no control characters, and no blanks, quotes or comment"
    ):
        Settings(database=database)


@each("database", MALFORMED_URLS)
def test_a_malformed_database_url_has_no_name_to_show(database: str) -> None:
    assert redacted(database) == "PostgreSQL"


def test_the_path_of_a_database_is_shown_unchanged() -> None:
    assert redacted("/var/lib/a b@c.db") == "/var/lib/a b@c.db"


@pytest.mark.parametrize("form", ["{}", "{}?sslmode=verify-full", "{}?", "{}?a=b&", "postgresql://u@h"])
def test_a_password_in_a_file_becomes_part_of_the_url(tmp_path: Path, form: str) -> None:
    secret = "?&c=%n@ry#/ …'\\"
    (tmp_path / "password").write_bytes(f"{secret}\r\n".encode())
    url = form.format("postgresql://u@db/x").replace("a=b", "application_name=b")
    settings = Settings.from_environ(
        {"AUTHSVC_DATABASE": url, "AUTHSVC_DATABASE_PASSWORD_FILE": str(tmp_path / "password")}
    )
    options = conninfo_to_dict(settings.database)
    assert options.pop("password") == secret
    assert options == conninfo_to_dict(url)
    assert redacted(settings.database) == redacted(url)
    assert "n@ry" not in repr(settings)
    assert replace(settings).database == settings.database
    assert replace(settings, database="new.db").database == "new.db"  # the target of a copy
    own = replace(settings, database="postgresql://u:own@db/x").database
    assert conninfo_to_dict(own)["password"] == "own"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"can\xffary", "cannot be read: it is not UTF-8"),
        ("canary".encode("utf-16"), "cannot be read: it is not UTF-8"),
        (b"", "names a file without a password"),
        (b"\r\n", "names a file without a password"),
        (b"can\0ary", "names a file that is not one line of UTF-8"),
        ("canary".encode("utf-16-le"), "names a file that is not one line of UTF-8"),
        ("canary\r\n".encode("utf-16-be"), "names a file that is not one line of UTF-8"),
        (b"\xef\xbb\xbfcanary\nanother line\n", "names a file that is not one line of UTF-8"),
        ("canärÿ".encode("latin-1"), "cannot be read: it is not UTF-8"),
        (b"\xef\xbb\xbf\r\n", "names a file without a password"),
    ],
)
@pytest.mark.parametrize("name", ["AUTHSVC_DATABASE_PASSWORD_FILE", "AUTHSVC_SMTP_PASSWORD_FILE"])
def test_a_password_file_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "canary"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as refused:
        Mailer(Settings.from_environ({name: str(path), "AUTHSVC_DATABASE": "postgresql://u@db/x"}), print)
    assert str(refused.value) == f"{name} {reason}"


@each("host", ["127.0.0.1", "127.1.2.3:2525", "localhost", "[::1]:25", "[::ffff:127.0.0.1]", "u@[::1]"])
def test_a_relay_on_this_machine_needs_no_tls(host: str) -> None:
    assert Settings(smtp_url=f"smtp://{host}", mail_from="a@x").smtp_server
    with pytest.raises(SettingsError, match="or smtp:// to this machine"):
        Settings(smtp_url=f"smtp://{host.replace('1', '2').replace('local', 'remote')}", mail_from="a@x")


def test_a_byte_order_mark_is_no_part_of_a_password(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes("\ufeffp4sswörd\r\n".encode())
    assert read_password("AUTHSVC_SMTP_PASSWORD_FILE", str(tmp_path / "password")) == "p4sswörd"


@each("public_url", ["", "https://auth.example.com"])
@each(
    ("url", "warned"),
    [
        ("postgresql://u@db.example.com/x?sslmode=require", True),
        ("postgresql://u@db.example.com/x?ssl=true", True),
        ("postgresql://u@localhost,db.example.com/x?sslmode=require&sslrootcert=/ca.pem", True),
        ("postgresql://u@/x?hostaddr=192.0.2.1&sslmode=require", True),
        ("postgresql://u@db.example.com/x?sslmode=verify-ca", False),
        ("postgresql://u@db.example.com/x?sslmode=verify-full", False),
        ("postgresql://u@localhost/x?sslmode=require", False),
        ("postgresql://u@127.0.0.1,[::1]/x?sslmode=require", False),
        ("postgresql:///x?host=/run/postgresql&sslmode=require", False),
    ],
)
def test_a_server_elsewhere_that_is_not_verified_gives_a_warning(public_url: str, url: str, warned: bool) -> None:
    found = [line for line in Settings(database=url, public_url=public_url).warnings() if "AUTHSVC_DATABASE" in line]
    assert len(found) == warned
    for warning in found:
        assert warning.startswith("AUTHSVC_DATABASE: sslmode=require does not verify the server")
        assert "set sslmode=verify-full, and sslrootcert=system or" in warning
        assert warning.endswith("the next release will refuse it")


def test_without_psycopg_a_database_url_is_left_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    url = "postgresql://u:canary@db.example.com/db"
    assert Settings(database=url, public_url="https://auth.example.com").database == url
    assert redacted(url) == "PostgreSQL"


# A URL, its redacted form, and whether production accepts it: it is local or requires TLS.
URLS = {
    "postgresql://": ("PostgreSQL on this machine", True),
    "postgresql:///db": ("db on this machine", True),
    "postgres://user:canary@/db?host=/run/postgresql": ("db on /run/postgresql", True),
    "postgres://user:canary@%2Frun%2Fpostgresql:5433/db": ("db on /run/postgresql:5433", True),
    "postgres://user:canary@localhost/db": ("db on localhost", True),
    "postgres://user:canary@127.0.0.1:5432/db": ("db on 127.0.0.1:5432", True),
    "postgres://user:canary@[::1]:5432/db": ("db on [::1]:5432", True),
    "postgres://user:canary@[2001:db8::1]/db": ("db on [2001:db8::1]", False),
    "postgres://user:canary@db.example.com/db": ("db on db.example.com", False),
    "postgres://user:canary@db.example.com/db?sslmode=prefer": ("db on db.example.com", False),
    "postgres://user:canary@db.example.com/db?sslmode=verify-full&sslmode=disable": ("db on db.example.com", False),
    "postgres://user:canary@db.example.com/db?sslmode=require": ("db on db.example.com", True),
    "postgres://user:canary@db.example.com/db?sslmode=verify-ca": ("db on db.example.com", True),
    "postgresql://u:canary@a,b:5433/db?sslmode=verify-full&target_session_attrs=read-write": ("db on a,b:5433", True),
    "postgresql://u:canary@localhost,b:5433/db": ("db on localhost,b:5433", False),
    "postgresql://u:canary@localhost/db?host=db.example.com": ("db on db.example.com", False),
    "postgresql://u:canary@localhost/db?hostaddr=192.0.2.1": ("db on 192.0.2.1", False),
    "postgresql://localhost,db.example.com/db?hostaddr=127.0.0.1,": ("db on 127.0.0.1", False),
    "postgresql://u@localhost/db?password=canary": ("db on localhost", True),
    "postgresql://u:canary@localhost:5433/db?hostaddr=::1": ("db on [::1]:5433", False),
    "postgresql://u:canary@localhost/db?host=localhost,,db.example.com&port=1,2": (
        "db on localhost:1,db.example.com",
        False,
    ),
    "postgresql://u:canary@db.example.com/my%20db?ssl=true": ("my db on db.example.com", True),
    "postgresql://?service=elsewhere": ("PostgreSQL on this machine", False),
}


@each("url", URLS)
def test_a_database_url_is_accepted_and_its_password_never_shown(url: str) -> None:
    name, accepted = URLS[url]
    settings = Settings(database=url)
    assert settings.database == url
    assert redacted(url) == name
    assert "canary" not in repr(settings)
    production = {"AUTHSVC_DATABASE": url, "AUTHSVC_PUBLIC_URL": "https://auth.example.com"}
    if accepted:
        assert Settings.from_environ(production).database == url
    else:
        message = refusal(production)
        assert message == "AUTHSVC_DATABASE would connect without TLS: add ?sslmode=verify-full"


@each(
    "values",
    [
        {"bcrypt_cost": 3},
        {"bcrypt_cost": 16},
        {"sessions_per_user": 0},
        {"session_idle": 0},
        {"session_lifetime": -1},
        {"reset_lifetime": 3601},
        {"database": ""},
        {"database": "postgresql://host/db/db"},
        {"listen": "0.0.0.0:5000"},
        {"listen": "nowhere"},
        {"listen": "nowhere", "unsafe_listen": True},
    ],
)
def test_settings_from_the_constructor_are_checked_too(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"AUTHSVC_{next(iter(values)).upper()}"):
        Settings(**values)


def test_settings_are_immutable() -> None:
    settings = Settings()
    for field in fields(Settings):
        with pytest.raises(FrozenInstanceError):
            setattr(settings, field.name, None)


@each("text", ["127.0.0.1", "127.0.0.1, 10.20.0.0/16,2001:db8::/48", "::ffff:10.20.0.0/112", "8.0.0.0/16"])
def test_trusted_proxies_are_addresses_and_networks(text: str) -> None:
    settings = Settings.from_environ({"AUTHSVC_TRUSTED_PROXY": text})
    assert settings.trusted_proxy == text
    assert list(settings.warnings()) == []


@each(
    ("text", "reason"),
    [
        ("proxy", "must list IP addresses and networks, and 'proxy' is neither"),
        ("127.0.0.1, proxy.example.com", "must list IP addresses and networks, and 'proxy.example.com' is neither"),
        ("127.0.0.1:80", "must list IP addresses and networks, and '127.0.0.1:80' is neither"),
        ("10.0.0.0/255.0.0.0", "must list IP addresses and networks, and '10.0.0.0/255.0.0.0' is neither"),
        ("127.0.0.1,", "has an empty item: remove the extra comma"),
        ("127.0.0.1,,::1", "has an empty item: remove the extra comma"),
        ("::1, 10.0.0.1/8", "must name a network by its first address: write 10.0.0.0/8 instead of '10.0.0.1/8'"),
        ("fe80::1%eth0", "must list addresses without a zone, and 'fe80::1%eth0' has one"),
        ("0.0.0.0/0", "must not contain '0.0.0.0/0': every client could then forge its address"),
        ("127.0.0.1, ::/0", "must not contain '::/0': every client could then forge its address"),
        ("::ffff:0.0.0.0/96", "must not contain '::ffff:0.0.0.0/96': every client could then forge its address"),
    ],
)
def test_a_trusted_proxy_that_is_refused_is_named(text: str, reason: str) -> None:
    assert refusal({"AUTHSVC_TRUSTED_PROXY": text}) == f"AUTHSVC_TRUSTED_PROXY={text} {reason}"
    with pytest.raises(SettingsError, match="AUTHSVC_TRUSTED_PROXY"):
        Settings(trusted_proxy=text)


@each(
    ("text", "networks"),
    [
        ("10.0.0.0/8", ["10.0.0.0/8"]),
        ("127.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16", ["172.16.0.0/12"]),
        ("::ffff:10.0.0.0/104,fd00::/8", ["10.0.0.0/8", "fd00::/8"]),
        ("8.0.0.0/8, 2001:db8::/31, 2001:db8::/32", ["8.0.0.0/8", "2001:db8::/31"]),
    ],
)
def test_a_wide_network_of_trusted_proxies_gives_a_warning(text: str, networks: list[str]) -> None:
    warnings = list(Settings(trusted_proxy=text).warnings())
    assert len(warnings) == len(networks)
    for warning, network in zip(warnings, networks, strict=True):
        assert f" {network}: every client inside it can forge its address" in warning


def test_only_production_warns_of_a_missing_proxy() -> None:
    assert list(Settings().warnings()) == []
    missing, _ = Settings(public_url="https://auth.example.com").warnings()
    assert missing.startswith("AUTHSVC_TRUSTED_PROXY is not set: ")
    assert "on this machine or on a private network" in missing
    assert "all clients share one address in the rate limits" in missing
    assert missing.endswith("the limits per client of the queues for password hashing and mails with links are off")


@each(
    ("public_url", "trusted_proxy", "address", "apart"),
    [
        ("", "127.0.0.1", "203.0.113.5", False),
        ("https://auth.example.com", "", "203.0.113.5", True),
        ("https://auth.example.com", "", "127.0.0.1", False),
        ("https://auth.example.com", "", "10.0.0.5", False),
        ("https://auth.example.com", "", None, False),
        ("https://auth.example.com", "127.0.0.1", "10.0.0.5", True),
        ("https://auth.example.com", "127.0.0.1", None, True),
    ],
)
def test_clients_are_told_apart_unless_all_have_the_address_of_a_proxy(
    public_url: str, trusted_proxy: str, address: str | None, apart: bool
) -> None:
    settings = Settings(public_url=public_url, trusted_proxy=trusted_proxy)
    assert settings.tells_clients_apart(address) == apart


@each(
    ("url", "origin"),
    [
        ("https://auth.example.com:443", "https://auth.example.com"),
        ("https://auth.example.com:0443", "https://auth.example.com"),
        ("HTTPS://Auth.Example.COM", "https://auth.example.com"),
        ("https://Auth.example.com:8443", "https://auth.example.com:8443"),
        ("https://auth.example.com:4430", "https://auth.example.com:4430"),
        ("https://192.0.2.1:443", "https://192.0.2.1"),
    ],
)
def test_the_public_url_is_written_as_browsers_write_an_origin(url: str, origin: str) -> None:
    settings = Settings.from_environ({"AUTHSVC_PUBLIC_URL": url})
    assert settings.public_url == origin
    assert replace(settings).public_url == origin


@each(
    ("url", "domain"),
    [
        ("https://auth.example.co.uk", "example.co.uk"),
        ("https://auth.Example.com:443", "EXAMPLE.com"),
        ("https://auth.co.example", "co.example"),
        ("https://me.duckdns.org", "me.duckdns.org"),
        ("https://192.0.2.10", "192.0.2.10"),
        ("https://auth.xn--p1ai-5.xn--p1ai", "xn--p1ai-5.xn--p1ai"),
    ],
)
def test_a_cookie_domain_of_the_operator_is_accepted(url: str, domain: str) -> None:
    settings = Settings.from_environ({"AUTHSVC_PUBLIC_URL": url, "AUTHSVC_COOKIE_DOMAIN": domain})
    assert settings.cookie_domain == domain.lower()


def test_a_cookie_domain_needs_production() -> None:
    assert refusal({"AUTHSVC_COOKIE_DOMAIN": "example.com"}).endswith("needs AUTHSVC_PUBLIC_URL")


MAIL = {"smtp_url": "smtp://127.0.0.1:25", "mail_from": "auth@example.com"}


@pytest.mark.parametrize(
    ("changes", "confirms"),
    [
        ({}, False),
        ({"public_url": "https://x.io"}, False),
        (MAIL, False),
        ({"public_url": "https://x.io", **MAIL}, True),
        ({"public_url": "https://x.io", **MAIL, "confirm_email": False}, False),
        ({**MAIL, "confirm_email": True}, True),
        ({"public_url": "https://x.io", **MAIL, "registration": "invitation"}, False),
    ],
)
def test_emails_are_confirmed_in_production_with_a_mail_server(changes: dict[str, Any], confirms: bool) -> None:
    assert Settings(**changes).confirms_email is confirms


def test_emails_are_not_confirmed_without_a_mail_server() -> None:
    with pytest.raises(SettingsError, match="AUTHSVC_CONFIRM_EMAIL=True needs AUTHSVC_SMTP_URL"):
        Settings(confirm_email=True)


# The logo


PNG = b"\x89PNG\r\n\x1a\n"


@each(
    ("content", "kind"),
    [
        (PNG, "png"),
        (PNG.ljust(32_768, b"x"), "png"),
        (b"\xff\xd8\xff\xe0", "jpeg"),
        (b"RIFF....WEBP", "webp"),
        (b"<svg/>", "svg+xml"),
    ],
)
def test_the_logo_is_a_data_url_of_the_type_of_the_file(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "logo").write_bytes(content)
    logo = Settings.from_environ({"AUTHSVC_SITE_LOGO": str(tmp_path / "logo")}).logo
    assert logo == f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    assert Settings().logo == ""


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PN", PNG.ljust(32_769, b"x"), None, "a folder"])
def test_a_file_that_is_no_logo_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    if isinstance(content, bytes):
        (tmp_path / "logo").write_bytes(content)
    elif content:
        (tmp_path / "logo").mkdir()
    form = "must be a PNG, JPEG, WebP or SVG file of at most 32768 bytes that can be read"
    path = tmp_path / "logo"
    assert refusal({"AUTHSVC_SITE_LOGO": str(path)}) == f"AUTHSVC_SITE_LOGO={path} {form}"


@pytest.mark.parametrize(("name", "most"), [("AUTHSVC_SITE_NAME", 64), ("AUTHSVC_CONTACT", 500)])
def test_a_text_for_the_pages_is_short_and_has_no_password(name: str, most: int) -> None:
    for accepted in "x" * most, "Ask Eve: eve@example.com, https://chat.example.com/eve":
        Settings.from_environ({name: accepted})
    for refused in "x" * (most + 1), "postgresql://u:p@db/x", "host=db password=x":
        assert f"at most {most} characters" in refusal({name: refused})
