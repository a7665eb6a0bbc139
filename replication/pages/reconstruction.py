"""Notebook 02: how well the SAEs reconstruct what they are trained on."""

from __future__ import annotations

import pandas as pd

from replication import layout


def shown(saes: pd.DataFrame) -> pd.DataFrame:
    """Return the SAEs of the chosen cells for a reader, in the mean over seeds. saes: with place."""
    keys = ["host", "place", "target", "variant"]
    groups = saes.groupby(keys, sort=False)
    rows = groups.agg(seeds=("seed", "size"), atoms=("n_atoms", "first"), alive=("alive", "min")).reset_index()
    error = groups.fvu.agg(["mean", "min", "max"])
    columns = {"seeds": rows.seeds, "atoms": rows.atoms, "alive in every seed": rows.alive}
    return layout.shown(rows, keys, columns | {"FVU": _over_seeds(error)})


def _over_seeds(error: pd.DataFrame) -> list[str]:
    """Return means, with the range of the seeds where there are several."""
    spans = layout.ranges(error["min"], error["max"], 3, 1)
    rows = zip(error["mean"], spans, error["min"] < error["max"])
    return [f"{mean:.3f} ({span})" if several else f"{mean:.3f}" for mean, span, several in rows]
