"""Windows and macOS, as far as Linux can play them: nothing raises at import or in an ordinary run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "tests" / "golden" / "containers" / "vim_like.pth"

# What is imported before is of other people, who know where they run. `os.name` stays: pathlib goes by it.
PLAY = """
import importlib, json, os, pathlib, pkgutil, signal, sys
import accelerate, jinja2, numpy, PIL.Image, pydantic, rich.console, rich.table, rich.progress
import multiprocessing.connection, safetensors.torch, torch, torch.distributed, torch.export, torch.utils.data
import typer, yaml

torch.empty(1, device="meta") + torch.nn.Parameter(torch.empty(1, device="meta"))  # imports the rest of torch

kind, lacking, commands = json.loads(sys.argv[1])
sys.platform = kind
for name in lacking:
    module, _, attribute = name.partition(".")
    if attribute:
        vars(sys.modules[module]).pop(attribute, None)
    else:
        sys.modules[module] = None
read_text = pathlib.Path.read_text

def without_proc(self, *arguments, **options):
    if str(self).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return read_text(self, *arguments, **options)

pathlib.Path.read_text = without_proc

import ssmprune_cli
for each in pkgutil.walk_packages(ssmprune_cli.__path__, "ssmprune_cli."):
    if "__main__" not in each.name and "triton" not in each.name:
        importlib.import_module(each.name)

from ssmprune_cli.cli.main import main
for command in commands:
    sys.argv = ["ssmprune", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            print("ended with", end.code, command, file=sys.stderr)
            raise
"""

WINDOWS = (
    *("fcntl", "resource", "pwd", "grp", "termios", "pty"),
    *(f"os.{name}" for name in ("getuid", "geteuid", "fork", "killpg", "getpgid", "link", "mkfifo", "uname")),
    *(f"os.{name}" for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "fchmod", "sched_getaffinity")),
    *(f"signal.{name}" for name in ("SIGKILL", "SIGCHLD", "SIGHUP", "SIGALRM", "pthread_sigmask", "SIG_BLOCK")),
)
MACOS = ("os.sched_getaffinity", "signal.SIGRTMIN")


@pytest.mark.parametrize(("kind", "lacking"), [("win32", WINDOWS), ("darwin", MACOS)])
def test_an_ordinary_run(kind: str, lacking: tuple[str, ...], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(8) % 10)
    images, out, tuned = (str(tmp_path / name) for name in ("images.npz", "out", "tuned"))
    labelled = ["--data", images, "--dataset", "npz"]
    named = ["--reduction", "context", "--out", out, "--quiet"]
    compress = ["compress", str(CHECKPOINT), "--keep", "0.6", "--calib", images, *labelled, *named]
    training = ["--epochs", "2", "--batch-size", "4", "--workers", "0"]  # the second epoch replaces a folder
    commands = [
        compress,
        ["visualize", out, images, "--count", "1", "--out", str(tmp_path / "pictures")],
        *([["finetune", out, *labelled, *training, "--out", tuned]] if kind == "win32" else []),
        ["env", "--json"],
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAY, json.dumps([kind, lacking, commands])],
        cwd=ROOT,
        # On a Mac the C kernels are compiled with other flags, for which there is a test of their own.
        env={**os.environ, "OMP_NUM_THREADS": "1", "SSMPRUNE_BACKEND": "auto" if kind == "win32" else "chunked"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout[done.stdout.index("\n{\n") :])["kernels"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["provenance"]["backend"] == "chunked"
    if kind == "win32":
        assert kernels["cpu"] == "the C kernels are not built on Windows"
        assert report["provenance"]["backends_refused"]["cpu"] == kernels["cpu"]  # which the report says
