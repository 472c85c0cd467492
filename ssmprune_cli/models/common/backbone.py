"""What every model family provides: a backbone with a pruner slot, and a FAMILY record that knows its checkpoints."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Mixers, Pruner, ScanAlignment, ScanStatistics, Stage, Wanted
from ssmprune_cli.models.common.block import Block
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.tokens import TokenSequence

Shapes = Mapping[str, tuple[int, ...]]


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
    family's has `image_size`, `num_classes` and `eval_crop_ratio`, the part of the resized image that the crop keeps.
    `task` names what the answers are: see the tasks wing.
    """

    task: str = "classification"
    family: str
    config: Any
    pruner: Pruner | None

    def __init__(self) -> None:
        super().__init__()
        self.pruner = None

    def ask_pruner(self, block: int, sequence: TokenSequence) -> tuple[ScanAlignment | None, Wanted]:
        """Before `block`: how its scans make up for what `sequence` has lost, and what is wanted after it."""
        if self.pruner is None:
            return None, "nothing"
        return None if sequence.is_dense else self.pruner.alignment(block), self.pruner.wants(block)

    def prune(self, block: int, sequence: TokenSequence, statistics: ScanStatistics, wanted: Wanted) -> TokenSequence:
        """The tokens that go on after `block`."""
        if self.pruner is None or wanted == "nothing":
            return sequence
        return self.pruner(block, sequence, statistics)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, 3, H, W)."""

    @property
    @abstractmethod
    def blocks(self) -> list[Block]:
        """The blocks, in order."""

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

    @property
    def num_classes(self) -> int:
        count: int = self.config.num_classes
        return count

    @property
    def preprocessing(self) -> Preprocessing:
        """As the authors evaluate. Raises UsageError for images that are not square, which they do not define."""
        height, width = self.image_size
        if height != width:
            raise UsageError(f"no preprocessing is published for images of {height} x {width} pixels")
        return Preprocessing(resize=int(height / self.config.eval_crop_ratio), crop=height)


@dataclass(frozen=True)
class Hints:
    """What is known of a checkpoint beside its keys: decides between layouts whose keys and shapes are equal."""

    filename: str = ""
    model_name: str = ""  # `args.model` of the training script, if the container has it
    image_size: int | None = None  # `args.input_size`: what the weights were trained for
    eval_crop_ratio: float | None = None  # `args.eval_crop_ratio`
    variant: str | None = None  # asked for by the user


@dataclass(frozen=True)
class Family:
    """One model family.

    matches    (shapes, hints) -> whether these keys can be this family; must not guess between equal layouts
    configure  (shapes, hints) -> config found from keys and shapes; raises CheckpointError naming what does not fit
    build      config -> backbone, weights initialised as the authors do
    remap      state dict -> the same in the names that `build` uses (drops what is not a weight, renames old keys)
    variants   published configurations by name
    resize     (state dict, config, image side) -> the same for square images of another size
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
