"""`ssmprune visualize`: the cells that a scripted pruner keeps are the cells that are not faded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli.data import open_dataset
from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import ScanAlignment, ScanStatistics
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.new_model import build
from ssmprune_cli.workflows.visualize import CAPTION, MARGIN, stages, visualize

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

    def wants_delta(self, block: int) -> bool:
        return False

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
    out = tmp_path / "new" / "kept.png"
    visualize(model, open_dataset("npz", tmp_path / "images.npz"), out)
    assert [path.name for path in out.parent.iterdir()] == ["kept.png"]
    shown = np.asarray(Image.open(out))
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
                    np.testing.assert_array_equal(here, np.rint(0.3 * there + 0.7 * np.array([60, 100, 180])))


def test_a_model_that_drops_nothing_is_refused(model: Backbone, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((1, 16, 16), np.uint8))
    with pytest.raises(UsageError, match="drops no tokens"):
        visualize(model, open_dataset("npz", tmp_path / "images.npz"), tmp_path / "kept.png")
    assert not (tmp_path / "kept.png").exists()
