"""LocalVMamba: arXiv 2403.09338, hunto/LocalMamba at 75e5d1f, with the authors' parameter names.

The first VMamba release (gates, convolutions with bias, patch merging, no MLP), but in each block the four scans go
along rows, columns or windows of the grid: which ones, a search has chosen, and no weight says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common import GATE_REDUCTION
from ssmprune_cli.models.localvmamba.mixer import LocalVMambaMixer
from ssmprune_cli.models.mamba import Directions, checked_directions
from ssmprune_cli.models.vmamba import DIRECTIONS, VMamba, VMambaConfig


@dataclass(frozen=True)
class LocalVMambaConfig(VMambaConfig):
    """Everything that defines a LocalVMamba; see VMambaConfig.

    directions  of each block's four scans: rows `h`, columns `v` and windows of w x w places `w2`, `w7` and so on, each
                with `_flip` for the way back. Empty is rows and windows of 2 x 2, both ways, in every block
    """

    patch_embed: Literal["v1", "v2"] = "v1"
    downsample: Literal["v1", "v3"] = "v1"
    depths: tuple[int, ...] = (2, 2, 9, 2)
    d_state: int = 16
    ssm_ratio: float = 2.0
    gated: bool = True
    conv_bias: bool = True
    mlp_ratio: float = 0.0
    directions: Directions = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "directions", checked_directions(self.directions, sum(self.depths)))
        if any(len(routes) != DIRECTIONS for routes in self.directions):
            raise UsageError(f"a block of a LocalVMamba has {DIRECTIONS} scans")
        if int(self.ssm_ratio * self.embed_dim) < GATE_REDUCTION:
            raise UsageError(f"the scans of a LocalVMamba have {GATE_REDUCTION} channels or more")

    def without_blocks(self, count: int) -> LocalVMambaConfig:
        longest = self.depths.index(max(self.depths))
        depths = list(self.depths)
        depths[longest] -= count
        end = sum(self.depths[: longest + 1])
        return replace(self, depths=tuple(depths), directions=self.directions[: end - count] + self.directions[end:])

    def mixer(self, dim: int, block: int) -> LocalVMambaMixer:
        return LocalVMambaMixer(dim, routes=self.directions[block], **self.mixer_sizes(dim))


class LocalVMamba(VMamba):
    """See LocalVMambaConfig."""

    family = "localvmamba"
