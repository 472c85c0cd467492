"""The convex fit of a head to the dense model's answers, without labels.

Minimised over V and b, in float64:

    mean KL(softmax(dense) || softmax(V x + b)) + head |V_f - s W|^2 + side |V_r|^2 + 1e-6 |b - b0|^2

x = [f / s, (r - mean) / deviation]: f is what the pruned model's head sees, s its root mean square, r are the means of
dropped tokens. W, b0 are the dense head's. V - V0 stays in the column space of W, so that what is done to the logits
can be done to the features: for fewer classes than features that is no restriction, and for more (1,000 classes) the
number of parameters does not grow with the classes.
Letters: n images, d features, m side features, C classes, q rank of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.pruning.repair.features import Features

BIAS_RIDGE = 1e-6
STEPS = 60
TOLERANCE = 1e-6  # of the gradient in round coordinates
_CURVATURE = 0.1  # about that of the divergence; it only makes the steps better
_RANK = 1e-6  # of the largest singular value


@dataclass(frozen=True)
class Ridge:
    """How much a change of the head's weights, and a weight of a side feature, costs."""

    head: float
    side: float


@dataclass(frozen=True)
class Head:
    """Logits = pooled weight^T + side sides^T + bias: (C, d), (C, m), (C,)."""

    weight: Tensor
    sides: Tensor
    bias: Tensor

    def logits(self, features: Features) -> Tensor:
        """(N, C)"""
        logits: Tensor = features.pooled @ self.weight.T + features.side @ self.sides.T + self.bias
        return logits

    def projection(self) -> Tensor:
        """(d, m): what does the work of `sides` in the features, weight @ projection = sides."""
        projection: Tensor = torch.linalg.pinv(self.weight, rtol=1e-10) @ self.sides
        return projection


class Fit:
    """The problem on one set of images. `solve` starts from the last solution, which is near for a similar ridge."""

    def __init__(self, features: Features, weight: Tensor, bias: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self._base = features.pooled @ weight.T + bias  # (n, C): what the pruned model says
        self._target = _shares(features.dense)
        self._scale = features.pooled.square().mean().sqrt().clamp(min=1e-12)
        self._mean = features.side.mean(dim=0)
        deviation = (features.side - self._mean).square().mean(dim=0).sqrt()
        self._deviation = torch.where(deviation > 0, deviation, 1.0)
        pooled, self._pooled_axes = _compact(features.pooled / self._scale)
        side, self._side_axes = _compact((features.side - self._mean) / self._deviation)
        self._x = torch.cat((pooled, side, pooled.new_ones(len(pooled), 1)), dim=1)  # (n, p)
        self._sizes = [pooled.shape[1], side.shape[1], 1]
        self._gram = self._x.T @ self._x / len(self._x)
        left, singular, _ = torch.linalg.svd(weight, full_matrices=False)
        self._columns = left[:, singular > _RANK * singular[0]]  # (C, q)
        self.change = weight.new_zeros(self._columns.shape[1], self._x.shape[1])  # (q, p), zero for the dense head

    def solve(self, ridge: Ridge, steps: int = STEPS) -> Head:
        """The minimum, by L-BFGS in coordinates in which the problem is round."""
        penalty = self.penalty(ridge)
        lower = torch.linalg.cholesky(_CURVATURE * self._gram + 2 * penalty.diag())
        point = self.change @ lower
        optimiser = torch.optim.LBFGS(
            [point],
            max_iter=steps,
            history_size=10,
            tolerance_grad=TOLERANCE,
            tolerance_change=1e-12,
            line_search_fn="strong_wolfe",
        )

        def change() -> Tensor:
            solved: Tensor = torch.linalg.solve_triangular(lower, point, upper=False, left=False)
            return solved

        def closure() -> Tensor:
            value, slope = self.loss(change(), penalty)
            point.grad = torch.linalg.solve_triangular(lower.T, slope, upper=True, left=False).contiguous()
            return value

        optimiser.step(closure)
        self.change = change()
        return self._head()

    def penalty(self, ridge: Ridge) -> Tensor:
        """(p,)"""
        values = torch.tensor([ridge.head, ridge.side, BIAS_RIDGE], dtype=self._x.dtype)
        return values.repeat_interleave(torch.tensor(self._sizes))

    def loss(self, change: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, but for a constant, at `change` (q, p), and its gradient."""
        logits = self._base + (self._x @ change.T) @ self._columns.T
        logarithms = _padded(logits).log_softmax(dim=1)
        value = -(self._target * logarithms).sum(dim=1).mean() + (penalty * change.square()).sum()
        residual = (logarithms.exp() - self._target)[:, : logits.shape[1]] / len(logits)
        return value, self._columns.T @ residual.T @ self._x + 2 * penalty * change

    def _head(self) -> Head:
        """The solution in terms of the features as they are."""
        pooled, side, constant = (self._columns @ self.change).split(self._sizes, dim=1)
        sides = side @ self._side_axes.T / self._deviation
        return Head(
            self._weight + pooled @ self._pooled_axes.T / self._scale,
            sides,
            self._bias + constant[:, 0] - sides @ self._mean,
        )


def _padded(logits: Tensor) -> Tensor:
    """One logit is that of a yes against a no."""
    return logits if logits.shape[1] > 1 else functional.pad(logits, (0, 1))


def _shares(logits: Tensor) -> Tensor:
    return _padded(logits).softmax(dim=1)


def _compact(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` (n, c) as (n, k) in orthonormal axes (c, k), k no more than n: a ridge leaves all others at zero."""
    if values.shape[1] <= len(values):
        return values, torch.eye(values.shape[1], dtype=values.dtype)
    axes = torch.linalg.qr(values.T).Q
    return values @ axes, axes
