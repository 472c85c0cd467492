"""A model cut short computes what its first blocks and what follows the last one compute."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import Backbone, Size, blocks_left_out, cut_short, cuts, dense_config, size_of, smaller
from ssmprune_cli.models.efficientvmamba.model import EfficientVMamba, EfficientVMambaConfig
from ssmprune_cli.models.localvmamba.model import LocalVMamba, LocalVMambaConfig
from ssmprune_cli.models.mamba.localvim import LocalVim, LocalVimConfig
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.medmamba.model import MedMamba, MedMambaConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.preprocessing import NOTHING_SAID
from ssmprune_cli.pruning import compress, repair
from ssmprune_cli.workflows.measure import count_flops

SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_classes": 5}
MODELS: dict[str, Callable[[], Backbone]] = {
    "vim": lambda: Vim(VimConfig(**SIZES, stride=4)),
    "mamba-reg": lambda: MambaReg(MambaRegConfig(**SIZES, stride=4, num_cls_tokens=4, cls_reduce=2)),
    "localvim": lambda: LocalVim(LocalVimConfig(**SIZES, stride=4)),
    "plainmamba": lambda: PlainMamba(PlainMambaConfig(**SIZES, d_conv=3, dw_layers=(0, 3))),
    "vmamba": lambda: VMamba(VMambaConfig(image_size=(32, 32), embed_dim=8, depths=(2, 4, 1), num_classes=5)),
    "efficientvmamba": lambda: EfficientVMamba(EfficientVMambaConfig((32, 32), 8, (2, 4, 5, 1), num_classes=5)),
    "localvmamba": lambda: LocalVMamba(LocalVMambaConfig((32, 32), embed_dim=8, depths=(2, 4, 1), num_classes=5)),
    "medmamba": lambda: MedMamba(MedMambaConfig(image_size=(32, 32), embed_dim=8, depths=(2, 4, 1), num_classes=5)),
}


def make(name: str) -> Backbone:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_first_blocks_and_what_follows_the_last(name: str) -> None:
    model = make(name)
    by_hand = copy.deepcopy(model)
    owner, attribute = {
        "plainmamba": (by_hand, "backbone.layers"),
        "vmamba": (by_hand, "layers.1.blocks"),
        "localvmamba": (by_hand, "layers.1.blocks"),
        "medmamba": (by_hand, "layers.1.blocks"),
        "efficientvmamba": (by_hand, "layers.1.blocks"),
    }.get(name, (by_hand, "layers"))
    parent, _, last = attribute.rpartition(".")
    module = owner.get_submodule(parent)
    blocks = module.get_submodule(last)
    assert isinstance(blocks, nn.ModuleList) and len(blocks) == 4 and cuts(model) == range(1, 4)
    setattr(module, last, blocks[:3])
    by_hand.config = model.config.without_blocks(1)
    images = torch.randn(2, 3, *model.image_size)
    cut = cut_short(model, 1)
    with torch.no_grad():
        assert torch.equal(cut(images), by_hand(images))
        assert not torch.equal(cut(images), model(images))
    assert (
        len(cut.mixers) == len(model.mixers) - 1 and count_flops(cut).all_directions < count_flops(model).all_directions
    )
    assert cut.num_tokens == model.num_tokens


def test_its_weights_are_its_own_and_its_head_is_refitted() -> None:
    model = make("vim")
    before = copy.deepcopy(model.state_dict())
    cut = cut_short(model, 2)
    images = torch.randn(200, 3, 16, 16)
    with torch.no_grad():
        dense = model(images)
    done = repair(cut, images.split(50), dense=dense)
    assert done.kind == "head" and done.before is not None and done.after is not None and done.after < done.before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("blocks", [0, 4, -1])
def test_what_cannot_be_cut_is_refused(blocks: int) -> None:
    with pytest.raises(UsageError, match="3 blocks at most can be cut"):
        cut_short(make("vim"), blocks)


def test_a_model_that_drops_tokens_is_not_cut() -> None:
    model = make("vim")
    compress(model, 0.5, points=[1])
    with pytest.raises(UsageError, match="drops tokens cannot be cut short"):
        cut_short(model, 1)


def test_outputs_of_several_depths_are_not_cut() -> None:
    model = PlainMamba(PlainMambaConfig(**SIZES, out_indices=(1, -1)))
    assert not cuts(model)
    with pytest.raises(UsageError, match="0 blocks at most can be cut"):
        cut_short(model, 1)


@pytest.mark.parametrize("name", MODELS)
def test_its_configuration_knows_the_model_that_it_was_cut_from(name: str) -> None:
    model = make(name)
    for blocks in cuts(model):
        cut = cut_short(model, blocks)
        assert dense_config(cut.config) == model.config and size_of(cut) == Size(cut=blocks)
        left_out = blocks_left_out(cut)
        assert len(left_out) == blocks == len(model.mixers) - len(cut.mixers)
        stage = next(stage for stage in model.stages if left_out[0] in range(stage.start, stage.stop))
        assert left_out[-1] == stage.stop - 1 and stage.stop - stage.start == 4


def test_what_was_cut_is_not_cut_again() -> None:
    cut = cut_short(make("vim"), 1)
    assert not cuts(cut)
    with pytest.raises(UsageError, match="was cut short before"):
        cut_short(cut, 1)


@pytest.mark.parametrize(("name", "size"), [("localvim", Size(cut=2)), ("vmamba", Size(cut=3)), ("vim", Size(12, 2))])
def test_an_artefact_holds_the_cut_model_and_the_dense_one(name: str, size: Size, tmp_path: Path) -> None:
    model = make(name)
    made = smaller(model, size)
    compress(made, 0.6, points=[1])
    with torch.no_grad():  # as a refitted head
        made.output_layer.bias.add_(1.0)
    checkpoint.save(tmp_path / "out", made, dense=model)
    loaded, dense = checkpoint.load(tmp_path / "out"), checkpoint.load_as(tmp_path / "out", NOTHING_SAID, dense=True)
    assert loaded.config == made.config and dense.config == model.config and dense.pruner is None
    images, large = torch.randn(2, 3, *made.image_size), torch.randn(2, 3, *model.image_size)
    with torch.no_grad():
        assert torch.equal(loaded(images), made(images)) and torch.equal(dense(large), model(large))


@pytest.mark.parametrize(
    ("cut_from", "said"),
    [
        ([["depth", 5]], None),
        ([["depth", 4]], "no model whose last blocks"),
        ([["depth", 1 << 40]], "no model whose last blocks"),
        ([["depth", "6"]], "not valid"),
        ([["wings", 2]], "wings"),
        ([["depth", 6], ["embed_dim", 8]], "no model whose last blocks"),
        ([["depth"]], "cut_from"),
    ],
)
def test_a_configuration_that_lies_about_the_dense_model_is_refused(
    cut_from: list[object], said: str | None, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "out", make("vim"))
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    values["config"]["cut_from"] = cut_from
    file.write_text(json.dumps(values))
    if said is None:
        assert size_of(checkpoint.load(tmp_path / "out")) == Size(cut=1)
        with pytest.raises(CheckpointError, match=r"there is no dense\.safetensors"):
            checkpoint.load_as(tmp_path / "out", NOTHING_SAID, dense=True)
        return
    with pytest.raises(CheckpointError, match="the configuration is not valid") as error:
        checkpoint.load(tmp_path / "out")
    assert said in str(error.value)
