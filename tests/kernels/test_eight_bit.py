"""Products of bytes: at every level, with the instruction for them and without, exactly what the integers give."""

from __future__ import annotations

import ctypes
import math
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import BlockSizes, EightBit, in_eight_bits, linear_int8, pack_linear
from ssmprune_cli.kernels.backend import REFERENCE, Backend
from ssmprune_cli.kernels.choice import BACKENDS
from ssmprune_cli.kernels.cpu import build
from ssmprune_cli.kernels.cpu.backend import CpuBackend
from ssmprune_cli.kernels.cpu.library import Dots, Library
from ssmprune_cli.kernels.inputs import BlocksInputs, LinearInputs
from ssmprune_cli.kernels.packing import InnerParameters, halves, pack_block, unpack_block, unpack_bytes

COMPILES = build.compiler() is not None
LEVELS = build.levels() if COMPILES else ()
LEVELS_AND_DOTS = [(level, dots) for level in LEVELS for dots in (Dots.PAIRS, Dots.FOURS)]
LEVELS_AND_DOTS += [(level, Dots.TILES) for level in LEVELS if level == build.TILES]
# The code for instructions that this processor may not have, with C in their place: see emulated_amx.h.
EMULATED = [("16", Dots.FOURS), ("16", Dots.TILES), ("8", Dots.FOURS)] if COMPILES and sys.platform == "linux" else []
EMULATED_SOURCES = ("amx", "bytes", "byte_tiles", "linear", "blocks", "inner", "scan_forward", "tiles", "threads")
HEADER = Path(__file__).parent / "emulated_amx.h"
# Rows, inputs, outputs: tails of each, one of each, and several panels and groups of tokens.
SHAPES = [(1, 1, 1), (1, 7, 65), (3, 4, 16), (5, 33, 1), (9, 64, 17), (17, 30, 130), (70, 192, 49), (33, 19, 64)]


class Emulated(Library):
    """The library at `code` as if it were that of the processor's best level."""

    def __init__(self, code: Path, dots: Dots) -> None:
        super().__init__(None, dots=dots)
        self._take(ctypes.CDLL(str(code)), build.TILES)


def best_dots(level: str) -> Dots:
    """What the processor has for products of bytes at a level, as Linux says."""
    flags = build.processor_flags()
    if level == build.TILES and "amx_int8" in flags:
        return Dots.TILES
    needed = {build.TILES: {"avx512_vnni"}, "v4": {"avx512_vnni"}, "v3": {"avx_vnni", "avx512_vnni"}}
    return Dots.FOURS if needed.get(level, set()) & flags else Dots.PAIRS


@pytest.fixture(scope="session")
def emulated_code(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """What `linear_int8` and `mamba_blocks` need, compiled for vectors of some width, whichever the processor has."""
    made: dict[str, Path] = {}

    def compiled(width: str) -> Path:
        if width not in made:
            made[width] = tmp_path_factory.mktemp("emulated") / f"{width}.so"
            files = [build.SOURCES / f"{name}.c" for name in EMULATED_SOURCES]
            flags = ("-O0", *build.FLAGS[1:], f"-DW={width}", f'-DEMULATED_AMX="{HEADER}"', "-fopenmp")
            subprocess.run([str(build.compiler()), *flags, *map(str, files), "-o", str(made[width])], check=True)
        return made[width]

    return compiled


@pytest.fixture(
    params=[*LEVELS_AND_DOTS, *((f"emulated {width}", dots) for width, dots in EMULATED)],
    ids=lambda each: f"{each[0]} {each[1].name}",
)
def backend(request: pytest.FixtureRequest, emulated_code: Callable[[str], Path]) -> Iterator[CpuBackend]:
    level, dots = request.param
    if level in LEVELS:
        own = CpuBackend(level, dots=dots)
        if level == build.TILES and own.missing() is not None:
            pytest.skip(str(own.missing()))
        assert own.missing() is None and own.library.dots() is min(dots, best_dots(level))
        yield own
        return
    own = CpuBackend()
    own.library = Emulated(emulated_code(level.split()[1]), dots)
    assert own.library.dots() is dots
    code = own.library._code
    assert code is not None
    products = ctypes.c_int64.in_dll(code, "emulated_products")
    products.value = 0
    yield own
    fault = ctypes.c_char_p.in_dll(code, "emulated_fault")
    assert fault.value is None, "the processor would have refused: it must be that " + fault.value.decode()
    assert (products.value > 0) == (dots is Dots.TILES)
    assert ctypes.c_int64.in_dll(code, "emulated_open").value == 0  # every thread has released its tiles


def make(rows: int, inputs: int, outputs: int) -> tuple[Tensor, EightBit, Tensor]:
    generator = torch.Generator().manual_seed(rows + inputs)
    x = torch.randn(rows, 2 * inputs, generator=generator)[:, inputs:]  # rows apart in memory
    values = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(torch.int8)
    scale = torch.rand(outputs, generator=generator) / 127
    return x * torch.logspace(-3, 3, rows)[:, None], EightBit(values, scale), torch.randn(outputs, generator=generator)


def by_integers(x: Tensor, weight: EightBit, bias: Tensor | None) -> Tensor:
    """Each step by itself: the sums in int64, which loses nothing."""
    largest = x.abs().amax(dim=1, keepdim=True)
    scale = largest / 127
    integers = (x * (1 / scale)).round().clamp(-127, 127).long()
    y = (integers @ weight.values.long().t()).float() * (weight.scale * scale)
    return y if bias is None else y + bias


def computed(backend: Backend, x: Tensor, weight: EightBit, bias: Tensor | None = None) -> Tensor:
    return backend.linear_int8(LinearInputs(x, pack_linear(weight), bias, len(weight.values)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_truth_is_that_of_integers(shape: tuple[int, int, int]) -> None:
    x, weight, bias = make(*shape)
    for given in (bias, None):
        assert torch.equal(computed(REFERENCE, x, weight, given), by_integers(x, weight, given))


def test_every_shape_is_exact(backend: CpuBackend) -> None:
    for shape in SHAPES:
        x, weight, bias = make(*shape)
        for given in (bias, None):
            assert torch.equal(computed(backend, x, weight, given), by_integers(x, weight, given))


def test_the_largest_sums_there_are(backend: CpuBackend) -> None:
    """Every product is 127 x 127: 16 bits would not do for a pair of them."""
    x = torch.ones(3, 2048)
    weight = EightBit(torch.full((70, 2048), 127, dtype=torch.int8), torch.ones(70))
    weight.values[1::2] *= -1
    assert torch.equal(computed(backend, x, weight), by_integers(x, weight, None))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for a page that nobody may read")
@pytest.mark.parametrize("shape", [(5, 1, 3), (40, 68, 70), (40, 128, 64)], ids=str)
def test_nothing_is_read_beyond_a_weight(backend: CpuBackend, shape: tuple[int, int, int]) -> None:
    """Whose end is that of a page, before one that nobody may read: a process that does ends there."""
    x, weight, _ = make(*shape)
    packed = pack_linear(weight)
    size = packed.numel() * 4
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    everything = torch.frombuffer(memory, dtype=torch.float32)
    libc, no_access = ctypes.CDLL(None, use_errno=True), 0
    assert libc.mprotect(ctypes.c_void_p(everything.data_ptr() + pages), mmap.PAGESIZE, no_access) == 0
    at_the_end = everything[(pages - size) // 4 : pages // 4].copy_(packed)
    y = backend.linear_int8(LinearInputs(x, at_the_end, None, shape[2]))
    assert torch.equal(y, by_integers(x, weight, None))


def test_tokens_that_are_nothing_or_not_finite(backend: CpuBackend) -> None:
    x, weight, bias = make(9, 37, 18)
    x = x.clone()
    x[0], x[1] = 0, 1e-40  # zero, and with fewer bits than a float has
    x[2, 36], x[3, 0], x[4, 5] = math.nan, math.inf, -math.inf
    x[5] = 0
    x[5, 36] = 3e38
    y, truth = computed(backend, x, weight, bias), computed(REFERENCE, x, weight, bias)
    assert torch.equal(y[:2], bias.expand(2, -1))
    assert y[2:5].isnan().all() and truth[2:5].isnan().all()
    assert y[5:].isfinite().all()
    assert torch.equal(y[5:], truth[5:])


def test_rounding_takes_ties_to_the_even_number(backend: CpuBackend) -> None:
    x = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    one = EightBit(torch.eye(7, dtype=torch.int8), torch.ones(7))
    assert computed(backend, x, one).tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_each_value_is_within_half_a_step() -> None:
    x = make(40, 30, 1)[0]
    values, scale = in_eight_bits(x)
    assert values.abs().amax(dim=1).eq(127).all() and torch.equal(values, values.round())
    assert ((values * scale - x).abs() <= 0.5000001 * scale).all()


@pytest.mark.parametrize("shape", [(1, 1), (64, 4), (65, 5), (130, 33)])
def test_nothing_is_lost_in_packing(shape: tuple[int, int]) -> None:
    _, weight, _ = make(1, shape[1], shape[0])
    again = unpack_bytes(pack_linear(weight), *shape)
    assert torch.equal(again.values, weight.values) and torch.equal(again.scale, weight.scale)


def test_passes_opcheck_and_counts_its_work() -> None:
    x, weight, bias = make(16, 64, 96)
    for given in (bias, None):
        torch.library.opcheck(
            torch.ops.ssmprune.linear_int8.default,
            (x, pack_linear(weight), given, 96),
            test_utils=("test_schema", "test_faketensor"),
        )
    with FlopCounterMode(display=False) as counter:
        y = linear_int8(x[None], pack_linear(weight), bias, 96)
    assert y.shape == (1, 16, 96) and counter.get_total_flops() == 2 * 16 * 64 * 96


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias = make(16, 64, 96)
    packed = pack_linear(weight)
    calls: dict[str, Callable[[], object]] = {
        "x must be torch.float32": lambda: linear_int8(x.bfloat16(), packed, bias, 96),
        "weight has shape": lambda: linear_int8(x[:, :32], packed, bias, 96),
        "bias has shape": lambda: linear_int8(x, packed, bias[:64], 96),
        "no gradient": lambda: linear_int8(x.clone().requires_grad_(), packed, bias, 96),
    }
    for message, call in calls.items():
        with pytest.raises(KernelError, match=message):
            call()


def blocks(d_inner: int, eight_bits: int, *, full: bool = False) -> BlocksInputs:
    """Two Mamba blocks in eight bits; `full`: with gaps and context, a step of their own for other tokens."""
    generator = torch.Generator().manual_seed(d_inner)
    dim, N, K, R = 24, 5, 3, 2
    sizes = BlockSizes(d_inner, N, K, R, 2, 0, eight_bits)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def rounded(*size: int) -> EightBit:
        values, scale = in_eight_bits(normal(*size) / math.sqrt(size[-1]))
        return EightBit(values.to(torch.int8), scale[:, 0])

    packed = []
    for _ in range(2):
        inner = [
            InnerParameters(
                normal(d_inner, K),
                rounded(R + 2 * N, d_inner) if eight_bits == 2 else normal(R + 2 * N, d_inner) / d_inner**0.5,
                normal(d_inner, R),
                -normal(d_inner, N).exp(),
                *(normal(d_inner) for _ in range(3)),
            )
            for _ in range(2)
        ]
        packed.append(pack_block(normal(dim), rounded(2 * d_inner, dim), rounded(dim, d_inner), inner))
    given = BlocksInputs(
        normal(3, 9, dim),
        None,
        torch.stack(packed),
        sizes,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
        scale=0.5,
        eps=1e-5,
        wants_y=True,
    )
    if not full:
        return given
    sources = torch.randint(-1, 12, (2, 3, 9, K), generator=generator)
    gap, gap_delta = normal(2, 3, 9).abs(), normal(2, 2, d_inner).abs()
    return given._replace(gap=gap, gap_delta=gap_delta, context=normal(3, 3, dim), sources=sources)


@pytest.mark.parametrize("eight_bits", [1, 2])
@pytest.mark.parametrize("full", [False, True])
def test_blocks_are_what_they_are_made_of(backend: CpuBackend, eight_bits: int, full: bool) -> None:
    """A value that lies between two integers may go to either after sums in another order: that is half a step, which
    is 1/254 of a token's largest value. Measured, where none did: 1e-6 of the largest result."""
    for d_inner in (21, 64):
        inputs = blocks(d_inner, eight_bits, full=full)
        for own, truth in zip(backend.mamba_blocks(inputs), REFERENCE.mamba_blocks(inputs), strict=True):
            assert own.shape == truth.shape
            error = (own - truth).abs() / truth.abs().max()
            assert error.max() <= 2e-2 and error.median() <= 1e-5


def test_blocks_are_packed_without_loss() -> None:
    for eight_bits in (1, 2):
        inputs = blocks(21, eight_bits)
        block = unpack_block(inputs.parameters[0], 24, BlockSizes(*inputs.sizes))
        assert isinstance(block.in_proj, EightBit) and isinstance(block.out_proj, EightBit)
        assert len(block.x_weights) == (2 if eight_bits == 2 else 0)
        x_proj, z_proj = halves(block.in_proj)
        assert isinstance(x_proj, EightBit) and isinstance(z_proj, EightBit)
        inner = [
            InnerParameters(
                row[: 21 * 3].view(3, 21).t(),
                block.x_weights[g] if eight_bits == 2 else row[21 * 3 : 21 * 15].view(21, 12).t(),
                row[21 * 15 : 21 * 17].view(2, 21).t(),
                row[21 * 17 : 21 * 22].view(5, 21).t(),
                *row[21 * 22 :].view(3, 21),
            )
            for g, row in enumerate(block.inner)
        ]
        again = pack_block(block.norm, block.in_proj, block.out_proj, inner)
        # As integers: some of what is called float32 is no number.
        assert torch.equal(again.view(torch.int32), inputs.parameters[0].view(torch.int32))


def test_threads_do_not_change_a_bit(backend: CpuBackend) -> None:
    x, weight, bias = make(70, 192, 49)

    def everything() -> list[Tensor]:
        return [computed(backend, x, weight, bias), *backend.mamba_blocks(blocks(21, 2, full=True))]

    torch.set_num_threads(1)
    expected = everything()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, everything(), expected))


def test_other_backends_do_it_too() -> None:
    x, weight, bias = make(17, 30, 130)
    expected = functional.linear(x, weight.values * weight.scale[:, None], bias)
    for name in ("chunked", "reference"):
        if name not in BACKENDS.names():
            continue
        y = computed(BACKENDS.get(name), x, weight, bias)
        assert torch.equal(y, computed(REFERENCE, x, weight, bias))
        assert (y - expected).abs().amax(dim=1).max() <= 0.02 * expected.abs().max()
