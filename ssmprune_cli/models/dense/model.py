"""What every dense model is: an encoder that makes feature maps, and a head that reads them.

To what prunes, calibrates and measures it is a backbone: its blocks, stages and the slot for a pruner are the
encoder's. Letters: B batch, H and W height and width of the images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Mixers, Pruner, Stage
from ssmprune_cli.models.common import MAX_SIDE, Backbone, Block, ImageConfig, Places, check_channels
from ssmprune_cli.preprocessing import KeepRatio

E = TypeVar("E", bound=ImageConfig)
C = TypeVar("C", bound="DenseConfig")
_NO_IMAGES = ImageConfig(eval_crop_ratio=None)


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Everything that defines a dense model. A subclass says the types of `encoder` and `head`.

    encoder        configuration of the backbone. Tokens are counted for its image size; images of any size are taken
    head           configuration of the head, which has `num_classes`
    preprocessing  how the authors bring an image to the model
    class_names    in the order of the logits; empty where the file does not say
    resized        preprocessing of the model for larger images that this one was made of by `resize`
    """

    encoder: Any
    head: Any
    preprocessing: KeepRatio
    class_names: tuple[str, ...] = ()
    resized: KeepRatio | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))  # a list from JSON
        object.__setattr__(self, "encoder", without_images(self.encoder))
        for images in (self.preprocessing, self.resized or self.preprocessing):
            if not 1 <= images.short <= images.long <= MAX_SIDE or not 1 <= images.divisor <= MAX_SIDE:
                raise UsageError(f"images cannot be resized to {images.long} x {images.short} by {images.divisor}")
            check_channels(images.mean, images.std)
        if self.class_names and len(self.class_names) != self.num_classes:
            raise UsageError(f"{len(self.class_names)} names of classes for {self.num_classes} classes")

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that tokens are counted for."""
        size: tuple[int, int] = self.encoder.image_size
        return size

    @property
    def num_classes(self) -> int:
        count: int = self.head.num_classes
        return count

    @property
    def resized_from(self) -> tuple[int, int] | None:
        """What tokens of the model are counted for that this one was made of."""
        return None if self.resized is None else (self.resized.short, self.resized.short)

    @property
    def cut_from(self) -> None:
        """None: see `without_blocks`."""

    def without_blocks(self, count: int) -> None:
        """None: a head reads feature maps of several depths."""

    def with_images(self: C, images: KeepRatio) -> C:
        """The same for images that are brought to the model so; tokens are counted for squares of the short side."""
        return replace(
            self, encoder=replace(self.encoder, image_size=(images.short, images.short)), preprocessing=images
        )


def without_images(encoder: E) -> E:
    """The configuration of an encoder of a dense model, whose images are the business of a KeepRatio."""
    return replace(encoder, **{field.name: getattr(_NO_IMAGES, field.name) for field in fields(ImageConfig)})


class DenseModel(Backbone):
    """A backbone of ours with a head. A subclass says `family`, `task` and what `forward` answers."""

    any_size = True
    restores = True
    config: DenseConfig

    def __init__(self, config: DenseConfig, encoder: Backbone, head: nn.Module) -> None:
        nn.Module.__init__(self)  # a Backbone would make a slot of its own
        self.config = config
        self.encoder = encoder
        self.head = head

    @property
    def pruner(self) -> Pruner | None:
        """The encoder's slot."""
        return self.encoder.pruner

    @pruner.setter
    def pruner(self, pruner: Pruner | None) -> None:
        self.encoder.pruner = pruner

    def __setattr__(self, name: str, value: Any) -> None:
        # torch makes a module that is assigned a part of this one, whatever property has its name.
        if name == "pruner":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def observe(self, images: Tensor) -> None:
        self.encoder.feature_maps(images)

    @property
    def output_layer(self) -> nn.Linear:
        raise UsageError(f"a model for {self.task} has no linear classifier of pooled features, so nothing is repaired")

    @property
    def blocks(self) -> list[Block]:
        return self.encoder.blocks

    @property
    def mixers(self) -> Mixers:
        return self.encoder.mixers

    @property
    def places(self) -> Places:
        inside = self.encoder.places
        return Places(
            before=tuple(f"encoder.{name}" for name in inside.before),
            after=(*(f"encoder.{name}" for name in inside.after), "head"),
            undecayed=inside.undecayed,
            decayed=inside.decayed,
            between={f"encoder.{name}": depth for name, depth in inside.between.items()},
            idle=tuple(f"encoder.{name}" for name in inside.idle),
        )

    @property
    def protected(self) -> tuple[int, ...]:
        return self.encoder.protected

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.grid

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.encoder.stages

    @property
    def preprocessing(self) -> KeepRatio:
        return self.config.preprocessing

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.config.class_names
