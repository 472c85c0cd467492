"""What this machine is called in reports and logs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(device: torch.device | str = "cpu") -> str:
    """Processor, cores, operating system and the GPU that `device` is, such as "AMD EPYC, 2 cores, Linux x86_64"."""
    described = f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    return described if torch.device(device).type != "cuda" else f"{described}, {torch.cuda.get_device_name(device)}"


def processor() -> str:
    """The CPU's name where the system tells it (Linux), else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
