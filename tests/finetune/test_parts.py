"""Losses, optimiser groups, rates, order and augmentation: values by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import compress
from ssmprune_cli.recipe.recipe import load_recipe
from ssmprune_cli.recipe.sections import Training
from ssmprune_cli.workflows.finetune.augment import erase, mix, rand_augment, shifted, soft_targets, training_image
from ssmprune_cli.workflows.finetune.images import order
from ssmprune_cli.workflows.finetune.lessons.classes import ClassLesson
from ssmprune_cli.workflows.finetune.loss import Outputs, WithTokens, taught, teach, token_error, total_loss
from ssmprune_cli.workflows.finetune.new_model import build
from ssmprune_cli.workflows.finetune.optimiser import learning_rate, parameter_groups

SMALL = ["image_size=[16, 16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=2", "num_classes=2"]


def make_model(*overrides: str) -> Backbone:
    return build("vim", [*SMALL, *overrides], name="vim_small_midclstok_div2", seed=0)


def named_groups(model: Backbone, **options: float) -> list[tuple[set[str], dict[str, Any]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group) for group in parameter_groups(model, 0.05, **options)]


def test_weight_decay_is_for_matrices_and_filters_alone() -> None:
    model = make_model()
    (decayed, first), (rest, second) = sorted(named_groups(model), key=lambda group: -group[1]["weight_decay"])
    assert decayed | rest == {name for name, _ in model.named_parameters()} and not decayed & rest
    assert decayed == {"patch_embed.proj.weight", "head.weight"} | {
        f"layers.{layer}.mixer.{name}.weight"
        for layer in (0, 1)
        for name in ("in_proj", "conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
    }
    assert (first["weight_decay"], second["weight_decay"], first["scale"]) == (0.05, 0.0, 1.0)


def test_layer_decay_lowers_the_rate_with_the_distance_from_the_head() -> None:
    """Two blocks: the head 1, the last block 0.5, the first one 0.25, patches, positions and tokens 0.125."""
    scale = {name: group["scale"] for names, group in named_groups(make_model(), layer_decay=0.5) for name in names}
    assert scale["head.weight"] == scale["norm_f.weight"] == 1
    assert scale["layers.1.mixer.A_log"] == 0.5 and scale["layers.0.norm.weight"] == 0.25
    assert scale["patch_embed.proj.weight"] == scale["pos_embed"] == scale["cls_token"] == 0.125


def test_learning_rate_rises_linearly_and_goes_along_half_a_cosine() -> None:
    settings = Training(epochs=10, lr=1.0, min_lr=0.2, warmup_epochs=2)
    rates = [learning_rate(settings, epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])  # 6 is half way from 2 to 10, so the mean of 1 and 0.2


def test_the_authors_recipe_falls_and_rises_again_and_follows_the_batch() -> None:
    training = load_recipe("vim_small_topvim").training
    assert training is not None
    rates = [learning_rate(training, epoch) for epoch in (0, 5, 17.5, 30)]
    assert rates == pytest.approx([1e-5, 5e-6, 7.5e-6, 1e-5])
    assert training.model_copy(update={"batch_size": 256}).peak_lr == pytest.approx(2.5e-6)
    assert training.clip_norm == 0 and training.weight_decay == 1e-8


def test_short_distilled_recipe_takes_fifteen_epochs_when_told() -> None:
    training = load_recipe("vim_small_rmeeto").override(["training.epochs=15"]).training
    assert training is not None and (training.epochs, training.distill) == (15, 0.5)
    assert load_recipe("vim_small_rmeeto").training == training.model_copy(update={"epochs": 3})


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": -1.0}, {"warmup_epochs": 31.0}, {"progressive": 31}, {"accumulate": 3}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Training(**wrong)


def outputs(logits: list[float], tokens: list[list[float]], positions: list[int]) -> Outputs:
    return Outputs(torch.tensor([logits]), torch.tensor([tokens]), torch.tensor([positions]))


def test_loss_is_cross_entropy_and_divergence_from_the_dense_model() -> None:
    """Student (1/2, 1/2), teacher (3/4, 1/4), target (0.9, 0.1)."""
    student = outputs([0.0, 0.0], [[1.0, -1.0]], [0])
    teacher = outputs([math.log(3), 0.0], [[1.0, -1.0]], [0])
    targets = torch.tensor([[0.9, 0.1]])
    alone = total_loss(student, targets, Training(), None, ClassLesson())
    assert alone.item() == pytest.approx(math.log(2))
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    both = total_loss(student, targets, Training(distill=0.25), teacher, ClassLesson())
    assert both.item() == pytest.approx(0.75 * math.log(2) + 0.25 * divergence, rel=1e-6)
    soft = math.sqrt(3) / (1 + math.sqrt(3))  # temperature 2 halves the logits
    warm = soft * math.log(soft / 0.5) + (1 - soft) * math.log((1 - soft) / 0.5)
    found = total_loss(student, targets, Training(distill=1.0, temperature=2.0), teacher, ClassLesson())
    assert found.item() == pytest.approx(4 * warm, rel=1e-6)


def test_token_error_compares_kept_tokens_with_the_dense_ones_at_their_positions() -> None:
    teacher = outputs([0.0], [[1.0, -1.0], [5.0, 9.0], [-1.0, 1.0]], [0, 1, 2])
    same = outputs([0.0], [[3.0, -3.0], [-7.0, 7.0]], [0, 2])  # equal but for a factor, which the norm takes away
    other = outputs([0.0], [[-3.0, 3.0], [-7.0, 7.0]], [0, 2])
    assert token_error(same, teacher).item() == pytest.approx(0, abs=1e-8)
    assert token_error(other, teacher).item() == pytest.approx(2, rel=1e-4)  # one of two: (1 - -1)^2 = 4, norm's eps


def test_tokens_of_a_pruned_model_and_of_its_teacher() -> None:
    student, teacher = make_model(), make_model()
    compress(student, 0.5, points=[1])
    teach(student, teacher)
    images = torch.randn(2, 3, 16, 16)
    found, dense = Outputs(*WithTokens(student.eval())(images)), taught(WithTokens(teacher.eval()), images)
    assert dense is not None and not dense.logits.requires_grad
    assert found.tokens.shape == (2, 9, 16) and dense.tokens.shape == (2, 17, 16)
    torch.testing.assert_close(found.logits, student(images), rtol=0, atol=0)
    assert (found.positions == 8).any(dim=1).all()  # the class token, in the middle
    with pytest.raises(UsageError, match="drops tokens itself"):
        teach(teacher, student)
    with pytest.raises(UsageError, match=r"another classes: 3, not 2"):
        teach(student, make_model("num_classes=3"))


@given(count=st.integers(1, 60), batch=st.integers(1, 12), repeats=st.integers(1, 4), epoch=st.integers(0, 3))
def test_an_epoch_has_each_image_once_or_its_repetitions_in_one_batch(
    count: int, batch: int, repeats: int, epoch: int
) -> None:
    settings = Training(batch_size=batch, repeats=repeats)
    plan = order(count, settings, 5, epoch)
    assert plan.shape == (count // batch, batch)
    batches = [row.tolist() for row in plan]
    fresh = math.ceil(batch / repeats)
    assert all(len(set(row)) == fresh for row in batches)
    assert len({index for row in batches for index in row}) == fresh * len(batches)
    assert torch.equal(plan, order(count, settings, 5, epoch))


def test_shift_moves_the_image_and_repeats_its_border() -> None:
    ramp = (10 * torch.arange(8)[:, None] + torch.arange(8)).to(torch.uint8)
    moved = np.asarray(shifted(Image.fromarray(ramp.numpy()).convert("RGB"), 2, -1))[..., 0]
    rows, columns = (torch.arange(8) - 1).clamp(0, 7), (torch.arange(8) + 2).clamp(0, 7)
    assert (moved == ramp[rows][:, columns].numpy()).all()


def test_augmentation_is_a_function_of_the_seed() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    way = Preprocessing(resize=16, crop=16)
    settings = Training(crop_scale=0.3, shift=2, flip=True, randaugment=9, colour_jitter=0.3, erasing=1.0)
    found = [training_image(image, way, settings, seed) for seed in (1, 1, 2)]
    assert found[0].shape == (3, 16, 16) and found[0].isfinite().all()
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_every_distortion_keeps_size_and_mode_and_most_change_the_image() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    found = [rand_augment(image, 9, random.Random(seed)) for seed in range(200)]
    assert {(each.size, each.mode) for each in found} == {((12, 12), "RGB")}
    assert sum(each.tobytes() != image.tobytes() for each in found) > 120  # one in four draws applies none


def test_erasing_fills_a_part_with_noise() -> None:
    pixels = np.full((3, 32, 32), 7, np.float32)
    erase(pixels, random.Random(0))
    erased = (pixels != 7).all(axis=0)
    assert 0.02 * 0.8 < erased.mean() < 0.36
    rows, columns = np.flatnonzero(erased.any(axis=1)), np.flatnonzero(erased.any(axis=0))
    assert erased.sum() == len(rows) * len(columns)  # one rectangle


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["mixup", "cutmix"]))
def test_mixed_pairs_have_the_targets_of_what_is_seen_of_each(seed: int, kind: str) -> None:
    """Images all 0 and all 1: the mean of the pixels is the share of the second."""
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    targets = soft_targets(torch.tensor([0, 1]), 2, 0.0)
    mixed, found = mix(images, targets, Training(mixup=float(kind == "mixup"), cutmix=float(kind == "cutmix")), [seed])
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), found[:, 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(mixed[0] + mixed[1], torch.ones(3, 8, 8))


def test_soft_targets_spread_the_smoothing_over_all_classes() -> None:
    found = soft_targets(torch.tensor([2]), 4, 0.2)
    torch.testing.assert_close(found, torch.tensor([[0.05, 0.05, 0.85, 0.05]]))
