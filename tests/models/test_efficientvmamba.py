"""EfficientVMamba: golden values, scans over a part of the grid step by step, published shapes, multiply-adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.checkpoint import load
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import ScanAlignment
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.efficientvmamba.checkpoint import EFFICIENTVMAMBA, VARIANTS
from ssmprune_cli.models.efficientvmamba.mixer import AtrousMixer
from ssmprune_cli.models.efficientvmamba.model import EfficientVMamba, EfficientVMambaConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import compress
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure.flops import count_flops
from tests.models.shared import published_shapes, shapes_of, spread_weights

GOLDEN = Path(__file__).parent.parent / "golden"
PARAMETERS = {"tiny": 6_493_660, "small": 11_273_688, "base": 33_717_136}
MINI = EfficientVMambaConfig((64, 64), 16, (1, 1, 2, 1), num_classes=10)
SMALL = EfficientVMambaConfig((32, 32), 16, (2, 1, 1, 1), num_classes=3, d_state=4)


def build(config: EfficientVMambaConfig = SMALL, dtype: torch.dtype = torch.float64) -> EfficientVMamba:
    torch.manual_seed(0)
    return spread_weights(EfficientVMamba(config), dtype)


def test_golden_values_of_the_authors_code(golden_file: Callable[[str], Path]) -> None:
    expected: dict[str, Tensor] = load_file(GOLDEN / "efficientvmamba_mini" / "io.safetensors")
    model = load(golden_file("efficientvmamba_mini"), image_size=64, crop=0.875)
    assert isinstance(model, EfficientVMamba) and model.config == MINI
    assert sum(parameter.numel() for parameter in model.parameters()) == 387_936
    found: dict[str, Tensor] = {}
    layers: list[Any] = list(model.layers)
    block, outputs = layers[0].blocks[0], list[Tensor]()
    block.op.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0].hidden))
    for number in (2, 3):
        layers[number].register_forward_hook(lambda _module, _inputs, output: outputs.append(output.hidden))
    with torch.no_grad():
        found["logits"] = model(expected["input"])
        op, first, third, last = (values.unflatten(1, (int(values.shape[1] ** 0.5),) * 2) for values in outputs)
        found |= {"layers.0.blocks.0.op.out": op, "layers.0.blocks.0.out": first, "layers.3.out": last}
        found["layers.2.out"] = layers[2].downsample(third)
        for number, x in enumerate(model.stage_outputs(expected["input"])):
            found[f"layers.{number}.out"] = layers[number].downsample(x)
    assert found.keys() | {"input"} == expected.keys()
    # Measured: below 3e-6.
    differences = {key: float((value - expected[key]).abs().max()) for key, value in found.items()}
    assert all(difference < 2e-5 for difference in differences.values()), differences


def scans_by_hand(mixer: AtrousMixer, u: Tensor, kept: list[int], grid: tuple[int, int], lost: Tensor | None) -> Tensor:
    """One image: `u` (L, E) of the tokens at `kept`; every place of a scan's part of the grid in turn."""
    result = torch.zeros_like(u)
    rank, state_size = mixer.dt_projs_weight.shape[2], mixer.A_logs.shape[1]
    rates, skips = -mixer.A_logs.exp().unflatten(0, (4, -1)), mixer.Ds.unflatten(0, (4, -1))
    for number in range(4):
        rows, columns = range(number % 2, grid[0], 2), range(number // 2, grid[1], 2)
        places = [(row, column) for row in rows for column in columns]
        if number % 2:
            places = [(row, column) for column in columns for row in rows]
        state, started = torch.zeros(u.shape[1], state_size, dtype=u.dtype), False
        for row, column in places:
            position = row * grid[1] + column
            if position not in kept:
                if lost is not None and started:
                    state = torch.exp(rates[number] * lost[number][:, None]) * state
                continue
            here, started = u[kept.index(position)], True
            ranks, b, c = (mixer.x_proj_weight[number] @ here).split([rank, state_size, state_size])
            delta = functional.softplus(mixer.dt_projs_weight[number] @ ranks + mixer.dt_projs_bias[number])
            state = torch.exp(rates[number] * delta[:, None]) * state + (delta * here)[:, None] * b
            result[kept.index(position)] = state @ c + skips[number] * here
    return result


@pytest.mark.parametrize("grid", [(4, 4), (4, 6), (3, 5)])  # merging leaves grids of odd sides
@pytest.mark.parametrize("alignment", ["none", "null"])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
def test_scans_step_by_step(grid: tuple[int, int], alignment: str, share: float) -> None:
    mixer = build().mixers[0]
    assert isinstance(mixer, AtrousMixer)
    count = grid[0] * grid[1]
    x = torch.randn(2, count, 16, dtype=torch.float64)
    kept = torch.stack([torch.randperm(count)[: max(int(share * count), 1)].sort().values for _ in range(2)])
    sequence = TokenSequence.dense(x, grid=grid).keep(kept) if share < 1 else TokenSequence.dense(x, grid=grid)
    lost = mixer.null_delta() if alignment == "null" else None
    seen: list[Tensor] = []
    handle = mixer.out_norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad():
        mixer(sequence.hidden, sequence, grid, None if lost is None else ScanAlignment(lost), "nothing")
        projected = mixer.in_proj(sequence.hidden)[..., : mixer.d_inner]
        u = mixer._convolve(projected, None, sequence, grid)
        expected = torch.stack(
            [scans_by_hand(mixer, u[n], sequence.positions[n].tolist(), grid, lost) for n in range(2)]
        )
    handle.remove()
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-11)


def test_a_keep_ratio_of_one_is_the_dense_model_and_a_session_computes_both() -> None:
    model = build(dtype=torch.float32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        dense = model(images)
        compress(model, 1.0, points=[1])
        assert torch.equal(model(images), dense)
        compress(model, 0.5, points=[1])
        pruned = model(images)
        assert not torch.allclose(pruned, dense, atol=1e-3)
        session = prepare(model)
        torch.testing.assert_close(session(images), pruned, rtol=1e-4, atol=1e-4)
    assert "blocks 1 to 3: op by op (each of its scans visits a part of the grid)" in str(session.explain())


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes, variant = published_shapes(f"efficientvmamba_{size}"), f"efficientvmamba_{size}"
    with torch.device("meta"):
        model = EfficientVMamba(VARIANTS[variant])
    assert shapes_of(model) == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]
    for hints in (Hints(), Hints("vmamba.pth"), Hints(variant=variant)):
        assert EFFICIENTVMAMBA.configure(shapes, hints) == VARIANTS[variant]
        assert [name for name, family in FAMILIES.items() if family.matches(shapes, hints)] == ["efficientvmamba"]
    assert model.preprocessing == Preprocessing(256, 224)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.head.weight": None}, r"classifier\.head\.weight is missing"),
        ({"patch_embed.0.weight": (48, 48)}, "has the shape"),
        ({"patch_embed.0.weight": (4, 3, 4, 4)}, "at least 8"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    changed = published_shapes("efficientvmamba_tiny") | change
    shapes: Shapes = {key: shape for key, shape in changed.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        EFFICIENTVMAMBA.configure(shapes, Hints(asked_size=224))


def test_sizes_are_found_or_asked_for() -> None:
    config = replace(SMALL, ssm_ratio=1.5)
    with torch.device("meta"):
        shapes = shapes_of(EfficientVMamba(config))
    with pytest.raises(CheckpointError, match="which image size"):
        EFFICIENTVMAMBA.configure(shapes, Hints())
    assert EFFICIENTVMAMBA.configure(shapes, Hints(asked_size=32)) == replace(config, eval_crop_ratio=None)
    assert EfficientVMambaConfig(**json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(UsageError, match="do not overlap"):
        EFFICIENTVMAMBA.configure(shapes, Hints(stride=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 40}, "not divided by 16"),
        ({"embed_dim": 7}, "at least 8"),
        ({"depths": (2, 1, 1)}, "each of four stages"),
        ({"d_state": 0}, "must be positive"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match="takes images of shape"):
        build(dtype=torch.float32)(torch.zeros(1, 3, 64, 64))


def test_inspect_of_a_file_with_old_names(tmp_path: Path) -> None:
    renamed = {"patch_embed.0": "patch_embed.proj", "patch_embed.2": "patch_embed.norm", ".op.": ".self_attention."}
    state = {}
    for key, shape in published_shapes("efficientvmamba_tiny").items():
        for new, old in renamed.items():
            key = key.replace(new, old)
        state[key] = torch.zeros(shape, dtype=torch.int64 if key.endswith("tracked") else torch.float16)
    torch.save({"model": state}, tmp_path / "tiny.pth")
    found = inspect(tmp_path / "tiny.pth")
    assert (found.family, found.variant, found.parameters) == ("efficientvmamba", "efficientvmamba_tiny", 6_493_660)
    assert found.tokens == 56 * 56


def test_multiply_adds_against_a_formula() -> None:
    def block(tokens: int, d: int) -> int:
        e, n, rank = 2 * d, 4, -(-d // 16)
        scan = e * (rank + 2 * n) + rank * e + 9 * e * n + e  # for a token once: in one of the scans
        return tokens * (d * 2 * e + 9 * e + scan + e * d + 9 * d + d * d) + 2 * 2 * d * (d // 8)

    def convolved(tokens: int, d: int) -> int:
        inner = 4 * d
        return tokens * (2 * d * inner + 9 * inner) + 2 * inner * (inner // 8)

    count = count_flops(build(dtype=torch.float32))
    assert count.per_block == (block(64, 16), block(64, 16), block(16, 32))
    merging = 16 * 64 * 32 + 4 * 128 * 64 + 1 * 256 * 128
    rest = 64 * 16 * 48 + merging + convolved(4, 64) + convolved(1, 128) + 128 * 3
    assert count.all_directions == sum(count.per_block) + rest
