"""Models in eight bits as files: the bytes and scales are the model's, and so are the answers."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import CheckpointError, KernelError, UsageError
from ssmprune_cli.export import export, library, opened
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import CPU, EightBit, eight_bit_linear, in_eight_bits
from ssmprune_cli.kernels.cpu import build
from ssmprune_cli.models import Backbone, EightBitLinear, put_in_eight_bits
from ssmprune_cli.workflows.export import ExportRequest, run
from tests.export.small import make

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
K, P = 64, 96  # inputs and outputs of a layer
# Tokens, inputs and outputs of layers: tails of each, one of each, and several panels, parts and groups of tokens.
TAILS = [(1, 1, 1), (3, 4, 16), (5, 33, 1), (9, 64, 17), (17, 30, 130), (70, 192, 49), (135, 19, 64)]
needs_kernels = pytest.mark.skipif(CPU.missing() is not None, reason="the C kernels are not there")
# What a layer needs of the library of ops, with C for the instructions of AMX, and nothing for the other ops.
EMULATED_SOURCES = ("amx", "bytes", "byte_tiles", "onnxruntime", "onnxruntime_linear")
STAND_INS = "".join(
    f"void {name}(void) {{}}\n"
    for name in ("conv_rows", "gate_rows", "grid_conv_item", "scan_forward_group", "sparse_conv_rows")
)
HEADER = Path(__file__).parents[1] / "kernels" / "emulated_amx.h"


def make_int8(family: str, reduction: str | None = None, **sizes: Any) -> Backbone:
    """All kinds of layers in eight bits, with biases that are not 0: those of new models are."""
    model = make(family, reduction, **sizes).eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    put_in_eight_bits(model, model.layers_of(model.linear_kinds))
    return model


def layer(
    bias: bool,
    *,
    optimised: bool = True,
    kernels: Path | None = None,
    inputs: int = K,
    outputs: int = P,
    threads: int = 1,
) -> tuple[Any, EightBit, Tensor | None]:
    """A file of one layer, its weight and its bias as they are in a model's: constants that a runtime may fold."""
    from ssmprune_cli.export.onnx.bodies import functions

    torch.manual_seed(0)
    integers, scale = in_eight_bits(torch.randn(outputs, inputs))
    weight, add = EightBit(integers.to(torch.int8), scale[:, 0].contiguous()), torch.randn(outputs)
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("LinearInt8", ["x", "values", "scale"], ["product"], domain="ssmprune")]
    nodes.append(helper.make_node("Add", ["product", "bias"], ["y"]))
    held = {"values": weight.values, "scale": weight.scale, "bias": add}
    graph = helper.make_graph(
        nodes if bias else nodes[:1],
        "layer",
        [helper.make_tensor_value_info("x", float32, ["B", "L", inputs])],
        [helper.make_tensor_value_info("y" if bias else "product", float32, [None, None, outputs])],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in held.items() if bias or name != "bias"],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ssmprune", 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=[functions(18)["LinearInt8"]], ir_version=8)
    options, levels = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if kernels is not None:
        options.register_custom_ops_library(str(kernels))
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    content = model.SerializeToString()
    opened = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return opened, weight, add if bias else None


@pytest.mark.parametrize("optimised", [True, False], ids=["optimised", "as it is"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_layer_is_the_definition(bias: bool, optimised: bool) -> None:
    """The integers are the same, so what is left is the order of two scales: an ulp or two of the largest output."""
    runtime, weight, add = layer(bias, optimised=optimised)
    x = hard_tokens()
    (found,) = runtime.run(None, {"x": x.numpy()})
    expected = eight_bit_linear(x, weight, add)
    for one, other in zip(torch.from_numpy(found).flatten(0, 1), expected.flatten(0, 1), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=3e-7 * float(other.abs().max()))


def hard_tokens() -> Tensor:
    """(3, 7, K) of many sizes."""
    x = torch.randn(3, 7, K) * torch.logspace(-3, 3, 21).view(3, 7, 1)
    x[0, 0] = 0.0
    x[0, 1] *= 1e-41  # below the normal floats: a token of zeros
    x[0, 2] = torch.arange(K) + 0.5  # in steps of 1 every value lies between two integers
    x[0, 2, 0] = 127.0
    return x


def check_exact(kernels: Path) -> None:
    for bias in (False, True):
        runtime, weight, add = layer(bias, kernels=kernels)
        x = hard_tokens()
        (found,) = runtime.run(None, {"x": x.numpy()})
        assert torch.equal(torch.from_numpy(found), eight_bit_linear(x, weight, add))
        for tokens, inputs, outputs in TAILS:
            runtime, weight, add = layer(bias, kernels=kernels, inputs=inputs, outputs=outputs)
            x = torch.randn(1, tokens, inputs)
            (found,) = runtime.run(None, {"x": x.numpy()})
            assert torch.equal(torch.from_numpy(found), eight_bit_linear(x, weight, add)), (tokens, inputs, outputs)


@needs_kernels
def test_our_kernel_of_a_layer_is_exact() -> None:
    """It takes each step as the definition does. `test_onnx.py` runs it at all levels of the library."""
    check_exact(library())


@pytest.mark.skipif(sys.platform != "linux" or build.compiler() is None, reason="needs a C compiler on Linux")
def test_our_kernel_by_tiles_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "emulated.so"
    sources = [str(build.SOURCES / f"{name}.c") for name in EMULATED_SOURCES]
    flags = ("-O0", *build.FLAGS[1:], "-DW=16", f'-DEMULATED_AMX="{HEADER}"')
    command = [str(build.compiler()), *flags, *sources, "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=STAND_INS, text=True, check=True)
    code = ctypes.CDLL(str(path))  # before: it is closed with the last session, and its counts are gone
    check_exact(path)
    assert ctypes.c_char_p.in_dll(code, "emulated_fault").value is None
    assert ctypes.c_int64.in_dll(code, "emulated_products").value > 0
    assert ctypes.c_int64.in_dll(code, "emulated_open").value == 0  # each part has released its tiles


@needs_kernels
def test_threads_change_nothing() -> None:
    x = torch.randn(2, 150, K)
    one, two = (layer(True, kernels=library(), threads=threads)[0].run(None, {"x": x.numpy()})[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


@needs_kernels
def test_our_kernel_takes_tokens_of_any_shape_and_none_at_all() -> None:
    from tests.export.test_onnx import graph_of, session

    torch.manual_seed(0)
    weight = EightBit(torch.randint(-127, 128, (P, K)).to(torch.int8), torch.rand(P))
    for shape in ((K,), (5, K), (2, 3, 2, K), (2, 0, K)):
        x = torch.randn(shape)
        inputs = {"x": x, "values": weight.values, "scale": weight.scale}
        run = session(graph_of("LinearInt8", inputs, 1), kernels=True)
        given = {key: value.numpy() for key, value in inputs.items()}
        (found,) = run.run(None, given)
        assert torch.equal(torch.from_numpy(found), eight_bit_linear(x, weight))
    for name, value in (("x", given["x"][..., 1:]), ("scale", given["scale"][1:])):
        with pytest.raises(Exception, match="do not fit each other"):
            run.run(None, {**given, name: value})


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)], ids=["function", "kernel"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_spoils_itself_alone(bad: float, kernels: bool) -> None:
    runtime, weight, _ = layer(False, kernels=library() if kernels else None)
    x = torch.randn(1, 3, K)
    x[0, 1, 5] = bad
    (found,) = runtime.run(None, {"x": x.numpy()})
    assert np.isnan(found[0, 1]).all() and np.isfinite(found[0, [0, 2]]).all()
    assert eight_bit_linear(x, weight)[0, 1].isnan().all()


def test_what_does_not_fit_a_layer_is_refused() -> None:
    weight = EightBit(torch.zeros(P, K, dtype=torch.int8), torch.zeros(P))
    for x, given, bias, said in (
        (torch.zeros(2, K + 1), weight, None, "x has 65 channels, and the weight takes 64"),
        (torch.zeros(2, K), weight._replace(values=weight.values.float()), None, "values must be torch.int8"),
        (torch.zeros(2, K), weight._replace(scale=torch.zeros(K)), None, "scale has shape"),
        (torch.zeros(2, K), weight, torch.zeros(K), "bias has shape"),
    ):
        with pytest.raises(KernelError, match=said):
            eight_bit_linear(x, given, bias)


def test_autocast_does_not_reach_into_a_layer() -> None:
    """In bfloat16 sums of integers would be rounded to 8 bits."""
    torch.manual_seed(0)
    layer, x = EightBitLinear.of(torch.nn.Linear(K, P)), torch.randn(3, K)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(found, layer(x), rtol=0, atol=0)


def held(path: Path) -> list[NDArray[Any]]:
    return [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]


def check_held(path: Path, model: Backbone) -> None:
    """Every layer's bytes and scales are in the file, and no weight of it is there in float."""
    there = held(path)
    for each in model.modules():
        if isinstance(each, EightBitLinear):
            assert any(one.dtype == np.int8 and np.array_equal(one, each.values.numpy()) for one in there)
            assert any(one.dtype == np.float32 and np.array_equal(one, each.scale.numpy()) for one in there)
            in_float = each.weight.numpy()
            for one in there:
                assert one.dtype != np.float32 or not any(
                    one.shape == way.shape and np.allclose(one, way, rtol=1e-2) for way in (in_float, in_float.T)
                )


@pytest.fixture(scope="module")
def vim(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Path]:
    """Wide enough that its weights are most of the file."""
    model = make_int8("vim", "drop", embed_dim=64)
    return model, export(model, tmp_path_factory.mktemp("vim") / "model.onnx").path


def test_a_file_holds_the_bytes_and_answers_as_the_model(vim: tuple[Backbone, Path]) -> None:
    """To a ten-thousandth of the largest logit here, where two blocks leave little room for a value to be rounded the
    other way; `export` allows deep models 1e-1 where tokens are dropped."""
    model, path = vim
    check_held(path, model)
    session = opened(path)
    assert session.computes_in == "int8" and json.loads(session.said["eight_bits"]) == list(model.eight_bit_kinds)
    assert isinstance(session.definition, Backbone) and session.definition.eight_bit_kinds == model.eight_bit_kinds
    assert session.definition.parameter_count == model.parameter_count
    checked = json.loads(session.said["check"])
    assert checked["tolerance"] == 1e-1 and max(each["error"] for each in checked["runs"]) < 1e-4
    assert len({each["runtime"] for each in checked["runs"]}) == (2 if CPU.missing() is None else 1)
    wide = sum(each.nbytes for each in held(path))
    whole = sum(each.numel() * 4 for each in model.state_dict().values())
    assert wide < 0.45 * whole, "the patch embedding, step sizes and norms are in float"


def test_a_bias_is_added_to_a_layer_in_eight_bits(tmp_path: Path) -> None:
    """PlainMamba's layers have them. All in standard operators, which a runtime may make one node of."""
    model = make_int8("plainmamba", depth=1)
    assert sum(isinstance(each, EightBitLinear) and each.bias is not None for each in model.modules())
    made = export(model, tmp_path / "plain.onnx", "onnx-plain", batch=2)
    assert made.error < 1e-4 and not onnx.load(made.path).functions
    check_held(made.path, model)


@needs_kernels
def test_files_with_our_kernels_answer_as_our_sessions(vim: tuple[Backbone, Path], tmp_path: Path) -> None:
    """Without biases and with them. Between the layers, in float, sums are in another order, no more."""
    plain = make_int8("plainmamba", depth=1)
    for model, path in (vim, (plain, export(plain, tmp_path / "model.onnx").path)):
        file = opened(path)
        assert any("with our kernels" in note for note in file.notes())
        images = torch.randn(3, *model.input_shape)
        expected = prepare(model)(images)
        torch.testing.assert_close(file(images), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_torch_reads_a_pt2_file(tmp_path: Path) -> None:
    model = make_int8("vim", depth=1)
    path = export(model, tmp_path / "model.pt2", "pt2", batch=2).path
    program = torch.export.load(path)
    bytes_of = [value for name, value in program.state_dict.items() if name.endswith(".values")]
    assert len(bytes_of) == 4 and all(value.dtype == torch.int8 for value in bytes_of)
    images = torch.randn(2, *model.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fact", "said"),
    [
        ("{", "what it says of its model is damaged"),
        ('"in_proj"', "does not say which of its layers are in eight bits"),
        ("[3]", "does not say which of its layers are in eight bits"),
        ('["conv"]', "there are no linear layers 'conv' in the blocks"),
    ],
)
def test_layers_that_the_model_has_not_are_refused(
    fact: str, said: str, vim: tuple[Backbone, Path], tmp_path: Path
) -> None:
    model = onnx.load(vim[1])
    facts = {each.key: each.value for each in model.metadata_props} | {"eight_bits": fact}
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(CheckpointError, match=said):
        opened(tmp_path / "changed.onnx")


def test_integers_of_the_runtime_do_not_come_on_top(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", make_int8("vim"))
    request = ExportRequest(tmp_path / "model", tmp_path / "file.onnx", int8="dynamic")
    with pytest.raises(UsageError, match="are in eight bits already, and so they are in the file"):
        run(request)
    assert not (tmp_path / "file.onnx").exists()
