"""`ssmprune compress --int8`: what it writes and says, and what other commands do with it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssmprune_cli import checkpoint
from ssmprune_cli.models import EightBitLinear, cut_short

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"
KINDS = ["in_proj", "x_proj", "out_proj"]
CHEAP = ("--samples", "0", "--batch-size", "1")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(4):
        place = folder / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def artefact(ssmprune: Run, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "model"
    options = ("--int8", "--keep", "0.6", "--reduction", "drop", "--calib", photos, *CHEAP, "--out", out)
    done = ssmprune("compress", CHECKPOINT, *options)
    assert done.returncode == 0, done.stderr
    assert "In eight bits: in_proj" in done.stdout and "Pruned, int8" in done.stdout
    return out


def test_the_artefact_has_bytes_and_says_so(artefact: Path) -> None:
    stored = load_file(artefact / "model.safetensors")
    assert stored["layers.0.mixer.in_proj.values"].dtype == torch.int8
    assert "layers.0.mixer.in_proj.weight" not in stored
    assert json.loads((artefact / "config.json").read_text())["eight_bits"] == KINDS
    facts = json.loads((artefact / "report.json").read_text())["eight_bits"]
    assert [(each["kind"], each["eight_bits"]) for each in facts["kinds"]] == [(kind, True) for kind in KINDS]
    assert 0 < facts["divergence"] <= 0.01 and facts["images"] == 4
    models = {(each["tokens"], each["weights"]): each for each in facts["models"]}
    assert set(models) == {(tokens, weights) for tokens in ("all", "pruned") for weights in ("float", "int8")}
    for tokens in ("all", "pruned"):
        assert models[tokens, "int8"]["bytes"] < models[tokens, "float"]["bytes"]
    text = (artefact / "recipe.yaml").read_text()
    assert "weights: int8" in text and "int8: [in_proj, x_proj, out_proj]" in text


def test_its_recipe_gives_the_same_bytes(ssmprune: Run, artefact: Path, photos: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    options = ("--recipe", artefact / "recipe.yaml", "--calib", photos, *CHEAP, "--out", again)
    done = ssmprune("compress", CHECKPOINT, *options)
    assert done.returncode == 0, done.stderr
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (artefact / name).read_bytes()


def test_other_commands_take_it_or_refuse_it_by_name(ssmprune: Run, artefact: Path, tmp_path: Path) -> None:
    model = checkpoint.load(artefact)
    assert model.eight_bit_kinds == tuple(KINDS) and model.pruner is not None
    assert model.parameter_count == checkpoint.load(CHECKPOINT).parameter_count
    inspected = json.loads(ssmprune("inspect", artefact, "--json").stdout)
    assert inspected["eight_bits"] == KINDS and inspected["parameters"] == model.parameter_count
    profiled = ssmprune("profile", artefact, "--rounds", "1", "--batch-size", "1", "--json")
    assert profiled.returncode == 0, profiled.stderr
    done = ssmprune("compress", artefact, "--int8", "--keep", "0.5", "--out", tmp_path / "x")
    assert done.returncode == 1 and not done.stdout
    assert "in eight bits already" in done.stderr and "Give the checkpoint that it was made of" in done.stderr


def test_its_onnx_file_is_made_judged_and_timed(ssmprune: Run, artefact: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    done = ssmprune("export", artefact, "--out", file, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["tolerance"] == 1e-1 and max(each["error"] for each in told["checks"]) <= 1e-1
    images = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    np.savez(images, images=pixels, labels=np.arange(10))
    judged = ssmprune("eval", file, "--dataset", "npz", "--data", images, "--json")
    assert judged.returncode == 0 and json.loads(judged.stdout)["dtype"] == "int8", judged.stderr
    profiled = ssmprune("profile", file, "--rounds", "1", "--batch-size", "1", "--json")
    assert profiled.returncode == 0, profiled.stderr
    (model,) = json.loads(profiled.stdout)["models"]
    assert model["dtype"] == "int8" and model["parameters"] == checkpoint.load(artefact).parameter_count


def test_a_search_for_a_time_is_of_the_model_in_eight_bits(ssmprune: Run, tmp_path: Path) -> None:
    """Twelve images are too few for more than a few candidates; what is found follows from its recipe alone."""
    images, out, again = tmp_path / "images.npz", tmp_path / "out", tmp_path / "again"
    np.savez(images, images=np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8))
    few = (
        "--importance",
        "clip",
        "--reduction",
        "drop",
        "--evaluations",
        "4",
        "--calib",
        images,
        "--calib-images",
        "12",
    )
    common = ("compress", CHECKPOINT, *CHEAP, "--calib", images)
    done = ssmprune(*common, "--int8", "--target-latency-ratio", "0.5", *few, "--out", out, "--json", steady=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (chosen,) = [each for each in report["search"] if each["chosen"]]
    assert chosen["pruning"]["weights"] == "int8" and chosen["latency_ratio"] <= 0.5
    assert report["target"]["kind"] == "latency_ratio" and report["eight_bits"]["models"]
    text = (out / "recipe.yaml").read_text()
    assert "weights: int8" in text and "int8: [in_proj, x_proj, out_proj]" in text
    assert "in eight bits" in (out / "README.md").read_text().lower()
    done = ssmprune(*common, "--recipe", out / "recipe.yaml", "--out", again)
    assert done.returncode == 0, done.stderr
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_without_images_beside_fewer_blocks_and_a_limit(ssmprune: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--int8", "--cut-blocks", "1", "--max-latency-ratio", "0.001", *CHEAP)
    done = ssmprune("compress", CHECKPOINT, *options, "--out", out, "--json")
    assert done.returncode == 3, done.stderr  # all is written and measured, and the limit is broken
    report = json.loads(done.stdout)
    assert report["pruning"] is None and report["blocks_left_out"] == [4] and not report["limits"][0]["holds"]
    assert [(each["tokens"], each["weights"]) for each in report["eight_bits"]["models"]] == [
        ("all", "float"),
        ("all", "int8"),
    ]
    shorter = cut_short(checkpoint.load(CHECKPOINT), 1)  # what fewer blocks save is not told as that of eight bits
    whole = sum(value.numel() * value.element_size() for value in shorter.state_dict().values())
    assert report["eight_bits"]["models"][0]["bytes"] == whole
    assert any("no layer's harm was measured" in each for each in report["warnings"])
    assert "all kinds are in eight bits" in done.stderr
    assert "Fewer blocks and weights in eight bits alone make it cheaper" in (out / "README.md").read_text()
    assert "All tokens, int8: " in (out / "report.html").read_text(), "there is no repair here"
    text = (out / "recipe.yaml").read_text()
    assert "cut_blocks: 1" in text and "weights: int8" in text
    model = checkpoint.load(out)
    assert len(model.blocks) == 3 and any(isinstance(layer, EightBitLinear) for layer in model.modules())
    assert not (out / "dense.safetensors").exists()  # there is no way back


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "pruning.int8=[in_proj]", "--keep", "0.5"], "set `weights` to int8"),
        (["--int8", "--set", "pruning.int8=[nonsense]"], "there are no linear layers 'nonsense'"),
        (["--int8", "--set", "pruning.weights=float"], "another option says what pruning.weights is"),
        (["--set", "pruning.weights=int4", "--keep", "0.5"], "pruning.weights"),
    ],
)
def test_refusals(ssmprune: Run, tmp_path: Path, options: list[str], message: str) -> None:
    done = ssmprune("compress", CHECKPOINT, *options, "--out", tmp_path / "out")
    assert done.returncode in (1, 2) and message in done.stderr and not (tmp_path / "out").exists()
