"""Backend `triton`: the kernels of the modules `triton_*` on GPUs, or under Triton's interpreter anywhere."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.kernels.backend import Backend, no_states
from ssmprune_cli.kernels.inputs import (
    Gradients,
    GridConvInputs,
    InnerInputs,
    Moved,
    MoveInputs,
    OrderInputs,
    ScanInputs,
)
from ssmprune_cli.kernels.triton.conv_launch import MAX_TAPS, Conv, SparseConv
from ssmprune_cli.kernels.triton.inner_launch import Tile, mamba_inner, refused, steps_of
from ssmprune_cli.kernels.triton.proof import PROOFS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_INNER = 64  # states: what a program keeps in registers
TILE = 512  # states that a program holds: 16 registers for each of the 32 threads of its only warp
MAX_BLOCK = 128  # channels of a program
SEGMENT = 16  # tokens between the states that a backward pass keeps
SHORTEST_GROUP = 128  # tokens; a multiple of SEGMENT
STAGES = 4  # tokens that are read ahead
PROGRAMS_PER_PROCESSOR = 8  # one-warp programs that keep a multiprocessor busy
TENSORS = "u delta A B C D z delta_bias shift gap gap_delta"  # in the order of the kernels' arguments


def interpreted() -> bool:
    """Whether Triton runs kernels in Python, on the CPU. It reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend(Backend):
    """Imports Triton when it first computes. Nothing waits for the GPU, so CUDA graphs can record it."""

    name = "triton"
    fuses = True  # where it pays: sessions on a GPU time it before they take it

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and not interpreted():
            return "there is no CUDA device"
        return None

    def accepts(self, example: Tensor, inner: int) -> bool:
        return example.dtype in DTYPES and (example.device.type == "cuda" or interpreted()) and inner <= MAX_INNER

    @property
    def automatic(self) -> bool:
        return not interpreted()

    def scan(self, inputs: ScanInputs) -> Tensor:
        return self._forward(inputs, None)

    def scan_with_states(self, inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        (batch, _, channels), state = inputs.u.shape, inputs.A.shape[1]
        last = torch.empty(batch, channels, state, dtype=torch.float32, device=inputs.u.device)
        return self._forward(inputs, last), last, no_states(inputs)

    def _forward(self, inputs: ScanInputs, last: Tensor | None) -> Tensor:
        """y; `last` is filled with the last state, if it is there."""
        from ssmprune_cli.kernels.triton.scan import scan_forward

        call = _Scan(inputs._replace(A=inputs.A.float()))  # for its layout
        y = torch.empty(inputs.u.shape, dtype=inputs.u.dtype, device=inputs.u.device)
        if y.numel() == 0:
            if last is not None:
                last.zero_() if inputs.initial_state is None else last.copy_(inputs.initial_state)
            return y
        with torch.cuda.device_of(y):
            starts = call.starts(inputs.B, None, inputs.initial_state)
            scan_forward[call.grid](
                *call.tensors(TENSORS),
                starts,
                y,
                last,
                *call.strides("u delta B C z shift gap"),
                *call.sizes,
                **call.flags("SOFTPLUS MODE HAS_D HAS_Z HAS_BIAS REVERSE"),
                HAS_STARTS=starts is not None,
                HAS_LAST=last is not None,
            )
        return y

    def scan_backward(
        self, grad: Tensor, inputs: ScanInputs, states: Tensor | None = None, d_last: Tensor | None = None
    ) -> Gradients:
        from ssmprune_cli.kernels.triton.scan_backward import scan_backward

        u, A = inputs.u, inputs.A
        (batch, length, channels), state = u.shape, A.shape[1]
        if u.numel() == 0:
            given = (u, inputs.delta, A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.delta_bias)
            zeros = (*given, inputs.shift, inputs.gap_delta)
            d_initial = None if inputs.initial_state is None else torch.zeros_like(inputs.initial_state)
            if d_initial is not None and d_last is not None:
                d_initial += d_last
            return *(None if tensor is None else torch.zeros_like(tensor) for tensor in zeros), d_initial
        # Here, where programs are few for their many registers, B and C must be copied ahead too.
        exact = inputs._replace(A=A.float(), B=inputs.B.float(), C=inputs.C.float())
        call = _Scan(exact)
        grad = grad.contiguous()

        def single(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=u.device)

        wide = [torch.empty(u.shape, dtype=u.dtype, device=u.device) for _ in range(2)]
        d_z, d_shift = (None if value is None else torch.empty_like(wide[0]) for value in (inputs.z, inputs.shift))
        d_initial = None if inputs.initial_state is None else single(batch, channels, state)
        blocks, _, groups = call.grid
        d_A = single(batch, groups, channels, state)
        d_B, d_C = (single(batch, blocks, length, state) for _ in range(2))
        d_D, d_bias, d_gap_delta = (
            None if value is None else single(batch, groups, channels)
            for value in (inputs.D, inputs.delta_bias, inputs.gap_delta)
        )
        with torch.cuda.device_of(u):
            starts, carries = call.starts(inputs.B, None, inputs.initial_state), call.starts(inputs.C, grad, d_last)
            saved = single(batch, -(-length // SEGMENT), channels, state)
            recomputed = single(batch, groups, SEGMENT, channels, state)
            scan_backward[call.grid](
                *call.tensors(TENSORS),
                grad,
                starts,
                carries,
                saved,
                recomputed,
                *wide,
                d_A,
                d_B,
                d_C,
                d_D,
                d_z,
                d_bias,
                d_shift,
                d_gap_delta,
                d_initial,
                *call.strides("u delta B C z shift gap"),
                *call.sizes,
                **call.flags("SOFTPLUS MODE HAS_D HAS_Z HAS_BIAS REVERSE"),
                HAS_STARTS=starts is not None,
                HAS_CARRIES=carries is not None,
                HAS_INITIAL=d_initial is not None,
                SEGMENT=SEGMENT,
            )

        def total(partial: Tensor | None, like: Tensor | None, dims: tuple[int, ...]) -> Tensor | None:
            return None if partial is None or like is None else partial.sum(dim=dims).to(like.dtype)

        return (
            wide[0],
            wide[1],
            total(d_A, A, (0, 1)),
            total(d_B, inputs.B, (1,)),
            total(d_C, inputs.C, (1,)),
            total(d_D, inputs.D, (0, 1)),
            d_z,
            total(d_bias, inputs.delta_bias, (0, 1)),
            d_shift,
            total(d_gap_delta, inputs.gap_delta, (0, 1)),
            d_initial,
        )

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        if weight.shape[1] > MAX_TAPS:
            return super().conv(x, weight, bias, reverse)
        return Conv(x, weight, bias, reverse).forward()

    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if weight.shape[1] > MAX_TAPS:
            return super().conv_backward(grad, x, weight, bias, reverse)
        return Conv(x, weight, bias, reverse).backward(grad)

    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from ssmprune_cli.kernels.triton import rows as triton_rows

        return triton_rows.add_rms_norm(hidden, residual, weight, eps)

    def add_rms_norm_backward(
        self, d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from ssmprune_cli.kernels.triton import rows as triton_rows

        return triton_rows.add_rms_norm_backward(d_normed, d_stream, stream, weight, eps)

    def gated_sum(self, ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
        from ssmprune_cli.kernels.triton import rows as triton_rows

        if len(ys) > triton_rows.MOST_YS:
            return super().gated_sum(ys, z, scale)
        return triton_rows.gated_sum(ys, z, scale)

    def gated_sum_backward(self, grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        from ssmprune_cli.kernels.triton import rows as triton_rows

        if len(ys) > triton_rows.MOST_YS:
            return super().gated_sum_backward(grad, ys, z, scale)
        return triton_rows.gated_sum_backward(grad, ys, z, scale)

    def grid_conv(self, inputs: GridConvInputs) -> Tensor:
        from ssmprune_cli.kernels.triton.grid_conv import GridConv

        return PROOFS.computed("grid_conv", inputs.x, GridConv(inputs).forward, partial(super().grid_conv, inputs))

    def grid_conv_backward(self, grad: Tensor, inputs: GridConvInputs) -> tuple[Tensor, ...]:
        from ssmprune_cli.kernels.triton.grid_conv import GridConv

        return GridConv(inputs).backward(grad)

    def score_tokens(self, ys: Sequence[Tensor], kind: str) -> Tensor:
        from ssmprune_cli.kernels.triton import prune
        from ssmprune_cli.kernels.triton.rows import MOST_YS

        if len(ys) > MOST_YS:
            return super().score_tokens(ys, kind)
        plain = partial(super().score_tokens, ys, kind)
        return PROOFS.computed("score_tokens", ys[0], partial(prune.score_tokens, ys, kind), plain)

    def order_tokens(self, inputs: OrderInputs) -> Tensor:
        from ssmprune_cli.kernels.triton import prune

        if inputs.score.shape[1] > prune.MOST_TOKENS:
            return super().order_tokens(inputs)
        plain = partial(super().order_tokens, inputs)
        return PROOFS.computed("order_tokens", inputs.score, partial(prune.order_tokens, inputs), plain)

    def move_tokens(self, inputs: MoveInputs) -> Moved:
        from ssmprune_cli.kernels.triton import prune

        if inputs.residual is not None and inputs.residual.dtype != torch.float32:
            return super().move_tokens(inputs)
        plain = partial(super().move_tokens, inputs)
        return PROOFS.computed("move_tokens", inputs.hidden, partial(prune.move_tokens, inputs), plain)

    def mamba_inner(self, inputs: InnerInputs) -> Tensor:
        if self.inner_composed(inputs) is not None:
            return super().mamba_inner(inputs)
        return mamba_inner(inputs, _inner_tile(inputs))

    def inner_composed(self, inputs: InnerInputs) -> str | None:
        # The fused scan has no groups of tokens, since a group would have to know its first state in both directions.
        groups = _groups(_inner_tile(inputs).programs(inputs), steps_of(inputs), inputs.xz.device)
        if groups > 1:
            return "the scans are split to fill the card"
        return refused(inputs, interpreted=interpreted())

    def sparse_conv(self, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return SparseConv(x, context, sources, weight, bias).forward()

    def sparse_conv_backward(
        self, grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return SparseConv(x, context, sources, weight, bias).backward(grad)


class _Scan:
    """The arguments that the scan's kernels share."""

    def __init__(self, inputs: ScanInputs) -> None:
        self._tensors = {name: _rows(getattr(inputs, name), name) for name in TENSORS.split()}
        (batch, length, channels), state = inputs.u.shape, inputs.A.shape[1]
        block_e, block_n = _tile(inputs.u, channels, state)
        blocks = -(-channels // block_e)
        groups = _groups(batch * blocks, length, inputs.u.device)
        group = -(-length // (groups * SEGMENT)) * SEGMENT
        self.grid = (blocks, batch, -(-length // group) if length else 1)
        self.sizes = (length, group, channels, state)
        self._flags: dict[str, Any] = {
            "SOFTPLUS": inputs.delta_softplus,
            "MODE": _mode(inputs),
            "HAS_D": inputs.D is not None,
            "HAS_Z": inputs.z is not None,
            "HAS_BIAS": inputs.delta_bias is not None,
            "REVERSE": inputs.reverse,
        }
        self._launch = {"BLOCK_E": block_e, "BLOCK_N": block_n, "num_warps": 1, "enable_fp_fusion": True}
        self._ahead = {"STAGES": STAGES}

    def tensors(self, names: str) -> list[Tensor]:
        # Kernels do not touch what is absent; `u` stands in, since pointers may be moved before that is known.
        return [self._tensors["u"] if self._tensors[name] is None else self._tensors[name] for name in names.split()]

    def strides(self, names: str) -> list[int]:
        """Of the batch and of the tokens."""
        return [stride for tensor in self.tensors(names) for stride in tensor.stride()[:2]]

    def flags(self, names: str) -> dict[str, Any]:
        return {name: self._flags[name] for name in names.split()} | self._ahead | self._launch

    def starts(self, vector: Tensor, grad: Tensor | None, initial: Tensor | None) -> Tensor | None:
        """(B, groups, E, N): the state before each group, or with `grad` and C the dL/dstate after it; None for zeros.

        initial  (B, E, N): the state before the first group, or dL/dstate after the last one
        """
        from ssmprune_cli.kernels.triton.scan import chain, group_ends

        blocks, batch, groups = self.grid
        if groups == 1:
            return None if initial is None else initial.contiguous()
        _, _, channels, state = self.sizes
        ends = torch.empty(batch, groups, channels, state, dtype=torch.float32, device=vector.device)
        totals = torch.empty(batch, groups, channels, dtype=torch.float32, device=vector.device)
        name = "B" if grad is None else "C"
        group_ends[self.grid](
            *self.tensors(f"u delta A {name} z delta_bias shift gap gap_delta"),
            grad,
            ends,
            totals,
            *self.strides(f"u delta {name} z shift gap"),
            *self.sizes,
            **self.flags("SOFTPLUS MODE HAS_Z HAS_BIAS REVERSE"),
            ADJOINT=grad is not None,
        )
        chain[(blocks, batch)](
            self.tensors("A")[0],
            None if initial is None else initial.contiguous(),
            ends,
            totals,
            groups,
            channels,
            state,
            HAS_INITIAL=initial is not None,
            ADJOINT=grad is not None,
            **self._launch,
        )
        return ends


def _rows(tensor: Any, name: str) -> Any:
    """`tensor` if a kernel can read it in place: slices of a projection, with a dense innermost dimension."""
    if tensor is None or (tensor.ndim == 3 and tensor.stride(2) == 1) or name == "gap":
        return tensor
    return tensor.contiguous()


def _mode(inputs: ScanInputs) -> int:
    """MODE of the kernels."""
    if inputs.shift is not None:
        return 1
    if inputs.gap is None:
        return 0
    return 2 if inputs.gap_delta is None else 3


def _tile(u: Tensor, channels: int, state: int) -> tuple[int, int]:
    """Channels and states of a program."""
    # Single 16-bit values cannot be copied ahead of their use: each thread has pairs of channels.
    tile, block_n = TILE if u.dtype == torch.float32 else 2 * TILE, _power_of_two(state)
    return min(tile // block_n, MAX_BLOCK, _power_of_two(channels)), block_n


def _inner_tile(inputs: InnerInputs) -> Tile:
    return Tile(*_tile(inputs.xz, inputs.channels, inputs.d_state))


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _groups(programs: int, length: int, device: torch.device) -> int:
    """Into how many parts to split the tokens of a scan that has `programs` programs for each part.

    What a split costs pays soonest where most of a GPU would stand idle.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // max(programs, 1))
    return max(1, min(wanted, length // (SEGMENT if programs <= processors else SHORTEST_GROUP)))


TRITON = TritonBackend()
