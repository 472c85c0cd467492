"""The weights of a block's products of matrices, prepared once: they give what those converted each time do."""

from __future__ import annotations

import pytest
import torch

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import BlockSizes, mamba_inner, pack_inner, pack_products, use_backend
from ssmprune_cli.kernels.products import padded, unpack_products
from tests.kernels.test_fused import Case

SIZES = BlockSizes(10, 5, 3, 17, 2)


def test_columns_are_padded_to_what_matrix_units_take() -> None:
    assert [padded(columns) for columns in (1, 16, 17, 48, 64)] == [16, 16, 32, 64, 64]


def test_what_is_unpacked_projects_as_the_weights_do() -> None:
    own = Case(1, 3, 4, SIZES, "plain", blocks=1).directions[0]
    packed = pack_products(own, torch.float64)
    u = torch.randn(2, 3, 10, dtype=torch.float64)
    for direction, row in zip(own, packed, strict=True):
        assert isinstance(direction.x_weight, torch.Tensor)
        products = unpack_products(row, 10, 5, 17)
        expected = (u @ direction.x_weight.t()).split([17, 5, 5], dim=-1)
        for found, value in zip(products.project(u, 5), expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)  # another order of sums
        assert torch.equal(products.dt_weight, direction.dt_weight)


@pytest.mark.parametrize("mode", ["plain", "frozen+size", "pool"])
def test_the_op_gives_the_same_with_them(mode: str) -> None:
    case = Case(2, 4, 8, SIZES, mode, blocks=1)
    xz, lost = case.normal(2, 4, 20), case.lost(10)
    parameters = pack_inner(case.directions[0])
    use_backend("reference")
    found = [
        mamba_inner(xz, parameters, 5, 3, 17, **lost, products=products)
        for products in (None, pack_products(case.directions[0], torch.float64))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_they_must_fit() -> None:
    case = Case(1, 4, 8, SIZES, "plain", blocks=1)
    xz, parameters = case.normal(1, 4, 20).float(), pack_inner(case.directions[0]).float()
    products = pack_products(case.directions[0], torch.float32)
    for wrong in (products[:1], products[:, 1:], products.bfloat16(), products.to("meta")):
        with pytest.raises(KernelError, match=r"products must be torch.float32 of shape \(2, 800\) on cpu"):
            mamba_inner(xz, parameters, 5, 3, 17, products=wrong)
