"""Whole runs side by side: does another seed, or another machine, say the same? `make repeats`, then page 12.

    python -m replication.scorecard.repeats results/mini-1001 results/mini-1002 build/test/results/mini

An interval of the scorecard is over the atoms, passages or prompts of one run. Another seed trains other SAEs and draws other
firings and prompts; another processor takes sums in another order, which training amplifies until other atoms come out. This
takes two tables of runs that differ from a profile in their seed, or in nothing, into results/PROFILE: their scorecards into
repeats-scorecard.csv, and their replacement_summary.csv into repeats-replacement.csv.
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
EXPECTED = 0.834  # share of repeats that a right 95% interval holds: |z| < 1.96 / sqrt(2), for both are estimates
RUN = ["seed", "device", "commit"]
KEYS = ["host", "cells", "target", "amplitude", "write", "read", "kl_direction"]  # of a line of replacement_summary
COLUMNS = dict(
    scorecard=["id", "host", "value", "ci_low", "ci_high", "n", "status"],
    replacement=[*KEYS, "n", "win_rate", "ci_low", "ci_high"],
)
FILES = dict(scorecard="scorecard", replacement="replacement_summary")


class RepeatsError(ValueError):
    """A run that cannot stand beside the others."""


def read_run(folder: Path, profile: str, kind: str) -> pd.DataFrame:
    """The scorecard, of what was asked, or the replacement summary (a key of COLUMNS) of a run's folder of tables, behind
    the run's seed, device and commit.

    Raises ArtifactError where it is missing or damaged, RepeatsError where its profile differs in more than the seed.
    """
    path = Path(folder) / f"{FILES[kind]}.csv"
    table, record = read_table(path), read_sidecar(path)
    own, wanted = (load_profile(name).model_dump(exclude={"name", "seed"}) for name in (record["profile"], profile))
    if own != wanted:
        raise RepeatsError(
            f"{folder} is a run of {record['profile']}, which differs from {profile} in more than its seed."
        )
    asked = table[table.status != "not run"] if kind == "scorecard" else table
    return asked.assign(**{name: record[name] for name in RUN})[[*RUN, *COLUMNS[kind]]]


def gather(folders: list[Path], profile: str, kind: str) -> pd.DataFrame:
    """One table (a key of COLUMNS) of the runs in these folders, one after the other.

    Raises what `read_run` raises, and RepeatsError for a run given twice and where all have the profile's own seed.
    """
    runs: dict[tuple, Path] = {}
    tables = []
    for folder in folders:
        tables.append(read_run(folder, profile, kind))
        run = tuple(tables[-1][RUN].iloc[0])
        if run in runs:
            raise RepeatsError(f"{runs[run]} and {folder} are the same run: name each once.")
        runs[run] = folder
    table, seed = pd.concat(tables, ignore_index=True), load_profile(profile).seed
    if (table.seed == seed).all():
        raise RepeatsError(f"All runs have {profile}'s own seed, {seed}: give one with another.")
    return table


def stability(scorecard: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """A line a (claim, host) that a run's scorecard answers, beside the repeats that answer it as well.

    runs: how many there are, this one among them; agree: in how many the verdict is this run's; turned: whether the verdict
    is another in any; least, most: of their values; standard_error: the width of this run's interval, as one; z_most: the
    largest distance of a repeat's value from this run's, in standard errors (nan where the interval has no width).
    """
    rows = []
    for own in scorecard[scorecard.status != "not run"].itertuples():
        others = repeats[(repeats.id == own.id) & (repeats.host == own.host)]
        values, same = others.value.to_numpy(), int((others.status == own.status).sum())
        error = (own.ci_high - own.ci_low) / WIDTH
        far = np.abs(values - own.value).max(initial=0) / error if error > 0 else np.nan
        line = dict(id=own.id, host=own.host, status=own.status, runs=len(others) + 1, agree=same + 1)
        line |= dict(turned=same < len(others), value=own.value, least=min([own.value, *values]))
        rows.append(line | dict(most=max([own.value, *values]), standard_error=error, z_most=far))
    return pd.DataFrame(rows)


def held(scorecard: pd.DataFrame, seed: int, repeats: pd.DataFrame) -> pd.DataFrame:
    """How often one run's interval holds the value of another, a line a host and one for all: share, with a bootstrap
    interval over claims, n pairs, and `expected` where intervals are right.

    All ordered pairs of runs with different seeds count (a run of the same seed draws the same firings and prompts), but
    those whose interval has no width."""
    pairs, runs = [], {seed: scorecard[scorecard.status != "not run"]}
    for other, run in repeats.groupby("seed"):
        runs.setdefault(other, run.drop_duplicates(["id", "host"]))
    for one, other in itertools.permutations(runs.values(), 2):
        both = one.merge(other, on=["id", "host"], suffixes=("", "_other"))
        pairs.append(both[both.ci_high > both.ci_low])
    table = pd.concat(pairs, ignore_index=True)
    inside = table.value_other.between(table.ci_low, table.ci_high).astype(float)
    rows = []
    for host in [*table.host.unique(), "all"]:
        some = np.full(len(table), True) if host == "all" else (table.host == host).to_numpy()
        low, high = cluster_bootstrap(inside[some], table.id[some])
        rows.append(dict(host=host, share=inside[some].mean(), ci_low=low, ci_high=high, n=int(some.sum())))
    return pd.DataFrame(rows).assign(expected=EXPECTED)


def spread(summary: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """The lines of a run's replacement_summary (KEYS, n, win_rate and its interval) with the number of runs, this one among
    them, and the least and the most of their win rates."""
    every = pd.concat([summary, repeats], ignore_index=True).groupby(KEYS, sort=False).win_rate
    runs = every.agg(runs="size", least="min", most="max").reset_index()
    return summary[COLUMNS["replacement"]].merge(runs, on=KEYS, how="left")
