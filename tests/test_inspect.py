"""`workflows.inspect`: the facts of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ssmprune_cli.checkpoint import save
from ssmprune_cli.errors import CheckpointError
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.preprocessing import Reading
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.inspect import inspect

VIM_LIKE = Path(__file__).parent / "golden" / "containers" / "vim_like.pth"


def test_a_published_container() -> None:
    found = inspect(VIM_LIKE)
    assert (found.family, found.variant, found.parameters) == ("vim", None, 115306)
    assert (found.image_size, found.num_classes, found.blocks) == ((64, 64), 10, 4)
    assert (found.tokens, found.protected, found.scan_directions) == (65, (32,), 2)
    assert found.container["kind"] == "torch" and found.container["used"] == "model"
    assert found.container["entries"] == ["model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"]
    assert found.dtype == {"float32": 75} and found.non_finite == () and found.pruning is None
    assert found.sha256 == hashlib.sha256(VIM_LIKE.read_bytes()).hexdigest()
    assert found.preprocessing is not None
    assert (found.preprocessing["resize"], found.preprocessing["crop"]) == (73, 64)
    assert VimConfig(**found.config) == VimConfig((64, 64), 8, 8, embed_dim=48, depth=4, num_classes=10)
    assert json.loads(json.dumps(found.to_dict())) == json.loads(json.dumps(asdict(found)))
    assert inspect(VIM_LIKE, Reading(weights="model_ema")).container["used"] == "model_ema"


@pytest.mark.parametrize("classes", [1000, 7])
def test_a_published_variant_is_named_whatever_its_classes(tmp_path: Path, classes: int) -> None:
    with torch.device("meta"):
        state = Vim(VimConfig(num_classes=classes)).state_dict()
    torch.save(
        {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in state.items()}, tmp_path / "vim.pth"
    )
    found = inspect(tmp_path / "vim.pth")
    assert (found.variant, found.tokens, found.protected) == ("vim_tiny", 197, (98,))
    assert found.parameters == 7_148_008 - 193 * (1000 - classes)
    assert found.container == {"kind": "torch", "entries": [], "used": None} and found.dtype == {"float16": 415}


def test_weights_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    state = Vim(VimConfig((32, 32), 8, 8, embed_dim=16, depth=1, num_classes=2)).state_dict()
    state["head.bias"][0] = torch.nan
    torch.save(state, tmp_path / "vim.pth")
    assert inspect(tmp_path / "vim.pth", Reading(image_size=32)).non_finite == ("head.bias",)


def test_an_artefact_folder(tmp_path: Path) -> None:
    model = Vim(VimConfig((32, 48), 8, 8, embed_dim=16, depth=4, num_classes=2, mixer="none")).eval()
    compress(model, 0.5, alignment="null")
    save(tmp_path / "out", model)
    found = inspect(tmp_path / "out")
    assert found.container["kind"] == "ssmprune folder" and found.scan_directions == 1
    assert found.pruning is not None and found.pruning["schedule"]["tokens"] == [12, 6, 3]
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.preprocessing is None  # nothing is published for images that are not square


def test_errors_are_those_of_load(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="do not fit vim_tiny"):
        inspect(VIM_LIKE, Reading(variant="vim_tiny"))
