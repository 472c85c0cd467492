"""finetune, alone, killed and on two processes, and visualize on what it made."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli import checkpoint
from tests.cli.conftest import Run, Start

ROOT = Path(__file__).parents[2]
SMALL = ("--set", "image_size=[16,16]", "--set", "patch_size=4", "--set", "stride=4", "--set", "embed_dim=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images.npz, and model.pth and train.log of one epoch on them."""
    folder = tmp_path_factory.mktemp("train")
    images = np.random.default_rng(0).integers(0, 256, (16, 20, 16), dtype=np.uint8)  # taller than the model's images
    np.savez(folder / "images.npz", images=images, labels=np.arange(16) % 2)
    return folder


@pytest.fixture(scope="module")
def trained(ssmprune: Run, folder: Path) -> subprocess.CompletedProcess[str]:
    settings = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"]
    data, out = folder / "images.npz", folder / "scratch"
    options = ["--dataset", "npz", "--data", data, "--val-data", data, "--out", out]
    sets = [part for setting in settings for part in ("--set", setting)]
    pth = ("--checkpoint", folder / "model.pth")
    return ssmprune("finetune", "--from-scratch", *sets, *options, *pth, "--epochs", "1", "--batch-size", "8", "--json")


def test_from_scratch_writes_models_and_a_log(
    ssmprune: Run, trained: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    out = folder / "scratch"
    assert result["last"] == str(out / "last") and result["best"] == str(out / "best") and not result["interrupted"]
    header, *updates, epoch = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    assert [epoch] == result["epochs"] and epoch["epoch"] == 1
    assert [update["step"] for update in updates] == [1, 2]  # 16 images
    assert epoch["loss"] == pytest.approx(sum(update["loss"] for update in updates) / 2)
    assert header["command"].startswith("ssmprune finetune --from-scratch --set")
    assert header["settings"]["batch_size"] == 8
    assert torch.equal(*(checkpoint.load(out / each).state_dict()["head.weight"] for each in ("last", "best")))
    facts = json.loads(ssmprune("inspect", folder / "model.pth", "--json").stdout)
    found = {key: facts[key] for key in ("family", "image_size", "tokens", "dtype")}
    assert found == {"family": "vim", "image_size": [16, 16], "tokens": 17, "dtype": {"float16": 75}}


def test_init_starts_from_a_checkpoint_of_the_same_configuration(
    ssmprune: Run, trained: subprocess.CompletedProcess[str], folder: Path
) -> None:
    """With a learning rate of next to nothing, the weights are those it started from."""
    settings = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"]
    sets = [part for setting in settings for part in ("--set", setting)]
    start, out = folder / "model.pth", folder / "more.pth"
    data = ("--dataset", "npz", "--data", folder / "images.npz")
    common = (
        "--from-scratch",
        "--init",
        start,
        *data,
        "--epochs",
        "1",
        "--seed",
        "7",
        "--batch-size",
        "16",
        "--lr",
        "1e-12",
        "--set",
        "training.min_lr=0",
    )
    done = ssmprune("finetune", *sets, *common, "--out", folder / "more", "--checkpoint", out)
    assert done.returncode == 0, done.stderr
    before, after = checkpoint.load(start).state_dict(), checkpoint.load(out).state_dict()
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-6) for key in before)
    other = ssmprune("finetune", *sets, "--set", "depth=3", *common, "--out", folder / "none")
    assert other.returncode == 2 and "holds another configuration: depth is 4, not 3" in other.stderr
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from-scratch", "--set", "depth=0"), "depth must be at least 1"),
        (("--from-scratch", "--set", "training.lrr=1"), "did you mean 'lr'?"),
        (("--from-scratch", "--batch-size", "17", *SMALL), "16 training images do not fill a batch of 17"),
        ((), "give either an artefact or checkpoint, or `--from-scratch`"),
        (("none", "--set", "depth=3"), "only training.key=value can be set"),
    ],
)
def test_wrong_usage_is_found_before_anything_is_written(
    ssmprune: Run, trained: object, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = folder / "none"
    done = ssmprune("finetune", *arguments, "--dataset", "npz", "--data", folder / "images.npz", "--out", out)
    assert (done.returncode, done.stdout) == (2, "") and message in done.stderr
    assert not (out / "log.jsonl").exists()


@pytest.fixture(scope="module")
def artefact(ssmprune: Run, trained: object, folder: Path) -> Path:
    done = ssmprune("compress", folder / "model.pth", "--keep", "0.5", "--out", folder / "pruned")
    assert done.returncode == 0, done.stderr
    return folder / "pruned"


def options(folder: Path, out: str) -> tuple[str | Path, ...]:
    """Four epochs of four updates, with everything that is random."""
    data = ("--dataset", "npz", "--data", folder / "images.npz", "--out", folder / out)
    keys = ("mixup=0.5", "erasing=0.5", "randaugment=9", "drop_path=0.2", "ema=0.5", "progressive=2", "repeats=2")
    return (
        *data,
        "--batch-size",
        "4",
        "--epochs",
        "4",
        *(part for key in keys for part in ("--set", f"training.{key}")),
    )


def trace(folder: Path) -> list[tuple[int, int, float]]:
    """Epoch, step and loss of every update in the log."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [(line["epoch"], line["step"], line["loss"]) for line in lines if "step" in line]


@pytest.fixture(scope="module")
def whole(ssmprune: Run, artefact: Path, folder: Path) -> Path:
    """A training that nothing stopped."""
    done = ssmprune("finetune", artefact, *options(folder, "whole"))
    assert done.returncode == 0, done.stderr
    return folder / "whole"


def test_result_is_an_artefact_that_says_what_was_done(ssmprune: Run, whole: Path) -> None:
    report = json.loads((whole / "last" / "report.json").read_text())
    assert report["finetuning"]["settings"]["mixup"] == 0.5 and len(report["finetuning"]["epochs"]) == 4
    assert "training:" in (whole / "last" / "recipe.yaml").read_text() and report["pruning"]["tokens"] == [8, 4, 2]
    facts = json.loads(ssmprune("profile", whole / "last", "--json", "--rounds", "1").stdout)
    assert facts["models"][0]["tokens_per_block"] == [17, 9, 5, 3]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resumed_after_a_signal_at_a_random_step_gives_the_same_losses_and_weights(
    ssmprune: Run, start: Start, artefact: Path, whole: Path, folder: Path, number: signal.Signals
) -> None:
    out = folder / number.name
    command = ("finetune", artefact, *options(folder, number.name), "--save-every", "3")
    process = start(*command, "--workers", "1")
    after = random.Random().randrange(2, 13)
    while not process.ended() and not ((out / "log.jsonl").exists() and len(trace(out)) >= after):
        time.sleep(0.01)
    os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches the worker that prepares images too
    done = process.wait()
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    if number == signal.SIGINT:
        assert "--resume" in done.stderr
    done = ssmprune(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert trace(out) == trace(whole), f"stopped after {after} updates"
    assert (out / "last" / "model.safetensors").read_bytes() == (whole / "last" / "model.safetensors").read_bytes()


def test_a_training_resumes_with_its_own_settings_only(
    ssmprune: Run, artefact: Path, whole: Path, folder: Path
) -> None:
    other = ssmprune("finetune", artefact, *options(folder, whole.name), "--lr", "0.5", "--resume")
    assert other.returncode == 2 and "lr was 0.0001 and is 0.5" in other.stderr


def torchrun(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine (gloo)."""
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "-m",
        "ssmprune_cli",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*start, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def two_processes(start: Start, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What the first of them says, started as `torchrun` would."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (start(*arguments, RANK=rank, LOCAL_RANK=rank, **world) for rank in ("0", "1"))
    assert second.wait().returncode == 0
    return first.wait()


def test_two_processes_train_and_evaluate_as_one(ssmprune: Run, start: Start, artefact: Path, folder: Path) -> None:
    """Each takes half of every batch, and of the 15 images to evaluate, of which one gets 8 and the other 7."""
    with np.load(folder / "images.npz") as arrays:
        np.savez(folder / "odd.npz", images=arrays["images"][:15], labels=arrays["labels"][:15])
    data = ("--dataset", "npz", "--data", folder / "images.npz", "--val-data", folder / "odd.npz")
    common = (*data, "--epochs", "2", "--batch-size", "8", "--lr", "1e-3", "--set", "training.mixup=0.5", "--json")
    alone = ssmprune("finetune", artefact, *common, "--out", folder / "one")
    both = two_processes(start, "finetune", artefact, *common, "--out", folder / "two")
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    assert json.loads(both.stdout)["epochs"][-1]["top1"] == json.loads(alone.stdout)["epochs"][-1]["top1"]
    # Sums over a batch are taken in another order: float32 rounding, which Adam's first steps make larger.
    found, expected = (torch.tensor([loss for *_, loss in trace(folder / each)]) for each in ("two", "one"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    wanted = ("eval", artefact, "--dataset", "npz", "--data", folder / "odd.npz", "--json")
    results = [json.loads(done.stdout) for done in (ssmprune(*wanted), torchrun(*wanted))]
    for result in results:
        del result["images_per_second"]
    assert results[0] == results[1] and results[0]["count"] == 15


@pytest.mark.usefixtures("trained")
def test_visualize_draws_what_compress_left(ssmprune: Run, folder: Path, artefact: Path) -> None:
    data, photo = folder / "images.npz", folder / "photo.png"
    Image.new("RGB", (40, 20)).save(photo)
    done = ssmprune("visualize", artefact, data, photo, "--out", folder / "pictures", "--count", "3", "--json")
    assert done.returncode == 0, done.stderr
    drawn = json.loads(done.stdout)
    stages = [{"after_block": block, "kept": kept, "patches": 16} for block, kept in ((1, 8), (2, 4), (3, 2))]
    assert drawn["stages"] == stages
    assert [entry["name"] for entry in drawn["images"]][3:] == ["photo.png"] and len(drawn["images"]) == 4
    files = [drawn["overview"], *(s[kind] for e in drawn["images"] for s in e["stages"] for kind in ("kept", "score"))]
    assert len(files) == 25 and all(Path(file).read_bytes().startswith(b"\x89PNG") for file in files)
    dense = ssmprune("visualize", folder / "model.pth", data, "--out", folder / "dense")
    assert dense.returncode == 2 and "drops no tokens" in dense.stderr
