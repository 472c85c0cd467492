"""Which mixers a file of weights seems to have, by keys and shapes alone: nothing is computed, so nothing is proven."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ssmprune_cli.adapt.mixers import local, mamba, mamba2, mambavision, ss2d

_ANY = "*"  # for the number of a direction: how many there are is not counted
_NORMS = [f"{name}.weight" for names in mamba.NORMS for name in names]
_NAMES: dict[str, tuple[Collection[str], Collection[str]]] = {  # of parameters, those that are needed and possible
    "Mamba": (mamba.NEEDED, (*mamba.BIASES, *_NORMS)),
    "Mamba-2": (mamba2.NEEDED, mamba2.BIASES),
    "SS2D": (ss2d.NEEDED, ss2d.POSSIBLE),
    "MambaVision": (mambavision.NEEDED, ()),
    "LocalVMamba's SS2D": (local.LOCAL_GRID_NEEDED, ss2d.POSSIBLE),
    "LocalVim": (
        (*local.NEEDED, *(local.numbered(name, _ANY) for name in local.BRANCH)),
        (*local.POSSIBLE, f"conv1d_{_ANY}.bias"),
    ),
}
DECAY = re.compile(r"A(_b)?_logs?(_\w+)?")  # what every selective scan calls the logarithms of its decay rates


@dataclass(frozen=True)
class Seen:
    """A mixer in a file.

    name    of the module, as the keys have it
    kind    that it seems to be; None for one of no kind that is known here
    width   channels of its output; None where no out_proj tells
    states  of its scan; None where each head has one decay rate
    """

    name: str
    kind: str | None
    width: int | None
    states: int | None


def mixers_in(shapes: Mapping[str, tuple[int, ...]]) -> list[Seen]:
    """Every module with decay rates of a selective scan among weights of these `shapes`, in the order of the keys."""
    names = dict.fromkeys(key.rpartition(".")[0] for key in shapes if DECAY.fullmatch(key.rpartition(".")[2]))
    found = []
    for name in names:
        start = f"{name}." if name else ""
        inside = {key[len(start) :]: shape for key, shape in shapes.items() if key.startswith(start)}
        kinds = (kind for kind, (needed, possible) in _NAMES.items() if _fits(set(inside), needed, possible))
        rates = next(shape for key, shape in inside.items() if DECAY.fullmatch(key))
        width = inside.get("out_proj.weight", (None,))[0]
        found.append(Seen(name, next(kinds, None), width, rates[1] if len(rates) == 2 else None))
    return found


def _fits(names: set[str], needed: Collection[str], possible: Collection[str]) -> bool:
    names = {re.sub(r"_\d+(?=\.|$)", f"_{_ANY}", name) for name in names}
    return set(needed) <= names <= {*needed, *possible}
