"""--backend: the one that is asked for computes, the report says which did, and a missing one is an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"
QUICK = ("--rounds", "1", "--batch-size", "1")


def test_the_backend_asked_for_is_used_and_named(ssmprune: Run) -> None:
    done = ssmprune("profile", CHECKPOINT, *QUICK, "--backend", "reference")
    assert done.returncode == 0, done.stderr
    assert "kernels: reference" in done.stdout
    command = [sys.executable, "-m", "ssmprune_cli", "profile", str(CHECKPOINT), *QUICK, "--json"]
    environment = {**os.environ, "SSMPRUNE_BACKEND": "chunked"}  # read when the program starts
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (one,) = json.loads(done.stdout)["models"]
    assert (one["backend"], one["backends_refused"]) == ("chunked", {})


def test_auto_says_what_it_refused_and_why(ssmprune: Run, tmp_path: Path) -> None:
    without = {"PATH": str(tmp_path), "CC": "nothing", "XDG_CACHE_HOME": str(tmp_path)}
    (one,) = json.loads(ssmprune("profile", CHECKPOINT, *QUICK, "--json", **without).stdout)["models"]
    assert one["backend"] == "chunked"
    assert "no C compiler was found" in one["backends_refused"]["cpu"]
    written = ssmprune(
        "compress", CHECKPOINT, "--keep", "0.5", "--alignment", "null", "--out", tmp_path / "o", **without
    )
    assert written.returncode == 0, written.stderr
    provenance = json.loads((tmp_path / "o" / "report.json").read_text())["provenance"]
    assert provenance["backend"] == "chunked" and "no C compiler" in provenance["backends_refused"]["cpu"]


def test_a_missing_or_unknown_backend_is_an_error(ssmprune: Run, tmp_path: Path) -> None:
    missing = ssmprune(
        "profile", CHECKPOINT, "--backend", "cpu", PATH=str(tmp_path), CC="nothing", XDG_CACHE_HOME=str(tmp_path)
    )
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "kernel backend 'cpu' cannot be used: no C compiler" in missing.stderr
    unknown = ssmprune("profile", CHECKPOINT, "--backend", "abacus")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "'--backend'" in unknown.stderr and "'abacus' is none of auto, triton, " in unknown.stderr
