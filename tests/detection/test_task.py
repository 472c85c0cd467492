"""The task detection: what fits it, what it keeps of answers, how models are compared, pictures and words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssmprune_cli import load
from ssmprune_cli.data import Annotation, ImageDataset, Objects, batches, open_dataset
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Detections, Detector
from ssmprune_cli.preprocessing import Frame
from ssmprune_cli.pruning import compress
from ssmprune_cli.report import DetectionFacts
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.tasks.average_precision import Found
from ssmprune_cli.tasks.detection import GRID, Detection, Seen
from ssmprune_cli.tasks.outlined import covered, outlined
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.limits import Limits
from tests.detection.conftest import container, read, write_coco

TASK = TASKS.get("detection")
NAMES = tuple(f"thing {number}" for number in range(80))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    path = container(read("vmamba_maskrcnn_mini"), tmp_path_factory.mktemp("detector") / "epoch_12.pth")
    found = load(path, image_size=64)
    assert isinstance(found, Detector)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    dataset: ImageDataset = open_dataset("coco", write_coco(tmp_path_factory.mktemp("coco"), images=4, names=NAMES))
    return dataset


class Pictures(ImageDataset):
    """Images of 60 x 40 pixels with these targets."""

    def __init__(self, targets: list[object], names: tuple[str, ...] = NAMES) -> None:
        self.targets, self.names = targets, names

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (60, 40), (index, 90, 200))

    def target(self, index: int) -> object:
        return self.targets[index]

    def name(self, index: int) -> str:
        return f"picture {index}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names


def objects(*annotations: Annotation, size: tuple[int, int] = (40, 60)) -> Objects:
    return Objects(1, size, tuple(range(80)), annotations)


THING = Annotation(3, (4.0, 4.0, 20.0, 20.0), 400.0, False, None)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Pictures([3, 4]), "have no lists of objects"),
        (Pictures([np.zeros((40, 60), np.uint8)]), "have no lists of objects"),
        (Pictures([objects(THING)], NAMES[:7]), "the images have 7 classes, the model has 80"),
        (Pictures([objects(THING)], NAMES[::-1]), "by their ids class 0 is 'thing 79', and the model's is 'thing 0'"),
        (Pictures([objects(replace(THING, crowd=True))]), "no image has an object"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(model: Detector, dataset: ImageDataset, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TASK.check(model, dataset)


def test_a_list_of_another_image_is_refused(model: Detector) -> None:
    dataset = Pictures([objects(THING, size=(60, 40))])
    with pytest.raises(DataError, match="has 60 x 40 pixels, and its list of objects says 40 x 60"):
        evaluate(model, dataset)


def test_other_datasets_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no dataset 'imagenet' for detection"):
        TASK.open(tmp_path, "imagenet")
    with pytest.raises(UsageError, match="no dataset 'coco' for classification"):
        TASKS.get("classification").open(tmp_path, "coco")


def test_evaluation_of_two_models_on_images_of_two_sizes(model: Detector, data: ImageDataset) -> None:
    """What a file of results holds is what the model detects; boxes are in the image, masks of its size."""
    (batch, *_) = batches(data, model.preprocessing, 1)
    (expected,) = model.read(prepare(model)(batch.images), batch.frames)
    pruned = prepare(model).definition
    assert isinstance(pruned, Detector)
    compress(pruned, 0.5, points=[3], alignment="null")
    found = evaluate(pruned, data, compare=model)
    facts = found.comparison
    assert isinstance(facts, DetectionFacts) and facts.count == 4
    assert facts.difference == facts.boxes.ap - facts.dense.boxes.ap
    assert facts.difference_interval is not None and facts.masks is not None and facts.dense.masks is not None
    low, high = facts.difference_interval
    assert low <= facts.difference <= high
    assert [each.name for each in facts.classes] == ["thing 0", "thing 1", "thing 2", "thing 3", "thing 4"]
    assert sum(each.objects for each in facts.classes) == 8
    alone = evaluate(model, data)
    assert alone.images is data and alone.score == facts.dense
    rows = json.loads(TASK.predictions(alone.results, data))
    first = [row for row in rows if row["image_id"] == 1]
    assert [row["score"] for row in first] == expected.scores.tolist()
    corners = [[x, y, x + width, y + height] for x, y, width, height in (row["bbox"] for row in first)]
    torch.testing.assert_close(torch.tensor(corners), expected.boxes, rtol=0, atol=1e-4)
    assert {tuple(row["segmentation"]["size"]) for row in rows} == {(40, 60), (60, 40)}
    titles = [row.title for row in TASK.rows(facts)]
    assert titles[0] == "box AP on 4 images (95 % interval)" and "mask AP50" in titles
    assert TASK.table([alone.score])[0][0] == "box AP (%)"


def test_one_image_has_no_interval(model: Detector) -> None:
    found = evaluate(model, Pictures([objects(THING)]))
    assert found.score.interval is None and found.score.masks is None and found.score.boxes.ap_large is None


def test_limits_are_in_points_of_box_ap(model: Detector, data: ImageDataset) -> None:
    found = evaluate(model, data, compare=model)
    (limit,) = Limits(max_drop=1.0).check(TASK, score=found.score, comparison=found.comparison)
    assert limit.holds and limit.statement.startswith("box AP fell by 0.00 points (95 % interval 0.00 to 0.00")
    with pytest.raises(UsageError, match="--min-accuracy"):
        Limits(min_accuracy=50.0).fit(TASK)


def test_a_level_that_is_not_finite_is_seen(model: Detector) -> None:
    levels = tuple(torch.zeros(2, 3, 4, 4) for _ in range(5))
    levels[2][1, 0, 0, 0] = torch.inf
    assert TASK.finite(Seen(levels, model)).tolist() == [True, False]


def test_models_are_compared_level_by_level_at_places_all_over() -> None:
    """Every level counts alike, whatever its size and its values are."""
    made = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 4, side, side + 3, generator=made) * side**3 for side in (32, 16, 9, 5, 3)]
    sample = TASK.sample(tuple(levels))
    assert sample.shape == (2, 4, 4, GRID, GRID)
    assert TASK.sample(tuple(level[:, :, :-1] for level in levels)).shape == sample.shape
    worse = [1.5 * level if number == 1 else level for number, level in enumerate(levels)]
    torch.testing.assert_close(
        TASK.divergence(sample, TASK.sample(tuple(worse))), torch.full((2,), 0.25 / 4).double(), rtol=1e-5, atol=0
    )
    assert TASK.differ(sample, TASK.sample(tuple(worse))).all() and not TASK.differ(sample, sample).any()


def found(*things: tuple[tuple[float, ...], float, int]) -> Found:
    boxes, scores, labels = ([each[part] for each in things] for part in range(3))
    return Found(tuple(boxes), tuple(scores), tuple(labels), ("",) * len(things))  # type: ignore[arg-type]


def test_answers_change_with_sure_objects_alone() -> None:
    box, near, far = (0.0, 0.0, 10.0, 10.0), (1.0, 0.0, 10.0, 10.0), (6.0, 0.0, 10.0, 10.0)
    dense = [found((box, 0.9, 1))] * 5
    pruned = [
        found((near, 0.8, 1)),  # the same object
        found((far, 0.8, 1)),  # another place
        found((near, 0.8, 2)),  # another class
        found(),
        found((box, 0.9, 1), (far, 0.3, 2)),  # one more, of which it is not sure
    ]
    assert TASK.changed(pruned, dense) == [1, 2, 3]


def detections(*things: tuple[list[float], float, int]) -> Detections:
    masks = torch.zeros(len(things), 20, 30, dtype=torch.bool)
    for mask, (box, _, _) in zip(masks, things, strict=True):
        left, top, right, bottom = map(int, box)
        mask[top:bottom, left:right] = True
    boxes, scores, labels = ([each[part] for each in things] for part in range(3))
    return Detections(torch.tensor(boxes).view(-1, 4), torch.tensor(scores), torch.tensor(labels).long(), masks)


def test_objects_are_drawn_the_best_on_top() -> None:
    both = detections(([2.0, 2, 12, 12], 0.9, 0), ([8.0, 8, 28, 18], 0.6, 1))
    classes = covered(both)
    assert (classes[3, 3], classes[10, 10], classes[15, 20], classes[0, 29]) == (1, 1, 2, 0)
    image = np.full((20, 30, 3), 128, np.uint8)
    picture = np.asarray(outlined(image, both, ["cat"]))
    assert (picture[0, 29] == 128).all() and (picture[17, 26] != 128).any() and (picture[18, 28] != 128).any()
    assert (np.asarray(outlined(image, detections(), [])) == image).all()


class Answering(Detector):
    """Detects what it is told to."""

    def __init__(self, answer: Detections) -> None:
        torch.nn.Module.__init__(self)
        self.answer = answer

    def read(self, levels: Any, frames: Any) -> list[Detections]:
        assert frames == [Frame((20, 30), (64, 96))]
        return [self.answer]

    @property
    def class_names(self) -> tuple[str, ...]:
        return ("cat", "dog")


def test_pictures_of_two_models_show_sure_objects() -> None:
    dense = detections(([2.0, 2, 12, 12], 0.9, 0), ([8.0, 8, 28, 18], 0.6, 1))
    pruned = detections(([2.0, 2, 12, 12], 0.8, 0), ([8.0, 8, 28, 18], 0.4, 1))
    one, two = (Seen((torch.zeros(1),), Answering(each)) for each in (dense, pruned))
    drawing = Detection().drawn(Image.new("RGB", (30, 20)), (Frame((200, 300), (64, 96)),) * 2, one, two)
    assert drawing.words == "objects of the dense model: 2; of the pruned one: 1, 1 of them in the same places"
    assert list(drawing.pictures) == ["dense", "pruned", "differs"]
    differs = np.asarray(drawing.pictures["differs"])
    assert tuple(differs[15, 20]) != tuple(differs[5, 5])  # red where the dog has gone


def test_outputs_of_a_batch_are_divided_by_image(model: Detector) -> None:
    images: Tensor = torch.zeros(2, 3, 64, 96)
    both = TASK.answer(model, images)
    assert TASK.told(both) == [None, None]
    second = TASK.one(both, 1)
    assert all(torch.equal(*pair) for pair in zip(second.levels, (level[1:] for level in both.levels), strict=True))
    assert TASK.answer(prepare(model), images).detector is not model
