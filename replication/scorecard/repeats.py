"""Comparison of whole runs with other seeds or on other machines, for notebook 12.

Intervals of the scorecard are over the atoms, passages or prompts of one run. Another seed changes SAEs,
firings and prompts; another processor changes the order of sums, which training amplifies to other atoms.
`make repeats` (`replication.commands.repeats`) gathers the scorecards and the replacement_summary.csv of such
runs.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from replication.scorecard.verdicts import NOT_ASKED
from replication.statistics import cluster_bootstrap
from replication.study.profile import load_profile
from replication.study.stages import read_table, rows_with
from writesae.files import read_sidecar

WIDTH = 2 * 1.959964  # of a 95% interval, in standard errors
EXPECTED = 0.834  # share of repeats in a correct interval: |z| < 1.96 / sqrt(2), since both are estimates
RUN = ["seed", "device", "commit"]
KEYS = ["host", "cells", "target", "amplitude", "write", "read", "kl_direction"]  # of replacement_summary
COLUMNS = dict(
    scorecard=["id", "host", "value", "ci_low", "ci_high", "n", "status"],
    replacement=[*KEYS, "n", "win_rate", "ci_low", "ci_high"],
)
FILES = dict(scorecard="scorecard", replacement="replacement_summary")


class RepeatsError(ValueError):
    """A run that cannot be compared with the others."""


def _answered(scorecard: pd.DataFrame) -> pd.DataFrame:
    return scorecard[scorecard.status != NOT_ASKED]


def read_run(folder: Path, profile: str, kind: str) -> pd.DataFrame:
    """Return a table of a run (`kind`: a key of COLUMNS) with the columns RUN, without claims that are not
    asked.

    Raises ArtifactError if the table is missing or damaged, RepeatsError if the profile of the run differs
    from `profile` in more than its seed.
    """
    path = Path(folder) / f"{FILES[kind]}.csv"
    table, record = read_table(path), read_sidecar(path)
    name = record["profile"]
    settings, wanted = (load_profile(x).model_dump(exclude={"name", "seed"}) for x in (name, profile))
    if settings != wanted:
        raise RepeatsError(f"{folder} is a run of {name}, which differs from {profile} not only in its seed.")
    table = _answered(table) if kind == "scorecard" else table
    return table.assign(**{name: record[name] for name in RUN})[[*RUN, *COLUMNS[kind]]]


def gather(folders: list[Path], profile: str, kind: str) -> pd.DataFrame:
    """Return the rows of `read_run` for all folders.

    Also raises RepeatsError for a run that is given twice, and if all runs have the seed of the profile.
    """
    folder_of, tables = {}, []
    for folder in folders:
        tables.append(read_run(folder, profile, kind))
        run = tuple(tables[-1][RUN].iloc[0])
        if run in folder_of:
            raise RepeatsError(f"{folder_of[run]} and {folder} are the same run: name each once.")
        folder_of[run] = folder
    table, seed = pd.concat(tables, ignore_index=True), load_profile(profile).seed
    if (table.seed == seed).all():
        raise RepeatsError(f"All runs have {profile}'s own seed, {seed}: give one with another.")
    return table


def stability(scorecard: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return one row per claim and host that the scorecard of this run answers.

    runs: number of runs that answer the claim, including this one; agree: number with this run's verdict;
    turned: whether any run has another verdict; least, most: range of values; standard_error: from this run's
    interval; z_most: largest distance of a repeat from this run, in standard errors (nan if these are 0).
    """
    rows = []
    for line in _answered(scorecard).itertuples():
        others = rows_with(repeats, id=line.id, host=line.host)
        values, same = others.value.to_numpy(), int((others.status == line.status).sum())
        error = (line.ci_high - line.ci_low) / WIDTH
        farthest = np.abs(values - line.value).max(initial=0) / error if error > 0 else np.nan
        row = dict(id=line.id, host=line.host, status=line.status, runs=len(others) + 1, agree=same + 1)
        row |= dict(turned=same < len(others), value=line.value, least=min([line.value, *values]))
        rows.append(row | dict(most=max([line.value, *values]), standard_error=error, z_most=farthest))
    return pd.DataFrame(rows)


def held(scorecard: pd.DataFrame, seed: int, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return how often the interval of one run contains the value of another, per host and for all hosts.

    It compares ordered pairs of runs with different seeds, since runs of one seed draw the same firings and
    prompts. Intervals of width 0 are left out. n counts the claims of all pairs; the interval of share is a
    bootstrap over claims; expected is the share for correct intervals.
    """
    pairs, runs = [], {seed: _answered(scorecard)}
    for other, run in repeats.groupby("seed"):
        runs.setdefault(other, run.drop_duplicates(["id", "host"]))
    for one, other in itertools.permutations(runs.values(), 2):
        both = one.merge(other, on=["id", "host"], suffixes=("", "_other"))
        pairs.append(both[both.ci_high > both.ci_low])
    table, rows = pd.concat(pairs, ignore_index=True), []
    table["inside"] = table.value_other.between(table.ci_low, table.ci_high).astype(float)
    for host, part in [*table.groupby("host", sort=False), ("all", table)]:
        low, high = cluster_bootstrap(part.inside, part.id)
        rows.append(dict(host=host, share=part.inside.mean(), ci_low=low, ci_high=high, n=len(part)))
    return pd.DataFrame(rows).assign(expected=EXPECTED)


def spread(summary: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return the win rates of this run's replacement_summary and their range (least, most) over all runs."""
    rates = pd.concat([summary, repeats], ignore_index=True).groupby(KEYS, sort=False).win_rate
    runs = rates.agg(runs="size", least="min", most="max").reset_index()
    return summary[COLUMNS["replacement"]].merge(runs, on=KEYS, how="left")
