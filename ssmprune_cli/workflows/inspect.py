"""`ssmprune inspect`: what a checkpoint holds, without running it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssmprune_cli.adapt import Seen, mixers_in, sketch
from ssmprune_cli.checkpoint import build_empty, left_out, non_finite, read, resolve, sha256, variant_name
from ssmprune_cli.errors import UnknownFamilyError, UsageError
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading


@dataclass(frozen=True)
class Inspection:
    """Plain values about one checkpoint.

    task            what its answers are: the task of this name
    variant         published configuration, whatever its image size and classes; None if it is none
    frames, tubelet of a clip, and how many of them a patch spans; None for a model of images
    class_names     in the order of the answers; none where the file does not say
    parameters      numbers in the model's parameters (no buffers, no pruner)
    tokens          length of the dense sequence, class and register tokens included; `protected` are their positions
    container       kind of file, its top-level entries (none for a bare state dict), and the entry that was used
    dtype           stored types of the weights, with how many tensors have each
    non_finite      names of weights that hold an infinite value or a NaN; such a file is not loaded
    preprocessing   what the model expects of an image; None where nothing says so
    config          the family's configuration
    pruning         settings of the pruner; None for a dense model
    eight_bits      kinds of linear layers whose weights are in eight bits
    notes           what the file says and is left out, in sentences
    """

    family: str
    task: str
    variant: str | None
    parameters: int
    image_size: tuple[int, int]
    frames: int | None
    tubelet: int | None
    num_classes: int
    class_names: tuple[str, ...]
    tokens: int
    protected: tuple[int, ...]
    blocks: int
    scan_directions: int
    container: dict[str, Any]
    dtype: dict[str, int]
    non_finite: tuple[str, ...]
    sha256: str
    preprocessing: dict[str, Any] | None
    config: dict[str, Any]
    pruning: dict[str, Any] | None
    eight_bits: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ForeignInspection:
    """Plain values about a checkpoint of no family that is known, but with mixers inside.

    mixers   name in the keys, and what it seems to be, by keys and shapes
    sketch   the Python to start from
    """

    mixers: tuple[Seen, ...]
    parameters: int
    sha256: str
    sketch: str

    def to_dict(self) -> dict[str, Any]:
        return {"family": None, **asdict(self)}

    @property
    def lines(self) -> dict[str, str]:
        """Of each mixer, what it seems to be."""
        return {
            each.name or "the module itself": f"{each.kind or 'of no known kind'}, {each.width or '?'} channels"
            + (f", {each.states} states" if each.states else "")
            for each in self.mixers
        }


def look(path: Path, reading: Reading = NOTHING_SAID) -> Inspection | ForeignInspection:
    """`inspect`, or what can be said of a checkpoint of no known family with mixers inside.

    Raises UnknownFamilyError for one without.
    """
    try:
        return inspect(path, reading)
    except UnknownFamilyError:
        state = read(path, weights=reading.weights).state
        mixers = mixers_in({name: tuple(value.shape) for name, value in state.items()})
        if not mixers:
            raise
        count = sum(value.numel() for value in state.values())
        return ForeignInspection(tuple(mixers), count, sha256(path), sketch(mixers))


def inspect(path: Path, reading: Reading = NOTHING_SAID) -> Inspection:
    """Describe the checkpoint at `path`, read as `checkpoint.load_as` does; the errors are the same.

    Weights that are not finite are reported, not refused.
    """
    checkpoint = read(path, weights=reading.weights)
    resolved = resolve(checkpoint, reading)
    settings = checkpoint.artefact.pruning if checkpoint.artefact else None
    eight_bits = checkpoint.artefact.eight_bits if checkpoint.artefact else ()
    model = build_empty(resolved.family, resolved.config, settings, resolved.state, path, eight_bits)
    try:
        preprocessing = asdict(model.preprocessing)
    except UsageError:
        preprocessing = None
    return Inspection(
        family=model.family,
        task=model.task,
        variant=variant_name(resolved.family, resolved.config),
        parameters=model.parameter_count,
        image_size=model.image_size,
        frames=getattr(resolved.config, "num_frames", None),
        tubelet=getattr(resolved.config, "tubelet", None),
        num_classes=model.num_classes,
        class_names=model.class_names,
        tokens=model.num_tokens,
        protected=model.protected,
        blocks=len(model.mixers),
        scan_directions=model.mixers[0].directions,
        container={"kind": checkpoint.kind, "entries": list(checkpoint.entries), "used": checkpoint.used},
        dtype=dict(Counter(str(value.dtype).removeprefix("torch.") for value in checkpoint.state.values())),
        non_finite=tuple(non_finite(resolved.state)),
        sha256=sha256(path),
        preprocessing=preprocessing,
        config=asdict(resolved.config),
        pruning=settings,
        eight_bits=model.eight_bit_kinds,
        notes=left_out(checkpoint, resolved),
    )
