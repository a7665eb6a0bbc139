"""Notebook 04: the KL of a replacement, predicted without a run, and the atom that it chooses."""

from __future__ import annotations

import numpy as np
import pandas as pd

from replication import layout
from replication.statistics import beats, cluster_bootstrap, per_group, with_ends
from replication.study.firings import drawn_positions, encoded_saes, firing_windows, run_firings
from replication.study.study import Study
from writesae.evaluate.firings import firings_at
from writesae.evaluate.predicted_kl import DELETION, predict_replacements

FIRING = ["host", "target", "passage", "window", "position"]


def run(study: Study) -> pd.DataFrame:
    """Return measured and predicted KLs per (host, SAE, firing, candidate), kept in build/ only.

    The firings are at the same positions, uniform over held-out text, for the SAEs of both targets.
    """
    tables = []
    for name in study.profile.hosts:
        settings, windows = study.profile.section("logit_shift", name), firing_windows(study, name)
        places = drawn_positions(study, windows, settings.predicted_kl.firings)
        saes = encoded_saes(study, name, [study.cell(name, settings.place)], "main", windows)
        drawn = [(cell_sae, firings_at(cell_sae, places)) for cell_sae in saes]
        options = dict(atoms=settings.predicted_kl.atoms, readings=settings.predicted_kl.readings)
        tables.append(run_firings(study, name, "predicted_kl", windows, drawn, predict_replacements, **options))
    return pd.concat(tables, ignore_index=True)


def by_firing(candidates: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (host, target, firing, way of scoring the atoms).

    A way is a number of backward passes, the second-order form (fisher), or the cosine to the native write.
    rho: Spearman's, of its score with the measured KL over the drawn atoms. kl_chosen: of the atom with the
    best score; kl_best: the smallest; kl_own: of the firing's atom; kl_delete: of deletion. agrees: whether
    the scores say, as the KLs do, which of the firing's atom and deletion is nearer (cosine: if positive)."""
    ways = [name for name in candidates if name.startswith("kl_")] + ["fisher", "cosine"]
    scores, rows = candidates.assign(cosine=-candidates.cosine), []
    for values, part in scores.groupby(FIRING, sort=False):
        own, none = part[part.own].iloc[0], part[part.candidate == DELETION].iloc[0]
        drawn = part[~part.own & (part.candidate != DELETION)]
        kls = dict(kl_own=own.kl, kl_delete=none.kl, kl_best=drawn.kl.min(), n_atoms=len(drawn))
        for way in ways:
            row = dict(zip(FIRING, values, strict=True)) | kls | dict(way=way)
            row |= dict(rho=drawn[way].corr(drawn.kl, method="spearman"), kl_chosen=drawn.kl.loc[drawn[way].idxmin()])
            rows.append(row | dict(agrees=(own[way] < none[way]) == (own.kl < none.kl)))
    return pd.DataFrame(rows)


def summarise(study: Study, firings: pd.DataFrame) -> pd.DataFrame:
    """Write and return results predicted_kl_summary.csv: one row per (host, target, way of scoring).

    rho, and excess (KL of the chosen atom over the smallest): medians over firings. own_beats, chosen_beats:
    shares of firings at which the firing's atom, or the chosen one, is nearer than deletion. agrees: as in
    `by_firing`. All intervals: bootstrap by passage."""

    def row(part: pd.DataFrame) -> dict:
        numbers = dict(n=len(part), n_passages=part.passage.nunique(), n_atoms=part.n_atoms.iloc[0])
        for name, values in dict(rho=part.rho, excess=part.kl_chosen / part.kl_best).items():
            numbers |= with_ends(name, values.median(), cluster_bootstrap(values, part.passage, np.median))
        shares = dict(own_beats=beats(part, "own"), chosen_beats=beats(part, "chosen"), agrees=part.agrees)
        for name, values in shares.items():
            numbers |= with_ends(name, values.mean(), cluster_bootstrap(values.astype(float), part.passage))
        return numbers | {name: part[name].median() for name in ("kl_chosen", "kl_best", "kl_own", "kl_delete")}

    return study.write("predicted_kl_summary", per_group(firings, ["host", "target", "way"], row))


def shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary for a reader: shares in percent."""
    names = dict(cosine="cosine to the native write", fisher="second-order form", kl_1="1 backward pass")
    ways = [names.get(way, f"{way.removeprefix('kl_')} backward passes") for way in summary.way]

    columns = {"atoms scored by": ways, "firings": summary.n}
    columns |= {"Spearman with the KL": layout.plain(summary, "rho", digits=3)}
    columns |= {"KL of the chosen / smallest": layout.plain(summary, "excess")}
    columns |= {"chosen beats deletion (%)": layout.estimates(summary, "chosen_beats")}
    columns |= {"firing's atom does (%)": layout.estimates(summary, "own_beats")}
    return layout.shown(summary, ["host"], columns | {"predicted rightly (%)": layout.estimates(summary, "agrees")})
