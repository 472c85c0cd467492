"""LocalVim: arXiv 2403.09338, hunto/LocalMamba at 75e5d1f, with the authors' parameter names.

A Vim in which each block has scan routes of its own, chosen by a search: rows, columns, and windows of the grid. Which
ones is in no weight. Letters: d model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import GATE_REDUCTION, Family, Hints, Shapes, no_stride, patch_grid, resize_grid
from ssmprune_cli.models.mamba.backbone import classifier
from ssmprune_cli.models.mamba.checkpoint import COMPUTES, as_published, fills, read_sizes, resize_positions, shape_of
from ssmprune_cli.models.mamba.class_token import ClassToken, ClassTokenBackbone, ClassTokenConfig, class_positions
from ssmprune_cli.models.mamba.directions import Directions, checked_directions, searched, settled_directions
from ssmprune_cli.models.mamba.local_mixer import LocalMixer


@dataclass(frozen=True)
class LocalVimConfig(ClassTokenConfig):
    """Everything that defines a LocalVim; see ClassTokenConfig.

    directions  of each block's scans: rows `h`, columns `v` and windows of w x w places `w2`, `w7` and so on, each with
                `_flip` for the way back. Empty is rows and windows of 2 x 2, both ways, in every block
    """

    depth: int = 20
    class_token: ClassToken = "none"
    rope: bool = True
    directions: Directions = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "directions", checked_directions(self.directions, self.depth))
        if self.stride != self.patch_size:
            raise UsageError(f"the patches of a LocalVim do not overlap: the stride is {self.patch_size}")
        if self.class_token not in ("middle", "none") or (self.rope and self.class_token == "middle"):
            raise UsageError("a LocalVim has a class token in the middle, or rope, or neither")
        if self.inner_channels < GATE_REDUCTION:
            raise UsageError(
                f"the scans of a LocalVim have {GATE_REDUCTION} channels or more, not {self.inner_channels}"
            )

    def without_blocks(self, count: int) -> LocalVimConfig:
        left = self.depth - count
        return replace(self, depth=left, directions=self.directions[:left])


class LocalVim(ClassTokenBackbone):
    """See LocalVimConfig."""

    family = "localvim"
    config: LocalVimConfig

    def __init__(self, config: LocalVimConfig) -> None:
        super().__init__(config)
        self.rates = tuple(f"A_log_{number}" for number in range(max(map(len, config.directions))))
        self.add_tokens()
        self.add_mixers([LocalMixer(**config.mixer_sizes, routes=routes) for routes in config.directions])
        self.head = classifier(config.embed_dim, config.num_classes)


# Checkpoints: which configuration a file holds, and how its position embeddings are resized.

SEARCHED = searched(
    "h v_flip w7 w7_flip",
    "h_flip w2_flip w7 w7_flip",
    "h h_flip v w7",
    "h h_flip v v_flip",
    "h h_flip v v_flip",
    "h h_flip v v_flip",
    "h_flip v v_flip w7",
    "h_flip v v_flip w2_flip",
    "h h_flip v v_flip",
    "h h_flip v v_flip",
    "h v v_flip w2",
    "h v v_flip w2_flip",
    "h h_flip v_flip w7",
    "h_flip v v_flip w2",
    "h h_flip v v_flip",
    "h v w2 w2_flip",
    "v v_flip w2 w7",
    "h h_flip v w2",
    "h h_flip w2_flip w7",
    "v v_flip w2 w2_flip",
)
TINY = LocalVimConfig(directions=SEARCHED)
SMALL = LocalVimConfig(embed_dim=384)
# The authors' code defines local_vim_small twice, first with the directions of the search and then without. Nothing
# says which one the published weights are for, so the user of such a file is asked.
VARIANTS = {
    "local_vim_tiny": TINY,
    "local_vim_tiny_middle_cls_token": replace(TINY, class_token="middle", rope=False),
    "local_vim_small": SMALL,
    "local_vim_small_searched": replace(SMALL, directions=SEARCHED),
}


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are LocalVim's keys, which no other family has."""
    return "layers.0.mixer.A_log_0" in shapes and "layers.0.mixer.attn.global_reduce.weight" in shapes


def configure(shapes: Shapes, hints: Hints) -> LocalVimConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    Raises CheckpointError, also where nothing says which directions the scans have.
    """
    no_stride(hints, "LocalVim")
    extra = int("cls_token" in shapes)
    hints = replace(hints, stride=shape_of(shapes, "patch_embed.proj.weight", 4, "LocalVim")[2])
    if hints.variant:
        config = VARIANTS[hints.variant]
        return as_published(config, shapes, hints, "LocalVim", extra_positions=extra)
    sizes = read_sizes(shapes, hints, VARIANTS, "LocalVim", extra_positions=extra, branch="_0")
    token: ClassToken = "middle" if extra else "none"
    try:
        config = LocalVimConfig(**sizes, class_token=token, rope="rope.freqs_cos" in shapes)
        return replace(config, directions=_directions(config, hints))
    except UsageError as error:
        raise CheckpointError(f"not a LocalVim classifier: {error.what}") from error


def _directions(config: LocalVimConfig, hints: Hints) -> Directions:
    """As the file states, else those of the one published model of these sizes. CheckpointError without."""
    sizes = (config.patch_size, config.embed_dim, config.depth, config.class_token)
    fitting = {
        name: published.directions
        for name, published in VARIANTS.items()
        if (published.patch_size, published.embed_dim, published.depth, published.class_token) == sizes
    }
    return settled_directions(hints, fitting)


def resize(
    state: dict[str, Tensor], config: LocalVimConfig, image_size: int
) -> tuple[dict[str, Tensor], LocalVimConfig]:
    """For images of another size: bicubic for the patches' positions, and as the authors do for the rotary tables."""
    old, new = (
        patch_grid((side, side), config.patch_size, config.stride) for side in (config.image_size[0], image_size)
    )
    places = [class_positions(config.class_token, grid[0] * grid[1]) for grid in (old, new)]
    moved, resized = resize_positions(state["pos_embed"], config, image_size, old_class=places[0], new_class=places[1])
    changed = {**state, "pos_embed": moved}
    if config.rope:
        for name in ("rope.freqs_cos", "rope.freqs_sin"):
            changed[name] = resize_grid(state[name][None], old, new)[0]
    return changed, resized


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a LocalVim file is a weight, under the name that we use too."""
    return state


LOCALVIM: Family = Family(
    name="localvim",
    title="LocalVim",
    matches=matches,
    configure=configure,
    build=LocalVim,
    config_class=LocalVimConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes={**COMPUTES, "final_pool_type": frozenset({"mean"})},
)
