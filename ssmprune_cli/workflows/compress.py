"""`ssmprune compress`: check what is asked, search for it or take it, calibrate, prune, measure, write the artefact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset, batches, calibration_images, fingerprint
from ssmprune_cli.errors import MAX_MESSAGE, UsageError, shown
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import (
    PruneSchedule,
    PruneSettings,
    TokenPruner,
    choose_alignment,
    compress,
    known_methods,
    restore,
)
from ssmprune_cli.recipe import Pruning, Recipe, load_recipe
from ssmprune_cli.report import Figures, Report, Sample, SpeedFacts
from ssmprune_cli.tasks import TASKS, Estimate
from ssmprune_cli.workflows.evaluate import evaluate, identity
from ssmprune_cli.workflows.identity import weights_sha256
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.reporting import (
    calibration_facts,
    figures,
    pruning_facts,
    report_files,
    samples,
    speed_facts,
    versions,
)
from ssmprune_cli.workflows.search import Found, SearchPlan, SearchResult, search, state_file
from ssmprune_cli.workflows.search import Limits as SearchLimits
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.write import check_place

Progress = Callable[[str], Callable[[int, int], None]]  # what is being done -> (done, total) callback

SEARCH_IMAGES = 256  # unless the user says how many: a search needs more to choose by than a calibration
_KEEP_ALL = Pruning(keep=1.0)  # of a recipe whose amounts come from elsewhere


@dataclass(frozen=True)
class CompressRequest:
    """What a user asks for, as typed: None is what was not typed.

    keep, tokens, points  lists as text, "0.9,0.8" or "150,120,90"
    target_...     search for what to keep: a share of the dense multiply-adds, or ms for a batch of `batch_size`
    evaluations, time_limit, state  how long the search goes on, and its file (beside `out` unless typed)
    calib          unlabelled calibration images: a folder, an ImageFolder tree or an .npz
    recipe         a file, or the name of a shipped one; `overrides` are "key=value" in it
    data      labelled images, of the kind `dataset`, on which both models are judged; `limit` of them
    samples        so many of them (or of the calibration images) are put into the artefact, for its report
    dry_run        read no images and write nothing
    command        how to do it again, for the report
    """

    source: Source
    keep: str | None = None
    tokens: str | None = None
    target_flops: float | None = None
    target_latency: float | None = None
    batch_size: int = 8
    evaluations: int = 200
    time_limit: float | None = None
    state: Path | None = None
    points: str | None = None
    importance: str | None = None
    reduction: str | None = None
    alignment: str | None = None
    calib: Path | None = None
    calib_images: int | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    data: Path | None = None
    dataset: str | None = None
    limit: int | None = None
    samples: int = 4
    limits: Limits = field(default_factory=Limits)
    out: Path | None = None
    overwrite: bool = False
    device: str = "cpu"
    seed: int | None = None
    dry_run: bool = False
    command: str = ""

    @property
    def searched(self) -> bool:
        return self.target_flops is not None or self.target_latency is not None

    @property
    def state_file(self) -> Path | None:
        """Where a search keeps what it has measured; None if there is no search, or nowhere to write."""
        if not self.searched or self.out is None:
            return self.state
        return self.state or state_file(self.out)

    def check(self) -> None:
        """Raises UsageError for options that contradict each other, or that nothing would come of."""
        if self.keep is not None and self.tokens is not None:
            raise UsageError("--keep and --tokens both say how much to keep: give one of them")
        if self.searched:
            self._check_search()
        elif self.time_limit is not None or self.state is not None:
            given = "--state" if self.time_limit is None else "--time-limit"
            raise UsageError(f"{given} is for a search: it needs --target-flops or --target-latency")
        amounts = ("pruning.keep=", "pruning.tokens=")
        said = self.keep is not None or self.tokens is not None or self.recipe is not None or self.searched
        if not said and not any(text.startswith(amounts) for text in self.overrides):
            raise UsageError("how much to keep?", hint="Give `--keep 0.6`, `--tokens 150,120,90` or `--recipe FILE`.")
        typed = {key for key, _, _ in self._settings()}
        for text in self.overrides:
            key = text.partition("=")[0].strip()
            if key in typed:
                raise UsageError(f"another option says what {key} is: give one of them", where=f"--set {text}")
        if self.calib is None and self.calib_images is not None:
            raise UsageError("--calib-images needs --calib, the images to choose from")
        if self.data is None:
            for value, option in ((self.dataset, "--dataset"), (self.limit, "--limit")):
                if value is not None:
                    raise UsageError(f"{option} needs --data, the images that it is about")
            self.limits.require(("max_drop", "min_accuracy"), "--data, the images to measure accuracy on")
        if self.dry_run:
            measured = ("max_drop", "min_accuracy", "max_latency_ratio")
            self.limits.require(measured, "a run: nothing is measured in a dry run")
        elif self.out is None:
            raise UsageError("--out is missing", hint="Give `--out FOLDER`, or `--dry-run` to see what would be done.")

    def _check_search(self) -> None:
        ways = (self.target_flops, self.target_latency, self.keep, self.tokens, self.points, self.recipe)
        if sum(each is not None for each in ways) > 1:
            raise UsageError("a target settles what to keep: give one, without --keep, --tokens, --points or --recipe")
        for text in self.overrides:
            if text.startswith("pruning."):
                raise UsageError(
                    "a target settles how to prune",
                    where=f"--set {text}",
                    hint="Give `--importance`, `--reduction` and `--alignment` to search among those only.",
                )
        if self.calib is None:
            raise UsageError("a search needs calibration images", hint="Give `--calib DIR` with a few dozen of them.")
        if self.dry_run:
            raise UsageError("a search reads images, so it cannot be a dry run")

    def _settings(self) -> list[tuple[str, str | int, str]]:
        """Keys of a recipe that options set, their values as YAML, and the options."""
        settings: list[tuple[str, str | int | None, str]] = []
        if self.keep is not None:
            settings += [("pruning.keep", _list(self.keep), "--keep"), ("pruning.tokens", "null", "--keep")]
        if self.tokens is not None:
            settings += [("pruning.tokens", f"[{self.tokens}]", "--tokens"), ("pruning.keep", "null", "--tokens")]
        settings += [
            ("pruning.points", None if self.points is None else f"[{self.points}]", "--points"),
            ("pruning.importance", self.importance, "--importance"),
            ("pruning.reduction", self.reduction, "--reduction"),
            ("pruning.alignment", self.alignment, "--alignment"),
            ("calibration.images", self.calib_images, "--calib-images"),
            ("calibration.seed", self.seed, "--seed"),
            ("seed", self.seed, "--seed"),
        ]
        return [(key, value, option) for key, value, option in settings if value is not None]

    def resolved(self) -> Recipe:
        """The recipe to follow; a search replaces its pruning section. Raises RecipeError or UsageError."""
        base = Recipe(pruning=_KEEP_ALL) if self.recipe is None else load_recipe(self.recipe)
        settings = [f"{key}={value}" for key, value, _ in self._settings()]
        if self.searched and self.calib_images is None:
            settings.append(f"calibration.images={SEARCH_IMAGES}")
        options = {key: option for key, _, option in self._settings()}
        return base.override([*settings, *self.overrides], options)

    def settings(self, model: Backbone, recipe: Recipe) -> PruneSettings:
        """What `recipe`, resolved from this request, means for `model`. Raises UsageError for what does not fit."""
        try:
            return recipe_settings(model, recipe, calibrated=self.calib is not None)
        except UsageError as error:
            names = ("keep", "tokens", "points", "importance", "reduction", "alignment")
            typed = " ".join(f"--{name} {getattr(self, name)}" for name in names if getattr(self, name) is not None)
            raise UsageError(error.what, where=typed or error.where, hint=error.hint) from error


@dataclass(frozen=True)
class CompressResult:
    """What came of it: the facts, with a verdict on every limit, and the artefact, which a dry run does not have.

    warnings  what a reader must know, those of the report included
    notes     what else is of interest
    """

    report: Report
    out: Path | None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compress_checkpoint(request: CompressRequest, progress: Progress | None = None) -> CompressResult:
    """Do what `request` asks: write the artefact folder atomically, or say what would be in it.

    The same input, recipe and seed give the same bytes, but for the reports, which hold measured times. Raises
    UsageError for requests that make no sense, SsmpruneError for what goes wrong; the folder is then as it was before.
    """
    request.check()
    recipe = request.resolved()
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
    result = _search(request, recipe, out, progress)
    (found,) = result.found
    report = _compressed(request, found.recipe, out, evaluation, found, progress)
    result.state.remove()
    notes: tuple[str, ...] = ()
    if found.latency_ms is not None and found.dense_latency_ms is not None:
        notes = (f"A batch takes {found.latency_ms:.1f} ms; dense {found.dense_latency_ms:.1f} ms.",)
    return CompressResult(report, out, (*result.warnings, *report.warnings), notes)


def _evaluation(request: CompressRequest) -> ImageDataset | None:
    """The labelled images. Raises DataError if the model cannot be judged on them."""
    if request.data is None:
        return None
    model = request.source.load()
    task = TASKS.get(model.task)
    dataset = task.open(request.data, request.dataset)
    task.check(model, dataset)
    return dataset


def _search(request: CompressRequest, recipe: Recipe, out: Path, progress: Progress | None) -> SearchResult:
    assert request.calib is not None  # by request.check
    alignment = None if request.alignment == "auto" else request.alignment
    plan = SearchPlan(
        calib=request.calib,
        methods=list(known_methods(request.importance, request.reduction, alignment)),
        flops=() if request.target_flops is None else (request.target_flops,),
        latency_ms=request.target_latency,
        batch_size=request.batch_size,
        calibration=recipe.calibration,
        seed=recipe.seed,
        limits=SearchLimits(request.evaluations, request.time_limit),
        device=request.device,
        state=request.state_file,
    )
    return search(request.source, plan, progress)


def _planned(request: CompressRequest, recipe: Recipe) -> Report:
    """Tokens per block and multiply-adds: what is known without images."""
    model = request.source.load()
    dense = figures(model)
    settings = request.settings(model, recipe)
    model.pruner = TokenPruner(settings, model.stages, model.mixers)  # calibrated or not, it costs the same
    report = _report(request.source, model, recipe, dense, {})
    report = report.model_copy(update={"warnings": tuple(request.source.warnings())})
    return _judged(report, request.limits)


def recipe_settings(model: Backbone, recipe: Recipe, *, calibrated: bool) -> PruneSettings:
    """What `recipe` means for `model`, with calibration images or without."""
    pruning = recipe.pruning
    return PruneSettings(
        PruneSchedule.resolve(model.stages, points=pruning.points, keep=pruning.keep, tokens=pruning.tokens),
        pruning.importance,
        pruning.reduction,
        choose_alignment(pruning.alignment, pruning.reduction, calibrated=calibrated),
        recipe.seed,
    )


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
    model = source.load().to(target)
    dense = figures(model)
    warnings = source.warnings()
    settings = request.settings(model, recipe)
    if request.calib is None:
        text = f"Nothing was calibrated: no calibration images were given. Alignment is {settings.alignment!r}."
        warnings.append(text)
    images = None
    if request.calib is not None:
        images = calibration_images(request.calib, recipe.calibration.images, recipe.calibration.seed)
        if len(images) < recipe.calibration.images:
            warnings.append(f"Only {len(images)} of {recipe.calibration.images} calibration images were found.")
        warnings += images.notes
    if evaluation is not None:
        warnings += evaluation.notes

    def calibration_batches(dataset: ImageDataset) -> Iterator[Tensor]:
        done = progress("Calibrating") if progress else None
        seen = 0
        for batch in batches(dataset, model.preprocessing, recipe.calibration.batch_size):
            yield batch.images.to(target)
            seen += len(batch.images)
            if done:
                done(seen, len(dataset))

    seen = compress(
        model,
        points=settings.schedule.points,
        tokens=settings.schedule.tokens,
        importance=settings.importance,
        reduction=settings.reduction,
        alignment=settings.alignment,
        calibration=calibration_batches(images) if images is not None else None,
        seed=settings.seed,
    )
    reference = source.load().to(target)
    restore(reference)
    result = None
    if evaluation is not None:
        done = progress("Evaluating") if progress else None
        result = evaluate(model, evaluation, compare=reference, limit=request.limit, device=str(target), progress=done)
    done = progress("Timing") if progress else None
    speed = speed_facts(reference, model, str(target), done)
    warnings += _slow(speed)
    chosen = evaluation if evaluation is not None else images
    assert isinstance(model.pruner, TokenPruner)
    left = model.pruner.settings.schedule.patches_per_block(model.stages)
    drops = any(count < stage.num_patches for stage in model.stages for count in left[stage.start : stage.stop])
    drawn: tuple[Sample, ...] = ()
    files: dict[str, bytes] = {}
    if chosen and drops and request.samples:
        if TASKS.get(model.task).one_class:
            changed = None if result is None else result.changed
            drawn, files = samples(model, reference, chosen, request.samples, target, changed)
        else:
            warnings.append(f"A report on {model.task} has no sample images: it cannot show the answers.")
    provenance = {
        "calibration_images": seen.images if seen else 0,
        "calibration_sha256": fingerprint(images) if images is not None else None,
        "evaluation_sha256": identity(evaluation, request.limit) if evaluation is not None else None,
    }
    report = _report(source, model, recipe, dense, provenance).model_copy(
        update={
            **({result.task.section: result.comparison} if result else {}),
            "speed": speed,
            "calibration": calibration_facts(seen) if seen else None,
            "search": None if found is None else tuple(found.trace()),
            "samples": drawn,
            "warnings": tuple(dict.fromkeys(warnings)),  # of the same images the same is said
        }
    )
    report = _judged(report, request.limits)
    assert report.pruning is not None
    final = recipe.resolved(report.pruning.model_dump(mode="json"), report.provenance)
    if request.command:
        command = shown(request.command, MAX_MESSAGE)
        report = report.model_copy(update={"provenance": {**report.provenance, "command": command}})
    contents: dict[str, bytes | str] = {
        "recipe.yaml": final.to_yaml(),
        **files,
        **report_files(report, files),
    }
    if seen is not None:
        points = [point.to_dict() for point in seen.points]
        contents["calibration.json"] = json.dumps({"images": seen.images, "points": points}, indent=1) + "\n"
    checkpoint.save(out, model.cpu(), contents, overwrite=request.overwrite)
    return report


def _slow(speed: SpeedFacts) -> list[str]:
    """A warning if the model does not get faster by what was done to it."""
    low, high = speed.latency_ratio_interval
    if high < 1:
        return []
    how = "slower than the dense one" if low > 1 else "no faster than the dense one, as far as the timing tells"
    return [
        f"On {speed.device} with a batch of {speed.batch_size} the model is {how} ({speed.latency_ratio:.2f} times the "
        "time). Other batches may differ (`ssmprune profile --batch-size`); `--target-latency` searches by time."
    ]


def _judged(report: Report, limits: Limits) -> Report:
    """With a verdict on every limit whose value is in `report`."""
    task, dense, pruned, speed = TASKS.get(report.task), report.dense, report.pruned, report.speed
    compared = task.facts(report)
    assert pruned is not None
    verdicts = limits.check(
        task,
        score=None if compared is None else task.pruned(compared),
        comparison=compared,
        flops=pruned.multiply_adds_all_directions / dense.multiply_adds_all_directions,
        latency_ratio=None if speed is None else Estimate(speed.latency_ratio, speed.latency_ratio_interval),
    )
    return report.model_copy(update={"limits": verdicts})


def _list(text: str) -> str:
    """ "0.9,0.8" as a YAML list; one number stays a number."""
    return f"[{text}]" if "," in text else text


def _report(source: Source, model: Backbone, recipe: Recipe, dense: Figures, provenance: dict[str, Any]) -> Report:
    """What is known before anything is measured."""
    assert isinstance(model.pruner, TokenPruner)
    return Report(
        family=model.family,
        task=model.task,
        image_size=model.image_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pruning=pruning_facts(model.pruner, recipe.pruning.keep),
        dense=dense,
        pruned=figures(model),
        provenance={
            "input": shown(source.path.name),
            "input_sha256": checkpoint.sha256(source.path),
            "weights_sha256": weights_sha256(model),
            **versions(next(model.parameters()).device),
            **provenance,
        },
    )
