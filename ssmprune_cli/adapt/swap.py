"""What stands in the place of a mixer's `forward`: our ops where they compute the call, else the mixer's own code.

It is an attribute of the instance. The class stays what it is, hooks are called as ever, and weights are read anew at
every call, so nothing goes stale. It goes with the module where that is pickled or copied.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.dropout import _DropoutNd

from ssmprune_cli.adapt.mixers import Form, dense
from ssmprune_cli.errors import UsageError


class Place(Protocol):
    """Who computes a mixer in the place of `dense`: an observer, or a stream of tokens that gets shorter."""

    def mix(self, swapped: Swapped, x: Tensor) -> Tensor:
        """The output for the input `x`, both in the form's layout."""
        ...

    def refuse(self, name: str, reason: str) -> None:
        """Called before a module takes its own path: raise an error if that must not be."""
        ...


class StandIn:
    """The `forward` of one module in the place of its class's.

    __self__  the module; this is also how Python calls the owner of a method
    name      of the module in the model
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.__self__ = module
        self.name = name

    def own(self, *arguments: Any, **options: Any) -> Any:
        """What the module's own code computes."""
        return type(self.__self__).forward(self.__self__, *arguments, **options)


class Swapped(StandIn):
    """The `forward` of a mixer.

    place     None for the dense computation
    warned    reasons for which an own path was taken and said; shared by all mixers of a model
    """

    def __init__(self, module: nn.Module, name: str, form: Form, warned: set[str]) -> None:
        super().__init__(module, name)
        self.form, self.warned = form, warned
        self.place: Place | None = None
        children = [child for child, _ in module.named_children()]
        self.types = {child: type(_below(module, child)) for child in (*children, *form.bypassed)}
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        self.first = parameters[0].name
        self.names = [each.name for each in parameters]
        self.defaults = {each.name: each.default for each in parameters}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        module = self.__self__
        x = arguments[0] if arguments else options.get(self.first)
        reason = self._changed() or self._not_ours(x, arguments, options)
        if reason is None:
            assert isinstance(x, Tensor)
            return dense(module, self.form, x) if self.place is None else self.place.mix(self, x)
        if self.place is not None:
            self.place.refuse(self.name, reason)
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(f"{self.name}: {reason}, so its own code runs, and nothing is faster", stacklevel=2)
        return self.own(*arguments, **options)

    def _changed(self) -> str | None:
        """What has become of the mixer since it was recognised, so that its own code has to run."""
        for child, wanted in self.types.items():
            each = _below(self.__self__, child)
            if type(each) is not wanted:
                return f"its {child} has become a {type(each).__name__}"
            if self.__self__.training and isinstance(each, _DropoutNd) and each.p > 0:
                return f"its {child} is at work in training"
        for child in self.form.bypassed:
            each = _below(self.__self__, child)
            if each is not None and (each._forward_hooks or each._forward_pre_hooks):
                return f"there is a hook on its {child}"
            if each is not None and "forward" in vars(each):
                return f"the `forward` of its {child} has been replaced"
        return None

    def _not_ours(self, x: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> str | None:
        """Why the call asks for more than the mixing of tokens; None if it does not."""
        if forward_ad._current_level >= 0:  # our ops have gradients, and would pass tangents over without a word
            return "called for a derivative in forward mode"
        dimensions = 3 if self.form.layout == "tokens" else 4
        axis = 1 if self.form.layout == "image" else -1
        if not isinstance(x, Tensor) or x.ndim != dimensions or x.shape[axis] != self.form.d_model:
            return f"called with an input that is not of {self.form.d_model} channels and {dimensions} dimensions"
        given = {**dict(zip(self.names, arguments, strict=False)), **options}
        given.pop(self.first, None)
        for name, value in given.items():
            default = self.defaults.get(name)
            if value is None or (isinstance(value, bool | int | float | str) and value == default):
                continue
            if name == "attention_mask" and isinstance(value, Tensor) and bool((value != 0).all()):
                continue
            return f"called with `{name}`"
        return None


def _below(module: nn.Module, name: str) -> nn.Module | None:
    """The module of this name inside of `module`, now."""
    each: nn.Module | None = module
    for part in name.split("."):
        each = None if each is None else each._modules.get(part)
    return each


def swapped_in(model: nn.Module) -> list[Swapped]:
    """Those of `model`, in the order of its modules."""
    forwards = (vars(module).get("forward") for module in model.modules())
    return [each for each in forwards if isinstance(each, Swapped)]


def remove(model: nn.Module) -> bool:
    """Give every module of `model` its class's `forward` back, and say whether one had a stand-in."""
    modules = [module for module in model.modules() if isinstance(vars(module).get("forward"), StandIn)]
    for module in modules:
        del vars(module)["forward"]
    return bool(modules)


@contextmanager
def anew(model: nn.Module) -> Iterator[None]:
    """Without any stand-in, to put others there; after an error the old ones are back."""
    before = {each: vars(each)["forward"] for each in model.modules() if isinstance(vars(each).get("forward"), StandIn)}
    remove(model)
    try:
        yield
    except BaseException:
        remove(model)
        for module, forward in before.items():
            vars(module)["forward"] = forward
        raise


def check_unreplaced(name: str, module: nn.Module) -> None:
    """UsageError if the instance has a `forward` of somebody else."""
    if "forward" in vars(module):
        raise UsageError(
            "the module's `forward` has been replaced already",
            where=name,
            hint="Remove that first, such as with accelerate.hooks.remove_hook_from_module(model, recurse=True).",
        )
