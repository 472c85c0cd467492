"""From named tensors to a model: which family and configuration, whether every weight fits, and the loaded backbone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.checkpoint.described import configuration, unfilled
from ssmprune_cli.checkpoint.files import folder_of
from ssmprune_cli.checkpoint.reading import Checkpoint, read, read_dense
from ssmprune_cli.checkpoint.stated import plain
from ssmprune_cli.errors import CheckpointError, UnknownFamilyError, UsageError, listing, shown
from ssmprune_cli.models import (
    FAMILIES,
    MAX_SIDE,
    SMALL_SIDE,
    Backbone,
    Family,
    Hints,
    ImageConfig,
    Shapes,
    dense_config,
)
from ssmprune_cli.preprocessing import NOTHING_SAID, Interpolation, Reading, Triple

# Keys that give away a published layout that is not supported: the end of a key, and whose it is.
_FOREIGN = (
    ("temporal_pos_embedding", "a VideoMamba for videos without its classifier, as masked pretraining leaves it"),
)
_NOT_OF_A_VARIANT = (
    *(field.name for field in fields(ImageConfig)),
    *("image_size", "num_classes", "out_indices", "out_stages"),
    *("preprocessing", "resized", "class_names", "dropout"),
    *("vocab_size", "tied", "length", "protect_last"),
)
_OF_IMAGES = ("image_size", "stride", "crop", "interpolation", "mean", "std")  # fields of a Reading
_OF_TEXT = ("length", "protect_last")
_PRUNER = ("pruner.", "encoder.pruner.")  # what the names of a pruner's buffers begin with
_GIVE_THE_FOLDER = "The weights are those of a compressed model: give the folder, with its config.json."


@dataclass(frozen=True)
class Resolved:
    """A family, its configuration and the weights in the names of that family."""

    family: Family
    config: Any
    state: dict[str, Tensor]


def load(
    path: Path | str,
    *,
    family: str | None = None,
    variant: str | None = None,
    weights: str = "model",
    image_size: int | None = None,
    stride: int | None = None,
    crop: float | None = None,
    interpolation: Interpolation | None = None,
    mean: Triple | None = None,
    std: Triple | None = None,
    length: int | None = None,
    protect_last: int | None = None,
) -> Backbone:
    """The model in a checkpoint file or an artefact folder: evaluation mode, float32, on the CPU.

    The options go before what the file says; see `preprocessing.Reading`. What neither settles is asked for.

    Raises CheckpointError if anything is wrong with the file (weights are never loaded in part, nor if one is not
    finite) or if several models fit it, and UsageError for options that do not exist or do not fit.
    """
    reading = Reading(
        family, variant, weights, image_size, stride, crop, interpolation, mean, std, length, protect_last
    )
    return load_as(path, reading)


@torch.inference_mode(False)  # weights made in inference mode have no version, and nothing could be kept of them
def load_as(path: Path | str, reading: Reading, *, dense: bool = False) -> Backbone:
    """See `load`. With `dense`, a compressed model comes as it was before: without its pruner, and for its own images.

    CheckpointError for `dense` if the model was made smaller and trained since: what it was before is no longer there.
    """
    path = Path(path)
    checkpoint = read(path, weights=reading.weights)
    resolved = resolve(checkpoint, reading)
    settings = checkpoint.artefact.pruning if checkpoint.artefact else None
    state, config = resolved.state, resolved.config
    eight_bits = checkpoint.artefact.eight_bits if checkpoint.artefact else ()
    if dense and eight_bits:
        raise CheckpointError(
            f"its weights ({', '.join(eight_bits)}) are in eight bits already, and what they were before is not in it",
            where=str(path),
            hint="Give the checkpoint that it was made of.",
        )
    if dense:
        settings = None
        state = {name: value for name, value in state.items() if not name.startswith(_PRUNER)}
        before = dense_config(config)
        state |= read_dense(checkpoint, needed=before != config)
        config = before
    model = build_empty(resolved.family, config, settings, state, path, eight_bits)
    broken = non_finite(state)
    if broken:
        raise CheckpointError(
            f"{len(broken)} weights have values that are not finite: {listing(broken)}",
            where=str(path),
            hint="The file comes from a training that diverged; use another epoch or copy.",
        )
    # `copy`: the tensors may be mapped from the file.
    values = {
        name: value.to(torch.float32, copy=True).contiguous() if value.is_floating_point() else value.clone()
        for name, value in state.items()
    }
    side = reading.image_size
    if side is not None and (side, side) not in (model.image_size, config.resized_from):
        if settings is not None or config.resized_from is not None:
            why = "because its token counts are" if config.resized_from is None else "once it was resized"
            raise CheckpointError(
                f"the image size of a compressed model is fixed, {why}",
                where=str(path),
                hint="Compress the dense checkpoint again, with `--image-size` for the size of the dense model or "
                "`--resize` for a smaller one.",
            )
        values, config = resolved.family.resize(values, config, side)
        model = build_empty(resolved.family, config, None, values, path, eight_bits)
    # Assigned, so that no weight is initialised only to be replaced.
    model.load_state_dict(values, strict=True, assign=True)
    model.notes = left_out(checkpoint, resolved)
    model.folder = folder_of(path)
    return model.eval()


def left_out(checkpoint: Checkpoint, resolved: Resolved) -> tuple[str, ...]:
    """What the file says of its model and is of no use, in sentences: names of another number of classes."""
    names = checkpoint.hints.class_names
    if not names or not resolved.family.whole_image or len(names) == resolved.config.num_classes:
        return ()
    classes = resolved.config.num_classes
    return (f"{checkpoint.path.name} names {len(names)} classes, and its head has {classes}: the names are left out.",)


def resolve(checkpoint: Checkpoint, reading: Reading = NOTHING_SAID) -> Resolved:
    """The family and configuration of `checkpoint`. Raises CheckpointError or UsageError; see `load`."""
    if reading.image_size is not None and not 1 <= reading.image_size <= MAX_SIDE:
        raise UsageError(f"must be from 1 to {MAX_SIDE} pixels, not {reading.image_size}", where="--image-size")
    if reading.stride is not None and not 1 <= reading.stride <= MAX_SIDE:
        raise UsageError(f"must be from 1 to {MAX_SIDE} pixels, not {reading.stride}", where="--stride")
    chosen = _requested(reading.family, reading.variant)
    resolved = (
        _from_artefact(checkpoint, chosen, reading) if checkpoint.artefact else _found(checkpoint, chosen, reading)
    )
    side = reading.image_size or max(resolved.config.resized_from or resolved.config.image_size)
    if side <= SMALL_SIDE and reading.crop not in (None, 1.0):
        raise UsageError(f"images of {side} pixels are not cropped: the authors of no family do", where="--crop")
    return resolved


def _found(checkpoint: Checkpoint, chosen: Family | None, reading: Reading) -> Resolved:
    """What names, shapes and statements of a file say, and its user."""
    empty = [name for name, value in checkpoint.state.items() if value.numel() == 0]
    if empty:
        raise CheckpointError(f"has weights without values: {listing(empty)}", where=str(checkpoint.path))
    hints = replace(
        checkpoint.hints,
        variant=reading.variant,
        asked_size=reading.image_size,
        length=reading.length,
        protect_last=reading.protect_last,
        **{key: value for key, value in _images(reading).items() if value is not None},
    )
    if reading.stride is not None:
        hints = replace(hints, stride=reading.stride)
    if chosen is None:
        chosen = _detect(checkpoint)
    _check_images(chosen, reading)
    where, at_fault = str(checkpoint.path), "If the file is wrong, save its weights alone: {'model': weights}."
    refusal = checkpoint.hints.refused.get("keep_ratio")
    if refusal is not None and chosen.whole_image and reading.image_size is None:
        hint = f"Give the short side of images, `--image-size`, for something else. {at_fault}"
        raise CheckpointError(refusal, where=where, hint=hint)
    try:
        state = chosen.remap(checkpoint.state)
        config = chosen.configure(_shapes(state), hints)
    except (CheckpointError, UsageError) as error:
        if error.hint is not None or isinstance(error, UsageError):
            raise type(error)(error.what, where=error.where or str(checkpoint.path), hint=error.hint) from error
        shapes = _shapes(checkpoint.state)
        looks = None if chosen.matches(shapes, Hints()) else _recognise(shapes)
        hint = f"It looks like {looks}." if looks else _first_weights(shapes)
        raise CheckpointError(error.what, where=where, hint=f"{hint} {_known()}") from error
    for name, values in chosen.computes.items():
        stated = [each for each in hints.settings.get(name, ()) if plain(each) not in values]
        if stated:
            known = " or ".join(sorted(map(str, values)))
            raise CheckpointError(
                f"says {name} {listing(stated)}, and here {chosen.title} is computed with {known}",
                where=where,
                hint=at_fault,
            )
    small = max(config.image_size) <= SMALL_SIDE  # not resized, so it does not matter how
    for name, refusal in checkpoint.hints.refused.items():
        if chosen.whole_image or name == "keep_ratio":
            continue
        if _images(reading)[name] is None and not (small and name in ("eval_crop_ratio", "interpolation")):
            option = "--crop" if name == "eval_crop_ratio" else f"--{name}"
            raise CheckpointError(refusal, where=where, hint=f"Give `{option}` for something else. {at_fault}")
    return Resolved(chosen, config, state)


def _check_images(family: Family, reading: Reading) -> None:
    """UsageError for options that have no meaning for what `family` is given."""
    pixels = [name for name in _OF_IMAGES if getattr(reading, name) is not None]
    text = [name for name in _OF_TEXT if getattr(reading, name) is not None]
    if foreign := pixels if family.text else text:
        takes, fitting = ("text", _OF_TEXT) if family.text else ("images", _OF_IMAGES)
        raise UsageError(
            f"a {family.title} takes {takes}",
            where=_option(foreign[0]),
            hint=f"For {takes} there are {listing(map(_option, fitting), len(fitting))}.",
        )
    if not family.whole_image:
        return
    for name, value in (("--crop", reading.crop), ("--interpolation", reading.interpolation)):
        if value is not None:
            raise UsageError(
                f"a {family.title} is given whole images, resized bilinearly and in proportion",
                where=name,
                hint="Give the short side to which images are resized: `--image-size 512`, for example.",
            )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _images(reading: Reading) -> dict[str, Any]:
    """The options of `reading` that are fields of an ImageConfig; None for those that are not given."""
    return {
        "eval_crop_ratio": reading.crop,
        "interpolation": reading.interpolation,
        "mean": reading.mean,
        "std": reading.std,
        "squeeze": None if reading.crop is None else False,
        "channels": None,
    }


def variant_name(family: Family, config: Any) -> str | None:
    """The published configuration that `config` is, whatever its image size, crop and outputs; None if it is none."""
    return next((name for name, published in family.variants.items() if _alike(published, config)), None)


def _alike(published: Any, config: Any) -> bool:
    """Whether two configurations of one class are the same in all that is of a variant."""
    for each in fields(published):
        wanted, value = getattr(published, each.name), getattr(config, each.name)
        same = _alike(wanted, value) if is_dataclass(wanted) else wanted == value
        if each.name not in _NOT_OF_A_VARIANT and not same:
            return False
    return True


def non_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the weights that have an infinite value or a NaN, in float32."""
    return [name for name, value in state.items() if not torch.isfinite(value.float()).all()]


def build_empty(
    family: Family,
    config: Any,
    settings: dict[str, Any] | None,
    state: dict[str, Tensor],
    path: Path,
    eight_bits: Sequence[str] = (),
) -> Backbone:
    """The backbone on the meta device, with a pruner if there are settings, and with the kinds of layers `eight_bits`
    in eight bits. CheckpointError if `state` does not fit."""
    model = unfilled(family, config, settings, path, eight_bits)
    faults = _faults(model, state)
    if faults:
        title = variant_name(family, config) or family.title
        hint = f"Check `--family` and `--variant`; without them, both are found from the weights. {_known()}"
        if settings is None and _is_compressed(state):
            hint = _GIVE_THE_FOLDER
        raise CheckpointError(f"the weights do not fit {title}: {listing(faults)}", where=str(path), hint=hint)
    return model


def _faults(model: Backbone, state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from being all of the weights of `model` and nothing else."""
    expected = model.state_dict()
    faults = [f"{shown(name)} is missing" for name in expected if name not in state]
    for name, value in state.items():
        if name not in expected:
            faults.append(f"{shown(name)} is unknown")
        elif value.shape != expected[name].shape:
            faults.append(f"{shown(name)} has shape {tuple(value.shape)}, not {tuple(expected[name].shape)}")
        elif value.is_floating_point() != expected[name].is_floating_point() or (
            expected[name].dtype == torch.int8 != value.dtype
        ):
            faults.append(f"{shown(name)} is of type {value.dtype}")
    return faults


def _is_compressed(state: dict[str, Tensor]) -> bool:
    return any(name.startswith(_PRUNER) for name in state)


def _requested(family: str | None, variant: str | None) -> Family | None:
    chosen = None if family is None else FAMILIES.get(family)
    if variant is None:
        return chosen
    candidates = [each for _, each in FAMILIES.items() if chosen in (None, each)]
    for candidate in candidates:
        if variant in candidate.variants:
            return candidate
    known = [name for candidate in candidates for name in candidate.variants]
    close = difflib.get_close_matches(variant, known, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"unknown variant {variant!r}.{guess}", where="--variant", hint=f"Known: {', '.join(known)}.")


def _from_artefact(checkpoint: Checkpoint, requested: Family | None, reading: Reading) -> Resolved:
    assert checkpoint.artefact is not None
    variant = reading.variant
    where = str(checkpoint.path / "config.json")
    family = FAMILIES.get(checkpoint.artefact.family)
    config = configuration(family, checkpoint.artefact.config, len(checkpoint.state), where)
    found = variant_name(family, config)
    if requested not in (None, family) or (variant is not None and variant != found):
        raise UsageError(
            f"says {found or family.name}, not {variant or (requested.name if requested else '')}",
            where=where,
            hint="Leave out `--family` and `--variant`: an output folder knows what it is.",
        )
    stride = getattr(config, "stride", None)
    if reading.stride not in (None, stride):
        raise UsageError(f"says a stride of {stride}, not {reading.stride}", where=where, hint="Leave out `--stride`.")
    _check_images(family, reading)
    given = {key: value for key, value in _images(reading).items() if value is not None}
    for name in _OF_TEXT:
        asked = getattr(reading, name)
        if asked is not None and asked != getattr(config, name):
            raise UsageError(
                f"says {name.replace('_', ' ')} {getattr(config, name)}, not {asked}, and its token counts are for it",
                where=where,
                hint=f"Leave out `{_option(name)}`, or compress the dense checkpoint with it.",
            )
    if family.whole_image:
        config = replace(config, preprocessing=replace(config.preprocessing, **given))
    else:
        config = replace(config, **given)
    return Resolved(family, config, checkpoint.state)


def _detect(checkpoint: Checkpoint) -> Family:
    shapes = _shapes(checkpoint.state)
    matching = [family for _, family in FAMILIES.items() if family.matches(shapes, checkpoint.hints)]
    if len(matching) == 1:
        return matching[0]
    where = str(checkpoint.path)
    misfits = [_misfits(family, checkpoint) for family in matching]
    if any(each != misfits[0] for each in misfits):
        titles = " and ".join(family.title for family in matching)
        family, faults = next((family, each) for family, each in zip(matching, misfits, strict=True) if each)
        raise CheckpointError(
            f"mixes the weights of {titles}; what does not fit {family.title}: {listing(faults)}",
            where=where,
            hint=f"A checkpoint holds one model. {_known()}",
        )
    if matching:
        unsettled = "Neither the file's name nor a stored name of the model settles it."
        choices = " or ".join(f"`--family {family.name}`{_published(family, checkpoint)}" for family in matching)
        raise CheckpointError(
            f"fits {' and '.join(family.title for family in matching)} alike: their weights have the same names and "
            "shapes but are computed with differently, so a wrong guess would give wrong answers without an error",
            where=where,
            hint=_GIVE_THE_FOLDER if _is_compressed(checkpoint.state) else f"{unsettled} Type {choices}.",
        )
    looks = _recognise(shapes)
    error: type[CheckpointError] = CheckpointError
    similar = [family for _, family in FAMILIES.items() if family.matches(shapes, Hints())]
    if similar:
        what = f"has the weights of {similar[0].title}, but its name says that it is something else"
        hint = f"If the name is wrong, give `--family {similar[0].name}`. {_known()}"
    elif looks:
        error, hint = UnknownFamilyError, f"{_known()} {_first_weights(shapes)}"
        what = f"is {looks}, which is not supported"
    else:
        error, hint = UnknownFamilyError, f"{_known()} {_first_weights(shapes)}"
        what = "is of no known model family"
    raise error(what, where=where, hint=hint)


def _misfits(family: Family, checkpoint: Checkpoint) -> list[str]:
    """What of `checkpoint` does not fit `family`, or is missing for it; nothing if not even the sizes can be told."""
    try:
        state = family.remap(checkpoint.state)
        shapes = _shapes(state)
    except CheckpointError:
        return []
    known = checkpoint.hints
    for hints in (known, replace(known, asked_size=224), replace(known, stride=16, asked_size=224)):
        try:  # with some image, where none is settled: it changes none of the other sizes
            config = family.configure(shapes, hints)
            with torch.device("meta"):
                return _faults(family.build(config), state)
        except (CheckpointError, UsageError):
            continue
    return []


def _known() -> str:
    return f"Known families: {', '.join(FAMILIES.names())}."


def _first_weights(shapes: Shapes) -> str:
    return f"Its first weights: {listing(list(shapes))}."


def _published(family: Family, checkpoint: Checkpoint) -> str:
    """For a message: the published model of `family` that has the sizes of `checkpoint`, if there is one."""
    try:
        name = variant_name(family, family.configure(_shapes(checkpoint.state), checkpoint.hints))
    except (CheckpointError, UsageError):
        return ""
    return f" (it has the sizes of {name})" if name else ""


def _recognise(shapes: Shapes) -> str | None:
    """Whose layout this is: a family's, or a published one that no family supports."""
    titles = [family.title for _, family in FAMILIES.items() if family.matches(shapes, Hints())]
    titles += [title for ending, title in _FOREIGN if any(key.endswith(ending) for key in shapes)]
    return titles[0] if titles else None


def _shapes(state: dict[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in state.items()}
