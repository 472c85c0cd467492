"""How far a pruned model's answers are from the dense model's, without labels."""

from __future__ import annotations

from torch import Tensor


def divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """KL(dense || pruned) of the class probabilities in nats, (B,) float64; both are logits (B, classes)."""
    expected, found = dense.double().log_softmax(dim=1), pruned.double().log_softmax(dim=1)
    return (expected.exp() * (expected - found)).sum(dim=1)
