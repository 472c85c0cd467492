"""Detectors in checkpoints: which model a file holds, what it says of it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmprune_cli import load
from ssmprune_cli.checkpoint import Checkpoint, resolve, save, variant_name
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import FAMILIES, Detector, Hints
from ssmprune_cli.preprocessing import IMAGENET_MEAN, IMAGENET_STD, KeepRatio
from tests.detection.conftest import GOLDEN, Golden, container

SHAPES = GOLDEN / "shapes" / "dense"
PUBLISHED = {
    "vmamba_maskrcnn_tiny": "maskrcnn_vmamba_tiny_s1l8",
    "vmamba_maskrcnn_base": "maskrcnn_vmamba_base_s2l15",
    "plainmamba_maskrcnn_l1": "maskrcnn_plainmamba_l1",
    "plainmamba_maskrcnn_l3": "maskrcnn_plainmamba_l3",
}
FAMILY = {"vmamba": "vmamba-maskrcnn", "plainmamba": "plainmamba-maskrcnn"}


def resolved(shapes: dict[str, Any], hints: Hints = Hints()) -> Any:  # noqa: B008  # it is frozen
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return resolve(Checkpoint(Path("x.pth"), "torch", (), None, state, hints))


def published_names(family: str, name: str) -> str:
    """What a weight of ours is called in the authors' files."""
    name = name.removeprefix("head.")
    return name.replace("encoder.", "backbone." if family == "vmamba" else "", 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_build_and_are_recognised(name: str) -> None:
    described = json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))
    shapes = described["keys"]
    found = resolved(shapes)
    encoder = name.split("_")[0]
    assert found.family is FAMILIES.get(FAMILY[encoder])
    assert variant_name(found.family, found.config) == PUBLISHED[name]
    assert found.config.preprocessing == KeepRatio(1333, 800, divisor=32, fill="pad")
    assert found.config.image_size == (800, 1280)
    with torch.device("meta"):
        model = found.family.build(found.config)
    own = {published_names(encoder, key): list(value.shape) for key, value in model.state_dict().items()}
    assert own == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == described["n_params"]
    assert set(model.depths().values()) == set(range(len(model.blocks) + 2))  # every parameter has a place
    assert all(isinstance(model.is_decayed(*each), bool) for each in model.named_parameters())


# Parameters and keys of the published models whose shapes are not among the golden values.
@pytest.mark.parametrize(
    ("variant", "parameters", "keys"),
    [("maskrcnn_vmamba_small_s2l15", 69_654_000, 448), ("maskrcnn_plainmamba_l2", 53_202_496, 692)],
)
def test_models_of_the_same_kind(variant: str, parameters: int, keys: int) -> None:
    family = FAMILIES.get(FAMILY[variant.split("_")[1]])
    with torch.device("meta"):
        model = family.build(family.variants[variant])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    state = model.state_dict()
    assert len(state) == keys
    names = {published_names(variant.split("_")[1], key): value.shape for key, value in state.items()}
    assert variant_name(family, resolved(names).config) == variant


def assert_resized(images: object, long: int, short: int) -> None:
    """To these sides and padded to multiples of 32, channels as usual: files state them for pixels of 0 to 255."""
    assert isinstance(images, KeepRatio)
    assert replace(images, mean=IMAGENET_MEAN, std=IMAGENET_STD) == KeepRatio(long, short, divisor=32, fill="pad")
    assert images.mean == pytest.approx(IMAGENET_MEAN) and images.std == pytest.approx(IMAGENET_STD)


def test_a_file_as_the_authors_tools_write_it(golden: Golden, tmp_path: Path) -> None:
    model = load(container(golden, tmp_path / "epoch_12.pth"))
    assert isinstance(model, Detector) and model.task == "detection"
    assert model.class_names[:2] == ("thing 0", "thing 1") and model.num_classes == 80
    long, short = (400, 250) if golden.name.startswith("vmamba") else (300, 190)
    assert_resized(model.preprocessing, long, short)
    expected = replace(golden.encoder, image_size=model.image_size, eval_crop_ratio=None)
    assert model.config.encoder == expected
    assert model.config.head == golden.head
    with torch.no_grad():
        (found,) = model.detect(golden.images, [golden.frame])
    assert torch.equal(found.labels, golden.values["final.labels"])
    torch.testing.assert_close(found.boxes, golden.values["final.boxes"], rtol=0, atol=1e-3)
    with pytest.raises(UsageError, match="1 images have 2 frames"):
        model.detect(golden.images, [golden.frame] * 2)


def test_a_detector_is_saved_and_read_again(golden: Golden, tmp_path: Path) -> None:
    model = load(container(golden, tmp_path / "epoch_12.pth"))
    save(tmp_path / "saved", model)
    again = load(tmp_path / "saved")
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_another_short_side(vmamba: Golden, tmp_path: Path) -> None:
    """The weights stay; the long side and the size that tokens are counted for go with it."""
    model = load(container(vmamba, tmp_path / "epoch_12.pth"), image_size=320)
    assert_resized(model.preprocessing, 512, 320)
    assert model.image_size == (320, 512)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_cfg": {"rcnn": {"score_thr": 0.3}}}, "score_thr 0.3"),
        ({"test_cfg": {"rcnn": {"nms": {"type": "soft_nms", "iou_threshold": 0.5}}}}, "nms soft_nms"),
        ({"neck": {"type": "PAFPN", "in_channels": [16, 32, 64, 128]}}, "neck PAFPN"),
        ({"roi_head": {"type": "CascadeRoIHead"}}, "roi_head CascadeRoIHead"),
    ],
)
def test_what_is_computed_otherwise_is_refused(
    vmamba: Golden, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(container(vmamba, tmp_path / "epoch_12.pth", **changes))


def test_runs_that_nothing_says_are_asked_for(plainmamba: Golden, tmp_path: Path) -> None:
    """Five blocks are not divided evenly among four interactions."""
    torch.save(plainmamba.state, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="nothing says how 5 blocks are divided among 4 interactions"):
        load(tmp_path / "bare.pth")
    config = json.loads((GOLDEN / plainmamba.name / "config.json").read_text(encoding="utf-8"))["model"]["backbone"]
    wrong = {**config, "interaction_indexes": [[0, 1], [3, 4]]}
    with pytest.raises(CheckpointError, match="are no first and last blocks of runs"):
        load(container(plainmamba, tmp_path / "wrong.pth", backbone=wrong))


def test_sizes_that_nothing_says_are_asked_for(vmamba: Golden, tmp_path: Path) -> None:
    torch.save(vmamba.state, tmp_path / "bare.pth")
    with pytest.raises(CheckpointError, match="to what size images are resized"):
        load(tmp_path / "bare.pth")
    assert_resized(load(tmp_path / "bare.pth", image_size=256).preprocessing, 427, 256)


def without(state: dict[str, Tensor], *starts: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(starts)}


def test_other_heads_are_named(vmamba: Golden, tmp_path: Path) -> None:
    agnostic = {**vmamba.state, "roi_head.bbox_head.fc_reg.weight": torch.zeros(4, 48)}
    for state, message in (
        (agnostic, "boxes that are not those of each class"),
        ({**vmamba.state, "rpn_head.rpn_cls.weight": torch.zeros(9, 16, 1, 1)}, "other anchors than 3"),
        (without(vmamba.state, "neck.lateral_convs.3"), "Mask R-CNN reads 4 maps"),
        (without(vmamba.state, "rpn_head.rpn_conv"), "rpn_head.rpn_conv.weight is missing"),
    ):
        torch.save(state, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "other.pth", image_size=256)
