"""The command line of the replication: `python -m replication COMMAND`; Make calls nothing else."""

from __future__ import annotations

import argparse
import importlib
import sys

from replication.commands import CommandError
from replication.study.paths import check_checkout

COMMANDS = {  # name: what it does
    "run": "run one notebook",
    "dryrun": "run every notebook with random weights of the true shapes and tiny counts, into build/dryrun",
    "verify": "compare the tables of a run with the committed ones",
    "repeats": "gather the scorecards of repeated runs",
    "sweep": "train and test the SAEs of a grid",
    "browser": "write the atom browser, figures/PROFILE/atoms.html",
    "audit": "test a published SAE as page 05 does, beside the author's own numbers",
    "readme": "write the numbers of README.md and docs/ from results/mini, and draw the README's picture",
    "site": "build the site into build/site",
    "train-host": "train embedded hosts from their recipes",
    "train-recall": "train the recall hosts from models/recall/recipes.yaml",
    "disk": "check that the disks have room for what a profile has still to download and to write",
}


def main(arguments: list[str] | None = None) -> int:
    """Return a command's exit status: 1 with one sentence on stderr after an error, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m replication", description="Run a part of the replication.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.")
        if name in arguments[:1]:  # imports take seconds
            module = importlib.import_module(f"replication.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
    options = parser.parse_args(arguments)
    label = getattr(options, "name", options.command)
    try:
        check_checkout()
        return module.main(options)
    except (CommandError, ValueError, OSError, FloatingPointError, ImportError, MemoryError) as error:
        print(f"{label} failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{label} was interrupted: the next run continues from what is stored.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # pages print characters that the locale may lack
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
