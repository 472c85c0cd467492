"""Mixers that other people wrote: which ones are recognised, by names and shapes, and proven on random input.

One file a kind. To add one, write a `recognise` that raises Unrecognised with its reason, and a line below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ssmprune_cli.adapt.mixers.base import Form, Layout, Unrecognised, from_tokens, layout_of, to_tokens
from ssmprune_cli.adapt.mixers.keys import DECAY, Seen, mixers_in
from ssmprune_cli.adapt.mixers.local import recognise_local, recognise_local_grid
from ssmprune_cli.adapt.mixers.mamba import recognise_mamba
from ssmprune_cli.adapt.mixers.mamba2 import recognise_mamba2
from ssmprune_cli.adapt.mixers.mambavision import recognise_mambavision
from ssmprune_cli.adapt.mixers.proof import CannotRun, dense, prove
from ssmprune_cli.adapt.mixers.ss2d import recognise_atrous, recognise_ss2d
from ssmprune_cli.registry import Registry

KINDS: Registry[Callable[[nn.Module], Form]] = Registry("kind of mixer")
KINDS.register("Mamba", recognise_mamba)
KINDS.register("Mamba-2", recognise_mamba2)
KINDS.register("LocalVMamba's SS2D", recognise_local_grid)  # before SS2D, so that its reason for a refusal is said
KINDS.register("SS2D", recognise_ss2d)
KINDS.register("EfficientVMamba's SS2D", recognise_atrous)
KINDS.register("MambaVision", recognise_mambavision)
KINDS.register("LocalVim", recognise_local)


@dataclass(frozen=True)
class Verdict:
    """What became of one module with a scan.

    form    how it is computed; None if it is refused
    reason  why it is refused, or what is not proven of it; None if nothing is to be said
    """

    form: Form | None
    reason: str | None = None


def has_scan(module: nn.Module) -> bool:
    """Whether the module itself, not a child of it, holds the decay rates of a selective scan."""
    return any(DECAY.fullmatch(name) for name, _ in module.named_parameters(recurse=False))


def recognise(module: nn.Module) -> Verdict:
    """The kind of `module`, which `has_scan`, proven on random input; or why it is none."""
    reasons: list[tuple[int, str]] = []
    for number, (kind, recogniser) in enumerate(KINDS.items()):
        try:
            form = recogniser(module)
        except Unrecognised as error:
            reasons.append((-number, f"no {kind} mixer: {error}"))
            continue
        try:
            return Verdict(form, prove(module, form))
        except Unrecognised as error:
            reasons.append((1, str(error)))
    missing = [each for each in reasons if "it has no" not in each[1]]
    return Verdict(None, max(missing or reasons)[1])


__all__ = [
    "KINDS",
    "CannotRun",
    "Form",
    "Layout",
    "Seen",
    "Verdict",
    "dense",
    "from_tokens",
    "has_scan",
    "layout_of",
    "mixers_in",
    "recognise",
    "to_tokens",
]
