"""recipes/ci: the commands of the worked example, run as a runner's shell would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / "recipes" / "ci" / "github-actions.yml"


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert set(workflow) == {"name", True, "env", "jobs"}  # YAML reads "on" as true
    (job,) = workflow["jobs"].values()
    found: list[dict[str, Any]] = job["steps"]
    return found


def run(step: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """The step's script in bash, as a runner does it, from a folder that sees the repository's files."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "ssmprune"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ssmprune_cli "$@"\n')
    program.chmod(0o755)
    paths = os.pathsep.join([str(programs), os.environ["PATH"]])
    environment = {"PATH": paths, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step["run"]],
        cwd=folder,
        env={**os.environ, **environment, "GOMP_SPINCOUNT": "10000"},
        capture_output=True,
        text=True,
        check=False,
    )


def unmeasured(stderr: str) -> list[str]:
    """What is said, but for the warning that so small a model got no faster, which depends on the machine."""
    return [line for line in stderr.splitlines() if "than the dense one" not in line]


def test_the_install_step_takes_the_cpu_build_of_torch_first(steps: list[dict[str, Any]]) -> None:
    (install,) = [step["run"] for step in steps if step.get("name") == "Install"]
    first, second = install.splitlines()
    assert first.startswith("pip install torch --index-url") and "cpu" in first and second == "pip install ."


@pytest.mark.slow
def test_the_commands_run_and_a_broken_limit_ends_them_with_3(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    commands = {step["name"]: step for step in steps if "run" in step}
    done = run(commands["Compress"], tmp_path)
    assert (done.returncode, unmeasured(done.stderr)) == (0, []), done.stderr
    report = json.loads((tmp_path / "artefact" / "report.json").read_text())
    assert report["accuracy"]["count"] == 2000
    done = run(commands["Summary"], tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# artefact: ") and f"{100 * report['accuracy']['top1']:.2f} %" in summary
    done = run(commands["Compress"], tmp_path)
    assert done.returncode == 1 and "not empty" in done.stderr  # nothing is replaced without --overwrite
    # A limit is broken: exit code 3, and the artefact and its summary are there all the same.
    few = np.load(ROOT / "recipes" / "demo" / "test.npz")
    np.savez(tmp_path / "few.npz", images=few["images"][:50], labels=few["labels"][:50])
    strict = (
        commands["Compress"]["run"]
        .replace("recipes/demo/test.npz", "few.npz")
        .replace("--max-drop 4", "--max-drop -50 --repair none")
    )
    done = run({"run": strict.replace("--out artefact", "--out broken")}, tmp_path)
    assert done.returncode == 3 and "--max-drop allows -50" in done.stderr, done.stderr
    assert "judged by its lower end); --min-accuracy asks for 92" in done.stderr
    assert len(unmeasured(done.stderr)) == 2, done.stderr
    done = run({"run": commands["Summary"]["run"].replace("report artefact", "report broken")}, tmp_path)
    assert done.returncode == 0 and "# broken: " in (tmp_path / "summary.md").read_text()
