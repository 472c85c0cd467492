"""A model by a session, and op by op."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ssmprune_cli.inference import prepare
from ssmprune_cli.workflows.measure.every_op import EveryOp, op_name


class _Ops(EveryOp):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.names[op_name(func)] += 1
        return func(*args, **kwargs)


class _Flops(EveryOp):
    """As torch's FlopCounterMode, which puts hooks around every module: sessions refuse these."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def around(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func._overloadpacket not in flop_registry:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result


@pytest.fixture
def flops() -> Callable[[Callable[[], Any]], int]:
    """Floating-point operations of what a call does, two for a multiply-add."""

    def run(call: Callable[[], Any]) -> int:
        with _Flops() as counter:
            call()
        total: int = counter.total
        return total

    return run


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
    """Logits of a session of a model, and how often it called each op."""

    def run(model: nn.Module, images: Tensor) -> tuple[Tensor, Counter[str]]:
        session = prepare(model)
        return counted(lambda: session(images))

    return run


@pytest.fixture
def apart() -> Callable[[nn.Module, Tensor], Tensor]:
    """Logits of a model itself, op by op."""

    def run(model: nn.Module, images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
        return logits

    return run


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """The same sums in another order: measured, 7e-7 of the largest logit."""

    def check(actual: Tensor, expected: Tensor) -> None:
        assert (actual - expected).abs().max() <= 3e-6 * expected.abs().max()

    return check
