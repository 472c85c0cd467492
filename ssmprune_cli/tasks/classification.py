"""Classification: the class of an image, judged by the share of right answers (top-1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ssmprune_cli.data import Batch, ImageDataset
from ssmprune_cli.errors import DataError
from ssmprune_cli.models import Backbone
from ssmprune_cli.report import AccuracyFacts, ClassChange, ModelAccuracy, Report, Sample
from ssmprune_cli.statistics import mcnemar_p_value, paired_interval, wilson_interval
from ssmprune_cli.tasks.task import Estimate, LimitKind, Loss, Row, Task, TaskLimit, drop_limit
from ssmprune_cli.tasks.words import gained, in_percent, share


def _top1(score: ModelAccuracy, compared: AccuracyFacts | None) -> Estimate:
    """Top-1 in per cent."""
    low, high = score.interval
    return Estimate(100 * score.top1, (100 * low, 100 * high))


class Classification(Task[ModelAccuracy, AccuracyFacts]):
    """A result is the rank of the right class among the logits: 0 for a right answer."""

    name = "classification"
    datasets: ClassVar[tuple[str, ...]] = ("imagenet", "imagefolder", "cifar10", "cifar100", "npz")
    section = "accuracy"
    quality = "accuracy"
    parts = ("class", "classes")
    part_metric = "right"
    unharmed = "No class has fewer right answers than before."
    metric = "top-1"
    hub_task = "image-classification"
    hub_metric = "accuracy"
    key = "top1"
    limits = (
        drop_limit("top-1"),
        TaskLimit(
            LimitKind(
                "min_accuracy",
                0.0,
                100.0,
                floor=True,
                words="top-1 is {value:.2f} %{within}; --min-accuracy asks for {limit:g}",
            ),
            _top1,
        ),
    )

    def kind(self, path: Path) -> str:
        return "npz" if path.suffix == ".npz" else "imagefolder"

    def check(self, model: Backbone, dataset: ImageDataset) -> None:
        """The classes of `dataset` must be those of `model`: otherwise the score is low for no fault of the model."""
        if model.num_classes < 2:
            raise DataError(
                f"a model of {model.num_classes} classes has no answer that could be right or wrong",
                hint="Accuracy needs a classifier of two classes or more; a single logit counts as one class.",
            )
        if dataset.num_classes is not None and dataset.num_classes != model.num_classes:
            raise DataError(
                f"the {self.cases} have {dataset.num_classes} classes, the model has {model.num_classes}",
                hint="Accuracy means nothing across different classes. Is this the right dataset kind and folder?",
            )
        for index in range(len(dataset)):
            label = dataset.target(index)
            if label is None:
                raise DataError(f"the {self.cases} have no labels, so there is no accuracy to measure")
            if not isinstance(label, int):
                raise DataError(
                    "the images have no classes, and the model is for classification",
                    hint=f"Fitting kinds of dataset are {', '.join(self.datasets)}.",
                )
            if not 0 <= label < model.num_classes:
                raise DataError(
                    f"has the label {label}, and the model has {model.num_classes} classes "
                    f"(0 to {model.num_classes - 1})",
                    where=dataset.name(index),
                )

    def results(self, outputs: Tensor, batch: Batch) -> list[int]:
        logits, labels = outputs.cpu(), torch.tensor(batch.targets)
        # A stable order: among equal logits the lowest class comes first, so that equal logits are no right answers.
        order = logits.argsort(dim=1, descending=True, stable=True)
        ranks: list[int] = (order == labels[:, None]).int().argmax(dim=1).tolist()
        return ranks

    def sample(self, outputs: Tensor) -> Tensor:
        """The logits (B, classes)."""
        return outputs.double()

    def score(self, results: Sequence[int], model: Backbone, dataset: ImageDataset) -> ModelAccuracy:
        ranks = torch.tensor(results)
        right = int((ranks == 0).sum())
        return ModelAccuracy(
            top1=right / len(ranks),
            top5=int((ranks < 5).sum()) / len(ranks) if model.num_classes >= 5 else None,
            interval=wilson_interval(right, len(ranks)),
        )

    def compare(
        self,
        pruned: tuple[Sequence[int], ModelAccuracy],
        dense: tuple[Sequence[int], ModelAccuracy],
        dataset: ImageDataset,
    ) -> AccuracyFacts:
        first, second = (torch.tensor(results) == 0 for results in (pruned[0], dense[0]))
        labels = torch.tensor([dataset.target(index) for index in range(len(dataset))])
        names = dataset.class_names
        classes = [
            ClassChange(
                index=label,
                name=names[label] if label < len(names) else None,
                images=int(inside.sum()),
                right_dense=int(second[inside].sum()),
                right_pruned=int(first[inside].sum()),
            )
            for label in labels.unique().tolist()
            for inside in [labels == label]
        ]
        won, lost = int((first & ~second).sum()), int((second & ~first).sum())
        return AccuracyFacts(
            **pruned[1].model_dump(),
            count=len(dataset),
            dense=dense[1],
            difference=(won - lost) / len(first),
            difference_interval=paired_interval(won, lost, len(first)),
            p_value=mcnemar_p_value(won, lost),
            classes=tuple(sorted(classes, key=lambda each: (each.right_pruned - each.right_dense) / each.images)),
        )

    def changed(self, pruned: Sequence[int], dense: Sequence[int]) -> list[int]:
        return [index for index, pair in enumerate(zip(pruned, dense, strict=True)) if (pair[0] == 0) != (pair[1] == 0)]

    def told(self, outputs: Tensor) -> list[int | None]:
        return [*outputs.argmax(dim=1).tolist()]

    def estimate(self, score: ModelAccuracy) -> Estimate:
        return Estimate(score.top1, score.interval)

    def rows(self, compared: AccuracyFacts) -> list[Row]:
        found = [
            Row(
                f"top-1 on {compared.count:,} {self.cases} (95 % interval)",
                share(compared.dense.top1, compared.dense.interval),
                share(compared.top1, compared.interval),
                f"{100 * compared.difference:+.2f} points",
                in_percent(compared.difference_interval, "{:+.2f}"),
                better=gained(compared.difference_interval),
            )
        ]
        if compared.top5 is not None and compared.dense.top5 is not None:
            before, after = (
                share(top5, wilson_interval(round(top5 * compared.count), compared.count))
                for top5 in (compared.dense.top5, compared.top5)
            )
            change = f"{100 * (compared.top5 - compared.dense.top5):+.2f} points"
            found.append(Row("top-5 (95 % interval)", before, after, change))
        return found

    def brief(self, compared: AccuracyFacts) -> Row:
        return Row(
            f"top-1 on {compared.count:,} {self.cases} (%)",
            f"{100 * compared.dense.top1:.2f}",
            f"{100 * compared.top1:.2f}",
            f"{100 * compared.difference:+.2f} points",
            in_percent(compared.difference_interval, "{:+.2f}"),
        )

    def table(self, scores: Sequence[ModelAccuracy]) -> list[list[str]]:
        return [
            ["top-1 (%)", *(f"{100 * one.top1:.2f}" for one in scores)],
            ["  95 % interval", *(in_percent(one.interval, "{:.2f}") for one in scores)],
            ["top-5 (%)", *("-" if one.top5 is None else f"{100 * one.top5:.2f}" for one in scores)],
        ]

    def columns(self, score: ModelAccuracy) -> dict[str, float | None]:
        low, high = score.interval
        return {
            "top1": score.top1,
            "top1_err": 1 - score.top1,
            "top1_low": low,
            "top1_high": high,
            "top5": score.top5,
            "top5_err": None if score.top5 is None else 1 - score.top5,
        }

    def difference(self, compared: AccuracyFacts) -> str:
        return (
            f"Difference in top-1: {100 * compared.difference:+.2f} percentage points "
            f"(95 % interval {in_percent(compared.difference_interval, '{:+.2f}')}; "
            f"exact McNemar test p = {compared.p_value:.2g})"
        )

    def test(self, compared: AccuracyFacts) -> str:
        value = f"p = {compared.p_value:.2g}" if compared.p_value >= 1e-4 else "p < 0.0001"
        return f"Top-1 by an exact McNemar test: {value}."

    def losses(self, compared: AccuracyFacts, count: int) -> list[Loss]:
        return [
            Loss(
                each.name or f"class {each.index}",
                each.images,
                str(each.right_dense),
                str(each.right_pruned),
                f"{100 * (each.right_pruned - each.right_dense) / each.images:+.1f} points",
            )
            for each in compared.classes
            if each.right_pruned < each.right_dense
        ][:count]

    def answers(self, report: Report, sample: Sample) -> str:
        classes = report.accuracy.classes if report.accuracy is not None else ()
        names = {each.index: each.name for each in classes if each.name is not None}

        def said(index: int | None) -> str:
            judged = "" if sample.label is None else " (right)" if index == sample.label else " (wrong)"
            return names.get(-1 if index is None else index, f"class {index}") + judged

        truth = "" if sample.label is None else f", {names.get(sample.label, f'class {sample.label}')}"
        return (
            f"{sample.name}{truth}: the dense model says {said(sample.predicted_dense)}, "
            f"the {report.called} one {said(sample.predicted_pruned)}"
        )
