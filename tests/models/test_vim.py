"""Vim without golden values: an independent implementation, detection from shapes, initialisation, resizing."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.common.layers import RotaryEmbedding
from ssmprune_cli.models.mamba.class_token import class_positions
from ssmprune_cli.models.mamba.mixer import MambaMixer
from ssmprune_cli.models.mamba.vim import VIM, Vim, VimConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.tokens import TokenSequence

SHAPES = Path(__file__).parent.parent / "golden" / "shapes"
PUBLISHED = {
    "vim_tiny_stride16": "vim_tiny",
    "vim_small_stride16": "vim_small",
    "vim_base_stride16": "vim_base",
    "vim_tiny_stride8": "vim_tiny_plus",
    "vim_small_stride8": "vim_small_plus",
    "vim_base_stride8": "vim_base_plus",
    "vim_tiny_73p1_rope": "vim_tiny_73p1",
}
SMALL = VimConfig(image_size=(24, 24), patch_size=8, stride=8, embed_dim=16, depth=2, num_classes=3, d_state=4)
OPTIONS: dict[str, dict[str, Any]] = {
    "v2": {},
    "v1": {"mixer": "v1"},
    "one direction": {"mixer": "none"},
    "double class token": {"class_token": "double"},
    "LayerNorm": {"norm": "layer"},
    "overlapping patches": {"stride": 4},
    "not square": {"image_size": (24, 40)},
    "rope of hidden states only": {"rope": True, "rope_residual": False, "class_token": "none"},
    "rope, class token in the middle": {"rope": True},
    "sizes": {"d_inner": 24, "dt_rank": 3, "d_conv": 3},
    "all at once": {"mixer": "v1", "norm": "layer", "layer_scale": 0.7, "class_token": "double", "divide_out": False},
}


def build(config: VimConfig, dtype: torch.dtype = torch.float64) -> Vim:
    """Random weights; what starts at zero, one or a constant is moved, or mistakes with it would not show."""
    torch.manual_seed(0)
    model = Vim(config).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    return model


def mixer_of(config: VimConfig) -> MambaMixer:
    mixer = build(config).get_submodule("layers.0.mixer")
    assert isinstance(mixer, MambaMixer)
    return mixer


def images(config: VimConfig, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 3, *config.image_size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def state_of(name: str) -> dict[str, tuple[int, ...]]:
    keys = json.loads((SHAPES / f"{name}.json").read_text(encoding="utf-8"))["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


# --- an independent implementation: one token at a time, reversed directions by flipping, as the authors do


def naive_branch(
    w: dict[str, Tensor], suffix: str, x: Tensor, decay: Tensor, u: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One scan over x (B, L, E), first to last: its output before the gate, and its convolved input."""
    rank, state = w[f"dt_proj{suffix}.weight"].shape[1], decay.shape[1]
    if u is None:
        kernel, taps = w[f"conv1d{suffix}.weight"], w[f"conv1d{suffix}.weight"].shape[-1]
        padded = functional.pad(x.transpose(1, 2), (taps - 1, 0))
        u = functional.silu(functional.conv1d(padded, kernel, w[f"conv1d{suffix}.bias"], groups=x.shape[-1])).transpose(
            1, 2
        )
    projected = u @ w[f"x_proj{suffix}.weight"].T
    h = torch.zeros(*x.shape[::2], state, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        small, b, c = projected[:, t, :rank], projected[:, t, rank : rank + state], projected[:, t, rank + state :]
        step = torch.log1p(torch.exp(small @ w[f"dt_proj{suffix}.weight"].T + w[f"dt_proj{suffix}.bias"]))
        h = torch.exp(-step[..., None] * decay.exp()) * h + (step * u[:, t])[..., None] * b[:, None]
        outputs.append((h * c[:, None]).sum(-1) + w[f"D{suffix}"] * u[:, t])
    return torch.stack(outputs, dim=1), u


def naive_mixer(w: dict[str, Tensor], config: VimConfig, tokens: Tensor) -> Tensor:
    x, z = (tokens @ w["in_proj.weight"].T).chunk(2, dim=-1)
    y, u = naive_branch(w, "", x, w["A_log"])
    gated = y * functional.silu(z)
    if config.mixer == "v2":
        back, _ = naive_branch(w, "_b", x.flip(1), w["A_b_log"])
        gated = gated + (back * functional.silu(z.flip(1))).flip(1)
        gated = gated / 2 if config.divide_out else gated
    elif config.mixer == "v1":
        back, _ = naive_branch(w, "", x.flip(1), w["A_b_log"], u.flip(1))
        gated = gated + (back * functional.silu(z.flip(1))).flip(1)
    return gated @ w["out_proj.weight"].T * w.get("gamma", torch.tensor(1.0))


def naive_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}.bias" in w:
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)
    return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]


def naive_rope(config: VimConfig, grid: tuple[int, int], values: Tensor) -> Tensor:
    """Rotate each pair of channels by hand; see RotaryEmbedding for which token takes which angle."""
    offset = 0 if config.class_token == "none" else 1
    turned, quarter = values.clone(), config.embed_dim // 4
    for patch in range(grid[0] * grid[1]):
        place = (patch // grid[1] / grid[0] * 14, patch % grid[1] / grid[1] * 14)
        for pair in range(config.embed_dim // 2):
            angle = place[pair // quarter] * 10000.0 ** (-2 * (pair % quarter) / (config.embed_dim // 2))
            a, b = values[:, patch + offset, 2 * pair], values[:, patch + offset, 2 * pair + 1]
            turned[:, patch + offset, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[:, patch + offset, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def naive_vim(w: dict[str, Tensor], config: VimConfig, batch: Tensor) -> Tensor:
    pixels = functional.conv2d(batch, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=config.stride)
    grid, x = (pixels.shape[2], pixels.shape[3]), pixels.flatten(2).transpose(1, 2)
    middle, one = x.shape[1] // 2, (len(x), 1, -1)
    if config.class_token == "double":
        x = torch.cat((w["cls_token_head"].expand(one), x, w["cls_token_tail"].expand(one)), dim=1)
    elif config.class_token == "head":
        x = torch.cat((w["cls_token"].expand(one), x), dim=1)
    elif config.class_token == "middle":
        x = torch.cat((x[:, :middle], w["cls_token"].expand(one), x[:, middle:]), dim=1)
    hidden, residual = x + w["pos_embed"], None
    for block in range(config.depth):
        prefix = f"layers.{block}."
        own = {key.removeprefix(prefix): value for key, value in w.items() if key.startswith(prefix)}
        if config.rope:
            hidden = naive_rope(config, grid, hidden)
            if residual is not None and config.rope_residual:
                residual = naive_rope(config, grid, residual)
        residual = hidden if residual is None else residual + hidden
        mixer = {key.removeprefix("mixer."): value for key, value in own.items()}
        hidden = naive_mixer(mixer, config, naive_norm(own, "norm", residual))
    assert residual is not None
    normalised = naive_norm(w, "norm_f", residual + hidden)
    places = class_positions(config.class_token, grid[0] * grid[1])
    pooled = normalised[:, list(places)].mean(1) if places else normalised.mean(1)
    return pooled @ w["head.weight"].T + w["head.bias"]


@pytest.mark.parametrize("name", OPTIONS)
def test_against_an_independent_implementation(name: str) -> None:
    config = replace(SMALL, **OPTIONS[name])
    model, batch = build(config), images(config)
    with torch.no_grad():
        found, expected = model(batch), naive_vim(model.state_dict(), config, batch)
    # float64 everywhere but in the tables of rope, which are float32 with angles up to 13.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if config.rope else 1e-11)


# --- published shapes, and configurations found from them


@pytest.mark.parametrize(("file", "variant"), PUBLISHED.items())
def test_published_shapes_build_and_are_recognised(file: str, variant: str) -> None:
    shapes = state_of(file)
    assert VIM.matches(shapes, Hints())
    config = VIM.configure(shapes, Hints())
    assert config == VIM.variants[variant]
    with torch.device("meta"):
        model = VIM.build(config)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


def test_every_variant_has_published_shapes() -> None:
    assert set(PUBLISHED.values()) == set(VIM.variants)
    assert {path.stem for path in SHAPES.glob("vim_*.json")} == set(PUBLISHED)


# The sides of an image that is not square are in no shape.
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "not square"])
def test_options_are_found_from_shapes(name: str) -> None:
    config = replace(SMALL, **OPTIONS[name])
    hints = Hints(image_size=24, eval_crop_ratio=config.eval_crop_ratio)
    if config.rope and config.class_token == "middle":
        hints = replace(hints, model_name="vim_rope_also_residual_midclstok_div2")
    elif config.rope:
        hints = replace(hints, model_name="vim_rope_div2")
    if not config.divide_out:
        hints = replace(hints, model_name="vim_double_cls_token")
    shapes = {key: tuple(value.shape) for key, value in Vim(config).state_dict().items()}
    found = VIM.configure(shapes, hints)
    if config.layer_scale is not None:
        found = replace(found, layer_scale=config.layer_scale)  # where training started is in no shape
    assert found == config


@pytest.mark.parametrize(
    ("model_name", "place", "divide_out"),
    [
        ("", "middle", True),
        ("my_own_vim", "middle", True),
        ("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2", "middle", True),
        ("vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2", "middle", True),
        ("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok", "middle", False),
        ("vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_cls_token", "head", False),
    ],
)
def test_the_authors_model_name_tells_what_shapes_cannot(model_name: str, place: str, divide_out: bool) -> None:
    config = VIM.configure(state_of("vim_tiny_stride16"), Hints(model_name=model_name))
    assert (config.class_token, config.divide_out) == (place, divide_out)


@pytest.mark.parametrize(
    ("patches", "known_side", "expected"),
    [
        (196, None, (224, 16)),
        (729, None, (224, 8)),
        (576, 384, (384, 16)),  # a size that the file says goes first
        (3025, 448, (448, 8)),
    ],
)
def test_image_size_and_stride(patches: int, known_side: int | None, expected: tuple[int, int]) -> None:
    shapes: Shapes = {**state_of("vim_tiny_stride16"), "pos_embed": (1, patches + 1, 192)}
    config = VIM.configure(shapes, Hints(image_size=known_side))
    assert (config.image_size, config.stride) == ((expected[0], expected[0]), expected[1])


@pytest.mark.parametrize(
    ("patches", "hints", "message"),
    [
        (576, Hints(), "neither the weights nor the file say"),
        (196, Hints(image_size=384), "the file says that images have 384 pixels, but no stride"),
        (
            196,
            Hints(image_size=384, stride=16),
            "a stride of 16 does not bring images of 384 pixels, as the file says,",
        ),
        (729, Hints(asked_size=432), "images of 432 pixels fit several strides"),  # 432 / 16, or 224 / 8 resized
        (576, Hints(asked_size=100), "no stride brings images of 100 pixels to 576 patch positions"),
    ],
)
def test_a_geometry_that_nothing_settles_is_asked_for(patches: int, hints: Hints, message: str) -> None:
    shapes: Shapes = {**state_of("vim_tiny_stride16"), "pos_embed": (1, patches + 1, 192)}
    with pytest.raises(CheckpointError, match=message) as caught:
        VIM.configure(shapes, hints)
    rows = round(patches**0.5)
    assert caught.value.hint is not None
    assert f"--image-size {16 + 8 * (rows - 1)} --stride 8; --image-size {16 * rows} --stride 16" in caught.value.hint


@pytest.mark.parametrize(
    ("patches", "hints", "expected"),
    [
        (576, Hints(asked_size=384), (384, 16)),  # the size tells the stride
        (576, Hints(stride=16), (384, 16)),  # and the stride tells the size
        (576, Hints(stride=8, asked_size=384), (200, 8)),  # which is then resized
        (196, Hints(asked_size=384), (224, 16)),  # no stride fits: the published model, to be resized
        (729, Hints(asked_size=432, stride=8), (224, 8)),
        (196, Hints(image_size=384, stride=16, asked_size=224), (224, 16)),  # the user goes before the file
    ],
)
def test_what_the_user_says_settles_the_geometry(patches: int, hints: Hints, expected: tuple[int, int]) -> None:
    shapes: Shapes = {**state_of("vim_tiny_stride16"), "pos_embed": (1, patches + 1, 192)}
    config = VIM.configure(shapes, hints)
    assert (config.image_size, config.stride) == ((expected[0], expected[0]), expected[1])
    assert config.eval_crop_ratio == (0.875 if expected[0] == 224 else None)  # known of the published models alone


def test_shapes_that_do_not_fit_are_named() -> None:
    shapes = state_of("vim_tiny_stride16")
    with pytest.raises(CheckpointError, match="180 patch positions"):
        VIM.configure({**shapes, "pos_embed": (1, 181, 192)}, Hints())
    headless = {key: shape for key, shape in shapes.items() if not key.startswith("head.")}
    with pytest.raises(CheckpointError, match=r"head\.weight is missing"):
        VIM.configure(headless, Hints())


def test_a_variant_is_taken_as_published_but_for_its_classes() -> None:
    shapes: Shapes = {**state_of("vim_tiny_stride16"), "head.weight": (7, 192)}
    config = VIM.configure(shapes, Hints(variant="vim_tiny_73p1", eval_crop_ratio=1.0))
    assert config == replace(VIM.variants["vim_tiny_73p1"], num_classes=7, eval_crop_ratio=1.0)


@pytest.mark.parametrize(
    "hints", [Hints(filename="videomamba_t16_in1k_res224.pth"), Hints(model_name="VideoMamba_tiny")]
)
def test_videomamba_is_not_taken_for_vim(hints: Hints) -> None:
    assert not VIM.matches(state_of("vim_tiny_stride16"), hints)


# --- the configuration


def test_config_survives_json() -> None:
    for config in VIM.variants.values():
        assert VimConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_an_int_is_a_square_image() -> None:
    assert replace(SMALL, image_size=32).image_size == (32, 32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": (7, 7)}, "no room for a patch"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"rope": True, "class_token": "double"}, "rope"),
        ({"rope": True, "embed_dim": 18}, "rope"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_preprocessing_is_the_published_one() -> None:
    with torch.device("meta"):
        assert Vim(VimConfig(depth=1)).preprocessing == Preprocessing(resize=256, crop=224)
        with pytest.raises(UsageError, match="24 x 40"):
            _ = Vim(replace(SMALL, image_size=(24, 40))).preprocessing


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(DataError, match=r"\(3, 24, 24\), not \(3, 32, 24\)"):
        build(SMALL)(torch.zeros(1, 3, 32, 24, dtype=torch.float64))


# --- initialisation


def test_weights_start_as_the_authors_start_them() -> None:
    torch.manual_seed(0)
    state = Vim(VimConfig(image_size=(64, 64), embed_dim=128, depth=4, num_classes=100)).state_dict()
    mixer = {key.removeprefix("layers.1.mixer."): value for key, value in state.items() if "layers.1.mixer." in key}
    for suffix in ("", "_b"):
        assert torch.equal(mixer[f"D{suffix}"], torch.ones(256))
        # A = -1 ... -16 in every channel
        torch.testing.assert_close(mixer[f"A{suffix}_log"].exp(), torch.arange(1.0, 17).repeat(256, 1))
        steps = functional.softplus(mixer[f"dt_proj{suffix}.bias"])
        assert steps.min() >= 0.001 * 0.999 and steps.max() <= 0.1 * 1.001
        assert steps.log().mean().item() == pytest.approx(math.log(0.01), abs=0.3)  # 256 log-uniform draws: +- 0.08
        assert mixer[f"dt_proj{suffix}.weight"].abs().max() <= 8**-0.5
    for suffix in ("", "_b"):
        assert 0.4 < mixer[f"conv1d{suffix}.weight"].abs().max() <= 0.5
    # Uniform in +- 1 / sqrt(256), divided by the square root of the depth
    assert 0.95 < mixer["out_proj.weight"].abs().max() / (256**-0.5 / 2) <= 1
    assert torch.equal(state["head.bias"], torch.zeros(100))
    assert torch.equal(state["patch_embed.proj.bias"], torch.zeros(128))
    for name, deviation in (("pos_embed", 0.02), ("head.weight", 0.02), ("patch_embed.proj.weight", 768**-0.5)):
        assert state[name].std().item() == pytest.approx(deviation, rel=0.1)
    assert state["cls_token"].std().item() == pytest.approx(0.02, rel=0.3)


# --- what pruning relies on


def test_mixer_hands_out_both_scans_and_their_steps() -> None:
    """y is the scan before the gate, at the tokens' own places; steps come only when they are asked for."""
    mixer = mixer_of(SMALL)
    weights = mixer.state_dict()
    tokens = torch.randn(2, 10, 16, dtype=torch.float64)
    with torch.no_grad():
        _, silent = mixer(tokens, TokenSequence.dense(tokens), None, "y")
        _, statistics = mixer(tokens, TokenSequence.dense(tokens), None, "delta")
        x = (tokens @ weights["in_proj.weight"].T).chunk(2, dim=-1)[0]
        forward, _ = naive_branch(weights, "", x, weights["A_log"])
        backward, u = naive_branch(weights, "_b", x.flip(1), weights["A_b_log"])
        raw = (u @ weights["x_proj_b.weight"].T)[..., :1] @ weights["dt_proj_b.weight"].T + weights["dt_proj_b.bias"]
    assert silent.delta == ()
    torch.testing.assert_close(statistics.y[0], forward, rtol=0, atol=1e-11)
    torch.testing.assert_close(statistics.y[1], backward.flip(1), rtol=0, atol=1e-11)
    torch.testing.assert_close(statistics.delta[1], functional.softplus(raw).flip(1), rtol=0, atol=1e-11)
    assert len(statistics.delta) == 2


@pytest.mark.parametrize("kind", ["v2", "v1", "none"])
def test_null_delta_is_the_step_among_zero_tokens(kind: str) -> None:
    mixer = mixer_of(replace(SMALL, mixer=kind))  # type: ignore[arg-type]
    zeros = torch.zeros(1, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        _, statistics = mixer(zeros, TokenSequence.dense(zeros), None, "delta")
        null = mixer.null_delta()
    assert null.shape == (mixer.directions, mixer.d_inner) == (len(statistics.delta), 32)
    for direction, delta in enumerate(statistics.delta):
        torch.testing.assert_close(delta[0], null[direction].expand(9, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["v1", "none"])
def test_alignment_is_exact_for_the_other_mixers(kind: str) -> None:
    """Steps that do not depend on the token, no context: a short scan equals the long one with zeroed inputs (v2 is
    tested with the pruner)."""
    mixer = mixer_of(replace(SMALL, mixer=kind))  # type: ignore[arg-type]
    weights = dict(mixer.named_parameters())
    weights["dt_proj.weight"].data.zero_()
    weights["conv1d.weight"].data[:, :, :-1] = 0
    weights["conv1d.bias"].data.zero_()
    torch.manual_seed(2)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 4, 9], [2, 5, 8, 11]])
    mask = torch.zeros(2, 12, 1, dtype=torch.float64).scatter(1, kept[..., None], 1.0)
    dense = TokenSequence.dense(x)
    short = dense.keep(kept)
    with torch.no_grad():
        alignment = ScanAlignment(mixer.null_delta())
        full, _ = mixer(x * mask, dense, None, "y")
        expected = full.gather(1, kept[..., None].expand(-1, -1, 16))
        found, _ = mixer(short.hidden, short, alignment, "y")
        unaligned, _ = mixer(short.hidden, short, None, "y")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (unaligned - expected).abs().max() > 1e-6  # the test would notice if alignment did nothing


def test_the_two_directions_mirror_each_other() -> None:
    """With equal weights in both branches, a reversed sequence gives the reversed output."""
    mixer = mixer_of(SMALL)
    state = mixer.state_dict()
    for name in list(state):
        twin = "A_b_log" if name == "A_log" else name.replace(".", "_b.") if "." in name else f"{name}_b"
        if twin in state:
            state[twin] = state[name]
    mixer.load_state_dict(state)
    assert torch.equal(mixer.state_dict()["x_proj_b.weight"], mixer.state_dict()["x_proj.weight"])
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        straight, _ = mixer(x, TokenSequence.dense(x), None, "y")
        mirrored, _ = mixer(x.flip(1), TokenSequence.dense(x), None, "y")
    torch.testing.assert_close(mirrored, straight.flip(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("class_token", [True, False])
def test_rope_turns_a_kept_token_by_its_own_position(class_token: bool) -> None:
    rope = RotaryEmbedding(16, (3, 4), class_token=class_token)
    dense = TokenSequence.dense(torch.randn(2, 12 + class_token, 16))
    kept = torch.tensor([[0, 2, 3, 11], [1, 4, 7, 10]])
    short = dense.keep(kept)
    whole = rope(dense.hidden, None)
    assert torch.equal(rope(short.hidden, short.positions), whole.gather(1, kept[..., None].expand(-1, -1, 16)))
    assert torch.equal(whole[:, 0], dense.hidden[:, 0])  # angle 0 for a class token and for the first patch alike
    assert (whole[:, -1] - dense.hidden[:, -1]).abs().max() > 0.1


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
@pytest.mark.parametrize("name", ["v2", "rope, class token in the middle"])
def test_model_is_traced_exported_and_built_on_meta(name: str, pruned: bool) -> None:
    config = replace(SMALL, **OPTIONS[name])
    model = build(config, torch.float32)
    if pruned:
        model.pruner = Halving()
    first, second = images(config, 2, torch.float32), images(config, 4, torch.float32)[2:]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of every shape that is checked, and of its own deprecation
        traced = torch.jit.trace(model, (first,))
        exported = torch.export.export(model, (first,)).module()
        # The same ops. But torch's own convolution and linear layers (oneDNN, MKL) may add in an order that depends on
        # where a tensor lies in memory, and on some processors do: bit for bit only our own ops are the same.
        torch.testing.assert_close(traced(second), model(second), rtol=0, atol=1e-6)
        torch.testing.assert_close(exported(second), model(second), rtol=0, atol=1e-6)
        if not pruned:
            assert copy.deepcopy(model).to("meta")(first.to("meta")).shape == (2, 3)


def test_float16_weights_keep_a_float32_residual_stream() -> None:
    model = build(SMALL, torch.float16)
    with torch.no_grad():
        sequence = model.features(images(SMALL, dtype=torch.float16))
    assert sequence.residual is not None
    assert (sequence.hidden.dtype, sequence.residual.dtype) == (torch.float16, torch.float32)


# --- resizing


def cubic(x: float, a: float = -0.75) -> float:
    """The cubic convolution kernel with PyTorch's coefficient."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("place", ["middle", "head", "double", "none"])
def test_resizing_moves_class_tokens_and_interpolates_patches(place: str) -> None:
    """Class tokens keep their embedding and move to their new place; a ramp over the patches is resampled."""
    config = replace(SMALL, image_size=(64, 64), class_token=place)  # type: ignore[arg-type]
    old, new = class_positions(config.class_token, 64), class_positions(config.class_token, 256)
    state = Vim(config).state_dict()
    ramp = (torch.arange(8.0)[:, None] * 10 + torch.arange(8.0)).reshape(64, 1).expand(64, 16)
    embedding = torch.empty(64 + len(old), 16)
    embedding[[i for i in range(64 + len(old)) if i not in old]] = ramp
    for number, position in enumerate(old):
        embedding[position] = -100.0 - number
    changed, resized = VIM.resize({**state, "pos_embed": embedding[None]}, config, 128)
    assert resized == replace(config, image_size=(128, 128))
    Vim(resized).load_state_dict(changed)
    found = changed["pos_embed"][0]
    for number, position in enumerate(new):
        assert torch.equal(found[position], torch.full((16,), -100.0 - number))
    grid = found[[i for i in range(256 + len(new)) if i not in new]].view(16, 16, 16)
    # Twice as many samples: the centre of pixel i lies at (i + 0.5) / 2 - 0.5 of the old grid. PyTorch's cubic kernel.
    samples = [sum(cubic((i - 0.5) / 2 - j) * j for j in range(8)) for i in range(16)]
    expected = torch.tensor(samples)[:, None] * 10 + torch.tensor(samples)
    torch.testing.assert_close(grid[4:12, 4:12, 0], expected[4:12, 4:12], rtol=0, atol=1e-4)


def test_resizing_recomputes_rotary_tables() -> None:
    config = replace(SMALL, rope=True, class_token="head")
    changed, resized = VIM.resize(Vim(config).state_dict(), config, 40)
    fresh = Vim(resized).state_dict()
    for name in ("rope.freqs_cos", "rope.freqs_sin"):
        assert torch.equal(changed[name], fresh[name]) and changed[name].shape == (25, 16)


def test_vim_is_registered() -> None:
    assert FAMILIES.get("vim") is VIM
