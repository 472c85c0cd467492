"""`ssmprune env`: what a bug report needs to know of the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from ssmprune_cli import __version__
from ssmprune_cli.cli import output
from ssmprune_cli.cli.options import AsJson
from ssmprune_cli.plugins import family_plugins

PACKAGES = ("torch", "numpy", "safetensors", "mamba-ssm", "causal-conv1d", "triton")


def command(as_json: AsJson = False) -> None:
    """Print versions, devices and kernel backends, with the reason for each backend that is missing."""
    from ssmprune_cli.cli.tables import facts_table

    facts = _facts()
    output.emit(facts_table(facts), facts, as_json=as_json)


def _facts() -> dict[str, Any]:
    import torch

    from ssmprune_cli.kernels import available_backends, cpu_facts
    from ssmprune_cli.workflows.measure import processor

    return {
        "ssmprune": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "families": {plugin.name: plugin.package for plugin in family_plugins()},
        "system": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _devices(),
        "kernels": dict(available_backends()),
        "c_kernels": cpu_facts(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    import torch

    found = {"cpu": "available"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{device.name}, {memory}, compute capability {device.major}.{device.minor}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found
