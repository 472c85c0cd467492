"""The C kernels in every vector width, and how they are built and kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ssmprune_cli.kernels.backend import REFERENCE, Backend
from ssmprune_cli.kernels.cpu import build
from ssmprune_cli.kernels.cpu.backend import CpuBackend
from ssmprune_cli.kernels.inputs import BlocksInputs, GridConvInputs, RoutedInputs, ScanInputs
from ssmprune_cli.kernels.packing import BlockSizes, InnerParameters, pack_block, pack_routes

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")


class Values:
    """Random tensors in one dtype, the same ones for every dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=self.generator).to(self.dtype)


def scan(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    normal = Values(0, dtype)
    token, state = (2, 19, channels), (2, 19, 5)
    inputs = ScanInputs(
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
    return backend.scan(inputs), *backend.scan_backward(normal(*token), inputs)


def convolutions(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    normal = Values(1, dtype)
    x, grad, weight, bias = normal(2, 19, channels), normal(2, 19, channels), normal(channels, 4), normal(channels)
    context, sources = normal(2, 3, channels), torch.randint(-1, 22, (2, 19, 4), generator=normal.generator)
    positions = torch.stack([torch.randperm(24, generator=normal.generator)[:19] for _ in range(2)])
    grid = GridConvInputs(x, normal(channels, 3, 3), bias, 4, 6, positions, 11)
    return (
        backend.conv(x, weight, bias, True),
        *backend.conv_backward(grad, x, weight, bias, True),
        backend.sparse_conv(x, context, sources, weight, bias),
        *backend.sparse_conv_backward(grad, x, context, sources, weight, bias),
        backend.grid_conv(grid),
        *backend.grid_conv_backward(grad[:, :11], grid),
    )


def rows(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    normal = Values(2, dtype)
    a, b, c = (normal(2, 19, channels) for _ in range(3))
    weight = normal(channels)
    return (
        *backend.add_rms_norm(a, b, weight, 1e-5),
        *backend.add_rms_norm_backward(a, b, c, weight, 1e-5),
        backend.gated_sum([a, b], c, 0.5),
        *backend.gated_sum_backward(a, [b, c], a, 0.5),
    )


def blocks(
    backend: Backend, channels: int, dtype: torch.dtype, weights: torch.dtype = torch.float32, multiple: int = 16
) -> tuple[torch.Tensor, ...]:
    """Two Mamba blocks whose width and whose scans' channels are multiples of 16, as the C code for blocks has it."""
    dim, d_inner = multiple * channels, multiple * (channels + 1)
    parts = backend.block_parts(dim, d_inner, weights) if isinstance(backend, CpuBackend) else 0
    sizes = BlockSizes(d_inner, 5, 3, 2, 2, parts or 0)
    normal = Values(3, torch.float64)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.to(weights).to(dtype)

    def scaled(*size: int) -> torch.Tensor:
        return rounded(normal(*size) / math.sqrt(size[-1]))

    E, N, K, R, G, parts = sizes
    hidden, gap, gap_delta = scaled(3, 9, dim), rounded(normal(2, 3, 9).abs()), rounded(normal(2, 2, E).abs())
    packed = []
    for _ in range(2):
        inner = [
            InnerParameters(
                scaled(E, K),
                scaled(R + 2 * N, E),
                scaled(E, R),
                rounded(-normal(E, N).exp()),
                *(rounded(normal(E)) for _ in range(3)),
            )
            for _ in range(G)
        ]
        packed.append(pack_block(rounded(normal(dim)), scaled(2 * E, dim), scaled(dim, E), inner, parts))
    return backend.mamba_blocks(
        BlocksInputs(hidden, None, torch.stack(packed), sizes, gap, gap_delta, None, None, 0.5, 1e-5, wants_y=True)
    )


def routes(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    normal = Values(4, dtype)
    order = torch.stack([torch.randperm(19, generator=normal.generator) for _ in range(3)])[:, None]  # (G, 1, L)
    rows = torch.randint(0, 19, (3, 2, 19), generator=normal.generator)
    parameters = pack_routes(
        normal(3, channels, 2), -normal(3, channels, 5).exp(), normal(3, channels), normal(3, channels)
    )
    steps, extra = normal(2, 19, 1, 12), normal(3, 1, 19, 5)
    gap, gap_delta = normal(3, 2, 19).abs(), normal(3, channels).abs()
    inputs = RoutedInputs(normal(2, 19, channels), steps, parameters, 5, order, rows, extra, gap, gap_delta)
    return (backend.routed_scans(inputs),)


def half_blocks(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The same of a bfloat16 model, with multiples of 32. The truth has its weights in float64."""
    found = blocks(backend, channels, torch.bfloat16 if dtype == torch.float32 else dtype, torch.bfloat16, 32)
    return tuple(each.to(dtype) for each in found)


def wide_blocks(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """float32 with multiples of 32, whose products the processor makes of bfloat16 values where it can."""
    return blocks(backend, channels, dtype, multiple=32)


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
        for ops in (scan, convolutions, rows, routes, blocks, wide_blocks, half_blocks):
            found, truth = ops(backend, channels, torch.float32), ops(REFERENCE, channels, torch.float64)
            assert len(found) == len(truth)
            for own, expected in zip(found, truth, strict=True):
                if own is None or expected is None:
                    assert own is expected
                    continue
                # Relative to the largest entry, as in test_scan.py; results in bfloat16 have 8 bits.
                bound = 1e-5 if ops is not half_blocks else 2**-8
                assert (own.double() - expected).abs().max() <= bound * expected.abs().max(), ops


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
