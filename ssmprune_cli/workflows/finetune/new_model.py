"""A model from scratch: built with random weights from settings, and its checkpoint written."""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import FAMILIES, Backbone, DenseModel, Hints, ImageConfig, Segmenter
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading
from ssmprune_cli.workflows.finetune.container import mm_container

_MADE_SMALLER = ("resized_from", "cut_from")  # which no new model is
_IMAGES = [field.name for field in fields(ImageConfig) if field.name not in _MADE_SMALLER]
_GRID = {"image_size", "stride"}  # settings that change how many tokens there are, and no weight but their positions


def build(family: str, overrides: Sequence[str], *, name: str, seed: int) -> Backbone:
    """A new backbone of `family` with random weights: its default configuration, changed by "key=value" `overrides`;
    of a dense model's encoder and head by "encoder.key=value" and "head.key=value".

    Values are YAML. Raises UsageError for a key or value that the configuration does not take, and when a checkpoint
    of the model's `name` would be read as another configuration (see `write_checkpoint`).
    """
    known = FAMILIES.get(family)
    names = [field.name for field in fields(known.config_class) if field.name not in (*_MADE_SMALLER, "resized")]
    default, values = known.config_class(), dict[str, Any]()
    for override in overrides:
        key, equals, text = override.partition("=")
        outer, _, inner = key.partition(".")
        part = getattr(default, outer, None)
        inside = [field.name for field in fields(part)] if inner and is_dataclass(part) else []
        if not equals or outer not in names or (inner and inner not in inside):
            hint = f"Give {outer}.key=value" if inside else "Give key=value"
            raise UsageError(
                f"`--set {override}` is no setting of {family}",
                hint=f"{hint} with one of: {', '.join(inside or names)}.",
            )
        try:
            value = yaml.safe_load(text)
        except Exception as error:  # a tag raises nearly anything for a value that it does not expect
            raise UsageError(f"`--set {override}` is not a value: {text}") from error
        if inner:
            values.setdefault(outer, _settings(part))[inner] = value
        else:
            values[outer] = value
    try:
        config = TypeAdapter(known.config_class).validate_python(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UsageError(f"the settings of {family} are not valid: {'; '.join(faults)}") from error
    torch.manual_seed(seed)
    model = known.build(config)
    if isinstance(model, DenseModel):  # whose file says what its weights do not: see `check_container`
        return model
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    images = {name: getattr(config, name) for name in _IMAGES}
    hints = Hints(model_name=name, image_size=model.image_size[0], **images)
    if any(each.matches(shapes, hints) != (each is known) for _, each in FAMILIES.items()):
        raise UsageError(
            f"a checkpoint of the name {name!r} would not be recognised as {known.title}",
            hint="Another family has the same keys: put the name of the family into `--name`.",
        )
    read = known.configure(shapes, hints)
    different = [field for field in names if getattr(read, field) != getattr(config, field)]
    if different:
        raise UsageError(
            f"a checkpoint of the name {name!r} would be read with another {', '.join(different)}",
            hint='The name tells the place of the class token ("midclstok") and halved outputs ("div2"): see `--name`.',
        )
    return model


def _settings(config: Any) -> dict[str, Any]:
    """Those of a configuration that a new model may have."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name not in _MADE_SMALLER}


def check_container(model: Backbone, name: str) -> None:
    """Raises UsageError for a model that would not be read back as it is from what `write_checkpoint` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        write_checkpoint(path, model, name=name, epoch=0)
        try:
            read = checkpoint.load(path)
        except CheckpointError as error:
            raise UsageError(f"the file could not be read again: {error.what}", where="--checkpoint") from error
    different = _different(model.config, read.config)
    if different:
        raise UsageError(
            f"the file would be read with another {', '.join(different)}",
            where="--checkpoint",
            hint="The folder `last` holds every setting; a file holds those that published ones do.",
        )


def _different(config: Any, other: Any, outer: str = "") -> list[str]:
    """Names of the settings in which two configurations differ."""
    if type(config) is not type(other):
        return [outer.rstrip(".") or "family"]
    found = []
    for each in fields(config):
        own, theirs = getattr(config, each.name), getattr(other, each.name)
        if is_dataclass(own):
            found += _different(own, theirs, f"{outer}{each.name}.")
        elif own != theirs:
            found.append(f"{outer}{each.name}")
    return found


def start_from(model: Backbone, path: Path, reading: Reading = NOTHING_SAID) -> None:
    """Copy the weights of the checkpoint at `path` into `model`; for another grid position embeddings are resized.

    Raises UsageError if it is another configuration in more than the image's size and the patches' stride.
    """
    reading = replace(reading, family=model.family, image_size=None)
    start = checkpoint.load_as(path, reading)
    names = {field.name for field in fields(model.config)} - {field.name for field in fields(ImageConfig)}
    pairs = [(name, getattr(start.config, name), getattr(model.config, name)) for name in sorted(names - _GRID)]
    different = "; ".join(f"{name} is {own}, not {wanted}" for name, own, wanted in pairs if own != wanted)
    if different:
        raise UsageError(f"holds another configuration: {different}", where=str(path), hint="See `--set`.")
    if any(getattr(start.config, name) != getattr(model.config, name) for name in names & _GRID):
        # Of the checkpoint's own stride, the image whose grid is the new model's.
        side = model.image_size[0]
        if "stride" in names:
            side = (model.stages[0].grid[0] - 1) * start.config.stride + start.config.patch_size
        start = checkpoint.load_as(path, replace(reading, image_size=side))
    model.load_state_dict(start.state_dict())


def write_checkpoint(path: Path, model: Backbone, *, name: str, epoch: int) -> None:
    """Write `model` in the container of the Vim authors, a segmenter in mmsegmentation's, weights in float16, through a
    temporary file.

    `name` becomes `args.model`, from which a loader tells layouts with equal keys apart. Raises CheckpointError.
    """
    state = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    container: dict[str, Any]
    if isinstance(model, Segmenter):
        container = mm_container(model, state)
    else:
        stated = {name: getattr(model.config, name) for name in _IMAGES}
        size = {"input_size": model.image_size[0], "nb_classes": model.num_classes}
        container = {"model": state, "epoch": epoch, "args": argparse.Namespace(model=name, **size, **stated)}
    content = io.BytesIO()  # saved in memory first: torch.save to a path would put that path's name into the bytes
    torch.save(container, content)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.getvalue())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot be written: {error.strerror}", where=str(path)) from error
