"""Layers that several families share."""

from __future__ import annotations

import copy

import pytest
import torch

from ssmprune_cli.models.common.layers import channels_last_taps, decay_rates
from ssmprune_cli.workflows.finetune.new_model import build


def test_half_precision_rates_are_computed_in_float32() -> None:
    logarithms = torch.tensor([[0.3, 2.7]]).bfloat16()
    assert torch.equal(decay_rates(logarithms), -torch.exp(logarithms.float()))


@pytest.mark.parametrize("shape", [(5, 1, 4), (5, 1, 3, 3)])
def test_taps_have_their_channels_side_by_side(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    taps = channels_last_taps(weight)
    assert torch.equal(taps, weight[:, 0]) and taps.flatten(1).t().is_contiguous()


@pytest.mark.parametrize("family", ["vim", "plainmamba", "vmamba"])
def test_a_model_follows_its_weights_between_inferences(family: str) -> None:
    small = {
        "vim": ["image_size=[16, 16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=2", "num_classes=3"],
        "plainmamba": ["image_size=[16, 16]", "patch_size=4", "embed_dim=16", "depth=2", "num_classes=3"],
        "vmamba": ["image_size=[32, 32]", "embed_dim=8", "depths=[1, 1, 1, 1]", "num_classes=3"],
    }
    model = build(family, small[family], name=family, seed=0).eval()
    other = build(family, small[family], name=family, seed=1).eval()
    images = torch.randn(2, 3, *model.image_size)
    with torch.inference_mode():
        before, wanted = model(images), other(images)
    model.load_state_dict(other.state_dict())
    with torch.inference_mode():
        assert torch.equal(model(images), wanted) and not torch.equal(before, wanted)
        assert torch.equal(copy.deepcopy(model)(images), wanted)
    model.double()
    with torch.inference_mode():
        # float32 against float64: at most 1.1e-7 apart for these models.
        torch.testing.assert_close(model(images.double()).float(), wanted, rtol=0, atol=1e-6)
