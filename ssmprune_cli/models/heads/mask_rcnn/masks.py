"""Masks of objects, pasted from the grid of their boxes on the image. mmdet 3.3.0 (FCNMaskHead)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.models.heads.mask_rcnn.boxes import Size

THRESHOLD = 0.5


def paste(probabilities: Tensor, boxes: Tensor, size: Size) -> Tensor:
    """(R, H, W) bool: where the probability of an object is at least one half, in an image of `size`.

    probabilities  (R, m, m) of the cells of each of `boxes` (R, 4); between their centres they are bilinear, and beyond
                   them they fall to zero
    """
    height, width = size
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=boxes.device)
    # Beyond its box a mask is below one half, so each is computed there alone.
    low, high = boxes[:, :2].floor().long() - 1, boxes[:, 2:].ceil().long() + 1
    limits = boxes.new_tensor((width, height)).long()
    starts, ends = low.clamp(min=0).tolist(), torch.minimum(high, limits).tolist()
    for mask, cells, box, (left, top), (right, bottom) in zip(masks, probabilities, boxes, starts, ends, strict=True):
        x, y = _places(left, right, box[0], box[2]), _places(top, bottom, box[1], box[3])
        if not (len(x) and len(y)):
            continue
        grid = torch.stack((x.expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
        inside = functional.grid_sample(cells[None, None], grid[None], align_corners=False)[0, 0]
        mask[top:bottom, left:right] = inside >= THRESHOLD
    return masks


def _places(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Where the centres of pixels `start` to `stop` are in a box from `low` to `high`: from -1 to 1."""
    centres = torch.arange(start, max(start, stop), device=low.device, dtype=low.dtype) + 0.5
    places = (centres - low) / (high - low) * 2 - 1
    return places.nan_to_num(posinf=2.0, neginf=-2.0, nan=2.0)  # a box without pixels shows nothing
