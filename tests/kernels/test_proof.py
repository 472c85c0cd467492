"""Kernels that no GPU has run yet are compared with PyTorch before they are believed."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor

from ssmprune_cli.kernels.triton.proof import Proofs


class OnGpu(NamedTuple):
    """What is looked at of a tensor."""

    device: torch.device = torch.device("cuda", 0)
    dtype: torch.dtype = torch.float32


GPU = cast(Tensor, OnGpu())
WANTED = torch.tensor([1.0, -3.0, torch.nan, torch.inf])


@pytest.fixture(autouse=True)
def not_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class Calls:
    """A kernel that gives `result`, or raises it, and how often it was called."""

    def __init__(self, result: Any) -> None:
        self.result, self.count = result, 0

    def __call__(self) -> Any:
        self.count += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_a_kernel_that_agrees_is_compared_once() -> None:
    proofs, ours, plain = Proofs(), Calls(WANTED * (1 + 1e-6)), Calls(WANTED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert proofs.computed("score", GPU, ours, plain) is WANTED
        assert proofs.computed("score", GPU, ours, plain) is ours.result
        assert (ours.count, plain.count) == (2, 1)
        proofs.computed("score", cast(Tensor, OnGpu(dtype=torch.bfloat16)), ours, plain)
        proofs.computed("order", GPU, ours, plain)
    assert plain.count == 3, "another dtype and another kernel are compared on their own"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (WANTED + torch.tensor([1e-3, 0, 0, 0]), "differs from PyTorch's"),
        (torch.tensor([1.0, -3.0, 0.0, torch.inf]), "differs from PyTorch's"),
        (WANTED[:3], "differs from PyTorch's"),
        (WANTED.double(), "differs from PyTorch's"),
        (RuntimeError("no such instruction\nand more"), "no such instruction. PyTorch"),
    ],
    ids=["far", "not NaN", "short", "dtype", "does not compile"],
)
def test_a_kernel_that_differs_is_named_and_not_used(wrong: Tensor | Exception, reason: str) -> None:
    proofs, ours, plain = Proofs(), Calls(wrong), Calls(WANTED)
    with pytest.warns(RuntimeWarning, match=f"kernel score is not used on cuda:0 in torch.float32: .*{reason}"):
        assert proofs.computed("score", GPU, ours, plain) is WANTED
    assert proofs.computed("score", GPU, ours, plain) is WANTED and ours.count == 1


def test_rows_and_several_results_are_compared_exactly() -> None:
    rows = torch.tensor([[2, 0, 1]])
    assert Proofs().computed("order", GPU, Calls(rows.clone()), Calls(rows)) is rows
    with pytest.warns(RuntimeWarning, match="kernel move"):
        Proofs().computed("move", GPU, Calls((WANTED, rows + 1)), Calls((WANTED, rows)))


def test_a_recording_waits_for_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    proofs, ours, plain = Proofs(), Calls(WANTED), Calls(WANTED)
    proofs.computed("score", GPU, ours, plain)
    assert (ours.count, plain.count) == (0, 1)


def test_elsewhere_the_interpreter_runs_it() -> None:
    ours, plain = Calls(WANTED), Calls(WANTED)
    Proofs().computed("score", torch.zeros(1), ours, plain)
    assert (ours.count, plain.count) == (1, 0)
