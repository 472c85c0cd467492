"""PlainMamba without golden values: an independent implementation, detection from shapes, initialisation, resizing."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli import load
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.plainmamba.checkpoint import PLAINMAMBA
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.plainmamba.routes import moves, snakes
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.tokens import TokenSequence

SHAPES = Path(__file__).parent.parent / "golden" / "shapes"
SMALL = PlainMambaConfig(image_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_classes=3, d_state=4)
OPTIONS: dict[str, dict[str, Any]] = {
    "even grid": {},
    "odd grid": {"image_size": (24, 24)},
    "padded to fill the patches": {"image_size": (21, 27)},
    "tall": {"image_size": (40, 16)},
    "wide": {"image_size": (16, 24)},
    "one row": {"image_size": (8, 32)},
    "one column": {"image_size": (24, 8)},
    "depthwise convolutions": {"dw_layers": (0, 1)},
    "no convolution in the stem": {"stem_convs": 0},
    "two convolutions in the stem": {"stem_convs": 2},
    "sizes": {"d_inner": 24, "dt_rank": 3, "d_conv": 3, "patch_size": 16, "d_state": 5},
    "several outputs": {"out_indices": (0, 1)},
}


def build(config: PlainMambaConfig, dtype: torch.dtype = torch.float64) -> PlainMamba:
    """Random weights; what starts at zero, one or a constant is moved, or mistakes with it would not show."""
    torch.manual_seed(0)
    model = PlainMamba(config).to(dtype).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 2.0)
        elif value.is_floating_point():
            nn.init.normal_(value, value.mean().item(), 0.3)
    return model


def images(config: PlainMambaConfig, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, *config.image_size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def shapes_in(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


# --- an independent implementation: one place and one step at a time


def walk_by_hand(grid: tuple[int, int], number: int) -> tuple[list[int], list[int]]:
    """Places and moves of route `number` 0..3, walked as the authors describe it."""
    rows, columns = grid
    place = [0, 0]
    if number == 1:
        place = [rows - 1, columns - 1 if rows % 2 else 0]
    elif number == 3:
        place = [rows - 1 if columns % 2 else 0, columns - 1]
    along = 1 if number < 2 else 0  # the axis that the snake runs along; it turns at its ends
    across, sizes = 1 - along, (rows, columns)
    ahead = 1 if place[along] == 0 and not (number == 1 and rows % 2) and not (number == 3 and columns % 2) else -1
    aside = 1 if number in (0, 2) else -1
    ids = {(0, 1): 4, (0, -1): 3, (1, 1): 1, (1, -1): 2}  # axis and sign: down, up, right, left
    order, made = [], [0]
    while True:
        order.append(place[0] * columns + place[1])
        if 0 <= place[along] + ahead < sizes[along]:
            place[along] += ahead
            made.append(ids[along, ahead])
        elif 0 <= place[across] + aside < sizes[across]:
            place[across] += aside
            made.append(ids[across, aside])
            ahead = -ahead
        else:
            return order, made


def naive_mixer(
    w: dict[str, Tensor],
    grid: tuple[int, int],
    tokens: Tensor,
    kept: Sequence[int],
    gap_delta: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Tokens (K, d) at the places `kept`: output (K, d), then scan outputs and steps of each route, both (K, E)."""
    total, kernel = grid[0] * grid[1], w["conv2d.weight"]
    x, z = (tokens @ w["in_proj.weight"].T + w["in_proj.bias"]).chunk(2, dim=-1)
    image = torch.zeros(total, x.shape[1], dtype=x.dtype)
    image[list(kept)] = x
    u = functional.conv2d(
        image.T.reshape(1, -1, *grid), kernel, w["conv2d.bias"], padding=kernel.shape[-1] // 2, groups=x.shape[1]
    )
    u = functional.silu(u).reshape(-1, total).T[list(kept)]
    rank, state = w["dt_proj.weight"].shape[1], w["A_log"].shape[1]
    projected = u @ w["x_proj.weight"].T
    delta = torch.log1p(torch.exp(projected[:, :rank] @ w["dt_proj.weight"].T + 2 * w["dt_proj.bias"]))
    outputs, steps = [], []
    for number in range(4):
        order, made = walk_by_hand(grid, number)
        y, taken = torch.zeros_like(u), torch.zeros_like(u)
        h, skipped = torch.zeros(u.shape[1], state, dtype=x.dtype), 0
        started = False
        for step in range(total):
            if order[step] not in kept:
                skipped += started
                continue
            token = kept.index(order[step])
            lender = min(range(len(kept)), key=lambda index: (abs(kept[index] - step), kept[index]))
            b = projected[lender, rank : rank + state] + w["direction_Bs"][made[step]]
            decay = delta[lender] if gap_delta is None else delta[lender] + skipped * gap_delta[number]
            h = torch.exp(-decay[:, None] * w["A_log"].exp()) * h + (delta[lender] * u[token])[:, None] * b
            y[token] = h @ projected[lender, rank + state :] + w["D"] * u[token]
            taken[token] = delta[lender]
            started, skipped = True, 0
        outputs.append(y)
        steps.append(taken)
    mixed = sum(outputs) * functional.silu(z)
    return mixed @ w["out_proj.weight"].T + w["out_proj.bias"], outputs, steps


def naive_norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def naive_batch_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    scale = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
    shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def below(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}


def naive_model(weights: dict[str, Tensor], config: PlainMambaConfig, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the tokens after each block."""
    w = below(weights, "backbone.")
    x = functional.conv2d(batch, w["patch_embed.stem.0.weight"], stride=2, padding=3)
    x = naive_batch_norm(w, "patch_embed.stem.1", x).relu()
    for number in range(config.stem_convs):
        x = functional.conv2d(x, w[f"patch_embed.convs.{3 * number}.weight"], padding=1)
        x = naive_batch_norm(w, f"patch_embed.convs.{3 * number + 1}", x).relu()
    half = config.patch_size // 2
    x = functional.pad(x, (0, -x.shape[3] % half, 0, -x.shape[2] % half))
    x = functional.conv2d(x, w["patch_embed.projection.weight"], w["patch_embed.projection.bias"], stride=half)
    grid, outputs = (x.shape[2], x.shape[3]), []
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    for block in range(config.depth):
        own = below(w, f"layers.{block}.")
        normed = naive_norm(own, "norm", x, 1e-5)
        everywhere = list(range(grid[0] * grid[1]))
        x = x + torch.stack([naive_mixer(below(own, "mamba."), grid, row, everywhere)[0] for row in normed])
        if block in config.dw_layers:
            image = x.transpose(1, 2).reshape(*x.shape[::2], *grid)
            image = functional.conv2d(image, own["dw.0.weight"], padding=1, groups=x.shape[2])
            x = functional.gelu(naive_batch_norm(own, "dw.1", image)).flatten(2).transpose(1, 2)
        outputs.append(x)
    pooled = naive_norm(w, "ln1", x, 1e-6).mean(1)
    return pooled @ weights["head.fc.weight"].T + weights["head.fc.bias"], outputs


@pytest.mark.parametrize("name", OPTIONS)
def test_against_an_independent_implementation(name: str) -> None:
    config = replace(SMALL, **OPTIONS[name])
    model, batch = build(config), images(config)
    with torch.no_grad():
        found, maps = model(batch), model.feature_maps(batch)
        expected, outputs = naive_model(model.state_dict(), config, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    norms = {0: "norm_layer0", -1: "ln1"}
    for block, each in zip(config.out_indices, maps, strict=True):
        wanted = naive_norm(below(model.state_dict(), "backbone."), norms[block], outputs[block], 1e-6)
        assert each.shape[2:] == model.grid
        torch.testing.assert_close(each.flatten(2).transpose(1, 2), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("grid", [(4, 4), (3, 3), (3, 4), (4, 3), (1, 5), (5, 1), (1, 1), (2, 7)])
def test_routes_are_walked_as_described(grid: tuple[int, int]) -> None:
    for number, route in enumerate(snakes(grid, torch.device("cpu"))):
        order, made = walk_by_hand(grid, number)
        assert route.tolist() == order and moves(route, grid).tolist() == made


# --- what pruning relies on


def some_kept(total: int, count: int, samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(total, generator=generator)[:count].sort().values for _ in range(samples)])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
def test_a_mixer_that_lost_tokens(size: tuple[int, int], aligned: bool) -> None:
    """Output, scans and steps: every route with gaps, moves and rows of its own, the convolution at true places."""
    config = replace(SMALL, image_size=size)
    model = build(config)
    mixer: Any = model.mixers[1]
    total, (batch, count) = model.num_tokens, (2, 7)
    torch.manual_seed(2)
    kept = some_kept(total, count)
    sequence = TokenSequence.dense(torch.randn(batch, total, 16, dtype=torch.float64), grid=model.grid).keep(kept)
    gap_delta = torch.rand(4, mixer.d_inner, dtype=torch.float64) if aligned else None
    alignment = ScanAlignment(gap_delta) if gap_delta is not None else None
    with torch.no_grad():
        found, statistics = mixer(sequence.hidden, sequence, alignment, "delta")
        for row in range(batch):
            output, scans, steps = naive_mixer(
                mixer.state_dict(), model.grid, sequence.hidden[row], kept[row].tolist(), gap_delta
            )
            torch.testing.assert_close(found[row], output, rtol=0, atol=1e-10)
            for direction in range(4):
                torch.testing.assert_close(statistics.y[direction][row], scans[direction], rtol=0, atol=1e-10)
                torch.testing.assert_close(statistics.delta[direction][row], steps[direction], rtol=0, atol=1e-10)


def test_a_dense_mixer_hands_out_its_scans_and_steps() -> None:
    """y is the scan before the gate, at the tokens' own places; steps come only when they are asked for."""
    model = build(SMALL)
    mixer: Any = model.mixers[0]
    tokens = torch.randn(1, 16, 16, dtype=torch.float64)
    dense = TokenSequence.dense(tokens, grid=model.grid)
    with torch.no_grad():
        _, silent = mixer(tokens, dense, None, "y")
        _, statistics = mixer(tokens, dense, None, "delta")
        _, scans, steps = naive_mixer(mixer.state_dict(), model.grid, tokens[0], list(range(16)))
    assert silent.delta == () and len(statistics.y) == len(statistics.delta) == mixer.directions == 4
    for direction in range(4):
        torch.testing.assert_close(statistics.y[direction][0], scans[direction], rtol=0, atol=1e-11)
        torch.testing.assert_close(statistics.delta[direction][0], steps[direction], rtol=0, atol=1e-11)


def test_null_delta_is_the_step_among_empty_places() -> None:
    model = build(SMALL)
    mixer: Any = model.mixers[0]
    nn.init.zeros_(mixer.in_proj.bias)  # or a zero token would not be empty for the convolution
    dense = TokenSequence.dense(torch.zeros(1, 16, 16, dtype=torch.float64), grid=model.grid)
    with torch.no_grad():
        _, statistics = mixer(dense.hidden, dense, None, "delta")
        null = mixer.null_delta()
    assert null.shape == (4, 32)
    for direction, delta in enumerate(statistics.delta):
        torch.testing.assert_close(delta[0], null[direction].expand(16, -1), rtol=0, atol=1e-12)


def test_the_order_in_which_tokens_are_stored_does_not_matter() -> None:
    """A token finds its step by its position: `drop-unsorted` cannot break the order of a scan over a grid."""
    model = build(SMALL)
    mixer: Any = model.mixers[0]
    dense = TokenSequence.dense(torch.randn(1, 16, 16, dtype=torch.float64), grid=model.grid)
    sorted_, shuffled = torch.tensor([[1, 4, 7, 9, 12]]), torch.tensor([[9, 1, 12, 7, 4]])
    outputs = []
    for kept in (sorted_, shuffled):
        sequence = dense.keep(kept)
        with torch.no_grad():
            outputs.append(mixer(sequence.hidden, sequence, None, "y")[0])
    torch.testing.assert_close(outputs[1], outputs[0][:, [3, 0, 4, 2, 1]], rtol=0, atol=1e-12)


def test_the_depthwise_convolution_sees_kept_tokens_at_their_places() -> None:
    model = build(replace(SMALL, dw_layers=(0,)))
    layer: Any = model.backbone.layers[0]
    dense = TokenSequence.dense(torch.randn(2, 16, 16, dtype=torch.float64), grid=model.grid)
    kept = some_kept(16, 6)
    sequence = dense.keep(kept)
    with torch.no_grad():
        found, _ = layer(sequence, None, False)
        mixed, _ = layer.mamba(layer.norm(sequence.hidden), sequence, None, False)
        image = torch.zeros(2, 16, 16, dtype=torch.float64)
        image.scatter_(1, kept[..., None].expand(-1, -1, 16), sequence.hidden + mixed)
        wanted = layer.dw(image.transpose(1, 2).reshape(2, 16, 4, 4)).flatten(2).transpose(1, 2)
    expected = wanted.gather(1, kept[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(found.hidden, expected, rtol=0, atol=1e-11)


class Halving(nn.Module):
    """Drops every second patch after the first block."""

    def wants(self, block: int) -> Wanted:
        return "y"

    def alignment(self, block: int) -> ScanAlignment | None:
        return ScanAlignment()

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if block > 0:
            return sequence
        kept = torch.arange(0, sequence.length, 2).expand(sequence.hidden.shape[0], -1)
        return sequence.keep(kept)


@pytest.mark.parametrize("pruned", [False, True])
def test_model_is_traced_exported_and_built_on_meta(pruned: bool) -> None:
    config = replace(SMALL, dw_layers=(0, 1))
    model = build(config, torch.float32)
    if pruned:
        model.pruner = Halving()
    first, second = images(config, 2, torch.float32), images(config, 4, torch.float32)[2:]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of every shape that is checked, and of its own deprecation
        traced = torch.jit.trace(model, (first,))
        exported = torch.export.export(model, (first,)).module()
        # A trace has the scans that `routed_scans` is made of: the same in another order.
        torch.testing.assert_close(traced(second), model(second), rtol=0, atol=1e-6)
        assert torch.equal(exported(second), model(second))
        if not pruned:
            assert copy.deepcopy(model).to("meta")(first.to("meta")).shape == (2, 3)


def test_a_dropped_token_is_in_later_feature_maps_with_the_value_it_left_with() -> None:
    model = build(replace(SMALL, out_indices=(0, 1)), torch.float32)
    batch = images(SMALL, 2, torch.float32)
    with torch.no_grad():
        (first_block, _), _ = model._blocks(batch)
        model.pruner = Halving()
        _, second = model.feature_maps(batch)
        left = model.features(batch)
    places = second.flatten(2).transpose(1, 2)
    assert torch.equal(places[:, 1::2], model.backbone.ln1(first_block.hidden[:, 1::2]))
    assert torch.equal(places[:, 0::2], model.backbone.ln1(left.hidden))


# --- published shapes, and configurations found from them


@pytest.mark.parametrize("size", ["1", "2", "3"])
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes = shapes_in(f"plainmamba_L{size}")
    assert [family.name for _, family in FAMILIES.items() if family.matches(shapes, Hints())] == ["plainmamba"]
    config = PLAINMAMBA.configure(shapes, Hints())
    assert config == PLAINMAMBA.variants[f"plainmamba_l{size}"]
    with torch.device("meta"):
        model = PLAINMAMBA.build(config)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


# The sides of an image that is not square, or is padded, are in no shape.
@pytest.mark.parametrize("name", ["even grid", "odd grid", *list(OPTIONS)[7:]])
def test_options_are_found_from_shapes(name: str) -> None:
    config = replace(SMALL, **OPTIONS[name])
    shapes = {key: tuple(value.shape) for key, value in PlainMamba(config).state_dict().items()}
    assert PLAINMAMBA.configure(shapes, Hints(eval_crop_ratio=0.875)) == config


@pytest.mark.parametrize(
    ("patches", "known_side", "expected"),
    [
        (196, None, 224),
        (576, None, 384),
        (196, 220, 220),  # a size that the container names goes first: 220 is padded to 224
        (1, None, 16),
    ],
)
def test_image_size(patches: int, known_side: int | None, expected: int) -> None:
    shapes: Shapes = {**shapes_in("plainmamba_L1"), "backbone.pos_embed": (1, patches, 192)}
    config = PLAINMAMBA.configure(shapes, Hints(image_size=known_side))
    assert config.image_size == (expected, expected)


def test_shapes_that_do_not_fit_are_named() -> None:
    shapes = shapes_in("plainmamba_L1")
    with pytest.raises(
        CheckpointError, match="the file says that images have 384 pixels, which do not give 196"
    ) as caught:
        PLAINMAMBA.configure(shapes, Hints(image_size=384))
    assert caught.value.hint is not None and "--image-size 224" in caught.value.hint
    with pytest.raises(CheckpointError, match="180 patch positions"):
        PLAINMAMBA.configure({**shapes, "backbone.pos_embed": (1, 180, 192)}, Hints())
    for key in ("head.fc.weight", "backbone.pos_embed", "backbone.layers.0.mamba.conv2d.weight"):
        with pytest.raises(CheckpointError, match=rf"not a PlainMamba classifier: the weight {key} is missing"):
            PLAINMAMBA.configure({name: shape for name, shape in shapes.items() if name != key}, Hints())
    with pytest.raises(CheckpointError, match=r"A_log has the shape \(384,\)"):
        PLAINMAMBA.configure({**shapes, "backbone.layers.0.mamba.A_log": (384,)}, Hints())
    with pytest.raises(CheckpointError, match="d_conv odd"):
        PLAINMAMBA.configure({**shapes, "backbone.layers.0.mamba.conv2d.weight": (384, 1, 6, 6)}, Hints())


def test_a_file_that_fits_only_in_part_is_refused(tmp_path: Path) -> None:
    path, state = tmp_path / "model.pth", PlainMamba(SMALL).state_dict()
    torch.save({"state_dict": {**state, "backbone.layers.1.mamba.D": torch.ones(5)}}, path)
    with pytest.raises(CheckpointError, match=r"do not fit PlainMamba: .*mamba\.D has shape \(5,\), not \(32,\)"):
        load(path)
    short = {key: value for key, value in state.items() if "layers.1.norm" not in key}
    torch.save({"state_dict": {**short, "decode_head.bias": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.norm\.weight is missing, .*decode_head\.bias is unknown"):
        load(path)
    torch.save({"layers.0.mamba.direction_Bs": torch.ones(5, 16)}, path)
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight is missing"):
        load(path)


def test_a_variant_is_taken_as_published_but_for_its_classes() -> None:
    shapes: Shapes = {**shapes_in("plainmamba_L1"), "head.fc.weight": (7, 192)}
    config = PLAINMAMBA.configure(shapes, Hints(variant="plainmamba_l2", image_size=220))
    assert config == replace(
        PLAINMAMBA.variants["plainmamba_l2"], num_classes=7, image_size=(220, 220), eval_crop_ratio=None
    )


# --- the configuration


def test_config_survives_json() -> None:
    for config in PLAINMAMBA.variants.values():
        assert PlainMambaConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_short_forms_of_the_configuration() -> None:
    config = replace(SMALL, image_size=48, out_indices=(-1, 0), dw_layers=[1])  # type: ignore[arg-type]
    assert (config.image_size, config.out_indices, config.dw_layers) == ((48, 48), (0, -1), (1,))
    assert replace(config, depth=7).out_indices == (0, -1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (0, 8)}, "size"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"patch_size": 7}, "even"),
        ({"d_conv": 4}, "odd"),
        ({"dw_layers": (2,)}, r"dw_layers \[2\]"),
        ({"out_indices": (-3,)}, r"out_indices \[-3\]"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_preprocessing_is_the_published_one() -> None:
    with torch.device("meta"):
        assert PlainMamba(PlainMambaConfig(depth=1)).preprocessing == Preprocessing(resize=256, crop=224)
        with pytest.raises(UsageError, match="24 x 40"):
            _ = PlainMamba(replace(SMALL, image_size=(24, 40))).preprocessing


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(DataError, match=r"\(3, 32, 32\), not \(3, 32, 24\)"):
        build(SMALL)(torch.zeros(1, 3, 32, 24, dtype=torch.float64))


# --- initialisation and resizing


def test_weights_start_as_the_authors_start_them() -> None:
    torch.manual_seed(0)
    state = PlainMamba(PlainMambaConfig(image_size=(64, 64), embed_dim=128, depth=2, num_classes=100)).state_dict()
    mixer = below(state, "backbone.layers.1.mamba.")
    assert torch.equal(mixer["D"], torch.ones(256))
    torch.testing.assert_close(mixer["A_log"].exp(), torch.arange(1.0, 17).repeat(256, 1))
    # Also dt_proj, whose own start their training configuration overrides.
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        assert mixer[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.05)
        assert name == "x_proj" or not mixer[f"{name}.bias"].any()
    assert mixer["direction_Bs"].std().item() == pytest.approx(0.02, rel=0.3)  # 80 values
    assert state["backbone.pos_embed"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["head.fc.weight"].std().item() == pytest.approx(0.01, rel=0.05) and not state["head.fc.bias"].any()
    assert 0.9 < mixer["conv2d.weight"].abs().max() * 7 <= 1  # uniform in +- 1 / sqrt(49)


@pytest.mark.parametrize(("size", "grid"), [(64, (8, 8)), (20, (3, 3)), ((16, 40), (2, 5))])
def test_resizing_is_bicubic(size: int | tuple[int, int], grid: tuple[int, int]) -> None:
    state = PlainMamba(SMALL).state_dict()
    changed, resized = PLAINMAMBA.resize(state, SMALL, size)  # type: ignore[arg-type]
    assert resized == replace(SMALL, image_size=size) and resized.grid == grid  # type: ignore[arg-type]
    PlainMamba(resized).load_state_dict(changed)
    table = state["backbone.pos_embed"].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    expected = functional.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    assert torch.equal(changed["backbone.pos_embed"], expected.permute(0, 2, 3, 1).reshape(1, math.prod(grid), 16))


def test_plainmamba_is_registered() -> None:
    assert FAMILIES.get("plainmamba") is PLAINMAMBA
