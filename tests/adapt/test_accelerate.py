"""`accelerate` and `restore`: our ops in the place of a mixer's own code, and nothing else changes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ssmprune_cli as ssmprune
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.workflows.finetune import build
from tests.adapt.modules import Classifier, Mixer, classifier, close, mixer_of, saved_and_loaded

X = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Classifier:
    return classifier()


@pytest.fixture
def own(model: Classifier) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(X)
    return logits


def ours(model: nn.Module) -> int:
    """How many mixers our ops compute on X: those whose own code does not run."""
    calls = []

    def watched(self: Mixer, x: Tensor, offset: float | None = None) -> Tensor:
        calls.append(self)
        return original(self, x, offset)

    original = Mixer.forward
    with torch.no_grad(), patch.object(Mixer, "forward", watched):
        model(X)
    return sum(isinstance(each, Mixer) for each in model.modules()) - len(calls)


def test_it_lists_what_it_did_and_computes_the_same(model: Classifier, own: Tensor) -> None:
    keys, kind = list(model.state_dict()), type(model.layers[0])
    report = ssmprune.accelerate(model)
    assert report.accelerated == tuple(f"layers.{number}.mixer" for number in range(3)) and not report.refused
    assert repr(report).splitlines()[:2] == ["3 of 3 mixers by our ops", "layers.0.mixer (Mixer): Mamba"]
    assert ours(model) == 3 and close(model(X), own)
    assert list(model.state_dict()) == keys and type(model.layers[0]) is kind
    ssmprune.restore(model)
    assert ours(model) == 0 and torch.equal(model(X), own)


def test_a_refused_mixer_keeps_its_own_code(model: Classifier, own: Tensor) -> None:
    mixer_of(model, 1).scale = nn.Parameter(torch.ones(2))
    report = ssmprune.accelerate(model)
    assert report.refused == {"layers.1.mixer": "no Mamba mixer: it also has scale"}
    assert ours(model) == 2 and close(model(X), own)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_is_accelerated_and_stands_alone(model: Classifier, own: Tensor, copied: Any) -> None:
    ssmprune.accelerate(model)
    other = copied(model)
    assert ours(other) == 3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert close(other(X), own)


def test_weights_are_read_at_every_call(model: Classifier) -> None:
    other = classifier()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    ssmprune.accelerate(model)
    model(X)
    model.load_state_dict(other.state_dict(), assign=True)
    assert close(model(X), other(X))
    mixer_of(model, 0).A_log = nn.Parameter(mixer_of(other, 0).A_log + 0.5)
    mixer_of(other, 0).A_log.data += 0.5
    assert close(model(X), other(X))
    double = model.to(torch.float64)(X.double())
    assert double.dtype == torch.float64 and torch.allclose(double, other.double()(X.double()), atol=1e-12)


def test_training_goes_the_same_way(model: Classifier) -> None:
    other = classifier()
    ssmprune.accelerate(model)
    for each in (model, other):
        optimizer = torch.optim.SGD(each.train().parameters(), lr=0.003)
        for _ in range(2):
            optimizer.zero_grad()
            each(X).square().sum().backward()
            optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_derivatives_in_forward_mode_are_those_of_its_own_code(model: Classifier) -> None:
    ssmprune.accelerate(model.requires_grad_(False))
    with pytest.warns(UserWarning, match="called for a derivative in forward mode, so its own code runs"):
        found = torch.func.jvp(model, (X,), (X,))[1]
    assert close(found, torch.func.jvp(classifier(), (X,), (X,))[1])


def test_hooks_are_called(model: Classifier, own: Tensor) -> None:
    ssmprune.accelerate(model)
    mixer, seen = mixer_of(model, 0), list[str]()
    mixer.register_forward_hook(lambda module, inputs, output: seen.append("mixer"))
    mixer.out_proj.register_forward_hook(lambda module, inputs, output: seen.append("out_proj"))
    assert ours(model) == 3 and seen == ["out_proj", "mixer"]
    mixer.conv1d.register_forward_hook(lambda module, inputs, output: seen.append("conv1d"))
    with pytest.warns(UserWarning, match=r"layers\.0\.mixer: there is a hook on its conv1d, so its own code runs"):
        assert close(model(X), own)
    assert seen == ["out_proj", "mixer", "conv1d", "out_proj", "mixer"]


def test_a_layer_that_became_another_is_not_passed_over(model: Classifier) -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    other = classifier()
    ssmprune.accelerate(model)
    for each in (model, other):
        parametrize.register_parametrization(mixer_of(each, 1).dt_proj, "weight", Halved())
    with pytest.warns(UserWarning, match=r"layers\.1\.mixer: its dt_proj has become a ParametrizedLinear"):
        found = model(X)
    assert close(found, other(X))


class Dropping(Mixer):
    """As VMamba's SS2D has it behind its output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, offset: float | None = None) -> Tensor:
        out: Tensor = self.dropout(super().forward(x, offset))
        return out


def test_dropout_inside_a_mixer_is_at_work_in_training() -> None:
    model = classifier()
    model.layers[1].mixer = Dropping().eval()
    other = copy.deepcopy(model)
    ssmprune.accelerate(model)
    assert ours(model) == 3 and close(model(X), other(X))
    with pytest.warns(UserWarning, match=r"layers\.1\.mixer: its dropout is at work in training, so its own code runs"):
        found = seeded(model.train())
    assert close(found, seeded(other.train()))


def seeded(model: nn.Module) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits: Tensor = model(X)
    return logits


def test_a_layer_whose_forward_was_replaced_is_not_passed_over(model: Classifier) -> None:
    other = classifier()
    ssmprune.accelerate(model)
    for each in (model, other):
        conv = mixer_of(each, 1).conv1d
        vars(conv)["forward"] = lambda x, conv=conv: 2 * nn.Conv1d.forward(conv, x)
    with pytest.warns(UserWarning, match=r"layers\.1\.mixer: the `forward` of its conv1d has been replaced, so"):
        found = model(X)
    assert close(found, other(X))


def test_autocast_has_no_part_in_the_proof(model: Classifier) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert len(ssmprune.accelerate(model).accelerated) == 3


def test_a_call_with_more_than_tokens_takes_the_own_path_and_says_so_once(model: Classifier) -> None:
    ssmprune.accelerate(model)
    mixer, x = mixer_of(model, 0), torch.randn(1, 5, 16)
    plain = mixer(x, None)
    with pytest.warns(UserWarning, match=r"layers\.0\.mixer: called with `offset`, so its own code runs"):
        assert close(mixer(x, 1.0), plain + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixer(x, offset=1.0)


def test_a_session_keeps_it(model: Classifier, own: Tensor) -> None:
    ssmprune.accelerate(model)
    assert close(ssmprune.prepare(model)(X), own)


def test_once_more_is_the_same(model: Classifier, own: Tensor) -> None:
    ssmprune.accelerate(model)
    assert len(ssmprune.accelerate(model).accelerated) == 3
    ssmprune.restore(model)
    assert ours(model) == 0
    with pytest.raises(UsageError, match="nothing of this Classifier is compressed or accelerated"):
        ssmprune.restore(model)


def test_a_users_attribute_of_the_name_of_ours_is_the_users(model: Classifier, own: Tensor) -> None:
    mine = model.pruner = nn.Identity()
    ssmprune.compress(model, 0.5, points=[1], calibration=X)
    ssmprune.restore(model)
    assert model.pruner is mine and torch.equal(model(X), own)


def test_what_cannot_be_accelerated_is_named(model: Classifier) -> None:
    with pytest.raises(UsageError, match=r"a Linear has no selective scan inside(.|\n)*Adapter"):
        ssmprune.accelerate(nn.Linear(2, 2))
    with pytest.raises(UsageError, match=r"a Vim is computed by our ops already(.|\n)*prepare"):
        settings = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=1", "num_classes=2"]
        ssmprune.accelerate(build("vim", settings, name="vim_midclstok_div2", seed=0))
    assert "vim" in FAMILIES
    with pytest.raises(
        UsageError, match=r"mixers are not recognised: layers\.0\.mixer \(Mixer\): refused: its weights"
    ):
        ssmprune.accelerate(model.to("meta"))
    model = classifier()
    vars(mixer_of(model, 0))["forward"] = torch.relu
    with pytest.raises(UsageError, match=r"layers\.0\.mixer: the module's `forward` has been replaced already"):
        ssmprune.accelerate(model)


def test_a_model_of_transformers_says_that_a_cache_keeps_it_slow(tmp_path: Path) -> None:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = library.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=20)
    model = library.MambaForCausalLM(config).eval()
    ids = torch.arange(14).view(2, 7)
    own = model(ids).logits
    ssmprune.accelerate(model)
    assert close(model(ids, use_cache=False, attention_mask=torch.ones(2, 7)).logits, own)
    with pytest.warns(UserWarning, match=r"backbone\.layers\.0\.mixer: called with `cache`, so its own code runs"):
        assert close(model(ids).logits, own)
    model.save_pretrained(tmp_path)
    again = library.MambaForCausalLM.from_pretrained(tmp_path)
    assert close(again(ids).logits, own)
