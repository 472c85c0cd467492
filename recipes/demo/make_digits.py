"""Make the demo's images: handwritten digits at a random place, size and angle on cluttered canvases.

    python recipes/demo/make_digits.py            # writes train.npz, test.npz and calib.npz beside this file

Source: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
CC BY 4.0, in the copy of 1,797 images that scikit-learn carries. The digits are split first: no test digit is ever seen
in training, not even as clutter. The result depends on SEED alone.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SEED = 20240911
SIZE = 64  # side of a canvas, pixels
LEVELS = 16  # grey levels: few, so that the committed files compress
TEST_DIGITS = 500
COUNTS = {"train": 24_000, "test": 2_000, "calib": 1_024}

Canvas = NDArray[np.float64]


@dataclass(frozen=True)
class Digits:
    """A pool of source digits: `index` in scikit-learn's order, `images` (n, 8, 8) in 0..1, `labels` (n,)."""

    index: NDArray[np.int64]
    images: NDArray[np.float64]
    labels: NDArray[np.int64]


def load_pools() -> dict[str, Digits]:
    """The two disjoint pools of source digits, "train" and "test"."""
    from sklearn.datasets import load_digits  # imported here: reading the committed files needs no scikit-learn

    source = load_digits()
    order = np.random.default_rng(SEED).random(len(source.target)).argsort()

    def pool(index: NDArray[np.int64]) -> Digits:
        return Digits(index, source.images[index] / 16.0, source.target[index].astype(np.int64))

    return {"train": pool(order[TEST_DIGITS:]), "test": pool(order[:TEST_DIGITS])}


def paste(canvas: Canvas, glyph: Canvas, centre: tuple[float, float], side: float, angle: float, level: float) -> None:
    """Draw `glyph` (h, w) as the lighter of itself and what is there: longer side `side` pixels, turned by `angle`."""
    scale = side / max(glyph.shape)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    dy, dx = rows + 0.5 - centre[0], columns + 0.5 - centre[1]
    padded = np.pad(glyph, 2)  # a dark border for the interpolation to fade into
    y = (math.cos(angle) * dy - math.sin(angle) * dx) / scale + (padded.shape[0] - 1) / 2
    x = (math.sin(angle) * dy + math.cos(angle) * dx) / scale + (padded.shape[1] - 1) / 2
    y, x = np.clip(y, 0, padded.shape[0] - 2), np.clip(x, 0, padded.shape[1] - 2)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    fy, fx = y - top, x - left
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    np.maximum(canvas, level * (upper * (1 - fy) + lower * fy), out=canvas)


def stroke(canvas: Canvas, start: Canvas, end: Canvas, width: float, level: float) -> None:
    """Draw a straight line from `start` to `end` (row, column) with soft edges."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    points = np.stack((rows, columns), axis=-1) + 0.5
    along = end - start
    place = np.clip(((points - start) @ along) / max(float(along @ along), 1e-9), 0, 1)
    distance = np.sqrt((((points - start) - place[..., None] * along) ** 2).sum(-1))
    np.maximum(canvas, level * np.clip(width / 2 + 0.5 - distance, 0, 1), out=canvas)


def draw(rng: Generator, pool: Digits, which: int) -> NDArray[np.uint8]:
    """One canvas (SIZE, SIZE) uint8 that shows digit `which` of `pool`, with clutter made from `pool` only."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(rng.random())

    def choose(count: int) -> int:
        return int(rng.random() * count)

    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1)
    canvas = between(0.0, 0.2) + between(0.0, 0.15) * rows + between(0.0, 0.15) * columns
    for _ in range(1 + choose(3)):
        start = rng.random(2) * SIZE
        length, angle = between(6, 18), between(0, 2 * math.pi)
        end = start + length * np.array([math.sin(angle), math.cos(angle)])
        stroke(canvas, start, end, between(1.0, 2.5), between(0.3, 0.6))
    for _ in range(1 + choose(3)):
        height, width = 2 + choose(3), 2 + choose(3)
        top, left = choose(9 - height), choose(9 - width)
        fragment = pool.images[choose(len(pool.images)), top : top + height, left : left + width]
        centre = (between(0, SIZE), between(0, SIZE))
        paste(canvas, fragment, centre, 3.0 * max(height, width), between(-math.pi, math.pi), between(0.3, 0.6))
    side = between(22, 29)
    centre = (between(side / 2, SIZE - side / 2), between(side / 2, SIZE - side / 2))
    paste(canvas, pool.images[which], centre, side, between(-0.15, 0.15), between(0.8, 1.0))
    canvas = canvas + 0.02 * (rng.random((SIZE, SIZE)) - 0.5)
    levels: NDArray[np.uint8] = np.rint(np.clip(canvas, 0, 1) * (LEVELS - 1)).astype(np.uint8)
    return levels * np.uint8(255 // (LEVELS - 1))


def make(name: str, pools: dict[str, Digits], count: int) -> dict[str, NDArray[Any]]:
    """The first `count` images of the set "train", "test" or "calib" as {"images" (n, 64, 64) uint8, "labels" (n,)}.

    Every digit of the pool comes equally often. Calibration images come from the training pool and carry no labels.
    """
    rng = np.random.default_rng([SEED, list(COUNTS).index(name)])
    pool = pools["test" if name == "test" else "train"]
    order = rng.random(len(pool.index)).argsort()
    chosen = [int(order[i % len(order)]) for i in range(count)]
    images = np.stack([draw(rng, pool, which) for which in chosen])
    return {"images": images} if name == "calib" else {"images": images, "labels": pool.labels[chosen]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the demo's images.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    pools = load_pools()
    for name, count in COUNTS.items():
        arrays = make(name, pools, count)
        np.savez_compressed(out / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        print(f"{out / name}.npz: {count} images, {(out / f'{name}.npz').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
