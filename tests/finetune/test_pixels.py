"""Training on masks: image and mask stay together, what is not judged has no say, and new segmenters."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssmprune_cli.checkpoint import load
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Segmenter
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.recipe.sections import Training
from ssmprune_cli.workflows.finetune.lessons import LESSONS, Pupil
from ssmprune_cli.workflows.finetune.lessons.pixels import PixelLesson
from ssmprune_cli.workflows.finetune.loss import Outputs, total_loss
from ssmprune_cli.workflows.finetune.new_model import build, check_container, write_checkpoint

LESSON = PixelLesson()
PLAIN = KeepRatio(60, 30, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
PUPIL = Pupil(PLAIN, (30, 40), 200)
SMALL = (
    "encoder.embed_dim=8", "encoder.depths=[1, 1, 2, 1]", "encoder.image_size=[32, 32]", "encoder.d_state=1",
    "head.in_channels=[8, 16, 32, 64]", "head.channels=8", "head.num_classes=3", "preprocessing.short=32",
    "preprocessing.long=64", "class_names=[sky, road, tree]",
)  # fmt: skip


def scene(seed: int = 0, size: tuple[int, int] = (60, 90)) -> tuple[Image.Image, NDArray[np.uint8]]:
    """An image in blocks of 10 pixels, red as the mask's class says, and that mask."""
    blocks = np.random.default_rng(seed).integers(0, 200, (size[0] // 10, size[1] // 10)).astype(np.uint8)
    mask = np.kron(blocks, np.ones((10, 10), np.uint8))
    return Image.fromarray(np.stack([mask, 255 - mask, mask // 2], axis=2)), mask


def example(seed: int, **settings: Any) -> tuple[Tensor, Tensor]:
    return LESSON.example(*scene(), "a", PUPIL, Training(**settings), seed)


@pytest.mark.parametrize("settings", [{}, {"flip": True}, {"crop_scale": 0.2}, {"crop_scale": 0.2, "flip": True}])
def test_image_and_mask_are_cut_and_mirrored_together(settings: dict[str, Any]) -> None:
    """Inside of a block every pixel has the colour of its class, at edges the image is a mean of two. With another mask
    they agree in one pixel of fifty."""
    found = [example(seed, **settings) for seed in range(12)]
    for image, mask in found:
        assert image.shape == (3, 30, 40) and mask.shape == (30, 40) and mask.dtype == torch.int64
        agree = ((image[0] - mask).abs() <= 1) & ((image[1] - (255 - mask)).abs() <= 1)
        assert agree.double().mean() > 0.3
    assert len({mask.numpy().tobytes() for _, mask in found}) > 3  # they differ
    assert all(torch.equal(*pair) for pair in zip(found[3], example(3, **settings), strict=True))


def test_without_a_crop_scale_the_scale_is_that_of_evaluation() -> None:
    """60 x 90 pixels are prepared to 30 x 45: of these, 30 x 40 are seen. A block of 10 is 5 pixels."""
    _, mask = example(0)
    edges = (mask[0, 1:] != mask[0, :-1]).nonzero().flatten().tolist()
    assert len(edges) >= 7 and all(4 <= after - before <= 6 for before, after in pairwise(edges))
    rows = (mask[1:, 0] != mask[:-1, 0]).nonzero().flatten().tolist()
    assert rows == [4, 9, 14, 19, 24]


def test_half_are_mirrored() -> None:
    plain, mirrored = ([example(seed, flip=flip)[1] for seed in range(40)] for flip in (False, True))
    turned = [not torch.equal(one, other) for one, other in zip(plain, mirrored, strict=True)]
    assert 10 <= sum(turned) <= 30
    first = turned.index(True)
    assert torch.equal(mirrored[first].flip(1), plain[first])


def test_colours_are_jittered_and_the_mask_is_not() -> None:
    (image, mask), (other, same) = example(1), example(1, colour_jitter=0.5)
    assert torch.equal(mask, same) and not torch.equal(image, other)


def test_a_mask_that_does_not_fit_is_named() -> None:
    image, mask = scene()
    with pytest.raises(DataError, match=r"a: has the class \d+ in its mask, and the model has 3"):
        LESSON.example(image, mask, "a", Pupil(PLAIN, (30, 40), 3), Training(), 0)
    with pytest.raises(DataError, match="a: has 90 x 60 pixels, and its mask has 80 x 60"):
        LESSON.example(image, mask[:, :80], "a", PUPIL, Training(), 0)


def test_the_loss_is_the_mean_over_judged_pixels() -> None:
    """Of two images of two pixels, one is not judged: three cross-entropies of ln 2, ln 4 and ln 4/3."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # (classes, pixels): shares 1/2, 1/2 and 3/4, 1/4
    both = torch.stack([logits, logits])[:, :, None]  # (2, classes, 1, 2)
    targets = torch.tensor([[[0, 1]], [[255, 0]]])
    found = LESSON.loss(both, targets, Training(label_smoothing=0.0))
    assert found.item() == pytest.approx((math.log(2) + math.log(4) + math.log(4 / 3)) / 3, rel=1e-6)
    nothing = LESSON.loss(both, torch.full((2, 1, 2), 255), Training())
    assert nothing.item() == 0
    smooth = LESSON.loss(both, targets, Training(label_smoothing=0.5)).item()
    sums = (math.log(2), 0.75 * math.log(4) + 0.25 * math.log(4 / 3), 0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert smooth == pytest.approx(sum(sums) / 3, rel=1e-6)


def test_a_teacher_has_a_say_in_every_pixel() -> None:
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[math.log(3), 0.0]], [[0.0, 0.0]]]])  # 3/4, 1/4 and 1/2, 1/2
    token = torch.zeros(1, 1, 1)
    pair = [Outputs(each, token, torch.zeros(1, 1, dtype=torch.int64)) for each in (student, teacher)]
    found = total_loss(pair[0], torch.zeros(1, 1, 2, dtype=torch.int64), Training(distill=1.0), pair[1], LESSON)
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert found.item() == pytest.approx(divergence / 2, rel=1e-6)  # the second pixel agrees


class Scenes(ImageDataset):
    def __len__(self) -> int:
        return 2

    def image(self, index: int) -> Image.Image:
        return scene(index)[0]

    def target(self, index: int) -> NDArray[np.uint8]:
        return scene(index)[1] % 3

    def name(self, index: int) -> str:
        return f"scene {index}"


@pytest.mark.parametrize("name", ["shift", "randaugment", "erasing", "mixup", "cutmix"])
def test_what_says_nothing_of_a_mask_is_refused(name: str) -> None:
    model = build("vmamba-upernet", SMALL, name="a", seed=0)
    LESSON.check(model, Scenes(), Training())
    with pytest.raises(UsageError, match=rf"training\.{name} is for images of one class"):
        LESSON.check(model, Scenes(), Training().model_copy(update={name: 1}))


def test_a_new_segmenter_is_the_default_one_with_other_settings() -> None:
    model = build("vmamba-upernet", SMALL, name="a", seed=0)
    assert isinstance(model, Segmenter) and model.class_names == ("sky", "road", "tree")
    assert model.config.encoder.depths == (1, 1, 2, 1) and model.config.encoder.out_stages == (0, 1, 2, 3)
    assert model.config.preprocessing == KeepRatio(64, 32) and model.image_size == (32, 32)
    with torch.inference_mode():
        assert model.eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    "images",
    [
        [],
        ["preprocessing.divisor=16", "preprocessing.channels=bgr", "preprocessing.mean=[0.5, 0.4, 0.3]"],
        ["preprocessing.divisor=32", "preprocessing.fill=pad", "head.pool_scales=[1, 3]", "head.dropout=0.25"],
    ],
    ids=["as it is", "resized to a multiple", "padded"],
)
def test_the_file_of_a_new_segmenter_is_read_as_the_same_model(tmp_path: Path, images: list[str]) -> None:
    model = build("vmamba-upernet", [*SMALL, *images], name="a", seed=0).eval()
    check_container(model, "a")
    write_checkpoint(tmp_path / "new.pth", model, name="a", epoch=1)
    read = load(tmp_path / "new.pth")
    assert read.config == model.config and read.class_names == ("sky", "road", "tree")
    for key, value in model.state_dict().items():
        half = value.half().float() if value.is_floating_point() else value
        torch.testing.assert_close(read.state_dict()[key], half, rtol=0, atol=0)


def test_what_the_file_would_not_say_is_refused_before_training() -> None:
    model = build("vmamba-upernet", [*SMALL, "encoder.image_size=[32, 64]"], name="a", seed=0)
    with pytest.raises(UsageError, match=r"--checkpoint: .*would be read with another encoder\.image_size"):
        check_container(model, "a")
    plain = (
        "encoder.patch_size=8", "encoder.embed_dim=8", "encoder.depth=2", "encoder.out_indices=[0, -1]",
        "encoder.positions=[4, 6]", "encoder.image_size=[32, 32]", "head.in_channels=[8, 8]", "head.channels=8",
        "preprocessing.short=32", "preprocessing.long=64",
    )  # fmt: skip
    model = build("plainmamba-upernet", plain, name="a", seed=0)
    with pytest.raises(UsageError, match="could not be read again: the 24 patch positions"):
        check_container(model, "a")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            "encoder.klip=1",
            r"is no setting of vmamba-upernet\nGive encoder.key=value with one of",
        ),
        ("klip.depths=1", r"is no setting of vmamba-upernet\nGive key=value with one of: encoder, head"),
        ("class_names.x=1", "is no setting"),
        ("encoder.depths=x", "the settings of vmamba-upernet are not valid: encoder.depths"),
        ("head.channels=[8", "is not a value"),
        ("head.in_channels=[8, 16, 32, 65]", "the head takes feature maps of"),
    ],
)
def test_settings_of_a_new_segmenter_are_checked(wrong: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build("vmamba-upernet", [*SMALL, wrong], name="a", seed=0)


def test_what_is_trained_is_known() -> None:
    assert set(LESSONS.names()) == {"classification", "segmentation"}
