"""What a recogniser of mixers gives, and the checks that all of them share.

Letters: B batch, L tokens, d model width, E inner channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import listing
from ssmprune_cli.grids import Grid
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import CentredMixer, LocalMixer, MambaMixer
from ssmprune_cli.tokens import TokenSequence

Layout = Literal["tokens", "grid", "image"]  # of a mixer's input: (B, L, d), (B, H, W, d) or (B, d, H, W)
Shape = tuple[int, ...]
SIZES = {"tokens": (2, 11), "grid": (2, 6, 4), "image": (2, 6, 4)}  # of the input of a proof: samples and tokens
M = TypeVar("M", bound=nn.Module)


class Unrecognised(Exception):
    """Why a module is not of one kind."""


def layout_of(x: Tensor) -> Layout:
    """Of what a token-wise module is given, whose channels come last."""
    return "tokens" if x.ndim == 3 else "grid"


def to_tokens(x: Tensor, layout: Layout) -> tuple[Tensor, Grid | None]:
    """`x` in its layout as tokens (B, L, d), and the grid that they lie on."""
    if layout == "tokens":
        return x, None
    if layout == "image":
        x = x.permute(0, 2, 3, 1)  # (B, H, W, d)
    return x.flatten(1, 2), (x.shape[1], x.shape[2])


def from_tokens(tokens: Tensor, layout: Layout, grid: Grid | None) -> Tensor:
    """The inverse of `to_tokens`."""
    if grid is None:
        return tokens
    x: Tensor = tokens.unflatten(1, grid)
    return x.permute(0, 3, 1, 2) if layout == "image" else x


@dataclass(frozen=True)
class Form(ABC):
    """How our ops compute a module of one kind. It holds sizes and no weights: these are read at every call.

    kind      for messages, such as "Mamba"
    layout    of the input and the output
    d_model, d_inner, directions, per_direction: see `interface.Mixer`
    bypassed  children whose weights are read and whose own `forward` is not called
    """

    kind: str
    layout: Layout
    d_model: int
    d_inner: int
    directions: int
    bypassed: tuple[str, ...]

    @abstractmethod
    def scan(
        self,
        module: nn.Module,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        """The forward of `module` on `x` (B, L, d), the tokens of `sequence`: (B, L, d), and what its scans did.

        With `alignment`, each scan makes up for the tokens that `sequence` has lost. `context` (B, M, d) are the inputs
        of `sequence.context`, which only the convolution sees.
        """

    @abstractmethod
    def null_delta(self, module: nn.Module) -> Tensor:
        """(directions, E): the step size of a zero token among zero tokens."""

    def input_size(self, module: nn.Module) -> Shape:
        """Samples and tokens of an input to prove `module` on, which is a copy of the user's and may be told of it."""
        return SIZES[self.layout]


class SequenceForm(Form):
    """That of a module which a mixer of ours over a sequence computes, on a view of its weights."""

    @abstractmethod
    def view(self, module: nn.Module) -> MambaMixer | LocalMixer | CentredMixer:
        """Our mixer over the weights of `module`, made for one call."""

    def scan(
        self,
        module: nn.Module,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        return self.view(module).forward(x, sequence, alignment, wanted, None, context)

    def null_delta(self, module: nn.Module) -> Tensor:
        return self.view(module).null_delta()


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def check_names(values: Mapping[str, Tensor], needed: Iterable[str], possible: Collection[str] = ()) -> None:
    """Raise Unrecognised unless `values` are all that is `needed`, and beside it only what is `possible`."""
    wanted = set(needed)
    if missing := sorted(wanted - set(values)):
        raise Unrecognised(f"it has no {listing(missing)}")
    if unknown := sorted(set(values) - wanted - set(possible)):
        raise Unrecognised(f"it also has {listing(unknown)}")


def check_shapes(values: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> None:
    """Raise Unrecognised unless each of `values` that is in `expected` has its shape."""
    for name, shape in expected.items():
        if name in values and tuple(values[name].shape) != shape:
            raise Unrecognised(f"{name} has shape {tuple(values[name].shape)}, not {shape}")


def check_types(module: nn.Module, types: Mapping[str, type[nn.Module]]) -> None:
    """Raise Unrecognised unless each child is of exactly this type: a subclass may compute something else."""
    for name, wanted in types.items():
        child = getattr(module, name)
        if type(child) is not wanted:
            raise Unrecognised(f"{name} is a {type(child).__name__}, not a {wanted.__name__}")


def check_silu(module: nn.Module) -> None:
    """Raise Unrecognised if the module names another activation than SiLU."""
    activation = getattr(module, "activation", "silu")
    act = getattr(module, "act", None)
    if activation not in ("silu", "swish"):
        raise Unrecognised(f"its activation is {activation!r}, not 'silu'")
    if isinstance(act, nn.Module) and not type(act).__name__.lower().startswith("silu"):
        raise Unrecognised(f"its activation is {type(act).__name__}, not SiLU")


def check_conv(conv: nn.Conv1d | nn.Conv2d, channels: int, padding: int | None) -> None:
    """Raise Unrecognised unless `conv` is depthwise, pads zeros (so many, or None for any), and steps by one place."""
    plain = {*conv.stride, *conv.dilation} == {1} and conv.groups == channels
    pads = padding is None or set(conv.padding) == {padding}
    if not plain or not pads or conv.padding_mode != "zeros":
        raise Unrecognised("its convolution is not the usual depthwise one")


def bare(kind: type[M], /, **attributes: Any) -> M:
    """A module of `kind` that was not initialised and has these attributes: a view of weights that others own."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def bias_of(conv: nn.Conv1d) -> Tensor:
    """(E,): zeros for a convolution without one."""
    bias = conv._parameters["bias"]
    return conv.weight.new_zeros(conv.out_channels) if bias is None else bias


def part_of(layer: nn.Linear, x: Tensor, rows: slice) -> Tensor:
    """What `layer` makes of `x` in these of its outputs."""
    bias = layer._parameters["bias"]
    return functional.linear(x, layer.weight[rows], None if bias is None else bias[rows])


def rank_of(projected: int, state: int) -> int:
    """R of a projection to R + 2N channels. Raises Unrecognised if nothing is left for it."""
    if projected - 2 * state < 1:
        raise Unrecognised(f"x_proj has {projected} rows, too few for twice {state} states")
    return projected - 2 * state
