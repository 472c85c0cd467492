"""What an export target is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

Run = Callable[[Tensor], tuple[Tensor, ...]]
How = Literal["static", "dynamic"]  # where the scales of 8-bit activations come from: calibration, or each batch


@dataclass(frozen=True)
class Wanted:
    """What is asked of a file.

    opset    of ONNX's own operators; None is the target's choice
    facts    name -> text, to be stored in the file
    outputs  names of what the graph computes
    """

    opset: int | None
    facts: Mapping[str, str]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class ExportTarget:
    """A kind of file.

    suffix   of the file's name
    missing  why it cannot be written here, or None if it can
    write    (graph of a model in evaluation mode, path, what is wanted) -> writes the file
    open     path -> by the name of each runtime the function from images (B, 3, H, W) to the outputs
             that the file computes
    record   (path, name, text) -> stores a fact in the file, in the place of one of this name; None where a file is
             not touched again
    opsets   the least and the most of ONNX's that can be asked for, or None
    dtypes   of the models that it can hold; none is any
    quantise (file, path, how, batches to calibrate on) -> writes the file with its large products in 8-bit integers,
             and says how many these are; None where that is not offered
    """

    suffix: str
    missing: Callable[[], str | None]
    write: Callable[[ExportedProgram, Path, Wanted], None]
    open: Callable[[Path], Mapping[str, Run]]
    record: Callable[[Path, str, str], None] | None = None
    opsets: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    quantise: Callable[[Path, Path, How, Iterable[Tensor]], int] | None = None
