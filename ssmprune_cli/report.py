"""What a compression did: plain figures before and after, written as report.json. Knows no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

MULTIPLY_ADD_CONVENTION = (
    "for one image; one multiply-add counts as one (fvcore, the papers); "
    "all_directions counts every scan direction, one_direction counts one of them, as the Vim papers do"
)


@dataclass(frozen=True)
class Figures:
    """Cost of one model on one image. Tokens per block are those that enter the block, protected ones included."""

    multiply_adds_all_directions: int
    multiply_adds_one_direction: int
    tokens_per_block: list[int]
    multiply_adds_per_block: list[int]


@dataclass(frozen=True)
class Report:
    """Dense and pruned model side by side, and where both come from.

    pruning      the settings as resolved for this model: points, keep, tokens, importance, reduction, alignment
    accuracy     both models on the same images, or None if they were not evaluated
    calibration  what calibration saw, or None without it
    warnings     what a reader must know before trusting the figures
    provenance   input file and its SHA-256, versions, calibration images
    """

    family: str
    image_size: list[int]
    parameters: int
    pruning: dict[str, Any]
    dense: Figures
    pruned: Figures
    accuracy: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "multiply_add_convention": MULTIPLY_ADD_CONVENTION}

    def to_json(self) -> str:
        """JSON text: the same report gives the same bytes. Raises ValueError for NaN and infinity, which JSON lacks."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
