"""`--target-size`: what makes the file of weights small enough, and harms least.

Tokens that are dropped change nothing here. Weights in float are tried first, then those in eight bits that bear it,
then fewer and fewer blocks with such weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import nn

from ssmprune_cli import checkpoint
from ssmprune_cli.data import Subset
from ssmprune_cli.errors import BudgetError
from ssmprune_cli.models import Backbone, Size, cuts, smaller
from ssmprune_cli.pruning import ALIGNMENT_IMAGES
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.compress.make import Made, Progress, make
from ssmprune_cli.workflows.compress.request import CompressRequest
from ssmprune_cli.workflows.eight_bits import to_eight_bits
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.trials import Prepared


def small_enough(
    request: CompressRequest, recipe: Recipe, reference: Backbone, progress: Progress | None
) -> tuple[Recipe, Made]:
    """The first of what there is to try whose file of weights is as small as asked for: its recipe, and the model.

    Raises BudgetError, saying what can be reached, if nothing is; and if the dense model is, and nothing else is asked.
    """
    target, smallest = request.target_size, 0
    assert target is not None
    dense = checkpoint.weights_size(reference)
    if dense <= target and not request.asks_beside_size:
        raise BudgetError(
            f"the weights of the dense model take {dense / 1e6:.2f} MB: {target / 1e6:.4g} are met as it is",
            where="--target-size",
        )
    for wanted, predicted in _ladder(request, recipe, reference, progress):
        if predicted <= target:  # without what a pruner and a repair add
            made = make(request, wanted, reference, progress)
            predicted = checkpoint.weights_size(made.model)
            if predicted <= target:
                return wanted, made
        smallest = predicted
    raise BudgetError(
        f"a file of {target / 1e6:.4g} MB cannot be reached: the smallest that was tried takes {smallest / 1e6:.2f} MB",
        where="--target-size",
        hint="Ask for more" + (", or leave out `--keep-blocks`." if request.keep_blocks else "."),
    )


def _ladder(
    request: CompressRequest, recipe: Recipe, reference: Backbone, progress: Progress | None
) -> Iterator[tuple[Recipe, int]]:
    """Recipes and about how many bytes the weights take, from the least harm on."""
    whole = request.made_smaller(reference, recipe)
    if request.weights is None and request.asks_beside_size:
        yield recipe, checkpoint.weights_size(whole)
    assert request.calib is not None
    task, plan = TASKS.get(whole.task), request.fitted(recipe, TASKS.get(whole.task)).calibration
    images = task.calibration(whole, request.calib, plan.images, plan.seed)
    few = Subset(images, spread(len(images), ALIGNMENT_IMAGES)) if len(images) > ALIGNMENT_IMAGES else images
    done = progress and progress("Measuring eight bits")
    batches = Prepared(whole, few, task.at_once(plan.batch_size), done)
    kinds = to_eight_bits(copy.deepcopy(whole), batches).chosen
    weights = {"weights": "int8", "int8": kinds} if kinds else {"weights": "float", "int8": None}
    for blocks in range(1 + (0 if request.keep_blocks else len(cuts(whole)))):
        model = smaller(whole, Size(cut=blocks))
        pruning = recipe.pruning.model_copy(update={**weights, "cut_blocks": blocks or None})
        yield recipe.model_copy(update={"pruning": pruning}), bytes_in_eight_bits(model, kinds)


def bytes_in_eight_bits(model: Backbone, kinds: tuple[str, ...]) -> int:
    """Bytes of the weights of `model` with those of these kinds of layers in eight bits."""
    size = checkpoint.weights_size(model)
    for name in model.layers_of(kinds):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        size -= layer.weight.nbytes - layer.weight.numel() - 4 * layer.out_features  # a scale is a float32
    return size
