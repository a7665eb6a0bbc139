"""The measures of the scorecard: our number for a claim, with its interval and count.

Each public function is a measure of paper/criteria.yaml. It takes `tables` (tables(NAME) returns
results/PROFILE/NAME.csv), a host, and the arguments given there. It returns None if the host has no rows for
the claim, or too few atoms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep

from replication.statistics import beats, cluster_bootstrap, pearson, wider, wilson
from replication.study.stages import rows_with
from writesae.evaluate.firings import atom_names
from writesae.evaluate.shifts import PAPER_EPS

FEWEST_ATOMS = 5  # per class: an interval over fewer means nothing, so the claim is "not run"
CHOICES = dict(target="state", amplitude="coefficient")  # those of the paper
MIDDLE = dict(place="middle", target="state", role="main")  # the SAE of the paper's claims

Tables = Callable[[str], pd.DataFrame]


class Answer(NamedTuple):
    """Our number for a claim, with its 95% interval and count."""

    value: float
    low: float
    high: float
    n: int


def _row(table: pd.DataFrame, **where) -> pd.Series:
    """Return the only row with these values. Raises KeyError unless there is exactly one."""
    rows = rows_with(table, **where)
    if len(rows) != 1:
        raise KeyError(f"{len(rows)} rows have {where}.")
    return rows.iloc[0]


def _bootstrapped(values, clusters, statistic=np.mean, resamples: int = 1000) -> Answer:
    values = np.asarray(values, dtype=float)
    return Answer(statistic(values), *cluster_bootstrap(values, clusters, statistic, resamples), len(values))


def _by_atom_and_passage(values, part: pd.DataFrame, statistic=np.mean, resamples: int = 500) -> Answer:
    """Return a statistic over firings with the wider of the bootstraps by atom and by passage."""
    by = [_bootstrapped(values, x, statistic, resamples) for x in (atom_names(part), part.passage)]
    return Answer(by[0].value, *wider(*by), len(part))


def _difference_of_means(a: pd.Series, b: pd.Series) -> Answer:
    gap, reach = a.mean() - b.mean(), 1.96 * np.sqrt(a.var() / len(a) + b.var() / len(b))
    return Answer(gap, gap - reach, gap + reach, len(a) + len(b))


# Rows of summary tables


def summary(tables: Tables, host: str, table: str, value: str, where: dict, **columns) -> Answer | None:
    """Return the numbers in one row of a summary table; `columns` are those of `_answer`."""
    rows = rows_with(tables(table), host=host, **where)
    return None if rows.empty else _answer(_row(rows, host=host), value, **columns)


def _answer(row: pd.Series, value: str, low="ci_low", high="ci_high", n="n", atoms=()) -> Answer | None:
    """Return the Answer in these columns (the sum of several n), or None if a count in `atoms` is low."""
    enough = all(row[name] >= FEWEST_ATOMS for name in atoms)
    return Answer(row[value], row[low], row[high], np.sum(row[n])) if enough else None


def win_rate(tables: Tables, host: str, cells: str) -> Answer | None:
    """Win rate of the atom over deletion, with the wider of the bootstraps by atom and by passage."""
    rows = rows_with(tables("replacement_summary"), host=host, cells=cells)
    if rows.empty:
        return None
    row = _row(rows, read="write", **CHOICES)
    low, high = min(row.boot_low, row.passage_low), max(row.boot_high, row.passage_high)
    return Answer(row.win_rate, low, high, row.n)


def population(tables: Tables, host: str, atoms: str) -> Answer | None:
    """Mean over the atoms of a class (or all) of their win rates."""
    columns = dict(n="n_atoms", atoms=["n_atoms"], where=CHOICES | {"class": atoms})
    return summary(tables, host, "population_summary", "mean_win_rate", **columns)


def class_axis(tables: Tables, host: str, axis: str) -> Answer | None:
    """Cliff's delta of registers against bundles on an axis of the paper's Table 17, over the drawn atoms."""
    counts = ["n_register", "n_bundle"]
    columns = dict(n=counts, atoms=counts, where=CHOICES | dict(axis=axis))
    return summary(tables, host, "population_axes", "cliffs_delta", **columns)


def lowest_bin(tables: Tables, host: str) -> Answer | None:
    """The lowest win rate of the cosine bins that have enough atoms."""
    part = rows_with(tables("population_by_cosine"), host=host, **CHOICES)
    part = part[part.n_atoms >= FEWEST_ATOMS]
    return None if part.empty else _answer(part.loc[part.win_rate.idxmin()], "win_rate", n="n_firings")


def contrast(tables: Tables, host: str, variant: str, quantity: str, place: str = "middle") -> Answer | None:
    """A variant of the state-trained SAE against the bilinear SAE of rank 1."""
    where = dict(target="state", variant=variant, quantity=quantity, place=place)
    return summary(tables, host, "ablation_contrasts", "value", where)


# The replacement test


def _firings(tables: Tables, host: str, **where) -> pd.DataFrame:
    return rows_with(tables("replacement"), host=host, read="write", **CHOICES | where)


def strict_chain(tables: Tables, host: str) -> Answer:
    """Share of firings with KL(atom) < KL(deletion) < KL(random)."""
    part = _firings(tables, host)
    return _by_atom_and_passage(beats(part) & beats(part, "delete", "random"), part)


def median_of_ratios(tables: Tables, host: str, control: str) -> Answer:
    """Median over firings of the KL of a control over the atom's."""
    part = _firings(tables, host)
    return _by_atom_and_passage(part[f"kl_{control}"] / part.kl_atom, part, np.median)


def ratio_of_medians(tables: Tables, host: str, control: str) -> Answer:
    """Median KL of a control over the median KL of the atom, bootstrap by passage."""
    part = _firings(tables, host)
    atom, other = part.kl_atom.to_numpy(), part[f"kl_{control}"].to_numpy()

    def ratio(rows: np.ndarray) -> float:
        return np.median(other[rows]) / np.median(atom[rows])

    interval = cluster_bootstrap(ratio, part.passage, resamples=500, draw="integers")
    return Answer(ratio(slice(None)), *interval, len(part))


def failure_gap(tables: Tables, host: str) -> Answer:
    """Failure rate in the lowest quartile of KL(deletion) minus that in the highest."""
    part = _firings(tables, host)
    failed, quartile = part.kl_atom >= part.kl_delete, pd.qcut(part.kl_delete, 4, labels=False)
    return _difference_of_means(failed[quartile == 0], failed[quartile == 3])


def against_flat(tables: Tables, host: str) -> Answer:
    """Win rate of the atom minus that of the flat SAE's top singular pair at matched norm, in points."""
    cell = _row(tables("cells"), host=host, place="middle")
    part = _firings(tables, host, layer=cell.layer, head=cell["head"], amplitude="matched_norm")
    gap = 100.0 * (beats(part).astype(float) - beats(part, "flat_svd"))
    by = [_bootstrapped(gap, clusters) for clusters in (part.atom, part.passage)]
    return Answer(by[0].value, *wider(*by), len(part))


# Atoms and their classes


def class_difference(tables: Tables, host: str) -> Answer | None:
    """Mean win rate of registers minus that of bundles."""
    part = rows_with(tables("population"), host=host, **CHOICES)
    registers, bundles = (part[part["class"] == name].win_rate for name in ("register", "bundle"))
    enough = min(len(registers), len(bundles)) >= FEWEST_ATOMS
    return _difference_of_means(registers, bundles) if enough else None


def cosine_correlation(tables: Tables, host: str) -> Answer:
    """Pearson's r, over atoms, of the cosine to the native write with the win rate."""
    part = rows_with(tables("population"), host=host, **CHOICES)
    value, low, high, _, n = pearson(part.cosine, part.win_rate)
    return Answer(value, low, high, n)


def register_cosine(tables: Tables, host: str) -> Answer | None:
    """Median over register atoms of their median cosine to the native write."""
    part = rows_with(tables("alive_atoms"), host=host, target="state", **{"class": "register"})
    return _bootstrapped(part.cosine, part.atom, np.median) if len(part) >= FEWEST_ATOMS else None


def class_share(tables: Tables, host: str, of: str, among: str) -> Answer:
    """One count of atoms as a share of another (columns of atom_partition), with Wilson's interval."""
    row = _row(tables("atom_partition"), host=host, **MIDDLE)
    return Answer(row[of] / row[among], *wilson(int(row[of]), int(row[among])), row[among])


def busiest_register(tables: Tables, host: str) -> Answer | None:
    """Share of held-out tokens at which the most frequent register fires, with Wilson's interval."""
    part = rows_with(tables("atoms"), host=host, **MIDDLE, **{"class": "register"})
    if part.empty:
        return None
    row = part.loc[part.firings.idxmax()]
    scanned = round(row.firings / row.rate)
    return Answer(row.rate, *wilson(int(row.firings), scanned), scanned)


def threshold_ratio(tables: Tables, host: str) -> Answer:
    """Registers at a threshold of 0.02 over those at 0.10, bootstrap over atoms."""

    def ratio(cosines: np.ndarray) -> float:
        return (cosines >= 0.02).sum() / max(1, (cosines >= 0.10).sum())

    cosines = rows_with(tables("atoms"), host=host, **MIDDLE).cosine
    return _bootstrapped(cosines, range(len(cosines)), ratio)


def alive_by_k(tables: Tables, host: str) -> Answer | None:
    """Share of alive atoms at the largest k minus that at the smallest, with Newcombe's interval."""
    part = rows_with(tables("atom_partition"), host=host, target="state")
    part = part[part.role != "main"].sort_values("k")
    if part.k.nunique() < 2:
        return None
    shared = set.intersection(*part.groupby("k").seed.apply(set))
    part = part[part.seed == min(shared)]  # the one seed that every k was trained with
    few, many = ((int(row.alive), int(row.n_atoms)) for row in (part.iloc[0], part.iloc[-1]))
    interval = confint_proportions_2indep(*many, *few, method="newcomb")
    return Answer(many[0] / many[1] - few[0] / few[1], *interval, many[1] + few[1])


def sigma_decrease(tables: Tables, host: str) -> Answer | None:
    """Mean log sigma1/sigma2 of all heads of the early cell's layer minus that of the late cell's layer."""
    cells, chosen = (rows_with(tables(name), host=host) for name in ("all_cells", "cells"))
    layers = chosen.set_index("place").layer
    if not {"early", "late"} <= set(layers.index):
        return None
    sides = (np.log(cells[cells.layer == layers[place]].sigma1_over_sigma2) for place in ("early", "late"))
    return _difference_of_means(*sides)


# Logit shifts and the install


def logit_r2(tables: Tables, host: str, predictor: str) -> Answer:
    """Median R2 of a predictor over (atom, eps), for the eps of the paper; bootstrap over atoms."""
    part = rows_with(tables("logit_shift"), host=host, predictor=predictor)
    part = part[part.eps.isin(PAPER_EPS)]
    return _bootstrapped(part.r2, part.atom, np.median, resamples=500)


def sign_agreement(tables: Tables, host: str) -> Answer:
    """Share of shifts that have the sign of the paper's formula, with Wilson's interval."""
    part = rows_with(tables("logit_shift_summary"), host=host, predictor="paper")
    part = part[part.eps.isin(PAPER_EPS)]
    n = int(part.n_fits.iloc[0] * part.n_prompts.iloc[0])
    agree = round(part.sign_agreement.mean() * n)
    return Answer(agree / n, *wilson(agree, n), n)


def _trials(tables: Tables, host: str, targets: str, magnitude: float = 3.0) -> pd.DataFrame:
    part = rows_with(tables("install"), host=host, direction="paper", magnitude=magnitude)
    return part if targets == "all" else part[part.target_class == targets]


def installed(tables: Tables, host: str, targets: str) -> Answer:
    """Inclusion at 3x with the paper's direction minus native inclusion, paired, bootstrap by prompt."""
    part = _trials(tables, host, targets)
    return _bootstrapped(part.included_edited - part.included_native, part.prompt)


def native_inclusion(tables: Tables, host: str) -> Answer:
    """Share of targets of native rank 101 to 1,000 that come without an edit, bootstrap by prompt."""
    part = _trials(tables, host, "middle")
    return _bootstrapped(part.included_native, part.prompt)


def saturation(tables: Tables, host: str) -> Answer:
    """Inclusion at 3x minus inclusion at 6x, with the paper's direction, bootstrap by prompt."""
    order = ["prompt", "position", "target"]
    three, six = (_trials(tables, host, "all", magnitude).sort_values(order) for magnitude in (3.0, 6.0))
    change = three.included_edited.to_numpy(dtype=float) - six.included_edited.to_numpy(dtype=float)
    return _bootstrapped(change, three.prompt)


MEASURES = {name: x for name, x in list(globals().items()) if inspect.isfunction(x) and name[0] != "_"}
MEASURES = {name: function for name, function in MEASURES.items() if function.__module__ == __name__}
