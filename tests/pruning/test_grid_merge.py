"""Grid merge: by hand, against slow loops, and what a smaller whole grid means to models, schedules and sessions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ssmprune_cli import load
from ssmprune_cli.checkpoint import save
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.grids import divided, fitting, gaps_by_size, protected_positions
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import Stage
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common import visits
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import (
    REDUCTIONS,
    Correction,
    PruneSchedule,
    PruneSettings,
    TokenPruner,
    attach,
    compress,
    repair,
)
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.finetune.progressive import ProgressiveSchedule
from ssmprune_cli.workflows.profile import tokens_per_block
from ssmprune_cli.workflows.reporting.kept import stages
from ssmprune_cli.workflows.trials.candidates import layouts

Cell = tuple[Tensor, float, list[int]]  # value, size, dense places


def merge(sequence: TokenSequence, count: int) -> TokenSequence:
    score = torch.zeros(sequence.positions.shape)
    return REDUCTIONS.get("grid-merge").apply(sequence, score, count + len(sequence.protected))


def slow_line(cells: list[Cell], left: int) -> list[Cell]:
    """One row or column with `left` cells, pair by pair."""
    while len(cells) > left:
        gone = min(len(cells) - left, len(cells) // 2)
        starts = [number * len(cells) // gone for number in range(gone + 1)]
        made: list[Cell] = []
        for start, stop in pairwise(starts):
            window = cells[start:stop]
            alike = [functional.cosine_similarity(a[0], b[0], dim=0) for a, b in pairwise(window)]
            best = max(range(len(alike)), key=lambda pair: (float(alike[pair]), -pair))
            (a, m, here), (b, n, there) = window[best : best + 2]
            made += [*window[:best], ((a * m + b * n) / (m + n), m + n, here + there), *window[best + 2 :]]
        cells = made
    return cells


def slow(values: Tensor, grid: tuple[int, int], goal: tuple[int, int]) -> list[list[Cell]]:
    """`values` (rows * columns, d) of one image merged to `goal`, rows of cells."""
    rows = [[(values[r * grid[1] + c], 1.0, [r * grid[1] + c]) for c in range(grid[1])] for r in range(grid[0])]
    rows = [slow_line(row, goal[1]) for row in rows]
    columns = [slow_line([row[c] for row in rows], goal[0]) for c in range(goal[1])]
    return [[column[r] for column in columns] for r in range(goal[0])]


def test_by_hand_on_two_rows_of_four() -> None:
    # Each row is two windows of two cells, which merge; then the columns, of one pair each.
    values = torch.tensor([[1.0, 0], [3, 0], [0, 1], [0, 3], [5, 0], [7, 0], [0, 5], [0, 7]])[None]
    dense = TokenSequence.dense(values, grid=(2, 4))
    half = merge(dense, 4)
    assert half.grid == (2, 2) and half.length == 4 and half.is_dense and not half.is_untouched
    assert half.hidden[0].tolist() == [[2, 0], [0, 2], [6, 0], [0, 6]]
    assert half.sizes().tolist() == [[2, 2, 2, 2]] and half.positions.tolist() == [[0, 1, 2, 3]]
    assert half.merged is not None and half.merged.owner.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
    assert half.dense_positions().tolist() == [[0, 2, 4, 6]]
    assert half.spread(half.hidden)[0, :, 0].tolist() == [2, 2, 0, 0, 6, 6, 0, 0]
    assert merge(half, 1).hidden.tolist() == [[[2, 2]]]
    # One of three pairs goes: the most similar, in each row another one. Then nothing is left to do.
    values = torch.tensor([[1.0, 0], [0, 1], [0, 2], [1, 1], [3, 3], [1, 1], [0, 1], [2, 0]])[None]
    three = merge(TokenSequence.dense(values, grid=(2, 4)), 6)
    assert three.grid == (2, 3)
    assert three.hidden[0].tolist() == [[1, 0], [0, 1.5], [1, 1], [2, 2], [0, 1], [2, 0]]
    assert three.sizes().tolist() == [[1, 2, 1, 2, 1, 1]]
    assert three.gaps(reverse=False).tolist() == [[0, 0.5, 0.5, 0.5, 0.5, 0]]
    assert three.gaps(reverse=True).tolist() == [[0.5, 0.5, 0.5, 0.5, 0, 0]]


def test_of_equals_the_first_pair_is_merged() -> None:
    same = merge(TokenSequence.dense(torch.ones(2, 12, 3), grid=(2, 6)), 10)
    assert same.sizes().tolist() == [[2, 1, 1, 1, 1] * 2] * 2


@st.composite
def problems(draw: st.DrawFn) -> tuple[TokenSequence, int]:
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    patches = math.prod(grid)
    protected = tuple(sorted(draw(st.sets(st.integers(0, patches), max_size=2))))
    length = patches + len(protected)
    protected = tuple(place for place in protected if place < length)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    stream = torch.randn(2, patches + len(protected), 4, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        stream = stream.round()  # ties, and tokens of nothing
    dense = TokenSequence.dense(0.75 * stream, protected, grid=grid)
    return replace(dense, residual=0.25 * stream), draw(st.integers(1, patches))


@given(problem=problems())
@settings(deadline=None)
def test_a_smaller_grid_is_what_slow_loops_make(problem: tuple[TokenSequence, int]) -> None:
    dense, count = problem
    assert dense.grid is not None
    goal = fitting(dense.grid, count)
    small = merge(dense, count)
    assert small.patch_grid == goal and small.length == math.prod(goal) + len(dense.protected)
    assert len(small.protected) == len(dense.protected) and small.positions[0].tolist() == list(range(small.length))
    assert torch.equal(small.protected_stream(), dense.protected_stream()) if dense.protected else True
    patches, merged = dense.patches().flatten(1, 2), small.patches().flatten(1, 2)
    assert (small.sizes().sum(dim=1) == dense.length).all()
    torch.testing.assert_close(small.mean(small.stream), dense.stream.mean(dim=1), rtol=0, atol=1e-12)
    positions = small.dense_positions()
    assert (positions.sort(dim=1).values.diff(dim=1) > 0).all()  # each at a place of its own
    for sample in range(2):
        rows = slow(patches[sample], dense.grid, goal)
        cells = [cell for row in rows for cell in row]
        torch.testing.assert_close(merged[sample], torch.stack([cell[0] for cell in cells]), rtol=0, atol=1e-12)
        if small.merged is not None:
            for number, (_, size, places) in enumerate(cells):
                assert (small.merged.owner[sample] == number).nonzero()[:, 0].tolist() == sorted(places)
                assert size == len(places)
        alone = replace(dense, hidden=dense.hidden[sample : sample + 1], positions=dense.positions[sample : sample + 1])
        alone = merge(replace(alone, residual=dense.residual[sample : sample + 1]), count)  # type: ignore[index]
        assert torch.equal(alone.stream[0], small.stream[sample])


@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(1, 400))
def test_what_fits(grid: tuple[int, int], count: int) -> None:
    rows, columns = fitting(grid, count)
    assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1] and rows * columns <= count
    assert fitting(grid, rows * columns) == (rows, columns)  # so that a stated count is its own answer
    assert math.prod(fitting(grid, count + 1)) >= rows * columns
    assert fitting(grid, grid[0] * grid[1]) == grid


def test_aspect_ratios_stay_near() -> None:
    assert [fitting((14, 14), count) for count in (195, 180, 157, 97, 50, 5, 1)] == [
        (13, 14),
        (13, 13),
        (12, 13),
        (9, 10),
        (7, 7),
        (2, 2),
        (1, 1),
    ]
    assert fitting((7, 14), 50) == (5, 10) and divided((7, 5), 2) == (4, 3)


def test_protected_tokens_keep_their_place_among_rows_and_columns() -> None:
    assert protected_positions((98,), (14, 14), (13, 13)) == (78,)  # after 6 rows of 13, of the 6.5 the lower
    assert protected_positions((98,), (14, 14), (12, 10)) == (60,)
    assert protected_positions((0,), (14, 14), (10, 10)) == (0,)
    assert protected_positions((0, 197), (14, 14), (10, 10)) == (0, 101)
    assert protected_positions((6, 14), (4, 4), (4, 2)) == (3, 7)  # 1 row and half of one go first; then 3 and a token
    assert protected_positions((1, 2, 5), (4, 4), (1, 1)) == (0, 1, 3)  # never in another order


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.data())
def test_protected_tokens_stay_in_order(grid: tuple[int, int], data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, math.prod(grid)), max_size=4)))
    goal = data.draw(st.tuples(st.integers(1, grid[0]), st.integers(1, grid[1])))
    protected = tuple(place + number for number, place in enumerate(places))
    found = protected_positions(protected, grid, goal)
    assert list(found) == sorted(set(found)) and all(0 <= place < math.prod(goal) + len(found) for place in found)
    assert protected_positions(protected, grid, grid) == protected


def test_gaps_lie_between_the_centres_of_tokens_on_every_route() -> None:
    size = torch.tensor([[1.0, 2, 4, 1, 0.5, 0.5]])
    assert gaps_by_size(size).tolist() == [[0, 0.5, 2, 1.5, 0, 0]]
    values = torch.tensor([[1.0, 0], [0, 1], [0, 2], [1, 1], [3, 3], [1, 1], [0, 1], [2, 0]])[None]
    three = merge(TokenSequence.dense(values, grid=(2, 4)), 6)  # sizes 1 2 1 over 2 1 1
    down = visits(torch.tensor([0, 3, 1, 4, 2, 5]), three)  # sizes 1 2 2 1 1 1
    assert down.gap is not None and down.gap.tolist() == [[0, 0.5, 1, 0.5, 0, 0]]
    assert visits(torch.arange(8), TokenSequence.dense(values, grid=(2, 4))).gap is None


STAGES = (Stage(0, 1, (16, 12)), Stage(1, 4, (8, 6), stride=2), Stage(4, 6, (4, 3), stride=2))


def test_a_schedule_states_the_grids_and_later_stages_follow() -> None:
    schedule = PruneSchedule.resolve(STAGES, points=[1, 3], tokens=[151, 36], rectangular=True)
    assert schedule == PruneSchedule((1, 3), (150, 35), ((15, 10), (7, 5)))
    assert schedule.grids_per_block(STAGES) == ((16, 12), (8, 5), (8, 5), (7, 5), (4, 3), (4, 3))
    assert schedule.tokens_per_block(STAGES) == (192, 40, 40, 35, 12, 12)
    assert list(schedule.blocks_after_points(STAGES)) == [1, 2, 3, 4, 5]
    kept = PruneSchedule.resolve(STAGES, points=[1, 2, 5], keep=0.7, rectangular=True)
    assert kept == PruneSchedule((1, 2, 5), (130, 24, 4), ((13, 10), (6, 4), (2, 2)))
    with pytest.raises(UsageError, match="cannot keep 41 of 40"):
        PruneSchedule.resolve(STAGES, points=[1, 3], tokens=[150, 41], rectangular=True)
    with pytest.raises(UsageError, match="a stage ends"):
        PruneSchedule.resolve(STAGES, points=[1, 3], tokens=[150, 30])


def test_progressive_counts_are_those_of_grids() -> None:
    last = PruneSchedule.resolve(STAGES, points=[1, 3], tokens=[140, 20], rectangular=True)
    found = [ProgressiveSchedule(last, STAGES, 3).at(epoch) for epoch in range(3)]
    assert [each.grids for each in found] == [((15, 11), (7, 5)), ((14, 11), (5, 5)), ((14, 10), (5, 4))]
    assert found[-1] == last


def test_a_schedule_without_grids_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves whole grids, and the schedule has none"):
        PruneSettings(PruneSchedule((1,), (4,)), reduction="grid-merge")
    with pytest.raises(UsageError, match="leaves no whole grids, and the schedule has some"):
        PruneSettings(PruneSchedule((1,), (4,), ((2, 2),)), reduction="drop")


MODELS: dict[str, Any] = {
    "vim": VimConfig(image_size=(24, 32), patch_size=4, stride=4, embed_dim=16, depth=4, num_classes=5),
    "vim rope": VimConfig(
        image_size=(24, 32), patch_size=4, stride=4, embed_dim=16, depth=4, num_classes=5, class_token="head", rope=True
    ),
    "vim mean": VimConfig(
        image_size=(24, 32), patch_size=4, stride=4, embed_dim=16, depth=4, num_classes=5, class_token="none"
    ),
    "plainmamba": PlainMambaConfig(
        image_size=(24, 32), patch_size=4, embed_dim=16, depth=4, num_classes=5, d_state=4, dw_layers=(3,), d_conv=3
    ),
    "vmamba": VMambaConfig(image_size=(44, 36), embed_dim=16, depths=(1, 2, 1), num_classes=5, out_stages=(0, 1, 2)),
    "vmamba v0": VMambaConfig(
        image_size=(44, 36),
        embed_dim=16,
        depths=(1, 2, 1),
        num_classes=5,
        patch_embed="v1",
        downsample="v1",
        d_state=2,
        gated=True,
        conv_bias=True,
        mlp_ratio=0.0,
    ),
}
POINTS = {"vim": ((1, 3), (35, 20)), "plainmamba": ((1, 3), (35, 20)), "vmamba": ((1, 2), (63, 15))}


def make(name: str, dtype: torch.dtype = torch.float64) -> Backbone:
    torch.manual_seed(0)
    kind: Any = {"vim": Vim, "plainmamba": PlainMamba, "vmamba": VMamba}[name.split()[0]]
    model: Any = kind(MODELS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the authors' start is so near to zero that mistakes would not show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    result: Backbone = model.to(dtype)
    return result


def images(model: Backbone, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *model.image_size, generator=generator).to(model.dtype)


def merged(name: str, alignment: str = "none", dtype: torch.dtype = torch.float64) -> Backbone:
    model = make(name, dtype)
    points, tokens = POINTS[name.split()[0]]
    compress(model, tokens=tokens, points=points, reduction="grid-merge", alignment=alignment)
    return model


def by_hand(name: str, batch: Tensor) -> Tensor:
    """What a merged model computes, image by image: plain blocks on plain dense grids, which slow loops made."""
    model = make(name)
    points, _ = POINTS[name.split()[0]]
    schedule = merged(name).pruner.settings.schedule  # type: ignore[union-attr]
    goals = dict(zip(points, schedule.grids, strict=True))
    found = []
    for image in batch.split(1):
        way = _vmamba_by_hand if isinstance(model, VMamba) else _plainmamba_by_hand
        found.append(way(model, image, goals))
    return torch.cat(found)


def _plainmamba_by_hand(model: Any, image: Tensor, goals: dict[int, tuple[int, int]]) -> Tensor:
    grid = model.grid
    (x, _), size = model.backbone(image), torch.ones(math.prod(grid), dtype=torch.float64)
    for block, layer in enumerate(model.backbone.layers):
        x = layer(TokenSequence.dense(x, grid=grid), None, "nothing")[0].hidden
        if block + 1 in goals:
            x, size = _planned(x, x, size, grid, goals[block + 1])
            grid = goals[block + 1]
    values = model.backbone.ln1(x)
    result: Tensor = model.head["fc"]((values * size[:, None]).sum(dim=1) / size.sum())
    return result


def _vmamba_by_hand(model: Any, image: Tensor, goals: dict[int, tuple[int, int]]) -> Tensor:
    x, block, dense = model.patch_embed(image), 0, model.grid
    size = torch.ones(*model.grid, dtype=torch.float64)
    for layer in model.layers:
        for each in layer.blocks:
            grid = (x.shape[1], x.shape[2])
            x = each(TokenSequence.dense(x.flatten(1, 2), grid=grid), None, "nothing")[0].hidden.unflatten(1, grid)
            block += 1
            if block in goals:
                flat = x.flatten(1, 2)
                small, sizes = _planned(flat, flat, size.flatten(), grid, goals[block])
                x, size = small.unflatten(1, goals[block]), sizes.view(goals[block])
        if layer.downsample is not None:
            x, dense = layer.downsample(x), divided(dense, 2)
            rows, columns = x.shape[1:3]
            squares = [[size[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] for c in range(columns)] for r in range(rows)]
            size = torch.stack([torch.stack([square.mean() for square in row]) for row in squares])
            size = size * math.prod(dense) / size.sum()
    values = model.classifier["norm"](x)
    result: Tensor = model.classifier["head"]((values * size[..., None]).sum(dim=(1, 2)) / size.sum())
    return result


@pytest.mark.parametrize("name", ["plainmamba", "vmamba", "vmamba v0"])
def test_blocks_run_on_the_smaller_grid_as_on_any(name: str) -> None:
    model = merged(name)
    batch = images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), by_hand(name, batch), rtol=0, atol=1e-6)  # sizes are in float32


def test_vim_blocks_run_on_the_smaller_grid_with_the_class_token_at_its_share() -> None:
    model, dense = merged("vim"), make("vim")
    assert isinstance(dense, Vim)
    residual: Any
    batch, grid, goals = images(model, 1), (6, 8), {1: (5, 7), 3: (4, 5)}
    sequence = dense.embed(batch)
    hidden, residual, place = sequence.hidden, sequence.residual, 24
    size = torch.ones(48, dtype=torch.float64)
    with torch.no_grad():
        for block, layer in enumerate(dense.layers):
            after, _ = layer(replace(TokenSequence.dense(hidden, (place,)), residual=residual), None, "nothing")
            hidden, residual = after.hidden, after.residual
            if block + 1 in goals:
                keep, goal = [i for i in range(hidden.shape[1]) if i != place], goals[block + 1]
                stream = (hidden + residual)[:, keep]
                both = torch.cat((hidden[:, keep], residual[:, keep]), dim=2)
                plan, size = _planned(stream, both, size, grid, goal)
                own = torch.cat((hidden[:, place], residual[:, place]), dim=1)[:, None]
                place, grid = goal[0] // 2 * goal[1], goal  # between two rows
                whole = torch.cat((plan[:, :place], own, plan[:, place:]), dim=1)
                hidden, residual = whole.chunk(2, dim=2)
        expected = dense.head(dense.norm_f(hidden[:, place] + residual[:, place]))
        torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-6)


def _planned(
    stream: Tensor, values: Tensor, size: Tensor, grid: tuple[int, int], goal: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`values` (1, n, c) averaged as slow loops merge their `stream`, by size (n,); and the sizes after it."""
    places = torch.arange(math.prod(grid)).view(grid).tolist()
    rows = [[(stream[0, place], float(size[place]), [place]) for place in row] for row in places]
    across = [slow_line(row, goal[1]) for row in rows]
    columns = [slow_line([row[c] for row in across], goal[0]) for c in range(goal[1])]
    cells = [column[r] for r in range(goal[0]) for column in columns]
    means = [(values[0, own] * size[own, None]).sum(dim=0) / size[own].sum() for _, _, own in cells]
    return torch.stack(means)[None], torch.tensor([cell[1] for cell in cells]).double()


@pytest.mark.parametrize("name", MODELS)
def test_one_is_dense_and_samples_are_independent(name: str) -> None:
    dense, model = make(name), merged(name, "null")
    batch = images(model, 3)
    with torch.no_grad():
        logits = model(batch)
        for row in range(3):
            torch.testing.assert_close(model(batch[row : row + 1])[0], logits[row], rtol=0, atol=1e-10)
        expected = dense(batch)
        assert (logits - expected).abs().max() > 1e-4
        compress(dense, 1.0, reduction="grid-merge", alignment="null", points=[2])
        assert torch.equal(dense(batch), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("alignment", ["none", "null", "calibrated", "mass"])
def test_a_session_equals_the_model(name: str, alignment: str) -> None:
    model = make(name, torch.float32)
    points, tokens = POINTS[name.split()[0]]
    batch = images(model, 3)
    compress(model, tokens=tokens, points=points, reduction="grid-merge", alignment=alignment, calibration=batch)
    session = prepare(model)
    with torch.no_grad():
        torch.testing.assert_close(session(batch), model(batch), rtol=1e-4, atol=2e-5)
    if alignment != "mass" and "rope" not in name:
        how = "one call" if name == "vim" or name == "vim mean" else "the scans of each block in one call"
        assert {step.how for step in session.explain().steps} == {how}


@pytest.mark.parametrize("name", MODELS)
def test_torch_export_traces_it(name: str) -> None:
    model = merged(name, "null", torch.float32)
    first = images(model)
    with torch.no_grad():
        exported = torch.export.export(model, (first,)).module()
        other = first.flip(0) * 0.5
        torch.testing.assert_close(exported(other), model(other), rtol=0, atol=1e-5)


def test_feature_maps_have_every_place_of_the_dense_grid() -> None:
    model = merged("vmamba")
    assert isinstance(model, VMamba)
    batch = images(model)
    assert tokens_per_block(model) == (99, 20, 15, 6)
    with torch.no_grad():
        maps = model.feature_maps(batch)
        wholes = list(model._stages(batch))
    assert [tuple(each.shape[2:]) for each in maps] == [(11, 9), (6, 5), (3, 3)]
    assert [whole.patch_grid for whole in wholes] == [(9, 7), (5, 3), (3, 2)]
    for whole, dense in zip(wholes, ((11, 9), (6, 5), (3, 3)), strict=True):
        assert whole.sizes().sum(dim=1) == pytest.approx([math.prod(dense)] * 2, rel=1e-5)
    first, second = wholes[0], wholes[1]
    assert first.merged is not None and second.merged is not None
    norm: Any = model.outnorm0
    for row in range(11):
        for column in range(9):
            token = first.merged.owner[:, row * 9 + column]
            value = norm(first.hidden[torch.arange(2), token])
            torch.testing.assert_close(maps[0][:, :, row, column], value)
    plain = merged("plainmamba")
    assert isinstance(plain, PlainMamba)
    with torch.no_grad():
        (found,) = plain.feature_maps(images(plain))
        last = plain.features(images(plain))
    assert found.shape == (2, 16, 6, 8) and last.merged is not None
    torch.testing.assert_close(
        found.flatten(2).transpose(1, 2), last.spread(plain.backbone.ln1(last.hidden)), rtol=0, atol=0
    )


def test_places_of_a_downsampled_grid_go_with_the_first_of_their_square() -> None:
    dense = TokenSequence.dense(torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0)), grid=(5, 6))
    small = merge(dense, 16)
    assert small.grid == (4, 4) and small.merged is not None
    half = small.merged.divided((4, 4), 2)
    assert half.grid == (3, 3)
    for row in range(3):
        for column in range(3):
            above = int(small.merged.owner[0, 12 * row + 2 * column])
            assert int(half.owner[0, 3 * row + column]) == above // 4 // 2 * 2 + above % 4 // 2


@pytest.mark.parametrize("name", ["vim", "plainmamba", "vmamba"])
def test_an_artefact_gives_the_same_model_and_its_pictures(name: str, tmp_path: Path) -> None:
    model = merged(name, "null", torch.float32)
    save(tmp_path / "small", model, {})
    again = load(tmp_path / "small")
    batch = images(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(batch), model(batch))
    assert isinstance(again.pruner, TokenPruner) and again.pruner.settings == model.pruner.settings  # type: ignore[union-attr]
    drawn, _ = stages(model, batch)
    assert [each.block for each in drawn] == list(POINTS[name][0])
    assert drawn[0].count == POINTS[name][1][0]
    wrong = again.pruner.settings.to_dict()
    wrong["schedule"]["grids"] = [[7, 5], [4, 5]] if name != "vmamba" else [[7, 9], [5, 3]]
    fresh = FAMILIES.get(name.split()[0]).build(MODELS[name])
    with pytest.raises(CheckpointError, match=r"grids .* are not those"):
        attach(fresh, wrong)


def test_gradients_flow_to_every_pixel() -> None:
    for name in ("vim", "plainmamba", "vmamba"):
        model = merged(name, "mass")
        batch = images(model).requires_grad_()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model(batch), torch.arange(2)), batch)
        assert gradient.isfinite().all() and (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_early_layouts_begin_at_the_ends_of_stages() -> None:
    assert (1, 2) in layouts(STAGES, rectangular=True) and (1, 2) not in layouts(STAGES)


def test_a_repair_has_no_mean_of_tokens_since_none_is_lost() -> None:
    model = merged("vmamba", dtype=torch.float32)
    assert isinstance(model.pruner, TokenPruner) and model.pruner.dropping_points == () and model.pruner.drops
    found = repair(model, images(model, 64))
    assert found.kind == "head" or set(found.refused) == {"head"}
    asked = repair(model, images(model, 64), kind="head+side")
    assert asked.kind == "none" and "merges tokens and loses none" in asked.refused["head+side"]


@pytest.mark.parametrize("points", [(1, 2), (1,), (3,)])
def test_the_head_of_a_repair_is_heard_whatever_stage_merged(points: tuple[int, ...]) -> None:
    """The model has stages of 1, 2 and 1 blocks."""
    model = make("vmamba")
    compress(model, 0.5, points=points, reduction="grid-merge")
    assert isinstance(model.pruner, TokenPruner)
    with torch.no_grad():
        before = model(images(model))
        weight, bias = model.output_layer.weight, model.output_layer.bias
        model.pruner.correct(Correction((2 * weight, 2 * bias + 1), {}))
        torch.testing.assert_close(model(images(model)), 2 * before + 1)
        torch.testing.assert_close(prepare(model)(images(model)), 2 * before + 1)
