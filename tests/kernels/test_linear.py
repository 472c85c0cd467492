"""A linear layer in float32 by the op `linear`, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import backends_for, linear, pack_linear, use_backend
from ssmprune_cli.kernels.cpu.backend import CPU
from ssmprune_cli.kernels.packing import unpack_linear

AVAILABLE = backends_for(torch.zeros(1))
# Rows, inputs, outputs: rows that fill no tile, one or several; widths that tiles take, and some that they do not.
SHAPES = [
    (1, 32, 32),
    (16, 64, 96),
    (17, 96, 64),
    (33, 384, 32),
    (197, 192, 768),
    (1030, 32, 64),
    (40, 48, 64),
    (9, 5, 3),
]


def make(rows: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, a slice of which the rows are apart in memory, weight and bias, float64 with the values of float32."""
    generator = torch.Generator().manual_seed(rows)
    values = (
        torch.randn(rows, 2 * inputs, generator=generator)[:, inputs:],
        torch.randn(outputs, inputs, generator=generator) / inputs**0.5,
        torch.randn(outputs, generator=generator),
    )
    x, weight, bias = (each.double() for each in values)
    return x, weight, bias


def found(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, pack_linear(weight), bias, len(weight))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend: str, shape: tuple[int, int, int]) -> None:
    use_backend(backend)
    x, weight, bias = make(*shape)
    for given in (bias, None):
        truth = functional.linear(x, weight, given)
        y = found(x.float(), weight.float(), None if given is None else given.float())
        assert y.shape == truth.shape and y.is_contiguous()
        assert (y - truth).abs().max() <= 2e-6 * truth.abs().max()  # measured: 5e-7, by PyTorch's product too
    split = found(x.float().unflatten(0, (1, -1)), weight.float(), bias.float())
    assert torch.equal(split, found(x.float(), weight.float(), bias.float())[None])


@pytest.mark.skipif(not CPU.library.has_tiles(), reason="the processor has no products of bfloat16 matrices")
@pytest.mark.parametrize("shape", SHAPES[2:6], ids=str)
def test_three_values_of_bfloat16_are_as_exact_as_float32(shape: tuple[int, int, int]) -> None:
    x, weight, bias = make(*shape)
    truth = functional.linear(x, weight, bias)
    given = (x.float(), weight.float(), bias.float())
    errors = [float((y - truth).norm()) for y in (found(*given), functional.linear(*given))]
    assert errors[0] <= 1.2 * errors[1]  # measured: 0.5 to 1.0 times


def test_threads_do_not_change_a_bit() -> None:
    x, weight, bias = (each.float() for each in make(*SHAPES[4]))
    torch.set_num_threads(1)
    expected = found(x, weight, bias)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert torch.equal(found(x, weight, bias), expected)


def test_nothing_is_lost_in_packing() -> None:
    _, weight, _ = make(9, 45, 37)
    weight = weight.float() * torch.logspace(-20, 20, 45)
    assert torch.equal(unpack_linear(pack_linear(weight), 37, 45), weight)


def test_it_is_used_where_it_is_faster() -> None:
    assert CPU.suits_linear(4096, 192, 768) == CPU.library.has_tiles()
    assert not CPU.suits_linear(1, 192, 768) and not CPU.suits_linear(4096, 192, 44)


def test_passes_opcheck_and_counts_its_work() -> None:
    x, weight, bias = (each.float() for each in make(*SHAPES[1]))
    for given in (bias, None):
        arguments = (x, pack_linear(weight), given, len(weight))
        torch.library.opcheck(
            torch.ops.ssmprune.linear.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
    with FlopCounterMode(display=False) as own:
        found(x[None], weight, bias)
    with FlopCounterMode(display=False) as expected:
        functional.linear(x[None], weight, bias)
    assert own.get_total_flops() == expected.get_total_flops() == 2 * 16 * 64 * 96


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias = (each.float() for each in make(*SHAPES[1]))
    packed = pack_linear(weight)
    calls: dict[str, Callable[[], object]] = {
        "x must be torch.float32": lambda: linear(x.double(), packed, bias, 96),
        "weight has shape": lambda: linear(x[:, :32], packed, bias, 96),
        "bias has shape": lambda: linear(x, packed, bias[:64], 96),
        "bias is torch.float64": lambda: linear(x, packed, bias.double(), 96),
        "no gradient": lambda: linear(x.requires_grad_(), packed, bias, 96),
    }
    for message, call in calls.items():
        with pytest.raises(KernelError, match=message):
            call()
