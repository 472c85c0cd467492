"""Settings that hold for every test."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings

# No deadline: a busy machine is no failure. Derandomised: a run that passes passes again.
settings.register_profile("ssmprune", deadline=None, derandomize=True)
settings.load_profile("ssmprune")


def pytest_configure(config: pytest.Config) -> None:
    """Compile the C kernels for all levels at once, before several processes that share the tests each would."""
    if not config.getoption("numprocesses", None):
        return
    from ssmprune_cli.kernels.cpu.backend import CpuBackend
    from ssmprune_cli.kernels.cpu.build import TILES, levels

    with ThreadPoolExecutor() as pool:  # TILES has the library of the next level
        list(pool.map(lambda level: CpuBackend(level).missing(), [level for level in levels() if level != TILES]))
