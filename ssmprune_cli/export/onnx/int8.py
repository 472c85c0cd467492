"""8-bit integers in the large products of an ONNX file, by ONNX Runtime's own tools.

A product is large unless the scan's steps and places come out of it (delta, B, C): these stay in float, and so does
whatever is no product with a weight: scans, convolutions, norms. So does the head, which sees one token an image.

Weights have 7 bits, and a scale for each output: on processors without VNNI, sums of two products of 8 bits overflow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmprune_cli.export.graph import INPUT
from ssmprune_cli.export.onnx.nodes import DOMAIN
from ssmprune_cli.export.target import How

_STAYS = "_of_scan"  # the end of a product's name that stays in float
_STEPS = (1, 3, 4)  # inputs of a scan: delta, B and C


def mark(model: Any) -> None:
    """Name the products that scans get their steps and places from, as long as scans can be told."""
    made = {name: node for node in model.graph.node for name in node.output}
    for scan in model.graph.node:
        if scan.domain == DOMAIN and scan.op_type.startswith("SelectiveScan"):
            for place in _STEPS:
                for product in _products(scan.input[place], made):
                    if not product.name.endswith(_STAYS):
                        product.name += _STAYS


def _products(name: str, made: dict[str, Any]) -> Iterator[Any]:
    """The nearest products that the value of this name is computed from."""
    waiting, seen = [name], set()
    while waiting:
        node = made.get(waiting.pop())
        if node is None or node.output[0] in seen or node.op_type == "Shape":  # a size is no value
            continue
        seen.add(node.output[0])
        if node.op_type in ("MatMul", "Gemm"):
            yield node
        else:
            waiting += node.input


def large_products(model: Any) -> list[str]:
    """Names of the nodes that are computed in integers."""
    weights = {each.name for each in model.graph.initializer if len(each.dims) == 2}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights and not node.name.endswith(_STAYS)
    ]


def quantise(source: Path, path: Path, how: How, calibration: Iterable[Tensor]) -> int:
    """Write the file `source` to `path` with its large products in integers; how many these are. Of none, no file.

    static       scales of the activations are those of `calibration`, batches of images (B, 3, H, W)
    dynamic      they are those of each batch, found as it is computed
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    names = large_products(onnx.load(source))
    if not names:  # of no names, the tools make all
        return 0
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": names,
        "per_channel": True,
        "reduce_range": True,
        "weight_type": QuantType.QInt8,
    }
    if how == "dynamic":
        quantize_dynamic(source, path, **common)
    else:
        quantize_static(
            source,
            path,
            _reader(calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            # what comes out of a product is float: it goes into a norm, a gate or a scan
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
            **common,
        )
    made = onnx.load(path)
    del made.graph.value_info[:]  # the tools' shapes; a runtime finds its own
    onnx.save(made, path)
    return len(names)


def _reader(batches: Iterable[Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    return Reader()
