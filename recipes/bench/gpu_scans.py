"""The tables of gpu.py about the scan: agreement with float64, speed beside other kernels, and how it is split."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from gpu_clock import Clock, Plan, Report, Row, Run, cell, race, recorded
from gpu_models import Bench
from ssmprune_cli.kernels import available_backends, selective_scan, use_backend
from ssmprune_cli.kernels.triton import backend as triton_backend

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE = 16
GPU_BACKENDS = ("triton", "mamba_cuda", "chunked")
STOCK = "stock, alone"
LONGEST_CHUNKED = 64 * 4096  # tokens of a batch
Shape = tuple[int, int, int]  # batch, tokens, channels


def present() -> list[str]:
    return [name for name in GPU_BACKENDS if available_backends()[name] == "available"]


def bandwidth(clock: Clock, report: Report, seconds: float, size: int = 2**30) -> float:
    """Bytes a millisecond that a copy of `size` bytes reads and writes together."""
    source = torch.empty(size, dtype=torch.uint8, device=clock.device)
    copy = partial(torch.empty_like(source).copy_, source)
    return 2 * size / statistics.median(race({"copy": copy}, clock, report, seconds)["copy"])


def agreement(bench: Bench, shape: Shape) -> Plan:
    """Of every backend with float64."""
    backends = present()

    def row() -> list[list[str]]:
        batch, length, channels = shape
        wide, narrow = shape, (batch, length, STATE)
        shapes = (wide, wide, (channels, STATE), narrow, narrow, wide[:2], wide[2:], wide)
        values = [torch.randn(each, device=bench.clock.device).bfloat16().double() for each in shapes]
        values[2], values[5], values[6] = -values[2].abs(), values[5].round().abs(), values[6].abs()
        truth = value_and_gradients("chunked", values)
        columns = [value_and_gradients(name, [v.to(d) for v in values]) for name in backends for d in DTYPES.values()]
        use_backend("auto")
        rows = []
        for place, name in enumerate(("y", "u", "delta", "A", "B", "C")):
            expected = truth[place]
            errors = [((each[place].double() - expected).abs().max() / expected.abs().max()).item() for each in columns]
            rows.append([name, *(f"{error:.1e}" for error in errors)])
        return rows

    titles = ("largest error, of the largest entry", *(f"{name}, {p}" for name in backends for p in DTYPES))
    return Plan("agreement", titles, [Row("all", row)])


def value_and_gradients(backend: str, values: list[Tensor]) -> list[Tensor]:
    use_backend(backend)
    inputs = [value.requires_grad_() for value in values[:5]]
    y = selective_scan(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], gap=values[5], gap_delta=values[6])
    return [y.detach(), *torch.autograd.grad(y, inputs, values[7])]


def scans(bench: Bench, shapes: dict[str, Shape], rate: float, *, backward: bool) -> Plan:
    """Aligned scans by every backend beside mamba-ssm's kernel as its own models call it, and the memory's speed."""
    backends = present()
    contestants = [*backends, STOCK] if "mamba_cuda" in backends else backends

    def row(name: str, shape: Shape, dtype: torch.dtype) -> list[list[str]]:
        batch, length, channels = shape
        # Read u, delta, B, C, gap and write y; then read those and dL/dy, and write four gradients.
        passes = (3, 2) if not backward else (3 + 5, 2 + 4)
        floor = dtype.itemsize * batch * length * (passes[0] * channels + passes[1] * STATE) / rate
        made = scan_inputs(bench.clock, shape, dtype, backward=backward)
        runs: dict[str, Run] = {}
        for backend in contestants:
            if backend == STOCK:
                runs[backend] = partial(stock_scan, *stock_inputs(made))
            elif backend != "chunked" or batch * length <= LONGEST_CHUNKED:
                runs[backend] = partial(scan, backend, *made)
        chunked = {each: run for each, run in runs.items() if each == "chunked"}  # its launches are its cost
        graphs = recorded({each: run for each, run in runs.items() if each not in chunked}, bench.clock, bench.report)
        times = bench.race({**graphs, **chunked})
        use_backend("auto")
        bench.clock.forget()
        share = f"{floor / statistics.median(times[contestants[0]]):.0%}" if contestants[0] in times else ""
        return [[name, *(cell(times.get(each)) for each in contestants), f"{floor:.3f}", share]]

    kind = "forward + backward" if backward else "forward"
    titles = (f"aligned scan, {kind}", *(f"{each}, ms" for each in contestants), "memory floor, ms", "of the floor")
    rows = [
        Row(f"{name}, {precision}", partial(row, f"{name}, {precision}", shape, dtype))
        for name, shape in shapes.items()
        for precision, dtype in DTYPES.items()
    ]
    return Plan("scan_backward" if backward else "scan", titles, rows)


Inputs = tuple[list[Tensor], Tensor, Tensor, Tensor | None]  # u, delta, A, B, C; gap; gap_delta; gradient of y


def scan_inputs(clock: Clock, shape: Shape, dtype: torch.dtype, *, backward: bool) -> Inputs:
    batch, length, channels = shape
    normal = partial(torch.randn, device=clock.device, dtype=dtype)
    A = -torch.rand(channels, STATE, device=clock.device, dtype=dtype) * 16
    B, C = (normal((batch, length, STATE)) for _ in range(2))
    inputs = [tensor.requires_grad_(backward) for tensor in (normal(shape), normal(shape).sub_(3), A, B, C)]
    gap, gap_delta = normal(batch, length).ge(1).to(dtype), normal(channels).abs_()
    return inputs, gap, gap_delta, normal(shape) if backward else None


def scan(backend: str, inputs: list[Tensor], gap: Tensor, gap_delta: Tensor, grad: Tensor | None) -> None:
    use_backend(backend)
    u, delta, A, B, C = inputs
    result = selective_scan(u, delta, A, B, C, gap=gap, gap_delta=gap_delta)
    if grad is not None:
        torch.autograd.grad(result, inputs, grad)


def stock_inputs(made: Inputs) -> tuple[list[Tensor], Tensor | None]:
    """The same without gaps, as mamba-ssm takes it: everything (B, channels, L) but A, which is in float32."""
    inputs, _, _, grad = made

    def turned(tensor: Tensor) -> Tensor:
        each = tensor.detach()
        return each.float() if each.ndim == 2 else each.transpose(1, 2).contiguous()

    first = [turned(tensor).requires_grad_(grad is not None) for tensor in inputs]
    return first, None if grad is None else turned(grad)


def stock_scan(inputs: list[Tensor], grad: Tensor | None) -> None:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C = inputs
    result = selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
    if grad is not None:
        torch.autograd.grad(result, inputs, grad)


def splits(bench: Bench, shapes: dict[str, Shape], lengths: Sequence[int]) -> Plan:
    """The forward scan in parts of so many tokens: what `_groups` of kernels/triton/backend.py should choose from."""

    def row(name: str, shape: Shape, dtype: torch.dtype) -> list[list[str]]:
        made = scan_inputs(bench.clock, shape, dtype, backward=False)
        run = partial(scan, bench.clock.scans, *made)
        graphs = recorded({"chosen": run}, bench.clock, bench.report)
        for length in lengths:
            parts = -(-shape[1] // length)
            if length < shape[1]:
                with mock.patch.object(triton_backend, "_groups", lambda *_, parts=parts: parts):
                    graphs |= recorded({str(length): run}, bench.clock, bench.report)
        with mock.patch.object(triton_backend, "_groups", lambda *_: 1):
            graphs |= recorded({"whole": run}, bench.clock, bench.report)
        times = bench.race(graphs)
        use_backend("auto")
        bench.clock.forget()
        columns = ("chosen", "whole", *map(str, lengths))
        return [[name, *(cell(times[each]) if each in times else "" for each in columns)]]

    titles = ("scan, forward", "as chosen, ms", "whole, ms", *(f"{length} tokens, ms" for length in lengths))
    rows = [
        Row(f"{name}, {precision}", partial(row, f"{name}, {precision}", shape, dtype))
        for name, shape in shapes.items()
        for precision, dtype in DTYPES.items()
    ]
    return Plan("splits", titles, rows)
