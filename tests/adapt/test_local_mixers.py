"""LocalMamba's mixers in somebody's module: ways through the grid are read from it, and proven with the rest."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ssmprune_cli as ssmprune
from ssmprune_cli.adapt.mixers import Form, dense, has_scan, recognise
from ssmprune_cli.errors import UsageError
from ssmprune_cli.tokens import TokenSequence, gather_tokens
from tests.adapt import local_modules
from tests.adapt.local_modules import Grid, LocalSS2D, MultiMamba, way
from tests.models.conftest import made_up

GOLDEN = Path(__file__).parents[1] / "golden"
WAYS = ["h", "v_flip", "w2", "w7_flip"]
OTHERS = ["h_flip", "v", "w2_flip", "w3"]


def form_of(module: nn.Module) -> Form:
    verdict = recognise(module)
    assert verdict.form is not None and verdict.reason is None, verdict.reason
    return verdict.form


@pytest.mark.parametrize(
    ("build", "kind", "shape"),
    [
        (lambda: MultiMamba(WAYS), "LocalVim", (3, 15, 16)),
        (lambda: MultiMamba(OTHERS, middle=True, bias=False), "LocalVim", (3, 16, 16)),
        (lambda: MultiMamba(["w2_flip"]), "LocalVim", (3, 15, 16)),
        (lambda: LocalSS2D(WAYS), "LocalVMamba's SS2D", (3, 5, 3, 8)),
        (lambda: LocalSS2D([*OTHERS, "h"]), "LocalVMamba's SS2D", (3, 5, 3, 8)),
    ],
)
def test_it_is_recognised_and_computes_the_same(
    build: Callable[[], nn.Module], kind: str, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    module = build().eval()
    assert has_scan(module)
    form, x = form_of(module), torch.randn(shape)
    assert form.kind == kind
    with torch.no_grad():
        expected, found = module(x), dense(module, form, x)
    assert torch.allclose(found, expected, atol=2e-6 * max(1.0, float(expected.abs().max())), rtol=1e-5)
    own = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    ours = torch.autograd.grad(dense(module, form, x).square().sum(), list(module.parameters()))
    for (name, _), one, other in zip(module.named_parameters(), ours, own, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * float(1 + other.abs().max())), name


@pytest.mark.parametrize(
    ("folder", "name", "output", "build"),
    [
        ("localvim_mini", "layers.0.mixer", "mixer0.out", lambda: MultiMamba([""] * 4, width=48, state=16, rank=3)),
        (
            *("localvmamba_mini", "layers.0.blocks.0.op", "layers.0.blocks.0.op.out"),
            lambda: LocalSS2D([""] * 4, width=16, state=16, rank=1),
        ),
    ],
)
def test_what_the_authors_code_computes(
    folder: str, name: str, output: str, build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """Of the first mixer of their models. What comes into it is taken from our models, which the same values prove."""
    values = load_file(GOLDEN / folder / "io.safetensors")
    described = json.loads((GOLDEN / folder / "config.json").read_text(encoding="utf-8"))
    stored = GOLDEN / folder / "state_dict.safetensors"
    keys = described["state_dict_keys"].items() if not stored.exists() else ()
    state = load_file(stored) if stored.exists() else {key: made_up(key, tuple(shape)) for key, (shape, _) in keys}
    directions = described["config"]["directions"]
    torch.save({"state_dict": state, "args": argparse.Namespace(directions=directions)}, tmp_path / "mini.pth")
    model = ssmprune.load(tmp_path / "mini.pth", image_size=56, crop=0.875)
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module = build().eval()
    module.load_state_dict({key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")})
    multi_scan = module.get_submodule("multi_scan")
    assert isinstance(multi_scan, local_modules.MultiScan)
    multi_scan.choices, multi_scan.token_size = directions[0], (7, 7)
    with torch.no_grad():
        model(values["input"])
        x = seen[0].view(*values[output].shape)
        found, own = dense(module, form_of(module), x), module(x)
    assert torch.allclose(found, values[output], atol=1e-5) and torch.allclose(own, values[output], atol=1e-5)


@pytest.mark.parametrize("build", [lambda: MultiMamba(WAYS), lambda: LocalSS2D(OTHERS)])
def test_kept_tokens_are_scanned_on_their_ways(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not aligned: the module's own code, on the ways with the dropped places left out. Padding stays."""
    torch.manual_seed(0)
    module = build().eval()
    form, kept = form_of(module), [0, 2, 3, 7, 8, 11, 14]

    def shortened(direction: str, grid: Grid) -> list[int]:
        return [kept.index(place) if place >= 0 else -1 for place in way(direction, grid) if place in (-1, *kept)]

    x = torch.randn(2, 15, form.d_model)
    positions = torch.tensor([kept] * 2)
    hidden = gather_tokens(x, positions)
    # A token that is protected in the grid is one of the grid all the same.
    grid = (5, 3) if form.layout == "grid" else None
    sequence = TokenSequence(hidden, None, positions, 15, (3,), grid=grid)
    with torch.no_grad():
        found, statistics = form.scan(module, hidden, sequence, None, "y", None)
    monkeypatch.setattr(local_modules, "way", shortened)
    with torch.no_grad():
        if isinstance(module, LocalSS2D):  # its convolution sees zeros at the dropped places
            index = positions[..., None].expand_as(hidden)
            projected = module.in_proj(torch.zeros_like(x).scatter(1, index, hidden))
            u, z = (gather_tokens(each, positions) for each in projected.chunk(2, dim=-1))
            u = torch.zeros(2, 15, form.d_inner).scatter(1, positions[..., None].expand_as(u), u)
            convolved = module.act(module.conv2d(u.mT.unflatten(2, (5, 3)))).flatten(2).mT
            mixed = module.mix(gather_tokens(convolved, positions), (5, 3))
            expected = module.out_proj(mixed * module.act(z))
        else:
            expected = module(hidden)
    assert torch.allclose(found, expected, atol=2e-6)
    assert len(statistics.y) == 4 and statistics.y[0].shape == (2, 7, form.d_inner)


class Local(nn.Module):
    """Tokens (B, L, 8) with a class token amid them, which the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.mixers = nn.ModuleList(MultiMamba(ways, (4, 5), middle=True) for ways in (WAYS, OTHERS, ["h", "w3"]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        logits: Tensor = self.head(x[:, 10])
        return logits


@pytest.fixture
def model() -> Local:
    torch.manual_seed(0)
    return Local().eval()


X = torch.randn(4, 21, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reduction", ["drop", "context"])
def test_a_module_with_it_drops_tokens_and_gets_better_with_more_of_them(model: Local, reduction: str) -> None:
    with torch.no_grad():
        own = model(X)
    said = ssmprune.accelerate(model)
    assert len(said.accelerated) == 3 and "mixers.0 (MultiMamba): LocalVim" in repr(said)
    apart = {}
    with torch.no_grad():
        assert torch.allclose(model(X), own, atol=1e-5)
        for keep in (0.4, 0.9):
            done = ssmprune.compress(model, keep, points=[1], calibration=X, reduction=reduction)
            assert done.protected == (10,) and done.tokens[0] == 21 and done.tokens[2] == 1 + round(20 * keep)
            apart[keep] = float((model(X) - own).norm())
    assert 0 < apart[0.9] < apart[0.4] < float(own.norm())
    ssmprune.restore(model)
    with torch.no_grad():
        assert torch.equal(model(X), own)


def test_a_grid_of_them_with_a_place_that_stays() -> None:
    torch.manual_seed(0)

    class Grids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixers = nn.ModuleList(LocalSS2D(ways) for ways in (WAYS, OTHERS))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for mixer in self.mixers:
                x = x + mixer(x)
            logits: Tensor = self.head(x.mean(dim=(1, 2)))
            return logits

    model, x = Grids().eval(), torch.randn(4, 4, 6, 8)
    done = ssmprune.compress(model, 0.5, points=[1], calibration=x, protect=[0, -1])
    assert done.protected == (0, 23) and done.tokens == (24, 13) and done.kinds == {"LocalVMamba's SS2D": 2}
    with torch.no_grad():
        assert bool(model(x).isfinite().all())


def test_other_ways_afterwards_are_an_error_and_another_grid_is_taken(model: Local) -> None:
    ssmprune.accelerate(model)
    first = model.mixers[0]
    assert isinstance(first, MultiMamba)
    first.multi_scan.choices = ["h", "v_flip", "w2", "w2_flip"]
    with pytest.raises(UsageError, match=r"directions were h, v_flip, w2, w7_flip and have become h, v_flip, w2, w2_f"):
        model(X)
    first.multi_scan.choices = list(WAYS)
    with pytest.raises(UsageError, match=r"`token_size` of 4 x 5 and a class token, and is given 22 tokens"):
        model(torch.randn(1, 22, 8))
    twin = copy.deepcopy(model)
    ssmprune.restore(twin)
    for each in (*model.mixers, *twin.mixers):
        assert isinstance(each, MultiMamba)
        each.multi_scan.token_size = (7, 3)
    larger = torch.randn(1, 22, 8)
    with torch.no_grad():
        assert torch.allclose(model(larger), twin(larger), atol=1e-5)


def test_a_hook_on_the_gate_is_called(model: Local) -> None:
    ssmprune.accelerate(model)
    seen: list[int] = []
    model.mixers[1].get_submodule("attn").register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hook on its attn, so its own code runs"), torch.no_grad():
        model(X)
    assert len(seen) == 4
    grid = LocalSS2D(WAYS).eval()
    ssmprune.accelerate(grid)
    grid.multi_scan.get_submodule("attn").register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"hook on its multi_scan\.attn, so its own code runs"), torch.no_grad():
        grid(torch.randn(1, 4, 4, 8))
    assert len(seen) == 8


def _searching(module: MultiMamba) -> None:
    module.multi_scan.weights = nn.Parameter(torch.zeros(4, 1, 1, 1))


def _without(module: MultiMamba) -> None:
    del module.multi_scan.choices


def _unknown(module: MultiMamba) -> None:
    module.multi_scan.choices = ["h", "v_flip", "w2", "diagonal"]


def _other(module: MultiMamba) -> None:
    """Not the ways that the code takes."""
    chosen = module.multi_scan.choices
    module.multi_scan.choices = chosen[::-1]

    class Fixed(MultiMamba):
        def forward(self, x: Tensor) -> Tensor:
            said, self.multi_scan.choices = self.multi_scan.choices, chosen
            out = super().forward(x)
            self.multi_scan.choices = said
            return out

    module.__class__ = Fixed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_searching, "it also has multi_scan.weights"),
        (_without, "its scan directions, which no shape tells, are in no list `multi_scan.choices`"),
        (_unknown, "direction diagonal"),
        (_other, "on random input it computes something else"),
    ],
)
def test_what_does_not_say_its_ways_is_refused(change: Callable[[MultiMamba], None], reason: str) -> None:
    module = MultiMamba(list(WAYS))
    change(module)
    verdict = recognise(module)
    assert verdict.form is None and reason in str(verdict.reason), verdict.reason
