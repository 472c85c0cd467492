"""compress and profile as processes: what they write, print and refuse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli import checkpoint
from ssmprune_cli.pruning import TokenPruner, compress

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"
VMAMBA = CHECKPOINT.with_name("vmamba_4d_weights.pth")
MEASURED = {"README.md", "report.html", "report.json"}  # they hold times
SAMPLES = {f"sample_{number}.png" for number in range(1, 5)}
FILES = {"calibration.json", "config.json", "model.safetensors", "recipe.yaml"} | MEASURED | SAMPLES


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of unlabelled images of several sizes."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(6):
        pixels = random.integers(0, 256, (70 + 9 * i, 90 - 3 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def artefact(ssmprune: Run, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "model"
    done = ssmprune("compress", CHECKPOINT, "--keep", "0.6", "--calib", photos, "--calib-images", "6", "--out", out)
    assert done.returncode == 0, done.stderr
    *warnings, last = done.stderr.splitlines()
    assert last == f"Written to {out}"
    assert all("than the dense one" in each for each in warnings), "so small a model may get slower, and says so"
    assert "-37.9%" in done.stdout and "Keep ratio 0.6 at each point, after 1, 2, 3 blocks" in done.stdout
    return out


def test_the_artefact_is_complete_and_computes_what_the_library_does(artefact: Path, photos: Path) -> None:
    from ssmprune_cli.data import batches, calibration_images

    assert {file.name for file in artefact.iterdir()} == FILES
    report = json.loads((artefact / "report.json").read_text())
    assert report["pruning"]["tokens"] == [39, 24, 15]
    assert report["pruned"]["tokens_per_block"] == [65, 40, 25, 16]
    assert report["calibration"]["images"] == report["provenance"]["calibration_images"] == 6
    kept = json.loads((artefact / "calibration.json").read_text())["points"][0]["kept_positions"]
    assert len(kept) == 6 and all(len(set(row)) == 40 and 32 in row for row in kept)  # 32 is the class token
    model = checkpoint.load(CHECKPOINT)
    images = calibration_images(photos, 6, 0)
    compress(model, 0.6, calibration=[b.images for b in batches(images, model.preprocessing, 16)])
    loaded = checkpoint.load(artefact)
    assert isinstance(loaded.pruner, TokenPruner) and loaded.pruner.settings.alignment == "calibrated"
    batch = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch))


def test_the_recipe_in_the_artefact_gives_the_same_bytes(
    ssmprune: Run, artefact: Path, photos: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    done = ssmprune("compress", CHECKPOINT, "--recipe", artefact / "recipe.yaml", "--calib", photos, "--out", again)
    assert done.returncode == 0, done.stderr
    for name in FILES - MEASURED:
        assert (again / name).read_bytes() == (artefact / name).read_bytes(), name
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (artefact, again))
    for report in (first, second):
        assert report.pop("speed")["latency_ratio"] > 0
        assert report["provenance"].pop("command").startswith("ssmprune compress ")
        report["warnings"] = [each for each in report["warnings"] if "than the dense one" not in each]  # measured too
    # The recipe says what was chosen by measurement the first time.
    assert first.pop("reductions") is not None and second.pop("reductions") is None
    chosen, followed = first.pop("repair"), second.pop("repair")
    assert followed is None or followed["kind"] == chosen["kind"]
    assert first == second


def test_accuracy_before_and_after_and_a_limit_that_is_broken(ssmprune: Run, tmp_path: Path) -> None:
    data, out = tmp_path / "labelled.npz", tmp_path / "out"
    images = np.random.default_rng(1).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    np.savez(data, images=images, labels=np.arange(30) % 10)
    common = ("compress", CHECKPOINT, "--tokens", "3,2,1", "--data", data, "--out", out, "--json")
    done = ssmprune(*common, "--max-drop", "-99.9")  # it would have to gain 99.9 points, so this limit breaks
    assert done.returncode == 3
    assert "--max-drop allows -99.9" in done.stderr
    report = json.loads(done.stdout)
    assert report["accuracy"]["count"] == 30
    difference = report["accuracy"]["top1"] - report["accuracy"]["dense"]["top1"]
    assert report["accuracy"]["difference"] == pytest.approx(difference)
    assert [each["holds"] for each in report["limits"]] == [False]
    assert json.loads((out / "report.json").read_text()) == report  # the artefact is written all the same
    done = ssmprune(*common, "--overwrite", "--max-drop", "100")
    assert done.returncode == 0, done.stderr


def test_without_calibration_it_says_so(ssmprune: Run, tmp_path: Path) -> None:
    done = ssmprune("compress", CHECKPOINT, "--keep", "0.9,0.8", "--points", "1,3", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0
    assert "warning: Nothing was calibrated" in done.stderr and "'null'" in done.stderr
    report = json.loads(done.stdout)
    assert (report["pruning"]["points"], report["pruning"]["tokens"]) == ([1, 3], [58, 47])
    assert report["pruning"]["alignment"] == "null" and report["calibration"] is None
    assert "Nothing was calibrated" in (tmp_path / "out" / "README.md").read_text()


def test_grid_merge_of_a_vmamba(ssmprune: Run, photos: Path, tmp_path: Path) -> None:
    out, labelled = tmp_path / "out", tmp_path / "labelled.npz"
    model = ("compress", VMAMBA, "--image-size", "64", "--crop", "1.0")
    # After the whole of the first stage, and within the third.
    asked = (*model, "--reduction", "grid-merge", "--keep", "0.6", "--points", "1,3")
    done = ssmprune(*asked, "--calib", photos, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert "fewer tokens than asked for: 12 x 12, 2 x 3 after the prune points" in done.stderr
    report = json.loads(done.stdout)
    assert report["pruning"]["tokens"] == [144, 6] and report["pruning"]["alignment"] == "null"
    assert report["pruned"]["tokens_per_block"] == [256, 36, 9, 6, 2]
    images = np.random.default_rng(1).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    np.savez(labelled, images=images, labels=np.arange(12) % 10)
    done = ssmprune("eval", out, "--dataset", "npz", "--data", labelled, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["count"] == 12
    again = checkpoint.load(VMAMBA, image_size=64, crop=1.0)
    compress(again, 0.6, points=(1, 3), reduction="grid-merge")
    batch = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(checkpoint.load(out)(batch), again(batch))
    done = ssmprune(*asked, "--importance", "l1", "--out", tmp_path / "other")
    assert done.returncode == 2 and "'grid-merge' goes by no score" in done.stderr


def test_dry_run_reads_no_images_and_writes_nothing(ssmprune: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    missing = tmp_path / "no-such-folder"
    done = ssmprune("compress", CHECKPOINT, "--keep", "0.6", "--calib", missing, "--out", out, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pruned"]["tokens_per_block"] == [65, 40, 25, 16]
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "how fast is the model to be?"),
        (["--keep", "1.5"], 2, "'--keep': each must be a number above 0 and at most 1"),
        (["--keep", "0.5", "--points", "9"], 2, "between 1 and 3"),
        (["--keep", "0.5", "--importance", "clipp"], 2, "did you mean 'clip'?"),
        (["--keep", "0.5", "--alignment", "calibrated"], 2, "needs calibration images"),
        (["--keep", "0.5", "--reduction", "mask", "--alignment", "null"], 2, "nothing to align"),
        (["--keep", "0.5", "--max-drop", "1"], 2, "--max-drop needs --data"),
        (["--keep", "0.5", "--set", "pruning.ponits=[1]"], 2, "did you mean 'points'"),
        (["--keep", "0.5", "--device", "cuda:99"], 2, "cannot be used"),
        (["--keep", "0.5", "--calib", "no-such-folder"], 1, "no-such-folder"),
        (["--recipe", "vim_small_topvim"], 2, "between 1 and 3"),
        (["--recipe", "vim_smal_topvim"], 2, "did you mean 'vim_small_topvim'?"),
    ],
)
def test_refusals(ssmprune: Run, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    done = ssmprune("compress", CHECKPOINT, *options, "--out", tmp_path / "out")
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(ssmprune: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = ssmprune("compress", CHECKPOINT, "--keep", "0.5", "--out", tmp_path)
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_profile_compares_two_models(ssmprune: Run, artefact: Path) -> None:
    options = ("--batch-size", "2", "--rounds", "2")
    done = ssmprune("profile", artefact, "--compare", CHECKPOINT, *options, "--json")
    assert done.returncode == 0, done.stderr
    pruned, dense = json.loads(done.stdout)["models"]
    assert (pruned["multiply_adds_all_directions"], dense["multiply_adds_all_directions"]) == (8391456, 13519584)
    assert pruned["tokens_per_block"] == [65, 40, 25, 16] and dense["tokens_per_block"] == [65] * 4
    assert pruned["parameters"] == dense["parameters"] == 115306
    assert 115306 * 4 < pruned["peak_memory_bytes"] <= dense["peak_memory_bytes"]
    assert pruned["speed"]["rounds"] == 2 and pruned["speed"]["images_per_second"] > 0
    table = ssmprune("profile", artefact, *options)
    assert table.returncode == 0 and "multiply-adds, all directions" in table.stdout


def test_profile_at_another_image_size(ssmprune: Run) -> None:
    done = ssmprune("profile", CHECKPOINT, "--image-size", "96", "--batch-size", "1", "--rounds", "1", "--json")
    (figures,) = json.loads(done.stdout)["models"]
    assert figures["image_size"] == [96, 96] and figures["tokens_per_block"] == [145] * 4
