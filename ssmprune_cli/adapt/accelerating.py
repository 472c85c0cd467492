"""`accelerate(model)`: mixers that are recognised and proven are computed by our ops, and nothing is dropped."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import nn

from ssmprune_cli import pruning
from ssmprune_cli.adapt.adapter import Adapter
from ssmprune_cli.adapt.mixers import Verdict, has_scan, recognise
from ssmprune_cli.adapt.swap import Swapped, anew, check_unreplaced, remove, swapped_in
from ssmprune_cli.errors import UsageError, listing
from ssmprune_cli.models import Backbone

ADAPTER_HINT = "What is not recognised can be pruned through an `ssmprune_cli.Adapter`: see docs/own_modules.md."


@dataclass(frozen=True)
class Mixing:
    """What became of one mixer: its name in the model, its class, and the verdict."""

    name: str
    type: str
    verdict: Verdict

    @property
    def line(self) -> str:
        kind = "refused" if self.verdict.form is None else self.verdict.form.kind
        reason = "" if self.verdict.reason is None else f": {self.verdict.reason}"
        return f"{self.name or 'the module itself'} ({self.type}): {kind}{reason}"


@dataclass(frozen=True, repr=False)
class Acceleration:
    """What `accelerate` did; printed, it is a line for each mixer."""

    mixers: tuple[Mixing, ...]

    @property
    def accelerated(self) -> tuple[str, ...]:
        """Names of the mixers that our ops compute."""
        return tuple(each.name for each in self.mixers if each.verdict.form is not None)

    @property
    def refused(self) -> dict[str, str]:
        """Names of the others, with the reason."""
        return {each.name: str(each.verdict.reason) for each in self.mixers if each.verdict.form is None}

    def __repr__(self) -> str:
        return "\n".join(
            [f"{len(self.accelerated)} of {len(self.mixers)} mixers by our ops", *(each.line for each in self.mixers)]
        )


def accelerate(model: nn.Module) -> Acceleration:
    """Compute the scans of somebody's `model` by our ops, in place; `restore` undoes it. No token is dropped.

    Each module with the parameters of a selective scan is compared with what our ops make of it, on random input. Those
    that compute the same are swapped; the others stay as they are, and what is returned says why. A call with a cache
    or any other argument takes the module's own path. Weights stay where they are: train, move, copy, save the model.

    Raises UsageError for a module without a selective scan, of which every one is refused, or that is a backbone of
    ours, and for one that drops tokens.
    """
    if isinstance(model, Backbone):
        raise UsageError(
            f"a {type(model).__name__} is computed by our ops already",
            hint="`ssmprune_cli.prepare(model)` makes a session that runs fast.",
        )
    if any(each.place is not None for each in swapped_in(model)):
        raise UsageError("the model drops tokens, and is as fast as it gets", hint="`restore` it first.")
    with anew(model):
        mixers = examine(model)
        found = Acceleration(tuple(mixers))
        if not found.accelerated:
            raise refusal(mixers)
        put(model, mixers)
    return found


def examine(model: nn.Module) -> list[Mixing]:
    """A verdict on every module of `model` that holds a selective scan. UsageError if there is none."""
    check_inside(model)
    found = []
    for name, module in model.named_modules():
        if has_scan(module):
            check_unreplaced(name, module)
            found.append(Mixing(name, type(module).__name__, recognise(module)))
    return found


def check_inside(model: nn.Module) -> None:
    """UsageError unless a module of `model` holds a selective scan."""
    if not any(map(has_scan, model.modules())):
        raise UsageError(
            f"a {type(model).__name__} has no selective scan inside: no module has a parameter A_log or A_logs",
            hint=ADAPTER_HINT,
        )


def refusal(mixers: list[Mixing]) -> UsageError:
    """The error for `mixers` that are refused."""
    lines = [each.line for each in mixers if each.verdict.form is None]
    hint = ADAPTER_HINT
    if any("its own code fails" in line or "meta device" in line for line in lines):
        hint = "Move the model to a device on which it runs, such as model.cuda(), or load its weights first."
    return UsageError(f"mixers are not recognised: {listing(lines, 3)}", hint=hint)


def put(model: nn.Module, mixers: list[Mixing]) -> list[Swapped]:
    """Swap the recognised `mixers` of `model`, and warn of what is not proven."""
    swapped, warned = [], set[str]()
    for each in mixers:
        if each.verdict.form is None:
            continue
        module = model.get_submodule(each.name)
        swapped.append(Swapped(module, each.name or type(module).__name__, each.verdict.form, warned))
        vars(module)["forward"] = swapped[-1]
    doubts = {each.verdict.reason for each in mixers if each.verdict.form is not None and each.verdict.reason}
    for doubt in sorted(doubts):
        warnings.warn(doubt, stacklevel=3)
    return swapped


def restore(model: nn.Module) -> None:
    """Undo `compress` and `accelerate`: a backbone is dense again, and a user's module computes with its own code.

    Raises UsageError for a module that is neither.
    """
    changed = remove(model)
    if isinstance(model, Backbone | Adapter):
        pruning.restore(model)
    elif not changed:
        raise UsageError(
            f"nothing of this {type(model).__name__} is compressed or accelerated",
            hint="`restore` takes what `ssmprune_cli.compress` or `ssmprune_cli.accelerate` was given.",
        )
