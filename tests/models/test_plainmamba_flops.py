"""Multiply-adds of PlainMamba, dense and with the shipped schedules; weights are random."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssmprune_cli.models.plainmamba.checkpoint import VARIANTS
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.recipe.recipe import load_recipe
from ssmprune_cli.workflows.measure.flops import count_flops

SMALL = PlainMambaConfig(image_size=(32, 48), patch_size=8, embed_dim=32, depth=4, num_classes=7)


def zeros(variant: str) -> PlainMamba:
    """All weights zero: drawing millions of them would take longer than counting."""
    with torch.device("meta"):
        model = PlainMamba(VARIANTS[variant])
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.zero_()
    return model


# Dense figures are the published ones. Of pruned models the paper prints what L3 saves, 41.6 %; the other two are what
# the comments of the recipes say.
@pytest.mark.parametrize(("size", "published", "saving"), [("l1", 3.0, 22.4), ("l2", 8.1, 24.7), ("l3", 14.4, 41.6)])
def test_published_sizes_dense_and_with_the_shipped_schedules(size: str, published: float, saving: float) -> None:
    recipe = load_recipe(f"plainmamba_{size}_topvim")
    assert recipe.model is not None and recipe.model.variant == f"plainmamba_{size}"
    model = zeros(recipe.model.variant)
    dense = count_flops(model).all_directions
    assert dense / 1e9 == pytest.approx(published, rel=0.02)
    points, keep = recipe.pruning.points, recipe.pruning.keep
    assert points is not None and isinstance(keep, float)
    compress(model, keep, points=points, reduction=recipe.pruning.reduction, alignment="null")
    assert 100 * (1 - count_flops(model).all_directions / dense) == pytest.approx(saving, abs=0.5)


def by_hand(config: PlainMambaConfig, lengths: list[int], *, aligned: bool) -> int:
    d, n, width = config.embed_dim, config.d_state, 64
    e, r = 2 * d, -(-d // 16)
    (height, length), (rows, columns) = config.image_size, config.grid
    pixels, half = -(-height // 2) * -(-length // 2), config.patch_size // 2
    stem = pixels * width * 3 * 49 + config.stem_convs * pixels * width * 9 * width  # norms are free
    embed = stem + rows * columns * d * width * half**2
    scans = 4 * (9 * e * n + e)
    block = d * 2 * e + e * config.d_conv**2 + e * (r + 2 * n) + r * e + scans + e * d
    short = sum(each for each in lengths if each < rows * columns)
    return embed + sum(lengths) * block + d * config.num_classes + (4 * e * short if aligned else 0)


@pytest.mark.parametrize("size", [(32, 48), (21, 27)])
def test_against_a_formula_dense_and_pruned(size: tuple[int, int]) -> None:
    config = replace(SMALL, image_size=size)
    model = PlainMamba(config)
    total = model.num_tokens
    assert count_flops(model).all_directions == by_hand(config, [total] * 4, aligned=False)
    lengths = [total, 9, 9, 4]
    for alignment in ("none", "neighbour"):
        compress(model, tokens=[9, 4], points=[1, 3], reduction="drop", alignment=alignment)
        assert count_flops(model).all_directions == by_hand(config, lengths, aligned=alignment != "none")


def test_one_direction_counts_one_scan() -> None:
    model = PlainMamba(SMALL)
    count = count_flops(model)
    one_scan = model.num_tokens * 64 * (9 * 16 + 1)
    assert count.all_directions - count.one_direction == 4 * 3 * one_scan
    assert len(count.per_block) == 4


def test_counting_leaves_a_model_in_training_alone() -> None:
    """Its batch norms would take the zeros that are counted with for images."""
    model = PlainMamba(SMALL).train()
    model.backbone.patch_embed.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counted = count_flops(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and not model.backbone.patch_embed.stem.training
    assert counted == count_flops(model.eval())
