"""Backend `cpu`: kernels in C, compiled for the level of the processor."""

from __future__ import annotations

from ssmprune_cli.kernels.cpu.backend import CPU, cpu_facts

__all__ = [
    "CPU",
    "cpu_facts",
]
