"""MambaVision: golden values, scan and attention on kept tokens, published shapes, what is asked for and refused."""

from __future__ import annotations

import argparse
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
from ssmprune_cli.models import FAMILIES, cut_short, cuts, resize, sides
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.mambavision.checkpoint import MAMBAVISION, VARIANTS
from ssmprune_cli.models.mambavision.mixers import AttentionMixer, CentredMixer
from ssmprune_cli.models.mambavision.model import MambaVision, MambaVisionConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import REDUCTIONS, compress
from ssmprune_cli.tokens import TokenSequence, gather_tokens
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure.flops import count_flops
from tests.models.shared import shapes_of, spread_weights

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = {"T": "tiny", "T2": "tiny2", "S": "small", "B": "base", "L": "large", "L2": "large2"}
RESIZED = {"T": 224, "T2": 228, "S": 240, "B": 224, "L": 224, "L2": 224}
MINI = MambaVisionConfig((64, 64), 8, 8, (1, 1, 3, 2), (1, 2, 4, 8), num_classes=10)
SMALL = MambaVisionConfig((64, 64), 8, 8, (1, 1, 3, 2), (1, 1, 4, 8), num_classes=3, d_state=4, layer_scale=0.5)


def build(config: MambaVisionConfig = SMALL, dtype: torch.dtype = torch.float64) -> MambaVision:
    torch.manual_seed(0)
    return spread_weights(MambaVision(config), dtype)


def published(size: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / "shapes" / f"mambavision_{size}.json").read_text(encoding="utf-8"))
    return found


def published_shapes(size: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in published(size)["keys"].items()}


# --- what it computes


def test_golden_values_of_the_authors_code(golden_file: Callable[[str], Path], tmp_path: Path) -> None:
    """The weights say nothing of heads and windows: the file does."""
    expected: dict[str, Tensor] = load_file(GOLDEN / "mambavision_mini" / "io.safetensors")
    given = argparse.Namespace(num_heads=[1, 2, 4, 8], window_size=[8, 8, 4, 2], input_size=64, crop_pct=1.0)
    state = torch.load(golden_file("mambavision_mini"), weights_only=True)
    torch.save({"state_dict": state, "args": given}, tmp_path / "mini.pth.tar")
    model = load(tmp_path / "mini.pth.tar")
    assert isinstance(model, MambaVision) and model.config == MINI
    assert sum(parameter.numel() for parameter in model.parameters()) == 159_410
    with torch.no_grad():
        found = {"logits": model(expected["input"]), "patch_embed.out": model.patch_embed(expected["input"])}
        x = found["patch_embed.out"].permute(0, 2, 3, 1)
        for number in (0, 1):
            x = model.levels[number](x)
            found[f"levels.{number}.out"] = x.permute(0, 3, 1, 2)
        for number, x in zip((2, 3), model.stage_outputs(expected["input"]), strict=True):
            downsample: Any = model.levels[number].downsample
            found[f"levels.{number}.out"] = (x if downsample is None else downsample(x)).permute(0, 3, 1, 2)
    assert found.keys() | {"input"} == expected.keys()
    # Measured: below 3e-6.
    differences = {key: float((value - expected[key]).abs().max()) for key, value in found.items()}
    assert all(difference < 2e-5 for difference in differences.values()), differences


def centred_by_hand(mixer: CentredMixer, x: Tensor, positions: list[int], lost: Tensor | None) -> Tensor:
    """One image: `x` (L, d) of the tokens at `positions`, token by token."""
    inner = mixer.d_inner
    both = x @ mixer.in_proj.weight.T
    zero = torch.zeros_like(both[:1])
    taps = torch.cat((mixer.conv1d_x.weight, mixer.conv1d_z.weight))[:, 0]  # (d, 3)
    near = torch.stack((torch.cat((zero, both[:-1])), both, torch.cat((both[1:], zero))), dim=-1)
    first, beside = functional.silu((near * taps).sum(-1)).split(inner, dim=-1)
    a, state, result = -mixer.A_log.exp(), torch.zeros_like(mixer.A_log), torch.zeros_like(first)
    for row, u in enumerate(first):
        if lost is not None and row:
            missing = positions[row] - positions[row - 1] - 1
            state = torch.exp(a * (missing * lost[:, None])) * state
        rank, b, c = (mixer.x_proj.weight @ u).split(mixer.splits)
        delta = functional.softplus(mixer.dt_proj.weight @ rank + 2 * mixer.dt_proj.bias)
        state = torch.exp(a * delta[:, None]) * state + (delta * u)[:, None] * b
        result[row] = state @ c + mixer.D * u
    return torch.cat((result, beside), dim=1) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("alignment", ["none", "null"])
@pytest.mark.parametrize("kept", [list(range(16)), [1, 2, 6, 9, 15]])
def test_a_scan_step_by_step(alignment: str, kept: list[int]) -> None:
    mixer = build().mixers[0]
    assert isinstance(mixer, CentredMixer)
    sequence = TokenSequence.dense(torch.randn(1, 16, 32, dtype=torch.float64), grid=(4, 4)).keep(torch.tensor([kept]))
    lost = mixer.null_delta() if alignment == "null" else None
    with torch.no_grad():
        aligned = None if lost is None else ScanAlignment(lost)
        found, _ = mixer(sequence.hidden, sequence, aligned, "nothing", None, None)
        expected = centred_by_hand(mixer, sequence.hidden[0], kept, None if lost is None else lost[0])
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-11)


def test_attention_head_by_head() -> None:
    """And the step that stands for a scan's is the attention that a token receives."""
    mixer = build().mixers[2]
    assert isinstance(mixer, AttentionMixer) and mixer.heads == 4
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    with torch.no_grad():
        found, statistics = mixer(x, TokenSequence.dense(x), None, "delta", None, None)
        query, key, value = (x @ mixer.qkv.weight.T + mixer.qkv.bias).split(32, dim=-1)
        outputs, received = [], torch.zeros(2, 7, dtype=torch.float64)
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            shares = (query[..., part] @ key[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
            outputs.append(shares @ value[..., part])
            received += shares.mean(dim=1) / 4
    expected = torch.cat(outputs, dim=-1)
    torch.testing.assert_close(statistics.y[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected @ mixer.proj.weight.T + mixer.proj.bias, rtol=0, atol=1e-12)
    torch.testing.assert_close(statistics.delta[0], received[..., None].expand(-1, -1, 32), rtol=0, atol=1e-12)


@pytest.mark.parametrize("point", [1, 2])
def test_live_tokens_lose_nothing_to_tokens_frozen_a_block_ago(point: int) -> None:
    """In front of a block with a scan, and in front of one with attention; the context alone is less."""
    model = build()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    seen: list[TokenSequence] = []
    model.blocks[point].register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    with torch.no_grad():
        model(images)
        for reduction in ("frozen", "context"):
            compress(model, 0.5, points=[point], reduction=reduction, alignment="none")
            model(images)
    dense, frozen, context = seen
    for kept, same in ((frozen, True), (context, False)):
        assert kept.positions.shape[1] == 8
        error = (kept.hidden - gather_tokens(dense.hidden, kept.positions)).abs().max()
        assert bool(error < 1e-10) == same


@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS.names() if REDUCTIONS.get(name).aligned])
def test_samples_are_independent_and_gradients_flow(reduction: str) -> None:
    model = build()
    compress(model, [0.7, 0.5], points=[1, 2], reduction=reduction, importance="delta")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64).requires_grad_()
    logits = model(images)
    torch.testing.assert_close(model(images[:1]), logits[:1], rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert gradient.isfinite().all() and (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_a_keep_ratio_of_one_is_the_dense_model_and_a_session_computes_both() -> None:
    model = build(dtype=torch.float32)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        dense = model(images)
        compress(model, 1.0, points=[1])
        assert torch.equal(model(images), dense)
        compress(model, [0.7, 0.5], points=[1, 2])
        pruned = model(images)
        assert not torch.allclose(pruned, dense, atol=1e-3)
        session = prepare(model)
        torch.testing.assert_close(session(images), pruned, rtol=1e-4, atol=1e-4)
    steps = str(session.explain())
    assert "blocks 1 to 2: op by op (its convolution looks ahead too)" in steps
    assert "block 3: op by op (it has attention and no scan)" in steps


# --- published shapes, and what is asked for


@pytest.mark.parametrize("size", SIZES)
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes, variant = published_shapes(size), f"mambavision_{SIZES[size]}"
    with torch.device("meta"):
        model = MambaVision(VARIANTS[variant])
    assert shapes_of(model) == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == published(size)["n_params"]
    for hints in (Hints(), Hints("vmamba.pth"), Hints(variant=variant)):
        assert MAMBAVISION.configure(shapes, hints) == VARIANTS[variant]
        assert [name for name, family in FAMILIES.items() if family.matches(shapes, hints)] == ["mambavision"]
    assert model.preprocessing == Preprocessing(RESIZED[size], 224)


def test_heads_and_windows_that_nothing_says_are_asked_for() -> None:
    with torch.device("meta"):
        shapes = shapes_of(MambaVision(SMALL))
    stated: dict[str, tuple[Any, ...]] = {"num_heads": ((1, 1, 4, 8),), "window_size": ((8, 8, 4, 2),)}

    def configure(**changes: tuple[Any, ...]) -> MambaVisionConfig:
        settings = {name: value for name, value in (stated | changes).items() if value}
        hints = Hints(settings=settings, asked_size=64, eval_crop_ratio=1.0)
        found: MambaVisionConfig = MAMBAVISION.configure(shapes, hints)
        return found

    assert replace(configure(), layer_scale=SMALL.layer_scale) == SMALL
    with pytest.raises(CheckpointError, match="how many heads"):
        configure(num_heads=())
    with pytest.raises(CheckpointError, match="how large windows"):
        configure(window_size=())
    with pytest.raises(CheckpointError, match="windows of 2 x 2 places are not the grid of 4 x 4"):
        configure(window_size=((8, 8, 2, 2),))
    with pytest.raises(CheckpointError, match="not four numbers"):
        configure(num_heads=((4, 8),))
    with pytest.raises(CheckpointError, match="not a MambaVision: heads"):
        configure(num_heads=((1, 1, 5, 8),))
    with pytest.raises(CheckpointError, match="which image size"):
        MAMBAVISION.configure(shapes, Hints(settings=stated))
    with pytest.raises(UsageError, match="do not overlap"):
        MAMBAVISION.configure(shapes, Hints(stride=2))
    assert MambaVisionConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, r"head\.weight is missing"),
        ({"patch_embed.conv_down.3.weight": (80, 32)}, "has the shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    shapes: Shapes = {key: shape for key, shape in {**published_shapes("T"), **change}.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        MAMBAVISION.configure(shapes, Hints())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (1, 1, 3, 8)}, "do not divide"),
        ({"depths": (1, 1, 1)}, "each of four levels"),
        ({"d_state": 0}, "must be positive"),
        ({"image_size": (0, 64)}, "has no pixel"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_other_image_sizes_and_cuts_are_refused() -> None:
    """Their windows would be padded, or there would be several."""
    model = build(dtype=torch.float32)
    with pytest.raises(DataError, match="takes images of shape"):
        model(torch.zeros(1, 3, 96, 96))
    assert sides(model) == () and cuts(model) == range(0)
    with pytest.raises(UsageError, match="48 pixels"):
        resize(model, 48)
    with pytest.raises(UsageError, match="whole grid at 64 pixels only"):
        MAMBAVISION.resize(model.state_dict(), SMALL, 48)
    with pytest.raises(UsageError, match="0 blocks at most"):
        cut_short(model, 1)


def test_inspect_of_a_published_container(tmp_path: Path) -> None:
    state = {
        key: torch.zeros(shape, dtype=torch.int64 if key.endswith("tracked") else torch.float16)
        for key, shape in published_shapes("T").items()
    }
    torch.save({"state_dict": state, "epoch": 300}, tmp_path / "mambavision_tiny_1k.pth.tar")
    found = inspect(tmp_path / "mambavision_tiny_1k.pth.tar")
    assert (found.family, found.variant, found.parameters) == ("mambavision", "mambavision_tiny", 31_794_248)
    assert found.tokens == 196


def test_multiply_adds_against_a_formula() -> None:
    def mlp(d: int) -> int:
        return 2 * 4 * d * d

    def scanned(tokens: int, d: int) -> int:
        e, n, rank = d // 2, 4, -(-d // 16)
        conv = d * 3 * (tokens + 1)  # the sequence begins one token later
        scan = e * (rank + 2 * n) + rank * e + 9 * e * n + e
        return tokens * (2 * d * d + scan + mlp(d)) + conv

    def attended(tokens: int, d: int) -> int:
        return tokens * (4 * d * d + mlp(d)) + 2 * tokens * tokens * d

    count = count_flops(build(dtype=torch.float32))
    assert count.per_block == (scanned(16, 32),) * 2 + (attended(16, 32), scanned(4, 64), attended(4, 64))
