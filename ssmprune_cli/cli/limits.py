"""Limits that a user sets, for CI pipelines: what breaks one ends in exit code 3, with the result printed before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ssmprune_cli.errors import LimitError, UsageError

MaxDrop = Annotated[
    float | None,
    typer.Option("--max-drop", help="Exit with 3 if top-1 falls by more percentage points than this."),
]
MinAccuracy = Annotated[float | None, typer.Option("--min-accuracy", help="Exit with 3 if top-1 (%) is below this.")]
MaxFlops = Annotated[
    float | None,
    typer.Option("--max-flops", help="Exit with 3 above this share of the dense multiply-adds (all directions)."),
]
MaxLatencyRatio = Annotated[
    float | None,
    typer.Option("--max-latency-ratio", help="Exit with 3 if a batch takes more than this times the dense model's."),
]


@dataclass(frozen=True)
class Check:
    """One limit, the value that was found, and whether it holds."""

    name: str
    limit: float
    value: float
    holds: bool
    text: str  # what is wrong if it does not

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "limit": self.limit, "value": self.value, "holds": self.holds}


@dataclass(frozen=True)
class Limits:
    """None is no limit. max_drop is in points and may be negative: the model must then gain."""

    max_drop: float | None = None
    min_accuracy: float | None = None
    max_flops: float | None = None
    max_latency_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_drop", -100.0, 100.0),
            ("min_accuracy", 0.0, 100.0),
            ("max_flops", 0.0, math.inf),
            ("max_latency_ratio", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                ends = f"between {low:g} and {high:g}" if math.isfinite(high) else f"of at least {low:g}"
                raise UsageError(f"must be a number {ends}, not {value:g}", where=_option(name))

    def require(self, names: tuple[str, ...], need: str) -> None:
        """Raises UsageError if one of `names` is set: it cannot be checked without what `need` says."""
        for name in names:
            if getattr(self, name) is not None:
                raise UsageError(f"{_option(name)} needs {need}")

    def check(
        self,
        *,
        difference: float | None = None,
        top1: float | None = None,
        flops: float | None = None,
        latency_ratio: float | None = None,
    ) -> list[Check]:
        """Every limit that is set and whose value is known: `difference` of top-1 and `top1` itself are fractions."""
        found = []
        if self.max_drop is not None and difference is not None:
            drop = -100 * difference
            text = f"top-1 fell by {drop:.2f} points; --max-drop allows {self.max_drop:g}"
            found.append(Check("max_drop", self.max_drop, drop, drop <= self.max_drop, text))
        if self.min_accuracy is not None and top1 is not None:
            text = f"top-1 is {100 * top1:.2f} %; --min-accuracy asks for {self.min_accuracy:g}"
            found.append(Check("min_accuracy", self.min_accuracy, 100 * top1, 100 * top1 >= self.min_accuracy, text))
        if self.max_flops is not None and flops is not None:
            text = f"{flops:.4f} of the dense multiply-adds are left; --max-flops allows {self.max_flops:g}"
            found.append(Check("max_flops", self.max_flops, flops, flops <= self.max_flops, text))
        if self.max_latency_ratio is not None and latency_ratio is not None:
            text = (
                f"a batch takes {latency_ratio:.3f} times the dense model's time; "
                f"--max-latency-ratio allows {self.max_latency_ratio:g}"
            )
            holds = latency_ratio <= self.max_latency_ratio
            found.append(Check("max_latency_ratio", self.max_latency_ratio, latency_ratio, holds, text))
        return found


def enforce(checks: list[Check]) -> None:
    """Raises LimitError naming every limit that is broken."""
    broken = [check.text for check in checks if not check.holds]
    if broken:
        raise LimitError("\n".join(broken))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
