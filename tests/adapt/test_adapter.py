"""The Adapter: a user's blocks over a sequence that gets shorter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ssmprune_cli as ssmprune
from ssmprune_cli.errors import UsageError
from tests.adapt.modules import Classifier, Mixer, classifier, saved_and_loaded

X = torch.randn(8, 12, 8, generator=torch.Generator().manual_seed(0))


class Own(ssmprune.Adapter):
    """Of a Classifier: the mean of the tokens that are left, or the one that it reads."""

    def embed(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.model.get_submodule("embed")(x)
        return tokens

    def head(self, tokens: Tensor, positions: Tensor) -> Any:
        return self.model.get_submodule("head")(tokens.mean(dim=1))


def adapted(model: nn.Module | None = None, **options: Any) -> Own:
    model = classifier() if model is None else model
    layers = model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return Own(model, list(layers), **options)


def lengths(model: Own, x: Tensor) -> list[int]:
    """Tokens that enter each block."""
    found: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].shape[1]))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def test_it_computes_what_the_model_does_until_it_is_compressed() -> None:
    model, own = adapted(), classifier()
    assert torch.equal(model(X), own(X)) and set(model.state_dict()) == {f"model.{key}" for key in own.state_dict()}
    done = ssmprune.compress(model, 0.5, points=[1, 2], calibration=X)
    assert done.tokens == (12, 6, 3) and lengths(model, X) == [12, 6, 3] and done.kinds == {"Mamba": 3}
    assert done.fill is None and done.distances["shorter"] > 0
    ssmprune.restore(model)
    assert torch.equal(model(X), own(X))


def test_protected_tokens_stay_and_other_lengths_keep_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(protect=[0, -1])
    done = ssmprune.compress(model, 0.5, points=[1], calibration=X)
    assert done.protected == (0, 11) and lengths(model, torch.randn(2, 22, 8)) == [22, 12, 12]
    seen: list[Tensor] = []
    monkeypatch.setattr(Own, "head", lambda self, tokens, positions: seen.append(positions))
    model(torch.randn(2, 22, 8))
    assert bool((seen[0][:, 0] == 0).all()) and bool((seen[0][:, -1] == 21).all())


def test_a_copy_and_training() -> None:
    model = adapted()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    expected = model(X)
    for other in (copy.deepcopy(model), saved_and_loaded(model)):
        assert torch.equal(other(X), expected)
    expected.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.parameters())


class Foreign(Mixer):
    """With a parameter that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, offset: float | None = None) -> Tensor:
        return self.scale * super().forward(x, offset)


def foreign() -> Classifier:
    model = classifier()
    for layer in model.layers:
        layer.mixer = Foreign()
    return model


def test_blocks_that_are_not_recognised_are_pruned_by_their_tokens() -> None:
    model = adapted(foreign())
    done = ssmprune.compress(model, 0.5, points=[1], calibration=X, importance="hidden-norm", alignment="none")
    assert done.kinds == {} and lengths(model, X) == [12, 6, 6]
    with pytest.raises(UsageError, match=r"layers\.0: has no recognised mixer(.|\n)*also has scale(.|\n)*hidden-norm"):
        ssmprune.compress(model, 0.5, points=[1], calibration=X)
    assert lengths(model, X) == [12, 6, 6]


class Longer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), dim=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "context"}, "the reduction 'context' needs what is not seen in an Adapter"),
        ({"protect": [0]}, "an Adapter says itself what is protected"),
        ({"points": [3]}, "the model has 3 blocks"),
        ({"calibration": X[:, :6]}, "there are 6 tokens there, too few"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str) -> None:
    model = adapted()
    with pytest.raises(UsageError, match=message):
        ssmprune.compress(model, 0.5, **{"points": [1], "calibration": X, **options})
    assert lengths(model, X) == [12, 12, 12]


def test_blocks_that_do_not_fit_are_named() -> None:
    with pytest.raises(UsageError, match="blocks: the blocks of an Adapter are modules of its model"):
        Own(classifier(), [nn.Linear(2, 2)])
    model = classifier()
    with pytest.raises(UsageError, match="a block is listed twice"):
        Own(model, [model.layers[0], model.layers[0]])
    model.layers[1].mlp = Mixer()
    with pytest.raises(UsageError, match=r"layers\.1: has 2 mixers"):
        ssmprune.compress(adapted(model), 0.5, points=[1], calibration=X)
    model = classifier()
    model.layers[1] = Longer()
    with pytest.raises(UsageError, match=r"layers\.1: gives \(8, 24, 16\) of tokens \(8, 12, 16\)"):
        adapted(model)(X)


class Both(nn.Module):
    """One mixer, ahead and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mixer(x) + self.mixer(x.flip(1)).flip(1)
        return out


def test_a_mixer_outside_of_the_pass_is_not_given_the_tokens_of_another_call() -> None:
    model = adapted()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    model(X)
    with pytest.raises(UsageError, match=r"layers\.0\.mixer: is called outside of the Adapter's pass"):
        model.model(X[:, :6])  # as many as are left in the last block
    ssmprune.restore(model)
    assert torch.equal(model.model(X[:, :6]), classifier()(X[:, :6]))


def test_a_block_that_is_run_again_in_the_backward_pass_is_named() -> None:
    """By activation checkpointing: the tokens that it was given are no longer known."""
    model = classifier()
    model.layers[1] = Checkpointed(model.layers[1])
    wrapped = adapted(model)
    ssmprune.compress(wrapped, 0.5, points=[1], calibration=X)
    loss = wrapped(X).square().sum()
    with pytest.raises(UsageError, match=r"layers\.1\.block\.mixer: is called outside of the Adapter's pass"):
        loss.backward()


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return out


def test_a_block_that_calls_its_mixer_twice_is_named() -> None:
    model = classifier()
    model.layers[1] = Both()
    with pytest.raises(UsageError, match=r"layers\.1\.mixer: is called twice in one block"):
        ssmprune.compress(adapted(model), 0.5, points=[1], calibration=X)


class Backwards(nn.Module):
    """Its mixer reads the sequence from its end."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mixer(x.flip(1)).flip(1)
        return out


def test_a_block_that_flips_its_tokens_is_named_and_nothing_changes() -> None:
    model = classifier()
    model.layers[1] = Backwards()
    with pytest.raises(UsageError, match=r"layers\.1: its mixer has the tokens at other places than the block"):
        ssmprune.compress(adapted(model), 0.5, points=[1], calibration=X)
    assert all("forward" not in vars(module) for module in model.modules())
