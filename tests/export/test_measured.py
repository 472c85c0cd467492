"""`eval` and `profile` of an exported file: as of the model in it, or a refusal that says what to type."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from ssmprune_cli.cli.app import app
from ssmprune_cli.data import open_dataset
from ssmprune_cli.errors import CheckpointError, SsmpruneError, UsageError
from ssmprune_cli.export import Exported, export, opened
from ssmprune_cli.kernels import CPU
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.profile import Figures, Profile, figures
from ssmprune_cli.workflows.subject import exported_file, read
from tests.export.small import make

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Made = tuple[Backbone, Exported]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(9) % 5)
    return path


@pytest.fixture
def changed(vim_onnx: Made, tmp_path: Path) -> Callable[..., Path]:
    """The file with other facts: None takes one away. `batch` makes it one for batches of that size only."""

    def change(batch: int | None = None, **facts: str | None) -> Path:
        model = onnx.load(vim_onnx[1].path)
        said = {each.key: each.value for each in model.metadata_props} | facts
        del model.metadata_props[:]
        for name, text in said.items():
            if text is not None:
                model.metadata_props.add(key=name, value=text)
        if batch is not None:
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
        path = tmp_path / "changed.onnx"
        onnx.save(model, path)
        return path

    return change


def test_a_session_of_a_file_answers_as_the_model(vim_onnx: Made) -> None:
    model, made = vim_onnx
    session = opened(made.path)
    batch = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(session(batch), model(batch), rtol=0, atol=1e-5)
    told = str(session.explain())
    assert "session: onnx" in told and "in ONNX Runtime" in told
    assert ("with our kernels" if CPU.missing() is None else "without our kernels: ") in told
    assert session.definition.image_size == model.image_size
    assert session.definition.pruner.settings == model.pruner.settings  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="takes inputs of 3 x 40 x 40, and got one of 3 x 40 x 48"):
        session(torch.zeros(1, 3, 40, 48))
    with pytest.raises(UsageError, match="cannot be pruned"):
        session.with_pruner(None)


def test_a_file_for_one_batch_size_gets_whole_batches(vim_onnx: Made, changed: Callable[..., Path]) -> None:
    session = opened(changed(batch=2))
    batch = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(session(batch), vim_onnx[0](batch), rtol=0, atol=1e-5)
    assert figures([session], rounds=1)[0].batch_size == 2
    with pytest.raises(UsageError, match="takes batches of 2 images and no others, and 3 are asked for"):
        figures([session], rounds=1, batch_size=3)


def test_a_file_of_a_model_of_clips_is_measured_too(tmp_path: Path) -> None:
    model = make("videomamba-clips", "drop").eval()
    session = opened(export(model, tmp_path / "clips.onnx", batch=2).path)
    clips = torch.randn(3, *model.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(session(clips), model(clips), rtol=0, atol=1e-5)
    file, own = figures([session, model], rounds=1)
    assert (file.multiply_adds_per_block, file.batch_size) == (own.multiply_adds_per_block, 2)


def test_accuracy_is_that_of_the_model(vim_onnx: Made, images: Path) -> None:
    model, made = vim_onnx
    result = evaluate(opened(made.path), open_dataset("npz", images), compare=model, batch_size=4)
    assert result.score == result.comparison.dense and result.changed == ()  # type: ignore[union-attr]
    assert result.dtype == "float32" and result.images_per_second > 0


def test_figures_are_those_of_the_model_that_the_file_holds(vim_onnx: Made) -> None:
    model, made = vim_onnx
    file, own = figures([opened(made.path), model], rounds=2, batch_size=1)
    assert type(file) is Figures and isinstance(own, Profile)
    for name in ("parameters", "multiply_adds_per_block", "tokens_per_block", "bytes_moved", "dtype", "image_size"):
        assert getattr(file, name) == getattr(own, name)
    assert file.speed.median_ms > 0 and file.session.kind == "onnx"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"configuration": None}, "does not say its configuration: it is none that this ssmprune exported\nType `ssmp"),
        ({"configuration": "{"}, "what it says of its model is damaged"),
        ({"configuration": "[]"}, "its configuration is damaged"),
        ({"schedule": None}, "what it says of its model is damaged"),
        ({"preprocessing": None}, "says preprocessing None, and by its configuration it is"),
        ({"task": "segmentation"}, "says task segmentation, and by its configuration it is classification"),
        ({"class_names": '["cat"]'}, "says class_names"),
        ({"family": "wim"}, "Did you mean 'vim'"),
    ],
)
def test_facts_that_do_not_fit_are_refused(
    facts: dict[str, str | None], said: str, changed: Callable[..., Path]
) -> None:
    with pytest.raises(SsmpruneError, match=said):
        opened(changed(**facts))


@pytest.mark.parametrize(("name", "value"), [("embed_dim", 1 << 19), ("depth", 1 << 20)])
def test_sizes_that_do_not_fit_are_refused(name: str, value: Any, vim_onnx: Made, changed: Callable[..., Path]) -> None:
    """Before memory is asked for: an embedding of half a million numbers in a file of a few kilobytes."""
    config = json.loads(opened(vim_onnx[1].path).said["configuration"])
    with pytest.raises(CheckpointError, match=r"has [0-9,]+ bytes|larger than|settings are not valid"):
        opened(changed(configuration=json.dumps({**config, name: value})))


def test_images_of_another_size_than_said_are_refused(vim_onnx: Made, changed: Callable[..., Path]) -> None:
    said = opened(vim_onnx[1].path).said
    config = json.dumps({**json.loads(said["configuration"]), "image_size": [48, 48]})
    way = json.dumps({**json.loads(said["preprocessing"]), "resize": 54, "crop": 48})
    with pytest.raises(
        CheckpointError, match=r"takes images of \[3, 40, 40\], and says that it takes images of \[3, 48"
    ):
        opened(changed(configuration=config, preprocessing=way, schedule=None, method=None))


def test_what_is_no_file_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.onnx").write_bytes(b"\x00\xff" * 99)
    with pytest.raises(CheckpointError, match="is no file that ONNX Runtime reads"):
        opened(tmp_path / "noise.onnx")
    with pytest.raises(CheckpointError, match="there is no such file"):
        opened(tmp_path / "nothing.onnx")
    with pytest.raises(CheckpointError, match="is a folder, not a file"):
        opened(tmp_path)


def test_a_path_is_a_file_or_the_folder_that_export_wrote(vim_onnx: Made, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    assert exported_file(folder) is None and exported_file(tmp_path / "x.pth") is None
    (folder / "model.onnx").write_bytes(vim_onnx[1].path.read_bytes())
    assert exported_file(folder) == folder / "model.onnx"
    (folder / "config.json").write_text("{}")  # an artefact, whatever else was put there
    assert exported_file(folder) is None
    with pytest.raises(SsmpruneError, match=r"unpickles such a file.*\n.*--out FILE\.onnx"):
        exported_file(tmp_path / "model.pt2")


def test_what_a_file_settles_is_not_asked_for(vim_onnx: Made) -> None:
    path = vim_onnx[1].path
    for reading, precision, said in (
        (NOTHING_SAID, "bf16", "and not in bf16"),
        (Reading(crop=0.5), "fp32", "says itself what it is"),
    ):
        with pytest.raises(UsageError, match=said):
            read([path], reading, precision, "cpu")


def test_profile_prints_what_a_file_is(vim_onnx: Made, capsys: Any) -> None:
    path = vim_onnx[1].path
    command = typer.main.get_command(app)
    with contextlib.suppress(SystemExit):
        command.main(["profile", str(path), "--rounds", "1", "--json"], prog_name="ssmprune")
    (told,) = json.loads(capsys.readouterr().out)["models"]
    assert told["file_bytes"] == path.stat().st_size and told["opens_in_seconds"] > 0
    assert "floor" not in told and told["session"]["kind"] == "onnx"
    with contextlib.suppress(SystemExit):
        command.main(["profile", str(path), "--compare", str(path), "--rounds", "1"], prog_name="ssmprune")
    table = capsys.readouterr().out
    assert "opens in (s)" in table and "file (MB)" in table and "Where the time goes" not in table


@pytest.mark.slow
def test_eval_is_a_command(vim_onnx: Made, images: Path) -> None:
    judged = subprocess.run(
        [sys.executable, "-m", "ssmprune_cli", "eval", vim_onnx[1].path, "--dataset", "npz", "--data", images],
        capture_output=True,
        text=True,
    )
    assert judged.returncode == 0 and "top-1" in judged.stdout and "9 images, float32" in judged.stdout, judged.stderr
