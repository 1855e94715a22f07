"""The commands in the documents: tests type each block of them, or the page says why not."""

from __future__ import annotations

import ast
import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from tests.cases import each
from tests.conftest import HERE, Service, clean_environ
from tests.crowd import awaited
from tests.documents import PAGES, blocks, commands_in
from tests.proxies import accepts, reserve_port

TARGETS = set(re.findall(r"^([a-z]+):", (HERE / "Makefile").read_text(), re.MULTILINE))
# Ids, tokens and times, which differ in each run.
CHANGING = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9]{8}T[0-9]{6}")


@functools.cache
def typed_blocks() -> set[tuple[str, str]]:
    """Return the page and the start of each block that a test types."""
    return {
        (ast.literal_eval(call.args[0]), ast.literal_eval(call.args[1]))
        for text in (path.read_text() for path in (HERE / "tests").glob("test_*.py"))
        if "commands_in(" in text
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "commands_in"
        and isinstance(call.args[0], ast.Constant)
    }


def transcript(text: str, cwd: Path, **environ: str) -> tuple[list[str], list[str]]:
    """Run the commands of a block; return the lines that they print, and the lines that the block shows."""
    lines = text.strip().splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    script = "shopt -s expand_aliases\n" + "\n".join(f"{command}; echo" for command in commands)
    done = subprocess.run(
        ["bash", "-e"], input=script, text=True, capture_output=True, cwd=cwd, env=clean_environ() | environ, timeout=60
    )
    printed = [CHANGING.sub("…", line) for line in done.stdout.splitlines() if line]
    return printed, [CHANGING.sub("…", line) for line in lines if not line.startswith("$ ")]


def add_environment(folder: Path) -> None:
    """Let the commands in a folder find the Python of these tests where make puts it."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / ".venv/bin/python").chmod(0o755)


@each("page", PAGES)
@pytest.mark.slow
def test_each_block_of_commands_is_typed_by_a_test_or_says_why_not(page: str) -> None:
    typed = {start for named, start in typed_blocks() if named == page}
    found = [one for one in blocks(page) if one.has_commands]
    assert [one.text for one in found if not one.reason and not one.text.startswith(tuple(typed))] == []
    assert [one.text for one in found if one.reason and one.text.startswith(tuple(typed))] == []


def test_every_block_of_commands_that_a_test_types_exists() -> None:
    for page, start in typed_blocks():
        assert commands_in(page, start)


@each("page", PAGES)
def test_the_documents_name_targets_of_the_makefile(page: str) -> None:
    typed = re.findall(r"(?:`|^[$#] )make((?: \w+=\S*)*(?: [a-z]+)?)", PAGES[page].read_text(), re.MULTILINE)
    assert {words.split()[-1] for words in typed if words and "=" not in words.split()[-1]} <= TARGETS


def test_a_server_of_files_shows_one_folder_to_this_machine_only() -> None:
    """In the checkout it would show the database to everybody who reaches the machine."""
    paths = [*PAGES.values(), HERE / "examples/localhost.conf"]
    found = [line for path in paths for line in path.read_text().splitlines() if "http.server" in line]
    assert len(found) == 2
    assert all("http.server --directory examples --bind 127.0.0.1 " in line for line in found)


@pytest.mark.process
def test_make_alone_lists_the_targets() -> None:
    listed = [
        subprocess.run(["make", "-s", *target], cwd=HERE, capture_output=True, text=True, check=True).stdout
        for target in ([], ["help"])
    ]
    assert listed[0] == listed[1]
    assert set(re.findall(r"^make (\w+)", listed[0], re.MULTILINE)) == TARGETS - {"help"}


def test_the_quick_start_prints_what_the_readme_shows(service: Service, tmp_path: Path) -> None:
    host = service.url.removeprefix("http://")
    session = commands_in("README.md", "$ curl -d email=bob@example.com")
    printed, shown = transcript(session.replace("127.0.0.1:5000", host), tmp_path)
    assert printed == shown


def test_the_operator_commands_print_what_the_docs_show(start: Callable[..., Service], tmp_path: Path) -> None:
    service = start(AUTHSVC_DATABASE="authsvc.db")
    host = service.url.removeprefix("http://")
    environ = service.environ | {"AUTHSVC_LISTEN": host}
    requests.post(f"{service.url}/users", data={"email": "bob@example.com", "password": "b4l0u"}, timeout=5)
    (tmp_path / "authsvc.py").symlink_to(HERE / "authsvc.py")
    add_environment(tmp_path)
    serving = commands_in("docs/operations.md", "$ alias authsvc=").replace("127.0.0.1:5000", host)
    printed, shown = transcript(serving, tmp_path, **environ)
    assert printed == shown
    assert (tmp_path / "authsvc.db").exists()  # relative to the working folder, not to the folder of the program
    service.end()
    stopped = commands_in("docs/operations.md", "$ authsvc restore")
    printed, shown = transcript(serving.splitlines()[0] + "\n" + stopped, tmp_path, **environ)
    assert printed == shown


def test_the_metrics_begin_as_the_docs_show(start: Callable[..., Service], tmp_path: Path) -> None:
    asking = commands_in("docs/operations.md", "$ curl -s http://127.0.0.1:5000/metrics")
    printed, shown = transcript(asking.replace("http://127.0.0.1:5000", start().url), tmp_path)
    assert printed == shown


def test_the_mail_server_of_the_docs_prints_a_link(start: Callable[..., Service], tmp_path: Path) -> None:
    port = str(reserve_port())
    add_environment(tmp_path)
    server = commands_in("docs/operations.md", "$ export PYTHONUNBUFFERED=1").replace("$ ", "").replace("1025", port)
    export = commands_in("docs/operations.md", "$ export AUTHSVC_SMTP_URL=").replace("1025", port).splitlines()[0]
    printed = tmp_path / "printed"
    with printed.open("wb") as output:
        process = subprocess.Popen(["bash", "-c", server], cwd=tmp_path, stdout=output, start_new_session=True)
    try:
        service = start(**dict(re.findall(r"(\w+)=(\S+)", export)))
        assert awaited(lambda: accepts(int(port)))
        requests.post(f"{service.url}/users", data={"email": "bob@example.com"}, timeout=5)
        link = re.compile(f"^{service.url}/confirm#token=[0-9a-f-]{{36}}&email=bob%40example.com$", re.MULTILINE)
        assert awaited(lambda: link.search(printed.read_text()), 20)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)


@pytest.mark.process
def test_the_bench_describes_its_options(tmp_path: Path) -> None:
    (tmp_path / "bench").symlink_to(HERE / "bench")
    add_environment(tmp_path)
    printed, _ = transcript(commands_in("bench/README.md", "$ .venv/bin/python bench/run.py --help"), tmp_path)
    assert printed[0].startswith("usage: bench/run.py ")
