"""What a user has for calibration images, as batches that a model takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import placed
from ssmprune_cli.preprocessing import KeepRatio, Preprocessing, TextWindow
from ssmprune_cli.pruning.calibration import Prunable

_AT_ONCE = 64  # images of one array that go through the model together
_NORMALISED = 50.0  # beyond it no image is normalised: a channel's 0 to 255 was not scaled
_WANTED = (
    "Give images (B, 3, H, W), normalised floats or uint8, as a tensor or array; or batches of them, as a DataLoader "
    "has: images, or (images, labels)."
)

Images = Tensor | np.ndarray[Any, Any] | Iterable[Any] | os.PathLike[str]  # files are read by `workflows.verbs`


def as_batches(model: Prunable, images: Images) -> Iterable[Tensor]:
    """Batches (B, 3, H, W) of normalised images on the model's device and in its dtype; they can be read twice.

    images  one tensor or array (B, 3, H, W), or batches of them, or pairs (images, labels) as a loader gives. Floats
            are normalised already and as large as the model expects; for a dense model they may be of any size, another
            in each batch. Of uint8, (B, H, W, 3) is taken too, and what the model's preprocessing says is done:
            resized, cropped and normalised. For a language model, numbers of tokens (B, L)

    Raises UsageError, when a batch is read, for what is none of it.
    """
    if isinstance(images, Tensor | np.ndarray):
        parts = torch.as_tensor(images)
        return _Batches(model, parts.split(_AT_ONCE) if parts.ndim == 1 + len(model.input_shape) else [parts])
    if isinstance(images, str | bytes | dict | os.PathLike) or not hasattr(images, "__iter__"):
        raise UsageError(f"a value of type {type(images).__name__} holds no calibration images", hint=_WANTED)
    return _Batches(model, list(images) if isinstance(images, Iterator) else images)


class _Batches(Iterable[Tensor]):
    def __init__(self, model: Prunable, parts: Iterable[Any]) -> None:
        self._model = model
        self._parts = parts

    def __iter__(self) -> Iterator[Tensor]:
        like = next(self._model.parameters())
        for part in self._parts:
            images = part[0] if isinstance(part, tuple | list) and 0 < len(part) <= 2 else part
            if not isinstance(images, Tensor | np.ndarray):
                raise UsageError(f"calibration images are of type {type(images).__name__}", hint=_WANTED)
            prepare = _token_numbers if len(self._model.input_shape) == 1 else _prepared
            yield placed(prepare(torch.as_tensor(images), self._model), like.device, like.dtype)


def _token_numbers(ids: Tensor, model: Prunable) -> Tensor:
    """int64 (B, L). Raises UsageError for what is none of it, DataError for a token that is not in the vocabulary."""
    integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not integer or ids.ndim != 2 or 0 in ids.shape:
        raise UsageError(
            f"calibration text is {ids.dtype} {tuple(ids.shape)}",
            hint="Give numbers of tokens (B, L), as the model's tokenizer makes them, or batches of them.",
        )
    assert isinstance(model.preprocessing, TextWindow)
    vocabulary = model.preprocessing.vocabulary
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise DataError(
            f"the calibration text has a token {int(outside[0])}, and the vocabulary has {vocabulary:,}",
            hint="Is this the model's own tokenizer?",
        )
    return ids.long()


def _prepared(images: Tensor, model: Prunable) -> Tensor:
    if len(model.input_shape) == 4:
        return _clips(images, model.input_shape)
    channels_last = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] != 3
    if images.dtype == torch.uint8 and channels_last:
        images = images.permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UsageError(f"calibration images are {images.dtype} {tuple(images.shape)}", hint=_WANTED)
    if images.dtype == torch.uint8:
        settings = model.preprocessing
        if isinstance(settings, KeepRatio):
            return _in_proportion(images, settings)
        assert isinstance(settings, Preprocessing)
        return _by_preprocessing(images, settings)
    if not images.is_floating_point():
        raise UsageError(f"calibration images are {images.dtype}, neither floats nor uint8", hint=_WANTED)
    if not model.any_size and tuple(images.shape[2:]) != model.image_size:
        found, wanted = ("x".join(map(str, size)) for size in (images.shape[2:], model.image_size))
        raise UsageError(f"calibration images have {found} pixels, and the model takes {wanted}", hint=_WANTED)
    return _normal(images)


def _clips(clips: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Normalised clips (B, 3, T, H, W) of this `shape`; nothing is done to them."""
    if tuple(clips.shape[1:]) != shape or not len(clips) or not clips.is_floating_point():
        raise UsageError(
            f"calibration clips are {clips.dtype} {tuple(clips.shape)}, and the model takes {shape}",
            hint="Give normalised floats (B, channels, frames, height, width), or a folder of clips.",
        )
    return _normal(clips)


def _normal(images: Tensor) -> Tensor:
    """These images, if they are finite and normalised."""
    if not bool(images.isfinite().all()):
        raise DataError("calibration images hold values that are not finite")
    if float(images.abs().max()) > _NORMALISED:
        raise UsageError(
            f"calibration images reach {float(images.abs().max()):g}, so they are not normalised", hint=_WANTED
        )
    return images


def _by_preprocessing(images: Tensor, settings: Preprocessing) -> Tensor:
    """uint8 (B, 3, H, W) of any size, resized, cropped and normalised. float32 (B, 3, crop, crop)."""
    height, width = images.shape[2:]
    long = settings.resize
    if not settings.squeeze:
        long = int(settings.resize * max(height, width) / min(height, width))
    size = (settings.resize, long) if height <= width else (long, settings.resize)
    if size != (height, width):
        if settings.interpolation == "lanczos":
            raise UsageError("arrays are not resized with lanczos", hint=f"Give them {size[0]} x {size[1]} pixels.")
        images = functional.interpolate(images.cpu(), size=size, mode=settings.interpolation, antialias=True)
    height, width = images.shape[2:]
    top, left = round((height - settings.crop) / 2), round((width - settings.crop) / 2)
    return _normalised(images[:, :, top : top + settings.crop, left : left + settings.crop], settings)


def _in_proportion(images: Tensor, settings: KeepRatio) -> Tensor:
    """uint8 (B, 3, H, W) of any size as a dense model takes them, to a grey level: float32 (B, 3, H', W')."""
    sides = height, width = images.shape[2], images.shape[3]
    factor = min(settings.long / max(sides), settings.short / min(sides))
    size = (int(height * factor + 0.5), int(width * factor + 0.5))
    filled = tuple(-(-side // settings.divisor) * settings.divisor for side in size)
    values = images.cpu().float()
    for wanted in (size, filled if settings.fill == "resize" else size):
        if tuple(values.shape[2:]) != wanted:
            values = functional.interpolate(values, size=wanted, mode="bilinear", align_corners=False)
    normalised = _normalised(values.round(), settings)
    return functional.pad(normalised, (0, filled[1] - normalised.shape[3], 0, filled[0] - normalised.shape[2]))


def _normalised(images: Tensor, settings: Preprocessing | KeepRatio) -> Tensor:
    """Pixels of 0 to 255, (B, 3, H, W), in the order and scale of the model."""
    images = images.cpu().flip(1) if settings.channels == "bgr" else images.cpu()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (settings.mean, settings.std))
    return (images.float() / 255 - mean) / std
