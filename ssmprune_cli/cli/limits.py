"""The options for limits, for CI pipelines: what breaks one ends in exit code 3, with the result printed before."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from ssmprune_cli.cli.help import LIMITS

MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        help="Exit with 3 if the task's metric (top-1, mIoU) falls by more percentage points than this (see --judge).",
        rich_help_panel=LIMITS,
    ),
]
MinAccuracy = Annotated[
    float | None,
    typer.Option(
        "--min-accuracy", help="Exit with 3 if top-1 (%) is below this (see --judge).", rich_help_panel=LIMITS
    ),
]
MinMiou = Annotated[
    float | None,
    typer.Option("--min-miou", help="Exit with 3 if mIoU (%) is below this (see --judge).", rich_help_panel=LIMITS),
]
MaxFlops = Annotated[
    float | None,
    typer.Option(
        "--max-flops",
        help="Exit with 3 above this share of the dense multiply-adds (all directions).",
        rich_help_panel=LIMITS,
    ),
]
MaxLatencyRatio = Annotated[
    float | None,
    typer.Option(
        "--max-latency-ratio",
        help="Exit with 3 if a batch takes more than this times the dense model's.",
        rich_help_panel=LIMITS,
    ),
]
JudgeBy = Annotated[
    Literal["interval", "estimate"],
    typer.Option(
        "--judge",
        help="What has to keep a limit: by default all of the 95 % interval of a value that has one, so that few "
        "images prove little; or the estimate alone.",
        rich_help_panel=LIMITS,
    ),
]
