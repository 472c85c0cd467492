"""What `ssmprune compare` holds in memory: logits of all images, and images only where they are few."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ssmprune_cli.data import Batch, ImageDataset, batches, open_dataset
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import PruneSchedule
from ssmprune_cli.pruning.method import Method
from ssmprune_cli.workflows import compare as workflow
from ssmprune_cli.workflows.compare import Comparison
from ssmprune_cli.workflows.source import Source

CHECKPOINT = Path(__file__).parent / "golden" / "containers" / "vim_like.pth"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(10))
    return open_dataset("npz", path)


def test_labels_of_other_classes_are_no_accuracy(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.array([0, 1, 2, 99]))
    images = open_dataset("npz", tmp_path / "images.npz")
    (row,), notes = workflow.compare(Source(CHECKPOINT), images, [], [], rounds=1)
    assert row.top1 is None and row.divergence == 0
    assert notes == ["Accuracy is left out: has the label 99, and the model has 10 classes (0 to 9)."]


@pytest.mark.parametrize("few", [True, False])
def test_many_images_are_read_anew_for_each_model_and_few_are_kept(
    dataset: ImageDataset, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(images: ImageDataset, preprocessing: Preprocessing, batch_size: int) -> Iterator[Batch]:
        for batch in batches(images, preprocessing, batch_size):
            sizes.append(len(batch.images))
            yield batch

    def compared() -> list[float | None]:
        comparison = Comparison(Source(CHECKPOINT), dataset, limit=None, batch_size=4, device="cpu", rounds=1)
        settings = Method("clip", "drop", "none").settings(PruneSchedule((1,), (5,)), 0)
        rows = [comparison.dense(), comparison.pruned("drop", "", settings, None)]
        assert rows[0].speedup == 1.0  # a model is as fast as itself
        for row in rows:  # one statistic for a row
            assert row.images_per_second == pytest.approx(rows[0].images_per_second * row.speedup)
        assert comparison.model.pruner is None and len(comparison.images) == 10
        return [number for row in rows for number in (row.divergence, row.top1, row.share)]

    expected = compared()
    monkeypatch.setattr(workflow, "batches", counted)
    if not few:
        monkeypatch.setattr(workflow, "KEPT_BYTES", 9 * 4 * 3 * 64 * 64)
    assert compared() == expected
    assert sizes == [4, 4, 2] * (1 if few else 2)
