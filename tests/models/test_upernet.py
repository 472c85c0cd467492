"""UperNet's head by hand, and what any segmenter does: images of any size, places of its parameters, settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES, DenseModel, set_recompute
from ssmprune_cli.models.dense.upernet import PlainMambaUperNetConfig, VMambaUperNetConfig
from ssmprune_cli.models.heads import UperNet, UperNetConfig, configure_upernet
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.measure import count_flops, time_by_part

HEAD = UperNetConfig(in_channels=(4, 6, 8), channels=5, num_classes=3, pool_scales=(1, 2))
ENCODERS: dict[str, Any] = {
    "vmamba-upernet": VMambaConfig((32, 32), embed_dim=8, depths=(1, 2, 1), num_classes=0, out_stages=(0, 1, 2)),
    "plainmamba-upernet": PlainMambaConfig(
        (32, 32),
        patch_size=8,
        embed_dim=16,
        depth=3,
        d_state=4,
        out_indices=(0, 1, -1),
        num_classes=0,
        positions=(3, 3),
    ),
}


def config_of(name: str, **changes: Any) -> VMambaUperNetConfig | PlainMambaUperNetConfig:
    encoder = ENCODERS[name]
    head = UperNetConfig(in_channels=encoder.map_channels, channels=6, num_classes=4)
    values = {"encoder": encoder, "head": head, "preprocessing": KeepRatio(128, 32), **changes}
    return FAMILIES.get(name).config_class(**values)  # type: ignore[no-any-return]


def build(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> DenseModel:
    torch.manual_seed(0)
    model = FAMILIES.get(name).build(config_of(name, **changes)).to(dtype).eval()
    assert isinstance(model, DenseModel)
    for each in model.modules():  # as after training: a norm that does something
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            each.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


# --- the head


def bilinear(size: int, wanted: int) -> Tensor:
    """(wanted, size): the matrix of a bilinear resizing along one axis, whose corners are not aligned."""
    matrix = torch.zeros(wanted, size, dtype=torch.float64)
    for row in range(wanted):
        place = min(max((row + 0.5) * size / wanted - 0.5, 0.0), size - 1.0)
        low = min(int(place), size - 2) if size > 1 else 0
        matrix[row, low] += 1 - (place - low)
        if size > 1:
            matrix[row, low + 1] += place - low
    return matrix


def resized(x: Tensor, rows: int, columns: int) -> Tensor:
    return torch.einsum("ih,jw,bchw->bcij", bilinear(x.shape[2], rows), bilinear(x.shape[3], columns), x)


def pooled(x: Tensor, count: int) -> Tensor:
    """Means of `count` x `count` windows, whose first row is rounded down and last one up."""

    def edges(size: int) -> list[slice]:
        return [slice(n * size // count, -(-(n + 1) * size // count)) for n in range(count)]

    rows = [torch.stack([x[:, :, a, b].mean(dim=(2, 3)) for b in edges(x.shape[3])], -1) for a in edges(x.shape[2])]
    return torch.stack(rows, 2)


def block(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Convolution, batch norm and ReLU of the layer `name`."""
    weight = state[f"{name}.conv.weight"]
    values = functional.conv2d(x, weight, padding=weight.shape[2] // 2)
    scale = state[f"{name}.bn.weight"] / (state[f"{name}.bn.running_var"] + 1e-5).sqrt()
    shift = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
    return (values * scale[:, None, None] + shift[:, None, None]).clamp(min=0)


def by_hand(maps: list[Tensor], state: dict[str, Tensor]) -> Tensor:
    """The head of three levels with pools of 1 and 2, written anew from the paper and the authors' order of layers."""
    first, second, third = maps
    size = tuple(third.shape[2:])
    parts = [resized(block(pooled(third, n), state, f"psp_modules.{i}.1"), *size) for i, n in enumerate((1, 2))]
    top = block(torch.cat([third, *parts], 1), state, "bottleneck")
    middle = block(second, state, "lateral_convs.1") + resized(top, *second.shape[2:])
    finest = block(first, state, "lateral_convs.0") + resized(middle, *first.shape[2:])
    levels = [block(finest, state, "fpn_convs.0"), block(middle, state, "fpn_convs.1"), top]
    joined = torch.cat([resized(each, *first.shape[2:]) for each in levels], 1)
    features = block(joined, state, "fpn_bottleneck")
    return functional.conv2d(features, state["conv_seg.weight"], state["conv_seg.bias"])


def test_the_head_by_hand() -> None:
    torch.manual_seed(1)
    head = UperNet(HEAD).double().eval()
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert value is not None
                value.uniform_(0.5, 1.5)
    maps = [torch.randn(2, 4, 7, 9, dtype=torch.float64), torch.randn(2, 6, 4, 5, dtype=torch.float64)]
    maps.append(torch.randn(2, 8, 2, 3, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(head(maps), by_hand(maps, head.state_dict()), rtol=0, atol=1e-12)


def test_only_training_drops_channels() -> None:
    torch.manual_seed(1)
    head = UperNet(replace(HEAD, dropout=0.5)).eval()
    maps = [torch.randn(2, channels, 8, 8) for channels in HEAD.in_channels]
    with torch.no_grad():
        assert torch.equal(head(maps), head(maps))
        head.train()
        assert not torch.equal(head(maps), head(maps))


def test_a_head_is_told_from_its_shapes() -> None:
    shapes = {key: tuple(value.shape) for key, value in UperNet(HEAD).state_dict().items()}
    assert configure_upernet(shapes, (1, 2), 0.1) == HEAD
    with pytest.raises(CheckpointError, match="pools its features to 2 sizes, and published are 1, 2, 3, 6"):
        configure_upernet(shapes, None, 0.1)
    with pytest.raises(CheckpointError, match=r"the weight conv_seg\.weight is missing"):
        configure_upernet({key: shape for key, shape in shapes.items() if "conv_seg" not in key}, (1, 2), 0.1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"channels": 0}, "channels and num_classes"),
        ({"in_channels": ()}, "in_channels must be"),
        ({"pool_scales": (1, 0)}, "pool_scales must be"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_settings_of_a_head_that_do_not_fit(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        replace(HEAD, **changes)


# --- segmenters


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("size", [(32, 32), (32, 48), (40, 24), (33, 51), (8, 8)])
def test_images_of_any_size(name: str, size: tuple[int, int]) -> None:
    """Logits have the images' size, and an image's do not depend on the one beside it."""
    model, images = build(name), torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 4, *size)
        torch.testing.assert_close(model(images[1:]), logits[1:], rtol=0, atol=1e-12)
        grids = [tuple(each.shape[2:]) for each in model.encoder.feature_maps(images)]
    if name == "plainmamba-upernet":
        assert grids == [(math.ceil(size[0] / 8), math.ceil(size[1] / 8))] * 3
    else:
        first = tuple(math.ceil(math.ceil(side / 2) / 2) for side in size)
        assert grids[0] == first and grids[1] == tuple(math.ceil(side / 2) for side in first)


def test_maps_are_the_encoders_own() -> None:
    """Those of a classifier with the same weights, whose stored positions are those of its grid."""
    encoder = PlainMamba(replace(ENCODERS["plainmamba-upernet"], positions=None)).double().eval()
    classifier = PlainMamba(replace(encoder.config, num_classes=5)).double().eval()
    missing = classifier.load_state_dict(encoder.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"head.fc.weight", "head.fc.bias"}
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        for own, other in zip(encoder.feature_maps(images), classifier.feature_maps(images), strict=True):
            assert torch.equal(own, other)
        with pytest.raises(DataError, match=r"takes images of shape \(3, 32, 32\), not \(3, 32, 40\)"):
            classifier(torch.zeros(1, 3, 32, 40, dtype=torch.float64))
    with pytest.raises(UsageError, match="no classifier"):
        _ = encoder.output_layer


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)])
def test_what_is_no_batch_of_images(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="takes images"):
        build(name)(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_has_a_depth_and_is_decayed_or_not(name: str) -> None:
    model = build(name)
    depths, blocks = model.depths(), len(model.blocks)
    assert {depth for key, depth in depths.items() if key.startswith("head.")} == {blocks + 1}
    maps = [depth for key, depth in depths.items() if "outnorm" in key or "norm_layer" in key]
    assert maps == ([1, 1, 3, 3, 4, 4] if name == "vmamba-upernet" else [1, 1, 2, 2])
    decayed = {key for key, parameter in model.named_parameters() if model.is_decayed(key, parameter)}
    assert {"head.conv_seg.weight", "head.bottleneck.conv.weight"} <= decayed
    assert not decayed & {"head.conv_seg.bias", "head.bottleneck.bn.weight"}
    assert not any(key.endswith(("pos_embed", "A_log", "A_logs")) for key in decayed)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_parameter_learns(name: str) -> None:
    model = build(name).train()
    set_recompute(model.blocks, True)
    model(torch.randn(2, 3, 40, 24, dtype=torch.float64)).square().mean().backward()
    still = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert still == [] and not model.places.idle


def test_an_encoder_whose_maps_do_not_fit_the_head() -> None:
    with pytest.raises(UsageError, match=r"of \(8, 16\) channels, and the encoder makes them of \(8, 16, 32\)"):
        config_of("vmamba-upernet", head=UperNetConfig(in_channels=(8, 16)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"class_names": ("sky", "road")}, "2 names of classes for 4 classes"),
        ({"preprocessing": KeepRatio(100, 200)}, "cannot be resized to 100 x 200"),
        ({"preprocessing": KeepRatio(200, 100, divisor=0)}, "cannot be resized"),
        ({"preprocessing": KeepRatio(200, 100, std=(1, 1, 0))}, "std must be above 0"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        config_of("vmamba-upernet", **changes)


def test_images_are_said_once() -> None:
    """The encoder's own settings of images have no say, and are no difference between two models."""
    other = config_of("vmamba-upernet", encoder=replace(ENCODERS["vmamba-upernet"], mean=(0, 0, 0), squeeze=True))
    assert other == config_of("vmamba-upernet")


def test_the_slot_of_a_pruner_is_the_encoders() -> None:
    model, pruner = build("vmamba-upernet"), cast(Any, nn.Identity())
    model.pruner = pruner
    assert model.pruner is model.encoder.pruner is pruner
    assert [key for key, module in model.named_modules() if module is pruner] == ["encoder.pruner"]
    model.pruner = None
    assert model.encoder.pruner is None and "encoder.pruner" not in dict(model.named_modules())


def test_default_models_are_the_smallest_that_are_published() -> None:
    for name, variant in (("vmamba-upernet", "vmamba_tiny_s1l8"), ("plainmamba-upernet", "plainmamba_l1")):
        family = FAMILIES.get(name)
        assert family.config_class() == family.variants[f"upernet_{variant}"]


def test_a_model_without_maps() -> None:
    with pytest.raises(UsageError, match="this vim makes no feature maps"):
        FAMILIES.get("vim").build(FAMILIES.get("vim").config_class(32, 8, 8, embed_dim=8, depth=1)).feature_maps(
            torch.zeros(1, 3, 32, 32)
        )
    assert isinstance(build("vmamba-upernet").encoder, VMamba)


def test_multiply_adds_of_the_head_by_hand() -> None:
    """Convolutions alone: pooled sizes are 1, 2, 3 and 6, and nothing is counted for resizing."""
    model = build("vmamba-upernet", torch.float32)
    places, channels, width = [(8, 8), (4, 4), (2, 2)], (8, 16, 32), 6
    area = [rows * columns for rows, columns in places]
    expected = sum(scale**2 * channels[2] * width for scale in (1, 2, 3, 6))  # after pooling
    expected += area[2] * 9 * (channels[2] + 4 * width) * width  # what they are joined by
    expected += sum(area[level] * (channels[level] * width + 9 * width * width) for level in (0, 1))
    expected += area[0] * (9 * 3 * width * width + width * 4)
    count = count_flops(model)
    assert count.head == expected and count.encoder == count.all_directions - expected
    compress(model, 0.5, points=[2], alignment="none")
    pruned = count_flops(model)
    assert pruned.head == expected and pruned.encoder < count.encoder


def test_the_time_of_the_head_is_a_part_of_its_own() -> None:
    model = build("vmamba-upernet", torch.float32)
    parts = time_by_part(prepare(model), torch.randn(1, 3, 64, 64), 1e6, rounds=1)
    assert parts["head"] > 0 and sum(parts.values()) == pytest.approx(1e6)
    assert "head" not in time_by_part(prepare(model.encoder), torch.randn(1, 3, 64, 64), 1e6, rounds=1)
