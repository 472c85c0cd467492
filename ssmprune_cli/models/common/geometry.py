"""Which image a number of patch positions belongs to. No weight tells: it is stated, published or asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common.backbone import Hints, ImageConfig
from ssmprune_cli.models.common.layers import patch_grid

MAX_SIDE = 1 << 14  # pixels; a larger image is a mistake, and its grid would not fit in memory


def square_side(positions: int) -> int:
    """Rows of the square grid of `positions`. CheckpointError if there is none."""
    rows = math.isqrt(max(positions, 0))
    if rows == 0 or rows * rows != positions:
        raise CheckpointError(f"the {positions} patch positions of pos_embed are not those of a square image")
    return rows


def settle(positions: int, patch: int, hints: Hints, published: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Image side and stride, in pixels, of a model with `positions` patch positions and `patch`-pixel patches.

    What the user says counts first, then what the file says, then a `published` pair (side, stride) that gives as many
    positions. Raises CheckpointError that lists what fits where none of these leaves exactly one reading.
    """
    rows = square_side(positions)
    fitting = [pair for pair in dict.fromkeys(published) if _rows(*pair, patch) == rows]
    if hints.stride is not None:
        if hints.image_size is not None and _rows(hints.image_size, hints.stride, patch) == rows:
            return hints.image_size, hints.stride
        if hints.image_size is None or hints.asked_size is not None:
            return patch + (rows - 1) * hints.stride, hints.stride
        raise _unsettled(
            f"a stride of {hints.stride} does not bring images of {hints.image_size} pixels, as the file says, to "
            f"{positions} patch positions",
            rows,
            patch,
        )
    if hints.image_size is not None:
        if strides := _strides(hints.image_size, rows, patch):
            if len(strides) == 1:
                return hints.image_size, strides[0]
            raise _unsettled(f"images of {hints.image_size} pixels fit several strides", rows, patch)
        if hints.asked_size is None:
            raise _unsettled(
                f"the file says that images have {hints.image_size} pixels, but no stride brings these to {positions} "
                "patch positions",
                rows,
                patch,
            )
    if rows == 1:  # one patch, at any stride
        return patch, patch
    readings = fitting
    if hints.asked_size is not None:
        # The size may be that of the weights, or one that a published model is to be resized to.
        readings = [pair for pair in fitting if (hints.asked_size - patch) % pair[1] == 0]
        room, rest = divmod(hints.asked_size - patch, rows - 1)
        if rest == 0 and 1 <= room <= patch:
            readings = list(dict.fromkeys([(hints.asked_size, room), *readings]))
    if len(readings) == 1:
        return readings[0]
    if hints.asked_size is None:
        problem = "neither the weights nor the file say which image size and stride the model is for"
    elif readings:
        problem = f"images of {hints.asked_size} pixels fit several strides: the weights may be for another size"
    else:
        problem = (
            f"no stride brings images of {hints.asked_size} pixels to {positions} patch positions, and nothing says "
        )
        problem += "which size the weights are for"
    raise _unsettled(problem, rows, patch)


def check_side(side: int, patch: int, stride: int) -> None:
    """UsageError unless patches cover square images of `side` pixels exactly."""
    if not patch <= side <= MAX_SIDE:
        raise UsageError(
            f"images of {side} pixels do not fit patches of {patch}", hint=f"From {patch} to {MAX_SIDE} are possible."
        )
    rest = (side - patch) % stride
    if rest:
        raise UsageError(
            f"patches of {patch} pixels at a stride of {stride} do not fill images of {side} pixels: {rest} are left "
            "over",
            hint=f"Give `--image-size {side - rest}` or `--image-size {side - rest + stride}`.",
        )


def image_fields(hints: Hints, published: ImageConfig | None) -> dict[str, Any]:
    """The fields of ImageConfig: as stated, else as `published`; without both the crop is not known."""
    default = ImageConfig() if published is None else published
    crop = default.eval_crop_ratio if published is not None else None
    return {
        "eval_crop_ratio": hints.eval_crop_ratio if hints.eval_crop_ratio is not None else crop,
        "interpolation": hints.interpolation or default.interpolation,
        "mean": hints.mean or default.mean,
        "std": hints.std or default.std,
        "squeeze": default.squeeze if hints.squeeze is None else hints.squeeze,
        "channels": hints.channels or default.channels,
    }


def no_stride(hints: Hints, model: str) -> None:
    """UsageError if a stride is given for a family whose patches never overlap."""
    if hints.stride is not None:
        raise UsageError(f"the patches of a {model} do not overlap, so there is no `--stride` to choose")


def _rows(side: int, stride: int, patch: int) -> int:
    return patch_grid((side, side), patch, stride)[0] if side >= patch else 0


def _strides(side: int, rows: int, patch: int) -> Sequence[int]:
    """Strides up to `patch` that give `rows`: those whose patches fill the image, or else all of them."""
    if rows == 1:
        return [patch] if side >= patch else []
    strides = [stride for stride in range(1, patch + 1) if _rows(side, stride, patch) == rows]
    return [stride for stride in strides if (side - patch) % stride == 0] or strides


def _unsettled(problem: str, rows: int, patch: int) -> CheckpointError:
    usual = [patch // part for part in (4, 2, 1) if patch % part == 0]
    fit = "; ".join(f"--image-size {patch + (rows - 1) * stride} --stride {stride}" for stride in usual)
    return CheckpointError(
        problem,
        hint=f"{rows * rows} patch positions and {patch}-pixel patches fit: {fit}. A stride of S fits images of "
        f"{patch} + {rows - 1} S pixels. Give the stride that the model was trained with.",
    )
