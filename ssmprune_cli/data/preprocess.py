"""Apply what a model expects to a PIL image.

`Preprocessing` has the rounding of torchvision's Resize and CenterCrop on PIL, `KeepRatio` that of mmcv on OpenCV.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from ssmprune_cli.data.image_file import check_pixels
from ssmprune_cli.data.resize import resize_linear
from ssmprune_cli.preprocessing import Frame, KeepRatio, Preprocessing

_NARROW = 1 << 23  # pixels of a resized image that may be narrower than 1:16; eight threads hold so many at once
_RESAMPLING: dict[str, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in 8-bit RGB. 16-bit grey is scaled to 8 bits: PIL's own conversion clips it to white.

    Raises ValueError for pixels whose range is not known: float ones, and integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating point, and nothing says which value is white; save it with 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise ValueError("its pixels are integers beyond 16 bits, and nothing says which is white; save it with 8")
        return Image.fromarray((grey // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # A palette with transparent entries must become RGBA first, or PIL warns.
        return image.convert("RGBA").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_short_side(image: Image.Image, size: int, interpolation: str) -> Image.Image:
    """Bring the short side to `size` pixels and the long one to int(size * long / short).

    Raises ValueError for an image so narrow that the result would have too many pixels.
    """
    width, height = image.size
    if min(width, height) == size:
        return image
    long = int(size * max(width, height) / min(width, height))
    if size * long > max(_NARROW, 16 * size * size):
        raise ValueError(f"{width} x {height} pixels are too narrow: resized they are {size} x {long} pixels")
    check_pixels(size, long)
    return image.resize((size, long) if width <= height else (long, size), _RESAMPLING[interpolation])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle `size` x `size` pixels; an image that is too small is padded with zeros on both sides first."""
    width, height = image.size
    missing_x, missing_y = max(size - width, 0), max(size - height, 0)
    if missing_x or missing_y:
        canvas = Image.new(image.mode, (width + missing_x, height + missing_y))
        canvas.paste(image, (missing_x // 2, missing_y // 2))
        image = canvas
        width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def visible_box(size: tuple[int, int], preprocessing: Preprocessing | KeepRatio) -> tuple[float, float, float, float]:
    """What a model sees of an image of `size` (width, height): left, top, right, bottom in pixels of that image.

    It reaches beyond the image where the crop, or the image, is padded.
    """
    if isinstance(preprocessing, KeepRatio):
        scaled, whole = _sizes(size[1], size[0], preprocessing)
        return 0.0, 0.0, size[0] * whole[1] / scaled[1], size[1] * whole[0] / scaled[0]
    x, y = size[0] / 2, size[1] / 2
    width, height = size if preprocessing.squeeze else (min(size), min(size))  # that become `resize` pixels
    share = preprocessing.crop / preprocessing.resize / 2
    return x - share * width, y - share * height, x + share * width, y + share * height


def prepare_image(image: Image.Image, way: Preprocessing | KeepRatio) -> tuple[Tensor, Frame]:
    """Normalised float32 image (3, H, W) of an image of any mode and size, and where it lies in that.

    Raises ValueError for an image that cannot be converted.
    """
    if isinstance(way, KeepRatio):
        return _keep_ratio(image, way)
    return preprocess(image, way), Frame((image.height, image.width), (way.crop, way.crop))


def in_colour(image: Image.Image, way: Preprocessing | KeepRatio) -> Image.Image:
    """The image in RGB, as a model that is given images in this `way` has it.

    For a `KeepRatio` it is turned as its EXIF says, as cv2.imread does: masks and boxes are of the turned image. A
    `Preprocessing` does not turn: the authors of classifiers read with Pillow, which leaves an image as it is stored.
    """
    return to_rgb(ImageOps.exif_transpose(image) if isinstance(way, KeepRatio) else image)


def _keep_ratio(image: Image.Image, way: KeepRatio) -> tuple[Tensor, Frame]:
    pixels = np.asarray(in_colour(image, way))  # (H, W, 3)
    height, width = pixels.shape[:2]
    size, whole = _sizes(height, width, way)
    check_pixels(*whole)
    pixels = resize_linear(resize_linear(pixels, *_scaled(height, width, way)), *size)  # twice, as mmsegmentation does
    values = normalised(pixels, way)
    if size != whole:
        values = np.pad(values, ((0, 0), (0, whole[0] - size[0]), (0, whole[1] - size[1])))
    return torch.from_numpy(values), Frame((height, width), size)


def _scaled(height: int, width: int, way: KeepRatio) -> tuple[int, int]:
    """Height and width in proportion. Raises ValueError if nothing is left of a side."""
    factor = min(way.long / max(height, width), way.short / min(height, width))
    size = (int(height * factor + 0.5), int(width * factor + 0.5))
    if min(size) < 1:
        raise ValueError(f"{width} x {height} pixels are too narrow: resized, nothing is left of the short side")
    return size


def _sizes(height: int, width: int, way: KeepRatio) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heights and widths: of the image as the model sees it, and of what it is given, padding included."""
    size = _scaled(height, width, way)
    whole = (_multiple(size[0], way.divisor), _multiple(size[1], way.divisor))
    return (whole if way.fill == "resize" else size), whole


def _multiple(side: int, divisor: int) -> int:
    """The next multiple of `divisor`."""
    return math.ceil(side / divisor) * divisor


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Normalised float32 image (3, crop, crop) of an image of any mode and size.

    Raises ValueError for an image that cannot be converted.
    """
    return torch.from_numpy(normalised(framed(to_rgb(image), preprocessing), preprocessing))


def framed(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """`image` resized and cropped to `crop` x `crop` pixels. Raises ValueError, see `resize_short_side`."""
    side = preprocessing.resize
    if not preprocessing.squeeze:
        image = resize_short_side(image, side, preprocessing.interpolation)
    elif image.size != (side, side):
        image = image.resize((side, side), _RESAMPLING[preprocessing.interpolation])
    return center_crop(image, preprocessing.crop)


def normalised(image: Image.Image | NDArray[np.uint8], preprocessing: Preprocessing | KeepRatio) -> NDArray[np.float32]:
    """(3, H, W): an RGB image, or its pixels (H, W, 3), in the model's order of channels, less the mean, over the
    deviation.

    NumPy, not torch: images are prepared in threads, and torch would start its own threads in each of them.
    """
    scaled = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if preprocessing.channels == "bgr":
        scaled = scaled[::-1]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return np.ascontiguousarray((scaled - mean) / std)
