"""How an op is registered with torch.library, so that torch.compile, torch.export and FLOP counters see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmprune_cli.errors import KernelError

# `torch.library.custom_op` does the same at three times the cost of a call, which a small batch feels.
_LIBRARY = torch.library.Library("ssmprune", "DEF")


def define(
    name: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> None:
    """Register `compute` as torch.ops.ssmprune.<name>; its annotations give the schema. Autocast does not reach into
    it: an op computes in the precision that it states.

    fake             the same for shapes only
    backward, setup  as in torch.library.register_autograd
    """
    schema = torch.library.infer_schema(compute, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, _without_autocast(name, device), f"Autocast{device.upper()}")
    qualified = f"ssmprune::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_LIBRARY)


def _without_autocast(name: str, device: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.ssmprune, name)(*arguments, **named)

    return call


Formula = Callable[..., int]


def counted(name: str) -> Callable[[Formula], Formula]:
    """Declare the multiply-adds of torch.ops.ssmprune.<name>: of its arguments, with sizes in the place of tensors, and
    `out_shape`. torch's registry is told twice as many: it counts a multiply-add as two floating-point operations.
    """

    def declare(formula: Formula) -> Formula:
        register_flop_formula(getattr(torch.ops.ssmprune, name))(lambda *a, **k: 2 * formula(*a, **k))
        return formula

    return declare


def tracing() -> bool:
    """Whether torch.jit.trace is at work."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


Expected = dict[str, tuple[Tensor, tuple[int, ...]]]  # name -> tensor, and the shape that it must have


def check(tokens: Tensor, activations: Expected, parameters: Expected) -> None:
    """Raise KernelError unless every tensor has its shape, the device of `tokens` and a fitting dtype.

    Activations have the dtype of `tokens`; parameters may be wider: float32 beside half precision.
    """
    if tracing():  # sizes are tensors then, and comparing them would only warn
        return
    dtype, device = tokens.dtype, tokens.device
    for group in (parameters, activations):
        for name, (tensor, shape) in group.items():
            if tensor.shape != shape:
                raise KernelError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
            if tensor.dtype != dtype and (group is activations or tensor.dtype != torch.float32 or dtype.itemsize > 2):
                raise KernelError(f"{name} is {tensor.dtype}, but the tokens are {dtype}")
            if tensor.device != device:
                raise KernelError(f"{name} is on {tensor.device}, but the tokens are on {device}")


def state_dtype(tokens: Tensor) -> torch.dtype:
    """Of a scan's states: float32 at least."""
    return torch.promote_types(tokens.dtype, torch.float32)


def check_state(name: str, state: Tensor, shape: tuple[int, ...], tokens: Tensor) -> None:
    """Raise KernelError unless `state` has this shape, and the device and precision of the states of `tokens`."""
    if tracing():
        return
    if state.shape != shape:
        raise KernelError(f"{name} has shape {tuple(state.shape)}, not {shape}")
    if state.dtype != state_dtype(tokens):
        raise KernelError(f"{name} is {state.dtype}, but states are {state_dtype(tokens)}")
    if state.device != tokens.device:
        raise KernelError(f"{name} is on {state.device}, but the tokens are on {tokens.device}")


def refuse_gradients(*tensors: Tensor) -> None:
    """Raise KernelError if one of them needs a gradient, which fused ops do not give."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise KernelError("the fused ops have no gradient", hint="Call them under torch.no_grad().")


def three(tensor: Tensor, name: str) -> tuple[int, int, int]:
    """Sizes of `tensor`, which must have three dimensions."""
    if tensor.ndim != 3:
        raise KernelError(f"{name} must have shape (batch, tokens, channels), not {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1], tensor.shape[2]
