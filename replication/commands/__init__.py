"""The commands of `python -m replication`: modules with `add_arguments(parser)` and `main(options)`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from replication.study.paths import ROOT
from replication.study.yaml_files import checked, read_mapping


class CommandError(RuntimeError):
    """A command cannot start, or did not complete; the message is one sentence."""


def read_yaml(model, path: Path, label: str, **fields):
    """Return a pydantic model of a YAML mapping and further fields. Raises ValueError, about `label`, if the
    file has other content."""
    content = read_mapping(path, label)
    with checked(label):
        return model(**content, **fields)


def positive(text: str) -> int:
    """Return the number of an option. Raises ArgumentTypeError, one sentence, unless it is 1 or more."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def check_disk(profile: str) -> None:
    """Raise CommandError if a disk has no room for the rest of the profile's run.

    The check has its own process, because it imports torch, whose memory this process would keep."""
    command = [sys.executable, "-m", "replication", "disk", "--profile", profile]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        died = f"the check of the disk ended with exit status {done.returncode}"
        raise CommandError(last_line(done.stderr).removeprefix("disk failed: ") or died)
    print(done.stderr, end="", file=sys.stderr)  # what is not counted
