"""The sections of a recipe: frozen, strict values (an unknown key is an error), read without torch.

A new section is a class here, a field of `recipe.Recipe` and a line in `recipe.SECTIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ssmprune_cli.recipe.validation import suggestion


def _list_to_tuple(value: object) -> object:
    if value in ([], ()):
        raise ValueError("must not be empty")
    return tuple(value) if isinstance(value, list) else value


PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_list_to_tuple)]
Name = Annotated[str, Field(min_length=1)]


KnownNames = Mapping[str, Sequence[str]]  # names that exist, by kind: family, importance, reduction, alignment


def _check_name(name: str | None, info: ValidationInfo) -> str | None:
    """Refuse a name that is not among the known ones, where the caller knows any."""
    known = (info.context or {}).get(info.field_name)
    if name is None or known is None or name in known:
        return name
    raise ValueError(f"unknown {info.field_name} {name!r}; {suggestion(name, known)}")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class ModelChoice(Section):
    """Which model the recipe was made for; it guides detection when the checkpoint leaves it open."""

    family: Name
    variant: Name | None = None

    _known = field_validator("family")(_check_name)


class Pruning(Section):
    """How much of the model is left, where tokens are dropped, how many stay, and how. Without an amount none are.

    image_size side in pixels of smaller square images, see `models.resize`; None for those of the dense model
    cut_blocks so many of the last blocks of the longest stage are left out, see `models.cut_short`; None for none
    points     prune after this many blocks, rising; None is a quarter, half and three quarters of the depth
    keep       ratio of patch tokens kept *at each point*, 0 < keep <= 1: one number or one a point
    tokens     instead of `keep`: patch tokens that stay after each point
    reduction  "auto" is the best of a few at equal time, measured on the calibration images; "context" without any
    alignment  "auto" is the best that is possible, see `pruning.compress.choose_alignment`. YAML's bare
               null means the source of that name
    repair     after calibration: `head`, a head fitted to the dense model's answers; `head+side`, one that also sees
               the means of the dropped tokens; "auto", the better of the two. None of them unless it is clearly better
               on images that are held back; see `pruning.repair`
    distill_steps  updates of all weights towards the dense model's answers to the calibration images, after the repair
    weights    "int8": those of linear layers in eight bits, and tokens on the way through them
    int8       which kinds of linear layers, by name, such as `in_proj`; None is what calibration finds harmless
    returning  with what value a dropped token comes back, in dense models and VMamba: `left`, as it left; `nearest`,
               that of the nearest token; `blend`, a part of both that calibration finds; see `pruning.returning`
    """

    image_size: PositiveInt | None = None
    cut_blocks: PositiveInt | None = None
    weights: Literal["float", "int8"] = "float"
    int8: Annotated[tuple[Name, ...], BeforeValidator(_list_to_tuple)] | None = None
    points: Counts | None = None
    keep: float | tuple[float, ...] | None = None
    tokens: Counts | None = None
    importance: Name = "clip"
    reduction: Name = "auto"
    alignment: Annotated[Name, BeforeValidator(lambda value: "null" if value is None else value)] = "auto"
    repair: Literal["auto", "head", "head+side", "none"] = "auto"
    distill_steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    returning: Literal["left", "nearest", "blend"] = "left"

    _known = field_validator("importance", "reduction", "alignment")(_check_name)

    @field_validator("points")
    @classmethod
    def _rising(cls, points: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if points is not None and list(points) != sorted(set(points)):
            raise ValueError("must be block numbers in rising order, each once")
        return points

    @field_validator("keep", mode="before")
    @classmethod
    def _ratios(cls, keep: object, info: ValidationInfo) -> float | tuple[float, ...] | None:
        if keep is None:
            return None
        if not isinstance(keep, list | tuple):
            return _ratio(keep)
        if not keep:
            raise ValueError("must be a number or a list of numbers, not an empty list")
        ratios = tuple(_ratio(item) for item in keep)
        _match_points(ratios, info)
        return ratios

    @field_validator("tokens")
    @classmethod
    def _falling(cls, tokens: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if tokens is None:
            return None
        if info.data.get("keep") is not None:
            raise ValueError("give either `keep` or `tokens`, and set the other to null")
        if list(tokens) != sorted(tokens, reverse=True):
            raise ValueError("must not rise: a dropped token does not come back")
        _match_points(tokens, info)
        return tokens

    @model_validator(mode="after")
    def _says_how_many(self) -> Pruning:
        if self.int8 is not None and self.weights != "int8":
            raise ValueError("`int8` names layers whose weights are in eight bits: set `weights` to int8")
        if self.drops_tokens:
            return self
        if self.image_size is None and self.cut_blocks is None and self.weights == "float":
            raise ValueError(
                "give `keep` (a ratio), `tokens` (counts), `image_size` (smaller images) or `cut_blocks` (fewer blocks)"
            )
        if self.points is not None:
            raise ValueError("`points` say where tokens are dropped: give `keep` or `tokens` too")
        return self

    @property
    def drops_tokens(self) -> bool:
        return self.keep is not None or self.tokens is not None


def _ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number or a list of numbers, not {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"must be above 0 and at most 1 (the ratio kept at each point), not {value:g}")
    return float(value)


def _match_points(values: Sequence[object], info: ValidationInfo) -> None:
    points = info.data.get("points")
    if points is not None and len(values) != len(points):
        raise ValueError(f"has length {len(values)}, but `points` has length {len(points)}")


class CalibrationPlan(Section):
    """How many images are taken, if there are so many, which ones (by `seed`), and how many run at once.

    A repair takes all of them, and should have 1,024 at least; 64 of them are enough for all else.
    """

    images: PositiveInt = 1024
    seed: Seed = 0
    batch_size: PositiveInt = 16


Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]


class Training(Section):
    """How `ssmprune finetune` trains.

    batch_size      images in an update, over all processes and accumulated steps
    accumulate      parts that an update's images go through the model in, one after another
    lr, lr_batch    highest learning rate; with `lr_batch` it is multiplied by batch_size / lr_batch
    warmup_epochs   it rises linearly from `warmup_lr` in so many epochs, then goes along half a cosine to `min_lr`
    weight_decay    of matrices and filters
    layer_decay     a block's learning rate, as a factor of the next block's
    clip_norm       largest norm of the whole gradient; 0 for no limit
    drop_path       share of images that skip the last block; rises linearly from 0 at the first one
    ema             decay of the running mean of the weights, which is then the result; None for the weights themselves
    precision       of activations
    recompute       keep the blocks' inputs only, and compute activations again for the gradient: less memory, slower
    progressive     epochs in which token counts fall linearly to those of the schedule
    distill         weight of the divergence from the dense model's classes; the rest goes to the labels
    temperature     of that divergence
    distill_tokens  weight of the squared error of normalised kept tokens against the dense model's, added
    crop_scale      smallest share of the image that a random resized crop takes; None for the centre crop
    shift           move images at random by up to so many pixels, the border repeated
    flip            mirror half of the images
    randaugment     magnitude (of 10) of two random distortions an image; 0 for none
    colour_jitter   largest change of brightness, contrast and saturation
    erasing         probability of random erasing
    mixup, cutmix   alpha of each; 0 for none. Of both, one is drawn for each pair of images
    repeats         times that an image is in an update, each time augmented differently; an epoch keeps its length
    """

    epochs: PositiveInt = 30
    batch_size: PositiveInt = 64
    accumulate: PositiveInt = 1
    lr: Above0 = 1e-4
    lr_batch: PositiveInt | None = None
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 1e-5
    warmup_epochs: NotNegative = 1.0
    weight_decay: NotNegative = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip_norm: NotNegative = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: bool = False
    progressive: Annotated[int, Field(ge=0)] = 0
    distill: Share = 0.5
    temperature: Above0 = 1.0
    distill_tokens: NotNegative = 0.0
    crop_scale: Annotated[float, Field(gt=0, le=1)] | None = None
    shift: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    randaugment: Annotated[float, Field(ge=0, le=10)] = 0.0
    colour_jitter: Share = 0.0
    erasing: Share = 0.0
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    repeats: PositiveInt = 1

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"a warm-up of {self.warmup_epochs:g} epochs does not fit in {self.epochs} epochs")
        if self.progressive > self.epochs:
            raise ValueError(f"{self.progressive} progressive epochs do not fit in {self.epochs} epochs")
        if self.batch_size % self.accumulate:
            raise ValueError(f"a batch of {self.batch_size} images cannot be divided by `accumulate` {self.accumulate}")
        return self

    @property
    def peak_lr(self) -> float:
        return self.lr * (self.batch_size / self.lr_batch if self.lr_batch else 1.0)


class Published(Section):
    """What a paper reports of this recipe, as data.

    checkpoint     file name of the dense weights it starts from
    top1           per cent after the paper's training, and `dense_top1` of the dense model
    multiply_adds  in units of 1e9, in the paper's convention (Vim: scan directions counted once); `dense_...` likewise
    training       what was trained after pruning; "none" for a method without training
    """

    method: Name
    model: Name
    dataset: Name
    checkpoint: Name
    dense_top1: float
    dense_multiply_adds: float
    top1: float
    multiply_adds: float | None = None
    training: Name
    source: Name
