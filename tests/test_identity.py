"""What keeps the state of one run out of another: everything that fixes a result is part of its identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmprune_cli import checkpoint
from ssmprune_cli.data import open_dataset
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import Method, compress
from ssmprune_cli.recipe import CalibrationPlan, Training
from ssmprune_cli.workflows.finetune import Data, Job, build, finetune
from ssmprune_cli.workflows.identity import dataset_identity, model_identity, weights_sha256
from ssmprune_cli.workflows.search import Limits, SearchPlan, search
from ssmprune_cli.workflows.sensitivity import sensitivity
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget

SETTINGS = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"]
TRAINING = Training(epochs=1, batch_size=4)


def make_model(seed: int = 0, *more: str) -> Backbone:
    return build("vim", [*SETTINGS, *more], name="vim_midclstok_div2", seed=seed).eval()


def write_images(path: Path, seed: int = 0, labels: int = 0) -> Path:
    images = np.random.default_rng(seed).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=(np.arange(10) + labels) % 2)
    return path


def test_weights_are_told_apart_by_value_type_and_name() -> None:
    model = make_model()
    digest = weights_sha256(model)
    assert digest == weights_sha256(make_model()) and len(digest) == 64
    compress(model, keep=0.5)
    assert weights_sha256(model) == digest, "a pruner is none of the weights"
    assert weights_sha256(make_model(seed=1)) != digest
    assert weights_sha256(make_model().half()) != digest
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[0] += 1e-6
    assert weights_sha256(model) != digest


def test_a_model_is_told_apart_by_its_pruning() -> None:
    model = make_model()
    dense = model_identity(model)
    compress(model, keep=0.5)
    pruned = model_identity(model)
    assert {key for key in dense if dense[key] != pruned[key]} == {"pruning"}


def test_a_dataset_is_told_apart_by_pixels_and_labels(tmp_path: Path) -> None:
    def identity(**changed: int) -> str:
        return dataset_identity(open_dataset("npz", write_images(tmp_path / "a.npz", **changed)))

    assert identity() == identity() != identity(seed=1)
    assert identity() != identity(labels=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "dense", make_model())
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("weights", "weights_sha256"),
        ("image size", "config"),
        ("images", "images"),
        ("seed", "seed"),
        ("reduction", "method"),
    ],
)
def test_a_sensitivity_goes_on_only_with_what_it_began(changed: str, named: str, model: Path, tmp_path: Path) -> None:
    calib, state = write_images(tmp_path / "calib.npz"), tmp_path / "state.json"

    def run(seed: int = 0, reduction: str = "context") -> None:
        sensitivity(Source(model), calib, ratios=[0.5], images=4, seed=seed, reduction=reduction, state_path=state)

    run()
    run()
    if changed == "weights":
        checkpoint.save(model, make_model(seed=1), overwrite=True)
    elif changed == "image size":
        checkpoint.save(model, make_model(0, "stride=2"), overwrite=True)
    elif changed == "images":
        write_images(calib, seed=1)
    with pytest.raises(UsageError, match=rf"state\.json: is the state of another run: .*{named}"):
        run(seed=int(changed == "seed"), reduction="drop" if changed == "reduction" else "context")


@pytest.mark.usefixtures("without_noise")
def test_a_search_goes_on_only_with_what_it_began(model: Path, tmp_path: Path) -> None:
    plan = SearchPlan(
        write_images(tmp_path / "calib.npz"),
        [Method("clip", "drop", "none")],
        budgets=(Budget("flops", 0.9),),
        calibration=CalibrationPlan(images=8),
        limits=Limits(2, None),
        state=tmp_path / "state.json",
    )
    search(Source(model), plan)
    again = search(Source(model), replace(plan, budgets=(Budget("flops", 0.8),)))
    assert any("continues an earlier run" in each for each in again.warnings)
    checkpoint.save(model, make_model(seed=1), overwrite=True)
    with pytest.raises(UsageError, match="weights_sha256 differ"):
        search(Source(model), plan)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("start", "start weights_sha256 was"),
        ("pruning", "start pruning"),
        ("teacher", "teacher config class_token was None and is"),
        ("images", "images was"),
        ("labels", "images was"),
        ("validation", "validation images was None and is"),
        ("lr", "lr was"),
    ],
)
def test_a_training_resumes_only_what_it_began(changed: str, message: str, tmp_path: Path) -> None:
    out, images = tmp_path / "out", write_images(tmp_path / "a.npz")

    def run(*, resume: bool) -> None:
        model = make_model(seed=int(resume and changed == "start"))
        if resume and changed == "pruning":
            compress(model, keep=0.5)
        if resume and changed in {"images", "labels"}:
            write_images(images, seed=int(changed == "images"), labels=int(changed == "labels"))
        data = open_dataset("npz", images)
        job = Job(TRAINING.model_copy(update={"lr": 0.5}) if resume and changed == "lr" else TRAINING)
        job = replace(job, teacher=make_model(seed=2) if resume and changed == "teacher" else None)
        finetune(model, Data(data, data if resume and changed == "validation" else None), job, out, resume=resume)

    run(resume=False)
    with pytest.raises(UsageError, match=message):
        run(resume=True)


@pytest.mark.parametrize("state", [3, {}, {"settings": 3}, {"settings": "[]"}])
def test_a_file_that_is_no_state_of_a_training_is_named(state: object, tmp_path: Path) -> None:
    whole: dict[str, object] = {"progress": {}, "model": {}, "optimizer": {}, "ema": None, "scaler": None}
    torch.save({**whole, **state} if isinstance(state, dict) else state, tmp_path / "state.pt")
    data = Data(open_dataset("npz", write_images(tmp_path / "a.npz")))
    with pytest.raises(CheckpointError, match=r"state\.pt: is not the state of a training"):
        finetune(make_model(), data, Job(TRAINING), tmp_path, resume=True)
