"""Language: the token that comes next, judged by the share of right first guesses and by perplexity.

Of each window the last tokens are judged, those that are never dropped. The blocks are causal, so their answers are
what a pruned prefill of the tokens before them gives when these are read one after another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssmprune_cli.data import (
    TOKENIZER,
    Batch,
    ImageDataset,
    Split,
    chosen,
    differing,
    encoder,
    open_dataset,
    open_text,
    read_tokenizer,
)
from ssmprune_cli.errors import DataError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import TextWindow
from ssmprune_cli.report import Interval, LanguageFacts, ModelLanguage, Report, Sample
from ssmprune_cli.tasks.bootstrap import Floats, interval, resamples
from ssmprune_cli.tasks.task import Estimate, Loss, Row, Task, drop_limit
from ssmprune_cli.tasks.words import gained, in_percent, share

_SAMPLED = 8  # tokens of a window whose logits a distance is computed from: vocabularies are large
_MOST_NATS = 700.0  # whose exponential is a float


class Answer(NamedTuple):
    """Of one window, for each token judged: the nats by which it surprised, and the first guess; and the tokens."""

    nats: tuple[float, ...]
    guesses: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def right(self) -> int:
        return sum(guess == token for guess, token in zip(self.guesses, self.tokens, strict=True))


class Language(Task[ModelLanguage, LanguageFacts]):
    """A result is an Answer."""

    name = "language"
    datasets = ("text",)
    section = "language"
    quality = "perplexity"
    parts = ("text", "texts")
    part_metric = "right"
    unharmed = "The text is judged as a whole."
    metric = "next-token accuracy"
    hub_task = "text-generation"
    hub_metric = "accuracy"
    key = "next_token_accuracy"
    most = 8
    shows = False
    cases = "windows of text"
    limits = (drop_limit("next-token accuracy"),)
    remarks = (
        "Of each window of text the last tokens are judged, which are never dropped; `--protect-last` says how many.",
    )

    def kind(self, path: Path) -> str:
        return "text"

    def _opened(self, kind: str, path: Path, split: Split, model: Backbone | None) -> ImageDataset:
        if model is None:
            return open_dataset(kind, path)  # which says that it takes a model
        way = model.preprocessing
        assert isinstance(way, TextWindow)
        return open_text(path, split).windows(encoder(model.folder, way.vocabulary), way)

    def calibration(self, model: Backbone, path: Path, count: int, seed: int) -> ImageDataset:
        return differing(chosen(self.open(path, split="train", model=model), count, seed), path)

    def files(self, model: Backbone) -> dict[str, bytes]:
        """The tokenizer, if it has one."""
        content = read_tokenizer(model.folder)
        return {} if content is None else {TOKENIZER: content}

    def check(self, model: Backbone, dataset: ImageDataset) -> None:
        """The windows must be those of `model`."""
        for index in range(min(1, len(dataset))):
            if not isinstance(dataset.target(index), tuple):
                raise DataError("the data have no text, and the model is for language")
            dataset.prepared(index, model.preprocessing)  # raises for windows of another model

    def results(self, outputs: Tensor, batch: Batch) -> list[Answer]:
        judged = outputs.shape[2]
        following = [target[-judged:] for target in batch.targets if isinstance(target, tuple)]
        answers = []
        for logits, tokens in zip(outputs, following, strict=True):  # one by one: in float64 (V, K) is large
            right = torch.tensor(tokens, device=logits.device)[None]  # (1, K)
            nats = -logits.double().log_softmax(dim=0).gather(0, right)[0]
            answers.append(Answer(tuple(nats.tolist()), tuple(logits.argmax(dim=0).tolist()), tokens))
        return answers

    def sample(self, outputs: Tensor) -> Tensor:
        """The logits (B, V, k) of a few of the last tokens, from all over them; the very last one is among them."""
        count = outputs.shape[2]
        few = min(count, _SAMPLED)
        places = [(number + 1) * count // few - 1 for number in range(few)]
        return outputs[:, :, places].float()

    def score(self, results: Sequence[Answer], model: Backbone, dataset: ImageDataset) -> ModelLanguage:
        counts, nats, right = _counts(results), _nats(results), _rights(results)
        nats_interval, interval_of_right = _within(counts, nats, right)
        mean = float(nats.sum() / counts.sum())
        return ModelLanguage(
            tokens=int(counts.sum()),
            nats=mean,
            perplexity=math.exp(min(mean, _MOST_NATS)),
            perplexity_interval=_exponential(nats_interval),
            next_token_accuracy=float(right.sum() / counts.sum()),
            interval=interval_of_right,
        )

    def compare(
        self,
        pruned: tuple[Sequence[Answer], ModelLanguage],
        dense: tuple[Sequence[Answer], ModelLanguage],
        dataset: ImageDataset,
    ) -> LanguageFacts:
        own, before = pruned[0], dense[0]
        counts = _counts(own)
        agree = np.array([_agreeing(*pair) for pair in zip(own, before, strict=True)], dtype=np.float64)
        gain = _rights(own) - _rights(before)
        nats = _nats(own) - _nats(before)
        difference_interval, ratio_interval, agreement_interval = _within(counts, gain, nats, agree)
        ratio = math.exp(min(float(nats.sum() / counts.sum()), _MOST_NATS))
        return LanguageFacts(
            **pruned[1].model_dump(),
            count=len(own),
            dense=dense[1],
            difference=float(gain.sum() / counts.sum()),
            difference_interval=difference_interval,
            perplexity_ratio=ratio,
            perplexity_ratio_interval=_exponential(ratio_interval),
            agreement=float(agree.sum() / counts.sum()),
            agreement_interval=agreement_interval,
        )

    def changed(self, pruned: Sequence[Answer], dense: Sequence[Answer]) -> list[int]:
        return [number for number, pair in enumerate(zip(pruned, dense, strict=True)) if pair[0].right != pair[1].right]

    def estimate(self, score: ModelLanguage) -> Estimate:
        return Estimate(score.next_token_accuracy, score.interval)

    def rows(self, compared: LanguageFacts) -> list[Row]:
        ends = compared.perplexity_ratio_interval
        return [
            Row(
                f"perplexity of {compared.tokens:,} tokens in {compared.count:,} windows (95 % interval)",
                _perplexity(compared.dense),
                _perplexity(compared),
                f"{100 * (compared.perplexity_ratio - 1):+.2f} %",
                "" if ends is None else in_percent((ends[0] - 1, ends[1] - 1), "{:+.2f}"),
                better=None if ends is None else gained((1 - ends[1], 1 - ends[0])),
            ),
            Row(
                "next-token accuracy (95 % interval)",
                share(compared.dense.next_token_accuracy, compared.dense.interval),
                share(compared.next_token_accuracy, compared.interval),
                f"{100 * compared.difference:+.2f} points",
                _ends(compared.difference_interval, "{:+.2f}"),
                better=gained(compared.difference_interval),
            ),
            Row("same first guess (95 % interval)", "-", share(compared.agreement, compared.agreement_interval), ""),
        ]

    def brief(self, compared: LanguageFacts) -> Row:
        return Row(
            f"next-token accuracy on {compared.tokens:,} tokens (%)",
            f"{100 * compared.dense.next_token_accuracy:.2f}",
            f"{100 * compared.next_token_accuracy:.2f}",
            f"{100 * compared.difference:+.2f} points",
            _ends(compared.difference_interval, "{:+.2f}"),
        )

    def briefs(self, compared: LanguageFacts) -> list[Row]:
        change = f"{100 * (compared.perplexity_ratio - 1):+.2f} %"
        agreement = f"{100 * compared.agreement:.2f}"
        return [
            Row("perplexity", f"{compared.dense.perplexity:.3f}", f"{compared.perplexity:.3f}", change),
            Row("same first guess (%)", "-", agreement, ""),
        ]

    def table(self, scores: Sequence[ModelLanguage]) -> list[list[str]]:
        return [
            ["perplexity", *(f"{one.perplexity:.3f}" for one in scores)],
            ["  95 % interval", *(_numbers(one.perplexity_interval) for one in scores)],
            ["next-token accuracy (%)", *(f"{100 * one.next_token_accuracy:.2f}" for one in scores)],
            ["  95 % interval", *(_ends(one.interval, "{:.2f}") for one in scores)],
            ["tokens judged", *(f"{one.tokens:,}" for one in scores)],
        ]

    def columns(self, score: ModelLanguage) -> dict[str, float | None]:
        low, high = (None, None) if score.interval is None else score.interval
        return {
            "next_token_accuracy": score.next_token_accuracy,
            "next_token_accuracy_low": low,
            "next_token_accuracy_high": high,
        }

    def difference(self, compared: LanguageFacts) -> str:
        ratio = f"Perplexity: {compared.perplexity_ratio:.4f} times the dense model's{self._interval(compared)}"
        return (
            f"{ratio}. Next-token accuracy: {100 * compared.difference:+.2f} points"
            f"{_brackets(_ends(compared.difference_interval, '{:+.2f}'))}. Both models have the same first guess for "
            f"{100 * compared.agreement:.2f} % of the tokens{_brackets(_ends(compared.agreement_interval, '{:.2f}'))}."
        )

    def _interval(self, compared: LanguageFacts) -> str:
        ends = compared.perplexity_ratio_interval
        if ends is None:
            return " (one window has no interval)"
        return f" (95 % interval {ends[0]:.4f} to {ends[1]:.4f}; paired bootstrap over {compared.count:,} windows)"

    def test(self, compared: LanguageFacts) -> str:
        return f"Perplexity {compared.perplexity_ratio:.4f} times the dense model's{self._interval(compared)}."

    def losses(self, compared: LanguageFacts, count: int) -> list[Loss]:
        return []

    def answers(self, report: Report, sample: Sample) -> str:
        return sample.name


def _counts(answers: Sequence[Answer]) -> Floats:
    return np.array([len(each.tokens) for each in answers], dtype=np.float64)


def _rights(answers: Sequence[Answer]) -> Floats:
    return np.array([each.right for each in answers], dtype=np.float64)


def _nats(answers: Sequence[Answer]) -> Floats:
    return np.array([math.fsum(each.nats) for each in answers], dtype=np.float64)


def _agreeing(pruned: Answer, dense: Answer) -> int:
    return sum(one == other for one, other in zip(pruned.guesses, dense.guesses, strict=True))


def _within(counts: Floats, *values: Floats) -> list[Interval | None]:
    """Of the mean a token of each of `values`: those of one window stay together. None of one window."""
    if len(counts) < 2:
        return [None for _ in values]
    columns = np.stack((counts, *values), axis=1)  # (N, 1 + figures)
    total, *sums = np.concatenate([times @ columns for times in resamples(len(counts))]).T  # (R,) each
    pairs = zip(sums, values, strict=True)
    return [interval(drawn / total, float(own.sum() / counts.sum())) for drawn, own in pairs]


def _exponential(ends: Interval | None) -> Interval | None:
    return None if ends is None else (math.exp(min(ends[0], _MOST_NATS)), math.exp(min(ends[1], _MOST_NATS)))


def _perplexity(score: ModelLanguage) -> str:
    return f"{score.perplexity:.3f}{_brackets(_numbers(score.perplexity_interval))}"


def _numbers(ends: Interval | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _ends(ends: Interval | None, form: str) -> str:
    return "" if ends is None else in_percent(ends, form)


def _brackets(text: str) -> str:
    return text and f" ({text})"
