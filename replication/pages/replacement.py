"""Notebooks 05 and 06: the replacement test over a profile's cells (the paper's Sec. 3.2, Table 2)."""

from __future__ import annotations

import pandas as pd

from replication.statistics import cliffs_delta, cluster_bootstrap, paired_wilcoxon, spearman, wilson
from replication.study.firings import encoded_saes, firing_windows, firings_of, run_firings
from replication.study.study import Suite
from writesae.evaluate.firings import atom_names, draw_atoms, draw_in_rounds
from writesae.evaluate.replacement import CONDITIONS


def headline(suite: Suite) -> pd.DataFrame:
    """results replacement.csv: the profile's count of firings in each host's cells, per target."""
    tables = []
    for name in suite.profile.hosts:
        settings, windows = suite.profile.section("replacement", name), firing_windows(suite, name)
        cells = {suite.cell(name, place): count for place, count in settings.firings.items()}
        drawn = []
        for cell_sae in encoded_saes(suite, name, cells, "main", windows):
            count, firings = cells[cell_sae.layer, cell_sae.head], firings_of(suite, cell_sae, windows)
            if settings.atoms:
                atoms = draw_atoms(firings, settings.atoms, -(-count // settings.atoms), suite.profile.seed)
                firings = firings[firings.atom.isin(atoms)]
            drawn.append((cell_sae, draw_in_rounds(firings, count, suite.profile.seed)))
        saes = suite.sae_files(name) + suite.sae_files(name, "flat")
        inputs = dict(settings=settings, data=suite.profile.data, saes=saes, cells=list(cells))
        options = dict(scopes=settings.scopes, batch_rows=settings.batch_rows)
        tables.append(run_firings(suite, name, "replacement", windows, drawn, inputs, **options))
    return suite.gather("replacement", tables)


def survey(suite: Suite) -> pd.DataFrame:
    """results replacement_by_cell.csv: a smaller test in every cell of the host, for the dependence on memory."""
    tables = []
    for name in suite.profile.hosts:
        settings, layers = suite.profile.section("replacement", name), suite.survey_layers(name)
        if not layers:
            continue
        windows = suite.windows(name, "heldout")[slice(0, settings.survey_windows)]
        cells = [cell for cell in suite.host(name).cells if cell[0] in layers]
        drawn = [
            (x, draw_in_rounds(firings_of(suite, x, windows), settings.survey_firings, suite.profile.seed))
            for x in encoded_saes(suite, name, cells, "survey", windows)
        ]
        inputs = dict(settings=settings, data=suite.profile.data, saes=suite.sae_files(name, "survey"))
        options = dict(conditions=("delete", "atom", "random", "mean_write"), scopes=("write",))
        tables.append(
            run_firings(
                suite, name, "replacement_by_cell", windows, drawn, inputs, batch_rows=settings.batch_rows, **options
            )
        )
    return suite.gather("replacement_by_cell", tables)


CONTROLS = tuple(name for name in CONDITIONS if name not in ("delete", "atom"))


def summarise(firings: pd.DataFrame, places: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """One line a (host, cells or all pooled, target, amplitude, read scope): the win rate of the atom over deletion with
    its Wilson interval and the bootstrap intervals by atom and by passage, median KLs, the strict chain, the wins of
    every control, and the loss recovered by atom and reconstruction."""
    named = firings.merge(places[["host", "layer", "head", "place"]], on=["host", "layer", "head"])
    rows = []
    for keys, group in named.groupby(["host", "target", "amplitude", "read"], sort=False):
        for cells, part in [("pooled", group), *group.groupby("place", sort=False)]:
            rows.append(
                dict(zip(["host", "target", "amplitude", "read"], keys, strict=True), cells=cells)
                | _summary(part, resamples, seed)
            )
    return pd.DataFrame(rows)


def _summary(part: pd.DataFrame, resamples: int, seed: int) -> dict:
    win = (part.kl_atom < part.kl_delete).to_numpy()
    low, high = wilson(int(win.sum()), len(win))
    atom = atom_names(part)
    by_atom = cluster_bootstrap(win, atom, resamples=resamples, seed=seed)
    by_passage = cluster_bootstrap(win, part.passage, resamples=resamples, seed=seed)
    row = dict(
        write=part.write.iloc[0],
        kl_direction="native_patched",
        n=len(part),
        win_rate=win.mean(),
        ci_low=low,
        ci_high=high,
        boot_low=by_atom.low,
        boot_high=by_atom.high,
        passage_low=by_passage.low,
        passage_high=by_passage.high,
        n_atoms=atom.nunique(),
        n_passages=part.passage.nunique(),
        strict_chain=((part.kl_atom < part.kl_delete) & (part.kl_delete < part.kl_random)).mean(),
        median_ratio_delete_over_atom=(part.kl_delete / part.kl_atom).median(),
        median_ratio_random_over_atom=(part.kl_random / part.kl_atom).median(),
        wilcoxon_p=paired_wilcoxon(part.kl_atom, part.kl_delete).p,
        cliffs_delta=cliffs_delta(part.kl_delete, part.kl_atom),
        median_cosine=part.cosine.median(),
    )
    there = [name for name in CONDITIONS if f"kl_{name}" in part and part[f"kl_{name}"].notna().all()]
    for name in there:
        row[f"kl_{name}"] = part[f"kl_{name}"].median()
    for name in (name for name in there if name in CONTROLS):
        row[f"win_{name}"] = (part[f"kl_{name}"] < part.kl_delete).mean()
        row[f"atom_beats_{name}"] = (part.kl_atom < part[f"kl_{name}"]).mean()
    lost = part.nll_delete.mean() - part.nll_native.mean()
    row["loss_lost_by_deletion"] = lost
    for name in ("atom", "reconstruction"):
        row[f"kl_recovered_{name}"] = 1 - part[f"kl_{name}"].mean() / part.kl_delete.mean()
    return row


def by_cell(firings: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One line a (host, cell, target, amplitude): win rates with Wilson intervals beside the cell's memory."""
    rows = []
    keys = ["host", "layer", "head", "target", "amplitude"]
    for values, part in firings.groupby(keys, sort=False):
        row = dict(zip(keys, values, strict=True), n=len(part))
        for name in ("atom", "random", "mean_write"):
            wins = int((part[f"kl_{name}"] < part.kl_delete).sum())
            row[f"win_{name}"] = wins / len(part)
            row[f"ci_low_{name}"], row[f"ci_high_{name}"] = wilson(wins, len(part))
        rows.append(row)
    memory = cells[["host", "layer", "head", "half_life_median", "sigma1_over_sigma2"]]
    return pd.DataFrame(rows).merge(memory, on=["host", "layer", "head"])


def trend(cells: pd.DataFrame) -> pd.DataFrame:
    """One line a (host, target, amplitude): Spearman's rho, over the host's cells, of the atom's win rate with the cell's
    half-life and with sigma1/sigma2 of its states. cells: the table of `by_cell`."""
    rows = []
    for values, part in cells.groupby(["host", "target", "amplitude"], sort=False):
        row = dict(zip(["host", "target", "amplitude"], values, strict=True), n_cells=len(part), n=int(part.n.sum()))
        row |= dict(win_lowest=part.win_atom.min(), win_median=part.win_atom.median(), win_highest=part.win_atom.max())
        for name in ("half_life_median", "sigma1_over_sigma2"):
            found = spearman(part.win_atom, part[name])
            row |= {f"rho_{name}": found.value, f"rho_{name}_low": found.low, f"rho_{name}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)
