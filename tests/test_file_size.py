"""`--target-size`: what is tried, in what order, and what is said where nothing is small enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import BudgetError, UsageError
from ssmprune_cli.models import Backbone, Size, cuts, put_in_eight_bits, smaller
from ssmprune_cli.recipe import Recipe, load_recipe
from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
from ssmprune_cli.workflows.compress.file_size import small_enough
from ssmprune_cli.workflows.compress.make import Made
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.source import Source

SOURCE = Source(Path(__file__).parent / "golden" / "containers" / "vim_like.pth")
KINDS = ("in_proj", "x_proj", "out_proj")


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calib") / "images.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8))
    return path


def size(blocks: int = 0) -> int:
    """Of the file of the model in eight bits without so many blocks."""
    model = smaller(SOURCE.load(), Size(cut=blocks))
    put_in_eight_bits(model, model.layers_of(KINDS))
    return checkpoint.weights_size(model)


def found(target: int, calib: Path, **options: Any) -> tuple[Recipe, Made]:
    request = CompressRequest(SOURCE, target_size=target, calib=calib, out=Path("out"), **options)
    request.check()
    return small_enough(request, request.resolved(), SOURCE.load(), None)


@pytest.mark.parametrize("blocks", [0, 2])
def test_eight_bits_come_first_and_then_fewer_blocks(blocks: int, calib: Path) -> None:
    target = size(blocks) if blocks == 0 else size(blocks - 1) - 1
    recipe, made = found(target, calib)
    assert (recipe.pruning.weights, recipe.pruning.int8) == ("int8", KINDS)
    assert recipe.pruning.cut_blocks == (blocks or None) and not recipe.pruning.drops_tokens
    assert made.model.eight_bit_kinds == KINDS and len(made.model.blocks) == 4 - blocks
    assert checkpoint.weights_size(made.model) <= target


def test_what_a_pruner_adds_counts(calib: Path) -> None:
    """Deltas that were calibrated are in the file: what fits without them may not with them."""
    options: dict[str, Any] = {"keep": "0.5", "points": "1", "reduction": "drop", "alignment": "calibrated"}
    recipe, made = found(size(), calib, **options)
    assert recipe.pruning.keep == 0.5 and recipe.pruning.cut_blocks == 1 and made.drops
    assert checkpoint.weights_size(made.model) <= size()


def test_floats_stay_where_they_are_small_enough(calib: Path) -> None:
    dense = checkpoint.weights_size(SOURCE.load())
    recipe, made = found(2 * dense, calib, keep="0.5", reduction="drop")
    assert recipe.pruning.weights == "float" and made.eight_bits is None
    recipe, made = found(2 * dense, calib, keep="0.5", reduction="drop", weights="int8")
    assert recipe.pruning.int8 == KINDS == made.model.eight_bit_kinds


def test_what_cannot_be_reached_and_what_is_met_already(calib: Path) -> None:
    reference = SOURCE.load()
    with pytest.raises(BudgetError, match=r"--target-size: the weights of the dense model take 0\.\d+ MB: 5 are met"):
        found(5_000_000, calib)
    smallest = f"{size(len(cuts(reference))) / 1e6:.2f} MB"
    with pytest.raises(BudgetError, match=f"0.001 MB cannot be reached: the smallest that was tried takes {smallest}"):
        found(1000, calib)
    with pytest.raises(BudgetError, match="or leave out `--keep-blocks`"):
        found(size() - 1, calib, keep_blocks=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_speedup": 1.4}, "a search settles how much to drop"),
        ({"cut_blocks": 1}, "--cut-blocks: a size settles which blocks"),
        ({"recipe": "vim_tiny_gflops1.0"}, "--recipe: a size settles which blocks"),
        ({"overrides": ("pruning.weights=int8",)}, "--set pruning.weights=int8: a size settles"),
        ({"calib": None}, "--target-size needs --calib"),
        ({"dry_run": True}, "so it cannot be a dry run"),
        ({"keep_image_size": True}, "--keep-image-size is for a search"),
    ],
)
def test_what_does_not_go_with_a_size_is_refused(options: dict[str, Any], said: str) -> None:
    given = {"target_size": 1000, "calib": Path("calib"), "out": Path("out"), **options}
    with pytest.raises(UsageError, match=said):
        CompressRequest(SOURCE, **given).check()


def test_a_size_beside_a_limit_on_accuracy_is_no_search() -> None:
    request = CompressRequest(
        SOURCE, target_size=1000, data=Path("data"), calib=Path("calib"), limits=Limits(max_drop=1)
    )
    assert not request.searched


def test_the_size_is_in_the_report_and_the_recipe_makes_the_same_file(calib: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    cheap: dict[str, Any] = {"calib": calib, "samples": 0, "batch_size": 1}
    compress_checkpoint(CompressRequest(SOURCE, target_size=size(1), out=out, **cheap))
    file = out / "model.safetensors"
    told = json.loads((out / "report.json").read_text())["target"]
    assert told == {"kind": "size_bytes", "value": size(1), "measured": file.stat().st_size, "met": True}
    assert f"Asked for: a file of weights of {size(1):,} bytes; it has {file.stat().st_size:,}." in " ".join(
        (out / "README.md").read_text().split()
    )
    pruning = load_recipe(str(out / "recipe.yaml")).pruning
    assert (pruning.cut_blocks, pruning.int8) == (1, KINDS)
    compress_checkpoint(CompressRequest(SOURCE, recipe=str(out / "recipe.yaml"), out=again, **cheap))
    assert (again / "model.safetensors").read_bytes() == file.read_bytes()


def test_models_of_every_size_have_the_bytes_that_were_foretold() -> None:
    from ssmprune_cli.workflows.compress.file_size import bytes_in_eight_bits

    model: Backbone = SOURCE.load()
    assert abs(bytes_in_eight_bits(model, KINDS) - size()) < 100 * len(model.state_dict())  # names in the header
