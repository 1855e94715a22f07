"""The layout of the project: who may import whom, and that the README says what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import requests

import authsvc
import storage
from settings import FOREIGN, Settings
from tests.conftest import HERE, Service, clean_environ

README = (HERE / "README.md").read_text()

# room: (rooms of ours it may import, packages and modules it never imports)
ROOMS = {
    "settings": (set(), {"bottle", "sqlite3", "bcrypt"}),
    "database": ({"settings"}, {"bottle", "bcrypt", "hashlib", "time"}),
    "storage": ({"database", "settings", "storage_postgres"}, {"bottle", "bcrypt", "hashlib", "time", "psycopg"}),
    "storage_postgres": ({"database", "settings", "storage"}, {"bottle", "bcrypt", "hashlib", "time", "sqlite3"}),
    "copying": ({"storage"}, {"bottle", "bcrypt", "hashlib", "time", "sqlite3", "psycopg"}),
    "passwords": ({"settings"}, {"bottle", "sqlite3"}),
    "totp": (set(), {"bottle", "sqlite3", "time"}),
    "throttle": ({"storage", "settings"}, {"bottle", "sqlite3"}),
    "mailer": ({"settings"}, {"bottle", "sqlite3"}),
    "auth": (
        {"settings", "database", "storage", "passwords", "totp", "throttle", "mailer"},
        {"bottle", "sqlite3", "waitress"},
    ),
    "guard": ({"settings"}, {"sqlite3", "bcrypt"}),
    "lanes": ({"settings", "guard", "throttle"}, {"bottle", "sqlite3", "bcrypt"}),
    "moving": ({"auth", "guard", "passwords", "settings", "storage"}, {"bottle", "sqlite3", "bcrypt"}),
    "admin": (
        {"settings", "database", "storage", "mailer", "auth", "copying", "guard", "moving"},
        {"bottle", "sqlite3", "bcrypt", "waitress"},
    ),
    "authsvc": (
        {"settings", "database", "storage", "passwords", "totp", "mailer", "auth", "guard", "lanes", "admin"},
        {"sqlite3", "bcrypt", "hashlib"},
    ),
    "main": (set(), {"bottle", "sqlite3", "bcrypt", "waitress"}),
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def table_after(heading: str) -> list[list[str]]:
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip(" |`") for cell in row] for row in rows]


def test_every_room_is_in_the_table() -> None:
    assert {path.stem for path in HERE.glob("*.py")} == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    ours, never = ROOMS[room]
    imported = imports_of(HERE / f"{room}.py")
    assert imported & ROOMS.keys() <= ours
    assert not imported & never


def test_only_settings_reads_the_environment() -> None:
    readers = {
        path.stem
        for path in HERE.glob("*.py")
        if re.search(r"\benviron\b.*\bos\b|os\.(environ|getenv)", path.read_text())
    }
    assert readers == {"settings", "main"}


def test_sql_is_only_in_storage() -> None:
    spoken = {
        path.stem
        for path in HERE.glob("*.py")
        if re.search(r"SELECT |INSERT INTO|UPDATE \w+ SET|DELETE FROM", path.read_text())
    }
    assert spoken == {"storage", "storage_postgres", "database"}  # the last of SQLite's own tables, and to lift files


def test_statements_are_literals_but_for_names_from_a_fixed_set() -> None:
    built = []
    trees = [ast.parse((HERE / f"{room}.py").read_text()) for room in ("storage", "storage_postgres", "database")]
    for node in [node for tree in trees for node in ast.walk(tree)]:
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr
            in ("execute", "executemany", "executescript", "_read", "_read_all", "_read_each", "_write", "_converted")
        ):
            statement = node.args[0]
            if isinstance(statement, ast.JoinedStr):
                built += [ast.unparse(part.value) for part in statement.values if isinstance(part, ast.FormattedValue)]
            elif not isinstance(statement, ast.Constant):
                built.append(ast.unparse(statement))
    # where and assignments hold checked names; statement is a literal of the caller's; the rest is our own: constants
    # of storage.py, and the schema
    constants = {"USER", "REPLACE_HASH", "TAKEN", "ADD_STAGED"}
    schema = {"''.join(steps)", "step.encode()", "VERSION"}
    copied = {"table", "', '.join(columns)", "marks", "listing(table)", "listing(table).encode()", "_locking('SHARE')"}
    copied |= {"_locking('EXCLUSIVE')"}  # names of TABLES, and question marks
    converted = {"_converted(statement)", "_converted(TAKE)"}
    assert set(built) == {"where", "assignments", "statement"} | converted | constants | schema | copied
    for name in constants:
        assert isinstance(getattr(storage, name), str)


def test_postgresql_is_chosen_in_one_place_and_known_in_one_room() -> None:
    assert {path.stem for path in HERE.glob("*.py") if imports_of(path) & {"psycopg", "psycopg_pool"}} == {
        "storage_postgres"
    }
    assert {path.stem for path in HERE.glob("*.py") if "storage_postgres" in imports_of(path)} == {"storage"}
    chosen = [path.stem for path in HERE.glob("*.py") for _ in re.findall(r"\bif\b.*is_url\(", path.read_text())]
    assert sorted(chosen) == ["settings", "storage"]  # the former to hide what may hold a password


def test_with_a_file_nothing_of_postgresql_is_imported(tmp_path: Path) -> None:
    script = (
        "import sys, authsvc, storage; storage.open_store(sys.argv[1]).close();"
        "print([name for name in sys.modules if 'psycopg' in name or name == 'storage_postgres'])"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "authsvc.db")]
    done = subprocess.run(command, cwd=HERE, env=clean_environ(), text=True, capture_output=True, check=True)
    assert done.stdout == "[]\n"


def test_the_readme_lists_every_route() -> None:
    listed = [tuple(row[0].split()) for row in table_after("Routes")]
    assert listed == [(method, path.replace("public_id", "id")) for method, path, *_ in authsvc.ROUTES]


def test_the_readme_lists_every_setting_with_its_default() -> None:
    shown = {True: "on", False: "off"}
    expected = [
        [
            f"AUTHSVC_{field.name.upper()}",
            str(shown.get(field.default, field.default) if isinstance(field.default, bool) else field.default),
        ]
        for field in fields(Settings)
    ]
    assert [row[:2] for row in table_after("Settings")] == expected
    assert all(name in README for name in FOREIGN)


def test_the_readme_names_every_room() -> None:
    assert {row[0] for row in table_after("A walk through the house")} == {f"{room}.py" for room in ROOMS} | {
        *("schema.sql", "schema_postgres.sql", "pages/", "deploy/", "examples/")
    }


def test_the_lock_files_pin_every_package_within_the_ranges() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    locked = re.findall(r"^([a-z0-9-]+)==\S+ .*\\$", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    assert {re.match("[a-z]+", line)[0] for line in project["dependencies"]} <= set(locked)  # type: ignore[index]


CHANGING = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]{8}T[0-9]{6}")  # ids, tokens, moments


def transcript(block: str, cwd: Path, **environ: str) -> tuple[list[str], list[str]]:
    """Type what a block of the README says; return what was printed, and what the README says was."""
    lines = block.strip().splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    script = "shopt -s expand_aliases\n" + "\n".join(f"{command}; echo" for command in commands)
    done = subprocess.run(
        ["bash", "-e"], input=script, text=True, capture_output=True, cwd=cwd, env=clean_environ() | environ, timeout=60
    )
    printed = [CHANGING.sub("…", line) for line in done.stdout.splitlines() if line]
    return printed, [CHANGING.sub("…", line) for line in lines if not line.startswith("$ ")]


def consoles(heading: str) -> list[str]:
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0] if heading else README
    return [block.partition("```")[0] for block in section.split("```console\n")[1:]]


@pytest.mark.once
def test_the_readme_session_prints_what_it_says(service: Service, tmp_path: Path) -> None:
    host = service.url.removeprefix("http://")
    printed, said = transcript(consoles("")[1].replace("127.0.0.1:5000", host), tmp_path)
    assert printed == said


@pytest.mark.sqlite
@pytest.mark.slow  # a dozen commands, each a process
def test_a_day_of_the_operator_goes_as_the_readme_says(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start(AUTHSVC_DATABASE="authsvc.db")
    host = service.url.removeprefix("http://")
    environ = service.environ | {"AUTHSVC_LISTEN": host}
    requests.post(f"{service.url}/users", data={"email": "bob@example.com", "password": "b4l0u"}, timeout=5)
    (tmp_path / "authsvc.py").symlink_to(HERE / "authsvc.py")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    serving, stopped = (block.replace("127.0.0.1:5000", host) for block in consoles("Day to day"))
    printed, said = transcript(serving, tmp_path, **environ)
    assert printed == said
    assert (tmp_path / "authsvc.db").exists()  # from the working folder, which is not that of the program
    service.end()
    printed, said = transcript(serving.splitlines()[0] + "\n" + stopped, tmp_path, **environ)
    assert printed == said
