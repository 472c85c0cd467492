"""The session on a GPU: a forward pass is recorded once for each batch size, and replayed.

A pruned model starts many small kernels. Without a graph the processor cannot start them as fast as the GPU runs them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.behaviour import global_hooks
from ssmprune_cli.inference.copying import cloned
from ssmprune_cli.inference.session import Session, refuse_global_hooks
from ssmprune_cli.interface import Pruner

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


def capture(run: Callable[[Tensor], Tensor], images: Tensor) -> Graph:
    """Record `run` on images like these. Raises RuntimeError if something in it cannot be recorded."""
    static = images.clone()
    device = images.device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run(static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other threads go on with theirs
        output = run(static)
    return Graph(static, output, graph.replay)


class CudaGraphSession(Session):
    """Holds up to MAX_GRAPHS graphs. A shape is recorded when it comes for the second time: the first one shows whether
    the model takes it, and a ragged last batch is not worth a graph. Batches of more shapes, and models in which an op
    cannot be recorded, run op by op, and `explain` says so. One call runs at a time: graphs share input and output."""

    kind = "cuda_graph"
    silent = "in a graph of the whole pass"

    def __init__(self, definition: nn.Module, refused: dict[str, str]) -> None:
        super().__init__(definition, refused)
        self._begin()

    def _begin(self) -> None:
        self._graphs: dict[tuple[int, ...], Graph] = {}
        self._failed: str | None = None
        self._seen: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()

    @classmethod
    def refuses(cls, definition: nn.Module) -> str | None:
        if next((each.device.type for each in definition.parameters()), "cpu") != "cuda":
            return "is for NVIDIA GPUs"
        return "hooks are registered for all modules, and a graph calls no hooks" if global_hooks() else None

    def compute(self, images: Tensor) -> Tensor:
        refuse_global_hooks()
        with self._lock:
            graph = self._graph(images)
            if graph is None:
                output: Tensor = self.definition(images)
                self._seen.add(tuple(images.shape))
                return output
            graph.images.copy_(images)
            graph.replay()
            copied: Tensor = cloned(graph.output)
            return copied

    def _graph(self, images: Tensor) -> Graph | None:
        shape = tuple(images.shape)
        new = shape in self._seen and shape not in self._graphs
        if new and len(self._graphs) < MAX_GRAPHS and self._failed is None:
            try:
                self._graphs[shape] = capture(self.definition, images)
            except RuntimeError as error:
                self._failed = str(error).splitlines()[0]
        return self._graphs.get(shape)

    def observed(self, images: Tensor) -> None:
        self.definition(images)

    def repruned(self, pruner: Pruner | None) -> None:
        self._begin()

    def notes(self) -> tuple[str, ...]:
        if self._failed is not None:
            return (f"op by op: a graph could not be recorded ({self._failed})",)
        shapes = ", ".join("x".join(map(str, shape)) for shape in self._graphs) or "none yet"
        notes = [f"graphs from the second batch of a shape on: {shapes}; at most {MAX_GRAPHS} shapes"]
        if len(self._seen) > len(self._graphs):
            notes.append(f"op by op so far: {len(self._seen) - len(self._graphs)} shapes")
        return tuple(notes)
