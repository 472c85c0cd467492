"""A pruned VMamba as a whole: keep 1.0 is dense, alignment is exact where it can be, stages are made whole again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli import load
from ssmprune_cli.checkpoint import save
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.vmamba.mixer import VMambaMixer
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import ALIGNMENTS, IMPORTANCES, TokenPruner, compress, restore
from ssmprune_cli.recipe.recipe import load_recipe, shipped_recipes
from ssmprune_cli.tokens import Fate, TokenSequence
from ssmprune_cli.workflows.measure.flops import count_flops
from ssmprune_cli.workflows.profile import tokens_per_block
from ssmprune_cli.workflows.reporting.kept import stages
from ssmprune_cli.workflows.visualize import picture

# Grids of 8 x 6, 4 x 3 and 2 x 2: the last two are rounded up.
V2 = VMambaConfig(image_size=(32, 24), embed_dim=16, depths=(3, 3, 2), num_classes=5)
V0 = replace(V2, patch_embed="v1", downsample="v1", d_state=2, ssm_ratio=2.0, gated=True, conv_bias=True, mlp_ratio=0.0)
KINDS = {"v2": V2, "v0": V0, "backbone": replace(V2, num_classes=0, out_stages=(0, 1, 2))}
POINTS = [1, 2, 4, 7]  # in every stage


def build(config: VMambaConfig, dtype: torch.dtype = torch.float32) -> VMamba:
    torch.manual_seed(0)
    model = VMamba(config)
    for parameter in model.parameters():  # zero-initialised biases would hide mistakes
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return model.to(dtype).eval()


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 32, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


class Spy(nn.Module):
    """Hands on to a pruner and remembers what went in and what came out after every block."""

    def __init__(self, inner: TokenPruner) -> None:
        super().__init__()
        self.inner = inner
        self.before: list[TokenSequence] = []
        self.after: list[TokenSequence] = []
        self.statistics: list[ScanStatistics] = []

    def wants(self, block: int) -> Wanted:
        return "delta"

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        self.before.append(sequence)
        self.statistics.append(statistics)
        self.after.append(self.inner(block, sequence, statistics))
        return self.after[-1]


def spied(model: VMamba, batch: Tensor) -> tuple[Tensor, Spy]:
    assert isinstance(model.pruner, TokenPruner)
    spy = Spy(model.pruner)
    model.pruner = spy
    with torch.no_grad():
        logits = model(batch)
    model.pruner = spy.inner
    return logits, spy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", ALIGNMENTS.names())
def test_keep_one_is_the_dense_model_bit_for_bit(kind: str, alignment: str) -> None:
    model, batch = build(KINDS[kind]), images()
    with torch.no_grad():
        dense = model(batch)
        calibration = batch if alignment == "calibrated" else None
        reduction = "pool" if alignment == "mass" else "context"
        compress(model, 1.0, points=POINTS, reduction=reduction, alignment=alignment, calibration=calibration)
        assert torch.equal(model(batch), dense)


@pytest.mark.parametrize(
    ("kind", "reduction", "importance"),
    [*(("v2", "context", name) for name in IMPORTANCES.names()), ("v0", "context", "clip"), ("v0", "drop", "clip")],
)
def test_each_sample_is_independent_of_its_batch(kind: str, reduction: str, importance: str) -> None:
    # float64: sums of another batch size may be added in another order, worth 1e-15 a step.
    model, batch = build(KINDS[kind], torch.float64), images(3, torch.float64)
    compress(model, 0.6, points=POINTS, importance=importance, reduction=reduction, alignment="null")
    together, spy = spied(model, batch)
    for row in range(3):
        alone, own = spied(model, batch[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-11)
        for block, sequence in enumerate(own.after):
            assert torch.equal(sequence.positions[0], spy.after[block].positions[row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(30, 17, 5, 3), (1, 1, 1, 1)])
def test_counts_and_order(kind: str, tokens: tuple[int, ...]) -> None:
    model = build(KINDS[kind])
    compress(model, tokens=tokens, points=POINTS, alignment="neighbour")
    logits, spy = spied(model, images(4))
    assert torch.isfinite(logits).all()
    first, second, third, fourth = tokens
    lengths = [first, second, second, third, third, third, fourth, fourth]
    assert [sequence.positions.shape for sequence in spy.after] == [(4, length) for length in lengths]
    assert all((sequence.positions.diff(dim=1) > 0).all() for sequence in spy.after)
    assert tokens_per_block(model) == (48, first, second, 12, third, third, 4, fourth)


@pytest.mark.parametrize("reduction", ["context", "drop"])
def test_dropped_tokens_come_back_as_they_left(reduction: str) -> None:
    model, batch = build(V2, torch.float64), images(2, torch.float64)
    compress(model, tokens=[20, 7, 5, 2], points=POINTS, reduction=reduction, alignment="null")
    _, spy = spied(model, batch)
    with torch.no_grad():
        grids = list(model.stage_outputs(batch))
    for stage, grid in zip(model.stages, grids, strict=True):
        expected = spy.before[stage.start].hidden.clone()
        for block in range(stage.start, stage.stop):
            sequence = spy.before[block]  # values as the block left them; those of dropped tokens stay
            expected.scatter_(1, sequence.positions[..., None].expand_as(sequence.hidden), sequence.hidden)
        assert torch.equal(grid.flatten(1, 2), expected)


@pytest.mark.parametrize("kind", ["v2", "v0"])
def test_alignment_is_exact_when_steps_do_not_depend_on_the_token(kind: str) -> None:
    """Constant steps make `null` the truth; a convolution of its centre alone takes context out. Then the pruned mixer
    must equal the dense one with the dropped inputs zeroed, in all four directions at once."""
    mixer = build(KINDS[kind], torch.float64).mixers[0]
    assert isinstance(mixer, VMambaMixer)
    with torch.no_grad():
        mixer.dt_projs_weight.zero_()
        centre = mixer.conv2d.weight[:, :, 1, 1].clone()
        mixer.conv2d.weight.zero_()[:, :, 1, 1] = centre
        if mixer.conv2d.bias is not None:
            mixer.conv2d.bias.zero_()
        for parameter in (mixer.A_logs, mixer.in_proj.weight, mixer.x_proj_weight, mixer.dt_projs_bias):
            nn.init.normal_(parameter, std=0.5)  # steps and states that are large enough to matter
    torch.manual_seed(2)
    grid = (4, 5)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 4, 8, 9, 15], [2, 5, 8, 11, 13, 19]])
    mask = torch.zeros(2, 20, 1, dtype=torch.float64).scatter(1, kept[..., None], 1.0)
    dense = TokenSequence.dense(x, restorable=True)
    short = dense.keep(kept)
    null = mixer.null_delta()
    aligned = ScanAlignment(null)

    def at_kept(values: Tensor) -> Tensor:
        return values.gather(1, kept[..., None].expand(-1, -1, values.shape[-1]))

    full, dense_scans = mixer(x * mask, dense, grid, None, "y")
    found, scans = mixer(short.hidden, short, grid, aligned, "y")
    torch.testing.assert_close(found, at_kept(full), rtol=0, atol=1e-10)
    for direction in range(4):
        torch.testing.assert_close(scans.y[direction], at_kept(dense_scans.y[direction]), rtol=0, atol=1e-10)
    _, unaligned = mixer(short.hidden, short, grid, None, "y")
    for direction in range(4):  # the test would notice if alignment did nothing
        assert (unaligned.y[direction] - at_kept(dense_scans.y[direction])).abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["v2", "v0"])
def test_the_convolution_sees_dropped_tokens_if_they_are_remembered(kind: str) -> None:
    """With one step each of a whole 3x3 neighbourhood, the input of the scans is the dense one at the kept tokens."""
    model = build(KINDS[kind], torch.float64)
    block = model.get_submodule("layers.0.blocks.0")
    torch.manual_seed(2)
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 4, 8, 9, 15], [2, 5, 8, 11, 13, 19]])
    dense = TokenSequence.dense(x, grid=(4, 5), restorable=True)
    _, expected = block(dense, None, "delta")
    fates: tuple[tuple[Fate, bool], ...] = (("frozen", True), ("context", True), ("gone", False))
    for others, same in fates:
        _, found = block(dense.keep(kept, others=others), None, "delta")
        for direction in range(4):  # steps come from the convolution's output alone
            at_kept = expected.delta[direction].gather(1, kept[..., None].expand(-1, -1, found.delta[0].shape[-1]))
            assert torch.allclose(found.delta[direction], at_kept, rtol=0, atol=1e-12) == same


def test_statistics_are_at_the_tokens_own_positions() -> None:
    """A score of one direction alone must follow a token around: in a dense pass and after dropping a part that no
    earlier step of that direction has seen."""
    mixer = build(V2, torch.float64).mixers[0]
    assert isinstance(mixer, VMambaMixer)
    torch.manual_seed(3)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    grid = (3, 4)
    with torch.no_grad():
        mixer.conv2d.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # the centre alone
    _, dense = mixer(x, TokenSequence.dense(x), grid, None, "delta")
    # Kept: what each direction visits first, so that the scan cannot tell that the rest is gone.
    first = {0: [0, 1, 2, 3, 4], 1: [0, 1, 4, 5, 8, 9], 2: [7, 8, 9, 10, 11], 3: [2, 3, 6, 7, 10, 11]}
    for direction, places in first.items():
        short = TokenSequence.dense(x).keep(torch.tensor([places]))
        _, found = mixer(short.hidden, short, grid, None, "delta")
        torch.testing.assert_close(found.y[direction], dense.y[direction][:, places], rtol=0, atol=1e-12)
        torch.testing.assert_close(found.delta[direction], dense.delta[direction][:, places], rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["context", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str, reduction: str) -> None:
    model = build(KINDS[kind], torch.float64)
    compress(model, 0.6, points=POINTS, alignment="neighbour", reduction=reduction)
    if kind == "backbone":
        sum(features.square().sum() for features in model.feature_maps(images(2, torch.float64))).backward()  # type: ignore[union-attr]
    else:
        model(images(2, torch.float64)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_gradcheck_through_a_pruned_model() -> None:
    config = replace(V2, embed_dim=4, depths=(2, 1), num_classes=2, image_size=(16, 12))
    model = build(config, torch.float64)
    compress(model, 0.6, points=[1], alignment="null")
    batch = torch.randn(1, 3, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    name = "layers.0.blocks.1.op.A_logs"
    weight = model.get_parameter(name).detach().clone().requires_grad_()

    def run(value: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, {name: value}, (batch,))
        return logits

    assert torch.autograd.gradcheck(run, (weight,), atol=1e-6)


def test_calibrated_deltas_are_the_means_over_the_dropped_tokens_of_their_stage() -> None:
    model, batch = build(V2), images(6)
    compress(model, 1.0, points=POINTS, alignment="none")
    _, dense = spied(model, batch)
    restore(model)
    seen = compress(model, tokens=[20, 5], points=[2, 4], calibration=[batch[:2], batch[2:]])
    assert seen is not None and seen.images == 6
    assert [delta is not None for delta in seen.deltas] == [False, False, True, False, True, True, False, False]
    assert isinstance(model.pruner, TokenPruner)
    assert {name for name, _ in model.pruner.named_buffers()} == {"alignment_2", "alignment_4", "alignment_5"}
    for point, count, length, blocks in ((2, 20, 48, [2]), (4, 5, 12, [4, 5])):
        score = sum(dense.statistics[point - 1].y).clamp(min=0).mean(dim=-1)  # type: ignore[union-attr]
        dropped = torch.ones(6, length, dtype=torch.bool).scatter(1, score.topk(count, dim=1).indices, False)
        for block in blocks:
            for direction in range(4):
                expected = dense.statistics[block].delta[direction][dropped].mean(dim=0)
                found = getattr(model.pruner, f"alignment_{block}")[direction]
                # Sums in another order: a few float32 roundings.
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["context", "drop", "drop-unsorted", "mask"])
def test_restore_and_compress_again(reduction: str) -> None:
    model, batch = build(V2), images()
    with torch.no_grad():
        dense = model(batch)
        compress(model, 0.5, points=POINTS, reduction=reduction)
        pruned = model(batch)
        compress(model, 0.5, points=POINTS, reduction=reduction)
        assert torch.equal(model(batch), pruned)
        assert not torch.equal(pruned, dense)
        restore(model)
        assert torch.equal(model(batch), dense)


def test_an_artefact_comes_back(tmp_path: Path) -> None:
    model, batch = build(V2), images()
    compress(model, 0.6, points=POINTS, calibration=batch)
    save(tmp_path / "out", model)
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch))
    assert tokens_per_block(loaded) == (48, 29, 18, 12, 8, 8, 4, 3)


def test_points_default_to_the_longest_stage_and_must_lie_within_one() -> None:
    model = build(replace(V2, depths=(1, 4, 1)))
    compress(model, 0.5)
    assert isinstance(model.pruner, TokenPruner)
    assert model.pruner.settings.schedule.points == (2, 3, 4)
    with pytest.raises(UsageError, match="a stage ends") as caught:
        compress(model, 0.5, points=[2, 5])
    assert caught.value.hint == "Possible points: 2 to 4."


def test_a_pruned_model_takes_images_of_its_size_only() -> None:
    model = build(V2)
    compress(model, 0.5)
    with pytest.raises(DataError, match=r"takes images of shape \(3, \d+, \d+\), not \(3, 32, 32\)"):
        model(torch.zeros(1, 3, 32, 32))


def test_pictures_show_every_stage_on_its_own_grid() -> None:
    model, batch = build(V2), images(2)
    compress(model, tokens=[20, 5], points=[2, 4], alignment="none")
    _, spy = spied(model, batch)
    found, _ = stages(model, batch)
    assert [(stage.block, stage.count, stage.kept.shape) for stage in found] == [(2, 20, (2, 8, 6)), (4, 5, (2, 4, 3))]
    for stage in found:
        kept = torch.from_numpy(stage.kept).flatten(1)
        assert torch.equal(kept.nonzero()[:, 1].view(2, -1), spy.after[stage.block - 1].positions)
    pixels = torch.zeros(2, 32, 24, 3, dtype=torch.uint8).numpy()
    picture(pixels, found, ["", ""])


# --- recipes

RECIPES = sorted(name for name in shipped_recipes() if "vmamba_" in name)


def test_every_size_has_a_recipe() -> None:
    chosen = [load_recipe(name).model for name in RECIPES]
    assert [model.variant for model in chosen if model is not None] == RECIPES  # named like their models
    assert set(RECIPES) == set(FAMILIES.get("vmamba").variants)


@pytest.mark.parametrize(
    "name", [name if name == "vmamba_tiny_s1l8" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_saves_what_its_header_says(name: str) -> None:
    pruning, family = load_recipe(name).pruning, FAMILIES.get("vmamba")
    with torch.device("meta"):
        model = family.build(family.variants[name])
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    dense = count_flops(model).all_directions
    # A "neighbour" costs what a calibrated step does.
    compress(model, pruning.keep, points=pruning.points, reduction=pruning.reduction, alignment="neighbour")
    pruned = count_flops(model).all_directions
    said = f"Multiply-adds: {dense / 1e9:.2f} G to {pruned / 1e9:.2f} G (-{100 * (1 - pruned / dense):.1f} %), all "
    header = " ".join(shipped_recipes()[name].read_text(encoding="utf-8").replace("\n#", "").split())
    assert said in header
