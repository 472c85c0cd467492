"""What a task is: its data, how answers are judged and compared, what a user may demand, and the words for it.

The *outputs* of a model are what it computes of a batch: logits, masks of logits, features. A *result* is what is kept
of its answer to one image: a plain value that processes can send each other. A *score* are the facts of one model on a
dataset. A *comparison* are the facts of a pruned and a dense model on the same images: a section of a report.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from PIL import Image
from torch import Tensor

from ssmprune_cli.data import (
    Batch,
    ImageDataset,
    Split,
    calibration_images,
    listed_clips,
    listed_images,
    open_dataset,
)
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import Frame
from ssmprune_cli.pruning import divergence, soft_divergence
from ssmprune_cli.recipe import Section
from ssmprune_cli.report import Interval, Judge, LimitFacts, Report, Sample


class Comparison(Protocol):
    """What a comparison has beside the pruned model's score: see `AccuracyFacts`."""

    @property
    def count(self) -> int: ...
    @property
    def dense(self) -> Any: ...
    @property
    def difference(self) -> float: ...
    @property
    def difference_interval(self) -> Interval | None: ...


Score = TypeVar("Score", bound=Section)
Compared = TypeVar("Compared", bound=Comparison)


@dataclass(frozen=True)
class Estimate:
    """A measured value, and its 95 % interval if it has one."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class LimitKind:
    """A limit that a user may set: a bound on one measured value.

    name       in a report; the option is "--" and this with hyphens
    low, high  between which the bound may lie
    floor      whether the value must be at least the bound, and not at most
    words      of a value and its bound: a sentence with {value}, {within} (its interval) and {limit}
    """

    name: str
    low: float
    high: float
    floor: bool
    words: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def check(self, limit: float, found: Estimate, judge: Judge) -> LimitFacts:
        """Whether `found` keeps the bound: all of its interval, or the estimate. Without an interval, the estimate."""
        judged, interval = found.value, found.interval if judge == "interval" else None
        how = "the estimate is judged"
        if interval is not None:
            judged = interval[0] if self.floor else interval[1]
            how = f"judged by its {'lower' if self.floor else 'upper'} end"
        within = ""
        if found.interval is not None:
            within = f" (95 % interval {found.interval[0]:.2f} to {found.interval[1]:.2f}, {how})"
        return LimitFacts(
            name=self.name,
            limit=limit,
            value=found.value,
            interval=found.interval,
            judged="estimate" if interval is None else "interval",
            holds=judged >= limit if self.floor else judged <= limit,
            # Rounded here, and plus 0: what is nothing is not "-0.00".
            statement=self.words.format(value=round(found.value, 2) + 0.0, within=within, limit=limit),
        )


@dataclass(frozen=True)
class TaskLimit:
    """A limit of a task. `measure` takes a score, and a comparison or None; it gives None for what was not measured."""

    kind: LimitKind
    measure: Callable[[Any, Any], Estimate | None]


def drop_limit(metric: str) -> TaskLimit:
    """How many points of the metric a pruned model may lose; below 0 it must gain."""
    words = "{value:.2f} points{within}; --max-drop allows {limit:g}"
    return TaskLimit(LimitKind("max_drop", -100.0, 100.0, floor=False, words=f"{metric} fell by {words}"), _lost)


def _lost(score: Any, compared: Comparison | None) -> Estimate | None:
    if compared is None:
        return None
    ends = compared.difference_interval
    within = None if ends is None else (0 - 100 * ends[1], 0 - 100 * ends[0])  # 0 - 0 has no sign
    return Estimate(0 - 100 * compared.difference, within)


@dataclass(frozen=True)
class Row:
    """One line of a table before and after. `within` is the interval of the change.

    better  whether the change is a gain; None for no change, or none that its interval tells from nothing
    """

    title: str
    dense: str
    pruned: str
    change: str
    within: str = ""
    better: bool | None = None

    @property
    def whole_change(self) -> str:
        return f"{self.change} ({self.within})" if self.within else self.change


@dataclass(frozen=True)
class Loss:
    """A part of the data that the pruned model does worse on, in words."""

    name: str
    images: int
    dense: str
    pruned: str
    change: str


@dataclass(frozen=True)
class Drawing:
    """What two models say of an image, in pictures by title, and in words how far they differ."""

    pictures: dict[str, Image.Image]
    words: str


class Task(ABC, Generic[Score, Compared]):
    """A task is a file: a subclass, and a line in `tasks.TASKS`.

    name      as a backbone says it (`Backbone.task`)
    datasets  kinds of dataset that hold what answers are judged by
    section   the field of a Report that holds a comparison
    quality   what is judged, in a word
    parts     what a dataset divides into, one and several, in words; `part_metric` what is said of each, and `unharmed`
              is said where none is worse than before
    metric    by what models are ranked; `key` is its name in JSON
    unit      of `divergence`
    limits    what a user may demand of a score or a comparison
    most      images that go through a model together, unless the user says how many
    calibrates  images that models are calibrated and reductions compared on, unless the user says how many: fewer where
              one has many tokens and takes long. None where a repair wants more
    hub_task, hub_metric   what hubs of models call it and its metric
    draws     whether its answers are pictures themselves: see `drawn`
    saves     whether there is a format for what models answer: see `predictions`
    clips     whether models take clips of a video, and not single images
    shows     whether its inputs are pictures, which a report can show
    cases     what its inputs are called, several of them
    remarks   sentences on what figures of work and time leave out, for whoever reads them
    """

    name: ClassVar[str]
    datasets: ClassVar[tuple[str, ...]]
    section: ClassVar[str]
    quality: ClassVar[str]
    parts: ClassVar[tuple[str, str]]
    part_metric: ClassVar[str]
    unharmed: ClassVar[str]
    metric: ClassVar[str]
    hub_task: ClassVar[str]
    hub_metric: ClassVar[str]
    key: ClassVar[str]
    unit: ClassVar[str] = "nats"
    most: ClassVar[int] = 1 << 16
    calibrates: ClassVar[int | None] = None
    limits: ClassVar[tuple[TaskLimit, ...]]
    draws: ClassVar[bool] = False
    saves: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    shows: ClassVar[bool] = True
    cases: ClassVar[str] = "images"
    remarks: ClassVar[tuple[str, ...]] = ()

    def open(
        self, path: Path, kind: str | None = None, split: Split = "val", *, model: Backbone | None = None
    ) -> ImageDataset:
        """Images with what they are judged by; without a `kind`, what `path` looks like (see `kind`). A text is read by
        the tokenizer of `model`.

        Raises UsageError for a kind that is not of this task, DataError for data that are not laid out so.
        """
        kind = kind or self.kind(path)
        if kind not in self.datasets:
            raise UsageError(
                f"there is no dataset {kind!r} for {self.name}, which is what the model is for",
                hint=f"Fitting kinds are {', '.join(self.datasets)}.",
            )
        return self._opened(kind, path, split, model)

    def _opened(self, kind: str, path: Path, split: Split, model: Backbone | None) -> ImageDataset:
        """Of a fitting kind."""
        return open_dataset(kind, path, split=split)

    def calibration(self, model: Backbone, path: Path, count: int, seed: int) -> ImageDataset:
        """`count` unlabelled inputs for `model` in `path`, chosen by `seed`: see `data.calibration_images`."""
        return calibration_images(path, count, seed, clips=self.clips)

    def files(self, model: Backbone) -> dict[str, bytes]:
        """What an output folder needs beside the weights of `model`, by name."""
        return {}

    def listed(self, files: Sequence[Path]) -> ImageDataset:
        """These images or clips, in their order. Raises DataError if one of them is missing."""
        return listed_clips(files) if self.clips else listed_images(files)

    @abstractmethod
    def kind(self, path: Path) -> str:
        """The kind of dataset that `path` is taken for."""

    @abstractmethod
    def check(self, model: Backbone, dataset: ImageDataset) -> None:
        """Raises DataError unless `model` can be judged on `dataset`."""

    def sliding(self, crop: tuple[int, int], stride: tuple[int, int]) -> Task[Score, Compared]:
        """The same task with windows of `crop` pixels that move by `stride` (heights, widths), each seen alone. Raises
        UsageError for a task whose models see an image whole."""
        raise UsageError(f"is for segmentation: a model for {self.name} sees the image whole", where="--slide")

    def answer(self, forward: Callable[[Tensor], Any], images: Tensor) -> Any:
        """The outputs for normalised images (B, 3, H, W); `forward` is a model or a session of it."""
        return forward(images)

    def one(self, outputs: Any, place: int) -> Any:
        """Of the outputs for a batch those for the image at `place`, a batch of one."""
        return outputs[place : place + 1]

    def finite(self, outputs: Any) -> Tensor:
        """(B,) bool: whether the outputs for an image are finite."""
        finite: Tensor = outputs.isfinite().flatten(1).all(dim=1)
        return finite

    def at_once(self, many: int, asked: int | None = None) -> int:
        """How many images go through a model together: `many`, or fewer where they are large, unless the user has
        `asked` for a number."""
        return min(many, self.most) if asked is None else asked

    @abstractmethod
    def results(self, outputs: Any, batch: Batch) -> list[Any]:
        """The result of every image of a batch. Raises DataError, naming the image, for a target that does not fit."""

    @abstractmethod
    def sample(self, outputs: Any) -> Tensor:
        """What of the outputs the distance of two models is computed from, (B, ...): of one shape for all images,
        whatever their sizes."""

    def divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """How far a pruned model's samples are from the dense model's: KL(dense || pruned) in nats, (B,) float64."""
        return divergence(dense, pruned)

    def soft_divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """The same, by which candidates are ordered on few images (see `pruning.soft_divergence`)."""
        return soft_divergence(dense, pruned)

    @abstractmethod
    def score(self, results: Sequence[Any], model: Backbone, dataset: ImageDataset) -> Score:
        """From the results of all images, those of `dataset`."""

    @abstractmethod
    def compare(
        self, pruned: tuple[Sequence[Any], Score], dense: tuple[Sequence[Any], Score], dataset: ImageDataset
    ) -> Compared:
        """From the results, image by image of `dataset`, and the scores of both models."""

    @abstractmethod
    def changed(self, pruned: Sequence[Any], dense: Sequence[Any]) -> list[int]:
        """From the results, image by image: where one model is right and the other one is not, as indices."""

    def predictions(self, results: Sequence[Any], dataset: ImageDataset) -> str:
        """The results, image by image of `dataset`, in the format that others read. Of a task that saves."""
        raise NotImplementedError

    def differ(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """(B,) bool: whether the samples of two models differ enough to be shown. By default, in the class of more than
        one in a hundred places."""
        differs = dense.argmax(dim=1) != pruned.argmax(dim=1)
        return differs.reshape(len(differs), -1).double().mean(dim=1) > 0.01

    def told(self, outputs: Any) -> list[int | None]:
        """The class that is said of each image; None where an answer is more than that."""
        return [None] * len(outputs)

    def drawn(self, image: Image.Image, frames: tuple[Frame, Frame], dense: Any, pruned: Any) -> Drawing:
        """The outputs of two models for one image, whose colours are `image`, upright and of any size; `frames` are
        where it lies in what the dense and the pruned model were given. Of a task that draws."""
        raise NotImplementedError

    def facts(self, report: Report) -> Compared | None:
        """The comparison in a report."""
        compared: Compared | None = getattr(report, self.section)
        return compared

    @abstractmethod
    def estimate(self, score: Score) -> Estimate:
        """The metric, as a fraction: the more the better."""

    def change(self, compared: Compared) -> Estimate:
        """The metric of the pruned model less that of the dense one."""
        return Estimate(compared.difference, compared.difference_interval)

    @abstractmethod
    def rows(self, compared: Compared) -> list[Row]:
        """Lines of the table before and after."""

    @abstractmethod
    def brief(self, compared: Compared) -> Row:
        """The metric's line for a terminal: figures without units and intervals."""

    def briefs(self, compared: Compared) -> list[Row]:
        """Further lines for a terminal, such as of another figure that people judge by."""
        return []

    @abstractmethod
    def table(self, scores: Sequence[Score]) -> list[list[str]]:
        """Lines of a table with a column for each score, titles first."""

    @abstractmethod
    def columns(self, score: Score) -> dict[str, float | None]:
        """The figures of a score as shares, by names that are columns of a sheet: timm's where it has them."""

    def by_part(self, scores: Sequence[Score]) -> list[list[str]]:
        """Lines of a table with the metric of each part of the data (see `parts`), a column for each score, titles
        first. None where they are too many, and say little."""
        return []

    @abstractmethod
    def difference(self, compared: Compared) -> str:
        """The change with its interval and test, as a sentence."""

    @abstractmethod
    def test(self, compared: Compared) -> str:
        """The paired test, as a sentence."""

    @abstractmethod
    def losses(self, compared: Compared, count: int) -> list[Loss]:
        """The `count` parts of the data that lost most, of those that lost."""

    @abstractmethod
    def answers(self, report: Report, sample: Sample) -> str:
        """What both models say of a sample image, and whether that is right."""
