"""The C kernels themselves: every vector width, every level, any threads; and what they refuse."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssmprune_cli.kernels import backends_for
from ssmprune_cli.kernels.backend import REFERENCE, Backend
from ssmprune_cli.kernels.choice import BACKENDS
from ssmprune_cli.kernels.cpu import backend as cpu_backend
from ssmprune_cli.kernels.cpu import build
from ssmprune_cli.kernels.cpu.backend import CPU, CpuBackend
from ssmprune_cli.kernels.cpu.library import Library
from ssmprune_cli.kernels.inputs import (
    BlocksInputs,
    GridConvInputs,
    InnerInputs,
    LinearInputs,
    MoveInputs,
    OrderInputs,
    RoutedInputs,
    ScanInputs,
)
from ssmprune_cli.kernels.packing import BlockSizes, InnerParameters, pack_block, pack_inner, pack_linear, pack_routes

ROOT = Path(__file__).parents[2]

CPUS = [name for name in backends_for(torch.zeros(1)) if name.startswith("cpu")]  # every level: see conftest.py
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


def prune_point(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
    normal = Values(7, dtype)
    a, b, older = normal(2, 19, channels), normal(2, 19, channels), normal(2, 3, channels)
    positions = torch.arange(0, 38, 2).repeat(2, 1)
    score = backend.score_tokens([a, b], "l2")
    order = backend.order_tokens(OrderInputs(score, positions, a[..., 0] > -1, [4], 11, True))
    moved = backend.move_tokens(MoveInputs(a, b, positions, order, 11, older, positions[:, :3]))
    return (score, order, *moved)


def blocks(
    backend: Backend, channels: int, dtype: torch.dtype, weights: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Two Mamba blocks."""
    dim, d_inner = channels, 2 * channels + 1
    parts = backend.block_parts(dim, d_inner, weights) if isinstance(backend, CpuBackend) else 0
    sizes = BlockSizes(d_inner, 5, 3, 2, 2, parts or 0)
    normal = Values(3, torch.float64)

    def rounded(values: torch.Tensor) -> torch.Tensor:
        return values.to(weights).to(dtype)

    def scaled(*size: int) -> torch.Tensor:
        return rounded(normal(*size) / math.sqrt(size[-1]))

    E, N, K, R, G, parts, _ = sizes
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
        BlocksInputs(
            hidden,
            None,
            torch.stack(packed),
            sizes,
            gap,
            gap_delta,
            None,
            None,
            None,
            None,
            None,
            None,
            0.5,
            1e-5,
            True,
        )
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
    """The same of a bfloat16 model. The truth has its weights in float64."""
    found = blocks(backend, channels, torch.bfloat16 if dtype == torch.float32 else dtype, torch.bfloat16)
    return tuple(each.to(dtype) for each in found)


def inner(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    normal = Values(5, dtype)
    E, N, K, R = channels, 5, 3, 2
    shapes = [(E, K), (R + 2 * N, E), (E, R), (E, N), (E,), (E,), (E,)]
    packed = []
    for _ in range(2):
        own = InnerParameters(*(normal(*shape) / shape[-1] ** 0.5 for shape in shapes))
        packed.append(own._replace(A=-own.A.exp()))
    context, sources = normal(2, 4, E), torch.randint(-1, 23, (2, 2, 19, K), generator=normal.generator)
    gap, gap_delta = normal(2, 2, 19).abs(), normal(2, E).abs()
    xz = normal(2, 19, 2 * E)
    given = InnerInputs(xz, pack_inner(packed), N, K, R, gap, gap_delta, context, sources, None, None, None, None, 0.5)
    # Four of 23 tokens are frozen: with steps of their own that grow, or pooled.
    sources = torch.randint(-1, 23, (2, 2, 23, K), generator=normal.generator)
    read = torch.rand(2, 23, generator=normal.generator).argsort(dim=1)[:, :19].sort(dim=1).values
    cells = torch.cat((read[:, 1:], torch.full((2, 1), 23)), dim=1)
    size, mass = normal(2, 23).abs() + 1, normal(1).abs()[0]
    frozen = given._replace(gap=None, gap_delta=None, sources=sources, read=read, size=size, mass=mass)
    pooled = frozen._replace(cells=cells, size=size[:, :19])
    return tuple(backend.mamba_inner(each) for each in (given, frozen, pooled))


def linear(backend: Backend, channels: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Packed weights are float32: those of the truth have its values."""
    normal = Values(6, torch.float32)
    x, weight, bias = normal(3, 19, channels), normal(channels + 7, channels), normal(channels + 7)
    if dtype == torch.float64:
        return (torch.nn.functional.linear(x.double(), weight.double(), bias.double()),)
    return (backend.linear(LinearInputs(x, pack_linear(weight), bias, channels + 7)),)


OPS: tuple[Callable[[Backend, int, torch.dtype], tuple[Tensor | None, ...]], ...] = (
    scan,
    convolutions,
    rows,
    prune_point,
    routes,
    inner,
    blocks,
    half_blocks,
    linear,
)


@needs_compiler
@pytest.mark.parametrize(("level", "width"), [("v3", 8), ("v4", 16)])
def test_vectors_wider_than_the_processors(
    level: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code for wider ones runs on any processor, only slower."""
    if level in build.levels():
        pytest.skip("the processor has this level, which is tested as it is")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(build.LIBRARIES, "baseline", (f"-DW={width}",))
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))  # quicker to compile
    backend = CpuBackend("baseline")
    assert backend.missing() is None
    is_exact(backend)


@pytest.mark.parametrize("backend", CPUS)
def test_every_level_and_width(backend: str) -> None:
    is_exact(BACKENDS.get(backend))


def is_exact(backend: Backend) -> None:
    for channels in (3, 16, 37, 96):
        for ops in OPS:
            found, truth = ops(backend, channels, torch.float32), ops(REFERENCE, channels, torch.float64)
            assert len(found) == len(truth)
            for own, expected in zip(found, truth, strict=True):
                if own is None or expected is None:
                    assert own is expected
                    continue
                # Relative to the largest entry, as in test_scan.py. bfloat16 has 8 bits; measured: 1.1e-2.
                bound = 1e-5 if ops is not half_blocks else 3e-2
                assert (own.double() - expected).abs().max() <= bound * expected.abs().max(), (ops, channels)


def everything(backend: Backend, channels: int) -> list[Tensor]:
    found = [each for ops in OPS for each in ops(backend, channels, torch.float32) if each is not None]
    found += [
        each for ops in (scan, convolutions) for each in ops(backend, channels, torch.bfloat16) if each is not None
    ]
    return [*found, backend.mamba_inner(_half_inner(channels))]


def _half_inner(channels: int) -> InnerInputs:
    """What `inner` computes of, in bfloat16."""
    kept: list[InnerInputs] = []

    class Keep(CpuBackend):
        def mamba_inner(self, inputs: InnerInputs) -> Tensor:
            kept.append(inputs)
            return inputs.xz

    inner(Keep(), channels, torch.float32)
    halves = (kept[0].xz.bfloat16(), *kept[0][1:])
    assert kept[0].context is not None
    return InnerInputs(*halves)._replace(context=kept[0].context.bfloat16())


@pytest.fixture
def threads_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is to do."""
    monkeypatch.setattr(cpu_backend, "_WORTH_THREADS", 0)
    monkeypatch.setattr(cpu_backend, "_EXPONENTIALS_WORTH_THREADS", 0)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# 300 channels: sums over channels have several parts.
@pytest.mark.usefixtures("threads_are_worth_it")
@pytest.mark.parametrize("channels", [37, 300])
@pytest.mark.parametrize("backend", CPUS)
def test_threads_do_not_change_a_bit(backend: str, channels: int) -> None:
    own = BACKENDS.get(backend)
    torch.set_num_threads(1)
    expected = everything(own, channels)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert same(everything(own, channels), expected)


@needs_compiler
@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", "OMP_THREAD_LIMIT=2", "OMP_DYNAMIC=true"])
def test_a_team_smaller_than_asked_for_does_not_change_a_bit(limit: str) -> None:
    """The test above again, in a process whose teams are limited."""
    name, _, value = limit.partition("=")
    again = f"{__file__}::test_threads_do_not_change_a_bit[{CPUS[0]}-37]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", again]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, name: value}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


NESTED = """
void omp_set_max_active_levels(int);
int call(int (*kernel)(void *), void *arguments, int levels) {
    int status = 0;
    omp_set_max_active_levels(levels);
#pragma omp parallel num_threads(2)
#pragma omp single
    status = kernel(arguments);
    return status;
}
"""


@needs_compiler
@pytest.mark.usefixtures("threads_are_worth_it")
@pytest.mark.parametrize("levels", [1, 2])
def test_a_call_inside_of_a_parallel_region_does_not_change_a_bit(levels: int, tmp_path: Path) -> None:
    """Where there may be one level of teams, the kernel's own has one thread, whatever was asked for."""
    source, library = tmp_path / "nested.c", tmp_path / "nested.so"
    source.write_text(NESTED)
    command = [str(build.compiler()), "-fopenmp", "-fPIC", "-shared", str(source), "-o", str(library)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("the compiler has no OpenMP")
    nested = ctypes.CDLL(str(library))

    class Nested(Library):
        def run(self, name: str, struct: ctypes.Structure, outside: str = "") -> None:
            assert self.missing() is None
            assert nested.call(getattr(self._code, name), ctypes.byref(struct), levels) == 0

    inside = CpuBackend()
    inside.library = Nested(None)
    torch.set_num_threads(1)
    expected = everything(CPU, 37)
    torch.set_num_threads(4)
    try:
        assert same(everything(inside, 37), expected)
    finally:
        nested.omp_set_max_active_levels(1)


@needs_compiler
@pytest.mark.usefixtures("threads_are_worth_it")
def test_calls_at_once_do_not_change_a_bit() -> None:
    torch.set_num_threads(1)
    expected = everything(CPU, 37)
    torch.set_num_threads(3)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: everything(CPU, 37), range(12)))
    assert all(same(each, expected) for each in results)


FORK = """
import os, signal, torch
from ssmprune_cli.kernels import selective_scan
torch.set_num_threads(2)
tokens, states = torch.randn(2, 40, 64), torch.randn(2, 40, 16)
rates = -torch.rand(64, 16)
expected = selective_scan(tokens, tokens, rates, states, states)  # and now there is a pool of threads
child = os.fork()
if child == 0:
    signal.alarm(60)  # nobody else would end it
    torch.set_num_threads(2)
    again = selective_scan(tokens, tokens, rates, states, states)
    os._exit(0 if again.tolist() == expected.tolist() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(selective_scan(tokens, tokens, rates, states, states), expected)
"""


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_computes_the_same() -> None:
    """Its parent's threads are not there; to wait for them would take forever."""
    command = [sys.executable, "-W", "ignore", "-c", FORK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
