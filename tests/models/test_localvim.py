"""LocalVim: golden values, routes over windows, pruned scans step by step, published shapes, what is asked for."""

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
from torch.nn import functional

from ssmprune_cli.checkpoint import load
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import ScanAlignment
from ssmprune_cli.models import FAMILIES, resize
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.mamba.local_mixer import LocalMixer
from ssmprune_cli.models.mamba.local_routes import steps
from ssmprune_cli.models.mamba.localvim import LOCALVIM, VARIANTS, LocalVim, LocalVimConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import ALIGNMENTS, REDUCTIONS, compress, restore
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure.flops import count_flops
from tests.models.shared import Recorder, published_shapes, shapes_of, spread_weights

GOLDEN = Path(__file__).parent.parent / "golden"
SIZES = ("tiny", "tiny_middle_cls_token", "small")
ROUTES = (("h", "v_flip", "w2", "w3_flip"), ("h_flip", "v", "w2_flip", "w3"))  # w3 does not fill 4 x 4
SMALL = LocalVimConfig((16, 16), 4, 4, embed_dim=16, depth=2, num_classes=3, d_state=4, directions=ROUTES)
MIDDLE = replace(SMALL, class_token="middle", rope=False)


def build(config: LocalVimConfig = SMALL, dtype: torch.dtype = torch.float64) -> LocalVim:
    torch.manual_seed(0)
    return spread_weights(LocalVim(config), dtype)


# --- what it computes


def test_golden_values_of_the_authors_code(tmp_path: Path) -> None:
    """The file says nothing of directions; with them in its `args` it loads. Its windows of 2 pad a 7 x 7 grid."""
    expected: dict[str, Tensor] = load_file(GOLDEN / "localvim_mini" / "io.safetensors")
    given = json.loads((GOLDEN / "localvim_mini" / "config.json").read_text(encoding="utf-8"))["config"]
    state = load_file(GOLDEN / "localvim_mini" / "state_dict.safetensors")
    torch.save({"state_dict": state, "args": argparse.Namespace(directions=given["directions"])}, tmp_path / "mini.pth")
    model = load(tmp_path / "mini.pth")
    assert isinstance(model, LocalVim) and model.image_size == (56, 56)
    assert sum(parameter.numel() for parameter in model.parameters()) == 171_754
    outputs: list[Tensor] = []
    model.get_submodule("layers.0.mixer").register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0])
    )
    model.pruner = recorder = Recorder()
    with torch.no_grad():
        found = {"logits": model(expected["input"]), "pooled_features": model.pool(recorder.sequences[-1])}
    found["mixer0.out"] = outputs[0]
    for block, sequence in enumerate(recorder.sequences):
        assert sequence.residual is not None
        found[f"layers.{block}.hidden"], found[f"layers.{block}.residual"] = sequence.hidden, sequence.residual
    assert found.keys() | {"input"} == expected.keys()
    # Measured: below 2e-6.
    differences = {key: float((value - expected[key]).abs().max()) for key, value in found.items()}
    assert all(difference < 1e-5 for difference in differences.values()), differences


def by_hand(direction: str, rows: int, columns: int, class_token: int | None) -> list[int | None]:
    """The dense position that each step visits, place by place; None for padding."""
    kind, _, flip = direction.partition("_")
    places: list[tuple[int, int]]
    if kind == "h":
        places = [(row, column) for row in range(rows) for column in range(columns)]
    elif kind == "v":
        places = [(row, column) for column in range(columns) for row in range(rows)]
    else:
        size = int(kind[1:])
        places = [
            (top + row, left + column)
            for top in range(0, rows, size)
            for left in range(0, columns, size)
            for row in range(size)
            for column in range(size)
        ]
    found: list[int | None] = []
    for row, column in places:
        patch = row * columns + column
        inside = row < rows and column < columns
        found.append(None if not inside else patch + (class_token is not None and patch >= class_token))
    if flip:
        found.reverse()
    if class_token is not None:
        found.insert(class_token, class_token)
    return found


@pytest.mark.parametrize("direction", ["h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w3", "w3_flip", "w7"])
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 5), (1, 4)])
@pytest.mark.parametrize("middle", [False, True])
def test_routes_place_by_place(direction: str, grid: tuple[int, int], middle: bool) -> None:
    count = math.prod(grid)
    token = count // 2 if middle else None
    route, padding = steps(direction, grid, (count // 2,) if middle else (), torch.device("cpu"))
    expected = by_hand(direction, *grid, token)
    tokens = count + middle
    assert [None if step >= tokens else step for step in route.tolist()] == expected
    assert sorted(route.tolist()) == list(range(tokens + padding)) and padding == expected.count(None)


def mixed_by_hand(mixer: LocalMixer, x: Tensor, kept: list[int], model: LocalVim, steps_lost: Tensor | None) -> Tensor:
    """One image: `x` (L, d) of the tokens at the positions `kept`, step by step. A token that is missing lets the state
    decay for its step in `steps_lost` (directions, E); padding is a token of zeros."""
    inner = mixer.d_inner
    xz = x @ mixer.in_proj.weight.T
    outputs = []
    token = model.protected[0] if model.protected else None
    for number, (direction, branch) in enumerate(zip(mixer.routes, mixer.branches(), strict=True)):
        a = -branch.A_log.exp()
        taps = branch.conv1d.weight[:, 0]
        state = torch.zeros(inner, mixer.d_state, dtype=x.dtype)
        seen = [torch.zeros(inner, dtype=x.dtype)] * (mixer.d_conv - 1)
        result, started = torch.zeros(len(kept), inner, dtype=x.dtype), False
        for position in by_hand(direction, *model.grid, token):
            if position is not None and position not in kept:
                if steps_lost is not None and started:
                    state = torch.exp(a * steps_lost[number][:, None]) * state
                continue
            row = None if position is None else kept.index(position)
            started = True
            seen = [*seen, torch.zeros(inner, dtype=x.dtype) if row is None else xz[row, :inner]][-mixer.d_conv :]
            u = functional.silu((torch.stack(seen, dim=1) * taps).sum(1) + branch.conv1d.bias)
            rank, b, c = (u @ branch.x_proj.weight.T).split(mixer.splits)
            delta = functional.softplus(rank @ branch.dt_proj.weight.T + branch.dt_proj.bias)
            state = torch.exp(a * delta[:, None]) * state + (delta * u)[:, None] * b
            if row is not None:
                result[row] = (state @ c + branch.D * u) * functional.silu(xz[row, inner:])
        gate = mixer.attn
        mean = functional.layer_norm(result, (inner,), gate.norm.weight, gate.norm.bias).mean(0)
        outputs.append(result * gate.channel_select(functional.gelu(gate.global_reduce(mean))).sigmoid())
    return torch.stack(outputs).sum(0) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("config", [SMALL, MIDDLE])
@pytest.mark.parametrize("alignment", ["none", "null"])
@pytest.mark.parametrize("kept", [list(range(17)), [0, 3, 5, 6, 8, 12, 13], [8]])
def test_a_mixer_step_by_step(config: LocalVimConfig, alignment: str, kept: list[int]) -> None:
    model = build(config)
    kept = [position for position in kept if position < model.num_tokens]
    mixer = model.layers[0].mixer
    assert isinstance(mixer, LocalMixer)
    x = torch.randn(1, model.num_tokens, 16, dtype=torch.float64)
    sequence = TokenSequence.dense(x, model.protected, grid=model.grid).keep(torch.tensor([kept]))
    lost = mixer.null_delta() if alignment == "null" else None
    with torch.no_grad():
        found, _ = mixer(sequence.hidden, sequence, None if lost is None else ScanAlignment(lost), "nothing")
        expected = mixed_by_hand(mixer, sequence.hidden[0], kept, model, lost)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("config", [SMALL, MIDDLE])
def test_a_keep_ratio_of_one_is_the_dense_model(config: LocalVimConfig) -> None:
    model = build(config, torch.float32)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        dense = model(images)
        compress(model, 1.0, points=[1])
        assert torch.equal(model(images), dense)
        compress(model, 0.5, points=[1])
        assert not torch.equal(model(images), dense)
        restore(model)
        assert torch.equal(model(images), dense)


def test_frozen_tokens_feed_the_scans_as_if_nothing_had_left() -> None:
    """With a gate that looks at no token: its mean is over live tokens."""
    model = build(replace(MIDDLE, depth=3, directions=(*ROUTES, ROUTES[0])))
    for number in range(3):
        nn.init.zeros_(model.get_parameter(f"layers.{number}.mixer.attn.channel_select.weight"))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    seen = []
    for reduction in (None, "frozen"):
        if reduction:
            compress(model, 0.5, points=[1], reduction=reduction, alignment="none")
        outputs: list[TokenSequence] = []
        handle = model.layers[1].register_forward_hook(lambda _m, _i, out, to=outputs: to.append(out[0]))
        with torch.no_grad():
            model(images)
        handle.remove()
        seen.append(outputs[0])
    dense, kept = seen
    assert kept.positions.shape[1] == 9
    expected = dense.stream.gather(1, kept.positions[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(kept.stream, expected, rtol=0, atol=1e-10)


# --- sessions

PRUNED = [
    (reduction, alignment)
    for reduction in REDUCTIONS.names()
    for alignment in ALIGNMENTS.names()
    if (REDUCTIONS.get(reduction).aligned or alignment == "none")
    and (REDUCTIONS.get(reduction).sized or not ALIGNMENTS.get(alignment).needs_sizes)
    and not ALIGNMENTS.get(alignment).needs_calibration
]


@pytest.mark.parametrize(("reduction", "alignment"), PRUNED)
def test_a_session_computes_what_the_model_does(reduction: str, alignment: str) -> None:
    model = build(MIDDLE, torch.float32)
    images = torch.randn(3, 3, 16, 16)
    compress(model, 0.6, points=[1], reduction=reduction, alignment=alignment)
    session = prepare(model)
    with torch.no_grad():
        torch.testing.assert_close(session(images), model(images), rtol=1e-4, atol=1e-4)
    assert session.kind == "cpu"
    (last,) = (str(step) for step in session.explain().steps if step.last == 2)
    assert "each direction of a block in one call (its directions take routes over the grid)" in last


# --- published shapes, and what is asked for


@pytest.mark.parametrize("size", SIZES)
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes, variant = published_shapes(f"local_vim_{size}"), f"local_vim_{size}"
    with torch.device("meta"):
        assert shapes_of(LocalVim(VARIANTS[variant])) == shapes
    for hints in (Hints(), Hints("vim_tiny.pth"), Hints(model_name="videomamba")):
        assert [name for name, family in FAMILIES.items() if family.matches(shapes, hints)] == ["localvim"]
    assert LOCALVIM.configure(shapes, Hints(variant=variant)) == VARIANTS[variant]
    published = json.loads((GOLDEN / "shapes" / f"{variant}.json").read_text(encoding="utf-8"))["directions"]
    assert VARIANTS[variant].directions == tuple(map(tuple, published))
    if size != "small":
        assert LOCALVIM.configure(shapes, Hints()) == VARIANTS[variant]


def test_directions_that_nothing_says_are_asked_for() -> None:
    with pytest.raises(CheckpointError, match="which directions the scans have") as caught:
        LOCALVIM.configure(published_shapes("local_vim_small"), Hints())
    assert "`--variant local_vim_small` or `--variant local_vim_small_searched`" in (caught.value.hint or "")
    with torch.device("meta"):
        shapes = shapes_of(LocalVim(SMALL))
    with pytest.raises(CheckpointError, match="which directions") as caught:
        LOCALVIM.configure(shapes, Hints())
    assert "'directions'" in (caught.value.hint or "")
    stated = {"directions": (ROUTES,)}
    assert LOCALVIM.configure(shapes, Hints(settings=stated, eval_crop_ratio=0.875)) == SMALL
    with pytest.raises(CheckpointError, match="directions are"):
        LOCALVIM.configure(shapes, Hints(settings={"directions": ("h",)}))
    with pytest.raises(CheckpointError, match="not a LocalVim classifier: 2 blocks need directions each"):
        LOCALVIM.configure(shapes, Hints(settings={"directions": (ROUTES[:1],)}))


@pytest.mark.parametrize("change", [{}, {"norm": "layer"}, {"d_inner": 24, "dt_rank": 3, "d_conv": 3}])
@pytest.mark.parametrize("config", [SMALL, MIDDLE])
def test_options_are_found_from_shapes(config: LocalVimConfig, change: dict[str, Any]) -> None:
    config = replace(config, **change)
    hints = Hints(settings={"directions": (ROUTES,)}, eval_crop_ratio=0.875)
    assert LOCALVIM.configure(shapes_of(LocalVim(config)), hints) == config
    assert LocalVimConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": (("h", "w0"), ("h",))}, "direction w0"),
        ({"directions": (("h",),)}, "2 blocks need directions"),
        ({"directions": ((), ("h",))}, "2 blocks need directions"),
        ({"stride": 2}, "do not overlap"),
        ({"class_token": "head"}, "class token in the middle"),
        ({"class_token": "middle"}, "class token in the middle"),
        ({"d_inner": 4}, "8 channels or more"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, r"head\.weight is missing"),
        ({"layers.0.mixer.A_log_0": (384,)}, "has the shape"),
        ({"pos_embed": (1, 195, 192)}, "195 patch positions"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    changed = published_shapes("local_vim_tiny") | change
    shapes: Shapes = {key: shape for key, shape in changed.items() if shape is not None}
    with pytest.raises(CheckpointError, match=message):
        LOCALVIM.configure(shapes, Hints())


def test_no_stride_is_taken() -> None:
    with pytest.raises(UsageError, match="do not overlap"):
        LOCALVIM.configure(published_shapes("local_vim_tiny"), Hints(stride=8))


# --- files, resizing and multiply-adds


def test_inspect_of_a_published_container(tmp_path: Path) -> None:
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in published_shapes("local_vim_tiny").items()}
    torch.save({"state_dict": state}, tmp_path / "local_vim_tiny.ckpt")
    found = inspect(tmp_path / "local_vim_tiny.ckpt")
    assert (found.family, found.variant, found.parameters) == ("localvim", "local_vim_tiny", 7_994_152)
    assert (found.tokens, found.protected) == (196, ())
    with torch.device("meta"):
        assert LocalVim(replace(VARIANTS["local_vim_tiny"])).preprocessing == Preprocessing(resize=256, crop=224)


def test_resizing_interpolates_positions_and_tables() -> None:
    """As the authors' detectors do; other sizes leave windows that pad."""
    model = build(SMALL, torch.float32)
    smaller = resize(model, 12)
    assert isinstance(smaller, LocalVim) and smaller.grid == (3, 3) and smaller.rope is not None
    assert model.rope is not None

    def bicubic(values: Tensor) -> Tensor:
        grid = values.view(1, 4, 4, 16).permute(0, 3, 1, 2)
        return functional.interpolate(grid, (3, 3), mode="bicubic").flatten(2).transpose(1, 2)

    torch.testing.assert_close(smaller.pos_embed, bicubic(model.pos_embed))
    torch.testing.assert_close(smaller.rope.freqs_cos, bicubic(model.rope.freqs_cos)[0])
    assert smaller(torch.zeros(1, 3, 12, 12)).shape == (1, 3)


def test_multiply_adds_against_a_formula() -> None:
    model, d, e, n = build(MIDDLE, torch.float32), 16, 32, 4
    branch = e * 4 + e * (1 + 2 * n) + e + 9 * e * n + e  # convolution, x_proj, dt_proj, scan with D
    gate = 4 * 2 * e * (e // 8)
    # Windows of 3 step over 36 places of a grid of 16, and the class token.
    block = 17 * (2 * d * e + e * d) + (3 * 17 + 37) * branch + gate
    count = count_flops(model)
    assert count.per_block == (block, block)
    assert count.all_directions == 16 * d * 3 * 16 + 2 * block + d * 3
    assert count.one_direction == count.all_directions - 2 * ((3 * 17 + 37) * branch + gate) * 3 // 4


def test_local_vim_is_registered() -> None:
    assert FAMILIES.get("localvim") is LOCALVIM
