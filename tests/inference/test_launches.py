"""What a GPU is asked to do: the kernels of Triton that start, with a recorder in the place of the GPU.

Tensors on the device "meta" have no values: a read on the host is an error, and so is a copy to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.kernels import grid_conv2d, use_backend
from ssmprune_cli.kernels.ops import conv, prune
from ssmprune_cli.kernels.triton.backend import TRITON, interpreted
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import PruneSchedule, PruneSettings, TokenPruner
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.measure.every_op import EveryOp

runtime = pytest.importorskip("triton.runtime.jit")
pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter starts kernels another way")

INSIDE: dict[str, Callable[..., Any]] = {  # our ops as they are computed, so that what they start is seen
    "score_tokens": prune._score,
    "order_tokens": prune._order,
    "move_tokens": prune._move,
    "grid_conv2d": conv._grid_conv,
}
QUIET = ("empty", "new_empty", "empty_like", "promote_types")  # start nothing


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that were started, of Triton and of PyTorch."""
    names: list[str] = []
    monkeypatch.setattr(TRITON, "missing", lambda: None)
    monkeypatch.setattr(TRITON, "accepts", lambda example, inner: True)
    monkeypatch.setattr(runtime.JITFunction, "run", lambda self, *args, **options: names.append(self.__name__))
    use_backend("triton")
    yield names
    use_backend("auto")


class Started(EveryOp):
    """Notes kernels of PyTorch, too: every op but views and allocations. All are on the device, or the test fails."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def around(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.__name__.split(".")[0]
        if name in INSIDE:
            with self:
                return INSIDE[name](*args, **kwargs)
        copies = name == "contiguous" and not args[0].is_contiguous()  # counts as a view, though
        if copies or (not func.is_view and name not in QUIET):
            self.names.append(name)
        result = func(*args, **kwargs)
        tensors = [each for each in pytree.tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        assert all(each.device.type == "meta" for each in tensors), f"{name} waits for the device or for the host"
        return result


def of_stage(importance: str, reduction: str, alignment: str) -> tuple[TokenPruner, TokenSequence, ScanStatistics]:
    model = Vim(VimConfig((32, 32), 8, 8, embed_dim=8, depth=3, num_classes=3)).to("meta")
    settings = PruneSettings(PruneSchedule((1, 2), (8, 4)), importance, reduction, alignment)
    pruner = TokenPruner(settings, model.stages, model.mixers).to("meta")
    hidden = torch.empty(2, 17, 8, device="meta", dtype=torch.bfloat16)
    dense = TokenSequence.dense(hidden, (8,))
    sequence = TokenSequence(hidden, hidden.float(), dense.positions, 17, (8,))
    y = torch.empty(2, 17, 16, device="meta", dtype=torch.bfloat16)
    return pruner, sequence, ScanStatistics((y, y))


@pytest.mark.parametrize("reduction", ["drop", "context", "frozen"])
@pytest.mark.parametrize("importance", ["clip", "l1", "l2", "mean"])
def test_a_prune_point_is_three_kernels(started: list[str], importance: str, reduction: str) -> None:
    """Also the second one, where `context` and `frozen` have older tokens; gaps are known then, and need no kernel."""
    pruner, sequence, statistics = of_stage(importance, reduction, "null" if reduction == "drop" else "none")
    expected = ["score_forward", "order_forward", "move_forward"]
    with torch.inference_mode(), Started(started):
        after = pruner(0, sequence, statistics)
        after.both_gaps()
        assert started == expected
        y = statistics.y[0][:, : after.positions.shape[1]].clone()
        started.clear()
        last = pruner(1, after, ScanStatistics((y,)))
        assert started == expected
    assert after.hidden.shape == (2, 9, 8) and last.hidden.shape == (2, 5, 8)
    assert after.residual is not None and after.residual.dtype == torch.float32


@pytest.mark.parametrize("importance", IMPORTANCES.names())
def test_other_scores_add_kernels_of_their_own(started: list[str], importance: str) -> None:
    pruner, sequence, statistics = of_stage(importance, "drop", "none")
    statistics = ScanStatistics(statistics.y, statistics.y)
    with torch.inference_mode(), Started(started):
        pruner(0, sequence, statistics)
    assert started[-2:] == ["order_forward", "move_forward"]


def test_a_grid_convolution_is_one_kernel_and_a_table_of_places(started: list[str]) -> None:
    x, weight = torch.empty(2, 6, 8, device="meta"), torch.empty(8, 3, 3, device="meta")
    with torch.inference_mode(), Started(started):
        assert grid_conv2d(x, weight, None, (2, 3)).shape == x.shape
        assert started == ["contiguous", "grid_conv_forward"]  # of the taps, once channels are last
        started.clear()
        places = torch.empty(2, 6, device="meta", dtype=torch.int64)
        grid_conv2d(x, weight, None, (4, 5), places, outputs=3)
        assert started == ["contiguous", "full", "arange", "scatter_", "grid_conv_forward"]
