"""VMamba against what the authors' code computes; see tests/golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ssmprune_cli import load
from ssmprune_cli.models.vmamba.model import VMamba
from ssmprune_cli.tokens import TokenSequence

GOLDEN = Path(__file__).parent.parent / "golden"
MINI = sorted(path.name for path in GOLDEN.glob("vmamba_mini_*"))

# Measured: below 5e-6. Swapping two scan routes moves logits by 0.7.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", MINI)
def test_mini(name: str) -> None:
    config = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    expected = load_file(GOLDEN / name / "io.safetensors")
    model = load(GOLDEN / name / "state_dict.safetensors", image_size=64)
    assert isinstance(model, VMamba)
    shapes = {key: shape for key, (shape, _) in config["state_dict_keys"].items()}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == config["n_params"]
    found: dict[str, Tensor] = {}
    channels_first = config["config"]["norm_layer"] == "ln2d"
    for module_name, module in model.named_modules():

        def note(module: torch.nn.Module, arguments: object, output: Any, name: str = module_name) -> None:
            value: Any = output[0] if isinstance(output, tuple) else output
            if isinstance(value, TokenSequence):  # what a block hands on
                value = value.hidden
            if value.ndim == 3:  # tokens (B, L, d) on a square grid
                value = value.unflatten(1, (int(value.shape[1] ** 0.5), -1))
            found[f"{name}.out"] = value.permute(0, 3, 1, 2) if channels_first else value

        if f"{module_name}.out" in expected:
            module.register_forward_hook(note)
    with torch.no_grad():
        found["logits"] = model(expected["input"])
        for stage, features in enumerate(model.feature_maps(expected["input"])):
            found[f"feature{stage}"] = features
    compared = [key for key in expected if key != "input"]
    last = max(key for key in compared if key.startswith("layers"))
    assert {"logits", "patch_embed.out", "layers.0.blocks.0.op.out", "layers.2.blocks.1.out", last} <= set(compared)
    for key in compared:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=TOLERANCE)


def test_the_minis_cover_every_released_option() -> None:
    assert ["vmamba_mini_" + name for name in ("backbone", "s1", "s1_ln", "vanilla_v0")] == MINI


def test_container_with_four_dimensional_weights() -> None:
    """Same weights as vmamba_mini_s1, its linear ones stored as 1x1 convolutions."""
    model = load(GOLDEN / "containers" / "vmamba_4d_weights.pth", image_size=64)
    expected = load_file(GOLDEN / "vmamba_mini_s1" / "io.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input"]), expected["logits"], rtol=0, atol=TOLERANCE)


def test_any_image_size_without_a_pruner() -> None:
    model = load(GOLDEN / "vmamba_mini_s1" / "state_dict.safetensors", image_size=224)  # other than the input
    expected = load_file(GOLDEN / "vmamba_mini_s1" / "io.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input"]), expected["logits"], rtol=0, atol=TOLERANCE)
