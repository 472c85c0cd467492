"""`ssmprune compress --module`: tokens are dropped inside the mixers of a user's module, and the folder says how."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ssmprune_cli import adapt, checkpoint
from ssmprune_cli.adapt import Compressed, Inside
from ssmprune_cli.data import ImageDataset, batches, calibration_images, fingerprint
from ssmprune_cli.errors import UsageError, shown
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import ALIGNMENT_IMAGES
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.workflows.compress import CompressRequest, Progress
from ssmprune_cli.workflows.measure import Speed
from ssmprune_cli.workflows.own_module.profile import tokens_by_mixer
from ssmprune_cli.workflows.own_module.source import ModuleSource, as_values
from ssmprune_cli.workflows.own_module.timing import COMPRESSED, Variants, no_faster, random_images, variants

ROUNDS = 10


@dataclass(frozen=True)
class ModuleCompression:
    """What came of it.

    kinds      of mixer, with how many there are
    tokens     that enter each mixer, by its name, in the order of the calls
    protected  positions that always stay
    fill       what stands at the places of dropped tokens, and the `distances` from the dense answers by each fill
    pruning    the method: schedule, score, reduction, alignment
    images     that it was calibrated on
    speeds     of a batch of `batch_size`, by how the module is computed
    out        the folder that was written
    """

    path: str
    kinds: dict[str, int]
    tokens: dict[str, int]
    protected: tuple[int, ...]
    fill: str
    distances: dict[str, float]
    pruning: dict[str, Any]
    images: int
    batch_size: int
    speeds: dict[str, Speed]
    out: Path = field(repr=False)
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def compress_module(request: CompressRequest, module: str, progress: Progress | None = None) -> ModuleCompression:
    """Build the module by calling `module` ("PACKAGE:FUNCTION"), load the weights, drop tokens, write `request.out`.

    Raises UsageError for requests that make no sense, SsmpruneError for what goes wrong; the folder is then as before.
    """
    request.check()
    source = ModuleSource(request.source.path, module, request.source.reading, request.device)
    source.check()
    if checkpoint.is_own_module(source.path):
        raise UsageError("is compressed already", where=str(source.path), hint="Give the weights that it was made of.")
    recipe, out = _recipe(request), request.out
    request.source.check_pinned(recipe.provenance)
    if request.calib is None or out is None:
        raise UsageError(
            "a module of your own is compressed by what it does with images, and there are none",
            hint="Give `--calib DIR` with a few dozen of them.",
        )
    way = source.preprocessing()
    checkpoint.check_writable(out, overwrite=request.overwrite)
    images = calibration_images(request.calib, recipe.calibration.images, recipe.calibration.seed)
    own = source.load()
    timed = random_images(own, request.batch_size or 8, way.crop)
    found = variants(own, timed[:1])
    model = copy.deepcopy(own)
    done = _compressed(model, recipe, images, way)
    inside, calibrated = adapt.stored(model)
    ways = Variants({**found.models, COMPRESSED: model}, ())
    speeds = ways.speeds(timed, ROUNDS, progress and progress("Timing"))
    content = checkpoint.OwnModule(module, inside.to_dict(), as_values(way), own.state_dict(), calibrated)
    final = _written(recipe, inside, request, images)
    checkpoint.save_own_module(out, content, {"recipe.yaml": final.to_yaml()}, overwrite=request.overwrite)
    warnings = [*found.warnings, *images.notes]
    if request.counts_images and len(images) < recipe.calibration.images:
        warnings.append(f"Only {len(images)} of {recipe.calibration.images} calibration images were found.")
    warnings += no_faster(speeds, timed)
    return ModuleCompression(
        path=shown(source.path.name),
        kinds=done.kinds,
        tokens=tokens_by_mixer(inside),
        protected=done.protected,
        fill=inside.fill,
        distances=done.distances,
        pruning=inside.settings.to_dict(),
        images=len(images),
        batch_size=len(timed),
        speeds=speeds,
        out=out,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _recipe(request: CompressRequest) -> Recipe:
    """What the request says, as far as it is about dropping tokens. UsageError for what is not done here."""
    recipe = request.resolved()
    pruning = recipe.pruning
    refused = {
        "model": recipe.model is not None,
        "pruning.image_size": pruning.image_size is not None,
        "pruning.cut_blocks": pruning.cut_blocks is not None,
        "pruning.weights": pruning.weights != "float",
        "pruning.repair": pruning.repair not in ("auto", "none"),
        "pruning.returning": pruning.returning != "left",
    }
    for key, said in refused.items():
        if said:
            raise UsageError(f"the recipe says {key}, which is for models of ours", where="--module")
    settings = ["pruning.repair=none"]
    if pruning.reduction == "auto":
        settings.append("pruning.reduction=context")
    if not request.counts_images:
        settings.append(f"calibration.images={ALIGNMENT_IMAGES}")
    return recipe.override(settings)


def _compressed(model: nn.Module, recipe: Recipe, images: ImageDataset, way: Preprocessing) -> Compressed:
    pruning = recipe.pruning
    return adapt.compress(
        model,
        pruning.keep,
        calibration=[batch.images for batch in batches(images, way, recipe.calibration.batch_size)],
        tokens=pruning.tokens,
        points=pruning.points,
        importance=pruning.importance,
        reduction=pruning.reduction,
        alignment=pruning.alignment,
        seed=recipe.seed,
    )


def _written(recipe: Recipe, inside: Inside, request: CompressRequest, images: ImageDataset) -> Recipe:
    """`recipe` with the points and the alignment that were used, and where it comes from."""
    used = recipe.pruning.model_copy(
        update={"points": inside.settings.schedule.points, "alignment": inside.settings.alignment}
    )
    origin = {**replace(request.source, called="").origin, "calibration_sha256": fingerprint(images)}
    return recipe.resolved(used.model_dump(mode="json"), origin)
