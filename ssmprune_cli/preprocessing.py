"""What a model expects of an image, and how its user says a checkpoint is to be read. Plain data, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Interpolation = Literal["bicubic", "bilinear", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)
Channels = Literal["rgb", "bgr"]  # the order in which a model takes them
Triple = tuple[float, float, float]  # a value for each channel, in the model's order


@dataclass(frozen=True)
class Preprocessing:
    """Resize the short side to `resize` pixels, crop the centre `crop` x `crop`, scale to 0..1, normalise channels.

    squeeze  both sides are resized to `resize`, whatever the image's shape
    """

    resize: int
    crop: int
    interpolation: Interpolation = "bicubic"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    squeeze: bool = False
    channels: Channels = "rgb"


@dataclass(frozen=True)
class ClipPreprocessing(Preprocessing):
    """What a model of clips expects: `frames` of a video, all prepared alike. See data/clips.py.

    segments, crops  views: how often a clip is sampled, from one moment on each, and how many squares of the frames are
                     seen, from one end of the long side to the other
    """

    frames: int = 8
    segments: int = 1
    crops: int = 1


@dataclass(frozen=True)
class KeepRatio:
    """What a dense model expects: the whole image in proportion, as mmsegmentation and mmdetection prepare it.

    The factor is the largest by which the long side is at most `long` and the short side at most `short`; a new side is
    its product, rounded half up. Resized without antialiasing, as cv2's INTER_LINEAR does. Then scaled to 0..1 and
    normalised.

    divisor  both sides become multiples of it
    fill     how: "resize" again to the next multiple, or "pad" with zeros on the right and below, after normalisation
    """

    long: int
    short: int
    divisor: int = 1
    fill: Literal["resize", "pad"] = "resize"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    channels: Channels = "rgb"


@dataclass(frozen=True)
class TextWindow:
    """What a language model expects: `length` tokens in a row, numbers below `vocabulary`.

    judged  last tokens of them, whose next ones the model says
    """

    length: int
    vocabulary: int
    judged: int

    def __str__(self) -> str:
        told = f"windows of {self.length:,} tokens out of {self.vocabulary:,}"
        return f"{told}, of which the last {self.judged:,} are judged"


Preparation = Preprocessing | KeepRatio | TextWindow  # what any model expects


def of_images(way: Preparation) -> Preprocessing | KeepRatio:
    """That of a model of images or clips."""
    assert not isinstance(way, TextWindow)
    return way


@dataclass(frozen=True)
class Frame:
    """Where one image lies in what a model is given: heights and widths in pixels.

    original  as it was read
    scaled    as resized, padding left out
    """

    original: tuple[int, int]
    scaled: tuple[int, int]


@dataclass(frozen=True)
class Reading:
    """How a checkpoint is to be read: what its user says goes before what the file says. None leaves it to the file.

    family, variant  instead of what is told from names and shapes of the weights
    weights          which copy to take from a training checkpoint: "model" or "model_ema"
    image_size       side of square images; position embeddings are resized if the weights are for another size. Of a
                     dense model, the short side that whole images are resized to
    stride           of the patches, in pixels
    crop             the part of the resized image that the centre crop keeps: 0.875 of 256 pixels is 224. Then the
                     short side is resized, even if the file says that both are
    interpolation    of the resizing
    mean, std        of the channels, for images scaled to 0..1
    length           of text: tokens of a window
    protect_last     of text: last tokens of a window, which are never dropped and which answers are judged by
    """

    family: str | None = None
    variant: str | None = None
    weights: str = "model"
    image_size: int | None = None
    stride: int | None = None
    crop: float | None = None
    interpolation: Interpolation | None = None
    mean: Triple | None = None
    std: Triple | None = None
    length: int | None = None
    protect_last: int | None = None


NOTHING_SAID = Reading()
