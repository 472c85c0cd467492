"""Inference by the fused ops gives what the small ops give, and follows whatever happens to a model."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import fused_ops_apart, use_backend
from ssmprune_cli.models.common.layers import Kept, RMSNorm
from ssmprune_cli.models.mamba.backbone import MambaBackbone
from ssmprune_cli.models.mamba.block import MambaBlock
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.videomamba import VideoMamba, VideoMambaConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.tokens import TokenSequence

Counted = Callable[[Callable[[], Any]], tuple[Any, Counter[str]]]
Used = Callable[[nn.Module, Tensor], tuple[Tensor, Counter[str]]]
Apart = Callable[[nn.Module, Tensor], Tensor]
AssertClose = Callable[[Tensor, Tensor], None]
SIZES: dict[str, Any] = {
    "image_size": (32, 32),
    "patch_size": 4,
    "stride": 4,
    "embed_dim": 32,
    "depth": 6,
    "num_classes": 5,
}
ODD = "vim, width that no vector divides"
MODELS: dict[str, Callable[[], MambaBackbone]] = {
    "vim": lambda: Vim(VimConfig(**SIZES)),
    "vim, layer scale": lambda: Vim(VimConfig(**SIZES, layer_scale=0.1)),
    "vim, one direction": lambda: Vim(VimConfig(**SIZES, mixer="none")),
    ODD: lambda: Vim(VimConfig(**{**SIZES, "embed_dim": 20})),
    "videomamba": lambda: VideoMamba(VideoMambaConfig(**SIZES)),
    "mamba-reg": lambda: MambaReg(MambaRegConfig(**SIZES)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> MambaBackbone:
    torch.manual_seed(0)
    return MODELS[name]().eval().to(dtype)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def block(model: MambaBackbone, number: int) -> MambaBlock:
    found = model.layers[number]
    assert isinstance(found, MambaBlock)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("reduction", "alignment"),
    [(None, "none"), ("drop", "none"), ("drop", "null"), ("drop", "neighbour"), ("context", "null"), ("mask", "none")],
)
def test_blocks_between_points_are_one_op(
    name: str, reduction: str | None, alignment: str, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make(name)
    if reduction is not None:
        compress(model, 0.6, points=[1, 4], reduction=reduction, alignment=alignment)
    found, ops = used(model, images())
    if name == ODD and reduction is None:
        assert ops["mamba_inner"] == 6 and not ops["mamba_blocks"] and not ops["selective_scan"]
    elif name == ODD:  # before a prune point the scans are looked at
        assert ops["mamba_inner"] == 4 and not ops["mamba_blocks"]
    else:
        assert ops["mamba_blocks"] == (1 if reduction is None else 3) and not ops["selective_scan"]
    assert_close(found, apart(model, images()))


@pytest.mark.parametrize(
    ("reduction", "alignment", "importance", "fused"),
    [("frozen", "none", "clip", 1), ("local-merge", "mass", "clip", 1), ("drop", "null", "delta", 2)],
)
def test_what_a_fused_op_cannot_do_is_done_otherwise(
    reduction: str, alignment: str, importance: str, fused: int, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    """Frozen tokens, growing steps, a score that looks at step sizes: block by block, and scan by scan."""
    model = make("vim")
    compress(model, 0.6, points=[3], reduction=reduction, alignment=alignment, importance=importance)
    found, ops = used(model, images())
    assert ops["mamba_blocks"] == fused and ops["selective_scan"] > 0
    assert_close(found, apart(model, images()))


def test_directions_that_share_a_convolution_are_done_otherwise(
    used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    torch.manual_seed(0)
    model = Vim(VimConfig(**SIZES, mixer="v1")).eval()
    found, ops = used(model, images())
    assert not ops["mamba_blocks"] and not ops["mamba_inner"]
    assert_close(found, apart(model, images()))


@pytest.mark.parametrize("reduction", [None, "drop", "context"])
def test_precisions(reduction: str | None, used: Used) -> None:
    half, wide = make("vim", torch.bfloat16), make("vim", torch.float64)
    for model in (half, wide):
        if reduction is not None:  # by a score that rounding does not change
            compress(model, 0.6, points=[1, 4], reduction=reduction, alignment="null", importance="random")
            model.to(model.dtype)
    found, ops = used(half, images(torch.bfloat16))
    assert ops["mamba_blocks"] == (1 if reduction is None else 3) and not ops["selective_scan"]
    expected, ops = used(wide, images(torch.float64))
    assert not ops["mamba_inner"] and not ops["mamba_blocks"]
    # Measured: 9e-3, and as much op by op.
    assert (found.double() - expected).abs().max() <= 0.02 * expected.abs().max()


def test_autocast_takes_the_op_for_the_inside(counted: Counted) -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        _, ops = counted(lambda: make("vim")(images()))
    assert ops["mamba_inner"] == 6 and not ops["mamba_blocks"]


def test_other_backends_and_gradients_do_without(counted: Counted, used: Used, assert_close: AssertClose) -> None:
    model = make("vim")
    try:
        use_backend("chunked")
        found, ops = used(model, images())
    finally:
        use_backend("auto")
    assert not ops["mamba_blocks"] and ops["selective_scan"] == 12
    assert_close(found, used(model, images())[0])
    _, ops = counted(lambda: model(images()).sum().backward())
    assert not ops["mamba_blocks"] and not ops["mamba_inner"]


@pytest.mark.parametrize("reduction", [None, "drop", "context"])
def test_counters_find_the_same_multiply_adds_inside(reduction: str | None) -> None:
    model = make("vim")
    if reduction is not None:
        compress(model, 0.6, points=[1, 4], reduction=reduction, alignment="null")
    with torch.inference_mode(), FlopCounterMode(display=False) as whole:
        model(images())
    with torch.inference_mode(), fused_ops_apart(), FlopCounterMode(display=False) as parts:
        model(images())
    assert whole.get_total_flops() == parts.get_total_flops() > 0


def double_last(model: MambaBackbone) -> None:
    with torch.no_grad():
        block(model, -1).mixer.out_proj.weight.mul_(2)


def reload(model: MambaBackbone) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def assign(model: MambaBackbone) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()}, assign=True)


def swap_data(model: MambaBackbone) -> None:
    for parameter in model.parameters():
        parameter.data = 1.1 * parameter.data


def swap_layer(model: MambaBackbone) -> None:
    block(model, 2).mixer.x_proj = nn.Linear(64, 34, bias=False)


def swap_block(model: MambaBackbone) -> None:
    model.layers[1] = copy.deepcopy(model.layers[2])


def swap_blocks(model: MambaBackbone) -> None:
    model.layers = nn.ModuleList([*model.layers][::-1])


class Adapter(nn.Module):
    """As low-rank adapters do: it has the weight of what it wraps, and adds to it."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * self.inner(x)
        return result


def adapt(model: MambaBackbone) -> None:
    mixer = block(model, 2).mixer
    mixer.x_proj = Adapter(mixer.x_proj)  # type: ignore[assignment]


def hook(model: MambaBackbone) -> None:
    block(model, 3).mixer.out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = [double_last, reload, assign, swap_data, swap_layer, swap_block, swap_blocks, adapt, hook]


def other_epsilon(model: MambaBackbone) -> None:
    norm = block(model, 2).norm
    assert isinstance(norm, RMSNorm)
    norm.eps = 1.0


def other_scale(model: MambaBackbone) -> None:
    block(model, 2).mixer.scale = 2.0


def other_size(model: MambaBackbone) -> None:
    model.layers[2] = block(Vim(VimConfig(**{**SIZES, "d_state": 8})), 0)


@pytest.mark.parametrize("change", [other_epsilon, other_scale, other_size])
def test_a_block_unlike_the_others_is_computed_by_itself(
    change: Callable[[MambaBackbone], None], used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make("vim")
    change(model)
    found, ops = used(model, images())
    assert ops["mamba_blocks"] == 2
    assert_close(found, apart(model, images()))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_never_missed(
    change: Callable[[MambaBackbone], None], used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make("vim")
    before = used(model, images())[0]
    torch.manual_seed(3)
    change(model)
    after = used(model, images())[0]
    assert_close(after, apart(model, images()))
    assert not torch.allclose(after, before, rtol=0, atol=1e-4)


def test_a_hook_that_is_gone_does_not_matter_any_more(used: Used, assert_close: AssertClose) -> None:
    model = make("vim")
    before = used(model, images())[0]
    seen: list[Tensor] = []
    handle = model.layers[3].register_forward_hook(lambda module, inputs, output: seen.append(output[0].hidden))
    found, ops = used(model, images())
    assert ops["mamba_blocks"] == 2 and len(seen) == 1  # the blocks before and after it
    assert_close(found, before)
    handle.remove()
    assert used(model, images())[1]["mamba_blocks"] == 1 and len(seen) == 1


def test_nothing_is_computed_twice_for_a_model_that_stays() -> None:
    calls: list[int] = []

    def count(module: nn.Module, how: int) -> int:
        calls.append(how)
        return len(calls)

    kept, first = Kept(count), nn.Linear(2, 2)
    layer = nn.Sequential(first, nn.Linear(2, 2))
    with torch.inference_mode():
        assert [kept(layer, 3), kept(layer, 3)] == [1, 1]
    with torch.no_grad():
        first.weight.add_(1)
    assert kept(layer, 3) == 2 == kept(layer, 3)
    assert kept(layer, 0) == 3 and calls == [3, 3, 0]
    assert kept(nn.Sequential(first), 0) == 4
    nothing = Kept(lambda module: calls.append(-1))
    assert nothing(layer) is None is nothing(layer) and calls.count(-1) == 1


def test_models_made_in_inference_mode_work_too(apart: Apart, assert_close: AssertClose) -> None:
    with torch.inference_mode():
        torch.manual_seed(0)
        model = Vim(VimConfig(**SIZES)).eval()
        first = model(images())
        block(model, 0).mixer.in_proj.weight.mul_(2)  # nothing tells that this has happened
        second = model(images())
    assert_close(second, apart(model, images()))
    assert not torch.allclose(first, second, rtol=0, atol=1e-4)


def test_copies_and_files_of_a_model_hold_its_weights_once(used: Used) -> None:
    model = make("vim")
    fresh = io.BytesIO()
    torch.save(model, fresh)
    expected = used(model, images())[0]
    later = io.BytesIO()
    torch.save(model, later)
    assert later.tell() <= 1.01 * fresh.tell()
    later.seek(0)
    for other in (copy.deepcopy(model), torch.load(later, weights_only=False)):
        assert torch.equal(used(other, images())[0], expected)


class Some(nn.Module):
    """A pruner that wants one thing after block 2, and nothing after the others."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__()
        self.wanted = wanted
        self.calls: list[tuple[int, ScanStatistics]] = []

    def wants(self, block: int) -> Wanted:
        return self.wanted if block == 2 else "nothing"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        self.calls.append((block, statistics))
        return sequence


@pytest.mark.parametrize("whole", [False, True])
def test_a_pruner_is_given_what_it_wants_and_called_only_then(
    whole: bool, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make("vim")
    expected = used(model, images())[0]
    sums = []
    for wanted in ("tokens", "y", "delta"):
        model.pruner = pruner = Some(wanted)
        found = apart(model, images()) if whole else used(model, images())[0]
        assert_close(found, expected)
        ((block, statistics),) = pruner.calls
        assert block == 2 and len(statistics.delta) == (2 if wanted == "delta" else 0)
        if wanted != "tokens":
            sums.append(torch.stack(statistics.y).sum(dim=0))
    assert_close(sums[0], sums[1])
