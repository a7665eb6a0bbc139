"""The numbers of the paper: claims.csv in paper/, other values in figures.csv, Table 13 in table13.csv."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from replication.study.paths import ROOT

CLAIMS, FIGURES = ROOT / "paper" / "claims.csv", ROOT / "paper" / "figures.csv"
TABLE13 = ROOT / "paper" / "table13.csv"


@cache
def _values() -> dict[str, float]:
    tables = (pd.read_csv(path).set_index("id").value for path in (CLAIMS, FIGURES))
    return pd.concat(tables).dropna().to_dict()


def papers_value(*names: str) -> float | list[float]:
    """Return the paper's number for an id, or a list for several ids. Raises KeyError for ids without one."""
    values = [_values()[name] for name in names]
    return values[0] if len(values) == 1 else values


def papers_table13() -> pd.DataFrame:
    """Return the paper's Table 13, one row per bin of the atom's cosine to the native write.

    Columns: cosine_low (in the bin) and cosine_high (not in the bin), which are infinite at the ends; atoms,
    firings, and atom_wins, the share of firings at which the atom beats deletion.
    """
    table = pd.read_csv(TABLE13)
    return table.fillna(dict(cosine_low=-np.inf, cosine_high=np.inf))
