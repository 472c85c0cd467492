"""What our nodes compute, in ONNX's standard operators: a function by the name of each.

A runtime puts the function in the place of the node, unless it has a kernel of that name. The language is that of
`onnx.parser`. Letters: B batch, L tokens, E channels, N state size, K taps, M context tokens.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from ssmprune_cli.export.onnx.nodes import DOMAIN, scan_name
from ssmprune_cli.kernels import MOST

MOST_YS = 4  # directions of a gated sum
_FLOAT, _UINT8 = 1, 2  # numbers of ONNX's types
# Of bytes without a sign this one stands for 0. With signed weights ONNX Runtime adds two products at a time in 16 bits
# where a processor has no VNNI, and they overflow; without signs its sums are exact on every processor.
_MIDDLE = 128

# `activated` is silu(pre).
_SILU = "gate = Sigmoid (pre) \n activated = Mul (pre, gate)"


def _scan(has_D: bool, gap: str, reverse: bool) -> str:
    """Inputs u, delta (B, L, E), A (E, N), B, C (B, L, N), bias, D (E,), gap (B, L), gap_delta (E,)."""
    inputs = ["u", "delta", "A", "B", "C", "bias"]
    inputs += ["D"] * has_D + ["gap"] * bool(gap) + ["gap_delta"] * (gap == "Given")
    decay = ""
    if gap:
        decay = f"""
            last = Constant <value_ints = [-1]> ()
            gaps = Unsqueeze (gap, last)
            skipped = Mul (gaps, {"gap_delta" if gap == "Given" else "steps"})
            decay = Add (steps, skipped)"""
    ways = ", ".join([str(int(reverse))] * 4)
    skip = "skip = Mul (D, u) \n y = Add (scanned, skip)" if has_D else "y = Identity (scanned)"
    return f"""{scan_name(has_D=has_D, gap=gap, reverse=reverse)} ({", ".join(inputs)}) => (y) {{
        raw = Add (delta, bias)
        steps = Softplus (raw)
        {decay}
        drive = Mul (steps, u)
        decay_l = Transpose <perm = [1, 0, 2]> ({"decay" if gap else "steps"})
        drive_l = Transpose <perm = [1, 0, 2]> (drive)
        B_l = Transpose <perm = [1, 0, 2]> (B)
        C_l = Transpose <perm = [1, 0, 2]> (C)
        batch = Shape <start = 0, end = 1> (u)
        sizes = Shape (A)
        shape = Concat <axis = 0> (batch, sizes)
        start = ConstantOfShape (shape)
        ended, read = Scan <num_scan_inputs = 4, scan_input_directions = [{ways}],
            scan_output_directions = [{int(reverse)}], body = step (
                float[B, E, N] before, float[B, E] decay_t, float[B, E] drive_t, float[B, N] B_t, float[B, N] C_t
            ) => (float[B, E, N] after, float[B, E] y_t) {{
                column = Constant <value_ints = [2]> ()
                row = Constant <value_ints = [1]> ()
                times = Unsqueeze (decay_t, column)
                exponent = Mul (times, A)
                factor = Exp (exponent)
                left = Mul (factor, before)
                put = Unsqueeze (drive_t, column)
                where = Unsqueeze (B_t, row)
                added = Mul (put, where)
                after = Add (left, added)
                of = Unsqueeze (C_t, column)
                values = MatMul (after, of)
                y_t = Squeeze (values, column)
            }}> (start, decay_l, drive_l, B_l, C_l)
        scanned = Transpose <perm = [1, 0, 2]> (read)
        {skip}
    }}"""


def _conv(reverse: bool) -> str:
    """x (B, L, E), weight (E, K), bias (E,). `pads` says on which side of the token its neighbours are."""
    flip = """
        from = Constant <value_ints = [-1]> ()
        to = Constant <value_ints = [-9223372036854775807]> ()
        axis = Constant <value_ints = [1]> ()
        taps = Slice (weight, from, to, axis, from)"""
    return f"""CausalConv1d{"Reverse" * reverse} <channels, pads> (x, weight, bias) => (y) {{
        {flip if reverse else "taps = Identity (weight)"}
        one = Constant <value_ints = [1]> ()
        kernel = Unsqueeze (taps, one)
        across = Transpose <perm = [0, 2, 1]> (x)
        pre = Conv <group: int = @channels, pads: ints = @pads> (across, kernel, bias)
        {_SILU}
        y = Transpose <perm = [0, 2, 1]> (activated)
    }}"""


_SPARSE = f"""SparseConv1d (x, context, sources, weight, bias) => (y) {{
    rows = Concat <axis = 1> (x, context)
    first = Constant <value_ints = [0, 1, 0, 0, 0, 0]> ()
    padded = Pad (rows, first)
    one = Constant <value_int = 1> ()
    places = Add (sources, one)
    last = Constant <value_ints = [-1]> ()
    index = Unsqueeze (places, last)
    met = GatherND <batch_dims = 1> (padded, index)
    taps = Transpose <perm = [1, 0]> (weight)
    parts = Mul (met, taps)
    tap = Constant <value_ints = [2]> ()
    sum = ReduceSum <keepdims = 0> (parts, tap)
    pre = Add (sum, bias)
    {_SILU}
    y = Identity (activated)
}}"""  # row 0 of `padded` is 0, for the source -1; met, parts (B, L, K, E)


def _grid_conv(placed: bool) -> str:
    """x (B, L, E), weight (E, K, K), bias (E,), positions (B, L). Row 0 of `padded` is for places without a token."""
    inputs, dense, out = "x, weight, bias", "cells = Identity (x)", "y = Identity (whole)"
    if placed:
        inputs += ", positions"
        dense = """
            ahead = Constant <value_ints = [0, 1, 0, 0, 0, 0]> ()
            padded = Pad (x, ahead)
            count = ReduceProd <keepdims = 1> (grid)
            batch = Shape <start = 0, end = 1> (x)
            table = Concat <axis = 0> (batch, count)
            nobody = ConstantOfShape <value = int64[1] {0}> (table)
            held = Shape (positions)
            ones = ConstantOfShape <value = int64[1] {1}> (held)
            along = Constant <value_int = 1> ()
            numbers = CumSum (ones, along)
            who = ScatterElements <axis = 1> (nobody, positions, numbers)
            last = Constant <value_ints = [-1]> ()
            index = Unsqueeze (who, last)
            cells = GatherND <batch_dims = 1> (padded, index)"""
        out = """
            begin = Constant <value_ints = [0]> ()
            axis = Constant <value_ints = [1]> ()
            end = Constant <value_ints: ints = @outputs> ()
            wanted = Slice (positions, begin, end, axis)
            places = Unsqueeze (wanted, last)
            y = GatherND <batch_dims = 1> (whole, places)"""
    return f"""GridConv2d{"Placed" * placed} <channels, grid, outputs, pads> ({inputs}) => (y) {{
        grid = Constant <value_ints: ints = @grid> ()
        {dense}
        one = Constant <value_ints = [1]> ()
        kernel = Unsqueeze (weight, one)
        across = Transpose <perm = [0, 2, 1]> (cells)
        same = Constant <value_ints = [0, 0]> ()
        shape = Concat <axis = 0> (same, grid)
        image = Reshape (across, shape)
        pre = Conv <group: int = @channels, pads: ints = @pads> (image, kernel, bias)
        {_SILU}
        line = Constant <value_ints = [0, 0, -1]> ()
        flat = Reshape (activated, line)
        whole = Transpose <perm = [0, 2, 1]> (flat)
        {out}
    }}"""


def _norm(has_residual: bool) -> str:
    """hidden, residual (B, L, E), weight (E,)."""
    add = "stream = Add (hidden, residual)" if has_residual else "stream = Identity (hidden)"
    return f"""{"Add" * has_residual}RmsNorm <eps> (hidden, {"residual, " * has_residual}weight) => (normed, stream) {{
        {add}
        squares = Mul (stream, stream)
        last = Constant <value_ints = [-1]> ()
        mean = ReduceMean (squares, last)
        least = Constant <value_float: float = @eps> ()
        sum = Add (mean, least)
        root = Sqrt (sum)
        unit = Div (stream, root)
        normed = Mul (unit, weight)
    }}"""


def _gate(count: int) -> str:
    """`count` tensors y and z, (B, L, E) each."""
    names = [f"y{number}" for number in range(count)]
    return f"""GatedSum{count} <scale> ({", ".join(names)}, pre) => (y) {{
        total = Sum ({", ".join(names)})
        {_SILU}
        gated = Mul (total, activated)
        factor = Constant <value_float: float = @scale> ()
        y = Mul (gated, factor)
    }}"""


_LINEAR_INT8 = f"""LinearInt8 (x, values, scale) => (y) {{
    last = Constant <value_ints = [-1]> ()
    sizes = Abs (x)
    largest = ReduceMax <keepdims = 1> (sizes, last)
    most = Constant <value_float = {MOST}.0> ()
    raw = Div (largest, most)
    least = Constant <value_float = {torch.finfo(torch.float32).tiny}> ()
    small = Less (raw, least)
    nothing = Constant <value_float = 0.0> ()
    turned = Reciprocal (raw)
    factor = Where (small, nothing, turned)
    scaled = Mul (x, factor)
    rounded = Round (scaled)
    middle = Constant <value_float = {_MIDDLE}.0> ()
    raised = Add (rounded, middle)
    tokens = Cast <to = {_UINT8}> (raised)
    wide = Cast <to = {_FLOAT}> (values)
    above = Add (wide, middle)
    bytes = Cast <to = {_UINT8}> (above)
    weight = Transpose <perm = [1, 0]> (bytes)
    zero = Cast <to = {_UINT8}> (middle)
    sums = MatMulInteger (tokens, weight, zero, zero)
    whole = Cast <to = {_FLOAT}> (sums)
    outputs = Mul (whole, scale)
    step = Where (small, nothing, raw)
    total = ReduceSum <keepdims = 1> (sizes, last)
    finite = Sub (total, total)
    own = Add (step, finite)
    y = Mul (outputs, own)
}}"""
# x (..., K), values (P, K) int8, scale (P,); raw, step (..., 1). `finite` is 0, or NaN: a maximum may pass over that.
# The two scales are not made one: where they are, ONNX Runtime (1.32) makes a node of its own of the products and of a
# bias that follows, and scales the bias as well.


def functions(opset: int) -> dict[str, Any]:
    """By name the `FunctionProto` of every node of ours, of operators of this opset."""
    from onnx import parser

    texts = [_scan(*options) for options in product((True, False), ("", "Own", "Given"), (False, True))]
    texts += [_conv(False), _conv(True), _SPARSE, _grid_conv(False), _grid_conv(True), _norm(False), _norm(True)]
    texts.append(_LINEAR_INT8)
    texts += [_gate(count) for count in range(1, MOST_YS + 1)]
    head = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n'
    made = (parser.parse_function(head + text) for text in texts)
    return {each.name: each for each in made}
