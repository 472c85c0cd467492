"""Apply a model's `Preprocessing` to a PIL image, with the rounding of torchvision's Resize and CenterCrop on PIL."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ssmprune_cli.data.image_file import check_pixels
from ssmprune_cli.preprocessing import Preprocessing

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


def visible_box(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """What a model sees of an image of `size` (width, height): left, top, right, bottom in pixels of that image.

    It reaches beyond the image where the crop is padded.
    """
    x, y = size[0] / 2, size[1] / 2
    width, height = size if preprocessing.squeeze else (min(size), min(size))  # that become `resize` pixels
    share = preprocessing.crop / preprocessing.resize / 2
    return x - share * width, y - share * height, x + share * width, y + share * height


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


def normalised(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """(3, H, W): an RGB image in the model's order of channels, less the mean, over the deviation.

    NumPy, not torch: images are prepared in threads, and torch would start its own threads in each of them.
    """
    scaled = np.asarray(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if preprocessing.channels == "bgr":
        scaled = scaled[::-1]
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return np.ascontiguousarray((scaled - mean) / std)
