"""One training image: cropped, distorted and erased at random, on Pillow and NumPy; and pairs of images mixed.

Everything random is a function of a seed and of the image's place in the epoch, so that a resumed training, or one on
more processes, sees the same images. RandAugment is `rand-m9-mstd0.5-inc1` of the timm library (arXiv 1909.13719).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.data import framed, normalised, to_rgb
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.recipe import Training

_FILL = (124, 116, 104)  # the mean colour of ImageNet
_BICUBIC = Image.Resampling.BICUBIC


def training_image(image: Image.Image, preprocessing: Preprocessing, settings: Training, seed: int) -> Tensor:
    """Normalised float32 image (3, crop, crop); a function of `seed`. ValueError if it cannot be made."""
    draw = random.Random(seed)
    image = to_rgb(image)
    if settings.crop_scale is not None:
        image = random_resized_crop(image, preprocessing.crop, settings.crop_scale, draw)
    else:
        image = framed(image, preprocessing)
    if settings.shift:
        image = shifted(image, *(draw.randint(-settings.shift, settings.shift) for _ in "xy"))
    if settings.flip and draw.random() < 0.5:
        image = ImageOps.mirror(image)
    if settings.randaugment:
        image = rand_augment(image, settings.randaugment, draw)
    pixels = normalised(jittered(image, settings.colour_jitter, draw), preprocessing)
    if settings.erasing and draw.random() < settings.erasing:
        erase(pixels, draw)
    return torch.from_numpy(pixels)


def random_resized_crop(image: Image.Image, size: int, smallest: float, draw: random.Random) -> Image.Image:
    """`size` x `size` pixels of a rectangle of `smallest` to 1 of the area and 3/4 to 4/3 as wide as high."""
    box = crop_box(image.size, smallest, draw)
    if box is None:
        return ImageOps.fit(image, (size, size), _BICUBIC)
    return image.resize((size, size), _BICUBIC, box=box)


def crop_box(
    size: tuple[int, int], smallest: float, draw: random.Random, aspect: float = 1.0
) -> tuple[int, int, int, int] | None:
    """Left, top, right and bottom of a rectangle of `smallest` to 1 of the area of an image of `size` (width, height),
    and 3/4 to 4/3 of `aspect` as wide as high; None if none fits a very narrow image."""
    width, height = size
    for _ in range(10):
        area = width * height * draw.uniform(smallest, 1)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3))) * aspect
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    return None


def jittered(image: Image.Image, amount: float, draw: random.Random) -> Image.Image:
    """Brightness, contrast and saturation changed by up to `amount`; nothing is drawn for 0."""
    if amount:
        for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhancer(image).enhance(1 + draw.uniform(-1, 1) * amount)
    return image


def shifted(image: Image.Image, dx: int, dy: int) -> Image.Image:
    """Pixel (x, y) is that at (x + dx, y + dy); border pixels are repeated."""
    pixels = np.asarray(image)
    rows, columns = (np.arange(n) + by for n, by in zip(pixels.shape[:2], (dy, dx), strict=True))
    moved = pixels[rows.clip(0, pixels.shape[0] - 1)][:, columns.clip(0, pixels.shape[1] - 1)]
    return Image.fromarray(moved)


def erase(pixels: NDArray[np.float32], draw: random.Random) -> None:
    """Random erasing (arXiv 1708.04896): normal noise in a rectangle of 1/50 to 1/3 of `pixels` (3, H, W)."""
    _, height, width = pixels.shape
    for _ in range(10):
        area = height * width * draw.uniform(0.02, 1 / 3)
        ratio = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            noise = np.random.default_rng(draw.getrandbits(64)).standard_normal((3, h, w), dtype=np.float32)
            pixels[:, top : top + h, left : left + w] = noise
            return


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=_FILL)


def _solarize_add(image: Image.Image, amount: float) -> Image.Image:
    return image.point([min(255, value + int(amount)) if value < 128 else value for value in range(256)] * 3)


# (image, strength 0 to 1, random sign) -> image; a larger strength distorts more
_DISTORTIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, m, sign: ImageOps.autocontrast(image),
    lambda image, m, sign: ImageOps.equalize(image),
    lambda image, m, sign: ImageOps.invert(image),
    lambda image, m, sign: image.rotate(sign * 30 * m, _BICUBIC, fillcolor=_FILL),
    lambda image, m, sign: ImageOps.posterize(image, max(1, 4 - int(4 * m))),
    lambda image, m, sign: ImageOps.solarize(image, 256 - int(256 * m)),
    lambda image, m, sign: _solarize_add(image, 110 * m),
    lambda image, m, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * m),
    lambda image, m, sign: _affine(image, 1, sign * 0.3 * m, 0, 0, 1, 0),
    lambda image, m, sign: _affine(image, 1, 0, 0, sign * 0.3 * m, 1, 0),
    lambda image, m, sign: _affine(image, 1, 0, sign * 0.45 * m * image.width, 0, 1, 0),
    lambda image, m, sign: _affine(image, 1, 0, 0, 0, 1, sign * 0.45 * m * image.height),
)


def rand_augment(image: Image.Image, magnitude: float, draw: random.Random) -> Image.Image:
    """Two of 15 distortions, each with probability 1/2, of a strength around `magnitude` (deviation 0.5) of 10."""
    for distort in draw.choices(_DISTORTIONS, k=2):
        strength = min(max(draw.gauss(magnitude, 0.5), 0), 10) / 10
        if draw.random() < 0.5:
            image = distort(image, strength, draw.choice((-1, 1)))
    return image


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels (B,) to probabilities (B, classes): `smoothing` of each spread over all classes."""
    return functional.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(images: Tensor, targets: Tensor, settings: Training, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899) of images 2i and 2i + 1, by the i-th of `seeds`.

    Pairs of neighbours stay in one process however many there are. `images` (B, 3, H, W), `targets` (B, classes).
    """
    mixed, height, width = images.clone(), images.shape[2], images.shape[3]
    shares = torch.ones(len(images))
    for pair, seed in enumerate(seeds):
        draw = random.Random(seed)
        cut = settings.cutmix > 0 and (settings.mixup == 0 or draw.random() < 0.5)
        alpha = settings.cutmix if cut else settings.mixup
        share = draw.betavariate(alpha, alpha)  # of the image itself
        own, other = (slice(2 * pair, 2 * pair + 2), [2 * pair + 1, 2 * pair])
        if cut:
            side = math.sqrt(1 - share)
            y, x = draw.randrange(height), draw.randrange(width)
            top, bottom = (min(max(int(y + sign * side * height / 2), 0), height) for sign in (-1, 1))
            left, right = (min(max(int(x + sign * side * width / 2), 0), width) for sign in (-1, 1))
            mixed[own, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            mixed[own] = share * images[own] + (1 - share) * images[other]
        shares[own] = share
    weight = shares.to(targets)[:, None]
    partners = torch.arange(len(images)).view(-1, 2).flip(1).flatten()
    return mixed, weight * targets + (1 - weight) * targets[partners]
