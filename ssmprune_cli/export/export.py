"""Write a model in the form of a target, and keep the file only if it computes what the model computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export.pt2 import PT2
from ssmprune_cli.export.target import ExportTarget
from ssmprune_cli.models import Backbone
from ssmprune_cli.registry import Registry

TARGETS: Registry[ExportTarget] = Registry("export target")
TARGETS.register("pt2", PT2)

# Of the largest logit. Another runtime may add in another order; half precision has 8 or 11 bits.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Exported:
    """A written file. `error` is the largest difference of its logits from the model's, as a share of the largest."""

    path: Path
    target: str
    batch: int
    error: float
    tolerance: float


def export(model: Backbone, path: Path, target: str = "pt2", batch: int = 1) -> Exported:
    """Write `model`, dense or pruned, to `path` for batches of `batch` images of its size, dtype and device.

    The file is read back and run on random images, other than those that it was made with. Raises UsageError for a
    target that is unknown or cannot be written here, for a path of another suffix or that exists, and for a detector,
    which answers with several tensors; SsmpruneError if the model cannot be written in this form or the file computes
    something else. Then there is no file.
    """
    chosen = TARGETS.get(target)
    if batch < 1:
        raise UsageError(f"a batch has at least one image, not {batch}")
    if path.suffix != chosen.suffix:
        raise UsageError(f"a file of the target {target!r} has the suffix {chosen.suffix}", where=str(path))
    if path.exists():
        raise UsageError("exists already", where=str(path), hint="Delete it, or choose another name.")
    reason = chosen.missing()
    if reason is not None:
        raise UsageError(f"the target {target!r} cannot be written here: {reason}")
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(0)
    example, other = (
        torch.randn(batch, 3, *model.image_size, generator=random).to(device, model.dtype) for _ in range(2)
    )
    tolerance = _TOLERANCES.get(model.dtype, _HALF_TOLERANCE)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            expected = model(other)
            if not isinstance(expected, torch.Tensor):
                raise UsageError(f"a model for {model.task} answers with several tensors, which no target takes")
            expected = expected.double()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                chosen.write(model, temporary, example)
                found = chosen.compute(temporary, other).double()
            except OSError:  # of the disk, not of the model
                raise
            except Exception as error:  # whatever an exporter raises of a model that it cannot take
                first = str(error).strip().partition("\n")[0]
                raise SsmpruneError(
                    f"{model.family} cannot be exported to {target}: {first}", where=str(path)
                ) from error
        share = float((found - expected).abs().max()) / (float(expected.abs().max()) or 1.0)
        if not share <= tolerance:
            raise SsmpruneError(
                f"the {target} file computes something else: its logits are {share:.2g} of the largest one away from "
                f"the model's, and {tolerance:g} is allowed",
                where=str(path),
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        for module, mode in modes.items():
            module.training = mode
    return Exported(path, target, batch, share, tolerance)
