"""The processes that work on one task together, as `torchrun` and `accelerate launch` start them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """Which of so many processes this one is."""

    rank: int = 0
    processes: int = 1


def join_processes(device: str) -> str:
    """Meet the other processes, if there are any. Returns this process's device: one GPU each where there are GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    from accelerate import PartialState

    return str(PartialState(cpu=device == "cpu").device)


def this_process() -> Share:
    if not (distributed.is_available() and distributed.is_initialized()):
        return Share()
    return Share(distributed.get_rank(), distributed.get_world_size())


def gathered(value: Value) -> list[Value]:
    """`value` of every process, in their order."""
    share = this_process()
    values: list[Value] = [value] * share.processes
    if share.processes > 1:
        distributed.all_gather_object(values, value)
    return values


def as_first_process(module: torch.nn.Module) -> None:
    """Give every process the buffers of the first one: statistics of batch norms differ between them."""
    if this_process().processes > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)
