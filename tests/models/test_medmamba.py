"""MedMamba: golden values, what convolutions see of dropped tokens, published shapes, resizing, multiply-adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmprune_cli.checkpoint import load
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.medmamba.checkpoint import MEDMAMBA, VARIANTS
from ssmprune_cli.models.medmamba.model import MedMamba, MedMambaBlock, MedMambaConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import compress
from ssmprune_cli.tokens import TokenSequence, gather_tokens
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure.flops import count_flops
from tests.models.shared import published_shapes, shapes_of, spread_weights

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = {"t": "tiny", "s": "small", "b": "base"}  # the letters of the fixtures
PARAMETERS = {"t": 14_457_222, "s": 18_625_158, "b": 39_864_838}
MINI = MedMambaConfig((64, 64), 16, (1, 1, 2, 1), num_classes=6)
SMALL = MedMambaConfig((32, 32), 16, (2, 1), num_classes=3, d_state=4)


def build(config: MedMambaConfig = SMALL, dtype: torch.dtype = torch.float64) -> MedMamba:
    torch.manual_seed(0)
    model = spread_weights(MedMamba(config), dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").normal_(0, 0.3)
            module.get_buffer("running_var").uniform_(0.5, 1.5)
    return model


def test_golden_values_of_the_authors_code(golden_file: Callable[[str], Path]) -> None:
    expected: dict[str, Tensor] = load_file(GOLDEN / "medmamba_mini" / "io.safetensors")
    model = load(golden_file("medmamba_mini"), image_size=64)
    assert isinstance(model, MedMamba) and model.config == replace(MINI, eval_crop_ratio=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == 279_742
    with torch.no_grad():
        found = {"logits": model(expected["input"])}
        for number, x in enumerate(model.stage_outputs(expected["input"])):
            downsample: Any = model.layers[number].downsample
            found[f"layers.{number}.out"] = x if downsample is None else downsample(x)
    assert found.keys() | {"input"} == expected.keys()
    # Measured: below 3e-6.
    differences = {key: float((value - expected[key]).abs().max()) for key, value in found.items()}
    assert all(difference < 2e-5 for difference in differences.values()), differences


def test_convolutions_see_a_dropped_token_as_it_left() -> None:
    """So their half of the channels is that of the dense model in the block after a drop, and the other one is the
    scan's over the kept tokens."""
    model = build()
    block = model.blocks[1]
    assert isinstance(block, MedMambaBlock)
    x = torch.randn(2, 64, 16, dtype=torch.float64)
    dense = TokenSequence.dense(x, grid=(8, 8), restorable=True)
    kept = torch.stack([torch.randperm(64)[:20].sort().values for _ in range(2)])
    pruned = dense.keep(kept)
    with torch.no_grad():
        (whole, _), (left, _) = (block(each, None, "nothing") for each in (dense, pruned))
        mixed, _ = block.self_attention(block.ln_1(pruned.hidden[..., 8:]), pruned, (8, 8), None, "nothing", None, None)
    changed = left.hidden - pruned.hidden  # channels of the two halves in turn
    expected = gather_tokens(whole.hidden - x, kept)
    torch.testing.assert_close(changed[..., 0::2], expected[..., 0::2], rtol=0, atol=1e-12)
    torch.testing.assert_close(changed[..., 1::2], mixed, rtol=0, atol=1e-12)
    assert not torch.allclose(changed[..., 1::2], expected[..., 1::2], atol=1e-3)


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
    assert "blocks 1 to 3: the scans of each block in one call" in str(session.explain())


@pytest.mark.parametrize("size", SIZES)
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes, variant = published_shapes(f"medmamba_{size}"), f"medmamba_{SIZES[size]}"
    with torch.device("meta"):
        model = MedMamba(VARIANTS[variant])
    assert shapes_of(model) == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]
    for hints in (Hints(), Hints("vmamba.pth"), Hints(variant=variant)):
        assert MEDMAMBA.configure(shapes, hints) == VARIANTS[variant]
        assert [name for name, family in FAMILIES.items() if family.matches(shapes, hints)] == ["medmamba"]
    assert model.preprocessing == Preprocessing(224, 224, "bilinear", (0.5,) * 3, (0.5,) * 3, squeeze=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, r"head\.weight is missing"),
        ({"patch_embed.proj.weight": (96, 48)}, "has the shape"),
        ({"patch_embed.proj.weight": (95, 3, 4, 4)}, "embed_dim must be even"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    changed = published_shapes("medmamba_t") | change
    shapes: Shapes = {key: shape for key, shape in changed.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        MEDMAMBA.configure(shapes, Hints(asked_size=224))


def test_sizes_are_found_or_asked_for() -> None:
    with torch.device("meta"):
        shapes = shapes_of(MedMamba(SMALL))
    with pytest.raises(CheckpointError, match="which image size"):
        MEDMAMBA.configure(shapes, Hints())
    assert MEDMAMBA.configure(shapes, Hints(asked_size=32)) == replace(SMALL, eval_crop_ratio=None)
    assert MEDMAMBA.configure(shapes, Hints(asked_size=32, eval_crop_ratio=1.0)) == SMALL
    assert MedMambaConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL
    with pytest.raises(UsageError, match="do not overlap"):
        MEDMAMBA.configure(shapes, Hints(stride=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 36}, "not divided by 8"),
        ({"embed_dim": 15}, "must be even"),
        ({"depths": (2, 0)}, "every stage needs a block"),
        ({"d_state": 0}, "must be at least 1"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(DataError, match="takes images of shape"):
        build(dtype=torch.float32)(torch.zeros(1, 3, 64, 64))


def test_inspect_of_a_file_of_bare_weights(tmp_path: Path) -> None:
    state = {
        key: torch.zeros(shape, dtype=torch.int64 if key.endswith("tracked") else torch.float16)
        for key, shape in published_shapes("medmamba_t").items()
    }
    torch.save({**state, "head.weight": torch.zeros(4, 768), "head.bias": torch.zeros(4)}, tmp_path / "MedMambaNet.pth")
    found = inspect(tmp_path / "MedMambaNet.pth")
    assert (found.family, found.variant, found.tokens) == ("medmamba", "medmamba_tiny", 56 * 56)
    assert found.parameters == PARAMETERS["t"] - 2 * 769


def test_multiply_adds_against_a_formula() -> None:
    def block(tokens: int, d: int) -> int:
        half, e, n, rank = d // 2, d, 4, 1
        scans = 4 * (e * (rank + 2 * n) + rank * e + 9 * e * n + e)
        mixer = half * 2 * e + e * 9 + scans + e * half
        return tokens * (mixer + 2 * 9 * half * half + half * half)

    count = count_flops(build(dtype=torch.float32))
    assert count.per_block == (block(64, 16), block(64, 16), block(16, 32))
    assert count.all_directions == sum(count.per_block) + 64 * 16 * 48 + 16 * 64 * 32 + 32 * 3
