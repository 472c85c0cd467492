"""Options that several commands have."""

from __future__ import annotations

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
