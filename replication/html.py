"""Data and HTML of the atom browser and of the controls in notebooks 03 and 12."""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from writesae.evaluate.atoms import frequent_tokens, top_firings
from writesae.evaluate.promoted import KINDS
from writesae.text import Windows

BEFORE, AFTER = 14, 6  # tokens shown around a firing, as in notebook 03


# Data


def plain(values, digits: int = 4) -> list:
    """Return numbers for JSON, rounded to significant digits; None for a missing or infinite number."""
    short = [None if pd.isna(x) or np.isinf(x) else float(f"{x:.{digits}g}") for x in values]
    return [int(x) if x is not None and x.is_integer() else x for x in short]


def spans(tokenizer, tokens: Sequence[int], firing: dict[int, float], position: int) -> list:
    """Return the text around a position: plain strings, [text, coefficient] where the atom fires, and
    [text, coefficient, 1] at `position` itself. firing: position -> coefficient."""
    parts, waiting = [], []
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
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
    """Return atom -> its top contexts, each [passage, spans]. firings: those of one SAE."""
    coefficients: dict[tuple, dict] = {}
    rows = zip(firings.atom, firings.window, firings.position, firings.coefficient, strict=True)
    for atom, window, position, coefficient in rows:
        coefficients.setdefault((atom, window), {})[position] = coefficient
    shown: dict[int, list] = {}
    for row in top_firings(firings, count).itertuples():
        tokens, firing = windows.tokens[row.window].tolist(), coefficients[row.atom, row.window]
        shown.setdefault(row.atom, []).append([row.passage, spans(tokenizer, tokens, firing, row.position)])
    return shown


def fires_on(tokenizer, windows: Windows, firings: pd.DataFrame) -> dict[int, str]:
    """Return atom -> the tokens at which it fires most often, with their shares."""
    return {atom: frequent_tokens(tokenizer, windows, part) for atom, part in firings.groupby("atom")}


# HTML


def table_html(table: pd.DataFrame) -> str:
    """Return a table with escaped text and three significant digits."""
    return table.to_html(index=False, border=0, float_format="{:.3g}".format, na_rep="")


def marked_html(parts: Sequence) -> str:
    """Return escaped text of plain strings and marked pieces [text, ...]; line breaks as ⏎."""
    pieces = [(part, "{}") if isinstance(part, str) else (part[0], "<mark>{}</mark>") for part in parts]
    return "".join(form.format(html.escape(text.replace("\n", "⏎"))) for text, form in pieces)


def atom_html(title: str, facts: dict, shown: list, tokens: pd.DataFrame, tokenizer) -> str:
    """Return an atom's facts, its top contexts (`shown`, from `contexts`) and its `top_tokens` with their
    shifts, one column per direction and kind."""
    columns = {}
    for (direction, kind), rows in tokens.sort_values("rank").groupby(["direction", "kind"]):
        words = [repr(tokenizer.decode([token])) for token in rows.token]
        columns[f"{direction}, {kind}"] = [f"{w} {x:+.2g}" for w, x in zip(words, rows["shift"], strict=True)]
    order = [f"{direction}, {kind}" for direction in ("promoted", "demoted") for kind in KINDS]
    r2, n = tokens.groupby("kind").r2.first(), tokens.n.iloc[0]
    texts = "".join(f"<pre>{marked_html(parts)}</pre>" for _, parts in shown)
    return (
        f"<h4>{html.escape(title)}</h4>{table_html(pd.DataFrame([facts]))}"
        f"<p>Top contexts, one per passage; marked: the tokens at which it fires.</p>{texts}"
        f"<p>One native write norm of the atom, added at its n = {n} top contexts: mean shift of the next "
        "token's logits, relative to their mean. R2 over the vocabulary: "
        f"paper {r2['paper']:.3f}, exact {r2['exact']:.3f}.</p>"
        f"{table_html(pd.DataFrame(columns)[order])}"
    )


def install_html(summary: str, shifts: pd.DataFrame, texts: dict[str, list]) -> str:
    """Return the shifts of an install and its continuations side by side. texts: title -> parts to mark."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in texts)
    look = "text-align: left; vertical-align: top"
    cells = "".join(f'<td style="{look}"><pre>{marked_html(parts)}</pre></td>' for parts in texts.values())
    return (
        f"<p>{html.escape(summary)}</p>{table_html(shifts)}"
        f"<p>Greedy continuations, the target marked:</p><table><tr>{titles}</tr><tr>{cells}</tr></table>"
    )
