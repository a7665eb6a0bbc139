"""Memory of this process, and what to do where the GPU's is too small."""

from __future__ import annotations

import ctypes
import re
import sys

LOWER = {  # by the innermost of these files in a traceback: what ran, and the setting of the profile that it goes by
    "train.py": ("training", "saes.*.batch_windows (in page 11 ablations.training.batch_windows)"),
    "edit.py": ("edited runs", "replacement.batch_rows (in page 11 multiverse.batch_rows)"),
    "harvest.py": ("a native run", "data.batch_windows"),
}
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


def out_of_memory(traceback: str) -> str:
    """A sentence on what to lower after a torch.OutOfMemoryError with this traceback, Python's or a notebook's."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", traceback)
    files = [name for name in re.findall(r"writesae/(?:\w+/)*(\w+\.py)", plain) if name in LOWER]
    found = [LOWER[files[-1]]] if files else list(LOWER.values())
    settings = ", or ".join(f"{setting} for {what}" for what, setting in found)
    return f"The GPU's memory is too small: in the profile, lower {settings}; or take a smaller model."
