"""The tables of the sweeps `cells` and `seeds`, read for page 11_every_cell: the replacement test in every
recurrent cell of every host, and of three seeds of every head of the headline's layers."""

from __future__ import annotations

import pandas as pd

from replication.statistics import cluster_bootstrap
from writesae.evaluate.replacement import AMPLITUDES


def by_amplitude(saes: pd.DataFrame) -> pd.DataFrame:
    """A line an (SAE, amplitude) from a sweep's line an SAE, with the columns of replacement_by_cell: n,
    win_atom with ci_low_atom and ci_high_atom, win_random, win_mean_write. SAEs that fire nowhere have no
    line."""
    names = ["win_atom", "ci_low_atom", "ci_high_atom", "win_random", "win_mean_write"]
    tables = []
    for amplitude in AMPLITUDES:
        columns = {f"{name}_{amplitude}": name for name in names}
        others = [f"{name}_{a}" for name in names for a in AMPLITUDES if a != amplitude]
        tables.append(saes.drop(columns=others).rename(columns=columns | {"firings": "n"}).assign(amplitude=amplitude))
    return pd.concat(tables, ignore_index=True).query("n > 0").reset_index(drop=True)


def targets_apart(cells: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A line a (host, amplitude): win rates in the mean over cells, trained on states and on writes, and
    their difference, with bootstrap intervals by cell; `write_ahead`: the cells in which training on writes
    has the higher rate.

    cells: the table of `by_amplitude`, one SAE a cell and target."""
    rows, keys = [], ["host", "amplitude"]
    for values, part in cells.groupby(keys, sort=False):
        wide = part.pivot(index=["layer", "head"], columns="target", values="win_atom").dropna()
        row = dict(zip(keys, values, strict=True), n_cells=len(wide), n=int(part.n.sum()))
        for name, found in dict(state=wide.state, write=wide.write, difference=wide.write - wide.state).items():
            interval = cluster_bootstrap(found.to_numpy(), range(len(found)), seed=seed)
            row |= {name: found.mean(), f"{name}_low": interval.low, f"{name}_high": interval.high}
        rows.append(row | dict(write_ahead=int((wide.write > wide.state).sum())))
    return pd.DataFrame(rows)


def over_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """A line a (host, target, amplitude): mean win rate over cells and seeds; `seed_sd`, the deviation of the
    seeds' means over cells, with the least and the largest of these; `cell_sd`, what a cell's rate varies
    between seeds (root of the mean variance within a cell); `sampling_sd`, what it would vary by the number
    of firings alone; `between_sd`, what cells differ by (deviation of the cells' means over seeds)."""
    rows, keys = [], ["host", "target", "amplitude"]
    for values, part in cells.groupby(keys, sort=False):
        wide = part.pivot(index=["layer", "head"], columns="seed", values="win_atom").dropna()
        means = wide.mean()
        binomial = (part.win_atom * (1 - part.win_atom) / part.n).mean() ** 0.5
        row = dict(zip(keys, values, strict=True), n_cells=len(wide), n_seeds=len(means), n=int(part.n.sum()))
        row |= dict(mean_win_rate=means.mean(), lowest=means.min(), highest=means.max(), seed_sd=means.std())
        row |= dict(cell_sd=wide.var(axis=1).mean() ** 0.5, sampling_sd=binomial, between_sd=wide.mean(axis=1).std())
        rows.append(row)
    return pd.DataFrame(rows)
