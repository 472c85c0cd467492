"""The tables of gpu.py about whole models: end to end, prune points, launches, and other families."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from gpu_clock import Clock, Plan, Report, Row, Run, cell, race, recorded
from ssmprune_cli import prepare
from ssmprune_cli.inference import Session
from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.kernels import use_backend
from ssmprune_cli.kernels.choice import BACKENDS
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import compress
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.profile import tokens_per_block

# How much is kept after which block, and what becomes of the rest.
WAYS = {
    "dense": (1.0, 1, "drop"),
    "half, after block 1": (0.5, 1, "drop"),
    "half, in sight": (0.5, 1, "context"),
}
RIVALS = {
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "ConvNeXt-T": "convnext_tiny",
}
Make = Callable[[], Backbone]


@dataclass(frozen=True)
class Bench:
    """All that a row needs."""

    clock: Clock
    report: Report
    seconds: float
    dtype: torch.dtype = torch.bfloat16

    def race(self, contestants: dict[str, Run]) -> dict[str, list[float]]:
        return race(contestants, self.clock, self.report, self.seconds)

    def pruned(self, make: Make, way: str) -> Backbone:
        keep, point, reduction = WAYS[way]
        model = make().eval()
        if keep < 1:
            compress(model, keep, points=[point], reduction=reduction, alignment="null")
        return model.to(self.clock.device, self.dtype)

    def images(self, model: Backbone, batch: int) -> Tensor:
        return model.example(batch).to(self.clock.device, self.dtype)

    def session(self, model: nn.Module, images: Tensor) -> Run:
        """A session that has seen such a batch, and has recorded it when it came again."""
        session: Session = prepare(model)
        for _ in range(3):
            session(images)
        for note in session.explain().notes:
            self.report.log(f"session of {type(model).__name__}, batch {len(images)}: {note}")
        return partial(session, images)


def end_to_end(bench: Bench, makes: dict[str, Make], batches: Sequence[int]) -> Plan:
    """Sessions of bfloat16 models; half of the tokens are dropped after the first block, or stay in sight of
    convolutions."""

    def row(name: str, make: Make, batch: int) -> list[list[str]]:
        contestants: dict[str, Run] = {}
        ideals = {}
        for way in WAYS:
            model = bench.pruned(make, way)
            images = bench.images(model, batch)
            whole = sum(stage.num_tokens * (stage.stop - stage.start) for stage in model.stages)
            ideals[way] = whole / sum(tokens_per_block(model))
            contestants |= {f"{way}, eager": partial(inferred, model, images), way: bench.session(model, images)}
        times = bench.race(contestants)
        dense, rows = statistics.median(times["dense"]), []
        for way, ideal in ideals.items():
            median = statistics.median(times[way])
            faster = dense / median
            rows.append(
                [
                    *(f"{name} b{batch}", way, cell(times.get(f"{way}, eager")), cell(times[way])),
                    *(f"{1e3 * batch / median:.0f}", f"{faster:.2f}x", f"{ideal:.2f}x", f"{faster / ideal:.0%}"),
                ]
            )
        bench.clock.forget()
        return rows

    titles = ("eager, ms a batch", "graph, ms a batch", "images/s, graph", "faster, graph", "ideal", "of ideal, graph")
    rows = [Row(f"{n} b{b}", partial(row, n, make, b)) for b in batches for n, make in makes.items()]
    return Plan("models", ("model", "tokens", *titles), rows)


def inferred(model: nn.Module, images: Tensor) -> object:
    with torch.inference_mode():
        return model(images)


def prune_points(bench: Bench, widths: dict[str, int], batches: Sequence[int], tokens: int) -> Plan:
    """Score, order and move, half of the tokens kept, by kernels of ours and by PyTorch's."""
    clock = bench.clock

    def row(name: str, dim: int, batch: int, reduction: str) -> list[list[str]]:
        hidden = torch.randn(batch, tokens, dim, device=clock.device, dtype=bench.dtype)
        positions = torch.arange(tokens, device=clock.device).expand(batch, tokens)
        sequence = TokenSequence(hidden, hidden.float(), positions, tokens, (tokens // 2,))
        ys = tuple(torch.randn(batch, tokens, 2 * dim, device=clock.device, dtype=bench.dtype) for _ in range(2))
        runs: dict[str, Run] = {
            way: partial(prune, backend, sequence, ScanStatistics(ys), reduction, tokens // 2)
            for way, backend in (("ours", "auto"), ("PyTorch", clock.sequential))
        }
        launches = [str(clock.launches(run)) for run in runs.values()]
        graphs = recorded({f"{way}, graph": run for way, run in runs.items()}, clock, bench.report)
        times = bench.race({**runs, **graphs})
        cells = [cell(times.get(way)) for way in ("ours", "ours, graph", "PyTorch", "PyTorch, graph")]
        use_backend("auto")
        return [[f"{name} b{batch}, {reduction}", *cells, *launches]]

    titles = ("eager, ms", "graph, ms", "PyTorch, eager, ms", "PyTorch, graph, ms", "kernels", "PyTorch, kernels")
    rows = [
        Row(f"{name} b{batch} {reduction}", partial(row, name, dim, batch, reduction))
        for batch in batches
        for name, dim in widths.items()
        for reduction in ("drop", "context")
    ]
    return Plan("prune_point", ("one prune point, bfloat16", *titles), rows)


def prune(
    backend: str, sequence: TokenSequence, statistics: ScanStatistics, reduction: str, count: int
) -> TokenSequence:
    use_backend(backend)
    with torch.inference_mode():
        score = IMPORTANCES.get("clip").score(sequence, statistics, 0, 0)
        return REDUCTIONS.get(reduction).apply(sequence, score, count)


def launches(bench: Bench, makes: dict[str, Make], batch: int) -> Plan:
    """Kernels a block and milliseconds of a session that may fuse blocks, and of one that may not."""

    def row(name: str, make: Make, way: str) -> list[list[str]]:
        model = bench.pruned(make, way)
        images, runs = bench.images(model, batch), {}
        runs["as prepared"] = bench.session(model, images)
        with mock.patch.object(type(BACKENDS.get(bench.clock.scans)), "fuses", False):
            runs["op by op"] = bench.session(model, images)
        times = bench.race(runs)
        blocks = len(model.mixers)
        counts = {each: f"{bench.clock.launches(run) / blocks:.1f}" for each, run in runs.items()}
        bench.clock.forget()
        return [[f"{name} b{batch}, {way}", *(text for each in runs for text in (counts[each], cell(times.get(each))))]]

    titles = [f"{way}, {what}" for way in ("as prepared", "op by op") for what in ("kernels a block", "ms")]
    rows = [Row(f"{n} {way}", partial(row, n, make, way)) for n, make in makes.items() for way in WAYS]
    return Plan("launches", ("model", *titles), rows)


def families(bench: Bench, makes: dict[str, Make], batches: Sequence[int]) -> Plan:
    """Images a second of sessions in bfloat16, and of models of timm as graphs."""

    def row(name: str, make: Make) -> list[list[str]]:
        rows = []
        for way in ("dense", "half, after block 1"):
            model = bench.pruned(make, way)
            rows.append([name, way, *speeds(partial(of_session, model))])
        return rows

    def of_session(model: Backbone, batch: int) -> Run:
        return bench.session(model, bench.images(model, batch))

    def rival(name: str, of_timm: str) -> list[list[str]]:
        import timm  # type: ignore[import-not-found, unused-ignore]

        model = timm.create_model(of_timm).eval().to(bench.clock.device, bench.dtype)

        def run(batch: int) -> Run:
            images = torch.randn(batch, 3, 224, 224, device=bench.clock.device, dtype=bench.dtype)
            return bench.clock.graphed(partial(inferred, model, images))

        return [[name, "dense", *speeds(run)]]

    def speeds(run: Callable[[int], Run]) -> list[str]:
        cells = []
        for batch in batches:
            times = bench.race({"it": run(batch)}).get("it")
            cells.append("did not run" if times is None else f"{1e3 * batch / statistics.median(times):.0f}")
            bench.clock.forget()
        return cells

    rows = [Row(name, partial(row, name, make)) for name, make in makes.items()]
    if importlib.util.find_spec("timm") is None:
        bench.report.line("\ntimm is not installed, so DeiT and ConvNeXt are left out.")
    else:
        rows += [Row(name, partial(rival, name, of_timm)) for name, of_timm in RIVALS.items()]
    return Plan("families", ("model", "tokens", *(f"images/s, batch {batch}" for batch in batches)), rows)
