"""LocalVMamba: golden values, pruned scans step by step, published shapes, directions that are asked for."""

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
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import ScanAlignment
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.localvmamba.checkpoint import LOCALVMAMBA, VARIANTS
from ssmprune_cli.models.localvmamba.mixer import LocalVMambaMixer
from ssmprune_cli.models.localvmamba.model import LocalVMamba, LocalVMambaConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import REDUCTIONS, compress, restore
from ssmprune_cli.tokens import Dropped, TokenSequence
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure.flops import count_flops
from tests.models.shared import published_shapes, shapes_of, spread_weights

GOLDEN = Path(__file__).parent.parent / "golden"
PARAMETERS = {"tiny": 25_527_160, "small": 49_748_536}  # their paper: 26 M and 50 M
FIRST = ("h", "v_flip", "w2", "w3_flip")
ROUTES = (FIRST, ("h_flip", "v", "w2_flip", "w3"), FIRST)
SMALL = LocalVMambaConfig((16, 16), embed_dim=8, depths=(2, 1), num_classes=3, d_state=4, directions=ROUTES)


def build(config: LocalVMambaConfig = SMALL, dtype: torch.dtype = torch.float64) -> LocalVMamba:
    torch.manual_seed(0)
    return spread_weights(LocalVMamba(config), dtype)


# --- what it computes


def test_golden_values_of_the_authors_code(golden_file: Callable[[str], Path]) -> None:
    """The file says nothing of directions; with them in its `args` it loads. Windows of 7 and of 2 pad its grids."""
    expected: dict[str, Tensor] = load_file(GOLDEN / "localvmamba_mini" / "io.safetensors")
    described = json.loads((GOLDEN / "localvmamba_mini" / "config.json").read_text(encoding="utf-8"))
    file = golden_file("localvmamba_mini")
    state, directions = torch.load(file), described["config"]["directions"]
    torch.save({"state_dict": state, "args": argparse.Namespace(directions=directions)}, file)
    model = load(file, image_size=56, crop=0.875)
    assert isinstance(model, LocalVMamba)
    assert sum(parameter.numel() for parameter in model.parameters()) == described["n_params"] == 384_518
    outputs: list[Tensor] = []
    model.get_submodule("layers.0.blocks.0.op").register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0])
    )
    with torch.no_grad():
        found = {"logits": model(expected["input"])}
        found["layers.0.blocks.0.op.out"] = outputs[0].unflatten(1, (14, 14))
        for number, x in enumerate(model.stage_outputs(expected["input"])):
            found[f"layers.{number}.blocks.out"] = x
    assert found.keys() | {"input"} == expected.keys()
    # Measured: below 3e-6.
    differences = {key: float((value - expected[key]).abs().max()) for key, value in found.items()}
    assert all(difference < 2e-5 for difference in differences.values()), differences


def visited(direction: str, rows: int, columns: int) -> list[int | None]:
    """The position that each step visits, place by place; None for padding."""
    kind, _, flip = direction.partition("_")
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
    found = [row * columns + column if row < rows and column < columns else None for row, column in places]
    return found[::-1] if flip else found


def mixed_by_hand(
    mixer: LocalVMambaMixer,
    x: Tensor,
    kept: list[int],
    grid: tuple[int, int],
    lost: Tensor | None,
    more: list[int],
    *,
    scanned: bool,
) -> Tensor:
    """One image, `x` (G, d), step by step: the outputs at `kept`. The convolution sees the tokens at `more` too, the
    scans do if they are `scanned`, and the gate sees what comes out. A token that is missing lets the state decay for
    its step in `lost` (4, E); padding is a zero after the convolution, with the step of its bias alone."""
    inner, rank = mixer.d_inner, mixer.dt_projs_weight.shape[2]
    state_size = mixer.A_logs.shape[1]
    u, z = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    image = torch.zeros(inner, grid[0] * grid[1], dtype=x.dtype)
    image[:, kept + more] = u[kept + more].T
    convolved = functional.silu(mixer.conv2d(image.view(1, inner, *grid))).flatten(2)[0].T  # (G, E)
    rates, skips = -mixer.A_logs.exp().unflatten(0, (4, -1)), mixer.Ds.unflatten(0, (4, -1))
    total = torch.zeros(len(kept), inner, dtype=x.dtype)
    gate: Any = mixer.multi_scan["attn"]
    for number, direction in enumerate(mixer.routes):
        state, started = torch.zeros(inner, state_size, dtype=x.dtype), False
        result = torch.zeros_like(total)
        for position in visited(direction, *grid):
            if position is not None and position not in kept and not (scanned and position in more):
                if lost is not None and started:
                    state = torch.exp(rates[number] * lost[number][:, None]) * state
                continue
            here = torch.zeros(inner, dtype=x.dtype) if position is None else convolved[position]
            started = True
            ranks, b, c = (mixer.x_proj_weight[number] @ here).split([rank, state_size, state_size])
            delta = functional.softplus(mixer.dt_projs_weight[number] @ ranks + mixer.dt_projs_bias[number])
            state = torch.exp(rates[number] * delta[:, None]) * state + (delta * here)[:, None] * b
            if position in kept:
                result[kept.index(position)] = state @ c + skips[number] * here
        mean = functional.layer_norm(result, (inner,), gate.norm.weight, gate.norm.bias).mean(0)
        total += result * gate.channel_select(functional.gelu(gate.global_reduce(mean))).sigmoid()
    normed: Tensor = mixer.out_norm(total) * functional.silu(z[kept])
    return normed @ mixer.out_proj.weight.T


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("alignment", ["none", "null"])
@pytest.mark.parametrize("kept", [list(range(16)), [0, 3, 5, 6, 8, 12, 13], [8]])
@pytest.mark.parametrize("beside", ["nothing", "context", "frozen"])
def test_a_mixer_step_by_step(number: int, alignment: str, kept: list[int], beside: str) -> None:
    """Every second token that is gone stays beside the others, or none."""
    mixer, grid = build().mixers[number], (4, 4)
    assert isinstance(mixer, LocalVMambaMixer)
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    sequence = TokenSequence.dense(x, grid=grid).keep(torch.tensor([kept]))
    lost = mixer.null_delta() if alignment == "null" else None
    more = [] if beside == "nothing" else [position for position in range(16) if position not in kept][::2]
    given = {}
    if more:
        dropped = Dropped(x[:, more], torch.tensor([more]))
        sequence = replace(sequence, **{beside: dropped})  # type: ignore[arg-type]
        given[beside] = dropped.stream
    aligned = None if lost is None else ScanAlignment(lost)
    with torch.no_grad():
        found, _ = mixer(sequence.hidden, sequence, grid, aligned, "nothing", **given)
        expected = mixed_by_hand(mixer, x[0], kept, grid, lost, more, scanned=beside == "frozen")
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-11)


def test_a_keep_ratio_of_one_is_the_dense_model() -> None:
    model = build(dtype=torch.float32)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        dense = model(images)
        compress(model, 1.0, points=[1])
        assert torch.equal(model(images), dense)
        compress(model, 0.5, points=[1])
        assert not torch.equal(model(images), dense)
        restore(model)
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS.names() if REDUCTIONS.get(name).aligned])
def test_a_session_computes_what_the_model_does(reduction: str) -> None:
    model = build(dtype=torch.float32)
    images = torch.randn(3, 3, 16, 16)
    compress(model, 0.6, points=[1], reduction=reduction)
    session = prepare(model)
    with torch.no_grad():
        torch.testing.assert_close(session(images), model(images), rtol=1e-4, atol=1e-4)
    assert "op by op (each of its scans has a gate of its own)" in str(session.explain())


# --- published shapes, and what is asked for


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes, variant = published_shapes(f"local_vssm_{size}"), f"local_vssm_{size}"
    with torch.device("meta"):
        model = LocalVMamba(VARIANTS[variant])
    assert shapes_of(model) == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]
    for hints in (Hints(), Hints("vmamba.pth"), Hints(variant=variant)):
        assert LOCALVMAMBA.configure(shapes, hints) == VARIANTS[variant]
        assert [name for name, family in FAMILIES.items() if family.matches(shapes, hints)] == ["localvmamba"]
    assert model.preprocessing == Preprocessing(256, 224)


def test_directions_that_nothing_says_are_asked_for() -> None:
    with torch.device("meta"):
        shapes = shapes_of(LocalVMamba(SMALL))
    with pytest.raises(CheckpointError, match="which directions the scans have") as caught:
        LOCALVMAMBA.configure(shapes, Hints(asked_size=16))
    assert "'directions'" in (caught.value.hint or "")
    stated = {"directions": (ROUTES,)}
    found = LOCALVMAMBA.configure(shapes, Hints(settings=stated, asked_size=16, eval_crop_ratio=0.875))
    assert found == SMALL
    assert LocalVMambaConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL


def test_the_model_of_the_search_is_refused() -> None:
    shapes: Shapes = {**published_shapes("local_vssm_tiny"), "layers.0.blocks.0.op.multi_scan.weights": (8, 1, 1, 1)}
    with pytest.raises(CheckpointError, match="the model that the authors search directions with"):
        LOCALVMAMBA.configure(shapes, Hints())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": (FIRST,)}, "3 blocks need directions each"),
        ({"directions": (FIRST[:3], FIRST, FIRST)}, "has 4 scans"),
        ({"directions": (("h", "v", "w2", "d"), FIRST, FIRST)}, "direction d"),
        ({"ssm_ratio": 0.5}, "8 channels or more"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)


def test_cutting_takes_the_directions_of_the_blocks_that_go() -> None:
    long = replace(SMALL, depths=(1, 3, 1), directions=(FIRST, ROUTES[1], FIRST, ROUTES[1], FIRST))
    cut = long.without_blocks(2)
    assert (cut.depths, cut.directions) == ((1, 1, 1), (FIRST, ROUTES[1], FIRST))


def test_inspect_of_a_published_container(tmp_path: Path) -> None:
    state = {key: torch.zeros(shape, dtype=torch.float16) for key, shape in published_shapes("local_vssm_tiny").items()}
    torch.save({"state_dict": state}, tmp_path / "local_vssm_tiny.ckpt")
    found = inspect(tmp_path / "local_vssm_tiny.ckpt")
    assert (found.family, found.variant, found.parameters) == ("localvmamba", "local_vssm_tiny", PARAMETERS["tiny"])
    assert (found.tokens, found.scan_directions) == (56 * 56, 4)


def test_multiply_adds_against_a_formula() -> None:
    def block(tokens: int, d: int, steps: int) -> int:
        e, n, rank = 2 * d, 4, -(-d // 16)
        projected = 4 * e * (rank + 2 * n)
        scanned = steps * (rank * e + 9 * e * n + e)
        return tokens * (d * 2 * e + 9 * e + projected + e * d) + scanned + 4 * 2 * e * (e // 8)

    model = build(dtype=torch.float32)
    count = count_flops(model)
    # Windows of 3 step over 36 places of a grid of 16; over 9 of a grid of 4.
    assert count.per_block == (block(16, 8, 3 * 16 + 36), block(16, 8, 3 * 16 + 36), block(4, 16, 3 * 4 + 9))
    assert count.all_directions == sum(count.per_block) + 16 * 8 * 48 + 4 * 32 * 16 + 16 * 3
    # One direction: what feeds a scan, the scan and its gate, once each.
    repeated = (16 * 4 * 16 * 9 + (3 * 16 + 36) * 608 + 256) * 2 + 4 * 4 * 32 * 9 + (3 * 4 + 9) * 1216 + 1024
    assert count.one_direction == count.all_directions - repeated * 3 // 4
    compress(model, 0.5, points=[1], reduction="drop", alignment="none")
    # In front of the second block 8 of 16 tokens stay, and all 20 places of padding around its windows of 3.
    assert count_flops(model).per_block == (count.per_block[0], block(8, 8, 3 * 8 + 28), block(4, 16, 3 * 4 + 9))
