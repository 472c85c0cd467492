"""What an export target is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ssmprune_cli.models import Backbone


@dataclass(frozen=True)
class ExportTarget:
    """A kind of file.

    suffix   of the file's name
    missing  why it cannot be written here, or None if it can
    write    (model in evaluation mode, path, example images (B, 3, H, W)) -> writes the file, for images of that shape
    compute  (path, images) -> the logits (B, ...) that the written file computes
    """

    suffix: str
    missing: Callable[[], str | None]
    write: Callable[[Backbone, Path, Tensor], None]
    compute: Callable[[Path, Tensor], Tensor]
