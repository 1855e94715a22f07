"""docs/asvs.toml is complete and names tests that exist, and the security pages match the code."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

import auth
import mail
import rate_limit
from settings import Settings
from storage import DB
from tests import evidence
from tests.cases import each
from tests.conftest import HERE, Clock
from tests.product import MODULES, TREES, nodes_of

ENTRIES = evidence.load()
EVIDENCE = evidence.PAGE.read_text()
SECURITY = (HERE / "SECURITY.md").read_text()
REFERENCE = (HERE / "docs" / "security" / "reference.md").read_text()
THREATS = (HERE / "docs" / "security" / "threats.md").read_text()

# The operator holds the certificate.
OPERATORS = {"V12.1.1", "V12.2.1", "V12.2.2"}

# Numbers that limit nothing, so that the reference does not list them.
NO_LIMITS = {
    "auth.LOGIN_TRIES",
    "cli.commands.PROGRESS_STEP",
    "cli.commands.PRUNE_PAUSE",
    "credentials.passwords.CORES",
    "engines.sqlite.LOCK_INTERVAL",
    "engines.sqlite.MIN_FILE_BYTES",
    "rate_limit.DEVELOPMENT_FACTOR",
    "storage.LOOKUP_BATCH",
    "storage.SEARCH_STEP",
    "web.server.HASHING_NICENESS",
}

# V6.1.2 and similar requirements ask for documentation: the subject, and words that only its section has.
IN_REFERENCE = {
    "fields that must agree": "`reset_token`, once, with the email it belongs to",
    "browser features": "`Sec-Fetch-Site` (browsers since 2023)",
    "context words": "**context words**",
    "ways into an account": "There are three: email and password",
    "the second factor": "A user with a **second factor** also needs a one-time code",
    "why sessions last so long": "At AAL2, which a second factor reaches, NIST recommends 24 hours",
    "no other system has sessions": "Only this service makes sessions",
    "who may do what": "a person with a live reset token and its email",
    "which columns": "A client can write only these columns: `email`",
    "what decisions look at": "Decisions look at the client's address",
    "keys": "`AUTHSVC_SMTP_PASSWORD_FILE`, readable for the service's user only | once a year",
    "how hashes move": "is renewed when its user next signs in",
    "communications": "No input names a host or a file",
    "classes of data": "| secret | passwords, session ids, reset tokens and tokens of confirmations |",
    "what is costly": "Only a password hash is costly",
    "risky components": "Bottle (one maintainer",
    "dangerous functions": "handle hostile bytes",
}
IN_THREATS = {"why seeds are kept in plain": "the seeds of second factors are kept in plain text | The service must"}
IN_SECURITY = {
    "times to fix": (
        "A critical vulnerability (an account or the database can be taken over) is fixed within 7 days, "
        "a vulnerability of high severity within 30 days, and any other within 90 days."
    ),
    "packages": "The same times apply to vulnerabilities in the packages that authsvc depends on.",
}


def collected() -> set[str]:
    """Return every test, as pytest names it without parameters."""
    return {
        f"tests/{path.name}::{node.name}"
        for path in (HERE / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def section(heading: str) -> str:
    """Return the text of a section of the reference."""
    found = REFERENCE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert found, f"the reference has no section {heading!r}"
    return found


def text_of(page: str) -> str:
    """Return a page or section without its line breaks."""
    return " ".join(page.split())


def rows(heading: str) -> list[list[str]]:
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def numbers() -> dict[str, float]:
    """Return each number in the settings and among the constants of the code, by the name that the reference uses."""
    settings = {f"AUTHSVC_{name.upper()}": getattr(Settings(), name) for name in Settings.__dataclass_fields__}
    found: dict[str, float] = {name: value for name, value in settings.items() if type(value) is int}
    for module, tree in TREES.items():
        for node in tree.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            if isinstance(target, ast.Name) and target.id.isupper():
                value = getattr(importlib.import_module(module), target.id)
                if isinstance(value, int | float):
                    found[f"{module}.{target.id}"] = value
    return found


def refusals(error: type[auth.AuthError]) -> set[type[auth.AuthError]]:
    """Return all subclasses of a class of errors, without those that tests make."""
    kinds = {kind for kind in error.__subclasses__() if kind.__module__ in MODULES}
    return kinds.union(*(refusals(kind) for kind in kinds))


# asvs.toml


def test_every_requirement_is_there_once_and_in_order() -> None:
    numbered = [(*(int(part) for part in entry["id"][1:].split(".")), entry["level"]) for entry in ENTRIES]
    assert numbered == sorted(set(numbered))
    assert len({entry["id"] for entry in ENTRIES}) == 235
    assert Counter(entry["level"] for entry in ENTRIES) == {1: 52, 2: 120, 3: 70}


def test_an_entry_has_all_its_fields() -> None:
    for entry in ENTRIES:
        assert entry["status"] in evidence.STATUSES, entry["id"]
        assert entry.keys() <= {"id", "level", "requirement", "status", "how", "test", "reason"}, entry["id"]
        assert 0 < len(entry["how"]) < 160, entry["id"]
        assert ("reason" in entry) == (entry["status"] != "met"), entry["id"]
        assert evidence.tests_of(entry) or entry["status"] != "met", entry["id"]


@pytest.mark.slow
def test_every_named_test_exists() -> None:
    assert {test for entry in ENTRIES for test in evidence.tests_of(entry)} <= collected()


def test_only_tls_is_left_to_the_operator_at_level_1() -> None:
    left = {entry["id"] for entry in ENTRIES if entry["level"] == 1 and entry["status"] == "operator"}
    assert left == OPERATORS


# docs/security/asvs.md


def test_the_evidence_is_up_to_date() -> None:
    assert evidence.rendered(EVIDENCE, ENTRIES) == EVIDENCE


@pytest.mark.slow
def test_the_evidence_command_counts_and_fails_for_an_outdated_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evidence.main([]) == 0
    assert capsys.readouterr().out.split()[-1] == str(len(ENTRIES))
    old = tmp_path / "asvs.md"
    old.write_text(f"before\n{evidence.BEGIN}old\n{evidence.END}after\n")
    monkeypatch.setattr(evidence, "PAGE", old)
    assert evidence.main([]) == 1
    assert evidence.main(["--write"]) == evidence.main([]) == 0
    assert old.read_text().startswith("before\n")
    assert old.read_text().endswith("after\n")


def test_the_page_begins_with_what_is_not_met_and_why() -> None:
    listed = EVIDENCE.partition("\n## Not met\n")[2].partition("\n## V1\n")[0]
    missing = [entry for entry in ENTRIES if entry["status"] in ("gap", "deviation")]
    assert missing
    assert listed.count("\n| V") == len(missing)
    for entry in missing:
        assert f"\n| {entry['id']} | {entry['level']} | {entry['requirement']} | {entry['status']} | " in listed
        assert entry["reason"] in listed


# docs/security/reference.md, docs/security/threats.md and SECURITY.md


def test_the_rate_limit_table_matches_the_code(db: DB, settings: Settings, clock: Clock) -> None:
    limiter = rate_limit.RateLimiter(db.rate_limits, settings, clock)
    attempts = [
        limiter.login("bob", "2001:db8::1"),
        limiter.registration("1.2.3.4"),
        limiter.code("bob", None),
        limiter.mails("reset", "bob"),
        limiter.reset_address("1.2.3.4"),
        limiter.unknown_token("1.2.3.4"),
        limiter.unknown_passkey("1.2.3.4"),
        limiter.session_password(1, "bob"),
        limiter.changes("email", 1),
        limiter.changes("account", 1),
    ]
    buckets = [bucket for choices in attempts for buckets in choices for bucket in buckets]
    in_development = Counter((bucket.size, bucket.interval) for bucket in buckets)
    attempts_at_once, pause = rate_limit.LOGIN_ADDRESS
    factors = [factor * rate_limit.DEVELOPMENT_FACTOR for factor in rate_limit.NETWORK_FACTORS]
    in_development.subtract([(attempts_at_once * factor, pause) for factor in factors[1:]])
    constants = {name: value for name, value in vars(rate_limit).items() if name.isupper() and isinstance(value, tuple)}
    assert constants.pop("NETWORK_FACTORS") == (1, 4, 16)
    assert "4 times as large for an IPv6 /56, and 16 times as large for a /48" in text_of(section("Rate limits"))
    documented = {}
    for what, size, interval, development in rows("Rate limits")[2:]:
        documented[re.findall("`(.*)`", what)[0]] = int(size), int(interval.removesuffix(" s"))
        if development:
            in_development.subtract([(int(development), int(interval.removesuffix(" s")))])
    assert documented == constants
    assert not any(in_development.values())


@each("name", sorted(numbers().keys() - NO_LIMITS))
@pytest.mark.slow
def test_a_number_in_a_table_matches_the_code(name: str) -> None:
    if name == "AUTHSVC_BCRYPT_COST":
        assert "bcrypt of cost 12" in text_of(section("Passwords"))
        assert "at cost 12 (`AUTHSVC_BCRYPT_COST`)" in text_of(section("Limits"))
        assert numbers()[name] == 12
        return
    documented = [row[1] for row in rows("Lifetimes") + rows("Limits") if f"`{name}`" in row[0]]
    assert [float(re.findall(r"[0-9]+(?:\.[0-9]+)?", number)[0]) for number in documented] == [numbers()[name]]


def test_every_limit_in_a_table_exists_in_the_code() -> None:
    documented = {
        name for row in rows("Lifetimes") + rows("Limits") for name in re.findall(r"`([\w.]+\.[A-Z_]+)`", row[0])
    }
    assert documented <= numbers().keys()
    assert numbers().keys() >= NO_LIMITS


def test_every_field_of_a_form_is_documented() -> None:
    names = {
        node.value
        for call in nodes_of(TREES["authsvc"])
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("_route", "read_form")
        for word in call.keywords
        if word.arg in ("fields", "optional", "flags", "objects")
        for node in ast.walk(word.value)
        if isinstance(node, ast.Constant)
    }
    secrets = {"password", "new_password", "otp", "reset_token", "token"}
    assert names == {"email", "new_email", "remember", "name", "days", "credential"} | secrets
    assert names <= {name for row in rows("Limits") for name in re.findall("`([a-z_]+)`", row[0])}


def test_the_documented_mail_retries_match_the_code() -> None:
    *first, last = map(str, mail.RETRIES)
    assert f"tried again after {', '.join(first)} and {last} s" in text_of(section("Limits"))


def test_every_log_event_is_documented() -> None:
    events = {error.event for error in refusals(auth.AuthError) if error.event}
    for tree in TREES.values():
        for node in nodes_of(tree):
            if isinstance(node, ast.Call) and re.search(r"\b_?log(_event|ged)?$", ast.unparse(node.func)) and node.args:
                events |= set(re.findall("'([a-z]+_[a-z_]+)'", ast.unparse(node.args[0])))
    assert {event for row in rows("The log")[2:] for event in re.findall("`([a-z_]+)`", row[0])} == events


def test_the_inventory_of_cryptography_is_complete() -> None:
    used = {
        ast.unparse(node)
        for tree in TREES.values()
        for node in nodes_of(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("bcrypt", "hashlib", "hmac", "random", "secrets", "ssl", "uuid")
    }
    named = {
        f"{node.module}.{alias.name}"
        for tree in TREES.values()
        for node in nodes_of(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("bcrypt", "hashlib", "hmac", "secrets", "ssl", "uuid")
        for alias in node.names
    }
    listed = {name for row in rows("Cryptography and keys") for name in re.findall(r"`([a-z]+\.\w+)`", row[-1])}
    assert listed == used | named


@each("words", IN_REFERENCE.values())
def test_the_security_reference_documents_what_asvs_asks_for(words: str) -> None:
    assert words in text_of(REFERENCE)


@each("words", IN_THREATS.values())
def test_the_threat_model_documents_what_asvs_asks_for(words: str) -> None:
    assert words in text_of(THREATS)


def test_security_md_is_short() -> None:
    assert len(SECURITY.splitlines()) <= 120


@pytest.mark.parametrize("words", IN_SECURITY.values(), ids=IN_SECURITY.keys())
def test_security_md_states_when_vulnerabilities_are_fixed(words: str) -> None:
    assert words in text_of(SECURITY)
