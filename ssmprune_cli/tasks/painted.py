"""Masks as pictures: classes in colours over the image, and where two masks differ."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # (H, W, 3)
Classes = NDArray[np.uint8]  # (H, W)

_STRENGTH = 0.6  # of a class's colour
_FADE = 0.7  # of what does not differ
_GREY = 128
_DIFFERS = (230, 25, 75)
_STEP = 0.6180339887498949  # of the hue from class to class: the golden ratio, so that no two classes near look alike


def colours(count: int) -> Pixels:
    """(1, count, 3): a colour for each class; always the same."""
    light = (0.95, 0.6)
    values = [
        colorsys.hsv_to_rgb(index * _STEP % 1, 0.85 - 0.3 * (index // 2 % 2), light[index % 2])
        for index in range(count)
    ]
    found: Pixels = np.rint(255 * np.array(values)).astype(np.uint8)[None]
    return found


def painted(image: Pixels, classes: Classes) -> Pixels:
    """`image` under the colours of its `classes`."""
    over = colours(int(classes.max()) + 1)[0][classes]
    return _blended(image, over, np.full(classes.shape, _STRENGTH))


def differing(image: Pixels, one: Classes, other: Classes) -> Pixels:
    """`image` in grey, and in red where the two differ."""
    differs = one != other
    over = np.where(differs[..., None], np.array(_DIFFERS, np.uint8), np.uint8(_GREY))
    grey = image.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2)
    return _blended(grey, over, np.where(differs, 0.85, _FADE * 0.5))


def _blended(image: Pixels, over: Pixels, strength: NDArray[np.float64]) -> Pixels:
    alpha = strength[..., None]
    blended: Pixels = np.rint((1 - alpha) * image + alpha * over).astype(np.uint8)
    return blended
