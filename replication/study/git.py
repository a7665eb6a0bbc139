"""Questions to git about the repository of this checkout, never about one around it."""

from __future__ import annotations

import os
import subprocess

from replication.study import paths

# These choose a repository; git sets them for its hooks.
CHOOSE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")


class GitError(OSError):
    """There is no git, no repository of this checkout, or git refused; the message is one sentence."""


def git(*arguments: str) -> bytes:
    """Return what `git ARGUMENTS` prints in this checkout. Raises GitError."""
    top = os.fsdecode(_run("rev-parse", "--show-toplevel")).rstrip("\n")
    if not os.path.samefile(top, paths.ROOT):
        raise GitError(f"{paths.ROOT} is no git repository, but a folder in that of {top}")
    return _run(*arguments)


def _run(*arguments: str) -> bytes:
    environment = {name: value for name, value in os.environ.items() if name not in CHOOSE}
    command = ["git", "--no-optional-locks", "-C", str(paths.ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, env=environment)
    except OSError as error:
        raise GitError(f"git cannot be started ({error.strerror})") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise GitError(f"git {arguments[0]} failed: {said[0] if said else done.returncode}")
    return done.stdout
