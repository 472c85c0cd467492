"""Prefill with tokens dropped between blocks, its caches, and generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import LanguageModel, generate, prefill, step
from ssmprune_cli.models.language.mamba1.model import Mamba1Config, Mamba1LM
from ssmprune_cli.pruning import REDUCTIONS, TokenPruner, at_size, compress, restore
from ssmprune_cli.tokens import TokenSequence

Ids = Callable[[LanguageModel, int, int], Tensor]


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    """In float64: only the order of sums differs."""
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0.0)


def test_dense_equals_the_full_forward_token_by_token(small: LanguageModel, ids: Ids) -> None:
    tokens = ids(small, 2, 12)
    with torch.inference_mode():
        full = small.logits(tokens)
    for first in (1, 2, 7):  # shorter than the convolution, as long as what it remembers, and longer
        state = prefill(small, tokens[:, :first])
        assert_equal(state.logits, full[:, first - 1])
        for place in range(first, 12):
            state = step(small, tokens[:, place], state)
            assert_equal(state.logits, full[:, place])


def test_generated_tokens_are_the_likeliest_of_full_forwards(small: LanguageModel, ids: Ids) -> None:
    tokens = ids(small, 2, 9)
    found = generate(small, tokens, 5)
    assert found.shape == (2, 14) and torch.equal(found[:, :9], tokens)
    for place in range(9, 14):
        with torch.inference_mode():
            assert torch.equal(found[:, place], small.logits(found[:, :place])[:, -1].argmax(dim=1))
    assert torch.equal(generate(small, tokens, 0), tokens)


class Replay(nn.Module, Pruner):
    """Keeps the dense positions that a pruner kept of a prompt, and all tokens after the prompt."""

    def __init__(self, inner: TokenPruner, prompt: int) -> None:
        super().__init__()
        self.inner, self.prompt = inner, prompt
        self.kept: dict[int, Tensor] = {}

    def wants(self, block: int) -> Wanted:
        return self.inner.wants(block)

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if sequence.length == self.prompt:
            after: TokenSequence = self.inner(block, sequence, statistics)
            self.kept[block] = after.positions
            return after
        if block not in self.kept:
            return sequence
        stays = torch.isin(sequence.positions[0], self.kept[block][0]) | (sequence.positions[0] >= self.prompt)
        index = stays.nonzero().T.expand(len(sequence.hidden), -1)
        fate = "context" if self.inner.settings.reduction == "context" else "gone"
        return sequence.keep(index, others=fate)  # type: ignore[arg-type]


@pytest.mark.parametrize("alignment", ["none", "null", "neighbour", "calibrated"])
@pytest.mark.parametrize("reduction", ["drop", "context"])
def test_steps_after_a_pruned_prefill_equal_a_forward_with_the_same_tokens_dropped(
    small: LanguageModel, ids: Ids, reduction: str, alignment: str
) -> None:
    """The tokens that a prompt loses are those of the prompt alone; a full forward in which just these are lost, at the
    same points, gives the logits of every later step."""
    tokens = ids(small, 1, 24)
    compress(small, keep=0.6, points=[1, 3], reduction=reduction, alignment=alignment, calibration=ids(small, 4, 24))
    assert isinstance(small.pruner, TokenPruner)
    replayed = Replay(small.pruner, prompt=18)
    small.pruner = replayed
    state = prefill(small, tokens[:, :18])
    assert state.kept == (18, 12, 12, 10)  # 8 and 6 of the 14 that may go, as 12 and 8 of the 20 in a window of 24
    for place in range(18, 24):
        state = step(small, tokens[:, place], state)
        with torch.inference_mode():
            full = small(tokens[:, : place + 1])
        assert_equal(state.logits, full[:, :, -1])


@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS.names() if name != "drop-unsorted"])
def test_prefill_and_session_compute_the_pruned_forward(small: LanguageModel, ids: Ids, reduction: str) -> None:
    tokens = ids(small, 2, 24)
    compress(small, keep=0.6, points=[1, 2], reduction=reduction, calibration=tokens)
    with torch.inference_mode():
        full = small(tokens)
        assert_equal(prefill(small, tokens).logits, full[:, :, -1])
        assert_equal(prepare(small)(tokens), full)
        restore(small)
        dense = small(tokens)
    assert float((full - dense).abs().max()) > 1e-4  # something was dropped


def test_keeping_all_is_the_dense_model_bit_for_bit(small: LanguageModel, ids: Ids) -> None:
    tokens = ids(small, 2, 24)
    with torch.inference_mode():
        dense = small(tokens)
        compress(small, keep=1.0, calibration=tokens)
        assert torch.equal(small(tokens), dense)


@settings(max_examples=25)
@given(length=st.integers(1, 40), protect=st.integers(4, 12))
def test_the_last_tokens_stay_and_shares_are_those_of_the_length(length: int, protect: int) -> None:
    torch.manual_seed(0)
    config = Mamba1Config(vocab_size=9, embed_dim=8, depth=3, d_state=2, length=32, protect_last=protect)
    model = Mamba1LM(config).eval()
    compress(model, keep=0.5, points=[1])
    seen: list[TokenSequence] = []
    model.layers[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        logits = model(torch.arange(length)[None] % 9)
    positions = seen[0].positions[0]
    assert logits.shape == (1, 9, min(length, protect)) and bool(logits.isfinite().all())
    assert bool((positions.diff() > 0).all())
    last = list(range(max(0, length - protect), length))
    assert positions[len(positions) - len(last) :].tolist() == last
    kept, whole = -(-(32 - protect) // 2), 32 - protect  # of a window of 32
    open_now = max(0, length - protect)
    wanted = min(open_now, max(1, (2 * kept * open_now + whole) // (2 * whole)))
    assert len(positions) == wanted + len(last)


def test_pruner_for_another_length_keeps_its_shares_and_steps(small: LanguageModel, ids: Ids) -> None:
    compress(small, keep=[0.5, 0.5], points=[1, 2], alignment="calibrated", calibration=ids(small, 4, 24))
    assert isinstance(small.pruner, TokenPruner)
    other = type(small)(replace(small.config, length=44)).double()
    other.load_state_dict({name: each for name, each in small.state_dict().items() if "pruner" not in name})
    other.pruner = at_size(small.pruner, small, other)
    assert small.pruner.settings.schedule.tokens == (10, 5)
    assert other.pruner.settings.schedule.tokens == (20, 10)
    tokens = ids(small, 2, 44)
    with torch.inference_mode():
        assert_equal(other(tokens), small(tokens))


def test_refusals(small: LanguageModel, ids: Ids) -> None:
    with pytest.raises(UsageError, match="at least 0, not -1"):
        generate(small, ids(small, 1, 8), -1)
    with pytest.raises(DataError, match="a token 77"):
        generate(small, torch.tensor([[1, 77]]), 1)
    with pytest.raises(DataError, match=r"not torch.int64 \(1, 0\)"):
        generate(small, torch.zeros(1, 0, dtype=torch.int64), 1)
    state = prefill(small, ids(small, 2, 8))
    for wrong in (ids(small, 2, 1), ids(small, 3, 1)[:, 0], ids(small, 2, 1)[:, 0].double()):
        with pytest.raises(DataError, match=r"one token of each of 2 texts"):
            step(small, wrong, state)
    with pytest.raises(UsageError, match=r"calibration text is torch\.float64"):
        compress(small, keep=0.5, calibration=torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(DataError, match="the calibration text has a token 50"):
        compress(small, keep=0.5, calibration=torch.full((2, 8), 50))
    compress(small, keep=0.5)
    with pytest.raises(UsageError, match="logits of the last ones only"):
        small.logits(ids(small, 1, 8))


def test_gradients_flow_through_a_pruned_forward(small: LanguageModel, ids: Ids) -> None:
    compress(small, keep=0.6, points=[2], reduction="context", alignment="neighbour")
    small(ids(small, 2, 24)).square().sum().backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
