"""Exported files: they compute what the model does, and what does not is not kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export import TARGETS, export
from ssmprune_cli.export.target import ExportTarget, Run, Wanted
from tests.export.small import make

WITHOUT_US = """
import sys
sys.modules["ssmprune_cli"] = None  # importing it is an error
import torch
facts = {"ssmprune.json": ""}
model = torch.export.load(sys.argv[1], extra_files=facts).module()
images, wanted = torch.load(sys.argv[2])
for size in (1, 2, 5):
    torch.testing.assert_close(model(images[:size]), wanted[:size], rtol=0, atol=1e-5)
print(facts["ssmprune.json"])
"""


@pytest.mark.slow
def test_a_pt2_is_read_with_torch_alone_for_any_batch(tmp_path: Path) -> None:
    model = make("vim", "context").train()
    made = export(model, tmp_path / "model.pt2", target="pt2")
    assert made.error <= 1e-4 == made.tolerance and model.training
    assert [check.batch for check in made.checks] == [1, 3] and made.batch is None
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.save((images, model.eval()(images)), tmp_path / "io.pt")
    code = [sys.executable, "-c", WITHOUT_US, str(made.path), str(tmp_path / "io.pt")]
    done = subprocess.run(code, cwd=tmp_path, check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    assert facts["family"] == "vim" and json.loads(facts["method"])["reduction"] == "context"


@pytest.fixture
def plain_write(monkeypatch: pytest.MonkeyPatch) -> ExportTarget:
    """The target pt2, which does not decompose: that is the longest part."""

    def write(graph: torch.export.ExportedProgram, path: Path, wanted: Wanted) -> None:
        torch.export.save(graph, path)

    quick = replace(TARGETS.get("pt2"), write=write)
    monkeypatch.setitem(TARGETS._entries, "pt2", quick)
    return quick


def test_a_file_for_one_batch(plain_write: ExportTarget, tmp_path: Path) -> None:
    made = export(make("vim"), tmp_path / "model.pt2", target="pt2", batch=2)
    assert made.batch == 2 and [check.batch for check in made.checks] == [2]


@pytest.mark.parametrize("family", ["localvim", "localvmamba", "efficientvmamba", "mambavision", "videomamba-clips"])
def test_a_file_of_a_family_with_a_way_of_its_own_is_for_any_batch(
    plain_write: ExportTarget, family: str, tmp_path: Path
) -> None:
    made = export(make(family, "drop"), tmp_path / "model.pt2", target="pt2")
    assert made.tolerance == 1e-4 and made.error <= 1e-4 and [check.batch for check in made.checks] == [1, 3]


def test_a_file_that_computes_something_else_is_not_kept(
    plain_write: ExportTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stretched(path: Path) -> Mapping[str, Run]:
        (run,) = honest.open(path).values()
        return {"torch": lambda images: (run(images)[0] * 1.001,)}

    def swapped(path: Path) -> Mapping[str, Run]:
        """The first two classes are as likely, and the file takes the other one."""
        (run,) = honest.open(path).values()
        return {"torch": lambda images: (run(images)[0][:, [1, 0, 2, 3, 4]],)}

    honest, model = plain_write, make("vim", depth=1)
    monkeypatch.setitem(TARGETS._entries, "pt2", replace(honest, open=stretched))
    with pytest.raises(SsmpruneError, match="computes something else: in torch, with 1 images in a batch, its outputs"):
        export(model, tmp_path / "model.pt2", target="pt2", batch=1)
    with torch.no_grad():
        model.output_layer.weight.zero_()
        model.output_layer.bias.copy_(torch.tensor([1.0 + 1e-5, 1.0, 0.0, 0.0, 0.0]))
    monkeypatch.setitem(TARGETS._entries, "pt2", replace(honest, open=swapped))
    with pytest.raises(SsmpruneError, match=r"0\.00% of its answers are the model's"):
        export(model, tmp_path / "model.pt2", target="pt2", batch=1)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_exported_is_refused_in_one_line(tmp_path: Path) -> None:
    class Moody(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    model = make("vim")
    model.head = Moody(16, 5)
    with pytest.raises(SsmpruneError, match="vim cannot be exported to pt2: ") as caught:
        export(model, tmp_path / "model.pt2", target="pt2")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("vim")
    with pytest.raises(UsageError, match="Did you mean 'pt2'"):
        export(model, tmp_path / "model.pt2", target="pt")
    with pytest.raises(UsageError, match=r"has the suffix \.pt2"):
        export(model, tmp_path / "model.onnx", target="pt2")
    with pytest.raises(UsageError, match="at least one image"):
        export(model, tmp_path / "model.pt2", target="pt2", batch=0)
    with pytest.raises(UsageError, match="has no opset"):
        export(model, tmp_path / "model.pt2", target="pt2", opset=18)
    with pytest.raises(UsageError, match="one from 18 to"):
        export(model, tmp_path / "model.onnx", opset=11)
    (tmp_path / "model.pt2").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        export(model, tmp_path / "model.pt2", target="pt2")
    assert (tmp_path / "model.pt2").read_text() == "mine"
    monkeypatch.setitem(TARGETS._entries, "pt2", replace(TARGETS.get("pt2"), missing=lambda: "no torch.export"))
    with pytest.raises(UsageError, match=r"cannot be written here: no torch\.export"):
        export(model, tmp_path / "new.pt2", target="pt2")


def test_what_cannot_be_exported_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"computes in torch\.float32, and this model is in torch\.float64"):
        export(make("vim").double(), tmp_path / "model.onnx")
    with pytest.raises(UsageError, match="has no head"):
        export(make("vmamba", num_classes=0, out_stages=(0, 1)), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_made_for_a_file_go_if_there_is_none(plain_write: ExportTarget, tmp_path: Path) -> None:
    """Also when it is interrupted. Those that were there, and those with something in them, stay."""

    def interrupted(graph: torch.export.ExportedProgram, path: Path, wanted: Wanted) -> None:
        path.write_text("half a file")
        raise KeyboardInterrupt

    model, inner = make("vim", depth=1), tmp_path / "mine" / "new" / "inner"
    (tmp_path / "mine").mkdir()
    TARGETS._entries["pt2"] = replace(plain_write, write=interrupted)  # put back by the fixture
    with pytest.raises(KeyboardInterrupt):
        export(model, inner / "model.pt2", target="pt2", batch=1)
    assert (tmp_path / "mine").is_dir() and not (tmp_path / "mine" / "new").exists()
    inner.mkdir(parents=True)
    (inner / "notes.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        export(model, inner / "model.pt2", target="pt2", batch=1)
    assert [file.name for file in inner.iterdir()] == ["notes.txt"]
