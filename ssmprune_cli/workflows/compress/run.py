"""`ssmprune compress`: check what is asked, search for it or take it, calibrate, prune, measure, write the artefact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset, fingerprint
from ssmprune_cli.errors import MAX_MESSAGE, shown
from ssmprune_cli.models import Backbone, blocks_left_out
from ssmprune_cli.pruning import TokenPruner, known_methods
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.report import Figures, Report, Sample, SpeedFacts, TargetFacts
from ssmprune_cli.tasks import TASKS, Estimate
from ssmprune_cli.workflows.compress.distillation import check_distillable
from ssmprune_cli.workflows.compress.fastest import fastest
from ssmprune_cli.workflows.compress.file_size import small_enough
from ssmprune_cli.workflows.compress.make import Progress, make
from ssmprune_cli.workflows.compress.request import CompressRequest
from ssmprune_cli.workflows.compress.savings import savings
from ssmprune_cli.workflows.compress.settings import rounded
from ssmprune_cli.workflows.evaluate import evaluate, identity, shared
from ssmprune_cli.workflows.identity import weights_sha256
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.reporting import (
    calibration_facts,
    figures,
    pruning_facts,
    repair_facts,
    report_files,
    samples,
    speed_facts,
    versions,
)
from ssmprune_cli.workflows.search import Found, SearchPlan, SearchResult, open_search, search
from ssmprune_cli.workflows.search import Limits as SearchLimits
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.write import check_place


@dataclass(frozen=True)
class CompressResult:
    """What came of it: the facts, with a verdict on every limit, and the artefact, which a dry run does not have.

    warnings  what a reader must know, those of the report included
    """

    report: Report
    out: Path | None
    warnings: tuple[str, ...] = ()


def compress_checkpoint(request: CompressRequest, progress: Progress | None = None) -> CompressResult:
    """Do what `request` asks: write the artefact folder atomically, or say what would be in it.

    The same input, recipe and seed give the same bytes, but for the reports, which hold measured times. Raises
    UsageError for requests that make no sense, SsmpruneError for what goes wrong; the folder is then as it was before.
    """
    request.check()
    recipe = request.resolved()
    request.source.check_pinned(recipe.provenance)
    if recipe.pruning.distill_steps:
        check_distillable(request.source.load())
    out = request.out
    if request.dry_run or out is None:
        report = _planned(request, recipe)
        return CompressResult(report, None, report.warnings)
    checkpoint.check_writable(out, overwrite=request.overwrite)
    check_place(request.state, "--state")
    resolve_device(request.device)
    evaluation = _evaluation(request)  # what is wrong with it is said before a search, which may take an hour
    if not request.searched:
        report = _compressed(request, recipe, out, evaluation, None, progress)
        return CompressResult(report, out, report.warnings)
    result = _search(request, recipe, evaluation, progress)
    (found,) = result.found
    report = _compressed(request, _delivered(found.recipe, recipe), out, evaluation, found, progress)
    result.state.remove()
    return CompressResult(report, out, tuple(dict.fromkeys((*result.warnings, *report.warnings))))


def _evaluation(request: CompressRequest) -> ImageDataset | None:
    """The images to judge on. Raises DataError if the model cannot be judged on them, UsageError for another task's
    limits."""
    if request.data is None:
        return None
    model = request.source.load()
    task = request.judging(model.task)
    request.limits.fit(task)
    dataset = task.open(request.data, request.dataset, model=model)
    task.check(model, dataset)
    return dataset


def _search(
    request: CompressRequest, recipe: Recipe, evaluation: ImageDataset | None, progress: Progress | None
) -> SearchResult:
    assert request.calib is not None  # by request.check
    reduction, alignment = (None if name == "auto" else name for name in (request.reduction, request.alignment))
    plan = SearchPlan(
        calib=request.calib,
        methods=list(known_methods(request.importance, reduction, alignment)),
        budgets=() if request.budget is None else (request.budget,),
        latency_ms=request.target_latency,
        resize=not request.keep_image_size,
        cut=not request.keep_blocks,
        repair=recipe.pruning.repair,
        repair_images=recipe.calibration.images,
        batch_size=request.batch_size,
        calibration=recipe.calibration.model_copy(update={"images": request.search_images(recipe)}),
        seed=recipe.seed,
        limits=SearchLimits(request.evaluations, request.time_limit),
        device=request.device,
        state=request.state_file,
        int8=recipe.pruning.weights == "int8",
    )
    if not request.by_drop:
        return search(request.source, plan, progress)
    assert evaluation is not None
    searches = open_search(request.source, plan, progress)
    reference = request.source.load().to(resolve_device(request.device))
    limits = Limits(max_drop=request.limits.max_drop, judge=request.limits.judge)

    def holds(found: Found) -> bool:
        wanted = request.fitted(_delivered(found.recipe, recipe), TASKS.get(reference.task))
        model = make(request, wanted, reference, progress).model
        done = progress(f"Judging {found.budget.value:g} of the time") if progress else None
        result = evaluate(
            model,
            evaluation,
            compare=reference,
            limit=request.limit,
            task=request.judging(model.task),
            device=request.device,
            progress=done,
        )
        verdicts = limits.check(result.task, score=result.comparison, comparison=result.comparison)
        return all(each.holds for each in verdicts)

    best, task = fastest(searches, holds), searches.measurements.task
    return SearchResult([best], *searches.counts, searches.state, task, searches.warnings)


def _delivered(found: Recipe, asked: Recipe) -> Recipe:
    """What a search `found`, to be trained as `asked`. Where eight bits were asked for, and it left all weights in
    float, they are measured once more on the model that was found."""
    others = {"weights": asked.pruning.weights, "distill_steps": asked.pruning.distill_steps}
    return found.model_copy(update={"pruning": found.pruning.model_copy(update=others)})


def _planned(request: CompressRequest, recipe: Recipe) -> Report:
    """Tokens per block and multiply-adds: what is known without images."""
    reference = request.source.load()
    dense, weights = figures(reference), weights_sha256(reference)
    model = request.made_smaller(reference, recipe)
    settings = request.settings(model, recipe)
    if settings is not None:
        model.pruner = TokenPruner(settings, model.stages, model.mixers)  # calibrated or not, it costs the same
    report = _report(request.source, model, recipe, dense, {"weights_sha256": weights})
    warnings = [*request.source.warnings(), *reference.notes, *TASKS.get(model.task).remarks]
    warnings += rounded(settings, recipe.pruning, model)
    if request.calib is not None and settings is not None and recipe.pruning.reduction == "auto":
        warnings.append(
            f"The reduction is chosen on the calibration images, which a dry run does not read: this is for "
            f"{settings.reduction!r}."
        )
    report = report.model_copy(update={"warnings": tuple(warnings)})
    return _judged(report, request.limits)


def _compressed(
    request: CompressRequest,
    recipe: Recipe,
    out: Path,
    evaluation: ImageDataset | None,
    found: Found | None,
    progress: Progress | None,
) -> Report:
    """Compress by `recipe`, which may have been `found` by a search, and write the artefact."""
    source = request.source
    target = resolve_device(request.device)
    reference = source.load().to(target)
    dense, recipe = figures(reference), request.fitted(recipe, TASKS.get(reference.task))
    if request.target_size is None:
        made = make(request, recipe, reference, progress)
    else:
        recipe, made = small_enough(request, recipe, reference, progress)
    model, images, settings = made.model, made.images, made.settings
    remarks = TASKS.get(model.task).remarks
    warnings = [*source.warnings(), *reference.notes, *remarks, *made.warnings]
    warnings += () if evaluation is None else evaluation.notes
    result = None
    if evaluation is not None:
        done = progress("Evaluating") if progress else None
        result = evaluate(
            model,
            evaluation,
            compare=reference,
            limit=request.limit,
            task=request.judging(model.task),
            device=str(target),
            progress=done,
        )
        warnings += evaluation.notes  # what was noticed when they were read
        if images is not None and made.uses_images:
            warnings += _seen_before(request, evaluation, images)
    done = progress("Timing") if progress else None
    speed = speed_facts(reference, model, str(target), request.batch_size, done)
    warnings += _slow(speed)
    chosen = evaluation if evaluation is not None else images
    differs = settings is None or made.drops
    drawn: tuple[Sample, ...] = ()
    files: dict[str, bytes] = {}
    if chosen and differs and request.samples and TASKS.get(model.task).shows:
        changed = None if result is None else result.changed
        drawn, files = samples(model, reference, chosen, request.samples, target, changed)
    eight_bits = None
    if made.eight_bits is not None:
        eight_bits = made.eight_bits.facts()
        if made.eight_bits.chosen:
            if progress:
                progress("Measuring both savings")
            apart, slower = savings(
                reference,
                model,
                evaluation,
                task=request.judging(model.task),
                limit=request.limit,
                batch_size=speed.batch_size,
                rounds=speed.rounds,
                device=str(target),
            )
            warnings += slower
            eight_bits = eight_bits.model_copy(update={"models": apart})
    provenance = {
        "weights_sha256": weights_sha256(reference),
        "calibration_images": len(images) if images is not None and made.uses_images else 0,
        "calibration_sha256": fingerprint(images) if images is not None else None,
        "evaluation_sha256": identity(evaluation, request.limit) if evaluation is not None else None,
        **_judged_on(request, model.task),
    }
    report = _report(source, model, recipe, dense, provenance).model_copy(
        update={
            **({result.task.section: result.comparison} if result else {}),
            "speed": speed,
            "calibration": calibration_facts(made.seen) if made.seen else None,
            "reductions": made.reductions or None,
            "repair": repair_facts(made.repaired) if made.repaired else None,
            "distillation": made.distilled,
            "eight_bits": eight_bits,
            "search": None if found is None else tuple(found.trace()),
            "samples": drawn,
            "warnings": tuple(dict.fromkeys(warnings)),  # of the same images the same is said
        }
    )
    report = _targeted(_judged(report, request.limits), request, checkpoint.weights_size(model))
    used: dict[str, Any] = {} if report.pruning is None else report.pruning.model_dump(mode="json")
    if made.repaired is not None:  # a training makes the repaired head the model's own
        used["repair"] = made.repaired.kind
    trained = made.distilled is not None and made.distilled.kept  # all weights are others than the dense model's
    if trained:
        used["distill_steps"] = recipe.pruning.distill_steps
    size = {"image_size": recipe.pruning.image_size, "cut_blocks": recipe.pruning.cut_blocks}
    if made.eight_bits is not None and made.eight_bits.chosen:
        used |= {"weights": "int8", "int8": list(made.eight_bits.chosen)}
    elif recipe.pruning.weights == "int8":
        used |= {"weights": "float", "int8": None}  # all weights have stayed in float
        if report.pruning is None and not any(size.values()):
            used["keep"] = 1.0  # a recipe says so by keeping all
    final = recipe.resolved({**size, **used}, report.provenance)
    if request.command:
        command = shown(request.command, MAX_MESSAGE)
        report = report.model_copy(update={"provenance": {**report.provenance, "command": command}})
    contents: dict[str, bytes | str] = {
        "recipe.yaml": final.to_yaml(),
        **TASKS.get(model.task).files(reference),
        **files,
        **report_files(report, files),
    }
    if made.seen is not None:
        points = [point.to_dict() for point in made.seen.points]
        contents["calibration.json"] = json.dumps({"images": made.seen.images, "points": points}, indent=1) + "\n"
    checkpoint.save(out, model.cpu(), contents, dense=None if trained else reference, overwrite=request.overwrite)
    return report


def _judged_on(request: CompressRequest, task: str) -> dict[str, str]:
    """The kind of the images that both models are judged on, if they are, and what windows they are seen through."""
    if request.data is None:
        return {}
    windows = {} if request.slide is None else {"evaluation_slide": ",".join(map(str, request.slide))}
    return {"evaluation_dataset": request.dataset or TASKS.get(task).kind(request.data), **windows}


def _seen_before(request: CompressRequest, evaluation: ImageDataset, images: ImageDataset) -> list[str]:
    """A warning if models were made by images that they are judged on. Those of folders apart are taken to differ."""
    assert request.data is not None and request.calib is not None
    data, calib = request.data.resolve(), request.calib.resolve()
    if data != calib and data not in calib.parents and calib not in data.parents:
        return []
    count = shared(evaluation, request.limit, images)
    if not count:
        return []
    return [
        f"{count} of the --data images are among the --calib images, by which the model was made: it is judged too "
        "kindly. Give others."
    ]


def _targeted(report: Report, request: CompressRequest, size: int) -> Report:
    """With what was asked for, if that was a target, and a warning if it is missed. `size`: bytes of the weights."""
    speed, pruned = report.speed, report.pruned
    assert speed is not None and pruned is not None
    kind: Literal["latency_ratio", "latency_ms", "multiply_adds"]
    kind, value, measured = "latency_ratio", request.target_latency_ratio, speed.latency_ratio
    how = f"of the dense model's time, for a batch of {speed.batch_size} on {speed.device}"
    if request.target_speedup is not None:
        value = 1 / request.target_speedup
    elif request.target_latency is not None:
        kind, value, measured = "latency_ms", request.target_latency, speed.pruned.median_ms
        how = f"ms a batch of {speed.batch_size} on {speed.device}"
    elif request.target_flops is not None:
        kind, value, how = "multiply_adds", request.target_flops, "of the dense multiply-adds"
        measured = pruned.multiply_adds_all_directions / report.dense.multiply_adds_all_directions
    elif request.by_drop:
        verdict = next(each for each in report.limits if each.name == "max_drop")
        target = TargetFacts(kind="max_drop", value=verdict.limit, measured=verdict.value, met=verdict.holds)
        return report.model_copy(update={"target": target})
    elif request.target_size is not None:  # met, or nothing was made
        target = TargetFacts(kind="size_bytes", value=request.target_size, measured=size, met=True)
        return report.model_copy(update={"target": target})
    if value is None:
        return report
    target = TargetFacts(kind=kind, value=value, measured=measured, met=measured <= value)
    warnings = report.warnings
    if not target.met:
        text = f"Asked for were {value:.4g} {how}; {measured:.4g} were measured in the end."
        hint = "A busy machine times badly: try again, or ask for a little less."
        warnings = (*warnings, f"{text} {hint}")
    return report.model_copy(update={"target": target, "warnings": warnings})


def _slow(speed: SpeedFacts) -> list[str]:
    """A warning if the model does not get faster by what was done to it."""
    low, high = speed.latency_ratio_interval
    if high < 1:
        return []
    how = "slower than the dense one" if low > 1 else "no faster than the dense one, as far as the timing tells"
    return [
        f"On {speed.device} with a batch of {speed.batch_size} the model is {how} ({speed.latency_ratio:.2f} times the "
        "time). Other batches may differ (`ssmprune profile --batch-size`); `--target-latency-ratio` searches by time."
    ]


def _judged(report: Report, limits: Limits) -> Report:
    """With a verdict on every limit whose value is in `report`."""
    task, dense, pruned, speed = TASKS.get(report.task), report.dense, report.pruned, report.speed
    compared = task.facts(report)
    assert pruned is not None
    verdicts = limits.check(
        task,
        score=compared,
        comparison=compared,
        flops=pruned.multiply_adds_all_directions / dense.multiply_adds_all_directions,
        latency_ratio=None if speed is None else Estimate(speed.latency_ratio, speed.latency_ratio_interval),
    )
    return report.model_copy(update={"limits": verdicts})


def _report(source: Source, model: Backbone, recipe: Recipe, dense: Figures, provenance: dict[str, Any]) -> Report:
    """What is known before anything is measured."""
    pruner = model.pruner
    return Report(
        family=model.family,
        task=model.task,
        image_size=model.image_size,
        resized_from=model.config.resized_from,
        blocks_left_out=tuple(block + 1 for block in blocks_left_out(model)),
        parameters=model.parameter_count,
        pruning=pruning_facts(pruner, recipe.pruning.keep) if isinstance(pruner, TokenPruner) else None,
        dense=dense,
        pruned=figures(model),
        provenance={
            **source.origin,
            **provenance,
            **versions(next(model.parameters()).device),
        },
    )
