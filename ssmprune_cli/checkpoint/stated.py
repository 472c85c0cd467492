"""What a file says of its model beside the weights: image, preprocessing and settings, in any container that says it.

Read from `args` (DeiT, Vim, VideoMamba, timm), `config` (yacs, as Swin's and VMamba's scripts store it), `cfg` and
`meta` (mmcv and mmengine: a text of Python, parsed and never run), hyper-parameters (Lightning) and JSON. Each is
heeded, or refused by name; one that the family knows nothing of is in `Hints.settings`.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssmprune_cli.checkpoint.pipelines import keep_ratio, normalising
from ssmprune_cli.errors import CheckpointError, listing, shown
from ssmprune_cli.models import MAX_SIDE, Hints
from ssmprune_cli.preprocessing import INTERPOLATIONS, KeepRatio, Triple

# Entries of a container that may state something; others are weights, or of the training.
SECTIONS = (
    *("args", "config", "cfg", "opt", "hparams", "hyper_parameters", "model_args", "model_config"),
    *("meta", "metadata", "__metadata__"),
)
_SIZES = ("input_size", "img_size", "image_size")
_CROPS = ("eval_crop_ratio", "crop_pct")
# What is in these has its section's name too: other sections have settings of the same names.
_NAMED_WHOLE = ("test", "test_cfg", "decode_head", "data_preprocessor")
_MAX_CLASSES = 1 << 16
_MAX_PAIRS = 64
_MAX_BLOCKS, _MAX_NAMES = 256, 16
_MAX_TEXT = 1 << 20  # characters of a configuration in text
_MAX_ENTRIES = 50_000
_MAX_DEPTH = 24


@dataclass
class _Found:
    """Distinct values by lower-case name, in order, and the stretches of a test pipeline."""

    values: dict[str, list[Any]] = field(default_factory=dict)
    pipelines: list[Sequence[Any]] = field(default_factory=list)
    inner_pipelines: list[Sequence[Any]] = field(default_factory=list)  # of the data set to test on
    entries: int = 0

    def add(self, name: str, value: Any) -> None:
        known = self.values.setdefault(name.lower(), [])
        if not any(type(value) is type(other) and value == other for other in known):
            known.append(value)


def hints(filename: str, content: Mapping[Any, Any]) -> Hints:
    """What `content`, a container or its like, says. Raises CheckpointError for statements that contradict."""
    found = _Found()
    for name in SECTIONS:
        _collect(content.get(name), found, name, 0)
    refused: dict[str, str] = {}
    name = _model_name(content)
    size = _one(found, _SIZES, _side, "the image size")
    crop = _one(found, _CROPS, _ratio, "the crop")
    interpolation = _interpolation(found, refused)
    centre = _one(found, ("test.crop",), _flag, "TEST.CROP")
    squeeze: bool | None = None
    if crop is None and centre is not None:
        # Swin's scripts: 256 pixels for a crop of 224, or both sides straight to 224.
        crop, squeeze = (0.875, False) if centre else (1.0, True)
    whole: KeepRatio | None = None
    for pipeline in (found.pipelines or found.inner_pipelines)[:1]:
        whole = keep_ratio(pipeline, found.values, refused)
        for step in normalising(pipeline):
            for key in ("mean", "std"):
                if isinstance(step.get(key), list | tuple):
                    found.add(key, tuple(step[key]))
            if isinstance(step.get("to_rgb"), bool):
                found.add("to_rgb", step["to_rgb"])
        size, crop, squeeze, interpolation = _of_pipeline(pipeline, size, crop, squeeze, interpolation, refused)
    red_first = _one(found, ("to_rgb", "bgr_to_rgb"), _flag, "whether red comes first")
    strides = re.findall(r"stride_?(\d{1,3})(?!\d)", name.lower())
    stride = int(strides[0]) if strides else _one(found, ("patch_stride",), _stride, "the stride")
    return Hints(
        filename=filename,
        model_name=name,
        image_size=size,
        stride=stride,
        eval_crop_ratio=crop,
        interpolation=interpolation,  # type: ignore[arg-type]  # one of INTERPOLATIONS
        mean=_one(found, ("mean",), _triple, "the mean"),
        std=_one(found, ("std",), _triple, "the deviation"),
        squeeze=squeeze,
        channels=None if red_first is None else "rgb" if red_first else "bgr",
        keep_ratio=whole,
        class_names=_class_names(content),
        settings={key: tuple(values) for key, values in found.values.items()},
        refused=refused,
    )


def plain(value: Any) -> Any:
    """A setting's value as the families list it: names in lower case, without the module of a class."""
    return re.split(r"[.']", value.strip("'<> ").lower())[-1] if isinstance(value, str) else value


def _collect(value: Any, found: _Found, name: str, depth: int, *, tests: bool = False) -> None:
    """`tests`: whether this is about the data to test on."""
    if depth > _MAX_DEPTH or found.entries > _MAX_ENTRIES:
        raise CheckpointError(f"its `{shown(name)}` is too long or too deep to be a configuration")
    if isinstance(value, str) and depth <= 1 and name in (*SECTIONS, "config", "cfg"):
        value = _parse(value)
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        found.entries += 1
        if not isinstance(key, str) or key == "auxiliary_head":  # which only training uses
            continue
        full = f"{name}.{key}" if name.lower() in _NAMED_WHOLE else None
        if isinstance(inner, Mapping):
            if isinstance(inner.get("type"), str):
                found.add(key, inner["type"])
                if full:
                    found.add(full, inner["type"])
            _collect(inner, found, key, depth + 1, tests=tests or key in ("test", "test_dataloader"))
        elif isinstance(inner, str | bool | int | float):
            found.add(key, inner)
            if full:
                found.add(full, inner)
            if key == "stride" and "patch_size" in value:
                found.add("patch_stride", inner)
            if key in SECTIONS:
                _collect(inner, found, key, depth + 1)
        elif isinstance(inner, list | tuple):
            if key == "test_pipeline":
                found.pipelines.append(inner)
            elif key == "pipeline" and tests:
                found.inner_pipelines.append(inner)
            elif len(inner) <= 4 and all(isinstance(each, int | float) for each in inner):
                found.add(key, tuple(inner))
                if full:
                    found.add(full, tuple(inner))
            elif _is_table(inner):
                found.add(key, tuple(map(tuple, inner)))


def _is_table(values: Sequence[Any]) -> bool:
    """Whether these are pairs, or a short list of names for each block, as LocalVim has them of scan directions."""
    if not all(isinstance(each, list | tuple) for each in values):
        return False
    pairs = len(values) <= _MAX_PAIRS and all(len(each) == 2 for each in values)
    names = all(len(each) <= _MAX_NAMES and all(isinstance(name, str) for name in each) for each in values)
    return pairs or (names and len(values) <= _MAX_BLOCKS)


def _parse(text: str) -> Any:
    """A configuration in text, JSON or the assignments of a Python file, as plain values; None if it is neither."""
    if len(text) > _MAX_TEXT:
        raise CheckpointError(f"holds a configuration of {len(text):,} characters, too long to be one")
    try:
        if text.lstrip().startswith("{"):
            return json.loads(text)
        module = ast.parse(text)
        return {
            target.id: _value(statement.value, 0)
            for statement in module.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, depth: int) -> Any:
    """The plain value of an expression; None for whatever is computed."""
    if depth > _MAX_DEPTH:
        return None
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each, depth + 1) for each in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _value(value, depth + 1) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {each.arg: _value(each.value, depth + 1) for each in node.keywords if each.arg}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, depth + 1)
        return -inner if isinstance(inner, int | float) else None
    return None


def _model_name(content: Mapping[Any, Any]) -> str:
    """As the training script calls the model: `args.model`, or `MODEL.NAME` of a yacs configuration."""
    for section in SECTIONS:
        values = content.get(section)
        if not isinstance(values, Mapping):
            continue
        inner = values.get("MODEL")
        names = [values.get(key) for key in ("model", "model_name", "arch")]
        names.append(inner.get("NAME") if isinstance(inner, Mapping) else None)
        for name in names:
            if isinstance(name, str) and name:
                return name[:1000]
    return ""


def _class_names(content: Mapping[Any, Any]) -> tuple[str, ...]:
    """Names of the classes, as mmcv (`CLASSES`) and mmengine (`dataset_meta`) store them; none where there are none."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return ()
    inner = meta.get("dataset_meta")
    for values in (meta, inner if isinstance(inner, Mapping) else {}):
        for key in ("CLASSES", "classes"):
            names = values.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(each, str) for each in names):
                if len(names) > _MAX_CLASSES:
                    raise CheckpointError(f"names {len(names):,} classes")
                return tuple(map(str, names))
    return ()


def _one(found: _Found, names: Sequence[str], read: Any, title: str) -> Any:
    """The one value that `read` makes of what the file says under `names`. CheckpointError if there are several."""
    values = [value for name in names for stated in found.values.get(name, []) for value in read(stated, name)]
    distinct = list(dict.fromkeys(values))
    if len(distinct) > 1:
        raise CheckpointError(
            f"says {title} more than once, and not the same: {listing(distinct)}",
            hint="Save its weights alone, torch.save({'model': weights}, 'clean.pth'), and say what holds: see --help.",
        )
    return distinct[0] if distinct else None


def _side(value: Any, name: str) -> Iterator[int]:
    """Of a number, (height, width) or (channels, height, width); two where these differ."""
    sides: set[Any] = set(value[-2:]) if isinstance(value, tuple) and len(value) in (2, 3) else {value}
    for side in sides:
        if type(side) is int and 0 < side <= MAX_SIDE:
            yield side


def _stride(value: Any, name: str) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIDE:
        yield value


def _flag(value: Any, name: str) -> Iterator[bool]:
    if isinstance(value, bool):
        yield value


def _ratio(value: Any, name: str) -> Iterator[float]:
    if isinstance(value, float | int) and not isinstance(value, bool) and 0.01 <= value <= 1:
        yield float(value)


def _triple(value: Any, name: str) -> Iterator[Triple]:
    """Three numbers, which may be for pixels of 0 to 255."""
    if isinstance(value, tuple) and len(value) == 3:
        numbers = [float(each) for each in value]
        scale = 255.0 if max(map(abs, numbers)) > 2 else 1.0
        if all(map(math.isfinite, numbers)) and (name != "std" or min(numbers) > 0):
            red, green, blue = (round(each / scale, 12) for each in numbers)  # 57.12 of 255 is 0.224
            yield (red, green, blue)


def _interpolation(found: _Found, refused: dict[str, str]) -> str | None:
    stated = [str(value).lower() for value in found.values.get("interpolation", []) if value not in ("", None)]
    names = list(dict.fromkeys(stated))
    if len(names) == 1 and names[0] in INTERPOLATIONS:
        return names[0]
    if names:
        known = " or ".join(INTERPOLATIONS)
        refused["interpolation"] = f"the file says interpolation {listing(names)}, and here it is {known}"
    return None


def _of_pipeline(
    steps: Sequence[Any],
    size: int | None,
    crop: float | None,
    squeeze: bool | None,
    interpolation: str | None,
    refused: dict[str, str],
) -> tuple[int | None, float | None, bool | None, str | None]:
    """Image side, crop, whether both sides are resized, and interpolation of an mmcls or mmpretrain test pipeline; what
    else it does to the image is `refused`."""
    resized: int | None = None
    for step in steps:
        if not isinstance(step, Mapping):
            continue
        kind = step.get("type")
        wanted = step.get("scale", step.get("size"))
        if kind in ("Resize", "ResizeEdge"):
            sides = wanted if isinstance(wanted, list) else [wanted, -1 if kind == "ResizeEdge" else wanted]
            whole = len(sides) == 2 and isinstance(sides[0], int) and sides[1] in (-1, sides[0])
            if whole and not (step.get("keep_ratio") and sides[1] != -1):
                resized, squeeze = sides[0], sides[1] != -1
            else:
                refused["eval_crop_ratio"] = (
                    f"its test pipeline resizes images to {shown(str(wanted))}: neither a short side nor a square"
                )
            stated = step.get("interpolation")
            if stated in INTERPOLATIONS:
                interpolation = stated
            elif stated is not None:
                refused["interpolation"] = f"its test pipeline resizes {shown(str(stated))}"
        elif kind == "CenterCrop":
            side = step.get("crop_size")
            if isinstance(side, int) and 0 < side <= MAX_SIDE:
                size = size or side
                if crop is None and resized is not None and side <= resized:
                    crop = side / resized
    if squeeze and resized is not None and crop is None:  # without a crop, all of it
        size, crop = size or resized, 1.0
    return size, crop, squeeze, interpolation
