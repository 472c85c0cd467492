"""Mamba-Reg: golden values, published shapes, where registers sit, resizing, multiply-adds."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmprune_cli.checkpoint import load
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.mamba.mambar import MAMBA_REG, MambaReg, MambaRegConfig, register_positions
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure.flops import count_flops
from tests.models.shared import Recorder, published_shapes, shapes_of, spread_weights

GOLDEN = Path(__file__).parent.parent / "golden"
MINI = MambaRegConfig((64, 64), 8, 8, embed_dim=48, depth=4, num_classes=10, num_cls_tokens=6, cls_reduce=2)
SMALL = replace(MINI, image_size=(24, 24), embed_dim=16, depth=2, num_classes=3, num_cls_tokens=4)
SIZES = ("small", "base", "large")


def build(config: MambaRegConfig = SMALL, dtype: torch.dtype = torch.float64) -> MambaReg:
    torch.manual_seed(0)
    return spread_weights(MambaReg(config), dtype)


# --- what it computes


def test_golden_values_of_the_authors_code() -> None:
    expected: dict[str, Tensor] = load_file(GOLDEN / "mambar_mini" / "io.safetensors")
    model = load(GOLDEN / "mambar_mini" / "state_dict.safetensors", image_size=64, crop=1.0)
    assert isinstance(model, MambaReg) and model.config == MINI
    assert sum(parameter.numel() for parameter in model.parameters()) == 118_042
    assert model.protected == tuple(expected["cls_positions"].tolist())
    model.pruner = recorder = Recorder()
    with torch.no_grad():
        found = {"logits": model(expected["input"]), "pooled_features": model.pool(recorder.sequences[-1])}
    for block, sequence in enumerate(recorder.sequences):
        assert sequence.residual is not None
        found[f"layers.{block}.hidden"], found[f"layers.{block}.residual"] = sequence.hidden, sequence.residual
    assert found.keys() | {"input", "token_idx", "cls_positions"} == expected.keys()
    # Measured: below 5e-6.
    differences = {key: float((value - expected[key]).abs().max()) for key, value in found.items()}
    assert all(difference < 1e-4 for difference in differences.values()), differences


@pytest.mark.parametrize(
    ("image_size", "registers"),
    [((24, 24), 4), ((24, 40), 4), ((40, 16), 3), ((56, 56), 12), ((24, 24), 8), ((16, 24), 12)],
)
def test_registers_are_spread_and_patches_keep_their_order(image_size: tuple[int, int], registers: int) -> None:
    """Token by token: a run of patches, a register, and so on; what does not divide comes last. With more registers
    than patches the runs are empty."""
    config = replace(SMALL, image_size=image_size, num_cls_tokens=registers, cls_reduce=1)
    model = build(config)
    images = torch.randn(2, 3, *image_size, dtype=torch.float64)
    with torch.no_grad():
        sequence = model.embed(images)
        patches = list((model.patch_embed(images) + model.pos_embed).unbind(1))
        tokens = list((model.cls_token + model.pos_embed_cls).expand(2, -1, -1).unbind(1))
    run, row, places = len(patches) // (registers + 1), [], []
    for register in tokens:
        row += [patches.pop(0) for _ in range(run)]
        places.append(len(row))
        row.append(register)
    assert torch.equal(sequence.hidden, torch.stack(row + patches, dim=1))
    assert model.protected == sequence.protected == tuple(places)
    assert model.num_tokens == sequence.length == math.prod(model.grid) + registers


@pytest.mark.parametrize("change", [{}, {"cls_reduce": 1}, {"image_size": (24, 40), "norm": "layer"}])
def test_the_head_sees_all_registers_in_order(change: dict[str, Any]) -> None:
    model = build(replace(SMALL, **change))
    images = torch.randn(2, 3, *model.image_size, dtype=torch.float64)
    with torch.no_grad():
        last = model.features(images)
        assert last.residual is not None
        stream = (last.residual + last.hidden)[:, list(model.protected)]  # (B, k, d)
        rows = [model.norm_f(register) for register in stream.unbind(1)]
        if model.config.cls_reduce > 1:
            rows = [row @ model.neck.weight.T for row in rows]
        features = torch.cat(rows, dim=1)
        if model.config.cls_reduce > 1:
            features = model.norm_neck(features)
        expected = features @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-11)


# --- published shapes


@pytest.mark.parametrize("size", SIZES)
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes, variant = published_shapes(f"mambar_{size}"), f"mambar_{size}"
    with torch.device("meta"):
        assert shapes_of(MambaReg(MAMBA_REG.variants[variant])) == shapes
    for hints in (Hints(), Hints("vim.pth"), Hints("x", f"{variant}_patch16_224")):
        assert [name for name, family in FAMILIES.items() if family.matches(shapes, hints)] == ["mambar"]
        assert MAMBA_REG.configure(shapes, hints) == MAMBA_REG.variants[variant]


def test_every_variant_has_published_shapes() -> None:
    assert {f"mambar_{size}" for size in SIZES} == set(MAMBA_REG.variants)
    assert {path.stem for path in (GOLDEN / "shapes").glob("mambar_*.json")} == set(MAMBA_REG.variants)


@pytest.mark.parametrize(
    "change",
    [{}, {"cls_reduce": 1}, {"norm": "layer"}, {"d_inner": 24, "dt_rank": 3, "d_conv": 3}, {"num_cls_tokens": 2}],
)
def test_options_are_found_from_shapes(change: dict[str, Any]) -> None:
    config = replace(SMALL, **change)
    assert MAMBA_REG.configure(shapes_of(MambaReg(config)), Hints(image_size=24, eval_crop_ratio=1.0)) == config
    assert MambaRegConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize("side", [128, 384, 432])  # 432: 27 x 27 patches, as a "+" Vim of 224
def test_other_image_sizes_are_asked_for(side: int) -> None:
    config = replace(MAMBA_REG.variants["mambar_small"], image_size=(side, side))
    with torch.device("meta"):
        shapes = shapes_of(MambaReg(config))
    with pytest.raises(CheckpointError, match="neither the weights nor the file say"):
        MAMBA_REG.configure(shapes, Hints())
    assert MAMBA_REG.configure(shapes, Hints(asked_size=side)) == replace(config, eval_crop_ratio=None)


def test_a_variant_is_taken_as_published_but_for_its_classes() -> None:
    shapes: Shapes = {**published_shapes("mambar_base"), "head.weight": (7, 2304)}
    found = MAMBA_REG.configure(shapes, Hints(variant="mambar_base"))
    assert found == replace(MAMBA_REG.variants["mambar_base"], num_classes=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, r"head\.weight is missing"),
        ({"neck.weight": (100, 384)}, "cls_reduce 3 must divide"),
        ({"neck.weight": (0, 384)}, "cls_reduce 384 must divide"),
        ({"pos_embed": (1, 197, 384)}, "197 patch positions"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    shapes = {**published_shapes("mambar_small"), "cls_token": (1, 10, 384), "pos_embed_cls": (1, 10, 384), **change}
    with pytest.raises(CheckpointError, match=message):
        MAMBA_REG.configure({key: shape for key, shape in shapes.items() if shape is not None}, Hints())


@pytest.mark.parametrize("change", [{"num_cls_tokens": 0}, {"cls_reduce": 0}, {"num_cls_tokens": 5}, {"cls_reduce": 3}])
def test_impossible_configurations_are_errors(change: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="cls_reduce"):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_preprocessing_is_the_published_one() -> None:
    with torch.device("meta"):
        assert MambaReg(MambaRegConfig(depth=1)).preprocessing == Preprocessing(resize=224, crop=224)


# --- files, resizing and multiply-adds


def test_inspect_of_a_published_container(tmp_path: Path) -> None:
    state = {
        f"module.{key}": torch.zeros(shape, dtype=torch.float16)
        for key, shape in published_shapes("mambar_small").items()
    }
    args = argparse.Namespace(model="mambar_small_patch16_224", input_size=224, eval_crop_ratio=1.0)
    torch.save({"model": state, "optimizer": {}, "epoch": 19, "args": args}, tmp_path / "best_checkpoint.pth")
    found = inspect(tmp_path / "best_checkpoint.pth")
    assert (found.family, found.variant, found.parameters) == ("mambar", "mambar_small", 27_801_064)
    assert (found.tokens, found.protected) == (208, tuple(range(15, 192, 16)))
    with pytest.raises(CheckpointError, match="\nIt looks like Mamba-Reg"):
        load(tmp_path / "best_checkpoint.pth", family="vim")


def test_resizing_moves_registers_but_keeps_their_embedding(tmp_path: Path) -> None:
    model = build(dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    resized = load(tmp_path / "m.pth", image_size=40, stride=8)
    assert resized.config == replace(SMALL, image_size=(40, 40), eval_crop_ratio=None)
    assert resized.protected == register_positions(25, 4) != model.protected
    old, new = model.state_dict(), resized.state_dict()
    assert all(torch.equal(value, old[key]) for key, value in new.items() if key != "pos_embed")
    grid = old["pos_embed"].unflatten(1, (3, 3)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, (5, 5), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(new["pos_embed"], expected, rtol=0, atol=1e-6)
    assert resized(torch.zeros(1, 3, 40, 40)).shape == (1, 3)


def test_multiply_adds_against_a_formula() -> None:
    model, d, e, n = build(SMALL, torch.float32), 16, 32, 16
    branch = e * 4 + e * (1 + 2 * n) + e + 9 * e * n + e  # convolution, x_proj, dt_proj, scan with D
    block = 2 * d * e + 2 * branch + e * d
    head = 4 * d * (d // 2) + (4 * d // 2) * 3  # neck and head
    assert count_flops(model).all_directions == 9 * d * 3 * 64 + 13 * 2 * block + head


def test_mamba_reg_is_registered() -> None:
    assert FAMILIES.get("mambar") is MAMBA_REG
