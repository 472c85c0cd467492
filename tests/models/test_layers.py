"""What inference derives from parameters once is never out of date."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.models.common.layers import Derived, channels_last_taps, decay_rates
from ssmprune_cli.workflows.finetune.new_model import build


class Counted:
    """decay_rates that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, parameter: Tensor) -> Tensor:
        self.calls += 1
        return decay_rates(parameter)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_computed_once_until_the_parameter_changes(mode: Callable[[], torch.no_grad]) -> None:
    count, parameter = Counted(), nn.Parameter(torch.zeros(3, 2))
    derived = Derived(count)
    with mode():
        assert torch.equal(derived(parameter), torch.full((3, 2), -1.0))
        assert derived(parameter) is derived(parameter)
    assert count.calls == 1
    with torch.no_grad():
        parameter.fill_(1.0)
    with mode():
        assert derived(parameter)[0, 0].item() == pytest.approx(-2.7182817)
    parameter.data = torch.zeros(3, 2)  # as nn.Module.to does
    with mode():
        assert torch.equal(derived(parameter), torch.full((3, 2), -1.0))
    assert count.calls == 3


def test_gradients_and_traces_see_the_computation() -> None:
    count, parameter = Counted(), nn.Parameter(torch.zeros(3, 2))
    derived = Derived(count)
    with torch.no_grad():
        derived(parameter)
    derived(parameter).sum().backward()
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.full((3, 2), -1.0))
    with torch.no_grad():
        traced = torch.jit.trace(derived.__call__, (parameter,))
        assert torch.equal(traced(torch.ones(3, 2)), decay_rates(torch.ones(3, 2)))


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
