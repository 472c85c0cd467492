"""--precision: models computed in half precision."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import UsageError
from ssmprune_cli.workflows.measure.precision import in_precision
from ssmprune_cli.workflows.profile import profile

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
CHECKPOINTS = [ROOT / "benchmarks" / f"{name}_cifar10.pth" for name in ("vim", "plainmamba", "vmamba")]
DEMO = ROOT / "recipes" / "demo"


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_every_kind_of_model(path: Path, precision: str) -> None:
    model = checkpoint.load(path).eval()
    images = torch.randn(2, 3, *model.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
        half = in_precision(model, precision)
        found = half(images.to(half.dtype))
    # Of the largest logit; measured: 5e-3 in bfloat16, which has 8 bits, and 4e-4 in float16, which has 11.
    bound = {"bf16": 1.5e-2, "fp16": 1.5e-3}[precision]
    assert found.dtype == half.dtype and half.dtype.itemsize == 2
    assert (found.float() - expected).abs().max() <= bound * expected.abs().max()


def test_profile(ssmprune: Run) -> None:
    quick = ("--rounds", "1", "--batch-size", "1")
    done = ssmprune("profile", CHECKPOINTS[0], *quick, "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    assert "batch 1, bfloat16, cpu" in done.stdout
    (one,) = json.loads(ssmprune("profile", CHECKPOINTS[0], *quick, "--precision", "fp16", "--json").stdout)["models"]
    assert (one["dtype"], one["backend"]) == ("float16", "chunked")
    assert one["backends_refused"]["cpu"] == "does not compute in torch.float16"


def test_multiply_adds_are_the_same() -> None:
    wide, half = (checkpoint.load(CHECKPOINTS[0]) for _ in range(2))
    in_precision(half, "bf16")
    with pytest.raises(UsageError, match=r"torch.float32, torch.bfloat16"):
        profile([wide, half])
    (one,), (other,) = (profile([each], batch_size=1, rounds=1) for each in (wide, half))
    assert one.multiply_adds_all_directions == other.multiply_adds_all_directions
    assert one.peak_memory_bytes > 1.3 * other.peak_memory_bytes  # vectors of the scans and the stream stay as wide


def test_eval(ssmprune: Run) -> None:
    arguments = ("eval", DEMO / "vim_digits.pth", "--dataset", "npz", "--data", DEMO / "test.npz", "--limit", "100")
    wide, half = (
        json.loads(ssmprune(*arguments, "--json", "--precision", precision).stdout) for precision in ("fp32", "bf16")
    )
    assert (wide["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert abs(wide["top1"] - half["top1"]) <= 0.02
    wrong = ssmprune(*arguments, "--precision", "int4")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "'--precision': 'int4' is none of fp32, bf16, fp16" in wrong.stderr and "fp32, bf16, fp16" in wrong.stderr
