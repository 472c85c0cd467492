"""Tokens are dropped inside the mixers of somebody's module, and everything around them stays as it is."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import ssmprune_cli as ssmprune
from ssmprune_cli.adapt import Inside, put_back, stored
from ssmprune_cli.adapt.stream import Stream
from ssmprune_cli.adapt.swap import swapped_in
from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning import TokenPruner
from tests.adapt.modules import SS2D, Block, Classifier, Mixer, classifier, close, mixer_of, saved_and_loaded

X = torch.randn(8, 12, 8, generator=torch.Generator().manual_seed(0))


def stream_of(model: nn.Module) -> Stream:
    place = swapped_in(model)[0].place
    assert isinstance(place, Stream)
    return place


def kept_after(model: nn.Module, x: Tensor) -> list[Tensor]:
    """(B, K) positions after each point."""
    pruner, kept = stream_of(model).pruner, []
    assert isinstance(pruner, TokenPruner)
    handle = pruner.register_forward_hook(lambda module, inputs, after: kept.append(after.positions))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept


def dropped_by_hand(model: Classifier, x: Tensor, kept: Tensor, tokenwise: bool) -> Tensor:
    """`drop` after the first mixer without alignment, in the module's own code; zeros at the dropped places."""

    def on_kept(part: nn.Module, values: Tensor) -> Tensor:
        index = kept[..., None].expand(-1, -1, values.shape[2])
        return torch.zeros_like(values).scatter(1, index, part(values.gather(1, index)))

    x = model.embed(x)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        normed = layer.norm(x)
        x = x + (on_kept(layer.mixer, normed) if number else layer.mixer(normed))
        x = x + (on_kept(layer.mlp, x) if tokenwise else layer.mlp(x))
    logits: Tensor = model.head(x.mean(dim=1))
    return logits


@pytest.mark.parametrize("tokenwise", [False, True])
def test_it_is_what_the_modules_own_code_computes_on_the_kept_tokens(tokenwise: bool) -> None:
    model = classifier()
    patterns = ["layers.*.mlp"] if tokenwise else []
    options: dict[str, Any] = {"reduction": "drop", "alignment": "none", "tokenwise": patterns}
    done = ssmprune.compress(model, 0.5, points=[1], calibration=X, **options)
    assert done.tokens == (12, 6, 6) and done.kinds == {"Mamba": 3} and done.protected == ()
    assert min(done.distances, key=lambda fill: done.distances[fill]) == done.fill
    stream_of(model).fill = "zero"
    (kept,) = kept_after(model, X)
    assert kept.shape == (8, 6) and bool((kept.diff(dim=1) > 0).all())
    with torch.no_grad():
        assert close(model(X), dropped_by_hand(classifier(), X, kept, tokenwise))


def test_a_norm_before_the_first_mixer_of_a_stage_sees_all_tokens() -> None:
    model, other = classifier(), classifier()
    ssmprune.compress(model, 0.5, points=[1], calibration=X, reduction="drop", tokenwise=["layers.*.norm"])
    ssmprune.compress(other, 0.5, points=[1], calibration=X, reduction="drop")
    stream_of(model).fill = stream_of(other).fill = "zero"
    lengths: list[int] = []
    own, norms = nn.LayerNorm.forward, [layer.get_submodule("norm") for layer in model.layers]

    def watched(self: nn.LayerNorm, x: Tensor) -> Tensor:
        lengths.extend([x.shape[1]] if self in norms else [])
        return own(self, x)

    with torch.no_grad(), patch.object(nn.LayerNorm, "forward", watched):
        assert close(model(X), other(X))  # mixers are given the same
    assert lengths == [12, 6, 6]


def test_the_fill_with_the_least_distance_is_taken_and_the_distances_are_those_of_the_answers() -> None:
    from ssmprune_cli.pruning import divergence

    model, own = classifier(), classifier()
    done = ssmprune.compress(model, 0.4, points=[1], calibration=X)
    with torch.no_grad():
        for fill, expected in done.distances.items():
            stream_of(model).fill = fill  # type: ignore[assignment]
            found = float(divergence(own(X), model(X)).mean())
            assert found == pytest.approx(expected, rel=1e-3)


def test_keeping_all_is_the_dense_model_bit_for_bit() -> None:
    model, other = classifier(), classifier()
    ssmprune.compress(model, 1.0, points=[1, 2], calibration=X)
    ssmprune.accelerate(other)
    with torch.no_grad():
        assert torch.equal(model(X), other(X))


@pytest.mark.parametrize(
    ("read", "protect", "expected"), [(None, None, ()), (0, None, (0,)), (-1, None, (11,)), (4, [2, -1], (2, 11))]
)
def test_what_the_head_reads_is_protected(read: int | None, protect: Any, expected: tuple[int, ...]) -> None:
    model = classifier(read=read)
    done = ssmprune.compress(model, 0.3, points=[1, 2], calibration=X, protect=protect)
    assert done.protected == expected
    for kept in kept_after(model, X):
        assert all(bool((kept == place).any(dim=1).all()) for place in expected)


class Largest(Classifier):
    """Its head reads the largest value of each channel: of tokens that are others for every input."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x.amax(dim=1))
        return logits


def test_a_maximum_over_all_tokens_protects_none() -> None:
    inputs = torch.randn(2, 128, 8, generator=torch.Generator().manual_seed(0))
    assert ssmprune.compress(Largest(), 0.5, points=[1], calibration=inputs).protected == ()


def test_inputs_of_another_length_keep_the_same_share_and_the_same_end() -> None:
    model = classifier(read=-1)
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    (kept,) = kept_after(model, torch.randn(2, 23, 8))
    assert kept.shape == (2, 13) and bool((kept[:, -1] == 22).all())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_gradients_flow_and_training_learns(mode: Callable[[], Any]) -> None:
    """In whatever mode it was compressed."""
    model = classifier(read=0)
    with mode():
        done = ssmprune.compress(model, 0.5, points=[1], calibration=X * 1)
    assert done.protected == (0,)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), torch.arange(8) % 5)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_restore_gives_the_module_back_and_the_keys_never_change() -> None:
    model, own = classifier(), classifier()
    keys = list(model.state_dict())
    ssmprune.compress(model, 0.5, points=[1], calibration=X, tokenwise=["layers.*.mlp"])
    assert list(model.state_dict()) == keys and not torch.equal(model(X), own(X))
    ssmprune.restore(model)
    assert torch.equal(model(X), own(X))


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_drops_the_same_tokens(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = classifier()
    ssmprune.compress(model, 0.5, points=[1], calibration=X, tokenwise=["layers.*.mlp"])
    other = copied(model)
    expected = model(X)
    ssmprune.restore(model)
    assert torch.equal(other(X), expected) and not torch.equal(model(X), expected)
    assert other.double()(X.double()).dtype == torch.float64


def test_what_is_stored_makes_another_module_drop_the_same_tokens() -> None:
    model, other = classifier(), classifier()
    ssmprune.compress(model, 0.5, points=[1], calibration=X, tokenwise=["layers.*.mlp"])
    inside, tensors = stored(model)
    put_back(other, Inside.from_dict(json.loads(json.dumps(inside.to_dict()))), tensors)
    assert torch.equal(other(X), model(X))
    order = tuple(name.replace("mlp", "ffn") for name in inside.order)
    missing = replace(inside, order=order, tokenwise={name: "" for name in order if "ffn" in name})
    with pytest.raises(UsageError, match=r"layers\.0\.ffn: there is no such module, and the compressed one had it"):
        put_back(other, missing, tensors)
    assert torch.equal(other(X), model(X))


def test_calibration_leaves_modes_and_the_random_state_alone() -> None:
    model = classifier().train()
    model.layers[1].eval()
    state = torch.get_rng_state()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.layers[0].training and not model.layers[1].training


def test_an_exception_in_a_pass_does_no_harm_to_the_next() -> None:
    model = classifier()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    expected = model(X)
    handle = model.get_submodule("layers.2.norm").register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    handle.remove()
    assert torch.equal(model(X), expected)
    assert not stream_of(model)._passes
    handle = model.get_submodule("layers.2.norm").register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(X)
    handle.remove()
    with pytest.warns(UserWarning, match="called with `offset`, so its own code runs"):  # all tokens are there again
        mixer_of(model, 0)(torch.randn(1, 12, 16), 1.0)


def test_two_threads_do_not_meet() -> None:
    model = classifier()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    inputs = [X[:4], X[4:, :10]]
    expected = [model(each) for each in inputs]
    found: dict[int, Tensor] = {}
    inside, outside = threading.Event(), threading.Event()

    def wait(module: nn.Module, inputs: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            outside.wait(20)

    handle = model.layers[2].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.update({0: model(inputs[0])}))
    thread.start()
    inside.wait(20)
    found[1] = model(inputs[1])
    outside.set()
    thread.join()
    handle.remove()
    assert all(torch.equal(found[number], expected[number]) for number in (0, 1))


class Pyramid(nn.Module):
    """Two stages of grids, with a downsampling between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(SS2D(8) for _ in range(2))
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.second = nn.ModuleList(SS2D(8, gated=False) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.first:
            x = x + mixer(x)
        x = self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for mixer in self.second:
            x = x + mixer(x)
        logits: Tensor = self.head(x.mean(dim=(1, 2)))
        return logits


def test_each_stage_of_a_pyramid_begins_with_all_tokens() -> None:
    torch.manual_seed(0)
    model, x = Pyramid().eval(), torch.randn(4, 8, 6, 8)
    done = ssmprune.compress(model, 0.5, points=[1, 3], calibration=x)
    assert done.tokens == (48, 24, 12, 6) and done.kinds == {"SS2D": 4}
    assert [kept.shape[1] for kept in kept_after(model, x)] == [24, 6]
    with pytest.raises(UsageError, match=r"positions are those of one sequence, and the mixers see 12, 48 tokens"):
        ssmprune.compress(model, 0.5, calibration=x, protect=[0])


class UNet(nn.Module):
    """As VM-UNet: down, up again, and what was there before the way down is added."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleList(SS2D(8) for _ in range(2)) for _ in range(2))
        self.middle = nn.ModuleList(SS2D(8) for _ in range(2))
        self.down, self.up = nn.Conv2d(8, 8, 2, stride=2), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.encoder:
            x = x + mixer(self.norm(x))
        y = self.down(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for mixer in self.middle:
            y = y + mixer(self.norm(y))
        x = x + self.up(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for mixer in self.decoder:
            x = x + mixer(self.norm(x))
        return x


def test_a_u_net_has_the_same_tokens_at_the_same_places_on_its_way_up() -> None:
    """What the middle writes comes to other places of the decoder's grid, and is no flip of it."""
    torch.manual_seed(0)
    model, x = UNet().eval(), 0.1 * torch.randn(4, 6, 8, 8)
    with torch.no_grad():
        own = model(x)
    done = ssmprune.compress(model, 0.5, points=[1, 3, 5], calibration=x)
    assert done.tokens == (48, 24, 12, 6, 48, 24) and done.protected == ()
    with torch.no_grad():
        found = model(x)
    assert found.shape == own.shape and 0 < float((found - own).norm()) < float(own.norm())


class Flipped(nn.Module):
    """Each layer reads the sequence the other way round."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.ahead, self.back, self.beside = Mixer(), Mixer(), beside

    def forward(self, x: Tensor) -> Tensor:
        if self.beside:
            out: Tensor = x + self.ahead(x) + self.back(x.flip(1)).flip(1)
        else:
            x = x + self.ahead(x)
            out = x + self.back(x.flip(1)).flip(1)
        return out.mean(dim=1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mixer(self.mixer(x))
        return out.mean(dim=1)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Strange(Mixer):
    def forward(self, x: Tensor, offset: float | None = None) -> Tensor:
        return super().forward(x, offset) + x.mean(dim=1, keepdim=True)


def strange() -> Classifier:
    model = classifier()
    model.layers[1].mixer = Strange()
    return model


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(dim=1, keepdim=True)


class Ahead(nn.Module):
    """Each token sees the next one."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), dim=1)


def replaced() -> nn.Module:
    module = nn.GELU()
    vars(module)["forward"] = torch.relu
    return module


def mixing(mlp: nn.Module) -> Classifier:
    model = classifier()
    model.layers[1].mlp = mlp
    return model


TOKENS = torch.randn(4, 12, 16)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.Linear(8, 2), {}, r"a Linear has no selective scan inside(.|\n)*Adapter"),
        (lambda: Flipped(True), {"calibration": TOKENS}, r"back: does not read what ahead wrote(.|\n)*Adapter"),
        (lambda: Flipped(False), {"calibration": TOKENS}, "back: has its tokens at other places than ahead"),
        (Twice, {"calibration": TOKENS}, "mixer: is called twice in one pass"),
        (Unused, {"calibration": TOKENS}, "none of the recognised mixers is called"),
        (strange, {}, r"layers\.1\.mixer \(Strange\): refused: on random input it computes something else"),
        (classifier, {"calibration": None}, "there are none(.|\n)*Give `calibration=`"),
        (classifier, {"calibration": [X, X[:, :9]]}, r"have two sizes: \[\(12, 8\)\] and \[\(9, 8\)\]"),
        (classifier, {"calibration": X.where(X < 2, torch.nan)}, "calibration inputs hold a NaN"),
        (classifier, {"calibration": []}, "there are no calibration inputs"),
        (classifier, {"calibration": "photos/"}, "a value of type str holds no calibration inputs"),
        (classifier, {"calibration": X[:, :6]}, r"prune point 1: there are 6 tokens there, too few to drop any"),
        (classifier, {"points": [3]}, "the model has 3 blocks, so a point lies between 1 and 2"),
        (classifier, {"protect": [12]}, "protect: position 12 is protected, and there are 12 tokens"),
        (classifier, {"reduction": "frozen"}, "the reduction 'frozen' needs what is not seen(.|\n)*context, drop"),
        (classifier, {"importance": "hidden-norm"}, "the score 'hidden-norm' needs the residual stream"),
        (classifier, {"tokenwise": ["blocks.*.mlp"]}, r"tokenwise 'blocks\.\*\.mlp': names no module"),
        (
            classifier,
            {"tokenwise": ["layers.1"]},
            r"tokenwise 'layers\.1': has a mixer inside",
        ),
        (
            lambda: mixing(Mean()),
            {"tokenwise": ["layers.*.mlp"]},
            r"layers\.1\.mlp: gives some of the tokens other outputs when",
        ),
        (lambda: mixing(Ahead()), {"tokenwise": ["layers.*.mlp"]}, r"layers\.1\.mlp: gives some of the tokens other"),
        (classifier, {"tokenwise": ["*.out_proj"]}, r"tokenwise 'layers\.0\.mixer\.out_proj': lies inside a mixer"),
        (lambda: mixing(replaced()), {"tokenwise": ["layers.*.mlp"]}, "`forward` has been replaced already"),
        (classifier, {"tokenwise": ["*.mlp", "*.mlp.0"]}, "lies inside another module that is named"),
    ],
)
def test_what_does_not_fit_is_one_error_and_changes_nothing(
    model: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    built = model()
    with pytest.raises(UsageError, match=message):
        ssmprune.compress(built, 0.5, **{"calibration": X, "points": [1], **options})
    stand_ins = [vars(module)["forward"] for module in built.modules() if "forward" in vars(module)]
    assert not swapped_in(built) and all(each is torch.relu for each in stand_ins)


def test_an_error_leaves_an_earlier_compression_as_it_was() -> None:
    model = classifier()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    expected = model(X)
    with pytest.raises(UsageError, match="position 40"):
        ssmprune.compress(model, 0.5, points=[1], calibration=X, protect=[40])
    assert torch.equal(model(X), expected)
    with pytest.raises(UsageError, match="the model drops tokens"):
        ssmprune.accelerate(model)


def test_calls_that_do_not_fit_a_pass_are_named() -> None:
    model = classifier()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    with pytest.raises(UsageError, match=r"layers\.1\.mixer: is called out of turn: next in the pass is layers\.0"):
        model.layers[1](torch.randn(1, 12, 16))
    model.layers[0](torch.randn(1, 12, 16))
    with pytest.raises(UsageError, match=r"layers\.1\.mixer: is given 1 x 9 tokens.*had 1 x 12"):
        model.layers[1](torch.randn(1, 9, 16))
    model.layers[0](torch.randn(1, 12, 16))
    model.layers[1](torch.randn(1, 12, 16))
    with pytest.raises(UsageError, match=r"layers\.2\.mixer: called with `offset`, while tokens are dropped"):
        mixer_of(model, 2)(torch.randn(1, 12, 16), 1.0)
    with torch.no_grad():
        model(X)


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2"])
def test_a_language_model_of_transformers_keeps_its_last_token(kind: str) -> None:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    more = {"num_heads": 2, "head_dim": 16, "n_groups": 1} if kind == "Mamba2" else {}
    config = getattr(library, f"{kind}Config")(
        hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=20, use_cache=False, **more
    )
    model = getattr(library, f"{kind}ForCausalLM")(config).eval()
    ids = torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = model(ids).logits
    done = ssmprune.compress(model, 0.5, points=[1], calibration=[{"input_ids": ids}])
    assert done.protected == (11,) and done.tokens == (12, 7)
    with torch.no_grad():
        pruned = model(ids).logits
    assert pruned.shape == dense.shape and not torch.allclose(pruned, dense, atol=1e-4)
    assert torch.allclose(pruned[:, -1], dense[:, -1], atol=0.5)
    model.config.use_cache = True
    with pytest.raises(
        UsageError, match=r"mixer: called with `cache`, which our scan has no answer to(.|\n)*use_cache"
    ):
        ssmprune.compress(model, 0.5, points=[1], calibration=[{"input_ids": ids}])
