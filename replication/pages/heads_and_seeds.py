"""Notebook 11: every head of a layer, every seed, and where the atom fails (App. F.1, Table 12, Fig. 14)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from replication.statistics import beats, cliffs_delta, cluster_bootstrap, paired_wilcoxon, permutation_test, rate_row
from replication.study import training
from replication.study.firings import CONDITIONS_OF_SURVEYS, encoded_saes, firings_of, run_firings
from replication.study.study import Study
from writesae.evaluate.firings import atom_names, draw_in_rounds, encode_cell
from writesae.harvesting import harvest

SMALLEST = 1e-12  # nats; below this a divergence is rounding


# Every head of the middle cell's layer.


def heads(study: Study) -> pd.DataFrame:
    """results replacement_heads.csv: the firings of every head, on hosts whose settings ask for them (App. F.1)."""
    tables = []
    for name in study.profile.hosts:
        settings = study.profile.section("multiverse", name)
        if settings.head_firings:
            tables.append(heads_of_host(study, name, settings))
    return study.gather("replacement_heads", tables)


def heads_of_host(study: Study, name: str, settings) -> pd.DataFrame:
    """settings.head_firings of every head (all it has, where it has fewer), from SAEs trained as the survey's are."""
    layer, _ = study.cell(name, "middle")
    training.train_all(study, training.survey_specs(study, name, [layer]))  # most are there already
    windows = study.windows(name, "heldout")[slice(0, settings.windows)]
    cells = [(layer, head) for head in range(study.host(name).heads)]
    drawn = []
    for subject in encoded_saes(study, name, cells, "survey", windows):
        every = firings_of(study, subject, windows)
        drawn.append((subject, draw_in_rounds(every, min(settings.head_firings, len(every)), study.profile.seed)))
    options = dict(conditions=CONDITIONS_OF_SURVEYS, scopes=("write",), batch_rows=settings.batch_rows)
    return run_firings(study, name, "replacement_heads", windows, drawn, **options)


# Every seed of the middle cell's SAE.


def seeds(study: Study) -> pd.DataFrame:
    """results replacement_seeds.csv: as many firings for the SAEs of every seed that notebook 03 has trained."""
    tables = []
    for name in study.profile.hosts:
        if training.seed_variants(study, name):
            tables.append(seeds_of_host(study, name, study.profile.section("multiverse", name)))
    return study.gather("replacement_seeds", tables)


def seeds_of_host(study: Study, name: str, settings) -> pd.DataFrame:
    """settings.firings of every seed and target in the cell of notebook 03, with the column `seed`."""
    windows = study.windows(name, "heldout")[slice(0, settings.windows)]
    cell, drawn = study.cell(name, study.profile.section("atoms", name).place), []
    factors = harvest(study.host(name), windows.tokens, [cell], study.profile.data.batch_windows)[cell]
    for variant in training.seed_variants(study, name):
        role = training.variant_name(variant)
        for target in study.profile.saes.targets:
            sae = study.sae(name, *cell, target, role)
            subject = encode_cell(cell, target, study.profile.saes.write, sae, factors)
            firings = draw_in_rounds(firings_of(study, subject, windows), settings.firings, study.profile.seed)
            drawn.append((subject, firings.assign(seed=variant.seed)))
    options = dict(conditions=CONDITIONS_OF_SURVEYS, scopes=("write",), batch_rows=settings.batch_rows)
    return run_firings(study, name, "replacement_seeds", windows, drawn, **options)


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Return mean, sd and range over seeds of the win rates of `per`, per host, target and amplitude."""
    rows = []
    for values, part in table.groupby(GROUP, sort=False):
        rate = part.win_rate
        row = dict(seeds=len(part), n=int(part.n.sum()), mean_win_rate=rate.mean(), sd=rate.std())
        rows.append(dict(zip(GROUP, values, strict=True)) | row | dict(lowest=rate.min(), highest=rate.max()))
    return pd.DataFrame(rows)


GROUP = ["host", "target", "amplitude"]
HEAD = ["layer", "head"]


def per(by: list[str], firings: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per (host, target, amplitude, values of `by`) that has firings, like Table 12.

    Columns: n, the atom's win rate over deletion with its intervals (`_rate`), and median KLs.
    """
    rows = []
    for values, part in firings.groupby([*GROUP, *by], sort=False):
        row = dict(zip([*GROUP, *by], values, strict=True))
        row |= _rate(beats(part), part, "win_rate", resamples, seed)
        rows.append(row | {f"kl_{name}": part[f"kl_{name}"].median() for name in ("atom", "delete", "random")})
    return pd.DataFrame(rows)


def _rate(happened: pd.Series, part: pd.DataFrame, name: str, resamples: int, seed: int) -> dict:
    """Return n and the share of firings, with Wilson's interval and the bootstraps by atom and by passage."""
    return dict(n=len(part)) | rate_row(happened, resamples, seed, name, boot=atom_names(part), passage=part.passage)


def over_heads(table: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (host, target, amplitude) over the heads of a layer, as the text of App. F.1 does.

    Columns: mean, sd and range of the heads' win rates, the bootstrap interval over heads, the numbers of
    heads whose interval is above and below one half, and the distance in sd of the middle cell's head from
    the mean.
    """
    middle, rows = places[places.place == "middle"].set_index("host")["head"], []
    for values, part in table.groupby(GROUP, sort=False):
        mean, sd = part.win_rate.mean(), part.win_rate.std()
        low, high = cluster_bootstrap(part.win_rate, part["head"])
        chosen = part[part["head"] == middle[values[0]]].win_rate
        row = dict(zip(GROUP, values, strict=True), heads=len(part), n=int(part.n.sum()), mean_win_rate=mean)
        row |= dict(ci_low=low, ci_high=high, sd=sd, lowest=part.win_rate.min(), highest=part.win_rate.max())
        row |= dict(above_half=int((part.ci_low > 0.5).sum()), below_half=int((part.ci_high < 0.5).sum()))
        rows.append(row | dict(own_head_in_sd=(chosen.item() - mean) / sd if len(chosen) else np.nan))
    return pd.DataFrame(rows)


# Failures (Fig. 14) and the tests of the headline, on the firings of replacement.csv.


def log_ratio(firings: pd.DataFrame) -> pd.Series:
    """Return log KL(atom) - log KL(delete), which is positive where the atom fails."""
    return np.log(firings.kl_atom.clip(lower=SMALLEST)) - np.log(firings.kl_delete.clip(lower=SMALLEST))


def quartiles(effect: pd.Series) -> pd.Series:
    """Return Q1 (small) to Q4 (large) by rank; equal values are ranked by their order."""
    names = ["Q1", "Q2", "Q3", "Q4"]
    return pd.qcut(effect.rank(method="first"), 4, labels=names).astype(str)


def failures(firings: pd.DataFrame, places: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per (host, target, amplitude, by, level): how often the atom does not beat deletion.

    `by` is all firings, the place, the quartile of KL(delete) over all cells as in Fig. 14, and the quartile
    within each cell, which keeps layers with small effects from filling the lowest quartile.
    """
    named, rows = firings.merge(places[["host", "layer", "head", "place"]], on=["host", "layer", "head"]), []
    named["place"] = pd.Categorical(named.place, list(dict.fromkeys(places.place)))
    for values, part in named.groupby(GROUP, sort=False):
        within = part.groupby("place", observed=True).kl_delete.transform(quartiles)
        levels = dict(all=pd.Series("all", index=part.index), place=part.place, quartile=quartiles(part.kl_delete))
        for by, level in (levels | {"quartile within cell": within}).items():
            for name, group in part.groupby(level, observed=True):
                row = dict(zip(GROUP, values, strict=True), by=by, level=name)
                rows.append(row | _rate(~beats(group), group, "failure_rate", resamples, seed))
    return pd.DataFrame(rows)


def tests(firings: pd.DataFrame, permutations: int, resamples: int, seed: int) -> pd.DataFrame:
    """Return one row per (host, target, amplitude): the paper's tests (Sec. 3.2, App. G).

    wilcoxon_p: signed ranks of paired KLs. permutation_p: mean log ratio, exchanging atom and deletion within
    firings, as if those were independent; permutation_by_atom_p: within whole atoms. cliffs_delta: of
    KL(delete) over KL(atom), with its bootstrap by passage. q1_minus_q4: the failure rate in the lowest
    quartile of KL(delete) minus that in the highest, with the same bootstrap and a permutation of the
    quartiles' labels (nan for fewer than two firings in a quartile).
    """
    rows = []
    for values, part in firings.groupby(GROUP, sort=False):
        atom, delete, ratio = part.kl_atom.to_numpy(), part.kl_delete.to_numpy(), log_ratio(part)
        by_atom = ratio.groupby(atom_names(part)).mean().to_numpy()
        failed, quarter = (atom >= delete).astype(float), quartiles(part.kl_delete).to_numpy()

        def delta(rows, atom=atom, delete=delete):
            return cliffs_delta(delete[rows], atom[rows])

        def gap(rows, failed=failed, quarter=quarter):
            return failed[rows][quarter[rows] == "Q1"].mean() - failed[rows][quarter[rows] == "Q4"].mean()

        every, options = np.arange(len(part)), dict(resamples=permutations, seed=seed)
        row = dict(zip(GROUP, values, strict=True), n=len(part), n_atoms=len(by_atom))
        row["wilcoxon_p"] = paired_wilcoxon(atom, delete).p
        row["mean_log_ratio"] = ratio.mean()
        row["permutation_p"] = permutation_test(ratio, np.zeros(len(ratio)), paired=True, **options).p
        row["permutation_by_atom_p"] = permutation_test(by_atom, np.zeros(len(by_atom)), paired=True, **options).p
        for name, statistic in (("cliffs_delta", delta), ("q1_minus_q4", gap)):
            low, high = cluster_bootstrap(statistic, part.passage, resamples=resamples, seed=seed)
            row |= {name: statistic(every), f"{name}_low": low, f"{name}_high": high}
        outer = [failed[quarter == name] for name in ("Q1", "Q4")]
        enough = min(map(len, outer)) > 1  # not in a dry run, whose quartiles have one firing each
        rows.append(row | dict(q1_minus_q4_p=permutation_test(*outer, **options).p if enough else np.nan))
    return pd.DataFrame(rows)
