"""RoIAlign: what a feature map shows inside of boxes, on a grid of n x n cells. He et al., arXiv 1703.06870.

torchvision's is used where it imports. The one here has its semantics with `aligned=True` and `sampling_ratio=0`: each
cell is the mean of ceil(side / n) samples in each direction, bilinear between the centres of the map's cells. Samples
more than one cell outside of the map count as zero. Both directions are independent of each other, so a cell is a
weighted sum over rows of weighted sums over columns. Letters: R boxes, C channels, n cells, S samples of a cell,
K rows of a window, L columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmprune_cli.models.heads.mask_rcnn.vision import torchvision_ops

_AT_ONCE = 1 << 15  # places of the map that windows computed together may cover
_STEP = 8  # windows are computed together if they are alike but for so many rows and columns


def roi_align(features: Tensor, boxes: Tensor, cells: int, stride: int) -> Tensor:
    """(R, C, n, n): `features` (C, H, W), one cell for `stride` pixels, inside of `boxes` (R, 4) in pixels."""
    ops = torchvision_ops()
    if ops is not None:
        exact = features.to(boxes.dtype)
        pooled: Tensor = ops.roi_align(exact[None], [boxes], cells, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled.to(features.dtype)
    result = features.new_empty(len(boxes), features.shape[0], cells, cells)
    if not len(boxes):
        return result
    places = boxes * (1 / stride) - 0.5
    rows = _Axis(places[:, 1], places[:, 3], cells, features.shape[1])
    columns = _Axis(places[:, 0], places[:, 2], cells, features.shape[2])
    lines = features.permute(1, 2, 0).flatten(0, 1).contiguous()  # (H * W, C)
    for members in _alike(torch.stack((rows.extent, columns.extent), dim=1)):
        first, down = rows.weights(members)  # (R, K), (R, n, K)
        second, across = columns.weights(members)  # (R, L), (R, n, L)
        index = first[:, :, None] * features.shape[2] + second[:, None]  # (R, K, L)
        window = lines[index.flatten()].view(*index.shape[:2], -1)  # (R, K, L * C)
        summed = (down.to(window.dtype) @ window).unflatten(2, (index.shape[2], -1))  # (R, n, L, C)
        result[members] = (across[:, None].to(window.dtype) @ summed).permute(0, 3, 1, 2)  # from (R, n, n, C)
    return result


class _Axis:
    """One direction of boxes from `start` to `end` (R,), in cells of a map of `size` cells.

    extent  (R,) how many cells of the map have a part in a box
    """

    def __init__(self, start: Tensor, end: Tensor, cells: int, size: int) -> None:
        self._start, self._side = start, end - start
        self._cells, self._size = cells, size
        first, last = (place.floor().clamp(0, size - 1).long() for place in (start, end))
        self._first, self.extent = first, (last + 2 - first).clamp(max=size)

    def weights(self, members: Tensor) -> tuple[Tensor, Tensor]:
        """For the boxes `members` (R,): the map's cells that have a part in each, (R, K), and how much each of them
        counts for each of the n cells, (R, n, K)."""
        step = (self._side[members] / self._cells)[:, None, None]
        samples = step.ceil()  # of a cell of each box
        number = torch.arange(max(int(samples.max()), 1), device=step.device)  # (S,)
        cell = torch.arange(self._cells, device=step.device)[:, None]
        place = self._start[members][:, None, None] + cell * step + (number + 0.5) * step / samples  # (R, n, S)
        counts = (number < samples) & (place >= -1) & (place <= self._size)
        place = place.clamp(0, self._size - 1)
        low = place.floor()
        share = place - low
        weight = counts / samples
        near = low.long().where(counts, 0) - self._first[members][:, None, None]
        extent = min(int(self.extent[members].max()), self._size)
        found = self._start.new_zeros(len(members), self._cells, extent + 1)
        for offset, part in ((0, 1 - share), (1, share)):
            at = (near + offset).clamp(0, extent)
            found.scatter_add_(2, at, torch.where(counts, part * weight, 0).to(found.dtype))
        window = self._first[members][:, None] + torch.arange(extent, device=step.device)
        return window.clamp(max=self._size - 1), found[:, :, :extent]


def _alike(extents: Tensor) -> list[Tensor]:
    """Indices of boxes whose windows of `extents` (R, 2) rows and columns are computed together."""
    groups = []
    for shape, members in _by(extents.sub(1) // _STEP):
        covered = int((shape + 1).mul(_STEP).prod())
        groups += list(members.split(max(_AT_ONCE // covered, 1)))
    return groups


def _by(keys: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each different row of `keys` (R, 2), and where it stands."""
    rows, which = keys.unique(dim=0, return_inverse=True)
    return [(row, (which == number).nonzero()[:, 0]) for number, row in enumerate(rows)]
