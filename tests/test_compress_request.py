"""What a compression is asked for: combinations that are refused, the recipe that options make, dry runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import DataError, RecipeError, UsageError
from ssmprune_cli.pruning import ALIGNMENT_IMAGES, TokenPruner
from ssmprune_cli.recipe import load_recipe
from ssmprune_cli.report import ModelSpeed, SpeedFacts
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
from ssmprune_cli.workflows.compress.request import SEARCH_IMAGES
from ssmprune_cli.workflows.compress.run import _slow
from ssmprune_cli.workflows.identity import weights_sha256
from ssmprune_cli.workflows.inspect import inspect
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.reporting import read_entries, summary
from ssmprune_cli.workflows.source import Source

SOURCE = Source(Path(__file__).parent / "golden" / "containers" / "vim_like.pth")
NOWHERE = Path("no-such-folder")


def request(**options: Any) -> CompressRequest:
    return CompressRequest(SOURCE, **{"out": NOWHERE, **options})


def test_dense_models_are_calibrated_on_fewer_images_unless_it_is_said_how_many() -> None:
    for task in TASKS.names():
        asked = request(keep="0.6", calib=NOWHERE)
        fitted = asked.fitted(asked.resolved(), TASKS.get(task)).calibration.images
        assert fitted == {"segmentation": 16, "detection": 8}.get(task, 1024)
        asked = request(keep="0.6", calib=NOWHERE, calib_images=40)
        assert asked.fitted(asked.resolved(), TASKS.get(task)).calibration.images == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "how fast is the model to be"),
        ({"overrides": ("pruning.points=[1]",)}, "how fast is the model to be"),
        ({"keep": "0.6", "tokens": "30,20,10"}, "--keep and --tokens both"),
        ({"keep": "0.6", "overrides": ("pruning.keep=0.5",)}, "another option says what pruning.keep is"),
        ({"keep": "0.6", "overrides": ("pruning.tokens=[1]",)}, "another option says what pruning.tokens is"),
        ({"keep": "0.6", "seed": 1, "overrides": ("seed=2",)}, "another option says what seed is"),
        ({"keep": "0.6", "time_limit": 1.0}, "--time-limit is for a search"),
        ({"keep": "0.6", "state": NOWHERE}, "--state is for a search"),
        ({"keep": "0.6", "calib_images": 3}, "--calib-images needs --calib"),
        ({"keep": "0.6", "repair": "head"}, "--repair needs --calib"),
        (
            {"keep": "0.6", "repair": "none", "overrides": ("pruning.repair=head",)},
            "another option says what pruning.rep",
        ),
        ({"keep": "0.6", "dataset": "npz"}, "--dataset needs --data"),
        ({"keep": "0.6", "limit": 3}, "--limit needs --data"),
        ({"keep": "0.6", "slide": (8, 4)}, "--slide needs --data"),
        ({"keep": "0.6", "limits": Limits(max_drop=1)}, "--max-drop needs --data"),
        ({"keep": "0.6", "limits": Limits(min_accuracy=1)}, "--min-accuracy needs --data"),
        ({"keep": "0.6", "dry_run": True, "limits": Limits(max_latency_ratio=1)}, "nothing is measured in a dry run"),
        ({"keep": "0.6", "out": None}, "--out is missing"),
        ({"target_flops": 0.8}, "needs calibration images"),
        ({"target_flops": 0.8, "calib": NOWHERE, "dry_run": True}, "cannot be a dry run"),
        ({"target_flops": 0.8, "target_latency": 3.0, "calib": NOWHERE}, "a target settles what to keep"),
        ({"target_speedup": 1.4, "target_latency_ratio": 0.8, "calib": NOWHERE}, "a target settles what to keep"),
        ({"target_speedup": 0.9, "calib": NOWHERE}, "must be above 1, not 0.9"),
        ({"target_latency": -3.0, "calib": NOWHERE}, "must be a finite number above 0, not -3"),
        ({"target_latency_ratio": float("nan"), "calib": NOWHERE}, "must be a finite number above 0, not nan"),
        ({"limits": Limits(max_drop=1), "data": NOWHERE}, "needs calibration images"),
        ({"target_flops": 0.8, "keep": "0.6", "calib": NOWHERE}, "a target settles what to keep"),
        ({"target_flops": 0.8, "tokens": "3", "calib": NOWHERE}, "a target settles what to keep"),
        ({"resize": 48, "overrides": ("pruning.image_size=40",)}, "another option says what pruning.image_size is"),
        ({"target_flops": 0.8, "resize": 48, "calib": NOWHERE}, "a target settles what to keep"),
        ({"target_flops": 0.8, "points": "1", "calib": NOWHERE}, "a target settles what to keep"),
        ({"target_flops": 0.8, "recipe": "x", "calib": NOWHERE}, "a target settles what to keep"),
        ({"target_flops": 0.8, "overrides": ("pruning.reduction=drop",), "calib": NOWHERE}, "settles how to prune"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(**options).check()
    with pytest.raises(UsageError, match=message):
        compress_checkpoint(request(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 48, "importance": "clip"}, "--importance: is about dropping tokens, and none are"),
        ({"resize": 48, "overrides": ("pruning.reduction=drop",)}, "--reduction: is about dropping tokens"),
        ({"resize": 48, "points": "1"}, "`points` say where tokens are dropped"),
        ({"resize": 0}, "must be at least 1, not 0"),
        ({"resize": 64}, "so 64 is no smaller side"),
        ({"cut_blocks": 4}, "--cut-blocks 4: of this vim 3 blocks at most can be cut"),
        ({"cut_blocks": 1, "target_flops": 0.8, "calib": NOWHERE}, "a target settles what to keep"),
        ({"cut_blocks": 1, "keep_blocks": True}, "--keep-blocks is for a search"),
        ({"resize": 50, "keep": "0.6"}, "patches do not fill images of 50 pixels"),
        ({"overrides": ("pruning.image_size=null",)}, "give `keep`"),
    ],
)
def test_what_is_refused_of_smaller_images(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compress_checkpoint(request(**options, dry_run=True))


def test_smaller_images_alone_or_before_tokens_are_dropped() -> None:
    alone = request(resize=48).resolved().pruning
    assert (alone.image_size, alone.drops_tokens) == (48, False)
    assert request(overrides=("pruning.image_size=48",)).resolved().pruning == alone
    limited = request(resize=48, data=NOWHERE, limits=Limits(max_drop=1))
    assert not limited.searched and limited.resolved().pruning == alone, "a limit is no search for another way"
    both = request(resize=48, keep="0.6").resolved().pruning
    assert (both.image_size, both.keep) == (48, 0.6)
    report = compress_checkpoint(request(resize=48, dry_run=True)).report
    assert report.pruned is not None and (report.image_size, report.resized_from) == ((48, 48), (64, 64))
    assert (report.dense.tokens_per_block, report.pruned.tokens_per_block) == ((65,) * 4, (37,) * 4)
    assert report.pruning is None and report.called == "resized" and not report.warnings
    report = compress_checkpoint(request(resize=48, keep="0.5", dry_run=True)).report
    assert report.pruned is not None and report.pruned.tokens_per_block == (37, 19, 10, 6)
    assert report.called == "pruned"


def test_what_cannot_be_judged_is_said_before_the_search(tmp_path: Path) -> None:
    pixels = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.array([0, 99]))
    asked = request(target_flops=0.8, calib=NOWHERE, data=tmp_path / "images.npz", out=tmp_path / "out")
    with pytest.raises(DataError, match="has the label 99"):
        compress_checkpoint(asked)
    with pytest.raises(DataError, match="no-such-folder"):
        compress_checkpoint(replace(asked, data=None))


def test_a_search_among_no_methods_is_wrong_usage(tmp_path: Path) -> None:
    """`mask` saves nothing."""
    with pytest.raises(UsageError, match="no method of these names"):
        compress_checkpoint(request(target_flops=0.8, reduction="mask", calib=NOWHERE, out=tmp_path / "out"))


def test_options_make_a_recipe() -> None:
    made = request(keep="0.9,0.8", points="1,3", importance="delta", calib=NOWHERE, calib_images=7, seed=3)
    made.check()
    recipe = made.resolved()
    assert (recipe.pruning.keep, recipe.pruning.tokens, recipe.pruning.points) == ((0.9, 0.8), None, (1, 3))
    assert (recipe.pruning.importance, recipe.calibration.images, recipe.calibration.seed, recipe.seed) == (
        "delta",
        7,
        3,
        3,
    )
    assert request(keep="0.6").resolved().pruning.keep == 0.6
    assert request(tokens="30").resolved().pruning.tokens == (30,)
    assert request(overrides=("pruning.keep=0.5",)).resolved().pruning.keep == 0.5
    with pytest.raises(UsageError, match=r"^--keep: must be above 0"):
        request(keep="1.5").resolved()
    with pytest.raises(RecipeError, match="did you mean"):
        request(recipe="vim_smal_topvim").resolved()


def test_options_override_a_recipe_and_amounts_replace_each_other() -> None:
    file = "vim_small_topvim"
    own = request(recipe=file).resolved()
    changed = request(recipe=file, tokens="30,20,10", points="1,2,3").resolved()
    assert own.pruning != changed.pruning
    assert (changed.pruning.keep, changed.pruning.tokens) == (None, (30, 20, 10)) and changed.training == own.training


def test_a_search_takes_its_own_number_of_images_unless_told() -> None:
    asked = request(target_flops=0.8, calib=NOWHERE)
    asked.check()
    assert asked.search_images(asked.resolved()) == SEARCH_IMAGES
    told = replace(asked, calib_images=9)
    assert told.search_images(told.resolved()) == told.resolved().calibration.images == 9


@pytest.mark.parametrize(
    ("options", "alignment"),
    [
        ({"calib": NOWHERE}, "calibrated"),
        ({}, "null"),
        ({"alignment": "neighbour"}, "neighbour"),
        ({"alignment": "calibrated", "calib": NOWHERE}, "calibrated"),
        ({"reduction": "local-merge"}, "mass"),
        ({"reduction": "local-merge", "calib": NOWHERE}, "mass"),
    ],
)
def test_a_dry_run_names_the_alignment_that_the_run_takes(options: dict[str, Any], alignment: str) -> None:
    result = compress_checkpoint(request(keep="0.6", dry_run=True, **options))
    assert result.out is None and not NOWHERE.exists()
    assert result.report.pruning is not None and result.report.pruning.alignment == alignment
    with pytest.raises(UsageError, match="needs calibration images"):
        compress_checkpoint(request(keep="0.6", dry_run=True, alignment="calibrated"))


def test_a_run_and_its_dry_run_agree_and_the_verdicts_are_in_the_report(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(12) % 10)
    asked = request(
        keep="0.5",
        reduction="context",
        calib=tmp_path / "images.npz",
        data=tmp_path / "images.npz",
        limit=8,
        samples=0,
        limits=Limits(max_drop=1.0, max_flops=0.9, max_latency_ratio=100.0),
        out=tmp_path / "out",
    )
    result = compress_checkpoint(asked)
    dry = compress_checkpoint(replace(asked, dry_run=True, limits=Limits(max_flops=0.9))).report
    report = result.report
    assert (report.pruning, report.dense, report.pruned) == (dry.pruning, dry.dense, dry.pruned)
    assert result.out == tmp_path / "out" and result.warnings == report.warnings
    kind = "8 of the --data images are among the --calib images"
    assert sum(kind in each for each in report.warnings) == 1
    assert report.accuracy is not None and report.accuracy.count == 8
    assert {each.name: each.holds for each in report.limits} == {
        "max_drop": False,  # eight images cannot show that it lost less than a point
        "max_flops": True,
        "max_latency_ratio": True,
    }
    assert [each.name for each in dry.limits] == ["max_flops"]


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.7, 0.9), None),
        ((0.9, 1.1), "no faster than the dense one, as far as the timing tells"),
        ((1.1, 1.4), "slower"),
    ],
)
def test_a_model_that_gets_no_faster_is_a_warning(interval: tuple[float, float], said: str | None) -> None:
    side = ModelSpeed(
        median_ms=1.0,
        quartiles_ms=(1.0, 1.0),
        images_per_second=1.0,
        peak_memory_bytes=1,
        time_ms={},
        floor_ms=1.0,
    )
    ratio = sum(interval) / 2
    speed = SpeedFacts(
        batch_size=8,
        rounds=3,
        device="cpu",
        threads=1,
        backend="cpu",
        dense=side,
        pruned=side,
        latency_ratio=ratio,
        latency_ratio_interval=interval,
    )
    warnings = _slow(speed)
    assert (said is None) == (not warnings)
    assert all(said is not None and said in text and f"{ratio:.2f} times" in text for text in warnings)


def test_how_many_images_a_repair_and_its_absence_ask_for() -> None:
    def count(**options: Any) -> int:
        return request(**{"keep": "0.6", "calib": NOWHERE, **options}).resolved().calibration.images

    assert count() == count(repair="auto") == count(repair="head") == 1024
    assert count(repair="none") == count(overrides=("pruning.repair=none",)) == ALIGNMENT_IMAGES == 64
    assert count(repair="none", calib_images=300) == count(calib_images=300) == 300
    assert count(repair="none", overrides=("calibration.images=90",)) == 90
    with pytest.raises(UsageError, match="--repair: must be"):
        count(repair="everything")
    assert count(keep=None, target_flops=0.6) == 1024, "for the model that a search finds"


def test_a_repair_is_in_the_artefact_its_report_and_its_recipe(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (140, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    asked = request(keep="0.3", reduction="context", calib=tmp_path / "images.npz", out=tmp_path / "out", samples=0)
    result = compress_checkpoint(asked)
    facts = result.report.repair
    assert facts is not None and facts.images == facts.held_back == 140 and facts.divergence_before is not None
    assert result.report.calibration is not None and result.report.calibration.images == ALIGNMENT_IMAGES
    assert result.report.provenance["calibration_images"] == 140
    few = "The repair had 140 images; 1,024 are the least to recommend."
    assert [each for each in result.warnings if "than the dense one" not in each] == [few]
    assert facts.kind != "none", "a random model is linear enough in what it lost"
    model = checkpoint.load(tmp_path / "out")
    assert isinstance(model.pruner, TokenPruner) and model.pruner.settings.repair == facts.kind
    assert weights_sha256(model) == weights_sha256(SOURCE.load()), "the dense weights do not change"
    (line,) = (text for text in summary(read_entries([tmp_path / "out"])).splitlines() if "Repair:" in text)
    assert f"to {facts.divergence_after:.3f} nats on 140 held-back images" in line
    assert line in (tmp_path / "out" / "README.md").read_text()
    assert "<h2>Repair</h2>" in (tmp_path / "out" / "report.html").read_text()
    assert load_recipe(tmp_path / "out" / "recipe.yaml").pruning.repair == facts.kind
    # The recipe gives the same bytes, and so does the artefact itself in the place of the dense checkpoint.
    again = replace(
        asked,
        source=Source(tmp_path / "out"),
        keep=None,
        recipe=str(tmp_path / "out" / "recipe.yaml"),
        out=tmp_path / "b",
    )
    compress_checkpoint(again)
    for name in ("model.safetensors", "config.json", "calibration.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert inspect(tmp_path / "out").pruning["repair"] == facts.kind  # type: ignore[index]


def test_a_repair_that_was_asked_for_and_refused_is_a_warning(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    asked = request(keep="0.6", reduction="context", calib=tmp_path / "images.npz", out=tmp_path / "out", samples=0)
    result = compress_checkpoint(asked)
    assert not any("repair" in each for each in result.warnings), "auto says it in the report alone"
    assert result.report.repair is not None and result.report.repair.kind == "none"
    assert "Repair: none; 20 images are too few" in (tmp_path / "out" / "README.md").read_text()
    result = compress_checkpoint(replace(asked, repair="head", calib_images=30, overwrite=True))
    assert any("The repair 'head' was refused: 20 images are too few" in each for each in result.warnings)
    assert "Only 20 of 30 calibration images were found." in result.warnings
    result = compress_checkpoint(replace(asked, repair="none", overwrite=True))
    assert result.report.repair is None and "Repair" not in (tmp_path / "out" / "README.md").read_text()


def test_a_model_for_smaller_images_is_repaired_too(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    asked = request(
        keep="0.5", reduction="context", resize=48, calib=tmp_path / "images.npz", out=tmp_path / "out", samples=0
    )
    facts = compress_checkpoint(asked).report.repair
    assert facts is not None and facts.images == 70 and facts.divergence_before is not None
    # With all tokens kept it is the model's own head that changes.
    alone = replace(asked, keep=None, reduction=None, overwrite=True)
    report = compress_checkpoint(alone).report
    facts = report.repair
    assert report.pruning is None and facts is not None and facts.kind == "head" and facts.divergence_after is not None
    plain = tmp_path / "plain"
    assert compress_checkpoint(replace(alone, repair="none", out=plain)).report.repair is None
    repaired, unrepaired = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", plain))
    changed = {name for name, value in repaired.items() if not torch.equal(value, unrepaired[name])}
    assert changed == {"head.weight", "head.bias"}
    again = compress_checkpoint(
        replace(alone, source=Source(tmp_path / "out"), resize=None, recipe=str(tmp_path / "out" / "recipe.yaml"))
    )
    assert again.report.repair is not None
    assert again.report.repair == facts.model_copy(update={"seconds": again.report.repair.seconds})
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == repaired.keys()
    result = compress_checkpoint(replace(alone, repair="head+side"))
    assert any("no mean of dropped ones" in each for each in result.warnings)
