"""Sessions of Vim, VideoMamba and Mamba-Reg: blocks in one call give what the small ops give."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import use_backend
from ssmprune_cli.models.common.layers import RMSNorm
from ssmprune_cli.models.mamba.backbone import MambaBackbone
from ssmprune_cli.models.mamba.block import MambaBlock
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.mixer import MambaMixer
from ssmprune_cli.models.mamba.videomamba import VideoMamba, VideoMambaConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import ALIGNMENTS, REDUCTIONS, choose_alignment, compress
from ssmprune_cli.tokens import TokenSequence

Counted = Callable[[Callable[[], Any]], tuple[Any, Counter[str]]]
Used = Callable[[nn.Module, Tensor], tuple[Tensor, Counter[str]]]
Apart = Callable[[nn.Module, Tensor], Tensor]
Flops = Callable[[Callable[[], Any]], int]
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
    "vim, layer norm": lambda: Vim(VimConfig(**SIZES, norm="layer")),
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


# Every reduction, and every alignment that suits it without calibration images.
PRUNED = [
    (reduction, alignment)
    for reduction in REDUCTIONS.names()
    for alignment in ALIGNMENTS.names()
    if (REDUCTIONS.get(reduction).aligned or alignment == "none")
    and (REDUCTIONS.get(reduction).sized or not ALIGNMENTS.get(alignment).needs_sizes)
    and not ALIGNMENTS.get(alignment).needs_calibration
]
SOME = [(None, "none"), ("drop", "null"), ("context", "null"), ("frozen-near", "null"), ("pool", "mass")]


def check_one_op_between_points(
    model: MambaBackbone, reduction: str | None, alignment: str, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    if reduction is not None:
        compress(model, 0.6, points=[1, 4], reduction=reduction, alignment=alignment)
    for count in (3, 1):
        found, ops = used(model, images()[:count])
        assert ops["mamba_blocks"] == (1 if reduction is None else 3) and not ops["selective_scan"]
        assert_close(found, apart(model, images()[:count]))


@pytest.mark.parametrize(("reduction", "alignment"), PRUNED)
def test_blocks_between_points_are_one_op(
    reduction: str, alignment: str, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    check_one_op_between_points(make("vim"), reduction, alignment, used, apart, assert_close)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("vim", "vim, layer norm")])
@pytest.mark.parametrize(("reduction", "alignment"), SOME)
def test_and_so_they_are_in_the_whole_family(
    name: str, reduction: str | None, alignment: str, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    check_one_op_between_points(make(name), reduction, alignment, used, apart, assert_close)


@pytest.mark.parametrize(("reduction", "alignment"), PRUNED)
def test_the_inside_of_a_block_is_one_op_too(
    reduction: str, alignment: str, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    """Where something stands in the way of more."""
    model = make("vim, layer norm")
    compress(model, 0.6, points=[1, 4], reduction=reduction, alignment=alignment, importance="random")
    found, ops = used(model, images())
    assert ops["mamba_inner"] == 6 and not ops["selective_scan"] and not ops["mamba_blocks"]
    assert_close(found, apart(model, images()))


def test_a_score_that_looks_at_step_sizes_is_given_them_op_by_op(
    used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make("vim")
    compress(model, 0.6, points=[3], reduction="drop", alignment="null", importance="delta")
    found, ops = used(model, images())
    assert ops["mamba_blocks"] == 2 and ops["selective_scan"] > 0
    assert_close(found, apart(model, images()))


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


class Turns(Some):
    """A pruner whose alignment is of another kind in every other block."""

    def wants(self, block: int) -> Wanted:
        return "tokens" if block == 0 else "nothing"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None if block % 2 else ScanAlignment()

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        return sequence.keep(torch.arange(0, 60, 2).expand(len(sequence.hidden), -1))


def test_alignments_of_two_kinds_are_not_in_one_op(used: Used, apart: Apart, assert_close: AssertClose) -> None:
    model = make("vim")
    model.pruner = Turns("nothing")
    found, ops = used(model, images())
    assert ops["mamba_blocks"] == 6
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


def test_other_backends_do_without(used: Used, assert_close: AssertClose) -> None:
    model = make("vim")
    try:
        use_backend("chunked")
        found, ops = used(model, images())
    finally:
        use_backend("auto")
    assert not ops["mamba_blocks"] and ops["selective_scan"] == 12
    assert_close(found, used(model, images())[0])


@pytest.mark.parametrize("reduction", [None, *(name for name in REDUCTIONS.names() if name != "mask")])
def test_counters_find_the_same_multiply_adds_inside(reduction: str | None, flops: Flops, apart: Apart) -> None:
    model = make("vim")
    if reduction is not None:
        alignment = choose_alignment("auto", reduction, calibrated=False)
        compress(model, 0.6, points=[1, 4], reduction=reduction, alignment=alignment)
    session = prepare(model)
    assert flops(lambda: session(images())) == flops(lambda: apart(model, images())) > 0


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
    mixer = block(model, 2).mixer
    assert isinstance(mixer, MambaMixer)
    mixer.x_proj = nn.Linear(64, 34, bias=False)


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
    assert isinstance(mixer, MambaMixer)
    mixer.x_proj = Adapter(mixer.x_proj)  # type: ignore[assignment]


def hook(model: MambaBackbone) -> None:
    block(model, 3).mixer.out_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = [double_last, reload, assign, swap_data, swap_layer, swap_block, swap_blocks, adapt, hook]


def other_epsilon(model: MambaBackbone) -> None:
    norm = block(model, 2).norm
    assert isinstance(norm, RMSNorm)
    norm.eps = 1.0


def other_scale(model: MambaBackbone) -> None:
    mixer = block(model, 2).mixer
    assert isinstance(mixer, MambaMixer)
    mixer.scale = 2.0


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
def test_a_session_made_after_a_change_has_it(
    change: Callable[[MambaBackbone], None], used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make("vim")
    before = used(model, images())[0]
    torch.manual_seed(3)
    change(model)
    after = used(model, images())[0]
    assert_close(after, apart(model, images()))
    assert not torch.allclose(after, before, rtol=0, atol=1e-4)


def test_a_hooked_block_is_called_by_itself(used: Used, assert_close: AssertClose) -> None:
    model = make("vim")
    before = used(model, images())[0]
    seen: list[Tensor] = []
    handle = model.layers[3].register_forward_hook(lambda module, inputs, output: seen.append(output[0].hidden))
    logits, ops = used(model, images())
    assert ops["mamba_blocks"] == 2 and len(seen) == 1  # the blocks before and after it
    assert_close(logits, before)
    handle.remove()
    assert used(model, images())[1]["mamba_blocks"] == 1 and len(seen) == 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_pruner_is_given_what_it_wants_and_called_only_then(
    whole: bool, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make("vim")
    expected = used(model, images())[0]
    sums = []
    for wanted in ("tokens", "y", "delta"):
        model.pruner = pruner = Some(wanted)
        if whole:
            logits = apart(model, images())
        else:
            session = prepare(model)
            logits = session(images())
            assert not pruner.calls  # the session has a copy of it
            pruner = session.definition.pruner  # type: ignore[assignment]
        assert_close(logits, expected)
        ((block, statistics),) = pruner.calls
        assert block == 2 and len(statistics.delta) == (2 if wanted == "delta" else 0)
        if wanted != "tokens":
            sums.append(torch.stack(statistics.y).sum(dim=0))
    assert_close(sums[0], sums[1])
