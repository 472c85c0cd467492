"""The README's example of a model of your own, as it stands there, on three people's models."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapt.modules import classifier

README = Path(__file__).parents[2] / "README.md"


def of_transformers() -> tuple[nn.Module, Tensor]:
    library = pytest.importorskip("transformers")
    config = library.MambaConfig(
        hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=20, use_cache=False, pad_token_id=0
    )
    return library.MambaForCausalLM(config), torch.randint(20, (4, 12))


def of_mambapy() -> tuple[nn.Module, Tensor]:
    library = pytest.importorskip("mambapy.mamba")
    return library.Mamba(library.MambaConfig(d_model=16, n_layers=2, d_state=4)), torch.randn(4, 12, 16)


def by_hand() -> tuple[nn.Module, Tensor]:
    return classifier(depth=2), torch.randn(4, 12, 8)


@pytest.mark.parametrize("build", [of_transformers, of_mambapy, by_hand])
def test_the_example_runs(build: Callable[[], tuple[nn.Module, Tensor]], capsys: pytest.CaptureFixture[str]) -> None:
    section = README.read_text(encoding="utf-8").split("## Your own model")[1]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    torch.manual_seed(0)
    model, inputs = build()
    with torch.no_grad():
        own = model.eval()(inputs)
        names: dict[str, Any] = {"model": model, "inputs": inputs}
        exec(compile(code, str(README), "exec"), names)
    logits, answer = (getattr(each, "logits", each) for each in (own, names["answer"]))
    assert answer.shape == logits.shape and not torch.equal(answer, logits)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "2 of 2 mixers by our ops" and all(line.endswith(": Mamba") for line in said[1:3])
    tokens = names["done"].tokens
    assert said[3] == f"{tokens} {names['done'].protected} {names['done'].fill}" and tokens[1] < tokens[0] == 12
