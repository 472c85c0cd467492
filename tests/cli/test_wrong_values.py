"""Every option of every command, with every kind of wrong value: exit code 2, the option's name, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from ssmprune_cli.cli.app import app
from ssmprune_cli.cli.main import explain
from ssmprune_cli.cli.values import (
    ALIGNMENTS,
    BACKENDS,
    DATASETS,
    FAMILIES,
    IMPORTANCES,
    PRECISIONS,
    REDUCTIONS,
)
from ssmprune_cli.errors import SsmpruneError

ROOT: Any = typer.main.get_command(app)  # made once: it takes longer than to refuse a value
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"

NAME = ("", "klip", "Clip ", "clip,l1", "\x1b[31m")
RATIO = ("", "x", "0", "-0.5", "1.01", "nan", "inf", "1e400")
RATIOS = (*RATIO, "0.5,", "0.5;0.4", "0.5,x", "0.5,nan")
COUNTS = ("", "x", "0", "-1", "2.5", "5,", "5,x", "nan", "5,0")
FROM_1 = ("", "x", "0", "-1", "2.5", "nan", "1e3")
FROM_0 = ("", "x", "-1", "2.5", "nan")
ABOVE_0 = ("", "x", "0", "-1", "nan", "inf")
NOT_NEGATIVE = ("", "x", "-1", "nan", "inf")
LIMIT = ("", "x", "-101", "nan", "inf")
TRIPLE = ("", "x", "0.5", "0.5,0.5", "0.5,0.5,0.5,0.5", "0.5,0.5,x", "0.5,0.5,nan")

VALUES: dict[str, tuple[str, ...]] = {
    "--family": NAME,
    "--variant": NAME,
    "--weights": ("klip",),
    "--module": ("", "klip", ":build", "klip:", "klip:build it", "../klip:build", "klip:build:it", "\x1b[31m:build"),
    "--image-size": (*FROM_1, "99999"),
    "--stride": (*FROM_1, "99999"),
    "--crop": RATIO,
    "--interpolation": NAME,
    "--mean": TRIPLE,
    "--std": (*TRIPLE, "0,1,1", "-1,1,1"),
    "--length": (*FROM_1, "9999999"),
    "--protect-last": FROM_1,
    "--lengths": ("", "x", "0", "512", "1k,", "1k,x", "4k,1k", "1k,1024", "2.5,8", "9999k,99999k", "-1k,4k"),
    "--image-sizes": ("", "x", "0", "224", "224,", "224,x", "512,224", "224,224", "2.5,8", "224,99999"),
    "--keep": RATIOS,
    "--tokens": COUNTS,
    "--points": (*COUNTS, "99", "3,2", "2,2"),
    "--flops": RATIOS,
    "--times": RATIOS,
    "--target-flops": RATIO,
    "--target-latency": ABOVE_0,
    "--target-latency-ratio": RATIO,
    "--target-speedup": (*ABOVE_0, "1", "0.5"),
    "--target-size": (
        "",
        "x",
        "5",
        "0MB",
        "-1MB",
        "0.0000001kB",
        "5TB",
        "5mb",
        "nanMB",
        "1e3MB",
        "9999999999GB",
        "\u0665MB",
    ),
    "--resize": (*FROM_1, "99999", "64", "128", "33"),
    "--cut-blocks": (*FROM_1, "99999", "4"),
    "--images-at-once": FROM_1,
    "--importance": NAME,
    "--reduction": NAME,
    "--alignment": NAME,
    "--repair": NAME,
    "--distill-steps": FROM_1,
    "--methods": ("", "klip", "clip/drop", "clip/drop/klip", "clip/klip/none", "klip/drop/none", "clip/drop/mass"),
    "--recipe": ("", "klip"),
    "--set": ("", "klip", "klip=1", "pruning.klip=1", "pruning.keep=x", "training.epochs=x", "training.keep=1"),
    "--seed": (*FROM_0, str(2**63)),
    "--evaluations": FROM_1,
    "--time-limit": NOT_NEGATIVE,
    "--dataset": NAME,
    "--limit": FROM_1,
    "--calib-images": FROM_1,
    "--samples": FROM_0,
    "--count": FROM_1,
    "--max-drop": LIMIT,
    "--min-accuracy": LIMIT,
    "--min-miou": LIMIT,
    "--segments": (*FROM_1, "65"),
    "--crops": (*FROM_1, "65"),
    "--slide": ("", "x", "64", "0,0", "64,-1", "64,43,2", "nan,1", "99999,1"),
    "--max-flops": NOT_NEGATIVE,
    "--max-latency-ratio": NOT_NEGATIVE,
    "--judge": NAME,
    "--format": NAME,
    "--table": NAME,
    "--device": ("", "gpu", "mps", "cuda:99", "cuda:x", "cpu,cuda"),
    "--backend": NAME,
    "--precision": NAME,
    "--batch-size": FROM_1,
    "--rounds": FROM_1,
    "--peer-timeout": ABOVE_0,
    "--workers": FROM_0,
    "--save-every": FROM_1,
    "--epochs": FROM_1,
    "--lr": ABOVE_0,
    "--warmup": NOT_NEGATIVE,
    "--weight-decay": NOT_NEGATIVE,
    "--label-smoothing": (*NOT_NEGATIVE, "1"),
    "--shift": FROM_0,
    "--batch": FROM_1,
    "--opset": (*FROM_1, "3"),
    "--int8": NAME,
}
# Paths, and a name that is written: any text may be right.
FREE = {
    "--calib", "--data", "--val-data", "--out", "--state", "--plot", "--compare", "--dense", "--checkpoints",
    "--distill", "--init", "--checkpoint", "--name", "--save-predictions", "--check",
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(8) % 10)
    return path


def arguments(command: str, images: Path, out: Path, option: str) -> list[str]:
    """What the command needs beside the option, all of it right."""
    labelled = ["--data", str(images), "--dataset", "npz"]
    calib = ["--calib", str(images)]
    target = ["--target-flops", "0.8"] if option in ("--evaluations", "--time-limit") else []
    given = {
        "compress": [
            str(CHECKPOINT),
            *([] if target or option.startswith("--target") else ["--keep", "0.9"]),
            *target,
            *labelled,
            *calib,
            "--out",
            str(out),
        ],
        "search": [str(CHECKPOINT), *calib, "--out", str(out)],
        "sensitivity": [str(CHECKPOINT), *calib],
        "compare": [str(CHECKPOINT), *labelled, "--keep", "0.5"],
        "eval": [str(CHECKPOINT), *labelled, "--compare", str(CHECKPOINT)],
        "profile": [str(CHECKPOINT)],
        "inspect": [str(CHECKPOINT)],
        "report": [str(out)],
        "visualize": [str(CHECKPOINT), str(images), "--out", str(out)],
        "finetune": [str(CHECKPOINT), *labelled, "--out", str(out)],
        "export": [str(CHECKPOINT), "--out", str(out)],
    }[command]
    if option in given:  # the wrong value takes the place of the right one
        place = given.index(option)
        del given[place : place + 2]
    if option == "--tokens":
        del given[given.index("--keep") : given.index("--keep") + 2]
    if option == "--table":
        given.remove(str(CHECKPOINT))
    return given


def options() -> Iterator[tuple[str, str, Any]]:
    """Command, name and definition of every option that takes a value."""
    for name, command in ROOT.commands.items():
        for each in getattr(command, "params", []):
            if each.param_type_name == "option" and not getattr(each, "is_flag", False):
                yield name, each.opts[0], each


def test_every_option_is_in_the_table() -> None:
    assert {option for _, option, _ in options()} == VALUES.keys() | FREE


@pytest.mark.parametrize(("command", "option"), [each[:2] for each in options() if each[1] not in FREE])
def test_wrong_value(command: str, option: str, images: Path, tmp_path: Path, capsys: Any) -> None:
    for value in VALUES[option]:
        typed = [command, *arguments(command, images, tmp_path / "out", option), f"{option}={value}"]
        capsys.readouterr()
        try:
            ROOT.main(typed, prog_name="ssmprune")
            code: Any = 0
        except SystemExit as end:
            code = end.code
        except Exception as error:
            code = explain(error)
        shown = capsys.readouterr()
        assert code == 2, (typed, shown.err)
        assert option in shown.err.replace(str(images), ""), (typed, shown.err)
        assert "Traceback" not in shown.err and "\x1b" not in shown.err and shown.out == "", typed
        assert not (tmp_path / "out").exists(), typed


@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("--family", FAMILIES),
        ("--importance", IMPORTANCES),
        ("--reduction", REDUCTIONS),
        ("--alignment", ALIGNMENTS),
        ("--dataset", DATASETS),
        ("--backend", BACKENDS),
        ("--precision", PRECISIONS),
    ],
)
def test_names_that_are_unknown_come_with_those_that_are(
    option: str, names: tuple[str, ...], images: Path, tmp_path: Path, capsys: Any
) -> None:
    command = "eval" if option == "--precision" else "compress"
    with pytest.raises(SystemExit):
        ROOT.main(
            [command, *arguments(command, images, tmp_path, option), option, names[0] + "s"], prog_name="ssmprune"
        )
    error = " ".join(capsys.readouterr().err.split())
    assert f"'{option}'" in error and f"'{names[0]}s' is none of " in error
    assert all(name in error for name in names) and f"did you mean '{names[0]}'?" in error


def test_names_are_those_of_the_registries() -> None:
    from ssmprune_cli import data, kernels, models, pruning
    from ssmprune_cli.workflows.measure.precision import PRECISIONS as measured

    assert models.FAMILIES.names() == FAMILIES
    assert all(name == family.name for name, family in models.FAMILIES.items())
    assert pruning.IMPORTANCES.names() == IMPORTANCES
    assert pruning.REDUCTIONS.names() == REDUCTIONS
    assert pruning.ALIGNMENTS.names() == ALIGNMENTS
    assert data.DATASETS.names() == DATASETS
    assert tuple(measured) == PRECISIONS
    assert set(BACKENDS[1:]) <= set(kernels.available_backends())  # tests register more


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("compress", "--out"),
        ("compress", "--state"),
        ("search", "--out"),
        ("search", "--state"),
        ("sensitivity", "--out"),
        ("sensitivity", "--plot"),
        ("sensitivity", "--state"),
        ("compare", "--plot"),
        ("profile", "--plot"),
        ("report", "--out"),
        ("visualize", "--out"),
        ("finetune", "--out"),
        ("finetune", "--checkpoint"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(
    command: str, option: str, images: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssmprune_cli.checkpoint.loading.read", lambda *arguments, **options: pytest.fail("read"))
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x.html"
    # What is read is not there: who reads before looking at the place complains of that.
    typed = [each.replace(str(images), "nothing.npz") for each in arguments(command, images, tmp_path / "a", option)]
    if (command, option) == ("compress", "--state"):
        typed[typed.index("--keep") : typed.index("--keep") + 2] = ["--target-flops", "0.8"]
    if option == "--checkpoint":
        typed[0] = "--from-scratch"
    try:
        ROOT.main([command, *typed, f"{option}={place}"], prog_name="ssmprune")
        pytest.fail("done")
    except SystemExit as end:
        pytest.fail(f"{end.code} {capsys.readouterr().err}")
    except SsmpruneError as error:
        assert str(place) in str(error) and "cannot be written: " in str(error), error
