"""The training workflow, on a small model that learns where a bright square is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from ssmprune_cli.workflows.train import (
    Epoch,
    LabelledImages,
    TrainSettings,
    learning_rate,
    parameter_groups,
    shifted,
    train,
)
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import DataError, SsmpruneError, UsageError
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.workflows.new_model import build, write_checkpoint

SMALL = ["image_size=[16, 16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=2", "num_classes=2"]
NAME = "vim_small_midclstok_div2"
SETTINGS = TrainSettings(epochs=3, batch_size=8, learning_rate=3e-3, warmup_epochs=0.5, shift=1, seed=1)


def make_model(seed: int = 0) -> Backbone:
    return build("vim", SMALL, name=NAME, seed=seed)


@pytest.fixture
def images() -> LabelledImages:
    """Noise with a bright square in the upper (class 0) or lower (class 1) half."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 60, (48, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.arange(48) % 2
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[:, 2 + 8 * label : 6 + 8 * label, 6:10] = 250
    return LabelledImages(pixels, labels)


def test_training_lowers_the_loss_and_learns(images: LabelledImages) -> None:
    settings = TrainSettings(epochs=8, batch_size=8, learning_rate=3e-3, warmup_epochs=1, label_smoothing=0.0)
    seen: list[Epoch] = []
    result = train(make_model(), images, images, settings, log=seen.append)
    assert tuple(seen) == result.epochs and not result.interrupted
    assert result.epochs[-1].loss < 0.5 * result.epochs[0].loss
    assert result.epochs[-1].top1 == 1.0


def test_same_seed_gives_the_same_weights(images: LabelledImages) -> None:
    """Bit for bit; another seed changes the order of the images, so all weights."""
    weights = []
    for seed in (1, 1, 2):
        model = make_model()
        train(model, images, None, TrainSettings(**{**vars(SETTINGS), "epochs": 1, "seed": seed}))
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not any(torch.equal(weights[0][key], weights[2][key]) for key in ("pos_embed", "head.weight"))


def test_a_loss_that_is_not_finite_stops_with_its_place(images: LabelledImages) -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(math.nan)
    before = model.get_parameter("pos_embed").clone()
    with pytest.raises(SsmpruneError, match=r"epoch 1, step 1.*loss is nan"):
        train(model, images, None, SETTINGS)
    assert torch.equal(model.get_parameter("pos_embed"), before)  # nothing was learned from it


def test_ctrl_c_ends_the_training_and_keeps_the_epochs_done(images: LabelledImages) -> None:
    def stop(epoch: Epoch) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    model = make_model()
    result = train(model, images, None, SETTINGS, log=stop)
    assert result.interrupted and [epoch.epoch for epoch in result.epochs] == [1, 2]
    assert not model.training


def test_images_must_fit_the_model(images: LabelledImages) -> None:
    with pytest.raises(DataError, match=r"label 2.*2 classes"):
        train(make_model(), LabelledImages(images.pixels, images.labels + 1), None, SETTINGS)
    with pytest.raises(DataError, match=r"\(12, 16\)"):
        train(make_model(), LabelledImages(images.pixels[:, :, :12], images.labels), None, SETTINGS)
    with pytest.raises(DataError, match="no images"):
        train(make_model(), LabelledImages(images.pixels[:0], images.labels[:0]), None, SETTINGS)


def test_weight_decay_is_for_matrices_and_filters_alone() -> None:
    model = make_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = ({names[id(parameter)] for parameter in group["params"]} for group in parameter_groups(model, 0.05))
    assert decayed | rest == set(names.values()) and not decayed & rest
    assert decayed == {"patch_embed.proj.weight", "head.weight"} | {
        f"layers.{layer}.mixer.{name}.weight"
        for layer in (0, 1)
        for name in ("in_proj", "conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
    }
    assert [group["weight_decay"] for group in parameter_groups(model, 0.05)] == [0.05, 0.0]


def test_learning_rate_rises_linearly_and_falls_along_half_a_cosine() -> None:
    settings = TrainSettings(epochs=10, learning_rate=1.0, final_learning_rate=0.2, warmup_epochs=2)
    rates = [learning_rate(settings, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])  # 6 is half way from 2 to 10, so the mean of 1 and 0.2


def test_shift_moves_each_image_and_repeats_its_border() -> None:
    ramp = (10 * torch.arange(8)[:, None] + torch.arange(8)).to(torch.uint8).expand(64, 3, 8, 8)
    moved = shifted(ramp, 2, torch.Generator().manual_seed(0))

    def candidate(dy: int, dx: int) -> Tensor:
        rows, columns = (torch.arange(8) + dy).clamp(0, 7), (torch.arange(8) + dx).clamp(0, 7)
        return ramp[0][:, rows][:, :, columns]

    found = set()
    for image in moved:
        match = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if torch.equal(image, candidate(dy, dx))]
        assert len(match) == 1
        found.add(match[0])
    assert len(found) > 10  # of 25 shifts, in 64 draws
    assert {dy for dy, _ in found} == {dx for _, dx in found} == {-2, -1, 0, 1, 2}


def test_checkpoint_loads_as_the_same_model_in_half_precision(tmp_path: Path) -> None:
    model = make_model().eval()
    path = tmp_path / "new" / "vim_small.pth"
    write_checkpoint(path, model, name=NAME, epoch=3)
    loaded = checkpoint.load(path)
    assert loaded.config == model.config
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value.half().float(), rtol=0, atol=0)
    write_checkpoint(tmp_path / "again.pth", model, name=NAME, epoch=3)
    assert (tmp_path / "again.pth").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["vim_small.pth"]  # no temporary file stays


@pytest.mark.parametrize(
    ("family", "setting", "name", "message"),
    [
        ("vim", "dept=2", NAME, "`--set dept=2` is no setting of vim"),
        ("vim", "depth", NAME, "`--set depth` is no setting of vim"),
        ("vim", "image_size=[48", NAME, "is not a value"),
        ("vim", "depth=deep", NAME, "depth: Input should be a valid integer"),
        ("vim", "norm=batch", NAME, "norm: Input should be 'rms' or 'layer'"),
        ("vim", "stride=4", "vim_small_clstok_div2", "another class_token$"),
        ("vim", "class_token=head", NAME, "another class_token$"),
        ("vim", "divide_out=false", NAME, "another divide_out$"),
        ("vmi", "depth=2", NAME, "Did you mean 'vim'"),
    ],
)
def test_settings_of_the_model_are_checked(family: str, setting: str, name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(family, [*SMALL, setting], name=name, seed=0)
    assert re.search(message, caught.value.what)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": -1.0}, {"warmup_epochs": 11}])
def test_settings_of_the_training_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        TrainSettings(**wrong)  # type: ignore[arg-type]
