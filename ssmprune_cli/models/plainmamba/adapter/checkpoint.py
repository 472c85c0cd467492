"""PlainMamba-Adapters in checkpoints: which configuration their names and shapes are of."""

from __future__ import annotations

from collections.abc import Sequence

from ssmprune_cli.errors import CheckpointError
from ssmprune_cli.models.common import Hints, Shapes, count_numbered, square_side
from ssmprune_cli.models.plainmamba.adapter.attention import POINTS
from ssmprune_cli.models.plainmamba.adapter.model import AdapterConfig
from ssmprune_cli.models.plainmamba.checkpoint import configured

# What no weight's shape tells, and only one way is computed here.
ADAPTER_COMPUTES = {
    "n_points": frozenset({POINTS}),
    "final_norm": frozenset({False}),
    "use_rms_norm": frozenset({False}),
}


def configure_adapter(shapes: Shapes, hints: Hints) -> AdapterConfig:
    """The configuration that fits `shapes`. Which blocks are a run is in no shape: as the file says, else runs are of
    one length, as in all published models.

    Raises CheckpointError.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a PlainMamba-Adapter: the weight {key} {problem}")
        return found

    rows = square_side(shape("backbone.pos_embed", 3)[1])
    depth = count_numbered(shapes, r"backbone\.layers\.(\d+)\.mamba\.A_log$")
    count = count_numbered(shapes, r"backbone\.interactions\.(\d+)\.")
    extractor = "backbone.interactions.0.extractor"
    return configured(
        shapes,
        AdapterConfig,
        out_indices=(),
        num_classes=0,
        positions=(rows, rows),
        prior_channels=shape("backbone.spm.stem.0.weight", 4)[0],
        heads=shape(f"{extractor}.attn.attention_weights.weight", 2)[0] // POINTS,
        mlp_channels=shape(f"{extractor}.ffn.fc1.weight", 2)[0],
        runs=_runs(depth, count, hints),
    )


def _runs(depth: int, count: int, hints: Hints) -> tuple[int, ...]:
    """How many blocks have passed after each of `count` runs."""
    for stated in hints.settings.get("interaction_indexes", ()):
        if not _are_runs(stated):
            raise CheckpointError(f"says interaction_indexes {stated}, which are no first and last blocks of runs")
        return tuple(last + 1 for _, last in stated)
    if not count or depth % count:
        raise CheckpointError(
            f"nothing says how {depth} blocks are divided among {count} interactions",
            hint="The authors' files state `interaction_indexes` in their configuration.",
        )
    return tuple(depth // count * number for number in range(1, count + 1))


def _are_runs(stated: object) -> bool:
    """Whether these are pairs of a first and a last block, the first of each next to the last one before."""
    if not isinstance(stated, Sequence) or not all(isinstance(each, Sequence) and len(each) == 2 for each in stated):
        return False
    firsts, lasts = [first for first, _ in stated], [last for _, last in stated]
    return all(type(each) is int for each in (*firsts, *lasts)) and firsts == [0, *(last + 1 for last in lasts[:-1])]
