"""PlainMamba against what the authors' code computes; see tests/golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmprune_cli import load
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common.backbone import Hints
from ssmprune_cli.models.plainmamba.checkpoint import PLAINMAMBA
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.tokens import TokenSequence

GOLDEN = Path(__file__).parent.parent / "golden"
MINI = sorted(path.name for path in GOLDEN.glob("plainmamba_mini_*"))
CONTAINER = GOLDEN / "containers" / "plainmamba_like_ema.pth"

# Measured: 2.1e-5 (output of the last block, values up to 20), 4e-7 for logits. A bias added once moves logits by 0.08,
# dt, B and C in the order of the route by 0.07.
TOLERANCE = 1e-4


class Recorder(nn.Module):
    """A pruner that drops nothing and keeps every output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def wants(self, block: int) -> Wanted:
        return "y"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        self.outputs.append(sequence.hidden)
        return sequence


def config_of(arguments: dict[str, Any]) -> PlainMambaConfig:
    """Our configuration for the arguments of the authors' constructors."""
    backbone = arguments["backbone"]
    return PlainMambaConfig(
        image_size=tuple(arguments["image"]),
        patch_size=backbone["patch_size"],
        embed_dim=backbone["embed_dims"],
        depth=backbone["num_layers"],
        stem_convs=backbone["num_convs_patch_embed"],
        dw_layers=tuple(backbone["layers_with_dwconv"]),
        out_indices=tuple(backbone.get("out_indices", [-1])),
        num_classes=arguments["head"]["num_classes"],
    )


@pytest.mark.parametrize("name", MINI)
def test_mini(name: str) -> None:
    described = json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8"))
    state, expected = (load_file(GOLDEN / name / f"{file}.safetensors") for file in ("state_dict", "io"))
    config = config_of(described["config"])
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert (
        PLAINMAMBA.matches(shapes, Hints())
        and PLAINMAMBA.configure(shapes, Hints(image_size=64, eval_crop_ratio=0.875)) == config
    )
    model = PlainMamba(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == described["n_params"]
    model.load_state_dict(state)
    images = expected.pop("input")
    mixed: list[Tensor] = []
    model.backbone.get_submodule("layers.0.mamba").register_forward_hook(lambda *called: mixed.append(called[2][0]))
    model.pruner = recorder = Recorder()
    with torch.no_grad():
        found = {"logits": model(images), "patch_embed.out": model.backbone.patch_embed(images).flatten(2).mT}
        found |= {f"layers.{block}.out": output for block, output in enumerate(recorder.outputs)}
        found |= {"mamba0.out": mixed[0], "backbone.tokens": model.backbone.ln1(recorder.outputs[-1])}
        found |= {f"backbone.map{number}": each for number, each in enumerate(model.feature_maps(images))}
    assert found.keys() == expected.keys()
    differences = {key: float((found[key] - expected[key]).abs().max()) for key in expected}
    assert all(difference < TOLERANCE for difference in differences.values()), differences


def test_the_minis_cover_what_the_authors_use() -> None:
    assert MINI == ["plainmamba_mini_dw", "plainmamba_mini_multiout"]


def test_a_file_as_mmcv_writes_it() -> None:
    """Weights under `state_dict`, with the buffers of a moving average between them, which are left out."""
    stored = torch.load(CONTAINER, weights_only=True)["state_dict"]
    assert any(key.startswith("ema_") for key in stored)
    model = load(CONTAINER)
    assert model.family == "plainmamba" and model.grid == (7, 7)
    loaded = model.state_dict()
    assert loaded.keys() == {key for key in stored if not key.startswith("ema_")}
    assert all(torch.equal(value, stored[key]) for key, value in loaded.items())
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(1, 3, *model.image_size))).all()
        assert load(CONTAINER, image_size=72)(torch.zeros(1, 3, 72, 72)).shape == (1, 10)
