"""Whether our forward of a module is its own, on random weights and random input.

A copy is compared, in float32 at least, with random numbers added to its weights: so a weight that happens to be 0 or 1
still has its say.
"""

from __future__ import annotations

import copy
import importlib.metadata

import torch
from torch import Tensor, nn

from ssmprune_cli.adapt.mixers.base import Form, Unrecognised, from_tokens, to_tokens
from ssmprune_cli.tokens import TokenSequence

TOLERANCE = 1e-4  # of the largest output: sums in float32, in another order
STOCK = {"mamba_ssm.modules.mamba_simple.Mamba", "mamba_ssm.modules.mamba2.Mamba2"}
STOCK_VERSIONS = ("1.1", "1.2", "2.0", "2.1", "2.2", "2.3")  # whose mixers compute what ours do


class CannotRun(Unrecognised):
    """The module's own code fails on this device, so nothing can be compared."""


def prove(module: nn.Module, form: Form) -> str | None:
    """None if `form` computes what `module` does, and what is not proven of it if it is accepted all the same.

    Raises Unrecognised if the two differ, and CannotRun if the module's own code fails.
    """
    device = next(module.parameters()).device
    if device.type == "meta":
        raise CannotRun("its weights are on the meta device: there is nothing to compare with")
    twin = copy.deepcopy(module).eval().requires_grad_(False)
    twin = twin.float() if any(each.dtype.itemsize < 4 for each in twin.parameters()) else twin
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for parameter in twin.parameters():
        parameter.add_(noise(parameter), alpha=0.1)
    like = next(twin.parameters()).new_empty(*form.input_size(twin), form.d_model)
    x = noise(like).movedim(-1, 1) if form.layout == "image" else noise(like)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            expected = type(twin).forward(twin, x)
        except Exception as error:
            return _accepted(module, error)
        found = dense(twin, form, x)
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        raise Unrecognised("its output is no tensor of the shape of its input")
    apart = float((found - expected).abs().max() / expected.abs().max())
    if not apart <= TOLERANCE:
        raise Unrecognised(
            f"on random input it computes something else: the outputs differ by {apart:.1e} of the largest"
        )
    return None


def dense(module: nn.Module, form: Form, x: Tensor) -> Tensor:
    """What `module` computes of `x`, by our ops."""
    tokens, grid = to_tokens(x, form.layout)
    sequence = TokenSequence.dense(tokens, grid=grid)
    return from_tokens(form.scan(module, tokens, sequence, None, "nothing", None)[0], form.layout, grid)


def _accepted(module: nn.Module, error: Exception) -> str:
    """For the stock mixers of mamba_ssm, whose code needs a GPU: why they are taken unproven."""
    kind = type(module)
    first = str(error).strip().split("\n")[0][:200]
    reason = f"its own code fails on {next(module.parameters()).device.type}: {type(error).__name__}: {first}"
    if f"{kind.__module__}.{kind.__qualname__}" in STOCK:
        version = importlib.metadata.version("mamba-ssm")
        if version.startswith(STOCK_VERSIONS):
            return f"not compared, accepted as {kind.__name__} of mamba_ssm {version}: {reason}"
        reason = f"of mamba_ssm {version}, which we do not know, {reason}"
    raise CannotRun(reason) from error
