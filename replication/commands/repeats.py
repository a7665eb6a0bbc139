"""Gather the scorecards of repeated runs: `python -m replication.commands.repeats`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from replication.scorecard.repeats import COLUMNS, gather
from replication.study.profile import load_profile
from replication.study.study import Suite
from writesae.files import ArtifactError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("folders", nargs="+", type=Path, help="tables of a whole run each, like results/mini-1001")
    given = parser.parse_args(arguments)
    try:
        suite = Suite(load_profile(given.profile))
        tables = {kind: gather(given.folders, given.profile, kind) for kind in COLUMNS}
        for kind, table in tables.items():
            suite.write(f"repeats-{kind}", table, seconds=0.0)
    except (ArtifactError, ValueError) as error:
        print(f"Nothing was gathered: {error}", file=sys.stderr)
        return 1
    print(
        f"{len(given.folders)} runs in results/{given.profile}: " + ", ".join(f"repeats-{kind}.csv" for kind in tables)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
