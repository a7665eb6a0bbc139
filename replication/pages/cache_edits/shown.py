"""The tables of notebook 11, for a reader."""

from __future__ import annotations

import pandas as pd

from replication import layout

DONE = dict(delete="write deleted", subtract="atom taken out", add="atom added", random="another atom added")
ERASED = dict(delete="deleted", atom="atom instead", random="random instead", beside="random beside")
SOURCES = dict(other="other text", same="the tested firings")
CHANGE = ("median_change", "ci_low", "ci_high")


def _erased(table: pd.DataFrame) -> dict:
    """Return the columns of an erasure: log p in millinats."""
    columns = {
        "n": table.n,
        "change of log p (millinats)": layout.estimates(table, *CHANGE, digits=1, scale=1000),
    }
    columns["falls (%)"] = layout.estimates(table, "falls")
    return columns | {"p": layout.p_values(table.wilcoxon_p)}


def preferred(table: pd.DataFrame) -> pd.DataFrame:
    """Return the preferred token of each atom, found on other text and on the tested firings."""
    rows = table.assign(token_from=table.token_from.map(SOURCES))
    texts = [f"{row.text} (n = {row.firings})" for row in rows.itertuples()]
    return layout.across(rows, ["atom"], "token_from", texts)


def erased(table: pd.DataFrame) -> pd.DataFrame:
    """Return the changes of log p over all atoms."""
    rows = table.assign(token_from=table.token_from.map(SOURCES), done=table.condition.map(DONE))
    rows["where"] = rows["where"].map(dict(firing="its firings", elsewhere="elsewhere"))
    return layout.shown(rows, ["where", "done", "dose", "token_from"], _erased(table))


def each_atom(table: pd.DataFrame) -> pd.DataFrame:
    """Return the changes of log p atom by atom."""
    rows = table.assign(token_from=table.token_from.map(SOURCES))
    return layout.shown(rows, ["atom", "token_from"], _erased(table))


def single(table: pd.DataFrame, paper: float) -> pd.DataFrame:
    """Return sign and size of one write. paper: the paper's share of right signs."""
    papers = pd.Series(paper, table.index).where((table.direction == "paper") & (table.predictor == "paper"))
    columns = {"sign right (%)": layout.estimates(table, "sign_agreement", "ci_low", "ci_high")}
    columns |= {"the paper (%)": layout.numbers(papers, ".1f", 100)}
    columns |= {"logit rises (%)": layout.estimates(table, "rose")}
    columns |= {"measured over predicted": layout.plain(table, "median_ratio")}
    columns |= {"pooled R2": layout.plain(table, "r2_pooled")}
    return layout.shown(table, ["direction", "predictor"], columns)


def text_quality(table: pd.DataFrame) -> pd.DataFrame:
    """Return what amplified atoms do to the text besides newlines."""
    columns = {
        "heads": layout.numbers(table["heads"], ".0f"),
        "norm of the state": layout.numbers(table.state_norm),
    }
    columns |= {"paragraphs": layout.numbers(table.paragraphs, ".1f")}
    columns |= {"word length": layout.numbers(table.word_length, ".1f")}
    columns |= {"different tokens (%)": layout.numbers(table.distinct, ".0f", 100)}
    return layout.shown(table, ["mode", "role", "dose"], columns)


def top_readers(table: pd.DataFrame) -> pd.DataFrame:
    """Return the top reader of each atom."""
    cells = table.rename(columns=dict(reader_layer="layer", reader_head="head"))
    columns = {"reader": layout.cell_names(cells), "contexts": table.n}
    columns |= {"times a random write": layout.plain(table, "ratio")}
    columns |= {"over all readers": layout.plain(table, "enrichment")}
    return layout.shown(table, ["class", "atom"], columns)


def registers(table: pd.DataFrame) -> pd.DataFrame:
    """Return what erasing all registers of a passage does to the loss, in millibits per token."""
    columns = {"passages": table.n, "firings per passage": layout.numbers(table.erased_a_passage, ".1f")}
    columns |= {"rise (millibits per token)": layout.estimates(table, "rise", digits=2, scale=1000)}
    columns |= {"beyond deletion": layout.estimates(table, "excess", digits=2, scale=1000)}
    columns |= {"passages above deletion": table.above_delete}
    return layout.shown(table.assign(done=table.condition.map(ERASED)), ["target", "done"], columns)
