"""The training loop, on a small model that learns where a bright square is."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import open_dataset
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.errors import CheckpointError, DataError, SsmpruneError, UsageError
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.common.block import set_recompute
from ssmprune_cli.pruning import Correction, TokenPruner, compress
from ssmprune_cli.recipe.sections import Training
from ssmprune_cli.report import read_report
from ssmprune_cli.workflows.finetune import Data, Job, finetune, run
from ssmprune_cli.workflows.finetune.loop import Trainer, accelerator
from ssmprune_cli.workflows.finetune.new_model import build
from ssmprune_cli.workflows.reporting import describe

VIM = ("vim", ["image_size=[16, 16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"])
PLAINMAMBA = ("plainmamba", ["image_size=[16, 16]", "patch_size=4", "embed_dim=16", "depth=4", "num_classes=2"])
VMAMBA = ("vmamba", ["image_size=[16, 16]", "embed_dim=8", "depths=[2, 3]", "num_classes=2"])
SETTINGS = Training(epochs=2, batch_size=8, lr=3e-3, warmup_epochs=0.5, shift=1)


def make_model(kind: tuple[str, list[str]] = VIM, keep: float | None = None) -> Backbone:
    name = "vim_small_midclstok_div2" if kind[0] == "vim" else f"{kind[0]}_small"
    model = build(kind[0], kind[1], name=name, seed=0)
    if keep is not None:
        compress(model, keep)
    return model


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Noise with a bright square in the upper (class 0) or lower (class 1) half."""
    pixels = np.random.default_rng(0).integers(0, 60, (48, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(48) % 2
    for image, label in zip(pixels, labels, strict=True):
        image[2 + 8 * label : 6 + 8 * label, 6:10] = 250
    path = tmp_path_factory.mktemp("images") / "squares.npz"
    np.savez(path, images=pixels, labels=labels)
    dataset: ImageDataset = open_dataset("npz", path)
    return dataset


def losses(model: Backbone, images: ImageDataset, settings: Training, **options: Any) -> list[float | None]:
    """Of every update of a whole training."""
    trainer = Trainer(model, images, settings, **options)
    return [line["loss"] for _ in range(settings.epochs) for line in trainer.epoch()]


def weights(model: Backbone) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kind", [VIM, PLAINMAMBA, VMAMBA], ids=lambda kind: str(kind[0]))
def test_a_pruned_model_of_every_family_learns(images: ImageDataset, kind: tuple[str, list[str]]) -> None:
    model = make_model(kind, keep=0.5)
    settings = SETTINGS.model_copy(update={"epochs": 4, "label_smoothing": 0.0, "drop_path": 0.1})
    found = [loss for loss in losses(model, images, settings) if loss is not None]
    assert sum(found[-6:]) < 0.7 * sum(found[:6])
    assert isinstance(model.pruner, TokenPruner)  # the schedule was active: tokens are still dropped


def test_pruning_points_and_alignment_pass_gradients(images: ImageDataset) -> None:
    """Every weight of the pruned model learns, those before the prune points too."""
    model = make_model(keep=0.5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    losses(model, images, SETTINGS.model_copy(update={"epochs": 1, "warmup_epochs": 0.0}))
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]


def test_same_seed_gives_the_same_weights(images: ImageDataset) -> None:
    """Bit for bit; another seed changes the order of the images, so the weights."""
    found = []
    for seed in (1, 1, 2):
        model = make_model(keep=0.5)
        losses(model, images, SETTINGS.model_copy(update={"epochs": 1}), seed=seed)
        found.append(weights(model))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_accumulation_takes_the_same_steps(images: ImageDataset) -> None:
    """The same images in two parts: only the order of sums differs (float32), which Adam's first steps make larger."""
    whole = losses(make_model(keep=0.5), images, SETTINGS)
    parts = losses(make_model(keep=0.5), images, SETTINGS.model_copy(update={"accumulate": 2}))
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("kind", [VIM, PLAINMAMBA, VMAMBA], ids=lambda kind: str(kind[0]))
def test_recomputation_changes_no_gradient(kind: tuple[str, list[str]]) -> None:
    found = []
    for recompute in (False, True):
        model = make_model(kind, keep=0.5).train()
        set_recompute(model.blocks, recompute)
        for block in model.blocks:
            block.drop_rate = 0.3
        torch.manual_seed(3)  # of the images and of drop path
        model(torch.randn(4, 3, 16, 16)).square().sum().backward()
        found.append([value.grad for value in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)


def test_drop_path_leaves_out_blocks_in_training_only() -> None:
    """A dropped branch is zero and a kept one divided by the share that stays, in expectation the branch itself."""
    block = make_model().blocks[1]
    block.drop_rate = 0.25
    branch = torch.ones(4000, 2, 3)
    assert block.eval().drop(branch) is branch
    torch.manual_seed(0)
    kept = block.train().drop(branch)[:, 0, 0]
    assert sorted(set(kept.tolist())) == pytest.approx([0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1, abs=0.04)  # five standard errors


def test_progressive_training_drops_more_tokens_in_every_epoch(images: ImageDataset) -> None:
    """16 patches, at last 8, 4 and 2 of them after the three points."""
    model = make_model(keep=0.5)
    trainer = Trainer(model, images, SETTINGS.model_copy(update={"epochs": 3, "progressive": 2, "ema": 0.9}))
    seen = []
    for _ in range(3):
        for _line in trainer.epoch():
            pass
        for each in (model, trainer.weights):
            assert isinstance(each.pruner, TokenPruner)
            seen.append(each.pruner.settings.schedule.tokens)
    assert seen[::2] == seen[1::2] == [(12, 10, 9), (8, 4, 2), (8, 4, 2)]


def test_a_progressive_training_goes_on_with_the_schedule_of_its_epoch(images: ImageDataset) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 3, "progressive": 2})
    whole, resumed = (Trainer(make_model(keep=0.5), images, settings) for _ in range(2))
    list(whole.epoch())
    resumed.load(copy.deepcopy(whole.state()))
    for trainer in (whole, resumed):
        list(trainer.epoch())
        assert isinstance(trainer.model.pruner, TokenPruner)
        assert trainer.model.pruner.settings.schedule.tokens == (8, 4, 2)
    assert torch.equal(weights(whole.model), weights(resumed.model))


def test_ema_is_the_running_mean_of_the_weights(images: ImageDataset) -> None:
    """The first update copies the weights, then mean = 0.75 mean + 0.25 weights."""
    trainer = Trainer(make_model(), images, SETTINGS.model_copy(update={"epochs": 1, "ema": 0.75}))
    expected = None
    for _ in trainer.epoch():
        now = weights(trainer.model)
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(weights(trainer.weights), expected, rtol=1e-5, atol=1e-6)


class Poison:
    """Makes the loss nan in the given calls of the head."""

    def __init__(self, model: Backbone, calls: range) -> None:
        self.calls, self.count = calls, 0
        model.get_submodule("head").register_forward_hook(self)

    def __call__(self, module: object, inputs: object, output: Tensor) -> Tensor | None:
        self.count += 1
        return output * math.nan if self.count in self.calls else None


def test_single_losses_that_are_not_finite_are_skipped_and_counted(images: ImageDataset) -> None:
    model = make_model(keep=0.5)
    Poison(model, range(2, 4))
    trainer = Trainer(model, images, SETTINGS.model_copy(update={"epochs": 1}))
    found = [line["loss"] for line in trainer.epoch()]
    assert [loss is None for loss in found] == [False, True, True, False, False, False]
    assert trainer.progress.skipped == 2 and weights(model).isfinite().all()


def test_three_in_a_row_stop_with_a_diagnosis_and_keep_the_last_good_checkpoint(
    images: ImageDataset, tmp_path: Path
) -> None:
    model = make_model(keep=0.5)
    Poison(model, range(13, 99))  # two passes count multiply-adds, two bytes, and 6 updates are an epoch
    expected = r"epoch 2, step 5: the loss is nan, 3 updates in a row.*output of .*head \(Linear\).*rate 0.*float32"
    with pytest.raises(SsmpruneError, match=expected):
        finetune(model, Data(images), Job(SETTINGS), tmp_path)
    assert weights(checkpoint.load(tmp_path / "last")).isfinite().all()
    assert (tmp_path / "state.pt").exists()


def test_a_weight_that_is_not_finite_is_named(images: ImageDataset) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(math.nan)
    before = model.get_parameter("pos_embed").clone()
    with pytest.raises(SsmpruneError, match=r"epoch 1, step 3.*the weight .*head\.bias"):
        losses(model, images, SETTINGS)
    assert torch.equal(model.get_parameter("pos_embed"), before)  # nothing was learned from it


def test_images_must_fit_the_model(images: ImageDataset, tmp_path: Path) -> None:
    np.savez(tmp_path / "three.npz", images=np.zeros((9, 16, 16), np.uint8), labels=np.arange(9) % 3)
    with pytest.raises(DataError, match=r"label 2.*2 classes"):
        finetune(make_model(), Data(open_dataset("npz", tmp_path / "three.npz")), Job(SETTINGS), tmp_path / "out")
    with pytest.raises(UsageError, match="cannot be shared by 1 processes in 3 parts"):
        Trainer(make_model(), images, SETTINGS.model_copy(update={"accumulate": 3}))
    with pytest.raises(UsageError, match="1 images at once are no pairs"):
        Trainer(make_model(), images, SETTINGS.model_copy(update={"batch_size": 1, "mixup": 1.0}))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    yield


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_found_before_the_first_epoch(images: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the disk has 0 MB left"):
        finetune(make_model(), Data(images), Job(SETTINGS), tmp_path / "out")


def test_a_folder_that_cannot_be_used_is_found_before_the_first_epoch(images: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        finetune(make_model(), Data(images), Job(SETTINGS), tmp_path / "file")
    with pytest.raises(CheckpointError, match="not empty"):
        finetune(make_model(), Data(images), Job(SETTINGS), tmp_path)
    with pytest.raises(UsageError, match="no training to resume"):
        finetune(make_model(), Data(images), Job(SETTINGS), tmp_path, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_is_named(number: signal.Signals, images: ImageDataset, tmp_path: Path) -> None:
    def stop(line: dict[str, Any]) -> None:
        if line.get("step") == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = finetune(make_model(), Data(images), Job(SETTINGS), tmp_path / "out", report=stop)
    assert (result.interrupted, result.to_dict()["interrupted"], result.epochs) == (number, number, [])
    assert signal.getsignal(number) is before
    result = finetune(make_model(), Data(images), Job(SETTINGS), tmp_path / "out", resume=True)
    assert (result.interrupted, len(result.epochs)) == (0, 2)


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_that_cannot_be_written_is_not_lost(
    epoch: int, images: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models are written when the training is resumed, and are those of one that nothing befell."""
    save = checkpoint.save

    def fails(folder: Path, *arguments: Any, **options: Any) -> None:
        if len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) > epoch * 2:
            raise CheckpointError("cannot be written", where=str(folder))
        save(folder, *arguments, **options)

    finetune(make_model(), Data(images), Job(SETTINGS), tmp_path / "whole")
    monkeypatch.setattr(checkpoint, "save", fails)
    with pytest.raises(CheckpointError, match="cannot be written"):
        finetune(make_model(), Data(images), Job(SETTINGS), tmp_path / "out")
    monkeypatch.setattr(checkpoint, "save", save)
    result = finetune(make_model(), Data(images), Job(SETTINGS), tmp_path / "out", resume=True)
    assert [line["epoch"] for line in result.epochs] == [1, 2] and None not in [line["loss"] for line in result.epochs]
    last, whole = (checkpoint.load(tmp_path / name / "last") for name in ("out", "whole"))
    assert torch.equal(weights(last), weights(whole))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_is_missing_is_refused(images: ImageDataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cuda"):
        finetune(make_model(), Data(images), Job(SETTINGS, device="cuda"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_failed_accelerator_left_is_forgotten() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    AcceleratorState._shared_state["_cpu"] = True  # as far as it came
    assert accelerator("fp32", "cpu", find_unused=False).device.type == "cpu"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bfloat16_training_follows_float32(images: ImageDataset) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate allows one precision in a process
        settings = SETTINGS.model_copy(update={"precision": precision})
        found.append(losses(make_model(keep=0.5), images, settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    wide, half = found
    assert half != wide
    # bfloat16 keeps 8 bits: the losses of the first updates agree to a per cent, then the weights drift apart.
    assert half[:3] == pytest.approx(wide[:3], rel=0.01)
    assert half[-1] is not None and half[0] is not None and half[-1] < half[0]


def test_tensorboard_gets_every_update(images: ImageDataset, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs TensorBoard")
    result = finetune(make_model(keep=0.5), Data(images, images), Job(SETTINGS, tensorboard=True), tmp_path / "out")
    events = reader.EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    updates = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in updates if "step" in line]
    assert [event.value for event in events.Scalars("update/loss")] == pytest.approx(expected)
    top1 = [epoch["top1"] for epoch in result.epochs]
    assert [event.value for event in events.Scalars("epoch/top1")] == pytest.approx(top1)


def test_missing_tensorboard_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"ssmprune\[tensorboard\]"):
        run.tensorboard_writer(tmp_path)


def test_a_repaired_artefact_is_trained_with_its_head(images: ImageDataset, tmp_path: Path) -> None:
    """Its head becomes the model's own, so that it learns; the projections of dropped tokens stay as they are."""
    model = make_model(keep=0.5)
    assert isinstance(model.pruner, TokenPruner)
    layer, points = model.output_layer, model.pruner.dropping_points
    side = {point: torch.randn(16, 16) for point in points}
    model.pruner.correct(Correction((layer.weight.detach() + 0.5, layer.bias.detach() - 0.5), side))
    checkpoint.save(tmp_path / "start", model)
    job = Job(SETTINGS.model_copy(update={"epochs": 1}), report=describe(model))
    start = checkpoint.load(tmp_path / "start")
    finetune(start, Data(images), job, tmp_path / "out")
    trained = checkpoint.load(tmp_path / "out" / "last")
    assert isinstance(trained.pruner, TokenPruner) and trained.pruner.correction.head is None
    found = trained.pruner.correction.side
    assert found.keys() == side.keys() and all(torch.equal(found[point], side[point]) for point in points)
    moved = (trained.output_layer.weight - layer.weight - 0.5).detach().abs().max()
    assert 0 < float(moved) < 0.2, "training went on from the repaired head"
    report = read_report(tmp_path / "out" / "last")
    assert report.pruning is not None and report.pruning.repair == "side" and report.repair is None
    resumed = finetune(checkpoint.load(tmp_path / "start"), Data(images), job, tmp_path / "out", resume=True)
    assert len(resumed.epochs) == 1
