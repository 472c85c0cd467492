"""A model by its fused ops, and by what they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.kernels import fused_ops_apart
from ssmprune_cli.workflows.measure.every_op import EveryOp, op_name


class _Ops(EveryOp):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.names[op_name(func)] += 1
        return func(*args, **kwargs)


@pytest.fixture
def counted() -> Callable[[Callable[[], Any]], tuple[Any, Counter[str]]]:
    """What a call gives, and how often it called each op."""

    def run(call: Callable[[], Any]) -> tuple[Any, Counter[str]]:
        with _Ops() as ops:
            return call(), ops.names

    return run


@pytest.fixture
def used(
    counted: Callable[[Callable[[], Any]], tuple[Any, Counter[str]]],
) -> Callable[[nn.Module, Tensor], tuple[Tensor, Counter[str]]]:
    """Logits of a model in inference, and how often it called each op."""

    def run(model: nn.Module, given: Tensor) -> tuple[Tensor, Counter[str]]:
        with torch.inference_mode():
            return counted(lambda: model(given))

    return run


@pytest.fixture
def apart() -> Callable[[nn.Module, Tensor], Tensor]:
    """Logits of a model in inference, op by op."""

    def run(model: nn.Module, given: Tensor) -> Tensor:
        with torch.inference_mode(), fused_ops_apart():
            logits: Tensor = model(given)
        return logits

    return run


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """The same sums in another order: measured, 7e-7 of the largest logit."""

    def check(found: Tensor, expected: Tensor) -> None:
        assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()

    return check
