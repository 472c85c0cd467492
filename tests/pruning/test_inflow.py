"""What feeds the scans: frozen and pooled tokens, sizes and mass, in every family."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.common.inflow import Inflow, inflow
from ssmprune_cli.models.efficientvmamba.model import EfficientVMamba, EfficientVMambaConfig
from ssmprune_cli.models.localvmamba.model import LocalVMamba, LocalVMambaConfig
from ssmprune_cli.models.mamba.localvim import LocalVim, LocalVimConfig
from ssmprune_cli.models.mamba.mambar import MambaReg, MambaRegConfig
from ssmprune_cli.models.mamba.videomamba import VideoMamba, VideoMambaConfig
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.models.medmamba.model import MedMamba, MedMambaConfig
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig
from ssmprune_cli.pruning import REDUCTIONS, PruneSchedule, PruneSettings, TokenPruner, compress, restore
from ssmprune_cli.pruning.divergence import divergence
from ssmprune_cli.pruning.mass import MASSES
from ssmprune_cli.tokens import Dropped, TokenSequence, nearest
from ssmprune_cli.workflows.measure.flops import count_flops

SIZE, PATCH, DIM, DEPTH = 16, 4, 8, 3
FAMILIES = (
    "vim",
    "videomamba",
    "mambar",
    "localvim",
    "plainmamba",
    "vmamba",
    "localvmamba",
    "medmamba",
    "efficientvmamba",
)
# The gates of these look at the live tokens alone: see test_localvim.py.
UNGATED = [family for family in FAMILIES if family not in ("localvim", "localvmamba", "efficientvmamba")]


def build(family: str) -> Backbone:
    torch.manual_seed(0)
    model: Backbone
    weight = (
        8.0 if family in ("plainmamba", "vmamba", "localvmamba", "medmamba", "efficientvmamba") else 1.0
    )  # their authors start from small weights
    if family == "vim":
        model = Vim(VimConfig(image_size=(SIZE, SIZE), patch_size=PATCH, stride=PATCH, embed_dim=DIM, depth=DEPTH))
    elif family == "videomamba":
        config = VideoMambaConfig(image_size=(SIZE, SIZE), patch_size=PATCH, stride=PATCH, embed_dim=DIM, depth=DEPTH)
        model = VideoMamba(config)
    elif family == "mambar":
        sizes = MambaRegConfig(image_size=(SIZE, SIZE), patch_size=PATCH, stride=PATCH, embed_dim=DIM, depth=DEPTH)
        model = MambaReg(sizes)
    elif family == "localvim":
        local = LocalVimConfig(image_size=(SIZE, SIZE), patch_size=PATCH, stride=PATCH, embed_dim=DIM, depth=DEPTH)
        model = LocalVim(local)
    elif family == "plainmamba":
        model = PlainMamba(PlainMambaConfig(image_size=(SIZE, SIZE), patch_size=PATCH, embed_dim=DIM, depth=DEPTH))
    elif family == "efficientvmamba":
        model = EfficientVMamba(EfficientVMambaConfig(image_size=(SIZE, SIZE), embed_dim=DIM, depths=(DEPTH, 1, 1, 1)))
    elif family == "localvmamba":
        model = LocalVMamba(LocalVMambaConfig(image_size=(SIZE, SIZE), embed_dim=DIM, depths=(DEPTH, 1)))
    elif family == "medmamba":
        model = MedMamba(MedMambaConfig(image_size=(SIZE, SIZE), embed_dim=2 * DIM, depths=(DEPTH, 1)))
    else:
        model = VMamba(VMambaConfig(image_size=(SIZE, SIZE), embed_dim=DIM, depths=(DEPTH, 1)))
    with torch.no_grad():
        for parameter in model.parameters():  # zero-initialised biases and small weights would hide mistakes
            nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else parameter.mul_(weight)
    return model.double().eval()


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)


class Spy(nn.Module):
    """Hands on to a pruner, if there is one, and remembers what came out of every block."""

    def __init__(self, inner: TokenPruner | None) -> None:
        super().__init__()
        self.inner = inner
        self.after: list[TokenSequence] = []

    def wants(self, block: int) -> Wanted:
        return "delta"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None if self.inner is None else self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        self.after.append(sequence)
        assert {y.shape[:2] for y in (*statistics.y, *statistics.delta)} == {sequence.positions.shape}
        return sequence if self.inner is None else self.inner(block, sequence, statistics)


def spied(model: Backbone) -> tuple[Tensor, list[TokenSequence]]:
    assert model.pruner is None or isinstance(model.pruner, TokenPruner)
    inner, model.pruner = model.pruner, Spy(model.pruner)
    with torch.no_grad():
        logits = model(images())
    seen = model.pruner.after
    model.pruner = inner
    return logits, seen


def at(values: Tensor, positions: Tensor) -> Tensor:
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))


@pytest.mark.parametrize("family", UNGATED)
def test_live_tokens_lose_nothing_to_tokens_frozen_a_block_ago(family: str) -> None:
    """Right after freezing, a frozen token's state is that of the dense model: so are the live tokens' outputs."""
    model = build(family)
    _, dense = spied(model)
    for reduction, same in (("frozen", True), ("context", False)):
        compress(model, 0.5, points=[1], reduction=reduction, alignment="none")
        _, after = spied(model)
        restore(model)
        kept = after[1]
        assert kept.positions.shape[1] < dense[1].positions.shape[1]
        # Sums in another order: 1e-10 of values around one.
        error = (kept.stream - at(dense[1].stream, kept.positions)).abs().max()
        assert bool(error < 1e-10) == same


@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_of_no_mass_is_the_context_alone(family: str) -> None:
    model = build(family)
    compress(model, [0.7, 0.6], points=[1, 2], reduction="context", alignment="none")
    expected, _ = spied(model)
    compress(model, [0.7, 0.6], points=[1, 2], reduction="pool")
    assert isinstance(model.pruner, TokenPruner) and model.pruner.settings.alignment == "mass"
    different, _ = spied(model)
    model.pruner.set_mass(0.0)
    found, _ = spied(model)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(different, expected, rtol=0, atol=1e-6)


def test_a_pooled_step_by_hand() -> None:
    """Five tokens in a row, 1 and 3 live: 0 and 2 (as near to both) go to 1, and 4 to 3."""
    values = torch.tensor([[[10.0], [30.0]]], dtype=torch.float64)
    frozen = Dropped(torch.zeros(1, 3, 1), torch.tensor([[0, 2, 4]]))
    sequence = TokenSequence(values, None, torch.tensor([[1, 3]]), 5, frozen=frozen, pooled=True)
    others = torch.tensor([[[1.0], [4.0], [7.0]]], dtype=torch.float64)
    alignment = ScanAlignment(mass=torch.tensor(0.5))
    flow = inflow(sequence, values, others, alignment)
    assert flow.values[0, :, 0].tolist() == [1, 10, 4, 30, 7]
    assert flow.size is not None and flow.size.tolist() == [[3, 2]]
    u, own = flow.pool(flow.values)
    assert own is not None and own[0, :, 0].tolist() == [10, 30]
    assert u[0, :, 0].tolist() == [(10 + 0.5 * (1 + 4)) / 2, (30 + 0.5 * 7) / 1.5]
    # One channel, one state, A = -1, B = C = 1: steps 0.2 and 0.3 grow by 1 + 0.5 * 2 and 1 + 0.5 * 1.
    ones = torch.ones(1, 2, 1, dtype=torch.float64)
    raw = torch.tensor([0.2, 0.3], dtype=torch.float64).expm1().log().view(1, 2, 1)
    bias, skip = torch.zeros(1, dtype=torch.float64), torch.full((1,), 0.1, dtype=torch.float64)
    y = flow.scan(
        0, u, raw, -torch.ones(1, 1, dtype=torch.float64), ones, ones, skip, own=own, delta_bias=bias, gap=None,
        size=flow.size, read=None,
    )  # fmt: skip
    first = 0.2 * 2 * u[0, 0, 0]
    second = torch.exp(torch.tensor(-0.3 * 1.5, dtype=torch.float64)) * first + 0.3 * 1.5 * u[0, 1, 0]
    expected = torch.stack((first + 0.1 * 10, second + 0.1 * 30))
    assert torch.allclose(y[0, :, 0], expected, rtol=0, atol=1e-7)  # the mass is stored in float32


def test_cells_on_a_grid_are_counted_in_rows_and_columns() -> None:
    # Of a 3 x 3 grid the places 1 (above) and 8 (corner) are live; 4 is one row below 1 and two steps from 8.
    frozen = Dropped(torch.zeros(1, 7, 1), torch.tensor([[0, 2, 3, 4, 5, 6, 7]]))
    sequence = TokenSequence(torch.zeros(1, 2, 1), None, torch.tensor([[1, 8]]), 9, frozen=frozen, pooled=True)
    flow = inflow(sequence, torch.zeros(1, 2, 1), torch.zeros(1, 7, 1), None, columns=3)
    assert flow.cells is not None
    assert flow.cells.owner.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduction", [name for name in REDUCTIONS.names() if REDUCTIONS.get(name).aligned])
def test_samples_are_independent_and_gradients_flow(family: str, reduction: str) -> None:
    model = build(family)
    compress(model, 0.6, points=[1, 2], reduction=reduction, importance="delta")
    assert count_flops(model.float()).all_directions > 0  # no op that is neither counted nor known to be free
    model, batch = model.double(), images(3)
    logits = model(batch)
    for number in range(3):
        assert torch.allclose(model(batch[number : number + 1]), logits[number : number + 1], rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(batch.requires_grad_()), torch.arange(3)), batch)
    assert gradient.isfinite().all() and (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("reduction", ["frozen", "pool", "local-merge"])
def test_gradcheck(reduction: str) -> None:
    model = build("vim")
    compress(model, 0.5, points=[1], reduction=reduction)
    names = ("layers.1.mixer.D", "layers.1.mixer.dt_proj.bias", "layers.1.mixer.conv1d.weight")
    weights = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    batch = images(1)

    def logits(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        found: Tensor = torch.func.functional_call(model, given, (batch,))
        return found[:, :3]

    assert torch.autograd.gradcheck(logits, weights)


def test_which_tokens_stay_frozen() -> None:
    hidden = torch.arange(8.0).view(1, 8, 1)
    sequence = TokenSequence.dense(hidden)

    def twice(name: str) -> TokenSequence:
        reduction = REDUCTIONS.get(name)
        first = reduction.apply(sequence, torch.tensor([[9.0, 1, 8, 2, 7, 3, 6, 0]]), 4)
        assert first.positions.tolist() == [[0, 2, 4, 6]]
        return reduction.apply(first, torch.tensor([[1.0, 2, 3, 4]]), 2)

    for name, positions, values, size in (
        ("frozen", [0, 2, 1, 3, 5, 7], [0, 2, 1, 3, 5, 7], None),
        ("frozen-once", [0, 2], [0, 2], None),
        ("frozen-pairs", [0, 1, 5], [1, 2, 6], [2, 2, 2]),  # 0 with 2, before that 1 with 3 and 5 with 7
    ):
        result = twice(name)
        assert result.positions.tolist() == [[4, 6]]
        assert result.frozen is not None
        assert result.frozen.positions.tolist() == [positions]
        assert result.frozen.stream[0, :, 0].tolist() == values
        assert (None if result.frozen.size is None else result.frozen.size[0].tolist()) == size


def test_frozen_near_leaves_the_far_half_to_the_convolutions() -> None:
    sequence = TokenSequence.dense(torch.arange(9.0).view(1, 9, 1))
    result = REDUCTIONS.get("frozen-near").apply(sequence, torch.tensor([[0.0, 9, 8, 0, 0, 0, 0, 0, 0]]), 2)
    # 1 and 2 are live. Distances of 0, 3, 4, 5, 6, 7, 8 are 1, 1, 2, 3, 4, 5, 6.
    assert result.frozen is not None and result.frozen.positions.tolist() == [[0, 3, 4, 5]]
    assert result.context is not None and result.context.positions.tolist() == [[6, 7, 8]]
    assert result.context.stream[0, :, 0].tolist() == [6, 7, 8]


def test_local_merge_averages_into_the_nearest_kept_patch() -> None:
    hidden = torch.tensor([1.0, 5, 100, 7, 9, 20]).view(1, 6, 1)
    sequence = TokenSequence(hidden, 2 * hidden, torch.arange(6)[None], 6, protected=(2,))
    result = REDUCTIONS.get("local-merge").apply(sequence, torch.tensor([[0.0, 9, 0, 0, 8, 1]]), 3)
    # 1 takes in 0; 2 is protected and takes in nobody; 4 takes in 3 and 5.
    assert result.positions.tolist() == [[1, 2, 4]]
    assert result.hidden[0, :, 0].tolist() == [3, 100, 12]
    assert result.residual is not None and result.residual[0, :, 0].tolist() == [6, 200, 24]
    assert result.size is not None and result.size.tolist() == [[2, 1, 3]]
    again = REDUCTIONS.get("local-merge").apply(result, torch.tensor([[1.0, 0, 2]]), 2)
    # 1 (of size 2) goes into 4 (of size 3), past the class token.
    assert again.size is not None and again.size.tolist() == [[1, 5]]
    assert again.hidden[0, 1, 0].item() == pytest.approx((2 * 3 + 3 * 12) / 5)


@pytest.mark.parametrize("reduction", ["frozen", "pool"])
def test_what_a_frozen_token_costs(reduction: str) -> None:
    """Multiply-adds of one Vim block by hand, all directions."""
    model = build("vim").float()
    width, inner, state, rank = DIM, 2 * DIM, 16, 1
    compress(model, tokens=[6], points=[1], reduction=reduction)
    live, frozen = 6 + 1, 10
    found = count_flops(model).per_block[1]
    half, convolution = width * inner, 4 * inner
    projections = inner * (rank + 2 * state) + rank * inner
    steps = inner * 9 * state
    each_live = 2 * half + inner * width + 2 * (convolution + projections + steps + inner)
    if reduction == "frozen":  # seven of nine parts of the scan's step, and no skip
        each_frozen = half + 2 * (convolution + projections + 7 * inner * state)
        assert found == live * each_live + frozen * each_frozen
    else:  # alignment costs one more for each step; the skip is outside of the scan, as free as the gate there
        assert found == live * (each_live + 2 * inner - 2 * inner) + frozen * (half + 2 * convolution)


def test_the_mass_is_the_one_that_is_nearest_to_the_dense_model() -> None:
    model = build("vim")
    batch = images(4)
    with torch.no_grad():
        dense = model(batch)
    compress(model, 0.5, points=[1], reduction="pool", calibration=batch)
    pruner = model.pruner
    assert isinstance(pruner, TokenPruner)
    (chosen,) = {float(stored) for stored in pruner.buffers()}
    found = {}
    for mass in MASSES:
        pruner.set_mass(mass)
        with torch.no_grad():
            found[mass] = float(divergence(dense, model(batch)).mean())
    assert found[chosen] == min(found.values()) < max(found.values())


def test_the_mass_is_that_which_comes_nearest_to_logits_that_are_given() -> None:
    model, batch = build("vim"), torch.randn(6, 3, SIZE, SIZE, dtype=torch.float64)
    for mass in MASSES:
        compress(model, 0.5, reduction="local-merge", calibration=[batch])
        assert isinstance(model.pruner, TokenPruner)
        model.pruner.set_mass(mass)
        with torch.no_grad():
            dense = model(batch)
        compress(model, 0.5, reduction="local-merge", calibration=[batch], dense=dense)
        assert isinstance(model.pruner, TokenPruner)
        assert {float(stored) for stored in model.pruner.buffers()} == {mass}
    with pytest.raises(UsageError, match="the dense logits are"):
        compress(model, 0.5, reduction="local-merge", calibration=[batch], dense=dense[:2])


def test_divergence_by_hand() -> None:
    dense = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    pruned = torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = divergence(dense, pruned)
    assert found[0].item() == pytest.approx(expected, abs=1e-7) and found[1].item() == pytest.approx(0, abs=1e-7)


def test_mass_needs_sizes() -> None:
    with pytest.raises(UsageError, match="goes by the sizes"):
        PruneSettings(PruneSchedule((1,), (2,)), reduction="context", alignment="mass")


def test_without_frozen_tokens_everything_flows_as_it_is() -> None:
    sequence = TokenSequence.dense(torch.zeros(1, 4, 2))
    flow = inflow(sequence, sequence.hidden, None, None)
    assert flow == Inflow(sequence.hidden, sequence, sequence, None, None)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True), st.lists(st.integers(0, 30), max_size=12))
def test_the_nearest_token_is_the_one_before_of_two(kept: list[int], wanted: list[int]) -> None:
    found = nearest(torch.tensor([kept]), torch.tensor([wanted], dtype=torch.int64))
    assert [kept[index] for index in found[0]] == [min(kept, key=lambda p: (abs(p - each), p)) for each in wanted]
