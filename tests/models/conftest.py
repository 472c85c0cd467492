"""Weights of golden fixtures that are not stored: they are computed from their names."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"


def made_up(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that the golden values were computed with: splitmix64, seeded with the checksums of its name."""
    text, count, leaf = name.encode(), math.prod(shape), name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.full(shape, 1234)
    seed = np.uint64(zlib.crc32(text) | (zlib.crc32(text[::-1]) << 32))
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed  # wraps, as it should
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    values = ((state >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0).reshape(shape)
    if leaf in ("A_log", "A_b_log", "A_logs"):
        values = np.log(np.arange(1.0, shape[-1] + 1)) + 0.5 * values
    elif leaf in ("D", "D_b", "Ds"):
        values = 1.0 + 0.8 * values
    elif "dt_proj" in name:
        step_bias = leaf in ("bias", "dt_projs_bias")
        values = -1.75 + 1.25 * values if step_bias else 0.8 * 3.0**0.5 * values / np.sqrt(shape[-1])
    elif leaf == "x_proj_weight":
        values = 3.0**0.5 * values / np.sqrt(shape[-1])
    elif leaf in ("running_var", "gamma_1", "gamma_2") or (leaf == "weight" and len(shape) == 1):
        values = 1.0 + 0.5 * values
    elif leaf == "weight":
        values = 3.0**0.5 * values / np.sqrt(math.prod(shape[1:]))
    else:
        values = (0.3 if leaf in ("bias", "running_mean") else 0.8) * values
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture
def golden_file(tmp_path: Path) -> Callable[[str], Path]:
    """The weights of a golden model by its folder's name, as a file of bare weights."""

    def write(folder: str) -> Path:
        described = json.loads((GOLDEN / folder / "config.json").read_text(encoding="utf-8"))
        keys = described["state_dict_keys"].items()
        torch.save({key: made_up(key, tuple(shape)) for key, (shape, _) in keys}, tmp_path / f"{folder}.pth")
        return tmp_path / f"{folder}.pth"

    return write
