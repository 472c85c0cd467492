"""An exported file again, with 8-bit integers in its large products. What that costs is told, and not judged here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export.check import compared, judge, recorded
from ssmprune_cli.export.export import TARGETS, Exported, evaluating, quiet
from ssmprune_cli.export.target import How
from ssmprune_cli.models import Backbone


def check_int8(target: str, how: How, *, calibrated: bool) -> None:
    """UsageError for a target without integers, and for calibration images where none are used or none are given."""
    if TARGETS.get(target).quantise is None:
        raise UsageError(f"a file of the target {target!r} has no integers", where="--int8")
    if how == "static" and not calibrated:
        raise UsageError(
            "static needs images to find the scales of activations with",
            where="--int8",
            hint="Give `--calib FOLDER`, or `--int8 dynamic`, which finds them in each batch.",
        )
    if how == "dynamic" and calibrated:
        raise UsageError("dynamic uses no calibration images", where="--calib", hint="Leave it out, or give static.")


def quantised(
    made: Exported,
    path: Path,
    how: How,
    model: Backbone,
    images: Tensor,
    shown: str,
    calibration: Iterable[Tensor] = (),
) -> tuple[Exported, int]:
    """Write the file of `model` that was `made` to `path`, with 8-bit weights and activations in its large products;
    and how many these are.

    images       (N, 3, H, W), normalised, in as many as the largest batch that the file was checked with, and
                 which ones they are, in words
    calibration  batches of normalised images, for "static"

    The new file is run as the old one was, and its checks are told: it computes something else by design. Raises
    SsmpruneError if it has no large product, or does not give numbers.
    """
    target = TARGETS.get(made.target)
    assert target.quantise is not None and target.record is not None
    with evaluating(model), quiet():
        products = target.quantise(made.path, path, how, calibration)
        if not products:
            raise SsmpruneError("has no products of tokens with weights, so there is nothing for integers to compute")
        target.record(path, "int8", json.dumps({"how": how, "products": products}))
        sizes = sorted({check.batch for check in made.checks})
        checks = compared(model, target.open(path), images, sizes)
    judge(checks, made.target, path, math.inf, 0.0)
    target.record(path, "check", recorded(checks, shown, None))  # in the place of that in float
    return replace(made, path=path, size=path.stat().st_size, checks=checks, tolerance=None), products
