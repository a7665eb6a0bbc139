"""Gather the scorecards and the replacement summaries of repeated runs, beside those that are there."""

from __future__ import annotations

import argparse

from replication.scorecard.repeats import COLUMNS, gather
from replication.study.paths import typed
from replication.study.study import open_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("folders", nargs="+", type=typed, help="tables of whole runs, e.g. results/mini-1001")


def main(options: argparse.Namespace) -> int:
    study = open_study(options.profile)
    stored = {kind: study.kept_table(f"repeats-{kind}") for kind in COLUMNS}
    tables = {kind: gather(options.folders, options.profile, kind, stored[kind]) for kind in COLUMNS}
    for kind, table in tables.items():
        study.write(f"repeats-{kind}", table, seconds=0.0)
    names = ", ".join(f"repeats-{kind}.csv" for kind in tables)
    print(f"{len(options.folders)} runs in results/{options.profile}: {names}")
    return 0
