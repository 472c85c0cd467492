"""What a prune point does to tokens, in plain PyTorch: score them, order them, and move them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from ssmprune_cli.kernels.inputs import Moved, MoveInputs, OrderInputs
from ssmprune_cli.kernels.pytorch.eager import wide
from ssmprune_cli.tokens import gather_tokens, position_gaps


def score_tokens(ys: Sequence[Tensor], kind: str) -> Tensor:
    """(B, L), float32 at least: mean over channels of the sum of ys, as `kind` says."""
    total = reduce(add, map(wide, ys))
    if kind == "clip":
        return total.clamp(min=0).mean(dim=-1)
    if kind == "l1":
        return total.abs().mean(dim=-1)
    return total.mean(dim=-1) if kind == "mean" else total.square().mean(dim=-1).sqrt()


def rank_tokens(inputs: OrderInputs) -> Tensor:
    """(B, L) rows, best first: protected tokens, then live ones by falling score, then dead ones.

    Equal scores keep their order, so ties are settled by position, and so is the order of protected and of dead tokens.
    A NaN score counts as the lowest.
    """
    largest = torch.finfo(torch.float32).max
    score = torch.nan_to_num(inputs.score.float(), nan=-largest, posinf=largest, neginf=-largest)
    for place in inputs.protected:
        score = score.masked_fill(inputs.positions == place, torch.inf)
    if inputs.live is not None:
        score = score.masked_fill(~inputs.live, -torch.inf)
    return score.argsort(dim=1, descending=True, stable=True)


def order_tokens(inputs: OrderInputs) -> Tensor:
    """(B, K) or (B, L) rows: the K best in their order and, if wanted, the others in theirs."""
    ranked, count = rank_tokens(inputs), inputs.kept
    best = ranked[:, :count].sort(dim=1).values
    return torch.cat((best, ranked[:, count:].sort(dim=1).values), dim=1) if inputs.others else best


def move_tokens(inputs: MoveInputs) -> Moved:
    """See `ops.prune.move_tokens`."""
    hidden, residual, positions, order, count, older, older_positions = inputs
    best, others = order[:, :count], order[:, count:]
    kept_positions = positions.gather(1, best)
    if others.shape[1] or older is not None:
        dropped, places = gather_tokens(hidden, others), positions.gather(1, others)
        dropped = wide(dropped if residual is None else gather_tokens(residual, others) + dropped)
        if older is not None and older_positions is not None:
            dropped, places = torch.cat((dropped, older), dim=1), torch.cat((places, older_positions), dim=1)
    else:
        batch = hidden.shape[0]  # len() would be a number for good in an exported graph of any batch
        dropped, places = wide(hidden.new_empty(batch, 0, hidden.shape[2])), positions.new_empty(batch, 0)
    return Moved(
        gather_tokens(hidden, best),
        hidden.new_empty(0) if residual is None else gather_tokens(residual, best),
        kept_positions,
        position_gaps(kept_positions),
        dropped,
        places,
    )
