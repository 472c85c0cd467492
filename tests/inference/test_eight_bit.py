"""Sessions of models in eight bits: what the definition gives, in as few calls as in float."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone, EightBitLinear, put_in_eight_bits
from ssmprune_cli.models.mamba.videomamba import VideoMamba, VideoMambaConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import choose_alignment, compress

Used = Callable[[nn.Module, Tensor], tuple[Tensor, Counter[str]]]
Apart = Callable[[nn.Module, Tensor], Tensor]
SIZES = {"image_size": (32, 32), "patch_size": 4, "stride": 4, "embed_dim": 32, "depth": 4, "num_classes": 5}
GRID = {"image_size": (32, 32), "embed_dim": 32, "num_classes": 5}
MODELS: dict[str, Callable[[], Backbone]] = {
    "vim": lambda: Vim(VimConfig(**SIZES)),  # type: ignore[arg-type]
    "vim, layer scale": lambda: Vim(VimConfig(**SIZES, layer_scale=0.1)),  # type: ignore[arg-type]
    "vim, layer norm": lambda: Vim(VimConfig(**SIZES, norm="layer")),  # type: ignore[arg-type]
    "videomamba": lambda: VideoMamba(VideoMambaConfig(**SIZES)),  # type: ignore[arg-type]
    "plainmamba": lambda: PlainMamba(PlainMambaConfig(**GRID, depth=3, stem_convs=1)),  # type: ignore[arg-type]
    "vmamba": lambda: VMamba(VMambaConfig(**GRID, depths=(1, 2))),  # type: ignore[arg-type]
}
LARGE = ("in_proj", "out_proj")


def make(name: str, kinds: tuple[str, ...] | None = None) -> Backbone:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    put_in_eight_bits(model, model.layers_of(model.linear_kinds if kinds is None else kinds))
    return model


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def check(found: Tensor, expected: Tensor) -> None:
    """Measured: 2e-7 of the largest logit. After sums in another order, as of another processor, a value between two
    integers may become the other one, so more is allowed; eight bits themselves change a Vim's logits by 1.5e-2."""
    assert (found - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_session_gives_what_the_definition_gives(name: str, used: Used, apart: Apart) -> None:
    model = make(name)
    found, ops = used(model, images())
    check(found, apart(model, images()))
    if name in ("vim", "vim, layer scale", "videomamba"):
        assert ops["mamba_blocks"] == 1 and not ops["linear_int8"]
    else:
        layers = sum(isinstance(layer, EightBitLinear) for layer in model.modules())
        assert ops["linear_int8"] == layers > 0


@pytest.mark.parametrize("kinds", [LARGE, (*LARGE, "x_proj")])
@pytest.mark.parametrize("reduction", ["drop", "context", "frozen", "frozen-pairs", "local-merge", "pool"])
def test_pruned_blocks_are_in_one_call_too(kinds: tuple[str, ...], reduction: str, used: Used, apart: Apart) -> None:
    model = make("vim", kinds)
    alignment = choose_alignment("auto", reduction, calibrated=False)
    compress(model, 0.6, points=[1, 3], reduction=reduction, alignment=alignment, importance="random")
    found, ops = used(model, images())
    assert ops["mamba_blocks"] == 3 and not ops["linear_int8"] and not ops["selective_scan"]
    check(found, apart(model, images()))


@pytest.mark.parametrize("name", ["plainmamba", "vmamba"])
def test_pruned_grids(name: str, apart: Apart) -> None:
    model = make(name)
    compress(model, 0.6, points=[2], reduction="context", alignment="null", importance="random")
    check(prepare(model)(images()), apart(model, images()))


def test_blocks_of_two_forms_are_not_in_one_call(used: Used, apart: Apart) -> None:
    """One in eight bits between others in float; and one of which only one projection is."""
    for rounded, calls in ((["in_proj", "out_proj"], 3), (["in_proj"], 2)):
        torch.manual_seed(0)
        model = MODELS["vim"]().eval()
        put_in_eight_bits(model, [f"layers.1.mixer.{each}" for each in rounded])
        found, ops = used(model, images())
        assert ops["mamba_blocks"] <= calls
        check(found, apart(model, images()))


def test_in_bfloat16() -> None:
    """As near to float32 as a model of bfloat16 is. Measured: 1.8e-2."""
    model = make("vim")
    found, expected = prepare(model, dtype=torch.bfloat16)(images()), prepare(model)(images())
    assert (found.float() - expected).abs().max() <= 5e-2 * expected.abs().max()


def test_layers_with_hooks_are_called_themselves(used: Used, apart: Apart) -> None:
    model = make("plainmamba")
    layer = next(each for each in model.modules() if isinstance(each, EightBitLinear))
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    found, _ = used(model, images())
    check(found, apart(model, images()))
