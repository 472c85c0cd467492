"""The compiled C code: which level of it is taken, what that has, and how it is called."""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum
from pathlib import Path
from typing import Any

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.cpu.build import LEVELS, TILES, levels, load_library
from ssmprune_cli.kernels.cpu.call import check_structs

LEVEL_VARIABLE = "SSMPRUNE_CPU_LEVEL"


class Dots(IntEnum):
    """How products of bytes are made, as in csrc/bytes.h."""

    PAIRS = 0  # of 16 bits: on any processor
    FOURS = 1  # in one instruction: AVX512-VNNI, AVX-VNNI
    TILES = 2  # AMX


class Library:
    """Compiled when it is first asked for, unless it came with the installation.

    level  one of build.LEVELS; without, the one that SSMPRUNE_CPU_LEVEL names, or the processor's best
    dots   the best way to multiply bytes that may be taken, if the processor has it; without, the best of the level
    """

    def __init__(self, level: str | None, *, dots: Dots | None = None) -> None:
        self._wanted = level
        self._dots = dots
        self._code: ctypes.CDLL | None = None
        self._level: str | None = None
        self._best_dots = Dots.PAIRS
        self._reason: str | None = None

    def missing(self) -> str | None:
        """Why it cannot be used; None if it can."""
        if self._code is None and self._reason is None:
            try:
                self._load()
            except KernelError as error:
                self._reason = error.what
            except OSError as error:
                self._reason = str(error)
        return self._reason

    def _load(self) -> None:
        wanted = self.asked_level()
        level = wanted or levels()[0]
        code = load_library(level, check_structs)
        if level == TILES and not code.tiles_available():
            if wanted:
                raise OSError(f"the system does not let level {TILES} use the processor's products of matrices")
            level = levels()[1]
        self._take(code, level)

    def _take(self, code: ctypes.CDLL, level: str) -> None:
        best_of_level = Dots.TILES if level == TILES else Dots.FOURS
        self._best_dots = Dots(code.best_dots(best_of_level if self._dots is None else self._dots))
        self._code, self._level = code, level

    def asked_level(self) -> str | None:
        """Raises KernelError if it is none, or none of this processor's."""
        level = self._wanted or os.environ.get(LEVEL_VARIABLE) or None
        if level is not None and level not in levels():
            reason = "the processor does not have it" if level in LEVELS else "there is no such level"
            hint = f"Set {LEVEL_VARIABLE} to one of {', '.join(levels())}, or leave it unset."
            raise KernelError(f"the C kernels cannot run at level {level!r}: {reason}", hint=hint)
        return level

    def facts(self) -> dict[str, Any]:
        """The level in use, those that the processor has, and whether there are threads; empty if it is missing."""
        if self.missing() is not None or self._code is None:
            return {}
        threads = bool(self._code.has_threads())
        return {"level": self._level, "processor_has": list(levels()), "threads": threads}

    def file(self) -> Path:
        """The compiled library, which is one of ops for ONNX Runtime too. Raises KernelError if it is missing."""
        reason = self.missing()
        if reason is not None or self._code is None:
            raise KernelError(f"the C kernels cannot be used: {reason}", hint="See `ssmprune env`.")
        return Path(self._code._name)

    def has_tiles(self) -> bool:
        """Whether the processor multiplies matrices of bfloat16 by itself."""
        return self.missing() is None and self._level == TILES

    def dots(self) -> Dots:
        """How it multiplies bytes."""
        return self._best_dots if self.missing() is None else Dots.PAIRS

    def run(self, name: str, struct: ctypes.Structure, outside: str = "") -> None:
        """Raises KernelError when memory ran out, or for an index that the kernel refuses: `outside` says which."""
        if self._code is None:
            raise KernelError(f"kernel backend 'cpu' cannot be used: {self._reason}", hint="See `ssmprune env`.")
        status = int(getattr(self._code, name)(ctypes.byref(struct)))
        if status & 1:
            raise KernelError(f"memory ran out in {name}", hint="Use a smaller batch.")
        if status & 2:
            raise KernelError(outside)
