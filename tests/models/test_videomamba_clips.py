"""VideoMamba for videos: golden values, positions in space and time, files, pruning of tokens of several frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import ssmprune_cli as ssmprune
from ssmprune_cli.checkpoint import load
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES, cut_short, resize, sides
from ssmprune_cli.models.common.backbone import Hints, Shapes
from ssmprune_cli.models.mamba.videomamba_clips import (
    VARIANTS,
    VIDEOMAMBA_CLIPS,
    VideoMambaClips,
    VideoMambaClipsConfig,
)
from ssmprune_cli.preprocessing import ClipPreprocessing
from ssmprune_cli.pruning import IMPORTANCES, REDUCTIONS, compress, restore
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.measure.flops import count_flops
from tests.models.shared import Recorder, published_shapes, spread_weights

GOLDEN = Path(__file__).parent.parent / "golden"
PARAMETERS = {"tiny": 7_033_744, "small": 25_568_656, "middle": 73_875_856}  # with 8 frames and 400 classes
SMALL = VideoMambaClipsConfig((16, 16), 4, 4, embed_dim=16, depth=3, num_classes=6, d_state=4, num_frames=4, tubelet=2)
WHOLE = [name for name in REDUCTIONS.names() if not REDUCTIONS.get(name).rectangular]


def build(config: VideoMambaClipsConfig = SMALL, dtype: torch.dtype = torch.float32) -> VideoMambaClips:
    torch.manual_seed(0)
    return spread_weights(VideoMambaClips(config), dtype)


def clips(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("folder", "tubelet"), [("videomamba_clip_mini", 1), ("videomamba_tubelet_mini", 2)])
def test_golden_values_of_the_authors_code(folder: str, tubelet: int, golden_file: Callable[[str], Path]) -> None:
    expected: dict[str, Tensor] = load_file(GOLDEN / folder / "io.safetensors")
    model = load(golden_file(folder), image_size=32)
    assert isinstance(model, VideoMambaClips)
    assert (model.config.num_frames, model.config.tubelet, model.num_tokens) == (4, tubelet, 1 + 16 * 4 // tubelet)
    model.pruner = recorder = Recorder()
    with torch.no_grad():
        found = {"logits": model(expected["input"])}
    for block, sequence in enumerate(recorder.sequences):
        assert sequence.residual is not None
        found[f"layers.{block}.hidden"], found[f"layers.{block}.residual"] = sequence.hidden, sequence.residual
    assert found.keys() | {"input"} == expected.keys()
    # Measured: below 3e-6.
    differences = {key: float((value - expected[key]).abs().max()) for key, value in found.items()}
    assert all(difference < 1e-5 for difference in differences.values()), differences


def test_a_token_has_the_position_of_its_patch_and_of_its_frame() -> None:
    """Of a black clip a token is the bias of the patches and its two positions; the class token has the first one."""
    model = build()
    with torch.no_grad():
        tokens = model.embed(torch.zeros(1, 3, 4, 16, 16)).hidden[0]
    patch, place, frame = model.patch_embed.proj.bias, model.pos_embed[0], model.temporal_pos_embedding[0]
    torch.testing.assert_close(tokens[0], model.cls_token[0, 0] + place[0])
    for tubelet in range(2):
        for spot in range(16):
            expected = patch + place[1 + spot] + frame[tubelet]
            torch.testing.assert_close(tokens[1 + 16 * tubelet + spot], expected)


# --- pruning


def test_a_keep_ratio_of_one_is_the_dense_model() -> None:
    model, images = build(), clips()
    with torch.no_grad():
        dense = model(images)
        compress(model, 1.0, points=[1])
        assert torch.equal(model(images), dense)
        compress(model, 0.5, points=[1])
        assert not torch.allclose(model(images), dense, atol=1e-3)
        restore(model)
        assert torch.equal(model(images), dense)


@pytest.mark.parametrize("reduction", WHOLE)
def test_tokens_of_all_frames_are_reduced_and_a_session_computes_the_same(reduction: str) -> None:
    model, images = build(), clips(3)
    aligned = "none" if not REDUCTIONS.get(reduction).aligned else "auto"
    compress(model, 0.5, points=[1, 2], reduction=reduction, alignment=aligned)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(prepare(model)(images), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(images[1:2]), expected[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("importance", IMPORTANCES.names())
def test_scores_calibrate_on_clips(importance: str) -> None:
    model = build()
    seen = compress(model, 0.5, points=[1], importance=importance, calibration=clips(4), repair="none")
    assert seen is not None and seen.images == 4
    assert model(clips()).isfinite().all()


def test_python_calibrates_on_clips_on_the_disk(tmp_path: Path) -> None:
    """A list of them, in its order, or a folder."""
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for moment in range(4):
            pixels = torch.randint(0, 256, (20, 20, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{moment}.png")
        files.append(tmp_path / name)
    model = build()
    for given in (files, tmp_path):
        seen = ssmprune.compress(model, keep=0.5, points=[1], calibration=given, repair="none")
        assert seen is not None and seen.images == 2


def test_a_grid_of_several_frames_is_not_merged() -> None:
    with pytest.raises(UsageError, match="merges the grid of an image is not for the tokens of 2 frames"):
        compress(build(), 0.5, points=[1], reduction="grid-merge")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3, 16, 16), r"float32 \(2, 3, 16, 16\), and the model takes \(3, 4, 16, 16\)"),
        (torch.zeros(2, 3, 8, 16, 16), r"the model takes \(3, 4, 16, 16\)"),
        (torch.zeros(2, 3, 4, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.full((2, 3, 4, 16, 16), 200.0), "not normalised"),
    ],
)
def test_calibration_arrays_that_are_no_clips_are_refused(given: Tensor, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress(build(), 0.5, points=[1], calibration=given, repair="none")


# --- files


@pytest.mark.parametrize("size", PARAMETERS)
def test_published_shapes_build_and_are_recognised(size: str) -> None:
    shapes, variant = published_shapes(f"clips_videomamba_{size}_f8"), f"videomamba_{size}_f8"
    with torch.device("meta"):
        model = VideoMambaClips(VARIANTS[variant])
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[size]
    for hints in (Hints(), Hints("vim.pth"), Hints(variant=variant)):
        assert VIDEOMAMBA_CLIPS.configure(shapes, hints) == VARIANTS[variant]
        assert [name for name, family in FAMILIES.items() if family.matches(shapes, hints)] == ["videomamba-clips"]
    assert model.preprocessing == ClipPreprocessing(224, 224, "bilinear", frames=8)


def test_classes_frames_and_images_of_other_published_files_are_found() -> None:
    """Something-Something at 288 pixels: 174 classes, 16 frames, 18 x 18 patches."""
    shapes: Shapes = {
        **published_shapes("clips_videomamba_tiny_f8"),
        "head.weight": (174, 192),
        "pos_embed": (1, 1 + 18 * 18, 192),
        "temporal_pos_embedding": (1, 16, 192),
    }
    found = VIDEOMAMBA_CLIPS.configure(shapes, Hints())
    assert found == replace(VARIANTS["videomamba_tiny_f16"], image_size=(288, 288), num_classes=174)


@pytest.mark.parametrize(
    ("change", "hints", "message"),
    [
        ({"temporal_pos_embedding": (8, 192)}, Hints(), "has the shape"),
        ({"head.weight": (400,)}, Hints(), "has the shape"),
        ({}, Hints(settings={"num_frames": (16,)}), "says num_frames 16, and its weights are for 8"),
    ],
)
def test_files_that_do_not_fit_are_refused(change: dict[str, Any], hints: Hints, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        VIDEOMAMBA_CLIPS.configure({**published_shapes("clips_videomamba_tiny_f8"), **change}, hints)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 3}, "no whole number of tubelets"),
        ({"stride": 2}, "do not overlap"),
        ({"tubelet": 0}, "tubelet"),
    ],
)
def test_impossible_configurations_are_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(SMALL, **change)
    assert VideoMambaClipsConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL


def test_inspect_says_frames_tubelet_and_classes(tmp_path: Path) -> None:
    state = {
        key: torch.zeros(shape, dtype=torch.float16)
        for key, shape in published_shapes("clips_videomamba_tiny_f8").items()
    }
    torch.save({"module": state}, tmp_path / "videomamba_t16_k400_f8_res224.pth")
    found = inspect(tmp_path / "videomamba_t16_k400_f8_res224.pth")
    assert (found.family, found.variant, found.task) == (
        "videomamba-clips",
        "videomamba_tiny_f8",
        "video-classification",
    )
    assert (found.frames, found.tubelet, found.num_classes, found.tokens) == (8, 1, 400, 1 + 8 * 196)


def test_clips_of_another_shape_are_refused() -> None:
    with pytest.raises(DataError, match="takes clips of shape"):
        build()(torch.zeros(1, 3, 16, 16))


def test_resizing_and_cutting() -> None:
    model = build()
    smaller, shorter = resize(model, 12), cut_short(model, 1)
    assert smaller(torch.zeros(1, 3, 4, 12, 12)).shape == (1, 6) and 12 in sides(model)
    assert torch.equal(smaller.get_parameter("temporal_pos_embedding"), model.temporal_pos_embedding)
    assert len(shorter.blocks) == 2 and shorter(clips()).shape == (2, 6)


def test_multiply_adds_against_a_formula() -> None:
    d, e, n, tokens = 16, 32, 4, 1 + 2 * 16
    branch = e * 4 + e * (1 + 2 * n) + e + 9 * e * n + e  # convolution, x_proj, dt_proj, scan with D
    block = tokens * (2 * d * e + e * d + 2 * branch)
    model = build()
    count = count_flops(model)
    assert count.per_block == (block,) * 3
    assert count.all_directions == 2 * 16 * d * 3 * 2 * 16 + 3 * block + d * 6
    compress(model, 0.5, points=[1], reduction="drop", alignment="none")  # 16 of 32 patches stay, and the class token
    assert count_flops(model).per_block == (block, block * 17 // 33, block * 17 // 33)
