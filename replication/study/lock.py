"""One run at a time writes a profile's files: its processes hold the lock of the build folder.

A run is one process, or all processes with the same WRITESAE_RUN (`make all` sets it: it has several
notebooks at work). The processes of a run share the lock."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from functools import cache
from pathlib import Path
from typing import TextIO

from replication.study.paths import Paths


class LockError(OSError):
    """Another run holds the lock, or the file system has no locks."""


class Lock:
    """A lock that any thread of this process may take again; as a context, it is released at the end."""

    def __init__(self, path: Path):
        self.path, self.depth, self.file, self.mutex = path, 0, None, threading.Lock()

    def take(self, wait: float) -> Lock:
        with self.mutex:
            if not self.depth:
                self.file = _locked(self.path, wait)
            self.depth += 1
        return self

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *error) -> None:
        with self.mutex:
            self.depth -= 1
            if not self.depth:
                self.file.close()


_lock = cache(Lock)


def writing(paths: Paths, wait: float = 10.0) -> Lock:
    """Take the lock build/<profile>/lock; a process that holds it may take it again.

    The result is a context that releases the lock; otherwise this process holds it until it ends. Raises
    LockError if another run still holds it after `wait` seconds, or if the file system has no locks."""
    path = paths.build / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return _lock(path).take(wait)


def _locked(path: Path, wait: float) -> TextIO:
    """Return the open file with the lock. The file names a process that holds it, and its run."""
    run, deadline = os.environ.get("WRITESAE_RUN", ""), time.monotonic() + wait
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115, as long as the lock
    try:
        while not (_lock_file(file, fcntl.LOCK_EX) or run in _holder(file)[1:2] and _lock_file(file, fcntl.LOCK_SH)):
            if time.monotonic() > deadline:
                number = (_holder(file) or ["unknown"])[0]
                raise LockError(
                    f"Another run with this profile is at work in this folder (process {number}): wait until "
                    "it ends, or shut down its kernel, then run again."
                )
            time.sleep(0.05)
        file.truncate(0)
        print(os.getpid(), run, file=file, flush=True)
        shared = not run or _lock_file(file, fcntl.LOCK_SH)
    except BaseException:
        file.close()
        raise
    if shared:
        return file
    file.close()  # another run was faster while this one went from the exclusive to the shared lock
    return _locked(path, wait)


def _holder(file: TextIO) -> list[str]:
    """Return the process and the run that the lock's file names."""
    file.seek(0)
    return file.read().split()


def _lock_file(file: TextIO, kind: int) -> bool:
    """Return whether the file could be locked. Raises LockError if its file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise LockError(
            f"{file.name} cannot be locked ({error}): let WRITESAE_OUTPUT name a folder on a file system with locks."
        ) from error
    return True
