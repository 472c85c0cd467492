"""The optimiser's groups of weights, and the learning rate at every moment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ssmprune_cli.models import blocks
from ssmprune_cli.recipe import Training

# Weight decay pulls a matrix towards "no effect". These are no such matrices: A_log 0 is a decay rate of 1, and tokens
# and positions are inputs. The Mamba authors exclude A_log and D too.
_UNDECAYED = (
    *("A_log", "A_b_log", "D", "D_b", "cls_token", "cls_token_head", "cls_token_tail", "pos_embed"),
    *("A_logs", "Ds", "dt_projs_bias"),  # VMamba
)
_AFTER_BLOCKS = ("head", "norm_f", "classifier", "outnorm", "backbone.ln1", "backbone.norm_layer")


def optimiser(model: nn.Module, settings: Training) -> torch.optim.AdamW:
    """AdamW; on a GPU as one kernel, which is several times as fast."""
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
    return torch.optim.AdamW(groups, lr=settings.peak_lr, fused=next(model.parameters()).device.type == "cuda")


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Optimiser groups: `weight_decay` for matrices and filters; none for biases, norms, A, D, tokens and positions.

    `scale` is what a group's learning rate is multiplied by: `layer_decay` for each block between it and the head.
    """
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = [f"{names[id(block)]}." for block in blocks(model)]
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    block = 0  # parameters between two blocks (a downsampling) belong to the one before
    for name, parameter in model.named_parameters():
        block = next((number for number, prefix in enumerate(prefixes, start=1) if name.startswith(prefix)), block)
        if name.startswith(_AFTER_BLOCKS):
            depth = len(prefixes) + 1
        elif name.rpartition(".")[2] in _UNDECAYED and "." not in name.removeprefix("backbone."):
            depth = 0  # tokens and positions
        else:
            depth = block
        free = parameter.ndim < 2 or name.rpartition(".")[2] in _UNDECAYED
        depth = depth if layer_decay < 1 else len(prefixes) + 1
        scale = layer_decay ** (len(prefixes) + 1 - depth)
        group = {"params": [], "weight_decay": 0.0 if free else weight_decay, "scale": scale}
        groups.setdefault((depth, free), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def learning_rate(settings: Training, epoch: float) -> float:
    """The learning rate after `epoch` epochs (a fraction counts the steps of a started one)."""
    high, low = settings.peak_lr, settings.min_lr
    if epoch < settings.warmup_epochs:
        return settings.warmup_lr + (high - settings.warmup_lr) * epoch / settings.warmup_epochs
    progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1e-9)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
