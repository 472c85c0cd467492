"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ssmprune_cli.errors import UsageError
from ssmprune_cli.preprocessing import INTERPOLATIONS, Reading

BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        envvar="SSMPRUNE_BACKEND",
        help="Kernel backend: auto takes the best one; `ssmprune env` lists them, and why some are missing.",
    ),
]

PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision",
        help="Of weights and of what they meet: fp32, bf16 or fp16. Residual stream and scan states stay in fp32.",
    ),
]

PeerTimeout = Annotated[
    float,
    typer.Option(
        "--peer-timeout",
        min=1,
        help="Of several processes (torchrun): seconds after which one that does not answer is given up.",
    ),
]
Evaluations = Annotated[
    int, typer.Option("--evaluations", min=1, help="A search tries at most so many candidates for each budget.")
]
KeepImageSize = Annotated[bool, typer.Option("--keep-image-size", help="A search tries no models for smaller images.")]
TimeLimit = Annotated[
    float | None,
    typer.Option("--time-limit", min=0, help="Seconds after which a search, for each budget, settles for its best."),
]
StateFile = Annotated[
    Path | None,
    typer.Option(
        "--state", help="File that keeps what was found, so that a killed run continues [default: beside --out]."
    ),
]

_READING = "How the checkpoint is read"  # the panel of these options in --help


def _of_reading(name: str, help_text: str, metavar: str | None = None) -> Any:
    return typer.Option(f"--{name}", help=help_text, metavar=metavar, rich_help_panel=_READING)


# The options that make a Reading, by its fields, as Typer takes them.
_FIELDS: dict[str, tuple[Any, Any]] = {
    "family": (str | None, _of_reading("family", "Model family, if it cannot be told from the file.")),
    "variant": (str | None, _of_reading("variant", "Published configuration, if it cannot be told.")),
    "weights": (str, _of_reading("weights", "Which copy in the file: model, model_ema or the name of an entry.")),
    "image_size": (
        int | None,
        _of_reading("image-size", "Image side in pixels; position embeddings are resized if need be.", "PIXELS"),
    ),
    "stride": (int | None, _of_reading("stride", "Stride of the patches, if it cannot be told.", "PIXELS")),
    "crop": (
        float | None,
        _of_reading("crop", "Part of the resized image that the centre crop keeps: 0.875, or 1.0.", "RATIO"),
    ),
    "interpolation": (
        str | None,
        _of_reading("interpolation", f"Of the resizing: {' or '.join(INTERPOLATIONS)}."),
    ),
    "mean": (str | None, _of_reading("mean", "Of the channels, of 0 to 1: 0.485,0.456,0.406.", "R,G,B")),
    "std": (str | None, _of_reading("std", "Deviation of the channels: 0.229,0.224,0.225.", "R,G,B")),
}


def reads_checkpoints(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of a Reading in the place of its parameter `reading`.

    Typer reads options off the signature. What is typed holds for every checkpoint that the command reads.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        values = {name: options.pop(name) for name in _FIELDS}
        command(*arguments, reading=_reading(values), **options)

    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.name != "reading":
            parameters.append(parameter)
            continue
        for field in fields(Reading):
            annotation = Annotated.__class_getitem__(_FIELDS[field.name])  # type: ignore[attr-defined]
            parameters.append(parameter.replace(name=field.name, annotation=annotation, default=field.default))
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _reading(values: dict[str, Any]) -> Reading:
    """Raises UsageError for what is typed and means nothing."""
    if values["interpolation"] not in (None, *INTERPOLATIONS):
        raise UsageError(f"is {' or '.join(INTERPOLATIONS)}, not {values['interpolation']}", where="--interpolation")
    if values["crop"] is not None and not 0.01 <= values["crop"] <= 1:
        raise UsageError(f"is a part of the image, from 0.01 to 1, not {values['crop']:g}", where="--crop")
    for name in ("mean", "std"):
        values[name] = None if values[name] is None else _triple(values[name], f"--{name}")
    return Reading(**values)


def _triple(text: str, option: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"takes three numbers such as 0.5,0.5,0.5, not {text!r}", where=option) from error
    return red, green, blue
