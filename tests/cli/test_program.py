"""The program as a user runs it: a process, its exit code, its stdout and its stderr."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ssmprune_cli import __version__
from ssmprune_cli.plugins import family_plugins

ROOT = Path(__file__).parents[2]


Run = Callable[..., subprocess.CompletedProcess[str]]


def test_version(ssmprune: Run) -> None:
    done = ssmprune("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ssmprune {__version__}\n", "")


def test_help_names_every_command(ssmprune: Run) -> None:
    done = ssmprune("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in ("compress", "eval", "profile", "inspect", "recipes", "env"):
        assert f"\n  {command} " in done.stdout


def test_no_arguments_show_the_help(ssmprune: Run) -> None:
    done = ssmprune()
    assert "Usage: ssmprune" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["squash"], "squash"),
        (["inspect"], "FILE"),
        (["inspect", "x", "--colour"], "--colour"),
        (["eval", "x", "--dataset", "npz", "--data", "y", "--limit", "0"], "--limit"),
        (["eval", "x", "--dataset", "npz", "--data", "y", "--max-drop", "1"], "--max-drop needs --compare"),
        (["compress", "x"], "Give `--target-speedup 1.4`"),
    ],
)
def test_wrong_usage_exits_with_2(ssmprune: Run, arguments: list[str], message: str) -> None:
    done = ssmprune(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# --- recipes


def test_recipes_list(ssmprune: Run) -> None:
    done = ssmprune("recipes", "list")
    assert (done.returncode, done.stderr) == (0, "")
    assert "vim_small_topvim" in done.stdout
    assert "5, 10, 15" in done.stdout
    listed = json.loads(ssmprune("recipes", "list", "--json").stdout)["recipes"]
    assert [recipe["name"] for recipe in listed] == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_models_says_where_published_checkpoints_are(ssmprune: Run) -> None:
    listed = {each["name"]: each for each in json.loads(ssmprune("models", "list", "--json").stdout)["models"]}
    assert listed["vim-small"]["published"] == {"top1": 80.5, "top5": 95.1} and listed["vim-small"]["sha256"] is None
    assert "vim-small" in ssmprune("models", "list").stdout
    done = ssmprune("models", "show", "vim-small")
    assert "hf://hustvl/Vim-small-midclstok/vim_s_midclstok_80p5acc.pth" in done.stdout and "sha256" not in done.stdout
    assert json.loads(ssmprune("models", "show", "vim-small", "--json").stdout) == listed["vim-small"]
    assert "Download vssm1_tiny_0230s" in ssmprune("models", "show", "vmamba-tiny-s1l8").stdout
    done = ssmprune("models", "show", "vim-smal")
    assert done.returncode == 2 and "did you mean 'vim-small'" in done.stderr


def test_recipes_show_prints_the_file_as_it_is(ssmprune: Run) -> None:
    done = ssmprune("recipes", "show", "vim_small_topvim")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (ROOT / "recipes" / "vim_small_topvim.yaml").read_text(encoding="utf-8")
    assert json.loads(ssmprune("recipes", "show", "vim_small_topvim", "--json").stdout)["pruning"]["keep"] == 0.8


def test_recipes_show_of_an_unknown_name(ssmprune: Run) -> None:
    done = ssmprune("recipes", "show", "vim_smal_topvim")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: vim_smal_topvim: there is no file and no shipped recipe of this name; "
        "did you mean 'vim_small_topvim'?\nhint: See `ssmprune recipes list`.\n"
    )


def test_recipes_validate_lists_every_fault_of_every_file(ssmprune: Run, tmp_path: Path) -> None:
    bad, worse = tmp_path / "bad.yaml", tmp_path / "worse.yaml"
    bad.write_text("nam: x\npruning:\n  keep: 2\n  importance: klip\n", encoding="utf-8")
    worse.write_text("pruning: {keep: 0.5\n", encoding="utf-8")
    done = ssmprune("recipes", "validate", "vim_small_topvim", "vim_tiny_topvim", bad, worse)
    assert done.returncode == 1
    assert done.stdout == "vim_small_topvim: valid\nvim_tiny_topvim: valid\n"
    assert done.stderr.splitlines() == [
        "error: not a valid recipe, 3 faults (file:line:column)",
        f"{bad}:1:1: nam: unknown key; did you mean 'name'?",
        f"{bad}:3:3: pruning.keep: must be above 0 and at most 1 (the ratio kept at each point), not 2",
        f"{bad}:4:3: pruning.importance: unknown importance 'klip'; did you mean 'clip'?",
        "not a valid recipe, 1 fault (file:line:column)",
        f"{worse}:2:1: expected ',' or '}}', but got '<stream end>'",
    ]
    done = ssmprune("recipes", "validate", "vim_small_topvim", bad, "--json")
    assert done.returncode == 1 and "3 faults" in done.stderr
    good, wrong = json.loads(done.stdout)["recipes"]
    assert good == {"recipe": "vim_small_topvim", "valid": True, "faults": None}
    assert (wrong["recipe"], wrong["valid"]) == (str(bad), False) and "klip" in wrong["faults"]


# --- env


def test_env(ssmprune: Run) -> None:
    facts = json.loads(ssmprune("env", "--json").stdout)
    assert facts["ssmprune"] == __version__
    assert set(facts["packages"]) >= {"torch", "numpy", "mamba-ssm", "causal-conv1d", "triton"}
    assert facts["devices"]["cpu"] == "available"
    assert facts["families"] == {plugin.name: plugin.package for plugin in family_plugins()}
    assert "available" in facts["kernels"].values()
    assert all(isinstance(reason, str) and reason for reason in facts["kernels"].values())
    done = ssmprune("env")
    assert (done.returncode, done.stderr) == (0, "")
    assert facts["packages"]["torch"] in done.stdout
    assert facts["cpu"] in done.stdout


# --- errors


def test_a_missing_file_is_an_error_without_a_traceback(ssmprune: Run, tmp_path: Path) -> None:
    done = ssmprune("inspect", tmp_path / "none.pth")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "none.pth" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_text_file_is_not_a_checkpoint(ssmprune: Run, tmp_path: Path) -> None:
    file = tmp_path / "notes.pth"
    file.write_text("not a checkpoint\n", encoding="utf-8")
    done = ssmprune("inspect", file)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "notes.pth" in done.stderr
    assert "bug in ssmprune" not in done.stderr


@pytest.mark.parametrize("by_option", [True, False], ids=["--debug", "SSMPRUNE_DEBUG"])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(ssmprune: Run, by_option: bool) -> None:
    command = ("recipes", "show", "none")
    done = ssmprune("--debug", *command) if by_option else ssmprune(*command, SSMPRUNE_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "\nerror: none: there is no file" in done.stderr


def run_main(body: str) -> subprocess.CompletedProcess[str]:
    """Run main() with a command `fail` whose body is given."""
    code = f"""
import sys
from ssmprune_cli.cli.app import app
from ssmprune_cli.cli.main import main
from ssmprune_cli.errors import LimitError
@app.command()
def fail() -> None:
    {body}
sys.argv = ["ssmprune", "fail"]
main()
"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("pass", 0, ""),
        ("raise LimitError('top-1 fell by 2', where='--max-drop')", 3, "error: --max-drop: top-1 fell by 2\n"),
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("open('/none/x')", 1, "error: /none/x: No such file or directory\n"),
        (
            "raise KeyError('x')",
            1,
            "error: this is a bug in ssmprune: KeyError: 'x'\n"
            "hint: Run `ssmprune --debug ...` again and report the traceback with the output of `ssmprune env`.\n",
        ),
    ],
)
def test_every_end_has_its_exit_code_and_message(body: str, code: int, stderr: str) -> None:
    done = run_main(body)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", stderr)


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m ssmprune_cli recipes show vim_small_topvim | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
