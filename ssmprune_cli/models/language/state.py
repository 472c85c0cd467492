"""The state of a scan after its last step, from what every step puts into it and what decays afterwards.

Letters: B batch, S steps, E channels, N state, H heads, P channels of a head, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_AT_ONCE = 64  # steps whose (B, E, N) values are held together


def decayed(delta: Tensor, gap: Tensor | None, gap_delta: Tensor | None) -> Tensor:
    """(B, S, C): by how long a time the state decays after each of the steps `delta` (B, S, C), the tokens that were
    dropped since included: `gap` (B, S) of them before a step, of `gap_delta` (C,) each, or of the step itself."""
    passed = delta
    if gap is not None:
        passed = delta + gap[..., None].to(delta.dtype) * (delta if gap_delta is None else gap_delta.to(delta.dtype))
    return passed.flip(1).cumsum(dim=1).flip(1) - passed


def last_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    delta_bias: Tensor,
    gap: Tensor | None,
    gap_delta: Tensor | None,
) -> Tensor:
    """(B, E, N) of a selective scan as `kernels.selective_scan` takes it; float32 at least."""
    exact = torch.promote_types(u.dtype, torch.float32)
    steps = functional.softplus((delta + delta_bias).to(exact))  # (B, S, E)
    after, put = decayed(steps, gap, gap_delta), steps * u
    state = put.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    for start in range(0, u.shape[1], _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        decay = torch.exp(after[:, part, :, None] * A)  # (B, steps, E, N)
        state += torch.einsum("bsen,bse,bsn->ben", decay, put[:, part], B[:, part].to(exact))
    return state


def last_state_of_heads(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    dt_bias: Tensor,
    gap: Tensor | None,
    gap_delta: Tensor | None,
) -> Tensor:
    """(B, H, P, N) of Mamba-2's scan: u (B, S, H, P), dt (B, S, H), A (H,), B (B, S, G, N); float32 at least."""
    exact = torch.promote_types(u.dtype, torch.float32)
    steps = functional.softplus((dt + dt_bias).to(exact))  # (B, S, H)
    weight = steps * torch.exp(decayed(steps, gap, gap_delta) * A)
    per_head = B.to(exact).repeat_interleave(u.shape[2] // B.shape[2], dim=2)  # (B, S, H, N)
    return torch.einsum("bsh,bshp,bshn->bhpn", weight, u.to(exact), per_head)
