"""ONNX files: with our kernels, without them, inlined, and what they say of themselves."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmprune_cli.export import Exported, export, library
from ssmprune_cli.kernels import (
    CPU,
    EightBit,
    add_rms_norm,
    causal_conv1d,
    eight_bit_linear,
    gated_sum,
    grid_conv2d,
    selective_scan,
    sparse_conv1d,
)
from ssmprune_cli.kernels.cpu import build
from ssmprune_cli.models import Backbone
from tests.export.small import make, make_upernet

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

needs_kernels = pytest.mark.skipif(CPU.missing() is not None, reason="the C kernels are not there")


def session(model: Path | bytes, *, kernels: bool = False, threads: int = 1) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if kernels:
        options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


# --- nodes


def graph_of(name: str, inputs: dict[str, Tensor], count: int, **attributes: Any) -> bytes:
    """A model of one node of ours."""
    from ssmprune_cli.export.onnx.bodies import functions

    proto = onnx.TensorProto
    kinds = {torch.float32: proto.FLOAT, torch.int64: proto.INT64, torch.int8: proto.INT8}
    given = [
        onnx.helper.make_tensor_value_info(key, kinds[value.dtype], [None] * value.ndim)
        for key, value in inputs.items()
    ]
    results = [f"out{number}" for number in range(count)]
    node = onnx.helper.make_node(name, list(inputs), results, domain="ssmprune")
    node.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in attributes.items())
    made = [onnx.helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, [None] * 3) for each in results]
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("ssmprune", 1)]
    graph = onnx.helper.make_graph([node], "one", given, made)
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[functions(18)[name]], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


B, L, E, N, K = 3, 7, 21, 5, 4


def scan_inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "u": torch.randn(B, L, E),
        "delta": torch.randn(B, L, E),
        "A": -torch.rand(E, N) * 4,
        "B": torch.randn(B, L, N),
        "C": torch.randn(B, L, N),
        "bias": torch.randn(E),
        "D": torch.randn(E),
        "gap": torch.randint(0, 4, (B, L)).float(),
        "gap_delta": torch.rand(E),
    }


def scan_case(skip: bool, gap: str, reverse: bool) -> tuple[str, dict[str, Tensor], list[Tensor], dict[str, Any]]:
    from ssmprune_cli.export.onnx.nodes import scan_name

    given = scan_inputs()
    for name, wanted in (("D", skip), ("gap", bool(gap)), ("gap_delta", gap == "Given")):
        if not wanted:
            del given[name]
    named: dict[str, Any] = {"delta_bias" if name == "bias" else name: value for name, value in given.items()}
    return scan_name(has_D=skip, gap=gap, reverse=reverse), given, [selective_scan(**named, reverse=reverse)], {}


def other_cases() -> dict[str, tuple[str, dict[str, Tensor], list[Tensor], dict[str, Any]]]:
    torch.manual_seed(2)
    x, weight, bias = torch.randn(B, L, E), torch.randn(E, K), torch.randn(E)
    context, sources = torch.randn(B, 3, E), torch.randint(-1, L + 3, (B, L, K))
    square, positions = torch.randn(E, 3, 3), torch.stack([torch.randperm(12)[:L] for _ in range(B)])
    whole = torch.randn(B, 12, E)
    cases: dict[str, tuple[str, dict[str, Tensor], list[Tensor], dict[str, Any]]] = {}
    for reverse in (False, True):
        cases[f"conv {reverse}"] = (
            "CausalConv1dReverse" if reverse else "CausalConv1d",
            {"x": x, "weight": weight, "bias": bias},
            [causal_conv1d(x, weight, bias, reverse=reverse)],
            {"channels": E, "pads": [0, K - 1] if reverse else [K - 1, 0]},
        )
    cases["sparse"] = (
        "SparseConv1d",
        {"x": x, "context": context, "sources": sources, "weight": weight, "bias": bias},
        [sparse_conv1d(x, context, sources, weight, bias)],
        {},
    )
    grid = {"channels": E, "grid": [3, 4], "pads": [1] * 4}
    cases["grid"] = (
        "GridConv2d",
        {"x": whole, "weight": square, "bias": bias},
        [grid_conv2d(whole, square, bias, (3, 4))],
        {**grid, "outputs": [12]},
    )
    cases["placed"] = (
        "GridConv2dPlaced",
        {"x": x, "weight": square, "bias": bias, "positions": positions},
        [grid_conv2d(x, square, bias, (3, 4), positions, 5)],
        {**grid, "outputs": [5]},
    )
    normed, stream = add_rms_norm(x, None, bias, 1e-5)
    cases["norm"] = ("RmsNorm", {"x": x, "weight": bias}, [normed, stream], {"eps": 1e-5})
    normed, stream = add_rms_norm(x, x.flip(1), bias, 1e-5)
    both = {"x": x, "residual": x.flip(1).clone(), "weight": bias}
    cases["add norm"] = ("AddRmsNorm", both, [normed, stream], {"eps": 1e-5})
    terms = [torch.randn(B, L, E) for _ in range(4)]
    for count in (1, 4):
        inputs = {**{f"y{number}": term for number, term in enumerate(terms[:count])}, "z": x}
        cases[f"sum {count}"] = (f"GatedSum{count}", inputs, [gated_sum(terms[:count], x, 0.5)], {"scale": 0.5})
    rounded = EightBit(torch.randint(-127, 128, (70, E)).to(torch.int8), torch.rand(70) / 127)
    inputs = {"x": x, "values": rounded.values, "scale": rounded.scale}
    cases["eight bits"] = ("LinearInt8", inputs, [eight_bit_linear(x, rounded)], {})
    return cases


def all_cases() -> dict[str, tuple[str, dict[str, Tensor], list[Tensor], dict[str, Any]]]:
    scans = [(skip, gap, way) for skip in (True, False) for gap in ("", "Own", "Given") for way in (False, True)]
    return {**{f"scan {each}": scan_case(*each) for each in scans}, **other_cases()}


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)], ids=["function", "kernel"])
def test_every_node_computes_its_op(kernels: bool) -> None:
    """As its function does, and as our kernel: 1e-5, since both add up in an order of their own."""
    for title, (name, inputs, wanted, attributes) in all_cases().items():
        run = session(graph_of(name, inputs, len(wanted), **attributes), kernels=kernels)
        found = run.run(None, {key: value.numpy() for key, value in inputs.items()})
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=1e-5, err_msg=title)


@pytest.mark.parametrize("level", build.levels()[1:] if build.compiler() is not None else ())
def test_every_node_computes_its_op_at_every_level(level: str) -> None:
    """In a process of its own: a library registers its ops once."""
    test = f"{__file__}::test_every_node_computes_its_op[kernel]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env={**os.environ, "SSMPRUNE_CPU_LEVEL": level},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


@needs_kernels
def test_a_kernel_refuses_what_does_not_fit() -> None:
    name, inputs, _, _ = scan_case(True, "", False)
    run = session(graph_of(name, inputs, 1), kernels=True)
    values = {key: value.numpy() for key, value in inputs.items()}
    with pytest.raises(Exception, match="do not fit each other"):
        run.run(None, {**values, "delta": values["delta"][:, 1:]})
    name, inputs, _, attributes = other_cases()["placed"]
    run = session(graph_of(name, inputs, 1, **attributes), kernels=True)
    values = {key: value.numpy() for key, value in inputs.items()}
    with pytest.raises(Exception, match="lies outside"):
        run.run(None, {**values, "positions": values["positions"] + 9})


@needs_kernels
def test_an_older_runtime_is_refused_by_name() -> None:
    """One that knows version 1 only, of whose table the first function is all that is needed: it makes a status."""
    said: list[str] = []

    def create_status(_: int, message: bytes) -> int:
        said.append(message.decode())
        return 1

    pointer = ctypes.c_void_p
    status = ctypes.CFUNCTYPE(pointer, ctypes.c_int, ctypes.c_char_p)(create_status)
    table = (pointer * 1)(ctypes.cast(status, pointer))
    api = ctypes.CFUNCTYPE(pointer, ctypes.c_uint32)(lambda version: ctypes.addressof(table) if version == 1 else None)
    base = (pointer * 2)(ctypes.cast(api, pointer), None)
    register = ctypes.CDLL(str(library())).RegisterCustomOps
    register.restype = pointer
    assert register(None, ctypes.byref(base)) == 1
    assert said == ["the kernels of ssmprune need ONNX Runtime 1.17 or later"]


# --- files


def test_a_pruned_vim_in_every_runtime(vim_onnx: tuple[Backbone, Exported]) -> None:
    model, made = vim_onnx
    names = ["onnxruntime", "onnxruntime with our kernels"][: 1 if CPU.missing() else 2]
    assert [(check.runtime, check.batch) for check in made.checks] == [
        (name, size) for name in names for size in (1, 3)
    ]
    assert made.error <= 1e-5 and all(check.same == 1 for check in made.checks)
    images = torch.randn(5, 3, 40, 40)
    with torch.no_grad():
        wanted = model(images).numpy()
    (found,) = session(made.path).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@needs_kernels
def test_threads_change_nothing(vim_onnx: tuple[Backbone, Exported]) -> None:
    images = torch.randn(2, 3, 40, 40).numpy()
    one, two = (
        session(vim_onnx[1].path, kernels=True, threads=threads).run(None, {"images": images})[0] for threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


def test_nodes_are_ours_and_functions_theirs(vim_onnx: tuple[Backbone, Exported]) -> None:
    file = onnx.load(vim_onnx[1].path)
    used = {node.op_type for node in file.graph.node if node.domain == "ssmprune"}
    assert used == {each.name for each in file.functions} >= {"SparseConv1d", "GatedSum2", "AddRmsNorm"}
    assert {"SelectiveScanGapGiven", "SelectiveScanGapGivenReverse"} <= used


def test_a_file_says_what_is_in_it(vim_onnx: tuple[Backbone, Exported]) -> None:
    made = vim_onnx[1]
    facts = session(made.path).get_modelmeta().custom_metadata_map
    assert facts["family"] == "vim" and facts["task"] == "classification"
    assert json.loads(facts["configuration"])["embed_dim"] == 16
    assert json.loads(facts["preprocessing"])["crop"] == 40
    assert json.loads(facts["schedule"])["points"] == [1]
    assert json.loads(facts["method"])["reduction"] == "context"
    check = json.loads(facts["check"])
    assert check["images"] == "random" and len(check["runs"]) == len(made.checks)


@pytest.mark.slow
def test_a_grid_without_downsampling(tmp_path: Path) -> None:
    """Dense, and with all four directions; the segmenter below is a pruned VMamba."""
    made = export(make("plainmamba", depth=1), tmp_path / "model.onnx")
    assert made.error <= 1e-5


@pytest.mark.slow
def test_a_segmenter(tmp_path: Path) -> None:
    made = export(make_upernet().eval(), tmp_path / "model.onnx")
    assert made.error <= 1e-4 and all((check.same or 0) >= 0.999 for check in made.checks)


def test_a_plain_file_has_standard_operators_only(tmp_path: Path) -> None:
    """Of a pruned model: aligned scans, gathered tokens and a sparse convolution. OpenVINO reads it too."""
    model = make("vim", "context").eval()
    made = export(model, tmp_path / "model.onnx", target="onnx-plain", batch=2)
    file = onnx.load(made.path)
    assert not file.functions and {each.domain for each in file.opset_import} == {""}
    assert [check.runtime for check in made.checks] == ["onnxruntime"]
    openvino = pytest.importorskip("openvino")
    images = torch.randn(2, 3, 16, 16)
    found = openvino.Core().compile_model(str(made.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(next(iter(found.values())), model(images).numpy(), rtol=0, atol=1e-5)


def test_the_library_needs_neither_torch_nor_this_package(vim_onnx: tuple[Backbone, Exported]) -> None:
    if CPU.missing() is not None:
        pytest.skip("the C kernels are not there")
    code = """
import sys
sys.modules["torch"] = sys.modules["ssmprune_cli"] = None
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options)
print(session.run(None, {"images": numpy.zeros((1, 3, 40, 40), "float32")})[0].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(vim_onnx[1].path), str(library())], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(1, 5)"
