"""Files in int8: which products are in integers, what is told of the cost, and that a broken limit leaves no file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray

from ssmprune_cli import checkpoint
from ssmprune_cli.cli.app import app
from ssmprune_cli.cli.main import explain
from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export import Exported, check_int8, opened, quantised
from ssmprune_cli.models import Backbone

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Made = tuple[Backbone, Exported]
ROOT: Any = typer.main.get_command(app)


def in_int8(made: Exported, path: Path, how: Literal["static", "dynamic"], model: Backbone) -> tuple[Exported, int]:
    images = torch.randn(4, 3, 40, 40)
    return quantised(made, path, how, model, images, "random", images.split(2) if how == "static" else ())


def values(file: Any) -> dict[str, NDArray[Any]]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in file.graph.initializer}


@pytest.mark.parametrize("inlined", [False, True], ids=["functions", "inlined"])
@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_large_products_alone_are_in_integers(
    how: Literal["static", "dynamic"], inlined: bool, vim_onnx: Made, tmp_path: Path
) -> None:
    model, made = vim_onnx
    if inlined:
        from onnx import inliner

        onnx.save(inliner.inline_local_functions(onnx.load(made.path)), tmp_path / "plain.onnx")
        made = replace(made, path=tmp_path / "plain.onnx", target="onnx-plain")
    small, products = in_int8(made, tmp_path / "int8.onnx", how, model)
    file = onnx.load(small.path)
    held = values(file)
    integers = [each for each in held.values() if each.dtype == np.int8 and each.ndim == 2]
    # A Vim's block has one product before its scans and one after. The second block of a pruned one splits the first
    # in two: gates of tokens that are read, and what scans see of all.
    assert products == len(integers) == 5
    assert all(abs(each.astype(int)).max() <= 64 for each in integers)  # 7 bits: two sums of 8 overflow without VNNI
    floats = [node for node in file.graph.node if node.op_type == "MatMul" and node.name.endswith("_of_scan")]
    assert len(floats) == 8 and all(held[node.input[1]].dtype == np.float32 for node in floats)
    weights = [sum(each.nbytes for each in values(onnx.load(one.path)).values()) for one in (made, small)]
    assert weights[1] < weights[0] and small.tolerance is None
    # Of random weights and noise: larger than what float32 leaves, and far from another model's.
    assert 1e-4 < small.error < 0.3
    session = opened(small.path)
    assert session.computes_in == "int8" and json.loads(session.said["int8"]) == {"how": how, "products": 5}
    checked = json.loads(session.said["check"])  # its own, and not that of the file in float
    assert checked["tolerance"] is None and max(each["error"] for each in checked["runs"]) == small.error


def test_what_does_not_fit_is_refused(vim_onnx: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="'pt2' has no integers"):
        check_int8("pt2", "dynamic", calibrated=False)
    with pytest.raises(UsageError, match=r"static needs images.*\n.*--int8 dynamic"):
        check_int8("onnx", "static", calibrated=False)
    with pytest.raises(UsageError, match="dynamic uses no calibration images"):
        check_int8("onnx-plain", "dynamic", calibrated=True)
    monkeypatch.setattr("ssmprune_cli.export.onnx.int8.large_products", lambda model: [])
    with pytest.raises(SsmpruneError, match="has no products of tokens with weights"):
        in_int8(vim_onnx[1], tmp_path / "int8.onnx", "dynamic", vim_onnx[0])
    assert not (tmp_path / "int8.onnx").exists()


@pytest.fixture
def typed(vim_onnx: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line for the model, whose file in float32 is there already: to make it takes seconds."""
    model, made = vim_onnx

    def copied(given: Backbone, path: Path, *arguments: Any, **options: Any) -> Exported:
        path.write_bytes(made.path.read_bytes())
        return replace(made, path=path)

    monkeypatch.setattr("ssmprune_cli.workflows.export.export", copied)
    checkpoint.save(tmp_path / "vim", model)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(12) % 5)
    return ["export", str(tmp_path / "vim"), "--out", str(tmp_path / "new" / "folder"), "--json"]


def run(typed: list[str]) -> int:
    try:
        ROOT.main(typed, prog_name="ssmprune")
    except SystemExit as end:
        return int(end.code or 0)
    except SsmpruneError as error:
        return explain(error)
    return 0


def test_the_command_tells_what_int8_costs(typed: list[str], tmp_path: Path, capsys: Any) -> None:
    images = str(tmp_path / "images.npz")
    assert run([*typed, "--int8", "static", "--calib", images, "--data", images, "--max-drop", "100"]) == 0
    told = json.loads(capsys.readouterr().out)
    file = tmp_path / "new" / "folder" / "model.onnx"
    assert told["path"] == str(file) and told["kept"] and told["limits"][0]["holds"]
    facts = told["int8"]
    assert facts["products"] == 5 and facts["float32_bytes"] > facts["int8_bytes"] and facts["compared_images"] == 12
    assert 0 <= facts["same_answers"] <= 1 and [each["batch"] for each in facts["times"]] == [1, 8]
    assert facts["accuracy"]["count"] == 12 and {"top1", "float32", "difference_interval"} <= facts["accuracy"].keys()
    assert json.loads(opened(file).said["int8_cost"]) == {k: v for k, v in facts.items() if k != "int8_bytes"}
    assert told["size"] == facts["int8_bytes"] == file.stat().st_size
    assert [each.name for each in file.parent.iterdir()] == ["model.onnx"]


def test_a_broken_limit_leaves_no_file_and_no_folder(typed: list[str], tmp_path: Path, capsys: Any) -> None:
    images = str(tmp_path / "images.npz")
    typed.remove("--json")
    assert run([*typed, "--int8", "dynamic", "--data", images, "--max-drop", "-100"]) == 3
    said = capsys.readouterr()
    words = " ".join(said.out.split())
    assert "A limit is broken: " in words and "was not kept." in words and "--max-drop allows -100" in said.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-drop", "1"], "--max-drop needs --data"),
        (["--dataset", "npz"], "--dataset: needs --data"),
        (["--limit", "3", "--int8", "dynamic"], "--limit: needs --data"),
        (["--data", "images.npz"], "--data: is for files in int8"),
        (["--calib", "images.npz"], "--calib: is for files in int8"),
    ],
)
def test_options_that_say_nothing_are_refused(options: list[str], said: str, typed: list[str], capsys: Any) -> None:
    assert run([*typed, *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
