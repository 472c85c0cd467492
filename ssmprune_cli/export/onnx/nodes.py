"""Our ops as nodes of our domain. What a node computes is the function of its name, see `bodies.py`.

A function cannot ask which of its inputs are there. So an op has a name for each set of inputs and direction.
Letters: B batch, L tokens, E channels, N state size, K taps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.kernels import PLAIN_PRUNE, ScanInputs

DOMAIN, VERSION = "ssmprune", 1
_OPS = torch.ops.ssmprune


def _node(name: str, inputs: Sequence[Tensor], shape: Sequence[Any], **attributes: Any) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=inputs[0].dtype, shape=shape, version=VERSION
    )
    return result


def scan_name(*, has_D: bool, gap: str, reverse: bool) -> str:
    """Of a scan; `gap` is "" without gaps, "Own" with those that last as the token's own step, or "Given"."""
    return "SelectiveScan" + ("" if has_D else "NoSkip") + (f"Gap{gap}" if gap else "") + ("Reverse" if reverse else "")


def _scan(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op's arguments: those of ScanInputs, whether it gives its last state, and whether it keeps others for a
    backward pass, which a file has not."""
    *given, return_state, _ = values
    scan = ScanInputs(*given)
    if scan.initial_state is not None or return_state:
        raise SsmpruneError("a scan that takes or gives a state has no node")
    if scan.z is not None or scan.shift is not None or scan.delta_bias is None or not scan.delta_softplus:
        raise SsmpruneError("a scan with a gate or a shift of its own, or without a bias, has no node")
    kind = "" if scan.gap is None else "Own" if scan.gap_delta is None else "Given"
    name = scan_name(has_D=scan.D is not None, gap=kind, reverse=scan.reverse)
    tensors = (scan.u, scan.delta, scan.A, scan.B, scan.C, scan.delta_bias, scan.D, scan.gap, scan.gap_delta)
    y = _node(name, [each for each in tensors if each is not None], scan.u.shape)
    if scan.read is not None:
        y = y.gather(1, scan.read[..., None].expand(-1, -1, scan.u.shape[2]))
    return y, scan.u.new_empty(0), scan.u.new_empty(0)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    width = weight.shape[1] - 1
    return _node(
        "CausalConv1dReverse" if reverse else "CausalConv1d",
        (x, weight, bias),
        x.shape,
        channels=x.shape[2],
        pads=[0, width] if reverse else [width, 0],
    )


def _sparse_conv(x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _node("SparseConv1d", (x, context, sources, weight, bias), x.shape)


def _grid_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, columns: int, positions: Tensor | None, outputs: int
) -> Tensor:
    batch, _, channels = x.shape
    return _node(
        "GridConv2d" if positions is None else "GridConv2dPlaced",
        (x, weight, weight.new_zeros(channels) if bias is None else bias, *([] if positions is None else [positions])),
        (batch, outputs, channels),
        channels=channels,
        grid=[rows, columns],
        outputs=[outputs],
        pads=[weight.shape[1] // 2] * 4,
    )


def _norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    name, inputs = ("AddRmsNorm", (hidden, residual, weight)) if residual is not None else ("RmsNorm", (hidden, weight))
    normed, stream = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{name}",
        inputs,
        {"eps": eps},
        dtypes=(hidden.dtype, hidden.dtype),
        shapes=(hidden.shape, hidden.shape),
        version=VERSION,
    )
    return normed, stream


def _gate(ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
    return _node(f"GatedSum{len(ys)}", (*ys, z), z.shape, scale=scale)


def _eight_bit_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = _node("LinearInt8", (x, values, scale), (*x.shape[:-1], values.shape[0]))
    return y if bias is None else y + bias


NODES: dict[Any, Callable[..., Any]] = {
    _OPS.selective_scan.default: _scan,
    _OPS.causal_conv1d.default: _conv,
    _OPS.sparse_conv1d.default: _sparse_conv,
    _OPS.grid_conv2d.default: _grid_conv,
    _OPS.add_rms_norm.default: _norm,
    _OPS.gated_sum.default: _gate,
    **PLAIN_PRUNE,
    _OPS.eight_bit_linear.default: _eight_bit_linear,
}
