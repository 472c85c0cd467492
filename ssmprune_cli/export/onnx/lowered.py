"""PyTorch's operators that ONNX lacks, or that runtimes read in several ways, by those that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ATEN = torch.ops.aten


def _sorted(values: Tensor, dim: int, descending: bool) -> tuple[Tensor, Tensor]:
    """A stable sort as `TopK` of all. Integers get keys that differ: runtimes do not agree about equals."""
    count = values.shape[dim]
    if values.is_floating_point():
        return values.topk(count, dim, largest=descending)
    shape = [1] * values.ndim
    shape[dim] = count
    place = torch.arange(count, device=values.device).view(shape)
    keys = values.long() * count + (count - 1 - place if descending else place)
    index = keys.topk(count, dim, largest=descending).indices
    return values.gather(dim, index), index


def _sort(values: Tensor, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    return _sorted(values, dim, descending)


def _sort_stable(
    values: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return _sorted(values, dim, descending)


def _argsort(values: Tensor, dim: int = -1, descending: bool = False) -> Tensor:
    return _sorted(values, dim, descending)[1]


def _argsort_stable(values: Tensor, *, stable: bool, dim: int = -1, descending: bool = False) -> Tensor:
    return _sorted(values, dim, descending)[1]


def _searchsorted(ascending: Tensor, wanted: Tensor, **options: Any) -> Tensor:
    """Of each of `wanted` (B, n) how many of `ascending` (B, L) are below it."""
    return (ascending[:, None] < wanted[..., None]).long().sum(dim=2)


def _pool(images: Tensor, size: list[int]) -> Tensor:
    """Means of windows that share rows, then columns, evenly: images (B, C, H, W) to (B, C, *size)."""
    for dim, count in ((2, size[0]), (3, size[1])):
        given = images.shape[dim]
        windows = [(number * given // count, -(-(number + 1) * given // count)) for number in range(count)]
        means = [images.narrow(dim, start, stop - start).mean(dim=dim, keepdim=True) for start, stop in windows]
        images = torch.cat(means, dim=dim)
    return images


LOWERED: dict[Any, Callable[..., Any]] = {
    _ATEN.sort.default: _sort,
    _ATEN.sort.stable: _sort_stable,
    _ATEN.argsort.default: _argsort,
    _ATEN.argsort.stable: _argsort_stable,
    _ATEN.searchsorted.Tensor: _searchsorted,
    _ATEN.adaptive_avg_pool2d.default: _pool,
    _ATEN._adaptive_avg_pool2d.default: _pool,
}
