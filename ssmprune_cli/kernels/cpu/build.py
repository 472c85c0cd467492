"""The compiled csrc/: the one that came with the installation, or one compiled at first use into the user's cache.

Installation never needs a compiler: setup.py calls `compile_levels` and goes on without when there is none.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wno-psabi")
# What a library is compiled for, best first: the flags for x86. Elsewhere there is only the compiler's own baseline.
LIBRARIES = {
    "v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "v3": ("-march=x86-64-v3",),
    "baseline": ("-march=x86-64",),
}
TILES = "v4+amx"  # the library of v4, with the processor's own products of matrices
LEVELS = (TILES, *LIBRARIES)
COMPILER_SECONDS = 300  # 20 are usual

_NEEDS = {
    TILES: {"amx_tile", "amx_bf16", "avx512_bf16"},
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "v3": {"avx2", "fma", "bmi2", "f16c"},
    "baseline": set[str](),
}


def processor_flags() -> set[str]:
    """What Linux says an x86 processor can do; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        return set(text.split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return set()


def levels() -> tuple[str, ...]:
    """Those of LEVELS that this processor has, best first; each has what those after it have."""
    flags = processor_flags() if is_x86() else set()
    count = 0
    while count < len(LEVELS) and _NEEDS[LEVELS[-1 - count]] <= flags:
        count += 1
    return LEVELS[len(LEVELS) - count :]


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def compiler() -> str | None:
    """The C compiler: $CC, cc, gcc or clang, whichever is there first."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def load_library(level: str, check: Callable[[ctypes.CDLL], None]) -> ctypes.CDLL:
    """The kernels for one of LEVELS. Raises OSError saying what is missing or went wrong.

    `check` raises OSError for a library that cannot be used. Like one that is damaged it is compiled again. torch must
    be imported before: its OpenMP runtime is already loaded then, and both share one pool of threads.
    """
    if sys.platform == "win32":
        raise OSError("the C kernels are not built on Windows")
    stems = [library_stem(level, openmp) for openmp in openmp_flags()]
    for stem in stems:
        library = _loaded(SOURCES, stem, check, bundled=True)
        if library is not None:
            return library
    reasons = []
    for folder in cache_folders():
        try:
            secure(folder)
            for stem in stems:
                library = _loaded(folder, stem, check)
                if library is not None:
                    return library
            library = ctypes.CDLL(str(compile_library(level, folder)))
            check(library)
            return library
        except CompilerError:
            raise
        except OSError as error:
            reasons.append(str(error))
    raise OSError("; ".join(reasons) or "there is no folder for compiled kernels: set XDG_CACHE_HOME to one")


def _loaded(
    folder: Path, stem: str, check: Callable[[ctypes.CDLL], None], *, bundled: bool = False
) -> ctypes.CDLL | None:
    """The library in `folder`, if it is whole and usable. One that is not is removed, unless it is part of an
    installation, whose files are as trusted as its Python."""
    for path in folder.glob(f"{stem}-*.so"):
        with contextlib.suppress(OSError):
            state = path.lstat()
            trusted = bundled or (stat.S_ISREG(state.st_mode) and _trusted(state))
            if trusted and path.name == library_name(stem, path.read_bytes()):
                library = ctypes.CDLL(str(path))
                check(library)
                return library
        if not bundled:
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def cache_folders() -> list[Path]:
    """Where compiled kernels may lie, best first: the user's cache, or where there is none a temporary folder."""
    folders = []
    with contextlib.suppress(RuntimeError):  # no home
        folders.append(Path.home() / ".cache" / "ssmprune")
    own = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if own.is_absolute():  # others are to be ignored, says the XDG specification
        folders = [own / "ssmprune"]
    with contextlib.suppress(OSError):
        folders.append(Path(tempfile.gettempdir()) / f"ssmprune-{getattr(os, 'geteuid', int)()}")
    return [folder for folder in folders if folder.is_absolute()]


def secure(folder: Path) -> None:
    """Make `folder`. Raises OSError unless it is one in which nobody but this user and root can put a library."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or not _trusted(state):
        raise OSError(
            f"others could put code into {folder}: it must be a folder, not a link, that only you can write to"
        )
    if state.st_uid == os.geteuid() and stat.S_IMODE(state.st_mode) != 0o700:
        folder.chmod(0o700)


def _trusted(state: os.stat_result) -> bool:
    """Whether only this user and root can write to it."""
    return state.st_uid in (os.geteuid(), 0) and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def openmp_flags() -> list[tuple[str, ...]]:
    """Ways to compile with OpenMP, best first; the last one goes without, and runs in one thread."""
    if sys.platform != "darwin":
        return [("-fopenmp",), ()]
    # Apple's compiler has no runtime of its own, and a second one beside PyTorch's would end the process.
    runtime = Path(getattr(sys.modules.get("torch"), "__file__", None) or "") / ".." / "lib" / "libomp.dylib"
    runtime = Path(os.path.normpath(runtime))
    if not runtime.is_file():
        return [()]
    return [("-Xclang", "-fopenmp", str(runtime), f"-Wl,-rpath,{runtime.parent}"), ()]


def _flags(level: str) -> tuple[str, ...]:
    return LIBRARIES[level.removesuffix("+amx")] if is_x86() else ()


def library_stem(level: str, openmp: tuple[str, ...]) -> str:
    """How the library for one of LEVELS begins its name: with what it is made of, so that no stale one is loaded."""
    digest = hashlib.sha256(" ".join((platform.machine(), *FLAGS, *openmp, *_flags(level))).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    return f"kernels-{level.removesuffix('+amx')}-{digest.hexdigest()[:16]}"


def library_name(stem: str, content: bytes) -> str:
    """Its whole name, which ends with what is in it, so that no damaged one is loaded."""
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def compile_levels(folder: Path) -> list[Path]:
    """Compile for every level of this architecture into `folder`, for a wheel. Raises OSError."""
    if sys.platform == "win32":
        raise OSError("the C kernels are not built on Windows")
    return [compile_library(name, folder) for name in (LIBRARIES if is_x86() else ("baseline",))]


def compile_library(level: str, folder: Path) -> Path:
    """Compile for one of LEVELS into `folder`. Raises OSError, a CompilerError if it is the compiler that fails."""
    command = compiler()
    if command is None:
        raise CompilerError("no C compiler was found (cc, gcc, clang or $CC)")
    folder.mkdir(parents=True, exist_ok=True)
    reasons = []
    for openmp in openmp_flags():
        # A name of its own and a rename: two processes that compile at once do not see each other's half-written file.
        handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        scratch = Path(name)
        try:
            sources = map(str, sorted(SOURCES.glob("*.c")))
            reason = _run([command, *FLAGS, *_flags(level), *sources, *openmp, "-o", name])
            if reason is None:
                scratch.chmod(0o755)
                return scratch.replace(folder / library_name(library_stem(level, openmp), scratch.read_bytes()))
            reasons.append(reason)
        finally:
            scratch.unlink(missing_ok=True)
    raise CompilerError(f"{command} failed: {reasons[0]}")


class CompilerError(OSError):
    """There is no compiler, or it does not compile the kernels: another folder would not help."""


def _run(command: list[str]) -> str | None:
    """The first line of what a failing compiler says; None if it succeeds."""
    quiet = subprocess.DEVNULL
    # A group of its own: what the compiler has started ends with it.
    with subprocess.Popen(
        command, stdin=quiet, stdout=quiet, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            _, messages = process.communicate(timeout=COMPILER_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CompilerError(f"{command[0]} took longer than {COMPILER_SECONDS} seconds") from None
            raise
    if process.returncode == 0:
        return None
    return (messages.decode("utf-8", errors="replace").strip().splitlines() or ["no message"])[0]
