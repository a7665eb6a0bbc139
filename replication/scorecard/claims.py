"""The numbers of the paper: claims in paper/claims.csv, and values from its figures in paper/figures.csv."""

from __future__ import annotations

from functools import cache

import pandas as pd

from replication.study.paths import ROOT

CLAIMS, FIGURES = ROOT / "paper" / "claims.csv", ROOT / "paper" / "figures.csv"


@cache
def _values() -> dict[str, float]:
    tables = (pd.read_csv(path).set_index("id").value for path in (CLAIMS, FIGURES))
    return pd.concat(tables).dropna().to_dict()


def papers_value(*names: str) -> float | list[float]:
    """Return the paper's number for an id, or a list for several ids. Raises KeyError for ids without one."""
    values = [_values()[name] for name in names]
    return values[0] if len(values) == 1 else values
