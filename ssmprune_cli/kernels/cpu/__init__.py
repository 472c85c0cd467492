"""Backend `cpu`: kernels in C, compiled for the level of the processor."""

from __future__ import annotations

from ssmprune_cli.kernels.cpu.backend import CPU, cpu_facts
from ssmprune_cli.kernels.cpu.build import cache_folders

__all__ = [
    "CPU",
    "cache_folders",
    "cpu_facts",
]
