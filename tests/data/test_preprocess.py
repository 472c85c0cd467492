"""Preprocessing against torchvision's documented rounding, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli.data.preprocess import center_crop, preprocess, resize_short_side, to_rgb
from ssmprune_cli.preprocessing import Preprocessing

IDENTITY = Preprocessing(resize=8, crop=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 375), (341, 256)),  # 256 * 500 / 375 = 341.33
        ((375, 500), (256, 341)),
        ((3, 5), (256, 426)),  # 426.67 is cut, not rounded
        ((256, 300), (256, 300)),  # already right: not resampled
        ((7, 7), (256, 256)),
    ],
)
def test_short_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_short_side(Image.new("RGB", size), 256, "bicubic").size == expected


def test_resize_is_pils_resize() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for name, filter_ in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        expected = np.asarray(image.resize((15, 10), filter_))
        np.testing.assert_array_equal(np.asarray(resize_short_side(image, 10, name)), expected)


@pytest.mark.parametrize(
    ("side", "first"),
    [
        (8, 0),
        (10, 1),
        (9, 0),  # round(0.5) is 0: halves go to the even number
        (11, 2),  # round(1.5) is 2
    ],
)
def test_crop_offset(side: int, first: int) -> None:
    columns = np.tile(np.arange(side, dtype=np.uint8), (8, 1))
    cropped = np.asarray(center_crop(Image.fromarray(columns), 8))
    assert cropped[0].tolist() == list(range(first, first + 8))


def test_crop_pads_with_zeros() -> None:
    cropped = np.asarray(center_crop(Image.new("RGB", (5, 12), (9, 9, 9)), 8))
    assert cropped.shape == (8, 8, 3)
    # Three columns are missing: one on the left (3 // 2), two on the right.
    assert cropped[0, :, 0].tolist() == [0, 9, 9, 9, 9, 9, 0, 0]


def test_values_are_normalised() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    settings = Preprocessing(resize=8, crop=8)
    tensor = preprocess(Image.fromarray(pixels), settings)
    expected = (pixels / 255.0 - np.array(settings.mean)) / np.array(settings.std)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 8, 8)
    # A few float32 roundings of values up to 2.7.
    np.testing.assert_allclose(tensor.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_every_mode(mode: str) -> None:
    assert to_rgb(Image.new(mode, (8, 8))).mode == "RGB"
    assert preprocess(Image.new(mode, (8, 8)), IDENTITY).shape == (3, 8, 8)


def test_16_bit_grey_is_scaled() -> None:
    image = Image.fromarray(np.full((8, 8), 0x8080, dtype=np.uint16))
    assert to_rgb(image).getpixel((0, 0)) == (0x80, 0x80, 0x80)


def test_grey_is_repeated() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    tensor = preprocess(image, IDENTITY)
    assert torch.equal(tensor[0], tensor[1])
    assert torch.equal(tensor[0], tensor[2])
    assert float(tensor[0, 7, 7]) == pytest.approx(63 / 255)


def test_transparent_palette() -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0] + [0] * 765)
    image.info["transparency"] = b"\x00"  # PIL warns, and the suite fails, if this is not handled
    assert to_rgb(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("size", "resized", "box"),
    [
        ((50, 20), (40, 16), (14, 2, 26, 14)),
        ((20, 50), (16, 40), (2, 14, 14, 26)),
        ((5, 4), (20, 16), (4, 2, 16, 14)),  # small: enlarged
        ((17, 16), (17, 16), (2, 2, 14, 14)),  # (17 - 12) / 2 is 2.5, rounded to the even number
    ],
)
def test_whole_way_against_plain_pil(
    size: tuple[int, int], resized: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.asarray(image.resize(resized, Image.Resampling.BICUBIC).crop(box)).transpose(2, 0, 1)
    tensor = preprocess(image, Preprocessing(resize=16, crop=12, mean=IDENTITY.mean, std=IDENTITY.std))
    assert torch.equal(tensor, torch.from_numpy(expected.astype(np.float32) / 255))


def test_files_as_cameras_and_printers_write_them(tmp_path: Path) -> None:
    """The EXIF orientation is left alone, as in training; alpha is cut off, not blended; CMYK becomes RGB."""
    bright = Image.new("RGB", (8, 8))
    bright.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # orientation: turned by 180 degrees
    bright.save(tmp_path / "turned.png", exif=exif)
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "alpha.png")

    def load(name: str) -> torch.Tensor:
        with Image.open(tmp_path / name) as image:
            return preprocess(image, IDENTITY)

    assert load("turned.png").mean(dim=(0, 2)).tolist() == [1.0] * 4 + [0.0] * 4
    assert load("alpha.png")[:, 0, 0].tolist() == pytest.approx([10 / 255, 20 / 255, 30 / 255])
    assert load("cmyk.jpg")[:, 4, 4].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=2 / 255)  # JPEG rounds
