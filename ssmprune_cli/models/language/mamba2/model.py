"""Mamba-2 as a language model: arXiv 2405.21060, state-spaces/mamba e9594ce (modules/mamba2.py), transformers' Mamba2.

Glossary: a head has P channels (`head_dim`), one decay rate A and one step; heads of a group share B and C.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.interface import Mixer
from ssmprune_cli.models.common import Family, Hints, Shapes
from ssmprune_cli.models.language.backbone import LanguageModel
from ssmprune_cli.models.language.checkpoint import (
    COMPUTES,
    fills,
    has,
    is_language_model,
    read_sizes,
    remap,
    resize,
    shape_of,
    stated_number,
)
from ssmprune_cli.models.language.config import LanguageConfig
from ssmprune_cli.models.language.mamba2.mixer import Mamba2Mixer
from ssmprune_cli.models.language.mamba2.recurrence import Mamba2Recurrence
from ssmprune_cli.models.language.recurrence import Recurrence


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(LanguageConfig):
    """See LanguageConfig.

    head_dim  channels of a head
    groups    of heads that share B and C
    """

    vocab_size: int = 50288
    d_state: int = 128
    head_dim: int = 64
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.head_dim, self.groups) < 1 or self.inner_channels % self.head_dim or self.heads % self.groups:
            raise UsageError(
                f"{self.inner_channels} channels make no heads of {self.head_dim} channels in {self.groups} groups"
            )

    @property
    def heads(self) -> int:
        return self.inner_channels // self.head_dim


class Mamba2LM(LanguageModel):
    """See Mamba2Config and LanguageModel."""

    family = "mamba2"
    config: Mamba2Config

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config)
        self.add_mixers(
            [
                Mamba2Mixer(
                    config.embed_dim,
                    heads=config.heads,
                    head_dim=config.head_dim,
                    groups=config.groups,
                    d_state=config.d_state,
                    d_conv=config.d_conv,
                )
                for _ in range(config.depth)
            ]
        )

    def recurrence(self, mixer: Mixer) -> Recurrence:
        assert isinstance(mixer, Mamba2Mixer)
        return Mamba2Recurrence(mixer)


VARIANTS = {
    "mamba2-130m": Mamba2Config(embed_dim=768, depth=24),
    "mamba2-370m": Mamba2Config(embed_dim=1024, depth=48),
    "mamba2-780m": Mamba2Config(embed_dim=1536, depth=48),
    "mamba2-1.3b": Mamba2Config(embed_dim=2048, depth=48),
    "mamba2-2.7b": Mamba2Config(embed_dim=2560, depth=64),
}


def matches(shapes: Shapes, hints: Hints) -> bool:
    return is_language_model(shapes) and has(shapes, "dt_bias")


def configure(shapes: Shapes, hints: Hints) -> Mamba2Config:
    """The configuration that fits `shapes`; how many groups there are is what the file says. Raises CheckpointError."""
    title = "Mamba-2 language model"
    sizes = read_sizes(shapes, hints, title)
    (heads,) = shape_of(shapes, "layers.0.mixer.A_log", 1, title)
    (d_inner,) = shape_of(shapes, "layers.0.mixer.norm.weight", 1, title)
    states = shape_of(shapes, "layers.0.mixer.conv1d.weight", 3, title)[0] - d_inner  # of B and C, in all groups
    groups = _groups(hints, sizes["embed_dim"], states)
    if states < 2 or states % (2 * groups) or heads < 1 or d_inner % heads:
        raise CheckpointError(f"{states} channels of B and C are not those of {groups} groups")
    return Mamba2Config(**sizes, d_state=states // (2 * groups), head_dim=d_inner // heads, groups=groups)


def _groups(hints: Hints, embed_dim: int, states: int) -> int:
    groups = stated_number(hints, ("ngroups", "n_groups"), 0)
    if groups:
        return groups
    d_state = stated_number(hints, ("d_state", "state_size"), 0)
    if d_state and states % (2 * d_state) == 0:
        return states // (2 * d_state)
    # state-spaces' constructor has one group unless told otherwise, and all published models have.
    if "d_model" in hints.settings or (states == 256 and embed_dim in {each.embed_dim for each in VARIANTS.values()}):
        return 1
    raise CheckpointError(
        "neither the weights nor the file say into how many groups the heads are divided",
        hint="Put the model's config.json beside the weights.",
    )


MAMBA2: Family = Family(
    name="mamba2",
    title="Mamba-2 language model",
    matches=matches,
    configure=configure,
    build=Mamba2LM,
    config_class=Mamba2Config,
    remap=remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes={
        **COMPUTES,
        "model_type": frozenset({"mamba2"}),
        "layer": frozenset({"mamba2"}),
        "norm_before_gate": frozenset({False}),
        **dict.fromkeys(("time_step_limit", "dt_limit"), frozenset({(0.0, float("inf"))})),
    },
    text=True,
)
