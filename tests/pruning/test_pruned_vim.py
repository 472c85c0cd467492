"""A pruned Vim as a whole: keep 1.0 is dense, alignment is exact where it can be, gradients flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted, at_least_tokens
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import ALIGNMENTS, IMPORTANCES, TokenPruner, compress, restore
from ssmprune_cli.tokens import TokenSequence

TINY = VimConfig(image_size=(32, 32), patch_size=8, stride=8, embed_dim=16, depth=4, num_classes=5)
KINDS = {
    "middle": TINY,
    "head": replace(TINY, class_token="head"),
    "none": replace(TINY, class_token="none"),
    "double": replace(TINY, class_token="double"),
    "rope": replace(TINY, class_token="head", rope=True, divide_out=False),
}


def build(config: VimConfig, dtype: torch.dtype = torch.float32) -> Vim:
    torch.manual_seed(0)
    model = Vim(config)
    for parameter in model.parameters():  # zero-initialised biases and tokens would hide mistakes
        nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return model.to(dtype).eval()


def images(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


class Spy(nn.Module):
    """Hands on to a pruner and remembers what it saw."""

    def __init__(self, inner: TokenPruner) -> None:
        super().__init__()
        self.inner = inner
        self.positions: list[Tensor] = []

    def wants(self, block: int) -> Wanted:
        return at_least_tokens(self.inner.wants(block))

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        sequence = self.inner(block, sequence, statistics)
        self.positions.append(sequence.positions)
        return sequence


def spied(model: Vim, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    assert isinstance(model.pruner, TokenPruner)
    spy = Spy(model.pruner)
    model.pruner = spy
    with torch.no_grad():
        logits = model(batch)
    model.pruner = spy.inner
    return logits, spy.positions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alignment", ALIGNMENTS.names())
def test_keep_one_is_the_dense_model_bit_for_bit(kind: str, alignment: str) -> None:
    model, batch = build(KINDS[kind]), images()
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
    model, batch = build(KINDS[kind], torch.float64), images(4, torch.float64)
    compress(model, 0.6, importance=importance, alignment="null")
    together, positions = spied(model, batch)
    for row in range(4):
        alone, own = spied(model, batch[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-11)
        for block, kept in enumerate(own):
            assert torch.equal(kept[0], positions[block][row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [(15, 9, 3), (1, 1, 1)])
def test_counts_order_and_class_tokens(kind: str, tokens: tuple[int, ...]) -> None:
    model = build(KINDS[kind])
    compress(model, tokens=tokens, alignment="neighbour")
    logits, positions = spied(model, images(5))
    assert logits.shape == (5, 5) and torch.isfinite(logits).all()
    for kept, count in zip(positions, (*tokens, tokens[-1]), strict=True):
        assert kept.shape == (5, count + len(model.protected))
        assert (kept.diff(dim=1) > 0).all()
        for place in model.protected:
            assert (kept == place).sum(dim=1).tolist() == [1] * 5


def test_alignment_is_exact_when_steps_do_not_depend_on_the_token() -> None:
    """Constant deltas make `null` the truth; a one-tap convolution takes context out. Then the pruned mixer must equal
    the dense one with the dropped inputs zeroed, in both directions at once."""
    model = build(TINY, torch.float64)
    mixer: Any = model.mixers[1]
    for name in ("", "_b"):
        getattr(mixer, f"dt_proj{name}").weight.data.zero_()
        convolution = getattr(mixer, f"conv1d{name}")
        convolution.weight.data[:, :, :-1] = 0
        convolution.bias.data.zero_()
    torch.manual_seed(2)
    x = torch.randn(2, 17, 16, dtype=torch.float64)
    kept = torch.tensor([[0, 3, 4, 8, 9, 15], [2, 5, 8, 11, 13, 16]])
    mask = torch.zeros(2, 17, 1, dtype=torch.float64).scatter(1, kept[..., None], 1.0)
    dense = TokenSequence.dense(x, model.protected)
    short = dense.keep(kept)
    null = mixer.null_delta()
    aligned = ScanAlignment(null)
    full, _ = mixer(x * mask, dense, None, "y")
    expected = full.gather(1, kept[..., None].expand(-1, -1, full.shape[-1]))
    found, _ = mixer(short.hidden, short, aligned, "y")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    unaligned, _ = mixer(short.hidden, short, None, "y")
    assert (unaligned - expected).abs().max() > 1e-6  # the test would notice if alignment did nothing


def test_the_class_token_is_read_at_its_true_rank() -> None:
    model = build(TINY)
    compress(model, 0.5, alignment="none")
    seen: dict[str, TokenSequence] = {}

    class Last(Spy):
        def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
            seen["last"] = self.inner(block, sequence, statistics)
            return seen["last"]

    assert isinstance(model.pruner, TokenPruner)
    model.pruner = Last(model.pruner)
    with torch.no_grad():
        logits = model(images())
    last = seen["last"]
    assert last.residual is not None
    ranks = (last.positions == model.protected[0]).nonzero()[:, 1]
    assert ranks.unique().numel() > 1  # samples differ in how many tokens before the class token they keep
    stream = torch.stack([(last.hidden + last.residual)[row, rank] for row, rank in enumerate(ranks)])
    expected = model.head(model.norm_f(stream))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter_through_the_aligned_scan() -> None:
    model = build(TINY, torch.float64)
    compress(model, 0.6, alignment="neighbour")
    model(images(2, torch.float64)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("alignment", ["null", "neighbour"])
def test_gradcheck_through_a_pruned_model(alignment: str) -> None:
    config = replace(TINY, embed_dim=4, depth=2, d_state=2, num_classes=2, image_size=(24, 24))
    model = build(config, torch.float64)
    compress(model, 0.6, points=[1], alignment=alignment)
    batch = torch.randn(1, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = model.get_parameter("layers.1.mixer.A_log").detach().clone().requires_grad_()

    def run(value: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, {"layers.1.mixer.A_log": value}, (batch,))
        return logits

    assert torch.autograd.gradcheck(run, (weight,), atol=1e-6)


def test_calibrated_deltas_are_the_means_over_the_dropped_tokens() -> None:
    model, batch = build(TINY), images(6)

    class Recorder(nn.Module):
        """The dense pass, with everything written down."""

        def __init__(self) -> None:
            super().__init__()
            self.statistics: list[ScanStatistics] = []

        def wants(self, block: int) -> Wanted:
            return "delta"

        def alignment(self, block: int) -> ScanAlignment | None:
            return None

        def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
            self.statistics.append(statistics)
            return sequence

    recorder = Recorder()
    model.pruner = recorder
    with torch.no_grad():
        model(batch)
    restore(model)
    seen = compress(model, tokens=[10], points=[2], calibration=[batch[:2], batch[2:]])
    assert seen is not None and seen.images == 6
    score = sum(recorder.statistics[1].y).clamp(min=0).mean(dim=-1)  # type: ignore[union-attr]
    score[:, model.protected[0]] = torch.inf
    dropped = torch.ones(6, 17, dtype=torch.bool).scatter(1, score.topk(11, dim=1).indices, False)
    assert seen.deltas[:2] == (None, None)
    for block in (2, 3):
        for direction in range(2):
            expected = recorder.statistics[block].delta[direction][dropped].mean(dim=0)
            # Sums in another order: a few float32 roundings.
            torch.testing.assert_close(
                getattr(model.pruner, f"alignment_{block}")[direction], expected, rtol=1e-5, atol=0
            )
    assert torch.equal(torch.stack(seen.points[0].kept), (~dropped).nonzero()[:, 1].view(6, 11))


def test_restore_and_compress_again() -> None:
    model, batch = build(TINY), images()
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


def test_mask_and_drop_unsorted_differ_from_drop() -> None:
    model, batch = build(TINY), images()
    outputs = []
    for reduction in ("drop", "drop-unsorted", "mask"):
        compress(model, 0.5, reduction=reduction, alignment="none")
        with torch.no_grad():
            outputs.append(model(batch))
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


def test_calibration_needs_images_and_finite_scores() -> None:
    model = build(TINY)
    with pytest.raises(UsageError, match="needs calibration images"):
        compress(model, 0.5, alignment="calibrated")
    with pytest.raises(DataError, match="no calibration images"):
        compress(model, 0.5, calibration=[])
    with pytest.raises(DataError, match="not finite"):
        compress(model, 0.5, calibration=torch.full((1, 3, 32, 32), torch.nan))
    assert model.pruner is None  # a failed calibration leaves the model as it was


def test_autocast_runs_the_kernels_in_half_precision() -> None:
    """As in training and serving with mixed precision: matrices and activations in bfloat16, state and stream wider."""
    model, batch = build(TINY), images()
    with torch.no_grad():
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch)
            compress(model, 0.5, points=[1], alignment="null")
            pruned = model(batch)
    restore(model)
    assert half.dtype == pruned.dtype == torch.bfloat16
    # Four blocks, each with a few roundings to 8 bits, 0.4 %.
    assert (half.float() - exact).abs().max() <= 0.05 * exact.abs().max()
    assert torch.isfinite(pruned).all()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(batch).float().square().sum()
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_with_context_convolutions_see_what_was_dropped() -> None:
    """Tokens that are dropped just before a block and remembered: its convolutions are those of the dense model, so
    with nothing else lost (no scan) the kept tokens' inputs to the scans are, too; without memory they are not."""
    model, batch = build(replace(TINY, depth=2)), images()
    seen: dict[str, list[Tensor]] = {}

    def inputs_to_scans(name: str) -> None:
        seen[name] = []
        hooks = [
            model.get_submodule(f"layers.1.mixer.{branch}").register_forward_pre_hook(
                lambda module, args: seen[name].append(args[0])
            )
            for branch in ("x_proj", "x_proj_b")
        ]
        with torch.no_grad():
            model(batch)
        for hook in hooks:
            hook.remove()

    inputs_to_scans("dense")
    for reduction in ("drop", "context"):
        compress(model, 0.5, points=[1], reduction=reduction, alignment="null")
        assert isinstance(model.pruner, TokenPruner)
        _, (kept, _) = spied(model, batch)
        inputs_to_scans(reduction)
        expected = [values.gather(1, kept[..., None].expand(-1, -1, values.shape[-1])) for values in seen["dense"]]
        same = [torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(seen[reduction], expected, strict=True)]
        assert all(same) if reduction == "context" else not any(same)
        restore(model)
