"""Every parameter of every family is in one group of the optimiser, by its place and its meaning; none by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import FAMILIES, Backbone
from ssmprune_cli.workflows.finetune.optimiser import parameter_groups

MAMBA = {"image_size": 16, "patch_size": 4, "stride": 4, "embed_dim": 16, "depth": 2, "num_classes": 2}
PLAIN = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 2, "d_conv": 3}
VMAMBA = {"image_size": 16, "embed_dim": 8, "depths": (1, 1), "num_classes": 2}
VISION = {"image_size": 64, "in_dim": 8, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_classes": 2, "layer_scale": 0.1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vim": ("vim", {**MAMBA, "layer_scale": 0.1}),
    "vim with two class tokens": ("vim", {**MAMBA, "class_token": "double"}),
    "vim with rope and shared projections": ("vim", {**MAMBA, "rope": True, "mixer": "v1"}),
    "videomamba": ("videomamba", MAMBA),
    "videomamba-clips": ("videomamba-clips", MAMBA),
    "mambar": ("mambar", {**MAMBA, "num_cls_tokens": 4, "cls_reduce": 2}),
    "mambar without neck": ("mambar", {**MAMBA, "num_cls_tokens": 4}),
    "localvim": ("localvim", MAMBA),
    "plainmamba": ("plainmamba", {**PLAIN, "dw_layers": (1,), "out_indices": (0, 1)}),
    "vmamba": ("vmamba", {**VMAMBA, "out_stages": (0, 1)}),
    "localvmamba": ("localvmamba", VMAMBA),
    "medmamba": ("medmamba", VMAMBA),
    "efficientvmamba": ("efficientvmamba", {**VMAMBA, "depths": (1, 1, 1, 1)}),
    "mambavision": ("mambavision", VISION),
    "vmamba v0": ("vmamba", {**VMAMBA, "patch_embed": "v1", "downsample": "v1", "gated": True, "conv_bias": True}),
}


def make(name: str) -> Backbone:
    family, settings = MODELS[name]
    known = FAMILIES.get(family)
    return known.build(known.config_class(**settings))


def groups_of(model: Backbone) -> dict[str, tuple[float, float]]:
    """Scale of the rate at a layer decay of 0.5, and weight decay, of every parameter by name; each in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group["scale"], group["weight_decay"]))
        for group in parameter_groups(model, 0.1, 0.5)
        for parameter in group["params"]
    ]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_group(name: str) -> None:
    model = make(name)
    found, head = groups_of(model), len(model.blocks) + 1
    for number, block in enumerate(model.blocks, start=1):
        (prefix,) = (each for each, module in model.named_modules() if module is block)
        assert {scale for key, (scale, _) in found.items() if key.startswith(f"{prefix}.")} == {0.5 ** (head - number)}
    for key, (scale, _) in found.items():
        if "patch_embed" in key or "pos_embed" in key or "cls_token" in key:
            assert scale == 0.5**head, key
        if key.startswith(("head", "neck", "norm_neck", "norm_f", "classifier", "outnorm")) or "norm_layer" in key:
            assert scale == 1, key


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_decayed(name: str) -> None:
    """Norms and biases have one dimension; A, tokens and positions have more."""
    model = make(name)
    parameters = dict(model.named_parameters())
    for key, (_, decay) in groups_of(model).items():
        free = parameters[key].ndim < 2 or any(part in key for part in ("A_", "token", "pos_embed", "dt_projs_bias"))
        assert decay == (0.0 if free else 0.1), key


def test_mamba_regs_neck_is_at_the_head_and_its_registers_positions_are_inputs() -> None:
    found = groups_of(make("mambar"))
    assert found["neck.weight"] == found["head.weight"] == (1, 0.1)
    assert found["norm_neck.weight"] == (1, 0.0)
    assert found["pos_embed_cls"] == found["pos_embed"] == found["cls_token"] == (0.125, 0.0)


def test_a_downsampling_has_the_rate_of_the_block_before_it() -> None:
    found = groups_of(make("vmamba"))
    assert {scale for key, (scale, _) in found.items() if ".downsample." in key} == {0.25}


@pytest.mark.parametrize("name", MODELS)
def test_a_parameter_that_the_family_does_not_know_is_refused(name: str) -> None:
    model = make(name)
    model.extra = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(UsageError, match="extra: is in no known place"):
        parameter_groups(model, 0.1)
    del model.extra
    model.blocks[0].extra = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(UsageError, match="extra: is no known parameter"):
        parameter_groups(model, 0.1)
