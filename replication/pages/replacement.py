"""Notebook 05: the replacement test over a profile's cells (the paper's Sec. 3.2, Table 2)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from replication import layout
from replication import statistics as stats
from replication.study.firings import (
    CONDITIONS_OF_SURVEYS,
    by_place,
    drawn_positions,
    encoded_saes,
    firing_windows,
    firings_of,
    run_firings,
)
from replication.study.study import Study
from writesae.evaluate.firings import atom_names, draw_atoms, draw_in_rounds, firings_at
from writesae.evaluate.replacement import CONDITIONS

CONTROLS = tuple(name for name in CONDITIONS if name not in ("delete", "atom"))


def headline(study: Study) -> pd.DataFrame:
    """Write results replacement.csv: the paper's protocol, with its number of firings per cell and target.

    SAEs subtract the data's mean, and firings are equally many per atom.
    """
    tables = []
    for name in study.profile.hosts:
        settings, windows = study.profile.section("replacement", name), firing_windows(study, name)
        cells = {study.cell(name, place): count for place, count in settings.firings.items()}
        drawn = []
        for cell_sae in encoded_saes(study, name, cells, "main", windows):
            count, firings = cells[cell_sae.layer, cell_sae.head], firings_of(study, cell_sae, windows)
            if settings.atoms:
                atoms = draw_atoms(firings, settings.atoms, -(-count // settings.atoms), study.profile.seed)
                firings = firings[firings.atom.isin(atoms)]
            drawn.append((cell_sae, draw_in_rounds(firings, count, study.profile.seed)))
        options = dict(scopes=settings.scopes, batch_rows=settings.batch_rows)
        tables.append(run_firings(study, name, "replacement", windows, drawn, **options))
    return study.gather("replacement", tables)


def survey(study: Study) -> pd.DataFrame:
    """Write results replacement_by_cell.csv: a smaller test in every cell, for the dependence on memory.

    Its places are uniform over positions, and the same in every cell.
    """
    tables = []
    for name in filter(study.survey_layers, study.profile.hosts):
        settings = study.profile.section("replacement", name)
        windows = study.windows(name, "heldout")[slice(0, settings.survey_windows)]
        cells = [cell for cell in study.host(name).cells if cell[0] in study.survey_layers(name)]
        places = drawn_positions(study, windows, settings.survey_firings)
        saes = encoded_saes(study, name, cells, "survey", windows)
        drawn = [(cell_sae, firings_at(cell_sae, places)) for cell_sae in saes]
        options = dict(conditions=CONDITIONS_OF_SURVEYS, scopes=("write",), batch_rows=settings.batch_rows)
        tables.append(run_firings(study, name, "replacement_by_cell", windows, drawn, **options))
    return study.gather("replacement_by_cell", tables)


def summarise(firings: pd.DataFrame, places: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return win rates, KLs and tests per (host, cell or all cells pooled, target, amplitude, read scope).

    Intervals: Wilson's (ci), bootstraps by atom (boot) and by passage. strict_chain: the share of firings
    with KL(atom) < KL(delete) < KL(random). kl_recovered: a share of the KL of deletion."""
    keys, rows = ["host", "target", "amplitude", "read"], []
    for values, group in firings.groupby(keys, sort=False):
        for cells, part in by_place(group, places).groupby("cells", sort=False):
            row = dict(zip(keys, values, strict=True), cells=cells)
            rows.append(row | _summary(part, resamples, seed))
    return pd.DataFrame(rows)


def _summary(part: pd.DataFrame, resamples: int, seed: int) -> dict:
    win, atom = stats.beats(part), atom_names(part)
    row = dict(write=part.write.iloc[0], kl_direction="native_patched")
    row |= dict(draw="atoms", centre="mean", object="write", seeds=1, n=len(part))
    row |= stats.rate_row(win, resamples, seed, boot=atom, passage=part.passage)
    row |= dict(n_atoms=atom.nunique(), n_passages=part.passage.nunique())
    row["strict_chain"] = (win & stats.beats(part, "delete", "random")).mean()
    row["median_ratio_delete_over_atom"] = (part.kl_delete / part.kl_atom).median()
    row["median_ratio_random_over_atom"] = (part.kl_random / part.kl_atom).median()
    row["wilcoxon_p"] = stats.paired_wilcoxon(part.kl_atom, part.kl_delete)
    row |= dict(cliffs_delta=stats.cliffs_delta(part.kl_delete, part.kl_atom), median_cosine=part.cosine.median())
    measured = [name for name in CONDITIONS if f"kl_{name}" in part and part[f"kl_{name}"].notna().all()]
    row |= {f"kl_{name}": part[f"kl_{name}"].median() for name in measured}
    for name in CONTROLS:
        if name in measured:
            row[f"win_{name}"] = stats.beats(part, name).mean()
            row[f"atom_beats_{name}"] = stats.beats(part, "atom", name).mean()
    row["loss_lost_by_deletion"] = part.nll_delete.mean() - part.nll_native.mean()
    for name in ("atom", "reconstruction"):
        row[f"kl_recovered_{name}"] = 1 - part[f"kl_{name}"].mean() / part.kl_delete.mean()
    return row


def shown(summary: pd.DataFrame, paper: Mapping[str, float]) -> pd.DataFrame:
    """Return the summary for a reader. paper: cells -> the paper's share at the atom's own coefficient."""
    rows = summary[summary["read"] == "write"]
    papers = rows.cells.map(paper).where(rows.target.eq("state") & rows.amplitude.eq("coefficient"))
    sizes = zip(1000 * rows.kl_atom, 1000 * rows.kl_delete, strict=True)
    columns = {"firings": layout.numbers(rows.n, ",.0f")}
    columns |= {"beats deletion (%)": layout.estimates(rows, "win_rate", "passage_low", "passage_high")}
    columns |= {"the paper (%)": layout.numbers(papers, ".1f", 100)}
    columns |= {"random atom does (%)": layout.numbers(rows.win_random, ".0f", 100)}
    columns |= {"KL atom, deletion (millinats)": [f"{atom:.3f}, {delete:.3f}" for atom, delete in sizes]}
    return layout.shown(rows, ["target", "amplitude", "cells"], columns)


def by_cell(firings: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Return win rates with Wilson's intervals, and the cell's memory, per cell, target and amplitude."""

    def row(part: pd.DataFrame) -> dict:
        numbers = dict(n=len(part))
        for name in ("atom", "random", "mean_write"):
            wins = int(stats.beats(part, name).sum())
            numbers[f"win_{name}"] = wins / len(part)
            numbers[f"ci_low_{name}"], numbers[f"ci_high_{name}"] = stats.wilson(wins, len(part))
        return numbers

    cell = ["host", "layer", "head"]
    memory = cells[[*cell, "half_life_median", "sigma1_over_sigma2"]]
    return stats.per_group(firings, [*cell, "target", "amplitude"], row).merge(memory, on=cell)


def trend(cells: pd.DataFrame) -> pd.DataFrame:
    """Return Spearman's rho over cells of the atom's win rate with half-life and sigma1/sigma2.

    One row per (host, target, amplitude). cells: the table of `by_cell`."""

    def row(part: pd.DataFrame) -> dict:
        win, numbers = part.win_atom, dict(n_cells=len(part), n=int(part.n.sum()))
        numbers |= dict(win_lowest=win.min(), win_median=win.median(), win_highest=win.max())
        for name in ("half_life_median", "sigma1_over_sigma2"):
            rho = stats.spearman(win, part[name])
            numbers |= stats.with_ends(f"rho_{name}", rho.value, rho)
        return numbers

    return stats.per_group(cells, ["host", "target", "amplitude"], row)


def shown_trend(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `trend` for a reader."""
    columns = {"cells": table.n_cells, "win rates (%)": layout.ranges(table.win_lowest, table.win_highest)}
    columns |= {"median (%)": layout.numbers(table.win_median, ".0f", 100)}
    columns |= {"rho with half-life": layout.plain(table, "rho_half_life_median")}
    columns |= {"rho with sigma1/sigma2": layout.plain(table, "rho_sigma1_over_sigma2")}
    return layout.shown(table, ["host", "target", "amplitude"], columns)
