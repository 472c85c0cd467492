"""Segmentation as a task: figures by hand, against a plain reference, the authors' own, windows, intervals, words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from ssmprune_cli import load
from ssmprune_cli.data import Batch
from ssmprune_cli.data.ade20k import without_zero
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.data.preprocess import prepare_image
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import Frame, KeepRatio
from ssmprune_cli.report import ModelSegmentation, SegmentationFacts
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.tasks.bootstrap import RESAMPLES, interval
from ssmprune_cli.tasks.confusion import counted, resampled, shares
from ssmprune_cli.tasks.painted import colours, differing, painted
from ssmprune_cli.tasks.segmentation import GRID, Segmentation, classes_of, fitting
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.limits import Limits
from tests.test_evaluate import Reader

GOLDEN = Path(__file__).parent / "golden"
TASK = Segmentation()
Mask = NDArray[np.uint8]


def batch(masks: list[Mask], frames: list[Frame] | None = None) -> Batch:
    frames = frames or [Frame(mask.shape, mask.shape) for mask in masks]
    size = frames[0].scaled
    return Batch(torch.zeros(len(masks), 3, *size), tuple(masks), tuple(frames), tuple(map(str, range(len(masks)))))


def certain(classes: Mask, count: int) -> Tensor:
    """Logits (count, H, W) of a model that is certain of these."""
    return functional.one_hot(torch.from_numpy(classes).long(), count).permute(2, 0, 1).float()


class Pictures(ImageDataset):
    """Images whose red level is the mask's class, and what a `Reader` is to answer is in green."""

    def __init__(self, masks: list[Mask], answers: list[Mask], names: tuple[str, ...] = ()) -> None:
        self._masks, self._answers, self._names = masks, answers, names

    def __len__(self) -> int:
        return len(self._masks)

    def image(self, index: int) -> Image.Image:
        mask, answer = self._masks[index], self._answers[index]
        return Image.fromarray(np.stack([mask, answer, 0 * mask], axis=2))

    def target(self, index: int) -> Mask:
        return self._masks[index]

    def name(self, index: int) -> str:
        return f"image {index}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._names


def reader(channel: int, classes: int = 3) -> Reader:
    """A segmenter that answers the level of a channel, of images of 4 x 6 and 6 x 4 pixels."""

    def answer(images: Tensor) -> Tensor:
        said = (images[:, channel] * 255).round().long().clamp(max=classes - 1)
        return functional.one_hot(said, classes).permute(0, 3, 1, 2).float()

    model = Reader(answer, classes, KeepRatio(6, 4, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))  # type: ignore[arg-type]
    model.task = "segmentation"
    return model


def test_counts_and_shares_by_hand() -> None:
    """Ten pixels, one of them not judged. Class 3 is in neither mask nor answer, class 2 only in the answer."""
    mask = np.array([[0, 0, 0, 0, 0], [1, 1, 1, 1, 255]], np.uint8)
    answer = np.array([[0, 0, 0, 1, 2], [1, 1, 0, 0, 2]], np.uint8)
    (counts,) = TASK.results(certain(answer, 4)[None], batch([mask]))
    assert counts.dtype == np.int64
    assert counts.tolist() == [[3, 2, 0, 0], [5, 4, 0, 0], [5, 3, 1, 0]]
    found = shares(counts)
    assert found.iou[:3].tolist() == [3 / 7, 2 / 5, 0.0] and math.isnan(found.iou[3])
    assert found.accuracy[:2].tolist() == [3 / 5, 2 / 4] and np.isnan(found.accuracy[2:]).all()
    assert found.miou == pytest.approx((3 / 7 + 2 / 5 + 0) / 3) and found.aacc == pytest.approx(5 / 9)
    assert found.macc == pytest.approx((3 / 5 + 2 / 4) / 2)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(1, 5))
def test_figures_of_a_set_are_those_of_a_plain_reference(seed: int, classes: int, images: int) -> None:
    """One pixel at a time, over the whole set: counts are summed up before they are divided."""
    draw = np.random.default_rng(seed)
    masks = [draw.integers(0, classes, (5, 4)).astype(np.uint8) for _ in range(images)]
    for mask in masks:
        mask[draw.random(mask.shape) < 0.2] = 255
    answers = [draw.integers(0, classes, (5, 4)).astype(np.uint8) for _ in range(images)]
    both = zip(answers, masks, strict=True)
    counts = [counted(torch.from_numpy(answer), torch.from_numpy(mask), classes) for answer, mask in both]
    pairs = [
        (int(a), int(m))
        for answer, mask in zip(answers, masks, strict=True)
        for a, m in zip(answer.ravel(), mask.ravel(), strict=True)
        if m != 255
    ]
    ious, accuracies = [], []
    for each in range(classes):
        agree = sum(a == m == each for a, m in pairs)
        either = sum(each in pair for pair in pairs)
        truth = sum(m == each for _, m in pairs)
        ious += [agree / either] if either else []
        accuracies += [agree / truth] if truth else []
    found = shares(np.stack(counts).sum(axis=0))
    assert found.miou == pytest.approx(sum(ious) / len(ious), abs=1e-12)
    assert found.macc == pytest.approx(sum(accuracies) / len(accuracies), abs=1e-12)
    assert found.aacc == pytest.approx(sum(a == m for a, m in pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_authors_counts_and_shares(mode: str) -> None:
    """From a photograph's bytes to the figures of IoUMetric: resizing, model, both enlargements, windows.

    Counts are equal. Shares are theirs in float32.
    """
    folder = GOLDEN / "vmamba_upernet_mini"
    official = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    model = load(GOLDEN / "containers" / "vmamba_upernet_mmengine.pth")
    with Image.open(folder / "image.png") as image:
        prepared, frame = prepare_image(image, KeepRatio(*official["scale"]))
    assert float((prepared - load_file(folder / "io.safetensors")["input"][0]).abs().max()) < 1e-6
    task = TASK if mode == "whole" else TASK.sliding((64, 64), (43, 43))
    with torch.inference_mode():
        logits = task.answer(model, prepared[None])
    _check_official(logits, folder, frame, official["metrics"][mode])


def test_the_authors_counts_from_the_authors_logits() -> None:
    """PlainMamba: 75 x 131 pixels that were distorted to 96 x 160."""
    folder = GOLDEN / "plainmamba_upernet_mini"
    official = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    logits = load_file(folder / "io.safetensors")["logits_input_size"]
    _check_official(logits, folder, Frame((75, 131), (96, 160)), official["metrics"]["whole"])


def _check_official(logits: Tensor, folder: Path, frame: Frame, official: dict[str, Any]) -> None:
    with Image.open(folder / "annotation.png") as annotation:
        mask = without_zero(np.asarray(annotation))
    ((agree, truth, answer),) = TASK.results(logits, batch([mask], [frame]))
    assert agree.tolist() == official["intersect"] and truth.tolist() == official["label"]
    assert answer.tolist() == official["pred"] and (truth + answer - agree).tolist() == official["union"]
    found = shares(np.stack([agree, truth, answer]))
    for own, name in ((found.miou, "mIoU"), (found.aacc, "aAcc"), (found.macc, "mAcc")):
        assert float(own) == pytest.approx(official[name], abs=1e-7)


def test_classes_in_parts_are_those_of_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is left out, of equal logits the lower class is taken, and how many are enlarged at once changes none."""
    logits = torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0))
    logits[3] = logits[1]
    whole = functional.interpolate(logits[None, :, :11, :14], (33, 21), mode="bilinear", align_corners=False)
    expected = whole[0].argmax(dim=0).to(torch.uint8)
    assert not (expected == 3).any()
    for at_once in (1, 2 * 33 * 21, 10**6):
        monkeypatch.setattr("ssmprune_cli.tasks.segmentation._NUMBERS", at_once)
        assert torch.equal(classes_of(logits, (11, 14), (33, 21)), expected)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20))
def test_windows_cover_the_image_and_their_mean_is_taken(
    height: int, width: int, crop: int, stride: int, seed: int
) -> None:
    """Of a model that adds to each pixel a number of its window: the mean of those of the windows that it is in."""
    stride = min(stride, crop)
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    seen: list[Tensor] = []

    def forward(window: Tensor) -> Tensor:
        assert window.shape[2] == min(crop, height) and window.shape[3] == min(crop, width)
        seen.append(window)
        return window + len(seen)

    found = TASK.sliding((crop, crop), (stride, stride)).answer(forward, images)
    total, count = torch.zeros_like(images), torch.zeros_like(images)
    rows = max(height - crop + stride - 1, 0) // stride + 1
    columns = max(width - crop + stride - 1, 0) // stride + 1
    assert len(seen) == rows * columns
    for number in range(rows * columns):
        y = min(number // columns * stride, max(height - crop, 0))
        x = min(number % columns * stride, max(width - crop, 0))
        total[:, :, y : y + crop, x : x + crop] += images[:, :, y : y + crop, x : x + crop] + number + 1
        count[:, :, y : y + crop, x : x + crop] += 1
    assert count.min() >= 1
    torch.testing.assert_close(found, total / count, rtol=1e-5, atol=1e-5)


def test_windows_that_leave_pixels_out_and_tasks_without_windows_are_refused() -> None:
    with pytest.raises(UsageError, match="leave pixels out"):
        TASK.sliding((64, 64), (65, 65))
    with pytest.raises(UsageError, match="--slide: is for segmentation"):
        TASKS.get("classification").sliding((64, 64), (43, 43))


def random_counts(images: int, classes: int, seed: int) -> NDArray[np.int64]:
    """(images, 3, classes)"""
    draw = np.random.default_rng(seed)
    pairs = draw.integers(0, 9, (images, classes, classes))  # confusion: mask, answer
    return np.stack([np.stack([pair.diagonal(), pair.sum(axis=1), pair.sum(axis=0)]) for pair in pairs])


def test_a_resample_is_a_set_of_images_and_the_same_for_both_models() -> None:
    """Against sums over the images that are drawn, one set after the other."""
    models = [random_counts(7, 3, seed) for seed in (0, 1)]
    found = resampled(models)
    draw = np.random.default_rng(0)
    times = np.concatenate([draw.multinomial(7, np.full(7, 1 / 7), size=100) for _ in range(RESAMPLES // 100)])
    for own, counts in zip(found, models, strict=True):
        assert own.shape == (RESAMPLES,)
        for number in (0, 1, 99, 100, 1999):
            images = np.repeat(np.arange(7), times[number])
            assert len(images) == 7
            assert own[number] == pytest.approx(float(shares(counts[images].sum(axis=0)).miou), abs=1e-12)
    np.testing.assert_array_equal(found[0], resampled(models)[0])
    same = resampled([models[0], models[0]])
    assert interval(same[0] - same[1], 0.0) == (0.0, 0.0)


def test_an_interval_has_the_estimate_and_holds_what_it_should() -> None:
    """Of 50 sets of 40 images from one source, about 47 intervals hold the mIoU of a large set."""
    truth = float(shares(random_counts(20_000, 3, 99).sum(axis=0)).miou)
    held = 0
    for seed in range(50):
        counts = random_counts(40, 3, seed)
        low, high = interval(resampled([counts])[0], float(shares(counts.sum(axis=0)).miou))
        held += low <= truth <= high
    assert 42 <= held <= 50
    assert interval(np.array([0.1, 0.2, 0.3]), 0.9)[1] == 0.9


def masks(seed: int, count: int = 5) -> list[Mask]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 3, (4, 6) if index % 2 else (6, 4)).astype(np.uint8) for index in range(count)]


def test_evaluation_of_two_models_on_images_of_two_sizes() -> None:
    truth, answers = masks(0), masks(1)
    dataset = Pictures(truth, answers, ("sky", "road", "tree"))
    result = evaluate(reader(1), dataset, compare=reader(0), batch_size=3)
    facts = result.comparison
    assert isinstance(facts, SegmentationFacts)
    assert facts.dense.miou == facts.dense.aacc == facts.dense.macc == 1.0 and facts.dense.interval == (1.0, 1.0)
    pairs = [
        (int(a), int(m))
        for answer, mask in zip(answers, truth, strict=True)
        for a, m in zip(answer.flat, mask.flat, strict=True)
    ]
    ious = [sum(a == m == each for a, m in pairs) / sum(each in pair for pair in pairs) for each in range(3)]
    assert facts.miou == pytest.approx(sum(ious) / 3)
    assert [each.iou for each in facts.classes] == pytest.approx(ious)
    assert [each.name for each in facts.classes] == ["sky", "road", "tree"]
    assert facts.difference == pytest.approx(facts.miou - 1)
    assert facts.difference_interval is not None and facts.difference_interval[1] < 0
    assert result.changed == tuple(range(5))
    found = result.to_dict()
    assert list(found)[:7] == ["count", "dtype", "notes", "miou", "interval", "aacc", "macc"]
    assert found["dense"]["miou"] == 1.0 and found["difference"] == facts.difference
    (loss, *_) = TASK.losses(facts, 2)
    worst = min(range(3), key=ious.__getitem__)
    assert (loss.name, loss.dense, loss.images) == (("sky", "road", "tree")[worst], "100.00 %", 5)
    assert loss.pruned == f"{100 * ious[worst]:.2f} %"


def test_how_images_are_batched_changes_nothing() -> None:
    dataset = Pictures(masks(0, 9), masks(2, 9))
    found = [evaluate(reader(1), dataset, batch_size=size).score for size in (1, 2, 9)]
    assert found[0] == found[1] == found[2]


def test_one_image_has_no_interval() -> None:
    dataset = Pictures(masks(0, 1), masks(1, 1))
    result = evaluate(reader(1), dataset, compare=reader(0))
    facts = result.comparison
    assert isinstance(facts, SegmentationFacts)
    assert facts.interval is None and facts.difference_interval is None
    assert "one image has no interval" in TASK.difference(facts)
    assert TASK.table([facts])[1] == ["  95 % interval", "-"]
    (drop,) = Limits(max_drop=99).check(TASK, score=facts, comparison=facts)
    assert drop.interval is None and drop.judged == "estimate" and drop.holds


def scored(miou: float, ends: tuple[float, float]) -> ModelSegmentation:
    return ModelSegmentation(miou=miou, interval=ends, aacc=0.9, macc=0.8, classes=())


def test_limits_are_in_points_of_miou_and_those_of_other_tasks_are_refused() -> None:
    facts = SegmentationFacts(
        **scored(0.40, (0.35, 0.45)).model_dump(),
        count=20,
        dense=scored(0.42, (0.36, 0.47)),
        difference=-0.02,
        difference_interval=(-0.03, -0.01),
    )
    drop, floor = Limits(max_drop=2.5, min_miou=35).check(TASK, score=facts, comparison=facts)
    assert drop.value == pytest.approx(2) and drop.interval == pytest.approx((1, 3)) and not drop.holds
    assert drop.statement == (
        "mIoU fell by 2.00 points (95 % interval 1.00 to 3.00, judged by its upper end); --max-drop allows 2.5"
    )
    assert floor.holds and not Limits(min_miou=35.1).check(TASK, score=facts)[0].holds
    assert Limits(max_drop=2, judge="estimate").check(TASK, score=facts, comparison=facts)[0].holds
    Limits(max_drop=1, min_miou=3).fit(TASK)
    for limits, task in ((Limits(min_accuracy=3), TASK), (Limits(min_miou=3), TASKS.get("classification"))):
        with pytest.raises(UsageError, match=f"is no limit for {task.name}"):
            limits.fit(task)


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [
        (reader(0, 4), Pictures(masks(0), masks(0), tuple("abc")), "the images have 3 classes, the model has 4"),
        (reader(0, 1), Pictures(masks(0), masks(0)), "a model of 1 classes"),
        (reader(0, 300), Pictures(masks(0), masks(0)), "a model of 300 classes"),
        (reader(0, 2), Pictures(masks(0), masks(0)), r"image 0: has the class 2 in its mask, and the model has 2 \(0 "),
        (reader(0), Pictures([np.zeros((4, 5), np.uint8)], masks(0, 1)), "image 0: has 6 x 4 pixels, and its mask has"),
        (reader(0), Pictures([np.full((6, 4), 255, np.uint8)], masks(0, 1)), "no pixel of any mask is judged"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_error(model: Backbone, dataset: Pictures, message: str) -> None:
    if "its mask has" in message:
        dataset.image = lambda index: Image.new("RGB", (6, 4))  # type: ignore[method-assign]
    with pytest.raises(DataError, match=message):
        evaluate(model, dataset)


def test_classes_in_another_order_are_refused() -> None:
    class Named(Reader):
        class_names = ("Road", "sky", "tree")

    model = reader(0)
    model.__class__ = Named
    evaluate(model, Pictures(masks(0), masks(0), ("road", "Sky", "tree")))
    with pytest.raises(DataError, match="class 0 is 'sky', and the model's is 'road'"):
        evaluate(model, Pictures(masks(0), masks(0), ("sky", "road", "tree")))


def test_a_dataset_of_classes_is_none_for_a_segmenter() -> None:
    class Labelled(Pictures):
        def target(self, index: int) -> Any:
            return 1

    with pytest.raises(DataError, match="the images have no masks"):
        evaluate(reader(0), Labelled(masks(0), masks(0)))
    with pytest.raises(DataError, match="has no mask"):
        fitting(None, (2, 2), 3, "a")


def test_models_are_compared_by_a_thousand_pixels_of_each_image() -> None:
    logits = torch.arange(2 * 3 * 40 * 64, dtype=torch.float32).reshape(2, 3, 40, 64)
    found = TASK.sample(logits)
    assert found.shape == (2, 3, GRID, GRID)
    # Row r of 32 is at (r + 1/2) 40 / 32, column c at 2 c + 1.
    assert found[1, 2, 0, 0] == logits[1, 2, 0, 1] and found[0, 0, 31, 31] == logits[0, 0, 39, 63]
    assert TASK.sample(logits[:, :, :5, :7]).shape == found.shape
    assert TASK.divergence(found, found).tolist() == [0.0, 0.0]
    other = found.clone()
    other[0, :, :4] = other[0, :, :4].flip(0)
    assert TASK.differ(found, other).tolist() == [True, False]


def test_masks_as_pictures() -> None:
    one = np.array([[0, 1], [2, 2]], np.uint8)
    other = np.array([[0, 1], [2, 1]], np.uint8)
    image = np.full((2, 2, 3), 100, np.uint8)
    shown = painted(image, one)
    assert len({tuple(each) for each in shown.reshape(-1, 3).tolist()}) == 3
    np.testing.assert_array_equal(shown[0, 1], np.rint(0.4 * 100 + 0.6 * colours(2)[0, 1].astype(float)))
    differs = differing(image, one, other)
    red = (differs[..., 0] > 180) & (differs[..., 1] < 80)
    assert red.tolist() == [[False, False], [False, True]]
    assert len({tuple(each) for each in colours(150)[0].tolist()}) == 150
    frames = (Frame((2, 2), (2, 2)), Frame((2, 2), (2, 2)))
    drawing = TASK.drawn(Image.fromarray(image), frames, certain(one, 3)[None], certain(other, 3)[None])
    assert list(drawing.pictures) == ["dense", "pruned", "differs"]
    assert drawing.words == "25.0 % of the pixels change their class"
    np.testing.assert_array_equal(np.asarray(drawing.pictures["pruned"]), painted(image, other))
