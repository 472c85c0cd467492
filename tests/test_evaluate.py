"""Evaluation with models whose answers are known: each image says in its pixels which class the model answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssmprune_cli.data import open_dataset
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.errors import DataError, SsmpruneError, UsageError
from ssmprune_cli.interface import Mixers
from ssmprune_cli.models.common.backbone import Backbone, Places
from ssmprune_cli.models.common.block import Block
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.statistics import mcnemar_p_value, paired_interval, wilson_interval
from ssmprune_cli.workflows.evaluate import evaluate, spread

PLAIN = Preprocessing(resize=4, crop=4, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


class Seen(list[tuple[int, ...]]):
    """Stays one list when a model is copied: what a session of it is given comes here too."""

    def __deepcopy__(self, memo: dict[int, object]) -> Seen:
        return self


class Reader(Backbone):
    """Logits as `answer` gives them for the preprocessed images. What evaluation does not need is left out."""

    def __init__(
        self, answer: Callable[[Tensor], Tensor], classes: int = 10, preprocessing: Preprocessing = PLAIN
    ) -> None:
        super().__init__()
        self._answer = answer
        self._classes = classes
        self._preprocessing = preprocessing
        self.sizes = Seen()

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.sizes.append(tuple(images.shape))
        return self._answer(images)

    @property
    def blocks(self) -> list[Block]:
        raise NotImplementedError

    @property
    def mixers(self) -> Mixers:
        raise NotImplementedError

    @property
    def places(self) -> Places:
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        raise NotImplementedError

    @property
    def protected(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def image_size(self) -> tuple[int, int]:
        return (self._preprocessing.crop, self._preprocessing.crop)

    @property
    def num_classes(self) -> int:
        return self._classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self._preprocessing


class Images(ImageDataset):
    """4 x 4 pixels with `red` and `green` in two channels; `labels` may be None."""

    def __init__(
        self,
        red: Sequence[int],
        labels: Sequence[int] | None,
        green: Sequence[int] | None = None,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self._red = red
        self._green = green or [0] * len(red)
        self._labels = labels
        self._class_names = class_names

    def __len__(self) -> int:
        return len(self._red)

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4), (self._red[index], self._green[index], 0))

    def target(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]

    def name(self, index: int) -> str:
        return f"image {index}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names


def answers(channel: int, classes: int = 10) -> Callable[[Tensor], Tensor]:
    """Logits that fall with the distance from the class in `channel`: the class itself first, then its neighbours."""

    def answer(images: Tensor) -> Tensor:
        said = images[:, channel, 0, 0].round()
        # The small slope decides between two classes at equal distance: the lower one.
        return -(torch.arange(classes) - said[:, None]).abs() - 0.01 * torch.arange(classes)

    return answer


def test_top1_and_top5() -> None:
    # Answers 3, then 2, 4, 1, 5, 0, 6: distances 0, 1, 2 to the label are in the top 5, 3 and more are not.
    labels = [3, 3, 3, 2, 5, 1, 0, 6, 9, 3]
    result = evaluate(Reader(answers(0)), Images([3] * 10, labels), batch_size=4)
    assert result.count == 10
    assert result.score.top1 == 0.4
    assert result.score.top5 == 0.7
    assert result.score.interval == wilson_interval(4, 10)
    assert result.images_per_second > 0
    assert result.comparison is None
    assert list(result.to_dict()) == ["count", "dtype", "notes", "top1", "top5", "interval", "images_per_second"]


def test_batch_size_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    dataset = Images(rng.integers(0, 10, 23).tolist(), rng.integers(0, 10, 23).tolist())
    found = []
    for batch_size in (1, 5, 23, 64):
        model = Reader(answers(0))
        score = evaluate(model, dataset, batch_size=batch_size).score
        assert sum(size[0] for size in model.sizes) == 23  # every image once
        found.append((score.top1, score.top5, score.interval))
    assert len(set(found)) == 1


def test_equal_logits_are_no_right_answers() -> None:
    """A dead model scores like one that always answers class 0."""
    model = Reader(lambda images: torch.zeros(len(images), 10))
    score = evaluate(model, Images([0] * 10, range(10))).score
    assert (score.top1, score.top5) == (0.1, 0.5)


def test_top5_needs_five_classes() -> None:
    assert evaluate(Reader(answers(0, 4), classes=4), Images([1, 2], [1, 1])).score.top5 is None
    assert evaluate(Reader(answers(0, 5), classes=5), Images([1, 2], [1, 1])).score.top5 == 1.0


def test_comparison_is_paired() -> None:
    # The model reads red, its reference green: 1 gained, 3 lost, 4 both right, 2 both wrong.
    labels = [5] * 10
    red = [5, 0, 0, 0, 5, 5, 5, 5, 0, 0]
    green = [0, 5, 5, 5, 5, 5, 5, 5, 0, 0]
    seen: list[tuple[int, int]] = []
    result = evaluate(
        Reader(answers(0)),
        Images(red, labels, green),
        batch_size=4,
        compare=Reader(answers(1)),
        progress=lambda done, total: seen.append((done, total)),
    )
    figures = result.to_dict()
    assert figures["top1"] == 0.5
    assert figures["dense"]["top1"] == 0.7
    assert list(figures["dense"]) == ["top1", "top5", "interval", "images_per_second"]
    assert figures["dense"]["interval"] == list(wilson_interval(7, 10))
    assert figures["difference"] == pytest.approx(-0.2, abs=1e-15)
    assert figures["difference_interval"] == list(paired_interval(1, 3, 10))
    assert figures["p_value"] == mcnemar_p_value(1, 3) == 0.625
    assert seen == [(4, 10), (8, 10), (10, 10)]


def test_each_model_gets_its_own_preprocessing() -> None:
    larger = Preprocessing(resize=8, crop=6, mean=PLAIN.mean, std=PLAIN.std)
    model, reference = Reader(answers(0)), Reader(answers(0), preprocessing=larger)
    result = evaluate(model, Images([1, 2, 3], [1, 2, 3]), compare=reference)
    assert (model.sizes, reference.sizes) == ([(3, 3, 4, 4)], [(3, 3, 6, 6)])
    assert result.to_dict()["difference"] == 0.0


def test_limit_is_spread_over_all_classes() -> None:
    labels = [label for label in range(10) for _ in range(5)]
    model = Reader(answers(0))
    result = evaluate(model, Images(labels[::-1], labels), limit=10)
    assert result.count == 10
    # One image of each class, so that no class is left out; the answers run the other way round, so none is right.
    assert result.score.top1 == 0.0
    assert [labels[index] for index in spread(50, 10)] == list(range(10))
    assert evaluate(model, Images(labels, labels), limit=99).count == 50


@pytest.mark.parametrize(("total", "count"), [(10, 1), (10, 3), (10, 9), (10, 10), (50_000, 777)])
def test_spread_takes_one_of_each_stretch(total: int, count: int) -> None:
    indices = spread(total, count)
    assert indices == spread(total, count)
    assert len(indices) == count
    for i, index in enumerate(indices):
        assert i * total // count <= index < (i + 1) * total // count


def test_spread_of_alternating_classes_has_them_all() -> None:
    """Equal steps of 10 would give 100 images of one class."""
    labels = [index % 10 for index in spread(1000, 100)]
    assert set(labels) == set(range(10))


@pytest.mark.parametrize("second", [False, True])
def test_wrong_class_count(second: bool) -> None:
    models = [Reader(answers(0, 7), classes=7), Reader(answers(0))]
    dataset = Images([0], [0], class_names=tuple("abcdefghij"))
    with pytest.raises(DataError, match="10 classes, the model has 7"):
        evaluate(models[second], dataset, compare=models[not second])


@pytest.mark.parametrize("label", [10, -1])
def test_label_out_of_range_is_named(label: int) -> None:
    with pytest.raises(DataError, match=f"image 1: has the label {label}"):
        evaluate(Reader(answers(0)), Images([0, 0], [0, label]))


def test_no_labels() -> None:
    with pytest.raises(DataError, match="no labels"):
        evaluate(Reader(answers(0)), Images([0], None))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("second", [False, True])
def test_logits_that_are_not_finite_name_the_image(value: float, second: bool) -> None:
    def broken(images: Tensor) -> Tensor:
        logits = answers(0)(images)
        logits[images[:, 0, 0, 0].round() == 7, 3] = value
        return logits

    models = [Reader(answers(0)), Reader(broken)]
    role = "the model to compare with" if second else "the model"
    with pytest.raises(SsmpruneError, match=f"image 2: {role} gives logits"):
        evaluate(models[not second], Images([0, 1, 7, 2], [0] * 4), batch_size=2, compare=models[second])


def test_faults_of_the_call() -> None:
    for wrong in ({"batch_size": 0}, {"limit": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            evaluate(Reader(answers(0)), Images([0], [0]), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="device"):
        evaluate(Reader(answers(0)), Images([0], [0]), device="nowhere")


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a/broken\.png"):
        evaluate(Reader(answers(0, 2), classes=2), open_dataset("imagefolder", tmp_path))
