"""What 8-bit integers cost and save: an exported file with them against the same in float32, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ssmprune_cli.data import ImageDataset, Subset, batches
from ssmprune_cli.export import Exported, How, OnnxSession, opened, same_answers
from ssmprune_cli.report import LimitFacts
from ssmprune_cli.tasks import Task
from ssmprune_cli.workflows.evaluate import Evaluation, evaluate, spread
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.measure import interleaved_speeds
from ssmprune_cli.workflows.subject import definition_of

_COMPARED = 256  # images that answers are compared on; more say little more
_TIMED = (1, 8)  # images in a batch that is timed
_ROUNDS = 10
_AT_ONCE = 8


@dataclass(frozen=True)
class Judged:
    """Labelled images, and how many of them are used; None is all."""

    task: Task[Any, Any]
    dataset: ImageDataset
    limit: int | None


@dataclass(frozen=True)
class Times:
    """Medians of runs in turns, milliseconds of a batch, and how many times as fast int8 is."""

    batch: int
    float32_ms: float
    int8_ms: float

    @property
    def speedup(self) -> float:
        return self.float32_ms / self.int8_ms


@dataclass(frozen=True)
class Int8Facts:
    """A file in int8 beside the same one in float32.

    how       where the scales of activations come from; `products` are how many layers are in integers
    bytes     of either file
    same      the share of answers that are those in float32, on so many `images`: `shown` says which ones
    times     of either file in the better of the runtimes here
    accuracy  of the file in int8 on labelled images; its `dense` is the file in float32
    """

    how: How
    products: int
    float32_bytes: int
    int8_bytes: int
    same: float
    images: int
    shown: str
    times: tuple[Times, ...]
    accuracy: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "how": self.how,
            "products": self.products,
            "float32_bytes": self.float32_bytes,
            "int8_bytes": self.int8_bytes,
            "same_answers": self.same,
            "compared_images": self.images,
            "compared_on": self.shown,
            "times": [{**asdict(each), "speedup": each.speedup} for each in self.times],
        }
        if self.accuracy is not None:
            judged = self.accuracy.to_dict()
            found["accuracy"] = {"float32" if name == "dense" else name: value for name, value in judged.items()}
        return found


def measure(
    plain: Exported, made: Exported, products: int, how: How, images: Tensor, shown: str, judged: Judged | None
) -> Int8Facts:
    """`made` is `plain` in int8. Answers are compared on `judged` images, or on `images` (N, 3, H, W), which `shown`
    names."""
    first, second = opened(plain.path), opened(made.path)
    parts: Iterator[Tensor] = iter(images.split(made.batch or _AT_ONCE))
    accuracy = None
    if judged is not None:
        some = spread(len(judged.dataset), min(len(judged.dataset), judged.limit or _COMPARED, _COMPARED))
        way = definition_of(first).preprocessing
        parts = (each.images for each in batches(Subset(judged.dataset, some), way, made.batch or _AT_ONCE))
        shown = "--data"
        accuracy = evaluate(second, judged.dataset, limit=judged.limit, compare=first, task=judged.task)
    count, same = 0, 0.0
    for part in parts:
        count += len(part)
        same += len(part) * same_answers(first(part), second(part))
    times = tuple(_times(first, second, batch) for batch in (_TIMED if made.batch is None else (made.batch,)))
    return Int8Facts(how, products, plain.size, made.size, same / count, count, shown, times, accuracy)


def _times(first: OnnxSession, second: OnnxSession, batch: int) -> Times:
    one, other = interleaved_speeds([first, second], definition_of(first).example(batch, seed=0), _ROUNDS)
    return Times(batch, one.median_ms, other.median_ms)


def check(facts: Int8Facts, limits: Limits) -> tuple[LimitFacts, ...]:
    """A verdict for every limit that is set."""
    if facts.accuracy is None:
        return ()
    return limits.check(facts.accuracy.task, score=facts.accuracy.score, comparison=facts.accuracy.comparison)
