"""Average precision: what pycocotools says, and its bootstrap over images."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ssmprune_cli.data import Annotation, Objects
from ssmprune_cli.errors import UsageError
from ssmprune_cli.tasks import average_precision
from ssmprune_cli.tasks.average_precision import Found, Judgement, coco_tools, draws_of, has_outlines, listed
from ssmprune_cli.tasks.bootstrap import interval

CATEGORIES = (3, 7, 8, 90)
SIZE = (200, 300)


def rectangle(box: tuple[float, ...]) -> str:
    """COCO's encoding of the pixels of a box."""
    mask = np.zeros((*SIZE, 1), dtype=np.uint8)
    left, top, width, height = map(round, box)
    mask[top : top + height, left : left + width] = 1
    _, _, encoding = coco_tools()
    text: str = encoding.encode(np.asfortranarray(mask))[0]["counts"].decode()
    return text


def scene(seed: int, images: int = 12, *, ties: bool = True) -> tuple[list[Objects], list[Found]]:
    """Objects in some images, and detections near most of them and elsewhere; crowds, small and large; equal scores."""
    made = np.random.default_rng(seed)
    targets: list[Objects] = []
    found: list[Found] = []

    def score() -> float:
        return float(made.integers(1, 10)) / 10 if ties else float(made.random())

    for number in range(images):
        annotations: list[Annotation] = []
        boxes: list[tuple[float, ...]] = []
        scores: list[float] = []
        labels: list[int] = []
        for _ in range(made.integers(0, 6)):
            width, height = (float(side) for side in made.integers(8, 140, 2))
            box = (float(made.integers(0, 150)), float(made.integers(0, 60)), width, height)
            label = int(made.integers(0, 3))
            left, top = box[:2]
            outline = [[left, top, left + width, top, left + width, top + height, left, top + height]]
            crowd = bool(made.random() < 0.1)
            annotations.append(Annotation(label, box, width * height, crowd, outline))
            if made.random() < 0.8:
                moved = tuple(max(0.0, side + float(made.integers(-4, 5))) for side in box)
                boxes.append(moved)
                scores.append(score())
                labels.append(label if made.random() < 0.8 else 2)
        for _ in range(made.integers(0, 5)):
            boxes.append((float(made.integers(0, 100)), float(made.integers(0, 60)), 40.0, 30.0))
            scores.append(score())
            labels.append(int(made.integers(0, 4)))
        order = np.argsort([-score for score in scores], kind="stable")
        targets.append(Objects(10 + number, SIZE, CATEGORIES, tuple(annotations)))
        found.append(
            Found(
                tuple(boxes[place] for place in order),
                tuple(scores[place] for place in order),
                tuple(labels[place] for place in order),
                tuple(rectangle(boxes[place]) for place in order),
            )
        )
    return targets, found


@pytest.mark.parametrize("seed", range(4))
def test_every_image_once_is_what_coco_says(seed: int) -> None:
    targets, found = scene(seed)
    for kind in ("bbox", "segm"):
        judged = Judgement(targets, found, kind)
        precision = judged.average_precision()
        assert 0.1 < precision.ap < precision.ap50
        assert judged.resampled(np.ones((1, len(targets))))[0] == pytest.approx(precision.ap, abs=1e-12)
        known = [each for each in judged.by_category() if each is not None]
        assert judged.by_category()[3] is None and np.mean(known) == pytest.approx(precision.ap, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_an_image_that_is_drawn_twice_is_there_twice(seed: int) -> None:
    """A resample is the data set in which images are repeated, or left out; but for detections of one image whose
    scores are equal, of which COCO puts all before those of the repeated image."""
    targets, found = scene(seed, ties=False)
    times = np.random.default_rng(seed).multinomial(len(targets), np.full(len(targets), 1 / len(targets)))
    rows = np.repeat(np.arange(len(targets)), times)
    drawn = [replace(targets[row], image=number) for number, row in enumerate(rows.tolist())]
    expected = Judgement(drawn, [found[row] for row in rows], "bbox").average_precision().ap
    judged = Judgement(targets, found, "bbox")
    assert judged.resampled(times[None].astype(float))[0] == pytest.approx(expected, abs=1e-12)
    assert judged.resampled(np.stack([times, times + times]).astype(float)) == pytest.approx([expected] * 2, abs=1e-12)


def test_right_boxes_are_perfect_and_no_boxes_are_nothing() -> None:
    targets, _ = scene(0)
    right = [
        Found(
            tuple(each.box for each in target.annotations),
            (0.9,) * len(target.annotations),
            tuple(each.label for each in target.annotations),
            tuple(rectangle(each.box) for each in target.annotations),
        )
        for target in targets
    ]
    for kind in ("bbox", "segm"):
        precision = Judgement(targets, right, kind).average_precision()
        assert (precision.ap, precision.ap50, precision.ap_large) == pytest.approx((1, 1, 1))
    nothing = Judgement(targets, [Found((), (), (), ())] * len(targets), "bbox")
    assert nothing.average_precision().ap == 0
    assert nothing.resampled(draws_of(len(targets), nothing.detections)).tolist() == [0] * 1000


def test_what_lies_in_a_crowd_is_judged_neither_way() -> None:
    """COCO encodes crowds by lengths of runs, column by column: here the first 100 columns."""
    crowd = {"size": list(SIZE), "counts": [0, 100 * SIZE[0], 200 * SIZE[0]]}
    square = [[200.0, 20, 240, 20, 240, 60, 200, 60]]
    target = Objects(
        1,
        SIZE,
        CATEGORIES,
        (
            Annotation(0, (0.0, 0.0, 100.0, 200.0), 20000.0, True, crowd),
            Annotation(0, (200.0, 20.0, 40.0, 40.0), 1600.0, False, square),
        ),
    )
    boxes = ((10.0, 10.0, 30.0, 30.0), (200.0, 20.0, 40.0, 40.0))
    found = Found(boxes, (0.9, 0.8), (0, 0), tuple(map(rectangle, boxes)))
    for kind in ("bbox", "segm"):
        assert Judgement([target], [found], kind).average_precision().ap == pytest.approx(1)


def test_sizes_that_no_object_has_are_none() -> None:
    target = Objects(1, SIZE, CATEGORIES, (Annotation(0, (0.0, 0.0, 120.0, 120.0), 14400.0, False, None),))
    found = Found(((0.0, 0.0, 120.0, 120.0),), (0.5,), (0,), ("",))
    precision = Judgement([target], [found], "bbox").average_precision()
    assert precision.ap == precision.ap_large == pytest.approx(1)
    assert precision.ap_small is None and precision.ap_medium is None
    assert not has_outlines([target]) and has_outlines(scene(0)[0])


def test_draws_are_bounded_paired_and_always_the_same() -> None:
    assert draws_of(10, 0).shape == (1000, 10) and draws_of(10, 10**9).shape == (200, 10)
    assert (draws_of(7, 100) == draws_of(7, 100)).all() and (draws_of(7, 100).sum(axis=1) == 7).all()
    assert interval(np.linspace(0, 1, 101), 0.5) == pytest.approx((0.025, 0.975))
    assert interval(np.zeros(3), 0.5) == (0, 0.5)


def test_results_are_in_cocos_own_format() -> None:
    targets, found = scene(1)
    rows: list[dict[str, Any]] = json.loads(json.dumps(listed(targets, found)))
    COCO, _, encoding = coco_tools()
    box = rows[0]["bbox"]
    assert encoding.toBbox(rows[0]["segmentation"]) == pytest.approx([round(side) for side in box])
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": each.image, "height": SIZE[0], "width": SIZE[1]} for each in targets],
        "annotations": [],
        "categories": [{"id": key, "name": "x"} for key in CATEGORIES],
    }
    truth.createIndex()
    assert len(truth.loadRes(rows).getAnnIds()) == len(rows) == sum(len(each.boxes) for each in found)
    assert {row["category_id"] for row in rows} <= set(CATEGORIES)


def test_a_missing_pycocotools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.coco", None)
    with pytest.raises(UsageError, match="pycocotools, which is not installed"):
        average_precision.coco_tools()
