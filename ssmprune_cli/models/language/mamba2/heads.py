"""The scan of Mamba-2 by the selective scan of Mamba-1, parameters repeated for each channel of a head.

Letters: B batch, S steps, H heads, P channels of a head, G groups, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmprune_cli.kernels import selective_scan


def scan_heads(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    dt_bias: Tensor,
    gap: Tensor | None,
    gap_delta: Tensor | None,
    read: Tensor | None,
) -> Tensor:
    """y (B, S, H, P), of the tokens `read` (B, K) only if they are given.

    u (B, S, H, P), dt (B, S, H) raw steps, A, D, dt_bias and gap_delta (H,), B and C (B, S, G, N), gap (B, S).
    """
    channels, groups, state = u.shape[3], B.shape[2], B.shape[3]

    def spread(values: Tensor) -> Tensor:
        """Of (..., H) for each channel of a head: (..., H P)."""
        return values.repeat_interleave(channels, dim=-1)

    delta, rates = spread(dt), spread(A)[:, None].expand(-1, state)
    bias, skip, step = (None if each is None else spread(each) for each in (dt_bias, D, gap_delta))
    width = u.shape[2] * channels // groups
    outputs = []
    for group in range(groups):
        own = slice(group * width, (group + 1) * width)
        outputs.append(
            selective_scan(
                u.flatten(2)[..., own].contiguous(),
                delta[..., own].contiguous(),
                rates[own].contiguous(),
                B[:, :, group].contiguous(),
                C[:, :, group].contiguous(),
                None if skip is None else skip[own],
                delta_bias=None if bias is None else bias[own],
                gap=gap,
                gap_delta=None if step is None else step[own],
                read=read,
            )
        )
    return torch.cat(outputs, dim=-1).unflatten(-1, (u.shape[2], channels))
