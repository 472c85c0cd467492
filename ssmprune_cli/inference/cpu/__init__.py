"""Sessions on a CPU: several blocks, or the scans of a block, in one call of the C code."""

from __future__ import annotations

from ssmprune_cli.inference.cpu.session import CpuSession

__all__ = ["CpuSession"]
