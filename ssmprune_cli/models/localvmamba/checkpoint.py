"""LocalVMamba checkpoints: which configuration a file holds, and which directions its scans have."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import Family, Hints, Shapes
from ssmprune_cli.models.localvmamba.model import LocalVMamba, LocalVMambaConfig
from ssmprune_cli.models.mamba import searched, settled_directions
from ssmprune_cli.models.vmamba import fills, read_config, resize

VARIANTS = {
    "local_vssm_tiny": LocalVMambaConfig(
        directions=searched(
            "h h_flip w7 w7_flip",
            "h_flip v_flip w2 w2_flip",
            "h_flip v_flip w2_flip w7",
            "h_flip v v_flip w2",
            "h h_flip v_flip w2_flip",
            "h_flip v_flip w2 w2_flip",
            "h w2_flip w7 w7_flip",
            "h h_flip v v_flip",
            "h v_flip w7 w7_flip",
            "h_flip v w2 w7_flip",
            "v v_flip w2 w7_flip",
            "h h_flip v_flip w2_flip",
            "v_flip w2_flip w7 w7_flip",
            "h_flip v_flip w2_flip w7_flip",
            "h_flip v w7 w7_flip",
        )
    ),
    "local_vssm_small": LocalVMambaConfig(
        depths=(2, 2, 27, 2),
        directions=searched(
            "h v v_flip w7_flip",
            "h h_flip v w7",
            "h_flip v v_flip w7",
            "h_flip v w2_flip w7",
            "h_flip v w2_flip w7",
            "h_flip v_flip w2 w7_flip",
            "h_flip v v_flip w7",
            "h v v_flip w7",
            "h v v_flip w7",
            "h v v_flip w7_flip",
            "h h_flip v v_flip",
            "h v v_flip w2",
            "v v_flip w2_flip w7",
            "h h_flip v w2",
            "h_flip v v_flip w7_flip",
            "h h_flip v v_flip",
            "h v v_flip w7_flip",
            "h v v_flip w7_flip",
            "h h_flip v_flip w7",
            "h_flip v_flip w2_flip w7",
            "h_flip v v_flip w7_flip",
            "v v_flip w7 w7_flip",
            "h v v_flip w7_flip",
            "h_flip v v_flip w2",
            "h v v_flip w2_flip",
            "h h_flip v w7",
            "h h_flip w7 w7_flip",
            "h v_flip w2 w2_flip",
            "h v_flip w2 w7",
            "h v v_flip w7_flip",
            "h_flip v w2_flip w7",
            "h_flip v_flip w7 w7_flip",
            "h v w7 w7_flip",
        ),
    ),
}
# What no weight's shape tells, and only one way is computed here.
COMPUTES = {
    "ssm_act_layer": frozenset({"silu"}),
    "norm_layer": frozenset({"ln"}),
    "patch_norm": frozenset({True}),
}
_OP = "layers.0.blocks.0.op"


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are LocalVMamba's keys, which no other family has."""
    return f"{_OP}.A_logs" in shapes and f"{_OP}.multi_scan.attn.norm.weight" in shapes


def configure(shapes: Shapes, hints: Hints) -> LocalVMambaConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    Raises CheckpointError, also where nothing says which directions the scans have.
    """
    if f"{_OP}.multi_scan.weights" in shapes:
        raise CheckpointError(
            "holds the model that the authors search directions with, and not a LocalVMamba",
            hint="It weighs eight directions in each block. Give the model that was trained with those it chose.",
        )
    try:
        config = read_config(shapes, hints, VARIANTS, LocalVMambaConfig, "LocalVMamba")
        if hints.variant:
            return config
        sizes = (config.embed_dim, config.depths)
        fitting = {name: each.directions for name, each in VARIANTS.items() if (each.embed_dim, each.depths) == sizes}
        return replace(config, directions=settled_directions(hints, fitting))
    except UsageError as error:
        raise CheckpointError(f"not a LocalVMamba: {error.what}") from error


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a LocalVMamba file is a weight, under the name that we use too."""
    return state


LOCALVMAMBA: Family = Family(
    name="localvmamba",
    title="LocalVMamba",
    matches=matches,
    configure=configure,
    build=LocalVMamba,
    config_class=LocalVMambaConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
