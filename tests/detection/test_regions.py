"""RoIAlign, suppression, anchors and masks against plain definitions."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.models.heads.mask_rcnn import nms, roi_align, vision
from ssmprune_cli.models.heads.mask_rcnn.boxes import anchors, moved
from ssmprune_cli.models.heads.mask_rcnn.masks import paste
from ssmprune_cli.models.heads.mask_rcnn.nms import suppress
from ssmprune_cli.models.heads.mask_rcnn.roi_head import regions


@pytest.fixture(autouse=True)
def own_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this project, also where torchvision could be had."""
    for module in (nms, roi_align):
        monkeypatch.setattr(module, "torchvision_ops", lambda: None)


# --- RoIAlign


def bilinear(features: Tensor, y: float, x: float) -> Tensor:
    """(C,) of `features` (C, H, W) between the centres of its cells; zero more than a cell outside."""
    height, width = features.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return features.new_zeros(len(features))
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = features[:, top, left] * (1 - x + left) + features[:, top, right] * (x - left)
    lower = features[:, bottom, left] * (1 - x + left) + features[:, bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def direct(features: Tensor, box: list[float], cells: int, stride: int) -> Tensor:
    """(C, n, n): sample by sample."""
    left, top, right, bottom = (side / stride - 0.5 for side in box)
    tall, wide = (bottom - top) / cells, (right - left) / cells
    rows, columns = math.ceil(tall), math.ceil(wide)
    result = features.new_zeros(len(features), cells, cells)
    for i in range(cells):
        for j in range(cells):
            for a in range(rows):
                for b in range(columns):
                    y, x = top + (i + (a + 0.5) / rows) * tall, left + (j + (b + 0.5) / columns) * wide
                    result[:, i, j] += bilinear(features, y, x) / (rows * columns)
    return result


EDGES = st.floats(-30, 130, allow_nan=False).map(lambda value: round(value, 2))


@given(st.lists(st.tuples(EDGES, EDGES, EDGES, EDGES), min_size=1, max_size=6), st.sampled_from([1, 2, 3]))
def test_roi_align_is_the_mean_of_its_samples(edges: list[tuple[float, ...]], cells: int) -> None:
    """Boxes inside of the map, across its edge, outside, and without any extent."""
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in edges], dtype=torch.float64)
    features = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = roi_align.roi_align(features, boxes, cells, 8)
    for number, box in enumerate(boxes.tolist()):
        torch.testing.assert_close(found[number], direct(features, box, cells, 8), rtol=0, atol=1e-12)


def test_roi_align_of_no_boxes_has_a_shape() -> None:
    assert roi_align.roi_align(torch.ones(5, 4, 4), torch.zeros(0, 4), 7, 4).shape == (0, 5, 7, 7)


def test_a_plane_is_read_where_a_box_lies() -> None:
    """Of a map whose value is its x in pixels, each cell of a box shows the x of its centre."""
    x = torch.arange(20, dtype=torch.float64) * 4 + 2
    found = roi_align.roi_align(x.expand(1, 20, -1), torch.tensor([[10.0, 10, 50, 30]], dtype=torch.float64), 4, 4)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([15.0, 25, 35, 45], dtype=torch.float64))


def test_level_of_a_box_goes_by_its_side() -> None:
    """Squares below 112 pixels are read from the first level, below 224 from the second; the last is not read."""
    levels = [torch.full((1, side, side), float(number)) for number, side in enumerate((256, 128, 64, 32, 16))]
    sides = [1, 111, 112, 223, 224, 447, 448, 1000]
    boxes = torch.tensor([[0.0, 0, side, side] for side in sides])
    assert regions(levels, boxes, 1).flatten().round().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# --- suppression


def greedy(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """Box by box, the best first."""
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        rivals = [other for other in kept if groups[other] == groups[index]]
        if all(overlap(boxes[index].tolist(), boxes[other].tolist()) <= threshold for other in rivals):
            kept.append(index)
    return kept


def overlap(one: list[float], other: list[float]) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    union = sum(areas) - width * height
    return width * height / union if union else 0.0


@given(st.integers(0, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 0.7]))
def test_suppression_is_greedy_in_each_group(count: int, seed: int, threshold: float) -> None:
    """Whole coordinates: many boxes touch, coincide or have no area, and many scores are equal."""
    made = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 8, (count, 2), generator=made)
    boxes = torch.cat((corner, corner + torch.randint(0, 6, (count, 2), generator=made)), dim=1).double()
    scores = torch.randint(0, 8, (count,), generator=made) / 8
    groups = torch.randint(0, 3, (count,), generator=made)
    assert suppress(boxes, scores, groups, threshold).tolist() == greedy(boxes, scores, groups, threshold)


def test_a_chain_of_boxes_loses_every_second() -> None:
    """Each overlaps its neighbours alone: what the first takes away takes nothing away itself."""
    left = torch.arange(30.0)
    boxes = torch.stack((left, torch.zeros(30), left + 1.5, torch.ones(30)), dim=1)
    kept = suppress(boxes, torch.linspace(1, 0, 30), torch.zeros(30, dtype=torch.long), 0.1)
    assert kept.tolist() == list(range(0, 30, 2))


# --- torchvision


def test_torchvision_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fake_nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        asked["nms"] = (boxes, threshold)
        return torch.tensor([1])

    def fake_roi_align(*args: Any, **options: Any) -> Tensor:
        asked["roi_align"] = (args[2:], options)
        return torch.zeros(1, 1, 7, 7)

    ops = SimpleNamespace(nms=fake_nms, roi_align=fake_roi_align)
    for module in (nms, roi_align):
        monkeypatch.setattr(module, "torchvision_ops", lambda: ops)
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4]])
    assert suppress(boxes, torch.ones(2), torch.tensor([0, 1]), 0.5).tolist() == [1]
    apart, threshold = asked["nms"]
    assert threshold == 0.5 and overlap(apart[0].tolist(), apart[1].tolist()) == 0
    roi_align.roi_align(torch.ones(1, 4, 4), boxes[:1], 7, 4)
    assert asked["roi_align"] == ((7, 0.25), {"sampling_ratio": 0, "aligned": True})


def test_a_torchvision_of_another_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import raises RuntimeError, since its operators cannot be registered."""
    import builtins

    original = builtins.__import__

    def broken(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", broken)
    vision.torchvision_ops.cache_clear()
    assert vision.torchvision_ops() is None
    vision.torchvision_ops.cache_clear()


def test_own_operators_are_torchvisions() -> None:
    """Where it can be had."""
    ops = pytest.importorskip("torchvision.ops", exc_type=ImportError)
    made = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=made) * 100
    boxes = torch.cat((corner, corner + torch.rand(200, 2, generator=made) * 60), dim=1)
    features, scores = torch.randn(3, 40, 40, generator=made), torch.rand(200, generator=made)
    expected = ops.roi_align(features[None], [boxes], 7, 0.25, sampling_ratio=0, aligned=True)
    torch.testing.assert_close(roi_align.roi_align(features, boxes, 7, 4), expected, rtol=0, atol=1e-5)
    assert torch.equal(suppress(boxes, scores, torch.zeros(200).long(), 0.5), ops.nms(boxes, scores, 0.5))


# --- anchors, boxes and masks


def test_anchors_of_a_cell() -> None:
    """Three shapes of one area around each cell's corner, which the cell's place moves."""
    made = anchors((2, 3), 4, torch.zeros(1, dtype=torch.float64)).view(2, 3, 3, 4)
    sides = made[..., 2:] - made[..., :2]
    torch.testing.assert_close(sides.prod(dim=-1), torch.full((2, 3, 3), 32.0**2, dtype=torch.float64))
    shapes = torch.tensor([0.5, 1, 2], dtype=torch.float64)
    torch.testing.assert_close(sides[..., 1] / sides[..., 0], shapes.expand(2, 3, 3))
    centres = (made[..., :2] + made[..., 2:]) / 2
    torch.testing.assert_close(centres[1, 2], torch.tensor([[8.0, 4]] * 3, dtype=torch.float64))


def test_a_box_moves_grows_and_stays_inside() -> None:
    box = torch.tensor([[10.0, 20, 30, 40]])
    deltas = torch.tensor([[1.0, -1, math.log(2) / 0.5, 0]])
    found = moved(box, deltas, (0.1, 0.1, 0.5, 0.5), (100, 100))
    torch.testing.assert_close(found, torch.tensor([[2.0, 18, 42, 38]]))
    far = moved(box, torch.tensor([[0.0, 0, 100, 100]]), (1, 1, 1, 1), (60, 50))
    assert far.tolist() == [[0, 0, 50, 60]]
    growth = moved(box, torch.tensor([[0.0, 0, 100, 0]]), (1, 1, 1, 1), (60, 9999))
    torch.testing.assert_close(growth[0, 2], torch.tensor(20 + 10 * 1000 / 16))


@pytest.mark.parametrize(
    "box", [[3.2, 4.9, 17.3, 20.1], [-8.0, -3, 40, 33], [5.0, 5, 5, 9], [28.7, 0.1, 40, 3], [50.0, 50, 60, 60]]
)
def test_a_mask_is_sampled_at_the_centres_of_all_pixels(box: list[float]) -> None:
    """Also of those far from the box, which `paste` leaves out."""
    cells = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(1)).mul(0.7).add(0.3)
    found = paste(cells, torch.tensor([box]), (24, 30))
    y, x = (torch.arange(side) + 0.5 for side in (24, 30))
    grid = torch.stack(
        (
            ((x - box[0]) / (box[2] - box[0]) * 2 - 1).expand(24, -1),
            ((y - box[1]) / (box[3] - box[1]) * 2 - 1)[:, None].expand(-1, 30),
        ),
        dim=-1,
    ).nan_to_num(nan=9.0, posinf=9.0, neginf=-9.0)
    expected = functional.grid_sample(cells[None], grid[None], align_corners=False)[0, 0] >= 0.5
    assert torch.equal(found[0], expected)
    assert bool(found.any()) == (box[0] not in (5.0, 50.0))
