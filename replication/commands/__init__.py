"""What `python -m replication COMMAND` runs. Each module has `add_arguments(parser)` and `main(options) ->
exit status`."""

from __future__ import annotations

import subprocess
import sys

from replication.study.paths import ROOT


class CommandError(RuntimeError):
    """A command cannot start, or did not complete; the message is one sentence."""


def first_error(error) -> str:
    """Return where a pydantic ValidationError begins, and what is wrong there: "field.subfield: message"."""
    first = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


def check_disk(profile: str) -> None:
    """Raise CommandError if a disk has no room for the rest of the profile's run.

    The check runs in a process of its own: it imports torch, whose memory this process would keep.
    """
    command = [sys.executable, "-m", "replication", "disk", "--profile", profile]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise CommandError(last_line(done.stderr).removeprefix("disk failed: "))
    print(done.stderr, end="", file=sys.stderr)  # what it could not count
