"""What `ssmprune compare` holds in memory: logits of all images, and images only where they are few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from ssmprune_cli.checkpoint import load
from ssmprune_cli.data import Batch, ImageDataset, batches, open_dataset
from ssmprune_cli.errors import UsageError
from ssmprune_cli.inference import Session, prepare
from ssmprune_cli.models import resize
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import PruneSchedule
from ssmprune_cli.pruning.divergence import divergence
from ssmprune_cli.pruning.method import Method
from ssmprune_cli.recipe import Pruning, Recipe
from ssmprune_cli.workflows import compare as workflow
from ssmprune_cli.workflows.compare import Comparison
from ssmprune_cli.workflows.measure import Speed, count_flops
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget, measure
from ssmprune_cli.workflows.trials import clock as clocks

CHECKPOINT = Path(__file__).parent / "golden" / "containers" / "vim_like.pth"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(10))
    dataset: ImageDataset = open_dataset("npz", path)
    return dataset


def test_labels_of_other_classes_are_no_accuracy(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.array([0, 1, 2, 99]))
    images = open_dataset("npz", tmp_path / "images.npz")
    (row,), notes = workflow.compare(Source(CHECKPOINT), images, [], [], rounds=1)
    assert row.metric is None and row.divergence == 0
    assert notes == ["Accuracy is left out: has the label 99, and the model has 10 classes (0 to 9)."]


@pytest.mark.parametrize("few", [True, False])
def test_many_images_are_read_anew_for_each_model_and_few_are_kept(
    dataset: ImageDataset, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(images: ImageDataset, preprocessing: Preprocessing, batch_size: int) -> Iterator[Batch]:
        for batch in batches(images, preprocessing, batch_size):
            sizes.append(len(batch.images))
            yield batch

    def compared() -> list[float | None]:
        comparison = Comparison(Source(CHECKPOINT), dataset, limit=None, batch_size=4, device="cpu", rounds=1)
        settings = Method("clip", "drop", "none").settings(PruneSchedule((1,), (5,)), 0)
        rows = [comparison.dense(), comparison.pruned("drop", "", settings, None)]
        assert rows[0].speedup == 1.0  # a model is as fast as itself
        for row in rows:  # one statistic for a row
            assert row.images_per_second == pytest.approx(rows[0].images_per_second * row.speedup)
        assert comparison.model.pruner is None and len(comparison.images) == 10
        return [number for row in rows for number in (row.divergence, row.metric, row.share)]

    expected = compared()
    monkeypatch.setattr(measure, "batches", counted)
    if not few:
        monkeypatch.setattr(workflow, "KEPT_BYTES", 9 * 4 * 3 * 64 * 64)
    assert compared() == expected
    assert sizes == [4, 4, 2] * (1 if few else 2)


@pytest.mark.parametrize("kind", ["keep", "flops", "time"])
def test_a_smaller_image_stands_beside_the_methods_at_equal_cost(
    dataset: ImageDataset, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def speeds(models: Sequence[Session], images: Tensor | Sequence[Tensor], rounds: int, **_: int) -> list[Speed]:
        """As many ms as there are pixels in a row."""
        given = [images] * len(models) if isinstance(images, Tensor) else images
        times = [float(each.shape[3]) for each in given]
        return [Speed(each, (each, each), 1e3 * len(given[0]) / each, rounds, (each,)) for each in times]

    for module in (workflow, clocks):
        monkeypatch.setattr(module, "interleaved_speeds", speeds)
    budget = {"keep": Budget("keep", 0.7), "flops": Budget("flops", 0.6), "time": Budget("time", 0.8)}[kind]
    rows, notes = workflow.compare(
        Source(CHECKPOINT), dataset, [Method("clip", "drop", "none")], [budget], batch_size=5, rounds=1
    )
    cut = [row for row in rows if row.name.startswith("cut short")]
    dense, *methods, smaller = [row for row in rows if row not in cut]
    if kind == "time":  # where all take as long, no schedule is quicker, and no model of fewer blocks
        assert not cut
    else:
        (row,) = cut
        assert notes == [f"The head of the model {row.name} is not refitted: there are no calibration images."]
        assert row.image_size == (64, 64) and row.points == row.tokens == () and row.divergence and row.divergence > 0
    assert (smaller.name, smaller.resized_from) == ("smaller image", (64, 64)) and dense.resized_from is None
    costs = {side: count_flops(resize(load(CHECKPOINT), side)).all_directions for side in (56, 48, 40, 32)}
    allowed = methods[0].multiply_adds if kind == "keep" else 0.6 * dense.multiply_adds
    side = 48 if kind == "time" else next(side for side, cost in costs.items() if cost <= allowed)
    assert smaller.image_size == (side, side) and smaller.multiply_adds == costs[side]
    assert smaller.speedup == pytest.approx(64 / side)
    model = prepare(load(CHECKPOINT, image_size=side))
    (batch,) = batches(dataset, resize(load(CHECKPOINT), side).preprocessing, 10)
    reference = prepare(load(CHECKPOINT))
    (own,) = batches(dataset, load(CHECKPOINT).preprocessing, 10)
    nats = divergence(reference(own.images).double(), model(batch.images).double())
    assert smaller.divergence == pytest.approx(float(nats.mean()), rel=1e-3)


def test_without_a_small_enough_image_a_note_says_so(dataset: ImageDataset) -> None:
    rows, notes = workflow.compare(
        Source(CHECKPOINT), dataset, [Method("clip", "drop", "none")], [Budget("flops", 0.2)], batch_size=5, rounds=1
    )
    assert all(row.resized_from is None for row in rows)
    assert "There is no smaller image for flops 0.2: half of 64 pixels costs more." in notes


def test_a_recipe_may_ask_for_smaller_images_and_fewer_tokens(dataset: ImageDataset, tmp_path: Path) -> None:
    asked = Pruning(image_size=56, keep=0.5, reduction="local-merge")
    recipes = [Recipe(name="both", pruning=asked), Recipe(name="image", pruning=Pruning(image_size=56))]
    pixels = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "calib.npz", images=pixels)
    (_, both, image), _ = workflow.compare(
        Source(CHECKPOINT), dataset, [], [], recipes=recipes, calib=tmp_path / "calib.npz", batch_size=5, rounds=1
    )
    assert both.image_size == image.image_size == (56, 56) and both.tokens == (25, 13, 7) and image.tokens == ()
    assert both.multiply_adds < image.multiply_adds
    assert both.divergence is not None and image.divergence is not None and both.divergence != image.divergence
    with pytest.raises(UsageError, match="no smaller side"):
        workflow.compare(
            Source(CHECKPOINT),
            dataset,
            [],
            [],
            recipes=[Recipe(pruning=Pruning(image_size=72))],
            batch_size=5,
            rounds=1,
        )


def test_recipes_in_eight_bits(dataset: ImageDataset, tmp_path: Path) -> None:
    """Alone, with dropped tokens and with fewer blocks, beside the same in float."""
    pixels = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "calib.npz", images=pixels)
    drop = Pruning(keep=0.5, reduction="drop", repair="head")
    recipes = [
        Recipe(name="only", pruning=Pruning(weights="int8")),
        Recipe(name="float", pruning=drop),
        Recipe(name="both", pruning=drop.model_copy(update={"weights": "int8", "int8": ("in_proj", "out_proj")})),
        Recipe(name="short", pruning=Pruning(weights="int8", cut_blocks=1)),
    ]
    rows, notes = workflow.compare(
        Source(CHECKPOINT), dataset, [], [], recipes=recipes, calib=tmp_path / "calib.npz", batch_size=5, rounds=1
    )
    found = {row.name: row for row in rows}
    assert found["vim_like.pth"].divergence == 0 < (found["only, int8"].divergence or 0)
    assert (found["only, int8"].divergence or 0) < (found["short, int8"].divergence or 0)
    in_float, both = found["float"], found["both, int8"]
    assert both.multiply_adds == in_float.multiply_adds and both.tokens == in_float.tokens
    assert both.divergence != in_float.divergence
    assert both.divergence == pytest.approx(in_float.divergence, rel=0.2), "bytes change less than dropped tokens"
    assert "`compress` would repair what both makes; here it is not repaired." in notes
