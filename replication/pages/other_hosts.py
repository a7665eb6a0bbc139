"""Notebook 10: the same experiments on every architecture (the paper's Sec. 3.3, App. F.4, Sec. 6.2).

All numbers are those of the cell `middle`, so that hosts with one cell and with three can be compared."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication import layout
from replication.statistics import beats, cluster_bootstrap, per_group, r2, wilson, with_ends
from replication.study.study import Study
from writesae.evaluate.shifts import draw_positions, measure_shifts
from writesae.harvesting import harvest

PLACE = "middle"
MAGNITUDE = 3.0  # of the install, in native write norms, as in the paper's Table 3


def _line(host: str, quantity: str, choice: str, value: float, interval: tuple[float, float], n: int) -> dict:
    low, high = interval
    return dict(host=host, quantity=quantity, choice=choice, value=value, ci_low=low, ci_high=high, n=n)


def against_flat(firings: pd.DataFrame, cells: pd.DataFrame) -> list[dict]:
    """Return the win rate of the state-trained atom minus that of the flat SAE's top singular pair (X11-X13).

    In percentage points, on the same firings at matched norm; bootstrap by atom."""
    part = firings.merge(cells[cells.place == PLACE][["host", "layer", "head"]], on=["host", "layer", "head"])
    part = part[(part.target == "state") & (part.amplitude == "matched_norm") & (part.read == "write")]
    rows = []
    for host, group in part.groupby("host", sort=False):
        gap = 100.0 * (beats(group).astype(float) - beats(group, "flat_svd"))
        interval = cluster_bootstrap(gap, group.atom, resamples=1000)
        rows.append(_line(host, "atom less flat SVD (pp)", "state, matched_norm", gap.mean(), interval, len(group)))
    return rows


def installs(trials: pd.DataFrame) -> list[dict]:
    """Return the median lift of the target and the increase of inclusion at 3x; bootstrap by prompt."""
    rows = []
    for (host, direction), part in trials[trials.magnitude == MAGNITUDE].groupby(["host", "direction"], sort=False):
        lift = part.first_step_lift.to_numpy()
        increase = (part.included_edited - part.included_native).to_numpy(dtype=float)
        for name, values, statistic in (("lift (nats)", lift, np.median), ("rise of inclusion", increase, np.mean)):
            interval = cluster_bootstrap(values, part.prompt, statistic, resamples=1000)
            rows.append(_line(host, name, direction, statistic(values), interval, len(part)))
    return rows


def cosines(alive: pd.DataFrame) -> list[dict]:
    """Return medians of the atoms' cosines to the native write per class (X2-X8); bootstrap by atom."""
    rows = []
    for (host, target, name), part in alive.groupby(["host", "target", "class"], sort=False):
        if len(part) > 1:  # else there is no interval
            interval = cluster_bootstrap(part.cosine, part.atom, np.median, resamples=1000)
            choice = f"{target}, {name}"
            rows.append(_line(host, "cosine to the write", choice, part.cosine.median(), interval, len(part)))
    return rows


def side_by_side(study: Study) -> pd.DataFrame:
    """Write and return results other_hosts.csv: one row per (host, quantity, choice).

    The atom's win rate over deletion (bootstrap by atom), R2 (bootstrap over atoms), and the rows above."""
    rates, fits = study.table("replacement_summary"), study.table("logit_shift_summary")
    rows = [
        _line(r.host, "win rate", f"{r.target}, {r.amplitude}", r.win_rate, (r.boot_low, r.boot_high), r.n)
        for r in rates[(rates.cells == PLACE) & (rates["read"] == "write")].itertuples()
    ]
    rows += against_flat(study.table("replacement"), study.cells)
    rows += [
        _line(r.host, "R2", f"{r.predictor}, {r.eps:g}", r.r2_median, (r.ci_low, r.ci_high), r.n_fits)
        for r in fits.itertuples()
    ]
    rows += installs(study.table("install")) + cosines(study.table("alive_atoms"))
    return study.write("other_hosts", pd.DataFrame(rows))


# Predicted shifts in every cell

CLOSED_FORMS = ("exact", "through_layer", "through_norm")


def shifts_by_cell(study: Study) -> pd.DataFrame:
    """Write and return results shift_by_cell.csv: one row per (cell, eps), medians over atoms.

    The atoms are native writes at other positions of the same prompts, so no SAE is needed.
    """
    tables = []
    for name in study.profile.hosts:
        profile, settings = study.profile, study.profile.section("logit_shift", name)
        count, length = settings.cells.prompts, settings.prompt_tokens
        windows = study.windows(name, "heldout")[slice(0, count)].beginnings(length)
        t0 = draw_positions(count, profile.data.first_position, length - settings.horizon, profile.seed)
        drawn = np.random.default_rng(profile.seed).integers((0, 0), (count, length), (settings.cells.atoms, 2))
        options = dict(eps=settings.cells.eps, horizon=settings.horizon, write=profile.saes.write)
        given = dict(windows=windows, t0=t0, places=torch.from_numpy(drawn), options=options)
        cells = study.host(name).cells[:: settings.cells.every]
        tables.append(study.stage("shift_by_cell", name, cells, _in_cell, host=study.host(name), **given))
    return study.gather("shift_by_cell", tables)


def _in_cell(cell: tuple[int, int], host, windows, t0, places, options) -> pd.DataFrame:
    factors = harvest(host, windows.tokens, [cell], len(windows), progress=False)[cell]
    rows, positions = places.unbind(1)
    writes = factors.key[rows, positions], factors.write(options["write"])[rows, positions]
    points = measure_shifts(host, windows, t0, cell, *(F.normalize(x, dim=-1) for x in writes), **options)
    medians = per_group(points, ["eps", "atom"], _parts).groupby("eps").median().drop(columns="atom").reset_index()
    return medians.assign(host=host.name, layer=cell[0], head=cell[1], n_atoms=len(places), n_prompts=len(windows))


def _parts(points: pd.DataFrame) -> dict:
    """Return R2 over prompts, and the errors of linear parts as shares of the shift's variance.

    linear_layer: of a linear edited layer; linear_above: of linear layers above and a linear final norm;
    rest: what remains when that norm is exact. cosine: between the first two, which can cancel."""
    layer, above = points.through_layer - points.exact, points.measured - points.through_layer
    size = ((points.measured - points.measured.mean()) ** 2).sum()
    row = {name: r2(points.measured, points[name]) for name in CLOSED_FORMS}
    row |= dict(linear_layer=(layer**2).sum() / size, linear_above=(above**2).sum() / size)
    cosine = (layer * above).sum() / np.sqrt((layer**2).sum() * (above**2).sum())
    return row | dict(rest=1 - row["through_norm"], cosine=cosine)


def summarise_cells(study: Study, cells: pd.DataFrame) -> pd.DataFrame:
    """Write and return results shift_by_cell_summary.csv: one row per (host, eps), medians over cells.

    layer_ahead, norm_ahead: share of cells in which these predictors have a higher R2 than first order, with
    Wilson's intervals. cosine_behind: median cosine in the cells in which through_layer has the lower one."""

    def row(part: pd.DataFrame) -> dict:
        medians = part[[*CLOSED_FORMS, "linear_layer", "linear_above", "rest"]].median()
        numbers = dict(n_cells=len(part)) | medians.to_dict()
        for name in ("layer", "norm"):
            ahead = part[f"through_{name}"] > part.exact
            numbers |= with_ends(f"{name}_ahead", ahead.mean(), wilson(int(ahead.sum()), len(part)))
        return numbers | dict(cosine_behind=part.cosine[part.through_layer < part.exact].median())

    return study.write("shift_by_cell_summary", per_group(cells, ["host", "eps"], row))


def shown_ranks(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the ranks of writes of each host for a reader. cells: the table all_cells."""
    names = dict(added_write_rank="rank of added writes", effective_write_rank="rank of effective writes")
    every = cells.groupby("host", sort=False)[list(names)].agg(lambda x: ", ".join(map(str, sorted(set(x)))))
    every = every.rename(columns=names).reset_index()
    return layout.shown(every, ["host"], {heading: every[heading] for heading in names.values()})


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `side_by_side` for a reader, hosts across, without R2."""
    rows = table[table.quantity != "R2"]
    words = dict(state="SAE of states", write="SAE of writes", paper="the paper's direction", gamma="top pair of Γ")
    rows = rows.assign(**{"SAE or direction": rows.choice.replace(words, regex=True)})
    texts = [layout.interval(row.value, row.ci_low, row.ci_high, ".2g") for row in rows.itertuples()]
    return layout.across(rows, ["quantity", "SAE or direction"], "host", texts)


def shown_saes(saes: pd.DataFrame) -> pd.DataFrame:
    """Return the SAEs of every host for a reader. saes: with the column place."""
    columns = {"layer, head": layout.cell_names(saes), "atoms": saes.n_atoms, "active": saes.k}
    columns |= {"FVU": layout.numbers(saes.fvu, ".3f"), "alive": saes.alive}
    return layout.shown(saes, ["host", "place", "target"], columns)


def shown_cells(summary: pd.DataFrame) -> pd.DataFrame:
    """Return the summary for a reader: errors in percent of the shift's variance."""
    names = dict(linear_layer="linear layer (%)", linear_above="linear above (%)", rest="the same, norm exact (%)")
    columns = {heading: layout.numbers(summary[name], ".2f", 100) for name, heading in names.items()}
    for name, what in (("layer", "through layer"), ("norm", "through norm")):
        ahead = zip(summary[f"{name}_ahead"], summary.n_cells, strict=True)
        columns[f"{what} ahead"] = [f"{share * n:.0f} of {n}" for share, n in ahead]
    columns["cosine where behind"] = layout.numbers(summary.cosine_behind)
    return layout.shown(summary, ["host", "eps"], columns)
