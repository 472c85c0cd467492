"""Linear layers by the op `linear`: in which models, that it changes nothing, and that no change of them is missed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.kernels.cpu.backend import CPU
from ssmprune_cli.kernels.inputs import LinearInputs
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.common.layers import Kept, packed_linear, project
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig

Apart = Callable[[nn.Module, Tensor], Tensor]
AssertClose = Callable[[Tensor, Tensor], None]
# Each with how many of its layers the op takes.
MODELS: dict[str, tuple[Callable[[], Backbone], int]] = {
    "vim with LayerNorm": (lambda: Vim(VimConfig(image_size=(32, 32), embed_dim=32, depth=3, norm="layer")), 6),
    "plainmamba": (lambda: PlainMamba(PlainMambaConfig(image_size=(64, 48), embed_dim=32, depth=3, stem_convs=1)), 6),
    "vmamba": (lambda: VMamba(VMambaConfig(image_size=(64, 48), embed_dim=32, depths=(1, 2))), 12),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[LinearInputs]:
    """Of the op, as if every layer were large enough, and on processors without tiles too."""
    monkeypatch.setattr(CPU, "suits_linear", lambda rows, inputs, outputs: inputs % 32 == outputs % 32 == 0)
    found: list[LinearInputs] = []
    compute = CPU.linear

    def linear(inputs: LinearInputs) -> Tensor:
        found.append(inputs)
        return compute(inputs)

    monkeypatch.setattr(CPU, "linear", linear)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_models_use_it_and_stay_the_same(
    name: str, calls: list[LinearInputs], apart: Apart, assert_close: AssertClose
) -> None:
    make, layers = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    images = torch.randn(2, 3, *model.image_size)
    with torch.inference_mode():
        logits = model(images)
    assert len(calls) == layers
    assert_close(logits, apart(model, images))
    with torch.inference_mode():
        model.bfloat16()(images.bfloat16())
    assert len(calls) == layers


def double(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def replace_bias(layer: nn.Linear) -> None:
    layer.bias = nn.Parameter(torch.ones(64))


def swap_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data + 1


def hook(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("change", [double, replace_bias, swap_data, hook])
def test_a_change_of_the_layer_is_never_missed(change: Callable[[nn.Linear], None], calls: list[LinearInputs]) -> None:
    torch.manual_seed(0)
    layer, packed, x = nn.Linear(32, 64), Kept(packed_linear), torch.randn(3, 5, 32)
    with torch.inference_mode():
        before = project(layer, x, packed)
    change(layer)
    with torch.inference_mode():
        after = project(layer, x, packed)
        torch.testing.assert_close(after, layer(x), rtol=0, atol=1e-5)
        assert not torch.allclose(after, before, rtol=0, atol=1e-2)
        other = nn.Linear(32, 64)
        torch.testing.assert_close(project(other, x, packed), other(x), rtol=0, atol=1e-5)
    assert calls


def test_layers_of_other_kinds_are_called(calls: list[LinearInputs]) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 100

    layer, x = Own(32, 64), torch.randn(5, 32)
    with torch.inference_mode():
        assert torch.equal(project(layer, x, Kept(packed_linear)), layer(x)) and not calls
        with pytest.raises(RuntimeError, match="same dtype"):  # as the layer says it
            project(nn.Linear(32, 64).double(), x, Kept(packed_linear))
