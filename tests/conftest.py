"""Settings that hold for every test."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch

    from ssmprune_cli.inference import Session
    from ssmprune_cli.models import Backbone
    from ssmprune_cli.workflows.measure import Speed

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
def without_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Backbone], float]:
    """The milliseconds of a model on a machine without noise, and without a cache from earlier runs: a fifth of a
    millisecond, and one for every ten million multiply-adds. Searches are timed on it."""
    from ssmprune_cli.models import Backbone
    from ssmprune_cli.workflows.measure import Speed, count_flops
    from ssmprune_cli.workflows.trials import clock

    known: dict[object, float] = {}

    def milliseconds(model: Backbone) -> float:
        key = (model.family, model.config, getattr(model.pruner, "settings", None))
        if key not in known:
            known[key] = 0.2 + count_flops(model).all_directions / 1e7
        return known[key]

    def speeds(sessions: list[Session], images: torch.Tensor, rounds: int, **_: int) -> list[Speed]:
        times = [milliseconds(each.definition) for each in sessions if isinstance(each.definition, Backbone)]
        return [Speed(time, (time, time), 1.0, rounds, (time,) * rounds) for time in times]

    monkeypatch.setattr(clock, "interleaved_speeds", speeds)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return milliseconds
