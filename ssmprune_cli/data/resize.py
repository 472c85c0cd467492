"""Resizing as the authors of dense models do it: cv2's INTER_LINEAR on uint8, bit for bit, without OpenCV.

A small function of our own rather than opencv-python as an extra: it is 40 MB, replaces an OpenCV that a user has, and
is needed for one function that has not changed for years. Pillow's bilinear filter is none: it widens when an image
shrinks (antialiasing), and differs by up to 91 grey levels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BITS = 11  # of a weight
_ONE = 1 << _BITS

Pixels = NDArray[np.uint8]


def resize_linear(image: Pixels, height: int, width: int) -> Pixels:
    """`image` (H, W, 3) as (height, width, 3): each pixel is a mean of the four around its centre in `image`.

    The weights are integers of 11 bits in each direction; sums are shifted right as OpenCV's loops do. An image of
    half the size in both directions is the rounded mean of four pixels, as there.
    """
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    if (rows, columns) == (2 * height, 2 * width):
        sums = image.reshape(height, 2, width, 2, -1).sum(axis=(1, 3), dtype=np.uint16)  # (height, width, 3)
        halved: Pixels = ((sums + 2) >> 2).astype(np.uint8)
        return halved
    top, below = _weights(rows, height, stop=False)
    left, right = _weights(columns, width, stop=True)

    def across(lines: Pixels) -> NDArray[np.int32]:
        """(height, width, 3), 11 bits larger, and 4 of them dropped: what OpenCV multiplies in 16 bits."""
        first, second = lines[:, left.index], lines[:, right.index]
        return (first * left.weight[:, None] + second * right.weight[:, None]) >> 4

    upper = (across(image[top.index]) * top.weight[:, None, None]) >> 16
    lower = (across(image[below.index]) * below.weight[:, None, None]) >> 16
    return ((upper + lower + 2) >> 2).astype(np.uint8)


class _Side:
    """Of each new pixel: which old one it takes, and its weight."""

    def __init__(self, index: NDArray[np.int64], weight: NDArray[np.int32]) -> None:
        self.index, self.weight = index, weight


def _weights(before: int, after: int, *, stop: bool) -> tuple[_Side, _Side]:
    """The pixel before each new one's centre, and the pixel after it.

    stop  whether a centre beyond the middle of the last pixel takes that one alone. OpenCV does so in a row; between
          rows both are the last one, which only rounds otherwise
    """
    place = ((np.arange(after) + 0.5) * (1 / (after / before)) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    share = place - first.astype(np.float32)
    if stop:
        share[(first < 0) | (first >= before - 1)] = 0
    weights = [np.rint(each * np.float32(_ONE)).astype(np.int32) for each in (np.float32(1) - share, share)]
    near, far = (index.clip(0, before - 1) for index in (first, first + 1))
    return _Side(near, weights[0]), _Side(far, weights[1])
