"""Sessions of segmenters: the blocks in fused calls, the head in PyTorch, images of any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES, DenseModel
from ssmprune_cli.models.heads import UperNetConfig
from ssmprune_cli.models.plainmamba.model import PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMambaConfig
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.pruning import compress, restore

Counted = Callable[[Callable[[], Any]], tuple[Any, Counter[str]]]
ENCODERS: dict[str, Any] = {
    "vmamba-upernet": VMambaConfig((64, 64), embed_dim=16, depths=(1, 3), num_classes=0, out_stages=(0, 1)),
    "plainmamba-upernet": PlainMambaConfig(
        (64, 64), embed_dim=24, depth=4, out_indices=(0, 2, -1), num_classes=0, positions=(3, 3)
    ),
}
SIZES = [(64, 64), (48, 80), (33, 64), (64, 64)]


def build(name: str) -> DenseModel:
    torch.manual_seed(0)
    encoder, family = ENCODERS[name], FAMILIES.get(name)
    head = UperNetConfig(in_channels=encoder.map_channels, channels=8, num_classes=3)
    model = family.build(family.config_class(encoder=encoder, head=head, preprocessing=KeepRatio(256, 64)))
    for parameter in model.parameters():  # the authors' start is so near to zero that mistakes would not show
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    assert isinstance(model, DenseModel)
    return model.eval()


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("reduction", [None, "drop", "context", "frozen", "grid-merge"])
def test_a_session_computes_what_its_model_does_on_every_size(
    name: str, reduction: str | None, counted: Counted
) -> None:
    model = build(name)
    if reduction is not None:
        compress(model, 0.6, points=[2, 3], reduction=reduction, alignment="null")
    session = prepare(model)
    assert session.kind == "cpu"
    for size in SIZES:
        batch = torch.randn(2, 3, *size)
        found, ops = counted(partial(session, batch))
        assert found.shape == (2, 3, *size)
        with torch.no_grad():  # measured 4e-6, of values up to 3
            torch.testing.assert_close(found, model(batch), rtol=0, atol=2e-5)
        fused = ops["routed_scans"]
        assert fused == 4 if reduction != "frozen" else 1 <= fused < 4


@pytest.mark.parametrize("name", ENCODERS)
def test_a_session_takes_another_pruner_and_leaves_the_first_one_as_it_was(name: str) -> None:
    model, batch = build(name), torch.randn(1, 3, 48, 80)
    dense = prepare(model)
    expected = dense(batch)
    compress(model, 0.5, points=[2], alignment="none")
    pruned = dense.with_pruner(model.pruner)
    with torch.no_grad():
        torch.testing.assert_close(pruned(batch), model(batch), rtol=0, atol=2e-5)
        assert torch.equal(dense(batch), expected)
        assert torch.equal(pruned.with_pruner(None)(batch), expected)
        restore(model)
        assert not torch.equal(pruned(batch), expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_a_session_says_and_holds(name: str) -> None:
    model = build(name)
    session = prepare(model)
    assert [str(step) for step in session.explain().steps] == ["blocks 1 to 4: the scans of each block in one call"]
    model.get_parameter("head.conv_seg.weight").data.zero_()
    batch = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # a snapshot: it does not follow
        assert not torch.equal(session(batch), model(batch))
    half = prepare(model, dtype=torch.bfloat16)
    assert half(batch).dtype == torch.bfloat16 and bool(half(batch).isfinite().all())
