"""Files that are made once."""

from __future__ import annotations

import pytest
import torch

from ssmprune_cli.export import Exported, export
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import compress
from tests.export.small import make


@pytest.fixture(scope="session")
def vim_onnx(tmp_path_factory: pytest.TempPathFactory) -> tuple[Backbone, Exported]:
    """A pruned Vim with aligned scans, and its file."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = make("vim", image_size=40, patch_size=8, stride=8)
    compress(model, 0.5, points=[1], reduction="context", alignment="null")
    return model.eval(), export(model, tmp_path_factory.mktemp("onnx") / "vim.onnx")
