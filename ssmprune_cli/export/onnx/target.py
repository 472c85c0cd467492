"""The ONNX files: written, and opened in ONNX Runtime.

`onnx`: each of our ops is a node of our domain with a function of standard operators: any runtime with functions
computes it, and one with our kernels runs these. `onnx-plain`: the functions are put in the place of the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ssmprune_cli.export.graph import INPUT, too_old
from ssmprune_cli.export.onnx.bodies import functions
from ssmprune_cli.export.onnx.int8 import mark, quantise
from ssmprune_cli.export.onnx.lowered import LOWERED
from ssmprune_cli.export.onnx.nodes import DOMAIN, NODES, VERSION
from ssmprune_cli.export.onnx.session import answers, library, runtime
from ssmprune_cli.export.target import ExportTarget, Run, Wanted
from ssmprune_cli.kernels import CPU

OPSETS = (18, 23)
DTYPES = (torch.float32,)
_OPSET = 18  # the least: more runtimes read it


def _missing() -> str | None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(name) is None:
            return f"the package {name} is missing: pip install 'ssmprune[onnx]'"
    return too_old()


def _write(graph: ExportedProgram, path: Path, wanted: Wanted, *, inlined: bool) -> None:
    import onnx
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    opset = wanted.opset or _OPSET
    lowered = graph.run_decompositions({**LOWERED, **NODES})
    program = torch.onnx.export(
        lowered,
        input_names=[INPUT],
        output_names=list(wanted.outputs),
        opset_version=opset,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    # The exporter says each size anew wherever it is used. Its optimizer tries every rule on every node: the fewer, the
    # sooner it is done.
    CommonSubexpressionEliminationPass()(program.model)
    program.optimize()
    model = program.model_proto
    _tidy(model, opset)
    if inlined:
        from onnx import inliner

        model = inliner.inline_local_functions(model)
        others = [each for each in model.opset_import if each.domain != DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(others)
    for name, text in wanted.facts.items():
        model.metadata_props.add(key=name, value=text)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _tidy(model: Any, opset: int) -> None:
    """Give `model` the functions of its nodes, one version of our domain, and names without the exporter's traces."""
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    model.functions.extend(each for name, each in functions(opset).items() if name in used)
    for each in model.opset_import:
        if each.domain == DOMAIN:
            each.version = VERSION
    for function in model.functions:
        for each in function.opset_import:
            if each.domain == DOMAIN:
                each.version = VERSION
    mark(model)
    del model.graph.value_info[:]  # runtimes find the shapes themselves, and those of the scans' states better
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    model.producer_name = DOMAIN


def _open_plain(path: Path) -> Mapping[str, Run]:
    return {"onnxruntime": partial(answers, runtime(path))}


def _open(path: Path) -> Mapping[str, Run]:
    runs = dict(_open_plain(path))
    if CPU.missing() is None:
        runs["onnxruntime with our kernels"] = partial(answers, runtime(path, library()))
    return runs


def _record(path: Path, name: str, text: str) -> None:
    import onnx

    model = onnx.load(path)
    facts = {each.key: each.value for each in model.metadata_props} | {name: text}
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)


ONNX = ExportTarget(".onnx", _missing, partial(_write, inlined=False), _open, _record, OPSETS, DTYPES, quantise)
ONNX_PLAIN = ExportTarget(
    ".onnx", _missing, partial(_write, inlined=True), _open_plain, _record, OPSETS, DTYPES, quantise
)
