"""UperNet on VMamba and PlainMamba against what the authors' code computes, and against what they publish of it.

`tests/golden/*_upernet_mini` come from MzeroMiko/VMamba 2ed52ea with mmsegmentation 1.2.2 and from
ChenhongyiYang/PlainMamba 0975a1d with its 0.23.0; see tests/golden/README.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssmprune_cli import load
from ssmprune_cli.checkpoint.loading import variant_name
from ssmprune_cli.models import FAMILIES, DenseConfig, Hints, Segmenter
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.workflows.measure import count_flops

GOLDEN = Path(__file__).parent.parent / "golden"
MMENGINE = GOLDEN / "containers" / "vmamba_upernet_mmengine.pth"

# Measured: 5.2e-6 (PlainMamba's last feature map, values up to 5) and 1.3e-6 (logits, values up to 0.6). The stream in
# the place of a map's norm moves it by more than 1, aligned corners move logits by 0.03.
FEATURES, LOGITS = 2e-5, 1e-5


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that the golden values were computed with: splitmix64, seeded with the checksums of its name."""
    text, count, leaf = name.encode(), math.prod(shape), name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.full(shape, 1234)
    seed = np.uint64(zlib.crc32(text) | (zlib.crc32(text[::-1]) << 32))
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed  # wraps, as it should
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    values = ((state >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0).reshape(shape)
    if leaf == "A_log":
        values = np.log(np.arange(1.0, shape[-1] + 1)) + 0.5 * values
    elif leaf == "D":
        values = 1.0 + 0.8 * values
    elif "dt_proj" in name:
        values = -1.75 + 1.25 * values if leaf == "bias" else 0.8 * 3.0**0.5 * values / np.sqrt(shape[-1])
    elif leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        values = 1.0 + 0.5 * values
    elif leaf == "weight":
        values = 3.0**0.5 * values / np.sqrt(math.prod(shape[1:]))
    else:
        values = (0.3 if leaf in ("bias", "running_mean") else 0.8) * values
    return torch.from_numpy(values.astype(np.float32))


def plainmamba_file(folder: Path) -> Path:
    """The weights of the golden PlainMamba, as mmcv saves them."""
    described = json.loads((GOLDEN / "plainmamba_upernet_mini" / "config.json").read_text(encoding="utf-8"))
    state = {key: made_up(key, tuple(shape)) for key, shape in described["state_dict_keys"].items()}
    torch.save({"meta": {"iter": 160000}, "state_dict": state}, folder / "l1_upernet.pth")
    return folder / "l1_upernet.pth"


@pytest.mark.parametrize("name", ["vmamba", "plainmamba"])
def test_mini(name: str, tmp_path: Path) -> None:
    """PlainMamba: four outputs of 4 x 4 stored positions on a grid of 6 x 10. VMamba: 96 x 129 pixels, odd grids."""
    described = json.loads((GOLDEN / f"{name}_upernet_mini" / "config.json").read_text(encoding="utf-8"))
    expected = load_file(GOLDEN / f"{name}_upernet_mini" / "io.safetensors")
    images = expected.pop("input")
    model = load(MMENGINE) if name == "vmamba" else load(plainmamba_file(tmp_path), image_size=88)
    assert isinstance(model, Segmenter) and (model.task, model.family) == ("segmentation", f"{name}-upernet")
    auxiliary = {key: shape for key, shape in described["state_dict_keys"].items() if key.startswith("auxiliary_head.")}
    left_out = sum(math.prod(shape) for key, shape in auxiliary.items() if not re.search(r"running_|num_batches", key))
    assert sum(parameter.numel() for parameter in model.parameters()) == described["n_params"] - left_out
    with torch.no_grad():
        maps = model.encoder.feature_maps(images)
        found = {f"feature{number}": each for number, each in enumerate(maps)}
        head: Any = model.head
        found |= {"psp_out": head.pooled(maps[-1]), "decode_logits": head(maps)}
        found["logits_input_size"] = model(images)
    assert found.keys() == expected.keys()
    differences = {key: float((found[key] - expected[key]).abs().max()) for key in expected}
    assert all(
        difference < (FEATURES if key.startswith("feature") else LOGITS) for key, difference in differences.items()
    ), differences


# Of each published model: keys and parameters of its file without the auxiliary head, and the checksum of all keys with
# their shapes where the authors' code was run to get them; else the parameters of the READMEs' configurations.
PUBLISHED = {
    "upernet_plainmamba_l1": (439, 34_974_166, "b6cd5e4f3e80d1766872130b27c38904c1eafb52cce267148900b69bd9566bb3"),
    "upernet_plainmamba_l2": (439, 55_874_156 - 923_798, None),
    "upernet_plainmamba_l3": (607, 80_221_654, "ea61eee616a28fd65613db3c45489a7b30d9c5fe0e297fcbbe1593f947035629"),
    "upernet_vmamba_tiny_s1l8": (354, 60_978_774, "8283f0fa33885a42d5c520dcdb6d26541883723b799476593852a0ee1e325e2e"),
    "upernet_vmamba_tiny_s2l5": (300, 62_359_340 - 923_798, None),
    "upernet_vmamba_small_s2l15": (480, 81_801_260 - 923_798, None),
    "upernet_vmamba_base_s2l15": (480, 120_850_582, "9baa34d6ee3f49bb0e46289bc06a125e6ef04c804a036ade0efe4678ca73bae5"),
    "upernet_vanilla_vmamba_tiny": (
        290,
        53_623_158,
        "159ac45fa08d1c741c6cc8099901c74162d197ed4271d847648f54c8de6455e9",
    ),
    "upernet_vanilla_vmamba_small": (524, 76_070_924 - 923_798, None),
    "upernet_vanilla_vmamba_base": (524, 109_765_548 - (9 * 512 * 256 + 512 + 150 * 257), None),
}


def published_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the authors' file, auxiliary head left out."""
    family = FAMILIES.get("plainmamba-upernet" if "plainmamba" in variant else "vmamba-upernet")
    with torch.device("meta"):
        state = family.build(family.variants[variant]).state_dict()
    names = {key: re.sub(r"^encoder\.(backbone\.)?", "backbone.", key) for key in state}
    return {re.sub(r"^head\.", "decode_head.", names[key]): tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_published_model_is_built_and_told_from_its_keys(variant: str) -> None:
    keys, parameters, checksum = PUBLISHED[variant]
    shapes = published_shapes(variant)
    assert len(shapes) == keys
    counted = (math.prod(shape) for key, shape in shapes.items() if not re.search(r"running_|num_batches", key))
    assert sum(counted) == parameters
    if checksum is not None:
        text = "\n".join(f"{key} {','.join(map(str, shape))}" for key, shape in sorted(shapes.items()))
        assert hashlib.sha256(text.encode()).hexdigest() == checksum
    (family,) = (family for _, family in FAMILIES.items() if family.matches(shapes, Hints()))
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    state["auxiliary_head.conv_seg.bias"] = torch.empty(150, device="meta")
    renamed = family.remap(state)
    config = family.configure({key: tuple(value.shape) for key, value in renamed.items()}, Hints())
    assert isinstance(config, DenseConfig)
    with torch.device("meta"):
        built = family.build(config).state_dict()
    assert {key: value.shape for key, value in built.items()} == {key: value.shape for key, value in renamed.items()}
    assert (variant_name(family, config), config.num_classes, config.image_size) == (variant, 150, (512, 512))
    divisor = 32 if "plainmamba" in variant else 1
    assert config.preprocessing == KeepRatio(2048, 512, divisor=divisor, fill="resize")


# MzeroMiko/VMamba's README (segmentation, 949 G) and the PlainMamba paper (174 G) count images of 512 x 2048. Here
# they have 128 x 128: scans and convolutions over a grid grow with its places, of which those have 64 times as many.
@pytest.mark.parametrize(("variant", "giga"), [("upernet_vmamba_tiny_s1l8", 949), ("upernet_plainmamba_l1", 174)])
def test_multiply_adds_are_those_of_the_papers(variant: str, giga: float) -> None:
    family = FAMILIES.get("plainmamba-upernet" if "plainmamba" in variant else "vmamba-upernet")
    config = family.variants[variant]
    count = count_flops(family.build(config.with_images(KeepRatio(512, 128))))
    assert 64 * count.all_directions / 1e9 == pytest.approx(giga, rel=5e-3)
    assert count.encoder + count.head == count.all_directions and sum(count.per_block) < count.encoder
