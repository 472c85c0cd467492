"""Pruned Mamba-Reg and VideoMamba: the guarantees of test_pruned_vim.py; registers stay at their true rank."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ssmprune_cli.checkpoint import load, save
from ssmprune_cli.cli.app import app
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted, at_least_tokens
from ssmprune_cli.models.mamba.backbone import MambaBackbone
from ssmprune_cli.models.mamba.mambar import MAMBA_REG, MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.videomamba import VIDEOMAMBA, VideoMamba, VideoMambaConfig
from ssmprune_cli.pruning import ALIGNMENTS, IMPORTANCES, TokenPruner, compress, restore
from ssmprune_cli.recipe.recipe import load_recipe, shipped_recipes
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.measure.flops import count_flops

REGISTERS = MambaRegConfig((32, 32), 8, 8, embed_dim=16, depth=4, num_classes=5, num_cls_tokens=4, cls_reduce=2)
VIDEO = VideoMambaConfig((32, 32), 8, 8, embed_dim=16, depth=4, num_classes=5)
KINDS: dict[str, Callable[[], MambaBackbone]] = {
    "registers": lambda: MambaReg(REGISTERS),
    "no neck, not square": lambda: MambaReg(replace(REGISTERS, image_size=(24, 40), num_cls_tokens=3, cls_reduce=1)),
    "videomamba": lambda: VideoMamba(VIDEO),
}


def build(kind: str, dtype: torch.dtype = torch.float32) -> MambaBackbone:
    torch.manual_seed(0)
    model = KINDS[kind]()
    for parameter in model.parameters():  # zero-initialised biases and tokens would hide mistakes
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return model.to(dtype).eval()


def images(model: MambaBackbone, count: int = 3) -> Tensor:
    batch = torch.randn(count, 3, *model.image_size, generator=torch.Generator().manual_seed(1))
    return batch.to(next(model.parameters()).dtype)


class Spy(nn.Module):
    """Hands on to a pruner and remembers what it saw."""

    def __init__(self, inner: TokenPruner) -> None:
        super().__init__()
        self.inner = inner
        self.sequences: list[TokenSequence] = []

    def wants(self, block: int) -> Wanted:
        return at_least_tokens(self.inner.wants(block))

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        self.sequences.append(self.inner(block, sequence, statistics))
        return self.sequences[-1]


def spied(model: MambaBackbone, batch: Tensor) -> tuple[Tensor, list[TokenSequence]]:
    assert isinstance(model.pruner, TokenPruner)
    spy = Spy(model.pruner)
    model.pruner = spy
    with torch.no_grad():
        logits = model(batch)
    model.pruner = spy.inner
    return logits, spy.sequences


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", ALIGNMENTS.names())
def test_keep_one_is_the_dense_model_bit_for_bit(kind: str, alignment: str) -> None:
    model = build(kind)
    batch = images(model)
    with torch.no_grad():
        dense = model(batch)
        reduction = "pool" if alignment == "mass" else "context"
        calibration = batch if alignment == "calibrated" else None
        compress(model, 1.0, reduction=reduction, alignment=alignment, calibration=calibration)
        assert torch.equal(model(batch), dense)
        compress(model, 0.5, reduction=reduction, alignment=alignment, calibration=calibration)
        assert not torch.equal(model(batch), dense)
        restore(model)
        assert torch.equal(model(batch), dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", IMPORTANCES.names())
def test_each_sample_is_independent_of_its_batch(kind: str, importance: str) -> None:
    # float64: sums of another batch size may be added in another order, worth 1e-15 a step.
    model = build(kind, torch.float64)
    batch = images(model, 4)
    compress(model, 0.6, importance=importance, alignment="null")
    together, sequences = spied(model, batch)
    for row in range(4):
        alone, own = spied(model, batch[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-11)
        for block, kept in enumerate(own):
            assert torch.equal(kept.positions[0], sequences[block].positions[row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["clip", "random"])
@pytest.mark.parametrize("tokens", [(14, 9, 3), (1, 1, 1)])
def test_counts_order_and_registers(kind: str, importance: str, tokens: tuple[int, ...]) -> None:
    """Tokens are in ascending position, every register once in every sample: so each is at its true rank."""
    model = build(kind)
    compress(model, tokens=tokens, importance=importance, alignment="neighbour")
    logits, sequences = spied(model, images(model, 5))
    assert logits.shape == (5, 5) and torch.isfinite(logits).all()
    for sequence, count in zip(sequences, (*tokens, tokens[-1]), strict=True):
        assert sequence.positions.shape == (5, count + len(model.protected))
        assert (sequence.positions.diff(dim=1) > 0).all()
        for place in model.protected:
            assert (sequence.positions == place).sum(dim=1).tolist() == [1] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_reads_registers_at_their_true_rank(kind: str) -> None:
    model = build(kind)
    compress(model, 0.5, reduction="drop", alignment="none")
    logits, sequences = spied(model, images(model, 4))
    last = sequences[-1]
    assert last.residual is not None
    stream = last.hidden + last.residual
    ranks = [[positions.index(place) for place in model.protected] for positions in last.positions.tolist()]
    features = model.norm_f(torch.stack([stream[row, own] for row, own in enumerate(ranks)]))  # (B, k, d)
    if isinstance(model, MambaReg):
        assert len({own[0] for own in ranks}) > 1  # samples differ in how many tokens they keep before a register
        if model.config.cls_reduce > 1:
            features = model.norm_neck(model.neck(features).flatten(1))
    torch.testing.assert_close(logits, model.head(features.flatten(1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_is_exact_when_steps_do_not_depend_on_the_token(kind: str) -> None:
    """Constant deltas make `null` the truth; a one-tap convolution takes context out. Then the pruned mixer must equal
    the dense one with the dropped inputs zeroed, in both directions at once."""
    model = build(kind, torch.float64)
    mixer: Any = model.mixers[1]
    for name in ("", "_b"):
        getattr(mixer, f"dt_proj{name}").weight.data.zero_()
        convolution = getattr(mixer, f"conv1d{name}")
        convolution.weight.data[:, :, :-1] = 0
        convolution.bias.data.zero_()
    torch.manual_seed(2)
    length = model.num_tokens
    x = torch.randn(2, length, 16, dtype=torch.float64)
    patches = torch.tensor([place for place in range(length) if place not in model.protected])
    chosen = torch.stack([patches[torch.randperm(len(patches))[:5]] for _ in range(2)])
    kept = torch.cat((chosen, torch.tensor([model.protected] * 2)), dim=1).sort(dim=1).values
    mask = torch.zeros(2, length, 1, dtype=torch.float64).scatter(1, kept[..., None], 1.0)
    dense = TokenSequence.dense(x, model.protected)
    short = dense.keep(kept)
    with torch.no_grad():
        full, _ = mixer(x * mask, dense, None, "y")
        expected = full.gather(1, kept[..., None].expand(-1, -1, 16))
        found, _ = mixer(short.hidden, short, ScanAlignment(mixer.null_delta()), "y")
        unaligned, _ = mixer(short.hidden, short, None, "y")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (unaligned - expected).abs().max() > 1e-6  # the test would notice if alignment did nothing


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_through_the_aligned_scan(kind: str) -> None:
    model = build(kind, torch.float64)
    compress(model, 0.6, alignment="neighbour")
    model(images(model, 2)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # Of the last forward scan VideoMamba reads the first token alone, whose state has not decayed yet, dense or not.
    assert silent == (["layers.3.mixer.A_log"] if kind == "videomamba" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_static(kind: str) -> None:
    """An exported model gives the same logits on images that keep other tokens."""
    model = build(kind)
    compress(model, 0.5, alignment="neighbour")
    first, second = images(model, 4)[:2], images(model, 4)[2:]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own deprecations
        exported = torch.export.export(model, (first,)).module()
        assert torch.equal(exported(second), model(second))


@pytest.mark.parametrize("kind", KINDS)
def test_an_artefact_comes_back_as_it_was(tmp_path: Path, kind: str) -> None:
    """Whatever the folder is called: its config.json names the family."""
    model = build(kind)
    batch = images(model)
    compress(model, 0.6, calibration=batch)
    save(tmp_path / "vim", model)
    loaded = load(tmp_path / "vim")
    assert loaded.config == model.config and type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch))


@pytest.mark.parametrize("kind", ["registers", "videomamba"])
def test_the_commands(tmp_path: Path, kind: str) -> None:
    """compress, profile, inspect and visualize on a file as the authors pack it, told apart by its name."""
    model = build(kind)
    name = {"registers": "mambar_x.pth", "videomamba": "videomamba_x.pth"}[kind]
    file, data, out = tmp_path / name, tmp_path / "images.npz", tmp_path / "pruned"
    torch.save({"model": model.state_dict(), "epoch": 1}, file)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(data, images=pixels, labels=np.zeros(3, dtype=np.int64))

    def ssmprune(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    geometry = ("--image-size", model.image_size[0], "--stride", model.config.stride)  # which neither says
    ssmprune("compress", file, *geometry, "--keep", 0.5, "--calib", data, "--calib-images", 3, "--out", out)
    facts = json.loads(ssmprune("inspect", out, "--json"))
    assert (facts["family"], facts["protected"]) == (model.family, list(model.protected))
    assert facts["pruning"]["schedule"]["tokens"] == [8, 4, 2]
    profiled = json.loads(
        ssmprune("profile", out, "--compare", file, *geometry, "--rounds", 1, "--batch-size", 1, "--json")
    )
    assert profiled["models"][0]["tokens_per_block"] == [tokens + len(model.protected) for tokens in (16, 8, 4, 2)]
    ssmprune("visualize", out, data, "--out", tmp_path / "kept.png")
    assert (tmp_path / "kept.png").stat().st_size > 0


# --- recipes


RECIPES = sorted(name for name in shipped_recipes() if name.startswith(("videomamba_", "mambar_")))


def test_every_size_has_a_recipe() -> None:
    assert {load_recipe(name).model.variant for name in RECIPES} == {*VIDEOMAMBA.variants, *MAMBA_REG.variants}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.split("_")[1] in ("base", "large") else name
        for name in RECIPES
    ],
)
def test_a_recipe_saves_what_its_header_says(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model is not None and recipe.model.variant is not None
    family = {"videomamba": VIDEOMAMBA, "mambar": MAMBA_REG}[recipe.model.family]
    model = family.build(family.variants[recipe.model.variant])
    dense = count_flops(model)
    pruning = recipe.pruning
    # A "neighbour" costs what a calibrated step does.
    compress(model, pruning.keep, points=pruning.points, reduction=pruning.reduction, alignment="neighbour")
    pruned = count_flops(model)
    saved = 100 * (1 - pruned.one_direction / dense.one_direction)
    said = (
        f"Multiply-adds: {dense.one_direction / 1e9:.2f} G to {pruned.one_direction / 1e9:.2f} G (-{saved:.1f} %) in "
        f"the one-direction convention, {dense.all_directions / 1e9:.2f} G to {pruned.all_directions / 1e9:.2f} G "
    )
    header = " ".join(shipped_recipes()[name].read_text(encoding="utf-8").replace("\n#", "").split())
    assert said in header
