"""The compiled library of the C kernels in csrc/ as a backend's foundation."""

from __future__ import annotations

import ctypes
import math

import torch

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.backend import Backend
from ssmprune_cli.kernels.build import load_library

SOURCE_OUTSIDE = "a source lies outside the tokens and their context"


class LibraryBackend(Backend):
    """Compiles its library when it is first asked for, unless one came with the installation."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._reason: str | None = None

    def missing(self) -> str | None:
        if self._library is None and self._reason is None:
            try:
                self._library = load_library()
            except OSError as error:
                self._reason = str(error)
        return self._reason

    def has_tiles(self) -> bool:
        """Whether the processor multiplies matrices of bfloat16 by itself."""
        return self.missing() is None and self._library is not None and bool(self._library.tiles_available())

    def run(self, name: str, struct: ctypes.Structure, outside: str = "") -> None:
        """Raises KernelError when memory ran out, or for an index that the kernel refuses: `outside` says which."""
        if self._library is None:
            raise KernelError(f"kernel backend 'cpu' cannot be used: {self._reason}", hint="See `ssmprune env`.")
        status = int(getattr(self._library, name)(ctypes.byref(struct)))
        if status & 1:
            raise KernelError(f"memory ran out in {name}", hint="Use a smaller batch.")
        if status & 2:
            raise KernelError(outside)


def channel_groups(batch: int) -> int:
    """Groups of channels that a scan of `batch` samples is cut into: as few as give every thread the same work."""
    threads = torch.get_num_threads()
    return threads // math.gcd(batch, threads)
