"""Memory of this process."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation; whether that could be set.

    As it stands, glibc maps every tensor above 32 MiB afresh and gives it back when it is freed, so that each of a
    run's large intermediate results is paid for with a page fault every 4 KiB: several times the arithmetic's own cost
    on a virtual machine. The process then stays as large as it ever was. No effect on results, nor without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_ARENA_MAX: 1}
    return min(mallopt(option, value) for option, value in settings.items()) == 1
