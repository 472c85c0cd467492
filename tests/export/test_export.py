"""Exported files: they compute what the model does, and what does not is not kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export import TARGETS, export
from ssmprune_cli.models import FAMILIES, Backbone
from ssmprune_cli.pruning import compress

MAMBA: dict[str, Any] = {"image_size": 16, "patch_size": 4, "stride": 4, "embed_dim": 16, "depth": 2, "num_classes": 5}
PLAIN: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_classes": 5, "d_conv": 3}
EFFICIENT: dict[str, Any] = {"image_size": 16, "embed_dim": 8, "depths": (2, 1, 1, 1), "num_classes": 5}
VMAMBA: dict[str, Any] = {"image_size": 16, "embed_dim": 8, "depths": (1, 2), "num_classes": 5}


SIZES = {"plainmamba": PLAIN, "vmamba": VMAMBA, "medmamba": VMAMBA, "efficientvmamba": EFFICIENT}


def make(family: str, *, pruned: bool) -> Backbone:
    torch.manual_seed(0)
    known = FAMILIES.get(family)
    model = known.build(known.config_class(**SIZES.get(family, MAMBA)))
    if pruned:
        compress(model, 0.5, points=[2] if family in ("vmamba", "medmamba") else [1])
    return model


@pytest.mark.parametrize(
    ("family", "pruned"),
    [
        ("vim", False),
        ("vim", True),
        ("localvim", True),
        ("plainmamba", True),
        ("vmamba", True),
        ("medmamba", True),
        ("efficientvmamba", True),
    ],
)
def test_a_file_computes_what_the_model_does(family: str, pruned: bool, tmp_path: Path) -> None:
    model = make(family, pruned=pruned).train()
    made = export(model, tmp_path / "model.pt2", batch=2)
    assert made.error <= made.tolerance == 1e-4 and model.training
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = torch.export.load(made.path).module()(images)
        torch.testing.assert_close(found, model.eval()(images), rtol=0, atol=1e-5)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, images: Tensor) -> Tensor:
        return honest.compute(path, images) * 1.001

    honest = TARGETS.get("pt2")
    monkeypatch.setitem(TARGETS._entries, "pt2", replace(honest, compute=wrong))
    with pytest.raises(SsmpruneError, match="computes something else"):
        export(make("vim", pruned=False), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_exported_is_refused_in_one_line(tmp_path: Path) -> None:
    class Moody(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    model = make("vim", pruned=False)
    model.head = Moody(16, 5)
    with pytest.raises(SsmpruneError, match="vim cannot be exported to pt2: ") as caught:
        export(model, tmp_path / "model.pt2")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("vim", pruned=False)
    with pytest.raises(UsageError, match="Did you mean 'pt2'"):
        export(model, tmp_path / "model.pt2", target="pt")
    with pytest.raises(UsageError, match=r"has the suffix \.pt2"):
        export(model, tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="at least one image"):
        export(model, tmp_path / "model.pt2", batch=0)
    (tmp_path / "model.pt2").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        export(model, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "mine"
    monkeypatch.setitem(TARGETS._entries, "pt2", replace(TARGETS.get("pt2"), missing=lambda: "no torch.export"))
    with pytest.raises(UsageError, match=r"cannot be written here: no torch\.export"):
        export(model, tmp_path / "new.pt2")
