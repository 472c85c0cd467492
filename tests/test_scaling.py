"""Figures by length: a long measurement is cut short, and its rounds are those that were timed."""

from __future__ import annotations

import pytest
import torch

from ssmprune_cli.models.language.mamba1.model import Mamba1Config, Mamba1LM
from ssmprune_cli.workflows import scaling as wing
from ssmprune_cli.workflows.scaling import scaling


def test_rounds_are_those_of_the_time_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Mamba1LM(Mamba1Config(vocab_size=9, embed_dim=8, depth=1, d_state=2, length=16)).eval()
    for seconds, rounds in ((0.0, 3), (1e9, 5)):
        monkeypatch.setattr(wing, "_SECONDS", seconds)
        found = scaling({"model": model}, [8, 16], unit="tokens", rounds=5)
        assert [(point.tokens, point.rounds) for point in found.points["model"]] == [(8, rounds), (16, rounds)]
