"""A model from scratch: what its settings may be, and that its checkpoint is read back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.workflows.finetune.new_model import build, start_from, write_checkpoint

SMALL = ["image_size=[16, 16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=2", "num_classes=2"]
NAME = "vim_small_midclstok_div2"


def make_model(seed: int = 0) -> Backbone:
    return build("vim", SMALL, name=NAME, seed=seed)


def test_checkpoint_loads_as_the_same_model_in_half_precision(tmp_path: Path) -> None:
    model = make_model().eval()
    path = tmp_path / "new" / "vim_small.pth"
    write_checkpoint(path, model, name=NAME, epoch=3)
    loaded = checkpoint.load(path)
    assert loaded.config == model.config
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value.half().float(), rtol=0, atol=0)
    write_checkpoint(tmp_path / "again.pth", model, name=NAME, epoch=3)
    assert (tmp_path / "again.pth").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["vim_small.pth"]  # no temporary file stays


@pytest.mark.parametrize(
    ("family", "setting", "name", "message"),
    [
        ("vim", "dept=2", NAME, "`--set dept=2` is no setting of vim"),
        ("vim", "depth", NAME, "`--set depth` is no setting of vim"),
        ("vim", "image_size=[48", NAME, "is not a value"),
        ("vim", "depth=deep", NAME, "depth: Input should be a valid integer"),
        ("vim", "norm=batch", NAME, "norm: Input should be 'rms' or 'layer'"),
        ("vim", "stride=4", "vim_small_clstok_div2", "another class_token$"),
        ("vim", "class_token=head", NAME, "another class_token$"),
        ("vim", "divide_out=false", NAME, "another divide_out$"),
        ("vmi", "depth=2", NAME, "Did you mean 'vim'"),
    ],
)
def test_settings_of_the_model_are_checked(family: str, setting: str, name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(family, [*SMALL, setting], name=name, seed=0)
    assert re.search(message, caught.value.what)


@pytest.mark.parametrize("larger", [["image_size=[32, 32]"], ["image_size=[18, 18]", "stride=2"]], ids=" ".join)
def test_a_start_on_a_finer_grid_resizes_the_positions_alone(tmp_path: Path, larger: list[str]) -> None:
    write_checkpoint(tmp_path / "start.pth", make_model(seed=1), name=NAME, epoch=1)
    model = build("vim", [*SMALL, *larger], name=NAME, seed=0)
    start_from(model, tmp_path / "start.pth")
    start = checkpoint.load(tmp_path / "start.pth").state_dict()
    state = model.state_dict()
    assert state.pop("pos_embed").shape == (1, 8 * 8 + 1, 16)
    assert all(torch.equal(value, start[key]) for key, value in state.items())
    middle = (model.get_parameter("pos_embed")[:, 32], start["pos_embed"][:, 8])  # the class token's own place
    assert torch.equal(*middle)


def test_a_start_of_another_width_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "start.pth", make_model(), name=NAME, epoch=1)
    with pytest.raises(UsageError, match="embed_dim is 16, not 32"):
        start_from(build("vim", [*SMALL, "embed_dim=32"], name=NAME, seed=0), tmp_path / "start.pth")
