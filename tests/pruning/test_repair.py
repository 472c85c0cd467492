"""Repair: the fit is the minimum it claims to be, the guard tells gain from noise, and every way of running agrees."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import ssmprune_cli
from ssmprune_cli import checkpoint
from ssmprune_cli.errors import CheckpointError, DataError, UsageError
from ssmprune_cli.export import export
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import Backbone
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.videomamba import VideoMamba, VideoMambaConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import (
    Correction,
    TokenPruner,
    compress,
    divergence,
    fold_head,
    is_repairable,
    quick_answers,
    repair,
    restore,
)
from ssmprune_cli.pruning.repair.features import Features, collect, model_runner
from ssmprune_cli.pruning.repair.fit import BIAS_RIDGE, Fit, Head, Ridge
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.measure import count_flops

DEMO = Path(__file__).parents[2] / "recipes" / "demo"
SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "stride": 4, "embed_dim": 16, "depth": 4, "num_classes": 5}
PLAIN: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_classes": 5, "d_conv": 3}
MODELS: dict[str, tuple[Callable[[], Backbone], list[int]]] = {  # and points, for VMamba in two stages
    "vim": (lambda: Vim(VimConfig(**SIZES)), [1, 3]),
    "vim, mean": (lambda: Vim(VimConfig(**SIZES, class_token="none")), [1, 3]),
    "videomamba": (lambda: VideoMamba(VideoMambaConfig(**SIZES)), [1, 3]),
    "mamba-reg": (lambda: MambaReg(MambaRegConfig(**SIZES, num_cls_tokens=4, cls_reduce=2)), [1, 3]),
    "plainmamba": (lambda: PlainMamba(PlainMambaConfig(**PLAIN)), [1, 3]),
    "vmamba": (lambda: VMamba(VMambaConfig(image_size=(32, 32), embed_dim=8, depths=(2, 3), num_classes=5)), [1, 3, 4]),
}


def make(name: str = "vim") -> Backbone:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the authors' start is so near to zero that mistakes would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images_of(model: Backbone, count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(seed))


def pruned(name: str = "vim", reduction: str = "context", keep: float = 0.5) -> Backbone:
    model = make(name)
    compress(model, keep, points=MODELS[name][1], reduction=reduction)
    return model


def pruner_of(model: Backbone) -> TokenPruner:
    assert isinstance(model.pruner, TokenPruner)
    return model.pruner


def corrected(model: Backbone) -> Backbone:
    """With a correction that nobody fitted."""
    torch.manual_seed(2)
    pruner, layer = pruner_of(model), model.output_layer
    side = {
        point: 0.3 * torch.randn(layer.in_features, model.mixers[point - 1].d_model) for point in pruner.dropping_points
    }
    pruner.correct(Correction((torch.randn_like(layer.weight), torch.randn(layer.out_features)), side))
    return model


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits


# The fit.


def problem(count: int, features: int, side: int, classes: int, seed: int = 0) -> tuple[Features, Tensor, Tensor]:
    """Features with a signal for the side features, and a head."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    weight, bias = normal(classes, features), normal(classes)
    pooled, beside = 2 * normal(count, features), 3 * normal(count, side) + 1
    lost = 0.5 * pooled @ normal(features, features) / features + beside @ normal(side, features) / max(side, 1)
    return Features(pooled, beside, (pooled + lost) @ weight.T + bias), weight, bias


def objective(head: Head, features: Features, weight: Tensor, bias: Tensor, ridge: Ridge) -> Tensor:
    """What `Fit` says that it minimises, written again in terms of the head."""
    scale = features.pooled.square().mean().sqrt()
    mean = features.side.mean(dim=0)
    deviation = (features.side - mean).square().mean(dim=0).sqrt()
    logits, dense = head.logits(features), features.dense
    if logits.shape[1] == 1:
        logits, dense = (torch.cat((each, torch.zeros_like(each)), dim=1) for each in (logits, dense))
    kl = functional.kl_div(logits.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    offset = head.bias + head.sides @ mean - bias
    return (
        kl
        + ridge.head * (scale * (head.weight - weight)).square().sum()
        + ridge.side * (head.sides * deviation).square().sum()
        + BIAS_RIDGE * offset.square().sum()
    )


@pytest.mark.parametrize(
    ("count", "features", "side", "classes"),
    [(120, 8, 12, 5), (120, 8, 0, 5), (120, 8, 12, 1), (90, 6, 10, 40), (40, 8, 60, 5), (30, 50, 70, 4)],
    ids=["few classes", "head alone", "one logit", "many classes", "more side than images", "more of all than images"],
)
def test_the_fit_is_the_minimum(count: int, features: int, side: int, classes: int) -> None:
    given, weight, bias = problem(count, features, side, classes)
    ridge = Ridge(0.01, 0.03)
    fit = Fit(given, weight, bias)
    head = fit.solve(ridge, steps=200)
    values = [each.clone().requires_grad_() for each in (head.weight, head.sides, head.bias)]
    found = objective(Head(*values), given, weight, bias, ridge)
    slopes = torch.autograd.grad(found, values)
    least = float(found.detach())
    columns = torch.linalg.qr(weight).Q  # with many classes the head stays among what its features can say
    for slope in slopes:
        assert not slope.numel() or float((columns.T @ slope).abs().max()) < 1e-4
    start = objective(Head(weight, torch.zeros_like(head.sides), bias), given, weight, bias, ridge)
    assert least < 0.9 * float(start)
    # Another start ends at the same place: the problem is convex.
    other = Fit(given, weight, bias)
    other.change = torch.randn(other.change.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    again = objective(other.solve(ridge, steps=200), given, weight, bias, ridge)
    assert float(again) == pytest.approx(least, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("classes", [1, 5, 40])
def test_side_features_move_into_the_feature_space_exactly(classes: int) -> None:
    given, weight, bias = problem(90, 8, 12, classes)
    head = Fit(given, weight, bias).solve(Ridge(0.01, 0.01))
    moved = (given.pooled + given.side @ head.projection().T) @ head.weight.T + head.bias
    torch.testing.assert_close(moved, head.logits(given), rtol=0, atol=1e-9)


def test_a_thousand_classes_on_few_images_in_bounded_memory() -> None:
    given, weight, bias = problem(128, 24, 48, 1000)
    fit = Fit(given, weight, bias)
    head = fit.solve(Ridge(0.01, 0.01))
    assert fit.change.numel() == 24 * (24 + 48 + 1), "no parameter for each class"
    before, after = (
        divergence(given.dense, logits).mean() for logits in (given.pooled @ weight.T + bias, head.logits(given))
    )
    assert float(after) < 0.8 * float(before)


def test_a_constant_side_feature_does_no_harm() -> None:
    given, weight, bias = problem(60, 6, 4, 3)
    given.side[:, 1] = 7.0
    head = Fit(given, weight, bias).solve(Ridge(0.01, 0.01))
    assert bool(head.sides.isfinite().all()) and float(head.sides[:, 1].abs().max()) < 1e-6


# In a model.


@pytest.mark.parametrize("reduction", ["drop", "context", "local-merge", "merge", "frozen", "pool", "fuse"])
@pytest.mark.parametrize("name", MODELS)
def test_a_corrected_model_computes_what_its_features_say(name: str, reduction: str) -> None:
    model = pruned(name, reduction)
    images = images_of(model)
    plain = logits_of(model, images)
    pruner = pruner_of(model)
    features = collect(pruner, len(model.mixers) - 1, model.output_layer.in_features, [images], model_runner(model))
    layer = model.output_layer
    expected = features.pooled @ layer.weight.double().T + layer.bias.double()
    torch.testing.assert_close(plain.double(), expected, rtol=0, atol=1e-5)
    weight, bias = (each.double() for each in corrected_head(corrected(model)))
    sides = torch.cat([each.double() for each in pruner.correction.side.values()], dim=1)
    assert features.side.shape == (3, sides.shape[1]) and float(features.side.std(dim=0).min()) > 0
    expected = (features.pooled + features.side @ sides.T) @ weight.T + bias
    torch.testing.assert_close(logits_of(model, images).double(), expected, rtol=0, atol=2e-5)


def corrected_head(model: Backbone) -> tuple[Tensor, Tensor]:
    head = pruner_of(model).correction.head
    assert head is not None
    return head


def test_the_mean_is_of_the_tokens_that_left() -> None:
    """By hand: two of four tokens leave, each divided by its root mean square."""
    from ssmprune_cli.pruning.correction import dropped_mean

    hidden = torch.tensor([[[1.0, 1.0], [3.0, -3.0], [5.0, 5.0], [0.0, 2.0]]])
    sequence = replace(TokenSequence.dense(hidden), residual=torch.tensor([[[0.0, 0.0], [1.0, -1.0]] * 2]))
    after = sequence.keep(torch.tensor([[0, 2]]))
    expected = torch.tensor([[(1.0 + 1 / math.sqrt(1)) / 2, (-1.0 + 1.0) / 2]])
    # Streams (4, -4) and (1, 1) become (1, -1) and (1, 1).
    torch.testing.assert_close(dropped_mean(sequence, after), expected, rtol=0, atol=1e-4)
    merged = sequence.merge(torch.tensor([[0, 2]]), torch.tensor([[0, 0, 1, 1]]))
    torch.testing.assert_close(dropped_mean(sequence, merged), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_running_agrees(name: str) -> None:
    model = corrected(pruned(name))
    images = images_of(model)
    expected = logits_of(model, images)
    torch.testing.assert_close(prepare(model)(images), expected, rtol=1e-4, atol=1e-4)
    dense = make(name)
    session = prepare(dense).with_pruner(model.pruner)
    torch.testing.assert_close(session(images), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(session.with_pruner(None)(images), prepare(dense)(images), rtol=0, atol=0)
    restore(model)
    assert torch.equal(logits_of(model, images), logits_of(dense, images)), "bit for bit"


def test_a_corrected_model_is_exported(tmp_path: Path) -> None:
    model = Vim(VimConfig(**{**SIZES, "depth": 2})).eval()
    compress(model, 0.5, points=[1])
    made = export(corrected(model), tmp_path / "model.pt2", target="pt2", batch=2)
    assert made.tolerance == 1e-4 and made.error <= 1e-4


def test_a_corrected_model_is_compiled() -> None:
    model = corrected(pruned())
    images = images_of(model, 2)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-5)


def test_half_precision_and_gradients() -> None:
    model = corrected(pruned()).to(torch.bfloat16)
    images = images_of(model).bfloat16()
    assert logits_of(model, images).dtype == torch.bfloat16
    model = corrected(pruned())
    model(images_of(model)).sum().backward()
    assert all(each.grad is not None for each in model.blocks[0].parameters())


def test_a_pruner_that_hands_on_to_a_corrected_one_loses_nothing() -> None:
    class Around(nn.Module, Pruner):
        def __init__(self, inner: TokenPruner) -> None:
            super().__init__()
            self.inner = inner

        def wants(self, block: int) -> Wanted:
            return self.inner.wants(block)

        def alignment(self, block: int) -> ScanAlignment | None:
            return self.inner.alignment(block)

        def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
            after: TokenSequence = self.inner(block, sequence, statistics)
            return after

    model = corrected(pruned())
    images = images_of(model)
    expected = logits_of(model, images)
    model.pruner = Around(pruner_of(model))
    assert torch.equal(logits_of(model, images), expected)


@pytest.mark.parametrize("name", ["vim", "mamba-reg", "plainmamba", "vmamba"])
def test_the_small_products_are_counted(name: str) -> None:
    model = pruned(name)
    before = count_flops(model)
    corrected(model)
    after = count_flops(model)
    added = sum(each.numel() for each in pruner_of(model).correction.side.values())
    assert after.all_directions - before.all_directions == added == after.one_direction - before.one_direction
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images_of(model, 1))
    assert counter.get_total_flops() == 2 * after.all_directions


def test_a_correction_leaves_alignment_alone_and_the_other_way_round() -> None:
    model = corrected(pruned(reduction="merge"))
    before = {name: value.clone() for name, value in pruner_of(model).named_buffers()}
    pruner_of(model).set_mass(0.75)
    for name, value in pruner_of(model).named_buffers():
        assert torch.equal(value, torch.full_like(value, 0.75) if name.startswith("alignment") else before[name])
    pruner_of(model).correct(Correction())
    assert {name.partition("_")[0] for name, _ in pruner_of(model).named_buffers()} == {"alignment"}
    assert pruner_of(model).settings.repair == "none"


# Files.


@pytest.mark.parametrize("name", ["vim", "mamba-reg", "vmamba"])
def test_an_artefact_brings_it_back(name: str, tmp_path: Path) -> None:
    model = corrected(pruned(name))
    images = images_of(model)
    checkpoint.save(tmp_path / "model", model)
    loaded = checkpoint.load(tmp_path / "model")
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))
    assert pruner_of(loaded).settings.repair == "head+side"
    from ssmprune_cli.preprocessing import NOTHING_SAID

    dense = checkpoint.load_as(tmp_path / "model", NOTHING_SAID, dense=True)
    assert torch.equal(logits_of(dense, images), logits_of(make(name), images))


@pytest.mark.parametrize("said", ["everything", "side", "none"])
def test_an_artefact_whose_files_disagree_is_refused(said: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "model", corrected(pruned()))
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    values["pruning"]["repair"] = said
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"not valid: repair|head_weight is unknown"):
        checkpoint.load(tmp_path / "model")


def test_training_folds_the_head_in() -> None:
    model = corrected(pruned())
    images, before = images_of(model), logits_of(corrected(pruned()), images_of(model))
    fold_head(model)
    assert pruner_of(model).settings.repair == "side" and pruner_of(model).correction.head is None
    torch.testing.assert_close(logits_of(model, images), before, rtol=0, atol=1e-6)
    model(images).sum().backward()
    assert model.output_layer.weight.grad is not None
    fold_head(model)  # once more changes nothing
    torch.testing.assert_close(logits_of(model, images), before, rtol=0, atol=1e-6)


# The guard.


def test_noise_is_refused_and_a_signal_is_not() -> None:
    """From answers that are the pruned model's own and noise nothing can be learned; from the dense model's it can."""
    model = pruned(keep=0.1)
    images, draw = images_of(model, 300), torch.Generator().manual_seed(0)
    honest, own = model_runner(model), model.pruner

    def noisy(pruner: Pruner | None) -> Callable[[Tensor], Tensor]:
        if pruner is not None:
            return honest(pruner)
        return lambda batch: (answers := honest(own)(batch)) + 0.5 * torch.randn(answers.shape, generator=draw)

    wrong = repair(model, [images], runner=noisy)
    assert wrong.kind == "none" and set(wrong.refused) == {"head", "head+side"} and wrong.after is None
    assert all("not clearly better" in why for why in wrong.refused.values())
    assert pruner_of(model).correction == Correction()
    right = repair(model, [images])
    assert right.kind != "none" and right.held_back == right.images == 300
    assert right.before is not None and right.after is not None and right.change is not None
    assert right.after < right.before and right.change[1] < 0
    assert pruner_of(model).settings.repair == right.kind and len(right.warnings) == 1


@pytest.mark.parametrize("kind", ["auto", "head", "head+side"])
def test_what_is_asked_for_is_what_is_tried(kind: Any) -> None:
    model = pruned()
    few = repair(model, images_of(model, 63), kind=kind)
    tried = {"auto": {"head", "head+side"}}.get(kind, {kind})
    assert few.kind == "none" and set(few.refused) == tried and all("too few" in why for why in few.refused.values())
    found = repair(model, images_of(model, 64), kind=kind)
    assert found.images == found.held_back == 64 and {found.kind, *found.refused} - {"none"} <= tried


def test_where_there_is_nothing_to_repair() -> None:
    model = make()
    images = images_of(model, 64)
    with pytest.raises(UsageError, match="only a pruned model"):
        repair(model, images)
    dense = logits_of(model, images)
    seen = compress(model, 1.0, calibration=images)
    assert seen is not None and seen.repair is not None and "no token is dropped" in seen.repair.refused["head"]
    assert torch.equal(logits_of(model, images), dense)
    compress(model, 0.5, reduction="mask")
    assert "only zeroes" in repair(model, images, kind="head+side").refused["head+side"]
    assert set(repair(model, images).refused) <= {"head"}, "of zeroed tokens there is no mean"
    backbone = VMamba(VMambaConfig(image_size=(32, 32), embed_dim=8, depths=(1, 2), num_classes=0, out_stages=(1,)))
    seen = compress(backbone.eval(), 0.5, points=[2], calibration=images_of(backbone, 4))
    assert seen is not None and seen.repair is not None and "no classifier" in seen.repair.refused["head"]
    model.head = nn.Identity()
    assert "Identity" in repair(model, images).refused["head"]
    with pytest.raises(DataError, match="no images"):
        repair(pruned(), [])


def test_features_that_are_not_finite_are_refused() -> None:
    model = pruned()
    with torch.no_grad():
        model.get_submodule("norm_f").get_parameter("weight").fill_(torch.inf)
    assert "not finite" in repair(model, images_of(model, 64)).refused["head"]


def test_compress_takes_every_form_of_the_same_images() -> None:
    images = images_of(make(), 130)
    found = []
    for given in (list(images.split(32)), iter(images.split(32)), DataLoader(TensorDataset(images), batch_size=32)):
        model = make()
        seen = compress(model, 0.3, reduction="merge", calibration=given)
        assert seen is not None and seen.images == 64 and seen.repair is not None and seen.repair.images == 130
        found.append({name: value.clone() for name, value in pruner_of(model).named_buffers()})
    assert all(found[0].keys() == each.keys() for each in found)
    assert all(torch.equal(found[0][name], each[name]) for each in found for name in each)
    every = compress(make(), 0.3, calibration=images, repair="none")
    assert every is not None and every.images == 130 and every.repair is None


def test_alignment_is_calibrated_on_images_from_all_over_an_array() -> None:
    """Arrays often come class by class, and 64 images calibrate the alignment."""
    images, model, other = images_of(make(), 130), make(), make()
    compress(model, 0.3, reduction="drop", calibration=images)
    compress(other, 0.3, reduction="drop", calibration=images[torch.arange(64) * 130 // 64], repair="none")
    found, expected = (dict(pruner_of(each).named_buffers()) for each in (model, other))
    assert expected and all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_resized_model_is_repaired_towards_the_dense_one() -> None:
    """Its own answers without pruning are not what it is to come near to."""
    model = pruned(keep=0.3)
    images, draw = images_of(model, 200), torch.Generator().manual_seed(0)
    pooled_by = torch.randn(model.output_layer.in_features, 5, generator=draw)
    features = collect(
        pruner_of(model), len(model.mixers) - 1, model.output_layer.in_features, [images], model_runner(model)
    )
    dense = features.pooled @ pooled_by.double()
    found = repair(model, images.split(50), dense=dense)
    assert found.kind != "none" and found.before is not None and found.after is not None
    assert found.after < 0.5 * found.before
    with pytest.raises(UsageError, match="dense logits of 199 images, and 200 images"):
        repair(model, images, dense=dense[1:])


def test_it_helps_on_digits_that_played_no_part() -> None:
    model = ssmprune_cli.load(DEMO / "vim_digits.pth")
    with np.load(DEMO / "test.npz") as stored:
        digits = torch.from_numpy(stored["images"])[:, None].expand(-1, 3, -1, -1)
    fitted, held = digits[0::2][:360], digits[1::2][:240]
    session = prepare(model)
    from ssmprune_cli.pruning.images import as_batches

    batches = list(as_batches(model, held.contiguous()))
    dense = torch.cat([session(batch) for batch in batches])
    weights = copy.deepcopy(model.state_dict())
    compress(model, 0.3, repair="none")

    def far() -> float:
        found = session.with_pruner(model.pruner)
        return float(divergence(dense, torch.cat([found(batch) for batch in batches])).mean())

    before = far()
    result = repair(model, fitted.contiguous(), runner=session.with_pruner)
    assert result.kind != "none" and result.before is not None and result.after is not None
    assert far() < 0.8 * before, "a fifth of the divergence at least"
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in weights.items()), "the weights do not change"


def test_a_quick_repair_foretells_what_a_repair_gains() -> None:
    """The dense answers follow from what the head sees: most of the divergence goes."""
    model = pruned()
    images = images_of(model, 90)
    pruner, runner = pruner_of(model), model_runner(model)
    with torch.no_grad():
        plain = model(images).double()
    wanted = 2 * plain + torch.tensor([3.0, 0.0, 0.0, -3.0, 0.0])
    before = copy.deepcopy(model.state_dict())
    found = quick_answers(model, pruner, images.split(40), runner, wanted, side=False)
    assert divergence(wanted, found).mean() < 0.2 * divergence(wanted, plain).mean()
    assert model.pruner is pruner
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_quick_repair_learns_nothing_by_heart() -> None:
    """Of answers that have nothing to do with the images, a head on 32 and more features could hold most; what no other
    image says counts for nothing."""
    model = pruned()
    images = images_of(model, 66)
    wanted = 3 * torch.randn(66, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = quick_answers(model, pruner_of(model), [images], model_runner(model), wanted, side=True)
    constant = wanted.softmax(dim=1).mean(dim=0).log().expand(66, -1)
    assert divergence(wanted, found).mean() > 0.97 * divergence(wanted, constant).mean()


def test_a_quick_repair_changes_nothing_where_there_is_nothing_to_mend() -> None:
    model = make()
    images = images_of(model, 66)
    with torch.no_grad():
        plain = model(images).double()
    found = quick_answers(model, None, [images], model_runner(model), plain, side=True)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert is_repairable(model)
    model.head = nn.Linear(16, 5, bias=False)
    assert not is_repairable(model)
