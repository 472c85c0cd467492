"""The device that a command runs on."""

from __future__ import annotations

import torch

from ssmprune_cli.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`. Raises UsageError if it is no CPU and no CUDA device, or not on this machine."""
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UsageError(f"device {name!r} cannot be used: ssmprune computes on cpu and cuda", where="--device")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"device {name!r} cannot be used: {reason}", where="--device", hint="See `ssmprune env`."
        ) from error
    return device
