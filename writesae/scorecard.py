"""The scorecard: each claim of paper/claims.csv against our numbers, by a criterion that stands here before any run.

A result on an embedded host never replicates a number of another model. It can go in the *same direction* as the
paper's claim, the *opposite* one, or have *no effect* (an interval that does not exclude the point of indifference).
Claims that nothing here has run yet are listed as *not run*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep

from writesae.artifacts import ROOT, rows_with
from writesae.experiments.firings import atom_names
from writesae.statistics import cluster_bootstrap, pearson, wilson

STATUSES = ("same direction", "opposite", "no effect", "not run")
DIRECTION = {"same direction": 1, "opposite": -1, "no effect": 0}
FEWEST_ATOMS = 5  # of a class, below which no interval over its atoms means anything: such a claim counts as not run
COLUMNS = [
    "id",
    "experiment",
    "paper_value",
    "host",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "status",
    "direction",
    "criterion",
    "notebook",
    "note",
]


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


def status(answer: Answer, rule: Rule) -> str:
    """One of STATUSES for an answer whose interval lies above, below, or across the point of indifference."""
    above, below = answer.low > rule.indifference, answer.high < rule.indifference
    if rule.claimed == "equal":
        return "opposite" if above or below else "same direction"
    if not (above or below):
        return "no effect"
    return "same direction" if above == (rule.claimed == "above") else "opposite"


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


CHANGE = ("median_change", "ci_low", "ci_high")
EVERY = dict(target="state", token_from="other", atom="all")
HALF = "interval of the win rate (wider of the bootstraps by atom and by passage) above 0.5"
REGISTER = "median cosine of register atoms to the native write above 0 (interval over atoms)"
FLOOR = "interval of the win rate (wider of the bootstraps by atom and by passage) holds 0.5: the atom is no better than deletion"
SMALL_FORMULA = "median R2 over (atom, eps) of the paper's formula, nothing fitted, below 0.5"
QWEN_4B, QWEN_27B = "Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-27B"
FLAT = "win rate less that of a flat SAE's top singular pair, middle cell, matched norm"
RULES: dict[str, Rule] = {
    "R1": Rule(HALF, "05_replacement", 0.5, "above", win_rate("pooled")),
    "R2": Rule(HALF, "05_replacement", 0.5, "above", win_rate("early")),
    "R3": Rule(HALF, "05_replacement", 0.5, "above", win_rate("middle")),
    "R4": Rule(HALF, "05_replacement", 0.5, "above", win_rate("late")),
    "R5": Rule(
        "ratio of median KLs, deletion over atom, above 1", "05_replacement", 1, "above", ratio_of_medians("delete")
    ),
    "R6": Rule(
        "ratio of median KLs, random over atom, above 1", "05_replacement", 1, "above", ratio_of_medians("random")
    ),
    "R7": Rule(
        "share with atom < deletion < random above 1/6, what three unordered numbers give",
        "05_replacement",
        1 / 6,
        "above",
        per_firing(lambda p: (p.kl_atom < p.kl_delete) & (p.kl_delete < p.kl_random)),
    ),
    "R8": Rule(
        "median over firings of KL(delete) / KL(atom) above 1",
        "05_replacement",
        1,
        "above",
        per_firing(lambda p: p.kl_delete / p.kl_atom, np.median),
    ),
    "R9": Rule(
        "median over firings of KL(random) / KL(atom) above 1",
        "05_replacement",
        1,
        "above",
        per_firing(lambda p: p.kl_random / p.kl_atom, np.median),
    ),
    "R10": Rule(
        "failure rate in the lowest quartile of KL(delete) above that in the highest",
        "05_replacement",
        0,
        "above",
        failure_gap,
    ),
    "P1": Rule("interval of the mean win rate over atoms above 0.5", "07_population", 0.5, "above", population("all")),
    "P2": Rule("the same over register atoms", "07_population", 0.5, "above", population("register")),
    "P3": Rule("the same over bundle atoms", "07_population", 0.5, "above", population("bundle")),
    "P4": Rule(
        "mean win rates of the classes do not differ (95% interval of the difference holds 0)",
        "07_population",
        0,
        "equal",
        class_difference,
    ),
    "P5": Rule(
        "no correlation of cosine and win rate (95% interval holds 0)", "07_population", 0, "equal", cosine_correlation
    ),
    "C1": Rule(
        "median R2 over (atom, eps), with the paper's fitted scalar, above 0.9",
        "04_logit_shift",
        0.9,
        "above",
        logit_r2("paper_fitted"),
    ),
    "C2": Rule(
        "the same at the token of rank 5",
        "04_logit_shift",
        0.9,
        "above",
        summary("logit_shift_ranks", "r2_median", "ci_low", "ci_high", predictor="paper_fitted", rank=5),
    ),
    "C3": Rule(
        "sign of the shift is that of the paper's formula in more than half",
        "04_logit_shift",
        0.5,
        "above",
        sign_agreement,
    ),
    "I2": Rule(
        "inclusion rises for targets of native rank 101-1000 at 3x", "10_install", 0, "above", installed("middle")
    ),
    "I3": Rule(
        "more than 1 in 100 targets ranked 101 to 1,000 come without an edit (interval by prompt)",
        "10_install",
        0.01,
        "above",
        native_inclusion,
    ),
    "I4": Rule("inclusion rises over all targets at 3x", "10_install", 0, "above", installed("all")),
    "I5": Rule("inclusion at 3x exceeds that at 6x", "10_install", 0, "above", saturation),
    "I6": Rule(
        "inclusion of targets of native rank above 1000 does not rise at 3x", "10_install", 0, "equal", installed("far")
    ),
    "I7": Rule(
        "inclusion over all targets does not rise at 3x", "10_install", 0, "equal", installed("all"), family="mamba2"
    ),
    "C4": Rule(SMALL_FORMULA, "04_logit_shift", 0.5, "below", logit_r2("paper"), family="mamba2"),
    "C5": Rule(SMALL_FORMULA, "04_logit_shift", 0.5, "below", logit_r2("paper"), model=QWEN_4B),
    "X1": Rule(HALF, "05_replacement", 0.5, "above", win_rate("pooled"), family="mamba2"),
    "X2": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="gated_deltanet"),
    "X3": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="rwkv7"),
    "X4": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="mamba2"),
    "X5": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="gla"),
    "X6": Rule(REGISTER, "07_population", 0, "above", register_cosine, family="delta_net"),
    "X7": Rule(REGISTER, "07_population", 0, "above", register_cosine, model=QWEN_4B),
    "X8": Rule(REGISTER, "07_population", 0, "above", register_cosine, model=QWEN_27B),
    "X9": Rule(FLOOR, "05_replacement", 0.5, "equal", win_rate("pooled"), family="delta_net"),
    "X10": Rule(FLOOR, "05_replacement", 0.5, "equal", win_rate("pooled"), model=QWEN_4B),
    "X11": Rule(
        f"{FLAT}: no difference (95% interval holds 0)",
        "05_replacement",
        0,
        "equal",
        against_flat,
        family="gated_deltanet",
    ),
    "X12": Rule(f"{FLAT}: below 0", "05_replacement", 0, "below", against_flat, family="rwkv7"),
    "X13": Rule(f"{FLAT}: above 0", "05_replacement", 0, "above", against_flat, family="mamba2"),
    "A1": Rule(
        "share of alive atoms among all below 1/2 (Wilson)", "03_atoms", 0.5, "below", class_share("alive", "n_atoms")
    ),
    "A2": Rule(
        "registers among alive atoms above 1/2 (Wilson)", "03_atoms", 0.5, "above", class_share("registers", "alive")
    ),
    "A3": Rule(
        "bundles among alive atoms below 1/2 (Wilson)", "03_atoms", 0.5, "below", class_share("bundles", "alive")
    ),
    "A4": Rule(
        "delta BIC of two components against one below 0 (atoms resampled)", "03_atoms", 0, "below", second_component
    ),
    "A5": Rule(
        "alive atoms with |cosine| > 0.9 in another seed: below 1 in 10", "03_atoms", 0.1, "below", seed_overlap
    ),
    "A6": Rule(
        "the most-firing register fires at over 1% of tokens (Wilson)", "03_atoms", 0.01, "above", busiest_register
    ),
    "A7": Rule(
        "registers at tau 0.02 over those at 0.10 below 2 (atoms resampled)", "03_atoms", 2, "below", threshold_ratio
    ),
    "A8": Rule("more alive atoms at the largest k than at the smallest (Newcombe)", "03_atoms", 0, "above", alive_by_k),
    "P6": Rule(
        "lowest win rate of the cosine bins (5 atoms or more) above 0.5", "07_population", 0.5, "above", lowest_bin
    ),
    "P7": Rule(
        "deletion disrupts the top token of registers more", "07_population", 0, "above", class_axis("flip_delete")
    ),
    "P8": Rule("the atom disrupts it alike in both classes", "07_population", 0, "equal", class_axis("flip_atom")),
    "P9": Rule("median delta KL alike in both classes", "07_population", 0, "equal", class_axis("delta_kl")),
    "P10": Rule("registers fire more often", "07_population", 0, "above", class_axis("firings_per_10k")),
    "B1": Rule(
        "a larger share of dead atoms in the flat SAE than in the bilinear one (Newcombe)",
        "11_ablations",
        0,
        "above",
        contrast("dense+flat", "dead_fraction"),
    ),
    "B2": Rule(
        "FVU of the flat SAE over that of the bilinear one below 1 (passages resampled), middle",
        "11_ablations",
        1,
        "below",
        contrast("dense+flat", "fvu_ratio"),
    ),
    "B3": Rule("the same, early", "11_ablations", 1, "below", contrast("dense+flat", "fvu_ratio", "early")),
    "B4": Rule("the same, late", "11_ablations", 1, "below", contrast("dense+flat", "fvu_ratio", "late")),
    "B5": Rule(
        "median cosine of the JumpReLU SAE's registers to the native write above 0 (interval over atoms)",
        "11_ablations",
        0,
        "above",
        jumprelu_registers,
    ),
    "B6": Rule(
        "FVU of the gated SAE over that of TopK above 1 (passages resampled)",
        "11_ablations",
        1,
        "above",
        contrast("bilinear+rank1+gated", "fvu_ratio"),
    ),
    "B7": Rule(
        "atoms of rank 2 beat deletion no more and no less often than those of rank 1",
        "11_ablations",
        0,
        "equal",
        contrast("bilinear+rank2", "win_rate_coefficient"),
    ),
    "S1": Rule(
        "1 - overlap of the 32 tokens that the atom and a random rank-1 write of its norm move most above 0.9",
        "11_ablations",
        0.9,
        "above",
        summary(
            "selectivity_overlap",
            "selectivity",
            "ci_low",
            "ci_high",
            target="state",
            cells="pooled",
            control="random",
            top=32,
        ),
    ),
    "D1": Rule(
        "mean log sigma1/sigma2 of heads falls from the early to the late layer", "00_hosts", 0, "above", sigma_falls
    ),
    "R11": Rule(
        "deletion at all register firings of a passage costs less than 0.05 bits per token (interval over passages)",
        "09_cache_edits",
        0.05,
        "below",
        summary("register_erase_summary", "rise", "rise_low", "rise_high", target="state", condition="delete"),
    ),
    "R12": Rule(
        "matched-norm random writes in their place cost more bits per token than deletion",
        "09_cache_edits",
        0,
        "above",
        summary("register_erase_summary", "excess", "excess_low", "excess_high", target="state", condition="random"),
    ),
    "H1": Rule(
        "mean over the layer's heads of the win rate above 0.5 (bootstrap over heads)",
        "11_multiverse",
        0.5,
        "above",
        summary("heads_summary", "mean_win_rate", "ci_low", "ci_high", target="state", amplitude="coefficient"),
    ),
    "E1": Rule(
        "median change of log p of the atoms' preferred tokens, found in other text, below 0 under deletion",
        "09_cache_edits",
        0,
        "below",
        summary("cache_erase_summary", *CHANGE, **EVERY, **{"where": "firing", "condition": "delete", "dose": 1.0}),
    ),
    "E2": Rule(
        "no median change of the same when the atoms are added elsewhere at 4x",
        "09_cache_edits",
        0,
        "equal",
        summary("cache_erase_summary", *CHANGE, **EVERY, **{"where": "elsewhere", "condition": "add", "dose": 4.0}),
    ),
    "I1": Rule(
        "the target's logit moves in the direction that the paper's formula says in more than half",
        "09_cache_edits",
        0.5,
        "above",
        summary("single_write_summary", "sign_agreement", "ci_low", "ci_high", direction="paper", predictor="paper"),
    ),
    "N1": Rule(
        "more than 1 newline per 400 tokens at baseline (interval over prompts)",
        "09_cache_edits",
        1,
        "above",
        summary("newlines_summary", "newlines", "newlines_low", "newlines_high", role="baseline"),
    ),
    "N2": Rule(
        "fewer newlines at 5x than at baseline, same prompts (interval over prompts)",
        "09_cache_edits",
        0,
        "below",
        summary("newlines_summary", "change", "change_low", "change_high", mode="offset", role="boundary", dose=5.0),
    ),
}
TABLES = (
    "replacement",
    "replacement_summary",
    "population",
    "population_summary",
    "logit_shift",
    "logit_shift_summary",
    "logit_shift_ranks",
    "install",
    "hosts",
    "cells",
    "all_cells",
    "alive_atoms",
    "atoms",
    "atom_partition",
    "atom_mixtures",
    "atom_match_shares",
    "population_axes",
    "population_by_cosine",
    "cache_erase_summary",
    "single_write_summary",
    "newlines_summary",
    "register_erase_summary",
    "heads_summary",
    "ablations",
    "ablation_contrasts",
    "selectivity_overlap",
)


def scorecard(read_table: Callable[[str], pd.DataFrame], hosts: list[str], claims: Path | None = None) -> pd.DataFrame:
    """One line a (claim, host); claims without a rule here once, as not run. read_table(name) gives a result table.

    Raises ValueError for a host that hosts.csv does not have, KeyError where a table has no row or several for a claim.
    """
    tables = {name: read_table(name) for name in TABLES}
    known, rows = tables["hosts"].set_index("host"), []
    if unknown := [host for host in hosts if host not in known.index]:
        raise ValueError(f"hosts.csv has no host {unknown[0]!r}: choose one of {', '.join(known.index)}.")
    for claim in pd.read_csv(claims or ROOT / "paper" / "claims.csv").itertuples():
        base = dict(id=claim.id, experiment=claim.experiment, paper_value=claim.value, note=claim.metric)
        rule = RULES.get(claim.id)
        asked = [host for host in hosts if rule and rule.asks(known.loc[host])]
        if not asked:
            rows.append(base | dict(host=claim.host, status="not run", criterion="", notebook=""))
            continue
        for host in asked:
            answer = rule.measure(tables, host)
            if answer is None:
                said = dict(status="not run", criterion=rule.criterion, notebook=rule.notebook)
                rows.append(base | dict(host=host) | said)
                continue
            numbers = dict(value=answer.value, ci_low=answer.low, ci_high=answer.high, n=int(answer.n))
            said = dict(status=status(answer, rule), criterion=rule.criterion, notebook=rule.notebook)
            rows.append(base | dict(host=host) | numbers | said)
    table = pd.DataFrame(rows)
    return table.assign(direction=table.status.map(DIRECTION))[COLUMNS]
