"""Mixers of other people's are recognised by names and shapes, and proven; anything else is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmprune_cli.adapt.mixers import CannotRun, Form, dense, has_scan, recognise
from ssmprune_cli.adapt.mixers.base import Unrecognised
from ssmprune_cli.adapt.mixers.mamba import recognise_mamba
from ssmprune_cli.adapt.mixers.mamba2 import recognise_mamba2
from ssmprune_cli.adapt.mixers.proof import prove
from ssmprune_cli.interface import ScanAlignment
from ssmprune_cli.tokens import Dropped, TokenSequence, gather_tokens
from tests.adapt.modules import SS2D, CentredMixer, Mixer


def mambapy(**options: Any) -> nn.Module:
    library = pytest.importorskip("mambapy.mamba")
    block: nn.Module = library.MambaBlock(library.MambaConfig(d_model=16, n_layers=1, d_state=4, **options))
    return block


def of_transformers(kind: str, **options: Any) -> nn.Module:
    """The first mixer of a model of one layer."""
    library = pytest.importorskip("transformers")
    config = getattr(library, f"{kind}Config")(
        hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=10, **options
    )
    torch.manual_seed(0)
    mixer: nn.Module = getattr(library, f"{kind}Model")(config).layers[0].mixer
    return mixer


def of_jamba() -> nn.Module:
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = library.JambaConfig(**sizes, mamba_d_state=4, mamba_dt_rank=2, num_hidden_layers=2, vocab_size=10)
    torch.manual_seed(0)
    mixer: nn.Module = library.JambaModel(config).layers[0].mamba
    return mixer


MIXERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "by hand": (Mixer, "Mamba"),
    "mambapy": (mambapy, "Mamba"),
    "mambapy with biases": (lambda: mambapy(bias=True), "Mamba"),
    "mambapy without a bias": (lambda: mambapy(conv_bias=False), "Mamba"),
    "mambapy with norms": (lambda: mambapy(inner_layernorms=True), "Mamba"),
    "transformers Mamba": (lambda: of_transformers("Mamba"), "Mamba"),
    "transformers FalconMamba": (lambda: of_transformers("FalconMamba"), "Mamba"),
    "transformers Jamba": (of_jamba, "Mamba"),
    "transformers Mamba2": (
        lambda: of_transformers("Mamba2", num_heads=4, head_dim=8, n_groups=2, chunk_size=8),
        "Mamba-2",
    ),
    "transformers Mamba2 with limits": (
        lambda: of_transformers("Mamba2", num_heads=2, head_dim=16, n_groups=1, time_step_limit=(0.3, 0.5)),
        "Mamba-2",
    ),
    "MambaVision": (CentredMixer, "MambaVision"),
    "SS2D v0": (SS2D, "SS2D"),
    "SS2D v2": (lambda: SS2D(gated=False, first=True), "SS2D"),
    "SS2D of EfficientVMamba": (lambda: SS2D(atrous=True), "EfficientVMamba's SS2D"),
}


@pytest.mark.parametrize("name", MIXERS)
def test_it_is_recognised_and_computes_the_same(name: str) -> None:
    build, kind = MIXERS[name]
    torch.manual_seed(0)
    module = build().eval()
    assert has_scan(module)
    verdict = recognise(module)
    assert verdict.reason is None and verdict.form is not None and verdict.form.kind == kind
    x = torch.randn(3, 9, 16)
    if verdict.form.layout != "tokens":
        x = torch.randn(3, 4, 6, 8) if verdict.form.layout == "grid" else torch.randn(3, 8, 4, 6)
    with torch.no_grad():
        expected, found = module(x), dense(module, verdict.form, x)
    # Sums in float32, in another order.
    assert torch.allclose(found, expected, atol=2e-6 * max(1.0, float(expected.abs().max())), rtol=1e-5)


@pytest.mark.parametrize("name", ["by hand", "transformers Mamba2", "mambapy with norms"])
def test_gradients_are_the_modules_own(name: str) -> None:
    torch.manual_seed(0)
    module = MIXERS[name][0]().eval()
    form = recognise(module).form
    assert form is not None
    x, weight = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    found = torch.autograd.grad((dense(module, form, x) * weight).sum(), list(module.parameters()))
    expected = torch.autograd.grad((module(x) * weight).sum(), list(module.parameters()))
    for (parameter, _), one, other in zip(module.named_parameters(), found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(1 + other.abs().max())), parameter


class Mamba2(nn.Module):
    """The parameters of mamba_ssm's Mamba-2 at its defaults, without its code."""

    def __init__(self) -> None:
        super().__init__()
        self.d_state, self.ngroups = 16, 1
        self.in_proj = nn.Linear(64, 2 * 128 + 2 * 16 + 8, bias=False)
        self.conv1d = nn.Conv1d(160, 160, 4, groups=160, padding=3)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(8)) for _ in range(3))
        self.norm = nn.RMSNorm(128, eps=1e-5)
        self.out_proj = nn.Linear(128, 64, bias=False)


@pytest.mark.parametrize(
    ("name", "module", "recogniser"),
    [("mamba1", Mixer(48, 16, 3), recognise_mamba), ("mamba2", Mamba2(), recognise_mamba2)],
)
def test_what_mamba_ssm_computes(name: str, module: nn.Module, recogniser: Callable[[nn.Module], Form]) -> None:
    values = load_file(Path(__file__).parents[1] / "golden" / "mamba_mixers" / f"{name}.safetensors")
    module.load_state_dict({key[6:]: value for key, value in values.items() if key.startswith("mixer.")})
    with torch.no_grad():
        found = dense(module, recogniser(module), values["input"])
    assert torch.allclose(found, values["output"], atol=2e-6, rtol=1e-5)


def test_a_skip_for_each_channel_is_that_of_its_head_repeated() -> None:
    """mamba_ssm's `D_has_hdim`."""
    torch.manual_seed(0)
    module, x = Mamba2(), torch.randn(2, 7, 64)
    with torch.no_grad():
        module.D.normal_()
        expected = dense(module, recognise_mamba2(module), x)
        module.D = nn.Parameter(module.D.repeat_interleave(16))
        assert torch.allclose(dense(module, recognise_mamba2(module), x), expected, atol=1e-6, rtol=1e-5)


def test_decay_rates_may_be_in_float32_beside_weights_in_bfloat16() -> None:
    """As mamba_ssm and transformers keep them."""
    module = of_transformers("Mamba").eval().to(torch.bfloat16)
    for name in ("A_log", "D"):
        setattr(module, name, nn.Parameter(module.get_parameter(name).float()))
    form = recognise(module).form
    assert form is not None
    x = torch.randn(2, 9, 16).to(torch.bfloat16)
    with torch.no_grad():
        found, expected = dense(module, form, x), module.float()(x.float())
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.01 * expected.norm()


def altered(change: Callable[[Mixer], None]) -> Mixer:
    module = Mixer()
    change(module)
    return module


def _extra(module: Mixer) -> None:
    module.scale = nn.Parameter(torch.ones(3))


def _relu(module: Mixer) -> None:
    module.activation = "relu"  # type: ignore[assignment]


def _dilated(module: Mixer) -> None:
    module.conv1d.dilation = (2,)


def _lora(module: Mixer) -> None:
    class Adapted(nn.Linear):
        pass

    module.dt_proj = Adapted(2, 32)


def _other_order(module: Mixer) -> None:
    own = Mixer.forward
    module.__class__ = type("Sum", (Mixer,), {"forward": lambda self, x: own(self, x) + x.mean(1, keepdim=True)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_extra, "it also has scale"),
        (_relu, "its activation is 'relu'"),
        (_dilated, "not the usual depthwise one"),
        (_lora, "dt_proj is a Adapted, not a Linear"),
        (_other_order, "computes something else: the outputs differ by"),
        (lambda module: module.register_parameter("D", None), "it has no D"),
        (lambda module: setattr(module, "D", nn.Parameter(torch.ones(7))), r"D has shape \(7,\), not \(32,\)"),
    ],
)
def test_one_thing_that_is_not_known_is_a_refusal(change: Callable[[Mixer], None], reason: str) -> None:
    verdict = recognise(altered(change))
    assert verdict.form is None and verdict.reason is not None
    with pytest.raises(Unrecognised, match=reason):
        raise Unrecognised(verdict.reason)


def test_a_module_on_the_meta_device_is_not_taken_on_trust() -> None:
    verdict = recognise(Mixer().to("meta"))
    assert verdict.form is None and "meta device" in str(verdict.reason)


class Stock(Mixer):
    def forward(self, x: Tensor, offset: float | None = None) -> Tensor:
        raise RuntimeError("Expected x.is_cuda() to be true, but got false.")


def test_stock_code_that_cannot_run_here_is_taken_by_class_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    form = recognise(Mixer()).form
    assert form is not None
    with pytest.raises(CannotRun, match=r"fails on cpu: RuntimeError: Expected x\.is_cuda"):
        prove(Stock(), form)
    names = {"__module__": "mamba_ssm.modules.mamba_simple", "__qualname__": "Mamba"}
    module = type("Mamba", (Stock,), names)()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.2.4")
    note = prove(module, form)
    assert note is not None and note.startswith(
        "not compared, accepted as Mamba of mamba_ssm 2.2.4: its own code fails"
    )
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.0")
    with pytest.raises(CannotRun, match=r"of mamba_ssm 9\.0, which we do not know"):
        prove(module, form)


@pytest.mark.parametrize("name", ["by hand", "transformers Mamba2", "mambapy with norms"])
def test_dropped_tokens_decay_the_state_and_stay_in_sight_of_the_convolution(name: str) -> None:
    """With the true steps of the dropped tokens and their inputs in sight, what is lost is their input into the state.
    So a token before the first dropped one is the dense one's, and the others are nearer than without."""
    torch.manual_seed(0)
    module = MIXERS[name][0]().eval()
    form = recognise(module).form
    assert form is not None
    x = torch.randn(2, 10, 16)
    kept, gone = torch.tensor([[0, 1, 2, 5, 6, 9]] * 2), torch.tensor([[3, 4, 7, 8]] * 2)
    with torch.no_grad():
        whole, seen = form.scan(module, x, TokenSequence.dense(x), None, "delta", None)
        delta = seen.delta[0].gather(1, gone[..., None].expand(-1, -1, form.d_inner)).mean(dim=(0, 1))
        context = gather_tokens(x, gone)
        sequence = TokenSequence(gather_tokens(x, kept), None, kept, 10, context=Dropped(context, gone))
        out, statistics = form.scan(module, sequence.hidden, sequence, ScanAlignment(delta[None]), "y", context)
        plain, _ = form.scan(module, sequence.hidden, TokenSequence.dense(sequence.hidden), None, "nothing", None)
    expected = gather_tokens(whole, kept)
    assert statistics.y[0].shape == (2, 6, form.d_inner)
    assert torch.allclose(out[:, :3], expected[:, :3], atol=1e-6)
    assert (out - expected).norm() < 0.9 * (plain - expected).norm()


def test_the_null_step_is_that_of_zero_tokens() -> None:
    for name in ("by hand", "mambapy with norms", "transformers Mamba2", "SS2D v0"):
        module = MIXERS[name][0]().eval()
        form = recognise(module).form
        assert form is not None
        zeros = torch.zeros(1, 12, form.d_model)
        grid = None if form.layout == "tokens" else (3, 4)
        sequence = TokenSequence.dense(zeros, grid=grid)
        _, seen = form.scan(module, zeros, sequence, None, "delta", None)
        # The last of them has zero tokens only in sight of its convolution; in a grid, the one in the middle.
        steps = torch.stack([each[0, 5 if grid else -1] for each in seen.delta])
        assert torch.allclose(form.null_delta(module), steps, atol=1e-6)
