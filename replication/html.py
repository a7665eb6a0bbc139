"""Pieces of HTML that the atom browser and the widgets share."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd

from writesae.evaluate.atoms import frequent_tokens, top_contexts
from writesae.text import Windows

BEFORE, AFTER = 14, 6  # tokens shown around a firing, as in notebook 03
PROMOTED_FIRINGS = 3  # of an atom's top contexts, over which promoted tokens are averaged


def plain(values, digits: int = 4) -> list:
    """Numbers for JSON, with so many significant digits; None for what is missing."""
    short = [None if pd.isna(x) or np.isinf(x) else float(f"{x:.{digits}g}") for x in values]
    return [int(x) if x is not None and x.is_integer() else x for x in short]


# Text


def spans(tokenizer, tokens: Sequence[int], firing: dict[int, float], position: int) -> list:
    """The text around a position: plain strings, and [text, coefficient] for each token at which the atom fires, with a
    third element, 1, for the token at `position` itself. firing: position -> coefficient."""
    parts, waiting = [], []

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    for t in range(max(0, position - BEFORE), min(len(tokens), position + AFTER + 1)):
        if t not in firing:
            waiting.append(tokens[t])
            continue
        if waiting:
            parts.append(decode(waiting))
            waiting = []
        parts.append([decode([tokens[t]]), *plain([firing[t]], 3), *([1] if t == position else [])])
    return [*parts, decode(waiting)] if waiting else parts


def contexts(tokenizer, windows: Windows, firings: pd.DataFrame, count: int) -> dict[int, list]:
    """atom -> its top contexts, largest coefficient first: each (passage, spans)."""
    fires: dict[tuple, dict] = {}
    rows = zip(firings.atom, firings.window, firings.position, firings.coefficient, strict=True)
    for atom, window, position, coefficient in rows:
        fires.setdefault((atom, window), {})[position] = coefficient
    found: dict[int, list] = {}
    for row in top_contexts(tokenizer, windows, firings, count).itertuples():
        tokens, here = windows.tokens[row.window].tolist(), fires[row.atom, row.window]
        found.setdefault(row.atom, []).append([row.passage, spans(tokenizer, tokens, here, row.position)])
    return found


def fires_on(tokenizer, windows: Windows, firings: pd.DataFrame) -> dict[int, str]:
    """atom -> the tokens at which it fires most often, with their shares of its firings."""
    return {atom: frequent_tokens(tokenizer, windows, own) for atom, own in firings.groupby("atom")}


# HTML


def table_html(table: pd.DataFrame) -> str:
    """A table with its text escaped; numbers with three significant digits."""
    return table.to_html(index=False, border=0, float_format="{:.3g}".format, na_rep="")


def marked_html(parts: Sequence) -> str:
    """Text of plain strings and marked pieces, each a [text, ...]: escaped, line breaks as ⏎."""
    pieces = [(part, "{}") if isinstance(part, str) else (part[0], "<mark>{}</mark>") for part in parts]
    return "".join(form.format(html.escape(text.replace("\n", "⏎"))) for text, form in pieces)


def sentence_html(error: Exception) -> str:
    return f"<p><b>{html.escape(str(error))}</b></p>"
