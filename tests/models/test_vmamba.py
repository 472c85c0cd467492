"""VMamba apart from golden values: layers against plain definitions, configurations, checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli import load
from ssmprune_cli.checkpoint import Checkpoint, resolve, save, variant_name
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.models.common.backbone import Hints
from ssmprune_cli.models.vmamba.checkpoint import VMAMBA
from ssmprune_cli.models.vmamba.layers import DownsampleV1
from ssmprune_cli.models.vmamba.mixer import VMambaMixer
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.measure.flops import count_flops

SHAPES = Path(__file__).parent.parent / "golden" / "shapes"
PUBLISHED = sorted(path.stem for path in SHAPES.glob("*vmamba_*.json") if not path.stem.startswith("efficient"))
V2 = VMambaConfig(image_size=(32, 32), embed_dim=16, depths=(1, 2, 1), num_classes=3)
V0 = replace(V2, patch_embed="v1", downsample="v1", d_state=3, ssm_ratio=2.0, gated=True, conv_bias=True, mlp_ratio=0.0)
BACKBONE = replace(V2, num_classes=0, out_stages=(0, 2))
KINDS = {"v2": V2, "v0": V0, "backbone": BACKBONE}


def build(config: VMambaConfig, dtype: torch.dtype = torch.float32) -> VMamba:
    torch.manual_seed(0)
    model = VMamba(config)
    for parameter in model.parameters():  # zero biases would hide mistakes
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return model.to(dtype).eval()


def images(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


# --- the mixer


def direct_scan(mixer: VMambaMixer, image: Tensor, direction: int) -> Tensor:
    """One scan of `image` (E, rows, columns), token by token, on flipped and transposed copies as the authors do it."""
    _, rows, columns = image.shape
    by_column, backwards = direction % 2, direction >= 2
    sequence = (image.transpose(1, 2) if by_column else image).flatten(1).t()  # (L, E)
    if backwards:
        sequence = sequence.flip(0)
    rank, channels = mixer.dt_projs_weight.shape[2], mixer.d_inner
    state = mixer.A_logs.shape[1]
    own = slice(direction * channels, (direction + 1) * channels)
    h, outputs = torch.zeros(channels, state, dtype=image.dtype), []
    for u in sequence.unbind():
        rank_values, b, c = (mixer.x_proj_weight[direction] @ u).split([rank, state, state])
        raw = mixer.dt_projs_weight[direction] @ rank_values + mixer.dt_projs_bias[direction]
        step = functional.softplus(raw)[:, None]
        h = torch.exp(-step * mixer.A_logs[own].exp()) * h + step * b * u[:, None]
        outputs.append(h @ c + mixer.Ds[own] * u)
    y = torch.stack(outputs)
    y = y.flip(0) if backwards else y
    image = y.t().reshape(channels, *((columns, rows) if by_column else (rows, columns)))
    return image.transpose(1, 2) if by_column else image


@pytest.mark.parametrize("grid", [(3, 5), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("kind", ["v2", "v0"])
def test_mixer_is_four_plain_scans(kind: str, grid: tuple[int, int]) -> None:
    mixer = build(KINDS[kind], torch.float64).mixers[0]
    assert isinstance(mixer, VMambaMixer)
    for parameter in (mixer.A_logs, mixer.x_proj_weight, mixer.dt_projs_weight):
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, grid[0] * grid[1], 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, statistics = mixer(x, TokenSequence.dense(x), grid, None, "delta")
        inner, *gate = mixer.in_proj(x)[0].split(mixer.d_inner, dim=-1)
        image = inner.t().unflatten(1, grid)  # (E, rows, columns)
        image = functional.silu(
            functional.conv2d(image, mixer.conv2d.weight, mixer.conv2d.bias, 1, 1, 1, mixer.d_inner)
        )
        outputs = [direct_scan(mixer, image, direction) for direction in range(4)]
        mixed = mixer.out_norm(torch.stack(outputs).sum(dim=0).flatten(1).t())
        mixed = mixed * functional.silu(gate[0]) if gate else mixed
        torch.testing.assert_close(found[0], mixer.out_proj(mixed), rtol=0, atol=1e-12)
        for direction, output in enumerate(outputs):
            torch.testing.assert_close(statistics.y[direction][0], output.flatten(1).t(), rtol=0, atol=1e-12)
        u = image.flatten(1).t()
        rank = mixer.dt_projs_weight.shape[2]
        for direction in range(4):
            raw = u @ mixer.x_proj_weight[direction, :rank].t() @ mixer.dt_projs_weight[direction].t()
            expected = functional.softplus(raw + mixer.dt_projs_bias[direction])
            torch.testing.assert_close(statistics.delta[direction][0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["v2", "v0"])
def test_null_delta_is_the_step_of_a_zero_token_among_zeros(kind: str) -> None:
    mixer = build(KINDS[kind], torch.float64).mixers[0]
    assert isinstance(mixer, VMambaMixer)
    zeros = torch.zeros(1, 9, 16, dtype=torch.float64)
    _, statistics = mixer(zeros, TokenSequence.dense(zeros), (3, 3), None, "delta")
    expected = torch.stack([delta[0, 4] for delta in statistics.delta])
    torch.testing.assert_close(mixer.null_delta(), expected, rtol=0, atol=1e-12)


# --- grids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (45, 27), (37, 64), (20, 20)])
def test_grids_of_images_that_are_not_square_or_do_not_divide(kind: str, size: tuple[int, int]) -> None:
    model = build(replace(KINDS[kind], image_size=size))
    with torch.no_grad():
        outputs = list(model.stage_outputs(images(*size)))
        assert model(images(*size)).shape == (2, 64 if kind == "backbone" else 3)
    assert [tuple(output.shape[1:3]) for output in outputs] == [stage.grid for stage in model.stages]
    assert [stage.num_tokens for stage in model.stages] == [output[0, ..., 0].numel() for output in outputs]
    assert [(stage.start, stage.stop) for stage in model.stages] == [(0, 1), (1, 3), (3, 4)]
    assert (model.grid, model.num_tokens) == (model.stages[0].grid, model.stages[0].num_tokens)


def test_patch_merging_pads_odd_grids_with_zeros() -> None:
    torch.manual_seed(0)
    merge = DownsampleV1(2, 4).double()
    x = torch.randn(1, 3, 5, 2, dtype=torch.float64)
    found = merge(x)
    assert found.shape == (1, 2, 3, 4)
    padded = torch.zeros(1, 4, 6, 2, dtype=torch.float64)
    padded[:, :3, :5] = x
    # Neighbours below come before neighbours to the right.
    square = torch.cat([padded[0, 2, 4], padded[0, 3, 4], padded[0, 2, 5], padded[0, 3, 5]])
    torch.testing.assert_close(found[0, 1, 2], merge.reduction(merge.norm(square)), rtol=0, atol=1e-12)


def test_images_that_cannot_be_taken() -> None:
    model = build(V2)
    for bad in (torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(2, 3, 32, 3)):
        with pytest.raises(DataError, match="takes images"):
            model(bad)


# --- configurations


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (3, 32)}, "no room for a patch"),
        ({"embed_dim": 15}, "must be even"),
        ({"depths": (2, 0)}, "every stage needs a block"),
        ({"depths": ()}, "every stage needs a block"),
        ({"d_state": 0}, "must be positive"),
        ({"out_stages": (3,)}, "stages from 0 to 2"),
        ({"out_stages": (1, 0)}, "stages from 0 to 2"),
    ],
)
def test_configurations_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(V2, **change)


def test_a_model_needs_an_output() -> None:
    with pytest.raises(UsageError, match="needs out_stages"):
        VMamba(replace(V2, num_classes=0))


def test_preprocessing_is_the_authors() -> None:
    found = VMamba(replace(V2, image_size=(224, 224))).preprocessing
    assert found == Preprocessing(256, 224, "bicubic")
    with pytest.raises(UsageError, match="no preprocessing"):
        _ = VMamba(replace(V2, image_size=(32, 48))).preprocessing


# --- checkpoints


def read_shapes(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


def test_every_variant_has_published_shapes() -> None:
    assert set(VMAMBA.variants) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_build_and_are_recognised(name: str) -> None:
    shapes = read_shapes(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    resolved = resolve(Checkpoint(Path("x.pth"), "torch", (), None, state, Hints()))
    assert (resolved.family, resolved.config) == (VMAMBA, VMAMBA.variants[name])
    assert variant_name(VMAMBA, replace(resolved.config, image_size=(64, 96), num_classes=7)) == name
    assert variant_name(VMAMBA, replace(resolved.config, num_classes=0, out_stages=(1, 3))) == name
    with torch.device("meta"):
        model = VMAMBA.build(resolved.config)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_is_found_from_its_shapes(kind: str) -> None:
    config = KINDS[kind]
    shapes = {key: tuple(value.shape) for key, value in VMamba(config).state_dict().items()}
    assert VMAMBA.matches(shapes, Hints())
    assert VMAMBA.configure(shapes, Hints(image_size=32, eval_crop_ratio=0.875)) == config
    assert VMAMBA.configure(shapes, Hints(asked_size=48)) == replace(config, image_size=(48, 48), eval_crop_ratio=None)
    with pytest.raises(CheckpointError, match="neither the weights nor the file say which image size"):
        VMAMBA.configure(shapes, Hints())


@pytest.mark.parametrize("container", ["model", "model_ema", "state_dict"])
def test_old_names_and_four_dimensions(tmp_path: Path, container: str) -> None:
    model = build(V0)
    old = {}
    for key, value in model.state_dict().items():
        name = key.replace("patch_embed.0", "patch_embed.proj").replace("patch_embed.2", "patch_embed.norm")
        name = re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", name).replace(".op.", ".self_attention.")
        name = name.removeprefix("classifier.")
        linear = re.search(r"(in_proj|out_proj|reduction)\.weight$", name)
        old[f"module.{name}"] = value[..., None, None] if linear else value
    torch.save({container: old, "epoch": 1}, tmp_path / "vssm.pth")
    loaded = load(tmp_path / "vssm.pth", image_size=32, weights="model_ema" if container == "model_ema" else "model")
    assert loaded.config == replace(V0, eval_crop_ratio=None)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    twice = {**old, **{key: value for key, value in model.state_dict().items() if key == "classifier.head.bias"}}
    torch.save(twice, tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match=r"old and new names: head\.bias"):
        load(tmp_path / "twice.pth")


def test_a_detectors_backbone(tmp_path: Path) -> None:
    model = build(BACKBONE)
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": {}}, tmp_path / "detector.pth")
    loaded = load(tmp_path / "detector.pth", image_size=32)
    assert isinstance(loaded, VMamba) and loaded.config == replace(BACKBONE, eval_crop_ratio=None)
    with torch.no_grad():
        first, last = loaded.feature_maps(images(32, 48))
        assert (first.shape, last.shape) == ((2, 16, 8, 12), (2, 64, 2, 3))
        torch.testing.assert_close(loaded(images(32, 48)), last.mean(dim=(2, 3)), rtol=0, atol=0)
    torch.save({"state_dict": {**state, "neck.convs.0.weight": torch.zeros(1)}}, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"no known model family"):  # never in part
        load(tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("layers.1.blocks.0.op.Ds", r"layers\.1\.blocks\.0\.op\.Ds is missing"),
        ("layers.0.downsample.1.weight", r"layers\.0\.downsample\.1\.weight is missing"),
        ("classifier.head.weight", r"classifier\.head\.weight is missing"),
        ("layers.0.blocks.0.op.conv2d.weight", r"conv2d\.weight is missing"),
    ],
)
def test_a_lost_weight_is_named(tmp_path: Path, lost: str, message: str) -> None:
    state = {key: value for key, value in build(V2).state_dict().items() if key != lost}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"{message}[^\n]*\n.*Known families: .*vmamba"):
        load(tmp_path / "x.pth", image_size=32)


def test_variant_and_image_size_on_request(tmp_path: Path) -> None:
    torch.save(build(V2).state_dict(), tmp_path / "x.pth")
    assert load(tmp_path / "x.pth", image_size=48).image_size == (48, 48)
    with pytest.raises(CheckpointError, match="do not fit vmamba_tiny_s1l8"):
        load(tmp_path / "x.pth", variant="vmamba_tiny_s1l8")


def test_an_artefact_comes_back(tmp_path: Path) -> None:
    for name, config in KINDS.items():
        save(tmp_path / name, build(config))
        loaded = load(tmp_path / name)
        assert loaded.config == config
        with torch.no_grad():
            assert torch.equal(loaded(images(32, 32)), build(config)(images(32, 32)))


# --- multiply-adds

# Billions as published, all directions.
GIGA = {
    "vmamba_tiny_s1l8": 4.9,
    "vmamba_tiny_s2l5": 4.9,
    "vmamba_small_s2l15": 8.7,
    "vmamba_small_s1l20": 8.6,
    "vmamba_base_s2l15": 15.4,
    "vmamba_base_s1l20": 15.2,
    "vanilla_vmamba_tiny": 5.6,
    "vanilla_vmamba_small": 11.2,
    "vanilla_vmamba_base": 18.0,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name != "vmamba_tiny_s1l8" else name for name in GIGA]
)
def test_published_multiply_adds(name: str) -> None:
    with torch.device("meta"):
        model = VMAMBA.build(VMAMBA.variants[name])
    count = count_flops(model.to_empty(device="cpu"))  # values do not matter
    # The authors count layer norms too, as five operations a value: up to 1.6 %.
    assert count.all_directions / 1e9 == pytest.approx(GIGA[name], rel=0.02)


def test_one_direction_counts_scan_and_projections_once() -> None:
    model = VMamba(V0)
    saved = 0.0
    for stage, depth in zip(model.stages, V0.depths, strict=True):
        d = 16 << model.stages.index(stage)
        e, n, r = 2 * d, V0.d_state, d // 16
        one = e * (r + 2 * n) + r * e + 9 * e * n + e  # x_proj, dt_proj, scan with D
        saved += 3 * depth * stage.num_tokens * one
    count = count_flops(model)
    assert count.all_directions - count.one_direction == saved
    assert len(count.per_block) == 4
