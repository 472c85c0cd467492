"""From a command's options to a Job: whose settings hold, and what is written beside the weights."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssmprune_cli.data import ImageDataset, Subset
from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.files import read_bytes
from ssmprune_cli.models import Backbone
from ssmprune_cli.recipe import Pruning, Recipe, Training, load_recipe
from ssmprune_cli.report import read_report
from ssmprune_cli.workflows.finetune.run import Job

_OPTIONS = {"warmup_epochs": "warmup"}  # options that are not called as their setting is
_MOST_BYTES = 1 << 25  # of calibration.json
_KEEP_ALL = Recipe(pruning=Pruning(keep=1.0))  # stands in where there is no recipe: only its training section is used


def plan(
    path: Path | None,
    *,
    recipe: str | None,
    options: Mapping[str, Any],
    assignments: Sequence[str],
    seed: int,
    command: str,
    device: str,
    teacher: Backbone | None,
    save_every: int | None,
    tensorboard: bool,
    workers: int | None,
) -> Job:
    """The settings of the recipe (`recipe`, else the artefact's own), changed by options and "training.key=value".

    Raises RecipeError or UsageError for settings that are not valid.
    """
    own = None if path is None or not (path / "recipe.yaml").is_file() else load_recipe(path / "recipe.yaml")
    base = load_recipe(recipe) if recipe is not None else own or _KEEP_ALL
    texts = [f"training.{key}={yaml.safe_dump(value).split()[0]}" for key, value in options.items()]
    names = {f"training.{key}": f"--{_OPTIONS.get(key, key).replace('_', '-')}" for key in options}
    chosen = base.override([*texts, *assignments], names)
    training = chosen.training or Training()
    files: dict[str, str] = {}
    report = None
    if path is not None and path.is_dir():
        calibration = path / "calibration.json"
        if calibration.is_file():
            files[calibration.name] = _text(calibration)
        if (path / "report.json").is_file():
            report = read_report(path)
    if own is not None:
        files["recipe.yaml"] = own.model_copy(update={"training": training}).to_yaml()
    return Job(training, seed, command, device, teacher, files, report, save_every, tensorboard, workers)


def _text(path: Path) -> str:
    try:
        return read_bytes(path, _MOST_BYTES, SsmpruneError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise SsmpruneError(f"is not UTF-8 text (byte {error.start})", where=str(path)) from error


def some(images: ImageDataset, limit: int | None, seed: int) -> ImageDataset:
    """`limit` of the images, drawn at random."""
    if limit is None or limit >= len(images):
        return images
    return Subset(images, sorted(random.Random(seed).sample(range(len(images)), limit)))
