"""The architecture: which module imports which, where SQL stands, and that the documents match the code."""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import authsvc
from settings import FOREIGN, Settings
from tests.cases import each
from tests.conftest import HERE, clean_environ
from tests.product import MODULES, TREES, counts, nodes_of

README = (HERE / "README.md").read_text()
API = (HERE / "docs/api.md").read_text()
SETTINGS = (HERE / "docs/settings.md").read_text()
ARCHITECTURE = (HERE / "docs" / "architecture.md").read_text()

LEAVES = {"settings", "addresses", "fair_queue", "log", "engines.errors"}

HTTP = {"bottle", "waitress"}
DATABASES = {"sqlite3", "psycopg", "psycopg_pool"}
POSTGRESQL = {"psycopg", "psycopg_pool"}

# Module or package: (modules and packages of the product that it may import, other packages that it must not import).
# The longest name that fits a module counts. A package in the first set stands for all of its modules.
RULES: dict[str, tuple[set[str], set[str]]] = {
    "settings": ({"addresses"}, HTTP | {"sqlite3", "bcrypt"}),
    "addresses": (set(), HTTP | DATABASES | {"bcrypt"}),
    "fair_queue": (set(), HTTP | DATABASES | {"bcrypt"}),
    "log": (set(), HTTP | DATABASES | {"bcrypt"}),
    "engines.errors": (set(), HTTP | DATABASES | {"bcrypt"}),
    "engines": (LEAVES | {"engines"}, HTTP | DATABASES | {"bcrypt", "hashlib", "time"}),
    "engines.sqlite": (LEAVES | {"engines"}, HTTP | POSTGRESQL | {"bcrypt", "hashlib"}),
    "engines.sqlite_files": (LEAVES | {"engines"}, HTTP | POSTGRESQL | {"bcrypt", "hashlib", "time"}),
    "engines.postgres": (LEAVES | {"engines"}, HTTP | {"sqlite3", "bcrypt", "hashlib", "time"}),
    "tables": (LEAVES | {"engines"}, HTTP | DATABASES | {"bcrypt", "hashlib", "time"}),
    "storage": (LEAVES | {"engines", "tables"}, HTTP | DATABASES | {"bcrypt", "hashlib", "time"}),
    "credentials": (set(), HTTP | DATABASES | {"time", "datetime"}),
    "rate_limit": (LEAVES | {"tables"}, HTTP | DATABASES),
    "mail": (LEAVES, HTTP | DATABASES),
    "auth": (LEAVES | {"rate_limit", "credentials", "storage", "tables", "mail"}, HTTP | DATABASES),
    "web": (LEAVES | {"web"}, HTTP | DATABASES | {"bcrypt"}),
    "web.server": (LEAVES | {"web"}, DATABASES | {"bottle", "bcrypt"}),
    "web.parser": (LEAVES | {"web"}, DATABASES | {"bottle", "bcrypt"}),
    "cli": (
        LEAVES | {"auth", "storage", "tables", "engines", "credentials", "mail", "cli"},
        HTTP | DATABASES | {"bcrypt"},
    ),
    "cli.copy": (LEAVES | {"engines"}, HTTP | DATABASES | {"bcrypt", "hashlib", "time"}),
    "authsvc": (
        LEAVES | {"auth", "web", "storage", "mail", "cli", "credentials"},
        DATABASES | {"waitress", "bcrypt", "hashlib"},
    ),
}

# Modules that may contain SQL.
STORAGE = sorted(
    module for module in MODULES if module == "storage" or module.startswith(("storage.", "tables", "engines"))
)

# Functions and methods that take a statement as their first argument.
STATEMENT_FUNCTIONS = {
    *("execute", "executemany", "executescript", "stream", "_stream", "_converted"),
    *("read", "read_all", "read_each", "write", "_each_expired"),
}

# Parts of a statement that are neither literals nor constants. None of them comes from a client.
STATEMENT_PARTS = {
    "where",  # columns in LOOKUP_COLUMNS
    "assignments",  # columns in UPDATABLE_COLUMNS
    "table",  # a key of TABLES
    "', '.join(columns)",  # columns of TABLES
    "', '.join(TABLES[table])",
    "', '.join(Token._fields)",
    "one",  # a condition, or nothing
    "key",  # of EXPIRED, as is the next one
    "condition",
    "parameters",  # placeholders for the columns of TABLES
    "statement",  # a parameter or variable of this name; its callers and its assignments are checked
    "lock",  # a parameter of transaction(); its callers are checked
    "_converted(statement)",  # the same statement with the placeholders of psycopg
    "_lock_tables('SHARE')",  # the keys of TABLES
    "_lock_tables('EXCLUSIVE')",
    "step.encode()",  # a schema file or a migration
    "''.join(steps)",
    "round(BUSY_TIMEOUT * 1000)",
}


@dataclass(frozen=True)
class Import:
    """An import of a module: whether it is inside a function, and whether only the type checker sees it."""

    module: str
    in_function: bool
    for_types: bool


@functools.cache
def imports_of(module: str) -> list[Import]:
    """Return the imports of a module. ``from package import module`` counts as an import of ``package.module``."""

    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, in_function, for_types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield Import(inside if inside in MODULES else node.module or "", in_function, for_types)
        in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                yield from walk(statement, in_function, True)
            for statement in node.orelse:
                yield from walk(statement, in_function, for_types)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, in_function, for_types)

    return list(walk(TREES[module], False, False))


def importers_of(*packages: str, in_function: bool | None = None) -> set[str]:
    """Return the modules that import one of these packages, or a module in it."""
    return {
        module
        for module in MODULES
        for found in imports_of(module)
        if in_function in (None, found.in_function) and is_within(found.module, set(packages))
    }


def is_within(module: str, packages: set[str]) -> bool:
    """Return whether a module is one of these, or is in one of these packages."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def rule_for(module: str) -> tuple[set[str], set[str]] | None:
    names = [name for name in RULES if is_within(module, {name})]
    return RULES[max(names, key=len)] if names else None


def loaded_by(script: str, *arguments: str) -> set[str]:
    """Run a script in a new interpreter; return the names of the modules that it has loaded at its end."""
    command = [sys.executable, "-c", f"import sys; {script}; print(*sys.modules)", *arguments]
    done = subprocess.run(command, cwd=HERE, env=clean_environ(), text=True, capture_output=True, check=True)
    return set(done.stdout.split())


# Imports


def test_every_module_has_import_rules() -> None:
    assert [module for module in MODULES if rule_for(module) is None] == []
    assert [name for name in RULES if not any(is_within(module, {name}) for module in MODULES)] == []


@each("module", MODULES)
def test_a_module_imports_only_what_it_may(module: str) -> None:
    allowed, forbidden = rule_for(module) or (set(), set())
    imported = {found.module for found in imports_of(module)}
    ours = {name for name in imported if name.partition(".")[0] in {name.partition(".")[0] for name in MODULES}}
    assert [name for name in sorted(ours) if not is_within(name, allowed)] == []
    assert [name for name in sorted(imported) if is_within(name, forbidden)] == []


def test_main_imports_nothing_of_the_service() -> None:
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse((HERE / "main.py").read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not imported & ({name.partition(".")[0] for name in MODULES} | HTTP | DATABASES | {"bcrypt"})


def test_no_modules_import_each_other_even_inside_functions() -> None:
    graph = {
        module: {found.module for found in imports_of(module) if found.module in MODULES and not found.for_types}
        for module in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of the cycle


def test_the_routes_import_the_server_and_the_commands_inside_functions() -> None:
    deferred = {"web.server", "web.parser", "cli", "credentials"}
    imported = {found.module for found in imports_of("authsvc") if not found.in_function}
    assert [name for name in sorted(imported) if is_within(name, deferred)] == []
    assert "authsvc" in importers_of("web.server", in_function=True)


@pytest.mark.slow
def test_importing_the_application_loads_no_waitress_no_psycopg_and_no_command() -> None:
    loaded = loaded_by("import authsvc")
    unwanted = {"waitress", "web.server", "web.parser", "cli", *POSTGRESQL}
    assert [name for name in sorted(loaded) if is_within(name, unwanted)] == []


def test_serving_loads_no_command_and_nothing_for_pages_that_nobody_visits() -> None:
    serve = "authsvc.serve = lambda settings: print(authsvc.load_pages(settings, '')) or 0"
    loaded = loaded_by(f"import authsvc; {serve}; authsvc.main([])")
    assert [name for name in sorted(loaded) if is_within(name, {"cli", "argparse", "html"})] == []


@pytest.mark.slow
def test_a_sqlite_database_loads_nothing_of_postgresql(tmp_path: Path) -> None:
    loaded = loaded_by("import authsvc, storage; storage.DB(sys.argv[1]).close()", str(tmp_path / "authsvc.db"))
    assert [name for name in sorted(loaded) if is_within(name, {"engines.postgres", *POSTGRESQL})] == []


def test_psycopg_is_imported_only_by_the_postgresql_engine() -> None:
    assert importers_of(*POSTGRESQL, in_function=False) == {"engines.postgres"}
    assert importers_of(*POSTGRESQL, in_function=True) <= {
        "engines.postgres",
        "settings",
    }  # settings reads URLs with it


def test_the_engine_is_chosen_in_one_module() -> None:
    assert importers_of("engines.postgres") == {"engines"}
    assert importers_of("engines.postgres", in_function=False) == set()
    chosen = {module for module, path in MODULES.items() if re.search(r"\bif\b.*\bis_url\(", path.read_text())}
    assert chosen == {"engines", "settings"}  # settings hides the password of a URL


def test_few_files_read_the_environment() -> None:
    readers = {
        module
        for module, path in {**MODULES, "main": HERE / "main.py"}.items()
        if re.search(r"\benviron\b.*\bos\b|os\.(environ|getenv)", path.read_text())
    }
    assert readers == {"settings", "web.systemd", "main"}  # systemd has variables of its own


def test_every_text_file_is_read_and_written_in_a_named_encoding() -> None:
    """The encoding of the locale is not always UTF-8."""
    unnamed = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in nodes_of(tree)
        if isinstance(node, ast.Call)
        and re.search(r"(^|(?<!\bos)\.)(open|fdopen|read_text|write_text|NamedTemporaryFile)$", ast.unparse(node.func))
        and not any(word.arg == "encoding" for word in node.keywords)
        and not any(re.fullmatch("'[rwxa+]*b[rwxa+]*'", ast.unparse(argument)) for argument in node.args)
    ]
    assert unnamed == []


# SQL


def test_sql_is_only_in_storage_tables_and_engines() -> None:
    speakers = {
        module
        for module, path in MODULES.items()
        if re.search(r"SELECT |INSERT INTO|UPDATE \w+ SET|DELETE FROM", path.read_text())
    }
    assert speakers <= set(STORAGE)
    assert "storage" in speakers


def test_statements_contain_only_literals_and_names_from_a_frozen_set() -> None:
    parts = {
        ast.unparse(part)
        for module in STORAGE
        for statement in statements_in(module)
        for part in parts_of(statement)
        if not is_constant(module, part)
    }
    assert parts == STATEMENT_PARTS


def test_every_function_that_takes_a_statement_is_checked() -> None:
    functions = {
        node.name
        for module in STORAGE
        for node in nodes_of(TREES[module])
        if isinstance(node, ast.FunctionDef) and "statement" in [argument.arg for argument in all_arguments(node)]
    }
    assert functions <= STATEMENT_FUNCTIONS


def all_arguments(function: ast.FunctionDef) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def statements_in(module: str) -> Iterator[ast.expr]:
    """Yield each expression in a module that is run as a statement, or kept in a variable of that name."""
    for node in nodes_of(TREES[module]):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in STATEMENT_FUNCTIONS and node.args:
                yield node.args[0]
            elif name == "transaction":
                yield from (word.value for word in node.keywords if word.arg == "lock")
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "statement":
            yield node.value
        elif isinstance(node, ast.For) and ast.unparse(node.target) == "statement":
            yield node.iter


def parts_of(statement: ast.expr) -> list[ast.expr]:
    """Return the expressions that an f-string contains; anything else is one part."""
    if isinstance(statement, ast.JoinedStr):
        return [part.value for part in statement.values if isinstance(part, ast.FormattedValue)]
    return [statement]


def is_constant(module: str, part: ast.expr) -> bool:
    """Return whether an expression is a literal, or names a constant text, number or table of texts."""
    if isinstance(part, ast.Constant):
        return True
    name = re.fullmatch(r"((?:\w+\.)?[A-Z][A-Z0-9_]*)(\[.*\])?", ast.unparse(part))
    if not name:
        return False
    value = importlib.import_module(module)
    for step in name[1].split("."):
        value = getattr(value, step)
    return is_made_of_texts(value)


def is_made_of_texts(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(is_made_of_texts, value.values()))
    return isinstance(value, str | int) or (isinstance(value, tuple) and all(map(is_made_of_texts, value)))


# Documents


def table_after(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the tables in a section, as far as they begin with code."""
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [re.split(r" *\| *", line.strip("| ")) for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip(" |`") for cell in row] for row in rows]


def test_the_api_page_lists_every_route() -> None:
    listed = [tuple(row[0].split()) for row in table_after(API, "Routes")]
    assert listed == [(method, re.sub("<.*>", "<id>", path)) for method, path, *_ in authsvc.ROUTES]


def test_the_settings_page_lists_every_setting_with_its_default() -> None:
    switches = {True: "on", False: "off"}
    defaults = {"confirm_email": "on` in production with a mail server, else `off"}
    expected = [
        [
            f"AUTHSVC_{field.name.upper()}",
            switches[field.default]
            if isinstance(field.default, bool)
            else defaults.get(field.name, str(field.default)),
        ]
        for field in fields(Settings)
    ]
    assert [row[:2] for row in table_after(SETTINGS, "All settings")] == expected
    assert all(name in SETTINGS for name in FOREIGN)
    named = [row[:2] for row in table_after(README, "Settings")]
    assert named == [row for row in expected if row in named]


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1500
    lines = README.splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


def test_the_architecture_page_lists_every_file() -> None:
    modules = {str(path.relative_to(HERE)) for path in MODULES.values() if path.name != "__init__.py"}
    others = {
        *("main.py", "schema.sql", "credentials/common_passwords.txt.gz"),
        *("engines/schema_postgres.sql", "engines/migrations_sqlite.sql", "engines/migrations_postgres.sql"),
        *("mails/", "web/pages/", "tests/", "bench/", "deploy/", "docs/", "examples/", "requirements/"),
        *(".ci/run", ".github/", ".pre-commit-config.yaml"),
    }
    listed = [row[0] for row in table_after(ARCHITECTURE, "The files")]
    assert sorted(listed) == sorted(modules | others)
    assert all((HERE / name).exists() for name in listed)


@each("page", sorted(HERE.glob("*.md")) + sorted((HERE / "docs").rglob("*.md")))
def test_a_link_of_a_document_leads_to_a_file_and_heading(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    links += [(source, "") for source in re.findall(r'<img src="([^"]+)"', page.read_text())]
    for target, anchor in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_lock_files_pin_every_package_within_the_ranges() -> None:
    project = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    for name, more in (("run.txt", []), ("dev.txt", extras), ("pyz.txt", extras)):
        text = (HERE / "requirements" / name).read_text()
        locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+) .*\\$", text, re.MULTILINE))
        for needed in map(Requirement, [*project["dependencies"], *more]):
            assert needed.specifier.contains(locked[needed.name]), (name, needed.name, locked[needed.name])


def test_the_nginx_lines_of_the_readme_are_those_that_the_proxy_tests_run() -> None:
    shown = README.partition("```nginx\n")[2].partition("```")[0]
    run = (HERE / "deploy/nginx.conf").read_text()
    assert {line.strip() for line in shown.splitlines()} <= {line.strip() for line in run.splitlines()}


@pytest.mark.slow
def test_the_product_stays_small() -> None:
    lines = counts()
    assert lines.pop("all") <= 5878
    assert lines.pop("deciding who gets in") <= 2000
    limits = {"auth.py": 750, "authsvc.py": 550, "storage.py": 600}
    assert [name for name, found in lines.items() if found > limits.get(name, 450)] == []
