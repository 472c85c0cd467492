"""Language models with golden values, in the layouts of their files, and a small one of bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssmprune_cli.checkpoint import load
from ssmprune_cli.models import LanguageModel
from ssmprune_cli.models.language.mamba1.model import Mamba1Config, Mamba1LM
from ssmprune_cli.models.language.mamba2.model import Mamba2Config, Mamba2LM

GOLDEN = Path(__file__).parent.parent / "golden"
FIXTURES = ("mamba1_lm_mini", "mamba1_hf_mini", "mamba2_lm_mini")
LENGTH = 40  # of the golden windows


def language_model(path: Path, **options: Any) -> LanguageModel:
    model = load(path, **options)
    assert isinstance(model, LanguageModel)
    return model


@pytest.fixture(scope="session")
def published() -> Callable[[str, Path], Path]:
    """Writes a golden model to a folder."""
    return write


def write(fixture: str, folder: Path) -> Path:
    """The folder as its authors publish it: state-spaces' pytorch_model.bin, or transformers' model.safetensors."""
    state = load_file(GOLDEN / fixture / "state_dict.safetensors")
    said = json.loads((GOLDEN / fixture / "config.json").read_text())["config"]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said))
    if "hf" in fixture:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="session", params=FIXTURES)
def golden(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, dict[str, Tensor]]:
    """A model, and what its authors' code computes."""
    folder = write(request.param, tmp_path_factory.mktemp(request.param) / "model")
    values = load_file(GOLDEN / request.param / "io.safetensors")
    return language_model(folder, length=LENGTH), values


@pytest.fixture(params=("mamba", "mamba2"))
def small(request: Any) -> LanguageModel:
    """Random weights in float64, of 50 tokens."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 50, "embed_dim": 16, "depth": 4, "length": 24}
    model: LanguageModel
    if request.param == "mamba":
        model = Mamba1LM(Mamba1Config(**sizes, d_state=4))
    else:
        model = Mamba2LM(Mamba2Config(**sizes, d_state=4, head_dim=8, groups=2))
    return model.double().eval()


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of bytes in state-spaces' layout, with random weights."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("bytes") / "model"
    folder.mkdir()
    model = Mamba1LM(Mamba1Config(vocab_size=256, embed_dim=16, depth=3, d_state=4))
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # far from uniform, so that models differ
    state = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    torch.save({**state, "lm_head.weight": state["backbone.embedding.weight"]}, folder / "pytorch_model.bin")
    said = {"d_model": 16, "n_layer": 3, "vocab_size": 256, "ssm_cfg": {"d_state": 4}, "rms_norm": True}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 12,000 bytes, with words that come again."""
    draw = torch.Generator().manual_seed(0)
    words = ["state", "space", "token", "scan", "gate", "norm", "prune", "drop"]
    picks = torch.randint(len(words), (2400,), generator=draw).tolist()
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(words[pick] for pick in picks)[:12000])
    return path


Ids = Callable[[LanguageModel, int, int], Tensor]


@pytest.fixture
def ids() -> Ids:
    """Random numbers of tokens (count, length) for a model."""

    def make(model: LanguageModel, count: int, length: int) -> Tensor:
        draw = torch.Generator().manual_seed(length)
        return torch.randint(model.config.vocab_size, (count, length), generator=draw)

    return make
