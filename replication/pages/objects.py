"""Notebook 07_objects: the replacement test on the write, the whole state, and its reconstruction."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd

from replication import layout
from replication import statistics as stats
from replication.classes import write_cosines
from replication.study.firings import by_place, drawn_positions, firing_windows, firings_of, run_firings, saes_on
from replication.study.study import Study
from replication.study.training import main_variants
from writesae.evaluate.firings import firings_at
from writesae.evaluate.objects import replace_objects

CENTRES = ("mean", "none")
KEYS = ["host", "target", "centre", "object", "offset_kept"]
COLUMNS = ["host", "layer", "head", *KEYS[1:], "window", "passage", "position", "atom", "coefficient"]
COLUMNS += ["cosine", "atom_cosine", "kl_atom", "kl_delete", "kl_random"]

LINES = ("the write, by an SAE of writes", "the write", "the state", "the state, mean kept", "the reconstruction")


def run(study: Study) -> pd.DataFrame:
    """Write results objects.csv: one row per place, SAE and object, of all hosts and cells of the headline.

    The places are uniform over positions and the same for all SAEs of a host. cosine: of the atom to the
    native write there; atom_cosine: the median over all firings of the atom. KLs are in nats.
    """
    profile, tables = study.profile, []
    for name, section in profile.hosts.items():
        windows, drawn = firing_windows(study, name), []
        cells = [study.cell(name, place) for place in section.cells]
        places = drawn_positions(study, windows, profile.section("objects", name).firings)
        variants = [x for x in main_variants(study, name) if x.centre in CENTRES and x.seed == profile.seed]
        wanted = [(cell, target, x.role) for x, cell, target in product(variants, cells, profile.saes.targets)]
        for cell_sae in saes_on(study, name, windows, wanted):
            every = firings_of(study, cell_sae, windows)
            medians = every.assign(cosine=write_cosines(cell_sae, every)).groupby("atom").cosine.median()
            firings = firings_at(cell_sae, places)
            drawn.append((cell_sae, firings.assign(atom_cosine=firings.atom.map(medians))))
        rows = profile.section("replacement", name).batch_rows
        tables.append(run_firings(study, name, "objects", windows, drawn, replace_objects, batch_rows=rows)[COLUMNS])
    return study.gather("objects", tables)


def of_paper_cells(rows: pd.DataFrame, places: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the paper's cells, which are pooled; places: cells.csv."""
    named = by_place(rows, places)
    return named[named.cells == "pooled"]


def summarise(rows: pd.DataFrame, places: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return a row per (host, cell or the paper's cells pooled, target, centre, object, offset kept or not).

    n; win_rate: the share of places at which the atom beats deletion, with the bootstrap interval by passage;
    kl_*: medians in nats; rho: Spearman's, of winning and cosine, with the same bootstrap. places: cells.csv.
    """

    def row(part: pd.DataFrame) -> dict:
        numbers = dict(n=len(part), n_passages=part.passage.nunique()) | _win_rate(part, resamples, seed)
        numbers |= {f"kl_{name}": part[f"kl_{name}"].median() for name in ("atom", "delete", "random")}
        rho = stats.clustered_spearman(stats.beats(part), part.cosine, part.passage, resamples, seed)
        return numbers | stats.with_ends("rho", rho.value, rho)

    return stats.per_group(by_place(rows, places), [KEYS[0], "cells", *KEYS[1:]], row)


def _win_rate(part: pd.DataFrame, resamples: int, seed: int) -> dict:
    win = stats.beats(part)
    interval = stats.cluster_bootstrap(win, part.passage, resamples=resamples, seed=seed)
    return stats.with_ends("win_rate", win.mean(), interval)


def by_cosine(rows: pd.DataFrame, bins: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Return win rates, over the cells in `rows`, per bin of the atom's cosine to the native write.

    bins: the columns cosine_low and cosine_high, ascending. cosine_of: "firing" takes the cosine at the
    place, "atom" the atom's median, as in the paper's Table 13. Intervals: bootstrap by passage.
    """
    edges, tables = [*bins.cosine_low, np.inf], []
    for name, column in (("firing", "cosine"), ("atom", "atom_cosine")):
        cut = pd.cut(rows[column], edges, right=False, labels=False)
        tables.append(rows.assign(cosine_of=name, bin=cut).dropna(subset="bin"))

    def row(part: pd.DataFrame) -> dict:
        atoms = part[["layer", "head", "atom"]].drop_duplicates()
        ends = bins.iloc[int(part.bin.iloc[0])]
        numbers = dict(cosine_low=ends.cosine_low, cosine_high=ends.cosine_high)
        return numbers | dict(n=len(part), n_atoms=len(atoms)) | _win_rate(part, resamples, seed)

    keys = [*KEYS, "cosine_of", "bin"]
    return stats.per_group(pd.concat(tables), keys, row, sort=True).astype(dict(bin=int))


def fingerprint(summary: pd.DataFrame, nats: float, small: float) -> pd.DataFrame:
    """Return what tells objects apart: rows of `summary` over the paper's cells, with two verdicts in words.

    wins: "rise", "flat" or "fall" with the cosine, by the interval of rho. scale: "Table 2" if the median KL
    of deletion is nearer, as a ratio, to `nats`, and "footnotes" if it is nearer to `small`.
    """
    pooled = summary[summary.cells == "pooled"]
    wins = np.select([pooled.rho_low > 0, pooled.rho_high < 0], ["rise", "fall"], "flat")
    scale = np.where(pooled.kl_delete > np.sqrt(nats * small), "Table 2", "footnotes")
    return pooled.assign(wins=wins, scale=scale)


def named(table: pd.DataFrame) -> pd.DataFrame:
    """Add the column `line`, the readable name of what is replaced (one of LINES)."""
    state = table.object.eq("state") & table.offset_kept
    names = table.object.map(dict(write=LINES[1], state=LINES[2], reconstruction=LINES[4]))
    return table.assign(line=names.mask(state, LINES[3]).mask(table.target == "write", LINES[0]))


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return `summarise` over the paper's cells for a notebook: intervals as text, KLs in millinats."""
    pooled = named(summary[summary.cells == "pooled"])

    columns = {"firings": pooled.n, "atom beats deletion (%)": layout.estimates(pooled, "win_rate")}
    columns |= {"rank correlation with cosine": layout.plain(pooled, "rho")}
    for name in ("delete", "atom"):
        columns[f"KL({name}), millinats"] = layout.numbers(pooled[f"kl_{name}"], ".3f", 1000)
    return layout.shown(pooled.rename(columns=dict(line="replaced")), ["host", "centre", "replaced"], columns)


def readable_bins(binned: pd.DataFrame, bins: pd.DataFrame, host: str, cosine_of: str) -> pd.DataFrame:
    """Return the win rates (%) of a host as text, one row per centre and line, one column per bin, below the
    paper's. bins: `papers_table13`."""
    part = named(binned[(binned.host == host) & (binned.cosine_of == cosine_of)])
    texts = [f"{100 * rate:.0f} (n = {n:,})" for rate, n in zip(part.win_rate, part.n, strict=True)]
    names, heading = layout.bin_names(bins.cosine_low[1:]), "cosine of the atom"
    part = part.assign(**{heading: part.bin.map(dict(enumerate(names))), "replaced": part.line})
    wide = layout.across(part, ["centre", "replaced"], heading, texts).reindex(columns=names, fill_value="")
    paper = [f"{100 * rate:.0f} (n = {n:,})" for rate, n in zip(bins.atom_wins, bins.firings, strict=True)]
    first = pd.MultiIndex.from_tuples([("the paper", "the paper's Table 13")], names=wide.index.names)
    return pd.concat([pd.DataFrame([paper], first, wide.columns), wide])
