"""Compile csrc/scan.c for this processor at first use, into the user's cache: installation never needs a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "csrc" / "scan.c"
FLAGS = ("-O3", "-std=gnu11", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")


def instruction_set() -> list[str]:
    """Compiler flags for the best x86-64 level of this processor; none elsewhere, where the baseline is right."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        flags = set()
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return ["-march=x86-64-v4", "-mprefer-vector-width=512"]
    if {"avx2", "fma", "bmi2", "f16c"} <= flags:
        return ["-march=x86-64-v3"]
    return ["-march=x86-64"]


def compiler() -> str | None:
    """The C compiler: $CC, cc, gcc or clang, whichever is there first."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssmprune"


def load_library() -> ctypes.CDLL:
    """The compiled kernels. Raises OSError saying what is missing or went wrong.

    torch must be imported before: its OpenMP runtime is already loaded then, and both share one pool of threads.
    """
    flags = [*FLAGS, *instruction_set()]
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    library = cache_folder() / f"scan-{digest}.so"
    if not library.exists():
        _compile(flags, library)
    return ctypes.CDLL(str(library))


def _compile(flags: list[str], library: Path) -> None:
    command = compiler()
    if command is None:
        raise OSError("no C compiler was found (cc, gcc, clang or $CC)")
    library.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own and a rename: two processes that compile at once do not see each other's half-written file.
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        result = subprocess.run(
            [command, *flags, str(SOURCE), "-o", scratch], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no message"])[0]
            raise OSError(f"{command} failed: {reason}")
        Path(scratch).replace(library)
    finally:
        Path(scratch).unlink(missing_ok=True)
