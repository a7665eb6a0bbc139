"""replication.scorecard.causes: each line reads its own row, and changes one thing of the line before."""

import itertools

import pandas as pd
import pytest

from replication.scorecard import causes

CHOICES = ("pooling", "write", "kl_direction", "reading")
LEVELS = [
    ["first", *dict.fromkeys(cause.where["level"] for cause in causes.causes() if cause.where.get("choice") == name)]
    for name in CHOICES
]
UNIVERSES = pd.DataFrame(list(itertools.product(("here", "other"), ("state", "write"), ("delete", "random"), *LEVELS)))
UNIVERSES.columns = ["host", "target", "control", *CHOICES]
UNIVERSES["win_rate"] = (
    0.4
    - 0.1 * (UNIVERSES.pooling == "most_firing")
    + 0.02 * (UNIVERSES.reading == "write, mean")
    + 0.3 * (UNIVERSES.target == "write") * (UNIVERSES.pooling == "most_firing")
)


def tables_of(name: str) -> pd.DataFrame:
    """Tables in which every row has a value of its own: its number over 1,000."""
    if name == "multiverse":
        return UNIVERSES
    lines = [cause for cause in causes.causes() if cause.table == name]
    rows = [dict(host=host) | cause.where for host in ("other", "here") for cause in lines]
    if lines[0].difference:
        rows = [dict(host=host, choice=name, level="first") for host in ("other", "here") for name in CHOICES] + rows
    table = pd.DataFrame(rows).drop_duplicates(ignore_index=True)
    value = "difference" if lines[0].difference else "win_rate"
    ends = ("ci_low", "ci_high") if lines[0].difference else ("win_rate_low", "win_rate_high")
    numbers = {value: table.index / 1000, ends[0]: table.index / 1000 - 0.01, ends[1]: table.index / 1000 + 0.01}
    if lines[0].difference:  # by passage the interval is wider
        numbers |= dict(passage_low=table.index / 1000 - 0.03, passage_high=table.index / 1000 + 0.02)
    return table.assign(**numbers, n=7, seeds=3) if name == "headline" else table.assign(**numbers)


def test_every_line_reads_its_own_row():
    table = causes.measured(tables_of, "here")
    assert len(table) == len(causes.causes()) and set(table.host) == {"here"}
    for cause, line in zip(causes.causes(), table.itertuples(), strict=True):
        source = tables_of(cause.table)
        hit = source[(source.host == "here") & (source[list(cause.where)] == pd.Series(cause.where)).all(axis=1)]
        assert line.value == pytest.approx(hit["difference" if cause.difference else "win_rate"].item())
        assert line.high - line.low == pytest.approx(0.05 if cause.difference else 0.02)
    assert not table.duplicated(["table", "value"]).any(), "no two causes read one row"


def test_effects_of_choices_have_the_mean_change_for_states_and_deletion_beside_them():
    table = causes.measured(tables_of, "here").set_index("cause")["states_and_deletion"]
    assert table["few atoms, those that fire most (the paper: 18 selected ones)"] == pytest.approx(-0.1), (
        "and not that of both targets"
    )
    assert table["the KL as a mean over the next tokens"] == pytest.approx(0.02)
    assert table["the write as the whole change of the state"] == pytest.approx(0, abs=1e-12)
    assert table[causes.measured(tables_of, "here").quantity.to_numpy() == "win rate"].isna().all()


def test_headline_lines_change_one_thing_each():
    wheres = [cause.where for cause in causes.causes() if cause.table == "headline"]
    assert wheres[0] == causes.PAPER and sum(wheres[1][x] != wheres[0][x] for x in wheres[0]) == 1
    assert sum(wheres[2][x] != wheres[1][x] for x in wheres[1]) == 1
    for where in wheres[3:]:
        assert sum(where[x] != causes.HERE[x] for x in where) == 1


def test_a_host_without_a_table_s_rows_leaves_those_lines_out():
    assert causes.measured(lambda name: tables_of(name)[lambda x: x.host == "other"].head(1), "other").shape[0] == 2


def test_the_reader_s_table_begins_with_the_paper():
    shown = causes.shown(causes.measured(tables_of, "here"), 0.924)
    assert shown.percent.iloc[0] == "92.4" and shown.percent.iloc[1].endswith("]")
    assert shown.percent[shown.quantity == "difference"].str.match(r"[+-]").all()
