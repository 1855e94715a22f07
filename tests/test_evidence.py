"""The evidence: asvs.toml is whole and names tests that exist, and SECURITY.md says what the code does."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

import authsvc
import mailer
import throttle
from settings import Settings
from storage import DB
from tests import evidence
from tests.conftest import HERE, Clock

ENTRIES = evidence.load()
PAGE = evidence.PAGE.read_text()
ROOMS = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "main")
TREES = {room: ast.parse((HERE / f"{room}.py").read_text()) for room in ROOMS}

# What is missing, and what level 1 leaves to who holds the certificate.
GAPS: dict[int, set[str]] = {1: set(), 2: set()}
OPERATORS = {"V12.1.1", "V12.2.1", "V12.2.2"}

# Numbers that say nothing of a limit.
NO_LIMITS = {
    "admin.PROGRESS_STEP",
    "admin.PRUNE_REST",
    "lanes.HASHING_NICENESS",
    "passwords.CORES",
    "database.LOCK_INTERVAL",
    "database.VERSION",
    "storage_postgres.VERSION",
    "throttle.DEVELOPMENT_FACTOR",
}

# V6.1.2 and its like ask that something is written down: what it is, and words that only its section has.
SAID = {
    "fields that must agree": "`reset_token`, once, with the email it belongs to",
    "browser features": "`Sec-Fetch-Site` (browsers since 2023)",
    "context words": "**context words**",
    "ways into an account": "There are two: email and password",
    "the second factor": "Who has a **second factor** also needs a one-time code",
    "why seeds are kept in plain": "the seeds of second factors are kept in plain",
    "no other system has sessions": "sessions are made here alone",
    "who may do what": "who has a live reset token and its email",
    "which columns": "Written from outside: `email`",
    "what decisions look at": "Decisions look at the client's address",
    "keys": "`AUTHSVC_SMTP_PASSWORD_FILE`, readable for the service's user only | once a year",
    "how hashes move": "moves to a new one when its user next logs in",
    "communications": "No input names a host or a file",
    "classes of data": "| secret | passwords, session ids, reset tokens |",
    "time to mend": "within 7 days when it is critical",
    "what is costly": "What is costly is a password hash",
    "risky components": "Bottle (one maintainer",
    "dangerous functions": "handle hostile bytes",
}


def collected() -> set[str]:
    """Every test there is, as pytest names it without parameters."""
    return {
        f"tests/{path.name}::{node.name}"
        for path in (HERE / "tests").glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def numbers() -> dict[str, float]:
    """Each limit of the code by the name that SECURITY.md has for it."""
    settings = {f"AUTHSVC_{name.upper()}": getattr(Settings(), name) for name in Settings.__dataclass_fields__}
    found: dict[str, float] = {name: value for name, value in settings.items() if type(value) is int}
    for room in ROOMS:
        module = importlib.import_module(room)
        for node in TREES[room].body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name.isupper() and isinstance(getattr(module, name), int | float):
                    found[f"{room}.{name}"] = getattr(module, name)
    return found


# asvs.toml


def test_every_requirement_is_there_once_and_in_order() -> None:
    numbered = [tuple(int(part) for part in entry["id"][1:].split(".")) for entry in ENTRIES]
    assert numbered == sorted(set(numbered))
    assert Counter(entry["level"] for entry in ENTRIES) == {1: 49, 2: 113, 3: 60}


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["id"] for entry in ENTRIES])
def test_an_entry_is_whole(entry: evidence.Requirement) -> None:
    assert entry["status"] in evidence.STATUSES
    assert entry.keys() <= {"id", "level", "requirement", "status", "how", "test", "reason"}
    assert 0 < len(entry["how"]) < 160
    assert ("reason" in entry) == (entry["status"] != "met")
    assert evidence.tests_of(entry) or entry["status"] != "met"


def test_every_named_test_exists() -> None:
    assert {test for entry in ENTRIES for test in evidence.tests_of(entry)} <= collected()


@pytest.mark.parametrize("level", GAPS)
def test_nothing_is_missing(level: int) -> None:
    missing = {entry["id"] for entry in ENTRIES if entry["level"] == level and entry["status"] in ("gap", "deviation")}
    assert missing == GAPS[level]


def test_only_tls_is_left_to_the_operator_at_level_1() -> None:
    left = {entry["id"] for entry in ENTRIES if entry["level"] == 1 and entry["status"] == "operator"}
    assert left == OPERATORS


# SECURITY.md


def test_the_evidence_is_up_to_date() -> None:
    assert evidence.rendered(PAGE, ENTRIES) == PAGE


def test_the_command_counts_and_tells_when_the_page_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evidence.main([]) == 0
    assert capsys.readouterr().out.split()[-1] == str(len(ENTRIES))
    old = tmp_path / "SECURITY.md"
    old.write_text(f"before\n{evidence.BEGIN}old\n{evidence.END}after\n")
    monkeypatch.setattr(evidence, "PAGE", old)
    assert evidence.main([]) == 1
    assert evidence.main(["--write"]) == evidence.main([]) == 0
    assert old.read_text().startswith("before\n")
    assert old.read_text().endswith("after\n")


def test_the_throttle_table_is_that_of_the_code(db: DB, settings: Settings, clock: Clock) -> None:
    counter = throttle.Throttle(db, settings, clock)
    buckets = [
        *counter.login("bob", "1.2.3.4"),
        *counter.registration("1.2.3.4"),
        *counter.code("bob", "5.6.7.8"),
        *counter.reset_request("bob", "1.2.3.4"),
        *counter.reset_confirmation("1.2.3.4"),
    ]
    counter.remember(db.add_user("bob", "!").id, "bob", "1.2.3.4")
    buckets += counter.code("bob", "1.2.3.4")
    in_development = Counter((size, interval) for _, size, interval in buckets)
    constants = {name: value for name, value in vars(throttle).items() if name.isupper() and isinstance(value, tuple)}
    said = {}
    for what, size, interval, development in rows("The throttle")[2:]:
        said[re.findall("`(.*)`", what)[0]] = int(size), int(interval.removesuffix(" s"))
        in_development.subtract([(int(development), int(interval.removesuffix(" s")))])
    assert said == constants
    assert not any(in_development.values())


@pytest.mark.parametrize("name", sorted(numbers().keys() - NO_LIMITS))
def test_a_number_in_a_table_is_that_of_the_code(name: str) -> None:
    if name == "AUTHSVC_BCRYPT_COST":
        assert "bcrypt of cost 12" in section("Passwords")
        assert "at cost 12 (`AUTHSVC_BCRYPT_COST`)" in section("Limits")
        assert numbers()[name] == 12
        return
    said = [row[1] for row in rows("Lifetimes") + rows("Limits") if f"`{name}`" in row[0]]
    assert [float(re.findall("[0-9]+", number)[0]) for number in said] == [numbers()[name]]


def test_the_retries_are_those_of_the_code() -> None:
    *first, last = map(str, mailer.RETRIES)
    assert f"tried again after {', '.join(first)} and {last} s" in section("Limits")


def test_every_event_of_the_log_is_listed() -> None:
    events = set(authsvc.EVENTS.values())
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.search(r"\b_?log$", ast.unparse(node.func)) and node.args:
                events |= set(re.findall("'([a-z]+_[a-z_]+)'", ast.unparse(node.args[0])))
    assert {event for row in rows("The log")[2:] for event in re.findall("`([a-z_]+)`", row[0])} == events


def test_the_inventory_of_cryptography_is_complete() -> None:
    used = {
        ast.unparse(node)
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("bcrypt", "hashlib", "hmac", "random", "secrets", "ssl", "uuid")
    }
    named = {
        f"{node.module}.{alias.name}"
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("bcrypt", "hashlib", "hmac", "secrets", "ssl", "uuid")
        for alias in node.names
    }
    listed = {name for row in rows("Cryptography and keys") for name in re.findall(r"`([a-z]+\.\w+)`", row[-1])}
    assert listed == used | named


@pytest.mark.parametrize("words", SAID.values(), ids=SAID.keys())
def test_security_md_says(words: str) -> None:
    assert words in " ".join(PAGE.split())
