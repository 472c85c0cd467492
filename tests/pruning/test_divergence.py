"""Distances of logits, by hand."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from ssmprune_cli.pruning import divergence, soft_divergence


def test_two_classes_by_hand() -> None:
    dense, pruned = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(divergence(dense, pruned)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_one_logit_has_the_probabilities_of_its_sigmoid() -> None:
    """A sigmoid of 3/4 against one of 1/2; as a softmax of one class both would be certain, and the divergence 0."""
    dense, pruned = torch.tensor([[math.log(3)], [0.0]]), torch.zeros(2, 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert divergence(dense, pruned).tolist() == pytest.approx([expected, 0.0])
    both = torch.cat((dense, torch.zeros(2, 1)), dim=1)
    torch.testing.assert_close(soft_divergence(dense, pruned), soft_divergence(both, torch.zeros(2, 2)))


@pytest.mark.parametrize("classes", [1, 5])
def test_pixels_are_rows_and_an_image_is_their_mean(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, pruned = torch.randn(2, 3, classes, 7, 9, generator=generator)
    for distance in (divergence, soft_divergence):
        expected = [distance(*(each[image].flatten(1).t() for each in (dense, pruned))).mean() for image in range(3)]
        for at_once in (1 << 21, 4 * classes):  # in one part, and in 16
            monkeypatch.setattr(sys.modules[divergence.__module__], "_AT_ONCE", at_once)
            found = distance(dense, pruned)
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, torch.stack(expected))
