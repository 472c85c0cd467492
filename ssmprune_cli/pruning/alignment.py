"""Where the step size of a dropped token comes from: the scan still decays over it (arXiv 2409.18962, section 4.1).

A dropped token m adds no input but its transition acts: h = exp(A * delta_m) h. Its own delta is not known any more
once it has been dropped, so a source stands in for it. `None` from a source means "do not align".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmprune_cli.interface import Mixer, ScanAlignment
from ssmprune_cli.registry import Registry

# What a source is made of has a name: a pruned model can then be pickled.


def _shape_of_steps(mixer: Mixer) -> tuple[int, ...]:
    return mixer.directions, mixer.num_steps


@dataclass(frozen=True)
class AlignmentSource:
    """One source of step sizes.

    stored   (mixer, calibrated values or None) -> what to store with the model: step sizes (directions, E), or a mass
             (); None when nothing is stored
    shape    mixer -> the shape of that, without computing it
    align    stored values or None -> what the scans of one block do
    needs_calibration  whether it is nothing without calibration images
    needs_sizes        whether it goes by the sizes of merged or pooled tokens
    """

    stored: Callable[[Mixer, Tensor | None], Tensor] | None
    align: Callable[[Tensor | None], ScanAlignment | None]
    shape: Callable[[Mixer], tuple[int, ...]] = _shape_of_steps
    needs_calibration: bool = False
    needs_sizes: bool = False


def _null(mixer: Mixer, calibrated: Tensor | None) -> Tensor:
    return mixer.null_delta()


def _calibrated(mixer: Mixer, calibrated: Tensor | None) -> Tensor:
    # Before calibration and in blocks where nothing was dropped: the null step.
    return mixer.null_delta() if calibrated is None else calibrated


TYPICAL_MASS = 0.5  # between nothing and all; without calibration images there is nothing to choose it by


def _mass(mixer: Mixer, calibrated: Tensor | None) -> Tensor:
    return torch.tensor(TYPICAL_MASS) if calibrated is None else calibrated


def _one_value(mixer: Mixer) -> tuple[int, ...]:
    return ()


def _by_mass(stored: Tensor | None) -> ScanAlignment:
    return ScanAlignment(mass=stored)


def _by_neighbour(stored: Tensor | None) -> ScanAlignment:
    return ScanAlignment()


def _unaligned(stored: Tensor | None) -> None:
    return None


ALIGNMENTS: Registry[AlignmentSource] = Registry("alignment source")
ALIGNMENTS.register("calibrated", AlignmentSource(_calibrated, ScanAlignment, needs_calibration=True))
ALIGNMENTS.register("null", AlignmentSource(_null, ScanAlignment))
ALIGNMENTS.register("neighbour", AlignmentSource(None, _by_neighbour))
ALIGNMENTS.register("none", AlignmentSource(None, _unaligned))
ALIGNMENTS.register("mass", AlignmentSource(_mass, _by_mass, _one_value, needs_sizes=True))
