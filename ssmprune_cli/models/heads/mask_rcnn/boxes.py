"""Boxes of detectors: anchors, and the four numbers that move a box to another one.

A box is left, top, right, bottom in pixels. Written from mmdet 3.3.0 (AnchorGenerator, DeltaXYWHBBoxCoder).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ANCHOR_SCALE = 8.0  # side of a square anchor for each pixel of the stride
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # heights over widths
MAX_GROWTH = math.log(1000 / 16)  # a side grows at most by the exponential of this

Size = tuple[int, int]


def anchors(size: Size, stride: int, like: Tensor) -> Tensor:
    """(rows * columns * A, 4): the A anchors around the top left corner of every cell of a map of `size`, of `stride`
    pixels each. Anchors of one cell lie side by side. On the device and in the dtype of `like`."""
    heights = like.new_tensor(ANCHOR_RATIOS).sqrt()
    halves = torch.stack((1 / heights, heights), dim=-1) * (stride * ANCHOR_SCALE / 2)  # (A, 2) x, y
    around = torch.cat((-halves, halves), dim=-1)  # (A, 4)
    y, x = (stride * torch.arange(count, device=like.device, dtype=like.dtype) for count in size)
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    corners = torch.stack((columns, rows, columns, rows), dim=-1)  # (rows, columns, 4)
    return (corners[:, :, None] + around).flatten(0, 2)


def moved(boxes: Tensor, deltas: Tensor, stds: tuple[float, float, float, float], size: Size) -> Tensor:
    """`boxes` (..., 4) moved by `deltas` (..., 4) and cut off at the edges of an image of `size`.

    Deltas move the centre by a share of width and height, and scale these by an exponential. They are in units of
    `stds`.
    """
    deltas = deltas * deltas.new_tensor(stds)
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5
    sides = boxes[..., 2:] - boxes[..., :2]
    centre = centre + sides * deltas[..., :2]
    half = sides * deltas[..., 2:].clamp(-MAX_GROWTH, MAX_GROWTH).exp() * 0.5
    return clipped(torch.cat((centre - half, centre + half), dim=-1), size)


def clipped(boxes: Tensor, size: Size) -> Tensor:
    """`boxes` (..., 4) cut off at the edges of an image of `size`, height and width."""
    height, width = size
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor((width, height, width, height)))
