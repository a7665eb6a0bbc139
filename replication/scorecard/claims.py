"""The paper's numbers: its claims in paper/claims.csv, and more that figures show in paper/figures.csv."""

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
    """Return the paper's number for an id of claims.csv or figures.csv, or the list of numbers for several
    ids.

    Raises KeyError for an id that has no number there.
    """
    values = [_values()[name] for name in names]
    return values[0] if len(values) == 1 else values
