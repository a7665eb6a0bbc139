"""The tables of notebook 11, for a reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd

from replication import layout
from replication.study.stages import rows_with

DONE = {"firing delete": "write deleted", "firing subtract": "atom taken out", "elsewhere add": "atom added"}
DONE |= {"firing random": "another atom taken out", "elsewhere random": "another atom added"}
ERASED = dict(delete="deleted", atom="atom instead", random="random instead", beside="random beside")
CHANGE = ("median_change", "ci_low", "ci_high")


def _erased(table: pd.DataFrame) -> dict:
    """Return the columns of an erasure: log p in millinats."""
    columns = {"n": table.n}
    columns["change of log p (millinats)"] = layout.estimates(table, *CHANGE, digits=1, scale=1000)
    columns["falls (%)"] = layout.estimates(table, "falls")
    return columns | {"p": layout.p_values(table.wilcoxon_p)}


def preferred(table: pd.DataFrame) -> pd.DataFrame:
    """Return the preferred token of each atom, found on other text and on the tested firings."""
    texts = [f"{row.text} (n = {row.firings})" for row in table.itertuples()]
    return layout.across(table, ["atom"], "token_from", texts)


def erased(table: pd.DataFrame) -> pd.DataFrame:
    """Return the changes of log p over all atoms."""
    rows = table.assign(done=(table["where"] + " " + table.condition).map(DONE))
    return layout.shown(rows, ["where", "done", "dose", "token_from"], _erased(table))


def each_atom(table: pd.DataFrame) -> pd.DataFrame:
    """Return the changes of log p atom by atom."""
    return layout.shown(table, ["atom", "token_from"], _erased(table))


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
    columns = {"heads": layout.numbers(table["heads"], ".0f")}
    columns |= {"norm of the state": layout.numbers(table.state_norm)}
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


class Line(NamedTuple):
    """A number of the paper, and the row of a summary that has ours. scale: the unit of both."""

    what: str
    paper: float | None
    table: str
    where: dict
    columns: tuple[str, ...]
    scale: float = 1000


def _lines(papers_value: Callable) -> list[Line]:
    """Return the numbers of the five edits that the paper has, or that decide how to read them."""
    erased, elsewhere, single, deleted, random, reader = papers_value("E1", "E2", "I1", "R11", "R12", "top_reader")
    erase, write, registers = "cache_erase_summary", "single_write_summary", "register_erase_summary"
    every = dict(atom="all", token_from="same")
    atom, added = every | dict(condition="delete"), every | {"condition": "add", "where": "elsewhere", "dose": 4}
    five, direction = dict(role="boundary", dose=5), dict(direction="paper", predictor="paper")
    sign, states = ("sign_agreement", "ci_low", "ci_high"), dict(target="state")
    fewer = papers_value("N2") - papers_value("N1")
    return [
        Line("1 · log p of its token, write deleted (millinats)", erased, erase, atom, CHANGE),
        Line("1 · the same, token found on other text", None, erase, atom | dict(token_from="other"), CHANGE),
        Line("1 · log p, atom added elsewhere, 4x (millinats)", elsewhere, erase, added, CHANGE),
        Line("2 · logits that move as the formula says (%)", single, write, direction, sign, 100),
        Line("2 · logits that rise (%)", None, write, direction, ("rose",), 100),
        Line("3 · newlines, one cell, 5x", None, "newlines_summary", five | dict(mode="offset"), ("change",), 1),
        Line("3 · newlines, every head, kept, 5x", fewer, "newlines_summary", five | dict(mode="kept"), ("change",), 1),
        Line("4 · strongest reader of a register (ratio)", reader, "top_readers", {"class": "register"}, ("ratio",), 1),
        Line("5 · loss, deleted (millibits)", deleted, registers, states | dict(condition="delete"), ("rise",)),
        Line("5 · loss, random instead (millibits)", random, registers, states | dict(condition="random"), ("rise",)),
    ]


def compared(tables: dict[str, pd.DataFrame], papers_value: Callable) -> pd.DataFrame:
    """Return what came out of the five edits in the paper and here, without doses that the profile lacks.

    tables: the summaries of one host, by name; papers_value: that of `replication.scorecard.claims`."""
    lines = []
    for line in _lines(papers_value):
        table = tables[line.table].sort_values(line.columns[0], ascending=False)  # of the readers, the strongest
        for row in rows_with(table, **line.where)[:1].to_dict("records"):
            paper = "" if line.paper is None else f"{line.scale * line.paper:.1f}"
            here = layout.estimate(row, *line.columns, digits=1, scale=line.scale)
            lines.append({"what": line.what, "the paper": paper, "here": here, "n": row["n"]})
    return pd.DataFrame(lines).set_index("what")
