"""`ssmprune inspect` of a file with Mamba blocks that is of no family."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmprune_cli.adapt import Seen, mixers_in, sketch
from ssmprune_cli.errors import UnknownFamilyError
from ssmprune_cli.workflows.inspect import ForeignInspection, look
from tests.adapt.local_modules import LocalSS2D, MultiMamba
from tests.adapt.modules import SS2D, CentredMixer, Mixer, classifier


def inspected(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssmprune_cli", "inspect", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_says_what_it_sees_and_how_to_start(tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    torch.save(classifier().state_dict(), file)
    done = inspected(str(file))
    assert done.returncode == 0 and "the file is of no known family" in done.stderr
    for number in range(3):
        assert f"mixers: layers.{number}.mixer" in done.stdout
    assert "Mamba, 16 channels, 4 states" in done.stdout and "adapted = MyAdapter(model, model.layers)" in done.stdout
    facts = json.loads(inspected(str(file), "--json").stdout)
    assert facts["family"] is None and len(facts["mixers"]) == 3
    assert facts["mixers"][1] == {"name": "layers.1.mixer", "kind": "Mamba", "width": 16, "states": 4}
    compile(facts["sketch"], "sketch", "exec")


def test_a_file_without_mixers_is_an_error_as_before(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(UnknownFamilyError, match="is of no known model family"):
        look(tmp_path / "linear.pth")


def test_kinds_are_told_by_all_of_the_names() -> None:
    strange = Mixer()
    strange.scale = torch.nn.Parameter(torch.ones(1))
    modules = torch.nn.ModuleDict(
        {
            **{"a": SS2D(8), "b": CentredMixer(), "c": strange, "d": SS2D(8, gated=False)},
            **{"e": MultiMamba(["h"] * 11), "f": LocalSS2D(["v", "w2"])},
        }
    )
    found = mixers_in({name: tuple(value.shape) for name, value in modules.state_dict().items()})
    assert found == [
        Seen("a", "SS2D", 8, 4),
        Seen("b", "MambaVision", 16, 4),
        Seen("c", None, 16, 4),
        Seen("d", "SS2D", 8, 4),
        Seen("e", "LocalVim", 16, 4),
        Seen("f", "LocalVMamba's SS2D", 8, 4),
    ]
    lines = ForeignInspection(tuple(found), 0, "", "").lines
    assert lines["c"] == "of no known kind, 16 channels, 4 states"


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("layers.0.mixer", "model, model.layers)"),
        ("backbone.layers.11.mixer", "model, model.backbone.layers)"),
        ("0.mixer", "model, model)"),
        ("layers.0.blocks.1.op", "model, model.layers)"),
        ("mixer", "model, model)"),
        ("enc1.0.op", "model, model.enc1)"),
    ],
)
def test_the_sketch_guesses_where_the_blocks_are(name: str, blocks: str) -> None:
    text = sketch([Seen(name, "Mamba", 16, 4)])
    assert f"MyAdapter({blocks}" in text
    assert max(map(len, text.splitlines())) < 80  # a terminal that breaks a line breaks the program
