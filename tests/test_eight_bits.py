"""Weights in eight bits: which kinds of layers are chosen, by Python and in artefacts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ssmprune_cli
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.models import Backbone, EightBitLinear, cut_short, put_in_eight_bits
from ssmprune_cli.models.common import some_outputs
from ssmprune_cli.models.language.mamba2.model import Mamba2Config, Mamba2LM
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.mambavision.model import MambaVision, MambaVisionConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import choose_alignment, compress
from ssmprune_cli.workflows import eight_bits
from ssmprune_cli.workflows.eight_bits import to_eight_bits

SIZES = {"image_size": (32, 32), "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 4, "num_classes": 5}
KINDS = {"vim": ("in_proj", "x_proj", "out_proj"), "plainmamba": ("in_proj", "x_proj", "out_proj")}

PRUNED: dict[str, Callable[[], tuple[Backbone, Tensor]]] = {
    "mambavision": lambda: (
        MambaVision(MambaVisionConfig((64, 64), 16, 16, (1, 1, 4, 2), (2, 2, 2, 4), num_classes=5)).eval(),
        torch.randn(2, 3, 64, 64),
    ),
    "mamba2": lambda: (
        Mamba2LM(Mamba2Config(embed_dim=32, depth=2, vocab_size=50, d_state=8, head_dim=16)).eval(),
        torch.arange(40).view(2, 20),
    ),
}


@pytest.fixture
def model() -> Backbone:
    torch.manual_seed(0)
    return Vim(VimConfig(**SIZES)).eval()  # type: ignore[arg-type]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(70, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_warning_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever instructions the one that tests run on has."""
    monkeypatch.setattr(eight_bits, "_slow", lambda model: [])


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (lambda: Vim(VimConfig(**SIZES)), {"in_proj": 4, "x_proj": 8, "out_proj": 4}),  # type: ignore[arg-type]
        (
            lambda: PlainMamba(PlainMambaConfig(image_size=(32, 32), embed_dim=16, depth=2, stem_convs=1)),
            {"in_proj": 2, "x_proj": 2, "out_proj": 2},
        ),
        (
            lambda: VMamba(VMambaConfig(image_size=(32, 32), embed_dim=16, depths=(1, 1))),
            {"in_proj": 2, "out_proj": 2, "fc1": 2, "fc2": 2},
        ),
    ],
)
def test_kinds_are_the_linear_layers_of_blocks(build: Callable[[], Backbone], kinds: dict[str, int]) -> None:
    found = {kind: len(names) for kind, names in build().linear_kinds.items()}
    assert found == kinds  # neither the head nor what makes step sizes


def test_harmless_kinds_are_in_eight_bits_and_the_answers_stay(model: Backbone, images: Tensor) -> None:
    before, expected = repr(model), model(images)
    found = to_eight_bits(model, images.split(32))
    assert found.chosen == model.eight_bit_kinds == KINDS["vim"]
    assert found.images == 70 and found.divergence is not None and found.divergence < 1e-3
    assert all(0 < (each.divergence or 0) < 1e-3 for each in found.kinds) and not found.warnings
    with torch.inference_mode():
        error = (model(images) - expected).abs().max() / expected.abs().max()
    assert 0 < error < 0.05
    assert "in eight bits: in_proj, x_proj, out_proj" in repr(model)
    assert before.split(" parameters")[0] == repr(model).split(" parameters")[0]


def test_kinds_that_do_most_harm_stay_in_float(
    model: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both projections of a block together, so that blocks stay in one call."""
    alone = {each.kind: each.divergence or 0 for each in to_eight_bits(copy.deepcopy(model), [images]).kinds}
    assert alone["x_proj"] < alone["in_proj"] == alone["out_proj"]
    monkeypatch.setattr(eight_bits, "MOST", alone["in_proj"] / 2)
    found = to_eight_bits(model, [images])
    assert found.chosen == model.eight_bit_kinds == ("x_proj",) and found.divergence == alone["x_proj"]
    assert all(type(model.get_submodule(name)) is nn.Linear for name in model.layers_of(["in_proj", "out_proj"]))


def test_where_all_do_harm_none_is_and_it_says_so(
    model: Backbone, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bits, "MOST", 0.0)
    expected = model(images)
    found = to_eight_bits(model, [images])
    assert not found.chosen and found.divergence == 0 and "All weights stay in float" in found.warnings[0]
    assert torch.equal(model(images), expected)


def test_kinds_that_are_named_are_taken_whatever_they_do(model: Backbone, images: Tensor) -> None:
    with pytest.raises(UsageError, match="no linear layers 'head'"):
        to_eight_bits(model, [images], ["head"])
    found = to_eight_bits(model, [images], ["x_proj"])
    assert found.chosen == model.eight_bit_kinds == ("x_proj",) and found.divergence is not None


def test_bad_input_is_refused_and_leaves_the_model(model: Backbone, images: Tensor) -> None:
    with pytest.raises(DataError, match="not finite"):
        to_eight_bits(model, [images * torch.nan])
    with pytest.raises(DataError, match="no images"):
        to_eight_bits(model, [])
    assert not model.eight_bit_kinds
    layer = model.get_submodule("layers.0.mixer.in_proj")
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight[0, 0] = torch.inf
    with pytest.raises(UsageError, match="not finite"):
        put_in_eight_bits(model, ["layers.0.mixer.in_proj"])
    with pytest.raises(UsageError, match="not a linear layer"):
        put_in_eight_bits(model, ["layers.0.norm"])


def test_constant_images_are_images(model: Backbone) -> None:
    assert to_eight_bits(model, [torch.zeros(8, 3, 32, 32)]).images == 8


def test_in_python_alone_and_with_pruning(model: Backbone, images: Tensor) -> None:
    other = copy.deepcopy(model)
    assert ssmprune_cli.compress(other, weights="int8", calibration=images) is None
    assert other.pruner is None and other.eight_bit_kinds == KINDS["vim"]
    seen = ssmprune_cli.compress(model, 0.5, weights="int8", calibration=images)
    assert seen is not None and seen.repair is not None and seen.repair.images == 70
    assert model.pruner is not None and model.eight_bit_kinds == KINDS["vim"]
    with pytest.raises(UsageError, match="in eight bits already"):
        ssmprune_cli.compress(model, 0.5, weights="int8", calibration=images)
    with pytest.raises(UsageError, match="in eight bits"):
        ssmprune_cli.resize(other, 16)
    with pytest.raises(UsageError, match="in eight bits"):
        cut_short(other, 1)
    with pytest.warns(UserWarning, match="cannot be given back"):
        ssmprune_cli.restore(model)
    assert model.pruner is None and torch.equal(model(images[:4]), other(images[:4]))


def test_the_pruned_model_is_repaired_towards_the_one_in_float(model: Backbone, images: Tensor) -> None:
    """A repair sees the answers from before: those of the model without its pruner are in eight bits now."""
    in_float, given = copy.deepcopy(model), copy.deepcopy(model)
    with torch.inference_mode():
        dense = in_float(images)
    first = ssmprune_cli.compress(model, 0.5, weights="int8", calibration=images)
    second = ssmprune_cli.compress(given, 0.5, weights="int8", calibration=images, dense=dense)
    assert first is not None and second is not None and first.repair is not None and second.repair is not None
    assert first.repair.before == pytest.approx(second.repair.before, rel=1e-3)


def test_folders_hold_it(model: Backbone, images: Tensor, tmp_path: Path) -> None:
    ssmprune_cli.compress(model, 0.5, weights="int8", calibration=images[:8])
    ssmprune_cli.save(model, tmp_path / "a")
    again = ssmprune_cli.load(tmp_path / "a")
    assert torch.equal(again(images), model(images)) and again.eight_bit_kinds == model.eight_bit_kinds
    ssmprune_cli.save(again, tmp_path / "b")
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    layer = again.get_submodule("layers.0.mixer.in_proj")
    assert isinstance(layer, EightBitLinear) and layer.values.dtype == torch.int8
    assert "in eight bits" in (tmp_path / "a" / "README.md").read_text().lower()


def test_a_smaller_model_in_eight_bits_is_saved_and_without_the_dense_one(model: Backbone, tmp_path: Path) -> None:
    cut = cut_short(model, 1)
    put_in_eight_bits(cut, cut.layers_of(["in_proj"]))
    with pytest.raises(UsageError, match="no use to a model in eight bits"):
        ssmprune_cli.save(cut, tmp_path / "a", dense=model)
    ssmprune_cli.save(cut, tmp_path / "a")
    again = ssmprune_cli.load(tmp_path / "a")
    assert again.eight_bit_kinds == ("in_proj",) and len(again.blocks) == 3
    text = (tmp_path / "a" / "recipe.yaml").read_text()
    assert "cut_blocks: 1" in text and "int8: [in_proj]" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scales_survive_a_conversion(model: Backbone, dtype: torch.dtype) -> None:
    """In bfloat16 a scale would be up to 0.4 % off, and with it every weight of its output; in float16 0 if small."""
    layer = EightBitLinear.of(nn.Linear(16, 5))
    scale = layer.scale.clone()
    converted = copy.deepcopy(layer).to(dtype)
    assert torch.equal(converted.scale, scale) and converted.bias is not None and converted.bias.dtype == dtype
    assert converted(torch.randn(3, 16, dtype=dtype)).dtype == dtype
    assert torch.equal(converted.to(torch.float32).weight, layer.weight)
    assert layer.to_empty(device="meta").to(dtype).scale.is_meta


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), EightBitLinear.of(nn.Linear(8, 6)), nn.Linear(8, 6, bias=False)])
def test_some_outputs_are_those_of_the_layer(layer: nn.Linear | EightBitLinear) -> None:
    x = torch.randn(2, 3, 8)
    for which in (slice(4), slice(2, None), slice(1, -2)):
        torch.testing.assert_close(some_outputs(layer, x, which), layer(x)[..., which])


@pytest.mark.parametrize("name", ["mambavision", "mamba2"])
@pytest.mark.parametrize("reduction", ["frozen", "context"])
def test_pruned_tokens_are_in_eight_bits_too(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that are kept: no weight is made as floats."""
    model, inputs = PRUNED[name]()
    alignment = choose_alignment("auto", reduction, calibrated=False)
    compress(model, 0.6, points=[1], reduction=reduction, alignment=alignment, importance="random")
    put_in_eight_bits(model, model.layers_of(model.linear_kinds))
    monkeypatch.setattr(EightBitLinear, "weight", property(lambda layer: pytest.fail("weights as floats")))
    with torch.inference_mode():
        assert model(inputs).isfinite().all()


def test_weights_in_eight_bits_take_a_quarter_of_the_room(model: Backbone) -> None:
    """And a scale for each output."""
    before = {name: value.numel() * 4 for name, value in model.state_dict().items()}
    put_in_eight_bits(model, ["layers.0.mixer.out_proj"])
    after = model.state_dict()
    assert after["layers.0.mixer.out_proj.values"].numel() * 4 == before["layers.0.mixer.out_proj.weight"]
    assert after["layers.0.mixer.out_proj.scale"].shape == (16,)


def each_named(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, object], dict[str, Tensor]], None]:
    """Of the weights in a folder, those whose name has `part`."""
    return lambda config, state: state.update({name: change(state[name]) for name in state if part in name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, state: config.update(eight_bits=["in_proj"]), "is missing"),
        (lambda config, state: config.update(eight_bits=["nonsense"]), "no linear layers 'nonsense'"),
        (lambda config, state: config.update(eight_bits="in_proj"), "no list of kinds"),
        (lambda config, state: config.update(eight_bits=[1]), "no list of kinds"),
        (lambda config, state: config.pop("eight_bits"), "is missing"),
        (each_named("values", lambda values: values.int()), "int32"),
        (each_named("scale", lambda scale: scale * torch.nan), "finite"),
    ],
)
def test_damaged_folders_are_refused(
    model: Backbone, tmp_path: Path, change: Callable[[dict[str, object], dict[str, Tensor]], object], message: str
) -> None:
    folder = tmp_path / "folder"
    put_in_eight_bits(model, model.layers_of(model.linear_kinds))
    ssmprune_cli.save(model, folder)
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, state)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        ssmprune_cli.load(folder)
