"""The session for backbones of ours on a CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ssmprune_cli.inference.behaviour import global_hooks, unlike
from ssmprune_cli.inference.copying import Changes, with_changes
from ssmprune_cli.inference.cpu.linear import (
    PackedEightBitLinear,
    PackedLinear,
    packs,
    with_channels_last_taps,
)
from ssmprune_cli.inference.cpu.mamba import (
    FusedLocalMixer,
    PackedBlocks,
    pack_blocks,
    run_features,
)
from ssmprune_cli.inference.cpu.routed import FusedPlainMambaMixer, FusedVMambaMixer, scans_refused
from ssmprune_cli.inference.inside import FusedMambaMixer, inside_refused
from ssmprune_cli.inference.session import Session, refuse_global_hooks, with_slot
from ssmprune_cli.interface import Pruner
from ssmprune_cli.kernels import pick
from ssmprune_cli.models import (
    Backbone,
    BranchMixer,
    CausalConv1d,
    EightBitLinear,
    LocalMixer,
    MambaMixer,
    MambaSequence,
    PlainMambaMixer,
    VMambaMixer,
)


class CpuSession(Session):
    """A second tree of modules, which shares the snapshot's tensors, has fused modules in the place of its own.

    What cannot be fused is computed op by op, in the same tree.
    """

    kind = "cpu"

    def __init__(self, definition: nn.Module, refused: dict[str, str]) -> None:
        super().__init__(definition, refused)
        assert isinstance(definition, Backbone)
        self._packed: PackedBlocks | None = None
        whole: dict[int, str] = {}  # why blocks are not computed in one call
        if isinstance(definition, MambaSequence) and _runs(definition):
            self._packed, whole = pack_blocks(definition)
        self._reasons: dict[int, str] = {}
        fast = with_changes(definition, self._changes(definition, whole))
        assert isinstance(fast, Backbone)
        self.fast: Backbone = fast

    @classmethod
    def refuses(cls, definition: nn.Module) -> str | None:
        if not isinstance(definition, Backbone):
            return "is for our own backbones"
        weight = next(definition.parameters(), None)
        if weight is None:
            return "the model has no weights"
        if weight.device.type != "cpu":
            return "is for CPUs"
        backend = pick(weight.new_empty(0, dtype=definition.dtype), 1)
        if not backend.fuses:
            return f"the kernel backend {backend.name}, which computes {definition.dtype} here, has no fused calls"
        if global_hooks():
            return "hooks are registered for all modules, and it skips modules"
        return None

    def _changes(self, definition: Backbone, whole: dict[int, str]) -> Changes:
        """What takes the place of modules of `definition`."""
        changes: dict[nn.Module, Callable[[nn.Module], nn.Module]] = {}
        for number, module in enumerate(definition.mixers):
            mixer: object = module
            assert isinstance(mixer, nn.Module)
            reason = inside_refused(mixer) if isinstance(mixer, BranchMixer) else scans_refused(mixer)
            if reason is None:
                changes[mixer] = self._fuse(number, whole.get(number, ""))
            else:
                self._reasons[number] = reason
            for part in mixer.children():  # of each kind of convolution a mixer reads the weight by itself
                if not (unlike(part, CausalConv1d) and unlike(part, nn.Conv2d)):
                    changes[part] = with_channels_last_taps
        changes.update((module, _pack) for module in definition.modules() if packs(module))
        changes.update((each, _pack_bytes) for each in definition.modules() if unlike(each, EightBitLinear) is None)
        return changes

    def _fuse(self, number: int, why: str) -> Callable[[nn.Module], nn.Module]:
        def fuse(mixer: nn.Module) -> nn.Module:
            if isinstance(mixer, MambaMixer):
                return FusedMambaMixer.of(mixer, number, self._journal, why)
            if isinstance(mixer, LocalMixer):
                return FusedLocalMixer.of(mixer, number, self._journal, why)
            if isinstance(mixer, PlainMambaMixer):
                return FusedPlainMambaMixer.of(mixer, number, self._journal)
            assert isinstance(mixer, VMambaMixer)
            return FusedVMambaMixer.of(mixer, number, self._journal)

        return fuse

    def compute(self, images: Tensor) -> Tensor:
        refuse_global_hooks()
        fast = self.fast
        if self._packed is None:
            output: Tensor = fast(images)
            return output
        assert isinstance(fast, MambaSequence)
        sequence = run_features(fast, self._packed, self._journal, images)
        return fast.classify(fast.pool(sequence), sequence.readout)

    def repruned(self, pruner: Pruner | None) -> None:
        self._modules["fast"] = with_slot(self.fast, pruner)

    def tensors(self) -> list[Tensor]:
        made = [vars(module)["packed"] for module in self.fast.modules() if "packed" in vars(module)]
        return [*super().tensors(), *made, *([] if self._packed is None else [self._packed.parameters])]

    def reasons(self) -> dict[int, str]:
        return self._reasons

    def notes(self) -> tuple[str, ...]:
        count = sum(isinstance(module, PackedLinear) for module in self.fast.modules())
        if not count or self._packed is not None:  # blocks in one call have their layers in it
            return ()
        return (f"{count} linear layers multiply parts of bfloat16, as exact as float32, for as many rows as pay",)


def _runs(model: MambaSequence) -> bool:
    """Whether nothing but the blocks' own loop, and what surrounds it, is in `model`."""
    kind = type(model)
    same = all(getattr(kind, name) is getattr(MambaSequence, name) for name in ("forward", "features"))
    return same and unlike(model, kind) is None and unlike(model.layers, nn.ModuleList) is None


def _pack_bytes(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, EightBitLinear)
    return PackedEightBitLinear.of_layer(layer)


def _pack(layer: nn.Module) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    return PackedLinear.of(layer)
