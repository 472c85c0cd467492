"""Settings that hold for every test."""

from __future__ import annotations

from hypothesis import settings

# No deadline: a busy machine is no failure. Derandomised: a run that passes passes again.
settings.register_profile("ssmprune", deadline=None, derandomize=True)
settings.load_profile("ssmprune")
