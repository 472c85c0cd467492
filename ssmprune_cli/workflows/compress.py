"""`ssmprune compress`: check what is asked, search for it or take it, calibrate, prune, measure, write the artefact."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset, Subset, batches, calibration_images, fingerprint
from ssmprune_cli.errors import MAX_MESSAGE, UsageError, listing, shown
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone, resize, sides
from ssmprune_cli.pruning import (
    ALIGNMENT_IMAGES,
    DEFAULT_REDUCTION,
    REDUCTIONS,
    Calibration,
    PruneSchedule,
    PruneSettings,
    TokenPruner,
    choose_alignment,
    known_methods,
    prune,
    repair,
)
from ssmprune_cli.recipe import Pruning, Recipe, load_recipe
from ssmprune_cli.report import Figures, ReductionTrial, Report, Sample, SpeedFacts, TargetFacts
from ssmprune_cli.tasks import TASKS, Estimate
from ssmprune_cli.workflows.evaluate import evaluate, identity, spread
from ssmprune_cli.workflows.fastest import fastest
from ssmprune_cli.workflows.identity import weights_sha256
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.reduction_choice import compare_reductions
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
from ssmprune_cli.workflows.search import Found, SearchPlan, SearchResult, open_search, search, state_file
from ssmprune_cli.workflows.search import Limits as SearchLimits
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget, load_images, run
from ssmprune_cli.workflows.write import check_place

Progress = Callable[[str], Callable[[int, int], None]]  # what is being done -> (done, total) callback

SEARCH_IMAGES = 256  # unless the user says how many: a search needs more to choose by than an alignment
_KEEP_ALL = Pruning(keep=1.0)  # of a recipe whose amounts come from elsewhere


@dataclass(frozen=True)
class CompressRequest:
    """What a user asks for, as typed: None is what was not typed.

    resize         side in pixels of smaller images, alone or before tokens are dropped
    keep_image_size  of a search: smaller images are no candidates
    keep, tokens, points  lists as text, "0.9,0.8" or "150,120,90"
    target_...     search for what to keep: a share of the dense model's time, how many times as fast, ms a batch of
                   `batch_size`, or a share of the dense multiply-adds. With none of them, and none of the above, but
                   `limits.max_drop`: search for the fastest that loses no more on `data`
    evaluations, time_limit, state  how long the search goes on, and its file (beside `out` unless typed)
    calib          unlabelled calibration images: a folder, an ImageFolder tree or an .npz
    recipe         a file, or the name of a shipped one; `overrides` are "key=value" in it
    data      labelled images, of the kind `dataset`, on which both models are judged; `limit` of them
    samples        so many of them (or of the calibration images) are put into the artefact, for its report
    dry_run        read no images and write nothing
    command        how to do it again, for the report
    """

    source: Source
    resize: int | None = None
    keep_image_size: bool = False
    keep: str | None = None
    tokens: str | None = None
    target_latency_ratio: float | None = None
    target_speedup: float | None = None
    target_latency: float | None = None
    target_flops: float | None = None
    batch_size: int = 8
    evaluations: int = 200
    time_limit: float | None = None
    state: Path | None = None
    points: str | None = None
    importance: str | None = None
    reduction: str | None = None
    alignment: str | None = None
    repair: str | None = None
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
    def targets(self) -> list[str]:
        """The options among those that search for a target."""
        return [option for option, value in self._targets() if value is not None]

    def _targets(self) -> list[tuple[str, float | None]]:
        return [
            ("--target-latency-ratio", self.target_latency_ratio),
            ("--target-speedup", self.target_speedup),
            ("--target-latency", self.target_latency),
            ("--target-flops", self.target_flops),
        ]

    @property
    def by_drop(self) -> bool:
        """Whether the fastest model within `limits.max_drop` is searched for."""
        amounts = any(each is not None for each in (self.resize, self.keep, self.tokens, self.points, self.recipe))
        said = amounts or self.targets or any(text.startswith("pruning.") for text in self.overrides)
        return self.limits.max_drop is not None and self.data is not None and not said

    @property
    def searched(self) -> bool:
        return bool(self.targets) or self.by_drop

    @property
    def budget(self) -> Budget | None:
        """What to search within; None for milliseconds, whose share of the dense time has to be measured."""
        if self.target_latency_ratio is not None:
            return Budget("time", self.target_latency_ratio)
        if self.target_speedup is not None:
            return Budget("time", 1 / self.target_speedup)
        return None if self.target_flops is None else Budget("flops", self.target_flops)

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
        elif self.time_limit is not None or self.state is not None or self.keep_image_size:
            given = "--time-limit" if self.time_limit is not None else "--state"
            given = "--keep-image-size" if self.keep_image_size else given
            raise UsageError(f"{given} is for a search: it needs a target, such as --target-speedup 1.4")
        if not self._says_what_to_keep and not self._says_which_images:
            raise UsageError(
                "how fast is the model to be?",
                hint="Give `--target-speedup 1.4`, `--max-drop 1` with `--data`, `--keep 0.6`, "
                "`--tokens 150,120,90`, `--resize PIXELS` (smaller images) or `--recipe FILE`.",
            )
        typed = {key for key, _, _ in self._settings()}
        for text in self.overrides:
            key = text.partition("=")[0].strip()
            if key in typed:
                raise UsageError(f"another option says what {key} is: give one of them", where=f"--set {text}")
        if self.calib is None and self.calib_images is not None:
            raise UsageError("--calib-images needs --calib, the images to choose from")
        if self.calib is None and self.repair not in (None, "none"):
            raise UsageError("--repair needs --calib, the images to fit it to")
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

    @property
    def _says_what_to_keep(self) -> bool:
        said = self.keep is not None or self.tokens is not None or self.recipe is not None or self.searched
        return said or any(text.startswith(("pruning.keep=", "pruning.tokens=")) for text in self.overrides)

    @property
    def _says_which_images(self) -> bool:
        return self.resize is not None or any(text.startswith("pruning.image_size=") for text in self.overrides)

    def _check_search(self) -> None:
        ways = (self.resize, self.keep, self.tokens, self.points, self.recipe)
        if len(self.targets) + sum(each is not None for each in ways) > 1:
            raise UsageError(
                "a target settles what to keep: give one, without --resize, --keep, --tokens, --points or --recipe"
            )
        for text in self.overrides:
            if text.startswith("pruning."):
                raise UsageError(
                    "a target settles how to prune",
                    where=f"--set {text}",
                    hint="Give `--importance`, `--reduction` and `--alignment` to search among those only.",
                )
        for option, value in self._targets():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"must be a finite number above 0, not {value:g}", where=option)
        if self.target_speedup is not None and self.target_speedup <= 1:
            raise UsageError(f"must be above 1, not {self.target_speedup:g}", where="--target-speedup")
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
        if not self._says_what_to_keep:
            settings.append(("pruning.keep", "null", "--resize"))  # smaller images alone
        settings += [
            ("pruning.image_size", self.resize, "--resize"),
            ("pruning.points", None if self.points is None else f"[{self.points}]", "--points"),
            ("pruning.importance", self.importance, "--importance"),
            ("pruning.reduction", self.reduction, "--reduction"),
            ("pruning.alignment", self.alignment, "--alignment"),
            ("pruning.repair", self.repair, "--repair"),
            ("calibration.images", self.calib_images, "--calib-images"),
            ("calibration.seed", self.seed, "--seed"),
            ("seed", self.seed, "--seed"),
        ]
        return [(key, value, option) for key, value, option in settings if value is not None]

    @property
    def counts_images(self) -> bool:
        """Whether it is said how many calibration images there are to be."""
        said = any(text.partition("=")[0].strip() == "calibration.images" for text in self.overrides)
        return said or self.calib_images is not None or self.recipe is not None

    def search_images(self, recipe: Recipe) -> int:
        """How many images a search chooses by; what it finds has those of the recipe."""
        return recipe.calibration.images if self.counts_images else SEARCH_IMAGES

    def resolved(self) -> Recipe:
        """The recipe to follow; a search replaces its pruning section. Raises RecipeError or UsageError."""
        base = Recipe(pruning=_KEEP_ALL) if self.recipe is None else load_recipe(self.recipe)
        settings = [f"{key}={value}" for key, value, _ in self._settings()]
        options = {key: option for key, _, option in self._settings()}
        recipe = base.override([*settings, *self.overrides], options)
        if not recipe.pruning.drops_tokens:
            for name in ("importance", "reduction", "alignment", "repair"):
                if getattr(self, name) is not None or any(
                    text.startswith(f"pruning.{name}=") for text in self.overrides
                ):
                    raise UsageError("is about dropping tokens, and none are: give --keep too", where=f"--{name}")
        scored = self.importance is not None or any(text.startswith("pruning.importance=") for text in self.overrides)
        if scored and recipe.pruning.reduction in REDUCTIONS.names():
            name = recipe.pruning.reduction
            if REDUCTIONS.get(name).rectangular:
                raise UsageError(f"the reduction {name!r} goes by no score: leave it out", where="--importance")
        if recipe.pruning.repair == "none" and not self.counts_images:
            return recipe.override([f"calibration.images={ALIGNMENT_IMAGES}"])
        return recipe

    def settings(self, model: Backbone, recipe: Recipe, **chosen: str) -> PruneSettings | None:
        """What `recipe`, resolved from this request, means for `model`. Raises UsageError for what does not fit."""
        with self._named("keep", "tokens", "points", "importance", "reduction", "alignment"):
            return recipe_settings(model, recipe, calibrated=self.calib is not None, **chosen)

    def resized(self, model: Backbone, recipe: Recipe) -> Backbone:
        """`for_images`; its errors name the option."""
        with self._named("resize"):
            return for_images(model, recipe)

    @contextmanager
    def _named(self, *names: str) -> Iterator[None]:
        """Around what goes by these options: an error names those that were typed."""
        try:
            yield
        except UsageError as error:
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
    result = _search(request, recipe, evaluation, progress)
    (found,) = result.found
    chosen = found.recipe.override(
        [f"pruning.repair={recipe.pruning.repair}", f"calibration.images={recipe.calibration.images}"]
    )
    report = _compressed(request, chosen, out, evaluation, found, progress)
    result.state.remove()
    return CompressResult(report, out, tuple(dict.fromkeys((*result.warnings, *report.warnings))))


def _evaluation(request: CompressRequest) -> ImageDataset | None:
    """The labelled images. Raises DataError if the model cannot be judged on them."""
    if request.data is None:
        return None
    model = request.source.load()
    task = TASKS.get(model.task)
    dataset = task.open(request.data, request.dataset)
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
        repair=recipe.pruning.repair,
        repair_images=recipe.calibration.images,
        batch_size=request.batch_size,
        calibration=recipe.calibration.model_copy(update={"images": request.search_images(recipe)}),
        seed=recipe.seed,
        limits=SearchLimits(request.evaluations, request.time_limit),
        device=request.device,
        state=request.state_file,
    )
    if not request.by_drop:
        return search(request.source, plan, progress)
    assert evaluation is not None
    searches = open_search(request.source, plan, progress)
    target = resolve_device(request.device)
    images = calibration_images(request.calib, plan.calibration.images, plan.calibration.seed)
    reference = request.source.load().to(target)
    limits = Limits(max_drop=request.limits.max_drop, judge=request.limits.judge)

    def holds(found: Found) -> bool:
        model = for_images(request.source.load(), found.recipe).to(target)
        settings = recipe_settings(model, found.recipe, calibrated=True)
        dense_logits = _dense_logits(reference, model, images, found.recipe)
        _prune_on(images, dense_logits, model, settings, found.recipe, progress)
        done = progress(f"Judging {found.budget.value:g} of the time") if progress else None
        result = evaluate(model, evaluation, compare=reference, limit=request.limit, device=str(target), progress=done)
        verdicts = limits.check(result.task, score=result.task.pruned(result.comparison), comparison=result.comparison)
        return all(each.holds for each in verdicts)

    return SearchResult([fastest(searches, holds)], *searches.counts, searches.state, searches.warnings)


def _planned(request: CompressRequest, recipe: Recipe) -> Report:
    """Tokens per block and multiply-adds: what is known without images."""
    reference = request.source.load()
    dense, weights = figures(reference), weights_sha256(reference)
    model = request.resized(reference, recipe)
    settings = request.settings(model, recipe)
    if settings is not None:
        model.pruner = TokenPruner(settings, model.stages, model.mixers)  # calibrated or not, it costs the same
    report = _report(request.source, model, recipe, dense, {"weights_sha256": weights})
    warnings = [*request.source.warnings(), *_rounded(settings, recipe.pruning, model)]
    if request.calib is not None and settings is not None and recipe.pruning.reduction == "auto":
        warnings.append(
            f"The reduction is chosen on the calibration images, which a dry run does not read: this is for "
            f"{settings.reduction!r}."
        )
    report = report.model_copy(update={"warnings": tuple(warnings)})
    return _judged(report, request.limits)


def for_images(model: Backbone, recipe: Recipe) -> Backbone:
    """The dense `model`, or for smaller images the resized one. UsageError if those of `recipe` are not smaller."""
    side = recipe.pruning.image_size
    if side is None:
        return model
    if side >= model.image_size[0]:
        raise UsageError(
            f"the model takes images of {model.image_size[0]} pixels, so {side} is no smaller side",
            hint=f"Possible sides: {listing(sides(model), limit=20) or 'none'}.",
        )
    return resize(model, side)


def recipe_settings(
    model: Backbone, recipe: Recipe, *, calibrated: bool, reduction: str = DEFAULT_REDUCTION
) -> PruneSettings | None:
    """What `recipe` means for `model`, with calibration images or without; `reduction` where it says "auto". None if no
    tokens are dropped."""
    pruning = recipe.pruning
    if not pruning.drops_tokens:
        return None
    reduction = reduction if pruning.reduction == "auto" else pruning.reduction
    return PruneSettings(
        PruneSchedule.resolve(
            model.stages,
            points=pruning.points,
            keep=pruning.keep,
            tokens=pruning.tokens,
            rectangular=REDUCTIONS.get(reduction).rectangular,
        ),
        pruning.importance,
        reduction,
        choose_alignment(pruning.alignment, reduction, calibrated=calibrated),
        recipe.seed,
    )


def _rounded(settings: PruneSettings | None, pruning: Pruning, model: Backbone) -> list[str]:
    """A warning if fewer tokens stay than were asked for, since only whole grids can."""
    if settings is None or not settings.schedule.grids:
        return []
    schedule = settings.schedule
    patches = schedule.patches_per_block(model.stages)
    before = [patches[point - 1] for point in schedule.points]
    given = [pruning.keep] * len(before) if isinstance(pruning.keep, int | float) else list(pruning.keep or ())
    asked = pruning.tokens or [math.floor(ratio * count) for ratio, count in zip(given, before, strict=True)]
    if all(count >= least for count, least in zip(schedule.tokens, asked, strict=True)):
        return []
    grids = ", ".join(f"{rows} x {columns}" for rows, columns in schedule.grids)
    return [f"Only whole grids can stay, so there are fewer tokens than asked for: {grids} after the prune points."]


def _dense_logits(reference: Backbone, model: Backbone, images: ImageDataset, recipe: Recipe) -> Tensor | None:
    """What `model` is compared with on the calibration images if it sees them smaller than the dense `reference`; None
    if it is itself the dense model."""
    if model.config.resized_from is None or not recipe.pruning.drops_tokens:
        return None
    parts = batches(images, reference.preprocessing, recipe.calibration.batch_size)
    return run(prepare(reference), (batch.images for batch in parts))


def _prune_on(
    images: ImageDataset | None,
    dense_logits: Tensor | None,
    model: Backbone,
    settings: PruneSettings | None,
    recipe: Recipe,
    progress: Progress | None,
) -> Calibration | None:
    """Prune `model` as `settings` say: None is not at all. `dense_logits` are those of `_dense_logits`."""
    if settings is None:
        return None
    parts = None
    if images is not None:
        parts = _Batches(images, model, recipe.calibration.batch_size, progress and progress("Calibrating"))
    return prune(model, settings, parts, dense=dense_logits)


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
    dense = figures(reference)
    model = request.resized(source.load(), recipe).to(target)
    warnings = source.warnings()
    settings = request.settings(model, recipe)
    if request.calib is None and settings is not None:
        text = f"Nothing was calibrated: no calibration images were given. Alignment is {settings.alignment!r}."
        warnings.append(text)
    images = None
    if request.calib is not None:
        images = calibration_images(request.calib, recipe.calibration.images, recipe.calibration.seed)
        if len(images) < recipe.calibration.images and request.counts_images:
            warnings.append(f"Only {len(images)} of {recipe.calibration.images} calibration images were found.")
        warnings += images.notes
    if evaluation is not None:
        warnings += evaluation.notes

    kind = recipe.pruning.repair
    few, rows = images, None  # what all but a repair is chosen and calibrated on
    if images is not None and kind != "none" and len(images) > ALIGNMENT_IMAGES:
        rows = spread(len(images), ALIGNMENT_IMAGES)
        few = Subset(images, rows)
    tried: list[ReductionTrial] = []
    drops = settings is not None and settings.schedule.shortens(model.stages)
    dense_logits = None if images is None else _dense_logits(reference, model, images, recipe)
    few_logits = dense_logits if dense_logits is None or rows is None else dense_logits[rows]
    if few is not None and settings is not None and drops and recipe.pruning.reduction == "auto":
        if progress:
            progress("Comparing reductions")
        tried = _choose_reduction(request, model, recipe, settings, few, few_logits)
        best = next(each.reduction for each in tried if each.chosen)
        settings = request.settings(model, recipe, reduction=best)
    warnings += _rounded(settings, recipe.pruning, model)
    seen = _prune_on(few, few_logits, model, settings, recipe, progress)
    repaired = None
    if images is not None and settings is not None and kind != "none":
        parts = _Batches(images, model, recipe.calibration.batch_size, progress and progress("Repairing"))
        repaired = repair(model, parts, kind=kind, runner=prepare(model).with_pruner, dense=dense_logits)
        warnings += repaired.warnings
        if kind != "auto" and repaired.kind == "none":
            warnings.append(f"The repair {kind!r} was refused: {repaired.refused[kind]}.")
    result = None
    if evaluation is not None:
        done = progress("Evaluating") if progress else None
        result = evaluate(model, evaluation, compare=reference, limit=request.limit, device=str(target), progress=done)
    done = progress("Timing") if progress else None
    speed = speed_facts(reference, model, str(target), request.batch_size, done)
    warnings += _slow(speed)
    chosen = evaluation if evaluation is not None else images
    differs = settings is None or drops
    drawn: tuple[Sample, ...] = ()
    files: dict[str, bytes] = {}
    if chosen and differs and request.samples:
        if TASKS.get(model.task).one_class:
            changed = None if result is None else result.changed
            drawn, files = samples(model, reference, chosen, request.samples, target, changed)
        else:
            warnings.append(f"A report on {model.task} has no sample images: it cannot show the answers.")
    provenance = {
        "weights_sha256": weights_sha256(reference),
        "calibration_images": len(images) if images is not None and settings is not None else 0,
        "calibration_sha256": fingerprint(images) if images is not None else None,
        "evaluation_sha256": identity(evaluation, request.limit) if evaluation is not None else None,
    }
    report = _report(source, model, recipe, dense, provenance).model_copy(
        update={
            **({result.task.section: result.comparison} if result else {}),
            "speed": speed,
            "calibration": calibration_facts(seen) if seen else None,
            "reductions": tuple(tried) or None,
            "repair": repair_facts(repaired) if repaired else None,
            "search": None if found is None else tuple(found.trace()),
            "samples": drawn,
            "warnings": tuple(dict.fromkeys(warnings)),  # of the same images the same is said
        }
    )
    report = _targeted(_judged(report, request.limits), request)
    used = {} if report.pruning is None else report.pruning.model_dump(mode="json")
    final = recipe.resolved({"image_size": recipe.pruning.image_size, **used}, report.provenance)
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
    checkpoint.save(out, model.cpu(), contents, dense=reference, overwrite=request.overwrite)
    return report


class _Batches(Iterable[Tensor]):
    """The images of `dataset` as `model` takes them, on its device; read anew each time."""

    def __init__(
        self, dataset: ImageDataset, model: Backbone, batch_size: int, done: Callable[[int, int], None] | None
    ) -> None:
        self._dataset, self._model, self._batch_size, self._done = dataset, model, batch_size, done

    def __iter__(self) -> Iterator[Tensor]:
        device, seen = next(self._model.parameters()).device, 0
        for batch in batches(self._dataset, self._model.preprocessing, self._batch_size):
            yield batch.images.to(device)
            seen += len(batch.images)
            if self._done:
                self._done(seen, len(self._dataset))


def _choose_reduction(
    request: CompressRequest,
    model: Backbone,
    recipe: Recipe,
    settings: PruneSettings,
    images: ImageDataset,
    dense_logits: Tensor | None,
) -> list[ReductionTrial]:
    choices = compare_reductions(
        model,
        settings.schedule,
        load_images(model, images),
        importance=settings.importance,
        alignment=recipe.pruning.alignment,
        batch_size=request.batch_size,
        device=request.device,
        dense=dense_logits,
        seed=settings.seed,
    )
    return [
        ReductionTrial(
            reduction=each.method.reduction,
            alignment=each.method.alignment,
            tokens=each.schedule.tokens,
            divergence=each.divergence if math.isfinite(each.divergence) else None,
            chosen=each is choices[0],
        )
        for each in choices
    ]


def _targeted(report: Report, request: CompressRequest) -> Report:
    """With what was asked for, if that was a target, and a warning if it is missed."""
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
    pruner = model.pruner
    return Report(
        family=model.family,
        task=model.task,
        image_size=model.image_size,
        resized_from=model.config.resized_from,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pruning=pruning_facts(pruner, recipe.pruning.keep) if isinstance(pruner, TokenPruner) else None,
        dense=dense,
        pruned=figures(model),
        provenance={
            "input": shown(source.path.name),
            "input_sha256": checkpoint.sha256(source.path),
            **provenance,
            **versions(next(model.parameters()).device),
        },
    )
