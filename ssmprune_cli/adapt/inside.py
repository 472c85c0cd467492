"""`compress` for a user's own module: tokens are dropped inside its mixers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from ssmprune_cli.adapt.accelerating import check_inside, examine, put, refusal
from ssmprune_cli.adapt.adapter import Adapter
from ssmprune_cli.adapt.batches import Batch, answer_of, as_calls, caller, distance
from ssmprune_cli.adapt.mixers import has_scan
from ssmprune_cli.adapt.observe import Observed, observe
from ssmprune_cli.adapt.request import Compressed, Request
from ssmprune_cli.adapt.shorten import shorten
from ssmprune_cli.adapt.stream import FILLS, Fill, Located, Stream, Tokenwise, positions_of, stage_of
from ssmprune_cli.adapt.swap import anew, check_unreplaced
from ssmprune_cli.errors import UsageError, listing
from ssmprune_cli.interface import Stage
from ssmprune_cli.pruning import TokenPruner, calibrate

REDUCTIONS = ("context", "drop")
IMPORTANCES = ("clip", "l1", "l2", "mean", "delta", "random")  # what mixers tell; the residual stream is not seen


@torch.inference_mode(False)  # what is calibrated is to be trained with, and places are found by a gradient
def compress(
    model: nn.Module,
    keep: float | Sequence[float] | None = None,
    *,
    calibration: object,
    tokens: Sequence[int] | None = None,
    points: Sequence[int] | None = None,
    importance: str = "clip",
    reduction: str | None = None,
    alignment: str = "auto",
    protect: Sequence[int] | None = None,
    tokenwise: Sequence[str] = (),
    seed: int = 0,
) -> Compressed:
    """Make somebody's `model` drop tokens inside its mixers, in place; `restore` undoes it. See `workflows.verbs`.

    Raises UsageError for a module that has no mixers, one that is not recognised, or that no choice of tokens fits.
    """
    way = reduction or ("drop" if isinstance(model, Adapter) else "context")
    request = Request(keep, tokens, points, importance, way, alignment, seed)
    if isinstance(model, Adapter):
        if protect is not None or len(tokenwise):
            raise UsageError("an Adapter says itself what is protected, and shortens all of a block")
        batches, before = as_calls(model, calibration), model.pruner
        try:
            with anew(model), evaluated(model):
                return shorten(model, request, batches)
        except BaseException:
            model.pruner = before
            raise
    request.check_reduction(REDUCTIONS, "a module of your own")
    if importance not in IMPORTANCES:
        raise UsageError(
            f"the score {importance!r} needs the residual stream, which is not seen inside a module of your own",
            hint=f"Known here: {', '.join(IMPORTANCES)}; an `ssmprune_cli.Adapter` has all of them.",
        )
    check_inside(model)
    batches = as_calls(model, calibration)
    with anew(model), evaluated(model):
        mixers = examine(model)
        if any(each.verdict.form is None for each in mixers):
            raise refusal(mixers)
        named = tokenwise_modules(model, tokenwise)
        run = caller(model)
        modules = {name: model.get_submodule(name) for name in named}
        seen = observe(put(model, mixers), modules, run, batches[0])
        places = protected_places(seen, protect)
        stages = stages_of(seen, places)
        settings = request.settings(stages)
        located = [Located(each.__self__, each.form) for each in seen.mixers]
        stream = Stream(located, [each.name for each in seen.mixers], seen.order, stages, places, run)
        for each in seen.mixers:
            each.place = stream
        for name, module in modules.items():
            vars(module)["forward"] = Tokenwise(module, name, named[name], stream)
        found = calibrate(stream, settings, batches)
        pruner = TokenPruner(settings, stages, located, found.deltas)
        distances = fit_fill(stream, pruner, batches, places)
        stream.pruner = pruner
    forms = [each.form.kind for each in seen.mixers]
    return Compressed(
        {kind: forms.count(kind) for kind in sorted(set(forms))},
        settings.schedule.tokens_per_block(stages),
        positions_of(places, seen.lengths[-1], "protect"),
        stream.fill,
        {str(fill): value for fill, value in distances.items()},
        found,
    )


def tokenwise_modules(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Names of the modules that `patterns` name, each with its pattern. UsageError for a pattern that names none."""
    named: dict[str, str] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [name for name, _ in model.named_modules() if name and fnmatchcase(name, pattern)]
        if not found:
            names = listing(sorted({name for name, _ in model.named_children()}), 8)
            raise UsageError("names no module of the model", where=f"tokenwise {pattern!r}", hint=f"It has: {names}.")
        named.update((name, pattern) for name in found if name not in named)
    mixers = [name for name, module in model.named_modules() if has_scan(module)]
    for what, owners in (("another module that is named", list(named)), ("a mixer", mixers)):
        inside = [name for name in named if any(name.startswith(f"{owner}.") for owner in owners)]
        if inside:
            raise UsageError(f"lies inside {what}", where=f"tokenwise {inside[0]!r}")
    for name in named:
        check_unreplaced(f"tokenwise {name!r}", model.get_submodule(name))
        if any(map(has_scan, model.get_submodule(name).modules())):
            raise UsageError("has a mixer inside, which sees more than one token", where=f"tokenwise {name!r}")
    return named


def protected_places(seen: Observed, protect: Sequence[int] | None) -> tuple[int, ...]:
    """Positions that stay: those asked for; else those that the head reads, if they are a few; else, if there is an
    answer for each token as a language model gives, the last one, which says how the text goes on."""
    several = len(set(seen.lengths)) > 1
    if protect is not None:
        if several and protect:
            raise UsageError(
                f"positions are those of one sequence, and the mixers see {listing(sorted(set(seen.lengths)))} tokens",
                where="protect",
                hint="Leave it out.",
            )
        positions_of(protect, seen.lengths[-1], "protect")
        return tuple(protect)
    if several:
        return ()
    length = seen.lengths[-1]
    if seen.read is not None:
        # From the end where it is nearer, so that it holds for other lengths too.
        return tuple(place if 2 * place < length else place - length for place in seen.read)
    return (-1,) if seen.answer.ndim == 3 and seen.answer.shape[1] == length else ()


def stages_of(seen: Observed, places: tuple[int, ...]) -> tuple[Stage, ...]:
    """Runs of mixers that see as many tokens."""
    starts = [block for block, length in enumerate(seen.lengths) if not block or length != seen.lengths[block - 1]]
    return tuple(
        stage_of(start, stop, seen.lengths[start], places)
        for start, stop in zip(starts, [*starts[1:], len(seen.lengths)], strict=True)
    )


def fit_fill(
    stream: Stream, pruner: TokenPruner, batches: Sequence[Batch], places: tuple[int, ...]
) -> dict[Fill, float]:
    """Give `stream` the fill at which its answers to `batches` are nearest to the dense ones; the mean distances."""
    sums = dict.fromkeys(FILLS, 0.0)
    length = stream.stages[-1].num_tokens
    protected = positions_of(places, length, "protect")
    with torch.inference_mode():
        for batch in batches:
            stream.pruner = None
            dense = answer_of(stream.run(batch))
            for fill in FILLS:
                stream.pruner, stream.fill = pruner, fill
                sums[fill] += float(distance(dense, answer_of(stream.run(batch)), protected, length).sum())
    stream.pruner = None
    count = sum(map(len, batches))
    means = {fill: total / count for fill, total in sums.items()}
    stream.fill = min(FILLS, key=lambda fill: means[fill])
    return means


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, and each module as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
