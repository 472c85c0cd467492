"""What the tables of gpu.py are measured with: a clock, a plan of rows, and a report that ends in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from tables import Tables

Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One or a few lines of a table; `measure` gives their cells."""

    label: str
    measure: Callable[[], Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Plan:
    """A table that is to be measured, row by row."""

    name: str
    titles: tuple[str, ...]
    rows: Sequence[Row]


class Report:
    """Lines that go to the terminal and, with their times, to the log beside the CSV files."""

    def __init__(self, csv: Path | None, minutes: float) -> None:
        self._start = time.monotonic()
        self._deadline = self._start + 60 * minutes
        self._log = csv and csv.with_suffix(".log")
        self.tables = Tables(csv, self.line)
        self.failures: list[str] = []
        if self._log is not None:
            self._log.write_text(f"started {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC\n")

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self.log(text)

    def log(self, text: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{time.monotonic() - self._start:7.1f} s  {text}\n")

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.line(text)

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def carry_out(self, plans: Sequence[Plan]) -> None:
        """Measure rows until the time is over, and name the others. A row that fails is named, and ends nothing."""
        late = []
        for plan in plans:
            begun = False
            for row in plan.rows:
                if self.seconds_left < 0:
                    late.append(f"{plan.name} ({row.label})")
                    continue
                if not begun:
                    self.tables.start(plan.name, *plan.titles)
                    begun = True
                try:
                    for cells in row.measure():
                        self.tables.row(*cells)
                except Exception as error:  # whatever it is, the time on the GPU is for the other rows
                    self.fail(f"{plan.name} ({row.label}) failed: {type(error).__name__}: {error}")
        if late:
            self.line(f"\nNot measured for want of time: {', '.join(late)}.")


class Clock:
    """Times and records on a GPU.

    device     where tensors are made
    sequential  a backend that computes op by op in PyTorch
    scans      the backend whose scan is split
    """

    device = "cuda"
    sequential = "chunked"
    scans = "triton"

    def milliseconds(self, run: Run, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        elapsed: float = start.elapsed_time(end)
        return elapsed / calls

    def graphed(self, run: Run) -> Run:
        """`run` recorded as a CUDA graph; its inputs and outputs stay where they are."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def launches(self, run: Run) -> int:
        """Kernels that `run` starts."""
        from torch.profiler import ProfilerActivity, profile

        run()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        copies = ("Memcpy", "Memset")
        return sum(each.device_type.name == "CUDA" and not each.name.startswith(copies) for each in profiler.events())

    def forget(self) -> None:
        """Free what nobody holds."""
        torch.cuda.empty_cache()


def race(contestants: dict[str, Run], clock: Clock, report: Report, seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call in every round. Those that cannot run, for want of memory say, are left out and logged."""
    times: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for name, run in contestants.items():
        try:
            run()
            first = clock.milliseconds(run, 1)
            for _ in range(3 if first < 100 else 0):
                run()
            calls[name] = max(1, min(200, round(10 / max(clock.milliseconds(run, 1), 1e-3))))  # about 10 ms a round
            times[name] = []
        except RuntimeError as error:
            report.log(f"{name} did not run: {error}")
            clock.forget()
    end = time.monotonic() + seconds * len(times)
    while times and (time.monotonic() < end or min(map(len, times.values())) < 3):
        for name, rounds in times.items():
            rounds.append(clock.milliseconds(contestants[name], calls[name]))
    return times


def recorded(runs: dict[str, Run], clock: Clock, report: Report) -> dict[str, Run]:
    """Each as a graph. Those that cannot be recorded are left out and logged."""
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            graphs[name] = clock.graphed(run)
        except RuntimeError as error:
            report.log(f"{name} could not be recorded: {error}")
            clock.forget()
    return graphs


def cell(times: list[float] | None) -> str:
    if times is None:
        return "did not run"
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return f"{median:.3f} ({low:.3f} to {high:.3f})"
