"""Settings that hold for every test."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from ssmprune_cli.models import Backbone

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


@pytest.fixture
def without_noise(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backbone], float]:
    """Searches are timed on a machine without noise. The milliseconds of a model on it."""
    from tests import steady_clock

    steady_clock.install(monkeypatch.setattr)
    return steady_clock.milliseconds
