"""Tables for readers: eight columns at most, no keys, few digits; also in the stored notebooks."""

import re
from html.parser import HTMLParser

import nbformat
import numpy as np
import pandas as pd
import pytest

from replication import layout
from replication.plots import HOST
from replication.study.paths import ROOT

KEYS = re.compile(rf"\b({'|'.join([*HOST, 'matched_norm'])})\b|^(True|False|nan|NaN|None|<NA>)$")
DIGITS = re.compile(r"[1-9]\d*\.\d{4}|\d\.0*[1-9]\d{4}")  # more than four that count


class Tables(HTMLParser):
    """Keeps the tables of pandas in a page: the texts of their headings, and all rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.cell = [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.of_pandas = "dataframe" in dict(attributes).get("class", "")
            if self.of_pandas:
                self.tables.append(dict(headings=[], rows=[]))
        if tag in ("thead", "tbody"):
            self.part = tag
        if tag == "tr" and self.of_pandas:
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.of_pandas:
            self.tables[-1]["rows"][-1].append(self.cell)
            if self.part == "thead":
                self.tables[-1]["headings"].append(self.cell)
            self.cell = None


def faults(text: str) -> list[str]:
    """Return what is wrong with the tables of an HTML output."""
    wrong = []
    for table in Tables(text).tables:
        width = max(map(len, table["rows"]))
        if width > 8:
            wrong.append(f"{width} columns")
        wrong += [f"the heading {name}" for name in table["headings"] if re.search(r"[a-z]_[a-z]", name)]
        wrong += [
            f"the text {cell}" for row in table["rows"] for cell in row if KEYS.search(cell) or DIGITS.search(cell)
        ]
    return wrong


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_tables_of_the_notebooks_are_for_readers(path):
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        for output in cell.get("outputs", []):
            assert not faults(output.get("data", {}).get("text/html", "")), f"cell {number}"


def test_faults_are_found():
    wide = pd.DataFrame(np.zeros((2, 8)), columns=list("abcdefgh"))
    assert faults(wide.to_html()) == ["9 columns"]
    assert faults(wide.drop(columns="a").to_html()) == []
    bad = pd.DataFrame(dict(win_rate=["0.5", "0.123456"], host=["mamba2", "x"], kept=[True, None]))
    assert faults(bad.to_html(index=False))[0] == "the heading win_rate" and len(faults(bad.to_html())) == 5


def test_an_interval_in_one_column():
    assert layout.interval(0.5, 0.25, 0.75) == "0.50 [0.25, 0.75]"
    assert layout.interval(-0.001, -0.3, 0.2, ".1f") == "0.0 [-0.3, 0.2]"  # no -0.0
    assert layout.interval(np.nan, 1, 2) == "" and layout.interval(1, np.nan, np.nan, "g") == "1"
    table = pd.DataFrame(dict(x=[0.124, 0.5], x_low=[0.1, 0.4], x_high=[0.2, 0.6], low=[0.0, 0.3]))
    assert layout.estimates(table, "x") == ["12 [10, 20]", "50 [40, 60]"]
    assert layout.estimates(table, "x", "low", digits=1, scale=10) == ["1.2 [0.0, 2.0]", "5.0 [3.0, 6.0]"]
    assert layout.estimate(next(table.itertuples()), "x") == layout.estimate(table.iloc[0], "x") == "12 [10, 20]"
    assert layout.percent(table.iloc[0], "x") == "12% [10, 20]"
    assert layout.percent(dict(x=0.5, low=np.nan, high=np.nan), "x", "low", "high", digits=1) == "50.0%"


def test_numbers_as_text():
    assert layout.numbers([1234.5, np.nan], ",.0f", 10) == ["12,345", ""]
    assert layout.p_values([0.0004, 0.0234, np.nan]) == ["< 0.001", "0.023", ""]
    assert layout.ranges([0.1], [0.254]) == ["10 to 25"]
    assert layout.cell_names(pd.DataFrame(dict(layer=[4], head=[3]))) == ["L4 H3"]


TABLE = pd.DataFrame(
    dict(host=["rwkv7", "mamba2", "mamba2"], target=["write", "state", "write"], amplitude=["matched_norm"] * 3)
).set_index(pd.Index([7, 3, 5]))


def test_keys_become_words():
    shown = layout.shown(TABLE, ["host", "target"], {"firings": TABLE.amplitude.index})
    assert shown.index.names == ["host", "SAE of"] and shown.firings.tolist() == [7, 3, 5]
    assert shown.index.tolist() == [("RWKV-7", "writes"), ("Mamba-2", "states"), ("Mamba-2", "writes")]
    assert layout.counts(TABLE, ["host", "amplitude"], "n").n.to_dict() == {
        ("RWKV-7", "native norm"): 1,
        ("Mamba-2", "native norm"): 2,
    }


def test_keys_across_keep_the_order_of_the_table():
    wide = layout.across(TABLE, ["target"], "host", ["a", "b", "c"])
    assert list(wide) == ["RWKV-7", "Mamba-2"] and wide.index.tolist() == ["writes", "states"]
    assert wide.loc["states"].tolist() == ["", "b"] and wide.columns.name == "host"
