"""`load_state_dict`: weights of a compressed model go into one compressed alike, a dense one's into a dense one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

import ssmprune_cli
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone, Detections

GOLDEN = Path(__file__).parents[1] / "golden"
VIM_LIKE = GOLDEN / "containers" / "vim_like.pth"
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def made(**options: Any) -> Backbone:
    """The checkpoint, compressed if there are options."""
    model = ssmprune_cli.load(VIM_LIKE)
    if options:
        ssmprune_cli.compress(model, **options)
    return model


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


CALIBRATED: dict[str, Any] = {"keep": 0.6, "calibration": IMAGES}
BARE: dict[str, Any] = {"keep": 0.6, "alignment": "none"}  # its pruner has no buffers


@pytest.mark.parametrize("options", [{}, CALIBRATED, BARE], ids=["dense", "calibrated", "bare"])
def test_alike_loads_all(options: dict[str, Any]) -> None:
    first, second = made(**options), made(**({**options, "calibration": 2 * IMAGES} if options else {}))
    for value in first.parameters():
        value.data.add_(0.01)
    second.load_state_dict(through_a_file(first.state_dict()))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    with torch.inference_mode():
        assert torch.equal(first(IMAGES), second(IMAGES))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (
            CALIBRATED,
            {},
            r"of a compressed model.*pruner\.alignment_1(.|\n)*Compress this model in the same way",
        ),
        (BARE, {}, "weights of a compressed model"),
        ({}, CALIBRATED, r"of a dense model, and this one is compressed(.|\n)*restore\(model\)"),
        ({}, BARE, "of a dense model, and this one is compressed"),
        (CALIBRATED, BARE, r"compressed otherwise: pruner\.alignment_1 is left over"),
        (BARE, CALIBRATED, r"compressed otherwise: pruner\.alignment_1 is missing"),
        (CALIBRATED, {**CALIBRATED, "keep": 0.8}, r"compressed otherwise: schedule is .*15.*, and here"),
        (BARE, {**BARE, "reduction": "drop"}, "reduction is context, and here drop"),
    ],
)
def test_otherwise_nothing_is_loaded(source: dict[str, Any], target: dict[str, Any], message: str) -> None:
    state, model = made(**source).state_dict(), made(**target)
    for value in state.values():
        value.add_(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_metadata_the_names_tell() -> None:
    plain = dict(made(**CALIBRATED).state_dict())
    with pytest.raises(UsageError, match="weights of a compressed model"):
        made().load_state_dict(plain)
    made(**{**CALIBRATED, "keep": 0.8}).load_state_dict(plain)  # of other settings nothing is left


def test_not_strict_is_not_asked() -> None:
    result = made().load_state_dict(made(**CALIBRATED).state_dict(), strict=False)
    assert result.unexpected_keys == [f"pruner.alignment_{block}" for block in (1, 2, 3)]


def test_models_are_short_to_print() -> None:
    model = made(**CALIBRATED)
    assert repr(model) == (
        "Vim(64x64 pixels, 4 blocks, 115,306 parameters, TokenPruner(39, 24, 15 patch tokens after 1, 2, 3 blocks, "
        "clip/context/calibrated))"
    )
    ssmprune_cli.restore(model)
    assert repr(model) == "Vim(64x64 pixels, 4 blocks, 115,306 parameters)"
    assert len(repr(ssmprune_cli.prepare(model))) < 80


def test_detections_are_short_to_print() -> None:
    scores = torch.tensor([0.75, 0.5])
    found = Detections(torch.zeros(2, 4), scores, torch.zeros(2), torch.zeros(2, 9, 9))
    assert repr(found) == "Detections(2 objects, best score 0.750)"
    assert repr(Detections(*(each[:0] for each in vars(found).values()))) == "Detections(0 objects)"
