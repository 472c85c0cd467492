"""`ssmprune sensitivity`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmprune_cli.cli import output, values
from ssmprune_cli.cli.help import DATA, OUTPUT
from ssmprune_cli.cli.options import (
    AsJson,
    BackendName,
    DeviceName,
    StateFile,
    choice_option,
    importance_option,
    ratios_option,
    reads_checkpoints,
    reduction_option,
    seed_option,
    split,
)
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from rich.table import Table

    from ssmprune_cli.report import SensitivityFacts


@reads_checkpoints
def command(
    ckpt: Annotated[Path, typer.Argument(help="The checkpoint, as its authors published it.")],
    calib: Annotated[
        Path,
        typer.Option(help="Unlabelled images: a folder, a tree of folders or an .npz.", rich_help_panel=DATA),
    ],
    keep: Annotated[str, ratios_option("--keep", "Ratios of patch tokens kept at the point.")] = "0.9,0.7,0.5",
    importance: Annotated[str, importance_option("Score by which tokens stay")] = "clip",
    reduction: Annotated[str, reduction_option("What becomes of the other tokens")] = "context",
    alignment: Annotated[
        str,
        choice_option("--alignment", ("auto", *values.ALIGNMENTS), "How scans make up for dropped tokens"),
    ] = "auto",
    seed: Annotated[int, seed_option("Seed of random scores and of the choice of images.")] = 0,
    calib_images: Annotated[int, typer.Option(min=2, help="How many of the images to use.", rich_help_panel=DATA)] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write sensitivity.json to.", rich_help_panel=OUTPUT)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this .svg.", rich_help_panel=OUTPUT)] = None,
    state: StateFile = None,
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
    device: DeviceName = "cpu",
    backend: BackendName = "auto",
) -> None:
    """Prune at one point at a time: divergence from the dense model, error of the tokens, multiply-adds left.

    For every possible point and every --keep. With --out or --state, a run that was killed continues with the same
    command. The token error is |pruned - dense| / |dense| of the tokens left after the last block.
    """
    ratios = split(keep)

    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.tasks import TASKS
    from ssmprune_cli.workflows.reporting import sensitivity_series, write_plot
    from ssmprune_cli.workflows.sensitivity import sensitivity
    from ssmprune_cli.workflows.source import Source
    from ssmprune_cli.workflows.write import check_folder, check_place, write_text

    if out is not None:
        check_folder(out, "", allowed=True)
    check_place(plot, "--plot")
    check_place(state, "--state")
    use_backend(backend)
    if state is None and out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        state = out.with_name(f"{out.name}.sensitivity-state.json")
    with output.progress("Measuring") as advance, output.kept_for_the_next_run(state):
        found, saved = sensitivity(
            Source(ckpt, reading),
            calib,
            ratios=ratios,
            importance=importance,
            reduction=reduction,
            alignment=alignment,
            images=calib_images,
            seed=seed,
            device=device,
            state_path=state,
            announce=output.note,
            progress=advance,
        )
    data = found.model_dump(mode="json")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "sensitivity.json", json.dumps(data, indent=1) + "\n")
        output.note(f"Written to {out / 'sensitivity.json'}")
    if plot is not None:
        series = sensitivity_series(found.measurements)
        y_label = f"divergence, {TASKS.get(found.task).unit}"
        write_plot(plot, series, title=ckpt.name, x_label="pruned after block", y_label=y_label)
        output.note(f"Plot written to {plot}")
    saved.remove()
    unit = TASKS.get(found.task).unit
    output.emit(_table(ckpt.name, unit, found.measurements), data, as_json=as_json)


def _table(name: str, unit: str, found: Sequence[SensitivityFacts]) -> Table:
    from rich.table import Table

    table = Table(title=f"{name}: pruned at one point (± one standard error)", title_justify="left")
    for column in ("after block", "keep", f"divergence, {unit}", "token error", "multiply-adds"):
        table.add_column(column, justify="right")
    for one in found:
        table.add_row(
            str(one.point),
            f"{one.keep:g}",
            "not finite" if one.divergence is None else f"{one.divergence:.4f} ± {one.divergence_se:.4f}",
            "not finite" if one.token_error is None else f"{one.token_error:.3f}",
            f"{one.multiply_adds:.3f}",
        )
    return table
