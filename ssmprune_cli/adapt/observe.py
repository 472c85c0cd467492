"""What a user's module does with its mixers: the order of calls, lengths, and whether tokens keep their places.

The passes are dense and small: one sample. In those that look at places, mixers answer with zeros, and those of one
run that see as many tokens with a pulse at one token each. What comes into the next mixer must differ most at that
token: if it differs elsewhere (a flipped or permuted sequence) or not at all (two mixers side by side), one choice of
tokens cannot hold for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.adapt.batches import Batch, Run, answer_of
from ssmprune_cli.adapt.mixers import dense, from_tokens, layout_of, to_tokens
from ssmprune_cli.adapt.request import LEAST
from ssmprune_cli.adapt.swap import StandIn, Swapped
from ssmprune_cli.errors import UsageError

CACHE_HINT = (
    "Tokens are dropped in plain forward passes. Of a transformers model, set `model.config.use_cache = False`, or "
    "give batches as dictionaries with `use_cache=False`; leave out masks and position arguments."
)


@dataclass
class Observed:
    """What the passes showed.

    mixers  the swapped mixers, in the order in which they are called
    order   names of mixers and token-wise modules, in that order
    lengths tokens that enter each mixer
    read    positions that the head reads; None where it reads all of the tokens, or nothing tells
    answer  the model's answer for one sample
    """

    mixers: list[Swapped]
    order: list[str]
    lengths: list[int]
    read: tuple[int, ...] | None
    answer: Tensor


@dataclass
class _Calls:
    """The place of mixers while a pass is noted down. See `swap.Place`."""

    mixers: list[Swapped] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def note(self, name: str) -> None:
        if name in self.order:
            raise UsageError(
                "is called twice in one pass, so there is no one place in the order for it",
                where=name,
                hint="Give each of its calls a module of its own, or write an `ssmprune_cli.Adapter`.",
            )
        self.order.append(name)

    def mix(self, swapped: Swapped, x: Tensor) -> Tensor:
        self.note(swapped.name)
        self.mixers.append(swapped)
        tokens, _ = to_tokens(x, swapped.form.layout)
        self.shapes.append(tuple(tokens.shape))
        return dense(swapped.__self__, swapped.form, x)

    def refuse(self, name: str, reason: str) -> None:
        raise UsageError(f"{reason}, which our scan has no answer to", where=name, hint=CACHE_HINT)


class _Watched(StandIn):
    """The `forward` of a module that is said to see one token at a time, while calls are noted."""

    def __init__(self, module: nn.Module, name: str, calls: _Calls) -> None:
        super().__init__(module, name)
        self.calls = calls

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls.note(self.name)
        out = self.own(*arguments, **options)
        if len(arguments) != 1 or options or not self._by_tokens(arguments[0], out):
            raise UsageError(
                "gives some of the tokens other outputs when they come without the rest, so it is not token-wise",
                where=self.name,
                hint="Name only modules that see one token at a time, such as MLPs and norms.",
            )
        return out

    def _by_tokens(self, x: Any, out: Any) -> bool:
        """Whether every second token of `x` alone, as (B, K, d), has the output that it has in `out`."""
        tensors = isinstance(x, Tensor) and isinstance(out, Tensor)
        if not tensors or x.ndim not in (3, 4) or out.ndim != x.ndim or out.shape[:-1] != x.shape[:-1]:
            return False
        tokens, expected = (to_tokens(each, layout_of(x))[0][:, ::2] for each in (x, out))
        try:
            alone = self.own(tokens)
        except Exception:
            return False
        # Products over other numbers of rows may add up in another order.
        tolerance = max(1e-4, 2 * torch.finfo(out.dtype).eps) * float(out.abs().max())
        return alone.shape == expected.shape and torch.allclose(alone, expected, rtol=0.0, atol=tolerance)


@dataclass
class _Pulses:
    """Mixers that answer with zeros, and those of the numbers `on` with a pulse of the size of their input at one token
    each. The mixer called `leaf` answers with noise of `noise` times its input, and `last` is that, to be
    differentiated by.

    `seen` has, of every mixer's input, (L, 4): what is left of each token on four random directions.
    """

    on: range
    leaf: str | None = None
    noise: float = 0.0
    seen: list[Tensor] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    last: Tensor | None = None

    def mix(self, swapped: Swapped, x: Tensor) -> Tensor:
        form = swapped.form
        tokens, grid = to_tokens(x, form.layout)
        generator = torch.Generator().manual_seed(len(self.seen))
        directions = torch.randn(form.d_model, 4, generator=generator).to(tokens)
        self.seen.append((tokens[0].detach() @ directions).double())
        self.places.append(pulse_place(len(self.places), tokens.shape[1]))
        out = torch.zeros_like(tokens)
        size = tokens.detach().square().mean().sqrt() + 1e-3
        if len(self.places) - 1 in self.on:
            out[0, self.places[-1]] = size * torch.randn(form.d_model, generator=generator).to(tokens)
        if swapped.name == self.leaf:
            noise = torch.randn(out.shape, generator=generator).to(out)
            self.last = out = (out + self.noise * size * noise).detach().requires_grad_()
        return from_tokens(out, form.layout, grid)

    def refuse(self, name: str, reason: str) -> None:
        raise UsageError(f"{reason}, in one pass and not in another", where=name)


def pulse_place(number: int, length: int) -> int:
    """A token for each mixer, in the first half: of LEAST tokens or more, none is the mirror image of another's."""
    return (length // 5 + number % max(3, length // 4)) % length


def observe(swapped: Sequence[Swapped], tokenwise: dict[str, nn.Module], run: Run, batch: Batch) -> Observed:
    """Run dense passes on the first sample of `batch`. The model must be in evaluation mode.

    swapped    all recognised mixers, in place
    tokenwise  modules by name that see one token at a time, as the user says; it is tried

    Raises UsageError for a module that no choice of tokens fits, naming it.
    """
    calls = _Calls()
    for name, module in tokenwise.items():
        vars(module)["forward"] = _Watched(module, name, calls)
    sample = batch.first()
    try:
        _place(swapped, calls)
        with torch.no_grad():
            answer = answer_of(run(sample))
        for module in tokenwise.values():
            del vars(module)["forward"]
        if not calls.mixers:
            raise UsageError(
                "none of the recognised mixers is called by the model's forward pass",
                where=swapped[0].name,
                hint="Give the module that is called with the calibration inputs.",
            )
        _check_places(calls, run, sample, swapped)
        read = _read(calls, run, sample, swapped)
    finally:
        _place(swapped, None)
        for module in tokenwise.values():
            vars(module).pop("forward", None)
    if missing := sorted(set(tokenwise) - set(calls.order)):
        raise UsageError("is not called by the model's forward pass", where=missing[0])
    return Observed(calls.mixers, calls.order, [shape[1] for shape in calls.shapes], read, answer)


def _place(swapped: Sequence[Swapped], place: _Calls | _Pulses | None) -> None:
    for each in swapped:
        each.place = place


def _check_places(calls: _Calls, run: Run, sample: Batch, swapped: Sequence[Swapped]) -> None:
    """UsageError for two neighbours, of as many tokens, between which a token does not keep its place."""
    lengths = [shape[1] for shape in calls.shapes]
    quiet = _pulsed(range(0), run, sample, swapped)
    loud = quiet
    for number in range(1, len(lengths)):
        if lengths[number] != lengths[number - 1] or lengths[number] < LEAST:
            continue
        if number - 1 not in loud.on:  # a run of its own: pulses of another resolution would come to other places
            others = [later for later in range(number, len(lengths)) if lengths[later] != lengths[number]]
            loud = _pulsed(range(number - 1, min(others, default=len(lengths))), run, sample, swapped)
        change = (loud.seen[number] - quiet.seen[number]).norm(dim=1)  # (L,)
        place = loud.places[number - 1]
        pulsed = set(loud.places[loud.on.start : number])
        other = max((float(value) for at, value in enumerate(change) if at not in pulsed), default=0.0)
        if float(change[place]) > other:
            continue
        one, two = calls.mixers[number - 1].name, calls.mixers[number].name
        what = (
            f"has its tokens at other places than {one}" if float(change.max()) else f"does not read what {one} wrote"
        )
        raise UsageError(
            f"{what}, so one choice of tokens cannot hold for both",
            where=two,
            hint="Mixers side by side, or over a flipped or permuted sequence, are pruned by an "
            "`ssmprune_cli.Adapter`; `ssmprune_cli.accelerate` makes them faster as they are.",
        )


def _pulsed(on: range, run: Run, sample: Batch, swapped: Sequence[Swapped]) -> _Pulses:
    """What the mixers saw in a pass in which those of the numbers `on` gave pulses."""
    pulses = _Pulses(on)
    _place(swapped, pulses)
    with torch.no_grad():
        run(sample)
    return pulses


def _read(calls: _Calls, run: Run, sample: Batch, swapped: Sequence[Swapped]) -> tuple[int, ...] | None:
    """Positions of the last mixer's output on which the answer depends, if they are a few of the tokens, and the same
    ones whatever the tokens say. They are not where the head takes the largest value of all."""
    found = [
        _read_once(_Pulses(range(len(calls.mixers)), calls.mixers[-1].name, noise), run, sample, swapped)
        for noise in (0.0, 3.0)
    ]
    return found[0] if found[0] == found[1] else None


def _read_once(pulses: _Pulses, run: Run, sample: Batch, swapped: Sequence[Swapped]) -> tuple[int, ...] | None:
    _place(swapped, pulses)
    with torch.enable_grad():
        answer = answer_of(run(sample))
        if pulses.last is None or not answer.requires_grad:
            return None
        weight = torch.randn(answer.shape, generator=torch.Generator().manual_seed(0)).to(answer)
        (gradient,) = torch.autograd.grad((answer * weight).sum(), pulses.last, allow_unused=True)
    if gradient is None:
        return None
    read = gradient[0].abs().sum(dim=-1).nonzero().flatten().tolist()
    return tuple(read) if 0 < len(read) <= max(1, gradient.shape[1] // 4) else None
