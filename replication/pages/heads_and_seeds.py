"""Notebook 15: every head of a layer, every seed, and where the atom fails (App. F.1, Table 12, Fig. 14)."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from replication import layout
from replication import statistics as stats
from replication.plots import HOST
from replication.study import training
from replication.study.firings import CONDITIONS_OF_SURVEYS, encoded_saes, firings_of, run_firings
from replication.study.study import Study
from writesae.evaluate.firings import atom_names, draw_in_rounds, encode_cell
from writesae.harvesting import harvest

SMALLEST = 1e-12  # nats; a smaller divergence is rounding
GROUP = ["host", "target", "amplitude"]
HEAD = ["layer", "head"]


def heads(study: Study) -> pd.DataFrame:
    """Write results replacement_heads.csv: firings of every head, if head_firings is above 0 (App. F.1)."""
    settings = {name: study.profile.section("multiverse", name) for name in study.profile.hosts}
    tables = [heads_of_host(study, name, x) for name, x in settings.items() if x.head_firings]
    return study.gather("replacement_heads", tables)


def heads_of_host(study: Study, name: str, settings) -> pd.DataFrame:
    """Test up to settings.head_firings firings per head of the middle layer, with SAEs as in the survey."""
    layer, _ = study.cell(name, "middle")
    training.train_all(study, training.survey_specs(study, name, [layer]))
    windows = study.windows(name, "heldout")[slice(0, settings.windows)]
    cells, drawn = [(layer, head) for head in range(study.host(name).heads)], []
    for cell_sae in encoded_saes(study, name, cells, "survey", windows):
        firings = firings_of(study, cell_sae, windows)
        count = min(settings.head_firings, len(firings))
        drawn.append((cell_sae, draw_in_rounds(firings, count, study.profile.seed)))
    options = dict(conditions=CONDITIONS_OF_SURVEYS, scopes=("write",), batch_rows=settings.batch_rows)
    return run_firings(study, name, "replacement_heads", windows, drawn, **options)


def seeds(study: Study) -> pd.DataFrame:
    """Write results replacement_seeds.csv: firings of the SAEs of every seed that notebook 03 trains."""
    hosts = [name for name in study.profile.hosts if training.seed_variants(study, name)]
    tables = [seeds_of_host(study, name, study.profile.section("multiverse", name)) for name in hosts]
    return study.gather("replacement_seeds", tables)


def seeds_of_host(study: Study, name: str, settings) -> pd.DataFrame:
    """Return settings.firings of every seed and target in the cell of notebook 03, with the column `seed`."""
    windows = study.windows(name, "heldout")[slice(0, settings.windows)]
    cell, drawn = study.cell(name, study.profile.section("atoms", name).place), []
    factors = harvest(study.host(name), windows.tokens, [cell], study.profile.data.batch_windows)[cell]
    for variant, target in product(training.seed_variants(study, name), study.profile.saes.targets):
        sae = study.sae(name, *cell, target, training.variant_name(variant))
        cell_sae = encode_cell(cell, target, study.profile.saes.write, sae, factors)
        firings = draw_in_rounds(firings_of(study, cell_sae, windows), settings.firings, study.profile.seed)
        drawn.append((cell_sae, firings.assign(seed=variant.seed)))
    options = dict(conditions=CONDITIONS_OF_SURVEYS, scopes=("write",), batch_rows=settings.batch_rows)
    return run_firings(study, name, "replacement_seeds", windows, drawn, **options)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sd and range over seeds of the win rates of `per`, per host, target and amplitude."""

    def row(part: pd.DataFrame) -> dict:
        rate, numbers = part.win_rate, dict(seeds=len(part), n=int(part.n.sum()))
        return numbers | dict(mean_win_rate=rate.mean(), sd=rate.std(), lowest=rate.min(), highest=rate.max())

    return stats.per_group(table, GROUP, row)


def per(by: list[str], firings: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return win rates over deletion and median KLs per (host, target, amplitude, `by`), like Table 12."""

    def row(part: pd.DataFrame) -> dict:
        medians = {f"kl_{name}": part[f"kl_{name}"].median() for name in ("atom", "delete", "random")}
        return _rate(stats.beats(part), part, "win_rate", resamples, seed) | medians

    return stats.per_group(firings, [*GROUP, *by], row)


def _rate(happened: pd.Series, part: pd.DataFrame, name: str, resamples: int, seed: int) -> dict:
    """Return n and the share of firings, with Wilson's interval and the bootstraps by atom and by passage."""
    clusters = dict(boot=atom_names(part), passage=part.passage)
    return dict(n=len(part)) | stats.rate_row(happened, resamples, seed, name, **clusters)


def over_heads(table: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
    """Return win rates over the heads of a layer, like the text of App. F.1, per (host, target, amplitude).

    ci: bootstrap over heads; above_half, below_half: the numbers of heads whose interval is above and below
    one half; own_head_in_sd: the distance of the middle cell's head from the mean, in sd."""
    middle = places[places.place == "middle"].set_index("host")["head"]

    def row(part: pd.DataFrame) -> dict:
        mean, sd = part.win_rate.mean(), part.win_rate.std()
        chosen = part[part["head"] == middle[part.host.iloc[0]]].win_rate
        numbers = dict(heads=len(part), n=int(part.n.sum()), mean_win_rate=mean)
        numbers |= stats.ci(stats.cluster_bootstrap(part.win_rate, part["head"])) | dict(sd=sd)
        numbers |= dict(lowest=part.win_rate.min(), highest=part.win_rate.max())
        numbers |= dict(above_half=int((part.ci_low > 0.5).sum()), below_half=int((part.ci_high < 0.5).sum()))
        return numbers | dict(own_head_in_sd=(chosen.item() - mean) / sd if len(chosen) else np.nan)

    return stats.per_group(table, GROUP, row)


def log_ratio(firings: pd.DataFrame) -> pd.Series:
    """Return log KL(atom) - log KL(delete), which is positive where the atom fails."""
    return np.log(firings.kl_atom.clip(lower=SMALLEST)) - np.log(firings.kl_delete.clip(lower=SMALLEST))


def quartiles(effect: pd.Series) -> pd.Series:
    """Return Q1 (small) to Q4 (large) by rank; equal values are ranked by their order."""
    names = ["Q1", "Q2", "Q3", "Q4"]
    return pd.qcut(effect.rank(method="first"), 4, labels=names).astype(str)


def failures(firings: pd.DataFrame, places: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return how often the atom does not beat deletion, per (host, target, amplitude, by, level) (Fig. 14).

    `by` is all firings, the place, the quartile of KL(delete) over all cells, and the quartile within each
    cell, which keeps layers with small effects from filling the lowest quartile."""
    named, rows = firings.merge(places[["host", *HEAD, "place"]], on=["host", *HEAD]), []
    named["place"] = pd.Categorical(named.place, list(dict.fromkeys(places.place)))
    for values, part in named.groupby(GROUP, sort=False):
        levels = dict(all=pd.Series("all", index=part.index), place=part.place, quartile=quartiles(part.kl_delete))
        levels["quartile within cell"] = part.groupby("place", observed=True).kl_delete.transform(quartiles)
        for by, level in levels.items():
            for name, group in part.groupby(level, observed=True):
                row = dict(zip(GROUP, values, strict=True), by=by, level=name)
                rows.append(row | _rate(~stats.beats(group), group, "failure_rate", resamples, seed))
    return pd.DataFrame(rows)


def tests(firings: pd.DataFrame, permutations: int, resamples: int, seed: int) -> pd.DataFrame:
    """Return the paper's tests (Sec. 3.2, App. G), one row per (host, target, amplitude).

    wilcoxon_p: signed-rank test of the paired KLs. permutation_p: test of the mean log ratio that exchanges
    atom and deletion in single firings, as if these were independent; permutation_by_atom_p: the same test of
    the atoms' means. cliffs_delta: of KL(delete) over KL(atom). q1_minus_q4: failure rate in the lowest
    quartile of KL(delete) minus that in the highest; q1_minus_q4_p: by permuting the labels (nan below two
    firings in a quartile). Bootstraps are by passage."""

    def row(part: pd.DataFrame) -> dict:
        atom, delete, ratio = part.kl_atom.to_numpy(), part.kl_delete.to_numpy(), log_ratio(part)
        by_atom = ratio.groupby(atom_names(part)).mean().to_numpy()
        failed, quarter = (atom >= delete).astype(float), quartiles(part.kl_delete).to_numpy()

        def permuted(*sides, **paired) -> float:
            return stats.permutation_test(*sides, **paired, resamples=permutations, seed=seed)

        def delta(rows):
            return stats.cliffs_delta(delete[rows], atom[rows])

        def gap(rows):
            return failed[rows][quarter[rows] == "Q1"].mean() - failed[rows][quarter[rows] == "Q4"].mean()

        numbers = dict(n=len(part), n_atoms=len(by_atom), wilcoxon_p=stats.paired_wilcoxon(atom, delete))
        numbers |= dict(mean_log_ratio=ratio.mean(), permutation_p=permuted(ratio, 0 * ratio, paired=True))
        numbers["permutation_by_atom_p"] = permuted(by_atom, 0 * by_atom, paired=True)
        for name, statistic in (("cliffs_delta", delta), ("q1_minus_q4", gap)):
            interval = stats.cluster_bootstrap(statistic, part.passage, resamples=resamples, seed=seed)
            numbers |= stats.with_ends(name, statistic(np.arange(len(part))), interval)
        outer = [failed[quarter == name] for name in ("Q1", "Q4")]
        return numbers | dict(q1_minus_q4_p=permuted(*outer) if min(map(len, outer)) > 1 else np.nan)

    return stats.per_group(firings, GROUP, row)


# For readers


def shown(rates: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Return the table of `per` for a reader; by: head or seed."""
    columns = {"firings": rates.n}
    columns |= {"beats deletion (%)": layout.estimates(rates, "win_rate", "boot_low", "boot_high")}
    sizes = zip(1000 * rates.kl_atom, 1000 * rates.kl_delete, strict=True)
    columns |= {"KL atom, deletion (millinats)": [f"{atom:.3f}, {delete:.3f}" for atom, delete in sizes]}
    return layout.shown(rates, [*GROUP, *by], columns)


def shown_heads(over: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `over_heads` for a reader, in percent and points."""
    columns = {"heads": over["heads"]}
    columns |= {"mean (%)": layout.estimates(over, "mean_win_rate", "ci_low", "ci_high")}
    columns |= {"sd (points)": layout.numbers(over.sd, ".0f", 100)}
    columns |= {"range (%)": layout.ranges(over.lowest, over.highest)}
    sides = zip(over.above_half, over.below_half, strict=True)
    columns["above, below one half"] = [f"{above}, {below}" for above, below in sides]
    return layout.shown(over, GROUP, columns)


def shown_seeds(spread: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `over_seeds` for a reader, in percent and points."""
    columns = {"seeds": spread.seeds, "firings": spread.n}
    columns |= {"mean (%)": layout.numbers(spread.mean_win_rate, ".0f", 100)}
    columns |= {"sd (points)": layout.numbers(spread.sd, ".1f", 100)}
    return layout.shown(spread, GROUP, columns | {"range (%)": layout.ranges(spread.lowest, spread.highest)})


def shown_failures(failures: pd.DataFrame) -> pd.DataFrame:
    """Return how often deletion beats the atom (%), for a reader: hosts and targets across."""
    of = [f"{HOST.get(host, host)}, SAE of {target}s" for host, target in zip(failures.host, failures.target)]
    rates = layout.estimates(failures, "failure_rate", "passage_low", "passage_high")
    return layout.across(failures.assign(of=of), ["by", "level"], "of", rates)


def shown_tests(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `tests` for a reader."""
    columns = {"p, Wilcoxon": layout.p_values(table.wilcoxon_p)}
    columns |= {"p, firings permuted": layout.p_values(table.permutation_p)}
    columns |= {"p, atoms permuted": layout.p_values(table.permutation_by_atom_p)}
    columns |= {"Cliff's delta": layout.plain(table, "cliffs_delta")}
    return layout.shown(table, GROUP, columns | {"Q1 less Q4 (points)": layout.estimates(table, "q1_minus_q4")})
