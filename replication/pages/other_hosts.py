"""Notebook 08: the same experiments on every architecture (the paper's Sec. 3.3, App. F.4, Sec. 6.2).

All numbers are those of the cell `middle`, so that hosts with one cell and with three can be compared."""

from __future__ import annotations

import numpy as np
import pandas as pd

from replication.statistics import beats, cluster_bootstrap
from replication.study.study import Study

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
