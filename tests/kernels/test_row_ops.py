"""The norm with its residual stream, and the gate over the directions: values, gradients, precisions."""

from __future__ import annotations

import pytest
import torch

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import add_rms_norm, backends_for, causal_conv1d, gated_sum, use_backend

AVAILABLE = backends_for(torch.zeros(1))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_add_rms_norm(backend: str, dtype: torch.dtype, first: bool) -> None:
    use_backend(backend)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 45).to(dtype), torch.randn(45).to(dtype)
    residual = None if first else torch.randn(2, 3, 45)
    normed, stream = add_rms_norm(hidden, residual, weight, 1e-5)
    total = hidden.double() if residual is None else hidden.double() + residual.double()
    expected = total / (total.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert stream.dtype == torch.float32 and normed.dtype == dtype
    torch.testing.assert_close(stream.double(), total, rtol=1e-7, atol=1e-7)  # one addition
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(normed.double(), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_gated_sum(backend: str, dtype: torch.dtype, count: int) -> None:
    """z is half of a projection; 45 channels fill no number of vectors."""
    use_backend(backend)
    torch.manual_seed(0)
    ys = [torch.randn(2, 3, 45).to(dtype) for _ in range(count)]
    z = torch.randn(2, 3, 90).to(dtype)[..., 45:]
    wide = z.double()
    expected = sum(y.double() for y in ys) * wide * wide.sigmoid() / 2
    rounding = 2e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gated_sum(ys, z, 0.5).double(), expected, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_gate_of_a_large_negative_value_is_closed(backend: str) -> None:
    """Its sigmoid is 0, and not a small value times a large one."""
    use_backend(backend)
    z = torch.tensor([-3e38, -1e30, -200.0, -100.0, -87.5, -86.0, 3e38, 0.0]).expand(1, 3, 8)
    expected = torch.nn.functional.silu(z.double()).float()
    torch.testing.assert_close(gated_sum([torch.ones(1, 3, 8)], z), expected, rtol=2e-6, atol=1e-35)
    found = causal_conv1d(z, torch.ones(8, 1), torch.zeros(8))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-35)
    assert not gated_sum([torch.ones(1, 3, 8)], z)[..., :2].any()


def test_gradients() -> None:
    leaves = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, r, w: add_rms_norm(h, r, w, 1e-3), (leaves[0], leaves[1], weight))
    assert torch.autograd.gradcheck(lambda h, w: add_rms_norm(h, None, w, 1e-3), (leaves[0], weight))
    assert torch.autograd.gradcheck(lambda a, b, z: gated_sum((a, b), z, 0.5), tuple(leaves[:3]))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 3, 45), (2, 200, 200)], ids=str)  # no number of vectors; enough for threads
def test_gradients_against_float64(backend: str, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator).to(dtype) for _ in range(8)]
    weight = torch.randn(size[2], generator=generator).to(dtype)
    results = []
    for name, kind in (("reference", torch.float64), (backend, dtype)):
        use_backend(name)
        *leaves, own = (value.to(kind).requires_grad_() for value in (*given[:5], weight))
        through = [value.to(kind) for value in given[5:]]
        hidden, residual, z, y0, y1 = leaves
        residual = residual.to(torch.promote_types(kind, torch.float32)).detach().requires_grad_()
        normed, stream = add_rms_norm(hidden, residual, own, 1e-5)
        gated = gated_sum((y0, y1), torch.cat([z, z], dim=2)[..., size[2] :], 0.5)
        loss = (normed * through[0]).sum() + (stream * through[1]).sum() + (gated * through[2]).sum()
        results.append(torch.autograd.grad(loss, (hidden, residual, own, z, y0, y1)))
    for expected, found in zip(*results, strict=True):
        # Of the largest: a sum over rows in float32, or what rounding does to values in half precision.
        error = (found.double() - expected).abs().max()
        assert error <= (2e-6 if dtype == torch.float32 else 2**-7) * expected.abs().max()


def test_the_gate_keeps_one_sum_for_the_way_back() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    ys = [torch.randn(2, 3, 4, requires_grad=True) for _ in range(4)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = gated_sum(ys, torch.randn(2, 3, 4))
    assert len(kept) == 2 and found.requires_grad  # the sum and z
    with torch.no_grad():
        assert torch.equal(gated_sum(ys, kept[1]), found)


def test_pass_opcheck() -> None:
    leaves = [torch.randn(1, 2, 4, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.ssmprune.add_rms_norm, (leaves[0], leaves[1], torch.ones(4), 1e-5))
    torch.library.opcheck(torch.ops.ssmprune.gated_sum, (leaves[:2], leaves[2], 0.5))


def test_what_does_not_fit_is_named() -> None:
    hidden = torch.zeros(1, 2, 4)
    with pytest.raises(KernelError, match="weight has shape"):
        add_rms_norm(hidden, None, torch.ones(3), 1e-5)
    with pytest.raises(KernelError, match=r"residual must be torch.float32 of shape"):
        add_rms_norm(hidden, torch.zeros(1, 2, 3), torch.ones(4), 1e-5)
    with pytest.raises(KernelError, match=r"ys\[1\] has shape"):
        gated_sum([hidden, torch.zeros(1, 3, 4)], hidden)
