"""Options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ssmprune_cli.cli import values
from ssmprune_cli.cli.help import DATA, DEVICE, HOW_MUCH, INPUT, METHOD, OUTPUT, SEARCH, TRAINING
from ssmprune_cli.preprocessing import INTERPOLATIONS, Reading
from ssmprune_cli.recipe import Training

MAX_SIDE = 1 << 14  # as `models.MAX_SIDE`
MAX_LENGTH = 1 << 20  # as `models.MAX_LENGTH`

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        envvar="SSMPRUNE_BACKEND",
        parser=values.one_of(values.BACKENDS),
        metavar="NAME",
        autocompletion=lambda: values.BACKENDS,
        help=f"Kernel backend: {values.listed(values.BACKENDS)}. auto takes the best one; `ssmprune env` says why some "
        "are missing.",
        rich_help_panel=DEVICE,
    ),
]
DeviceName = Annotated[
    str, typer.Option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...", rich_help_panel=DEVICE)
]
PrecisionName = Annotated[
    str,
    typer.Option(
        "--precision",
        parser=values.one_of(values.PRECISIONS),
        metavar="NAME",
        autocompletion=lambda: values.PRECISIONS,
        help=f"Of weights and of what they meet: {values.listed(values.PRECISIONS)}. Residual stream and scan states "
        "stay in fp32.",
        rich_help_panel=DEVICE,
    ),
]
PeerTimeout = Annotated[
    float,
    typer.Option(
        "--peer-timeout",
        parser=values.number(1, 10**6),
        metavar="SECONDS",
        help="Of several processes (torchrun): seconds after which one that does not answer is given up.",
        rich_help_panel=DEVICE,
    ),
]
Evaluations = Annotated[
    int,
    typer.Option(
        "--evaluations",
        min=1,
        help="A search tries at most so many candidates for each budget.",
        rich_help_panel=SEARCH,
    ),
]
KeepImageSize = Annotated[
    bool,
    typer.Option("--keep-image-size", help="A search tries no models for smaller images.", rich_help_panel=SEARCH),
]
KeepBlocks = Annotated[
    bool,
    typer.Option("--keep-blocks", help="A search tries no models with fewer blocks.", rich_help_panel=SEARCH),
]
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8",
        help="Put the weights of linear layers into eight bits, alone or after tokens are dropped: a quarter of "
        "the size. Layers that the --calib images show to suffer stay in float.",
        rich_help_panel=HOW_MUCH,
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        "--time-limit",
        parser=values.number(0),
        metavar="SECONDS",
        help="Seconds after which a search, for each budget, settles for its best.",
        rich_help_panel=SEARCH,
    ),
]
StateFile = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="File that keeps what was found, so that a killed run continues [default: beside --out].",
        rich_help_panel=OUTPUT,
    ),
]


def choice_option(flag: str, names: tuple[str, ...], help_text: str, panel: str = METHOD) -> Any:
    """An option that takes one of `names`; its help ends with them."""
    return typer.Option(
        flag,
        parser=values.one_of(names),
        metavar="NAME",
        autocompletion=lambda: names,
        help=f"{help_text}: {values.listed(names)}.",
        rich_help_panel=panel,
    )


def data_option(help_text: str) -> Any:
    """--data, where what is made may be judged on labelled images."""
    return typer.Option("--data", "--eval-data", help=help_text, rich_help_panel=DATA)


DataLimit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Use so many of the --data images, drawn from equal stretches.", rich_help_panel=DATA
    ),
]
RepairKind = Annotated[
    Literal["auto", "head", "head+side", "none"] | None,
    choice_option(
        "--repair",
        values.REPAIRS,
        "What to mend after calibration, without labels: head (a head fitted to the dense model's answers), head+side "
        "(one that also sees means of the dropped tokens), none, or auto, the default: the better of both. It is kept "
        "only if it is clearly better on images held back. One of",
    ),
]
TimedBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        help="Images in a batch that is timed [default: 8; of a dense model 1].",
        rich_help_panel=DEVICE,
    ),
]

Slide = Annotated[
    str | None,
    typer.Option(
        parser=values.numbers("512,341", 1, MAX_SIDE, whole=True, count=2),
        metavar="CROP,STRIDE",
        help="Segmentation: look at an image through windows of CROP pixels that move by STRIDE, and not at the whole "
        "of it.",
        rich_help_panel=DATA,
    ),
]


def importance_option(help_text: str) -> Any:
    return choice_option("--importance", values.IMPORTANCES, help_text)


def reduction_option(help_text: str) -> Any:
    return choice_option("--reduction", values.REDUCTIONS, help_text)


def dataset_option(help_text: str) -> Any:
    return choice_option("--dataset", values.DATASETS, help_text, DATA)


def seed_option(help_text: str) -> Any:
    parser = values.number(0, values.MAX_SEED, whole=True)
    return typer.Option("--seed", parser=parser, metavar="N", help=help_text, rich_help_panel=METHOD)


def ratios_option(flag: str, help_text: str, panel: str = HOW_MUCH) -> Any:
    """An option that takes shares above 0 and at most 1, separated by commas."""
    parser = values.numbers("0.8,0.6", high=1, above=0)
    return typer.Option(flag, parser=parser, metavar="RATIOS", help=help_text, rich_help_panel=panel)


def counts_option(flag: str, help_text: str, example: str) -> Any:
    """An option that takes whole numbers from 1 on, separated by commas."""
    parser = values.numbers(example, 1, 10**6, whole=True)
    return typer.Option(flag, parser=parser, metavar="NUMBERS", help=help_text, rich_help_panel=HOW_MUCH)


def training_option(flag: str, metavar: str, help_text: str, *, field: str | None = None) -> Any:
    """An option that sets a field of a recipe's training section, the one of its name unless another is given."""
    parser = values.setting(Training, field or flag[2:].replace("-", "_"))
    return typer.Option(flag, parser=parser, metavar=metavar, help=help_text, rich_help_panel=TRAINING)


def split(text: str) -> list[float]:
    """The numbers of an option that takes several."""
    return [float(part) for part in text.split(",")]


def pair(text: str) -> tuple[int, int]:
    """The two whole numbers of an option."""
    first, second = split(text)
    return int(first), int(second)


def _of_reading(name: str, help_text: str, metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(f"--{name}", help=help_text, metavar=metavar, rich_help_panel=INPUT, **more)


# The options that make a Reading, by its fields, as Typer takes them.
_FIELDS: dict[str, tuple[Any, Any]] = {
    "family": (
        str | None,
        _of_reading(
            "family",
            f"Model family, if it cannot be told from the file: {values.listed(values.FAMILIES)}. Installed packages "
            "can add others.",
            "NAME",
            parser=values.family,
            autocompletion=lambda: values.FAMILIES,
        ),
    ),
    "variant": (
        str | None,
        _of_reading("variant", "Published configuration, if it cannot be told; a wrong one lists them all.", "NAME"),
    ),
    "weights": (
        str,
        _of_reading("weights", "Which copy in the file: model, model_ema or the name of an entry.", "NAME"),
    ),
    "image_size": (
        int | None,
        _of_reading(
            "image-size",
            "Image side; position embeddings are resized if need be.",
            "PIXELS",
            parser=values.number(1, MAX_SIDE, whole=True),
        ),
    ),
    "stride": (
        int | None,
        _of_reading(
            "stride",
            "Stride of the patches, if it cannot be told.",
            "PIXELS",
            parser=values.number(1, MAX_SIDE, whole=True),
        ),
    ),
    "crop": (
        float | None,
        _of_reading(
            "crop",
            "Part of the resized image that the centre crop keeps: 0.875, or 1.0.",
            "RATIO",
            parser=values.number(0.01, 1),
        ),
    ),
    "interpolation": (str | None, choice_option("--interpolation", INTERPOLATIONS, "Of the resizing", INPUT)),
    "mean": (
        str | None,
        _of_reading(
            "mean",
            "Of the channels, of 0 to 1: 0.485,0.456,0.406.",
            "R,G,B",
            parser=values.numbers("0.5,0.5,0.5", -1000, 1000, count=3),
        ),
    ),
    "std": (
        str | None,
        _of_reading(
            "std",
            "Deviation of the channels: 0.229,0.224,0.225.",
            "R,G,B",
            parser=values.numbers("0.5,0.5,0.5", high=1000, above=0, count=3),
        ),
    ),
    "length": (
        int | None,
        _of_reading(
            "length",
            "Text: tokens of a window [default: 1024].",
            "TOKENS",
            parser=values.number(1, MAX_LENGTH, whole=True),
        ),
    ),
    "protect_last": (
        int | None,
        _of_reading(
            "protect-last",
            "Text: last tokens of a window, which are never dropped and which answers are judged by [default: 4].",
            "TOKENS",
            parser=values.number(1, MAX_LENGTH, whole=True),
        ),
    ),
}


def reads_checkpoints(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of a Reading in the place of its parameter `reading`.

    Typer reads options off the signature. What is typed holds for every checkpoint that the command reads.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        reading = _reading({name: options.pop(name) for name in _FIELDS})
        command(*arguments, reading=reading, **options)

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


def _reading(options: dict[str, Any]) -> Reading:
    for name in ("mean", "std"):
        options[name] = None if options[name] is None else tuple(split(options[name]))
    return Reading(**options)
