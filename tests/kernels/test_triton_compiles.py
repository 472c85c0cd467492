"""The Triton kernels compile to machine code for GPUs, whose types the interpreter does not check. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmprune_cli.kernels.triton.backend import SEGMENT, interpreted
from ssmprune_cli.kernels.triton.conv_launch import BLOCK, BLOCK_E, BLOCK_L

triton = pytest.importorskip("triton")

# What the kernels always get as float32, and what has the dtype of the activations; all else is a number or a flag.
SINGLE = (
    "A D bias gap_delta starts ends totals carries saved recomputed dA dB dC dD dbias dgap_delta inner dweight weight"
    " residual stream d_stream d_sum d_weight initial last dinitial parameters both size mass kept_residual older"
    " dropped gaps"
)
TOKENS = (
    "u delta B C z shift gap y grad du ddelta dz dshift x dx context dcontext hidden normed d_normed y0 y1 y2 y3 out"
    " d_y d_z products score kept_hidden"
)
OTHERS = {"table": "*i32", "sources": "*i64", "first": "*i32", "following": "*i32", "live": "*i1", "reads": "*i64"}
OTHERS |= dict.fromkeys(["positions", "order", "older_positions", "kept_positions", "dropped_positions"], "*i64")
ONES = [
    "length",
    "channels",
    "state",
    "groups",
    "u_l",
    "B_l",
    "gap_l",
    "x_l",
    "context_l",
    "others",
    "entries",
]  # Triton makes constants of arguments of 1


def compile_for_gpu(
    kernel: Any, dtype: str, constants: dict[str, Any], capability: int, aligned: str = "", **options: int
) -> Any:
    """`aligned`: numbers that 16 divides, as Triton then knows of them and of every pointer."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(TOKENS.split(), f"*{dtype}") | dict.fromkeys(SINGLE.split(), "*fp32") | OTHERS
    if kernel.__name__.startswith("inner"):
        types["rows"] = "*i32"  # elsewhere a number
    types |= dict.fromkeys(used, "constexpr")
    types |= {"eps": "fp32", "scale": "fp32"}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    by_16 = [name for name, kind in signature.items() if aligned and (kind[0] == "*" or name in aligned.split())]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in used.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in by_16},
    )
    flags = {"num_warps": 1 if "MODE" in used or "ADJOINT" in used else 4, "enable_fp_fusion": True, **options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=flags)
    assert compiled.asm["cubin"]
    return compiled


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="Triton compiles nothing while it interprets")
@pytest.mark.parametrize(
    ("mode", "extras", "block_e", "block_n", "dtype", "ones"),
    [
        (1, True, 32, 16, "bf16", []),
        (2, True, 1, 1, "fp16", ONES),
        (3, False, 8, 64, "fp32", []),
        (0, False, 64, 8, "bf16", []),
    ],
)
def test_kernels_compile(
    mode: int,
    extras: bool,
    block_e: int,
    block_n: int,
    dtype: str,
    ones: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ssmprune_cli.kernels.triton.conv import conv_backward, conv_backward_input, conv_forward
    from ssmprune_cli.kernels.triton.scan import chain, group_ends, scan_forward
    from ssmprune_cli.kernels.triton.scan_backward import scan_backward
    from ssmprune_cli.kernels.triton.sparse_conv import (
        list_meetings,
        sparse_conv_backward,
        sparse_conv_backward_rows,
        sparse_conv_forward,
    )

    flags = (
        "SOFTPLUS",
        "HAS_D",
        "HAS_Z",
        "HAS_BIAS",
        "REVERSE",
        "HAS_STARTS",
        "HAS_CARRIES",
        "HAS_INITIAL",
        "HAS_LAST",
    )
    absent = {
        "dshift": mode != 1,
        "dgap_delta": mode != 3,
        **dict.fromkeys(("dz", "dD", "dbias", "starts", "carries", "initial", "dinitial", "last"), not extras),
    }
    scan: dict[str, Any] = {
        "MODE": mode,
        "SEGMENT": SEGMENT,
        "STAGES": 4,
        "BLOCK_E": block_e,
        "BLOCK_N": block_n,
    } | dict.fromkeys(flags, extras)
    scan |= dict.fromkeys(ones, 1) | {name: None for name, missing in absent.items() if missing}
    for kernel in (scan_forward, scan_backward, group_ends, chain):
        compile_for_gpu(kernel, dtype, scan | {"ADJOINT": mode != 2}, 80 if mode == 1 else 90)
    conv = {"WIDTH": 1 + mode, "REPEAT": 1 + mode, "REVERSE": extras, "BLOCK_L": 16, "BLOCK_E": 64} | dict.fromkeys(
        ones, 1
    )
    for kernel in (conv_forward, conv_backward, conv_backward_input):
        compile_for_gpu(kernel, dtype, conv, 90)
    sparse = conv | {"BLOCK_L": BLOCK_L, "BLOCK_E": BLOCK_E, "BLOCK": BLOCK}
    for kernel in (sparse_conv_forward, sparse_conv_backward, list_meetings, sparse_conv_backward_rows):
        compile_for_gpu(kernel, dtype, sparse, 90)


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="Triton compiles nothing while it interprets")
def test_row_kernels_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ssmprune_cli.kernels.triton.rows import gate_backward, gate_forward, norm_backward, norm_forward

    for kernel in (norm_forward, norm_backward, gate_forward, gate_backward):
        for dtype, count in (("bf16", 1), ("fp32", 4)):
            sizes = {"BLOCK_R": 8, "BLOCK_E": 256, "ROWS": 64, "COUNT": count, "HAS_RESIDUAL": count > 1}
            compile_for_gpu(kernel, dtype, sizes, 90)


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="Triton compiles nothing while it interprets")
@pytest.mark.parametrize(("dtype", "capability", "whole"), [("bf16", 90, True), ("fp32", 80, False)])
def test_prune_kernels_compile(
    dtype: str, capability: int, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ssmprune_cli.kernels.triton.prune import move_forward, order_forward, score_forward

    flags = dict.fromkeys(("HAS_LIVE", "OTHERS", "HAS_RESIDUAL", "HAS_DROPPED", "HAS_OLDER"), whole)
    protected = (0, 98) if whole else ()
    sizes = {"COUNT": 2, "BLOCK_R": 8, "BLOCK_E": 256, "BLOCK": 256, "PROTECTED": protected} | flags
    for kind in range(4):
        compile_for_gpu(score_forward, dtype, sizes | {"KIND": kind}, capability)
    compile_for_gpu(order_forward, dtype, sizes, capability)
    compile_for_gpu(move_forward, dtype, sizes, capability)


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="Triton compiles nothing while it interprets")
@pytest.mark.parametrize(("dtype", "capability", "dense"), [("bf16", 90, True), ("fp32", 80, False)])
def test_grid_kernels_compile(
    dtype: str, capability: int, dense: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ssmprune_cli.kernels.triton import grid_conv

    sizes = {"WIDTH": 3 if dense else 7, "DENSE": dense, "HAS_BIAS": dense, "BACKWARD": False}
    sizes |= {"BLOCK_L": grid_conv.BLOCK_L, "BLOCK_E": grid_conv.BLOCK_E}
    for kernel in (
        grid_conv.grid_conv_backward_input,
        grid_conv.grid_conv_backward_weight,
        grid_conv.grid_conv_forward,
    ):
        compile_for_gpu(kernel, dtype, sizes, capability)
    compile_for_gpu(grid_conv.grid_conv_forward, dtype, sizes | {"BACKWARD": True}, capability)


# Channels and strides of every published Vim.
BY_16 = "channels x_b x_l context_b context_l z_b z_l parameters_g products_g bias_at rates_at columns"


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="Triton compiles nothing while it interprets")
@pytest.mark.parametrize(
    ("dtype", "rank", "sparse", "mode", "capability"),
    [("bf16", 32, True, 3, 90), ("fp32", 16, False, 0, 80)],
)
def test_the_kernels_inside_a_block_keep_all_in_registers(
    dtype: str, rank: int, sparse: bool, mode: int, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They compile, and leave nothing or next to nothing in local memory, which is as slow as any other."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from ssmprune_cli.kernels.triton.inner_inputs import inner_inputs
    from ssmprune_cli.kernels.triton.inner_launch import STAGES, tile_of_inputs
    from ssmprune_cli.kernels.triton.inner_scan import inner_scan

    flags = tile_of_inputs({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    options = {name: flags.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    read = dict.fromkeys(("HAS_SOURCES", "HAS_READ", "HAS_SIZE"), sparse)
    inputs = flags | read | {"WIDTH": 4, "BLOCK_R": rank, "BLOCK_C": 32}
    compiled = [compile_for_gpu(inner_inputs, dtype, inputs, capability, BY_16, **options)]
    scan = read | {"MODE": mode, "GAP": True, "TWO": sparse, "STAGES": STAGES, "BLOCK_N": 16}
    scan["BLOCK_E"] = 64 if sparse else 32
    compiled.append(compile_for_gpu(inner_scan, dtype, scan, capability, BY_16))
    for each in compiled:
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(each.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (stack,) = map(int, re.findall(r"STACK:(\d+)", usage))
        assert stack <= 32, (each.metadata.name, usage)  # bytes of each thread: eight registers
