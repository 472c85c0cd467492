"""What every model family provides: a backbone with a pruner slot, and a FAMILY record that knows its checkpoints."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.interface import Mixers, Pruner, ScanAlignment, ScanStatistics, Stage, Wanted
from ssmprune_cli.models.common.block import Block
from ssmprune_cli.models.common.compressed_alike import check_compression
from ssmprune_cli.models.common.eight_bit import EightBitLinear, count_parameters, linear_kinds, names_of_kinds
from ssmprune_cli.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    Channels,
    Interpolation,
    KeepRatio,
    Preparation,
    Preprocessing,
    Triple,
)
from ssmprune_cli.registry import Registry
from ssmprune_cli.tokens import Readout, TokenSequence

Shapes = Mapping[str, tuple[int, ...]]

SMALL_SIDE = 32  # pixels: the authors of all families neither resize nor crop images up to this size


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How the authors bring an image to the model: the part of a config that no weight depends on.

    eval_crop_ratio  the part of the resized image that the centre crop keeps; None where it is not known
    interpolation    of the resizing
    mean, std        of the channels in the model's order, for images scaled to 0..1
    squeeze          both sides are resized, and not the short one alone
    channels         their order
    resized_from     height and width of the images that the dense model takes, where `resize` has changed them since
    cut_from         names and values of what is other in the configuration of the dense model, where `cut_short` has
                     left out blocks since
    """

    eval_crop_ratio: float | None = 0.875
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    squeeze: bool = False
    channels: Channels = "rgb"
    resized_from: tuple[int, int] | None = None
    cut_from: tuple[tuple[str, Any], ...] | None = None

    def __post_init__(self) -> None:
        if self.eval_crop_ratio is not None and not 0.01 <= self.eval_crop_ratio <= 1:
            raise UsageError(f"a crop keeps a part of the image from 0.01 to 1, not {self.eval_crop_ratio:g}")
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"the interpolation is {' or '.join(INTERPOLATIONS)}, not {self.interpolation!r}")
        if self.channels not in get_args(Channels):
            raise UsageError(f"the channels are {' or '.join(get_args(Channels))}, not {self.channels!r}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list from JSON
        check_channels(self.mean, self.std)
        if self.resized_from is not None:
            size: tuple[int, ...] = tuple(self.resized_from)  # a list from JSON
            if len(size) != 2 or min(size) < 1:
                raise UsageError(f"resized_from must be a height and a width, not {size}")
            object.__setattr__(self, "resized_from", size)
        if self.cut_from is not None:
            object.__setattr__(self, "cut_from", tuples(self.cut_from))  # lists from JSON

    def without_blocks(self, count: int) -> ImageConfig | None:
        """The same without the last `count` blocks of the first of the longest stages; None if that is no model."""
        return None


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value


def check_channels(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """UsageError unless these can be a mean and a deviation of three channels."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3 or not all(math.isfinite(value) for value in values):
            raise UsageError(f"{name} must be three finite numbers, not {values}")
    if min(std) <= 0:
        raise UsageError(f"std must be above 0, not {std}")


@dataclass(frozen=True)
class Places:
    """Where a family's parameters are, outside of its blocks, and which ones weight decay is not for.

    Names are those of modules and parameters in the backbone.

    before      the first block
    after       the last block; `idle` of them have no part in the logits
    between     name -> after how many blocks
    undecayed   last parts of names, of matrices that at 0 are not "no effect": tokens and positions are inputs, A_log 0
                is a decay rate of 1 (the Mamba authors exclude A_log and D too)
    decayed     likewise, of matrices that are decayed as the `weight` of every layer is
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    undecayed: tuple[str, ...]
    decayed: tuple[str, ...] = ()
    between: Mapping[str, int] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


class Backbone(nn.Module, ABC):
    """A vision SSM. `pruner` is called between blocks; None is the dense model.

    `config` is the family's frozen dataclass of plain values: `FAMILY.build(config)` makes the same model again. Every
    family's is an ImageConfig and has `image_size` and `num_classes`.
    `task` names what the answers are: see the tasks wing. `inputs` says what it takes, normalised images or numbers of
    tokens; for text, `image_size` is (1, tokens of a window). `folder` is that of the file that it was loaded from.
    With `any_size` it takes images of any height and width, or text of any length, and tokens are counted for
    `image_size`. With `restores` dropped tokens come back, where the grid is made whole again. `notes` are sentences on
    what its file says and is left out.
    """

    task: str = "classification"
    inputs: Literal["images", "text"] = "images"
    any_size: bool = False
    notes: tuple[str, ...] = ()
    restores: bool = False
    family: str
    config: Any
    folder: Path | None = None
    pruner: Pruner | None

    def __init__(self) -> None:
        super().__init__()
        self.pruner = None

    def ask_pruner(self, block: int, sequence: TokenSequence) -> tuple[ScanAlignment | None, Wanted]:
        """Before `block`: how its scans make up for what `sequence` has lost, and what is wanted after it."""
        if self.pruner is None:
            return None, "nothing"
        return None if sequence.is_untouched else self.pruner.alignment(block), self.pruner.wants(block)

    def prune(self, block: int, sequence: TokenSequence, statistics: ScanStatistics, wanted: Wanted) -> TokenSequence:
        """The tokens that go on after `block`."""
        if self.pruner is None or wanted == "nothing":
            return sequence
        return self.pruner(block, sequence, statistics)

    def classify(self, pooled: Tensor, readout: Readout | None) -> Tensor:
        """Logits (B, classes) of what the head sees, `pooled` (B, d); a pruner may have something to say to that."""
        if readout is not None:
            return readout.logits(pooled, self.output_layer)
        logits: Tensor = self.output_layer(pooled)
        return logits

    @property
    def output_layer(self) -> nn.Linear:
        """The layer that makes logits. Raises UsageError for a model without one."""
        raise UsageError(f"this {self.family} has no classifier")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch. First of all, UsageError if these are the weights of a model that is compressed otherwise than
        this one, or of a dense one; nothing is loaded then. Not with `strict=False`."""
        if strict:
            check_compression(self, state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @property
    def sized(self) -> str:
        """What it takes, in words."""
        height, width = self.image_size
        return f"{height}x{width} pixels" if self.inputs == "images" else f"windows of {width:,} tokens"

    def __repr__(self) -> str:
        count, rounded = self.parameter_count, ", ".join(self.eight_bit_kinds)
        text = f"{type(self).__name__}({self.sized}, {len(self.blocks)} blocks, {count:,} parameters"
        text += f", in eight bits: {rounded}" if rounded else ""
        return f"{text})" if self.pruner is None else f"{text}, {self.pruner!r})"

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, *input_shape)."""

    def observe(self, images: Tensor) -> None:
        """Compute the blocks on normalised images (B, 3, H, W), for a pruner that looks on."""
        self.forward(images)

    def feature_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """What a head of a dense model reads, (B, d_i, rows_i, columns_i) each, the finest first: every place of the
        grid, also where tokens are dropped. Images (B, 3, H, W) may be of any size. UsageError for a model without."""
        raise UsageError(f"this {self.family} makes no feature maps")

    @property
    @abstractmethod
    def blocks(self) -> list[Block]:
        """The blocks, in order."""

    @property
    def parameter_count(self) -> int:
        """Numbers in the parameters, weights in eight bits included."""
        return count_parameters(self)

    @property
    def linear_kinds(self) -> dict[str, tuple[str, ...]]:
        """Names of the blocks' linear layers that may be in eight bits, by kind."""
        return linear_kinds(self, self.blocks)

    def layers_of(self, kinds: Iterable[str]) -> list[str]:
        """Names of the layers of these `linear_kinds`. Raises UsageError for a kind that there is not."""
        return names_of_kinds(self.linear_kinds, kinds)

    @property
    def eight_bit_kinds(self) -> tuple[str, ...]:
        """The `linear_kinds` whose weights are in eight bits."""
        found = self.linear_kinds.items()
        return tuple(kind for kind, names in found if isinstance(self.get_submodule(names[0]), EightBitLinear))

    @property
    @abstractmethod
    def mixers(self) -> Mixers:
        """The mixer of every block, in order."""

    @property
    @abstractmethod
    def places(self) -> Places:
        """What training treats in its own way."""

    def depths(self) -> dict[str, int]:
        """For every parameter, after how many blocks it has its effect: 0 before the first, its number in one, and one
        more than there are after the last. Raises UsageError for a parameter that is in no known place."""
        names, places, depths = {id(module): name for name, module in self.named_modules()}, self.places, {}
        known = {names[id(block)]: number for number, block in enumerate(self.blocks, start=1)}
        known |= {**dict.fromkeys(places.before, 0), **places.between}
        known |= dict.fromkeys((*places.after, *places.idle), len(self.blocks) + 1)
        for name, _ in self.named_parameters():
            inside = [depth for place, depth in known.items() if f"{name}.".startswith(f"{place}.")]
            if len(inside) != 1:
                raise UsageError(f"is in no known place of a {self.family}, so there is no rate for it", where=name)
            depths[name] = inside[0]
        return depths

    def is_decayed(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether weight decay is for the parameter of this name: for matrices and filters, and none for biases, norms
        and what `places` excludes. Raises UsageError for one that is neither a layer's weight nor named there."""
        last = name.rpartition(".")[2]
        if parameter.ndim < 2 or last in self.places.undecayed:
            return False
        if last != "weight" and last not in self.places.decayed:
            raise UsageError(f"is no known parameter of a {self.family}: is it decayed?", where=name)
        return True

    @property
    def num_tokens(self) -> int:
        """Length of the dense sequence that enters the first block, protected tokens included."""
        return math.prod(self.grid) + len(self.protected)

    @property
    def protected(self) -> tuple[int, ...]:
        """Dense positions of class and register tokens in the first block."""
        return ()

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid in the first block."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Runs of blocks that see the same grid; one of all blocks, unless a family downsamples."""
        return (Stage(0, len(self.mixers), self.grid, self.protected),)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the images that `forward` takes."""
        return next((each.dtype for each in self.parameters()), torch.get_default_dtype())

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the model takes."""
        size: tuple[int, int] = self.config.image_size
        return size

    def example(self, batch_size: int, seed: int | None = None) -> Tensor:
        """`batch_size` inputs of the model's own size, on its device: black images or the first token over and over, or
        by `seed` random ones. Token counts are static, so that what they show makes no difference to time and work."""
        like, size = next(self.parameters()), (batch_size, *self.input_shape)
        if seed is None:
            return torch.zeros(size, device=like.device, dtype=self.dtype)
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(like.device, self.dtype)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image as `forward` takes it: (3, H, W), of a clip (3, T, H, W), of a window of text (L,)."""
        return (3, *self.image_size)

    @property
    def num_classes(self) -> int:
        count: int = self.config.num_classes
        return count

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the answers; none where nothing says."""
        return ()

    @property
    def preprocessing(self) -> Preparation:
        """As the authors evaluate; a model that was resized sees the same part of an image as before. UsageError for
        images that are not square, which they do not define, and where nothing says how much the crop keeps."""
        height, width = self.image_size
        config: ImageConfig = self.config
        if height != width:
            raise UsageError(f"no preprocessing is published for images of {height} x {width} pixels")
        small = max(config.resized_from or self.image_size) <= SMALL_SIDE
        ratio = 1.0 if small else config.eval_crop_ratio
        if ratio is None:
            raise UsageError(
                "neither the weights nor the file say how images are resized and cropped for this model",
                hint="Give `--crop 1.0` (the short side becomes the image side), `--crop 0.875` (resized larger, and "
                "the centre is cropped, as published models are evaluated) or another ratio; `--interpolation` is "
                "bicubic unless you say otherwise.",
            )
        return Preprocessing(
            int(height / ratio),
            height,
            config.interpolation,
            config.mean,
            config.std,
            config.squeeze and not small,
            config.channels,
        )


@dataclass(frozen=True)
class Hints:
    """What is known of a checkpoint beside its keys: from its file, and from its user, who goes first.

    filename, model_name  of the file, and as the training script calls the model (`args.model`)
    variant               asked for by the user
    image_size            side in pixels that the weights are for, as the file says
    asked_size            that the user wants; position embeddings are resized if the weights are for another size
    stride                of the patches, in pixels
    settings              what the file states, by lower-case name: each value once
    refused               name of a field here, to what the file says of it and is not done here
    eval_crop_ratio, interpolation, mean, std, squeeze, channels: see ImageConfig
    keep_ratio            how whole images are resized for a dense model; mean, std and channels are said apart
    class_names           in the order of the logits
    length, protect_last  of windows of text, asked for by the user: see LanguageConfig
    """

    filename: str = ""
    model_name: str = ""
    variant: str | None = None
    image_size: int | None = None
    asked_size: int | None = None
    stride: int | None = None
    eval_crop_ratio: float | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None
    squeeze: bool | None = None
    channels: Channels | None = None
    keep_ratio: KeepRatio | None = None
    class_names: tuple[str, ...] = ()
    length: int | None = None
    protect_last: int | None = None
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def count_numbered(keys: Iterable[str], pattern: str) -> int:
    """How many parts are numbered from 0 by the group of `pattern` in `keys`. CheckpointError if one is missing."""
    numbers = {found[1] for key in keys if (found := re.match(pattern, key))}
    count = len(numbers)
    if numbers != {str(number) for number in range(count)}:
        missing = next(number for number in range(count + 1) if str(number) not in numbers)
        raise CheckpointError(f"the blocks are not numbered from 0 on: of {count}, number {missing} is missing")
    return count


@dataclass(frozen=True)
class Family:
    """One model family.

    matches    (shapes, hints) -> whether these keys can be this family; must not guess between equal layouts
    configure  (shapes, hints) -> config found from keys and shapes; raises CheckpointError naming what does not fit
    build      config -> backbone, weights initialised as the authors do
    remap      state dict -> the same in the names that `build` uses (drops what is not a weight, renames old keys)
    variants   published configurations by name
    resize     (state dict, config, image side) -> the same for square images of another size; UsageError if patches do
               not fill them
    fills      (config, image side) -> whether patches cover square images of that side, and nothing beyond them
    computes   settings that authors' code can have and that change no weight's shape: name (in lower case) to the
               values that mean what this family computes
    whole_image  whether it is given whole images (`KeepRatio`), and not a crop of the centre
    text         whether it is given windows of text (`TextWindow`), and no images
    """

    name: str
    title: str
    matches: Callable[[Shapes, Hints], bool]
    configure: Callable[[Shapes, Hints], Any]
    build: Callable[[Any], Backbone]
    config_class: type[Any]
    remap: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    variants: Mapping[str, Any]
    resize: Callable[[dict[str, Tensor], Any, int], tuple[dict[str, Tensor], Any]]
    fills: Callable[[Any, int], bool]
    computes: Mapping[str, frozenset[Any]] = field(default_factory=dict)
    whole_image: bool = False
    text: bool = False


FAMILIES: Registry[Family] = Registry("model family")  # filled in the `__init__` of the wing
