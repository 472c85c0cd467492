"""What `ssmprune compress` is asked for: checked against itself, and resolved to a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import ALIGNMENT_IMAGES, REDUCTIONS, PruneSettings
from ssmprune_cli.recipe import Pruning, Recipe, load_recipe
from ssmprune_cli.tasks import TASKS, Task
from ssmprune_cli.workflows.compress.settings import made_smaller, recipe_settings
from ssmprune_cli.workflows.limits import OF_TASKS, Limits
from ssmprune_cli.workflows.search import state_file
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget

SEARCH_IMAGES = 256  # unless the user says how many: a search needs more to choose by than an alignment
_KEEP_ALL = Pruning(keep=1.0)  # of a recipe whose amounts come from elsewhere


@dataclass(frozen=True)
class CompressRequest:
    """What a user asks for, as typed: None is what was not typed.

    resize         side in pixels of smaller images, alone or before tokens are dropped
    cut_blocks     so many of the last blocks are left out, alone or before tokens are dropped
    keep_image_size, keep_blocks  of a search: smaller images, and fewer blocks, are no candidates
    weights        "int8": those of linear layers in eight bits, beside what else is asked for or alone
    keep, tokens, points  lists as text, "0.9,0.8" or "150,120,90"
    target_...     search for what to keep: a share of the dense model's time, how many times as fast, ms a batch of
                   `batch_size`, or a share of the dense multiply-adds. With none of them, and none of the above, but
                   `limits.max_drop`: search for the fastest that loses no more on `data`
    target_size    bytes of the file of weights, met by weights in eight bits and then by fewer blocks; beside `keep`,
                   `tokens` and `resize`, which do not change it
    batch_size     that is timed; None is what suits the task
    evaluations, time_limit, state  how long the search goes on, and its file (beside `out` unless typed)
    calib          unlabelled calibration images: a folder, an ImageFolder tree or an .npz
    recipe         a file, or the name of a shipped one; `overrides` are "key=value" in it
    data           images with targets, of the kind `dataset`, on which both models are judged; `limit` of them
    slide          crop and stride of the windows through which they are seen, see `Task.sliding`
    samples        so many of them (or of the calibration images) are put into the artefact, for its report
    dry_run        read no images and write nothing
    command        how to do it again, for the report
    """

    source: Source
    resize: int | None = None
    cut_blocks: int | None = None
    keep_image_size: bool = False
    keep_blocks: bool = False
    keep: str | None = None
    tokens: str | None = None
    weights: str | None = None
    target_latency_ratio: float | None = None
    target_speedup: float | None = None
    target_latency: float | None = None
    target_flops: float | None = None
    target_size: int | None = None
    batch_size: int | None = None
    evaluations: int = 200
    time_limit: float | None = None
    state: Path | None = None
    points: str | None = None
    importance: str | None = None
    reduction: str | None = None
    alignment: str | None = None
    repair: str | None = None
    distill_steps: int | None = None
    calib: Path | None = None
    calib_images: int | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    data: Path | None = None
    dataset: str | None = None
    limit: int | None = None
    slide: tuple[int, int] | None = None
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
        amounts = any(each is not None for each in self._ways)
        said = amounts or self.targets or self.target_size is not None
        said = said or any(text.startswith("pruning.") for text in self.overrides)
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
        else:
            of_a_search = [
                ("--time-limit", self.time_limit is not None),
                ("--state", self.state is not None),
                ("--keep-image-size", self.keep_image_size),
                ("--keep-blocks", self.keep_blocks and self.target_size is None),
            ]
            for option, given in of_a_search:
                if given:
                    raise UsageError(f"{option} is for a search: it needs a target, such as --target-speedup 1.4")
        if self.target_size is not None:
            self._check_size()
        elif not self.asks_beside_size:
            raise UsageError(
                "how fast is the model to be?",
                hint="Give `--target-speedup 1.4`, `--max-drop 1` with `--data`, `--keep 0.6`, "
                "`--tokens 150,120,90`, `--resize PIXELS` (smaller images), `--cut-blocks COUNT`, `--int8` (weights), "
                "`--target-size 5MB` or `--recipe FILE`.",
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
        if self.calib is None and self.distill_steps is not None:
            raise UsageError("--distill-steps needs --calib, the images to learn from")
        if self.data is None:
            for value, option in ((self.dataset, "--dataset"), (self.limit, "--limit"), (self.slide, "--slide")):
                if value is not None:
                    raise UsageError(f"{option} needs --data, the images that it is about")
            self.limits.require(OF_TASKS, "--data, the images to measure accuracy on")
        if self.dry_run:
            self.limits.require((*OF_TASKS, "max_latency_ratio"), "a run: nothing is measured in a dry run")
        elif self.out is None:
            raise UsageError("--out is missing", hint="Give `--out FOLDER`, or `--dry-run` to see what would be done.")

    @property
    def _says_what_to_keep(self) -> bool:
        said = self.keep is not None or self.tokens is not None or self.recipe is not None or self.searched
        return said or any(text.startswith(("pruning.keep=", "pruning.tokens=")) for text in self.overrides)

    @property
    def _says_which_size(self) -> bool:
        said = self.resize is not None or self.cut_blocks is not None
        return said or any(text.startswith(("pruning.image_size=", "pruning.cut_blocks=")) for text in self.overrides)

    @property
    def _ways(self) -> tuple[object, ...]:
        """What says how much to keep, without a target."""
        return (self.resize, self.cut_blocks, self.keep, self.tokens, self.points, self.recipe)

    @property
    def _says_weights(self) -> bool:
        return self.weights == "int8" or "pruning.weights=int8" in self.overrides

    @property
    def asks_beside_size(self) -> bool:
        """Whether anything else is asked for than a size of the file."""
        return self._says_what_to_keep or self._says_which_size or self._says_weights

    def _check_size(self) -> None:
        if self.searched:
            raise UsageError(
                "a search settles how much to drop, and a size what the weights are: give one of them",
                where="--target-size",
                hint="`--int8` beside a target searches among models a quarter of the size.",
            )
        settled = ("pruning.weights=", "pruning.int8=", "pruning.cut_blocks=")
        for given, option in (
            (self.cut_blocks is not None, "--cut-blocks"),
            (self.recipe is not None, "--recipe"),
            *((text.startswith(settled), f"--set {text}") for text in self.overrides),
        ):
            if given:
                raise UsageError("a size settles which blocks and weights there are: leave it out", where=option)
        if self.calib is None:
            raise UsageError(
                "--target-size needs --calib, the images that show which layers bear eight bits",
                hint="Give `--calib DIR` with a few dozen of them.",
            )
        if self.dry_run:
            raise UsageError("a size is met by what images show, so it cannot be a dry run")

    def _check_search(self) -> None:
        if len(self.targets) + sum(each is not None for each in self._ways) > 1:
            raise UsageError(
                "a target settles what to keep: give one, without --resize, --cut-blocks, --keep, --tokens, --points "
                "or --recipe"
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
            alone = "--resize" if self._says_which_size else "--int8"
            settings.append(("pruning.keep", "null", alone))
        by_size = self.target_size is not None and not self.asks_beside_size
        settings += [
            ("pruning.weights", "int8" if by_size else self.weights, "--target-size" if by_size else "--int8"),
            ("pruning.image_size", self.resize, "--resize"),
            ("pruning.cut_blocks", self.cut_blocks, "--cut-blocks"),
            ("pruning.points", None if self.points is None else f"[{self.points}]", "--points"),
            ("pruning.importance", self.importance, "--importance"),
            ("pruning.reduction", self.reduction, "--reduction"),
            ("pruning.alignment", self.alignment, "--alignment"),
            ("pruning.repair", self.repair, "--repair"),
            ("pruning.distill_steps", self.distill_steps, "--distill-steps"),
            ("calibration.images", self.calib_images, "--calib-images"),
            ("calibration.seed", self.seed, "--seed"),
            ("seed", self.seed, "--seed"),
        ]
        return [(key, value, option) for key, value, option in settings if value is not None]

    @property
    def names_score(self) -> bool:
        """Whether it is said which score tokens are ranked by."""
        return self.importance is not None or any(text.startswith("pruning.importance=") for text in self.overrides)

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
            for name in ("importance", "reduction", "alignment"):
                if getattr(self, name) is not None or any(
                    text.startswith(f"pruning.{name}=") for text in self.overrides
                ):
                    raise UsageError("is about dropping tokens, and none are: give --keep too", where=f"--{name}")
        if self.names_score and recipe.pruning.reduction in REDUCTIONS.names():
            name = recipe.pruning.reduction
            if REDUCTIONS.get(name).rectangular:
                raise UsageError(f"the reduction {name!r} goes by no score: leave it out", where="--importance")
        if recipe.pruning.repair == "none" and not self.counts_images:
            return recipe.override([f"calibration.images={ALIGNMENT_IMAGES}"])
        return recipe

    def judging(self, task: str) -> Task[Any, Any]:
        """The task of this name, as its models are judged. Raises UsageError if they cannot be so."""
        found = TASKS.get(task)
        if self.slide is None:
            return found
        crop, stride = self.slide
        return found.sliding((crop, crop), (stride, stride))

    def fitted(self, recipe: Recipe, task: Task[Any, Any]) -> Recipe:
        """`recipe` with as many calibration images as suit `task`, unless it is said how many."""
        if task.calibrates is None or self.counts_images:
            return recipe
        return recipe.override([f"calibration.images={task.calibrates}"])

    def settings(self, model: Backbone, recipe: Recipe, **chosen: str) -> PruneSettings | None:
        """What `recipe`, resolved from this request, means for `model`. Raises UsageError for what does not fit."""
        with self._named("keep", "tokens", "points", "importance", "reduction", "alignment"):
            return recipe_settings(model, recipe, calibrated=self.calib is not None, **chosen)

    def made_smaller(self, model: Backbone, recipe: Recipe) -> Backbone:
        """`made_smaller`; its errors name the options."""
        with self._named("resize", "cut_blocks"):
            return made_smaller(model, recipe)

    @contextmanager
    def _named(self, *names: str) -> Iterator[None]:
        """Around what goes by these options: an error names those that were typed."""
        try:
            yield
        except UsageError as error:
            given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
            typed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
            raise UsageError(error.what, where=typed or error.where, hint=error.hint) from error


def _list(text: str) -> str:
    """ "0.9,0.8" as a YAML list; one number stays a number."""
    return f"[{text}]" if "," in text else text
