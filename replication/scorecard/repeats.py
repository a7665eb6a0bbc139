"""Do other runs come to the same verdicts? Tables of whole runs side by side, for notebook 12.

The intervals of the scorecard are over the atoms, passages or prompts of one run. Another seed trains other
SAEs and draws other firings and prompts; another processor takes sums in another order, which training
amplifies until other atoms come out. `make repeats` (`replication.commands.repeats`) takes the runs of a
profile with other seeds, or on other machines, and writes two tables to results/PROFILE: their scorecards
(repeats-scorecard.csv) and their replacement_summary.csv (repeats-replacement.csv).
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from replication.statistics import cluster_bootstrap
from replication.study.profile import load_profile
from replication.study.stages import read_table
from writesae.files import read_sidecar

WIDTH = 2 * 1.959964  # of a 95% interval, in standard errors
EXPECTED = 0.834  # share of repeats in a correct interval: |z| < 1.96 / sqrt(2), as both are estimates
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
    return scorecard[scorecard.status != "not run"]


def read_run(folder: Path, profile: str, kind: str) -> pd.DataFrame:
    """Return one table of a run (`kind`: a key of COLUMNS) with the run's seed, device and commit in front.

    Of the scorecard, only the claims that were asked. Raises ArtifactError where the table is missing or
    damaged, RepeatsError where the run's profile differs from `profile` in more than its seed.
    """
    path = Path(folder) / f"{FILES[kind]}.csv"
    table, record = read_table(path), read_sidecar(path)
    settings, wanted = (load_profile(x).model_dump(exclude={"name", "seed"}) for x in (record["profile"], profile))
    if settings != wanted:
        raise RepeatsError(
            f"{folder} is a run of {record['profile']}, which differs from {profile} in more than its seed."
        )
    table = _answered(table) if kind == "scorecard" else table
    return table.assign(**{name: record[name] for name in RUN})[[*RUN, *COLUMNS[kind]]]


def gather(folders: list[Path], profile: str, kind: str) -> pd.DataFrame:
    """Return the tables of the runs in these folders (`read_run`), one below the other.

    Raises RepeatsError also for a run that is given twice, and where all runs have the profile's own seed.
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
    """Return one row per (claim, host) that this run's scorecard answers.

    runs: the number of runs that answer it, including this one; agree: how many of them have this run's
    verdict; turned: whether any has another; least, most: the range of their values; standard_error: that of
    this run, from the width of its interval; z_most: the largest distance of a repeat's value from this
    run's, in standard errors (nan where the interval has no width).
    """
    rows = []
    for line in _answered(scorecard).itertuples():
        others = repeats[(repeats.id == line.id) & (repeats.host == line.host)]
        values, same = others.value.to_numpy(), int((others.status == line.status).sum())
        error = (line.ci_high - line.ci_low) / WIDTH
        farthest = np.abs(values - line.value).max(initial=0) / error if error > 0 else np.nan
        row = dict(id=line.id, host=line.host, status=line.status, runs=len(others) + 1, agree=same + 1)
        row |= dict(turned=same < len(others), value=line.value, least=min([line.value, *values]))
        rows.append(row | dict(most=max([line.value, *values]), standard_error=error, z_most=farthest))
    return pd.DataFrame(rows)


def held(scorecard: pd.DataFrame, seed: int, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return how often the interval of one run holds the value of another: one row per host, and one for all
    hosts.

    share has a bootstrap interval over claims; n counts pairs; `expected` is the share for correct intervals.
    All ordered pairs of runs with different seeds count (runs of one seed draw the same firings and prompts),
    without intervals that have no width.
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
    """Return the win rates of this run's replacement_summary with the range (least, most) over all runs."""
    rates = pd.concat([summary, repeats], ignore_index=True).groupby(KEYS, sort=False).win_rate
    runs = rates.agg(runs="size", least="min", most="max").reset_index()
    return summary[COLUMNS["replacement"]].merge(runs, on=KEYS, how="left")
