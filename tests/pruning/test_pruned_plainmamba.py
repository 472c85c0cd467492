"""A pruned PlainMamba as a whole: keep 1.0 is dense, alignment is exact in all four routes, gradients flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted, at_least_tokens
from ssmprune_cli.kernels import selective_scan
from ssmprune_cli.models.common.routes import reorder
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.plainmamba.routes import walks
from ssmprune_cli.pruning import ALIGNMENTS, IMPORTANCES, TokenPruner, compress, restore
from ssmprune_cli.tokens import TokenSequence

TINY = PlainMambaConfig(image_size=(32, 32), patch_size=8, embed_dim=16, depth=4, num_classes=5)
KINDS = {
    "even grid": TINY,
    "odd grid, not square": replace(TINY, image_size=(24, 40)),
    "depthwise convolutions": replace(TINY, dw_layers=(0, 2)),
}


def build(config: PlainMambaConfig, dtype: torch.dtype = torch.float32) -> PlainMamba:
    torch.manual_seed(0)
    model = PlainMamba(config)
    for parameter in model.parameters():  # zero-initialised biases would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def images(config: PlainMambaConfig, count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, *config.image_size, generator=torch.Generator().manual_seed(1)).to(dtype)


class Spy(nn.Module):
    """Hands on to a pruner, if there is one, and remembers what it saw."""

    def __init__(self, inner: TokenPruner | None) -> None:
        super().__init__()
        self.inner = inner
        self.positions: list[Tensor] = []
        self.statistics: list[ScanStatistics] = []

    def wants(self, block: int) -> Wanted:
        return "delta" if self.inner is None else at_least_tokens(self.inner.wants(block))

    def alignment(self, block: int) -> ScanAlignment | None:
        return None if self.inner is None else self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if self.inner is not None:
            sequence = self.inner(block, sequence, statistics)
        self.positions.append(sequence.positions)
        self.statistics.append(statistics)
        return sequence


def spied(model: PlainMamba, batch: Tensor) -> tuple[Tensor, Spy]:
    assert model.pruner is None or isinstance(model.pruner, TokenPruner)
    model.pruner = spy = Spy(model.pruner)
    with torch.no_grad():
        logits = model(batch)
    model.pruner = spy.inner
    return logits, spy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", ALIGNMENTS.names())
def test_keep_one_is_the_dense_model_bit_for_bit(kind: str, alignment: str) -> None:
    model, batch = build(KINDS[kind]), images(KINDS[kind])
    with torch.no_grad():
        dense = model(batch)
        reduction = "pool" if alignment == "mass" else "context"
        calibration = batch if alignment == "calibrated" else None
        compress(model, 1.0, reduction=reduction, alignment=alignment, calibration=calibration)
        assert torch.equal(model(batch), dense)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", IMPORTANCES.names())
def test_each_sample_is_independent_of_its_batch(kind: str, importance: str) -> None:
    # float64: sums of another batch size may be added in another order, worth 1e-15 a step.
    model, batch = build(KINDS[kind], torch.float64), images(KINDS[kind], 3, torch.float64)
    compress(model, 0.6, importance=importance, alignment="null")
    together, all_seen = spied(model, batch)
    for row in range(3):
        alone, seen = spied(model, batch[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-11)
        for block, kept in enumerate(seen.positions):
            assert torch.equal(kept[0], all_seen.positions[block][row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(14, 9, 3), (1, 1, 1)])
def test_counts_and_order(kind: str, tokens: tuple[int, ...]) -> None:
    model = build(KINDS[kind])
    compress(model, tokens=tokens, alignment="neighbour")
    logits, seen = spied(model, images(KINDS[kind], 5))
    assert logits.shape == (5, 5) and torch.isfinite(logits).all()
    for kept, count in zip(seen.positions, (*tokens, tokens[-1]), strict=True):
        assert kept.shape == (5, count)
        assert (kept.diff(dim=1) > 0).all()


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 4)])
def test_a_scan_is_exact_under_the_true_steps_of_the_dropped_tokens(grid: tuple[int, int]) -> None:
    """In every route: a scan over the kept tokens that decays over each gap by the deltas that the dense scan had there
    is the dense scan with the inputs of the dropped tokens zeroed."""
    torch.manual_seed(3)
    total, channels, state = grid[0] * grid[1], 6, 4
    dense = TokenSequence.dense(torch.randn(2, total, channels, dtype=torch.float64), grid=grid)
    kept = torch.stack([torch.randperm(total)[:7].sort().values for _ in range(2)])
    short, u = dense.keep(kept), dense.hidden
    mask = torch.zeros(2, total, 1, dtype=torch.float64).scatter(1, kept[..., None], 1.0)
    delta = torch.rand(2, total, channels, dtype=torch.float64)
    decay, skip = -torch.rand(channels, state, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    b, c = torch.randn(2, 2, total, state, dtype=torch.float64)  # rows of dt, B and C belong to ranks, not to tokens
    by_move = torch.randn(5, state, dtype=torch.float64)
    passed = delta.cumsum(dim=1)
    for long_walk, walk in zip(walks(dense, grid), walks(short, grid), strict=True):
        ranks = walk.visits.ranks
        full = selective_scan(
            reorder(u * mask, long_walk.visits.order), delta, decay, b + by_move[long_walk.moves], c, skip,
            delta_softplus=False,
        )  # fmt: skip
        expected = reorder(reorder(full, long_walk.visits.back), kept)
        own, until = reorder(delta, ranks), reorder(passed, ranks)
        gap = until.diff(dim=1, prepend=(until - own)[:, :1]) - own  # what was dropped before the first is of no matter
        inputs: list[Any] = [reorder(short.hidden, walk.visits.order), own, decay]
        inputs += [reorder(b, ranks) + by_move[walk.moves], reorder(c, ranks), skip]
        found = reorder(selective_scan(*inputs, delta_softplus=False, shift=gap), walk.visits.back)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        unaligned = reorder(selective_scan(*inputs, delta_softplus=False), walk.visits.back)
        assert (unaligned - expected).abs().max() > 1e-3  # the test would notice if alignment did nothing
        assert walk.visits.gap is not None
        assert torch.equal(walk.visits.gap > 0, (gap > 1e-12).all(dim=-1))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_a_step_takes_its_row_from_where_the_dense_scan_does(grid: tuple[int, int]) -> None:
    """Step r takes dt, B and C of the token at raster position r, or of the nearest one if that was dropped."""
    dense = TokenSequence.dense(torch.zeros(2, grid[0] * grid[1], 1), grid=grid)
    short = dense.keep(torch.tensor([[0, 1, 5, 6, 9, 14], [2, 3, 4, 7, 8, 12]]))
    for long_walk, walk in zip(walks(dense, grid), walks(short, grid), strict=True):
        assert long_walk.rows is None and walk.rows is not None
        found = reorder(short.positions[..., None], walk.rows)[..., 0]
        distance = (short.positions[:, None] - walk.visits.ranks[..., None]).abs()  # (B, steps, tokens)
        assert torch.equal((found - walk.visits.ranks).abs(), distance.min(dim=2).values)
        # A step keeps the direction in which the dense snake reaches its place.
        assert torch.equal(walk.moves, long_walk.moves[walk.visits.ranks])


def test_alignment_is_exact_when_steps_do_not_depend_on_the_token() -> None:
    """The whole mixer, all routes at once. Channel 0 is the same everywhere and all that dt, B and C are made of, so
    `null` is the truth; a one-tap convolution takes context out. Then the pruned mixer must equal the dense one with
    the dropped inputs zeroed."""
    model = build(TINY, torch.float64)
    mixer: Any = model.mixers[1]
    with torch.no_grad():
        mixer.x_proj.weight[:, 1:] = 0
        mixer.in_proj.bias.zero_()
        mixer.in_proj.weight[mixer.d_inner] = 0  # channel 0 of the gate: what is constant is no part of the output
        centre = mixer.conv2d.weight[:, :, 3, 3].clone()
        mixer.conv2d.weight.zero_()
        mixer.conv2d.weight[1:, :, 3, 3] = centre[1:]
        mixer.conv2d.bias.zero_()
        mixer.conv2d.bias[0] = 2.0
    torch.manual_seed(2)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 4, 8, 9, 15], [2, 5, 8, 11, 13, 14]])
    mask = torch.zeros(2, 16, 1, dtype=torch.float64).scatter(1, kept[..., None], 1.0)
    dense = TokenSequence.dense(x, grid=(4, 4))
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
    model = build(KINDS[kind], torch.float64)
    compress(model, 0.6, alignment="neighbour")
    model(images(KINDS[kind], 2, torch.float64)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("alignment", ["null", "neighbour"])
def test_gradcheck_through_a_pruned_model(alignment: str) -> None:
    config = replace(TINY, embed_dim=4, depth=2, d_state=2, num_classes=2, image_size=(24, 24))
    model = build(config, torch.float64)
    compress(model, 0.6, points=[1], alignment=alignment)
    batch = images(config, 1, torch.float64)
    names = [f"backbone.layers.1.mamba.{name}" for name in ("A_log", "direction_Bs")]
    weights = tuple(model.get_parameter(name).detach().clone().requires_grad_() for name in names)

    def run(*values: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (batch,))
        return logits

    assert torch.autograd.gradcheck(run, weights, atol=1e-6)


def test_calibrated_deltas_are_the_means_over_the_steps_of_the_dropped_tokens() -> None:
    model, batch = build(TINY), images(TINY, 6)
    _, dense = spied(model, batch)
    seen = compress(model, tokens=[10], points=[2], calibration=[batch[:2], batch[2:]])
    assert seen is not None and seen.images == 6
    score = sum(dense.statistics[1].y).clamp(min=0).mean(dim=-1)  # type: ignore[union-attr]
    dropped = torch.ones(6, 16, dtype=torch.bool).scatter(1, score.topk(10, dim=1).indices, False)
    assert seen.deltas[:2] == (None, None)
    for block in (2, 3):
        stored = getattr(model.pruner, f"alignment_{block}")
        assert stored.shape == (4, 32)
        for direction in range(4):
            expected = dense.statistics[block].delta[direction][dropped].mean(dim=0)
            # Sums in another order: a few float32 roundings.
            torch.testing.assert_close(stored[direction], expected, rtol=1e-5, atol=0)
    assert torch.equal(torch.stack(seen.points[0].kept), (~dropped).nonzero()[:, 1].view(6, 10))


def test_every_alignment_and_its_absence_differ() -> None:
    model, batch = build(TINY), images(TINY)
    outputs = []
    for alignment in ALIGNMENTS.names():
        reduction = "pool" if alignment == "mass" else "context"
        calibration = batch if alignment == "calibrated" else None
        compress(model, 0.5, reduction=reduction, alignment=alignment, calibration=calibration)
        with torch.no_grad():
            outputs.append(model(batch))
    for number, output in enumerate(outputs):
        assert not any(torch.allclose(output, other) for other in outputs[:number])


def test_restore_and_compress_again() -> None:
    model, batch = build(TINY), images(TINY)
    with torch.no_grad():
        dense = model(batch)
        compress(model, 0.5)
        pruned = model(batch)
        compress(model, 0.5)  # from a pruned model: the same settings again
        assert torch.equal(model(batch), pruned)
        assert not torch.equal(pruned, dense)
        restore(model)
        assert torch.equal(model(batch), dense)
    assert not any(key.startswith("pruner") for key in model.state_dict())


def test_other_reductions() -> None:
    """Masking differs from dropping; the order in which kept tokens are stored does not matter on a grid."""
    model, batch = build(TINY, torch.float64), images(TINY, dtype=torch.float64)
    outputs = {}
    for reduction in ("drop", "drop-unsorted", "mask"):
        compress(model, 0.5, reduction=reduction, alignment="none")
        with torch.no_grad():
            outputs[reduction] = model(batch)
    assert not torch.allclose(outputs["drop"], outputs["mask"])
    torch.testing.assert_close(outputs["drop-unsorted"], outputs["drop"], rtol=0, atol=1e-11)


def test_scores_are_those_of_the_summed_scans_at_the_tokens_own_places() -> None:
    model, batch = build(TINY), images(TINY)
    _, dense = spied(model, batch)
    compress(model, tokens=[5], points=[1])
    _, seen = spied(model, batch)
    y = torch.stack(dense.statistics[0].y).sum(dim=0)
    expected = functional.relu(y).mean(dim=-1).topk(5, dim=1).indices.sort(dim=1).values
    assert torch.equal(seen.positions[0], expected)
