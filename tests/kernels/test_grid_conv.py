"""The depthwise grid convolution, dense and with tokens missing, against one that is written out in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import backends_for, grid_conv2d, use_backend
from ssmprune_cli.kernels.triton.backend import interpreted

AVAILABLE = backends_for(torch.zeros(1))
PLACES = [(name, "cpu") for name in AVAILABLE]
if torch.cuda.is_available() and not interpreted():
    PLACES += [(name, "cuda") for name in backends_for(torch.zeros(1, device="cuda"))]


def by_loops(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], positions: Tensor) -> Tensor:
    rows, columns = grid
    half = weight.shape[-1] // 2
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        place = {int(p): i for i, p in enumerate(positions[b])}
        for position, i in place.items():
            row, column = divmod(position, columns)
            total = torch.zeros_like(x[b, i]) if bias is None else bias.clone()
            for r in range(max(0, row - half), min(rows, row + half + 1)):
                for c in range(max(0, column - half), min(columns, column + half + 1)):
                    if r * columns + c in place:
                        total += x[b, place[r * columns + c]] * weight[:, r - row + half, c - column + half]
            y[b, i] = torch.nn.functional.silu(total)
    return y


@pytest.mark.parametrize(("grid", "width", "has_bias"), [((4, 5), 3, False), ((5, 3), 7, True), ((1, 6), 3, True)])
def test_equals_the_loops_dense_and_with_tokens_missing(grid: tuple[int, int], width: int, has_bias: bool) -> None:
    tokens = grid[0] * grid[1]
    x = torch.randn(2, tokens, 3, dtype=torch.float64)
    weight = torch.randn(3, width, width, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64) if has_bias else None
    everywhere = torch.arange(tokens).expand(2, -1)
    expected = by_loops(x, weight, bias, grid, everywhere)
    torch.testing.assert_close(grid_conv2d(x, weight, bias, grid), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grid_conv2d(x, weight, bias, grid, everywhere), expected, rtol=0, atol=1e-12)
    kept = torch.stack([torch.randperm(tokens)[: tokens // 2].sort().values for _ in range(2)])
    fewer = x[:, : tokens // 2]
    expected = by_loops(fewer, weight, bias, grid, kept)
    torch.testing.assert_close(grid_conv2d(fewer, weight, bias, grid, kept), expected, rtol=0, atol=1e-12)


def test_tokens_that_do_not_fill_the_grid_need_positions() -> None:
    with pytest.raises(KernelError, match=r"5 tokens .* grid of 2 x 3"):
        grid_conv2d(torch.zeros(1, 5, 2), torch.zeros(2, 3, 3), None, (2, 3))


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_and_its_gradients(backend: str, device: str, dtype: torch.dtype) -> None:
    """37 channels fill no number of vectors; rows of x are slices of something wider, as a projection gives them."""
    torch.manual_seed(0)
    grid, kept = (5, 6), torch.stack([torch.randperm(30)[:17].sort().values for _ in range(3)])
    x = torch.randn(3, 17, 50).to(dtype)[..., 3:40]
    width = 3 if interpreted() else 7  # the interpreter takes 10 ms for a tap
    weight, bias = torch.randn(37, width, width), torch.randn(37)
    truth = [value.double().requires_grad_() for value in (x, weight, bias)]
    expected = grid_conv2d(truth[0], truth[1], truth[2], grid, kept)
    wanted = torch.autograd.grad(expected.sin().sum(), truth)
    use_backend(backend)
    if device == "cuda":
        x, weight, bias, kept = x.to(device), weight.to(device), bias.to(device), kept.to(device)
    leaves = [
        value.clone().requires_grad_() if value is not x else x.detach().requires_grad_() for value in (x, weight, bias)
    ]
    found = grid_conv2d(leaves[0], leaves[1], leaves[2], grid, kept)
    gradients = torch.autograd.grad(found.float().sin().sum(), leaves)
    # A rounded output moves its sine, too; the interpreter cuts off where others round.
    tolerance = 5e-6 if dtype == torch.float32 else 0.04 if interpreted() else 0.02
    for a, b in zip((found, *gradients), (expected, *wanted), strict=True):
        assert (a.double().cpu() - b).abs().max() <= tolerance * b.abs().max()
    few = grid_conv2d(leaves[0], leaves[1], leaves[2], grid, kept, outputs=5)
    assert torch.equal(few, found[:, :5])
    dense = torch.randn(2, 30, 37).to(device, dtype)
    whole = grid_conv2d(dense, weight, None, grid).double()
    use_backend("reference")
    expected = grid_conv2d(dense.double(), weight.double(), None, grid)
    assert (whole - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("sparse", [True, False])
def test_gradients_of_a_few_outputs_without_bias(backend: str, device: str, sparse: bool) -> None:
    """Tokens without an output of their own still get their part as neighbours."""
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(30, generator=generator)[:17] for _ in range(2)]) if sparse else None
    x = torch.randn(2, 17 if sparse else 30, 70, generator=generator)
    weight = torch.randn(70, 3, 3, generator=generator)
    results = []
    for name, place, dtype in (("reference", "cpu", torch.float64), (backend, device, torch.float32)):
        use_backend(name)
        leaves = [value.to(place, dtype, copy=True).requires_grad_() for value in (x, weight)]
        at = None if places is None else places.to(place)
        y = grid_conv2d(leaves[0], leaves[1], None, (5, 6), at, outputs=11)
        results.append([each.cpu() for each in torch.autograd.grad(y.sin().sum(), leaves)])
    assert results[0][0][:, 11:].any()
    for expected, found in zip(*results, strict=True):
        assert (found.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="no C compiler")
def test_a_position_outside_the_grid_is_refused_and_not_written_to() -> None:
    use_backend("cpu")
    x, weight = torch.zeros(1, 2, 4), torch.zeros(4, 3, 3)
    for outside in (-1, 6):
        with pytest.raises(KernelError, match="outside the grid of 2 x 3"):
            grid_conv2d(x, weight, None, (2, 3), torch.tensor([[0, outside]]))


def test_what_does_not_fit_is_named() -> None:
    x, weight = torch.zeros(1, 6, 2), torch.zeros(2, 3, 3)
    with pytest.raises(KernelError, match="odd, not 2"):
        grid_conv2d(x, torch.zeros(2, 2, 2), None, (2, 3))
    with pytest.raises(KernelError, match=r"positions must be int64 of shape \(1, 6\)"):
        grid_conv2d(x, weight, None, (2, 3), torch.zeros(1, 6))
    with pytest.raises(KernelError, match="no 7 outputs among 6"):
        grid_conv2d(x, weight, None, (2, 3), outputs=7)
    with pytest.raises(KernelError, match="weight has shape"):
        grid_conv2d(x, torch.zeros(3, 3, 3), None, (2, 3))


@pytest.mark.skipif(interpreted(), reason="it looks at no kernel")
def test_passes_opcheck() -> None:
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((1, 4, 3), (3, 3, 3), (3,))]
    positions = torch.tensor([[0, 2, 3, 5]])
    torch.library.opcheck(torch.ops.ssmprune.grid_conv2d, (*leaves, 2, 3, positions, 3))
    torch.library.opcheck(torch.ops.ssmprune.grid_conv2d, (leaves[0], leaves[1], None, 2, 2, None, 4))
