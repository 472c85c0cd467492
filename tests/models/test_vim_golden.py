"""Vim against what the authors' code computes; see tests/golden/README.md."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from tests.models.shared import Recorder

GOLDEN = Path(__file__).parent.parent / "golden"
MINI = sorted(path.name for path in GOLDEN.glob("vim_mini_*"))

# Measured: 1.2e-5 (vim_tiny_real, residual of its last block, values up to 40), below 7e-6 elsewhere. Dropping the
# division by two moves logits by 0.7, a class token at the wrong place by 2.5.
TOLERANCE = 1e-4


def noise(name: str, count: int) -> NDArray[np.float64]:
    """`count` numbers in [-1, 1) from `name`: splitmix64, seeded with the checksums of the name read both ways."""
    text = name.encode()
    seed = np.uint64(zlib.crc32(text) + (zlib.crc32(text[::-1]) << 32))
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed  # wraps, as it should
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    top_24_bits: NDArray[np.float64] = (state >> np.uint64(40)).astype(np.float64)
    return top_24_bits * 2.0**-23 - 1.0


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that the golden values were computed with."""
    values = noise(name, math.prod(shape)).reshape(shape)
    leaf = name.rpartition(".")[2]
    if leaf in ("A_log", "A_b_log"):
        values = np.log(np.arange(1.0, shape[-1] + 1)) + 0.5 * values
    elif leaf in ("D", "D_b"):
        values = 1.0 + 0.8 * values
    elif "dt_proj" in name:
        values = -1.75 + 1.25 * values if leaf == "bias" else 0.8 * 3.0**0.5 * values / np.sqrt(shape[-1])
    elif leaf == "weight" and len(shape) == 1:
        values = 1.0 + 0.5 * values
    elif leaf == "weight":
        values = 3.0**0.5 * values / np.sqrt(math.prod(shape[1:]))
    else:
        values = (0.3 if leaf == "bias" else 0.8) * values
    return torch.from_numpy(values.astype(np.float32))


def config_of(arguments: dict[str, Any]) -> VimConfig:
    """Our configuration for the arguments of the authors' constructor."""
    token = "middle" if arguments["use_middle_cls_token"] else "head"
    return VimConfig(
        image_size=(arguments["img_size"], arguments["img_size"]),
        patch_size=arguments["patch_size"],
        stride=arguments["stride"],
        embed_dim=arguments["embed_dim"],
        depth=arguments["depth"],
        num_classes=arguments["num_classes"],
        class_token=token if arguments["if_cls_token"] else "none",  # type: ignore[arg-type]
        divide_out=arguments["if_divide_out"],
        layer_scale=arguments.get("init_layer_scale"),
        rope=arguments["if_rope"],
        rope_residual=arguments["if_rope_residual"],
    )


def shapes_of(config: dict[str, Any]) -> dict[str, list[int]]:
    return {key: shape for key, (shape, _) in config["state_dict_keys"].items()}


def check(name: str, state: dict[str, Tensor], images: Tensor, expected: dict[str, Tensor]) -> None:
    config = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    model = Vim(config_of(config["config"])).eval()
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes_of(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config["n_params"]
    model.load_state_dict(state)
    model.pruner = recorder = Recorder()
    with torch.no_grad():
        found = {"logits": model(images), "pooled_features": model.pool(recorder.sequences[-1])}
    for block, sequence in enumerate(recorder.sequences):
        assert sequence.residual is not None
        found[f"layers.{block}.hidden"], found[f"layers.{block}.residual"] = sequence.hidden, sequence.residual
    compared = [key for key in expected if key in found]
    assert {"logits", "pooled_features", "layers.0.hidden", f"layers.{len(model.layers) - 1}.residual"} <= set(compared)
    differences = {key: float((found[key] - expected[key]).abs().max()) for key in compared}
    assert all(difference < TOLERANCE for difference in differences.values()), differences


@pytest.mark.parametrize("name", MINI)
def test_mini(name: str) -> None:
    expected = load_file(GOLDEN / name / "io.safetensors")
    check(name, load_file(GOLDEN / name / "state_dict.safetensors"), expected["input"], expected)


def test_vim_tiny() -> None:
    config = json.loads((GOLDEN / "vim_tiny_real" / "config.json").read_text(encoding="utf-8"))
    state = {key: made_up(key, tuple(shape)) for key, shape in shapes_of(config).items()}
    images = torch.from_numpy((1.7 * noise("input/vim_tiny_real", 3 * 224 * 224)).astype(np.float32)).view(
        1, 3, 224, 224
    )
    check("vim_tiny_real", state, images, load_file(GOLDEN / "vim_tiny_real" / "io.safetensors"))


def test_the_minis_cover_every_released_option() -> None:
    assert [
        "vim_mini_" + name for name in ("headcls", "layerscale_nodiv", "midcls", "nocls_mean", "rope_old73p1")
    ] == MINI


def test_rotary_tables_are_the_authors() -> None:
    """The other tests load the tables from the file; a resized model computes them itself."""
    state = load_file(GOLDEN / "vim_mini_rope_old73p1" / "state_dict.safetensors")
    rope = Vim(VimConfig((64, 64), 8, 8, embed_dim=48, depth=1, num_classes=10, class_token="head", rope=True)).rope
    assert rope is not None
    # Angles go up to 13 radians, where float32 has steps of 1e-6.
    torch.testing.assert_close(rope.freqs_cos, state["rope.freqs_cos"], rtol=0, atol=2e-6)
    torch.testing.assert_close(rope.freqs_sin, state["rope.freqs_sin"], rtol=0, atol=2e-6)
