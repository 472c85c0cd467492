"""`prepare`: a snapshot of a model, in the best kind of session that can run it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.inference.behaviour import foreign_methods
from ssmprune_cli.inference.cpu import CpuSession
from ssmprune_cli.inference.cuda_graph import CudaGraphSession
from ssmprune_cli.inference.session import PlainSession, Session

# The best first.
SESSIONS: tuple[type[Session], ...] = (CudaGraphSession, CpuSession, PlainSession)


def prepare(model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Session:
    """A session: a snapshot of `model` that runs fast on `device` in `dtype` (those of the model by default).

    `model` is not changed, and no later change of it reaches the session. Its dropouts and batch norms are those of
    evaluation. Any module that takes one tensor can be prepared; a backbone of ours gets the fused calls.

    Raises UsageError for a model of which no snapshot can be taken: one without values (meta), or one in which a
    module has a `forward` of its own, as Accelerate's hooks put there, which may hold on to the original.
    """
    replaced = next(foreign_methods(model), None)
    if replaced is not None:
        module, method = replaced
        raise UsageError(
            f"the module {module} has a `{method}` of its own, which may hold on to the model",
            hint="Remove it first, such as with accelerate.hooks.remove_hook_from_module(model, recurse=True).",
        )
    if any(each.is_meta for each in [*model.parameters(), *model.buffers()]):
        raise UsageError("the model has no values (it is on the meta device)", hint="Load its weights first.")
    if dtype is not None and not dtype.is_floating_point:
        raise UsageError(f"a model cannot compute in {dtype}")
    definition = snapshot(model).to(device=device, dtype=dtype)
    refused: dict[str, str] = {}
    for kind in SESSIONS:
        reason = kind.refuses(definition)
        if reason is None:
            return kind(definition, refused)
        refused[kind.kind] = reason
    raise AssertionError("a plain session runs everything")


def snapshot(model: nn.Module) -> nn.Module:
    """A copy of `model` for evaluation, which shares nothing with it. Raises UsageError if it cannot be copied."""
    try:
        with torch.no_grad():
            copied = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"the model cannot be copied: {str(error).splitlines()[0]}") from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied.eval().requires_grad_(False)
