"""The layout of the project: who may import whom, and that the README says what the code does."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import authsvc
from settings import FOREIGN, Settings
from tests.conftest import HERE, Service, clean_environ

README = (HERE / "README.md").read_text()

# room: (rooms of ours it may import, packages and modules it never imports)
ROOMS = {
    "settings": (set(), {"bottle", "sqlite3", "bcrypt"}),
    "storage": ({"settings"}, {"bottle", "bcrypt", "hashlib", "time"}),
    "passwords": ({"settings"}, {"bottle", "sqlite3"}),
    "throttle": ({"storage", "settings"}, {"bottle", "sqlite3"}),
    "mailer": ({"settings"}, {"bottle", "sqlite3"}),
    "auth": ({"settings", "storage", "passwords", "throttle", "mailer"}, {"bottle", "sqlite3", "waitress"}),
    "guard": ({"settings"}, {"sqlite3", "bcrypt"}),
    "lanes": ({"settings", "guard", "throttle"}, {"bottle", "sqlite3", "bcrypt"}),
    "authsvc": (
        {"settings", "storage", "passwords", "throttle", "mailer", "auth", "guard", "lanes"},
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
    assert spoken == {"storage"}


def test_statements_are_literals_but_for_names_from_a_fixed_set() -> None:
    built = []
    for node in ast.walk(ast.parse((HERE / "storage.py").read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr.startswith(("execute", "_read"))
        ):
            statement = node.args[0]
            if isinstance(statement, ast.JoinedStr):
                built += [ast.unparse(part.value) for part in statement.values if isinstance(part, ast.FormattedValue)]
            elif not isinstance(statement, ast.Constant):
                built.append(ast.unparse(statement))
    # where and assignments hold checked names; statement is a literal of the caller's; the rest is our own schema
    assert set(built) == {"where", "assignments", "statement", "''.join(steps)", "VERSION"}


def test_the_readme_lists_every_route() -> None:
    listed = [tuple(row[0].split()) for row in table_after("Routes")]
    assert listed == [(method, path) for method, path, *_ in authsvc.ROUTES]


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
        "schema.sql"
    }


def test_the_lock_files_pin_every_package_within_the_ranges() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    locked = re.findall(r"^([a-z0-9-]+)==\S+ .*\\$", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    assert {re.match("[a-z]+", line)[0] for line in project["dependencies"]} <= set(locked)  # type: ignore[index]


def test_the_readme_session_prints_what_it_says(service: Service, tmp_path: Path) -> None:
    session = README.split("```console\n")[2].partition("```")[0]
    host = service.url.removeprefix("http://")
    commands: list[str] = []
    said: list[str] = []
    for line in session.replace("127.0.0.1:5000", host).splitlines():
        (commands if line.startswith("$ ") else said).append(line.removeprefix("$ "))
    script = "\n".join(f"{command}; echo" for command in commands)
    done = subprocess.run(
        ["bash", "-e"], input=script, text=True, capture_output=True, cwd=tmp_path, env=clean_environ(), timeout=60
    )
    printed = [line for line in done.stdout.splitlines() if line]
    uuid = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
    assert [uuid.sub("ID", line) for line in printed] == [uuid.sub("ID", line) for line in said]
