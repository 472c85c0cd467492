"""torch.ops.ssmprune.* called directly, past the Python functions: what does not fit is refused, and nothing is read
or written beyond what is there. In a process of its own, which a fault would end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssmprune_cli.kernels.cpu import build

ROOT = Path(__file__).parents[2]
# Names in the calls: z(...) zeros, i(...) indices, block and inner what blocks of 16 channels have, ops the ops.
SETUP = """
import math, torch
from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import BlockSizes
ops = torch.ops.ssmprune
z = torch.zeros
five = torch.arange(5)
def i(*size): return torch.zeros(size, dtype=torch.int64)
sizes = BlockSizes(16, 4, 3, 2, 2)
block, inner = z(1, sizes.block(16)), z(2, sizes.inner)
far = i(2, 1, 5, 3) + 10**9
def scan(u, delta, A, B, C, D=None, z=None, bias=None, shift=None, gap=None, gap_delta=None, read=None,
         initial=None):
    flags = (False, read, initial, True, False)
    return ops.selective_scan(u, delta, A, B, C, D, z, bias, True, shift, gap, gap_delta, *flags)
def scan_back(grad, u, A, B, states, last=None):
    absent = [None] * 3
    return ops.selective_scan_backward(grad, u, u, A, B, B, *absent, True, *absent, False, None, last, states)
names = ("gap", "gap_delta", "context", "sources", "read", "cells", "size", "mass")
def lost(**given):
    return [given.get(name) for name in names]
def blocks(hidden, residual=None, packed=block, sizes=sizes, **given):
    return ops.mamba_blocks(hidden, residual, packed, list(sizes), *lost(**given), 1.0, 1e-5, True)
def mamba(xz, packed=inner, N=4, K=3, R=2, **given):
    return ops.mamba_inner(xz, packed, N, K, R, *lost(**given), 1.0)
def frozen(count, read=five[None], **given):
    # what is given where tokens beside the five have steps of their own
    return dict(context=z(1, 9, 16), sources=i(2, 1, count, 3), read=read, **given)
def routes(u, projected, packed, order, rows=None, extra=None, gap=None, gap_delta=None):
    return ops.routed_scans(u, projected, packed, 4, order, rows, extra, gap, gap_delta)
"""
REFUSED = """
ops.gated_sum([], z(1, 2, 3), 1.0)
ops.gated_sum_backward(z(1, 2, 3), [], z(1, 2, 3), 1.0)
ops.gated_sum([z(1, 2, 3)], z(9, 200, 3000), 1.0)
ops.gated_sum_backward(z(1, 2, 3), [z(9, 200, 3000)], z(9, 200, 3000), 1.0)
ops.add_rms_norm(z(9, 200, 3000), z(1, 2, 3), z(3000), 1e-5)
ops.add_rms_norm(z(9, 200, 3000), None, z(3), 1e-5)
ops.add_rms_norm_backward(z(1, 2, 3), z(9, 200, 3000), z(9, 200, 3000), z(3000), 1e-5)
ops.causal_conv1d(z(9, 200, 3000), z(3, 4), z(3), False)
ops.causal_conv1d_backward(z(1, 2, 3), z(9, 200, 3000), z(3000, 4), z(3000), False)
ops.sparse_conv1d(z(1, 2, 3000), z(1, 1, 3), i(1, 2, 4), z(3000, 4), z(3000))
ops.sparse_conv1d(z(9, 200, 3), z(9, 1, 3), i(1, 2, 4), z(3, 4), z(3))
ops.sparse_conv1d(z(1, 2, 3), z(1, 1, 3), i(1, 2, 4) - 2, z(3, 4), z(3))
ops.sparse_conv1d_backward(z(1, 2, 3), z(1, 200, 3000), z(1, 1, 3000), i(1, 200, 4), z(3000, 4), z(3000))
ops.grid_conv2d(z(1, 6, 3000), z(3, 3, 3), None, 2, 3, None, 6)
ops.grid_conv2d(z(1, 6, 3), z(3, 3, 3), None, 2000, 3000, None, 6)
ops.grid_conv2d(z(1, 6, 3), z(3, 3, 3), None, 2, 3, None, 60000)
ops.grid_conv2d(z(1, 6, 3), z(3, 3, 3), None, -2, -3, None, 6)
ops.grid_conv2d(z(1, 6, 3), z(3, 3, 3), None, 2, 3, i(1, 2), 6)
ops.grid_conv2d_backward(z(1, 1, 3), z(1, 6, 3), z(3, 3, 3), None, 2, 3, None, 6)
scan(z(2, 50, 64), z(2, 5, 64), z(64, 4), z(2, 50, 4), z(2, 50, 4))
scan(z(2, 50, 64), z(2, 50, 64), z(6, 4), z(2, 50, 4), z(2, 50, 4))
scan(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(2, 50, 4), D=z(6))
scan(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(2, 50, 4), gap=z(2, 5), gap_delta=z(64))
scan(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(2, 50, 4), read=i(2, 2) + 10**9)
scan(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(2, 50, 4), read=i(2, 2))
scan(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(2, 50, 4), initial=z(2, 64, 3))
scan(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(2, 50, 4), initial=z(2, 64, 4).bfloat16())
scan_back(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(0), last=z(2, 4, 64))
scan_back(z(2, 5, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(0))
scan_back(z(2, 50, 64), z(2, 50, 64), z(64, 4), z(2, 50, 4), z(2, 4, 1, 1))
blocks(z(2, 500, 16), residual=z(1, 1, 16))
blocks(z(2, 5, 1600))
blocks(z(2, 5, 16), packed=block[:, 1:])
blocks(z(2, 5, 16), packed=block[:0])
blocks(z(2, 5, 16), sizes=sizes._replace(directions=3))
blocks(z(2, 5, 16), sizes=sizes._replace(parts=2))
blocks(z(2, 5, 16), gap=z(2, 2, 5), gap_delta=z(1, 16))
blocks(z(1, 5, 16), context=z(1, 1, 16))
blocks(z(1, 5, 16), context=z(1, 1, 16), sources=far)
blocks(z(1, 5, 16), context=z(1, 1, 3), sources=i(2, 1, 5, 3))
mamba(z(2, 5, 3000))
mamba(z(2, 5, 32), packed=z(1, 1))
mamba(z(2, 5, 32), N=-4, K=19)
mamba(z(1, 5, 32), context=z(1, 1, 16), sources=far)
mamba(z(2, 500, 32), gap=z(2, 2, 5))
mamba(z(1, 5, 32), context=z(1, 1, 16), sources=i(2, 1, 9, 3))
mamba(z(1, 5, 32), read=i(1, 5))
mamba(z(1, 5, 32), **frozen(3))
mamba(z(1, 5, 32), **frozen(9, read=i(1, 5)))
mamba(z(1, 5, 32), **frozen(9, read=i(1, 5) + 9))
mamba(z(1, 5, 32), **frozen(9, read=i(1, 4)))
mamba(z(1, 5, 32), **frozen(9), gap=z(2, 1, 5))
mamba(z(1, 5, 32), **frozen(9), size=z(1, 5), mass=z(()))
mamba(z(1, 5, 32), **frozen(9), size=z(1, 9))
mamba(z(1, 5, 32), **frozen(9), cells=i(1, 5))
mamba(z(1, 5, 32), **frozen(9), cells=i(1, 5), size=z(1, 5), mass=z(()))
mamba(z(1, 5, 32), **frozen(9), cells=five[None] + 9**9, size=z(1, 5), mass=z(()))
mamba(z(1, 5, 32), **frozen(9), cells=five[None] + 1, size=z(1, 9), mass=z(()))
mamba(z(1, 5, 32), context=z(1, 9, 16), sources=far[:, :, :1].expand(-1, -1, 9, -1), read=five[None])
blocks(z(1, 5, 16), **frozen(9), size=z(1, 9), mass=z(7))
blocks(z(1, 5, 16), **frozen(9), cells=five[None] + 6, size=z(1, 5), mass=z(1))
routes(z(1, 50, 64), z(1, 5, 1, 10), z(2, 64 * 8), i(2, 1, 50))
routes(z(1, 5, 64), z(1, 5, 1, 10), z(2, 8), i(2, 1, 5))
routes(z(1, 5, 64), z(1, 5, 1, 10), z(2, 64 * 8), i(2, 1, 5) + 10**9)
routes(z(1, 5, 64), z(1, 5, 1, 10), z(2, 64 * 8), i(2, 1, 5))
ops.linear(z(400, 64), z(7), None, 64)
ops.linear(z(4, 64), z(6144), z(1), 64)
ops.linear(z(4, 64), z(6144), None, -64)
"""
EMPTY = """
blocks(z(2, 0, 16))
blocks(z(0, 5, 16))
mamba(z(2, 0, 32))
mamba(z(0, 5, 32))
mamba(z(1, 0, 32), **frozen(9, read=i(1, 0)))
blocks(z(1, 0, 16), **frozen(9, read=i(1, 0)))
mamba(z(1, 5, 32), **frozen(5), cells=five[None] + 1, size=z(1, 5) + 1, mass=z(()))
scan(z(2, 0, 64), z(2, 0, 64), z(64, 4), z(2, 0, 4), z(2, 0, 4))
scan(z(2, 5, 0), z(2, 5, 0), z(0, 4), z(2, 5, 4), z(2, 5, 4))
scan_back(z(2, 0, 64), z(2, 0, 64), z(64, 4), z(2, 0, 4), z(0))
scan_back(z(0, 5, 64), z(0, 5, 64), z(64, 4), z(0, 5, 4), z(0))
scan_back(z(2, 5, 0), z(2, 5, 0), z(0, 4), z(2, 5, 4), z(0))
ops.causal_conv1d(z(2, 0, 3), z(3, 4), z(3), False)
ops.causal_conv1d_backward(z(2, 0, 3), z(2, 0, 3), z(3, 4), z(3), False)
ops.sparse_conv1d_backward(z(1, 0, 3), z(1, 0, 3), z(1, 0, 3), i(1, 0, 4), z(3, 4), z(3))
ops.grid_conv2d_backward(z(1, 0, 3), z(1, 0, 3), z(3, 3, 3), None, 2, 3, i(1, 0), 0)
ops.add_rms_norm(z(2, 0, 3), None, z(3), 1e-5)
ops.add_rms_norm_backward(z(2, 0, 3), z(2, 0, 3), z(2, 0, 3), z(3), 1e-5)
ops.add_rms_norm_backward(z(2, 5, 0), z(2, 5, 0), z(2, 5, 0), z(0), 1e-5)
ops.gated_sum([z(2, 0, 3)], z(2, 0, 3), 1.0)
routes(z(1, 0, 64), z(1, 0, 1, 10), z(2, 64 * 8), i(2, 1, 0))
ops.linear(z(0, 64), z(6144), None, 64)
ops.linear(z(4, 0), z(0), z(64), 64)
"""


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


LEVELS = build.levels() if build.compiler() is not None else ()


def run(code: str, level: str) -> list[str]:
    command = [sys.executable, "-W", "ignore", "-c", SETUP + code]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "SSMPRUNE_CPU_LEVEL": level}
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("level", LEVELS)
def test_what_does_not_fit_is_refused(level: str) -> None:
    tried = [
        f"try:\n    {call}\n    print('taken: ' + {call!r}, flush=True)\nexcept KernelError:\n    pass\n"
        for call in lines(REFUSED)
    ]
    assert run("".join(tried), level) == []


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_an_ordinary_input(level: str) -> None:
    """Results are zeros, or there are none."""
    code = "for call in calls:\n    found = eval(call)\n    for each in [found] if torch.is_tensor(found) else found:\n"
    assert run(f"calls = {lines(EMPTY)}\n{code}        if each.any(): print(call)\n", level) == []
