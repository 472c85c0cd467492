"""A pruned segmenter: whole feature maps, images of any size, calibration on several sizes, no repair."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.grids import fitting
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted, at_least_tokens
from ssmprune_cli.models import FAMILIES, DenseModel
from ssmprune_cli.models.heads import UperNetConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMambaConfig
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.pruning import REDUCTIONS, TokenPruner, attach, calibrate, compress, divergence, repair, restore
from ssmprune_cli.pruning.images import as_batches
from ssmprune_cli.pruning.mass import MASSES
from ssmprune_cli.pruning.schedule import share
from ssmprune_cli.recipe import load_recipe
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.compress.settings import recipe_settings

# Points that suit both: in VMamba they are inside its second stage, in PlainMamba two outputs follow each.
POINTS = [2, 3]
ENCODERS: dict[str, Any] = {
    "vmamba-upernet": VMambaConfig((64, 64), embed_dim=8, depths=(1, 3, 1), num_classes=0, out_stages=(0, 1, 2)),
    "plainmamba-upernet": PlainMambaConfig(
        (64, 64),
        patch_size=8,
        embed_dim=16,
        depth=5,
        d_state=4,
        out_indices=(0, 2, 3, -1),
        num_classes=0,
        positions=(4, 4),
    ),
}
SIZES = [(64, 64), (48, 72), (40, 24)]


def build(name: str, dtype: torch.dtype = torch.float32) -> DenseModel:
    torch.manual_seed(0)
    encoder = ENCODERS[name]
    head = UperNetConfig(in_channels=encoder.map_channels, channels=8, num_classes=3)
    family = FAMILIES.get(name)
    model = family.build(family.config_class(encoder=encoder, head=head, preprocessing=KeepRatio(256, 64)))
    for key, parameter in model.named_parameters():  # the authors' start is so near to zero that nothing would show
        if key.startswith("encoder."):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        elif key == "head.conv_seg.weight":
            parameter.data.normal_()
    assert isinstance(model, DenseModel)
    return model.to(dtype).eval()


def images(size: tuple[int, int], count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


class Spy(nn.Module):
    """Hands on to a pruner, and remembers every sequence before and after it."""

    def __init__(self, inner: TokenPruner) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[TokenSequence, TokenSequence]] = []

    def wants(self, block: int) -> Wanted:
        return at_least_tokens(self.inner.wants(block))

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        after: TokenSequence = self.inner(block, sequence, statistics)
        self.seen.append((sequence, after))
        return after


def spied(model: DenseModel, batch: Tensor) -> tuple[tuple[Tensor, ...], list[tuple[TokenSequence, TokenSequence]]]:
    """The feature maps, and the tokens before and after the pruner behind every block."""
    assert isinstance(model.pruner, TokenPruner)
    model.pruner = spy = Spy(model.pruner)
    with torch.no_grad():
        maps = model.encoder.feature_maps(batch)
    model.pruner = spy.inner
    return maps, spy.seen


# --- counts


@given(st.integers(1, 4096), st.integers(0, 4096), st.integers(1, 4096))
def test_a_share_is_the_nearest_count(count: int, more: int, now: int) -> None:
    whole = count + more
    found = share(count, whole, now)
    assert share(count, whole, whole) == count
    assert 1 <= found <= now
    exact = count * now / whole
    assert found == 1 or exact - 0.5 < found <= exact + 0.5  # a half is rounded up
    assert count == 1 or share(count - 1, whole, now) <= found


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_share_of_every_grid_stays(name: str, size: tuple[int, int]) -> None:
    model = build(name)
    compress(model, tokens=[37, 12], points=POINTS, alignment="none")
    _, seen = spied(model, images(size, 3))
    whole = model.stages[-2 if name == "vmamba-upernet" else 0].num_patches
    now = seen[1][0].length
    assert (whole == now) == (size == (64, 64))
    lengths = [after.positions.shape for _, after in seen]
    assert lengths[0][1] == seen[0][0].length and lengths[1:3] == [(3, share(count, whole, now)) for count in (37, 12)]
    for _, after in seen:
        assert bool((after.positions.diff(dim=1) > 0).all())
    if name == "plainmamba-upernet":  # pruning goes on after an output
        assert lengths[3] == lengths[4] == lengths[2]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_grid_too_small_to_lose_a_token(name: str) -> None:
    model, batch = build(name), images((8, 8))
    with torch.no_grad():
        dense = model(batch)
        compress(model, 0.6, points=POINTS, alignment="null")
        assert torch.equal(model(batch), dense)


# --- feature maps


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("reduction", ["drop", "frozen-once", "frozen-pairs"])
def test_a_dropped_token_is_in_every_map_as_it_left(name: str, reduction: str) -> None:
    model = build(name)
    compress(model, 0.6, points=POINTS, reduction=reduction, alignment="none")
    maps, seen = spied(model, images((48, 72)))
    first, last, outputs = 0, 5, {2: (1, "norm_layer2"), 3: (2, "norm_layer3"), 4: (3, "ln1")}
    trunk: Any = model.encoder
    if name == "vmamba-upernet":
        first, last, outputs = 1, 4, {3: (1, "outnorm1")}
    else:
        trunk = trunk.backbone
    values = torch.zeros_like(seen[first][0].hidden)  # of every place, as last known
    for block in range(first, last):
        before, after = seen[block]
        index = before.positions[..., None].expand_as(before.hidden)
        values = values.scatter(1, index, before.hidden)
        assert after.positions.shape[1] <= before.positions.shape[1]
        if block in outputs:
            number, norm = outputs[block]
            found = maps[number].flatten(2).transpose(1, 2)
            torch.testing.assert_close(found, getattr(trunk, norm)(values), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("reduction", REDUCTIONS.names())
def test_every_reduction_on_another_size(name: str, reduction: str) -> None:
    model = build(name, torch.float64)
    calibration, batch = (images(size, 2, torch.float64) for size in SIZES[1:])
    compress(model, 0.6, points=[2], reduction=reduction, calibration=calibration[:1], repair="none")
    with torch.no_grad():
        logits = model(batch)
        assert logits.shape == (2, 3, *batch.shape[2:]) and bool(logits.isfinite().all())
        # An image's answer does not depend on the one beside it.
        torch.testing.assert_close(model(batch[1:]), logits[1:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", SIZES[:2])
@pytest.mark.parametrize(
    ("reduction", "alignment"), [("context", "calibrated"), ("pool", "mass"), ("grid-merge", "null")]
)
def test_keep_one_is_the_dense_model_bit_for_bit(
    name: str, size: tuple[int, int], reduction: str, alignment: str
) -> None:
    model, batch = build(name), images(size)
    with torch.no_grad():
        dense = model(batch)
        compress(model, 1.0, points=POINTS, reduction=reduction, alignment=alignment, calibration=batch)
        assert torch.equal(model(batch), dense)
        restore(model)
        assert model.pruner is None and torch.equal(model(batch), dense)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", SIZES)
def test_a_merged_grid_is_spread_over_the_places_it_took_in(name: str, size: tuple[int, int]) -> None:
    model = build(name)
    compress(model, 0.5, points=[2], reduction="grid-merge", alignment="none")
    maps, seen = spied(model, images(size))
    before, after = seen[1]
    goal = fitting(before.patch_grid, share(model.pruner.settings.schedule.tokens[0], 64, before.length))  # type: ignore[union-attr]
    assert after.patch_grid == goal and after.merged is not None and after.merged.grid == before.patch_grid
    number, norm = (1, "outnorm1") if name == "vmamba-upernet" else (1, "backbone.norm_layer2")
    last = seen[3][0] if name == "vmamba-upernet" else seen[2][0]
    rows = model.encoder.get_submodule(norm)(last.hidden)
    expected = torch.stack([rows[image, after.merged.owner[image]] for image in range(2)])
    torch.testing.assert_close(maps[number].flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-6)


# --- with what value dropped tokens come back


def nearest_rows(sequence: TokenSequence) -> Tensor:
    """(B, G, d): at every place the token whose position is nearest, of two the one before."""
    rows = []
    for positions, hidden in zip(sequence.positions, sequence.hidden, strict=True):
        distance = (torch.arange(sequence.length)[:, None] - positions[None]).abs()
        rows.append(hidden[distance.argmin(dim=1)])
    return torch.stack(rows)


def segments(model: DenseModel, batch: Tensor) -> list[tuple[TokenSequence, Tensor, Tensor]]:
    """For both points: the tokens in the last block before the next one, every place as it was left, and as it is in
    the dense model."""
    assert isinstance(model.pruner, TokenPruner)
    _, seen = spied(model, batch)
    pruner, model.pruner = model.pruner, None
    compress(model, 1.0, points=POINTS, alignment="none")
    _, whole = spied(model, batch)
    model.pruner = pruner
    values, found = seen[1][0].hidden, []
    for block in (2, 3 if model.family == "vmamba-upernet" else 4):
        for between in range(2, block + 1):
            before = seen[between][0]
            values = values.scatter(1, before.positions[..., None].expand_as(before.hidden), before.hidden)
        found.append((seen[block][0], values, whole[block][0].hidden))
    return found


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("reduction", ["drop", "frozen", "local-merge"])
def test_a_blend_is_the_least_squares_of_what_is_missing(name: str, reduction: str) -> None:
    model = build(name, torch.float64)
    batches = [images(size, 2, torch.float64) for size in SIZES[:2]]
    compress(model, 0.5, points=POINTS, reduction=reduction, alignment="none", returning="blend", calibration=batches)
    assert isinstance(model.pruner, TokenPruner)
    stored = [float(model.pruner.get_buffer(f"returning_{point}")) for point in POINTS]
    by_batch = [segments(model, batch) for batch in batches]
    for number, fitted in enumerate(stored):
        change, wanted = [], []
        for sequence, left, dense in (each[number] for each in by_batch):
            gone = torch.ones(left.shape[:2], dtype=torch.bool).scatter(1, sequence.positions, False)
            change.append((nearest_rows(sequence) - left)[gone].flatten())
            wanted.append((dense - left)[gone].flatten())
        x, y = torch.cat(change), torch.cat(wanted)
        assert fitted == pytest.approx(min(max(float(x @ y / (x @ x)), 0.0), 1.0), abs=1e-9)
    assert reduction != "drop" or any(0 < fitted < 1 for fitted in stored)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(("returning", "share"), [("nearest", 1.0), ("blend", None)])
def test_maps_have_the_blend(name: str, returning: Any, share: float | None) -> None:
    model, batch = build(name, torch.float64), images((48, 72), 2, torch.float64)
    calibration = batch if returning == "blend" else None
    compress(model, 0.5, points=[2], reduction="drop", alignment="none", returning=returning, calibration=calibration)
    assert isinstance(model.pruner, TokenPruner)
    share = float(model.pruner.get_buffer("returning_2")) if share is None else share
    maps, seen = spied(model, batch)
    block, norm = (3, "outnorm1") if name == "vmamba-upernet" else (2, "backbone.norm_layer2")
    sequence, left = seen[block][0], seen[1][0].hidden
    whole = left + share * (nearest_rows(sequence) - left)
    whole = whole.scatter(1, sequence.positions[..., None].expand_as(sequence.hidden), sequence.hidden)
    expected = model.encoder.get_submodule(norm)(whole)
    torch.testing.assert_close(maps[1].flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-12)
    with torch.no_grad():  # and sessions compute the same
        torch.testing.assert_close(prepare(model)(batch), model(batch), rtol=0, atol=1e-9)


def test_a_blend_where_it_has_no_meaning() -> None:
    model = build("vmamba-upernet")
    with pytest.raises(UsageError, match="'grid-merge' loses no token"):
        compress(model, 0.5, points=[2], reduction="grid-merge", returning="nearest")
    with pytest.raises(UsageError, match="'blend' needs calibration images"):
        compress(model, 0.5, points=[2], returning="blend")
    classifier = PlainMamba(PlainMambaConfig((32, 32), patch_size=8, embed_dim=16, depth=2, num_classes=2, d_state=4))
    with pytest.raises(UsageError, match="in this model no dropped token comes back"):
        compress(classifier, 0.5, returning="nearest")
    settings = {"schedule": {"points": [1], "tokens": [8], "grids": []}, "returning": "nearest", "reduction": "drop"}
    with pytest.raises(CheckpointError, match="no token comes back in this model"):
        attach(classifier, settings)


# --- calibration


@pytest.mark.parametrize("name", ENCODERS)
def test_calibration_on_images_of_several_sizes(name: str) -> None:
    """Mean steps are those of all dropped tokens, so those of each size count by how many there are."""
    model = build(name, torch.float64)
    batches = [images(size, count, torch.float64) for size, count in zip(SIZES, (1, 2, 3), strict=True)]
    both = compress(model, 0.5, points=[2], reduction="drop", calibration=iter(batches), repair="none")
    assert both is not None and both.images == 6 and isinstance(model.pruner, TokenPruner)
    settings = model.pruner.settings
    alone = [calibrate(model, settings, [batch]) for batch in batches]
    kept = [each.points[0].kept for each in alone]
    assert [len(image) for image in both.points[0].kept] == [len(image) for images in kept for image in images]
    grids = [seen[1][0].length for seen in (spied(model, batch)[1] for batch in batches)]
    weights = [sum(grid - len(image) for image in images) for grid, images in zip(grids, kept, strict=True)]
    sums = [weight * each.deltas[2] for weight, each in zip(weights, alone, strict=True)]  # type: ignore[operator]
    torch.testing.assert_close(both.deltas[2], sum(sums) / sum(weights))
    assert both.points[0].to_dict()["kept_positions"][1] == kept[1][0].tolist()


@pytest.mark.parametrize("name", ENCODERS)
def test_the_mass_is_the_one_nearest_to_dense_pixel_by_pixel(name: str) -> None:
    model, batches = build(name), [images(size) for size in SIZES]
    with torch.no_grad():
        dense = [model(batch) for batch in batches]
    compress(model, 0.5, points=[2], reduction="local-merge", calibration=batches, repair="none")
    assert isinstance(model.pruner, TokenPruner)
    chosen, nats = float(model.pruner.get_buffer("alignment_2")), []
    for mass in MASSES:
        model.pruner.set_mass(mass)
        with torch.no_grad():
            nats.append(float(torch.cat([divergence(a, model(b)) for a, b in zip(dense, batches, strict=True)]).mean()))
    assert chosen == MASSES[nats.index(min(nats))] and len(set(nats)) == len(MASSES)


def test_a_segmenter_is_not_repaired_and_says_why() -> None:
    model, batches = build("vmamba-upernet"), [images(size) for size in SIZES]
    seen = compress(model, 0.5, points=[2], calibration=batches)
    reason = "a model for segmentation has no linear classifier of pooled features, so nothing is repaired"
    assert seen is not None and seen.repair is not None
    assert (seen.repair.kind, dict(seen.repair.refused)) == ("none", {"head": reason, "head+side": reason})
    asked = repair(model, batches, kind="head")
    assert (asked.kind, dict(asked.refused)) == ("none", {"head": reason})


# --- images


def test_floats_may_be_of_any_size_and_wrong_ones_are_refused() -> None:
    model, batches = build("vmamba-upernet"), [images(size) for size in SIZES]
    assert all(torch.equal(a, b) for a, b in zip(as_batches(model, batches), batches, strict=True))
    with pytest.raises(UsageError, match="so they are not normalised"):
        list(as_batches(model, [torch.full((1, 3, 8, 8), 255.0)]))


@pytest.mark.parametrize(
    ("way", "size", "expected"),
    [
        (KeepRatio(64, 16), (16, 24), (16, 24)),
        (KeepRatio(64, 16), (32, 48), (16, 24)),
        (KeepRatio(20, 16), (32, 64), (10, 20)),
        (KeepRatio(64, 16, divisor=8), (33, 41), (16, 24)),
        (KeepRatio(64, 16, divisor=32, fill="pad"), (16, 24), (32, 32)),
    ],
)
def test_uint8_images_are_prepared_in_proportion(
    way: KeepRatio, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    family = FAMILIES.get("vmamba-upernet")
    encoder = ENCODERS["vmamba-upernet"]
    head = UperNetConfig(in_channels=encoder.map_channels, channels=8, num_classes=3)
    model = family.build(family.config_class(encoder=encoder, head=head, preprocessing=way))
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    (found,) = as_batches(model, pixels)
    assert found.shape == (2, 3, *expected)
    mean, std = (np.array(each)[:, None, None] for each in (way.mean, way.std))
    exact = (pixels.transpose(0, 3, 1, 2) / 255 - mean) / std
    if size == (32, 48):  # each pixel is the mean of four, rounded
        halves = pixels.reshape(2, 16, 2, 24, 2, 3).astype(float).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
        exact = (halves / 255 - mean) / std
        assert float(np.abs(found.numpy() - exact).max()) <= 0.501 / 255 / min(way.std)
    elif size == (16, 24):
        np.testing.assert_allclose(found[:, :, :16, :24].numpy(), exact, atol=1e-6)
        assert not bool(found[:, :, 16:].any()) and not bool(found[:, :, :, 24:].any())


def test_a_recipe_says_how_dropped_tokens_come_back() -> None:
    recipe = load_recipe("vmamba_tiny_s1l8").override(["pruning.returning=blend"])
    settings = recipe_settings(FAMILIES.get("vmamba").build(VMambaConfig()), recipe, calibrated=True)
    assert settings is not None and settings.returning == "blend"
