"""Training images of an epoch: the same whoever prepares them, and errors that name the image."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ssmprune_cli.data import open_dataset
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.errors import DataError
from ssmprune_cli.recipe.sections import Training
from ssmprune_cli.workflows.finetune import images as images_of_training
from ssmprune_cli.workflows.finetune.images import default_workers, epoch_parts
from ssmprune_cli.workflows.finetune.new_model import build
from ssmprune_cli.workflows.processes import Share

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are fewer cores

SETTINGS = Training(batch_size=4, accumulate=2, shift=2, flip=True, mixup=0.4, randaugment=9.0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(6):
            colour = (number * 40, 200 if label == "a" else 20, 90)
            Image.new("RGB", (20, 16), colour).save(tmp_path / label / f"{number}.png")
    return tmp_path


def parts(images: ImageDataset, workers: int) -> list[tuple[Tensor, Tensor]]:
    model = build("vim", ["image_size=[16, 16]", "patch_size=4", "stride=4", "num_classes=2"], name="vim", seed=0)
    share = Share(0, 1)
    with epoch_parts(images, model, SETTINGS, seed=3, epoch=1, first_step=1, share=share, workers=workers) as found:
        return list(found)


def test_workers_prepare_the_same_parts_in_the_same_order(folder: Path) -> None:
    images = open_dataset("imagefolder", folder)
    alone, shared = parts(images, 0), parts(images, 3)
    assert len(alone) == len(shared) == 4  # two steps are left of three, each in two parts
    for expected, found in zip(alone, shared, strict=True):
        assert expected[0].shape == (2, 3, 16, 16) and expected[1].shape == (2, 2)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(folder: Path, workers: int) -> None:
    for path in folder.glob("b/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        parts(open_dataset("imagefolder", folder), workers)
    assert "b/" in str(caught.value) and ".png" in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_model_on_a_cpu_shares_its_cores_with_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 24)
    assert default_workers(torch.device("cpu"), 1) == 0
    assert [default_workers(torch.device("cuda"), processes) for processes in (1, 4, 100)] == [8, 6, 0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_training(
    folder: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = images_of_training._ignore_signals

    def slow_start(worker: int) -> None:  # the second worker gets its signal before it can ignore it
        time.sleep(worker)
        started(worker)

    monkeypatch.setattr(images_of_training, "_ignore_signals", slow_start)
    model = build("vim", ["image_size=[16, 16]", "patch_size=4", "stride=4", "num_classes=2"], name="vim", seed=0)
    images = open_dataset("imagefolder", folder)
    with epoch_parts(images, model, SETTINGS, seed=3, epoch=0, first_step=0, share=Share(), workers=2) as found:
        next(found)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, number)
        assert len(list(found)) == 5  # all others
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()).isdisjoint({signal.SIGINT, signal.SIGTERM})


DYING = """
import multiprocessing, os, signal, sys
from pathlib import Path
from ssmprune_cli.data import open_dataset
from ssmprune_cli.recipe.sections import Training
from ssmprune_cli.workflows.finetune.images import epoch_parts
from ssmprune_cli.workflows.finetune.new_model import build
from ssmprune_cli.workflows.processes import Share

model = build("vim", ["image_size=[16, 16]", "patch_size=4", "stride=4", "num_classes=2"], name="vim", seed=0)
images, settings = open_dataset("imagefolder", Path(sys.argv[1])), Training(batch_size=4, accumulate=2)
with epoch_parts(images, model, settings, seed=3, epoch=0, first_step=0, share=Share(), workers=2) as parts:
    for part in parts:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
"""


def test_a_worker_that_dies_is_an_error_and_holds_nothing_up(folder: Path) -> None:
    """As when memory runs out. Nobody catches the error, so that its traceback lives until the program's end."""
    done = subprocess.run([sys.executable, "-c", DYING, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "a process that prepares images has died" in done.stderr
