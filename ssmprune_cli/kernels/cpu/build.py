"""The compiled csrc/: the one that came with the installation, or one compiled at first use into the user's cache.

Installation never needs a compiler: setup.py calls `compile_levels` and goes on without when there is none.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=gnu11", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
# What a processor can do, best first. Elsewhere the compiler's baseline is right.
LEVELS = {
    "x86-64-v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "x86-64-v3": ("-march=x86-64-v3",),
    "x86-64": ("-march=x86-64",),
    "baseline": (),
}


def processor_flags() -> set[str]:
    """What Linux says an x86 processor can do; empty elsewhere."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return set()


def level() -> str:
    """The best of LEVELS for this processor."""
    if not is_x86():
        return "baseline"
    flags = processor_flags()
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "x86-64-v4"
    if {"avx2", "fma", "bmi2", "f16c"} <= flags:
        return "x86-64-v3"
    return "x86-64"


def compiler() -> str | None:
    """The C compiler: $CC, cc, gcc or clang, whichever is there first."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssmprune"


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def load_library() -> ctypes.CDLL:
    """The kernels for this processor. Raises OSError saying what is missing or went wrong.

    torch must be imported before: its OpenMP runtime is already loaded then, and both share one pool of threads.
    """
    best = level()
    bundled = SOURCES / library_name(best)
    if bundled.exists():
        return ctypes.CDLL(str(bundled))
    library = cache_folder() / library_name(best)
    if not library.exists():
        compile_library(best, library)
    return ctypes.CDLL(str(library))


def library_name(best: str) -> str:
    """File name of the library for one of LEVELS: sources and flags are part of it, so that no stale one is loaded."""
    digest = hashlib.sha256(" ".join((*FLAGS, *LEVELS[best])).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return f"kernels-{best}-{digest.hexdigest()[:16]}.so"


def compile_levels(folder: Path) -> list[Path]:
    """Compile every level of this architecture into `folder`, for a wheel. Raises OSError."""
    names = [name for name in LEVELS if name.startswith("x86") == is_x86()]
    libraries = [folder / library_name(name) for name in names]
    for name, library in zip(names, libraries, strict=True):
        compile_library(name, library)
    return libraries


def compile_library(best: str, library: Path) -> None:
    """Compile for one of LEVELS into the file `library`. Raises OSError."""
    command = compiler()
    if command is None:
        raise OSError("no C compiler was found (cc, gcc, clang or $CC)")
    library.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own and a rename: two processes that compile at once do not see each other's half-written file.
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    sources = map(str, sorted(SOURCES.glob("*.c")))
    try:
        result = subprocess.run(
            [command, *FLAGS, *LEVELS[best], *sources, "-o", scratch], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no message"])[0]
            raise OSError(f"{command} failed: {reason}")
        Path(scratch).chmod(0o755)
        Path(scratch).replace(library)
    finally:
        Path(scratch).unlink(missing_ok=True)
