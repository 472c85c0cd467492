"""Multiply-adds against the paper's figures and against a formula worked out by hand, and against fvcore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.measure.flops import FlopCount, count_flops
from ssmprune_cli.workflows.measure.traffic import bytes_moved


def vim(variant: str) -> Backbone:
    """All weights zero: drawing millions of them would take longer than counting."""
    family = FAMILIES.get("vim")
    with torch.device("meta"):
        model = family.build(family.variants[variant])
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    return model


# Dense: the Vim literature (one direction) and an independent calculator for all directions, both rounded to 1 M. They
# count a gate in every scan, ours is an uncounted product after the scans; what is left are three padded tokens a
# convolution, less than 3e-4.
@pytest.mark.parametrize(
    ("variant", "one", "everything"),
    [("vim_tiny", 1.449, 1.823), ("vim_small", 5.076, 5.912), ("vim_base", 18.867, 20.886)],
)
def test_dense_vim(variant: str, one: float, everything: float) -> None:
    model = vim(variant)
    gate = len(model.mixers) * model.num_tokens * model.mixers[0].d_inner
    count = count_flops(model)
    assert (count.one_direction + gate) / 1e9 == pytest.approx(one, rel=3e-4)
    assert (count.all_directions + 2 * gate) / 1e9 == pytest.approx(everything, rel=3e-4)


def test_the_papers_schedules() -> None:
    # Plain drop, as published for these schedules (3.57 and 1.28 G); alignment adds B L E a scan.
    model = vim("vim_small")
    compress(model, 0.8, points=[5, 10, 15], reduction="drop", alignment="none")
    plain = count_flops(model).one_direction
    assert plain / 1e9 == pytest.approx(3.57, abs=0.04)
    compress(model, 0.8, points=[5, 10, 15], reduction="drop", alignment="neighbour")
    assert 0 < count_flops(model).one_direction - plain < 0.005 * plain
    model = vim("vim_tiny")
    compress(model, 0.8, points=[10], reduction="drop", alignment="none")
    assert count_flops(model).one_direction / 1e9 == pytest.approx(1.28, abs=0.02)


def by_hand(config: VimConfig, lengths: list[int]) -> int:
    d, n = config.embed_dim, config.d_state
    e, r = 2 * d, -(-d // 16)
    patches = (config.image_size[0] // config.patch_size) * (config.image_size[1] // config.patch_size)
    embed = patches * d * 3 * config.patch_size**2
    branch = e * config.d_conv + e * (r + 2 * n) + r * e + 9 * e * n + e  # conv, x_proj, dt_proj, scan with D
    block = d * 2 * e + 2 * branch + e * d  # in_proj, two directions, out_proj
    return embed + sum(lengths) * block + d * config.num_classes


def test_against_a_formula_dense_and_pruned() -> None:
    config = VimConfig(image_size=(32, 48), patch_size=8, stride=8, embed_dim=32, depth=4, num_classes=7)
    model = FAMILIES.get("vim").build(config)
    assert count_flops(model).all_directions == by_hand(config, [25] * 4)
    compress(model, tokens=[11, 3], points=[1, 3], reduction="drop", alignment="none")
    assert count_flops(model).all_directions == by_hand(config, [25, 12, 12, 4])
    compress(model, tokens=[11, 3], points=[1, 3], reduction="drop", alignment="neighbour")
    # One multiply-add a channel in both scans of the blocks that lack tokens.
    assert count_flops(model).all_directions == by_hand(config, [25, 12, 12, 4]) + 2 * 64 * (12 + 12 + 4)
    # A dropped token in sight costs half of the input projection, 32 x 64, and no more: convolutions count live tokens.
    compress(model, tokens=[11, 3], points=[1, 3], reduction="context", alignment="none")
    assert count_flops(model).all_directions == by_hand(config, [25, 12, 12, 4]) + 32 * 64 * (13 + 13 + 21)
    count = count_flops(model)
    assert len(count.per_block) == 4 and count.per_block[1] == count.per_block[2] > count.per_block[3]


def test_directions_that_share_their_projections_count_them_once() -> None:
    config = VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=32, depth=2, num_classes=7)
    single = count_flops(Vim(replace(config, mixer="none")))
    assert single.one_direction == single.all_directions
    assert count_flops(Vim(config)).one_direction == single.one_direction
    shared = count_flops(Vim(replace(config, mixer="v1")))
    assert shared.one_direction == single.one_direction
    assert shared.all_directions - single.all_directions == 2 * 17 * 64 * (9 * 16 + 1)  # the second scan of both blocks


def test_masking_saves_nothing() -> None:
    model = FAMILIES.get("vim").build(VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=32, depth=4))
    dense = count_flops(model).all_directions
    compress(model, 0.5, reduction="mask")
    assert count_flops(model).all_directions == dense


def test_an_op_that_is_not_known_is_an_error() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.fft.fft(x).real)

    model = Vim(VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=32, depth=2))
    model.head = Odd(32, 1000)
    with pytest.raises(SsmpruneError, match="fft"):
        count_flops(model)


def test_counting_leaves_the_model_alone() -> None:
    model = FAMILIES.get("vim").build(VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=32, depth=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_flops(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


SIZES: dict[str, dict[str, object]] = {
    "vim": {"image_size": (32, 32), "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 3, "d_state": 4},
    "plainmamba": {"image_size": (32, 32), "patch_size": 8, "embed_dim": 16, "depth": 3, "d_state": 4},
    "vmamba": {"image_size": (64, 64), "embed_dim": 16, "depths": (2, 1)},
    "vmamba, gated": {
        "image_size": (64, 64),
        "patch_embed": "v1",
        "downsample": "v1",
        "embed_dim": 16,
        "depths": (2, 1),
        "d_state": 4,
        "ssm_ratio": 2.0,
        "gated": True,
        "conv_bias": True,
        "mlp_ratio": 0.0,
    },
    "localvmamba": {"image_size": (64, 64), "embed_dim": 16, "depths": (2, 1), "d_state": 4},
    "medmamba": {"image_size": (64, 64), "embed_dim": 16, "depths": (2, 1), "d_state": 4},
    "efficientvmamba": {"image_size": (64, 64), "embed_dim": 16, "depths": (2, 1, 1, 1), "d_state": 4},
    "mambavision": {
        "image_size": (64, 64),
        "in_dim": 8,
        "embed_dim": 8,
        "depths": (1, 1, 3, 2),
        "num_heads": (1, 1, 4, 8),
        "d_state": 4,
    },
    "videomamba": {"image_size": (32, 32), "patch_size": 8, "embed_dim": 16, "depth": 3, "d_state": 4},
    "videomamba-clips": {
        "image_size": (16, 16),
        "patch_size": 8,
        "stride": 8,
        "embed_dim": 16,
        "depth": 3,
        "d_state": 4,
    },
    "mambar": {"image_size": (32, 32), "patch_size": 8, "embed_dim": 16, "depth": 3, "num_cls_tokens": 4},
    "localvim": {"image_size": (32, 32), "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 3, "d_state": 4},
}


def small(name: str, reduction: str | None) -> Backbone:
    family = FAMILIES.get(name.partition(",")[0])
    kind = type(next(iter(family.variants.values())))
    model = family.build(kind(**SIZES[name], num_classes=7)).eval()
    if reduction is not None:
        alignment = "none" if reduction == "mask" else "neighbour"
        compress(model, 0.6, points=[1], reduction=reduction, alignment=alignment)
    return model


REDUCTIONS = ["drop", "context", "frozen", "frozen-once", "pool", "local-merge", "merge", "mask"]


def by_fvcore(model: Backbone) -> FlopCount:
    """By torch.jit.trace, with the formulas of our ops; norms, pooling and interpolations are free."""
    analysis = FlopCountAnalysis(model, model.example(1))
    for op, formula in flop_registry.items():
        if str(op).startswith("ssmprune."):
            name = str(op).replace(".", "::")
            analysis.set_op_handle(name, handler(name, formula))
    for name in ("layer_norm", "batch_norm", "adaptive_avg_pool2d", "upsample_bilinear2d", "upsample_nearest2d"):
        analysis.set_op_handle(f"aten::{name}", lambda inputs, outputs: Counter())
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with torch.no_grad():
        total = int(analysis.total())
    names = {module: name for name, module in model.named_modules()}
    by_module, by_operator = analysis.by_module(), analysis.by_module_and_operator()
    repeated = 0.0
    for mixer in model.mixers:
        assert isinstance(mixer, nn.Module)
        own = by_operator[names[mixer]]["ssmprune::selective_scan"]
        own += sum(by_module[f"{names[mixer]}.{part}"] for part in mixer.per_direction)
        repeated += own * (1 - 1 / mixer.directions)
    return FlopCount(total, total - round(repeated), tuple(int(by_module[names[block]]) for block in model.blocks))


def handler(name: str, formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], Counter[str]]:
    def size(value: Any) -> Any:
        return list(value.type().sizes()) if value.isCompleteTensor() else value.toIValue()

    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        twice = formula(*map(size, inputs), out_val=size(outputs[0]))
        return Counter({name: twice // 2})

    return count


@pytest.mark.parametrize(
    ("name", "reduction"), [*((name, None) for name in SIZES), *(("vim", reduction) for reduction in REDUCTIONS)]
)
def test_fvcore_counts_the_same(name: str, reduction: str | None) -> None:
    """In all, a block, and what scan directions repeat."""
    model = small(name, reduction)
    assert count_flops(model) == by_fvcore(model)


class OpCounter(TorchDispatchMode):
    """What FlopCounterMode does, without its hooks around every module, with which a session does not run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("reduction", [None, *REDUCTIONS])
def test_torchs_counter_finds_twice_the_number(name: str, reduction: str | None) -> None:
    """Op by op, and in a session, whose fused calls count as what they are made of."""
    model = small(name, reduction)
    expected = count_flops(model).all_directions
    images = torch.zeros(1, *model.input_shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() == 2 * expected
    session = prepare(model)
    with torch.no_grad(), OpCounter() as fused:
        session(images)
    assert fused.total == 2 * expected


def test_bytes_moved_are_those_of_the_pruners_gathers() -> None:
    """One prune point that drops: two gathers of what stays (hidden state and residual), and what picks them."""
    torch.manual_seed(0)
    model = Vim(VimConfig(image_size=(32, 32), patch_size=4, stride=4, embed_dim=16, depth=4, num_classes=10)).eval()
    dense = bytes_moved(model)
    compress(model, tokens=[16], points=[2], reduction="drop", alignment="none", importance="l2")
    kept, rows = 16 + 1, 64 + 1
    # The hidden state is read whole, rows of 16 numbers are written, an index has 8 bytes; the residual likewise.
    gathers = 2 * 4 * 16 * (rows + kept) + 2 * 8 * kept
    assert gathers < bytes_moved(model) - dense < 4 * gathers
