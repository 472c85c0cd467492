"""`ssmprune profile --module`: time and memory of a user's module, dense and with tokens dropped."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssmprune_cli.adapt import Inside
from ssmprune_cli.errors import shown
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.workflows.measure import Progress, Speed, peak_memory_of
from ssmprune_cli.workflows.own_module.source import ModuleSource
from ssmprune_cli.workflows.own_module.timing import COMPRESSED, no_faster, random_images, variants


@dataclass(frozen=True)
class ModuleProfile:
    """What was measured, by how the module is computed: "own code", "accelerated", and "compressed" of a folder.

    tokens  that enter each mixer of the compressed one, by the mixer's name; None of a file
    """

    path: str
    parameters: int
    image_size: int
    batch_size: int
    dtype: str
    device: str
    threads: int
    backend: str
    speeds: dict[str, Speed]
    peak_memory_bytes: dict[str, int]
    tokens: dict[str, int] | None
    fill: str | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def profile_module(
    source: ModuleSource, *, batch_size: int | None = None, rounds: int = 10, progress: Progress | None = None
) -> ModuleProfile:
    """Timed on random images, all ways in turn. Raises UsageError, CheckpointError or SsmpruneError for what the
    user's code or file does not do."""
    source.check()
    side, batch_size = source.side(), batch_size or 8
    own = source.load()
    images = random_images(own, batch_size, side)
    found = variants(own, images[:1])
    models, inside = dict(found.models), None
    if source.stored is not None:
        models[COMPRESSED] = copy.deepcopy(own)
        inside = source.put_back(models[COMPRESSED])
    speeds = type(found)(models, ()).speeds(images, rounds, progress)
    memory = {}
    for name, model in models.items():

        def forward(model: torch.nn.Module = model) -> None:
            with torch.no_grad():
                model(images)

        memory[name] = peak_memory_of(forward, [*model.parameters(), *model.buffers(), images])
    return ModuleProfile(
        path=shown(source.path.name),
        parameters=sum(parameter.numel() for parameter in own.parameters()),
        image_size=side,
        batch_size=batch_size,
        dtype=str(images.dtype).removeprefix("torch."),
        device=str(images.device),
        threads=torch.get_num_threads(),
        backend=active_backend(images.device, images.dtype),
        speeds=speeds,
        peak_memory_bytes=memory,
        tokens=None if inside is None else tokens_by_mixer(inside),
        fill=None if inside is None else inside.fill,
        warnings=(*found.warnings, *no_faster(speeds, images)),
    )


def tokens_by_mixer(inside: Inside) -> dict[str, int]:
    """Tokens that enter each mixer, in the order of the calls."""
    return dict(zip((name for name, _ in inside.mixers), inside.tokens, strict=True))
