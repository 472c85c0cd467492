"""Time of a user's module: with its own code, by our ops, and with tokens dropped, in turn."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmprune_cli.workflows.measure import Progress, Speed, interleaved_speeds
from ssmprune_cli.workflows.own_module.source import accelerated, failing

OWN, FAST, COMPRESSED = "own code", "accelerated", "compressed"


@dataclass(frozen=True)
class Variants:
    """The module by how it is computed, and what is to be known of that."""

    models: dict[str, nn.Module]
    warnings: tuple[str, ...]

    def speeds(self, images: Tensor, rounds: int, progress: Progress | None) -> dict[str, Speed]:
        found = interleaved_speeds(list(self.models.values()), images, rounds, progress)
        return dict(zip(self.models, found, strict=True))


def variants(own: nn.Module, example: Tensor) -> Variants:
    """`own`, as it was loaded, and a copy that our ops compute. Without its own code where that does not run here, as
    that of mamba_ssm on a CPU. Raises UsageError for a module without a mixer that we know."""
    fast = copy.deepcopy(own)
    warnings = accelerated(fast, example)
    models = {FAST: fast}
    failure = failing(own, example)
    if failure is None:
        models = {OWN: own, **models}
    else:
        device = next(own.parameters()).device.type
        warnings.append(f"The module's own code does not run on {device}, and is not timed: {failure}")
    return Variants(models, tuple(warnings))


def no_faster(speeds: Mapping[str, Speed], images: Tensor) -> list[str]:
    """What is to be said of `speeds` on a batch of `images`, where one is not what was asked for."""
    where, notes = f"With a batch of {len(images)} on {images.device}", []
    fast = speeds[FAST].median_ms
    if OWN in speeds and fast >= speeds[OWN].median_ms:
        notes.append(f"{where} our ops are no faster than the module's own code. With more tokens they gain more.")
    if COMPRESSED in speeds and speeds[COMPRESSED].median_ms >= fast:
        notes.append(
            f"{where} the compressed module is no faster than the accelerated one: gathering tokens takes as long as "
            "it saves. Larger images gain more."
        )
    return notes


def random_images(model: nn.Module, count: int, side: int) -> Tensor:
    """(count, 3, side, side) in the dtype of the weights; counts of tokens do not depend on what images show."""
    like = next(each for each in model.parameters() if each.is_floating_point())
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    return images.to(like.device, like.dtype)
