"""Mamba-1 as a language model: arXiv 2312.00752, state-spaces/mamba e9594ce (mamba_simple.py, mixer_seq_simple.py).

Glossary: d_state N state size of a channel; dt_rank rank of the step projection; the mixer is Vim's with one scan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
)
from ssmprune_cli.models.language.config import LanguageConfig
from ssmprune_cli.models.language.mamba1.recurrence import Mamba1Recurrence
from ssmprune_cli.models.language.recurrence import Recurrence
from ssmprune_cli.models.mamba import MambaMixer


@dataclass(frozen=True, kw_only=True)
class Mamba1Config(LanguageConfig):
    """See LanguageConfig. `dt_rank` None is `embed_dim / 16`, rounded up."""

    dt_rank: int | None = None


class Mamba1LM(LanguageModel):
    """See Mamba1Config and LanguageModel."""

    family = "mamba"
    config: Mamba1Config

    def __init__(self, config: Mamba1Config) -> None:
        super().__init__(config)
        sizes = {
            "dim": config.embed_dim,
            "d_inner": config.inner_channels,
            "d_state": config.d_state,
            "d_conv": config.d_conv,
            "dt_rank": config.dt_rank or math.ceil(config.embed_dim / 16),
        }
        self.add_mixers([MambaMixer(**sizes, kind="none", halve=False) for _ in range(config.depth)])

    def recurrence(self, mixer: Mixer) -> Recurrence:
        assert isinstance(mixer, MambaMixer)
        return Mamba1Recurrence(mixer)


VARIANTS = {
    "mamba-130m": Mamba1Config(embed_dim=768, depth=24),
    "mamba-370m": Mamba1Config(embed_dim=1024, depth=48),
    "mamba-790m": Mamba1Config(embed_dim=1536, depth=48),
    "mamba-1.4b": Mamba1Config(embed_dim=2048, depth=48),
    "mamba-2.8b": Mamba1Config(embed_dim=2560, depth=64),
}


def matches(shapes: Shapes, hints: Hints) -> bool:
    return is_language_model(shapes) and has(shapes, "x_proj.weight") and not has(shapes, "dt_bias")


def configure(shapes: Shapes, hints: Hints) -> Mamba1Config:
    """The configuration that fits `shapes`. Raises CheckpointError."""
    title = "Mamba language model"
    sizes = read_sizes(shapes, hints, title)
    dt_rank = shape_of(shapes, "layers.0.mixer.dt_proj.weight", 2, title)[1]
    return Mamba1Config(
        **sizes,
        d_state=shape_of(shapes, "layers.0.mixer.A_log", 2, title)[1],
        dt_rank=None if dt_rank == math.ceil(sizes["embed_dim"] / 16) else dt_rank,
    )


MAMBA1: Family = Family(
    name="mamba",
    title="Mamba language model",
    matches=matches,
    configure=configure,
    build=Mamba1LM,
    config_class=Mamba1Config,
    remap=remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    # FalconMamba has these weights, and norms without weights besides.
    computes={**COMPUTES, "model_type": frozenset({"mamba"}), "layer": frozenset({"mamba1"})},
    text=True,
)
