"""The files for contributors: the hooks, the workflow and the templates can be read, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.cases import each
from tests.conftest import HERE
from tests.test_documents import TARGETS

HOOKS = HERE / ".pre-commit-config.yaml"
WORKFLOW = HERE / ".github/workflows/ci.yml"
TEMPLATES = sorted((HERE / ".github/ISSUE_TEMPLATE").glob("*.md"))


def read(path: Path) -> Any:
    return yaml.load(path.read_text(), yaml.BaseLoader)  # which reads "on" as text, and not as true


def test_the_hooks_run_targets_of_the_makefile_and_nothing_from_the_network() -> None:
    [repository] = read(HOOKS)["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint", "make quick"]
    for hook in hooks:
        assert hook["entry"].removeprefix("make ") in TARGETS
        assert hook["language"] == "system"
        assert set(hook["stages"]) <= set(read(HOOKS)["default_install_hook_types"])


def test_the_workflow_runs_every_check_for_a_push_and_a_pull_request() -> None:
    workflow = read(WORKFLOW)
    assert workflow["on"].keys() == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}
    [job] = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (HERE / ".ci/run").stat().st_mode & 0o111


def test_the_workflow_uses_other_code_by_its_commit_only() -> None:
    used = re.findall(r"uses: (\S+)", WORKFLOW.read_text())
    assert used
    assert all(re.fullmatch("[a-z/-]+@[0-9a-f]{40}", name) for name in used)


@each("template", TEMPLATES)
def test_a_template_of_an_issue_has_a_name_and_a_purpose(template: Path) -> None:
    _, head, body = template.read_text().split("---\n", 2)
    assert yaml.safe_load(head).keys() == {"name", "about"}
    assert body.strip()


def test_there_are_templates_for_bugs_and_features() -> None:
    assert [path.stem for path in TEMPLATES] == ["bug", "feature"]


def test_the_template_of_a_pull_request_names_targets_of_the_makefile() -> None:
    named = re.findall("`make ([a-z]+)`", (HERE / ".github/pull_request_template.md").read_text())
    assert named
    assert set(named) <= TARGETS
