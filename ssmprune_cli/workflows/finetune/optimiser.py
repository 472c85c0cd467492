"""The optimiser's groups of weights, and the learning rate at every moment."""

from __future__ import annotations

import math
from typing import Any

import torch

from ssmprune_cli.models import Backbone
from ssmprune_cli.recipe import Training


def optimiser(model: Backbone, settings: Training) -> torch.optim.AdamW:
    """AdamW; on a GPU as one kernel, which is several times as fast."""
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
    return torch.optim.AdamW(groups, lr=settings.peak_lr, fused=next(model.parameters()).device.type == "cuda")


def parameter_groups(model: Backbone, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Optimiser groups: `weight_decay` for matrices and filters; none for biases, norms, A, D, tokens and positions.

    `scale` is what a group's learning rate is multiplied by: `layer_decay` for each block between it and the head.
    Where a parameter is, and whether it is decayed, its family says; UsageError for one that it does not know.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    depths, head = model.depths(), len(model.blocks) + 1
    for name, parameter in model.named_parameters():
        decayed = model.is_decayed(name, parameter)
        depth = depths[name] if layer_decay < 1 else head
        scale = layer_decay ** (head - depth)
        group = {"params": [], "weight_decay": weight_decay if decayed else 0.0, "scale": scale}
        groups.setdefault((depth, not decayed), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def learning_rate(settings: Training, epoch: float) -> float:
    """The learning rate after `epoch` epochs (a fraction counts the steps of a started one)."""
    high, low = settings.peak_lr, settings.min_lr
    if epoch < settings.warmup_epochs:
        return settings.warmup_lr + (high - settings.warmup_lr) * epoch / settings.warmup_epochs
    progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1e-9)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
