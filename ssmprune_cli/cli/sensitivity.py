"""`ssmprune sensitivity`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.options import BackendName, StateFile, reads_checkpoints
from ssmprune_cli.cli.search import numbers
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from rich.table import Table

    from ssmprune_cli.report import SensitivityFacts


@reads_checkpoints
def command(
    ckpt: Annotated[Path, typer.Argument(help="The checkpoint, as its authors published it.")],
    calib: Annotated[Path, typer.Option(help="Unlabelled images: a folder, a tree of folders or an .npz.")],
    keep: Annotated[str, typer.Option(help="Ratios of patch tokens kept at the point.")] = "0.9,0.7,0.5",
    calib_images: Annotated[int, typer.Option(min=2, help="How many of the images to use.")] = 64,
    importance: Annotated[str, typer.Option(help="Score.")] = "clip",
    reduction: Annotated[str, typer.Option(help="Reduction.")] = "context",
    alignment: Annotated[str, typer.Option(help="Alignment.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder to write sensitivity.json to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a plot to this .svg.")] = None,
    state: StateFile = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random scores and of the choice of images.")] = 0,
    reading: Reading = NOTHING_SAID,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    backend: BackendName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prune at one point at a time: divergence from the dense model, error of the tokens, multiply-adds left.

    For every possible point and every --keep. With --out or --state, a run that was killed continues with the same
    command. The token error is |pruned - dense| / |dense| of the tokens left after the last block.
    """
    ratios = numbers(keep, "--keep")

    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.workflows.reporting import sensitivity_series, write_plot
    from ssmprune_cli.workflows.sensitivity import sensitivity
    from ssmprune_cli.workflows.source import Source
    from ssmprune_cli.workflows.write import write_text

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
        write_plot(plot, series, title=ckpt.name, x_label="pruned after block", y_label="divergence, nats")
        output.note(f"Plot written to {plot}")
    saved.remove()
    output.emit(_table(ckpt.name, found.measurements), data, as_json=as_json)


def _table(name: str, found: Sequence[SensitivityFacts]) -> Table:
    from rich.table import Table

    table = Table(title=f"{name}: pruned at one point (± one standard error)", title_justify="left")
    for column in ("after block", "keep", "divergence, nats", "token error", "multiply-adds"):
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
