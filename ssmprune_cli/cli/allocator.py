"""How the program's memory is kept."""

from __future__ import annotations

import ctypes
import platform


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: large tensors are otherwise mapped and page-faulted anew at every op.

    Does nothing with another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
