"""Page 14_every_cell: the sweeps `cells` and `seeds`, replacement in every recurrent cell of every host."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from replication import layout
from replication.statistics import cluster_bootstrap, per_group, spearman, student, with_ends
from replication.study.stages import rows_with
from replication.study.study import Study
from writesae.evaluate.replacement import AMPLITUDES as OF_THE_PAPER

AMPLITUDES = (*OF_THE_PAPER, "projection")
RANDOM = "+random"  # in the variants of SAEs whose atoms start at random
OTHER_SEEDS = "host-seeds"  # the profile with other hosts of the main host's architecture
MEAN = "mean"  # in the place of a host
CENTRES = ("none", "mean")
MEASURED = ("state", "write", "difference", "rho")


def by_amplitude(saes: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (SAE with firings, amplitude), with the columns of replacement_by_cell."""
    names = ["win_atom", "ci_low_atom", "ci_high_atom", "win_random", "win_mean_write"]
    tables = []
    for amplitude in AMPLITUDES:
        columns = {f"{name}_{amplitude}": name for name in names}
        others = [f"{name}_{a}" for name in names for a in AMPLITUDES if a != amplitude]
        table = saes.drop(columns=others).rename(columns=columns | {"firings": "n"})
        tables.append(table.assign(amplitude=amplitude))
    return pd.concat(tables, ignore_index=True).query("n > 0").reset_index(drop=True)


def targets_apart(cells: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return mean win rates over cells per target, and their difference; bootstrap by cell.

    n: places, which both targets share. write_ahead: the number of cells with the higher rate for writes.
    cells: the table of `by_amplitude`."""

    def row(part: pd.DataFrame) -> dict:
        wide = part.pivot(index=["layer", "head"], columns="target", values="win_atom").dropna()
        numbers = dict(n_cells=len(wide), n=int(part.n.sum()) // part.target.nunique())
        for name, rate in dict(state=wide.state, write=wide.write, difference=wide.write - wide.state).items():
            numbers |= with_ends(name, rate.mean(), cluster_bootstrap(rate, range(len(rate)), seed=seed))
        return numbers | dict(write_ahead=int((wide.write > wide.state).sum()))

    return per_group(cells, ["host", "amplitude"], row)


def by_start(saes: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the SAEs of the sweep `cells` whose atoms start at writes of the data, and those at random."""
    random = saes.variant.str.contains(RANDOM, regex=False)
    parts = dict(data=saes[~random], random=saes[random])
    return {name: part for name, part in parts.items() if len(part)}


def starts(saes: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return the numbers of `targets_apart` at the atom's own coefficient, one row per (host, start).

    Also the means over cells of the FVU per target, and Spearman's rho over cells of the state-trained atom's
    win rate with the half-life. saes: the table of the sweep `cells`."""

    def of_memory(part: pd.DataFrame) -> dict:
        rho = spearman(part.win_atom, part.half_life_median)
        return with_ends("rho", rho.value, rho)

    tables = []
    for name, part in by_start(saes).items():
        cells = by_amplitude(part).query("amplitude == 'coefficient'")
        errors = part.pivot_table("fvu", "host", "target").add_prefix("fvu_").reset_index()
        trends = per_group(cells[cells.target == "state"], ["host"], of_memory)
        rows = targets_apart(cells, seed).assign(start=name)
        tables.append(rows.merge(errors, on="host").merge(trends, on="host"))
    return pd.concat(tables).sort_values("host", kind="stable").reset_index(drop=True)


def over_hosts(saes: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Return one row per host of one architecture, and last their mean (host "mean").

    Columns: of `targets_apart` at the atom's own coefficient; rho, as in `starts`. Intervals of a host cover
    its cells; those of the mean are Student's over hosts, so that they cover the training of a host. saes: the
    rows of these hosts in the table of the sweep `cells`."""
    table = starts(by_start(saes)["data"], seed)
    totals = table[["n_cells", "n", "write_ahead"]].sum().to_dict()
    columns = [name + end for name in MEASURED for end in ("", "_low", "_high")]
    return _with_mean(table, MEASURED, totals)[["host", "n_cells", "n", "write_ahead", *columns]]


def _with_mean(table: pd.DataFrame, measured: Sequence[str], more: dict) -> pd.DataFrame:
    """Return a table of hosts with a last row, their mean: its intervals are Student's; `more`: other columns."""
    mean = dict(host=MEAN) | more
    for name in measured:
        mean |= with_ends(name, table[name].mean(), student(table[name]))
    return pd.concat([table, pd.DataFrame([mean])], ignore_index=True)


def more_hosts(study: Study, saes: pd.DataFrame) -> pd.DataFrame | None:
    """Return the table of `over_hosts` for the main host of mini and those of the profile `host-seeds`.

    None for another profile, and if the sweep of `host-seeds` is missing. saes: of the sweep `cells`."""
    more = study.kept_table("sweep-cells", OTHER_SEEDS)
    if study.profile.name != "mini" or more is None:
        return None
    return over_hosts(pd.concat([saes[saes.host == study.main], more]), study.profile.seed)


def headlines(study: Study) -> pd.DataFrame | None:
    """Return the headline of the hosts of `more_hosts`: per centre one row per host, and one of their mean.

    state, write: the share of places at which the atom of an SAE of this target beats deletion, over the paper's
    cells, by position, at the atom's own coefficient; difference: write - state, paired. Intervals of a host
    cover its places and trainings, those of the mean the training of a host. None as in `more_hosts`."""
    names = ("headline", "headline_contrasts")
    more = [study.kept_table(name, OTHER_SEEDS) for name in names]
    if study.profile.name != "mini" or any(table is None for table in more):
        return None
    own = [rows_with(study.table(name), host=study.main) for name in names]
    return over_headlines(*(pd.concat(pair) for pair in zip(own, more, strict=True)))


def over_headlines(rates: pd.DataFrame, contrasts: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `headlines` from headline.csv and headline_contrasts.csv of these hosts."""
    same = dict(cells="pooled", amplitude="coefficient")
    rates = rows_with(rates, **same, draw="positions", condition="atom")
    ends = ["win_rate", "win_rate_low", "win_rate_high"]
    wide = rates.pivot(index=["centre", "host"], columns="target", values=ends)
    wide.columns = [target + end.removeprefix("win_rate") for end, target in wide.columns]
    table, tables = rows_with(contrasts, **same).merge(wide.reset_index(), on=["centre", "host"]), []
    for _, part in table[table.centre.isin(CENTRES)].groupby("centre", sort=False):
        totals = dict(centre=part.centre.iloc[0], n=part.n.sum(), seeds=part.seeds.sum())
        tables.append(_with_mean(part, ("state", "write", "difference"), totals))
    return pd.concat(tables, ignore_index=True)


def over_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """Return one row per (host, target, amplitude), with these numbers:

    | column        | what                                                                                |
    |---------------|-------------------------------------------------------------------------------------|
    | mean_win_rate | mean over cells and seeds                                                           |
    | seed_sd       | standard deviation of the seeds' means over cells; lowest, highest: their extremes  |
    | cell_sd       | variation of a cell's rate between seeds: root of the mean variance within a cell   |
    | between_sd    | standard deviation between cells of their means over seeds                          |
    """

    def row(part: pd.DataFrame) -> dict:
        wide = part.pivot(index=["layer", "head"], columns="seed", values="win_atom").dropna()
        means = wide.mean()
        numbers = dict(n_cells=len(wide), n_seeds=len(means), n=int(part.n.sum()), mean_win_rate=means.mean())
        numbers |= dict(lowest=means.min(), highest=means.max(), seed_sd=means.std())
        return numbers | dict(cell_sd=wide.var(axis=1).mean() ** 0.5, between_sd=wide.mean(axis=1).std())

    return per_group(cells, ["host", "target", "amplitude"], row)


def shown(apart: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `targets_apart` for a reader, in percent and points."""
    columns = {"cells": apart.n_cells, "places": layout.numbers(apart.n, ",.0f")}
    columns |= layout.of_targets(apart)
    columns |= {"difference (points)": layout.estimates(apart, "difference"), "cells ahead": apart.write_ahead}
    return layout.shown(apart, ["host", "amplitude"], columns)


def shown_starts(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `starts` for a reader."""
    columns = layout.of_targets(table)
    columns |= {"cells ahead": [f"{row.write_ahead} of {row.n_cells}" for row in table.itertuples()]}
    columns |= {"rho with half-life": layout.plain(table, "rho")}
    columns |= {"FVU, states and writes": [f"{x.fvu_state:.2f}, {x.fvu_write:.2f}" for x in table.itertuples()]}
    rows = table.assign(start=table.start.map(dict(data="at writes", random="at random")))
    return layout.shown(rows, ["host", "start"], columns)


def shown_hosts(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `over_hosts` for a reader."""
    columns = {"places": layout.numbers(table.n, ",.0f")} | layout.of_targets(table)
    columns |= {"difference (points)": layout.estimates(table, "difference")}
    columns |= {"cells ahead": [f"{row.write_ahead} of {row.n_cells}" for row in table.itertuples()]}
    return layout.shown(table, ["host"], columns | {"rho with half-life": layout.plain(table, "rho")})


def shown_headlines(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `headlines` for a reader."""
    columns = {"places": layout.numbers(table.n, ",.0f"), "trainings": table.seeds} | layout.of_targets(table)
    columns |= {"difference (points)": layout.estimates(table, "difference")}
    return layout.shown(table, ["centre", "host"], columns)


def shown_seeds(spread: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `over_seeds` for a reader; standard deviations in points."""
    columns = {"cells": spread.n_cells, "mean (%)": layout.numbers(spread.mean_win_rate, ".0f", 100)}
    columns |= {"sd of the seeds' means": layout.numbers(spread.seed_sd, ".1f", 100)}
    columns |= {"sd of one cell": layout.numbers(spread.cell_sd, ".1f", 100)}
    columns |= {"sd between cells": layout.numbers(spread.between_sd, ".1f", 100)}
    return layout.shown(spread, ["host", "target", "amplitude"], columns)
