"""Which kernel backend runs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.backend import Backend
from ssmprune_cli.registry import Registry

# In order of preference; `kernels/__init__.py` fills it.
BACKENDS: Registry[Backend] = Registry("kernel backend")
_chosen = "auto"
_picked: dict[tuple[torch.dtype, str, int, bool], Backend] = {}  # what `pick` has found since the last choice


def use_backend(name: str) -> None:
    """Compute with the backend called `name` from now on; "auto" takes the best that is available and fits.

    Raises UsageError for an unknown name and KernelError if it is missing here, with the reason.
    """
    global _chosen
    if name != "auto":
        reason = BACKENDS.get(name).missing()
        if reason is not None:
            raise KernelError(f"kernel backend {name!r} cannot be used: {reason}", hint="See `ssmprune env`.")
    _chosen = name
    _picked.clear()


def available_backends() -> dict[str, str]:
    """Every backend with "available" or the reason why it is missing."""
    return {name: backend.missing() or "available" for name, backend in BACKENDS.items()}


def backends_for(example: Tensor) -> list[str]:
    """Names of the available backends that compute in the dtype and on the device of `example`, best first."""
    fitting = ((name, backend) for name, backend in BACKENDS.items() if backend.accepts(example, 1))
    return [name for name, backend in fitting if backend.missing() is None]


def active_backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The backend that tensors of `dtype` on `device` are computed with."""
    return pick(torch.empty(0, device=device, dtype=dtype), 1).name


def refused_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """Better backends than the active one, each with the reason why it is not used; empty when one was asked for."""
    refused: dict[str, str] = {}
    if _chosen == "auto":
        example = torch.empty(0, device=device, dtype=dtype)
        for name, backend in BACKENDS.items():
            if name == active_backend(device, dtype):
                break
            if backend.accepts(example, 1):
                refused[name] = backend.missing() or "is used only when asked for by name"
            elif backend.accepts(example.float(), 1):
                refused[name] = f"does not compute in {dtype}"
            else:
                refused[name] = f"does not compute on {example.device.type}"
    return refused


def pick(example: Tensor, inner: int, carried: bool = False) -> Backend:
    """The backend for tensors like `example` with `inner` states or taps.

    carried  whether it has to take initial states, and gradients of last ones

    Raises KernelError if the one asked for by name does not take them.
    """
    key = (example.dtype, example.device.type, inner, carried)
    if key not in _picked:
        _picked[key] = _find(example, inner, carried)
    return _picked[key]


def _find(example: Tensor, inner: int, carried: bool) -> Backend:
    if _chosen == "auto":
        fitting = (
            b
            for _, b in BACKENDS.items()
            if b.automatic and b.accepts(example, inner) and (b.carries_states or not carried)
        )
        return next(backend for backend in fitting if backend.missing() is None)
    backend = BACKENDS.get(_chosen)
    if not backend.accepts(example, inner):
        given = f"{example.dtype} on {example.device.type} with {inner} states or taps"
        raise KernelError(f"kernel backend {_chosen!r} does not compute {given}")
    if carried and not backend.carries_states:
        what = "initial states, nor gradients of last ones"
        raise KernelError(f"kernel backend {_chosen!r} does not take {what}", hint="Choose another, or `auto`.")
    return backend


def backend_from_environment() -> None:
    """Honour SSMPRUNE_BACKEND, so that a test or a bug report can pin a backend."""
    use_backend(os.environ.get("SSMPRUNE_BACKEND", "auto"))
