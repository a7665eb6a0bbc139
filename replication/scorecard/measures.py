"""What the scorecard measures: our number for a claim, with its interval and count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep

from replication.statistics import cluster_bootstrap, pearson, wilson
from replication.study.stages import rows_with
from writesae.evaluate.firings import atom_names

FEWEST_ATOMS = 5  # of a class, below which no interval over its atoms means anything: such a claim counts as not run


@dataclass(frozen=True)
class Answer:
    """Our number for a claim, with its interval and count."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Rule:
    """How a claim is answered. measure(tables, host) gives the Answer, or None where the host was not asked; the claim's
    direction is that of `claimed` ("above" or "below") against `indifference`; "equal" means the claim is that there is
    no difference. A claim about one architecture names its `family` and is asked of hosts of that family only; a claim about
    one size of it names the `model`, the path that hosts.csv has."""

    criterion: str
    notebook: str
    indifference: float
    claimed: str
    measure: Callable[[dict[str, pd.DataFrame], str], Answer | None]
    family: str = ""
    model: str = ""

    def asks(self, host: pd.Series) -> bool:
        """Whether the claim is about the host of this line of hosts.csv."""
        return self.family in ("", host.family) and self.model in ("", host.path)


# What is measured.


def _row(table: pd.DataFrame, **where) -> pd.Series:
    """The only row with these values. Raises KeyError where there is none or more than one."""
    found = rows_with(table, **where)
    if len(found) != 1:
        raise KeyError(f"{len(found)} rows have {where}.")
    return found.iloc[0]


PAPERS = dict(target="state", amplitude="coefficient", read="write")  # the paper's own choices


def win_rate(cells: str) -> Callable:
    def measure(tables, host) -> Answer | None:
        table = tables["replacement_summary"]
        if not ((table.host == host) & (table.cells == cells)).any():
            return None
        row = _row(table, host=host, cells=cells, **PAPERS)
        return Answer(row.win_rate, min(row.boot_low, row.passage_low), max(row.boot_high, row.passage_high), row.n)

    return measure


def _papers_firings(tables, host) -> pd.DataFrame:
    return rows_with(tables["replacement"], host=host, **PAPERS)


def per_firing(values: Callable[[pd.DataFrame], pd.Series], statistic=np.mean) -> Callable:
    """A statistic over the paper's-choice firings, with the wider of the bootstraps by atom and by passage."""

    def measure(tables, host) -> Answer:
        part = _papers_firings(tables, host)
        found = values(part).to_numpy(dtype=float)
        by = [cluster_bootstrap(found, c, statistic=statistic, resamples=500) for c in (atom_names(part), part.passage)]
        return Answer(float(statistic(found)), min(b.low for b in by), max(b.high for b in by), len(part))

    return measure


def ratio_of_medians(other: str) -> Callable:
    """log ratio of the median KL of a condition over the atom's, resampled by passage."""

    def measure(tables, host) -> Answer:
        part = _papers_firings(tables, host)
        atom, control = part.kl_atom.to_numpy(), part[f"kl_{other}"].to_numpy()
        codes = np.unique(part.passage, return_inverse=True)[1]
        groups = [np.flatnonzero(codes == c) for c in range(codes.max() + 1)]
        generator = np.random.default_rng(0)
        ratios = []
        for _ in range(500):
            drawn = np.concatenate([groups[c] for c in generator.integers(0, len(groups), len(groups))])
            ratios.append(np.median(control[drawn]) / np.median(atom[drawn]))
        return Answer(float(np.median(control) / np.median(atom)), *np.quantile(ratios, [0.025, 0.975]), len(part))

    return measure


def failure_gap(tables, host) -> Answer:
    """Failure rate in the lowest quartile of KL(delete) less that in the highest."""
    part = _papers_firings(tables, host)
    quartile = pd.qcut(part.kl_delete, 4, labels=False)
    fail = part.kl_atom >= part.kl_delete
    low, high = fail[quartile == 0], fail[quartile == 3]
    reach = 1.96 * np.sqrt(low.var() / len(low) + high.var() / len(high))
    gap = low.mean() - high.mean()
    return Answer(gap, gap - reach, gap + reach, len(low) + len(high))


def population(name: str) -> Callable:
    def measure(tables, host) -> Answer | None:
        where = {"host": host, "target": "state", "amplitude": "coefficient", "class": name}
        found = rows_with(tables["population_summary"], **where)
        if found.empty or found.iloc[0].n_atoms < FEWEST_ATOMS:
            return None
        row = found.iloc[0]
        return Answer(row.mean_win_rate, row.ci_low, row.ci_high, row.n_atoms)

    return measure


def _papers_atoms(tables, host) -> pd.DataFrame:
    table = tables["population"]
    return table[(table.host == host) & (table.target == "state") & (table.amplitude == "coefficient")]


def class_difference(tables, host) -> Answer | None:
    """Mean win rate of registers less that of bundles."""
    part = _papers_atoms(tables, host)
    a, b = (part[part["class"] == name].win_rate for name in ("register", "bundle"))
    if min(len(a), len(b)) < FEWEST_ATOMS:
        return None
    reach = 1.96 * np.sqrt(a.var() / len(a) + b.var() / len(b))
    return Answer(a.mean() - b.mean(), a.mean() - b.mean() - reach, a.mean() - b.mean() + reach, len(part))


def cosine_correlation(tables, host) -> Answer:
    part = _papers_atoms(tables, host)
    found = pearson(part.cosine, part.win_rate)
    return Answer(found.value, found.low, found.high, found.n)


def logit_r2(predictor: str) -> Callable:
    def measure(tables, host) -> Answer:
        table = tables["logit_shift"]
        part = table[(table.host == host) & (table.predictor == predictor)]
        low, high = cluster_bootstrap(part.r2.to_numpy(), part.atom.to_numpy(), statistic=np.median, resamples=500)
        return Answer(part.r2.median(), low, high, len(part))

    return measure


def sign_agreement(tables, host) -> Answer:
    table = tables["logit_shift_summary"]
    part = table[(table.host == host) & (table.predictor == "paper")]
    n = int(part.n_fits.iloc[0] * part.n_prompts.iloc[0])
    wins = round(part.sign_agreement.mean() * n)
    return Answer(wins / n, *wilson(wins, n), n)


def installed(target_class: str, magnitude: float = 3.0) -> Callable:
    """Inclusion under the paper's direction less native inclusion, paired over trials, resampled by prompt."""

    def measure(tables, host) -> Answer:
        part = _trials(tables, host, target_class, magnitude)
        change = (part.included_edited - part.included_native).to_numpy(dtype=float)
        low, high = cluster_bootstrap(change, part.prompt.to_numpy(), resamples=1000)
        return Answer(change.mean(), low, high, len(part))

    return measure


def _trials(tables, host, target_class: str, magnitude: float) -> pd.DataFrame:
    table = tables["install"]
    where = (table.host == host) & (table.direction == "paper") & (table.magnitude == magnitude)
    return table[where & ((table.target_class == target_class) | (target_class == "all"))]


def lift(tables, host) -> Answer:
    part = _trials(tables, host, "all", 3.0)
    low, high = cluster_bootstrap(part.first_step_lift, part.prompt, statistic=np.median, resamples=500)
    return Answer(part.first_step_lift.median(), low, high, len(part))


def saturation(tables, host) -> Answer:
    """Inclusion at the middle magnitude less that at the largest, with the paper's direction."""
    large, middle = (_trials(tables, host, "all", m).sort_values(["prompt", "position", "target"]) for m in (6.0, 3.0))
    change = middle.included_edited.to_numpy(dtype=float) - large.included_edited.to_numpy(dtype=float)
    low, high = cluster_bootstrap(change, middle.prompt.to_numpy(), resamples=1000)
    return Answer(change.mean(), low, high, len(change))


def sigma_falls(tables, host) -> Answer | None:
    """log of the ratio of sigma1/sigma2, all heads of the early cell's layer over all heads of the late one's."""
    cells, chosen = (table[table.host == host] for table in (tables["all_cells"], tables["cells"]))
    layers = chosen.set_index("place").layer
    if not {"early", "late"} <= set(layers.index):
        return None
    early, late = (np.log(cells[cells.layer == layers[place]].sigma1_over_sigma2) for place in ("early", "late"))
    gap, error = early.mean() - late.mean(), np.sqrt(early.var() / len(early) + late.var() / len(late))
    return Answer(gap, gap - 1.96 * error, gap + 1.96 * error, len(early) + len(late))


def register_cosine(tables, host) -> Answer | None:
    """Median over register atoms of their median cosine to the native write."""
    table = tables["alive_atoms"]
    part = table[(table.host == host) & (table.target == "state") & (table["class"] == "register")]
    if len(part) < FEWEST_ATOMS:
        return None
    low, high = cluster_bootstrap(part.cosine.to_numpy(), part.atom.to_numpy(), statistic=np.median, resamples=1000)
    return Answer(part.cosine.median(), low, high, len(part))


def against_flat(tables, host) -> Answer:
    """Win rate of the atom less that of the flat SAE's top singular pair at matched norm, middle cell, in points."""
    cell = _row(tables["cells"], host=host, place="middle")
    where = dict(host=host, layer=cell.layer, head=cell["head"]) | PAPERS | dict(amplitude="matched_norm")
    part = rows_with(tables["replacement"], **where)
    gap = 100.0 * ((part.kl_atom < part.kl_delete).astype(float) - (part.kl_flat_svd < part.kl_delete))
    by = [cluster_bootstrap(gap.to_numpy(), c, resamples=1000) for c in (part.atom, part.passage)]
    return Answer(gap.mean(), min(b.low for b in by), max(b.high for b in by), len(part))


OWN = dict(place="middle", target="state", role="main")  # the cell and the SAE that the paper's claims are asked of


def class_share(of: str, among: str) -> Callable:
    def measure(tables, host) -> Answer:
        row = _row(tables["atom_partition"], host=host, **OWN)
        return Answer(row[of] / row[among], *wilson(int(row[of]), int(row[among])), row[among])

    return measure


def second_component(tables, host) -> Answer:
    row = _row(tables["atom_mixtures"], host=host, components=2, **OWN)
    return Answer(row.delta_bic, row.ci_low, row.ci_high, row.n)


def seed_overlap(tables, host) -> Answer | None:
    table = tables["atom_match_shares"]
    if host not in set(table.host):
        return None
    row = _row(table, host=host, target="state", **{"class": "all"})
    return Answer(row["share"], row.ci_low, row.ci_high, row.n)


def _own_atoms(tables, host):
    return rows_with(tables["atoms"], host=host, **OWN)


def busiest_register(tables, host) -> Answer | None:
    """Share of the held-out tokens at which the most-firing register fires."""
    part = _own_atoms(tables, host)
    part = part[part["class"] == "register"]
    if part.empty:
        return None
    row = part.loc[part.firings.idxmax()]
    scanned = round(row.firings / row.rate)
    return Answer(row.rate, *wilson(int(row.firings), scanned), scanned)


def threshold_ratio(tables, host) -> Answer:
    """Registers at a threshold of 0.02 over those at 0.10, resampled by atom."""
    cosines = _own_atoms(tables, host).cosine.to_numpy()

    def ratio(x):
        return (x >= 0.02).sum() / max(1, (x >= 0.10).sum())

    low, high = cluster_bootstrap(cosines, np.arange(len(cosines)), statistic=ratio, resamples=1000)
    return Answer(ratio(cosines), low, high, len(cosines))


def alive_by_k(tables, host) -> Answer | None:
    """Share of alive atoms at the largest k of the sweep less that at the smallest."""
    table = tables["atom_partition"]
    part = table[(table.host == host) & (table.target == "state") & (table.role != "main")].sort_values("k")
    if part.k.nunique() < 2:
        return None
    seeds = part.groupby("k").seed.apply(set)
    part = part[part.seed == min(set.intersection(*seeds))]  # the one seed that every k was trained with
    few, many = part.iloc[0], part.iloc[-1]
    counts = int(many.alive), int(many.n_atoms), int(few.alive), int(few.n_atoms)
    low, high = confint_proportions_2indep(*counts, method="newcomb")
    return Answer(many.alive / many.n_atoms - few.alive / few.n_atoms, low, high, counts[1] + counts[3])


def class_axis(axis: str) -> Callable:
    """Cliff's delta of registers against bundles on an axis of the paper's Table 17, over the drawn atoms."""

    def measure(tables, host) -> Answer | None:
        row = _row(tables["population_axes"], host=host, target="state", amplitude="coefficient", axis=axis)
        if min(row.n_register, row.n_bundle) < FEWEST_ATOMS:
            return None
        return Answer(row.cliffs_delta, row.ci_low, row.ci_high, row.n_register + row.n_bundle)

    return measure


def lowest_bin(tables, host) -> Answer | None:
    """The lowest win rate of the cosine bins that have enough atoms."""
    table = tables["population_by_cosine"]
    part = table[(table.host == host) & (table.target == "state") & (table.amplitude == "coefficient")]
    part = part[part.n_atoms >= FEWEST_ATOMS]
    if part.empty:
        return None
    row = part.loc[part.win_rate.idxmin()]
    return Answer(row.win_rate, row.ci_low, row.ci_high, row.n_firings)


def summary(table: str, value: str, low: str, high: str, **where) -> Callable:
    """The number of one line of a summary table, with the interval that stands beside it; None where there is no line."""

    def measure(tables, host) -> Answer | None:
        found = rows_with(tables[table], host=host, **where)
        if found.empty:
            return None
        row = found.squeeze()
        return Answer(row[value], row[low], row[high], row.n)

    return measure


def contrast(variant: str, quantity: str, place: str = "middle") -> Callable:
    """A variant of the state-trained SAE against the bilinear one of rank 1."""
    return summary(
        "ablation_contrasts",
        "value",
        "ci_low",
        "ci_high",
        target="state",
        variant=variant,
        quantity=quantity,
        place=place,
    )


def jumprelu_registers(tables, host) -> Answer | None:
    """Median cosine of the registers of the JumpReLU SAE."""
    found = rows_with(tables["ablations"], host=host, target="state", place="middle", variant="bilinear+rank1+jumprelu")
    if found.empty or not found.registers.iloc[0] >= FEWEST_ATOMS:
        return None
    row = found.iloc[0]
    return Answer(row.register_cosine, row.register_low, row.register_high, row.registers)


def native_inclusion(tables, host) -> Answer:
    """Share of targets of native rank 101 to 1,000 that come without an edit, resampled by prompt."""
    part = _trials(tables, host, "middle", 3.0)
    included = part.included_native.to_numpy(dtype=float)
    return Answer(included.mean(), *cluster_bootstrap(included, part.prompt.to_numpy(), resamples=1000), len(part))
