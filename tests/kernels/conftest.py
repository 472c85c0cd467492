"""What tests of kernels leave as they found it, and the C kernels at every level of the processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ssmprune_cli.kernels import use_backend
from ssmprune_cli.kernels.choice import BACKENDS
from ssmprune_cli.kernels.cpu.backend import CPU, CpuBackend

# As further backends, which "auto" never comes to: what is tested of all that are available is tested of them. Each has
# a library of its own in this process.
for level in CPU.library.facts().get("processor_has", ()):
    if level != CPU.library.facts()["level"]:
        BACKENDS.register(f"cpu at {level}", CpuBackend(level))


@pytest.fixture(autouse=True)
def restore_backend_and_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    use_backend("auto")
    torch.set_num_threads(threads)
