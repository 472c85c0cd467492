"""How test pipelines of mmsegmentation and mmdetection bring whole images to a dense model.

Versions of before mmcv 2 put the size into `MultiScaleFlipAug`, around the steps; later ones into `Resize` itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ssmprune_cli.errors import shown
from ssmprune_cli.models import MAX_SIDE
from ssmprune_cli.preprocessing import KeepRatio

# Steps that leave an image's size alone. Channels are stated beside the pipeline too, see `stated`.
_PLAIN = {
    *("LoadImageFromFile", "LoadAnnotations", "LoadMultiChannelImageFromFiles"),
    *("Normalize", "ImageToTensor", "DefaultFormatBundle", "Collect", "PackSegInputs", "PackDetInputs"),
}
Fill = Literal["resize", "pad"]


class _Refused(Exception):
    """What of a pipeline is not done here."""


def keep_ratio(
    pipeline: Sequence[Any], stated: Mapping[str, Sequence[Any]], refused: dict[str, str]
) -> KeepRatio | None:
    """The resizing of `pipeline`. None where it resizes to something else, or does more: `refused` then says what.

    stated  settings of the file by name, among which is the padding of a data preprocessor
    """
    try:
        return _resizing(pipeline, stated)
    except _Refused as reason:
        refused["keep_ratio"] = f"its test pipeline {reason}"
        return None


def normalising(pipeline: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of `pipeline` that say mean and deviation of the channels."""
    for step in pipeline:
        inner = step.get("transforms") if isinstance(step, Mapping) else None
        for each in (step, *(inner if isinstance(inner, list | tuple) else ())):
            if isinstance(each, Mapping) and each.get("type") == "Normalize":
                yield each


def _resizing(pipeline: Sequence[Any], stated: Mapping[str, Sequence[Any]]) -> KeepRatio:
    sides: tuple[int, int] | None = None
    fills: dict[Fill, int] = {}
    for kind, step, scale in _steps(pipeline):
        if kind in _PLAIN or (kind == "RandomFlip" and not (step.get("prob") or step.get("flip_ratio"))):
            continue
        if kind in ("Resize", "AlignedResize"):
            sides = _sides(kind, step, scale)
            if kind == "AlignedResize":
                fills["resize"] = _divisor(step, kind)
        elif kind == "ResizeToMultiple":
            fills["resize"] = _divisor(step, kind)
        elif kind == "Pad" and step.get("size") is None and not step.get("pad_to_square"):
            fills["pad"] = _divisor(step, kind)
        else:
            raise _Refused(f"has the step {shown(kind)}, which is not done here")
    for name in ("pad_size_divisor", "test_cfg.size_divisor"):
        for value in stated.get(name, ()):
            if type(value) is int and value > 1:
                fills["pad"] = _divisor({"size_divisor": value}, name)
    if sides is None:
        raise _Refused("resizes no images")
    if len(fills) > 1:
        raise _Refused("fills images up twice, by resizing and by padding")
    long, short = max(sides), min(sides)
    if not fills:
        return KeepRatio(long, short)
    ((fill, divisor),) = fills.items()
    return KeepRatio(long, short, divisor, fill)


def _steps(pipeline: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """Every step with its name and the size that stands around it."""
    for step in pipeline:
        if not isinstance(step, Mapping) or not isinstance(step.get("type"), str):
            raise _Refused("has a step without a name")
        if step["type"] != "MultiScaleFlipAug":
            yield step["type"], step, None
            continue
        if step.get("flip") or step.get("img_ratios") is not None:
            raise _Refused("tests an image at several sizes, or flipped")
        inner = step.get("transforms")
        for each in inner if isinstance(inner, list | tuple) else ():
            if not isinstance(each, Mapping) or not isinstance(each.get("type"), str):
                raise _Refused("has a step without a name")
            yield each["type"], each, step.get("img_scale")


def _sides(kind: str, step: Mapping[str, Any], around: Any) -> tuple[int, int]:
    # Before mmcv 2, sides are in proportion unless a step says that they are not.
    if not step.get("keep_ratio", around is not None):
        raise _Refused("resizes images out of proportion")
    if step.get("interpolation") not in (None, "bilinear"):
        raise _Refused(f"resizes {shown(str(step['interpolation']))}")
    wanted = next((each for each in (step.get("scale"), step.get("img_scale"), around) if each is not None), None)
    sides: Any = [wanted, wanted] if isinstance(wanted, int) else wanted
    are_two = isinstance(sides, list | tuple) and len(sides) == 2 and all(type(each) is int for each in sides)
    if are_two and 1 <= min(sides) <= max(sides) <= MAX_SIDE:
        return sides[0], sides[1]
    raise _Refused(f"resizes images to {shown(str(wanted))} with {shown(kind)}: not a long and a short side")


def _divisor(step: Mapping[str, Any], kind: str) -> int:
    value = step.get("size_divisor", 32)
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        raise _Refused(f"fills images up to {shown(str(value))} with {shown(kind)}")
    return value
