"""How pages show their tables: words for keys, a value and its interval in one column, few digits.

A page's functions `shown` choose at most eight columns, the index included; the CSV has them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pandas as pd

from replication.plots import CENTRE_NAMES, CONDITION_NAMES, PREDICTOR_NAMES, named, variant_name

PLACES = dict(regime="σ1/σ2 nearest to the paper's 12", weighty="largest cost")
WORDS: dict[str, Mapping] = dict(centre=CENTRE_NAMES, condition=CONDITION_NAMES, predictor=PREDICTOR_NAMES)
WORDS |= dict(place=PLACES, cells=PLACES, target=dict(state="states", write="writes"))
WORDS |= dict(direction=dict(paper="the paper's", gamma="top pair of Γ"), where=dict(firing="its firings"))
WORDS |= dict(token_from=dict(other="other text", same="the tested firings"))
HEADINGS = dict(place="cell", cells="cell", target="SAE of", centre="the mean", eps="size")
HEADINGS |= dict(predictor="prediction", target_class="target", magnitude="size", token_from="token found on")


def interval(value: float, low: float, high: float, form: str = ".2f") -> str:
    """Return "VALUE [LOW, HIGH]", without a missing interval; nothing for a missing value."""
    if pd.isna(value):
        return ""
    return f"{value:z{form}}" if pd.isna(low) else f"{value:z{form}} [{low:z{form}}, {high:z{form}}]"


def estimate(row: Any, value: str, low: str = "", high: str = "", digits: int = 0, scale: float = 100) -> str:
    """Return the `interval` of a row, by default of a share in percent.

    row: a Series, a dict or a named tuple. low, high: VALUE_low and VALUE_high by default."""
    names = value, low or f"{value}_low", high or f"{value}_high"
    ends = (getattr(row, name) if isinstance(row, tuple) else row[name] for name in names)
    return interval(*(scale * end for end in ends), f".{digits}f")


def percent(row: Any, *names: str, digits: int = 0) -> str:
    """Return the `estimate` of a share in a sentence, as "44% [41, 47]"."""
    value, space, ends = estimate(row, *names, digits=digits).partition(" ")
    return f"{value}%{space}{ends}"


def estimates(table: pd.DataFrame, *names: str, digits: int = 0, scale: float = 100) -> list[str]:
    """Return the `estimate` of every row. names: value, and low and high if they have other names."""
    return [estimate(row, *names, digits=digits, scale=scale) for row in table.to_dict("records")]


def of_targets(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the columns of a table with the shares `state` and `write`, of SAEs of both targets."""
    return {"SAEs of states (%)": estimates(table, "state"), "of writes (%)": estimates(table, "write")}


def plain(table: pd.DataFrame, *names: str, digits: int = 2) -> list[str]:
    """Return the `estimates` of numbers that are no shares."""
    return estimates(table, *names, digits=digits, scale=1)


def numbers(values: Iterable[float], form: str = ".2f", scale: float = 1) -> list[str]:
    """Return numbers as text; nothing for a missing one."""
    return ["" if pd.isna(x) else f"{scale * x:z{form}}" for x in values]


def ranges(low: Iterable[float], high: Iterable[float], digits: int = 0, scale: float = 100) -> list[str]:
    """Return "LOW to HIGH", by default of shares in percent."""
    return [f"{scale * a:z.{digits}f} to {scale * b:z.{digits}f}" for a, b in zip(low, high, strict=True)]


def p_values(values: Iterable[float]) -> list[str]:
    """Return p-values as text; those below 0.001 as "< 0.001"."""
    return ["" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.2g}" for p in values]


def bin_names(edges: Iterable[float]) -> list[str]:
    """Return the names of bins between ascending edges, as "below 0", "0 to 0.05", "0.3 and above"."""
    names = [f"{edge:g}" for edge in edges]
    return [f"below {names[0]}", *map(" to ".join, pairwise(names)), f"{names[-1]} and above"]


def cell_names(table: pd.DataFrame) -> list[str]:
    """Return the cells of a table with the columns layer and head, as "L4 H3"."""
    return [f"L{layer} H{head}" for layer, head in zip(table["layer"], table["head"], strict=True)]


def in_words(column: pd.Series) -> pd.Series:
    """Return a column of keys in words, under a readable heading."""
    words, name = WORDS.get(str(column.name), {}), variant_name if column.name == "variant" else named
    texts = [words.get(key, name(key) if isinstance(key, str) else key) for key in column]
    return pd.Series(texts, name=HEADINGS.get(str(column.name), str(column.name).replace("_", " ")))


def shown(table: pd.DataFrame, by: Sequence[str], columns: Mapping[str, Iterable]) -> pd.DataFrame:
    """Return a table for a reader: the columns `by` in words as its index, and `columns` by heading."""
    keys = pd.concat([in_words(table[name]) for name in by], axis=1)
    values = pd.DataFrame({heading: list(column) for heading, column in columns.items()})
    return pd.concat([keys, values], axis=1).set_index(list(keys))


def across(table: pd.DataFrame, by: Sequence[str], column: str, values: Iterable[Any]) -> pd.DataFrame:
    """Return texts, one row per `by` and one column per key of `column`, in the order of the table."""
    long = pd.concat([in_words(table[name]) for name in (*by, column)], axis=1)
    *index, heading = long
    wide = long.assign(text=list(values)).pivot_table("text", index, heading, aggfunc="first", sort=False)
    return wide.fillna("").rename_axis(columns=heading)


def counts(table: pd.DataFrame, by: Sequence[str], heading: str = "rows") -> pd.DataFrame:
    """Return the number of rows per group of the columns `by`."""
    sizes = table.groupby(list(by), sort=False).size().rename("size").reset_index()
    return shown(sizes, by, {heading: sizes["size"]})
