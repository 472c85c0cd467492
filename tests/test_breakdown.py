"""The parts of a forward pass add up, every family has those it should, and the floor counts what is there to count."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ssmprune_cli import checkpoint
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.finetune.new_model import build
from ssmprune_cli.workflows.measure.breakdown import time_by_part
from ssmprune_cli.workflows.measure.floor import Arithmetic, floor
from ssmprune_cli.workflows.profile import profile
from ssmprune_cli.workflows.reporting.describe import timed_rounds

SMALL = ["image_size=[16, 16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=3", "num_classes=2"]


def vim() -> Backbone:
    return build("vim", SMALL, name="vim_midclstok_div2", seed=0).eval()


def plainmamba() -> Backbone:
    return PlainMamba(PlainMambaConfig(image_size=(32, 32), patch_size=8, embed_dim=16, depth=3, num_classes=3)).eval()


def vmamba() -> Backbone:
    return VMamba(VMambaConfig(image_size=(32, 32), embed_dim=16, depths=(2, 2), num_classes=3)).eval()


@pytest.mark.parametrize("make", [vim, plainmamba, vmamba])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_the_parts_add_up_and_none_is_missing(make: Callable[[], Backbone], keep: float) -> None:
    torch.manual_seed(0)
    model = make()
    compress(model, keep, points=[1], alignment="none")
    (found,) = profile([model], batch_size=2, rounds=2)
    assert sum(found.time_ms.values()) == pytest.approx(found.speed.median_ms)
    parts = {"projections", "convolution", "scan", "norms", "outside the blocks", "other"}
    assert all(found.time_ms[part] > 0 for part in parts), found.time_ms
    if keep < 1:
        assert found.time_ms["gather"] > 0
    assert found.floor.multiply_adds_ms > 0 and found.floor.bytes_ms > 0
    assert found.to_dict()["floor"]["total_ms"] == max(found.floor.multiply_adds_ms, found.floor.bytes_ms)


class Slow(nn.Module):
    """A pruner that takes 30 ms after every block, in an op: sleeping is not an op, so it spins on one."""

    def wants(self, block: int) -> Wanted:
        return "tokens"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        end = time.perf_counter() + 0.03
        while time.perf_counter() < end:
            torch.ones(200, 200).sum()
        return sequence


def test_what_the_pruner_does_is_gather_whatever_op_it_is() -> None:
    model = vim()
    model.pruner = Slow()
    images = torch.zeros(1, 3, 16, 16)
    times = time_by_part(prepare(model), images, total_ms=1000.0, rounds=1)
    # Three blocks of 30 ms; ops take most of it, whatever else the machine does.
    assert 30 < times["gather"] < 1000
    squeezed = time_by_part(prepare(model), images, total_ms=1.0, rounds=1)  # watched ops took longer than that: scaled
    assert sum(squeezed.values()) == pytest.approx(1.0) and squeezed["gather"] > 0.5
    assert all(not hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks))


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-3, 10), (2.0, 10), (4.0, 5), (60.0, 3)])
def test_a_slow_model_is_timed_in_fewer_rounds(seconds: float, rounds: int) -> None:
    assert timed_rounds(seconds) == rounds


def test_arithmetic_is_counted_by_kind_and_shape() -> None:
    layer, other = nn.Linear(3, 5), nn.Linear(5, 3)
    x = torch.zeros(4, 3)
    with torch.inference_mode(), Arithmetic() as found:
        other(layer(layer(x).sum(dim=0).expand(4, 5)[:, :3]))
    assert sorted(found.counts.values()) == [1, 1, 1]  # the expanded input has other strides
    linear = 4 * (15 + 5 + 12 + 20)  # weight, bias, input, output, in floats of four bytes
    assert found.bytes == linear + linear + 4 * (15 + 3 + 20 + 12)


def test_the_floor_of_a_model_has_its_products_and_scans() -> None:
    model = vim()
    images = torch.zeros(2, 3, 16, 16)
    with torch.inference_mode(), Arithmetic() as found:
        model(images)
    kinds = {kind: sum(n for key, n in found.counts.items() if key.startswith(kind)) for kind in ("selective_scan",)}
    assert kinds == {"selective_scan": 6}  # two directions in three blocks
    # For each block: in_proj, x_proj and dt_proj for two directions, out_proj; and the head.
    assert sum(found.counts.values()) - 6 == 3 * (1 + 2 * 2 + 1) + 1
    session = prepare(model)
    assert floor(session, images, rounds=1).total_ms > 0
    with torch.inference_mode(), Arithmetic() as joined:
        session(images)
    # The blocks are one op, which the head follows; what stays inside it is not read or written.
    assert sum(joined.counts.values()) == 2 and joined.bytes < found.bytes


def test_profile_prints_parts_and_floor(ssmprune_profile: str) -> None:
    assert "Where the time goes" in ssmprune_profile and "of what this machine can do" in ssmprune_profile


@pytest.fixture
def ssmprune_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    from typer.testing import CliRunner

    from ssmprune_cli.cli.app import app

    model = vim()
    compress(model, 0.5, alignment="none")
    checkpoint.save(tmp_path / "out", model)
    runner = CliRunner()
    plain = runner.invoke(app, ["profile", str(tmp_path / "out"), "--rounds", "1", "--batch-size", "1"])
    assert plain.exit_code == 0, plain.output
    done = runner.invoke(app, ["profile", str(tmp_path / "out"), "--rounds", "1", "--batch-size", "1", "--json"])
    (values,) = json.loads(done.stdout)["models"]
    assert set(values["floor"]) == {"multiply_adds_ms", "bytes_ms", "total_ms"} and "scan" in values["time_ms"]
    return plain.stdout


def test_the_floor_takes_fused_ops_where_they_take_less(monkeypatch: pytest.MonkeyPatch) -> None:
    # With a second for each call, fewer calls win: the head's and that of the blocks in one op.
    module = sys.modules[floor.__module__]
    monkeypatch.setattr(module, "_least", lambda call, images, rounds: 1.0)
    assert floor(prepare(vim()), torch.zeros(2, 3, 16, 16)).multiply_adds_ms == 2000
