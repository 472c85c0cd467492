"""A compressed module as plain values and tensors, and the same put into the module again: nothing is pickled.

Mixers are recognised and proven anew, so what is stored is no more than names, counts and the pruner's settings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from ssmprune_cli.adapt.accelerating import examine, put, refusal
from ssmprune_cli.adapt.batches import caller
from ssmprune_cli.adapt.stream import Fill, Located, Stream, Tokenwise, stage_of
from ssmprune_cli.adapt.swap import anew, swapped_in
from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.interface import Stage
from ssmprune_cli.pruning import PruneSettings, TokenPruner


@dataclass(frozen=True)
class Inside:
    """Where and how tokens are dropped in a module.

    mixers     name and kind of each, in the order in which they are called
    order      names of mixers and token-wise modules, in that order
    tokenwise  names of the latter, each with the pattern that named it
    lengths    first mixer, one past the last, and tokens of each run of mixers that see as many
    protected  positions that always stay, negative ones from the end
    fill       what stands at the places of dropped tokens
    settings   of the pruner, see `PruneSettings`
    """

    mixers: tuple[tuple[str, str], ...]
    order: tuple[str, ...]
    tokenwise: dict[str, str]
    lengths: tuple[tuple[int, int, int], ...]
    protected: tuple[int, ...]
    fill: Fill
    settings: PruneSettings

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Inside:
        """Inverse of `to_dict`. Raises CheckpointError if the values are not its."""
        try:
            if not isinstance(values, Mapping) or set(values) != {field.name for field in fields(cls)}:
                raise ValueError("its keys are others")
            found = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
            names = [name for name, _ in found.mixers]
            covered = [block for start, stop, _ in found.lengths for block in range(start, stop)]
            if covered != list(range(len(names))):
                raise ValueError("the runs of mixers do not follow one another")
            if sorted(found.order) != sorted({*names, *found.tokenwise}) or not names:
                raise ValueError("the order is not that of its modules")
            _ = found.tokens  # of protected positions and points that are not there
            return found
        except (UsageError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise CheckpointError(f"what is pruned inside the module is not valid: {reason}") from error

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Raises UsageError for a protected position that is in none of them."""
        return tuple(stage_of(start, stop, length, self.protected) for start, stop, length in self.lengths)

    @property
    def tokens(self) -> tuple[int, ...]:
        """That enter each mixer."""
        return self.settings.schedule.tokens_per_block(self.stages)


def stored(model: nn.Module) -> tuple[Inside, dict[str, Tensor]]:
    """What `compress` did to `model`, and the calibrated tensors. UsageError for a module that drops no tokens inside
    its mixers."""
    stream = next((each.place for each in swapped_in(model) if isinstance(each.place, Stream)), None)
    if stream is None or not isinstance(stream.pruner, TokenPruner):
        raise UsageError(f"this {type(model).__name__} drops no tokens inside its mixers, so there is nothing to store")
    kinds = {each.name: each.form.kind for each in swapped_in(model)}
    stand_ins = (vars(module).get("forward") for module in model.modules())
    inside = Inside(
        tuple((name, kinds[name]) for name in stream.names),
        stream.order,
        {each.name: each.pattern for each in stand_ins if isinstance(each, Tokenwise)},
        tuple((stage.start, stage.stop, stage.num_tokens) for stage in stream.stages),
        stream.protect,
        stream.fill,
        stream.pruner.settings,
    )
    return inside, {name: value.detach().cpu() for name, value in stream.pruner.state_dict().items()}


def put_back(model: nn.Module, inside: Inside, tensors: Mapping[str, Tensor]) -> None:
    """Make `model`, with its weights in it, drop tokens as `inside` and `tensors` of `stored` say, in place.

    Raises UsageError if its mixers are others, or are not recognised; CheckpointError for tensors that do not fit.
    """
    with anew(model):
        mixers = examine(model)
        kinds = {each.name: each.verdict.form.kind for each in mixers if each.verdict.form is not None}
        known = {"mixer": {each.name for each in mixers}, "module": {name for name, _ in model.named_modules()}}
        missing = [
            name for name in inside.order if name not in known["module" if name in inside.tokenwise else "mixer"]
        ]
        if missing:
            raise UsageError("there is no such module, and the compressed one had it", where=missing[0])
        for name, kind in inside.mixers:
            if kinds.get(name, kind) != kind:
                raise UsageError(f"is a mixer of {kinds[name]}, and was one of {kind}", where=name)
        if any(each.verdict.form is None for each in mixers):
            raise refusal(mixers)
        swapped = {each.name: each for each in put(model, mixers)}
        located = [Located(swapped[name].__self__, swapped[name].form) for name, _ in inside.mixers]
        names = [name for name, _ in inside.mixers]
        stream = Stream(located, names, inside.order, inside.stages, inside.protected, caller(model))
        stream.fill, stream.pruner = inside.fill, _pruner(inside, located, tensors)
        for name in names:
            swapped[name].place = stream
        for name, pattern in inside.tokenwise.items():
            module = model.get_submodule(name)
            vars(module)["forward"] = Tokenwise(module, name, pattern, stream)


def _pruner(inside: Inside, mixers: list[Located], tensors: Mapping[str, Tensor]) -> TokenPruner:
    pruner = TokenPruner(inside.settings, inside.stages, mixers)
    shapes = {name: tuple(value.shape) for name, value in pruner.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if shapes != found:
        odd = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        raise CheckpointError(f"what was calibrated does not fit the mixers: {listing(odd)}")
    pruner.load_state_dict(dict(tensors))
    return pruner
