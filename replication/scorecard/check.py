"""Do two sets of trainings say the same, and is the stated probability right? Simulated, and observed.

The simulation takes the values and variances of the scorecard for the truth: for each claim it draws pairs of
sets of trainings and judges both. Observed are the whole runs of `make repeats`, and disjoint sets of the
trainings that headline_places.csv has, which are measured at the same places.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, product

import numpy as np
import pandas as pd

from replication import layout
from replication.scorecard.criteria import read_criteria
from replication.scorecard.repeats import answered, by_seed, pairs_of
from replication.scorecard.table import scorecard as make_scorecard
from replication.statistics import Estimate, cluster_bootstrap, satterthwaite

BINS = (0.0, 0.5, 0.7, 0.85, 0.95, 1.0)  # of stated probabilities
PAIRS, STATED = 200, 25  # simulated pairs of sets per claim, and those whose stated probability is computed
BY_PLACE = ("win_rate", "kl_ratio", "chains", "failures")  # measures of headline_places.csv
WHOLE, SIZES = "whole runs with other seeds", (1, 3, 5, 8)


def named(size: int, same_places: bool) -> str:
    """Return the name of a comparison of two sets of trainings."""
    trainings = "1 training and another" if size == 1 else f"{size} trainings and {size} others"
    return f"{trainings}, {'the same' if same_places else 'other'} places"


def simulated(scorecard: pd.DataFrame, size: int, same_places: bool, seed: int = 0) -> pd.DataFrame:
    """Return PAIRS simulated pairs of sets of trainings per claim that counts.

    Columns: id, host, status and status_other (the verdicts of a pair), stated (the probability of the first,
    for STATED pairs)."""
    criteria, generator, parts = read_criteria(), np.random.default_rng(seed), []
    for line in answered(scorecard[scorecard.counts & (scorecard.standard_error > 0)]).itertuples():
        borders, value = criteria.borders(line.id), float(criteria.scale(line.id)[0](line.value))
        places = generator.standard_normal((2, PAIRS))
        places = places[[0, 0]] if same_places else places
        one, other = (_estimates(line, value, drawn, size, generator) for drawn in places)
        some = enumerate(islice(zip(*one), STATED))
        stated = pd.Series([borders.repeat_probability(Estimate(*numbers, 1), at) for at, numbers in some])
        pairs = dict(status=borders.verdicts(*one), status_other=borders.verdicts(*other))
        parts.append(pd.DataFrame(dict(id=line.id, host=line.host) | pairs).assign(stated=stated))
    return pd.concat(parts, ignore_index=True)


def _estimates(line, value: float, places: np.ndarray, size: int, generator: np.random.Generator) -> tuple:
    """Return values [n], their standard errors and degrees of freedom for n sets of simulated trainings.

    line: a row of the scorecard; value: on its scale; places [n]: the errors of the places, in standard
    errors. The error of a set is estimated as by `statistics.over_trainings`.
    """
    here, shared = max(line.trainings, 1), line.shared_error**2
    own = max(here * (line.standard_error**2 - shared), 0.0)  # of a single training
    between = 0.0 if np.isnan(line.between_seeds) else line.between_seeds**2
    sampling = own - between if here == 1 else own if between < 0.99 * own else 0.0  # six digits
    trainings = np.sqrt(own) * generator.standard_normal((len(places), size))
    values = value + np.sqrt(shared) * places + trainings.mean(1)
    if size == 1:
        error = np.sqrt((shared + own) * generator.chisquare(line.df, len(places)) / line.df)
        return values, error, np.full(len(places), line.df)
    apart = np.maximum(trainings.var(1, ddof=1), sampling) / size
    return values, np.sqrt(shared + apart), satterthwaite(shared, line.df, apart, size - 1)


def _with_trainings(read_table: Callable, seeds: list[int]) -> Callable:
    """Return `read_table` with the rows of these seeds only in headline_places."""

    def tables(name: str) -> pd.DataFrame:
        table = read_table(name)
        return table[table.seed.isin(seeds)] if name == "headline_places" else table

    return tables


def of_sets(read_table: Callable, hosts: list[str], size: int) -> list[pd.DataFrame]:
    """Return the verdicts of as many disjoint sets of `size` trainings as headline_places.csv has."""
    seeds = sorted(read_table("headline_places").seed.unique())
    sets = [seeds[start : start + size] for start in range(0, len(seeds) - size + 1, size)]
    tables = (make_scorecard(_with_trainings(read_table, chosen), hosts, BY_PLACE) for chosen in sets)
    return [answered(table[table.counts]) for table in tables]


def agreement(pairs: pd.DataFrame) -> dict:
    """Return how often the verdicts of a pair differ, and how often one supports what the other contradicts.

    The interval of `differ` is a bootstrap over claims; stated: the expected share.
    """
    differ = (pairs.status != pairs.status_other).astype(float)
    low, high = cluster_bootstrap(differ, pairs.id + pairs.host)
    both = zip(pairs.status, pairs.status_other, strict=True)
    opposed = np.mean([set(verdicts) == {"supported", "contradicted"} for verdicts in both])
    row = dict(claims=len(pairs.drop_duplicates(["id", "host"])), pairs=len(pairs), differ=differ.mean())
    return row | dict(differ_low=low, differ_high=high, stated=1 - pairs.stated.mean(), opposed=opposed)


def calibration(pairs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean stated probability of the same verdict and its real share, per bin of the former."""
    bins = pd.cut(pairs.stated, BINS, include_lowest=True, labels=BINS[1:])
    same = (pairs.status == pairs.status_other).astype(float)
    groups = pairs.assign(up_to=bins, repeated=same).groupby("up_to", observed=True)
    columns = dict(n=("stated", "size"), stated=("stated", "mean"), repeated=("repeated", "mean"))
    return groups.agg(**columns).reset_index()


def check(read_table: Callable, hosts: list[str], seed: int, others: pd.DataFrame | None) -> tuple:
    """Return the tables verdict_repeats (per comparison) and verdict_calibration (per comparison and bin).

    kind: simulated or observed. simulated: for an observed comparison, the share of other verdicts that the
    simulation gives for its claims. others: repeats-scorecard.csv; seed: that of this run.
    """
    scorecard = read_table("scorecard")
    compared = {(named(*x), "simulated"): simulated(scorecard, *x) for x in product(SIZES, (False, True))}
    sets = {named(size, True): of_sets(read_table, hosts, size) for size in (1, 5)}
    if others is not None:
        sets[WHOLE] = by_seed(scorecard, seed, others)
    for name, runs in sets.items():
        if len(runs) > 1:
            pairs = pairs_of(runs)
            compared[name, "observed"] = pairs.assign(stated=pairs.repeat_probability)
    rows, bins = [], []
    for (name, kind), pairs in compared.items():
        row = dict(compared=name, kind=kind) | agreement(pairs) | dict(simulated=np.nan)
        if kind == "observed":
            twin = compared[named(1, False) if name == WHOLE else name, "simulated"]
            row["simulated"] = agreement(twin.merge(pairs[["id", "host"]].drop_duplicates()))["differ"]
        rows.append(row)
        bins.append(calibration(pairs).assign(compared=name, kind=kind))
    return pd.DataFrame(rows), pd.concat(bins, ignore_index=True)


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the comparisons for a reader, in percent of the verdicts."""
    columns = {"claims": rows.claims, "pairs": layout.numbers(rows.pairs, ",.0f")}
    columns |= {"differ (%)": layout.estimates(rows, "differ", digits=1)}
    columns |= {f"as {name} (%)": layout.numbers(rows[name], ".1f", 100) for name in ("stated", "simulated")}
    columns |= {"supported and contradicted (%)": layout.numbers(rows.opposed, ".2f", 100)}
    return layout.shown(rows, ["compared", "kind"], columns)


def misstated(bins: pd.DataFrame) -> pd.Series:
    """Return by how much the stated probabilities are off, in the mean over pairs, per comparison."""
    off = (bins.stated - bins.repeated).abs() * bins.n
    return off.groupby(bins.compared).sum() / bins.n.groupby(bins.compared).sum()
