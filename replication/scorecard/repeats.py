"""Comparison of whole runs with other seeds or on other machines, for notebook 20.

`make repeats` (`replication.commands.repeats`) gathers the scorecards and the replacement_summary.csv of
whole runs. Another seed changes SAEs, places and prompts; another processor changes the order of sums, which
training amplifies to other atoms. The values of other runs are judged with the standard errors of this one.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from replication import layout
from replication.scorecard.criteria import read_criteria
from replication.scorecard.verdicts import NOT_ASKED
from replication.statistics import Estimate, cluster_bootstrap
from replication.study.profile import load_profile
from replication.study.stages import read_table, rows_with
from writesae.files import read_sidecar

EXPECTED = 0.834  # share of repeats in a correct interval: |z| < 1.96 / sqrt(2), since both are estimates
RUN = ["seed", "device", "commit"]
KEYS = ["host", "cells", "target", "amplitude", "write", "read", "kl_direction"]  # of replacement_summary
COLUMNS = dict(
    scorecard=["id", "host", "value", "ci_low", "ci_high", "n", "status"],
    replacement=[*KEYS, "n", "win_rate", "ci_low", "ci_high"],
)
FILES = dict(scorecard="scorecard", replacement="replacement_summary")


def answered(scorecard: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a scorecard that have a verdict."""
    return scorecard[scorecard.status != NOT_ASKED]


def read_run(folder: Path, profile: str, kind: str) -> pd.DataFrame:
    """Return a table of a run (`kind`: a key of COLUMNS) with the columns RUN, without claims not asked.

    Raises ArtifactError if the table is missing or damaged, ValueError if the profile of the run differs
    from `profile` in more than its seed.
    """
    path = Path(folder) / f"{FILES[kind]}.csv"
    table, record = read_table(path), read_sidecar(path)
    name = record["profile"]
    settings, wanted = (load_profile(x).model_dump(exclude={"name", "seed"}) for x in (name, profile))
    if settings != wanted:
        raise ValueError(f"{folder} is a run of {name}, which differs from {profile} not only in its seed.")
    table = answered(table) if kind == "scorecard" else table
    return table.assign(**{name: record[name] for name in RUN})[[*RUN, *COLUMNS[kind]]]


def gather(folders: list[Path], profile: str, kind: str, stored: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the rows of `read_run` for all folders, after those in the table `stored` with another seed or device.

    Also raises ValueError for a run that is given twice, and if all runs have the seed of the profile.
    """
    folder_of, tables = {}, []
    for folder in folders:
        tables.append(read_run(folder, profile, kind))
        run = tuple(tables[-1][RUN].iloc[0])
        if run in folder_of:
            raise ValueError(f"{folder_of[run]} and {folder} are the same run: name each once.")
        folder_of[run] = folder
    if stored is not None:
        given = {run[:2] for run in folder_of}
        tables.insert(0, stored[[run not in given for run in stored[RUN[:2]].itertuples(index=False, name=None)]])
    table, seed = pd.concat(tables, ignore_index=True), load_profile(profile).seed
    if (table.seed == seed).all():
        raise ValueError(f"All runs have {profile}'s own seed, {seed}: give one with another.")
    return table


# Whole runs


def judged(scorecard: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return the values of other runs with this run's verdict on each, as if they had its standard error.

    Columns of both: id, host, status (of the other run's value), z (its distance from this run's value in
    standard errors), and this run's value, status and so on with the suffix _here. Claims of one run only and
    values without an error are left out.
    """
    criteria, here = read_criteria(), answered(scorecard)
    table = repeats.merge(here[here.standard_error > 0], on=["id", "host"], suffixes=("", "_here"))
    scales = [criteria.scale(name)[0] for name in table.id]
    values, own = ([float(f(x)) for f, x in zip(scales, table[name])] for name in ("value", "value_here"))
    rows = zip(table.id, values, table.standard_error, table.df, strict=True)
    verdicts = [criteria.borders(name).verdict(Estimate(*numbers, 1)) for name, *numbers in rows]
    return table.assign(status=verdicts, z=(np.array(values) - own) / table.standard_error)


def stability(scorecard: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return one row per claim and host that counts and that a repeat answers as well.

    runs: number of runs that answer the claim, including this one; agree: number with this run's verdict;
    turned: whether any run has another verdict; least, most: range of values; z_most: largest distance of a
    repeat from this run, in standard errors of this run; repeat_probability: as stated by this run.
    """
    rows, others = [], judged(scorecard, repeats)
    for line in answered(scorecard[scorecard.counts]).itertuples():
        own = rows_with(others, id=line.id, host=line.host)
        if own.empty:
            continue
        same = int((own.status == line.status).sum())
        row = dict(id=line.id, host=line.host, group=line.group, status=line.status)
        row |= dict(runs=len(own) + 1, agree=same + 1)
        row |= dict(turned=same < len(own), value=line.value, least=min([line.value, *own.value]))
        row |= dict(most=max([line.value, *own.value]), z_most=own.z.abs().max())
        rows.append(row | dict(repeat_probability=line.repeat_probability))
    return pd.DataFrame(rows)


def by_seed(scorecard: pd.DataFrame, seed: int, repeats: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the judged values of each seed that count: one run per seed, this one for its own."""
    kept = scorecard[scorecard.counts & (scorecard.standard_error > 0)]
    runs = {seed: answered(kept).assign(z=0.0)}
    for other, part in judged(kept, repeats).groupby("seed"):
        runs.setdefault(other, part.drop_duplicates(["id", "host"]))
    return list(runs.values())


def pairs_of(runs: list[pd.DataFrame]) -> pd.DataFrame:
    """Return the claims that both runs of a pair answer, for all ordered pairs; the second's have _other."""
    pairs = itertools.permutations(runs, 2)
    both = [one.merge(other, on=["id", "host"], suffixes=("", "_other")) for one, other in pairs]
    return pd.concat(both, ignore_index=True)


def held(scorecard: pd.DataFrame, seed: int, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return how often the interval of one run contains the value of another, per host and for all hosts.

    It compares ordered pairs of runs with different seeds, since runs of one seed draw the same firings and
    prompts; all have the standard errors of this run. n counts the claims of all pairs; the interval of share
    is a bootstrap over claims; expected is the share for correct intervals.
    """
    table, rows = pairs_of(by_seed(scorecard, seed, repeats)), []
    reach = stats.t.ppf(0.975, table.df)
    table["inside"] = ((table.z - table.z_other).abs() < reach).astype(float)
    for host, part in [*table.groupby("host", sort=False), ("all", table)]:
        low, high = cluster_bootstrap(part.inside, part.id)
        rows.append(dict(host=host, share=part.inside.mean(), ci_low=low, ci_high=high, n=len(part)))
    return pd.DataFrame(rows).assign(expected=EXPECTED)


def spread(summary: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """Return the win rates of this run's replacement_summary and their range (least, most) over all runs."""
    rates = pd.concat([summary, repeats], ignore_index=True).groupby(KEYS, sort=False).win_rate
    runs = rates.agg(runs="size", least="min", most="max").reset_index()
    return summary[[*KEYS, "n", "win_rate", "passage_low", "passage_high"]].merge(runs, on=KEYS, how="left")


# For readers


def shown_runs(repeats: pd.DataFrame) -> pd.DataFrame:
    """Return how many claims each other run measures."""
    return layout.counts(repeats.assign(commit=repeats.commit.str[:8]), RUN, "claims measured")


def shown_turned(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the verdicts of the table of `stability` that change, for a reader."""
    rows = verdicts[verdicts.turned]
    columns = {"verdict": rows.status, "runs that agree": [f"{x.agree} of {x.runs}" for x in rows.itertuples()]}
    columns |= {"value": layout.numbers(rows.value, ".3g")}
    columns |= {"range": [f"{x.least:.3g} to {x.most:.3g}" for x in rows.itertuples()]}
    columns |= {"largest distance (standard errors)": layout.numbers(rows.z_most, ".1f")}
    stated = layout.numbers(rows.repeat_probability, ".0f", 100)
    return layout.shown(rows, ["id", "host"], columns | {"stated probability (%)": stated})


def shown_held(held: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `held` for a reader."""
    columns = {"pairs": layout.numbers(held.n, ",.0f")}
    columns |= {"held (%)": layout.estimates(held, "share", "ci_low", "ci_high")}
    return layout.shown(held, ["host"], columns | {"if right (%)": layout.numbers(held.expected, ".0f", 100)})


def shown_rates(rates: pd.DataFrame) -> pd.DataFrame:
    """Return win rates and their range over the runs, for a reader."""
    columns = {"firings": layout.numbers(rates.n, ",.0f")}
    columns |= {"beats deletion (%)": layout.estimates(rates, "win_rate", "passage_low", "passage_high")}
    columns |= {"runs": rates.runs, "range (%)": layout.ranges(rates.least, rates.most)}
    return layout.shown(rates, ["host", "cells", "target", "amplitude"], columns)
