"""Watching every op that runs: the base of what counts, times or adds up ops."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class EveryOp(TorchDispatchMode):
    """As a context manager: `around` is called for every op inside, and calls it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it, PyTorch would import it: two seconds, for a compiler that nobody uses here

    @abstractmethod
    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the op, and return what it returns."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.around(func, args, kwargs or {})


def op_name(func: Any) -> str:
    """ "selective_scan" of the op ssmprune::selective_scan, "mm" of aten::mm."""
    return str(func.name()).split("::")[-1].split(".")[0]
