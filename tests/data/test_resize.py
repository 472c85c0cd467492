"""Images as dense models take them: cv2's resizing bit for bit, sides in proportion, padding, EXIF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from ssmprune_cli.data import visible_box
from ssmprune_cli.data.preprocess import prepare_image
from ssmprune_cli.data.resize import resize_linear
from ssmprune_cli.preprocessing import Frame, KeepRatio

GOLDEN = Path(__file__).parent.parent / "golden" / "cv2" / "resize_linear.npz"
ZERO, LEVEL = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)  # mean and std that leave pixels as they are


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_resizing_is_that_of_cv2_bit_for_bit() -> None:
    """Larger, smaller, one side only, half in both directions (a mean of four) and in one, single rows and columns."""
    with np.load(GOLDEN) as arrays:
        count = len(arrays.files) // 2
        assert count == 9
        for number in range(count):
            expected = arrays[f"resized_{number}"]
            found = resize_linear(arrays[f"image_{number}"], *expected.shape[:2])
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, expected)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_resizing_is_linear_to_a_grey_level(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    """Against four neighbours in float64. Weights of 11 bits, and shifts that round down, cost less than a level."""
    image = noise(height, width, seed)

    def places(before: int, after: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        place = ((np.arange(after) + 0.5) * before / after - 0.5).clip(0, before - 1)
        first = np.floor(place).astype(np.int64)
        return first, (first + 1).clip(0, before - 1), place - first

    y, y2, dy = places(height, rows)
    x, x2, dx = places(width, columns)
    lines = image[y] * (1 - dy)[:, None, None] + image[y2] * dy[:, None, None]
    exact = lines[:, x] * (1 - dx)[:, None] + lines[:, x2] * dx[:, None]
    assert np.abs(resize_linear(image, rows, columns) - exact).max() < 1.01


@pytest.mark.parametrize(
    ("size", "way", "scaled", "shape"),
    [
        ((512, 683), KeepRatio(2048, 512), (512, 683), (512, 683)),  # of ADE20K, as it is
        ((75, 101), KeepRatio(320, 96), (96, 129), (96, 129)),
        ((75, 131), KeepRatio(320, 88, divisor=32), (96, 160), (96, 160)),  # resized twice
        ((60, 100), KeepRatio(90, 80), (54, 90), (54, 90)),  # the long side is the limit
        ((31, 50), KeepRatio(100, 80, divisor=32, fill="pad"), (62, 100), (64, 128)),
        ((5, 5), KeepRatio(100, 3, divisor=2, fill="pad"), (3, 3), (4, 4)),
    ],
)
def test_sides_stay_in_proportion(
    size: tuple[int, int], way: KeepRatio, scaled: tuple[int, int], shape: tuple[int, int]
) -> None:
    image = Image.fromarray(noise(*size))
    found, frame = prepare_image(image, way)
    assert frame == Frame(size, scaled) and tuple(found.shape) == (3, *shape)
    padded = found.clone()
    padded[:, : scaled[0], : scaled[1]] = 0
    assert not padded.any()
    box = visible_box(image.size, way)
    assert box == pytest.approx((0, 0, size[1] * shape[1] / scaled[1], size[0] * shape[0] / scaled[0]))


def test_a_second_resizing_starts_from_the_first_one() -> None:
    """Of PlainMamba's pipeline: 75 x 131 pixels become 88 x 154, and then 96 x 160."""
    image = noise(75, 131)
    found, _ = prepare_image(Image.fromarray(image), KeepRatio(320, 88, divisor=32, mean=ZERO, std=LEVEL))
    twice = resize_linear(resize_linear(image, 88, 154), 96, 160)
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), twice, atol=1e-4)
    assert not np.array_equal(twice, resize_linear(image, 96, 160))


def test_channels_and_normalisation() -> None:
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    way = KeepRatio(4, 4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0))
    found, _ = prepare_image(image, way)
    assert found[:, 0, 0].tolist() == pytest.approx([1.0, -0.5, 0.1])
    swapped, _ = prepare_image(image, KeepRatio(4, 4, mean=way.mean, std=way.std, channels="bgr"))
    assert swapped[:, 0, 0].tolist() == pytest.approx([-0.6, -0.5, 0.5])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    """The eight turns, written down pixel by pixel; cv2.imread (5.0.0) makes the same of PNG, JPEG, TIFF and WebP."""
    pixels = noise(2, 3)
    turns = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels.transpose(1, 0, 2)[:, ::-1],
        7: pixels.transpose(1, 0, 2)[::-1, ::-1],
        8: pixels.transpose(1, 0, 2)[::-1],
    }
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=tags)
    expected = turns[orientation]
    with Image.open(tmp_path / "image.png") as image:
        found, frame = prepare_image(image, KeepRatio(3, 2, mean=ZERO, std=LEVEL))
    assert frame.original == expected.shape[:2]
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_an_image_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(ValueError, match="2000 x 1 pixels are too narrow"):
        prepare_image(Image.new("RGB", (2000, 1)), KeepRatio(500, 100))


def test_a_grey_image_has_three_channels() -> None:
    found, _ = prepare_image(Image.new("L", (4, 4), 51), KeepRatio(4, 4, mean=ZERO, std=LEVEL))
    assert torch.allclose(found, torch.full((3, 4, 4), 51.0))
