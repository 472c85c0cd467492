"""A session is a snapshot: nothing that happens to the model reaches it, nothing in it is skipped, and it says how."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ssmprune_cli
from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.inference import Step, prepare
from ssmprune_cli.inference.behaviour import _replaced
from ssmprune_cli.inference.explain import complete
from ssmprune_cli.models import (
    Backbone,
    CausalConv1d,
    DirectionProjections,
    MambaBackbone,
    MambaBlock,
    MambaMixer,
    PlainMambaMixer,
    RMSNorm,
    VMambaMixer,
)
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import compress, restore

AssertClose = Callable[[Tensor, Tensor], None]
SIZES: dict[str, Any] = {"image_size": (32, 32), "patch_size": 4, "stride": 4, "embed_dim": 32, "depth": 4}
MODELS: dict[str, Callable[[], Backbone]] = {
    "vim": lambda: Vim(VimConfig(**SIZES, num_classes=5)),
    "vim, rope": lambda: Vim(VimConfig(**SIZES, num_classes=5, rope=True)),
    "mamba-reg": lambda: MambaReg(MambaRegConfig(**SIZES, num_classes=5, cls_reduce=2)),
    "plainmamba": lambda: PlainMamba(
        PlainMambaConfig(image_size=(32, 32), patch_size=8, embed_dim=32, depth=4, num_classes=5, dw_layers=(1,))
    ),
    "vmamba": lambda: VMamba(VMambaConfig(image_size=(32, 32), embed_dim=32, depths=(1, 3), num_classes=5)),
}


def make(name: str = "vim") -> Backbone:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the authors' start is so near to zero that mistakes would not show
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def logits_of(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images())
    return logits


# Ways of changing a model, of which many leave no trace in the versions of its tensors.


def fused_optimiser(model: Backbone) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(images()).square().sum().backward()
    optimiser.step()


def add_to_data(model: Backbone) -> None:
    for parameter in model.parameters():
        parameter.data += 0.1


def copy_into_data(model: Backbone) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data * 1.5)


def foreach(model: Backbone) -> None:
    torch._foreach_mul_([parameter.data for parameter in model.parameters()], 1.5)


def numpy_views(model: Backbone) -> None:
    for parameter in model.parameters():
        view = parameter.detach().numpy()
        np.multiply(view, 1.5, out=view)


def shared_memory(model: Backbone) -> None:
    model.share_memory()
    add_to_data(model)


def in_place(model: Backbone) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def state_dict(model: Backbone) -> None:
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def another_epsilon(model: Backbone) -> None:
    for module in model.modules():
        if hasattr(module, "eps"):
            setattr(module, "eps", 3.0)  # noqa: B010 - torch types it as a Tensor or Module


def a_forward_hook(model: Backbone) -> None:
    mixer: Any = model.mixers[1]
    mixer.register_forward_hook(lambda module, inputs, output: (3 * output[0], output[1]))


def another_class(model: Backbone) -> None:
    mixer: Any = model.mixers[1]

    class Louder(type(mixer)):  # type: ignore[misc]
        def forward(self, *inputs: Any) -> Any:
            output, statistics = super().forward(*inputs)
            return 3 * output, statistics

    mixer.__class__ = Louder


def another_layer(model: Backbone) -> None:
    mixer: Any = model.mixers[1]
    torch.manual_seed(5)
    mixer.out_proj = nn.Linear(mixer.out_proj.in_features, mixer.out_proj.out_features, bias=False)


def a_parametrization(model: Backbone) -> None:
    class Triple(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 3 * weight

    mixer: Any = model.mixers[1]
    torch.nn.utils.parametrize.register_parametrization(mixer.out_proj, "weight", Triple())


def a_pruner(model: Backbone) -> None:
    compress(model, 0.5, points=[2])


CHANGES = [
    fused_optimiser,
    add_to_data,
    copy_into_data,
    foreach,
    numpy_views,
    shared_memory,
    in_place,
    state_dict,
    another_epsilon,
    a_forward_hook,
    another_class,
    another_layer,
    a_parametrization,
    a_pruner,
]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change.__name__))
def test_a_change_reaches_the_model_and_no_session_made_before_it(
    change: Callable[[Backbone], None], name: str, assert_close: AssertClose
) -> None:
    model = make(name)
    before, session = logits_of(model), prepare(model)
    change(model)
    after = logits_of(model)
    assert not torch.allclose(after, before, rtol=0, atol=1e-3)
    assert_close(session(images()), before)
    assert_close(prepare(model)(images()), after)
    assert_close(session(images()), before)


def test_scale_of_a_mixer() -> None:
    model = make()
    session, before = prepare(model), logits_of(model)
    for mixer in model.mixers:
        mixer.scale = 2.0  # type: ignore[attr-defined]
    assert not torch.allclose(logits_of(model), before, rtol=0, atol=1e-3)
    torch.testing.assert_close(prepare(model)(images()), logits_of(model), rtol=0, atol=1e-4)
    torch.testing.assert_close(session(images()), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_nothing_of_an_inference(name: str) -> None:
    model = make(name)
    before = {key: dict(vars(module)) for key, module in model.named_modules()}
    prepare(model)(images())
    logits_of(model)
    for key, module in model.named_modules():
        assert vars(module).keys() == before[key].keys()
        assert all(vars(module)[name] is value for name, value in before[key].items())


def test_threads_that_update_and_infer_see_their_own_version() -> None:
    """100 sessions, each prepared after an update while two threads call older ones."""
    model, sessions, wrong = make(), [], []
    sessions.append((prepare(model), logits_of(model)))
    stop = threading.Event()

    def check() -> None:
        while not stop.is_set():
            session, expected = sessions[-1]
            if not torch.allclose(session(images()), expected, rtol=0, atol=1e-3):
                wrong.append(1)

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        add_to_data(model)
        sessions.append((prepare(model), logits_of(model)))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forward_of_ones_own_is_refused() -> None:
    model = make()
    block: Any = model.mixers[1]
    original = block.forward
    block.forward = functools.partial(lambda *inputs: original(*inputs))  # as Accelerate puts one there
    with pytest.raises(UsageError, match=r"module layers\.1\.mixer has a `forward` of its own"):
        prepare(model)
    del block.forward
    prepare(model)


@pytest.mark.parametrize(
    ("name", "kind", "method"),
    [
        ("vim", MambaMixer, "forward"),
        ("vim", MambaBlock, "forward"),
        ("vim", MambaBackbone, "features"),
        ("vim", RMSNorm, "forward"),
        ("vim", CausalConv1d, "forward"),
        ("vim", nn.Linear, "forward"),
        ("plainmamba", PlainMambaMixer, "forward"),
        ("vmamba", VMambaMixer, "forward"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_method_replaced_in_a_class_is_called(
    name: str, kind: type[nn.Module], method: str, wrapped: bool, assert_close: AssertClose, monkeypatch: Any
) -> None:
    """As libraries do that change how a layer is computed: before the session is made."""
    model = make(name)
    plain, original = logits_of(model), getattr(kind, method)

    def louder(result: Any) -> Any:
        if isinstance(result, tuple):
            return (louder(result[0]), *result[1:])
        return 1.5 * result if isinstance(result, Tensor) else replace(result, hidden=1.5 * result.hidden)

    def mine(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        return louder(original(self, *inputs, **options))

    monkeypatch.setattr(kind, method, functools.wraps(original)(mine) if wrapped else mine)
    changed = logits_of(model)
    assert not torch.allclose(changed, plain, atol=1e-3)
    session = prepare(model)
    assert_close(session(images()), changed)
    if kind in (MambaMixer, MambaBlock, PlainMambaMixer, VMambaMixer):
        assert f"{kind.__name__}.{method} has been replaced" in str(session.explain())


def test_nothing_of_ours_or_torchs_counts_as_replaced() -> None:
    ours = (MambaMixer, MambaBlock, RMSNorm, CausalConv1d, PlainMambaMixer, VMambaMixer, DirectionProjections)
    kinds: list[type[nn.Module]] = [*ours, nn.Linear, nn.Conv2d, nn.ModuleList, *(type(make(name)) for name in MODELS)]
    assert [name for kind in kinds for name in _replaced(kind)] == []


def test_a_method_of_the_same_model_is_called_in_the_snapshot(assert_close: AssertClose) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 4)
            self.forward = self.forward_v2  # as VMamba's authors choose one

        def forward_v2(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x)
            return result

    module, x = Mixer(), torch.randn(3, 32)
    session, before = prepare(module), module(x).detach()
    with torch.no_grad():
        module.layer.weight.zero_()
    assert_close(session(x), before)


@pytest.fixture
def global_hook() -> Iterator[list[nn.Module]]:
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: called.append(module))
    yield called
    handle.remove()


def test_hooks_for_all_modules_are_called(global_hook: list[nn.Module], assert_close: AssertClose) -> None:
    session = prepare(make())
    explanation = session.explain()
    assert explanation.kind == "plain" and "hooks are registered for all modules" in explanation.refused["cpu"]
    global_hook.clear()
    session(images())
    assert sum(type(module).__name__ == "MambaMixer" for module in global_hook) == 4


def test_hooks_for_all_modules_after_it_was_prepared_are_refused(request: pytest.FixtureRequest) -> None:
    session = prepare(make())
    request.getfixturevalue("global_hook")
    with pytest.raises(SsmpruneError, match="prepare the model again"):
        session(images())


def test_a_session_cannot_be_changed() -> None:
    session = prepare(make())
    for change in (
        session.train,
        session.double,
        lambda: session.to("cpu", torch.bfloat16),
        lambda: session.load_state_dict({}),
    ):
        with pytest.raises(UsageError, match="session"):
            change()
    assert session.eval() is session and not session.training
    assert not any(each.requires_grad for each in session.parameters())


def test_autocast_is_refused() -> None:
    session = prepare(make())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UsageError, match="precision that it was prepared for"):
        session(images())


def test_precisions_and_inputs() -> None:
    model = make()
    half = prepare(model, dtype=torch.bfloat16)
    assert half(images()).dtype == torch.bfloat16 and model.dtype == torch.float32
    # Measured: 0.02 of the largest logit.
    assert (half(images()).float() - logits_of(model)).abs().max() <= 0.05 * logits_of(model).abs().max()
    wide = prepare(model, dtype=torch.float64)
    assert wide.explain().kind == "plain" and "has no fused calls" in wide.explain().refused["cpu"]
    torch.testing.assert_close(wide(images()).float(), logits_of(model), rtol=0, atol=1e-4)
    with pytest.raises(UsageError, match=r"cannot compute in torch\.int8"):
        prepare(model, dtype=torch.int8)
    with pytest.raises(UsageError, match="meta"):
        prepare(copy.deepcopy(model).to("meta"))


def test_outputs_may_be_trained_on() -> None:
    session, weight = prepare(make()), nn.Parameter(torch.ones(5))
    (session(images()) * weight).sum().backward()
    assert weight.grad is not None


def test_training_mode_of_the_model_does_not_matter() -> None:
    model = make("plainmamba")
    expected = logits_of(model)
    model.train()
    torch.testing.assert_close(prepare(model)(images()), expected, rtol=0, atol=1e-5)
    assert model.training and logits_of(model.eval()).equal(expected)


@pytest.mark.parametrize("name", MODELS)
def test_one_snapshot_serves_many_pruners(name: str, assert_close: AssertClose) -> None:
    model = make(name)
    dense, session = logits_of(model), prepare(model)
    for keep in (0.8, 0.5):
        compress(model, keep, points=[2])
        pruned = session.with_pruner(model.pruner)
        expected = logits_of(model)
        restore(model)
        assert_close(pruned(images()), expected)
        assert_close(session(images()), dense)
        assert_close(pruned.with_pruner(None)(images()), dense)
        shared = {each.data_ptr() for each in session.parameters()}
        assert {each.data_ptr() for each in pruned.parameters()} <= shared


def test_copies_of_a_session_and_the_memory_it_leaves() -> None:
    session = prepare(make())
    assert torch.equal(copy.deepcopy(session)(images()), session(images()))
    gone = weakref.ref(session.definition)
    del session
    gc.collect()
    assert gone() is None


def test_any_module_can_be_prepared() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2), nn.Dropout(0.5))
    session = prepare(module)
    assert session.explain().steps == ()
    torch.testing.assert_close(session(images()), module.eval()(images()).detach())
    with pytest.raises(UsageError, match="no slot for a pruner"):
        session.with_pruner(None)
    assert ssmprune_cli.prepare is prepare


def explained(model: nn.Module) -> list[str]:
    return [str(step) for step in prepare(model).explain().steps]


def test_explain_names_every_block_once() -> None:
    model = make()
    assert explained(model) == ["blocks 1 to 4: one call"]
    for reduction in ("drop", "frozen", "pool", "local-merge"):
        compress(model, 0.6, points=[2], reduction=reduction)
        assert explained(model) == ["blocks 1 to 2: one call", "blocks 3 to 4: one call"]
    compress(model, 0.6, points=[2], importance="delta", reduction="drop", alignment="none")
    assert explained(model) == [
        "block 1: one call",
        "block 2: op by op (the pruner looks at its scans)",
        "blocks 3 to 4: one call",
    ]
    restore(model)
    another_class(model)
    assert explained(model)[1] == "block 2: op by op (a Louder in the place of a MambaMixer)"
    assert explained(make("vim, rope")) == ["blocks 1 to 4: the inside of each block in one call"]
    assert explained(make("vmamba")) == ["blocks 1 to 4: the scans of each block in one call"]
    hooked = make("plainmamba")
    a_forward_hook(hooked)
    assert explained(hooked)[1] == "block 2: op by op (a PlainMambaMixer has hooks)"
    assert str(prepare(make()).explain()).startswith("session: cpu\nnot cuda_graph: is for NVIDIA GPUs\nblocks 1 to 4")


def test_steps_are_completed_in_order() -> None:
    steps = [Step(5, 6, "one call"), Step(2, 3, "one call"), Step(8, 8, "inside")]
    assert complete(steps, 8, "op by op", {0: "hooks", 6: "odd"}) == (
        Step(1, 1, "op by op", "hooks"),
        Step(2, 3, "one call"),
        Step(4, 4, "op by op"),
        Step(5, 6, "one call"),
        Step(7, 7, "op by op", "odd"),
        Step(8, 8, "inside"),
    )
