"""What a model costs: multiply-adds, time and its parts, the floor, memory, and on which device."""

from __future__ import annotations

from ssmprune_cli.workflows.measure.breakdown import time_by_part
from ssmprune_cli.workflows.measure.device import resolve_device
from ssmprune_cli.workflows.measure.every_op import EveryOp, op_name
from ssmprune_cli.workflows.measure.floor import Floor, floor
from ssmprune_cli.workflows.measure.flops import count_flops
from ssmprune_cli.workflows.measure.machine import machine, processor
from ssmprune_cli.workflows.measure.memory import peak_memory, peak_memory_of
from ssmprune_cli.workflows.measure.precision import in_precision
from ssmprune_cli.workflows.measure.time import Progress, Speed, interleaved_speeds, quartiles
from ssmprune_cli.workflows.measure.traffic import bytes_moved

__all__ = [
    "EveryOp",
    "Floor",
    "Progress",
    "Speed",
    "bytes_moved",
    "count_flops",
    "floor",
    "in_precision",
    "interleaved_speeds",
    "machine",
    "op_name",
    "peak_memory",
    "peak_memory_of",
    "processor",
    "quartiles",
    "resolve_device",
    "time_by_part",
]
