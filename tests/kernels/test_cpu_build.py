"""The C kernels in every vector width, and how they are built and kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ssmprune_cli.kernels import build
from ssmprune_cli.kernels.backend import Backend
from ssmprune_cli.kernels.cpu import CpuBackend
from ssmprune_cli.kernels.inputs import BlocksInputs, BlockSizes, ScanInputs
from ssmprune_cli.kernels.pytorch import REFERENCE

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")


def inputs(channels: int, dtype: torch.dtype) -> ScanInputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype)

    token, state = (2, 19, channels), (2, 19, 5)
    return ScanInputs(
        u=normal(*token),
        delta=normal(*token),
        A=-normal(channels, 5).exp(),
        B=normal(*state),
        C=normal(*state),
        D=normal(channels),
        z=normal(*token),
        delta_bias=normal(channels),
        delta_softplus=True,
        shift=normal(*token).abs(),
        gap=None,
        gap_delta=None,
        reverse=True,
    )


def blocks(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Two Mamba blocks whose width and whose scans' channels are multiples of 16, as the C code for blocks has it."""
    dim, sizes = 16 * channels, BlockSizes(16 * channels + 16, 5, 3, 2, 2)
    generator = torch.Generator().manual_seed(1)

    def normal(*size: int) -> torch.Tensor:
        values = torch.randn(*size, dtype=torch.float64, generator=generator) / math.sqrt(size[-1])
        return values.to(dtype)

    count = dim * (1 + 3 * sizes.d_inner) + 2 * sizes.inner
    hidden, gap, gap_delta = normal(3, 9, dim), normal(2, 3, 9).abs(), normal(2, 2, sizes.d_inner).abs()
    packed = [normal(count) * count**0.5 / dim**0.5 for _ in range(2)]
    return backend.mamba_blocks(
        BlocksInputs(hidden, None, packed, sizes, gap, gap_delta, None, None, 0.5, 1e-5, wants_y=True)
    )


@needs_compiler
@pytest.mark.parametrize("width", [4, 8, 16])
def test_every_vector_width(width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wider code runs on any processor, only slower: the one of AVX-512 is tested where there is none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(build.LEVELS, build.level(), (f"-DW={width}",))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))  # quicker to compile
    backend = CpuBackend()
    assert backend.missing() is None
    for channels in (3, 16, 37):
        single, double = inputs(channels, torch.float32), inputs(channels, torch.float64)
        grad = torch.linspace(-1, 1, 2 * 19 * channels).view(2, 19, channels)
        pairs = [(backend.scan(single), REFERENCE.scan(double))]
        pairs += [
            (found, truth)
            for found, truth in zip(
                backend.scan_backward(grad, single), REFERENCE.scan_backward(grad.double(), double), strict=True
            )
            if found is not None and truth is not None
        ]
        weight, bias = single.A[:, :4], single.D
        assert bias is not None and len(pairs) == 10
        pairs.append(
            (
                backend.conv(single.u, weight, bias, True),
                REFERENCE.conv(double.u, weight.double(), bias.double(), True),
            )
        )
        pairs += zip(blocks(backend, channels, torch.float32), blocks(REFERENCE, channels, torch.float64), strict=True)
        for found, truth in pairs:
            # Relative to the largest entry, as in test_scan.py.
            assert (found.double() - truth).abs().max() <= 1e-5 * truth.abs().max()


@needs_compiler
def test_the_library_is_compiled_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library()
    (library,) = (tmp_path / "ssmprune").iterdir()  # no half-written file stays behind
    written = library.stat().st_mtime_ns
    build.load_library()
    assert library.stat().st_mtime_ns == written


@needs_compiler
def test_a_failing_compiler_is_named_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(build.LEVELS, build.level(), ("-march=no-such-processor",))
    reason = CpuBackend().missing()
    assert reason is not None and "failed: " in reason and "no-such-processor" in reason
    assert not list((tmp_path / "ssmprune").iterdir())


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("fpu sse2", "x86-64"),
        ("sse2 avx avx2 bmi2 f16c fma", "x86-64-v3"),
        ("sse2 avx avx2 bmi2 f16c fma avx512f", "x86-64-v3"),  # AVX-512 in part is not v4
        ("sse2 avx2 bmi2 f16c fma avx512f avx512bw avx512cd avx512dq avx512vl", "x86-64-v4"),
    ],
)
def test_the_instruction_set_is_one_that_the_processor_has(
    flags: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda self: f"model name\t: X\nflags\t\t: {flags}\nbugs\t:\n")
    assert build.level() == level
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert build.level() == "baseline"
