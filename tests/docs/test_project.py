"""What describes the project agrees with itself: versions, supported Pythons, checks of every kind."""

from __future__ import annotations

import re
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
