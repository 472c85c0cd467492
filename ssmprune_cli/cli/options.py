"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
