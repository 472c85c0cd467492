"""What computes many batches does so in a session of CUDA graphs, where there is a GPU; a recorder stands in for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset, open_dataset
from ssmprune_cli.inference import cuda_graph
from ssmprune_cli.inference.cuda_graph import CudaGraphSession, Graph
from ssmprune_cli.kernels import use_backend
from ssmprune_cli.models import Backbone
from ssmprune_cli.recipe.sections import Training
from ssmprune_cli.workflows.compare import compare
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.finetune import Data, Job, finetune
from ssmprune_cli.workflows.finetune.new_model import build
from ssmprune_cli.workflows.profile import profile
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials.measure import Measurements

SIZES = ["image_size=[16, 16]", "patch_size=4", "stride=4", "embed_dim=8", "depth=2", "num_classes=10"]


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Batch sizes of the graphs that were replayed. Every model is taken for one on a GPU."""
    sizes: list[int] = []

    def capture(run: Callable[[Tensor], Tensor], images: Tensor, pool: Any) -> Graph:
        static, output = images.clone(), run(images).clone()

        def replay() -> None:
            sizes.append(len(static))
            output.copy_(run(static))

        return Graph(static, output, replay)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(CudaGraphSession, "refuses", classmethod(lambda cls, definition: None))
    use_backend("chunked")
    yield sizes
    use_backend("auto")


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    """130 images: three batches of 64 at most."""
    pixels = np.random.default_rng(0).integers(0, 256, (130, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(130) % 10)
    opened: ImageDataset = open_dataset("npz", tmp_path / "images.npz")
    return opened


@pytest.fixture
def model() -> Backbone:
    return build("vim", SIZES, name="vim_small_midclstok_div2", seed=0)


def test_eval_fills_the_last_batch_up(replayed: list[int], dataset: ImageDataset, model: Backbone) -> None:
    assert evaluate(model, dataset).count == 130
    assert replayed == [64, 64]  # of three batches the first runs op by op, and the last has two images


def test_profile_times_what_is_replayed(replayed: list[int], model: Backbone) -> None:
    (found,) = profile([model], batch_size=3, rounds=2)
    assert found.session.kind == "cuda_graph" and replayed[:3] == [3] * 3  # the second warm-up, and both rounds


def test_compare(replayed: list[int], dataset: ImageDataset, model: Backbone, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", model, {})
    compare(Source(tmp_path / "model"), dataset, [], [], rounds=2)
    assert replayed[:2] == [64, 64] and len(replayed) > 3  # the answers, then what is timed


def test_what_a_search_measures(replayed: list[int], model: Backbone) -> None:
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    Measurements(model, images, calibration=4, batch_size=4)
    assert replayed == [4, 4]


def test_the_validation_of_a_training(
    replayed: list[int], dataset: ImageDataset, model: Backbone, tmp_path: Path
) -> None:
    finetune(model, Data(dataset, dataset), Job(Training(epochs=1, batch_size=65)), tmp_path / "out")
    assert replayed == [64, 64]
