"""A pruned detector: whole feature maps at every output, tokens dropped between blocks, images of any size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.export import TARGETS, export
from ssmprune_cli.export.target import Wanted
from ssmprune_cli.grids import Grid
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES, Detector, before_resizing, resize, sides
from ssmprune_cli.models.heads import MaskRCNNConfig
from ssmprune_cli.models.plainmamba import AdapterConfig, PlainMambaAdapter
from ssmprune_cli.models.plainmamba.adapter.attention import DeformableAttention, grid_centres
from ssmprune_cli.models.vmamba.model import VMambaConfig
from ssmprune_cli.preprocessing import Frame, KeepRatio
from ssmprune_cli.pruning import REDUCTIONS, compress, divergence, relative_error, repair, restore
from ssmprune_cli.workflows.measure import count_flops

SIZE = (96, 128)
ENCODERS: dict[str, Any] = {
    "vmamba-maskrcnn": VMambaConfig(SIZE, embed_dim=8, depths=(1, 3, 1, 1), num_classes=0, out_stages=(0, 1, 2, 3)),
    "plainmamba-maskrcnn": AdapterConfig(
        SIZE,
        embed_dim=12,
        depth=5,
        d_state=4,
        positions=(4, 4),
        prior_channels=4,
        heads=2,
        mlp_channels=6,
        runs=(2, 4, 5),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Detector:
    torch.manual_seed(0)
    encoder = ENCODERS[name]
    head = MaskRCNNConfig(in_channels=encoder.map_channels, channels=8, hidden=16, num_classes=3)
    images = KeepRatio(200, 96, divisor=32, fill="pad")
    family = FAMILIES.get(name)
    model = family.build(family.config_class(encoder=encoder, head=head, preprocessing=images))
    for key, parameter in model.named_parameters():  # the authors' start is so near to zero that nothing would show
        if key.startswith("encoder."):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    assert isinstance(model, Detector)
    return model.to(dtype).eval()


def images(size: tuple[int, int] = SIZE, count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(divergence(tuple(one), tuple(other)).mean())


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_keep_one_is_the_dense_model_bit_for_bit(name: str) -> None:
    model = build(name)
    dense = model(images())
    compress(model, 1.0, calibration=images())
    assert all(torch.equal(*pair) for pair in zip(model(images()), dense, strict=True))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("reduction", REDUCTIONS.names())
@torch.no_grad()
def test_every_reduction_leaves_whole_levels(name: str, reduction: str) -> None:
    model = build(name)
    dense = model(images())
    compress(model, 0.6, points=[2, 3], reduction=reduction, calibration=images())
    pruned = model(images())
    assert [level.shape for level in pruned] == [level.shape for level in dense]
    assert 0 < distance(dense, pruned) < 2
    restore(model)
    assert distance(dense, model(images())) == 0


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_images_of_other_sizes_keep_the_same_share(name: str) -> None:
    model = build(name)
    compress(model, 0.5, points=[2], alignment="null")
    lengths: list[tuple[int, int]] = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda *called: lengths.append((called[1][0].positions.shape[1], called[1][0].length))
        )
    for size in ((96, 128), (64, 64), (160, 96)):
        lengths.clear()
        levels = model(images(size))
        assert levels[0].shape[2:] == (size[0] // 4, size[1] // 4)
        kept, grid = lengths[2]
        assert kept == (grid + 1) // 2


@torch.no_grad()
def test_each_image_is_independent_of_its_batch() -> None:
    model, batch = build("plainmamba-maskrcnn", torch.float64), images(count=3, dtype=torch.float64)
    compress(model, 0.6, points=[1, 3], alignment="null")
    together = model(batch)
    for row in range(3):
        for alone, level in zip(model(batch[row : row + 1]), together, strict=True):
            torch.testing.assert_close(alone[0], level[row], rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_prior_sees_a_dropped_token_as_it_left() -> None:
    """And an injector adds to the tokens that are left alone, each at its own place."""
    model = build("plainmamba-maskrcnn")
    compress(model, tokens=[20], points=[1], reduction="drop", alignment="none")
    adapter = model.encoder
    assert isinstance(adapter, PlainMambaAdapter)
    seen: dict[str, Any] = {}

    def remember(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *called: seen.update({name: (called[1], called[2])}))

    remember("first block", adapter.blocks[0])
    remember("second block", adapter.blocks[1])
    remember("extractor", adapter.backbone.get_submodule("interactions.0.extractor"))
    remember("injector", adapter.backbone.get_submodule("interactions.1.injector"))
    model(images(count=1))
    left, after = seen["first block"][1][0], seen["second block"][1][0]
    whole = left.hidden.clone()
    whole[0, after.positions[0]] = after.hidden[0]
    torch.testing.assert_close(seen["extractor"][0][3], whole, rtol=0, atol=0)
    tokens, centres = seen["injector"][0][:2]
    assert tokens.shape[1] == 20
    rows, columns = after.positions[0] // 8, after.positions[0] % 8  # of a grid of 6 x 8
    expected = torch.stack(((columns + 0.5) / 8, (rows + 0.5) / 6), dim=-1)
    torch.testing.assert_close(centres[0], expected)


@pytest.mark.parametrize("size", [(96, 100), (80, 128), (0, 32)])
def test_sides_that_32_does_not_divide_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="multiples of 32"):
        build("plainmamba-maskrcnn")(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_session_gives_the_same_levels(name: str) -> None:
    model = build(name)
    session = prepare(model)
    for expected in (model, compressed(model)):
        found = session.with_pruner(expected.pruner)(images())
        assert isinstance(found, tuple)
        for own, level in zip(found, expected(images()), strict=True):
            torch.testing.assert_close(own, level, rtol=0, atol=1e-4)
    found = model.read(session(images()), [Frame((50, 70), (90, 120))] * 2)
    assert all(each.masks.shape[1:] == (50, 70) for each in found)


def compressed(model: Detector) -> Detector:
    compress(model, 0.7, points=[2], calibration=images())
    return model


def test_backbone_and_pyramid_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's graph, not decomposed: that is the longest part. Maps are compared, and there are no answers."""

    def write(graph: torch.export.ExportedProgram, path: Path, wanted: Wanted) -> None:
        said.append(wanted)
        torch.export.save(graph, path)

    said: list[Wanted] = []
    monkeypatch.setitem(TARGETS._entries, "pt2", replace(TARGETS.get("pt2"), write=write))
    made = export(compressed(build("vmamba-maskrcnn")), tmp_path / "detector.pt2", target="pt2", batch=1)
    (check,) = made.checks
    assert check.error <= 1e-5 and check.same is None
    (wanted,) = said
    assert wanted.outputs == ("p2", "p3", "p4", "p5", "p6")
    assert json.loads(wanted.facts["strides"]) == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    maps = torch.export.load(made.path).module()(torch.zeros(1, 3, *SIZE))
    assert [SIZE[0] // each.shape[2] for each in maps] == [4, 8, 16, 32, 48]  # the last rounds up: 3 rows to 2


def test_nothing_is_repaired() -> None:
    found = repair(compressed(build("vmamba-maskrcnn")), [images()] * 40, kind="head")
    assert found.kind == "none" and "no linear classifier" in str(found.refused)


def test_multiply_adds_of_encoder_and_head_are_apart() -> None:
    for name in ENCODERS:
        model = build(name)
        dense = count_flops(model)
        pruned = count_flops(compressed(model))
        assert pruned.head == dense.head and pruned.encoder < dense.encoder
        channels = model.config.head
        cells = [rows * columns for rows, columns in ((24, 32), (12, 16), (6, 8), (3, 4))]
        expected = sum(
            count * (dim * channels.channels + 9 * channels.channels**2)
            for count, dim in zip(cells, channels.in_channels, strict=True)
        )
        assert dense.head == expected


# --- distances and attention


def test_relative_error_by_hand() -> None:
    dense = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_error(dense, torch.tensor([[3.0, 3.0], [0.0, 0.0], [2.0, 0.0]])).tolist() == [0.04, 0, 1]
    assert distance([dense[:1], dense[2:]], [dense[:1], 2 * dense[2:]]) == 0.5


def direct_attention(layer: DeformableAttention, query: Tensor, centre: Tensor, maps: list[Tensor]) -> Tensor:
    """Of one query (d,) at `centre` (2,), place by place; maps (d, rows, columns) hold projected values."""
    heads, dim = layer.heads, len(query) // layer.heads
    offsets = layer.sampling_offsets(query).view(heads, len(maps), 4, 2)
    weights = layer.attention_weights(query).view(heads, -1).softmax(dim=-1).view(heads, len(maps), 4)
    result = torch.zeros_like(query)
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        for number, image in enumerate(maps):
            rows, columns = image.shape[1:]
            for point in range(4):
                x = centre[0] * columns + offsets[head, number, point, 0] - 0.5
                y = centre[1] * rows + offsets[head, number, point, 1] - 0.5
                for row in (int(y.floor()), int(y.floor()) + 1):
                    for column in (int(x.floor()), int(x.floor()) + 1):
                        if 0 <= row < rows and 0 <= column < columns:
                            share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                            result[own] += weights[head, number, point] * share * image[own, row, column]
    return layer.output_proj(result)  # type: ignore[no-any-return]


@torch.no_grad()
def test_attention_is_a_sum_over_places() -> None:
    """Near the edges too, where places lie outside."""
    torch.manual_seed(0)
    layer = DeformableAttention(8, 2, 2).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    grids: list[Grid] = [(4, 6), (2, 3)]
    values, queries = torch.randn(1, 30, 8).double(), torch.randn(1, 5, 8).double()
    centres = torch.rand(1, 5, 2).double()
    found = layer(queries, centres, values, grids)
    projected = layer.value_proj(values)[0].split([24, 6])
    maps = [each.t().unflatten(1, grid) for each, grid in zip(projected, grids, strict=True)]
    for row in range(5):
        expected = direct_attention(layer, queries[0, row], centres[0, row], maps)
        torch.testing.assert_close(found[0, row], expected, rtol=0, atol=1e-12)


def test_centres_of_grids() -> None:
    found = grid_centres([(1, 2), (2, 1)], torch.zeros(1))
    assert found.tolist() == [[[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]]


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_smaller_image_keeps_its_proportions(name: str) -> None:
    """The weights stay. Tokens are counted for a usual photograph of the new size; the dense model can be had again."""
    model = build(name)
    assert sides(model) == (64,)  # from half of 96 on, what 32 divides
    smaller = resize(model, 64)
    assert isinstance(smaller, Detector)
    assert smaller.preprocessing == KeepRatio(133, 64, divisor=32, fill="pad") and smaller.image_size == (64, 128)
    assert distance(model(images((64, 96))), smaller(images((64, 96)))) == 0
    assert before_resizing(smaller.config) == replace(model.config, encoder=before_resizing(smaller.config).encoder)
    with pytest.raises(UsageError, match="resized before"):
        resize(smaller, 32)
