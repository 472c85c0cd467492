"""Sessions of PlainMamba and VMamba: when the scans of a block are one call, and that it changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import use_backend
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import compress

Used = Callable[[nn.Module, Tensor], tuple[Tensor, Counter[str]]]
Apart = Callable[[nn.Module, Tensor], Tensor]
Flops = Callable[[Callable[[], Any]], int]
AssertClose = Callable[[Tensor, Tensor], None]
MODELS: dict[str, Callable[[], Backbone]] = {
    "plainmamba": lambda: PlainMamba(
        PlainMambaConfig(image_size=(64, 48), patch_size=16, embed_dim=24, depth=4, num_classes=10, stem_convs=1)
    ),
    "vmamba": lambda: VMamba(VMambaConfig(image_size=(64, 48), embed_dim=16, depths=(1, 3), num_classes=10)),
    "vmamba v0": lambda: VMamba(
        VMambaConfig(
            image_size=(64, 48), embed_dim=16, depths=(1, 3), num_classes=10, d_state=5, gated=True, conv_bias=True
        )
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the authors' start is so near to zero that mistakes would not show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 3, 64, 48, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("reduction", "alignment"),
    [(None, "none"), ("drop", "none"), ("drop", "null"), ("drop", "neighbour"), ("context", "null"), ("mask", "none")],
)
def test_the_scans_of_a_block_are_one_op(
    name: str, reduction: str | None, alignment: str, used: Used, apart: Apart, assert_close: AssertClose
) -> None:
    model = make(name)
    if reduction is not None:
        compress(model, 0.6, points=[2, 3], reduction=reduction, alignment=alignment)
    found, ops = used(model, images())
    assert ops["routed_scans"] == 4 and not ops["selective_scan"]
    assert_close(found, apart(model, images()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("reduction", "alignment", "importance", "fused"),
    [
        ("frozen", "none", "clip", 2),
        ("pool", "none", "clip", 2),
        ("local-merge", "mass", "clip", 2),
        ("drop", "null", "delta", 3),
    ],
)
def test_what_the_op_cannot_do_is_done_otherwise(
    name: str,
    reduction: str,
    alignment: str,
    importance: str,
    fused: int,
    used: Used,
    apart: Apart,
    assert_close: AssertClose,
) -> None:
    """Frozen and pooled tokens, growing steps, a score that looks at step sizes: scan by scan."""
    model = make(name)
    compress(model, 0.6, points=[2], reduction=reduction, alignment=alignment, importance=importance)
    found, ops = used(model, images())
    assert ops["routed_scans"] == fused and ops["selective_scan"] == 4 * (4 - fused)
    assert_close(found, apart(model, images()))


@pytest.mark.parametrize("name", MODELS)
def test_replaced_and_hooked_layers_are_called(name: str, used: Used, apart: Apart, assert_close: AssertClose) -> None:
    model = make(name)
    mixer: Any = model.mixers[1]
    seen: list[Tensor] = []
    watched = mixer.dt_proj if name == "plainmamba" else mixer.projections
    watched.register_forward_hook(lambda module, given, output: seen.append(given[0]))
    found, ops = used(model, images())
    assert ops["routed_scans"] == 3 and len(seen) == 1
    assert_close(found, apart(model, images()))


@pytest.mark.parametrize("name", MODELS)
def test_other_backends_do_without(name: str, used: Used, assert_close: AssertClose) -> None:
    model = make(name)
    try:
        use_backend("chunked")
        found, ops = used(model, images())
    finally:
        use_backend("auto")
    assert not ops["routed_scans"] and ops["selective_scan"] == 16
    assert_close(found, used(model, images())[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", [None, "drop"])
def test_counters_find_the_same_multiply_adds_inside(
    name: str, reduction: str | None, flops: Flops, apart: Apart
) -> None:
    model = make(name)
    if reduction is not None:
        compress(model, 0.6, points=[2, 3], reduction=reduction, alignment="null")
    session = prepare(model)
    assert flops(lambda: session(images())) == flops(lambda: apart(model, images())) > 0


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_near_as_scan_by_scan(name: str) -> None:
    with torch.inference_mode():
        expected = make(name, torch.float64)(images(torch.float64))
        half = make(name, torch.bfloat16)
        op_by_op = half(images(torch.bfloat16))
    logits = prepare(half)(images(torch.bfloat16))
    errors = [float((each.double() - expected).norm() / expected.norm()) for each in (logits, op_by_op)]
    assert errors[0] <= 1.2 * errors[1] <= 1e-2  # measured: 5e-3 to 7e-3, by either way


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reduction"),
    [("plainmamba", "drop"), ("plainmamba", "local-merge"), ("vmamba", "context")],
)
def test_compiled(name: str, reduction: str, apart: Apart, assert_close: AssertClose) -> None:
    """Twice pruned: torch.compile had mixed up what the two prune points, or the four routes, have each for itself."""
    model = make(name)
    compress(model, 0.6, points=[2, 3], reduction=reduction, alignment="none")
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
    assert_close(compiled, apart(model, images()))
