"""Mask R-CNN of the authors: their values, and the weights that these were computed with."""

from __future__ import annotations

import json
import math
import pprint
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.models.heads import MaskRCNNConfig
from ssmprune_cli.models.plainmamba.adapter import AdapterConfig
from ssmprune_cli.models.vmamba.model import VMambaConfig
from ssmprune_cli.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Frame

GOLDEN = Path(__file__).parent.parent / "golden"


@dataclass(frozen=True)
class Golden:
    """state: the authors' names. values: what their code computed. frame: of the one image, `images` (1, 3, H, W)."""

    name: str
    state: dict[str, Tensor]
    values: dict[str, Tensor]
    frame: Frame
    images: Tensor
    encoder: VMambaConfig | AdapterConfig
    head: MaskRCNNConfig

    @property
    def features(self) -> list[Tensor]:
        return [self.values[f"backbone.feature{number}"] for number in range(4)]


def noise(name: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`count` numbers in [-1, 1) from `name`: splitmix64, seeded with the checksums of the name read both ways."""
    text = name.encode()
    seed = np.uint64(zlib.crc32(text) + (zlib.crc32(text[::-1]) << 32))
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed  # wraps, as it should
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that the golden values were computed with."""
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.tensor(1234)
    values = noise(name, math.prod(shape)).reshape(shape)
    if leaf in ("A_log", "A_logs"):
        values = np.log(np.arange(1.0, shape[-1] + 1)) + 0.5 * values
    elif leaf in ("D", "Ds"):
        values = 1.0 + 0.8 * values
    elif leaf == "dt_projs_bias" or ("dt_proj" in name and leaf == "bias"):
        values = -1.75 + 1.25 * values
    elif "dt_proj" in name:
        values = 0.8 * 3.0**0.5 * values / np.sqrt(shape[-1])
    elif leaf in ("gamma", "running_var") or (leaf == "weight" and len(shape) == 1):
        values = 1.0 + 0.5 * values
    elif leaf in ("running_mean", "bias"):
        values = 0.3 * values
    elif leaf == "weight":
        values = 3.0**0.5 * values / np.sqrt(math.prod(shape[1:]))
    elif leaf == "x_proj_weight":
        values = 3.0**0.5 * values / np.sqrt(shape[-1])
    else:
        values = 0.8 * values
    return torch.from_numpy(values.astype(np.float32))


def prepared(resized: Tensor) -> Tensor:
    """uint8 (H, W, 3), blue first, as the authors normalise and pad it: (1, 3, H, W) with sides of whole strides."""
    pixels = resized.flip(2).permute(2, 0, 1).float()
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    bottom, right = (-side % 32 for side in pixels.shape[1:])
    return functional.pad((pixels - mean) / std, (0, right, 0, bottom))[None]


@cache
def read(name: str) -> Golden:
    config = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    scales = config["weight_scales"]
    state = {
        key: made_up(key, tuple(shape)) * scales[key] if key in scales else made_up(key, tuple(shape))
        for key, (shape, _) in config["state_dict_keys"].items()
    }
    values = load_file(GOLDEN / name / "io.safetensors")
    meta, model = config["metas"][0], config["model"]
    backbone, box_head = model["backbone"], model["roi_head"]["bbox_head"]
    frame = Frame(tuple(meta["ori_shape"][:2]), tuple(meta["img_shape"][:2]))
    images = prepared(values["resized_bgr_uint8"])
    size = (images.shape[2], images.shape[3])
    is_plain = backbone["type"] == "PlainMambaAdapter"
    encoder: VMambaConfig | AdapterConfig
    if is_plain:
        encoder = AdapterConfig(
            image_size=size,
            embed_dim=backbone["embed_dims"],
            depth=backbone["num_layers"],
            stem_convs=backbone["num_convs_patch_embed"],
            dw_layers=tuple(backbone["layers_with_dwconv"]),
            positions=(backbone["img_size"] // 16, backbone["img_size"] // 16),
            prior_channels=backbone["conv_inplane"],
            heads=backbone["deform_num_heads"],
            mlp_channels=int(backbone["embed_dims"] * backbone["cffn_ratio"]),
            runs=tuple(last + 1 for _, last in backbone["interaction_indexes"]),
        )
    else:
        encoder = VMambaConfig(
            image_size=size,
            embed_dim=backbone["dims"],
            depths=tuple(backbone["depths"]),
            num_classes=0,
            out_stages=tuple(backbone["out_indices"]),
        )
    head = MaskRCNNConfig(
        in_channels=tuple(model["neck"]["in_channels"]),
        channels=model["neck"]["out_channels"],
        hidden=box_head["fc_out_channels"],
        num_classes=box_head["num_classes"],
        box_convs=4 if is_plain else 0,
        box_fcs=1 if is_plain else 2,
        normed="norm_cfg" in model["neck"],
        original_first=is_plain,
    )
    return Golden(name, state, values, frame, images, encoder, head)


def container(golden: Golden, path: Path, **changes: Any) -> Path:
    """A file as mmcv and mmengine write it: weights, the configuration as a text, and the names of classes."""
    described = json.loads((GOLDEN / golden.name / "config.json").read_text(encoding="utf-8"))
    model = {**described["model"], **changes}
    resize = {"type": "Resize", "scale": described["test_scale"], "keep_ratio": True}
    pipeline: list[dict[str, Any]] = [{"type": "LoadImageFromFile"}, resize, {"type": "PackDetInputs"}]
    names = tuple(f"thing {number}" for number in range(80))
    meta: dict[str, Any] = {"dataset_meta": {"classes": names}}
    if "plainmamba" in golden.name:
        norm = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
        steps = [
            {"type": "Resize", "keep_ratio": True},
            {"type": "RandomFlip"},
            {"type": "Normalize", **norm},
            {"type": "Pad", "size_divisor": 32},
        ]
        test = {"type": "MultiScaleFlipAug", "img_scale": described["test_scale"], "flip": False, "transforms": steps}
        pipeline = [{"type": "LoadImageFromFile"}, test]
        meta = {"CLASSES": names, "mmdet_version": "2.25.0"}
    text = f"model = {pprint.pformat(model)}\ntest_pipeline = {pprint.pformat(pipeline)}\n"
    meta["config" if "CLASSES" in meta else "cfg"] = text
    torch.save({"meta": meta, "state_dict": golden.state}, path)
    return path


def write_coco(root: Path, *, images: int = 2, names: tuple[str, ...] = ("cat", "dog", "tree")) -> Path:
    """`root` in COCO's layout: images of 60 x 40 and 40 x 60 pixels, two objects each. Ids of categories have gaps."""
    draw, size = np.random.default_rng(0), (60, 40)
    ids = [2 + 3 * number + number // 2 for number in range(len(names))]  # 2, 5, 9, ...
    values: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": []}
    values["categories"] = [{"id": key, "name": name} for key, name in zip(ids, names, strict=True)]
    (root / "annotations").mkdir(parents=True)
    (root / "val2017").mkdir()
    for number in range(1, images + 1):
        width, height = size if number % 2 else size[::-1]
        name = f"{number:012d}.png"
        coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(root / "val2017" / name)
        values["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        for place in range(2):
            left, top = 4 + 8 * place, 6 + 9 * place
            right, bottom = left + 20, top + 10
            values["annotations"].append(
                {
                    "id": len(values["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids[(number + place - 1) % len(ids)],
                    "bbox": [left, top, 20, 10],
                    "area": 200,
                    "iscrowd": 0,
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
            )
    text = json.dumps({"info": {}, "licenses": [], **values})
    (root / "annotations" / "instances_val2017.json").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(params=["vmamba_maskrcnn_mini", "plainmamba_maskrcnn_mini"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return read(request.param)


@pytest.fixture
def vmamba() -> Golden:
    return read("vmamba_maskrcnn_mini")


@pytest.fixture
def plainmamba() -> Golden:
    return read("plainmamba_maskrcnn_mini")
