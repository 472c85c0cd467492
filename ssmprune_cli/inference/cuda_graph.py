"""The session on a GPU: a forward pass is recorded once for each batch size, and replayed.

A pruned model starts many small kernels. Without a graph the processor cannot start them as fast as the GPU runs them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.behaviour import global_hooks
from ssmprune_cli.inference.copying import cloned
from ssmprune_cli.inference.cuda_blocks import FusedBlocks
from ssmprune_cli.inference.session import Session, refuse_global_hooks
from ssmprune_cli.interface import Pruner
from ssmprune_cli.models import Backbone

MAX_GRAPHS = 16  # shapes of batches; each graph holds memory of its own for what it computes
WARM_UP = 3  # runs before a capture: kernels are compiled and chosen in the first ones


class Graph(NamedTuple):
    """One recorded forward pass.

    images, output  what it reads and what it writes, always the same memory
    replay          computes it again
    """

    images: Tensor
    output: Tensor
    replay: Callable[[], None]


def capture(run: Callable[[Tensor], Tensor], images: Tensor, pool: Any) -> Graph:
    """Record `run` on images like these, with what it computes in `pool`. Raises RuntimeError if something in it cannot
    be recorded."""
    static = images.clone()
    device = images.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run(static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads with other sessions go on.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        output = run(static)
    return Graph(static, output, graph.replay)


class Turns:
    """Calls from several threads, one after the other: graphs share their memory.

    A lock orders what the threads ask for. The GPU works later, and threads may have streams of their own: so a stream
    first waits for the call before it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        with self._lock:
            if device.type != "cuda":
                yield
                return
            stream = torch.cuda.current_stream(device)
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                yield
            finally:  # what a call that failed has started may read and write the same memory
                self._last = stream.record_event()


class CudaGraphSession(Session):
    """Holds up to MAX_GRAPHS graphs, which share one pool of memory. A shape is recorded when it comes for the second
    time: the first one shows whether the model takes it. What is recorded has fused blocks if these agree with op by op
    on that batch and are no slower: see cuda_blocks. A first batch that is smaller than one that was recorded, such
    as the last of a data set, is filled up to that size; its samples do not depend on those beside them. Batches of
    more shapes, and models in which an op cannot be recorded, run op by op, and `explain` says so. One call runs at a
    time."""

    kind = "cuda_graph"
    silent = "in a graph of the whole pass"

    def __init__(self, definition: nn.Module, refused: dict[str, str]) -> None:
        super().__init__(definition, refused)
        self._fused = FusedBlocks(definition, self._journal) if isinstance(definition, Backbone) else None
        self._begin()

    def _begin(self) -> None:
        self._fused_without_graph = False
        self._graphs: dict[tuple[int, ...], Graph] = {}
        self._pool: Any = None
        self._failed: str | None = None
        self._seen: set[tuple[int, ...]] = set()
        self._filled: set[tuple[int, ...]] = set()
        self._turns = Turns()

    @classmethod
    def refuses(cls, definition: nn.Module) -> str | None:
        if next((each.device.type for each in definition.parameters()), "cpu") != "cuda":
            return "is for NVIDIA GPUs"
        return "hooks are registered for all modules, and a graph calls no hooks" if global_hooks() else None

    def compute(self, images: Tensor) -> Tensor:
        refuse_global_hooks()
        with self._turns.turn(images.device):
            graph = self._graph(images)
            if graph is None:
                fast = self._fused.model if self._fused is not None and self._fused_without_graph else self.definition
                output: Tensor = fast(images)
                self._seen.add(tuple(images.shape))
                return output
            self._seen.add(tuple(images.shape))
            batch = len(images)
            graph.images[:batch].copy_(images)
            graph.replay()
            whole = batch == len(graph.images)
            copied: Tensor = cloned(graph.output if whole else graph.output[:batch])
            return copied

    def _graph(self, images: Tensor) -> Graph | None:
        """The graph for `images`: of their shape, or of a larger batch the first time."""
        shape = tuple(images.shape)
        if shape in self._graphs:
            return self._graphs[shape]
        if shape not in self._seen:
            larger = self._larger(shape)
            if larger is not None:
                self._filled.add(shape)
            return larger
        if len(self._graphs) < MAX_GRAPHS and self._failed is None:
            try:
                if self._pool is None and images.device.type == "cuda":
                    self._pool = torch.cuda.graph_pool_handle()
                self._graphs[shape] = capture(self.definition, images, self._pool)
            except RuntimeError as error:
                self._failed = str(error).splitlines()[0]
            if self._fused is not None:
                self._try_fused(self._fused, images, self._graphs.get(shape))
        return self._graphs.get(shape) or self._larger(shape)

    def _try_fused(self, fused: FusedBlocks, images: Tensor, graph: Graph | None) -> None:
        """Put one with fused blocks in the place of `graph`, or of what runs without one, where that is right."""
        try:
            if not fused.agree(images):
                return
            if graph is None:
                slow, fast = (lambda: self.definition(images)), (lambda: fused.model(images))
                self._fused_without_graph = fused.faster(slow, fast, images)
                return
            other = capture(fused.model, images, self._pool)
            if fused.faster(graph.replay, other.replay, images):
                self._graphs[tuple(images.shape)] = other
        except Exception as error:  # a compiler of kernels raises many kinds, and op by op works
            fused.refuse(error)

    def _larger(self, shape: tuple[int, ...]) -> Graph | None:
        """The smallest graph of more images of this size, of a model whose samples are known to be apart."""
        if not isinstance(self.definition, Backbone):
            return None
        fitting = [each for each in self._graphs if each[0] > shape[0] and each[1:] == shape[1:]]
        graph = self._graphs[min(fitting)] if fitting else None
        return graph if graph is not None and isinstance(graph.output, Tensor) else None

    def observed(self, images: Tensor) -> None:
        self.definition(images)

    def repruned(self, pruner: Pruner | None) -> None:
        self._fused = None if self._fused is None else self._fused.with_pruner(pruner)
        self._begin()

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *([] if self._fused is None else self._fused.tensors())]

    def notes(self) -> tuple[str, ...]:
        blocks = () if self._fused is None else self._fused.notes()
        failure = () if self._failed is None else (f"op by op: a graph could not be recorded ({self._failed})",)
        if failure and not self._graphs:
            return (*failure, *blocks)
        shapes = ", ".join("x".join(map(str, shape)) for shape in self._graphs) or "none yet"
        notes = [f"graphs from the second batch of a shape on: {shapes}; at most {MAX_GRAPHS} shapes"]
        if self._filled:
            notes.append(f"filled up to the next recorded size so far: {len(self._filled)} shapes")
        by_op = len(self._seen - self._filled - set(self._graphs))
        if by_op:
            notes.append(f"op by op so far: {by_op} shapes")
        return (*notes, *failure, *blocks)
