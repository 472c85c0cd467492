"""Reductions at equal time: which are compared, how hard they prune, which is the best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import PruneSchedule, compress, divergence, restore
from ssmprune_cli.workflows.compress.reductions import CANDIDATES, compare_reductions
from ssmprune_cli.workflows.measure import count_flops
from ssmprune_cli.workflows.trials import Measurements

pytestmark = pytest.mark.usefixtures("without_noise")


@pytest.fixture(scope="module")
def model() -> Backbone:
    torch.manual_seed(0)
    return Vim(VimConfig(image_size=(32, 32), patch_size=4, stride=4, embed_dim=16, depth=8, num_classes=10)).eval()


def test_all_take_the_time_of_dropping_and_the_nearest_comes_first(model: Backbone) -> None:
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    schedule = PruneSchedule.resolve(model.stages, keep=(0.6, 0.8, 1.0))
    choices = compare_reductions(
        model, schedule, images, importance="clip", alignment="auto", batch_size=8, device="cpu"
    )
    assert {each.method.reduction for each in choices} == set(CANDIDATES)
    (drop,) = (each for each in choices if each.method.reduction == "drop")
    assert drop.method.alignment == "calibrated" and drop.schedule.points == schedule.points
    measurements = Measurements(model, images, calibration=6)
    costs = {
        each.method.reduction: measurements.multiply_adds(each.method.settings(each.schedule, 0)) for each in choices
    }
    for choice in choices:  # here time is multiply-adds; token counts are whole numbers
        assert costs[choice.method.reduction] == pytest.approx(costs["drop"], rel=0.06), choice
        first, second, third = choice.schedule.tokens
        assert first > second == third, "pruned in proportion to what was asked"
    settings = [each.method.settings(each.schedule, 0) for each in choices]
    distances = [float(measurements.distances(each, range(6)).soft.mean()) for each in settings]
    assert distances == sorted(distances)
    assert count_flops(model).all_directions > costs["drop"] and model.pruner is None


def test_fewer_images_are_taken_where_one_takes_long(model: Backbone) -> None:
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    schedule, told = PruneSchedule.resolve(model.stages, keep=0.8), list[tuple[int, int]]()
    choices = compare_reductions(
        model, schedule, images, candidates=("drop", "context"), importance="clip", alignment="auto", batch_size=8,
        device="cpu", seconds=1e-9, progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert told == [(0, 2), (1, 2)] and {each.images for each in choices} == {4}
    few = Measurements(model, images[:4], calibration=4)
    for choice in choices:
        nats = few.distances(choice.method.settings(choice.schedule, 0), range(4)).nats
        assert choice.divergence == pytest.approx(float(nats.mean()), rel=1e-6)


def test_an_alignment_leaves_those_that_it_fits(model: Backbone, tmp_path: Path) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    schedule = PruneSchedule.resolve(model.stages, keep=0.8)

    def reductions(alignment: str) -> set[str]:
        choices = compare_reductions(
            model, schedule, images, importance="clip", alignment=alignment, batch_size=8, device="cpu"
        )
        return {each.method.reduction for each in choices}

    assert reductions("mass") == {"local-merge", "pool", "frozen-pairs", "grid-merge"}
    with pytest.raises(UsageError, match="unknown alignment"):
        reductions("nonsense")


def test_a_resized_model_is_compared_with_the_dense_one_that_it_was(model: Backbone) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    schedule = PruneSchedule.resolve(model.stages, keep=0.8)
    dense = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)).double()
    choices = compare_reductions(
        model, schedule, images, importance="clip", alignment="none", batch_size=8, device="cpu", dense=dense
    )
    for choice in choices:
        compress(model, tokens=choice.schedule.tokens, reduction=choice.method.reduction, alignment="none")
        with torch.no_grad():
            expected = divergence(dense, model(images).double()).mean()
        restore(model)
        assert choice.divergence == pytest.approx(float(expected), rel=1e-4)
