"""Linear layers of sessions by the op `linear`: in which models, and that it changes nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.inference import prepare
from ssmprune_cli.inference.cpu.linear import packs
from ssmprune_cli.kernels import use_backend
from ssmprune_cli.kernels.cpu.backend import CPU
from ssmprune_cli.kernels.inputs import LinearInputs
from ssmprune_cli.models.common.backbone import Backbone
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
    session = prepare(model)
    logits = session(images)
    assert len(calls) == layers
    assert_close(logits, apart(model, images))
    assert len(calls) == layers
    prepare(model, dtype=torch.bfloat16)(images)
    assert len(calls) == layers


def test_layers_of_other_kinds_stay() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 100

    hooked = nn.Linear(32, 64)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert packs(nn.Linear(32, 64)) and not packs(nn.Linear(32, 44))
    for layer in (Own(32, 64), hooked, nn.Linear(32, 64).double(), nn.Linear(32, 64).bfloat16()):
        assert not packs(layer)


def test_where_it_is_faster() -> None:
    use_backend("chunked")
    try:
        assert not packs(nn.Linear(192, 768))
    finally:
        use_backend("auto")
