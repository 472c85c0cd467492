"""`ssmprune visualize`: the cells that a scripted pruner keeps are the cells that are not faded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli.data import open_dataset, some_images
from ssmprune_cli.data.preprocess import preprocess, visible_box
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.efficientvmamba.model import EfficientVMamba, EfficientVMambaConfig
from ssmprune_cli.models.localvmamba.model import LocalVMamba, LocalVMambaConfig
from ssmprune_cli.models.mamba.localvim import LocalVim, LocalVimConfig
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.videomamba import VideoMamba, VideoMambaConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.mambavision.model import MambaVision, MambaVisionConfig
from ssmprune_cli.models.medmamba.model import MedMamba, MedMambaConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import TokenPruner, compress
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.finetune.new_model import build
from ssmprune_cli.workflows.reporting.kept import stages
from ssmprune_cli.workflows.visualize import CAPTION, GREY, HATCH, HEAT, MARGIN, faded, hatched, heat, shade, visualize

SMALL = [
    "image_size=[16, 16]",
    "patch_size=4",
    "stride=4",
    "embed_dim=16",
    "depth=3",
    "num_classes=2",
    "eval_crop_ratio=1.0",
]
# 16 patches and the class token at dense position 8: patch p is at dense position p below 8 and p + 1 from there.
KEPT = {0: [[0, 2, 3, 4, 8, 9, 16], [1, 5, 6, 7, 8, 10, 12]], 1: [[2, 8, 16], [6, 8, 12]]}  # block: dense positions
CELLS = {1: [{0, 2, 3, 4, 8, 15}, {1, 5, 6, 7, 9, 11}], 2: [{2, 15}, {6, 11}]}  # after blocks: patches


class Scripted:
    """Keeps the dense positions that KEPT says; `mask` marks the others as dead instead of dropping them."""

    def __init__(self, *, mask: bool = False) -> None:
        self.mask = mask

    def wants(self, block: int) -> Wanted:
        return "y"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None

    def __call__(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if block not in KEPT:
            return sequence
        wanted = torch.tensor(KEPT[block])  # (2, K)
        live = (sequence.positions[:, :, None] == wanted[:, None, :]).any(dim=2)
        if self.mask:
            return replace(sequence, live=live)
        return sequence.keep(live.nonzero()[:, 1].reshape(2, -1))


@pytest.fixture
def model() -> Backbone:
    return build("vim", SMALL, name="vim_midclstok_div2", seed=0).eval()


@pytest.mark.parametrize("mask", [False, True])
def test_stages_are_the_patches_that_the_pruner_keeps(model: Backbone, mask: bool) -> None:
    model.pruner = Scripted(mask=mask)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(images)
    found, logits = stages(model, images)
    assert torch.equal(logits, expected)
    assert isinstance(model.pruner, Scripted)  # the recorder is gone
    assert [stage.block for stage in found] == [1, 2]  # nothing is dropped after block 3
    for stage in found:
        assert stage.kept.shape == (2, 4, 4)
        assert [set(np.flatnonzero(kept).tolist()) for kept in stage.kept] == CELLS[stage.block]


def test_picture_fades_exactly_the_dropped_cells(model: Backbone, tmp_path: Path) -> None:
    model.pruner = Scripted()
    pixels = np.random.default_rng(0).integers(0, 200, (2, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    out = tmp_path / "new" / "pictures"
    drawn = visualize(model, open_dataset("npz", tmp_path / "images.npz"), out)
    assert {path.name for path in out.iterdir()} == {
        "overview.png",
        *(
            f"{i:02d}_images_{i - 1}_after_{b:02d}_{kind}.png"
            for i in (1, 2)
            for b in (1, 2)
            for kind in ("kept", "score")
        ),
    }
    shown = np.asarray(Image.open(drawn.overview))
    side, cell = 192, 48  # 16 pixels become 192: every pixel is 12 x 12
    for row in range(2):
        original = np.kron(pixels[row], np.ones((12, 12), dtype=np.uint8))[..., None].repeat(3, axis=2)
        top = CAPTION + MARGIN + row * (side + CAPTION + MARGIN)
        for column, cells in enumerate([set(range(16)), CELLS[1][row], CELLS[2][row]]):
            left = MARGIN + column * (side + MARGIN)
            tile = shown[top : top + side, left : left + side]
            for patch in range(16):
                y, x = patch // 4 * cell, patch % 4 * cell
                here, there = tile[y : y + cell, x : x + cell], original[y : y + cell, x : x + cell]
                if patch in cells:
                    np.testing.assert_array_equal(here, there)
                else:
                    lines = (here == HATCH[0]).all(axis=2) | (here == HATCH[1]).all(axis=2)
                    assert 0.3 < lines.mean() < 0.4  # a light and a dark line, and four times their width between
                    np.testing.assert_array_equal(here[~lines], np.rint(0.3 * there + 0.7 * 128)[~lines])


def test_a_model_that_drops_nothing_is_refused(model: Backbone, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((1, 16, 16), np.uint8))
    with pytest.raises(UsageError, match="drops no tokens"):
        visualize(model, open_dataset("npz", tmp_path / "images.npz"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_are_those_that_decide(model: Backbone) -> None:
    compress(model, 0.5, points=[1, 2], reduction="drop", alignment="none")
    found, _ = stages(model, torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    gone = np.zeros((3, 4, 4), dtype=bool)
    for stage, left in zip(found, (8, 4), strict=True):
        assert stage.count == left
        np.testing.assert_array_equal(np.isnan(stage.score), gone)  # a patch is scored as long as it is there
        for kept, score in zip(stage.kept, stage.score, strict=True):
            dropped = ~kept & ~np.isnan(score)
            assert score[kept].min() >= score[dropped].max()
        gone = ~stage.kept


def test_heat_runs_from_the_lowest_to_the_highest_score_and_shows_what_is_gone() -> None:
    colours, strength = heat(np.array([[1.0, 5.0], [3.0, np.nan]], np.float32))
    np.testing.assert_array_equal(colours, [[HEAT[0], HEAT[4]], [HEAT[2], GREY]])
    np.testing.assert_array_equal(strength, [[0.6, 0.6], [0.6, 0.7]])
    colours, _ = heat(np.full((2, 2), 7.0, np.float32))  # nothing to tell apart: the middle
    assert (colours == np.array(HEAT[2])).all()
    colours, strength = heat(np.full((2, 2), np.nan, np.float32))
    assert (colours == np.array(GREY)).all() and (strength == 0.7).all()


def test_cells_lie_where_the_model_sees_them_and_the_rest_is_grey() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    shown = shade(image, *faded(np.array([[True, False], [False, True]])), (2, 0, 6, 4))
    grey, black = np.rint(0.7 * np.array(GREY)), np.zeros(3)
    row = [grey, grey, grey, grey, black, black, grey, grey]
    other = [grey, grey, black, black, grey, grey, grey, grey]
    np.testing.assert_array_equal(shown, np.array([row, row, other, other]))


@pytest.mark.parametrize("ground", [(255, 255, 255), (135, 206, 235), (128, 128, 128), (0, 0, 0)])
def test_dropped_patches_are_told_from_every_ground(ground: tuple[int, int, int]) -> None:
    """Snow, sky, fog and night: a kept patch is as it was, a dropped one has lines far from it, crop or not."""
    image = np.broadcast_to(np.array(ground, np.uint8), (32, 64, 3)).copy()
    gone = np.array([[True, False]])
    shown = hatched(shade(image, *faded(gone), (16, 0, 64, 32)), gone, (16, 0, 64, 32))
    np.testing.assert_array_equal(shown[:, 40:], image[:, 40:])
    dropped, left_out = (part.reshape(-1, 3).astype(int) for part in (shown[:, 16:40], shown[:, :16]))
    assert len(np.unique(left_out, axis=0)) == 1 and len(np.unique(dropped, axis=0)) == 3
    assert np.abs(dropped - np.array(ground)).max(axis=1).max() > 90
    assert not ((dropped[:, 2] > dropped[:, 0] + 50).mean() > 0.05)  # never blue


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (40, 40), (33, 70)])
def test_visible_box_is_what_preprocessing_crops(size: tuple[int, int]) -> None:
    """A ramp of columns (rows): the model's first and last pixels are those at the ends of the box."""
    way = Preprocessing(resize=72, crop=64, interpolation="bilinear", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    left, top, right, bottom = visible_box(size, way)
    assert right - left == pytest.approx(bottom - top)
    for axis, (start, stop) in enumerate(((left, right), (top, bottom))):
        ramp = np.arange(size[axis], dtype=np.float64) * 2
        grid = np.broadcast_to(ramp if axis == 0 else ramp[:, None], (size[1], size[0]))
        seen = preprocess(Image.fromarray(grid.astype(np.uint8)), way)[0] * 255 / 2 + 0.5  # centres of pixels
        line = seen[32] if axis == 0 else seen[:, 32]
        half = (stop - start) / 64 / 2
        # One pixel of tolerance: the crop is rounded to whole pixels of the resized image, and the ends are smoothed.
        assert float(line[0]) == pytest.approx(start + half, abs=1.0)
        assert float(line[-1]) == pytest.approx(stop - half, abs=1.0)


def test_pictures_have_the_aspect_ratio_of_the_image(model: Backbone, tmp_path: Path) -> None:
    model.pruner = Scripted()
    for name, size in (("wide.png", (60, 20)), ("tall.png", (300, 500))):
        Image.new("RGB", size, "white").save(tmp_path / name)
    drawn = visualize(model, some_images(tmp_path, 9, 0), tmp_path / "out")
    sizes = {}
    for entry in drawn.images:
        with Image.open(entry["stages"][0]["kept"]) as image:
            sizes[entry["name"]] = image.size
    assert sizes == {"wide.png": (420, 140), "tall.png": (300, 500)}  # the small one is seven times as large


SIZES: dict[str, Any] = {"image_size": (16, 16), "patch_size": 4, "embed_dim": 8, "depth": 3, "num_classes": 2}
FAMILIES: dict[str, Callable[[], Backbone]] = {
    "vim": lambda: Vim(VimConfig(**SIZES, stride=4)),
    "vim, overlapping patches": lambda: Vim(VimConfig(**{**SIZES, "patch_size": 8}, stride=4)),
    "videomamba": lambda: VideoMamba(VideoMambaConfig(**SIZES, stride=4)),
    "mambar": lambda: MambaReg(MambaRegConfig(**SIZES, stride=4)),
    "localvim": lambda: LocalVim(LocalVimConfig(**SIZES, stride=4, class_token="middle", rope=False)),
    "plainmamba": lambda: PlainMamba(PlainMambaConfig(**SIZES)),
    "vmamba": lambda: VMamba(VMambaConfig(image_size=(16, 16), embed_dim=8, depths=(2, 2), num_classes=2)),
    "efficientvmamba": lambda: EfficientVMamba(EfficientVMambaConfig((32, 32), 8, (2, 2, 1, 1), num_classes=2)),
    "mambavision": lambda: MambaVision(MambaVisionConfig((64, 64), 8, 8, (1, 1, 3, 1), (1, 1, 2, 2), num_classes=2)),
    "localvmamba": lambda: LocalVMamba(LocalVMambaConfig((16, 16), embed_dim=8, depths=(2, 2), num_classes=2)),
    "medmamba": lambda: MedMamba(MedMambaConfig(image_size=(16, 16), embed_dim=8, depths=(2, 2), num_classes=2)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", ["context", "frozen", "local-merge"])
def test_every_family_is_drawn_on_its_grid(family: str, reduction: str, tmp_path: Path) -> None:
    """As many cells stay as the schedule says, the best of those that were there, and a wide image stays wide."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    points = [1, 3] if family in ("vmamba", "localvmamba", "medmamba", "efficientvmamba") else [1, 2]
    compress(model, 0.5, points=points, reduction=reduction)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    drawn = visualize(model, some_images(tmp_path / "wide.png", 1, 0), tmp_path / "out")
    assert isinstance(model.pruner, TokenPruner)
    assert [stage.block for stage in drawn.stages] == points
    assert tuple(stage.count for stage in drawn.stages) == model.pruner.settings.schedule.tokens
    for stage in drawn.stages:
        grid = next(each.grid for each in model.stages if each.start < stage.block <= each.stop)
        assert stage.kept.shape == stage.score.shape == (1, *grid)
        kept, gone = stage.kept[0], ~stage.kept[0] & ~np.isnan(stage.score[0])
        assert np.isfinite(stage.score[0][kept]).all()
        assert stage.score[0][kept].min() >= stage.score[0][gone].max()
    (entry,) = drawn.images
    for stage_files in entry["stages"]:
        for kind in ("kept", "score"):
            with Image.open(stage_files[kind]) as image:
                assert image.size == (400, 200)


def test_a_folder_that_is_a_file_is_named(model: Backbone, tmp_path: Path) -> None:
    model.pruner = Scripted()
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 16, 16), np.uint8))
    with pytest.raises(DataError, match="cannot be written") as raised:
        visualize(model, open_dataset("npz", tmp_path / "images.npz"), tmp_path / "images.npz")
    assert raised.value.where == str(tmp_path / "images.npz" / "overview.png")
