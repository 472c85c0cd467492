"""What an installation contains: compiled kernels if there is a compiler; a package that works if there is none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ssmprune_cli.kernels.cpu import build

ROOT = Path(__file__).parents[2]
USE = """
import torch
from ssmprune_cli.kernels import active_backend, selective_scan
tokens, states = torch.ones(1, 3, 4), torch.ones(1, 3, 2)
selective_scan(tokens, tokens, -torch.ones(4, 2), states, states)
import ssmprune_cli; print(active_backend(), ssmprune_cli.__file__)
"""


def install(folder: Path, **environment: str) -> tuple[str, Path]:
    """Build a wheel in a copy of the sources, unpack it; its name and the folder to import from."""
    source = folder / "source"
    for name in ("ssmprune_cli", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz", "*.pth"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, env={**os.environ, **environment}, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return wheel.name, folder / "site"


def backend_of(site: Path, folder: Path) -> str:
    """The backend in use when the unpacked wheel is imported on a machine without a compiler."""
    environment = {**os.environ, "PYTHONPATH": str(site), "PATH": str(folder), "CC": "", "XDG_CACHE_HOME": str(folder)}
    result = subprocess.run([sys.executable, "-c", USE], env=environment, cwd=folder, capture_output=True, text=True)
    backend, _, file = result.stdout.strip().partition(" ")
    assert file.startswith(str(site)), result.stderr
    return backend


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="no C compiler")
def test_a_wheel_built_with_a_compiler_needs_none_later(tmp_path: Path) -> None:
    quick = tmp_path / "quick-compiler"  # without optimising: three levels are compiled
    quick.write_text(f'#!/bin/bash\nexec "{build.compiler()}" "${{@/-O3/-O0}}"\n')
    quick.chmod(0o755)
    name, site = install(tmp_path, CC=str(quick))
    assert "-py3-none-" in name and not name.endswith("-any.whl")
    assert backend_of(site, tmp_path) == "cpu"


@pytest.mark.slow
def test_a_wheel_is_built_and_runs_without_a_compiler(tmp_path: Path) -> None:
    name, site = install(tmp_path, PATH=str(tmp_path), CC="")
    assert name.endswith("-py3-none-any.whl")
    assert backend_of(site, tmp_path) == "chunked"


@pytest.mark.slow
def test_cibuildwheel_gets_a_wheel_for_its_platform_without_a_compiler_too(tmp_path: Path) -> None:
    name, _ = install(tmp_path, PATH=str(tmp_path), CC="", CIBUILDWHEEL="1")
    assert "-py3-none-" in name and not name.endswith("-any.whl")
