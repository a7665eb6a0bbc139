"""The measures of the scorecard: our number for a claim, with its standard error.

Each public function is a measure of paper/criteria.yaml. It takes `tables` (tables(NAME) returns
results/PROFILE/NAME.csv), a host, and the arguments given there. It returns None if the host has no rows for
the claim, too few atoms, or too few edited heads. Measures of ratios return logarithms, those of R2 -log(1 - R2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.mixture import GaussianMixture
from statsmodels.stats.proportion import confint_proportions_2indep

from replication.classes import recurrence, registers
from replication.scorecard.claims import papers_table13
from replication.statistics import Estimate, beats, fit_mixture, over_trainings, rarely
from replication.study.stages import rows_with
from writesae.evaluate.firings import atom_names
from writesae.evaluate.shifts import PAPER_EPS

FEWEST_ATOMS = 5  # per class: an interval over fewer means nothing, so the claim is not asked
CHOICES = dict(target="state", amplitude="coefficient")  # those of the paper
MIDDLE = dict(place="middle", target="state")  # the SAEs of the paper's claims about atoms
RESAMPLES = 500
REFITS = 200  # resamples in which a mixture is fitted
WIDTH = 2 * stats.norm.ppf(0.975)  # of a 95% interval, in standard errors

Tables = Callable[[str], pd.DataFrame]


def _row(table: pd.DataFrame, **where) -> pd.Series:
    """Return the only row with these values. Raises KeyError unless there is exactly one."""
    rows = rows_with(table, **where)
    if len(rows) != 1:
        raise KeyError(f"{len(rows)} rows have {where}.")
    return rows.iloc[0]


def _mean(values, places: Sequence, atoms: Sequence | None = None) -> Estimate:
    return over_trainings(np.asarray(values, dtype=float), places, atoms, resamples=RESAMPLES)


def _over_atoms(statistic: Callable, part: pd.DataFrame, resamples: int = RESAMPLES) -> Estimate:
    """Return a statistic of row numbers when atoms are drawn, one per row; column `seed`: the training."""
    return over_trainings(statistic, None, range(len(part)), part.get("seed"), resamples)


# Rows of summary tables


def summary(tables: Tables, host: str, table: str, value: str, where: dict, **columns) -> Estimate | None:
    """Return the number in one row of a summary table; `columns` are those of `_of_row`."""
    rows = rows_with(tables(table), host=host, **where)
    return None if rows.empty else _of_row(_row(rows, host=host), value, **columns)


def _of_row(row: pd.Series, value: str, low="ci_low", high="ci_high", n=("n",), atoms=()) -> Estimate | None:
    """Return the estimate in these columns, or None if a count in `atoms` is low.

    The standard error is that of the interval's width; n: columns of the counts of units."""
    if any(row[name] < FEWEST_ATOMS for name in atoms):
        return None
    counts = [int(row[name]) for name in n]
    error = (row[high] - row[low]) / WIDTH
    return Estimate(float(row[value]), float(error), sum(counts) - len(counts), sum(counts))


def class_axis(tables: Tables, host: str, axis: str) -> Estimate | None:
    """Cliff's delta of registers against bundles on an axis of the paper's Table 17, over the drawn atoms."""
    counts = ["n_register", "n_bundle"]
    columns = dict(n=counts, atoms=counts, where=CHOICES | dict(axis=axis))
    return summary(tables, host, "population_axes", "cliffs_delta", **columns)


def contrast(tables: Tables, host: str, variant: str, quantity: str, place="middle") -> Estimate | None:
    """A variant of the state-trained SAE against the bilinear SAE of rank 1."""
    where = dict(target="state", variant=variant, quantity=quantity, place=place)
    found = summary(tables, host, "ablation_contrasts", "value", where)
    return _log(found) if found and quantity == "fvu_ratio" else found


def _log(estimate: Estimate) -> Estimate:
    """Return the logarithm of an estimate, by the delta method."""
    return estimate._replace(value=float(np.log(estimate.value)), error=estimate.error / estimate.value)


def logit_r2(tables: Tables, host: str, predictor: str, rank: int) -> Estimate | None:
    """Median R2 of a predictor over (atom, eps), for the token of a rank, as -log(1 - R2)."""
    found = summary(tables, host, "logit_shift_ranks", "r2_median", dict(predictor=predictor, rank=rank))
    rest = found and max(1 - found.value, 1e-6)  # tables have six digits
    return found and found._replace(value=float(-np.log(rest)), error=found.error / rest)


def sign_agreement(tables: Tables, host: str) -> Estimate:
    """Share of shifts with the sign of the paper's formula, with the error of as many trials as atoms."""
    part = rows_with(tables("logit_shift_summary"), host=host, predictor="paper")
    part = part[part.eps.isin(PAPER_EPS)]
    return _share(part.sign_agreement.mean(), int(part.n_fits.iloc[0]))


def _share(share: float, n: int) -> Estimate:
    """Return a share of n with its binomial error, or that of `rarely` for few with it or without it."""
    rarer = min(share, 1 - share)
    estimate = Estimate(float(rarer), float(np.sqrt(share * (1 - share) / n)), n - 1, n)
    return rarely(estimate, round(rarer * n), n)._replace(value=float(share))


# The replacement test, by position


def _places(tables: Tables, host: str, cells: str = "pooled") -> pd.DataFrame:
    part = rows_with(tables("headline_places"), host=host)
    return part if cells == "pooled" else part[part.place == cells]


def _over_places(values, part: pd.DataFrame) -> Estimate:
    """Return the mean of values, or a statistic of row numbers, over places and trainings.

    The places are drawn by passage. Atoms are not: another training has others."""
    return over_trainings(values, part.passage, trainings=part.seed, resamples=RESAMPLES)


def win_rate(tables: Tables, host: str, cells: str) -> Estimate | None:
    """Share of places at which the atom beats deletion. One cell is asked only of hosts with several."""
    part = _places(tables, host, cells)
    if part.empty or (cells != "pooled" and _places(tables, host).place.nunique() == 1):
        return None
    return _over_places(beats(part), part)


def kl_ratio(tables: Tables, host: str, control: str, median: str) -> Estimate:
    """Log KL of a control over the atom's: the ratio of their medians, or the median of their ratios."""
    part = _places(tables, host)
    atom, other = part.kl_atom.to_numpy(), part[f"kl_{control}"].to_numpy()

    def log_ratio(rows: np.ndarray) -> float:
        above, below = other[rows], atom[rows]
        return np.log(np.median(above / below) if median == "of_ratios" else np.median(above) / np.median(below))

    return _over_places(log_ratio, part)


def chains(tables: Tables, host: str) -> Estimate:
    """Share of places with KL(atom) < KL(deletion) < KL(random), minus that with the order reversed."""
    part = _places(tables, host)
    order = beats(part) & beats(part, "delete", "random")
    mirrored = beats(part, "random", "delete") & beats(part, "delete", "atom")
    return _over_places(order.astype(float) - mirrored, part)


def failures(tables: Tables, host: str) -> Estimate:
    """How much more the atom fails where KL(deletion) is low than where it is high, minus a random atom's.

    Low and high are the lowest and the highest quarter of the places."""
    part = _places(tables, host)
    deleted = part.kl_delete.to_numpy()
    worse = (beats(part, "random").astype(float) - beats(part)).to_numpy()  # than the random atom

    def gap(rows: np.ndarray) -> float:
        lowest, highest = np.quantile(deleted[rows], [0.25, 0.75])
        return worse[rows[deleted[rows] <= lowest]].mean() - worse[rows[deleted[rows] >= highest]].mean()

    return _over_places(gap, part)


def against_flat(tables: Tables, host: str) -> Estimate:
    """Win rate of the atom minus that of the flat SAE's top singular pair at matched norm, in points."""
    cell = _row(tables("cells"), host=host, place="middle")
    where = dict(layer=cell.layer, head=cell["head"], read="write", target="state", amplitude="matched_norm")
    part = rows_with(tables("replacement"), host=host, **where)
    gap = 100.0 * (beats(part).astype(float) - beats(part, "flat_svd"))
    return _mean(gap, part.passage, atom_names(part))


# Atoms and their classes


def _population(tables: Tables, host: str, atoms: str = "all") -> pd.DataFrame:
    part = rows_with(tables("population"), host=host, **CHOICES)
    return part if atoms == "all" else part[part["class"] == atoms]


def population(tables: Tables, host: str, atoms: str) -> Estimate | None:
    """Mean over the atoms of a class (or all) of their win rates."""
    part = _population(tables, host, atoms)
    rates = part.win_rate.to_numpy()
    return _over_atoms(lambda rows: rates[rows].mean(), part) if len(part) >= FEWEST_ATOMS else None


def class_difference(tables: Tables, host: str) -> Estimate | None:
    """Mean win rate of registers minus that of bundles."""
    sides = [_population(tables, host, name).win_rate for name in ("register", "bundle")]
    return _difference_of_means(*sides) if min(map(len, sides)) >= FEWEST_ATOMS else None


def _difference_of_means(a: pd.Series, b: pd.Series) -> Estimate:
    """Return mean(a) - mean(b) with Welch's standard error and degrees of freedom."""
    result = stats.ttest_ind(a, b, equal_var=False)
    gap = a.mean() - b.mean()
    error = np.sqrt(a.var() / len(a) + b.var() / len(b))
    return Estimate(float(gap), float(error), float(result.df), len(a) + len(b))


def cosine_correlation(tables: Tables, host: str) -> Estimate:
    """Pearson's r, over atoms, of the cosine to the native write with the win rate."""
    part = _population(tables, host)
    pairs = part[["cosine", "win_rate"]].to_numpy()
    return _over_atoms(lambda rows: np.corrcoef(pairs[rows].T)[0, 1], part)


def lowest_bin(tables: Tables, host: str) -> Estimate | None:
    """The lowest win rate of the paper's cosine bins that have enough atoms, found anew in every resample."""
    atom = ["host", "layer", "head", "target", "atom"]
    alive = tables("alive_atoms")[[*atom, "cosine"]].rename(columns=dict(cosine="atom_cosine"))
    part = _population(tables, host).merge(alive, on=atom)
    bins = np.digitize(part.atom_cosine, papers_table13().cosine_low[1:])
    kept = np.flatnonzero(np.bincount(bins) >= FEWEST_ATOMS)
    wins, firings = (part.win_rate * part.firings).to_numpy(), part.firings.to_numpy()

    def lowest(rows: np.ndarray) -> float:
        parts = (rows[bins[rows] == name] for name in kept)
        return min(wins[part].sum() / firings[part].sum() for part in parts if len(part))

    return _over_atoms(lowest, part) if len(kept) else None


def alive_share(tables: Tables, host: str) -> Estimate:
    """Alive atoms as a share of all atoms."""
    row = _row(tables("atom_partition"), host=host, role="main", **MIDDLE)
    return _share(row.alive / row.n_atoms, int(row.n_atoms))


def _alive(tables: Tables, host: str) -> pd.DataFrame:
    """Return the alive atoms of all trainings of the paper's SAE that atoms.csv has."""
    part = rows_with(tables("atoms"), host=host, **MIDDLE)
    return part[part.role.str.fullmatch(r"main(-mean-\d+)?")]


@cache
def _mixture(cosines: bytes, components: int) -> GaussianMixture:
    return fit_mixture(np.frombuffer(cosines)[:, None], components, 0)


def _registers(cosines: np.ndarray) -> np.ndarray:
    """Return which atoms are registers by the mixture of these cosines, which is fitted once per sample."""
    return registers(cosines, _mixture(cosines.tobytes(), 2))


def class_share(tables: Tables, host: str, of: str) -> Estimate:
    """Registers (or bundles) as a share of the alive atoms."""
    part = _alive(tables, host)
    cosines = part.cosine.to_numpy()
    return _over_atoms(lambda rows: (_registers(cosines[rows]) == (of == "register")).mean(), part, REFITS)


def mixture_gain(tables: Tables, host: str) -> Estimate:
    """BIC of the mixture of two Gaussians minus that of one, for the cosines of the alive atoms."""
    part = _alive(tables, host)
    cosines = part.cosine.to_numpy()

    def gain(rows: np.ndarray) -> float:
        sample = cosines[rows]
        one, two = (_mixture(sample.tobytes(), count).bic(sample[:, None]) for count in (1, 2))
        return two - one

    return _over_atoms(gain, part, REFITS)


def busiest_register(tables: Tables, host: str) -> Estimate | None:
    """Share of held-out tokens at which the most frequent register fires."""
    part = _alive(tables, host)
    cosines, rates = part.cosine.to_numpy(), part.rate.to_numpy()
    if not _registers(cosines).any():
        return None
    return _over_atoms(lambda rows: rates[rows][_registers(cosines[rows])].max(initial=0), part, REFITS)


def _register_cosine(part: pd.DataFrame) -> Estimate | None:
    """Return the median cosine of an SAE's registers to the native write; None if they are few."""
    cosines = part.cosine.to_numpy()
    if _registers(cosines).sum() < FEWEST_ATOMS:
        return None
    return _over_atoms(lambda rows: np.median(cosines[rows][_registers(cosines[rows])]), part, REFITS)


def _gap(one: Estimate | None, other: Estimate | None) -> Estimate | None:
    """Return the difference of two independent estimates."""
    if one is None or other is None:
        return None
    error, df = np.hypot(one.error, other.error), min(one.df, other.df)
    return Estimate(one.value - other.value, float(error), df, one.n + other.n)


def register_gap(tables: Tables, host: str, other: str) -> Estimate | None:
    """Median cosine of registers to the native write minus that of another host (its family or path)."""
    hosts = tables("hosts")
    others = hosts[((hosts.family == other) | (hosts.path == other)) & (hosts.host != host)].host
    if len(others) != 1:
        return None
    return _gap(*(_register_cosine(_alive(tables, name)) for name in (host, others.iloc[0])))


def variant_gap(tables: Tables, host: str, variant: str, other: str) -> Estimate | None:
    """Median cosine of registers to the native write of one ablated SAE minus that of another."""
    part = rows_with(tables("ablation_atoms"), host=host, **MIDDLE)
    sides = [part[part.variant == name] for name in (variant, other)]
    return None if min(map(len, sides)) == 0 else _gap(*map(_register_cosine, sides))


def recurring(tables: Tables, host: str) -> Estimate | None:
    """Share of (alive atom, other seed) pairs with a cosine above 0.9 in that seed's SAE."""
    part = rows_with(tables("atom_matches"), host=host, target="state")
    if part.empty:
        return None
    found = recurrence(part)
    return found if found.value else rarely(found, 0, found.n)


def threshold_ratio(tables: Tables, host: str) -> Estimate:
    """Log of the number of registers at a threshold of 0.02 over that at 0.10."""
    part = _alive(tables, host)
    cosines = part.cosine.to_numpy()

    def ratio(rows: np.ndarray) -> float:
        low, high = ((cosines[rows] >= tau).sum() for tau in (0.02, 0.10))
        return np.log(max(1, low) / max(1, high))

    return _over_atoms(ratio, part)


def alive_by_k(tables: Tables, host: str) -> Estimate | None:
    """Share of alive atoms at the largest k minus that at the smallest, with Newcombe's error."""
    part = rows_with(tables("atom_partition"), host=host, target="state")
    part = part[part.role != "main"].sort_values("k")
    if part.k.nunique() < 2:
        return None
    shared = set.intersection(*part.groupby("k").seed.apply(set))
    part = part[part.seed == min(shared)]  # the one seed that every k was trained with
    few, many = ((int(row.alive), int(row.n_atoms)) for row in (part.iloc[0], part.iloc[-1]))
    low, high = confint_proportions_2indep(*many, *few, method="newcomb")
    n = many[1] + few[1]
    return Estimate(many[0] / many[1] - few[0] / few[1], float(high - low) / WIDTH, n - 2, n)


def heads(tables: Tables, host: str) -> Estimate | None:
    """Mean over the heads of a layer of the win rate, with Student's error over heads."""
    rates = rows_with(tables("heads"), host=host, **CHOICES).win_rate
    if rates.empty:
        return None
    return Estimate(float(rates.mean()), float(rates.sem()), len(rates) - 1, len(rates))


def sigma_decrease(tables: Tables, host: str) -> Estimate | None:
    """Mean log sigma1/sigma2 of all heads of the early cell's layer minus that of the late cell's layer."""
    cells, chosen = (rows_with(tables(name), host=host) for name in ("all_cells", "cells"))
    layers = chosen.set_index("place").layer
    if not {"early", "late"} <= set(layers.index):
        return None
    sides = (np.log(cells[cells.layer == layers[place]].sigma1_over_sigma2) for place in ("early", "late"))
    return _difference_of_means(*sides)


# Edits, newlines and the install


def _erased(tables: Tables, host: str, condition: str) -> pd.Series:
    """Return the rise of the loss per passage, in bits per token."""
    part = rows_with(tables("register_erase"), host=host, target="state", condition=condition)
    return part.set_index("window").rise


def erased_registers(tables: Tables, host: str) -> Estimate | None:
    """Rise of the loss by deletion at all register firings, as a share of what no writes in the cell cost.

    None if no writes cost nothing certain. The error is that of a ratio of independent estimates."""
    cell = _row(tables("cells"), host=host, place="middle")
    if cell.cost_low <= 0:
        return None
    rise = _erased(tables, host, "delete") * np.log(2)
    found = _mean(rise, rise.index)
    share, spread = found.value / cell.cost, (cell.cost_high - cell.cost_low) / WIDTH
    error = np.hypot(found.error, share * spread) / cell.cost
    return found._replace(value=float(share), error=float(error), shared=float(error))


def random_excess(tables: Tables, host: str) -> Estimate:
    """Loss of matched-norm random writes at all register firings minus that of deletion, nats per token."""
    excess = (_erased(tables, host, "random") - _erased(tables, host, "delete")) * np.log(2)
    return _mean(excess, excess.index)


def erased(tables: Tables, host: str, where: str, condition: str, dose: float) -> Estimate | None:
    """Median change of log p of the atoms' preferred tokens, which were found in other text."""
    chosen = dict(target="state", token_from="other", where=where, condition=condition, dose=dose)
    part = rows_with(tables("cache_erase"), host=host, **chosen)
    if part.atom.nunique() < FEWEST_ATOMS:
        return None
    change = part.change.to_numpy()
    return over_trainings(lambda rows: np.median(change[rows]), part.passage, part.atom, resamples=RESAMPLES)


def raised(tables: Tables, host: str) -> Estimate:
    """Share of single writes along the paper's direction that raise the target's logit."""
    part = rows_with(tables("single_write"), host=host, direction="paper")
    return _mean(part.measured > 0, part.passage)


def _trials(tables: Tables, host: str, targets: str, magnitude: float = 3.0) -> pd.DataFrame:
    part = rows_with(tables("install"), host=host, direction="paper", magnitude=magnitude)
    part = part if targets == "all" else part[part.target_class == targets]
    return part.sort_values(["prompt", "position", "target"])


def _change(change, prompts: pd.Series) -> Estimate:
    """Return the mean of inclusion, or of its change, by prompt, with the error of `rarely`."""
    by_prompt = pd.Series(np.asarray(change, dtype=float)).groupby(prompts.to_numpy())
    affected = by_prompt.mean()[by_prompt.apply(np.any)].abs()
    return rarely(_mean(change, prompts), len(affected), len(by_prompt), affected.mean() if len(affected) else 1.0)


def installed(tables: Tables, host: str, targets: str) -> Estimate:
    """Inclusion at 3x with the paper's direction minus native inclusion, paired."""
    part = _trials(tables, host, targets)
    return _change(part.included_edited - part.included_native, part.prompt)


def native_inclusion(tables: Tables, host: str) -> Estimate:
    """Share of targets of native rank 101 to 1,000 that come without an edit."""
    part = _trials(tables, host, "middle")
    return _change(part.included_native, part.prompt)


def saturation(tables: Tables, host: str) -> Estimate:
    """Inclusion at 3x minus inclusion at 6x, with the paper's direction, paired."""
    three, six = (_trials(tables, host, "all", magnitude) for magnitude in (3.0, 6.0))
    return _change(three.included_edited.to_numpy() - six.included_edited.to_numpy(), three.prompt)


def _in_all_cells(tables: Tables, host: str, targets: str, **where) -> pd.DataFrame:
    """Return the trials of native-sized writes in all cells, without delays, of a class or of several."""
    part = rows_with(tables("install_cells"), host=host, cells="all", delayed=False, **where)
    out_of_context = part.target_class.isin(["frequent", "rare", "semantic"])
    of_several = dict(all=~out_of_context, out_of_context=out_of_context)
    return part[of_several.get(targets, part.target_class == targets)]


def in_all_cells(
    tables: Tables, host: str, of: str, targets: str, direction: str = "layerwise", writes: int = 3
) -> Estimate:
    """Share of targets that writes in all cells raise or include, or the paired change of inclusion."""
    part = _in_all_cells(tables, host, targets, direction=direction, magnitude=1.0, writes=writes)
    if of == "change":
        return _change(part.included_edited - part.included_native, part.prompt)
    happened = part.first_step_lift > 0 if of == "raised" else part.included_edited == 1
    rarer = happened if happened.mean() <= 0.5 else ~happened
    return _change(rarer, part.prompt)._replace(value=float(happened.mean()))


def saturation_in_all_cells(tables: Tables, host: str) -> Estimate | None:
    """Share of targets that come next at 1x minus that at 3x, writes in all cells, paired."""
    where = dict(direction="layerwise", writes=3)
    one, three = (_in_all_cells(tables, host, "all", magnitude=x, **where) for x in (1.0, 3.0))
    if three.empty:
        return None
    trial = ["prompt", "target", "distance"]
    both = one.merge(three, on=[*trial, "target_class"], suffixes=("_one", "_three"))
    come = both.edited_rank_one.eq(1).astype(int) - both.edited_rank_three.eq(1)
    return _change(come, both.prompt)


def _newlines(tables: Tables, host: str, **where) -> pd.Series:
    return rows_with(tables("newlines"), host=host, **where).set_index("prompt").newlines


def newlines(tables: Tables, host: str) -> Estimate:
    """Newlines per 400 tokens without an edit."""
    baseline = _newlines(tables, host, role="baseline")
    return _mean(baseline, baseline.index)


def newline_change(tables: Tables, host: str) -> Estimate | None:
    """Newlines per 400 tokens at 5x in every head of a layer minus those without; None for one head."""
    where = dict(mode="kept", role="boundary", dose=5.0)
    if rows_with(tables("newlines"), host=host, **where)["heads"].max() < 2:
        return None
    edited = _newlines(tables, host, **where)
    change = edited - _newlines(tables, host, role="baseline")
    return _mean(change, change.index)


MEASURES = {name: x for name, x in list(globals().items()) if inspect.isfunction(x) and name[0] != "_"}
MEASURES = {name: function for name, function in MEASURES.items() if function.__module__ == __name__}
