"""What a CUDA graph may hold: a forward pass that reads nothing on the host and makes no tensor there.

Tensors on the device "meta" have no values, so that a read is an error, and whatever is made beside them shows as a
tensor on the CPU. Only the first pass may make such tensors (tables that are kept): graphs are recorded after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ssmprune_cli.models import Backbone
from ssmprune_cli.models.efficientvmamba.model import EfficientVMamba, EfficientVMambaConfig
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.mambavision.model import MambaVision, MambaVisionConfig
from ssmprune_cli.models.medmamba.model import MedMamba, MedMambaConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.workflows.measure.every_op import EveryOp

REFERENCES = ("drop-unsorted", "mask")  # refused by `compress`: they are there to compare with

MODELS: dict[str, Callable[[], Backbone]] = {
    "vim": lambda: Vim(VimConfig((32, 32), 8, 8, embed_dim=8, depth=3, num_classes=3)),
    "vim, rope": lambda: Vim(VimConfig((32, 32), 8, 8, embed_dim=16, depth=3, num_classes=3, rope=True)),
    "mambar": lambda: MambaReg(MambaRegConfig((32, 32), 8, 8, embed_dim=8, depth=3, num_classes=3, num_cls_tokens=4)),
    "plainmamba": lambda: PlainMamba(PlainMambaConfig((32, 32), 8, embed_dim=8, depth=3, num_classes=3)),
    "vmamba": lambda: VMamba(VMambaConfig((32, 32), embed_dim=8, depths=(2, 2), num_classes=3)),
    "medmamba": lambda: MedMamba(MedMambaConfig((32, 32), 8, (2, 2), num_classes=3)),
    "efficientvmamba": lambda: EfficientVMamba(EfficientVMambaConfig((64, 64), 8, (2, 2, 1, 1), num_classes=3)),
    "mambavision": lambda: MambaVision(MambaVisionConfig((64, 64), 8, 8, (1, 1, 3, 2), (1, 1, 2, 2), num_classes=3)),
}


class OnHost(EveryOp):
    """Notes every op that takes or gives a tensor that is not on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        tensors = [each for each in pytree.tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        if any(each.device.type != "meta" for each in tensors):
            self.ops.append(str(func))
        return result


def on_host(model: nn.Module, images: Tensor) -> list[str]:
    with torch.inference_mode():
        model(images)
        watched = OnHost()
        with watched:
            output = model(images)
    assert output.shape == (2, 3)
    return watched.ops


# Every reduction on a Vim; on the other families one that looks back at dropped tokens, and the one that keeps a grid.
CASES = [("vim", reduction) for reduction in REDUCTIONS.names() if reduction not in REFERENCES]
CASES += [(name, reduction) for name in MODELS if name != "vim" for reduction in ("context", "grid-merge")]


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_a_pruned_pass_can_be_recorded(name: str, reduction: str) -> None:
    model = MODELS[name]().eval()
    compress(model, 0.5, reduction=reduction, alignment="null")
    model.to("meta")
    side = model.config.image_size
    assert on_host(model, torch.empty(2, 3, *side, device="meta")) == []


def test_what_must_not_be_recorded_is_seen() -> None:
    class Branch(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :3, 0, 0] * torch.tensor(2.0).to(images.device)

    assert on_host(Branch(), torch.empty(2, 3, 8, 8, device="meta"))

    class Read(Branch):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :3, 0, 0] * float(images.mean())

    with pytest.raises((RuntimeError, NotImplementedError)):
        on_host(Read(), torch.empty(2, 3, 8, 8, device="meta"))
