"""Fused blocks in sessions of CUDA graphs, with stand-ins for the GPU and its clock: when they are taken, when not."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.inference import cuda_blocks, cuda_graph
from ssmprune_cli.inference.cuda_blocks import TOLERANCE
from ssmprune_cli.inference.cuda_graph import CudaGraphSession, Graph
from ssmprune_cli.kernels import use_backend
from ssmprune_cli.kernels.backend import CHUNKED
from ssmprune_cli.kernels.inputs import InnerInputs
from ssmprune_cli.kernels.pytorch import composed
from ssmprune_cli.models import MambaMixer
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import compress

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def record(run: Callable[[Tensor], Tensor], images: Tensor, pool: Any) -> Graph:
    static, output = images.clone(), run(images).clone()

    def replay() -> None:
        output.copy_(run(static))

    return Graph(static, output, replay)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """A backend of PyTorch's ops that says it fuses, and a list of what its fused blocks give."""
    monkeypatch.setattr(CHUNKED, "fuses", True, raising=False)
    monkeypatch.setattr(cuda_graph, "capture", record)
    use_backend("chunked")
    given: list[Tensor] = []

    def inside(inputs: InnerInputs) -> Tensor:
        given.append(composed.mamba_inner(CHUNKED, inputs))
        return given[-1]

    monkeypatch.setattr(CHUNKED, "mamba_inner", inside, raising=False)
    yield given
    use_backend("auto")


def spoil(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Tensor, int], Tensor]) -> None:
    """`wrong` makes of a fused block's output and number what it gives."""
    number = itertools.cycle(range(3))

    def inside(inputs: InnerInputs) -> Tensor:
        return wrong(composed.mamba_inner(CHUNKED, inputs), next(number))

    monkeypatch.setattr(CHUNKED, "mamba_inner", inside)


def clock(monkeypatch: pytest.MonkeyPatch, by_op: float, fast: float) -> None:
    """What the two ways, which take turns, are said to take."""
    times = itertools.cycle((by_op, fast))
    monkeypatch.setattr(cuda_blocks, "seconds", lambda run, device: next(times))


def mixers(model: Vim) -> list[MambaMixer]:
    return [each for each in model.modules() if isinstance(each, MambaMixer)]


def model() -> Vim:
    torch.manual_seed(0)
    made = Vim(VimConfig(image_size=(32, 32), patch_size=8, depth=3, embed_dim=16, num_classes=3))
    for mixer in mixers(made):
        nn.init.normal_(mixer.out_proj.weight)  # so that the logits depend on the blocks
    return made.eval().requires_grad_(False)


def check(session: CudaGraphSession, images: Tensor = IMAGES) -> None:
    # Both ways sum in float32 in their own order: 1e-5 of logits near 1.
    torch.testing.assert_close(session(images), session.definition(images), atol=1e-5, rtol=1e-5)


def test_blocks_that_agree_and_are_faster_are_in_the_graph(
    monkeypatch: pytest.MonkeyPatch, fused: list[Tensor]
) -> None:
    session = CudaGraphSession(model(), {})
    assert session.explain().notes[-1] == "fused blocks are tried when a graph is recorded"
    before = len(session.tensors())
    check(session)
    assert not fused  # the first batch is computed op by op
    clock(monkeypatch, by_op=3.0, fast=2.0)
    check(session)
    fused.clear()
    check(session)
    assert len(fused) == 3
    assert session.explain().notes[-1] == "blocks fused, 1.50 times as fast as op by op: 2x3x32x32"
    assert len(session.tensors()) == before + 3 * 2  # packed parameters and products of each block


def test_blocks_that_are_slower_are_not(monkeypatch: pytest.MonkeyPatch, fused: list[Tensor]) -> None:
    """Each shape is judged by itself."""
    session = CudaGraphSession(model(), {})
    clock(monkeypatch, by_op=2.0, fast=3.0)
    for _ in range(2):
        check(session)
    clock(monkeypatch, by_op=1.0, fast=1.0)
    for _ in range(2):
        check(session, IMAGES.repeat(2, 1, 1, 1))
    fused.clear()
    check(session)
    assert not fused
    check(session, IMAGES.repeat(2, 1, 1, 1))
    assert len(fused) == 3
    assert session.explain().notes[-2:] == (
        "blocks not fused, as that takes 1.50 times op by op: 2x3x32x32",
        "blocks fused, 1.00 times as fast as op by op: 4x3x32x32",
    )


@pytest.mark.parametrize("error", [2 * TOLERANCE[torch.float32], float("nan")])
def test_a_block_that_differs_ends_it(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(mixed: Tensor, block: int) -> Tensor:
        if block == 1:
            mixed[0, 0, 0] += error * mixed.abs().amax()
        return mixed

    spoil(monkeypatch, wrong)
    session = CudaGraphSession(model(), {})
    clock(monkeypatch, by_op=2.0, fast=1.0)
    for _ in range(3):
        check(session)
    assert session.explain().notes[-1].startswith("no fused blocks: block 2 differs by ")


def test_an_error_within_the_tolerance_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda mixed, block: mixed * (1 + TOLERANCE[torch.float32] / 2))
    session = CudaGraphSession(model(), {})
    clock(monkeypatch, by_op=2.0, fast=1.0)
    for _ in range(2):
        session(IMAGES)
    assert session.explain().notes[-1] == "blocks fused, 2.00 times as fast as op by op: 2x3x32x32"


def test_kernels_that_do_not_compile_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(mixed: Tensor, block: int) -> Tensor:
        raise KeyError("out of resource: shared memory\nmore of it")

    spoil(monkeypatch, fail)
    session = CudaGraphSession(model(), {})
    for _ in range(3):
        check(session)
    assert "no fused blocks: 'out of resource: shared memory" in session.explain().notes[-1]


def test_without_graphs_they_run_by_themselves(monkeypatch: pytest.MonkeyPatch, fused: list[Tensor]) -> None:
    def refuse(run: Any, images: Tensor, pool: Any) -> Graph:
        raise RuntimeError("not permitted")

    monkeypatch.setattr(cuda_graph, "capture", refuse)
    for fast, expected in ((1.0, 3), (3.0, 0)):
        session = CudaGraphSession(model(), {})
        clock(monkeypatch, by_op=2.0, fast=fast)
        for _ in range(2):
            check(session)
        fused.clear()
        session(IMAGES)
        assert len(fused) == expected
    assert session.explain().notes == (
        "op by op: a graph could not be recorded (not permitted)",
        "blocks not fused, as that takes 1.50 times op by op: 2x3x32x32",
    )


def test_a_pruned_session_is_judged_anew(monkeypatch: pytest.MonkeyPatch, fused: list[Tensor]) -> None:
    """Where the pruner looks at the scans, the block is computed op by op."""
    dense, pruned = model(), model()
    compress(pruned, 0.5, points=[1], calibration=IMAGES)
    clock(monkeypatch, by_op=2.0, fast=1.0)
    session = CudaGraphSession(dense, {})
    for _ in range(2):
        check(session)
    other = session.with_pruner(pruned.pruner)
    assert other.explain().notes[-1] == "fused blocks are tried when a graph is recorded"
    for _ in range(2):
        check(other)
    fused.clear()
    check(other)
    assert len(fused) == 2
    torch.testing.assert_close(other(IMAGES), pruned(IMAGES), atol=1e-5, rtol=1e-5)
    assert session.explain().notes[-1] == "blocks fused, 2.00 times as fast as op by op: 2x3x32x32"


def test_a_copy_of_a_session_has_trials_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, by_op=2.0, fast=1.0)
    session = CudaGraphSession(model(), {})
    blocks = session._fused
    assert blocks is not None
    other = copy.deepcopy(blocks)
    with blocks._trials.listening() as trials, torch.inference_mode():
        other.model(IMAGES)  # a session that shares nothing is not part of this trial
        thread = threading.Thread(target=blocks.model, args=(IMAGES,))  # nor is what another thread computes
        thread.start()
        thread.join()
        assert not trials
        blocks.model(IMAGES)
    assert [trial.block for trial in trials] == [0, 1, 2] and other.agree(IMAGES)


def test_what_cannot_be_fused_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    hooked = model()
    mixers(hooked)[1].register_forward_hook(lambda *inputs: None)
    clock(monkeypatch, by_op=2.0, fast=1.0)
    session = CudaGraphSession(hooked, {})
    for _ in range(2):
        check(session)
    assert session.explain().notes[-1] == "1 blocks are op by op (block 2: a MambaMixer has hooks)"
    for mixer in mixers(hooked):
        mixer.register_forward_hook(lambda *inputs: None)
    notes = CudaGraphSession(hooked, {}).explain().notes
    assert notes[-1] == "no fused blocks: there is no block to fuse (block 1: a MambaMixer has hooks)"
    monkeypatch.setattr(CHUNKED, "fuses", False)
    notes = CudaGraphSession(model(), {}).explain().notes
    assert notes[-1] == "no fused blocks: the kernel backend chunked has no fused blocks"


def test_blocks_that_the_kernels_do_not_compute_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of a batch of one: it is not timed. Nor are blocks whose scans the pruner looks at."""
    monkeypatch.setattr(CHUNKED, "inner_composed", lambda inputs: "the scans are split", raising=False)
    session = CudaGraphSession(model(), {})
    for _ in range(2):
        check(session)
    assert session.explain().notes[-1] == "blocks not fused: 2x3x32x32 (the scans are split)"
    pruned = model()
    compress(pruned, 0.5, points=[1, 2], calibration=IMAGES)
    mixers(pruned)[2].register_forward_hook(lambda *inputs: None)
    session = CudaGraphSession(pruned, {})
    for _ in range(2):
        check(session)
    assert session.explain().notes[-2] == "blocks not fused: 2x3x32x32 (the pruner looks at their scans)"


def test_seconds_runs_what_it_times() -> None:
    runs: list[int] = []
    assert cuda_blocks.seconds(lambda: runs.append(1), torch.device("cpu")) >= 0 and runs == [1]
