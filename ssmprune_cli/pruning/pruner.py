"""TokenPruner: the module in a backbone's `pruner` slot that scores, keeps and aligns tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.interface import Mixers, Pruner, ScanAlignment, ScanStatistics, Stage, Wanted
from ssmprune_cli.pruning.alignment import ALIGNMENTS
from ssmprune_cli.pruning.correction import Correction, Held, dropped_mean
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.pruning.schedule import PruneSchedule, share
from ssmprune_cli.tokens import Readout, TokenSequence

Returning = Literal["left", "nearest", "blend"]


@dataclass(frozen=True)
class PruneSettings:
    """All that defines a pruner beside its buffers; plain values, stored in an artefact's config.json.

    repair     which corrections it holds, see `Correction`
    returning  with what value a dropped token comes back where the grid is made whole again, see `returning`
    """

    schedule: PruneSchedule
    importance: str = "clip"
    reduction: str = "context"
    alignment: str = "none"
    seed: int = 0
    repair: Held = "none"
    returning: Returning = "left"

    def __post_init__(self) -> None:
        IMPORTANCES.get(self.importance)
        ALIGNMENTS.get(self.alignment)
        if ALIGNMENTS.get(self.alignment).needs_sizes and not REDUCTIONS.get(self.reduction).sized:
            raise UsageError(
                f"alignment {self.alignment!r} goes by the sizes of tokens, and {self.reduction!r} merges none",
                hint="Use it with a reduction that merges tokens, such as local-merge.",
            )
        if self.schedule.points and bool(self.schedule.grids) != REDUCTIONS.get(self.reduction).rectangular:
            raise UsageError(
                f"the reduction {self.reduction!r} leaves {'no ' if self.schedule.grids else ''}whole grids, and the "
                f"schedule has {'some' if self.schedule.grids else 'none'}",
                hint="Give `rectangular` of the reduction to `PruneSchedule.resolve`.",
            )
        reduction = REDUCTIONS.get(self.reduction)
        if self.returning != "left" and (reduction.rectangular or not reduction.shortens):
            raise UsageError(
                f"the reduction {self.reduction!r} loses no token, so there is none to come back by {self.returning!r}"
            )
        if self.alignment != "none" and not REDUCTIONS.get(self.reduction).aligned:
            raise UsageError(
                f"the reduction {self.reduction!r} leaves no gaps in scan order, so there is nothing to align",
                hint="Use `--alignment none` with it.",
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruneSettings:
        """Inverse of `to_dict`. Raises CheckpointError if the values are not its."""
        unknown = set(values) - {field.name for field in fields(cls)}
        try:
            if unknown:
                raise ValueError(f"{listing(sorted(unknown))} is unknown")
            return TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            what = f"the pruning settings are not valid: {listing(faults)}"
            raise CheckpointError(what, where="config.json") from error
        except ValueError as error:
            raise CheckpointError(f"the pruning settings are not valid: {error}", where="config.json") from error


class TokenPruner(nn.Module, Pruner):
    """The pruner of one backbone. On a grid of another size than the stages' own, the same share of it stays.

    stages      of the backbone
    mixers      of the backbone, one a block
    calibrated  for each block what its alignment source stores, or None: mean step sizes of its dropped tokens
                (directions, E), see `calibration`, or a mass (), see `mass`
    unfilled    only make room for what is stored: it is loaded next
    """

    def __init__(
        self,
        settings: PruneSettings,
        stages: Sequence[Stage],
        mixers: Mixers,
        calibrated: Sequence[Tensor | None] | None = None,
        *,
        unfilled: bool = False,
    ) -> None:
        super().__init__()
        self.settings = settings
        self._stages = tuple(stages)
        self._plan()
        self._importance = IMPORTANCES.get(settings.importance)
        self._reduction = REDUCTIONS.get(settings.reduction)
        self._alignment = ALIGNMENTS.get(settings.alignment)
        if self._alignment.stored is not None:
            for block in settings.schedule.blocks_after_points(stages):
                mixer, given = mixers[block], calibrated[block] if calibrated else None
                if unfilled:  # on the meta device, null_delta would have PyTorch import its compiler, for a second
                    stored = torch.empty(self._alignment.shape(mixer))
                else:
                    stored = self._alignment.stored(mixer, given).detach().clone()
                self.register_buffer(f"alignment_{block}", stored)
        if settings.returning == "blend":
            for point in self.dropping_points:
                self.register_buffer(f"returning_{point}", torch.zeros(()))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:  # by which a backbone sees whether it is compressed alike
            metadata[prefix[:-1]]["settings"] = json.dumps(self.settings.to_dict())

    def __repr__(self) -> str:
        settings = self.settings
        tokens, points = (", ".join(map(str, each)) for each in (settings.schedule.tokens, settings.schedule.points))
        method = f"{settings.importance}/{settings.reduction}/{settings.alignment}"
        repair = "" if settings.repair == "none" else f", repaired: {settings.repair}"
        return f"TokenPruner({tokens} patch tokens after {points} blocks, {method}{repair})"

    @property
    def shortens(self) -> bool:
        """Whether sequences get shorter (`mask` only zeroes tokens)."""
        return self._reduction.shortens

    @property
    def goes_by_score(self) -> bool:
        """Whether the score has a say in which tokens go."""
        return not self._reduction.rectangular

    def reschedule(self, schedule: PruneSchedule) -> None:
        """Keep the token counts of `schedule` from now on; its points must be the same."""
        if schedule.points != self.settings.schedule.points:
            raise UsageError(f"the points are {self.settings.schedule.points}, not {schedule.points}")
        self.settings = replace(self.settings, schedule=schedule)
        self._plan()

    def _plan(self) -> None:
        schedule, stages = self.settings.schedule, self._stages
        self._patches = schedule.patches_per_block(stages)
        self._whole = tuple(stage.num_patches for stage in stages for _ in range(stage.start, stage.stop))
        if schedule.grids:  # what was merged is no longer counted
            self._whole = self._patches
        # Patches to keep after each block. None for all of them: there is not even a gather then, so that a keep ratio
        # of 1 is the dense model bit for bit.
        kept = dict(zip(schedule.points, schedule.tokens, strict=True))
        counts = (kept.get(block + 1) for block in range(len(self._patches)))
        self._counts = tuple(
            None if count == before else count for count, before in zip(counts, self._patches, strict=True)
        )

    def set_mass(self, mass: float) -> None:
        """The mass of every block, for the alignment of this name."""
        for name, stored in self.named_buffers():
            if name.startswith("alignment_"):
                stored.fill_(mass)

    def set_returning(self, shares: Mapping[int, float]) -> None:
        """The share of the nearest token after each point, for `blend`."""
        for point, value in shares.items():
            self.get_buffer(f"returning_{point}").fill_(value)

    @property
    def drops(self) -> bool:
        """Whether any token is dropped, for good or by `mask`."""
        return any(self._counts[point - 1] is not None for point in self.settings.schedule.points)

    @property
    def dropping_points(self) -> tuple[int, ...]:
        """The points after which tokens are missing. None for a reduction that leaves whole grids: it loses nothing."""
        points = self.settings.schedule.points
        drops = self.shortens and not self._reduction.rectangular
        return tuple(point for point in points if drops and self._counts[point - 1] is not None)

    @property
    def correction(self) -> Correction:
        """What a repair has left here."""
        names = {point: f"side_{point}" for point in self.settings.schedule.points}
        side = {point: self.get_buffer(name) for point, name in names.items() if hasattr(self, name)}
        return Correction(self._head, side)

    @property
    def _head(self) -> tuple[Tensor, Tensor] | None:
        """Weight and bias of a repaired head."""
        if not self.settings.repair.startswith("head"):
            return None
        return self.get_buffer("head_weight"), self.get_buffer("head_bias")

    def correct(self, correction: Correction) -> None:
        """Hold `correction` from now on, in the place of another one."""
        for name, _ in list(self.named_buffers()):
            if name.startswith(("head_", "side_")):
                delattr(self, name)
        if correction.head is not None:
            self.register_buffer("head_weight", correction.head[0])
            self.register_buffer("head_bias", correction.head[1])
        for point, projection in correction.side.items():
            self.register_buffer(f"side_{point}", projection)
        self.settings = replace(self.settings, repair=correction.held)

    def wants(self, block: int) -> Wanted:
        if self._counts[block] is None:
            return "nothing"
        return self._importance.needs if self.goes_by_score else "tokens"

    def alignment(self, block: int) -> ScanAlignment | None:
        stored = None if self._alignment.stored is None else getattr(self, f"alignment_{block}", None)
        return self._alignment.align(stored)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        count = self._counts[block]
        if count is None:
            return sequence
        protected = len(sequence.protected)
        # A traced length is a tensor, and what follows is the same for all images of the traced size.
        count = share(count, self._whole[block], int(sequence.length) - protected)
        if count + protected >= sequence.positions.shape[1]:  # a small grid, of which every token stays
            return sequence
        # A reduction that does not go by the score looks at none.
        score = self.score(block, sequence, statistics) if self.goes_by_score else sequence.sizes()
        after = self._reduction.apply(sequence, score, count + protected)
        if self.settings.returning != "left":
            after = replace(after, returning=getattr(self, f"returning_{block + 1}", 1.0))
        if self.settings.repair == "none":
            return after
        side = None if after.readout is None else after.readout.side
        projection: Tensor | None = getattr(self, f"side_{block + 1}", None)
        if projection is not None:
            added = functional.linear(dropped_mean(sequence, after).to(projection.dtype), projection)
            side = added if side is None else side + added
        return replace(after, readout=Readout(side, self._head))

    @torch.no_grad()
    def score(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> Tensor:
        """Importance of every token (B, L): at a point those with the highest stay."""
        return self._importance.score(sequence, statistics, block, self.settings.seed)
