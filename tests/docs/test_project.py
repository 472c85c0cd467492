"""What describes the project agrees with itself: versions, supported Pythons, checks of every kind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import ssmprune_cli

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read_yaml(*parts: str) -> Any:
    return yaml.safe_load(ROOT.joinpath(*parts).read_text(encoding="utf-8"))


def rules(target: str) -> str:
    """The commands of a target of the Makefile."""
    found = re.search(rf"(?m)^{target}:.*\n((?:\t.*\n)+)", MAKEFILE)
    assert found is not None, target
    return found[1]


def test_there_is_one_version() -> None:
    version = PYPROJECT["project"]["version"]
    assert ssmprune_cli.__version__ == version
    released = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert version in released[:2]  # below "Unreleased", if there is such a section


def test_the_workflow_tests_the_pythons_that_the_package_is_for() -> None:
    jobs = read_yaml(".github", "workflows", "ci.yml")["jobs"]
    tested = jobs["test"]["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    named = [each.rpartition(" ")[2] for each in PYPROJECT["project"]["classifiers"] if each.startswith(prefix)]
    assert tested == named
    assert PYPROJECT["project"]["requires-python"] == f">={tested[0]}"
    first, last = (f"cp{version.replace('.', '')}-*" for version in (tested[0], tested[-1]))
    assert PYPROJECT["tool"]["cibuildwheel"]["build"] == [first, last]


def test_the_workflow_runs_what_a_contributor_runs() -> None:
    jobs = read_yaml(".github", "workflows", "ci.yml")["jobs"]
    for target in ("lint", "test", "docs"):
        assert rules(target)
        assert f"make {target}" in [step.get("run") for step in jobs[target]["steps"]]
    systems = jobs["wheels"]["strategy"]["matrix"]["system"]
    assert {system.partition("-")[0] for system in systems} == {"ubuntu", "macos", "windows"}


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    entries = [hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in local["hooks"]]
    linted = [line.strip().removeprefix("$(BIN)/").removesuffix(" --check") for line in rules("lint").splitlines()]
    assert entries == linted


def test_wheels_do_not_bring_a_second_openmp_runtime() -> None:
    assert "--exclude libgomp.so.1" in PYPROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]


@pytest.mark.parametrize(
    ("page", "text", "complaint"),
    [
        ("index.md", "", None),
        ("index.md", "[x](nowhere.md)", "'nowhere.md', but the target is not found"),
        ("index.md", "[x](kernels.md#nothing)", "does not contain an anchor '#nothing'"),
        ("orphan.md", "# Orphan", "not included in the"),
    ],
    ids=["as it is", "link", "anchor", "page without navigation"],
)
def test_building_the_pages_fails_on_what_leads_nowhere(
    page: str, text: str, complaint: str | None, tmp_path: Path
) -> None:
    """As `make docs` does it; with --quiet a warning would be no error."""
    command = rules("docs").splitlines()[0]
    assert command.endswith("-m mkdocs build --strict")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / page).open("a", encoding="utf-8") as file:
        file.write(f"\n{text}\n")
    arguments = [sys.executable, *command.split()[2:]]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if complaint is None:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "build" / "docs" / "index.html").exists()
    else:
        assert done.returncode != 0 and complaint in done.stderr, done.stderr
