"""Batches, calibration images, fingerprints."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli.data import batches, calibration_images, fingerprint, open_dataset
from ssmprune_cli.data.preprocess import prepare_image, preprocess
from ssmprune_cli.errors import DataError
from ssmprune_cli.preprocessing import Frame, Preprocessing

PREPROCESSING = Preprocessing(resize=10, crop=8)


def write_images(folder: Path, count: int, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        Image.new("RGB", (12, 12), (index, 0, 0)).save(folder / f"{index:03d}.png")


def write_npz(path: Path, count: int, labels: bool = True) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), dtype=np.uint8)
    np.savez(path, images=images, **({"labels": np.arange(count)} if labels else {}))  # type: ignore[arg-type]
    return path


def names(path: Path, count: int, seed: int = 0) -> list[str]:
    dataset = calibration_images(path, count, seed)
    return [dataset.name(index) for index in range(len(dataset))]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 50])
def test_batches_are_the_images_in_order(batch_size: int, tmp_path: Path) -> None:
    dataset = open_dataset("npz", write_npz(tmp_path / "a.npz", 10))
    found = list(batches(dataset, PREPROCESSING, batch_size))
    sizes = [batch_size] * (10 // batch_size) + ([10 % batch_size] if 10 % batch_size else [])
    assert [len(batch.images) for batch in found] == sizes
    expected = torch.stack([preprocess(dataset.image(index), PREPROCESSING) for index in range(10)])
    assert torch.equal(torch.cat([batch.images for batch in found]), expected)
    assert [name for batch in found for name in batch.names] == [f"images[{index}]" for index in range(10)]
    assert [target for batch in found for target in batch.targets] == list(range(10))


def test_batches_without_labels(tmp_path: Path) -> None:
    dataset = open_dataset("npz", write_npz(tmp_path / "a.npz", 3, labels=False))
    assert [batch.targets for batch in batches(dataset, PREPROCESSING, 2)] == [(None, None), (None,)]


@pytest.mark.parametrize(("limit", "together"), [(144, 1), (2 * 144 + 143, 2), (None, 8)])
def test_large_images_wait_for_each_other(
    limit: int | None, together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of 12 x 12 pixels, and threads that may hold `limit` pixels, until the model's image is made."""

    write_images(tmp_path / "a", 24)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    at_once = threading.Semaphore(together)
    everyone = threading.Barrier(together)

    def watched(image: Image.Image, way: Preprocessing) -> tuple[torch.Tensor, Frame]:
        assert at_once.acquire(blocking=False), "too many at once"
        everyone.wait(30)  # as many as may be are there together
        result = prepare_image(image, way)
        at_once.release()
        return result

    monkeypatch.setattr("ssmprune_cli.data.datasets.prepare_image", watched)
    found = list(batches(open_dataset("imagefolder", tmp_path), PREPROCESSING, 24))
    assert len(found[0].images) == 24


def test_room_is_given_back_by_images_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "a", 6)
    cut = (tmp_path / "a" / "000.png").read_bytes()[:-30]
    for index in range(3):
        (tmp_path / "a" / f"{index:03d}.png").write_bytes(cut)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 144)
    dataset = open_dataset("imagefolder", tmp_path)
    for _ in range(2):
        with pytest.raises(DataError):
            list(batches(dataset, PREPROCESSING, 6))


def test_unreadable_image_is_named_when_its_batch_is_due(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 5)
    (tmp_path / "a" / "003.png").write_bytes(b"no image")
    found = batches(open_dataset("imagefolder", tmp_path), PREPROCESSING, 2)
    assert len(next(found).images) == 2
    with pytest.raises(DataError, match=r"003\.png"):
        next(found)


def test_narrow_image_is_named_before_it_fills_the_memory(tmp_path: Path) -> None:
    """With a short side of 256 pixels it would be 256 x 25,600,000: 20 GB from a file of a few hundred bytes."""
    (tmp_path / "a").mkdir()
    Image.new("1", (100_000, 1)).save(tmp_path / "a" / "narrow.png")
    found = batches(open_dataset("imagefolder", tmp_path), Preprocessing(resize=256, crop=224), 1)
    with pytest.raises(DataError, match=r"a/narrow\.png: cannot be prepared.* 256 x 25600000 pixels"):
        next(found)


def test_no_thread_outlives_the_loader(tmp_path: Path) -> None:
    dataset = open_dataset("npz", write_npz(tmp_path / "a.npz", 10))
    found = batches(dataset, PREPROCESSING, 1)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ssmprune-images")]


def test_calibration_choice_is_by_seed(tmp_path: Path) -> None:
    write_images(tmp_path, 50)
    chosen = names(tmp_path, 8)
    assert len(set(chosen)) == 8
    assert chosen == sorted(chosen) == names(tmp_path, 8)
    assert chosen != names(tmp_path, 8, seed=1)
    assert chosen != [f"{index:03d}.png" for index in range(8)]


def test_calibration_from_a_tree_has_no_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "b", 2)
    write_images(tmp_path / "a" / "deep", 1, start=5)
    write_images(tmp_path, 1, start=9)
    assert sorted(names(tmp_path, 99)) == ["009.png", "a/deep/005.png", "b/000.png", "b/001.png"]
    assert calibration_images(tmp_path, 99, 0).target(0) is None


def test_calibration_from_npz(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", 6, labels=False)
    assert len(calibration_images(path, 4, 0)) == 4
    assert len(calibration_images(path, 64, 0)) == 6


def test_calibration_faults(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        calibration_images(tmp_path, 4, 0)
    with pytest.raises(DataError, match="does not exist"):
        calibration_images(tmp_path / "nowhere", 4, 0)
    write_images(tmp_path, 3)
    (tmp_path / "001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"001\.png"):
        calibration_images(tmp_path, 3, 0)


def test_calibration_images_that_are_all_alike(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.full((3, 8, 8), 5, np.uint8))
    with pytest.raises(DataError, match="all alike"):
        calibration_images(tmp_path / "a.npz", 3, 0)
    assert len(calibration_images(tmp_path / "a.npz", 1, 0)) == 1  # a single image is not an accident


def test_fingerprint(tmp_path: Path) -> None:
    write_images(tmp_path / "one", 3)
    write_images(tmp_path / "two", 3)

    def digest(folder: str) -> str:
        return fingerprint(calibration_images(tmp_path / folder, 3, 0))

    before = digest("one")
    assert len(before) == 64
    assert before == digest("two")  # does not depend on where the images lie
    Image.new("RGB", (12, 12), (1, 0, 1)).save(tmp_path / "two" / "001.png")
    assert before != digest("two")
    (tmp_path / "one" / "002.png").rename(tmp_path / "one" / "003.png")
    assert before != digest("one")
