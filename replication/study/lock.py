"""One process at a time writes a profile's files: it holds the lock of the build folder."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from replication.study.paths import Paths


class LockError(OSError):
    """Another process holds the lock, or the file system has no locks."""


@cache
def _lock(path: Path) -> FileLock:
    """Return this process's lock at `path`, which any of its threads may take again."""
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def writing(paths: Paths, wait: float = 10.0) -> AcquireReturnProxy:
    """Take the lock build/<profile>/lock; a process that holds it may take it again.

    The result is a context that releases the lock; otherwise this process holds it until it ends. Raises
    LockError if another process still holds it after `wait` seconds, or if the file system has no locks."""
    path, process = paths.build / "lock", paths.build / "lock.process"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = _lock(path).acquire(timeout=wait)
    except Timeout:
        number = process.read_text() if process.is_file() else "unknown"
        raise LockError(
            f"Another run with this profile is at work in this folder (process {number}): wait until it ends, or "
            "shut down its kernel, then run again."
        ) from None
    except (NotImplementedError, OSError) as error:
        raise LockError(
            f"{path} cannot be locked ({error}): let WRITESAE_OUTPUT name a folder on a file system with file locks."
        ) from error
    try:
        process.write_text(str(os.getpid()))
    except OSError:
        held.lock.release()
        raise
    return held
