"""One process at a time writes a profile's files: whoever opens a study for writing holds the lock of its
build folder."""

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
    """Return the one lock of this process at `path`, which any of its threads may take again."""
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def writing(paths: Paths, wait: float = 10.0) -> AcquireReturnProxy:
    """Take the lock build/<profile>/lock. A process that holds it may take it again.

    As a context the result releases the lock; without one, this process holds it until it ends in any way.
    Raises LockError, in one sentence, if another process still holds it after `wait` seconds (the kernel of a
    killed run ends within a few), or if the file system has no locks."""
    path = paths.build / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    process = path.with_name("lock.process")
    try:
        held = _lock(path).acquire(timeout=wait)
    except Timeout:
        number = process.read_text() if process.is_file() else "unknown"
        raise LockError(
            f"Another run with this profile is at work in this folder (process {number}): wait until it ends, or shut "
            "down its kernel, then run again."
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
