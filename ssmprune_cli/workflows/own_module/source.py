"""A file of weights, or an output folder, and the user's function that builds the module for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from ssmprune_cli import checkpoint
from ssmprune_cli.adapt import Inside, accelerate, put_back
from ssmprune_cli.errors import CheckpointError, SsmpruneError, UsageError
from ssmprune_cli.preprocessing import NOTHING_SAID, Preprocessing, Reading
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.own_module.building import build, check_name, fill

_OF_FAMILIES = ("family", "variant", "stride", "length", "protect_last")
_OF_IMAGES = ("image_size", "crop", "mean", "std", "interpolation")


@dataclass(frozen=True)
class ModuleSource:
    """What a command about a user's own module starts from.

    path     a file of weights, or a folder that `compress` wrote
    module   PACKAGE:FUNCTION, code of the user's that is imported and called
    reading  which weights, and how images are prepared; of a folder nothing, it says that itself
    """

    path: Path
    module: str
    reading: Reading = NOTHING_SAID
    device: str = "cpu"

    def check(self) -> None:
        """Raises UsageError for options that mean nothing here."""
        check_name(self.module)
        of_folder = checkpoint.is_own_module(self.path)
        for name in _OF_FAMILIES + (_OF_IMAGES if of_folder else ()):
            if getattr(self.reading, name) is not None:
                by = "the output folder says" if name in _OF_IMAGES else "a module of your own says"
                raise UsageError(f"{by} that itself: leave it out", where=f"--{name.replace('_', '-')}")
        if of_folder and self.reading.weights != NOTHING_SAID.weights:
            raise UsageError("an output folder has one set of weights: leave it out", where="--weights")
        resolve_device(self.device)

    @cached_property
    def stored(self) -> checkpoint.OwnModule | None:
        """What the folder holds, read once; None for a file."""
        return checkpoint.read_own_module(self.path) if checkpoint.is_own_module(self.path) else None

    def load(self) -> nn.Module:
        """The module with the weights in it, on the device, with its own code. Raises UsageError or CheckpointError."""
        stored = self.stored
        state = checkpoint.read(self.path, weights=self.reading.weights).state if stored is None else stored.state
        model = build(self.module)
        fill(model, state, str(self.path))
        return model.to(resolve_device(self.device))

    def put_back(self, model: nn.Module) -> Inside | None:
        """Let `model`, from `load`, drop tokens as the folder says; None for a file, which says nothing."""
        stored = self.stored
        if stored is None:
            return None
        try:
            inside = Inside.from_dict(stored.inside)
            put_back(model, inside, stored.calibrated)
        except CheckpointError as error:
            raise CheckpointError(error.what, where=str(self.path), hint=error.hint) from error
        return inside

    def preprocessing(self) -> Preprocessing:
        """How images are prepared. What neither a folder nor an option says is asked for, by a UsageError."""
        stored = self.stored
        if stored is not None:
            try:
                return TypeAdapter(Preprocessing).validate_python(stored.images)
            except ValidationError as error:
                raise CheckpointError("`images` is damaged", where=str(self.path / "config.json")) from error
        said = self.reading
        names = ("image_size", "crop", "mean", "std")
        missing = [f"--{name.replace('_', '-')}" for name in names if getattr(said, name) is None]
        if missing:
            raise UsageError(
                f"nothing says how images are prepared for this module: {', '.join(missing)} is missing",
                hint="Give them as it was trained, such as `--image-size 224 --crop 0.875 --mean 0.485,0.456,0.406 "
                "--std 0.229,0.224,0.225`; `--interpolation` is bicubic unless you say otherwise.",
            )
        assert said.image_size is not None and said.crop is not None and said.mean is not None and said.std is not None
        resize = int(said.image_size / said.crop)
        return Preprocessing(resize, said.image_size, said.interpolation or "bicubic", said.mean, said.std)

    def side(self) -> int:
        """Of the square images, in pixels."""
        if self.reading.image_size is not None:
            return self.reading.image_size
        if self.stored is None:
            raise UsageError("--image-size is missing: no weights of a module of your own tell it")
        return self.preprocessing().crop


def as_values(way: Preprocessing) -> dict[str, Any]:
    """`way` for a config.json."""
    values = asdict(way)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def accelerated(model: nn.Module, example: Tensor) -> list[str]:
    """Let our ops compute the mixers of `model`; what is to be known of it. Raises UsageError if there are none, and
    SsmpruneError if the module does not answer `example`."""
    found = accelerate(model)
    failure = failing(model, example)
    if failure is not None:
        size = " x ".join(map(str, example.shape[1:]))
        raise SsmpruneError(
            f"the module fails on images of {size}: {failure}",
            hint="Does it take such images? `--image-size` says how large they are.",
        )
    return [f"{each.line}. Its own code computes it." for each in found.mixers if each.verdict.form is None]


def failing(model: nn.Module, example: Tensor) -> str | None:
    """How the code of `model` fails on `example`; None if it does not."""
    try:
        with torch.inference_mode():
            model(example)
    except SsmpruneError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0][:300]
        return f"{type(error).__name__}: {first}"
    return None
