"""The inside of a Mamba block in two Triton kernels, against the float64 reference; where it runs: see test_triton."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmprune_cli.inference.cuda_blocks import FusedBlocks
from ssmprune_cli.inference.explain import Journal
from ssmprune_cli.interface import ScanAlignment
from ssmprune_cli.kernels import BlockSizes, mamba_inner, pack_inner, pack_products, use_backend
from ssmprune_cli.kernels.inputs import InnerInputs
from ssmprune_cli.kernels.pytorch import composed
from ssmprune_cli.kernels.triton import backend as triton_backend
from ssmprune_cli.kernels.triton import inner_launch
from ssmprune_cli.kernels.triton.backend import TRITON, interpreted
from ssmprune_cli.models import MambaBlock
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.tokens import TokenSequence
from tests.kernels.test_fused import MODES, Case

ROOT = Path(__file__).parents[2]
DEVICE = "cpu" if interpreted() else "cuda"
kernels = pytest.mark.skipif(
    TRITON.missing() is not None, reason="test_under_the_interpreter runs it, as there is no GPU for Triton"
)
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="test_under_the_interpreter runs it")

# Of the largest value. float32: measured 5e-7 under the interpreter; a GPU's exp is 2^-22 off in each step. 16 bits: u,
# the steps and the result are rounded; op by op is as far off.
TOLERANCE = {torch.float32: 2e-6 if interpreted() else 2e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
DTYPES = [torch.float32, torch.float16, *([] if interpreted() else [torch.bfloat16])]
FUSED = [mode for mode in MODES if not mode.startswith("pool")]
# An odd and an even number of tokens, two blocks of channels, sizes that fill nothing, one direction, one token.
BLOCK = (1, 5, 16, BlockSizes(40, 16, 4, 3, 2))
SHAPES = [
    (2, 4, 12, BlockSizes(37, 7, 3, 2, 2)),
    (1, 3, 8, BlockSizes(16, 5, 2, 1, 1)),
    (1, 1, 16, BlockSizes(33, 16, 4, 20, 2)),
]


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Whoever reads what nobody has written shows it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case: Case, backend: str, dtype: torch.dtype) -> Tensor:
    """The op on `DEVICE`, on values that depend on the case only."""
    use_backend(backend)
    case.generator.manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    xz = case.normal(case.batch, case.length + 1, 2 * case.sizes.d_inner)[:, 1:].to(dtype)  # samples are apart
    lost = case.lost(case.sizes.d_inner)
    own = {
        name: value.to(dtype if name == "context" else wide)
        for name, value in lost.items()
        if value.dtype.is_floating_point
    }
    moved = {name: value.to(DEVICE) for name, value in (lost | own).items()}
    parameters = pack_inner(case.directions[0]).to(DEVICE, wide)
    products = pack_products(case.directions[0], dtype).to(DEVICE) if backend == "triton" and case.batch > 1 else None
    _, N, K, R, *_ = case.sizes
    return mamba_inner(xz.to(DEVICE), parameters, N, K, R, **moved, scale=0.5, products=products)


def check(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = run(case, "reference", torch.float64)
    monkeypatch.setattr(composed, "mamba_inner", None)  # nothing falls back
    found = run(case, "triton", dtype)
    assert found.dtype == dtype and found.shape == truth.shape
    assert (found.double() - truth).abs().max() <= TOLERANCE[dtype] * truth.abs().max()


@kernels
@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("mode", FUSED)
def test_values(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(*BLOCK, mode, blocks=1), torch.float32, monkeypatch)


@kernels
@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["gap+delta", "frozen+size"])
def test_shapes_at_the_edge(shape: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(shape[0], shape[1], shape[2], shape[3], mode, 1), torch.float32, monkeypatch)


@kernels
@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("mode", ["plain", "frozen"])
def test_values_in_16_bits(dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(Case(*SHAPES[0], mode, blocks=1), dtype, monkeypatch)


@kernels
@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("mode", ["plain", "frozen"])
def test_several_tiles_of_tokens(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution reaches over the border of a tile; the last tile is not full."""
    monkeypatch.setattr(inner_launch, "BLOCK_T", 4)
    check(Case(2, 6, 8, BlockSizes(5, 2, 3, 1, 2), mode, blocks=1), torch.float32, monkeypatch)


@kernels
@pytest.mark.parametrize("mode", ["pool", "gap"])
def test_what_does_not_fit_is_composed(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled tokens; and a scan that is split into groups to fill the card."""
    case, calls = Case(*SHAPES[1], mode, blocks=1), list[int]()
    monkeypatch.setattr(triton_backend, "_groups", lambda programs, length, device: 1 if mode == "pool" else 2)
    whole = composed.mamba_inner

    def counted(*inputs: Any) -> Tensor:
        calls.append(1)
        return whole(*inputs)

    monkeypatch.setattr(composed, "mamba_inner", counted)
    found = run(case, "triton", torch.float32)
    assert calls
    truth = run(case, "reference", torch.float64)
    assert (found.double() - truth).abs().max() <= TOLERANCE[torch.float32] * truth.abs().max()


def test_why_it_does_not_fit() -> None:
    def inputs(dtype: torch.dtype = torch.float32, length: int = 5, rank: int = 3, **lost: Tensor) -> InnerInputs:
        xz = torch.empty(1, length, 64, dtype=dtype, device="meta")
        absent = dict.fromkeys(("gap", "gap_delta", "context", "sources", "read", "cells", "size", "mass"))
        return InnerInputs(xz, xz, 16, 4, rank, **{**absent, **lost}, scale=1.0)

    assert inner_launch.refused(inputs(), interpreted=False) is None
    assert inner_launch.refused(inputs(torch.bfloat16), interpreted=False) is None
    reasons = [
        inner_launch.refused(inputs(torch.bfloat16), interpreted=True),
        inner_launch.refused(inputs(cells=torch.zeros(1, 5, dtype=torch.int64)), interpreted=False),
        inner_launch.refused(inputs(rank=65), interpreted=False),
        inner_launch.refused(inputs(length=2**25), interpreted=False),
    ]
    for reason, words in zip(reasons, ("interpreter", "pooled", "rank of 65", "32 bits"), strict=True):
        assert reason is not None and words in reason


@kernels
def test_an_empty_batch() -> None:
    assert run(Case(0, 3, 8, BlockSizes(16, 5, 2, 1, 2), "gap", blocks=1), "triton", torch.float32).shape == (0, 3, 16)


class Launches:
    """Counts what a GPU would be given: kernels in Triton, which are not run, and PyTorch's ops that compute."""

    FREE = (
        "empty",
        "view",
        "slice",
        "select",
        "expand",
        "transpose",
        "::t",
        "as_strided",
        "unsqueeze",
        "split",
        "detach",
    )
    WRAPPERS = (
        "ssmprune::",
        "linear",
        "matmul",
        "reshape",
        "resolve",
        "alias",
        "lift",
        "result_type",
        "promote_types",
        "chunk",
        "narrow",
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        self.names: list[str] = []
        monkeypatch.setattr(InterpretedFunction, "run", lambda kernel, *_, **__: self.names.append(kernel.__name__))

    def of(self, block: MambaBlock, sequence: TokenSequence, alignment: ScanAlignment | None) -> list[str]:
        with torch.inference_mode():
            block.run(sequence, alignment, "nothing")  # weights are prepared, and what follows from positions
            self.names.clear()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                block.run(sequence, alignment, "nothing")
        ops = [event.name for event in profile.events() if "::" in event.name]
        return self.names + [name for name in ops if not any(part in name for part in (*self.FREE, *self.WRAPPERS))]


@needs_interpreter
def test_a_block_starts_five_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, with gaps, with merged tokens: norm, in_proj, what the scans read, the scans, out_proj. Tokens that only
    convolutions see are scaled by the norm's weight and projected besides."""
    use_backend("triton")
    torch.manual_seed(0)
    model = Vim(VimConfig(image_size=(16, 16), patch_size=8, depth=1, embed_dim=16, num_classes=3)).eval()
    block = next(each for each in FusedBlocks(model, Journal()).model.modules() if isinstance(each, MambaBlock))
    own = ["norm_forward", "inner_inputs", "inner_scan", "aten::mm", "aten::mm"]
    dense = replace(TokenSequence.dense(torch.randn(2, 6, 16)), residual=torch.randn(2, 6, 16))
    kept = torch.tensor([[0, 2, 3], [1, 4, 5]])
    steps = torch.rand(2, 32)
    count = Launches(monkeypatch)
    assert count.of(block, dense, None) == own
    assert count.of(block, dense.keep(kept, others="gone"), ScanAlignment(gap_delta=steps)) == own
    merged = dense.merge(kept, torch.tensor([[0, 0, 1, 2, 2, 2], [0, 0, 1, 1, 1, 2]]))
    assert count.of(block, merged, ScanAlignment(mass=torch.tensor(0.5))) == own
    found = count.of(block, dense.keep(kept, others="context"), ScanAlignment(gap_delta=steps))
    assert sorted(found) == sorted([*own, "aten::mul", "aten::mm"])


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="it is this run")
def test_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("SSMPRUNE_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
