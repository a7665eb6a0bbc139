"""The comparison with reference results, on toy tables, and the tolerances of the suite."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from replication.commands.verify import TOLERANCES, Tolerance, judge, measure, read_tolerances
from replication.study.stages import write_table

TABLE = pd.DataFrame({"host": ["a", "a", "b"], "eps": [0.1, 0.3, 0.1], "rate": [0.5, 0.8, 0.0], "status": list("xyz")})
PROVENANCE = {"profile": "mini", "config": "0", "host": "toy", "seed": 0, "seconds": 0}


def compare(reference, fresh, tolerance):
    problems, used = measure(reference, fresh, tolerance)
    return problems + used.index[used > 1].tolist()


def _tolerance(**more):
    return Tolerance(**{"file": "t.csv", "keys": ["host", "eps"], "metric": "rate", "reason": "test", **more})


def _with(row, column, value):
    changed = TABLE.copy()
    changed[column] = changed[column].astype(object)
    changed.loc[row, column] = value
    return changed


def test_equal_tables_in_another_order_agree():
    assert compare(TABLE, TABLE.iloc[::-1], _tolerance(absolute=0)) == []
    assert compare(TABLE, TABLE, _tolerance(metric="status", equal=True)) == []


@pytest.mark.parametrize(("limit", "value", "fine"), [(0.05, 0.849, True), (0.05, 0.751, True), (0.05, 0.851, False)])
def test_absolute(limit, value, fine):
    problems = compare(TABLE, _with(1, "rate", value), _tolerance(absolute=limit))
    assert (problems == []) is fine
    if not fine:
        assert problems == ["t.csv [host=a, eps=0.3] rate is 0.851, in the reference 0.8 (allowed: absolute 0.05)"]


def test_relative_is_of_the_reference():
    assert compare(TABLE, _with(1, "rate", 0.87), _tolerance(relative=0.1)) == []
    assert len(compare(TABLE, _with(1, "rate", 0.89), _tolerance(relative=0.1))) == 1
    assert len(compare(TABLE, _with(2, "rate", 1e-9), _tolerance(relative=0.1))) == 1


@pytest.mark.parametrize(
    ("before", "after", "fine"), [(0.99, 0.95, True), (0.99, 0.93, False), (-279, -348, True), (-279, -208, False)]
)
def test_of_absolute_and_relative_the_larger_counts(before, after, fine):
    """An R2 near 1 may change by 0.05. An R2 of -279 may change by a quarter of 280, its distance from 1."""
    tolerance = _tolerance(absolute=0.05, relative=0.25, origin=1)
    problems = compare(_with(1, "rate", before), _with(1, "rate", after), tolerance)
    assert (problems == []) is fine
    assert fine or problems[0].endswith("(allowed: absolute 0.05 or relative 0.25 of the distance from 1)")


@pytest.mark.parametrize(
    ("value", "low", "high", "share"),
    [
        (0.8, 0.6, 0.9, 0),
        (0.95, 0.85, 0.99, 0.75),  # distance 0.15, divided by the facing half-widths 0.1 + 0.1
        (0.65, 0.6, 0.725, 0.15 / 0.175),
        (0.95, 0.91, 0.99, 0.15 / 0.14),
        (0.65, 0.6, 0.69, 0.15 / 0.14),
        (0.81, np.nan, np.nan, 0.1),  # no interval counts as an interval of width 0
        (0.91, np.nan, np.nan, 1.1),
    ],
)
def test_intervals_must_meet(value, low, high, share):
    before = TABLE.assign(low=[0.4, 0.7, 0.0], high=[0.6, 0.9, 0.0])
    after = before.copy()
    after.loc[1, ["rate", "low", "high"]] = value, low, high
    tolerance = _tolerance(overlap=("low", "high"))
    for tables in ((before, after), (after, before)):
        problems = compare(*tables, tolerance)
        assert bool(problems) is (share > 1)
        assert measure(*tables, tolerance)[1].max() == pytest.approx(share)
    if share > 1 and low == low:
        said = f"rate is {value} [{low}, {high}], in the reference 0.8 [0.7, 0.9] (allowed: intervals that meet)"
        assert compare(before, after, tolerance) == [f"t.csv [host=a, eps=0.3] {said}"]


def test_an_interval_agrees_with_an_interval_only():
    before = TABLE.assign(low=0.0, high=1.0)
    tolerance = _tolerance(overlap=("low", "high"))
    assert len(compare(before, before.assign(rate=[np.nan, 0.8, 0.0]), tolerance)) == 1
    assert len(compare(before, _with(1, "rate", "text").assign(low=0.0, high=1.0), tolerance)) == 1
    assert compare(before, before.drop(columns="low"), tolerance) == ["t.csv: the fresh table has no column low"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.2), (0.9, 1.0), (1.0, 0.0)])
def test_a_value_far_from_its_own_interval_fails(low, high):
    """Otherwise a wrong value with a right interval passes, and any value with a reversed one."""
    before = TABLE.assign(low=0.0, high=1.0)
    after = before.copy()
    after.loc[1, ["rate", "low", "high"]] = 0.7, low, high
    assert len(compare(before, after, _tolerance(overlap=("low", "high")))) == 1


def test_two_numbers_without_intervals_are_not_compared():
    bare = TABLE.assign(low=np.nan, high=np.nan)
    tolerance = _tolerance(overlap=("low", "high"))
    assert compare(bare, bare.assign(rate=[0.5, 0.1, 0.9]), tolerance) == []
    assert len(compare(bare, bare.assign(rate=[0.5, np.nan, 0.9]), tolerance)) == 1
    one = bare.assign(low=[0.4, 0.7, np.nan], high=[0.6, 0.9, np.nan])
    assert len(compare(one, bare.assign(rate=[0.5, 0.1, 0.9]), tolerance)) == 1, "the reference has an interval"


def test_status_must_be_equal():
    assert len(compare(TABLE, _with(0, "status", "y"), _tolerance(metric="status", equal=True))) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, "text", None])
def test_a_value_that_is_no_number_fails(value):
    assert len(compare(TABLE, _with(1, "rate", value), _tolerance(absolute=10))) == 1
    assert len(compare(_with(1, "rate", value), TABLE, _tolerance(absolute=10))) == 1


def test_missing_agrees_with_missing_only():
    missing = TABLE.assign(rate=[np.nan, 0.8, 0.0])
    assert compare(missing, missing, _tolerance(absolute=0)) == []
    assert len(compare(missing, TABLE, _tolerance(absolute=0))) == 1


def test_missing_keys_match():
    missing = TABLE.assign(eps=[np.nan, 0.3, 0.1])
    assert compare(missing, missing.copy(), _tolerance(absolute=0)) == []


def test_rows_must_be_the_same_on_both_sides():
    assert compare(TABLE, TABLE.iloc[:2], _tolerance(absolute=1)) == [
        "1 rows are missing, the first t.csv [host=b, eps=0.1]"
    ]
    assert compare(TABLE.iloc[:2], TABLE, _tolerance(absolute=1)) == [
        "1 rows are not in the reference, the first t.csv [host=b, eps=0.1]"
    ]


def test_columns_rows_and_unique_keys_are_needed():
    assert "no column rate" in compare(TABLE, TABLE.drop(columns="rate"), _tolerance(absolute=1))[0]
    assert "no rows" in compare(TABLE.iloc[:0], TABLE.iloc[:0], _tolerance(absolute=1))[0]
    assert "do not name one row" in compare(TABLE, TABLE, _tolerance(absolute=1, keys=["host"]))[0]


def test_files_are_checked_before_they_are_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path))
    for folder in ("old", "new"):
        write_table(TABLE, tmp_path / folder / "t.csv", PROVENANCE)
    folders, tolerances = (tmp_path / "old", tmp_path / "new"), [_tolerance(absolute=0)]
    assert judge("t.csv", *folders, tolerances).verdict == "identical"
    with open(tmp_path / "new" / "t.csv", "a") as file:
        file.write("c,1,1,w\n")
    assert judge("t.csv", *folders, tolerances).verdict == "damaged"
    for folder in folders:
        (folder / "t.csv").unlink()
        assert judge("t.csv", *folders, tolerances).verdict == "missing"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- {file: t.csv, keys: [a], metric: m, reason: r}",
        "- {file: t.csv, keys: [a], metric: m, reason: r, equal: true, relative: 1}",
        "- {file: t.csv, keys: [a], metric: m, reason: r, overlap: [low, high], absolute: 1}",
        "- {file: t.csv, keys: [a], metric: m, reason: r, overlap: [low]}",
        "- {file: t.csv, keys: [a], metric: m, reason: r, absolute: 1, origin: 1}",
        "- {file: t.csv, keys: [], metric: m, reason: r, absolute: 1}",
        "- {file: t.csv, keys: [a], metric: m, absolute: 1}",
        "- {file: t.csv, keys: [a], metric: m, reason: r, absolut: 1}",
    ],
)
def test_a_list_that_says_too_little_is_refused(tmp_path, text):
    path = tmp_path / "tolerances.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="tolerances.yaml"):
        read_tolerances(path)


def test_the_suites_own_tolerances_cover_the_contract():
    found = read_tolerances(Path(__file__).parents[1] / "reference" / "tolerances.yaml")
    summaries = ("logit_shift", "replacement", "population", "install")
    tables = {"hosts.csv", "cells.csv", "saes.csv", "scorecard.csv"} | {f"{name}_summary.csv" for name in summaries}
    assert tables <= {tolerance.file for tolerance in found}


OF_ATOMS = {"cache_erase_summary.csv", "readers_summary.csv"}  # rows are atoms: they vary by machine


def test_every_committed_summary_has_a_tolerance(last_commit):
    summaries = {path.name for path in last_commit("mini").glob("*_summary.csv")} - OF_ATOMS
    listed = {tolerance.file for tolerance in read_tolerances(TOLERANCES)}
    assert summaries <= listed, f"no tolerance for {', '.join(sorted(summaries - listed))}"
