"""What a result is a result of: model, images and program, as plain values that a saved state is compared by."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch

from ssmprune_cli import __version__
from ssmprune_cli.data import ImageDataset, Subset, fingerprint
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.workflows.evaluate import spread

_LOOKED_AT = 64  # images of a large dataset whose pixels are read


def weights_sha256(model: Backbone) -> str:
    """SHA-256, in hexadecimal, of the weights as they were loaded: names, types, shapes and values, without a pruner's.

    Unlike that of the file it tells apart which copy of the weights was taken from it.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith("pruner."):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_identity(model: Backbone) -> dict[str, Any]:
    """Family, configuration, preprocessing, weights, and how it is pruned, if it is."""
    pruner = model.pruner
    return {
        "family": model.family,
        "config": asdict(model.config),
        "preprocessing": asdict(model.preprocessing),
        "weights_sha256": weights_sha256(model),
        "pruning": pruner.settings.to_dict() if isinstance(pruner, TokenPruner) else None,
    }


def run_identity(model: Backbone, device: str) -> dict[str, Any]:
    """Of measurements on `model`: also the version and the kernels, which change their last digits."""
    return {**model_identity(model), "ssmprune": __version__, "device": device, "kernel": active_backend(device)}


def dataset_identity(dataset: ImageDataset) -> str:
    """SHA-256, in hexadecimal, of all names and targets and of the pixels of at most 64 images from all over."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(f"{dataset.name(index)}\0{dataset.mark(index)}\n".encode())
    some = dataset if len(dataset) <= _LOOKED_AT else Subset(dataset, spread(len(dataset), _LOOKED_AT))
    return hashlib.sha256(digest.digest() + fingerprint(some).encode()).hexdigest()
