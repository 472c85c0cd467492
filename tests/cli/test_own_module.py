"""`--module PACKAGE:FUNCTION`: compress, profile and eval of a module of the user's own, as processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ssmprune_cli.adapt import compress
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.workflows.measure import Speed
from ssmprune_cli.workflows.own_module import ModuleSource
from ssmprune_cli.workflows.own_module.building import build
from ssmprune_cli.workflows.own_module.timing import no_faster
from tests.cli import own

Run = Callable[..., subprocess.CompletedProcess[str]]
MODULE = ("--module", "tests.cli.own:pictures")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
READING = ("--image-size", "16", "--crop", "1.0", "--mean", "0.4,0.5,0.6", "--std", "0.2,0.25,0.3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "weights.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save({"model": own.Pictures().state_dict(), "epoch": 3}, file)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of two images of 16 x 16 pixels, which nothing resizes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(6):
        (folder / f"class{number % 3}").mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"class{number % 3}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(photos: Path) -> torch.Tensor:
    """(6, 3, 16, 16), prepared by hand, in the order of their names."""
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(photos.rglob("*.png"))])
    values = (pixels.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(values.transpose(0, 3, 1, 2).copy())


@pytest.fixture(scope="module")
def compressed(
    ssmprune: Run, weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The output folder, and what was printed as JSON."""
    out = tmp_path_factory.mktemp("compressed") / "out"
    asked = (*MODULE, *READING, "--keep", "0.5", "--points", "1", "--calib", photos, "--out", out, "--json")
    done = ssmprune("compress", weights, *asked)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("building\n") and done.stderr.endswith(f"Written to {out}\n")
    return out, json.loads(done.stdout)


def test_compress_says_what_it_did_and_keeps_the_weights_as_the_users_code_has_them(
    compressed: tuple[Path, dict[str, Any]], weights: Path
) -> None:
    out, said = compressed
    assert said["kinds"] == {"Mamba": 2} and said["tokens"] == {"layers.0.mixer": 16, "layers.1.mixer": 8}
    assert said["fill"] == min(said["distances"], key=said["distances"].get) and said["images"] == 6
    assert list(said["speeds"]) == ["own code", "accelerated", "compressed"]
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "model.safetensors", "calibrated.safetensors", "recipe.yaml")
    }
    stored = load_file(out / "model.safetensors")
    trained = torch.load(weights, weights_only=True)["model"]
    assert set(stored) == set(trained) and all(torch.equal(stored[name], trained[name]) for name in trained)


def test_the_folder_computes_what_the_library_does(
    compressed: tuple[Path, dict[str, Any]], weights: Path, images: torch.Tensor
) -> None:
    out, said = compressed
    model = own.Pictures().eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    done = compress(model, 0.5, points=[1], calibration=[images])
    assert done.distances == pytest.approx(said["distances"], rel=1e-4)
    source = ModuleSource(out, MODULE[1])
    loaded = source.load()
    source.put_back(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_the_recipe_in_the_folder_does_it_again(
    ssmprune: Run, compressed: tuple[Path, dict[str, Any]], weights: Path, photos: Path, tmp_path: Path
) -> None:
    out, _ = compressed
    again = tmp_path / "again"
    asked = ("--recipe", out / "recipe.yaml", "--calib", photos, "--out", again)
    done = ssmprune("compress", weights, *MODULE, *READING, *asked)
    assert done.returncode == 0, done.stderr
    assert "Tokens entering each mixer" in done.stdout and "building" not in done.stdout
    for file in out.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name
    done = ssmprune("compress", weights, *MODULE, *READING, *asked)
    assert done.returncode == 1 and "the folder is not empty" in done.stderr
    done = ssmprune("compress", weights, *MODULE, *READING, *asked, "--overwrite")
    assert done.returncode == 0, done.stderr


def test_profile_times_all_ways_to_compute_it(
    ssmprune: Run, compressed: tuple[Path, dict[str, Any]], weights: Path
) -> None:
    done = ssmprune("profile", compressed[0], *MODULE, "--rounds", "2", "--batch-size", "3", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["batch_size"] == 3 and said["image_size"] == 16
    assert said["tokens"] == {"layers.0.mixer": 16, "layers.1.mixer": 8}
    assert set(said["speeds"]) == set(said["peak_memory_bytes"]) == {"own code", "accelerated", "compressed"}
    assert all(len(each["rounds_ms"]) == 2 for each in said["speeds"].values())
    done = ssmprune("profile", weights, *MODULE, "--image-size", "16", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert "accelerated" in done.stdout and "compressed" not in done.stdout


def test_what_is_no_faster_is_said() -> None:
    images = torch.zeros(3, 1)

    def said(own: float, fast: float, compressed: float) -> list[str]:
        times = {"own code": own, "accelerated": fast, "compressed": compressed}
        return no_faster({name: Speed(each, (each, each), 1.0, 1, (each,)) for name, each in times.items()}, images)

    assert said(3, 2, 1) == []
    (slow,) = said(1, 2, 1)
    assert slow.startswith("With a batch of 3 on cpu our ops are no faster than the module's own code")
    (slow,) = said(3, 2, 2)
    assert slow.startswith("With a batch of 3 on cpu the compressed module is no faster than the accelerated one")


def test_eval_judges_the_compressed_one_beside_the_dense_one(
    ssmprune: Run, compressed: tuple[Path, dict[str, Any]], weights: Path, photos: Path, images: torch.Tensor
) -> None:
    data = ("--dataset", "imagefolder", "--data", photos, "--json")
    done = ssmprune("eval", compressed[0], *MODULE, *data)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    model = own.Pictures().eval()
    model.load_state_dict(torch.load(weights, weights_only=True)["model"])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        right = float((model(images).argmax(1) == labels).float().mean())
    assert said["count"] == 6 and said["dense"]["top1"] == pytest.approx(right)
    assert said["difference"] == pytest.approx(said["top1"] - said["dense"]["top1"])
    done = ssmprune("eval", weights, *MODULE, *READING, *data)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["top1"] == pytest.approx(right)


def test_a_prefix_that_checkpoints_are_read_without_is_put_back(weights: Path) -> None:
    found = ModuleSource(weights, "tests.cli.own:Wrapped").load()
    trained = torch.load(weights, weights_only=True)["model"]
    assert torch.equal(found.get_parameter("model.head.weight"), trained["head.weight"])


@pytest.mark.parametrize(
    ("module", "code", "expected"),
    [
        ("own", 2, "'own' names no function"),
        ("no_such_package.models:build", 2, "No module named 'no_such_package'"),
        ("tests.cli.own:made", 2, "there is no made in tests.cli.own"),
        ("tests.cli.own:constant", 2, "is a value of type int, which is no function"),
        ("tests.cli.own:meta", 2, "returns a module on the meta device"),
        ("tests.cli.own:number", 2, "returns a value of type int, not an nn.Module"),
        ("tests.cli.own:broken", 1, "the function fails: KeyError: 'config.yaml'"),
        ("tests.cli.own:wider", 1, "of another shape: patches.weight ((16, 3, 4, 4) in the file, (24, 3, 4, 4) in the"),
        ("tests.cli.own:of_tokens", 1, "missing: embed.bias, embed.weight"),
        ("tests.cli.own:flat", 1, "not of the module: "),
    ],
)
def test_what_is_no_function_for_these_weights_is_one_error(
    ssmprune: Run, weights: Path, module: str, code: int, expected: str
) -> None:
    done = ssmprune("profile", weights, "--module", module, "--image-size", "16")
    assert (done.returncode, done.stdout) == (code, "") and done.stderr.startswith("error: ")
    assert expected in done.stderr and "hint: " in done.stderr


@pytest.mark.parametrize(("module", "expected"), [("flat", "has no selective scan"), ("of_tokens", "the module fails")])
def test_a_module_that_is_not_for_this_is_one_error(ssmprune: Run, tmp_path: Path, module: str, expected: str) -> None:
    file = tmp_path / "weights.pth"
    torch.save(getattr(own, module)().state_dict(), file)
    done = ssmprune("profile", file, "--module", f"tests.cli.own:{module}", "--image-size", "16")
    assert done.returncode in (1, 2) and done.stdout == "" and expected in done.stderr
    assert done.stderr.count("error: ") == 1 and "bug in ssmprune" not in done.stderr


@pytest.mark.parametrize(
    ("command", "more", "expected"),
    [
        ("compress", ("--target-speedup", "1.4"), "--target-speedup: does not go with --module"),
        ("compress", ("--int8",), "--int8: does not go with --module"),
        ("compress", ("--set", "pruning.weights=int8"), "pruning.weights"),
        ("compress", ("--keep", "0.5", "--family", "vim"), "--family: a module of your own says that itself"),
        ("compress", ("--keep", "0.5", "--set", "pruning.repair=head"), "which is for models of ours"),
        ("compress", ("--keep", "0.5"), "--calib DIR"),
        ("compress", (), "how fast is the model to be?"),
        ("profile", ("--lengths", "1k,2k"), "--lengths: does not go with --module"),
        ("profile", (), "--image-size is missing"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    ssmprune: Run, weights: Path, tmp_path: Path, command: str, more: tuple[str, ...], expected: str
) -> None:
    out = ("--out", tmp_path / "out") if command == "compress" else ()
    done = ssmprune(command, weights, *MODULE, *more, *out)
    assert (done.returncode, done.stdout) == (2, "") and expected in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_how_images_are_prepared_is_asked_for(ssmprune: Run, weights: Path, photos: Path, tmp_path: Path) -> None:
    asked = ("--keep", "0.5", "--calib", photos, "--out", tmp_path / "out", "--image-size", "16")
    done = ssmprune("compress", weights, *MODULE, *asked)
    assert done.returncode == 2 and "--crop, --mean, --std is missing" in done.stderr


def test_a_folder_is_only_read_with_the_users_code_and_says_how_images_are_prepared(
    ssmprune: Run, compressed: tuple[Path, dict[str, Any]]
) -> None:
    out, _ = compressed
    done = ssmprune("profile", out)
    assert done.returncode == 1 and "Give `--module tests.cli.own:pictures`" in done.stderr
    done = ssmprune("profile", out, *MODULE, "--image-size", "32")
    assert done.returncode == 2 and "--image-size: the output folder says that itself" in done.stderr


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda config: config["inside"].pop("fill"), "its keys are others"),
        (lambda config: config["inside"].update(fill="noise"), "is not valid"),
        (lambda config: config["inside"].update(lengths=[[0, 1, 16]]), "do not follow one another"),
        (lambda config: config["inside"].update(protected=[99]), "position 99 is protected"),
        (lambda config: config["inside"]["settings"].update(alignment="null_"), "is not valid"),
        (lambda config: config["inside"]["settings"].update(alignment="none"), "does not fit the mixers: alignment_1"),
    ],
)
def test_a_damaged_folder_is_refused(
    compressed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    expected: str,
) -> None:
    for file in compressed[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = ModuleSource(tmp_path, MODULE[1])
    with pytest.raises(CheckpointError, match=expected):
        source.put_back(source.load())


def test_modules_of_the_current_folder_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_code.py").write_text("from tests.cli.own import Pictures\nmake = Pictures\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = build("my_own_code:make")
    assert isinstance(model, own.Pictures) and not model.training
    with pytest.raises(UsageError, match="is a value of type module"):
        build("tests.cli.own:nn")
