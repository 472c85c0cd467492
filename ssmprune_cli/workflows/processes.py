"""The processes that work on one task together, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from ssmprune_cli.errors import SsmpruneError, UsageError, shown

Value = TypeVar("Value")

# What gloo, NCCL and the store of addresses say of a process that has ended or does not answer.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "timeout", "broken pipe", "tcpstore")


@dataclass(frozen=True)
class Share:
    """Which of so many processes this one is."""

    rank: int = 0
    processes: int = 1


def join_processes(device: str, timeout: float) -> str:
    """Meet the other processes, if there are any. Returns this process's device: one GPU each where there are GPUs.

    timeout  seconds after which a process that does not answer is given up, now and whenever the processes talk
    Raises UsageError for an environment that is not as `torchrun` makes it, SsmpruneError if the others do not come.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes == "1":
        return device
    from accelerate import PartialState

    try:
        return str(PartialState(cpu=device == "cpu", timeout=timedelta(seconds=timeout)).device)
    except ValueError as error:
        raise UsageError(
            f"WORLD_SIZE is {shown(processes)}, and the processes cannot meet: {shown(str(error))}",
            hint="Start them with `torchrun` or `accelerate launch`, or unset WORLD_SIZE.",
        ) from error
    except RuntimeError as error:
        raise _lost(error) from error


def this_process() -> Share:
    if not (distributed.is_available() and distributed.is_initialized()):
        return Share()
    return Share(distributed.get_rank(), distributed.get_world_size())


def gathered(value: Value) -> list[Value]:
    """`value` of every process, in their order. Raises SsmpruneError if one has ended or does not answer in time."""
    share = this_process()
    values: list[Value] = [value] * share.processes
    if share.processes > 1:
        with together():
            distributed.all_gather_object(values, value)
    return values


def as_first_process(module: torch.nn.Module) -> None:
    """Give every process the buffers of the first one: statistics of batch norms differ between them."""
    if this_process().processes > 1:
        with together():
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)


@contextmanager
def together() -> Iterator[None]:
    """Around what processes do together: another one that has ended or stopped is an error of ours, no bug."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if this_process().processes > 1 and any(each in text for each in _LOST):
            raise _lost(error) from error
        raise


def _lost(error: Exception) -> SsmpruneError:
    return SsmpruneError(
        f"another process of this work has ended or does not answer: {shown(str(error))}",
        hint="Its own message says why, if it could write one. `--peer-timeout` says how long to wait for one.",
    )
