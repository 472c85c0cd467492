"""Sessions of CUDA graphs, with a stand-in for the GPU: what is recorded, when it is replayed, and what falls back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.inference import cuda_graph
from ssmprune_cli.inference.cuda_graph import MAX_GRAPHS, CudaGraphSession, Graph, Turns, capture
from ssmprune_cli.kernels import use_backend
from ssmprune_cli.models.mamba.vim import Vim, VimConfig


class Recorded:
    """What `capture` was asked for; a graph that runs the model again, into the same memory."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.replays = 0

    def __call__(self, run: Callable[[Tensor], Tensor], images: Tensor, pool: Any) -> Graph:
        self.shapes.append(tuple(images.shape))
        static, output = images.clone(), run(images).clone()

        def replay() -> None:
            self.replays += 1
            output.copy_(run(static))

        return Graph(static, output, replay)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorder = Recorded()
    monkeypatch.setattr(cuda_graph, "capture", recorder)
    return recorder


def session() -> CudaGraphSession:
    torch.manual_seed(0)
    return CudaGraphSession(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).eval().requires_grad_(False), {})


def test_a_graph_for_each_batch_size_recorded_once_from_its_second_batch_on(recorded: Recorded) -> None:
    graphs = session()
    for size in (1, 4, 1, 4, 1, 7):
        images = torch.randn(size, 3, 2, 2)
        assert torch.equal(graphs(images), graphs.definition(images))
    assert recorded.shapes == [(1, 3, 2, 2), (4, 3, 2, 2)] and recorded.replays == 3
    assert graphs.explain().notes == (
        f"graphs from the second batch of a shape on: 1x3x2x2, 4x3x2x2; at most {MAX_GRAPHS} shapes",
        "op by op so far: 1 shapes",
    )


def test_a_smaller_batch_is_filled_up_once_and_recorded_when_it_comes_again(recorded: Recorded) -> None:
    model = (
        Vim(VimConfig(image_size=(16, 16), patch_size=8, depth=2, embed_dim=8, num_classes=3))
        .eval()
        .requires_grad_(False)
    )
    use_backend("chunked")  # it fuses nothing, so that a shape is recorded once
    try:
        graphs = CudaGraphSession(model, {})
        for size in (8, 8, 4, 4, 3, 9, 5):
            images = torch.randn(size, 3, 16, 16)
            # Another batch size may take another order of sums: 1e-6 of logits near 1.
            torch.testing.assert_close(graphs(images), model(images), atol=1e-6, rtol=0)
    finally:
        use_backend("auto")
    assert [shape[0] for shape in recorded.shapes] == [8, 4]  # 4 went in 8 the first time, 3 in 4, and 5 in 8
    assert recorded.replays == 5
    assert graphs.explain().notes[1:] == (
        "filled up to the next recorded size so far: 3 shapes",
        "op by op so far: 1 shapes",
        "no fused blocks: the kernel backend chunked has no fused blocks",
    )


def test_a_module_whose_samples_may_depend_on_each_other_is_never_filled_up(recorded: Recorded) -> None:
    class Centred(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) - images.flatten(1).mean(dim=0)

    graphs = CudaGraphSession(Centred(), {})
    for size in (4, 4, 2):
        images = torch.randn(size, 3, 2, 2)
        assert torch.equal(graphs(images), Centred()(images))
    assert len(recorded.shapes) == 1 and recorded.replays == 1


def test_a_stream_waits_for_the_call_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads have two streams: the lock alone would let the second overwrite images that are still being read."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

        def record_event(self) -> str:
            log.append(f"{self.name} ends")
            return f"the end of {self.name}"

    turns = Turns()
    for name in ("first", "second"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, name=name: Stream(name))
        with turns.turn(torch.device("cuda")):
            log.append(f"{name} works")
    assert log == ["first works", "first ends", "second waits for the end of first", "second works", "second ends"]
    with pytest.raises(RuntimeError), turns.turn(torch.device("cuda")):
        raise RuntimeError("after it has started something")
    with turns.turn(torch.device("cuda")):  # the lock is free, and the next call waits for what was started
        assert log[-2:] == ["second ends", "second waits for the end of second"]


def test_results_are_not_overwritten_by_the_next_call(recorded: Recorded) -> None:
    graphs = session()
    graphs(torch.zeros(2, 3, 2, 2))
    first, second = (torch.randn(2, 3, 2, 2) for _ in range(2))
    kept = graphs(first)
    graphs(second)
    assert recorded.replays == 2 and torch.equal(kept, graphs.definition(first))


def test_no_more_graphs_than_stated(recorded: Recorded) -> None:
    graphs = session()
    for size in [*range(1, MAX_GRAPHS + 3)] * 2:
        images = torch.randn(size, 3, 2, 2)
        assert torch.equal(graphs(images), graphs.definition(images))
    assert len(recorded.shapes) == MAX_GRAPHS and graphs.explain().notes[1] == "op by op so far: 2 shapes"


def test_what_cannot_be_recorded_runs_op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(run: Any, images: Tensor, pool: Any) -> Graph:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(cuda_graph, "capture", refuse)
    graphs, images = session(), torch.randn(2, 3, 2, 2)
    for _ in range(3):
        assert torch.equal(graphs(images), graphs.definition(images))
    assert len(tries) == 1
    (note,) = graphs.explain().notes
    assert note == "op by op: a graph could not be recorded (operation not permitted when stream is capturing)"


def test_graphs_from_before_a_failure_stay(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: Any, images: Tensor, pool: Any) -> Graph:
        raise RuntimeError("CUDA out of memory")

    graphs, images = session(), torch.randn(2, 3, 2, 2)
    for _ in range(2):
        graphs(images)
    monkeypatch.setattr(cuda_graph, "capture", refuse)
    for _ in range(2):
        graphs(images[:1])
    assert torch.equal(graphs(images), graphs.definition(images)) and recorded.replays == 2
    assert graphs.explain().notes == (
        f"graphs from the second batch of a shape on: 2x3x2x2; at most {MAX_GRAPHS} shapes",
        "op by op so far: 1 shapes",
        "op by op: a graph could not be recorded (CUDA out of memory)",
    )


def test_images_that_the_model_does_not_take_do_not_end_recording(recorded: Recorded) -> None:
    graphs = session()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shapes"):
            graphs(torch.zeros(2, 3, 9, 9))
        graphs(torch.zeros(2, 3, 2, 2))
    assert (2, 3, 2, 2) in recorded.shapes and "could not" not in str(graphs.explain())


def test_threads_take_turns(recorded: Recorded) -> None:
    graphs, wrong = session(), []

    def work(seed: int) -> None:
        for number in range(50):
            images = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(100 * seed + number))
            if not torch.equal(graphs(images), graphs.definition(images)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_capture_warms_up_on_a_side_stream_and_records_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls that PyTorch asks for, with stand-ins for its streams and graphs."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: object = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            log.append(f"{self.name} waits")

    class CUDAGraph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def inside(name: str) -> Iterator[None]:
        log.append(f"{name} begins")
        yield
        log.append(f"{name} ends")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: inside("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream, capture_error_mode: inside(pool))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)

    def run(images: Tensor) -> Tensor:
        log.append("run")
        return images + 1

    images = torch.zeros(2)
    graph = capture(run, images, "graph")
    assert graph.images is not images and torch.equal(graph.output, torch.ones(2))
    graph.replay()
    assert log == [
        "side waits",
        "stream begins",
        *["run"] * 3,
        "stream ends",
        "main waits",
        "graph begins",
        "run",
        "graph ends",
        "replay",
    ]
