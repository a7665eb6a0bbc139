"""Notebook 09: classes of atoms by cosine, and the win rate of each atom (the paper's Sec. 3.2, App. F.2)."""

from __future__ import annotations

import pandas as pd

from replication import layout
from replication.classes import alive_atoms
from replication.statistics import beats, ci, cluster_bootstrap
from replication.study.firings import (
    CONDITIONS_OF_SURVEYS,
    encoded_saes,
    firing_windows,
    firings_of,
    run_firings,
)
from replication.study.study import Study
from writesae.evaluate.atoms import ATOM_KEYS
from writesae.evaluate.firings import draw_atoms


def per_atom(firings: pd.DataFrame, alive: pd.DataFrame) -> pd.DataFrame:
    """Return firings, median cosine, win rates and class per (atom, amplitude)."""
    marked = firings.assign(win=beats(firings), win_random=beats(firings, "atom", "random"))
    columns = dict(cosine=("cosine", "median"), firings=("win", "size"), win_rate=("win", "mean"))
    columns["win_rate_over_random"] = ("win_random", "mean")
    columns |= {name: (name, "median") for name in ("kl_atom", "kl_delete")}
    table = marked.groupby([*ATOM_KEYS, "amplitude"], as_index=False).agg(**columns)
    return table.merge(alive[[*ATOM_KEYS, "class"]], how="left", on=ATOM_KEYS)


def summarise(atoms: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return win rates per (host, target, amplitude, class or all) of 2 atoms or more; bootstrap by atom."""
    keys, rows = ["host", "target", "amplitude"], []
    for values, group in atoms.groupby(keys):
        for name, part in [("all", group), *group.groupby("class")]:
            if len(part) < 2:
                continue  # no interval
            rate, row = part.win_rate, dict(zip([*keys, "class"], [*values, name], strict=True))
            row |= dict(n_atoms=len(part), n_firings=int(part.firings.sum()), mean_win_rate=rate.mean())
            row |= ci(cluster_bootstrap(rate, part.atom, seed=seed)) | dict(median_win_rate=rate.median())
            rows.append(row | dict(lowest=rate.min(), highest=rate.max()))
    return pd.DataFrame(rows)


def run(study: Study) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write results alive_atoms (of each host's cell) and population_firings (of the drawn atoms)."""
    profile, alive, tables = study.profile, [], []
    for name in profile.hosts:
        settings, windows, drawn = profile.section("population", name), firing_windows(study, name), []
        for cell_sae in encoded_saes(study, name, [study.cell(name, settings.place)], "main", windows):
            firings = firings_of(study, cell_sae, windows)
            alive.append(alive_atoms(name, cell_sae, firings, profile.seed))
            atoms = draw_atoms(firings, settings.atoms, settings.fewest_firings, profile.seed)
            shuffled = firings[firings.atom.isin(atoms)].sample(frac=1.0, random_state=profile.seed)
            kept = shuffled.groupby("atom").head(settings.most_firings)
            drawn.append((cell_sae, kept.sort_values(["window", "position"]).reset_index(drop=True)))
        options = dict(conditions=CONDITIONS_OF_SURVEYS, scopes=("write",))
        options["batch_rows"] = profile.replacement.batch_rows
        tables.append(run_firings(study, name, "population_firings", windows, drawn, **options))
    return study.write("alive_atoms", pd.concat(alive, ignore_index=True)), study.gather("population_firings", tables)


def tables(study: Study, alive: pd.DataFrame, firings: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write and return results population.csv and population_summary.csv."""
    atoms = study.write("population", per_atom(firings, alive))
    return atoms, study.write("population_summary", summarise(atoms, study.profile.seed))


def shown(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the win rates of atoms for a reader, equally per atom."""
    columns = {"atoms": summary.n_atoms, "firings": layout.numbers(summary.n_firings, ",.0f")}
    columns |= {"mean win rate (%)": layout.estimates(summary, "mean_win_rate", "ci_low", "ci_high")}
    columns |= {"median (%)": layout.numbers(summary.median_win_rate, ".0f", 100)}
    columns |= {"range (%)": layout.ranges(summary.lowest, summary.highest)}
    return layout.shown(summary, ["target", "amplitude", "class"], columns)
